"""Bad input: one sentence that says what to type, exit code 2, and nothing written."""

import ctypes
import multiprocessing
import signal
import sys

import pytest
import torch
from conftest import ROOT, run

import ppo_tuxkart

MISTAKES = {
    "--reward progess": "type --reward progress, or one of",
    "--reward zigzag:much": "type --reward zigzag:0.5",
    "--reward": "type --track scotland --reward progress",
    "--actions deepracer --speeds 8 0": "type --speeds 8 16 24",
    "--actions deepracer --speeds 16 8": "the slowest first",
    "--speeds 8 16": "type --actions deepracer as well",
    "--target-kl -1": "--target-kl is -1.0",
    "--speed-curriculum 2": "type --speed-cap 8 as well",
    "--forget padel --init-from list.pt": "type one of steer, pedal, drift, nitro",
    "--forget pedal": "type --init-from and a checkpoint as well",
    "--num-karts 21": "type a number from 1 to 20",
    "--epsilon 1.1": "type a number from 0 to 1",
    "--track scotlnd": "type --track scotland",
    "--track olivermath --reverse --kart tuxx": "type --kart tux",
    "--track battleisland": "There is no track battleisland",
    "--width 20": "from 36 to 2048",
    "--gamma 1.5": "type a number from 0 to 1",
    "--num-envs 0": "--num-envs is 0",
    "--num-envs 3 --num-steps 5": "does not divide into 8 minibatches",
    "--total-timesteps 5": "type 2048 or more",
    "--num-minibatches 2048": "type --num-minibatches 1024 or less",
    "--track abyss hacienda --num-envs 1": "2 tracks, and 1 environments or evaluation races",
    "--random-start 2": "from 0 to 1",
    "--step-size 0": "--step-size is 0.0",
    "--max-seconds -1": "--max-seconds",
    "--evaluate nothing.pt": "There is no checkpoint nothing.pt",
    "--evaluate text.pt": "text.pt is not a checkpoint",
    "--evaluate pickle.pt": "pickle.pt is not a checkpoint",
    "--evaluate foreign.pt": "foreign.pt is not a checkpoint",
    "--init-from list.pt": "list.pt is not a checkpoint",
    "--resume runs/nothing": "There is no checkpoint runs/nothing/last.pt",
    "--engine pystk9": "Invalid choice",
    "--epochs many": "Error parsing",
    "--no-such-flag": "Unrecognized",
}


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_ranks_need_a_gpu_each_and_learn(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ppo_tuxkart.UsageError, match="type --nproc-per-node 1, or --device cpu"):
        ppo_tuxkart.pick_device("auto")
    monkeypatch.setattr(sys, "argv", ["ppo_tuxkart.py", "--evaluate", str(ROOT / "pretrained" / "scotland.pt")])
    with pytest.raises(SystemExit) as stop:
        ppo_tuxkart.main()
    assert stop.value.code == 2 and "type python in the place of torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_are_one_sentence(arguments, tmp_path, monkeypatch, capfd):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"args": Evil()}, tmp_path / "pickle.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    files = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ppo_tuxkart.py", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        ppo_tuxkart.main()
    assert stop.value.code == 2
    said = "".join(capfd.readouterr())
    assert MISTAKES[arguments] in " ".join(said.replace("│", " ").split())
    assert "Traceback" not in said and "executed" not in said
    assert not multiprocessing.active_children() and sorted(tmp_path.iterdir()) == files


def test_a_mistake_as_a_user_makes_it(tmp_path):
    finished = run("--track", "scotlnd", cwd=tmp_path)
    assert finished.returncode == 2 and finished.stdout == "" and finished.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_explains_every_flag(tmp_path):
    finished = run("--help", cwd=tmp_path)
    assert finished.returncode == 0
    said = " ".join(finished.stdout.replace("│", " ").split())
    for field in ppo_tuxkart.dataclasses.fields(ppo_tuxkart.Args):
        assert f"--{field.name.replace('_', '-')}" in said
    assert "python ppo_tuxkart.py --track scotland" in said
    assert "seconds of game time for which an action is held" in said


def test_cuda_is_asked_for_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ppo_tuxkart.pick_device("auto").type == "cpu"
    with pytest.raises(ppo_tuxkart.UsageError, match="--device cpu"):
        ppo_tuxkart.pick_device("cuda")


def test_missing_engine_assets_and_display_say_what_to_install(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(ppo_tuxkart, "engine_version", lambda engine: None)
        with pytest.raises(ppo_tuxkart.UsageError, match="pip install PySuperTuxKart2"):
            ppo_tuxkart.find_engine("auto")
        with pytest.raises(ppo_tuxkart.UsageError, match=r"install\.sh"):
            ppo_tuxkart.find_engine("pystk")
    with monkeypatch.context() as patch:
        patch.setattr(ppo_tuxkart, "DEBIAN_ASSETS", tmp_path)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for engine in ppo_tuxkart.ENGINES:
            with pytest.raises(ppo_tuxkart.UsageError, match="supertuxkart-data"):
                ppo_tuxkart.find_assets(engine)
        assert not list(tmp_path.iterdir())

    def missing(name):
        raise OSError(name)

    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", missing)
        with pytest.raises(ppo_tuxkart.UsageError, match=r"libEGL.*install\.sh"):
            ppo_tuxkart.check_args(ppo_tuxkart.Args())


def test_assets_are_linked_once_and_again(monkeypatch, tmp_path):
    if not ppo_tuxkart.DEBIAN_ASSETS.exists():
        pytest.skip("supertuxkart-data is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for engine in ppo_tuxkart.ENGINES:
        first, second = ppo_tuxkart.find_assets(engine), ppo_tuxkart.find_assets(engine)
        assert first == second and first[0].is_relative_to(tmp_path)
        assert (first[0] / "data" / "tracks" / "scotland" / "track.xml").exists()
        assert (first[0] / "data" / "skins" / "classic").exists()
        with pytest.raises(ppo_tuxkart.UsageError, match="no kart nosuch: .*karts"):
            ppo_tuxkart.find_assets(engine, "nosuch")
    alone, _ = ppo_tuxkart.find_assets("pystk", "konqi")
    assert [path.name for path in (alone / "data" / "karts").iterdir()] == ["konqi"]
    assert (alone / "data" / "karts" / "konqi" / "kart.xml").exists() and (alone / "data" / "textures").exists()
    assert {"scotland", "lighthouse", "zengarden", "olivermath"} <= ppo_tuxkart.race_tracks(first[0]).keys()
    assert not {"battleisland", "stadium", "introcutscene"} & ppo_tuxkart.race_tracks(first[0]).keys()


def test_a_crash_while_saving_leaves_the_old_checkpoint(monkeypatch, tmp_path):
    path = tmp_path / "last.pt"
    ppo_tuxkart.save_atomically({"value": 1}, path)

    def crash(*_):
        raise OSError("disk full")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(ppo_tuxkart.os, function, crash)
            with pytest.raises(OSError):
                ppo_tuxkart.save_atomically({"value": 2}, path)
        assert torch.load(path, weights_only=True) == {"value": 1}


def test_ctrl_c_while_saving_waits_for_the_save(monkeypatch, tmp_path):
    path, fsync = tmp_path / "last.pt", ppo_tuxkart.os.fsync

    def interrupted(descriptor):
        signal.raise_signal(signal.SIGINT)
        fsync(descriptor)

    monkeypatch.setattr(ppo_tuxkart.os, "fsync", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started with & ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            ppo_tuxkart.save_atomically({"value": 1}, path)
        assert torch.load(path, weights_only=True) == {"value": 1}
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
