"""What can go wrong in a night of World Models: workers that die or hang, figures that are none, full disks, and files
that are not what they were."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import command, lines_of, metrics, run, wait_for
from test_fuzz import Evil
from test_worldmodel import SMALL

import worldmodel_carracing as wm

SCRIPT = {"script": "worldmodel_carracing"}
ONE_ROUND = ["--rounds", 1, "--workers", 1]


# --- Workers


@pytest.fixture(scope="module")
def workers():
    torch.manual_seed(0)
    before = set(threading.enumerate())
    workers = wm.Workers(2)
    workers.load(wm.Agent("zh"))
    yield workers
    assert set(threading.enumerate()) - before == {workers.watcher}
    workers.close()
    assert set(threading.enumerate()) <= before


def drive(workers, count=10, limit=60):
    torch.manual_seed(1)
    controllers = torch.randn(3, 3, 289) * 0.1
    return workers.drive(controllers, [{"seed": i, "controller": i % 3, "limit": limit + i} for i in range(count)])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("when", ["at work", "idle"])
def test_a_worker_that_dies_or_hangs_is_replaced_and_its_rollouts_repeated(workers, number, when):
    expected, before = drive(workers), workers.replaced
    assert [result["frames"] for result in expected] == list(range(60, 70))
    victim = workers.processes[0]

    def strike():
        while when == "at work" and sum(workers.driven) == 0:
            time.sleep(0.01)
        os.kill(victim.pid, number)
        while workers.processes[0] is victim:  # for a stopped one the clock is put forward, not waited for
            if number == signal.SIGSTOP:
                workers.beats[0] -= 1000
            time.sleep(0.2)

    if when == "at work":
        workers.driven[:] = [0, 0]
        striker = threading.Thread(target=strike)
    else:
        os.kill(victim.pid, number)
        striker = threading.Thread(target=strike)
    striker.start()
    assert drive(workers) == expected
    striker.join()
    assert workers.replaced == workers.lost == before + 1
    assert not victim.is_alive() and all(process.is_alive() for process in workers.processes)


def die_at_once(connection, *rest):
    connection.recv()
    os._exit(9)


def pay_nonsense(connection, *rest):
    connection.recv()
    connection.send({"index": connection.recv()["index"], "return": float("inf"), "frames": 1})
    connection.recv()


@pytest.mark.parametrize("worker, words", [(die_at_once, "died 4 times in a row"), (pay_nonsense, "return is inf")])
def test_it_stops_with_a_sentence_where_going_on_is_no_use(worker, words, monkeypatch):
    monkeypatch.setattr(wm, "work", worker)
    workers = wm.Workers(1)
    workers.load(wm.Agent("zh"))
    with pytest.raises(wm.Fault, match=words):
        drive(workers, count=1)
    workers.close()


# --- Runs


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A run whose V has learnt and whose M has not."""
    cwd = tmp_path_factory.mktemp("faults")
    finished = run(*SMALL, *ONE_ROUND, "--name", "learnt", "--stages", "collect", "vision", cwd=cwd, **SCRIPT)
    assert finished.returncode == 0, finished.stderr
    folder = cwd / "runs" / "learnt"
    np.save(folder / "data" / "latents-1.npy", np.zeros((300, 64), np.float32))
    return folder


@pytest.fixture
def folder(learnt, tmp_path):
    """A copy of it to spoil."""
    shutil.copytree(learnt, tmp_path / "runs" / "spoilt")
    return tmp_path / "runs" / "spoilt"


def go_on(folder, stages, monkeypatch, capfd):
    """Exit code and words of a resumed run, in this process, that has no workers."""

    class NoWorkers:
        processes, lost = (), 0
        __init__ = load = close = lambda *args: None

    monkeypatch.chdir(folder.parents[1])
    monkeypatch.setattr(wm, "Workers", NoWorkers)
    monkeypatch.setattr(sys, "argv", ["wm", "--resume", f"runs/{folder.name}", "--stages", *stages])
    capfd.readouterr()
    code = 0
    try:
        wm.main()
    except SystemExit as stop:
        code = stop.code
    return code, capfd.readouterr().err


def sentence(error):
    """The last line of what was said, after the progress bars."""
    assert "Traceback" not in error
    return error.replace("\r", "\n").strip().splitlines()[-1]


@pytest.mark.parametrize("network", ["vision.mu.bias", "memory.outcome.bias"])
def test_a_loss_that_is_no_number_is_named_and_the_checkpoint_kept(network, folder, monkeypatch, capfd):
    path, stage = folder / "last.pt", network.split(".")[0]
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["agent"][network][0] = float("nan")
    checkpoint["done"] = checkpoint["done"][: ("collect", "vision", "memory").index(stage)]
    torch.save(checkpoint, path)
    before = path.read_bytes()
    code, error = go_on(folder, [stage], monkeypatch, capfd)
    assert code == 1 and "is not finite (loss nan" in sentence(error) and "--resume" in sentence(error)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["last.tmp", "metrics.tmp", "config.json", "data/latents-1.tmp"])
def test_a_full_disk_is_a_sentence_and_the_checkpoint_kept(name, folder, monkeypatch, capfd):
    (folder / "data" / "latents-1.npy").unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/full")
    before = (folder / "last.pt").read_bytes()
    code, error = go_on(folder, ["memory"], monkeypatch, capfd)
    assert code == 1 and "--resume runs/spoilt" in sentence(error) and len(sentence(error)) < 250
    assert (folder / "last.pt").read_bytes() == before
    (folder / name).unlink(missing_ok=True)
    code, _ = go_on(folder, ["memory"], monkeypatch, capfd)
    assert code == 0 and torch.load(folder / "last.pt", weights_only=True)["done"][-1] == [1, "memory"]


def test_a_small_disk_is_a_sentence(tmp_path):
    """A file system of 30 MB, really full: 49 MB of pictures do not fit it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        probe = "import worldmodel_carracing as wm; wm.disk_need = lambda args: 0; wm.main()"
        flags = ["--collect-frames", "4000", "--workers", "1", "--stages", "collect", "--name", "full"]
        path = os.pathsep.join([str(wm.Path(wm.__file__).parent), *sys.path])
        finished = subprocess.run(
            [sys.executable, "-c", probe, *flags],
            cwd=disk, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        assert finished.returncode == 1 and "No space left on device" in sentence(finished.stderr)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_run_folder_that_vanishes_is_a_sentence(tmp_path):
    folder, moved = tmp_path / "runs" / "gone", tmp_path / "moved"
    flags = [*SMALL, *ONE_ROUND, "--vision-steps", 500, "--name", "gone", "--stages", "collect", "vision"]
    process = subprocess.Popen(
        command("worldmodel_carracing", *flags), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: lines_of(folder / "metrics.jsonl") >= 2, process)
    folder.rename(moved)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 1 and "No such file" in sentence(error) and "--resume runs/gone" in sentence(error)
    assert torch.load(moved / "last.pt", weights_only=True)["done"] == [[1, "collect"]]


FILES = ["last.pt", "metrics.jsonl", "data/pictures-1.npy", "data/rows-1.npy", "data/latents-1.npy"]


@pytest.mark.parametrize("kind", ["truncated", "empty", "random", "foreign", "code"])
@pytest.mark.parametrize("name", FILES)
def test_no_file_is_believed(name, kind, folder, tmp_path, monkeypatch, capfd):
    path, trap = folder / name, tmp_path / "trap"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3 - 5])
    elif kind in ("empty", "random"):
        path.write_bytes(np.random.default_rng(0).bytes(5000) if kind == "random" else b"")
    elif kind == "foreign":
        if name == "last.pt":
            torch.save({"args": {"seed": "x"}, "made_on": {}, "agent": 3, "iteration": []}, path)
        elif name == "metrics.jsonl":
            path.write_text('{"step": 3}\n[]\n')
        else:
            np.save(path, np.zeros((7, 3)))
    elif name.endswith("npy"):
        np.save(path, np.array([Evil(trap)]), allow_pickle=True)
    elif name == "last.pt":
        torch.save({"args": Evil(trap)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(trap)))
    spoilt = path.read_bytes()
    code, error = go_on(folder, ["memory"], monkeypatch, capfd)
    assert not trap.exists()
    if name == "metrics.jsonl":  # what can be read of it stays, and it goes on
        assert code == 0 and "memory/loss" in metrics(folder)[-1]
        return
    assert code == 2 and path.name in sentence(error) and "type" in sentence(error)
    assert path.read_bytes() == spoilt


def test_footage_that_nobody_drove_is_not_believed(folder, monkeypatch, capfd):
    rows = np.random.default_rng(0).standard_normal((300, wm.COLUMNS)).astype(np.float32)
    rows[0, 4] = 0
    np.save(folder / "data" / "rows-1.npy", rows)
    code, error = go_on(folder, ["memory"], monkeypatch, capfd)
    assert code == 2 and "nobody drove" in sentence(error)
