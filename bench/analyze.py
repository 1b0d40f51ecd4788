"""What only an analyst wants to know of checkpoints and evaluations.

    python bench/analyze.py laps runs/<name>/best.pt --out profile.json
    python bench/analyze.py intervals runs/*/evaluation.json
    python bench/analyze.py ablations pretrained/carracing.pt --frames 1500000 --first-round last.pt

laps: where on the track a checkpoint loses time to the game's AI. Both race from the evaluation's
starts; for each stretch the median seconds, and at its end the speed (m/s) and the metres to the
right of the road's middle. Then which shares of its decisions each choice has.

intervals: 95% intervals, by evaluation and for all of them together: of the finish rate (Wilson
1927), and of the ratio of the median laps, agent to AI, by a bootstrap over the races (Efron 1979)
that takes each evaluation's apart.

ablations: what each part of the world model is worth. C is searched anew, from zero and on real
tracks alone, with a checkpoint's V and M as they are and with a part taken away; each search may
drive the same number of frames, and its mean controller is validated now and then. Candidates,
tracks and validation are the script's own.
"""

import dataclasses
import importlib
import itertools
import json
import math
from pathlib import Path
from typing import Any, Literal

import common
import numpy as np
import torch
import tyro


@dataclasses.dataclass
class Laps:
    checkpoint: tyro.conf.Positional[Path]  # whose greedy races are looked at
    script: Literal["ppo_tuxkart", "ppo_tuxkart_resnet"] = "ppo_tuxkart"  # the script that it is of
    track: str | None = None  # track to race on, if not the checkpoint's first
    races: int = 8  # races of each
    stretch: float = 60.0  # metres
    out: Path | None = None  # JSON file to write


@dataclasses.dataclass
class Intervals:
    files: tyro.conf.Positional[tuple[Path, ...]]  # evaluation.json files
    out: Path | None = None  # JSON file to write


@dataclasses.dataclass
class Ablations:
    checkpoint: tyro.conf.Positional[Path]  # whose V and M drive
    first_round: Path | None = None  # checkpoint whose V and M have seen random driving alone
    frames: int = 2_000_000  # frames that each search may drive
    interval: int = 5  # generations between validations
    seeds: int = 1  # searches of each kind
    out: Path | None = None  # JSON file to write


def by_stretch(race: dict, edges: np.ndarray) -> list[np.ndarray]:
    """Clock, speed and offset of a race at some metres from its first moment on."""
    trail, places = np.array(race["trail"]), common.places(race)  # clock, x, y, z, speed
    gains = race["geometry"].gain(places[:-1, 0], places[1:, 0])
    metres = np.concatenate([[0.0], np.cumsum(gains)])
    return [np.interp(edges, metres, column) for column in (trail[:, 0], trail[:, 4], places[:, 1])]


def profile(races: list[dict], edges: np.ndarray) -> dict[str, list[float]]:
    """Medians over the races that were finished."""
    found = [by_stretch(race, edges) for race in races if race["finished"]]
    if not found:
        raise SystemExit("No race was finished: type a checkpoint that gets around the track.")
    clocks, speeds, offsets = (np.array(column) for column in zip(*found, strict=True))
    return {
        "lap_times": [float(race["lap_time"]) for race in races],
        "seconds": np.median(np.diff(clocks), 0).round(3).tolist(),
        "speed": np.median(speeds, 0).round(2).tolist(),
        "offset": np.median(offsets, 0).round(2).tolist(),
    }


def laps(settings: Laps) -> None:
    script: Any = importlib.import_module(settings.script)
    args, agent, seeds = common.load(script, settings.checkpoint, settings.track, settings.races)
    ai = dataclasses.replace(args, driver="ai")
    races = {"agent": script.race_all(args, agent, seeds), "ai": script.race_all(ai, agent, seeds)}
    edges = np.arange(0, races["agent"][0]["geometry"].length, settings.stretch)
    ours, theirs = (profile(races[driver], edges) for driver in ("agent", "ai"))
    table = {}
    for i, (mine, other) in enumerate(zip(ours["seconds"], theirs["seconds"], strict=True)):
        table[f"{edges[i]:.0f}-{edges[i + 1]:.0f} m"] = {
            "agent s": mine,
            "AI s": other,
            "lost s": mine - other,
            "agent m/s": ours["speed"][i + 1],
            "AI m/s": theirs["speed"][i + 1],
            "agent right m": ours["offset"][i + 1],
            "AI right m": theirs["offset"][i + 1],
        }
    common.print_table(table)
    actions = np.concatenate([race["actions"] for race in races["agent"]])
    shares = []
    for part, choices in enumerate(agent.nvec):
        shares.append((np.bincount(actions[:, part], minlength=choices) / len(actions)).round(4).tolist())
        print(f"choices of part {part}: " + ", ".join(f"{share:.1%}" for share in shares[-1]))
    found = {"agent": ours, "ai": theirs, "action_shares": shares}
    common.write_json(settings.out, settings, {"metres": edges.tolist(), **found})


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95% interval of a rate (Wilson 1927)."""
    z = 1.959964
    middle = (hits + z**2 / 2) / (count + z**2)
    half = z / (count + z**2) * math.sqrt(hits * (count - hits) / count + z**2 / 4)
    return middle - half, middle + half


def bootstrap(laps: list[float], ai_laps: list[float], rng: np.random.Generator) -> np.ndarray:
    """Ratios of median laps over races drawn with replacement, (10000,)."""
    medians = [np.median(rng.choice(times, (10_000, len(times))), 1) for times in (laps, ai_laps)]
    return medians[0] / medians[1]


def intervals(settings: Intervals) -> None:
    rng, table, ratios, drawn = np.random.default_rng(0), {}, [], []
    hits = races = 0
    for path in settings.files:
        found = json.loads(path.read_text())
        count = len(found["seeds"])
        least, most = wilson(found["finished"], count)
        row: dict[str, Any] = {"finished": f"{found['finished']}/{count}", "from": least, "to": most}
        hits, races = hits + found["finished"], races + count
        if found["lap_times"] and found["ai"]["lap_times"]:
            ratios.append(float(np.median(found["lap_times"]) / np.median(found["ai"]["lap_times"])))
            drawn.append(bootstrap(found["lap_times"], found["ai"]["lap_times"], rng))
            low, high = np.quantile(drawn[-1], (0.025, 0.975)).tolist()
            row.update({"of the AI's median": ratios[-1], "from ": low, "to ": high})
        table[str(path)] = row
    least, most = wilson(hits, races)
    table["all"] = {"finished": f"{hits}/{races}", "from": least, "to": most}
    if ratios:
        low, high = np.quantile(np.mean(drawn, 0), (0.025, 0.975)).tolist()
        table["all"].update({"of the AI's median": float(np.mean(ratios)), "from ": low, "to ": high})
    common.print_table(table)
    common.write_json(settings.out, settings, {"table": table})


def search(wm: Any, args: Any, agent: Any, settings: Ablations) -> list[list[float]]:
    """Validations of the mean controller, [generation, frames, mean, standard error] each."""
    cmaes = wm.CMAES(torch.zeros_like(agent.controller), wm.SIGMA, args.population, args.seed)
    drivers, driven, curve = wm.Drivers(args.workers), 0, []
    job = {"limit": args.max_frames}
    for generation in itertools.count():
        over = driven >= settings.frames
        if over or generation % settings.interval == 0:
            mean = cmaes.mean.float().view(1, *agent.controller.shape)
            tracks = range(wm.VALIDATION, wm.VALIDATION + args.validation_tracks)
            results = drivers.drive(agent, mean, [{**job, "seed": track, "controller": 0} for track in tracks])
            scores = np.array([result["return"] for result in results])
            curve.append([generation, driven, float(scores.mean()), float(scores.std() / len(scores) ** 0.5)])
            print(f"generation {generation}, {driven} frames: {scores.mean():.1f}", flush=True)
        if over:
            return curve
        controllers = cmaes.ask()
        first = wm.TRAIN + args.seed * 10_000_000 + generation * args.tracks
        pairs = itertools.product(range(first, first + args.tracks), range(len(controllers)))
        jobs = [{**job, "abort": True, "seed": track, "controller": candidate} for track, candidate in pairs]
        results = drivers.drive(agent, controllers, jobs)
        driven += sum(result["frames"] for result in results)
        returns = torch.tensor([result["return"] for result in results]).view(args.tracks, -1)
        cmaes.tell(-returns.mean(0))


def ablations(settings: Ablations) -> None:
    wm: Any = importlib.import_module("worldmodel_carracing")
    kinds = dict.fromkeys(("all of it", "z alone", "untrained M"), settings.checkpoint)
    if settings.first_round:
        kinds["V and M of the first round"] = settings.first_round
    table: dict[str, dict] = {}
    curves: dict[str, list] = {}
    for seed in range(1, settings.seeds + 1):
        for kind, path in kinds.items():
            checkpoint = wm.load_checkpoint(path)
            args = dataclasses.replace(checkpoint["args"], seed=seed)
            agent = wm.Agent(args, checkpoint, path)
            if kind == "untrained M":
                torch.manual_seed(0)
                agent.memory = wm.Memory()
            if kind == "z alone":
                agent.controller = agent.controller[:, : wm.LATENTS + 1]
                args.controller_input = "z"
            name = f"{kind}, seed {seed}"
            print(name)
            curves[name] = search(wm, args, agent, settings)
            table[name] = dict(zip(("generations", "frames", "validation", "error"), curves[name][-1], strict=True))
            common.write_json(settings.out, settings, {"table": table, "curves": curves})
    common.print_table(table)


if __name__ == "__main__":
    chosen = tyro.cli(Laps | Intervals | Ablations, description=__doc__)
    {Laps: laps, Intervals: intervals, Ablations: ablations}[type(chosen)](chosen)
