"""Measured and published results: the reference runs that come with the course, and tables of them."""

import shutil

import pandas as pd

from ..files import ROOT, read_json
from .stages import NEEDS, Stage, stage

REFERENCE = ROOT / "data" / "reference"


def reference(name="resnet56-cifar10"):
    """Measured results of a real run, which come with the course: dict[lesson -> Stage], in order.

    `name`: network and images; of the presets in which they were run, the largest is taken. Or a folder's full name
    in data/reference, such as resnet56-cifar10-standard. FileNotFoundError, with what there is, for any other.
    """
    for folder in (
        REFERENCE / name,
        *(REFERENCE / f"{name}-{preset}" for preset in ("full", "standard", "quick")),
    ):
        found = sorted(folder.glob("*/metrics.json"))
        if found:
            return {
                p.parent.name: Stage(p.parent.name, p.parent, read_json(p)["settings"])
                for p in found
            }
    known = sorted(p.name for p in REFERENCE.glob("*") if p.is_dir())
    raise FileNotFoundError(f"no reference {name!r}; there are: {', '.join(known) or 'none'}")


def published(network, dataset="CIFAR-10"):
    """Published results of `network`, a row a method: base and pruned top-1, delta, MACs removed (all percent), source."""
    table = pd.read_csv(ROOT / "data" / "published.csv").set_index("method")
    return table[(table.network == network) & (table.dataset == dataset)]


def scoreboard(stages):
    """One table of every network measured in `stages`: top-1 and what is left of MACs and parameters, in percent.

    Percent of the row "baseline" (or the first), and for names that begin with VGG-16 of "VGG-16: baseline", and so on.
    """
    table = pd.concat([s.rows for s in stages if s.metrics["rows"]], ignore_index=True)
    bases = {"": 0} | {
        n.removesuffix("baseline").rstrip(": "): i
        for i, n in enumerate(table.name)
        if n.endswith("baseline")
    }
    own = [bases[max((b for b in bases if n.startswith(b)), key=len)] for n in table.name]
    whole = table.iloc[own].reset_index(drop=True)
    return pd.DataFrame(
        {
            "network": table.name,
            "top-1 %": table.top1.round(2),
            "MACs M": (table.macs / 1e6).round(2),
            "MACs left %": (100 * table.macs / whole.macs).round(1),
            "params left %": (100 * table.params / whole.params).round(1),
            "epochs": table.epochs,
        }
    )


def keep_reference(name, cfg, lessons):
    """Copy the finished stages of `cfg` to data/reference/<name>; of the weights, the baseline and the final network."""
    if not any(stage(lesson, cfg).finished for lesson in lessons):
        raise FileNotFoundError(
            f"no lesson of this run is finished, {', '.join(lessons)}; run it first: python -m mslib run"
        )
    for lesson in lessons:
        gammas = "gammas.pt" if lesson > "05" else ""  # which no lesson draws
        heavy = (
            "images",
            "imagenet",
            "*.onnx",
            "before.pt",
            "pruned*.pt",
            "penalty.pt",
            "model.pt",
            "epoch-*.pt",
        )
        left_out = shutil.ignore_patterns(".*", "log.txt", *heavy, gammas)
        found = stage(lesson, cfg)
        if found.finished:
            shutil.copytree(
                found.path, REFERENCE / name / lesson, dirs_exist_ok=True, ignore=left_out
            )
            if lesson == "01_baseline":
                shutil.copy(found / "baseline" / "model.pt", REFERENCE / name / lesson / "baseline")
    kept = reference(name)
    if {name for name in NEEDS if "01" <= name < "06"} <= kept.keys():
        from . import plots

        plots.result(kept, REFERENCE / name / "result.png")
