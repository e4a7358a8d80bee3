"""Loops over the verbs: a scan of what each layer's cut costs, and pruning in several steps."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd
from torch import nn

from .costs import cost
from .data.tensors import Split
from .networks import copied
from .pruning.graph import ChannelGraph, Network, as_graph
from .pruning.groups import short
from .pruning.masks import NOTHING, masks_for_macs, masks_for_ratio, remaining_macs
from .pruning.scores import Scores, check_scores, gammas
from .pruning.surgery import prune
from .training.loop import evaluate

SMALLEST = 1e-9  # of the MACs: a step that is to remove less has been done before


def sensitivity(
    model: Network,
    split: Split | Iterable,
    example: Any = None,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    scores: Scores | None = None,
    residual: bool = False,
    keep: Iterable[str] = (),
    fold_bias: bool = False,
) -> pd.DataFrame:
    """Top-1 in percent with the channels of only one layer cut (Li et al., ICLR 2017, section 3.2).

    BatchNorms that share channels, as in a residual stage, are cut together. Nothing is trained.
    split: held-out images, a `Split` or DataLoader. ratios: shares of the layer's channels to
    remove, those of lowest score. scores: as of `masks_for_macs`; default |γ|. residual: channels
    that blocks share, too. keep: names of modules to leave alone. fold_bias: as of `prune`.

    A row a layer and ratio: layer (its BatchNorms), pruning_ratio, channels, kept, reduction (of
    the network's MACs), top1, drop (in points, from the top-1 of the whole network).
    Raises ValueError for a ratio outside [0, 1), scores that fit no BatchNorm, or where nothing can
    be cut.
    """
    graph, ratios = as_graph(model, example), list(ratios)
    free = gammas(graph, None, residual, keep)
    check_scores(graph, scores or {})
    chosen = {name: s for name, s in (scores or free).items() if name in free}
    if not chosen:
        raise ValueError(NOTHING)
    layers, whole = cost(graph.model, graph.example).layers, evaluate(graph.model, split)
    rows = []
    for names in _together(graph, chosen):
        for ratio in ratios:
            alone = {name: chosen[name] for name in names}
            masks = masks_for_ratio(graph, None, ratio, alone)
            top1 = evaluate(prune(graph, masks, fold_bias=fold_bias), split)
            left = remaining_macs(graph, masks, layers) / sum(layers.values())
            kept = masks[names[0]]
            row = {"layer": short(names), "pruning_ratio": ratio}
            row |= {"channels": len(kept), "kept": int(kept.sum()), "reduction": 1 - left}
            rows.append(row | {"top1": top1, "drop": whole - top1})
    return pd.DataFrame(rows)


def cut_schedule(reduction: float, steps: int, exponent: float = 3) -> list[float]:
    """The share of the MACs that is gone after each of several cuts, the last `reduction`.

    reduction · (1 − (1 − t / steps)^exponent) for t = 1 … steps. With 3, large cuts come first,
    while the network is large (Zhu & Gupta 2017, equation 1); with 1, all cuts are alike.
    Raises ValueError for a reduction outside (0, 1), or steps or an exponent below 1.
    """
    if not 0 < reduction < 1:
        raise ValueError(f"reduction {reduction}: a share between 0 and 1, such as 0.5")
    if not (steps >= 1 and exponent >= 1):
        raise ValueError(f"steps={steps}, exponent={exponent}: both are 1 or more, such as 5 and 3")
    return [reduction * (1 - (1 - t / steps) ** exponent) for t in range(1, steps + 1)]


def prune_gradually(
    model: nn.Module,
    example: Any,
    reductions: Sequence[float],
    train: Callable[[nn.Module, int], Any],
    scores: Callable[[ChannelGraph], Scores] | None = None,
    fold_bias: bool = False,
    **how: Any,
) -> nn.Module:
    """Cut in several steps and train after each (Han et al. 2015; Molchanov et al. 2017); the small
    network. `model` stays as it is.

    reductions: the share of the MACs of `model` that is gone after each cut, rising, such as
    `cut_schedule(0.5, 5)`. train: called with the network and the step (from 0), and trains it in
    place: `lambda net, step: ms.fit(net, data, epochs=2, lr=0.01, run=f"runs/{step}")`.
    scores: makes them of the graph before each cut; default |γ|. fold_bias: as of `prune`. how:
    residual, floor, round_to and keep of `masks_for_macs`, which see the network of each step.

    Raises ValueError for reductions that do not rise between 0 and 1, or are out of reach.
    """
    bounds = [0.0, *(reductions := list(reductions)), 1.0]
    if len(bounds) == 2 or any(not a < b for a, b in zip(bounds, bounds[1:])):
        raise ValueError(
            f"reductions {reductions}: expected shares that rise between 0 and 1, such as "
            "ms.cut_schedule(0.5, 5)"
        )
    whole, model = cost(model, example).macs, copied(model)  # the first step may cut nothing
    for step, reduction in enumerate(reductions):
        share = 1 - (1 - reduction) * whole / cost(model, example).macs  # of what is left
        if share > SMALLEST:  # the cut before may have gone further than it had to
            graph = ChannelGraph(model, example)
            worth = None if scores is None else scores(graph)
            masks = masks_for_macs(graph, None, share, scores=worth, **how)
            model = prune(graph, masks, fold_bias=fold_bias)
        train(model, step)
    return model


def _together(graph: ChannelGraph, names: Iterable[str]) -> list[list[str]]:
    """The names of BatchNorms, those that share a channel in one list, in their order."""
    import networkx  # takes half a second

    links = networkx.Graph()
    for name in names:
        links.add_node(name)
        links.add_edges_from((name, root) for root in graph.root[graph.norms[name]].tolist())
    return [[n for n in names if n in part] for part in networkx.connected_components(links)]
