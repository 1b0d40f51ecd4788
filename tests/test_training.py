"""Learning, stopping, resuming and racing on the real game as a user does it, and what a night of training brings."""

import json
import math
import os
import resource
import signal
import subprocess
import sys

import imageio.v3
import numpy as np
import pytest
import torch
from conftest import ROOT, Started, alive, metrics, run, slow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SIZE = ("--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2, "--epochs", 1)
SMALL = (*SIZE, "--eval-interval", 0)
OFTEN = "script.FRESH_GAMES = 2"  # iterations between fresh games, where last.pt is written
SHORT = "script.LAP_SECONDS = 6.0"  # races end early
SCRIPTS = {
    "ppo_tuxkart": (),
    "ppo_tuxkart_resnet": ("--network", "impala", "--base-channels", 4, "--width", 36, "--height", 36),
}


def same_weights(first, second):
    ours, theirs = (torch.load(path, weights_only=True)["agent"] for path in (first, second))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_resumed_is_the_run_that_never_stopped(script, tmp_path):
    """Killed in the middle of an iteration, all of its games die; then number for number, on a CPU."""
    settings, where = [*SCRIPTS[script], *SMALL, "--seed", 5], {"cwd": tmp_path, "script": script}
    total = ("--total-timesteps", 8 * 32)
    whole = run(*settings, *total, "--name", "whole", patch=OFTEN, **where)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "runs" / "killed"
    with Started(*settings, *total, "--name", "killed", patch=OFTEN, **where) as started:
        started.wait_for((folder / "last.pt").exists)
        started.wait_for(lambda: started.decisions() >= 3 * 32)
        games = started.games()
        assert started.end(signal.SIGKILL)[0] == -signal.SIGKILL and len(games) >= 2 and not alive(games)
    kept = torch.load(folder / "last.pt", weights_only=True)["iteration"]
    assert 2 <= kept < 8 and kept % 2 == 0
    resumed = run("--resume", folder, patch=OFTEN, **where)
    assert resumed.returncode == 0, resumed.stderr
    expected, found = metrics(tmp_path / "runs" / "whole"), metrics(folder)
    assert list(expected) == list(found) == [32 * n for n in range(1, 9)]
    assert found == expected
    assert max(row["losses/ratio_error"] for row in found.values()) < 1e-5
    assert same_weights(folder / "last.pt", tmp_path / "runs" / "whole" / "last.pt")


def test_ctrl_c_saves_the_last_iteration_and_says_how_to_go_on(tmp_path):
    folder = tmp_path / "runs" / "stopped"
    with Started(*SMALL, "--total-timesteps", 100_000, "--name", "stopped", cwd=tmp_path) as started:
        started.wait_for(lambda: started.decisions() >= 3 * 32)
        games = started.games()
        code, output = started.end(signal.SIGINT)
    assert code == 130 and "Traceback" not in output and "--resume runs/stopped" in output, output
    assert torch.load(folder / "last.pt", weights_only=True)["iteration"] >= 3
    assert len(games) >= 2 and not alive(games)
    again = run(*SMALL, "--name", "stopped", cwd=tmp_path)
    assert again.returncode == 2 and again.stderr.count("\n") == 1, again.stderr
    assert "--resume runs/stopped" in again.stderr
    with Started("--resume", folder, cwd=tmp_path) as started:
        started.wait_for(lambda: started.decisions() >= 6 * 32)
        code, output = started.end(signal.SIGTERM)
    assert code == 143 and "Traceback" not in output, output


KEYS = """track seeds engine engine_version assets checkpoint iteration greedy sampled ai finished lap_times median
off_track_seconds ai_lap_times ai_median ratio faster_than_ai step_size difficulty num_karts speed_cap"""


def test_a_race_beside_the_games_ai(tmp_path):
    """By shipped weights, which an older script wrote."""
    races = ("--eval-episodes", 2)
    finished = run("--evaluate", ROOT / "pretrained" / "scotland.pt", *races, cwd=tmp_path)
    assert finished.returncode == 0 and "Traceback" not in finished.stderr, finished.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert {file.name for file in folder.iterdir()} == {
        "evaluation.json", "map.png", "mosaic.mp4", "best_race.mp4",
    }  # fmt: skip
    result = json.loads((folder / "evaluation.json").read_text())
    assert set(KEYS.split()) <= result.keys()
    assert result["track"] == ["scotland"] and result["seeds"] == [1000, 1001]
    for name in ("greedy", "sampled", "ai"):
        one = result[name]
        assert one["races"] == 2 and one["finished"] == len(one["lap_times"]) == one["ends"]["finished"]
    # what was shipped with the weights, to another CPU's rounding
    assert result["lap_times"] == pytest.approx([48.09, 48.12], abs=0.3)
    assert len(set(result["ai_lap_times"])) == 2 and 46 < result["ai_median"] < 50
    assert result["ratio"] == pytest.approx(result["median"] / result["ai_median"])
    pairs = zip(result["lap_times"], result["ai_lap_times"], strict=True)
    assert result["faster_than_ai"] == sum(ours < theirs for ours, theirs in pairs)
    for row in ("scotland greedy", "scotland sampled", "scotland ai"):
        assert row in finished.stdout
    film = imageio.v3.imread(folder / "best_race.mp4")
    assert film.shape[1:] == (480, 640, 3) and len(film) > 600 and film.std() > 20
    assert np.abs(film[-1].astype(int) - film[20]).mean() > 5  # something moves
    mosaic = imageio.v3.imread(folder / "mosaic.mp4")
    assert mosaic.shape[1:] == (128, 256, 3) and mosaic[10].std() > 20


MISTAKE = """
def my_reward(moment):
    raise ValueError("a mistake of mine")
script.REWARDS["progress"] = my_reward
"""


def test_a_mistake_in_a_reward_is_shown_whole_and_at_once(tmp_path):
    stopped = run(*SMALL, "--total-timesteps", 64, "--name", "mine", cwd=tmp_path, patch=MISTAKE)
    assert stopped.returncode not in (0, 2, 130)
    assert "a mistake of mine" in stopped.stderr and "my_reward" in stopped.stderr, stopped.stderr
    assert "lost" not in stopped.stderr and stopped.stderr.count("in my_reward") <= 2  # of two games


# --- Slow: learning, other settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Some 10,000 decisions of learning: the working folder and the run's."""
    cwd = tmp_path_factory.mktemp("learning")
    settings = ["--num-envs", 8, "--num-steps", 64, "--total-timesteps", 10_240, "--random-start", 0.2]
    settings += ["--eval-interval", 20, "--eval-episodes", 2, "--seed", 2, "--name", "trained"]
    finished = run(*settings, cwd=cwd, patch="script.LAP_SECONDS = 60.0")
    assert finished.returncode == 0, finished.stderr
    return cwd, cwd / "runs" / "trained"


@slow
def test_ten_thousand_decisions_of_learning_help(trained):
    rows = list(metrics(trained[1]).values())
    assert len(rows) == 20 and max(row["losses/ratio_error"] for row in rows) < 1e-5
    for name, gain in (("return", 1.0), ("progress", 0.01)):
        values = [row[f"charts/{name}"] for row in rows if f"charts/{name}" in row]
        assert np.mean(values[-5:]) > np.mean(values[:5]) + gain


@slow
def test_what_tensorboard_and_the_checkpoints_hold(trained):
    board = EventAccumulator(
        str(trained[1]), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    ).Reload()
    charts = (
        "return progress finished learning_rate SPS sampling_SPS update_seconds elapsed_seconds lost_games"
    )
    losses = "policy_loss value_loss entropy approx_kl clipfrac ratio_error explained_variance"
    names = {f"charts/{name}" for name in charts.split()} | {f"losses/{name}" for name in losses.split()}
    assert names | {"eval/finished", "eval/progress", "eval/median"} <= set(board.Tags()["scalars"])
    assert board.Tags()["images"] == ["eval/map"]
    text = board.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "learning_rate: 0.0005" in text
    for name in ("last.pt", "best.pt"):
        checkpoint = torch.load(trained[1] / name, weights_only=True)
        assert checkpoint["args"]["track"] == ("scotland",) and checkpoint["made_on"]["assets"]
    assert not list(trained[1].glob("*.tmp")) and len(imageio.v3.imread(trained[1] / "races.mp4")) > 10


@slow
def test_weights_begin_another_run_on_several_tracks(trained):
    cwd, folder = trained
    two = ("--track", "lighthouse", "olivermath", *SIZE, "--total-timesteps", 64, "--name", "two")
    races = ("--eval-interval", 2, "--eval-episodes", 2)
    finished = run("--init-from", folder / "best.pt", *two, *races, cwd=cwd, patch=SHORT)
    assert finished.returncode == 0, finished.stderr
    before, after = (torch.load(path, weights_only=True)["agent"] for path in (
        folder / "best.pt", cwd / "runs" / "two" / "last.pt",
    ))  # fmt: skip
    distance = max((before[name] - after[name]).abs().max().item() for name in before)
    assert 0 < distance < 0.05

    raced = run("--evaluate", cwd / "runs" / "two" / "best.pt", "--eval-episodes", 1, cwd=cwd,
                patch="script.LAP_SECONDS = 25.0")  # fmt: skip
    assert raced.returncode == 0, raced.stderr
    for track in ("lighthouse", "olivermath"):
        (written,) = (cwd / "runs").glob(f"best-{track}-*/evaluation.json")
        result = json.loads(written.read_text())
        assert result["track"] == [track] and result["greedy"]["races"] == result["ai"]["races"] == 1
        assert (result["ai_median"] is None) == (track == "lighthouse")  # which takes longer than that
    assert 17 < result["ai_median"] < 22


@slow
def test_a_whole_curriculum_with_weighted_rewards(tmp_path):
    """DeepRacer's actions below a cap that every passed evaluation raises."""
    school = ("--actions", "deepracer", "--reward", "centerline:0.1", "progress", "--epsilon", 0.2)
    cap = ("--speed-cap", 8, "--speed-curriculum", 2, "--eval-interval", 1, "--eval-episodes", 2)
    passes = "results = iter([True, False, False])\n"
    passes += "script.exam = lambda *_: (next(results), [0.0, 0.0, 0.0])"
    learnt = run(
        *SIZE, *school, *cap, "--total-timesteps", 96, "--name", "school", cwd=tmp_path, patch=passes
    )
    assert learnt.returncode == 0, learnt.stderr
    rows = list(metrics(tmp_path / "runs" / "school").values())
    assert [row["charts/speed_cap"] for row in rows] == [8.0, 10.0, 9.0]
    assert max(row["losses/ratio_error"] for row in rows) < 1e-5
    last = torch.load(tmp_path / "runs" / "school" / "last.pt", weights_only=True)
    assert (last["lesson"]["cap"], last["lesson"]["passed"]) == (8.5, 8.0)
    start = ("--init-from", "runs/school/last.pt", *SMALL, "--total-timesteps", 32, "--name", "other")
    refused = run(*start, cwd=tmp_path)
    assert refused.returncode == 2 and "type the --actions" in refused.stderr
    assert not (tmp_path / "runs" / "other").exists()
    faster = run(*start, "--actions", "deepracer", "--speeds", 10, 20, 30, cwd=tmp_path)
    assert faster.returncode == 0, faster.stderr


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


@slow
def test_three_losses_in_a_row_end_the_run(tmp_path):
    dies = "import os\nscript.TuxKartEnv.step = lambda *_: os._exit(1)"
    stopped = run(*SMALL, "--total-timesteps", 64, "--name", "lost", cwd=tmp_path, patch=dies)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr, stopped.stderr
    assert "Games were lost 3 times in a row" in stopped.stderr.splitlines()[-1]


@slow
@pytest.mark.parametrize("value", ["float('nan')", "float('inf')"])
def test_a_reward_that_is_no_number_ends_the_run(value, tmp_path):
    patch = f"script.REWARDS['progress'] = lambda moment: {value}"
    stopped = run(*SMALL, "--total-timesteps", 64, "--name", "nan", cwd=tmp_path, patch=patch)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    assert "A reward is not a finite number" in stopped.stderr


@slow
def test_a_full_disk_and_a_locked_folder_say_so(tmp_path):
    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))  # a checkpoint is larger

    settings = (*SMALL, "--total-timesteps", 64, "--name", "full")
    stopped = run(*settings, cwd=tmp_path, preexec_fn=limit_files)
    assert stopped.returncode == 1
    assert not list((tmp_path / "runs").glob("*/last.pt"))
    print(stopped.stderr[-3000:])
    assert "File too large" in stopped.stderr


@slow
def test_torchrun_with_two_ranks_learns_the_same_weights_on_both(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, torch, ppo_tuxkart as script\n"
        "update = script.ppo_update\n"
        "def watched(agent, optimizer, batch, args):\n"
        "    before = [weights.clone() for weights in agent.state_dict().values()]\n"
        "    scalars = update(agent, optimizer, batch, args)\n"
        "    found = before, list(agent.state_dict().values()), batch['obs'].float().mean()\n"
        "    torch.save(found, f'rank{os.environ[\"RANK\"]}.pt')\n"
        "    return scalars\n"
        "script.ppo_update = watched\n"
        "script.main()\n"
    )
    options = ["--standalone", "--nproc-per-node", "2", str(driver)]
    settings = ["--num-envs", 1, *SMALL[2:], "--total-timesteps", 6 * 32, "--name", "many"]
    words = [sys.executable, "-m", "torch.distributed.run", *options, *map(str, settings)]
    finished = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert finished.returncode == 0, finished.stderr
    (before, ours, seen), (_, theirs, others) = (
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, ours, strict=True)) and seen != others
    rows = metrics(tmp_path / "runs" / "many")
    assert list(rows) == [32 * n for n in range(1, 7)]
    assert max(row["losses/ratio_error"] for row in rows.values()) < 1e-5
    assert all(math.isfinite(row["losses/value_loss"]) for row in rows.values())
