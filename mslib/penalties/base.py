"""What a penalty is: a callable without arguments whose scalar `fit` adds to the loss."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..files import digest
from ..pruning.masks import Masks, check_shapes


class Penalty:
    """What `fit` does with a penalty beside adding its value. `a + b` does both."""

    def __repr__(self) -> str:
        return type(self).__name__

    def __call__(self) -> torch.Tensor:
        """The value that is added to the cross-entropy, a scalar tensor: each penalty says it."""
        raise NotImplementedError(f"{type(self).__name__} needs a __call__ that returns its value")

    def step(self, iteration: int) -> None:
        """Called before each iteration."""

    def proximal_step(self, lr: float) -> None:
        """Called after each optimizer step, with lr / (1 - momentum): a lasting gradient's step."""

    @contextmanager
    def attached(self) -> Iterator["Penalty"]:
        """Entered while training, left at its end and when it is interrupted: a place for hooks."""
        yield self

    def state_dict(self) -> dict:
        """What changes while training: kept in checkpoints and with the finished run."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` gave."""

    def identity(self) -> Any:
        """What decides the effect, as plain JSON, masks by `digest`; None: no run folder."""
        return None

    def parameters(self) -> Iterable[torch.Tensor]:
        """The tensors it acts on: `fit` refuses a penalty that was made for another network."""
        return ()

    def __add__(self, other: "Penalty") -> "Sum":
        return Sum(self, other)


class Sum(Penalty):
    """Several penalties as one."""

    def __init__(self, *parts: Penalty):
        self.parts: list[Penalty] = []
        for part in parts:
            if not isinstance(part, Penalty):
                raise TypeError(f"{part!r} is no ms.Penalty; derive its class from that to add it")
            self.parts += part.parts if isinstance(part, Sum) else [part]
        if len({id(part) for part in self.parts}) < len(self.parts):
            raise ValueError(f"{self}: the same penalty twice; make one of twice the strength")

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))

    def __call__(self) -> torch.Tensor:
        return sum(part() for part in self.parts)

    def step(self, iteration: int) -> None:
        for part in self.parts:
            part.step(iteration)

    def proximal_step(self, lr: float) -> None:
        for part in self.parts:
            part.proximal_step(lr)

    @contextmanager
    def attached(self) -> Iterator["Penalty"]:
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.attached())
            yield self

    def state_dict(self) -> dict:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])

    def identity(self) -> Any:
        parts = [part.identity() for part in self.parts]
        return None if None in parts else {"sum": parts}

    def parameters(self) -> Iterable[torch.Tensor]:
        for part in self.parts:
            yield from part.parameters()


class HoldZero(Penalty):
    """No penalty: the weights that `masks` drops are zero, now and after each step of a training.

    masks: dict[layer name -> BoolTensor shaped like its weight], True = keep, as
        `masks_for_ratio` makes of weights. Raises ValueError if they do not fit, or drop nothing.
    """

    def __init__(self, model: nn.Module, masks: Masks):
        modules = dict(model.named_modules())
        weights = {n: m.weight.shape for n, m in modules.items() if _has_weight(m)}
        check_shapes(masks, weights, "layer with a weight")
        if all(keep.all() for keep in masks.values()):
            raise ValueError("the masks would drop nothing: there is nothing to hold at zero")
        self.masks = masks
        self.weights = [(modules[name].weight, keep) for name, keep in masks.items()]
        self.proximal_step(0)

    def __repr__(self) -> str:
        return f"HoldZero({sum(int((~keep).sum()) for keep in self.masks.values())} weights)"

    def __call__(self) -> torch.Tensor:
        return torch.zeros((), device=self.weights[0][0].device)

    @torch.no_grad()
    def proximal_step(self, lr: float) -> None:
        for i, (weight, keep) in enumerate(self.weights):
            keep = keep.to(weight.device)
            self.weights[i] = weight, keep  # moved once
            weight *= keep

    def identity(self) -> Any:
        return {"penalty": "HoldZero", "masks": digest(self.masks.items())}

    def parameters(self) -> Iterable[torch.Tensor]:
        return [weight for weight, _ in self.weights]


def _has_weight(module):
    return isinstance(getattr(module, "weight", None), torch.Tensor)
