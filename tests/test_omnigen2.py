"""OmniGen2 as a whole: its published chat, schedule and two guidances, reference pictures, folders and mistakes.

diffusers has no pipeline of it. The loops here are written after OmniGen2's own code, in its own time, 0 = noise.
"""

import math
import shutil

import numpy as np
import pytest
import torch
from oracles import SHARED, relative
from PIL import Image
from safetensors.torch import load_file, save_file
from studio_support import batched_and_one_by_one, make_toy, pair_of, start_of, studio_of
from training_support import losses

from library import checkpoints, options, sample
from library.components.tokenizers import load_tokenizer
from library.errors import ConfigError, DatasetError
from library.families import get_family
from library.families.family import Text
from library.families.omnigen2 import CHAT, NEGATIVE
from library.prompts import defaults_of, parse_line

FAMILY = get_family("omnigen2")
torch.set_num_threads(1)
SYSTEM = "You are a helpful assistant that generates high-quality images based on user instructions."
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy("omnigen2", tmp_path_factory.mktemp("toys") / "omnigen2")


@pytest.fixture(scope="module")
def studio(toy):
    return studio_of(toy)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("photos"), []
    for name, size in (("wide", (100, 70)), ("tall", (66, 90))):
        coarse = (np.random.default_rng(len(name)).random((5, 7, 3)) * 255).astype(np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{name}.png")
        paths.append(folder / f"{name}.png")
    return paths


# ---------------------------------------------------------------- text


def chat(caption):
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": caption}]


@pytest.mark.parametrize("caption", ["", "a red cat", "the picture of a black dog and a house"])
def test_text_is_the_last_state_of_the_published_chat(studio, caption):
    """Right-padded with a mask in a batch, as the published pipeline encodes it."""
    (encoder,), (tokenizer,) = studio.encoders
    tokenizer.chat_template, tokenizer.padding_side = TEMPLATE, "right"
    texts = [tokenizer.apply_chat_template(chat(one), tokenize=False) for one in (caption, "a green tree " * 20)]
    given = tokenizer(texts, padding="longest", return_tensors="pt")
    with torch.no_grad():
        states = encoder(**given, output_hidden_states=True).hidden_states[-1][0]
        ours = studio.family.encode([encoder], [tokenizer], Text(caption), "cpu")["text"]
    count = int(given.attention_mask[0].sum())
    assert count < given.attention_mask.shape[1] and ours.shape == (count, 64)
    assert relative(ours, states[:count]) < 1e-5


def test_a_caption_that_is_too_long_keeps_the_end_of_the_chat(studio):
    tokenizer = studio.encoders[1][0]
    ids, cut = FAMILY.tokenize([tokenizer], "a red fox " * 600)
    assert len(ids) == 1024 and tokenizer.decode(ids).endswith(CHAT[1]) and cut.endswith("fox ")


def test_the_chat_is_that_of_qwens_tokenizer():
    if not (SHARED / "tokenizers" / "qwen25").exists():
        pytest.skip("the tokenizer of Qwen2.5 is not in this repository")
    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / "qwen25"))
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat("a red cat"))
    assert FAMILY.tokenize([tokenizer], "a red cat")[0] == tokenizer(text)["input_ids"]
    if tokenizer.chat_template:
        assert tokenizer.apply_chat_template(chat("a red cat"), tokenize=False) == text


# ---------------------------------------------------------------- pictures


def published(studio, pair, shape, seed, steps, scale, image_scale):
    """OmniGen2's processing(): time from 0 to 1, three predictions where the references are guided."""
    cond, uncond = pair
    references = [cond[key] for key in sorted(cond) if key.startswith("control.")]
    x, m = start_of(shape, seed), math.sqrt(shape[-2] * shape[-1]) / 40
    times = torch.linspace(0, 1, steps + 1)
    times = times / (m - m * times + times)

    def run(text, seen, time):
        return studio.denoiser(x, time[None], [text], [seen])

    with torch.no_grad():
        for time, then in zip(times[:-1], times[1:], strict=True):
            whole = run(cond["text"], references, time)
            bare = run(uncond["text"], [], time)
            if references and image_scale > 1:
                seen = run(uncond["text"], references, time)
                whole = bare + image_scale * (seen - bare) + scale * (whole - seen)
            else:
                whole = bare + scale * (whole - bare)
            x = x + (then - time) * whole
    return x


@pytest.mark.parametrize(("count", "image_scale"), [(0, 2.0), (1, 1.0), (2, 2.0)])
def test_a_picture_is_the_one_that_the_published_pipeline_makes(toy, photos, count, image_scale):
    studio = studio_of(toy, image_guidance_scale=str(image_scale))
    words = "".join(f" --ci {path}" for path in photos[:count])
    prompt = parse_line(f"a red cat --w 96 --h 64 --s 3{words}", "test", defaults_of(FAMILY))
    assert (prompt.scale, prompt.negative_prompt) == (5.0, NEGATIVE)
    pair, shape = studio.conditions(prompt), (16, 8, 12)
    ours = sample.generate_latents(
        FAMILY, studio.denoiser, *pair, shape=shape, seed=5, steps=3, scale=5.0, settings=studio.settings,
        shift=sample.shift_of(prompt, FAMILY, shape, 9.0), device="cpu",
    )  # fmt: skip
    assert relative(ours, published(studio, pair, shape, 5, 3, 5.0, image_scale)) < 1e-4
    assert FAMILY.sampling_shift(4096, 50) == pytest.approx(3.2)
    if count:
        plain = [{k: v for k, v in one.items() if k == "text"} for one in pair]
        assert relative(published(studio, plain, shape, 5, 3, 5.0, image_scale), ours) > 0.01


def test_sizes_of_references_are_the_published_ones(studio, photos):
    """At most a megapixel and 1024 pixels wide or high, never enlarged, stretched to multiples of 16."""
    sizes = {(100, 70): (96, 64), (66, 90): (64, 80), (1300, 900): (1024, 704), (4000, 300): (1024, 64)}
    assert {size: FAMILY.control_size(size) for size in sizes} == sizes
    prompt = parse_line(f"x --ci {photos[0]} --ci {photos[1]}", "test", defaults_of(FAMILY))
    cond, uncond = studio.conditions(prompt)
    assert [cond[f"control.{k}"].shape for k in (0, 1)] == [(16, 8, 12), (16, 10, 8)]
    both, bare = FAMILY.unprompted({"image_guidance_scale": 2.0}, uncond)
    assert both is uncond and bare.keys() == {"text"}
    (image,) = FAMILY.unprompted({"image_guidance_scale": 1.0}, uncond)
    assert image.keys() == {"text"}


def test_a_batch_of_pictures_and_edits_is_batches_of_one(studio):
    conds = [pair_of(studio, line)[0] for line in ("a cat", "make it red and the house blue", "a black dog")]
    conds[1] |= {"control.0": torch.randn(16, 4, 6), "control.1": torch.randn(16, 2, 8)}
    conds[2] |= {"control.0": torch.randn(16, 6, 4)}
    both, each = batched_and_one_by_one(studio, conds, (16, 6, 4))
    assert relative(both, each) < 1e-5


# ---------------------------------------------------------------- training


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


def trainer_of(toy, data, output, *extra, toml="toy.toml"):
    from train_network import NetworkTrainer

    words = ["--config_file", str(toy.with_name(toml)), "--dataset_config", str(data), "--output_dir", str(output),
             "--output_name", "run", "--seed", "3", *extra]  # fmt: skip
    return NetworkTrainer(options.parse("omnigen2", words, "test"))


def test_edits_and_pictures_train_in_one_run_cached_or_not(toy, edits, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"make it red --w 64 --h 64 --s 1 --ci {tmp_path}/before/a.png\n")
    found = []
    for name, words in (("live", ()), ("cached", ("--cache_latents", "--cache_text_encoder_outputs"))):
        trainer = trainer_of(
            toy, edits, tmp_path / name, "--max_train_steps", "3", "--sample_prompts", str(prompts),
            "--sample_every_n_steps", "3", "--gradient_checkpointing", *words,
        )  # fmt: skip
        trainer.run()
        found.append(losses(tmp_path / name))
        assert len(trainer.outputs.samples.columns) == 2
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    shapes = {k: tuple(v.shape) for item in trainer.dataset.items for k, v in trainer.latents.entry(item.index).items()
              if item.path.stem == "b"}  # fmt: skip
    assert shapes == {"latents": (16, 8, 8), "control.0": (16, 8, 8), "control.1": (16, 8, 6)}
    ups = {key: value for key, value in load_file(tmp_path / "live" / "run.safetensors").items() if "lora_B" in key}
    learnt = [key for key, value in ups.items() if value.any()]
    assert any("ref_image_refiner" in key for key in learnt) and len(learnt) == len(ups)


def test_mistakes_are_one_sentence_before_anything_loads(toy, edits, tmp_path, monkeypatch):
    wide = load_file(toy.with_name("text_encoder.safetensors"))
    for key, value in list(wide.items()):
        if key.endswith("embed_tokens.weight"):
            wide[key] = value.repeat(1, 2)[:, :80].contiguous()
    save_file(wide, tmp_path / "seven.safetensors", {"head_dim": "16"})
    monkeypatch.setattr(checkpoints, "load_part", None)
    with pytest.raises(ConfigError, match=r"seven.safetensors: its states are 80 wide and .*denoiser.*reads 64; take"):
        trainer_of(toy, edits, tmp_path, "--text_encoder", str(tmp_path / "seven.safetensors"), "--tokenizer",
                   str(toy.with_name("tokenizer")))  # fmt: skip
    for k in range(2, 6):
        shutil.copy(tmp_path / "before" / "b_0.png", tmp_path / "before" / f"b_{k}.png")
    with pytest.raises(DatasetError, match="OmniGen2 takes 5 control pictures, but b.png have more"):
        trainer_of(toy, edits, tmp_path / "out")


def test_the_published_folder_alone_trains_as_single_files_do(toy, edits, tmp_path):
    """transformer, mllm, processor and vae, as VectorSpaceLab lays them out."""
    folder = tmp_path / "folder"
    vae = checkpoints.load_part(FAMILY.vae, toy.with_name("vae.safetensors"), dtype=torch.float32)
    for name, file, config in (("transformer", "denoiser", "{}"), ("mllm", "text_encoder", '{"head_dim": 16}')):
        (folder / name).mkdir(parents=True)
        shutil.copy(toy.with_name(f"{file}.safetensors"), folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(config)
    vae.save_pretrained(folder / "vae")
    shutil.copytree(toy.with_name("tokenizer"), folder / "processor")
    own = ["--pretrained_model_name_or_path", str(folder), *(w for n in ("vae", "text_encoder", "tokenizer")
                                                             for w in (f"--{n}", "none"))]  # fmt: skip
    for name, words in (("single", []), ("folder", own)):
        trainer_of(toy, edits, tmp_path / name, "--max_train_steps", "1", *words, toml="toy_full.toml").run()
    assert losses(tmp_path / "folder") == pytest.approx(losses(tmp_path / "single"), rel=1e-4)
    assert (
        load_file(tmp_path / "folder" / "run.safetensors").keys()
        == load_file(folder / "transformer" / "model.safetensors").keys()
    )


def test_peft_names_are_those_that_the_published_pipeline_loads(toy, edits, tmp_path):
    """`transformer.` and the model's own module names, A and B."""
    trainer = trainer_of(toy, edits, tmp_path / "out", "--max_train_steps", "1", "--save_format", "diffusers")
    trainer.run()
    modules = {f"transformer.{name}" for name, module in trainer.denoiser.named_modules() if hasattr(module, "weight")}
    stems = {key.rsplit(".lora_", 1)[0] for key in load_file(tmp_path / "out" / "run.safetensors")}
    assert len(stems) > 40 and stems <= modules
