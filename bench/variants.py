"""What a setting is worth: variants of a training, over seeds, all else as it is by default.

    python bench/variants.py --folder FOLDER --variants "default" "gamma: --gamma 0.995" --seeds 1 2 3
    python bench/variants.py --folder FOLDER --options="--track lighthouse --total-timesteps 400000"

Every variant is a name and, after a colon, the flags that make it; they learn one after the other with
the same options, --observe state unless others are given. The table has, from the evaluations while
they learnt: decisions a second, evaluations included; decisions and minutes until all races finished and
until their median was under --goal; the median at the end, best and last, with the mean's 95% bootstrap
interval over the seeds. FOLDER keeps the runs, and what is done is not done again.
"""

import dataclasses
import shlex
from pathlib import Path

import common
import numpy as np
import tyro


@dataclasses.dataclass
class Variants:
    folder: Path  # where to learn; runs/NAME-SEED stays there for each
    variants: tuple[str, ...] = ("default",)  # names, each with its flags after a colon
    seeds: tuple[int, ...] = (1,)  # seeds of each variant
    options: str = "--observe state --total-timesteps 400000"  # flags for all
    goal: float = 48.0  # seconds, a median to come under
    script: str = "ppo_tuxkart"  # which script
    races: int = 20  # races of an evaluation, the script's --eval-episodes
    out: Path | None = None  # JSON file to write


def measure(curves: dict, settings: Variants) -> dict:
    """What one run reached, and when."""
    steps, seconds = common.iteration_seconds(curves)
    minutes = seconds.cumsum() / 60
    evaluations = []
    for (step, finished), (_, median) in zip(curves["eval/finished"], curves["eval/median"], strict=True):
        minute = float(minutes[np.searchsorted(steps, step)])
        evaluations.append({"k": step / 1000, "minutes": minute, "finished": finished, "median": median})
    complete = [row for row in evaluations if row["finished"] == settings.races]
    never = {"k": np.nan, "minutes": np.nan}
    first = next(iter(complete), never)
    quick = next((row for row in complete if row["median"] < settings.goal), never)
    return {
        "decisions/s": float(steps[-1] / minutes[-1] / 60),
        "all finish, k": first["k"],
        "minutes": first["minutes"],
        "under goal, k": quick["k"],
        "minutes then": quick["minutes"],
        "best": min((row["median"] for row in complete), default=np.nan),
        "last": evaluations[-1]["median"],
        "finished": evaluations[-1]["finished"],
        "evaluations": evaluations,
    }


def interval(values: list[float]) -> tuple[float, float]:
    """95% bootstrap interval of the mean."""
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(-1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def main(settings: Variants) -> None:
    runs: dict[str, list[dict]] = {}
    table = {}
    for seed in settings.seeds:
        for variant in settings.variants:
            name, _, flags = variant.partition(":")
            typed = shlex.split(f"{settings.options} {flags} --seed {seed}")
            typed += common.flags(eval_episodes=settings.races)
            curves = common.learn(settings.script, settings.folder, f"{name}-{seed}", typed)
            runs.setdefault(name, []).append(measure(curves, settings))
            numbers = [key for key, value in runs[name][0].items() if isinstance(value, float)]
            row = {key: float(np.mean([run[key] for run in runs[name]])) for key in numbers}
            low, high = interval([run["last"] for run in runs[name]])
            table[name] = {"seeds": len(runs[name]), **row, "low": low, "high": high}
            print(f"\n{settings.options}")
            common.print_table(table)
            common.write_json(settings.out, settings, {"table": table, "runs": runs})


if __name__ == "__main__":
    main(tyro.cli(Variants, description=__doc__))
