"""Several processes of one training, started by torchrun: each takes its share of every batch."""

import os

import torch
from torch import distributed, nn


def world() -> int:
    """How many processes train together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this is; the first, 0, writes the files."""
    return int(os.environ.get("RANK", 0))


def join(device: torch.device) -> None:
    """Meet the other processes, over NCCL for GPUs and gloo for CPUs."""
    if world() > 1 and not distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """`model`, or, among several processes, a wrapper that averages their gradients (DDP)."""
    if world() == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over the processes."""
    if world() > 1:
        distributed.all_reduce(value)
        value /= world()
    return value


def agree(model: nn.Module) -> None:
    """Give all processes the running statistics of the first: each BatchNorm saw a share only."""
    if world() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def wait() -> None:
    """Go on when all processes are here: what the first has written is there for the others."""
    if world() > 1:
        distributed.barrier()
