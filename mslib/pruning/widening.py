"""Linear over-parameterization: wide while a pruned network is repaired, merged exactly afterwards.

Qian et al., "Boosting pruned networks with linear over-parameterization", 2022, arXiv 2204.11444.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..files import nearest
from ..networks import copied


class Widened(nn.Sequential):
    """A convolution as three without anything between them: 1×1, then its own kernel, then 1×1."""


@torch.no_grad()
def widen(
    model: nn.Module, factor: float = 4, layers: Iterable[str] | None = None, seed: int = 0
) -> nn.Module:
    """A new network with the same function and more to train; `model` stays as it is.

    W becomes L·M·F: a 1×1 convolution F from `in` to factor · in channels with FᵀF = 1, the kernel
    M = Lᵀ·W·Fᵀ between factor · in and factor · out channels, and L, 1×1, with LLᵀ = 1, which has
    the bias. Stride, padding and dilation stay with M. F and L are random rotations drawn by
    `seed`; how the paper fills them could not be checked (ours), nor is its distillation here.
    layers: names of convolutions; default: all Conv2d without groups, but for those that share
    their weight with another module. One convolution under several names is widened under all.

    Raises ValueError for a factor below 1, or names that are no such convolution.
    """
    if not 1 <= factor < float("inf"):
        raise ValueError(f"factor={factor}: how many times as wide, 1 or above, for example 4")
    wide = copied(model)
    every = wide.named_modules(remove_duplicate=False)
    known = {n: m for n, m in every if type(m) is nn.Conv2d and m.groups == 1}
    known = {n: m for n, m in known.items() if n and not isinstance(_parent(wide, n)[0], Widened)}
    held = Counter(id(p) for m in wide.modules() for p in m._parameters.values())
    tied = {n for n, m in known.items() if held[id(m.weight)] > 1}
    if not known:
        raise ValueError(f"{type(model).__name__} has no Conv2d without groups in it to widen")
    generator, made = torch.Generator().manual_seed(seed), {}
    chosen = [n for n in known if n not in tied] if layers is None else layers
    for name in [chosen] if isinstance(chosen, str) else chosen:
        if name not in known:
            hint = nearest(name, known)
            raise ValueError(f"layers: {name!r} is no Conv2d without groups of the network{hint}")
        if name in tied:
            raise ValueError(
                f"layers: {name!r} shares its weight with another module; leave it out"
            )
        if known[name] not in made:
            made[known[name]] = _widened(known[name], factor, generator)
    return _with(wide, made)


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """A new network in which each layer that `widen` made is one convolution again, L·M·F."""
    merged = copied(model)
    return _with(merged, {m: _merged(m) for m in merged.modules() if isinstance(m, Widened)})


def _with(model: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """`model` with other modules in the place of some, wherever it holds these."""
    for parent in [*model.modules()]:
        for key, m in [*parent._modules.items()]:
            if m in made:
                setattr(parent, key, made[m])
    return model


def _widened(conv: Any, factor: float, generator: torch.Generator) -> Widened:
    n_in, n_out = (max(n, round(factor * n)) for n in (conv.in_channels, conv.out_channels))
    first = _rotation(n_in, conv.in_channels, generator)
    last = _rotation(n_out, conv.out_channels, generator)
    middle = torch.einsum("ab,bchw,dc->adhw", last, conv.weight.cpu().double(), first)
    parts = (first[..., None, None], middle, last.T[..., None, None])
    made = Widened(
        nn.Conv2d(conv.in_channels, n_in, 1, bias=False, device="meta"),  # nothing is drawn
        _like(conv, middle, bias=False),
        nn.Conv2d(n_out, conv.out_channels, 1, bias=conv.bias is not None, device="meta"),
    )
    for layer, weight in zip(made, parts, strict=True):
        layer.weight = nn.Parameter(weight.to(conv.weight), conv.weight.requires_grad)
    made[2].bias = conv.bias
    return made.train(conv.training)


def _merged(wide: Any) -> nn.Conv2d:
    first, middle, last = (layer.weight.cpu().double() for layer in wide)
    weight = torch.einsum("oa,abhw,bi->oihw", last.flatten(1), middle, first.flatten(1))
    made = _like(wide[1], weight, bias=wide[2].bias is not None)
    made.weight = nn.Parameter(weight.to(wide[1].weight), wide[1].weight.requires_grad)
    made.bias = wide[2].bias
    return made.train(wide.training)


def _like(conv: Any, weight: torch.Tensor, bias: bool) -> nn.Conv2d:
    """A convolution that moves over the image as `conv` does, of the widths of `weight`."""
    how = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, 1, bias, conv.padding_mode)
    return nn.Conv2d(weight.shape[1], weight.shape[0], *how, device="meta")


def _rotation(many: int, few: int, generator: torch.Generator) -> torch.Tensor:
    """Q, float64 [many, few], with QᵀQ = 1."""
    return torch.linalg.qr(torch.randn(many, few, dtype=torch.float64, generator=generator)).Q


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, key = name.rpartition(".")
    return model.get_submodule(parent), key
