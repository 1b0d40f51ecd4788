"""What random driving scores in Gymnasium's CarRacing-v3, for a trained controller's score to be held against.

    python tests/bench/carracing_random.py --episodes 8 --json FILE

On the tracks of an evaluation (seeds 1000 and up), every action held for two frames as there: actions drawn evenly from
the action space, and the script's own random driving, which collects the first footage.
"""

import argparse
import importlib.metadata
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import gymnasium as gym  # noqa: E402
import torch  # noqa: E402

import worldmodel_carracing as wm  # noqa: E402


def drive_evenly(seed, repeat):
    """Result of an episode of actions from the action space, each held for `repeat` frames."""
    env = gym.make("CarRacing-v3")
    env.reset(seed=seed)
    env.action_space.seed(seed)
    earned, frame, over = 0.0, 0, False
    while not over:
        if frame % repeat == 0:
            action = env.action_space.sample()
        _, reward, terminated, truncated, info = env.step(action)
        earned, frame, over = earned + float(reward), frame + 1, terminated or truncated
    env.close()
    return {"return": earned, "frames": frame, "finished": bool(info.get("lap_finished", False))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=8, help="tracks")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the first track")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    seeds = range(args.seed, args.seed + args.episodes)
    workers = wm.Workers(min(os.cpu_count() or 1, args.episodes))
    workers.load(agent := wm.Agent("zh"))
    jobs = [{"seed": seed, "controller": None, "limit": 1000} for seed in seeds]
    collecting = workers.drive(torch.zeros_like(agent.controller)[None], jobs, world="gymnasium")
    workers.close()
    result = {
        "even": wm.summarize([drive_evenly(seed, agent.repeat) for seed in seeds]),
        "collecting": wm.summarize(collecting),
        "seeds": list(seeds),
        "versions": {name: importlib.metadata.version(name) for name in ("gymnasium", "numpy")},
    }
    for name in ("even", "collecting"):
        row = result[name]
        print(f"{name:11}{row['mean']:8.1f} +- {row['std']:.1f} over {len(seeds)} tracks")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
