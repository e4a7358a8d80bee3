"""Feature flow regularization: keep the path of the features through the network short and straight (Wu et al. 2021)."""

from contextlib import ExitStack, contextmanager
from itertools import groupby

import torch
from torch import nn

from .gamma import Penalty


class FeatureFlow(Penalty):
    """k1·Σ mean|x_{l+1} − x_l| + k2·Σ mean|x_{l+1} − 2x_l + x_{l−1}| over consecutive features of equal shape (section 3).

    `length`, `curvature`: k1, k2; the means are over images and elements, so that they do not depend on their number.
    `layers`: names of the modules whose outputs are followed; default: the blocks of a residual network (within a stage,
    x_{l+1} − x_l is nearly what a block adds), else every ReLU of a plain one.

    The features are taken by hooks that live only while `attached()` is entered, as `fit` does, and only in training
    mode. Raises ValueError for strengths out of range, unknown layers, and, at the first use, for a network without two
    consecutive layers of equal shape.
    """

    def __init__(self, model, length=0.0, curvature=0.0, layers=None):
        if length < 0 or curvature < 0 or length + curvature == 0:
            raise ValueError(
                f"length={length}, curvature={curvature}: neither below 0, and one of them above it, such as 1e-2"
            )
        self.length, self.curvature, self.modules = length, curvature, followed(model, layers)
        self.chosen = f" ({', '.join(layers)})" if layers else ""
        self.features = []

    def __repr__(self):
        return f"FeatureFlow({len(self.modules)} layers{self.chosen}, length={self.length:g}, curvature={self.curvature:g})"

    @contextmanager
    def attached(self):
        try:
            with _hooked(self.modules, self._keep):
                yield self
        finally:
            self.features = []

    def _keep(self, module, _, out):
        if module.training:
            self.features.append(out)

    def __call__(self):
        features, self.features = self.features, []
        if not features:
            raise ValueError(
                "FeatureFlow has no features: run the model in training mode inside `with penalty.attached():`"
            )
        flows = runs(features)
        if not flows:
            shapes = ", ".join(
                f"{name} {list(x.shape[1:])}" for name, x in zip(self.modules, features)
            )
            raise ValueError(
                f"no two consecutive layers of equal shape to follow: {shapes}; choose others by `layers`"
            )
        length, curvature = map(sum, zip(*map(measure, flows)))
        return self.length * length + self.curvature * curvature


@torch.no_grad()
def flows(model, images, layers=None):
    """The features of `images` [N, C, H, W] on their way through `model` in evaluation mode: a list of stretches of equal
    shape, each a list of tensors on the CPU, one a layer followed. `layers` as in FeatureFlow."""
    features, training = [], model.training
    try:
        with _hooked(
            followed(model, layers),
            lambda module, _, out: features.append(out.to("cpu", copy=True)),
        ):
            model.eval()(images.to(next(model.parameters()).device))
    finally:
        model.train(training)
    return runs(features)


def _hooked(modules, hook):
    """A context at whose end the forward hooks, set now, are gone."""
    stack = ExitStack()
    for m in modules.values():
        stack.enter_context(m.register_forward_hook(hook))
    return stack


def followed(model, layers=None):
    """The modules whose outputs make the flow, by name, in order (see FeatureFlow)."""
    modules = dict(model.named_modules())
    if layers is None:
        blocks = [
            n for n, m in modules.items() if n and not isinstance(m, nn.Sequential) and _is_block(m)
        ]
        layers = blocks or [n for n, m in modules.items() if isinstance(m, nn.ReLU)]
    unknown = [n for n in layers if n not in modules]
    if unknown or not layers:
        raise ValueError(
            f"no layers to follow: {', '.join(unknown) or 'the network has neither blocks nor ReLUs'}"
        )
    return {n: modules[n] for n in layers}


def _is_block(module):
    """Whether convolutions and BatchNorms are among its own children."""
    return all(
        any(isinstance(child, kind) for child in module.children())
        for kind in (nn.Conv2d, nn.BatchNorm2d)
    )


def runs(features):
    """Cut a list of tensors into stretches of two and more with the same shape."""
    stretches = (list(same) for _, same in groupby(features, lambda x: x.shape))
    return [s for s in stretches if len(s) > 1]


def measure(flow):
    """Length and total absolute curvature of one stretch: Σ mean|x_{l+1} − x_l|, Σ mean|x_{l+1} − 2x_l + x_{l−1}|."""
    steps = [b.float() - a.float() for a, b in zip(flow, flow[1:])]
    bends = [b - a for a, b in zip(steps, steps[1:])]
    return sum(s.abs().mean() for s in steps), sum(
        (b.abs().mean() for b in bends), torch.zeros((), device=flow[0].device)
    )
