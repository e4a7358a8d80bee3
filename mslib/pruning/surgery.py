"""Surgery: from a network and a keep-mask to a smaller network that computes the same."""

import copy

import torch
from torch import nn

from ..networks import resize
from .channels import ChannelGraph
from .masks import check_masks


@torch.no_grad()
def prune(model, masks, example=None, fold_bias=False):
    """A new network without the channels that `masks` drops; `model` stays as it is.

    masks: dict[BatchNorm module name -> BoolTensor[channels]], True = keep. BatchNorms that are not named keep all
    their channels; channels that several BatchNorms share (a residual stage) go where all of them drop them.
    The result computes what `zero_masked(model, masks)` computes, up to rounding.

    fold_bias: a removed channel whose γ is nearly zero still sends a constant forward: relu(β). With True it goes into
    the BatchNorm (running mean) or the bias behind the next layer, as `zero_masked(…, keep_bias=True)` computes it,
    exactly but for the padded border of the image, where the next convolution saw zeros instead. Not in the papers.
    What a gate multiplies (squeeze-and-excitation) is no constant: it depends on the image, and is dropped.

    example: float [N, C, H, W]; when given, the cut (without what is folded) and the masked network run on it, and it is
    refused if they differ.

    Raises ValueError for masks that name unknown layers, have a wrong length or type, leave no channel, or ask for
    channels that cannot be cut safely (with the reason), and for networks that cannot be traced.
    """
    small = copy.deepcopy(model)
    graph = ChannelGraph(small)
    drop = check_masks(graph, masks)
    if fold_bias:
        _fold(graph, drop)
    state = small.state_dict()
    for name, ids in (graph.outputs | graph.slopes | graph.norms).items():
        _cut(state, name, ("weight", "bias", "running_mean", "running_var"), 0, ~drop[ids])
    for name, ids in graph.inputs.items():
        _cut(
            state, name, ("weight",), 1, ~drop[ids[: state[f"{name}.weight"].shape[1]]]
        )  # grouped: all groups lose the same
    for name, (read, written, _) in graph.pads.items():
        kept = ~drop[read]
        place = torch.cat([torch.zeros(1, dtype=torch.long), torch.where(kept, kept.cumsum(0), 0)])
        source = state[f"{name}.source"]
        state[f"{name}.source"] = place.to(source.device)[source[~drop[written].to(source.device)]]
    resize(small, state)
    if example is not None:
        _verify(prune(model, masks) if fold_bias else small, zero_masked(model, masks), example)
    return small


def _cut(state, name, keys, dim, keep):
    if keep.all():
        return
    for key in keys:
        tensor = state.get(f"{name}.{key}")
        if tensor is not None:
            index = keep.nonzero().squeeze(1).to(tensor.device)
            state[f"{name}.{key}"] = tensor.index_select(dim, index)


def _fold(graph, drop):
    """Carry relu(β) of the dropped channels into what follows each layer that reads them."""
    for name, ids in graph.inputs.items():
        layer, lost = (
            graph.modules[name],
            torch.where(drop[ids] & ~graph.gated[ids], graph.constants[name], 0),
        )
        if not lost.any():
            continue
        groups = getattr(layer, "groups", 1)
        weight = layer.weight.reshape(
            groups, len(layer.weight) // groups, layer.weight.shape[1], -1
        ).sum(3)
        sent = (weight @ lost.to(weight).reshape(groups, -1, 1)).flatten()
        norm = graph.norm_after.get(name)
        if norm and graph.calls[name] == graph.calls[norm] == 1:
            graph.modules[norm].running_mean -= sent
        elif layer.bias is not None:
            layer.bias += sent
        else:
            layer.bias = nn.Parameter(sent)
    for name, (read, written, constant) in graph.pads.items():
        source = graph.modules[name].source.cpu()
        gone = torch.cat([torch.zeros(1, dtype=torch.bool), drop[read]])[source] & ~drop[written]
        if gone.any() and name in graph.norm_beside:
            bias = graph.modules[graph.norm_beside[name]].bias
            bias += torch.where(gone & constant.isfinite(), constant, 0).to(bias)


@torch.no_grad()
def zero_masked(model, masks, example=None, keep_bias=False):
    """A copy of `model`, at full size, in which γ and β of the channels that `prune` would remove are zero.

    It computes what `prune(model, masks)` computes, and is how every cut is checked. keep_bias: zero γ only (and β
    where `prune(…, fold_bias=True)` cannot carry it on: behind a gate that depends on the image).
    """
    zeroed = copy.deepcopy(model)
    graph = ChannelGraph(zeroed)
    drop = check_masks(graph, masks)
    for name, ids in graph.norms.items():
        norm = graph.modules[name]
        if not drop[ids].any():  # also one without γ
            continue
        norm.weight[drop[ids].to(norm.weight.device)] = 0
        norm.bias[(drop[ids] & (graph.gated[ids] if keep_bias else True)).to(norm.bias.device)] = 0
    return zeroed


def _verify(small, zeroed, example):
    """Refuse the cut if it computes anything else; both are run in evaluation mode and left in their own."""
    example = example.to(next(small.parameters()).device)
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        a, b = (copy.deepcopy(network).eval()(example) for network in (small, zeroed))
    if not b.isfinite().all():
        raise ValueError(
            "the network's outputs on the example are not finite, before any cut: it has diverged; train it with a smaller lr"
        )
    if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max())):
        raise ValueError(
            f"the pruned network differs from the masked one by {float((a - b).abs().max()):.3g} on the example: "
            "its forward does something with channels that tracing did not show; please report the network"
        )
