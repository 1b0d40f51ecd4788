"""Other people's PPO on the same game: how fast they are, and what they learn.

    python bench/peers.py --init-from pretrained/scotland.pt              # speed
    python bench/peers.py --peers ours sb3:tuned --iterations 77          # learning, 160 k decisions
    python bench/peers.py --peers sb3:tuned --iterations 731 --race-every 32 --minutes 80 --rounds 1

Every peer trains on `TuxKart-v0` with the same number of games, the hyperparameters of
`ppo_tuxkart.Args`, and the same network from the same weights. They take turns, each in a process
of its own that ends, with all its games, before the next one starts. Every round has a seed of its
own. An iteration warms up; the others count.

    ours     `rollout`, `compute_gae` and `ppo_update` of ppo_tuxkart.py, as its own loop has them
    sb3      Stable-Baselines3's PPO with CnnPolicy on SubprocVecEnv, both as they come
    cleanrl  a loop in the manner of CleanRL's ppo_atari: AsyncVectorEnv with its defaults,
             float32 pictures. The step after an episode's end only resets; it is learnt from, but
             not counted here

`:tuned` gives a peer what ppo_tuxkart.py does for itself: threads that do not spin, and freed memory
that is kept. The table gives medians over the rounds: speed, CPU time of the learner's process and of
all that it started, memory, and what the last 100 races from the start line did. The file holds every
iteration.

`--race-every` has greedy races after so many iterations, as ppo_tuxkart.py's own evaluations are, with
the minutes since the turn began, races included. With `--turn` in the place of `--peers` they are
printed as they come. `--minutes` ends a turn of sb3 early; its step size falls as if it went on.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import common
import gymnasium as gym
import numpy as np
import psutil
import torch
import tyro
from torch import Tensor
from torch.distributions import Categorical

import ppo_tuxkart

Peer = Literal["ours", "sb3", "sb3:tuned", "cleanrl", "cleanrl:tuned"]
KEPT = str(1 << 30)  # bytes; `keep_freed_memory` asks the same of the C library
TUNED = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": KEPT, "MALLOC_TRIM_THRESHOLD_": KEPT}


@dataclasses.dataclass
class Peers:
    peers: tuple[Peer, ...] = get_args(Peer)  # who takes part
    rounds: int = 3  # turns of each
    iterations: int = 3  # measured iterations a turn, after one that warms up
    num_envs: int = 16  # games
    num_steps: int = 128  # decisions per game and iteration
    threads: int = len(os.sched_getaffinity(0))  # threads that torch may use
    track: str = "scotland"  # track to drive
    engine: Literal["auto", "pystk", "pystk2"] = "auto"  # game bindings
    device: Literal["cpu", "cuda"] = "cpu"  # where the networks learn
    init_from: Path | None = None  # weights to begin with; an untrained kart's episodes are short
    race_every: int = 0  # iterations between greedy races; 0 for none
    minutes: float = float("inf")  # after which a turn of sb3 ends
    seed: int = 1  # seed of the first round
    turn: Peer | None = None  # one turn of this peer, in this process
    out: Path | None = None  # JSON file to write


class Turn:
    """Keeps a turn's figures. A peer calls it after every iteration, while its games are alive."""

    def __init__(self, settings: Peers, args: ppo_tuxkart.Args) -> None:
        self.settings = settings
        self.args = args
        self.began = time.perf_counter()
        self.rows: list[dict] = []
        self.recent: deque[dict] = deque(maxlen=100)

    def __call__(self, decisions: int, sampling: float, learning: float, episodes: list[dict], agent: Any) -> None:
        """decisions, seconds of sampling and of learning, last infos of episodes that ended, who learns."""
        self.recent.extend(episode for episode in episodes if episode["from_line"])
        row: dict[str, Any] = {"decisions": decisions, "sampling": sampling, "learning": learning}
        for name in ("return", "progress", "finished") if self.recent else ():
            row[name] = float(np.mean([episode[name] for episode in self.recent]))
        learner, games = [psutil.Process()], common.descendants(os.getpid())
        row["cpu"] = {"learner": common.cpu_seconds(learner), "games": common.cpu_seconds(games)}
        if not self.rows:
            row["memory"] = common.megabytes([*learner, *games])
        self.rows.append(row)
        if self.settings.race_every and len(self.rows) % self.settings.race_every == 0:
            first = self.args.eval_seed + 10_000  # as `exam` has it
            seeds = list(range(first, first + self.args.eval_episodes))
            races = ppo_tuxkart.summarize(ppo_tuxkart.race_all(self.args, agent, seeds))
            row["races"] = {name: races[name] for name in ("finished", "median", "progress")}
            row["races"]["minutes"] = (time.perf_counter() - self.began) / 60
            print(sum(row["decisions"] for row in self.rows), row["races"], file=sys.stderr, flush=True)

    def figures(self) -> dict[str, Any]:
        """Of all iterations but the first, which has warmed up; minutes are those of all."""
        first, *warm = self.rows
        total = {name: sum(row[name] for row in warm) for name in ("decisions", "sampling", "learning")}
        seconds = total["sampling"] + total["learning"]
        used = {party: warm[-1]["cpu"][party] - first["cpu"][party] for party in first["cpu"]}
        return {
            "decisions/s": total["decisions"] / seconds,
            "sampling/s": total["decisions"] / total["sampling"],
            "learning ms": 1000 * total["learning"] / total["decisions"],
            **{f"{party} CPU ms": 1000 * cpu / total["decisions"] for party, cpu in used.items()},
            "MB": first["memory"],
            "minutes": (first["sampling"] + first["learning"] + seconds) / 60,
            **{name: warm[-1].get(name, 0.0) for name in ("return", "progress", "finished")},
            "iterations": self.rows,
        }


def make_game(args: ppo_tuxkart.Args) -> Callable[[], gym.Env]:
    """A function that makes the game, as somebody would who only imports the file."""
    settings = {"track": args.track[0], "engine": args.engine, "random_start": args.random_start}
    return lambda: gym.make("ppo_tuxkart:TuxKart-v0", **settings)


# --- The peers ---


def play_ours(args: ppo_tuxkart.Args, agent: Any, turn: Turn) -> None:
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    envs = ppo_tuxkart.make_envs(args, args.num_envs)
    now = ppo_tuxkart.reset_games(envs, range(args.seed, args.seed + args.num_envs))
    size = args.num_envs * args.num_steps
    iterations = args.total_timesteps // size
    for iteration in range(iterations):
        started = time.perf_counter()
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / iterations)
        data, now, episodes = ppo_tuxkart.rollout(envs, agent, now, args.num_steps)
        sampled = time.perf_counter()
        data["advantages"] = ppo_tuxkart.compute_gae(data, args.gamma, args.gae_lambda)
        data["returns"] = data["advantages"] + data["values"]
        batch = {name: values.flatten(0, 1) for name, values in data.items()}
        ppo_tuxkart.ppo_update(agent, optimizer, batch, args)
        turn(size, sampled - started, time.perf_counter() - sampled, episodes, agent)
    ppo_tuxkart.end_games(envs)


def play_sb3(args: ppo_tuxkart.Args, agent: Any, turn: Turn) -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import SubprocVecEnv

    size = args.num_envs * args.num_steps
    ended: list[dict] = []

    class Timed(PPO):
        """Times the halves of SB3's own loop."""

        def collect_rollouts(self, *args: Any, **settings: Any) -> bool:
            ended.clear()
            self.started = time.perf_counter()
            going_on = super().collect_rollouts(*args, **settings)
            self.sampled = time.perf_counter()
            return going_on

        def train(self) -> None:
            super().train()
            learning = time.perf_counter() - self.sampled
            for ours, theirs in zip(agent.parameters(), self.policy.parameters(), strict=True):
                ours.data.copy_(theirs.view(ours.shape))
            turn(size, self.sampled - self.started, learning, ended, agent)

    def keep(local: dict, _: dict) -> bool:  # called after every step
        ended.extend(info for info, done in zip(local["infos"], local["dones"], strict=True) if done)
        return time.perf_counter() < turn.began + 60 * turn.settings.minutes

    envs = SubprocVecEnv([make_game(args)] * args.num_envs)
    model = Timed(
        "CnnPolicy",
        envs,
        learning_rate=lambda left: args.learning_rate * (left + size / args.total_timesteps),  # it is one ahead
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
    for ours, theirs in zip(agent.parameters(), model.policy.parameters(), strict=True):  # the same layers
        theirs.data.copy_(ours.view(theirs.shape))
    model.learn(args.total_timesteps, callback=keep)
    envs.close()


def look(agent: Any, pictures: Tensor, actions: Tensor | None = None) -> tuple:
    """The same network in the way of CleanRL: float pictures (B, C, H, W), divided by 255 at every look
    -> actions (B, A), log-probability, entropy, value (B,)."""
    hidden = agent.hidden(agent.convolutions(pictures / 255.0))
    parts = [Categorical(logits=block) for block in agent.policy(hidden).split(agent.nvec, -1)]
    if actions is None:
        actions = torch.stack([part.sample() for part in parts], -1)
    logprobs = [part.log_prob(action) for part, action in zip(parts, actions.unbind(-1), strict=True)]
    entropies = [part.entropy() for part in parts]
    return actions, sum(logprobs), sum(entropies), agent.value(hidden).flatten()


def play_cleanrl(args: ppo_tuxkart.Args, agent: Any, turn: Turn) -> None:
    device = torch.device(args.device)
    envs = gym.vector.AsyncVectorEnv([make_game(args)] * args.num_envs)
    space, shape = envs.single_observation_space, (args.num_steps, args.num_envs)
    agent.to(device, memory_format=torch.contiguous_format)  # ours has its channels last
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    obs = torch.zeros((*shape, *space.shape), device=device)  # type: ignore[misc]
    actions = torch.zeros((*shape, len(agent.nvec)), device=device, dtype=torch.int64)
    logprobs, values, rewards, dones = (torch.zeros(shape, device=device) for _ in range(4))
    picture = torch.tensor(envs.reset(seed=args.seed)[0], dtype=torch.float32, device=device)
    done = torch.zeros(args.num_envs, device=device)
    size = args.num_envs * args.num_steps
    iterations = args.total_timesteps // size
    for iteration in range(iterations):
        started, episodes = time.perf_counter(), []
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / iterations)
        for t in range(args.num_steps):
            obs[t], dones[t] = picture, done
            with torch.no_grad():
                actions[t], logprobs[t], _, values[t] = look(agent, picture)
            picture, reward, terminations, truncations, infos = envs.step(actions[t].cpu().numpy())
            rewards[t] = torch.tensor(reward, device=device)
            picture = torch.tensor(picture, dtype=torch.float32, device=device)
            done = torch.tensor(terminations | truncations, dtype=torch.float32, device=device)
            for i in np.flatnonzero(infos.get("_end", ())):
                episodes.append({name: values[i] for name, values in infos.items() if name[0] != "_"})
        with torch.no_grad():
            following = look(agent, picture)[3]
        going_on = 1 - done  # a time limit counts as the end, as it does there
        advantages, running = torch.zeros_like(rewards), torch.zeros(args.num_envs, device=device)
        for t in reversed(range(args.num_steps)):
            error = rewards[t] + args.gamma * following * going_on - values[t]
            advantages[t] = running = error + args.gamma * args.gae_lambda * going_on * running
            following, going_on = values[t], 1 - dones[t]
        sampled = time.perf_counter()
        data = [part.flatten(0, 1) for part in (obs, actions, logprobs, advantages, advantages + values)]
        for _ in range(args.epochs):
            for rows in np.array_split(np.random.permutation(size), args.num_minibatches):
                cleanrl_step(agent, optimizer, [part[torch.from_numpy(rows)] for part in data], args)
        turn(size - int(dones.sum()), sampled - started, time.perf_counter() - sampled, episodes, agent)
    envs.close()


def cleanrl_step(agent: Any, optimizer: Any, batch: list[Tensor], args: ppo_tuxkart.Args) -> None:
    pictures, actions, before, advantages, returns = batch
    _, logprobs, entropy, values = look(agent, pictures, actions)
    ratio = (logprobs - before).exp()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    limited = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    loss = -torch.min(advantages * ratio, advantages * limited).mean()
    loss += args.vf_coef * 0.5 * ((values - returns) ** 2).mean() - args.ent_coef * entropy.mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()


PLAY = {"ours": play_ours, "sb3": play_sb3, "cleanrl": play_cleanrl}


# --- Turns ---


def play_turn(settings: Peers, peer: str) -> None:
    """One turn in this process; the last line that it prints holds its figures."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    np.random.seed(settings.seed)
    names = ("num_envs", "num_steps", "engine", "device", "seed")
    args = ppo_tuxkart.Args(
        track=(settings.track,),
        total_timesteps=(settings.iterations + 1) * settings.num_envs * settings.num_steps,
        **{name: getattr(settings, name) for name in names},
    )
    checkpoint = ppo_tuxkart.load_checkpoint(settings.init_from) if settings.init_from else None
    agent = ppo_tuxkart.make_agent(args, checkpoint)
    PLAY[peer.split(":")[0]](args, agent, turn := Turn(settings, args))
    print(json.dumps(turn.figures()), flush=True)


def environment(peer: str) -> dict[str, str]:
    """Environment variables of a peer's process. Ours sets for itself what `:tuned` does."""
    variables = {name: value for name, value in os.environ.items() if name not in TUNED}
    variables["PYTHONPATH"] = str(common.ROOT)  # for the games' processes
    return variables | (TUNED if peer == "ours" or peer.endswith(":tuned") else {})


def summarize(turns: dict[str, list[dict]]) -> dict[str, dict]:
    """Medians over a peer's turns, and of the rounds' own ratios of our rate to its."""
    table = {peer: common.medians(rows) for peer, rows in turns.items() if rows}
    for peer, row in table.items():
        pairs = zip(turns.get("ours", []), turns[peer], strict=False)
        ratios = [ours["decisions/s"] / other["decisions/s"] for ours, other in pairs]
        row["ours is"] = statistics.median(ratios) if ratios else None
    return table


def main(settings: Peers) -> None:
    turns: dict[str, list[dict]] = {peer: [] for peer in settings.peers}
    for number, peer in common.in_turns(list(turns), settings.rounds):
        passed = {**vars(settings), "seed": settings.seed + number, "turn": peer}
        words = common.flags(**{key: passed[key] for key in passed.keys() - {"peers", "rounds", "out"}})
        said = common.run([sys.executable, __file__, *words], env=environment(peer))
        turns[peer].append(json.loads(said.splitlines()[-1]))
        print(f"round {number + 1}, {peer}: {turns[peer][-1]['decisions/s']:.0f} decisions/s", flush=True)
        common.write_json(settings.out, settings, {"table": summarize(turns), "turns": turns})
    print(f"\n{settings.num_envs} games, {settings.threads} threads, medians of {settings.rounds} rounds")
    common.print_table(summarize(turns))


if __name__ == "__main__":
    chosen = tyro.cli(Peers, description=__doc__)
    play_turn(chosen, chosen.turn) if chosen.turn else main(chosen)
