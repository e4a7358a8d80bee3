"""Recovery curves: what each method's cut costs, and how much repair brings it back.

    python -m tools.evidence data/reference/recovery-cifar10.yml --dataset PATH -p seed 0

The YAML file holds every number. Each measurement is a row of the CSV file beside the YAML; what is
there already is not measured again, and trainings resume where they were killed.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from torch import nn

import mslib as ms
from mslib.files import replacing

KEY = ["depth", "seed", "reduction", "method", "images", "taught", "station"]
METHODS = ("one-shot", "masked", "greg-1", "global", "masked-global", "greg-2", "flow")
RELATIVES = ("trainability", "incremental", "shrinkage")  # of lesson 10
FILTERS = ("greg-1", "greg-2", *RELATIVES)  # methods with a penalty on filters
EVERY = (*METHODS, *RELATIVES, "scratch", "dense")
DEEPER = ("one-shot", "masked", "greg-1")  # also with few images and with a teacher
OPEN = 0.01  # |γ| above which a channel is not silent
Masks = dict[str, torch.Tensor]


class Table:
    """The measurements so far, a row each, in a CSV file that is always whole."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = pd.read_csv(path).to_dict("records") if path.exists() else []
        self.known = {tuple(str(row[name]) for name in KEY) for row in self.rows}

    def has(self, **key: Any) -> bool:
        return tuple(str(key[name]) for name in KEY) in self.known

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.known.add(tuple(str(row[name]) for name in KEY))
        with replacing(self.path) as beside:
            pd.DataFrame(self.rows).to_csv(beside, index=False)
        shown = {name: row[name] for name in (*KEY, "test", "test_recalibrated")}
        print(*shown.values(), flush=True)


class Recovery:
    """One seed and one reduction of the protocol `s`."""

    def __init__(self, s: dict[str, Any], data: ms.Data, table: Table, runs: Path):
        self.s, self.data, self.table = s, data, table
        self.shared = runs / f"resnet{s['depth']}-seed{s['seed']}"
        self.runs = self.shared / f"{s['reduction']}"
        self.prepared: dict[str, tuple[nn.Module, Masks]] = {}

    def baseline(self) -> nn.Module:
        torch.manual_seed(self.s["seed"])
        net = ms.resnet(self.s["depth"], len(self.data.classes))
        self.fit(net, self.s["epochs"], self.shared / "baseline", lr=self.s["lr"])
        return net

    def fit(self, net: nn.Module, epochs: int, run: Path, **changed: Any) -> None:
        usual = {"lr": self.s["repair_lr"], "data": self.data, "seed": self.s["seed"]}
        ms.fit(net, epochs=epochs, run=run, **usual | changed)

    def cut(self, net: nn.Module, scores: dict[str, torch.Tensor] | None = None) -> Masks:
        want = {"reduction": self.s["reduction"], "floor": self.s["floor"], "scores": scores}
        return ms.masks_for_macs(net, self.data.example, **want)

    def uniform(self) -> Masks:
        """Every layer loses the same share, its filters of smallest L1 norm."""
        net = self.baseline()
        graph = ms.ChannelGraph(net, self.data.example)
        return self.cut(net, ms.ranked_scores(graph, ms.filter_norms(graph)))

    def prepare(self, method: str) -> tuple[nn.Module, Masks]:
        """The network before the cut, and what will be cut."""
        if method in self.prepared:
            return self.prepared[method]
        s, net, example = self.s, self.baseline(), self.data.example
        steps = s["prepare"] * ms.steps_per_epoch(self.data.train, 128)
        rates = ms.learning_rates(s["repair_lr"], steps)
        reach = ms.push(1.0, s["repair_lr"], steps)
        penalty: Any = None
        masks: Any = None  # until it is known what to cut
        run = self.runs / method
        if method == "global":
            penalty, run = ms.GlobalL1(net, example, s["global_push"] / reach), self.shared / method
        elif method == "masked-global":
            masks = self.prepare("global")[1]
            penalty = ms.MaskedL1(net, masks, s["masked_push"] / reach)
        elif method == "flow":
            penalty, run = ms.FeatureFlow(net, s["flow_length"]), self.shared / method
        else:
            masks = self.uniform()
        if method == "masked":
            penalty = ms.MaskedL1(net, masks, s["masked_push"] / reach)
        elif method in FILTERS:
            penalty = self.on_filters(method, net, masks, rates)
        if penalty:
            self.fit(net, s["prepare"], run, penalty=penalty)
        if method in ("greg-2", "incremental", "shrinkage"):  # they choose on the way
            masks = penalty.masks
        elif method == "global":
            masks = self.cut(net)
        elif method == "flow":
            masks = self.cut(net, ms.outgoing_norms(net, example))
        self.prepared[method] = net, masks
        return net, masks

    def on_filters(self, method: str, net: nn.Module, masks: Masks, rates: Any) -> ms.Penalty:
        """A penalty on filters: on those that `masks` drop, or as many of its own choice."""
        s, example = self.s, self.data.example
        share = {name: float((~keep).float().mean()) for name, keep in masks.items()}
        if method == "shrinkage":
            return ms.SoftShrinkage(net, example, reduction=share)
        grow: Any = partial(ms.GrowingL2.pace, rates, s["growing_ceiling"])
        if method == "greg-2":
            pace = grow(exponent=s["growing_exponent"])
            return ms.GrowingL2(net, example, reduction=share, **pace)
        pace = grow()
        if method == "incremental":
            pace["delta"] *= s["incremental_speed"]
            return ms.Incremental(net, example, reduction=share, **pace)
        if method == "trainability":
            return ms.Trainability(net, example, masks, gram=s["trainability_gram"], **pace)
        return ms.GrowingL2(net, example, masks, **pace)

    def small(self, method: str, fold: bool = True) -> nn.Module:
        net, masks = self.prepare(method)
        return ms.prune(net, masks, self.data.example, fold_bias=fold)

    def measure(self, net: nn.Module, method: str, station: str, **more: Any) -> None:
        """Add the row of `net`: as it is, and with new statistics of its BatchNorms."""
        s, data = self.s, self.data
        size = ms.cost(net, data.example)
        row = {name: s[name] for name in ("depth", "seed", "reduction")}
        row |= {"method": method, "images": 1.0, "taught": False, "station": station} | more
        row |= {"macs": size.macs, "params": size.params}
        row |= {"held_out": ms.evaluate(net, data.val), "test": ms.evaluate(net, data.test)}
        ms.recalibrate(net, data.train)
        row["held_out_recalibrated"] = ms.evaluate(net, data.val)
        row["test_recalibrated"] = ms.evaluate(net, data.test)
        self.table.add(row | {"dataset": data.name} | ms.environment())

    def wanted(self, method: str, station: Any, images: float = 1.0, taught: bool = False) -> bool:
        s = self.s
        key = {"depth": s["depth"], "seed": s["seed"], "reduction": s["reduction"]}
        key |= {"method": method, "station": station, "images": images, "taught": taught}
        return not self.table.has(**key)

    def at_the_cut(self, method: str) -> None:
        if self.wanted(method, "before"):
            net, masks = self.prepare(method)
            found = ms.gammas(net, self.data.example)
            gammas = torch.cat([found[name][~keep] for name, keep in masks.items()])
            counts = {"dropped": len(gammas), "dropped_open": int((gammas > OPEN).sum())}
            self.measure(copy.deepcopy(net), method, "before", **counts)
        for station, fold in (("cut", False), ("folded", True)):
            if self.wanted(method, station):
                self.measure(self.small(method, fold), method, station)

    def repaired(self, method: str, epochs: int, images: float = 1.0, taught: bool = False) -> None:
        """Train the folded cut on; with a share of the images for as many steps, or a teacher."""
        if not self.wanted(method, str(epochs), images, taught):
            return
        net, data, more = self.small(method), self.data, {}
        if images < 1:
            order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
            few = order[: round(images * len(order))]  # seen again and again in an epoch
            train = data.train.subset(few.repeat(round(1 / images))[: len(order)])
            more["data"] = ms.Data(data.name, train, data.val, data.test, data.classes)
        if taught:
            more["teacher"] = self.baseline()
        name = f"{method}-{epochs}" + f"-{images}" * (images < 1) + "-taught" * taught
        self.fit(net, epochs, self.runs / name, **more)
        self.measure(net, method, str(epochs), images=images, taught=taught)

    def dense(self) -> None:
        """The control that is never cut, trained on for as long."""
        last = self.s["prepare"] + self.s["repairs"][-1]
        for station in (0, last):
            if self.wanted("dense", str(station)):
                net = self.baseline()
                if station:
                    self.fit(net, station, self.shared / f"dense-{station}")
                self.measure(net, "dense", str(station))

    def scratch(self, taught: bool = False) -> None:
        """The control of the same widths, trained from nothing for all epochs."""
        s = self.s
        total = s["epochs"] + s["prepare"] + s["repairs"][-1]
        if self.wanted("scratch", str(total), taught=taught):
            torch.manual_seed(s["seed"])
            net = ms.untrained(self.small("one-shot"))
            more = {"teacher": self.baseline()} if taught else {}
            self.fit(net, total, self.runs / ("scratch" + "-taught" * taught), lr=s["lr"], **more)
            self.measure(net, "scratch", str(total), taught=taught)

    def steps(self) -> Iterator[tuple[str, Any]]:
        """Everything that is measured, each with its method, the most telling first."""
        *early, last = self.s["repairs"]
        for method in METHODS:
            yield method, partial(self.at_the_cut, method)
            for epochs in early:
                yield method, partial(self.repaired, method, epochs)
        for method in METHODS:
            yield method, partial(self.repaired, method, last)
        for method in RELATIVES:
            yield method, partial(self.at_the_cut, method)
            for epochs in self.s["repairs"]:
                yield method, partial(self.repaired, method, epochs)
        yield "one-shot", partial(self.repaired, "one-shot", self.s["prepare"] + last)
        yield "scratch", self.scratch
        yield "dense", self.dense
        for method, share in itertools.product(DEEPER, self.s["few"]):
            yield method, partial(self.repaired, method, 4, images=share)
        for method, epochs in itertools.product(DEEPER, self.s["repairs"][1:]):
            yield method, partial(self.repaired, method, epochs, taught=True)
        yield "scratch", partial(self.scratch, taught=True)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the YAML file of the protocol")
    parser.add_argument("--dataset", default="cifar10", help="as of ms.load_data")
    parser.add_argument("--methods", nargs="+", choices=EVERY, default=EVERY, help="only these")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("-p", nargs="+", action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args(words)
    settings = yaml.safe_load(options.file.read_text(encoding="utf-8"))
    for name, *values in options.p:
        if name not in settings:
            parser.error(f"-p {name}: {options.file} has no such setting; it has {[*settings]}")
        read = [yaml.safe_load(value) for value in values]
        settings[name] = read if isinstance(settings[name], list) else read[0]
    data, table = ms.load_data(options.dataset), Table(options.file.with_suffix(".csv"))
    for seed, reduction in itertools.product(settings["seed"], settings["reduction"]):
        point = settings | {"seed": seed, "reduction": reduction}
        began = time.monotonic()
        for method, step in Recovery(point, data, table, options.runs).steps():
            if method in options.methods:
                step()
        print(
            f"seed {seed}, {reduction:.0%}: {(time.monotonic() - began) / 60:.0f} min", flush=True
        )


if __name__ == "__main__":
    main()
