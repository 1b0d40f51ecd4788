"""The world model: its speed, and its fast CarRacing beside Gymnasium's.

    python bench/worldmodel.py speed --seconds 8 --out FILE
    python bench/worldmodel.py worlds pretrained/carracing.pt --episodes 50 --out FILE

speed: frames a second of the loop that searches a controller (environment, V, M and C, in a process
for each core) over FastCarRacing, which draws one frame for each action, and over Gymnasium's own
CarRacing-v3, which draws them all, in turns; then steps a second of the dream. Weights are random:
they cost what learnt ones cost.

worlds: what an agent returns on the same tracks in FastCarRacing and in Gymnasium's CarRacing-v3,
and what random driving gets in the latter: the script's own, which collects the first footage, and
actions drawn evenly, each held as long as the agent's.
"""

import dataclasses
import itertools
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import common
import gymnasium as gym
import numpy as np
import torch
import tyro

import worldmodel_carracing as wm

CORES = wm.usable_cores()
WORLDS = {"FastCarRacing": wm.FastCarRacing, "Gymnasium's": wm.gymnasium_car_racing}


@dataclasses.dataclass
class Speed:
    seconds: float = 20.0  # time for each measurement
    rounds: int = 3  # turns of each; the medians count
    out: Path | None = None  # JSON file to write


@dataclasses.dataclass
class Worlds:
    checkpoint: tyro.conf.Positional[Path]  # agent that drives
    episodes: int = 100  # tracks in each world
    seed: int = 1000  # seed of the first track
    limit: int = 1000  # frames of an episode
    out: Path | None = None  # JSON file to write


def loop_speed(drivers: Any, agent: Any, controllers: torch.Tensor, world: Any, seconds: float) -> float:
    """Frames a second of all processes together, over about so many seconds."""
    seeds, frames, started = itertools.count(), 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        numbers = range(wm.SLOTS * CORES)
        jobs = [{"seed": next(seeds), "controller": i % len(controllers), "limit": 200} for i in numbers]
        frames += sum(result["frames"] for result in drivers.drive(agent, controllers, jobs, world))
    return frames / (time.perf_counter() - started)


def dream_speed(agent: wm.Agent, controllers: torch.Tensor, seconds: float) -> float:
    """Steps a second of the dream on all cores."""
    torch.set_num_threads(CORES)
    args, count = wm.Args(dream_steps=20), 0
    z = torch.randn(16, wm.LATENTS)
    state = (torch.zeros(1, 16, wm.HIDDEN), torch.zeros(1, 16, wm.HIDDEN))
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        wm.dream_returns(args, agent.memory, controllers, z, state, seed=count)
        count += len(controllers) * len(z) * args.dream_steps
    return count / (time.perf_counter() - started)


def speed(settings: Speed) -> None:
    torch.manual_seed(0)
    agent, controllers = wm.Agent(wm.Args()), torch.randn(64, 3, 289) * 0.05
    turns: dict[str, list[float]] = {name: [] for name in WORLDS}
    drivers = wm.Drivers(CORES)
    for world in WORLDS.values():  # starts what starts once
        loop_speed(drivers, agent, controllers, world, 0.1)
    for number, name in common.in_turns(list(turns), settings.rounds):
        turns[name].append(loop_speed(drivers, agent, controllers, WORLDS[name], settings.seconds))
        print(f"round {number + 1}, {name}: {turns[name][-1]:.0f} frames/s", flush=True)
    fast = turns["FastCarRacing"]
    table = {}
    for name, rates in turns.items():
        ratio = statistics.median(mine / rate for mine, rate in zip(fast, rates, strict=True))
        table[name] = {"frames/s": statistics.median(rates), "the first is": ratio}
    table["the dream"] = {"frames/s": dream_speed(agent, controllers, settings.seconds)}
    common.print_table(table)
    common.write_json(settings.out, settings, {"table": table, "turns": turns})


def drive_evenly(seed: int, repeat: int, limit: int) -> float:
    """Return of an episode of actions drawn evenly, each held for `repeat` frames."""
    env = gym.make("CarRacing-v3", max_episode_steps=limit)
    env.reset(seed=seed)
    env.action_space.seed(seed)
    earned = 0.0
    for frame in itertools.count():
        if frame % repeat == 0:
            action = env.action_space.sample()
        _, reward, terminated, truncated, _ = env.step(action)
        earned += float(reward)
        if terminated or truncated:
            return earned


def worlds(settings: Worlds) -> None:
    checkpoint = wm.load_checkpoint(settings.checkpoint)
    args = checkpoint["args"]
    agent = wm.Agent(args, checkpoint, settings.checkpoint)
    seeds = range(settings.seed, settings.seed + settings.episodes)
    jobs: list[dict] = [{"seed": seed, "controller": 0, "limit": settings.limit} for seed in seeds]
    at_random = [{**job, "noise": (0, 0)} for job in jobs]
    drives = {f"the agent, {name}": (jobs, world) for name, world in WORLDS.items()}
    drives["random, as it collects"] = (at_random, wm.gymnasium_car_racing)
    scores, drivers = {}, wm.Drivers(CORES)
    for name, (asked, world) in drives.items():
        results = drivers.drive(agent, agent.controller[None], asked, world)
        scores[name] = [result["return"] for result in results]
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        scores["random, evenly"] = pool.starmap(drive_evenly, [(i, args.action_repeat, settings.limit) for i in seeds])
    table = {}
    for name, values in scores.items():
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        table[name] = {"mean": float(np.mean(values)), "deviation": deviation, "tracks": len(values)}
    common.print_table(table)
    common.write_json(settings.out, settings, {"table": table, "returns": scores})


if __name__ == "__main__":
    chosen = tyro.cli(Speed | Worlds, description=__doc__)
    speed(chosen) if isinstance(chosen, Speed) else worlds(chosen)
