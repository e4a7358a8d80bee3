"""What `fit` refuses before it trains: the value at fault, what was expected, what to try."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.tensors import Data, Split, batches
from ..processes import world
from .schedules import learning_rates


@dataclass(frozen=True)
class Settings:
    """The numbers of one training."""

    epochs: int
    lr: float
    batch_size: int
    schedule: str
    weight_decay: float
    seed: int
    frozen_statistics: bool

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # a run folder's JSON takes Python's numbers only
                object.__setattr__(self, name, value.item())
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or not least <= int(value) < 2**32:
                raise ValueError(f"{name}={value!r}: expected a whole number, at least {least}")
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= float(value) < math.inf:
                raise ValueError(f"{name}={value!r}: expected a finite number, not below 0")
        if self.lr == 0:
            raise ValueError(f"lr={self.lr}: it must be above 0, for example 0.1")
        if not isinstance(self.frozen_statistics, bool):
            raise ValueError(f"frozen_statistics={self.frozen_statistics!r}: expected a bool")
        learning_rates(self.lr, 1, self.schedule)  # refuses an unknown schedule


def as_data(data: Any, batch_size: int) -> Data:
    """`data`, or a `Data` of the one DataLoader that it is; TypeError or ValueError if neither."""
    if not hasattr(data, "train"):
        if isinstance(data, torch.Tensor) or not hasattr(data, "__len__"):
            raise TypeError(
                f"data is a {type(data).__name__}; expected ms.load_data(…), ms.load_folder(…) or "
                "a DataLoader, which has a length"
            )
        data = Data("loader", data, data, data, ())
    if isinstance(data.train, Split) and batch_size % world():
        raise ValueError(
            f"batch_size={batch_size} cannot be shared by {world()} processes; take a multiple"
        )
    return data


def first_batch(train: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, float [n, C, H, W], and labels: a loader's first batch; of a `Split` all labels."""
    if isinstance(train, Split):
        return next(batches(train.subset(slice(0, 1)), 1))[0], train.labels
    batch = next(iter(train), None)
    if batch is None:
        raise ValueError("the DataLoader has no batch: fewer images than its batch size?")
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(f"a batch is a {type(batch).__name__}; expected a pair (images, labels)")
    return tuple(batch)


def check_labels(y: torch.Tensor, outputs: int, images: int | None = None) -> None:
    """ValueError unless `y` is int64 [`images`], from 0 to `outputs` - 1."""
    if y.dtype != torch.int64 or y.ndim != 1 or images not in (None, len(y)):
        raise ValueError(f"labels are {y.dtype} {list(y.shape)}; expected int64 [{images or 'N'}]")
    wrong = y[(y < 0) | (y >= outputs)]
    if len(wrong):
        raise ValueError(
            f"label {int(wrong[0])}: the network has {outputs} outputs, for labels 0 to "
            f"{outputs - 1}; make it with num_classes=len(data.classes)"
        )


def count_outputs(model: nn.Module, x: torch.Tensor) -> int:
    """How many outputs `model` has for an image, float [1, C, H, W]; ValueError if it has none."""
    weights, name = list(model.parameters()), type(model).__name__
    modes = [(m, m.training) for m in model.modules()]
    if x.dtype != torch.float32:
        raise ValueError(f"the images are {x.dtype}; expected float32: ms.normalize(…) makes it")
    other = [p.dtype for p in weights if p.is_floating_point() and p.dtype != torch.float32]
    if other:
        raise ValueError(f"{name} has weights of {other[0]}; fit trains float32: model.float()")
    try:
        with torch.no_grad():
            out = model.eval()(x.to(weights[0].device if weights else "cpu"))
    except Exception as error:  # of any kind, from inside the network
        raise ValueError(f"{name} does not run on images {list(x.shape[1:])}: {error}") from error
    finally:
        for m, mode in modes:
            m.training = mode
    return classes_in(out, name, 1)


def classes_in(out: Any, name: str, images: int) -> int:
    """The number of classes that the outputs of the network `name` are for; ValueError if none."""
    if not isinstance(out, torch.Tensor) or out.ndim != 2 or len(out) != images:
        found = list(out.shape) if isinstance(out, torch.Tensor) else f"a {type(out).__name__}"
        raise ValueError(f"{name} gives {found} of {images} images; expected one [N, classes]")
    return out.shape[1]


def check_trainable(model: nn.Module) -> None:
    """ValueError where no parameter of `model` would be trained."""
    if not any(p.requires_grad for p in model.parameters()):
        name = type(model).__name__
        raise ValueError(f"{name} has no parameter to train: all are frozen, or there are none")


def check_penalty(model: nn.Module, penalty: Any) -> None:
    """TypeError or ValueError unless `penalty` is callable and acts on parameters of `model`."""
    if penalty is not None and not callable(penalty):
        raise TypeError(f"penalty={penalty!r}: expected such as ms.GlobalL1(model, example, 1e-4)")
    own = {id(p) for p in model.parameters()}
    if hasattr(penalty, "parameters") and not own.issuperset(map(id, penalty.parameters())):
        raise ValueError(
            f"{penalty!r} was made for another network, and would do nothing to this one; "
            "make it for the model that is trained"
        )


def check_teacher(teacher: Any, x: torch.Tensor, outputs: int) -> None:
    """TypeError or ValueError unless `teacher` is None or gives as many `outputs` for image `x`."""
    if teacher is None:
        return
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher={teacher!r}: expected a trained network, such as before the cut")
    found = count_outputs(teacher, x)
    if found != outputs:
        raise ValueError(
            f"the teacher has {found} outputs and the network {outputs}; "
            "both have to know the same classes"
        )
