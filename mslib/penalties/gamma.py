"""Sparsity penalties: callables without arguments that return one scalar loss term."""

from contextlib import ExitStack, contextmanager

import torch

from ..pruning.channels import as_graph
from ..pruning.maskfiles import fingerprint
from ..pruning.masks import check_mask
from ..training.loop import MOMENTUM, learning_rates


class Penalty:
    """What `fit` does with a penalty beside adding its value to the loss. `a + b` is the penalty that does both."""

    def step(self, iteration):
        """Called before each iteration."""

    def proximal_step(self, lr):
        """Called after each optimizer step, with lr / (1 - momentum): the step size that a lasting gradient has."""

    @contextmanager
    def attached(self):
        """Entered while training, left at its end and when it is interrupted: the place for hooks."""
        yield self

    def state_dict(self):
        """What changes while training: kept in checkpoints and with the finished run."""
        return {}

    def load_state_dict(self, state):
        pass

    def __add__(self, other):
        return Sum(self, other)


class Sum(Penalty):
    """Several penalties as one."""

    def __init__(self, *parts):
        self.parts = [q for p in parts for q in (p.parts if isinstance(p, Sum) else [p])]
        for part in self.parts:
            if not isinstance(part, Penalty):
                raise TypeError(
                    f"{part!r} is no ms.Penalty, and cannot be added to one; give its class that base"
                )

    def __repr__(self):
        return " + ".join(map(repr, self.parts))

    def __call__(self):
        return sum(part() for part in self.parts)

    def step(self, iteration):
        for part in self.parts:
            part.step(iteration)

    def proximal_step(self, lr):
        for part in self.parts:
            part.proximal_step(lr)

    @contextmanager
    def attached(self):
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.attached())
            yield self

    def state_dict(self):
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state):
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])


class HoldZero(Penalty):
    """No penalty: sets the weights that `masks` drops to zero, now and after each step of a training (fine-tuning).

    masks: dict[layer name -> BoolTensor shaped like its weight], True = keep, as `masks_for_ratio` makes of weights.
    """

    def __init__(self, model, masks):
        modules = dict(model.named_modules())
        for name, keep in masks.items():
            weight = getattr(modules.get(name), "weight", None)
            if weight is None or weight.shape != keep.shape:
                shape = "no such layer" if weight is None else f"its weight is {list(weight.shape)}"
                raise ValueError(f"mask for {name!r} has shape {list(keep.shape)}; {shape}")
        self.masks, self.weights = (
            masks,
            [(modules[name].weight, keep) for name, keep in masks.items()],
        )
        self.proximal_step(0)

    def __repr__(self):
        zeros = sum(int((~keep).sum()) for keep in self.masks.values())
        return f"HoldZero({zeros} weights {fingerprint(self.masks)})"

    def __call__(self):
        return torch.zeros(())

    @torch.no_grad()
    def proximal_step(self, lr):
        for i, (weight, keep) in enumerate(self.weights):
            self.weights[i] = weight, keep.to(weight.device)  # moved once
            weight *= self.weights[i][1]


class _GammaL1(Penalty):
    """λ·Σ|γ| over chosen channels: by its subgradient λ·sign(γ), or (proximal) by soft-thresholding after each step."""

    def __init__(self, model, chosen, strength, proximal):
        """`chosen`: dict[BatchNorm name -> BoolTensor[channels]], True = penalized."""
        if not strength > 0:
            raise ValueError(f"strength {strength}: λ must be above 0, for example 1e-4")
        if not chosen:
            raise ValueError(
                f"{type(model).__name__}: no BatchNorm to penalize; ms.channel_groups(model) says which are prunable"
            )
        self.strength, self.proximal, self.chosen = float(strength), proximal, chosen
        self.gammas = [model.get_submodule(name).weight for name in chosen]
        self.penalized = torch.cat([c.cpu() for c in chosen.values()])

    def __repr__(self):
        step = ", proximal" if self.proximal else ""
        channels = sum(int(c.sum()) for c in self.chosen.values())
        which = "" if all(c.all() for c in self.chosen.values()) else f" {fingerprint(self.chosen)}"
        return (
            f"{type(self).__name__}({channels} channels{which}, strength={self.strength:g}{step})"
        )

    def __call__(self):
        """λ·Σ|γ|, a scalar tensor; without a gradient when the proximal step does the work."""
        self.penalized = self.penalized.to(self.gammas[0].device)
        value = self.strength * (torch.cat(self.gammas).abs() * self.penalized).sum()
        return value.detach() if self.proximal else value

    @torch.no_grad()
    def proximal_step(self, lr):
        """Soft-threshold the penalized γ by lr·λ: γ <- sign(γ)·max(|γ| - lr·λ, 0), exact zeros included.

        `fit` passes lr / (1 - momentum), so that a strength means the same push as with the subgradient.
        """
        if self.proximal:
            for gamma, chosen in zip(
                self.gammas, self.penalized.split([len(g) for g in self.gammas])
            ):
                gamma.copy_(
                    gamma.sign()
                    * (gamma.abs() - lr * self.strength * chosen.to(gamma.device)).clamp_min_(0)
                )


class GlobalL1(_GammaL1):
    """λ·Σ|γ| over every prunable channel (Network Slimming, Liu et al. 2017; MaskSparsity, section 3.1).

    residual: include the channels that the blocks of a stage share, not only the inner ones.
    proximal: exact zeros by soft-thresholding instead of the subgradient (not in the papers).
    """

    def __init__(self, model, example, strength, residual=False, proximal=False, keep=()):
        names = as_graph(model, example).prunable_norms(residual)
        super().__init__(
            model,
            {n: torch.ones_like(model.get_submodule(n).weight, dtype=torch.bool) for n in names},
            strength,
            proximal,
        )


class MaskedL1(_GammaL1):
    """λ·Σ|γ| over the channels that `masks` drops, and no others (MaskSparsity, section 3.3).

    masks: dict[BatchNorm name -> BoolTensor[channels]], True = keep. Raises ValueError where they do not fit `model`.
    proximal: exact zeros by soft-thresholding instead of the subgradient (not in the paper).
    """

    def __init__(self, model, masks, strength, proximal=False):
        [check_mask(n, m, len(model.get_submodule(n).weight)) for n, m in masks.items()]
        super().__init__(model, {name: ~keep for name, keep in masks.items()}, strength, proximal)


def push(strength, lr, steps, schedule="onecycle"):
    """How far λ can move one γ in a run of `steps` iterations: Σ lr·λ / (1 - momentum).

    γ starts near 0.5 to 1: a run whose push is well below that cannot drive channels to zero, whatever λ is.
    """
    return float(learning_rates(lr, steps, schedule).sum()) * strength / (1 - MOMENTUM)
