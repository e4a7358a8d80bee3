"""What data are, as a digest: what could train a network otherwise gets another one."""

import hashlib
import os
from collections.abc import Iterable
from enum import Enum
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

PLAIN = (str, bytes, int, float, type(None), range, Enum, np.generic, torch.dtype)
HASHED = 2**28  # up to so many bytes of files are told by content, more by the time of each
LOADER = ("dataset", "batch_sampler", "sampler", "batch_size", "drop_last", "collate_fn")
WORKERS = ("num_workers", "worker_init_fn", "persistent_workers", "generator")


def digest(*values: object) -> str | None:
    """Twelve hex digits that tell `values` from others; None if one of them cannot be identified.

    Tensors, arrays, texts, numbers and containers of them are told by their content; samplers,
    transforms and data sets of torch and torchvision by all that they hold, files included. Other
    objects need a method `identity()` that returns such values. A function of one's own cannot be
    identified, nor can a random generator or persistent worker, whose state moves on.
    """
    sink = hashlib.sha256()
    try:
        _feed(sink, values)
    except (TypeError, RecursionError):
        return None
    return sink.hexdigest()[:12]


def files_state(folder: str | Path, files: Iterable[str | Path]) -> list[tuple]:
    """Name below `folder`, size, and content (where all are large: time) of each of the `files`."""
    stats = {file: os.stat(file) for file in files}
    small = sum(stat.st_size for stat in stats.values()) <= HASHED
    return [
        (os.path.relpath(file, folder), s.st_size, file_digest(file) if small else s.st_mtime_ns)
        for file, s in stats.items()
    ]


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, read again only after it has changed."""
    stat = os.stat(path)
    return _file_digest(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=100_000)
def _file_digest(path: str | Path, *stat: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _feed(sink: Any, value: object) -> None:
    """Add `value` to the digest; TypeError if it cannot be identified."""
    if isinstance(value, PLAIN):
        sink.update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        plain = torch.as_tensor(value).detach().cpu().contiguous()
        sink.update(f"{plain.dtype} {tuple(plain.shape)};".encode())
        sink.update(plain.flatten().view(torch.uint8).numpy())
    elif isinstance(value, (list, tuple, dict, set)):
        items = list(value.items()) if isinstance(value, dict) else list(value)
        sink.update(f"{type(value).__name__} {len(items)};".encode())
        if all(isinstance(item, PLAIN) for item in items):  # at once: there may be a million
            items = [repr(sorted(items, key=repr) if isinstance(value, set) else items)]
        for item in items:
            _feed(sink, item)
    else:
        _feed_object(sink, value)


def _feed_object(sink: Any, value: object) -> None:
    kind = value if isinstance(value, (type, FunctionType)) else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    sink.update(f"{name};".encode())
    if kind is not value and hasattr(value, "identity"):
        if value.identity() is None:
            raise TypeError(name)
        _feed(sink, value.identity())
    elif "<" in name or name.split(".")[0] not in ("torch", "torchvision", "mslib"):
        raise TypeError(name)
    elif kind is not value:
        _feed(sink, _state(value))


def _state(value: object) -> dict | list:
    """What decides how an object of torch or torchvision behaves; TypeError if it does not say."""
    if isinstance(value, DataLoader):
        if value.persistent_workers:
            raise TypeError("workers whose random state moves on from epoch to epoch")
        return [getattr(value, key) for key in (*LOADER, *WORKERS)]
    state = dict(vars(value))
    if isinstance(value, Sampler):  # without the data themselves, and the place in a run
        return {
            k: v for k, v in state.items() if k not in ("data_source", "dataset", "epoch", "rank")
        }
    if "root" in state:  # a data set of torchvision, wherever it lies
        root = state.pop("root")
        if "samples" in state:
            state["imgs"] = files_state(root, [path for path, _ in state.pop("samples")])
        elif "data" not in state:
            raise TypeError("files that it lists in a way of its own")
    return state
