"""Group envelope regularization: of each layer's filters all but the k largest shrink to zero.

Refael, Arbel & Huleihel, "Learning k-level structured sparse neural networks using group envelope
regularization", 2022, arXiv 2212.12921.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..pruning.graph import ChannelGraph
from .base import Penalty
from .filters import Filters, Reduction


class GroupEnvelope(Filters):
    """λ·s_k(W) a layer, s_k being the largest convex function below ½‖W‖² + (∞ if more than k
    filters are not zero), by its proximal operator.

    With z_i = ‖W_i‖₂ it is s_k = min ½·Σ z_i² / u_i over 0 <= u_i <= 1, Σ u_i = k. The proximal
    step of λ' = lr·λ is W_i <- u_i / (λ' + u_i)·W_i with u_i = min(1, max(0, η·z_i - λ')) and η
    such that Σ u_i = k: the largest lose λ' / (1 + λ') of themselves, as by weight decay, the
    smallest become zero. reduction: the share that is to be zero, hence k; as in `masks_for_ratio`.
    strength: λ.

    The groups are the filters of one layer, each layer with a k of its own, all of weight 1 (ours;
    the paper lets groups and their weights be chosen). `masks` drops the smallest after each epoch.
    Raises ValueError for settings out of range.
    """

    norm = 2

    def __init__(
        self,
        model: nn.Module | ChannelGraph,
        example: Any = None,
        reduction: Reduction = 0.5,
        *,
        strength: float,
    ):
        super().__init__(model, example, reduction, {"strength": strength})
        self.k = {name: int(keep.sum()) for name, keep in self.masks.items()}

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """λ·Σ s_k, a scalar tensor without a gradient: the proximal step does the work."""
        total = super().__call__()
        for name, w in self.weights.items():
            z = w.flatten(1).norm(2, 1)
            total = total + (z**2 / spread(z, self.k[name], 0.0).clamp(min=1e-30)).sum() / 2
        return self.settings["strength"] * total

    @torch.no_grad()
    def proximal_step(self, lr: float) -> None:
        shrink = lr * self.settings["strength"]
        for name, w in self.weights.items():
            u = spread(w.flatten(1).norm(2, 1), self.k[name], shrink)
            w *= (u / (shrink + u).clamp(min=1e-30))[:, None, None, None]

    @contextmanager
    def attached(self) -> Iterator[Penalty]:
        yield self
        self.masks = self.smallest(self.sizes())


def spread(z: torch.Tensor, k: int, shrink: float) -> torch.Tensor:
    """u = min(1, max(0, η·z - shrink)) with η such that Σ u = k: float like the norms z [groups].

    Σ u is piecewise linear in η: it is known at its corners, and between two of them.
    """
    z = z.clamp(min=1e-20)
    corners = torch.cat([shrink / z, (1 + shrink) / z]).sort().values
    sums = (corners[:, None] * z - shrink).clamp(0, 1).sum(1)  # [corners], from 0 to groups
    i = torch.searchsorted(sums, torch.full_like(sums[:1], k)).clamp(1, len(sums) - 1)
    # without a gap all are kept, and rounding hid the last of them: any large η will do
    part = (k - sums[i - 1]) / (sums[i] - sums[i - 1]).clamp(min=1e-30)
    eta = corners[i - 1] + part * (corners[i] - corners[i - 1])
    return (eta * z - shrink).clamp(0, 1)
