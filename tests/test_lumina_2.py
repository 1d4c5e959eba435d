"""Lumina Image 2.0 as a whole: its system prompt, its pictures, its files and its LoRA in diffusers' pipeline."""

import pytest
import torch
from oracles import relative
from safetensors.torch import load_file, save_file
from studio_support import batched_and_one_by_one, make_toy, pair_of, start_of, studio_of, words_of
from training_support import arguments, pictures  # noqa: F401

from library import options, sample
from library.errors import ConfigError
from library.families import get_family
from library.families.family import Text
from library.families.lumina_2 import START, SYSTEM_PROMPT
from library.inference import parser_of
from library.strategies import Request
from train_network import NetworkTrainer

FAMILY = get_family("lumina_2")
SHAPE = (16, 6, 4)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy("lumina_2", tmp_path_factory.mktemp("toys") / "lumina_2")


@pytest.fixture(scope="module")
def studio(toy):
    return studio_of(toy)


@pytest.fixture(scope="module")
def pipeline(studio):
    """diffusers' pipeline with the toy's weights, and the published scheduler's shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    config = {key: value for key, value in studio.denoiser.config.items() if not key.startswith("_")}
    transformer = Lumina2Transformer2DModel(**config).eval()
    transformer.load_state_dict(studio.denoiser.state_dict())
    (encoder,), (tokenizer,) = studio.encoders
    pipe = Lumina2Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), vae=studio.vae,
        text_encoder=encoder, tokenizer=tokenizer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encoded_by_diffusers(pipe, prompt, negative):
    """Without the padding."""
    given = pipe.encode_prompt(prompt, True, negative_prompt=negative, device="cpu")
    return given[0][0][given[1][0].bool()], given[2][0][given[3][0].bool()]


@pytest.mark.parametrize(("prompt", "negative"), [("a red cat", "blurry"), ("the picture of a black dog " * 99, "")])
def test_states_are_those_of_diffusers_pipeline(studio, pipeline, prompt, negative):
    with torch.no_grad():
        theirs = encoded_by_diffusers(pipeline, prompt, negative)
        texts = (Request.of(studio.family, prompt).caption, negative)
        ours = [studio.family.encode(*studio.encoders, Text(text), "cpu")["text"] for text in texts]
    for own, their in zip(ours, theirs, strict=True):
        assert own.shape == their.shape and relative(own, their) < 1e-5
    cut = studio.family.tokenize(studio.encoders[1], texts[0])[1]
    assert len(ours[0]) == 256 and cut and prompt.endswith(cut) if len(prompt) > 99 else not cut


@pytest.mark.parametrize(("extra", "settings"), [
    ({}, {}),
    ({"cfg_trunc_ratio": 0.5}, {"cfg_trunc_ratio": 0.5}),
    ({"cfg_normalization": False}, {"cfg_normalization": "none"}),
])  # fmt: skip
def test_a_picture_is_that_of_diffusers_pipeline(studio, pipeline, extra, settings):
    cond, uncond = pair_of(studio, "a red cat --n blurry")
    settings = sample.default_settings(studio.family) | settings
    ours = sample.generate_latents(
        studio.family, studio.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=6, scale=4.0, shift=6.0, device="cpu",
        settings=settings,
    )  # fmt: skip
    theirs = pipeline(
        "a red cat", negative_prompt="blurry", height=48, width=32, num_inference_steps=6, guidance_scale=4.0,
        latents=start_of(SHAPE, 5), output_type="latent", **extra,
    )  # fmt: skip
    assert relative(ours, theirs.images) < 1e-4
    plain = sample.generate_latents(
        studio.family, studio.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=6, scale=1.0, shift=6.0, device="cpu"
    )
    assert relative(plain, ours) > 1e-3


def test_a_batch_of_captions_of_different_lengths_is_batches_of_one(studio):
    conds = [pair_of(studio, caption)[0] for caption in ("a cat", "the picture of a house and a dog", "")]
    both, each = batched_and_one_by_one(studio, conds, SHAPE)
    assert relative(both, each) < 1e-5


def test_the_system_prompt_is_an_option_and_stands_before_captions_and_prompts_alone(toy):
    def said(*words):
        family = FAMILY.resolved(options.parse("lumina_2", ["--config_file", str(toy), *words], "test"))
        return [Request.of(family, caption).caption for caption in ("a cat", "", f"Mine. {START} a cat")]

    assert said() == [f"{SYSTEM_PROMPT} {START} a cat", "", f"Mine. {START} a cat"]
    assert said("--system_prompt", "Draw.")[0] == f"Draw. {START} a cat"
    assert said("--system_prompt", "")[0] == "a cat"
    family = FAMILY.resolved(parser_of(FAMILY).parse_args([*words_of(toy), "--save_path", "x", "--system_prompt", ""]))
    assert Request.of(family, "a cat").caption == "a cat"


def test_the_token_limit_is_an_option_and_a_part_of_the_caches_identity(toy, studio):
    words = ["--config_file", str(toy), "--gemma2_max_token_length", "5"]
    short = FAMILY.resolved(options.parse("lumina_2", words, "test"))
    assert len(short.encode(*studio.encoders, Text("the picture of a black dog"), "cpu")["text"]) == 5
    assert short.recipe and not studio.family.recipe


def all_in_one(toy, path):
    """ComfyUI's checkpoint of the toy: one file with the parts below its prefixes."""
    names = {
        "denoiser": "model.diffusion_model.",
        "vae": "vae.",
        "text_encoder": "text_encoders.gemma2_2b.transformer.",
    }
    tensors = {}
    for name, prefix in names.items():
        tensors |= {prefix + key: value for key, value in load_file(toy.with_name(f"{name}.safetensors")).items()}
    # What no shape of the toy shows; the published sizes need neither.
    save_file(tensors, path, {"format": "pt", "norm_num_groups": "4", "head_dim": "16"})
    return path


def test_an_all_in_one_file_draws_the_same_picture(toy, studio, tmp_path):
    whole = all_in_one(toy, tmp_path / "lumina_2.safetensors")
    path = {"pretrained_model_name_or_path": str(whole), "vae": "", "gemma2": ""}
    inside = studio_of(toy, **path)
    drawn = []
    for one in (inside, studio):
        cond, uncond = pair_of(one, "a red cat --n blurry")
        drawn.append(sample.generate_latents(one.family, one.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=2,
                                             scale=4.0, shift=6.0, device="cpu"))  # fmt: skip
    assert torch.equal(*drawn)
    assert torch.equal(*(one.family.decode_latents(one.vae, drawn[0]) for one in (inside, studio)))


def test_the_lora_in_diffusers_names_is_taken_by_diffusers_pipeline(toy, pictures, pipeline, studio, tmp_path):  # noqa: F811
    pytest.importorskip("peft")
    words = ["--max_train_steps", "2", "--seed", "3", "--save_format", "diffusers", "--learning_rate", "3e-2"]
    trainer = NetworkTrainer(options.parse("lumina_2", arguments(toy, pictures, tmp_path, *words), "test"))
    trainer.run()
    names = set(trainer.network.adapters)
    assert all(any(name.startswith(part) for name in names) for part in ("noise_refiner.", "context_refiner."))
    cond, _ = pair_of(studio, "a red cat")
    noisy, sigma = start_of(SHAPE, 1), torch.tensor([0.7])
    text = cond["text"][None]
    with torch.no_grad():
        ours = FAMILY.predict(trainer.denoiser, noisy, sigma, [cond])
        base = FAMILY.predict(studio.denoiser, noisy, sigma, [cond])
        pipeline.load_lora_weights(load_file(tmp_path / "run.safetensors"))
        try:
            mask = torch.ones(text.shape[:2], dtype=torch.bool)
            theirs = -pipeline.transformer(noisy, 1 - sigma, text, mask, return_dict=False)[0]
        finally:
            pipeline.unload_lora_weights()
    assert relative(theirs, ours) < 1e-4 < 1e-2 < relative(base, ours)


def test_what_is_wrong_with_the_files_is_one_sentence(toy, tmp_path):
    from library.checkpoints import save
    from tools.make_toy_model import part_shapes, weights
    from tools.toy_parts import gemma2

    file = tmp_path / "gemma.safetensors"
    save(weights(part_shapes(FAMILY.text_encoders[0], gemma2(96, 90)[0]), 0), file, {"head_dim": "16"})
    with pytest.raises(ConfigError, match="its states are 96 wide and .* reads 64"):
        studio_of(toy, gemma2=str(file))
    with pytest.raises(ConfigError, match="Gemma 2"):
        studio_of(toy, gemma2=str(toy.with_name("vae.safetensors")))


def test_a_diffusers_folder_alone_draws_the_same_picture(toy, studio, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    folder = studio_of(toy, pretrained_model_name_or_path=str(tmp_path), vae="", gemma2="")
    drawn = []
    for one in (folder, studio):
        cond, uncond = pair_of(one, "a red cat --n blurry")
        drawn.append(
            sample.generate_latents(
                one.family, one.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=2, scale=4.0, shift=6.0,
                device="cpu",
            )
        )  # fmt: skip
    assert relative(*drawn) < 1e-5
    assert relative(*(one.family.decode_latents(one.vae, drawn[0]) for one in (folder, studio))) < 1e-5


def test_sd_scripts_arguments_for_parts_of_the_model(toy):
    from library import checkpoints
    from networks import lora_lumina

    def ranks(**words):
        model = checkpoints.load_part(FAMILY.denoiser, toy.with_name("denoiser.safetensors"), dtype=torch.float32)
        model.binding.adapted = FAMILY.adapted
        adapters = lora_lumina.create_network(1.0, 4, 4.0, None, [], model, **words).adapters
        return {name: adapter.rank for name, adapter in adapters.items()}

    found = ranks(attn_dim="8", mlp_dim="0", refiner_dim="2", embedder_dims="[0,0,3]")
    assert found["layers.0.attention.qkv"] == 8 and found["layers.0.adaLN_modulation.1"] == 4
    assert found["noise_refiner.0.attention.qkv"] == 2 and found["cap_embedder.1"] == 3
    assert (
        not any(name.startswith("layers.") and "feed_forward" in name for name in found) and "x_embedder" not in found
    )
    assert {name.split(".")[0] for name in ranks(train_blocks="noise_refiner")} == {"noise_refiner"}
    assert {name.split(".")[0] for name in ranks(train_blocks="transformer")} == {"layers"}
    with pytest.raises(ConfigError, match="train_blocks=x is none of all, transformer, refiners"):
        ranks(train_blocks="x")
