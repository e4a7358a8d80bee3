"""Dependency-aware pruning: γ counts with the weights that read it, and λ is steered.

Zhao et al., "Dependency aware filter pruning", 2020, arXiv 2005.02634.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..pruning.graph import ChannelGraph
from ..pruning.groups import short
from ..pruning.scores import Scores, by_channel_read
from .filters import Filters


class DependencyL1(Filters):
    """λ·Σ_i S_i with S_i = |γ_i|·Σ|W| over the weights W that read i, and what goes with it.

    Every `every` iterations P is the share of channels with S_i < threshold · (largest of a layer):
        λ <- max(0, λ - delta)   if P > share;
        λ <- λ + delta           if P grew by less than (share - P before) / (updates left).
    share: wanted of all prunable inner channels. over: iterations until then. strength: λ at first.
    `history`: [iteration, P, λ] of each update. `masks` keeps what is not below the threshold;
    `sizes()` are the S_i, scores for `masks_for_macs`. Of the paper only the abstract was checked:
    importance that includes the next layer, strength steered toward the wanted sparsity. L1 of the
    product, the rule for λ and all settings are ours. Raises ValueError for settings out of range.
    """

    STATE = ("masks", "strength", "history")

    def __init__(
        self,
        model: nn.Module | ChannelGraph,
        example: Any = None,
        share: float = 0.5,
        *,
        over: int,
        every: int = 10,
        strength: float = 0.0,
        delta: float = 1e-5,
        threshold: float = 0.01,
    ):
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength={strength}: λ to begin with, 0 or above, for example 0")
        settings = {"over": over, "every": every, "delta": delta, "threshold": threshold}
        super().__init__(model, example, share, settings)
        self.strength, self.share = float(strength), float(share)
        self.history: list[list[float]] = []

    @cached_property
    def readers(self) -> list[tuple[str, torch.Tensor]]:
        """The layers that read these channels, with the roots of what they read."""
        root = self.graph.root
        chosen = root[torch.cat([self.graph.norms[name] for name in self.weights])]
        read = [(name, root[ids]) for name, ids in self.graph.inputs.items()]
        found = [(layer, roots) for layer, roots in read if torch.isin(roots, chosen).any()]
        if not found:
            names = short([*self.weights])
            raise ValueError(f"no layer reads the channels of {names}: for |γ| alone, ms.GlobalL1")
        return found

    def importance(self) -> Scores:
        """S of each channel by the name of its BatchNorm, with its gradient."""
        graph, first = self.graph, self.graph.weight(self.readers[0][0])[1]
        total = first.new_zeros(len(graph.root))
        for layer, roots in self.readers:
            read = by_channel_read(graph, layer, graph.weight(layer)[1].abs())
            total = total.index_add(0, roots.to(total.device), read)
        roots = {name: graph.root[graph.norms[name]].to(total.device) for name in self.weights}
        return {name: graph.modules[name].weight.abs() * total[r] for name, r in roots.items()}

    @torch.no_grad()
    def sizes(self) -> Scores:
        return {name: s.float().cpu() for name, s in self.importance().items()}

    def __call__(self) -> torch.Tensor:
        return self.strength * torch.cat(list(self.importance().values())).sum()

    def step(self, iteration: int) -> None:
        """Steer λ, every `every` iterations; called before each iteration."""
        s = self.settings
        if iteration % s["every"]:
            return
        self.masks = {n: x >= s["threshold"] * x.max() for n, x in self.sizes().items()}
        now = 1 - float(torch.cat(list(self.masks.values())).float().mean())
        if self.history:
            before, left = self.history[-1][1], max(1, 1 + (s["over"] - iteration) // s["every"])
            if now > self.share:
                self.strength = max(0.0, self.strength - s["delta"])
            elif now - before < (self.share - before) / left:
                self.strength += s["delta"]
        self.history.append([iteration, now, self.strength])

    def parameters(self) -> Iterable[torch.Tensor]:
        scaled = [self.graph.modules[name].weight for name in self.weights]
        return scaled + [self.graph.weight(layer)[1] for layer, _ in self.readers]
