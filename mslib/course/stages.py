"""The stages of the course: what a finished lesson leaves behind, and how one is recorded."""

import hashlib
import re
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..costs import cost
from ..data.sources import KNOWN, dataset_identity, load_data
from ..data.tensors import Data
from ..files import ROOT, is_checkout, nearest, read_json, read_tensors, write_json
from ..networks import load
from ..pruning.maskfiles import load_masks
from ..training.loop import evaluate
from ..training.runs import environment, read_history
from .settings import Config, config

NEEDS: dict[str, tuple[str, ...]] = {
    "00_start_here": (),
    "01_baseline": (),
    "02_global_sparsity": ("01_baseline",),
    "03_masked_regularization": ("01_baseline", "02_global_sparsity"),
    "04_pruning": ("02_global_sparsity", "03_masked_regularization"),
    "05_finetune": ("04_pruning",),
    "06_growing_regularization": ("01_baseline",),
    "07_feature_flow": ("01_baseline",),
    "08_method_comparison": ("01_baseline", "02_global_sparsity"),
    "09_your_own_network": (),
    "10_the_family": (),
    "11_your_own_penalty": (),
    "12_which_method": ("01_baseline",),
}
ROW: dict[str, Any] = {"name": str, "top1": (int, float), "macs": int, "params": int, "epochs": int}
UNFIT = re.compile(r"""[/\\:*?"<>|{\x00-\x1f]|^\.|[. ]$""")  # for the name of a folder


class Results:
    """What one lesson left behind: a folder with a run folder a training, masks and networks.

    Its metrics.json was written last: it marks the lesson as finished. The folder may lie anywhere.
    """

    def __init__(self, lesson: str, path: str | Path, settings: dict[str, Any]):
        self.lesson, self.path, self.settings = lesson, Path(path), settings

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        m, s = self.metrics, self.settings
        if "own_network" in s:
            network, epochs, lr = s["own_network"], s["own_epochs"], s["own_lr"]
        else:
            depth = s.get("depth", s.get("family_depth"))
            network, epochs, lr = f"ResNet-{depth}", s["epochs"], s["lr"]
        return (
            f"{self.lesson}: {s['dataset']}, {network}, {epochs} epochs at lr {lr:g}, "
            f"batch {s['batch_size']}, seed {s['seed']}; "
            f"measured {m['date']} on {m['hardware']}, torch {m['torch']}"
        )

    @property
    def finished(self) -> bool:
        return (self.path / "metrics.json").exists()

    @property
    def metrics(self) -> dict[str, Any]:
        """What the lesson measured. ValueError that names the file if it is damaged."""
        path = self.path / "metrics.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{self.lesson} is not finished in {self.path}; "
                f"ms.require({self.lesson!r}, cfg) runs it"
            )
        remedy = f"delete the whole folder {self.path}, and run the lesson again"
        try:
            found = read_json(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}); {remedy}") from None
        if wrong := _misshapen(found):
            raise ValueError(f"{path} does not hold the results of a lesson: {wrong}; {remedy}")
        return found

    @property
    def rows(self) -> pd.DataFrame:
        """A row a measured network: name, top1 (percent, test images), macs, params, epochs."""
        return pd.DataFrame(self.metrics["rows"])

    def top1(self, name: str) -> float:
        """Test top-1 in percent of the row called `name`; ValueError if there is none."""
        found = {row["name"]: row["top1"] for row in self.metrics["rows"]}
        if name not in found:
            raise ValueError(f"{self.path} has no row {name!r}" + nearest(name, found))
        return float(found[name])

    @property
    def minutes(self) -> float:
        """Minutes that the trainings of this stage took, all together."""
        return sum(map(_seconds, self.path.glob("*/history.json"))) / 60

    def history(self, run: str) -> pd.DataFrame:
        return read_history(self.path / run)

    def gammas(self, run: str) -> torch.Tensor:
        """|γ| of each channel, before training and after every epoch, [epochs + 1, channels]."""
        return read_tensors(self.path / run / "gammas.pt")

    def model(self, name: str) -> nn.Module:
        """A new copy of the network that training `name` ended with, or that lies in <name>.pt."""
        run = self.path / name / "model.pt"
        return load(run if run.exists() else self.path / f"{name}.pt")

    def masks(self) -> dict[str, torch.Tensor]:
        return load_masks(self.path / "masks.pt")


class Stage(Results):
    """Results in the making: `report` and `finish` may be called again, as cells are executed."""

    def __init__(self, lesson: str, path: str | Path, settings: dict[str, Any]):
        super().__init__(lesson, path, settings)
        self._reported: dict[str, dict[str, Any]] = {}  # by name: a second report takes the place

    def report(self, name: str, model: nn.Module, data: Data, epochs: int) -> float:
        """Measure `model` on the test images as the row `name`; `epochs`: all that it was trained.

        Returns its top-1 in percent.
        """
        price = cost(model, data.example)
        top1 = evaluate(model, data.test)
        row = {"name": name, "top1": top1, "macs": price.macs, "params": price.params}
        self._reported[name] = row | {"epochs": int(epochs)}
        return top1

    def finish(self, **extra: Any) -> None:
        """Write metrics.json: the rows, `extra`, the settings, where and when it was measured."""
        rows = list(self._reported.values())
        measured = {"rows": rows, **extra, "settings": self.settings} | environment()
        write_json(self.path / "metrics.json", measured)


def stage(lesson: str, cfg: Config) -> Stage:
    """The stage of `lesson` (such as "01_baseline") for `cfg`.

    Its folder is runs/<preset>/<lesson>, followed by the settings that the lesson depends on and
    that differ from the preset: changing one starts a new folder, and earlier results stay in use.
    Raises ValueError for an unknown lesson, or a folder with results of other settings or images.
    """
    found = place(lesson, cfg)
    if found.finished:
        have, settings = found.metrics["settings"], found.settings
        differ = [k for k in sorted({*have, *settings}) if have.get(k) != settings.get(k)]
        if differ:
            told = ", ".join(f"{k}={have.get(k)!r} (now {settings.get(k)!r})" for k in differ)
            raise ValueError(
                f"{found.path} holds a run made with other settings: {told}; give another folder "
                "by `runs`, or move this one away as a whole"
            )
    return found


def place(lesson: str, cfg: Config) -> Stage:
    """The stage of `lesson` for `cfg`, whatever its folder holds."""
    if lesson not in NEEDS:
        raise ValueError(f"unknown lesson {lesson!r}; known: {', '.join(NEEDS)}")
    number = int(lesson[:2])
    settings, usual = cfg.up_to(number), config(cfg.preset).up_to(number)
    changed = [f"{k}={v}" for k, v in settings.items() if v != usual.get(k)]
    if settings:
        settings["images"] = dataset_identity(cfg.dataset, cfg.image_size)
    if cfg.dataset not in KNOWN and settings:
        changed.append(f"images={settings['images']}")  # two folders may have one name
    name = ",".join([lesson, *changed])
    if len(name) > 100 or UNFIT.search(name):  # metrics.json has the settings in full
        name = f"{lesson},{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return Stage(lesson, home() / cfg.runs / cfg.preset / name, settings)


def home() -> Path:
    """Where runs/ lies: the checkout of the course, or, without one, the working folder."""
    return ROOT if is_checkout() else Path.cwd()


def needs_checkout(what: str) -> None:
    """FileNotFoundError that says how to get the lessons, where they are not."""
    if not is_checkout():
        raise FileNotFoundError(
            f"{what} needs the course's notebooks, which the installed package does not hold; "
            "get them by `git clone https://github.com/mslib-course/mslib`, and run this there"
        )


def data_of(cfg: Config) -> Data:
    """The images of a configuration."""
    return load_data(cfg.dataset, cfg.val, cfg.image_size, (cfg.train_size, cfg.test_size))


def _seconds(path: Path) -> float:
    """What a training took, from its history.json."""
    seconds = read_json(path).get("seconds")
    if not isinstance(seconds, int | float):
        raise ValueError(f"{path} is damaged: its seconds are {str(seconds)[:40]!r}")
    return seconds


def _misshapen(metrics: Any) -> str | None:
    """What is wrong with the content of a metrics.json, or None."""
    if not isinstance(metrics, dict):
        return f"it is a {type(metrics).__name__}"
    for key, kind in {"rows": list, "settings": dict}.items():
        if not isinstance(metrics.get(key), kind):
            return f"{key!r} is {str(metrics.get(key))[:40]!r}"
    for row in metrics["rows"]:
        if not isinstance(row, dict) or not all(isinstance(row.get(k), t) for k, t in ROW.items()):
            return f"a row is {str(row)[:60]!r}"
    return None
