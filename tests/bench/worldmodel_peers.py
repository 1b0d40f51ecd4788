"""World Models as ctallec/world-models trains them, against ours: python tests/bench/worldmodel_peers.py --out FILE

The same networks, the same footage and the same threads, in turns. Its way, after its utils/misc.py, trainvae.py,
trainmdrnn.py and data/loaders.py, written anew: rollouts in one process for each core, with Gymnasium's own
CarRacing-v3 and V (its decoder too), M and C for one frame at a time; V learns from a DataLoader that shrinks and
mirrors single pictures of 96 x 96, 32 to a minibatch; M learns from 16 sequences of 32 frames, which V encodes anew
each time. Its loaders get one process for each core here, instead of 2 and 8. Ours is the script's own code, with its
checkpoints; it draws every other frame, and encodes the footage once a round, which is not counted.
"""

import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from processes import plain_settings, print_rows

import worldmodel_carracing as wm

CORES = os.cpu_count() or 1
LARGE, LENGTH = 96, 32  # Gymnasium's pictures; M's sequences there


@dataclasses.dataclass
class Peers:
    seconds: float = 20.0
    """of each measurement"""
    turns: int = 3
    """times that each is measured; medians count"""
    pictures: int = 10_000
    """footage to learn from"""
    out: Path | None = None
    """JSON file to write"""


def large(picture):
    """A kept picture (64, 64, 3) in the size that Gymnasium draws."""
    return np.asarray(Image.fromarray(picture).resize((LARGE, LARGE)))


def as_floats(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float() / 255


class Pictures(torch.utils.data.Dataset):
    """Single pictures, shrunk and mirrored by PIL."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        picture = Image.fromarray(self.pictures[i]).resize((wm.SIZE, wm.SIZE), Image.Resampling.BILINEAR)
        flip = torch.rand(1).item() < 0.5
        return as_floats(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture)


class Sequences(Pictures):
    """Pictures, actions, rewards and ends of LENGTH frames, and the pictures one frame later."""

    def __init__(self, pictures, rows):
        super().__init__(pictures)
        self.rows = rows

    def __len__(self):
        return len(self.pictures) - LENGTH

    def __getitem__(self, i):
        pictures = self.pictures[i : i + LENGTH + 1].astype(np.float32).transpose(0, 3, 1, 2) / 255
        rows = self.rows[i : i + LENGTH]
        return pictures[:-1], pictures[1:], rows[:, :3], rows[:, 3], rows[:, 5]


def for_seconds(steps, seconds, warm=2):
    """What `steps` yields a second, added up over so many seconds, the first ones left out."""
    for count in itertools.islice(steps, warm):
        assert count
    total, started = 0, time.perf_counter()
    for count in steps:
        total += count
        if time.perf_counter() - started > seconds:
            break
    return total / (time.perf_counter() - started)


def forever(loader):
    while True:
        yield from loader


def whole(vision, pictures):
    """V called as a whole: mean, log variance, a sample, and the picture of it, which not everybody needs."""
    features = vision.encoder(pictures)
    mu, logvar = vision.mu(features), vision.logvar(features)
    z = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
    return mu, logvar, z, vision.decode(z)


def its_vision(vision, pictures):
    optimizer = torch.optim.Adam(vision.parameters())
    loader = torch.utils.data.DataLoader(Pictures(pictures), 32, shuffle=True, num_workers=CORES, drop_last=True)
    for batch in forever(loader):
        optimizer.zero_grad()
        mu, logvar, _, decoded = whole(vision, batch)
        kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()
        loss = F.mse_loss(decoded, batch, reduction="sum") + kl
        loss.backward()
        loss.item()
        optimizer.step()
        yield len(batch)


def its_memory(vision, memory, pictures, rows):
    optimizer = torch.optim.RMSprop([p for p in memory.parameters() if p.requires_grad], lr=1e-3, alpha=0.9)
    loader = torch.utils.data.DataLoader(Sequences(pictures, rows), 16, shuffle=True, num_workers=CORES, drop_last=True)

    @torch.no_grad()
    def latents(frames):
        frames = F.interpolate(frames.flatten(0, 1), size=wm.SIZE, mode="bilinear", align_corners=True)
        return whole(vision, frames)[2].unflatten(0, (16, LENGTH)).transpose(0, 1)

    for before, after, *columns in forever(loader):
        z, targets = latents(before), latents(after)
        actions, rewards, ends = (column.transpose(0, 1) for column in columns)
        log_pi, mu, log_sigma, reward, end = memory.foretell(memory(z, actions)[0])
        loss = wm.mixture_nll(targets, log_pi, mu, log_sigma).mean() + F.mse_loss(reward, rewards)
        loss = (loss + F.binary_cross_entropy_with_logits(end, ends)) / (wm.LATENTS + 2)
        optimizer.zero_grad()
        loss.backward()
        loss.item()
        optimizer.step()
        yield 16 * LENGTH


@torch.no_grad()
def its_rollouts(number, seconds):
    """Frames that one process drives in so many seconds, and what it took. Runs in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(number)
    agent, frames = wm.Agent("zh").to(memory_format=torch.contiguous_format), 0
    controller = 0.05 * torch.randn(1, 3, 289)
    env = gym.make("CarRacing-v3", max_episode_steps=200)  # as many as the other way's
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        (picture, _), state, over = env.reset(seed=1000 * number + frames), None, False
        hidden = torch.zeros(1, wm.HIDDEN)
        while not over:
            small = as_floats(Image.fromarray(picture).resize((wm.SIZE, wm.SIZE), Image.Resampling.BILINEAR))[None]
            mu = whole(agent.vision, small)[0]
            action = wm.squash(wm.wanted_actions(mu, hidden, controller))
            out, state = agent.memory(mu[None], action[None], state)
            agent.memory.foretell(out)
            hidden = out[0]
            picture, _, terminated, truncated, _ = env.step(action[0].numpy())
            frames, over = frames + 1, terminated or truncated
    return frames, time.perf_counter() - started


def our_rollouts(run, seconds):
    """Frames a second of the script's workers, in FastCarRacing, every action two frames long."""
    controllers, seeds = 0.05 * torch.randn(64, 3, 289), itertools.count(1_000_000)
    run.workers.load(run.agent)
    jobs = 4 * wm.SLOTS * len(run.workers.processes)

    def drives():
        while True:
            batch = [{"seed": next(seeds), "controller": i % 64, "limit": 200} for i in range(jobs)]
            yield sum(result["frames"] for result in run.workers.drive(controllers, batch))

    return for_seconds(drives(), seconds, 1)


def our_learning(run, stage, per_step, seconds, steps):
    """Samples a second of a whole stage of so many minibatches, and how many of them would fill the time."""
    setattr(run.args, f"{stage}_steps", steps)
    run.state["step"] = 0
    started = time.perf_counter()
    wm.STAGE_FUNCTIONS[stage](run, 1)
    run.bar.close()
    spent = time.perf_counter() - started
    return float(per_step * steps / spent), max(1, round(steps * seconds / spent))


def measure(settings, run, pool, steps):
    """One turn: each of three things, its way and ours."""
    figures, agent = {}, wm.Agent("zh").to(memory_format=torch.contiguous_format)
    pictures = np.stack([large(picture) for picture in run.footage.pictures[0]])
    rows = np.array(run.footage.rows[0])
    episodes = run.footage.episodes()[0]
    torch.set_num_threads(1)
    done = pool.starmap(its_rollouts, [(number, settings.seconds) for number in range(CORES)], chunksize=1)
    figures["rollout frames"] = sum(frames / spent for frames, spent in done), our_rollouts(run, settings.seconds)
    torch.set_num_threads(CORES)
    lengths = episodes[:, 1]
    seen = {"vision": run.args.vision_batch, "memory": run.args.memory_batch * (lengths**2).sum() / lengths.sum()}
    for stage, name, way in (
        ("vision", "V: pictures", functools.partial(its_vision, agent.vision, pictures)),
        ("memory", "M: frames", functools.partial(its_memory, agent.vision, agent.memory, pictures, rows)),
    ):
        its = for_seconds(way(), settings.seconds)
        ours, steps[stage] = our_learning(run, stage, seen[stage], settings.seconds, steps[stage])
        figures[name] = its, ours
    return figures


def main(settings):
    torch.manual_seed(0)
    turns, steps = [], {"vision": 20, "memory": 10}
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(CORES) as pool:
        args = wm.Args(collect_frames=settings.pictures)
        run = wm.Run(args, Path(folder), torch.device("cpu"), None)
        try:
            run.tqdm = functools.partial(run.tqdm.func, disable=True)
            run.open_logs()
            wm.STAGE_FUNCTIONS["collect"](run, 1)
            run.bar.close()
            run.state["step"] = 0
            wm.encode_footage(run, 1)  # made once a round, of which the figures below are a part
            for _ in range(settings.turns + 1):
                turns.append(measure(settings, run, pool, steps))
                print(turns[-1], flush=True)
        finally:
            run.logger.close()
            run.workers.close()
    turns = turns[1:]  # the first one found out how many minibatches fill the time
    table = {}
    for name in turns[0]:
        its, ours = (float(np.median([turn[name][way] for turn in turns])) for way in (0, 1))
        ratio = float(np.median([turn[name][1] / turn[name][0] for turn in turns]))
        table[name] = {"its": its, "ours": ours, "ratio": ratio}
    print_rows({"its": ("its way", "{:,.0f}/s"), "ours": ("ours", "{:,.0f}/s"), "ratio": ("ratio", "{:.1f}")}, table)
    if settings.out:
        result = {"table": table, "turns": turns, "settings": plain_settings(settings, ("out",))}
        settings.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Peers, description=__doc__))
