"""The weights that come with the repository drive as their evaluation says."""

import json

import pytest
from conftest import INSTALLED, ROOT, run

import ppo_tuxkart

RESULTS = ROOT / "tests" / "bench" / "results"
CAR = ROOT / "pretrained" / "carracing.pt"
KARTS = sorted(set((ROOT / "pretrained").glob("*.pt")) - {CAR})


@pytest.mark.parametrize("weights", KARTS, ids=lambda path: path.stem)
def test_weights_race_as_their_evaluation_says(weights, tmp_path):
    """Those for several tracks race on the one where they do best."""
    files = RESULTS.glob(f"pretrained-{weights.stem}.*evaluation.json")
    said = max((json.loads(file.read_text()) for file in files), key=lambda said: said["finished"])
    assert weights.stat().st_size < 3_000_000
    assert not any(str(value).startswith("/") for value in ppo_tuxkart.load_checkpoint(weights)["args"].values())
    if said["engine"] not in INSTALLED:
        pytest.skip(f"{said['engine']} is not installed")
    races = ["--track", *said["track"], "--eval-episodes", 1, "--engine", said["engine"]]
    finished = run("--evaluate", weights, *races, cwd=tmp_path)
    assert finished.returncode == 0 and "Warning" not in finished.stderr, finished.stderr
    (file,) = (tmp_path / "runs").glob("*/evaluation.json")
    result = json.loads(file.read_text())
    assert result["finished"] == 1 and said["finished"] == 20
    assert result["lap_times"] == pytest.approx(said["lap_times"][:1], abs=2.0)  # another CPU rounds otherwise
    assert result["ai_lap_times"] == pytest.approx(said["ai_lap_times"][:1], abs=0.02)
    pairs = zip(result["lap_times"], result["ai_lap_times"], strict=True)
    assert result["faster_than_ai"] == sum(ours < theirs for ours, theirs in pairs) and "wins" not in result["greedy"]


def test_the_car_drives_as_its_evaluation_says(tmp_path):
    said = json.loads((RESULTS / "carracing.evaluation.json").read_text())
    assert CAR.stat().st_size < 12_000_000 and len(said["returns"]) == 100
    finished = run("--evaluate", CAR, "--eval-episodes", 2, cwd=tmp_path, script="worldmodel_carracing")
    assert finished.returncode == 0, finished.stderr
    (file,) = (tmp_path / "runs").glob("*/evaluation.json")
    result = json.loads(file.read_text())
    assert result["seeds"] == said["seeds"][:2]
    assert result["mean"] == pytest.approx(sum(said["returns"][:2]) / 2, abs=60)  # another CPU rounds otherwise
