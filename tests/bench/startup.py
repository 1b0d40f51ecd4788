"""How long until it learns, and what it holds: python tests/bench/startup.py --out startup.json

Types `python ppo_tuxkart.py` and waits for the first line of its metrics.jsonl: the time from the command to the first
decision, the first iteration, and the most memory that the learner and each game have held by then. Then the time to
import each script, beside `import torch`, and which packages it goes to. All in turn; the table gives medians.
"""

import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import tyro
from processes import adopt_orphans, descendants, end_all, megabytes

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Startup:
    rounds: int = 3
    """times that everything is measured"""
    modules: tuple[str, ...] = ("torch", "ppo_tuxkart", "ppo_tuxkart_resnet", "worldmodel_carracing")
    """modules to import"""
    num_envs: int = 16
    """games"""
    num_steps: int = 128
    """decisions per game and iteration"""
    track: str = "scotland"
    """track to drive"""
    engine: str = "auto"
    """game bindings"""
    out: Path | None = None
    """JSON file to write"""


def first_update(settings):
    """Starts the script in an empty folder and stops it after its first iteration. Returns seconds and megabytes."""
    command = [sys.executable, str(ROOT / "ppo_tuxkart.py"), "--name", "start", "--track", settings.track]
    command += ["--engine", settings.engine, "--num-envs", str(settings.num_envs)]
    command += ["--num-steps", str(settings.num_steps)]
    with tempfile.TemporaryDirectory() as folder:
        metrics, said = Path(folder) / "runs" / "start" / "metrics.jsonl", Path(folder) / "said"
        started = time.perf_counter()
        with said.open("w") as output:
            process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        try:
            while not (metrics.exists() and metrics.read_text().endswith("\n")):
                if process.poll() is not None:
                    sys.exit(f"The script ended before its first iteration:\n{said.read_text()[-3000:]}")
                time.sleep(0.02)
            seconds = time.perf_counter() - started
            most = [megabytes(pid, "VmHWM") for pid in descendants(process.pid)]
            shares = [megabytes(pid, "Pss") for pid in (process.pid, *descendants(process.pid))]
            learner, row = megabytes(process.pid, "VmHWM"), json.loads(metrics.read_text().splitlines()[0])
        finally:
            end_all()
    iteration = row["charts/elapsed_seconds"]
    figures = {"first_update": seconds, "first_decision": seconds - iteration, "first_iteration": iteration}
    return figures | {"learner_mb": learner, "game_mb": max(most), "all_mb": sum(shares)}


def import_seconds(module):
    """Wall-clock time of a Python that imports a module, and of one that imports nothing: the difference."""
    seconds = []
    for code in ("", f"import {module}"):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        seconds.append(time.perf_counter() - started)
    return seconds[1] - seconds[0]


def import_shares(module, most=8):
    """Milliseconds of the packages that take longest, without what they import from others, by -X importtime."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stderr
    spent = Counter()
    for own, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", lines):
        spent[name.split(".")[0]] += int(own) / 1000
    return dict(spent.most_common(most))


def main(settings):
    adopt_orphans()
    starts, imports = [], {module: [] for module in settings.modules}
    for number in range(settings.rounds):
        starts.append(first_update(settings))
        for module in settings.modules:
            imports[module].append(import_seconds(module))
        print(f"round {number + 1}: first update after {starts[-1]['first_update']:.1f} s", flush=True)
    medians = {key: statistics.median(start[key] for start in starts) for key in starts[0]}
    shares = {module: import_shares(module) for module in settings.modules if (ROOT / f"{module}.py").exists()}
    print(f"\n{settings.num_envs} games, {os.cpu_count()} cores, medians of {settings.rounds} rounds")
    decisions = settings.num_envs * settings.num_steps
    print(f"first decision  {medians['first_decision']:8.1f} s  after the command")
    print(f"first update    {medians['first_update']:8.1f} s  after the command, {decisions} decisions")
    print(f"learner, at most{medians['learner_mb']:8.0f} MB")
    print(f"a game, at most {medians['game_mb']:8.0f} MB  with pages that it shares in full")
    print(f"all together    {medians['all_mb']:8.0f} MB  with shared pages counted once")
    print("\nimport")
    for module, seconds in imports.items():
        parts = ", ".join(f"{name} {spent:.0f}" for name, spent in shares.get(module, {}).items())
        print(f"{module:22}{statistics.median(seconds):6.2f} s" + (f"   ms: {parts}" if parts else ""))
    if settings.out:
        result = {
            "medians": medians,
            "starts": starts,
            "import_seconds": imports,
            "import_ms_by_package": shares,
            "settings": {key: str(value) for key, value in dataclasses.asdict(settings).items()},
            "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        }
        settings.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Startup, description=__doc__))
