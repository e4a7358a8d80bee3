"""What the tests of cutting share: random masks, a masked copy made by hand, their comparison."""

import copy

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import mslib as ms
from mslib.networks import call


class Net(nn.Module):
    """A network of the parts given, with `forward(net, …)` as its forward."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def cbr(width, out, kernel=3, **options):
    """Convolution, BatchNorm, ReLU."""
    options = {"padding": kernel // 2, **options}
    return nn.Sequential(nn.Conv2d(width, out, kernel, **options), nn.BatchNorm2d(out), nn.ReLU())


def image(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (2, 3, 16, 16)), dtype=torch.float64, generator=generator)


def half(graph, residual=True, seed=0):
    """Masks that drop each free channel, with those that go with it, by the toss of a coin."""
    coin = torch.rand(len(graph.root), generator=torch.Generator().manual_seed(seed))
    scores = {name: coin[graph.root[graph.norms[name]]] for name in graph.prunable_norms(residual)}
    masks = {name: s > 0.5 for name, s in scores.items()}
    return ms.pruning.masks._with_floor(graph, masks, scores, tell=False)


def silenced(model, masks):
    """A copy with zeros for the dropped channels behind their BatchNorms: what a cut computes."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, keep in masks.items():
            norm = masked.get_submodule(name)
            norm.weight *= keep
            norm.bias *= keep
    return masked


def outputs(model, x):
    with torch.no_grad():
        return [t for t in tree_leaves(call(model, x)) if isinstance(t, torch.Tensor)]


def difference(a, b, x):
    """How far the outputs of two networks are apart, as a share of the largest output."""
    pairs = list(zip(outputs(a, x), outputs(b, x), strict=True))
    assert all(p.shape == q.shape for p, q in pairs)
    return max(float((p - q).abs().max() / q.abs().max().clamp(min=1e-30)) for p, q in pairs)


def size(model):
    return sum(p.numel() for p in model.parameters())


def cut_exactly(model, x, masks=None, graph=None):
    """Cut half of all free channels: nothing else changes. Returns (graph, masks, small one)."""
    graph = graph or ms.ChannelGraph(model, x)
    if masks is None:  # the first toss in which every layer loses a channel
        tosses = [half(graph, seed=seed) for seed in range(3)]
        masks = min(tosses, key=lambda m: sum(bool(keep.all()) for keep in m.values()))
    small = ms.prune(graph, masks)
    assert difference(small, silenced(model, masks), x) < 1e-9
    for name, keep in masks.items():
        assert small.get_submodule(name).num_features == int(keep.sum()), name
    outputs(copy.deepcopy(small).train(), x)  # it runs in training mode
    return graph, masks, small
