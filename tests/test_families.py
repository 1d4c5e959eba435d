"""What every listed family has to do, on its toy: a family inherits this file by being in the table."""

import json
from functools import cache

import pytest
import tomllib
import torch
from dialect_support import toy_config
from oracles import accepted_stems, relative
from PIL import Image
from safetensors.torch import load_file, safe_open
from studio_support import make_toy
from training_support import ROOT, losses

from library import checkpoints, options
from library.families import FAMILIES, families_of, get_family
from library.layout import Layout, shapes_of

torch.set_num_threads(1)
SIDE = 64
# diffusers' pipelines, or what of them loads a LoRA, by family; of the others the model itself is given the file
PIPELINES = {
    "anima": "AnimaLoraLoaderMixin", "auraflow": "AuraFlowPipeline", "chroma": "ChromaPipeline", "flux": "FluxPipeline",
    "flux2": "Flux2Pipeline", "hidream": "HiDreamImagePipeline", "hunyuan_video": "HunyuanVideoPipeline",
    "ltx_video": "LTXPipeline", "lumina_2": "Lumina2Pipeline", "qwen_image": "QwenImagePipeline",
    "sd": "StableDiffusionPipeline", "sd3": "StableDiffusion3Pipeline", "sdxl": "StableDiffusionXLPipeline",
    "wan": "WanPipeline", "z_image": "ZImagePipeline",
}  # fmt: skip


@pytest.fixture(scope="session")
def toy_of(tmp_path_factory):
    @cache
    def make(name):
        return make_toy(name, tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="session")
def drawings(tmp_path_factory):
    """Three captioned pictures of one size, captions of different lengths, one quoted; a dataset file."""
    folder = tmp_path_factory.mktemp("drawings")
    generator = torch.Generator().manual_seed(0)
    for k, caption in enumerate(("a red cat", 'a sign that says "cat"', "the picture of a black dog and a house")):
        coarse = (torch.rand(4, 4, 3, generator=generator) * 255).to(torch.uint8).numpy()
        Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(caption, encoding="utf-8")
    path = folder.parent / "drawings.toml"
    path.write_text(
        f"[[datasets]]\nresolution = {SIDE}\nbatch_size = 2\n"
        f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(folder))}\ncaption_extension = '.txt'\n",
        encoding="utf-8",
    )
    (folder.parent / "prompts.txt").write_text(f"a red cat --w {SIDE} --h {SIDE} --s 1 --l 2 --n blurry\n")
    return path


def train(name, toml, data, output, *extra):
    from train_network import NetworkTrainer

    words = ["--config_file", str(toml), "--dataset_config", str(data), "--output_dir", str(output), "--output_name",
             "run", "--cache_latents", "--cache_text_encoder_outputs", "--seed", "3", *extra]  # fmt: skip
    trainer = NetworkTrainer(options.parse(name, words, "test"))
    trainer.run()
    return trainer


@pytest.fixture(scope="module", params=FAMILIES)
def lora(request, toy_of, drawings, tmp_path_factory):
    """Three steps of a LoRA with checkpointing, validation-free, with a sample at the end."""
    output = tmp_path_factory.mktemp(f"lora_{request.param}")
    trainer = train(request.param, toy_of(request.param), drawings, output, "--max_train_steps", "3",
                    "--gradient_checkpointing", "--sample_prompts", str(drawings.parent / "prompts.txt"),
                    "--sample_every_n_steps", "3")  # fmt: skip
    return trainer, output


def test_a_lora_trains_and_every_key_of_every_format_is_matched(lora):
    trainer, output = lora
    family = trainer.family
    assert len(losses(output)) == 3 and all(0 < loss < 100 for loss in losses(output))
    line = trainer.outputs.saves.key_line
    matched, total = line.split()[0].split("/")
    assert matched == total and int(total) > 4, line
    for format_name in family.save_formats:
        trainer.network.save_format = format_name
        path = output / f"{format_name}.safetensors"
        line = trainer.network.save_weights(str(path), torch.float32, {})
        assert line.split()[0].split("/")[0] == line.split()[0].split("/")[1], (format_name, line)


def test_all_formats_hold_the_same_update(lora):
    from networks import formats

    trainer, output = lora
    layout = trainer.network.layout
    read = {}
    for format_name in trainer.family.save_formats:
        trainer.network.save_format = format_name
        trainer.network.save_weights(str(output / "again.safetensors"), torch.float32, {})
        read[format_name] = formats.read(load_file(output / "again.safetensors"), layout)
    first = read[trainer.family.save_formats[0]]
    assert len(first) > 2
    for format_name, modules in read.items():
        assert modules.keys() == first.keys(), format_name
        for name, content in modules.items():
            a, b = (c["alpha"] / c["up"].shape[1] * c["up"] @ c["down"].flatten(1) for c in (content, first[name]))
            assert torch.allclose(a, b, atol=1e-6), (format_name, name)


def load_as_diffusers_does(name, model, folder, path):
    """A LoRA file onto a denoiser, by the mixin of the family's pipeline."""
    import diffusers
    from diffusers.loaders import lora_pipeline

    if name not in PIPELINES:
        model.load_lora_adapter(load_file(path), prefix=folder or "transformer")
        return
    known = getattr(diffusers, PIPELINES[name], None) or getattr(lora_pipeline, PIPELINES[name])
    mixin = next(c for c in known.__mro__ if c.__name__.endswith("LoraLoaderMixin"))
    part = "unet" if folder == "unet" else "transformer"
    members = {part: model, "components": {part: model}, "hf_device_map": None}
    type("Pipeline", (mixin,), {"text_encoder": None, "text_encoder_2": None, **members})().load_lora_weights(str(path))


def test_diffusers_takes_the_lora_in_its_format_and_predicts_as_we_do(lora, toy_of, tmp_path):
    pytest.importorskip("peft")
    from library import sample
    from networks.lora import create_network

    trainer, _ = lora
    family = trainer.family
    if "diffusers" not in family.save_formats:
        pytest.skip(f"{family.name} has no diffusers format")
    path = toy_of(family.name).with_name("denoiser.safetensors")
    plain, model, other = (checkpoints.load_part(family.denoiser, path, dtype=torch.float32) for _ in range(3))
    model.binding.adapted = family.adapted
    network = create_network(1.0, 4, 3.0, None, [], model)
    network.apply_to([], model, False, True)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    network.save_format = "diffusers"
    network.save_weights(str(tmp_path / "lora.safetensors"), torch.float32, {})
    load_as_diffusers_does(family.name, other, family.denoiser.diffusers_folder, tmp_path / "lora.safetensors")
    shape = sample.latent_shape(family, trainer.prompts[0], family.channels_of(plain), SIDE)
    noisy, (cond, _) = torch.randn(1, *shape, generator=generator), trainer.sample_conds()[0]
    with torch.no_grad():
        base, ours, theirs = (family.predict(m, noisy, torch.tensor([0.4]), [cond]) for m in (plain, model, other))
    assert relative(theirs, ours) < 1e-5 and relative(base, ours) > 0.01


@pytest.fixture(scope="module")
def saved(lora):
    """The trained LoRA in every format of its family; format -> file."""
    trainer, output = lora
    files = {}
    for name in trainer.family.save_formats:
        trainer.network.save_format, files[name] = name, output / f"saved_{name}.safetensors"
        trainer.network.save_weights(str(files[name]), torch.float32, {})
    return files


def test_comfyui_takes_every_key(lora, saved):
    family = lora[0].family
    known = accepted_stems(family.name)
    for format_name in ("comfy", "kohya"):  # names of sd-scripts' own are not ComfyUI's
        if format_name in family.save_formats and not (format_name == "kohya" and family.denoiser.kohya):
            with safe_open(saved[format_name], "pt") as file:
                stems = {key.rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in file.keys()}
            unknown = sorted(stem for stem in stems if stem not in known)
            assert not unknown, (format_name, unknown[:5])


def test_the_converter_gives_every_format_from_every_other(lora, saved, toy_of, tmp_path):
    """The same files as a save in that format, but for alpha where the source has it folded in."""
    from networks import formats
    from tools.convert import convert

    trainer, _ = lora
    base, names = toy_of(trainer.family.name).with_name("denoiser.safetensors"), trainer.network.layout
    for source in saved:
        for target in saved:
            path = tmp_path / f"{source}_{target}.safetensors"
            lines = convert(saved[source], path, target, trainer.family.name, base)
            assert "the same update in every module" in lines, lines
            found, wanted = load_file(path), load_file(saved[target])
            assert found.keys() == wanted.keys()
            assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}
            both = [formats.read(tensors, names) for tensors in (found, wanted)]
            assert max(formats.difference(*both).values()) < 1e-6


def test_a_picture_is_drawn_while_training(lora):
    trainer, output = lora
    assert len(trainer.outputs.samples.columns) == 2
    picture = trainer.outputs.samples.columns[-1][1][0]
    assert picture.shape == (SIDE, SIDE, 3) and picture.std() > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_of_three_seeded_steps_are_the_recorded_ones(name, request, toy_of, drawings, tmp_path):
    """Refactors change nothing. A deliberate change is recorded anew, with its reason in docs/log.md."""
    train(name, toy_of(name), drawings, tmp_path, "--max_train_steps", "3", "--learning_rate", "1e-2")
    path = ROOT / "tests" / "losses" / f"{name}_family.txt"
    found = losses(tmp_path)
    if not path.exists():
        path.write_text("".join(f"{loss:.6f}\n" for loss in found), encoding="utf-8")
        pytest.fail(f"{path} did not exist; it is written now: look at it and commit it")
    recorded = [float(line) for line in path.read_text(encoding="utf-8").split()]
    assert found == pytest.approx(recorded, rel=2e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_fine_tune_keeps_the_files_names_and_changes_its_weights(name, toy_of, drawings, tmp_path):
    toml = toy_of(name).with_name("toy_full.toml")
    trainer = train(name, toml, drawings, tmp_path, "--max_train_steps", "1", "--learning_rate", "1e-3")
    before, after = load_file(toml.with_name("denoiser.safetensors")), load_file(tmp_path / "run.safetensors")
    assert before.keys() == after.keys()
    assert all(before[key].shape == after[key].shape for key in before)
    changed = [key for key in before if not torch.equal(before[key].float(), after[key].float())]
    prefix = get_family(name).container.get("denoiser", ("", ""))[0]
    assert len(changed) > 0.5 * sum(key.startswith(prefix) for key in before)
    reloaded = checkpoints.load_part(trainer.family.denoiser, tmp_path / "run.safetensors", dtype=torch.float32)
    ours = trainer.denoiser.state_dict()
    assert all(torch.equal(value, ours[key].float()) for key, value in reloaded.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_trains_on_blocks_in_fp8(name, toy_of, drawings, tmp_path):
    from library.memory.quantised_linear import is_quantised

    trainer = train(name, toy_of(name), drawings, tmp_path, "--max_train_steps", "1", "--fp8_base",
                    "--gradient_checkpointing")  # fmt: skip
    assert len(losses(tmp_path)) == 1 and 0 < losses(tmp_path)[0] < 100
    assert sum(is_quantised(module) for module in trainer.denoiser.modules()) > 2


def test_the_inference_script_draws_with_a_lora_and_its_strength(toy_of, lora, tmp_path):
    from library.inference import main

    trainer, output = lora
    name = trainer.family.name
    toml = toy_of(name)
    family, values = get_family(name), tomllib.loads(toml.read_text())
    known = {part.option for part in family.parts} | {where.option for where, _ in family.tokenizers}
    words = [w for key, value in values.items() if key in known for w in (f"--{key}", str(toml.parent / value))]
    own = {option.name for option in family.inference_options}
    for key in own & values.keys():
        words += [f"--{key}"] if values[key] is True else [f"--{key}", str(values[key])]
    words += ["--prompt", "a red cat", "--image_size", str(SIDE), str(SIDE), "--infer_steps", "1", "--seed", "1"]
    pictures = {}
    for strength in ("0", "30"):
        path = tmp_path / f"{strength}.png"
        main(name, [*words, "--lora_weight", str(output / "run.safetensors"), "--lora_multiplier", strength,
                    "--save_path", str(path)])  # fmt: skip
        pictures[strength] = path.read_bytes()
        with Image.open(path) as image:
            assert image.size == (SIDE, SIDE)
    assert pictures["0"] != pictures["30"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_diffusion_pipe_starts_the_row_that_it_names(name, toy_of, drawings, tmp_path):
    """All that can be known before a weight loads: files, their tokenizers, dataset, options. test_dialects.py trains."""
    from train_network import NetworkTrainer

    data = tmp_path / "data.toml"
    folder = tomllib.loads(drawings.read_text())["datasets"][0]["subsets"][0]["image_dir"]
    data.write_text(f"resolutions = [{SIDE}]\n[[directory]]\npath = '{folder}'\n", encoding="utf-8")
    path = toy_config(name, toy_of(name), data, tmp_path)
    trainer = NetworkTrainer(options.parse(None, ["--config_file", str(path)], "test"))
    assert trainer.family.name == name and len(trainer.dataset.items) == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_is_told_by_the_denoisers_file(name, toy_of):
    assert families_of(toy_of(name).with_name("denoiser.safetensors")) == [name]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_diffusers_layout_and_the_original_one_bind_to_the_same_model(name, toy_of):
    part = get_family(name).denoiser
    path = toy_of(name).with_name("denoiser.safetensors")
    checkpoint, layout_name = checkpoints.find_part(part, path)
    model = checkpoints.load_part(part, path, dtype=torch.float32)
    ours = shapes_of(model)
    for other in part.layouts:
        layout = Layout(other, checkpoints.rows_of(part, other, ours), ours)
        theirs = layout.to_theirs(model.state_dict())
        assert part.recognise({key: tuple(value.shape) for key, value in theirs.items()}) in part.layouts
    assert layout_name in part.layouts
