"""What the benchmarks beside this file share: processes, runs and their curves, tables, JSON."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch  # noqa: F401  # before a script, which would change how its threads wait
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that the scripts can be imported


def descendants(pid: int) -> list[psutil.Process]:
    """The processes that a process started, and those that they started."""
    return psutil.Process(pid).children(recursive=True)


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """User and system time that processes have used; nothing for those that have gone."""
    seconds = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            seconds += sum(process.cpu_times()[:2])
    return seconds


def megabytes(processes: Iterable[psutil.Process]) -> float:
    """Memory of processes together; a page that n of them share counts once (Pss)."""
    found = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += process.memory_full_info().pss / 2**20
    return found


def run(command: list[str], **settings: Any) -> str:
    """Runs a command. Returns what it printed; ends with its last words where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **settings)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def learn(script: str, folder: Path, name: str, typed: list[str]) -> dict[str, list[tuple[int, float]]]:
    """Trains in folder/runs/name, or goes on with what is there, if it is not done. Returns its curves."""
    learnt = folder / "runs" / name
    learnt.parent.mkdir(parents=True, exist_ok=True)
    words = ["--resume", f"runs/{name}"] if (learnt / "last.pt").exists() else ["--name", name, *typed]
    if not (learnt / "done").exists():
        run([sys.executable, str(ROOT / f"{script}.py"), *words], cwd=folder)
        (learnt / "done").touch()
    return read_curves(learnt)


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """A run's scalars, {tag: [(step, value), ...]}."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(row.step, row.value) for row in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def iteration_seconds(curves: dict) -> tuple[np.ndarray, np.ndarray]:
    """Decisions after each of a run's iterations, and the seconds that it took, its evaluation included."""
    steps, rates = np.array(curves["charts/SPS"]).T
    return steps, np.diff(steps, prepend=0) / rates


def load(script: Any, path: Path, track: str | None, races: int) -> tuple[Any, Any, list[int]]:
    """A checkpoint's settings, to race on its first track if on no other, network, and races' seeds."""
    checkpoint = script.load_checkpoint(path)
    args = dataclasses.replace(checkpoint["args"], eval_episodes=races)
    args.track = (track or args.track[0],)
    agent = script.make_agent(args, checkpoint)
    return args, agent, list(range(args.eval_seed, args.eval_seed + races))


def places(race: dict) -> np.ndarray:
    """Where a race went, (T, 4): metres down the track and right of its middle, heading, width."""
    found, along = np.zeros((len(race["trail"]), 4)), 0.0
    for i, (_, *point, _) in enumerate(race["trail"]):
        found[i] = race["geometry"].locate(point, along)
        along = found[i, 0]
    return found


def flags(**settings: Any) -> list[str]:
    """Settings as words of a command line; those that are None are left out."""
    words = []
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def in_turns(names: list[str], rounds: int) -> Iterable[tuple[int, str]]:
    """(round, name) of everybody's turns; each round begins with another name."""
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            yield number, name


def as_text(value: Any) -> str:
    """A cell of a table: numbers with three digits or more."""
    if not isinstance(value, float):
        return str(value) if value is not None else ""
    digits = 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:.{digits}f}"


def print_table(rows: dict[str, dict]) -> None:
    """Prints a row for each name and a column for each key of the rows, but for lists."""
    shown = {}
    for name, row in rows.items():
        shown[name] = {key: as_text(cell) for key, cell in row.items() if not isinstance(cell, list | dict)}
    keys = list(dict.fromkeys(key for row in shown.values() for key in row))
    widths = [2 + max(len(key), *(len(row.get(key, "")) for row in shown.values())) for key in keys]
    first = max(map(len, rows))
    print(" " * first + "".join(f"{key:>{width}}" for key, width in zip(keys, widths, strict=True)))
    for name, row in shown.items():
        cells = [f"{row.get(key, ''):>{width}}" for key, width in zip(keys, widths, strict=True)]
        print(f"{name:{first}}" + "".join(cells), flush=True)


def medians(rows: list[dict]) -> dict[str, float]:
    """The median of each number over several measurements."""
    numbers = [key for key, value in rows[0].items() if isinstance(value, int | float)]
    return {key: statistics.median(row[key] for row in rows) for key in numbers}


def write_json(path: Path | None, settings: Any, result: dict) -> None:
    """Writes a result, the settings and the machine, where a file is wanted."""
    if path is None:
        return
    names = ("torch", "gymnasium", "PySuperTuxKart", "PySuperTuxKart2", "stable_baselines3", "box2d")
    found = {one.name: one.version for one in importlib.metadata.distributions() if one.name in names}
    cores = len(os.sched_getaffinity(0))
    machine = {"cores": cores, "platform": platform.platform(), "python": platform.python_version(), **found}
    plain = {name: str(value) for name, value in dataclasses.asdict(settings).items() if name != "out"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, "settings": plain, "machine": machine}, indent=1) + "\n")
