"""Growing regularization: an L2 penalty whose factor grows, filter by filter (GReg-1, GReg-2).

Wang et al., ICLR 2021, arXiv 2012.09243.
"""

from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..files import digest
from ..networks import moved
from ..pruning.graph import ChannelGraph, as_graph
from ..pruning.masks import Masks, check_shapes, masks_for_ratio
from ..training.schedules import MOMENTUM
from .base import Penalty
from .filters import conv_weights, filter_weights

SETTINGS = ["reduction", "delta", "every", "ceiling", "start", "enough"]  # of __init__
SETTINGS += ["pick_delta", "pick_ceiling", "kept"]
STATE = ("factors", "masks", "ratios", "held", "rows", "seen")


class GrowingL2(Penalty):
    """½·Σ r·‖W‖² with a factor r for each filter (or each weight), which grows while training.

    Give one of the two:
    masks (GReg-1, section 3.2): what is to go is known. Every `every` iterations r of the dropped
        filters grows by `delta`, layer by layer, until it has reached `ceiling` or the kept filters
        are `enough` times as large as the dropped ones; then it is held. `start=ceiling` is full
        strength from the first iteration.
    reduction (GReg-2, section 3.3): r of *all* filters grows by `pick_delta` until it is
        `pick_ceiling`: filters in flat directions of the loss shrink faster. The smallest are then
        picked as in `masks_for_ratio` and pushed as in GReg-1; the kept ones get the constant
        factor `kept` (0, or -1e-4 as in the released code, to let them recover).

    Masks of channels (by BatchNorm name) stand for the filters that write them; masks of weights
    (by convolution, shaped like its weights) for single weights; `unstructured`: GReg-2 picks them.
    The defaults are the released settings for CIFAR but for `kept`, made for 100,000 iterations: a
    short run needs a larger `delta`, see `pace`.

    Attributes, all kept with a run: `masks` (None before GReg-2 has picked), `factors`, `history`
    (a row an update), `magnitudes()` of every filter.
    Raises ValueError for settings out of range, or masks that do not fit or drop nothing.
    """

    def __init__(
        self,
        model: nn.Module | ChannelGraph,
        example: torch.Tensor | None = None,
        masks: Masks | None = None,
        *,
        reduction: float | dict[str, float] | None = None,
        unstructured: bool = False,
        delta: float = 1e-4,
        every: int = 10,
        ceiling: float = 1.0,
        start: float = 0.0,
        enough: float = 1000.0,
        pick_delta: float = 1e-5,
        pick_ceiling: float = 1e-2,
        kept: float = 0.0,
    ):
        given = locals()
        self.settings = {name: given[name] for name in SETTINGS}
        _check(self.settings, masks)
        self.graph, self.masks = as_graph(model, example), masks
        self.weights = _weights(self.graph, masks, unstructured)  # mask name -> parameter
        self.units = {}  # mask name -> shape of what has a factor of its own
        for name, w in self.weights.items():
            single = unstructured or masks is not None and masks[name].ndim > 1
            self.units[name] = w.shape if single else w.shape[:1]
        if reduction is not None:  # refuses a bad reduction now, not in an hour
            masks_for_ratio(self.graph, None, reduction, self.scores())
        self.factors = {name: torch.zeros(shape) for name, shape in self.units.items()}
        for name, keep in (masks or {}).items():
            self.factors[name][~keep.cpu()] = start
        self.ratios: dict[str, float] = {}  # mask name -> kept over dropped, smoothed
        self.held: dict[str, bool] = {}
        self.rows: list[dict] = []
        self.seen: list[torch.Tensor] = []

    @staticmethod
    def pace(
        rates: torch.Tensor,
        ceiling: float = 1.0,
        every: int = 10,
        exponent: float | None = None,
        share: float = 0.6,
    ) -> dict[str, float]:
        """Settings for a run of learning rates `rates`, float [iterations].

        r grows to `ceiling` in a `share` of the run and is held for the rest. `exponent`: for
        GReg-2, which judges in the first third of the growing: there the common factor shrinks a
        weight that nothing holds to about exp(-exponent).
        """
        if not 0 < share <= 1:
            expected = "the part of the run that grows, above 0 and at most 1"
            raise ValueError(f"share={share}: {expected}")
        if exponent is not None and not exponent > 0:
            raise ValueError(f"exponent={exponent}: it must be above 0, for example 4")
        updates = max(2, int(share * len(rates) / every))
        if exponent is None:
            return {"every": every, "delta": ceiling / updates, "ceiling": ceiling}
        judging = max(1, updates // 3)
        pull = rates[: judging * every] / (1 - MOMENTUM)  # what r = 1 takes off log |W|, each time
        common = min(ceiling, exponent / float((pull * torch.linspace(0, 1, len(pull))).sum()))
        return {
            "every": every,
            "delta": max(ceiling - common, 1e-3 * ceiling) / (updates - judging),  # from `common`
            "ceiling": ceiling,
            "pick_ceiling": common,
            "pick_delta": common / judging,
        }

    def __repr__(self) -> str:
        given = ", ".join(f"{k}={v}" for k, v in self.settings.items() if v is not None)
        what = "filters" if all(len(u) == 1 for u in self.units.values()) else "weights"
        number = sum(shape.numel() for shape in self.units.values())
        return f"GrowingL2({number} {what}, {given})"

    @property
    def layers(self) -> list[str]:
        """Names of the masks, in order."""
        return list(self.weights)

    @property
    def history(self) -> pd.DataFrame:
        """iteration, factor (the largest), kept and dropped (mean |W|; before a pick, of those that
        would be), picked."""
        return pd.DataFrame(self.rows)

    def magnitudes(self, layer: str | None = None) -> torch.Tensor:
        """Mean |W| of every filter, of one layer or all `layers`: float [updates, filters]."""
        sizes = [len(w) for w in self.weights.values()]
        parts = torch.stack(self.seen).float().split(sizes, 1)
        return torch.cat(parts, 1) if layer is None else parts[self.layers.index(layer)]

    def scores(self) -> dict[str, torch.Tensor]:
        """Mean |W| of each filter, or |W| of each weight: dict like the masks, on the CPU."""
        return {name: _size(w, self.units[name]).cpu() for name, w in self.weights.items()}

    def __call__(self) -> torch.Tensor:
        total = 0
        for name, w in self.weights.items():
            factor = self.factors[name] = self.factors[name].to(w.device)
            spread = factor.reshape(factor.shape + (1,) * (w.ndim - factor.ndim))  # like w
            total = total + (spread * w**2).sum()
        return total / 2

    @torch.no_grad()
    def step(self, iteration: int) -> None:
        """Let the factors grow, every `every` iterations; called before each iteration."""
        s = self.settings
        if iteration % s["every"]:
            return
        # sizes and masks on the weights' device
        sizes = {name: _size(w, self.units[name]) for name, w in self.weights.items()}
        masks = self.masks or masks_for_ratio(
            self.graph, None, s["reduction"], {name: size.cpu() for name, size in sizes.items()}
        )
        there = {name: keep.to(sizes[name].device) for name, keep in masks.items()}
        self._remember(iteration, sizes, there)
        for name in self.weights:
            if self.masks is None:
                self.factors[name] += s["pick_delta"]
            elif name not in self.held:
                self._grow(name, sizes[name], there[name])
        highest = max(float(f.max()) for f in self.factors.values())
        if self.masks is None and highest >= s["pick_ceiling"] * (1 - 1e-6):
            self.masks = masks
            for name, keep in masks.items():
                self.factors[name][keep.to(self.factors[name].device)] = s["kept"]

    def _grow(self, name, size, keep):
        s = self.settings
        if keep.all():
            self.held[name] = True
            return
        factor = self.factors[name] = self.factors[name].to(keep.device)
        factor[~keep] += s["delta"]
        ratio = float(size[keep].mean() / size[~keep].mean().clamp(min=1e-30))
        if name in self.ratios:  # smoothed, as in the released code
            ratio = 0.9 * self.ratios[name] + 0.1 * ratio
        self.ratios[name] = ratio
        if ratio >= s["enough"] or float(factor.max()) >= s["ceiling"] * (1 - 1e-5):  # rounding
            self.held[name] = True

    def _remember(self, iteration, sizes, masks):
        row = {
            "iteration": iteration,
            "factor": max(float(f.max()) for f in self.factors.values()),
            "kept": float(torch.cat([sizes[n][masks[n]] for n in sizes]).mean()),
            "dropped": float(torch.cat([sizes[n][~masks[n]] for n in sizes]).mean()),
            "picked": self.masks is not None,
        }
        filters = torch.cat([_size(w, w.shape[:1]) for w in self.weights.values()])
        self.rows.append(row)
        self.seen.append(filters.half().cpu())

    def state_dict(self) -> dict:
        return moved({key: getattr(self, key) for key in STATE}, "cpu", copy=True)

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(moved({key: state[key] for key in STATE}, "cpu", copy=True))

    def identity(self) -> Any:
        masks = self.masks and digest(self.masks.items())
        now = {"factors": digest(self.factors.items()), "ratios": self.ratios, "held": [*self.held]}
        return {"penalty": "GrowingL2", "masks": masks} | self.settings | now

    def parameters(self) -> Iterable[torch.Tensor]:
        return self.weights.values()


def _check(settings, masks):
    if (masks is None) == (settings["reduction"] is None):
        known = "GReg-1: what is to go is known"
        raise ValueError(f"give masks ({known}) or reduction (GReg-2: it is picked on the way)")
    for name in ("delta", "every", "ceiling", "enough", "pick_delta", "pick_ceiling"):
        if not settings[name] > 0:
            raise ValueError(f"{name}={settings[name]}: it must be above 0")
    first = "pick_ceiling" if masks is None else "start"
    if not 0 <= settings[first] <= settings["ceiling"]:
        between = f"it lies between 0 and ceiling={settings['ceiling']}"
        raise ValueError(f"{first}={settings[first]}: {between}")


def _size(w, unit):
    """Mean |W| of each filter, or |W|: float, of shape `unit`."""
    w = w.detach().abs().float()
    return w if len(unit) > 1 else w.flatten(1).mean(1)


def _weights(graph, masks, unstructured):
    """Mask name -> the convolution's weight that it speaks of."""
    convs = conv_weights(graph)
    if masks is None:
        return convs if unstructured else filter_weights(graph, graph.prunable_norms())
    written = filter_weights(graph, graph.conv_before)
    shapes = {n: w.shape for n, w in convs.items()} | {n: w.shape[:1] for n, w in written.items()}
    check_shapes(masks, shapes, "convolution, or BatchNorm right behind one")
    if all(keep.all() for keep in masks.values()):
        raise ValueError("the masks would drop nothing: there is nothing to push to zero")
    for name, keep in masks.items():
        if name in written and not keep.all() and graph.reason(name):
            why = graph.reason(name)
            raise ValueError(f"mask for {name!r} drops channels that cannot be cut: {why}")
    return {name: convs[name] if name in convs else written[name] for name in masks}
