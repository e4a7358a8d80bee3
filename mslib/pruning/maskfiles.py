"""Masks in files."""

import hashlib
import logging
from pathlib import Path

import torch

from ..files import nearest, read_json, read_tensors, write_tensors
from .channels import as_graph
from .masks import check_masks

log = logging.getLogger("mslib")


def fingerprint(masks):
    """Six hex digits that tell these masks from any others."""
    digest = hashlib.sha256()
    for name, mask in masks.items():
        digest.update(name.encode() + mask.cpu().numpy().tobytes())
    return digest.hexdigest()[:6]


def save_masks(masks, path):
    write_tensors(path, {name: mask.cpu() for name, mask in masks.items()})


def load_masks(path, model=None, example=None, means="keep"):
    """The masks in a file: of `save_masks`, or, with `model`, in a form of others, checked against
    the network.

    Such a file is a .json, or a .pt of plain tensors: a dict of layer -> channels. A layer goes by
    the name of its BatchNorm or of the convolution before it ("module." in front and ".weight"
    behind are passed over). Its channels are a bool, or a 0 or 1, for each of them, or a list of
    indices. `means`: what is True or listed is to "keep" or to "drop". A log line tells which
    channels stay although the masks drop them, as other layers share and keep them.

    Raises ValueError that names the layer, what was found and what was expected.
    """
    if means not in ("keep", "drop"):
        raise ValueError(f"means={means!r}: what the masks list is to 'keep' or to 'drop'")
    given = read_json(path) if Path(path).suffix == ".json" else read_tensors(path)
    if model is None:
        return given
    if not isinstance(given, dict):
        raise ValueError(
            f"{path} holds a {type(given).__name__}; expected a dict of layer -> channels"
        )
    graph, masks = as_graph(model, example), {}
    for key, value in given.items():
        layer = key.removeprefix("module.").removesuffix(".weight")
        name = graph.norm_after.get(layer, layer)
        if name not in graph.norms:
            hint = nearest(name, [*graph.norms, *graph.norm_after])
            raise ValueError(
                f"{path}: {key!r} is no BatchNorm of the network, nor a convolution before one{hint}"
            )
        chosen = _chosen(f"{path}: {key!r}", value, len(graph.norms[name]))
        keep = chosen if means == "keep" else ~chosen
        if name in masks and not torch.equal(keep, masks[name]):
            raise ValueError(
                f"{path}: {key!r} says another thing than an entry before it, of the same channels"
            )
        masks[name] = keep
    drop = check_masks(graph, masks)
    for name, keep in masks.items():
        stay = int((~keep & ~drop[graph.norms[name]]).sum())
        if stay:
            log.warning(
                "%s: %d of %d dropped channels stay, as layers that share them keep them",
                name,
                stay,
                int((~keep).sum()),
            )
    return masks


def _chosen(origin, value, width):
    """A bool for each of `width` channels, from bools, zeros and ones, or indices."""
    try:
        found = torch.as_tensor(value).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{origin} is {value!r}; expected a bool, or a 0 or 1, for each channel, or a list of indices"
        ) from None
    if (
        found.dtype == torch.bool
        or len(found) == width
        and bool(((found == 0) | (found == 1)).all())
    ):
        if len(found) != width:
            raise ValueError(f"{origin} is for {len(found)} channels; the layer has {width}")
        return found.bool()
    if found.is_floating_point() and len(found):
        raise ValueError(
            f"{origin} holds {float(found[0]):g}…; expected a bool, or a 0 or 1, for each channel, or a list of indices"
        )
    wrong = found[(found < 0) | (found >= width)]
    if len(wrong):
        raise ValueError(f"{origin} lists channel {int(wrong[0])}; the layer has 0 to {width - 1}")
    return torch.zeros(width, dtype=torch.bool).index_fill(0, found.long(), True)
