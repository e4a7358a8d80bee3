"""Importance scores that look at gradients, at distances, at groups and at feature maps.

Like those of `scores`: dict[BatchNorm name -> float [channels]], higher = keep. Each is of the
channels that can be removed. residual: also of channels that take part in an addition, not only of
a block's inner ones. keep: names of modules to leave alone.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..data.tensors import Split, sample
from ..files import reason
from ..networks import call, copied
from .graph import ChannelGraph, Network, as_graph
from .scores import Scores, by_channel_read, filters

TINY = torch.finfo(torch.float32).tiny


def taylor_scores(
    model: Network,
    split: Split | Iterable,
    example: Any = None,
    residual: bool = False,
    keep: Iterable[str] = (),
    images: int = 1000,
    batch_size: int = 100,
    seed: int = 0,
) -> Scores:
    """How much the loss changes without a channel, to first order: dict like `gammas`.

    (γ·∂L/∂γ + β·∂L/∂β)², its mean over batches: the squared derivative of the cross-entropy by a
    gate behind the BatchNorm (Molchanov et al., CVPR 2019, section 3). Unlike there, the network is
    in evaluation mode: it is what a cut changes. It stays as it is, gradients included.

    split: a `Split`, of which `images` are drawn by `seed` and taken in batches of `batch_size`; or
    a DataLoader, of which the first `images` are taken in its own batches.
    Raises ValueError for images or labels that the network does not take, or a loss that is not
    finite.
    """
    graph = as_graph(model, example)
    names, network = graph.prunable_norms(residual, keep), copied(graph.model).eval()
    norms: list[Any] = [network.get_submodule(name) for name in names]
    parameters = [p.requires_grad_() for norm in norms for p in (norm.weight, norm.bias)]
    device = next(network.parameters()).device
    sums, count = [torch.zeros(len(norm.weight)) for norm in norms], 0
    for x, y in sample(split, images, batch_size, seed):
        try:
            with torch.enable_grad():
                loss = nn.functional.cross_entropy(call(network, x), y.to(device))
                found = torch.autograd.grad(loss, parameters) if names else ()
        except (RuntimeError, TypeError, IndexError) as error:
            raise _misfit(graph, x, error) from error
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()} on a batch: the network has diverged")
        parts = [(p.detach() * g).float().cpu() for p, g in zip(parameters, found)]
        for total, by_gamma, by_beta in zip(sums, parts[::2], parts[1::2]):
            total += (by_gamma + by_beta).square()
        count += 1
    return {name: total / count for name, total in zip(names, sums)}


def fpgm_scores(
    model: Network, example: Any = None, residual: bool = False, keep: Iterable[str] = ()
) -> Scores:
    """How far the filter that writes a channel is from the others of its layer: dict like `gammas`.

    The sum of its Euclidean distances to them. The smallest is nearest to their geometric median,
    and the others replace it best (FPGM, He et al., CVPR 2019, section 3.4). A layer of large or
    many filters has large distances: choose within layers (`masks_for_ratio`), or give
    `masks_for_macs` the places in each layer (`ranked_scores`).
    """
    graph = as_graph(model, example)
    writer, scores = graph.conv_before, {}
    for name in graph.prunable_norms(residual, keep):
        if name in writer:
            rows = filters(graph, writer[name])
            # the usual way, by a matrix product, finds a filter away from itself
            exact = "donot_use_mm_for_euclid_dist"
            scores[name] = torch.cdist(rows, rows, compute_mode=exact).sum(1)
    return scores


def lamp_scores(
    model: Network, example: Any = None, residual: bool = False, keep: Iterable[str] = ()
) -> Scores:
    """A channel's part in the squared weights of all that are left when its turn comes: dict like
    `gammas`.

    u / Σv over the channels of the BatchNorm with v ≥ u, where u is the sum of the squares of all
    weights that go with a channel: filters that write it, γ that scale it, weights that read it.
    LAMP (Lee et al., ICLR 2021, section 3) has it of single weights; of groups it is
    torch-pruning's. The best channel of each layer has 1, so no layer is emptied before another.
    """
    graph = as_graph(model, example)
    total = _squares(graph)
    scores = {}
    for name in graph.prunable_norms(residual, keep):
        size, order = total[graph.root[graph.norms[name]]].sort(stable=True)
        left = size.flip(0).cumsum(0).flip(0)  # what remains once the smaller ones are gone
        part = size / left.clamp_min(TINY)
        scores[name] = torch.empty_like(part).index_copy(0, order, part)
    return scores


def hrank_scores(
    model: Network,
    split: Split | Iterable,
    example: Any = None,
    residual: bool = False,
    keep: Iterable[str] = (),
    images: int = 500,
    batch_size: int = 100,
    seed: int = 0,
) -> Scores:
    """The mean rank of a channel's feature maps over images: dict like `gammas`.

    HRank (Lin et al., CVPR 2020, section 3): a map of low rank tells little about the image. The
    map [H, W] is the BatchNorm's output through ReLU, as in the released code. It is at most the
    shorter side: compare layers by `ranked_scores`. Labels are not used. split, images, batch_size,
    seed: as of `taylor_scores`.
    Raises ValueError for images that the network does not take.
    """
    graph = as_graph(model, example)
    names, network = graph.prunable_norms(residual, keep), copied(graph.model).eval()
    sums = {name: torch.zeros(len(graph.norms[name])) for name in names}
    count = dict.fromkeys(names, 0)

    def look(name: str, module: nn.Module, args: Any, out: torch.Tensor) -> None:
        rows = out.shape[2] if out.ndim > 3 else 1
        maps = out.float().relu().reshape(*out.shape[:2], rows, -1)
        sums[name] += torch.linalg.matrix_rank(maps).sum(0).cpu()
        count[name] += len(out)

    for name in names:
        network.get_submodule(name).register_forward_hook(partial(look, name))
    with torch.no_grad():
        for x, _ in sample(split, images, batch_size, seed):
            try:
                call(network, x)
            except (RuntimeError, TypeError, IndexError) as error:
                raise _misfit(graph, x, error) from error
    return {name: total / count[name] for name, total in sums.items()}


def _squares(graph: ChannelGraph) -> torch.Tensor:
    """Root -> the sum of the squares of all weights that go with it, float [ids]."""
    total = torch.zeros(len(graph.root), dtype=torch.float32)
    for name, ids in graph.outputs.items():
        total.index_add_(0, graph.root[ids], filters(graph, name).square().sum(1))
    for name, ids in graph.norms.items():
        if (weight := graph.modules[name].weight) is not None:
            total.index_add_(0, graph.root[ids], weight.detach().float().cpu().square())
    for name, ids in graph.inputs.items():
        # a depthwise convolution reads what it writes: its weights count once
        if name not in graph.notes.depthwise:
            weight = graph.weight(name)[1].detach().float().cpu()
            total.index_add_(0, graph.root[ids], by_channel_read(graph, name, weight.square()))
    return total


def _misfit(graph: ChannelGraph, x: torch.Tensor, error: Exception) -> ValueError:
    return ValueError(
        f"{type(graph.model).__name__} cannot be scored on images {x.dtype} {list(x.shape)} and "
        f"their labels: {reason(error)}. Give a split of the task that the network is trained for"
    )
