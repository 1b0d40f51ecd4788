"""FastCarRacing, EnvPool's CarRacing-v3 and Gymnasium's own, side by side.

    python tests/bench/carracing_worlds.py pretrained/carracing.pt

For each: frames a second on all cores, in turns; the return of the checkpoint's agent on its tracks (the
same tracks in FastCarRacing and Gymnasium; EnvPool draws others); and how well V, which learnt in FastCarRacing, paints
what the agent saw there. EnvPool is left out where it is not installed; its size on disk is told.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import worldmodel_carracing as wm  # noqa: E402

ENVPOOL = importlib.util.find_spec("envpool") is not None
CORES = os.cpu_count() or 1


def gentle_actions(seed):
    """Actions that change slowly and keep the car moving."""
    rng, noise = np.random.default_rng(seed), np.zeros(3)
    while True:
        noise = 0.95 * noise + 0.3 * rng.standard_normal(3)
        yield np.clip(noise * (0.7, 0.5, 0.4) + (0, 0.35, -0.4), (-1, 0, 0), 1).astype(np.float32)


def step_alone(job):
    """Frames a second of one environment in one process; as in learning, FastCarRacing draws every other one."""
    world, seconds, seed = job
    env, actions = wm.ENVIRONMENTS[world](), gentle_actions(seed)
    env.reset(seed=seed)
    frames, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        action = next(actions)
        for blind in (True, False):
            env.blind = blind
            frames += 1
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset(seed=seed)
                break
    return frames / (time.perf_counter() - started)


def make_envpool(seeds, threads):
    import envpool

    return envpool.make("CarRacing-v3", "gymnasium", num_envs=len(seeds), seed=list(seeds), num_threads=threads)


def step_envpool(seconds, seed):
    """Frames a second of 8 environments on all cores, each of them drawn: EnvPool has no frame skip."""
    env, actions = make_envpool(range(seed, seed + 8), CORES), [gentle_actions(seed + i) for i in range(8)]
    env.reset()
    frames, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        env.step(np.stack([next(own) for own in actions]))
        frames += 8
    return frames / (time.perf_counter() - started)


@torch.no_grad()
def drive_envpool(agent, seeds):
    """Returns of the agent on EnvPool's tracks, and every 20th picture that it saw, uint8 (N, 64, 64, 3)."""
    env, count, pictures = make_envpool(seeds, CORES), len(seeds), []
    obs, _ = env.reset()
    state = tuple(torch.zeros(1, count, wm.HIDDEN) for _ in range(2))
    returns, alive = np.zeros(count), np.ones(count, bool)
    for t in itertools.count():
        seen = np.stack([wm.shrink(picture) for picture in obs])
        if t % 20 == 0:
            pictures.append(seen[alive])
        z = agent.vision.encode(torch.from_numpy(seen))[0]
        action = wm.squash(wm.wanted_actions(z, state[0][0], agent.controller.expand(count, -1, -1)))
        for _ in range(agent.repeat):
            obs, reward, terminated, truncated, _ = env.step(action.numpy().clip((-1, 0, 0), 1).astype(np.float32))
            returns += reward * alive
            alive &= ~(terminated | truncated)
        if not alive.any():
            return returns, np.concatenate(pictures)
        _, state = agent.memory(z[None], action[None], state)


@torch.no_grad()
def painting_error(agent, pictures):
    """V's squared error of a picture, summed over its pixels, as in its loss."""
    errors = []
    for part in torch.from_numpy(pictures).split(100):
        errors += (
            (agent.vision.decode(agent.vision.encode(part)[0]) - wm.to_floats(part)).square().sum((1, 2, 3)).tolist()
        )
    return statistics.mean(errors)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--episodes", type=int, default=100, help="tracks in each world")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the first track")
    parser.add_argument("--seconds", type=float, default=10, help="time for each measurement of speed")
    parser.add_argument("--turns", type=int, default=3, help="times that each is measured; the median counts")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    checkpoint = wm.load_checkpoint(args.checkpoint)
    settings = wm.Args(**checkpoint["args"])
    agent = wm.Agent(settings.controller_input, settings.action_repeat, settings.sample_z)
    wm.load_weights(agent, checkpoint, args.checkpoint)
    seeds = list(range(args.seed, args.seed + args.episodes))
    result = {name: {"frames_per_second": []} for name in ("fast", "gymnasium", *(["envpool"] if ENVPOOL else []))}

    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        for turn in range(args.turns + 1):  # the first one warms up
            for world in result:
                if world == "envpool":
                    speed = step_envpool(args.seconds, 100 * turn)
                else:
                    speed = sum(pool.map(step_alone, [(world, args.seconds, 100 * turn + i) for i in range(CORES)]))
                result[world]["frames_per_second"] += [speed] if turn else []

    workers = wm.Workers(CORES)
    workers.load(agent)
    for world in ("fast", "gymnasium"):
        jobs = [{"seed": seed, "controller": 0, "limit": 1000, "keep": True} for seed in seeds]
        rollouts = workers.drive(agent.controller[None], jobs, world)
        result[world] |= wm.summarize(rollouts)
        result[world]["painting_error"] = painting_error(
            agent, np.concatenate([one["pictures"][::20] for one in rollouts])
        )
    workers.close()
    if ENVPOOL:
        returns, pictures = drive_envpool(agent, seeds)
        result["envpool"] |= {
            "returns": returns.tolist(),
            "mean": float(returns.mean()),
            "std": float(returns.std(ddof=1)),
        }
        result["envpool"]["painting_error"] = painting_error(agent, pictures)
        packages = [one for one in importlib.metadata.distributions() if one.metadata["Name"].startswith("envpool")]
        sizes = [
            file.locate().stat().st_size for one in packages for file in one.files or () if file.locate().is_file()
        ]
        result["envpool"]["installed_megabytes"] = sum(sizes) / 1e6
        result["envpool"]["version"] = importlib.metadata.version("envpool")

    print(f"{CORES} cores; {len(seeds)} tracks\n{'world':12}{'frames/s':>10}{'return':>18}{'V paints it within':>22}")
    for world, of in result.items():
        speed = statistics.median(of["frames_per_second"])
        print(f"{world:12}{speed:10.0f}{of['mean']:10.1f} +- {of['std']:<6.1f}{of['painting_error']:19.1f}")
    if ENVPOOL:
        print(f"EnvPool {result['envpool']['version']} takes {result['envpool']['installed_megabytes']:.0f} MB")
    if args.json:
        versions = {name: importlib.metadata.version(name) for name in ("gymnasium", "torch", "box2d", "pygame-ce")}
        args.json.write_text(
            json.dumps(result | {"seeds": seeds, "versions": versions, "cores": CORES}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
