"""A night's faults, by hand: python tests/bench/soak.py learner --kills 100
                             python tests/bench/soak.py games --minutes 120

learner: a small training is killed (SIGKILL) at random instants and resumed, until it is done; then its metrics and
its weights must be those of a run that was never stopped. games: while a kart learns, one of the games that are being
played is killed every 48 s for 16 minutes, then none for 4, and so on; the table compares the decisions/s of the two,
iterations with an evaluation aside, and samples the learner's memory, descriptors, children and shared memory.
"""

import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import tyro
from conftest import alive, children, command, metrics
from processes import cpu_seconds, megabytes


@dataclasses.dataclass
class Learner:
    """Kills the learner at random instants."""

    kills: int = 100
    """times that it is killed"""
    seed: int = 0
    """of the instants"""
    out: Path | None = None
    """JSON file to write"""


@dataclasses.dataclass
class Games:
    """Kills games."""

    minutes: float = 120
    """how long"""
    track: str = "scotland"
    """where the kart learns"""
    total_timesteps: int = 10**9
    """decisions of the training; the soak ends with it, if that is sooner"""
    folder: Path | None = None
    """where to learn; the run stays there as runs/soak. A temporary one unless given"""
    out: Path | None = None
    """JSON file to write"""


PERIOD, KILLS, CALM = 48.0, 20, 240.0  # seconds from one kill to the next, how many in a row, and seconds without


def soak_learner(settings, folder):
    small = ["--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2, "--epochs", 1, "--eval-interval", 0]
    small += ["--total-timesteps", 32 * 10 * settings.kills]
    whole, started, first = folder / "runs" / "whole", time.time(), None
    process = subprocess.Popen(command("ppo_tuxkart", *small, "--name", "whole"), cwd=folder, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(0.1)
        first = first or ((whole / "last.pt").exists() and time.time() - started)  # seconds to the first checkpoint
    if process.returncode != 0:
        sys.exit("The training that is not killed did not come to its end.")
    run, chance = folder / "runs" / "killed", random.Random(settings.seed)
    typed, kills, lost, before_first = [*small, "--name", "killed"], 0, [], 0
    while True:
        process = subprocess.Popen(
            command("ppo_tuxkart", *typed), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            process.wait(None if kills == settings.kills else chance.uniform(0, 2 * first))
            break
        except subprocess.TimeoutExpired:
            games = children(process.pid)
            process.kill()
            process.wait()
            kills += 1
        if alive(games):
            sys.exit("A game outlived its learner.")
        if not (run / "last.pt").exists():
            before_first += 1
            subprocess.run(["rm", "-rf", run], check=True)
            continue
        checkpoint = torch.load(run / "last.pt", weights_only=True)
        lost.append(len((run / "metrics.jsonl").read_text().splitlines()) - checkpoint["iteration"])
        typed = ["--resume", run]
    if process.returncode != 0:
        sys.exit(process.stderr.read().decode())
    expected, weights = metrics(whole), torch.load(whole / "last.pt", weights_only=True)["agent"]
    ours = torch.load(run / "last.pt", weights_only=True)["agent"]
    return {
        "kills": kills,
        "before the first checkpoint": before_first,
        "iterations lost at most": max(lost, default=0),
        "iterations": len(expected),
        "same metrics": metrics(run) == expected,
        "same weights": all(torch.equal(ours[key], weights[key]) for key in weights),
    }


def playing(games):
    """Those of some processes that work: races for an evaluation wait in games of their own."""
    before = {pid: cpu_seconds([pid]) for pid in games}
    time.sleep(0.5)
    return [pid for pid in games if cpu_seconds([pid]) > before[pid]]


def soak_games(settings, folder):
    typed = ["--track", settings.track, "--total-timesteps", settings.total_timesteps, "--name", "soak"]
    shared = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        command("ppo_tuxkart", *typed), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    file, chance = folder / "runs" / "soak" / "metrics.jsonl", random.Random(0)
    while not file.exists() and process.poll() is None:
        time.sleep(1)
    started, kills, seen, samples, rows, mixed = time.time(), 0, set(), [], [], True
    disturbed, next_kill = True, started + PERIOD
    while process.poll() is None and (now := time.time()) < started + 60 * settings.minutes:
        was, disturbed = disturbed, (now - started - 1) % (KILLS * PERIOD + CALM) < KILLS * PERIOD
        mixed |= was != disturbed  # the iteration that goes on belongs to neither
        lines = file.read_text().splitlines()
        for row in map(json.loads, lines[len(rows) :]):
            kind = None if mixed or any(key.startswith("eval/") for key in row) else disturbed
            rows.append({"disturbed": kind, "seconds": 1 / row["charts/SPS"], "lost": row["charts/lost_games"]})
            mixed = False
        if now >= next_kill and not disturbed:
            next_kill += PERIOD
        elif now >= next_kill and (games := playing(children(process.pid))):  # none plays while the network learns
            os.kill(chance.choice(games), signal.SIGKILL)
            kills += 1
            next_kill += PERIOD
        if now >= started + 60 * len(samples):
            games = children(process.pid)
            seen |= set(games)
            samples.append({
                "minute": round((now - started) / 60, 2), "kills": kills, "iterations": len(rows),
                "rss_mb": round(megabytes(process.pid, "VmRSS"), 1), "children": len(games),
                "descriptors": len(os.listdir(f"/proc/{process.pid}/fd")),
                "shared_segments": len(set(os.listdir("/dev/shm")) - shared),
            })  # fmt: skip
            print(samples[-1], flush=True)
        time.sleep(0.2)
    if process.poll():
        sys.exit("The training stopped by itself.")
    process.terminate()
    process.wait()
    rates = {kind: 1 / statistics.mean(row["seconds"] for row in rows if row["disturbed"] is kind)
             for kind in (True, False)}  # fmt: skip
    return {
        "games killed": kills,
        "replaced": rows[-1]["lost"],
        "left behind": len(alive(seen)),
        "decisions/s without": rates[False],
        "decisions/s with": rates[True],
        "ratio": rates[True] / rates[False],
        "samples": samples,
        "rows": rows,
    }


def main(settings):
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(settings, Learner):
            result = soak_learner(settings, Path(folder))
        else:
            result = soak_games(settings, settings.folder or Path(folder))
    for name, value in result.items():
        if not isinstance(value, list):
            print(f"{name:32} {value}")
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Learner | Games, description=__doc__))
