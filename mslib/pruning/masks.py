"""Keep-masks: dict[BatchNorm module name -> BoolTensor[channels]], True = keep.

A mask is plain data. The functions here make one from γ (or from any scores) and check one.
"""

import logging
import math

import torch
from torch import nn

from ..costs import cost
from ..files import nearest
from .channels import as_graph
from .groups import short

log = logging.getLogger("mslib")


def gammas(model, example=None, residual=False, keep=()):
    """|γ| of every prunable BatchNorm: dict[module name -> float tensor [channels]].

    residual: also those of the residual channel spaces (shared by all blocks of a stage), not only inner channels.
    """
    graph = as_graph(model, example)
    return {
        name: graph.modules[name].weight.detach().abs().float().cpu()
        for name in graph.prunable_norms(residual)
    }


def masks_below(model, example=None, threshold=0.01, residual=False, keep=()):
    """Drop every channel with |γ| < `threshold`; a layer that would be emptied keeps its largest (and a log line says so).

    Network Slimming and MaskSparsity prune by such a threshold (0.01 in MaskSparsity's released scripts).
    """
    if not threshold > 0:
        raise ValueError(
            f"threshold {threshold}: |γ| is compared with it, so it must be above 0, for example 0.01"
        )
    graph = as_graph(model, example)
    scores = _shared_scores(graph, gammas(graph, None, residual))
    return _with_floor(graph, {name: s >= threshold for name, s in scores.items()}, scores)


def masks_for_macs(
    model, example=None, reduction=0.5, residual=False, scores=None, floor=0.0, round_to=1, keep=()
):
    """Drop the channels of lowest score, over all layers alike, until `reduction` of the MACs is gone.

    `reduction`: fraction of the MACs to remove, in (0, 1). `scores`: dict like the masks, the higher the more worth
    keeping; default |γ|. `floor`: share of its channels that every layer keeps at least; one it keeps in any case.
    `round_to`: every layer keeps a multiple of so many channels, or all; 8 or 16 suit the vectors of processors.
    The result is the smallest cut that reaches the goal; of equal scores the first go, layer by layer in turns.

    Raises ValueError for a reduction outside (0, 1) or out of reach, with the most that can be reached, a floor
    outside [0, 1), or a round_to below 1.
    """
    if not 0 < reduction < 1:
        raise ValueError(
            f"reduction {reduction}: the fraction of MACs to remove lies between 0 and 1, for example 0.5"
        )
    if not 0 <= floor < 1:
        raise ValueError(
            f"floor {floor}: the share that each layer keeps lies between 0 and 1, for example 0.1"
        )
    if round_to < 1:
        raise ValueError(
            f"round_to={round_to}: the number of channels that a layer keeps is a multiple of it, for example 8"
        )
    graph = as_graph(model, example)
    layers = cost(graph.model, graph.example).layers
    for name in scores or ():
        if name not in graph.norms:
            raise ValueError(
                f"scores for {name!r}: the network has no such BatchNorm{nearest(name, graph.norms)}"
            )
    given, scores = scores, _shared_scores(graph, scores or gammas(graph, None, residual))
    if not scores:
        raise ValueError(
            f"{type(model).__name__} has no prunable BatchNorm; ms.channel_groups(model) says why"
        )
    turns = torch.cat([torch.arange(len(s)) / len(s) for s in scores.values()]).argsort(stable=True)
    turns = turns[torch.cat(list(scores.values()))[turns].argsort(stable=True)]
    ranks = torch.empty(len(turns)).index_copy(
        0, turns, torch.arange(1.0, len(turns) + 1)
    )  # no two alike
    ranks = _shared_scores(graph, dict(zip(scores, ranks.split([len(s) for s in scores.values()]))))

    def cut(count, tell=False):
        return _with_floor(
            graph,
            {name: rank > count for name, rank in ranks.items()},
            scores,
            floor,
            round_to,
            tell,
        )

    total, low, high = sum(layers.values()), 0, len(turns)
    most = 1 - remaining_macs(graph, cut(high), layers) / total
    if most < reduction:
        rounded = f" and multiples of {round_to}" if round_to > 1 else ""
        raise ValueError(
            f"reduction {reduction} is out of reach: with {_least(floor)} left in each layer{rounded} {most:.1%} of the MACs are gone"
            + (
                "; residual=True reaches further"
                if given is None and not residual and len(gammas(graph, None, True)) > len(scores)
                else ""
            )
        )
    while high - low > 1:
        middle = (low + high) // 2
        reached = remaining_macs(graph, cut(middle), layers) <= (1 - reduction) * total
        low, high = (low, middle) if reached else (middle, high)
    return cut(high, tell=True)


def filter_norms(model, example=None, residual=False, keep=()):
    """Mean |W| of the filter that writes each channel, the criterion of Li et al. 2017: dict like `gammas`.

    For a layer, the order is that of the L1 norm; between layers, a sum would favour those with many inputs.
    """
    graph = as_graph(model, example)
    writer = graph.conv_before
    names = [n for n in graph.prunable_norms(residual) if n in writer]
    return {
        n: graph.modules[writer[n]].weight.detach().abs().float().flatten(1).mean(1).cpu()
        for n in names
    }


def outgoing_norms(model, example=None, residual=False, keep=()):
    """|γ| of each channel times the weights that read it, as the BatchNorms behind them pass those on: dict like `gammas`.

    What a channel can still change in what follows. Not in the papers: under BatchNorm the norm of a filter is free, and
    a filter in a block that adds nothing may have any. (Weights are summed over the kernel, averaged over its outputs.)
    """
    graph = as_graph(model, example)
    total = torch.zeros(len(graph.root))
    for name, ids in graph.inputs.items():
        weight = graph.modules[name].weight.detach().abs().float().cpu()
        size = weight.flatten(2).sum(2) if weight.ndim > 2 else weight  # [outputs, channels read]
        if name in graph.norm_after:
            size = size * _passes(graph.modules[graph.norm_after[name]])[:, None]
        total.index_add_(
            0,
            graph.root[ids],
            size.reshape(len(ids) // size.shape[1], -1, size.shape[1]).sum(1).flatten() / len(size),
        )
    return {
        n: gamma * total[graph.root[graph.norms[n]]]
        for n, gamma in gammas(graph, None, residual).items()
    }


def weight_norms(model, example=None, scaled=False):
    """|W| of every single weight of every convolution: dict[convolution name -> float tensor shaped like its weight].

    scaled: as the BatchNorm behind passes it on, times its γ over its deviation (convolutions without one are left out).
    """
    if scaled:
        graph = as_graph(model, example)
        behind = {
            conv: _passes(graph.modules[norm])[:, None, None, None]
            for conv, norm in graph.norm_after.items()
        }
        return {n: w * behind[n] for n, w in weight_norms(model).items() if n in behind}
    return {
        n: m.weight.detach().abs().float().cpu()
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    }


def _passes(norm):
    """|γ| / deviation of a BatchNorm: what it multiplies its input by, float [channels]."""
    return (norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()).float().cpu()


def masks_for_ratio(model, example=None, reduction=0.5, scores=None):
    """Drop the given share of each layer's channels (or weights), those of lowest score.

    `reduction`: a fraction in [0, 1) for each layer alike; or a dict[module -> fraction], each layer by the innermost
    module that it lies in, others whole: {"stage1": 0.75, "stage3": 0.32}. A layer loses ⌈fraction · size⌉, as in the code of Growing Regularization, and keeps at least one.
    `scores`: `gammas`, `filter_norms` or `weight_norms` of the model, or any dict like them. `model`: or its ChannelGraph.

    Raises ValueError for a fraction outside [0, 1) or a module without such layers.
    """
    each = reduction if isinstance(reduction, dict) else {"": reduction}
    for prefix, fraction in each.items():
        if not 0 <= fraction < 1:
            raise ValueError(
                f"reduction {fraction}: the share to remove lies between 0 and 1, for example 0.5"
            )
        if not any(_within(name, prefix) for name in scores):
            raise ValueError(
                f"reduction for {prefix!r}: no such layer; there are {', '.join(list(scores)[:3])} …"
            )
    channels = all(s.ndim == 1 for s in scores.values())
    graph = None
    if channels:
        graph = as_graph(model, example)
        scores = _shared_scores(graph, scores)
    masks = {}
    for name, s in scores.items():
        fraction = each.get(max((p for p in each if _within(name, p)), key=len, default=None), 0)
        order = s.flatten().argsort(stable=True)
        keep = torch.ones(s.numel(), dtype=torch.bool)
        keep[order[: min(math.ceil(fraction * s.numel()), s.numel() - 1)]] = False
        masks[name] = keep.reshape(s.shape)
    return _with_floor(graph, masks, scores) if graph else masks


def _within(name, prefix):
    return not prefix or name == prefix or name.startswith(prefix + ".")


def remaining_macs(graph, masks, layers):
    """MACs after the cut, from the MACs of each layer (`cost(…).layers`) and the share of channels it keeps."""
    drop = graph.dropped(masks)
    return round(sum(macs * graph.share_left(name, drop) for name, macs in layers.items()))


def _shared_scores(graph, scores):
    """A channel shared by several BatchNorms is worth as much as the best of them says."""
    best = torch.full((len(graph.root),), -torch.inf)
    for name, s in scores.items():
        best.scatter_reduce_(0, graph.root[graph.norms[name]], s.float(), "amax")
    return {name: best[graph.root[graph.norms[name]]] for name in scores}


def _with_floor(graph, masks, scores, floor=0.0, round_to=1, tell=True):
    """Keep the best channels of a layer that would go below the floor, and make the masks say what `prune` will do."""
    least = {name: max(1, math.ceil(floor * len(keep))) for name, keep in masks.items()}
    below = [name for name, keep in masks.items() if keep.sum() < least[name]]
    if below and tell:
        log.warning(
            "%s kept in %s: it would have lost %s",
            _least(floor),
            short(below),
            "more" if floor else "all",
        )
    worth = torch.full((len(graph.root),), -torch.inf)
    for name, s in scores.items():
        worth[graph.root[graph.norms[name]]] = s.float()
    while True:  # what a layer keeps may keep channels of others: until nothing changes any more
        kept = {}
        for name, keep in masks.items():
            wanted = min(
                len(keep), math.ceil(max(int(keep.sum()), least[name]) / round_to) * round_to
            )
            best = scores[name].argsort(descending=True, stable=True)[:wanted]
            kept[name] = (
                keep if keep.sum() == wanted else torch.zeros_like(keep).index_fill(0, best, True)
            )
        drop = graph.dropped(kept)
        for writer in graph.emptied(
            drop
        ):  # a BatchNorm over several convolutions may keep none of one
            ids = graph.outputs[writer]
            drop[graph.root == graph.root[ids[worth[graph.root[ids]].argmax()]]] = False
        kept = {name: ~drop[graph.norms[name]] for name in masks}
        if all(torch.equal(kept[name], masks[name]) for name in masks):
            return kept
        masks = kept


def _least(floor):
    return f"{floor:.1%} of the channels" if floor else "one channel"


def check_masks(graph, masks):
    """What goes, as `graph.dropped` says; ValueError that names the layer when `masks` do not fit the network of `graph`."""
    for name, mask in masks.items():
        if name not in graph.norms:
            raise ValueError(
                f"mask for {name!r}: the network has no such BatchNorm{nearest(name, graph.norms)}"
            )
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(f"mask for {name!r} is {kind}; expected a bool tensor, True = keep")
        if mask.shape != graph.norms[name].shape:
            raise ValueError(
                f"mask for {name!r} has shape {list(mask.shape)}; the layer has {len(graph.norms[name])} channels"
            )
        if not mask.any():
            raise ValueError(
                f"mask for {name!r} keeps no channel; keep at least one, or nothing passes the layer"
            )
        if not mask.all() and graph.reason(name):
            raise ValueError(
                f"mask for {name!r} drops channels that cannot be cut: {graph.reason(name)}"
            )
    drop = graph.dropped(masks)
    empty = graph.emptied(drop)
    if empty:
        raise ValueError(
            f"the masks keep no channel of {empty[0]!r}; keep at least one, or nothing passes the layer"
        )
    return drop
