"""Growing regularization: an L2 penalty whose factor grows, filter by filter (GReg-1, GReg-2; Wang et al., ICLR 2021)."""

import pandas as pd
import torch
from torch import nn

from ..pruning.channels import as_graph
from ..pruning.maskfiles import fingerprint
from ..pruning.masks import check_masks, masks_for_ratio
from ..training.loop import MOMENTUM
from .gamma import Penalty


class GrowingL2(Penalty):
    """½·Σ r·‖W‖² with a factor r of its own for each filter (or each weight), which grows while the network trains.

    Give one of the two:
    `masks` (GReg-1, section 3.2): what is to go is known. Every `every` iterations r of the dropped filters grows by
    `delta`, layer by layer, until it is above `ceiling` or the kept filters are `enough` times as large as the dropped
    ones; then it is held. `start=ceiling` is the one-shot counterpart: full strength from the first iteration.
    `reduction` (GReg-2, section 3.3): r of *all* filters grows by `pick_delta` until it is `pick_ceiling`: filters in
    flat directions of the loss shrink faster. The smallest are then picked as in `masks_for_ratio`, and pushed as in
    GReg-1; the kept ones get the constant factor `kept` (0, or -1e-4 as in the released code, to let them recover).

    Masks of channels (by BatchNorm name) stand for the filters that write them; masks of weights (by convolution, shaped
    like its weights) for single weights. `unstructured`: let GReg-2 pick single weights.
    Defaults are the released settings for CIFAR but for `kept`, made for 100,000 iterations: a short run needs a larger `delta`.

    `masks` (None before GReg-2 has picked), `history`: a row an update; `magnitudes()`: of every filter.
    All are part of `state_dict`, and kept with a run.
    Raises ValueError for settings out of range, or masks that do not fit the network.
    """

    def __init__(
        self,
        model,
        example,
        masks=None,
        *,
        reduction=None,
        unstructured=False,
        delta=1e-4,
        every=10,
        ceiling=1.0,
        start=0.0,
        enough=1000.0,
        pick_delta=1e-5,
        pick_ceiling=1e-2,
        kept=0.0,
    ):
        if (masks is None) == (reduction is None):
            raise ValueError(
                "give masks (GReg-1: what is to go is known) or reduction (GReg-2: it is picked on the way)"
            )
        for name, value in {
            "delta": delta,
            "every": every,
            "ceiling": ceiling,
            "enough": enough,
            "pick_delta": pick_delta,
            "pick_ceiling": pick_ceiling,
        }.items():
            if not value > 0:
                raise ValueError(f"{name}={value}: it must be above 0")
        name, first = ("start", start) if reduction is None else ("pick_ceiling", pick_ceiling)
        if not 0 <= first <= ceiling:
            raise ValueError(f"{name}={first}: it lies between 0 and ceiling={ceiling}")
        self.settings = {
            "reduction": reduction,
            "delta": delta,
            "every": every,
            "ceiling": ceiling,
            "start": start,
            "enough": enough,
            "pick_delta": pick_delta,
            "pick_ceiling": pick_ceiling,
            "kept": kept,
        }
        self.graph, self.masks = as_graph(model, example), masks
        self.weights = _weights(self.graph, masks, unstructured)  # mask name -> parameter
        self.units = {
            name: w.shape if unstructured or masks and masks[name].ndim > 1 else w.shape[:1]
            for name, w in self.weights.items()
        }
        if reduction is not None:
            masks_for_ratio(
                self.graph, None, reduction, self.scores()
            )  # refuses a bad reduction now, not in an hour
        self.factors = {name: torch.zeros(shape) for name, shape in self.units.items()}
        self.ratios, self.held, self.rows, self.seen = {}, {}, [], []
        if masks is not None:
            for name, keep in masks.items():
                self.factors[name][~keep.cpu()] = start

    @staticmethod
    def pace(rates, ceiling=1.0, every=10, exponent=None):
        """Settings of this class that fit a run of learning rates `rates` (float [iterations]), where the released are too slow.

        r grows to `ceiling` in 60 % of the run and is held for the rest. `exponent`: for GReg-2, which judges in the first
        third of the growing: there the common factor shrinks a weight that nothing holds to about exp(-exponent). A dict.
        """
        if exponent is not None and not exponent > 0:
            raise ValueError(f"exponent={exponent}: it must be above 0, for example 4")
        updates = max(2, int(0.6 * len(rates) / every))
        if exponent is None:
            return {"every": every, "delta": ceiling / updates, "ceiling": ceiling}
        judging = max(1, updates // 3)
        pull = rates[: judging * every] / (
            1 - MOMENTUM
        )  # what r = 1 takes off log |W|, iteration by iteration
        common = min(ceiling, exponent / float((pull * torch.linspace(0, 1, len(pull))).sum()))
        return {
            "every": every,
            "delta": ceiling / (updates - judging),
            "ceiling": ceiling,
            "pick_ceiling": common,
            "pick_delta": common / judging,
        }

    def __repr__(self):
        given = ", ".join(f"{k}={v}" for k, v in self.settings.items() if v is not None)
        goes = (
            ""
            if self.masks is None
            else f"{sum(int((~m).sum()) for m in self.masks.values())} to go {fingerprint(self.masks)}, "
        )
        what = "filters" if all(len(u) == 1 for u in self.units.values()) else "weights"
        return f"GrowingL2({sum(u.numel() for u in self.units.values())} {what}, {goes}{given})"

    @property
    def layers(self):
        return list(self.weights)

    @property
    def history(self):
        """iteration, factor (the largest), mean |W| of the kept and of the dropped (before a pick: of the smallest), picked."""
        return pd.DataFrame(self.rows)

    def magnitudes(self, layer=None):
        """Mean |W| of every filter, of one layer or of all of them in the order of `layers`: float [updates, filters]."""
        sizes = [len(w) for w in self.weights.values()]
        parts = torch.stack(self.seen).float().split(sizes, 1)
        return torch.cat(parts, 1) if layer is None else parts[self.layers.index(layer)]

    def scores(self):
        """Mean |W| of each filter, or |W| of each weight: dict like the masks, on the CPU."""
        return {name: _size(w, self.units[name]).cpu() for name, w in self.weights.items()}

    def __call__(self):
        total = 0
        for name, w in self.weights.items():
            factor = self.factors[name] = self.factors[name].to(w.device)
            total = (
                total + (factor.reshape(factor.shape + (1,) * (w.ndim - factor.ndim)) * w**2).sum()
            )
        return total / 2

    @torch.no_grad()
    def step(self, iteration):
        """Let the factors grow, every `every` iterations; to be called before each iteration, as `fit` does."""
        s = self.settings
        if iteration % s["every"]:
            return
        sizes = {
            name: _size(w, self.units[name]) for name, w in self.weights.items()
        }  # these and `there` on the weights' device
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
        self.factors[name] = self.factors[name].to(keep.device)
        self.factors[name][~keep] += s["delta"]
        ratio = float(size[keep].mean() / size[~keep].mean().clamp(min=1e-30))
        self.ratios[name] = (
            0.9 * self.ratios[name] + 0.1 * ratio if name in self.ratios else ratio
        )  # as released
        if self.ratios[name] >= s["enough"] or float(self.factors[name].max()) > s["ceiling"]:
            self.held[name] = True

    def _remember(self, iteration, sizes, masks):
        kept = torch.cat([sizes[n][masks[n]] for n in sizes]).mean()
        dropped = torch.cat([sizes[n][~masks[n]] for n in sizes]).mean()
        factor = max(float(f.max()) for f in self.factors.values())
        self.rows.append(
            {
                "iteration": iteration,
                "factor": factor,
                "kept": float(kept),
                "dropped": float(dropped),
                "picked": self.masks is not None,
            }
        )
        self.seen.append(
            torch.cat([_size(w, w.shape[:1]) for w in self.weights.values()]).half().cpu()
        )

    def state_dict(self):
        return {
            "factors": {n: f.cpu() for n, f in self.factors.items()},
            "masks": self.masks,
            "ratios": self.ratios,
            "held": self.held,
            "rows": self.rows,
            "seen": self.seen,
        }

    def load_state_dict(self, state):
        for key, value in state.items():
            setattr(self, key, value)


def _size(w, unit):
    w = w.detach().abs().float()
    return w if len(unit) > 1 else w.flatten(1).mean(1)


def _weights(graph, masks, unstructured):
    """Mask name -> the convolution's weight that it speaks of."""
    modules, writer = graph.modules, graph.conv_before
    if masks is None and unstructured:
        masks = {n: None for n, m in modules.items() if isinstance(m, nn.Conv2d)}
    elif masks is None:
        masks = dict.fromkeys(n for n in graph.prunable_norms() if n in writer)
    else:
        check_masks(graph, {n: m for n, m in masks.items() if m.ndim == 1})
    found = {}
    for name, mask in masks.items():
        conv = name if isinstance(modules.get(name), nn.Conv2d) else writer.get(name)
        if conv is None:
            raise ValueError(
                f"mask for {name!r}: no convolution of that name, and none right before such a BatchNorm"
            )
        if mask is not None and mask.ndim > 1 and mask.shape != modules[conv].weight.shape:
            raise ValueError(
                f"mask for {name!r} has shape {list(mask.shape)}; its weights {list(modules[conv].weight.shape)}"
            )
        found[name] = modules[conv].weight
    return found
