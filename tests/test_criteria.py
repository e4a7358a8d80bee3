"""Scores by gradients, distances, groups and feature maps: by hand, and by torch-pruning."""

import copy
import functools

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.resnet import BasicBlock, ResNet

import mslib as ms
from mslib.data.tensors import Split, sample

from .conftest import lively, tiny_data
from .cutting import Net, cbr, image

X = torch.zeros(1, 3, 8, 8)


@pytest.fixture(scope="module")
def model():
    return lively(ms.resnet(8, 3))


@pytest.fixture(scope="module")
def batch():
    return next(iter(sample(tiny_data().train, 16)))


def test_taylor_scores_are_the_squared_derivative_by_a_gate(model, batch):
    """The gate is built here: a factor behind the BatchNorm that is one."""
    data, gates, found = tiny_data(), {}, []
    names = [f"stage{i}.0.bn1" for i in (1, 2, 3)]
    for name in names:
        norm = model.get_submodule(name)
        gates[name] = torch.ones(1, norm.num_features, 1, 1, requires_grad=True)
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda m, x, y, g=g: y * g)
        for n, g in gates.items()
    ]
    for x, y in sample(data.train, 40, 16):
        loss = nn.functional.cross_entropy(model(x), y)
        found.append(torch.autograd.grad(loss, [*gates.values()]))
    for hook in hooks:
        hook.remove()
    assert len(found) == 3  # batches of 16, 16 and 8
    before = copy.deepcopy(model.state_dict())
    scores = ms.taylor_scores(model.train(), data.train, X, images=40, batch_size=16)
    assert [*scores] == names
    for i, name in enumerate(names):
        wanted = torch.stack([grads[i].flatten() ** 2 for grads in found]).mean(0)
        assert wanted.max() > 0 and torch.allclose(scores[name], wanted, rtol=1e-3)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.eval().state_dict().items())


def test_a_loader_and_frozen_parameters_score_the_same(model):
    train = tiny_data().train
    pairs = list(zip(ms.normalize(train.images), train.labels))
    loader = DataLoader(pairs, 16)
    frozen = copy.deepcopy(model).requires_grad_(False)
    several = [(x, y) for x, y in loader]
    for score in (ms.taylor_scores, ms.hrank_scores):
        found = score(frozen, loader, X, images=32)
        assert all(torch.equal(found[n], s) for n, s in score(model, several[:2], X).items())
    assert not any(p.requires_grad for p in frozen.parameters())


def test_fpgm_scores_are_distances_to_the_other_filters(model):
    scores = ms.fpgm_scores(model, X, residual=True)
    assert len(scores) == 7
    for name, score in scores.items():
        weight = model.get_submodule("conv" if name == "bn" else name.replace("bn", "conv")).weight
        weight = weight.detach()
        wanted = [sum(float((a - b).norm()) for b in weight) for a in weight]
        assert torch.allclose(score, torch.tensor(wanted), rtol=1e-4)


def test_lamp_scores_are_counted_by_hand(model):
    scores = ms.lamp_scores(model, X)
    for name, score in scores.items():
        block = copy.deepcopy(model.get_submodule(name.removesuffix(".bn1"))).requires_grad_(False)
        size = block.conv1.weight.square().sum((1, 2, 3)) + block.bn1.weight.square()
        size = size + block.conv2.weight.square().sum((0, 2, 3))
        wanted = [float(u / sum(v for v in size if v >= u)) for u in size]
        assert torch.allclose(score, torch.tensor(wanted), rtol=1e-4)
        assert float(score.max()) == 1 and int(score.argmax()) == int(size.argmax())


def test_lamp_scores_count_a_depthwise_weight_once_and_every_reader():
    net = Net(
        lambda net, x: net.a(y := net.deep(net.stem(x))) + net.b(y),
        stem=cbr(3, 6),
        deep=nn.Conv2d(6, 6, 3, groups=6, bias=False),
        a=nn.Conv2d(6, 4, 1),
        b=nn.Conv2d(6, 4, 1),
    )
    net = lively(net)
    size = net.stem[0].weight.square().sum((1, 2, 3)) + net.stem[1].weight.square()
    size = size + net.deep.weight.square().sum((1, 2, 3))
    size = size + (net.a.weight.square() + net.b.weight.square()).sum((0, 2, 3))
    wanted = torch.stack([u / size[size >= u].sum() for u in size])
    assert torch.allclose(ms.lamp_scores(net, X)["stem.1"], wanted, rtol=1e-4)


def test_hrank_scores_are_mean_ranks_of_rectified_maps(model, batch):
    x, _ = batch
    data = Split(tiny_data().train.images, tiny_data().train.labels)
    scores = ms.hrank_scores(model, data, X, images=16)
    with torch.no_grad():
        maps = model.stage2[0].bn1(
            model.stage2[0].conv1(model.stage1(model.bn(model.conv(x)).relu()))
        )
    maps = maps.relu().numpy()
    wanted = [sum(_rank(maps[n, c]) for n in range(16)) / 16 for c in range(maps.shape[1])]
    assert torch.allclose(scores["stage2.0.bn1"], torch.tensor(wanted))
    assert scores["stage2.0.bn1"].std() > 0


def _rank(matrix):
    """By Gauss, in float64: how many rows are left."""
    rows, rank = [row.astype("float64") for row in matrix], 0
    while rows:
        pivot = max(rows, key=lambda r: abs(r).max())
        place = abs(pivot).argmax()
        if abs(pivot[place]) < 1e-6:
            break
        rows = [r - pivot * (r[place] / pivot[place]) for r in rows if r is not pivot]
        rank += 1
    return rank


def test_maps_without_a_second_side_have_rank_one_or_none():
    net = Net(
        lambda net, x: net.out(net.bn(net.a(x.mean((2, 3)))).relu()),
        a=nn.Linear(3, 4),
        bn=nn.BatchNorm1d(4),
        out=nn.Linear(4, 3),
    )
    net = lively(net)
    with torch.no_grad():
        net.bn.weight[1], net.bn.bias[:2] = 0, torch.tensor([100.0, -1.0])
    score = ms.hrank_scores(net, tiny_data().train, X)["bn"]
    assert score[0] == 1 and score[1] == 0


SCORES = {
    "taylor": lambda graph, split: ms.taylor_scores(graph, split, residual=True),
    "fpgm": lambda graph, split: ms.fpgm_scores(graph, residual=True),
    "lamp": lambda graph, split: ms.lamp_scores(graph, residual=True),
    "hrank": lambda graph, split: ms.hrank_scores(graph, split, residual=True, images=20),
}


@pytest.mark.parametrize("kind", SCORES)
def test_every_mask_maker_takes_them(model, kind):
    graph, train = ms.ChannelGraph(model, X), tiny_data().train
    scores = SCORES[kind](graph, train)
    assert [*scores] == graph.prunable_norms(True)
    for score in scores.values():
        assert score.dtype == torch.float32 and score.isfinite().all() and not score.requires_grad
    masks = ms.masks_for_macs(graph, None, 0.4, True, scores)
    assert ms.cost(ms.prune(graph, masks), X).macs <= 0.6 * ms.cost(model, X).macs
    inner = {n: s for n, s in scores.items() if n.endswith("0.bn1")}
    for name, mask in ms.masks_for_ratio(graph, None, 0.5, inner).items():
        assert int(mask.sum()) * 2 == len(mask)
        assert inner[name][mask].min() >= inner[name][~mask].max()
    left = {"taylor": (train,), "hrank": (train,)}.get(kind, ())
    function = getattr(ms, f"{kind}_scores")
    assert "stage2.0.bn1" not in function(model, *left, X, keep=["stage2"])


def test_what_scores_refuse(model):
    train = tiny_data().train
    empty = Split(train.images[:0], train.labels[:0])
    for score in (ms.taylor_scores, ms.hrank_scores):
        with pytest.raises(ValueError, match="an example input is needed"):
            score(model, train)
        with pytest.raises(ValueError, match="images=0: at least one is needed"):
            score(model, train, X, images=0)
        with pytest.raises(ValueError, match="no image to look at"):
            score(model, empty, X)
        gray = Split(train.images[:, :1], train.labels)
        with pytest.raises(ValueError, match=r"ResNet cannot be scored on images .*, 1, 8, 8\]"):
            score(model, gray, X)
    with pytest.raises(ValueError, match="ResNet cannot be scored .*their labels"):
        ms.taylor_scores(model, Split(train.images, train.labels + 7), X)
    broken = copy.deepcopy(model)
    nn.init.constant_(broken.fc.weight, float("nan"))
    with pytest.raises(ValueError, match="the loss is nan on a batch"):
        ms.taylor_scores(broken, train, X)
    with pytest.raises(ValueError, match=r"scores for 'bn' have shape \[3\]; the layer has \[16\]"):
        ms.masks_for_macs(model, X, residual=True, scores={"bn": torch.ones(3)})


# ---- torch-pruning chooses the same channels ----


@functools.cache
def narrow_resnet():
    """torchvision's, a quarter as wide."""
    torch.manual_seed(1)
    model = lively(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)).double()
    graph = ms.ChannelGraph(model, image(1, 3, 32, 32))
    return ms.prune(graph, {n: torch.arange(len(ids)) % 4 == 0 for n, ids in graph.norms.items()})


def small_resnet():
    return copy.deepcopy(narrow_resnet())


def cut_by_torch_pruning(model, x, importance, residual=False, steps=1, **how):
    """The networks that its pruner leaves after each step, half of the channels gone at last."""
    net = copy.deepcopy(model)
    for copied, p in zip(net.parameters(), model.parameters(), strict=True):
        copied.grad = p.grad
    names = [] if residual else ["conv1", *(n for n, _ in net.named_modules() if "conv2" in n)]
    names += [] if residual else [n for n, _ in net.named_modules() if "downsample.0" in n]
    ignored = [net.fc, *(net.get_submodule(name) for name in names)]
    pruner = tp.pruner.BasePruner(
        net, x, importance, pruning_ratio=0.5, ignored_layers=ignored, iterative_steps=steps, **how
    )
    for _ in range(steps):
        pruner.step()
        yield copy.deepcopy(net)


def cut_as_far(graph, theirs, scores, residual=False):
    """The cut of the scores' order that removes as many MACs as `theirs`."""
    macs = ms.cost(theirs, graph.example).macs / ms.cost(graph.model, graph.example).macs
    return ms.prune(graph, ms.masks_for_macs(graph, None, 1 - macs - 1e-9, residual, scores))


def assert_same(ours, theirs):
    state = theirs.state_dict()
    for key, value in ours.state_dict().items():
        assert value.shape == state[key].shape, key
        assert torch.equal(value, state[key]), key


def test_torch_pruning_has_the_same_taylor_order():
    """It sums W·∂L/∂W of the filter, which is γ·∂L/∂γ + β·∂L/∂β where mean and β are zero."""
    model, x = small_resnet(), image(1, 3, 32, 32)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.zero_()
                m.bias.zero_()
    images, labels = image(8, 3, 32, 32), torch.arange(8) % 3
    graph = ms.ChannelGraph(model, x)
    scores = ms.taylor_scores(graph, [(images, labels)])
    nn.functional.cross_entropy(model(images), labels).backward()
    importance = tp.importance.GroupTaylorImportance("first", None, multivariable=True)
    (theirs,) = cut_by_torch_pruning(model, x, importance, global_pruning=True)
    assert_same(cut_as_far(graph, theirs, scores), theirs)


def test_torch_pruning_has_the_same_fpgm_order():
    """It takes distances of |W|^p, the paper those of W: the same for p = 1 and W ≥ 0."""
    model, x = small_resnet(), image(1, 3, 32, 32)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.abs_()
    graph = ms.ChannelGraph(model, x)
    importance = tp.importance.FPGMImportance(p=1, group_reduction="first", normalizer=None)
    (theirs,) = cut_by_torch_pruning(model, x, importance)
    masks = ms.masks_for_ratio(graph, None, 0.5, ms.fpgm_scores(graph))
    assert_same(ms.prune(graph, masks), theirs)


@pytest.mark.parametrize("residual", [False, True])
def test_torch_pruning_has_the_same_lamp_order(residual):
    model, x = small_resnet(), image(1, 3, 32, 32)
    graph, importance = ms.ChannelGraph(model, x), tp.importance.LAMPImportance()
    (theirs,) = cut_by_torch_pruning(model, x, importance, residual, global_pruning=True)
    scores = ms.lamp_scores(graph, residual=residual)
    assert_same(cut_as_far(graph, theirs, scores, residual), theirs)
