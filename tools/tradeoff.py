"""The trade-off of sparsity: what a stronger penalty costs before the cut, and saves at it.

    python -m tools.tradeoff data/reference/tradeoff-cifar10.yml --dataset PATH -p seed 0

Global and masked sparsity at several strengths each, from the baselines of the recovery curves.
*masked* has the masks of one global run, that of `mask_push`. *global-twice* trains for as many
epochs as these two together; λ is its push spread over them. What is measured already is not
measured again, and trainings resume, as in `tools.evidence`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

import mslib as ms

from .evidence import Masks, Recovery, measure_all, read_protocol

KEY = ["depth", "seed", "reduction", "method", "push", "station"]
METHODS = ("global", "masked", "global-twice", "scratch", "dense")


class Tradeoff(Recovery):
    """One seed and reduction: all its `steps`, or with the setting `push` one strength alone."""

    widths = "masked"

    def key(self, method: str, station: str) -> dict[str, Any]:
        point = {name: self.s[name] for name in ("depth", "seed", "reduction")}
        push = 0.0 if method in ("scratch", "dense") else self.s["push"]
        return point | {"method": method, "push": push, "station": station}

    def at(self, push: float) -> "Tradeoff":
        """The same at one strength."""
        arm = Tradeoff(self.s | {"push": float(push)}, self.data, self.table, self.shared.parent)
        arm.runs = arm.runs / f"push-{push:g}"
        return arm

    def prepare(self, method: str) -> tuple[nn.Module, Masks]:
        if method not in self.prepared:
            s, net, example = self.s, self.baseline(), self.data.example
            if method == "masked":
                masks = self.at(s["mask_push"]).prepare("global")[1]
                penalty: ms.Penalty = ms.MaskedL1(net, masks, self.strength(s["push"]))
                self.fit(net, s["prepare"], self.runs / method, penalty=penalty)
            else:
                epochs = s["prepare"] * (1 + (method == "global-twice"))
                penalty = ms.GlobalL1(net, example, self.strength(s["push"], epochs))
                self.fit(net, epochs, self.shared / f"{method}-push-{s['push']:g}", penalty=penalty)
                masks = self.cut(net)
            self.prepared[method] = net, masks
        return self.prepared[method]

    def steps(self) -> Iterator[tuple[str, Any]]:
        *early, last = self.s["repairs"]
        arms = [(m, push) for m in METHODS[:3] for push in self.s[f"{m}_push"]]
        for method, push in arms:
            yield method, partial(self.at(push).at_the_cut, method)
        for epochs in (0, self.s["prepare"]):
            yield "dense", partial(self.dense, epochs)
        for epochs in (*early, last):
            for method, push in arms:
                yield method, partial(self.at(push).repaired, method, epochs)
        yield "dense", partial(self.dense, self.s["prepare"] + last)
        yield "scratch", self.at(self.s["masked_push"][0]).scratch


def main(words: list[str] | None = None) -> None:
    measure_all(Tradeoff, KEY, *read_protocol(words, __doc__, METHODS))


if __name__ == "__main__":
    main()
