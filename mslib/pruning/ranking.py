"""From importance scores of any kind to scores that can be compared between layers."""

from typing import Any

import torch

from .graph import ChannelGraph, Network, as_graph
from .groups import members
from .scores import Scores, shared_scores

WITHIN = ("layer", "structure")


def ranked_scores(
    model: Network, scores: Scores, example: Any = None, within: str = "layer"
) -> Scores:
    """The place of each channel in the order of its layer or structure, as a share: dict like
    `scores`, float in [0, 1), 0 = the first to go.

    `masks_for_macs` compares scores over all layers alike. Given these places instead, it takes the
    same share of channels from each set, those of lowest score; of equal places the sets go in
    turns. Channels that go together have one place.

    scores: dict[BatchNorm name -> float [channels]], higher = keep, such as `gammas` returns.
    within: "layer" ranks the channels that the same layers write, scale and read: all layers are
    cut to the same share. "structure" ranks together all layers that have the same kinds of modules
    before and behind them (isomorphic pruning, Fang et al., ECCV 2024, section 3): inner channels
    of residual blocks compete with each other, and not with those of a residual stage.
    example: what the network's forward takes (left out if `model` is a `ChannelGraph`).
    Raises ValueError for another `within`, or scores that fit no BatchNorm or are nan.
    """
    if within not in WITHIN:
        raise ValueError(f"within={within!r}: expected one of {', '.join(WITHIN)}")
    graph = as_graph(model, example)
    places, worth = torch.zeros(2, len(graph.root), dtype=torch.float32)
    for name, s in shared_scores(graph, scores).items():
        worth[graph.root[graph.norms[name]]] = s
    sets = _sets(graph, scores, within)
    for turn, roots in enumerate(sets):
        order = worth[roots].argsort(stable=True).argsort().float()
        places[roots] = (order + turn / len(sets)) / len(roots)
    return {name: places[graph.root[graph.norms[name]]] for name in scores}


def _sets(graph: ChannelGraph, scores: Scores, within: str) -> list[list[int]]:
    """The roots that are ranked together, of channels with a score, in the order of `scores`."""
    key_of: dict[int, tuple] = {}
    for (writers, norms, readers, _), roots in members(graph).items():
        kinds = tuple(_kinds(graph, names) for names in (writers, norms, readers))
        key = kinds if within == "structure" else (writers, norms, readers)
        key_of |= dict.fromkeys(roots, key)
    found: dict[tuple, dict[int, None]] = {}  # dictionaries for their order
    for name in scores:
        for root in graph.root[graph.norms[name]].tolist():
            found.setdefault(key_of[root], {})[root] = None
    return [[*roots] for roots in found.values()]


def _kinds(graph: ChannelGraph, names: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of modules, sorted: where a network is built of equal parts, they are equal."""
    return tuple(sorted(type(graph.modules.get(name)).__name__ for name in names))
