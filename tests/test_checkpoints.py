"""Reading and writing weights: hostile headers, containers, shards, quantised companions, extras, full disks."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_support import toy  # noqa: F401  (fixture)

from library import checkpoints, quantised
from library.errors import ConfigError, DiskError
from library.families import get_family
from library.headers import read_header

DATA = Path(__file__).parent / "data" / "golden"
FAMILY = get_family("z_image")
ROOT = Path(__file__).resolve().parent.parent


def header_file(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def tensor(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BROKEN = {
    "overlong header": ({}, b"", 2**60),
    "header past the end": ({}, b"", 5000),
    "no json": (b"{nope", b"", None),
    "a list": (b"[1, 2]", b"", None),
    "overlap": ({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, b"x" * 12, None),
    "size and shape differ": ({"a": tensor([3], 0, 8)}, b"x" * 8, None),
    "negative": ({"a": tensor([-2], 0, 8)}, b"x" * 8, None),
    "unknown dtype": ({"a": tensor([2], 0, 8, "F99")}, b"x" * 8, None),
    "truncated data": ({"a": tensor([2], 0, 8)}, b"x" * 4, None),
    "data after the last tensor": ({"a": tensor([2], 0, 8)}, b"x" * 12, None),
    "a hole between tensors": ({"a": tensor([2], 0, 8), "b": tensor([2], 12, 20)}, b"x" * 20, None),
    "metadata is no table": ({"__metadata__": [1]}, b"", None),
    "deep": (b"[" * 100_000, b"", None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_one_sentence_that_names_it(tmp_path, name):
    header, data, length = BROKEN[name]
    path = header_file(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(ConfigError, match="bad.safetensors") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"GGUF\x03\x00\x00\x00", r"it is GGUF, which is not read\); convert it"),
        (b"version https://git-lfs.github.com/spec/v1", r"a pointer of Git LFS\); load it anew"),
        (b"<!DOCTYPE html>", r"a web page\); load it anew"),
        (b"\xff" * 8, r"no header length\); convert it"),
    ],
)
def test_what_is_no_safetensors_file_is_told_by_its_first_bytes(tmp_path, start, said):
    (tmp_path / "model.safetensors").write_bytes(start + b"\0" * 200)
    with pytest.raises(ConfigError, match=f"model.safetensors is not a safetensors file .*{said}"):
        read_header(tmp_path / "model.safetensors")


def test_a_pickle_is_refused_as_one(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="pickle"):
        read_header(tmp_path / "model.pt")


@pytest.fixture
def weights():
    golden = load_file(DATA / "z_image.safetensors")
    return {k.removeprefix("ckpt."): v for k, v in golden.items() if k.startswith("ckpt.")}


def load(path, dtype=torch.float32):
    return checkpoints.load_part(FAMILY.denoiser, path, dtype=dtype)


def test_everything_wrong_with_a_file_is_said_at_once(tmp_path, weights):
    del weights["layers.1.attention.out.weight"]
    weights["surprise.weight"] = torch.zeros(3)
    weights["x_embedder.bias"] = torch.zeros(7)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "w.safetensors")
    for part in (
        "1 missing (layers.1.attention.out.weight)",
        "1 not known (surprise.weight)",
        "x_embedder.bias [7] instead of [48]",
    ):
        assert part in str(caught.value)


def test_a_file_without_the_tensor_that_its_size_is_read_from_is_one_sentence(tmp_path, weights):
    del weights["x_embedder.weight"]
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="w.safetensors does not fit a Z-Image denoiser.*x_embedder.weight"):
        load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("channels", [4, 32])
def test_a_vae_with_other_latent_channels_is_refused(tmp_path, channels):
    vae = {k[8:]: v for k, v in load_file(DATA / "vae_flux.safetensors").items() if k.startswith("weights/")}
    vae["decoder.conv_in.weight"] = torch.zeros(8, channels, 3, 3)
    save_file(vae, tmp_path / "vae.safetensors")
    with pytest.raises(ConfigError, match="is not a Flux-type VAE: it is an LDM VAE"):
        checkpoints.check_part(FAMILY.vae, str(tmp_path / "vae.safetensors"), "--vae")


def test_a_file_of_another_kind_is_named_for_what_it_is(tmp_path):
    vae = {
        k.removeprefix("weights/"): v
        for k, v in load_file(DATA / "vae_flux.safetensors").items()
        if k.startswith("weights/")
    }
    save_file(vae, tmp_path / "vae.safetensors")
    with pytest.raises(ConfigError, match="is not a Z-Image denoiser: it is a Flux-type VAE"):
        checkpoints.check_part(FAMILY.denoiser, str(tmp_path / "vae.safetensors"), "--pretrained_model_name_or_path")
    wan = {
        "blocks.0.cross_attn.norm_k.weight": torch.zeros(1),
        "patch_embedding.weight": torch.zeros(1),
        "time_projection.1.weight": torch.zeros(1),
    }
    save_file({f"model.diffusion_model.{k}": v for k, v in wan.items()}, tmp_path / "wan.safetensors")
    with pytest.raises(ConfigError, match="it is a Wan denoiser"):
        checkpoints.check_part(FAMILY.denoiser, str(tmp_path / "wan.safetensors"), "--pretrained_model_name_or_path")


def test_naming_a_wrong_file_imports_no_torch(tmp_path):
    save_file(
        {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1), "vector_in.in_layer.weight": torch.zeros(1)},
        tmp_path / "flux.safetensors",
    )
    code = (
        "import sys\nfrom library.checkpoints import check_part\nfrom library.families import get_family\n"
        f"try:\n    check_part(get_family('z_image').denoiser, {str(tmp_path / 'flux.safetensors')!r}, '--x')\n"
        "except Exception as error:\n    assert 'a Flux denoiser' in str(error), error\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def outputs(model):
    golden = load_file(DATA / "z_image.safetensors")
    conds = [{"text": text} for text in golden["case.plain.in.context"]]
    with torch.no_grad():
        return FAMILY.predict(model, golden["case.plain.in.x"], golden["case.plain.in.timestep"], conds), golden[
            "case.plain.out"
        ]


def test_containers_shards_and_diffusers_folders_give_the_same_model(tmp_path, weights):
    save_file(
        {f"model.diffusion_model.{k}": v for k, v in weights.items()} | {"vae.x": torch.zeros(1)},
        tmp_path / "all.safetensors",
    )
    shards = tmp_path / "shards"
    shards.mkdir()
    names = sorted(weights)
    index = {}
    for n in range(2):
        part = {k: weights[k] for k in names[n::2]}
        save_file(part, shards / f"m-{n}.safetensors")
        index |= dict.fromkeys(part, f"m-{n}.safetensors")
    (shards / "m.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    save_file(weights, tmp_path / "single.safetensors")
    single = load(tmp_path / "single.safetensors")
    folder = tmp_path / "repository" / "transformer"
    folder.mkdir(parents=True)
    save_file(
        {k: v.contiguous() for k, v in single.state_dict().items()}, folder / "diffusion_pytorch_model.safetensors"
    )
    for path in (tmp_path / "all.safetensors", shards, shards / "m.safetensors.index.json", tmp_path / "repository"):
        mine, expected = outputs(load(path))
        assert float((mine - expected).norm() / expected.norm()) < 1e-4, path


def test_a_folder_that_diffusers_saved_gives_diffusers_own_output(tmp_path):
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    saved = ZImageTransformer2DModel(
        in_channels=4, dim=256, n_layers=1, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=12,
        axes_dims=[16, 24, 24], axes_lens=[1536, 512, 512],
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in saved.parameters():  # the pad tokens come uninitialised
            parameter.normal_(0, 0.1)
    saved.save_pretrained(tmp_path / "transformer", max_shard_size="2MB")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    noisy, sigma, text = torch.randn(1, 4, 8, 6), torch.tensor([0.3]), torch.randn(7, 12)
    with torch.no_grad():
        expected = -saved([noisy[0].unsqueeze(1)], 1 - sigma, [text], return_dict=False)[0][0].squeeze(1)
        out = FAMILY.predict(load(tmp_path), noisy, sigma, [{"text": text}])[0]
    difference = float((out - expected).norm() / expected.norm())

    assert torch.isfinite(expected).all() and expected.std() > 1e-3 and difference < 1e-5


@pytest.mark.parametrize("named", [5, ["a"], None])
def test_an_index_whose_entries_are_no_names_is_refused(tmp_path, named):
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": named}}))
    with pytest.raises(ConfigError, match="not an index of shards"):
        checkpoints.Checkpoint.open(tmp_path)


def test_an_index_that_points_outside_of_its_folder_is_refused(tmp_path):
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(ConfigError, match="outside"):
        checkpoints.Checkpoint.open(tmp_path)


def test_what_a_file_carries_besides_is_written_back_by_a_full_save(tmp_path, weights):
    extra = {"norm_final.weight": torch.randn(48), "__index_timestep_zero__": torch.zeros(0)}
    file = {f"model.diffusion_model.{k}": v for k, v in (weights | extra).items()}
    save_file(file, tmp_path / "a.safetensors", metadata={"owner": "someone"})
    model = load(tmp_path / "a.safetensors")
    with torch.no_grad():
        model.layers[0].attention.to_k.weight.mul_(2)
    checkpoints.save_part(model, tmp_path / "b.safetensors", {"ss_steps": "1"})
    saved, header = load_file(tmp_path / "b.safetensors"), read_header(tmp_path / "b.safetensors")
    assert saved.keys() == file.keys() and header.metadata["owner"] == "someone" and header.metadata["ss_steps"] == "1"
    changed = [k for k in file if not torch.equal(saved[k], file[k])]
    assert changed == ["model.diffusion_model.layers.0.attention.qkv.weight"]
    before, after = file[changed[0]], saved[changed[0]]
    assert (
        torch.equal(before[:48], after[:48])
        and torch.equal(before[96:], after[96:])
        and torch.equal(after[48:96], 2 * before[48:96])
    )


def test_slices_of_a_fused_weight_are_views_of_one_mapping(tmp_path, weights):
    save_file(weights, tmp_path / "a.safetensors")
    attention = load(tmp_path / "a.safetensors").layers[0].attention
    size = attention.to_q.weight.numel() * 4
    assert attention.to_k.weight.data_ptr() - attention.to_q.weight.data_ptr() == size
    assert attention.to_v.weight.data_ptr() - attention.to_k.weight.data_ptr() == size


def test_fp8_and_fp4_files_are_dequantised_by_their_companions(tmp_path, weights):
    golden = load_file(DATA / "te_fp8_conventions.safetensors")
    names = [
        k[4:]
        for k in golden
        if k.startswith("old/") and golden[k].dtype == torch.float8_e4m3fn and k.endswith("weight")
    ]
    assert len(names) == 14
    for name in names:
        scale = golden[f"old/{name.removesuffix('.weight')}.scale_weight"]
        old = quantised.dequantise("old/" + name, golden["old/" + name], golden.get, torch.float32)
        assert torch.equal(old, golden["old/" + name].float() * scale)
        new = quantised.dequantise("nv/" + name, golden["nv/" + name], golden.get, torch.float32)
        assert float((new - old).norm() / old.norm()) < 0.15  # the same weights in four bits; a wrong order gives 1.4
    key = "layers.0.attention.qkv.weight"
    scale = weights[key].abs().max() / 448
    file = weights | {
        key: (weights[key] / scale).to(torch.float8_e4m3fn),
        "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
    }
    file[key.replace(".weight", ".scale_weight")] = scale.reshape(1)
    save_file(file, tmp_path / "f.safetensors")
    qkv = torch.cat(
        [getattr(load(tmp_path / "f.safetensors").layers[0].attention, n).weight for n in ("to_q", "to_k", "to_v")]
    )
    assert float((qkv.detach() - weights[key]).norm() / weights[key].norm()) < 0.04


def test_a_file_that_was_cast_to_fp8_as_a_whole_loads_without_a_wanted_type(tmp_path, weights):
    cast = {k: v.to(torch.float8_e4m3fn) for k, v in weights.items()}
    save_file(cast, tmp_path / "f.safetensors")
    model = load(tmp_path / "f.safetensors", dtype=None)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.x_pad_token.detach(), cast["x_pad_token"].bfloat16())
    assert torch.equal(model.layers[0].feed_forward.w1.weight, cast["layers.0.feed_forward.w1.weight"].bfloat16())


@pytest.mark.parametrize("rows", [False, True])
def test_a_comfy_quant_file_loads_and_a_full_save_does_not_call_itself_quantised(tmp_path, weights, rows):
    name = "layers.0.feed_forward.w1"
    weight = weights[f"{name}.weight"]
    scale = (weight.abs().amax(dim=1, keepdim=True) if rows else weight.abs().max()) / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    text = json.dumps({"format": "float8_e4m3fn"})
    file = weights | {f"{name}.weight": stored, f"{name}.weight_scale": scale.flatten() if rows else scale}
    file[f"{name}.comfy_quant"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    header = {"_quantization_metadata": json.dumps({"layers": {name: {"format": "float8_e4m3fn"}}}), "owner": "someone"}
    save_file(file, tmp_path / "q.safetensors", metadata=header)
    model = load(tmp_path / "q.safetensors")
    loaded = model.layers[0].feed_forward.w1.weight.detach()
    assert torch.equal(loaded, stored.float() * scale) and float((loaded - weight).norm() / weight.norm()) < 0.04
    checkpoints.save_part(model, tmp_path / "s.safetensors", {})
    saved = read_header(tmp_path / "s.safetensors")
    assert saved.metadata == {"owner": "someone"} and saved.tensors.keys() == weights.keys()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"x")
    checkpoints.save({"a": torch.ones(4)}, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_save_leaves_the_older_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoints.save({"a": torch.ones(4)}, path, {"n": "1"})
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 3})())
    with pytest.raises(DiskError, match="make room"):
        checkpoints.save({"a": torch.zeros(4)}, path)
    monkeypatch.undo()
    monkeypatch.setattr(
        "safetensors.torch.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(DiskError, match="No space left"):
        checkpoints.save({"a": torch.zeros(4)}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"] and torch.equal(
        load_file(path)["a"], torch.ones(4)
    )


REFUSED = """
import resource, signal, sys, torch
from library import checkpoints
from library.errors import DiskError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    checkpoints.save({"a": torch.zeros(1_000_000)}, sys.argv[1])
except DiskError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_a_write_that_the_system_really_refuses_is_one_sentence_and_the_older_file_stays(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoints.save({"a": torch.ones(4)}, path)
    done = subprocess.run([sys.executable, "-c", REFUSED, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a.safetensors could not be written" in done.stdout and "make room" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"] and torch.equal(
        load_file(path)["a"], torch.ones(4)
    )


MEASURE = """
import sys, torch
from library import checkpoints
from library.families import get_family
import diffusers, transformers.models.qwen3.modeling_qwen3
from diffusers import ZImageTransformer2DModel
peak = lambda: 1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])  # of this program alone
part = get_family('z_image').denoiser
checkpoints.load_part(part, sys.argv[1], dtype=torch.float32)
before = peak()
model = checkpoints.load_part(part, sys.argv[2], dtype=torch.float32)
total = sum(float(p.sum()) for p in model.parameters())
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's accounting")
def test_loading_takes_no_more_than_the_stored_size(tmp_path, toy, weights):
    small, big = tmp_path / "small.safetensors", tmp_path / "big.safetensors"
    save_file(weights, small)
    base = load_file(toy.parent / "denoiser.safetensors")
    blocks = {
        f"layers.{n}.{k.removeprefix('layers.0.')}": v.clone()
        for n in range(2, 20)
        for k, v in base.items()
        if k.startswith("layers.0.")
    }
    save_file(base | blocks, big)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(big)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 0.9 * big.stat().st_size < int(done.stdout) <= 1.1 * big.stat().st_size
