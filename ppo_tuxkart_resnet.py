"""PPO drives the real SuperTuxKart from pixels with deep networks: ppo_tuxkart.py and what differs.

Networks: IMPALA's residual CNN (Espeholt et al. 2018, https://arxiv.org/abs/1802.01561) with frames stacked or an LSTM;
the 2D residual network and the 3D ResNet of the project tuxkart-ai, layer by layer; the Nature CNN behind batch
normalization of the EC418 notebook. `diff ppo_tuxkart.py ppo_tuxkart_resnet.py` shows everything that is new.

    python ppo_tuxkart_resnet.py --track scotland                                   # IMPALA
    python ppo_tuxkart_resnet.py --network resnet3d --base-channels 16              # the 3D ResNet, scaled down
    python ppo_tuxkart_resnet.py --summary --network conv2d --width 400 --height 600 --actions tuxkart  # its layers
    python ppo_tuxkart_resnet.py --evaluate runs/<name>/best.pt                     # race it against the game's own AI
"""

import atexit
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import functools
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import types
import xml.etree.ElementTree
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads would spin on the cores the games need

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn


@dataclasses.dataclass
class Args:
    """PPO that drives SuperTuxKart from pixels with deep networks. `--track scotland` is all it needs."""

    track: tuple[str, ...] = ("scotland",)  # track(s) to learn; several are shared out over the environments
    total_timesteps: int = 1_000_000  # decisions to learn from, all environments together
    seed: int = 1  # seed of the network, the actions, the minibatches and the starts
    name: str | None = None  # the run's folder under runs/ (default: track, seed and time)
    resume: Path | None = None  # run folder to go on with as if never stopped; its settings are kept
    init_from: Path | None = None  # checkpoint to take the network's weights from, and nothing else
    evaluate: Path | None = None  # checkpoint to race, greedy and sampled, beside the game's own AI; no learning
    eval_episodes: int = 20  # races per evaluation
    eval_seed: int = 1000  # seed of the first evaluation race; each race has its own disturbed start
    eval_interval: int = 64  # iterations between evaluations while learning; 0 for none
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the network runs; auto takes the GPU if there is one

    # the network
    network: Literal["impala", "conv2d", "resnet3d", "ec418"] = "impala"  # which one
    base_channels: int | None = None  # channels of its first layer (default: 16, 128, 256, 32)
    memory: Literal["stack", "lstm"] = "stack"  # frames stacked, or one frame and an LSTM (impala only)
    color: Literal["rgb", "gray"] | None = None  # what the pictures hold (default: gray for conv2d, else rgb)
    amp: Literal["off", "bf16", "fp16"] = "off"  # half precision in the network; losses are float32
    compile: bool = False  # compile the network with torch.compile
    summary: bool = False  # print the network's layers and stop

    # the game
    engine: Literal["auto", "pystk", "pystk2"] = "auto"  # game bindings; auto prefers the faster pystk
    num_envs: int = 16  # game processes; with torchrun, of every rank
    width: int = 64  # width of the picture, in pixels
    height: int = 64  # height of the picture, in pixels
    frame_stack: int | None = None  # pictures the network sees (default: resnet3d 5, conv2d 4, lstm 1, else 2)
    step_size: float = 0.15  # seconds of game time for which an action is held
    random_start: float = 0.5  # share of the episodes that start anywhere on the track instead of on the start line
    max_seconds: float | None = None  # time limit of a race in game time (default: 150 a lap, with a --speed-cap more)
    laps: int = 1  # laps of a race
    difficulty: Literal[0, 1, 2, 3] = 2  # the game's; it also scales the player's top speed (0.6, 0.8, 0.92, 1)
    kart: str = "tux"  # kart to drive
    reverse: bool = False  # drive the track the other way round
    num_karts: int = 1  # karts in the race; the game's AI drives the others
    reward: tuple[str, ...] = ("progress",)  # reward(s), weighted: --reward progress:1 zigzag:0.1
    actions: Literal["drive", "ec418", "tuxkart", "tuxkart_rescue", "deepracer"] = "drive"  # what the network decides
    speeds: tuple[float, ...] = (8.0, 16.0, 24.0)  # m/s to choose from with --actions deepracer
    speed_cap: float | None = None  # m/s that the kart keeps below, whatever the network decides
    speed_curriculum: float | None = None  # m/s by which the cap rises when every evaluation race finishes

    random_action_prob: float = 0.0  # chance per decision that a burst of random actions begins, to learn to recover
    random_action_steps: int = 4  # length of such a burst
    moving_finish: bool = False  # end episodes at a line that starts near and moves ahead as more of them reach it

    # PPO
    num_steps: int = 128  # decisions per environment and iteration
    learning_rate: float = 5e-4  # Adam's step size at the start; it falls linearly to zero
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    epochs: int = 3  # passes over the data of an iteration
    num_minibatches: int = 8  # minibatches per pass
    grad_accum: int = 1  # pieces that a minibatch is computed in; more need less memory for the same gradient
    clip_coef: float = 0.2  # the clipped objective's epsilon
    clip_vloss: bool = False  # clip the value loss as well
    ent_coef: float = 0.005  # weight of the entropy bonus
    vf_coef: float = 0.05  # weight of the value loss; returns reach 30, so more of it would drown the policy's gradient
    max_grad_norm: float = 0.5  # largest norm of the gradient
    epsilon: float = 0.0  # share of uniformly random actions, part of the policy; it falls linearly to zero
    augment: Literal["none", "shift"] = "none"  # random shifts, and a penalty where policy or value depend on them
    augment_coef: float = 0.1  # weight of that penalty
    target_kl: float | None = None  # stop an iteration's passes when the approximate KL divergence exceeds this


FRAMES = {"impala": 2, "conv2d": 4, "resnet3d": 5, "ec418": 2}
BASE_CHANNELS = {"impala": 16, "conv2d": 128, "resnet3d": 256, "ec418": 32}


def complete(args: Args) -> Args:
    """Args with everything filled in that depends on the network."""
    frames = 1 if args.memory == "lstm" else FRAMES[args.network]
    color: Literal["rgb", "gray"] = "gray" if args.network == "conv2d" else "rgb"
    return dataclasses.replace(
        args,
        frame_stack=frames if args.frame_stack is None else args.frame_stack,
        base_channels=BASE_CHANNELS[args.network] if args.base_channels is None else args.base_channels,
        color=args.color or color,
    )


class UsageError(Exception):
    """What the user typed, or what the machine lacks; the message is one sentence that says what to type next."""


class RunError(Exception):
    """What went wrong while it ran; the message is one sentence."""


# ---------------------------------------------------------------------------------------------------------------------
# The game: engine, assets, track geometry, environment

ENGINES = {"pystk": "PySuperTuxKart", "pystk2": "PySuperTuxKart2"}  # module: package; "pystk" on PyPI is another thing
DEBIAN_ASSETS = Path("/usr/share/games/supertuxkart/data")

LAP_SECONDS = 150.0  # the time limit of a lap
STUCK_SECONDS, STUCK_METRES = 4.0, 2.0  # an episode ends when that long has not brought that much progress
RACE_STUCK_SECONDS = 15.0  # the same in a race, where the kart may free itself
BACKWARDS_METRES = 15.0
OFF_TRACK_METRES = 10.0  # beyond the edge of the road
RANDOM_START_SECONDS = 30.0
RACE_SETTINGS = ("laps", "difficulty", "kart", "reverse", "num_karts", "speed_cap")
ENV_SETTINGS = ("engine", "width", "height", "frame_stack", "step_size", "max_seconds", "reward", "actions", "speeds")
TOP_SPEED = 60.0  # m/s; no kart is faster, so a larger gain is a teleport
NEAR_METRES = 50.0  # of road each way, more than a decision's drive, where a kart is looked for first
LEVEL_METRES = 2.5  # above or below the road's middle a kart is not on that road
# A longer drift, never slower than that (m/s), earns a boost (kart_characteristics.xml); after one the next has to wait
BOOST_SECONDS, BOOST_SPEED, BOOST_PAUSE = 1.0, 10.0, 0.7


def engine_version(engine: str) -> str | None:
    """Version of the engine's package, or None where it is not installed."""
    try:
        return importlib.metadata.version(ENGINES[engine])
    except importlib.metadata.PackageNotFoundError:
        return None


def find_engine(engine: str = "auto") -> str:
    """Name of the module to drive the game with, "pystk" or "pystk2". Raises UsageError where there is none."""
    for module in ENGINES if engine == "auto" else [engine]:
        if engine_version(module):
            return module
    package = ENGINES["pystk2" if engine == "auto" else engine]
    hint = "./install.sh" if engine == "pystk" else f"pip install {package}"
    raise UsageError(f"The game's Python package {package} is not installed: type `{hint}`.")


def find_assets(engine: str, kart: str | None = None) -> tuple[Path, str]:
    """Folder that the engine reads its data from, and the assets' version: (Path, str).

    The engine's own assets where it brings some, else Debian's supertuxkart-data through a folder of links in the
    user's cache; for pystk with one kart alone where that is named, since it loads all that there are, whoever races.
    Raises UsageError where there are none.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if engine == "pystk2":
        from platformdirs import user_cache_dir  # a dependency of pystk2, which looks for its assets there

        root, marker = Path(user_cache_dir("PySuperTuxKart2", "bpiwowar")) / "1.5", "supertuxkart.1.5"
        if (root / "__downloaded__.txt").exists() and not (root / "data" / "tracks").is_symlink():
            return root, "1.5"
    else:
        root, marker = cache / "ppo_tuxkart" / (f"assets-{kart}" if kart else "assets"), "supertuxkart.git"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version("PySuperTuxKartData")
            return Path(importlib.import_module("pystk_data").data_dir), version
    versions = [path.name.removeprefix("supertuxkart.") for path in DEBIAN_ASSETS.glob("supertuxkart.[0-9]*")]
    if not versions:
        raise UsageError("The game's assets are not installed: type `sudo apt-get install supertuxkart-data`.")
    if kart and not (DEBIAN_ASSETS / "karts" / kart).is_dir():  # the game would drive tux, or crash with none
        raise UsageError(f"There is no kart {kart}: give the name of a folder in {DEBIAN_ASSETS / 'karts'}.")
    data = root / "data"
    (data / "skins").mkdir(parents=True, exist_ok=True)
    links = {data / source.name: source for source in DEBIAN_ASSETS.iterdir() if source.name != "skins"}
    links |= {data / "skins" / source.name: source for source in (DEBIAN_ASSETS / "skins").iterdir()}
    links.setdefault(data / "skins" / "classic", DEBIAN_ASSETS / "skins" / "peach")  # the skin pystk2 asks for
    if kart and engine == "pystk":
        (data / "karts").mkdir(exist_ok=True)
        links[data / "karts" / kart] = links.pop(data / "karts") / kart
    for link, source in links.items():
        with contextlib.suppress(FileExistsError):
            link.symlink_to(source)
    (data / marker).touch()
    (root / "__downloaded__.txt").touch()
    return root, versions[0]


def race_tracks(assets: Path) -> dict[str, bool]:
    """The race tracks (no arenas, no cut scenes) in an assets folder: {name: whether it can be reversed}."""
    tracks = {}
    for file in sorted((assets / "data" / "tracks").glob("*/track.xml")):
        root = xml.etree.ElementTree.parse(file).getroot()
        yes = {key for key, value in root.items() if value.upper() == "Y"}
        if (file.parent / "quads.xml").exists() and not yes & {"arena", "soccer", "cutscene", "internal"}:
            tracks[file.parent.name] = "reverse" in yes
    return tracks


def gpu_renders() -> bool:
    """Whether Mesa has a GPU to draw with. NVIDIA's own driver does not count: it reads nothing that Mesa reads."""
    nodes = [node for node in Path("/dev/dri").glob("renderD*") if os.access(node, os.R_OK | os.W_OK)]
    drivers = {Path(f"/sys/class/drm/{node.name}/device/driver").resolve().name for node in nodes}
    return sys.platform != "linux" or bool(drivers - {"nvidia"})


def belong_to_parent() -> None:
    """Leaves Ctrl-C to the process that has started this one, and has this one die with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        parent = multiprocessing.parent_process()
        if parent and os.getppid() == 1 != parent.pid:  # it has died already
            os._exit(1)


def load_engine(engine: str, kart: str | None) -> tuple[types.ModuleType, Path]:
    """Imports the engine and prepares this process for it; kart: the only one that will race.

    Returns the module and the folder that it reads its data from.
    """
    if not gpu_renders():
        # Mesa filters anisotropically in a loop on the CPU: single frames took up to 71 s. Its threads gain nothing.
        hidden = "-GL_EXT_texture_filter_anisotropic -GL_ARB_texture_filter_anisotropic"
        os.environ.setdefault("MESA_EXTENSION_OVERRIDE", hidden)
        os.environ.setdefault("LP_NUM_THREADS", "0")
    if multiprocessing.parent_process() is not None:
        belong_to_parent()
        silence = os.open(os.devnull, os.O_WRONLY)  # the engine talks to file descriptors 1 and 2 from C++
        os.dup2(silence, 1)
        os.dup2(silence, 2)
    assets, _ = find_assets(engine, kart)
    if engine == "pystk":
        sys.modules["pystk_data"] = types.ModuleType("pystk_data")  # where pystk asks for its assets
        vars(sys.modules["pystk_data"])["data_dir"] = str(assets)
    return importlib.import_module(engine), assets


class Controls(NamedTuple):
    """What the engine is told: steer from -1 (left) to 1, acceleration from 0 to 1, and buttons."""

    steer: float = 0.0
    acceleration: float = 0.0
    brake: bool = False
    drift: bool = False
    nitro: bool = False
    fire: bool = False
    rescue: bool = False
    speed: float = 0.0  # what it asks for, as a share of the fastest


def govern(target: float, speed: float) -> tuple[float, bool]:
    """Acceleration and brake that hold a target speed, both in m/s."""
    return min(max((target - speed) / 2, 0.0), 1.0), speed > target + 2


def drive_controls(action: list[int], speed: float, speeds: tuple[float, ...]) -> Controls:
    """Steer in five positions, gas, coast or brake, drift, nitro."""
    steer, pedal, drift, nitro = action
    gas = float(pedal == 0)
    return Controls(steer / 2 - 1, gas, pedal == 2, bool(drift), bool(nitro), speed=gas)


def ec418_controls(action: list[int], speed: float, speeds: tuple[float, ...]) -> Controls:
    """EC418's four bits, the highest first: left, right, fast (25 m/s, else 5), drift; left and right is nitro."""
    left, right, fast, drift = (bool(action[0] >> bit & 1) for bit in (3, 2, 1, 0))
    acceleration, brake = govern(25.0 if fast else 5.0, speed)
    return Controls(float(right) - float(left), acceleration, brake, drift, left and right, speed=1.0 if fast else 0.2)


def tuxkart_controls(action: list[int], speed: float, speeds: tuple[float, ...]) -> Controls:
    """tuxkart-ai's: acceleration, brake, steer, fire, drift, nitro, and the rescue where there is one."""
    acceleration, brake, steer, fire, drift, nitro, *rescue = action
    buttons = bool(brake), bool(drift), bool(nitro), bool(fire), rescue == [1]
    return Controls(steer - 1.0, float(acceleration), *buttons, speed=float(acceleration))


def deepracer_controls(action: list[int], speed: float, speeds: tuple[float, ...]) -> Controls:
    """DeepRacer's: one of seven steering angles, 30 degrees left to 30 right, with one of the speeds."""
    angle, pace = divmod(action[0], len(speeds))
    acceleration, brake = govern(speeds[pace], speed)
    steer = (-30, -20, -10, 0, 10, 20, 30)[angle] / FULL_LOCK
    return Controls(steer, acceleration, brake, speed=speeds[pace] / max(speeds))


FULL_LOCK = 30  # degrees, as DeepRacer has it
# name: the dimensions' names and sizes (None: the number of speeds times 7), and the controls
ACTIONS: dict[str, tuple[dict[str, int | None], Callable[..., Controls]]] = {
    "drive": ({"steer": 5, "pedal": 3, "drift": 2, "nitro": 2}, drive_controls),
    "ec418": ({"code": 16}, ec418_controls),
    "tuxkart": ({"acceleration": 2, "brake": 2, "steer": 3, "fire": 2, "drift": 2, "nitro": 2}, tuxkart_controls),
    "deepracer": ({"angle and speed": None}, deepracer_controls),
}
ACTIONS["tuxkart_rescue"] = (ACTIONS["tuxkart"][0] | {"rescue": 2}, tuxkart_controls)


def action_sizes(actions: str, speeds: tuple[float, ...]) -> dict[str, int]:
    """Number of choices in each dimension of an action set, by the dimension's name."""
    return {name: size or 7 * len(speeds) for name, size in ACTIONS[actions][0].items()}


class Moment(NamedTuple):
    """What a reward may know of one decision, in metres, seconds, m/s and degrees; right is positive."""

    gain: float  # metres gained down the track
    seconds: float  # of game time
    offset: float = 0.0  # from the middle of the road
    width: float = 1.0  # of the road
    heading: float = 0.0  # of the kart, relative to the track's, in [-180, 180)
    steering: float = 0.0  # commanded; full lock is 30 degrees
    speed: float = 0.0  # commanded, as a share of the fastest choice
    finished: bool = False
    failed: bool = False  # the episode ended stuck, off the track or backwards
    places: int = 0  # won from other karts, or lost
    events: tuple = ()  # what began with this decision: powerup, use, nitro, drift (that earns a boost), jump, rescue


def progress_reward(moment: Moment) -> float:
    """A tenth of the metres gained, less half a point a second, +25 for the finish, -3 for failing.

    The sum of the gains over a lap is the same for every lap, so of two finished laps the faster one earns more. The
    finish pays about what driving on would (0.27 a decision, discounted by 0.99): a critic that cannot see how far the
    line is would take less for a loss, and the policy would put it off.
    """
    return 0.1 * moment.gain - 0.5 * moment.seconds + 25.0 * moment.finished - 3.0 * moment.failed


def centerline_reward(moment: Moment) -> float:
    """DeepRacer's "follow the center line"."""
    share = abs(moment.offset) / moment.width
    return 1.0 if share <= 0.1 else 0.5 if share <= 0.25 else 0.1 if share <= 0.5 else 1e-3


def borders_reward(moment: Moment) -> float:
    """DeepRacer's "stay inside the two borders"."""
    return 1.0 if 0.5 * moment.width - abs(moment.offset) >= 0.05 else 1e-3


def zigzag_reward(moment: Moment) -> float:
    """DeepRacer's "prevent zig-zag"."""
    return centerline_reward(moment) * (0.8 if abs(moment.steering) > 15.0 else 1.0)


def heading_reward(moment: Moment) -> float:
    """DeepRacer's example for the heading: half where it is more than 10 degrees from the track's."""
    return 0.5 if abs(moment.heading) > 10.0 else 1.0


def speed_reward(moment: Moment) -> float:
    """DeepRacer's example for the speed: half below 1 m/s of its 4, next to nothing off the track."""
    return 1e-3 if abs(moment.offset) > 0.5 * moment.width else 0.5 if moment.speed < 0.25 else 1.0


def ec418_reward(moment: Moment) -> float:
    """EC418's metres gained within 6 m of the middle, without its cap of 5 m/s and its pay for standing still."""
    return 0.1 * max(moment.gain, 0.0) * (abs(moment.offset) < 6.0)


def tuxkart_reward(moment: Moment) -> float:
    """tuxkart-ai's shaped sum. It paid for every step with a powerup or a drift; this pays when one begins, and for a
    drift once the game does: tapping the key brings nothing."""
    prices = {"powerup": 3.0, "use": 1.0, "nitro": 3.0, "drift": 3.0, "jump": -3.0, "rescue": -5.0}
    return moment.gain + 10.0 * moment.finished + 5.0 * moment.places + sum(prices[event] for event in moment.events)


REWARDS = {
    "progress": progress_reward,
    "centerline": centerline_reward,
    "borders": borders_reward,
    "zigzag": zigzag_reward,
    "heading": heading_reward,
    "speed": speed_reward,
    "ec418": ec418_reward,
    "tuxkart": tuxkart_reward,
}


def parse_reward(parts: tuple[str, ...]) -> dict[str, float]:
    """("progress:1", "zigzag:0.1") as {"progress": 1.0, "zigzag": 0.1}; a weight left out is 1. Raises UsageError."""
    weights = {}
    for part in parts:
        name, _, weight = part.partition(":")
        if name not in REWARDS:
            close = difflib.get_close_matches(name, REWARDS, 1, 0)[0]
            raise UsageError(f"There is no reward {name}: type --reward {close}, or one of {', '.join(REWARDS)}.")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise UsageError(f"The weight in --reward {part} is not a number: type --reward {name}:0.5.") from None
    return weights


class TrackGeometry:
    """The track's centre line as segments, and where points lie along it; all in metres and radians.

    starts, ends: (S, 3), x and z on the ground, y up. widths: (S,). distances: (S, 2), along the track, of both ends.
    """

    def __init__(self, nodes: np.ndarray, widths: np.ndarray, distances: np.ndarray, length: float) -> None:
        nodes = np.asarray(nodes, np.float64)  # (S, 2, 3)
        self.starts, self.ends = nodes[:, 0], nodes[:, 1]
        self.widths = np.asarray(widths, np.float64).reshape(-1)
        self.distances = np.asarray(distances, np.float64)
        self.length = float(length)
        self.vectors = self.ends - self.starts
        self.headings = np.arctan2(self.vectors[:, 0], self.vectors[:, 2])
        squares = np.maximum((self.vectors**2).sum(-1), 1e-9)
        rows = self.starts, self.vectors, self.vectors / squares[:, None]
        self._starts, self._vectors, self._shares = (np.ascontiguousarray(values.T) for values in rows)  # (3, S)
        self._middles = self.distances.mean(-1) % self.length

    def locate(self, point: Sequence[float], along: float | None = None) -> tuple[float, float, float, float]:
        """Nearest place on the centre line. point: (3,). along: where it was a moment ago, if that is known.

        Below a bridge, or near another stretch, the middle of another road can be nearer than that of the kart's own.
        So the road within NEAR_METRES of `along` comes first where the point is on it, then all roads that it is on and
        the near one, as long as that is not too far off.
        Returns distance down the track in [0, length), signed lateral offset (right is positive), track heading and
        track width there.
        """
        relative = np.asarray(point, np.float64)[:, None] - self._starts
        share = (relative * self._shares).sum(0).clip(0, 1)
        gap = relative - share * self._vectors
        squares = (gap * gap).sum(0)
        nearest = int(squares.argmin())
        (x, y, z), half = gap[:, nearest].tolist(), self.widths / 2
        on_it = math.hypot(x, z) <= half[nearest] and abs(y) < LEVEL_METRES
        if along is not None and not (on_it and abs(self.gain(along, self._middles[nearest])) < NEAR_METRES):
            near = np.abs(self.gain(along, self._middles)) < NEAR_METRES
            on_road = (np.hypot(gap[0], gap[2]) <= half) & (np.abs(gap[1]) < LEVEL_METRES)
            beside = near & (squares <= (half + OFF_TRACK_METRES) ** 2)
            choice = next((some for some in (near & on_road, on_road | beside) if some.any()), True)
            nearest = int(np.where(choice, squares, np.inf).argmin())
            x, _, z = gap[:, nearest].tolist()
        share = float(share[nearest])
        (begin, end), heading = self.distances[nearest].tolist(), float(self.headings[nearest])
        offset = math.copysign(math.hypot(x, z), x * math.cos(heading) - z * math.sin(heading))
        return (begin + share * (end - begin)) % self.length, offset, heading, float(self.widths[nearest])

    def gain(self, before: float, after: Any) -> Any:
        """Metres gained between two distances down the track, the shorter way round, in [-length/2, length/2)."""
        return (after - before + self.length / 2) % self.length - self.length / 2


class TuxKartEnv(gym.Env):
    """One kart in the real SuperTuxKart, seen through its own camera.

    Observation: uint8 (3 * frame_stack, height, width), RGB pictures, the newest last.
    Action: MultiDiscrete, one of ACTIONS, held for `step_size` seconds of game time. A `speed_cap` (m/s) limits it.
    Reward: the weighted sum of REWARDS that `reward` names. An episode ends with the finish, or when the kart is stuck,
    off the track or drives backwards; the time limit truncates it. At the end `info` holds lap_time (s, nan unless
    finished), finished, progress (share of the race's distance), position (among `num_karts`), off_track_m (largest),
    off_track_seconds, seconds, return, the share of each reward in it, and end (why).

    `reset(seed=...)` loads the track anew (0.6 s) with that seed for the game. Nothing of the episodes before is left,
    not even in the camera's motion, but how often the process has loaded a track: spectators change their shirts.
    Without a seed a reset takes a hundredth of that. `reset(seed=..., options={"race": True})` starts an evaluation
    race: from the line, with a disturbance drawn from the seed (up to 2 m aside, 10 degrees askew and, alone, 0.2 s
    late), ended by the finish, the time limit or 15 s without progress. `options={"track": name}` changes the track.
    One game runs per process: use `Games` or gymnasium's AsyncVectorEnv for more. With `driver="ai"` the game's own AI
    drives, nothing is drawn, actions are ignored and observations are black.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 7}
    _process_is_busy, _started, _loads = False, None, 0  # this process's game: in use, which one, loads since its start
    observation_space: gym.spaces.Box
    action_space: gym.spaces.MultiDiscrete

    def __init__(
        self, track: str = "scotland", engine: str = "auto", width: int = 64, height: int = 64, frame_stack: int = 2,
        step_size: float = 0.15, random_start: float = 0.0, max_seconds: float | None = None,
        laps: int = 1, difficulty: int = 2, kart: str = "tux", reverse: bool = False, num_karts: int = 1,
        reward: tuple[str, ...] = ("progress",), actions: str = "drive", speeds: tuple[float, ...] = (8.0, 16.0, 24.0),
        speed_cap: float | None = None, driver: str = "agent", render_mode: str | None = None,
    ) -> None:  # fmt: skip
        self.track, self.engine, self.size = track, find_engine(engine), (width, height)
        self.step_size, self.random_start, self.max_seconds = step_size, random_start, max_seconds
        self.laps, self.difficulty, self.kart, self.reverse = laps, difficulty, kart, reverse
        self.num_karts, self.speed_cap, self.speeds = num_karts, speed_cap, speeds
        self.reward_weights, self._controls = parse_reward(reward), ACTIONS[actions][1]
        self.driver, self.render_mode = driver, render_mode
        self.frame_stack = frame_stack
        self.observation_space = gym.spaces.Box(0, 255, (3 * frame_stack, height, width), np.uint8)
        self.action_space = gym.spaces.MultiDiscrete(list(action_sizes(actions, speeds).values()))
        self.substeps = 1  # a film draws several pictures a decision
        self.on_frame: Callable | None = None
        self._stk: Any = None
        self._race: Any = None

    def _boot(self) -> None:
        """Starts the engine, once in a process."""
        if TuxKartEnv._process_is_busy:
            raise RuntimeError("One game runs per process: close the other TuxKartEnv, or use AsyncVectorEnv.")
        kart = self.kart if self.num_karts == 1 else None
        stk, assets = load_engine(self.engine, kart)
        wanted = (stk, assets, self.size, self.driver == "agent")
        if TuxKartEnv._started != wanted:
            if TuxKartEnv._started:  # pystk2 often crashes on a second start
                raise RuntimeError("A process keeps its first game: keep to its size and kart, or use a new process.")
            graphics = stk.GraphicsConfig.ld() if self.driver == "agent" else stk.GraphicsConfig.none()
            graphics.screen_width, graphics.screen_height = self.size
            stk.init(graphics)
            atexit.register(stk.clean)
            TuxKartEnv._started = wanted
        TuxKartEnv._process_is_busy, self._stk = True, stk
        # Wind and the like move with the wall clock, so no two races would look alike: they get the game's clock.
        library = ctypes.CDLL(stk.__file__)
        names = ("os5Timer8setSpeedEf", "os5Timer7setTimeEj", "os10Randomizer5resetEi")
        functions = [getattr(library, f"_ZN3irr2{name}", lambda *_: None) for name in names]
        functions[0](ctypes.c_float(0.0))
        _, self._set_clock, self._seed_scenery = functions
        self._world = stk.WorldState()

    def _load_race(self) -> None:
        """Loads the track; everything in the game is new after it, the camera too."""
        stk = self._stk
        self._unload_race()
        config = stk.RaceConfig()
        config.track, config.laps, config.reverse = self.track, self.laps, self.reverse
        config.difficulty, config.num_kart, config.step_size = self.difficulty, self.num_karts, self.step_size
        config.seed = self.np_random_seed % 2**31  # what items give, and how the AI drives
        if hasattr(config, "overlay"):
            config.overlay = False  # pystk2 would draw its HUD into the picture; pystk has none
        config.players[0].kart = self.kart
        controllers = stk.PlayerConfig.Controller
        config.players[0].controller = controllers.AI_CONTROL if self.driver == "ai" else controllers.PLAYER_CONTROL
        ctypes.CDLL(None).srand(0)
        self._seed_scenery(0)
        self._set_clock(0)
        self._race = stk.Race(config)
        self._race.start()
        TuxKartEnv._loads += 1
        track = stk.Track()
        track.update()
        self.geometry = TrackGeometry(track.path_nodes, track.path_width, track.path_distance, track.length)

    def _unload_race(self) -> None:
        if self._race is not None:
            self._race.stop()
            self._race = None  # the engine allows one race at a time

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if self._stk is None:
            self._boot()
        options = options or {}
        self.in_race, before, self.track = bool(options.get("race")), self.track, options.get("track", self.track)
        anew = self._race is None or seed is not None or self.track != before
        if anew or self.driver == "ai":  # a restart would take the wheel from the AI
            self._load_race()
            self._history: list[dict] = []
        else:
            self._race.restart()
        self._history.append({"rng": self.np_random.bit_generator.state, "options": options, "actions": []})
        self._world.update()
        self._hold(1 / 120)
        location, heading, self._handicap = self.location, self._heading(), 0.0
        if hasattr(self._world, "phase"):  # pystk2 counts down for 5 s before a kart can drive
            self._hold(4.9)
            while self._world.time == 0:
                self._hold(0.05)
        self._from_line, start = self.in_race or self.np_random.random() >= self.random_start, 0.0
        if self.in_race:
            self._disturb_start(location, heading)
        elif not self._from_line:
            start = self._start_anywhere()

        self._along, seconds = self.geometry.locate(self.location, start)[0], self._world.time
        length = self.geometry.length
        to_line = (length - self._along) % length
        before_it = self._from_line and to_line < length / 2  # as most tracks' start is
        self._distance = to_line + (self.laps - 1 + before_it) * length
        limit = self.max_seconds or max(LAP_SECONDS * self.laps, 2 * self._distance / (self.speed_cap or math.inf))
        self._limit = limit if self._from_line else min(limit, RANDOM_START_SECONDS)
        self._start, self._progress, self._best, self._best_at = seconds, 0.0, 0.0, seconds
        self._off_track_m = self._off_track_seconds = 0.0
        self._parts, self._place_now, self._speed = dict.fromkeys(self.reward_weights, 0.0), self.position, 0.0
        self._going_on: set[str] = set()
        self._drift_from, self._drifts = seconds, False
        self.trail: list[tuple] = []
        self._frames = np.repeat(self._picture()[None], self.frame_stack, 0)  # (K, 3, H, W)
        return self.observation(), {}

    def step(self, action: Iterable[int]) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self._race is None:
            raise gym.error.ResetNeeded("Call reset before step.")
        before = self._world.time
        action = [int(a) for a in action]
        self._history[-1]["actions"].append(action)
        controls = self._drive(action)
        self._frames = np.concatenate([self._frames[1:], self._picture()[None]])

        now, kart = self._world.time, self._kart
        along, offset, heading, width = self.geometry.locate(kart.location, self._along)
        gain = min(self.geometry.gain(self._along, along), TOP_SPEED * self.step_size)
        if kart.finish_time > 0:  # whatever was cut on the way, the gains of every race sum to the same
            gain = self._distance - self._progress
        self._along, self._progress, self._speed = along, self._progress + gain, math.hypot(*kart.velocity)
        if self.in_race:
            self.trail.append((now, *kart.location, self._speed))
        if self._progress > self._best + STUCK_METRES:
            self._best, self._best_at = self._progress, now
        off_track = max(abs(offset) - width / 2, 0.0)
        self._off_track_m = max(self._off_track_m, off_track)
        self._off_track_seconds += (now - before) * (off_track > 0)

        # The game counts no lap that began elsewhere. It ends at the line all the same: to the eye the two are one, and
        # with a value between "over" and "drive on" the kart coasted for the last 60 m, to put off the finish.
        at_line = not self._from_line and self._progress >= self._distance
        end = "finished" if kart.finish_time > 0 else "line" if at_line else ""
        finished = bool(end)
        if not end and now - self._best_at >= (RACE_STUCK_SECONDS if self.in_race else STUCK_SECONDS):
            end = "stuck"
        if not end and not self.in_race and self._progress < self._best - BACKWARDS_METRES:
            end = "backwards"
        if not end and not self.in_race and off_track > OFF_TRACK_METRES:
            end = "off track"
        terminated = bool(end)
        truncated = not terminated and now - self._start >= self._limit
        turned = math.degrees(self._heading() - heading)
        place, self._place_now = self._place_now, self.position
        moment = Moment(
            gain, now - before, offset, width, (turned + 180) % 360 - 180, FULL_LOCK * controls.steer,
            controls.speed, finished, terminated and not finished, place - self._place_now,
            self._events(controls) if "tuxkart" in self.reward_weights else (),
        )  # fmt: skip
        parts = {name: weight * REWARDS[name](moment) for name, weight in self.reward_weights.items()}
        self._parts = {name: self._parts[name] + part for name, part in parts.items()}
        info = self._final_info(end or "time limit") if terminated or truncated else {}
        return self.observation(), sum(parts.values()), terminated, truncated, info

    def _final_info(self, end: str) -> dict:
        finished = end == "finished"
        return {
            "lap_time": self._kart.finish_time + self._handicap if finished else float("nan"),
            "finished": finished,
            "position": self.position,
            "progress": 1.0 if finished else self._progress / self._distance,
            "off_track_m": self._off_track_m,
            "off_track_seconds": self._off_track_seconds,
            "seconds": self._world.time - self._start,
            "return": sum(self._parts.values()),
            "from_line": self._from_line,
            "end": end,
            **({"track": self.track, "snapshot": self.snapshot, "trail": self.trail} if self.in_race else {}),
        } | {f"reward/{name}": total for name, total in self._parts.items()}

    def _events(self, controls: Controls) -> tuple[str, ...]:
        """What began with this decision, of what `tuxkart_reward` pays for."""
        kart, nitro = self._kart, ("NITRO_BIG", "NITRO_SMALL")
        items = [item.location for item in self._world.items if item.type.name in nitro]
        now = {"powerup": kart.powerup.type.name != "NOTHING", "jump": kart.jumping}
        now |= {"nitro": any(math.dist(item, kart.location) < 2 for item in items), "rescue": controls.rescue}
        drifts, clock = controls.drift and self._speed >= BOOST_SPEED, self._world.time
        if not drifts:
            self._drift_from = max(self._drift_from, clock + BOOST_PAUSE * self._drifts)
        self._drifts = drifts
        now["drift"] = clock - self._drift_from > BOOST_SECONDS
        now["use"] = controls.fire and "powerup" in self._going_on
        begun = tuple(name for name, on in now.items() if on and name not in self._going_on)
        self._going_on = {name for name, on in now.items() if on}
        return begun

    @property
    def position(self) -> int:
        """Place in the race, 1 for the first."""
        if self.num_karts == 1:
            return 1
        ranks = [(k.finish_time > 0, -k.finish_time or k.overall_distance) for k in self._world.karts]
        return 1 + sum(rank > ranks[self.num_karts - 1] for rank in ranks)

    @property
    def location(self) -> tuple[float, ...]:
        """Where the kart is: (x, y, z) in metres, y up."""
        return tuple(float(value) for value in self._kart.location)

    @property
    def _kart(self) -> Any:
        return self._world.karts[self.num_karts - 1]  # the game puts its own karts first

    def _heading(self) -> float:
        """Where the kart's front points, radians from +z towards +x."""
        front, location = self._kart.front, self._kart.location
        return math.atan2(front[0] - location[0], front[2] - location[2])

    def observation(self) -> np.ndarray:
        """The stacked pictures, uint8 (3 * frame_stack, height, width)."""
        return self._frames.reshape(self.observation_space.shape)

    def render(self) -> np.ndarray:
        return self._frames[-1].transpose(1, 2, 0)

    def close(self) -> None:
        if self._stk is not None:
            self._unload_race()
            self._stk = None
            TuxKartEnv._process_is_busy = False  # the game stays, for the next one

    @property
    def snapshot(self) -> dict:
        """How this environment came here, small enough for a checkpoint; assigning it to another one, whose process is
        new, drives that to the same place.

        The game cannot be saved, but it replays exactly: its seed; the rng, options and actions of every episode since
        the track was loaded, because the camera's roll, a moving average over hundreds of pictures, outlives a restart;
        and how often the track was loaded, because the spectators then change their shirts.
        """
        return {"seed": int(self.np_random_seed), "loads": self._loads, "episodes": self._history}

    @snapshot.setter
    def snapshot(self, saved: dict) -> None:
        if self._stk is None:
            self._boot()
        super().reset(seed=saved.get("seed", 0))  # older ones have none
        while self._loads < saved["loads"] - 1:
            self._load_race()
        self._unload_race()
        for episode in saved["episodes"]:
            self.np_random.bit_generator.state = episode["rng"]
            self.reset(options=episode["options"])
            for action in episode["actions"]:
                self.step(action)

    def _drive(self, action: list[int]) -> Controls:
        """Holds the controls of an action for one decision. Returns them."""
        controls = self._controls(action, self._speed, self.speeds)
        if self.speed_cap is not None:
            acceleration, brake = govern(self.speed_cap, self._speed)
            acceleration, brake = min(acceleration, controls.acceleration), brake or controls.brake
            controls = controls._replace(nitro=False, acceleration=acceleration, brake=brake)
        pressed = self._stk.Action()
        for name in ("steer", "acceleration", "brake", "drift", "nitro", "fire", "rescue"):
            setattr(pressed, name, getattr(controls, name))
        self._race.config.step_size = self.step_size / self.substeps
        for substep in range(self.substeps):
            self._step(pressed if substep == 0 else None)  # the game makes its own of it from the first tick on
            if self.on_frame:
                self.on_frame(self._race.render_data[0].image)
        return controls

    def _step(self, control: Any) -> None:
        self._set_clock(int(1000 * self._world.time))
        self._race.step(control) if control and self.driver == "agent" else self._race.step()
        self._world.update()

    def _hold(self, seconds: float) -> None:
        """Lets game time pass without touching the controls, in one step and one picture."""
        self._race.config.step_size = seconds
        self._step(self._stk.Action())

    def _picture(self) -> np.ndarray:
        """The newest picture, uint8 (3, height, width), in the engine's own buffer: the next step draws over it."""
        if self.driver == "ai":
            return np.zeros((3, *self.size[::-1]), np.uint8)
        return np.asarray(self._race.render_data[0].image).transpose(2, 0, 1)

    def _place(self, location: Iterable[float], heading: float) -> None:
        """Puts the kart down at a location, facing `heading`, radians from +z towards +x."""
        rotation = (0.0, float(np.sin(heading / 2)), 0.0, float(np.cos(heading / 2)))  # x, y, z, w
        location = tuple(float(value) for value in location)
        self._stk.WorldState.set_kart_location(self.num_karts - 1, location, rotation, 0.0)

    def _disturb_start(self, location: Iterable[float], heading: float) -> None:
        """Moves the kart aside, turns it and holds it back, by amounts drawn from the seed."""
        aside, askew = self.np_random.uniform(-2.0, 2.0), np.radians(self.np_random.uniform(-10.0, 10.0))
        delay = 0.05 * int(self.np_random.integers(5)) * (self.num_karts == 1)  # the others would not wait
        location = np.array(location) + aside * np.array([np.cos(heading), 0.0, -np.sin(heading)])
        self._place(location, heading + askew)
        self._hold(1 / 120)
        if self.driver == "ai":  # it would drive off, so its clock gets the delay instead
            self._handicap = delay
        elif delay:
            self._hold(delay)

    def _start_anywhere(self) -> float:
        """Places the kart on a random path node, roughly facing along it, and lets it drop and the camera follow.

        Returns that node's distance down the track.
        """
        for _ in range(5):
            geometry, node = self.geometry, int(self.np_random.integers(len(self.geometry.starts)))
            heading = geometry.headings[node] + np.radians(self.np_random.uniform(-20.0, 20.0))
            aside = self.np_random.uniform(-0.3, 0.3) * geometry.widths[node]
            right = np.array([np.cos(geometry.headings[node]), 0.0, -np.sin(geometry.headings[node])])
            middle = geometry.starts[node] + geometry.vectors[node] / 2
            self._place(middle + aside * right + [0.0, 0.5, 0.0], heading)
            self._hold(0.3)
            if abs(self.location[1] - middle[1]) < 2.0:  # else it fell through a gap in the road
                break
        return float(geometry.distances[node].mean())


class PictureEnv(TuxKartEnv):
    """TuxKartEnv with what tuxkart-ai's networks see, and its moving finish.

    Observation: uint8 (C, height, width); with color "gray" one channel a picture (ITU-R BT.601), and with
    `info_picture` one more in front: four bands of rows, from the top nitro, place in the race, powerup, attachment
    (pystk does not tell the nitro: black). `finish_line` is the share of the race after which an episode from the start
    line ends as finished ones do, with `info["end"]` "finish line". Evaluation races go to the real finish.
    """

    def __init__(self, color: str = "rgb", info_picture: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.color, self.info_picture, self.finish_line = color, info_picture, 1.0
        channels = self.frame_stack * (3 if color == "rgb" else 1) + info_picture
        self.observation_space = gym.spaces.Box(0, 255, (channels, *self.size[::-1]), np.uint8)

    def observation(self) -> np.ndarray:
        if self.color == "rgb":
            return super().observation()
        pictures = np.einsum("kchw,c->khw", self._frames, [0.299, 0.587, 0.114]).round().astype(np.uint8)
        return np.concatenate([self._info_picture()[None], pictures]) if self.info_picture else pictures

    def _info_picture(self) -> np.ndarray:
        kart = self._kart
        powerup, attachment = kart.powerup.type, kart.attachment.type
        place = (self.position - 1) / self.num_karts
        shares = [getattr(kart, "energy", 0.0) / 20, place, powerup.value / 10]  # a tank holds 20
        shares.append(0.0 if attachment.name == "NOTHING" else (attachment.value + 1) / 10)
        width, height = self.size
        bands = np.repeat(shares, [len(rows) for rows in np.array_split(np.arange(height), 4)])
        return np.repeat((255 * bands).round().astype(np.uint8)[:, None], width, 1)

    def step(self, action: Iterable[int]) -> tuple[np.ndarray, float, bool, bool, dict]:
        observation, reward, terminated, truncated, info = super().step(action)
        reached = self._from_line and not self.in_race and self._progress >= self.finish_line * self._distance
        if reached and not terminated and self.finish_line < 1:
            for name, weight in self.reward_weights.items():  # what the finish pays, and no moment twice
                finish, nothing = (REWARDS[name](Moment(0.0, 0.0, finished=finished)) for finished in (True, False))
                self._parts[name] += weight * (finish - nothing)
                reward += weight * (finish - nothing)
            return observation, reward, True, False, self._final_info("finish line")
        return observation, reward, terminated, truncated, info


if "TuxKart-v0" not in gym.registry:
    gym.register("TuxKart-v0", entry_point=TuxKartEnv)  # type: ignore[arg-type]  # hinted to take any keyword


# ---------------------------------------------------------------------------------------------------------------------
# The network and PPO


def orthogonal(layer: nn.Module, gain: float) -> nn.Module:
    nn.init.orthogonal_(layer.get_parameter("weight"), gain)
    nn.init.zeros_(layer.get_parameter("bias"))
    return layer


def initialized(module: nn.Sequential, gain: float = 1.0) -> nn.Sequential:
    """A module whose convolutions are orthogonal with zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            nn.init.orthogonal_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


class Residual2d(nn.Module):
    """tuxkart-ai's 2D residual: two convolutions, the second undoing the first one's extra row; no activation after."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 4, stride=1, padding=2),
            nn.Tanh(),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, 4, stride=1, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def conv2d_network(shape: Sequence[int], channels: int, frames: int) -> tuple[nn.Module, Callable]:
    """tuxkart-ai's 2D network. shape: (C, H, W). Returns trunk and a function that makes a head of n outputs."""
    trunk = nn.Sequential(
        nn.Conv2d(shape[0], channels, 10, stride=4, padding=1),
        nn.Tanh(),
        nn.BatchNorm2d(channels),
        Residual2d(channels),
        nn.Conv2d(channels, channels, 4, stride=2, padding=1),
        nn.Tanh(),
        nn.BatchNorm2d(channels),
        Residual2d(channels),
    )
    size = output_shape(trunk, shape)[1:].numel()

    def head(outputs: int, gain: float) -> nn.Module:
        layers = [nn.Conv2d(channels, 1, 3, padding=1), nn.Tanh(), nn.Flatten()]
        return initialized(nn.Sequential(*layers, orthogonal(nn.Linear(size, outputs), gain)))

    return initialized(trunk), head


class ConvBlock3d(nn.Module):
    """BN(ReLU(conv x))."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=padding)
        self.norm = nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.conv(x)))


class ResBlock3d(nn.Module):
    """BN(ReLU(conv(BN(ReLU(conv x)))) + x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(F.relu(self.conv2(self.norm1(F.relu(self.conv1(x))))) + x)


class Volume(nn.Module):
    """(B, C T, H, W), the oldest picture first, as (B, C, T, H, W)."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.frames, -1)).transpose(1, 2)


def resnet3d_network(shape: Sequence[int], channels: int, frames: int) -> tuple[nn.Module, Callable]:
    """tuxkart-ai's 3D ResNet. shape: (C T, H, W). Returns trunk and a function that makes a head of n outputs."""
    trunk = nn.Sequential(
        Volume(frames),
        ConvBlock3d(shape[0] // frames, channels, stride=2),
        *(ResBlock3d(channels) for _ in range(5)),
        ConvBlock3d(channels, channels, stride=3, padding=0),
        *(ResBlock3d(channels) for _ in range(5)),
    )
    size = output_shape(trunk, shape)[1:].numel()

    def head(outputs: int, gain: float) -> nn.Module:
        middle = max(channels // 4, 1)
        blocks = [ConvBlock3d(channels, middle), nn.ReLU(), ConvBlock3d(middle, 1)]  # the actor's
        if outputs == 1:  # the critic's
            blocks = [ConvBlock3d(channels, 1), nn.ReLU()]
        return initialized(nn.Sequential(*blocks, nn.Flatten(), orthogonal(nn.Linear(size, outputs), gain)))

    return initialized(trunk), head


class Residual(nn.Module):
    """IMPALA's residual: two convolutions, each after a ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def impala_network(shape: Sequence[int], channels: int, frames: int) -> tuple[nn.Module, Callable]:
    """IMPALA's 15 layers (figure 3, right). shape: (C, H, W). Returns trunk and a function that makes a head."""
    layers, inputs = [], shape[0]
    for outputs in (channels, 2 * channels, 2 * channels):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
        layers += [Residual(outputs), Residual(outputs)]
        inputs = outputs
    trunk = nn.Sequential(*layers, nn.ReLU(), nn.Flatten())
    size = output_shape(trunk, shape).numel()
    trunk.extend([orthogonal(nn.Linear(size, HIDDEN), 2**0.5), nn.ReLU()])
    return trunk, lambda outputs, gain: orthogonal(nn.Linear(HIDDEN, outputs), gain)


class GrayMean(nn.Module):
    """The mean of every picture's channels: (B, frames * c, H, W) -> (B, frames, H, W)."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.frames, -1)).mean(2)


def ec418_network(shape: Sequence[int], channels: int, frames: int) -> tuple[nn.Module, Callable]:
    """EC418's actor and critic: two networks that share nothing, each on the mean of a picture's colours.

    shape: (C, H, W), RGB or gray. Returns trunk and head.
    """

    def head(outputs: int, gain: float) -> nn.Module:
        layers = [nn.BatchNorm2d(frames), nn.Conv2d(frames, channels, 8, stride=4), nn.ReLU()]
        layers += [nn.Conv2d(channels, 2 * channels, 4, stride=2), nn.ReLU()]
        layers += [nn.Conv2d(2 * channels, 2 * channels, 3, stride=1), nn.ReLU(), nn.Flatten()]
        convolutions = initialized(nn.Sequential(*layers), 2**0.5)
        size = output_shape(convolutions, (frames, *shape[1:])).numel()
        hidden = orthogonal(nn.Linear(size, 512), 2**0.5)
        return convolutions.extend([hidden, nn.ReLU(), orthogonal(nn.Linear(512, outputs), gain)])

    return GrayMean(frames), head


NETWORKS = {"impala": impala_network, "conv2d": conv2d_network, "resnet3d": resnet3d_network, "ec418": ec418_network}
HIDDEN = 256  # features of impala, and its LSTM's units


def output_shape(module: nn.Module, shape: Sequence[int]) -> torch.Size:
    """Shape of a module's output for one input of a shape, without the batch's dimension."""
    return copy.deepcopy(module).to("meta").eval()(torch.zeros(1, *shape, device="meta")).shape[1:]


class Agent(nn.Module):
    """A network by name, with a policy head and a value head.

    forward: uint8 pictures (B, C, H, W) -> logits (B, sum(nvec)), a block per action dimension, values (B,) and state.
    With an LSTM the B rows are T decisions of N environments, the first N rows the earliest; state is (N, 2 HIDDEN),
    and `starts` (B,) says which rows begin an episode. Without one state is (N, 0) and comes back as it went in.
    Batch normalization uses its running statistics while sampling and while learning, so that both see the same
    network; `refresh_batch_norm` moves them between updates.
    """

    def __init__(
        self, observation_shape: Sequence[int], nvec: Sequence[int], name: str, base_channels: int, frame_stack: int,
        memory: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.nvec, self.epsilon = [int(n) for n in nvec], 0.0
        self.amp: torch.dtype | None = None
        self.trunk, head = NETWORKS[name](observation_shape, base_channels, frame_stack)
        self.lstm = nn.LSTMCell(HIDDEN, HIDDEN) if memory == "lstm" else None
        self.policy, self.value = head(sum(self.nvec), 0.01), head(1, 1.0)
        self.format = torch.contiguous_format if name == "resnet3d" else torch.channels_last
        self.to(memory_format=self.format)  # type: ignore[call-overload]  # torch's hints lack it
        self.eval()

    @property
    def state_size(self) -> int:
        return 2 * HIDDEN if self.lstm else 0

    def forward(self, obs: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pictures = obs.float().div_(255.0).contiguous(memory_format=self.format)
        with torch.autocast("cuda" if obs.is_cuda else "cpu", self.amp or torch.bfloat16, enabled=self.amp is not None):
            features = self.trunk(pictures)
            if self.lstm is not None:
                outputs = []
                for step, start in zip(features.split(len(state)), starts.split(len(state)), strict=True):
                    hidden, cell = self.lstm(step, (state * ~start[:, None]).chunk(2, -1))
                    state = torch.cat([hidden, cell], -1).float()
                    outputs.append(hidden)
                features = torch.cat(outputs)
            logits, values = self.policy(features), self.value(features)
        return logits.float(), values.float().squeeze(-1), state


@torch.no_grad()
def refresh_batch_norm(agent: Agent, obs: Tensor, momentum: float, most: int, pieces: int = 1) -> None:
    """Moves every batch normalization's running statistics towards those of `most` of the pictures (B, C, H, W), which
    the network sees in pieces, each normalized by itself."""
    norms: list = [module for module in agent.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d)]
    if not norms:
        return
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    sums = [torch.zeros_like(torch.stack(pair)) for pair in before]
    some = obs[torch.randperm(len(obs))[:most].to(obs.device)]
    for norm in norms:
        norm.train().momentum = 1.0
    for piece in some.tensor_split(min(pieces, len(some))):
        agent(piece, torch.zeros(len(piece), agent.state_size, device=obs.device), None)
        for norm, total in zip(norms, sums, strict=True):
            mean, share = norm.running_mean, len(piece) / len(some)
            total += share * torch.stack([mean, norm.running_var + mean**2])
    for norm, (old_mean, old_variance), total in zip(norms, before, sums, strict=True):
        mean, square = mean_over_ranks(total)
        norm.running_mean.copy_(old_mean.lerp(mean, momentum))
        norm.running_var.copy_(old_variance.lerp((square - mean**2).clamp(min=0.0), momentum))
    agent.eval()


def evaluate_actions(logits: Tensor, actions: Tensor, nvec: list[int], epsilon: float = 0.0) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of independent categorical action dimensions.

    With `epsilon` the policy is the mixture with the uniform one, as `choose_actions` samples it; the entropy is that
    of the categorical part. logits: (B, sum(nvec)); actions: (B, len(nvec)). Returns (B,), (B,).
    """
    parts, entropies = [], []
    for block, action in zip(logits.split(nvec, -1), actions.unbind(-1), strict=True):
        block = block.log_softmax(-1)
        parts.append(block.gather(-1, action[:, None]).squeeze(-1))
        entropies.append(-(block.exp() * block).sum(-1))
    logprobs = torch.stack(parts).sum(0)
    if epsilon:
        uniform = torch.full_like(logprobs, math.log(epsilon / math.prod(nvec)))
        logprobs = torch.logaddexp(logprobs + math.log1p(-epsilon), uniform) if epsilon < 1 else uniform
    return logprobs, torch.stack(entropies).sum(0)


def choose_actions(
    logits: Tensor, nvec: list[int], greedy: bool = False, generator: torch.Generator | None = None,
    epsilon: float = 0.0,
) -> Tensor:  # fmt: skip
    """Most probable actions, or sampled ones (Gumbel-max). logits: (B, sum(nvec)) -> int64 (B, len(nvec))."""
    if epsilon:  # flat logits for the rows that act uniformly
        uniform = torch.rand(len(logits), 1, device=logits.device, generator=generator) < epsilon
        logits = torch.where(uniform, 0.0, logits)
    if not greedy:
        logits = logits - torch.empty_like(logits).exponential_(generator=generator).log()
    return torch.stack([block.argmax(-1) for block in logits.split(nvec, -1)], -1)


def compute_gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminations: Tensor, dones: Tensor, gamma: float,
    gae_lambda: float,
) -> Tensor:  # fmt: skip
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), cut at every episode's end.

    rewards, values, next_values, terminations, dones: (T, N). `next_values[t]` is V of the observation that step t led
    to, so a truncated episode bootstraps from its own last picture and never from the next start.
    Returns advantages, (T, N).
    """
    deltas = rewards + gamma * next_values * ~terminations - values
    advantages = torch.empty_like(rewards)
    running = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        running = deltas[t] + gamma * gae_lambda * running * ~dones[t]
        advantages[t] = running
    return advantages


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all of torchrun's ranks; the tensor itself where there is one process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def gather(thing: Any) -> list:
    """What each rank holds, as a list."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of (B,) values, over all ranks' together, of which each may have another B."""
    count, total = mean_over_ranks(torch.stack([values.new_tensor(len(values)), values.sum()]))
    one = 1 / dist.get_world_size() if dist.is_initialized() else 1.0  # value in all, as a mean over the ranks
    mean = total / count.clamp(min=one)
    variance = mean_over_ranks(((values - mean) ** 2).sum()) / (count - one).clamp(min=one)
    return mean, variance.sqrt()


def average_gradients(agent: Agent) -> None:
    """Gives every rank the mean gradient, in one message."""
    if dist.is_initialized():
        gradients: list = [parameter.grad for parameter in agent.parameters()]
        flat = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def ppo_loss(
    agent: Agent, batch: dict[str, Tensor], coefs: Args, totals: tuple[int, int | Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate objective (Schulman et al. 2017, eqs. 7 and 9) of a minibatch, or of a piece of one.

    batch: obs (B, C, H, W), state (N, S), starts (B,), actions (B, A), logprobs, values, advantages (normalized),
    returns, own (B,): whether the policy chose the action; random bursts teach the value only. `totals`: rows and own
    rows of the whole minibatch, so that the losses of its pieces add up to its own. `coefs`: Args. Returns the loss and
    a dict of detached scalars that add up likewise. KL: (r - 1) - log r (http://joschu.net/blog/kl-approx.html).
    """
    rows, own_rows = totals
    own = batch["own"].float() / own_rows
    logits, values, _ = agent(batch["obs"], batch["state"], batch["starts"])
    logprobs, entropy = evaluate_actions(logits, batch["actions"], agent.nvec, agent.epsilon)
    logratio = logprobs - batch["logprobs"]
    ratio, advantages, clip = logratio.exp(), batch["advantages"], coefs.clip_coef
    policy_loss = (own * torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))).sum()
    value_error = (values - batch["returns"]) ** 2
    if coefs.clip_vloss:
        clipped = batch["values"] + (values - batch["values"]).clamp(-clip, clip)
        value_error = torch.max(value_error, (clipped - batch["returns"]) ** 2)
    value_loss = 0.5 * value_error.sum() / rows
    entropy = (own * entropy).sum()
    loss = policy_loss - coefs.ent_coef * entropy + coefs.vf_coef * value_loss
    scalars = {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/approx_kl": (own * ((ratio - 1) - logratio)).sum(),
        "losses/clipfrac": (own * ((ratio - 1).abs() > clip)).sum(),
        "losses/ratio_error": ((ratio - 1).abs() * (own > 0)).max(),
    }
    if coefs.augment == "shift":  # as DrAC does (Raileanu et al. 2021, https://arxiv.org/abs/2006.12862)
        shifted_logits, shifted_values, _ = agent(
            random_shift(batch["obs"], len(batch["state"])), batch["state"], batch["starts"]
        )
        divergence = sum(
            F.kl_div(there.log_softmax(-1), here.detach().log_softmax(-1), reduction="sum", log_target=True)
            for here, there in zip(logits.split(agent.nvec, -1), shifted_logits.split(agent.nvec, -1), strict=True)
        )
        augment_loss = (divergence + coefs.vf_coef * ((shifted_values - values.detach()) ** 2).sum()) / rows
        loss = loss + coefs.augment_coef * augment_loss
        scalars["losses/augment_loss"] = augment_loss
    return loss, {key: value.detach() for key, value in scalars.items()}


def random_shift(obs: Tensor, shifts: int, pad: int = 4) -> Tensor:
    """Every picture of a batch (B, C, H, W), moved by up to `pad` pixels, its edges repeated (Yarats et al. 2021).

    `shifts` of them are drawn, and taken in turn: with an LSTM an environment's pictures all move alike.
    """
    height, width = obs.shape[-2:]
    padded = F.pad(obs.float(), (pad,) * 4, mode="replicate").to(obs.dtype)
    drawn = torch.randint(0, 2 * pad + 1, (2, shifts, 1, 1), device=obs.device)
    down, right = drawn.repeat(1, len(obs) // shifts, 1, 1)
    rows = (down + torch.arange(height, device=obs.device)[:, None]).expand(-1, -1, width)
    columns = (right + torch.arange(width, device=obs.device)).expand(-1, height, -1)
    index = (rows * padded.shape[-1] + columns)[:, None].expand(-1, obs.shape[1], -1, -1)
    return padded.flatten(2).gather(2, index.flatten(2)).view_as(obs)


def pick(batch: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Some rows of a batch (T, N, ...), flat. rows: indices into T N decisions, with an LSTM into N environments."""
    if batch["state"].shape[-1]:
        chosen = {key: value[:, rows].flatten(0, 1) for key, value in batch.items() if key != "state"}
        return chosen | {"state": batch["state"][rows]}
    chosen = {key: value.flatten(0, 1)[rows] for key, value in batch.items() if key != "state"}
    return chosen | {"state": batch["state"].new_zeros(len(rows), 0)}


def ppo_update(
    agent: Agent, optimizer: torch.optim.Adam, scaler: torch.amp.GradScaler, batch: dict[str, Tensor], args: Args
) -> dict[str, float]:
    """All passes over one iteration's data; batch: (T, N, ...) each, as in `ppo_loss`, and state (N, S).

    With torchrun every rank brings a batch of its own, and all take the same steps, by the mean gradient. Returns the
    scalars of `ppo_loss` averaged over the minibatches (ratio_error: of the first, where it shows how far sampling and
    learning disagree about the same network), and explained_variance. Raises RunError for a gradient that is no number.
    """
    units = batch["returns"].shape[1] if agent.state_size else batch["returns"].numel()
    history, stop = [], False
    for _ in range(args.epochs):
        for rows in torch.randperm(units).to(batch["returns"].device).split(units // args.num_minibatches):
            whole = pick({key: batch[key] for key in ("advantages", "own", "returns", "state")}, rows)
            own = whole["advantages"][whole["own"]]
            mean, deviation = moments(own)
            own_rows = mean_over_ranks(mean.new_tensor(len(own))).clamp(min=1e-6)  # other numbers on other ranks
            optimizer.zero_grad()
            sums: dict[str, Tensor] = {}
            for piece_rows in rows.tensor_split(args.grad_accum):
                piece = pick(batch, piece_rows)
                piece["advantages"] = (piece["advantages"] - mean) / (deviation + 1e-8)
                loss, scalars = ppo_loss(agent, piece, args, (len(whole["returns"]), own_rows))
                scaler.scale(loss).backward()
                for key, value in scalars.items():
                    together = torch.maximum if key == "losses/ratio_error" else torch.add
                    sums[key] = together(sums[key], value) if key in sums else value
            history.append(sums)
            if args.target_kl is not None:
                stop = bool(mean_over_ranks(sums["losses/approx_kl"].clone()) > args.target_kl)
            if stop:
                break
            average_gradients(agent)
            scaler.unscale_(optimizer)
            finite = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm).isfinite()
            if not finite and scaler.get_scale() <= 1:  # above, float16 overflows now and then, and the step is skipped
                raise RunError("The loss has a gradient that is not a finite number: try a smaller --learning-rate")
            scaler.step(optimizer)
            scaler.update()
        if stop:
            break
    metrics = {key: torch.stack([sums[key] for sums in history]).mean() for key in history[0]}
    metrics["losses/ratio_error"] = history[0]["losses/ratio_error"]
    residual = (batch["returns"] - batch["values"]).var() / batch["returns"].var().clamp(min=1e-8)
    metrics["losses/explained_variance"] = 1 - residual
    return dict(zip(metrics, mean_over_ranks(torch.stack(list(metrics.values()))).tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def play(
    make_env: Callable[[], TuxKartEnv], index: int, inbox: Connection, outbox: Connection, newest: Any, last: Any
) -> None:  # fmt: skip
    """A game process: does what the inbox asks for, and answers (True, result) or (False, why not).

    newest, last: shared memory for the newest pictures of all games, and for those that their last episode ended with.
    """
    belong_to_parent()
    env = make_env()
    shape = (-1, *env.observation_space.shape)
    newest, last = (np.frombuffer(memory, np.uint8).reshape(shape)[index] for memory in (newest, last))
    while True:
        command, argument = pickle.loads(inbox.recv_bytes())  # recv and send pickle too, but several times as slowly
        result: Any = None
        try:
            if command == "step":
                newest[:], *result = env.step(argument)
                if (result[1] or result[2]) and not env.in_race:
                    last[:] = newest
                    newest[:], _ = env.reset()
            elif command == "reset":
                newest[:], _ = env.reset(**argument)
            elif command == "set":
                setattr(env, *argument)
                if argument[0] == "snapshot":
                    newest[:] = env.observation()
            else:
                result = getattr(env, argument)
        except Exception as error:
            outbox.send_bytes(pickle.dumps((False, f"{type(error).__name__}: {error}")))
            return
        outbox.send_bytes(pickle.dumps((True, result)))


class Games:
    """TuxKartEnvs that play in step, each in a process of its own.

    What gymnasium's AsyncVectorEnv does in SAME_STEP mode, to the number (races wait for the next reset), written out
    because a game that dies, or is silent for `timeout` seconds, is replaced by a new one, and the others play on.

    newest, last: uint8 (N, C, H, W), in shared memory; the pictures now, and those that the last episodes ended with.
    """

    timeout, patience = 60.0, 3  # seconds for a decision; losses of one game without a single decision in between

    def __init__(self, make_envs: list[Callable[[], TuxKartEnv]]) -> None:
        self.make_envs, count = make_envs, len(make_envs)
        env = make_envs[0]()  # for its spaces; it starts no game
        shape = (count, *env.observation_space.shape)
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self._memory = [multiprocessing.RawArray("B", math.prod(shape)) for _ in range(2)]
        self.newest, self.last = (np.frombuffer(memory, np.uint8).reshape(shape) for memory in self._memory)
        self.lost, self._in_a_row = 0, [0] * count
        self._settings: dict[str, Any] = {}
        self._asked: dict[int, tuple[str, Any]] = {}
        self.processes: list[Any] = [None] * count
        self._questions: list[Any] = [None] * count
        self._answers: list[Any] = [None] * count
        for i in range(count):
            self._start(i)

    def __len__(self) -> int:
        return len(self.processes)

    def _start(self, i: int) -> None:
        # One pipe for each direction: a two-way one wakes a game once more, for nothing, whenever its answer is read.
        inbox, self._questions[i] = multiprocessing.Pipe(duplex=False)
        self._answers[i], outbox = multiprocessing.Pipe(duplex=False)
        arguments = (self.make_envs[i], i, inbox, outbox, *self._memory)
        self.processes[i] = multiprocessing.Process(target=play, args=arguments, daemon=True)
        self.processes[i].start()
        inbox.close()
        outbox.close()

    def _end(self, i: int) -> None:
        self.processes[i].kill()
        self.processes[i].join()
        self._questions[i].close()
        self._answers[i].close()

    def send(self, command: str, arguments: dict[int, Any]) -> None:
        """Asks games for something; arguments: {game: argument}. `receive` must follow."""
        self._asked = {i: (command, argument) for i, argument in arguments.items()}
        for i, question in self._asked.items():
            with contextlib.suppress(OSError):  # that it is dead shows when it should answer
                self._questions[i].send_bytes(pickle.dumps(question))

    def receive(self) -> dict[int, Any]:
        """The answers to `send`, {game: answer}. Raises RunError when one game is lost again and again.

        Of a step: reward, terminated, truncated and info. A lost game's episode is over, truncated where it was, and
        has no info (None).
        """
        answers, deciding = {}, all(command == "step" for command, _ in self._asked.values())
        timeout = self.timeout * (1 if deciding else 60)  # a busy machine takes long to load, and to replay snapshots
        deadline = time.monotonic() + timeout
        for i, question in self._asked.items():
            pause = max(1.0, deadline - time.monotonic()) / 2
            try:  # poll twice, because while the whole program was suspended the time ran on
                heard = self._answers[i].poll(pause) or self._answers[i].poll(pause)
                fine, answer = False, f"did not answer for {timeout:.0f} s"
                if heard:
                    fine, answer = pickle.loads(self._answers[i].recv_bytes())
            except (EOFError, OSError):
                self.processes[i].join(1)
                fine, answer = False, f"ended with exit code {self.processes[i].exitcode}"
            if fine and question[0] == "step":
                self._in_a_row[i] = 0
            answers[i] = answer if fine else self._replace(i, question, answer)
        return answers

    def _replace(self, i: int, question: tuple[str, Any], why: str) -> Any:
        """Starts a new game in place of a lost one. Returns its answer to what that was asked."""
        self.lost += 1
        self._in_a_row[i] += 1
        if self._in_a_row[i] > self.patience:
            raise RunError(f"A game was lost {self._in_a_row[i]} times in a row; the last one {why}")
        self._end(i)
        self._start(i)
        for name, values in self._settings.items():
            self.ask("set", {i: (name, values)})
        if question[0] in ("step", "get"):
            self.last[i] = self.newest[i]
            self.ask("reset", {i: {"seed": 10**9 + self.lost}})
        return (0.0, False, True, None) if question[0] == "step" else self.ask(question[0], {i: question[1]})[i]

    def ask(self, command: str, arguments: dict[int, Any]) -> dict[int, Any]:
        """`send` and `receive`."""
        self.send(command, arguments)
        return self.receive()

    def get(self, name: str) -> list:
        """An attribute of every game's environment, as a list."""
        return list(self.ask("get", dict.fromkeys(range(len(self)), name)).values())

    def set(self, name: str, value: Any) -> None:
        """Sets an attribute of every game's environment, and of those that replace it."""
        self._settings[name] = value
        self.ask("set", dict.fromkeys(range(len(self)), (name, value)))

    def close(self) -> None:
        for i in range(len(self)):
            self._end(i)


RELOAD_INTERVAL = 32  # iterations after which the games start afresh: a resumed run replays no more than that


class Sampler:
    """Plays `num_steps` decisions in every environment, in two groups: while the network looks at the pictures of one,
    the games of the other go on."""

    def __init__(self, args: Args, device: torch.device, state_size: int) -> None:
        halves = np.array_split(np.arange(args.num_envs), min(2, args.num_envs))
        first = ranks()[0] * args.num_envs
        tracks = [args.track[(first + i) % len(args.track)] for i in range(args.num_envs)]
        envs = [make_env(args, track, args.random_start) for track in tracks]
        self.columns = [slice(int(half[0]), int(half[-1]) + 1) for half in halves]
        self.groups = [Games(envs[c]) for c in self.columns]
        space, actions = self.groups[0].observation_space, self.groups[0].action_space
        shape = (args.num_steps, args.num_envs)
        self.obs = torch.zeros(shape + space.shape, dtype=torch.uint8, device=device)  # (T, N, C, H, W)
        self.actions = torch.zeros((*shape, len(actions.nvec)), dtype=torch.int64, device=device)
        self.logits = torch.zeros((*shape, int(actions.nvec.sum())), device=device)
        self.values, self.next_values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self.rewards = np.zeros(shape, np.float32)
        self.terminations, self.dones = np.zeros(shape, bool), np.zeros(shape, bool)
        self.own = torch.ones(shape, dtype=torch.bool, device=device)  # whether the policy chose the action
        self.starts = torch.ones(shape, dtype=torch.bool, device=device)  # whether the observation begins an episode
        self.state = torch.zeros(args.num_envs, state_size, device=device)  # the LSTM's, now
        self.first_state = self.state.clone()  # and where this iteration began
        self.next_starts = torch.ones(args.num_envs, dtype=torch.bool, device=device)
        self.burst = torch.zeros(args.num_envs, dtype=torch.int64, device=device)  # random decisions still to come
        self.burst_prob, self.burst_steps, self.finish_line = args.random_action_prob, args.random_action_steps, 1.0

    def reset(self, seed: int) -> None:
        """Loads the track and starts an episode in every environment; environment i is seeded with seed + i."""
        for group, columns in zip(self.groups, self.columns, strict=True):
            group.send("reset", {i: {"seed": seed + columns.start + i} for i in range(len(group))})
        for group in self.groups:
            group.receive()
        self.next_starts.fill_(True)
        self.burst.zero_()

    def move_finish(self, share: float) -> None:
        """Sets the finish line of every environment, as a share of the race."""
        self.finish_line = share
        for group in self.groups:
            group.set("finish_line", share)

    def snapshots(self) -> list[dict]:
        """The running episode of every environment, to be stored in a checkpoint."""
        return [snapshot for group in self.groups for snapshot in group.get("snapshot")]

    def memory(self) -> dict:
        """What else a checkpoint needs to go on."""
        tensors = {"state": self.state, "starts": self.next_starts, "burst": self.burst}
        return {key: value.cpu() for key, value in tensors.items()} | {"finish_line": self.finish_line}

    def restore(self, snapshots: list[dict], memory: dict) -> None:
        """Drives every environment to where its snapshot was taken."""
        self.state.copy_(memory["state"])
        self.next_starts.copy_(memory["starts"])
        self.burst.copy_(memory["burst"])
        self.move_finish(memory["finish_line"])
        for group, columns in zip(self.groups, self.columns, strict=True):
            group.send("set", {i: ("snapshot", snapshot) for i, snapshot in enumerate(snapshots[columns])})
        for group in self.groups:
            group.receive()

    @torch.no_grad()
    def collect(self, agent: Agent) -> list[dict]:
        """Fills the storage. Returns the final infos of the episodes that ended, oldest first."""
        device = self.obs.device
        episodes: list[dict] = []
        last_pictures: list[tuple] = []
        self.first_state.copy_(self.state)
        for t in range(len(self.obs)):
            for g, columns in enumerate(self.columns):
                if t > 0:
                    self._receive(t - 1, g, episodes, last_pictures)
                self.obs[t, columns] = torch.from_numpy(self.groups[g].newest).to(device)
                self.starts[t, columns] = starts = self.next_starts[columns]
                logits, self.values[t, columns], self.state[columns] = agent(
                    self.obs[t, columns], self.state[columns], starts
                )
                self.logits[t, columns], actions = logits, choose_actions(logits, agent.nvec, epsilon=agent.epsilon)
                if self.burst_prob:
                    actions = self._interfere(t, columns, actions, agent.nvec)
                self.actions[t, columns] = actions
                self.groups[g].send("step", dict(enumerate(actions.tolist())))
        for g in range(len(self.groups)):
            self._receive(len(self.obs) - 1, g, episodes, last_pictures)

        self.next_values[:-1] = self.values[1:]
        for g, columns in enumerate(self.columns):
            obs = torch.from_numpy(self.groups[g].newest).to(device)
            self.next_values[-1, columns] = agent(obs, self.state[columns], self.next_starts[columns])[1]
        for t, env, picture, state in last_pictures:
            obs, goes_on = torch.from_numpy(picture)[None].to(device), torch.zeros(1, dtype=torch.bool, device=device)
            self.next_values[t, env] = agent(obs, state, goes_on)[1][0]
        return episodes

    def _interfere(self, t: int, columns: slice, actions: Tensor, nvec: list[int]) -> Tensor:
        """Begins, goes on with and ends bursts of random actions. actions: (n, A)."""
        burst, device = self.burst[columns], actions.device
        begins = (burst == 0) & (torch.rand(len(burst), device=device) < self.burst_prob)
        burst = torch.where(begins, self.burst_steps, burst)
        wild = (torch.rand(actions.shape, device=device) * torch.tensor(nvec, device=device)).long()
        self.own[t, columns] = burst == 0
        self.burst[columns] = (burst - 1).clamp(min=0)
        return torch.where((burst > 0)[:, None], wild, actions)

    def _receive(self, t: int, g: int, episodes: list[dict], last_pictures: list[tuple]) -> None:
        """Waits for the step t of group g. A truncated episode's last picture is kept for its bootstrap value."""
        for i, (reward, terminated, truncated, info) in self.groups[g].receive().items():
            n = self.columns[g].start + i
            if not math.isfinite(reward):
                raise RunError(f"The reward {reward} is not a finite number: look at --reward and its weights")
            self.rewards[t, n], self.terminations[t, n], self.dones[t, n] = reward, terminated, terminated or truncated
            self.next_starts[n] = terminated or truncated
            if terminated or truncated:
                self.burst[n] = 0
            if truncated:
                last_pictures.append((t, n, self.groups[g].last[i].copy(), self.state[n : n + 1].clone()))
            if info:
                episodes.append(info)

    def batch(self, agent: Agent, gamma: float, gae_lambda: float) -> dict[str, Tensor]:
        """The storage as the batch of `ppo_update`."""
        rewards, terminations, dones = (
            torch.from_numpy(a).to(self.obs.device) for a in (self.rewards, self.terminations, self.dones)
        )
        advantages = compute_gae(rewards, self.values, self.next_values, terminations, dones, gamma, gae_lambda)
        tensors = {"obs": self.obs, "actions": self.actions, "logits": self.logits, "values": self.values}
        tensors |= {"advantages": advantages, "returns": advantages + self.values}
        logits, actions = tensors.pop("logits").flatten(0, 1), self.actions.flatten(0, 1)
        logprobs, _ = evaluate_actions(logits, actions, agent.nvec, agent.epsilon)
        tensors |= {"logprobs": logprobs.view_as(self.values), "own": self.own, "starts": self.starts}
        return tensors | {"state": self.first_state}

    def close(self) -> None:
        for group in self.groups:
            group.close()


def make_env(args: Args, track: str, random_start: float = 0.0, driver: str = "agent") -> Callable[[], TuxKartEnv]:
    """A function without arguments that makes one environment, for `Games`."""
    settings = {name: getattr(args, name) for name in ENV_SETTINGS + RACE_SETTINGS}
    settings |= {"info_picture": args.network == "conv2d"}
    settings |= {"color": args.color, "track": track, "random_start": random_start, "driver": driver}
    return functools.partial(PictureEnv, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def race_games(args: Args, track: str, driver: str = "agent") -> Games:
    """Games for evaluation races, a few more than there are cores."""
    return Games([make_env(args, track, driver=driver)] * min(args.eval_episodes, 2 * (os.cpu_count() or 1)))


def run_races(
    games: Games, policy: Callable, seeds: Sequence[int], keep_frames: int = 0, tracks: Sequence[str] = ()
) -> list[dict]:
    """Drives one evaluation race per seed. policy: pictures (K, C, H, W), starts (K,) -> actions (K, A).

    Several tracks take turns. Returns a list of dicts in the order of the seeds: the env's final info (with the track,
    the snapshot that replays the race, and its trail: clock, x, y, z, speed), the seed, and, for the first
    `keep_frames` races, the newest picture of every decision, uint8 (T, H, W, 3).
    """
    options: dict[int, dict] = {seed: {"race": True} for seed in seeds}
    for k, seed in enumerate(seeds if tracks else ()):
        options[seed]["track"] = tracks[k % len(tracks)]
    waiting = deque(seeds)
    racing: dict[int, int] = {}  # {game: seed}
    lost = dict.fromkeys(seeds, 0)
    results: dict[int, dict] = {}
    frames: dict[int, list[np.ndarray]] = {seed: [] for seed in list(seeds)[:keep_frames]}
    color = games.get("color")[0]
    while len(results) < len(seeds):
        starts: dict[int, int] = {}
        if waiting and len(racing) <= len(games) // 2:  # the others wait while tracks load, so several load at once
            starts = {i: waiting.popleft() for i in range(len(games)) if i not in racing and waiting}
            racing |= starts
            games.ask("reset", {i: {"seed": seed, "options": options[seed]} for i, seed in starts.items()})
        for i, seed in racing.items():
            if seed in frames:
                newest = games.newest[i, -3:] if color == "rgb" else games.newest[i, -1:].repeat(3, 0)
                frames[seed].append(newest.transpose(1, 2, 0).copy())
        actions = policy(games.newest, np.isin(np.arange(len(games)), list(starts))).tolist()
        for i, (_, terminated, truncated, info) in games.ask("step", {i: actions[i] for i in racing}).items():
            if terminated or truncated:
                seed = racing.pop(i)
                if info:
                    results[seed] = info | {"seed": seed}
                else:  # its game was lost
                    waiting.append(seed)
                    lost[seed] += 1
                    if lost[seed] > games.patience:
                        raise RunError(f"The race of seed {seed} lost its game {lost[seed]} times")
                    frames = {key: [] if key == seed else kept for key, kept in frames.items()}
    return [results[seed] | {"frames": frames.get(seed)} for seed in seeds]


def network_policy(agent: Agent, device: torch.device, greedy: bool, seed: int = 0) -> Callable:
    """The agent as a policy for `run_races`; it leaves the global random state alone."""
    generator = torch.Generator(device).manual_seed(seed)
    state: Tensor | None = None

    @torch.no_grad()
    def policy(obs: np.ndarray, starts: np.ndarray) -> np.ndarray:
        nonlocal state
        state = torch.zeros(len(obs), agent.state_size, device=device) if state is None else state
        logits, _, state = agent(torch.from_numpy(obs).to(device), state, torch.from_numpy(starts).to(device))
        return choose_actions(logits, agent.nvec, greedy, generator).cpu().numpy()

    return policy


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a rate (Wilson 1927), as two shares."""
    middle, spread = successes + z**2 / 2, z * (successes * (trials - successes) / trials + z**2 / 4) ** 0.5
    return (middle - spread) / (trials + z**2), (middle + spread) / (trials + z**2)


def lap_correlation(episodes: list[tuple[float, float]]) -> float | None:
    """Correlation of return with lap time over finished laps; above 0 the reward prefers slow ones.

    episodes: pairs (return, lap time), nan where it did not finish. None for fewer than ten laps, equal ones, or a
    correlation within two standard deviations of what chance brings.
    """
    laps: np.ndarray = np.array([pair for pair in episodes if pair[1] == pair[1]], np.float64).T
    if laps.size < 20 or np.ptp(laps, 1).min() < 1e-9:
        return None
    correlation = float(np.corrcoef(laps)[0, 1])
    return correlation if abs(correlation) * laps.shape[1] ** 0.5 > 2 else None


def action_shares(actions: list[list[int]], sizes: dict[str, int]) -> dict[str, list[float]]:
    """How often each choice was made. actions: (T, A); sizes: {name: n}. Returns {name: (n,) shares}."""
    columns = np.asarray(actions).reshape(-1, len(sizes)).T
    return {
        name: (np.bincount(column, minlength=size) / len(column)).tolist()
        for (name, size), column in zip(sizes.items(), columns, strict=True)
    }


def draw_map(geometry: TrackGeometry, races: list[dict], size: int = 600) -> np.ndarray:
    """The road in gray, the races' trails from blue (slow) to red (fast), a black cross where one did not finish.

    Returns uint8 (size, size, 3).
    """
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (size, size), "white")
    pen, road = ImageDraw.Draw(picture), geometry.starts[:, [0, 2]]
    corner, scale = road.min(0) - 20, (size - 1) / (np.ptp(road, 0).max() + 40)

    def line(points: Sequence, color: tuple[int, ...], width: float = 2) -> None:
        pixels = (np.array(points)[:, [0, 2]] - corner) * scale
        pen.line(pixels.ravel().tolist(), color, round(width))
        if width > 2:  # closes the joint
            pen.ellipse([*(pixels[0] - width / 2), *(pixels[0] + width / 2)], color)

    for start, end, width in zip(geometry.starts, geometry.ends, geometry.widths, strict=True):
        line((start, end), (210, 210, 210), max(width * scale, 2))
    fastest = max([point[-1] for race in races for point in race["trail"]], default=1)
    for race in races:
        for before, (_, x, y, z, speed) in zip(race["trail"], race["trail"][1:], strict=False):
            line((before[1:4], (x, y, z)), (round(255 * speed / fastest), 60, round(255 - 255 * speed / fastest)))
    for _, x, y, z, _ in [race["trail"][-1] for race in races if race["trail"] and not race["finished"]]:
        arm = 5 / scale
        line(((x - arm, y, z - arm), (x + arm, y, z + arm)), (0, 0, 0))
        line(((x - arm, y, z + arm), (x + arm, y, z - arm)), (0, 0, 0))
    return np.array(picture)[::-1]


def summarize(races: list[dict]) -> dict:
    """Figures of a set of races, for evaluation.json and the logs.

    The median and the best lap are the means of the tracks', and None unless every track was finished.
    """
    tracks: dict[str, list[float]] = {race["track"]: [] for race in races}
    for race in races:
        if race["finished"]:
            tracks[race["track"]].append(float(race["lap_time"]))
    laps, each = [lap for times in tracks.values() for lap in times], all(tracks.values())
    return {
        "races": len(races),
        "finished": len(laps),
        "lap_times": laps,
        "median": float(np.mean([np.median(times) for times in tracks.values()])) if each else None,
        "best": float(np.mean([min(times) for times in tracks.values()])) if each else None,
        "completion_interval": wilson_interval(len(laps), len(races)),
        "ends": dict(Counter(str(race["end"]) for race in races)),
        "return_lap_correlation": lap_correlation([(race["return"], race["lap_time"]) for race in races]),
        "progress": float(np.mean([race["progress"] for race in races])),
        "off_track_seconds": float(np.mean([race["off_track_seconds"] for race in races])),
    }


def score(summary: dict) -> tuple[float, float, float]:
    """What makes a checkpoint the best: finish rate, then lap time. A larger tuple is better."""
    return summary["finished"] / summary["races"], -(summary["median"] or float("inf")), summary["progress"]


def film_race(args: Args, track: str, snapshot: dict, path: Path, width: int = 640, height: int = 480) -> None:
    """Replays one race at a size a person wants to look at and writes it as mp4, 20 pictures a second of game time."""
    belong_to_parent()
    import imageio.v2

    env = make_env(dataclasses.replace(args, width=width, height=height, frame_stack=1), track)()
    env.substeps = max(1, round(args.step_size / 0.05))
    with imageio.v2.get_writer(path, fps=env.substeps / args.step_size, macro_block_size=2) as video:
        env.on_frame = lambda image: video.append_data(np.array(image))
        env.snapshot = snapshot
    env.close()


def write_mosaic(races: list[dict], path: Path, fps: float) -> None:
    """Up to 16 races side by side as mp4; a finished race stands still on its last picture."""
    import imageio.v2

    clips = [np.stack(race["frames"]) for race in races[:16]]
    length, columns = max(map(len, clips)), int(np.ceil(len(clips) ** 0.5))
    clips += [np.zeros_like(clips[0][:1])] * (-len(clips) % columns)
    clips = [np.concatenate([clip, clip[-1:].repeat(length - len(clip), 0)]) for clip in clips]
    clips = [clip.repeat(2, 1).repeat(2, 2) for clip in clips]
    rows = [np.concatenate(clips[i : i + columns], 2) for i in range(0, len(clips), columns)]
    imageio.v2.mimwrite(path, list(np.concatenate(rows, 1)), fps=fps, macro_block_size=2)


def evaluate(args: Args, checkpoint: dict) -> None:
    """Races a checkpoint on every track, greedy and sampled, beside the game's AI."""
    assert args.evaluate is not None
    device, here = pick_device(args.device), describe_setting(args)
    agent = make_agent(args, here, device)
    load_weights(agent, checkpoint, args.evaluate, here)
    note_differences(checkpoint["made_on"], here)
    torch.set_num_threads(1)
    results = [
        evaluate_track(dataclasses.replace(args, track=(track,)), agent, device, checkpoint["iteration"])
        for track in args.track
    ]
    if len(results) > 1:
        print(f"{'':24}{'finished':>10}{'median':>10}{'the AI':>10}{'ratio':>8}")
    for result in results if len(results) > 1 else ():
        done, times = f"{result['finished']}/{len(result['seeds'])}", [result["median"], result["ai_median"]]
        cells = [f"{seconds:.2f} s" if seconds else "-" for seconds in times]
        ratio = f"{result['ratio']:.3f}" if result["ratio"] else "-"
        print(f"{result['track'][0]:24}{done:>10}{cells[0]:>10}{cells[1]:>10}{ratio:>8}")


def evaluate_track(args: Args, agent: Agent, device: torch.device, iteration: int) -> dict:
    """Races on the one track of `args`; writes evaluation.json, two films and a map. Returns what is in the first."""
    import imageio.v2

    assert args.evaluate is not None
    started, here, track = time.time(), describe_setting(args), args.track[0]
    seeds = list(range(args.eval_seed, args.eval_seed + args.eval_episodes))
    drivers = {
        "greedy": ("agent", network_policy(agent, device, greedy=True), 16),
        "sampled": ("agent", network_policy(agent, device, greedy=False, seed=args.eval_seed), 0),
        "ai": ("ai", lambda obs, starts: np.zeros((len(obs), len(here["actions"])), np.int64), 0),
    }
    races = {}
    for name, (driver, policy, keep_frames) in drivers.items():
        with contextlib.closing(race_games(args, track, driver)) as games:
            races[name] = run_races(games, policy, seeds, keep_frames)
            geometry, count = games.get("geometry")[0], len(games)
        if name == "greedy":
            folder = Path("runs") / f"{args.evaluate.stem}-{track}-{time.strftime('%Y%m%d-%H%M%S')}"
            folder.mkdir(parents=True)
            # The best of them, or the one that came furthest, is filmed beside the other races.
            best = min(races[name], key=lambda race: race["lap_time"] if race["finished"] else 1e9 - race["progress"])
            settings = args, track, best["snapshot"], folder / "best_race.mp4"
            film = multiprocessing.Process(target=film_race, args=settings, daemon=True)
            film.start()

    result = here | {"checkpoint": str(args.evaluate), "iteration": iteration, "seeds": seeds, "games": count}
    result |= {name: summarize(races[name]) for name in drivers}
    result |= {key: result["greedy"][key] for key in ("finished", "lap_times", "median", "off_track_seconds")}
    result |= {"ai_lap_times": result["ai"]["lap_times"], "ai_median": result["ai"]["median"]}
    result["ratio"] = result["median"] / result["ai_median"] if result["median"] and result["ai_median"] else None
    both = zip(races["greedy"], races["ai"], strict=True)  # nan where the AI did not finish
    result["faster_than_ai"] = sum(one["finished"] and not one["lap_time"] >= ai["lap_time"] for one, ai in both)
    for name in drivers if args.num_karts > 1 else ():
        places = [race["position"] for race in races[name]]
        result[name]["wins"] = sum(race["finished"] and race["position"] == 1 for race in races[name])
        result[name]["mean_position"] = float(np.mean(places))
    actions = [action for race in races["greedy"] for action in race["snapshot"]["episodes"][-1]["actions"]]
    result["action_shares"] = action_shares(actions, action_sizes(args.actions, args.speeds))
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")

    print(f"{track}, {len(seeds)} races, {here['engine']} {here['engine_version']}, assets {here['assets']}")
    print(f"{'':10}{'finished':>10}{'of all (95%)':>14}{'median':>10}{'best':>10}{'off track':>12}")
    for name in drivers:
        row = result[name]
        times = [f"{row[key]:.2f} s" if row[key] else "-" for key in ("median", "best")]
        done = f"{row['finished']}/{row['races']}"
        low, high = row["completion_interval"]
        print(
            f"{name:10}{done:>10}{f'{low:.0%} to {high:.0%}':>14}{times[0]:>10}{times[1]:>10}"
            f"{row['off_track_seconds']:>10.2f} s" + (f", won {row['wins']}" if "wins" in row else "")
        )
    if result["ratio"]:
        print(f"the greedy median is {result['ratio']:.3f} of the AI's")
    print(f"greedy is faster than the AI from {result['faster_than_ai']} of {len(seeds)} starts")
    if args.speed_cap:
        print(f"the agent is held below {args.speed_cap:g} m/s, the AI is not")
    correlation = result["greedy"]["return_lap_correlation"]
    if correlation is not None:
        prefers = "slow laps: try --reward progress" if correlation > 0 else "fast laps"
        print(f"return and lap time correlate by {correlation:+.2f}: the reward prefers {prefers}")
    never = [f"{name} {i}" for name, row in result["action_shares"].items() for i, share in enumerate(row) if not share]
    print(f"never chosen: {', '.join(never) or 'nothing'}")
    imageio.v2.imwrite(folder / "map.png", draw_map(geometry, races["greedy"]))
    write_mosaic(races["greedy"], folder / "mosaic.mp4", 1 / args.step_size)
    film.join()
    if film.exitcode:
        raise RunError(f"The film's game ended with exit code {film.exitcode}; all but best_race.mp4 is in {folder}/.")
    print(f"written to {folder}/: evaluation.json, map.png, best_race.mp4, mosaic.mp4 ({time.time() - started:.0f} s)")
    return result


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
        whole &= fits(checkpoint["made_on"].get("speed_cap"), float | None) and "agent" in checkpoint
        whole &= all(isinstance(number, int) for number in (checkpoint["iteration"], *checkpoint["made_on"]["actions"]))
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


def load_weights(agent: Agent, checkpoint: dict, path: Path | None, here: dict) -> None:
    """Puts a checkpoint's weights into the network of the setting `here`. Raises UsageError where they do not fit."""
    made_on = {"action_set": "drive"} | checkpoint["made_on"]
    if any(made_on[key] != here[key] for key in ("action_set", "actions")):
        wanted = f"--actions {made_on['action_set']}"
        if made_on["action_set"] == "deepracer":
            wanted += f" with {sum(made_on['actions']) // 7} --speeds"
        raise UsageError(f"{path} learnt other actions than this run's: type {wanted}, or another path.")
    try:
        agent.load_state_dict(checkpoint["agent"])
    except (RuntimeError, TypeError, AttributeError) as error:
        flags = "--network, --base-channels, --memory, --color, --frame-stack, --width and --height"
        sees = f"type the {flags} that it learnt with, or another path"
        raise UsageError(f"{path} holds another network than this run's: {sees}.") from error


def describe_setting(args: Args) -> dict:
    """What a checkpoint is made on, as plain values."""
    engine = find_engine(args.engine)
    setting: dict = {"engine": engine, "engine_version": engine_version(engine), "assets": find_assets(engine)[1]}
    sizes = action_sizes(args.actions, args.speeds)
    setting |= {"track": list(args.track), "action_set": args.actions, "actions": list(sizes.values())}
    assert args.frame_stack is not None  # `complete` has filled it in
    channels = args.frame_stack * (3 if args.color == "rgb" else 1) + (args.network == "conv2d")
    setting |= {"observation": [channels, args.height, args.width], "step_size": args.step_size}
    setting |= {key: getattr(args, key) for key in ("network", "base_channels", "frame_stack", "memory", "color")}
    if args.actions == "deepracer":
        setting["speeds"] = list(args.speeds)
    return setting | {key: getattr(args, key) for key in RACE_SETTINGS}


def make_agent(args: Args, setting: dict, device: torch.device) -> Agent:
    """The network of some Args, on its device."""
    shape = (setting["base_channels"], setting["frame_stack"], setting["memory"])
    agent = Agent(setting["observation"], setting["actions"], args.network, *shape).to(device)
    agent.amp = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    if args.compile:
        agent.compile()
    return agent


def minibatch_units(args: Args) -> int:
    """What a minibatch is made of: decisions, or with an LSTM whole environments."""
    return args.num_envs * (1 if args.memory == "lstm" else args.num_steps) // args.num_minibatches


def memory_needs(args: Args, setting: dict) -> tuple[int, int, int]:
    """Bytes of the rollout's storage, of one minibatch's activations and gradients, and of weights and Adam."""
    decisions, picture = args.num_envs * args.num_steps, int(np.prod(setting["observation"]))
    with torch.device("meta"):
        agent = Agent(setting["observation"], setting["actions"], args.network, setting["base_channels"],
                      setting["frame_stack"], args.memory)  # fmt: skip
        outputs = []
        for module in agent.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda module, inputs, output: outputs.append(
                    sum(tensor.numel() for tensor in output) if isinstance(output, tuple) else output.numel()
                ))  # fmt: skip
        units = -(-minibatch_units(args) // args.grad_accum)  # in the largest piece of a minibatch
        rows = units * (args.num_steps if args.memory == "lstm" else 1)
        state = torch.zeros(units, agent.state_size)
        obs = torch.zeros(rows, *setting["observation"], dtype=torch.uint8)
        agent(obs, state, torch.zeros(rows, dtype=torch.bool))
    weights = sum(parameter.numel() for parameter in agent.parameters())
    passes = 1 if args.augment == "none" else 2
    return decisions * picture, passes * (8 * sum(outputs) + 4 * rows * picture), 16 * weights


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


def recent_metrics(recent: Iterable[list[float]], columns: list[str], args: Args) -> dict[str, float]:
    """Means over the last episodes that began on the start line; recent: a row of the columns' figures for each."""
    returns, progress, finished, laps, positions, *parts = np.array(recent).T
    metrics = {"charts/episodic_return": returns.mean(), "charts/progress": progress.mean()}
    metrics["charts/finish_rate"] = finished.mean()
    metrics |= {f"charts/{name}": part.mean() for name, part in zip(columns[5:], parts, strict=True)}
    if args.num_karts > 1:
        metrics |= {"charts/position": positions.mean(), "charts/win_rate": ((positions == 1) & (finished > 0)).mean()}
    correlation = lap_correlation(list(zip(returns, laps, strict=True)))
    if correlation is not None and len(args.track) == 1:  # a longer track pays more, and takes longer
        metrics["charts/return_lap_correlation"] = correlation
    if finished.any():
        metrics["charts/lap_time"] = laps[finished > 0].mean()
    return metrics


def exam(agent: Agent, device: torch.device, args: Args, logger: Logger, step: int) -> dict:
    """Greedy races while learning, with a film and a map for TensorBoard. Returns what `summarize` makes of them.

    In games of their own, which are new each time: the pictures depend a little on what a game has seen before.
    """
    torch.set_num_threads(1)
    first = args.eval_seed + 10_000  # other starts than --evaluate reports, since these choose best.pt
    seeds = range(first, first + args.eval_episodes)
    policy = network_policy(agent, device, greedy=True)
    with contextlib.closing(race_games(args, args.track[0])) as games:
        races = run_races(games, policy, seeds, 1, args.track)
        geometry, track = games.get("geometry")[0], games.get("track")[0]
    logger.film("eval/race", races[0]["frames"][::2], 0.5 / args.step_size, step)
    picture = draw_map(geometry, [race for race in races if race["track"] == track])
    logger.board.add_image("eval/map", picture.copy(), step, dataformats="HWC")
    return summarize(races)


def next_lesson(lesson: dict, passed: bool) -> dict:
    """The speed curriculum. lesson: the speed cap, the last one that was passed or None, and the increment, in m/s.

    A passed cap rises by the increment. One that fails falls back to the last that was passed, and half the increment.
    """
    if passed:
        return lesson | {"cap": lesson["cap"] + lesson["increment"], "passed": lesson["cap"]}
    if lesson["passed"] is None:
        return lesson
    increment = max(lesson["increment"] / 2, 0.25)
    return lesson | {"cap": lesson["passed"] + increment, "increment": increment}


def ranks() -> tuple[int, int]:
    """This process's rank, and how many there are: torchrun's, or 0 of 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(device: torch.device) -> None:
    """Meets torchrun's other ranks. Each restart under keys of its own: else it finds the addresses of the dead."""
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = datetime.timedelta(days=1)  # while the first rank drives alone; torchrun sees who has died
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


def run_folder(args: Args) -> Path:
    """Where a new run writes to. Under torchrun all ranks, and their restarts, have to agree about it."""
    unique = os.environ.get("TORCHELASTIC_RUN_ID") or time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / (args.name or f"{'-'.join(args.track)}-seed{args.seed}-{unique}")


def train(args: Args, checkpoint: dict | None = None) -> None:
    """Learns, from the start or from a run's last checkpoint; writes runs/<name>/."""
    from tqdm import tqdm

    device, made_on, (rank, world) = pick_device(args.device), describe_setting(args), ranks()
    storage, minibatch, adam = (size / 2**20 for size in memory_needs(args, made_on))
    print(f"memory: rollout {storage:.0f} MB, a minibatch about {minibatch:.0f} MB, weights and Adam {adam:.0f} MB")
    if args.amp != "off" and device.type == "cpu":
        if not any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith(args.amp)):
            print(f"note: this CPU has no instructions for {args.amp}, and --amp off will be much faster")
    torch.manual_seed(args.seed)
    agent = make_agent(args, made_on, device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    iteration, elapsed, best = 0, 0.0, None
    recent: deque[list[float]] = deque(maxlen=100)
    reached: deque[bool] = deque(maxlen=32)  # whether the last episodes from the start line came to the finish line
    logger: Any = None  # rank 0's
    bar: Any = None
    lesson, graduate = {"cap": args.speed_cap, "passed": None, "increment": args.speed_curriculum}, None
    folder = args.resume or run_folder(args)
    if checkpoint:
        note_differences(checkpoint["made_on"], made_on | {"speed_cap": checkpoint["made_on"].get("speed_cap")})
        load_weights(agent, checkpoint, folder, made_on)
        try:
            optimizer.load_state_dict(checkpoint["optimizer"])
            scaler.load_state_dict(checkpoint["scaler"])
            iteration, elapsed, best = checkpoint["iteration"], float(checkpoint["elapsed"]), checkpoint["best"]
            recent.extend([float(value) for value in row] for row in checkpoint["recent"])
            reached.extend(checkpoint["reached"])
            lesson = {key: checkpoint["lesson"][key] for key in lesson}
            graduate, count = checkpoint["graduate"], len(checkpoint["ranks"])
            if count != world:
                raise UsageError(f"{folder} is a run of {count} rank(s): type torchrun --nproc-per-node {count}.")
            own = checkpoint["ranks"][rank]
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UsageError(f"{folder}/last.pt cannot be resumed: type --init-from {folder}/last.pt.") from error
    else:
        if args.init_from:
            source = load_checkpoint(args.init_from)
            load_weights(agent, source, args.init_from, made_on)
            note_differences(source["made_on"], made_on)
        unborn = (folder / "config.json").exists() and not list(folder.glob("*.pt"))  # no iteration was saved
        if rank == 0 and folder.exists() and not unborn:
            raise UsageError(f"{folder} exists already: type --resume {folder} to go on with it, or another --name.")

    sampler = Sampler(args, device, agent.state_size)
    stopped = f"type --resume {folder} to go on from the last iteration that was saved"
    try:
        for group in sampler.groups:
            group.set("speed_cap", lesson["cap"])
        if checkpoint:
            print("driving the games back to where they were, which can take minutes", flush=True)
            sampler.restore(own["episodes"], own["memory"])
            torch.set_rng_state(own["rng"])
            if device.type == "cuda" and own["cuda_rng"] is not None:
                torch.cuda.set_rng_state(own["cuda_rng"])
        else:
            if rank > 0:
                torch.manual_seed(args.seed + 1_000_000 * rank)  # the same network, but other actions
            sampler.move_finish(0.1 if args.moving_finish else 1.0)
            sampler.reset(args.seed * 1_000_000 + rank * args.num_envs)
            obs = torch.from_numpy(np.concatenate([group.newest for group in sampler.groups])).to(device)
            if not args.init_from:
                refresh_batch_norm(agent, obs, 1.0, minibatch_units(args), args.grad_accum)
        plain = args_to_plain(args)
        batch_size = args.num_envs * args.num_steps * world
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(plain | {"made_on": made_on}, indent=2) + "\n")
            logger = Logger(folder, args, iteration, iteration * batch_size)
        iterations = args.total_timesteps // batch_size
        print(f"{folder}: {made_on['engine']} {made_on['engine_version']}, assets {made_on['assets']}, {device}")
        tqdm.monitor_interval = 0  # its thread would run into the end of the interpreter
        bar = tqdm(total=iterations * batch_size, initial=iteration * batch_size, unit=" decisions", smoothing=0.05,
                   disable=rank > 0)  # fmt: skip
        while iteration < iterations:
            started = time.time()
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / iterations)
            agent.epsilon = args.epsilon * (1 - iteration / iterations)
            torch.set_num_threads(1)  # the games have the other cores
            episodes = sampler.collect(agent)
            sampled = time.time()
            torch.set_num_threads(max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1))
            batch = sampler.batch(agent, args.gamma, args.gae_lambda)
            metrics = ppo_update(agent, optimizer, scaler, batch, args)
            refresh_batch_norm(agent, batch["obs"].flatten(0, 1), 0.1, minibatch_units(args), args.grad_accum)
            learnt = time.time()
            iteration += 1
            step = iteration * batch_size

            columns = ["return", "progress", "finished", "lap_time", "position"]
            columns += [f"reward/{name}" for name in parse_reward(args.reward)]
            rows = [[float(episode[key]) for key in columns] for episode in episodes if episode["from_line"]]
            recent.extend(row for rows_of_rank in gather(rows) for row in rows_of_rank)
            if args.moving_finish:
                metrics["charts/finish_line"] = sampler.finish_line
                ends = [episode["end"] in ("finished", "finish line") for episode in episodes if episode["from_line"]]
                reached.extend(end for ends_of_rank in gather(ends) for end in ends_of_rank)
                if len(reached) == reached.maxlen and np.mean(reached) > 0.7:
                    sampler.move_finish(min(sampler.finish_line + 0.05, 1.0))
                    reached.clear()
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            metrics["charts/lost_games"] = sum(gather(sum(group.lost for group in sampler.groups)))
            if recent:
                metrics |= recent_metrics(recent, columns, args)
                shown = {name: f"{metrics[f'charts/{name}']:.0%}" for name in ("progress", "finish_rate")}
                bar.set_postfix(shown, refresh=False)
            reload = iteration % RELOAD_INTERVAL == 0
            made_on["speed_cap"] = lesson["cap"]
            weights = {"args": plain, "made_on": made_on, "agent": agent.state_dict(), "iteration": iteration}
            due = args.eval_interval > 0 and (iteration % args.eval_interval == 0 or iteration == iterations)
            passed = None
            if due and rank == 0:
                summary = exam(agent, device, dataclasses.replace(args, speed_cap=lesson["cap"]), logger, step)
                passed = summary["finished"] == summary["races"]
                metrics |= {f"eval/{key}": summary[key] for key in ("finished", "progress", "off_track_seconds")}
                if summary["median"]:
                    metrics |= {"eval/median_lap": summary["median"], "eval/best_lap": summary["best"]}
                names = action_sizes(args.actions, args.speeds)
                for name, chosen in zip(names, sampler.actions.unbind(-1), strict=True):
                    logger.board.add_histogram(f"actions/{name}", chosen.cpu(), step)
                note = f"{summary['median']:.2f} s" if summary["median"] else f"progress {summary['progress']:.0%}"
                bar.write(f"{step:>9} decisions: {summary['finished']}/{summary['races']} finished, {note}")
                if best is None or score(summary) > tuple(best):
                    best = list(score(summary))
                    save_atomically(weights, folder / "best.pt")
                if metrics.get("charts/return_lap_correlation", 0.0) > 0:
                    bar.write("this reward pays more for slower laps: --reward progress does not")
            if due and args.speed_curriculum:
                passed = gather(passed)[0]
                if passed:
                    graduate = {key: value.clone() for key, value in agent.state_dict().items()}
                elif graduate:
                    agent.load_state_dict(graduate)
                    optimizer.state.clear()  # its averages led to the weights that failed
                    made_on["speed_cap"] = lesson["passed"]
                reload |= next_lesson(lesson, passed) != lesson  # an episode is driven under one cap
                lesson = next_lesson(lesson, passed)
                bar.write(f"{'passed' if passed else 'failed'}: the speed cap is now {lesson['cap']:.4g} m/s")
                for group in sampler.groups:
                    group.set("speed_cap", lesson["cap"])
            if reload:
                sampler.reset(args.seed * 1_000_000 + (iteration * world + rank) * args.num_envs)
            if lesson["cap"]:
                metrics["charts/speed_cap"] = lesson["cap"]
            spent = time.time() - started
            elapsed += spent
            metrics |= {"charts/SPS": batch_size / spent, "charts/sampling_SPS": batch_size / (sampled - started)}
            metrics |= {"charts/elapsed_seconds": elapsed, "charts/update_seconds": learnt - sampled}
            state = {"optimizer": optimizer.state_dict(), "elapsed": elapsed, "best": best, "recent": list(recent)}
            state |= {"lesson": lesson, "graduate": graduate}
            state |= {"scaler": scaler.state_dict(), "reached": list(reached)}
            own = {"episodes": sampler.snapshots(), "memory": sampler.memory(), "rng": torch.get_rng_state()}
            own["cuda_rng"] = torch.cuda.get_rng_state() if device.type == "cuda" else None
            state["ranks"] = gather(own)
            if rank == 0:
                logger.write(iteration, step, {key: float(value) for key, value in metrics.items()})
                save_atomically(weights | state, folder / "last.pt")
            bar.update(batch_size)
        print(f"\ndone: type --evaluate {folder}/{'best' if best else 'last'}.pt to race it against the game's own AI")
    except KeyboardInterrupt:
        saved = (folder / "last.pt").exists()
        print(f"\nstopped; {stopped}" if saved else "\nstopped before the first iteration was done; nothing to resume")
    except (RunError, OSError) as error:
        what = f"{error.filename or folder}: {error.strerror}" if isinstance(error, OSError) else str(error)
        saved = (folder / "last.pt").exists()
        raise RunError(f"{what}; {stopped}." if saved else f"{what}; nothing was saved yet.") from error
    finally:
        for thing in (bar, logger, *sampler.groups):
            if thing is not None:
                thing.close()


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
# The command line


def args_to_plain(args: Args) -> dict:
    """Args as plain values for JSON and checkpoints; what belongs to one call only is left out."""
    plain = dataclasses.asdict(dataclasses.replace(args, resume=None, evaluate=None))
    return plain | {"init_from": args.init_from and str(args.init_from)}


def check_args(args: Args) -> Args:
    """Everything that can be known to be wrong before a process starts. Returns args; raises UsageError."""
    engine = find_engine(args.engine)
    assets, version = find_assets(engine)
    tracks = race_tracks(assets)
    for track in args.track:
        if track not in tracks:
            close = difflib.get_close_matches(track, tracks, 1, 0)
            raise UsageError(f"There is no track {track}: type --track {close[0]}, or one of {', '.join(tracks)}.")
        if args.reverse and not tracks[track]:
            raise UsageError(f"The track {track} cannot be driven the other way round: leave out --reverse.")
    karts = sorted(path.parent.name for path in (assets / "data" / "karts").glob("*/kart.xml"))
    if args.kart not in karts:
        close = difflib.get_close_matches(args.kart, karts, 1, 0)
        raise UsageError(f"There is no kart {args.kart}: type --kart {close[0]}, or one of {', '.join(karts)}.")
    limits: dict[str, tuple[float, float]] = {}
    limits |= {name: (1, np.inf) for name in ("num_envs", "frame_stack", "laps", "epochs", "num_minibatches")}
    limits |= {name: (1, np.inf) for name in ("base_channels", "grad_accum", "random_action_steps")}
    limits |= {"random_action_prob": (0, 0.5), "augment_coef": (0, np.inf)}
    limits |= {"num_steps": (2, np.inf), "eval_episodes": (1, np.inf), "eval_interval": (0, np.inf)}
    limits |= {"seed": (0, np.inf), "eval_seed": (0, np.inf), "width": (36, 2048), "height": (36, 2048)}
    limits |= {"random_start": (0, 1), "gamma": (0, 1), "gae_lambda": (0, 1), "learning_rate": (0, 1)}
    limits |= {"clip_coef": (1e-6, 1), "max_grad_norm": (1e-6, np.inf), "ent_coef": (0, np.inf), "vf_coef": (0, np.inf)}
    limits |= {"step_size": (1 / 120, 1), "num_karts": (1, 20), "epsilon": (0, 1)}
    optional = {"max_seconds": 1, "speed_cap": 1, "speed_curriculum": 1, "target_kl": 1e-6}
    limits |= {name: (least, np.inf) for name, least in optional.items() if getattr(args, name) is not None}
    for name, (least, most) in limits.items():
        value, flag = getattr(args, name), name.replace("_", "-")
        if not least <= value <= most:
            wanted = f"{least} or more" if most == np.inf else f"a number from {least:.4g} to {most}"
            raise UsageError(f"--{flag} is {value}: type {wanted}.")
    numbers = {name: value if isinstance(value, tuple) else (value,) for name, value in vars(args).items()}
    numbers["reward"] = tuple(parse_reward(args.reward).values())
    for name, values in numbers.items():
        if any(isinstance(value, float) and not math.isfinite(value) for value in values):
            raise UsageError(f"--{name.replace('_', '-')} holds something that is not a finite number: type one.")
    if not (args.track and args.reward):
        raise UsageError("--track and --reward each need a name: type --track scotland --reward progress.")
    rising = list(args.speeds) == sorted(set(args.speeds)) or args.resume or args.evaluate  # older runs' may not be
    if min(args.speeds, default=0) <= 0 or not rising:
        raise UsageError("--speeds are metres a second above 0, the slowest first: type --speeds 8 16 24.")
    if args.actions != "deepracer" and args.speeds != Args.speeds and not (args.resume or args.evaluate):
        raise UsageError("--speeds belong to one set of actions: type --actions deepracer as well.")
    if args.speed_curriculum and not (args.speed_cap and args.eval_interval):
        raise UsageError("--speed-curriculum needs a cap to begin with and evaluations: type --speed-cap 8 as well.")
    if args.memory == "lstm" and args.network != "impala":
        raise UsageError("Only --network impala has an LSTM: leave out --memory lstm, or type --network impala.")
    if args.memory == "lstm" and args.num_envs % args.num_minibatches:
        raise UsageError(
            f"An LSTM learns from whole environments, and {args.num_envs} do not divide into {args.num_minibatches} "
            "minibatches: type another --num-envs or --num-minibatches."
        )
    if args.network == "conv2d" and args.color == "rgb":
        raise UsageError("The network conv2d sees gray pictures: leave out --color rgb.")
    if args.network == "resnet3d" and (args.frame_stack or 0) < 5:
        raise UsageError(f"resnet3d needs 5 pictures or more, not {args.frame_stack}: type --frame-stack 5.")
    if args.evaluate and ranks()[1] > 1:
        raise UsageError("--evaluate needs one process: type python in the place of torchrun.")
    places = args.num_envs * ranks()[1]
    places = min(places, args.eval_episodes) if args.eval_interval else places
    if len(args.track) > places and not args.evaluate:
        raise UsageError(
            f"{len(args.track)} tracks, and {places} environments or evaluation races to share them out: type a larger "
            "--num-envs or --eval-episodes, or fewer tracks."
        )
    batch = args.num_envs * args.num_steps
    if batch % args.num_minibatches:
        raise UsageError(
            f"{args.num_envs} environments x {args.num_steps} steps = {batch} decisions, which does not divide into "
            f"{args.num_minibatches} minibatches: type another --num-minibatches."
        )
    units = minibatch_units(args)
    if args.grad_accum > units:
        raise UsageError(
            f"--grad-accum is {args.grad_accum}, and a minibatch has {units} part(s): type {units} or less."
        )
    if batch == args.num_minibatches:
        raise UsageError(f"A minibatch needs two decisions or more: type --num-minibatches {batch // 2} or less.")
    batch *= ranks()[1]
    if args.total_timesteps < batch:
        raise UsageError(f"--total-timesteps {args.total_timesteps} is less than one batch: type {batch} or more.")
    if sys.platform == "linux":
        libraries = ("libEGL.so.1", "libOpenGL.so.0", "libGLX.so.0", "libX11.so.6")
        for library in libraries if engine == "pystk" else libraries[:1]:
            try:
                ctypes.CDLL(library)
            except OSError as error:
                raise UsageError(f"{library} is missing, so the game has no display: type ./install.sh") from error
    return args


def parse(argv: list[str]) -> tuple[Args, Any]:
    """The command line as Args, and the checkpoint that is resumed or evaluated, whose settings are the defaults."""
    args = complete(tyro.cli(Args, args=argv, description=__doc__))
    folder = run_folder(args)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (folder / "last.pt").is_file():
        argv, args.resume = ["--resume", str(folder)], folder  # torchrun repeats what was typed at first
    path = args.evaluate or (args.resume and args.resume / "last.pt")
    if not path:
        return check_args(args), None
    checkpoint = load_checkpoint(path)
    saved = Args(**checkpoint["args"])
    saved.init_from = saved.init_from and Path(saved.init_from)
    if args.evaluate:
        saved.speed_cap = checkpoint["made_on"].get("speed_cap")
    args = complete(tyro.cli(Args, args=argv, default=saved))
    before = args_to_plain(saved)
    free = ("device", "grad_accum")  # they suit the machine; gradients stay the same to rounding
    changed = [name for name, value in args_to_plain(args).items() if value != before[name] and name not in free]
    if args.resume and changed:
        flag = changed[0].replace("_", "-")
        raise UsageError(f"A resumed run keeps its own settings: leave out --{flag}, or start anew with --init-from.")
    return check_args(args), checkpoint


def summarize_network(args: Args) -> None:
    """Prints the network's layers as torchinfo does."""
    from torchinfo import summary

    setting = describe_setting(args)
    with torch.device("meta"):  # shapes without numbers
        agent = make_agent(args, setting, torch.device("meta"))
        rows = torch.zeros(1, *setting["observation"], dtype=torch.uint8)
        data = [rows, torch.zeros(1, agent.state_size), torch.zeros(1, dtype=torch.bool)]
        print(summary(agent, input_data=data, depth=4, device="meta", verbose=0))


def main() -> None:
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        # Keep freed memory instead of handing every large tensor back to the kernel: learning takes half the time.
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    rank, world = ranks()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        args, checkpoint = parse(sys.argv[1:])
        if world > 1:
            join_ranks(pick_device(args.device))
        if args.summary:
            summarize_network(args)
        else:
            evaluate(args, checkpoint) if args.evaluate else train(args, checkpoint)
        if world > 1:
            dist.destroy_process_group()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "alloc" not in str(error).lower():
            raise
        print("The machine's memory is full: type a larger --grad-accum, or a smaller --num-envs.", file=sys.stderr)
        sys.exit(1)
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except (RunError, OSError) as error:
        print(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
