"""Cosmos-Predict2 as a whole: its text and its pictures against diffusers' pipeline, NVIDIA's .pt files, its advice."""

import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from oracles import relative
from safetensors.torch import load_file
from studio_support import batched_and_one_by_one, make_toy, pair_of, start_of, studio_of

from library import options, sample
from library.checkpoints import check_part, load_part
from library.errors import ConfigError
from library.families import get_family
from library.families.family import Text

FAMILY = get_family("cosmos_predict2")
SHAPE = (16, 6, 4)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy("cosmos_predict2", tmp_path_factory.mktemp("toys") / "cosmos_predict2")


@pytest.fixture(scope="module")
def studio(toy):
    return studio_of(toy)


class Padded(torch.nn.Module):
    """diffusers' transformer with the channel that says where a picture is padded, without torchvision."""

    def __init__(self, model):
        super().__init__()
        self.model, self.dtype, self.device = model, torch.float32, torch.device("cpu")
        self.config = SimpleNamespace(in_channels=16)

    def forward(self, hidden_states, padding_mask, **inputs):
        assert not padding_mask.any()
        padded = torch.cat([hidden_states, torch.zeros_like(hidden_states[:, :1])], 1)
        return self.model(hidden_states=padded, **inputs)


class Guard(torch.nn.Module):
    """In place of the guardrail, which would be downloaded."""

    device = torch.device("cpu")

    def check_text_safety(self, prompt):
        return True


@pytest.fixture(scope="module")
def pipeline(studio):
    from diffusers import Cosmos2TextToImagePipeline, FlowMatchEulerDiscreteScheduler

    (encoder,), (tokenizer,) = studio.encoders
    out = Cosmos2TextToImagePipeline(
        text_encoder=encoder, tokenizer=tokenizer, transformer=Padded(studio.denoiser), vae=studio.vae,
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), safety_checker=Guard(),
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
    cut = FAMILY.tokenize(studio.encoders[1], caption)[1]
    assert bool(cut) == (len(caption) > 1000) and caption.endswith(cut)


def test_a_picture_is_the_one_that_diffusers_pipeline_makes(studio, pipeline):
    """It stops at the noise level 0.002 (its last step goes nowhere); our last step leads from there to the data."""
    steps, objective = 6, studio.family.objective
    short = replace(objective, times=lambda *given: objective.times(*given)[:-1])
    cond, uncond = pair_of(studio, "a red cat --n blurry")
    ours = sample.generate_latents(
        replace(studio.family, objective=short), studio.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=steps,
        scale=8.0, shift=1.0, device="cpu",
    )  # fmt: skip
    theirs = pipeline(
        "a red cat", "blurry", height=48, width=32, num_inference_steps=steps, guidance_scale=7.0,
        latents=start_of(SHAPE, 5)[:, :, None], output_type="latent",
    ).images  # fmt: skip
    assert relative(ours * 1.002, theirs) < 1e-4
    times = objective.times(steps, 1.0, 0)
    assert times[0] == pytest.approx(80 / 81) and times[-2] == pytest.approx(0.002 / 1.002) and times[-1] == 0


def test_a_batch_of_captions_of_different_lengths_is_two_batches_of_one(studio):
    conds = [pair_of(studio, caption)[0] for caption in ("a cat", "the picture of a house and a dog")]
    both, each = batched_and_one_by_one(studio, conds, SHAPE)
    assert relative(both, each) < 1e-5


def test_the_pt_file_of_the_release_loads_as_the_safetensors_file_does(toy, tmp_path):
    """NVIDIA's files hold counters and states of its training besides, and some lie in a table of their own."""
    weights = load_file(toy.with_name("denoiser.safetensors"))
    wanted = load_part(FAMILY.denoiser, toy.with_name("denoiser.safetensors"), dtype=torch.float32).state_dict()
    more = {"net.accum_iteration": torch.tensor(7), "net.blocks.0.self_attn.q_norm._extra_state": torch.zeros(3)}
    for name, content in (("bare", weights | more), ("wrapped", {"model": weights, "iteration": 7})):
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        assert "comfy names" in check_part(FAMILY.denoiser, str(path), "--x")
        model = load_part(FAMILY.denoiser, path, dtype=torch.float32)
        assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
        assert set(model.binding.extras) == {key.removeprefix("net.") for key in more if key in content}


class Trap:
    """What a harmful file does when it is read."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return (open, (str(self.witness), "w"))


def damaged(path, kind, weights):
    if kind == "code":
        torch.save(weights | {"net.x": Trap(path.with_name("witness"))}, path)
    elif kind == "a bare pickle":
        path.write_bytes(pickle.dumps(Trap(path.with_name("witness"))))
    elif kind == "no tensors":
        torch.save({"config": {"layers": 3}}, path)
    else:
        torch.save(weights, path)
        path.write_bytes(path.read_bytes()[:-2000])


@pytest.mark.parametrize("kind", ["code", "a bare pickle", "no tensors", "truncated"])
def test_a_pt_file_that_is_more_or_less_than_tensors_is_one_sentence_and_runs_nothing(toy, tmp_path, kind):
    path = tmp_path / "model.pt"
    damaged(path, kind, load_file(toy.with_name("denoiser.safetensors")))
    with pytest.raises(ConfigError, match="model.pt") as caught:
        check_part(FAMILY.denoiser, str(path), "--pretrained_model_name_or_path")
    assert "\n" not in str(caught.value) and not (tmp_path / "witness").exists()


def test_a_folder_is_never_searched_for_a_pt_file(toy, tmp_path):
    torch.save(load_file(toy.with_name("denoiser.safetensors")), tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="no safetensors file"):
        check_part(FAMILY.denoiser, str(tmp_path), "--pretrained_model_name_or_path")


@pytest.mark.parametrize(("words", "is_warned"), [
    ([], False), (["--fp8_base"], False), (["--fp8_base", "--fp8_format", "e4m3"], True),
    (["--fp8_scaled", "--fp8_format", "e4m3"], True),
])  # fmt: skip
def test_e5m2_is_the_default_and_e4m3_is_warned_about(toy, words, is_warned):
    o = options.parse("cosmos_predict2", ["--config_file", str(toy), *words], "test")
    assert o.fp8_format == ("e4m3" if "e4m3" in words else "e5m2")
    assert bool(FAMILY.advice(o)) == is_warned


def test_a_text_encoder_of_another_width_or_kind_is_one_sentence_before_anything_loads(toy, tmp_path):
    from library.checkpoints import save
    from tools.make_toy_model import part_shapes, weights
    from tools.toy_parts import old_t5, t5

    for made, message in ((old_t5(32, 90), "its states are 32 wide"), (t5(64, 90), "not an old T5-11B")):
        file = tmp_path / "t5.safetensors"
        save(weights(part_shapes(FAMILY.text_encoders[0], made[0]), 0), file)
        with pytest.raises(ConfigError, match=message):
            studio_of(toy, t5xxl=str(file))
