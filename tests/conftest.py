"""Shared by all tests: the repository on the path, one thread each, where outside oracles may lie.

And tests/results.json, what tests/test_families.py says of every family: `--record` writes it, every other run holds it
against what happens, so that the README's table (tools/model_table.py) can say no more than what passes.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "tests" / "results.json"
# The longest files begin first and the many short groups last, so that no process is left with a long one at the end.
ORDER = {"test_memory_plan_families": 0, "test_memory_plan_advice": 0, "test_memory_compiled": 0, "test_families": 2}
outcomes: dict[str, dict[str, str]] = {}  # family -> test -> passed, failed, skipped


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write what the families' tests say to tests/results.json")


def pytest_collection_modifyitems(items):
    """What one process runs together: a file, whose fixtures are made once, and of one file each family."""
    for item in items:
        module, found = item.path.stem, re.search(r"\[(\w+)\]", item.name)
        own = found[1] if module == "test_families" and found else ""
        item.add_marker(pytest.mark.xdist_group(f"{module} {own}".strip()))
    items.sort(key=lambda item: ORDER.get(item.path.stem, 1))


@pytest.fixture(autouse=True)
def _no_mode_is_left():
    """A dispatch mode that a test leaves behind slows every later one of its process and keeps torch's compiler off."""
    yield
    if "torch" in sys.modules:
        assert not sys.modules["torch"].utils._python_dispatch._get_current_dispatch_mode_stack()


def pytest_runtest_logreport(report):
    found = re.fullmatch(r"tests/test_families\.py::test_(\w+)\[(\w+)\](@.*)?", report.nodeid)  # @ and its group
    if found and (report.when == "call" or report.outcome != "passed"):
        outcomes.setdefault(found[2], {})[found[1]] = report.outcome


def pytest_sessionfinish(session, exitstatus):
    if not outcomes or hasattr(session.config, "workerinput"):  # the process that shares out the tests sees them all
        return
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    if session.config.getoption("--record"):
        text = (RESULTS.parent / "test_families.py").read_text(encoding="utf-8")
        for family, tests in outcomes.items():
            all_of_it = {**known.get(family, {}), **tests}
            known[family] = {t: outcome for t, outcome in sorted(all_of_it.items()) if f"def test_{t}(" in text}
        RESULTS.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")
        return
    claimed = [
        f"{family}: {test}"
        for family, tests in outcomes.items()
        for test, outcome in tests.items()
        if outcome != "passed" and known.get(family, {}).get(test) == "passed"
    ]
    if claimed:
        print(f"\ntests/results.json says more than what passes: {', '.join(claimed[:3])}")
        session.exitstatus = 1
