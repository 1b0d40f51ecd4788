"""PPO learns to drive the real SuperTuxKart from pixels.

Proximal Policy Optimization (Schulman et al. 2017, https://arxiv.org/abs/1707.06347), generalized
advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438), and the Nature CNN (Mnih et
al. 2015). The kart sees its last pictures; speed, place and track serve the reward and the episode's end.

    python ppo_tuxkart.py --track scotland                  # learn; everything lands in runs/<name>/
    python ppo_tuxkart.py --resume runs/<name>              # go on after a stop or a crash
    python ppo_tuxkart.py --evaluate runs/<name>/best.pt    # race it against the game's own AI
    tensorboard --logdir runs                               # watch it

On two cores without a GPU it finishes a race after 12 to 22 minutes, and nearly every one after an hour.
"""

import argparse
import atexit
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import functools
import importlib.metadata
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads would spin on the games' cores

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import torch
import torch.distributed as dist
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class UsageError(ValueError):
    """What was typed, or what the machine lacks: one sentence that says what to type next (exit code 2)."""


class RunError(RuntimeError):
    """What went wrong on the way, in one sentence (exit code 1)."""


@dataclasses.dataclass
class Game:
    """How the game is played: what `gym.make("TuxKart-v0", ...)` takes, and the first of the flags."""

    engine: Literal["auto", "pystk", "pystk2"] = "auto"  # game bindings; auto prefers the faster pystk
    width: int = 64  # width of the picture, in pixels
    height: int = 64  # height of the picture, in pixels
    frame_stack: int = 2  # pictures the network sees, the newest last
    step_size: float = 0.15  # seconds of game time for which an action is held
    random_start: float = 0.5  # share of the episodes that start anywhere on the track, not on its line
    laps: tyro.conf.Suppress[int] = 1  # laps of a race
    reverse: tyro.conf.Suppress[bool] = False  # drive the track the other way round
    difficulty: int = 2  # the game's, 0 to 3; it scales the player's top speed too (0.6, 0.8, 0.92, 1)
    num_karts: int = 1  # karts in the race; the game's AI drives the others
    reward: tuple[str, ...] = ("progress",)  # reward(s), weighted: --reward progress:1 zigzag:0.1
    actions: Literal["drive", "ec418", "deepracer"] = "drive"  # what the network decides
    speeds: tuple[float, ...] = (8.0, 16.0, 24.0)  # m/s to choose from with --actions deepracer
    speed_cap: float | None = None  # m/s that the kart keeps below, whatever the network decides

    def __post_init__(self) -> None:
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name, None)
            if value is not None and not least <= value <= most:
                raise UsageError(f"{name.replace('_', '-')} is {value}: type a number from {least:.4g} to {most}.")
        if not self.speeds or list(self.speeds) != sorted({abs(speed) for speed in self.speeds}):
            raise UsageError("The speeds are in m/s, the slowest first: type --speeds 8 16 24.")
        one_of("set of actions", self.actions, ACTIONS)
        parse_reward(self.reward)


@dataclasses.dataclass
class Args(Game):
    """PPO that drives SuperTuxKart from pixels. `--track scotland` is all it needs."""

    track: tuple[str, ...] = ("scotland",)  # track(s) to learn; several are shared out over the games
    total_timesteps: int = 1_000_000  # decisions to learn from, all games together
    seed: int = 1  # seed of the network, the actions, the minibatches and the starts
    name: str | None = None  # the run's folder under runs/ (default: track, seed and time)
    resume: Path | None = None  # run folder to go on with, and with its settings unless you type others
    init_from: Path | None = None  # checkpoint to take the network's weights from, and nothing else
    evaluate: Path | None = None  # checkpoint to race, beside the game's own AI; no learning
    eval_episodes: int = 20  # races per evaluation
    eval_seed: int = 1000  # seed of the first evaluation race; each race has its own disturbed start
    eval_interval: int = 64  # iterations between evaluations while learning; 0 for none
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the network runs; auto takes a GPU if there is one
    speed_curriculum: float | None = None  # m/s by which the cap rises when every evaluation race finishes

    num_envs: int = 16  # games, each in a process of its own; with torchrun, of every rank
    num_steps: int = 128  # decisions per game and iteration
    learning_rate: float = 5e-4  # Adam's step size at the start; it falls linearly to zero
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    epochs: int = 3  # passes over the data of an iteration
    num_minibatches: int = 8  # minibatches per pass
    clip_coef: float = 0.2  # the clipped objective's epsilon
    ent_coef: float = 0.005  # weight of the entropy bonus
    vf_coef: float = 0.05  # weight of the value loss; returns reach 30, so more drowns the policy's gradient
    max_grad_norm: float = 0.5  # largest norm of the gradient
    epsilon: float = 0.0  # share of uniformly random actions, part of the policy; it falls linearly to zero
    target_kl: float | None = None  # approximate KL divergence that ends an iteration's passes

    def __post_init__(self) -> None:
        super().__post_init__()
        batch = self.num_envs * self.num_steps
        if batch % self.num_minibatches or batch == self.num_minibatches:
            raise UsageError(f"{batch} decisions an iteration do not divide: type another --num-minibatches.")
        if self.total_timesteps < batch:
            raise UsageError(f"--total-timesteps is less than one iteration: type {batch} or more.")
        if len(self.track) > min(self.num_envs, self.eval_episodes):
            raise UsageError(f"Every track needs a game: type --num-envs {len(self.track)} or more.")
        if self.speed_curriculum and not (self.speed_cap and self.eval_interval):
            raise UsageError("--speed-curriculum needs a cap to begin with: type --speed-cap 8 as well.")


BOUNDS = {  # least and most
    **dict.fromkeys(("num_envs", "frame_stack", "epochs", "num_minibatches", "eval_episodes"), (1, 10_000)),
    **dict.fromkeys(("seed", "eval_seed", "eval_interval"), (0, 10**9)),
    **dict.fromkeys(("random_start", "gamma", "gae_lambda", "learning_rate", "epsilon"), (0, 1)),
    **dict.fromkeys(("ent_coef", "vf_coef", "max_grad_norm", "target_kl"), (0, 1e6)),
    **dict.fromkeys(("speed_cap", "speed_curriculum", "laps"), (1, 100)),
    **dict.fromkeys(("width", "height"), (36, 2048)),
    **{"num_steps": (2, 10**6), "step_size": (1 / 120, 1), "difficulty": (0, 3)},
    **{"num_karts": (1, 20), "clip_coef": (1e-6, 1), "total_timesteps": (1, 10**12)},
}


def one_of(kind: str, name: str, names: Iterable[str]) -> None:
    """Raises UsageError, with the closest of the names, where the name is none of them."""
    if name not in names:
        close = difflib.get_close_matches(name, names, 1, 0)[0]
        raise UsageError(f"There is no {kind} {name}: type {close}, or one of {', '.join(names)}.")


# --- The network and PPO --------------------------------------------------------------------------


def orthogonal(layer: nn.Module, gain: float) -> nn.Module:
    nn.init.orthogonal_(layer.get_parameter("weight"), gain)
    nn.init.zeros_(layer.get_parameter("bias"))
    return layer


class Agent(nn.Module):
    """The Nature CNN with a policy head and a value head.

    forward: uint8 pictures (B, C, H, W) -> logits (B, sum(nvec)), a block for each part of the action,
    values (B,), and state, which is for networks with a memory, as is `starts`: this one has none.
    """

    state_size = 0

    def __init__(self, obs_shape: Sequence[int], nvec: Sequence[int]) -> None:
        super().__init__()
        self.nvec, self.epsilon = [int(n) for n in nvec], 0.0
        self.convolutions = nn.Sequential(
            orthogonal(nn.Conv2d(obs_shape[0], 32, 8, stride=4), 2**0.5),
            nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2), 2**0.5),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3, stride=1), 2**0.5),
            nn.ReLU(),
            nn.Flatten(),
        )
        features = self.convolutions(torch.zeros(1, *obs_shape)).shape[1]
        self.hidden = nn.Sequential(orthogonal(nn.Linear(features, 512), 2**0.5), nn.ReLU())
        self.policy = orthogonal(nn.Linear(512, sum(self.nvec)), 0.01)
        self.value = orthogonal(nn.Linear(512, 1), 1.0)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on a CPU

    def forward(self, obs: Tensor, state: Any = None, starts: Any = None) -> tuple[Tensor, Tensor, Any]:
        pictures = obs.float().div_(255.0).contiguous(memory_format=torch.channels_last)
        hidden = self.hidden(self.convolutions(pictures))
        return self.policy(hidden), self.value(hidden).squeeze(-1), state


def evaluate_actions(logits: Tensor, actions: Tensor, nvec: list[int], epsilon: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy, (B,) each, of actions (B, A) whose parts are chosen independently.

    With `epsilon` the policy is the mixture with the uniform one, as `choose_actions` samples it; the
    entropy is that of the categorical part. logits: (B, sum(nvec)).
    """
    parts, entropies = [], []
    for block, action in zip(logits.split(nvec, -1), actions.unbind(-1), strict=True):
        block = block.log_softmax(-1)
        parts.append(block.gather(-1, action[:, None]).squeeze(-1))
        entropies.append(-(block.exp() * block).sum(-1))
    logprobs = torch.stack(parts).sum(0)
    if epsilon:
        uniform = torch.full_like(logprobs, math.log(epsilon / math.prod(nvec)))
        logprobs = torch.logaddexp(logprobs + math.log(max(1 - epsilon, 1e-30)), uniform)
    return logprobs, torch.stack(entropies).sum(0)


def choose_actions(
    logits: Tensor, nvec: list[int], epsilon: float = 0.0, greedy: bool = False, generator: Any = None
) -> Tensor:
    """Most probable actions, or sampled ones (Gumbel-max). logits: (B, sum(nvec)) -> int64 (B, A)."""
    if epsilon:  # flat logits for the rows that act uniformly
        uniform = torch.rand(len(logits), 1, device=logits.device, generator=generator) < epsilon
        logits = torch.where(uniform, 0.0, logits)
    if not greedy:
        logits = logits - torch.empty_like(logits).exponential_(generator=generator).log()
    return torch.stack([block.argmax(-1) for block in logits.split(nvec, -1)], -1)


def compute_gae(data: dict[str, Tensor], gamma: float, gae_lambda: float) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), cut at every episode's end.

    data: rewards, values, next_values, terminations, dones, each (T, N). `next_values[t]` is V of what
    step t led to, so a truncated episode bootstraps from its own last picture. Returns (T, N).
    """
    deltas = data["rewards"] + gamma * data["next_values"] * ~data["terminations"] - data["values"]
    advantages = torch.empty_like(deltas)
    running = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        running = deltas[t] + gamma * gae_lambda * running * ~data["dones"][t]
        advantages[t] = running
    return advantages


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over torchrun's processes; the tensor itself where there is but one."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def average_gradients(agent: nn.Module) -> None:
    """Gives every rank the mean gradient, in one message."""
    gradients: list = [parameter.grad for parameter in agent.parameters()]
    mean = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def ppo_loss(agent: Agent, batch: dict[str, Tensor], args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate objective (Schulman et al. 2017, eqs. 7 and 9) of one minibatch.

    batch: obs (B, C, H, W), actions (B, A), logprobs, advantages, returns (B,). Returns the loss and
    detached scalars. KL: (r - 1) - log r (http://joschu.net/blog/kl-approx.html).
    """
    logits, values, _ = agent(batch["obs"])
    logprobs, entropy = evaluate_actions(logits, batch["actions"], agent.nvec, agent.epsilon)
    logratio = logprobs - batch["logprobs"]
    ratio, clip = logratio.exp(), args.clip_coef
    advantages = batch["advantages"] - batch["advantages"].mean()
    advantages = advantages / (advantages.std() + 1e-8)
    policy_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
    value_loss = 0.5 * ((values - batch["returns"]) ** 2).mean()
    loss = policy_loss - args.ent_coef * entropy.mean() + args.vf_coef * value_loss
    scalars = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy.mean(),
        "approx_kl": ((ratio - 1) - logratio).mean(),
        "clipfrac": ((ratio - 1).abs() > clip).float().mean(),
        "ratio_error": (ratio - 1).abs().max(),
    }
    return loss, {f"losses/{name}": scalar.detach() for name, scalar in scalars.items()}


def ppo_update(agent: Agent, optimizer: Any, batch: dict[str, Tensor], args: Args) -> dict[str, float]:
    """All passes over one iteration's data; batch: tensors of B rows, as in `ppo_loss`, and values (B,).

    Returns the scalars of `ppo_loss` averaged over the minibatches (ratio_error: of the first, where it
    shows how far sampling and learning disagree about the same network), and explained_variance.
    """
    size, device = len(batch["returns"]), batch["returns"].device
    history: list[dict[str, Tensor]] = []
    for _ in range(args.epochs):
        for rows in torch.randperm(size).to(device).split(size // args.num_minibatches):
            loss, scalars = ppo_loss(agent, {key: value[rows] for key, value in batch.items()}, args)
            history.append(scalars)
            optimizer.zero_grad()
            loss.backward()
            average_gradients(agent)
            if not nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm).isfinite():
                raise RunError("The gradient is not a finite number: try a smaller --learning-rate.")
            optimizer.step()
        if args.target_kl and mean_over_ranks(scalars["losses/approx_kl"].clone()) > args.target_kl:
            break
    metrics = {key: torch.stack([scalars[key] for scalars in history]).mean().item() for key in history[0]}
    metrics["losses/ratio_error"] = history[0]["losses/ratio_error"].item()
    residual = (batch["returns"] - batch["values"]).var() / batch["returns"].var().clamp(min=1e-8)
    return metrics | {"losses/explained_variance": 1 - residual.item()}


# --- What the network may decide, and what it is paid for -----------------------------------------

FULL_LOCK = 30  # degrees, as DeepRacer has it


def govern(target: float, speed: float) -> dict[str, Any]:
    """Acceleration and brake that hold a target speed, both in m/s."""
    return {"acceleration": min(max((target - speed) / 2, 0.0), 1.0), "brake": speed > target + 2}


def drive_actions(action: list[int], speed: float, speeds: Sequence[float]) -> dict[str, Any]:
    """Steer in five positions, gas, coast or brake, drift, nitro."""
    steer, pedal, drift, nitro = action
    pedals = {"acceleration": float(pedal == 0), "brake": pedal == 2, "pace": float(pedal == 0)}
    return {"steer": steer / 2 - 1, "drift": bool(drift), "nitro": bool(nitro), **pedals}


def ec418_actions(action: list[int], speed: float, speeds: Sequence[float]) -> dict[str, Any]:
    """EC418's four bits, the highest first: left, right (both: nitro), fast (25 m/s, else 5), drift."""
    left, right, fast, drift = (bool(action[0] >> bit & 1) for bit in (3, 2, 1, 0))
    buttons = {"drift": drift, "nitro": left and right, "pace": 1.0 if fast else 0.2}
    return {"steer": float(right) - float(left), **buttons, **govern(25.0 if fast else 5.0, speed)}


def deepracer_actions(action: list[int], speed: float, speeds: Sequence[float]) -> dict[str, Any]:
    """DeepRacer's: one of seven steering angles, 30 degrees left to 30 right, with one of the speeds."""
    angle, pace = divmod(action[0], len(speeds))
    steer = (-30, -20, -10, 0, 10, 20, 30)[angle] / FULL_LOCK
    return {"steer": steer, "pace": speeds[pace] / max(speeds), **govern(speeds[pace], speed)}


# name: how many choices each part of an action has, given the number of speeds; and what the engine is
# told then: steer from -1 (left) to 1, pedals and buttons. pace is what it asks for of the fastest.
ACTIONS: dict[str, tuple[Callable, Callable]] = {
    "drive": (lambda speeds: [5, 3, 2, 2], drive_actions),
    "ec418": (lambda speeds: [16], ec418_actions),
    "deepracer": (lambda speeds: [7 * speeds], deepracer_actions),
}


class Moment(NamedTuple):
    """What a reward may know of one decision, in metres, seconds and degrees; right is positive."""

    gain: float  # metres gained down the track
    seconds: float  # of game time
    offset: float = 0.0  # from the middle of the road
    width: float = 1.0  # of the road
    heading: float = 0.0  # of the kart, relative to the track's, in [-180, 180)
    steering: float = 0.0  # commanded; full lock is 30 degrees
    pace: float = 0.0  # commanded, as a share of the fastest choice
    finished: bool = False
    failed: bool = False  # the episode ended stuck, off the track or backwards
    places: int = 0  # won from other karts, or lost
    events: tuple[str, ...] = ()  # what began with this decision, where an environment tells


def progress_reward(moment: Moment) -> float:
    """A tenth of the metres gained, less half a point a second, +25 for the finish, -3 for failing.

    The gains of every lap sum to the same, so of two finished laps the faster one earns more. The
    finish pays about what driving on would (0.27 a decision, discounted by 0.99): a critic that
    cannot see how far the line is would take less for a loss, and the policy would put it off.
    """
    return 0.1 * moment.gain - 0.5 * moment.seconds + 25.0 * moment.finished - 3.0 * moment.failed


def centerline_reward(moment: Moment) -> float:
    """DeepRacer's "follow the center line"."""
    share = abs(moment.offset) / moment.width
    return 1.0 if share <= 0.1 else 0.5 if share <= 0.25 else 0.1 if share <= 0.5 else 1e-3


REWARDS: dict[str, Callable[[Moment], float]] = {
    "progress": progress_reward,
    "centerline": centerline_reward,
    # DeepRacer's "stay inside the two borders" and "prevent zig-zag"
    "borders": lambda m: 1.0 if 0.5 * m.width - abs(m.offset) >= 0.05 else 1e-3,
    "zigzag": lambda m: centerline_reward(m) * (0.8 if abs(m.steering) > 15 else 1.0),
    # DeepRacer's examples for the heading and for the speed: half below 1 m/s of its 4
    "heading": lambda m: 0.5 if abs(m.heading) > 10 else 1.0,
    "speed": lambda m: 1e-3 if abs(m.offset) > 0.5 * m.width else 0.5 if m.pace < 0.25 else 1.0,
    # EC418's metres within 6 m of the middle, without its cap of 5 m/s and its pay for standing still
    "ec418": lambda m: 0.1 * max(m.gain, 0.0) * (abs(m.offset) < 6),
}


def parse_reward(parts: Iterable[str]) -> dict[str, float]:
    """("progress", "zigzag:0.1") as {"progress": 1.0, "zigzag": 0.1}. Raises UsageError."""
    weights = {}
    for part in parts:
        name, _, weight = part.partition(":")
        one_of("reward", name, REWARDS)
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise UsageError(f"{part} has a weight that is no number: type {name}:0.5.") from None
    return weights


# --- The game: engine, track, environment ---------------------------------------------------------

ENGINES = {"pystk": "PySuperTuxKart", "pystk2": "PySuperTuxKart2"}  # PyPI's "pystk" is another thing
STUCK_METRES, STUCK_SECONDS = 2.0, 4.0  # an episode ends when so long has not brought so much progress
RACE_STUCK_SECONDS = 15.0  # the same in a race, where the kart may free itself
BACKWARDS_METRES = 15.0
OFF_TRACK_METRES = 10.0  # beyond the edge of the road
LAP_SECONDS, RANDOM_START_SECONDS = 150.0, 30.0  # time limits, in game time
TOP_SPEED = 60.0  # m/s; no kart is faster, so a larger gain is a teleport
NEAR_METRES = 50.0  # of road each way, more than a decision's drive, where a kart is looked for first
LEVEL_METRES = 2.5  # above or below the road's middle a kart is not on that road
FINISHES = ("finished", "line")  # how an episode ends well


@functools.cache
def find_game(engine: str) -> tuple[dict[str, str], list[str]]:
    """Engine, its version and that of its assets; and the race tracks that install.sh has laid out, or
    none where pystk2 will fetch them at its first start. Raises UsageError."""
    packages = {package.name: package.version for package in importlib.metadata.distributions()}
    module = next((m for m in ENGINES if ENGINES[m] in packages and engine in ("auto", m)), None)
    if module is None:
        raise UsageError(f"The engine {engine} is not installed: type ./install.sh")
    if module == "pystk":
        root = Path(importlib.import_module("pystk_data").data_dir)
    else:
        cache_dir = importlib.import_module("platformdirs").user_cache_dir  # where pystk2 looks
        root = Path(cache_dir("PySuperTuxKart2", "bpiwowar"), "1.5")
    assets = min((file.name[13:] for file in root.glob("data/supertuxkart.[0-9]*")), default="")
    tracks = {file.parent.name for file in root.glob("data/tracks/*/quads.xml")} - {"overworld", "tutorial"}
    return {"engine": module, "engine_version": packages[ENGINES[module]], "assets": assets}, sorted(tracks)


def import_engine(engine: str, alone: bool) -> Any:
    """The engine's module, in a process prepared for it. alone: no other karts need be loaded."""
    # Mesa's software renderer filters anisotropically in a loop: single frames took up to 71 s.
    hidden = "-GL_EXT_texture_filter_anisotropic -GL_ARB_texture_filter_anisotropic"
    os.environ.setdefault("MESA_EXTENSION_OVERRIDE", hidden)
    os.environ.setdefault("LP_NUM_THREADS", "0")  # its threads gain nothing
    os.environ["TUXKART_ALONE"] = "1" if alone else ""  # read by the pystk_data of install.sh
    if parent := multiprocessing.parent_process():  # this is one of many games, and ends with it
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
        # The engine talks to descriptors 1 and 2 from C++; what Python prints is still seen.
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
    return importlib.import_module(engine)


class TrackGeometry:
    """The track's centre line in segments, and where points lie along it; in metres and radians.

    nodes: (S, 2, 3), both ends of each, y is up. widths: (S,). distances: (S, 2), down the track.
    """

    def __init__(self, nodes: Any, widths: Any, distances: Any, length: float) -> None:
        self.nodes, self.distances = np.array(nodes, np.float64), np.array(distances, np.float64)
        self.widths, self.length = np.array(widths, np.float64).reshape(-1), float(length)
        self.vectors = self.nodes[:, 1] - self.nodes[:, 0]
        self.headings = np.arctan2(self.vectors[:, 0], self.vectors[:, 2])

    def gain(self, before: float, after: Any) -> Any:
        """Metres from one distance down the track to another, in [-length/2, length/2)."""
        return (after - before + self.length / 2) % self.length - self.length / 2

    def locate(self, point: Any, along: float) -> tuple[float, float, float, float]:
        """Nearest place on the centre line. point: (3,). along: its distance down the track just now.

        Below a bridge, or near another stretch, the middle of another road can be nearer than that of
        the kart's own. So the road within NEAR_METRES of `along` comes first where the point is on
        it, then all roads that it is on and the near one, if that is not too far off, then any.
        Returns distance down the track, offset (right is positive), track heading, track width.
        """
        relative = np.array(point, np.float64) - self.nodes[:, 0]
        squares = np.maximum((self.vectors**2).sum(-1, keepdims=True), 1e-9)
        share = (relative * (self.vectors / squares)).sum(-1).clip(0, 1)
        gap = relative - share[:, None] * self.vectors
        squares, half = (gap**2).sum(-1), self.widths / 2
        on_road = (np.hypot(gap[:, 0], gap[:, 2]) <= half) & (np.abs(gap[:, 1]) < LEVEL_METRES)
        near = np.abs(self.gain(along, self.distances.mean(-1))) < NEAR_METRES
        beside = near & (squares <= (half + OFF_TRACK_METRES) ** 2)
        choices = (near & on_road, on_road | beside, np.ones_like(near))
        choice = next(some for some in choices if some.any())
        nearest = int(np.where(choice, squares, np.inf).argmin())
        begin, end = self.distances[nearest]
        distance = float(begin + share[nearest] * (end - begin)) % self.length
        heading, (x, _, z) = float(self.headings[nearest]), gap[nearest].tolist()
        offset = math.copysign(math.hypot(x, z), x * math.cos(heading) - z * math.sin(heading))
        return distance, offset, heading, float(self.widths[nearest])


class TuxKartEnv(gym.Env):
    """One kart in the real SuperTuxKart, seen through its own camera. settings: those of Game.

    Observation: uint8 (3 * frame_stack, height, width), RGB pictures, the newest last. Action: one of
    ACTIONS, held for `step_size` seconds. Reward: the weighted sum of REWARDS that `reward` names. An
    episode ends with the finish, or when the kart is stuck, off the track or drives backwards; the
    time limit truncates it. Raises UsageError, which is a ValueError.

    `reset(seed=...)` loads the track anew (0.6 s), and nothing of the episodes before is left; without
    a seed it takes a hundredth of that. `options={"race": True}` starts an evaluation race: from the
    line, disturbed by what the seed draws, until the finish, the time limit or 15 s without progress;
    a step after that changes nothing. `options={"tracks": names}` has the seed choose one of them. One
    game runs per process: use gymnasium's AsyncVectorEnv for more. driver "ai" is the game's own.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 7}
    started, busy = None, False  # this process's game: which one, and whether an environment has it
    events: tuple[str, ...] = ()  # what began with the last decision, where a subclass tells

    def __init__(self, track: str = "scotland", driver: str = "agent", render_mode: Any = None, **settings: Any):
        self.game, self.track, self.driver, self.render_mode = Game(**settings), track, driver, render_mode
        self.versions, tracks = find_game(self.game.engine)
        one_of("track", track, tracks or [track])
        self.weights, self.speed_cap = parse_reward(self.game.reward), self.game.speed_cap
        choices, self.controls = ACTIONS[self.game.actions]
        shape = (3 * self.game.frame_stack, self.game.height, self.game.width)
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
        self.action_space = gym.spaces.MultiDiscrete(choices(len(self.game.speeds)))
        self.substeps, self.on_picture = 1, None  # a film draws several pictures a decision
        self.stk: Any = None
        self.race: Any = None

    def start_engine(self) -> None:
        """Starts the game, once in a process."""
        alone = self.game.num_karts == 1
        wanted = (self.versions["engine"], self.game.width, self.game.height, self.driver, alone)
        if TuxKartEnv.busy or TuxKartEnv.started not in (None, wanted):  # pystk2 would often crash
            raise RuntimeError("A process runs one game of one size: close it, or use AsyncVectorEnv.")
        self.stk = stk = import_engine(self.versions["engine"], alone)
        if TuxKartEnv.started is None:
            graphics = stk.GraphicsConfig.none() if self.driver == "ai" else stk.GraphicsConfig.ld()
            graphics.screen_width, graphics.screen_height = self.game.width, self.game.height
            stk.init(graphics)
            atexit.register(stk.clean)
        TuxKartEnv.busy, TuxKartEnv.started = True, wanted
        self.world = stk.WorldState()
        # Wind and the like move with the wall clock, and no two races would look alike: they get the game's.
        library, nothing = ctypes.CDLL(stk.__file__), lambda *_: None
        self.seed_scenery = getattr(library, "_ZN3irr2os10Randomizer5resetEi", nothing)
        self.set_clock = getattr(library, "_ZN3irr2os5Timer7setTimeEj", nothing)
        getattr(library, "_ZN3irr2os5Timer8setSpeedEf", nothing)(ctypes.c_float(0.0))
        self.srand = getattr(library, "srand", nothing)

    def load_track(self) -> None:
        """Loads the track; everything in the game is new after it, the camera too."""
        if self.race is not None:
            self.race.stop()
            self.race = None  # the engine allows one race at a time
        config, game, kinds = self.stk.RaceConfig(), self.game, self.stk.PlayerConfig.Controller
        config.track, config.laps, config.reverse = self.track, game.laps, game.reverse
        config.difficulty, config.num_kart, config.step_size = game.difficulty, game.num_karts, game.step_size
        config.seed = self.np_random_seed % 2**31  # what items give, and how the AI drives
        config.players[0].kart = "tux"
        config.players[0].controller = kinds.AI_CONTROL if self.driver == "ai" else kinds.PLAYER_CONTROL
        if hasattr(config, "overlay"):
            config.overlay = False  # pystk2 would draw its HUD into the picture; pystk has none
        for seed_or_clock in (self.srand, self.seed_scenery, self.set_clock):
            seed_or_clock(0)
        self.race = self.stk.Race(config)
        self.race.start()
        track = self.stk.Track()
        track.update()
        self.geometry = TrackGeometry(track.path_nodes, track.path_width, track.path_distance, track.length)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if self.stk is None:
            self.start_engine()
        options, track = options or {}, self.track
        self.in_race = bool(options.get("race"))
        if "tracks" in options:
            self.track = options["tracks"][self.np_random_seed % len(options["tracks"])]
        if self.race is None or seed is not None or self.track != track or self.driver == "ai":
            self.load_track()  # for the AI always: a restart would take the wheel from it
        else:
            self.race.restart()
        self.world.update()
        self.advance(1 / 120)
        location, heading, self.handicap = np.array(self.kart.location), self.heading, 0.0
        if hasattr(self.world, "phase"):  # pystk2 counts down for 5 s before a kart can drive
            self.advance(4.9)
            while self.world.time == 0:
                self.advance(0.05)
        self.from_line = self.in_race or self.np_random.random() >= self.game.random_start
        self.along = 0.0
        if self.in_race:
            self.disturb_start(location, heading)
        elif not self.from_line:
            self.start_anywhere()

        self.along = self.geometry.locate(self.kart.location, self.along)[0]
        to_line = -self.along % self.geometry.length
        laps = self.game.laps - 1 + (self.from_line and to_line < self.geometry.length / 2)
        self.distance = to_line + laps * self.geometry.length  # most tracks' start is before the line
        limit = max(LAP_SECONDS * self.game.laps, 2 * self.distance / (self.speed_cap or math.inf))
        self.limit = limit if self.from_line else RANDOM_START_SECONDS
        self.started_at = self.best_at = self.world.time
        self.progress = self.best = self.speed = self.off_track_seconds = 0.0
        self.returns = dict.fromkeys(self.weights, 0.0)
        self.last_place, self.over = self.place, False
        self.trail: list[tuple[float, ...]] = []  # (clock, x, y, z, speed) after every decision
        self.frames = np.repeat(self.picture[None], self.game.frame_stack, 0)  # (K, 3, H, W)
        return self.observation(), {}

    def step(self, action: Iterable[int]) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.race is None:
            raise gym.error.ResetNeeded("Call reset before step.")
        if self.in_race and self.over:
            return self.observation(), 0.0, True, False, {}
        before = self.world.time
        controls = self.drive([int(choice) for choice in action])
        self.frames = np.concatenate([self.frames[1:], self.picture[None]])

        now, kart = self.world.time, self.kart
        along, offset, heading, width = self.geometry.locate(kart.location, self.along)
        gain = min(self.geometry.gain(self.along, along), TOP_SPEED * self.game.step_size)
        if kart.finish_time > 0:  # whatever was cut on the way, the gains of every race sum to the same
            gain = self.distance - self.progress
        self.along, self.progress, self.speed = along, self.progress + gain, math.hypot(*kart.velocity)
        if self.progress > self.best + STUCK_METRES:
            self.best, self.best_at = self.progress, now
        off_track = max(abs(offset) - width / 2, 0.0)
        self.off_track_seconds += (now - before) * (off_track > 0)
        self.trail.append((now, *map(float, kart.location), self.speed))

        end = self.why_over(off_track)
        truncated = not end and now - self.started_at >= self.limit
        self.over = bool(end) or truncated
        moment = Moment(
            gain=gain,
            seconds=now - before,
            offset=offset,
            width=width,
            heading=(math.degrees(self.heading - heading) + 180) % 360 - 180,
            steering=FULL_LOCK * controls["steer"],
            pace=controls["pace"],
            finished=end in FINISHES,
            failed=bool(end) and end not in FINISHES,
            places=self.last_place - self.place,
            events=self.events,
        )
        self.last_place = self.place
        rewards = {name: weight * REWARDS[name](moment) for name, weight in self.weights.items()}
        self.returns = {name: self.returns[name] + reward for name, reward in rewards.items()}
        info = self.episode_info(end or "time limit") if self.over else {}
        return self.observation(), sum(rewards.values()), bool(end), truncated, info

    def why_over(self, off_track: float) -> str:
        """Why the episode is over, or "" while it goes on. off_track: metres beyond the road's edge."""
        if self.kart.finish_time > 0:
            return "finished"
        # The game counts no lap that began elsewhere. It ends at the line all the same: to the eye the
        # two are one, and with a value between "over" and "drive on" the kart put off the finish.
        if not self.from_line and self.progress >= self.distance:
            return "line"
        if self.world.time - self.best_at >= (RACE_STUCK_SECONDS if self.in_race else STUCK_SECONDS):
            return "stuck"
        if not self.in_race and self.progress < self.best - BACKWARDS_METRES:
            return "backwards"
        return "off track" if not self.in_race and off_track > OFF_TRACK_METRES else ""

    def episode_info(self, end: str) -> dict:
        """Of an episode that is over: why, lap_time (s, nan unless finished), progress (share of the
        race's distance), place in the race, and more."""
        finished = end == "finished"
        return {
            "track": self.track,
            "end": end,
            "finished": finished,
            "lap_time": self.kart.finish_time + self.handicap if finished else math.nan,
            "progress": 1.0 if finished else self.progress / self.distance,
            "place": self.place,
            "off_track_seconds": self.off_track_seconds,
            "from_line": self.from_line,
            "return": sum(self.returns.values()),
            **{f"reward/{name}": value for name, value in self.returns.items()},
            **({"trail": self.trail, "geometry": self.geometry} if self.in_race else {}),
        }

    def drive(self, action: list[int]) -> dict[str, Any]:
        """Holds the controls of an action for one decision. Returns them."""
        controls = self.controls(action, self.speed, self.game.speeds)
        if self.speed_cap is not None:
            cap = govern(self.speed_cap, self.speed)
            controls["acceleration"] = min(controls["acceleration"], cap["acceleration"])
            controls.update(brake=controls["brake"] or cap["brake"], nitro=False)
        pressed = self.stk.Action()
        for name in controls.keys() - {"pace"}:
            setattr(pressed, name, controls[name])
        for substep in range(self.substeps):  # the game goes on with an action by itself
            self.advance(self.game.step_size / self.substeps, [pressed] if substep == 0 else [])
        return controls

    def advance(self, seconds: float, pressed: list | None = None) -> None:
        """One step of the game. pressed: its Action, [] to go on with the last; by default none."""
        if pressed is None:
            pressed = [self.stk.Action()]
        self.race.config.step_size = seconds
        self.set_clock(int(1000 * self.world.time))
        self.race.step(*pressed) if self.driver == "agent" else self.race.step()
        self.world.update()
        karts = self.world.karts
        self.kart = karts[self.game.num_karts - 1]  # the game puts its own karts first
        ahead = np.array(self.kart.front) - np.array(self.kart.location)
        self.heading = math.atan2(ahead[0], ahead[2])  # radians from +z towards +x
        ranks = [(kart.finish_time > 0, -kart.finish_time or kart.overall_distance) for kart in karts]
        self.place = 1 + sum(rank > ranks[self.game.num_karts - 1] for rank in ranks)
        self.picture = np.zeros((3, self.game.height, self.game.width), np.uint8)
        if self.driver == "agent":  # a view of the engine's buffer: the next step draws over it
            self.picture = np.asarray(self.race.render_data[0].image).transpose(2, 0, 1)
        if self.on_picture:
            self.on_picture(self.render())

    def observation(self) -> np.ndarray:
        """The stacked pictures, uint8 (3 * frame_stack, height, width)."""
        return self.frames.reshape(self.observation_space.shape)

    def render(self) -> np.ndarray:
        return self.picture.transpose(1, 2, 0).copy()

    def close(self) -> None:
        if self.race is not None:
            self.race.stop()
        if self.stk is not None:
            TuxKartEnv.busy = False  # the game stays, for the next environment
        self.race = self.stk = None

    def put(self, location: np.ndarray, aside: float, road: float, askew: float) -> None:
        """Puts the kart down, metres to the right of a location (3,), and askew to the road's heading."""
        location = location + aside * np.array([math.cos(road), 0.0, -math.sin(road)])
        turn = (road + askew) / 2
        rotation = (0.0, math.sin(turn), 0.0, math.cos(turn))  # x, y, z, w
        kart = self.game.num_karts - 1
        self.stk.WorldState.set_kart_location(kart, tuple(location.tolist()), rotation, 0.0)

    def disturb_start(self, location: np.ndarray, heading: float) -> None:
        """Moves the kart aside, turns it and holds it back, by amounts drawn from the seed."""
        aside, askew = self.np_random.uniform(-2, 2), math.radians(self.np_random.uniform(-10, 10))
        delay = 0.05 * int(self.np_random.integers(5)) * (self.game.num_karts == 1)  # others do not wait
        self.put(location, aside, heading, askew)
        self.advance(1 / 120)
        if self.driver == "ai":  # it would drive off, so its clock gets the delay instead
            self.handicap = delay
        elif delay:
            self.advance(delay)

    def start_anywhere(self) -> None:
        """Puts the kart on a random path node, roughly facing along it; it drops, the camera follows."""
        for _ in range(5):
            node = int(self.np_random.integers(len(self.geometry.nodes)))
            askew = math.radians(self.np_random.uniform(-20, 20))
            aside = self.np_random.uniform(-0.3, 0.3) * self.geometry.widths[node]
            middle = self.geometry.nodes[node, 0] + self.geometry.vectors[node] / 2
            self.put(middle + [0.0, 0.5, 0.0], aside, self.geometry.headings[node], askew)
            self.advance(0.3)
            if abs(self.kart.location[1] - middle[1]) < 2:  # else it fell through a gap in the road
                break
        self.along = float(self.geometry.distances[node].mean())


if "TuxKart-v0" not in gym.registry:
    gym.register("TuxKart-v0", entry_point=TuxKartEnv)  # type: ignore[arg-type]  # takes any keyword


# --- Driving, to learn and to race ----------------------------------------------------------------

LOST_GAME = (EOFError, BrokenPipeError, ConnectionResetError, multiprocessing.TimeoutError)
SILENCE = 60.0  # seconds without an answer after which a game is lost
PATIENCE = 3  # losses in a row after which a run stops


def make_env(args: Args, track: str, driver: str = "agent", **changes: Any) -> gym.Env:
    """One environment with the settings of `args`, but for the changes; no game is started yet."""
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(Game)}
    return TuxKartEnv(track, driver, **(settings | changes))


def make_envs(args: Args, count: int, first: int = 0, driver: str = "agent", autoreset: str = "SameStep") -> Any:
    """Games that play in step, each in a process of its own; they take the tracks in turn."""
    tracks = [args.track[(first + i) % len(args.track)] for i in range(count)]
    makers = [functools.partial(make_env, args, track, driver) for track in tracks]
    return gym.vector.AsyncVectorEnv(makers, copy=False, autoreset_mode=autoreset)


def end_games(envs: Any) -> None:
    """Ends the games' processes, also those that hang."""
    for process in envs.processes if envs else ():
        process.kill()
        process.join()
        envs.closed = True


def reset_games(envs: Any, agent: Agent, seeds: Sequence[int], options: dict | None = None) -> tuple:
    """Begins an episode in each of N games. Returns where they stand, for `agent`: pictures (N, C, H, W),
    its state (N, S), and whether an episode begins (N,)."""
    envs.reset_async(list(seeds), options)
    obs, _ = envs.reset_wait(10 * SILENCE)  # a busy machine takes long to load a track
    device = next(agent.parameters()).device
    state = torch.zeros(len(obs), agent.state_size, device=device)
    return obs, state, torch.ones(len(obs), dtype=torch.bool, device=device)


@torch.no_grad()
def rollout(envs: Any, agent: Agent, now: tuple, num_steps: int) -> tuple[dict[str, Tensor], tuple, list[dict]]:
    """Plays T = num_steps decisions in each of N games. now: where they stand, from `reset_games`.

    Returns a dict of tensors (T, N, ...), where they stand then, and the infos of episodes that ended.
    """
    obs, state, starts = now
    device = starts.device
    all_obs = torch.zeros((num_steps, *obs.shape), dtype=torch.uint8, device=device)
    steps, cut_off, episodes = [], [], []
    for t in range(num_steps):
        all_obs[t] = torch.from_numpy(obs)
        step = {"starts": starts}
        logits, step["values"], state = agent(all_obs[t], state, starts)
        step["actions"] = choose_actions(logits, agent.nvec, agent.epsilon)
        step["logprobs"], _ = evaluate_actions(logits, step["actions"], agent.nvec, agent.epsilon)
        envs.step_async(step["actions"].cpu().numpy())
        obs, rewards, terminations, truncations, infos = envs.step_wait(SILENCE)
        if not np.isfinite(rewards).all():
            raise RunError("A reward is not a finite number: look at --reward and its weights.")
        step["rewards"] = torch.from_numpy(rewards).float().to(device)
        step["terminations"] = torch.from_numpy(terminations).to(device)
        step["dones"] = starts = torch.from_numpy(terminations | truncations).to(device)
        steps.append(step)
        for i in np.flatnonzero(terminations | truncations):
            episodes.append({name: values.tolist()[i] for name, values in infos["final_info"].items()})
            if truncations[i]:
                cut_off.append((t, i, infos["final_obs"][i], state[i : i + 1]))
    data = {name: torch.stack([step[name] for step in steps]) for name in steps[0]} | {"obs": all_obs}
    last_values = agent(torch.from_numpy(obs).to(device), state, starts)[1]
    data["next_values"] = torch.cat([data["values"][1:], last_values[None]])
    for t, i, picture, memory in cut_off:  # V of its own last picture, not of the next episode's first
        goes_on = torch.zeros(1, dtype=torch.bool, device=device)
        data["next_values"][t, i] = agent(torch.from_numpy(picture)[None].to(device), memory, goes_on)[1][0]
    return data, (obs, state, starts), episodes


@torch.no_grad()
def race(envs: Any, agent: Agent, seeds: Sequence[int], tracks: Sequence[str], greedy: bool) -> list[dict]:
    """A race for each seed, one a game, side by side. Returns the episodes' infos, and of each its seed,
    actions (T, A) and pictures, uint8 (T, H, W, 3)."""
    everyone = [seeds[i % len(seeds)] for i in range(envs.num_envs)]  # more than seeds in the last wave
    obs, state, starts = reset_games(envs, agent, everyone, {"race": True, "tracks": tracks})
    generator = torch.Generator(starts.device).manual_seed(seeds[0])
    races: list[dict] = [{"seed": seed, "actions": [], "pictures": []} for seed in seeds]
    while not all("end" in run for run in races):
        logits, _, state = agent(torch.from_numpy(obs).to(starts.device), state, starts)
        actions = choose_actions(logits, agent.nvec, 0.0, greedy, generator).cpu().numpy()
        for run, action, picture in zip(races, actions, envs.render(), strict=False):
            if "end" not in run:
                run["actions"].append(action.tolist())
                run["pictures"].append(picture)
        envs.step_async(actions)
        obs, _, _, _, infos = envs.step_wait(SILENCE)
        starts = torch.zeros_like(starts)
        for i in np.flatnonzero(infos["_end"][: len(races)] if infos else []):
            races[i].update({name: values.tolist()[i] for name, values in infos.items() if name[0] != "_"})
    return races


def race_all(args: Args, agent: Agent, seeds: Sequence[int], driver: str = "agent", greedy: bool = True) -> list[dict]:
    """`race` for any number of seeds, in games of their own. Raises RunError where they are lost."""
    count = min(len(seeds), 2 * usable_cores())
    waves = [seeds[first : first + count] for first in range(0, len(seeds), count)]
    for _ in range(PATIENCE):
        envs = make_envs(args, count, driver=driver, autoreset="Disabled")
        try:
            return [run for wave in waves for run in race(envs, agent, wave, args.track, greedy)]
        except LOST_GAME:
            continue
        finally:
            end_games(envs)
    raise RunError(f"A game was lost in {PATIENCE} evaluations in a row: type it once more.")


# --- What came of it ------------------------------------------------------------------------------


def lap_correlation(episodes: Iterable[dict]) -> float | None:
    """Correlation of return with lap time over finished laps; above 0 the reward prefers slow ones.

    None for fewer than ten laps, equal ones, or a correlation within two standard deviations of chance.
    """
    laps = np.array([(run["return"], run["lap_time"]) for run in episodes if run["finished"]]).T
    if laps.size < 20 or np.ptp(laps, 1).min() < 1e-9:
        return None
    correlation = float(np.corrcoef(laps)[0, 1])
    return correlation if abs(correlation) * laps.shape[1] ** 0.5 > 2 else None


def summarize(races: list[dict]) -> dict[str, Any]:
    """Figures of races. Median and best lap are means over the tracks, None unless each was finished."""
    tracks: dict[str, list[float]] = {run["track"]: [] for run in races}
    for run in races:
        tracks[run["track"]].extend([run["lap_time"]] * run["finished"])
    each = all(tracks.values())
    means = {name: float(np.mean([run[name] for run in races])) for name in ("progress", "off_track_seconds")}
    return means | {
        "races": len(races),
        "finished": sum(map(len, tracks.values())),
        "lap_times": [lap for laps in tracks.values() for lap in laps],
        "median": float(np.mean([np.median(laps) for laps in tracks.values()])) if each else None,
        "best": float(np.mean([min(laps) for laps in tracks.values()])) if each else None,
        "ends": dict(Counter(run["end"] for run in races)),
        "return_lap_correlation": lap_correlation(races),
        "mean_position": float(np.mean([run["place"] for run in races])),
        "wins": sum(run["finished"] and run["place"] == 1 for run in races),
    }


def draw_map(races: list[dict]) -> Figure:
    """The first race's road, the races on it coloured by speed, and a cross where one ended early."""
    figure, track = Figure(figsize=(7, 6), layout="constrained"), races[0]["track"]
    axes = figure.add_subplot(aspect="equal", title=track)
    axes.plot(*races[0]["geometry"].nodes[:, :, [0, 2]].T, color="lightgray", linewidth=6)
    for run in [run for run in races if run["track"] == track and run["trail"]]:
        _, x, _, z, speed = np.array(run["trail"]).T
        dots = axes.scatter(x, z, c=speed, s=2, cmap="coolwarm", vmin=0, vmax=30)
        axes.plot(x[-1:], z[-1:], "none" if run["finished"] else "kx")
    figure.colorbar(dots, label="m/s")
    return figure


def write_mosaic(races: list[dict], path: Path, fps: float) -> None:
    """Films up to 16 races side by side; one that is over stands still on its last picture."""
    clips = [np.stack(run["pictures"]) for run in races[:16]]
    length, columns = max(map(len, clips)), math.ceil(len(clips) ** 0.5)
    clips = [clip[np.arange(length).clip(max=len(clip) - 1)] for clip in clips]
    clips += [np.zeros_like(clips[0])] * (-len(clips) % columns)
    rows = [np.concatenate(clips[i : i + columns], 2) for i in range(0, len(clips), columns)]
    film = np.concatenate(rows, 1).repeat(2, 1).repeat(2, 2)
    imageio.mimwrite(path, list(film), fps=fps, macro_block_size=2)


def film_race(args: Args, run: dict, path: Path) -> None:
    """Drives a race again, from its seed and actions, and films it: 640 x 480, 20 pictures a second."""
    env: Any = make_env(args, run["track"], width=640, height=480, frame_stack=1)
    env.substeps = max(1, round(args.step_size / 0.05))
    env.reset(seed=run["seed"], options={"race": True})
    with imageio.get_writer(path, fps=env.substeps / args.step_size, macro_block_size=2) as film:
        env.on_picture = film.append_data
        for action in run["actions"]:
            env.step(action)


def evaluate(args: Args, checkpoint: dict) -> None:
    """Races a checkpoint on each track, greedily and sampled, beside the game's own AI; prints a table,
    and writes evaluation.json, map.png, mosaic.mp4 and best_race.mp4."""
    agent, versions = make_agent(args)
    load_weights(agent, checkpoint)
    seeds = range(args.eval_seed, args.eval_seed + args.eval_episodes)
    print(f"{len(seeds)} races each, {versions['engine']} {versions['engine_version']}, assets {versions['assets']}")
    print(f"{'':30}{'finished':>10}{'median':>10}{'best':>10}{'off track':>12}")
    for track in args.track:
        args = dataclasses.replace(args, track=(track,))
        folder = Path("runs", f"{Path(args.evaluate).stem}-{track}-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.mkdir(parents=True)
        races = {
            "greedy": race_all(args, agent, seeds),
            "sampled": race_all(args, agent, seeds, greedy=False),
            "ai": race_all(args, agent, seeds, driver="ai"),
        }
        best = min(races["greedy"], key=lambda run: run["lap_time"] if run["finished"] else 1e9 - run["progress"])
        filming = multiprocessing.Process(target=film_race, args=(args, best, folder / "best_race.mp4"))
        filming.start()
        write_mosaic(races["greedy"], folder / "mosaic.mp4", 1 / args.step_size)
        draw_map(races["greedy"]).savefig(folder / "map.png")

        result = vars(args) | versions | {"checkpoint": args.evaluate, "iteration": checkpoint["iteration"]}
        result.update({name: summarize(runs) for name, runs in races.items()}, seeds=list(seeds))
        greedy, ai = result["greedy"], result["ai"]
        result.update({key: greedy[key] for key in ("finished", "lap_times", "median", "off_track_seconds")})
        result.update(ai_lap_times=ai["lap_times"], ai_median=ai["median"])
        result["ratio"] = greedy["median"] / ai["median"] if greedy["median"] and ai["median"] else None
        pairs = zip(races["greedy"], races["ai"], strict=True)  # nan where the AI did not finish
        faster = [one["finished"] and not one["lap_time"] >= two["lap_time"] for one, two in pairs]
        result["faster_than_ai"] = sum(faster)
        (folder / "evaluation.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
        for name in races:
            times = [result[name][key] for key in ("median", "best", "off_track_seconds")]
            cells = ["-" if seconds is None else f"{seconds:.2f} s" for seconds in times]
            finished = f"{result[name]['finished']}/{len(seeds)}"
            print(f"{f'{track} {name}':30}{finished:>10}{cells[0]:>10}{cells[1]:>10}{cells[2]:>12}")
        if result["ratio"]:
            print(f"the greedy median is {result['ratio']:.3f} of the AI's; faster from {sum(faster)} starts")
        if (greedy["return_lap_correlation"] or 0) > 0:
            print("this reward pays more for slower laps: --reward progress does not")
        filming.join()
        print(f"written to {folder}/: evaluation.json, map.png, mosaic.mp4, best_race.mp4")


# --- Save and load --------------------------------------------------------------------------------


def make_agent(args: Args) -> tuple[Agent, dict[str, str]]:
    """The network for these settings, on its device, and the versions of engine and assets."""
    env: Any = make_env(args, args.track[0])
    agent = Agent(env.observation_space.shape, env.action_space.nvec)
    return agent.to(pick_device(args.device)), env.versions


def save(contents: dict, path: Path) -> None:
    """Writes a checkpoint so that a crash at any moment leaves either the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    torch.save(contents, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict:
    """A checkpoint with its "args" as Args; nothing in the file is executed. Raises UsageError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        known = {field.name for field in dataclasses.fields(Args)} - {"init_from"}
        settings = {name: value for name, value in checkpoint["args"].items() if name in known}
        checkpoint["args"] = Args(**settings)  # what only older scripts could set is left out
        return checkpoint
    except FileNotFoundError:
        raise UsageError(f"There is no checkpoint {path}: type the path of a run's last.pt or best.pt.") from None
    except Exception as error:  # whatever may be in a file
        raise UsageError(f"{path} is not a checkpoint of this script: type another path.") from error


def load_weights(agent: Agent, checkpoint: dict) -> None:
    """Puts a checkpoint's weights into the network. Raises UsageError where they do not fit."""
    try:
        agent.load_state_dict(checkpoint["agent"])
    except (KeyError, RuntimeError) as error:
        fits = "type the --actions, --frame-stack, --width and --height that it learnt with."
        raise UsageError(f"The checkpoint holds another network than this run's: {fits}") from error


# --- Learning -------------------------------------------------------------------------------------

FRESH_GAMES = 16  # iterations after which all games begin afresh and last.pt is written
SAVE_SECONDS = 240.0  # after which it is written in any case


def next_lesson(lesson: dict, passed: bool, agent: Agent) -> dict:
    """The speed curriculum. lesson: the speed cap, the last that was passed or None, the increment (m/s).

    A passed cap rises by the increment. After one that fails, the weights that passed last learn on,
    below a cap that is half the increment above theirs.
    """
    cap, increment = lesson["cap"], lesson["increment"]
    if passed:
        weights = copy.deepcopy(agent.state_dict())
        return {"cap": cap + increment, "passed": cap, "increment": increment, "weights": weights}
    if lesson["passed"] is None:
        return lesson
    agent.load_state_dict(lesson["weights"])
    increment = max(increment / 2, 0.25)
    return lesson | {"cap": lesson["passed"] + increment, "increment": increment}


def exam(args: Args, agent: Agent, folder: Path, writer: Any, step: int) -> tuple[bool, list[float]]:
    """Greedy races while learning, from other starts than --evaluate reports, since these choose best.pt.

    Returns whether all finished, and a score: finish rate, then median lap, then progress.
    """
    first = args.eval_seed + 10_000
    races = race_all(args, agent, range(first, first + args.eval_episodes))
    summary = summarize(races)
    rate, median = summary["finished"] / len(races), summary["median"] or math.inf
    for name in ("finished", "progress", "off_track_seconds", "median", "best"):
        writer.add_scalar(f"eval/{name}", math.nan if summary[name] is None else summary[name], step)
    writer.add_figure("eval/map", draw_map(races), step)
    write_mosaic(races, folder / "races.mp4", 1 / args.step_size)
    tqdm.write(f"{step:>9} decisions: {summary['finished']}/{len(races)} finished, median {median:.2f} s")
    return rate == 1, [rate, -median, summary["progress"]]


def train(args: Args, checkpoint: dict | None) -> None:
    """Learns, from the start or from a run's last checkpoint; writes runs/<name>/."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(usable_cores())
    torch.manual_seed(args.seed)
    agent, versions = make_agent(args)
    device = next(agent.parameters()).device
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    lesson = {"cap": args.speed_cap, "passed": None, "increment": args.speed_curriculum}
    run: dict[str, Any] = {"iteration": 0, "best": [], "lesson": lesson, "recent": [], "seconds": 0.0, "lost_games": 0}
    if checkpoint:
        load_weights(agent, checkpoint)
        optimizer.load_state_dict(checkpoint["optimizer"])
        run = {name: checkpoint[name] for name in run}
    elif args.init_from:
        load_weights(agent, load_checkpoint(args.init_from))
    batch_size = args.num_envs * args.num_steps * world
    num_iterations, step = args.total_timesteps // batch_size, run["iteration"] * batch_size
    folder = args.resume or Path("runs", args.name)
    writer: Any = None
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=checkpoint is not None)
        writer = SummaryWriter(folder, purge_step=step + 1)
        writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in vars(args).items()))
    bar = tqdm(total=num_iterations * batch_size, initial=step, unit=" decisions", disable=rank > 0)
    envs: Any = None
    now: Any = None  # where the games stand
    last: dict = {}  # the last whole iteration, for last.pt
    saved_at, lost_in_a_row = time.time(), 0
    try:
        while run["iteration"] < num_iterations:
            # Anneal: the step size and the exploration fall linearly to zero
            started, left = time.time(), 1 - run["iteration"] / num_iterations
            optimizer.param_groups[0]["lr"] = args.learning_rate * left
            agent.epsilon = args.epsilon * left

            # Collect num_steps decisions in every game. Now and then the games begin afresh, from (seed,
            # iteration) alone, so a run that is resumed there is the run that never stopped
            try:
                if now is None or run["iteration"] % FRESH_GAMES == 0:
                    seed = args.seed * 1_000_000 + (run["iteration"] * world + rank) * args.num_envs
                    torch.manual_seed(seed + lost_in_a_row)
                    envs = envs or make_envs(args, args.num_envs, first=rank * args.num_envs)
                    envs.set_attr("speed_cap", run["lesson"]["cap"])
                    now = reset_games(envs, agent, range(seed, seed + args.num_envs))
                data, now, episodes = rollout(envs, agent, now, args.num_steps)
                lost_in_a_row = 0
            except LOST_GAME as error:  # the iteration once more, in new games
                end_games(envs)
                envs = now = None
                run["lost_games"] += 1
                lost_in_a_row += 1
                if lost_in_a_row == PATIENCE:
                    raise RunError(f"Games were lost {PATIENCE} times in a row: type fewer --num-envs.") from error
                continue
            sampled = time.time()

            # Advantages: what an action brought beyond what the critic expected
            data["advantages"] = compute_gae(data, args.gamma, args.gae_lambda)
            data["returns"] = data["advantages"] + data["values"]

            # Learn: some passes in minibatches, as long as the policy stays near the one that collected
            batch = {name: values.flatten(0, 1) for name, values in data.items()}
            metrics = ppo_update(agent, optimizer, batch, args)
            learnt = time.time()
            run["iteration"] += 1
            step += batch_size

            # Look: the last hundred episodes from the line, and now and then greedy races
            run["recent"] = [*run["recent"], *(episode for episode in episodes if episode["from_line"])][-100:]
            for name in ("return", "progress", "finished", "lap_time", "place"):
                values = [episode[name] for episode in run["recent"] if not math.isnan(episode[name])]
                metrics[f"charts/{name}"] = float(np.mean(values)) if values else math.nan
            metrics["charts/return_lap_correlation"] = lap_correlation(run["recent"]) or 0.0
            cap = run["lesson"]["cap"]
            settings = vars(args) | {"speed_cap": cap, "resume": None, "init_from": None}
            weights = {"args": settings, "versions": versions, "agent": agent.state_dict()}
            if args.eval_interval and (run["iteration"] % args.eval_interval == 0 or step == bar.total):
                passed, score = False, []
                if rank == 0:
                    passed, score = exam(dataclasses.replace(args, speed_cap=cap), agent, folder, writer, step)
                if score > run["best"]:
                    run["best"] = score
                    save(weights | run, folder / "best.pt")
                if args.speed_curriculum:
                    passed = bool(mean_over_ranks(torch.tensor(float(passed), device=device)))
                    run["lesson"] = next_lesson(run["lesson"], passed, agent)
                    now = None  # an episode is driven below one cap

            # Save: scalars of every iteration, and now and then what a run goes on from
            run["seconds"] += time.time() - started
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            metrics["charts/SPS"] = batch_size / (time.time() - started)
            metrics["charts/sampling_SPS"] = batch_size / (sampled - started)
            metrics["charts/update_seconds"] = learnt - sampled
            metrics["charts/elapsed_seconds"] = run["seconds"]
            metrics["charts/lost_games"] = run["lost_games"]
            metrics["charts/speed_cap"] = cap or math.inf
            for name, value in metrics.items() if writer else ():
                writer.add_scalar(name, value, step)
            last = copy.deepcopy(weights | run | {"optimizer": optimizer.state_dict()})
            if rank == 0 and (run["iteration"] % FRESH_GAMES == 0 or time.time() - saved_at > SAVE_SECONDS):
                save(last, folder / "last.pt")
                saved_at = time.time()
            bar.set_postfix({name: f"{metrics.get(f'charts/{name}', 0):.0%}" for name in ("progress", "finished")})
            bar.update(batch_size)
    finally:  # however it ends: nothing is lost, and no process stays
        bar.close()
        end_games(envs)
        if writer:
            writer.close()
        if last and rank == 0:
            save(last, folder / "last.pt")
            print(f"saved: type --resume {folder} to go on, --evaluate {folder}/last.pt to race it")


# --- The command line -----------------------------------------------------------------------------


def usable_cores() -> int:
    """The cores that this process may use, shared out over torchrun's processes on this machine."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)


def pick_device(name: str) -> torch.device:
    """The torch device for --device: auto takes a GPU if there is one for this rank. Raises UsageError."""
    gpu, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    if gpu >= gpus:
        raise UsageError(f"There are {gpus} CUDA devices for torch here: type --device cpu, or start fewer processes.")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


def stop(signum: int, frame: Any) -> None:
    """Ctrl-C and SIGTERM end a run by an exception, so that `finally` can save what was learnt."""
    raise KeyboardInterrupt(signum)


def keep_freed_memory() -> None:
    """Has glibc keep large tensors' memory instead of handing it back each time: learning takes half the time."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    keep_freed_memory()
    try:
        typed = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        typed.add_argument("--resume", type=lambda folder: Path(folder, "last.pt"))
        typed.add_argument("--evaluate", type=Path)
        path = typed.parse_known_args()[0].evaluate or typed.parse_known_args()[0].resume
        checkpoint = load_checkpoint(path) if path else None
        args = tyro.cli(Args, description=__doc__, default=checkpoint["args"] if checkpoint else Args())
        unique = os.environ.get("TORCHELASTIC_RUN_ID") or time.strftime("%Y%m%d-%H%M%S")
        args.name = args.name or f"{'-'.join(args.track)}-seed{args.seed}-{unique}"
        last = Path("runs", args.name, "last.pt")
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and last.exists():
            checkpoint = load_checkpoint(last)  # torchrun starts a run that broke down once more
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            pick_device(args.device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(1))
        evaluate(args, checkpoint) if args.evaluate else train(args, checkpoint)
    except (UsageError, RunError) as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt as interrupt:
        sys.exit(128 + (interrupt.args[0] if interrupt.args else signal.SIGINT))


if __name__ == "__main__":
    main()
