"""Dependency-aware pruning: γ counts with the weights that read it, and λ is steered.

Zhao et al., "Dependency aware filter pruning", 2020, arXiv 2005.02634.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..pruning.graph import ChannelGraph
from ..pruning.scores import Scores
from .filters import Filters


class DependencyL1(Filters):
    """λ·Σ_i S_i with S_i = |γ_i|·Σ|W|, summed over the weights W that read channel i.

    Every `every` iterations P is the share of channels with S_i < threshold · (largest of a layer):
        λ <- max(0, λ - delta)   if P > share;
        λ <- λ + delta           if P grew by less than (share - P before) / (updates left).
    share: wanted of the prunable inner channels, all layers together. over: iterations until then.
    strength: λ, to begin with. `history`: [iteration, P, λ] of each update. `masks` keeps what is
    not below the threshold; `sizes()` are the S_i, scores for `masks_for_macs`.

    Only the paper's abstract could be checked: importance that includes the next layer, and a
    strength steered toward the wanted sparsity. L1 of this product, the rule for λ and all settings
    are ours. Raises ValueError for settings out of range.
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
    def gammas(self) -> dict[str, Any]:
        """BatchNorm -> its γ, and the roots of its channels."""
        found = {n: (self.graph.modules[n].weight, self.graph.norms[n]) for n in self.weights}
        return {name: (gamma, self.graph.root[ids]) for name, (gamma, ids) in found.items()}

    @cached_property
    def readers(self) -> list[tuple[Any, torch.Tensor]]:
        """The layers that read these channels, with the roots of what they read."""
        chosen = torch.cat([roots for _, roots in self.gammas.values()])
        layers, root = self.graph.modules, self.graph.root
        read = [(layers[n], root[ids]) for n, ids in self.graph.inputs.items() if n in layers]
        return [(layer, roots) for layer, roots in read if torch.isin(roots, chosen).any()]

    def importance(self) -> Scores:
        """S of each channel by the name of its BatchNorm, with its gradient."""
        total = self.readers[0][0].weight.new_zeros(len(self.graph.root))
        for layer, roots in self.readers:
            total = total.index_add(0, roots.to(total.device), _read(layer))
        return {n: gamma.abs() * total[r.to(total.device)] for n, (gamma, r) in self.gammas.items()}

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
        yield from (gamma for gamma, _ in self.gammas.values())
        yield from (layer.weight for layer, _ in self.readers)


def _read(layer: Any) -> torch.Tensor:
    """Σ|W| over all that a layer multiplies each channel read by: float [channels read]."""
    size = layer.weight.abs().flatten(2).sum(2) if layer.weight.ndim > 2 else layer.weight.abs()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # [in, out / groups, …]
        return size.sum(1)
    groups = getattr(layer, "groups", 1)  # [out, in / groups, …]
    return size.reshape(groups, -1, size.shape[1]).sum(1).flatten()
