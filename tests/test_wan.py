"""Wan 2.1 and 2.2 as a whole: texts and videos against diffusers' pipelines, first frames, which file is which model."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import accepted_stems, read_json, relative
from PIL import Image
from safetensors.torch import load_file, save_file
from training_support import losses
from wan_support import (  # noqa: F401
    FAMILY,
    FILES,
    clips,
    padded_text,
    photo,
    pipeline_of,
    prompt_of,
    studios,
    toy,
    trainer_of,
    words_of,
)

from library import checkpoints, sample
from library.errors import ConfigError, DatasetError
from library.families.family import ItemInput, Text
from library.families.wan import KINDS, NEGATIVE, kind_of, noise_of
from library.inference import Studio, parser_of
from library.prompts import defaults_of, parse_line

# ---------------------------------------------------------------- text


class Padded:
    """The toy's tokenizer as the pipelines call it."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts, max_length, **_):
        rows = [self.tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (max_length - len(row)) for row in rows])
        return SimpleNamespace(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("caption", ["a red cat and a dog", "", "a  sign\n that says 'cat'", "the house " * 300])
def test_text_is_what_diffusers_pipeline_encodes_at_its_true_length(studios, caption):
    from diffusers import WanPipeline

    (encoder,), (tokenizer,) = studios("t2v").encoders
    pipeline = SimpleNamespace(text_encoder=encoder, tokenizer=Padded(tokenizer), _execution_device="cpu")
    with torch.no_grad():
        theirs = WanPipeline._get_t5_prompt_embeds(pipeline, caption, max_sequence_length=512)[0]
        ours = FAMILY.encode([encoder], [tokenizer], Text(caption), "cpu")["text"]
    assert relative(ours, theirs[: len(ours)]) < 1e-5 and not theirs[len(ours) :].any()
    assert len(ours) == (512 if len(caption) > 1000 else len(FAMILY.tokenize([tokenizer], caption)[0]))
    assert ("house" in FAMILY.tokenize([tokenizer], caption)[1]) == (len(caption) > 1000)

    # ---------------------------------------------------------------- videos


@pytest.mark.parametrize("model", ["t2v", "2.1 i2v", "2.2 i2v", "5B", "5B with a first frame"])
def test_a_video_is_the_one_that_diffusers_pipeline_makes(studios, photo, model, monkeypatch):
    studio, image = studios(model.split(" with")[0]), "i2v" in model or "first" in model
    family, prompt = studio.family, prompt_of(studios("t2v"), f"--i {photo}" if image else "")
    pair = studio.conditions(prompt)
    shape = sample.latent_shape(family, prompt, family.channels_of(studio.denoiser), family.resolution)
    assert shape == (48, 3, 4, 4) if "5B" in model else (16, 3, 8, 8)
    ours = sample.generate_latents(
        family, studio.denoiser, *pair, shape=shape, seed=5, steps=4, scale=3.5, shift=3.0, device="cpu"
    )
    start = torch.randn((1, *shape), generator=torch.Generator().manual_seed(5))
    given = {"image": Image.open(photo)} if image else {}
    clip = pair[0]["clip"][None] if "clip" in pair[0] else None  # of the same picture; how it is scaled differs
    monkeypatch.setattr("diffusers.WanImageToVideoPipeline.encode_image", lambda *a: clip)
    with torch.no_grad():
        theirs = {
            kind: pipeline_of(studio, image=image)(
                height=64, width=64, num_frames=9, num_inference_steps=4, guidance_scale=3.5, latents=start.clone(),
                prompt_embeds=padded_text(pair[0]), negative_prompt_embeds=padded_text(pair[1]), output_type=kind,
                return_dict=False, **given,
            )[0]
            for kind in ("latent", "np")
        }  # fmt: skip
    assert relative(ours, theirs["latent"]) < 1e-4
    pixels = sample.decode(family, studio.vae, ours)
    assert pixels.shape == (9, 64, 64, 3) and np.abs(pixels - theirs["np"][0] * 255).max() < 1.5


def test_clip_sees_the_first_frame_as_diffusers_encoder_does(studios, photo):
    """Of a square picture at the encoder's own size, which neither has to crop or scale."""
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor

    studio = studios("2.1 i2v")
    (encoder,) = studio.image_encoders
    side = encoder.config.image_size
    small = Image.open(photo).resize((side, side))
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    pipeline = SimpleNamespace(image_encoder=encoder, image_processor=processor, _execution_device="cpu")
    pixels = torch.tensor(np.asarray(small)).permute(2, 0, 1).float()[:, None] / 127.5 - 1
    given = ItemInput(torch.nn.functional.pad(pixels, (2, 2, 2, 2)), frames=5)
    with torch.no_grad():
        theirs = WanImageToVideoPipeline.encode_image(pipeline, small)
        ours = studio.family.encode_item(studio.vae, [encoder], ItemInput(pixels[:, :, :24, :24], frames=5))
        whole = studio.family.encode_item(studio.vae, [encoder], given)
    assert ours["clip"].shape == theirs[0].shape and ours["image_latents"].shape == (20, 2, 3, 3)
    from library.components import vision

    with torch.no_grad():
        seen = vision.prepare(encoder, pixels.movedim(1, 0), crop=False, antialias=False)
        assert relative(vision.states(encoder, seen, -2), theirs) < 1e-4
    assert not torch.equal(whole["clip"], ours["clip"])


def test_a_batch_of_two_items_is_two_batches_of_one(studios, photo):
    for model in ("t2v", "2.1 i2v"):
        studio = studios(model)
        words = f"--i {photo}" if "i2v" in model else ""
        lines = ("a cat", "the picture of a house with a dog")
        conds = [studio.conditions(parse_line(f"{line} --w 64 --h 64 --f 5 {words}", "x"))[0] for line in lines]
        noisy, sigma = torch.randn(2, 16, 2, 8, 8), torch.tensor([0.3, 0.8])
        with torch.no_grad():
            both = FAMILY.predict(studio.denoiser, noisy, sigma, conds)
            each = [FAMILY.predict(studio.denoiser, noisy[k][None], sigma[k][None], [conds[k]]) for k in (0, 1)]
        assert relative(both, torch.cat(each)) < 1e-5


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("model", ["2.1 i2v", "2.2 i2v", "5B"])
def test_clips_train_a_lora_that_comfyui_takes_and_draw_samples(toy, clips, photo, tmp_path, model):
    prompts = tmp_path / "p.txt"
    prompts.write_text(f"a cat --w 64 --h 64 --s 1 --l 1 --i {photo}\n", encoding="utf-8")
    trainer = trainer_of(toy, model, clips, tmp_path, "--cache_latents", "--cache_text_encoder_outputs",
                         "--sample_prompts", str(prompts), "--sample_every_n_steps", "2")  # fmt: skip
    trainer.run()
    assert len(losses(tmp_path)) == 2 and all(0 < loss < 100 for loss in losses(tmp_path))
    known = accepted_stems(FILES[model][0])
    written = checkpoints.Checkpoint.open(tmp_path / "run.safetensors").shapes
    assert {key.rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in written} <= known
    assert {p.suffix for p in (tmp_path / "sample").iterdir()} == {".mp4", ".png"}
    if model == "2.1 i2v":
        assert any("k_img" in key for key in written)


@pytest.mark.parametrize("model", ["2.1 i2v", "2.2 i2v", "5B"])
def test_a_full_fine_tune_has_the_names_of_its_file(toy, clips, tmp_path, model):
    from library import options
    from train_network import NetworkTrainer

    words = [word.replace("--dit", "--pretrained_model_name_or_path") for word in words_of(toy, model)]
    del words[(at := words.index("--device")) : at + 2]
    words += [
        "--dataset_config",
        str(clips),
        "--output_dir",
        str(tmp_path),
        "--output_name",
        "run",
        "--max_train_steps",
        "1",
    ]
    NetworkTrainer(options.parse("wan", [*words, "--learning_rate", "1e-3"], "test")).run()
    before, after = (load_file(path) for path in (toy / f"{FILES[model][1]}.safetensors", tmp_path / "run.safetensors"))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert not any(torch.equal(value, after[key]) for key, value in before.items())


def test_what_conditions_a_clip_is_what_the_pipeline_makes_of_its_first_frame(toy, clips, studios, tmp_path):
    trainer = trainer_of(toy, "2.2 i2v", clips, tmp_path, "--cache_latents", "--cache_text_encoder_outputs")
    from library.stops import Stops
    from library.strategies import load_item

    trainer.stops = Stops(tmp_path)
    trainer.setup()
    item = trainer.dataset.items[0]
    cached = trainer.latents.entry(item.index)["image_latents"].float()
    pixels = load_item(item, None, flip=False)[0].pixels
    pipeline = pipeline_of(studios("2.2 i2v"), image=True)
    with torch.no_grad():
        _, theirs = pipeline.prepare_latents(
            pixels[None, :, 0], 1, 16, 64, 64, 9, torch.float32, torch.device("cpu"), None, torch.zeros(1, 16, 3, 8, 8)
        )
    assert relative(cached, theirs[0]) < 1e-3  # kept in float16
    assert torch.equal(cached[:4], theirs[0, :4])


def test_image_to_video_models_refuse_pictures_and_prompts_without_one(toy, clips, photo, tmp_path):
    data = tmp_path / "data.toml"
    (photo.with_suffix(".txt")).write_text("a cat", encoding="utf-8")
    subset = f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(photo.parent))}\ncaption_extension = '.txt'\n"
    data.write_text("[[datasets]]\nresolution = 64\n" + subset, encoding="utf-8")
    with pytest.raises(DatasetError, match="Wan 2.2 I2V A14B is trained on clips of at least 5 frames; first.png"):
        trainer_of(toy, "2.2 i2v", data, tmp_path)
    (tmp_path / "p.txt").write_text("a cat --f 9\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no first frame, and Wan 2.1 I2V continues a picture"):
        trainer_of(toy, "2.1 i2v", clips, tmp_path, "--sample_prompts", str(tmp_path / "p.txt"))
    trainer_of(toy, "5B", data, tmp_path)  # pictures are fine where a first frame is a choice


def test_5b_is_given_the_clips_first_latent_which_is_that_of_its_first_frame(toy, clips, studios, tmp_path):
    studio = studios("5B")
    pixels = torch.rand(1, 3, 9, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = studio.family.encode_image(studio.vae, pixels)
        alone = studio.family.encode_image(studio.vae, pixels[:, :, :1])
    assert relative(latents[:, :, :1], alone) < 1e-5
    options = SimpleNamespace(first_frame_conditioning_p=0.5)
    given = studio.family.vary({"text": 1}, latents[0], 0.2, options)
    assert torch.equal(given["first_frame"], latents[0, :, :1]) and given["loss_mask"].flatten().tolist() == [0, 1, 1]
    assert (
        studio.family.vary({}, latents[0], 0.7, options) == {} == studio.family.vary({}, latents[0, :, :1], 0, options)
    )
    assert studio.family.encode_item(studio.vae, [], ItemInput(pixels[0], frames=9)) == {}
    seen = studio.family.encode_item(studio.vae, [], ItemInput(pixels[0, :, :1], frames=9))
    assert torch.equal(seen["first_frame"], alone[0])
    runs = {}
    for share in ("0", "1"):
        trainer = trainer_of(toy, "5B", clips, tmp_path / share, "--first_frame_conditioning_p", share)
        trainer.run()
        runs[share] = losses(tmp_path / share)
    assert runs["0"] != runs["1"]


# ---------------------------------------------------------------- which file is which model


@pytest.mark.parametrize(
    ("layout", "path", "version", "kind"),
    [
        ("wan", "wan2.1_t2v_1.3B_bf16.safetensors", None, "2.1 1.3B"),
        ("wan_t2v_14b", "wan2.1_t2v_14B.safetensors", None, "2.1"),
        ("wan_t2v_14b", "merged.safetensors", "2.2", "2.2"),
        ("wan_i2v_14b", "x.safetensors", None, "2.1 i2v"),
        ("wan22_a14b_t2v", "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", None, "2.2"),
        ("wan22_a14b_t2v", "Wan2.2-T2V-A14B/low_noise_model", None, "2.2"),
        ("wan22_a14b_i2v", "x.safetensors", None, "2.2 i2v"), ("wan22_ti2v_5b", "x.safetensors", None, "2.2 5B"),
    ],
)  # fmt: skip
def test_the_real_files_are_known_by_their_headers_and_names(layout, path, version, kind):
    from library.components.wan import DENOISER

    shapes = {key: tuple(shape) for key, shape in read_json(f"layouts/{layout}")["keys"].items()}
    config = DENOISER.config(shapes, {}, DENOISER.recognise(shapes))
    assert kind_of(path, config, version) == kind
    with pytest.raises(ConfigError, match="first and a last frame"):
        kind_of(path, config | {"pos_embed_seq_len": 514}, None)
    with pytest.raises(ConfigError, match="52 channels in"):
        kind_of(path, config | {"in_channels": 52}, None)
    if kind.startswith("2.2 "):
        with pytest.raises(ConfigError, match="--model_version 2.1"):
            kind_of(path, config, "2.1")


def test_experts_are_told_apart_by_the_names_that_people_give_them(tmp_path):
    for name, noise in (("wan2.2_i2v_high_noise_14B.safetensors", "high"), ("Wan2_2-T2V-A14B-LOW_fp8.safetensors", None),
                        ("Wan2_2-T2V-A14B-LowNoise.safetensors", "low"), ("x/low_noise_model", "low"),
                        ("low_noise_model/diffusion_pytorch_model.safetensors", "low"), ("wan.safetensors", None)):  # fmt: skip
        assert noise_of(name) == noise, name
    (tmp_path / "transformer_2").mkdir()
    (tmp_path / "transformer").mkdir()
    assert noise_of(str(tmp_path / "transformer")) == "high" and noise_of(str(tmp_path / "transformer_2")) == "low"


@pytest.mark.parametrize(
    ("model", "extra", "said"),
    [
        ("2.2 t2v", [], "--min_timestep 875 fits it"), ("2.2 t2v", ["--min_timestep", "875"], None),
        ("2.2 i2v", [], "--max_timestep 900 fits it; all of them suit"), ("2.2 i2v", ["--max_timestep", "900"], None),
        ("2.2 i2v", ["--min_timestep", "900"], "predicts below 900"), ("t2v", [], None),
        ("t2v", ["--max_timestep", "500"], "Wan 2.1 1.3B has one denoiser for all"),
        ("t2v", ["--model_version", "2.2"], "--min_timestep 875 fits its high-noise expert and --max_timestep 875"),
    ],
)  # fmt: skip
def test_the_plan_says_which_timesteps_fit_the_file(toy, clips, tmp_path, model, extra, said):
    notes = trainer_of(toy, model, clips, tmp_path, *extra).plan.warnings
    assert [said in note for note in notes] == ([True] if said else [])


@pytest.mark.parametrize(
    ("model", "extra", "said"),
    [
        ("t2v", ["--clip", "{toy}/clip.safetensors"], "Wan 2.1 1.3B, which sees no CLIP features"),
        ("2.1 i2v", ["--clip", "{toy}/t5.safetensors"], "is not a CLIP-H image encoder"),
        ("5B", ["--vae", "{toy}/vae.safetensors"], "is not a Wan 2.2 VAE"),
        ("t2v", ["--vae", "{toy}/vae22.safetensors"], "is not a Wan 2.1 or Qwen-Image VAE"),
        ("t2v", ["--first_frame_conditioning_p", "1"], "only 5B has that choice"),
        ("5B", ["--model_version", "2.1"], "is Wan 2.2 5B; remove the option"),
    ],
)  # fmt: skip
def test_files_and_options_of_another_model_are_one_sentence(toy, clips, tmp_path, model, extra, said):
    with pytest.raises(ConfigError) as caught:
        trainer_of(toy, model, clips, tmp_path, *[word.format(toy=toy) for word in extra])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def official_folder(toy, folder):
    """As Wan's own repositories: shards with an index, .pth files, UMT5 in Wan's names, its tokenizer by hub id."""
    from library.components.t5 import umt5

    parts = checkpoints.Checkpoint.open(toy / "denoiser.safetensors")
    with parts.reader() as reader:
        tensors = {key: reader.tensor(key).clone() for key in parts.files}
    halves = list(tensors)[: len(tensors) // 2], list(tensors)[len(tensors) // 2 :]
    names = [f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    folder.mkdir()
    for name, keys in zip(names, halves, strict=True):
        save_file({key: tensors[key] for key in keys}, folder / name, parts.metadata)
    index = {key: name for name, keys in zip(names, halves, strict=True) for key in keys}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"model_type": "t2v", "dim": 256}))
    encoder = checkpoints.load_part(umt5(), toy / "t5.safetensors", dtype=torch.float32)
    layout = checkpoints.layout_of(umt5(), "wan", {k: tuple(v.shape) for k, v in encoder.state_dict().items()})
    weights = encoder.state_dict()
    torch.save(
        {e.theirs: weights[e.ours[0]].clone() for e in layout.entries}, folder / "models_t5_umt5-xxl-enc-bf16.pth"
    )
    vae = checkpoints.Checkpoint.open(toy / "vae.safetensors")
    with vae.reader() as reader:
        torch.save({key: reader.tensor(key) for key in vae.files}, folder / "Wan2.1_VAE.pth")
    shutil.copytree(toy / "tokenizer", folder / "google" / "umt5-xxl")
    return folder


def fp8_scaled(source, target):
    """A file whose Linear weights are fp8 with a scale each, as ComfyUI's repacks; and one with the same values."""
    part = checkpoints.Checkpoint.open(source)
    stored, plain = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    with part.reader() as reader:
        for key in part.files:
            value = plain[key] = stored[key] = reader.tensor(key).clone()
            if value.ndim == 2 and key.endswith(".weight") and value.is_floating_point():
                scale = value.abs().max() / 448
                stored[key] = (value / scale).to(torch.float8_e4m3fn)
                stored[key.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
                plain[key] = stored[key].float() * scale
    save_file(stored, target, part.metadata)
    save_file(plain, target.with_name(f"plain_{target.name}"), part.metadata)
    return target


def drawn(words):
    options = parser_of(FAMILY).parse_args([*words, "--device", "cpu", "--save_path", "x.mp4"])
    studio = Studio(FAMILY.resolved(options), options)
    cond = studio.conditions(parse_line("a red cat", "x"))[0]
    noisy = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return FAMILY.predict(studio.denoiser, noisy, torch.tensor([0.5]), [cond])


def test_the_models_own_folder_gives_what_comfyuis_files_give(toy, tmp_path):
    folder = official_folder(toy, tmp_path / "Wan2.1-T2V-1.3B")
    words = [
        "--dit",
        str(folder),
        "--vae",
        str(folder / "Wan2.1_VAE.pth"),
        "--t5",
        str(folder / "models_t5_umt5-xxl-enc-bf16.pth"),
    ]
    theirs = drawn(words_of(toy, "t2v")[:-2])
    # not to the bit: some CPUs add in an order that depends on where in memory a weight begins
    assert relative(drawn(words), theirs) < 1e-5


def test_diffusion_pipes_file_trains_on_the_models_own_folder(toy, clips, tmp_path):
    from library import options
    from train_network import NetworkTrainer

    folder = official_folder(toy, tmp_path / "Wan2.1-T2V-1.3B")
    (tmp_path / "data.toml").write_text(
        f"resolutions = [64]\nframe_buckets = [1, 9]\n[[directory]]\npath = '{clips.parent}/clips0'\n",
        encoding="utf-8",
    )
    (tmp_path / "run.toml").write_text(
        f"output_dir = '{tmp_path}/out'\ndataset = '{tmp_path}/data.toml'\nepochs = 1\nmicro_batch_size_per_gpu = 1\n"
        f"[model]\ntype = 'wan'\nckpt_path = '{folder}'\ndtype = 'bfloat16'\ntimestep_sample_method = 'logit_normal'\n"
        "max_t = 0.875\n[adapter]\ntype = 'lora'\nrank = 4\ndtype = 'float32'\n[optimizer]\ntype = 'adamw'\nlr = 1e-3\n",
        encoding="utf-8",
    )
    trainer = NetworkTrainer(options.parse(None, ["--config_file", str(tmp_path / "run.toml")]))
    assert trainer.family.title == "Wan 2.1 1.3B" and trainer.options.max_timestep == 875
    trainer.run()
    (written,) = (tmp_path / "out").rglob("*.safetensors")
    stems = {key.rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in checkpoints.Checkpoint.open(written).shapes}
    assert stems and stems <= accepted_stems("wan")


def test_a_diffusers_folder_gives_what_comfyuis_files_give(toy, studios, tmp_path):
    """Written by diffusers and transformers themselves, from the toy's models."""
    from transformers import UMT5Config, UMT5EncoderModel

    studio, root = studios("t2v"), tmp_path / "Wan2.1-T2V-1.3B-Diffusers"
    for name, model in (("transformer", studio.denoiser), ("vae", studio.vae)):
        model.save_pretrained(root / name)
    encoder = studio.encoders[0][0]
    whole = UMT5EncoderModel(UMT5Config.from_dict(encoder.config.to_dict() | {"use_cache": False}))
    whole.shared.load_state_dict(encoder.embed_tokens.state_dict())
    whole.encoder.load_state_dict(encoder.state_dict())
    whole.save_pretrained(root / "text_encoder", max_shard_size="8MB")
    shutil.copytree(toy / "tokenizer", root / "tokenizer")
    names = checkpoints.Checkpoint.open(toy / "denoiser.safetensors").metadata
    file = root / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {key: value.clone() for key, value in studio.denoiser.state_dict().items()}
    save_file(tensors, file, names)  # the toy's heads are narrower than those of all published models
    assert relative(drawn(["--dit", str(root)]), drawn(words_of(toy, "t2v")[:-2])) < 1e-5


def test_fp8_scaled_files_are_read_with_their_scales(toy, tmp_path):
    files = {
        name: fp8_scaled(toy / f"{name}.safetensors", tmp_path / f"{name}.safetensors") for name in ("denoiser", "t5")
    }
    rest = ["--vae", str(toy / "vae.safetensors"), "--tokenizer", str(toy / "tokenizer")]
    ours = drawn(["--dit", str(files["denoiser"]), "--t5", str(files["t5"]), *rest])
    plain = {name: str(path.with_name(f"plain_{path.name}")) for name, path in files.items()}
    assert relative(ours, drawn(["--dit", plain["denoiser"], "--t5", plain["t5"], *rest])) < 1e-5
    held = drawn(["--dit", str(files["denoiser"]), "--t5", str(files["t5"]), "--fp8_scaled", *rest])
    assert relative(held, ours) < 1e-5


def test_a_folder_with_both_experts_is_refused_with_the_two_names(toy, tmp_path):
    for name in ("low_noise_model", "high_noise_model"):  # as in Wan's own repositories
        (tmp_path / "own" / name).mkdir(parents=True)
        (tmp_path / "own" / name / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="that have some: high_noise_model, low_noise_model"):
        checkpoints.Checkpoint.open(tmp_path / "own")
    for name in ("transformer", "transformer_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes((toy / "denoiser.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="transformer_2 .low noise. or .*transformer .high noise."):
        FAMILY.resolved(parser_of(FAMILY).parse_args(["--dit", str(tmp_path), "--save_path", "x"]))


@pytest.mark.parametrize("save_format", ["diffusers", "comfy"])
def test_diffusers_pipeline_takes_the_lora(studios, save_format, tmp_path):
    from networks import lora

    studio = studios("t2v")
    network = lora.create_network(1.0, 4, 4, None, [], studio.denoiser)
    network.save_format = save_format
    for k, parameter in enumerate(network.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)) * 0.1
    network.save_weights(tmp_path / "lora.safetensors", torch.float32, {})
    noisy, cond = torch.randn(1, 16, 2, 8, 8), {"text": torch.randn(7, 4096)}
    pipeline = pipeline_of(studio, image=False)
    with torch.no_grad():
        base = FAMILY.predict(studio.denoiser, noisy, torch.tensor([0.5]), [cond])
        pipeline.load_lora_weights(tmp_path / "lora.safetensors")
        theirs = FAMILY.predict(studio.denoiser, noisy, torch.tensor([0.5]), [cond])
        pipeline.unload_lora_weights()
        network.apply_to([], studio.denoiser, False, True)
        ours = FAMILY.predict(studio.denoiser, noisy, torch.tensor([0.5]), [cond])
        network.remove()
    assert relative(ours, theirs) < 1e-5 and relative(base, theirs) > 1e-2


def test_prompts_that_do_not_say_are_sampled_as_wan_samples():
    assert defaults_of(FAMILY).negative_prompt == NEGATIVE
    found = {name: (kind.sampling["sample_steps"], kind.sampling["scale"], kind.sampling["flow_shift"])
             for name, kind in KINDS.items()}  # fmt: skip
    assert found["2.2"] == (40, 3.0, 12.0) and found["2.2 5B"] == (50, 5.0, 5.0) and found["2.1"] == (50, 5.0, 5.0)
