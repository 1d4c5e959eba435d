"""All text and image encoders in one table, so that any file of one can be named: (kind, family, part)."""

from __future__ import annotations

from library.components import clip, gemma2, llama3, llava, mistral, qwen3, qwen25_vl, t5, vision
from library.families.family import Part

# `family` is what the encoder itself is called, whichever models use it. Small files of unpublished sizes, which more
# than one part takes, are named by the first.
ENCODERS: tuple[tuple[str, str, Part], ...] = (
    ("text_encoder", "clip_l", clip.large()),
    ("text_encoder", "clip_g", clip.big()),
    ("text_encoder", "clip_h", clip.huge()),
    ("text_encoder", "t5xxl", t5.xxl()),
    ("text_encoder", "t5xxl_old", t5.old()),
    ("text_encoder", "umt5xxl", t5.umt5()),
    ("text_encoder", "pile_t5xl", t5.pile()),
    ("text_encoder", "byt5", t5.byt5()),
    ("text_encoder", "qwen2.5-vl", qwen25_vl.part()),
    ("text_encoder", "qwen3", qwen3.part("a Qwen3 text encoder", "Qwen/Qwen3-4B")),
    ("text_encoder", "gemma2", gemma2.part()),
    ("text_encoder", "llama3", llama3.llava("a Llama 3 text encoder")),
    ("text_encoder", "mistral", mistral.part()),
    ("image_encoder", "llava_vision", llava.tower()),
    ("image_encoder", "clip_vision", vision.clip_h()),
    ("image_encoder", "siglip_vision", vision.siglip()),
)
