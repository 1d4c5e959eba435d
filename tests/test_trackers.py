"""Trackers: names and folders as sd-scripts has them, their own arguments from a file."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import library.families
from library import options, trackers
from library.errors import ConfigError
from library.objective import FLOW


@pytest.fixture
def parse(monkeypatch):
    toy = SimpleNamespace(
        name="toy",
        title="Toy",
        defaults={},
        options=(),
        save_formats=("comfy",),
        objective=FLOW,
        text_prefixes=(),
        tokenizers=(),
        parts=(),
    )
    monkeypatch.setitem(library.families.FAMILIES, "toy", "unused:UNUSED")
    monkeypatch.setattr(library.families, "get_family", lambda name: toy)
    return lambda *words: options.parse("toy", [str(word) for word in words])


def test_the_folder_is_prefix_and_time_below_logging_dir(parse):
    o = parse("--log_with", "tensorboard", "--logging_dir", "logs", "--log_prefix", "a-")
    assert re.fullmatch(r"a-\d{14}", Path(trackers.project_dir(o)).name)
    assert Path(trackers.project_dir(o)).parent == Path("logs")
    assert trackers.tracker_names(o) == ["tensorboard"]
    assert (trackers.project_dir(parse()), trackers.tracker_names(parse())) == (None, [])


def test_arguments_of_a_tracker_come_from_its_table(parse, tmp_path):
    path = tmp_path / "t.toml"
    path.write_text("[wandb]\nentity = 'me'\n", encoding="utf-8")
    o = parse("--log_with", "wandb", "--log_tracker_config", path, "--wandb_run_name", "first")
    assert trackers.init_arguments(o) == {
        "project_name": "network_train",
        "init_kwargs": {"wandb": {"entity": "me", "name": "first"}},
    }


@pytest.mark.parametrize("text", ["[wandbb]\nentity = 'me'", "entity = 'me'", "[tensorboard]\nflush_secs = 3"])
def test_a_table_that_no_tracker_reads_is_refused(parse, tmp_path, text):
    path = tmp_path / "t.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no table of a tracker of --log_with wandb \(\[wandb\]\)"):
        trackers.init_arguments(parse("--log_with", "wandb", "--log_tracker_config", path))


def test_a_tracker_that_is_not_installed_gives_the_pip_line(parse, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        trackers.check(parse("--log_with", "wandb"))
