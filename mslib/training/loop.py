"""The only training loop: every training, with a penalty or without, is a call of `fit`."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from .. import processes as parallel
from ..data.tensors import Data, Split, batches, own_draws, seed_draws, steps_per_epoch
from ..files import packed
from ..networks import batch_norms, check_savable, copied, named_tensors
from .checks import (
    Settings,
    as_data,
    check_labels,
    check_penalty,
    check_teacher,
    check_trainable,
    classes_in,
    count_outputs,
    first_batch,
)
from .device import pick_device, pick_layout, pick_precision
from .progress import Progress
from .runs import identity, network_digest, opened, penalty_state
from .schedules import MOMENTUM, learning_rates

TEMPERATURE = 4.0  # softens what a teacher says: at 1 its second thoughts hardly count


def fit(
    model: nn.Module,
    data: Data | Iterable,
    *,
    epochs: int,
    lr: float,
    batch_size: int = 128,
    schedule: str = "onecycle",
    weight_decay: float = 5e-4,
    penalty: Callable[[], Tensor] | None = None,
    teacher: nn.Module | None = None,
    seed: int = 0,
    run: str | Path | None = None,
    frozen_statistics: bool = False,
    precision: str = "auto",
    device: str | torch.device = "auto",
    capture: bool | None = None,
) -> pd.DataFrame:
    """Train `model` in place with SGD (Nesterov momentum 0.9); return its history, a row an epoch.

    data: `Data` of tensors, augmented here in batches of `batch_size`; `Data` of DataLoaders, which
        make batches of their own; or one DataLoader to train on (then val_top1 is nan).
    penalty: a callable without arguments whose scalar is added to the cross-entropy. Of an
        `ms.Penalty`, the other methods are called too.
    teacher: a trained network, such as the one before the cut: half of the cross-entropy makes
        room for its softened outputs at temperature 4 (distillation, Hinton et al. 2015,
        section 2). It stays as it is.
    seed: decides on order, augmentation and dropout; the caller's random state stays as it is.
    run: a folder. A finished run in it is loaded instead of trained again; an interrupted one goes
        on from its last epoch and ends, on the CPU, with the same weights, bit for bit.
    frozen_statistics: leave mean and variance of BatchNorms as they are.
    precision: "bf16" (autocast), "fp32", or "auto": the device's own, or of the run begun before.
    capture: torch.compile the network's pass, on a GPU as CUDA graphs: worth its minutes of
        preparation in long trainings. None: if the environment variable MSLIB_CAPTURE is 1.

    Under torchrun each process takes its share of every batch, and all end with the same weights:
    those of one process for tensors with `frozen_statistics`; else each BatchNorm sees its own
    share, and DataLoaders shuffle otherwise than for one.

    History: epoch, lr (at its end), loss (cross-entropy on the augmented images), penalty, val_top1
    (percent), gamma_median, gamma_below (share of BatchNorm |γ| < 0.01). A run keeps every |γ| in
    gammas.pt, float16 [epochs + 1, channels], row 0 before training.
    Raises ValueError for what does not fit together, or a folder of another run; RuntimeError for a
    folder in use; FloatingPointError when training diverges.
    """
    settings = Settings(epochs, lr, batch_size, schedule, weight_decay, seed, frozen_statistics)
    held_out = getattr(data, "val", None)  # a DataLoader alone has none
    data, device = as_data(data, batch_size), pick_device(device)
    with own_draws([device.index or 0] if device.type == "cuda" else ()):
        check_trainable(model)
        x, y = first_batch(data.train)
        outputs = count_outputs(model, x[:1])
        check_labels(y, outputs)
        check_penalty(model, penalty)
        check_teacher(teacher, x[:1], outputs)
        computed = pick_precision(precision, device, model, x[:1])
        training = _Training(model, data.train, held_out, penalty, settings, device, outputs, run)
        training.teacher = None if teacher is None else copied(teacher)
        asked = os.environ.get("MSLIB_CAPTURE") == "1" if capture is None else capture
        parallel.join(device)
        if run is None:
            return training.go(None, computed, asked)
        check_savable(model)
        packed(penalty_state(penalty), f"the state of {penalty!r}")
        wanted = asdict(settings) | {"precision": computed, "processes": parallel.world()}
        wanted["teacher"] = None if teacher is None else network_digest(teacher)
        free = ("precision",) if precision == "auto" else ()
        with opened(run, identity(model, data, penalty, wanted), free) as folder:
            if not folder.finished:
                return training.go(folder, folder.settings["precision"], asked)
            history = folder.results(model, penalty)
            # as a training leaves it: what is computed from it next must come out bit for bit
            layout = pick_layout(model, device, folder.settings["precision"])
            model.to(device, memory_format=layout)
            training.tell(f"loaded, finished before: {epochs} epochs", history.iloc[-1])
            return history


class _Training:
    """One training: what stays the same through it, and what a checkpoint keeps."""

    def __init__(self, model, train, val, penalty, settings, device, outputs, run):
        self.model, self.train, self.val, self.penalty = model, train, val, penalty
        self.settings, self.device, self.outputs = settings, device, outputs
        self.progress = Progress(Path(run or "fit").name)
        self.steps = steps_per_epoch(train, settings.batch_size)
        rates = learning_rates(settings.lr, settings.epochs * self.steps, settings.schedule)
        self.rates = rates.tolist()  # float [epochs · steps]
        self.teacher: Any = None
        self.history, self.gammas, self.seconds = [], [all_gammas(model)], 0.0

    def go(self, run: Any, precision: str, capture: bool) -> pd.DataFrame:
        """Train from the first step, or from the newest checkpoint of `run`, to the last."""
        network, epochs = self._prepare(run, precision, capture), self.settings.epochs
        writes = run and not parallel.rank()
        for epoch in range(len(self.history), epochs):
            began = time.monotonic()
            self._epoch(network, epoch)
            self.seconds += time.monotonic() - began
            if writes:
                run.save_checkpoint(epoch + 1, self._state())
            row = self.history[-1]
            self.tell(f"epoch {epoch + 1}/{epochs}, loss {row['loss']:.3f}", row)
        self.progress.close()
        if writes:
            run.finish(self.model, self._state())
        parallel.wait()
        return pd.DataFrame(self.history)

    def _prepare(self, run, precision, capture):
        """All to its place, back to where an interrupted run was; what stands for the network."""
        self.precision, self.layout = precision, pick_layout(self.model, self.device, precision)
        self.model.to(self.device, memory_format=self.layout)
        if self.teacher is not None:
            self.teacher.to(self.device, memory_format=self.layout).eval()
        self.train, self.val = (
            split.to(self.device) if isinstance(split, Split) else split
            for split in (self.train, self.val)
        )
        s = self.settings
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), s.lr, MOMENTUM, weight_decay=s.weight_decay, nesterov=True
        )
        if run and (state := run.latest()):
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.history, self.gammas = state["history"], list(state["gammas"])
            self.seconds = state["seconds"]
            self._ask_penalty("load_state_dict", state["penalty"])
        parallel.wait()  # every process has read where to begin, before the first writes on
        network = parallel.wrap(self.model, self.device)
        if not capture:
            return network
        # it would reuse a graph made without a penalty's hooks, and gives up after 8 networks
        torch.compiler.reset()
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        return torch.compile(network, mode=mode)

    def _epoch(self, network, epoch):
        """Train on every batch once; add a row to the history."""
        self.model.train()
        if self.settings.frozen_statistics:
            for m in self.model.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.eval()
        with getattr(self.penalty, "attached", nullcontext)():
            loss, extra = self._steps(network, epoch)
        parallel.agree(self.model)
        finite = all(bool(p.isfinite().all()) for p in self.model.parameters())
        if not finite or not math.isfinite(loss + extra):
            lr = self.settings.lr
            raise FloatingPointError(
                f"training diverged in epoch {epoch + 1} at lr={lr}; try a smaller lr, such as "
                f"{lr / 4:g}, in a run folder of its own"
            )
        self.gammas.append(all_gammas(self.model))
        gammas = self.gammas[-1].float()
        self.history.append(
            {
                "epoch": epoch + 1,
                "lr": self.rates[(epoch + 1) * self.steps - 1],
                "loss": loss,
                "penalty": extra,
                "val_top1": math.nan if self.val is None else evaluate(self.model, self.val),
                "gamma_median": float(gammas.median()),
                "gamma_below": float((gammas < 0.01).float().mean()),
            }
        )

    def _steps(self, network, epoch):
        """The steps of one epoch; mean cross-entropy and mean penalty, two floats."""
        total = total_penalty = torch.zeros((), device=self.device)
        for i, (x, y) in enumerate(self._batches(epoch)):  # [N, C, H, W], [N]
            iteration = epoch * self.steps + i
            rate = self.rates[iteration]
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self._ask_penalty("step", iteration)
            self.optimizer.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                outputs = network(x)  # [N, classes]
                loss = nn.functional.cross_entropy(outputs, y)
                goal = loss
                if self.teacher is not None:
                    goal = (loss + self._distance(outputs, x)) / 2
            extra = self.penalty() if self.penalty is not None else torch.zeros_like(loss)
            if not isinstance(extra, Tensor) or extra.numel() != 1:
                raise ValueError(f"{self.penalty!r} gave {extra!r:.80}; expected a scalar tensor")
            (goal + extra).backward()
            self.optimizer.step()
            self._ask_penalty("proximal_step", rate / (1 - MOMENTUM))
            total, total_penalty = total + loss.detach(), total_penalty + extra.detach()
            if i % 10 == 0:
                of = self.settings.epochs
                self.progress.update(f"epoch {epoch + 1}/{of}, step {i + 1}/{self.steps}")
        return tuple(float(parallel.mean(t)) / self.steps for t in (total, total_penalty))

    def _distance(self, outputs, x):
        """T²·KL(teacher ‖ student) of the softened outputs, a scalar of the size of a loss."""
        with torch.no_grad():
            wanted = (self.teacher(x).float() / TEMPERATURE).softmax(1)
        softened = (outputs.float() / TEMPERATURE).log_softmax(1)
        return TEMPERATURE**2 * nn.functional.kl_div(softened, wanted, reduction="batchmean")

    def _batches(self, epoch):
        """This process's share of every training batch, on the device."""
        seed = self.settings.seed * 100_003 + epoch  # an epoch draws nothing that others decide
        generator = torch.Generator().manual_seed(seed)
        seed_draws(seed)  # for dropout and DataLoaders
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(seed)
        for each in (self.train, getattr(self.train, "batch_sampler", self.train)):
            if hasattr(getattr(each, "sampler", None), "set_epoch"):  # a DistributedSampler
                each.sampler.set_epoch(seed)
        share, made = (parallel.rank(), parallel.world()), 0
        for x, y in batches(self.train, self.settings.batch_size, generator, share):
            if (made := made + 1) > self.steps:
                break
            if not isinstance(self.train, Split):
                check_labels(y, self.outputs, len(x))
            layout = self.layout if x.ndim == 4 else torch.preserve_format
            x = x.to(self.device, memory_format=layout, non_blocking=True)
            yield x, y.to(self.device, non_blocking=True)
        if made != self.steps:
            found = f"{made} batches{' or more' * (made > self.steps)}, its length is {self.steps}"
            raise ValueError(f"the DataLoader made {found}: correct that, or try drop_last=False")

    def _ask_penalty(self, name, value):
        """Call a method of the penalty, if it has it: a plain function has none."""
        if hasattr(self.penalty, name):
            getattr(self.penalty, name)(value)

    def _state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "gammas": torch.stack(self.gammas),
            "seconds": self.seconds,
            "penalty": penalty_state(self.penalty),
        }

    def tell(self, text: str, row: Any) -> None:
        """A line that stays."""
        top1 = "" if math.isnan(row["val_top1"]) else f", held-out top-1 {row['val_top1']:.2f} %"
        self.progress.update(f"{text}{top1}, {self.seconds:.0f} s", keep=True)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split | Iterable, batch_size: int = 500) -> float:
    """Top-1 in percent of `model` on a `Split` or a DataLoader, in evaluation mode.

    Afterwards all of the network is in the mode that `model` was in. ValueError without an image,
    for outputs that are not [N, classes], and for labels that are not int64 [N] of these classes.
    """
    device = next((t.device for _, t in named_tensors(model)), torch.device("cpu"))
    correct, seen, bad = 0, 0, False
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        for x, y in batches(split.to(device) if isinstance(split, Split) else split, batch_size):
            out = model(x.to(device))
            check_labels(y, classes_in(out, type(model).__name__, len(x)), len(x))
            correct += (out.argmax(1) == y.to(device)).sum()
            bad |= out.isnan().any()
            seen += len(y)
    if not seen:
        raise ValueError("no image to evaluate on: the split or DataLoader is empty")
    if bad:
        raise ValueError("outputs are nan: the network has diverged; train it with a smaller lr")
    return 100 * int(correct) / seen


def recalibrate(
    model: nn.Module,
    split: Split | Iterable,
    images: int = 2000,
    batch_size: int = 128,
    seed: int = 0,
) -> nn.Module:
    """Estimate mean and variance of every BatchNorm anew on augmented images; in place.

    After a cut they are still those of the full network. No weight changes, no label is used.
    split: `images` are drawn from it by `seed`; of a DataLoader, its first batches after
        `torch.manual_seed(seed)` are taken, `images` // `batch_size` of them.
    Returns `model`. ValueError where there is no image; on an error `model` stays as it was.
    """
    if images < 1 or batch_size < 1:
        raise ValueError(f"{images=}, {batch_size=}: both are at least 1, such as 2000 and 128")
    trial = copied(model)
    device = next((t.device for _, t in named_tensors(trial)), torch.device("cpu"))
    with own_draws(seed=seed):
        if isinstance(split, Split):
            order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
            few, drawn = split.subset(order[:images]).to(device), torch.Generator()
            loader = batches(few, min(batch_size, max(1, len(few))), drawn.manual_seed(seed))
        else:
            loader = itertools.islice(split, max(1, images // batch_size))
        if (first := next(loader := iter(loader), None)) is None:
            raise ValueError("no image for new statistics: the split or DataLoader is empty")
        torch.optim.swa_utils.update_bn(itertools.chain([first], loader), trial, device)
    norms = nn.modules.batchnorm._BatchNorm  # training mode moves more, such as spectral norms
    new = {name: m for name, m in trial.named_modules() if isinstance(m, norms)}
    for name, m in new.items():
        if not all(value.isfinite().all() for value in m.buffers()):
            raise ValueError(f"{name}: new statistics are not finite; look for nan in the images")
    for name, m in new.items():
        model.get_submodule(name).load_state_dict(m.state_dict())
    return model


def all_gammas(model: nn.Module) -> Tensor:
    """|γ| of every BatchNorm channel, in the order of the modules: float16 [channels]."""
    gammas = [m.weight.detach().abs().flatten() for _, m in batch_norms(model)]
    return torch.cat(gammas).half().cpu() if gammas else torch.zeros(1).half()
