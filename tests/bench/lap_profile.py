"""Where on the track a checkpoint loses time to the game's AI.

    python tests/bench/lap_profile.py runs/<name>/best.pt --out profile.json

Races both on the evaluation's starts and prints the median seconds of each stretch, and the speed and the place on the
road at its end: metres to the right of the middle.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ppo_tuxkart


@dataclasses.dataclass
class Profile:
    checkpoint: tyro.conf.Positional[Path]  # whose greedy races are looked at
    races: int = 8  # races of each
    stretch: float = 60.0  # metres
    out: Path | None = None  # file for the result


def by_stretch(geometry, trail, edges):
    """Clock, speed and offset at some distances from the first point on. trail: (T, 5) of clock, x, y, z, speed."""
    along, offset = np.zeros((2, len(trail)))
    for i, point in enumerate(trail[:, 1:4]):
        along[i], offset[i] = geometry.locate(point, along[i - 1] if i else None)[:2]
    progress = np.concatenate([[0.0], np.cumsum(geometry.gain(along[:-1], along[1:]))])
    return [np.interp(edges, progress, column) for column in (trail[:, 0], trail[:, 4], offset)]


def main(settings):
    checkpoint = ppo_tuxkart.load_checkpoint(settings.checkpoint)
    args = ppo_tuxkart.Args(**checkpoint["args"])
    args.eval_episodes, here = settings.races, ppo_tuxkart.describe_setting(args)
    agent = ppo_tuxkart.Agent(here["observation"], here["actions"])
    ppo_tuxkart.load_weights(agent, checkpoint, settings.checkpoint, here)
    torch.set_num_threads(1)
    policies = {
        "agent": ppo_tuxkart.network_policy(agent, torch.device("cpu"), greedy=True),
        "ai": lambda obs: np.zeros((len(obs), len(here["actions"])), np.int64),
    }
    seeds, result = range(args.eval_seed, args.eval_seed + settings.races), {"setting": here}
    for driver, policy in policies.items():
        games = ppo_tuxkart.race_games(args, args.track[0], driver)
        try:
            races = ppo_tuxkart.run_races(games, policy, seeds)
            geometry = games.get("geometry")[0]
        finally:
            games.close()
        edges = np.arange(0, geometry.length, settings.stretch)
        trails = [np.array(race["trail"]) for race in races if race["finished"]]
        clocks, speeds, offsets = zip(*(by_stretch(geometry, trail, edges) for trail in trails), strict=True)
        result |= {"metres": edges.tolist(), driver: {"lap_times": [float(race["lap_time"]) for race in races]}}
        result[driver]["seconds"] = np.median(np.diff(clocks), 0).round(3).tolist()
        result[driver]["speed"] = np.median(speeds, 0).round(2).tolist()
        result[driver]["offset"] = np.median(offsets, 0).round(2).tolist()
    print(f"{'metres':>12}{'agent':>10}{'AI':>10}{'lost':>8}{'speed at the end':>20}{'right of the middle':>22}")
    ours, theirs = result["agent"], result["ai"]
    for i, (mine, other) in enumerate(zip(ours["seconds"], theirs["seconds"], strict=True)):
        stretch = f"{edges[i]:.0f}-{edges[i + 1]:.0f}"
        ends = f"{ours['speed'][i + 1]:.1f}, {theirs['speed'][i + 1]:.1f} m/s"
        asides = f"{ours['offset'][i + 1]:+.1f}, {theirs['offset'][i + 1]:+.1f} m"
        print(f"{stretch:>12}{mine:>8.2f} s{other:>8.2f} s{mine - other:>+8.2f}{ends:>20}{asides:>22}")
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Profile, description=__doc__))
