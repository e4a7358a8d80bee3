"""Penalties on γ, the scale of each BatchNorm channel: Network Slimming and MaskSparsity."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..files import digest
from ..networks import batch_norms
from ..pruning.graph import ChannelGraph, as_graph
from ..pruning.masks import Masks, check_shapes
from ..pruning.scores import gammas
from ..training.schedules import MOMENTUM, learning_rates
from .base import Penalty


class _GammaL1(Penalty):
    """λ·Σ|γ| over chosen channels: by its subgradient λ·sign(γ), or by soft-thresholding."""

    def __init__(self, model, chosen, strength, proximal):
        """`chosen`: dict[BatchNorm name -> BoolTensor[channels]], True = penalized."""
        if not isinstance(strength, (int, float)) or not 0 < strength < float("inf"):
            raise ValueError(f"strength {strength}: λ is a number above 0, for example 1e-4")
        if not chosen:
            raise ValueError(
                f"{type(model).__name__}: no BatchNorm to penalize; "
                "ms.channel_groups(model, example) says which are prunable"
            )
        self.strength, self.proximal, self.chosen = float(strength), proximal, chosen
        self.gammas = [model.get_submodule(name).weight for name in chosen]
        self.penalized = torch.cat([c.cpu() for c in chosen.values()])  # bool [channels]

    def __repr__(self) -> str:
        step = ", proximal" if self.proximal else ""
        channels = int(self.penalized.sum())
        return f"{type(self).__name__}({channels} channels, strength={self.strength:g}{step})"

    def __call__(self) -> torch.Tensor:
        """λ·Σ|γ|, a scalar tensor; without a gradient when the proximal step does the work."""
        self.penalized = self.penalized.to(self.gammas[0].device)
        value = self.strength * (torch.cat(self.gammas).abs() * self.penalized).sum()
        return value.detach() if self.proximal else value

    @torch.no_grad()
    def proximal_step(self, lr: float) -> None:
        """Soft-threshold the penalized γ by lr·λ: γ <- sign(γ)·max(|γ| - lr·λ, 0).

        `fit` passes lr / (1 - momentum), so that λ means the same push as with the subgradient.
        """
        if not self.proximal:
            return
        for gamma, chosen in zip(self.gammas, self.chosen.values()):
            threshold = lr * self.strength * chosen.to(gamma.device)  # [channels], 0 where kept
            gamma.copy_(gamma.sign() * (gamma.abs() - threshold).clamp_min_(0))

    def identity(self) -> Any:
        return {
            "penalty": type(self).__name__,
            "channels": digest(self.chosen.items()),
            "strength": self.strength,
            "proximal": self.proximal,
        }

    def parameters(self) -> Iterable[torch.Tensor]:
        return self.gammas


class GlobalL1(_GammaL1):
    """λ·Σ|γ| over every prunable channel (Network Slimming; MaskSparsity, section 3.1).

    model: a network, with an `example` float [N, C, H, W]; or its `ChannelGraph`, without one.
    strength: λ. residual: include the channels that the blocks of a stage share.
    proximal: exact zeros by soft-thresholding instead of the subgradient (not in the papers).
    keep: names of layers to leave alone.
    Raises ValueError for λ not above 0, or where no channel can be cut.
    """

    def __init__(
        self,
        model: nn.Module | ChannelGraph,
        example: torch.Tensor | None = None,
        strength: float | None = None,
        residual: bool = False,
        proximal: bool = False,
        keep: tuple[str, ...] = (),
    ):
        graph = as_graph(model, example)
        names = gammas(graph, residual=residual, keep=keep)
        chosen = {name: torch.ones(len(g), dtype=torch.bool) for name, g in names.items()}
        super().__init__(graph.model, chosen, strength, proximal)


class MaskedL1(_GammaL1):
    """λ·Σ|γ| over the channels that `masks` drops, and no others (MaskSparsity, section 3.3).

    masks: dict[BatchNorm name -> BoolTensor[channels]], True = keep. strength: λ.
    proximal: exact zeros by soft-thresholding instead of the subgradient (not in the paper).
    Raises ValueError for λ not above 0, or masks that do not fit `model` or drop nothing.
    """

    def __init__(self, model: nn.Module, masks: Masks, strength: float, proximal: bool = False):
        check_shapes(masks, {n: m.weight.shape for n, m in batch_norms(model)}, "BatchNorm with γ")
        if all(mask.all() for mask in masks.values()):
            raise ValueError("the masks keep every channel: there is nothing to penalize")
        super().__init__(model, {n: ~keep for n, keep in masks.items()}, strength, proximal)


def push(strength: float, lr: float, steps: int, schedule: str = "onecycle") -> float:
    """How far λ can move one γ in a run of `steps` iterations: Σ lr·λ / (1 - momentum).

    γ starts near 0.5 to 1. A run whose push is well below that cannot drive channels to zero.
    Raises ValueError for values that no run can have.
    """
    if not 0 <= strength < float("inf"):
        raise ValueError(f"strength {strength}: λ is a number above 0, for example 1e-4")
    return float(learning_rates(lr, steps, schedule).sum()) * strength / (1 - MOMENTUM)
