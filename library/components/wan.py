"""The denoisers of Wan 2.1 and 2.2: video transformers with cross attention to UMT5 states; what conditions them.

Facts: the model is given sigma * 1000 and returns noise - x0. Latents are [B,C,F,h,w], patches 1x2x2. It has no text
mask: captions are zero-padded to 512 tokens. Image-to-video models of 16 channels take 20 more (4 of mask, 1 = given
frame, and 16 of latents), those of 2.1 also the states of a CLIP ViT-H; 2.2 5B takes a time per token instead, 0 for
given frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components import frames, ragged, vae_wan, vision
from library.families.family import Cond, ItemInput, Part
from library.layout import Shape, block, count, identity, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The width of a head in every published size. No shape shows it, so files of other sizes say in their header
# metadata how many heads they have.
HEAD, HEADS_KEY = 128, "num_attention_heads"
TOKENS = 512  # of text, of Wan's own code and fixed in diffusers' image-to-video attention

BLOCK = [
    row("modulation", "scale_shift_table"),
    row("norm3", "norm2"),  # norm1 and norm2 of the original have no weights
    row("ffn.0", "ffn.net.0.proj"),
    row("ffn.2", "ffn.net.2"),
]
for _theirs, _ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    for _a, _b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
        BLOCK.append(row(f"{_theirs}.{_a}", f"{_ours}.{_b}"))
    BLOCK += [row(f"{_theirs}.{_name}", f"{_ours}.{_name}") for _name in ("norm_q", "norm_k")]
BLOCK += [  # only 2.1 image-to-video
    row("cross_attn.k_img", "attn2.add_k_proj"),
    row("cross_attn.v_img", "attn2.add_v_proj"),
    row("cross_attn.norm_k_img", "attn2.norm_added_k"),
]
IMAGE = "condition_embedder.image_embedder"
COMFY = [
    row("patch_embedding"),
    row("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    row("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    row("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    row("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    row("time_projection.1", "condition_embedder.time_proj"),
    row("img_emb.proj.0", f"{IMAGE}.norm1"),
    row("img_emb.proj.1", f"{IMAGE}.ff.net.0.proj"),
    row("img_emb.proj.3", f"{IMAGE}.ff.net.2"),
    row("img_emb.proj.4", f"{IMAGE}.norm2"),
    row("img_emb.emb_pos", f"{IMAGE}.pos_embed"),  # only first-and-last-frame models
    row("head.head", "proj_out"),
    row("head.modulation", "scale_shift_table"),
    *block("blocks.{i}", "blocks.{i}", *BLOCK),
]
BLOCKS = ("blocks",)
ADAPTED = ("blocks.",)  # all Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    if len(shapes.get("patch_embedding.weight", ())) != 5:
        return None
    if "blocks.0.self_attn.norm_q.weight" in shapes and "time_projection.1.weight" in shapes:
        return "comfy"
    return "diffusers" if "condition_embedder.time_proj.weight" in shapes else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    def size(comfy: str, ours: str, default: Shape = ()) -> Shape:
        key = comfy if layout == "comfy" else ours
        return shapes.get(key, default) if default else shapes[key]

    width, channels, *patch = shapes["patch_embedding.weight"]
    heads = int(metadata.get(HEADS_KEY) or width // HEAD)
    image = size("img_emb.proj.0.weight", f"{IMAGE}.norm1.weight", (0,))[0]
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": size("head.head.weight", "proj_out.weight")[0] // (patch[0] * patch[1] * patch[2]),
        "text_dim": size("text_embedding.0.weight", "condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": size("time_embedding.0.weight", "condition_embedder.time_embedder.linear_1.weight")[1],
        "ffn_dim": size("blocks.0.ffn.0.weight", "blocks.0.ffn.net.0.proj.weight")[0],
        "num_layers": count(shapes, "blocks"),
        "image_dim": image or None,
        "added_kv_proj_dim": width if image else None,
        "pos_embed_seq_len": size("img_emb.emb_pos", f"{IMAGE}.pos_embed", (0, 0))[1] or None,
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**configuration)


def finish(model: torch.nn.Module, device: Any) -> None:
    """The rotary tables, which no file holds."""
    import torch

    rope, config = model.rope, model.config
    with torch.device(device):
        model.rope = type(rope)(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)


DENOISER = Part(
    name="denoiser",
    title="a Wan denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": COMFY, "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model."),
    diffusers_folder="transformer",
    finish=finish,
)


def predict(
    denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond], *, tokens: int = TOKENS
) -> Tensor:
    """Velocity [B,C,F,h,w] float32.

    Conds: "text" [T,D]; "image_latents" [20,F,h,w] and, for 2.1, "clip" [257,1280] (514 with a last frame) of
    image-to-video models; "first_frame" [C,1,h,w] of 2.2 5B. `tokens` is what the text is padded to.
    """
    import torch

    dtype = denoiser.patch_embedding.weight.dtype
    video, sigma = frames.with_first_frames(noisy, sigma, conds)
    if sigma.ndim == 2:  # a time per frame -> per token
        _, high, wide = denoiser.config.patch_size
        sigma = sigma.repeat_interleave((noisy.shape[-2] // high) * (noisy.shape[-1] // wide), 1)
    if "image_latents" in conds[0]:
        video = torch.cat([video, torch.stack([cond["image_latents"] for cond in conds]).to(video.dtype)], 1)
    clip = torch.stack([cond["clip"] for cond in conds]).to(dtype) if "clip" in conds[0] else None
    if clip is not None and denoiser.config.pos_embed_seq_len:
        clip = clip.unflatten(1, (2, -1)).flatten(0, 1)  # diffusers wants first and last frame as items of the batch
    return denoiser(
        video.to(dtype),
        sigma * 1000,
        ragged.pad([cond["text"].to(dtype) for cond in conds], tokens),
        clip,
        return_dict=False,
    )[0].float()


def predict_by_two(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """`predict` by the expert of these noise levels; a plan of memory has a denoiser with one set of weights."""
    if experts := getattr(denoiser, "experts", None):
        experts.use_for(sigma)
    return predict(denoiser, noisy, sigma, conds)


def continued(vae: torch.nn.Module, image_encoders: list[torch.nn.Module], given: ItemInput, *, chunk: int = 0) -> Cond:
    """What image-to-video models get of a clip's first frame: "image_latents" [20,F,h,w], four channels of mask (1 in
    the first latent frame) before the latents of that frame followed by grey; with an image encoder also "clip"
    [257,1280].
    """
    import torch

    first = given.pixels[:, :1]
    grey = first.new_zeros(()).expand(3, given.frames - 1, *first.shape[2:])
    latents = vae_wan.encode(vae, torch.cat([first, grey], 1)[None], chunk)[0]
    mask = torch.zeros_like(latents[:4])
    mask[:, 0] = 1
    cond = {"image_latents": torch.cat([mask, latents])}
    if image_encoders:
        # Squeezed to a square without antialiasing, as in Wan's own code and ComfyUI's workflow for it.
        seen = vision.prepare(image_encoders[0], first.movedim(1, 0), crop=False, antialias=False)
        cond["clip"] = vision.states(image_encoders[0], seen, -2)[0].float()
    return cond


def begun(vae: torch.nn.Module, image_encoders: list[torch.nn.Module], given: ItemInput, *, chunk: int = 0) -> Cond:
    return frames.begun(lambda pixels: vae_wan.encode(vae, pixels, chunk), given)
