"""Surgery: from a network and a keep-mask to a smaller network that computes the same."""

import copy
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..files import reason
from ..networks import ShapesOnly, call, copied, meta_copy, named_tensors, sync_widths, tensors_in
from .graph import ChannelGraph, Network, as_graph
from .masks import check_masks

aten, NOTHING = torch.ops.aten, torch.tensor([], dtype=torch.long)

# How far the outputs of a cut network may be off, as a share of the largest output.
REPORT = "please report the network; `keep=` leaves layers whole"
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def prune(
    model: Network, masks: dict[str, torch.Tensor], example: Any = None, fold_bias: bool = False
) -> nn.Module:
    """A new network without the channels that `masks` drops; `model` stays as it is.

    masks: dict[BatchNorm module name -> BoolTensor[channels]], True = keep. BatchNorms that are not
    named keep all their channels; channels that several BatchNorms share (a residual stage) go
    where all of them drop them. example: what the network's forward takes, such as float [N, C, H,
    W] (left out if `model` is a `ChannelGraph`). The result is compared with `zero_masked(model,
    masks, example)` on it, in evaluation mode, before it is returned, and has run in training mode.

    fold_bias: a removed channel whose γ is nearly zero still sends a constant forward: relu(β).
    With True it goes into the BatchNorm (running mean) or the bias behind the next layer. This is
    exact but for the border of the image, where a convolution that pads with zeros sees these
    instead; it is compared with `zero_masked(…, keep_bias=True)`, both padding by nearest pixels.
    Not in the papers. What a gate multiplies (squeeze-and-excitation) is no constant, and dropped.

    Raises ValueError for masks that name unknown layers, have a wrong length or type, leave no
    channel, or ask for channels that cannot be cut (with the reason), and for networks that cannot
    be traced.
    """
    graph = as_graph(model, example, fold_bias)
    drop = check_masks(graph, masks)
    small = _cut(graph, drop)
    _compare(graph, small, _silenced(graph, drop, keep_bias=False, shared=True))
    _refuse_untrainable(graph, small)
    if fold_bias:
        folded = copied(graph.model)
        _fold(graph, dict(folded.named_modules()), drop)
        small = _cut(graph, drop, folded)
        with _Borderless():
            _compare(graph, small, _silenced(graph, drop, keep_bias=True, shared=True))
    return small


def zero_masked(
    model: Network, masks: dict[str, torch.Tensor], example: Any = None, keep_bias: bool = False
) -> nn.Module:
    """A copy of `model`, at full size, with γ and β zero where `prune` would remove channels.

    It computes what `prune(model, masks, example)` computes: every cut is checked by it. keep_bias:
    zero γ only (and β where `prune(…, fold_bias=True)` cannot carry it on: behind a gate that
    depends on the image).
    """
    graph = as_graph(model, example, keep_bias)
    return _silenced(graph, check_masks(graph, masks), keep_bias)


@torch.no_grad()
def cut_optimizer_state(
    optimizer: torch.optim.Optimizer,
    model: Network,
    masks: dict[str, torch.Tensor],
    example: Any = None,
) -> dict[str, Any]:
    """The optimizer's `state_dict` for `prune(model, masks, example)`: what it knows of each weight
    that stays, such as its momentum.

    Give it to an optimizer of the cut network that is made as the old one was:

        small = ms.prune(graph, masks)
        new = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9)
        new.load_state_dict(ms.cut_optimizer_state(old, graph, masks))

    optimizer: of parameters of `model`. masks, example: as of `prune`. The state is copied. A bias
    that `fold_bias` gives to a layer without one is unknown to it: cut without it, or begin anew.
    Raises ValueError for a parameter that the network lacks, or a state that is neither one number
    nor shaped like its parameter.
    """
    graph = as_graph(model, example)
    drop, slices = check_masks(graph, masks), _slices(graph)
    names = {id(p): name for name, p in graph.model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = optimizer.state_dict()
    for place, p in enumerate(parameters):
        if id(p) not in names:
            raise ValueError(
                f"parameter {place} of the optimizer, {list(p.shape)}, is none of "
                f"{type(graph.model).__name__}: give the optimizer that trains this very network"
            )
        cut = {}
        for key, value in found["state"].get(place, {}).items():
            cut[key] = copy.deepcopy(value)
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                cut[key] = _without(value, names[id(p)], slices, drop).clone()
            elif isinstance(value, torch.Tensor | list | tuple | dict) and not _single(value):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key!r} of {names[id(p)]!r}, which is not "
                    "shaped like it and cannot be cut with it; begin anew after the cut"
                )
        if cut:
            found["state"][place] = cut
    return found


@torch.no_grad()
def _silenced(
    graph: ChannelGraph, drop: torch.Tensor, keep_bias: bool, shared: bool = False
) -> nn.Module:
    """shared: for a moment's use; parameters that are as in the graph's network are its own."""
    made = _own(graph.model) if shared else {}
    for name, ids in graph.norms.items():
        norm, gone = graph.modules[name], drop[ids]
        if not gone.any():  # also one without γ
            continue
        silent = gone & graph.gated[ids] if keep_bias else gone
        for old, zero in ((norm.weight, gone), (norm.bias, silent)):
            new = made.get(id(old), old).detach().masked_fill(zero.to(old.device), 0)
            made[id(old)] = nn.Parameter(new, old.requires_grad)
    return copied(graph.model, made)


def _own(model: nn.Module) -> dict[int, torch.Tensor]:
    """For `copied`: parameters in the same memory. Buffers are copied: forward may write them."""
    buffers = {id(b): b.clone() for b in model.buffers()}
    return buffers | {id(p): nn.Parameter(p.detach(), False) for p in model.parameters()}


def _cut(graph: ChannelGraph, drop: torch.Tensor, model: nn.Module | None = None) -> nn.Module:
    """A copy of `model` (default: the graph's) without the ids in `drop`."""
    model = graph.model if model is None else model
    slices = _slices(graph)
    sources = {f"{n}.source": graph.source_left(n, drop) for n in graph.notes.copies}
    made = {}  # id of a parameter or buffer -> its smaller copy; tied ones stay tied
    for name, tensor in named_tensors(model):
        smaller = sources[name].to(tensor.device) if name in sources else tensor.detach()
        smaller = _without(smaller, name, slices, drop)
        if name in sources or smaller.shape != tensor.shape:
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = (
                nn.Parameter(smaller, tensor.requires_grad) if is_parameter else smaller
            )
    small = copied(model, made)
    for name, ids in graph.notes.depthwise.items():
        layer: Any = small.get_submodule(name)
        layer.groups = int((~drop[ids]).sum())
    sync_widths(small)
    return small


def _single(value: Any) -> bool:
    """Whether `value` is a tensor of one number, such as a count of steps."""
    return isinstance(value, torch.Tensor) and value.numel() == 1


def _slices(graph: ChannelGraph) -> dict[Any, torch.Tensor]:
    """(name of a parameter or buffer, axis) -> the ids along it; also of biases by folding."""
    biases = {(f"{layer}.bias", 0): ids for layer, ids in graph.outputs.items()}
    return biases | graph.notes.slices


def _without(
    tensor: torch.Tensor, name: str, slices: dict[Any, torch.Tensor], drop: torch.Tensor
) -> torch.Tensor:
    """`tensor`, shaped like the parameter or buffer `name`, without the ids in `drop`."""
    for axis in range(tensor.ndim):
        gone = drop[slices.get((name, axis), NOTHING)].to(tensor.device)
        if gone.any():
            tensor = tensor.index_select(axis, (~gone).nonzero().flatten())
    return tensor


def _fold(graph: ChannelGraph, modules: dict[str, Any], drop: torch.Tensor) -> None:
    """Carry the constants of the dropped channels, in place, into what is behind their readers."""
    for name, ids in graph.inputs.items():
        gone = drop[ids] & ~graph.gated[ids]
        lost = torch.where(gone, graph.notes.constants[name], 0)  # [channels read]
        if not lost.any():
            continue
        layer = modules[name]
        groups = getattr(layer, "groups", 1)
        weight = layer.weight.flatten(2).sum(2) if layer.weight.ndim > 2 else layer.weight
        weight = weight.reshape(groups, -1, weight.shape[1])  # [groups, out / groups, in / groups]
        sent = (weight @ lost.to(weight).reshape(groups, -1, 1)).flatten()  # [channels written]
        norm = graph.norm_after.get(name)
        if norm and graph.calls[name] == graph.calls[norm] == 1:
            modules[norm].running_mean -= sent
        elif layer.bias is not None:
            layer.bias += sent
        else:
            layer.bias = nn.Parameter(sent)
    for name, (read, written, source, constant) in graph.notes.copies.items():
        gone = torch.cat([torch.zeros(1, dtype=torch.bool), drop[read]])[source] & ~drop[written]
        if gone.any() and name in graph.notes.beside:
            bias = modules[graph.notes.beside[name]].bias
            bias += torch.where(gone & constant.isfinite(), constant, 0).to(bias)


class _Borderless(TorchDispatchMode):
    """Inside it images are padded with their nearest pixels: a channel that is constant stays so.

    Only there is folding exact. A convolution that pads with zeros sees the constant of a channel
    in the middle of an image and less of it at its border; a bias is the same everywhere.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, args = func.overloadpacket, [*args]
        if packet is aten.convolution and not args[6]:  # x, weight, bias, stride, padding, …
            args[0], args[4] = _extended(args[0], args[4]), [0] * len(args[4])
        elif packet in (aten.avg_pool2d, aten.avg_pool3d) and len(args) > 3:
            args[0], args[3] = _extended(args[0], args[3]), [0] * len(args[3])
        elif packet is aten.constant_pad_nd and len(args[1]) <= 2 * (args[0].ndim - 2):
            args[0], args[1] = _extended(args[0], args[1][-2::-2], args[1][::-2]), []
        return func(*args, **(kwargs or {}))


def _extended(x: torch.Tensor, before: list[int], after: list[int] | None = None) -> torch.Tensor:
    """x [N, C, …] with its nearest pixels around it, so many along each of its last axes."""
    for dim, (first, last) in enumerate(zip(before, after or before, strict=True)):
        dim, size = x.ndim - len(before) + dim, x.shape[dim - len(before)]
        places = torch.arange(-first, size + last, device=x.device)
        x = x.index_select(dim, places.clamp(0, size - 1))
    return x


def _compare(graph: ChannelGraph, small: nn.Module, zeroed: nn.Module) -> None:
    """Refuse a cut that computes anything else than `zeroed` on the example."""
    small, zeroed = copied(small, _own(small)).eval(), zeroed.eval()
    found, wanted = _outputs(small, graph.example), _outputs(zeroed, graph.example)
    if not wanted:
        raise ValueError("the network returned no tensors, so the cut cannot be checked on them")
    if not all(w.isfinite().all() for w in wanted):
        raise ValueError(
            "the network's outputs on the example are not finite, before any cut: it has diverged; "
            "train it with a smaller lr"
        )
    with suppress(Exception):  # noise may be nothing that it takes
        for noise in _noise(graph.example):
            found, wanted = found + _outputs(small, noise), wanted + _outputs(zeroed, noise)
    for f, w in zip(found, wanted, strict=True):
        limit = TOLERANCE.get(w.dtype, 0) * float(w.abs().max()) if w.numel() else 0
        if f.shape != w.shape or (w.numel() and float((f - w).abs().max()) > limit):
            same = f.shape == w.shape
            off = f"by {(f - w).abs().max():.3g}" if same else f"in shape, {list(f.shape)}"
            raise ValueError(
                f"the pruned network differs from the masked one {off} on the example: its forward "
                f"does something with channels that tracing did not show; {REPORT}"
            )


def _noise(example: Any) -> Iterator[Any]:
    """Random numbers shaped like an example that is constant, as zeros show nothing; else none."""
    if not any((t != t.flatten()[0]).any() for t in tensors_in(example) if t.is_floating_point()):
        draw = partial(torch.rand, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        drawn = lambda t: torch.is_tensor(t) and t.is_floating_point()  # noqa: E731
        yield tree_map(lambda t: draw(t.shape).to(t) if drawn(t) else t, example)


def _refuse_untrainable(graph: ChannelGraph, small: nn.Module) -> None:
    """Refuse a cut that does not run in training mode.

    Shapes alone tell it, and cost little; what needs numbers runs with them.
    """
    try:
        with ShapesOnly():
            _outputs(meta_copy(small, training=True), graph.example)
        return
    except Exception:  # it needs numbers, or does not run
        pass
    try:
        _outputs(copied(small).train(), graph.example)
    except Exception as error:
        try:  # for some BatchNorms a batch of one is too small, cut or not
            _outputs(copied(graph.model).train(), graph.example)
        except Exception:
            return
        raise ValueError(
            f"the pruned network does not run in training mode: {reason(error)}; {REPORT}"
        ) from error


def _outputs(model: nn.Module, example: Any) -> list[torch.Tensor]:
    """All tensors that `model` returns for the example, whatever it draws."""
    with (
        torch.random.fork_rng({p.device for p in model.parameters() if p.is_cuda}),
        torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False),
    ):
        # bools have no difference
        return [t.byte() if t.dtype == torch.bool else t for t in tensors_in(call(model, example))]
