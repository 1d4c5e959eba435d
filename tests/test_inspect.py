"""What any file is, from its header: our own files, LoRAs in every format, the key lists of the real files of others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training_support import pictures, toy, train  # noqa: F401  (fixtures)

from library.checkpoints import Checkpoint
from library.fingerprints import identify
from library.headers import Header, TensorInfo

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = ROOT.parent / "shared" / "layouts"


def inspect(path):
    done = subprocess.run(
        [sys.executable, "tools/inspect.py", str(path), "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_parts_of_a_model_are_named_and_every_key_is_matched(toy):  # noqa: F811
    expected = {
        "denoiser": ("checkpoint", "z_image", "comfy"),
        "vae": ("vae", "flux", "ldm"),
        "text_encoder": ("text_encoder", "z_image", "original"),
    }
    for name, what in expected.items():
        found = inspect(toy.parent / f"{name}.safetensors")
        assert (found["kind"], found["family"], found["layout"]) == what
        assert found["unmatched"] == found["missing"] == [] and found["matched"] == sum(found["dtypes"].values())
        assert found["parameters"] > 50_000 and found["dtypes"].keys() == {"F32"}


@pytest.mark.parametrize("form", ["comfy", "kohya", "diffusers"])
def test_a_lora_is_named_with_its_format_and_family(toy, pictures, tmp_path, form):  # noqa: F811
    train(toy, pictures, tmp_path, "--max_train_steps", "1", "--save_format", form)
    found = inspect(tmp_path / "run.safetensors")
    assert (found["kind"], found["family"], found["format"]) == ("lora", "z_image", form) and found["unmatched"] == []


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
def test_vaes_and_text_encoders_are_named_as_such():
    wrong = []
    for path in sorted(LAYOUTS.glob("*.json")):
        kind = {"vae_": "vae", "te_": "text_encoder"}.get(path.name.split("_")[0] + "_")
        if kind is None or path.name == "INDEX.json":
            continue
        keys = json.loads(path.read_text(encoding="utf-8"))["keys"]
        keys = keys if isinstance(keys, dict) else dict.fromkeys(keys, (1,))
        tensors = {k: TensorInfo("BF16", tuple(shape), 0, 0) for k, shape in keys.items()}
        found = identify(Checkpoint(Path("x"), (Header(Path("x"), tensors, {}, 8),)))
        if found.kind != kind:
            wrong.append(f"{path.stem}: {found.kind} {found.title}")
    assert not wrong, wrong
