"""What torchrun's ranks bring, and what they cost.

    python bench/ranks.py --points 1x8 2x4 1x16 2x8 --rounds 2 --out ranks.json

Trains for some iterations with every number of ranks and games given, in turns; the table gives medians of decisions/s
(all ranks together, as the script says) and of the seconds that an iteration samples and learns.
"""

import dataclasses
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import tyro


@dataclasses.dataclass
class Ranks:
    points: tuple[str, ...] = ("1x8", "2x4", "1x16", "2x8")  # ranks x games of each
    iterations: int = 15  # iterations of each training; the first two do not count, and 16 would reload the games
    num_steps: int = 128  # decisions per game and iteration
    rounds: int = 2  # trainings of each
    out: Path | None = None  # JSON file to write


def train(settings: Ranks, point: str) -> dict[str, float]:
    """Medians over the iterations of one training."""
    ranks, games = (int(number) for number in point.split("x"))
    decisions = ranks * games * settings.num_steps
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(common.ROOT / "ppo_tuxkart.py"), "--eval-interval", "0", "--name", "ranks"]
    total = settings.iterations * decisions
    command += common.flags(num_envs=games, num_steps=settings.num_steps, total_timesteps=total)
    with tempfile.TemporaryDirectory() as folder:
        variables = {**common.home(folder), "OMP_WAIT_POLICY": "PASSIVE"}
        try:
            done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        finally:
            common.end_all()
        if done.returncode:
            sys.exit(f"{point} failed:\n{done.stderr[-3000:]}")
        curves = common.read_curves(Path(folder, "runs", "ranks"))
    found = {}
    for name in ("SPS", "sampling_SPS", "update_seconds"):
        found[name] = statistics.median(value for _, value in curves[f"charts/{name}"][2:])
    sampling = decisions / found["sampling_SPS"]
    return {"decisions/s": found["SPS"], "sampling s": sampling, "learning s": found["update_seconds"]}


def main(settings: Ranks) -> None:
    common.adopt_orphans()
    trainings: dict[str, list[dict]] = {point: [] for point in settings.points}
    for number, point in common.in_turns(list(trainings), settings.rounds):
        trainings[point].append(train(settings, point))
        print(f"round {number + 1}, {point}: {trainings[point][-1]['decisions/s']:.0f} decisions/s", flush=True)
    table = {point: common.medians(rows) for point, rows in trainings.items()}
    print(f"\nranks x games, medians of {settings.rounds} trainings; seconds of an iteration")
    common.print_table(table)
    common.write_json(settings.out, settings, {"table": table, "trainings": trainings})


if __name__ == "__main__":
    main(tyro.cli(Ranks, description=__doc__))
