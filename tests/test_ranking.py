"""Places in the order of a layer or a structure: by hand, and by torch-pruning."""

import copy

import pytest
import torch
import torch_pruning as tp

import mslib as ms

from .conftest import lively
from .cutting import image
from .test_criteria import assert_same, cut_as_far, cut_by_torch_pruning, small_resnet

X = torch.zeros(1, 3, 16, 16)


@pytest.mark.parametrize("depth, floor, reduction", [(8, 0.0, 0.3), (14, 0.1, 0.5), (20, 0.1, 0.8)])
def test_ranks_within_layers_make_the_masks_of_uniform_pruning(depth, floor, reduction):
    """As the protocol of the recovery curves had them: the same share of each layer, in turns."""
    graph = ms.ChannelGraph(lively(ms.resnet(depth)), X)
    scores = ms.filter_norms(graph)
    by_hand = {}
    for turn, (name, score) in enumerate(scores.items()):
        by_hand[name] = (score.argsort().argsort() + turn / len(scores)) / len(score)
    ranks = ms.ranked_scores(graph, scores)
    assert [*ranks] == [*by_hand]
    assert all(torch.equal(ranks[name], by_hand[name]) for name in by_hand)
    masks, wanted = (
        ms.masks_for_macs(graph, None, reduction, floor=floor, scores=s) for s in (ranks, by_hand)
    )
    assert all(torch.equal(masks[name], wanted[name]) for name in wanted)
    shares = [float(m.float().mean()) for m in masks.values()]
    assert max(shares) - min(shares) < 0.07  # one channel of sixteen
    for name, mask in masks.items():
        assert scores[name][mask].min() >= scores[name][~mask].max()


def test_channels_that_go_together_have_one_place():
    graph = ms.ChannelGraph(lively(ms.resnet(14)), X)
    for within in ("layer", "structure"):
        ranks = ms.ranked_scores(graph, ms.gammas(graph, residual=True), within=within)
        first = ranks["bn"]
        for name in ("stage1.0.bn2", "stage1.1.bn2"):
            assert torch.equal(ranks[name], first)
        best = torch.stack([graph.modules[n].weight.abs() for n in ("bn", "stage1.0.bn2")]).amax(0)
        best = torch.maximum(best, graph.modules["stage1.1.bn2"].weight.abs())
        assert torch.equal(first.argsort(), best.argsort())
        for places in ranks.values():
            assert len(places.unique()) == len(places) and places.min() >= 0 and places.max() < 1


def test_a_structure_is_ranked_as_a_whole():
    """Inner channels of all blocks form one order; a layer with larger scores keeps more."""
    graph = ms.ChannelGraph(lively(ms.resnet(8)), X)
    scores = ms.gammas(graph)
    scores["stage3.0.bn1"] = scores["stage3.0.bn1"] + 1
    ranks = ms.ranked_scores(graph, scores, within="structure")
    joined = torch.cat([*scores.values()])
    wanted = torch.empty(len(joined)).index_copy(
        0, joined.argsort(), torch.arange(len(joined)) / len(joined)
    )
    assert torch.allclose(torch.cat([*ranks.values()]), wanted)
    assert ranks["stage3.0.bn1"].min() > ranks["stage1.0.bn1"].max()
    inner = {n: s for n, s in ms.gammas(graph, residual=True).items()}
    every = ms.ranked_scores(graph, inner, within="structure")
    assert any(not torch.equal(every[n], ms.ranked_scores(graph, inner)[n]) for n in every)


@pytest.mark.parametrize("residual", [False, True])
def test_torch_pruning_has_the_same_isomorphic_order(residual):
    model, x = small_resnet(), image(1, 3, 32, 32)
    with torch.no_grad():  # what a global order would cut first
        model.layer4[0].conv1.weight.mul_(0.1)
        model.conv1.weight.mul_(10)
    importance = tp.importance.MagnitudeImportance(p=2, normalizer=None)
    how = dict(global_pruning=True, isomorphic=True)
    (theirs,) = cut_by_torch_pruning(model, x, importance, residual, **how)
    graph = ms.ChannelGraph(model, x)
    total = ms.pruning.criteria._squares(graph)
    names = graph.prunable_norms(residual)
    raw = {name: total[graph.root[graph.norms[name]]] for name in names}
    number = {}  # its importance is the mean over the layers of a group
    for writers, norms, readers, _ in ms.pruning.groups.members(graph):
        number |= dict.fromkeys(norms, len(writers) + len(norms) + len(readers))
    raw = {name: s / number[name] for name, s in raw.items()}
    ranks = ms.ranked_scores(graph, raw, within="structure")
    assert_same(cut_as_far(graph, theirs, ranks, residual), theirs)
    others = [ms.ranked_scores(graph, raw)] + [raw] * residual  # inner channels are one structure
    for other in others:  # an order in each layer, and one of all, cut elsewhere
        widths = [p.shape for p in cut_as_far(graph, theirs, other, residual).parameters()]
        assert widths != [p.shape for p in theirs.parameters()]


def test_what_ranking_refuses():
    graph = ms.ChannelGraph(lively(ms.resnet(8)), X)
    scores = copy.copy(ms.gammas(graph))
    with pytest.raises(ValueError, match="within='stage': expected one of layer, structure"):
        ms.ranked_scores(graph, scores, within="stage")
    with pytest.raises(ValueError, match="scores for 'bn9': the network has no such BatchNorm"):
        ms.ranked_scores(graph, scores | {"bn9": torch.ones(3)})
    with pytest.raises(ValueError, match=r"scores for 'bn' have shape \[3\]"):
        ms.ranked_scores(graph, {"bn": torch.ones(3)})
    with pytest.raises(ValueError, match="an example input is needed"):
        ms.ranked_scores(ms.resnet(8), scores)
