"""A scan of layers, cuts in steps, and what an optimizer remembers across a cut."""

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

import mslib as ms
from mslib.data.tensors import Split
from mslib.pruning.scores import filters

from .conftest import lively, tiny_data
from .cutting import image, silenced
from .test_criteria import assert_same, cut_by_torch_pruning, small_resnet

X = torch.zeros(1, 3, 8, 8)
INNER = [f"stage{i}.0.bn1" for i in (1, 2, 3)]

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=1e-3, nesterov=True),
    "plain": lambda p: torch.optim.SGD(p, 0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model.train()(x), y).backward()
    optimizer.step()


def kept_of(model, masks):
    """name -> the parameter's part that stays, by the masks of inner channels, cut by hand."""
    found = {name: p.detach() for name, p in model.named_parameters()}
    return {name: part(name, value, masks) for name, value in found.items()}


def part(name, value, masks):
    for norm, keep in masks.items():
        block = norm.removesuffix("bn1")
        if name.startswith((f"{block}conv1", f"{block}bn1")):
            value = value[keep]
        if name.startswith(f"{block}conv2"):
            value = value[:, keep]
    return value


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_cut_network_goes_on_as_the_masked_one(kind):
    model = lively(ms.resnet(8, 3)).double()
    graph, x, y = ms.ChannelGraph(model, X.double()), image(8, 3, 8, 8), torch.arange(8) % 3
    old = OPTIMIZERS[kind](model.parameters())
    for seed in range(3):
        step(model, old, image(8, 3, 8, 8, seed=seed), y)
    masks = {name: torch.rand(len(graph.norms[name])) < 0.6 for name in INNER}
    masked, small = ms.zero_masked(graph, masks), ms.prune(graph, masks)
    before = copy.deepcopy(old.state_dict())
    state = ms.cut_optimizer_state(old, graph, masks)
    whole, cut = (OPTIMIZERS[kind](net.parameters()) for net in (masked, small))
    whole.load_state_dict(before)
    cut.load_state_dict(state)
    names = [name for name, _ in model.named_parameters()]
    for place, values in old.state_dict()["state"].items():
        for key, value in values.items():
            found = state["state"][place][key]
            wanted = part(names[place], value, masks) if value is not None and value.ndim else value
            assert torch.equal(found, wanted) if value is not None else found is None
            assert value is None or torch.equal(value, before["state"][place][key])
    step(masked, whole, x, y)
    step(small, cut, x, y)
    wanted = kept_of(masked, masks)
    for name, p in small.named_parameters():
        assert torch.allclose(p, wanted[name], rtol=1e-9, atol=1e-12), name
    assert not torch.equal(small.conv.weight, model.conv.weight)


def test_momentum_begun_anew_takes_another_step():
    """What the state is worth: without it the same step ends elsewhere."""
    model, y = lively(ms.resnet(8, 3)).double(), torch.arange(8) % 3
    graph, old = ms.ChannelGraph(model, X.double()), OPTIMIZERS["momentum"](model.parameters())
    step(model, old, image(8, 3, 8, 8), y)
    masks = {name: torch.rand(len(graph.norms[name])) < 0.6 for name in INNER}
    ends = []
    for state in (ms.cut_optimizer_state(old, graph, masks), None):
        small = ms.prune(graph, masks)
        new = OPTIMIZERS["momentum"](small.parameters())
        if state:
            new.load_state_dict(state)
        step(small, new, image(8, 3, 8, 8, seed=1), y)
        ends.append(torch.cat([p.flatten() for p in small.parameters()]))
    assert (ends[0] - ends[1]).abs().max() > 1e-3


def test_optimizers_that_are_refused():
    model = lively(ms.resnet(8, 3))
    graph, masks = ms.ChannelGraph(model, X), {"stage1.0.bn1": torch.arange(16) < 8}
    other = torch.optim.SGD(ms.resnet(8, 3).parameters(), 0.1)
    with pytest.raises(ValueError, match=r"parameter 0 of the optimizer, \[16, 3, 3, 3\], is none"):
        ms.cut_optimizer_state(other, graph, masks)
    odd = torch.optim.Adafactor(model.parameters())
    step(model, odd, torch.randn(4, 3, 8, 8), torch.arange(4) % 3)
    with pytest.raises(ValueError, match="Adafactor keeps 'row_var' of 'conv.weight'"):
        ms.cut_optimizer_state(odd, graph, masks)
    with pytest.raises(ValueError, match="mask for 'stage1.0.bn7'"):
        ms.cut_optimizer_state(other, graph, {"stage1.0.bn7": masks["stage1.0.bn1"]})


def test_a_schedule_of_cuts():
    cubic, linear = ms.cut_schedule(0.6, 4), ms.cut_schedule(0.6, 4, exponent=1)
    assert linear == pytest.approx(tp.pruner.algorithms.scheduler.linear_scheduler(0.6, 4)[1:])
    gone = [0.6 + (0 - 0.6) * (1 - t / 4) ** 3 for t in (1, 2, 3, 4)]  # as the paper has it
    assert cubic == pytest.approx(gone) and cubic[-1] == 0.6
    for wrong, message in (((1.0, 4), "reduction 1.0"), ((0.5, 0), "steps=0")):
        with pytest.raises(ValueError, match=message):
            ms.cut_schedule(*wrong)
    for exponent in (0.5, float("nan")):
        with pytest.raises(ValueError, match=f"exponent={exponent}"):
            ms.cut_schedule(0.5, 4, exponent)


def test_pruning_in_steps_reaches_each_goal_and_trains_in_between(data):
    torch.manual_seed(0)
    model, seen = ms.resnet(8, 10), []
    before, whole = copy.deepcopy(model.state_dict()), ms.cost(model, data.example).macs

    def train(net, step):
        seen.append((step, 1 - ms.cost(net, data.example).macs / whole))
        ms.fit(net, data, epochs=1, lr=0.02, batch_size=50, device="cpu")

    goals = ms.cut_schedule(0.6, 3)
    small = ms.prune_gradually(
        model, data.example, goals, train, lambda graph: ms.taylor_scores(graph, data.train)
    )
    assert [step for step, _ in seen] == [0, 1, 2]
    assert all(goal <= gone < goal + 0.05 for goal, (_, gone) in zip(goals, seen, strict=True))
    assert ms.cost(small, data.example).macs <= 0.4 * whole
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    seen.clear()  # a step that the one before has done already trains only
    small = ms.prune_gradually(model, data.example, [0.3, 0.3001], train, round_to=8)
    assert [step for step, _ in seen] == [0, 1] and seen[0][1] == seen[1][1] > 0.3001
    for wrong in ([], [0.5, 0.3], [0.0], [0.5, 1.0], [float("nan")], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="expected shares that rise between 0 and 1"):
            ms.prune_gradually(model, data.example, wrong, train)


def test_a_step_that_cuts_nothing_trains_a_copy_too():
    model, seen = ms.resnet(8, 3), []
    made = ms.prune_gradually(model, X, iter([1e-12, 0.3]), lambda net, _: seen.append(net))
    assert len(seen) == 2 and made is seen[1] and seen[0] is not model
    assert (
        ms.cost(seen[0], X) == ms.cost(model, X) and ms.cost(made, X).macs < ms.cost(model, X).macs
    )


def test_torch_pruning_makes_the_same_networks_in_steps():
    """Three steps; filters of all layers are made of like size, or one layer would go first."""
    model, x = small_resnet(), image(1, 3, 32, 32)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.div_(m.weight.abs().sum((1, 2, 3)).mean())
    importance = tp.importance.MagnitudeImportance(p=1, group_reduction="first", normalizer=None)
    theirs = [*cut_by_torch_pruning(model, x, importance, steps=3, global_pruning=True)]
    whole, ours = ms.cost(model, x).macs, []

    def l1(graph):
        names = graph.prunable_norms()
        return {n: filters(graph, graph.conv_before[n]).abs().sum(1) for n in names}

    goals = [1 - ms.cost(net, x).macs / whole - 1e-9 for net in theirs]
    ms.prune_gradually(model, x, goals, lambda net, _: ours.append(net), l1)
    for net, wanted in zip(ours, theirs, strict=True):
        assert_same(net, wanted)


def test_sensitivity_is_top1_with_one_layer_cut():
    torch.manual_seed(0)
    data, model = tiny_data(), lively(ms.resnet(8, 3))
    x, images = data.example, ms.normalize(data.val.images)
    with torch.no_grad():  # its own answers, of all classes, are right: a cut loses some
        model.fc.bias -= model(images).mean(0)
        val = Split(data.val.images, model(images).argmax(1))
    table = ms.sensitivity(model, val, x, ratios=iter((0.3, 0.8)))
    assert [*zip(table.layer, table.pruning_ratio)] == [(n, r) for n in INNER for r in (0.3, 0.8)]
    whole = ms.evaluate(model, val)
    assert whole == 100
    for row in table.itertuples():
        gamma = model.get_submodule(row.layer).weight.abs()
        keep = gamma.argsort().argsort() >= row.channels - row.kept
        assert row.channels == len(gamma)
        assert row.kept == len(gamma) - -(-row.pruning_ratio * len(gamma) // 1)
        masks = {row.layer: keep}
        assert row.top1 == ms.evaluate(silenced(model, masks), val)
        assert row.drop == pytest.approx(whole - row.top1)
        left = ms.cost(ms.prune(model, masks, x), x).macs / ms.cost(model, x).macs
        assert row.reduction == pytest.approx(1 - left, abs=1e-6)
    assert table["drop"].max() > 0


def test_sensitivity_cuts_together_what_goes_together():
    data, model = tiny_data(), lively(ms.resnet(14, 3))
    graph = ms.ChannelGraph(model, data.example)
    table = ms.sensitivity(graph, data.val, ratios=(0.5,), residual=True, keep=["stage2.1.bn1"])
    assert len(table) == 8  # of each stage two inner ones, without the one kept, and the residual
    assert "bn, stage1.0.bn2, stage1.1.bn2" in set(table.layer)
    assert "stage2.1.bn1" not in set(table.layer)
    scores = {name: -s for name, s in ms.gammas(graph).items() if name != "stage1.0.bn1"}
    other = ms.sensitivity(graph, data.val, ratios=(0.5,), scores=scores)
    assert len(other) == 5
    keep = model.stage3[0].bn1.weight.abs().argsort().argsort() < 32  # the largest go
    top1 = ms.evaluate(silenced(model, {"stage3.0.bn1": keep}), data.val)
    assert float(other.top1[other.layer == "stage3.0.bn1"].iloc[0]) == top1
    with pytest.raises(ValueError, match="no prunable BatchNorm"):
        ms.sensitivity(graph, data.val, keep=["stage1", "stage2", "stage3"])
    with pytest.raises(ValueError, match="reduction 1.5: the share"):
        ms.sensitivity(graph, data.val, ratios=(1.5,))
    with pytest.raises(ValueError, match="scores for 'bn9'"):
        ms.sensitivity(graph, data.val, scores={"bn9": torch.ones(2)})
