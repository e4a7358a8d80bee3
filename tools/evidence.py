"""Recovery curves: what each method's cut costs, and how much repair brings it back.

    python -m tools.evidence data/reference/recovery-cifar10.yml --dataset PATH -p seed 0

The YAML file holds every number. Each measurement is a row of the CSV file beside the YAML; what is
there already is not measured again, and trainings resume where they were killed. `-p` chooses among
the values of a list; another number, or other images, are another protocol: a copy of the YAML.
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
from torch import nn

import mslib as ms
from mslib.course.cli import read_pairs
from mslib.course.results import read_table
from mslib.course.settings import read_yaml
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

    def __init__(self, path: Path, key: list[str]):
        self.path, self.key = path, key
        table = read_table(path, (*key, "dataset")) if path.exists() else pd.DataFrame()
        self.rows = table.to_dict("records")
        self.known = {self._place(row) for row in self.rows}

    def _place(self, row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self.key)

    def has(self, key: dict[str, Any]) -> bool:
        return self._place(key) in self.known

    def check(self, dataset: str) -> None:
        """ValueError if a row was measured on other images."""
        if others := {str(row["dataset"]) for row in self.rows} - {dataset}:
            raise ValueError(
                f"{self.path} holds measurements on {min(others)}, and this dataset is {dataset}; "
                "copy the YAML file under another name for it"
            )

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.known.add(self._place(row))
        with replacing(self.path) as beside:
            pd.DataFrame(self.rows).to_csv(beside, index=False)
        print(*self._place(row), row["test"], row["test_recalibrated"], flush=True)


class Recovery:
    """One seed and one reduction of the protocol `s`."""

    widths = "one-shot"  # whose widths the control from scratch has

    def __init__(self, s: dict[str, Any], data: ms.Data, table: Table, runs: Path):
        table.check(data.name)
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

    def steps_of(self, epochs: int) -> int:
        return epochs * ms.steps_per_epoch(self.data.train, 128)

    def strength(self, push: float, epochs: int | None = None) -> float:
        """The λ that can move a γ by `push` in the preparation, or in so many epochs."""
        steps = self.steps_of(epochs or self.s["prepare"])
        return push / ms.push(1.0, self.s["repair_lr"], steps)

    def prepare(self, method: str) -> tuple[nn.Module, Masks]:
        """The network before the cut, and what will be cut."""
        if method in self.prepared:
            return self.prepared[method]
        s, net, example = self.s, self.baseline(), self.data.example
        rates = ms.learning_rates(s["repair_lr"], self.steps_of(s["prepare"]))
        penalty: Any = None
        masks: Any = None  # until it is known what to cut
        run = self.runs / method
        if method == "global":
            penalty, run = (
                ms.GlobalL1(net, example, self.strength(s["global_push"])),
                self.shared / method,
            )
        elif method == "masked-global":
            masks = self.prepare("global")[1]
            penalty = ms.MaskedL1(net, masks, self.strength(s["masked_push"]))
        elif method == "flow":
            penalty, run = ms.FeatureFlow(net, s["flow_length"]), self.shared / method
        else:
            masks = self.uniform()
        if method == "masked":
            penalty = ms.MaskedL1(net, masks, self.strength(s["masked_push"]))
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
        data, size = self.data, ms.cost(net, self.data.example)
        row = self.key(method, station) | more | {"macs": size.macs, "params": size.params}
        row |= {"held_out": ms.evaluate(net, data.val), "test": ms.evaluate(net, data.test)}
        ms.recalibrate(net, data.train)
        row["held_out_recalibrated"] = ms.evaluate(net, data.val)
        row["test_recalibrated"] = ms.evaluate(net, data.test)
        self.table.add(row | {"dataset": data.name} | ms.environment())

    def key(self, method: str, station: str) -> dict[str, Any]:
        """What tells a row of the table from the others."""
        point = {name: self.s[name] for name in ("depth", "seed", "reduction")}
        return point | {"method": method, "images": 1.0, "taught": False, "station": station}

    def wanted(self, method: str, station: str, **more: Any) -> bool:
        return not self.table.has(self.key(method, station) | more)

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
        special = {"images": images, "taught": taught} if images < 1 or taught else {}
        if not self.wanted(method, str(epochs), **special):
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
        self.measure(net, method, str(epochs), **special)

    def dense(self, epochs: int) -> None:
        """The control that is never cut, trained on for so long."""
        if self.wanted("dense", str(epochs)):
            net = self.baseline()
            if epochs:
                self.fit(net, epochs, self.shared / f"dense-{epochs}")
            self.measure(net, "dense", str(epochs))

    def scratch(self, taught: bool = False) -> None:
        """The control of the same widths, trained from nothing for all epochs."""
        s = self.s
        total = s["epochs"] + s["prepare"] + s["repairs"][-1]
        special = {"taught": True} if taught else {}
        if self.wanted("scratch", str(total), **special):
            torch.manual_seed(s["seed"])
            net = ms.untrained(self.small(self.widths))
            more = {"teacher": self.baseline()} if taught else {}
            self.fit(net, total, self.runs / ("scratch" + "-taught" * taught), lr=s["lr"], **more)
            self.measure(net, "scratch", str(total), **special)

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
        for epochs in (0, self.s["prepare"] + last):
            yield "dense", partial(self.dense, epochs)
        for method, share in itertools.product(DEEPER, self.s["few"]):
            yield method, partial(self.repaired, method, 4, images=share)
        for method, epochs in itertools.product(DEEPER, self.s["repairs"][1:]):
            yield method, partial(self.repaired, method, epochs, taught=True)
        yield "scratch", partial(self.scratch, taught=True)


def read_protocol(
    words: list[str] | None, about: str, methods: tuple[str, ...]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command's options, and the settings of its YAML file with what `-p` changes."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("file", type=Path, help="the YAML file of the protocol")
    parser.add_argument("--dataset", default="cifar10", help="as of ms.load_data")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, help="only these")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("-p", nargs="+", action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args(words)
    try:
        return options, chosen(options.file, read_pairs(options.p))
    except (ValueError, OSError) as error:
        parser.error(str(error))


def chosen(file: Path, given: dict[str, list[Any]]) -> dict[str, Any]:
    """The settings of `file` with the values `given`.

    Once there are rows, ValueError for what is not among the values of a list: the key of a row
    would not tell it.
    """
    s, path = read_yaml(file), file.with_suffix(".csv")
    measured = path.exists() and len(read_table(path)) > 0
    for name, values in given.items():
        if name not in s:
            raise ValueError(f"-p {name}: {file} has no such setting; it has {[*s]}")
        usual = s[name]
        known = usual if isinstance(usual, list) else [usual]
        if len(values) > 1 and usual is not known:
            raise ValueError(f"-p {name}: expected one value, as in {file}, found {values}")
        others = [value for value in values if value not in known]
        if others and measured:
            raise ValueError(
                f"-p {name} {others[0]}: {path} was measured with {usual}; "
                "copy the YAML file under another name and change it there"
            )
        inside = [value for value in known if value in values]  # in the order of the file
        s[name] = (values if others else inside) if usual is known else values[0]
    return s


def measure_all(protocol: type[Recovery], key: list[str], options: Any, s: dict[str, Any]) -> None:
    """Every step of every seed and reduction that is not in the table."""
    data, table = ms.load_data(options.dataset), Table(options.file.with_suffix(".csv"), key)
    for seed, reduction in itertools.product(s["seed"], s["reduction"]):
        point = s | {"seed": seed, "reduction": reduction}
        began = time.monotonic()
        for method, step in protocol(point, data, table, options.runs).steps():
            if method in options.methods:
                step()
        minutes = (time.monotonic() - began) / 60
        print(f"seed {seed}, {reduction:.0%}: {minutes:.0f} min", flush=True)


def main(words: list[str] | None = None) -> None:
    measure_all(Recovery, KEY, *read_protocol(words, __doc__, EVERY))


if __name__ == "__main__":
    main()
