import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_support import ROOT, called

from library.errors import ConfigError
from tools.convert import convert


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A toy checkpoint in the real format and a LoRA for it in ComfyUI's."""
    folder = tmp_path_factory.mktemp("convert")
    with safe_open(ROOT / "tests" / "data" / "golden" / "z_image.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file({k[5:]: v for k, v in tensors.items() if k.startswith("ckpt.")}, folder / "base.safetensors")
    weights = {f"diffusion_model.{k[5:]}": v for k, v in tensors.items() if k.startswith("lora.")}
    for key in [k for k in weights if k.endswith("lora_A.weight")]:
        weights[key.replace("lora_A.weight", "alpha")] = torch.tensor(2.0)
    metadata = {"ss_output_name": "golden", "modelspec.title": "a title", "sshs_model_hash": "old"}
    save_file(weights, folder / "lora.safetensors", metadata)
    return folder


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_there_and_back_through_every_format_keeps_values_and_metadata(files):
    source, base = files / "lora.safetensors", files / "base.safetensors"
    for to, back in (("kohya", "exact"), ("diffusers", "exact")):
        line = convert(source, files / f"{to}.safetensors", to, base=base)
        assert f"(comfy) -> {files / to}.safetensors ({to}): 40 modules, " in line and "keys match" in line
        convert(files / f"{to}.safetensors", files / f"{back}.safetensors", "comfy", base=base)
        old, new = load_file(source), load_file(files / f"{back}.safetensors")
        assert old.keys() == new.keys()
        for key in (k for k in old if k.endswith("lora_B.weight")):
            alpha, down = key.replace("lora_B.weight", "alpha"), key.replace("lora_B", "lora_A")
            assert torch.equal(old[key] * old[alpha], new[key] * new[alpha]) and torch.equal(old[down], new[down])
        kept = metadata(files / f"{back}.safetensors")
        assert kept["ss_output_name"] == "golden" and kept["modelspec.title"] == "a title"
        assert len(kept["sshs_model_hash"]) == 64 and kept["sshs_model_hash"] != "old"


def test_separate_adapters_are_joined_and_the_line_says_what_that_costs(files):
    stem = "transformer.layers.0.attention"
    tensors = {}
    for name in ("to_q", "to_k", "to_v"):
        tensors |= {
            f"{stem}.{name}.lora_A.weight": torch.randn(4, 48),
            f"{stem}.{name}.lora_B.weight": torch.randn(48, 4),
        }
    save_file(tensors, files / "split.safetensors")
    lines = convert(files / "split.safetensors", files / "joined.safetensors", "comfy", base=files / "base.safetensors")
    assert "1 fused modules hold several separate adapters side by side, exactly, at rank 12" in lines
    assert load_file(files / "joined.safetensors")["diffusion_model.layers.0.attention.qkv.lora_B.weight"].shape == (
        144,
        12,
    )


def test_what_is_no_lora_or_does_not_fit_is_refused_and_nothing_is_written(files):
    target = files / "never.safetensors"
    with pytest.raises(ConfigError, match="base.safetensors is not a LoRA"):
        convert(files / "base.safetensors", target, "kohya")
    with pytest.raises(ConfigError, match="another size.*give --base FILE"):
        convert(files / "lora.safetensors", target, "kohya")
    with pytest.raises(ConfigError, match="is the source itself"):
        convert(files / "lora.safetensors", files / "lora.safetensors", "kohya")
    assert not target.exists()


def test_the_command_ends_with_one_sentence_and_exit_code_2(files):
    result = called(
        "tools/convert.py", *(str(files / f"{name}.safetensors") for name in ("none", "x")), "--to", "kohya"
    )
    assert result.returncode == 2 and result.stderr.startswith("error: ") and "Traceback" not in result.stderr
