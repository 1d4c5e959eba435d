"""Chroma as a whole: its text with one token of padding, pictures, LoRA files and the distilled guidance layer."""

import pytest
import torch
from oracles import relative
from safetensors.torch import load_file
from studio_support import batched_and_one_by_one, make_toy, pair_of, start_of, studio_of
from training_support import arguments, pictures  # noqa: F401

from library import options, sample
from library.checkpointing import checkpoint_blocks
from library.checkpoints import load_part
from library.components import tokens
from library.errors import ConfigError
from library.families import get_family
from library.families.family import Text
from library.prompts import defaults_of
from train_network import NetworkTrainer

FAMILY = get_family("chroma")
SHAPE = (16, 6, 4)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy("chroma", tmp_path_factory.mktemp("toys") / "chroma")


@pytest.fixture(scope="module")
def studio(toy):
    return studio_of(toy)


@pytest.fixture(scope="module")
def pipeline(studio, toy):
    """diffusers' pipeline with the toy's weights, but with a mask that masks.

    Its own mask is a float of zeros and ones, which attention takes for numbers to add: padding would count e times
    less than text instead of not at all.
    """
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from diffusers.models.embeddings import get_timestep_embedding
    from transformers import T5Config, T5EncoderModel

    class Masked(ChromaPipeline):
        def _prepare_attention_mask(self, *args, **kwargs):
            mask = super()._prepare_attention_mask(*args, **kwargs)
            return mask if mask is None else mask.bool()

    config = {key: value for key, value in studio.denoiser.config.items() if not key.startswith("_")}
    transformer = ChromaTransformer2DModel(**config).eval()
    # Their class counts the modulations of its own blocks; the released weights, and the toy's, know 344.
    embed = transformer.time_text_embed
    channels = config["approximator_num_channels"] // 4
    transformer.load_state_dict(studio.denoiser.state_dict(), strict=False)
    numbers = get_timestep_embedding(
        torch.arange(344) * 1000, 2 * channels, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    embed.register_buffer("mod_proj", numbers, persistent=False)
    (t5,), (tokenizer,) = studio.encoders
    encoder = T5EncoderModel(T5Config(**t5.config.to_dict())).eval()
    encoder.load_state_dict(load_file(toy.with_name("t5xxl.safetensors")), strict=False)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = Masked(scheduler, studio.vae, encoder, tokenizer, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("caption", ["a red cat", "", "the picture of a black dog " * 120])
def test_states_are_those_that_diffusers_pipeline_leaves_unmasked(studio, pipeline, caption):
    with torch.no_grad():
        text, _, mask, *_ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, device="cpu")
        ours = FAMILY.encode(*studio.encoders, Text(caption), "cpu")["text"]
    theirs = text[0][mask[0].bool()]
    assert ours.shape == theirs.shape and relative(ours, theirs) < 1e-5
    ids, cut = FAMILY.tokenize(studio.encoders[1], caption)
    assert len(ours) == min(512, len(ids) + 1) and bool(cut) == (len(caption) > 999)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_picture_is_that_of_diffusers_pipeline(studio, pipeline, scale):
    from library.prompts import parse_line

    prompt = parse_line("a red cat --n blurry", "test", defaults_of(studio.family))
    cond, uncond = studio.conditions(prompt)
    ours = sample.generate_latents(
        studio.family, studio.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=5, scale=scale, device="cpu",
        shift=sample.shift_of(prompt, studio.family, SHAPE, 1.0),
    )  # fmt: skip
    theirs = pipeline(
        "a red cat", negative_prompt="blurry", height=48, width=32, num_inference_steps=5, guidance_scale=scale,
        latents=tokens.pack(start_of(SHAPE, 5)), output_type="latent",
    ).images  # fmt: skip
    assert relative(ours, tokens.unpack(theirs, *SHAPE[1:])) < 1e-4


CAPTIONS = ("a cat", "the picture of a house and a dog", "")


def test_a_batch_of_captions_of_different_lengths_is_batches_of_one(studio):
    conds = [pair_of(studio, caption)[0] for caption in CAPTIONS]
    assert len({len(cond["text"]) for cond in conds}) == 3
    both, each = batched_and_one_by_one(studio, conds, SHAPE)
    assert relative(both, each) < 1e-5


def test_so_are_its_gradients_with_checkpointing(studio, toy):
    conds = [pair_of(studio, caption)[0] for caption in CAPTIONS]
    noisy, sigma = torch.randn(3, *SHAPE), torch.tensor([0.2, 0.5, 0.9])
    models = [load_part(FAMILY.denoiser, toy.with_name("denoiser.safetensors"), dtype=torch.float32) for _ in range(2)]
    checkpoint_blocks(models[0], FAMILY.blocks)
    FAMILY.predict(models[0], noisy, sigma, conds).square().sum().backward()
    for k, cond in enumerate(conds):
        FAMILY.predict(models[1], noisy[k : k + 1], sigma[k : k + 1], [cond]).square().sum().backward()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert relative(a.grad, b.grad) < 1e-4, name


def trained(toy, data, output, *words):
    values = arguments(toy, data, output, "--max_train_steps", "2", "--seed", "3", *words)
    trainer = NetworkTrainer(options.parse("chroma", values, "test"))
    trainer.run()
    return trainer


@pytest.mark.parametrize(("words", "is_trained"), [([], False), (["--distilled_guidance_lr", "1e-3"], True)])
def test_a_full_fine_tune_leaves_the_distilled_guidance_layer_unless_it_has_a_rate(
    toy, pictures, tmp_path, words, is_trained  # noqa: F811
):  # fmt: skip
    before = load_file(toy.with_name("denoiser.safetensors"))
    trained(toy.with_name("toy_full.toml"), pictures, tmp_path, *words)
    after = load_file(tmp_path / "run.safetensors")
    same = {key for key in before if torch.equal(before[key], after[key])}
    layer = {key for key in before if key.startswith("distilled_guidance_layer.")}
    assert not layer & same if is_trained else layer <= same
    assert "double_blocks.0.img_attn.qkv.weight" not in same


def test_the_lora_in_diffusers_names_is_taken_by_diffusers_pipeline(toy, pictures, pipeline, studio, tmp_path):  # noqa: F811
    pytest.importorskip("peft")
    trainer = trained(toy, pictures, tmp_path, "--save_format", "diffusers", "--learning_rate", "3e-2",
                      "--network_module", "networks.lora_flux", "--network_args", "train_double_block_indices=0")  # fmt: skip
    cond, _ = pair_of(studio, "a red cat")
    noisy, sigma = start_of(SHAPE, 1), torch.tensor([0.7])
    with torch.no_grad():
        ours = FAMILY.predict(trainer.denoiser, noisy, sigma, [cond])
        base = FAMILY.predict(studio.denoiser, noisy, sigma, [cond])
        pipeline.load_lora_weights(load_file(tmp_path / "run.safetensors"))
        try:
            places = tokens.grid(SHAPE[1] // 2, SHAPE[2] // 2, "cpu"), torch.zeros(len(cond["text"]), 3)
            theirs = pipeline.transformer(tokens.pack(noisy), cond["text"][None], sigma, *places, return_dict=False)[0]
        finally:
            pipeline.unload_lora_weights()
    assert relative(tokens.unpack(theirs, *SHAPE[1:]), ours) < 1e-4 < 1e-2 < relative(base, ours)


def test_what_is_wrong_is_one_sentence(toy):
    with pytest.raises(ConfigError, match="apply_t5_attn_mask .* Chroma's text always has its mask"):
        options.parse("chroma", ["--config_file", str(toy), "--apply_t5_attn_mask"], "test")
    with pytest.raises(ConfigError, match="T5"):
        studio_of(toy, t5xxl=str(toy.with_name("vae.safetensors")))
    with pytest.raises(ConfigError, match="a Chroma denoiser"):
        studio_of(toy, pretrained_model_name_or_path=str(toy.with_name("t5xxl.safetensors")))


def test_the_token_limit_is_an_option_and_a_part_of_the_caches_identity(toy, studio):
    words = ["--config_file", str(toy), "--t5xxl_max_token_length", "4"]
    short = FAMILY.resolved(options.parse("chroma", words, "test"))
    assert len(short.encode(*studio.encoders, Text("the picture of a black dog"), "cpu")["text"]) == 4
    assert len(short.encode(*studio.encoders, Text("a"), "cpu")["text"]) < 4
    assert short.recipe and not studio.family.recipe


def test_a_diffusers_folder_alone_draws_the_same_picture(toy, studio, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    folder = studio_of(toy, pretrained_model_name_or_path=str(tmp_path), vae="", t5xxl="")
    drawn = []
    for one in (folder, studio):
        cond, uncond = pair_of(one, "a red cat --n blurry")
        drawn.append(
            sample.generate_latents(
                one.family, one.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=2, scale=5.0, shift=2.0,
                device="cpu",
            )
        )  # fmt: skip
    assert relative(*drawn) < 1e-5
    assert relative(*(one.family.decode_latents(one.vae, drawn[0]) for one in (folder, studio))) < 1e-5
