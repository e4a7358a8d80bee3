"""The lessons as a pipeline: which needs which, where their results lie, and how one runs another."""

import hashlib
from pathlib import Path

import pandas as pd

from ..costs import cost
from ..data.sources import load_data
from ..files import ROOT, read_json, read_tensors, write_json
from ..networks import load
from ..pruning.maskfiles import load_masks
from ..training.loop import evaluate
from ..training.runs import check_settings, environment, read_history
from .settings import config

NEEDS = {
    "00_start_here": (),
    "01_baseline": (),
    "02_global_sparsity": ("01_baseline",),
    "03_masked_regularization": ("01_baseline", "02_global_sparsity"),
    "04_pruning": ("02_global_sparsity", "03_masked_regularization"),
    "05_finetune": ("04_pruning",),
    "06_growing_regularization": ("05_finetune",),
    "07_feature_flow": ("06_growing_regularization",),
    "08_method_comparison": ("01_baseline", "02_global_sparsity"),
    "09_your_own_network": (),
}
REFERENCE = ROOT / "data" / "reference"


class Stage:
    """What one lesson leaves behind: a folder with one run folder a training, masks, networks and metrics.json.

    metrics.json is written last and marks the stage as finished. The folder can be copied to another machine.
    """

    def __init__(self, lesson, path, settings):
        self.lesson, self.path, self.settings, self._rows = lesson, Path(path), settings, []

    def __truediv__(self, name):
        return self.path / name

    def __str__(self):
        m, s = self.metrics, self.settings
        network, epochs, lr = (
            s.get(k, s.get(k.removeprefix("own_"))) for k in ("own_network", "own_epochs", "own_lr")
        )
        network = network or f"ResNet-{s['depth']}"
        return (
            f"{self.lesson}: {s['dataset']}, {network}, {epochs} epochs at lr {lr:g}, batch {s['batch_size']}, "
            f"seed {s['seed']}; measured {m['date']} on {m['hardware']}, torch {m['torch']}"
        )

    @property
    def finished(self):
        return (self.path / "metrics.json").exists()

    @property
    def metrics(self):
        return read_json(self.path / "metrics.json")

    @property
    def rows(self):
        """One row a measured network: name, top1 (percent, test images), macs, params, epochs of training behind it."""
        return pd.DataFrame(self.metrics["rows"])

    def top1(self, name):
        """Test top-1 in percent of the row called `name`."""
        return float(self.rows.set_index("name").top1[name])

    @property
    def minutes(self):
        """Minutes that the trainings of this stage took, all together."""
        return sum(read_json(path)["seconds"] for path in self.path.glob("*/history.json")) / 60

    def history(self, run):
        return read_history(self.path / run)

    def gammas(self, run):
        """|γ| of every BatchNorm channel before training and after each epoch, float16 [epochs + 1, channels]."""
        return read_tensors(self.path / run / "gammas.pt")

    def model(self, name):
        """A fresh copy of the network that training `name` ended with, or that was saved as <name>.pt."""
        run = self.path / name / "model.pt"
        return load(run if run.exists() else self.path / f"{name}.pt")

    def masks(self):
        return load_masks(self.path / "masks.pt")

    def report(self, name, model, data, epochs):
        """Measure `model` for the scoreboard, on the test images; `epochs`: all training behind it. Returns top-1."""
        price = cost(model, data.example)
        row = {
            "name": name,
            "top1": evaluate(model, data.test),
            "macs": price.macs,
            "params": price.params,
            "epochs": int(epochs),
        }
        self._rows.append(row)
        return row["top1"]

    def finish(self, **extra):
        """Write metrics.json: the rows reported, `extra`, the settings, and where and when it was measured."""
        write_json(
            self.path / "metrics.json",
            {"rows": self._rows, **extra, "settings": self.settings} | environment(),
        )


def stage(lesson, cfg):
    """The stage of `lesson` (such as "01_baseline") for `cfg`.

    Its folder is runs/<preset>/<lesson>, followed by the settings that lesson depends on and that differ from the
    preset: changing one starts a new folder beside, and leaves every earlier lesson's results in use.
    """
    if lesson not in NEEDS:
        raise ValueError(f"unknown lesson {lesson!r}; known: {', '.join(NEEDS)}")
    settings = cfg.up_to(int(lesson[:2]))
    preset = config(cfg.preset).up_to(int(lesson[:2]))
    changed = [f"{k}={v}" for k, v in settings.items() if v != preset[k]]
    name = ",".join([lesson, *changed])
    if len(name) > 100 or "{" in name:
        name = f"{lesson},{hashlib.sha256(name.encode()).hexdigest()[:12]}"  # metrics.json has the settings in full
    path = ROOT / cfg.runs / cfg.preset / name
    found = Stage(lesson, path, settings)
    if found.finished:
        check_settings(path, found.metrics["settings"], settings)
    return found


def data_of(cfg):
    """The images of a configuration."""
    return load_data(cfg.dataset, cfg.val, cfg.image_size, (cfg.train_size, cfg.test_size))
