"""The README's pictures: python tests/bench/figures.py --film runs/<evaluation>/best_race.mp4

docs/scotland.gif from a filmed race, docs/learning.png from the metrics.jsonl of runs, kept under tests/bench/results/.
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
    runs: tuple[Path, ...] = tuple(sorted((HERE / "results").glob("scotland-seed*.jsonl")))
    """metrics.jsonl of each run"""
    evaluation: Path = HERE / "results" / "scotland-seed1-continued.evaluation.json"
    """evaluation.json with the AI's median lap"""
    film: Path | None = None
    """a filmed race"""
    docs: Path = HERE.parents[1] / "docs"
    """folder for the pictures"""


def curves(settings):
    figure, (rate, laps) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for path in settings.runs:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        steps = np.array([row["global_step"] for row in rows]) / 1e6
        line = rate.plot(steps, [row.get("charts/finish_rate", np.nan) for row in rows], label=f"{path.stem}, sampled")
        races = [row for row in rows if "eval/finished" in row]
        steps = [row["global_step"] / 1e6 for row in races]
        color = line[0].get_color()
        rate.plot(steps, [row["eval/finished"] / 20 for row in races], "o", color=color, label="greedy, 20 races")
        laps.plot(steps, [row.get("eval/median_lap", np.nan) for row in races], "o-", color=color, label=path.stem)
    ai = json.loads(settings.evaluation.read_text())["ai_median"]
    laps.axhline(ai, color="gray", linestyle="--", label="the game's AI")
    rate.set(xlabel="million decisions", ylabel="races finished", ylim=(0, 1.02))
    laps.set(xlabel="million decisions", ylabel="median lap, greedy (s)")
    for axes in (rate, laps):
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(settings.docs / "learning.png", dpi=120)


def moving_picture(settings):
    frames = imageio.v3.imread(settings.film)[::2]  # ten a second
    frames = [Image.fromarray(frame).resize((256, 192)).quantize(48) for frame in frames[:120]]
    frames[0].save(settings.docs / "scotland.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)


def main(settings):
    settings.docs.mkdir(exist_ok=True)
    if settings.runs:
        curves(settings)
    if settings.film:
        moving_picture(settings)


if __name__ == "__main__":
    main(tyro.cli(Figures, description=__doc__))
