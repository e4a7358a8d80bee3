"""The lessons as a pipeline: which needs which, where their results lie, and how one runs another."""

import hashlib
import logging
import os
import shutil
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from . import plots
from .config import config
from .cost import cost
from .datasets import load_data
from .files import ROOT, read_json, read_tensors, write_json
from .masks import load_masks
from .models import load
from .runs import check_settings, environment, read_history
from .train import evaluate

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
        network, epochs, lr = (s.get(k, s.get(k.removeprefix("own_"))) for k in ("own_network", "own_epochs", "own_lr"))
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
        row = {"name": name, "top1": evaluate(model, data.test), "macs": price.macs, "params": price.params, "epochs": int(epochs)}
        self._rows.append(row)
        return row["top1"]

    def finish(self, **extra):
        """Write metrics.json: the rows reported, `extra`, the settings, and where and when it was measured."""
        write_json(self.path / "metrics.json", {"rows": self._rows, **extra, "settings": self.settings} | environment())


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


def require(lesson, cfg, say=print):
    """The finished stage of `lesson`: loaded, or made now by running its notebook (and those it needs) headless."""
    found = stage(lesson, cfg)
    if not found.finished:
        run_lesson(lesson, cfg, say)
    return found


def reference(name="resnet56-cifar10"):
    """Measured results of a real run, which come with the course: dict[lesson -> Stage], in order.

    `name`: network and images; of the presets in which they were run, the largest is taken. Or a folder's full name
    in data/reference, such as resnet56-cifar10-standard. FileNotFoundError, with what there is, for any other.
    """
    for folder in (REFERENCE / name, *(REFERENCE / f"{name}-{preset}" for preset in ("full", "standard", "quick"))):
        found = sorted(folder.glob("*/metrics.json"))
        if found:
            return {p.parent.name: Stage(p.parent.name, p.parent, read_json(p)["settings"]) for p in found}
    known = sorted(p.name for p in REFERENCE.glob("*") if p.is_dir())
    raise FileNotFoundError(f"no reference {name!r}; there are: {', '.join(known) or 'none'}")


def published(network, dataset="CIFAR-10"):
    """Published results of `network`, a row a method: base and pruned top-1, delta, MACs removed (all percent), source."""
    table = pd.read_csv(ROOT / "data" / "published.csv").set_index("method")
    return table[(table.network == network) & (table.dataset == dataset)]


def data_of(cfg):
    """The images of a configuration."""
    return load_data(cfg.dataset, cfg.val, cfg.image_size, (cfg.train_size, cfg.test_size))


def scoreboard(stages):
    """One table of every network measured in `stages`: top-1 and what is left of MACs and parameters, in percent.

    Percent of the row "baseline" (or the first), and for names that begin with VGG-16 of "VGG-16: baseline", and so on.
    """
    table = pd.concat([s.rows for s in stages if s.metrics["rows"]], ignore_index=True)
    bases = {"": 0} | {n.removesuffix("baseline").rstrip(": "): i for i, n in enumerate(table.name) if n.endswith("baseline")}
    own = [bases[max((b for b in bases if n.startswith(b)), key=len)] for n in table.name]
    whole = table.iloc[own].reset_index(drop=True)
    return pd.DataFrame({
        "network": table.name, "top-1 %": table.top1.round(2), "MACs M": (table.macs / 1e6).round(2),
        "MACs left %": (100 * table.macs / whole.macs).round(1), "params left %": (100 * table.params / whole.params).round(1),
        "epochs": table.epochs,
    })  # fmt: skip


# ---- running notebooks ---------------------------------------------------------------------------------------------


def run_lesson(lesson, cfg, say=print):
    """Execute the notebook of `lesson` for `cfg` through papermill; the executed copy lands in the stage's folder."""
    for needed in NEEDS[lesson]:
        require(needed, cfg, say)
    where = stage(lesson, cfg)
    _execute(lesson, where / f"{lesson}.ipynb", where, {"preset": cfg.preset, **cfg.overrides()}, say)


def store_lesson(lesson, cfg, say=print):
    """Execute `lesson` as it stands, with the preset `auto`, and keep the outputs in notebooks/."""
    import nbformat

    source = ROOT / "notebooks" / f"{lesson}.ipynb"
    _execute(lesson, source, stage(lesson, cfg), {}, say)
    notebook = nbformat.read(source, 4)
    for part in (notebook, *notebook.cells):
        for key in ("papermill", "execution"):
            part.metadata.pop(key, None)
    nbformat.write(notebook, source)


def _execute(lesson, target, where, parameters, say):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import papermill
    logging.getLogger("papermill").setLevel(logging.ERROR)
    source, part = ROOT / "notebooks" / f"{lesson}.ipynb", where / f".{lesson}.ipynb"
    try:
        where.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make {where.path} ({error.strerror}); choose another folder with -p runs FOLDER") from error
    with _following(where / "log.txt", lesson, say):
        papermill.execute_notebook(
            os.path.relpath(source), os.path.relpath(part), parameters, cwd=str(source.parent), kernel_name="python3", progress_bar=False,
            extra_arguments=["--IPKernelApp.log_level=50"],  # the kernel talks to this machine only
        )  # fmt: skip
    os.replace(part, target)


@contextmanager
def _following(path, title, say):
    """Show the lines that a notebook's trainings write to a log file while another process runs it."""
    seen, stop, began = path.stat().st_size if path.exists() else 0, threading.Event(), time.monotonic()

    def follow():
        nonlocal seen
        last = False
        while not last:
            last = stop.wait(0.5)
            if path.exists():
                with open(path, encoding="utf-8") as log:
                    log.seek(seen)
                    for line in log.read().splitlines():
                        say(f"  {line}")
                    seen = log.tell()

    before = os.environ.get("MSLIB_LOG")
    os.environ["MSLIB_LOG"] = str(path)
    say(f"{title}: running")
    thread, how = threading.Thread(target=follow, daemon=True), "stopped"
    thread.start()
    try:
        yield
        how = "done"
    finally:
        stop.set()
        thread.join()
        os.environ.pop("MSLIB_LOG") if before is None else os.environ.update(MSLIB_LOG=before)
        say(f"{title}: {how} after {time.monotonic() - began:.0f} s")


def keep_reference(name, cfg, lessons):
    """Copy the finished stages of `cfg` to data/reference/<name>; of the weights, the baseline and the final network."""
    if not any(stage(lesson, cfg).finished for lesson in lessons):
        raise FileNotFoundError(f"no lesson of this run is finished, {', '.join(lessons)}; run it first: python -m mslib run")
    for lesson in lessons:
        gammas = "gammas.pt" if lesson > "05" else ""  # which no lesson draws
        heavy = ("images", "imagenet", "*.onnx", "before.pt", "pruned*.pt", "penalty.pt", "model.pt", "epoch-*.pt")
        left_out = shutil.ignore_patterns(".*", "log.txt", *heavy, gammas)
        found = stage(lesson, cfg)
        if found.finished:
            shutil.copytree(found.path, REFERENCE / name / lesson, dirs_exist_ok=True, ignore=left_out)
            if lesson == "01_baseline":
                shutil.copy(found / "baseline" / "model.pt", REFERENCE / name / lesson / "baseline")
    kept = reference(name)
    if {name for name in NEEDS if "01" <= name < "06"} <= kept.keys():
        plots.result(kept, REFERENCE / name / "result.png")
