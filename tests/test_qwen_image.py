"""Qwen-Image, 2512 and the edit models: prompts and pictures against diffusers' pipelines, versions, data, files."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from oracles import SHARED, relative
from PIL import Image
from safetensors.torch import load_file, save_file
from studio_support import make_toy
from training_support import losses

from library import checkpoints, sample
from library.components import control_pictures, qwen25_vl
from library.components.tokenizers import load_tokenizer
from library.errors import ConfigError, DatasetError
from library.families import get_family
from library.families import qwen_image as family_module
from library.families.family import Text
from library.families.qwen_image import DESCRIBE, EDIT, MARKER, TAIL, VERSIONS
from library.inference import parser_of
from library.prompts import defaults_of, parse_line

torch.set_num_threads(1)
FAMILY = get_family("qwen_image")
EDITS = ("edit", "edit-2509", "edit-2511")
AREA = 128 * 128  # of reference pictures in these tests, instead of a megapixel


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen_image")
    make_toy("qwen_image", folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two smooth pictures of different proportions."""
    folder, paths = tmp_path_factory.mktemp("photos"), []
    for name, size in (("wide", (140, 100)), ("tall", (66, 120))):
        coarse = (np.random.default_rng(len(name)).random((5, 7, 3)) * 255).astype(np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{name}.png")
        paths.append(folder / f"{name}.png")
    return paths


def options_of(toy, version, **changes):
    """The inference script's arguments."""
    files = [w for part in FAMILY.parts for w in (f"--{part.option}", str(toy / f"{part.name}.safetensors"))]
    arguments = parser_of(FAMILY).parse_args(
        [*files, "--device", "cpu", "--prompt", "a red cat", "--save_path", "x.png"]
    )
    vars(arguments).update({"model_version": version, **changes})
    return arguments


def small(family, area=AREA):
    """An edit model whose encoder and VAE see references of this many pixels."""
    if not family.max_controls:
        return family
    size = partial(control_pictures.of_area, area=area)
    return replace(family, control_size=size, text_pictures=partial(family_module.shown, area=area))


@pytest.fixture(scope="module")
def studios(toy):
    from library.inference import Studio

    made = {}

    def studio(version, area=AREA):
        if (version, area) not in made:
            options = options_of(toy, version)
            made[version, area] = Studio(small(FAMILY.resolved(options), area), options)
        return made[version, area]

    return studio


def prompt_of(family, caption, controls=(), extra=""):
    words = "".join(f" --ci {path}" for path in controls)
    return parse_line(f"{caption}{words} {extra}", "test", defaults_of(family))


# ---------------------------------------------------------------- prompts


def test_templates_are_cut_where_the_published_tokenizer_cuts_them():
    if not (SHARED / "tokenizers" / "qwen25").exists():
        pytest.skip("the tokenizer of Qwen2.5 is not in this repository")
    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / "qwen25"))
    assert [len(tokenizer(head)["input_ids"]) for head in (DESCRIBE, EDIT)] == [34, 64]
    ids, cut = FAMILY.tokenize([tokenizer], "a red fox " * 600)
    assert len(ids) == 34 + 1024 and "red fox" in cut and ids[-5:] == tokenizer(TAIL)["input_ids"]
    edit = VERSIONS["edit-2509"].tokenize
    assert len(edit([tokenizer], "a red fox " * 600)[0]) > 1800
    seen = "Picture 1: <|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    for caption in ("make it blue", "1: no, 'she' isn't 12\n  left", "汉字を変える"):
        whole = tokenizer(EDIT + seen + caption + TAIL)["input_ids"]
        assert edit([tokenizer], caption, seen=seen) == (whole, "")
    assert whole.count(qwen25_vl.IMAGE_PAD) == 2


PIPELINES = {"original": "QwenImagePipeline", "edit": "QwenImageEditPipeline", "edit-2509": "QwenImageEditPlusPipeline",
             "edit-2511": "QwenImageEditPlusPipeline"}  # fmt: skip


def pipeline_of(studio, version, monkeypatch, area=AREA):
    """diffusers' pipeline of that version with the toy's denoiser and VAE, references at `area`."""
    import diffusers
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    published = plus.calculate_dimensions
    monkeypatch.setattr(edit, "calculate_dimensions", lambda _, ratio: (*published(area, ratio), None))
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", area)
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", area)
    ours = studio.denoiser
    theirs = diffusers.QwenImageTransformer2DModel(**{k: v for k, v in ours.config.items() if k[0] != "_"})
    theirs.load_state_dict(ours.state_dict())
    names = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample", "latents_mean", "latents_std")
    vae = diffusers.AutoencoderKLQwenImage(**{name: studio.vae.config[name] for name in names})
    vae.load_state_dict(studio.vae.state_dict())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(  # scheduler_config.json of all published models
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02,
        use_dynamic_shifting=True,
    )  # fmt: skip
    processor = {} if version == "original" else {"processor": None}
    pipeline = getattr(diffusers, PIPELINES[version])(
        scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=theirs, **processor
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Processor:
    """The two halves of Qwen2VLProcessor that read text and still pictures; the class itself needs a video reader."""

    def __init__(self, tokenizer):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer = tokenizer
        self.pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384})

    def __call__(self, text, images, padding, return_tensors):
        from transformers import BatchFeature

        seen = self.pictures(images, return_tensors="pt")
        (whole,), pad = text, "<|image_pad|>"
        for grid in seen["image_grid_thw"]:
            whole = whole.replace(pad, "<|hole|>" * (int(grid.prod()) // 4), 1)
        read = self.tokenizer(whole.replace("<|hole|>", pad), return_tensors="pt")
        return BatchFeature({**read, **seen})


class Encoder:
    """The toy encoder as Qwen's own code calls it: pictures have rows and columns."""

    dtype = torch.float32

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, **inputs):
        if inputs.get("pixel_values") is not None:
            inputs["mm_token_type_ids"] = (input_ids == self.model.config.image_token_id).int()
        return self.model(input_ids=input_ids, **inputs)


@pytest.mark.parametrize("area", [224 * 224, AREA])  # 224 is a multiple of 28 and of 32: resized once and not twice
@pytest.mark.parametrize("version", ["original", "edit", "edit-2509"])
def test_text_is_what_diffusers_pipeline_encodes(studios, photos, version, area, monkeypatch, tmp_path):
    studio = studios(version, area)
    if area == 224 * 224:
        for k, path in enumerate(photos):
            Image.open(path).crop((0, 0, 60, 60)).save(tmp_path / f"{k}.png")
        photos = [tmp_path / f"{k}.png" for k in range(2)]
    controls = photos[: min(2, studio.family.max_controls)]
    (encoder,), (tokenizer,) = studio.encoders
    pipeline = pipeline_of(studio, version, monkeypatch, area)
    pipeline.text_encoder, pipeline.tokenizer = Encoder(encoder), tokenizer
    head = EDIT if controls else DESCRIBE
    pipeline.prompt_template_encode_start_idx = len(tokenizer(head)["input_ids"])  # 34 or 64 with Qwen's tokenizer
    caption, given = "the red cat is a blue dog", {}
    if controls:
        pipeline.processor = Processor(tokenizer)
        sizes = [studio.family.control_size(Image.open(path).size) for path in controls]
        pictures = [pipeline.image_processor.resize(Image.open(path), h, w)
                    for path, (w, h) in zip(controls, sizes, strict=True)]  # fmt: skip
        given = {"image": pictures if version == "edit-2509" else pictures[0]}
    with torch.no_grad():
        theirs, mask = pipeline.encode_prompt(caption, device="cpu", **given)
    ours = studio.conditions(prompt_of(studio.family, caption, controls, "--w 32 --h 32"))[0]["text"]
    assert mask is None and ours.shape == theirs[0].shape
    # torch's and PIL's bicubic differ by a step of 256 here and there
    assert relative(ours, theirs[0]) < (1e-5 if area == 224 * 224 or not controls else 2e-2)


# ---------------------------------------------------------------- pictures


def packed(latents):
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("version", "count"), [("original", 0), ("edit", 1), ("edit-2509", 2), ("edit-2511", 2)])
def test_a_picture_is_the_one_that_diffusers_pipeline_makes(studios, photos, version, count, monkeypatch):
    """Odd numbers of patches, references that are larger than the picture, each in its own proportions."""
    studio = studios(version)
    controls, (width, height) = photos[:count], (80, 48)
    extra = f"--w {width} --h {height} --n blurry --s 3 --l 4"
    prompt = prompt_of(studio.family, "a red cat", controls, extra)
    pair = studio.conditions(prompt)
    shape = sample.latent_shape(studio.family, prompt, 16, 64)
    ours = sample.generate_latents(
        studio.family, studio.denoiser, *pair, shape=shape, seed=5, steps=3, scale=4.0,
        shift=sample.shift_of(prompt, studio.family, shape, 9.0), device="cpu",
    )  # fmt: skip
    pipeline = pipeline_of(studio, version, monkeypatch)
    texts = dict(zip(("prompt_embeds", "negative_prompt_embeds"), (one["text"][None] for one in pair), strict=True))
    start = torch.randn((1, *shape), generator=torch.Generator().manual_seed(5))
    pictures = [Image.open(path) for path in controls]
    given = {"image": pictures if count > 1 else pictures[0]} if count else {}
    theirs = pipeline(
        **texts, **given, width=width, height=height, num_inference_steps=3, true_cfg_scale=4.0, latents=packed(start),
        output_type="latent",
    ).images  # fmt: skip
    assert shape == (16, 6, 10) and relative(packed(ours), theirs) < 1e-4
    without = [{k: v for k, v in one.items() if not k.startswith("control")} for one in pair]
    assert len(without[0]) == len(pair[0]) - count
    if count:
        plain = sample.generate_latents(studio.family, studio.denoiser, *without, shape=shape, seed=5, steps=3,
                                        scale=4.0, shift=1.0, device="cpu")  # fmt: skip
        assert relative(packed(plain), theirs) > 0.01


def test_references_of_2511_are_clean_and_those_of_2509_are_not(studios, photos):
    noisy, sigma, out = torch.randn(1, 16, 4, 4), torch.tensor([0.9]), {}
    for version in ("edit-2509", "edit-2511"):
        studio = studios(version)
        cond, _ = studio.conditions(prompt_of(studio.family, "a red cat", photos, "--w 32 --h 32"))
        with torch.no_grad():
            out[version] = studio.family.predict(studio.denoiser, noisy, sigma, [cond])
    assert relative(*out.values()) > 0.01


def test_an_edit_without_a_size_has_the_proportions_of_its_last_picture(studios, photos):
    family = studios("edit-2509").family
    prompt = prompt_of(family, "a red cat", photos)  # the last is 66 x 120
    assert sample.size_of(prompt, family, 128) == (96, 160)
    assert sample.size_of(replace(prompt, width=64), family, 128) == (64, 128)
    shapes = [one.shape for one in sample.item_of(prompt, family, 128).controls]
    assert shapes == [(3, 96, 160), (3, 160, 96)]
    assert VERSIONS["edit-2511"].control_size((4000, 3000)) == (1184, 896)


@pytest.mark.parametrize("version", ["original", "edit-2509"])
def test_a_batch_of_two_different_items_is_two_batches_of_one(studios, photos, version):
    studio = studios(version)
    many = [photos, photos[:1]] if studio.family.max_controls else [(), ()]
    captions = ("a cat", "the picture of a house and a green tree")
    conds = [studio.conditions(prompt_of(studio.family, caption, controls, "--w 32 --h 48"))[0]
             for caption, controls in zip(captions, many, strict=True)]  # fmt: skip
    noisy, sigma = torch.randn(2, 16, 6, 4), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        both = FAMILY.predict(studio.denoiser, noisy, sigma, conds)
        each = [FAMILY.predict(studio.denoiser, noisy[k : k + 1], sigma[k : k + 1], conds[k : k + 1]) for k in (0, 1)]
    assert relative(both, torch.cat(each)) < 1e-5


# ---------------------------------------------------------------- which model it is


def test_versions_and_what_tells_them(toy, tmp_path):
    weights = load_file(toy / "denoiser.safetensors")
    save_file(weights | {MARKER: torch.empty(0)}, tmp_path / "marked.safetensors")
    marked = {"pretrained_model_name_or_path": str(tmp_path / "marked.safetensors")}
    assert family_module.MODEL_VERSION.choices == tuple(VERSIONS)
    for version in VERSIONS:
        assert FAMILY.resolved(options_of(toy, version)) is VERSIONS[version]
    assert FAMILY.resolved(options_of(toy, None, **marked)) is VERSIONS["edit-2511"]
    with pytest.raises(ConfigError, match="edit-2509: .*marked.safetensors says that it is edit-2511; remove"):
        FAMILY.resolved(options_of(toy, "edit-2509", **marked))
    with pytest.raises(ConfigError, match=r"does not tell which Qwen-Image it is: give --model_version \(original, "):
        FAMILY.resolved(options_of(toy, None))
    folder = tmp_path / "folder"
    (folder / "transformer").mkdir(parents=True)
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, version in (("", "original"), ("Edit", "edit"), ("EditPlus", "edit-2509")):
        index = {"_class_name": f"QwenImage{name}Pipeline"}
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        for path in (folder, folder / "transformer"):
            assert FAMILY.resolved(options_of(toy, None, pretrained_model_name_or_path=str(path))) is VERSIONS[version]
    (folder / "transformer" / "config.json").write_text('{"zero_cond_t": true}', encoding="utf-8")
    told = FAMILY.resolved(options_of(toy, None, pretrained_model_name_or_path=str(folder)))
    assert told is VERSIONS["edit-2511"]


def test_a_2511_file_that_lost_its_marker_is_saved_with_it(toy, tmp_path):
    part = VERSIONS["edit-2511"].denoiser
    model = checkpoints.load_part(part, toy / "denoiser.safetensors", dtype=torch.float32)
    assert model.zero_cond_t
    checkpoints.save_part(model, tmp_path / "saved.safetensors", {})
    before, after = load_file(toy / "denoiser.safetensors"), load_file(tmp_path / "saved.safetensors")
    assert after.keys() - before.keys() == {MARKER}
    assert FAMILY.resolved(options_of(toy, None, pretrained_model_name_or_path=str(tmp_path / "saved.safetensors")))


def test_an_edit_model_wants_an_encoder_that_sees(toy, tmp_path):
    from library.preflight import check_parts

    blind = {k: v for k, v in load_file(toy / "text_encoder.safetensors").items() if not k.startswith("visual.")}
    save_file(blind, tmp_path / "blind.safetensors")
    options = options_of(
        toy, "edit", text_encoder=str(tmp_path / "blind.safetensors"), tokenizer=str(toy / "tokenizer")
    )
    with pytest.raises(ConfigError, match=r"is not a Qwen2.5-VL text encoder with its picture tower \(visual"):
        check_parts(FAMILY, options)
    options.model_version = "original"
    assert check_parts(FAMILY, options)[0] is FAMILY


@pytest.mark.parametrize("kind", ["wan", "diffusers"])
def test_vae_files_of_comfyui_and_of_diffusers_load(toy, kind, tmp_path):
    path = toy / "vae.safetensors"
    vae = checkpoints.load_part(FAMILY.vae, path, dtype=torch.float32)
    if kind == "diffusers":
        save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, tmp_path / "vae.safetensors")
        path = tmp_path / "vae.safetensors"
    assert checkpoints.find_part(FAMILY.vae, path)[1] == kind
    other = checkpoints.load_part(FAMILY.vae, path, dtype=torch.float32)
    pixels = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        assert torch.equal(FAMILY.encode_image(vae, pixels), FAMILY.encode_image(other, pixels))


def test_an_fp8_scaled_encoder_sees_nearly_the_same(toy, studios, photos, tmp_path):
    weights = load_file(toy / "text_encoder.safetensors")
    for key in [key for key in weights if key.endswith("proj.weight") and key.startswith("model.layers")]:
        scale = weights[key].abs().max() / 448
        weights[key] = (weights[key] / scale).to(torch.float8_e4m3fn)
        weights[key.replace(".weight", ".scale_weight")] = scale
    weights["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    with checkpoints.Checkpoint.open(toy / "text_encoder.safetensors").reader() as reader:
        metadata = reader.checkpoint.metadata
    save_file(weights, tmp_path / "fp8.safetensors", metadata=metadata)
    studio = studios("edit-2509")
    (encoder,), tokenizers = studio.encoders
    other = checkpoints.load_part(qwen25_vl.seeing(), tmp_path / "fp8.safetensors", dtype=torch.float32)
    pictures = studio.family.text_pictures(tuple(one for one in sample.item_of(
        prompt_of(studio.family, "", photos), studio.family, 64).controls))  # fmt: skip
    with torch.no_grad():
        a, b = (studio.family.encode([one], tokenizers, Text("a red cat", pictures), "cpu")["text"]
                for one in (encoder, other))  # fmt: skip
    assert 1e-4 < relative(b, a) < 0.2


# ---------------------------------------------------------------- training


@pytest.fixture
def edits(tmp_path):
    """Three pairs, the first of them with two controls, of different proportions; a dataset file."""
    rng = np.random.default_rng(1)
    for folder, names in (("after", "abc"), ("before", ("a_0", "a_1", "b", "c"))):
        (tmp_path / folder).mkdir()
        for k, name in enumerate(names):
            size = (64, 64) if folder == "after" else (64 + 32 * k, 64)
            coarse = (rng.random((4, 4, 3)) * 255).astype(np.uint8)
            Image.fromarray(coarse).resize(size).save(tmp_path / folder / f"{name}.png")
            if folder == "after":
                (tmp_path / folder / f"{name}.txt").write_text("a red cat" + " thing" * k, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text(
        f"a blue dog --w 32 --h 32 --s 1 --ci {tmp_path / 'before' / 'b.png'}\n", encoding="utf-8"
    )
    return dataset(tmp_path)


def dataset(folder, keys="control_resolution = 64\n", control="control_directory = 'before'\n"):
    (folder / "data.toml").write_text(
        f"[[datasets]]\nresolution = 64\nbatch_size = 2\n{keys if control else ''}[[datasets.subsets]]\nimage_dir = 'after'\n"
        f"{control}caption_extension = '.txt'\n", encoding="utf-8",
    )  # fmt: skip
    return folder / "data.toml"


def train(toy, data, version, *extra, toml="toy.toml"):
    from library import options
    from train_network import NetworkTrainer

    folder = data.parent / "out"
    words = ["--config_file", str(toy / toml), "--dataset_config", str(data), "--output_dir", str(folder),
             "--output_name", "run", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk",
             "--cache_dir", str(data.parent / "cache"), "--model_version", version, "--max_train_steps", "2",
             *extra]  # fmt: skip
    trainer = NetworkTrainer(options.parse("qwen_image", words, "test"))
    trainer.run()
    return trainer


def test_an_edit_lora_trains_with_its_references_cached_and_seen(toy, edits, monkeypatch, capsys):
    """Latents and vision-language states of every reference come from the cache in the second run."""
    monkeypatch.setitem(VERSIONS, "edit-2511", small(VERSIONS["edit-2511"], 64 * 64))
    prompts = ("--sample_prompts", str(edits.parent / "prompts.txt"), "--sample_every_n_steps", "2")
    trainer = train(toy, edits, "edit-2511", *prompts)
    assert len(losses(edits.parent / "out")) == 2 and len(trainer.outputs.samples.columns) == 2
    entry = trainer.latents.entry(0)
    assert entry["control.0"].shape == (16, 8, 8) and entry["control.1"].shape == (16, 6, 10)  # in their proportions
    assert [item.control_buckets for item in trainer.dataset.items] == [((64, 64), (80, 48)), ((80, 48),), ((96, 32),)]
    with checkpoints.Checkpoint.open(edits.parent / "out" / "run.safetensors").reader() as reader:
        assert reader.checkpoint.metadata["modelspec.architecture"] == "Qwen-Image-Edit-2511/lora"
    first = losses(edits.parent / "out")
    capsys.readouterr()
    train(toy, edits, "edit-2511")
    said = capsys.readouterr().out
    assert "latents: 3 of 3 were cached" in said and losses(edits.parent / "out") == first
    assert "text: 4 captions and prompts, 4 were cached" in said
    train(toy, edits, "edit-2509")  # the same chat: only the denoiser differs
    assert losses(edits.parent / "out") != first


def test_a_full_fine_tune_of_2511_keeps_its_marker(toy, edits, monkeypatch):
    monkeypatch.setitem(VERSIONS, "edit-2511", small(VERSIONS["edit-2511"], 64 * 64))
    train(toy, edits, "edit-2511", "--learning_rate", "1e-4", toml="toy_full.toml")
    saved = load_file(edits.parent / "out" / "run.safetensors")
    assert saved[MARKER].shape == (0,) and saved.keys() - {MARKER} == load_file(toy / "denoiser.safetensors").keys()


@pytest.mark.parametrize("version", VERSIONS)
def test_missing_and_unwanted_references_are_one_sentence_before_anything_loads(toy, edits, version, monkeypatch):
    monkeypatch.setattr(checkpoints, "load_part", lambda *given, **named: pytest.fail("something loads"))
    title, edited = VERSIONS[version].title, version in EDITS
    prompts = edits.parent / "prompts.txt"
    if not edited:
        with pytest.raises(DatasetError, match=f"{title} takes no control pictures, but a.png, b.png, c.png have"):
            train(toy, edits, version)
        with pytest.raises(ConfigError, match=f"prompt 1 has 1 control pictures, {title} takes none"):
            train(toy, dataset(edits.parent, control=""), version, "--sample_prompts", str(prompts))
        return
    with pytest.raises(DatasetError, match=f"{title} is trained on pairs .* a.png, b.png, c.png have no control"):
        train(toy, dataset(edits.parent, control=""), version)
    prompts.write_text("a blue dog\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"prompt 1 has no control picture, and {title} edits"):
        train(toy, edits, version, "--sample_prompts", str(prompts))
    if version == "edit":
        with pytest.raises(DatasetError, match="takes 1 control pictures, but a.png have more"):
            train(toy, dataset(edits.parent), version)


def test_the_inference_script_edits_a_picture_and_asks_for_one(toy, photos, tmp_path, monkeypatch):
    from library.inference import main

    monkeypatch.setitem(VERSIONS, "edit-2509", replace(small(VERSIONS["edit-2509"]), resolution=64))
    words = [w for part in FAMILY.parts for w in (f"--{part.option}", str(toy / f"{part.name}.safetensors"))]
    words += ["--model_version", "edit-2509", "--prompt", "a red cat", "--infer_steps", "1", "--image_size", "32", "48"]
    pictures = []
    for n in (1, 2):
        path = tmp_path / f"{n}.png"
        main("qwen_image", [*words, "--control_image_path", *map(str, photos[:n]), "--save_path", str(path)])
        pictures.append(path.read_bytes())
    assert pictures[0] != pictures[1] and Image.open(path).size == (48, 32)
    main("qwen_image", [*words[:-3], "--control_image_path", str(photos[1]), "--save_path", str(path)])
    with Image.open(path) as image:  # 66 x 120 at the area of the model's usual size
        assert image.size == (48, 80)
    with pytest.raises(ConfigError, match="has no control picture"):
        main("qwen_image", [*words, "--save_path", str(path)])
    with pytest.raises(ConfigError, match="gone.png: no such file"):
        main("qwen_image", [*words, "--control_image_path", "gone.png", "--save_path", str(path)])


def test_diffusers_takes_a_lora_in_its_format(toy, studios, tmp_path, monkeypatch):
    from networks import lora

    studio = studios("original")
    pipeline = pipeline_of(studio, "original", monkeypatch)
    model = checkpoints.load_part(FAMILY.denoiser, toy / "denoiser.safetensors", dtype=torch.float32)
    model.binding.adapted = FAMILY.adapted
    network = lora.create_network(1.0, 4, 2.0, None, [], model)
    network.apply_to([], model, False, True)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.save_format = "diffusers"
    network.save_weights(str(tmp_path / "lora.safetensors"), torch.float32, {})
    text, noisy = torch.randn(1, 7, 64), torch.randn(1, 16, 6, 4)
    with torch.no_grad():
        ours = FAMILY.predict(model, noisy, torch.tensor([0.4]), [{"text": text[0]}])
        base = FAMILY.predict(studio.denoiser, noisy, torch.tensor([0.4]), [{"text": text[0]}])
        pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
        theirs = pipeline.transformer(
            packed(noisy), text, timestep=torch.tensor([0.4]), img_shapes=[[(1, 3, 2)]], return_dict=False
        )[0]
    assert relative(packed(ours), theirs) < 1e-4 and relative(ours, base) > 0.05
