"""AuraFlow and Pony V7 as a whole: text length, pictures, LoRA files, register tokens."""

import numpy as np
import pytest
import torch
from oracles import relative
from safetensors.torch import load_file
from studio_support import batched_and_one_by_one, make_toy, pair_of, start_of, studio_of
from training_support import arguments, pictures  # noqa: F401

from library import options, sample
from library.errors import ConfigError
from library.families import get_family
from library.families.family import Text
from train_network import NetworkTrainer

FAMILY = get_family("auraflow")
SHAPE = (4, 8, 4)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy("auraflow", tmp_path_factory.mktemp("toys") / "auraflow")


@pytest.fixture(scope="module")
def studio(toy):
    return studio_of(toy)


@pytest.fixture(scope="module")
def pony(toy):
    return studio_of(toy, max_sequence_length="768")


@pytest.fixture(scope="module")
def pipeline(studio, toy):
    """diffusers' pipeline with the toy's weights, and the published scheduler's shift."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    config = {key: value for key, value in studio.denoiser.config.items() if not key.startswith("_")}
    transformer = AuraFlowTransformer2DModel(**config).eval()
    transformer.load_state_dict(studio.denoiser.state_dict())
    (t5,), (tokenizer,) = studio.encoders
    encoder = UMT5EncoderModel(UMT5Config(**t5.config.to_dict())).eval()
    encoder.load_state_dict(load_file(toy.with_name("text_encoder.safetensors")), strict=False)
    pipe = AuraFlowPipeline(tokenizer, encoder, studio.vae, transformer, FlowMatchEulerDiscreteScheduler(shift=1.73))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("length", "caption"), [(256, "a red cat"), (256, ""), (256, "a black dog " * 99),
                                                 (768, "a black dog " * 99)])  # fmt: skip
def test_states_are_those_of_diffusers_pipeline(studio, pony, pipeline, length, caption):
    mine = studio if length == 256 else pony
    with torch.no_grad():
        text, mask, *_ = pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False, device="cpu", max_sequence_length=length
        )
        ours = mine.family.encode(*mine.encoders, Text(caption), "cpu")["text"]
    count = int(mask[0].reshape(length, -1)[:, 0].sum())
    assert len(ours) == count and relative(ours, text[0][:count]) < 1e-5 and not text[0][count:].any()
    assert bool(mine.family.tokenize(mine.encoders[1], caption)[1]) == (len(caption) > 99 and length == 256)


@pytest.mark.parametrize("length", [256, 768])
def test_a_picture_is_that_of_diffusers_pipeline(studio, pony, pipeline, length):
    mine = studio if length == 256 else pony
    cond, uncond = pair_of(mine, "a red cat --n blurry")
    ours = sample.generate_latents(
        mine.family, mine.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=4, scale=3.5, shift=1.73, device="cpu"
    )
    theirs = pipeline(
        "a red cat", negative_prompt="blurry", height=64, width=32, sigmas=list(np.linspace(1, 1 / 4, 4)),
        num_inference_steps=4, guidance_scale=3.5, latents=start_of(SHAPE, 5), output_type="latent",
        max_sequence_length=length,
    ).images  # fmt: skip
    assert relative(ours, theirs) < 1e-4


def test_the_padding_is_a_part_of_what_the_model_reads(studio, pony):
    """So a run with the wrong length trains another model than the one that is sampled."""
    cond, _ = pair_of(studio, "a red cat")
    noisy, sigma = start_of(SHAPE, 1), torch.tensor([0.7])
    with torch.no_grad():
        short, long = (one.family.predict(studio.denoiser, noisy, sigma, [cond]) for one in (studio, pony))
    assert relative(short, long) > 1e-4 and pony.family.recipe != studio.family.recipe


def test_a_batch_of_captions_of_different_lengths_is_batches_of_one(studio):
    conds = [pair_of(studio, caption)[0] for caption in ("a cat", "the picture of a house and a dog", "")]
    both, each = batched_and_one_by_one(studio, conds, SHAPE)
    assert relative(both, each) < 1e-5


def trained(toy, data, output, *words):
    values = arguments(toy, data, output, "--max_train_steps", "2", "--seed", "3", *words)
    trainer = NetworkTrainer(options.parse("auraflow", values, "test"))
    trainer.run()
    return trainer


def test_a_full_fine_tune_trains_register_tokens_and_positions(toy, pictures, tmp_path):  # noqa: F811
    before = load_file(toy.with_name("denoiser.safetensors"))
    trained(toy.with_name("toy_full.toml"), pictures, tmp_path)
    after = load_file(tmp_path / "run.safetensors")
    for name in ("model.register_tokens", "model.positional_encoding", "model.double_layers.0.attn.w1q.weight"):
        assert before[name].shape == after[name].shape and not torch.equal(before[name], after[name]), name


def test_the_lora_in_diffusers_names_is_taken_by_diffusers_pipeline(toy, pictures, pipeline, studio, tmp_path):  # noqa: F811
    pytest.importorskip("peft")
    trainer = trained(toy, pictures, tmp_path, "--save_format", "diffusers", "--learning_rate", "3e-2")
    cond, _ = pair_of(studio, "a red cat")
    noisy, sigma = start_of(SHAPE, 1), torch.tensor([0.7])
    text = torch.nn.functional.pad(cond["text"], (0, 0, 0, 256 - len(cond["text"])))[None]
    with torch.no_grad():
        ours = FAMILY.predict(trainer.denoiser, noisy, sigma, [cond])
        base = FAMILY.predict(studio.denoiser, noisy, sigma, [cond])
        pipeline.load_lora_weights(load_file(tmp_path / "run.safetensors"))
        try:
            theirs = pipeline.transformer(noisy, text, sigma, return_dict=False)[0]
        finally:
            pipeline.unload_lora_weights()
    assert relative(theirs, ours) < 1e-4 < 1e-2 < relative(base, ours)


def test_what_is_wrong_with_the_files_is_one_sentence(toy, tmp_path):
    from library.checkpoints import save
    from tools.make_toy_model import part_shapes, weights
    from tools.toy_parts import t5, umt5

    file = tmp_path / "t5.safetensors"
    for made, message in ((umt5(96, 90), "its states are 96 wide and .* reads 2048"), (t5(2048, 90), "Pile-T5")):
        save(weights(part_shapes(FAMILY.text_encoders[0], made[0]), 0), file)
        with pytest.raises(ConfigError, match=message):
            studio_of(toy, text_encoder=str(file))


def test_a_diffusers_folder_alone_draws_the_same_picture(toy, studio, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    folder = studio_of(toy, pretrained_model_name_or_path=str(tmp_path), vae="", text_encoder="")
    drawn = []
    for one in (folder, studio):
        cond, uncond = pair_of(one, "a red cat --n blurry")
        drawn.append(
            sample.generate_latents(
                one.family, one.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=2, scale=3.5, shift=1.73,
                device="cpu",
            )
        )  # fmt: skip
    assert relative(*drawn) < 1e-5
    assert relative(*(one.family.decode_latents(one.vae, drawn[0]) for one in (folder, studio))) < 1e-5
