"""Iterative soft shrinkage (ISS-P): what is unimportant shrinks a little at every step.

Wang et al., ICCV 2023, arXiv 2303.09650, for super-resolution.
"""

from typing import Any

import torch
from torch import nn

from ..pruning.graph import ChannelGraph
from .filters import Filters, Reduction


class SoftShrinkage(Filters):
    """No penalty: after each step W_i <- (1 - α)·W_i for the smallest of each layer by L1 norm.

    The choice is made anew on the way, so that what grows again in time is left alone.
    reduction: the share that shrinks, for all layers or by module, as in `masks_for_ratio`.
    rate: α; 0.05 is the released code's (its factor 0.95).
    every: iterations between two choices; 1 in the paper, more save time.
    unstructured: single weights as in the paper; whole filters, inner channels only, are ours.

    `masks` is the choice. What shrank is small but not zero: cut it by `masks`.
    Raises ValueError for settings out of range.
    """

    def __init__(
        self,
        model: nn.Module | ChannelGraph,
        example: Any = None,
        reduction: Reduction = 0.5,
        *,
        rate: float = 0.05,
        every: int = 1,
        unstructured: bool = False,
    ):
        if isinstance(rate, (int, float)) and rate > 1:
            raise ValueError(f"rate={rate}: the part that goes at a step, at most 1, such as 0.05")
        settings = {"rate": rate, "every": every}
        super().__init__(model, example, reduction, settings, unstructured=unstructured)

    @torch.no_grad()
    def proximal_step(self, lr: float) -> None:
        if self.iteration % self.settings["every"] == 0:
            self.masks = self.smallest(self.sizes())
        for name, weight in self.weights.items():
            weight *= torch.where(self.kept(name), 1.0, 1 - self.settings["rate"])
