"""Prints how large everything is beside what it may be, and fails where something is larger.

python tests/sizes.py
"""

import ast
import dataclasses
import importlib
import io
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
NESTING = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# script: its lines (None: 100 more than ppo_tuxkart.py), flags, definitions, the line before which its network begins
SCRIPTS = {
    "ppo_tuxkart": (1100, 40, 60, 550),
    "ppo_tuxkart_resnet": (1350, 50, None, None),
    "ppo_tuxkart_lstm": (None, 40, None, None),
    "worldmodel_carracing": (1090, 32, None, None),
}


# What is still larger than that, and by how much it may be: none of it may grow, and each line here is to go
NOT_YET = {
    "ppo_tuxkart.py, lines": 1426,
    "ppo_tuxkart.py, definitions": 70,
    "ppo_tuxkart_resnet.py, lines": 1732,
}


def depth(node: ast.AST) -> int:
    """Levels of nesting below a node; an elif is no level of its own, nor is a function in a function."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            continue
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        level = isinstance(child, NESTING) and not is_elif
        deepest = max(deepest, level + depth(child))
    return deepest


def flags(name: str) -> int:
    """How many settings --help shows."""
    fields = dataclasses.fields(importlib.import_module(name).Args)
    return sum(not hasattr(field.type, "__metadata__") for field in fields)  # tyro.conf.Suppress leaves a mark


def measure_script(name: str) -> dict[str, tuple[float, float]]:
    lines, most_flags, definitions, network = SCRIPTS[name]
    text = (ROOT / f"{name}.py").read_text()
    tree = list(ast.walk(ast.parse(text)))
    rows = text.splitlines()
    lines = lines or 100 + len((ROOT / "ppo_tuxkart.py").read_text().splitlines())
    functions = [node for node in tree if isinstance(node, FUNCTIONS)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    depths = {node.name: depth(node) for node in functions}
    longest, deepest = max(lengths.keys() - {"train"}, key=lengths.get), max(depths, key=depths.get)
    classes = {node.name: node.lineno for node in tree if isinstance(node, ast.ClassDef)}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = {
        "lines": (len(rows), lines),
        "longest line": (max(map(len, rows)), 120),
        "share of lines over 100": (sum(len(row) > 100 for row in rows) / len(rows), 0.05),
        "flags": (flags(name), most_flags),
        f"longest function, {longest}": (lengths[longest], 70),
        "train": (lengths["train"], 109),
        f"deepest nesting, {deepest}": (depths[deepest], 3),
        "semicolons": (sum(token.string == ";" for token in tokens), 0),
    }
    if definitions:
        found["definitions"] = (len(functions) + len(classes), definitions)
    if network:
        found["the network's first line"] = (classes["Agent"], network - 1)
    return {f"{name}.py, {what}": numbers for what, numbers in found.items()}


def measure() -> dict[str, tuple[float, float]]:
    """Of everything how large it is, and how large it may be."""
    found = {}
    for name in SCRIPTS:
        found.update(measure_script(name))
    for name, most in (("ppo_tuxkart_resnet.py", 400), ("ppo_tuxkart_lstm.py", 150)):
        rows = subprocess.run(["diff", "ppo_tuxkart.py", name], cwd=ROOT, capture_output=True, text=True).stdout
        changes = sum(row[0] in "<>" for row in rows.splitlines())
        found[f"{name}, lines that ppo_tuxkart.py has otherwise"] = (changes, most)
    readme = (ROOT / "README.md").read_bytes()
    found["README.md, lines"] = (readme.count(b"\n"), 230)
    found["README.md, bytes"] = (len(readme), 16 * 1024)
    for folder, most in (("tests", 2700), ("bench", 1500)):
        counts = [file.read_bytes().count(b"\n") for file in (ROOT / folder).glob("**/*.py")]
        found[f"{folder}/*.py, lines"] = (sum(counts), most)
    files = [file.stat().st_size for file in (ROOT / "bench" / "results").rglob("*") if file.is_file()]
    found["bench/results, bytes"] = (sum(files), 3_000_000)
    return found


def main() -> None:
    too_large = 0
    for what, (size, most) in measure().items():
        allowed = max(most, NOT_YET.get(what, 0))
        word = "TOO LARGE" if size > allowed else "not yet" if size > most else ""
        print(f"{what:60}{size:>12.5g} of {most:>9.7g}  {word}")
        too_large += size > allowed
    if too_large:
        sys.exit(f"{too_large} are too large.")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
