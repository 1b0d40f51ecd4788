"""What each choice that makes the training fast is worth: python tests/bench/changes.py --out changes.json

Trains with one choice undone at a time, in turns, each in a process of its own; the table gives medians, and the ratio
to the script as it is, round by round. A turn's first iteration warms up. The file is written after every round.

as it is      `ppo_tuxkart.Sampler` and `ppo_update`, as the script's own loop has them
memory back   freed memory goes back to the kernel, as glibc would have it
spinning      torch's threads wait as they would by themselves, spinning for a while
all sample    sampling with all of torch's threads, instead of one
one group     all games in one group: nothing plays while the network looks
channels      the network's pictures and weights with their channels first
compiled      the network through torch.compile (it compiles in the first iteration)
"""

import contextlib
import dataclasses
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Literal, get_args
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch  # before ppo_tuxkart, as in peers.py
import tyro
from peers import Turn, Turns, as_flags, environment, make_agent, make_args, play_ours
from processes import adopt_orphans, plain_settings, print_rows, run_turn

Change = Literal["as it is", "memory back", "spinning", "all sample", "one group", "channels", "compiled"]
UNSET = {"memory back": ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "spinning": ("OMP_WAIT_POLICY",)}
PATCHES = {
    "all sample": (torch, "set_num_threads", lambda threads: None),
    "one group": (np, "array_split", lambda rows, parts: [rows]),
    "channels": (torch, "channels_last", torch.contiguous_format),
}


@dataclasses.dataclass
class Changes(Turns):
    changes: tuple[Change, ...] = get_args(Change)
    """which of them"""
    turn: Change | None = None
    """make this turn only, in this process, and print its figures as a line of JSON"""


def play_turn(settings):
    torch.set_num_threads(settings.threads)
    args, turn = make_args(settings, settings.iterations + 1, settings.seed), Turn(settings.iterations + 1)
    patch = PATCHES.get(settings.turn)
    with mock.patch.object(*patch) if patch else contextlib.nullcontext():
        agent = make_agent(args, settings.checkpoint)
        if settings.turn == "compiled":
            agent.compile()
        play_ours(args, agent, settings, turn)
    print(json.dumps(turn.figures()), flush=True)


def summarize(turns):
    """Medians over a change's turns, and of the rounds' own ratios of its rate to that of the first one."""
    table, first = {}, next(iter(turns.values()))
    for name, rows in turns.items():
        figures = ("rate", "sampling_rate", "learning_ms")
        table[name] = {key: statistics.median(row[key] for row in rows) for key in figures}
        pairs = zip(rows, first, strict=True)
        table[name]["ratio"] = statistics.median(row["rate"] / plain["rate"] for row, plain in pairs)
    return table


def main(settings):
    adopt_orphans()
    names = list(settings.changes)
    turns = {name: [] for name in names}
    for number in range(settings.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:  # none is always the first
            command = [sys.executable, __file__, "--turn", name, *as_flags(settings, ("changes", "turn", "out"))]
            variables = {key: value for key, value in environment("ours").items() if key not in UNSET.get(name, ())}
            turns[name].append(run_turn(command, variables))
            print(f"round {number + 1}, {name}: {turns[name][-1]['rate']:.0f} decisions/s", flush=True)
        if settings.out:
            result = {"table": summarize(turns), "turns": turns}
            result["machine"] = {"cores": os.cpu_count(), "torch": torch.__version__}
            result["settings"] = plain_settings(settings)
            settings.out.write_text(json.dumps(result, indent=1) + "\n")
    columns = {
        "rate": ("decisions/s", "{:.0f}"),
        "ratio": ("of as it is", "{:.2f}"),
        "sampling_rate": ("sampling/s", "{:.0f}"),
        "learning_ms": ("learning", "{:.2f} ms"),
    }
    print(f"\n{settings.num_envs} games, {settings.threads} threads, medians of {settings.rounds} turns, ms a decision")
    print_rows(columns, summarize(turns))


if __name__ == "__main__":
    chosen = tyro.cli(Changes, description=__doc__)
    play_turn(chosen) if chosen.turn else main(chosen)
