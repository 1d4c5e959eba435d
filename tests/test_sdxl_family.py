"""Stable Diffusion as whole families: text and pictures against diffusers' pipelines, trained encoders, checkpoints."""

from types import SimpleNamespace

import pytest
import torch
from oracles import accepted_stems, read_json, relative
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from studio_support import batched_and_one_by_one, make_toy, pair_of, start_of, studio_of
from test_families import drawings  # noqa: F401
from training_support import losses

from library import options, sample
from library.components import clip_prompts
from library.components import stable_diffusion as sd
from library.errors import ConfigError
from library.families import get_family, sdxl
from library.families.family import ItemInput, Text
from library.prompts import defaults_of, parse_line
from train_network import NetworkTrainer

torch.set_num_threads(1)
CAPTIONS = ["", "a red cat", "the picture of a house and a dog " * 20]


@pytest.fixture(scope="module")
def tomls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    return {name: make_toy(name, folder / name) for name in ("sd", "sdxl")}


@pytest.fixture(scope="module")
def studios(tomls):
    return {name: studio_of(toml) for name, toml in tomls.items()}


def text_model(model, projected):
    """transformers' own class with the weights of ours."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    theirs = (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**model.config.to_dict()))
    ours = model.state_dict()
    names = {key: key if key in ours else f"text_model.{key}" for key in theirs.state_dict()}
    theirs.load_state_dict({key: ours[name] for key, name in names.items()})
    return theirs.eval()


def pipeline_of(studio):
    """diffusers' pipeline of the same weights; of bigG's tokenizer only the padding differs."""
    from copy import deepcopy

    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    encoders, (tokenizer,) = studio.encoders
    tokenizer.model_max_length = 77
    models = []
    for kind, model in ((UNet2DConditionModel, studio.denoiser), (AutoencoderKL, studio.vae)):
        theirs = kind(**{k: v for k, v in model.config.items() if not k.startswith("_")})
        theirs.load_state_dict(model.state_dict())
        models.append(theirs.eval())
    unet, vae = models
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = EulerDiscreteScheduler(**schedule, timestep_spacing="leading")  # the published configurations
    parts = {"vae": vae, "text_encoder": text_model(encoders[0], False), "tokenizer": tokenizer, "unet": unet}
    if studio.family.name == "sd":
        nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(scheduler=scheduler, **parts, **nothing)
    else:
        second = deepcopy(tokenizer)
        second.pad_token = second.convert_ids_to_tokens(0)
        parts |= {"text_encoder_2": text_model(encoders[1], True), "tokenizer_2": second}
        pipeline = StableDiffusionXLPipeline(scheduler=scheduler, add_watermarker=False, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipelines(studios):
    return {name: pipeline_of(studio) for name, studio in studios.items()}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_text_is_what_diffusers_pipelines_encode(studios, pipelines, caption):
    with torch.no_grad():
        ours = {name: s.family.encode(*s.encoders, Text(caption), "cpu") for name, s in studios.items()}
        one, _ = pipelines["sd"].encode_prompt(caption, "cpu", 1, False)
        text, _, pooled, _ = pipelines["sdxl"].encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
    assert relative(ours["sd"]["text"], one[0]) < 1e-5
    assert relative(ours["sdxl"]["text"], text[0]) < 1e-5 and relative(ours["sdxl"]["pooled"], pooled[0]) < 1e-5


def test_clip_skip_2_is_the_next_to_last_layer_after_the_final_norm(tomls, studios):
    studio = studio_of(tomls["sd"], clip_skip="2")
    (encoder,), (tokenizer,) = studios["sd"].encoders
    theirs, given = text_model(encoder, False), tokenizer("a red cat", padding="max_length", max_length=77)
    with torch.no_grad():
        ours = studio.family.encode(*studio.encoders, Text("a red cat"), "cpu")["text"]
        wanted = theirs(torch.tensor([given.input_ids]), output_hidden_states=True).hidden_states[-2]
        wanted = theirs.final_layer_norm(wanted)
    assert relative(ours, wanted[0]) < 1e-5
    assert studio.family.recipe != studios["sd"].family.recipe  # cached text of the other kind is made anew


@pytest.mark.parametrize("layers", [3, 2])
def test_sd_2_reads_the_next_to_last_layer_also_of_folders_that_left_the_last_out(layers, monkeypatch, studios):
    """diffusers' SD 2 folders hold one layer less and read the last one that there is."""
    from copy import deepcopy

    from library.families import sd as module

    monkeypatch.setattr(module, "WHOLE_H", 3)
    (encoder,), tokenizers = studios["sd"].encoders
    short = deepcopy(encoder)
    short.text_model.encoder.layers = short.text_model.encoder.layers[:2]
    rows = clip_prompts.rows_for(clip_prompts.tokens_of(tokenizers[0], "a red cat"), tokenizers[0], "cpu", pad=0)
    settings = {"most": 75, "weighted": False, "skip": 1, "pad": 0}
    with torch.no_grad():
        wanted = text_model(encoder, False)(rows, output_hidden_states=True).hidden_states[2]
        wanted = encoder.text_model.final_layer_norm(wanted)
        given = module.encode([encoder if layers == 3 else short], tokenizers, Text("a red cat"), "cpu", **settings)
    assert relative(given["text"], wanted[0]) < 1e-5


@pytest.mark.parametrize(("name", "scale"), [("sd", 7.5), ("sdxl", 5.0), ("sdxl", 1.0)])
def test_a_picture_is_that_of_diffusers_pipeline(studios, pipelines, name, scale):
    studio = studios[name]
    line = f"a red cat --n blurry dog --w 64 --h 96 --l {scale} --s 4 --d 7"
    prompt = parse_line(line, "test", defaults_of(studio.family))
    cond, uncond = pair_of(studio, line)
    x = sample.generate_latents(studio.family, studio.denoiser, cond, uncond, shape=(4, 12, 8), seed=7,
                                steps=prompt.sample_steps, scale=prompt.scale, shift=1.0, device="cpu")  # fmt: skip
    theirs = pipelines[name](
        "a red cat", negative_prompt="blurry dog", width=64, height=96, num_inference_steps=4, guidance_scale=scale,
        latents=start_of((4, 12, 8), 7), output_type="latent",
    ).images  # fmt: skip
    assert relative(x, theirs) < 1e-4


def test_a_batch_of_two_items_is_two_batches_of_one(studios):
    for name, studio in studios.items():
        conds = [pair_of(studio, line)[0] for line in ("a red cat --w 64 --h 64", "a house --w 96 --h 64")]
        conds[1]["text"] = torch.cat([conds[1]["text"], conds[0]["text"]])
        both, each = batched_and_one_by_one(studio, conds, (4, 8, 8))
        assert relative(both, each) < 1e-5, name


# ---------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [  # the examples and rules in the documentation of A1111's web UI, "Attention/emphasis"
        ("a (word)", [("a ", 1.0), ("word", 1.1)]),
        ("a ((word))", [("a ", 1.0), ("word", 1.21)]),
        ("a [word]", [("a ", 1.0), ("word", 1 / 1.1)]),
        ("a (word:1.5)", [("a ", 1.0), ("word", 1.5)]),
        ("a (word:0.25)", [("a ", 1.0), ("word", 0.25)]),
        ("a \\(word\\)", [("a (word)", 1.0)]),
        ("(a (b:2) c)", [("a ", 1.1), ("b", 2.2), (" c", 1.1)]),
        ("a (b", [("a ", 1.0), ("b", 1.1)]),
        ("ratio 3:4, a) b", [("ratio 3:4, a) b", 1.0)]),
    ],
)
def test_weights_of_words(prompt, parts):
    found = clip_prompts.weighted_parts(prompt)
    assert [text for text, _ in found] == [text for text, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


def test_weighted_and_long_captions(tomls, studios):
    """Weights multiply the states of the words' tokens; every 75 tokens are encoded with a start and an end."""
    weighted, long = (studio_of(tomls["sdxl"], **c) for c in ({"max_token_length": "225"}, {"max_token_length": "150"}))
    plain, encoders = studios["sdxl"], studios["sdxl"].encoders
    settings = {"most": 225, "weighted": True}
    with torch.no_grad():
        heavy, light = (
            sdxl.encode(*encoders, Text(f"a (red:{weight}) cat"), "cpu", **settings)["text"] for weight in (3, 1.5)
        )
        words = "the picture of a house and a dog " * 20
        two, three = (studio.family.encode(*encoders, Text(words), "cpu") for studio in (long, weighted))
        first = plain.family.encode(*encoders, Text(words), "cpu")
    ratio = (heavy / light).mean(-1)
    red = len(encoders[1][0]("a ", add_special_tokens=False).input_ids) + 1
    assert ratio[red] == pytest.approx(2.0, rel=1e-4) and ratio[red - 1] == pytest.approx(1.0, rel=1e-4)
    assert len(first["text"]) == 77 and len(two["text"]) == 154 and len(three["text"]) == 231
    assert relative(three["text"][:77], first["text"]) < 1e-5 and relative(three["text"][:154], two["text"]) < 1e-5
    assert relative(first["pooled"], three["pooled"]) < 1e-5  # bigG's vector is that of the first 75
    ids, cut = plain.family.tokenize(encoders[1], words)
    assert len(ids) == 75 and cut.endswith("a dog ")
    with pytest.raises(ConfigError, match="--max_token_length 100: 75, 150 and 225"):
        studio_of(tomls["sdxl"], max_token_length="100")


def test_size_and_crop_stand_in_the_order_of_stability_ais_code():
    item = ItemInput(None, (), original_size=(640, 480), crop=(16, 8), size=(512, 448))
    assert get_family("sdxl").encode_item(None, [], item)["size"].tolist() == [480, 640, 8, 16, 448, 512]


# ---------------------------------------------------------------- what a file and the options say about the objective


def options_of(path, **changes):
    values = {
        "v_parameterization": False,
        "zero_terminal_snr": False,
        "max_token_length": 75,
        "weighted_captions": False,
    }
    return SimpleNamespace(pretrained_model_name_or_path=str(path), **(values | changes))


@pytest.mark.parametrize(
    ("keys", "changes", "expected"),
    [
        ([], {}, ("epsilon", False)),
        (["v_pred"], {}, ("v", False)),
        (["v_pred", "ztsnr"], {}, ("v", True)),
        ([], {"v_parameterization": True, "zero_terminal_snr": True}, ("v", True)),
    ],
)
def test_markers_and_options_say_what_is_predicted_and_a_full_save_says_it_too(keys, changes, expected, tmp_path):
    save_file({key: torch.empty(0) for key in keys} | {"x": torch.ones(1)}, tmp_path / "x.safetensors")
    family = get_family("sdxl").resolved(options_of(tmp_path / "x.safetensors", **changes))
    assert (family.objective.prediction_type, family.objective.zero_terminal_snr) == expected
    wanted = {key for key, on in zip(("v_pred", "ztsnr"), (expected[0] == "v", expected[1]), strict=True) if on}
    assert family.markers(family).keys() == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_terminal_snr": True}, "--zero_terminal_snr needs a model that predicts v"),
        ({"v_parameterization": True, "v_pred_like_loss": 1.0}, "--v_pred_like_loss is for models that predict noise"),
        ({"scale_v_pred_loss_like_noise_pred": True}, "is for models that predict v, this one predicts noise"),
    ],
)
def test_options_that_contradict_each_other(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        sd.objective_of(options_of(tmp_path / "none", **changes))


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def lora(tomls, drawings, tmp_path_factory):  # noqa: F811
    """A LoRA of the UNet with convolutions and of both encoders, everything that shapes noise and loss switched on."""
    output = tmp_path_factory.mktemp("lora")
    words = ["--config_file", str(tomls["sdxl"]), "--dataset_config", str(drawings), "--output_dir", str(output),
             "--output_name", "run", "--max_train_steps", "3", "--unet_lr", "1e-2", "--text_encoder_lr", "3e-3", "1e-3",
             "--network_args", "conv_dim=2", "--noise_offset", "0.05", "--multires_noise_iterations", "3",
             "--min_snr_gamma", "5", "--debiased_estimation_loss", "--weighted_captions", "--max_token_length", "150",
             "--cache_latents", "--gradient_checkpointing", "--no_half_vae"]  # fmt: skip
    trainer = NetworkTrainer(options.parse("sdxl", words, "test"))
    trainer.run()
    return trainer, output


def test_every_model_has_its_own_learning_rate_and_names(lora):
    trainer, output = lora
    assert len(losses(output)) == 3
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert sorted(rates.values()) == [1e-3, 3e-3, 1e-2], rates
    weights = load_file(output / "run.safetensors")
    moved = {key for key, value in weights.items() if key.endswith("lora_up.weight") and value.abs().sum() > 0}
    for start in ("lora_unet_input_blocks_4_1_", "lora_unet_input_blocks_1_0_in_layers_2",
                  "lora_te1_text_model_encoder_layers_0_", "lora_te2_text_model_encoder_layers_0_"):  # fmt: skip
        assert any(key.startswith(start) for key in moved), start
    last = [key for key in weights if "_layers_2_" in key and "lora_up" in key]
    assert last and not any(key in moved for key in last if key.startswith("lora_te1"))  # the last layer is not read


def test_comfyui_knows_every_module_of_all_models(lora, tmp_path):
    """Those of encoders with `text_model.`, which transformers 5 has dropped."""
    trainer = lora[0]
    text_styles = read_json("lora_keys/sdxl")["text_encoder_styles"].values()
    known = accepted_stems("sdxl") | {stem for style in text_styles for stem in style["keys"]}
    for format_name in ("kohya", "comfy"):
        trainer.network.save_format = format_name
        trainer.network.save_weights(str(tmp_path / "x.safetensors"), torch.float32, {})
        stems = {key.split(".lora_")[0].removesuffix(".alpha") for key in load_file(tmp_path / "x.safetensors")}
        assert len(stems) == 258 + 36 and stems <= known, sorted(stems - known)[:3]


@pytest.mark.parametrize("format_name", ["kohya", "diffusers"])
def test_diffusers_loads_what_is_saved_and_draws_what_we_draw(format_name, lora, tomls, studios, tmp_path):
    trainer, output = lora
    trainer.network.save_format = format_name
    path = tmp_path / "lora.safetensors"
    trainer.network.save_weights(str(path), torch.float32, {})
    studio = studio_of(tomls["sdxl"], lora_weight=str(path))
    line = "a red cat --n blurry --w 64 --h 64 --l 5 --s 2"
    cond, uncond = pair_of(studio, line)
    ours = sample.generate_latents(studio.family, studio.denoiser, cond, uncond, shape=(4, 8, 8), seed=7, steps=2,
                                   scale=5.0, shift=1.0, device="cpu")  # fmt: skip
    pipeline = pipeline_of(studios["sdxl"])
    draw = {"negative_prompt": "blurry", "width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 5.0,
            "output_type": "latent"}  # fmt: skip
    before = pipeline("a red cat", latents=start_of((4, 8, 8), 7), **draw).images
    pipeline.load_lora_weights(str(path))
    theirs = pipeline("a red cat", latents=start_of((4, 8, 8), 7), **draw).images
    assert relative(before, theirs) > 1e-3 and relative(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_full_fine_tune_with_its_encoders_is_one_checkpoint_as_the_base(name, tomls, drawings, tmp_path):  # noqa: F811
    base = tomls[name].with_name("denoiser.safetensors")
    tensors = load_file(base) | {"model_ema.decay": torch.ones(()), "somebodys.key": torch.ones(2)}
    save_file(tensors, tmp_path / "base.safetensors")
    words = ["--config_file", str(tomls[name].with_name("toy_full.toml")), "--dataset_config", str(drawings),
             "--pretrained_model_name_or_path", str(tmp_path / "base.safetensors"), "--output_dir", str(tmp_path),
             "--output_name", "run", "--max_train_steps", "1", "--learning_rate", "1e-3", "--text_encoder_lr", "1e-3",
             "--v_parameterization", "--zero_terminal_snr", "--cache_latents"]  # fmt: skip
    NetworkTrainer(options.parse(name, words, "test")).run()
    before, after = load_file(base), load_file(tmp_path / "run.safetensors")
    markers = {"v_pred", "ztsnr"} if name == "sdxl" else set()
    assert after.keys() == before.keys() | {"somebodys.key"} | markers
    assert not any(after[key].numel() for key in markers)
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"model", {"sd": "cond_stage_model", "sdxl": "conditioner"}[name]}
    with safe_open(tmp_path / "run.safetensors", "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "v"
