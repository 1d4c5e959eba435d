"""The README's table of models says what the recorded results say, and these are what the tests of the families say."""

import json
import subprocess
import sys

import pytest
from training_support import ROOT

from library.errors import ConfigError
from library.families import FAMILIES
from tools import model_table


def test_the_readme_has_the_table_that_the_results_give():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert model_table.placed(page, model_table.table(model_table.results())) == page, (
        "python tools/model_table.py --write"
    )


def test_the_tests_that_columns_stand_for_exist_and_were_recorded_for_every_row():
    text = (ROOT / "tests" / "test_families.py").read_text(encoding="utf-8")
    wanted = {test for tests in model_table.COLUMNS.values() for test in tests}
    assert all(f"def test_{test}(" in text for test in wanted)
    for name, tests in model_table.results().items():
        assert name in FAMILIES and tests.keys() >= wanted, name


def test_a_cell_says_no_unless_all_its_tests_have_passed():
    results = model_table.results()
    some = {"sdxl": dict(results["sdxl"])}
    assert "| yes | yes | yes | yes | yes | yes |" in model_table.table(some)
    some["sdxl"][model_table.COLUMNS["LoRA"][1]] = "failed"
    some["sdxl"].pop(model_table.COLUMNS["base in fp8"][0])
    assert "| no | yes | no | yes | yes | yes |" in model_table.table(some)
    with pytest.raises(ConfigError, match="there is no family nobody"):
        model_table.table({"nobody": {}})


CASE = """
import pytest
@pytest.mark.parametrize("name", ["z_image"])
def test_something(name):
    pytest.skip("not today")
"""


@pytest.mark.parametrize(("recorded", "code"), [("passed", 1), ("skipped", 0)])
def test_a_run_fails_that_does_less_than_what_is_recorded(recorded, code, tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "test_families.py").write_text(CASE, encoding="utf-8")
    (folder / "results.json").write_text(json.dumps({"z_image": {"something": recorded}}), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == code, result.stdout
    assert ("says more than what passes: z_image: something" in result.stdout) == bool(code)
