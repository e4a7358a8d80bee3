"""Out the door: ONNX and torch.export files of a network, checked against the network itself."""

import copy
import logging
import warnings
from pathlib import Path

import torch

from .files import replacing


def export(model, path, example, tolerance=1e-4):
    """Write `model`, on the CPU, in evaluation mode and for any batch size, to `path`; returns how far the file's outputs are off.

    `path`: ends in .onnx (runs in ONNX Runtime and many others) or in .pt2 (torch.export: runs in PyTorch without the
    code that made the network). `example`: float [N, C, H, W]. The file is run on it and compared: the largest
    difference, as a share of the largest output, is returned.

    Raises ValueError for another ending, or when the difference is above `tolerance`; no file is left behind then.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{path}: the ending decides on the format; expected .onnx or .pt2")
    model, example = copy.deepcopy(model).cpu().eval(), example.detach().cpu()
    few = example[:1].repeat(2, 1, 1, 1)  # two: a batch of one would be taken for the only size
    batch = {0: torch.export.Dim("batch", min=1)}
    with replacing(path) as beside, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.suffix == ".onnx":
            for name in ("torch.onnx", "onnxscript", "onnx_ir"):
                logging.getLogger(name).setLevel(logging.ERROR)
            torch.onnx.export(
                model,
                (few,),
                beside,
                dynamo=True,
                dynamic_shapes=(batch,),
                input_names=["images"],
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
            outputs = torch.from_numpy(session(beside).run(None, {"images": example.numpy()})[0])
        else:
            torch.export.save(torch.export.export(model, (few,), dynamic_shapes=(batch,)), beside)
            outputs = torch.export.load(beside).module()(example)
        wanted = model(example)
        off = float((outputs - wanted).abs().max() / wanted.abs().max())
        if not off <= tolerance:
            raise ValueError(
                f"{path}: its outputs are off by {off:.2g} of the largest, above tolerance={tolerance:g}; not written"
            )
    return off


def session(path):
    """An ONNX Runtime session for the file, on the CPU, with as many threads as PyTorch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
