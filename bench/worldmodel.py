"""The world model: its speed, and its fast CarRacing beside Gymnasium's.

    python bench/worldmodel.py speed --seconds 8 --out FILE
    python bench/worldmodel.py worlds pretrained/carracing.pt --episodes 50 --out FILE

speed: frames a second of the loop that searches a controller (environment, V, M and C, in a process for each core) over
FastCarRacing, which draws one frame for each action, and over Gymnasium's own CarRacing-v3, which draws them all; of
ctallec/world-models' way to drive, written anew: a process a core with Gymnasium's environment and a call of V (its
decoder too), M and C for every single frame; in turns. Then steps a second of the dream, and where the first loop spends
its time. Weights are random: they cost what learnt ones cost.

worlds: what an agent returns on the same tracks in FastCarRacing and in Gymnasium's CarRacing-v3, and what random driving
gets there: the script's own, which collects the first footage, and actions drawn evenly, each held as long as the agent's.
"""

import cProfile
import dataclasses
import itertools
import multiprocessing
import os
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

CORES = len(os.sched_getaffinity(0))
WORLDS = {"FastCarRacing": wm.FastCarRacing, "Gymnasium's": wm.gymnasium_car_racing}


@dataclasses.dataclass
class Speed:
    """How fast its parts are."""

    seconds: float = 20.0  # time for each measurement
    rounds: int = 3  # turns of each; the medians count
    out: Path | None = None  # JSON file to write


@dataclasses.dataclass
class Worlds:
    """What is returned where."""

    checkpoint: tyro.conf.Positional[Path]  # agent that drives
    episodes: int = 100  # tracks in each world
    seed: int = 1000  # seed of the first track
    limit: int = 1000  # frames of an episode
    out: Path | None = None  # JSON file to write


def loop_speed(drivers: wm.Drivers, controllers: torch.Tensor, seconds: float) -> float:
    """Frames a second of all processes together, over about so many seconds."""
    seeds, frames, started = itertools.count(), 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        jobs = [
            {"seed": next(seeds), "controller": i % len(controllers), "limit": 200} for i in range(wm.SLOTS * CORES)
        ]
        frames += sum(result["frames"] for result in drivers.drive(controllers, jobs))
    return frames / (time.perf_counter() - started)


@torch.no_grad()
def single_frames(number: int, seconds: float) -> float:
    """Frames a second of one process that looks at one picture at a time. Runs in a process of its own."""
    torch.set_num_threads(1)
    agent, controller, frames = wm.Agent(wm.Args()), 0.05 * torch.randn(1, 3, 289), 0
    env = gym.wrappers.TimeLimit(wm.gymnasium_car_racing(), 200)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        (picture, _), state, over = env.reset(seed=1000 * number + frames), None, False
        hidden = torch.zeros(1, wm.HIDDEN)
        while not over:
            z, _ = agent.vision.encode(torch.from_numpy(picture)[None])
            agent.vision.decode(z)
            action = wm.squash(wm.wanted_actions(z, hidden, controller))
            out, state = agent.memory(z[None], action[None], state)
            agent.memory.foretell(out)
            hidden = out[0]
            picture, _, terminated, truncated, _ = env.step(action[0].numpy())
            frames, over = frames + 1, terminated or truncated
    return frames / (time.perf_counter() - started)


def dream_speed(agent: wm.Agent, controllers: torch.Tensor, seconds: float) -> float:
    """Steps a second of the dream on all cores."""
    torch.set_num_threads(CORES)
    args, chance, count = wm.Args(dream_steps=20), torch.Generator().manual_seed(0), 0
    z = torch.randn(16, wm.LATENTS)
    state = (torch.zeros(1, 16, wm.HIDDEN), torch.zeros(1, 16, wm.HIDDEN))
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        wm.dream_returns(args, agent.memory, controllers, z, state, chance)
        count += len(controllers) * len(z) * args.dream_steps
    return count / (time.perf_counter() - started)


def profile_loop(agent: wm.Agent, controllers: torch.Tensor) -> dict[str, dict]:
    """Where `drive` spends its time, in this process alone, with one thread."""
    torch.set_num_threads(1)
    jobs = iter([{"index": i, "seed": i, "controller": i, "limit": 200} for i in range(wm.SLOTS)])
    envs: list[Any] = [wm.FastCarRacing() for _ in range(wm.SLOTS)]
    profiler = cProfile.Profile()
    profiler.runcall(wm.drive, envs, agent, controllers, lambda: next(jobs, None))
    return common.profile_table(profiler)


def speed(settings: Speed) -> None:
    torch.manual_seed(0)
    args = wm.Args(workers=CORES)
    agent, controllers = wm.Agent(args), torch.randn(64, 3, 289) * 0.05
    drivers = {name: wm.Drivers(args, agent, world) for name, world in WORLDS.items()}
    for pool in drivers.values():  # starts what starts once
        pool.drive(controllers, [{"seed": i, "controller": i, "limit": 5} for i in range(wm.SLOTS * CORES)])
    turns: dict[str, list[float]] = {name: [] for name in (*WORLDS, "single frames")}
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        for number, name in common.in_turns(list(turns), settings.rounds):
            if name in drivers:
                rate = loop_speed(drivers[name], controllers, settings.seconds)
            else:
                rate = sum(pool.starmap(single_frames, [(i, settings.seconds) for i in range(CORES)], chunksize=1))
            turns[name].append(rate)
            print(f"round {number + 1}, {name}: {rate:.0f} frames/s", flush=True)
    for each in drivers.values():
        each.close()
    fast = turns["FastCarRacing"]
    table = {}
    for name, rates in turns.items():
        ratio = statistics.median(mine / rate for mine, rate in zip(fast, rates, strict=True))
        table[name] = {"frames/s": statistics.median(rates), "the first is": ratio}
    table["the dream"] = {"frames/s": dream_speed(agent, controllers, settings.seconds)}
    common.print_table(table)
    profile = profile_loop(agent, controllers)
    common.print_table(profile)
    common.write_json(settings.out, settings, {"table": table, "turns": turns, "profile": profile})


def drive_evenly(seed: int, repeat: int, limit: int) -> float:
    """Return of an episode of actions drawn evenly, each held for `repeat` frames."""
    env = gym.make("CarRacing-v3", max_episode_steps=limit)
    env.reset(seed=seed)
    env.action_space.seed(seed)
    earned, over = 0.0, False
    while not over:
        action = env.action_space.sample()
        for _ in range(repeat):
            _, reward, terminated, truncated, _ = env.step(action)
            earned, over = earned + float(reward), terminated or truncated
            if over:
                break
    return earned


def worlds(settings: Worlds) -> None:
    checkpoint = wm.load_checkpoint(settings.checkpoint)
    args = dataclasses.replace(checkpoint["args"], workers=CORES)
    agent = wm.Agent(args)
    wm.load_weights(agent, checkpoint, settings.checkpoint)
    seeds = range(settings.seed, settings.seed + settings.episodes)
    jobs: list[dict] = [{"seed": seed, "controller": 0, "limit": settings.limit} for seed in seeds]
    returns = {}
    for name, world in WORLDS.items():
        drivers = wm.Drivers(args, agent, world)
        returns[f"the agent, {name}"] = drivers.drive(agent.controller[None], jobs)
        if world is wm.gymnasium_car_racing:
            random = drivers.drive(agent.controller[None], [{**job, "noise": (0, 0)} for job in jobs])
        drivers.close()
    scores = {name: [result["return"] for result in results] for name, results in returns.items()}
    scores["random, as it collects"] = [result["return"] for result in random]
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
