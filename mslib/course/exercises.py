"""The functions that readers write in the lessons, and a check that says what is off with one.

An exercise is a function of ours, what it is tried on, and what a wrong result suggests. Add one by
`@exercise(cases)` above a solution that has the name the lesson asks for; its docstring is the
hint that a reader gets who is stuck.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch

from ..penalties.flow import measure
from ..training.schedules import learning_rates
from .results import half_width

Case = tuple[Any, ...]  # the arguments of one call

_SOLUTIONS: dict[str, tuple[Callable, Sequence[Case]]] = {}


def exercise(*cases: Case) -> Callable:
    """Register the function below as the solution of the exercise that has its name."""

    def register(solution: Callable) -> Callable:
        _SOLUTIONS[solution.__name__] = solution, cases
        return solution

    return register


def check(attempt: Callable) -> None:
    """Say whether `attempt` does what the exercise of its name asks for, and if not, where."""
    print(verdict(attempt))


def verdict(attempt: Callable) -> str:
    """ "Right …", "Not yet …" for an empty function, or what goes wrong in the first wrong case.

    Raises ValueError for a function whose name is no exercise.
    """
    name = attempt.__name__
    if name not in _SOLUTIONS:
        raise ValueError(f"no exercise is called {name!r}; there are {', '.join(_SOLUTIONS)}")
    solution, cases = _SOLUTIONS[name]
    hint = " ".join((solution.__doc__ or "").split())
    for case in cases:
        call = f"{name}({', '.join(map(_shown, case))})"
        wanted = solution(*deepcopy(case))
        try:
            found = attempt(*deepcopy(case))
        except Exception as error:  # of the reader's making: of any kind
            return f"{call} raises {type(error).__name__}: {error}\nHint: {hint}"
        if found is None:
            return f"Not yet: {name} returns nothing. Fill it in and run this cell again."
        if not _same(found, wanted):
            told = f"{call}\n  gives    {_shown(found)}\n  expected {_shown(wanted)}"
            return f"Not quite:\n{told}\nHint: {hint}"
    return f"Right: {name} is as it should be, in {len(cases)} cases."


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        alike = isinstance(found, dict) and found.keys() == wanted.keys()
        return alike and all(_same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, (list, tuple)):
        alike = isinstance(found, (list, tuple)) and len(found) == len(wanted)
        return alike and all(map(_same, found, wanted))
    try:
        a, b = torch.as_tensor(found).double(), torch.as_tensor(wanted).double()
    except (TypeError, ValueError, RuntimeError):
        return False
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def _shown(value: Any) -> str:
    """A value in one short line."""
    if isinstance(value, torch.Tensor):
        value = [round(v, 4) if isinstance(v, float) else v for v in value.flatten().tolist()]
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"


# ---- 00 · start here ---------------------------------------------------------------------------

_FILTERS = torch.arange(24.0).reshape(4, 2, 1, 3)  # four inner channels of two inputs
_READERS = torch.arange(36.0).reshape(3, 4, 1, 3)  # three outputs that read them


@exercise(
    (_FILTERS, _READERS, torch.tensor([True, False, True, True])),
    (_FILTERS, _READERS, torch.tensor([False, False, False, True])),
    (_READERS, _FILTERS[:, :1].repeat(1, 3, 1, 1), torch.tensor([False, True, True])),
)
def cut_inner(first: torch.Tensor, second: torch.Tensor, keep: torch.Tensor) -> tuple:
    """An inner channel is axis 0 of the first weight, and axis 1 of the second."""
    return first[keep], second[:, keep]


# ---- 01 · baseline -----------------------------------------------------------------------------


@exercise((93.2, 92.4, 2000), (93.2, 92.4, 10_000), (93.2, 91.9, 2000), (40.0, 50.0, 400))
def differ(one: float, other: float, images: int) -> bool:
    """Add the variances p(1 - p) / n of both shares; compare the absolute difference of the shares
    with twice the root of the sum."""
    p, q = one / 100, other / 100
    variance = (p * (1 - p) + q * (1 - q)) / images
    return abs(p - q) > 2 * variance**0.5


# ---- 02 · global sparsity ----------------------------------------------------------------------


@exercise((1e-2, [0.1, 0.1]), (2e-3, [0.05, 0.02, 0.0], 0.5), (1.0, torch.linspace(0, 0.1, 11)))
def push(strength: float, rates: Any, momentum: float = 0.9) -> float:
    """Each step moves γ by about lr·λ, and momentum repeats a lasting step 1 / (1 - m) times."""
    return sum(float(rate) for rate in rates) * strength / (1 - momentum)


# ---- 03 · masked regularization ----------------------------------------------------------------


@exercise(
    (torch.tensor([0.9, 0.4, 0.03]), torch.tensor([True, False, False]), 0.1),
    (torch.tensor([-0.9, -0.4, 0.05, 0.2]), torch.tensor([False, False, True, True]), 0.5),
    (torch.tensor([0.3, -0.02]), torch.tensor([False, False]), 0.02),
)
def proximal_step(gamma: torch.Tensor, keep: torch.Tensor, shrink: float) -> torch.Tensor:
    """Only dropped channels move: toward zero by `shrink`; those that are nearer end at zero."""
    shrunk = gamma.sign() * (gamma.abs() - shrink).clamp(min=0)
    return torch.where(keep, gamma, shrunk)


# ---- 04 · pruning ------------------------------------------------------------------------------


@exercise(
    (torch.zeros(3), _READERS, torch.tensor([0.5, -0.2, 1.0, 0.1]), torch.arange(4) > 1),
    (torch.arange(3.0), -_READERS, torch.tensor([-0.5, 2.0, 0.3, 0.1]), torch.arange(4) < 1),
)
def folded_mean(
    mean: torch.Tensor, weight: torch.Tensor, beta: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """A dropped channel sends relu(β) to every pixel: multiply it with the sum of its weights over
    the pixels of the kernel, add up over the dropped channels, and subtract that from the mean."""
    return mean - weight.sum((2, 3)) @ (beta.clamp(min=0) * ~keep)


# ---- 05 · fine-tuning --------------------------------------------------------------------------


@exercise((0, 10, 0.1), (1, 100, 0.05), (50, 100, 1.0), (99, 100, 0.2))
def one_cycle(t: int, steps: int, top: float) -> float:
    """Compare (t + 1) / (0.2 * steps) with 1; the cosine gets π times (t / steps - 0.2) / 0.8."""
    return float(learning_rates(top, steps)[t])


# ---- 06 · growing regularization ---------------------------------------------------------------


@exercise(
    (torch.zeros(4), torch.tensor([True, False, True, False]), 0.5, 2.0),
    (torch.tensor([0.0, 1.9, 1.0]), torch.tensor([True, False, False]), 0.5, 2.0),
    (torch.tensor([0.3, 2.0]), torch.tensor([True, False]), 0.1, 2.0),
)
def grow(factors: torch.Tensor, keep: torch.Tensor, delta: float, ceiling: float) -> torch.Tensor:
    """The factor of a dropped filter (keep is False) grows by delta, but not above the ceiling;
    that of a kept filter stays as it is."""
    return torch.where(keep, factors, (factors + delta).clamp(max=ceiling))


# ---- 07 · feature flow -------------------------------------------------------------------------


@exercise(
    ([torch.tensor([0.0, 0.0]), torch.tensor([1.0, -1.0]), torch.tensor([2.0, -2.0])],),
    ([torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0, 2.0]])],),
    ([torch.arange(6.0).reshape(2, 3) * f for f in (1.0, 3.0, 2.0, 2.5)],),
)
def flow(features: list[torch.Tensor]) -> tuple[float, float]:
    """Length: the sum over l of the mean of |x[l+1] - x[l]|. Curvature: the same of the
    differences of neighbouring steps."""
    length, curvature = measure(features)
    return float(length), float(curvature)


# ---- 08 · a fair comparison --------------------------------------------------------------------

exercise(([0.1, -0.2, 0.4],), ([1.0, 1.25],), ([0.3, 0.1, 0.2, -0.1, 0.0],))(half_width)


# ---- 09 · your own network ---------------------------------------------------------------------


@exercise(
    ({0.0: 93.0, 0.2: 92.5, 0.4: 91.0, 0.6: 80.0}, 2.0),
    ({0.0: 93.0, 0.3: 90.0, 0.5: 92.8, 0.7: 60.0}, 0.5),
    ({0.0: 75.0, 0.5: 70.0}, 1.0),
)
def largest_reduction(measured: dict[float, float], points: float) -> float:
    """Among the reductions whose top-1 is at least that of reduction 0.0 minus `points`, return
    the largest; reduction 0.0 itself is always among them."""
    allowed = measured[0.0] - points
    return max(reduction for reduction, top1 in measured.items() if top1 >= allowed)


@exercise(
    (torch.tensor([[1.0, -0.4, 0.003], [0.01, 0.0055, -0.0033]]),),
    (torch.tensor([[-2.54, 1.0, 0.011, 0.0], [0.3, 0.1, -0.07, 0.2], [40.0, 3.0, 1.0, -9.0]]),),
)
def in_int8(weights: torch.Tensor) -> torch.Tensor:
    """The scale of a filter, a row, is its largest absolute weight over 127 (keepdim=True keeps it
    a column); round weights / scale, and multiply by scale."""
    scale = weights.abs().max(1, keepdim=True).values / 127
    return (weights / scale).round() * scale


# ---- 10 · the family ---------------------------------------------------------------------------


@exercise(
    (torch.tensor([0.3, 0.1, 0.2]), 0.5),
    (torch.tensor([1.0, 2.0, 3.0, 0.5]), 0.25),
    (torch.tensor([2.0, 1.0]), 0.0),
)
def zeroed(norms: torch.Tensor, share: float) -> torch.Tensor:
    """Round share · filters up to a whole number; that many of smallest norm (argsort) are True."""
    gone = torch.zeros(len(norms), dtype=torch.bool)
    gone[norms.argsort()[: math.ceil(share * len(norms))]] = True
    return gone


# ---- 11 · a penalty of your own ----------------------------------------------------------------


@exercise(
    ({"a": torch.tensor([[3.0, 4.0], [0.0, 2.0]])}, {"a": torch.tensor([False, True])}, 0.1),
    (
        {"a": _FILTERS, "b": _READERS},
        {"a": torch.tensor([True, False, True, False]), "b": torch.tensor([True, False, True])},
        2.0,
    ),
    ({"a": _READERS}, {"a": torch.tensor([False, False, False])}, 0.5),
)
def group_lasso(
    weights: dict[str, torch.Tensor], masks: dict[str, torch.Tensor], strength: float
) -> torch.Tensor:
    """Of each layer take the dropped filters, w[~keep], as rows (flatten(1)); add up the roots of
    their sums of squares, not the squares; then over the layers; then times the strength."""
    norms = [w[~masks[name]].flatten(1).norm(2, 1).sum() for name, w in weights.items()]
    return strength * torch.stack(norms).sum()


# ---- 12 · which method, when? ------------------------------------------------------------------


@exercise(
    ({0: 81.1, 1: 80.0, 4: 80.8, 16: 82.3}, {0: 11.9, 1: 72.2, 4: 78.7, 16: 81.4}, 1.0),
    ({0: 61.1, 1: 79.0, 4: 80.8}, {0: 11.9, 1: 72.2, 4: 78.7}, 1.0),
    ({0: 70.0, 2: 80.0, 8: 79.0}, {0: 70.5, 2: 60.0, 8: 79.5}, 1.0),
)
def level_after(prepared: dict[int, float], unprepared: dict[int, float], within: float) -> float:
    """The first epochs of repair from which on, at these and at all longer repairs, the unprepared
    network is at most `within` points behind; float("inf") if it never is."""
    found = math.inf
    for epochs in sorted(prepared, reverse=True):  # from the longest repair back
        if prepared[epochs] - unprepared[epochs] > within:
            return found
        found = epochs
    return found
