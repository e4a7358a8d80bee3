"""What `fit` refuses before it trains: the value at fault, what was expected, what to try."""

import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.tensors import Data, Split, batches
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
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or not least <= value < 2**32:
                raise ValueError(f"{name}={value!r}: expected a whole number, at least {least}")
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: expected a finite number, not below 0")
        if self.lr == 0:
            raise ValueError(f"lr={self.lr}: it must be above 0, for example 0.1")
        learning_rates(self.lr, 1, self.schedule)  # refuses an unknown schedule


def as_data(data: Any) -> Data:
    """`data` as it is, or, if it is a DataLoader, a `Data` that trains on it and holds nothing out."""
    if hasattr(data, "train"):
        return data
    if isinstance(data, torch.Tensor) or not hasattr(data, "__len__"):
        raise TypeError(
            f"data is a {type(data).__name__}; expected ms.load_data(…), ms.load_folder(…) or a "
            "DataLoader, which has a length"
        )
    return Data("loader", data, data, data, ())


def first_batch(train: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, float [n, C, H, W], and labels, int64 [n]: of a `Split` all labels, of a loader a batch."""
    if isinstance(train, Split):
        if train.images.dtype != torch.uint8:
            raise ValueError(
                f"the images of a Split are uint8, 0 to 255; these are {train.images.dtype}. "
                "Give images in another form through a DataLoader"
            )
        x, _ = next(batches(train.subset(slice(0, 1)), 1))
        return x, train.labels
    batch = next(iter(train), None)
    if batch is None:
        raise ValueError("the DataLoader has no batch: fewer images than its batch size?")
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(f"a batch is a {type(batch).__name__}; expected a pair (images, labels)")
    return tuple(batch)


def check_batch(x: torch.Tensor, y: torch.Tensor, outputs: int) -> None:
    """ValueError unless `x` is float32 and `y` int64 from 0 to `outputs` - 1, without a wait for a GPU."""
    if x.dtype != torch.float32:
        raise ValueError(
            f"the images are {x.dtype}; expected float32, as ms.normalize(…) makes them"
        )
    if y.dtype != torch.int64 or y.ndim != 1:
        raise ValueError(
            f"the labels are {y.dtype} {list(y.shape)}; expected int64 [N], one an image"
        )
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < outputs:
        wrong = int(y.max()) if int(y.max()) >= outputs else int(y.min())
        raise ValueError(
            f"label {wrong}: the network has {outputs} outputs, for labels 0 to {outputs - 1}; "
            "make it with num_classes=len(data.classes)"
        )


def count_outputs(model: nn.Module, x: torch.Tensor) -> int:
    """How many outputs `model` has for an image `x`, float [1, C, H, W]; ValueError where it has none."""
    weights, training, name = list(model.parameters()), model.training, type(model).__name__
    if not any(p.requires_grad for p in weights):
        raise ValueError(f"{name} has no parameter to train: all are frozen, or there are none")
    other = [p.dtype for p in weights if p.is_floating_point() and p.dtype != torch.float32]
    if other:
        raise ValueError(f"{name} has weights of {other[0]}; fit trains float32: model.float()")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            out = model.eval()(x.to(weights[0].device))
    except Exception as error:  # of any kind, from inside the network
        raise ValueError(f"{name} does not run on images {list(x.shape[1:])}: {error}") from error
    finally:
        model.train(training)
    if not isinstance(out, torch.Tensor) or out.ndim != 2:
        found = list(out.shape) if isinstance(out, torch.Tensor) else f"a {type(out).__name__}"
        raise ValueError(f"{name} gives {found}; fit needs a classifier, one tensor [N, classes]")
    return out.shape[1]


def check_penalty(model: nn.Module, penalty: Any) -> None:
    """TypeError or ValueError unless `penalty` is callable and acts on parameters of `model`."""
    if penalty is None:
        return
    if not callable(penalty):
        raise TypeError(
            f"penalty={penalty!r}: expected a penalty, as ms.GlobalL1(model, example, 1e-4)"
        )
    own = {id(p) for p in model.parameters()}
    if hasattr(penalty, "parameters") and not own.issuperset(map(id, penalty.parameters())):
        raise ValueError(
            f"{penalty!r} was made for another network, and would do nothing to this one; "
            "make it for the model that is trained"
        )
