"""Keep-masks: dict[BatchNorm module name -> BoolTensor[channels]], True = keep. How to make one,
and how to check one."""

import logging
import math
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

import torch

from ..costs import cost
from ..files import nearest
from .graph import ChannelGraph, Network, as_graph
from .groups import short
from .scores import Scores, check_scores, gammas, shared_scores

log = logging.getLogger("mslib")
NOTHING = "the network has no prunable BatchNorm; ms.channel_groups says why"
ONE = "keep at least one, or nothing passes the layer"

Masks = dict[str, torch.Tensor]


def masks_below(
    model: Network,
    example: Any = None,
    threshold: float = 0.01,
    residual: bool = False,
    keep: Iterable[str] = (),
) -> Masks:
    """Drop every channel with |γ| < `threshold`; a layer that would be emptied keeps its largest
    (and a log line says so).

    Network Slimming and MaskSparsity prune by such a threshold (0.01 in MaskSparsity's released
    scripts). residual: channels that blocks share, too. keep: names of modules to leave alone.

    Raises ValueError for a threshold that is not above 0, or an unknown name in `keep`.
    """
    if not threshold > 0:
        raise ValueError(f"threshold {threshold}: must be above 0, for example 0.01")
    graph = as_graph(model, example)
    scores = shared_scores(graph, _told_apart(gammas(graph, None, residual, keep)))
    return _with_floor(graph, {name: s >= threshold for name, s in scores.items()}, scores)


def masks_for_macs(
    model: Network,
    example: Any = None,
    reduction: float = 0.5,
    residual: bool = False,
    scores: Scores | None = None,
    floor: float = 0.0,
    round_to: int = 1,
    keep: Iterable[str] = (),
) -> Masks:
    """Drop the channels of lowest score, over all layers alike, until `reduction` of the MACs is
    gone.

    reduction: fraction of the MACs to remove, in (0, 1). scores: dict like the masks, the higher
    the more worth keeping; default |γ|. floor: share of its channels that every layer keeps at
    least; one it keeps in any case. round_to: every layer keeps a multiple of so many channels, or
    all; 8 or 16 suit the vectors of processors. residual: channels that blocks share, too. keep:
    names of modules to leave alone. The result is the smallest cut that reaches the goal; of equal
    scores the first go, layer by layer in turns.

    Raises ValueError for a reduction outside (0, 1) or out of reach, with the most that can be
    reached, a floor outside [0, 1), a round_to below 1, or scores that fit no BatchNorm.
    """
    _check_goal(reduction, floor, round_to)
    graph = as_graph(model, example)
    layers, free = cost(graph.model, graph.example).layers, gammas(graph, None, residual, keep)
    check_scores(graph, scores or {})
    chosen = _told_apart(free) if scores is None else scores
    chosen = {name: s for name, s in chosen.items() if scores is None or not keep or name in free}
    if not chosen:
        raise ValueError(NOTHING)
    chosen = shared_scores(graph, chosen)
    ranks = _ranks(graph, chosen)

    def cut(count: int, tell: bool = False) -> Masks:
        kept = {name: rank > count for name, rank in ranks.items()}
        return _with_floor(graph, kept, chosen, floor, round_to, tell)

    total, most_dropped = sum(layers.values()), sum(len(rank) for rank in ranks.values())
    most = 1 - remaining_macs(graph, cut(most_dropped), layers) / total
    if most < reduction:
        rounded = f" and multiples of {round_to}" if round_to > 1 else ""
        more = scores is None and len(graph.prunable_norms(True, keep)) > len(chosen)
        raise ValueError(
            f"reduction {reduction} is out of reach: with {_least(floor)} left in each layer"
            f"{rounded} {most:.1%} of the MACs are gone"
            f"{'; residual=True reaches further' if more else ''}"
        )
    goal = (1 - reduction) * total
    counts = range(1, most_dropped)  # the smallest at which the goal is reached, or `most_dropped`
    reached = bisect_left(counts, -goal, key=lambda n: -remaining_macs(graph, cut(n), layers))
    return cut(1 + reached, tell=True)


def masks_for_ratio(
    model: Network,
    example: Any = None,
    reduction: float | dict[str, float] = 0.5,
    scores: Scores | None = None,
) -> Masks:
    """Drop the given share of each layer's channels (or weights), those of lowest score.

    reduction: a fraction in [0, 1) for each layer alike; or a dict[module -> fraction], each layer
    by the innermost module that it lies in, others whole: {"stage1": 0.75, "stage3": 0.32}. A layer
    loses ⌈fraction · size⌉, as in the code of Growing Regularization, and keeps at least one.
    scores: `gammas` (the default), `filter_norms` or `weight_norms` of the model, or any dict like
    them. Masks of single weights need no example.

    Raises ValueError for a fraction outside [0, 1) or a module without such layers.
    """
    each = reduction if isinstance(reduction, dict) else {"": reduction}
    if scores is None:
        model = as_graph(model, example)
        scores = gammas(model)
    if not scores:
        raise ValueError(NOTHING)
    channels = all(s.ndim == 1 for s in scores.values())  # of channels, not of weights
    for prefix, fraction in each.items():
        if not 0 <= fraction < 1:
            raise ValueError(f"reduction {fraction}: the share to remove lies between 0 and 1")
        if not any(_within(name, prefix) for name in scores):
            some = ", ".join(list(scores)[:3])
            raise ValueError(f"reduction for {prefix!r}: no such layer; there are {some} …")
    graph = as_graph(model, example) if channels else None
    scores = shared_scores(graph, scores) if graph else scores
    masks = {}
    for name, s in scores.items():
        if s.isnan().any():
            raise ValueError(f"a score of {name!r} is nan: has the network diverged?")
        fraction = each.get(max((p for p in each if _within(name, p)), key=len, default=""), 0)
        count = min(math.ceil(fraction * s.numel()), s.numel() - 1)
        mask = torch.ones(s.numel(), dtype=torch.bool)
        mask[s.flatten().argsort(stable=True)[:count]] = False
        masks[name] = mask.reshape(s.shape)
    return _with_floor(graph, masks, scores) if graph else masks


def check_masks(graph: ChannelGraph, masks: Masks) -> torch.Tensor:
    """What goes, as `graph.dropped` says. ValueError that names a layer that does not fit."""
    check_shapes(masks, {name: ids.shape for name, ids in graph.norms.items()}, "BatchNorm")
    for name, mask in masks.items():
        if not mask.all() and (why := graph.reason(name)):
            raise ValueError(f"mask for {name!r} drops channels that cannot be cut: {why}")
    drop = graph.dropped(masks)
    for empty in graph.emptied(drop):
        raise ValueError(f"the masks keep no channel of {empty!r}: {ONE}")
    return drop


def check_shapes(masks: Masks, shapes: dict[str, torch.Size], kind: str) -> None:
    """ValueError unless `masks` are a dict of bool tensors, of the names and `shapes` given.

    kind: what has these names, for the message.
    """
    if not isinstance(masks, dict):
        raise ValueError(
            f"masks are a {type(masks).__name__}; expected a dict of layer name -> bool tensor, "
            "True = keep, such as ms.masks_for_macs returns"
        )
    for name, mask in masks.items():
        if name not in shapes:
            raise ValueError(f"mask for {name!r}: no such {kind}{nearest(name, shapes)}")
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(f"mask for {name!r} is {found}; expected a bool tensor, True = keep")
        if mask.shape != shapes[name]:
            found, wanted = list(mask.shape), list(shapes[name])
            raise ValueError(f"mask for {name!r} has shape {found}; the layer has {wanted}")
        if not mask.any():
            raise ValueError(f"mask for {name!r} keeps no channel: {ONE}")


def remaining_macs(graph: ChannelGraph, masks: Masks, layers: dict[str, int]) -> int:
    """MACs after the cut, from those of each layer (`cost(…).layers`) and the share it keeps."""
    shares = graph.shares_left(graph.dropped(masks))
    return round(sum(macs * shares.get(name, 1.0) for name, macs in layers.items()))


def _check_goal(reduction: float, floor: float, round_to: int) -> None:
    if not 0 < reduction < 1:
        raise ValueError(f"reduction {reduction}: expected a share of the MACs, such as 0.5")
    if not 0 <= floor < 1:
        raise ValueError(f"floor {floor}: expected a share from 0 to below 1, such as 0.1")
    if round_to != int(round_to) or round_to < 1:
        raise ValueError(f"round_to={round_to}: each layer keeps a multiple of it, such as 8")


def _told_apart(found: Scores) -> Scores:
    """The same |γ|; a log line if they are all alike, as in a network that has not been trained."""
    values = [float(v) for s in found.values() for v in (s.min(), s.max())]
    if values and min(values) == max(values) and sum(len(s) for s in found.values()) > 1:
        log.warning(
            "every |γ| is %g, so they choose no channel before another; is the network trained?",
            values[0],
        )
    return found


def _ranks(graph: ChannelGraph, scores: Scores) -> Scores:
    """The places of channels in the order of scores, from 1; of equal scores in turns of layers."""
    sizes = [len(s) for s in scores.values()]
    turns = torch.cat([torch.arange(n) / n for n in sizes]).argsort(stable=True)
    turns = turns[torch.cat(list(scores.values()))[turns].argsort(stable=True)]
    ranks = torch.empty(len(turns)).index_copy(0, turns, torch.arange(1.0, len(turns) + 1))
    return shared_scores(graph, dict(zip(scores, ranks.split(sizes), strict=True)))


def _within(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def _with_floor(
    graph: ChannelGraph,
    masks: Masks,
    scores: Scores,
    floor: float = 0.0,
    round_to: int = 1,
    tell: bool = True,
) -> Masks:
    """Keep the best channels of layers below the floor; let masks say what `prune` will do."""
    least = {name: max(1, math.ceil(floor * len(keep))) for name, keep in masks.items()}
    below = [name for name, keep in masks.items() if keep.sum() < least[name]]
    if below and tell:  # no news to who set a floor; else a layer would have vanished
        level, lost = (logging.INFO, "more") if floor else (logging.WARNING, "all")
        log.log(level, "%s kept in %s: it would have lost %s", _least(floor), short(below), lost)
    worth = torch.full((len(graph.root),), -torch.inf, dtype=torch.float32)
    for name, s in scores.items():
        worth[graph.root[graph.norms[name]]] = s.float()
    while True:  # what a layer keeps may keep channels of others: until nothing changes any more
        kept = {}
        for name, keep in masks.items():
            count = int(keep.sum())
            wanted = min(len(keep), math.ceil(max(count, least[name]) / round_to) * round_to)
            if count != wanted:
                best = scores[name].argsort(descending=True, stable=True)[:wanted]
                keep = torch.zeros_like(keep).index_fill(0, best, True)
            kept[name] = keep
        drop = graph.dropped(kept)
        for writer in graph.emptied(drop):  # a BatchNorm over several may keep nothing of one
            roots = graph.root[graph.outputs[writer]]
            drop[graph.root == roots[worth[roots].argmax()]] = False
        kept = {name: ~drop[graph.norms[name]] for name in masks}
        if all(torch.equal(kept[name], masks[name]) for name in masks):
            return kept
        masks = kept


def _least(floor: float) -> str:
    return f"{floor:.1%} of the channels" if floor else "one channel"
