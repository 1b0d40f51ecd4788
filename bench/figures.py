"""Learning curves as pictures.

    python bench/figures.py

Draws the pages' pictures from what bench/results holds of earlier runs: learning.png, teacher.png,
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
    results: Path = common.ROOT / "bench" / "results"  # what earlier runs have left
    docs: Path = common.ROOT / "docs"  # folder for the pages' pictures


def panels(count: int, width: float, **settings: Any) -> tuple[Figure, Any]:
    """A figure with panels side by side."""
    figure = Figure(figsize=(width, 3.4), layout="constrained")
    axes = figure.subplots(1, count, **settings)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def read_rows(path: Path) -> list[dict]:
    """The rows of figures that an earlier version of a script has left."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def curve(path: Path, tag: str) -> np.ndarray:
    """Decisions, in millions, and values of one of the figures in a file, (2, N)."""
    points = [(row["global_step"] / 1e6, row[tag]) for row in read_rows(path) if row.get(tag) is not None]
    return np.array(points).T


def draw_networks(runs: dict[str, dict], picture: Path) -> None:
    """Lap covered and races finished, sampled, against decisions, of networks.py's curves."""
    figure, axes = panels(2, 10)
    for panel, what in zip(axes, ("progress", "finish_rate"), strict=True):
        for name, columns in runs.items():
            steps = np.array(columns["global_step"]) / 1e6
            panel.plot(steps, np.array(columns[f"charts/{what}"], float), label=name, linewidth=1)
    axes[0].set(xlabel="million decisions", ylabel="lap covered, sampled", ylim=(0, None))
    axes[1].set(xlabel="million decisions", ylabel="races finished, sampled", ylim=(0, None))
    axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(picture, dpi=100)


def draw_learning(results: Path, picture: Path) -> None:
    """Three seeds on scotland, the sequel of one, and what the weight of the value loss does."""
    figure, (rate, laps, weights) = panels(3, 12)
    for number, path in enumerate(sorted(results.glob("scotland-seed*.jsonl"))):
        run = json.loads(path.with_suffix(".config.json").read_text())
        look = {"color": f"C{number}", "label": f"seed {run['seed']}, greedy"}
        rate.plot(*curve(path, "charts/finish_rate"), color=look["color"], label=f"seed {run['seed']}")
        steps, finished = curve(path, "eval/finished")
        rate.plot(steps, finished / run["eval_episodes"], "o", **look)
        laps.plot(*curve(path, "eval/median_lap"), "o-", **look)
    steps, median = curve(results / "pretrained-scotland-pystk.jsonl", "eval/median_lap")
    laps.plot(1 + steps, median, "o-", color="C2", mfc="white", label="its sequel")  # it goes on from seed 3
    ai = json.loads((results / "pretrained-scotland-pystk.evaluation.json").read_text())["ai"]["median"]
    laps.axhline(ai, color="gray", linestyle="--", label="the game's AI")
    for path in sorted(results.glob("explore-*.jsonl")):
        run = json.loads(path.with_suffix(".config.json").read_text())
        label = f"weight {run['vf_coef']:g}, step size {run['learning_rate']:g}"
        weights.plot(*curve(path, "charts/progress"), label=label)
    rate.set(ylabel="races finished", ylim=(0, 1.02))
    laps.set(ylabel="median lap, greedy (s)", ylim=(46, 62))
    weights.set(ylabel="lap covered, sampled", ylim=(0, 1.02), title="value loss's weight")
    for axes in (rate, laps, weights):
        axes.set(xlabel="million decisions")
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(picture, dpi=110)


def draw_teacher(results: Path, picture: Path) -> None:
    """Greedy races against minutes: the README's runs on pystk2, and three seeds of plain PPO on pystk."""
    figure, (finished, laps) = panels(2, 9)
    ai = {}
    for weights in ("scotland", "scotland-pystk"):
        ai[weights] = json.loads((results / f"pretrained-{weights}.evaluation.json").read_text())["ai"]["median"]
    runs, begun = [], {}
    for seed, look in ((2, "o-"),):
        teacher = f"readme-{seed}-teacher"
        runs.append((teacher, "scotland", f"teacher, seed {seed}", f"C1{look}"))
        runs.append((f"readme-{seed}", "scotland", "its student", f"C0{look}"))
        begun[f"readme-{seed}"] = read_rows(results / f"{teacher}.jsonl")[-1]["charts/elapsed_minutes"]
    runs += [(f"scotland-seed{seed}", "scotland-pystk", "no teacher" * (seed == 1), "C7.-") for seed in (1, 2, 3)]
    for name, weights, label, look in runs:
        rows = [row for row in read_rows(results / f"{name}.jsonl") if "eval/finished" in row]
        minutes = [row.get("charts/elapsed_minutes", row.get("charts/elapsed_seconds", 0) / 60) for row in rows]
        minutes = np.array(minutes) + begun.get(name, 0)
        median = [row.get("eval/median", row.get("eval/median_lap")) or np.nan for row in rows]
        finished.plot(minutes, [row["eval/finished"] for row in rows], look, label=label or None)
        laps.plot(minutes, np.array(median) / ai[weights], look, label=label or None)
    laps.axhline(1, color="gray", linestyle="--", label="the game's AI")
    finished.set(xlabel="minutes", ylabel="greedy races finished, of 20", ylim=(0, 20.5))
    laps.set(xlabel="minutes", ylabel="median lap, the AI's = 1", ylim=(0.9, 1.35))
    laps.legend(fontsize=7, frameon=False)
    figure.savefig(picture, dpi=110)


def draw_search(results: Path, picture: Path) -> None:
    """The world model's score against minutes and frames, in its two runs."""
    figure, (minutes, frames) = panels(2, 9, sharey=True)
    for name, look in (("carracing", "o-"), ("carracing-2", "s--")):
        run = json.loads((results / f"{name}.config.json").read_text())
        place = "in the dream"
        found: dict[str, list] = {place: [], "on real tracks": []}
        for row in read_rows(results / f"{name}.jsonl"):
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


def main(settings: Figures) -> None:
    draw_learning(settings.results, settings.docs / "learning.png")
    draw_teacher(settings.results, settings.docs / "teacher.png")
    draw_search(settings.results, settings.docs / "carracing.png")
    networks = json.loads((settings.results / "networks-400k.json").read_text())
    draw_networks(networks["curves"], settings.docs / "networks-400k.png")


if __name__ == "__main__":
    main(tyro.cli(Figures, description=__doc__))
