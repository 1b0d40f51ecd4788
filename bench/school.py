"""What each reward and each set of actions teaches.

    python bench/school.py --folder FOLDER --actions --init-from pretrained/scotland.pt
    python bench/school.py --folder FOLDER --rewards --decisions 160000

Trains briefly with one of them at a time, all else as it is by default, from nothing or from a
checkpoint's weights, and races what was learnt greedily from the evaluation's starts. The table
says how it drives: speed, distance from the middle in halves of the road's width, how fast it moves
sideways, how far its direction is from the road's, time off the road, and the correlation of return
and lap time while it learnt. The picture shows the laps. FOLDER keeps the runs, and what is done is
not done again.
"""

import dataclasses
import importlib
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import common
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.image import imread


@dataclasses.dataclass
class School:
    folder: Path  # where to learn; runs/NAME stays there for each
    script: Literal["ppo_tuxkart", "ppo_tuxkart_resnet"] = "ppo_tuxkart"  # which script
    rewards: tuple[str, ...] = ("all",)  # rewards, with the default actions
    actions: tuple[str, ...] = ("all",)  # sets of actions, with the default reward
    track: str = "scotland"  # where the kart learns
    decisions: int = 300_000  # decisions of each training
    init_from: Path | None = None  # checkpoint that each begins with, which is raced as well
    options: str = ""  # more flags for all: --options="--num-envs 4"
    races: int = 8  # races of each
    picture: Path | None = None  # PNG file to write
    out: Path | None = None  # JSON file to write


def style(races: list[dict]) -> dict[str, float]:
    """How it drives, averaged over all moments of all races."""
    moments: dict[str, list[float]] = {"speed": [], "from_middle": [], "sideways": [], "angle": []}
    for race in races:
        trail, places = np.array(race["trail"]), common.places(race)  # clock, x, y, z, speed
        seconds, moved = np.diff(trail[:, 0]), np.diff(trail[:, [1, 3]], axis=0)
        metres = np.hypot(*moved.T)
        drove = (seconds > 0) & (metres > 0.1) & (metres < 20)  # neither stood nor was rescued
        apart = np.arctan2(moved[:, 0], moved[:, 1]) - places[:-1, 2]
        angles = np.degrees(np.abs((apart + np.pi) % (2 * np.pi) - np.pi))
        moments["speed"] += trail[:, 4].tolist()
        moments["from_middle"] += (np.abs(places[:, 1]) / (places[:, 3] / 2)).tolist()
        moments["sideways"] += np.abs(np.diff(places[:, 1])[drove] / seconds[drove]).tolist()
        moments["angle"] += angles[drove].tolist()
    return {name: float(np.mean(values)) for name, values in moments.items() if values}


def draw(script: Any, laps: dict[str, list[dict]], table: dict[str, dict], path: Path) -> None:
    """The laps after each training, on a map each."""
    rows = -(-len(laps) // 4)
    figure = Figure(figsize=(10, 2.9 * rows), layout="constrained")
    for number, (name, races) in enumerate(laps.items()):
        with tempfile.TemporaryDirectory() as folder:
            script.show_races(races, Path(folder), 1)
            picture = imread(Path(folder, "map.png"))
        axes = figure.add_subplot(rows, 4, number + 1)
        axes.imshow(picture)
        axes.axis("off")
        axes.set_title(f"{name}\n{table[name]['finished']} of {len(races)}", fontsize=9)
    figure.savefig(path, dpi=150)


def main(settings: School) -> None:
    common.isolate()
    script: Any = importlib.import_module(settings.script)
    rewards = tuple(script.REWARDS) if settings.rewards == ("all",) else settings.rewards
    actions = (
        tuple(script.ACTIONS)[1:] if settings.actions == ("all",) else settings.actions
    )  # the first is the default
    if settings.init_from and actions:
        sys.exit("Weights fit no other set of actions: type --actions with nothing after it.")
    trainings = {f"reward {name}": ["--reward", name] for name in rewards}
    trainings.update({f"actions {name}": ["--actions", name] for name in actions})
    general = common.flags(track=settings.track, total_timesteps=settings.decisions, eval_interval=0, teacher="none")
    general += shlex.split(settings.options)
    checkpoints = {}
    if settings.init_from:
        general += ["--init-from", str(settings.init_from.resolve())]
        checkpoints["before"] = settings.init_from
    for name, flags in trainings.items():
        run = name.replace(" ", "-")
        common.learn(settings.script, settings.folder, run, [*general, *flags])
        checkpoints[name] = settings.folder / "runs" / run / "last.pt"

    table: dict[str, dict] = {}
    laps = {}
    for name, path in checkpoints.items():
        args, agent, seeds = common.load(script, path, settings.track, settings.races)
        laps[name] = script.race_all(args, agent, seeds)
        table[name] = {**script.summarize(laps[name]), **style(laps[name]), "return_lap_correlation": None}
        if name in trainings:
            curve = common.read_curves(path.parent).get("charts/return_lap_correlation", [(0, None)])
            table[name]["return_lap_correlation"] = curve[-1][1]
        print(f"{name}: {table[name]['finished']} of {settings.races} finished", flush=True)
        common.write_json(settings.out, settings, {"table": table})
    print(f"\n{settings.decisions} decisions each, {settings.races} greedy races")
    common.print_table(table)
    if settings.picture:
        draw(script, laps, table, settings.picture)


if __name__ == "__main__":
    main(tyro.cli(School, description=__doc__))
