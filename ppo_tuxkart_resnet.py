"""PPO learns to drive the real SuperTuxKart from pixels, with deep networks.

Proximal Policy Optimization (Schulman et al. 2017, https://arxiv.org/abs/1707.06347), generalized
advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438), the networks of
IMPALA, tuxkart-ai, EC418. The kart sees pictures and nothing else; speed and place serve the reward, the
episode's end, the governor of those actions that ask for a speed, and a teacher. That is a small
network that sees the state of the game and learns first, fast, since nothing is drawn for it; then
the kart learns from its advice and by PPO (Chen et al. 2019, https://arxiv.org/abs/1912.12294).

    python ppo_tuxkart_resnet.py --track scotland                 # learn, with IMPALA's network
    python ppo_tuxkart_resnet.py --evaluate runs/<name>/best.pt   # race it against the game's AI
    python ppo_tuxkart_resnet.py --summary --network conv2d       # print a network and stop
"""

import atexit
import contextlib
import copy
import ctypes
import dataclasses
import functools
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch's idle threads spin

import filelock
import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import platformdirs
import torch
import torch.distributed as dist
import torchinfo
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class UsageError(ValueError):
    """What was typed, or what the machine lacks: one sentence on what to type (exit code 2)."""


@dataclasses.dataclass
class Game:
    """How the game is played: the settings of `TuxKartEnv`, and the first of the flags."""

    engine: Literal["auto", "pystk", "pystk2"] = "auto"  # auto prefers pystk2, which pip brings
    observe: Literal["pixels", "state"] = "pixels"  # state: numbers, and nothing is drawn
    width: int = 64  # width of the picture, in pixels
    height: int = 64  # height of the picture, in pixels
    frame_stack: int = 2  # pictures the network sees, the newest last
    step_size: float = 0.15  # seconds of game time for which an action is held
    random_start: float = 0.5  # share of the episodes that start anywhere on the track
    laps: tyro.conf.Suppress[int] = 1  # laps of a race
    reverse: tyro.conf.Suppress[bool] = False  # drive the track the other way round
    driver: tyro.conf.Suppress[Literal["agent", "ai"]] = "agent"  # ai: the game's own drives
    difficulty: int = 2  # the game's, 0 to 3: top speed is 0.6, 0.8, 0.92 or 1 of the full one
    num_karts: int = 1  # karts in the race; the game's AI drives the others
    reward: tuple[str, ...] = ("progress",)  # reward(s), weighted: progress:1 zigzag:0.1
    actions: Literal["skid", "drive", "ec418", "deepracer", "tuxkart", "tuxkart_rescue"] = "skid"  # what it decides
    speeds: tuple[float, ...] = (8.0, 16.0, 24.0)  # m/s to choose from, for --actions deepracer
    speed_cap: float | None = None  # m/s that the kart keeps below, whatever was decided
    color: Literal["rgb", "gray"] = "rgb"  # what the pictures hold
    info_picture: tyro.conf.Suppress[bool] = False  # whether an information picture comes first
    random_action_prob: float = 0.0  # chance per decision that a burst of random actions begins
    random_action_steps: int = 4  # length of such a burst

    def __post_init__(self) -> None:
        if isinstance(self.reward, str):
            self.reward = (self.reward,)
        for name, kind in typing.get_type_hints(Game).items():
            choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
            if choices and getattr(self, name) not in choices:
                raise UsageError(f"{name} is {getattr(self, name)}: type one of {', '.join(choices)}.")
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name, None)
            if value is not None and not least <= value <= most:
                name = name.replace("_", "-")
                raise UsageError(f"{name} is {value}: type a number from {least:.4g} to {most}.")
        if not self.speeds or list(self.speeds) != sorted({abs(speed) for speed in self.speeds}):
            raise UsageError("The speeds are in m/s, the slowest first: type --speeds 8 16 24.")
        parse_reward(self.reward)


@dataclasses.dataclass
class Args(Game):
    """PPO that drives SuperTuxKart from pixels. `--track scotland` is all it needs."""

    network: Literal["impala", "conv2d", "resnet3d", "ec418"] = "impala"  # which one
    base_channels: int | None = None  # channels of its first layer (default: 16, 128, 256, 32)
    frame_stack: int | None = None  # pictures it sees (default: 2, 4, 5, 2)
    amp: Literal["off", "bf16", "fp16"] = "off"  # half precision in the network; losses are float32
    summary: bool = False  # print the network's layers and stop
    moving_finish: bool = False  # end episodes at a line that moves on as they reach it
    track: tuple[str, ...] = ("scotland",)  # track(s) to learn; the games take them in turn
    total_timesteps: int = 262_144  # decisions to learn from, all games together
    seed: int = 1  # seed of the network, the actions, the minibatches and the starts
    name: str | None = None  # the run's folder under runs/ (default: track, seed and time)
    teacher: tuple[str, ...] = ("learn",)  # learn: one first; none; or checkpoints
    mirror: bool = True  # see each state mirrored as well, and decide by the mean
    resume: Path | None = None  # run folder to go on with; its settings hold but for those typed
    init_from: Path | None = None  # checkpoint to take the network's weights from, nothing else
    evaluate: Path | None = None  # checkpoint to race, beside the game's own AI; no learning
    eval_episodes: int = 20  # races per evaluation
    eval_seed: int = 1000  # seed of the first race of an evaluation, which disturbs its start
    eval_interval: int = 64  # iterations between evaluations while learning; 0 for none
    device: Literal["auto", "cpu"] = "auto"  # where the network runs; auto takes a GPU if any
    speed_curriculum: float | None = None  # m/s by which the cap rises when all races finish

    num_envs: int = 16  # games, each in a process of its own; with torchrun, of every rank
    num_steps: int = 128  # decisions per game and iteration
    learning_rate: float = 5e-4  # Adam's step size at the start; it falls linearly to zero
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    epochs: int = 3  # passes over the data of an iteration
    num_minibatches: int = 8  # minibatches per pass
    clip_coef: float = 0.2  # the clipped objective's epsilon
    ent_coef: float = 0.005  # weight of the entropy bonus
    vf_coef: float = 0.05  # weight of the value loss; more drowns the policy's gradient
    max_grad_norm: float = 0.5  # largest norm of the gradient
    epsilon: float = 0.0  # share of uniformly random actions; it falls linearly to zero
    grad_accum: int = 1  # pieces that a minibatch is computed in: less memory for the same gradient
    augment: Literal["none", "shift"] = "none"  # a penalty on what depends on shifts
    augment_coef: float = 0.1  # its weight

    def __post_init__(self) -> None:
        _, frames, channels, _ = NETWORKS[self.network]
        self.frame_stack = self.frame_stack or frames
        self.base_channels = self.base_channels or channels
        if self.network == "conv2d":
            self.color = "gray"
            self.info_picture = True
        if self.network == "resnet3d" and self.frame_stack < 5:
            raise UsageError("resnet3d needs 5 pictures or more: type --frame-stack 5.")
        super().__post_init__()
        batch = self.num_envs * self.num_steps
        if batch % self.num_minibatches or batch == self.num_minibatches:
            raise UsageError(f"{batch} decisions do not divide: type another --num-minibatches.")
        if len(self.track) > self.num_envs:
            raise UsageError(f"Each track needs a game: type --num-envs {len(self.track)} or more.")
        if self.observe == "state":
            self.teacher = ("none",)
            self.augment = "none"
        if len(self.teacher) not in (1, len(self.track)):
            raise UsageError("Type one --teacher for all tracks, or one for each.")
        if self.speed_curriculum and not (self.speed_cap and self.eval_interval):
            raise UsageError("--speed-curriculum needs a first cap: type --speed-cap 8 as well.")


BOUNDS: dict[str, tuple[float, float]] = {  # least and most
    **dict.fromkeys(("base_channels", "random_action_steps", "grad_accum"), (1, 10_000)),
    **dict.fromkeys(("random_action_prob", "augment_coef"), (0, 1)),
    **dict.fromkeys(("num_envs", "num_steps", "epochs", "num_minibatches"), (1, 10_000)),
    **dict.fromkeys(("seed", "eval_seed", "eval_interval", "total_timesteps"), (0, 10**12)),
    **dict.fromkeys(("random_start", "gamma", "gae_lambda", "epsilon", "clip_coef"), (0, 1)),
    **dict.fromkeys(("learning_rate", "ent_coef", "vf_coef", "max_grad_norm"), (0, 1e6)),
    **dict.fromkeys(("speed_cap", "speed_curriculum", "laps", "frame_stack"), (1, 100)),
    **dict.fromkeys(("width", "height"), (36, 2048)),
    "eval_episodes": (1, 10_000),
    "step_size": (1 / 120, 1),
    "difficulty": (0, 3),
    "num_karts": (1, 20),
}


# --- The network and PPO --------------------------------------------------------------------------

TAUGHT_EPOCHS = 5  # passes more while the teacher's weight is one


def orthogonal(layer: nn.Module, gain: float) -> nn.Module:
    nn.init.orthogonal_(layer.get_parameter("weight"), gain)
    nn.init.zeros_(layer.get_parameter("bias"))
    return layer


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def normalized(convolution: Any, activation: nn.Module) -> list[nn.Module]:
    """tuxkart-ai's layers: its batch normalization comes after the activation."""
    norm = nn.BatchNorm2d if isinstance(convolution, nn.Conv2d) else nn.BatchNorm3d
    return [convolution, activation, norm(convolution.out_channels)]


def count_features(layers: list[nn.Module], shape: Sequence[int]) -> int:
    """Numbers that come out of layers for one picture of a shape."""
    shapes = copy.deepcopy(nn.Sequential(*layers)).to("meta").eval()
    return shapes(torch.zeros(1, *shape, device="meta")).numel()


def impala_network(shape: Sequence[int], channels: int, frames: int) -> tuple[list, list, list]:
    """IMPALA's 15 layers (Espeholt et al. 2018, https://arxiv.org/abs/1802.01561, figure 3)."""
    trunk: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((shape[0], channels, 2 * channels, 2 * channels)):
        trunk += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
        for _ in range(2):
            first, second = (nn.Conv2d(outputs, outputs, 3, padding=1) for _ in range(2))
            trunk.append(Residual(nn.ReLU(), first, nn.ReLU(), second))
    hidden = orthogonal(nn.Linear(count_features(trunk, shape), 256), 2**0.5)
    return [*trunk, nn.ReLU(), nn.Flatten(), hidden, nn.ReLU()], [], []


def conv2d_network(shape: Sequence[int], channels: int, frames: int) -> tuple[list, list, list]:
    """tuxkart-ai's 2D network."""

    def residual() -> nn.Module:  # the second takes off the row that the first adds
        first, second = (nn.Conv2d(channels, channels, 4, padding=padding) for padding in (2, 1))
        return Residual(*normalized(first, nn.Tanh()), *normalized(second, nn.Tanh()))

    trunk = [
        *normalized(nn.Conv2d(shape[0], channels, 10, stride=4, padding=1), nn.Tanh()),
        residual(),
        *normalized(nn.Conv2d(channels, channels, 4, stride=2, padding=1), nn.Tanh()),
        residual(),
    ]
    policy, value = ([nn.Conv2d(channels, 1, 3, padding=1), nn.Tanh()] for _ in range(2))
    return trunk, policy, value


def resnet3d_network(shape: Sequence[int], channels: int, frames: int) -> tuple[list, list, list]:
    """tuxkart-ai's 3D ResNet."""
    convolution = functools.partial(nn.Conv3d, kernel_size=3, padding=1)
    residuals = []
    for _ in range(10):
        first, second = (convolution(channels, channels, bias=False) for _ in range(2))
        residuals += [Residual(*normalized(first, nn.ReLU()), second, nn.ReLU()), nn.BatchNorm3d(channels)]
    trunk = [
        nn.ChannelShuffle(frames),  # (B, T C, H, W) to (B, C T, H, W)
        nn.Unflatten(1, (-1, frames)),
        *normalized(convolution(shape[0] // frames, channels, stride=2), nn.ReLU()),
        *residuals[:10],
        *normalized(convolution(channels, channels, stride=3, padding=0), nn.ReLU()),
        *residuals[10:],
    ]
    middle = max(channels // 4, 1)
    policy = [*normalized(convolution(channels, middle), nn.ReLU()), nn.ReLU()]
    policy += normalized(convolution(middle, 1), nn.ReLU())
    return trunk, policy, [*normalized(convolution(channels, 1), nn.ReLU()), nn.ReLU()]


def ec418_network(shape: Sequence[int], channels: int, frames: int) -> tuple[list, list, list]:
    """EC418's actor and critic, which share nothing, on the mean of a picture's colours."""

    def network() -> list[nn.Module]:
        layers = [nn.BatchNorm2d(frames), nn.Conv2d(frames, channels, 8, stride=4), nn.ReLU()]
        layers += [nn.Conv2d(channels, 2 * channels, 4, stride=2), nn.ReLU()]
        layers += [nn.Conv2d(2 * channels, 2 * channels, 3), nn.ReLU(), nn.Flatten()]
        size = count_features(layers, (frames, *shape[1:]))
        return [*layers, orthogonal(nn.Linear(size, 512), 2**0.5), nn.ReLU()]

    return [nn.AvgPool3d((shape[0] // frames, 1, 1))], network(), network()


# A function of (C, H, W), the first layer's channels and the pictures: it returns layers of the
# trunk, of the policy, of the value; pictures and channels by default; gain of convolutions.
NETWORKS: dict[str, tuple[Callable, int, int, float | None]] = {
    "impala": (impala_network, 2, 16, None),  # as PyTorch draws them
    "conv2d": (conv2d_network, 4, 128, 1.0),
    "resnet3d": (resnet3d_network, 5, 256, 1.0),
    "ec418": (ec418_network, 2, 32, 2**0.5),
}


class Agent(nn.Module):
    """A network by name with a policy head and a value head.

    forward: uint8 pictures (B, C, H, W) -> logits (B, sum(nvec)), a block for each part of an
    action, and values (B,). Batch normalization has fixed statistics: see `refresh_batch_norm`.
    """

    epsilon = 0.0  # share of uniformly random actions
    teaching = 0.0  # weight of the divergence from the teacher; PPO's objective has the rest

    def __init__(self, obs_shape: Sequence[int], nvec: Sequence[int], args: Args) -> None:
        super().__init__()
        self.nvec = [int(n) for n in nvec]
        self.amp = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
        network, _, _, convolutions = NETWORKS[args.network]
        trunk, policy, value = network(obs_shape, args.base_channels, args.frame_stack)

        def head(layers: list[nn.Module], outputs: int, gain: float) -> nn.Module:
            size = count_features(trunk + layers, obs_shape)
            return nn.Sequential(*layers, nn.Flatten(), orthogonal(nn.Linear(size, outputs), gain))

        self.trunk = nn.Sequential(*trunk)
        self.policy = head(policy, sum(self.nvec), 0.01)
        self.value = head(value, 1, 1.0)
        for layer in self.modules():
            if convolutions and isinstance(layer, nn.Conv2d | nn.Conv3d):
                nn.init.orthogonal_(layer.weight, convolutions)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        if args.network != "resnet3d":
            self.to(memory_format=torch.channels_last)  # type: ignore  # faster on a CPU
        self.eval()

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        pictures = obs.float().div_(255.0).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda" if obs.is_cuda else "cpu", self.amp, enabled=self.amp is not None):
            hidden = self.trunk(pictures)
            return self.policy(hidden).float(), self.value(hidden).float().squeeze(-1)


class StateAgent(Agent):
    """Two perceptrons. forward: float states (B, S) -> what `Agent` returns.

    mirror: see each state mirrored, too, and decide by the mean, since a mirrored game is the same
    game. Steering is then the first part of an action, from left to right.
    """

    def __init__(self, obs_shape: Sequence[int], nvec: Sequence[int], mirror: bool = False) -> None:
        nn.Module.__init__(self)  # without the layers of `Agent`
        self.nvec = [int(n) for n in nvec]
        self.mirror = mirror
        heads = []
        for size, gain in ((sum(self.nvec), 0.01), (1, 1.0)):
            first, second = (orthogonal(nn.Linear(n, 256), 2**0.5) for n in (obs_shape[0], 256))
            heads.append(nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), orthogonal(nn.Linear(256, size), gain)))
        self.policy, self.value = heads

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        if not self.mirror:
            return self.policy(obs), self.value(obs).squeeze(-1)
        both = obs.repeat(2, 1)  # the states, then their mirror images
        both[len(obs) :, SIDEWAYS] *= -1
        logits, theirs = self.policy(both).chunk(2)
        theirs = torch.cat([theirs[:, : self.nvec[0]].flip(-1), theirs[:, self.nvec[0] :]], -1)
        return (logits + theirs) / 2, self.value(both).view(2, -1).mean(0)


def evaluate_actions(logits: Tensor, actions: Tensor, nvec: list[int], epsilon: float) -> tuple:
    """Log-probability and entropy, (B,) each, of actions (B, A) whose parts are independent.

    With `epsilon` the policy is the mixture with the uniform one, as `choose_actions` samples it;
    the entropy is that of the categorical part. logits: (B, sum(nvec)).
    """
    logprobs, entropies = [], []
    for block, action in zip(logits.split(nvec, -1), actions.unbind(-1), strict=True):
        block = block.log_softmax(-1)
        logprobs.append(block.gather(-1, action[:, None]).squeeze(-1))
        entropies.append(-(block.exp() * block).sum(-1))
    logprob = torch.stack(logprobs).sum(0)
    if epsilon:
        uniform = torch.full_like(logprob, math.log(epsilon / math.prod(nvec)))
        logprob = torch.logaddexp(logprob + math.log(max(1 - epsilon, 1e-30)), uniform)
    return logprob, torch.stack(entropies).sum(0)


def choose_actions(logits: Tensor, nvec: list[int], epsilon: float, greedy: bool = False) -> Tensor:
    """Most probable actions, or sampled ones (Gumbel-max): logits (B, sum(nvec)) -> (B, A)."""
    if epsilon:  # flat logits for the rows that act uniformly
        uniform = torch.rand(len(logits), 1, device=logits.device) < epsilon
        logits = torch.where(uniform, 0.0, logits)
    if not greedy:
        logits = logits - torch.empty_like(logits).exponential_().log()
    return torch.stack([block.argmax(-1) for block in logits.split(nvec, -1)], -1)


def compute_gae(data: dict[str, Tensor], gamma: float, gae_lambda: float) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), cut at every episode's end.

    data: rewards, values, next_values, terminations, dones, each (T, N). `next_values[t]` is V of
    what step t led to, a truncated episode's own last picture if it was cut there. Returns (T, N).
    """
    deltas = data["rewards"] + gamma * data["next_values"] * ~data["terminations"] - data["values"]
    advantages = torch.empty_like(deltas)
    running = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        running = deltas[t] + gamma * gae_lambda * running * ~data["dones"][t]
        advantages[t] = running
    return advantages


def teacher_kl(teacher_logits: Tensor, logits: Tensor, nvec: list[int]) -> Tensor:
    """KL(teacher || student), summed over an action's parts: logits (B, sum(nvec)) each -> (B,).
    Kickstarting's loss (Schmitt et al. 2018, https://arxiv.org/abs/1803.03835)."""
    total = torch.zeros_like(logits[:, 0])
    for theirs, ours in zip(teacher_logits.split(nvec, -1), logits.split(nvec, -1), strict=True):
        theirs, ours = theirs.log_softmax(-1), ours.log_softmax(-1)
        total = total + (theirs.exp() * (theirs - ours)).sum(-1)
    return total


def average_over_ranks(tensors: list[Any]) -> None:
    """With torchrun, puts the mean over all processes into each of the tensors, in one message."""
    if dist.is_initialized():
        message = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(message)
        means = message / dist.get_world_size()
        for tensor, mean in zip(tensors, means.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


@torch.no_grad()
def refresh_batch_norm(agent: Agent, obs: Tensor, momentum: float, args: Args) -> None:
    """Moves batch normalization's statistics towards those of as many pictures (B, C, H, W) as a
    minibatch has, in pieces, each normalized by itself. Between updates only, so that sampling and
    learning see the same network."""
    norms: list = [module for module in agent.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d)]
    if not norms:
        return
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    sums = [torch.zeros_like(torch.stack(pair)) for pair in before]  # of the mean and of the square
    most = args.num_envs * args.num_steps // args.num_minibatches
    some = obs[torch.randperm(len(obs))[:most]].to(sums[0].device)
    for norm in norms:
        norm.train().momentum = 1.0
    for piece in some.split(-(-len(some) // args.grad_accum)):
        agent(piece)
        for norm, total in zip(norms, sums, strict=True):
            square = norm.running_var + norm.running_mean**2
            total += len(piece) / len(some) * torch.stack([norm.running_mean, square])
    average_over_ranks(sums)
    for norm, (old_mean, old_variance), (mean, square) in zip(norms, before, sums, strict=True):
        norm.running_mean.copy_(old_mean.lerp(mean, momentum))
        norm.running_var.copy_(old_variance.lerp((square - mean**2).clamp(min=0.0), momentum))
    agent.eval()


def random_shift(obs: Tensor, pad: int = 4) -> Tensor:
    """Every picture (B, C, H, W) moved by up to `pad` pixels, its edges repeated."""
    padded = nn.functional.pad(obs.float(), (pad,) * 4, mode="replicate").to(obs.dtype)
    windows = padded.unfold(2, obs.shape[2], 1).unfold(3, obs.shape[3], 1)  # (B, C, y, x, H, W)
    down, right = torch.randint(2 * pad + 1, (2, len(obs)), device=obs.device)
    return windows[torch.arange(len(obs), device=obs.device), :, down, right]


def ppo_loss(agent: Agent, batch: dict[str, Tensor], args: Args) -> tuple[Tensor, dict]:
    """The clipped surrogate objective (Schulman et al. 2017, eqs. 7 and 9) of one minibatch, and scalars.

    batch: obs (B, C, H, W), actions (B, A), logprobs, advantages (normalized), returns (B,).
    KL: (r - 1) - log r (http://joschu.net/blog/kl-approx.html).
    """
    logits, values = agent(batch["obs"])
    logprobs, entropy = evaluate_actions(logits, batch["actions"], agent.nvec, agent.epsilon)
    logratio = logprobs - batch["logprobs"]
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    advantages = batch["advantages"]
    policy_loss = torch.max(-advantages * ratio, -advantages * clipped).mean()
    value_loss = 0.5 * ((values - batch["returns"]) ** 2).mean()
    loss = policy_loss - args.ent_coef * entropy.mean()
    scalars = {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy.mean(),
        "losses/approx_kl": ((ratio - 1) - logratio).mean(),
        "losses/clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
        "losses/ratio_error": (ratio - 1).abs().max(),
    }
    if agent.teaching:
        divergence = teacher_kl(batch["teacher_logits"], logits, agent.nvec).mean()
        loss = (1 - agent.teaching) * loss + agent.teaching * divergence
        scalars["losses/teacher_kl"] = divergence
    loss = loss + args.vf_coef * value_loss
    if args.augment == "shift":  # DrAC (Raileanu et al. 2021, https://arxiv.org/abs/2006.12862)
        shifted_logits, shifted_values = agent(random_shift(batch["obs"]))
        divergence = teacher_kl(logits.detach(), shifted_logits, agent.nvec)
        value_error = (shifted_values - values.detach()) ** 2
        scalars["losses/augment_loss"] = (divergence + args.vf_coef * value_error).mean()
        loss = loss + args.augment_coef * scalars["losses/augment_loss"]
    return loss, {name: scalar.detach() for name, scalar in scalars.items()}


def ppo_update(agent: Agent, optimizer: Any, scaler: Any, batch: dict, args: Args) -> dict:
    """All passes over one iteration's data; batch: B rows of what `ppo_loss` takes, and values.

    Then moves batch normalization's statistics. scaler: torch's, for float16.
    Returns the means of its scalars (ratio_error: of the first minibatch, where it shows how far
    sampling and learning disagree about the same network), and explained_variance.
    """
    size = len(batch["returns"])
    history: list[dict[str, Tensor]] = []
    for _ in range(args.epochs + round(TAUGHT_EPOCHS * agent.teaching)):
        shuffled = torch.randperm(size).to(batch["returns"].device)
        for rows in shuffled.split(size // args.num_minibatches):
            minibatch = {name: batch[name][rows] for name in batch}
            advantages = minibatch["advantages"] - minibatch["advantages"].mean()
            minibatch["advantages"] = advantages / (advantages.std() + 1e-8)
            optimizer.zero_grad()
            for piece in torch.arange(len(rows)).split(-(-len(rows) // args.grad_accum)):
                loss, scalars = ppo_loss(agent, {name: minibatch[name][piece] for name in batch}, args)
                history.append(scalars)
                scaler.scale(loss * len(piece) / len(rows)).backward()
            average_over_ranks([parameter.grad for parameter in agent.parameters()])
            scaler.unscale_(optimizer)
            finite = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm).isfinite()
            if not finite and scaler.get_scale() <= 1:  # above, float16 overflows at times
                raise SystemExit("No finite gradient: look at --reward, or lower --learning-rate.")
            scaler.step(optimizer)
            scaler.update()
    refresh_batch_norm(agent, batch["obs"], 0.1, args)
    metrics = {name: torch.stack([row[name] for row in history]).mean().item() for name in scalars}
    metrics["losses/ratio_error"] = history[0]["losses/ratio_error"].item()
    unexplained = (batch["returns"] - batch["values"]).var() / batch["returns"].var().clamp(1e-8)
    metrics["losses/explained_variance"] = 1 - unexplained.item()
    return metrics


def govern(target: float, speed: float) -> dict[str, Any]:
    """Acceleration and brake that hold a target speed, in m/s; the brake drives backwards, too."""
    return {"acceleration": min(max((target - speed) / 2, 0.0), 1.0), "brake": speed > target + 2}


def drive_actions(action: list[int], speed: float, speeds: Sequence[float]) -> dict[str, Any]:
    """Steer in five positions, gas, coast or brake, drift, nitro."""
    steer, pedal, drift, nitro = action
    pedals = {"acceleration": float(pedal == 0), "brake": pedal == 2, "pace": float(pedal == 0)}
    return {"steer": steer / 2 - 1, "drift": bool(drift), "nitro": bool(nitro), **pedals}


def ec418_actions(action: list[int], speed: float, speeds: Sequence[float]) -> dict[str, Any]:
    """EC418's bits, the highest first: left, right (both: nitro), 25 m/s (else 5), drift."""
    left, right, fast, drift = (bool(action[0] >> bit & 1) for bit in (3, 2, 1, 0))
    buttons = {"drift": drift, "nitro": left and right, "pace": 1.0 if fast else 0.2}
    return {"steer": float(right) - left, **buttons, **govern(25.0 if fast else 5.0, speed)}


def deepracer_actions(action: list[int], speed: float, speeds: Sequence[float]) -> dict[str, Any]:
    """DeepRacer's: one of seven angles, 30 degrees left to 30 right, with one of the speeds."""
    angle, pace = divmod(action[0], len(speeds))
    steer = (-30, -20, -10, 0, 10, 20, 30)[angle] / 30
    return {"steer": steer, "pace": speeds[pace] / max(speeds), **govern(speeds[pace], speed)}


def tuxkart_actions(action: list[int], speed: float, speeds: Sequence[float]) -> dict[str, Any]:
    """tuxkart-ai's: acceleration, brake, steer, fire, drift, nitro, and maybe the rescue."""
    gas, brake, steer, *buttons = action
    pressed = zip(("fire", "drift", "nitro", "rescue"), map(bool, buttons), strict=False)
    pedals = {"acceleration": float(gas), "brake": bool(brake), "pace": float(gas)}
    return {"steer": steer - 1.0, **pedals, **dict(pressed)}


# How many choices each part of an action has, given the number of speeds, and what the game is
# told: steer from -1 (left) to 1, pedals and buttons. pace: as a share of the fastest choice.
ACTIONS: dict[str, tuple[Callable, Callable]] = {
    "skid": (lambda speeds: [5, 3, 2, 2], drive_actions),  # a drift begins in full steering, and lasts
    "drive": (lambda speeds: [5, 3, 2, 2], drive_actions),
    "ec418": (lambda speeds: [16], ec418_actions),
    "deepracer": (lambda speeds: [7 * speeds], deepracer_actions),
    "tuxkart": (lambda speeds: [2, 2, 3, 2, 2, 2], tuxkart_actions),
    "tuxkart_rescue": (lambda speeds: [2, 2, 3, 2, 2, 2, 2], tuxkart_actions),
}


class Moment(NamedTuple):
    """What a reward may know of one decision, in metres, seconds, degrees; right is positive."""

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


def tuxkart_reward(moment: Moment) -> float:
    """tuxkart-ai's shaped sum. What it paid for every step of pays once, when it begins."""
    prices = {"powerup": 3.0, "use": 1.0, "nitro": 3.0, "drift": 3.0, "jump": -3.0, "rescue": -5.0}
    events = sum(prices[event] for event in moment.events)
    return moment.gain + 10.0 * moment.finished + 5.0 * moment.places + events


REWARDS: dict[str, Callable[[Moment], float]] = {
    "progress": progress_reward,
    "centerline": centerline_reward,
    # DeepRacer's "stay inside the two borders" and "prevent zig-zag"
    "borders": lambda m: 1.0 if 0.5 * m.width - abs(m.offset) >= 0.05 else 1e-3,
    "zigzag": lambda m: centerline_reward(m) * (0.8 if abs(m.steering) > 15 else 1.0),
    # DeepRacer's examples for the heading and for the speed: half below 1 m/s of its 4
    "heading": lambda m: 0.5 if abs(m.heading) > 10 else 1.0,
    "speed": lambda m: 1e-3 if abs(m.offset) > 0.5 * m.width else 0.5 if m.pace < 0.25 else 1.0,
    # EC418's metres within 6 m of the middle, without its cap of 5 m/s and its pay for standing
    "ec418": lambda m: 0.1 * max(m.gain, 0.0) * (abs(m.offset) < 6),
    "tuxkart": tuxkart_reward,
}


def parse_reward(parts: Iterable[str]) -> dict[str, float]:
    """("progress", "zigzag:0.1") as {"progress": 1.0, "zigzag": 0.1}. Raises UsageError."""
    weights = {}
    for part in parts:
        name, _, weight = part.partition(":")
        if name not in REWARDS:
            raise UsageError(f"There is no reward {name}: type one of {', '.join(REWARDS)}.")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise UsageError(f"{part} has no number for a weight: type {name}:0.5.") from None
    return weights


# --- The game -------------------------------------------------------------------------------------

ENGINES = {"pystk2": "PySuperTuxKart2", "pystk": "PySuperTuxKart"}  # PyPI's "pystk" is another
LAP_SECONDS = 150.0  # time limit of a lap, in game time
DRIFT_SECONDS = 1.1  # a drift of about a second ends with a boost, which random actions never find
OFF_TRACK_METRES = 10.0  # so far beyond the edge of the road an episode ends
AHEAD = np.array([5, 10, 15, 20, 30, 40, 50, 65, 80, 100, 120])  # metres that a state tells of
ITEMS = (("NITRO_SMALL", "NITRO_BIG"), ("BANANA",))  # that a state tells of, too
ITEMS_AT = 14 + 4 * len(AHEAD)  # where in a state the items begin; SIDEWAYS: what a mirror negates
SIDEWAYS = np.r_[0, 2, 3, 6, 12, 14 : 14 + len(AHEAD), ITEMS_AT : ITEMS_AT + 2 * len(ITEMS)]
# What says where an engine may write. pystk2 would write into the player's own saves.
WRITES = ("SUPERTUXKART_SAVEDIR", "MESA_SHADER_CACHE_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME")


@functools.cache
def find_game(engine: str) -> tuple[dict[str, str], list[str]]:
    """Engine and assets, with versions, and the race tracks that lie here. Raises UsageError."""
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    found = [m for m in ENGINES if ENGINES[m] in installed and engine in ("auto", m)]
    if not found:
        raise UsageError(f"No engine {engine}: type ./install.sh --engine {engine}, or pip install PySuperTuxKart2")
    if found[0] == "pystk":
        root = Path(importlib.import_module("pystk_data").data_dir)
    else:  # which fetches them at its first start, where install.sh has not laid them out
        root = Path(platformdirs.user_cache_dir(ENGINES["pystk2"], "bpiwowar"), "1.5")
        root.parent.mkdir(parents=True, exist_ok=True)  # or it says here that it cannot
    assets = min((file.name[13:] for file in root.glob("data/supertuxkart.[0-9]*")), default="")
    tracks = {file.parent.name for file in root.glob("data/tracks/*/quads.xml")}
    game = {"engine": found[0], "engine_version": installed[ENGINES[found[0]]], "assets": assets}
    return game, sorted(tracks - {"overworld", "tutorial"})


class TrackGeometry:
    """The track's centre line in segments, and where points lie along it; in metres and radians.

    nodes: (S, 2, 3), both ends of each, y is up. widths: (S,). distances: (S, 2), down the track.
    """

    def __init__(self, nodes: Any, widths: Any, distances: Any, length: float) -> None:
        self.nodes = np.array(nodes, np.float64)
        self.widths = np.array(widths, np.float64).reshape(-1)
        self.distances = np.array(distances, np.float64)
        self.length = float(length)
        self.vectors = self.nodes[:, 1] - self.nodes[:, 0]
        self.headings = np.arctan2(self.vectors[:, 0], self.vectors[:, 2])

        ring = [0]  # the segments of a lap: a branch that leaves it is not the road ahead
        while len(ring) == len(set(ring)):
            ring.append(int(((self.nodes[:, 0] - self.nodes[ring[-1], 1]) ** 2).sum(-1).argmin()))
        rounds = np.array([*ring[:-1], *ring[:-1]])
        self.milestones = self.distances[rounds, 0]
        self.milestones[len(ring) - 1 :] += self.length
        self.milestones = np.maximum.accumulate(self.milestones)
        self.road = np.column_stack([self.nodes[rounds, 0], self.widths[rounds]])

    def gain(self, before: float, after: Any) -> Any:
        """Metres from one distance down the track to another, in [-length/2, length/2)."""
        return (after - before + self.length / 2) % self.length - self.length / 2

    def locate(self, point: Any, along: float) -> tuple[float, float, float, float]:
        """Distance down the track, offset (right is positive), heading and width of the road at a point.

        Below a bridge, or beside another stretch, the middle of another road can be nearer. So the
        road `along` metres down, where the kart just was, comes first where the point (3,) is on it,
        then all that it is on, and that one if it is not too far off, then any.
        """
        relative = np.array(point, np.float64) - self.nodes[:, 0]
        squares = np.maximum((self.vectors**2).sum(-1, keepdims=True), 1e-9)
        share = (relative * (self.vectors / squares)).sum(-1).clip(0, 1)
        gap = relative - share[:, None] * self.vectors
        squares = (gap**2).sum(-1)
        half = self.widths / 2
        on_road = (np.hypot(gap[:, 0], gap[:, 2]) <= half) & (np.abs(gap[:, 1]) < 2.5)
        near = np.abs(self.gain(along, self.distances.mean(-1))) < 50
        beside = near & (squares <= (half + OFF_TRACK_METRES) ** 2)
        choices = (near & on_road, on_road | beside, np.ones_like(near))
        choice = next(some for some in choices if some.any())
        nearest = int(np.where(choice, squares, np.inf).argmin())
        begin, end = self.distances[nearest]
        distance = float(begin + share[nearest] * (end - begin)) % self.length
        heading = float(self.headings[nearest])
        x, _, z = gap[nearest].tolist()
        offset = math.copysign(math.hypot(x, z), x * math.cos(heading) - z * math.sin(heading))
        return distance, offset, heading, float(self.widths[nearest])


class TuxKartEnv(gym.Env):
    """One kart in the real SuperTuxKart, seen through its own camera. settings: those of `Game`.

    Observation: uint8 (3 * frame_stack, height, width), RGB, the newest picture last. Action: one of ACTIONS,
    held for `step_size` seconds. Reward: the weighted sum of REWARDS. An episode ends with the finish, or
    stuck, off the track or backwards; a time limit truncates it. `reset(seed=...)` loads the track anew, so
    that nothing is left of what was before. `options={"race": True}` begins an evaluation race: from the
    line, disturbed by what the seed draws, and over after 15 s without progress. A process runs one game.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 7}
    started: tuple | None = None  # the process that has begun a game, and which
    playing: Any = None  # the environment whose race it is
    film: Any = None  # imageio's, for three pictures a decision
    events: tuple[str, ...] = ()  # what began with the last decision, where a subclass tells
    finishes: tuple[str, ...] = ("finished", "line")  # the ends that are good ones

    def __init__(self, track: str = "scotland", render_mode: Any = None, **settings: Any) -> None:
        self.game = Game(**settings)
        try:
            self.versions, tracks = find_game(self.game.engine)
            ours = Path(tempfile.gettempdir(), f"tuxkart-{getattr(os, 'getuid', int)()}")
            self.home = os.environ.get("SUPERTUXKART_SAVEDIR", str(ours))
            os.makedirs(self.home, exist_ok=True)
        except (OSError, RuntimeError) as error:  # an unknown user, a read-only system
            raise UsageError(f"The game cannot write ({error}): set HOME and TMPDIR to folders of yours.") from error
        if tracks and track not in tracks:
            raise UsageError(f"There is no track {track}: type one of {', '.join(tracks)}.")
        self.track = track
        self.render_mode = render_mode
        self.weights = parse_reward(self.game.reward)
        self.speed_cap = self.game.speed_cap
        choices, self.controls = ACTIONS[self.game.actions]
        shape = (3 * self.game.frame_stack, self.game.height, self.game.width)
        pixels = gym.spaces.Box(0, 255, shape, np.uint8)
        state = gym.spaces.Box(-np.inf, np.inf, (ITEMS_AT + 4 * len(ITEMS),), np.float32)
        self.observation_space = state if self.game.observe == "state" else pixels
        self.action_space = gym.spaces.MultiDiscrete(choices(len(self.game.speeds)))
        self.picture = np.zeros((3, *shape[1:]), np.uint8)
        self.race: Any = None

    def start_engine(self) -> None:
        """Starts the game, once in a process."""
        game = self.game
        self.drawn = game.driver == "agent" and game.observe != "state"
        wanted = (self.versions["engine"], game.width, game.height, self.drawn)
        process, begun = TuxKartEnv.started or (os.getpid(), wanted)
        if process != os.getpid():
            raise RuntimeError("This process was forked from one that plays: fork before, or spawn it.")
        if begun != wanted:
            raise RuntimeError("A process runs one game of one size: use AsyncVectorEnv.")
        # Mesa filters anisotropically in a loop, up to 71 s a frame; its threads gain nothing.
        hidden = "-GL_EXT_texture_filter_anisotropic -GL_ARB_texture_filter_anisotropic"
        os.environ.setdefault("MESA_EXTENSION_OVERRIDE", hidden)
        os.environ.setdefault("LP_NUM_THREADS", "0")
        parent = multiprocessing.parent_process()
        if parent and not TuxKartEnv.started:  # one of many games, which ends with its parent
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
            # The engine talks to descriptors 1 and 2 from C++; what Python prints is still seen.
            sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
            sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
        self.stk = importlib.import_module(self.versions["engine"])
        if not TuxKartEnv.started:
            graphics = getattr(self.stk.GraphicsConfig, "ld" if self.drawn else "none")()
            graphics.screen_width = game.width
            graphics.screen_height = game.height
            if hasattr(graphics, "display"):  # pystk2 would draw each picture twice, for a window too
                graphics.display = False
            assets = platformdirs.user_cache_dir(ENGINES["pystk2"], "bpiwowar")  # which stay in the user's home
            with (
                mock.patch.dict(os.environ, dict.fromkeys(WRITES, self.home)),
                mock.patch.object(platformdirs, "user_cache_dir", return_value=assets),
            ):
                self.stk.init(graphics)
            atexit.register(self.stk.clean)
            atexit.register(lambda: TuxKartEnv.playing and TuxKartEnv.playing.close())  # before it
        TuxKartEnv.started = (os.getpid(), wanted)
        self.world = self.stk.WorldState()
        # Wind and the like move with the wall clock, and no two races would look alike.
        library = ctypes.CDLL(self.stk.__file__) if sys.platform == "linux" else None
        self.srand = getattr(library, "srand", id)  # id does nothing, where these are hidden
        self.seed_scenery = getattr(library, "_ZN3irr2os10Randomizer5resetEi", id)
        self.set_clock = getattr(library, "_ZN3irr2os5Timer7setTimeEj", id)
        getattr(library, "_ZN3irr2os5Timer8setSpeedEf", id)(ctypes.c_float(0.0))

    def load_track(self) -> None:
        """Loads the track; everything in the game is new after it, the camera too."""
        if TuxKartEnv.playing:  # the engine allows one race at a time
            TuxKartEnv.playing.close()
        with contextlib.suppress(OSError, ValueError):  # pystk2 keeps cameras that drew nothing, with their dead karts
            cameras = (ctypes.c_void_p * 3).in_dll(ctypes.CDLL(self.stk.__file__), "_ZN6Camera13m_all_camerasE")
            cameras[1] = cameras[0]  # a C++ vector that ends where it begins
        config = self.stk.RaceConfig(track=self.track, num_kart=self.game.num_karts)
        for name in ("laps", "reverse", "difficulty", "step_size"):
            setattr(config, name, getattr(self.game, name))
        config.seed = self.np_random_seed % 2**31  # what items give, and how the AI drives
        kinds = self.stk.PlayerConfig.Controller
        config.players[0].kart = "tux"
        config.players[0].controller = kinds.AI_CONTROL if self.game.driver == "ai" else kinds.PLAYER_CONTROL
        if hasattr(config, "overlay"):
            config.overlay = False  # pystk2 would draw its HUD into the picture; pystk has none
        for seed_or_clock in (self.srand, self.seed_scenery, self.set_clock):
            seed_or_clock(0)
        self.race = self.stk.Race(config)
        self.race.start()
        TuxKartEnv.playing = self
        road = self.stk.Track()
        road.update()
        self.geometry = TrackGeometry(road.path_nodes, road.path_width, road.path_distance, road.length)
        self.world.update()
        self.items = []  # of each kind: distances down the track, rising, and locations
        for kinds in ITEMS:
            points = [item.location for item in self.world.items if item.type.name in kinds]
            places = sorted((self.geometry.locate(p, 0.0)[0], *map(float, p)) for p in points)
            after_line = [(distance + road.length, *point) for distance, *point in places[:2]]
            self.items.append(np.array([*places, *after_line, *[(math.inf, 0, 0, 0)] * 2]))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        options = options or {}
        self.in_race = bool(options.get("race"))
        self.speed_cap = options.get("speed_cap", self.speed_cap)
        if "tracks" in options:
            self.track = options["tracks"][self.np_random_seed % len(options["tracks"])]
        if self.race is None:
            self.start_engine()
        if self.race is None or seed is not None or "tracks" in options or self.game.driver == "ai":
            self.load_track()  # for the AI always: a restart would take the wheel from it
        else:
            self.race.restart()
        self.world.update()
        self.advance(1 / 120, self.stk.Action())
        location = np.array(self.kart.location)
        heading = self.heading
        if hasattr(self.world, "phase"):  # pystk2 counts down for 5 s before a kart can drive
            self.advance(4.9)
            while self.world.time == 0:
                self.advance(0.05)
        random = self.np_random
        self.from_line = self.in_race or random.random() >= self.game.random_start
        self.along = self.handicap = 0.0
        if self.in_race:  # a little aside, askew and late, by amounts drawn from the seed
            self.put(location, random.uniform(-2, 2), heading, random.uniform(-10, 10), 1 / 120)
            delay = 0.05 * int(random.integers(5)) * (self.game.num_karts == 1)  # none beside others
            if self.game.driver == "ai":  # it would drive off, so its clock gets the delay instead
                self.handicap = delay
            elif delay:
                self.advance(delay)
        for _ in range(0 if self.from_line else 5):  # on a random path node; it drops, and the camera follows
            node = int(random.integers(len(self.geometry.nodes)))
            askew = random.uniform(-20, 20)
            aside = random.uniform(-0.3, 0.3) * self.geometry.widths[node]
            middle = self.geometry.nodes[node, 0] + self.geometry.vectors[node] / 2
            self.put(middle + [0, 0.5, 0], aside, self.geometry.headings[node], askew, 0.3)
            self.along = float(self.geometry.distances[node].mean())
            if abs(self.kart.location[1] - middle[1]) < 2:  # else it fell through the road
                break

        self.spot = self.geometry.locate(self.kart.location, self.along)
        self.along = self.spot[0]
        to_line = -self.along % self.geometry.length  # most tracks' start is before the line
        laps = self.game.laps - 1 + (self.from_line and to_line < self.geometry.length / 2)
        self.distance = to_line + laps * self.geometry.length
        slowest = 2 * self.distance / (self.speed_cap or math.inf)
        self.limit = max(LAP_SECONDS * self.game.laps, slowest) if self.from_line else 30.0
        self.started_at = self.best_at = self.world.time
        self.progress = self.best = self.speed = self.off_track_seconds = self.drifted = 0.0
        self.held: dict[str, Any] = {"steer": 0.0, "nitro": False}  # the last decision's controls
        self.returns = dict.fromkeys(self.weights, 0.0)
        self.trail: list[tuple[float, ...]] = []  # (clock, x, y, z, speed) after every decision
        self.frames = np.repeat(self.picture[None], self.game.frame_stack, 0)  # (K, 3, H, W)
        return self.observation(), {}

    def put(self, location: Any, aside: float, road: float, askew: float, seconds: float) -> None:
        """Puts the kart metres right of a location (3,), degrees askew to the road, and waits."""
        location = np.array(location) + aside * np.array([math.cos(road), 0.0, -math.sin(road)])
        turn = (road + math.radians(askew)) / 2
        rotation = (0.0, math.sin(turn), 0.0, math.cos(turn))  # x, y, z, w
        kart = self.game.num_karts - 1
        self.stk.WorldState.set_kart_location(kart, tuple(location.tolist()), rotation, 0.0)
        self.advance(seconds)

    def step(self, action: Iterable[int]) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.race is None:
            raise RuntimeError("No race is on, or another environment has taken the game: call reset().")
        before = self.world.time
        place = self.place
        controls = self.drive([int(choice) for choice in action])
        now = self.world.time
        self.frames = np.concatenate([self.frames[1:], self.picture[None]])

        self.spot = self.geometry.locate(self.kart.location, self.along)
        along, offset, heading, width = self.spot
        gain = min(self.geometry.gain(self.along, along), 60 * self.game.step_size)  # metres
        if self.kart.finish_time > 0:  # the gains of every race sum to the same
            gain = self.distance - self.progress
        self.along = along
        self.progress += gain
        ahead = (math.sin(self.heading), 0.0, math.cos(self.heading))
        self.speed = float(np.dot(self.kart.velocity, ahead))  # below 0 in reverse
        if self.progress > self.best + 2:
            self.best = self.progress
            self.best_at = now
        off_track = max(abs(offset) - width / 2, 0.0)
        self.off_track_seconds += (now - before) * (off_track > 0)
        self.trail.append((now, *map(float, self.kart.location), self.speed))

        end = self.why_over(off_track)
        truncated = end == "time limit"
        terminated = bool(end) and not truncated
        good_end = end in self.finishes
        moment = Moment(
            gain=gain,
            seconds=now - before,
            offset=offset,
            width=width,
            heading=(math.degrees(self.heading - heading) + 180) % 360 - 180,
            steering=30 * controls["steer"],
            pace=controls["pace"],
            finished=good_end,
            failed=terminated and not good_end,
            places=place - self.place,
            events=self.events,
        )
        rewards = {name: weight * REWARDS[name](moment) for name, weight in self.weights.items()}
        self.returns = {name: self.returns[name] + reward for name, reward in rewards.items()}
        info: dict[str, Any] = {}
        if end:
            finished = end == "finished"
            info = {
                "track": self.track,
                "end": end,
                "finished": finished,
                "lap_time": self.kart.finish_time + self.handicap if finished else math.inf,
                "progress": 1.0 if finished else self.progress / self.distance,  # share
                "place": self.place,
                "off_track_seconds": self.off_track_seconds,
                "from_line": self.from_line,
                "return": sum(self.returns.values()),
                **{f"reward/{name}": value for name, value in self.returns.items()},
            }
        if end and self.in_race:
            info.update(trail=self.trail, geometry=self.geometry)
        return self.observation(), sum(rewards.values()), terminated, truncated, info

    def why_over(self, off_track: float) -> str:
        """Why the episode is over, or "" if it goes on. off_track: metres off the road's edge."""
        if self.kart.finish_time > 0:
            return "finished"
        # The game counts no lap that began elsewhere. It ends at the line all the same: to the eye
        # the two are one, and with a value between the two the kart put off the finish.
        if not self.from_line and self.progress >= self.distance:
            return "line"
        if self.world.time - self.best_at >= (15 if self.in_race else 4):
            return "stuck"
        if not self.in_race and self.progress < self.best - 15:
            return "backwards"
        if not self.in_race and off_track > OFF_TRACK_METRES:
            return "off track"
        return "time limit" if self.world.time - self.started_at >= self.limit else ""

    def drive(self, action: list[int]) -> dict[str, Any]:
        """Holds the controls of an action for one decision. Returns them."""
        controls = self.controls(action, self.speed, self.game.speeds)
        if self.game.actions == "skid":
            lasts = 0 < self.drifted < DRIFT_SECONDS
            controls["drift"] = lasts or (controls["drift"] and abs(controls["steer"]) == 1)
        if self.speed_cap is not None:
            cap = govern(self.speed_cap, self.speed)
            controls["acceleration"] = min(controls["acceleration"], cap["acceleration"])
            controls["brake"] = controls["brake"] or cap["brake"]
            controls["nitro"] = False
        pressed = self.stk.Action(**{name: value for name, value in controls.items() if name != "pace"})
        parts = [pressed, None, None] if self.film else [pressed]  # None: the game goes on with it by itself
        for part in parts:
            self.advance(self.game.step_size / len(parts), part)
            if self.film:
                self.film.append_data(self.render())
        self.held = {"drift": False, "nitro": False, **controls}
        self.drifted = self.held["drift"] * (self.drifted + self.game.step_size)
        return controls

    def advance(self, seconds: float, action: Any = None) -> None:
        """One step of the game, with an action, or going on with the last one."""
        self.race.config.step_size = seconds
        self.set_clock(int(1000 * self.world.time))
        if action is None or self.game.driver == "ai":
            self.race.step()
        else:
            self.race.step(action)
        self.world.update()
        mine = self.game.num_karts - 1  # the game puts its own karts first
        self.kart = self.world.karts[mine]
        ranks = [(k.finish_time > 0, -k.finish_time or k.overall_distance) for k in self.world.karts]
        self.place = 1 + sum(rank > ranks[mine] for rank in ranks)
        ahead = np.array(self.kart.front) - np.array(self.kart.location)
        self.heading = math.atan2(ahead[0], ahead[2])  # radians from +z towards +x
        if self.drawn:  # a view: the next step draws over it
            self.picture = np.asarray(self.race.render_data[0].image).transpose(2, 0, 1)

    def state(self) -> np.ndarray:
        """What a teacher sees, the same from both engines, float32 (S,); right, forward and up are positive.

        0, 1    sine and cosine of the angle from the road's heading to the kart's
        2, 3    offset from the middle of the road: half widths, and 10 m
        4       width of the road, 20 m
        5 to 7  velocity forward, to the right and up, 20, 10 and 10 m/s
        8, 9    slope that it stands on, sine; 1 in the air
        10      time since it made progress, 4 s
        11      time for which drift was held, s: after a second there is a boost when it is released
        12, 13  steering and nitro of the last decision
        14-57   at each of AHEAD's metres the middle of the road: to the right, then forward, then up, as a
                share of these metres; then the width of the road, 20 m
        58-65   the next two items of each of ITEMS' kinds, taken or not: to the right, 10 m, then forward,
                50 m; 0 and 2 where none is nearer than 100 m

        Not in it, because pystk tells nothing about it: nitro in the tank, charge of the skid, zippers. Nor
        is the place on the track, so that one network can drive many.
        """
        along, offset, road_heading, width = self.spot
        sine, cosine = math.sin(self.heading), math.cos(self.heading)
        east, up, north = self.kart.velocity
        numbers = [
            math.sin(self.heading - road_heading),
            math.cos(self.heading - road_heading),
            2 * offset / width,
            offset / 10,
            width / 20,
            (east * sine + north * cosine) / 20,
            (east * cosine - north * sine) / 10,
            up / 10,
            self.kart.front[1] - self.kart.location[1],
            self.kart.jumping,
            (self.world.time - self.best_at) / 4,
            self.drifted,
            self.held["steer"],
            self.held["nitro"],
        ]
        road = [np.interp(along + AHEAD, self.geometry.milestones, column) for column in self.geometry.road.T]
        items = np.concatenate([rows[np.searchsorted(rows[:, 0], along) :][:2] for rows in self.items])
        points = np.concatenate([np.stack(road[:3], -1), items[:, 1:]]) - self.kart.location
        right = points[:, 0] * cosine - points[:, 2] * sine
        forward = points[:, 0] * sine + points[:, 2] * cosine
        near = items[:, 0] < along + 100
        split = len(AHEAD)
        parts = (
            numbers,
            right[:split] / AHEAD,
            forward[:split] / AHEAD,
            points[:split, 1] / AHEAD,
            road[3] / 20,
            np.where(near, right[split:] / 10, 0),
            np.where(near, forward[split:] / 50, 2),
        )
        return np.concatenate(parts, dtype=np.float32)

    def observation(self) -> np.ndarray:
        if self.game.observe == "state":
            return self.state()
        return self.frames.reshape(-1, *self.frames.shape[2:])

    def render(self) -> np.ndarray:
        return self.picture.transpose(1, 2, 0).copy()

    def close(self) -> None:
        if self.race is not None:
            self.race.stop()
            TuxKartEnv.playing = None
        self.race = None


# A drift that is longer, never slower (m/s), earns a boost (kart_characteristics.xml); then a pause
BOOST_SECONDS, BOOST_SPEED, BOOST_PAUSE = 1.0, 10.0, 0.7


class PictureEnv(TuxKartEnv):
    """TuxKartEnv with tuxkart-ai's pictures and events, a moving finish, bursts of random actions.

    Gray pictures (ITU-R BT.601) have a channel each. The information picture is four bands of rows:
    nitro (pystk does not tell it: black), place, powerup, attachment. `finish_line`: the share of a
    race after which episodes from the start line end as if finished.
    """

    finishes = ("finished", "line", "finish line")

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.finish_line = 1.0
        channels = self.game.frame_stack * (3 if self.game.color == "rgb" else 1) + self.game.info_picture
        pixels = gym.spaces.Box(0, 255, (channels, *self.picture.shape[1:]), np.uint8)
        if self.game.observe == "pixels":
            self.observation_space = pixels

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        self.burst = 0
        self.going_on: set[str] = set()
        self.drifts = False
        self.drift_from = 0.0
        self.finish_line = (options or {}).get("finish_line", self.finish_line)
        return super().reset(seed=seed, options=options)

    def observation(self) -> np.ndarray:
        if self.game.observe == "state" or self.game.color == "rgb":
            return super().observation()
        pixels = np.einsum("kchw,c->khw", self.frames, [0.299, 0.587, 0.114]).round().astype(np.uint8)
        if self.game.info_picture:
            pixels = np.concatenate([self.information()[None], pixels])
        return pixels

    def information(self) -> np.ndarray:
        powerup, attachment = self.kart.powerup.type, self.kart.attachment.type
        nitro = getattr(self.kart, "energy", 0.0) / 20  # a tank holds 20
        place = (self.place - 1) / self.game.num_karts
        attached = 0.0 if attachment.name == "NOTHING" else (attachment.value + 1) / 10
        shares = (nitro, place, powerup.value / 10, attached)
        picture = np.zeros((self.game.height, self.game.width), np.uint8)
        for rows, share in zip(np.array_split(picture, 4), shares, strict=True):
            rows[:] = round(255 * share)
        return picture

    def drive(self, action: list[int]) -> dict[str, Any]:
        if self.game.random_action_prob and not self.in_race:
            if not self.burst and self.np_random.random() < self.game.random_action_prob:
                self.burst = self.game.random_action_steps
            if self.burst:
                action = self.np_random.integers(self.action_space.nvec).tolist()
            self.burst = max(self.burst - 1, 0)
        controls = super().drive(action)
        now = self.going_on_now(controls)
        self.events = tuple(name for name in now if name not in self.going_on)
        self.going_on = now
        return controls

    def going_on_now(self, controls: dict[str, Any]) -> set[str]:
        """What `tuxkart_reward` pays for, when it begins."""
        kart = self.kart
        clock = self.world.time
        nitro = [item.location for item in self.world.items if item.type.name in ITEMS[0]]
        drifts = bool(controls.get("drift")) and math.hypot(*kart.velocity) >= BOOST_SPEED
        if not drifts:
            self.drift_from = max(self.drift_from, clock + BOOST_PAUSE * self.drifts)
        self.drifts = drifts
        going_on = {
            "powerup": kart.powerup.type.name != "NOTHING",
            "jump": kart.jumping,
            "nitro": any(math.dist(item, kart.location) < 2 for item in nitro),
            "rescue": controls.get("rescue", False),
            "drift": clock - self.drift_from > BOOST_SECONDS,
            "use": controls.get("fire", False) and "powerup" in self.going_on,
        }
        return {name for name, on in going_on.items() if on}

    def why_over(self, off_track: float) -> str:
        moved = self.from_line and not self.in_race and self.finish_line < 1
        reached = moved and self.progress >= self.finish_line * self.distance
        return super().why_over(off_track) or ("finish line" if reached else "")


if "TuxKart-v0" not in gym.registry:
    gym.register("TuxKart-v0", entry_point=PictureEnv)  # type: ignore[arg-type]


# --- Driving, to learn and to race ----------------------------------------------------------------

LOST_GAME = (EOFError, BrokenPipeError, ConnectionResetError, multiprocessing.TimeoutError)
SILENCE = 60.0  # seconds without an answer after which a game is lost
PATIENCE = 3  # losses in a row after which a run stops


def make_env(args: Args, track: str, **changes: Any) -> TuxKartEnv:
    """An environment with the settings of `args`, but for the changes; no game is started yet."""
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(Game)}
    return PictureEnv(track, **(settings | changes))


def make_envs(args: Args, count: int, first: int = 0) -> Any:
    """Games that play in step, each in a process of its own; they take the tracks in turn."""
    tracks = [args.track[i % len(args.track)] for i in range(first, first + count)]
    makers = [functools.partial(make_env, args, track) for track in tracks]
    return gym.vector.AsyncVectorEnv(makers, copy=False, autoreset_mode="SameStep")


def end_games(envs: Any) -> None:
    """Ends the games' processes, also those that hang."""
    for process in envs.processes if envs else ():
        process.kill()
        process.join()
        envs.closed = True


def reset_games(envs: Any, seeds: Sequence[int], options: Any = None) -> np.ndarray:
    """Begins episodes. Returns what N games show, (N, ...)."""
    envs.reset_async(list(seeds), options)
    return envs.reset_wait(10 * SILENCE)[0]  # a busy machine takes long to load a track


@torch.no_grad()
def rollout(envs: Any, agent: Agent, obs: np.ndarray, num_steps: int, greedy: bool = False) -> tuple:
    """Plays T = num_steps decisions in each of N games. obs: what they show now (`reset_games`).

    Returns a dict of tensors (T, N, ...), what they show then, and infos of episodes that ended. While
    the agent is taught, "state" (T, N, S) is what its teacher needs.
    """
    device = next(agent.parameters()).device
    epsilon = 0.0 if greedy else agent.epsilon
    steps, episodes, cut_off = [], [], []
    for t in range(num_steps):
        step = {"obs": torch.tensor(obs, device=device)}
        logits, step["values"] = agent(step["obs"])
        if agent.teaching and not greedy:
            envs.call_async("state")
            step["state"] = torch.tensor(np.stack(envs.call_wait(SILENCE)), device=device)
        step["actions"] = choose_actions(logits, agent.nvec, epsilon, greedy)
        step["logprobs"], _ = evaluate_actions(logits, step["actions"], agent.nvec, epsilon)
        envs.step_async(step["actions"].cpu().numpy())
        obs, rewards, terminations, truncations, infos = envs.step_wait(SILENCE)
        step["rewards"] = torch.from_numpy(rewards).float().to(device)
        step["terminations"] = torch.from_numpy(terminations).to(device)
        step["dones"] = torch.from_numpy(terminations | truncations).to(device)
        steps.append(step)
        for i in np.flatnonzero(terminations | truncations).tolist():
            info = {name: column.tolist()[i] for name, column in infos["final_info"].items()}
            episodes.append(info | {"game": i})
            if truncations[i]:
                cut_off.append((t, i, infos["final_obs"][i]))
    data = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
    last_values = agent(torch.from_numpy(obs).to(device))[1]
    data["next_values"] = torch.cat([data["values"][1:], last_values[None]])
    for t, i, last in cut_off:  # V of what it showed last, not of the next episode's first
        data["next_values"][t, i] = agent(torch.from_numpy(last)[None].to(device))[1][0]
    return data, obs, episodes


def race(envs: Any, agent: Agent, seeds: Sequence[int], tracks: Any, greedy: bool) -> list[dict]:
    """A race a game. Returns their infos, with seed, actions (T, A) and pictures, uint8 (T, 3, H, W)."""
    obs = reset_games(envs, seeds, {"race": True, "tracks": tracks})
    if not greedy:
        torch.manual_seed(seeds[0])
    pieces, races = [], {}
    while len(races) < len(seeds):
        data, obs, episodes = rollout(envs, agent, obs, 20, greedy)
        pieces.append(data)
        races = {info["game"]: info for info in reversed(episodes)} | races  # a game's first episode is its race
    for i, info in races.items():
        steps = len(info["trail"])
        info["seed"] = seeds[i]
        info["actions"] = torch.cat([data["actions"][:, i] for data in pieces])[:steps].cpu()
        info["pictures"] = torch.cat([data["obs"][:, i, -3:] for data in pieces])[:steps].cpu()
    return [races[i] for i in range(len(seeds))]


def race_all(args: Args, agent: Agent, seeds: list[int], greedy: bool = True) -> list[dict]:
    """`race` for any number of seeds, in games of their own."""
    count = min(len(seeds), 2 * usable_cores())
    # the last wave is filled up with the first seeds
    waves = [(seeds * 2)[first : first + count] for first in range(0, len(seeds), count)]
    for _ in range(PATIENCE):
        envs = make_envs(args, count)
        try:
            races = [info for wave in waves for info in race(envs, agent, wave, args.track, greedy)]
            return races[: len(seeds)]
        except LOST_GAME:
            continue
        finally:
            end_games(envs)
    raise SystemExit(f"A game was lost in {PATIENCE} evaluations in a row: type it once more.")


def summarize(races: list[dict]) -> dict[str, Any]:
    """Figures of races or episodes. Median and best lap are means over the tracks, None unless each was
    finished; return_lap_correlation is None for fewer than ten laps, or within twice what chance brings."""
    finished = [run for run in races if run["finished"]]
    tracks = dict.fromkeys(run["track"] for run in races)
    laps = [[run["lap_time"] for run in finished if run["track"] == track] for track in tracks]
    pairs = [(run["return"], run["lap_time"]) for run in finished]
    correlation = float(np.corrcoef(pairs, rowvar=False)[0, 1]) if len(pairs) >= 10 else 0.0
    means = [name for name in races[0] if name.startswith(("return", "reward/", "progress", "off_track"))]
    return {
        **{name: float(np.mean([run[name] for run in races])) for name in means},
        "races": len(races),
        "finished": len(finished),
        "lap_times": [run["lap_time"] for run in finished],
        "median": float(np.mean([np.median(times) for times in laps])) if all(laps) else None,
        "best": float(np.mean([min(times) for times in laps])) if all(laps) else None,
        "ends": dict(Counter(run["end"] for run in races)),
        "return_lap_correlation": correlation if correlation**2 * len(finished) > 4 else None,
        "mean_position": float(np.mean([run["place"] for run in races])),
        "wins": sum(run["place"] == 1 for run in finished),
    }


def show_races(races: list[dict], folder: Path, fps: float) -> None:
    """Writes map.png, the first race's road with its races coloured by speed, a cross where one ended early,
    and mosaic.mp4, up to 16 races side by side, black when they are over."""
    from matplotlib.figure import Figure  # which complains without a home

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot(aspect="equal", title=races[0]["track"])
    axes.plot(*races[0]["geometry"].nodes[:, :, [0, 2]].T, color="lightgray", linewidth=6, zorder=0)
    for run in (run for run in races if run["track"] == races[0]["track"]):
        _, x, _, z, speed = np.array(run["trail"]).T
        dots = axes.scatter(x, z, c=speed, s=2, cmap="coolwarm", vmin=0, vmax=30)
        axes.plot(x[-1:], z[-1:], "none" if run["finished"] else "kx")
    figure.colorbar(dots, label="m/s")
    figure.savefig(folder / "map.png")

    if races[0]["pictures"].ndim < 4:  # nothing was drawn
        return
    columns = math.ceil(min(len(races), 16) ** 0.5)
    film = nn.utils.rnn.pad_sequence([run["pictures"] for run in races[:16]])  # (T, races, 3, H, W)
    missing = film.new_zeros(len(film), -film.shape[1] % columns, *film.shape[2:])
    film = torch.cat([film, missing], 1).unflatten(1, (-1, columns))  # (T, rows, columns, 3, H, W)
    film = film.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)  # (T, rows * H, columns * W, 3)
    film = film.repeat_interleave(2, 1).repeat_interleave(2, 2)  # twice as large
    imageio.mimwrite(folder / "mosaic.mp4", list(film.numpy()), fps=fps, macro_block_size=2)


def film_race(args: Args, run: dict, path: Path) -> None:
    """Drives a race again, from its seed and actions, and films it: 640 x 480, three pictures a decision."""
    env = make_env(args, run["track"], width=640, height=480, observe="pixels")
    env.reset(seed=run["seed"], options={"race": True})
    with imageio.get_writer(path, fps=3 / args.step_size, macro_block_size=2) as env.film:
        for action in run["actions"].tolist():
            env.step(action)


def evaluate(args: Args, checkpoint: dict, folder: Path) -> None:
    """Races a checkpoint on a track, greedily and sampled, beside the game's own AI; prints a table
    and writes evaluation.json, map.png, mosaic.mp4 and best_race.mp4."""
    agent = make_agent(args, checkpoint)
    seeds = list(range(args.eval_seed, args.eval_seed + args.eval_episodes))
    races = {
        "greedy": race_all(args, agent, seeds),
        "sampled": race_all(args, agent, seeds, greedy=False),
        "ai": race_all(dataclasses.replace(args, driver="ai"), agent, seeds),
    }
    best = min(races["greedy"], key=lambda run: (run["lap_time"], -run["progress"]))
    filming = multiprocessing.Process(target=film_race, args=(args, best, folder / "best_race.mp4"))
    filming.start()
    show_races(races["greedy"], folder, 1 / args.step_size)

    summaries = {name: summarize(runs) for name, runs in races.items()}
    greedy, ai = summaries["greedy"], summaries["ai"]
    both = zip(races["greedy"], races["ai"], strict=True)
    result = {
        **(vars(args) | find_game(args.engine)[0] | summaries | greedy),
        "checkpoint": args.evaluate,
        "iteration": checkpoint["iteration"],
        "seeds": seeds,
        "ratio": greedy["median"] / ai["median"] if greedy["median"] and ai["median"] else None,
        "faster_than_ai": sum(ours["lap_time"] < theirs["lap_time"] for ours, theirs in both),
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    print(f"{args.track[0]:20}{'finished':>10}{'median':>10}{'best':>10}{'off track':>10}")
    for name, summary in summaries.items():
        times = [summary[key] or math.nan for key in ("median", "best", "off_track_seconds")]
        finished = f"{summary['finished']}/{len(seeds)}"
        print(f"{name:20}{finished:>10}" + "".join(f"{seconds:8.2f} s" for seconds in times))
    print(f"{result['ratio'] or math.nan:.3f} of the AI's median; faster from {result['faster_than_ai']} starts")
    if (greedy["return_lap_correlation"] or 0) > 0:
        print("this reward pays more for slower laps: --reward progress does not")
    filming.join()
    print(f"written to {folder}/: evaluation.json, map.png, mosaic.mp4, best_race.mp4")


def summarize_network(args: Args) -> None:
    """Prints the network's layers, and the memory that a minibatch, or a piece of it, takes."""
    space: Any = make_env(args, args.track[0]).observation_space
    rows = -(-args.num_envs * args.num_steps // args.num_minibatches // args.grad_accum)
    obs = torch.from_numpy(np.zeros((rows, *space.shape), space.dtype))
    agent = make_agent(args, None).to("meta")  # shapes without numbers
    summary = torchinfo.summary(agent, input_data=obs.to("meta"), depth=4, device="meta", verbose=0)
    print(summary)
    print(f"An iteration's observations (MB): {args.num_envs * args.num_steps * obs[0].nbytes / 1e6:.2f}")
    print(f"Weights, gradients, Adam (MB): {4 * summary.total_param_bytes / 1e6:.2f}")


# --- Learning -------------------------------------------------------------------------------------

TEACHER_STEPS = 3.0  # decisions that a teacher learns from, for each of its student's
TEACHING = 0.8  # share of a run over which the teacher's weight falls from one to zero
FRESH_GAMES = {"pixels": 16, "state": 64}  # iterations between fresh games, where last.pt is written
SAVE_SECONDS = 240.0  # after which it is written in any case


def make_agent(args: Args, checkpoint: dict | None) -> Agent:
    """The network on its device, with a checkpoint's weights if one is given. Raises UsageError."""
    env, *_ = [make_env(args, track) for track in args.track]  # each is checked
    shapes = env.observation_space.shape, env.action_space.nvec
    mirror = args.mirror and args.actions in ("skid", "drive")
    agent = StateAgent(*shapes, mirror) if args.observe == "state" else Agent(*shapes, args)
    if args.actions == "skid":  # a drift that is begun lasts: at first one decision in twenty begins one
        list(agent.policy.parameters())[-1].data[5 + 3 + 1] = -2.0  # bias: 5 to steer, 3 pedals, no drift, drift
    try:
        if checkpoint:  # weights are taken in order, since names have changed between versions
            weights = zip(agent.state_dict(), checkpoint["agent"].values(), strict=True)
            agent.load_state_dict(dict(weights))
    except (KeyError, RuntimeError, ValueError) as error:
        raise UsageError("Another network: type --actions, --width and the like as it learnt with.") from error
    gpu = args.device == "auto" and torch.cuda.is_available()
    return agent.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu")


def save(contents: dict, path: Path) -> None:
    """Writes a checkpoint; a crash at any moment leaves either the old file or the new one."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    path.with_suffix(".tmp").write_bytes(buffer.getvalue())
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path: Path) -> dict:
    """A checkpoint with its "args" as Args; nothing in it is executed. Raises UsageError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        known = {field.name for field in dataclasses.fields(Args)} - {"init_from"}
        settings = {name: value for name, value in checkpoint["args"].items() if name in known}
    except FileNotFoundError:
        raise UsageError(f"There is no {path}: type the path of a last.pt or best.pt.") from None
    except Exception as error:  # whatever may be in a file
        raise UsageError(f"{path} is not a checkpoint of this script: type another.") from error
    settings = {"teacher": ("none",), "mirror": False} | settings  # older scripts had neither
    if settings.get("engine") == "auto":  # of an older script, which preferred this one
        settings["engine"] = "pystk"
    return checkpoint | {"args": Args(**settings)}


def next_lesson(lesson: dict, passed: bool, agent: Agent) -> dict:
    """The speed curriculum: a passed cap rises by the increment; after one that fails, the weights that
    passed last learn on, below a cap that is half the increment above theirs. All are in m/s."""
    cap = lesson["cap"]
    if passed:
        weights = copy.deepcopy(agent.state_dict())
        return lesson | {"cap": cap + lesson["increment"], "passed": cap, "weights": weights}
    if lesson["passed"] is None:
        return lesson
    agent.load_state_dict(lesson["weights"])
    increment = max(lesson["increment"] / 2, 0.25)
    return lesson | {"cap": lesson["passed"] + increment, "increment": increment}


def move_finish(run: dict, episodes: list[dict], games: dict) -> float:
    """The finish line's share of the race, 0.05 more once 23 of 32 episodes reached it."""
    reached = [episode["end"] in PictureEnv.finishes for episode in episodes if episode["from_line"]]
    run["reached"] = [*run["reached"], *reached][-32:]
    if run["finish_line"] < 1 and sum(run["reached"]) >= 23:
        run["finish_line"] = min(run["finish_line"] + 0.05, 1.0)
        run["reached"] = []
        games.pop("obs", None)  # an episode is driven to one line
    return run["finish_line"]


def exam(args: Args, agent: Agent, cap: float | None, writer: Any, step: int) -> tuple[bool, list]:
    """Greedy races from other starts than --evaluate has, since these choose best.pt. Returns whether all
    finished, and a score: finish rate, then median lap, then progress."""
    first = args.eval_seed + 10_000
    args = dataclasses.replace(args, speed_cap=cap)
    races = race_all(args, agent, list(range(first, first + args.eval_episodes)))
    show_races(races, Path(writer.log_dir), 1 / args.step_size)
    summary = summarize(races)
    for name in ("finished", "progress", "off_track_seconds", "median", "best"):
        writer.add_scalar(f"eval/{name}", math.nan if summary[name] is None else summary[name], step)
    rate = summary["finished"] / len(races)
    median = summary["median"] or math.inf
    tqdm.write(f"{step:>9} decisions: {rate:.0%} of the races finished, median {median:.2f} s")
    return rate == 1, [rate, -median, summary["progress"]]


def collect(args: Args, agent: Agent, run: dict, games: dict) -> tuple[dict, list[dict]]:
    """A rollout of all games, in new ones if one is lost. games: "envs", and "obs", what they show.

    Now and then the games begin afresh, from (seed, iteration) alone, so a run that is resumed there
    is the run that never stopped.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    first = int(os.environ.get("RANK", 0)) * args.num_envs
    seed = args.seed * 1_000_000 + run["iteration"] * args.num_envs * world + first
    for attempt in range(PATIENCE):
        try:
            if not games:
                games["envs"] = make_envs(args, args.num_envs, first)
            if "obs" not in games or run["iteration"] % FRESH_GAMES[args.observe] == 0:
                torch.manual_seed(seed + attempt)
                options = {"speed_cap": run["lesson"]["cap"], "finish_line": run["finish_line"]}
                games["obs"] = reset_games(games["envs"], range(seed, seed + args.num_envs), options)
            if run["iteration"] == 0 and not args.init_from:
                refresh_batch_norm(agent, torch.from_numpy(games["obs"]), 1.0, args)
            data, games["obs"], episodes = rollout(games["envs"], agent, games["obs"], args.num_steps)
            return data, episodes
        except LOST_GAME:
            end_games(games.get("envs"))
            games.clear()
            run["lost_games"] += 1
    raise SystemExit(f"Games were lost {PATIENCE} times in a row: type fewer --num-envs.")


def snapshot(args: Args, agent: Agent, optimizer: Any, run: dict) -> dict:
    """A copy of all that a run goes on from."""
    settings = vars(args) | {"speed_cap": run["lesson"]["cap"], "resume": None, "init_from": None}
    settings["engine"] = find_game(args.engine)[0]["engine"]
    state = {"args": settings, "agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
    return copy.deepcopy(state | run)


def load_teachers(args: Args) -> list[Agent]:
    """Networks that learnt the same actions with --observe state. Raises UsageError."""
    teachers = []
    for path in args.teacher if args.teacher not in (("learn",), ("none",)) else ():
        checkpoint = load_checkpoint(Path(path))
        theirs = checkpoint["args"]
        if (theirs.observe, theirs.actions, theirs.speeds) != ("state", args.actions, args.speeds):
            raise UsageError(f"{path} teaches no such actions: learn it with --observe state --actions {args.actions}")
        teachers.append(make_agent(theirs, checkpoint).requires_grad_(False))
    return teachers


def train(args: Args, folder: Path) -> Agent:
    """Learns, from nothing or from the last.pt of a run's folder, which it writes. Returns the network."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    checkpoint = load_checkpoint(folder / "last.pt") if (folder / "last.pt").exists() else None
    torch.manual_seed(args.seed)
    agent = make_agent(args, checkpoint or (args.init_from and load_checkpoint(args.init_from)))
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    teachers = load_teachers(args)
    lesson = {"cap": args.speed_cap, "passed": None, "increment": args.speed_curriculum}
    run: dict[str, Any] = {"iteration": 0, "best": [], "lesson": lesson, "recent": [], "lost_games": 0}
    scaler = torch.amp.GradScaler(next(agent.parameters()).device.type, enabled=args.amp == "fp16")
    run |= {"finish_line": 0.1 if args.moving_finish else 1.0, "reached": [], "scaler": scaler.state_dict()}
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        run = {name: checkpoint[name] for name in run}
        scaler.load_state_dict(run["scaler"])
    batch_size = args.num_envs * args.num_steps * world
    num_iterations = max(args.total_timesteps // batch_size, 1)
    step = run["iteration"] * batch_size
    writer: Any = SummaryWriter(folder, purge_step=step + 1) if rank == 0 else None
    if writer:
        writer.add_text("settings", "\n".join(f"    {key}: {vars(args)[key]}" for key in vars(args)))
    games: dict[str, Any] = {}
    last = snapshot(args, agent, optimizer, run)  # the last whole iteration
    saved_at = time.time()
    if args.teacher == ("learn",):  # the same on the state, where nothing is drawn, first
        if writer and not checkpoint:
            save(last, folder / "last.pt")
        theirs = dataclasses.replace(args, observe="state", init_from=None, epochs=2 * args.epochs)
        theirs.total_timesteps = int(TEACHER_STEPS * args.total_timesteps)
        theirs.learning_rate = 4 * args.learning_rate
        teachers = [train(theirs, folder / "teacher").requires_grad_(False)]
    torch.set_num_threads(1 if args.observe == "state" else usable_cores())  # more threads slow a small network
    bar = tqdm(total=num_iterations * batch_size, initial=step, unit=" decisions", disable=rank > 0)
    bar.set_description("teacher" if args.observe == "state" else None)
    try:
        while run["iteration"] < num_iterations:
            # Anneal to zero: the step size, three times as large under a teacher's full advice, and the exploration
            started = time.time()
            left = 1 - run["iteration"] / num_iterations
            agent.epsilon = args.epsilon * left
            agent.teaching = max(0.0, 1 - (1 - left) / TEACHING) if teachers else 0.0
            optimizer.param_groups[0]["lr"] = args.learning_rate * left * (1 + 2 * agent.teaching)

            # Collect num_steps decisions in every game
            data, episodes = collect(args, agent, run, games)
            collected = time.time()

            # Ask the teacher what it would do in every state that the student came to
            if agent.teaching:
                first = rank * args.num_envs
                advice = [teachers[(first + i) % len(teachers)](data["state"][:, i])[0] for i in range(args.num_envs)]
                data["teacher_logits"] = torch.stack(advice, 1)

            # Advantages: what an action brought beyond what the critic expected
            data["advantages"] = compute_gae(data, args.gamma, args.gae_lambda)
            data["returns"] = data["advantages"] + data["values"]

            # Learn: some passes in minibatches, on which the clipped objective stays near the old
            batch = {name: values.flatten(0, 1) for name, values in data.items()}
            metrics = ppo_update(agent, optimizer, scaler, batch, args)
            run["scaler"] = scaler.state_dict()
            metrics["charts/update_seconds"] = time.time() - collected
            run["iteration"] += 1
            step += batch_size

            # Look: the last hundred episodes from the line, and now and then greedy races
            run["recent"] = [*run["recent"], *(e for e in episodes if e["from_line"])][-100:]
            if run["recent"]:
                summary = summarize(run["recent"])
                metrics.update({f"charts/{key}": x for key, x in summary.items() if isinstance(x, float)})
                metrics["charts/finished"] = summary["finished"] / summary["races"]
                bar.set_postfix(lap=f"{summary['progress']:.0%}", finished=f"{metrics['charts/finished']:.0%}")
            metrics["charts/finish_line"] = move_finish(run, episodes, games)
            cap = run["lesson"]["cap"]
            due = args.eval_interval and (run["iteration"] % args.eval_interval == 0 or step == bar.total)
            passed, score = exam(args, agent, cap, writer, step) if due and writer else (False, [])
            if score > run["best"]:
                run["best"] = score
                save(snapshot(args, agent, optimizer, run) | {"optimizer": None}, folder / "best.pt")
            if due and args.speed_curriculum:
                verdict = torch.tensor(float(passed))  # the first rank's, once it is shared
                average_over_ranks([verdict])
                run["lesson"] = next_lesson(run["lesson"], bool(verdict), agent)
                games.pop("obs", None)  # an episode is driven below one cap

            # Save: scalars of every iteration, and now and then what a run goes on from
            metrics["charts/teaching"] = agent.teaching
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            metrics["charts/SPS"] = batch_size / (time.time() - started)
            metrics["charts/lost_games"] = run["lost_games"]
            metrics["charts/speed_cap"] = cap or math.inf
            for key, value in metrics.items() if writer else ():
                writer.add_scalar(key, value, step)
            last = snapshot(args, agent, optimizer, run)
            fresh = run["iteration"] % FRESH_GAMES[args.observe] == 0
            if writer and (fresh or time.time() - saved_at > SAVE_SECONDS):
                save(last, folder / "last.pt")
                saved_at = time.time()
            bar.update(batch_size)
    finally:  # however it ends: nothing is lost, and no process stays
        bar.close()
        end_games(games.get("envs"))
        if writer:
            writer.close()
            save(last, folder / "last.pt")
    return agent


def usable_cores() -> int:
    """Cores that this process may use: by its affinity, its container's quota and OMP_NUM_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return min(cores, int(os.environ.get("OMP_NUM_THREADS") or cores))


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


def start() -> None:
    """Reads the command line, then races a checkpoint or learns. Raises UsageError."""
    args = tyro.cli(Args, description=__doc__)
    folder = args.resume.parent if args.resume and args.resume.is_file() else args.resume
    now = time.strftime("%Y%m%d-%H%M%S")
    path = args.evaluate or (folder and folder / "last.pt")
    if path:  # its settings hold but for those typed
        checkpoint = load_checkpoint(path)
        args = tyro.cli(Args, description=__doc__, default=checkpoint["args"])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if not dist.is_torchelastic_launched():
            raise UsageError("WORLD_SIZE is set, but not by torchrun: type unset WORLD_SIZE")
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if args.summary:
        summarize_network(args)
        return
    if args.evaluate:
        for track in args.track:
            with hold_folder(Path("runs", f"{args.evaluate.stem}-{track}-{now}"), False) as folder:
                evaluate(dataclasses.replace(args, track=(track,)), checkpoint, folder)
        return
    name = args.name or f"{'-'.join(args.track)}-seed{args.seed}-{now}"
    with hold_folder(folder or Path("runs", name), bool(folder)) as folder:
        train(args, folder)


def main() -> None:
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))  # a run then saves
    with contextlib.suppress(OSError, AttributeError):  # keep freed memory: half the time to learn
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    torch.set_num_threads(usable_cores())
    try:
        start()
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
