"""How much of the bare game the whole sampler delivers: python tests/bench/sampler.py

Bare: N processes that only call `race.step` and copy the picture (and `race.restart` where an episode ended). Sampler:
the same N games through the environment, the vectoriser and the network's inference. The work is the same: in every
round the sampler plays first, then the bare games repeat its actions, picture for picture from the start line, and
both end up in the same place, which is checked. In every other round they do so in lockstep, in the sampler's two
groups, each step upon a byte that says go: what a sampler could deliver whose environment and network cost nothing. One
side waits while the other works. The table gives medians.
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
    """rounds against free games, and as many against games in lockstep"""
    track: str = "scotland"
    """track to drive"""
    engine: str = "auto"
    """game bindings"""
    checkpoint: Path | None = None
    """network that drives (default: an untrained one, whose episodes are short)"""
    out: Path | None = None
    """JSON file to write"""


def bare_game(settings, seed, inbox, outbox):
    """One game that does nothing but step and copy the picture; it repeats (T, 4) actions, restarting at `dones`."""
    env = ppo_tuxkart.TuxKartEnv(track=settings.track, engine=settings.engine)
    env.reset(seed=seed)
    stk, race, step_size, clock = env._stk, env._race, env.step_size, 0.0
    outbox.send(None)
    while (order := inbox.recv()) is not None:
        lockstep, actions, dones = order
        for (steer, pedal, drift, nitro), done in zip(actions, dones, strict=True):
            if lockstep:
                inbox.recv_bytes()
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
            if lockstep:
                outbox.send_bytes(b"done")
        env._world.update()
        outbox.send(env.location)


def lead(groups, steps):
    """Has games in lockstep take so many steps, the groups in turns. groups: lists of pairs of pipes, to and from."""
    for t in range(steps + 1):
        for group in groups:
            for _, answers in group if t else ():
                answers.recv_bytes()
            for questions, _ in group if t < steps else ():
                questions.send_bytes(b"go")


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
        (inbox, questions), (answers, outbox) = context.Pipe(duplex=False), context.Pipe(duplex=False)
        process = context.Process(target=bare_game, args=(settings, seed, inbox, outbox), daemon=True)
        process.start()
        bare_pids.append(process.pid)
        pipes.append((questions, answers))
    for _, answers in pipes:
        answers.recv()
    sampler = ppo_tuxkart.Sampler(args, cpu)
    sampler.reset(0)

    sampler_pids = [process.pid for group in sampler.groups for process in group.processes]
    parties = {"bare game": bare_pids, "sampler's game": sampler_pids, "this process": [os.getpid()]}
    decisions, off, episodes = settings.num_envs * settings.steps, [], 0
    turns = {"sampler": [], "bare": [], "lockstep": []}

    def measure(side, work):
        cpu, idle, started = [cpu_seconds(pids) for pids in parties.values()], idle_seconds(), time.perf_counter()
        result, seconds = work(), time.perf_counter() - started
        turn = {"rate": decisions / seconds, "idle_share": (idle_seconds() - idle) / seconds / os.cpu_count()}
        spent = [cpu_seconds(pids) - before for pids, before in zip(parties.values(), cpu, strict=True)]
        turn |= {"cpu_ms": dict(zip(parties, (1000 * time / decisions for time in spent), strict=True))}
        turns[side].append(turn)
        return result

    def repeat(lockstep):
        for i, (questions, _) in enumerate(pipes):
            questions.send((lockstep, sampler.actions[:, i].tolist(), sampler.dones[:, i].tolist()))
        if lockstep:
            lead([pipes[columns] for columns in sampler.columns], settings.steps)
        return [answers.recv() for _, answers in pipes]

    for number in range(2 * settings.rounds + 2):
        side = "lockstep" if number % 2 else "bare"
        episodes += len(measure("sampler", lambda: sampler.collect(agent)))
        ends = measure(side, lambda: repeat(side == "lockstep"))  # noqa: B023  # called at once
        places = [place for group in sampler.groups for place in group.get("location")]
        off.append(float(np.abs(np.array(places) - np.array(ends)).max()))
    if max(off) > 1e-3:
        sys.exit(f"The bare games are {max(off):.3f} m from where the sampler's are: not the same work, so no figure.")

    beside = {"bare": turns["sampler"][::2], "lockstep": turns["sampler"][1::2]}
    turns = {side: these[2 if side == "sampler" else 1 :] for side, these in turns.items()}  # the first ones warmed up
    result = {
        "ratio": {
            side: statistics.median(s["rate"] / b["rate"] for s, b in zip(beside[side][1:], turns[side], strict=True))
            for side in beside
        },
        "median_rate": {side: statistics.median(turn["rate"] for turn in these) for side, these in turns.items()},
        "turns": turns,
        "episodes": episodes,
        "settings": {key: str(value) for key, value in dataclasses.asdict(settings).items()},
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "setting": ppo_tuxkart.describe_setting(args),
    }
    print(f"{settings.num_envs} games, {os.cpu_count()} cores; {episodes} episodes ended")
    print(f"{'':10}{'decisions/s':>12}{'idle':>8}   CPU ms/decision")
    for side, these in turns.items():
        spent = {party: statistics.mean(turn["cpu_ms"][party] for turn in these) for party in parties}
        text = ", ".join(f"{party} {ms:.2f}" for party, ms in spent.items() if ms > 0.05)
        idle = statistics.mean(turn["idle_share"] for turn in these)
        print(f"{side:10}{result['median_rate'][side]:12.0f}{idle:8.1%}   {text}")
    for side, ratio in result["ratio"].items():
        print(f"sampler / {side} {ratio:.3f}, median of the rounds' own ratios")
    for questions, _ in pipes:
        questions.send(None)
    sampler.close()
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
