"""Learning, stopping, resuming and racing on the real game as a user does it, and what a night of training brings."""

import json
import os
import resource
import signal
import subprocess
import sys

import imageio.v3
import numpy as np
import pytest
import torch
from conftest import INSTALLED, ROOT, Started, alive, metrics, run, slow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SIZE = ("--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2, "--epochs", 1)
SMALL = (*SIZE, "--eval-interval", 0, "--teacher", "none")
OFTEN = "script.FRESH_GAMES = dict.fromkeys(script.FRESH_GAMES, 2)"  # where last.pt is written
SHORT = "script.LAP_SECONDS = 6.0"  # races end early
IMPALA = ("--network", "impala", "--base-channels", 4, "--width", 36, "--height", 36)
TWINS = [pytest.param(f"ppo_tuxkart_{twin}", marks=slow) for twin in ("resnet", "lstm")]


def same_weights(first, second):
    ours, theirs = (torch.load(path, weights_only=True)["agent"] for path in (first, second))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def iteration(folder):
    """The one that a run's last.pt goes on from, 0 if there is none."""
    path = folder / "last.pt"
    return torch.load(path, weights_only=True)["iteration"] if path.exists() else 0


def kill(started, folder):
    """Kills a run in the middle of an iteration, soon after a last.pt; all of its games die."""
    started.wait_for(lambda: iteration(folder) >= 2)
    games = started.games()
    assert started.end(signal.SIGKILL)[0] == -signal.SIGKILL and len(games) >= 2 and not alive(games)
    assert 2 <= iteration(folder) < 8 and iteration(folder) % 2 == 0


@pytest.mark.parametrize("script", ["ppo_tuxkart", *TWINS])
def test_killed_and_resumed_is_the_run_that_never_stopped(script, tmp_path):
    """Killed while its teacher learns and while it learns itself; then number for number, on a CPU."""
    settings = [*(IMPALA if script == "ppo_tuxkart_resnet" else ()), *SMALL, "--seed", 5, "--total-timesteps", 8 * 32]
    where = {"cwd": tmp_path, "script": script}
    teaches = script == "ppo_tuxkart"
    settings += ["--teacher", "learn"] if teaches else []
    whole = run(*settings, "--name", "whole", patch=OFTEN, **where)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "runs" / "killed"
    with Started(*settings, "--name", "killed", patch=OFTEN, **where) as started:
        kill(started, folder / "teacher" if teaches else folder)
    if teaches:
        with Started("--resume", folder, patch=OFTEN, **where) as started:
            kill(started, folder)
    resumed = run("--resume", folder, patch=OFTEN, **where)
    assert resumed.returncode == 0, resumed.stderr
    for part, iterations in [(".", 8), ("teacher", 24)][: 1 + teaches]:
        expected, found = metrics(tmp_path / "runs" / "whole" / part), metrics(folder / part)
        assert list(expected) == list(found) == [32 * n for n in range(1, iterations + 1)]
        assert found == expected
        assert max(row["losses/ratio_error"] for row in found.values()) < 1e-5
        assert same_weights(folder / part / "last.pt", tmp_path / "runs" / "whole" / part / "last.pt")
    assert torch.load(folder / "last.pt", weights_only=True)["args"]["engine"] == INSTALLED[0]  # not auto
    if teaches:  # until four fifths of the run are over
        advised = [row.get("losses/teacher_kl", 0) for row in metrics(folder).values()]
        assert all(0 < kl < 10 for kl in advised[:6]) and advised[7] == 0


def test_ctrl_c_saves_the_last_iteration_and_says_how_to_go_on(tmp_path):
    folder = tmp_path / "runs" / "stopped"
    with Started(*SMALL, "--total-timesteps", 100_000, "--name", "stopped", cwd=tmp_path) as started:
        started.wait_for(lambda: started.decisions() >= 3 * 32)
        games = started.games()
        code, output = started.end(signal.SIGINT)
    assert code == 130 and "Traceback" not in output and "--resume runs/stopped" in output, output
    assert torch.load(folder / "last.pt", weights_only=True)["iteration"] >= 3
    assert len(games) >= 2 and not alive(games)
    again = run(*SMALL, "--name", "stopped", cwd=tmp_path, timeout=180)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "--resume runs/stopped" in again.stderr
    with Started("--resume", folder, cwd=tmp_path) as started:
        started.wait_for(lambda: started.decisions() >= 6 * 32)
        other = run("--resume", folder / "last.pt", cwd=tmp_path, timeout=180)  # the file instead of its folder
        assert other.returncode == 2 and "belongs to a run that goes on" in other.stderr, other.stderr
        code, output = started.end(signal.SIGHUP)
    assert code == 129 and "Traceback" not in output, output


KEYS = """track seeds engine engine_version assets checkpoint iteration greedy sampled ai finished lap_times median
off_track_seconds ratio faster_than_ai step_size difficulty num_karts speed_cap"""


def test_a_short_race_of_weights_that_an_older_script_wrote(tmp_path):
    raced = run("--evaluate", ROOT / "pretrained" / "scotland.pt", "--eval-episodes", 2, cwd=tmp_path, patch=SHORT)
    assert raced.returncode == 0 and "Traceback" not in raced.stderr, raced.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    files = {"evaluation.json", "map.png", "mosaic.mp4", "best_race.mp4"}
    assert {file.name for file in folder.iterdir()} == files
    result = json.loads((folder / "evaluation.json").read_text())
    assert set(KEYS.split()) <= result.keys()
    assert result["track"] == ["scotland"] and result["seeds"] == [1000, 1001] and result["ratio"] is None
    for name in ("greedy", "sampled", "ai"):
        assert name in raced.stdout
        assert result[name]["races"] == 2 and result[name]["ends"] == {"time limit": 2}
        assert 0.05 < result[name]["progress"] < 0.3
    film = imageio.v3.imread(folder / "best_race.mp4")
    assert film.shape[1:] == (480, 640, 3) and len(film) > 100 and film.std() > 20
    assert np.abs(film[-1].astype(int) - film[20]).mean() > 5  # something moves
    mosaic = imageio.v3.imread(folder / "mosaic.mp4")
    assert mosaic.shape[1:] == (128, 256, 3) and mosaic[10].std() > 20


MISTAKE = """
def my_reward(moment):
    print("a print of mine")
    raise ValueError("a mistake of mine")
script.REWARDS["progress"] = my_reward
"""


def test_a_mistake_in_a_reward_is_shown_whole_and_at_once(tmp_path):
    stopped = run(*SMALL, "--total-timesteps", 64, "--name", "mine", cwd=tmp_path, patch=MISTAKE)
    assert stopped.returncode not in (0, 2, 130)
    assert "a mistake of mine" in stopped.stderr and "my_reward" in stopped.stderr, stopped.stderr
    assert "a print of mine" in stopped.stdout
    assert "lost" not in stopped.stderr and stopped.stderr.count("in my_reward") <= 2  # of two games


# --- Slow: learning, other settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Some 10,000 decisions of learning: the working folder and the run's."""
    cwd = tmp_path_factory.mktemp("learning")
    settings = """--teacher none --actions drive --num-envs 8 --num-steps 64 --total-timesteps 10240 --random-start 0.2
        --eval-interval 20 --eval-episodes 2 --seed 2 --name trained"""
    finished = run(*settings.split(), cwd=cwd, patch="script.LAP_SECONDS = 60.0")
    assert finished.returncode == 0, finished.stderr
    return cwd, cwd / "runs" / "trained"


@slow
def test_ten_thousand_decisions_of_learning_help(trained):
    rows = list(metrics(trained[1]).values())
    assert len(rows) == 20 and max(row["losses/ratio_error"] for row in rows) < 1e-5
    for name, gain in (("return", 1.0), ("progress", 0.01)):
        values = [row[f"charts/{name}"] for row in rows if row.get(f"charts/{name}") is not None]
        assert np.mean(values[-5:]) > np.mean(values[:5]) + gain
    charts = "finished learning_rate SPS update_seconds lost_games reward/progress"
    losses = "policy_loss value_loss entropy approx_kl clipfrac explained_variance"
    names = {f"charts/{name}" for name in charts.split()} | {f"losses/{name}" for name in losses.split()}
    board = EventAccumulator(str(trained[1])).Reload()
    assert names | {"eval/finished", "eval/progress", "eval/median"} <= set(board.Tags()["scalars"])
    assert board.Tags()["tensors"] == ["settings/text_summary"] and (trained[1] / "map.png").exists()
    assert len(imageio.v3.imread(trained[1] / "mosaic.mp4")) > 10 and not list(trained[1].glob("*.tmp"))


@slow
def test_a_teacher_of_its_own_and_races_of_one(trained):
    """Learnt by itself, raced beside the AI, filmed, and given to a student on two tracks."""
    cwd, _ = trained
    seen = ("--observe", "state", "--track", "lighthouse", "--num-envs", 2, "--num-steps", 64, "--eval-episodes", 2)
    learnt = run(*seen, "--total-timesteps", 1280, "--name", "teacher", cwd=cwd, patch=SHORT)
    assert learnt.returncode == 0, learnt.stderr
    raced = run("--evaluate", "runs/teacher/last.pt", cwd=cwd, patch=SHORT)
    assert raced.returncode == 0, raced.stderr
    (folder,) = (cwd / "runs").glob("last-lighthouse-*")
    assert {file.name for file in folder.iterdir()} == {"evaluation.json", "map.png", "best_race.mp4"}
    assert imageio.v3.imread(folder / "best_race.mp4").std() > 20
    two = ("--track", "lighthouse", "olivermath", "--teacher", "runs/teacher/last.pt", *SIZE, "--eval-interval", 0)
    student = run(*two, "--total-timesteps", 64, "--name", "student", cwd=cwd)
    assert student.returncode == 0, student.stderr
    rows = metrics(cwd / "runs" / "student")
    assert rows[32]["charts/teaching"] == 1 and 0 < rows[32]["losses/teacher_kl"] < 10
    wrong = run(*two, "--actions", "ec418", cwd=cwd)
    assert wrong.returncode == 2 and "--observe state --actions ec418" in wrong.stderr and wrong.stderr.count("\n") == 1


@slow
def test_weights_begin_another_run_on_several_tracks(trained):
    cwd, folder = trained
    two = ("--track", "lighthouse", "olivermath", *SIZE, "--teacher", "none", "--total-timesteps", 64, "--name", "two")
    races = ("--eval-interval", 2, "--eval-episodes", 2)
    learnt = run("--init-from", folder / "best.pt", *two, *races, cwd=cwd, patch=SHORT)
    assert learnt.returncode == 0, learnt.stderr
    before = torch.load(folder / "best.pt", weights_only=True)["agent"]
    after = torch.load(cwd / "runs" / "two" / "last.pt", weights_only=True)["agent"]
    assert 0 < max((before[name] - after[name]).abs().max().item() for name in before) < 0.05

    one = ("--eval-episodes", 1)
    raced = run("--evaluate", "runs/two/best.pt", *one, cwd=cwd, patch="script.LAP_SECONDS = 25.0")
    assert raced.returncode == 0, raced.stderr
    for track in ("lighthouse", "olivermath"):
        (written,) = (cwd / "runs").glob(f"best-{track}-*/evaluation.json")
        result = json.loads(written.read_text())
        assert result["track"] == [track] and result["greedy"]["races"] == result["ai"]["races"] == 1
        assert (result["ai"]["median"] is None) == (track == "lighthouse")  # which takes longer than that


@slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_every_way_to_start_a_process(method, tmp_path):
    patch = f"import multiprocessing\nmultiprocessing.set_start_method('{method}', force=True)"
    races = ("--eval-interval", 2, "--eval-episodes", 2)
    learnt = run(*SIZE, *races, "--total-timesteps", 64, "--name", method, cwd=tmp_path, patch=patch)
    assert learnt.returncode == 0, learnt.stderr
    folder = tmp_path / "runs" / method
    assert list(metrics(folder)) == [32, 64] and (folder / "mosaic.mp4").exists()


# --- Slow: faults


@slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_game_that_dies_or_hangs_is_counted_and_the_run_goes_on(number, tmp_path):
    settings = (*SMALL, "--total-timesteps", 12 * 32, "--name", "hurt")
    with Started(*settings, cwd=tmp_path, patch="script.SILENCE = 5.0") as started:
        started.wait_for(lambda: started.decisions() >= 2 * 32)
        games = started.games()
        os.kill(games[-1], number)
        code, output = started.end(seconds=200)
    assert code == 0 and "Traceback" not in output and not alive(games), output
    rows = metrics(tmp_path / "runs" / "hurt")
    assert list(rows) == [32 * n for n in range(1, 13)]
    assert rows[32]["charts/lost_games"] == 0 and rows[12 * 32]["charts/lost_games"] == 1


ENDS = {
    "import os\nscript.TuxKartEnv.step = lambda *_: os._exit(1)": "Games were lost 3 times in a row",
    "script.REWARDS['progress'] = lambda moment: float('nan')": "inite gradient: look at --reward",
}


@slow
@pytest.mark.parametrize("patch", ENDS)
def test_what_ends_a_run_is_one_sentence(patch, tmp_path):
    stopped = run(*SMALL, "--total-timesteps", 64, cwd=tmp_path, patch=patch)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr, stopped.stderr
    assert ENDS[patch] in stopped.stderr.splitlines()[-1]


@slow
def test_a_full_disk_is_named(tmp_path):
    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))  # a checkpoint is larger

    stopped = run(*SMALL, "--total-timesteps", 64, cwd=tmp_path, preexec_fn=limit_files)
    assert stopped.returncode == 1 and "File too large" in stopped.stderr.splitlines()[-1], stopped.stderr
    assert not list((tmp_path / "runs").glob("*/last.pt"))


WATCHED = """
import os, torch, ppo_tuxkart as script

def watched(agent, optimizer, batch, args, update=script.ppo_update):
    before = [weights.clone() for weights in agent.parameters()]
    scalars = update(agent, optimizer, batch, args)
    found = before, list(agent.parameters()), batch["obs"].float().mean()
    torch.save(found, f"rank{os.environ['RANK']}.pt")
    return scalars

script.ppo_update = watched
script.main()
"""


@slow
def test_torchrun_with_two_ranks_learns_the_same_weights_on_both(tmp_path):
    (tmp_path / "watched.py").write_text(WATCHED)
    words = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 watched.py --num-envs 1".split()
    words = [sys.executable, *words, *map(str, SMALL[2:]), "--total-timesteps", str(6 * 32), "--name", "many"]
    finished = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert finished.returncode == 0, finished.stderr
    (before, ours, seen), (_, theirs, others) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, ours, strict=True)) and seen != others
    last = (tmp_path / "runs" / "many" / "last.pt").read_bytes()
    refused = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert refused.returncode == 1 and "There is a run runs/many" in refused.stderr, refused.stderr
    assert last == (tmp_path / "runs" / "many" / "last.pt").read_bytes()
    rows = metrics(tmp_path / "runs" / "many")
    assert list(rows) == [32 * n for n in range(1, 7)]
    assert max(row["losses/ratio_error"] for row in rows.values()) < 1e-5
