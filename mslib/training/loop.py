"""The only training loop: every lesson's training, with or without a penalty, is one call of `fit`."""

import copy
import ctypes
import itertools
import math
import os
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from .. import processes as parallel
from ..data.tensors import Split, batches, steps_per_epoch
from ..files import read_tensors, write_tensors
from ..networks import batch_norms, load, save
from .progress import Progress
from .runs import Run, read_history

MOMENTUM = 0.9
SCHEDULES = ("onecycle", "step", "constant")


def learning_rates(lr, steps, schedule="onecycle"):
    """The learning rate of each of `steps` iterations, float64 [steps].

    "onecycle": linear from 0 to `lr` in a fifth of the run, then a half cosine back to 0.
    "step": `lr`, divided by ten after half and after three quarters of the run. "constant": `lr`.
    """
    t = torch.arange(steps, dtype=torch.float64) / steps
    if schedule == "onecycle":
        rise = (t + 1 / steps) / 0.2
        return lr * torch.where(rise < 1, rise, (1 + torch.cos(math.pi * (t - 0.2) / 0.8)) / 2)
    if schedule == "step":
        return lr * 0.1 ** ((t >= 0.5).double() + (t >= 0.75).double())
    if schedule == "constant":
        return torch.full((steps,), float(lr), dtype=torch.float64)
    raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")


def fit(
    model,
    data,
    *,
    epochs,
    lr,
    batch_size=128,
    schedule="onecycle",
    weight_decay=5e-4,
    penalty=None,
    seed=0,
    run=None,
    frozen_statistics=False,
    precision="auto",
    device="auto",
    capture=None,
):
    """Train `model` in place on `data.train` with SGD (Nesterov momentum 0.9); return the history, one row an epoch.

    `data`: of tensors, augmented here in whole batches of `batch_size`, or of DataLoaders with their own (`load_folder`).
    Under torchrun (`torchrun --nproc_per_node=2 script.py`) each process takes its share of every batch, and all end
    with the same weights, if they began with the same. They are those of one process where the data are tensors and
    `frozen_statistics` leaves the means and variances of BatchNorms as they are; else each BatchNorm sees its own
    process's share of the batch, as is usual, and DataLoaders shuffle otherwise than for one.
    `penalty`: a callable without arguments whose scalar is added to the cross-entropy. If it is more, a `Penalty`, its
    `step`, `proximal_step`, `attached` and `state_dict` are called as they say.
    `run`: a folder. A finished run in it is loaded instead of trained again; an interrupted one goes on from its last
    epoch and ends, on the CPU, with the same weights, bit for bit.
    `precision`: "bf16" (autocast), "fp32", or "auto": bf16 where the processor computes in it.
    `capture`: let torch.compile capture the network's pass forward and backward, on a GPU as CUDA graphs: worth its minutes
    of preparation in long trainings. None: if the environment variable MSLIB_CAPTURE is 1.

    History columns: epoch, lr (at its end), loss (cross-entropy on the augmented training images), penalty, val_top1
    (percent, held-out training images), gamma_median and gamma_below (share of BatchNorm |γ| < 0.01).
    A run keeps every |γ| after each epoch in gammas.pt, float16 [epochs + 1, channels], row 0 before training.

    Raises ValueError for settings out of range or a folder made with others, FloatingPointError when training diverges.
    """
    if epochs < 1 or lr <= 0 or batch_size < 1:
        raise ValueError(f"epochs={epochs}, lr={lr}, batch_size={batch_size}: all must be above 0")
    if isinstance(data.train, Split) and batch_size % parallel.world():
        raise ValueError(
            f"batch_size={batch_size} cannot be shared by {parallel.world()} processes; take a multiple"
        )
    device = pick_device(device)
    if device.type == "cpu":
        _keep_freed_memory()
    precision = pick_precision(precision, device, model, data)
    layout = pick_layout(model, device, precision)
    model.to(device, memory_format=layout)
    train, val = (
        split.to(device) if isinstance(split, Split) else split for split in (data.train, data.val)
    )
    steps = steps_per_epoch(train, batch_size)
    rates = learning_rates(lr, epochs * steps, schedule).tolist()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=MOMENTUM, nesterov=True, weight_decay=weight_decay
    )

    progress = Progress(Path(run).name if run else "fit")
    start, history, gammas, seconds = 0, [], [all_gammas(model)], 0.0
    if run is not None:
        run = Run(
            run,
            {
                "epochs": epochs,
                "lr": lr,
                "batch_size": batch_size,
                "schedule": schedule,
                "weight_decay": weight_decay,
                "penalty": re.sub(r" at 0x\w+", "", repr(penalty)) if penalty else None,
                "seed": seed,
                "data": data.fingerprint,
                **({"frozen_statistics": True} if frozen_statistics else {}),
                "weights_l1": sum(
                    float(p.detach().double().abs().sum()) for p in model.parameters()
                ),
            },
        )
        if run.finished:
            load(run.path / "model.pt", model)
            if (run.path / "penalty.pt").exists():
                _optional(penalty, "load_state_dict")(read_tensors(run.path / "penalty.pt"))
            history = read_history(run.path)
            progress.update(
                f"finished before, loaded: {epochs} epochs, held-out top-1 {history.val_top1.iloc[-1]:.2f} %",
                keep=True,
            )
            progress.close()
            return history
        if state := run.latest():
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            start, history, gammas, seconds = (
                state["epoch"],
                state["history"],
                list(state["gammas"]),
                state["seconds"],
            )
            _optional(penalty, "load_state_dict")(state["penalty"])

    began, wrapped = time.monotonic() - seconds, parallel.wrap(model, device)
    if os.environ.get("MSLIB_CAPTURE") == "1" if capture is None else capture:
        torch.compiler.reset()  # it would reuse a graph captured without a penalty's hooks, and gives up after eight networks
        wrapped = torch.compile(wrapped, mode="reduce-overhead" if device.type == "cuda" else None)
    for epoch in range(start, epochs):
        generator = torch.Generator().manual_seed(
            seed * 100_003 + epoch
        )  # an epoch's draws depend on nothing before it
        torch.manual_seed(seed * 100_003 + epoch)  # for what draws in a network or a DataLoader
        getattr(getattr(train, "sampler", None), "set_epoch", lambda epoch: None)(
            seed * 100_003 + epoch
        )
        model.train()
        if frozen_statistics:
            for m in model.modules():
                m.train(not isinstance(m, nn.modules.batchnorm._BatchNorm))
        mine = batches(train, batch_size, generator, (parallel.rank(), parallel.world()))
        loader = (
            (x.to(device, memory_format=layout, non_blocking=True), y.to(device, non_blocking=True))
            for x, y in mine
        )
        loss, extra = _epoch(
            wrapped,
            loader,
            optimizer,
            penalty,
            rates[epoch * steps : (epoch + 1) * steps],
            epoch * steps,
            precision,
            lambda i, epoch=epoch: progress.update(
                f"epoch {epoch + 1}/{epochs}, step {i + 1}/{steps}"
            ),
        )
        parallel.agree(model)
        gammas.append(all_gammas(model))
        history.append(
            {
                "epoch": epoch + 1,
                "lr": rates[(epoch + 1) * steps - 1],
                "loss": loss,
                "penalty": extra,
                "val_top1": evaluate(model, val, precision=precision),
                "gamma_median": float(gammas[-1].float().median()),
                "gamma_below": float((gammas[-1] < 0.01).float().mean()),
            }
        )
        row, seconds = history[-1], time.monotonic() - began
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(
                f"training diverged in epoch {epoch + 1} at lr={lr}; try a smaller lr, such as {lr / 4:g}"
            )
        if run and not parallel.rank():
            run.save_checkpoint(
                epoch + 1,
                {
                    "epoch": epoch + 1,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "history": history,
                    "gammas": torch.stack(gammas),
                    "seconds": seconds,
                    "penalty": _optional(penalty, "state_dict")(),
                },
            )
        progress.update(
            f"epoch {epoch + 1}/{epochs}, loss {row['loss']:.3f}, held-out top-1 {row['val_top1']:.2f} %, {seconds:.0f} s",
            keep=True,
        )
    progress.close()
    if run and not parallel.rank():
        save(model, run.path / "model.pt")
        write_tensors(run.path / "gammas.pt", torch.stack(gammas))
        if state := _optional(penalty, "state_dict")():
            write_tensors(run.path / "penalty.pt", state)
        run.finish(history, seconds)
    parallel.wait()
    return pd.DataFrame(history)


def _epoch(model, loader, optimizer, penalty, rates, iteration, precision, show):
    """Train on every batch of `loader` once; mean cross-entropy and mean penalty, two floats."""
    device = next(model.parameters()).device
    total = total_penalty = torch.zeros((), device=device)
    with getattr(penalty, "attached", nullcontext)():
        for i, (x, y) in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = rates[i]
            _optional(penalty, "step")(iteration + i)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = nn.functional.cross_entropy(model(x), y)
            extra = penalty() if penalty else torch.zeros((), device=device)
            (loss + extra).backward()
            optimizer.step()
            _optional(penalty, "proximal_step")(rates[i] / (1 - MOMENTUM))
            total, total_penalty = total + loss.detach(), total_penalty + extra.detach()
            if i % 10 == 0:
                show(i)
    return tuple(float(parallel.mean(t)) / len(rates) for t in (total, total_penalty))


def _keep_freed_memory():
    """Let Linux' allocator keep what is freed for the next step, where it would hand it back and get it anew, cleared page by page.

    That costs most in a Jupyter kernel. It holds for the whole process.
    """
    mallopt = (
        getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    )  # glibc has it
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no buffer is mapped on its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _optional(penalty, name):
    """The method `name` of a penalty that may be a plain callable, or None."""
    return getattr(penalty, name, lambda *_: None)


@torch.no_grad()
def evaluate(model, split, batch_size=500, precision="fp32"):
    """Top-1 accuracy in percent of `model` on `split`, or on an iterable of batches, in evaluation mode; afterwards all of it is in the mode that `model` was in."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    correct = seen = 0
    for x, y in batches(split.to(device) if isinstance(split, Split) else split, batch_size):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            correct += (model(x.to(device)).argmax(1) == y.to(device)).sum()
        seen += len(y)
    model.train(training)
    return 100 * int(correct) / seen


def recalibrate(model, split, images=2000, batch_size=128, seed=0):
    """Estimate mean and variance of every BatchNorm anew on `images` augmented images (whole batches); in place, returns `model`.

    `split`: they are drawn from it by `seed`, or, if it is an iterable of batches, taken as it gives them after
    `torch.manual_seed(seed)`, `images` // `batch_size` of its batches. After a cut the statistics are still those of the full network. No weight changes and no label is used.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(split, Split):
            few = split.subset(
                torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:images]
            ).to(device)
            loader = batches(few, min(batch_size, len(few)), torch.Generator().manual_seed(seed))
        else:
            loader = itertools.islice(split, max(1, images // batch_size))
        torch.optim.swa_utils.update_bn(loader, model, device)
    return model


def all_gammas(model):
    """|γ| of every BatchNorm channel of `model`, in the order of its modules, float16 [channels]."""
    gammas = [m.weight.detach().abs().flatten() for _, m in batch_norms(model)]
    return torch.cat(gammas).half().cpu() if gammas else torch.zeros(1).half()


def pick_device(device="auto"):
    if device == "auto":  # a GPU for each process of this machine, or the CPU for all
        enough = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        device = (
            f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            if enough and torch.cuda.is_available()
            else "cpu"
        )
    return torch.device(device)


def pick_precision(precision, device, model, data):
    """Resolve "auto": bf16 on a GPU or CPU with bf16 arithmetic (AVX-512 BF16, AMX), fp32 elsewhere, and on a CPU where
    a strided convolution reads a map of one pixel: torch's bf16 gradients hold rubbish there (seen in 2.15)."""
    if precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"unknown precision {precision!r}; known: auto, bf16, fp32")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return "fp32"
    clone, rubbish = copy.deepcopy(model).to("meta").eval(), []
    for m in clone.modules():
        if isinstance(m, nn.Conv2d) and max(m.stride) > 1 and max(m.kernel_size) > 1:
            m.register_forward_pre_hook(
                lambda _, x: rubbish.append(1) if min(x[0].shape[2:]) == 1 else None
            )
    clone(data.example.to("meta"))
    return "fp32" if rubbish else "bf16"


def pick_layout(model, device, precision):
    """Channels last, unless bf16 on a CPU meets widths that are no multiples of 8: those oneDNN pads in its own layout only.

    Measured on two cores, ResNet-56 at batch 128: channels last 338 images/s against 299; pruned to odd widths, 337 to 438.
    """
    odd = any(m.out_channels % 8 for m in model.modules() if isinstance(m, nn.Conv2d))
    return (
        torch.contiguous_format
        if odd and precision == "bf16" and device.type == "cpu"
        else torch.channels_last
    )
