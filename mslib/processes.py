"""Several processes of one training, started by torchrun: each takes its share of every batch."""

import os

import torch
from torch import distributed, nn


def world():
    """How many processes train together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """Which of them this is; the first, 0, writes the files."""
    return int(os.environ.get("RANK", 0))


def wrap(model, device):
    """`model`, or, among several processes, a wrapper that averages their gradients (DDP over NCCL or gloo)."""
    if world() == 1:
        return model
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def mean(value):
    """The mean of a tensor over the processes."""
    if world() > 1:
        distributed.all_reduce(value)
        value /= world()
    return value


def agree(model):
    """Give all processes the running statistics of the first: BatchNorms see a share of the images only."""
    if world() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def wait():
    """Go on when all processes are here: what the first has written is there for the others."""
    if world() > 1:
        distributed.barrier()
