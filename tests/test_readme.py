"""What README.md and docs/ say: links, flags and names exist, raw files are quoted, and every command runs."""

import dataclasses
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, slow

import ppo_tuxkart
import ppo_tuxkart_resnet
import worldmodel_carracing

SCRIPTS = [ppo_tuxkart, ppo_tuxkart_resnet, worldmodel_carracing]
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in [
    ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
]}  # fmt: skip
OLDER = ("docs/results.md", "docs/benchmarks.md")  # they quote older commands, with their commits
TODAY = {name: text for name, text in PAGES.items() if name not in OLDER}
CODE = "\n".join(
    file.read_text() for file in ROOT.glob("**/*") if file.suffix in (".py", ".sh") and ".venv" not in file.parts
)


def anchors(text):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


# of other programs
OTHERS = (
    "help logdir extra-index-url standalone nproc-per-node max-restarts nnodes rdzv-backend rdzv-endpoint name-only"
    " job-name nodes ntasks cpus-per-task mem time signal requeue"
)


@pytest.mark.parametrize("page", TODAY)
def test_flags_and_names_exist(page):
    fields = [field.name.replace("_", "-") for script in SCRIPTS for field in dataclasses.fields(script.Args)]
    known = {*fields, *(f"no-{field}" for field in fields), *OTHERS.split(), *re.findall(r"--([a-z][a-z-]*)", CODE)}
    assert set(re.findall(r"(?<![\w-])--([a-z][a-z-]*)", TODAY[page])) <= known
    words, files = set(re.findall(r"\w+", CODE)), {file.name for file in ROOT.glob("**/*")}
    for name in re.findall(r"`([A-Za-z][\w.]*)(?:\(\))?`", TODAY[page]):
        looks_like_code = "_" in name or re.search("[a-z][A-Z]", name)
        assert not looks_like_code or name in files or set(name.split(".")) <= words, name


def test_raw_files_are_quoted_and_there_is_nothing_else():
    """By their run's name; of runs that differ by a letter or seed, what they share is enough."""
    text = "".join(PAGES.values())
    runs = {file.name.split(".")[0] for file in (ROOT / "bench" / "results").iterdir()}
    assert not [run for run in sorted(runs) if re.sub(r"-[a-z]$|(?<=seed)\d$", "", run) not in text]


# --- Commands

RACES = "--eval-episodes 2"
LEARN = f"{RACES} --num-envs 2 --num-steps 16 --num-minibatches 2 --total-timesteps 64 --eval-interval 2"
CAR = """--rounds 1 --collect-frames 200 --vision-steps 2 --memory-steps 2 --population 4 --tracks 1 --generations 1
    --validation-tracks 1 --dream-generations 1 --dream-starts 1 --dream-steps 5 --eval-interval 1 --max-frames 60"""
SHORTER = {
    "ppo_tuxkart.py": LEARN,
    "ppo_tuxkart_resnet.py": f"{LEARN} --base-channels 8",
    "worldmodel_carracing.py": f"{CAR} {RACES}",
    "ppo_tuxkart.py --evaluate": RACES,
    "ppo_tuxkart_resnet.py --evaluate": RACES,
    "ppo_tuxkart_resnet.py --summary": "",
    "worldmodel_carracing.py --evaluate": f"{RACES} --max-frames 60",
    "worldmodel_carracing.py --dream": "--max-frames 60",
}
DRIVER = """import {module} as script
script.LAP_SECONDS = 4.0
if __name__ == "__main__":
    script.main()
"""
SET_UP = ("./install.sh", ".venv/bin/pip", ".venv/bin/pytest")
BLOCKS = {page: "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)) for page, text in TODAY.items()}
COMMANDS = [
    (page, line.strip())
    for page, block in BLOCKS.items()
    if page != "docs/tweaks.md"  # those are tried with their diffs
    for line in re.split(r"\n|&&", block.replace("\\\n", ""))
    if line.strip() and not line.strip().startswith(SET_UP)
]


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    (folder / "pretrained").symlink_to(ROOT / "pretrained")
    return folder


@slow
@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_command_runs(page, line, cwd):
    """As it stands there, only shorter; <name> is the newest run."""
    if "<name>" in line:
        newest = max((cwd / "runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
        line = line.replace("<name>", newest.parent.name)
    program, *words = shlex.split(line, comments=True)
    script = next(word for word in words if word.endswith(".py"))
    before, after = words[: words.index(script)], words[words.index(script) + 1 :]
    mode = next((flag for flag in ("--evaluate", "--dream", "--summary") if flag in after), "")
    options = SHORTER[f"{script} {mode}".strip()].split()
    if "--name" in after and (cwd / "runs" / after[after.index("--name") + 1]).exists():
        after[after.index("--name") + 1] += "-again"
    driver = cwd / f"short_{script}"
    driver.write_text(DRIVER.format(module=script[:-3]))
    runners = {".venv/bin/python": [], ".venv/bin/torchrun": ["-m", "torch.distributed.run"]}
    command = [sys.executable, *runners[program], *before, str(driver), *after, *options]
    finished = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]


PYTHON = [block for text in TODAY.values() for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


@slow
@pytest.mark.parametrize("block", PYTHON)
def test_every_python_example_runs(block, cwd):
    code = block.replace("1_000_000", "128") + "\nenv.close()\nprint(env.observation_space.shape)"
    finished = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert "(6, 64, 64)" in finished.stdout, finished.stdout + finished.stderr
