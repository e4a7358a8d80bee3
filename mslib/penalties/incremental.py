"""Incremental regularization (IncReg): each filter's factor goes up or down by its rank.

Wang et al., "Structured pruning for efficient ConvNets via incremental regularization", 2018,
arXiv 1811.08390.
"""

import math
from typing import Any

import torch
from torch import nn

from ..pruning.graph import ChannelGraph
from ..pruning.scores import shared_scores
from .filters import Filters, Reduction


class Incremental(Filters):
    """½·Σ λ_i·‖W_i‖² where λ_i <- max(0, λ_i + Δ(r_i)) every `every` iterations.

    r_i, from 0, is the rank in its layer of the filter's rank by L1 norm, averaged over time. With
    n filters to go, α = ln(2/u)/n and s = -ln(u)/α, the released code has
        Δ(r) = A·e^(-αr) for r < s, else 2uA - A·e^(-α(2s - r)): A at first, 0 at r = n, then below.
    A filter whose λ reaches `ceiling` is zero for good. When n are, the other λ are 0.

    reduction: the share to go, for all layers or by module, as in `masks_for_ratio`.
    delta: A. u: how soon Δ falls, in (0, 1). A, ceiling and every are the released code's for
    VGG-16, made for 10,000 iterations and more: a short run needs a larger A. u = ¼, and filters of
    inner channels where that code takes columns, are ours.

    `masks` drops the n lowest of averaged rank; `factors` are the λ.
    Raises ValueError for settings out of range.
    """

    STATE = ("masks", "factors", "ranks", "updates")

    def __init__(
        self,
        model: nn.Module | ChannelGraph,
        example: Any = None,
        reduction: Reduction = 0.5,
        *,
        delta: float = 2.5e-4,
        u: float = 0.25,
        every: int = 1,
        ceiling: float = 2.5,
    ):
        settings = {"delta": delta, "u": u, "every": every, "ceiling": ceiling}
        super().__init__(model, example, reduction, settings)
        if u >= 1:
            raise ValueError(f"u={u}: how soon the change falls with the rank, below 1, such as ¼")
        self.factors, self.updates = {n: torch.zeros(len(w)) for n, w in self.weights.items()}, 0
        self.ranks = {name: torch.zeros(len(w)) for name, w in self.weights.items()}

    def change(self, left: int, wanted: int) -> torch.Tensor:
        """Δ for each rank, float [left], where `wanted` of those `left` are to go."""
        delta, u = self.settings["delta"], self.settings["u"]
        alpha = math.log(2 / u) / wanted
        s, r = -math.log(u) / alpha, torch.arange(left)
        low = 2 * u * delta - delta * torch.exp(alpha * (r - 2 * s))
        return torch.where(r < s, delta * torch.exp(-alpha * r), low)

    @torch.no_grad()
    def step(self, iteration: int) -> None:
        """Let the factors change, every `every` iterations; called before each iteration."""
        if iteration % self.settings["every"]:
            return
        self.updates += 1
        for name, size in shared_scores(self.graph, self.sizes()).items():
            gone = self.factors[name] >= self.settings["ceiling"]
            rank = size.masked_fill(gone, -1).argsort(stable=True).argsort().float()
            average = self.ranks[name] + (rank - self.ranks[name]) / self.updates
            self.ranks[name] = average.masked_fill(gone, -1)
        self.masks = self.smallest(self.ranks)
        for name, keep in self.masks.items():
            factor = self.factors[name]
            gone = factor >= self.settings["ceiling"]
            wanted = int((~keep).sum() - gone.sum())
            order = self.ranks[name].argsort(stable=True)[int(gone.sum()) :]
            if wanted > 0:
                factor[order] += self.change(len(order), wanted)
                factor.clamp_(0, self.settings["ceiling"])
            else:
                factor[order] = 0

    def __call__(self) -> torch.Tensor:
        total = super().__call__()
        for name, w in self.weights.items():
            total = total + (self.factors[name].to(w.device) * w.flatten(1).square().sum(1)).sum()
        return total / 2

    @torch.no_grad()
    def proximal_step(self, lr: float) -> None:
        for name, w in self.weights.items():
            gone = self.factors[name] >= self.settings["ceiling"]
            if gone.any():
                w[gone.to(w.device)] = 0
