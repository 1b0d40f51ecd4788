"""What ours and Stable-Baselines3's PPO learn in the same time: python tests/bench/learning_peers.py

The same game, network, first weights and hyperparameters; one run for each seed and peer, one after the other. A run
leaves one JSON file: after every iteration the decisions and seconds so far, and return, progress, finish rate and lap
time of the last 100 races from the start line. A run whose file is there is not repeated, so the command can be stopped
and typed again.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Literal

import numpy as np
import torch  # before ppo_tuxkart, as in peers.py
import tyro
from peers import PLAY, Work, as_flags, environment, make_agent, make_args
from processes import adopt_orphans, end_all, plain_settings


@dataclasses.dataclass
class Learning(Work):
    peers: tuple[Literal["ours", "sb3", "sb3:tuned"], ...] = ("ours", "sb3")
    """who learns"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of the network and the games"""
    total_timesteps: int = 1_000_000
    """decisions of a run"""
    folder: Path = Path("runs/learning-peers")
    """folder for the runs' files"""
    turn: bool = False
    """the first peer's first seed only, in this process"""


class Curve:
    """Called after every iteration: keeps what the last 100 races from the line did."""

    columns = ("return", "progress", "finished", "lap_time")

    def __init__(self):
        self.rows, self.recent, self.decisions, self.seconds = [], deque(maxlen=100), 0, 0.0

    def __call__(self, decisions, sampling, learning, episodes):
        self.decisions, self.seconds = self.decisions + decisions, self.seconds + sampling + learning
        self.recent.extend([float(one[key]) for key in self.columns] for one in episodes if one["from_line"])
        row = {"decisions": self.decisions, "seconds": self.seconds, "races": len(self.recent)}
        if self.recent:
            returns, progress, finished, laps = np.array(self.recent).T
            row |= {"return": returns.mean(), "progress": progress.mean(), "finish_rate": finished.mean()}
            row["lap_time"] = laps[finished > 0].mean() if finished.any() else None
        self.rows.append(row)
        line = f"{row['decisions']:>9} decisions, {row['seconds'] / 60:.1f} minutes"
        print(line + (f", finish rate {row['finish_rate']:.0%}" if self.recent else ""), flush=True)


def run_file(settings, peer, seed):
    return settings.folder / f"{peer.replace(':', '-')}-seed{seed}.json"


def learn(settings):
    """The run of the first peer and seed, in this process."""
    peer, seed = settings.peers[0], settings.seeds[0]
    batch = settings.num_envs * settings.num_steps
    args = make_args(settings, settings.total_timesteps // batch, seed)
    torch.set_num_threads(settings.threads)
    curve = Curve()
    PLAY[peer.split(":")[0]](args, make_agent(args), settings, curve)
    plain = plain_settings(settings, ("peers", "seeds", "folder", "turn"))
    result, file = {"peer": peer, "seed": seed, "settings": plain, "rows": curve.rows}, run_file(settings, peer, seed)
    file.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    file.with_suffix(".part").rename(file)  # the file is whole, or not there


def main(settings):
    adopt_orphans()
    settings.folder.mkdir(parents=True, exist_ok=True)
    for seed in settings.seeds:
        for peer in settings.peers:
            if run_file(settings, peer, seed).exists():
                continue
            print(f"{peer}, seed {seed}", flush=True)
            command = [sys.executable, __file__, "--peers", peer, "--seeds", str(seed), "--turn"]
            try:
                command += as_flags(settings, ("peers", "seeds", "turn"))
                subprocess.run(command, env=environment(peer), check=True)
            finally:
                end_all()
    print(f"\nafter {settings.total_timesteps} decisions, mean and spread of {len(settings.seeds)} seeds")
    print(f"{'':12}{'minutes':>14}{'return':>16}{'finish rate':>16}{'minutes to half':>18}")
    for peer in settings.peers:
        runs = [json.loads(run_file(settings, peer, seed).read_text())["rows"] for seed in settings.seeds]
        cells = []
        for key, scale in (("seconds", 1 / 60), ("return", 1), ("finish_rate", 1)):
            values = [rows[-1].get(key, 0.0) * scale for rows in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.2f} +- {spread:.2f}")
        half = [next((row["seconds"] / 60 for row in rows if row.get("finish_rate", 0) >= 0.5), None) for rows in runs]
        reached = " ".join("never" if minutes is None else f"{minutes:.0f}" for minutes in half)
        print(f"{peer:12}{cells[0]:>14}{cells[1]:>16}{cells[2]:>16}{reached:>18}")


if __name__ == "__main__":
    chosen = tyro.cli(Learning, description=__doc__)
    learn(chosen) if chosen.turn else main(chosen)
