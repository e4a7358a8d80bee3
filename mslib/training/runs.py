"""The folder of one training: whose run it is, one process at a time, checkpoints, results."""

import hashlib
import itertools
import json
import logging
import math
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout
from torch import nn
from torch.utils._pytree import tree_leaves

from ..data.identity import PLAIN, file_digest
from ..files import digest, read_json, read_tensors, write_json, write_tensors
from ..networks import load, save, unwrap
from ..processes import rank, wait

log = logging.getLogger("mslib")
HISTORY = ("epoch", "lr", "loss", "penalty", "val_top1", "gamma_median", "gamma_below")
CHECKPOINT = {"run", "model", "optimizer", "history", "gammas", "seconds", "penalty"}
RESULTS = ("model.pt", "gammas.pt", "penalty.pt")
WRITTEN = ("settings.json", "history.json", *RESULTS, "epoch-*.pt")
ELSEWHERE = "it cannot be told whose run this is: give another folder"

# ---- identity ----------------------------------------------------------------------------------


def identity(model: nn.Module, data: Any, penalty: Any, settings: dict) -> dict:
    """What decides the outcome of a training, as JSON keeps it.

    `settings`, what the penalty and the data are, the layers of the network, and the bytes of its
    weights and buffers. Not the kind of device: another one rounds otherwise, no more.
    Raises ValueError where data or penalty cannot be told from others.
    """
    remedy = "; without a run folder (run=None) it can be trained all the same"
    known = penalty.identity() if hasattr(penalty, "identity") else None
    if penalty is not None and known is None:
        raise ValueError(
            f"the penalty {penalty!r} cannot be told from others: derive its class from ms.Penalty "
            f"and give it `identity()`, what decides its effect{remedy}"
        )
    if (images := data.fingerprint) is None:
        usual = "ms.load_data, ms.load_folder, or data with identity() and persistent_workers=False"
        raise ValueError(f"these data have no identity: use {usual}{remedy}")
    try:
        known = json.loads(json.dumps(known, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{penalty!r}.identity() is no plain JSON value: {error}") from None
    return settings | {"penalty": known, "data": images, **network_digest(model)}


def network_digest(model: nn.Module) -> dict[str, str]:
    """What a network is: a digest of its layers, one of the bytes of its weights and buffers."""
    # whether there is a bias, the weights tell; not every version of PyTorch says so in a repr, too
    told = "".join([repr(model), *_untold(model)])
    layers = re.sub(r" at 0x\w+|, bias=(?:True|False)", "", told).encode()
    named = (model.named_parameters, model.named_buffers)
    tensors = itertools.chain.from_iterable(of(remove_duplicate=False) for of in named)
    return {"layers": hashlib.sha256(layers).hexdigest(), "weights": digest(tensors)}


def _untold(model: nn.Module) -> Iterator[str]:
    """What decides, too, what the modules compute, and is not in their repr: plain attributes."""
    for name, m in unwrap(model).named_modules():  # a wrapper's depend on the machine
        kind, told = type(m).__module__, type(m).extra_repr is not nn.Module.extra_repr
        own = {} if kind.startswith("mslib.") or told and kind.startswith("torch.nn.") else vars(m)
        for key, value in sorted(own.items()):
            plain = all(isinstance(leaf, PLAIN) for leaf in tree_leaves(value))
            if plain and key[0] != "_" and key != "training":
                yield f"\n{name}.{key} of {kind}.{type(m).__qualname__}: {value!r}"


def check_settings(folder: Path, have: dict, want: dict) -> None:
    """ValueError that names each setting in which the run in `folder` is another one."""
    unknown, missing = sorted({*have} - {*want}), sorted({*want} - {*have})
    if unknown or missing:
        raise ValueError(
            f"{folder} was made by another version of mslib: of its settings {unknown or 'none'} "
            f"are unknown here, and {missing or 'none'} are missing; give another folder"
        )
    differ = _differences(have, want)
    if len(differ) == 1 and have.get("weights") != want.get("weights"):
        raise ValueError(
            f"{folder} holds a run of a network that began with other weights: {differ[0]}. "
            "Call torch.manual_seed(…) before the network is made, and do not train it before; "
            "or give another folder"
        )
    if differ:
        raise ValueError(
            f"{folder} holds a run made with other settings: {', '.join(differ)}; "
            "give another folder"
        )


def _differences(have, want, name=""):
    if isinstance(have, list) and isinstance(want, list):
        have, want = dict(enumerate(have)), dict(enumerate(want))
    if not (isinstance(have, dict) and isinstance(want, dict)):
        return [] if have == want else [f"{name}={_short(have)} (now {_short(want)})"]
    found = []
    for key in sorted({*have, *want}):
        found += _differences(have.get(key), want.get(key), f"{name}.{key}".strip("."))
    return found


def _short(value):
    text = re.sub(r"\b([0-9a-f]{8})[0-9a-f]{8,}\b", r"\1…", repr(value))
    return text if len(text) <= 80 else f"{text[:79]}…"


# ---- one process at a time ---------------------------------------------------------------------


@contextmanager
def locked(folder: str | Path, patience: float = 30.0) -> Iterator[None]:
    """Hold `folder`, made if need be, for this process alone; the lock ends with the process.

    Raises RuntimeError that names the holder, after `patience` seconds.
    """
    folder = Path(folder)
    lock, holder = FileLock(folder / ".lock"), folder / ".holder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=patience)
        holder.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise RuntimeError(
            f"{folder} is in use by {who}; wait until that has ended, or give another folder"
        ) from None
    except OSError as error:
        lock.release()
        raise OSError(
            f"cannot write {folder} ({error.strerror or error}); choose a folder you may write to"
        ) from error
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextmanager
def opened(path: str | Path, settings: dict, free: tuple[str, ...] = ()) -> Iterator["Run"]:
    """The run folder of `settings`, held for this process unless its run is finished.

    `free`: names of settings for which the run's own value counts.
    Raises ValueError for a folder of another run, which stays as it is.
    """
    run = Run(path, settings)
    with nullcontext() if rank() or run.finished else locked(run.path):
        if not rank():
            run.begin(free)
        wait()  # under torchrun the first process decides for all
        run.settings = read_json(run.path / "settings.json")
        yield run


# ---- the folder --------------------------------------------------------------------------------


class Run:
    """settings.json; while training, the two newest epoch-NNNN.pt; at the end model.pt, gammas.pt,
    penalty.pt (if the penalty has a state) and history.json, which marks the run as finished and
    has the digests of these."""

    def __init__(self, path: str | Path, settings: dict):
        if not str(path):
            raise ValueError("run='': expected a folder, such as 'runs/first', or None for none")
        self.path, self.settings = Path(path), settings

    @property
    def finished(self) -> bool:
        return (self.path / "history.json").exists()

    @property
    def id(self) -> str:
        """What every checkpoint of this run carries."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def begin(self, free: tuple[str, ...]) -> None:
        """Take over the folder: as a new one, or as the one that this very run has begun."""
        file = self.path / "settings.json"
        if file.exists():
            have = read_json(file)
            own = {name: have[name] for name in free if name in have}
            check_settings(self.path, have, self.settings | own)
            # what a killed process was writing, or had no time to remove
            left = [f".{name.replace('.', '.*.part.')}" for name in WRITTEN]
            for path in self._found(*left) + self.checkpoints() * self.finished:
                path.unlink(missing_ok=True)
        elif found := self._found(*WRITTEN):
            raise ValueError(f"{found[0]} is of a run without its {file.name}; {ELSEWHERE}")
        else:
            write_json(file, self.settings)

    def _found(self, *patterns: str) -> list[Path]:
        return [path for pattern in patterns for path in self.path.glob(pattern)]

    def checkpoints(self) -> list[Path]:
        """Paths of the checkpoints, newest first."""
        return sorted(self._found("epoch-*.pt"), key=lambda p: (len(p.name), p.name), reverse=True)

    def save_checkpoint(self, epoch: int, state: dict) -> None:
        write_tensors(self.path / f"epoch-{epoch:04d}.pt", state | {"run": self.id})
        for old in self.checkpoints()[2:]:
            old.unlink()

    def latest(self) -> dict | None:
        """The newest checkpoint that can be read, or None; damaged ones are named, passed over."""
        for path in self.checkpoints():
            try:
                state = read_tensors(path)
                if not isinstance(state, dict) or {*state} != CHECKPOINT:
                    raise ValueError("it is no checkpoint")
            except Exception as error:  # of many kinds, by what is damaged
                log.warning("%s is passed over for the one before, or the start: %s", path, error)
                continue
            if state["run"] != self.id:
                raise ValueError(f"{path} is a checkpoint of another run; {ELSEWHERE}")
            return state
        return None

    def finish(self, model: nn.Module, state: dict) -> None:
        """Write the results; history.json comes last, and the checkpoints go after it."""
        save(model, self.path / "model.pt")
        write_tensors(self.path / "gammas.pt", state["gammas"])
        if state["penalty"]:
            write_tensors(self.path / "penalty.pt", state["penalty"])
        rows = [
            row | {"val_top1": None if math.isnan(row["val_top1"]) else row["val_top1"]}
            for row in state["history"]
        ]
        told = {"epochs": rows, "seconds": round(state["seconds"])} | environment()
        told["files"] = {path.name: file_digest(path) for path in self._found(*RESULTS)}
        write_json(self.path / "history.json", told)
        for path in self.checkpoints():
            path.unlink(missing_ok=True)

    def results(self, model: nn.Module, penalty: Any) -> pd.DataFrame:
        """Give `model` and `penalty` what the finished run ended with; return its history."""
        history = read_history(self.path)
        files = read_json(self.path / "history.json").get("files", {})
        for path in self._found(*RESULTS):  # earlier versions noted no digests
            if files.get(path.name, "") not in ("", file_digest(path)):
                raise ValueError(f"{path} is damaged, or not of this run; {ELSEWHERE}")
        load(self.path / "model.pt", model)
        if penalty_state(penalty):
            penalty.load_state_dict(read_tensors(self.path / "penalty.pt"))
        return history


def penalty_state(penalty: Any) -> dict:
    """What of a penalty, which may be a plain callable or None, changes while training."""
    return penalty.state_dict() if hasattr(penalty, "state_dict") else {}


def read_history(path: str | Path) -> pd.DataFrame:
    """The history of the finished run in folder `path`, one row an epoch."""
    file = Path(path) / "history.json"
    rows = read_json(file).get("epochs")
    try:
        return pd.DataFrame(rows)[list(HISTORY)].astype(dict.fromkeys(HISTORY[1:], float))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file} is no history of a run; {ELSEWHERE}") from None


def environment() -> dict[str, Any]:
    """What a figure depends on besides its settings: versions, hardware, date."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    cpu = found.group(1).strip() if found else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
        "hardware": f"{gpu}, {cpu}" if gpu else f"{cpu}, CPU",
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
    }
