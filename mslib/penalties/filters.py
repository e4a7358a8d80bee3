"""What the penalties on filters share: which filters there are, and which are the smallest."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..files import digest
from ..networks import moved
from ..pruning.graph import ChannelGraph, as_graph
from ..pruning.masks import NOTHING, Masks, check_masks, check_shapes, masks_for_ratio
from ..pruning.scores import Scores
from .base import Penalty

Reduction = float | dict[str, float]


class Filters(Penalty):
    """A penalty on the filters that write prunable channels, by the name of their BatchNorm.

    Give `masks`, or `reduction`: the share of each layer that is to go, as in `masks_for_ratio`.
    unstructured: single weights instead, by the name of their convolution.
    settings: numbers that decide the effect; each has to be above 0.
    `STATE` names what changes while training: dicts of tensors, or plain numbers.
    """

    STATE: tuple[str, ...] = ("masks",)
    norm = 1  # of L1 or L2, by which filters are compared

    def __init__(
        self,
        model: nn.Module | ChannelGraph,
        example: Any,
        reduction: Reduction | None,
        settings: dict[str, float],
        masks: Masks | None = None,
        unstructured: bool = False,
    ):
        for name, value in settings.items():
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}: it must be a number above 0")
        if not isinstance(settings.get("every", 1), int):
            raise ValueError(f"every={settings['every']}: expected whole iterations, such as 10")
        self.graph, self.reduction, self.settings = as_graph(model, example), reduction, settings
        self.unstructured, self.iteration = unstructured, 0
        self.weights = _weights(self.graph, unstructured)  # mask name -> parameter
        if masks is not None:
            shapes = {name: w.shape[:1] for name, w in self.weights.items()}
            check_shapes(masks, shapes, "prunable BatchNorm right behind a convolution")
            check_masks(self.graph, masks)
            self.weights = {name: self.weights[name] for name in masks}
        self.masks = self.smallest(self.sizes()) if masks is None else masks  # refuses a bad share
        if all(keep.all() for keep in self.masks.values()):
            given = "the masks" if reduction is None else f"reduction={reduction}"
            raise ValueError(f"{given} would drop nothing; for a half of each layer give 0.5")

    def __repr__(self) -> str:
        given = "".join(f", {name}={value:g}" for name, value in self.settings.items())
        dropped = sum(int((~keep).sum()) for keep in self.masks.values())
        of = sum(keep.numel() for keep in self.masks.values())
        return f"{type(self).__name__}(-{dropped} of {of}{given})"

    def sizes(self) -> Scores:
        """The norm of each filter, or |W| of each weight: dict like the masks, on the CPU."""
        weights = {name: w.detach().float() for name, w in self.weights.items()}
        if self.unstructured:
            return {name: w.abs().cpu() for name, w in weights.items()}
        return {name: w.flatten(1).norm(self.norm, 1).cpu() for name, w in weights.items()}

    def smallest(self, sizes: Scores, grown: float = 1.0) -> Masks:
        """Masks without the smallest: ⌈share · size⌉ of a layer, at `grown` of the full share."""
        whole: Any = self.reduction
        some = isinstance(whole, dict)
        share = {n: part * grown for n, part in whole.items()} if some else whole * grown
        return masks_for_ratio(self.graph, None, share, sizes)

    def kept(self, name: str) -> torch.Tensor:
        """Where `masks` keeps a layer, bool, shaped to multiply its weight and on its device."""
        keep = self.masks[name] = self.masks[name].to(self.weights[name].device)  # moved once
        return keep if self.unstructured else keep[:, None, None, None]

    def __call__(self) -> torch.Tensor:
        return torch.zeros((), device=next(iter(self.weights.values())).device)

    def step(self, iteration: int) -> None:
        self.iteration = iteration

    def state_dict(self) -> dict:
        return moved({key: getattr(self, key) for key in self.STATE}, "cpu", copy=True)

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(moved({key: state[key] for key in self.STATE}, "cpu", copy=True))

    def identity(self) -> Any:
        about: dict[str, Any] = {"penalty": type(self).__name__, "layers": [*self.weights]}
        about |= self.settings | {"reduction": self.reduction}
        for key, value in self.state_dict().items():
            about[key] = digest(value.items()) if isinstance(value, dict) else value
        return about

    def parameters(self) -> Iterable[torch.Tensor]:
        return self.weights.values()


def conv_weights(graph: ChannelGraph) -> dict[str, Any]:
    """The weight of each convolution, by its name."""
    return {name: m.weight for name, m in graph.modules.items() if isinstance(m, nn.Conv2d)}


def filter_weights(graph: ChannelGraph, norms: Iterable[str]) -> dict[str, Any]:
    """The weight whose filters each of the BatchNorms `norms` stands behind, where there is one."""
    convs, before = conv_weights(graph), graph.conv_before
    return {norm: convs[before[norm]] for norm in norms if before.get(norm) in convs}


def _weights(graph: ChannelGraph, unstructured: bool) -> dict[str, Any]:
    there = conv_weights(graph) if unstructured else filter_weights(graph, graph.prunable_norms())
    if not there:
        raise ValueError(NOTHING)
    return there
