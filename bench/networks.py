"""What the networks of ppo_tuxkart_resnet.py learn, and what an update of theirs costs.

    python bench/networks.py --folder FOLDER --decisions 400000 --names impala ppo_tuxkart --out FILE
    python bench/networks.py --folder FOLDER --full-size --out FILE

Trains the script with each network, and with one thing changed at a time, for the same number of decisions, and
ppo_tuxkart.py beside it. Every run ends with greedy races. FOLDER keeps the runs, and what is done is not done again.
figures.py draws the file. The table: lap covered and races finished of the last 100 sampled races, greedy races
finished and their median lap, decisions/s, the median update, minutes, and the most memory that a process held.

`--full-size` trains tuxkart-ai's networks on its own pictures, 400 x 600, for a few updates of one minibatch each, in
float32 and bf16, where the script runs: on a GPU if there is one.
"""

import dataclasses
import shlex
import statistics
from pathlib import Path

import common
import numpy as np
import tyro

RUNS = {  # name: script and flags; / 4: a fourth of the channels
    "ppo_tuxkart": ("ppo_tuxkart", ""),
    "impala, float32": ("ppo_tuxkart_resnet", ""),
    "impala, float32, LSTM": ("ppo_tuxkart_resnet", "--memory lstm"),
    "impala, float32, shifted": ("ppo_tuxkart_resnet", "--augment shift"),
    "impala": ("ppo_tuxkart_resnet", "--amp bf16"),
    "impala, gray": ("ppo_tuxkart_resnet", "--amp bf16 --color gray"),
    "conv2d / 4": ("ppo_tuxkart_resnet", "--network conv2d --base-channels 32 --learning-rate 2e-3"),
    "conv2d / 4, 5e-4": ("ppo_tuxkart_resnet", "--amp bf16 --network conv2d --base-channels 32"),
    "resnet3d / 32": (
        "ppo_tuxkart_resnet",
        "--network resnet3d --base-channels 8 --width 36 --height 36 --learning-rate 2e-3",
    ),
    "ec418": ("ppo_tuxkart_resnet", "--amp bf16 --network ec418"),
}
FULL_SIZE = "--actions tuxkart --num-envs 1 --num-minibatches 1 --epochs 1"


@dataclasses.dataclass
class Networks:
    folder: Path  # where to learn; runs/NAME stays there for each
    names: tuple[str, ...] = tuple(RUNS)  # which of them
    decisions: int = 160_000  # decisions of each training
    track: str = "scotland"  # where the kart learns
    seed: int = 1  # seed of each
    full_size: bool = False  # updates of tuxkart-ai's networks at full size instead
    batch: int = 2  # pictures of such an update
    updates: int = 3  # such updates; the median counts
    options: str = ""  # more flags for all: --options="--num-envs 4"
    out: Path | None = None  # JSON file to write


def trainings(settings: Networks) -> dict[str, tuple[str, list[str]]]:
    """{name: script and flags} of what is asked for."""
    general = common.flags(track=settings.track, seed=settings.seed)
    if not settings.full_size:
        general += common.flags(total_timesteps=settings.decisions, eval_interval=10**6)  # the last iteration alone
        return {name: (RUNS[name][0], general + shlex.split(RUNS[name][1])) for name in settings.names}
    general += common.flags(num_steps=settings.batch, total_timesteps=settings.batch * settings.updates)
    general += ["--eval-interval", "0", *shlex.split(FULL_SIZE)]
    found = {}
    for network, width, height in (("conv2d", 400, 600), ("resnet3d", 600, 400)):
        for amp in ("off", "bf16"):
            words = common.flags(network=network, width=width, height=height, amp=amp)
            found[f"{network} {amp}"] = ("ppo_tuxkart_resnet", general + words)
    return found


def main(settings: Networks) -> None:
    table: dict[str, dict] = {}
    curves: dict[str, dict] = {}
    for name, (script, words) in trainings(settings).items():
        run = name.replace(", ", "-").replace(" / ", "-").replace(" ", "-")
        gigabytes = common.learn(script, settings.folder, run, words + shlex.split(settings.options))
        found = common.read_curves(settings.folder / "runs" / run)
        curves[name] = {tag: found.get(tag, []) for tag in ("charts/progress", "charts/finished")}
        last = {tag: curve[-1][1] for tag, curve in found.items()}
        table[name] = {
            "of the lap": last.get("charts/progress"),
            "finished": last.get("charts/finished"),
            "greedy": last.get("eval/finished"),
            "median lap": last.get("eval/median"),
            "decisions/s": 1 / float(np.mean([1 / rate for _, rate in found["charts/SPS"]])),
            "update s": statistics.median(seconds for _, seconds in found["charts/update_seconds"]),
            "minutes": last["charts/elapsed_seconds"] / 60,
            "GB": gigabytes,
        }
        print(f"{name}: {table[name]['minutes']:.1f} minutes", flush=True)
        common.write_json(settings.out, settings, {"table": table, "curves": curves})
    common.print_table(table)


if __name__ == "__main__":
    main(tyro.cli(Networks, description=__doc__))
