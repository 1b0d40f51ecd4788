"""Whatever is typed, whatever lies in a file: a sentence and exit code 2, never a traceback, never code executed."""

import contextlib
import dataclasses
import functools
import io
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ppo_tuxkart
import ppo_tuxkart_resnet
import worldmodel_carracing

SCRIPTS = pytest.mark.parametrize("script", [ppo_tuxkart, ppo_tuxkart_resnet, worldmodel_carracing])
TRIES = functools.partial(settings, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
VALUES = st.one_of(
    TEXTS,
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["", "-", "--", "nan", "-inf", "1e999", "0", "-1", "None", "scotland", "progress:nan"]),
)
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.just(torch.zeros(2))),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=4,
)


def outcome(script, argv):
    """What `parse` does with a command line: "args" where it is fine, else "refused". Everything else is an error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            args, _ = script.parse(argv)
        except script.UsageError as error:
            assert str(error).endswith(".") and "\n" not in str(error)
            return "refused"
        except SystemExit as stop:
            assert stop.code == 2 or "--help" in argv or "-h" in argv
            return "refused"
    for value in vars(args).values():
        assert not isinstance(value, float) or math.isfinite(value)
    return "args"


@SCRIPTS
def test_command_lines(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(script.Args)]
    seen = set()

    @TRIES(max_examples=100)
    @given(st.lists(st.tuples(st.sampled_from([*flags, "--nothing", ""]), st.lists(VALUES, max_size=2)), max_size=4))
    def check(parts):
        seen.add(outcome(script, [word for flag, values in parts for word in (flag, *values)]))

    check()
    assert seen == {"args", "refused"} and not list(tmp_path.iterdir())


@pytest.fixture
def checkpoint(request):
    """A whole checkpoint, as a dict, that `--evaluate` accepts."""
    script = request.getfixturevalue("script")
    args = script.Args()
    if script is worldmodel_carracing:
        return dream_checkpoint(args)
    if script is ppo_tuxkart_resnet:
        args = script.complete(args)
    made_on = script.describe_setting(args)
    cpu = torch.device("cpu")
    agent = script.make_agent(args, made_on, cpu) if script is ppo_tuxkart_resnet else script.Agent(
        made_on["observation"], made_on["actions"]
    )  # fmt: skip
    optimizer = torch.optim.Adam(agent.parameters())
    whole = {"args": script.args_to_plain(args), "made_on": made_on, "agent": agent.state_dict(), "iteration": 1}
    whole |= {"optimizer": optimizer.state_dict(), "elapsed": 1.0, "best": None, "recent": [], "graduate": None}
    whole |= {"lesson": {"cap": None, "passed": None, "increment": None}, "scaler": {}, "reached": []}
    return whole | {"ranks": [{"episodes": [], "memory": {}, "rng": torch.get_rng_state(), "cuda_rng": None}]}


def dream_checkpoint(args):
    wm = worldmodel_carracing
    agent, search = wm.Agent("zh"), wm.CMAES(torch.zeros(867).numpy(), 0.1, args.population)
    whole = {"args": wm.args_to_plain(args), "made_on": wm.describe_setting(), "iteration": 1}
    whole |= {"agent": agent.state_dict(), "optimizer": None, "done": [[1, stage] for stage in wm.STAGES[:3]]}
    whole |= {
        "step": 70,
        "frames": 1000,
        "elapsed": 1.0,
        "best": 3.0,
        "scores": [[1000, 3.0]],
        "search": search.state(),
    }
    best = {"score": 3.0, "controller": agent.controller, "sigma": 0.1}
    return whole | {"stage_best": best, "collected": 0, "replaced": 0}


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@SCRIPTS
def test_files_that_are_no_checkpoints(script, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    torch.save(checkpoint, path)
    whole = path.read_bytes()
    assert outcome(script, ["--evaluate", str(path)]) == outcome(script, ["--resume", str(tmp_path)]) == "args"

    @TRIES(max_examples=60)
    @given(st.one_of(st.binary(max_size=300), st.integers(0, len(whole) - 1).map(lambda size: whole[:size])))
    def check(contents):
        path.write_bytes(contents)
        assert outcome(script, ["--evaluate", str(path)]) == outcome(script, ["--resume", str(tmp_path)]) == "refused"
        assert path.read_bytes() == contents

    check()
    for contents in (pickle.dumps(Evil(tmp_path / "executed")), b"\x80\x04" + whole):
        path.write_bytes(contents)
        assert outcome(script, ["--evaluate", str(path)]) == "refused"
    torch.save(checkpoint | {"iteration": Evil(tmp_path / "executed")}, path)
    assert outcome(script, ["--evaluate", str(path)]) == "refused"
    with open(path, "wb") as file:
        file.truncate(2**36)  # 64 GiB, none of it on the disk
    assert outcome(script, ["--evaluate", str(path)]) == "refused"
    path.unlink()
    assert not (tmp_path / "executed").exists() and not list(tmp_path.iterdir())


@SCRIPTS
def test_checkpoints_with_junk_in_them(script, checkpoint, tmp_path, monkeypatch):
    """One value of a checkpoint is something else: it is refused, or it is put to use, but it is no traceback."""
    monkeypatch.chdir(tmp_path)
    path, seen = tmp_path / "last.pt", set()
    keys = [(key,) for key in checkpoint] + [("args", key) for key in checkpoint["args"]]
    keys += [("made_on", key) for key in checkpoint["made_on"]]
    keys += [(key, name) for key in ("optimizer", "search", "stage_best") for name in checkpoint.get(key) or ()]

    class Reached(Exception):
        pass

    def reached(*_):
        raise Reached  # the games come next

    monkeypatch.setattr(script, "Workers" if script is worldmodel_carracing else "Sampler", reached)

    @TRIES(max_examples=100)
    @given(st.sampled_from(keys), JUNK, st.booleans())
    def check(key, junk, resumes):
        damaged = checkpoint | ({key[0]: junk} if len(key) == 1 else {key[0]: checkpoint[key[0]] | {key[1]: junk}})
        torch.save(damaged, path)
        argv = ["--resume", str(tmp_path)] if resumes else ["--evaluate", str(path)]
        if outcome(script, argv) == "refused":
            seen.add("refused")
            return
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Reached, script.UsageError):
            args, loaded = script.parse(argv)
            if resumes:
                script.train(args, loaded)
            if script is worldmodel_carracing:
                script.evaluate(args, loaded)
            here = script.describe_setting(args)
            agent = script.Agent(here["observation"], here["actions"]) if script is ppo_tuxkart else (
                script.make_agent(args, here, torch.device("cpu"))
            )  # fmt: skip
            script.load_weights(agent, loaded, path, here)
            script.note_differences(loaded["made_on"], here)
        seen.add("used")

    check()
    assert seen == {"refused", "used"}
