"""What each reward and each set of actions teaches.

    python bench/school.py --folder FOLDER --actions --init-from pretrained/scotland.pt
    python bench/school.py --folder FOLDER --rewards --decisions 160000

Trains briefly with one of them at a time, all else as it is by default, from nothing or from a
checkpoint's weights, and races what was learnt greedily from the evaluation's starts. The table
says how it drives: distance from the middle in halves of the road's width, time off the road, and the
correlation of return and lap time while it learnt. The picture shows the laps. FOLDER keeps the runs,
and what is done is not done again.
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


def from_middle(races: list[dict]) -> float:
    """How far from the road's middle it drives, in halves of its width, over all moments of all races."""
    everywhere = np.concatenate([common.places(race) for race in races])
    return float(np.mean(2 * np.abs(everywhere[:, 1]) / everywhere[:, 3]))


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
    script: Any = importlib.import_module(settings.script)
    rewards = tuple(script.REWARDS) if settings.rewards == ("all",) else settings.rewards
    others = tuple(script.ACTIONS)[1:]  # than the default
    actions = others if settings.actions == ("all",) else settings.actions
    if settings.init_from and actions:
        sys.exit("Weights fit no other set of actions: type --actions with nothing after it.")
    trainings = {f"reward {name}": ["--reward", name] for name in rewards}
    trainings.update({f"actions {name}": ["--actions", name] for name in actions})
    general = common.flags(track=settings.track, total_timesteps=settings.decisions, eval_interval=0, teacher="none")
    general += shlex.split(settings.options)
    checkpoints, correlations = {}, {}
    if settings.init_from:
        general += ["--init-from", str(settings.init_from.resolve())]
        checkpoints["before"] = settings.init_from
    for name, flags in trainings.items():
        run = name.replace(" ", "-")
        curves = common.learn(settings.script, settings.folder, run, [*general, *flags])
        checkpoints[name] = settings.folder / "runs" / run / "last.pt"
        correlations[name] = curves.get("charts/return_lap_correlation", [(0, None)])[-1][1]

    table: dict[str, dict] = {}
    laps = {}
    for name, path in checkpoints.items():
        args, agent, seeds = common.load(script, path, settings.track, settings.races)
        laps[name] = script.race_all(args, agent, seeds)
        table[name] = {**script.summarize(laps[name]), "from_middle": from_middle(laps[name])}
        table[name]["return_lap_correlation"] = correlations.get(name)
        print(f"{name}: {table[name]['finished']} of {settings.races} finished", flush=True)
        common.write_json(settings.out, settings, {"table": table})
    print(f"\n{settings.decisions} decisions each, {settings.races} greedy races")
    common.print_table(table)
    if settings.picture:
        draw(script, laps, table, settings.picture)


if __name__ == "__main__":
    main(tyro.cli(School, description=__doc__))
