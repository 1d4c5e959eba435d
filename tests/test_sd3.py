"""Stable Diffusion 3 and 3.5 as a whole: text of three encoders or two, pictures, files, dropout, LoRAs."""

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

FAMILY = get_family("sd3")
SHAPE = (16, 6, 4)
LARGE, WIDTH = 32, 96  # of the toy's CLIP-L and its denoiser's text


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy("sd3", tmp_path_factory.mktemp("toys") / "sd3")


@pytest.fixture(scope="module")
def studio(toy):
    return studio_of(toy)


@pytest.fixture(scope="module")
def no_t5(toy):
    return studio_of(toy, t5xxl="", tokenizer_t5xxl="")


def pipeline_of(studio, toy, has_t5=True):
    """diffusers' own models with the weights of the same files. Its CLIP-L has the unit matrix for a projection."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    def clip(model, name):
        theirs = CLIPTextModelWithProjection(CLIPTextConfig(**(model.config.to_dict() | {"projection_dim": 32}))).eval()
        weights = load_file(toy.with_name(f"{name}.safetensors"))
        theirs.load_state_dict({"text_projection.weight": torch.eye(32)} | weights)
        return theirs

    encoders, (tokenizer, *others) = studio.encoders
    tokenizer.model_max_length = 77
    second = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="!", eos_token="<|endoftext|>",
                             bos_token="<|startoftext|>", model_max_length=77)  # fmt: skip
    assert second.pad_token_id == 0  # as the published second tokenizer has it
    t5 = None
    if has_t5:
        t5 = T5EncoderModel(T5Config(**encoders[2].config.to_dict())).eval()
        t5.load_state_dict(load_file(toy.with_name("t5xxl.safetensors")), strict=False)
    config = {key: value for key, value in studio.denoiser.config.items() if not key.startswith("_")}
    transformer = SD3Transformer2DModel(**config).eval()
    transformer.load_state_dict(studio.denoiser.state_dict())
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=studio.vae,
        text_encoder=clip(encoders[0], "clip_l"), tokenizer=tokenizer,
        text_encoder_2=clip(encoders[1], "clip_g"), tokenizer_2=second,
        text_encoder_3=t5, tokenizer_3=others[0] if has_t5 else None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipeline(studio, toy):
    return pipeline_of(studio, toy)


@pytest.mark.parametrize("caption", ["a red cat", "", "the picture of a black dog " * 99])
@pytest.mark.parametrize("has_t5", [True, False])
def test_text_is_what_diffusers_pipeline_encodes(studio, no_t5, pipeline, toy, caption, has_t5):
    mine, theirs = (studio, pipeline) if has_t5 else (no_t5, pipeline_of(no_t5, toy, False))
    with torch.no_grad():
        text, _, pooled, _ = theirs.encode_prompt(
            caption, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=256
        )
        ours = mine.family.encode(*mine.encoders, Text(caption), "cpu")
    assert ours["text"].shape == (77 + 256, WIDTH) and relative(ours["text"], text[0]) < 1e-5
    assert relative(ours["pooled"], pooled[0]) < 1e-5
    cut = mine.family.tokenize(mine.encoders[1], caption)[1]
    assert bool(cut) == (len(caption) > 99) and caption.endswith(cut)


@pytest.mark.parametrize("has_t5", [True, False])
def test_a_picture_is_that_of_diffusers_pipeline(studio, no_t5, pipeline, toy, has_t5):
    mine, theirs = (studio, pipeline) if has_t5 else (no_t5, pipeline_of(no_t5, toy, False))
    cond, uncond = pair_of(mine, "a red cat --n blurry")
    ours = sample.generate_latents(
        mine.family, mine.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=4, scale=4.5, shift=3.0, device="cpu"
    )
    latents = theirs(
        "a red cat", negative_prompt="blurry", height=48, width=32, sigmas=list(np.linspace(1, 1 / 4, 4)),
        num_inference_steps=4, guidance_scale=4.5, latents=start_of(SHAPE, 5), output_type="latent",
    ).images  # fmt: skip
    assert relative(ours, latents) < 1e-4


def test_a_batch_of_two_items_is_two_batches_of_one(studio):
    conds = [pair_of(studio, caption)[0] for caption in ("a cat", "the picture of a house and a dog")]
    both, each = batched_and_one_by_one(studio, conds, SHAPE)
    assert relative(both, each) < 1e-5


def test_masks_leave_zeros_for_padding(toy, studio):
    words = ["--config_file", str(toy), "--apply_lg_attn_mask", "--apply_t5_attn_mask"]
    masked = FAMILY.resolved(options.parse("sd3", words, "test"))
    (_, _, t5), (clip_tokenizer, tokenizer) = studio.encoders
    with torch.no_grad():
        plain, ours = (f.encode(*studio.encoders, Text("a red cat"), "cpu") for f in (studio.family, masked))
        given = tokenizer("a red cat", padding="max_length", max_length=256, return_tensors="pt")
        states = t5(input_ids=given.input_ids, attention_mask=given.attention_mask)[0][0]
    real = len(clip_tokenizer("a red cat")["input_ids"])
    assert torch.equal(ours["text"][:real], plain["text"][:real]) and not ours["text"][real:77].any()
    assert relative(ours["text"][77:], states * given.attention_mask[0][:, None]) < 1e-5
    assert torch.equal(ours["pooled"], plain["pooled"]) and masked.recipe != studio.family.recipe


def test_each_encoder_is_dropped_by_itself_at_its_rate(studio):
    cond, _ = pair_of(studio, "a red cat")
    rates = SimpleNamespace(clip_l_dropout_rate=0.2, clip_g_dropout_rate=0.5, t5_dropout_rate=0.8)
    none = SimpleNamespace(clip_l_dropout_rate=0.0, clip_g_dropout_rate=0.0, t5_dropout_rate=0.0)
    draws = torch.rand(400, generator=torch.Generator().manual_seed(0)).tolist()
    seen = []
    for choice in draws:
        given = studio.family.vary(cond, None, choice, rates)
        rows, t5 = given["text"][:77], given["text"][77:]
        parts = (
            (rows[:, :LARGE], rows[:, LARGE:], t5),
            (cond["text"][:77, :LARGE], cond["text"][:77, LARGE:], cond["text"][77:]),
        )
        off = [not part.any() for part in parts[0]]
        assert all(one or torch.equal(part, whole) for one, part, whole in zip(off, *parts, strict=True))
        pooled = [not given["pooled"][:LARGE].any(), not given["pooled"][LARGE:].any()]
        assert pooled == off[:2]
        seen.append(off)
    rate = torch.tensor(seen, dtype=torch.float64).mean(0)
    assert torch.allclose(rate, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), atol=0.08)
    assert len({tuple(off) for off in seen}) == 8  # independent of each other
    assert studio.family.vary(cond, None, 0.3, none) is cond


def test_the_kind_of_model_is_read_from_the_file(toy, tmp_path):
    """3.5 medium has a second attention, large only norms of queries and keys, 3 medium neither."""
    whole = load_file(toy.with_name("denoiser.safetensors"))
    large = {key: value for key, value in whole.items() if ".attn2." not in key}
    for key in [
        key for key in large if key.endswith(("x_block.adaLN_modulation.1.weight", "x_block.adaLN_modulation.1.bias"))
    ]:
        large[key] = large[key][: 6 * 192 if large[key].shape[0] == 9 * 192 else None].clone()
    plain = {key: value for key, value in large.items() if ".ln_" not in key}
    for name, tensors in (("3-5-medium", whole), ("3-5-large", large), ("3-medium", plain)):
        file = tmp_path / f"{name}.safetensors"
        save_file(tensors, file)
        words = ["--config_file", str(toy), "--pretrained_model_name_or_path", str(file)]
        family = FAMILY.resolved(options.parse("sd3", words, "test"))
        assert family.architecture == f"stable-diffusion-{name}" and family.base_model_version == name
        loaded = studio_of(toy, pretrained_model_name_or_path=str(file))
        cond, _ = pair_of(loaded, "a cat")
        with torch.no_grad():
            assert (
                loaded.family.predict(loaded.denoiser, start_of(SHAPE, 1), torch.tensor([0.5]), [cond]).isfinite().all()
            )


def drawn_by(studio):
    cond, uncond = pair_of(studio, "a red cat --n blurry")
    latents = sample.generate_latents(studio.family, studio.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=2,
                                      scale=4.5, shift=3.0, device="cpu")  # fmt: skip
    return latents, studio.family.decode_latents(studio.vae, latents)


def test_an_all_in_one_file_and_a_diffusers_folder_draw_the_same_picture(toy, studio, pipeline, tmp_path):
    names = {name: f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")}
    names |= {"vae": "first_stage_model.", "denoiser": ""}
    whole = {}
    for name, prefix in names.items():
        whole |= {prefix + key: value for key, value in load_file(toy.with_name(f"{name}.safetensors")).items()}
    save_file(whole, tmp_path / "sd3.safetensors", {"format": "pt", "norm_num_groups": "4"})
    pipeline.save_pretrained(tmp_path / "folder")
    inside = dict.fromkeys(("vae", "clip_l", "clip_g", "t5xxl"), "")
    one = studio_of(toy, pretrained_model_name_or_path=str(tmp_path / "sd3.safetensors"), **inside)
    folder = studio_of(toy, pretrained_model_name_or_path=str(tmp_path / "folder"), **inside)
    for other in (one, folder):
        assert len(other.family.text_encoders) == 3
        for ours, theirs in zip(drawn_by(other), drawn_by(studio), strict=True):
            assert relative(ours, theirs) < 1e-5


def trained(toy, data, output, *words):
    values = arguments(toy, data, output, "--max_train_steps", "2", "--seed", "3", *words)
    trainer = NetworkTrainer(options.parse("sd3", values, "test"))
    trainer.run()
    return trainer


def test_the_lora_is_taken_by_diffusers_pipeline_with_those_of_both_clips(toy, pictures, pipeline, studio, tmp_path):  # noqa: F811
    """The default format; T5's adapter is one that diffusers does not read, so it is not trained here."""
    pytest.importorskip("peft")
    values = [word for word in arguments(toy, pictures, tmp_path) if word != "--cache_text_encoder_outputs"]
    values += [
        "--max_train_steps",
        "2",
        "--seed",
        "3",
        "--learning_rate",
        "3e-2",
        "--text_encoder_lr",
        "3e-2",
        "3e-2",
        "0",
    ]
    trainer = NetworkTrainer(options.parse("sd3", values, "test"))
    trainer.run()
    file = load_file(tmp_path / "run.safetensors")
    for start in ("transformer.transformer_blocks.0.attn2.to_q.", "text_encoder.", "text_encoder_2."):
        assert any(key.startswith(start) for key in file), start
    noisy, sigma = start_of(SHAPE, 1), torch.tensor([0.7])
    encoders, tokenizers = trainer.runtime.load_text_encoders()
    with torch.no_grad():
        cond = trainer.family.encode(encoders, tokenizers, Text("a red cat"), "cpu")
        base = studio.family.encode(*studio.encoders, Text("a red cat"), "cpu")
        ours = FAMILY.predict(trainer.denoiser, noisy, sigma, [cond])
        pipeline.load_lora_weights(file)
        try:
            text, _, pooled, _ = pipeline.encode_prompt(
                "a red cat", None, None, device="cpu", do_classifier_free_guidance=False
            )
            theirs = pipeline.transformer(noisy, text, pooled, sigma * 1000, return_dict=False)[0]
        finally:
            pipeline.unload_lora_weights()
        before = FAMILY.predict(studio.denoiser, noisy, sigma, [base])
    assert relative(text[0], cond["text"]) < 1e-4 < 1e-3 < relative(base["text"], cond["text"])
    assert relative(theirs, ours) < 1e-4 < 1e-2 < relative(before, ours)


def test_t5_can_be_trained_and_has_sd_scripts_name(toy, pictures, tmp_path):  # noqa: F811
    values = [word for word in arguments(toy, pictures, tmp_path) if word != "--cache_text_encoder_outputs"]
    values += ["--max_train_steps", "1", "--text_encoder_lr", "0", "0", "1e-3", "--save_format", "kohya"]
    NetworkTrainer(options.parse("sd3", values, "test")).run()
    starts = {key.split("_")[1] for key in load_file(tmp_path / "run.safetensors")}
    assert starts == {"unet", "te3"}


def test_a_run_without_t5_with_dropout_trains(toy, pictures, tmp_path):  # noqa: F811
    lines = [line for line in toy.read_text().splitlines() if "t5xxl" not in line]
    config = toy.with_name("no_t5.toml")
    config.write_text("\n".join(lines))
    trainer = trained(config, pictures, tmp_path, "--clip_l_dropout_rate", "0.5", "--clip_g_dropout_rate", "0.5")
    assert len(trainer.family.text_encoders) == 2 and "no T5 in this run" in trainer.plan.text
    with pytest.raises(ConfigError, match="t5_dropout_rate has no effect: there is no T5"):
        trained(config, pictures, tmp_path, "--t5_dropout_rate", "0.1")


def test_what_is_wrong_with_the_files_is_one_sentence(toy):
    with pytest.raises(ConfigError, match="CLIP"):
        studio_of(toy, clip_g=str(toy.with_name("vae.safetensors")))
    with pytest.raises(ConfigError, match="clip_l"):
        studio_of(toy, clip_l="")


def test_sd_scripts_arguments_for_parts_of_the_model(toy):
    from library import checkpoints
    from networks import lora_sd3

    def ranks(**words):
        model = checkpoints.load_part(FAMILY.denoiser, toy.with_name("denoiser.safetensors"), dtype=torch.float32)
        model.binding.adapted = FAMILY.adapted
        adapters = lora_sd3.create_network(1.0, 4, 4.0, None, [], model, **words).adapters
        return {name: adapter.rank for name, adapter in adapters.items()}

    found = ranks(x_attn_dim="8", context_mlp_dim="0", emb_dims="[2,0,0,0,0,3]")
    assert found["joint_blocks.0.x_block.attn.qkv"] == found["joint_blocks.0.x_block.attn2.qkv"] == 8
    assert found["joint_blocks.0.context_block.attn.qkv"] == 4 and not any("context_block.mlp" in n for n in found)
    assert found["context_embedder"] == 2 and found["final_layer.linear"] == 3
    assert not any(name.startswith(("t_embedder", "x_embedder", "final_layer.adaLN")) for name in found)
    assert {name.split(".")[1] for name in ranks(train_block_indices="1")} == {"1"}
    with pytest.raises(
        ConfigError, match="emb_dims has 1 values; it takes 6: context_embedder, t_embedder, x_embedder"
    ):
        ranks(emb_dims="4")
