"""Anima: Cosmos-Predict2's transformer and, in one module and one file with it, the adapter that makes its text."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
from torch import Tensor

from library.components import ragged


class Anima(CosmosTransformer3DModel):
    def __init__(self, adapter: dict[str, object] | None = None, **configuration: object) -> None:
        super().__init__(**configuration)
        self.llm_adapter = AnimaTextConditioner(**(adapter or {}))

    def forward(self, video: Tensor, time: Tensor, states: Sequence[Tensor], ids: Sequence[Tensor]) -> Tensor:
        """[B,C+1,F,h,w] (the last channel 0), time [B] float32 in 0..1, Qwen3 states [T_i,D], T5 token ids [M_i].

        Returns noise - data. The ids are the adapter's queries; what it makes of them is zero-padded to 512 tokens.
        """
        text = self.llm_adapter(ragged.pad(states), ragged.pad(ids), ragged.mask(ids), ragged.mask(states))
        return super().forward(video, time, text, return_dict=False)[0]
