"""Cosmos 1.0 as a whole: its videos and its loss against diffusers' pipeline and scheduler, its few sizes and lengths."""

from types import SimpleNamespace

import pytest
import torch
from oracles import relative
from PIL import Image
from safetensors.torch import load_file
from studio_support import batched_and_one_by_one, make_toy, pair_of, start_of, words_of

from library import options, sample
from library.checkpoints import check_part, load_part
from library.data.dataset import prepare
from library.errors import ConfigError
from library.families import get_family
from library.families.cosmos import FRAMES, SIZES
from library.families.family import Text
from library.inference import Studio, parser_of, settle
from library.preflight import check_parts
from library.prompts import defaults_of, parse_line, timed

FAMILY = get_family("cosmos")
SHAPE = (16, 2, 8, 4)  # of 9 frames of 32 x 64


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy("cosmos", tmp_path_factory.mktemp("toys") / "cosmos")


@pytest.fixture(scope="module")
def studio(toy):
    words = [*words_of(toy), "--save_path", "x.mp4", "--prompt", "x", "--device", "cpu", "--i_know_what_i_am_doing"]
    arguments = parser_of(FAMILY).parse_args(words)
    family, _ = check_parts(FAMILY, arguments)
    settle(arguments, family)
    return Studio(family, arguments)


class Padded(torch.nn.Module):
    """diffusers' transformer with the channel that says where a picture is padded, without torchvision."""

    def __init__(self, model):
        super().__init__()
        self.model, self.dtype, self.device = model, torch.float32, torch.device("cpu")
        self.config = SimpleNamespace(in_channels=16)

    def forward(self, hidden_states, padding_mask, **inputs):
        assert not padding_mask.any()
        return self.model(hidden_states=torch.cat([hidden_states, torch.zeros_like(hidden_states[:, :1])], 1), **inputs)


class Guard(torch.nn.Module):
    """In place of the guardrail, which would be downloaded."""

    device = torch.device("cpu")

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video


@pytest.fixture(scope="module")
def pipeline(studio):
    from diffusers import CosmosTextToWorldPipeline, EDMEulerScheduler

    (encoder,), (tokenizer,) = studio.encoders
    out = CosmosTextToWorldPipeline(
        text_encoder=encoder, tokenizer=tokenizer, transformer=Padded(studio.denoiser), vae=studio.vae,
        scheduler=EDMEulerScheduler(), safety_checker=Guard(),
    )  # fmt: skip
    out.set_progress_bar_config(disable=True)
    return out


@pytest.mark.parametrize("caption", ["a red cat", "", "the picture of a black dog " * 200])
def test_text_is_what_diffusers_pipeline_encodes(studio, pipeline, caption):
    with torch.no_grad():
        theirs = pipeline._get_t5_prompt_embeds(caption, device="cpu")[0]
        ours = FAMILY.encode(*studio.encoders, Text(caption), "cpu")["text"]
    assert len(theirs) == 512 and not theirs[len(ours) :].any()
    assert relative(ours, theirs[: len(ours)]) < 1e-5


def test_a_video_is_the_one_that_diffusers_pipeline_makes(studio, pipeline):
    """The pipeline's latents have the noise added to the data, ours are mixed; both end at the data."""
    cond, uncond = pair_of(studio, "a red cat --n blurry")
    ours = sample.generate_latents(
        studio.family, studio.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=5, scale=8.0, shift=1.0, device="cpu"
    )
    given = {"height": 64, "width": 32, "num_frames": 9, "num_inference_steps": 5, "guidance_scale": 7.0, "fps": 24}
    with torch.no_grad():
        theirs = pipeline("a red cat", "blurry", latents=start_of(SHAPE, 5), output_type="latent", **given).frames
    assert relative(ours, theirs) < 1e-4


@pytest.mark.parametrize("level", [0.01, 0.3, 1.0, 7.0, 60.0])
def test_the_loss_is_edms_of_the_data_that_diffusers_scheduler_makes_of_the_prediction(studio, level):
    """(s^2 + 1/4) / (s / 2)^2 |D - x0|^2, as the released trainer has it."""
    from diffusers import EDMEulerScheduler

    scheduler, model, objective = EDMEulerScheduler(), studio.denoiser, FAMILY.objective
    cond = pair_of(studio, "a red cat")[0]
    x0, noise, sigma = torch.randn(1, *SHAPE) / 2, torch.randn(1, *SHAPE), torch.tensor([level / (1 + level)])
    with torch.no_grad():
        noisy = objective.noisy(x0, noise, sigma)
        guess, goal = objective.compare(
            FAMILY.predict(model, noisy, sigma, [cond]), objective.target(x0, noise, sigma, None), noisy, sigma, None
        )
        x = x0 + level * noise
        text = torch.nn.functional.pad(cond["text"], (0, 0, 0, 512 - len(cond["text"])))[None]
        seen = torch.cat([scheduler.precondition_inputs(x, level), torch.zeros_like(x[:, :1])], 1)
        time = scheduler.precondition_noise(torch.tensor([level]))
        out = model(seen, time, text, fps=24, return_dict=False)[0]
        data = scheduler.precondition_outputs(x, out, level)
    theirs = (level**2 + 0.25) / (0.5 * level) ** 2 * (data - x0).square().mean()
    assert float((guess - goal).square().mean()) == pytest.approx(float(theirs), rel=1e-4)


def test_noise_levels_are_log_normal():
    chosen = SimpleNamespace(**{name: None for name in ("min_timestep", "max_timestep")}, timestep_sampling="sigmoid",
                             sigmoid_scale=1.0, discrete_flow_shift=1.0, weighting_scheme="none", logit_mean=0.0,
                             logit_std=1.0, mode_scale=1.29)  # fmt: skip
    sigma = FAMILY.objective.sigma(torch.linspace(0, 1, 20_001)[1:-1], 1, chosen)
    levels = (sigma / (1 - sigma)).log()
    assert float(levels.mean()) == pytest.approx(0, abs=1e-2) and float(levels.std()) == pytest.approx(1, abs=1e-2)


def test_a_batch_of_captions_of_different_lengths_is_two_batches_of_one(studio):
    conds = [pair_of(studio, caption)[0] for caption in ("a cat", "the picture of a house and a dog")]
    both, each = batched_and_one_by_one(studio, conds, SHAPE)
    assert relative(both, each) < 1e-5


def test_the_pt_file_of_the_release_loads_as_the_safetensors_file_does(toy, tmp_path):
    weights = load_file(toy.with_name("denoiser.safetensors"))
    torch.save(weights | {"net.logvar.0.freqs": torch.ones(4)}, tmp_path / "model.pt")
    assert "comfy names" in check_part(FAMILY.denoiser, str(tmp_path / "model.pt"), "--x")
    model = load_part(FAMILY.denoiser, tmp_path / "model.pt", dtype=torch.float32)
    wanted = load_part(FAMILY.denoiser, toy.with_name("denoiser.safetensors"), dtype=torch.float32).state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    assert set(model.binding.extras) == {"logvar.0.freqs"}


# ---------------------------------------------------------------- sizes and lengths


def dataset_of(tmp_path, toy, *words, lines="resolution = [1280, 704]", subset=""):
    """Pictures of several proportions, as a run prepares them."""
    folder = tmp_path / "pictures"
    folder.mkdir(exist_ok=True)
    for k, size in enumerate(((1000, 1000), (1600, 900), (600, 1000), (900, 700), (80, 100))):
        Image.new("RGB", size, (k * 40, 0, 0)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text("a cat")
    data, names = tmp_path / "data.toml", sorted(path.name for path in folder.glob("*.png"))
    listed = "\n".join(f'{{"image_path": "{name}", "caption": "x"}}' for name in names)
    (tmp_path / "list.jsonl").write_text(listed)
    data.write_text(
        f"[[datasets]]\n{lines}\n[[datasets.subsets]]\nimage_dir = {str(folder)!r}\ncaption_extension = '.txt'\n{subset}\n"
    )
    named = {name: value for name, value in zip(words_of(toy)[::2], words_of(toy)[1::2], strict=True)}
    argv = [word for pair in named.items() for word in pair]
    argv += ["--dataset_config", str(data), "--output_dir", str(tmp_path), "--network_module", "networks.lora", *words]
    chosen = options.parse("cosmos", argv, "test")
    family = FAMILY.resolved(chosen)
    return prepare(chosen, family, family.pixel_multiple)


def test_every_picture_gets_the_nearest_of_the_five_sizes(tmp_path, toy):
    dataset = dataset_of(tmp_path, toy, lines="resolution = [1280, 704]\nenable_bucket = true")
    assert [item.bucket[:2] for item in dataset.items] == [
        (960, 960), (1280, 704), (704, 1280), (960, 704), (704, 960),
    ]  # fmt: skip
    assert {item.bucket[:2] for item in dataset_of(tmp_path, toy).items} == {(1280, 704)}


@pytest.mark.parametrize(
    ("lines", "subset", "told"),
    [
        ("resolution = 512", "", "resolution 512x512"),
        ("resolution = 960\nenable_bucket = true\nbucket_no_upscale = true", "", "bucket_no_upscale"),
        ("resolution = 960", "target_frames = [1, 33]\nmetadata_file = 'list.jsonl'", "target_frames 33"),
    ],
)
def test_other_sizes_and_lengths_are_refused_unless_the_user_insists(tmp_path, toy, lines, subset, told):
    with pytest.raises(ConfigError, match=told) as caught:
        dataset_of(tmp_path, toy, lines=lines, subset=subset)
    assert "\n" not in str(caught.value)
    insisted = dataset_of(tmp_path, toy, "--i_know_what_i_am_doing", lines=lines, subset=subset)
    assert insisted.items


def test_a_prompt_gets_a_picture_or_five_seconds():
    prompts = [parse_line(line, "x", defaults_of(FAMILY)) for line in ("a", "a --f 33", "a --f 400")]
    assert [prompt.frame_count for prompt in timed(prompts, FAMILY, 1)] == [121, 1, 121]
    assert FRAMES == (1, 121) and all(w % 16 == h % 16 == 0 for w, h in SIZES)
