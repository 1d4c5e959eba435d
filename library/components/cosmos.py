"""NVIDIA's Cosmos-Predict2 transformer, which Anima shares: its names, its sizes, what it is given; Cosmos' text.

Facts: plain flow time in 0..1 without a factor, noise - x0 is returned, text is zero-padded to 512 tokens without a
mask, and one channel more says where a picture is padded: nowhere, here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components.tokenizers import ended
from library.layout import Row, Shape, block, count, row
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.families.family import Cond, Text

TOKENS = 512
# Of rotary positions in time, height, width: NVIDIA's text-to-image models (ComfyUI's detection has the same numbers).
ROPE_SCALE = (1.0, 4.0, 4.0)
MAX_SIZE = (128, 240, 240)  # frames and latent rows and columns of positions

BLOCK = [row("mlp.layer1", "ff.net.0.proj"), row("mlp.layer2", "ff.net.2")]
for _theirs, _ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    for _a, _b in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("output_proj", "to_out.0")):
        BLOCK.append(row(f"{_theirs}.{_a}", f"{_ours}.{_b}"))
    BLOCK += [row(f"{_theirs}.{_a}_norm", f"{_ours}.norm_{_a}") for _a in "qk"]
for _theirs, _ours in (("self_attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3")):
    BLOCK += [row(f"adaln_modulation_{_theirs}.{_n}", f"{_ours}.linear_{_n}") for _n in (1, 2)]
ROWS: list[Row] = [
    row("x_embedder.proj.1", "patch_embed.proj"),
    row("t_embedder.1", "time_embed.t_embedder"),
    row("t_embedding_norm", "time_embed.norm"),
    row("final_layer.linear", "proj_out"),
    row("final_layer.adaln_modulation.1", "norm_out.linear_1"),
    row("final_layer.adaln_modulation.2", "norm_out.linear_2"),
    *block("blocks.{i}", "transformer_blocks.{i}", *BLOCK),
]
CARRIED = (  # counters and tables in NVIDIA's files
    "accum_video_sample_counter", "accum_image_sample_counter", "accum_iteration", "accum_train_in_hours",
    "pos_embedder.", "._extra_state",
)  # fmt: skip
BLOCKS = ("transformer_blocks",)
# In names of every layout; of Cosmos 1.0 too.
MODULATION = ("adaln_modulation", "adaLN_modulation", "norm1.linear_", "norm2.linear_", "norm3.linear_")
# Options for parts of the blocks -> what original names of those have in them.
RATES = (
    ("self_attn_lr", ".self_attn."),
    ("cross_attn_lr", ".cross_attn."),
    ("mlp_lr", ".mlp."),
    ("mod_lr", ".adaln_modulation"),
)
PREFIXES = ("net.", "", "model.diffusion_model.", "diffusion_model.")


def rate_options() -> tuple[Option, ...]:
    titles = ("self attention", "cross attention", "the MLPs", "the modulation")
    return tuple(
        Option(name, "float", None, f"learning rate of {title}, 0 = not trained; the general one if not set", low=0)
        for (name, _), title in zip(RATES, titles, strict=True)
    )


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """Layout of a text-to-image model of this kind; those that continue videos take a channel more."""
    for layout, embedder, mark in (
        ("comfy", "x_embedder.proj.1.weight", "blocks.0.adaln_modulation_mlp.1.weight"),
        ("diffusers", "patch_embed.proj.weight", "transformer_blocks.0.norm3.linear_1.weight"),
    ):
        if embedder in shapes and mark in shapes and "learnable_pos_embed.pos_emb_t" not in shapes:
            return layout if shapes[embedder][1] // 4 % 4 == 1 else None
    return None


def config(shapes: Mapping[str, Shape], layout: str) -> dict[str, Any]:
    def size(comfy: str, ours: str) -> Shape:
        return shapes[f"{comfy if layout == 'comfy' else ours}.weight"]

    first, ours = "blocks.0", "transformer_blocks.0"
    width, values = size("x_embedder.proj.1", "patch_embed.proj")
    head = size(f"{first}.self_attn.q_norm", f"{ours}.attn1.norm_q")[0]
    return {
        "in_channels": values // 4,  # 2x2 patches
        "out_channels": size("final_layer.linear", "proj_out")[0] // 4,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": count(shapes, "blocks" if layout == "comfy" else "transformer_blocks"),
        "mlp_ratio": size(f"{first}.mlp.layer1", f"{ours}.ff.net.0.proj")[0] / width,
        "text_embed_dim": size(f"{first}.cross_attn.k_proj", f"{ours}.attn2.to_k")[1],
        "adaln_lora_dim": size(f"{first}.adaln_modulation_mlp.1", f"{ours}.norm3.linear_1")[0],
        "max_size": MAX_SIZE,
        "patch_size": (1, 2, 2),
        "rope_scale": ROPE_SCALE,
        "concat_padding_mask": False,  # the channel is counted above and added here: diffusers needs torchvision for it
        "extra_pos_embed_type": None,
    }


def tokenize(tokenizers: list[Any], caption: str) -> tuple[list[int], str]:
    """T5's ids of the caption and its end token, at most 512, and the end of the caption that did not fit."""
    return ended(tokenizers[0], caption, TOKENS)


def encode(encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any) -> Cond:
    """{"text": [T,D]}: T5's last states, unpadded."""
    import torch

    from library.components import t5

    ids, _ = tokenize(tokenizers, text.caption)
    return {"text": t5.states(encoders[0], torch.tensor([ids], device=device))[0]}


def video_of(noisy: Tensor) -> Tensor:
    """Pictures [B,C,h,w] as one-frame videos, or videos [B,C,F,h,w], and a channel that says: nothing is padded."""
    import torch

    video = noisy.unsqueeze(2) if noisy.ndim == 4 else noisy
    return torch.cat([video, torch.zeros_like(video[:, :1])], 1)
