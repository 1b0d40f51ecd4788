"""What the benchmarks beside this file share: processes, runs' curves, tables, JSON."""

import contextlib
import ctypes
import dataclasses
import importlib.metadata
import json
import os
import platform
import pstats
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch  # before a script, which would change how its threads wait

ROOT = Path(__file__).resolve().parents[1]
HOME = tempfile.TemporaryDirectory()
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


def adopt_orphans() -> None:
    """Has this process inherit what its children leave behind, so that `end_all` finds it."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def end_all() -> None:
    """Ends whatever this process started that still runs, and waits until it is gone."""
    while left := descendants(os.getpid()):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)


def home(folder: Path | str) -> dict[str, str]:
    """Environment variables with which games keep their settings and logs in this folder."""
    return {**os.environ, "SUPERTUXKART_SAVEDIR": str(folder), "XDG_CONFIG_HOME": str(folder)}


def isolate() -> None:
    """Gives the games that this process starts a home that goes with it."""
    os.environ.update(home(HOME.name))


def run_turn(command: list[str], environment: dict[str, str] | None = None) -> dict:
    """Runs a command, ends all that it left, and returns the JSON that it printed last."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    finally:
        end_all()
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def learn(script: str, folder: Path, name: str, typed: list[str]) -> None:
    """Trains in folder/runs/name until the end, or goes on with what is there, if it is not done."""
    run = folder / "runs" / name
    run.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / f"{script}.py")]
    if (run / "last.pt").exists():
        checkpoint = torch.load(run / "last.pt", map_location="cpu", weights_only=True)
        args = checkpoint["args"]
        decisions = args["num_envs"] * args["num_steps"]
        if checkpoint["iteration"] == args["total_timesteps"] // decisions:
            return
        command += ["--resume", f"runs/{name}"]
    else:
        command += ["--name", name, *typed]
    variables = home(folder / "home")
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} did not come to its end:\n{done.stderr[-3000:]}")


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


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """A run's scalars, {tag: [(step, value), ...]}: from its folder, or from a file of metrics."""
    if path.is_dir() and (path / "metrics.jsonl").exists():  # an earlier version's
        path = path / "metrics.jsonl"
    curves: dict[str, list[tuple[int, float]]] = {}
    names = {"charts/finish_rate": "charts/finished", "eval/median_lap": "eval/median"}  # its names
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


def iteration_seconds(curves: dict) -> tuple[np.ndarray, np.ndarray]:
    """Decisions after each of a run's iterations, and the seconds that it took, its evaluation included."""
    steps, rates = np.array(curves["charts/SPS"]).T
    return steps, np.diff(steps, prepend=0) / rates


def as_text(value: Any) -> str:
    """A cell of a table: numbers with three digits or more."""
    if not isinstance(value, float):
        return str(value) if value is not None else ""
    digits = 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:.{digits}f}"


def print_table(rows: dict[str, dict]) -> None:
    """Prints a row for each name and a column for each key of the rows, but for lists."""
    cells: dict[str, dict[str, str]] = {}
    for name, row in rows.items():
        shown = {key: as_text(value) for key, value in row.items() if not isinstance(value, list | dict)}
        for key, text in shown.items():
            cells.setdefault(key, {})[name] = text
    first = max(len(name) for name in rows)
    widths = {key: 2 + max(map(len, [key, *column.values()])) for key, column in cells.items()}
    print(" " * first + "".join(f"{key:>{width}}" for key, width in widths.items()))
    for name in rows:
        line = [f"{cells[key].get(name, ''):>{width}}" for key, width in widths.items()]
        print(f"{name:{first}}" + "".join(line), flush=True)


def medians(rows: list[dict]) -> dict[str, float]:
    """The median of each number over several measurements."""
    numbers = [key for key, value in rows[0].items() if isinstance(value, int | float)]
    return {key: statistics.median(row[key] for row in rows) for key in numbers}


def profile_table(file: Path) -> dict[str, dict]:
    """The 15 functions that a profile has most time in, without what they call."""
    rows: Any = vars(pstats.Stats(str(file)))["stats"]
    everything = sum(own for _, _, own, _, _ in rows.values())
    table = {}
    for place, (_, calls, own, total, _) in sorted(rows.items(), key=lambda row: -row[1][2])[:15]:
        name = pstats.func_std_string((Path(place[0]).name, *place[1:]))
        table[name] = {"own s": own, "share": own / everything, "total s": total, "calls": calls}
    return table


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
