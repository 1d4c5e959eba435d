"""Every command line in the documents parses with the real parser; generated pages are what the code generates."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from library import option_table, options
from library.errors import ConfigError
from library.families import FAMILIES, get_family, script_of
from library.inference import parser_of

ROOT = Path(__file__).resolve().parent.parent
OF_A_RUN = {f"--{option.name}" for option in option_table.OPTIONS}
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "models").glob("*/README.md")),
]
LINES = [
    (page.name, line.strip())
    for page in PAGES
    for line in page.read_text(encoding="utf-8").splitlines()
    if re.match(r"\s*(python|accelerate launch|pip install|pytest|ruff)\b", line)
]


def test_there_are_command_lines():
    assert len(LINES) > 12


@pytest.mark.parametrize(("page", "line"), LINES)
def test_a_command_line_parses(page, line):
    for command in line.split(" && "):
        words = shlex.split(command, comments=True)
        script = next((word for word in words if word.endswith(".py")), None)
        if script is None:
            assert words[0] in ("pip", "pytest", "ruff") or words[:2] == ["python", "-m"], command
            continue
        assert (ROOT / script).is_file(), command
        rest = words[words.index(script) + 1 :]
        if script.endswith("train_network.py"):
            check_training(script, rest)
        elif script.endswith("_minimal_inference.py"):
            parser_of(get_family(family_of(script.removesuffix("_minimal_inference.py")))).parse_args(rest)
        else:
            text = (ROOT / script).read_text(encoding="utf-8")
            taken = of_a_run(rest) if "option_machinery.parse(" in text else set()  # some tools take a run's, too
            assert all(f'"{word}"' in text or word in taken for word in rest if word.startswith("--")), command


def of_a_run(words):
    """The options of a run, those of the family that the words name among them."""
    named = words[words.index("--model_type") + 1] if "--model_type" in words else None
    return OF_A_RUN | {f"--{option.name}" for option in (options.options_of(get_family(named)) if named else ())}


def family_of(stem):
    """The family whose scripts' names begin so."""
    return next(name for name in FAMILIES if script_of(name) == stem)


def check_training(script, words):
    """Parse as the script does; a configuration file that is the reader's own is left out."""
    stem = script.removesuffix("train_network.py").rstrip("_")
    family = family_of(stem) if stem else None
    if "--config_file" in words and not (ROOT / words[words.index("--config_file") + 1]).is_file():
        at = words.index("--config_file")
        words = words[:at] + words[at + 2 :]
        family = family or (None if "--model_type" in words else "z_image")  # which that file says
    try:
        options.parse(family, words, script)
    except SystemExit as stop:
        assert not stop.code
    except ConfigError as error:
        pytest.fail(str(error))


DATASETS = [
    (page.name, block)
    for page in PAGES
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    if "[[datasets]]" in block
]


@pytest.mark.parametrize(("page", "block"), DATASETS)
def test_a_dataset_description_is_read_strictly(page, block, tmp_path):
    from test_data import options as values

    from library.data.config import load_dataset_config

    (tmp_path / "data.toml").write_text(block, encoding="utf-8")
    assert load_dataset_config(values(dataset_config=str(tmp_path / "data.toml")))


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_tests_that_the_pages_of_promises_name_are_there():
    for page in ("reliability.md", "users_ask.md"):
        named = re.findall(r"(test_\w+\.py)::(test_\w+)", (ROOT / "docs" / page).read_text(encoding="utf-8"))
        assert len(named) > 60
        for file, name in set(named):
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{page}: {file}::{name}"


def test_the_option_list_is_the_one_that_the_code_generates():
    made = subprocess.run(
        [sys.executable, "-m", "library.option_table", "--markdown"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == made.stdout
