"""FLUX.1 as a whole: its text and pictures against diffusers' pipelines, its variants and files, Kontext's references."""

import numpy as np
import pytest
import torch
from oracles import relative
from PIL import Image
from safetensors.torch import load_file, save_file
from studio_support import make_toy
from training_support import losses

from library import options, sample
from library.components import tokens
from library.errors import ConfigError, DatasetError
from library.families import get_family
from library.families.family import ItemInput, Text
from library.prompts import defaults_of, parse_line

FAMILY = get_family("flux")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Toy files of dev, and `schnell.safetensors`, which embeds no guidance."""
    folder = tmp_path_factory.mktemp("flux")
    make_toy("flux", folder)
    dev = load_file(folder / "denoiser.safetensors")
    save_file({k: v for k, v in dev.items() if not k.startswith("guidance_in.")}, folder / "schnell.safetensors")
    return folder


def studio_of(folder, denoiser="denoiser", *extra):
    from library.inference import Studio, parser_of, settle

    words = ["--dit", str(folder / f"{denoiser}.safetensors"), "--save_path", "x.png", "--device", "cpu", *extra]
    for name in ("vae", "clip_l", "t5xxl"):
        words += [f"--{name}", str(folder / f"{name}.safetensors")]
    for name in ("tokenizer_clip_l", "tokenizer_t5xxl"):
        words += [f"--{name}", str(folder / name)]
    arguments = parser_of(FAMILY).parse_args(words)
    family = FAMILY.resolved(arguments)
    settle(arguments, family)
    return Studio(family, arguments)


@pytest.fixture(scope="module")
def studio(folder):
    return studio_of(folder)


@pytest.fixture(scope="module")
def schnell(folder):
    return studio_of(folder, "schnell")


def pipeline_of(studio, folder, kind="FluxPipeline"):
    """diffusers' own models with the weights of the same files."""
    import diffusers
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    (clip, t5), (clip_tokenizer, t5_tokenizer) = studio.encoders
    clip_tokenizer.model_max_length = 77
    text = CLIPTextModel(clip.config).eval()
    flat = {k.removeprefix("text_model."): v for k, v in load_file(folder / "clip_l.safetensors").items()}
    text.load_state_dict(flat, strict=True)
    text_2 = T5EncoderModel(T5Config(**t5.config.to_dict())).eval()
    text_2.load_state_dict(load_file(folder / "t5xxl.safetensors"), strict=False)
    public = {k: v for k, v in studio.denoiser.config.items() if not k.startswith("_")}
    transformer = FluxTransformer2DModel(**public)
    transformer.load_state_dict(studio.denoiser.state_dict())
    vae = AutoencoderKL(**{k: v for k, v in studio.vae.config.items() if not k.startswith("_")})
    vae.load_state_dict(studio.vae.state_dict())
    vae.register_to_config(shift_factor=0.1159, scaling_factor=0.3611)
    dev = public["guidance_embeds"]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev)
    pipeline = getattr(diffusers, kind)(scheduler, vae, text, clip_tokenizer, text_2, t5_tokenizer, transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(studio, folder):
    return pipeline_of(studio, folder)


@pytest.mark.parametrize("caption", ["", "a red cat", "the picture of a house " * 90])
def test_text_is_what_diffusers_pipeline_encodes(studio, pipeline, caption):
    with torch.no_grad():
        ours = studio.family.encode(*studio.encoders, Text(caption), "cpu")
        text, pooled, _ = pipeline.encode_prompt(caption, None, device="cpu")
    assert ours["text"].shape == (512, 64) and relative(ours["text"], text[0]) < 1e-5
    assert relative(ours["pooled"], pooled[0]) < 1e-5


def test_what_does_not_fit_is_named(studio):
    ids, cut = studio.family.tokenize(studio.encoders[1], "a red cat " * 300)
    assert len(ids) == 512 and ids[-1] == studio.encoders[1][1].eos_token_id and cut.endswith("red cat ")
    assert studio.family.tokenize(studio.encoders[1], "a red cat")[1] == ""


def test_with_the_mask_the_text_is_what_t5_makes_of_the_captions_own_tokens(folder, studio):
    masked = studio_of(folder, "denoiser", "--apply_t5_attn_mask", "--t5xxl_max_token_length", "64")
    (_, t5), (_, tokenizer) = studio.encoders
    given = tokenizer("a red cat", padding="max_length", max_length=64, return_tensors="pt")
    with torch.no_grad():
        ours = masked.family.encode(*studio.encoders, Text("a red cat"), "cpu")["text"]
        theirs = t5(input_ids=given.input_ids, attention_mask=given.attention_mask)[0][0, : len(ours)]
    assert len(ours) == int(given.attention_mask.sum()) < 10 and relative(ours, theirs) < 1e-5
    assert masked.family.recipe != studio.family.recipe  # cached text of the other kind is made anew


def draw(studio, cond, uncond, shape, steps, scale, prompt, seed=5):
    shift = sample.shift_of(prompt, studio.family, shape, 1.0)
    return sample.generate_latents(
        studio.family, studio.denoiser, cond, uncond, shape=shape, seed=seed, steps=steps, scale=scale, shift=shift,
        device="cpu",
    )  # fmt: skip


def start(shape, seed=5):
    return tokens.pack(torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(("which", "scale"), [("dev", 1.0), ("dev", 3.0), ("schnell", 1.0)])
def test_a_picture_is_the_one_that_diffusers_pipeline_makes(folder, studio, schnell, pipeline, which, scale):
    """Its sigmas, shifted by the size of the picture for dev, its embedded guidance and its true guidance."""
    mine = studio if which == "dev" else schnell
    theirs = pipeline if which == "dev" else pipeline_of(schnell, folder)
    prompt = parse_line("a red cat --n blurry", "test", defaults_of(mine.family))
    assert (prompt.sample_steps, prompt.guidance_scale, prompt.flow_shift) == (
        (28, 3.5, None) if which == "dev" else (4, None, 1.0)
    )
    ours = draw(mine, *mine.conditions(prompt), (16, 8, 12), 4, scale, prompt)
    length = 512 if which == "dev" else 256
    latents = theirs(
        "a red cat", negative_prompt="blurry", true_cfg_scale=scale, height=64, width=96, num_inference_steps=4,
        guidance_scale=3.5, latents=start((16, 8, 12)), output_type="latent", max_sequence_length=length,
    ).images  # fmt: skip
    assert relative(ours, tokens.unpack(latents, 8, 12)) < 1e-4
    picture = sample.decode(mine.family, mine.vae, ours)
    with torch.no_grad():
        pixels = theirs.vae.decode(tokens.unpack(latents, 8, 12) / 0.3611 + 0.1159).sample[0].clamp(-1, 1)
    assert np.abs(picture.astype(float) - ((pixels + 1) * 127.5).permute(1, 2, 0).numpy()).max() < 1.5


# ---- Kontext


def test_a_picture_after_a_reference_is_the_one_that_kontexts_pipeline_makes(studio, folder):
    theirs = pipeline_of(studio, folder, "FluxKontextPipeline")
    image = Image.fromarray((np.random.default_rng(0).random((48, 80, 3)) * 255).astype(np.uint8))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    with torch.no_grad():
        extra = studio.family.encode_item(studio.vae, [], ItemInput(None, (pixels,)))
    assert extra["control.0"].shape == (16, 6, 10)
    prompt = parse_line("a blue house", "test", defaults_of(studio.family))
    cond = studio.conditions(prompt)[0] | extra
    ours = draw(studio, cond, None, (16, 8, 12), 3, 1.0, prompt)
    latents = theirs(
        image, "a blue house", height=64, width=96, max_area=64 * 96, _auto_resize=False, num_inference_steps=3,
        guidance_scale=3.5, latents=start((16, 8, 12)), output_type="latent",
    ).images  # fmt: skip
    assert relative(ours, tokens.unpack(latents, 8, 12)) < 1e-4
    plain = draw(studio, studio.conditions(prompt)[0], None, (16, 8, 12), 3, 1.0, prompt)
    assert relative(ours, plain) > 0.01


def test_a_batch_of_pictures_and_edits_is_batches_of_one(studio):
    """Texts to draw, edits with references of several sizes, and a guidance of an item's own, in one batch."""
    prompts = ("a cat", "make it red", "make the house blue")
    conds = [studio.conditions(parse_line(p, "test", defaults_of(studio.family)))[0] for p in prompts]
    conds[1] |= {"control.0": torch.randn(16, 4, 4), "control.1": torch.randn(16, 2, 6), "guidance": torch.tensor(1.5)}
    conds[2] |= {"control.0": torch.randn(16, 6, 2)}
    noisy, sigma = torch.randn(3, 16, 4, 4), torch.tensor([0.3, 0.8, 0.5])
    with torch.no_grad():
        whole = studio.family.predict(studio.denoiser, noisy, sigma, conds)
        each = [
            studio.family.predict(studio.denoiser, noisy[k : k + 1], sigma[k : k + 1], conds[k : k + 1])
            for k in range(3)
        ]
    assert relative(whole, torch.cat(each)) < 1e-5


@pytest.fixture
def edits(tmp_path):
    """Two edits, whose controls keep their own size, and a text-to-image subset, in one dataset."""
    rng = np.random.default_rng(0)
    for name, size in (("after/a", (64, 64)), ("after/b", (64, 64)), ("before/a", (80, 48)), ("before/b_0", (64, 64)),
                       ("before/b_1", (48, 48)), ("plain/c", (64, 64))):  # fmt: skip
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((rng.random((size[1], size[0], 3)) * 255).astype(np.uint8)).save(path)
    for name in ("after/a", "after/b", "plain/c"):
        (tmp_path / f"{name}.txt").write_text(f"make it a {name[-1]}")
    path = tmp_path / "edits.toml"
    path.write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 3\n"
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path}/after'\ncontrol_directory = '{tmp_path}/before'\n"
        "no_resize_control = true\ncaption_extension = '.txt'\n"
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path}/plain'\ncaption_extension = '.txt'\n"
    )
    return path


def trainer_of(folder, data, output, *extra, toml="toy.toml"):
    from train_network import NetworkTrainer

    words = ["--config_file", str(folder / toml), "--dataset_config", str(data), "--output_dir", str(output),
             "--output_name", "run", "--seed", "3", *extra]  # fmt: skip
    return NetworkTrainer(options.parse("flux", words, "test"))


def test_edits_and_pictures_train_in_one_run_cached_or_not(folder, edits, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"make it red --w 96 --h 96 --s 1 --ci {tmp_path}/before/a.png\n")
    found = []
    for name, words in (("live", ()), ("cached", ("--cache_latents", "--cache_text_encoder_outputs"))):
        trainer = trainer_of(folder, edits, tmp_path / name, "--max_train_steps", "3", "--sample_prompts", str(prompts),
                             "--sample_every_n_steps", "3", "--gradient_checkpointing", *words)  # fmt: skip
        seen, predict = [], trainer.family.predict

        def watched(denoiser, noisy, sigma, conds, seen=seen, predict=predict):
            seen.extend(sorted(tuple(v.shape[1:]) for k, v in cond.items() if "control" in k) for cond in conds)
            return predict(denoiser, noisy, sigma, conds)

        object.__setattr__(trainer.family, "predict", watched)
        trainer.run()
        shapes = {tuple(one) for one in seen}
        # of the dataset: a's own size cut to 16 pixels, b's two, none; of the sample: a's proportions in 64x64 pixels
        assert {((6, 10),), ((6, 6), (8, 8)), ()} <= shapes and len(shapes) == 4
        found.append(losses(tmp_path / name))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_what_kontext_cannot_use_is_said_before_anything_loads(folder, edits, tmp_path):
    (tmp_path / "before" / "a.png").unlink()
    with pytest.raises(DatasetError, match=r"1 pictures have no control picture in .*before: a\.png"):
        trainer_of(folder, edits, tmp_path / "out")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("make it red" + f" --ci {tmp_path}/before/b_0.png" * 9 + "\n")
    with pytest.raises(ConfigError, match="prompt 1 has 9 control pictures, FLUX.1 takes 8"):
        trainer_of(folder, edits, tmp_path / "out", "--sample_prompts", str(prompts))


# ---- variants and files


def test_the_file_decides_what_is_schnell(schnell, studio):
    assert schnell.family.architecture == "flux-1-schnell" and studio.family.architecture == "flux-1-dev"
    with torch.no_grad():
        text = schnell.family.encode(*studio.encoders, Text("a cat"), "cpu")["text"]
    assert len(text) == 256


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["schnell", "--guidance_scale", "3.5"], r"--guidance_scale 3.5 has no effect: .*schnell.* embeds no guidance"),
        (["schnell", "--bypass_guidance_embedding"], "--bypass_guidance_embedding: .*schnell.* embeds no guidance"),
        (["denoiser", "--bypass_guidance_embedding", "--guidance_scale", "2"], "--bypass_guidance_embedding is set"),
        (["clip_l"], "is not a Flux denoiser: it is a CLIP-L text encoder"),
        (["denoiser", "--clip_l", "t5xxl"], "is not a CLIP-L text encoder: it is a T5"),
        (["denoiser", "--ae", "clip_l"], "is not a Flux-type VAE: it is a CLIP-L text encoder"),
    ],
)
def test_mistakes_are_one_sentence(folder, edits, tmp_path, words, said):
    file, *extra = words
    extra = [str(folder / f"{word}.safetensors") if word in ("t5xxl", "clip_l") else word for word in extra]
    with pytest.raises(ConfigError, match=said):
        trainer_of(folder, edits, tmp_path, "--pretrained_model_name_or_path", str(folder / f"{file}.safetensors"),
                   *extra)  # fmt: skip


def test_guidance_and_its_bypass_reach_the_model(folder, studio, edits, tmp_path):
    noisy, sigma = torch.randn(1, 16, 4, 4), torch.tensor([0.5])
    with torch.no_grad():
        cond = studio.family.encode(*studio.encoders, Text("a cat"), "cpu")

        def out(*words):
            family = trainer_of(folder, edits, tmp_path, *words).family
            return family.predict(studio.denoiser, noisy, sigma, [cond])

        theirs = [FAMILY.predict(studio.denoiser, noisy, sigma, [cond | {"guidance": torch.tensor(g)}])
                  for g in (1.0, 3.5)]  # fmt: skip
        assert torch.equal(out(), theirs[0]) and torch.equal(out("--guidance_scale", "3.5"), theirs[1])
        bypassed = out("--bypass_guidance_embedding")
    assert relative(bypassed, theirs[0]) > 1e-3


def test_all_in_one_files_and_diffusers_folders_give_the_same_losses_as_single_files(folder, edits, pipeline, tmp_path):
    """And a full fine-tune of a folder is saved in Black Forest Labs' names, which ComfyUI loads."""
    prefixes = {"denoiser": "model.diffusion_model.", "vae": "vae.", "clip_l": "text_encoders.clip_l.transformer.",
                "t5xxl": "text_encoders.t5xxl.transformer."}  # fmt: skip
    whole = {p + k: v for name, p in prefixes.items() for k, v in load_file(folder / f"{name}.safetensors").items()}
    save_file(whole, tmp_path / "whole.safetensors", {"norm_num_groups": "4"})
    pipeline.save_pretrained(tmp_path / "folder")
    data, found = edits, {}
    sources = {"single": [], "whole": [str(tmp_path / "whole.safetensors")], "folder": [str(tmp_path / "folder")]}
    for name, path in sources.items():
        own = ["--pretrained_model_name_or_path", *path, "--vae", "none", "--clip_l", "none", "--t5xxl", "none"]
        trainer = trainer_of(folder, data, tmp_path / name, "--max_train_steps", "1", *(own if path else []),
                             toml="toy_full.toml")  # fmt: skip
        trainer.run()
        found[name] = losses(tmp_path / name)
    assert found["whole"] == found["single"] and found["folder"] == pytest.approx(found["single"], rel=1e-4)
    single, own = (load_file(tmp_path / name / "run.safetensors") for name in ("single", "folder"))
    assert single.keys() == own.keys() == load_file(folder / "denoiser.safetensors").keys()
    assert all(relative(own[key], single[key]) < 1e-4 for key in single)
    kept = load_file(tmp_path / "whole" / "run.safetensors")
    assert kept.keys() == {f"model.diffusion_model.{key}" for key in single}


def test_diffusers_pipeline_takes_our_lora(folder, studio, edits, tmp_path):
    """Its transformer with the LoRA gives what ours gives with the network attached."""
    trainer = trainer_of(folder, edits, tmp_path, "--max_train_steps", "2", "--learning_rate", "3e-2",
                         "--save_format", "diffusers")  # fmt: skip
    trainer.run()
    noisy, sigma = torch.randn(1, 16, 4, 4), torch.tensor([0.5])
    with torch.no_grad():
        cond = studio.family.encode(*studio.encoders, Text("a cat"), "cpu")
        ours = trainer.family.predict(trainer.denoiser.eval(), noisy, sigma, [cond])
        base = trainer.family.predict(studio.denoiser, noisy, sigma, [cond])
        pipeline = pipeline_of(studio, folder)
        pipeline.load_lora_weights(str(tmp_path / "run.safetensors"))
        theirs = trainer.family.predict(pipeline.transformer, noisy, sigma, [cond])
    assert relative(ours, base) > 0.02 and relative(theirs, ours) < 1e-5
