"""What the tests share: a script run as a user runs it, its TensorBoard files read back, a process for each game."""

import contextlib
import functools
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
HOME = tempfile.TemporaryDirectory(prefix="tuxkart-tests-")  # of the games: no test sees its user's settings
os.environ.update(SUPERTUXKART_SAVEDIR=HOME.name, XDG_CONFIG_HOME=HOME.name, OMP_NUM_THREADS="1")
os.environ["PYTHONPATH"] = str(ROOT)  # of the scripts that are started here

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

import ppo_tuxkart  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has its jobs, and theirs, ignore it


INSTALLED = []
for name in ppo_tuxkart.ENGINES:
    with contextlib.suppress(ppo_tuxkart.UsageError):
        ppo_tuxkart.find_game(name)
        INSTALLED.append(name)
slow = pytest.mark.slow


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: for `pytest -m "slow or not slow"`, which runs everything')
    config.addinivalue_line("norecursedirs", "bench")
    config.addinivalue_line("norecursedirs", "shared")
    config.option.markexpr = config.option.markexpr or "not slow"


@pytest.fixture(params=[pytest.param(name, marks=[slow] if i else []) for i, name in enumerate(INSTALLED)])
def engine(request):
    """Each engine that is installed; the second one is slow."""
    return request.param


def in_own_process(function):
    """The function, run in a forked process each time, since a process runs one game: its result, or its failure."""
    context = multiprocessing.get_context("fork")

    @functools.wraps(function)
    def call(*args, **kwargs):
        receiver, sender = context.Pipe(False)

        def work():
            try:
                sender.send((function(*args, **kwargs), None))
            except BaseException:
                sender.send((None, traceback.format_exc()))

        process = context.Process(target=work)
        process.start()
        sender.close()
        try:
            assert receiver.poll(300), "no answer in 300 s"
            result, failure = receiver.recv()
            assert failure is None, failure
            return result
        finally:
            process.kill()
            process.join()

    return call


def command(script, *args, patch=""):
    """The words that start a script. patch: Python that is run first, also by its games; `script` is its module."""
    path = ROOT / f"{script}.py"
    if patch:
        code = f"import {script} as script\n{patch}\nif __name__ == '__main__':\n    script.main()"
        path = Path(HOME.name, f"patched-{hash(code)}.py")
        path.write_text(code)
    return [sys.executable, str(path), *map(str, args)]


def run(*args, cwd, script="ppo_tuxkart", patch="", **settings):
    """A finished run of a script: returncode, stdout, stderr."""
    settings = {"capture_output": True, "text": True, "timeout": 900} | settings
    return subprocess.run(command(script, *args, patch=patch), cwd=cwd, **settings)


class Started:
    """A script that was started and still runs; what it prints is in a file. As a context, it is killed at the end."""

    def __init__(self, *args, cwd, script="ppo_tuxkart", patch=""):
        self.file = cwd / "output.txt"
        with open(self.file, "w") as output:
            self.process = subprocess.Popen(command(script, *args, patch=patch), cwd=cwd, stdout=output, stderr=output)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def output(self):
        return self.file.read_text()

    def decisions(self):
        """How many decisions the progress bar says are done."""
        return max(map(int, re.findall(r" (\d+)/\d+ \[", self.output())), default=0)

    def wait_for(self, condition, seconds=300):
        """Waits until something is so while the script runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def end(self, number=None, seconds=60):
        """Sends a signal, if any, and waits. Returns the exit code and what was printed."""
        games = self.games() if number == signal.SIGINT else []  # where a terminal's Ctrl-C goes, too
        for pid in [*games, self.process.pid] if number else []:
            os.kill(pid, number)
        return self.process.wait(seconds), self.output()

    def games(self):
        """Ids of the processes that the script has started, by any of its threads."""
        lists = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for file in lists for pid in file.read_text().split()]


def alive(pids):
    """Those of the processes that still run, after a moment of grace."""
    deadline = time.monotonic() + 10
    while pids and time.monotonic() < deadline:
        time.sleep(0.1)
        pids = [pid for pid in pids if is_running(pid)]
    return pids


def is_running(pid):
    with contextlib.suppress(OSError):
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    return False


def call_main(script, words, monkeypatch, capfd):
    """Exit code and words of a script's main, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    capfd.readouterr()
    code = 0
    try:
        script.main()
    except SystemExit as stop:
        code = stop.code
    said = "".join(capfd.readouterr())
    assert "Traceback" not in said and "executed" not in said
    return code, " ".join(said.replace("│", " ").split())


CLOCK = {"charts/SPS", "charts/sampling_SPS", "charts/elapsed_seconds", "charts/update_seconds"}
CLOCK |= {"dream/frames_per_second", "real/frames_per_second"}


def metrics(folder):
    """{step: {tag: value}}: a run's scalars as TensorBoard shows them, without what a clock measured."""
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    rows = {}
    for tag in set(board.Tags()["scalars"]) - CLOCK:
        for event in board.Scalars(tag):
            value = event.value
            rows.setdefault(event.step, {})[tag] = None if math.isnan(value) else value
    return dict(sorted(rows.items()))
