"""What a night of training brings: games that die or hang, numbers that are none, full disks, foreign files, ranks."""

import contextlib
import faulthandler
import functools
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.multiprocessing
from conftest import ROOT, SIGKILL, alive, children, command, lines_of, metrics, run, start_and_signal, wait_for
from test_worldmodel import SMALL as CAR

import ppo_tuxkart
import ppo_tuxkart_resnet

SMALL = ("--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2, "--epochs", 1, "--eval-interval", 0)


@pytest.fixture
def games():
    faulthandler.disable()  # the games inherit it, and what it writes about one that is killed would fill the log
    opened = ppo_tuxkart.Games([functools.partial(ppo_tuxkart.TuxKartEnv, random_start=0.5, max_seconds=5.0)] * 2)
    opened.ask("reset", {i: {"seed": 7 + i} for i in range(2)})
    yield opened
    opened.close()
    faulthandler.enable(sys.__stderr__)


def actions(count):
    generator = np.random.default_rng(0)
    return [[[int(generator.integers(n)) for n in (5, 3, 2, 2)] for _ in range(2)] for _ in range(count)]


def test_games_play_as_gymnasiums_async_vector_env(games):
    """The same pictures, rewards, ends and infos, over several episodes."""
    envs = gym.vector.AsyncVectorEnv(games.make_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    try:
        np.testing.assert_array_equal(envs.reset(seed=[7, 8])[0], games.newest)
        ends = 0
        for action in actions(80):
            obs, rewards, terminations, truncations, infos = envs.step(np.array(action))
            ours = games.ask("step", dict(enumerate(action)))
            np.testing.assert_array_equal(games.newest, obs)
            for i, (reward, terminated, truncated, info) in ours.items():
                assert (reward, terminated, truncated) == (rewards[i], terminations[i], truncations[i])
                if terminated or truncated:
                    ends += 1
                    np.testing.assert_array_equal(games.last[i], infos["final_obs"][i])
                    assert info["progress"] == infos["final_info"]["progress"][i]
                    assert info["end"] == infos["final_info"]["end"][i]
        assert ends >= 4
    finally:
        envs.close(terminate=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV])
def test_a_game_that_dies_or_hangs_is_replaced_and_the_other_plays_on(games, number):
    games.timeout = 5.0
    before, victim, other = None, games.processes[0].pid, games.processes[1].pid
    games.set("max_seconds", 60.0)
    for step, action in enumerate(actions(24)):
        if step == 12:
            before = games.newest[0].copy()
            os.kill(victim, number)
        answers = games.ask("step", dict(enumerate(action)))
        if step == 12:
            assert answers[0] == (0.0, False, True, None)  # cut short, with no result
            np.testing.assert_array_equal(games.last[0], before)
            assert not np.array_equal(games.newest[0], before)  # a new episode
        else:
            assert math.isfinite(answers[0][0])
    assert games.lost == 1 and games.processes[1].pid == other and not alive([victim])
    assert games.get("max_seconds") == [60.0, 60.0]  # the new one knows what the old one was told
    games.close()
    assert not alive([process.pid for process in games.processes])

    alone = ppo_tuxkart.Games(games.make_envs[1:])
    alone.ask("reset", {0: {"seed": 8}})
    alone.set("max_seconds", 60.0)
    for action in actions(24):
        alone.ask("step", {0: action[1]})
    np.testing.assert_array_equal(alone.newest[0], games.newest[1])  # as if its neighbour had lived
    alone.close()


class Doomed(ppo_tuxkart.TuxKartEnv):
    def step(self, action):
        os.kill(os.getpid(), signal.SIGKILL)


class Mistaken(ppo_tuxkart.TuxKartEnv):
    def step(self, action):
        raise ValueError("a mistake in my reward")


@pytest.mark.parametrize("env, why", [(Doomed, "exit code -9"), (Mistaken, "ValueError: a mistake in my reward")])
def test_a_game_that_is_lost_again_and_again_stops_the_run(env, why):
    games = ppo_tuxkart.Games([env])
    try:
        games.ask("reset", {0: {"seed": 1}})
        with pytest.raises(ppo_tuxkart.RunError, match=f"lost 4 times in a row; the last one .*{why}"):
            for _ in range(10):
                games.ask("step", {0: [2, 0, 0, 0]})
    finally:
        games.close()
    assert not alive([process.pid for process in games.processes])


def test_training_goes_on_when_a_game_is_killed(tmp_path):
    folder = tmp_path / "runs" / "hurt"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")  # all that is left of a run that was killed in its first iteration
    settings = [*SMALL, "--total-timesteps", 12 * 32, "--name", "hurt"]
    process, output, games = start_and_signal(SIGKILL, 3, folder, *settings, cwd=tmp_path, game=True)
    assert process.returncode == 0 and "Traceback" not in output, output
    rows = metrics(folder)
    assert [row["iteration"] for row in rows] == list(range(1, 13))
    assert rows[1]["charts/lost_games"] == 0 and rows[-1]["charts/lost_games"] == 1
    assert not alive(games)


NEW_GAMES = """
import os, signal, time, ppo_tuxkart
games = ppo_tuxkart.Games([ppo_tuxkart.TuxKartEnv] * 2)
time.sleep(1)
for process in games.processes:
    os.kill(process.pid, signal.SIGINT)
print(*(process.pid for process in games.processes), games.get("num_karts"), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_games_that_were_not_used_yet_leave_ctrl_c_to_their_parent_and_die_with_it():
    finished = subprocess.run([sys.executable, "-c", NEW_GAMES], cwd=ROOT, capture_output=True, text=True, timeout=60)
    *pids, karts = finished.stdout.split(maxsplit=2)
    assert finished.returncode == -SIGKILL and not finished.stderr and karts.strip() == "[1, 1]"
    assert not alive([int(pid) for pid in pids])


def test_an_evaluation_race_whose_game_dies_is_raced_anew():
    games = ppo_tuxkart.Games([functools.partial(ppo_tuxkart.TuxKartEnv, max_seconds=3.0)] * 2)
    steps = 0

    def policy(obs):
        nonlocal steps
        steps += 1
        if steps == 8:
            os.kill(games.processes[1].pid, signal.SIGKILL)
        return np.tile([2, 0, 0, 0], (len(obs), 1))

    try:
        races = ppo_tuxkart.run_races(games, policy, [1, 2, 3], keep_frames=3)
    finally:
        games.close()
    assert games.lost == 1 and [race["seed"] for race in races] == [1, 2, 3]
    assert all(race["seconds"] >= 3.0 and len(race["frames"]) == len(race["trail"]) for race in races)


def tiny_batch(size=32):
    torch.manual_seed(1)
    agent = ppo_tuxkart.Agent((3, 36, 36), [3, 2])
    batch = {"obs": torch.randint(0, 256, (size, 3, 36, 36), dtype=torch.uint8)}
    batch |= {"actions": torch.stack([torch.randint(0, 3, (size,)), torch.randint(0, 2, (size,))], -1)}
    batch |= {key: torch.randn(size) for key in ("logprobs", "values", "advantages", "returns")}
    return agent, torch.optim.Adam(agent.parameters(), lr=1e-3), batch


UPDATE = ppo_tuxkart.Args(num_minibatches=1, epochs=2, target_kl=10.0)


@pytest.mark.parametrize("key, value", [("advantages", math.inf), ("returns", math.inf), ("logprobs", math.nan)])
def test_a_loss_that_is_no_number_stops_before_it_is_learnt(key, value):
    agent, optimizer, batch = tiny_batch()
    before = {name: weights.clone() for name, weights in agent.state_dict().items()}
    batch[key][3] = value
    with pytest.raises(ppo_tuxkart.RunError, match="not a finite number"):
        ppo_tuxkart.ppo_update(agent, optimizer, batch, UPDATE)
    assert all(torch.equal(weights, before[name]) for name, weights in agent.state_dict().items())


def test_a_reward_that_is_no_number_stops_the_run(monkeypatch):
    monkeypatch.setitem(ppo_tuxkart.REWARDS, "progress", lambda moment: math.nan)
    args = ppo_tuxkart.Args(num_envs=1, num_steps=4)
    sampler = ppo_tuxkart.Sampler(args, torch.device("cpu"))
    try:
        sampler.reset(1)
        with pytest.raises(ppo_tuxkart.RunError, match="reward nan is not a finite number"):
            sampler.collect(ppo_tuxkart.Agent((6, 64, 64), [5, 3, 2, 2]))
    finally:
        sampler.close()


def run_on_a_full_disk(*args, cwd):
    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))  # a checkpoint is larger

    return run(*args, cwd=cwd, preexec_fn=limit_files)


def test_a_full_disk_a_locked_and_a_vanished_folder_are_one_sentence(tmp_path):
    folder = tmp_path / "runs" / "full"
    settings = [*SMALL, "--total-timesteps", 64, "--name", "full"]
    assert run(*settings, cwd=tmp_path).returncode == 0
    (folder / "last.pt").rename(tmp_path / "whole.pt")
    stopped = run_on_a_full_disk(*settings[:-1], "new", cwd=tmp_path)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    assert "runs/new" in stopped.stderr and "nothing was saved yet" in stopped.stderr
    assert not list((tmp_path / "runs" / "new").glob("*.pt")) and not list((tmp_path / "runs" / "new").glob("*.tmp"))

    (tmp_path / "whole.pt").rename(folder / "last.pt")
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    checkpoint["args"]["total_timesteps"] = 128  # there is more to do
    torch.save(checkpoint, folder / "last.pt")
    before = (folder / "last.pt").read_bytes()
    stopped = run_on_a_full_disk("--resume", folder, cwd=tmp_path)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    assert f"--resume {folder}" in stopped.stderr.splitlines()[-1]
    assert (folder / "last.pt").read_bytes() == before and not list(folder.glob("*.tmp"))

    lock = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    locked = ["unshare", "--mount", "sh", "-c", lock, folder]
    if subprocess.run([*locked, "true"], capture_output=True).returncode == 0:  # it takes root
        files = sorted(folder.iterdir())
        stopped = run("--resume", folder, cwd=tmp_path, before=locked)
        assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
        assert "Read-only file system" in stopped.stderr.splitlines()[-1]
        assert (folder / "last.pt").read_bytes() == before and sorted(folder.iterdir()) == files

    process = subprocess.Popen(
        command("ppo_tuxkart", *SMALL, "--total-timesteps", 100_000, "--name", "gone"),
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    gone = tmp_path / "runs" / "gone"
    wait_for(lambda: (gone / "last.pt").exists(), process)
    games = children(process.pid)
    gone.rename(tmp_path / "runs" / "elsewhere")
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "Traceback" not in errors and "No such file" in errors.splitlines()[-1]
    assert torch.load(tmp_path / "runs" / "elsewhere" / "last.pt", weights_only=True)["iteration"] >= 1
    assert len(games) == 2 and not alive(games)


def test_a_line_that_a_full_disk_cut_off_is_dropped(tmp_path):
    rows = [json.dumps({"iteration": n, "charts/SPS": 1.0}) for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"iteration": 2, "char')
    logger = ppo_tuxkart.Logger(tmp_path, ppo_tuxkart.Args(), 2, 64)
    logger.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == rows[:2]


# --- ranks


def deep_batch(size=32):
    """The same for ppo_tuxkart_resnet.py, with random bursts, of which every rank gets another number."""
    torch.manual_seed(1)
    agent = ppo_tuxkart_resnet.Agent((3, 36, 36), [3, 2], "impala", 4, 1, "lstm")
    batch = {"obs": torch.randint(0, 256, (8, size // 8, 3, 36, 36), dtype=torch.uint8)}
    batch |= {"actions": torch.stack([torch.randint(0, n, (8, size // 8)) for n in (3, 2)], -1)}
    batch |= {key: torch.randn(8, size // 8) for key in ("logprobs", "values", "advantages", "returns")}
    batch |= {"starts": torch.rand(8, size // 8) < 0.2, "own": torch.rand(8, size // 8) < 0.7}
    batch |= {"state": torch.randn(size // 8, agent.state_size)}
    return agent, torch.optim.Adam(agent.parameters(), lr=1e-3), batch


def update_as_rank(rank, world, port, folder, deep):
    agent, optimizer, batch = deep_batch() if deep else tiny_batch()
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    if deep:  # every rank has some of the environments
        share = {key: value.chunk(world, 0 if key == "state" else 1)[rank] for key, value in batch.items()}
        args = ppo_tuxkart_resnet.Args(num_minibatches=1, epochs=2, target_kl=10.0)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        scalars = ppo_tuxkart_resnet.ppo_update(agent, optimizer, scaler, share, args)
    else:
        share = {key: value.chunk(world)[rank] for key, value in batch.items()}
        scalars = ppo_tuxkart.ppo_update(agent, optimizer, share, UPDATE)
    torch.save({"agent": agent.state_dict(), "scalars": scalars}, folder / f"{world}-{rank}.pt")


@pytest.mark.parametrize("deep", [False, True], ids=["ppo_tuxkart", "ppo_tuxkart_resnet"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_take_the_steps_of_one(world, deep, tmp_path):
    """Several ranks, each with its share of the batch, against one process with all of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    update_as_rank(0, 1, port, tmp_path, deep)
    torch.multiprocessing.spawn(update_as_rank, (world, port, tmp_path, deep), nprocs=world)
    one = torch.load(tmp_path / "1-0.pt", weights_only=True)
    start = (deep_batch() if deep else tiny_batch())[0].state_dict()
    for rank in range(world):
        mine = torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=True)
        for name, weights in one["agent"].items():
            torch.testing.assert_close(mine["agent"][name], weights, atol=2e-6, rtol=1e-5)
            assert "bias" in name or not torch.allclose(start[name], weights, atol=1e-4)
        for name in ("losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl"):
            assert mine["scalars"][name] == pytest.approx(one["scalars"][name], abs=1e-5)


def torchrun(*args):
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2", "--monitor-interval", "1"]
    return [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "ppo_tuxkart.py"), *map(str, args)]


def test_torchrun_restarts_from_the_last_checkpoint_when_a_rank_is_killed(tmp_path):
    folder = tmp_path / "runs" / "many"
    settings = ["--num-envs", 1, *SMALL[2:], "--total-timesteps", 10 * 32, "--random-start", 0.5, "--name", "many"]
    process = subprocess.Popen(
        torchrun(*settings), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    rows = folder / "metrics.jsonl"
    wait_for(lambda: lines_of(rows) >= 3, process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], SIGKILL)
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output
    rows = metrics(folder)
    assert [row["iteration"] for row in rows] == list(range(1, 11))
    assert rows[-1]["global_step"] == 320 and "driving the games back" in output
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    assert len(checkpoint["ranks"]) == 2 and len({str(own["rng"].tolist()) for own in checkpoint["ranks"]}) == 2
    refused = run("--resume", folder, cwd=tmp_path)
    assert refused.returncode == 2 and "torchrun --nproc-per-node 2" in refused.stderr


# --- privacy


def internet_sockets(pid):
    """The process's TCP and UDP sockets, by Linux's /proc; none once it has ended."""
    inodes, lines = set(), []
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        with contextlib.suppress(OSError):
            lines += Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]
    return [line for line in lines if line.split()[9] in inodes]


WHOLE_RUNS = {"ppo_tuxkart": [*SMALL, "--total-timesteps", 64], "ppo_tuxkart_resnet": [*SMALL, "--total-timesteps", 64]}
WHOLE_RUNS |= {"worldmodel_carracing": [*CAR, "--rounds", 1, "--workers", 2]}


@pytest.mark.parametrize("script", WHOLE_RUNS)
def test_nothing_listens_and_nothing_leaves_the_machine(script, tmp_path):
    process = subprocess.Popen(
        command(script, *WHOLE_RUNS[script]), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        seen, most, deadline = [], 0, time.monotonic() + 600
        while process.poll() is None:
            assert time.monotonic() < deadline
            workers = children(process.pid)
            seen += [line for pid in (process.pid, *workers) for line in internet_sockets(pid)]
            most = max(most, len(workers))
            time.sleep(0.02)
        assert process.returncode == 0 and most >= 2 and not seen
    finally:
        process.kill()
        process.wait()
    with socket.create_server(("127.0.0.1", 0)):  # the watch sees what there is
        assert internet_sockets(os.getpid())
