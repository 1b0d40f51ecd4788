"""How much of the bare game the whole sampler delivers: python tests/bench/sampler.py

Bare: N processes that only call `race.step` and copy the picture (and `race.restart` where an episode ended). Sampler:
the same N games through the environment, the vectoriser and the network's inference. The work is the same: in every
round the sampler plays first, then the bare games repeat its actions, picture for picture from the start line, and
both end up in the same place, which is checked. One side waits while the other works. The table gives medians.
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
from processes import cpu_seconds, idle_seconds

import ppo_tuxkart


@dataclasses.dataclass
class Bench:
    num_envs: int = 16
    """game processes on each side"""
    steps: int = 128
    """steps per process and round"""
    rounds: int = 8
    """rounds of each side"""
    track: str = "scotland"
    """track to drive"""
    engine: str = "auto"
    """game bindings"""
    checkpoint: Path | None = None
    """network that drives (default: an untrained one, whose episodes are short)"""
    out: Path | None = None
    """JSON file to write"""


def bare_game(settings, seed, pipe):
    """One game that does nothing but step and copy the picture; it repeats (T, 4) actions, restarting at `dones`."""
    env = ppo_tuxkart.TuxKartEnv(track=settings.track, engine=settings.engine)
    env.reset(seed=seed)
    stk, race, step_size, clock = env._stk, env._race, env.step_size, 0.0
    pipe.send(None)
    while (order := pipe.recv()) is not None:
        for (steer, pedal, drift, nitro), done in zip(*order, strict=True):
            control = stk.Action()
            control.steer, control.acceleration, control.brake = steer / 2 - 1, float(pedal == 0), pedal == 2
            control.drift, control.nitro = bool(drift), bool(nitro)
            env._set_clock(int(1000 * clock))  # the scenery moves, as it does in a game left to itself
            race.config.step_size = step_size
            race.step(control)
            clock += step_size
            np.array(race.render_data[0].image)
            if done:
                race.restart()
                clock = 1 / 120
                race.config.step_size = 1 / 120  # the environment's first look at the new race
                race.step(stk.Action())
        env._world.update()
        pipe.send(env.location)


def main(settings):
    cpu = torch.device("cpu")
    args = ppo_tuxkart.Args(track=(settings.track,), engine=settings.engine, num_envs=settings.num_envs)
    args.num_steps, args.random_start = settings.steps, 0.0  # bare games know no other start than the line
    torch.manual_seed(0)
    torch.set_num_threads(1)
    agent = ppo_tuxkart.Agent((3 * args.frame_stack, args.height, args.width), (5, 3, 2, 2))
    if settings.checkpoint:
        checkpoint = ppo_tuxkart.load_checkpoint(settings.checkpoint)
        ppo_tuxkart.load_weights(agent, checkpoint, settings.checkpoint, ppo_tuxkart.describe_setting(args))
    context = multiprocessing.get_context("fork")
    pipes, bare_pids = [], []
    for seed in range(settings.num_envs):
        ours, theirs = context.Pipe()
        process = context.Process(target=bare_game, args=(settings, seed, theirs), daemon=True)
        process.start()
        bare_pids.append(process.pid)
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    sampler = ppo_tuxkart.Sampler(args, cpu)
    sampler.reset(0)

    sampler_pids = [process.pid for group in sampler.groups for process in group.processes]
    parties = {"bare game": bare_pids, "sampler's game": sampler_pids, "sampler's network": [os.getpid()]}
    rates, idle, off, episodes = {"bare": [], "sampler": []}, {"bare": 0.0, "sampler": 0.0}, [], 0
    for number in range(settings.rounds + 1):  # the first one warms up
        started, idle_before = time.perf_counter(), idle_seconds()
        episodes += len(sampler.collect(agent))
        between, idle_between = time.perf_counter(), idle_seconds()
        for i, pipe in enumerate(pipes):
            pipe.send((sampler.actions[:, i].tolist(), sampler.dones[:, i].tolist()))
        ends = [pipe.recv() for pipe in pipes]
        ended = time.perf_counter()
        places = [place for group in sampler.groups for place in group.get("location")]
        off.append(float(np.abs(np.array(places) - np.array(ends)).max()))
        if number == 0:
            used = {party: cpu_seconds(pids) for party, pids in parties.items()}
        else:
            rates["sampler"].append(settings.num_envs * settings.steps / (between - started))
            rates["bare"].append(settings.num_envs * settings.steps / (ended - between))
            idle["sampler"] += (idle_between - idle_before) / (between - started)
            idle["bare"] += (idle_seconds() - idle_between) / (ended - between)
    if max(off) > 1e-3:
        sys.exit(f"The bare games are {max(off):.3f} m from where the sampler's are: not the same work, so no figure.")

    scale = 1000 / (settings.num_envs * settings.steps * settings.rounds)
    result = {
        "bare": statistics.median(rates["bare"]),
        "sampler": statistics.median(rates["sampler"]),
        "ratio": statistics.median(s / b for s, b in zip(rates["sampler"], rates["bare"], strict=True)),
        "rates": rates,
        "episodes": episodes,
        "idle_share": {name: seconds / settings.rounds / os.cpu_count() for name, seconds in idle.items()},
        "cpu_ms_per_decision": {party: (cpu_seconds(pids) - used[party]) * scale for party, pids in parties.items()},
        "settings": {key: str(value) for key, value in dataclasses.asdict(settings).items()},
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "setting": ppo_tuxkart.describe_setting(args),
    }
    print(f"{settings.num_envs} games, {os.cpu_count()} cores, decisions/s, median of {settings.rounds} rounds")
    for name in ("bare", "sampler"):
        print(f"{name:8}{result[name]:7.0f}   {' '.join(f'{rate:.0f}' for rate in rates[name])}")
    print(f"ratio   {result['ratio']:7.3f}   median of the rounds' own ratios; {episodes} episodes ended")
    print("CPU ms/decision: " + ", ".join(f"{k} {v:.2f}" for k, v in result["cpu_ms_per_decision"].items()))
    print("idle: " + ", ".join(f"{name} {share:.1%}" for name, share in result["idle_share"].items()))
    for pipe in pipes:
        pipe.send(None)
    sampler.close()
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
