"""World Models under torchrun: the same search on any number of ranks, the same learning, and restarts."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, children, lines_of, run, wait_for
from test_worldmodel import LEARN, SMALL, rows_of

SCRIPT = {"script": "worldmodel_carracing"}
FLAGS = [*SMALL, "--rounds", 1, "--workers", 1]


def torchrun(ranks, *args, restarts=0):
    """The command that runs the script on so many ranks of this machine."""
    engine = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    return [*map(str, [*engine, "--max-restarts", restarts, ROOT / "worldmodel_carracing.py", *args])]


def finish(ranks, *args, cwd):
    finished = subprocess.run(torchrun(ranks, *args), cwd=cwd, capture_output=True, text=True, timeout=1200)
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    """A working folder with the run `alone`, on one rank, and copies of it after each stage: `after-<stage>`."""
    cwd = tmp_path_factory.mktemp("ranks")
    alone = cwd / "runs" / "alone"
    for number, stage in enumerate(LEARN):
        flags = ["--resume", alone, "--workers", 1] if number else [*FLAGS, "--name", "alone"]
        finished = run(*flags, "--stages", stage, cwd=cwd, **SCRIPT)
        assert finished.returncode == 0, finished.stderr
        shutil.copytree(alone, cwd / "runs" / f"after-{stage}")
    return cwd


def last(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def test_collecting_does_not_depend_on_the_ranks(cwd):
    finish(2, *FLAGS, "--stages", "collect", "--name", "collected", cwd=cwd)
    for name in ("pictures-1.npy", "rows-1.npy"):
        ours, theirs = (np.load(cwd / "runs" / folder / "data" / name) for folder in ("collected", "after-collect"))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("stage, before, ranks", [("vision", "collect", 2), ("memory", "vision", 3)])
def test_networks_learn_on_the_union_of_the_ranks_shares(stage, before, ranks, cwd):
    folder = cwd / "runs" / f"{stage}-{ranks}"
    shutil.copytree(cwd / "runs" / f"after-{before}", folder)
    finish(ranks, "--resume", folder, "--stages", stage, "--workers", 1, cwd=cwd)
    ours, theirs = ([row for row in rows_of(cwd / "runs" / name) if f"{stage}/loss" in row] for name in
                    (folder.name, f"after-{stage}"))  # fmt: skip
    assert len(ours) == len(theirs) >= 10
    for one, other in zip(ours, theirs, strict=True):  # each row's losses follow from the steps before
        assert one == pytest.approx(other, rel=2e-3)
    pairs = zip(last(folder)["agent"].items(), last(cwd / "runs" / f"after-{stage}")["agent"].values(), strict=True)
    off = torch.cat([(one - other).abs().flatten() for (_, one), other in pairs])
    assert off.mean() < 1e-5 and torch.quantile(off[:: len(off) // 1_000_000 + 1], 0.99) < 1e-4


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_search_takes_the_same_path_on_any_number_of_ranks(ranks, cwd):
    folder = cwd / "runs" / f"searched-{ranks}"
    shutil.copytree(cwd / "runs" / "after-memory", folder)
    finish(ranks, "--resume", folder, "--stages", "controller", "--workers", 1, cwd=cwd)
    alone = cwd / "runs" / "after-controller"
    assert rows_of(folder) == rows_of(alone)  # dream and reality, to the last digit
    assert torch.equal(last(folder)["agent"]["controller"], last(alone)["agent"]["controller"])
    assert len(list(folder.glob("events.*"))) == len(list(alone.glob("events.*")))  # one rank writes


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_started_again_and_goes_on(victim, cwd, tmp_path):
    name = f"restarted-{victim}"
    folder = tmp_path / "runs" / name
    shutil.copytree(cwd / "runs" / "after-memory", folder)
    process = subprocess.Popen(
        torchrun(2, "--resume", folder, "--stages", "controller", "--workers", 1, restarts=2),
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    file = folder / "metrics.jsonl"
    already = lines_of(file)
    wait_for(lambda: lines_of(file) >= already + 3, process)
    ranks = {rank_of(child): child for child in children(process.pid)}
    os.kill(ranks[victim], signal.SIGKILL)
    output = process.communicate(timeout=1200)[0]
    assert process.returncode == 0, output
    assert rows_of(folder) == rows_of(cwd / "runs" / "after-controller")


def rank_of(pid):
    values = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(value[5:]) for value in values if value.startswith(b"RANK="))


def test_a_new_run_that_fails_under_torchrun_resumes_itself(tmp_path):
    """The command line says --name; after the restart the run's own checkpoint is taken instead."""
    flags = [*FLAGS, "--stages", "collect", "vision", "--name", "again"]
    process = subprocess.Popen(
        torchrun(2, *flags, restarts=1), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    file = tmp_path / "runs" / "again" / "metrics.jsonl"
    wait_for(lambda: lines_of(file) >= 4, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    output = process.communicate(timeout=1200)[0]
    assert process.returncode == 0, output
    assert last(file.parent)["done"] == [[1, "collect"], [1, "vision"]]
    iterations = [row["global_step"] for row in rows_of(file.parent)]
    assert iterations == list(range(1, len(iterations) + 1))
