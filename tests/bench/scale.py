"""Decisions/s of our sampler against games, picture size, cores and track: python tests/bench/scale.py --out scale.json

One of them changes at a time. The points take turns, each with new games, one iteration that warms up, and some seconds
that count; the table gives medians. Beside the rate stand CPU milliseconds per decision, of the games and of the
learner's process, and the share of the cores' time that neither used: what grows, or what waits, where the rate bends.
"""

import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import tyro
from processes import cpu_seconds, descendants, megabytes, print_rows

import ppo_tuxkart

CORES = sorted(os.sched_getaffinity(0))
TRACKS = ("scotland", "lighthouse", "hacienda", "snowtuxpeak", "zengarden", "cornfield_crossing", "olivermath", "abyss")


@dataclasses.dataclass
class Scale:
    games: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """numbers of games"""
    sizes: tuple[int, ...] = (36, 64, 96, 128, 192, 256)
    """sides of the square picture in pixels; 36 is the least that the network's convolutions take"""
    cores: tuple[int, ...] = tuple(range(1, len(CORES) + 1))
    """numbers of cores, for games and network together"""
    tracks: tuple[str, ...] = TRACKS
    """tracks"""
    num_envs: int = 16
    """games where their number is not what changes"""
    num_steps: int = 32
    """decisions per game and iteration"""
    seconds: float = 5.0
    """time for each measurement"""
    rounds: int = 3
    """measurements of each point"""
    engine: str = "auto"
    """game bindings"""
    out: Path | None = None
    """JSON file to write"""


def measure(settings, axis, value):
    """Figures of one point: `axis` is a field of Scale, `value` one of its values."""
    args = ppo_tuxkart.Args(engine=settings.engine, num_envs=settings.num_envs, num_steps=settings.num_steps)
    cores = CORES
    if axis == "games":
        args.num_envs = value
    elif axis == "sizes":
        args.width = args.height = value
    elif axis == "tracks":
        args.track = (value,)
    else:
        cores = CORES[:value]
    made_on = ppo_tuxkart.describe_setting(args)
    torch.manual_seed(0)
    agent = ppo_tuxkart.Agent(made_on["observation"], made_on["actions"])
    os.sched_setaffinity(0, cores)  # the games inherit it
    try:
        sampler = ppo_tuxkart.Sampler(args, torch.device("cpu"))
        sampler.reset(1)
        sampler.collect(agent)
        games = descendants(os.getpid())
        pids, decisions, started = {"learner": [os.getpid()], "games": games}, 0, time.perf_counter()
        before = {party: cpu_seconds(ids) for party, ids in pids.items()}
        while (spent := time.perf_counter() - started) < settings.seconds:
            sampler.collect(agent)
            decisions += args.num_envs * args.num_steps
        used = {party: cpu_seconds(ids) - before[party] for party, ids in pids.items()}
        memory = statistics.median(megabytes(pid, "Pss") for pid in games)
        sampler.close()
    finally:
        os.sched_setaffinity(0, CORES)
    figures = {"rate": decisions / spent, "idle": 1 - sum(used.values()) / spent / len(cores), "game_mb": memory}
    return figures | {f"{party}_ms": 1000 * seconds / decisions for party, seconds in used.items()}


def main(settings):
    torch.set_num_threads(1)
    axes = ("games", "sizes", "cores", "tracks")
    points = [(axis, value) for axis in axes for value in getattr(settings, axis)]
    found = {point: [] for point in points}
    for number in range(settings.rounds):
        for axis, value in points:
            found[axis, value].append(measure(settings, axis, value))
            print(f"round {number + 1}, {axis} {value}: {found[axis, value][-1]['rate']:.0f} decisions/s", flush=True)

    columns = {
        "rate": ("decisions/s", "{:.0f}"),
        "games_ms": ("CPU: games", "{:.2f} ms"),
        "learner_ms": ("CPU: learner", "{:.2f} ms"),
        "idle": ("idle", "{:.0%}"),
        "game_mb": ("a game", "{:.0f} MB"),
    }
    print(f"\n{settings.num_envs} games of 64 x 64 on scotland and {len(CORES)} cores, but for what the line says")
    table = []
    for (axis, value), rows in found.items():
        medians = {key: statistics.median(row[key] for row in rows) for key in columns}
        table.append({"axis": axis, "value": value, "medians": medians, "rounds": rows})
    print_rows(columns, {f"{point['axis']:7}{point['value']}": point["medians"] for point in table})
    if settings.out:
        result = {
            "points": table,
            "settings": {key: str(value) for key, value in dataclasses.asdict(settings).items()},
            "setting": ppo_tuxkart.describe_setting(ppo_tuxkart.Args(engine=settings.engine)),
            "machine": {"cores": len(CORES), "platform": platform.platform(), "python": platform.python_version()},
        }
        settings.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Scale, description=__doc__))
