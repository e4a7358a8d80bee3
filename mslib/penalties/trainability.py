"""Trainability-preserving pruning (TPP): what goes is decorrelated from what stays.

Wang & Fu, ICLR 2023, arXiv 2207.12534.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..pruning.graph import ChannelGraph
from ..pruning.masks import Masks
from .filters import Filters


class Trainability(Filters):
    """r·Σ_layers [ g·mean((WWᵀ ⊙ (1 - m mᵀ))²) + ½·Σ_dropped (‖W_i‖² + γ_i² + β_i²) ].

    m is 1 where a filter is kept: every entry of the Gram matrix WWᵀ that involves a dropped
    filter is driven to zero (equation 3 of the paper), so are γ and β behind it (equation 5).
    masks: dict[BatchNorm name -> BoolTensor[channels]], True = keep; in the paper those of smallest
        L1 norm, as `masks_for_ratio` makes of `filter_norms`.
    gram: g. delta, every, ceiling: r = min(ceiling, delta · ⌊iteration / every⌋), as in growing
        regularization, on top of whose ‖W_i‖² the released code works.
    The defaults are the released ones for ImageNet, made for 50,000 iterations: a short run needs a
    larger delta. The mean over the N² entries is the released code's; in the paper it is a sum.
    Not here: the released code at last sets layer after layer to zero; `prune` does so at once.

    Raises ValueError for settings out of range, or masks that do not fit or drop nothing.
    """

    STATE = ("masks", "factor")

    def __init__(
        self,
        model: nn.Module | ChannelGraph,
        example: Any = None,
        masks: Masks | None = None,
        *,
        gram: float = 1000.0,
        delta: float = 1e-4,
        every: int = 5,
        ceiling: float = 1.0,
    ):
        if masks is None:
            raise ValueError("masks=None: give what is to go, such as ms.masks_for_ratio makes")
        settings: dict[str, float] = dict(gram=gram, delta=delta, every=every, ceiling=ceiling)
        super().__init__(model, example, None, settings, masks)
        self.factor = 0.0
        self.norms: dict[str, Any] = {name: self.graph.modules[name] for name in masks}

    def step(self, iteration: int) -> None:
        s = self.settings
        self.factor = min(s["ceiling"], s["delta"] * (iteration // s["every"]))

    def __call__(self) -> torch.Tensor:
        total = super().__call__()
        for name, weight in self.weights.items():
            w, keep = weight.flatten(1), self.kept(name).flatten()
            gone = ~keep
            rows = w @ w.T * ~(keep[:, None] & keep)  # [filters, filters], 0 where both are kept
            norm = self.norms[name]
            own = w[gone].square().sum() + norm.weight[gone].square().sum()
            own = own + norm.bias[gone].square().sum()
            total = total + self.settings["gram"] * rows.square().mean() + own / 2
        return self.factor * total

    def parameters(self) -> Iterable[torch.Tensor]:
        yield from self.weights.values()
        for norm in self.norms.values():
            yield from (norm.weight, norm.bias)
