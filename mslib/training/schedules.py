"""How the learning rate runs through a training, and the momentum that every training has."""

import math

import torch

MOMENTUM = 0.9
SCHEDULES = ("onecycle", "step", "constant")


def learning_rates(lr: float, steps: int, schedule: str = "onecycle") -> torch.Tensor:
    """The learning rate of each of `steps` iterations, float64 [steps].

    "onecycle": linear from 0 to `lr` in a fifth of the run, then a half cosine back to 0.
    "step": `lr`, divided by ten after half and after three quarters of the run.
    "constant": `lr`.

    Raises ValueError for another schedule, a negative `lr`, or no whole number of steps.
    """
    if steps != steps // 1 or steps < 1 or not 0 <= lr < math.inf:
        raise ValueError(f"{lr=}, {steps=}: expected a number from 0 on, and 1 iteration or more")
    t = torch.arange(steps, dtype=torch.float64) / steps  # share of the run that is over, [steps]
    if schedule == "onecycle":
        rise = (t + 1 / steps) / 0.2
        return lr * torch.where(rise < 1, rise, (1 + torch.cos(math.pi * (t - 0.2) / 0.8)) / 2)
    if schedule == "step":
        return lr * 0.1 ** ((t >= 0.5).double() + (t >= 0.75).double())
    if schedule == "constant":
        return torch.full((steps,), float(lr), dtype=torch.float64)
    raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")
