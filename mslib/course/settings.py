"""Every number of a run, in one frozen and checked record: three presets, and what you override."""

import ast
import itertools
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from ..data.sources import KNOWN, find_dataset
from ..files import nearest

Schedule = Literal["onecycle", "step", "constant"]
Method = Literal[
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
]
Share = Annotated[float, Field(ge=0, lt=1)]


def _setting(
    default: Any, lesson: int, doc: str, *, also: tuple[int, ...] = (), **bounds: Any
) -> Any:
    """A setting that first matters to `lesson`, and to all that build on it.

    `also`: of lessons 06 to 12, which build on 01, 02 or nothing, those that read it all the same.
    """
    told: Any = {"lesson": lesson, "also": also}
    return Field(default, description=doc, json_schema_extra=told, **bounds)


class Config(BaseModel):
    """The settings of a run. Each names the first lesson it matters to."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    preset: str = "quick"
    dataset: str = _setting(
        "cifar10",
        1,
        "shapes, cifar10, cifar100, or the path of a folder, .tar.gz or .zip",
        also=(9, 10),
    )
    image_size: int | None = _setting(
        None, 1, "side of the images in pixels; None: as they are", also=(10,), ge=8, le=1024
    )
    train_size: int = _setting(
        4000, 1, "training images drawn (shapes only)", also=(9, 10), gt=0, le=1_000_000
    )
    test_size: int = _setting(
        2000, 1, "test images drawn (shapes only)", also=(9, 10), gt=0, le=1_000_000
    )
    val: float = _setting(
        0.1, 1, "share of the training images held out for choosing", also=(9, 10), gt=0, le=0.5
    )
    depth: int = _setting(56, 1, "layers of the ResNet: 6n + 2", ge=8, le=1202)
    width: float = _setting(
        1.0, 1, "channels of the ResNet, as a share of 16, 32 and 64", also=(10,), gt=0, le=4
    )
    seed: int = _setting(
        0,
        1,
        "of the weights, the order of the images and their augmentation",
        also=(9, 10),
        ge=0,
        lt=2**32,
    )
    batch_size: int = _setting(128, 1, "images a step", also=(9, 10), gt=0, le=65_536)
    weight_decay: float = _setting(5e-4, 1, "L2 factor on all weights", also=(9, 10), ge=0, lt=1)
    schedule: Schedule = _setting(
        "onecycle", 1, "of the learning rate: onecycle, step or constant", also=(9, 10)
    )
    epochs: int = _setting(30, 1, "of the baseline", also=(10,), gt=0, le=10_000)
    lr: float = _setting(0.1, 1, "highest learning rate of the baseline", also=(10,), gt=0, le=100)
    sparse_epochs: int = _setting(4, 2, "with a sparsity penalty", also=(6, 7, 12), gt=0, le=10_000)
    sparse_lr: float = _setting(
        0.02, 2, "highest learning rate with a penalty", also=(6, 7, 9, 10, 12), gt=0, le=100
    )
    global_strength: float = _setting(2.5e-3, 2, "λ of the penalty on every γ", gt=0, le=1000)
    reduction: float = _setting(0.5, 2, "fraction of the MACs to remove", also=(9, 10), gt=0, lt=1)
    floor: float = _setting(
        0.125,
        2,
        "share of its channels that each layer keeps at least",
        also=(7, 9, 10, 12),
        ge=0,
        lt=1,
    )
    residual: bool = _setting(False, 2, "cut the residual channels too, not only inner ones")
    masked_strength: float = _setting(
        2e-2, 3, "λ of the penalty on the masked-out γ", also=(6, 8, 10, 12), gt=0, le=1000
    )
    finetune_epochs: int = _setting(4, 5, "after the cut", also=(6, 7, 8), gt=0, le=10_000)
    finetune_lr: float = _setting(
        0.02, 5, "highest learning rate after the cut", also=(6, 7, 8, 10, 12), gt=0, le=100
    )
    layer_reduction: dict[str, Share] = _setting(
        {"stage1": 0.75, "stage2": 0.75, "stage3": 0.32},
        6,
        "share of the filters to remove in each layer of a stage",
    )
    growing_epochs: int | None = _setting(
        None, 6, "with a growing penalty; None: sparse_epochs", also=(8,), gt=0, le=10_000
    )
    growing_lr: float | None = _setting(
        None, 6, "highest learning rate with one; None: sparse_lr", also=(8,), gt=0, le=100
    )
    growing_schedule: Schedule | None = _setting(
        None, 6, "of the learning rate with one; None: schedule", also=(8,)
    )
    growing_share: float = _setting(
        0.6, 6, "share of its epochs in which the factor grows", also=(8, 10), gt=0, le=1
    )
    growing_ceiling: float = _setting(
        5.0, 6, "factor of the growing penalty where it ends", also=(8, 10), gt=0, le=1e6
    )
    growing_every: int = _setting(
        10, 6, "iterations between two steps of the factor", also=(8, 10), gt=0, le=100_000
    )
    growing_exponent: float = _setting(
        0.5,
        6,
        "GReg-2: its common penalty alone would shrink a filter to exp(-this)",
        also=(8,),
        gt=0,
        le=100,
    )
    flow_length: float = _setting(
        1.0, 7, "k1, strength on the length of the feature flow", also=(8, 10), gt=0, le=1e6
    )
    flow_curvature: float = _setting(1.0, 7, "k2, strength on its curvature", gt=0, le=1e6)
    method: Method = _setting("uniform", 8, "of pruning: " + ", ".join(get_args(Method)))
    own_network: str = _setting("resnet18", 9, "of torchvision, by name", min_length=1)
    own_side: int = _setting(
        48, 9, "of the images in pixels, as this network sees them", ge=8, le=1024
    )
    own_epochs: int = _setting(6, 9, "of its baseline", gt=0, le=10_000)
    own_lr: float = _setting(0.05, 9, "highest learning rate of its baseline", gt=0, le=100)
    own_sparse_epochs: int = _setting(2, 9, "with the penalty", gt=0, le=10_000)
    family_depth: int = _setting(
        20, 10, "layers of the ResNet that each relative gets", ge=14, le=1202
    )
    family_epochs: int = _setting(4, 10, "with each penalty", gt=0, le=10_000)
    family_repair: int = _setting(
        0, 10, "epochs after each cut, also for the controls; 0: no repair", ge=0, le=10_000
    )
    incremental_speed: float = _setting(
        4.0, 10, "how many times as fast as GReg-1's an r may grow", gt=0, le=1e6
    )
    trainability_gram: float = _setting(
        10.0, 10, "g, weight of the Gram matrix in trainability-preserving pruning", gt=0, le=1e6
    )
    envelope_strength: float = _setting(1.2, 10, "λ of the group envelope", gt=0, le=1000)
    dependency_delta: float = _setting(
        1e-3, 10, "step of λ in dependency-aware pruning", gt=0, le=1000
    )
    deep_reduction: float = _setting(0.8, 12, "fraction of the MACs to remove", gt=0, lt=1)
    runs: str = Field(
        default_factory=lambda: os.environ.get("MSLIB_RUNS") or "runs",
        description="folder of all runs",
        min_length=1,
    )

    @field_validator("depth", "family_depth")
    @classmethod
    def _six_n_plus_two(cls, depth: int) -> int:
        if depth % 6 != 2:
            raise ValueError("layers of a CIFAR ResNet: 6n + 2")
        return depth

    @property
    def stored(self) -> bool:
        """Whether this is the run of the stored lessons: their numbers are checked for it only."""
        return self.preset == "quick" and not self.overrides().keys() - {"runs"}

    def describe(self, lesson: int) -> str:
        """The settings that first matter to `lesson`, one a line: name, value, meaning."""
        return "\n".join(
            f"{name:16} {getattr(self, name)!s:22} {field.description}"
            for name, field in SETTINGS.items()
            if _told(field)["lesson"] == lesson
        )

    def phase(self, name: str) -> dict[str, Any]:
        """What `fit` needs for a phase, "baseline", "sparse", "growing" or "finetune"."""
        before = "" if name == "baseline" else f"{name}_"
        found = {key: getattr(self, f"{before}{key}", None) for key in ("epochs", "lr", "schedule")}
        if name == "growing":  # what it leaves open is as with the other penalties
            usual = self.phase("sparse")
            found = {key: usual[key] if v is None else v for key, v in found.items()}
        found["schedule"] = found["schedule"] or self.schedule
        shared = ("batch_size", "weight_decay", "seed")
        return found | {key: getattr(self, key) for key in shared}

    def up_to(self, lesson: int) -> dict[str, Any]:
        """The settings that `lesson` and all it needs depend on; of a path the last name."""
        found = {name: getattr(self, name) for name in SETTINGS if self.matters(name, lesson)}
        return found | {"dataset": Path(self.dataset).name} if "dataset" in found else found

    def matters(self, name: str, lesson: int) -> bool:
        """Whether the results of `lesson` depend on the setting called `name`."""
        if name in ("train_size", "test_size") and self.dataset != "shapes":
            return False
        told, lesson = _told(SETTINGS[name]), 10 if lesson == 11 else lesson  # reads what 10 reads
        # the last that it builds on
        chain = {6: 1, 7: 1, 8: 2, 9: 0, 10: 0, 12: 1}.get(lesson, lesson)
        return told["lesson"] in (*range(1, chain + 1), lesson) or lesson in told["also"]

    def overrides(self) -> dict[str, Any]:
        """What differs from the preset: config(cfg.preset, **cfg.overrides()) == cfg."""
        usual = Config(preset=self.preset, **PRESETS[self.preset])
        mine = self.model_dump()
        return {name: value for name, value in mine.items() if value != getattr(usual, name)}


SETTINGS = {n: f for n, f in Config.model_fields.items() if n not in ("preset", "runs")}

PRESETS: dict[str, dict[str, Any]] = {
    # shapes on 16×16 pixels, a narrow network: minutes on a CPU; the short runs need a strong λ
    # (see ms.push)
    "quick": dict(
        dataset="shapes",
        image_size=16,
        train_size=8000,
        val=0.25,
        width=0.5,
        batch_size=64,
        epochs=8,
        lr=0.1,
        sparse_epochs=3,
        sparse_lr=0.05,
        global_strength=1.5e-2,
        masked_strength=8e-2,
        finetune_epochs=2,
        finetune_lr=0.05,
        own_side=32,
        own_sparse_epochs=3,
        growing_ceiling=2.5,
        growing_every=5,
        family_depth=14,
        family_epochs=3,
    ),
    # CIFAR-10: an evening on two CPU cores
    "standard": dict(),
    # CIFAR-10 on a GPU, each method by its own published schedule; never run
    "full": dict(
        # baseline and repair as GReg's for CIFAR, lr / 10 at half and three quarters of each
        schedule="step",
        epochs=200,
        lr=0.1,
        finetune_epochs=120,
        finetune_lr=0.01,
        # MaskSparsity: its released ImageNet script; its settings for CIFAR were not published
        sparse_epochs=100,
        sparse_lr=0.1,
        global_strength=5e-4,
        masked_strength=5e-4,
        # GReg-1: 10,000 steps of 1e-4, ten iterations apart, then 10,000 iterations at rest
        growing_epochs=313,
        growing_lr=1e-3,
        growing_schedule="constant",
        growing_share=0.91,
        growing_ceiling=1.0,
        growing_every=10,
        growing_exponent=0.5,
    ),
}


def config(preset: str = "auto", **overrides: Any) -> Config:
    """The settings of `preset`, with `overrides`; an override of None keeps the preset's value.

    `preset`: "quick" (drawn shapes, minutes on a CPU), "standard" (CIFAR-10), "full" (CIFAR-10,
    published lengths), or "auto": standard on a GPU, quick elsewhere.
    Raises ValueError for an unknown preset or setting, with the nearest name, or a wrong value.
    """
    _check_injected()
    if preset == "auto":
        preset = os.environ.get("MSLIB_PRESET") or ("standard" if _on_a_gpu() else "quick")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}" + nearest(preset, ["auto", *PRESETS]))
    for name in overrides:
        if name not in Config.model_fields or name == "preset":
            raise ValueError(f"unknown setting {name!r}" + nearest(name, [*SETTINGS, "runs"]))
    given = {name: value for name, value in overrides.items() if value is not None}
    if given.get("dataset") not in (None, *KNOWN) and isinstance(given["dataset"], str | Path):
        given["dataset"] = os.path.abspath(
            find_dataset(given["dataset"])
        )  # means one thing anywhere
    try:
        return Config(preset=preset, **PRESETS[preset] | given)
    except ValidationError as error:
        raise ValueError(_explain(error.errors()[0])) from None


class _Loader(yaml.SafeLoader):
    """YAML as it is meant: a name stands there once, and 010 is a text, neither 8 nor 10."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names: list[Any] = []
        for key, _ in node.value:
            if key.value in names:
                told = f"{key.value!r} is given twice; leave one out"
                raise yaml.constructor.ConstructorError(None, None, told, key.start_mark)
            names.append(key.value)
        return super().construct_mapping(node, deep)

    def whole(self, node: Any) -> int | str:
        octal = re.match(r"[+-]?0\d", node.value)
        return node.value if octal else self.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Settings by name, as a YAML file has them. ValueError that names the file if it has none."""
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        found = repr(settings)[:60]
        raise ValueError(f"{path}: expected lines such as 'seed: [0, 1, 2]', found {found}")
    for name in settings:
        if not isinstance(name, str):
            raise ValueError(f"{path}: {name!r} is no name of a setting; write 'seed: [0, 1, 2]'")
    return settings


def _on_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _told(field: FieldInfo) -> dict[str, Any]:
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra


def _explain(error: Any) -> str:
    """One line for an error of pydantic: the setting, its value, what was expected, an example."""
    name, *inside = error["loc"]
    field, given = Config.model_fields[name], repr(error["input"])[:60]
    if inside:
        return f"{name}: {inside[0]!r}: {given}; expected a share from 0 to below 1, such as 0.5"
    default = field.get_default(call_default_factory=True)
    example = f"for example {32 if default is None else default!r}"
    if error["type"] == "literal_error":
        return f"{name}={given}" + nearest(error["input"], get_args(field.annotation))
    if error["type"] == "value_error":
        return f"{name}={given}: expected {error['ctx']['error']}, {example}"
    if error["type"].startswith(("greater", "less")):
        return f"{name}={given}: must be {_bounds(field, error['type'])}, {example}"
    kinds = {bool: "True or False", str: "a text", float: "a finite number"}
    annotation: Any = field.annotation
    kind = "a dict" if name == "layer_reduction" else kinds.get(annotation, "a whole number")
    return f"{name}={given}: expected {kind}, {example}"


def _bounds(field: FieldInfo, broken: str) -> str:
    """In words what a number must be; an upper bound above 1 only if that is what was broken."""
    words = {"gt": "above {}", "ge": "{} or more", "lt": "below {}", "le": "at most {}"}
    rules = [
        (key, getattr(rule, key)) for rule in field.metadata for key in words if hasattr(rule, key)
    ]
    told = [(key, v) for key, v in rules if key[0] == "g" or v <= 1 or broken.startswith("less")]
    return " and ".join(words[key].format(value) for key, value in told)


def _check_injected() -> None:
    """In a notebook under papermill: refuse a parameter that its parameter cell does not list.

    papermill only warns of it. It puts the given values into a cell behind the one they replace.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    cells = shell.user_ns.get("In", []) if shell else []
    for before, cell in itertools.pairwise(cells):
        if not cell.startswith("# Parameters\n"):
            continue
        for name in sorted(_assigned(cell) - _assigned(before)):
            if name in SETTINGS or name == "runs":
                raise ValueError(
                    f"{name!r} is no parameter of this lesson by itself; give it in `overrides`: "
                    f"papermill … -y 'overrides: {{{name}: …}}'"
                )
            raise ValueError(f"unknown setting {name!r}" + nearest(name, list(SETTINGS)))


def _assigned(source: str) -> set[str]:
    """The names that a cell of plain assignments gives a value."""
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a line of shell or a magic
        return set()
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return {target.id for target in targets if isinstance(target, ast.Name)}
