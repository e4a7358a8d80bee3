"""Soft filter pruning: the smallest filters are set to zero, again and again, and may come back.

He et al., IJCAI 2018. Asymptotic: He et al., arXiv 1808.07471.
"""

import math
from typing import Any

import torch
from torch import nn

from ..pruning.graph import ChannelGraph
from .filters import Filters, Reduction

RATE = -8 * math.log(0.2500114)  # k: with it 3/4 of the share is reached at t = 1/8


class SoftFilter(Filters):
    """No penalty: W_i <- 0 for the ⌈P · filters⌉ of smallest ‖W_i‖₂ in each layer, now and then.

    They are trained on like the others, so that each time others may be the smallest.
    reduction: P, for all layers or by module, as in `masks_for_ratio`; 0.1 to 0.3 were published.
    every: iterations between two times; published is an epoch: images / batch size, rounded up.
    over: asymptotic, the iterations in which the share grows to P: P·(1 - e^(-kt)) / (1 - e^(-k))
        with t = iteration / over, and k such that 3/4 of P is reached at t = 1/8. None: P at once.

    `masks` says which are zero. Inner channels only, and ⌈…⌉ where the released code rounds down,
    as in the rest of the library (ours); the released code also begins with zeros.
    Raises ValueError for settings out of range.
    """

    norm = 2

    def __init__(
        self,
        model: nn.Module | ChannelGraph,
        example: Any = None,
        reduction: Reduction = 0.3,
        *,
        every: int,
        over: int | None = None,
    ):
        grows: dict[str, float] = {} if over is None else {"over": over}
        super().__init__(model, example, reduction, {"every": every} | grows)

    def grown(self) -> float:
        """The part of the full share that is due after this iteration."""
        t = min(1.0, (self.iteration + 1) / self.settings.get("over", 1))
        return math.expm1(-RATE * t) / math.expm1(-RATE)

    @torch.no_grad()
    def proximal_step(self, lr: float) -> None:
        if (self.iteration + 1) % self.settings["every"]:
            return
        self.masks = self.smallest(self.sizes(), self.grown())
        for name, weight in self.weights.items():
            weight *= self.kept(name)
