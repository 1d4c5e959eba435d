"""HunyuanVideo-1.5 as a whole: texts and videos against diffusers' pipelines, first frames, which file is which."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hunyuan_video_support import clips, conditions, make_toy, photo, studio_of, trainer_of  # noqa: F401
from oracles import SHARED, accepted_stems, read_json, relative
from PIL import Image
from safetensors.torch import load_file, save_file
from training_support import losses

from library import checkpoints, sample
from library.components import glyphs, vision
from library.errors import ConfigError, DatasetError
from library.families import get_family
from library.families.family import ItemInput, Text
from library.families.hunyuan_video_15 import DENOISER, HEAD, TAIL, facts_of

FAMILY = get_family("hunyuan_video_15")
NAMES = {"t2v": "denoiser", "i2v": "hunyuanvideo1.5_480p_i2v", "step": "hunyuanvideo1.5_480p_i2v_step_distilled"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The files of all models have the same shapes, but that step-distilled ones embed a second time."""
    from tools.make_toy_model import part_shapes, weights

    toml = make_toy("hunyuan_video_15", tmp_path_factory.mktemp("hunyuan_video_15"))
    own = load_file(toml.with_name("denoiser.safetensors"))
    save_file(own, toml.with_name(f"{NAMES['i2v']}.safetensors"))
    second = {key.replace("time_in", "time_r_in"): value / 2 for key, value in own.items() if key.startswith("time_in")}
    save_file(own | second, toml.with_name(f"{NAMES['step']}.safetensors"))
    part = vision.siglip()
    tower = {"hidden_size": 1152, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 16,
             "num_channels": 3, "patch_size": 14, "image_size": 28, "hidden_act": "gelu_pytorch_tanh"}  # fmt: skip
    save_file(weights(part_shapes(part, tower), 5), toml.with_name("siglip.safetensors"))
    return toml


def words_of(toml, model="t2v"):
    words = ["--dit", str(toml.with_name(f"{NAMES[model]}.safetensors"))]
    words += [
        w for name in ("vae", "text_encoder", "byt5") for w in (f"--{name}", str(toml.with_name(f"{name}.safetensors")))
    ]
    words += [w for name in ("tokenizer",) for w in (f"--{name}", str(toml.with_name(name)))]
    return words + (["--image_encoder", str(toml.with_name("siglip.safetensors"))] if model != "t2v" else [])


@pytest.fixture(scope="module")
def studios(toy):
    made = {}

    def studio(model="t2v"):
        if model not in made:
            made[model] = studio_of("hunyuan_video_15", words_of(toy, model))
        return made[model]

    return studio


# ---------------------------------------------------------------- text


class Chat:
    """The toy's tokenizer with the chat template that Qwen2.5-VL's has."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def apply_chat_template(self, chats, max_length, **_):
        rows = []
        for system, user in chats:
            text = f"<|im_start|>system\n{system['content']}<|im_end|>\n<|im_start|>user\n{user['content']}{TAIL}"
            rows.append(self.tokenizer(text, add_special_tokens=False)["input_ids"][:max_length])
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (max_length - len(row)) for row in rows])
        return SimpleNamespace(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("caption", ["a red cat", "", 'a sign "cat" and “dog” and "cat"', "the house " * 1200])
def test_text_is_what_diffusers_pipeline_encodes(studios, caption):
    """Padded and masked there, trimmed here; with this tokenizer the template has another length than with Qwen's."""
    from diffusers import HunyuanVideo15Pipeline

    (qwen, byt5), (tokenizer, byte_tokenizer) = studios().encoders
    head = len(tokenizer(HEAD, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        theirs, mask = HunyuanVideo15Pipeline._get_mllm_prompt_embeds(
            qwen, Chat(tokenizer), caption, "cpu", crop_start=head
        )
        letters, letters_mask = HunyuanVideo15Pipeline._get_byt5_prompt_embeds(
            byte_tokenizer, ByT5(byt5), caption, "cpu"
        )
        ours = FAMILY.encode([qwen, byt5], [tokenizer, byte_tokenizer], Text(caption), "cpu")
    count, letter_count = int(mask.sum()), int(letters_mask.sum())
    assert len(ours["text"]) == count and relative(ours["text"], theirs[0, :count]) < 1e-5
    assert ("byt5" in ours) == ('"' in caption) == (letter_count > 0)
    if letter_count:
        assert relative(ours["byt5"], letters[0, :letter_count]) < 1e-5 and len(ours["byt5"]) == letter_count
    assert ("house" in FAMILY.tokenize([tokenizer], caption)[1]) == (len(caption) > 2000)


class ByT5:
    """The encoder as transformers' T5EncoderModel is called."""

    def __init__(self, model):
        self.model, self.config, self.dtype = model, SimpleNamespace(d_model=1472), torch.float32

    def __call__(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_the_head_of_the_template_is_108_tokens_of_the_real_tokenizer():
    import inspect

    from diffusers import HunyuanVideo15Pipeline
    from transformers import AutoTokenizer

    message = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters["system_message"].default
    assert f"<|im_start|>system\n{message}<|im_end|>\n<|im_start|>user\n" == HEAD
    folder = SHARED / "tokenizers" / "qwen25"
    if not folder.exists():
        pytest.skip("the tokenizer of Qwen2.5 is not in this repository")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer(HEAD)["input_ids"]) == 108
    ids, cut = FAMILY.tokenize([tokenizer], "a red fox " * 600)
    assert len(ids) == 1108 and "red fox" in cut and "assistant" not in cut


def test_quoted_texts_are_found_as_diffusers_finds_them():
    from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts

    for caption in ('a sign "OPEN" and “关门” and "OPEN"', "it's a dog that doesn't bark", "‘no’", '“b” "a" ""', '"'):
        assert glyphs.VIDEO.prompt(caption) == (extract_glyph_texts(caption) or "")


# ---------------------------------------------------------------- videos


def pipeline_of(studio, image):
    import diffusers
    from diffusers.guiders import ClassifierFreeGuidance
    from transformers import SiglipImageProcessor

    ours = studio.denoiser
    theirs = diffusers.HunyuanVideo15Transformer3DModel(
        **{k: v for k, v in ours.config.items() if not k.startswith("_") and k != "target_size"}, target_size=64
    )
    theirs.load_state_dict(ours.state_dict())
    guidance = studio.family.sampling["scale"]
    modules = {
        "vae": studio.vae, "text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None,
        "transformer": theirs, "guider": ClassifierFreeGuidance(guidance_scale=guidance, enabled=guidance != 1),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=studio.family.sampling["flow_shift"]),
    }  # fmt: skip
    if image:
        side = studio.image_encoders[0].config.image_size
        processor = SiglipImageProcessor(size={"height": side, "width": side}, resample=3, image_mean=[0.5] * 3,
                                         image_std=[0.5] * 3)  # fmt: skip
        modules |= {"image_encoder": studio.image_encoders[0], "feature_extractor": processor}
    kind = diffusers.HunyuanVideo15ImageToVideoPipeline if image else diffusers.HunyuanVideo15Pipeline
    pipeline = kind(**modules)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embeds(cond, negative=""):
    text, letters = cond["text"][None], cond.get("byt5", torch.zeros(1, 1472))[None]
    return {f"{negative}prompt_embeds": text, f"{negative}prompt_embeds_mask": torch.ones(text.shape[:2]),
            f"{negative}prompt_embeds_2": letters,
            f"{negative}prompt_embeds_mask_2": torch.full(letters.shape[:2], float("byt5" in cond))}  # fmt: skip


@pytest.mark.parametrize("model", ["t2v", "i2v", "step"])
def test_a_video_is_the_one_that_diffusers_pipeline_makes(studios, photo, model, monkeypatch):
    """A step-distilled model is told where each step leads, and sampled without guidance."""
    studio, image = studios(model), model != "t2v"
    words = f"--n blurry --w 64 --h 64 --f 9 {f'--i {photo}' if image else ''}"
    cond, uncond = conditions(studio, f'a sign "cat" {words}')
    assert "byt5" in cond and "byt5" not in uncond
    shape, sampling = (32, 3, 4, 4), studio.family.sampling
    scale, shift = (1.0, 7.0) if model == "step" else (6.0, 5.0)
    assert (sampling["scale"], sampling["flow_shift"]) == (scale, shift)
    settings = {"shape": shape, "seed": 5, "steps": 4, "scale": scale, "shift": shift, "device": "cpu"}
    ours = sample.generate_latents(studio.family, studio.denoiser, cond, uncond, **settings)
    pipeline = pipeline_of(studio, image)
    start = torch.randn((1, *shape), generator=torch.Generator().manual_seed(5))
    more = {"image": Image.open(photo)} if image else {"height": 64, "width": 64}
    given = {"num_frames": 9, "num_inference_steps": 4, "latents": start, "return_dict": False, **more,
             **embeds(cond), **embeds(uncond, "negative_")}  # fmt: skip
    if image:
        monkeypatch.setattr(pipeline.video_processor, "calculate_default_height_width", lambda **_: (64, 64))
        with torch.no_grad():
            seen = pipeline.encode_image(Image.open(photo), 1, "cpu", torch.float32)[0]
        assert relative(cond["clip"], seen) < 1e-2  # its processor rounds to 256 steps elsewhere
        monkeypatch.setattr(pipeline, "encode_image", lambda **_: cond["clip"][None])
    with torch.no_grad():
        theirs = pipeline(output_type="latent", **given)[0]
        pixels = pipeline.video_processor.postprocess_video(studio.vae.decode(theirs / 1.03682).sample, "np")
    assert relative(ours, theirs) < 1e-4
    made = sample.decode(studio.family, studio.vae, ours)
    assert made.shape == (9, 64, 64, 3) and np.abs(made - pixels[0] * 255).max() < 1.5


def test_siglip_sees_the_whole_frame_as_its_published_processor_shows_it(studios, photo):
    """Of a picture at the encoder's own size, which neither has to scale; and of another shape, squeezed."""
    studio = studios("i2v")
    (encoder,) = studio.image_encoders
    side, pipeline = encoder.config.image_size, pipeline_of(studios("i2v"), True)
    small = Image.open(photo).convert("RGB").resize((side, side))
    pixels = torch.tensor(np.asarray(small)).permute(2, 0, 1).float()[None] / 127.5 - 1
    with torch.no_grad():
        theirs = pipeline.encode_image(small, 1, "cpu", torch.float32)[0]
        ours = vision.states(encoder, vision.prepare(encoder, pixels, crop=False, clip_colours=False))[0]
        wide = torch.rand(3, 9, 32, 64) * 2 - 1
        cond = studio.family.encode_item(studio.vae, [encoder], ItemInput(wide, frames=9))
        theirs_latents = studio.vae.encode(wide[None, :, :1]).latent_dist.mode()[0] * 1.03682
    assert relative(ours, theirs) < 1e-5
    latents = cond["image_latents"]
    assert latents.shape == (33, 3, 2, 4) and relative(latents[:32, :1], theirs_latents) < 1e-5
    assert not latents[:, 1:].any() and latents[32, 0].eq(1).all() and cond["clip"].shape == (4, 1152)


def test_items_with_and_without_quoted_text_and_pictures_in_one_batch(studios, photo):
    """An absent branch is of no token, which diffusers' all-zero switch for the whole batch is not."""
    studio = studios("i2v")
    conds = [conditions(studio, f"{line} --w 64 --h 64 --f 5 --i {photo}")[0]
             for line in ("a cat", 'the house with a sign "cat"')]  # fmt: skip
    conds.append({"text": conds[1]["text"]})
    noisy, sigma = torch.randn(3, 32, 2, 4, 4), torch.tensor([0.3, 0.8, 0.5])
    with torch.no_grad():
        whole = FAMILY.predict(studio.denoiser, noisy, sigma, conds)
        each = [FAMILY.predict(studio.denoiser, noisy[k][None], sigma[k][None], [conds[k]]) for k in range(3)]
    assert relative(whole, torch.cat(each)) < 1e-5


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("model", ["t2v", "i2v", "step"])
def test_clips_train_a_lora_that_comfyui_takes_and_draw_samples(toy, clips, photo, tmp_path, model):
    first = "" if model == "t2v" else f"--i {photo}"
    (tmp_path / "p.txt").write_text(f'a sign "cat" --w 64 --h 64 --s 1 --l 1 {first}\n', encoding="utf-8")
    words = ["--pretrained_model_name_or_path", *words_of(toy, model)[1:2], *words_of(toy, model)[10:]]
    trainer = trainer_of("hunyuan_video_15", toy, clips, tmp_path, *words, "--sample_prompts",
                         str(tmp_path / "p.txt"), "--sample_every_n_steps", "2")  # fmt: skip
    trainer.run()
    assert len(losses(tmp_path)) == 2 and all(0 < loss < 100 for loss in losses(tmp_path))
    known = accepted_stems("hunyuan_video_15")
    written = checkpoints.Checkpoint.open(tmp_path / "run.safetensors").shapes
    assert {key.rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in written} <= known
    assert {p.suffix for p in (tmp_path / "sample").iterdir()} == {".mp4", ".png", *([".json"] * (model == "t2v"))}
    assert ("is distilled" in " ".join(trainer.plan.warnings)) == (model == "step")
    if model != "t2v":
        cached = trainer.latents.entry(trainer.dataset.items[0].index)
        assert cached["image_latents"].shape[0] == 33 and cached["clip"].shape == (4, 1152)


def test_image_to_video_refuses_pictures_and_prompts_without_a_first_frame(toy, photo, clips, tmp_path):
    photo.with_suffix(".txt").write_text("a cat", encoding="utf-8")
    subset = f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(photo.parent))}\ncaption_extension = '.txt'\n"
    (tmp_path / "data.toml").write_text("[[datasets]]\nresolution = 64\n" + subset, encoding="utf-8")
    siglip = ["--image_encoder", str(toy.with_name("siglip.safetensors"))]
    with pytest.raises(DatasetError, match="HunyuanVideo-1.5 I2V is trained on clips of at least 5 frames; first.png"):
        trainer_of("hunyuan_video_15", toy, tmp_path / "data.toml", tmp_path, "--task", "i2v", *siglip)
    (tmp_path / "p.txt").write_text("a cat --f 9\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no first frame, and HunyuanVideo-1.5 I2V continues a picture"):
        trainer_of("hunyuan_video_15", toy, clips, tmp_path, "--task", "i2v", *siglip, "--sample_prompts",
                   str(tmp_path / "p.txt"))  # fmt: skip


# ---------------------------------------------------------------- which file is which model


@pytest.mark.parametrize(
    ("path", "config", "task", "found"),
    [
        ("hunyuanvideo1.5_480p_t2v_fp16.safetensors", {}, None, ("t2v", 480, False)),
        ("hunyuanvideo1.5_720p_i2v_cfg_distilled_fp8_scaled.safetensors", {}, None, ("i2v", 720, True)),
        ("transformer/720p_t2v/diffusion_pytorch_model.safetensors", {}, None, ("t2v", 720, False)),
        ("transformer/480p_i2v_step_distilled", {}, None, ("i2v", 480, True)),
        ("my_merge.safetensors", {}, None, ("t2v", 480, False)),
        ("my_merge.safetensors", {}, "i2v", ("i2v", 480, False)),
        ("HunyuanVideo-1.5-X", {"task_type": "i2v", "target_size": 960}, None, ("i2v", 720, False)),
    ],
)
def test_names_and_configurations_say_which_model_a_file_is(path, config, task, found):
    assert facts_of(path, config, task) == found


def test_the_sampling_of_each_model_is_tencents(toy):
    def sampled(name):
        path = toy.with_name(name)
        if not path.exists():
            save_file(load_file(toy.with_name("denoiser.safetensors")), path)
        family = FAMILY.resolved(
            SimpleNamespace(pretrained_model_name_or_path=str(path), task=None, image_encoder=None)
        )
        return tuple(family.sampling[key] for key in ("sample_steps", "scale", "flow_shift")), family.resolution

    assert sampled("x_720p_t2v.safetensors") == ((50, 6.0, 9.0), 960)
    assert sampled("x_720p_i2v.safetensors") == ((50, 6.0, 7.0), 960)
    assert sampled("x_480p_t2v_cfg_distilled.safetensors") == ((50, 1.0, 5.0), 640)
    assert sampled(f"{NAMES['step']}.safetensors") == ((12, 1.0, 7.0), 640)


@pytest.mark.parametrize(
    ("change", "extra", "said"),
    [
        (None, ["--image_encoder", "{siglip}"], "is used for text to video; remove it, or add --task i2v"),
        ("hunyuanvideo1.5_480p_i2v", ["--task", "t2v"], "is a model for i2v; remove the option"),
        (None, ["--task", "i2v"], "--image_encoder"),
        ("sr", [], "super-resolution is not offered"), ("guided", [], "with an embedded guidance"),
        (None, ["--byt5", "{text_encoder}"], "is not a glyph ByT5"),
        (None, ["--task", "i2v", "--image_encoder", "{byt5}"], "is not a SigLIP image encoder"),
    ],
)  # fmt: skip
def test_files_and_options_of_another_model_are_one_sentence(toy, clips, tmp_path, change, extra, said):
    path = toy.with_name(f"{change or 'denoiser'}.safetensors")
    weights = load_file(toy.with_name("denoiser.safetensors"))
    if change == "sr":
        path, key = tmp_path / "sr.safetensors", "img_in.proj.weight"
        save_file(weights | {key: torch.cat([weights[key], weights[key][:, :33]], 1)}, path)
    elif change == "guided":
        path = tmp_path / "guided.safetensors"
        save_file(weights | {k.replace("time_in", "guidance_in"): v.clone() for k, v in weights.items()
                             if k.startswith("time_in")}, path)  # fmt: skip
    files = {name: toy.with_name(f"{name}.safetensors") for name in ("siglip", "text_encoder", "byt5")}
    words = [word.format(**files) for word in extra]
    with pytest.raises(ConfigError) as caught:
        trainer_of("hunyuan_video_15", toy, clips, tmp_path, "--pretrained_model_name_or_path", str(path), *words)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_tencents_split_file_and_a_diffusers_folder_give_what_comfyuis_file_gives(toy, studios, tmp_path):
    studio = studios()
    shapes = {key: tuple(value.shape) for key, value in studio.denoiser.state_dict().items()}
    layout = checkpoints.layout_of(DENOISER, "split", shapes)
    split = {key: value.clone() for key, value in layout.to_theirs(studio.denoiser.state_dict()).items()}
    assert "double_blocks.0.img_attn_q.weight" in split
    (tmp_path / "480p_t2v").mkdir()
    save_file(split, tmp_path / "480p_t2v" / "diffusion_pytorch_model.safetensors")
    root = tmp_path / "HunyuanVideo-1.5-Diffusers-480p_t2v" / "transformer"
    root.mkdir(parents=True)
    save_file({k: v.clone() for k, v in studio.denoiser.state_dict().items()}, root / "model.safetensors")
    (root / "config.json").write_text(json.dumps({"task_type": "t2v", "target_size": 640}))
    cond = conditions(studio, "a cat --w 64 --h 64 --f 5")[0]
    noisy = torch.randn(1, 32, 2, 4, 4)
    with torch.no_grad():
        made = [FAMILY.predict(checkpoints.load_part(DENOISER, path, dtype=torch.float32), noisy, torch.tensor([0.5]),
                               [cond]) for path in (toy.with_name("denoiser.safetensors"), tmp_path / "480p_t2v",
                                                    root.parent)]  # fmt: skip
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_every_module_of_the_released_model_has_comfyuis_name_in_both_of_its_formats():
    from library.layout import shapes_of
    from networks import formats

    shapes = {key: tuple(shape) for key, shape in read_json("layouts/hunyuan_video_15")["keys"].items()}
    with torch.device("meta"):
        configuration = DENOISER.config(shapes, {}, DENOISER.recognise(shapes))
        ours = shapes_of(DENOISER.build(configuration | {"num_layers": 2}))
    layout = checkpoints.layout_of(DENOISER, "comfy", ours)
    modules = {name: {"down": torch.zeros(1, e.shape[1]), "up": torch.ones(e.shape[0], 1), "alpha": 1.0}
               for name, e in layout.their_modules.items() if len(e.shape) == 2 and name.startswith("double")}  # fmt: skip
    for form in ("comfy", "kohya"):
        stems = {key.rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in formats.write(modules, form, layout)}
        assert len(stems) == 20 and stems <= accepted_stems("hunyuan_video_15"), form


# ---------------------------------------------------------------- LoRA files of musubi-tuner

# The Linear layers of a block of its model, all of which its networks.lora_hv_1_5 trains, and what each is of: the
# module in Tencent's names with q, k and v in one, the module in ComfyUI's, which third of the rows.
MUSUBI = {
    f"{stream}_{name}": (f"{stream}_{tencents}", f"{stream}_{comfyuis}", third)
    for stream in ("img", "txt")
    for name, tencents, comfyuis, third in (
        ("mod_linear", "mod.linear", "mod.lin", None),
        ("attn_q", "attn_qkv", "attn.qkv", 0),
        ("attn_k", "attn_qkv", "attn.qkv", 1),
        ("attn_v", "attn_qkv", "attn.qkv", 2),
        ("attn_proj", "attn_proj", "attn.proj", None),
        ("mlp_fc1", "mlp.fc1", "mlp.0", None),
        ("mlp_fc2", "mlp.fc2", "mlp.2", None),
    )
}


@pytest.fixture(scope="module")
def musubi(toy, tmp_path_factory):
    """(a LoRA as musubi-tuner writes it: rank 3, alpha 2; the toy's weights with it, added by hand)."""
    merged, lora = load_file(toy.with_name("denoiser.safetensors")), {}
    generator = torch.Generator().manual_seed(11)
    for key in [k for k in merged if k.startswith("double_blocks.") and k.endswith("img_mod.linear.weight")]:
        block = key.split(".")[1]
        for name, (module, _, third) in MUSUBI.items():
            weight = merged[f"double_blocks.{block}.{module}.weight"]
            rows = weight if third is None else weight.chunk(3)[third]
            down = torch.randn(3, rows.shape[1], generator=generator)
            up = torch.randn(len(rows), 3, generator=generator) / 8
            rows += 2 / 3 * (up @ down)
            stem = f"lora_unet_double_blocks_{block}_{name}"
            lora |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}
    path = tmp_path_factory.mktemp("musubi") / "musubi.safetensors"
    save_file(lora, path)
    return path, merged


def weights_in_the_files_names(denoiser):
    shapes = {key: tuple(value.shape) for key, value in denoiser.state_dict().items()}
    return checkpoints.layout_of(DENOISER, "original", shapes).to_theirs(denoiser.state_dict())


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(relative(ours[k], theirs[k]) < 1e-5 for k in ours)


def test_a_video_is_made_with_musubi_tuners_lora(toy, musubi):
    path, merged = musubi
    studio = studio_of("hunyuan_video_15", [*words_of(toy), "--lora_weight", str(path)])
    assert same(weights_in_the_files_names(studio.denoiser), merged)
    assert not same(load_file(toy.with_name("denoiser.safetensors")), merged)


@pytest.mark.parametrize("way", ["--dim_from_weights", "split_qkv=True", "neither"])
def test_training_goes_on_from_musubi_tuners_lora(toy, musubi, clips, tmp_path, way):
    """Its adapters of q, k and v are one of three times the rank, or with `split_qkv` stay three."""
    path, merged = musubi
    lines = [line for line in toy.read_text(encoding="utf-8").splitlines() if not line.startswith("network_")]
    bare = toy.with_name("no_network.toml")
    bare.write_text("\n".join(lines), encoding="utf-8")
    words = ["--network_module", "networks.lora_hv_1_5", "--network_weights", str(path)]
    words += [way] if way.startswith("--") else ["--network_dim", "3"]
    words += ["--network_args", way] if "=" in way else []
    trainer = trainer_of("hunyuan_video_15", bare, clips, tmp_path, *words)
    if way == "neither":
        with pytest.raises(ConfigError, match=r"rank 9 \(3 separate adapters side by side\), the network's is 3"):
            trainer.setup()
        return
    trainer.setup()
    trainer.network.merge(1.0)
    assert same(weights_in_the_files_names(trainer.denoiser), merged)


@pytest.mark.parametrize("to", ["comfy", "kohya", "diffusers"])
def test_musubi_tuners_lora_is_converted_to_names_that_others_read(toy, musubi, tmp_path, to):
    from tools.convert import convert

    path, merged = musubi
    base = toy.with_name("denoiser.safetensors")
    said = convert(path, tmp_path / "lora.safetensors", to, base=base, dtype="float32")
    written = load_file(tmp_path / "lora.safetensors")
    assert f"{len(written)}/{len(written)} keys match" in said and "the same update in every module" in said
    if to != "diffusers":
        assert {k.rsplit(".lora_", 1)[0].removesuffix(".alpha") for k in written} <= accepted_stems("hunyuan_video_15")
    studio = studio_of("hunyuan_video_15", [*words_of(toy), "--lora_weight", str(tmp_path / "lora.safetensors")])
    assert same(weights_in_the_files_names(studio.denoiser), merged)


def test_every_module_of_musubi_tuners_full_size_lora_is_the_rows_of_comfyuis_file(tmp_path):
    """It is known without the model's files; ComfyUI itself knows only the attention's last layers in it."""
    from library.fingerprints import identify_path
    from tools.convert import find

    shapes = {key: tuple(shape) for key, shape in read_json("layouts/hunyuan_video_15")["keys"].items()}
    lora, known = {}, accepted_stems("hunyuan_video_15")
    for block in range(54):
        for name, (tencents, comfyuis, third) in MUSUBI.items():
            out, inner = shapes[f"double_blocks.{block}.{tencents}.weight"]
            up = torch.ones(out // (1 if third is None else 3), 1)
            stem = f"lora_unet_double_blocks_{block}_{name}"
            lora |= {f"{stem}.lora_down.weight": torch.ones(1, inner), f"{stem}.lora_up.weight": up * (third or 0) + up}
            assert f"diffusion_model.double_blocks.{block}.{comfyuis}" in known
            assert (stem in known) == name.endswith("attn_proj")
    family, _, modules = find(lora, tmp_path, None, [])
    assert family is FAMILY and len(modules) == 54 * 10
    content = modules["double_blocks.53.txt_attn.qkv"]  # equal down matrices stay one
    assert torch.equal(content["up"], torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(2048)[:, None])
    save_file(lora, tmp_path / "lora.safetensors")
    found = identify_path(tmp_path / "lora.safetensors")
    assert (found.kind, found.family) == ("lora", "hunyuan_video_15") and not found.unmatched
