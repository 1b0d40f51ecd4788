"""The weights that come with the repository drive as their evaluation in bench/results says."""

import json

import pytest
import torch
from conftest import INSTALLED, ROOT, run, slow

import ppo_tuxkart

RESULTS = ROOT / "bench" / "results"
TRACKS = {"scotland": "scotland", "lighthouse": "lighthouse", "zengarden": "zengarden", "many": "scotland"}
NO_FILMS = "script.film_race = script.write_mosaic = lambda *_: None"


@slow
@pytest.mark.parametrize("name", TRACKS)
def test_weights_race_as_their_evaluation_says(name, tmp_path):
    """The first of its twenty races; those for several tracks on one of them."""
    weights, track = ROOT / "pretrained" / f"{name}.pt", TRACKS[name]
    (file,) = [
        *RESULTS.glob(f"pretrained-{name}.evaluation.json"),
        *RESULTS.glob(f"pretrained-{name}.{track}.evaluation.json"),
    ]
    said = json.loads(file.read_text())
    assert weights.stat().st_size < 3_000_000 and said["finished"] == 20
    if said["engine"] not in INSTALLED:
        pytest.skip(f"{said['engine']} is not installed")
    races = ["--track", track, "--eval-episodes", 3, "--engine", said["engine"]]
    finished = run("--evaluate", weights, *races, cwd=tmp_path, patch=NO_FILMS)
    assert finished.returncode == 0 and "Warning" not in finished.stderr, finished.stderr
    (file,) = (tmp_path / "runs").glob("*/evaluation.json")
    result = json.loads(file.read_text())
    assert result["finished"] == 3
    # another CPU rounds otherwise, and a lap can take another way
    assert result["median"] == pytest.approx(sorted(said["lap_times"][:3])[1], abs=0.3)
    assert result["ai_lap_times"] == pytest.approx(said["ai_lap_times"][:3], abs=0.02)


@pytest.mark.parametrize("name", TRACKS)
def test_weights_load_and_name_no_path_of_a_machine(name):
    checkpoint = ppo_tuxkart.load_checkpoint(ROOT / "pretrained" / f"{name}.pt")
    agent = ppo_tuxkart.Agent((6, 64, 64), [5, 3, 2, 2])
    ppo_tuxkart.load_weights(agent, checkpoint)
    assert all(weights.isfinite().all() for weights in agent.state_dict().values())
    assert not any(str(value).startswith("/") for value in vars(checkpoint["args"]).values())
    assert agent(torch.zeros(1, 6, 64, 64, dtype=torch.uint8))[0].shape == (1, 12)
