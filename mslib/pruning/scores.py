"""Importance scores: how much each channel, filter or weight counts; dict[module name -> float
tensor], higher = keep."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..networks import batch_norms, unwrap
from .graph import ChannelGraph, Network, as_graph

Scores = dict[str, torch.Tensor]


def gammas(
    model: Network, example: Any = None, residual: bool = False, keep: Iterable[str] = ()
) -> Scores:
    """|γ| of BatchNorms: dict[module name -> float [channels]].

    Without an example, of every BatchNorm that has a γ. With one (or a `ChannelGraph` as the
    model), of those whose channels can be removed. residual: also of channels that take part in an
    addition, not only of a block's inner ones. keep: names of modules to leave alone.
    """
    if example is None and not isinstance(model, ChannelGraph):
        return {name: _size(m.weight) for name, m in batch_norms(unwrap(model))}
    graph = as_graph(model, example)
    names = graph.prunable_norms(residual, keep)
    return {name: _size(graph.modules[name].weight) for name in names}


def filter_norms(
    model: Network, example: Any = None, residual: bool = False, keep: Iterable[str] = ()
) -> Scores:
    """Mean |W| of the filter that writes each channel (Li et al. 2017): dict like `gammas`.

    For a layer, the order is that of the L1 norm; between layers, a sum would favour those with
    many inputs.
    """
    graph = as_graph(model, example)
    writer, scores = graph.conv_before, {}
    for name in graph.prunable_norms(residual, keep):
        if writer.get(name) in graph.modules:
            scores[name] = by_filter(graph.modules[writer[name]])
    return scores


def outgoing_norms(
    model: Network, example: Any = None, residual: bool = False, keep: Iterable[str] = ()
) -> Scores:
    """What a channel can still change in what follows: dict like `gammas`.

    |γ| times the weights that read it, as the BatchNorms behind them pass those on (summed over the
    kernel, averaged over its outputs). Not in the papers: under BatchNorm the norm of a filter is
    free, and a filter in a block that adds nothing may have any.
    """
    graph = as_graph(model, example)
    total = torch.zeros(len(graph.root))
    for name, ids in graph.inputs.items():
        if name in graph.modules:  # not a weight that its module uses by a function
            norm = graph.norm_after.get(name)
            sent = _sent(graph.modules[name], graph.modules[norm] if norm else None)
            total.index_add_(0, graph.root[ids], sent)
    found = gammas(graph, None, residual, keep)
    return {name: gamma * total[graph.root[graph.norms[name]]] for name, gamma in found.items()}


def _sent(layer: Any, norm: Any) -> torch.Tensor:
    """What a layer, and the BatchNorm behind it, make of each channel read: float [channels]."""
    size = _size(layer.weight)
    size = size.flatten(2).sum(2) if size.ndim > 2 else size
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # [in, out / groups, …]
        size = size.reshape(groups, -1, size.shape[1]).transpose(1, 2).flatten(0, 1)
    # now [out, in / groups]
    passed = _passes(norm)[:, None] if norm is not None else 1.0
    return (size * passed).reshape(groups, -1, size.shape[1]).sum(1).flatten() / len(size)


def weight_norms(model: Network, example: Any = None, scaled: bool = False) -> Scores:
    """|W| of every single weight of every convolution: dict[convolution name -> float tensor shaped
    like its weight].

    scaled: as the BatchNorm behind passes it on, times its γ over its deviation (convolutions
    without one are left out; needs the example).
    """
    network = model.model if isinstance(model, ChannelGraph) else unwrap(model)
    convolutions = ((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    sizes = {name: _size(m.weight) for name, m in convolutions}
    if not scaled:
        return sizes
    graph = as_graph(model, example)
    behind = {n: _passes(graph.modules[norm]) for n, norm in graph.norm_after.items() if n in sizes}
    return {name: sizes[name] * scale[:, None, None, None] for name, scale in behind.items()}


def by_filter(layer: Any) -> torch.Tensor:
    """Mean |W| of each filter of a convolution or linear layer, float [channels written]."""
    size = _size(layer.weight)
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return size.flatten(1).mean(1)
    # [groups, in / groups, out / groups, …]
    groups = size.reshape(layer.groups, -1, *size.shape[1:])
    return groups.transpose(1, 2).flatten(2).mean(2).flatten()


def shared_scores(graph: ChannelGraph, scores: Scores) -> Scores:
    """A channel that several BatchNorms scale is worth what the one says that values it most."""
    best = torch.full((len(graph.root),), -torch.inf)
    for name, s in scores.items():
        best.scatter_reduce_(0, graph.root[graph.norms[name]], s.float(), "amax")
    return {name: best[graph.root[graph.norms[name]]] for name in scores}


def _size(weight: Any) -> torch.Tensor:
    return weight.detach().abs().float().cpu()


def _passes(norm: Any) -> torch.Tensor:
    """|γ| / deviation of a BatchNorm: what it multiplies its input by, float [channels]."""
    return (norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()).float().cpu()
