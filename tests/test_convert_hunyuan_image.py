"""The converter of HunyuanImage-2.1 LoRAs: names, bytes, hashes, memory, and what it refuses."""

import subprocess
import sys

import pytest
import torch
from oracles import accepted_stems
from safetensors.torch import load_file, safe_open, save, save_file
from training_support import ROOT

from library.errors import ConfigError
from library.headers import read_header
from networks.convert_hunyuan_image_lora_to_comfy import convert
from networks.formats import model_hashes

# As sd-scripts names them (reference: its own converter's renames): fused qkv, fc1/fc2, linear.
NAMES = {
    "double_blocks_3_img_attn_qkv": "double_blocks_3_img_attn_qkv",
    "double_blocks_19_txt_attn_proj": "double_blocks_19_txt_attn_proj",
    "double_blocks_0_img_mlp_fc1": "double_blocks_0_img_mlp_0",
    "double_blocks_0_txt_mlp_fc2": "double_blocks_0_txt_mlp_2",
    "double_blocks_0_img_mod_linear": "double_blocks_0_img_mod_lin",
    "single_blocks_39_modulation_linear": "single_blocks_39_modulation_lin",
    "single_blocks_39_linear1": "single_blocks_39_linear1",
}
METADATA = {"ss_network_dim": "4", "modelspec.title": "x", "sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}


def lora(width=8, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name in NAMES:
        out[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, width, generator=generator).to(dtype)
        out[f"lora_unet_{name}.lora_up.weight"] = torch.randn(width, 4, generator=generator).to(dtype)
        out[f"lora_unet_{name}.alpha"] = torch.tensor(4.0)
    return out


@pytest.fixture
def source(tmp_path):
    save_file(lora(), tmp_path / "source.safetensors", metadata=METADATA)
    return tmp_path / "source.safetensors"


def test_every_name_becomes_comfyuis_and_every_value_stays(source, tmp_path):
    target = tmp_path / "comfy.safetensors"
    assert "21 tensors, 12 renamed" in convert(source, target)
    before, after = load_file(source), load_file(target)
    for old, new in NAMES.items():
        for word in ("lora_down.weight", "lora_up.weight", "alpha"):
            assert torch.equal(before[f"lora_unet_{old}.{word}"], after[f"lora_unet_{new}.{word}"])
    stems = {key.rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in after}
    assert len(stems) == len(NAMES) and stems <= accepted_stems("hunyuan_image")


def test_metadata_is_kept_and_hashes_are_those_of_the_new_file(source, tmp_path):
    target = tmp_path / "comfy.safetensors"
    convert(source, target)
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "4" and metadata["modelspec.title"] == "x"
    tensors = load_file(target)
    expected = model_hashes(tensors, {"ss_network_dim": "4"})
    assert {name: metadata[name] for name in expected} == expected
    # safetensors itself lays the same tensors out in the same order
    theirs = save(tensors, {"ss_network_dim": "4"})
    (tmp_path / "theirs.safetensors").write_bytes(theirs)
    ours, reference = read_header(target), read_header(tmp_path / "theirs.safetensors")
    assert [(n, i.start) for n, i in ours.tensors.items()] == [(n, i.start) for n, i in reference.tensors.items()]
    assert target.read_bytes()[ours.data_start :] == theirs[reference.data_start :]


def test_reverse_gives_the_source_again_also_from_the_format_that_training_saves(source, tmp_path):
    comfy, back, dotted = (tmp_path / f"{name}.safetensors" for name in ("comfy", "back", "dotted"))
    convert(source, comfy)
    convert(comfy, back, is_reverse=True)
    assert back.read_bytes()[read_header(back).data_start :] == source.read_bytes()[read_header(source).data_start :]
    assert read_header(back).tensors == read_header(source).tensors
    words = {"lora_down": "lora_A", "lora_up": "lora_B"}
    trained = {}
    for key, value in lora().items():
        module, _, rest = key.removeprefix("lora_unet_").partition(".")
        name = {"double_blocks_0_img_mlp_fc1": "double_blocks.0.img_mlp.0"}.get(module)
        if name:
            word = rest.split(".")[0]
            trained[f"diffusion_model.{name}.{rest.replace(word, words.get(word, word))}"] = value
    assert len(trained) == 3
    save_file(trained, dotted)
    convert(dotted, back, is_reverse=True)
    assert set(load_file(back)) == {k for k in lora() if "img_mlp_fc1" in k}


def test_a_file_of_another_kind_is_refused_by_name_and_nothing_is_written(source, tmp_path):
    other, target = tmp_path / "other.safetensors", tmp_path / "target.safetensors"
    save_file({"lora_unet_double_blocks_0_img_attn_to_q.lora_down.weight": torch.zeros(2)}, other)
    with pytest.raises(ConfigError, match="img_attn_to_q"):
        convert(other, target)
    with pytest.raises(ConfigError, match="without --reverse"):
        convert(source, target, is_reverse=True)
    with pytest.raises(ConfigError, match="itself"):
        convert(source, source)
    source.write_bytes(source.read_bytes()[:-3])
    with pytest.raises(ConfigError, match="truncated"):
        convert(source, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.safetensors", "source.safetensors"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_it_runs_as_a_script_without_torch_and_in_little_memory(tmp_path):
    big = {
        "lora_unet_single_blocks_0_linear1.lora_down.weight": torch.zeros(4, 40_000_000, dtype=torch.uint8).view(
            torch.bfloat16
        )
    }
    save_file(big, tmp_path / "big.safetensors")
    probe = (
        "import runpy, sys\n"
        f"sys.argv = ['convert', {str(tmp_path / 'big.safetensors')!r}, {str(tmp_path / 'out.safetensors')!r}]\n"
        "runpy.run_path('networks/convert_hunyuan_image_lora_to_comfy.py', run_name='__main__')\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]\n"
        "print('torch' in sys.modules, peak)"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded, peak = done.stdout.splitlines()[-1].split()
    assert loaded == "False" and int(peak) < 100_000  # KiB, for 160 MB
