"""What any file is, from its header: our own files, LoRAs in every format, the key lists of the real files of others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from oracles import read_json
from training_support import called, pictures, toy, train  # noqa: F401  (fixtures)

from library.checkpoints import Checkpoint
from library.components.encoders import ENCODERS as PARTS
from library.fingerprints import identify
from library.headers import Header, TensorInfo

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = ROOT.parent / "shared" / "layouts"


def inspect(path):
    done = called("tools/inspect.py", str(path), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_parts_of_a_model_are_named_and_every_key_is_matched(toy):  # noqa: F811
    expected = {
        "denoiser": ("checkpoint", "z_image", "comfy"),
        "vae": ("vae", "flux", "ldm"),
        "text_encoder": ("text_encoder", "qwen3", "original"),
    }
    for name, what in expected.items():
        found = inspect(toy.parent / f"{name}.safetensors")
        assert (found["kind"], found["family"], found["layout"]) == what
        assert found["unmatched"] == found["missing"] == [] and found["matched"] == sum(found["dtypes"].values())
        assert found["parameters"] > 50_000 and found["dtypes"].keys() == {"F32"}


def test_released_models_are_known_to_the_last_key_without_torch(tmp_path):
    """All lists of `library/released`, each as a file; what other tests hold the layouts against is not built again."""
    from library.memory.released import FOLDER, write

    names = sorted(path.name.removesuffix(".json.gz") for path in FOLDER.glob("*.json.gz"))
    files = [str(write(name, tmp_path)) for name in names]
    code = (
        "import json, sys; from library.fingerprints import identify_path\n"
        "found = [identify_path(path) for path in sys.argv[1:]]\n"
        "print(json.dumps([[[f.kind, f.matched, f.unmatched, f.missing] for f in found], 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, text=True)
    found, has_torch = json.loads(done.stdout)
    assert not has_torch and len(found) == len(names) > 50
    for name, (kind, matched, unmatched, missing) in zip(names, found, strict=True):
        assert kind != "unknown" and matched > 0 and unmatched == missing == [], (
            name,
            kind,
            unmatched[:3],
            missing[:3],
        )


@pytest.mark.parametrize("form", ["comfy", "kohya", "diffusers"])
def test_a_lora_is_named_with_its_format_and_family(toy, pictures, tmp_path, form):  # noqa: F811
    train(toy, pictures, tmp_path, "--max_train_steps", "1", "--save_format", form)
    found = inspect(tmp_path / "run.safetensors")
    assert (found["kind"], found["family"], found["format"]) == ("lora", "z_image", form) and found["unmatched"] == []


def test_a_reader_that_has_read_enough_is_no_fault(toy):  # noqa: F811
    words = [sys.executable, "tools/inspect.py", str(toy.with_name("denoiser.safetensors"))]
    program = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    program.stdout.close()
    said = program.stderr.read()
    assert program.wait() == 141 and "fault" not in said and "BrokenPipe" not in said


@pytest.mark.parametrize("name", ["qwen_image", "sd3", "lumina_2", "z_image", "auraflow", "hunyuan_image"])
@pytest.mark.parametrize("start", ["diffusion_model.", "lora_unet_"])
def test_a_lora_is_not_taken_for_one_of_a_family_whose_names_begin_alike(name, start):
    """Lumina's and Z-Image's blocks do; HunyuanImage's and Flux's differ in their widths alone."""
    from library.families import get_family

    part, content = get_family(name).denoiser, read_json(f"layouts/{name}")
    shapes, begins = content.get("keys", content), get_family(name).adapted
    prefix = content.get("file_prefix") or next(p for p in part.prefixes if any(k.startswith(p) for k in shapes))
    plain = {k.removeprefix(prefix).removesuffix(".weight"): s for k, s in shapes.items() if len(s) == 2}
    keys = {}
    for module, (rows, columns) in plain.items():
        if module.startswith(begins):
            stem = start + (module.replace(".", "_") if start == "lora_unet_" else module)
            keys |= {f"{stem}.lora_A.weight": (4, columns), f"{stem}.lora_B.weight": (rows, 4), f"{stem}.alpha": ()}
    found = named(keys)
    assert len(keys) > 300 and (found.kind, found.family) == ("lora", name), found.title


def test_a_lora_of_modules_that_several_families_have_is_given_to_none():
    """Chroma's and HunyuanVideo's are Flux's too; attention of Qwen-Image and of SD3 has the same names in diffusers' files."""
    for stem, rows in (
        ("diffusion_model.double_blocks.0.img_attn.qkv", 9216),
        ("transformer.transformer_blocks.3.attn.to_q", 3072),
    ):
        found = named({f"{stem}.lora_A.weight": (4, 3072), f"{stem}.lora_B.weight": (rows, 4)})
        assert (found.kind, found.family) == ("lora", "") and "a LoRA in" in found.title


def test_missing_and_unknown_keys_are_listed(toy, tmp_path):  # noqa: F811
    from safetensors.torch import load_file, save_file

    weights = load_file(toy.parent / "denoiser.safetensors")
    weights["surprise"] = weights.pop("layers.1.attention.out.weight")
    save_file(weights, tmp_path / "x.safetensors")
    found = inspect(tmp_path / "x.safetensors")
    assert found["missing"] == ["layers.1.attention.out.weight"] and found["unmatched"] == ["surprise"]


FAMILY_OF = {
    "sd3_large": "sd3", "flux_kontext": "flux", "flux_schnell": "flux", "flux2_klein_4b": "flux2", "flux2_klein_9b": "flux2",
    "qwen_image_edit_2511": "qwen_image", "cosmos_predict2_14b": "cosmos_predict2", "hunyuan_video_15_i2v": "hunyuan_video_15",
    "wan22_a14b_i2v": "wan", "wan22_a14b_t2v": "wan", "wan22_ti2v_5b": "wan", "wan_i2v_14b": "wan", "wan_t2v_14b": "wan",
}  # fmt: skip
DENOISERS = (
    "anima auraflow chroma cosmos cosmos_predict2 cosmos_predict2_14b flux flux2 flux2_klein_4b flux2_klein_9b flux_kontext "
    "flux_schnell hidream hunyuan_image hunyuan_video hunyuan_video_15 hunyuan_video_15_i2v ltx_video lumina_2 omnigen2 qwen_image "
    "qwen_image_edit_2511 sd3 sd3_large sdxl wan wan22_a14b_i2v wan22_a14b_t2v wan22_ti2v_5b wan_i2v_14b wan_t2v_14b z_image"
).split()


@pytest.mark.skipif(not LAYOUTS.is_dir(), reason="the key lists of the full-size files are not here")
@pytest.mark.parametrize("name", DENOISERS)
def test_the_denoisers_of_other_families_are_named(name):
    content = json.loads((LAYOUTS / f"{name}.json").read_text(encoding="utf-8"))
    for prefix in {content.get("file_prefix", ""), "model.diffusion_model."}:
        tensors = {prefix + k: TensorInfo("BF16", tuple(shape), 0, 0) for k, shape in content["keys"].items()}
        found = identify(Checkpoint(Path("x"), (Header(Path("x"), tensors, {}, 8),)))
        assert (found.kind, found.family) == ("checkpoint", FAMILY_OF.get(name, name)), (prefix, found.title)


@pytest.mark.skipif(not LAYOUTS.is_dir(), reason="the key lists of the full-size files are not here")
def test_vaes_are_named_as_such():
    wrong = []
    for path in sorted(LAYOUTS.glob("vae_*.json")):
        keys = json.loads(path.read_text(encoding="utf-8"))["keys"]
        keys = keys if isinstance(keys, dict) else dict.fromkeys(keys, (1,))
        found = named(keys)
        if found.kind != "vae":
            wrong.append(f"{path.stem}: {found.kind} {found.title}")
    assert not wrong, wrong


def named(shapes, dtype="BF16"):
    tensors = {key: TensorInfo(dtype, tuple(shape), 0, 0) for key, shape in shapes.items()}
    return identify(Checkpoint(Path("x"), (Header(Path("x"), tensors, {}, 8),)))


ENCODERS = {
    "te_byt5_glyphxl": ("byt5", ""), "te_clip_g": ("clip_g", ""), "te_clip_l": ("clip_l", ""),
    "te_gemma2_2b": ("gemma2", ""), "te_llama3_8b": ("llama3", ""), "te_mistral_small_flux2": ("mistral", "whole"),
    "te_mistral_small_flux2_pruned": ("mistral", "30 layers"), "te_qwen25_3b": ("qwen2.5-vl", "3B"),
    "te_qwen25_vl_7b": ("qwen2.5-vl", "7B"), "te_qwen3_0.6b": ("qwen3", "0.6B"), "te_qwen3_4b": ("qwen3", "4B"),
    "te_qwen3_8b": ("qwen3", "8B"), "te_t5xxl": ("t5xxl", ""), "te_t5xxl_old": ("t5xxl_old", ""),
    "te_umt5_auraflow": ("pile_t5xl", ""), "te_umt5xxl": ("umt5xxl", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_text_encoders_are_named_with_their_size_also_when_quantised(name):
    content = read_json(f"layouts/{name}")
    shapes = content.get("keys", content)
    found = named(shapes)
    assert (found.kind, found.family, found.variant) == ("text_encoder", *ENCODERS[name]), found.title
    assert found.unmatched == [] and found.matched == len(shapes)
    linear = next(key for key, shape in shapes.items() if key.endswith(".weight") and len(shape) == 2)
    scaled = shapes | {"scaled_fp8": (0,), linear.removesuffix(".weight") + ".scale_weight": ()}
    assert named(scaled, "F8_E4M3").family == ENCODERS[name][0]
    (part,) = (part for _, family, part in PARTS if family == ENCODERS[name][0])
    prefix = next(prefix for prefix in part.prefixes if prefix.startswith("text_encoders."))
    inside = named({prefix + key: shape for key, shape in shapes.items()})
    assert (inside.family, inside.variant) == ENCODERS[name]


def test_image_encoders_and_foreign_language_models_are_named():
    def layer(prefix):
        return {f"{prefix}encoder.layers.0.self_attn.q_proj.weight": (1280, 1280)}

    patches = {"vision_model.embeddings.patch_embedding.weight": (1280, 3, 14, 14)}
    clip = patches | layer("vision_model.") | {"vision_model.embeddings.class_embedding": (1280,)}
    assert (named(clip).kind, named(clip).family) == ("image_encoder", "clip_vision")
    siglip = patches | layer("vision_model.")
    assert (named(siglip).kind, named(siglip).family) == ("image_encoder", "siglip_vision")
    first = "model.layers.0."
    gemma3 = {
        "model.embed_tokens.weight": (262208, 2560), f"{first}self_attn.q_proj.weight": (2048, 2560),
        f"{first}self_attn.q_norm.weight": (256,), f"{first}pre_feedforward_layernorm.weight": (2560,),
    }  # fmt: skip
    assert (named(gemma3).kind, named(gemma3).family) == ("text_encoder", "gemma3")
