"""How the deep networks learn: python tests/bench/networks.py --folder FOLDER --out networks.json

Trains ppo_tuxkart_resnet.py with each network, and the default one with one thing changed at a time, for the same
number of decisions, and ppo_tuxkart.py beside them. Every run ends with 20 greedy races. FOLDER keeps the runs, and
what is done is not done again, so it can be stopped and called once more. What the JSON file holds of other names stays
there, and in the picture.
"""

import dataclasses
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from processes import plain_settings, print_rows
from school import learn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RUNS = {  # name: script and options; / 4: a fourth of the channels
    "ppo_tuxkart": ("ppo_tuxkart", ()),
    "impala, float32": ("ppo_tuxkart_resnet", ()),
    "impala, float32, LSTM": ("ppo_tuxkart_resnet", ("--memory", "lstm")),
    "impala, float32, shifted": ("ppo_tuxkart_resnet", ("--augment", "shift")),
    "impala": ("ppo_tuxkart_resnet", ("--amp", "bf16")),
    "impala, gray": ("ppo_tuxkart_resnet", ("--amp", "bf16", "--color", "gray")),
    "conv2d / 4": ("ppo_tuxkart_resnet", ("--network", "conv2d", "--base-channels", "32", "--learning-rate", "2e-3")),
    "conv2d / 4, 5e-4": ("ppo_tuxkart_resnet", ("--amp", "bf16", "--network", "conv2d", "--base-channels", "32")),
    "resnet3d / 32": ("ppo_tuxkart_resnet", ("--network", "resnet3d", "--base-channels", "8", "--width", "36",
                                             "--height", "36", "--learning-rate", "2e-3")),
    "ec418": ("ppo_tuxkart_resnet", ("--amp", "bf16", "--network", "ec418")),
}  # fmt: skip


@dataclasses.dataclass
class Networks:
    folder: Path
    """where to learn; runs/NAME stays there for each"""
    names: tuple[str, ...] = tuple(RUNS)
    """which of them"""
    decisions: int = 160_000
    """decisions of each training"""
    track: str = "scotland"
    """where the kart learns"""
    seed: int = 1
    """seed of each"""
    picture: Path | None = None
    """PNG file to write"""
    out: Path | None = None
    """JSON file to write"""


def main(settings):
    curves, table, plain = {}, {}, plain_settings(settings, ("folder", "names", "picture", "out"))
    if settings.out and settings.out.exists():
        before = json.loads(settings.out.read_text())
        if before["settings"] != plain:
            sys.exit(f"{settings.out} was made with other settings: name another file.")
        curves, table = before["curves"], before["table"]
    for name in settings.names:
        script, options = RUNS[name]
        run = name.replace(", ", "-").replace(" / ", "-")
        learn(script, settings.folder, run, settings.track, settings.decisions,
              ["--seed", str(settings.seed), "--eval-interval", "1000000", *options])  # fmt: skip
        lines = (settings.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        keys = ("global_step", "charts/elapsed_seconds", "charts/progress", "charts/finish_rate")
        curves[name] = {key: [row.get(key) for row in rows] for key in keys}
        last = rows[-1]
        figures = {
            "progress": last["charts/progress"], "finish_rate": last["charts/finish_rate"],
            "greedy": last["eval/finished"], "lap": last.get("eval/median_lap"),
            "rate": len(rows) / sum(1 / row["charts/SPS"] for row in rows),
            "update": float(np.median([row["charts/update_seconds"] for row in rows])),
        }  # fmt: skip
        table[name] = {key: value for key, value in figures.items() if value is not None}
        print(f"{name}: {last['charts/progress']:.0%} of the lap, {last['eval/finished']} of 20", flush=True)

    curves, table = ({name: kept[name] for name in RUNS if name in kept} for kept in (curves, table))
    columns = {
        "progress": ("of the lap", "{:.0%}"),
        "finish_rate": ("finished", "{:.0%}"),
        "greedy": ("greedy of 20", "{:.0f}"),
        "lap": ("median lap", "{:.2f} s"),
        "rate": ("decisions/s", "{:.0f}"),
        "update": ("update", "{:.1f} s"),
    }
    print(f"\n{settings.decisions} decisions each; of the last 100 sampled races, and of 20 greedy ones")
    print_rows(columns, table)
    if settings.picture:
        figure, (progress, finish) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        for name, curve in curves.items():
            steps = np.array(curve["global_step"]) / 1e3
            for axes, key in ((progress, "charts/progress"), (finish, "charts/finish_rate")):
                axes.plot(steps, np.array(curve[key], float), label=name, linewidth=1)
        progress.set(xlabel="thousand decisions", ylabel="lap covered, sampled", ylim=(0, None))
        finish.set(xlabel="thousand decisions", ylabel="races finished, sampled", ylim=(0, None))
        progress.legend(fontsize=7, frameon=False)
        for axes in (progress, finish):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(settings.picture, dpi=100)
    if settings.out:
        settings.out.write_text(json.dumps({"table": table, "curves": curves, "settings": plain}) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Networks, description=__doc__))
