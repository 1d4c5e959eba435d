"""What is advised where a run does not fit: every advice is planned again by itself, with the options that it names."""

import functools
from dataclasses import replace

import pytest
from memory_support import deep_weights, toy_file
from test_memory_swap_runs import MOST
from training_support import arguments, pictures, toy  # noqa: F401  (fixtures)

from library import options as option_machinery
from library.families import get_family
from library.memory import advice, plan_table, planner
from library.memory.planner import Work

WORK = Work(512, 512, 1)


@pytest.fixture(scope="module")
def parsed(toy, pictures, tmp_path_factory):  # noqa: F811
    """Options of a LoRA on a narrow toy with more blocks, whose pictures weigh more than its weights."""
    path = str(toy_file(tmp_path_factory.mktemp("deep"), deep_weights()))
    own = (
        "--pretrained_model_name_or_path",
        path,
        "--mixed_precision",
        "bf16",
        "--gradient_checkpointing",
        "--fp8_scaled",
    )

    @functools.cache
    def make(*extra):
        return option_machinery.parse("z_image", arguments(toy, pictures, path + ".out", *own, *extra), "test")

    return make


@functools.cache
def whole(options, work=WORK):
    return planner.make(options, options.family, work)


def peak(options, work=WORK, **settings):
    """Of training, by a whole plan of these options."""
    options = options.replace(**settings) if settings else options
    return whole(options, work)["device"]["phases"]["training"]["peak_bytes"]


def advised(options, limit, **how):
    plan = dict(whole(options))
    plan["advice"] = advice.fitting(options, options.family, WORK, plan, limit / 1e9, **how)
    return plan["advice"], plan_table.table(plan)


def test_block_inputs_go_to_the_host_where_all_swapped_blocks_do_not_do(parsed):
    options = parsed()
    swapped, offloaded = peak(options, blocks_to_swap=MOST), peak(options, cpu_offload_checkpointing=True)
    assert offloaded < swapped < peak(options)
    found, text = advised(options, (offloaded + swapped) // 2)
    assert found["fits"] and found["training_peak_bytes"] == offloaded
    settings = {name: found["settings"][name] for name in advice.BY_HOST if name in found["settings"]}
    assert settings == {"cpu_offload_checkpointing": True}
    assert "of block inputs cross the bus" in text and "last resort" not in text
    assert "blocks_to_swap" in advised(options, swapped + 1)[0]["settings"]  # swap first, where it does


def test_what_was_set_of_the_one_is_taken_back_for_the_other(parsed):
    swapped = parsed("--blocks_to_swap", str(MOST))
    offloaded = peak(parsed(), cpu_offload_checkpointing=True)
    found = advised(swapped, (offloaded + peak(swapped)) // 2)[0]
    assert found["settings"]["blocks_to_swap"] == 0 and found["settings"]["cpu_offload_checkpointing"] is True
    assert (
        peak(swapped, **{n: found["settings"][n] for n in advice.BY_HOST}) == offloaded == found["training_peak_bytes"]
    )
    assert advice.words({"cpu_offload_checkpointing": False, "blocks_to_swap": 3}) == (
        "--blocks_to_swap 3 without --cpu_offload_checkpointing"
    )


def test_a_smaller_picture_is_the_last_resort_and_fits(parsed):
    options = parsed()
    limit = int(0.8 * peak(options, cpu_offload_checkpointing=True))
    found, text = advised(options, limit, last_resort=True)
    (one,) = found["smaller"]
    assert not found["fits"] and one["kind"] == "resolution" and one["was"] == "512x512"
    width, height = map(int, one["now"].split("x"))
    assert 128 < width == height < 512
    settings = {name: value for name, value in one["settings"].items() if name in advice.BY_HOST}
    again = peak(options, replace(WORK, width=width, height=height), **settings)
    assert again == one["training_peak_bytes"] <= limit < found["training_peak_bytes"]
    assert f"last resort: {one['now']} instead of 512x512, with --" in text and "fine detail is not learnt" in text
    assert not advised(options, limit)[0]["smaller"]  # at the start of a run nobody waits for it
    assert not advised(options, 1000, last_resort=True)[0]["smaller"]


class Line(advice.Trials):
    """Trials whose peak is a line: 10 bytes of weights and a byte for every 1000 pixels of every frame."""

    def __init__(self, family, work):
        self.family, self.work, self.made = family, work, []

    def training(self, options, work):
        self.made.append(work)
        peak = 10 + advice._pixels(work) // 1000
        facts = {"checkpoint_bytes": 0, "most_blocks_to_swap": 0, "blocks": {}}
        return planner.Planner(options, self.family, work), planner.Account(peak), facts


def test_the_largest_that_fits_is_found_with_few_plans(parsed):
    """Frames are those that the family takes: Wan's are 4 k + 1; controls shrink with the picture."""
    family, options = get_family("wan"), parsed()
    line = Line(family, Work(640, 640, 1, 81, controls=((640, 640),)))
    assert [work.frames for work in advice.fewer_frames(line)] == list(range(77, 0, -4))
    limit = 10 + 640 * 640 * 51 // 1000  # 51 frames are none of Wan's, 49 are
    found = {"options": options, "settings": {}, "peak_bytes": 10 + 640 * 640 * 81 // 1000}
    frames, size = advice.smaller_items(line, found, limit)
    assert (frames["now"], frames["was"]) == (49, 81) and len(line.made) <= 8
    # sqrt(51 / 81) of the side is 508 pixels, in sixteenths of 640 it is 480
    assert size["now"] == "480x480" and line.made[-1].controls == ((480, 480),)
