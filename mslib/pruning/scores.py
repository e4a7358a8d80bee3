"""Importance scores: how much each channel, filter or weight counts; dict[module name -> float
tensor], higher = keep."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..files import nearest
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
        if name in writer:
            scores[name] = filters(graph, writer[name]).abs().mean(1)
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
    total = torch.zeros(len(graph.root), dtype=torch.float32)
    for name, ids in graph.inputs.items():
        norm = graph.norm_after.get(name)
        passed = _passes(graph.modules[norm]) if norm else None
        sent = by_channel_read(graph, name, _size(graph.weight(name)[1]), passed)
        total.index_add_(0, graph.root[ids], sent / len(graph.outputs[name]))
    found = gammas(graph, None, residual, keep)
    return {name: gamma * total[graph.root[graph.norms[name]]] for name, gamma in found.items()}


def by_channel_read(
    graph: ChannelGraph, layer: str, values: torch.Tensor, passed: torch.Tensor | None = None
) -> torch.Tensor:
    """`values`, shaped like the weight, summed for each channel read: float [channels read].

    passed: by what each channel written is multiplied before the sum, float [channels written].
    """
    values = by_row(graph, layer, values.flatten(2).sum(2) if values.ndim > 2 else values)
    values = values if passed is None else values * passed[:, None]
    groups = len(graph.inputs[layer]) // values.shape[1]
    return values.reshape(groups, -1, values.shape[1]).sum(1).flatten()


def by_row(graph: ChannelGraph, layer: str, values: torch.Tensor) -> torch.Tensor:
    """`values`, shaped like the weight, a row a channel written: [written, read / groups, …]."""
    written, first = graph.outputs[layer], graph.notes.slices.get((graph.weight(layer)[0], 0))
    if first is not None and torch.equal(first, written):
        return values
    # [groups, read / groups, written / groups, …], as a transposed convolution has them
    groups = values.reshape(len(written) // values.shape[1], -1, *values.shape[1:])
    return groups.transpose(1, 2).flatten(0, 1)


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


def filters(graph: ChannelGraph, layer: str) -> torch.Tensor:
    """The weights of a layer, a filter a row: float [channels written, …]."""
    return by_row(graph, layer, graph.weight(layer)[1].detach().float().cpu()).flatten(1)


def check_scores(graph: ChannelGraph, scores: Scores) -> None:
    """ValueError for scores of a BatchNorm that the network lacks, of another width, or nan."""
    for name, s in scores.items():
        if name not in graph.norms:
            hint = nearest(name, graph.norms)
            raise ValueError(f"scores for {name!r}: the network has no such BatchNorm{hint}")
        if s.shape != graph.norms[name].shape:
            found, wanted = list(s.shape), list(graph.norms[name].shape)
            raise ValueError(f"scores for {name!r} have shape {found}; the layer has {wanted}")
        if s.isnan().any():
            raise ValueError(f"a score of {name!r} is nan: has the network diverged?")


def shared_scores(graph: ChannelGraph, scores: Scores) -> Scores:
    """A channel that several BatchNorms scale is worth what the one says that values it most."""
    check_scores(graph, scores)
    best = torch.full((len(graph.root),), -torch.inf, dtype=torch.float32)
    for name, s in scores.items():
        best.scatter_reduce_(0, graph.root[graph.norms[name]], s.float(), "amax")
    return {name: best[graph.root[graph.norms[name]]] for name in scores}


def _size(weight: Any) -> torch.Tensor:
    return weight.detach().abs().float().cpu()


def _passes(norm: Any) -> torch.Tensor:
    """|γ| / deviation of a BatchNorm: what it multiplies its input by, float [channels]."""
    return (norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()).float().cpu()
