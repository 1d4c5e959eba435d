"""Toy dimensions of the autoencoders that are no plain LDM autoencoder, with the channels of the published ones.

Each is (configuration that `Part.build` takes, header metadata that its file needs), as in tools/toy_parts.py.
"""

from __future__ import annotations

from typing import Any

Made = tuple[dict[str, Any], dict[str, str]]  # configuration, header metadata


def flux2(channels: int = 32) -> Made:
    """Latents of 4 x `channels`."""
    return {
        "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16, 16, 16), "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": channels, "norm_num_groups": 4, "batch_norm_eps": 1e-4, "patch_size": (2, 2),
    }, {"norm_num_groups": "4"}  # fmt: skip


def wan21() -> Made:
    """Of Wan 2.1, Qwen-Image, Cosmos-Predict2 and Anima."""
    from library.components.vae_wan import STATISTICS

    mean, deviation = STATISTICS[16]
    return {
        "base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1,
        "latents_mean": list(mean), "latents_std": list(deviation),
    }, {}  # fmt: skip


def wan22() -> Made:
    from library.components.vae_wan import STATISTICS

    mean, deviation = STATISTICS[48]
    return {
        "base_dim": 8, "decoder_base_dim": 8, "z_dim": 48, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1,
        "latents_mean": list(mean), "latents_std": list(deviation), "is_residual": True, "in_channels": 12,
        "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
    }, {}  # fmt: skip


def hunyuan_video() -> Made:
    return {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}, {
        "norm_num_groups": "4"
    }


def hunyuan_video_15() -> Made:
    return {"block_out_channels": (8, 8, 16, 64, 64), "layers_per_block": 1}, {}


def ltx_video(channels: int = 128) -> Made:
    """As 0.9.1: the decoder is told a time and draws noise."""
    return {
        "latent_channels": channels, "block_out_channels": (4, 8, 16, 16), "layers_per_block": (1,) * 5,
        "decoder_block_out_channels": (8, 16, 32), "decoder_layers_per_block": (1,) * 4,
        "decoder_spatio_temporal_scaling": (True,) * 3, "decoder_inject_noise": (True, True, True, False),
        "upsample_residual": (True,) * 3, "upsample_factor": (2,) * 3, "timestep_conditioning": True,
    }, {}  # fmt: skip


def cosmos() -> Made:
    return {
        "encoder_block_out_channels": (4, 8, 16, 16), "decode_block_out_channels": (8, 16, 16, 16), "num_layers": 1,
        "statistics": 256,
    }, {}  # fmt: skip
