"""Out the door: ONNX and torch.export files of a network, checked against the network itself."""

import copy
import inspect
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .files import reason, regular, replacing
from .networks import as_inputs, call, map_images, misfit, moved, tensors_in, unwrap


@torch.no_grad()
def export(model: nn.Module, path: str | Path, example: Any, tolerance: float = 1e-4) -> float:
    """Write `model`, on the CPU, in evaluation mode and for any batch size, to `path`.

    path: ends in .onnx (runs in ONNX Runtime and many others) or in .pt2 (torch.export: runs in
    PyTorch without the code that made the network).
    example: float [N, C, H, W], a tuple or list of several inputs, or a dict of inputs by name.

    The file is run on the example, and on three images of it, and compared, every tensor of its
    outputs. Returned is the largest difference, as a share of the largest value of that output.
    Raises ValueError for another ending, for a network that cannot be exported, or when the
    difference is above `tolerance`; no file is left behind then.
    """
    path, model = Path(path), unwrap(model)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{path}: the ending decides on the format; expected .onnx or .pt2")
    model = copy.deepcopy(model).cpu().eval()
    args, kwargs = moved(as_inputs(example), "cpu")
    try:
        out = call(model, example)
    except Exception as error:  # of any kind, from inside the network
        raise ValueError(misfit(model, example, error)) from error
    with replacing(path) as beside:
        write, sizes = _write_onnx if path.suffix == ".onnx" else _write_pt2, ""
        try:
            with warnings.catch_warnings(), quiet("torch.onnx", "onnxscript", "onnx_ir"):
                warnings.simplefilter("ignore")
                run = write(model, args, kwargs, beside)
                wanted, found = tensors_in(out), tensors_in(run(kwargs or args))
                sizes = " for any number of images"  # the example's alone would show nothing
                args, kwargs = map_images(lambda t: t[torch.arange(3) % len(t)], args, kwargs)
                wanted += tensors_in(call(model, kwargs or args))
                found += tensors_in(run(kwargs or args))
        except (OSError, ImportError):
            raise
        except Exception as error:  # the exporters raise many kinds, the cause at the root
            root: BaseException = error
            while root.__cause__:
                root = root.__cause__
            why, others = reason(root), [t for t in tree_leaves(out) if not torch.is_tensor(t)]
            if others and path.suffix == ".onnx":
                why = f"it returns {others[-1]!r:.60}: leave it out, make it a tensor, or use .pt2"
            refused = f"{type(model).__name__} cannot be exported to {path.suffix}{sizes}"
            raise ValueError(f"{refused}: {why}") from error
        off = difference(found, wanted)
        if not off <= tolerance:
            above = f"{off:.2g} of the largest, above tolerance={tolerance:g}"
            raise ValueError(f"{path}: its outputs are off by {above}; not written")
    return off


def difference(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest difference, as a share of the largest value of its tensor; infinite if unlike."""
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return math.inf
    off = 0.0
    for a, b in zip(found, wanted):
        if b.numel():
            a, b = a.double(), b.double()
            share = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
            off = share if not share <= off else off  # keeps a nan
    return off


def _two(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict, Any]:
    """Two images of the inputs, and which axis of each input may have any size.

    Two, since a batch of one would be taken for the only size. The axes go by the names in the
    signature of `forward`, where *args is one name of several inputs.
    """
    batch = {0: torch.export.Dim("batch", min=1)}
    axes = map_images(lambda t: batch, args, kwargs)
    places, names = tree_map(
        lambda t: t if t is batch else None, axes, is_leaf=lambda t: t is batch
    )
    args, kwargs = map_images(lambda t: torch.cat([t[:1], t[:1]]), args, kwargs)
    by_name = inspect.signature(model.forward).bind(*places, **names).arguments
    return args, kwargs, by_name


def _write_pt2(model: nn.Module, args: tuple, kwargs: dict, path: Path) -> Callable:
    """Returned is what runs the file on an example, as by `_write_onnx`."""
    few, named, shapes = _two(model, args, kwargs)
    program = torch.export.export(model, few, named, dynamic_shapes=shapes)
    content = io.BytesIO()  # torch itself would hide what a full disk says
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())
    return partial(call, torch.export.load(path).module())


def _write_onnx(model: nn.Module, args: tuple, kwargs: dict, path: Path) -> Callable:
    few, named, shapes = _two(model, args, kwargs)
    program = torch.onnx.export(
        model,
        (*few, named),  # a dict at the end is taken for inputs by name, an empty one too
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=["images"] if len(few) == 1 and not named else None,
        verbose=False,
    )
    assert program is not None  # as with dynamo=True
    program.save(path, external_data=False)
    return partial(call, OnnxNetwork(path))


def session(path: str | Path) -> Any:
    """An ONNX Runtime session for the file, on the CPU, with as many threads as PyTorch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed(file: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The inputs of an ONNX Runtime session: those with a name by it, the others in their order."""
    tensors = iter(tensors_in(args))
    names = [each.name for each in file.get_inputs()]
    found: dict[str, Any] = {name: kwargs.get(name) for name in names}
    for name in names:
        if name not in kwargs:
            found[name] = next(tensors, None)
    if any(t is None for t in found.values()) or next(tensors, None) is not None:
        raise ValueError(f"the file has the inputs {', '.join(names)}; the example has others")
    return {name: t.detach().cpu().numpy() for name, t in found.items()}


class OnnxNetwork(nn.Module):
    """An .onnx file as a network, for `evaluate` and others that call one: it runs in ONNX Runtime,
    on the CPU, and does not train.

    path: a file such as `export` and `quantize` write. Called with the file's inputs, tensors in
    their order or by name; returns its output, or a tuple of several.
    Raises FileNotFoundError, or ValueError for a file that ONNX Runtime cannot read.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        try:
            self.file = session(regular(path))
        except (OSError, ImportError):
            raise
        except Exception as error:  # ONNX Runtime raises kinds of its own
            raise ValueError(f"{path} cannot be run by ONNX Runtime: {reason(error)}") from None
        # where inputs are expected; a network without parameters would be nowhere
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        found = self.file.run(None, feed(self.file, args, kwargs))
        tensors = tuple(torch.from_numpy(out) for out in found)
        return tensors[0] if len(tensors) == 1 else tensors


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Loggers of these names report errors only, as long as the block runs."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)
