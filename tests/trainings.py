"""Trainings that tests start in processes of their own, to kill them or to let them meet."""

import multiprocessing
import os

import torch

import mslib as ms

from .conftest import tiny_data

# children come from a process that has imported everything and computed nothing: cheap, and safe
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.trainings"])

EPOCHS = 5


def train(folder, barrier=None):
    """A training of less than a second, with a penalty that has a state."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, data = ms.resnet(8, 3), tiny_data(64)
    growing = ms.GrowingL2(model, data.example, reduction=0.5, every=10, pick_ceiling=2e-5)
    masks = {"stage3.0.bn1": torch.arange(64) < 32}
    if barrier:
        barrier.wait()
    ms.fit(
        model,
        data,
        epochs=EPOCHS,
        lr=0.05,
        batch_size=8,
        precision="fp32",
        device="cpu",
        penalty=ms.MaskedL1(model, masks, 1e-3) + growing,
        run=folder,
    )


def start(*words, target=train):
    """Begin it in another process, whose stderr nobody sees."""
    process = processes.Process(target=quiet, args=(target, *words))
    process.start()
    return process


def quiet(target, *words):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    target(*words)


def hold(folder, held):
    """Take the lock of a folder, and keep it until killed."""
    from mslib.training.runs import locked

    with locked(folder):
        held.set()
        multiprocessing.Event().wait()
