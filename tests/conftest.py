"""What the tests share: running a script as a user does, and running game code in a process of its own."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import ppo_tuxkart  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has its jobs, and theirs, ignore it

INSTALLED = [engine for engine in ppo_tuxkart.ENGINES if ppo_tuxkart.engine_version(engine)]


@pytest.fixture(params=INSTALLED)
def engine(request):
    """Each engine that is installed."""
    return request.param


def in_process(function, *args):
    """Result of a module-level function, run in a fresh process: one game runs per process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def command(script, *args):
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, args)]


def run(*args, cwd, script="ppo_tuxkart", before=(), **settings):
    """A finished run of a script: returncode, stdout, stderr. before: words in front of the command."""
    settings = {"capture_output": True, "text": True, "timeout": 900} | settings
    return subprocess.run([*before, *command(script, *args)], cwd=cwd, **settings)


def metrics(folder):
    """The rows of a run's metrics.jsonl without what a clock measured."""
    clock = {"charts/SPS", "charts/sampling_SPS", "charts/elapsed_seconds", "charts/update_seconds"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in clock} for row in rows]


def start_and_signal(number, rows, folder, *args, cwd, game=False, script="ppo_tuxkart"):
    """Starts a script, sends it (or one of its games) a signal once `rows` rows of metrics are written, and waits.

    Returns the process, its output, and the ids of the game processes that it had.
    """
    process = subprocess.Popen(
        command(script, *args), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    file = folder / "metrics.jsonl"
    wait_for(lambda: lines_of(file) >= rows, process, 600)
    started = children(process.pid)
    os.kill(started[0] if game else process.pid, number)
    output = process.communicate(timeout=60)[0]
    return process, output, started


def lines_of(file):
    """How many lines a file has; none while there is no such file."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for(condition, process, seconds=300):
    """Waits until something is so while a process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def children(pid):
    """Ids of the processes that a process has started, by any of its threads, and that still run."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            found += [int(child) for child in file.read_text().split()]
    return found


def alive(pids):
    """Those of the processes that still run, after a moment of grace."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        pids = [pid for pid in pids if Path(f"/proc/{pid}").exists() and is_running(pid)]
        if not pids:
            break
        time.sleep(0.1)
    return pids


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


SIGKILL, SIGINT = signal.SIGKILL, signal.SIGINT
