"""A window into the step: one batch with everything that went in and came out, for checking against another program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library import checkpoints

if TYPE_CHECKING:
    from library.batches import Batch
    from library.families.family import Cond, Family

CONVENTIONS = {
    "noisy": "(1 - sigma) * latents + sigma * noise (+ sigma * gamma * perturbation with --ip_noise_gamma)",
    "sigma": "[B] in 0..1, 0 = data",
    "velocity_pred": "what the denoiser says of noise - latents, in latent layout",
    "target": "noise - latents",
    "loss": "[B], weighted and masked as in training, before the mean over the batch",
    "cond": "cond.<name> [B,T,...] padded with zeros at the end; cond.<name>.mask [B,T] is 1 where a token is real",
}


def dump_batch(
    path: Path,
    family: Family,
    batch: Batch,
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    noisy: Tensor,
    velocity_pred: Tensor,
    target: Tensor,
    loss: Tensor,
    conds: list[Cond],
) -> None:
    """Write the tensors of one training step, float32, unpacked in latent layout, with file names and captions."""
    tensors = {
        "latents": latents,
        "noise": noise,
        "sigma": sigma,
        "noisy": noisy,
        "velocity_pred": velocity_pred,
        "target": target,
        "loss": loss,
    } | padded(conds)
    if batch.mask is not None:
        tensors["mask"] = batch.mask
    metadata = {
        "format": "pt",
        "family": family.name,
        "files": json.dumps([item.path.name for item in batch.items], ensure_ascii=False),
        "captions": json.dumps(batch.captions, ensure_ascii=False),
        "conventions": json.dumps(CONVENTIONS),
    }
    checkpoints.save({k: v.detach().float().cpu().contiguous() for k, v in tensors.items()}, path, metadata)


def padded(conds: list[Cond]) -> dict[str, Tensor]:
    """Ragged conditioning as padded tensors with masks; values without a token axis are stacked."""
    out = {}
    for name in dict.fromkeys(name for cond in conds for name in cond):
        given = next(cond[name] for cond in conds if name in cond)
        values = [cond.get(name, given[:0] if given.ndim else given * 0) for cond in conds]
        if values[0].ndim < 2:
            out[f"cond.{name}"] = torch.stack(values)
            continue
        out[f"cond.{name}"] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        lengths = torch.tensor([len(value) for value in values])
        out[f"cond.{name}.mask"] = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).float()
    return out
