"""What the networks of ppo_tuxkart_resnet.py learn, and what an update of theirs costs.

    python bench/networks.py --folder FOLDER --decisions 400000 --names impala ppo_tuxkart
    python bench/networks.py --folder FOLDER --decisions 6 --names conv2d conv2d,bf16

Trains the script with each network, and with one thing changed at a time, for the same number of
decisions, and ppo_tuxkart.py beside it. Every run ends with greedy races. FOLDER keeps the runs, and
what is done is not done again. figures.py draws the file. The table: lap covered and races finished
of the last 100 sampled races, greedy races finished and their median lap, decisions/s, the median
update, minutes.

The second command is for tuxkart-ai's networks at full size: three updates of a minibatch of two
pictures, 400 x 600, in float32 and in bf16, where the script runs (on a GPU if there is one).
"""

import dataclasses
import shlex
import statistics
from pathlib import Path

import common
import tyro

FULL = "--num-envs 1 --num-steps 2 --num-minibatches 1 --epochs 1 --eval-interval 0"
FULL_2D = f"--network conv2d --actions tuxkart --width 400 --height 600 {FULL}"
FULL_3D = f"--network resnet3d --actions tuxkart_rescue --width 600 --height 400 {FULL}"
RUNS = {  # name: flags; / 4: a fourth of the channels
    "ppo_tuxkart": "",
    "impala, float32": "",
    "impala, float32, shifted": "--augment shift",
    "impala": "--amp bf16",
    "impala, gray": "--amp bf16 --color gray",
    "conv2d / 4": "--network conv2d --base-channels 32 --learning-rate 2e-3",
    "conv2d / 4, 5e-4": "--amp bf16 --network conv2d --base-channels 32",
    "resnet3d / 32": "--network resnet3d --base-channels 8 --width 36 --height 36 --learning-rate 2e-3",
    "ec418": "--amp bf16 --network ec418",
    "conv2d": FULL_2D,
    "conv2d,bf16": f"{FULL_2D} --amp bf16",
    "resnet3d": FULL_3D,
    "resnet3d,bf16": f"{FULL_3D} --amp bf16",
}


@dataclasses.dataclass
class Networks:
    folder: Path  # where to learn; runs/NAME stays there for each
    names: tuple[str, ...] = tuple(RUNS)[:9]  # which of them (default: all but the full-size ones)
    decisions: int = 160_000  # decisions of each training
    track: str = "scotland"  # where the kart learns
    seed: int = 1  # seed of each
    options: str = ""  # more flags for all: --options="--num-envs 4"
    out: Path | None = None  # JSON file to write


def main(settings: Networks) -> None:
    table: dict[str, dict] = {}
    curves: dict[str, dict] = {}
    for name in settings.names:
        script = "ppo_tuxkart" if name == "ppo_tuxkart" else "ppo_tuxkart_resnet"
        words = common.flags(track=settings.track, seed=settings.seed, teacher="none")
        words += common.flags(total_timesteps=settings.decisions, eval_interval=10**6)  # the last iteration
        words += shlex.split(RUNS[name]) + shlex.split(settings.options)
        run = name.replace(", ", "-").replace(" / ", "-").replace(",", "-")
        found = common.learn(script, settings.folder, run, words)
        races = [found.get(f"charts/{what}", []) for what in ("progress", "finished")]
        progress, finished = ([value for _, value in curve] for curve in races)
        steps = [step for step, _ in races[0]]  # figures.py draws these
        curves[name] = {"global_step": steps, "charts/progress": progress, "charts/finish_rate": finished}
        last = {tag: curve[-1][1] for tag, curve in found.items()}
        steps, seconds = common.iteration_seconds(found)
        table[name] = {
            "of the lap": last.get("charts/progress"),
            "finished": last.get("charts/finished"),
            "greedy": last.get("eval/finished"),
            "median lap": last.get("eval/median"),
            "decisions/s": float(steps[-1] / seconds.sum()),
            "update s": statistics.median(update for _, update in found["charts/update_seconds"]),
            "minutes": float(seconds.sum() / 60),
        }
        print(f"{name}: {table[name]['minutes']:.1f} minutes", flush=True)
        common.write_json(settings.out, settings, {"table": table, "curves": curves})
    common.print_table(table)


if __name__ == "__main__":
    main(tyro.cli(Networks, description=__doc__))
