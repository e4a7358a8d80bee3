"""Trainings that tests start in processes of their own, to kill them or to let them meet."""

import multiprocessing
import os
import socket

import torch

import mslib as ms

from .conftest import lively, tiny_data

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
    process = processes.Process(target=quiet, args=(target, *words), daemon=True)
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


def take_the_stage(cfg, said):
    """Wait for a stage of the course, and tell what is said meanwhile."""
    from mslib.course.lessons import _alone

    with _alone(ms.stage("01_baseline", cfg), said.put):
        said.put("mine")


def share(folder, frozen=True):
    """A training that several processes may do together; its run folder, and what this one has."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, data, rank = lively(ms.resnet(8, 3)), tiny_data(160), os.environ.get("RANK", 0)
    masks = {n: g > g.median() for n, g in ms.gammas(model, data.example).items()}
    penalty = ms.MaskedL1(model, masks, 1e-3)
    how = dict(epochs=3, lr=0.02, batch_size=16, precision="fp32", device="cpu")
    ms.fit(model, data, **how, penalty=penalty, run=folder, frozen_statistics=frozen)
    torch.save(model.state_dict(), f"{folder}/own-{rank}.pt")


def join(rank, port, *words):
    """`share` as one of two processes, as torchrun starts them."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    share(*words)


def together(*words):
    """`share` in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [start(rank, port, *words, target=join) for rank in range(2)]
    for process in both:
        process.join()
        assert process.exitcode == 0
