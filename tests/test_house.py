"""The shape of the house: imports point one way, no family is named outside families, sizes stay readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [p for p in ROOT.rglob("*.py") if not {"build", ".venv", "venv"} & set(p.relative_to(ROOT).parts)]
CODE = [p for p in SOURCES if p.relative_to(ROOT).parts[0] in ("library", "networks", "tools") or p.parent == ROOT]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def part(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_imports_point_one_way():
    wrong = []
    for path in CODE:
        here = part(path)
        for name in imports(path):
            top = name.split(".")[0]
            if top == "tools" and not here.startswith("tools"):
                wrong.append(f"{here} imports {name}")
            if here.startswith(("library.families.", "library.components.")) and (
                top in ("train_network", "networks")
                or (name.startswith("library.families.") and name != "library.families.family")
            ):
                wrong.append(f"{here} imports {name}")
            if (
                here.startswith("networks")
                and name.startswith("library.families.")
                and name != "library.families.family"
            ):
                wrong.append(f"{here} imports {name}")
    runtime_only = [w for w in wrong if "train_network" not in w or "families" in w]
    assert not runtime_only, runtime_only


def test_no_family_is_named_outside_the_families():
    for path in CODE:
        if part(path).startswith(("library.families", "library.components", "tools.base_model")):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node)
                assert "family.name" not in text and "model_type ==" not in text, f"{part(path)}:{node.lineno} {text}"


def test_functions_and_files_stay_small():
    long = []
    for path in CODE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > 500 and not path.name.endswith("_table.py"):
            long.append(f"{part(path)}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60:
                long.append(f"{part(path)}.{node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert not long, long


SCRIPTS = sorted(p.name for p in ROOT.glob("*.py") if p.name != "setup.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_neither_torch_nor_diffusers(script):
    code = (
        f"import sys, runpy; sys.argv = [{script!r}, '--help']\n"
        f"try:\n    runpy.run_path({script!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--learning_rate" in done.stdout or "--prompt" in done.stdout
