"""What the benchmarks beside this file share: processes as Linux knows them, runs' curves, tables, JSON."""

import atexit
import contextlib
import ctypes
import dataclasses
import importlib.metadata
import json
import os
import platform
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

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
    """Memory of processes together; a page that n of them share counts as 1/n of it for each (Pss)."""
    found = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += process.memory_full_info().pss / 2**20
    return found


def adopt_orphans() -> None:
    """Makes this process the parent of what its children leave behind, so that `end_all` finds it."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def end_all() -> None:
    """Ends whatever this process started that still runs. When it returns their memory is free again."""
    while left := descendants(os.getpid()):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)


def home(folder: Path | str) -> dict[str, str]:
    """This process's environment variables, but that games keep their settings and logs in a folder of their own."""
    return {**os.environ, "SUPERTUXKART_SAVEDIR": str(folder), "XDG_CONFIG_HOME": str(folder)}


def run_turn(command: list[str], environment: dict[str, str] | None = None) -> dict:
    """Runs a command, ends all that it left, and returns the JSON in the last line that it printed."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    finally:
        end_all()
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def learn(script: str, folder: Path, name: str, typed: list[str]) -> float:
    """Trains in folder/runs/name until the end, or goes on with what is there; what is done is not done again.

    Returns the most memory that a process of it has held, in GB; 0 where nothing was left to do.
    """
    import torch  # here, since peers.py wants it imported at a moment of its own

    run = folder / "runs" / name
    run.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / f"{script}.py")]
    if (run / "last.pt").exists():
        checkpoint = torch.load(run / "last.pt", map_location="cpu", weights_only=True)
        args = checkpoint["args"]
        if checkpoint["iteration"] == args["total_timesteps"] // (args["num_envs"] * args["num_steps"]):
            return 0.0
        command += ["--resume", f"runs/{name}"]
    else:
        command += ["--name", name, *typed]
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen(command, cwd=folder, env=home(folder / "home"), stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            sys.exit(f"{name} did not come to its end:\n{said.read()[-3000:]}")
    return used.ru_maxrss * 1024 / 1e9


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


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """A run's scalars, {tag: [(step, value), ...]}: from its folder, or from a file of metrics."""
    if path.is_dir() and (path / "metrics.jsonl").exists():  # written by earlier versions of the scripts
        path = path / "metrics.jsonl"
    curves: dict[str, list[tuple[int, float]]] = {}
    names = {"charts/finish_rate": "charts/finished", "eval/median_lap": "eval/median"}  # in earlier versions
    if path.is_file():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for number, row in enumerate(rows):
            step = row.get("global_step", number)
            for tag, value in row.items():
                if isinstance(value, int | float):
                    curves.setdefault(names.get(tag, tag), []).append((step, value))
        return curves
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    for tag in events.Tags()["scalars"]:
        curves[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return curves


def as_text(value: Any) -> str:
    """A cell of a table: numbers with three digits or more."""
    if not isinstance(value, int | float):
        return str(value or "")
    return (
        str(value) if isinstance(value, int) else f"{value:.{3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"
    )


def print_table(rows: dict[str, dict]) -> None:
    """Prints a row for each name and a column for each key, empty where a row has none; lists are left out."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row if not isinstance(row[key], list | dict)))
    first = max(len(name) for name in rows)
    widths = {key: 2 + max(len(key), *(len(as_text(row.get(key))) for row in rows.values())) for key in keys}
    print(" " * first + "".join(f"{key:>{widths[key]}}" for key in keys))
    for name, row in rows.items():
        print(f"{name:{first}}" + "".join(f"{as_text(row.get(key)):>{widths[key]}}" for key in keys), flush=True)


def medians(rows: list[dict]) -> dict[str, float]:
    """The median of each number over several measurements."""
    numbers = [key for key, value in rows[0].items() if isinstance(value, int | float)]
    return {key: statistics.median(row[key] for row in rows) for key in numbers}


def profile_table(source: Any) -> dict[str, dict]:
    """The 15 functions that a profile (of cProfile, or its file) spends most time in, without what they call."""
    rows: Any = pstats.Stats(source).stats
    everything = sum(own for _, _, own, _, _ in rows.values())
    table = {}
    for (file, line, function), (_, calls, own, total, _) in sorted(rows.items(), key=lambda row: -row[1][2])[:15]:
        name = function if file == "~" else f"{Path(file).name}:{line} {function}"
        table[name] = {"own s": own, "share": own / everything, "total s": total, "calls": calls}
    return table


def version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_json(path: Path | None, settings: Any, result: dict) -> None:
    """Writes a result with the settings and the machine that it was made with, where a file is wanted."""
    if path is None:
        return
    packages = (
        "torch",
        "gymnasium",
        "numpy",
        "PySuperTuxKart",
        "PySuperTuxKart2",
        "stable-baselines3",
        "box2d",
    )
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := version(name))},
    }
    plain = {name: str(value) for name, value in dataclasses.asdict(settings).items() if name != "out"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, "settings": plain, "machine": machine}, indent=1) + "\n")


def isolate() -> None:
    """Has the games that this process starts keep their settings and logs in a folder that goes with it."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.update(home(folder))
