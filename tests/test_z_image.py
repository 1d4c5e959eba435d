"""Z-Image against outside oracles: an independent implementation's outputs, the real files' key lists, diffusers."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library import checkpoints
from library.families import get_family
from library.layout import Layout, shapes_of

DATA = Path(__file__).parent / "data"
FAMILY = get_family("z_image")
PARTS = {"z_image": FAMILY.denoiser, "vae_flux": FAMILY.vae, "te_qwen3_4b": FAMILY.text_encoders[0]}


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "golden" / "z_image.safetensors")


def load(weights, tmp_path, part=FAMILY.denoiser, dtype=torch.float32, **metadata):
    path = tmp_path / "part.safetensors"
    save_file({k: v.contiguous() for k, v in weights.items()}, path, metadata=metadata)
    return checkpoints.load_part(part, path, dtype=dtype)


def weights_of(golden, prefix="ckpt."):
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def conds_of(golden, case):
    if f"case.{case}.in.context" in golden:
        return [{"text": text} for text in golden[f"case.{case}.in.context"]]
    return [{"text": golden[f"case.{case}.in.context.{k}"]} for k in range(2)]


@pytest.mark.parametrize("case", ["plain", "ragged"])
def test_the_velocity_is_that_of_an_independent_implementation(golden, tmp_path, case):
    model = load(weights_of(golden), tmp_path)
    with torch.no_grad():
        out = FAMILY.predict(
            model, golden[f"case.{case}.in.x"], golden[f"case.{case}.in.timestep"], conds_of(golden, case)
        )
    assert out.dtype == torch.float32 and relative(out, golden[f"case.{case}.out"]) < 1e-4


def test_a_lora_merged_in_the_files_own_coordinates_gives_the_independent_implementations_output(golden, tmp_path):
    weights = weights_of(golden)
    with safe_open(DATA / "golden" / "z_image.safetensors", "pt") as file:
        scale = float(file.metadata()["lora_scale"])
    for key, down in golden.items():
        if key.startswith("lora.") and key.endswith(".lora_A.weight"):
            name = key.removeprefix("lora.").removesuffix(".lora_A.weight")
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + scale * golden[f"lora.{name}.lora_B.weight"] @ down
    model = load(weights, tmp_path)
    with torch.no_grad():
        out = FAMILY.predict(
            model, golden["case.plain.in.x"], golden["case.plain.in.timestep"], conds_of(golden, "plain")
        )
    assert relative(out, golden["case.plain.out_lora"]) < 1e-4
    assert relative(out, golden["case.plain.out"]) > 1e-3


def test_the_vae_encodes_to_the_mean_and_decodes_as_the_independent_implementation(tmp_path):
    vae = load_file(DATA / "golden" / "vae_flux.safetensors")
    model = load(weights_of(vae, "weights/"), tmp_path, FAMILY.vae, norm_num_groups="4")
    with torch.no_grad():
        latents = FAMILY.encode_image(model, vae["inputs/pixels"])
        pixels = FAMILY.decode_latents(model, (vae["inputs/z"] - 0.1159) * 0.3611)
    assert relative(latents, (vae["outputs/latent"] - 0.1159) * 0.3611) < 1e-4
    assert relative(pixels, vae["outputs/decoded"]) < 1e-4


def test_the_text_encoder_gives_the_next_to_last_layers_states(tmp_path):
    text = load_file(DATA / "golden" / "te_qwen3_zimage.safetensors")
    model = load(weights_of(text, "weights/"), tmp_path, FAMILY.text_encoders[0])
    with torch.no_grad():
        states = model(input_ids=text["inputs/input_ids"], output_hidden_states=True).hidden_states[-2]
    assert relative(states, text["outputs/out"]) < 1e-4


@pytest.mark.parametrize("name", PARTS)
def test_every_key_of_the_full_size_file_is_claimed_with_its_shape(name):
    part = PARTS[name]
    shapes = {k: tuple(v) for k, v in json.loads((DATA / "layouts" / f"{name}.json").read_text()).items()}
    layout_name = part.recognise(shapes)
    with torch.device("meta"):
        ours = shapes_of(part.build(part.config(shapes, {}, layout_name)))
    layout = Layout(layout_name, checkpoints.rows_of(part, layout_name, ours), ours)
    assert {k: tuple(v) for k, v in layout.their_shapes.items()} == shapes


def tagged(shapes):
    """Tensors whose values say where they came from; only the rows matter, so other dimensions are cut to one."""
    start, out = 0, {}
    for key, shape in shapes.items():
        small = (shape[0], *[1] * (len(shape) - 1))
        out[key] = torch.arange(start, start + math.prod(small), dtype=torch.float64).reshape(small)
        start += math.prod(small)
    return out


def test_the_layout_is_diffusers_own_converter():
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers as convert

    shapes = {k: tuple(v) for k, v in json.loads((DATA / "layouts" / "z_image.json").read_text()).items()}
    part = FAMILY.denoiser
    with torch.device("meta"):
        ours = shapes_of(part.build(part.config(shapes, {}, "comfy")))
    layout = Layout("comfy", checkpoints.rows_of(part, "comfy", ours), ours)
    theirs = tagged(shapes)
    converted, mine = convert(dict(theirs)), layout.to_ours(theirs)
    assert converted.keys() == mine.keys()
    assert all(torch.equal(converted[key], mine[key]) for key in mine)


def test_the_vaes_layout_is_diffusers_own_converter():
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint as convert

    shapes = {k: tuple(v) for k, v in json.loads((DATA / "layouts" / "vae_flux.json").read_text()).items()}
    part = FAMILY.vae
    config = part.config(shapes, {}, "ldm")
    with torch.device("meta"):
        ours = shapes_of(part.build(config))
    layout = Layout("ldm", checkpoints.rows_of(part, "ldm", ours), ours)
    theirs = {k: torch.full((1,), float(n)).reshape([1] * len(s)) for n, (k, s) in enumerate(shapes.items())}
    converted = convert(dict(theirs), config)
    for entry in layout.entries:
        assert float(converted[entry.ours[0]].flatten()[0]) == float(theirs[entry.theirs].flatten()[0]), entry.theirs
    assert len(converted) == len(layout.entries)


@pytest.mark.parametrize("mode", ["bf16 weights", "autocast"])
def test_under_bf16_the_time_reaches_its_embedding_in_float32(golden, tmp_path, mode):
    dtype = torch.bfloat16 if mode == "bf16 weights" else torch.float32
    model = load(weights_of(golden), tmp_path, dtype=dtype)
    seen = []
    original = type(model.t_embedder).timestep_embedding
    model.t_embedder.timestep_embedding = lambda t, *args: seen.append(t.clone()) or original(t, *args)
    sigma = torch.tensor([0.12345, 0.98765])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        FAMILY.predict(model, golden["case.plain.in.x"], sigma, conds_of(golden, "plain"))
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], (1 - sigma) * 1000)
    rounded = (1 - sigma).bfloat16().float() * 1000
    assert not torch.allclose(seen[0], rounded, atol=0.1)


def test_the_first_layer_of_the_time_embedding_gets_the_float32_embedding_rounded_once(golden, tmp_path):
    from diffusers.models.embeddings import get_timestep_embedding

    model = load(weights_of(golden), tmp_path, dtype=torch.bfloat16)
    seen = []
    model.t_embedder.mlp[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    sigma = torch.tensor([0.12345, 0.98765])
    with torch.no_grad():
        FAMILY.predict(model, golden["case.plain.in.x"], sigma, conds_of(golden, "plain"))
    width = seen[0].shape[-1]

    def embedded(time):  # cosines first, frequencies over half the width: the other function of diffusers for the same
        return get_timestep_embedding(time * 1000, width, flip_sin_to_cos=True, downscale_freq_shift=0)

    exact, rounded = embedded(1 - sigma), embedded((1 - sigma).bfloat16().float())
    assert seen[0].dtype == torch.bfloat16 and float((seen[0].float() - exact).abs().max()) < 2**-8
    assert float((rounded - exact).abs().max()) > 0.1


def test_captions_that_are_too_long_lose_their_end_and_never_the_template():
    class Letters:
        """One token a character."""

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(c) for c in text]}

        def decode(self, ids):
            return "".join(map(chr, ids))

    ids, cut = FAMILY.tokenize([Letters()], "x" * 600 + "END")
    text = Letters().decode(ids)
    assert len(ids) == 512 and text.startswith("<|im_start|>user\nxxx")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n") and cut.endswith("END")
    assert FAMILY.tokenize([Letters()], "a cat")[1] == ""


QWEN3 = Path(__file__).resolve().parents[2] / "shared" / "tokenizers" / "qwen3"


@pytest.mark.skipif(not QWEN3.is_dir(), reason="the real Qwen3 tokenizer is not here")
def test_the_prompt_is_what_the_real_chat_template_gives():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(QWEN3, local_files_only=True)
    ids, _ = FAMILY.tokenize([tokenizer], "a red fox")
    message = [{"role": "user", "content": "a red fox"}]
    expected = tokenizer.apply_chat_template(message, add_generation_prompt=True, enable_thinking=True, tokenize=False)
    assert tokenizer.decode(ids) == expected


@pytest.mark.parametrize(
    ("name", "adapter", "title", "warned"),
    [
        ("z_image_bf16.safetensors", None, "Z-Image", False),
        ("z_image_turbo_bf16.safetensors", None, "Z-Image Turbo", True),
        ("Z-Image-Turbo.safetensors", ["zimage_turbo_training_adapter_v1.safetensors"], "Z-Image Turbo", False),
    ],
)
def test_turbo_is_known_by_its_name_and_wants_its_training_adapter(tmp_path, name, adapter, title, warned):
    chosen = SimpleNamespace(pretrained_model_name_or_path=str(tmp_path / name), base_weights=adapter)
    family = FAMILY.resolved(chosen)
    assert family.title == title and bool(family.advice(chosen)) == warned
    assert ("sample_steps" in family.sampling) == (title != "Z-Image")
