"""What each reward and each action set teaches: python tests/bench/school.py --folder FOLDER --out school.json

Trains ppo_tuxkart.py briefly with one of them at a time, all else as it is by default, from nothing or from the weights
of --init-from, and races what it learnt greedily from the evaluation's starts. The table says how it drives: speed,
distance from the middle as a share of half the road's width, how fast it moves sideways, how far its direction is from
the road's, time off the road. The picture shows the laps on a map. FOLDER keeps the runs, and what is done is not done
again, so it can be stopped and called once more.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib
import numpy as np
import torch
import tyro
from processes import plain_settings, print_rows

import ppo_tuxkart

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class School:
    folder: Path
    """where to learn; runs/NAME stays there for each"""
    rewards: tuple[str, ...] = tuple(ppo_tuxkart.REWARDS)
    """rewards, with the default actions"""
    actions: tuple[str, ...] = tuple(name for name in ppo_tuxkart.ACTIONS if name != "drive")
    """action sets, with the default reward"""
    track: str = "scotland"
    """where the kart learns"""
    decisions: int = 300_000
    """decisions of each training"""
    init_from: Path | None = None
    """checkpoint that each begins with, which is raced as well"""
    races: int = 8
    """races of each"""
    picture: Path | None = None
    """PNG file to write"""
    out: Path | None = None
    """JSON file to write"""


def learn(script, folder, name, track, decisions, options):
    """Trains until the end, or goes on with what is there; says so and ends where that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    command, run = [sys.executable, str(ROOT / f"{script}.py")], folder / "runs" / name
    if (run / "last.pt").exists():
        made, lines = json.loads((run / "config.json").read_text()), (run / "metrics.jsonl").read_text().splitlines()
        if json.loads(lines[-1])["iteration"] == made["total_timesteps"] // (made["num_envs"] * made["num_steps"]):
            return
        command += ["--resume", f"runs/{name}"]
    else:
        command += ["--name", name, "--track", track, "--total-timesteps", str(decisions), *options]
    if subprocess.run(command, cwd=folder, stderr=subprocess.DEVNULL).returncode != 0:
        sys.exit(f"{name} did not come to its end.")


def race(settings, checkpoint, name):
    """Greedy races. Returns them and the track's geometry."""
    args = ppo_tuxkart.Args(**checkpoint["args"])
    args.track, args.eval_episodes = (settings.track,), settings.races
    here = ppo_tuxkart.describe_setting(args)
    agent = ppo_tuxkart.Agent(here["observation"], here["actions"])
    ppo_tuxkart.load_weights(agent, checkpoint, Path(name), here)
    policy = ppo_tuxkart.network_policy(agent, torch.device("cpu"), greedy=True)
    games = ppo_tuxkart.race_games(args, args.track[0])
    try:
        races = ppo_tuxkart.run_races(games, policy, range(args.eval_seed, args.eval_seed + settings.races))
        return races, games.get("geometry")[0]
    finally:
        games.close()


def style(geometry, races):
    """How it drives, averaged over all moments of all races."""
    speeds, middles, sideways, angles = [], [], [], []
    for trail in (np.array(one["trail"]) for one in races if len(one["trail"]) > 1):
        places = np.zeros((len(trail), 4))
        for i, point in enumerate(trail[:, 1:4]):
            places[i] = geometry.locate(point, places[i - 1, 0] if i else None)
        seconds, moved = np.diff(trail[:, 0]), np.diff(trail[:, [1, 3]], axis=0)
        drove = (seconds > 0) & (np.hypot(*moved.T) > 0.1) & (np.hypot(*moved.T) < 20)  # neither stood nor was rescued
        apart = np.arctan2(moved[:, 0], moved[:, 1]) - places[:-1, 2]
        angles += np.degrees(np.abs((apart + np.pi) % (2 * np.pi) - np.pi))[drove].tolist()
        sideways += np.abs(np.diff(places[:, 1])[drove] / seconds[drove]).tolist()
        middles += (np.abs(places[:, 1]) / (places[:, 3] / 2)).tolist()
        speeds += trail[:, 4].tolist()
    names = ("speed", "from_middle", "sideways", "angle")
    return {name: float(np.mean(x)) for name, x in zip(names, (speeds, middles, sideways, angles), strict=True) if x}


def main(settings):
    torch.set_num_threads(1)
    points = {f"reward-{name}": ["--reward", name] for name in settings.rewards}
    points |= {f"actions-{name}": ["--actions", name] for name in settings.actions}
    table, maps = {}, {}
    start = ["--init-from", str(settings.init_from.resolve())] if settings.init_from else []
    if start and settings.actions:
        sys.exit("Weights fit no other action set: type --actions with nothing after it.")
    for name, options in (({"before": []} if start else {}) | points).items():
        run, last = settings.folder / "runs" / name, {}
        if options:
            options = ["--eval-interval", "0", *start, *options]
            learn("ppo_tuxkart", settings.folder, name, settings.track, settings.decisions, options)
            last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        checkpoint = ppo_tuxkart.load_checkpoint(run / "last.pt" if options else settings.init_from)
        races, geometry = race(settings, checkpoint, name)
        summary = ppo_tuxkart.summarize(races)
        kept = ("iteration", "charts/elapsed_seconds", "charts/finish_rate", "charts/return_lap_correlation")
        table[name] = summary | style(geometry, races) | {key: last[key] for key in kept if key in last}
        maps[name] = ppo_tuxkart.draw_map(geometry, races, 400)
        lap = f"{summary['median']:.2f} s" if summary["finished"] else f"{summary['progress']:.0%} of the lap"
        print(f"{name}: {summary['finished']} of {summary['races']} finished, {lap}", flush=True)

    columns = {
        "finished": ("finished", "{}"),
        "progress": ("of the lap", "{:.0%}"),
        "median": ("median lap", "{:.2f} s"),
        "speed": ("speed", "{:.1f} m/s"),
        "from_middle": ("from middle", "{:.0%}"),
        "sideways": ("sideways", "{:.1f} m/s"),
        "angle": ("angle", "{:.0f} deg"),
        "off_track_seconds": ("off the road", "{:.1f} s"),
    }
    rows = {name: {key: value for key, value in row.items() if value is not None} for name, row in table.items()}
    print(f"\n{settings.decisions} decisions each, {settings.races} greedy races")
    print_rows(columns, rows)
    if settings.picture:
        count = -(-len(maps) // 4)
        figure, axes = plt.subplots(count, 4, figsize=(10, 2.9 * count), layout="constrained", squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, (name, picture) in zip(axes.flat, maps.items(), strict=False):
            row, title = table[name], f"--{name.replace('-', ' ')}" if "-" in name else name
            lap = f"{row['median']:.1f} s" if row["finished"] else f"{row['progress']:.0%} of the lap"
            axis.imshow(picture)
            axis.set_title(f"{title}\n{row['finished']} of {row['races']}, {lap}", fontsize=9)
        figure.savefig(settings.picture, dpi=100, bbox_inches="tight")
    if settings.out:
        result = {"table": table, "settings": plain_settings(settings, ("folder", "picture", "out"))}
        settings.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(School, description=__doc__))
