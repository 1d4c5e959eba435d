"""Anima as a whole: its two tokenizers, its pictures, its LoRA files and the adapter's learning rate."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import relative
from safetensors.torch import load_file, save_file
from studio_support import batched_and_one_by_one, make_toy, pair_of, start_of, studio_of
from training_support import arguments, pictures  # noqa: F401

from library import options, sample
from library.errors import ConfigError
from library.families import get_family
from library.families.family import Text
from train_network import NetworkTrainer

FAMILY = get_family("anima")
SHAPE = (16, 6, 4)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy("anima", tmp_path_factory.mktemp("toys") / "anima")


@pytest.fixture(scope="module")
def studio(toy):
    return studio_of(toy)


@pytest.fixture(scope="module")
def theirs(studio):
    """diffusers' transformer and text conditioner with the toy's weights."""
    from diffusers import AnimaTextConditioner, CosmosTransformer3DModel

    config = {key: value for key, value in studio.denoiser.config.items() if not key.startswith("_")}
    weights = studio.denoiser.state_dict()
    transformer = CosmosTransformer3DModel(**{key: value for key, value in config.items() if key != "adapter"})
    transformer.load_state_dict({k: v for k, v in weights.items() if not k.startswith("llm_adapter.")})
    conditioner = AnimaTextConditioner(**studio.denoiser.llm_adapter.config)
    inside = {k.removeprefix("llm_adapter."): v for k, v in weights.items() if k.startswith("llm_adapter.")}
    conditioner.load_state_dict(inside)
    return transformer.eval(), conditioner.eval()


def components(studio):
    (encoder,), (tokenizer, t5_tokenizer) = studio.encoders
    return SimpleNamespace(tokenizer=tokenizer, t5_tokenizer=t5_tokenizer, text_encoder=encoder,
                           _execution_device="cpu")  # fmt: skip


def encoded_by_diffusers(studio, conditioner, caption):
    """What the transformer is given: the adapter's output, 512 rows."""
    from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep

    given = AnimaTextEncoderStep.encode_prompt(components(studio), caption, prepare_unconditional_embeds=False)
    names = ("qwen_prompt_embeds", "t5_input_ids", "t5_attention_mask", "qwen_attention_mask")
    return given, conditioner(*(given[name] for name in names))


@pytest.mark.parametrize("caption", ["a red cat", "", "the picture of a black dog " * 300])
def test_states_and_ids_are_those_of_diffusers_pipeline(studio, theirs, caption):
    with torch.no_grad():
        given, text = encoded_by_diffusers(studio, theirs[1], caption)
        ours = FAMILY.encode(*studio.encoders, Text(caption), "cpu")
        adapter = studio.denoiser.llm_adapter
        adapted = adapter(ours["text"][None], ours["t5_ids"][None])
    assert relative(ours["text"], given["qwen_prompt_embeds"][0]) < 1e-5 if caption else not ours["text"].any()
    assert torch.equal(ours["t5_ids"], given["t5_input_ids"][0])
    assert relative(adapted, text) < 1e-5  # also without a word, where nothing is attended to
    cut = FAMILY.tokenize(studio.encoders[1], caption)[1]
    assert bool(cut) == (len(caption) > 1000) and caption.endswith(cut)


def test_a_picture_is_what_diffusers_scheduler_and_models_make(studio, theirs):
    """Their modular pipeline itself needs torchvision; this is its loop: time sigma, guidance, Euler steps, shift 3."""
    from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler

    transformer, conditioner = theirs
    cond, uncond = pair_of(studio, "a red cat --n blurry")
    ours = sample.generate_latents(
        studio.family, studio.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=6, scale=4.0, shift=3.0, device="cpu"
    )
    scheduler, guide = FlowMatchEulerDiscreteScheduler(shift=3.0), ClassifierFreeGuidance(guidance_scale=4.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6))
    x = start_of(SHAPE, 5)[:, :, None]
    with torch.no_grad():
        texts = [encoded_by_diffusers(studio, conditioner, caption)[1] for caption in ("a red cat", "blurry")]
        for step, t in enumerate(scheduler.timesteps):
            padded = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
            pair = [transformer(padded, t[None] / 1000, text, return_dict=False)[0] for text in texts]
            guide.set_state(step=step, num_inference_steps=6, timestep=t)
            x = scheduler.step(guide.forward(*pair).pred, t, x, return_dict=False)[0]
    assert relative(ours, x[:, :, 0]) < 1e-4


def test_a_batch_of_captions_of_different_lengths_is_batches_of_one(studio):
    conds = [pair_of(studio, caption)[0] for caption in ("a cat", "the picture of a house and a dog", "")]
    both, each = batched_and_one_by_one(studio, conds, SHAPE)
    assert relative(both, each) < 1e-5


def test_a_file_with_fewer_layers_of_both_kinds_loads(toy, tmp_path):
    from library.checkpoints import load_part

    weights = load_file(toy.with_name("denoiser.safetensors"))
    layers = {name: max(int(k.split(name)[1].split(".")[0]) for k in weights if k.startswith(name))
              for name in ("net.blocks.", "net.llm_adapter.blocks.")}  # fmt: skip
    last = tuple(f"{name}{number}." for name, number in layers.items())
    save_file({k: v for k, v in weights.items() if not k.startswith(last)}, tmp_path / "small.safetensors")
    model = load_part(FAMILY.denoiser, tmp_path / "small.safetensors", dtype=torch.float32)
    assert model.config.num_layers == layers["net.blocks."]
    assert len(model.llm_adapter.blocks) == layers["net.llm_adapter.blocks."]


def trained(toy, data, output, *words):
    values = arguments(toy, data, output, "--max_train_steps", "2", "--seed", "3", *words)
    trainer = NetworkTrainer(options.parse("anima", values, "test"))
    trainer.run()
    return trainer


@pytest.mark.parametrize(("words", "is_there"), [
    ([], False), (["--llm_adapter_lr", "0"], False), (["--llm_adapter_lr", "1e-4", "--mod_lr", "0"], True),
])  # fmt: skip
def test_a_lora_trains_the_adapter_if_it_has_a_learning_rate(toy, pictures, tmp_path, words, is_there):  # noqa: F811
    trainer = trained(toy, pictures, tmp_path, *words)
    names = set(trainer.network.adapters)
    assert any(name.startswith("llm_adapter.") for name in names) == is_there
    assert any("adaln_modulation" in name for name in names) == (not is_there)
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == ({1e-3, 1e-4} if is_there else {1e-3})
    with pytest.raises(ConfigError, match="llm_adapter_lr has no effect") if not is_there else open("/dev/null"):
        from library.trained import set_rates

        set_rates(trainer.network, FAMILY, trainer.options.replace(llm_adapter_lr=1e-4))


def test_a_full_fine_tune_leaves_out_what_has_the_rate_0_and_never_decays_the_table_of_words(toy, pictures, tmp_path):  # noqa: F811
    toml, before = toy.with_name("toy_full.toml"), load_file(toy.with_name("denoiser.safetensors"))
    trainer = trained(toml, pictures, tmp_path / "frozen", "--llm_adapter_lr", "0", "--cross_attn_lr", "1e-5")
    after = load_file(tmp_path / "frozen" / "run.safetensors")
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert {key for key in before if "llm_adapter." in key} <= same
    assert not {key for key in before if "blocks.0.self_attn.q_proj" in key and "llm" not in key} & same
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-3, 1e-5}
    trainer = trained(toml, pictures, tmp_path / "whole")
    after = load_file(tmp_path / "whole" / "run.safetensors")
    table = "net.llm_adapter.embed.weight"
    rows = (before[table] != after[table]).any(1)
    assert 0 < rows.sum() < 40  # those of the words of the captions


def test_the_lora_that_diffusers_takes_has_the_adapter_under_its_name(toy, pictures, theirs, studio, tmp_path):  # noqa: F811
    """Loaded by diffusers' own mixin into its two models, it changes them as ours."""
    pytest.importorskip("peft")
    from diffusers.loaders.lora_pipeline import AnimaLoraLoaderMixin

    trainer = trained(toy, pictures, tmp_path, "--llm_adapter_lr", "1e-3", "--save_format", "diffusers",
                      "--learning_rate", "3e-2")  # fmt: skip
    file = load_file(tmp_path / "run.safetensors")
    assert any(key.startswith("text_conditioner.blocks.0.self_attn.q_proj.lora_A") for key in file)
    assert trainer.network.load_tensors(file, "it").split()[1].split("/")[0] == str(len(trainer.network.adapters))

    class Pipeline(AnimaLoraLoaderMixin):
        transformer, text_conditioner = theirs
        components, hf_device_map = {"transformer": transformer, "text_conditioner": text_conditioner}, None

    cond, _ = pair_of(studio, "a red cat")
    noisy, sigma = start_of(SHAPE, 1), torch.tensor([0.7])
    with torch.no_grad():
        ours = FAMILY.predict(trainer.denoiser, noisy, sigma, [cond])
        base = FAMILY.predict(studio.denoiser, noisy, sigma, [cond])
        Pipeline().load_lora_weights(file)
        try:
            text = theirs[1](cond["text"][None], cond["t5_ids"][None])
            padded = torch.cat([noisy, torch.zeros_like(noisy[:, :1])], 1)[:, :, None]
            out = theirs[0](padded, sigma, text, return_dict=False)[0][:, :, 0]
        finally:
            for model in theirs:
                model.unload_lora()
    assert relative(out, ours) < 1e-4 < 1e-2 < relative(base, ours)


def test_what_is_wrong_with_the_files_is_one_sentence(toy, tmp_path):
    from library.checkpoints import save
    from tools.make_toy_model import part_shapes, weights
    from tools.toy_parts import qwen3

    file = tmp_path / "qwen3_4b.safetensors"
    save(weights(part_shapes(FAMILY.text_encoders[0], qwen3(96, 90)[0]), 0), file)
    with pytest.raises(ConfigError, match="its states are 96 wide and .* reads 64"):
        studio_of(toy, qwen3=str(file))
    with pytest.raises(ConfigError, match="--t5_tokenizer_path nowhere/at/all: no such folder"):
        studio_of(toy, t5_tokenizer_path="nowhere/at/all")


def test_the_token_limits_are_options_and_a_part_of_the_caches_identity(toy):
    limits = ["--qwen3_max_token_length", "4", "--t5_max_token_length", "3"]
    short = FAMILY.resolved(options.parse("anima", ["--config_file", str(toy), *limits], "test"))
    studio = studio_of(toy)
    cond = short.encode(*studio.encoders, Text("the picture of a black dog"), "cpu")
    assert len(cond["text"]) == 4 and len(cond["t5_ids"]) == 3
    assert short.recipe and not FAMILY.resolved(options.parse("anima", ["--config_file", str(toy)], "test")).recipe
