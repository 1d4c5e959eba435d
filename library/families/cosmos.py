"""Cosmos 1.0 text-to-world, 7B and 14B (NVIDIA, 2025): cross attention to the old T5-11B's states, an EDM model.

Facts: the model sees x0 + s * noise times c_in and the time ln(s) / 4, and what it returns is F of EDM's
preconditioning with a standard deviation of the data of 0.5 (latents [B,16,F,h,w] are scaled to it). Everywhere else
here noise and data are mixed as (1 - sigma) * x0 + sigma * noise: that is EDM's mixture divided by 1 + s, with
sigma = s / (1 + s), and `predict` gives the velocity noise - x0 that belongs to F.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from library.components import cosmos, ragged, t5, vae_cosmos
from library.families.family import Cond, Family, FrameRule, Part
from library.layout import Shape, block, count, identity, our_view, row
from library.objective import edm
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SIGMA_DATA = 0.5
# EDM's noise levels that the released sampler visits; beyond them the model knows nothing.
SMALLEST, LARGEST = 0.002, 80.0
FRAME_RATE = 24.0
# NVIDIA's five proportions at 720p, and the two lengths: a picture and five seconds.
SIZES = ((960, 960), (960, 704), (704, 960), (1280, 704), (704, 1280))
FRAMES = (1, 121)
# Of rotary positions in time, height, width: 7B, and 14B, which is 5120 wide (ComfyUI's detection has the same).
ROPE_SCALE, ROPE_SCALE_WIDE, WIDE = (2.0, 1.0, 1.0), (2.0, 2.0, 2.0), 5120

BLOCK = [row("2.block.layer1", "ff.net.0.proj"), row("2.block.layer2", "ff.net.2")]
for _k in (0, 1):
    BLOCK += [row(f"{_k}.block.attn.to_{_x}.0", f"attn{_k + 1}.to_{_x}") for _x in "qkv"]
    BLOCK += [row(f"{_k}.block.attn.to_{_x}.1", f"attn{_k + 1}.norm_{_x}") for _x in "qk"]
    BLOCK.append(row(f"{_k}.block.attn.to_out.0", f"attn{_k + 1}.to_out.0"))
for _k in (0, 1, 2):
    BLOCK += [row(f"{_k}.adaLN_modulation.{_n}", f"norm{_k + 1}.linear_{_n}") for _n in (1, 2)]
COMFY = [
    row("x_embedder.proj.1", "patch_embed.proj"),
    row("extra_pos_embedder", "learnable_pos_embed"),
    row("t_embedder.1", "time_embed.t_embedder"),
    row("affline_norm", "time_embed.norm"),
    row("final_layer.linear", "proj_out"),
    row("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
    row("final_layer.adaLN_modulation.2", "norm_out.linear_2"),
    *block("blocks.block{i}.blocks", "transformer_blocks.{i}", *BLOCK),
]
BLOCKS = cosmos.BLOCKS
ADAPTED = ("blocks.",)  # all Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """Text-to-world models; those that continue videos take a channel more."""
    for layout, embedder, mark in (
        ("comfy", "x_embedder.proj.1.weight", "extra_pos_embedder.pos_emb_t"),
        ("diffusers", "patch_embed.proj.weight", "learnable_pos_embed.pos_emb_t"),
    ):
        if embedder in shapes and mark in shapes:
            return layout if shapes[embedder][1] // 4 % 4 == 1 else None
    return None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    ours = our_view(COMFY, shapes) if layout == "comfy" else shapes
    width, values = ours["patch_embed.proj.weight"]
    first = "transformer_blocks.0"
    head = ours[f"{first}.attn1.norm_q.weight"][0]
    times, rows, columns = (ours[f"learnable_pos_embed.pos_emb_{axis}"][0] for axis in "thw")
    return {
        "in_channels": values // 4,  # 2x2 patches; one channel says where a picture is padded
        "out_channels": ours["proj_out.weight"][0] // 4,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": count(ours, "transformer_blocks"),
        "mlp_ratio": ours[f"{first}.ff.net.0.proj.weight"][0] / width,
        "text_embed_dim": ours[f"{first}.attn2.to_k.weight"][1],
        "adaln_lora_dim": ours[f"{first}.norm1.linear_1.weight"][0],
        "max_size": (times, 2 * rows, 2 * columns),
        "patch_size": (1, 2, 2),
        "rope_scale": ROPE_SCALE_WIDE if width >= WIDE else ROPE_SCALE,
        "concat_padding_mask": False,  # the channel is counted above and added here: diffusers needs torchvision for it
        "extra_pos_embed_type": "learnable",
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from diffusers import CosmosTransformer3DModel

    return CosmosTransformer3DModel(**configuration)


DENOISER = Part(
    name="denoiser",
    title="a Cosmos 1.0 text-to-world denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": COMFY, "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=cosmos.PREFIXES,
    carried=("logvar.", "pos_embedder."),
    diffusers_folder="transformer",
    high_precision=cosmos.MODULATION,
)


def predict(
    denoiser: torch.nn.Module,
    noisy: Tensor,
    sigma: Tensor,
    conds: list[Cond],
    *,
    tokens: int = cosmos.TOKENS,
    frame_rate: float = FRAME_RATE,
) -> Tensor:
    """Velocity [B,C,F,h,w] float32. Conds: "text" [T,D], zero-padded to `tokens` without a mask.

    With D = c_skip * x + c_out * F the data that F means (Karras et al. 2022), velocity = (noisy - D) / sigma, written
    so that nothing cancels out.
    """
    dtype, data = denoiser.proj_out.weight.dtype, SIGMA_DATA**2
    sigma = sigma.float().clamp(SMALLEST / (1 + SMALLEST), LARGEST / (1 + LARGEST))
    level = sigma / (1 - sigma)  # EDM's sigma
    time, level = level.log() / 4, level.view(-1, 1, 1, 1, 1)
    scale = (level**2 + data).rsqrt()  # c_in
    video = cosmos.video_of((noisy.float() * (1 + level) * scale).to(dtype))
    text = ragged.pad([cond["text"].to(dtype) for cond in conds], tokens)
    out = denoiser(video, time, text, fps=frame_rate, return_dict=False)[0].float()
    return (1 + level) * (noisy.float() * (level - data) * scale**2 - SIGMA_DATA * scale * out)


def variant_of(options: Any) -> Family:
    """Other sizes and lengths, for those who ask for them."""
    if not getattr(options, "i_know_what_i_am_doing", False):
        return COSMOS
    return replace(COSMOS, sizes=(), frames=replace(COSMOS.frames, only=()))


FREE = Option("i_know_what_i_am_doing", "flag", False, "sizes and numbers of frames that the model was not made for")
COSMOS = Family(
    name="cosmos",
    title="Cosmos 1.0",
    denoiser=DENOISER,
    vae=vae_cosmos.part(),
    text_encoders=(t5.old(),),
    tokenize=cosmos.tokenize,
    encode=cosmos.encode,
    encode_image=vae_cosmos.encode,
    decode_latents=vae_cosmos.decode,
    predict=predict,
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=16,
    latent_channels=16,
    latent_downscale=8,
    # EDM's noise levels are drawn log-normal with mean 0 and deviation 1, as diffusion-pipe (the seed's system) does.
    defaults={"timestep_sampling": "sigmoid"},
    options=(FREE,),
    save_formats=("comfy", "kohya"),
    architecture="cosmos-1.0",
    base_model_version="cosmos",
    resolution=960,
    sizes=SIZES,
    frames=FrameRule(vae_cosmos.TIME, 1, FRAME_RATE, only=FRAMES),
    objective=edm(SMALLEST, LARGEST, SIGMA_DATA),
    variant_of=variant_of,
    inference_options=(FREE,),
    channels_of=lambda denoiser: denoiser.config.out_channels,
    # NVIDIA's 35 steps, and its guidance of 7, which it adds to the 1 that classifier-free guidance counts from.
    sampling={"sample_steps": 35, "scale": 8.0, "flow_shift": 1.0, "frame_count": 121},
    text_widths=lambda denoiser: (denoiser["text_embed_dim"],),
    released={"denoiser": "cosmos", "vae": "vae_cosmos", "t5xxl": "te_t5xxl_old"},
)
