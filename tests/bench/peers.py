"""Training decisions/s of PPO on the same game, ours and others': python tests/bench/peers.py --out peers.json

Every peer trains on `TuxKart-v0` with the same number of games, the hyperparameters of `ppo_tuxkart.Args` and, but for
EC418's, the same network from the same weights. They take turns, each in a process of its own that ends, with all its
games, before the next one starts; a turn's first iteration warms up, whole iterations count after that.

ours     `ppo_tuxkart.Sampler` and `ppo_update`, as the script's own loop has them
sb3      Stable-Baselines3's PPO with CnnPolicy on SubprocVecEnv, both as they come
cleanrl  a loop as in CleanRL's ppo_atari: AsyncVectorEnv with its defaults, one batch of all games, float32 pictures.
         The step after an episode's end only resets (NEXT_STEP); it learns from that row too, but none is counted here
ec418    the EC418 notebook's design: a Ray worker for each game plays a whole episode (500 decisions at most) with the
         network on one picture at a time, and all wait for the slowest; 5,000 decisions, without the first four of each
         episode (they are counted here); then 100 minibatches of 512. Its own network: batch normalization and the
         Nature CNN on a gray picture, actor and critic apart. Its films are left out

`:tuned` gives a peer the two settings that ppo_tuxkart.py makes for itself: threads that do not spin, and freed memory
that is kept. CPU time and memory are the learner's process on one hand and all that it started on the other; memory
counts a shared page once. The file is written after every round.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gymnasium as gym
import numpy as np
import torch  # before ppo_tuxkart, which would change how torch's threads wait
import tyro
from processes import adopt_orphans, cpu_seconds, descendants, megabytes, plain_settings, print_rows, run_turn
from torch import nn
from torch.distributions import Categorical

import ppo_tuxkart

ROOT = Path(__file__).resolve().parents[2]
KEPT = str(1 << 30)  # bytes; ppo_tuxkart's main() asks the same of mallopt
TUNED = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": KEPT, "MALLOC_TRIM_THRESHOLD_": KEPT}
Peer = Literal["ours", "sb3", "sb3:tuned", "cleanrl", "cleanrl:tuned", "ec418", "ec418:tuned"]
NEEDS = {"sb3": "stable-baselines3", "ec418": "ray"}


@dataclasses.dataclass
class Work:
    """What every peer is given to do, here and in learning_peers.py."""

    num_envs: int = 16
    """games"""
    num_steps: int = 128
    """decisions per game and iteration"""
    threads: int = os.cpu_count() or 1
    """threads that torch may use"""
    track: str = "scotland"
    """track to drive"""
    engine: str = "auto"
    """game bindings"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks learn"""


@dataclasses.dataclass
class Turns(Work):
    """How the turns are taken, here and in changes.py."""

    rounds: int = 5
    """turns of each"""
    iterations: int = 3
    """measured iterations a turn, after one that warms up"""
    checkpoint: Path | None = None
    """weights to begin with, but for ec418 (default: untrained ones, whose episodes are short)"""
    seed: int = 1
    """seed of the network and the games"""
    out: Path | None = None
    """JSON file to write"""


@dataclasses.dataclass
class Peers(Turns):
    peers: tuple[Peer, ...] = get_args(Peer)
    """who takes part"""
    ec418_decisions: int = 5_000
    """decisions per iteration of ec418"""
    turn: Peer | None = None
    """play this peer's turn only, in this process, and print its figures as a line of JSON"""


class Turn:
    """Keeps the figures of one turn. A peer calls it after every iteration, while its games are alive."""

    def __init__(self, iterations):
        self.left, self.rows, self.cpu, self.memory = iterations, [], {}, {}

    def __call__(self, decisions, sampling, learning, episodes=()):
        """decisions played, seconds of sampling and of learning, final infos of the episodes that ended."""
        pids = {"learner": [os.getpid()], "games": descendants(os.getpid())}
        used = {party: cpu_seconds(ids) for party, ids in pids.items()}
        if self.rows:  # the first one has warmed up
            self.cpu = {party: used[party] - self.before[party] for party in pids}
        else:
            self.before = used
        self.rows.append({"decisions": int(decisions), "sampling": sampling, "learning": learning})
        self.left -= 1
        if not self.left:
            self.memory = {party: sum(megabytes(pid, "Pss") for pid in ids) for party, ids in pids.items()}

    def figures(self):
        warm = self.rows[1:]
        played, sampling, learning = (sum(row[key] for row in warm) for key in ("decisions", "sampling", "learning"))
        return {
            "rate": played / (sampling + learning),
            "sampling_rate": played / sampling,
            "learning_ms": 1000 * learning / played,
            "cpu_ms": {party: 1000 * seconds / played for party, seconds in self.cpu.items()},
            "memory_mb": self.memory,
            "iterations": self.rows,
        }


def make_args(settings, iterations, seed):
    """The one set of hyperparameters, with a run of so many iterations."""
    args = ppo_tuxkart.Args(track=(settings.track,), engine=settings.engine, num_envs=settings.num_envs)
    args.num_steps, args.seed, args.device = settings.num_steps, seed, settings.device
    args.total_timesteps = iterations * settings.num_envs * settings.num_steps
    return args


def make_agent(args, checkpoint=None):
    """Our network, whose weights the others begin with."""
    made_on = ppo_tuxkart.describe_setting(args)
    torch.manual_seed(args.seed)
    agent = ppo_tuxkart.Agent(made_on["observation"], made_on["actions"])
    if checkpoint:
        ppo_tuxkart.load_weights(agent, ppo_tuxkart.load_checkpoint(checkpoint), checkpoint, made_on)
    return agent


def make_env(args):
    """A function that makes the game, as somebody would who only imports the file."""
    settings = {"track": args.track[0], "engine": args.engine, "random_start": args.random_start}
    return lambda: gym.make("ppo_tuxkart:TuxKart-v0", **settings)


def give_weights(agent, other):
    """Copies our network's weights to a peer's, layer by layer, and so makes sure that it is the same network."""
    for ours, theirs in zip(agent.parameters(), other.parameters(), strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(f"The peer's network has a layer of {tuple(theirs.shape)} where ours has {ours.shape}.")
        theirs.data.copy_(ours)


# ---------------------------------------------------------------------------------------------------------------------
# The peers: functions of the arguments, our network, the settings, and what to call after every iteration


def play_ours(args, agent, settings, turn):
    device = torch.device(args.device)
    agent.to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    sampler = ppo_tuxkart.Sampler(args, device)
    sampler.reset(args.seed)
    size = args.num_envs * args.num_steps
    iterations = args.total_timesteps // size
    for iteration in range(iterations):
        started = time.perf_counter()
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / iterations)
        torch.set_num_threads(1)
        episodes = sampler.collect(agent)
        sampled = time.perf_counter()
        torch.set_num_threads(settings.threads)
        ppo_tuxkart.ppo_update(agent, optimizer, sampler.batch(agent, args.gamma, args.gae_lambda), args)
        turn(size, sampled - started, time.perf_counter() - sampled, episodes)
    sampler.close()


def play_sb3(args, agent, settings, turn):
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import SubprocVecEnv

    size = args.num_envs * args.num_steps

    class Watch(BaseCallback):
        """Times the halves of SB3's own loop: an iteration ends where the next one starts."""

        started = sampled = None

        def _end(self):
            if self.started:
                turn(size, self.sampled - self.started, time.perf_counter() - self.sampled, self.episodes)

        def _on_rollout_start(self):
            self._end()
            self.started, self.episodes = time.perf_counter(), []

        def _on_step(self):
            ended = zip(self.locals["infos"], self.locals["dones"], strict=True)
            self.episodes += [info for info, done in ended if done]
            return True

        def _on_rollout_end(self):
            self.sampled = time.perf_counter()

        def _on_training_end(self):
            self._end()

    envs = SubprocVecEnv([make_env(args)] * args.num_envs)
    model = PPO(
        "CnnPolicy",
        envs,
        learning_rate=lambda left: args.learning_rate * (left + size / args.total_timesteps),  # it counts one ahead
        n_steps=args.num_steps,
        batch_size=size // args.num_minibatches,
        n_epochs=args.epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=args.clip_coef,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef / 2,  # ours halves the squared error
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        device=args.device,
    )
    give_weights(agent, model.policy)
    model.learn(args.total_timesteps, callback=Watch())
    envs.close()


class FloatAgent(nn.Module):
    """The same network in the way of CleanRL: float pictures, divided by 255 at every look."""

    def __init__(self, channels, features, nvec):
        super().__init__()
        self.nvec = nvec
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(features, 512), nn.ReLU()),
        )
        self.actor, self.critic = nn.Linear(512, sum(nvec)), nn.Linear(512, 1)

    def forward(self, pictures):
        """Pictures (B, C, H, W) -> one distribution per action dimension, and values (B,)."""
        hidden = self.body(pictures / 255.0)
        blocks = self.actor(hidden).split(self.nvec, -1)
        return [Categorical(logits=block) for block in blocks], self.critic(hidden).flatten()


def joint(distributions, actions):
    """Log-probability and entropy of all action dimensions together. actions: (B, A)."""
    logprobs = [one.log_prob(action) for one, action in zip(distributions, actions.unbind(-1), strict=True)]
    return sum(logprobs), sum(one.entropy() for one in distributions)


def play_cleanrl(args, agent, settings, turn):
    device = torch.device(args.device)
    envs = gym.vector.AsyncVectorEnv([make_env(args)] * args.num_envs)
    space, shape = envs.single_observation_space, (args.num_steps, args.num_envs)
    peer = FloatAgent(space.shape[0], agent.hidden[0].in_features, agent.nvec)
    give_weights(agent, peer)
    peer.to(device)
    optimizer = torch.optim.Adam(peer.parameters(), lr=args.learning_rate, eps=1e-5)
    obs = torch.zeros(shape + space.shape, device=device)
    actions = torch.zeros((*shape, len(agent.nvec)), device=device, dtype=torch.int64)
    logprobs, values, rewards, dones = (torch.zeros(shape, device=device) for _ in range(4))
    picture = torch.tensor(envs.reset(seed=args.seed)[0], dtype=torch.float32, device=device)
    done = torch.zeros(args.num_envs, device=device)
    size = args.num_envs * args.num_steps
    iterations = args.total_timesteps // size
    for iteration in range(iterations):
        started = time.perf_counter()
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / iterations)
        for t in range(args.num_steps):
            obs[t], dones[t] = picture, done
            with torch.no_grad():
                distributions, values[t] = peer(picture)
                actions[t] = torch.stack([one.sample() for one in distributions], -1)
                logprobs[t], _ = joint(distributions, actions[t])
            picture, reward, terminations, truncations, _ = envs.step(actions[t].cpu().numpy())
            rewards[t] = torch.tensor(reward, device=device)
            picture = torch.tensor(picture, dtype=torch.float32, device=device)
            done = torch.tensor(terminations | truncations, dtype=torch.float32, device=device)
        with torch.no_grad():
            following, going_on = peer(picture)[1], 1 - done  # a time-out counts as the end, as it does there
            advantages, running = torch.zeros_like(rewards), 0.0
            for t in reversed(range(args.num_steps)):
                error = rewards[t] + args.gamma * following * going_on - values[t]
                advantages[t] = running = error + args.gamma * args.gae_lambda * going_on * running
                following, going_on = values[t], 1 - dones[t]
        sampled = time.perf_counter()

        data = [part.flatten(0, 1) for part in (obs, actions, logprobs, advantages, advantages + values)]
        for _ in range(args.epochs):
            for rows in np.array_split(np.random.permutation(size), args.num_minibatches):
                pictures, taken, before, advantage, returns = (part[torch.from_numpy(rows)] for part in data)
                distributions, value = peer(pictures)
                now, entropy = joint(distributions, taken)
                ratio = (now - before).exp()
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                limited = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                loss = -torch.min(advantage * ratio, advantage * limited).mean()
                loss += args.vf_coef * 0.5 * ((value - returns) ** 2).mean() - args.ent_coef * entropy.mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(peer.parameters(), args.max_grad_norm)
                optimizer.step()
        turn(size - dones.sum().item(), sampled - started, time.perf_counter() - sampled)
    envs.close()


class GrayNetwork(nn.Module):
    """EC418's: batch normalization and the Nature CNN on the mean of the newest picture's colours."""

    def __init__(self, outputs):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.BatchNorm2d(1), nn.Conv2d(1, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, outputs)),
        )

    def forward(self, pictures):
        return self.layers(pictures.mean(1, keepdim=True))


class Decision(NamedTuple):
    """What EC418's workers send back of a decision."""

    picture: np.ndarray
    action: np.ndarray
    probability: np.ndarray
    reward: np.ndarray
    next_picture: np.ndarray
    future: np.ndarray


class Policy:
    """The actor, mixed with uniformly random actions; it travels to every worker with every order."""

    def __init__(self, actor, nvec, epsilon):
        self.actor, self.nvec, self.epsilon = actor.eval().cpu(), nvec, epsilon

    def __call__(self, picture):
        with torch.no_grad():
            blocks = self.actor(torch.tensor(picture, dtype=torch.float32)[None]).split(self.nvec, -1)
            distributions = [Categorical(logits=block) for block in blocks]
            action = torch.cat([one.sample() for one in distributions])
            if np.random.rand() < self.epsilon:
                action = torch.tensor([np.random.randint(n) for n in self.nvec])
            probability = joint(distributions, action[None])[0].exp().item()
        return action.numpy(), (1 - self.epsilon) * probability + self.epsilon / math.prod(self.nvec)


class Worker:
    """One game; a Ray actor."""

    def __init__(self, make):
        self.env = make()

    def play(self, policy, gamma, most=500):
        """One episode, and how many decisions it took."""
        picture, episode = self.env.reset()[0][-3:].copy(), []
        for _ in range(most):
            action, probability = policy(picture)
            obs, reward, terminated, truncated, _ = self.env.step(action)
            following = obs[-3:].copy()
            scalars = (np.float32([value]) for value in (probability, reward))
            episode.append(Decision(picture, np.uint8(action), *scalars, following, np.float32([np.nan])))
            picture = following
            if terminated or truncated:
                break
        future = np.float32([0.0])
        for t in reversed(range(len(episode))):
            future = episode[t].reward + np.float32(gamma) * future
            episode[t] = episode[t]._replace(future=future)
        return episode[4:], len(episode)


class Replay:
    """The newest decisions, in a ring."""

    def __init__(self, capacity):
        self.capacity, self.count, self.columns = capacity, 0, {}

    def add(self, decision):
        for name, value in decision._asdict().items():
            if name not in self.columns:
                self.columns[name] = np.zeros((self.capacity, *value.shape), value.dtype)
            self.columns[name][self.count % self.capacity] = value
        self.count += 1

    def draw(self, rows):
        chosen = np.random.choice(min(self.count, self.capacity), rows)
        return Decision(*(column[chosen] for column in self.columns.values()))


def play_ec418(args, agent, settings, turn):
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=args.num_envs, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    device, nvec = torch.device(args.device), agent.nvec
    actor, critic = GrayNetwork(sum(nvec)).to(device), GrayNetwork(1).to(device)
    optimizers = [torch.optim.Adam(network.parameters(), lr=args.learning_rate) for network in (actor, critic)]
    workers = [ray.remote(num_cpus=1)(Worker).remote(make_env(args)) for _ in range(args.num_envs)]
    replay, iterations = Replay(2 * settings.ec418_decisions), settings.iterations + 1
    for iteration in range(iterations):
        started, policy, played, kept = time.perf_counter(), Policy(actor, nvec, 0.1 * (1 - iteration / 100)), 0, 0
        while kept <= settings.ec418_decisions:
            for episode, decisions in ray.get([worker.play.remote(policy, args.gamma) for worker in workers]):
                played, kept = played + decisions, kept + len(episode)
                for decision in episode:
                    replay.add(decision)
        sampled = time.perf_counter()

        actor.to(device).train()
        critic.train()
        for _ in range(100):
            data = replay.draw(512)
            pictures = torch.tensor(data.picture, dtype=torch.float32, device=device)
            actions = torch.tensor(data.action, dtype=torch.int64, device=device)
            before, futures = (torch.tensor(x, device=device).squeeze(-1) for x in (data.probability, data.future))
            distributions = [Categorical(logits=block) for block in actor(pictures).split(nvec, -1)]
            logprobs, entropy = joint(distributions, actions)
            ratio, values = logprobs.exp() / before, critic(pictures).squeeze(-1)
            advantages = futures - critic(pictures).squeeze(-1)
            advantages = ((advantages - advantages.mean()) / (advantages.std() + 1e-7)).detach()
            limited = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            objective = torch.min(ratio * advantages, limited * advantages) + args.ent_coef * entropy
            for loss, optimizer in zip((-objective.mean(), ((values - futures) ** 2).mean()), optimizers, strict=True):
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        turn(played, sampled - started, time.perf_counter() - sampled)
    ray.shutdown()


PLAY = {"ours": play_ours, "sb3": play_sb3, "cleanrl": play_cleanrl, "ec418": play_ec418}


# ---------------------------------------------------------------------------------------------------------------------
# Turns


def installed(package):
    """Version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(peer):
    """Environment variables of a peer's process. Ours sets for itself what `:tuned` does."""
    plain = {key: value for key, value in os.environ.items() if key not in TUNED}
    tuned = TUNED if peer == "ours" or peer.endswith(":tuned") else {}
    return plain | tuned | {"PYTHONPATH": str(ROOT)}  # for Ray's workers


def play_turn(settings):
    """One turn in this process; the last line that it prints holds its figures."""
    torch.set_num_threads(settings.threads)
    np.random.seed(settings.seed)
    iterations = settings.iterations + 1
    args, turn = make_args(settings, iterations, settings.seed), Turn(iterations)
    PLAY[settings.turn.split(":")[0]](args, make_agent(args, settings.checkpoint), settings, turn)
    print(json.dumps(turn.figures()), flush=True)


def as_flags(settings, without):
    """Settings as a command line, but for some of them."""
    plain = {key: value for key, value in dataclasses.asdict(settings).items() if key not in without}
    pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in plain.items() if value is not None]
    return [word for pair in pairs for word in pair]


def main(settings):
    peers = []
    for peer in settings.peers:
        needed = NEEDS.get(peer.split(":")[0])
        if needed and not installed(needed):
            print(f"{peer} is left out: {needed} is not installed, see tests/bench/requirements.txt")
        else:
            peers.append(peer)
    if not peers:
        sys.exit("Nobody is left to measure.")
    adopt_orphans()
    turns = {peer: [] for peer in peers}
    for number in range(settings.rounds):
        for peer in peers[number % len(peers) :] + peers[: number % len(peers)]:  # none is always the first
            command = [sys.executable, __file__, "--turn", peer, *as_flags(settings, ("peers", "turn", "out"))]
            turns[peer].append(run_turn(command, environment(peer)))
            print(f"round {number + 1}, {peer}: {turns[peer][-1]['rate']:.0f} decisions/s", flush=True)

        table = {peer: summarize(rows, turns.get("ours")) for peer, rows in turns.items()}
        if settings.out:
            write(settings, table, turns)
    print_table(settings, table)


def write(settings, table, turns):
    args = make_args(settings, settings.iterations + 1, settings.seed)
    result = {
        "table": table,
        "turns": turns,
        "settings": plain_settings(settings),
        "hyperparameters": ppo_tuxkart.args_to_plain(args),
        "setting": ppo_tuxkart.describe_setting(args),
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "versions": {name: installed(name) for name in ("torch", "gymnasium", "stable-baselines3", "ray")},
    }
    settings.out.write_text(json.dumps(result, indent=1) + "\n")


def summarize(rows, ours):
    """Medians over a peer's turns, and of the rounds' own ratios of our rate to its."""
    figures = {
        "rate": [one["rate"] for one in rows],
        "sampling_rate": [one["sampling_rate"] for one in rows],
        "learning_ms": [one["learning_ms"] for one in rows],
        "learner_cpu_ms": [one["cpu_ms"]["learner"] for one in rows],
        "games_cpu_ms": [one["cpu_ms"]["games"] for one in rows],
        "memory_mb": [sum(one["memory_mb"].values()) for one in rows],
    }
    if ours:
        figures["ours_is"] = [mine["rate"] / other["rate"] for mine, other in zip(ours, rows, strict=True)]
    return {key: statistics.median(values) for key, values in figures.items()}


def print_table(settings, table):
    columns = {
        "rate": ("decisions/s", "{:.0f}"),
        "ours_is": ("ours is", "{:.2f} times"),
        "sampling_rate": ("sampling/s", "{:.0f}"),
        "learning_ms": ("learning", "{:.2f} ms"),
        "learner_cpu_ms": ("CPU: learner", "{:.2f} ms"),
        "games_cpu_ms": ("CPU: the rest", "{:.2f} ms"),
        "memory_mb": ("memory", "{:.0f} MB"),
    }
    print(f"\n{settings.num_envs} games, {settings.threads} threads, medians of {settings.rounds} turns, ms a decision")
    print_rows(columns, table)


if __name__ == "__main__":
    chosen = tyro.cli(Peers, description=__doc__)
    play_turn(chosen) if chosen.turn else main(chosen)
