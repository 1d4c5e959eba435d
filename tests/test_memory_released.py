"""Plans without files: every family, and every other released model of it, from its list of names and shapes."""

import tempfile
from pathlib import Path

import pytest
from training_support import called

from library import options as option_machinery
from library.errors import ConfigError
from library.families import FAMILIES
from library.memory import planner, released, swap_plan
from tools import memory_table

LORA = ["--output_dir", "x", "--mixed_precision", "bf16", "--network_module", "networks.lora"]


@pytest.mark.parametrize(
    "name", [*FAMILIES, *(n for n, row in released.index()["variants"].items() if row["family"] in FAMILIES)]
)
def test_every_part_is_there_and_is_what_it_is_taken_for(name):
    variant = released.index()["variants"].get(name)
    given = option_machinery.parse(variant["family"] if variant else name, LORA, "test")
    with released.completed(given, name if variant else None) as (options, family, notes):
        made = planner.Planner(options, family, planner.Work(64, 64))
        found = [made.sketch(part)[0] for part in family.parts]
        assert len(notes) == len(family.parts) and all(sketch.stored_bytes > 1e6 for sketch in found)
    assert not found[0].path.exists()


def test_an_encoder_that_is_optional_is_planned_unless_the_others_are_named():
    """SD3 is released with three text encoders; whoever names the two CLIPs alone trains without T5."""
    given = option_machinery.parse("sd3", [*LORA, "--t5xxl_max_token_length", "77"], "test")
    with released.completed(given) as (_, family, _):
        assert [part.name for part in family.text_encoders] == ["clip_l", "clip_g", "t5xxl"]
    with tempfile.TemporaryDirectory() as folder:
        path = str(released.write("te_clip_l", Path(folder)))
        with released.completed(option_machinery.parse("sd3", [*LORA, "--clip_l", path], "test")) as (_, family, _):
            assert [part.name for part in family.text_encoders] == ["clip_l", "clip_g"]


@pytest.fixture(scope="module")
def rows():
    """Name -> the cells of its row in docs/memory.md."""
    page = memory_table.PAGE.read_text(encoding="utf-8")
    return {name: [cell.strip() for cell in line.split("|")[1:-1]] for name, line in memory_table.rows_of(page).items()}


def test_the_table_has_every_family_and_every_released_model(rows):
    left = sorted(set(memory_table.names()) - rows.keys())
    assert not left, f"python tools/memory_table.py {' '.join(map(repr, left))}"
    assert list(rows) == [name for name in memory_table.names() if name in rows]


def test_a_row_is_what_the_tool_says(rows):
    assert memory_table.row("sd").split(" | ") == f"| {' | '.join(rows['sd'])} |\n".split(" | ")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_largest_number_of_swapped_blocks_is_the_stated_one(name, rows):
    stated = rows[name][6].partition("(")[2].rstrip(")")
    with released.completed(option_machinery.parse(name, LORA, "test")) as (options, family, _):
        swap_plan.check(family, options.replace(blocks_to_swap=int(stated)))
        with pytest.raises(
            ConfigError, match=f"--blocks_to_swap {int(stated) + 1}: .* at most {stated} can be swapped"
        ):
            swap_plan.check(family, options.replace(blocks_to_swap=int(stated) + 1))


def test_a_file_has_the_published_names_and_takes_no_room(tmp_path):
    from library.checkpoints import Checkpoint

    path = released.write("z_image", tmp_path)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.shapes["noise_refiner.0.attention.qkv.weight"] == (11520, 3840)
    assert path.stat().st_size > 12e9 > 1e8 > path.stat().st_blocks * 512


def test_unknown_models_are_one_sentence():
    given = option_machinery.parse("z_image", LORA, "test")
    with pytest.raises(ConfigError, match="--released nonsense is no released z_image .known: only the usual one"):
        released.completed(given, "nonsense").__enter__()
    done = called("tools/plan.py", "--model_type", "flux", "--released", "flux_context")
    assert done.returncode == 2 and "did you mean 'flux_kontext'" in done.stderr
