"""World Models (Ha & Schmidhuber 2018, arXiv:1803.10122) learns CarRacing-v3 from pixels.

A variational autoencoder sees (V), a recurrent network with a mixture density output remembers and
foretells (M), and a linear controller of 867 weights drives (C), found by CMA-ES (Hansen 2016,
arXiv:1604.00772), in M's dream first and then on real tracks. This is repeated in rounds: from the
second on, V and M see C's own driving.

    python worldmodel_carracing.py                              # all of it; lands in runs/<name>/
    python worldmodel_carracing.py --quick                      # the same in minutes
    python worldmodel_carracing.py --resume runs/<name>         # go on as if never stopped
    python worldmodel_carracing.py --evaluate runs/<name>/best.pt
    python worldmodel_carracing.py --dream runs/<name>/best.pt  # a film of the dream beside reality

The first takes up to 7.4 hours; an earlier version scored 872 with --hours 1.62, on two cores.
"""

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads would spin on the games' cores
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import Box2D
import filelock
import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pygame
import torch
import torch.nn.functional as F
import tyro
from gymnasium.envs.box2d import car_dynamics, car_racing
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- Settings -------------------------------------------------------------------------------------


class UsageError(ValueError):
    """What was typed, or what the machine lacks: one sentence on what to type (exit code 2)."""


BOUNDS = {  # the least and the most that may be typed, and for what
    (0, 70): "seed",
    (0, 900_000): "eval_seed",  # beyond are the tracks to learn on
    (1, 100_000): "action_repeat rounds eval_episodes eval_interval workers tracks generations "
    "validation_tracks dream_starts dream_steps",
    (4, 10_000): "population",
    (60, 1000): "max_frames",
    (100, 10**9): "collect_frames",
    (0, 10**9): "vision_steps memory_steps dream_generations hours",
    (0, 0.99): "vision_lr memory_lr dream_dropout",
    (0.01, 10): "temperature",
}
Stage = Literal["collect", "vision", "memory", "dream", "real", "evaluate"]


def usable_cores() -> int:
    """Cores that this process may use: by its affinity, its container's quota and OMP_NUM_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return min(cores, int(os.environ.get("OMP_NUM_THREADS") or cores))


@dataclasses.dataclass
class Args:
    """World Models that drive CarRacing-v3 from pixels. No flag is needed."""

    seed: int = 1  # seed of the networks, the minibatches, the driving, the search and its tracks
    name: str | None = None  # the run's folder under runs/ (default: seed and time)
    resume: Path | None = None  # run folder to go on with; what you type beside it wins
    init_from: Path | None = None  # checkpoint to take V, M and C from, and nothing else
    evaluate: Path | None = None  # checkpoint to drive in Gymnasium's own CarRacing-v3; no learning
    dream: Path | None = None  # checkpoint to film dreaming beside reality; no learning
    quick: bool = False  # settings for a run of minutes, where you type no others
    stages: tuple[Stage, ...] = get_args(Stage)  # stages to run now
    rounds: int = 4  # times through the stages; C is searched on real tracks in the last
    eval_episodes: int = 100  # tracks per evaluation
    eval_seed: int = 1000  # seed of the first evaluation track; the others follow
    eval_interval: int = 10  # generations between the mean controller's validations
    workers: int = usable_cores()  # driving processes
    device: Literal["auto", "cpu"] = "auto"  # where V and M learn; auto takes a GPU if any

    # Collect, V and M
    action_repeat: int = 2  # frames that every action lasts, in learning and in scores alike
    collect_frames: int = 100_000  # pictures to collect in a round, one for each action
    vision_steps: int = 3000  # minibatches of V in the first round; in round r it takes 1/r of them
    vision_lr: float = 5e-4  # Adam's step size for V as a round begins; it falls to a tenth
    memory_steps: int = 1500  # minibatches of M in the first round, as with V; 0 leaves M untrained
    memory_lr: float = 1e-3  # Adam's step size for M, as with V

    # C
    controller_input: Literal["zh", "z"] = "zh"  # what C sees: V's latents with M's state, or alone
    population: int = 128  # candidates of a generation
    tracks: int = 4  # tracks that every candidate of a generation drives, the same for all
    generations: int = 1000  # generations on real tracks in the last round, at most
    hours: float = 7.4  # of learning, after which the search rests; resume with more to go on
    max_frames: int = 1000  # frames after which a rollout ends
    validation_tracks: int = 64  # tracks that score the mean controller and choose best.pt
    dream_generations: int = 100  # generations in the dream, in every round, at most
    dream_starts: int = 8  # places from which every candidate dreams
    dream_steps: int = 150  # actions of a dream
    temperature: float = 1.15  # of the dream: above 1, it is less certain than M believes
    dream_dropout: float = 0.1  # share of M's hidden state dropped before it foretells

    def __post_init__(self) -> None:
        for (least, most), names in BOUNDS.items():
            for name in names.split():
                value = getattr(self, name)
                if not least <= value <= most:
                    raise UsageError(f"--{name.replace('_', '-')} is {value}: type a number from {least} to {most}.")


QUICK = """--rounds 2 --collect-frames 8000 --vision-steps 300 --vision-lr 0.001 --memory-steps 300
    --population 32 --generations 15 --validation-tracks 16 --dream-generations 10 --dream-steps 100
    --eval-interval 5 --eval-episodes 8"""  # what --quick stands for; what is typed beside it wins


# --- The environment: Gymnasium's physics and tracks, drawn straight at the size that V sees ------

SIZE = 64  # pixels of V's picture
ROWS = 84  # rows of Gymnasium's 96 x 96 picture above its indicators
DRAWN = 3 * SIZE  # pictures are drawn at three times the size and shrunk, which smooths their edges
WIDTH, HEIGHT = car_racing.WINDOW_W, car_racing.WINDOW_H * ROWS / car_racing.STATE_H  # seen by V
MAP = 2048  # pixels of a track's map, about as fine as what is drawn of it
SCALE = MAP / 2 / car_racing.PLAYFIELD  # its pixels a metre
# beyond the lawn, the lawn, its squares, three shades of road, two of kerb, the car
NAMES = "black #66cc66 #66e666 #666666 #686868 #6b6b6b white red #cc0000"
COLOURS = list(map(ImageColor.getrgb, NAMES.split()))
BLACK, LAWN, SQUARES, ROAD, CAR = 0, 1, 2, 3, 8  # places in it
METRE = car_dynamics.SIZE  # of the car's parts, a bit smaller since what Pillow draws has a border
X, Y = 0.7 * METRE * car_dynamics.WHEEL_W, 0.7 * METRE * car_dynamics.WHEEL_R
WHEEL = [(-X, Y), (X, Y), (X, -Y), (-X, -Y)]
HULL = [np.array(getattr(car_dynamics, f"HULL_POLY{i}")) * 0.9 * METRE for i in (1, 2, 3, 4)]


def shrink(picture: np.ndarray) -> np.ndarray:
    """Gymnasium's picture, uint8 (96, 96, 3), as V sees it: no indicators, (64, 64, 3)."""
    pixels = torch.from_numpy(picture[:ROWS]).permute(2, 0, 1).float()
    lines = F.avg_pool2d(pixels.repeat_interleave(16, 1), (21, 1))  # 84 * 16 is 64 * 21
    columns = F.avg_pool2d(lines.repeat_interleave(2, 2), (1, 3))  # 96 * 2 is 64 * 3
    return columns.round().byte().permute(1, 2, 0).numpy()


def on_map(polygon: Any) -> list[float]:
    """Metres of the world as pixels of the map: a list of numbers, as Pillow takes it."""
    return ((np.asarray(polygon) + car_racing.PLAYFIELD) * SCALE).ravel().tolist()


class FastCarRacing(car_racing.CarRacing):
    """Gymnasium's CarRacing, drawn at once as V sees it, uint8 (64, 64, 3): many times faster, from a
    map drawn once a track, within a mean of 1 level of 255 of `shrink` of Gymnasium's picture."""

    place = 0.0  # share of the track at which the next episode starts
    blind = False  # whether nothing is to be drawn

    def _create_track(self) -> bool:
        if not super()._create_track():
            return False
        lawn = np.full((40, 40), LAWN, np.uint8)
        lawn[::2, ::2] = SQUARES
        self.map = Image.fromarray(lawn).resize((MAP, MAP), Image.Resampling.NEAREST)
        palette = (np.array(COLOURS) - 2).clip(0)  # shrinking takes 2 levels of Gymnasium's colours
        self.map.putpalette(palette.astype(np.uint8).tobytes())
        self.pen, self.untouched = ImageDraw.Draw(self.map), self.road
        for polygon, colour in self.road_poly:
            self.pen.polygon(on_map(polygon), COLOURS.index(tuple(int(level) for level in colour)))
        start = int(self.place * len(self.track))
        self.track = self.track[start:] + self.track[:start]
        return True

    def _render(self, mode: str) -> np.ndarray | None:
        if self.blind:
            return None
        if len(self.road) - len(self.untouched) < self.tile_visited_count:  # touched road is darker
            for tile in [tile for tile in self.untouched if tile.road_visited]:
                self.pen.polygon(on_map(tile.fixtures[0].shape.vertices), ROAD)
            self.untouched = [tile for tile in self.untouched if not tile.road_visited]
        zoom = car_racing.SCALE * (0.1 * max(1 - self.t, 0) + car_racing.ZOOM * min(self.t, 1))
        right, up = zoom * DRAWN / WIDTH, zoom * DRAWN / HEIGHT  # pixels a metre; the nose is up
        across, along = DRAWN / 2, DRAWN * (1 - 100 / HEIGHT)  # where the car's middle is
        (x, y), angle = self.car.hull.position, self.car.hull.angle
        cos, sin = math.cos(angle), math.sin(angle)
        a, b, d, e = SCALE * cos / right, SCALE * sin / up, SCALE * sin / right, -SCALE * cos / up
        left, low = on_map((x, y))
        view = (a, b, left - a * across - b * along, d, e, low - d * across - e * along)
        picture = self.map.transform((DRAWN, DRAWN), Image.Transform.AFFINE, view, fillcolor=BLACK)
        pen = ImageDraw.Draw(picture)
        for wheel in self.car.wheels:
            dx, dy = wheel.position[0] - x, wheel.position[1] - y
            u, v = cos * dx + sin * dy, cos * dy - sin * dx  # metres to the right and ahead
            c, s = math.cos(wheel.angle - angle), math.sin(wheel.angle - angle)
            corners = [(u + i * c - j * s, v + i * s + j * c) for i, j in WHEEL]
            pen.polygon([(across + i * right, along - j * up) for i, j in corners], BLACK)
        for polygon in HULL:
            pen.polygon((polygon * (right, -up) + (across, along)).ravel().tolist(), CAR)
        return np.array(picture.convert("RGB").reduce(3))


def gymnasium_car_racing() -> gym.Env:
    """Gymnasium's own CarRacing-v3, untouched, with its time limit; its picture is shrunk for V."""
    space = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
    return gym.wrappers.TransformObservation(gym.make("CarRacing-v3"), shrink, space)


# --- V, M and C -----------------------------------------------------------------------------------

LATENTS, HIDDEN, MIXTURES = 32, 256, 5
KL_FLOOR = 0.5 * LATENTS  # nats of a picture; less information than this is not rewarded
LOG_SIGMA = (-5.0, 2.0)  # range of a mixture component's log standard deviation
REWARDS = (-1.0, 10.0)  # range that M learns; leaving the lawn costs 100


class Vision(nn.Module):
    """V, the paper's convolutional variational autoencoder (appendix A.1): 4,348,547 parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128), (128, 256)):
            layers += [nn.Conv2d(before, after, 4, 2), nn.ReLU()]
        self.encoder = nn.Sequential(*layers, nn.Flatten())  # 64 -> 31 -> 14 -> 6 -> 2 pixels
        self.mu, self.logvar = nn.Linear(1024, LATENTS), nn.Linear(1024, LATENTS)
        self.widen = nn.Linear(LATENTS, 1024)
        layers = []
        for before, after, kernel in ((1024, 128, 5), (128, 64, 5), (64, 32, 6), (32, 3, 6)):
            layers += [nn.ConvTranspose2d(before, after, kernel, 2), nn.ReLU()]
        self.decoder = nn.Sequential(*layers[:-1], nn.Sigmoid())  # 1 -> 5 -> 13 -> 30 -> 64 pixels
        self.to(memory_format=torch.channels_last)  # the encoder is a third faster so

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, both (N, 32), of pictures uint8 (N, 64, 64, 3)."""
        features = self.encoder(pictures.permute(0, 3, 1, 2).float() / 255)  # channels_last
        return self.mu(features), self.logvar(features)

    def decode(self, z: Tensor) -> Tensor:
        """Pictures float (N, 3, 64, 64) in [0, 1] of latents (N, 32)."""
        return self.decoder(self.widen(z)[:, :, None, None])

    def show(self, z: Tensor) -> np.ndarray:
        """The same as uint8 numpy (N, 64, 64, 3)."""
        return (self.decode(z).permute(0, 2, 3, 1) * 255).round().byte().numpy()


def vision_loss(decoded: Tensor, pictures: Tensor, mu: Tensor, logvar: Tensor) -> tuple:
    """Summed squared error plus KL divergence (Kingma & Welling 2014, appendix B) with a floor, and
    the two: means over N. decoded: (N, 3, H, W) in [0, 1]; pictures: uint8 (N, H, W, 3); mu, logvar: (N, 32)."""
    error = (decoded - pictures.permute(0, 3, 1, 2) / 255).square().sum((1, 2, 3))
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)
    return (error + kl.clamp(min=KL_FLOOR)).mean(), error.mean(), kl.mean()


class Memory(nn.Module):
    """M, the paper's LSTM with a mixture output, 422,368 parameters, and a head for outcomes."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(LATENTS + 3, HIDDEN)
        self.lstm.get_parameter("bias_hh_l0").requires_grad_(False).zero_()  # one bias is enough
        self.mixture = nn.Linear(HIDDEN, 3 * MIXTURES * LATENTS)
        self.outcome = nn.Linear(HIDDEN, 2)

    def forward(self, z: Tensor, actions: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Hidden states (T, N, 256) after z (T, N, 32) and actions (T, N, 3); the last state, two (1, N, 256)."""
        return self.lstm(torch.cat([z, actions], -1), state)

    def foretell(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """The next latents' log weights, means and log deviations (..., 32, 5); reward, logit of the end (...)."""
        logits, mu, log_sigma = self.mixture(hidden).unflatten(-1, (3, LATENTS, MIXTURES)).unbind(-3)
        reward, end = self.outcome(hidden).unbind(-1)
        return logits.log_softmax(-1), mu, log_sigma.clamp(*LOG_SIGMA), reward, end


def mixture_nll(z: Tensor, log_pi: Tensor, mu: Tensor, log_sigma: Tensor) -> Tensor:
    """NLL (...) in nats of latents z (..., 32) under Gaussian mixtures (..., 32, 5) (Bishop 1994, eq. 29)."""
    error = (z[..., None] - mu) * torch.exp(-log_sigma)
    log_prob = -0.5 * error.square() - log_sigma - 0.5 * math.log(2 * math.pi)
    return -torch.logsumexp(log_pi + log_prob, -1).sum(-1)


def memory_loss(memory: Memory, z: Tensor, targets: Tensor, rows: Tensor, lengths: Tensor) -> tuple:
    """M's loss over padded episodes, NLL a latent, reward's and end's error: means over real frames.
    z, targets: (T, N, 32), two samples of the latents; rows: (T, N, 9), see COLUMNS; lengths: (N,). Frame t
    foretells the latents of t + 1: an episode's last has none to foretell."""
    frames = torch.arange(len(z), device=z.device)[:, None]
    real, followed = frames < lengths, frames < lengths - 1
    log_pi, mu, log_sigma, reward, end = memory.foretell(memory(z, rows[..., :3])[0])
    nll = mixture_nll(targets[1:], log_pi[:-1], mu[:-1], log_sigma[:-1])[followed[:-1]].mean() / LATENTS
    reward_error = (reward - rows[..., 3])[real].square().mean()
    end_error = F.binary_cross_entropy_with_logits(end[real], rows[..., 5][real])
    return nll + reward_error + end_error, nll, reward_error, end_error


class Agent(nn.Module):
    """V, M and C, which is linear: (3, 289) for 288 inputs and a bias, or (3, 33) where it sees z alone.
    They begin with a checkpoint's weights, from `path`. Raises UsageError where those do not fit."""

    def __init__(self, args: Args, checkpoint: dict | None = None, path: Path | None = None) -> None:
        super().__init__()
        self.vision, self.memory, self.repeat = Vision(), Memory(), args.action_repeat
        inputs = LATENTS + (HIDDEN if args.controller_input == "zh" else 0)
        self.register_buffer("controller", torch.zeros(3, inputs + 1))
        try:
            self.load_state_dict(checkpoint["agent"] if checkpoint else self.state_dict())
        except (KeyError, RuntimeError) as error:
            raise UsageError(f"{path} holds other networks: type its own settings.") from error


def act(z: Tensor, hidden: Tensor, controllers: Tensor) -> tuple[Tensor, Tensor]:
    """C's wishes and actions, both (N, 3), by z (N, 32), hidden (N, 256); controllers (N, 3, I). An
    action is tanh of the wish: steering as it is, gas from [-1, 1], brake from [0, 1]."""
    inputs = torch.cat([z, hidden], -1)[:, : controllers.shape[-1] - 1]
    wishes = (controllers[..., :-1] @ inputs[..., None])[..., 0] + controllers[..., -1]
    steer, gas, brake = wishes.tanh().unbind(-1)
    return wishes, torch.stack([steer, (gas + 1) / 2, brake.clamp(0, 1)], -1)


# --- The dream, and CMA-ES ------------------------------------------------------------------------


def sample_next(memory: Memory, hidden: Tensor, starts: int, temperature: float, chance: Any) -> tuple:
    """The next latents (N, 32), reward (N,) and logit of the end (N,) after hidden states (N, 256),
    drawn from M's mixture, its logits divided by the temperature and its variances multiplied by
    it. Rows i and i + starts share their chances, of the torch.Generator `chance`."""
    log_pi, mu, log_sigma, reward, end = memory.foretell(hidden)
    repeats, draw = len(hidden) // starts, {"generator": chance, "device": hidden.device}
    uniform = torch.rand(starts, LATENTS, 1, **draw).repeat(repeats, 1, 1)
    normal = torch.randn(starts, LATENTS, **draw).repeat(repeats, 1)
    bounds = (log_pi / temperature).softmax(-1).cumsum(-1)[..., :-1]
    component = (uniform > bounds).sum(-1, keepdim=True)
    sigma = log_sigma.gather(-1, component)[..., 0].exp() * math.sqrt(temperature)
    return mu.gather(-1, component)[..., 0] + sigma * normal, reward, end


@torch.no_grad()
def dream_returns(args: Args, memory: Memory, controllers: Tensor, z: Tensor, state: Any, seed: int) -> Tensor:
    """Mean return (P,) that every controller (P, 3, I) gets in M's dream. It starts at real places,
    shared by all, as are its chances: z (S, 32), state, a pair of (1, S, 256). Dropout hits what M
    foretells from, not what C sees: else C finds what M is wrong about and lives on that."""
    population, starts = len(controllers), len(z)
    chance = torch.Generator(z.device).manual_seed(seed)
    z = z.repeat(population, 1)  # (P * S, 32), controller by controller
    state = tuple(part.repeat(1, population, 1) for part in state)
    weights = controllers.to(z.device).repeat_interleave(starts, 0)
    returns, alive = torch.zeros(len(z), device=z.device), torch.ones(len(z), device=z.device)
    for _ in range(args.dream_steps):
        _, actions = act(z, state[0][0], weights)
        hidden, state = memory(z[None], actions[None], state)
        kept = torch.rand(starts, HIDDEN, generator=chance, device=z.device) >= args.dream_dropout
        kept = (kept / (1 - args.dream_dropout)).repeat(population, 1)
        z, reward, end = sample_next(memory, hidden[0] * kept, starts, args.temperature, chance)
        returns += alive * reward.clamp(*REWARDS)
        alive *= 1 - end.sigmoid()
    return returns.view(population, starts).mean(1)


class CMAES:
    """Covariance matrix adaptation evolution strategy with the defaults of Hansen's tutorial
    (arXiv:1604.00772, figure 6 and table 1). It minimizes, from a mean of any shape. A generation's
    noise depends on the seed and its number alone. All that changes is in vars(search)."""

    def __init__(self, mean: Tensor, sigma: float, population: int, seed: int = 0) -> None:
        n, self.shape = mean.numel(), mean.shape
        self.population, self.seed = population, seed
        raw = math.log((population + 1) / 2) - torch.arange(1, population + 1).double().log()
        good, bad = raw[raw > 0], raw[raw <= 0]
        self.mu_eff = float(good.sum() ** 2 / (good**2).sum())
        mu_eff_bad = float(bad.sum() ** 2 / (bad**2).sum())
        self.c_sigma = (self.mu_eff + 2) / (n + self.mu_eff + 5)
        self.d_sigma = 1 + 2 * max(0, math.sqrt((self.mu_eff - 1) / (n + 1)) - 1) + self.c_sigma
        self.c_c = (4 + self.mu_eff / n) / (n + 4 + 2 * self.mu_eff / n)
        self.c_1 = 2 / ((n + 1.3) ** 2 + self.mu_eff)
        rank_mu = 2 * (0.25 + self.mu_eff + 1 / self.mu_eff - 2) / ((n + 2) ** 2 + self.mu_eff)
        self.c_mu = min(1 - self.c_1, rank_mu)
        least = min(1 + self.c_1 / self.c_mu, 1 + 2 * mu_eff_bad / (self.mu_eff + 2))
        least = min(least, (1 - self.c_1 - self.c_mu) / (n * self.c_mu))
        self.weights = torch.where(raw > 0, raw / good.sum(), raw / -bad.sum() * least)
        self.expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))  # a vector's length
        self.mean, self.sigma = mean.double().flatten(), sigma
        self.path_sigma, self.path_c = torch.zeros(2, n).double()
        self.C, self.basis = torch.eye(n).double(), torch.eye(n).double()
        self.scales = torch.ones(n).double()  # C = basis diag(scales ** 2) basis.T
        self.generation = self.decomposed = 0

    def ask(self) -> Tensor:
        """The generation's candidates, (population, *shape)."""
        noise = np.random.default_rng([self.seed, self.generation])
        normal = torch.from_numpy(noise.standard_normal((self.population, len(self.mean))))
        self.steps = (normal * self.scales) @ self.basis.T
        return (self.mean + self.sigma * self.steps).float().view(-1, *self.shape)

    def tell(self, costs: Tensor) -> None:
        """Takes the costs (population,) of what `ask` gave; moves on to the next generation."""
        n, steps = len(self.mean), self.steps[costs.argsort(stable=True)]
        whitening = self.basis / self.scales @ self.basis.T  # C's inverse root
        step = self.weights.clamp(min=0) @ steps
        self.mean = self.mean + self.sigma * step
        self.generation += 1

        # The paths: where the steps of the last generations add up to
        pull = math.sqrt(self.c_sigma * (2 - self.c_sigma) * self.mu_eff)
        self.path_sigma = (1 - self.c_sigma) * self.path_sigma + pull * step @ whitening
        length = float(self.path_sigma.norm())
        settled = math.sqrt(1 - (1 - self.c_sigma) ** (2 * self.generation))
        not_stalled = length / settled < (1.4 + 2 / (n + 1)) * self.expected
        pull = not_stalled * math.sqrt(self.c_c * (2 - self.c_c) * self.mu_eff)
        self.path_c = (1 - self.c_c) * self.path_c + pull * step

        # The distribution's shape and size
        lengths = (steps @ whitening).square().sum(1)
        weights = torch.where(self.weights >= 0, self.weights, self.weights * n / lengths)
        lost = (1 - not_stalled) * self.c_c * (2 - self.c_c)
        self.C *= 1 + self.c_1 * lost - self.c_1 - self.c_mu * float(self.weights.sum())
        self.C += self.c_1 * self.path_c.outer(self.path_c)
        self.C += self.c_mu * (steps.T * weights) @ steps
        growth = self.c_sigma / self.d_sigma * (length / self.expected - 1)
        self.sigma *= math.exp(min(1, growth))
        if self.generation - self.decomposed > 1 / (self.c_1 + self.c_mu) / n / 10:
            self.C = (self.C + self.C.T) / 2
            values, self.basis = torch.linalg.eigh(self.C)
            self.scales, self.decomposed = values.clamp(min=1e-20).sqrt(), self.generation


# --- Driving: batches of environments in every process of a pool ----------------------------------

SLOTS = 16  # environments of a process, made once and seen by V in one batch
environments = functools.cache(lambda make: [make() for _ in range(SLOTS)])
PATIENCE, GRACE = 20, 50  # frames without reward that make a rollout hopeless, but for the first
COLUMNS = 9  # of a row: action (3), reward, first of its episode, terminated after it, C's wish (3)


class Rollout:
    """A job on its way in an environment. A job is a dict: `seed` (of the track), `controller` (its
    row), `limit` (frames), and optionally `place` (where to start), `noise` (seed, kind), `abort`
    (end it where it is hopeless) and `film` (return the pictures)."""

    def __init__(self, env: Any, job: dict) -> None:
        self.env, self.job = env, job
        env.blind = False
        env.place = job.get("place", 0.0)
        self.obs = env.reset(seed=job["seed"])[0]
        self.rng = np.random.default_rng([job["seed"], *job.get("noise", ())])
        self.noise, self.idle = np.zeros(3), 0  # idle: frames since the last reward
        self.result: dict = {"return": 0.0, "frames": 0, "rows": [], "pictures": []}

    def disturb(self, own: np.ndarray) -> np.ndarray:
        """An action (3,) to collect with: random, correlated in time (kind 0), or C's own, disturbed
        steadily (1), thrown off now and then, to see how it finds back (2), or as it is (3)."""
        kind = self.job["noise"][1]
        self.noise = 0.95 * self.noise + math.sqrt(1 - 0.95**2) * self.rng.standard_normal(3)
        if kind == 0:
            own = self.noise * (0.7, 0.5, 0.4) + (0, 0.35, -0.4)
        elif kind == 1:
            own = own + self.noise * (0.3, 0.3, 0.1)
        elif kind == 2 and self.result["frames"] % 90 < 16:
            own = own + self.noise * (1.0, 0.5, 0.2)
        return np.clip(own, (-1, 0, 0), (1, 1, 1)).astype(np.float32)

    def play(self, action: np.ndarray, wish: np.ndarray, repeat: int) -> bool:
        """Plays an action (3,), in answer to C's wish (3,), for `repeat` frames. Returns whether it is over.
        A hopeless rollout is charged as if it had stood still until the limit: else giving up would pay."""
        result, limit, earned = self.result, self.job["limit"], 0.0
        if self.job.get("film"):
            result["pictures"].append(self.obs)
        last = min(result["frames"] + repeat, limit)
        for frame in range(result["frames"] + 1, last + 1):
            self.env.blind = frame < last
            self.obs, reward, terminated, truncated, info = self.env.step(action)
            earned += float(reward)
            self.idle = self.idle + 1 if reward < 0 else 0
            if terminated or truncated:
                break
        result["rows"].append([*action, earned, not result["rows"], terminated, *wish])
        hopeless = self.job.get("abort") and self.idle >= PATIENCE and frame > GRACE
        if hopeless and not terminated:
            earned -= 0.1 * (limit - frame)
        result["return"] += earned
        result["frames"] = frame
        over = terminated or truncated or hopeless or frame == limit
        if over:
            result["finished"] = info.get("lap_finished", False)
            result["rows"] = np.array(result["rows"], np.float32)
            result["pictures"] = np.array(result["pictures"])
        return over


@torch.no_grad()
def drive(envs: list, agent: Agent, controllers: Tensor, jobs: list[dict]) -> list[dict]:
    """Plays jobs (see Rollout) with controllers (P, 3, I). Returns a dict for each: return, frames,
    finished, rows (T, 9), see COLUMNS, and pictures, uint8 (T, 64, 64, 3) or none. V and M always see SLOTS
    rows, on whose number their last bits depend: a job's result must not depend on its neighbours."""
    waiting, results = jobs[::-1], []
    rollouts: dict[int, Rollout] = {}
    obs = np.zeros((SLOTS, SIZE, SIZE, 3), np.uint8)
    state = (torch.zeros(1, SLOTS, HIDDEN), torch.zeros(1, SLOTS, HIDDEN))
    weights = torch.zeros(SLOTS, *controllers.shape[1:])
    while waiting or rollouts:
        free = [i for i in range(len(envs)) if i not in rollouts]
        for i in free[: len(waiting)]:
            rollouts[i] = Rollout(envs[i], waiting.pop())
            results.append(rollouts[i].result)  # which it fills
            obs[i], weights[i] = rollouts[i].obs, controllers[rollouts[i].job["controller"]]
            state[0][0, i] = state[1][0, i] = 0
        z, _ = agent.vision.encode(torch.from_numpy(obs))
        wishes, actions = act(z, state[0][0], weights)
        for i, rollout in list(rollouts.items()):
            if "noise" in rollout.job:
                actions[i] = torch.from_numpy(rollout.disturb(actions[i].numpy()))
            if rollout.play(actions[i].numpy().copy(), wishes[i].numpy(), agent.repeat):
                del rollouts[i]
            else:
                obs[i] = rollout.obs
        _, state = agent.memory(z[None], actions[None], state)
    return results


def join_pool() -> None:
    """Prepares a driving process: it has one thread, ends with its parent and ignores Ctrl-C."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def drive_share(share: tuple) -> list[dict]:
    """In a driving process: the results of its share of the jobs."""
    networks, jobs, make = share
    return drive(environments(make), *pickle.loads(networks), jobs)


class Drivers:
    """So many processes that drive; they start with the first jobs."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.pool: Any = None

    def drive(self, agent: Agent, controllers: Tensor, jobs: list, make: Callable = FastCarRacing) -> list:
        """The results of `drive` with the agent's V and M. Raises SystemExit if processes die."""
        # Bytes travel whole; of a tensor only a file descriptor would, and those are few
        networks = pickle.dumps((copy.deepcopy(agent).cpu(), controllers.cpu()))
        shares = [(networks, jobs[i :: self.workers], make) for i in range(self.workers)]
        results = [{} for _ in jobs]
        for _ in range(3):
            self.pool = self.pool or ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), join_pool)
            try:
                for i, answer in enumerate(self.pool.map(drive_share, shares)):
                    results[i :: self.workers] = answer
                return results
            except BrokenProcessPool:  # one has died: all drive once more, to the same results
                self.pool = None
        raise SystemExit("A driving process died 3 times in a row: type fewer --workers.")


# --- Save and load --------------------------------------------------------------------------------


def save(contents: dict, path: Path) -> None:
    """Writes a checkpoint; a crash at any moment leaves either the old file or the new one."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    path.with_suffix(".tmp").write_bytes(buffer.getvalue())
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path: Path, stage: str | None = None) -> dict:
    """A checkpoint, of that stage if any, its "args" as Args; nothing in it is executed. Raises UsageError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if stage and checkpoint["stage"]["name"] != stage:
            raise KeyError(stage)
        known = {field.name for field in dataclasses.fields(Args)} - {"init_from"}
        settings = {name: value for name, value in checkpoint["args"].items() if name in known}
        return checkpoint | {"args": Args(**settings)}  # without what only older scripts could set
    except UsageError:  # settings that it cannot have been saved with by this script
        raise
    except FileNotFoundError:
        raise UsageError(f"There is no {path}: type the path of a last.pt or best.pt.") from None
    except Exception as error:  # whatever may be in a file
        raise UsageError(f"{path} is not a checkpoint of this script: type another.") from error


@contextlib.contextmanager
def hold_folder(folder: Path, resumed: bool) -> Iterator[Path]:
    """A run's folder while no other process may write it; says then how to go on. Raises UsageError."""
    quoted = shlex.quote(str(folder))
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    if int(os.environ.get("RANK", 0)) > 0:
        yield folder
        return
    try:
        folder.mkdir(parents=True, exist_ok=resumed)
        lock.acquire()
    except FileExistsError:
        hint = f", or --resume {quoted}" if (folder / "last.pt").exists() else ""
        raise UsageError(f"There is a run {folder}: type another --name{hint}") from None
    except filelock.Timeout:
        raise UsageError(f"{folder} belongs to a run that goes on: type another --name.") from None
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}): type cd /a/folder first") from error
    try:
        yield folder
    finally:
        if (folder / "last.pt").exists():
            print(f"saved: type --resume {quoted} to go on, --evaluate {quoted}/last.pt to race it")
        lock.release()
        (folder / ".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # nothing came of it
            folder.rmdir()
            folder.parent.rmdir()


class Journal:
    """What the stages share, and the state to go on from: rows of figures (iteration), frames driven,
    seconds, frames and score of every validation, the stage on its way (name, round, step, its needs)."""

    def __init__(self, args: Args, folder: Path, agent: Agent, checkpoint: dict) -> None:
        self.args, self.folder, self.agent, self.device = args, folder, agent, agent.controller.device
        self.drivers, self.clock = Drivers(args.workers), time.time()
        new = {"iteration": 0, "frames": 0, "seconds": 0.0, "scores": [], "stage": {}}
        self.state = {name: checkpoint.get(name, value) for name, value in new.items()}
        self.board = SummaryWriter(folder, purge_step=self.state["iteration"] + 1)

    def write(self, figures: dict) -> None:
        """Writes a row of figures."""
        self.state["iteration"] += 1
        self.state["seconds"] += time.time() - self.clock
        self.clock = time.time()
        figures |= {"charts/frames": self.state["frames"], "charts/elapsed_seconds": self.state["seconds"]}
        for tag, value in figures.items():
            self.board.add_scalar(tag, value, self.state["iteration"])

    def save(self, name: str, **more: Any) -> None:
        """Writes a checkpoint to the run's folder; more: what differs in it."""
        call = ("stages", "workers", "resume", "init_from", "evaluate", "dream")  # not the run's
        args = {key: value for key, value in vars(self.args).items() if key not in call}
        save(self.state | {"args": args, "agent": self.agent.state_dict()} | more, self.folder / name)

    def result(self, stage: str, round_: int) -> dict:
        """What a finished stage has left. Raises UsageError."""
        return load_checkpoint(self.folder / f"{stage}-{round_}.pt", f"{stage}-{round_}")["stage"]


# --- The stages: each reads what others have left ------------------------------------------------

FOOTAGE, VALIDATION, TRAIN = 800_000_000, 900_000_000, 1_000_000  # first seeds of their tracks
SIGMA = 0.1  # CMA-ES's step size at the start; half of it in the later rounds
DISBELIEF = 3  # validations without a better mean after which a dream ends


def randomness(*numbers: int) -> np.random.Generator:
    """A numpy generator, and torch's own, that depend on the numbers alone: nothing to be saved."""
    generator = np.random.default_rng(numbers)
    torch.manual_seed(int(generator.integers(2**62)))
    return generator


def open_pictures(folder: Path, filled: int, count: int) -> np.ndarray:
    """The run's footage, uint8 (count, 64, 64, 3), of which `filled` are there. Raises UsageError."""
    path = folder / "pictures.bin"
    if filled and (not path.exists() or path.stat().st_size < filled * SIZE * SIZE * 3):
        raise UsageError(f"{path} is not whole: type another --name to begin again.")
    return np.memmap(path, np.uint8, "r+" if filled else "w+", shape=(count, SIZE, SIZE, 3))


def collect(journal: Journal) -> None:
    """Drives and films: at random in the first round, then with C, disturbed two of three times."""
    args, stage, controller = journal.args, journal.state["stage"], journal.agent.controller
    round_, at_random = stage["round"], stage["round"] == 1 and not controller.any()
    earlier = journal.result("collect", round_ - 1)["rows"] if round_ > 1 else torch.zeros(0, COLUMNS)
    if stage["step"] == 0:
        stage |= {"episodes": 0, "rows": torch.cat([earlier, torch.zeros(args.collect_frames, COLUMNS)])}
    rows, first = stage["rows"], len(earlier)
    pictures = open_pictures(journal.folder, first + stage["step"], len(rows))
    limit = min(300 if at_random else 1000, args.max_frames)
    while first + stage["step"] < len(rows):
        jobs = []
        for episode in range(stage["episodes"], stage["episodes"] + 32):
            chance = np.random.default_rng([args.seed, round_, episode])
            place = chance.random() * (chance.random() < 0.8)
            noise = (1000 * args.seed + round_, 0 if at_random else episode % 3 or 3)
            job = {"seed": FOOTAGE + 1_000_000 * round_ + episode, "controller": 0, "limit": limit}
            jobs.append(job | {"place": place, "noise": noise, "film": True})
        for result in journal.drivers.drive(journal.agent, controller[None], jobs):
            start = first + stage["step"]
            size = min(len(result["rows"]), len(rows) - start)
            pictures[start : start + size] = result["pictures"][:size]
            rows[start : start + size] = torch.from_numpy(result["rows"][:size])
            stage["step"] += size
            journal.state["frames"] += result["frames"]
        stage["episodes"] += len(jobs)
        pictures.flush()
        journal.save("last.pt")
        tqdm.write(f"{stage['name']}: {stage['step']} of {len(rows) - first} pictures")
    new = rows[first:]
    new[:, 3].clamp_(*REWARDS)
    journal.write({"collect/reward_per_frame": new[:, 3].mean(), "collect/episodes": new[:, 4].sum()})


class Footage:
    """All rounds' frames: `rows` (N, 9), see COLUMNS; `latents` (N, 64), mean and log variance by
    the newest V; `episodes` (E, 2), first row and length, and `newest`, the last round's."""

    def __init__(self, journal: Journal) -> None:
        round_ = journal.state["stage"]["round"]
        self.rows = journal.result("collect", round_)["rows"]
        self.latents = journal.result("vision", round_)["latents"]
        if len(self.latents) != len(self.rows):
            raise UsageError(f"{journal.folder} holds another run's files: type another --name to begin again.")
        starts = self.rows[:, 4].nonzero()[:, 0].numpy()
        self.episodes = np.stack([starts, np.diff([*starts, len(self.rows)])], 1)
        self.newest = self.episodes[starts >= len(self.rows) - journal.args.collect_frames]


def learn(journal: Journal, names: tuple[str, ...], minibatch: Callable) -> None:
    """Fits V or M by Adam: `minibatch(step, generator)` returns losses, called `names`, and the
    first is descended. Raises SystemExit where its gradient is not finite."""
    args, stage = journal.args, journal.state["stage"]
    name, round_ = stage["name"].split("-")[0], stage["round"]
    network, lr = getattr(journal.agent, name), getattr(args, f"{name}_lr")
    total = getattr(args, f"{name}_steps") // round_
    number, every, longest = {"vision": (1, 100, math.inf), "memory": (2, 20, 1.0)}[name]
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr)
    if stage["step"]:
        optimizer.load_state_dict(stage["optimizer"])
    sums = []
    for step in tqdm(range(stage["step"], total), f"round {round_} {name}"):
        optimizer.param_groups[0]["lr"] = lr * (1 - 0.9 * step / total)
        losses = torch.stack(minibatch(step, randomness(args.seed, round_, number, step)))
        optimizer.zero_grad()
        losses[0].backward()
        length = nn.utils.clip_grad_norm_(parameters, longest)
        if not length.isfinite():
            raise SystemExit(f"Loss {losses[0]:.4g} or gradient {length:.4g} is not finite.")
        optimizer.step()
        sums.append(losses.detach())
        if (step + 1) % min(every, total // 10 or 1) == 0 or step + 1 == total:
            means = torch.stack(sums).mean(0).tolist()
            sums = []
            journal.write({f"{name}/{key}": mean for key, mean in zip(names, means, strict=True)})
            stage |= {"step": step + 1, "optimizer": optimizer.state_dict()}
            journal.save("last.pt")
    network.half().float()  # what is driven with is what best.pt holds, bit by bit
    stage["optimizer"] = None


def learn_vision(journal: Journal) -> None:
    """Fits V to all the footage, and keeps what it then sees there."""
    vision, stage, device = journal.agent.vision, journal.state["stage"], journal.device
    frames = len(journal.result("collect", stage["round"])["rows"])
    footage = open_pictures(journal.folder, frames, frames)

    def minibatch(step: int, chance: np.random.Generator) -> tuple[Tensor, ...]:
        noise = torch.randn(100, LATENTS).to(device)
        indices = np.sort(chance.integers(frames, size=100))
        pictures = torch.from_numpy(footage[indices]).to(device)
        mu, logvar = vision.encode(pictures)
        decoded = vision.decode(mu + torch.exp(logvar / 2) * noise)
        if step % 500 == 0:
            pairs = torch.cat([pictures[:8].permute(0, 3, 1, 2) / 255, decoded[:8]])
            journal.board.add_images("vision/reconstruction", pairs, journal.state["iteration"] + 1)
        return vision_loss(decoded, pictures, mu, logvar)

    learn(journal, ("loss", "squared_error", "KL"), minibatch)
    with torch.no_grad():
        parts = np.array_split(footage, frames // 500 + 1)
        encoded = [vision.encode(torch.tensor(part).to(device)) for part in parts]
    stage["latents"] = torch.cat([torch.cat(part, 1).cpu() for part in encoded])


def learn_memory(journal: Journal) -> None:
    """Fits M to the latents of all the footage, sampled anew in every minibatch."""
    footage, memory, device = Footage(journal), journal.agent.memory, journal.device
    episodes, rows, latents = footage.episodes, footage.rows, footage.latents
    shares = episodes[:, 1] / len(rows)  # else the first round's short ones would be most of it

    def minibatch(step: int, chance: np.random.Generator) -> tuple[Tensor, ...]:
        chosen = episodes[chance.choice(len(episodes), 16, p=shares)]
        frames = (chosen[:, 0] + np.arange(chosen[:, 1].max())[:, None]).clip(max=len(rows) - 1)  # (T, N)
        mu, logvar = latents[frames].to(device).chunk(2, -1)
        z, targets = mu + torch.exp(logvar / 2) * torch.randn(2, *frames.shape, LATENTS).to(device)
        lengths = torch.from_numpy(chosen[:, 1]).to(device)
        return memory_loss(memory, z, targets, rows[frames].to(device), lengths)

    learn(journal, ("loss", "NLL_per_latent", "reward_error", "end_error"), minibatch)


def search(journal: Journal, cmaes: CMAES, play: Callable, generations: int) -> bool:
    """Searches C: CMA-ES asks for candidates, `play(candidates, generation)` returns their scores
    (P,) and how many frames that took, and CMA-ES is told. Returns whether time is over."""
    args, state, stage = journal.args, journal.state, journal.state["stage"]
    name = stage["name"].split("-")[0]
    vars(cmaes).update(stage.get("search", {}))
    for generation in tqdm(range(stage["step"], generations), stage["name"]):
        if name == "dream" and generation - stage["found"]["step"] >= DISBELIEF * args.eval_interval:
            break  # what the dream finds is good there alone
        candidates = cmaes.ask()
        scores, frames = play(candidates, generation)
        cmaes.tell(-scores)
        stage |= {"step": generation + 1, "search": vars(cmaes)}
        seconds = time.time() - journal.clock
        over = state["seconds"] + seconds > 3600 * args.hours
        figures = {
            f"{name}/return_mean": scores.mean(),
            f"{name}/return_best": scores.max(),
            f"{name}/frames_per_second": frames / seconds,
            "search/sigma": cmaes.sigma,
            "search/longest_axis": cmaes.scales.max(),
            "search/shortest_axis": cmaes.scales.min(),
        }
        if over or stage["step"] == generations or stage["step"] % args.eval_interval == 0:
            figures |= validate(journal, cmaes)
        journal.write(figures)
        journal.save("last.pt")
        if over:
            print(f"{args.hours:g} hours are over: type more --hours to go on.")
            return True
    journal.agent.controller.copy_(stage["found"]["controller"])
    return False


def validate(journal: Journal, cmaes: CMAES) -> dict:
    """The search's mean on validation tracks. The stage keeps its best, and best.pt the run's."""
    args, state, stage = journal.args, journal.state, journal.state["stage"]
    controller = cmaes.mean.float().view(cmaes.shape)
    jobs = [{"seed": VALIDATION + i, "controller": 0, "limit": args.max_frames} for i in range(args.validation_tracks)]
    results = journal.drivers.drive(journal.agent, controller[None], jobs)
    returns = [result["return"] for result in results]
    score = float(np.mean(returns))
    state["frames"] += sum(result["frames"] for result in results)
    if "found" not in stage or score > stage["found"]["score"]:
        stage["found"] = {"controller": controller, "sigma": cmaes.sigma, "score": score, "step": stage["step"]}
    if all(score > earlier for _, earlier in state["scores"]):
        weights = {name: tensor.half() for name, tensor in journal.agent.state_dict().items()}  # lossless
        weights["controller"] = controller
        journal.save("best.pt", agent=weights, stage={}, score=score)
    state["scores"].append([state["frames"], score])
    tqdm.write(f"{stage['name']}, generation {stage['step']}: the mean controller scores {score:.1f}")
    return {"controller/validation": score, "controller/validation_std": np.std(returns)}


@torch.no_grad()
def search_in_dream(journal: Journal) -> bool:
    """Searches C in M's dream, until reality disagrees. Returns whether time is over."""
    args, agent, stage = journal.args, journal.agent, journal.state["stage"]
    footage = Footage(journal)
    mean, sigma = agent.controller.cpu(), SIGMA
    if stage["round"] > 1 or mean.any():
        mean, sigma = translate_controller(agent, footage), SIGMA / 2
    cmaes = CMAES(mean, sigma, args.population, args.seed * 1000 + 2 * stage["round"])
    if "found" not in stage:
        journal.write(validate(journal, cmaes))
        journal.save("last.pt")

    def play(candidates: Tensor, generation: int) -> tuple[Tensor, int]:
        z, state = dream_starts(journal, footage, generation)
        seed = args.seed * 1_000_000 + generation
        returns = [dream_returns(args, agent.memory, part, z, state, seed).cpu() for part in candidates.split(32)]
        return torch.cat(returns).double(), len(candidates) * len(z) * args.dream_steps

    return search(journal, cmaes, play, args.dream_generations if args.controller_input == "zh" else 0)


def search_on_tracks(journal: Journal) -> bool:
    """Searches C on real tracks, the same for all candidates and new ones every time. The dream's
    word is not taken: it begins from what validated best there. Returns whether time is over."""
    args, stage = journal.args, journal.state["stage"]
    dreamt = journal.result("dream", stage["round"])["found"]
    seed = args.seed * 1000 + 2 * stage["round"] + 1
    cmaes = CMAES(dreamt["controller"], dreamt["sigma"], args.population, seed)
    stage.setdefault("found", dreamt)

    def play(candidates: Tensor, generation: int) -> tuple[Tensor, int]:
        first = TRAIN + args.seed * 10_000_000 + stage["round"] * 1_000_000 + generation * args.tracks
        pairs = itertools.product(range(first, first + args.tracks), range(len(candidates)))
        common = {"limit": args.max_frames, "abort": True}
        jobs = [common | {"seed": track, "controller": candidate} for track, candidate in pairs]
        results = journal.drivers.drive(journal.agent, candidates, jobs)
        frames = sum(result["frames"] for result in results)
        journal.state["frames"] += frames
        returns = torch.tensor([result["return"] for result in results]).double()
        return returns.view(args.tracks, -1).mean(0), frames

    return search(journal, cmaes, play, args.generations)


def translate_controller(agent: Agent, footage: Footage) -> Tensor:
    """The controller (3, I) that asks of the new V and M what the old one asked for on the newest
    footage, by ridge regression: old weights mean nothing to networks that have learnt on."""
    device, inputs = agent.controller.device, agent.controller.shape[1] - 1
    parts = []
    for start, length in footage.newest:
        z = footage.latents[start : start + length, None, :LATENTS].to(device)
        hidden, _ = agent.memory(z, footage.rows[start : start + length, None, :3].to(device))
        before = torch.cat([torch.zeros_like(hidden[:1]), hidden[:-1]])  # what C saw with them
        parts.append(torch.cat([z, before], -1)[:, 0, :inputs].cpu().double())
    features = F.pad(torch.cat(parts), (0, 1), value=1.0)
    wishes = footage.rows[footage.newest[0, 0] :, 6:].double()
    square = features.T @ features + 1e-3 * len(features) * torch.eye(inputs + 1)
    return torch.linalg.solve(square, features.T @ wishes).T.float()


def dream_starts(journal: Journal, footage: Footage, generation: int) -> tuple[Tensor, Any]:
    """Places to start a dream from, in the newest footage, since that is where C gets to: latents
    (S, 32) and M's state, a pair of (1, S, 256), after up to 40 frames there."""
    args, memory, device = journal.args, journal.agent.memory, journal.device
    chance = randomness(args.seed, journal.state["stage"]["round"], 4, generation)
    places, states, zero = [], [], torch.zeros(1, 1, HIDDEN, device=device)
    for start, length in footage.newest[chance.choice(len(footage.newest), args.dream_starts)]:
        end = start + int(chance.random() * length)
        seen = slice(max(start, end - 40), end)
        z, actions = footage.latents[seen, None, :LATENTS], footage.rows[seen, None, :3]
        states.append(memory(z.to(device), actions.to(device))[1] if len(z) else (zero, zero))
        places.append(footage.latents[end, :LATENTS])
    return torch.stack(places).to(device), tuple(torch.cat(parts, 1) for parts in zip(*states, strict=True))


# --- Evaluation and films -------------------------------------------------------------------------


def evaluate(args: Args, drivers: Drivers, checkpoint: dict, path: Path, folder: Path) -> None:
    """Drives in Gymnasium's own CarRacing-v3; writes evaluation.json and best_lap.mp4."""
    agent = Agent(args, checkpoint, path)
    seeds = list(range(args.eval_seed, args.eval_seed + args.eval_episodes))
    jobs = [{"seed": seed, "controller": 0, "limit": args.max_frames} for seed in seeds]
    results = drivers.drive(agent, agent.controller[None], jobs, gymnasium_car_racing)
    returns = [result["return"] for result in results]
    best = int(np.argmax(returns))
    std = float(np.std(returns, ddof=1)) if len(returns) > 1 else 0.0
    figures = {
        "gymnasium": gym.__version__,
        "box2d": Box2D.__version__,
        "pygame": pygame.version.ver,
        "environment": "CarRacing-v3",
        "checkpoint": str(path),
        "iteration": checkpoint["iteration"],
        "seeds": seeds,
        "returns": returns,
        "mean": float(np.mean(returns)),
        "std": std,
        "standard_error": std / math.sqrt(len(returns)),
        "frames": [result["frames"] for result in results],
        "finished": sum(result["finished"] for result in results),
    }
    print(f"CarRacing-v3: {figures['mean']:.1f} +- {std:.1f} over {len(seeds)} tracks, {figures['finished']} finished")
    (folder / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
    env = gym.make("CarRacing-v3", render_mode="rgb_array")
    env.reset(seed=seeds[best])
    with imageio.get_writer(folder / "best_lap.mp4", fps=50 / args.action_repeat, macro_block_size=2) as video:
        for action in results[best]["rows"][:, :3]:
            video.append_data(env.render())
            for _ in range(args.action_repeat):
                env.step(action)
    print(f"written to {folder}/: evaluation.json, best_lap.mp4 (seed {seeds[best]})")


@torch.no_grad()
def film_dream(args: Args, checkpoint: dict, path: Path, folder: Path) -> None:
    """Writes dream.mp4, a film of reality, what V keeps of it and M's dream under the same actions,
    begun anew every 100; and latents.png, V's picture of each latent from -3 to 3."""
    agent = Agent(args, checkpoint, path)
    job = {"seed": args.eval_seed, "controller": 0, "limit": args.max_frames, "film": True}
    (lap,) = drive([FastCarRacing()], agent, agent.controller[None], [job])
    pictures, actions = lap["pictures"], torch.from_numpy(lap["rows"][:, None, :3])
    parts = torch.from_numpy(pictures).split(100)
    mu = torch.cat([agent.vision.encode(part)[0] for part in parts])[:, None]
    chance, state, dream_state = torch.Generator().manual_seed(args.seed), None, None
    with imageio.get_writer(folder / "dream.mp4", fps=50 / args.action_repeat, macro_block_size=2) as video:
        for t in range(len(pictures)):
            awake = t < 30 or t % 100 == 30
            if awake:
                dreamt, dream_state = mu[t], state
            imagined = agent.vision.show(torch.cat([mu[t], dreamt]))
            panels = np.stack([pictures[t], *imagined]).repeat(5, 1).repeat(5, 2)
            panels[2, :8] = (60, 60, 60) if awake else (230, 160, 40)  # a bar over what is dreamt
            video.append_data(np.concatenate(panels, 1))
            hidden, dream_state = agent.memory(dreamt[None], actions[t : t + 1], dream_state)
            _, state = agent.memory(mu[t : t + 1], actions[t : t + 1], state)
            dreamt, _, _ = sample_next(agent.memory, hidden[0], 1, args.temperature, chance)
    z = mu[len(mu) // 2].repeat(LATENTS, 9, 1)
    z[range(LATENTS), :, range(LATENTS)] = torch.linspace(-3, 3, 9)
    decoded = agent.vision.show(z.flatten(0, 1))
    grid = decoded.reshape(2, 16, 9, SIZE, SIZE, 3).transpose(1, 3, 0, 2, 4, 5)
    imageio.imwrite(folder / "latents.png", grid.reshape(16 * SIZE, -1, 3))
    print(f"return {lap['return']:.1f}; reality, what V keeps of it and M's dream: {folder}/dream.mp4")


# --- Training -------------------------------------------------------------------------------------

LEARN = {"collect": collect, "vision": learn_vision, "memory": learn_memory}
LEARN |= {"dream": search_in_dream, "real": search_on_tracks}


def train(args: Args, checkpoint: dict | None, folder: Path) -> None:
    """Runs the stages that have left no result yet, round by round. Raises UsageError."""
    torch.set_num_threads(usable_cores())
    torch.manual_seed(args.seed)
    best = folder / "best.pt"

    # What is due: the stages that have left no file yet
    names = [f"{stage}-{k + 1}" for k in range(args.rounds) for stage in list(LEARN)[:-1]]
    names.append(f"real-{args.rounds}")
    due = [name for name in names if not (folder / f"{name}.pt").exists()]
    done = names[: len(names) - len(due)]
    wanted = due[0].split("-")[0] if due else "evaluate"
    if wanted not in args.stages and not best.exists():
        raise UsageError(f"The next stage is {wanted}: add it to --stages.")

    # Where to go on: from last.pt, if it is of the stage that is due, or from the newest file
    if checkpoint and done and checkpoint.get("stage", {}).get("name") not in due[:1]:
        checkpoint = load_checkpoint(folder / f"{done[-1]}.pt", done[-1])
    weights = checkpoint or (args.init_from and load_checkpoint(args.init_from))
    agent = Agent(args, weights, args.init_from or folder)
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    journal = Journal(args, folder, agent.to(device), checkpoint or {})

    with contextlib.closing(journal.board):
        for name in due:
            stage, round_ = name.split("-")
            if stage not in args.stages:
                break
            if journal.state["stage"].get("name") != name:
                journal.state["stage"] = {"name": name, "round": int(round_), "step": 0}
            journal.save("last.pt")
            if LEARN[stage](journal):  # time is over
                break
            journal.save(f"{name}.pt")
        if "evaluate" in args.stages and best.exists():
            evaluate(args, journal.drivers, load_checkpoint(best), best, folder)


def start() -> None:
    """Reads the command line, then drives or dreams with a checkpoint, or learns. Raises UsageError."""
    args = tyro.cli(Args, description=__doc__)
    shown, now = args.evaluate or args.dream, time.strftime("%Y%m%d-%H%M%S")
    resumed = args.resume.parent if args.resume and args.resume.is_file() else args.resume
    folder = None if shown else resumed
    path = shown or (folder and folder / "last.pt")
    checkpoint = load_checkpoint(path) if path else None
    if checkpoint:
        args = tyro.cli(Args, default=checkpoint["args"])  # what is typed wins
    elif args.quick:
        args = tyro.cli(Args, args=[*QUICK.split(), *sys.argv[1:]])
    name = f"{shown.stem}-{now}" if shown else args.name or f"carracing-seed{args.seed}-{now}"
    with hold_folder(folder or Path("runs", name), bool(folder)) as folder:
        if args.evaluate:
            evaluate(args, Drivers(args.workers), checkpoint, path, folder)
        elif args.dream:
            film_dream(args, checkpoint, path, folder)
        else:
            train(args, checkpoint, folder)


def main() -> None:
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))  # a run then saves
    try:
        start()
    except (UsageError, OSError) as error:  # such as a full disk
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    finally:
        for process in multiprocessing.active_children():  # they may be in the middle of a rollout
            process.kill()


if __name__ == "__main__":
    main()
