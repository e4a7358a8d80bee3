"""Feature flow regularization: keep the features' path through the network short and straight.

Wu et al., arXiv 2106.02914 (2021).
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import nn

from ..networks import call
from .base import Penalty

Features = list[torch.Tensor]  # [N, C, H, W] each


class FeatureFlow(Penalty):
    """k1·Σ mean|x_{l+1} − x_l| + k2·Σ mean|x_{l+1} − 2x_l + x_{l−1}| (section 3).

    Over consecutive features x_l of equal shape; means over images and elements.
    length, curvature: k1, k2.
    layers: names of the modules whose outputs are followed; default: the blocks of a residual
        network (within a stage, x_{l+1} − x_l is nearly what a block adds), else every ReLU.
    The features are taken by hooks that live only while `attached()` is entered, as `fit` does,
    and only in training mode. Raises ValueError for strengths out of range, unknown layers, and,
    at the first use, for a network without two consecutive layers of equal shape.
    """

    def __init__(
        self,
        model: nn.Module,
        length: float = 0.0,
        curvature: float = 0.0,
        layers: Iterable[str] | None = None,
    ):
        if not (length >= 0 and curvature >= 0 and 0 < length + curvature < float("inf")):
            raise ValueError(
                f"length={length}, curvature={curvature}: neither below 0, and one of them above "
                "it, such as 1e-2"
            )
        self.length, self.curvature = float(length), float(curvature)
        self.model, self.modules = model, followed(model, layers)
        self.features: list[tuple[torch.Tensor, int, torch.Tensor]] = []

    def __repr__(self) -> str:
        strengths = f"length={self.length:g}, curvature={self.curvature:g}"
        return f"FeatureFlow({len(self.modules)} layers, {strengths})"

    @contextmanager
    def attached(self) -> Iterator[Penalty]:
        try:
            with _hooked(self.modules, self._keep):
                yield self
        finally:
            self.features = []

    def _keep(self, module, _, out):
        if module.training:
            self.features.append((out, out._version, out.clone()))

    def __call__(self) -> torch.Tensor:
        # a copy only where the network changed its own in place: gradients add up in another order
        kept, self.features = self.features, []
        features = [out if out._version == version else copy for out, version, copy in kept]
        if not features:
            raise ValueError(
                "FeatureFlow has no features: run the model in training mode inside "
                "`with penalty.attached():`"
            )
        stretches = runs(features)
        if not stretches:
            pairs = zip(self.modules, features)
            shapes = ", ".join(f"{name} {list(x.shape[1:])}" for name, x in pairs)
            raise ValueError(
                f"no two consecutive layers of equal shape to follow: {shapes}; "
                "choose others by `layers`"
            )
        length, curvature = map(sum, zip(*map(measure, stretches)))
        return self.length * length + self.curvature * curvature

    def identity(self) -> Any:
        return {
            "penalty": "FeatureFlow",
            "layers": [*self.modules],
            "length": self.length,
            "curvature": self.curvature,
        }

    def parameters(self) -> Iterable[torch.Tensor]:
        return self.model.parameters()


@torch.no_grad()
def flows(
    model: nn.Module, images: torch.Tensor, layers: Iterable[str] | None = None
) -> list[Features]:
    """The features of `images` [N, C, H, W] on their way through `model` in evaluation mode.

    A list of stretches of equal shape, each a list of tensors on the CPU, one a layer followed.
    `layers` as in FeatureFlow.
    """
    features: Features = []

    def keep(module: nn.Module, _: Any, out: torch.Tensor) -> None:
        features.append(out.to("cpu", copy=True))

    with _hooked(followed(model, layers), keep) as stack:
        for m in model.modules():  # a frozen one may be in another mode than the network
            stack.callback(setattr, m, "training", m.training)
        call(model.eval(), images)
    return runs(features)


def _hooked(modules, hook):
    """A context at whose end the forward hooks, set now, are gone."""
    stack = ExitStack()
    for m in modules.values():
        stack.enter_context(m.register_forward_hook(hook))
    return stack


def followed(model: nn.Module, layers: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """The modules whose outputs make the flow, by name, in order (see FeatureFlow)."""
    modules = dict(model.named_modules())
    if layers is None:
        blocks = [n for n, m in modules.items() if n and _is_block(m)]
        layers = blocks or [n for n, m in modules.items() if isinstance(m, nn.ReLU)]
    layers = list(layers)
    unknown = [n for n in layers if n not in modules]
    if unknown or not layers:
        what = ", ".join(unknown) or "the network has neither blocks nor ReLUs"
        raise ValueError(f"no layers to follow: {what}")
    return {n: modules[n] for n in layers}


def _is_block(module):
    """Whether convolutions and BatchNorms are among its own children."""
    children = list(module.children())
    conv = any(isinstance(child, nn.Conv2d) for child in children)
    norm = any(isinstance(child, nn.BatchNorm2d) for child in children)
    return conv and norm and not isinstance(module, nn.Sequential)


def runs(features: Features) -> list[Features]:
    """Cut a list of tensors into stretches of two and more with the same shape."""
    stretches = [list(same) for _, same in groupby(features, lambda x: x.shape)]
    return [s for s in stretches if len(s) > 1]


def measure(flow: Features) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ mean|x_{l+1} − x_l| and Σ mean|x_{l+1} − 2x_l + x_{l−1}| of one stretch."""
    steps = [b.float() - a.float() for a, b in zip(flow, flow[1:])]
    bends = [b - a for a, b in zip(steps, steps[1:])]
    zero = torch.zeros((), device=flow[0].device)
    return sum((s.abs().mean() for s in steps), zero), sum((b.abs().mean() for b in bends), zero)
