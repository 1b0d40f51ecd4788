"""The style and the type hints: ruff finds nothing in any file, and mypy nothing in the three scripts."""

import subprocess
import sys

from conftest import ROOT


def check(*command):
    finished = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_ruff_finds_nothing(tmp_path):
    check("ruff", "check", "--config", "tests/ruff.toml", "--cache-dir", str(tmp_path), ".")


def test_mypy_finds_nothing(tmp_path):
    check("mypy", "--config-file", "tests/mypy.ini", "--cache-dir", str(tmp_path))
