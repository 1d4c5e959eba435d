"""HunyuanVideo and SkyReels V1 as a whole: texts and videos against diffusers' pipelines, LoRA files, which file is
which model."""

import json

import numpy as np
import pytest
import torch
from hunyuan_video_support import (  # noqa: F401
    Padded,
    clips,
    conditions,
    make_toy,
    photo,
    studio_of,
    trainer_of,
    widened,
)
from oracles import SHARED, accepted_stems, read_json, relative
from PIL import Image
from safetensors.torch import load_file, save_file
from training_support import losses

from library import checkpoints, sample
from library.components.hunyuan_text import PICTURE, VIDEO
from library.errors import ConfigError, DatasetError
from library.families import get_family
from library.families.family import ItemInput, Text
from library.families.hunyuan_video import DENOISER
from library.strategies import Request

FAMILY = get_family("hunyuan_video")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    toml = make_toy("hunyuan_video", tmp_path_factory.mktemp("hunyuan_video"))
    widened(toml.with_name("denoiser.safetensors"), toml.with_name("skyreels_i2v.safetensors"), 16)
    return toml


def words_of(toml, denoiser="denoiser"):
    words = ["--dit", str(toml.with_name(f"{denoiser}.safetensors"))]
    for name in ("vae", "text_encoder", "clip_l"):
        words += [f"--{name}", str(toml.with_name(f"{name}.safetensors"))]
    return words + [w for n in ("tokenizer", "tokenizer_clip_l") for w in (f"--{n}", str(toml.with_name(n)))]


@pytest.fixture(scope="module")
def studios(toy):
    made = {}

    def studio(denoiser="denoiser"):
        if denoiser not in made:
            made[denoiser] = studio_of("hunyuan_video", words_of(toy, denoiser))
        return made[denoiser]

    return studio


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("caption", ["a red cat and a dog", "", "the house " * 400])
@pytest.mark.parametrize("is_still", [False, True])
def test_text_is_what_diffusers_pipeline_encodes(studios, caption, is_still):
    """Padded and masked there, trimmed here. With this tokenizer the template has another length than with Llama's."""
    from diffusers import HunyuanVideoPipeline

    (llava, clip_l), tokenizers = studios().encoders
    head = PICTURE if is_still else VIDEO
    length = len(tokenizers[0](head, add_special_tokens=False)["input_ids"])
    template = {"template": head.removeprefix("<|begin_of_text|>") + "{}<|eot_id|>", "crop_start": length}
    pipeline = HunyuanVideoPipeline.__new__(HunyuanVideoPipeline)
    modules = {"text_encoder": llava, "text_encoder_2": clip_l.text_model, "tokenizer": Padded(tokenizers[0])}
    clip_padded = tokenizers[1].__call__
    for name, value in (modules | {"tokenizer_2": clip_padded}).items():
        object.__setattr__(pipeline, name, value)
    with torch.no_grad():
        theirs, mask = pipeline._get_llama_prompt_embeds(caption, template, device="cpu")
        ids = tokenizers[1]([caption], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        pooled = clip_l.text_model(ids.input_ids).pooler_output
        encode = Request.of(FAMILY, caption, frames=1 if is_still else 9).encoder(FAMILY)
        ours = encode([llava, clip_l], tokenizers, Text(caption), "cpu")
    count = int(mask.sum())
    assert len(ours["text"]) == count <= 256 and relative(ours["text"], theirs[0, :count]) < 1e-5
    assert relative(ours["pooled"], pooled[0]) < 1e-5
    cut = FAMILY.tokenize(tokenizers, caption)[1]
    assert ("house" in cut) == (len(caption) > 1000) and (count == 256) == bool(cut)


def test_the_heads_of_the_templates_have_the_published_lengths():
    """95 and 36 tokens of Llama 3, whose pieces of these plain words are those of Qwen's tokenizer."""
    import re

    from transformers import AutoTokenizer

    folder = SHARED / "tokenizers" / "qwen25"
    if not folder.exists():
        pytest.skip("the tokenizer of Qwen2.5 is not in this repository")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for head, length in ((VIDEO, 95), (PICTURE, 36)):
        pieces = [piece for piece in re.split(r"(<\|\w+\|>)", head) if piece]
        plain = [piece for piece in pieces if not piece.startswith("<|")]
        assert sum(len(tokenizer(one)["input_ids"]) for one in plain) + len(pieces) - len(plain) == length
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    assert "<|begin_of_text|>" + DEFAULT_PROMPT_TEMPLATE["template"].removesuffix("{}<|eot_id|>") == VIDEO


def test_pictures_and_clips_of_one_caption_are_cached_apart(toy, clips, photo, tmp_path):
    for k in range(2):
        (tmp_path / f"{k}.txt").write_text("a video of thing 0", encoding="utf-8")
        Image.open(photo).save(tmp_path / f"{k}.png")
    more = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = {json.dumps(str(tmp_path))}\n"
    data = tmp_path / "both.toml"
    data.write_text(clips.read_text(encoding="utf-8") + more + "caption_extension = '.txt'\n", encoding="utf-8")
    trainer = trainer_of("hunyuan_video", toy, data, tmp_path / "out", "--cache_text_encoder_outputs_to_disk")
    trainer.run()
    kept = trainer.text.memory
    pair = [kept[Request.of(FAMILY, "a video of thing 0", frames=n)]["text"] for n in (1, 9)]
    assert pair[0].shape == pair[1].shape and relative(*pair) > 1e-3
    assert Request.of(FAMILY, "x", frames=1).is_still and not Request.of(get_family("wan"), "x", frames=1).is_still


# ---------------------------------------------------------------- videos


def pipeline_of(studio, kind):
    import diffusers

    transformer = diffusers.HunyuanVideoTransformer3DModel(
        **{k: v for k, v in studio.denoiser.config.items() if not k.startswith("_")}
    )
    transformer.load_state_dict(studio.denoiser.state_dict())
    pipeline = getattr(diffusers, kind)(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, vae=studio.vae,
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embeds(cond, negative=""):
    text = cond["text"][None]
    return {f"{negative}prompt_embeds": text, f"{negative}pooled_prompt_embeds": cond["pooled"][None],
            f"{negative}prompt_attention_mask": torch.ones(text.shape[:2])}  # fmt: skip


@pytest.mark.parametrize("model", ["denoiser", "skyreels_i2v"])
def test_a_video_is_the_one_that_diffusers_pipeline_makes(studios, photo, model, monkeypatch):
    """With the embedded guidance, which the denoiser is given times 1000; SkyReels' also with its first frame."""
    import diffusers

    studio, image = studios(model), "i2v" in model
    cond, uncond = conditions(studio, f"a red cat --n blurry --w 64 --h 64 --f 9 {f'--i {photo}' if image else ''}")
    assert cond["guidance"] == (1.0 if image else 6.0)
    shape = (16, 3, 8, 8)
    settings = {"shape": shape, "seed": 5, "steps": 4, "scale": 6.0 if image else 1.0, "shift": 7.0, "device": "cpu"}
    ours = sample.generate_latents(studio.family, studio.denoiser, cond, uncond, **settings)
    kind = "HunyuanSkyreelsImageToVideoPipeline" if image else "HunyuanVideoPipeline"
    module = "skyreels_image2video" if image else "video"
    if image:
        module = diffusers.pipelines.hunyuan_video.pipeline_hunyuan_skyreels_image2video
        monkeypatch.setattr(module, "retrieve_latents", lambda out, generator: out.latent_dist.mode())
    start = torch.randn((1, *shape), generator=torch.Generator().manual_seed(5))
    more = {"image": Image.open(photo), "true_cfg_scale": 6.0, **embeds(uncond, "negative_")} if image else {}
    given = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4, "latents": start,
             "guidance_scale": 1.0 if image else 6.0, "return_dict": False, **embeds(cond), **more}  # fmt: skip
    pipeline = pipeline_of(studio, kind)
    with torch.no_grad():
        theirs = pipeline(output_type="latent", **given)[0]
        pixels = pipeline.video_processor.postprocess_video(studio.vae.decode(theirs / 0.476986).sample, "np")
    assert relative(ours, theirs) < 1e-4
    made = sample.decode(studio.family, studio.vae, ours)
    assert made.shape == (9, 64, 64, 3) and np.abs(made - pixels[0] * 255).max() < 1.5
    if not image:  # the factor of 1000
        other = sample.generate_latents(studio.family, studio.denoiser, cond | {"guidance": torch.tensor(0.006)}, None,
                                        **settings)  # fmt: skip
        assert relative(other, theirs) > 1e-3


def test_a_batch_of_two_items_is_two_batches_of_one(studios, photo):
    for model, words in (("denoiser", ""), ("skyreels_i2v", f"--i {photo}")):
        studio = studios(model)
        lines = ("a cat", "the picture of a house with a dog")
        conds = [conditions(studio, f"{line} --w 64 --h 64 --f 5 {words}")[0] for line in lines]
        conds[1]["guidance"] = torch.tensor(3.0)
        noisy, sigma = torch.randn(2, 16, 2, 8, 8), torch.tensor([0.3, 0.8])
        predict = studio.family.predict
        with torch.no_grad():
            both = predict(studio.denoiser, noisy, sigma, conds)
            each = [predict(studio.denoiser, noisy[k][None], sigma[k][None], [conds[k]]) for k in (0, 1)]
        assert relative(both, torch.cat(each)) < 1e-5


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("model", ["denoiser", "skyreels_i2v"])
def test_clips_train_a_lora_and_draw_samples(toy, clips, photo, tmp_path, model):
    (tmp_path / "p.txt").write_text(f"a cat --w 64 --h 64 --s 1 {f'--i {photo}' if 'i2v' in model else ''}\n")
    trainer = trainer_of("hunyuan_video", toy, clips, tmp_path, "--pretrained_model_name_or_path",
                         str(toy.with_name(f"{model}.safetensors")), "--sample_prompts", str(tmp_path / "p.txt"),
                         "--sample_every_n_steps", "2", "--guidance_scale", "1.5")  # fmt: skip
    trainer.run()
    assert len(losses(tmp_path)) == 2 and all(0 < loss < 100 for loss in losses(tmp_path))
    assert {p.suffix for p in (tmp_path / "sample").iterdir()} == {
        ".mp4",
        ".png",
        *([] if "i2v" in model else [".json"]),
    }
    assert trainer.family.predict.keywords == {"guidance": 1.5}
    if "i2v" in model:
        cached = trainer.latents.entry(trainer.dataset.items[0].index)
        latents, given = cached["latents"].float(), cached["image_latents"].float()
        assert given.shape == latents.shape and not given[:, 1:].any() and given[:, 0].any()


def test_skyreels_is_given_the_latents_of_the_first_frame_alone(studios):
    studio, clip = studios("skyreels_i2v"), torch.rand(3, 9, 64, 64) * 2 - 1
    with torch.no_grad():
        ours = studio.family.encode_item(studio.vae, [], ItemInput(clip, frames=9))["image_latents"]
        theirs = studio.vae.encode(clip[None, :, :1]).latent_dist.mode()[0] * 0.476986
    assert ours.shape == (16, 3, 8, 8) and relative(ours[:, :1], theirs) < 1e-5 and not ours[:, 1:].any()


def test_image_to_video_refuses_pictures_and_prompts_without_a_first_frame(toy, photo, clips, tmp_path):
    photo.with_suffix(".txt").write_text("a cat", encoding="utf-8")
    subset = f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(photo.parent))}\ncaption_extension = '.txt'\n"
    (tmp_path / "data.toml").write_text("[[datasets]]\nresolution = 64\n" + subset, encoding="utf-8")
    dit = ["--pretrained_model_name_or_path", str(toy.with_name("skyreels_i2v.safetensors"))]
    with pytest.raises(DatasetError, match="SkyReels V1 I2V is trained on clips of at least 5 frames; first.png"):
        trainer_of("hunyuan_video", toy, tmp_path / "data.toml", tmp_path, *dit)
    (tmp_path / "p.txt").write_text("a cat --f 9\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no first frame, and SkyReels V1 I2V continues a picture"):
        trainer_of("hunyuan_video", toy, clips, tmp_path, *dit, "--sample_prompts", str(tmp_path / "p.txt"))


def test_fp8_single_files_train_with_their_blocks_left_in_fp8(toy, clips, tmp_path):
    """As `hunyuan_video_720_cfgdistill_fp8_e4m3fn`: weights cast to fp8 without scales, under a container's prefix."""
    weights = load_file(toy.with_name("denoiser.safetensors"))
    cast = {f"model.model.{key}": value.to(torch.float8_e4m3fn) if "blocks" in key and value.ndim == 2 else value
            for key, value in weights.items()}  # fmt: skip
    save_file(cast, tmp_path / "fp8.safetensors")
    plain = checkpoints.load_part(DENOISER, tmp_path / "fp8.safetensors", dtype=torch.float32)
    key = "transformer_blocks.0.ff.net.0.proj.weight"
    assert torch.equal(plain.state_dict()[key], cast["model.model.double_blocks.0.img_mlp.fc1.weight"].float())
    runs = []
    for name, extra in (("a", ["--fp8_base"]), ("b", [])):
        trainer_of("hunyuan_video", toy, clips, tmp_path / name, "--pretrained_model_name_or_path",
                   str(tmp_path / "fp8.safetensors"), "--seed", "1", *extra).run()  # fmt: skip
        runs.append(losses(tmp_path / name))
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)


# ---------------------------------------------------------------- LoRA files


def full_width():
    """The layout of a model of the released width with one block of each kind."""
    from library.layout import shapes_of

    shapes = {key: tuple(shape) for key, shape in read_json("layouts/hunyuan_video")["keys"].items()}
    configuration = DENOISER.config(shapes, {}, DENOISER.recognise(shapes))
    with torch.device("meta"):
        ours = shapes_of(DENOISER.build(configuration | {"num_layers": 1, "num_single_layers": 1}))
    return checkpoints.layout_of(DENOISER, "comfy", ours)


@pytest.fixture(scope="module")
def wide():
    layout, generator = full_width(), torch.Generator().manual_seed(0)
    modules = {}
    for name, entry in layout.their_modules.items():
        if name.startswith(("double_blocks.", "single_blocks.")) and len(entry.shape) == 2:
            up, down = (torch.randn(n, generator=generator) for n in entry.shape)
            modules[name] = {"down": down[None], "up": up[:, None], "alpha": 0.5}
    return layout, modules


def test_the_default_format_has_the_releases_names_which_comfyui_takes(wide):
    from networks import formats

    layout, modules = wide
    assert FAMILY.save_formats[0] == "original"
    keys = formats.write(modules, "original", layout)
    assert "transformer.double_blocks.0.img_attn_qkv.lora_A.weight" in keys
    assert "transformer.single_blocks.0.linear1.lora_B.weight" in keys and len(keys) == 2 * len(modules)
    for form in ("original", "comfy"):
        stems = {key.rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in formats.write(modules, form, layout)}
        assert stems <= accepted_stems("hunyuan_video"), form
        assert formats.detect_format(formats.write(modules, form, layout), layout) == form


def test_a_lora_under_the_releases_names_is_known_as_one(wide, tmp_path):
    from library.fingerprints import identify_path
    from networks import formats

    layout, modules = wide
    save_file(formats.write(modules, "original", layout), tmp_path / "lora.safetensors")
    found = identify_path(tmp_path / "lora.safetensors")
    assert (found.kind, found.family, found.format) == ("lora", "hunyuan_video", "original") and not found.unmatched


def test_kohyas_names_are_musubi_tuners(wide):
    """It names modules as Tencent's code does, with underscores."""
    from networks import formats

    layout, modules = wide
    keys = formats.write(modules, "kohya", layout)
    for name in ("double_blocks_0_img_attn_qkv", "double_blocks_0_txt_mlp_fc1", "double_blocks_0_img_mod_linear",
                 "single_blocks_0_linear1", "single_blocks_0_modulation_linear"):  # fmt: skip
        assert {f"lora_unet_{name}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")} <= keys.keys()


def test_diffusers_reads_the_original_names_as_its_own_format_says(wide):
    """Its converter has the released width built in, so the model is as wide as that."""
    from diffusers import HunyuanVideoPipeline

    from networks import formats

    layout, modules = wide
    taken = HunyuanVideoPipeline.lora_state_dict(formats.write(modules, "original", layout))
    ours = formats.write(modules, "diffusers", layout)
    assert taken.keys() == ours.keys() and all(torch.equal(taken[key], ours[key]) for key in ours)


def test_diffusers_pipeline_takes_the_lora(studios, tmp_path):
    from networks import lora

    studio = studios()
    network = lora.create_network(1.0, 4, 2, None, [], studio.denoiser)
    network.save_format = "diffusers"
    for k, parameter in enumerate(network.parameters()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(k))
    network.save_weights(str(tmp_path / "lora.safetensors"), torch.float32, {})
    cond = conditions(studio, "a red cat --w 64 --h 64 --f 5")[0]
    noisy, sigma = torch.randn(1, 16, 2, 8, 8), torch.tensor([0.5])
    pipeline = pipeline_of(studio, "HunyuanVideoPipeline")
    with torch.no_grad():
        base = FAMILY.predict(studio.denoiser, noisy, sigma, [cond])
        pipeline.load_lora_weights(tmp_path / "lora.safetensors")
        text = cond["text"][None]
        theirs = pipeline.transformer(noisy, sigma * 1000, text, torch.ones(text.shape[:2]), cond["pooled"][None],
                                      cond["guidance"][None] * 1000, return_dict=False)[0]  # fmt: skip
        network.apply_to([], studio.denoiser, False, True)
        ours = FAMILY.predict(studio.denoiser, noisy, sigma, [cond])
        network.remove()
    assert relative(ours, theirs) < 1e-4 and relative(base, theirs) > 1e-2


# ---------------------------------------------------------------- which file is which model


def test_tencents_own_tree_gives_what_comfyuis_files_give(toy, studios, tmp_path):
    """`ckpts`: torch files with a `module` around the weights, LLaVA's text half and CLIP-L as folders
    that hold their tokenizers, too."""
    weights = load_file(toy.with_name("denoiser.safetensors"))
    root = tmp_path / "ckpts" / "hunyuan-video-t2v-720p"
    (root / "transformers").mkdir(parents=True)
    (root / "vae").mkdir()
    torch.save({"module": weights}, root / "transformers" / "mp_rank_00_model_states.pt")
    vae = studios().vae.state_dict()
    torch.save({"state_dict": {k: v.clone() for k, v in vae.items()}}, root / "vae" / "pytorch_model.pt")
    (llava, clip_l), tokenizers = studios().encoders
    for model, tokenizer, name in zip((llava, clip_l.text_model), tokenizers, ("text_encoder", "text_encoder_2"),
                                      strict=True):  # fmt: skip
        model.save_pretrained(tmp_path / "ckpts" / name)
        tokenizer.save_pretrained(tmp_path / "ckpts" / name)
    file = tmp_path / "ckpts" / "text_encoder" / "model.safetensors"
    save_file(load_file(file), file, {"head_dim": "16"})  # the toy's heads are narrower than Llama's
    words = ["--dit", str(root / "transformers" / "mp_rank_00_model_states.pt"), "--vae",
             str(root / "vae" / "pytorch_model.pt"), "--text_encoder", str(tmp_path / "ckpts" / "text_encoder"),
             "--clip_l", str(tmp_path / "ckpts" / "text_encoder_2")]  # fmt: skip
    noisy = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    made = []
    for studio in (studio_of("hunyuan_video", words), studios()):
        cond = conditions(studio, "a red cat --w 64 --h 64 --f 5")[0]
        with torch.no_grad():
            made.append(FAMILY.predict(studio.denoiser, noisy, torch.tensor([0.5]), [cond]))
            made.append(studio.vae.state_dict())
    assert relative(made[0], made[2]) < 1e-5
    assert made[1].keys() == made[3].keys() and all(torch.equal(made[1][key], made[3][key]) for key in made[1])


@pytest.mark.parametrize(
    ("denoiser", "extra", "said"),
    [
        ("odd", [], "20 channels in and 16 out"), ("free", ["--guidance_scale", "2"], "embeds no guidance"),
        ("denoiser", ["--text_encoder", "{clip_l}"], "is not a LLaVA-Llama-3 text encoder"),
        ("denoiser", ["--clip_l", "{text_encoder}"], "is not a CLIP-L text encoder"),
        ("denoiser", ["--save_format", "xyz"], "save_format"),
    ],
)  # fmt: skip
def test_files_and_options_of_another_model_are_one_sentence(toy, clips, tmp_path, denoiser, extra, said):
    source = toy.with_name("denoiser.safetensors")
    path = source if denoiser == "denoiser" else tmp_path / f"{denoiser}.safetensors"
    if denoiser == "odd":
        widened(source, path, 4)
    elif path != source:
        weights = load_file(source)
        save_file({k: v for k, v in weights.items() if denoiser != "free" or "guidance_in" not in k}, path)
    words = [word.format(**{n: toy.with_name(f"{n}.safetensors") for n in ("clip_l", "text_encoder")})
             for word in extra]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        trainer_of("hunyuan_video", toy, clips, tmp_path, "--pretrained_model_name_or_path", str(path), *words)
    assert said in str(caught.value) and "\n" not in str(caught.value)
