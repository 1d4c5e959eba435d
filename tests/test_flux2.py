"""Flux 2 as a whole: text, pictures and references against diffusers' pipelines, its variants, files and mistakes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import relative
from PIL import Image
from safetensors.torch import load_file, save_file
from studio_support import batched_and_one_by_one, make_toy, pair_of, start_of, studio_of
from training_support import losses

from library import checkpoints, options, sample
from library.components import flux2_text, tokens
from library.errors import ConfigError
from library.families import get_family
from library.families.family import Text
from library.prompts import defaults_of, parse_line

FAMILY = get_family("flux2")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Files of dev, and of klein beside them: no guidance, 27 layers of Qwen3."""
    from library.components import qwen3
    from tools import toy_parts
    from tools.make_toy_model import part_shapes, weights

    toml = make_toy("flux2", tmp_path_factory.mktemp("toys") / "flux2")
    dev, folder = load_file(toml.with_name("denoiser.safetensors")), toml.parent
    save_file({k: v for k, v in dev.items() if not k.startswith("guidance_in.")}, folder / "klein.safetensors")
    vocabulary = toy_parts.make_tokenizer(folder / "tokenizer_qwen3", "chat")
    configuration, metadata = toy_parts.qwen3(32, vocabulary)
    shapes = part_shapes(qwen3.part("", ""), configuration | {"num_hidden_layers": 27, "head_dim": 8})
    save_file(weights(shapes, 7), folder / "qwen3.safetensors", {"format": "pt", **metadata})
    return toml


def klein_words(toy):
    files = {"dit": "klein.safetensors", "text_encoder": "qwen3.safetensors", "tokenizer": "tokenizer_qwen3"}
    return {name: str(toy.with_name(file)) for name, file in files.items()}


@pytest.fixture(scope="module")
def dev(toy):
    return studio_of(toy)


@pytest.fixture(scope="module")
def klein(toy):
    return studio_of(toy, pretrained_model_name_or_path="", **klein_words(toy))


CHATS = {  # of Mistral Small 3.2 and Qwen3, as far as a system message, one text and no thinking need them
    "dev": "<s>{% for m in messages %}{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ m['content'][0]['text'] }}"
    "[/SYSTEM_PROMPT]{% else %}[INST]{{ m['content'][0]['text'] }}[/INST]{% endif %}{% endfor %}",
    "klein": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
}


def pipeline_of(studio, which):
    """diffusers' pipeline and its own denoiser and VAE with the toy's weights."""
    import diffusers

    (encoder,), (tokenizer,) = studio.encoders
    tokenizer.chat_template = CHATS[which]
    kind = diffusers.Flux2Pipeline if which == "dev" else diffusers.Flux2KleinPipeline
    transformer = diffusers.Flux2Transformer2DModel(**_public(studio.denoiser.config))
    transformer.load_state_dict(studio.denoiser.state_dict())
    vae = diffusers.AutoencoderKLFlux2(**_public(studio.vae.config))
    vae.load_state_dict(studio.vae.state_dict())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)  # as published
    pipeline = kind(scheduler, vae.eval(), encoder, tokenizer, transformer.eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _public(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("caption", ["", "a red cat", "the picture of a black dog and a house " * 60])
@pytest.mark.parametrize("which", ["dev", "klein"])
def test_text_is_what_diffusers_pipeline_encodes(which, caption, request):
    """512 tokens of three layers, those of padding as well; dev's are stored once."""
    studio = request.getfixturevalue(which)
    pipeline = pipeline_of(studio, which)
    _, cut = studio.family.tokenize(studio.encoders[1], caption)
    fits = caption[: len(caption) - len(cut)] if cut else caption  # diffusers cuts the chat's end off, too
    assert bool(cut) == (len(caption) > 1000) and caption.endswith(cut)
    with torch.no_grad():
        ours = studio.family.encode(*studio.encoders, Text(caption), "cpu")
        theirs = pipeline.encode_prompt(fits, device="cpu")[0][0]
    assert theirs.shape == (512, 96) and relative(flux2_text.filled(ours), theirs) < 1e-5
    assert (len(ours["text"]) < 512) == (which == "dev" and not cut)


def test_ids_are_those_of_the_published_chats(dev, klein):
    from library.components.flux2_text import MISTRAL, QWEN3

    for studio, (head, tail) in ((dev, MISTRAL), (klein, QWEN3)):
        tokenizer = studio.encoders[1][0]
        whole = tokenizer(head + "a red cat" + tail, add_special_tokens=False)["input_ids"]
        assert studio.family.tokenize([tokenizer], "a red cat") == (whole, "")
    assert dev.family.tokenize(dev.encoders[1], "a [IMG]cat") == dev.family.tokenize(dev.encoders[1], "a cat")


# ---------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("photos"), []
    for name, size in (("wide", (100, 70)), ("tall", (66, 90)), ("large", (1300, 900))):
        coarse = (np.random.default_rng(len(name)).random((5, 7, 3)) * 255).astype(np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{name}.png")
        paths.append(folder / f"{name}.png")
    return paths


def draw(studio, pair, shape, prompt, scale):
    shift = sample.shift_of(prompt, studio.family, shape, 9.0)
    return sample.generate_latents(
        studio.family, studio.denoiser, *pair, shape=shape, seed=5, steps=prompt.sample_steps, scale=scale,
        shift=shift, device="cpu",
    )  # fmt: skip


def raw(studio, latents):
    """[B,32,2h,2w] of normalised latents."""
    mean, deviation = studio.vae.bn.running_mean, (studio.vae.bn.running_var + 1e-4).sqrt()
    return torch.nn.functional.pixel_shuffle(latents * deviation[:, None, None] + mean[:, None, None], 2)


@pytest.mark.parametrize(("which", "count"), [("dev", 0), ("dev", 2), ("klein", 0), ("klein", 1)])
def test_a_picture_is_the_one_that_diffusers_pipeline_makes(which, count, request, photos):
    """Of a size of its own, after references of others; dev's guidance is embedded, that of klein's base is not."""
    studio = request.getfixturevalue(which)
    words = "".join(f" --ci {path}" for path in photos[:count])
    prompt = parse_line(f"a red cat --w 96 --h 64 --s 3{words}", "test", defaults_of(studio.family))
    assert (prompt.guidance_scale, prompt.scale) == ((4.0, 1.0) if which == "dev" else (None, 4.0))
    pair, shape = studio.conditions(prompt), (128, 4, 6)
    ours = draw(studio, pair, shape, prompt, prompt.scale)
    pipeline = pipeline_of(studio, which)
    theirs = pipeline(
        [Image.open(path) for path in photos[:count]] or None, "a red cat", height=64, width=96, num_inference_steps=3,
        guidance_scale=4.0, latents=start_of(shape, 5), output_type="latent",
    ).images  # fmt: skip
    if which == "dev":  # whose pipeline gives them as the denoiser has them, that of klein as its VAE has them
        theirs = tokens.unpack(theirs, 4, 6, patch=1)
        assert relative(ours, theirs) < 1e-4
        theirs = raw(studio, theirs)
    assert relative(raw(studio, ours), theirs) < 1e-4
    if count:
        without = [{k: v for k, v in one.items() if not k.startswith("control")} for one in pair]
        assert len(without[0]) == len(pair[0]) - count
        assert relative(draw(studio, without, shape, prompt, prompt.scale), ours) > 0.01
    with torch.no_grad():
        pixels = pipeline.vae.decode(theirs).sample[0].clamp(-1, 1)
    picture = sample.decode(studio.family, studio.vae, ours)
    assert np.abs(picture.astype(float) - ((pixels + 1) * 127.5).permute(1, 2, 0).numpy()).max() < 1.5


def test_references_are_resized_as_the_pipeline_does(dev, photos):
    """In their own proportions, at most a megapixel, cut in the middle to multiples of 16."""
    processor = pipeline_of(dev, "dev").image_processor
    for path, expected in zip(photos, ((96, 64), (64, 80), (1216, 848)), strict=True):
        image = processor._resize_if_exceeds_area(Image.open(path))
        width, height = (side // 16 * 16 for side in image.size)
        theirs = processor.preprocess(image, height=height, width=width, resize_mode="crop")[0]
        prompt = parse_line(f"x --ci {path}", "test", defaults_of(FAMILY))
        (ours,) = sample.item_of(replace(prompt, width=64, height=64), FAMILY, 64).controls
        assert ours.shape == (3, *expected[::-1]) and torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("which", ["dev", "klein"])
def test_a_batch_of_pictures_and_edits_is_batches_of_one(which, request):
    """Captions of different lengths, references of different sizes and numbers, a guidance of one item's own."""
    studio = request.getfixturevalue(which)
    conds = [pair_of(studio, line)[0] for line in ("a cat", "make it red and the house blue", "a black dog")]
    conds[1] |= {"control.0": torch.randn(128, 2, 3), "control.1": torch.randn(128, 1, 4)}
    conds[2] |= {"control.0": torch.randn(128, 3, 2), "guidance": torch.tensor(1.5)}
    both, each = batched_and_one_by_one(studio, conds, (128, 3, 2))
    assert relative(both, each) < 1e-5


# ---------------------------------------------------------------- which model it is


def arguments_of(toy, data, output, *extra, which="dev", toml="toy.toml"):
    words = ["--config_file", str(toy.with_name(toml)), "--dataset_config", str(data), "--output_dir", str(output),
             "--output_name", "run", "--seed", "3"]  # fmt: skip
    if which == "klein":
        named = klein_words(toy)
        words += [
            "--pretrained_model_name_or_path",
            named.pop("dit"),
            *(w for k, v in named.items() for w in (f"--{k}", v)),
        ]
    return options.parse("flux2", [*words, *extra], "test")


@pytest.fixture
def edits(tmp_path):
    """Two edits, one of them with two references, and a text-to-image subset, in one dataset."""
    rng = np.random.default_rng(0)
    for name, size in (("after/a", (64, 64)), ("after/b", (64, 64)), ("before/a", (80, 48)), ("before/b_0", (64, 64)),
                       ("before/b_1", (50, 70)), ("plain/c", (64, 64))):  # fmt: skip
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((rng.random((size[1], size[0], 3)) * 255).astype(np.uint8)).save(path)
    for name in ("after/a", "after/b", "plain/c"):
        (tmp_path / f"{name}.txt").write_text(f"make it a {name[-1]}")
    path = tmp_path / "edits.toml"
    path.write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 3\n"
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path}/after'\ncontrol_directory = '{tmp_path}/before'\n"
        "caption_extension = '.txt'\n"
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path}/plain'\ncaption_extension = '.txt'\n"
    )
    return path


def trainer_of(*given, **more):
    from train_network import NetworkTrainer

    return NetworkTrainer(arguments_of(*given, **more))


@pytest.mark.parametrize("which", ["dev", "klein"])
def test_edits_and_pictures_train_in_one_run_cached_or_not(toy, edits, tmp_path, which):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"make it red --w 64 --h 64 --s 1 --ci {tmp_path}/before/a.png\n")
    found = []
    for name, words in (("live", ()), ("cached", ("--cache_latents", "--cache_text_encoder_outputs"))):
        trainer = trainer_of(
            toy, edits, tmp_path / name, "--max_train_steps", "2", "--sample_prompts", str(prompts),
            "--sample_every_n_steps", "2", "--gradient_checkpointing", *words, which=which,
        )  # fmt: skip
        trainer.run()
        found.append(losses(tmp_path / name))
        assert len(trainer.outputs.samples.columns) == 2
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    shapes = {k: tuple(v.shape) for item in trainer.dataset.items for k, v in trainer.latents.entry(item.index).items()
              if item.path.stem == "b"}  # fmt: skip
    assert shapes == {"latents": (128, 4, 4), "control.0": (128, 4, 4), "control.1": (128, 4, 3)}
    with checkpoints.Checkpoint.open(tmp_path / "live" / "run.safetensors").reader() as reader:
        assert reader.checkpoint.metadata["modelspec.architecture"] == f"flux-2-{which}/lora"


MISTAKES = [
    ("dev", {"text_encoder": "qwen3"}, r"qwen3.safetensors is not a Mistral Small text encoder: it is a Qwen3"),
    ("klein", {"text_encoder": "text_encoder"}, r"text_encoder.safetensors is not a Qwen3 text encoder: it is a"),
    ("klein", {"text_encoder": "wide"}, r"wide.safetensors: its states are 40 wide and .*klein.safetensors reads 32"),
    ("dev", {"vae": "klein"}, "is not a Flux 2 VAE: it is a Flux 2 denoiser"),
    ("klein", {"guidance_scale": "2"}, "--guidance_scale 2 has no effect: .*klein.safetensors embeds no guidance"),
    ("dev", {"model_version": "klein-4b"}, "--model_version klein-4b: .*denoiser.safetensors is dev; remove"),
    ("klein", {"model_version": "dev"}, "--model_version dev: .*klein.safetensors is a klein; remove"),
]


@pytest.mark.parametrize(("which", "words", "said"), MISTAKES)
def test_mistakes_are_one_sentence_before_anything_loads(toy, edits, tmp_path, which, words, said, monkeypatch):
    """Above all the other variant's text encoder, whose cached states do not fit."""
    if words == {"text_encoder": "wide"}:
        wide = load_file(toy.with_name("qwen3.safetensors"))
        wide["model.embed_tokens.weight"] = wide["model.embed_tokens.weight"].repeat(1, 2)[:, :40].contiguous()
        save_file(wide, toy.with_name("wide.safetensors"))
    monkeypatch.setattr(checkpoints, "load_part", None)  # nothing is loaded
    extra = [w for k, v in words.items()
             for w in (f"--{k}", str(toy.with_name(f"{v}.safetensors")) if k in ("text_encoder", "vae") else v)]  # fmt: skip
    with pytest.raises(ConfigError, match=said):
        trainer_of(toy, edits, tmp_path / "out", *extra, which=which)


def test_published_widths_and_folders_tell_the_size_and_the_distilled_model(toy, klein, tmp_path, monkeypatch):
    def resolved(path, version=None):
        return FAMILY.resolved(
            type("Options", (), {"pretrained_model_name_or_path": str(path), "model_version": version})
        )

    base = resolved(toy.with_name("klein.safetensors"))
    assert base.sampling == {"sample_steps": 50, "scale": 4.0} and base.title == "Flux 2 klein"
    few = resolved(toy.with_name("klein.safetensors"), "klein-9b")
    assert few.sampling == {"sample_steps": 4} and "distilled" in few.title
    pipeline = pipeline_of(klein, "klein")
    for distilled in (False, True):
        pipeline.register_to_config(is_distilled=distilled)
        pipeline.save_pretrained(tmp_path / str(distilled))
        assert ("distilled" in resolved(tmp_path / str(distilled)).title) == distilled
    found = {"guidance_embeds": False, "attention_head_dim": 128}
    for heads, other, known in ((24, "klein-9b", "flux2_klein_4b"), (32, "klein-4b", "flux2_klein_9b")):
        monkeypatch.setattr(checkpoints, "configuration_of", lambda *_, n=heads: found | {"num_attention_heads": n})
        assert resolved("x").released["denoiser"] == known
        with pytest.raises(
            ConfigError, match=rf"--model_version {other}: x is a klein of {'4B' if heads == 24 else '9B'}"
        ):
            resolved("x", other)


# ---------------------------------------------------------------- files


def test_guidance_reaches_dev(toy, dev, edits, tmp_path):
    noisy, sigma, cond = torch.randn(1, 128, 2, 2), torch.tensor([0.5]), {"text": torch.randn(512, 96)}
    with torch.no_grad():
        for guidance, words in ((1.0, ()), (3.5, ("--guidance_scale", "3.5"))):
            ours = trainer_of(toy, edits, tmp_path, *words).family.predict(dev.denoiser, noisy, sigma, [cond])
            own = FAMILY.predict(dev.denoiser, noisy, sigma, [cond | {"guidance": torch.tensor(guidance)}])
            assert torch.equal(ours, own)
        assert not torch.equal(ours, FAMILY.predict(dev.denoiser, noisy, sigma, [cond]))


def test_a_diffusers_folder_alone_trains_as_its_files_do(toy, klein, edits, tmp_path):
    folder = tmp_path / "folder"
    pipeline_of(klein, "klein").save_pretrained(folder)
    own = ["--pretrained_model_name_or_path", str(folder), *(w for n in ("vae", "text_encoder", "tokenizer")
                                                             for w in (f"--{n}", "none"))]  # fmt: skip
    for name, words in (("single", []), ("folder", own)):
        trainer_of(toy, edits, tmp_path / name, "--max_train_steps", "1", *words, which="klein",
                   toml="toy_full.toml").run()  # fmt: skip
    assert losses(tmp_path / "folder") == pytest.approx(losses(tmp_path / "single"), rel=1e-4)
    single, other = (load_file(tmp_path / name / "run.safetensors") for name in ("single", "folder"))
    assert single.keys() == other.keys() == load_file(toy.with_name("klein.safetensors")).keys()
    assert all(relative(other[key], single[key]) < 1e-4 for key in single)


@pytest.mark.parametrize("which", ["dev", "klein"])
def test_diffusers_pipeline_takes_our_lora(toy, edits, tmp_path, which, request):
    studio = request.getfixturevalue(which)
    trainer = trainer_of(toy, edits, tmp_path, "--max_train_steps", "2", "--learning_rate", "3e-2", "--save_format",
                         "diffusers", which=which)  # fmt: skip
    trainer.run()
    noisy, sigma = torch.randn(1, 128, 2, 3), torch.tensor([0.5])
    pipeline = pipeline_of(studio, which)
    with torch.no_grad():
        cond = studio.family.encode(*studio.encoders, Text("a cat"), "cpu")
        ours = trainer.family.predict(trainer.denoiser.eval(), noisy, sigma, [cond])
        base = trainer.family.predict(studio.denoiser, noisy, sigma, [cond])
        pipeline.load_lora_weights(str(tmp_path / "run.safetensors"))
        theirs = trainer.family.predict(pipeline.transformer, noisy, sigma, [cond])
    assert relative(ours, base) > 0.02 and relative(theirs, ours) < 1e-5
