"""How much of the bare game the whole sampler delivers: python tests/bench/sampler.py

Bare: N processes that only call `race.step` and copy the picture. Sampler: the same N games through the environment,
AsyncVectorEnv and the network's inference. Both are set up at once and run in turn, `--rounds` times, in one call;
the table gives medians. Only one side's processes work at a time; the other's wait.
"""

import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import tyro

import ppo_tuxkart


@dataclasses.dataclass
class Bench:
    num_envs: int = 16
    """game processes on each side"""
    steps: int = 128
    """steps per process and round"""
    rounds: int = 5
    """rounds of each side"""
    track: str = "scotland"
    """track to drive"""
    engine: str = "auto"
    """game bindings"""
    checkpoint: Path | None = None
    """network that drives (default: an untrained one, whose episodes are short)"""
    out: Path | None = None
    """JSON file to write"""


def bare_game(settings, orders, done):
    """One game that does nothing but step and copy the picture, `steps` times whenever it is told to."""
    env = ppo_tuxkart.TuxKartEnv(track=settings.track, engine=settings.engine)
    env.reset(seed=0)
    env._race.config.step_size = env.step_size
    control = env._stk.Action()
    control.acceleration = 1.0
    done.send(None)
    generator = np.random.default_rng(os.getpid())
    while orders.recv():
        for step in range(settings.steps):
            control.steer = float(generator.choice(ppo_tuxkart.STEER))
            env._race.step(control)
            np.array(env._race.render_data[0].image)
            if step % 64 == 63:  # an untrained agent's episodes are about that long, too
                env._race.restart()
        done.send(None)


def main(settings):
    context = multiprocessing.get_context("fork")
    pipes = []
    for _ in range(settings.num_envs):
        (orders_out, orders_in), (done_out, done_in) = context.Pipe(False), context.Pipe(False)
        context.Process(target=bare_game, args=(settings, orders_out, done_in), daemon=True).start()
        pipes.append((orders_in, done_out))
    for _, done in pipes:
        done.recv()
    args = ppo_tuxkart.Args(track=(settings.track,), engine=settings.engine, num_envs=settings.num_envs)
    args.num_steps = settings.steps
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sampler = ppo_tuxkart.Sampler(args, torch.device("cpu"))
    agent = ppo_tuxkart.Agent(sampler.observation_shape, sampler.nvec)
    if settings.checkpoint:
        agent = ppo_tuxkart.agent_from(ppo_tuxkart.load_checkpoint(settings.checkpoint), torch.device("cpu"))
    sampler.reset(0)
    sampler.collect(agent)

    rates = {"bare": [], "sampler": []}
    for _ in range(settings.rounds):
        started = time.perf_counter()
        for orders, _ in pipes:
            orders.send(True)
        for _, done in pipes:
            done.recv()
        rates["bare"].append(settings.num_envs * settings.steps / (time.perf_counter() - started))
        started = time.perf_counter()
        sampler.collect(agent)
        rates["sampler"].append(settings.num_envs * settings.steps / (time.perf_counter() - started))
    for orders, _ in pipes:
        orders.send(False)
    sampler.close()

    result = {
        "bare": statistics.median(rates["bare"]),
        "sampler": statistics.median(rates["sampler"]),
        "ratio": statistics.median(s / b for s, b in zip(rates["sampler"], rates["bare"], strict=True)),
        "rates": rates,
        "settings": {key: str(value) for key, value in dataclasses.asdict(settings).items()},
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "setting": ppo_tuxkart.describe_setting(args),
    }
    print(f"{settings.num_envs} games, {os.cpu_count()} cores, decisions/s, median of {settings.rounds} rounds")
    print(f"bare    {result['bare']:7.0f}   {' '.join(f'{rate:.0f}' for rate in rates['bare'])}")
    print(f"sampler {result['sampler']:7.0f}   {' '.join(f'{rate:.0f}' for rate in rates['sampler'])}")
    print(f"ratio   {result['ratio']:7.3f}   median of the rounds' own ratios")
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
