"""How fast scripts learn, side by side in one run, in turns.

    python bench/speed.py ppo_tuxkart.py
    python bench/speed.py /path/to/old/ppo_tuxkart.py ppo_tuxkart.py --bare --out FILE

Each script is started as its users start it, for a short training without evaluations, in an empty
folder. The table gives medians over the rounds:

    decisions/s       from the end of the first iteration to the end of the last one that counts, by the clock
    of the first      that beside the first script's, the median of the rounds' own ratios
    sampling/s        decisions a second while it does not learn, that is outside of `ppo_update`
    learning ms       of a decision's time
    first decision s  from the command to the first decision
    CPU ms            time of the learner's process, and of all that it started, for a decision
    MB                memory of both, in an iteration after those that count; shared pages are counted once

`--ranks 1 2` starts each script with torchrun as well, on two ranks that share the games; "learner"
is torchrun then. `--bare` adds game processes that do nothing but step, driven around the track by
the game's own AI: with drawing, where each copies the picture as well, and without.
"""

import dataclasses
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import psutil
import tyro


@dataclasses.dataclass
class Speed:
    scripts: tyro.conf.Positional[tuple[Path, ...]]  # script files
    rounds: int = 3  # turns of each
    iterations: int = 3  # iterations that count, after one that warms up
    ranks: tuple[int, ...] = (1,)  # numbers of torchrun's processes to start each script with
    num_envs: int = 16  # games, all ranks together
    num_steps: int = 128  # decisions per game and iteration
    track: str = "scotland"  # track to drive
    engine: str = "auto"  # game bindings
    init_from: Path | None = None  # checkpoint to begin with (default: an untrained kart)
    options: str = ""  # more flags for every script: --options="--num-karts 3"
    bare: bool = False  # also measure games that only step
    seconds: float = 10.0  # time for each measurement of those
    out: Path | None = None  # JSON file to write


def start(settings: Speed, turn: tuple[Path, int], folder: Path) -> subprocess.Popen:
    """Starts a training of a script on some ranks, which notes what it does; see watch.py."""
    script, ranks = turn
    watcher = Path(__file__).with_name("watch.py")
    hook = f"import runpy, sys\nif {str(script)!r} in sys.argv[:1]:\n    runpy.run_path({str(watcher)!r})\n"
    (folder / "sitecustomize.py").write_text(hook)  # Python runs it first
    variables = {**os.environ, "PYTHONPATH": str(folder), "WATCH_LOG": str(folder / "log")}
    variables.update(SUPERTUXKART_SAVEDIR=str(folder), XDG_CONFIG_HOME=str(folder))  # for older scripts
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    total = (settings.iterations + 2) * settings.num_envs * settings.num_steps
    command += [str(script), "--name", "speed", "--eval-interval", "0", *shlex.split(settings.options)]
    command += common.flags(num_envs=settings.num_envs // ranks, num_steps=settings.num_steps, total_timesteps=total)
    if "--observe" not in command and "load_teachers" in script.read_text():
        command += ["--teacher", "none"]
    init_from = settings.init_from and settings.init_from.resolve()
    command += common.flags(track=settings.track, engine=settings.engine, init_from=init_from)
    with (folder / "said").open("w") as said:
        return subprocess.Popen(command, cwd=folder, stdout=said, stderr=said, env=variables)


def times(folder: Path, what: str) -> list[float]:
    """When the script did something, in seconds since 1970."""
    if not (folder / "log").exists():
        return []
    lines = (folder / "log").read_text().splitlines()
    return [float(line.split()[1]) for line in lines if line.startswith(f"{what} ")]


def wait_for_updates(process: subprocess.Popen, folder: Path, count: int) -> None:
    """Waits until the script has learnt so many times."""
    while len(times(folder, "learnt")) < count:
        if process.poll() is not None:
            sys.exit(f"The script ended too early:\n{(folder / 'said').read_text()[-3000:]}")
        time.sleep(0.02)


def play_turn(settings: Speed, turn: tuple[Path, int]) -> dict[str, float]:
    """One training of a script. Returns its figures."""
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.time()
        process = start(settings, turn, folder)
        try:
            wait_for_updates(process, folder, 1)
            parties = {"learner": [psutil.Process(process.pid)], "games": common.descendants(process.pid)}
            before = {party: common.cpu_seconds(those) for party, those in parties.items()}
            wait_for_updates(process, folder, 1 + settings.iterations)
            used = {party: common.cpu_seconds(those) - before[party] for party, those in parties.items()}
            memory = {party: common.megabytes(those) for party, those in parties.items()}
            process.wait()
        finally:
            if process.poll() is None:
                for left in [*common.descendants(process.pid), process]:
                    left.kill()
        learnt, learning = times(folder, "learnt"), times(folder, "learning")
        first_decision = times(folder, "decision")[0] - started
    decisions = settings.iterations * settings.num_envs * settings.num_steps
    seconds = learnt[settings.iterations] - learnt[0]
    spent = sum(learnt[i] - learning[i] for i in range(1, settings.iterations + 1))
    return {
        "decisions/s": decisions / seconds,
        "sampling/s": decisions / (seconds - spent),
        "learning ms": 1000 * spent / decisions,
        "first decision s": first_decision,
        **{f"{party} CPU ms": 1000 * cpu / decisions for party, cpu in used.items()},
        **{f"{party} MB": size for party, size in memory.items()},
    }


def bare_game(settings: Speed, drawing: bool, ready: Any, counts: Any) -> None:
    """Steps one game, in a process of its own. ready: a barrier; counts: a queue of steps."""
    from ppo_tuxkart import TuxKartEnv

    observe = "pixels" if drawing else "state"
    env = TuxKartEnv(settings.track, engine=settings.engine, observe=observe, laps=100)
    env.start_engine()
    env.game.driver = "ai"  # not before: of its races nothing would be drawn
    env.load_track()
    race = env.race
    race.step()
    steps = 0
    ready.wait()
    started = time.perf_counter()
    while time.perf_counter() - started < settings.seconds:
        race.step()
        if drawing:
            np.array(race.render_data[0].image)
        steps += 1
    counts.put(steps)


def play_bare(settings: Speed, drawing: bool) -> dict[str, float]:
    """Decisions a second of games that only step, all together."""
    context = multiprocessing.get_context("spawn")
    ready, counts = context.Barrier(settings.num_envs), context.Queue()
    work = (settings, drawing, ready, counts)
    games = [context.Process(target=bare_game, args=work, daemon=True) for _ in range(settings.num_envs)]
    for game in games:
        game.start()
    steps = sum(counts.get(timeout=300 + settings.seconds) for _ in games)
    for game in games:
        game.kill()
        game.join()
    return {"decisions/s": steps / settings.seconds}


def main(settings: Speed) -> None:
    scripts = {}
    for script in settings.scripts:
        if not script.is_file():
            sys.exit(f"There is no script {script}: type the path of a ppo_tuxkart.py.")
        for ranks in settings.ranks:
            name = str(script) if ranks == 1 else f"{script}, {ranks} ranks"
            scripts[name] = (script.resolve(), ranks)
    bare = {"bare game": True, "bare, not drawn": False} if settings.bare else {}
    turns: dict[str, list[dict]] = {name: [] for name in [*scripts, *bare]}
    for number, name in common.in_turns(list(turns), settings.rounds):
        figures = play_turn(settings, scripts[name]) if name in scripts else play_bare(settings, bare[name])
        turns[name].append(figures)
        print(f"round {number + 1}, {name}: {figures['decisions/s']:.0f} decisions/s", flush=True)

    table, first = {}, turns[next(iter(turns))]
    for name, rows in turns.items():
        pairs = zip(rows, first, strict=True)
        ratio = statistics.median(row["decisions/s"] / beside["decisions/s"] for row, beside in pairs)
        table[name] = {"of the first": ratio, **common.medians(rows)}
    cores = len(os.sched_getaffinity(0))
    print(f"\n{settings.num_envs} games, {cores} cores, medians of {settings.rounds} rounds")
    common.print_table(table)
    common.write_json(settings.out, settings, {"table": table, "turns": turns})


if __name__ == "__main__":
    main(tyro.cli(Speed, description=__doc__))
