"""Speed of World Models' parts, side by side in one run: `python tests/bench/worldmodel.py --json FILE`.

The loop is the one that searches a controller: environment, V, M and C, in one process for each core. It is timed over
FastCarRacing and over Gymnasium's own CarRacing-v3, in turns so that both meet the same machine; then the dream's steps
on all cores, and the time that each part of the fast loop takes. Weights are random: they cost what learnt ones cost.
Gymnasium's environment draws every frame; FastCarRacing only those that somebody sees, one for each action.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402

import worldmodel_carracing as wm  # noqa: E402


def loop_speed(workers, controllers, world, seconds, seed):
    """Frames/s of all workers together, over about so many seconds."""
    together, frames = wm.SLOTS * len(workers.processes), 0
    rate = (2000 if world == "fast" else 100) * len(workers.processes)
    started = time.time()
    while time.time() - started < seconds:
        jobs = max(1, round(rate * seconds / 2 / 200 / together)) * together  # every environment of every worker drives
        jobs = [{"seed": seed + i, "controller": i % len(controllers), "limit": 200} for i in range(jobs)]
        results = workers.drive(controllers, jobs, world=world)
        frames += sum(result["frames"] for result in results)
        rate = frames / (time.time() - started)
    return frames / (time.time() - started)


@torch.no_grad()
def shares(agent, controllers, frames=200):
    """Microseconds a frame of each part of the fast loop, in this process alone, one thread."""
    torch.set_num_threads(1)
    envs = [wm.FastCarRacing() for _ in range(wm.SLOTS)]
    spent = dict.fromkeys(("reset", "physics", "drawing", "V", "M and C", "the rest"), 0.0)

    def timed(part, function):
        def wrapper(*args, **settings):
            started, inside = time.perf_counter(), sum(spent.values())
            result = function(*args, **settings)
            spent[part] += time.perf_counter() - started - (sum(spent.values()) - inside)
            return result

        return wrapper

    for env in envs:
        env._render, env.step, env.reset = (
            timed(part, f) for part, f in (("drawing", env._render), ("physics", env.step), ("reset", env.reset))
        )
    kept = agent.vision.encode, agent.memory.forward, wm.wanted_actions
    agent.vision.encode, agent.memory.forward = timed("V", kept[0]), timed("M and C", kept[1])
    wm.wanted_actions = timed("M and C", kept[2])
    jobs = iter(
        [{"index": i, "seed": i, "controller": i % len(controllers), "limit": frames} for i in range(len(envs))]
    )
    timed("the rest", wm.drive)(envs, agent, controllers, lambda: next(jobs, None))
    agent.vision.encode, agent.memory.forward, wm.wanted_actions = kept
    return {part: 1e6 * seconds / frames / len(envs) for part, seconds in spent.items()}


def dream_speed(agent, controllers, seconds, starts=16, steps=20):
    """Steps/s of the dream on all cores: population x 16 dreams at once."""
    torch.set_num_threads(os.cpu_count() or 1)
    chance, count = torch.Generator().manual_seed(0), 0
    z, state = torch.randn(starts, wm.LATENTS), (torch.zeros(1, starts, wm.HIDDEN), torch.zeros(1, starts, wm.HIDDEN))
    started = time.time()
    while time.time() - started < seconds:
        wm.dream_returns(agent.memory, controllers, z, state, steps, 1.15, 0.1, chance)
        count += len(controllers) * starts * steps
    return count / (time.time() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="time for each measurement")
    parser.add_argument("--turns", type=int, default=3, help="times that each is measured; the median counts")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: cores)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    torch.manual_seed(0)
    agent, controllers = wm.Agent("zh"), torch.randn(64, 3, 289) * 0.05
    workers = wm.Workers(args.workers)
    workers.load(agent)
    for world in wm.ENVIRONMENTS:  # start everything that starts once
        workers.drive(controllers, [{"seed": i, "controller": i, "limit": 5} for i in range(32)], world=world)
    turns = []
    for turn in range(args.turns):
        fast = loop_speed(workers, controllers, "fast", args.seconds, 1000 * turn)
        slow = loop_speed(workers, controllers, "gymnasium", args.seconds, 1000 * turn)
        turns.append({"fast": fast, "gymnasium": slow, "ratio": fast / slow})
        print(f"turn {turn + 1}: {fast:.0f} frames/s fast, {slow:.0f} Gymnasium's, {fast / slow:.1f} times", flush=True)
    workers.close()
    middle = sorted(turns, key=lambda one: one["ratio"])[len(turns) // 2]
    dream, parts = dream_speed(agent, controllers, args.seconds), shares(agent, controllers)
    result = {"workers": args.workers, "turns": turns, "median": middle, "dream": dream, "microseconds": parts}
    result |= {name: importlib.metadata.version(name) for name in ("gymnasium", "torch", "pygame-ce")}
    print(
        f"\nloop (env + V + M + C), {args.workers} processes: {middle['fast']:.0f} frames/s, with Gymnasium's renderer"
    )
    print(f"{middle['gymnasium']:.0f}: {middle['ratio']:.1f} times. The dream makes {dream:.0f} steps/s on all cores.")
    for part, micros in parts.items():
        print(f"{part:12}{micros:8.0f} us/frame{micros / sum(parts.values()):8.0%}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
