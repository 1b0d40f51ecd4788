"""Learning, stopping, resuming and evaluating on the real game, as a user does it."""

import functools
import json

import imageio.v3
import numpy as np
import pytest
import torch
from conftest import INSTALLED, SIGINT, SIGKILL, alive, metrics, run, start_and_signal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_tuxkart

SMALL = ("--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2, "--epochs", 1, "--eval-interval", 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Some 10,000 decisions of learning: the working folder and the run's."""
    cwd = tmp_path_factory.mktemp("learning")
    settings = ["--num-envs", 8, "--num-steps", 64, "--total-timesteps", 10_240, "--learning-rate", 5e-4]
    settings += ["--random-start", 0.2, "--eval-interval", 20, "--eval-episodes", 2, "--max-seconds", 60]
    settings += ["--seed", 2, "--name", "trained"]
    finished = run(*settings, cwd=cwd)
    assert finished.returncode == 0, finished.stderr
    return cwd, cwd / "runs" / "trained"


def test_ten_thousand_decisions_of_learning_help(trained):
    rows = metrics(trained[1])
    assert [row["iteration"] for row in rows] == list(range(1, 21))
    returns, progress = ([row[f"charts/{key}"] for row in rows[2:]] for key in ("episodic_return", "progress"))
    assert np.mean(returns[-5:]) > np.mean(returns[:5]) + 1.0
    assert np.mean(progress[-5:]) > np.mean(progress[:5]) + 0.01


def test_the_ratio_is_one_in_every_first_minibatch(trained):
    assert max(row["losses/ratio_error"] for row in metrics(trained[1])) < 1e-6


def test_tensorboard_says_what_metrics_jsonl_says(trained):
    board = EventAccumulator(str(trained[1]), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    rows = [json.loads(line) for line in (trained[1] / "metrics.jsonl").read_text().splitlines()]
    scalars = {"charts/SPS", "charts/episodic_return", "charts/progress", "charts/finish_rate", "charts/learning_rate"}
    scalars |= {f"losses/{name}" for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")}
    assert scalars | {"losses/explained_variance", "eval/progress"} <= set(board.Tags()["scalars"])
    for tag in board.Tags()["scalars"]:
        written = [(row["global_step"], row[tag]) for row in rows if tag in row]
        events = [(event.step, event.value) for event in board.Scalars(tag)]
        np.testing.assert_allclose(events, written, rtol=1e-6)
    film = imageio.v3.imread(board.Images("eval/race")[0].encoded_image_string, extension=".gif")
    assert len(film) > 10 and film.shape[1:] == (64, 64, 3) and film.std() > 10
    assert "learning_rate" in board.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()


def test_checkpoints_hold_plain_values(trained):
    for name in ("last.pt", "best.pt"):
        checkpoint = torch.load(trained[1] / name, weights_only=True)
        assert checkpoint["args"]["track"] == ("scotland",) and checkpoint["made_on"]["assets"]
    assert not list(trained[1].glob("*.tmp"))
    assert json.loads((trained[1] / "config.json").read_text())["seed"] == 2


@pytest.mark.parametrize("engine", INSTALLED)
def test_evaluation_races_greedy_sampled_and_the_ai(trained, engine):
    cwd, folder = trained
    races = ["--track", "olivermath", "--eval-episodes", 3, "--max-seconds", 25, "--engine", engine]
    finished = run("--evaluate", folder / "best.pt", *races, cwd=cwd)
    assert finished.returncode == 0, finished.stderr
    written = max((cwd / "runs").glob("best-olivermath-*"), key=lambda path: path.stat().st_mtime)
    result = json.loads((written / "evaluation.json").read_text())
    assert result["engine"] == engine and result["track"] == ["olivermath"] and result["difficulty"] == 2
    assert result["seeds"] == [1000, 1001, 1002] and result["greedy"]["races"] == result["ai"]["races"] == 3
    assert result["ai"]["finished"] == 3 and 17 < result["ai_median"] < 22 and len(set(result["ai_lap_times"])) == 3
    assert result["finished"] == len(result["lap_times"]) and (result["ratio"] is None) == (result["median"] is None)
    film = imageio.v3.imread(written / "best_race.mp4")
    assert film.shape[1:] == (480, 640, 3) and len(film) > 60 and film.std() > 20
    assert np.abs(film[-1].astype(int) - film[20]).mean() > 5  # something moves
    mosaic = imageio.v3.imread(written / "mosaic.mp4")
    assert mosaic.shape[1:] == (256, 256, 3) and mosaic[10, :128].std() > 20
    assert ("learnt with engine" in finished.stdout) == (engine != INSTALLED[0])


def test_several_tracks_are_learnt_and_raced(tmp_path):
    tracks = ["lighthouse", "olivermath"]
    short = ["--total-timesteps", 64, "--eval-interval", 2, "--eval-episodes", 2, "--max-seconds", 3]
    learnt = run(*SMALL, "--track", *tracks, *short, "--name", "two", cwd=tmp_path)
    assert learnt.returncode == 0, learnt.stderr
    assert metrics(tmp_path / "runs" / "two")[-1]["eval/progress"] < 0.5
    races = ["--eval-episodes", 1, "--max-seconds", 25]  # too short for lighthouse
    finished = run("--evaluate", tmp_path / "runs" / "two" / "best.pt", *races, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    rows = [words.split() for words in finished.stdout.splitlines()[-2:]]
    assert [row[0] for row in rows] == tracks
    for track, row in zip(tracks, rows, strict=True):
        (written,) = (tmp_path / "runs").glob(f"best-{track}-*")
        result = json.loads((written / "evaluation.json").read_text())
        assert result["track"] == [track] and result["greedy"]["races"] == result["ai"]["races"] == 1
        assert (result["ai_median"] is None) == (track == "lighthouse")
        assert track == "lighthouse" or row[-3] == f"{result['ai_median']:.2f}" and 17 < result["ai_median"] < 22


def test_races_on_several_tracks_are_those_on_each():
    def race(tracks, seeds):
        games = ppo_tuxkart.Games([functools.partial(ppo_tuxkart.TuxKartEnv, max_seconds=2.0)] * 2)
        try:
            races = ppo_tuxkart.run_races(games, lambda obs: np.tile([2, 0, 0, 0], (len(obs), 1)), seeds, tracks=tracks)
        finally:
            games.close()
        return {(one["track"], one["seed"]): one["trail"] for one in races}

    mixed = race(["scotland", "lighthouse"], [1, 2, 3, 4])
    assert list(mixed) == [("scotland", 1), ("lighthouse", 2), ("scotland", 3), ("lighthouse", 4)]
    assert mixed == race(["scotland"], [1, 3]) | race(["lighthouse"], [2, 4])


def test_weights_start_another_run(trained):
    cwd, folder = trained
    settings = ["--track", "lighthouse", "zengarden", *SMALL, "--total-timesteps", 32, "--name", "further"]
    finished = run("--init-from", folder / "best.pt", *settings, cwd=cwd)
    assert finished.returncode == 0, finished.stderr
    before = torch.load(folder / "best.pt", weights_only=True)["agent"]
    after = torch.load(cwd / "runs" / "further" / "last.pt", weights_only=True)["agent"]
    distance = max((before[key] - after[key]).abs().max().item() for key in before)
    assert 0 < distance < 0.05
    forgotten = ("--forget", "pedal", "--learning-rate", 0, "--name", "forgotten")
    finished = run("--init-from", folder / "best.pt", *SMALL, "--total-timesteps", 32, *forgotten, cwd=cwd)
    assert finished.returncode == 0, finished.stderr
    after = torch.load(cwd / "runs" / "forgotten" / "last.pt", weights_only=True)["agent"]
    for key in ("policy.weight", "policy.bias"):
        before[key][5:8] = 0  # steering has 5 choices, the pedal 3
    assert all(torch.equal(before[key], after[key]) for key in before)
    refused = run("--init-from", folder / "best.pt", "--frame-stack", 3, *SMALL, cwd=cwd)
    assert refused.returncode == 2 and "--frame-stack" in refused.stderr
    refused = run("--track", "scotland", "--name", "trained", cwd=cwd)
    assert refused.returncode == 2 and "--resume" in refused.stderr


LSTM = ("--memory", "lstm", "--base-channels", 4, "--random-action-prob", 0.1, "--moving-finish", "--augment", "shift")
NORMS = ("--network", "conv2d", "--base-channels", 8, "--amp", "bf16")
SCRIPTS = {"ppo": ("ppo_tuxkart", ()), "lstm": ("ppo_tuxkart_resnet", LSTM), "norms": ("ppo_tuxkart_resnet", NORMS)}


@pytest.mark.parametrize("case", SCRIPTS)
def test_killed_and_resumed_is_never_killed(case, tmp_path):
    """Killed in the middle of episodes; with the first script once more, after the games were loaded anew."""
    script, extra = SCRIPTS[case]
    iterations, kills = (36, (7, 34)) if case == "ppo" else (12, (7,))
    settings = [*SMALL, "--total-timesteps", iterations * 32, "--seed", 5, "--random-start", 0.5, *extra]
    if case == "ppo":  # evaluations before and after the second kill
        settings += ["--eval-interval", 24, "--eval-episodes", 2, "--max-seconds", 8]
    folder, where = tmp_path / "runs" / "killed", {"cwd": tmp_path, "script": script}
    whole = run(*settings, "--name", "whole", **where)
    assert whole.returncode == 0, whole.stderr
    command = [*settings, "--name", "killed"]
    for rows in kills:
        process, _, games = start_and_signal(SIGKILL, rows, folder, *command, **where)
        assert process.returncode == -SIGKILL and len(games) >= 2 and not alive(games)
        command = ["--resume", folder]
    resumed = run(*command, **where)
    assert resumed.returncode == 0, resumed.stderr

    expected = metrics(tmp_path / "runs" / "whole")
    assert len(expected) == iterations
    board = EventAccumulator(str(folder)).Reload()  # which hides what was logged after the checkpoint, and only that
    assert [event.step for event in board.Scalars("charts/SPS")] == [row["global_step"] for row in expected]
    assert metrics(folder) == expected
    ours, theirs = (torch.load(tmp_path / "runs" / name / "last.pt", weights_only=True) for name in ("killed", "whole"))
    for key, weights in theirs["agent"].items():
        assert torch.equal(ours["agent"][key], weights)


def test_norms_go_on_and_a_resumed_run_may_take_smaller_pieces(tmp_path):
    folder, where = tmp_path / "runs" / "first", {"cwd": tmp_path, "script": "ppo_tuxkart_resnet"}
    settings = [*SMALL, "--network", "conv2d", "--base-channels", 8, "--width", 36, "--height", 36]
    process, output, _ = start_and_signal(
        SIGINT, 3, folder, *settings, "--total-timesteps", 8 * 32, "--name", "first", **where
    )
    assert process.returncode == 0, output
    resumed = run("--resume", folder, "--grad-accum", 2, **where)
    assert resumed.returncode == 0, resumed.stderr
    assert len(metrics(folder)) == 8
    sequel = run("--init-from", folder / "last.pt", *settings, "--total-timesteps", 32, "--name", "sequel", **where)
    assert sequel.returncode == 0, sequel.stderr
    tracked = []
    for name, pieces in (("first", 2), ("sequel", 1)):
        checkpoint = torch.load(tmp_path / "runs" / name / "last.pt", weights_only=True)
        assert checkpoint["args"]["grad_accum"] == pieces
        norms = [int(n) for key, n in checkpoint["agent"].items() if key.endswith("num_batches_tracked")]
        assert len(norms) == 6 and len(set(norms)) == 1
        tracked += norms[:1]
    assert tracked[1] == tracked[0] + 1  # a fresh network's would have been refreshed before it drove


@pytest.mark.parametrize("settings", [["--memory", "lstm"], ["--network", "ec418", "--compile"]], ids=" ".join)
def test_deep_networks_are_learnt_and_raced(settings, tmp_path):
    where = {"cwd": tmp_path, "script": "ppo_tuxkart_resnet"}
    size = ["--base-channels", 4, "--width", 36, "--height", 36]
    learnt = run(*settings, *size, *SMALL, "--total-timesteps", 64, "--name", "deep", **where)
    assert learnt.returncode == 0 and "memory: rollout" in learnt.stdout, learnt.stderr
    assert all(row["losses/ratio_error"] < 1e-4 for row in metrics(tmp_path / "runs" / "deep"))
    if "--compile" in settings:  # it would compile anew
        return
    races = ["--eval-episodes", 3, "--max-seconds", 4, "--num-karts", 2]
    raced = run("--evaluate", "runs/deep/last.pt", *races, **where)
    assert raced.returncode == 0, raced.stderr
    (file,) = (tmp_path / "runs").glob("last-scotland-*/evaluation.json")
    result = json.loads(file.read_text())
    assert result["greedy"]["races"] == result["sampled"]["races"] == result["ai"]["races"] == 3
    assert result["greedy"]["wins"] == 0 and 1 <= result["greedy"]["mean_position"] <= 2
    assert file.with_name("best_race.mp4").exists()


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    folder = tmp_path / "runs" / "stopped"
    settings = [*SMALL, "--total-timesteps", 100_000, "--name", "stopped"]
    process, output, games = start_and_signal(SIGINT, 2, folder, *settings, cwd=tmp_path)
    assert process.returncode == 0 and "Traceback" not in output, output
    assert f"--resume {folder.relative_to(tmp_path)}" in output
    assert torch.load(folder / "last.pt", weights_only=True)["iteration"] >= 1
    assert games and not alive(games)
    refused = run("--resume", folder, "--gamma", 0.5, cwd=tmp_path)
    assert refused.returncode == 2 and "--gamma" in refused.stderr
