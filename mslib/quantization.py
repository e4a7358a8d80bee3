"""After pruning: an .onnx file in int8, calibrated on images and compared with the float file."""

import itertools
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .data.tensors import Split, sample
from .exports import difference, feed, quiet, session
from .files import reason, regular, replacing


def quantize(
    source: str | Path,
    path: str | Path,
    split: Split | Iterable,
    images: int = 500,
    batch_size: int = 100,
    seed: int = 0,
    tolerance: float = 0.5,
) -> float:
    """Write the float .onnx file `source` in int8 to `path`, for ONNX Runtime.

    Static quantization (Jacob et al., CVPR 2018): weights in 7 of 8 bits, a scale for each channel
    (with 8, processors without VNNI may overflow); activations in 8 bits, with the range that they
    have on the calibration images. Written as QDQ: operations in float between QuantizeLinear and
    DequantizeLinear, which ONNX Runtime joins into integer ones.

    source: a file with one input of images, such as `export` writes. split: training images, a
    `Split`, of which `images` are drawn by `seed` in batches of `batch_size`; or a DataLoader, of
    which the first `images` are taken. Labels are not used.

    Both files run on the first batch. Returned is the largest difference of an output, as a share
    of its largest value; a few percent are usual. What it costs, `evaluate(OnnxNetwork(path), …)`
    and `latency(path, …)` tell.
    Raises FileNotFoundError, or ValueError for another ending, a file that is damaged, quantized
    already or has several inputs, images that do not fit it, and a difference above `tolerance`; no
    file is left behind then.
    """
    source, path = regular(source), Path(path)
    for each in (source, path):
        if each.suffix != ".onnx":
            raise ValueError(f"{each}: expected a name that ends in .onnx")
    try:
        before = session(source)
        kinds = _operations(source)
    except ImportError:
        raise
    except Exception as error:  # ONNX Runtime raises kinds of its own
        raise ValueError(f"{source} cannot be read as ONNX: {reason(error)}") from None
    if "QuantizeLinear" in kinds:  # ONNX Runtime would work on it for many minutes
        raise ValueError(f"{source} is quantized already; give the float file of ms.export")
    inputs = [each.name for each in before.get_inputs()]
    if len(inputs) != 1:
        raise ValueError(f"{source} has the inputs {', '.join(inputs)}; expected one, of images")
    batches = (x for x, _ in sample(split, images, batch_size, seed))
    first = _fitting(before, next(batches))  # else refused, before anything is written
    given = itertools.chain([first], (feed(before, (x,), {}) for x in batches))
    calibration = SimpleNamespace(get_next=lambda: next(given, None))
    with replacing(path) as beside:
        with warnings.catch_warnings(), quiet("root", "onnxruntime"):
            warnings.simplefilter("ignore")
            try:
                _write(source, beside, calibration)
            except (OSError, ImportError):
                raise
            except Exception as error:  # of many kinds
                raise ValueError(f"{source} cannot be quantized: {reason(error)}") from error
        off = _compare(before, session(beside), first)
        if not off <= tolerance:
            raise ValueError(
                f"{path}: its outputs are off by {off:.2g} of the largest, above "
                f"tolerance={tolerance:g}; not written. Calibrate on images like those that the "
                "network was trained on, and on more of them"
            )
    return off


def _fitting(file: Any, images: torch.Tensor) -> dict[str, Any]:
    """What `file` is given for `images`. ValueError if it does not run on them."""
    inputs = feed(file, (images,), {})
    try:
        file.run(None, inputs)
    except Exception as error:  # ONNX Runtime raises kinds of its own
        raise ValueError(
            f"the file does not run on images {images.dtype} {list(images.shape)}: "
            f"{reason(error)}. Give a split of the size that it was exported for"
        ) from None
    return inputs


def _operations(source: Path) -> set[str]:
    import onnx

    return {node.op_type for node in onnx.load(source, load_external_data=False).graph.node}


def _write(source: Path, path: Path, calibration: Any) -> None:
    from onnxruntime import quantization as ort

    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.onnx"  # with the shapes that the next step asks for
        ort.quant_pre_process(source, ready, skip_symbolic_shape=True)
        ort.quantize_static(
            ready,
            path,
            calibration,
            quant_format=ort.QuantFormat.QDQ,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )


def _compare(before: Any, after: Any, inputs: dict[str, Any]) -> float:
    wanted, found = (
        [torch.from_numpy(out) for out in file.run(None, inputs)] for file in (before, after)
    )
    return difference(found, wanted)
