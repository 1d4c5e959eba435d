"""What is advised where a run does not fit: every advice is planned again by itself, with the options that it names."""

import functools
from dataclasses import replace

import pytest
from memory_support import deep_weights, toy_file
from studio_support import make_toy
from test_memory_swap_runs import MOST
from training_support import arguments, pictures, toy  # noqa: F401  (fixtures)

from library import options as option_machinery
from library.families import get_family
from library.memory import activations, advice, plan_table, planner
from library.memory.planner import Work

WORK = Work(512, 512, 1)
TRIALS = advice.Trials


@pytest.fixture(autouse=True)
def small_inputs_go_to_the_host(monkeypatch):
    monkeypatch.setattr(activations, "LEAST", 1 << 10)


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
def trials(options):
    """Shared, since each of its plans takes a second."""
    return TRIALS(options, options.family, WORK)


@functools.cache
def peak(options, work=WORK, **settings):
    """Of training, planned by itself."""
    planned = planner.Planner(options.replace(**settings), options.family, work)
    _, shape, extra = planned.latents()
    return planned.training(shape, trials(options).cond | extra)[0].peak


def advised(options, limit, **how):
    """The advice, what of it concerns the host, and the text."""
    plan = {"largest_batch": {"width": 512, "height": 512, "frames": 1, "batch": 1}, "notes": [],
            "device": {"peak_bytes": 0, "peak_phase": "text", "phases": dict.fromkeys(("text", "latents"), {"peak_bytes": 0})},
            "host": {"peak_bytes": 0}, "disk": {"cache_bytes": 0}}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advice, "Trials", lambda options, *_: trials(options))
        found = plan["advice"] = advice.fitting(options, options.family, WORK, plan, limit / 1e9, **how)
    return found, {n: v for n, v in found["settings"].items() if n in advice.BY_HOST}, plan_table.table(plan)


def test_swapped_blocks_then_block_inputs_then_both_go_to_the_host(parsed):
    """Each where what is before it does not do; every peak is that of a plan with these settings."""
    options = parsed()
    swapped, offloaded = peak(options, blocks_to_swap=MOST), peak(options, cpu_offload_checkpointing=True)
    both = peak(options, blocks_to_swap=MOST, cpu_offload_checkpointing=True)
    assert both < offloaded < swapped < peak(options)
    assert advised(options, swapped + 1)[1] == {"blocks_to_swap": MOST}
    found, settings, text = advised(options, (offloaded + swapped) // 2)
    assert found["fits"] and found["training_peak_bytes"] == offloaded
    assert settings == {"cpu_offload_checkpointing": True}
    assert "of block inputs cross the bus" in text and "last resort" not in text and "share one bus" not in text
    found, settings, text = advised(options, both + 1)
    assert found["fits"] and found["training_peak_bytes"] == both
    assert settings == {"cpu_offload_checkpointing": True, "blocks_to_swap": MOST}
    assert "share one bus" in text and "GB of weights cross" in text and "of block inputs cross" in text
    assert advised(options, both - 1)[0]["training_peak_bytes"] == both  # the least of all


def test_what_was_set_of_the_two_is_taken_back_or_stays(parsed):
    swapped, offloading = parsed("--blocks_to_swap", str(MOST)), parsed("--cpu_offload_checkpointing")
    offloaded = peak(parsed(), cpu_offload_checkpointing=True)
    found, settings, _ = advised(swapped, (offloaded + peak(parsed(), blocks_to_swap=MOST)) // 2)
    assert settings == {"blocks_to_swap": 0, "cpu_offload_checkpointing": True}
    assert found["training_peak_bytes"] == offloaded
    assert advised(offloading, offloaded - 1)[1] == {"blocks_to_swap": 3}  # two are in the ring
    assert advice.words({"cpu_offload_checkpointing": False, "blocks_to_swap": 3}) == (
        "--blocks_to_swap 3 without --cpu_offload_checkpointing"
    )


def test_text_encoders_are_held_in_8_bits_before_they_go_to_the_cpu(tmp_path):
    """The largest first, and only those that are needed; what is asked for already is not asked for again."""
    toml = make_toy("hidream", tmp_path / "toy")

    def trials(*extra):
        words = ["--config_file", str(toml), "--output_dir", str(tmp_path), "--cache_text_encoder_outputs", *extra]
        options = option_machinery.parse("hidream", words, "test")
        return advice.Trials(options, options.family, Work(64, 64))

    plain, one, two = (trials(*words).captions.peak for words in ((), ("--fp8_llm",), ("--fp8_llm", "--fp8_t5")))
    assert two < one < plain
    bare = trials()
    assert advice.text(bare, one) == ({"fp8_llm": True}, advice.FP8_TEXT)
    assert advice.text(bare, two)[0] == {"fp8_llm": True, "fp8_t5": True}
    assert advice.text(bare, two - 1) == ({"text_encoder_cpu": True}, advice.TEXT_ON_CPU)
    assert advice.text(trials("--fp8_llm"), two)[0] == {"fp8_t5": True}


def test_a_smaller_picture_is_the_last_resort_and_fits(parsed):
    options = parsed()
    limit = int(0.8 * peak(options, blocks_to_swap=MOST, cpu_offload_checkpointing=True))
    found, _, text = advised(options, limit, last_resort=True)
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
    """Trials whose peak is a line: twelve blocks of 2000 bytes, and a byte for every 1000 pixels of every frame."""

    LEAST = 4 * 2000  # two blocks that stay and two places of the ring

    def __init__(self, family, work):
        self.family, self.work, self.made = family, work, []

    def training(self, options, work):
        self.made.append(work)
        account = planner.Account(12 * 2000 + advice._pixels(work) // 1000, {"weights": 12 * 2000})
        facts = {"offloaded_bytes": 0, "most_blocks_to_swap": 10, "blocks": {"blocks": ([2000] * 12, 1)}}
        return planner.Planner(options, self.family, work), account, facts


def test_the_largest_that_fits_is_found_with_few_plans(parsed):
    """Frames are those that the family takes: Wan's are 4 k + 1; controls shrink with the picture."""
    family, options = get_family("wan"), parsed()
    line = Line(family, Work(640, 640, 1, 81, controls=((640, 640),)))
    assert [work.frames for work in advice.fewer_frames(line)] == list(range(77, 0, -4))
    limit = Line.LEAST + 640 * 640 * 51 // 1000  # 51 frames are none of Wan's, 49 are
    found = {"options": options, "settings": {}, "peak_bytes": Line.LEAST + 640 * 640 * 81 // 1000}
    frames, size = list(advice.smaller_items(line, found, limit))
    assert (frames["now"], frames["was"]) == (49, 81) and len(line.made) <= 8
    assert frames["settings"] == {"blocks_to_swap": 10} and frames["training_peak_bytes"] <= limit
    # sqrt(51 / 81) of the side is 508 pixels, in sixteenths of 640 it is 480
    assert size["now"] == "480x480" and line.made[-1].controls == ((480, 480),)
