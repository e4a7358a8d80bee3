"""Every number of a run, in one frozen record: three presets, and what you override."""

import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from ..data.sources import KNOWN, find_dataset
from ..files import nearest, relative
from ..training.schedules import SCHEDULES

METHODS = (
    "random",
    "uniform",
    "l1-norm",
    "global",
    "masked",
    "greg-1",
    "greg-2",
    "flow",
    "scratch",
    "scratch-uniform",
)


def _setting(default, lesson, doc, low=None, high=None, known=None):
    """Numbers must be above 0, or, where given, from `low` on and below `high`; texts one of `known`."""
    return field(
        default=default,
        metadata={"lesson": lesson, "doc": doc, "low": low, "high": high, "known": known},
    )


@dataclass(frozen=True)
class Config:
    """The settings of a run. Each names the first lesson it matters to: lessons before that do not depend on it."""

    preset: str = "quick"
    dataset: str = _setting(
        "cifar10", 1, "shapes, cifar10, cifar100, or the path of a folder, .tar.gz or .zip"
    )
    image_size: int | None = _setting(None, 1, "side of the images in pixels; None: as they are")
    train_size: int = _setting(4000, 1, "training images drawn (shapes only)")
    test_size: int = _setting(2000, 1, "test images drawn (shapes only)")
    val: float = _setting(0.1, 1, "share of the training images held out for choosing", high=1)
    depth: int = _setting(56, 1, "layers of the ResNet: 6n + 2")
    seed: int = _setting(
        0, 1, "of the weights, the order of the images and their augmentation", low=0
    )
    batch_size: int = _setting(128, 1, "images a step")
    weight_decay: float = _setting(5e-4, 1, "L2 factor on all weights")
    schedule: str = _setting(
        "onecycle", 1, "of the learning rate: onecycle, step or constant", known=SCHEDULES
    )
    epochs: int = _setting(30, 1, "of the baseline")
    lr: float = _setting(0.1, 1, "highest learning rate of the baseline")
    sparse_epochs: int = _setting(4, 2, "with a sparsity penalty, global or masked")
    sparse_lr: float = _setting(0.02, 2, "highest learning rate with a penalty")
    global_strength: float = _setting(2.5e-3, 2, "λ of the penalty on every γ")
    reduction: float = _setting(0.5, 2, "fraction of the MACs to remove", high=1)
    floor: float = _setting(
        0.125, 2, "share of its channels that each layer keeps at least", low=0, high=1
    )
    residual: bool = _setting(False, 2, "cut the residual channels too, not only inner ones")
    masked_strength: float = _setting(2e-2, 3, "λ of the penalty on the masked-out γ")
    finetune_epochs: int = _setting(4, 5, "after the cut")
    finetune_lr: float = _setting(0.02, 5, "highest learning rate after the cut")
    layer_reduction: dict = field(
        default_factory=lambda: {"stage1": 0.75, "stage2": 0.75, "stage3": 0.32},
        metadata={"lesson": 6, "doc": "share of the filters to remove in each layer of a stage"},
    )
    growing_ceiling: float = _setting(5.0, 6, "factor of the growing penalty where it ends")
    growing_every: int = _setting(10, 6, "iterations between two steps of the factor")
    vgg_width: float = _setting(0.25, 6, "channels of the plain network, as a share of VGG-16's")
    flow_length: float = _setting(1.0, 7, "k1, strength on the length of the feature flow")
    flow_curvature: float = _setting(1.0, 7, "k2, strength on its curvature")
    growing_exponent: float = _setting(
        4.0, 8, "GReg-2's common penalty shrinks what nothing holds to e to the minus this"
    )
    method: str = _setting("masked", 8, "of pruning: " + ", ".join(METHODS), known=METHODS)
    own_network: str = _setting("resnet18", 9, "of torchvision, by name")
    own_side: int = _setting(48, 9, "of the images in pixels, as this network sees them")
    own_epochs: int = _setting(6, 9, "of its baseline")
    own_lr: float = _setting(0.05, 9, "highest learning rate of its baseline")
    own_sparse_epochs: int = _setting(2, 9, "with the penalty")
    own_finetune_epochs: int = _setting(2, 9, "after the cut")
    runs: str = field(
        default_factory=lambda: os.environ.get("MSLIB_RUNS", "runs"),
        metadata={"doc": "folder of all runs"},
    )

    def describe(self, lesson):
        """The settings that first matter to `lesson` (a number), one a line: name, value, meaning."""
        rows = [
            (f.name, getattr(self, f.name), f.metadata["doc"])
            for f in _settings()
            if f.metadata["lesson"] == lesson
        ]
        return "\n".join(f"{name:16} {value!s:22} {doc}" for name, value, doc in rows)

    def phase(self, name):
        """What `fit` needs for a phase, "baseline", "sparse" or "finetune": dict of its epochs and lr and of what all share."""
        before = "" if name == "baseline" else f"{name}_"
        own = {"epochs": getattr(self, f"{before}epochs"), "lr": getattr(self, f"{before}lr")}
        return own | {
            key: getattr(self, key) for key in ("batch_size", "schedule", "weight_decay", "seed")
        }

    def up_to(self, lesson):
        """The settings that lessons 1 to `lesson` depend on: dict; a dataset's path is reduced to its name."""
        plain = replace(self, dataset=Path(self.dataset).name)
        return {
            f.name: getattr(plain, f.name) for f in _settings() if f.metadata["lesson"] <= lesson
        }

    def overrides(self):
        """What differs from the preset: dict of parameters that make this configuration again from `preset`."""
        default = asdict(Config(self.preset, **PRESETS[self.preset]))
        return {k: v for k, v in asdict(self).items() if v != default[k]}


PRESETS = {
    # shapes on 16×16 pixels: minutes on a CPU; the short runs need a strong λ (see ms.push)
    "quick": dict(
        dataset="shapes",
        image_size=16,
        batch_size=32,
        epochs=7,
        lr=0.1,
        sparse_epochs=3,
        sparse_lr=0.05,
        global_strength=8e-3,
        masked_strength=2.1e-2,
        finetune_epochs=2,
        finetune_lr=0.05,
        own_sparse_epochs=3,
        growing_ceiling=8.0,
        growing_every=5,
        flow_length=3.0,
        flow_curvature=3.0,
    ),
    # CIFAR-10: an evening on two CPU cores
    "standard": dict(),
    # CIFAR-10 on a GPU: the published lengths
    "full": dict(
        schedule="step",
        epochs=200,
        lr=0.1,
        sparse_epochs=100,
        sparse_lr=0.1,
        global_strength=1e-4,
        masked_strength=5e-4,
        finetune_epochs=120,
        finetune_lr=0.01,
        growing_ceiling=1.0,
        vgg_width=1.0,
    ),
}


def config(preset="auto", **overrides):
    """The settings of `preset`, with `overrides`; an override of None keeps the preset's value.

    `preset`: "quick" (drawn shapes, minutes on a CPU), "standard" (CIFAR-10), "full" (CIFAR-10, published lengths),
    or "auto": standard on a GPU, quick elsewhere.
    Raises ValueError for an unknown preset, an unknown setting (with the nearest name) or a value out of range.
    """
    if preset == "auto":
        preset = os.environ.get("MSLIB_PRESET") or (
            "standard" if torch.cuda.is_available() else "quick"
        )
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}" + nearest(preset, ["auto", *PRESETS]))
    names = [f.name for f in fields(Config) if f.name != "preset"]
    for name in overrides:
        if name not in names:
            raise ValueError(f"unknown setting {name!r}" + nearest(name, names))
    cfg = Config(
        preset, **(PRESETS[preset] | {k: v for k, v in overrides.items() if v is not None})
    )
    _check(cfg)
    if cfg.dataset not in KNOWN:
        # a path relative to the course's folder: it means the same in every notebook, and on another machine
        cfg = replace(cfg, dataset=relative(find_dataset(cfg.dataset)))
    return cfg


def notebook_config(scope):
    """The configuration of a notebook: its variables `preset` and those named like a setting. Call with globals().

    A parameter that papermill injected and that is no setting is refused, with the nearest name.
    """
    names = {f.name for f in fields(Config)} - {"preset"}
    injected = next((cell for cell in scope.get("In", []) if cell.startswith("# Parameters")), "")
    given = [
        line.split("=")[0].strip()
        for line in injected.splitlines()[1:]
        if line[:1].isidentifier() and "=" in line
    ]
    overrides = {
        name: scope.get(name) for name in [*given, *names] if name != "preset" and name in scope
    }
    return config(scope.get("preset", "auto"), **overrides)


def _check(cfg):
    if not isinstance(cfg.runs, str):
        raise ValueError(f"runs={cfg.runs!r}: expected the name of a folder, for example 'runs'")
    usual = Config()
    for f in _settings():
        value, default, (low, high, known) = (
            getattr(cfg, f.name),
            getattr(usual, f.name),
            map(f.metadata.get, ("low", "high", "known")),
        )
        kinds = {
            int: int,
            float: (int, float),
            str: str,
            bool: bool,
            dict: dict,
            type(None): (int, type(None)),
        }[type(default)]
        if not isinstance(value, kinds) or (
            isinstance(value, bool) and not isinstance(default, bool)
        ):
            kind, such = (
                ("whole number", 32) if default is None else (type(default).__name__, default)
            )
            raise ValueError(f"{f.name}={value!r}: expected a {kind}, for example {such!r}")
        if known and value not in known:
            raise ValueError(f"{f.name}={value!r}" + nearest(value, known))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if (value <= 0 if low is None else value < low) or (high and value >= high):
                wanted = "above 0" if low is None else f"{low} or more"
                raise ValueError(
                    f"{f.name}={value!r}: must be {wanted}{f' and below {high}' if high else ''}, for example {default!r}"
                )
    for name, share in cfg.layer_reduction.items():
        if not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise ValueError(
                f"layer_reduction: {name!r}: {share!r}; a share from 0 to below 1, for example 0.5"
            )


def _settings():
    return [f for f in fields(Config) if "lesson" in f.metadata]
