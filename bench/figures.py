"""Learning curves as pictures.

    python bench/figures.py
    python bench/figures.py --runs runs/a runs/b --picture curves.png

The first draws the pages' pictures from what bench/results holds of earlier runs: learning.png,
carracing.png and networks-400k.png (networks.py writes such a file).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import common
import numpy as np
import tyro
from matplotlib.figure import Figure


@dataclasses.dataclass
class Figures:
    runs: tuple[Path, ...] = ()  # runs' folders, or metrics files, to draw instead
    picture: Path = Path("curves.png")  # PNG file for them
    results: Path = common.ROOT / "bench" / "results"  # what earlier runs have left
    docs: Path = common.ROOT / "docs"  # folder for the pages' pictures


def panels(count: int, width: float, **settings: Any) -> tuple[Figure, Any]:
    """A figure with panels side by side."""
    figure = Figure(figsize=(width, 3.4), layout="constrained")
    axes = figure.subplots(1, count, **settings)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def curve(curves: dict, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Decisions, in millions, and values of a scalar."""
    points = np.array(curves.get(tag, []), float).reshape(-1, 2)
    return points[:, 0] / 1e6, points[:, 1]


def draw_curves(runs: dict[str, dict], picture: Path) -> None:
    """Lap covered and races finished, sampled, against decisions, of runs' curves."""
    figure, axes = panels(2, 10)
    for panel, tag in zip(axes, ("charts/progress", "charts/finished"), strict=True):
        for name, curves in runs.items():
            panel.plot(*curve(curves, tag), label=name, linewidth=1)
    axes[0].set(xlabel="million decisions", ylabel="lap covered, sampled", ylim=(0, None))
    axes[1].set(xlabel="million decisions", ylabel="races finished, sampled", ylim=(0, None))
    axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(picture, dpi=100)


def draw_learning(results: Path, picture: Path) -> None:
    """Three seeds on scotland, the sequel of one, and what the weight of the value loss does."""
    figure, (rate, laps, weights) = panels(3, 12)
    for number, path in enumerate(sorted(results.glob("scotland-seed*.jsonl"))):
        curves, run = common.read_curves(path), json.loads(path.with_suffix(".config.json").read_text())
        look = {"color": f"C{number}", "label": f"seed {run['seed']}, greedy"}
        rate.plot(*curve(curves, "charts/finished"), color=look["color"], label=f"seed {run['seed']}")
        steps, finished = curve(curves, "eval/finished")
        rate.plot(steps, finished / run["eval_episodes"], "o", **look)
        laps.plot(*curve(curves, "eval/median"), "o-", **look)
    steps, median = curve(common.read_curves(results / "pretrained-scotland.jsonl"), "eval/median")
    laps.plot(1 + steps, median, "o-", color="C2", mfc="white", label="its sequel")  # it goes on from seed 3
    ai = json.loads((results / "pretrained-scotland.evaluation.json").read_text())["ai_median"]
    laps.axhline(ai, color="gray", linestyle="--", label="the game's AI")
    for path in sorted(results.glob("explore-*.jsonl")):
        run = json.loads(path.with_suffix(".config.json").read_text())
        label = f"weight {run['vf_coef']:g}, step size {run['learning_rate']:g}"
        weights.plot(*curve(common.read_curves(path), "charts/progress"), label=label)
    rate.set(ylabel="races finished", ylim=(0, 1.02))
    laps.set(ylabel="median lap, greedy (s)", ylim=(46, 62))
    weights.set(ylabel="lap covered, sampled", ylim=(0, 1.02), title="value loss's weight")
    for axes in (rate, laps, weights):
        axes.set(xlabel="million decisions")
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(picture, dpi=110)


def draw_search(results: Path, picture: Path) -> None:
    """The world model's score against minutes and frames, in its two runs."""
    figure, (minutes, frames) = panels(2, 9, sharey=True)
    for name, look in (("carracing", "o-"), ("carracing-2", "s--")):
        run = json.loads((results / f"{name}.config.json").read_text())
        place, found = "in the dream", {"in the dream": [], "on real tracks": []}  # type: str, dict[str, list]
        for row in map(json.loads, (results / f"{name}.jsonl").read_text().splitlines()):
            if "real/return_mean" in row:
                place = "on real tracks"
            elif "dream/return_mean" in row:
                place = "in the dream"
            if "controller/validation" in row:
                error = row["controller/validation_std"] / run["validation_tracks"] ** 0.5
                spent = (row["charts/elapsed_seconds"] / 60, row["charts/frames"] / 1e6)
                found[place].append((*spent, row["controller/validation"], error))
        for number, (place, points) in enumerate(found.items()):
            label = f"searched {place}, {run['population']} x {run['tracks']} tracks"
            spent_minutes, spent_frames, scores, errors = np.array(points).T
            for axes, x in ((minutes, spent_minutes), (frames, spent_frames)):
                axes.errorbar(x, scores, errors, fmt=look, color=f"C{number}", ms=3, linewidth=1, label=label)
    minutes.set(xlabel="minutes", ylabel="mean controller, 64 tracks")
    frames.set(xlabel="million frames driven")
    frames.legend(fontsize=7, frameon=False, loc="lower right")
    figure.savefig(picture, dpi=110)


def networks(file: Path) -> dict[str, dict]:
    """The curves that networks.py, or an earlier version of it, has written."""
    runs = json.loads(file.read_text())["curves"]
    for curves in runs.values():
        if "global_step" in curves:  # columns, in an earlier version
            steps = curves.pop("global_step")
            curves["charts/finished"] = curves.pop("charts/finish_rate")
            curves.update({tag: list(zip(steps, column, strict=True)) for tag, column in curves.items()})
    return runs


def main(settings: Figures) -> None:
    if settings.runs:
        draw_curves({path.name: common.read_curves(path) for path in settings.runs}, settings.picture)
        return
    draw_learning(settings.results, settings.docs / "learning.png")
    draw_search(settings.results, settings.docs / "carracing.png")
    draw_curves(networks(settings.results / "networks-400k.json"), settings.docs / "networks-400k.png")


if __name__ == "__main__":
    main(tyro.cli(Figures, description=__doc__))
