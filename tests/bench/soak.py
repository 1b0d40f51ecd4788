"""A night's faults, by hand: python tests/bench/soak.py learner --kills 100
                             python tests/bench/soak.py games --minutes 120

learner: a small training is killed (SIGKILL) at random instants and resumed, until it is done; then its metrics and its
weights must be those of a run that was never stopped. games: in every other ten minutes of a training, one of its game
processes is killed once a minute, every fifth time stopped (SIGSTOP) instead, so that it hangs; the table compares
decisions/s with and without, and samples the learner's memory, descriptors and children.
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
from processes import megabytes


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
    """Kills games, once a minute."""

    minutes: int = 120
    """how long"""
    num_envs: int = 16
    """game processes"""
    out: Path | None = None
    """JSON file to write"""


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


def soak_games(settings, folder):
    typed = ["--num-envs", settings.num_envs, "--total-timesteps", 10**9, "--eval-interval", 0, "--name", "soak"]
    shared = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        command("ppo_tuxkart", *typed), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    rows, chance, samples, killed, seen = folder / "runs" / "soak" / "metrics.jsonl", random.Random(0), [], 0, set()
    while not rows.exists():
        time.sleep(1)
    started = time.time()
    while process.poll() is None and time.time() < started + 60 * settings.minutes:
        time.sleep(60)
        minute = int((time.time() - started) / 60)
        games = children(process.pid)
        disturbed = minute // 10 % 2 == 1
        if disturbed:
            killed += 1
            os.kill(chance.choice(games), signal.SIGSTOP if killed % 5 == 0 else signal.SIGKILL)
        seen |= set(games)
        row = metrics(rows.parent)[-1]
        samples.append({
            "minute": minute, "disturbed": disturbed, "rss_mb": megabytes(process.pid, "VmRSS"), "games": len(games),
            "descriptors": len(os.listdir(f"/proc/{process.pid}/fd")), "decisions": row["global_step"],
            "lost_games": row["charts/lost_games"], "shared_segments": len(set(os.listdir("/dev/shm")) - shared),
        })  # fmt: skip
        print(samples[-1], flush=True)
    if process.poll() is not None:
        sys.exit("The training stopped by itself.")
    process.send_signal(signal.SIGTERM)
    process.wait()
    rates = {True: [], False: []}
    for before, after in zip(samples[1:], samples[2:], strict=False):
        rates[after["disturbed"]].append((after["decisions"] - before["decisions"]) / 60)
    with_faults, without = (statistics.mean(rates[disturbed]) for disturbed in (True, False))
    return {
        "games killed or stopped": killed,
        "replaced": samples[-1]["lost_games"],
        "left behind": len(alive(seen)),
        "decisions/s without": without,
        "decisions/s with": with_faults,
        "ratio": with_faults / without,
        "samples": samples,
    }


def main(settings):
    with tempfile.TemporaryDirectory() as folder:
        soak = soak_learner if isinstance(settings, Learner) else soak_games
        result = soak(settings, Path(folder))
    for name, value in result.items():
        if name != "samples":
            print(f"{name:32} {value}")
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Learner | Games, description=__doc__))
