"""Tencent's two HunyuanVideo I2V models: the prompt with a picture, videos and denoisers against diffusers, training."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hunyuan_video_support import clips, conditions, make_toy, photo, studio_of, trainer_of, widened  # noqa: F401
from oracles import relative
from PIL import Image
from safetensors.torch import load_file, save_file
from training_support import losses
from video_support import number_of

from library import checkpoints, sample
from library.components import hunyuan_text, llava, vae_hunyuan_video
from library.errors import ConfigError, DatasetError
from library.families import get_family
from library.families.family import ItemInput, Text
from library.families.hunyuan_video import DENOISER, KIND
from library.prompts import defaults_of, parse_prompts, requests_of
from library.strategies import Request, load_item

FAMILY = get_family("hunyuan_video")
NAMES = {"concat": "hunyuan_video_image_to_video_720p", "replace": "hunyuan_video_v2_replace_image_to_video_720p"}
KINDS = {"concat": "latent_concat", "replace": "token_replace"}
EVERY = {"concat": 2, "replace": 4}
both = pytest.mark.parametrize("model", ["concat", "replace"])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    from tools.make_toy_model import part_shapes, weights
    from tools.toy_parts import llava_vision

    toml = make_toy("hunyuan_video", tmp_path_factory.mktemp("hunyuan_video"))
    text_to_video = toml.with_name("denoiser.safetensors")
    widened(text_to_video, toml.with_name(f"{NAMES['concat']}.safetensors"), 17)
    save_file(load_file(text_to_video), toml.with_name(f"{NAMES['replace']}.safetensors"))
    configuration, metadata = llava_vision()
    save_file(weights(part_shapes(llava.tower(), configuration), 3), toml.with_name("tower.safetensors"), metadata)
    return toml


def words_of(toml, model, tower="tower.safetensors", **files):
    names = {"dit": f"{NAMES.get(model, model)}.safetensors", "image_encoder": tower, "tokenizer": "tokenizer",
             "tokenizer_clip_l": "tokenizer_clip_l"}  # fmt: skip
    names |= {name: f"{name}.safetensors" for name in ("vae", "text_encoder", "clip_l")} | files
    return [word for name, file in names.items() if file for word in (f"--{name}", str(toml.parent / file))]


def training_words(toml, model):
    words = words_of(toml, model)[:4]
    return ["--pretrained_model_name_or_path", *words[1:]]


@pytest.fixture(scope="module")
def studios(toy):
    made = {}

    def studio(model):
        if model not in made:
            made[model] = studio_of("hunyuan_video", words_of(toy, model))
        return made[model]

    return studio


# ---------------------------------------------------------------- text


class Seeing:
    """A toy's tokenizer as diffusers' pipeline calls it, with a token for `<image>`."""

    image = 7  # a byte that no text of these tests has

    def __init__(self, tokenizer):
        self.tokenizer, self.pad = tokenizer, tokenizer.pad_token_id

    def convert_tokens_to_ids(self, token):
        return self.tokenizer.convert_tokens_to_ids(token)

    def __call__(self, texts, max_length, **_):
        rows = []
        for text in texts:
            before, after = (self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in text.split("<image>"))
            assert self.image not in (*before, *after)
            rows.append([self.tokenizer.bos_token_id, *before, self.image, *after][:max_length])
        ids = torch.tensor([row + [self.pad] * (max_length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (max_length - len(row)) for row in rows])
        return SimpleNamespace(input_ids=ids, attention_mask=mask)


def whole_llava(studio, image_token, pad):
    """transformers' LLaVA with the weights of a studio's text encoder and picture tower."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    (llama, _, tower), _ = studio.encoders
    config = LlavaConfig(vision_config=tower.config, text_config=llama.config, image_token_index=image_token,
                         projector_hidden_act="gelu", vision_feature_layer=-2, pad_token_id=pad,
                         vision_feature_select_strategy="default")  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(llama.state_dict())
    clip = {key: value for key, value in tower.state_dict().items() if not key.startswith(llava.PROJECTOR)}
    model.model.vision_tower.load_state_dict(clip)
    model.model.multi_modal_projector.load_state_dict(tower.multi_modal_projector.state_dict())
    return model


def pipeline_prompt(studio, picture, caption, every):
    """(states, mask) of diffusers' image-to-video pipeline for the toy's tokenizer and tower."""
    from diffusers import HunyuanVideoImageToVideoPipeline
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
    from transformers import CLIPImageProcessor

    (_, _, tower), tokenizers = studio.encoders
    side, tokenizer = tower.config.image_size, Seeing(tokenizers[0])
    start, length = len(tokenizers[0](llava.BEFORE, add_special_tokens=False)["input_ids"]), (side // 14) ** 2
    head = len(tokenizers[0](hunyuan_text.CONTINUE + llava.AFTER, add_special_tokens=False)["input_ids"])
    template = {"template": DEFAULT_PROMPT_TEMPLATE["template"], "crop_start": start + 1 + head, "image_emb_len": length,
                "image_emb_start": start, "image_emb_end": start + length}  # fmt: skip
    pipeline = HunyuanVideoImageToVideoPipeline.__new__(HunyuanVideoImageToVideoPipeline)
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    text_encoder = whole_llava(studio, tokenizer.image, tokenizer.pad)
    for name, value in {"text_encoder": text_encoder, "tokenizer": tokenizer, "image_processor": processor}.items():
        object.__setattr__(pipeline, name, value)
    with torch.no_grad():
        return pipeline._get_llama_prompt_embeds(picture, caption, template, device="cpu", image_embed_interleave=every)


def tensor_of(picture):
    return torch.tensor(np.asarray(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def encoded(studio, caption, *pictures):
    with torch.no_grad():
        return studio.family.encode(*studio.encoders, Text(caption, pictures), "cpu")


@both
@pytest.mark.parametrize("length", [0, 5, 246, 250, 251, 252, 253, 254, 256, 700])
def test_text_is_what_diffusers_pipeline_encodes(studios, photo, model, length):
    """Of every length around the one at which the answer's head begins to be cut off."""
    studio, caption = studios(model), "b" * length
    small = Image.open(photo).resize((56, 56))
    assert len(studio.encoders[1][0](caption, add_special_tokens=False)["input_ids"]) == length
    theirs, mask = pipeline_prompt(studio, small, caption, EVERY[model])
    ours = encoded(studio, caption, tensor_of(small))["text"]
    count = int(mask.sum())
    assert len(ours) == count <= 16 // EVERY[model] + 256 and relative(ours, theirs[0, :count]) < 1e-5
    cut = studio.family.tokenize(studio.encoders[1], caption)[1]
    assert len(cut) == max(0, length - 252) and set(cut) <= {"b"}


def test_the_picture_is_shown_as_llavas_own_processor_shows_it(studios, photo):
    """Its shorter side at the tower's, the middle cut out; PIL resamples in other steps than torch does."""
    studio = studios("replace")
    wide = Image.open(photo).convert("RGB").resize((160, 90))
    theirs, _ = pipeline_prompt(studio, wide, "a cat", 4)
    ours, other = encoded(studio, "a cat", tensor_of(wide))["text"], encoded(studio, "a cat")["text"]
    assert relative(ours, theirs[0, : len(ours)]) < 2e-2 < relative(other, theirs[0, : len(ours)])
    black, _ = pipeline_prompt(studio, Image.new("RGB", (96, 64)), "a cat", 4)
    assert relative(other, black[0, : len(ours)]) < 1e-5  # no picture: Tencent's code shows a black one


def test_the_prompt_is_the_published_one_in_length_too():
    """103 tokens before the caption, the picture's one among them; Qwen's pieces of plain words are Llama's."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
    from oracles import SHARED
    from transformers import AutoTokenizer

    ours = f"{llava.BEFORE}<image>{hunyuan_text.CONTINUE}{llava.AFTER}{{}}{llava.ANSWER}"
    assert ours == "<|begin_of_text|>" + DEFAULT_PROMPT_TEMPLATE["template"]
    folder = SHARED / "tokenizers" / "qwen25"
    if not folder.exists():
        pytest.skip("the tokenizer of Qwen2.5 is not in this repository")
    import re

    head = ours.split("{}")[0]
    pieces = [piece for piece in re.split(r"(<\|\w+\|>|<image>)", head) if piece]
    plain = [piece for piece in pieces if not piece.startswith("<")]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    counted = sum(len(tokenizer(one)["input_ids"]) for one in plain) + len(pieces) - len(plain)
    assert counted == DEFAULT_PROMPT_TEMPLATE["crop_start"] == 103


def test_a_whole_llava_folder_is_read_for_both_halves(toy, studios, photo, tmp_path):
    """As `llava-llama-3-8b-v1_1-transformers`, in the names that transformers 4 and 5 write."""
    studio = studios("replace")
    picture = tensor_of(Image.open(photo))
    wanted = encoded(studio, "a red cat", picture)["text"]
    model = whole_llava(studio, 7, 4)
    model.save_pretrained(tmp_path / "written")
    (file,) = (tmp_path / "written").glob("*.safetensors")
    parts = {"language_model": model.model.language_model, "vision_tower": model.model.vision_tower,
             "multi_modal_projector": model.model.multi_modal_projector}  # fmt: skip
    inside = {"language_model": "language_model.model", "vision_tower": "vision_tower.vision_model"}
    older, newer = {"language_model.lm_head.weight": model.lm_head.weight}, {"lm_head.weight": model.lm_head.weight}
    for name, part in parts.items():
        older |= {f"{inside.get(name, name)}.{key}": value for key, value in part.state_dict().items()}
        newer |= {f"model.{name}.{key}": value for key, value in part.state_dict().items()}
    said = {"head_dim": "16", "vision_num_heads": "2"}
    for number, weights in enumerate((load_file(file), older, newer)):
        folder = tmp_path / f"llava{number}"
        folder.mkdir()
        save_file({key: value.detach().clone() for key, value in weights.items()}, folder / "model.safetensors", said)
        words = words_of(toy, "replace", tower=None, text_encoder=str(folder))
        other = studio_of("hunyuan_video", words)
        assert other.family.text_encoders[2].option == "text_encoder"
        assert relative(encoded(other, "a red cat", picture)["text"], wanted) < 1e-5


def test_comfyuis_file_of_the_tower_is_told_by_the_key_that_comfyui_tells_it_by(toy):
    from library.fingerprints import identify_path

    shapes = checkpoints.Checkpoint.open(toy.with_name("tower.safetensors")).shapes
    assert {"multi_modal_projector.linear_1.bias", "vision_model.encoder.layers.2.layer_norm1.weight"} <= shapes.keys()
    assert "picture tower" in identify_path(toy.with_name("tower.safetensors")).title


# ---------------------------------------------------------------- videos


def diffusers_denoiser(studio, kind):
    import diffusers

    configuration = {k: v for k, v in studio.denoiser.config.items() if not k.startswith("_")}
    theirs = diffusers.HunyuanVideoTransformer3DModel(**configuration | {KIND: kind})
    theirs.load_state_dict(studio.denoiser.state_dict())
    return theirs.eval()


@both
def test_a_video_is_the_one_that_diffusers_pipeline_makes(studios, photo, model):
    import diffusers

    studio = studios(model)
    cond, uncond = conditions(studio, f"a red cat --n blurry --w 64 --h 64 --f 9 --i {photo} --g 5")
    assert cond["guidance"] == 5.0 and cond["text"].shape[0] != uncond["text"].shape[0]
    shape = (16, 3, 8, 8)
    settings = {"shape": shape, "seed": 5, "steps": 4, "shift": 7.0, "device": "cpu"}
    pipeline = diffusers.HunyuanVideoImageToVideoPipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, vae=studio.vae, image_processor=None,
        transformer=diffusers_denoiser(studio, KINDS[model]),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn((1, *shape), generator=torch.Generator().manual_seed(5))
    for scale in (1.0, 3.0):
        given = {}
        for name, one in (("", cond), ("negative_", uncond)):
            text = one["text"][None]
            given |= {f"{name}prompt_embeds": text, f"{name}pooled_prompt_embeds": one["pooled"][None],
                      f"{name}prompt_attention_mask": torch.ones(text.shape[:2])}  # fmt: skip
        ours = sample.generate_latents(studio.family, studio.denoiser, cond, uncond, scale=scale, **settings)
        with torch.no_grad():
            theirs = pipeline(
                Image.open(photo),
                height=64,
                width=64,
                num_frames=9,
                num_inference_steps=4,
                latents=start,
                guidance_scale=5.0,
                true_cfg_scale=scale,
                output_type="latent",
                return_dict=False,
                **given,
            )[0]
            pixels = pipeline(Image.open(photo), height=64, width=64, num_frames=9, num_inference_steps=4, latents=start,
                              guidance_scale=5.0, true_cfg_scale=scale, output_type="np", return_dict=False, **given)[0]  # fmt: skip
        kept = (
            ours[:, :, 1:] if model == "concat" else ours
        )  # Tencent cuts the first frame's time off its first model's
        assert relative(kept, theirs) < 1e-4
        made = sample.decode(studio.family, studio.vae, ours)
        assert made.shape == (5 if model == "concat" else 9, 64, 64, 3)
        assert np.abs(made - pixels[0] * 255).max() < 1.5


@both
def test_the_denoiser_is_diffusers_with_texts_of_different_lengths(studios, photo, model):
    """Each item of a batch has its own time, guidance and first frame."""
    studio = studios(model)
    lines = ("a cat", "the picture of a house with a dog")
    conds = [
        conditions(studio, f"{line} --w 64 --h 64 --f 5 --i {photo} --g {k + 2}")[0] for k, line in enumerate(lines)
    ]
    noisy, sigma = torch.randn(2, 16, 2, 8, 8), torch.tensor([0.3, 0.8])
    theirs, whole = diffusers_denoiser(studio, KINDS[model]), []
    with torch.no_grad():
        ours = studio.family.predict(studio.denoiser, noisy, sigma, conds)
        for k, cond in enumerate(conds):
            video = noisy[k].clone()
            if model == "replace":
                video[:, :1] = cond["first_frame"]
            else:
                video = torch.cat([video, cond["image_latents"]])
            text = cond["text"][None]
            whole.append(theirs(video[None], sigma[k, None] * 1000, text, torch.ones(text.shape[:2]), cond["pooled"][None],
                                cond["guidance"][None] * 1000, return_dict=False)[0])  # fmt: skip
    assert relative(ours, torch.cat(whole)) < 1e-5
    if model == "replace":  # the first frame is at time 0 and has no guidance
        with torch.no_grad():
            plain = studio.family.predict(diffusers_like(studio), noisy, sigma, conds)
        assert relative(plain[:, :, 1:], ours[:, :, 1:]) > 1e-3


def diffusers_like(studio):
    """The same weights without the clean first frame's own modulation."""
    model = type(studio.denoiser)(**{k: v for k, v in studio.denoiser.config.items() if k != KIND and k[0] != "_"})
    model.load_state_dict(studio.denoiser.state_dict())
    return model


def test_what_conditions_a_clip_is_its_first_frame_alone(studios):
    clip = torch.rand(3, 9, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae = studios("concat").vae
    with torch.no_grad():
        wanted = vae.encode(clip[None, :, :1]).latent_dist.mode()[0] * 0.476986
        concat = studios("concat").family.encode_item(vae, [], ItemInput(clip, frames=9))
        replace = studios("replace").family.encode_item(vae, [], ItemInput(clip, frames=9))
        inside = vae_hunyuan_video.encode(vae, clip[None])[0, :, :1]
    latents = concat.pop("image_latents")
    assert latents.shape == (17, 3, 8, 8) and relative(latents[:16, :1], wanted) < 1e-5 and not latents[:, 1:].any()
    assert latents[16, 0].eq(1).all() and not concat
    assert relative(replace["first_frame"], wanted) < 1e-5 and replace["loss_mask"].flatten().tolist() == [0, 1, 1]
    assert (
        relative(inside, wanted) > 1e-3
    )  # the first latent of the clip is another one: the VAE's norms see all frames


# ---------------------------------------------------------------- training


@both
def test_clips_train_a_lora_and_draw_samples(toy, clips, photo, tmp_path, model):
    from oracles import accepted_stems

    (tmp_path / "p.txt").write_text(f"a cat --w 64 --h 64 --f 9 --s 1 --i {photo}\n", encoding="utf-8")
    words = [*training_words(toy, model), "--cache_text_encoder_outputs_to_disk", "--cache_latents_to_disk",
             "--cache_dir", str(tmp_path / "cache"), "--guidance_scale", "6"]  # fmt: skip
    trainer = trainer_of("hunyuan_video", toy, clips, tmp_path / "out", *words, "--sample_prompts",
                         str(tmp_path / "p.txt"), "--sample_every_n_steps", "2")  # fmt: skip
    trainer.run()
    assert len(losses(tmp_path / "out")) == 2 and all(0 < loss < 100 for loss in losses(tmp_path / "out"))
    assert {p.suffix for p in (tmp_path / "out" / "sample").iterdir()} == {".mp4", ".png"}, "a first frame: no workflow"
    shapes = checkpoints.Checkpoint.open(tmp_path / "out" / "run.safetensors").shapes
    assert {key.rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in shapes} <= accepted_stems("hunyuan_video")
    cached = trainer.latents.entry(trainer.dataset.items[0].index)
    assert set(cached) >= ({"image_latents"} if model == "concat" else {"first_frame", "loss_mask"})
    assert "start" not in cached
    again = trainer_of("hunyuan_video", toy, clips, tmp_path / "again", *words)
    again.run()
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "out"), rel=1e-3)
    assert len(again.text.memory) == 3  # two clips and the empty text


def test_every_clip_shows_its_own_first_frame(toy, clips, photo, tmp_path):
    """Under one caption, cached for each; a prompt's picture is shown whole, and no picture is a black one."""
    data = tmp_path / "chunks.toml"
    chunks = clips.read_text(encoding="utf-8").replace("[9]", "[5]\nframe_extraction = 'chunk'")
    data.write_text(chunks, encoding="utf-8")
    trainer = trainer_of("hunyuan_video", toy, data, tmp_path, *training_words(toy, "replace"))
    family, items = trainer.family, [item for item in trainer.dataset.items if item.path.name == "1.mp4"]
    requests = [Request.of_item(family, "the same", item) for item in items]
    assert len(set(requests)) == 2 and Request.of_item(family, "the same", items[0]) == requests[0]
    for number, request, item in zip((0, 5), requests, items, strict=True):
        (seen,) = request.text(family).pictures
        assert number_of(((seen + 1) * 127.5).movedim(0, -1).numpy()) == number == item.clip.start
        assert torch.equal(seen, load_item(item, random.Random(0))[0].pixels[:, 0])
    assert Request.of(FAMILY, "the same", frames=9, first=requests[0].first) == Request("the same")
    (prompt,) = parse_prompts_of(f"x --f 9 --i {photo}", tmp_path, family)
    cond, uncond = requests_of(prompt, family)
    assert torch.equal(cond.text(family).pictures[0], tensor_of(Image.open(photo)))
    assert uncond.text(family).pictures == ()


def parse_prompts_of(line, folder, family):
    (folder / "prompts.txt").write_text(line + "\n", encoding="utf-8")
    return parse_prompts(folder / "prompts.txt", defaults_of(family))


def test_nothing_is_learned_of_the_first_frame(toy, clips, tmp_path):
    """Its prediction means nothing: the loss is that of the frames after it."""
    from dataclasses import replace

    trainer = trainer_of(
        "hunyuan_video", toy, clips, tmp_path, *training_words(toy, "replace"), "--max_train_steps", "1"
    )
    own, seen = trainer.family.predict, []

    def predict(*arguments, **more):
        out = own(*arguments, **more)
        seen.append(out.shape)
        return torch.cat([out[:, :, :1] + 1000, out[:, :, 1:]], 2)

    trainer.family = replace(trainer.family, predict=predict)
    trainer.run()
    assert seen and losses(tmp_path)[0] < 100


@both
def test_a_full_fine_tune_says_what_it_is_whatever_its_name(toy, clips, tmp_path, model):
    words = training_words(toy, model)
    trainer_of("hunyuan_video", toy.with_name("toy_full.toml"), clips, tmp_path, *words).run()
    saved, original = tmp_path / "run.safetensors", toy.with_name(f"{NAMES[model]}.safetensors")
    if model == "replace":  # the other is told by its channels
        assert checkpoints.configuration_of(DENOISER, saved)[KIND] == "token_replace"
    assert resolved(saved).title == {"concat": "HunyuanVideo I2V", "replace": "HunyuanVideo I2V v2"}[model]
    before, after = load_file(original), load_file(saved)
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)


# ---------------------------------------------------------------- which file is which model


def resolved(path, **more):
    options = {"pretrained_model_name_or_path": str(path), "guidance_scale": 1.0, "task": None, "image_encoder": "x",
               "text_encoder": None} | more  # fmt: skip
    return FAMILY.resolved(SimpleNamespace(**options))


def test_channels_configuration_option_and_name_say_which_model_a_file_is(toy, studios, tmp_path):
    plain = toy.with_name("denoiser.safetensors")
    assert resolved(plain, image_encoder=None).title == "HunyuanVideo"
    assert resolved(plain, task="i2v").title == "HunyuanVideo I2V v2"
    assert resolved(toy.with_name(f"{NAMES['concat']}.safetensors")).title == "HunyuanVideo I2V"
    replace = toy.with_name(f"{NAMES['replace']}.safetensors")
    assert resolved(replace).title == "HunyuanVideo I2V v2"
    assert resolved(replace, task="t2v", image_encoder=None).title == "HunyuanVideo"  # the name is only a name
    (tmp_path / "i2v").mkdir()
    for name, title in (("hunyuan_video_t2v", "HunyuanVideo"), ("mine", "HunyuanVideo I2V v2")):
        copy = tmp_path / "i2v" / f"{name}.safetensors"
        copy.write_bytes(plain.read_bytes())
        assert resolved(copy, image_encoder="x" if "I2V" in title else None).title == title
    renamed = tmp_path / "x.safetensors"
    renamed.write_bytes(toy.with_name(f"{NAMES['concat']}.safetensors").read_bytes())
    assert resolved(renamed).title == "HunyuanVideo I2V"
    folder = tmp_path / "HunyuanVideo-X"
    (folder / "transformer").mkdir(parents=True)
    state = {k: v.clone() for k, v in studios("replace").denoiser.state_dict().items()}
    save_file(state, folder / "transformer" / "model.safetensors")
    (folder / "transformer" / "config.json").write_text(json.dumps({KIND: "token_replace"}))
    family = resolved(folder)
    assert family.title == "HunyuanVideo I2V v2" and family.sampling["guidance_scale"] == 6.0
    with pytest.raises(ConfigError, match="--task t2v: .* is an image-to-video model"):
        resolved(folder, task="t2v")
    with pytest.raises(ConfigError, match="shows LLaVA no picture; remove it, or add --task i2v"):
        resolved(plain)


@pytest.mark.parametrize(
    ("change", "extra", "said"),
    [
        ({"image_encoder": None}, [], "--image_encoder is missing: give LLaVA's picture tower"),
        ({"image_encoder": "text_encoder.safetensors"}, [], "is not LLaVA's picture tower"),
        ({"image_encoder": "narrow.safetensors"}, [], "its states are 48 wide and"),
        ({}, ["--task", "t2v"], "is an image-to-video model"),
    ],
)
def test_files_and_options_of_another_model_are_one_sentence(toy, clips, tmp_path, change, extra, said):
    from tools.make_toy_model import part_shapes, weights
    from tools.toy_parts import llava_vision

    save_file(weights(part_shapes(llava.tower(), llava_vision(48)[0]), 3), toy.with_name("narrow.safetensors"))
    tower = change.get("image_encoder", "tower.safetensors")
    words = ["--pretrained_model_name_or_path", str(toy.with_name(f"{NAMES['concat']}.safetensors"))]
    words += ["--image_encoder", str(toy.with_name(tower))] if tower else []
    with pytest.raises(ConfigError) as caught:
        trainer_of("hunyuan_video", toy, clips, tmp_path, *words, *extra)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@both
def test_pictures_mirrored_clips_and_prompts_without_a_first_frame_are_refused(toy, photo, clips, tmp_path, model):
    photo.with_suffix(".txt").write_text("a cat", encoding="utf-8")
    subset = f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(photo.parent))}\ncaption_extension = '.txt'\n"
    (tmp_path / "data.toml").write_text("[[datasets]]\nresolution = 64\n" + subset, encoding="utf-8")
    words = training_words(toy, model)
    with pytest.raises(DatasetError, match="HunyuanVideo I2V.* is trained on clips of at least 5 frames; first.png"):
        trainer_of("hunyuan_video", toy, tmp_path / "data.toml", tmp_path, *words)
    (tmp_path / "p.txt").write_text("a cat --f 9\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no first frame, and HunyuanVideo I2V.* continues a picture"):
        trainer_of("hunyuan_video", toy, clips, tmp_path, *words, "--sample_prompts", str(tmp_path / "p.txt"))
    mirrored = tmp_path / "mirrored.toml"
    mirrored.write_text(clips.read_text(encoding="utf-8") + "flip_aug = true\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="flip_aug does not go with HunyuanVideo I2V"):
        trainer_of("hunyuan_video", toy, mirrored, tmp_path, *words)
