"""Workflows beside samples: every node and link against ComfyUI's node definitions, their sigmas by its formulas."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from oracles import DATA
from training_support import pictures, toy, train  # noqa: F401  (fixtures)

from library import diffusion, sample, workflows
from library.families import FAMILIES, get_family
from library.families.family import Pair
from library.objective import ddpm
from library.prompts import Prompt, defaults_of, timed, training_defaults
from library.runtime import image_tokens

NODES = json.loads((DATA / "comfyui_nodes.json").read_text(encoding="utf-8"))["nodes"]
PLAIN = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool, "COMBO": str}
WITHOUT = {"anima", "cosmos", "cosmos_predict2"}  # which docs/training.md says, too


def options_of(family, **more):
    files = {part.option: f"models/{part.name}.safetensors" for part in family.parts}
    return SimpleNamespace(**{"pretrained_model_name_or_path": None, **files, **more})


def made(family, prompt=None, size=(1024, 768), **changes):
    prompt = timed([prompt or replace(training_defaults(family), prompt="a red fox")], family, 25)[0]
    channels, scale = family.latent_channels, family.latent_downscale
    shape = (channels, size[1] // scale, size[0] // scale)
    shape = (channels, family.frames.latents(prompt.frame_count), *shape[1:]) if family.frames else shape
    shift = sample.shift_of(prompt, family, shape, 3.0)
    sampler = prompt.sample_sampler or "euler"
    sigmas = family.objective.sampler(sampler).times(prompt.sample_steps, shift, image_tokens(family, shape))
    loras = (workflows.Lora("out/run-step00000010.safetensors"),)
    return replace(workflows.Sampled(prompt, size, channels, 7, shift, sampler, sigmas, loras), **changes)


def checked(nodes):
    """The nodes by class; every input there, of its type, every link to an output of that type of an earlier node."""
    kinds = {}
    for name, node in nodes.items():
        facts, inputs = NODES[node["class_type"]], node["inputs"]
        known = facts["inputs"] | facts.get("optional", {})
        assert facts["inputs"].keys() <= inputs.keys() <= known.keys(), node["class_type"]
        for key, value in inputs.items():
            if known[key] in PLAIN:
                assert type(value) is PLAIN[known[key]], (node["class_type"], key, value)
                assert value in facts.get("choices", {}).get(key, [value]), (key, value)
            else:
                source, output = value
                assert int(source) < int(name)
                assert NODES[nodes[source]["class_type"]]["outputs"][output] == known[key], (node["class_type"], key)
        kinds.setdefault(node["class_type"], []).append(inputs)
    assert len(kinds.get("SaveImage", kinds.get("SaveVideo"))) == 1
    return kinds


def sigmas_of(kinds, steps):
    """What ComfyUI's samplers would visit: its tables of 1000 steps (Flux: 10000), written out from its formulas."""
    if "ManualSigmas" in kinds:
        return torch.tensor([float(word) for word in kinds["ManualSigmas"][0]["sigmas"].split(",")])
    table = torch.arange(1, 1001, dtype=torch.float64) / 1000
    for kind in ("ModelSamplingSD3", "ModelSamplingAuraFlow"):
        if kind in kinds:
            shift = kinds[kind][0]["shift"]
            table = shift * table / (1 + (shift - 1) * table)
    if "ModelSamplingFlux" in kinds:
        one = kinds["ModelSamplingFlux"][0]
        slope = (one["max_shift"] - one["base_shift"]) / (4096 - 256)
        mu = one["width"] * one["height"] / 256 * slope + one["base_shift"] - slope * 256
        table = torch.arange(1, 10001, dtype=torch.float64) / 10000
        table = math.exp(mu) / (math.exp(mu) + (1 / table - 1))
    assert kinds["KSampler"][0]["scheduler"] == "simple" and kinds["KSampler"][0]["steps"] == steps
    return torch.tensor([float(table[-(1 + int(k * len(table) / steps))]) for k in range(steps)] + [0.0])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WITHOUT])
def test_nodes_and_links_are_comfyuis_and_the_sigmas_are_those_of_the_sample(name):
    family = get_family(name)
    one = made(family)
    kinds = checked(workflows.workflow(family, options_of(family), one))
    if family.objective.name != "ddpm":
        assert torch.allclose(sigmas_of(kinds, one.prompt.sample_steps), one.sigmas, atol=workflows.CLOSE)
    loaded = [inputs["lora_name"] for inputs in kinds["LoraLoaderModelOnly"]]
    assert loaded == ["run-step00000010.safetensors"]
    texts = [inputs["text"] for inputs in kinds["CLIPTextEncode"]]
    assert texts == [family.caption_text("a red fox"), one.prompt.negative_prompt]
    sampled = kinds.get("KSampler", kinds.get("SamplerCustom"))[0]
    assert sampled["cfg"] == one.prompt.scale and sampled.get("seed", sampled.get("noise_seed")) == 7
    assert ("SaveVideo" in kinds) == bool(family.frames and one.prompt.frame_count > 1)
    assert ("FluxGuidance" in kinds) == ("guidance_scale" in family.sampling)
    latent = next(inputs[0] for kind, inputs in kinds.items() if "Latent" in kind)
    assert (latent["width"], latent["height"]) == (1024, 768) and latent.get("length", 25) == 25


def test_the_noise_that_a_sample_starts_from_is_comfyuis():
    """ComfyUI draws one latent on the CPU with torch's own generator, seeded."""
    for shape in ((16, 24, 32), (16, 7, 12, 20)):
        theirs = torch.randn((1, *shape), generator=torch.manual_seed(7), device="cpu")
        starts = []

        def predict(denoiser, x, sigma, conds, starts=starts):
            starts.append(x.clone())
            return torch.zeros_like(x)

        family = replace(get_family("z_image"), predict=predict)
        sample.generate_latents(
            family, None, {}, None, shape=shape, seed=7, steps=1, scale=1.0, shift=3.0, device="cpu"
        )
        assert torch.equal(starts[0], theirs)


def test_steps_that_no_schedule_of_comfyuis_visits_are_listed():
    qwen = get_family("qwen_image")  # stretched to end above 0
    kinds = checked(workflows.workflow(qwen, options_of(qwen), made(qwen)))
    assert "KSampler" not in kinds and "ModelSamplingAuraFlow" not in kinds
    flux = get_family("flux")
    low = made(flux, replace(defaults_of(flux), prompt="x", flow_shift=0.5))
    kinds = checked(workflows.workflow(flux, options_of(flux), low))
    assert torch.allclose(sigmas_of(kinds, 28), low.sigmas, atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "zero", "wanted"), [(20, False, "ddim_uniform"), (25, True, "simple"), (28, False, "")]
)
def test_stable_diffusions_timesteps_are_those_of_a_scheduler_or_listed(steps, zero, wanted):
    family = replace(get_family("sdxl"), objective=ddpm("v" if zero else "epsilon", zero))
    one = made(family, replace(defaults_of(family), prompt="x", sample_steps=steps))
    kinds = checked(workflows.workflow(family, options_of(family), one))
    times = (one.sigmas[:-1] * 1000).round().long() - 1
    if wanted == "ddim_uniform":
        theirs = list(range(1, 1000, 1000 // steps))[::-1]
    elif wanted == "simple":
        theirs = [999 - int(k * 1000 / steps) for k in range(steps)]
        assert kinds["ModelSamplingDiscrete"][0] | {"model": 0} == {
            "model": 0,
            "sampling": "v_prediction",
            "zsnr": True,
        }
    else:
        ab = diffusion.alpha_bar()[times]
        listed = torch.tensor([float(word) for word in kinds["ManualSigmas"][0]["sigmas"].split(",")]).double()
        assert torch.allclose(listed[:-1], ((1 - ab) / ab).sqrt(), rtol=1e-4) and listed[-1] == 0
        return
    assert kinds["KSampler"][0]["scheduler"] == wanted and times.tolist() == theirs


def test_a_checkpoint_that_holds_all_parts_is_loaded_once():
    family = get_family("sdxl")
    options = options_of(family, **{part.option: "models/sd_xl_base.safetensors" for part in family.parts})
    kinds = checked(workflows.workflow(family, options, made(family)))
    assert kinds["CheckpointLoaderSimple"] == [{"ckpt_name": "sd_xl_base.safetensors"}]
    assert not kinds.keys() & {"UNETLoader", "DualCLIPLoader", "VAELoader"}
    kinds = checked(workflows.workflow(family, options, made(family, loras=(), model="run-step00000010.safetensors")))
    assert kinds["CheckpointLoaderSimple"] == [{"ckpt_name": "run-step00000010.safetensors"}], "a full fine-tune"
    assert "LoraLoaderModelOnly" not in kinds
    with_text = made(family, loras=[workflows.Lora("a.safetensors", 0.5), workflows.Lora("b.safetensors", 1.0, True)])
    kinds = checked(workflows.workflow(family, options, with_text))
    assert kinds["LoraLoader"][0]["strength_clip"] == 1.0
    assert [(i["lora_name"], i["strength_model"]) for i in kinds["LoraLoaderModelOnly"]] == [("a.safetensors", 0.5)]


def test_other_sets_of_files():
    sd3 = get_family("sd3")
    options = options_of(sd3, **{sd3.text_encoders[2].option: None})
    kinds = checked(workflows.workflow(sd3, options, made(sd3)))
    assert kinds["DualCLIPLoader"][0]["type"] == "sd3", "without T5"
    wan = get_family("wan")
    small = replace(made(wan), channels=48)
    assert "Wan22ImageToVideoLatent" in checked(workflows.workflow(wan, options_of(wan), small))
    one = replace(made(wan), prompt=replace(made(wan).prompt, frame_count=1))
    assert "SaveImage" in checked(workflows.workflow(wan, options_of(wan), one))


def test_what_comfyuis_own_nodes_do_not_make_has_none():
    flux, wan = get_family("flux"), get_family("wan")
    plain = made(flux)
    for prompt in (Prompt("a", controls=("x.png",)), Prompt("a", image_path="x.png")):
        assert workflows.workflow(flux, options_of(flux), replace(plain, prompt=prompt)) is None
    assert workflows.workflow(flux, options_of(flux), replace(plain, channels=5)) is None
    assert workflows.workflow(flux, options_of(flux), replace(plain, sampler="another")) is None
    pair = replace(wan, pair=Pair(wan.denoiser, 0.875))
    assert workflows.workflow(pair, options_of(wan), made(wan)) is None
    assert FAMILIES.keys() - workflows.STOCK.keys() == WITHOUT


def test_a_run_writes_one_beside_each_sample_with_the_name_of_the_save(toy, pictures, tmp_path):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 5\n", encoding="utf-8")
    words = ["--max_train_steps", "2", "--save_every_n_steps", "1", "--sample_every_n_steps", "1"]
    train(toy, pictures, tmp_path, *words, "--sample_prompts", str(tmp_path / "prompts.txt"))
    found = sorted((tmp_path / "sample").glob("*.workflow.json"))
    assert [path.name for path in found] == ["run_000001_00_5.workflow.json", "run_000002_00_5.workflow.json"]
    for path in found:
        assert path.with_name(path.name.replace(".workflow.json", ".png")).is_file()
        kinds = checked(json.loads(path.read_text(encoding="utf-8")))
        assert (tmp_path / kinds["LoraLoaderModelOnly"][0]["lora_name"]).is_file()
        assert kinds["KSampler"][0]["seed"] == 5 and kinds["UNETLoader"][0]["unet_name"] == "denoiser.safetensors"
        assert kinds["ModelSamplingAuraFlow"][0]["shift"] == 2.0
    assert kinds["LoraLoaderModelOnly"][0]["lora_name"] == "run.safetensors"


def test_the_inference_script_writes_one_beside_its_picture(toy, tmp_path):  # noqa: F811
    from library.inference import main

    main("z_image", [
        "--dit", str(toy.parent / "denoiser.safetensors"), "--vae", str(toy.parent / "vae.safetensors"),
        "--text_encoder", str(toy.parent / "text_encoder.safetensors"), "--prompt", "a red cat", "--image_size", "64", "96",
        "--infer_steps", "2", "--seed", "4", "--flow_shift", "2.5", "--save_path", str(tmp_path / "x.png"),
    ])  # fmt: skip
    kinds = checked(json.loads((tmp_path / "x.workflow.json").read_text(encoding="utf-8")))
    assert (kinds["KSampler"][0]["seed"], kinds["KSampler"][0]["steps"]) == (4, 2)
    assert kinds["ModelSamplingAuraFlow"][0]["shift"] == 2.5 and "LoraLoaderModelOnly" not in kinds
    latent = kinds["EmptySD3LatentImage"][0]
    assert (latent["height"], latent["width"]) == (64, 96)
