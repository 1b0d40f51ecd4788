"""Every diff that the pages print is applied to a copy of its script, and the copy learns for two iterations."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, metrics, slow

TINY = (
    "--num-envs 2 --num-steps 16 --num-minibatches 2 --epochs 1 --total-timesteps 64 --eval-interval 0 --teacher none"
).split()
PAGES = [ROOT / "docs" / "tweaks.md", ROOT / "README.md"]
# a diff, then any text, then the command that uses it, where the page gives one
BLOCK = re.compile(r"```diff\n(.*?)```(?:(?:(?!```).)*?```bash\n(.*?)```)?", re.DOTALL)
TEXTS = [page.read_text() for page in PAGES if page.exists()]
DIFFS = {diff: commands for text in reversed(TEXTS) for diff, commands in BLOCK.findall(text)}


@slow
@pytest.mark.parametrize("diff", DIFFS, ids=range(1, 1 + len(DIFFS)))
def test_a_tweak_applies_is_small_and_learns(diff, tmp_path):
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    removed, added = (sum(line.startswith(sign) for line in lines) for sign in "-+")
    assert max(removed, added) <= 10 and sum(line.startswith("@@") for line in lines) <= 2

    commands = DIFFS[diff].splitlines() or [".venv/bin/python ppo_tuxkart.py"]
    _, script, *words = shlex.split(commands[-1])
    source = "ppo_tuxkart_resnet.py" if "ppo_tuxkart_resnet" in diff + script else "ppo_tuxkart.py"
    (tmp_path / script).write_text((ROOT / source).read_text())
    patch = ["patch", "--fuzz=0", "-p0", script]
    patched = subprocess.run(patch, cwd=tmp_path, input=diff, capture_output=True, text=True)
    assert patched.returncode == 0, patched.stdout + patched.stderr
    command = [sys.executable, script, *words, *TINY, "--name", "tweak"]
    learnt = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert learnt.returncode == 0, learnt.stderr
    assert list(metrics(tmp_path / "runs" / "tweak")) == [32, 64]


def test_the_pages_print_the_same_diffs():
    """The README's are those of docs/tweaks.md, and those are at least five."""
    pages = [dict(BLOCK.findall(text)) for text in TEXTS]
    assert len(pages) == 2 and len(pages[0]) >= 5 and pages[1].keys() <= pages[0].keys()
