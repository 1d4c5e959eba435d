"""AdamW8bitKahan: bitsandbytes' 8-bit AdamW for weights in half precision that still learn from small steps.

A bf16 weight of 1 swallows every update below 2^-9. Here what rounding takes from a weight is kept in a tensor of the
same format and goes into the next update (Kahan summation): weight + correction has about the precision of 16 bits of
mantissa, for two more bytes a weight. float32 weights need none and are updated by AdamW8bit itself.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit


class AdamW8bitKahan(AdamW8bit):
    """bitsandbytes' AdamW8bit and its arguments; a half-precision weight has "correction" in its state."""

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        if p.dtype not in (torch.bfloat16, torch.float16):
            super().update_step(group, p, gindex, pindex)
            return
        correction = self.state[p].setdefault("correction", torch.zeros_like(p))
        if correction.device != p.device:
            correction = self.state[p]["correction"] = correction.to(p.device)
        decay = group["lr"] * group["weight_decay"]
        if decay:
            correction.add_(p, alpha=-decay)
        weight, p.data = p.data, correction
        try:  # the update of bitsandbytes goes into the small number, where it survives
            super().update_step({**group, "weight_decay": 0.0}, p, gindex, pindex)
        finally:
            correction, p.data = p.data, weight
        before = weight.clone()
        weight.add_(correction)
        self.state[p]["correction"] = correction.sub_(weight - before)
