"""The README's pictures.

    python tests/bench/figures.py --film runs/<evaluation>/best_race.mp4 --lap runs/<run>/best_lap.mp4

docs/scotland.gif and docs/carracing.gif from what was filmed, docs/learning.png and docs/carracing.png from the
metrics.jsonl of runs, docs/peers.png from what learning_peers.py kept, all under tests/bench/results/.
"""

import dataclasses
import json
from pathlib import Path

import imageio.v3
import matplotlib
import numpy as np
import tyro
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


@dataclasses.dataclass
class Figures:
    film: Path | None = None
    """a filmed race"""
    lap: Path | None = None
    """a filmed lap of CarRacing"""
    results: Path = HERE / "results"
    """folder with NAME.jsonl and NAME.config.json of each run, and pretrained-scotland.evaluation.json"""
    docs: Path = HERE.parents[1] / "docs"
    """folder for the pictures"""


def load(path):
    """A run's settings, its rows, and a function that gives a column of them, nan where a row has none."""
    settings = json.loads(path.with_suffix(".config.json").read_text())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return settings, rows, lambda key, chosen: np.array([row.get(key, np.nan) for row in chosen], float)


def curves(settings):
    figure, (rate, laps, weights) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for path in sorted(settings.results.glob("scotland-seed*.jsonl")):
        run, rows, column = load(path)
        label, races = f"seed {run['seed']}", [row for row in rows if "eval/finished" in row]
        (line,) = rate.plot(column("global_step", rows) / 1e6, column("charts/finish_rate", rows), label=label)
        steps, look = column("global_step", races) / 1e6, {"color": line.get_color(), "label": f"{label}, greedy"}
        rate.plot(steps, column("eval/finished", races) / run["eval_episodes"], "o", **look)
        laps.plot(steps, column("eval/median_lap", races), "o-", **look)
    for path in settings.results.glob("pretrained-scotland.jsonl"):  # it goes on from seed 3
        _, rows, column = load(path)
        races = [row for row in rows if "eval/finished" in row]
        steps = 1 + column("global_step", races) / 1e6
        laps.plot(
            steps, column("eval/median_lap", races), "o-", color=line.get_color(), mfc="white", label="its sequel"
        )
    for path in settings.results.glob("pretrained-scotland.evaluation.json"):
        laps.axhline(json.loads(path.read_text())["ai_median"], color="gray", linestyle="--", label="the game's AI")
    for path in sorted(settings.results.glob("explore-*.jsonl")):
        run, rows, column = load(path)
        if not run["init_from"]:
            label = f"weight {run['vf_coef']:g}, step size {run['learning_rate']:g}"
            weights.plot(column("global_step", rows) / 1e6, column("charts/progress", rows), label=label)
    rate.set(xlabel="million decisions", ylabel="races finished", ylim=(0, 1.02))
    laps.set(xlabel="million decisions", ylabel="median lap, greedy (s)", ylim=(46, 62))
    weights.set(xlabel="million decisions", ylabel="lap covered, sampled", ylim=(0, 1.02), title="value loss's weight")
    for axes in (rate, laps, weights):
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(settings.docs / "learning.png", dpi=110)


def search(settings):
    """The world model's score against time and frames, in its two runs."""
    figure, (minutes, frames) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for name, marker in (("carracing", "o-"), ("carracing-2", "s--")):
        run, rows, _ = load(settings.results / f"{name}.jsonl")
        phase, found = "in the dream", {"in the dream": [], "on real tracks": []}
        for row in rows:
            phase = "on real tracks" if "real/return_mean" in row else phase
            phase = "in the dream" if "dream/return_mean" in row else phase
            if "controller/validation" in row:
                error = row["controller/validation_std"] / run["validation_tracks"] ** 0.5
                spent = row["charts/elapsed_seconds"] / 60, row["charts/frames"] / 1e6
                found[phase].append((*spent, row["controller/validation"], error))
        for (phase, points), colour in zip(found.items(), ("C0", "C1"), strict=True):
            look = {"fmt": marker, "color": colour, "markersize": 3, "linewidth": 1}
            label = f"searched {phase}, {run['population']} x {run['tracks']} tracks"
            *spent, scores, errors = zip(*points, strict=True)
            for axes, x in zip((minutes, frames), spent, strict=True):
                axes.errorbar(x, scores, errors, label=label, **look)
    for axes, unit in ((minutes, "minutes"), (frames, "million frames driven")):
        axes.set(xlabel=unit)
        axes.spines[["top", "right"]].set_visible(False)
    minutes.set(ylabel="mean controller, 64 tracks")
    frames.legend(fontsize=7, frameon=False, loc="lower right")
    figure.savefig(settings.docs / "carracing.png", dpi=110)


def peers(settings):
    """What ours and Stable-Baselines3's PPO learnt by minutes, a line a seed."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    labels = {"ours": "ppo_tuxkart.py", "sb3": "Stable-Baselines3", "sb3:tuned": "Stable-Baselines3, tuned"}
    colours = dict(zip(labels, ("C0", "C1", "C2"), strict=True))
    for path in sorted((settings.results / "learning-peers").glob("*.json")):
        run = json.loads(path.read_text())
        minutes = [row["seconds"] / 60 for row in run["rows"]]
        label = labels[run["peer"]] if run["seed"] == 1 else None
        for axes, key in zip(panels, ("progress", "finish_rate"), strict=True):
            values = [row.get(key, np.nan) for row in run["rows"]]
            axes.plot(minutes, values, color=colours[run["peer"]], label=label, linewidth=1)
    for axes, what in zip(panels, ("lap covered", "races finished"), strict=True):
        axes.set(xlabel="minutes of sampling and learning", ylabel=f"{what}, sampled", ylim=(0, 1.02))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=7, frameon=False)
    figure.savefig(settings.docs / "peers.png", dpi=110)


def moving_picture(film, path, size, every):
    frames = imageio.v3.imread(film)[::every]
    frames = [Image.fromarray(frame).resize(size).quantize(48) for frame in frames[:120]]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0)


def main(settings):
    settings.docs.mkdir(exist_ok=True)
    curves(settings)
    search(settings)
    peers(settings)
    if settings.film:
        moving_picture(settings.film, settings.docs / "scotland.gif", (256, 192), 2)  # ten a second
    if settings.lap:
        moving_picture(settings.lap, settings.docs / "carracing.gif", (252, 168), 3)


if __name__ == "__main__":
    main(tyro.cli(Figures, description=__doc__))
