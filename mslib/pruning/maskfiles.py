"""Keep-masks in files: those of `save_masks`, and those of other programs."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch

from ..files import nearest, read_json, read_tensors, write_tensors
from .graph import as_graph
from .masks import check_masks

log = logging.getLogger("mslib")
EXPECTED = "expected a bool, or a 0 or 1, for each channel, or a list of indices"


def fingerprint(masks: dict[str, torch.Tensor]) -> str:
    """Six hex digits that tell these masks from others, for people to read."""
    digest = hashlib.sha256()
    for name, mask in masks.items():
        digest.update(name.encode() + mask.cpu().numpy().tobytes())
    return digest.hexdigest()[:6]


def save_masks(masks: dict[str, torch.Tensor], path: str | Path) -> None:
    """Write keep-masks to `path`. Raises ValueError for what `load_masks` could not read."""
    if isinstance(masks, dict):
        masks = {k: m.cpu().contiguous() if hasattr(m, "cpu") else m for k, m in masks.items()}
    write_tensors(path, _checked(masks, "the masks"))


def load_masks(
    path: str | Path, model: Any = None, example: Any = None, means: str = "keep"
) -> dict[str, torch.Tensor]:
    """The masks in a file: dict[BatchNorm module name -> BoolTensor[channels]], True = keep.

    Without `model` (a network, with its `example`, or a ChannelGraph): those of `save_masks`. With
    it, also those of others, a .json or a .pt of plain tensors, checked against the network: a dict
    of layer -> channels. A layer goes by the name of its BatchNorm or of the convolution before it;
    "module." in front and ".weight" behind are passed over. Its channels are a bool, or a 0 or 1,
    for each of them, or a list of indices.
    means: what is True or listed is to "keep" or to "drop".
    A log line tells which channels stay although the masks drop them, as other layers keep them.

    Raises FileNotFoundError, or ValueError that names the layer, what was found and expected.
    """
    if means not in ("keep", "drop"):
        raise ValueError(f"means={means!r}: what the masks list is to 'keep' or to 'drop'")
    given = read_json(path, object) if Path(path).suffix == ".json" else read_tensors(path)
    if model is None:
        return _checked(given, str(path))
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ValueError(f"{path} holds a {type(given).__name__}; expected a dict of name -> mask")
    graph = as_graph(model, example)
    masks: dict[str, torch.Tensor] = {}
    for key, value in given.items():
        origin = f"{path}: {key!r}"
        layer = key.removeprefix("module.").removesuffix(".weight")
        name = graph.norm_after.get(layer, layer)
        if name not in graph.norms:
            hint = nearest(name[:100], [*graph.norms, *graph.norm_after])
            raise ValueError(
                f"{origin[:300]} is no BatchNorm of the network, nor a convolution before one{hint}"
            )
        chosen = _chosen(origin, value, len(graph.norms[name]))
        keep = chosen if means == "keep" else ~chosen
        if name in masks and not torch.equal(keep, masks[name]):
            raise ValueError(f"{origin} says another thing than an entry before it, of one layer")
        masks[name] = keep
    drop = check_masks(graph, masks)
    for name, keep in masks.items():
        lost, stay = int((~keep).sum()), int((~keep & ~drop[graph.norms[name]]).sum())
        if stay:
            text = "%s: %d of %d dropped channels stay, as layers that share them keep them"
            log.warning(text, name, stay, lost)
    return masks


def _checked(masks: Any, origin: str) -> dict[str, torch.Tensor]:
    """`masks`, if they are a dict of name -> bool tensor."""
    if not isinstance(masks, dict):
        raise ValueError(f"{origin}: a {type(masks).__name__}; expected a dict of masks by name")
    for name, mask in masks.items():
        plain = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and _fits(mask)
        if not isinstance(name, str) or not plain:
            kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(
                f"{origin}: {str(name)[:100]!r} is {kind}; expected a bool tensor, True = keep "
                "(to read masks of another form: load_masks(path, model, example))"
            )
    return masks


def _fits(mask: torch.Tensor) -> bool:
    """Whether `mask` has its values in memory: a tensor in a file may claim any size."""
    held = mask.layout == torch.strided and not mask.is_meta and not mask.is_quantized
    return held and mask.nbytes <= mask.untyped_storage().nbytes()


def _chosen(origin: str, value: Any, width: int) -> torch.Tensor:
    """A bool for each of `width` channels, from bools, zeros and ones, or indices."""
    if isinstance(value, list) and all(isinstance(v, (bool, int, float)) for v in value):
        if len({isinstance(v, bool) for v in value}) > 1:
            raise ValueError(f"{origin} mixes bools and numbers; {EXPECTED}")
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # beyond 64 bits
            pass
    if not isinstance(value, torch.Tensor) or value.is_complex() or not _fits(value):
        tensor = isinstance(value, torch.Tensor)
        what = f"{value.dtype} {list(value.shape)}" if tensor else repr(value)[:80]
        raise ValueError(f"{origin} is {what}; {EXPECTED}")
    found, bools = value.detach().flatten(), value.dtype == torch.bool
    found = found.double() if found.is_floating_point() else found.long()
    if bools and len(found) != width:
        raise ValueError(f"{origin} is for {len(found)} channels; the layer has {width}")
    if len(found) == width and bool(((found == 0) | (found == 1)).all()):
        whole = not value.is_floating_point() and not bools
        if whole and found.sort()[0].equal(torch.arange(width)):
            raise ValueError(f"{origin} may be a mask or indices; write true and false")
        return found.bool()
    if value.is_floating_point() and len(found):
        raise ValueError(f"{origin} holds {float(found[0]):g}…; {EXPECTED}")
    wrong = found[(found < 0) | (found >= width)]
    if len(wrong):
        raise ValueError(f"{origin} lists channel {int(wrong[0])}; the layer has 0 to {width - 1}")
    return torch.zeros(width, dtype=torch.bool).index_fill(0, found.long(), True)
