"""Processes as Linux knows them, turns of a bench, settings and tables; used by the benches beside this file."""

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def descendants(pid):
    """Ids of the processes that a process started, and those that they started, the nearest first."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(file.parent.name)] = int(file.read_text().rsplit(")", 1)[1].split()[1])
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found[1:]


def cpu_seconds(pids):
    """User and system time that processes have used; nothing for those that have gone."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def idle_seconds():
    """Time that the machine's cores have been idle, all together, since it started."""
    return int(Path("/proc/stat").read_text().split(maxsplit=5)[4]) / os.sysconf("SC_CLK_TCK")


def megabytes(pid, key):
    """Memory of a process; 0 when it has gone.

    `Pss` counts a page that n processes share as 1/n, so it can be added up; `VmHWM` is the most that was ever
    resident, shared pages in full.
    """
    file = "smaps_rollup" if key == "Pss" else "status"
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), 0.0)
    return 0.0


def adopt_orphans():
    """Makes this process the parent of what its children leave behind, so that `end_all` finds it."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def end_all():
    """Ends whatever this process started that still runs. When it returns their memory is free again."""
    while left := descendants(os.getpid()):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def run_turn(command, environment):
    """Runs a command, ends all that it left, and returns the JSON in the last line that it printed."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    finally:
        end_all()
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def plain_settings(settings, without=()):
    """A dataclass's fields as strings, but for some of them."""
    return {key: str(value) for key, value in dataclasses.asdict(settings).items() if key not in without}


def print_rows(columns, rows):
    """Prints a table. columns: {key: (heading, format)}; rows: {name: {key: value}}, empty where a key is missing."""
    width = max(14, *(len(name) + 2 for name in rows))
    print(" " * width + "".join(f"{heading:>14}" for heading, _ in columns.values()))
    for name, figures in rows.items():
        cells = [form.format(figures[key]) if key in figures else "" for key, (_, form) in columns.items()]
        print(f"{name:{width}}" + "".join(f"{cell:>14}" for cell in cells))
