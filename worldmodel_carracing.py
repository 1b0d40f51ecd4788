"""World Models learns to drive Gymnasium's CarRacing-v3 from pixels.

Ha & Schmidhuber 2018 (https://arxiv.org/abs/1803.10122): a variational autoencoder sees (V), a recurrent network with a
mixture density output remembers and foretells (M), and a linear controller of 867 weights drives (C), found by CMA-ES
(Hansen 2016, https://arxiv.org/abs/1604.00772), in M's dream first and then on the real tracks.

    python worldmodel_carracing.py                               # all of it, from nothing; lands in runs/<name>/
    python worldmodel_carracing.py --quick                       # the same in minutes, to see every part work
    python worldmodel_carracing.py --resume runs/<name>          # go on as if never stopped
    python worldmodel_carracing.py --evaluate runs/<name>/best.pt
    python worldmodel_carracing.py --dream runs/<name>/best.pt   # a film of the dream beside reality
    torchrun --standalone --nproc-per-node 4 worldmodel_carracing.py --name big   # over many cores or machines
    tensorboard --logdir runs                                    # watch it

Pictures are drawn by FastCarRacing, over Gymnasium's own tracks and physics; scores are played in Gymnasium's own
CarRacing-v3, untouched.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import functools
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads would spin on the cores the games need
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import gymnasium as gym
import numpy as np
import pygame
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from gymnasium.envs.box2d import car_dynamics, car_racing
from PIL import Image, ImageDraw
from torch import Tensor, nn

STAGES: Final = ("collect", "vision", "memory", "controller", "evaluate")


@dataclasses.dataclass
class Args:
    """World Models that drive CarRacing-v3 from pixels. No flag is needed."""

    seed: int = 1  # seed of the networks, the minibatches, the driving, the search and its tracks
    name: str | None = None  # the run's folder under runs/ (default: seed and time)
    resume: Path | None = None  # run folder to go on with as if never stopped; its settings are kept
    init_from: Path | None = None  # checkpoint to take V, M and C from, and nothing else
    evaluate: Path | None = None  # checkpoint to drive in Gymnasium's own CarRacing-v3; no learning
    dream: Path | None = None  # checkpoint to film dreaming beside reality; no learning
    quick: bool = False  # settings for a run of minutes, where you type no others
    stages: tuple[Literal["collect", "vision", "memory", "controller", "evaluate"], ...] = STAGES  # stages to run now
    rounds: int = 4  # times through the stages; from the second on, V and M see the controller's own driving
    eval_episodes: int = 100  # tracks per evaluation
    eval_seed: int = 1000  # seed of the first evaluation track; the others follow
    eval_fast: bool = False  # evaluate in FastCarRacing as well, on the same tracks
    eval_interval: int = 10  # generations between the mean controller's validations, on tracks kept for that
    workers: int | None = None  # driving processes (default: one for each core)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where V and M learn and dream; auto takes the GPU if there is one

    # collect, V and M
    action_repeat: int = 2  # frames that every action lasts, in learning and in scores alike
    collect_frames: int = 100_000  # pictures to collect in a round, one for each action
    vision_steps: int = 3000  # minibatches of V in the first round; in round r it takes 1/r of them
    vision_batch: int = 100  # pictures of V's minibatch
    vision_lr: float = 5e-4  # Adam's step size for V at the start of a round; it falls linearly to a tenth
    memory_steps: int = 1500  # minibatches of M in the first round, as with V; 0 leaves M untrained
    memory_batch: int = 16  # episodes of M's minibatch
    memory_lr: float = 1e-3  # Adam's step size for M at the start of a round; it falls linearly to a tenth

    # C
    controller_input: Literal["zh", "z"] = "zh"  # what C sees: V's latents and M's hidden state, or the latents alone
    sample_z: bool = False  # C and M see a sample of V's latents instead of their mean
    population: int = 128  # candidates of a generation
    tracks: int = 4  # tracks that every candidate of a generation drives, the same for all
    generations: int = 1000  # generations on real tracks, at most; all of them in the last round
    hours: float = 7.4  # of learning, all calls together, after which the search rests; resume with more to go on
    sigma: float = 0.1  # CMA-ES's step size at the start; half of it in the later rounds
    max_frames: int = 1000  # frames after which a rollout ends
    validation_tracks: int = 64  # tracks that score the mean controller and choose best.pt
    dream_generations: int = 100  # generations in the dream, in every round, at most
    dream_starts: int = 8  # places from which every candidate dreams
    dream_steps: int = 150  # actions of a dream
    temperature: float = 1.15  # of the dream: above 1, the next latents are less certain than M believes
    dream_dropout: float = 0.1  # share of M's hidden state dropped before it foretells, so that C cannot exploit it


QUICK: dict[str, Any] = {"rounds": 2, "collect_frames": 8_000, "vision_steps": 300, "vision_lr": 1e-3}
QUICK |= {"memory_steps": 300, "population": 32, "generations": 15, "validation_tracks": 16}
QUICK |= {"dream_generations": 10, "dream_steps": 100, "eval_interval": 5, "eval_episodes": 8}


class UsageError(Exception):
    """What the user typed, or what the machine lacks; the message is one sentence that says what to type next."""


class Fault(Exception):
    """What ended a run though nothing was typed wrong; one sentence that says what happened and how to go on."""


# ---------------------------------------------------------------------------------------------------------------------
# Ranks: under torchrun this script runs several times, and the copies share the work. Only rank 0 writes and speaks.

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
CORES = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # for each rank


def gather(value: Any) -> list:
    """The values of all ranks, in their order; it also waits for all of them."""
    values = [value] * RANKS
    if RANKS > 1:
        dist.all_gather_object(values, value)
    return values


def join_ranks(device: torch.device) -> None:
    """Meets torchrun's other ranks. Each restart under keys of its own: else it finds the addresses of the dead."""
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = datetime.timedelta(days=1)  # while the first rank drives alone; torchrun sees who has died
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


# ---------------------------------------------------------------------------------------------------------------------
# The environment: Gymnasium's physics and tracks, drawn straight at the size that V sees

SIZE = 64  # pixels of V's picture
ROWS = 84  # rows of Gymnasium's 96 x 96 picture above its indicators
DRAWN = 3 * SIZE  # pictures are drawn at three times the size and shrunk, which smooths their edges
WINDOW_WIDTH, WINDOW_HEIGHT = car_racing.WINDOW_W, car_racing.WINDOW_H * ROWS / car_racing.STATE_H  # what V sees of it
MAP = 2048  # pixels of a track's map, about as fine as what is drawn of it
BLACK, LAWN, SQUARES, ROAD, HULL_RED, MARK = 0, 1, 2, 3, 8, 9  # in PALETTE; new road has three shades, kerbs have two
COLOURS = [(0, 0, 0), (102, 204, 102), (102, 230, 102), (102, 102, 102), (104, 104, 104), (107, 107, 107)]
COLOURS += [(255, 255, 255), (255, 0, 0), (204, 0, 0), (77, 77, 77)]
INK: dict[tuple[int, ...], int] = {colour: index for index, colour in enumerate(COLOURS)}
PALETTE = (np.array(COLOURS) - 2).clip(0)  # Gymnasium's picture is shrunk by pygame, which takes 2 levels
SLIM = 0.7 * car_dynamics.SIZE  # a drawn polygon includes its border, which would make a small one fat
WHEEL_X, WHEEL_Y = SLIM * car_dynamics.WHEEL_W, SLIM * car_dynamics.WHEEL_R
WHEEL = [(-WHEEL_X, WHEEL_Y), (WHEEL_X, WHEEL_Y), (WHEEL_X, -WHEEL_Y), (-WHEEL_X, -WHEEL_Y)]
HULL_PARTS = (car_dynamics.HULL_POLY1, car_dynamics.HULL_POLY2, car_dynamics.HULL_POLY3, car_dynamics.HULL_POLY4)
HULL = [(np.array(polygon) * car_dynamics.SIZE * 0.9).tolist() for polygon in HULL_PARTS]


def area_weights(many: int, few: int) -> Tensor:
    """Matrix (few, many) that shrinks a line of pixels by averaging areas."""
    edges, cells = np.linspace(0, many, few + 1), np.arange(many)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return torch.from_numpy((overlap.clip(0) * few / many).astype(np.float32))


SHRINK_ROWS, SHRINK_COLUMNS = area_weights(ROWS, SIZE), area_weights(car_racing.STATE_W, SIZE)


def shrink(picture: np.ndarray) -> np.ndarray:
    """Gymnasium's picture, uint8 (96, 96, 3), as V sees it: without the indicators, uint8 (64, 64, 3)."""
    lines = SHRINK_ROWS @ torch.from_numpy(picture[:ROWS]).float().flatten(1)  # numpy's would use all cores for this
    return (SHRINK_COLUMNS @ lines.view(SIZE, -1, 3)).round().byte().numpy()


def on_map(polygon: Sequence | np.ndarray) -> list[float]:
    """Metres of the world as pixels of the map: a list of numbers, as Pillow takes it."""
    return ((np.asarray(polygon) + car_racing.PLAYFIELD) * (MAP / 2 / car_racing.PLAYFIELD)).ravel().tolist()


@functools.cache
def empty_map() -> Image.Image:
    """The lawn and its lighter squares, on which every track is drawn."""
    picture, side = Image.new("P", (MAP, MAP), LAWN), car_racing.GRASS_DIM
    picture.putpalette(PALETTE.astype(np.uint8).tobytes())
    for x, y in itertools.product(range(-20, 20, 2), repeat=2):
        corners = side * np.array([(x + 1, y), (x, y), (x, y + 1), (x + 1, y + 1)])
        ImageDraw.Draw(picture).polygon(on_map(corners), SQUARES)
    return picture


class FastCarRacing(car_racing.CarRacing):
    """Gymnasium's CarRacing, whose observation is drawn at once as V sees it: uint8 (64, 64, 3).

    Tracks, physics, rewards and ends are Gymnasium's own code; only the picture is taken anew, many times faster, from
    a map drawn once a track, and within a mean of 1 level of 255 of `shrink` of Gymnasium's (tests/test_worldmodel.py).
    `reset(options={"place": x})` starts at the share x of the track instead of on the start line. While `blind` is set,
    nothing is drawn: nobody sees the frames between two actions.
    """

    blind = False
    car: Any  # Gymnasium hints that it and the road may be None, as they are before the first reset
    road: Any

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self._place = 0.0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self._place, self.blind = (options or {}).get("place", 0.0), False
        return super().reset(seed=seed, options=options)

    def _create_track(self) -> bool:
        if not super()._create_track():
            return False
        self._map = empty_map().copy()
        self._pen, self._untouched = ImageDraw.Draw(self._map), self.road
        for polygon, colour in self.road_poly:
            self._pen.polygon(on_map(polygon), INK[tuple(int(level) for level in colour)])
        start = int(self._place * len(self.track))
        self.track = self.track[start:] + self.track[:start]
        return True

    def _render(self, mode: str) -> np.ndarray | None:
        if mode != "state_pixels":
            return super()._render(mode)
        if self.blind:
            return None
        if len(self.road) - len(self._untouched) < self.tile_visited_count:  # a tile that the car touched is darker
            for tile in self._untouched:
                if tile.road_visited:
                    self._pen.polygon(on_map(tile.fixtures[0].shape.vertices), ROAD)
            self._untouched = [tile for tile in self._untouched if not tile.road_visited]
        zoom = 0.1 * car_racing.SCALE * max(1 - self.t, 0) + car_racing.ZOOM * car_racing.SCALE * min(self.t, 1)
        (x, y), angle = self.car.hull.position, self.car.hull.angle
        cos, sin = math.cos(angle), math.sin(angle)
        right, up = zoom * DRAWN / WINDOW_WIDTH, zoom * DRAWN / WINDOW_HEIGHT  # pixels a metre; the car's nose is up
        across, along, pixels = DRAWN / 2, DRAWN * (1 - 100 / WINDOW_HEIGHT), MAP / 2 / car_racing.PLAYFIELD
        a, b, d, e = pixels * cos / right, pixels * sin / up, pixels * sin / right, -pixels * cos / up
        (left, low), shift = on_map((x, y)), (a * across + b * along, d * across + e * along)
        view = (a, b, left - shift[0], d, e, low - shift[1])  # of a picture's pixels to the map's
        picture = self._map.transform((DRAWN, DRAWN), Image.Transform.AFFINE, view, fillcolor=BLACK)
        pen = ImageDraw.Draw(picture)

        def draw(corners: list, colour: int) -> None:  # metres from the car's middle
            pen.polygon([(across + u * right, along - v * up) for u, v in corners], colour)

        for wheel in self.car.wheels:
            dx, dy, turn = wheel.position[0] - x, wheel.position[1] - y, wheel.angle - angle
            u, v, c, s = cos * dx + sin * dy, cos * dy - sin * dx, math.cos(turn), math.sin(turn)
            draw([(u + i * c - j * s, v + i * s + j * c) for i, j in WHEEL], BLACK)
            phases = wheel.phase, wheel.phase + 1.2
            if any(math.sin(phase) <= 0 for phase in phases):  # the white mark is on the upper side
                ends = [math.cos(p) if math.sin(p) <= 0 else math.copysign(1, math.cos(p)) for p in phases]
                mark = [(i, WHEEL_Y * ends[k // 2]) for k, (i, _) in enumerate(WHEEL)]
                draw([(u + i * c - j * s, v + i * s + j * c) for i, j in mark], MARK)
        for polygon in HULL:
            draw(polygon, HULL_RED)
        return np.array(picture.convert("RGB").reduce(3))


class GymnasiumCarRacing(gym.ObservationWrapper):
    """Gymnasium's own CarRacing-v3, untouched, with its time limit; only its picture is shrunk for V, and only where
    somebody sees it."""

    blind = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(gym.make("CarRacing-v3", **settings))
        self.observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)

    def reset(self, **settings: Any) -> tuple[np.ndarray, dict]:
        self.blind = False
        return super().reset(**settings)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation if self.blind else shrink(observation)


# ---------------------------------------------------------------------------------------------------------------------
# V, M and C

LATENTS, HIDDEN, MIXTURES = 32, 256, 5
KL_FLOOR = 0.5 * LATENTS  # nats of a picture; less information than this is not rewarded
LOG_SIGMA = (-5.0, 2.0)  # range of a mixture component's log standard deviation


class Vision(nn.Module):
    """V, the paper's convolutional variational autoencoder (appendix A.1): 4,348,547 parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers, sizes = [], (3, 32, 64, 128, 256)
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Conv2d(before, after, 4, 2), nn.ReLU()]
        self.encoder = nn.Sequential(*layers, nn.Flatten())  # 64 -> 31 -> 14 -> 6 -> 2
        self.mu, self.logvar = nn.Linear(1024, LATENTS), nn.Linear(1024, LATENTS)
        self.widen = nn.Linear(LATENTS, 1024)
        layers, sizes = [], (1024, 128, 64, 32, 3)
        for before, after, kernel in zip(sizes[:-1], sizes[1:], (5, 5, 6, 6), strict=True):
            layers += [nn.ConvTranspose2d(before, after, kernel, 2), nn.ReLU()]
        self.decoder = nn.Sequential(*layers[:-1], nn.Sigmoid())  # 1 -> 5 -> 13 -> 30 -> 64
        # the encoder is a third faster so
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's hints lack it

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, both (N, 32), of pictures uint8 (N, 64, 64, 3)."""
        features = self.encoder(to_floats(pictures))
        return self.mu(features), self.logvar(features)

    def decode(self, z: Tensor) -> Tensor:
        """Pictures float (N, 3, 64, 64) in [0, 1] of latents (N, 32)."""
        return self.decoder(self.widen(z)[:, :, None, None])


def to_floats(pictures: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) as float (N, 3, H, W) in [0, 1]; the memory stays as it is, which is channels_last."""
    return pictures.permute(0, 3, 1, 2).float() / 255


def to_pictures(decoded: Tensor) -> np.ndarray:
    """float (N, 3, H, W) in [0, 1] as uint8 numpy (N, H, W, 3)."""
    return (decoded.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()


def vision_loss(decoded: Tensor, pictures: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Summed squared error plus the KL divergence to a unit Gaussian with a floor (Kingma & Welling 2014, appendix B).

    decoded, pictures: (N, 3, H, W) in [0, 1]; mu, logvar: (N, 32). Returns loss, squared error and KL, means over N.
    """
    error = (decoded - pictures).square().sum((1, 2, 3))
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)
    return (error + kl.clamp(min=KL_FLOOR)).mean(), error.mean(), kl.mean()


class Memory(nn.Module):
    """M, the paper's LSTM with a mixture density output: 422,368 parameters, and a head for reward and end added."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(LATENTS + 3, HIDDEN)
        self.lstm.get_parameter("bias_hh_l0").requires_grad_(False).zero_()  # the paper's LSTM has one bias, not two
        self.mixture = nn.Linear(HIDDEN, 3 * MIXTURES * LATENTS)
        self.outcome = nn.Linear(HIDDEN, 2)

    def forward(self, z: Tensor, actions: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """z: (T, N, 32); actions: (T, N, 3); state: a pair of (1, N, 256). Returns the hidden states (T, N, 256) that
        have seen them, and the state after the last."""
        return self.lstm(torch.cat([z, actions], -1), state)

    def foretell(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Log weights, means and log standard deviations (..., 32, 5) of the next latents; reward and logit of the
        episode's end (...)."""
        mixture = self.mixture(hidden).unflatten(-1, (3, LATENTS, MIXTURES))
        logits, mu, log_sigma = mixture.unbind(-3)
        reward, end = self.outcome(hidden).unbind(-1)
        return logits.log_softmax(-1), mu, log_sigma.clamp(*LOG_SIGMA), reward, end


def mixture_nll(z: Tensor, log_pi: Tensor, mu: Tensor, log_sigma: Tensor) -> Tensor:
    """Negative log likelihood of latents under a mixture of Gaussians for each of them (Bishop 1994, eq. 29).

    z: (..., 32); the others (..., 32, 5). Returns (...), in nats, summed over the 32.
    """
    error = (z[..., None] - mu) * torch.exp(-log_sigma)
    log_prob = -0.5 * error.square() - log_sigma - 0.5 * math.log(2 * math.pi)
    return -torch.logsumexp(log_pi + log_prob, -1).sum(-1)


def memory_loss(
    memory: Memory, z: Tensor, targets: Tensor, actions: Tensor, rewards: Tensor, ends: Tensor, lengths: Tensor,
    of: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """M's loss over episodes padded to the longest. z, targets: (T, N, 32), two samples of the same latents; actions:
    (T, N, 3); rewards, ends: (T, N); lengths: (N,). Returns loss and its parts, means over the real frames of the
    episodes of lengths `of` (default: these), so that the losses of a minibatch's shares add up to its own.

    Frame t foretells the latents of t + 1, so an episode's last frame has reward and end to foretell but no latents.
    """
    frames, of = torch.arange(len(z), device=z.device)[:, None], lengths if of is None else of
    real, followed = frames < lengths, frames < lengths - 1
    log_pi, mu, log_sigma, reward, end = memory.foretell(memory(z, actions)[0])
    nll = mixture_nll(targets[1:], log_pi[:-1], mu[:-1], log_sigma[:-1])[followed[:-1]].sum()
    nll = nll / (of - 1).sum() / LATENTS
    reward_error = (reward - rewards)[real].square().sum() / of.sum()
    end_error = F.binary_cross_entropy_with_logits(end[real], ends[real], reduction="sum") / of.sum()
    return nll + reward_error + end_error, nll, reward_error, end_error


class Agent(nn.Module):
    """V, M and C together, and how they drive: the frames that an action lasts, and whether a sample of V's latents is
    seen or their mean. C is linear: (3, 289) for its 288 inputs and a bias, or (3, 33) where it sees z alone."""

    controller: Tensor

    def __init__(self, controller_input: str, repeat: int = 2, sample_z: bool = False) -> None:
        super().__init__()
        self.controller_input, self.repeat, self.sample_z = controller_input, repeat, sample_z
        self.vision, self.memory = Vision(), Memory()
        inputs = LATENTS + (HIDDEN if controller_input == "zh" else 0)
        self.register_buffer("controller", torch.zeros(3, inputs + 1))


def wanted_actions(z: Tensor, hidden: Tensor, controllers: Tensor) -> Tensor:
    """What C asks for, before it is squashed. z: (N, 32); hidden: (N, 256); controllers: (N, 3, I). Returns (N, 3)."""
    inputs = torch.cat([z, hidden], -1)[:, : controllers.shape[-1] - 1]
    return (controllers[..., :-1] @ inputs[..., None])[..., 0] + controllers[..., -1]


def squash(wanted: Tensor) -> Tensor:
    """CarRacing's actions (..., 3) of C's: tanh, then steering as it is, gas from [-1, 1], brake from [0, 1]."""
    steer, gas, brake = wanted.tanh().unbind(-1)
    return torch.stack([steer, (gas + 1) / 2, brake.clamp(0, 1)], -1)


# ---------------------------------------------------------------------------------------------------------------------
# Driving: batches of environments in every worker process

SLOTS = 16  # environments of a worker, seen by V in one batch
PATIENCE, GRACE = 20, 50  # frames without a reward after which a training rollout is hopeless; not asked before GRACE


def drive(
    envs: list, agent: Agent, controllers: Tensor, next_job: Callable, on_step: Callable = lambda frames: None,
    on_result: Callable = lambda result: None,
) -> list[dict]:  # fmt: skip
    """Plays jobs, several at a time: a slot takes the next job as soon as its episode ends.

    controllers: (P, 3, I). `next_job` returns a dict or None when there are no more; its keys are `index`, `seed` (of
    the track), `controller` (row of `controllers`, or None for random driving), `limit` (frames), and optionally
    `place` (where to start), `noise` (seed, kind), `abort` (end hopeless rollouts) and `keep` (return the frames).
    Returns a list of dicts with index, return, frames and finished, and what was kept, a row for each action.

    V and M always see SLOTS rows, also where fewer drive: their last bits depend on how many there are, a long rollout
    makes a different one of that, and a job's result must not depend on what is driven beside it.

    An aborted rollout is charged 0.1 for every frame that it did not drive, as if it had stood still until the limit.
    Without that, giving up early would pay. A car that would have found back to the road is still scored too low.
    """
    slots: list[Any] = [None] * len(envs)
    results: list[dict] = []
    more = True
    obs = np.zeros((SLOTS, SIZE, SIZE, 3), np.uint8)
    state = (torch.zeros(1, SLOTS, HIDDEN), torch.zeros(1, SLOTS, HIDDEN))
    weights = torch.zeros(SLOTS, *controllers.shape[1:])
    z, actions = torch.zeros(SLOTS, LATENTS), torch.zeros(SLOTS, 3)
    chosen = actions.numpy()  # the same memory
    while True:
        for i in range(len(envs)):
            if slots[i] is None and more:
                job = next_job()
                if job is None:
                    more = False
                    break
                obs[i] = envs[i].reset(seed=job["seed"], options={"place": job.get("place", 0.0)})[0]
                for part in state:
                    part[0, i] = 0
                weights[i] = controllers[job["controller"] or 0]
                rng = np.random.default_rng([job["seed"], *job.get("noise", ())])
                slots[i] = {"job": job, "rng": rng, "return": 0.0, "frames": 0, "idle": 0, "noise": np.zeros(3)}
                slots[i]["kept"] = []
        busy = [i for i in range(len(envs)) if slots[i]]
        if not busy:
            return results
        on_step(len(busy) * agent.repeat)
        if any(slots[i]["job"]["controller"] is not None for i in busy):
            z, logvar = agent.vision.encode(torch.from_numpy(obs))
            for i in busy if agent.sample_z else ():
                noise = slots[i]["rng"].standard_normal(LATENTS, np.float32)
                z[i] += torch.exp(logvar[i] / 2) * torch.from_numpy(noise)
            wanted = wanted_actions(z, state[0][0], weights)
            actions[:] = squash(wanted)
        for i in busy:
            slot = slots[i]
            job = slot["job"]
            if job["controller"] is None or "noise" in job:
                chosen[i] = explore(slot, None if job["controller"] is None else chosen[i])
            action, before, earned = chosen[i].copy(), obs[i].copy() if job.get("keep") else None, 0.0
            for k in range(frames := min(agent.repeat, job["limit"] - slot["frames"])):
                envs[i].blind = k < frames - 1
                picture, reward, terminated, truncated, info = envs[i].step(action)
                earned += reward
                slot["frames"] += 1
                slot["idle"] = slot["idle"] + 1 if reward < 0 else 0
                if terminated or truncated:
                    break
            slot["return"] += earned if math.isfinite(action.sum()) else math.nan  # of which the game would say nothing
            if job.get("keep"):
                own = np.full(3, np.nan) if job["controller"] is None else wanted[i].numpy()
                slot["kept"].append((before, np.array([*action, earned, not slot["kept"], terminated, *own])))
            hopeless = job.get("abort") and slot["idle"] >= PATIENCE and slot["frames"] > GRACE
            if not (terminated or truncated or hopeless or slot["frames"] >= job["limit"]):
                obs[i] = picture
                continue
            if hopeless and not terminated:
                slot["return"] -= 0.1 * (job["limit"] - slot["frames"])
            result = {"index": job["index"], "return": float(slot["return"]), "frames": slot["frames"]}
            result["finished"] = bool(info.get("lap_finished", False))
            if job.get("keep"):
                result["pictures"], result["rows"] = (np.stack(part) for part in zip(*slot["kept"], strict=True))
            results.append(result)
            on_result(result)
            slots[i] = None
        if any(slots):
            _, state = agent.memory(z[None], actions[None], state)


def explore(slot: dict, own: np.ndarray | None) -> np.ndarray:
    """An action to collect frames with: random driving, or the controller's own, disturbed. Changes slot["noise"].

    Random driving is correlated in time, so that the car gets somewhere. The controller is disturbed steadily (kind 1)
    or thrown off for a third of a second now and then, to see how it finds back (kind 2).
    """
    rng, t = slot["rng"], slot["frames"]
    slot["noise"] = 0.95 * slot["noise"] + math.sqrt(1 - 0.95**2) * rng.standard_normal(3)
    noise = slot["noise"]
    action: list | np.ndarray
    if own is None:
        action = [0.7 * noise[0], 0.35 + 0.5 * noise[1], 0.4 * noise[2] - 0.4]
    elif slot["job"]["noise"][1] == 1:
        action = own + noise * (0.3, 0.3, 0.1)
    else:
        action = own + noise * (1.0, 0.5, 0.2) if t % 90 < 16 else own
    return np.clip(action, (-1, 0, 0), (1, 1, 1)).astype(np.float32)


ENVIRONMENTS = {"fast": FastCarRacing, "gymnasium": GymnasiumCarRacing}


def work(connection: multiprocessing.connection.Connection, beats: Any, driven: Any, number: int) -> None:
    """A worker's life: driving, one batch of environments, whenever the main process asks for it.

    It answers every job that it receives with a result and asks for no more after None.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a worker dies with the main process
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    agent: Any = None
    envs: dict[str, list] = {}

    def on_step(frames: int) -> None:
        beats[number] = time.monotonic()
        driven[number] += frames

    with contextlib.suppress(EOFError, BrokenPipeError):  # the main process has gone
        while True:
            world, settings, weights, controllers = connection.recv()
            if weights:
                agent = Agent(*settings)
                agent.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
            if world not in envs:
                envs[world] = [ENVIRONMENTS[world]() for _ in range(SLOTS)]
            drive(envs[world], agent, torch.from_numpy(controllers), connection.recv, on_step, connection.send)
            connection.send(None)


class Workers:
    """Driving processes, on all ranks; they share the jobs of a call, and a job's result does not depend on who did it.

    One that dies, or shows no sign of life for `patience` seconds, is replaced, and what it was driving is driven anew.
    """

    def __init__(self, count: int, patience: float = 300.0) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.driven = self.context.RawArray("q", count)  # frames of a call, by worker
        self.beats = self.context.RawArray("d", [math.inf] * count)  # last signs of life of those that are at work
        self.patience, self.replaced, self.lost = patience, 0, 0  # lost: replaced on all ranks
        self.weights: dict | None = None
        self.settings: tuple | None = None
        self.connections: list[Any] = [None] * count
        self.processes: list[Any] = [None] * count
        self.fresh = [True] * count
        for number in range(count):
            self.start(number)
        self.closing = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()

    def start(self, number: int) -> None:
        connection, theirs = self.context.Pipe()
        arguments = (theirs, self.beats, self.driven, number)
        process = self.context.Process(target=work, args=arguments, daemon=True)
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # for it to inherit while it imports
        try:
            process.start()
        finally:
            signal.signal(signal.SIGINT, on_interrupt)
        theirs.close()
        self.connections[number], self.processes[number] = connection, process
        self.fresh[number] = True

    def replace(self, number: int) -> None:
        self.beats[number] = math.inf
        self.processes[number].kill()
        self.processes[number].join()
        self.connections[number].close()
        self.start(number)

    def watch(self) -> None:
        """Kills what hangs; then it is a dead worker like any other, also for one who waits to send to it."""
        while not self.closing.wait(min(1.0, self.patience / 4)):
            for beat, process in zip(self.beats, self.processes, strict=True):
                if time.monotonic() - beat > self.patience:
                    process.kill()

    def load(self, agent: Agent) -> None:
        """Has the workers drive with this V and M from now on."""
        # Arrays travel whole; of a tensor only a file descriptor would, 31 for every worker.
        self.weights = {key: value.detach().cpu().numpy().copy() for key, value in agent.state_dict().items()}
        self.settings = (agent.controller_input, agent.repeat, agent.sample_z)
        self.fresh = [True] * len(self.processes)

    def drive(self, controllers: Tensor, jobs: list[dict], world: str = "fast", bar: Any = None) -> list[dict]:
        """The results of `drive` for all jobs of all ranks, in the jobs' order. Their `index` is set here."""
        for index, job in enumerate(jobs):
            job["index"] = index
        arrays, to_do, results = gather(controllers.detach().cpu().numpy())[0], jobs[RANK::RANKS][::-1], []
        held: dict[int, dict[int, dict]] = {}  # what each one at work has to drive
        told: set[int] = set()
        deaths, started = 0, time.time()
        self.driven[:] = [0] * len(self.processes)

        def call(number: int) -> None:
            held[number] = {}
            self.beats[number] = time.monotonic() + 600 * self.fresh[number]  # a new one has much to import
            told.discard(number)
            weights = self.weights if self.fresh[number] else None
            self.connections[number].send((world, self.settings, weights, arrays))
            self.fresh[number] = False

        def hand_out(number: int) -> None:
            if number in held and number not in told:
                job = to_do.pop() if to_do else None
                told.update(() if job else (number,))
                held[number] |= {job["index"]: job} if job else {}
                self.connections[number].send(job)

        def hear(number: int) -> None:
            nonlocal deaths
            result = self.connections[number].recv()
            if result is None:
                del held[number]
                self.beats[number] = math.inf
                return
            job, deaths = held[number].pop(result["index"]), 0
            if not math.isfinite(result["return"]):
                raise Fault(f"A rollout's return is {result['return']} (track {job['seed']}).")
            results.append(result)
            hand_out(number)

        def attempt(step: Callable, number: int) -> None:
            nonlocal deaths
            try:
                step(number)
            except (EOFError, OSError):  # it died
                deaths, self.replaced = deaths + 1, self.replaced + 1
                to_do.extend(held.pop(number, {}).values())
                self.replace(number)
                if deaths > 3 * len(self.processes):
                    raise Fault(f"Driving processes died {deaths} times in a row: is memory short?") from None

        while to_do or held:
            idle = [number for number in range(len(self.processes)) if number not in held] if to_do else []
            for step in (call, *SLOTS * (hand_out,)):
                for number in idle:
                    attempt(step, number)
            for connection in multiprocessing.connection.wait([self.connections[n] for n in held], timeout=2):
                attempt(hear, self.connections.index(connection))
            if bar is not None:
                bar.set_postfix_str(f"{sum(self.driven) * RANKS / (time.time() - started):.0f} frames/s")
        parts = gather((results, self.replaced))
        self.lost = sum(replaced for _, replaced in parts)
        return sorted(itertools.chain(*(results for results, _ in parts)), key=lambda result: result["index"])

    def close(self) -> None:
        """Ends the workers, and the watching thread: one that still runs as the interpreter ends can abort it."""
        self.closing.set()
        self.watcher.join()
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.close()
            process.kill()
            process.join()


# ---------------------------------------------------------------------------------------------------------------------
# The search


class CMAES:
    """Covariance matrix adaptation evolution strategy as in Hansen's tutorial (arXiv:1604.00772, figure 6 and table 1),
    with its default parameters. It minimizes. `active` gives the worse half negative weights, as the tutorial does.

    The noise of a generation depends on the seed and the generation alone, so that what a state asks for is known.
    """

    STATE = ("mean", "sigma", "C", "path_sigma", "path_c", "basis", "scales", "generation", "decomposed")

    def __init__(self, mean: np.ndarray, sigma: float, population: int, seed: int = 0, active: bool = True) -> None:
        n = len(mean)
        self.population, self.seed = population, seed
        raw = math.log((population + 1) / 2) - np.log(np.arange(1, population + 1))
        good, bad = raw[raw > 0], raw[raw <= 0]
        self.mu_eff = good.sum() ** 2 / (good**2).sum()
        mu_eff_bad = bad.sum() ** 2 / max((bad**2).sum(), 1e-300)
        self.c_sigma = (self.mu_eff + 2) / (n + self.mu_eff + 5)
        self.d_sigma = 1 + 2 * max(0, math.sqrt((self.mu_eff - 1) / (n + 1)) - 1) + self.c_sigma
        self.c_c = (4 + self.mu_eff / n) / (n + 4 + 2 * self.mu_eff / n)
        self.c_1 = 2 / ((n + 1.3) ** 2 + self.mu_eff)
        rank_mu = 2 * (0.25 + self.mu_eff + 1 / self.mu_eff - 2) / ((n + 2) ** 2 + self.mu_eff)
        self.c_mu = min(1 - self.c_1, rank_mu)
        least = min(1 + self.c_1 / self.c_mu, 1 + 2 * mu_eff_bad / (self.mu_eff + 2))
        least = min(least, (1 - self.c_1 - self.c_mu) / (n * self.c_mu)) * active
        self.weights = np.where(raw > 0, raw / good.sum(), raw / max(-bad.sum(), 1e-300) * least)
        self.expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))  # length of a standard normal vector
        self.mean, self.sigma, self.C = np.array(mean, np.float64), float(sigma), np.eye(n)
        self.path_sigma, self.path_c = np.zeros(n), np.zeros(n)
        self.basis, self.scales = np.eye(n), np.ones(n)  # C = basis diag(scales ** 2) basis.T
        self.generation = self.decomposed = 0

    def _steps(self) -> np.ndarray:
        noise = np.random.default_rng([self.seed, self.generation])
        return (noise.standard_normal((self.population, len(self.mean))) * self.scales) @ self.basis.T

    def ask(self) -> np.ndarray:
        """The generation's candidates, (population, n)."""
        return self.mean + self.sigma * self._steps()

    def tell(self, costs: np.ndarray) -> None:
        """Takes the candidates' costs, in the order of `ask`, and moves on to the next generation."""
        n, order = len(self.mean), np.argsort(costs, kind="stable")
        steps = self._steps()[order]
        positive = self.weights.clip(0)
        step = positive @ steps
        self.mean = self.mean + self.sigma * step
        whiten = lambda vectors: (vectors @ self.basis / self.scales) @ self.basis.T  # noqa: E731
        self.path_sigma = (1 - self.c_sigma) * self.path_sigma
        self.path_sigma += math.sqrt(self.c_sigma * (2 - self.c_sigma) * self.mu_eff) * whiten(step)
        length = np.linalg.norm(self.path_sigma)
        self.generation += 1
        settled = math.sqrt(1 - (1 - self.c_sigma) ** (2 * self.generation))
        not_stalled = length / settled < (1.4 + 2 / (n + 1)) * self.expected
        self.path_c = (1 - self.c_c) * self.path_c
        self.path_c += not_stalled * math.sqrt(self.c_c * (2 - self.c_c) * self.mu_eff) * step
        lengths = (whiten(steps) ** 2).sum(1)
        weights = np.where(self.weights >= 0, self.weights, self.weights * n / np.maximum(lengths, 1e-300))
        lost = (1 - not_stalled) * self.c_c * (2 - self.c_c)
        self.C *= 1 + self.c_1 * lost - self.c_1 - self.c_mu * self.weights.sum()
        self.C += self.c_1 * np.outer(self.path_c, self.path_c) + self.c_mu * (steps.T * weights) @ steps
        self.sigma *= math.exp(min(1, self.c_sigma / self.d_sigma * (length / self.expected - 1)))
        if self.generation - self.decomposed > 1 / (self.c_1 + self.c_mu) / n / 10:
            self.C = (self.C + self.C.T) / 2
            values, self.basis = np.linalg.eigh(self.C)
            self.scales, self.decomposed = np.sqrt(values.clip(1e-20)), self.generation

    def state(self) -> dict:
        """Everything that changes, as tensors and plain values for a checkpoint."""
        values = {name: getattr(self, name) for name in self.STATE}
        return {k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for k, v in values.items()}

    def restore(self, state: dict) -> None:
        """Takes over what `state` gave. Raises ValueError and the like where that is no state of a search like this."""
        for name in self.STATE:
            own, value = getattr(self, name), state[name]
            value = value.numpy().copy() if isinstance(value, torch.Tensor) else value
            if np.shape(value) != np.shape(own) or not np.isfinite(value).all():
                raise ValueError(f"{name} is no state of this search")
            setattr(self, name, value)


@torch.no_grad()
def dream_returns(
    memory: Memory, controllers: Tensor, z: Tensor, state: tuple[Tensor, ...], steps: int, temperature: float,
    dropout: float, generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Mean return that every controller gets in M's dream, (P,).

    controllers: (P, 3, I); z: (S, 32); state: a pair of (1, S, 256), real places to start from, the same for all
    controllers, as are the dream's chances. The next latents are drawn from M's mixture with its logits divided by the
    temperature and its variances multiplied by it. Dropout hits what M foretells from, not what C sees.
    """
    population, starts = len(controllers), len(z)
    z = z.repeat(population, 1)  # (P * S, 32), controller by controller
    state = tuple(part.repeat(1, population, 1) for part in state)
    weights = controllers.to(z.device)
    returns, alive = torch.zeros(len(z), device=z.device), torch.ones(len(z), device=z.device)
    chance: dict[str, Any] = {"generator": generator, "device": z.device}
    for _ in range(steps):
        inputs = torch.cat([z, state[0][0]], -1).view(population, starts, -1)[..., : weights.shape[-1] - 1]
        wanted = torch.baddbmm(weights[:, None, :, -1], inputs, weights[..., :-1].transpose(1, 2))
        hidden, state = memory(z[None], squash(wanted).view(1, -1, 3), state)
        kept = (torch.rand(starts, HIDDEN, **chance) >= dropout) / (1 - dropout)
        z, reward, end = sample_next(memory, hidden[0] * kept.repeat(population, 1), starts, temperature, chance)
        returns += alive * reward.clamp(*REWARDS)
        alive *= 1 - end.sigmoid()
    return returns.view(population, starts).mean(1)


def sample_next(
    memory: Memory, hidden: Tensor, starts: int, temperature: float, chance: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The next latents (N, 32), drawn from what M foretells, reward (N,) and logit of the end (N,). hidden: (N, 256).

    Row i and row i + starts share their chances.
    """
    log_pi, mu, log_sigma, reward, end = memory.foretell(hidden)
    repeats = len(hidden) // starts
    uniform = torch.rand(starts, LATENTS, 1, **chance).repeat(repeats, 1, 1)
    component = (uniform > (log_pi / temperature).softmax(-1).cumsum(-1)[..., :-1]).sum(-1, keepdim=True)
    noise = torch.randn(starts, LATENTS, **chance).repeat(repeats, 1) * math.sqrt(temperature)
    z = mu.gather(-1, component)[..., 0] + log_sigma.gather(-1, component)[..., 0].exp() * noise
    return z, reward, end


@torch.no_grad()
def picture_dream(
    agent: Agent, controller: Tensor, z: Tensor, state: tuple[Tensor, ...], steps: int, temperature: float
) -> np.ndarray:
    """What V paints of one dream, uint8 (steps, 64, 64, 3).

    controller: (3, I); z: (1, 32) and state, a pair of (1, 1, 256): where it begins.
    """
    chance, latents = {"generator": torch.Generator(z.device).manual_seed(0), "device": z.device}, []
    for _ in range(steps):
        latents.append(z)
        action = squash(wanted_actions(z, state[0][0], controller[None].to(z.device)))
        hidden, state = agent.memory(z[None], action[None], state)
        z, _, _ = sample_next(agent.memory, hidden[0], 1, temperature, chance)
    return to_pictures(agent.vision.decode(torch.cat(latents)))


REWARDS = (-1.0, 10.0)  # range of the rewards that M learns; leaving the lawn costs 100, which would drown the others


# ---------------------------------------------------------------------------------------------------------------------
# Footage: what was driven, in memory maps on disk

COLUMNS = 9  # action (3), reward, first of its episode, terminated after it, what the controller wanted (3)
TRAIN_TRACKS, VALIDATION_TRACKS, FOOTAGE_TRACKS = 1_000_000, 900_000_000, 800_000_000  # first seeds; see `check_args`


def open_map(path: Path, shape: tuple[int, ...], kind: type, fill: Callable | None = None) -> np.memmap:
    """An array on disk, made where there is none, by rank 0: empty, or by `fill`. Raises UsageError."""
    if RANK == 0 and not path.exists():
        array = np.lib.format.open_memmap(path.with_suffix(".tmp"), "w+", kind, shape)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here and would be a crash later
            with open(path.with_suffix(".tmp"), "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
        if fill:
            fill(array)
        array.flush()
        os.replace(path.with_suffix(".tmp"), path)
    gather(None)
    try:
        np.load(path, mmap_mode="r")  # which refuses a file that was cut off; "r+" would fill it up with zeros
        array = np.load(path, mmap_mode="r+")
        good = (array.shape, array.dtype) == (shape, kind)
    except Exception as error:  # whatever may be in a file
        raise UsageError(f"{path} is damaged: type --name to start anew.") from error
    if not good:
        raise UsageError(f"{path} is not this run's: type --name to start anew.")
    return array


class Footage:
    """All rounds' frames as memory maps under `folder`: pictures, uint8 (N, 64, 64, 3), and rows, float32 (N, 9)."""

    def __init__(self, folder: Path, frames_per_round: int) -> None:
        self.folder, self.size = folder, frames_per_round
        self.pictures: list[np.memmap] = []
        self.rows: list[np.memmap] = []

    def open(self, round_: int) -> None:
        """Makes the maps of all rounds up to this one available, new ones empty."""
        if RANK == 0:
            self.folder.mkdir(exist_ok=True)
        while len(self.rows) < round_:
            number = len(self.rows) + 1
            self.pictures.append(open_map(self.folder / f"pictures-{number}.npy", (self.size, SIZE, SIZE, 3), np.uint8))
            self.rows.append(open_map(self.folder / f"rows-{number}.npy", (self.size, COLUMNS), np.float32))

    def __len__(self) -> int:
        return self.size * len(self.pictures)

    def take(self, indices: np.ndarray) -> Tensor:
        """Pictures (N, 64, 64, 3) of frames counted over all rounds."""
        pictures = np.empty((len(indices), SIZE, SIZE, 3), np.uint8)
        for k, part in enumerate(self.pictures):
            here = indices // self.size == k
            pictures[here] = part[indices[here] % self.size]
        return torch.from_numpy(pictures)

    def episodes(self) -> tuple[np.ndarray, Tensor]:
        """First frame and length of every episode, (E, 2), and all rows (N, 9). Raises UsageError."""
        rows = np.concatenate(self.rows)
        starts = np.flatnonzero(rows[:, 4])
        if not np.isfinite(rows[:, :6]).all() or not rows[0, 4]:
            raise UsageError(f"{self.folder} holds rows that nobody drove: type --name to start anew.")
        return np.stack([starts, np.diff([*starts, len(rows)])], 1), torch.from_numpy(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Save and load


def save_atomically(contents: dict, path: Path) -> None:
    """Writes a checkpoint so that a crash at any moment leaves either the old file or the new one."""
    temporary, held, buffer = path.with_suffix(".tmp"), [], io.BytesIO()
    on_interrupt = signal.signal(signal.SIGINT, lambda *received: held.append(received))  # torch.save would break
    try:
        torch.save(contents, buffer)
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
    if held and callable(on_interrupt):
        on_interrupt(*held[0])


def load_checkpoint(path: Path) -> dict:
    """A checkpoint as a dict of tensors and plain values; nothing in the file is executed. Raises UsageError."""
    if not path.is_file():
        raise UsageError(f"There is no checkpoint {path}: type the path of a run's last.pt or best.pt.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        kinds = {field.name: field.type for field in dataclasses.fields(Args)} | {"init_from": str | None}
        whole = all(name in kinds and fits(value, kinds[name]) for name, value in checkpoint["args"].items())
        whole &= isinstance(checkpoint["made_on"], dict) and isinstance(checkpoint["iteration"], int)
        whole &= "agent" in checkpoint and all(stage in STAGES for _, stage in checkpoint.get("done", ()))
    except Exception as error:
        raise UsageError(f"{path} is not a checkpoint of this script: type another path.") from error
    if not whole:
        raise UsageError(f"{path} is not a checkpoint of this script, or of another version: type another path.")
    return checkpoint


def fits(value: Any, kind: Any) -> bool:
    """Whether a value has a type of Args: a plain one, a Literal, a tuple of one, or a union of such."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(fits(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, get_args(kind)[0]) for item in value)
    return isinstance(value, (int, float) if kind is float else kind)


def load_weights(agent: Agent, checkpoint: dict, path: Path | None) -> None:
    """Puts a checkpoint's weights into V, M and C. Raises UsageError where they do not fit."""
    try:
        agent.load_state_dict(checkpoint["agent"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} holds other networks than this script's: type another path.") from error


def describe_setting() -> dict:
    """What a checkpoint is made on, as plain values."""
    version = importlib.metadata.version
    return {"gymnasium": version("gymnasium"), "box2d": version("box2d"), "pygame": pygame.version.ver}


def note_differences(made_on: dict, here: dict) -> None:
    """Says where a checkpoint is used on something else than it was made on."""
    for key, value in made_on.items():
        if here.get(key) != value:
            print(f"note: this checkpoint learnt with {key} {value} and now meets {here.get(key)}")


# ---------------------------------------------------------------------------------------------------------------------
# Learning


class Logger:
    """The same scalars to TensorBoard and to metrics.jsonl, which a resumed run cuts back to its checkpoint."""

    def __init__(self, folder: Path, args: Args, iteration: int, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path, temporary = folder / "metrics.jsonl", folder / "metrics.tmp"
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        temporary.write_text("".join(line + "\n" for line in lines if self.iteration_of(line) <= iteration))
        os.replace(temporary, self.path)
        self.file = open(self.path, "a", buffering=1)
        threading.excepthook = lambda failure: None  # TensorBoard's thread; the next line raises it here
        self.board = SummaryWriter(folder, purge_step=step + 1 if iteration else None)
        rows = [f"|{field.name}|{getattr(args, field.name)}|" for field in dataclasses.fields(args)]
        self.board.add_text("hyperparameters", "\n".join(["|name|value|", "|-|-|", *rows]))

    @staticmethod
    def iteration_of(line: str) -> float:
        """The iteration that a line of metrics.jsonl tells of; infinity where a full disk has cut it off."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["iteration"])
        return math.inf

    def write(self, iteration: int, step: int, scalars: dict[str, float]) -> None:
        for key, value in scalars.items():
            self.board.add_scalar(key, value, step)
        self.file.write(json.dumps({"iteration": iteration, "global_step": step} | scalars) + "\n")

    def film(self, tag: str, frames: list[np.ndarray], fps: float, step: int) -> None:
        """A small moving picture for TensorBoard's image page; frames: uint8 (T, H, W, 3)."""
        import imageio.v3
        from tensorboard.compat.proto.summary_pb2 import Summary

        gif = imageio.v3.imwrite("<bytes>", np.stack(frames), extension=".gif", duration=1000 / fps, loop=0)
        height, width = frames[0].shape[:2]
        image = Summary.Image(encoded_image_string=gif, height=height, width=width, colorspace=3)
        self.board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def close(self) -> None:
        for stream in (self.file, self.board):
            with contextlib.suppress(OSError):  # of a full disk, which was told of before
                stream.close()


class Silence:
    """A logger or a bar that takes everything and writes nothing: the loggers of all ranks but the first."""

    def __getattr__(self, name: str) -> "Silence":
        return self

    def __call__(self, *args: Any, **settings: Any) -> "Silence":
        return self


LOG_EVERY = {"vision": 100, "memory": 20}  # minibatches, or a tenth of the stage where that is less


class Run:
    """What the stages share: settings, networks, workers, footage, logs, and the state that a checkpoint holds."""

    def __init__(self, args: Args, folder: Path, device: torch.device, checkpoint: dict | None) -> None:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # its thread would run into the end of the interpreter
        self.args, self.folder, self.device = args, folder, device
        self.made_on = describe_setting()
        torch.manual_seed(args.seed)
        self.agent = Agent(args.controller_input, args.action_repeat, args.sample_z)
        self.footage = Footage(folder / "data", args.collect_frames)
        self.iteration, self.saved_optimizer = 0, None
        self.optimizer: Any = None
        # done: rounds and stages; step: of the stage that is not; frames: driven so far; scores: (frames, score)
        self.state: dict[str, Any] = {"done": [], "step": 0, "frames": 0, "elapsed": 0.0, "best": None, "scores": []}
        self.state |= {"stage_best": None, "search": None, "collected": 0, "replaced": 0}
        if checkpoint:
            note_differences(checkpoint["made_on"], self.made_on)
            load_weights(self.agent, checkpoint, folder)
            self.iteration = checkpoint["iteration"]
            with self.resuming():
                self.saved_optimizer, self.state = checkpoint["optimizer"], {k: checkpoint[k] for k in self.state}
                self.check_state()
        elif args.init_from:
            source = load_checkpoint(args.init_from)
            if (repeat := source["args"].get("action_repeat")) != args.action_repeat:
                raise UsageError(f"{args.init_from} drives with another: type --action-repeat {repeat}.")
            load_weights(self.agent, source, args.init_from)
        self.agent.to(device)
        self.workers, self.replaced = Workers(args.workers or CORES), self.state["replaced"]
        self.tqdm, self.clock = functools.partial(tqdm, disable=RANK > 0), time.time()
        self.logger: Any = None
        self.bar: Any = Silence()

    @contextlib.contextmanager
    def resuming(self) -> Iterator[None]:
        """Whatever goes wrong with a checkpoint's values is one sentence."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{self.folder}/last.pt cannot be resumed: type --name to start anew.") from error

    def check_state(self) -> None:
        """Raises ValueError and the like where a checkpoint's state is none."""
        kinds: dict[str, Any] = {"done": list, "step": int, "frames": int, "elapsed": float, "collected": int}
        kinds |= {"best": float | None, "scores": list, "stage_best": dict | None, "search": dict | None}
        kinds["replaced"] = int
        if not all(fits(self.state[key], kind) for key, kind in kinds.items()):
            raise ValueError("a value of the wrong type")
        if not all(fits(frames, int) and fits(score, float) for frames, score in self.state["scores"]):
            raise ValueError("no scores")
        if best := self.state["stage_best"]:
            if best["controller"].shape != self.agent.controller.shape or not best["score"] + best["sigma"] < math.inf:
                raise ValueError("no controller")
            if not fits(best["step"], int):
                raise ValueError("no step")
        if self.state["search"]:
            CMAES(np.zeros(self.agent.controller.numel()), 1.0, self.args.population).restore(self.state["search"])

    def open_logs(self) -> None:
        self.logger = Logger(self.folder, self.args, self.iteration, self.iteration) if RANK == 0 else Silence()
        for frames, score in self.state["scores"]:  # a resumed run's board has lost them
            self.logger.board.add_scalar("score_against_frames", score, frames)

    def knows_nothing(self, round_: int) -> bool:
        """Whether no controller has been found yet when this round begins."""
        return round_ == 1 and not self.args.init_from

    def start_bar(self, round_: int, stage: str, total: int) -> Any:
        """The stage's bar, which `train` closes."""
        where = f"round {round_} {stage}"
        self.bar = self.tqdm(total=total, initial=self.state["step"], desc=where, smoothing=0.05)
        return self.bar

    def log(self, scalars: dict, save: bool = True) -> None:
        """Writes a row of metrics and, as a rule, the checkpoint that goes with it."""
        self.iteration += 1
        now = time.time()
        self.state["elapsed"] += now - self.clock
        self.clock = now
        self.state["replaced"] = self.replaced + self.workers.lost
        scalars = scalars | {"charts/frames": self.state["frames"], "charts/elapsed_seconds": self.state["elapsed"]}
        scalars["charts/workers_replaced"] = self.state["replaced"]
        self.logger.write(self.iteration, self.iteration, {key: float(value) for key, value in scalars.items()})
        if save:
            self.save()

    def drive(self, controllers: Tensor, jobs: list[dict]) -> list[dict]:
        """The results of `Workers.drive` in FastCarRacing, their frames counted."""
        results = self.workers.drive(controllers, jobs, bar=self.bar)
        self.state["frames"] += sum(result["frames"] for result in results)
        return results

    def weights(self) -> dict:
        agent = {key: value.detach().cpu().clone() for key, value in self.agent.state_dict().items()}
        common = {"args": args_to_plain(self.args), "made_on": self.made_on, "iteration": self.iteration}
        return common | {"agent": agent}

    def write(self, contents: dict, name: str) -> None:
        if RANK == 0:
            save_atomically(contents, self.folder / name)

    def save(self) -> None:
        optimizer = self.optimizer.state_dict() if self.optimizer else None
        self.write(self.weights() | self.state | {"optimizer": optimizer}, "last.pt")

    def save_best(self, score: float) -> None:
        """V, M and C with the best score so far, in the half precision that V and M were rounded to."""
        weights = self.weights() | {"score": score, "frames": self.state["frames"]}
        halves = {k: v if k == "controller" else v.half() for k, v in weights["agent"].items()}
        self.write(weights | {"agent": halves}, "best.pt")

    def start_optimizer(self, parameters: Iterable[Tensor], lr: float) -> None:
        self.optimizer = torch.optim.Adam([p for p in parameters if p.requires_grad], lr=lr)
        if self.saved_optimizer and self.state["step"]:
            with self.resuming():
                self.optimizer.load_state_dict(self.saved_optimizer)
        self.saved_optimizer = None

    def descend(self, losses: list[Tensor] | tuple[Tensor, ...], most: float = math.inf) -> Tensor:
        """A step down the gradient of losses[0], summed over the ranks, no longer than `most`. Returns all losses,
        summed as well. Raises Fault where one is not finite."""
        self.optimizer.zero_grad()
        losses[0].backward()
        parameters, values = self.optimizer.param_groups[0]["params"], torch.stack(losses).detach()
        if RANKS > 1:
            together = torch.cat([*(parameter.grad.flatten() for parameter in parameters), values])
            dist.all_reduce(together)
            parts = together.split([parameter.numel() for parameter in parameters] + [len(values)])
            for parameter, part in zip(parameters, parts[:-1], strict=True):
                parameter.grad.copy_(part.view_as(parameter))
            values = parts[-1]
        length = nn.utils.clip_grad_norm_(parameters, most)
        if not torch.isfinite(length + values.sum()):
            raise Fault(f"Loss or gradient is not finite (loss {values[0]:.4g}, gradient {length:.4g}).")
        self.optimizer.step()
        return values

    def end_learning(self, module: nn.Module) -> None:
        """Rounds a network to half precision, so that what is driven with is what best.pt holds, bit by bit."""
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(parameter.half())
        self.optimizer = None

    def randomness(self, *numbers: int) -> np.random.Generator:
        """A numpy generator and torch's own, which depend on the seed and the numbers alone: nothing to be saved."""
        generator = np.random.default_rng([self.args.seed, *numbers])
        torch.manual_seed(int(generator.integers(2**62)))
        return generator


def stage_collect(run: Run, round_: int) -> None:
    """Drives and films: at random at first, with the current controller, often disturbed, in the later rounds."""
    args, footage, state, at_random = run.args, run.footage, run.state, run.knows_nothing(round_)
    footage.open(round_)
    controllers = run.agent.controller[None].cpu()
    run.workers.load(run.agent)
    bar = run.start_bar(round_, "collect", args.collect_frames)
    batch = 32  # episodes at a time
    limit = min(300, args.max_frames) if at_random else args.max_frames
    while state["step"] < args.collect_frames:
        jobs = []
        for episode in range(state["collected"], state["collected"] + batch):
            choice = np.random.default_rng([args.seed, round_, episode])
            job: dict = {"seed": FOOTAGE_TRACKS + 1_000_000 * round_ + episode, "limit": limit, "keep": True}
            job |= {"controller": None if at_random else 0, "place": choice.random() * (choice.random() < 0.8)}
            if at_random or episode % 3:
                job["noise"] = (args.seed * 1000 + round_, 0 if at_random else episode % 3)
            jobs.append(job)
        for result in run.drive(controllers, jobs):
            # Episodes count one by one, so that the footage does not depend on how many workers there are.
            room = slice(state["step"], min(state["step"] + len(result["rows"]), args.collect_frames))
            size = room.stop - room.start
            if RANK == 0:
                result["rows"][:, 3] = result["rows"][:, 3].clip(*REWARDS)
                footage.pictures[-1][room], footage.rows[-1][room] = result["pictures"][:size], result["rows"][:size]
            state["step"] += size
            state["collected"] += size > 0
            bar.update(size)
        footage.pictures[-1].flush()
        footage.rows[-1].flush()
        run.save()
    gather(None)  # the other ranks learn from what rank 0 has written
    rows = footage.rows[-1]
    run.log({"collect/reward_per_frame": rows[:, 3].mean(), "collect/episodes": rows[:, 4].sum()}, save=False)
    state["collected"] = 0


def learn(
    run: Run, round_: int, stage: str, minibatch: Callable, names: tuple[str, ...], most: float = math.inf
) -> None:
    """Fits V or M. `minibatch`, given a numpy generator, returns its losses, or what this rank's share adds to them."""
    args, state, network = run.args, run.state, getattr(run.agent, stage)
    total, lr = getattr(args, f"{stage}_steps") // round_, getattr(args, f"{stage}_lr")
    run.start_optimizer(network.parameters(), lr)
    bar, sums, every = run.start_bar(round_, stage, total), [], min(LOG_EVERY[stage], total // 10 or 1)
    while state["step"] < total:
        run.optimizer.param_groups[0]["lr"] = lr * (1 - 0.9 * state["step"] / total)
        sums.append(run.descend(minibatch(run.randomness(round_, STAGES.index(stage), state["step"])), most))
        state["step"] += 1
        bar.update()
        if state["step"] % every == 0 or state["step"] == total:
            values = dict(zip(names, torch.stack(sums).mean(0).tolist(), strict=True))
            sums = []
            bar.set_postfix({name: f"{values[name]:.3g}" for name in names[1:3]})
            run.log({f"{stage}/{name}": value for name, value in values.items()})
    run.end_learning(network)


def stage_vision(run: Run, round_: int) -> None:
    """Fits V to all the footage."""
    args, vision = run.args, run.agent.vision
    run.footage.open(round_)

    def minibatch(chance: np.random.Generator) -> list[Tensor]:
        indices = np.sort(chance.integers(len(run.footage), size=args.vision_batch))
        noise = torch.randn(args.vision_batch, LATENTS)[RANK::RANKS].to(run.device)
        pictures = run.footage.take(indices[RANK::RANKS]).to(run.device)
        mu, logvar = vision.encode(pictures)
        decoded = vision.decode(mu + torch.exp(logvar / 2) * noise)
        if run.state["step"] % 500 == 0:
            pair = np.concatenate([pictures[:8].cpu().numpy(), to_pictures(decoded[:8].detach())])
            grid = pair.reshape(2, -1, SIZE, SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(2 * SIZE, -1, 3)
            run.logger.board.add_image("vision/reconstruction", grid, run.iteration, dataformats="HWC")
        share = len(pictures) / args.vision_batch
        return [share * loss for loss in vision_loss(decoded, to_floats(pictures), mu, logvar)]

    learn(run, round_, "vision", minibatch, ("loss", "squared_error", "KL"))


@torch.no_grad()
def encode_footage(run: Run, round_: int) -> np.ndarray:
    """Mean and log variance of every frame's latents, float32 (N, 64), as a memory map; made once a round."""

    def fill(latents: np.ndarray) -> None:
        for start in run.tqdm(range(0, len(latents), 500), desc=f"round {round_} encode", leave=False):
            part = np.arange(start, min(start + 500, len(latents)))
            latents[part] = torch.cat(run.agent.vision.encode(run.footage.take(part).to(run.device)), 1).cpu().numpy()

    path = run.footage.folder / f"latents-{round_}.npy"
    latents = open_map(path, (len(run.footage), 2 * LATENTS), np.float32, fill)
    if RANK == 0:
        path.with_name(f"latents-{round_ - 1}.npy").unlink(missing_ok=True)
    return latents


def stage_memory(run: Run, round_: int) -> None:
    """Fits M to the latents of all the footage, sampled anew in every minibatch."""
    run.footage.open(round_)
    latents, (episodes, rows) = encode_footage(run, round_), run.footage.episodes()
    shares = episodes[:, 1] / len(rows)  # or the first round's many short episodes would be most of it

    def minibatch(chance: np.random.Generator) -> tuple[Tensor, ...]:
        chosen = episodes[chance.choice(len(episodes), run.args.memory_batch, p=shares)]
        mine = slice(RANK, None, RANKS)
        frames = (chosen[:, 0] + np.arange(chosen[:, 1].max())[:, None]).clip(max=len(rows) - 1)  # (T, N)
        mu, logvar = torch.from_numpy(latents[frames[:, mine]]).to(run.device).chunk(2, -1)
        noise = torch.randn(2, *frames.shape, LATENTS)[:, :, mine].to(run.device)
        z, targets = mu + torch.exp(logvar / 2) * noise
        table, lengths = rows[frames[:, mine]].to(run.device), torch.from_numpy(chosen[:, 1]).to(run.device)
        columns = table[..., :3], table[..., 3], table[..., 5]
        return memory_loss(run.agent.memory, z, targets, *columns, lengths[mine], lengths)

    learn(run, round_, "memory", minibatch, ("loss", "NLL_per_latent", "reward_error", "end_error"), most=1.0)


def translate_controller(run: Run, round_: int) -> Tensor:
    """The controller for this round's V and M that asks for what the old one asked for on the newest footage, by ridge
    regression: the old weights mean nothing to networks that have learnt on."""
    latents, rows = encode_footage(run, round_), torch.from_numpy(np.array(run.footage.rows[-1]))
    first = len(latents) - len(rows)
    parts = []
    starts = np.flatnonzero(rows[:, 4].numpy())
    with torch.no_grad():
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            z = torch.from_numpy(latents[first + start : first + end, :LATENTS])[:, None].to(run.device)
            hidden, _ = run.agent.memory(z, rows[start:end, None, :3].to(run.device))
            before = torch.cat([torch.zeros_like(hidden[:1]), hidden[:-1]])  # what C saw with these pictures
            parts.append(torch.cat([z, before, torch.ones_like(z[..., :1])], -1)[:, 0].cpu().double())
    features, wanted = torch.cat(parts), rows[:, 6:].double()
    if run.args.controller_input == "z":
        features = torch.cat([features[:, :LATENTS], features[:, -1:]], 1)
    square = features.T @ features + 1e-3 * len(features) * torch.eye(features.shape[1])
    controller = torch.linalg.solve(square, features.T @ wanted).T
    left = (features @ controller.T - wanted).square().mean() / wanted.var().clamp(min=1e-9)
    print(f"controller taken over to the new V and M; share of its wishes not explained: {left:.3f}")
    return controller.float()


def dream_starts(run: Run, round_: int, generation: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Real places to start a dream from, all in the newest footage, since that is where the controller gets to: latents
    (S, 32) and M's states (1, S, 256) after up to 40 frames there."""
    chance = run.randomness(round_, 4, generation)
    latents = encode_footage(run, round_)
    episodes, rows = run.footage.episodes()
    newest = episodes[episodes[:, 0] >= len(rows) - run.footage.size]
    chosen = newest[chance.choice(len(newest), run.args.dream_starts)]
    ends = chosen[:, 0] + (chance.random(len(chosen)) * chosen[:, 1]).astype(int)
    begins = np.maximum(chosen[:, 0], ends - 40)
    z = torch.zeros(41, len(chosen), LATENTS)
    actions, length = torch.zeros(41, len(chosen), 3), ends - begins
    for i, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        z[: end - begin + 1, i] = torch.from_numpy(latents[begin : end + 1, :LATENTS])
        actions[: end - begin, i] = rows[begin:end, :3]
    with torch.no_grad():
        hidden, cell, state = [], [], tuple(torch.zeros(1, len(chosen), HIDDEN, device=run.device) for _ in range(2))
        for t in range(41):  # the state at each one's own end
            hidden.append(state[0])
            cell.append(state[1])
            _, state = run.agent.memory(z[t : t + 1].to(run.device), actions[t : t + 1].to(run.device), state)
        column = torch.arange(len(chosen))
        state = tuple(torch.cat(part)[length, column][None] for part in (hidden, cell))
    return z[length, column].to(run.device), state


def validate(run: Run, controller: Tensor) -> tuple[float, float]:
    """Scores a controller on the validation tracks, in FastCarRacing, without giving up."""
    args = run.args
    seeds = range(VALIDATION_TRACKS, VALIDATION_TRACKS + args.validation_tracks)
    jobs = [{"seed": seed, "controller": 0, "limit": args.max_frames} for seed in seeds]
    returns = [result["return"] for result in run.drive(controller[None], jobs)]
    return float(np.mean(returns)), float(np.std(returns))


DREAMERS = 32  # controllers that dream at a time
DISBELIEF = 3  # validations without a better mean after which a dream ends


def stage_controller(run: Run, round_: int) -> bool:
    """Searches C by CMA-ES, in the dream and, in the last round, on real tracks. Its mean counts; the best is kept."""
    args, state, agent = run.args, run.state, run.agent
    run.footage.open(round_)
    run.workers.load(agent)
    dreamt = args.dream_generations if args.controller_input == "zh" else 0
    shape, total = agent.controller.shape, dreamt + args.generations * (round_ == args.rounds)
    bar = run.start_bar(round_, "controller", total)

    def candidates(vectors: np.ndarray) -> Tensor:
        return torch.from_numpy(vectors).float().view(-1, *shape)

    def start_search(mean: np.ndarray, sigma: float) -> CMAES:
        return CMAES(mean, sigma, args.population, seed=args.seed * 1000 + 2 * round_ + (state["step"] >= dreamt))

    def look(search: CMAES) -> dict[str, float]:
        """Validates the mean; the best of the stage is kept, and the best of the run written."""
        controller = candidates(search.mean[None])[0]
        score, spread = validate(run, controller)
        if state["stage_best"] is None or score > state["stage_best"]["score"]:
            found = {"score": score, "controller": controller, "sigma": search.sigma, "step": state["step"]}
            state["stage_best"] = found
        if state["best"] is None or score > state["best"]:
            state["best"] = score
            agent.controller.copy_(controller)
            run.save_best(score)
        state["scores"].append([state["frames"], score])
        run.logger.board.add_scalar("score_against_frames", score, state["frames"])
        where = "dream" if state["step"] < dreamt or state["step"] == dreamt > 0 else "real"
        bar.write(f"{where} generation {state['step']}, {state['frames']} frames: mean controller {score:.1f}")
        return {"controller/validation": score, "controller/validation_std": spread}

    if state["search"] is None:
        anew = run.knows_nothing(round_)
        mean = torch.zeros(shape) if anew else translate_controller(run, round_)
        search = start_search(mean.numpy().ravel().astype(np.float64), args.sigma if anew else args.sigma / 2)
        state["stage_best"] = None
        metrics = look(search)
        state["search"] = search.state()
        run.log(metrics)
    search = start_search(np.zeros(shape.numel()), args.sigma)
    search.restore(state["search"])

    while state["step"] < total:
        generation, dreaming, started = state["step"], state["step"] < dreamt, time.time()
        vectors = gather(search.ask())[0]
        if dreaming:
            z, hidden = dream_starts(run, round_, generation)
            parts = candidates(vectors).split(DREAMERS)  # of the same size however many ranks there are, for equal bits
            dreams = {
                number: dream_returns(
                    agent.memory, parts[number], z, hidden, args.dream_steps, args.temperature, args.dream_dropout,
                    torch.Generator(run.device).manual_seed(args.seed * 1_000_000 + generation),
                ).cpu().double().numpy()
                for number in range(RANK, len(parts), RANKS)
            }  # fmt: skip
            dreams = functools.reduce(dict.__or__, gather(dreams))
            returns = np.concatenate([dreams[number] for number in range(len(parts))])
            driven = args.population * args.dream_starts * args.dream_steps
        else:
            first = TRAIN_TRACKS + args.seed * 10_000_000 + round_ * 1_000_000 + (generation - dreamt) * args.tracks
            seeds = range(first, first + args.tracks)
            jobs = [
                {"seed": seed, "controller": candidate, "limit": args.max_frames, "abort": True}
                for seed in seeds
                for candidate in range(args.population)
            ]
            results = run.drive(candidates(vectors), jobs)
            driven = sum(result["frames"] for result in results)
            returns = np.array([result["return"] for result in results]).reshape(args.tracks, -1).mean(0)
        if not np.isfinite(returns).all():
            raise Fault(f"A return of generation {generation} is not finite.")
        seconds = time.time() - started
        search.tell(-returns)
        state["step"] += 1
        bar.update()
        figures = f"mean {returns.mean():.0f}, best {returns.max():.0f}, sigma {search.sigma:.3f}"
        kind = "dream" if dreaming else "real"
        metrics = {f"{kind}/return_mean": returns.mean(), f"{kind}/return_best": returns.max()}
        metrics |= {f"{kind}/frames_per_second": driven / seconds, "search/sigma": search.sigma}
        metrics |= {"search/longest_axis": search.scales.max(), "search/shortest_axis": search.scales.min()}
        if not dreaming:
            metrics["real/tracks_per_hour"] = 3600 * len(jobs) / seconds
            figures += f", {metrics['real/tracks_per_hour']:.0f} tracks/hour"
        bar.set_postfix_str(figures)
        over = gather(state["elapsed"] + time.time() - run.clock)[0] > 3600 * args.hours and state["step"] < total
        if state["step"] % args.eval_interval == 0 or state["step"] in (dreamt, total) or over:
            metrics |= look(search)
            run.logger.board.add_histogram("search/axes", search.scales, run.iteration + 1)
            if dreaming:
                mean, place = candidates(search.mean[None])[0], tuple(part[:, :1] for part in hidden)
                film = picture_dream(agent, mean, z[:1], place, args.dream_steps, args.temperature)
                run.logger.film("dream", list(film), 50 / args.action_repeat, run.iteration + 1)
                if state["step"] - state["stage_best"]["step"] >= DISBELIEF * args.eval_interval:
                    bar.update(dreamt - state["step"])
                    state["step"] = dreamt  # what it finds is good in the dream alone
        if state["step"] == dreamt:  # the dream's word is not taken: reality chooses where the real search begins
            start = state["stage_best"]
            mean = start["controller"].numpy().ravel().astype(np.float64)
            search = start_search(mean, start["sigma"])
        state["search"] = search.state()
        run.log(metrics)
        if over:
            return False
    agent.controller.copy_(state["stage_best"]["controller"])
    state["search"] = state["stage_best"] = None
    return True


STAGE_FUNCTIONS = dict(zip(STAGES[:-1], (stage_collect, stage_vision, stage_memory, stage_controller), strict=True))


def train(args: Args, checkpoint: dict | None = None) -> None:
    """Runs the stages that are not done, round by round; writes runs/<name>/. Raises Fault."""
    folder = args.resume or Path("runs") / default_name(args)
    if not checkpoint and gather(folder.exists())[0]:
        raise UsageError(f"{folder} exists already: type --resume {folder} to go on with it, or another --name.")
    need = disk_need(args) / 1e9
    print(
        f"{folder}: footage of {args.rounds} x {args.collect_frames} pictures needs {need:.1f} GB of disk", flush=True
    )
    torch.set_num_threads(CORES)
    run = Run(args, folder, pick_device(args.device), checkpoint)
    go_on = f"type --resume {folder} to go on"
    try:
        if RANK == 0:
            folder.mkdir(parents=True, exist_ok=True)
            settings = json.dumps(args_to_plain(args) | {"made_on": run.made_on}, indent=2)
            (folder / "config.json").write_text(settings + "\n")
        run.open_logs()
        if not checkpoint:
            run.save()
        for round_, stage in still_to_do(args, run.state["done"]):
            if stage not in args.stages:
                break
            finished = STAGE_FUNCTIONS[stage](run, round_)
            run.bar.close()
            if finished is False:
                print(f"{args.hours:g} hours are over: type --resume {folder} --hours {2 * args.hours:g} to search on")
                break
            run.state["done"].append([round_, stage])
            run.state["step"] = 0
            run.save()
        gather(None)  # best.pt is written
        if "evaluate" in args.stages and (folder / "best.pt").exists():
            evaluate(args, load_checkpoint(folder / "best.pt"), folder, run.workers)
        print(f"done: type --evaluate {folder}/best.pt to drive other tracks, --dream {folder}/best.pt to see it dream")
    except KeyboardInterrupt:
        print(f"\nstopped; everything up to the last log is saved: {go_on}")
    except OSError as error:  # a full or vanished disk
        what = f"{error.filename or folder}: {error.strerror or error}"
        raise Fault(f"{what}. What was saved before is whole: put that right and {go_on}.") from error
    except Fault as error:
        raise Fault(f"{error} What was saved before is whole: {go_on} from there.") from error
    finally:
        run.bar.close()  # before main's sentence, which is to be the last line
        with contextlib.suppress(OSError):  # of a disk that is full still
            if run.logger:
                run.logger.close()
        run.workers.close()


def default_name(args: Args) -> str:
    """The run's folder under runs/, the same on all ranks, and after torchrun has started them again."""
    when = os.environ.get("TORCHELASTIC_RUN_ID", "")[:8] or time.strftime("%Y%m%d-%H%M%S")
    return args.name or f"carracing-seed{args.seed}-{when}"


def pick_device(name: str) -> torch.device:
    """The torch device for --device. Raises UsageError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA device: type --device cpu, or install a CUDA build of torch.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    own, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if own >= count:
        raise UsageError(f"Every rank needs a GPU of its own: type --nproc-per-node {count}, or --device cpu.")
    torch.cuda.set_device(own)
    return torch.device("cuda")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and films


def summarize(results: list[dict]) -> dict:
    """Figures of a set of rollouts, for evaluation.json."""
    returns = [result["return"] for result in results]
    spread = float(np.std(returns, ddof=1)) if len(returns) > 1 else 0.0
    return {
        "returns": returns,
        "mean": float(np.mean(returns)),
        "std": spread,
        "standard_error": spread / math.sqrt(len(returns)),
        "frames": [result["frames"] for result in results],
        "finished": sum(result["finished"] for result in results),
    }


def evaluate(args: Args, checkpoint: dict, folder: Path | None = None, workers: Workers | None = None) -> None:
    """Drives a checkpoint in Gymnasium's own CarRacing-v3; writes evaluation.json and best_lap.mp4."""
    agent, here = Agent(args.controller_input, args.action_repeat, args.sample_z), describe_setting()
    load_weights(agent, checkpoint, args.evaluate or folder)
    if folder is None:
        note_differences(checkpoint["made_on"], here)
        assert args.evaluate is not None
        folder = Path("runs") / f"{args.evaluate.stem}-carracing-{time.strftime('%Y%m%d-%H%M%S')}"
    own, workers = not workers, workers or Workers(min(args.workers or CORES, args.eval_episodes))
    seeds = list(range(args.eval_seed, args.eval_seed + args.eval_episodes))
    result = here | {"environment": "CarRacing-v3", "checkpoint": str(args.evaluate or folder / "best.pt")}
    result |= {"iteration": checkpoint["iteration"], "seeds": seeds}
    try:
        workers.load(agent)
        for world in ("gymnasium", "fast") if args.eval_fast else ("gymnasium",):
            jobs = [{"seed": seed, "controller": 0, "limit": 1000} for seed in seeds]
            summary = summarize(workers.drive(agent.controller[None], jobs, world))
            result |= summary if world == "gymnasium" else {"fast": summary}
            name = "CarRacing-v3" if world == "gymnasium" else "FastCarRacing, same tracks"
            score = f"{summary['mean']:.1f} +- {summary['std']:.1f} (standard error {summary['standard_error']:.1f})"
            print(f"{name}: {score} over {len(seeds)} tracks, {summary['finished']} finished", flush=True)
    finally:
        if own:
            workers.close()
    if RANK > 0:
        return
    print(f"gymnasium {here['gymnasium']}, box2d {here['box2d']}, seeds {seeds[0]} to {seeds[-1]}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    best = seeds[int(np.argmax(result["returns"]))]
    film_lap(agent, best, folder / "best_lap.mp4")
    print(f"written to {folder}/: evaluation.json, best_lap.mp4 (seed {best})")


class Film(GymnasiumCarRacing):
    """Gymnasium's environment that writes every second frame, at full size, with the action drawn on it."""

    def __init__(self, video: Any) -> None:
        super().__init__(render_mode="rgb_array")
        self.video, self.count = video, 0

    def step(self, action: np.ndarray) -> tuple:
        if self.count % 2 == 0:
            self.video.append_data(draw_action(np.asarray(self.env.render()), action))
        self.count += 1
        return super().step(action)


def draw_action(picture: np.ndarray, action: np.ndarray) -> np.ndarray:
    """The picture, uint8 (H, W, 3), with bars for steering (from the middle), gas (green) and brake (red)."""
    picture, (steer, gas, brake) = picture.copy(), np.clip(action, (-1, 0, 0), 1)
    picture[12:68, 12:144] = picture[12:68, 12:144] // 3
    middle, reach = 78, 60
    ends = sorted((middle, middle + round(reach * float(steer))))
    picture[18:30, ends[0] : ends[1] + 1] = (255, 255, 255)
    picture[36:46, 18 : 18 + round(2 * reach * float(gas))] = (90, 220, 90)
    picture[52:62, 18 : 18 + round(2 * reach * float(brake))] = (230, 70, 60)
    return picture


@torch.no_grad()
def film_lap(agent: Agent, seed: int, path: Path) -> None:
    """Drives a track once more, to film it: same seed, same controller, same lap."""
    import imageio.v2

    torch.set_num_threads(1)  # as in the workers: to the last bit the same
    jobs = iter([{"index": 0, "seed": seed, "controller": 0, "limit": 1000}])
    with imageio.v2.get_writer(path, fps=25, macro_block_size=2) as video:
        env = Film(video)
        drive([env], agent, agent.controller[None], lambda: next(jobs, None))
        env.close()


@torch.no_grad()
def film_dream(args: Args, checkpoint: dict) -> None:
    """Writes a film of reality, what V keeps of it and M's dream under the same actions; and a picture of V."""
    import imageio.v2
    import imageio.v3

    assert args.dream is not None
    if RANK > 0:
        return
    agent = Agent(args.controller_input, args.action_repeat, args.sample_z)
    load_weights(agent, checkpoint, args.dream)
    note_differences(checkpoint["made_on"], describe_setting())
    folder = Path("runs") / f"{args.dream.stem}-dream-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True)
    jobs = iter([{"index": 0, "seed": args.eval_seed, "controller": 0, "limit": args.max_frames, "keep": True}])
    (lap,) = drive([FastCarRacing()], agent, agent.controller[None], lambda: next(jobs, None))
    pictures, actions = torch.from_numpy(lap["pictures"]), torch.from_numpy(lap["rows"][:, :3]).float()
    mu = torch.cat([agent.vision.encode(part)[0] for part in pictures.split(100)])
    chance = {"generator": torch.Generator().manual_seed(args.seed)}
    state, dreamt = None, mu[:1]
    with imageio.v2.get_writer(folder / "dream.mp4", fps=50 / args.action_repeat, macro_block_size=2) as video:
        for t in range(len(pictures)):
            awake = t < DREAM_AWAKE or (t - DREAM_AWAKE) % DREAM_LENGTH == 0
            if awake:
                real_state, dreamt = state, mu[t : t + 1]
            imagined = to_pictures(agent.vision.decode(torch.cat([mu[t : t + 1], dreamt])))
            panels = np.concatenate([lap["pictures"][t : t + 1], imagined]).repeat(5, 1).repeat(5, 2)
            panels[2, :8] = (60, 60, 60) if awake else (230, 160, 40)  # a bar over the dream that is one
            video.append_data(np.concatenate(panels, 1))
            _, state = agent.memory(mu[t : t + 1, None], actions[t : t + 1, None], state)
            real_state = state if awake else agent.memory(dreamt[None], actions[t : t + 1, None], real_state)[1]
            dreamt = sample_next(agent.memory, real_state[0][0], 1, args.temperature, chance)[0]
    values = torch.linspace(-3, 3, 9)
    base = mu[len(mu) // 2]
    z = base.repeat(LATENTS, len(values), 1)
    z[torch.arange(LATENTS), :, torch.arange(LATENTS)] = values
    decoded = to_pictures(agent.vision.decode(z.flatten(0, 1))).reshape(2, LATENTS // 2, len(values), SIZE, SIZE, 3)
    grid = decoded.transpose(1, 3, 0, 2, 4, 5).reshape(LATENTS // 2 * SIZE, -1, 3)
    imageio.v3.imwrite(folder / "latents.png", grid)
    print(f"return {lap['return']:.1f} in the film (seed {args.eval_seed}, FastCarRacing)")
    print(f"written to {folder}/: dream.mp4 (reality, what V keeps of it, M's dream) and latents.png (-3 to 3 each)")


DREAM_AWAKE, DREAM_LENGTH = 30, 100  # actions of the film before the first dream, and until it wakes up


# ---------------------------------------------------------------------------------------------------------------------
# The command line

# Settings of one call, not of the run, and those of the run that may change when it is resumed
CALL = ("resume", "evaluate", "dream", "stages", "workers", "eval_fast")
OPEN = ("device", "rounds", "generations", "hours", "eval_episodes", "eval_seed", "eval_interval")


def args_to_plain(args: Args) -> dict:
    """Args as plain values for JSON and checkpoints; what belongs to one call only is left out."""
    plain = {name: value for name, value in dataclasses.asdict(args).items() if name not in CALL}
    return plain | {"init_from": args.init_from and str(args.init_from)}


def still_to_do(args: Args, done: Sequence) -> list[tuple[int, str]]:
    """Rounds and stages that are not done, in order."""
    every = [(round_, stage) for round_ in range(1, args.rounds + 1) for stage in STAGES[:-1]]
    return [pair for pair in every if list(pair) not in done]


def disk_need(args: Args) -> int:
    """Bytes of a run's footage, latents and checkpoints."""
    return args.rounds * args.collect_frames * (SIZE * SIZE * 3 + 4 * COLUMNS + 8 * LATENTS) + 200_000_000


def check_args(args: Args, done: Sequence = ()) -> Args:
    """Everything that can be known to be wrong before a process starts. Returns args; raises UsageError."""
    limits: dict[str, tuple[float, float]] = {}
    limits |= {name: (1, np.inf) for name in ("eval_interval", "tracks", "generations")}
    limits |= {name: (1, np.inf) for name in ("dream_starts", "dream_steps", "validation_tracks")}
    limits |= {name: (RANKS, np.inf) for name in ("vision_batch", "memory_batch")}
    limits |= {name: (0, np.inf) for name in ("vision_steps", "memory_steps", "dream_generations", "hours")}
    limits |= {"seed": (0, 70), "action_repeat": (1, 10), "population": (4, 10_000), "max_frames": (60, 1000)}
    limits |= {"rounds": (1, 99), "eval_seed": (0, 900_000), "eval_episodes": (1, 100_000)}  # then tracks to learn on
    limits |= {"collect_frames": (100, np.inf), "vision_lr": (0, 1), "memory_lr": (0, 1), "sigma": (1e-6, 10)}
    limits |= {"temperature": (0.01, 10), "dream_dropout": (0, 0.99)} | ({"workers": (1, 1024)} if args.workers else {})
    for name, (least, most) in limits.items():
        value, flag = getattr(args, name), name.replace("_", "-")
        if not least <= value <= most or value == math.inf:
            wanted = f"{least} or more" if most == np.inf else f"a number from {least:.4g} to {most}"
            raise UsageError(f"--{flag} is {value}: type {wanted}.")
    if not args.stages:
        raise UsageError(f"--stages names none: type some of {' '.join(STAGES)}, or leave it out.")
    if args.evaluate or args.dream:
        return args
    to_do, chosen = still_to_do(args, done), [stage for stage in STAGES if stage in args.stages]
    due = [stage for round_, stage in to_do if round_ == to_do[0][0]]  # in the round that is not done
    if all(stage != "controller" for _, stage in done):
        due.append("evaluate")
    runs = list(itertools.takewhile(chosen.__contains__, due))
    idle = [stage for stage in chosen if stage in due and stage not in runs]
    if to_do and not runs and chosen != ["evaluate"]:
        idle = idle or chosen
    if idle:
        before = due[: due.index(idle[-1])] if idle[-1] in due else due[:1]
        missing = [stage for stage in before if stage not in chosen]
        stages = " ".join(stage for stage in STAGES if stage in (*missing, *chosen))
        raise UsageError(f"The stage {idle[-1]} needs {' and '.join(missing)} first: type --stages {stages}.")
    where = next(path for path in (Path("runs").absolute(), Path.cwd()) if path.exists())
    free, need = shutil.disk_usage(where).free / 1e9, disk_need(args) / 1e9
    if need > free and not args.resume:  # else it has some of it already
        wanted = "type a smaller --collect-frames, or start in a folder on another disk"
        raise UsageError(f"The footage needs {need:.1f} GB and {where} has {free:.1f} GB free: {wanted}.")
    return args


def parse(argv: list[str]) -> tuple[Args, Any]:
    """The command line as Args, and the checkpoint that is resumed or used, whose settings are the defaults."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    started = Path("runs") / default_name(args)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (started / "last.pt").exists() and not args.resume:
        argv, args.resume = [*argv, "--resume", str(started)], started  # torchrun started it again after a fault
    path = args.evaluate or args.dream or (args.resume and args.resume / "last.pt")
    if not path:
        return check_args(tyro.cli(Args, args=argv, default=Args(**QUICK)) if args.quick else args), None
    checkpoint = load_checkpoint(path)
    default = Args(**checkpoint["args"])
    default.init_from = default.init_from and Path(default.init_from)
    saved = args_to_plain(default)
    args = tyro.cli(Args, args=argv, default=default)
    changed = [name for name, value in args_to_plain(args).items() if value != saved[name] and name not in OPEN]
    learnt = [name for name in ("action_repeat", "controller_input") if name in changed]
    if args.resume and changed or learnt:
        changed = learnt or changed
        flag = changed[0].replace("_", "-")
        raise UsageError(f"A resumed run keeps its own settings: leave out --{flag}, or start anew with --name.")
    return check_args(args, checkpoint.get("done", ())), checkpoint


def main() -> None:
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        # Keep freed memory instead of handing every large tensor back to the kernel: learning takes half the time.
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    code, sentence = 0, None
    try:
        args, checkpoint = parse(sys.argv[1:])
        if RANKS > 1:
            join_ranks(pick_device(args.device))
        if args.evaluate:
            evaluate(args, checkpoint)
        elif args.dream:
            film_dream(args, checkpoint)
        else:
            train(args, checkpoint)
    except UsageError as error:
        code, sentence = 2, str(error)
    except (Fault, OSError) as error:
        code, sentence = 1, str(error)
    except KeyboardInterrupt:
        code = 130
    if sentence:
        print(sentence, file=sys.stderr)
    if dist.is_initialized() and not code:
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
