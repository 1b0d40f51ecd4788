"""Every command in the README's bash blocks runs as it stands there, only shorter; and so does its Python."""

import argparse
import dataclasses
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import tyro
from conftest import ROOT
from test_worldmodel import SMALL as DREAM

import ppo_tuxkart
import ppo_tuxkart_resnet
import worldmodel_carracing

SCRIPTS = (ppo_tuxkart, ppo_tuxkart_resnet, worldmodel_carracing)
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
CI = ["./install.sh", ".venv/bin/pip install -q -r tests/requirements.txt"]
CI += [".venv/bin/pytest -q -n 2 --dist loadfile tests"]
# in test_pretrained.py
ELSEWHERE = re.findall(r"^\S+ ppo_tuxkart.py --evaluate pretrained/\w+\.pt$", TEXT, re.MULTILINE)

RACES = ["--eval-episodes", 1, "--max-seconds", 5]
LEARN = [*RACES, "--num-envs", 1, "--num-steps", 32, "--num-minibatches", 2, "--total-timesteps", 64]
LEARN += ["--eval-interval", 2]
SHORTER = {
    "ppo_tuxkart.py": LEARN,
    "ppo_tuxkart.py --evaluate": RACES,
    "ppo_tuxkart_resnet.py": [*LEARN, "--base-channels", 8],
    "ppo_tuxkart_resnet.py --evaluate": RACES,
    "worldmodel_carracing.py": [*DREAM, "--rounds", 1, "--validation-tracks", 1, *RACES[:2]],
    "worldmodel_carracing.py --evaluate": RACES[:2],
    "worldmodel_carracing.py --dream": ["--max-frames", 60],
    "tests/bench/sampler.py": ["--num-envs", 2, "--steps", 8, "--rounds", 1],
}


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "pretrained").symlink_to(ROOT / "pretrained")
    return folder


PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
MEASUREMENTS = {" ".join(words.split()) for words in re.findall(r"python ((?:tests/bench/)?\w+\.py[^`]*)`", PROSE)}


class Parsed(Exception):
    pass


@pytest.mark.parametrize("words", sorted(MEASUREMENTS))
def test_measurements_take_the_words_of_their_command(words, monkeypatch):
    """They take hours, so only their command line is tried; and what they name is there."""
    script, *arguments = shlex.split(words.replace("<name>", "name"))
    (path,) = {ROOT / folder / script for folder in ("tests/bench", ".") if (ROOT / folder / script).exists()}

    def and_no_further(parse):
        def check(*args, **settings):
            parse(*args, **settings)
            raise Parsed

        return check

    for owner, name in ((tyro, "cli"), (argparse.ArgumentParser, "parse_args")):
        monkeypatch.setattr(owner, name, and_no_further(getattr(owner, name)))
    monkeypatch.chdir(path.parent)
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    with pytest.raises(Parsed):
        runpy.run_path(str(path), run_name="__main__")


def newest_run(cwd):
    """The name of the newest run with a best.pt, which is what a reader has when the README says <name>."""
    return max((cwd / "runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime).parent.name


@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in CI + ELSEWHERE])
def test_command(line, cwd):
    program, *words = shlex.split(line.replace("<name>", newest_run(cwd) if "<name>" in line else ""))
    here = {".venv/bin/python": [sys.executable], ".venv/bin/torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    script = next(word for word in words if word.endswith(".py"))
    kind = next((f"{script} {flag}" for flag in ("--evaluate", "--dream") if flag in words), script)
    words[words.index(script)] = str(ROOT / script)
    command = [*here[program], *words, *map(str, SHORTER[kind])]
    finished = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "python"])
def test_python(block, cwd):
    block = block.replace("1_000_000", "128")
    drive = "\nenv.reset(seed=1)\nprint(env.step(env.action_space.sample())[0].shape)"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    finished = subprocess.run(
        [sys.executable, "-c", block + drive], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert "(6, 64, 64)" in finished.stdout.splitlines(), finished.stdout + finished.stderr


def test_the_rest_is_what_ci_runs():
    assert set(CI) <= set(COMMANDS)
    assert "./install.sh" in (ROOT / ".ci" / "run").read_text()


def test_links_lead_to_the_line_they_name():
    for name, file, line in re.findall(r"\[`([^`]+)`\]\(([\w./]+)#L(\d+)\)", TEXT):
        lines = (ROOT / file).read_text().splitlines()
        found = [number for number, text in enumerate(lines, 1) if name in text]
        assert int(line) in found, f"{name} is in {file} at {found}"


def test_tables_are_whole():
    """As many cells in every row as in the line under the heading."""
    for table in re.findall(r"(?:^ *\|.*\n)+", TEXT, re.MULTILINE):
        rows = [re.sub(r"`[^`]*`", "", row).count("|") for row in table.splitlines()]
        assert len(set(rows)) == 1, table


# flags of other programs and of the measurements
OTHERS = (
    "kills checkpoint iterations seconds first-round frames episodes help logdir dist extra-index-url "
    "standalone nproc-per-node max-restarts nnodes rdzv-backend rdzv-endpoint film lap peers folder names "
    "rewards decisions picture out"
)


def test_what_the_readme_names_exists():
    """Files, tests (`...` stands for the rest of a name) and flags."""
    for name in re.findall(r"(?:tests|docs|pretrained)/[\w./-]*\w", TEXT):
        assert list(ROOT.glob(f"{name}*")), name
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)", TEXT):
        assert f"def {name}" in tests, name
    fields = [field for script in SCRIPTS for field in dataclasses.fields(script.Args)]
    flags = {field.name.replace("_", "-") for field in fields} | set(OTHERS.split())
    assert set(re.findall(r"(?<![\w-])--([a-z][a-z-]*)", TEXT)) <= flags
