"""Bad input: one sentence that says what to type, exit code 2, and nothing started or written."""

import dataclasses
import multiprocessing
import os
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, call_main, slow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ppo_tuxkart
import worldmodel_carracing as wm

MISTAKES = {
    "--reward zigzag:much": "type zigzag:0.5",
    "--speeds 16 8": "the slowest first: type --speeds 8 16 24",
    "--ent-coef -1": "ent-coef is -1.0: type a number from 0",
    "--speed-curriculum 2": "type --speed-cap 8 as well",
    "--epsilon nan": "type a number from 0 to 1",
    "--track scotlnd": "There is no track scotlnd: type",
    "--track battleisland": "There is no track battleisland",
    "--num-envs 3 --num-steps 5": "type another --num-minibatches",
    "--seed 100000000000000000000": "type a number from 0",
    "--teacher nothing.pt": "nothing.pt: type the path of a",
    "--teacher small.pt": "learn it with --observe state",
    "--teacher a.pt b.pt": "Type one --teacher for all tracks",
    "--track abyss hacienda --num-envs 1": "type --num-envs 2 or more",
    "--evaluate nothing.pt": "nothing.pt: type the path of a",
    "--evaluate text.pt": "text.pt is not a checkpoint",
    "--evaluate pickle.pt": "pickle.pt is not a checkpoint",
    "--evaluate foreign.pt": "foreign.pt is not a checkpoint",
    "--evaluate half.pt": "half.pt is not a checkpoint",
    "--init-from list.pt": "list.pt is not a checkpoint",
    "--init-from small.pt": "type --actions",
    "--resume runs/nothing": "runs/nothing/last.pt: type the path",
    "--engine pystk9": "Invalid choice",
    "--epochs many": "Error parsing",
    "--no-such-flag": "Unrecognized",
}
CAR = {
    "--population 1": "--population is 1: type a number from 4 to 10000",
    "--hours nan": "--hours is nan",
    "--stages vision": "The next stage is collect",
    "--stages drive": "Invalid choice",
    "--stages": "The next stage is collect",
    "--quick --temperature 0": "--temperature is 0.0",
    "--init-from nothing.pt": "There is no nothing.pt",
    "--dream text.pt": "text.pt is not a checkpoint",
    "--init-from foreign.pt": "foreign.pt is not a checkpoint of this script",
    "--dream pickle.pt": "pickle.pt is not a checkpoint of this script",
    "--device cuda": "Expected one of ('auto', 'cpu')",
    "--evaluate small.pt": "small.pt holds other networks",
    "--resume runs/none": "There is no runs/none/last.pt",
}


class Evil:
    """Prints when it is unpickled."""

    def __reduce__(self):
        return print, ("executed",)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    whole = (ROOT / "pretrained" / "scotland.pt").read_bytes()
    (folder / "text.pt").write_text("not a checkpoint")
    (folder / "half.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"args": Evil()}, folder / "pickle.pt")
    torch.save({"weights": torch.zeros(3)}, folder / "foreign.pt")
    torch.save([1, 2], folder / "list.pt")
    small = ppo_tuxkart.Agent((3, 64, 64), [5, 3, 2, 2]).state_dict()
    torch.save({"args": {}, "agent": small, "iteration": 1}, folder / "small.pt")
    return folder


TYPED = [(ppo_tuxkart, *pair) for pair in MISTAKES.items()] + [(wm, *pair) for pair in CAR.items()]


@pytest.mark.parametrize("script, arguments, sentence", TYPED)
def test_mistakes_are_one_sentence(script, arguments, sentence, files, monkeypatch, capfd):
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    code, said = call_main(script, arguments.split(), monkeypatch, capfd)
    assert code == 2 and sentence in said, said
    assert not multiprocessing.active_children() and sorted(files.rglob("*")) == before


def test_help_explains_every_flag(monkeypatch, capfd):
    code, said = call_main(ppo_tuxkart, ["--help"], monkeypatch, capfd)
    assert code == 0 and "python ppo_tuxkart.py --track scotland" in said
    for field in dataclasses.fields(ppo_tuxkart.Args):
        hidden = hasattr(field.type, "__metadata__")
        assert (f"--{field.name.replace('_', '-')}" in said) != hidden
    assert "seconds of game time for which an action is held" in said


def test_world_size_without_torchrun(files, monkeypatch, capfd):
    monkeypatch.chdir(files)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = call_main(ppo_tuxkart, [], monkeypatch, capfd)
    assert code == 2 and "type unset WORLD_SIZE" in said


@pytest.mark.parametrize(
    "quota, threads, cores", [("max 100000", None, 8), ("150000 100000", None, 2), ("max 1", "3", 3)]
)
def test_cores_that_may_be_used(quota, threads, cores, monkeypatch, capfd):
    """Of 64: by affinity eight, and what a container or the user allows."""
    monkeypatch.setattr(ppo_tuxkart.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(ppo_tuxkart.os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(ppo_tuxkart.Path, "read_text", lambda _: quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    seen = []
    monkeypatch.setattr(ppo_tuxkart.torch, "set_num_threads", seen.append)
    call_main(ppo_tuxkart, ["--no-such-flag"], monkeypatch, capfd)
    assert seen == [cores]


def refused(folder, words, resumed=False):
    with pytest.raises(ppo_tuxkart.UsageError, match=words):
        with ppo_tuxkart.hold_folder(folder, resumed):
            pass


def test_a_folder_with_spaces_that_cannot_be_written(tmp_path, capfd):
    folder = tmp_path / "my runs"
    with ppo_tuxkart.hold_folder(folder, resumed=False):
        (folder / "last.pt").touch()
        refused(folder, "belongs to a run that goes on", resumed=True)
    assert f"--resume '{folder}' to go on" in capfd.readouterr().out
    refused(folder, f"There is a run {folder}: type .* --resume '{folder}'")
    (folder / "last.pt").unlink()  # as after a crash before there was one
    refused(folder, "type another --name$")
    refused(Path("/proc/run"), "cannot be written")


@pytest.mark.parametrize("engine, home, temporary", [("pystk2", "/proc", None), ("auto", "/", "/proc/tmp")])
def test_no_place_to_write(engine, home, temporary, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("SUPERTUXKART_SAVEDIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(ppo_tuxkart, "find_game", ppo_tuxkart.find_game.__wrapped__)  # what it finds is not kept
    with mock.patch.object(tempfile, "tempdir", temporary):
        code, said = call_main(ppo_tuxkart, ["--teacher", "none", "--engine", engine], monkeypatch, capfd)
    assert code == 2 and "set HOME and TMPDIR" in said and not list(tmp_path.iterdir())


def test_install_without_a_home():
    environment = {"PATH": os.environ["PATH"]}
    stopped = subprocess.run([ROOT / "install.sh"], env=environment, capture_output=True, text=True, timeout=60)
    assert stopped.returncode == 1 and stopped.stderr == "HOME is not set: type `HOME=/a/folder ./install.sh`.\n"
    environment["HOME"] = "/dev/null"  # in which nobody, not even root, can make a folder
    stopped = subprocess.run([ROOT / "install.sh"], env=environment, capture_output=True, text=True, timeout=60)
    assert stopped.returncode == 1 and stopped.stderr.count("\n") == 1 and "cannot be written" in stopped.stderr


FLAGS = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(ppo_tuxkart.Args)] + ["--x"]
WORDS = st.sampled_from(["scotland", "progress:2", "cpu", "True", "", "-", "nan"]) | st.floats().map(str)
WORDS |= st.integers(-(10**12), 10**12).map(str) | st.text(max_size=8)


@slow
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(parts=st.lists(st.tuples(st.sampled_from(FLAGS), st.lists(WORDS, max_size=2)), max_size=3))
def test_whatever_is_typed_is_settings_or_one_sentence(parts, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ppo_tuxkart, "make_agent", mock.Mock(side_effect=SystemExit(2)))  # the game comes next
    words = [word for flag, values in parts for word in (flag, *values)]
    code, _ = call_main(ppo_tuxkart, words, monkeypatch, capfd)
    assert (code == 2 or "--help" in words) and not list(tmp_path.iterdir())
