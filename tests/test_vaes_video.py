"""Autoencoders in bounded memory, and what the autoencoders of videos get wrong elsewhere: what is exact is compared
with diffusers' own classes in one pass, what is tiled with diffusers' own tiles."""

import pytest
import torch
from oracles import golden, relative
from vaes_support import CASES, SAME, model_of, normalised, tensors_of

from library.components import chunks, vae_cosmos, vae_hunyuan_video, vae_ltx
from library.errors import ConfigError


@pytest.mark.parametrize(("name", "rows"), [("hunyuan_image", 1), ("hunyuan_image", 5), ("wan21", 4), ("wan22", 1000)])
@torch.no_grad()
def test_convolutions_in_strips_give_the_same(name, rows, tmp_path):
    case = CASES[name]
    tensors, model = tensors_of(case), model_of(case, tmp_path)
    pixels, latents = tensors["inputs/pixels"], tensors["inputs/z"]
    whole, picture = case.encode(model, pixels), case.decode(model, latents)
    assert relative(case.encode(model, pixels, chunk=rows), whole) < 1e-5
    assert relative(case.decode(model, latents, chunk=rows), picture) < 1e-5
    assert torch.equal(case.encode(model, pixels), whole)  # and nothing of it stays


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.nn.Conv2d, {"kernel_size": 3, "padding": 1}),
        (torch.nn.Conv2d, {"kernel_size": 3, "stride": 2}),
        (torch.nn.Conv2d, {"kernel_size": (5, 3), "padding": (2, 1), "groups": 2, "bias": False}),
        (torch.nn.Conv2d, {"kernel_size": 3, "padding": 1, "dilation": 2}),
        (torch.nn.Conv3d, {"kernel_size": 3, "padding": (0, 1, 1)}),
    ],
)
def test_strips_never_hold_more_rows_than_asked(kind, options, monkeypatch):
    from torch.nn import functional

    layer = kind(4, 6, **options)
    x = torch.randn(2, 4, *((5,) if kind is torch.nn.Conv3d else ()), 23, 9)
    whole, seen = layer(x), []
    for name in ("conv2d", "conv3d"):
        real = getattr(functional, name)

        def watched(x, *rest, _real=real):
            made = _real(x, *rest)
            seen.append(made.shape[-2])
            return made

        monkeypatch.setattr(functional, name, watched)
    with chunks.convolutions(layer, 4):
        assert relative(layer(x).detach(), whole.detach()) < 1e-6
    assert max(seen) <= 4 and sum(seen) == whole.shape[-2]
    layer(x).sum().backward()
    assert layer.weight.grad is not None


# ---------------------------------------------------------------- clips

STEPS = {  # frames after the first that make one latent frame
    "wan21": 4,
    "wan22": 4,
    "hunyuan_video": 4,
    "hunyuan_video15": 4,
    "ltx_091": 8,
    "ltx_095": 8,
    "cosmos": 8,
}
IN_PIECES = [name for name in STEPS if name not in ("hunyuan_video", "cosmos")]


def plain(model):
    """diffusers' class as it is, in one pass, with the same weights."""
    theirs = type(model).from_config(model.config).eval()
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if k not in ("latent_mean", "latent_std")})
    model.binding.part.finish(theirs, "cpu")
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = False
    return theirs


def statistics(name, model, frames):
    """Mean and deviation by which the latents of these frames are normalised, written out."""
    if name.startswith("hunyuan"):
        return 0.0, 1 / {"hunyuan_video": 0.476986, "hunyuan_video15": 1.03682}[name]
    if name == "cosmos":
        mean, std = (model.state_dict()[key].view(16, 16) for key in ("latent_mean", "latent_std"))
        index = torch.arange(frames) % 16
        return mean[None, :, index, None, None], 2 * std[None, :, index, None, None]
    values = (model.latents_mean, model.latents_std) if name.startswith("ltx") else ()
    values = values or (torch.tensor(model.config.latents_mean), torch.tensor(model.config.latents_std))
    return tuple(one.view(1, -1, 1, 1, 1) for one in values)


def clip(frames, height=32, width=32, batch=1):
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


def latents_like(model, frames, height=2, width=3):
    channels = model.config.get("z_dim") or model.config.latent_channels
    return torch.randn(1, channels, frames, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_a_clip_is_encoded_as_by_diffusers_in_one_pass(name, tmp_path):
    """Longer than the sixteen frames at which diffusers begins to tile. Two clips at a time, for which diffusers'
    HunyuanVideo-1.5 has a mask of the wrong shape."""
    model = model_of(CASES[name], tmp_path)
    video = clip(3 * STEPS[name] + 1 if STEPS[name] == 8 else 21, batch=2)
    mean, deviation = statistics(name, model, (video.shape[2] - 1) // STEPS[name] + 1)
    theirs = plain(model)
    wanted = torch.cat([(theirs.encode(one[None]).latent_dist.mode() - mean) / deviation for one in video])
    assert relative(CASES[name].encode(model, video), wanted) < 1e-5


@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_a_clip_is_decoded_as_by_diffusers_in_one_pass(name, tmp_path):
    model = model_of(CASES[name], tmp_path)
    z = latents_like(model, 6)
    mean, deviation = statistics(name, model, 6)
    theirs, told = plain(model), ()
    if name.startswith("ltx"):  # the time that the decoder is told, and noise inside of it
        told = (torch.tensor([0.05]),)
        torch.manual_seed(0)
    wanted = theirs.decode(z, *told).sample
    silent = {"noise": 0.0} if told else {}
    assert relative(CASES[name].decode(model, (z - mean) / deviation, **silent), wanted) < 1e-5
    assert wanted.shape[2] == 5 * STEPS[name] + 1


@pytest.mark.parametrize("name", IN_PIECES)
@torch.no_grad()
def test_memory_does_not_grow_with_the_clip(name, tmp_path):
    """The encoder sees one frame, then as many as make a latent frame; a longer clip begins with the same latents."""
    case, step = CASES[name], STEPS[name]
    model, video = model_of(case, tmp_path), clip(3 * STEPS[name] + 1)
    frames = []
    hook = model.encoder.register_forward_pre_hook(lambda _, inputs: frames.append(inputs[0].shape[2]))
    latents = case.encode(model, video)
    assert frames == [1, step, step, step]
    hook.remove()
    assert relative(case.encode(model, video[:, :, : step + 1]), latents[:, :, :2]) < 1e-5


@torch.no_grad()
def test_hunyuan_video_15_is_decoded_one_latent_frame_at_a_time(tmp_path):
    case = CASES["hunyuan_video15"]
    model, frames = model_of(case, tmp_path), []
    model.decoder.register_forward_pre_hook(lambda _, inputs: frames.append(inputs[0].shape[2]))
    case.decode(model, latents_like(model, 3))
    assert frames == [1, 1, 1]


@torch.no_grad()
def test_wans_feature_cache_gives_the_independent_implementations_latents(tmp_path):
    case = CASES["wan21"]
    tensors, model = tensors_of(case), model_of(case, tmp_path)
    longer = torch.cat([tensors["inputs/pixels"], clip(8, *tensors["inputs/pixels"].shape[-2:])], dim=2)
    latents = case.encode(model, longer)
    assert relative(latents[:, :, :2], normalised(case, tensors["outputs/latent"])) < SAME


@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_a_picture_is_a_clip_of_one_frame(name, tmp_path):
    case = CASES[name]
    model, pixels = model_of(case, tmp_path), clip(1, 32, 64, batch=2)
    latents = case.encode(model, pixels[:, :, 0])
    assert latents.ndim == 4 and torch.equal(latents, case.encode(model, pixels)[:, :, 0])
    decoded = case.decode(model, latents)
    assert decoded.shape == (2, 3, 32, 64) and torch.equal(decoded, case.decode(model, latents[:, :, None])[:, :, 0])


@pytest.mark.parametrize("name", STEPS)
def test_frames_that_would_be_dropped_are_refused(name, tmp_path):
    case, step = CASES[name], STEPS[name]
    model = model_of(case, tmp_path)
    near = f"{step}k \\+ 1 frames, not {step + 3}; use {step + 1} or {2 * step + 1}"
    with pytest.raises(ConfigError, match=near):
        case.encode(model, clip(step + 3))


# ---------------------------------------------------------------- one model's own pitfalls


@torch.no_grad()
def test_hunyuan_video_follows_the_original_where_comfyui_differs(tmp_path):
    """Five frames: ComfyUI's norms see chunks of the clip and its attention the future; diffusers is the original."""
    case, five = CASES["hunyuan_video"], golden("vae_hunyuan_video_T5_diffusers")
    latents = case.encode(model_of(case, tmp_path), five["inputs/pixels"])
    assert relative(latents, five["outputs/latent_diffusers"] * 0.476986) < SAME
    assert relative(latents, five["outputs/latent_comfy"] * 0.476986) > 0.1


@torch.no_grad()
def test_hunyuan_video_tiles_large_clips_as_diffusers_does(tmp_path, monkeypatch):
    """Beyond its limit a clip is made as by diffusers' `enable_tiling`, which is not what one pass gives."""
    case = CASES["hunyuan_video"]
    model, video = model_of(case, tmp_path), clip(21)
    theirs = plain(model)
    theirs.enable_tiling()
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = True
    wanted = theirs.encode(video).latent_dist.mode() * 0.476986
    z = latents_like(model, 6)
    whole, pixels = case.encode(model, video), case.decode(model, z)
    monkeypatch.setattr(vae_hunyuan_video, "WHOLE", 1000)
    assert relative(case.encode(model, video), wanted) < 1e-5 < 1e-2 < relative(whole, wanted)
    wanted = theirs.decode(z / 0.476986).sample
    assert relative(case.decode(model, z), wanted) < 1e-5 < 1e-2 < relative(pixels, wanted)


@pytest.mark.parametrize("name", ["ltx_091", "ltx_095"])
@torch.no_grad()
def test_ltx_decodes_with_zeros_around_as_the_original_and_not_reflected(name, tmp_path):
    case = CASES[name]
    tensors, model = tensors_of(case), model_of(case, tmp_path)
    assert relative(case.encode(model, tensors["inputs/pixels"]), tensors["outputs/latent"]) < SAME
    mean, deviation = statistics(name, model, 0)
    z = (tensors["inputs/z_unnormalised"] - mean) / deviation
    told = {"time": float(tensors["inputs/t"]), "noise": 0.0}
    wanted = tensors["outputs/decoded_zero_padding"]
    assert relative(case.decode(model, z, **told), wanted) < SAME
    for module in model.decoder.modules():
        if isinstance(module, torch.nn.Conv3d) and any(module.padding):
            module.padding_mode = "reflect"
            module._reversed_padding_repeated_twice = [n for n in reversed(module.padding) for _ in range(2)]
    assert relative(case.decode(model, z, **told), wanted) > 0.1


@torch.no_grad()
def test_what_ltx_draws_follows_from_the_seed_and_touches_no_generator(tmp_path):
    case = CASES["ltx_091"]
    model = model_of(case, tmp_path)
    z = latents_like(model, 2)
    before = torch.get_rng_state()
    first = case.decode(model, z)
    torch.rand(3)
    assert torch.equal(case.decode(model, z), first) and not torch.equal(case.decode(model, z, seed=1), first)
    torch.set_rng_state(before)
    case.decode(model, z)
    assert torch.equal(torch.get_rng_state(), before)
    assert relative(case.decode(model, z, noise=0.0), first) > 1e-3


@torch.no_grad()
def test_ltx_tiles_large_clips_as_diffusers_does(tmp_path, monkeypatch):
    model = model_of(CASES["ltx_095"], tmp_path)
    z = latents_like(model, 6)
    mean, deviation = statistics("ltx", model, 0)
    theirs = plain(model)
    theirs.enable_tiling()
    theirs.use_framewise_decoding = True
    torch.manual_seed(0)
    wanted = theirs.decode(z, torch.tensor([0.05])).sample
    monkeypatch.setattr(vae_ltx, "WHOLE", 1000)
    assert relative(vae_ltx.decode(model, (z - mean) / deviation, noise=0.0), wanted) < 1e-5


def test_a_single_file_of_ltx_gives_transformer_and_vae(tmp_path):
    """The published file holds both; the header and what nobody reads come along."""
    from oracles import load, weights_of

    case = CASES["ltx_091"]
    transformer = weights_of(golden("ltx_091"), "weights/")
    transformer = {
        f"model.diffusion_model.{k.removeprefix('model.diffusion_model.')}": v for k, v in transformer.items()
    }
    both = weights_of(tensors_of(case), "weights/") | transformer
    model = load(vae_ltx.part(), both, tmp_path, torch.float32, config="{}")
    assert model.binding.prefix == "vae." and model.binding.metadata == {"config": "{}"}
    assert set(model.binding.extras) == set(vae_ltx.CARRIED)


@torch.no_grad()
def test_the_statistics_of_cosmos_repeat_beyond_sixteen_latent_frames(tmp_path):
    case = CASES["cosmos"]
    model, video = model_of(case, tmp_path), clip(17 * 8 + 1, 16, 16)
    mean, deviation = statistics("cosmos", model, 18)
    wanted = (plain(model).encode(video).latent_dist.mode() - mean) / deviation
    latents = case.encode(model, video)
    assert latents.shape[2] == 18 and relative(latents, wanted) < 1e-5
    assert not torch.equal(mean[:, :, 0], mean[:, :, 15]) and torch.equal(mean[:, :, 1], mean[:, :, 17])


@torch.no_grad()
def test_a_diffusers_folder_of_cosmos_has_the_published_statistics(tmp_path):
    """Its file has none; diffusers' copy in the configuration is taken, which is the published tokenizer's."""
    from oracles import load

    case = CASES["cosmos"]
    ours = model_of(case, tmp_path)
    state = {k: v for k, v in ours.state_dict().items() if k not in ("latent_mean", "latent_std")}
    model = load(vae_cosmos.part(), state, tmp_path, torch.float32)
    assert model.binding.layout.name == "diffusers"
    video = clip(9)
    mean, std = (
        torch.tensor(values).view(1, 16, 16, 1, 1)[:, :, :2]
        for values in (model.config.latents_mean, model.config.latents_std)
    )
    assert relative(case.encode(model, video), (plain(ours).encode(video).latent_dist.mode() - mean) / std * 0.5) < 1e-5
