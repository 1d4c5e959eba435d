"""The memory plan against real runs, for every listed family: a LoRA of rank 4 on its toy, with checkpointing."""

import json

import pytest
import torch
from PIL import Image
from studio_support import make_toy
from test_memory_plan import real_peak

from library import diffusion, options
from library.families import FAMILIES
from library.memory import plan_table, planner
from library.preflight import check

torch.set_num_threads(1)
SIDE = 128


@pytest.fixture(scope="module")
def two_pictures(tmp_path_factory):
    """Two pictures with captions of one length, a batch; the dataset file."""
    folder = tmp_path_factory.mktemp("two")
    for k in range(2):
        Image.new("RGB", (SIDE, SIDE), (90 * k, 120, 40)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"a picture of thing {k}", encoding="utf-8")
    path = folder.with_name("two.toml")
    path.write_text(
        f"[[datasets]]\nresolution = {SIDE}\nbatch_size = 2\n"
        f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(folder))}\ncaption_extension = '.txt'\n",
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_of_a_family_is_within_a_tenth_of_the_real_peak(name, two_pictures, tmp_path, monkeypatch):
    """The peak, and what of it is not frozen weights. Two steps: the optimizer's states are there in the second.

    The plan counts the batch's text, a copy on a device; a run on a CPU reads it where it is cached.
    """
    toy = make_toy(name, tmp_path / "toy")
    words = ["--config_file", str(toy), "--dataset_config", str(two_pictures), "--output_dir", str(tmp_path / "out"),
             "--output_name", "run", "--cache_latents", "--cache_text_encoder_outputs", "--gradient_checkpointing",
             "--max_train_steps", "2"]  # fmt: skip
    given = options.parse(name, words, "test")
    found = check(given, lambda text: None)
    work = plan_table.largest(found.dataset)
    assert (work.width, work.height, work.batch) == (SIDE, SIDE, 2)
    made = planner.make(given, found.family, work, accelerator=False)
    plan, text = made["device"]["phases"]["training"], made["host"]["cached_text_bytes"]
    peak, weights = real_peak(given, monkeypatch), plan["weights_bytes"]
    assert plan["peak_bytes"] == pytest.approx(peak, rel=0.1)
    assert plan["peak_bytes"] - weights == pytest.approx(peak - weights + text, rel=0.1)


def test_a_plan_leaves_no_table_without_values_behind(two_pictures, tmp_path):
    """The schedule of noise is kept from its first use on, which a plan may be."""
    diffusion.alpha_bar.cache_clear()
    toy = make_toy("sd", tmp_path / "toy")
    words = ["--config_file", str(toy), "--dataset_config", str(two_pictures), "--output_dir", str(tmp_path / "out")]
    given = options.parse("sd", words, "test")
    planner.make(given, check(given, lambda text: None).family, planner.Work(64, 64), accelerator=False)
    assert 0 < diffusion.alpha_bar(False)[-1].item() < diffusion.alpha_bar(False)[0].item() < 1
