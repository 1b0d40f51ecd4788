"""Sizes, style, and what stands in several scripts letter for letter."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

TWINS = """
    UsageError orthogonal StateAgent evaluate_actions choose_actions compute_gae teacher_kl average_over_ranks
    govern drive_actions ec418_actions deepracer_actions Moment progress_reward centerline_reward parse_reward find_game
    TrackGeometry TuxKartEnv make_envs end_games reset_games rollout race race_all summarize show_races
    film_race evaluate save load_checkpoint next_lesson exam snapshot load_teachers usable_cores
    hold_folder main ENGINES LAP_SECONDS DRIFT_SECONDS OFF_TRACK_METRES AHEAD ITEMS WRITES LOST_GAME SILENCE
    PATIENCE TEACHER_STEPS TAUGHT_EPOCHS TEACHING FRESH_GAMES SAVE_SECONDS
"""
LSTM = """
    UsageError orthogonal evaluate_actions choose_actions compute_gae teacher_kl average_over_ranks govern
    drive_actions ec418_actions deepracer_actions Moment progress_reward centerline_reward parse_reward find_game
    TrackGeometry TuxKartEnv make_env make_envs end_games race race_all summarize show_races film_race
    evaluate make_agent save load_checkpoint next_lesson exam collect snapshot load_teachers usable_cores
    hold_folder start main REWARDS ENGINES LAP_SECONDS DRIFT_SECONDS OFF_TRACK_METRES AHEAD ITEMS WRITES LOST_GAME
    SILENCE PATIENCE TEACHER_STEPS TAUGHT_EPOCHS TEACHING FRESH_GAMES SAVE_SECONDS
"""
ALL_THREE = "UsageError save usable_cores hold_folder"


def definitions(script):
    """Every top-level function, class and constant of a script, as text."""
    text = (ROOT / f"{script}.py").read_text()
    segments = [ast.get_source_segment(text, node) for node in ast.parse(text).body]
    return {re.match(r"(?:class |def )?(\w*)", segment)[1]: segment for segment in segments}


@pytest.mark.parametrize("names, scripts", [
    (TWINS, ["ppo_tuxkart", "ppo_tuxkart_resnet"]),
    (LSTM, ["ppo_tuxkart", "ppo_tuxkart_lstm"]),
    (ALL_THREE, ["ppo_tuxkart", "ppo_tuxkart_resnet", "worldmodel_carracing"]),
], ids=["twins", "lstm", "all three"])  # fmt: skip
def test_what_scripts_share_is_the_same_to_the_letter(names, scripts):
    first, *others = map(definitions, scripts)
    for other in others:
        differ = [name for name in names.split() if name not in first or first[name] != other.get(name)]
        assert not differ


def check(*command):
    finished = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_nothing_is_larger_than_it_may_be():
    check("tests/sizes.py")


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_finds_nothing(command, tmp_path):
    check("-m", "ruff", *command, "--config", "tests/ruff.toml", "--cache-dir", str(tmp_path), ".")
