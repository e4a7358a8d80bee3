import json
import math

import pytest
import torch
from torch import nn

import mslib as ms

from .conftest import lively, tiny_data

EXAMPLE = torch.zeros(1, 3, 8, 8)


def test_global_l1_and_its_gradient():
    model = lively(ms.resnet(8))
    with torch.no_grad():
        model.stage1[0].bn1.weight[0] *= -1
    penalty = ms.GlobalL1(model, EXAMPLE, 0.1)
    inner = [b.bn1.weight for s in (model.stage1, model.stage2, model.stage3) for b in s]
    assert penalty().item() == pytest.approx(
        0.1 * sum(w.detach().abs().sum().item() for w in inner), rel=1e-6
    )
    penalty().backward()
    for name, p in model.named_parameters():
        if any(p is w for w in inner):
            assert torch.allclose(p.grad, 0.1 * p.sign())
        else:
            assert p.grad is None, name


def test_global_l1_with_residual_channels():
    model = lively(ms.resnet(8))
    every = sum(m.weight.abs().sum() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert ms.GlobalL1(model, EXAMPLE, 1.0, residual=True)().item() == pytest.approx(
        every.item(), rel=1e-6
    )


def test_masked_l1_touches_the_masked_out_channels_only():
    model = lively(ms.resnet(8))
    keep = torch.arange(16) % 2 == 0
    penalty = ms.MaskedL1(model, {"stage1.0.bn1": keep}, 0.5)
    gamma = model.stage1[0].bn1.weight
    assert penalty().item() == pytest.approx(
        0.5 * gamma.detach()[~keep].abs().sum().item(), rel=1e-6
    )
    penalty().backward()
    assert torch.equal(gamma.grad, torch.where(keep, 0.0, 0.5) * gamma.sign())


def test_proximal_step_is_soft_thresholding():
    model = lively(ms.resnet(8))
    gamma = model.stage1[0].bn1.weight
    keep = torch.arange(16) < 4
    with torch.no_grad():
        gamma[4], gamma[5] = -0.3, 0.01
    before = gamma.detach().clone()
    penalty = ms.MaskedL1(model, {"stage1.0.bn1": keep}, 2.0, proximal=True)
    assert not penalty().requires_grad
    penalty.proximal_step(0.05)
    expected = torch.where(keep, before, before.sign() * (before.abs() - 0.1).clamp(min=0))
    assert (
        torch.allclose(gamma, expected) and gamma[5] == 0 and gamma[4].item() == pytest.approx(-0.2)
    )
    subgradient = ms.MaskedL1(model, {"stage1.0.bn1": keep}, 2.0)
    before = gamma.detach().clone()
    subgradient.proximal_step(0.05)
    assert torch.equal(gamma, before)


@pytest.mark.parametrize("strength", [0, -1e-3, float("nan"), float("inf"), None, "1e-3"])
def test_strength_must_be_a_number_above_0(strength):
    with pytest.raises(ValueError, match=f"strength {strength}: λ is a number above 0"):
        ms.GlobalL1(ms.resnet(8), EXAMPLE, strength)


@pytest.mark.parametrize("schedule", ["onecycle", "step", "constant"])
@pytest.mark.parametrize("proximal", [False, True])
def test_push_is_how_far_a_gamma_that_nobody_needs_moves(schedule, proximal):
    """A real run in which one channel is cut off from the output: only the penalty moves its γ."""
    layers = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        model[5].weight[:, 2] = 0
    model[5].weight.register_hook(lambda g: g.index_fill(1, torch.tensor([2]), 0))
    settings = dict(
        epochs=20, lr=0.01, batch_size=8, schedule=schedule, weight_decay=0, precision="fp32"
    )
    penalty = ms.MaskedL1(model, {"1": torch.arange(4) != 2}, 0.03, proximal)
    ms.fit(model, tiny_data(), **settings, penalty=penalty)
    # all but the first steps, in which the subgradient's momentum builds up
    assert 1 - model[1].weight[2].item() == pytest.approx(
        ms.push(0.03, 0.01, 20 * 8, schedule), rel=1e-3 if proximal else 0.1
    )


def test_a_graph_stands_for_a_network_and_its_example():
    model = lively(ms.resnet(8))
    graph = ms.ChannelGraph(model, EXAMPLE)
    penalty, own = ms.GlobalL1(graph, strength=0.1), {id(p) for p in model.parameters()}
    assert penalty() == ms.GlobalL1(model, EXAMPLE, 0.1)()
    assert own.issuperset(map(id, penalty.parameters()))
    assert own.issuperset(map(id, ms.GrowingL2(graph, reduction=0.5).parameters()))


NORM = torch.arange(16) > 3
BAD_MASKS = {
    "'stage1.0.bn9': no such BatchNorm.*did you mean 'stage1.0.bn[12]'": {"stage1.0.bn9": NORM},
    "'conv': no such BatchNorm": {"conv": NORM},
    r"has shape \[15\]; the layer has \[16\]": {"bn": NORM[1:]},
    "'bn' is torch.float32; expected a bool": {"bn": NORM.float()},
    "'bn' is list; expected a bool": {"bn": [True] * 16},
    "'bn' keeps no channel": {"bn": NORM & False},
    "keep every channel: there is nothing to penalize": {"bn": NORM | True},
    "masks are a NoneType; expected a dict": None,
    "the masks keep every channel": {},
}


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf])
def test_push_of_a_strength_that_no_penalty_has(strength):
    with pytest.raises(ValueError, match=f"strength {strength}: λ is a number"):
        ms.push(strength, 0.1, 10)


@pytest.mark.parametrize("message", BAD_MASKS)
def test_masks_that_do_not_fit_are_named(message):
    with pytest.raises(ValueError, match=message):
        ms.MaskedL1(ms.resnet(8), BAD_MASKS[message], 1e-3)


@pytest.mark.parametrize("wrong", [{"fc": NORM}, {"relu": NORM}, {"fc": torch.zeros(10, 64)}])
def test_weights_to_hold_at_zero_are_those_of_a_layer(wrong):
    with pytest.raises(ValueError, match="mask for '(fc|relu)'"):
        ms.HoldZero(ms.resnet(8), wrong)
    for nothing in ({}, {"fc": torch.ones(10, 64) > 0}):
        with pytest.raises(ValueError, match="the masks would drop nothing"):
            ms.HoldZero(ms.resnet(8), nothing)


def penalties(model, keep=None, length=1.0, delta=1e-4, strength=1e-3):
    """One of each kind."""
    keep = NORM if keep is None else keep
    weights = {"fc": torch.arange(640).reshape(10, 64) > 9}
    return {
        "global": ms.GlobalL1(model, EXAMPLE, strength),
        "masked": ms.MaskedL1(model, {"stage1.0.bn1": keep}, strength),
        "proximal": ms.MaskedL1(model, {"stage1.0.bn1": keep}, strength, proximal=True),
        "GReg-1": ms.GrowingL2(model, EXAMPLE, {"stage1.0.bn1": keep}, delta=delta),
        "GReg-2": ms.GrowingL2(model, EXAMPLE, reduction=0.5, delta=delta),
        "flow": ms.FeatureFlow(model, length, layers=["stage1", "stage1.0"]),
        "zero": ms.HoldZero(model, weights),
    }


def test_an_identity_is_the_same_for_the_same_and_another_for_another():
    def known(**how):
        return {name: p.identity() for name, p in penalties(ms.resnet(8), **how).items()}

    plain, masks = known(), known(keep=~NORM)
    assert plain == known() == json.loads(json.dumps(plain))
    assert len({json.dumps(i) for i in plain.values()}) == len(plain)
    assert {n for n in plain if masks[n] != plain[n]} == {"masked", "proximal", "GReg-1"}
    assert {n for n, i in known(delta=1.001e-4).items() if i != plain[n]} == {"GReg-1", "GReg-2"}
    assert {n for n, i in known(length=2).items() if i != plain[n]} == {"flow"}
    weaker = known(strength=0.9999e-3)
    assert {n for n, i in weaker.items() if i != plain[n]} == {"global", "masked", "proximal"}


def test_what_a_growing_penalty_has_reached_is_part_of_its_identity():
    penalty = penalties(ms.resnet(8))["GReg-1"]
    before = penalty.identity()
    penalty.step(0)
    assert penalty.identity() != before


def test_a_sum_is_known_by_its_parts():
    class Own(ms.Penalty):
        def __call__(self):
            return torch.zeros(())

    model = ms.resnet(8)
    parts = penalties(model)
    total = parts["global"] + parts["flow"] + parts["GReg-2"]
    assert total.identity() == {"sum": [parts[n].identity() for n in ("global", "flow", "GReg-2")]}
    assert {id(p) for p in total.parameters()} == {id(p) for p in model.parameters()}
    assert (total + Own()).identity() is None and Own().identity() is None
    with pytest.raises(ValueError, match="the same penalty twice"):
        total + parts["flow"]
    with pytest.raises(TypeError, match="is no ms.Penalty"):
        total + (lambda: 0)


@pytest.mark.parametrize("name", ["global", "masked", "GReg-1", "GReg-2", "flow", "zero", "sum"])
def test_a_penalty_of_another_network_is_refused(name):
    bound = penalties(ms.resnet(8))
    bound["sum"] = bound["global"] + bound["flow"]
    with pytest.raises(ValueError, match="was made for another network, and would do nothing"):
        ms.fit(ms.resnet(8), tiny_data(), epochs=1, lr=0.1, penalty=bound[name])


def test_a_network_without_batchnorms_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(ValueError, match="Sequential: no BatchNorm to penalize; ms.channel_groups"):
        ms.GlobalL1(model, EXAMPLE, 1e-4)
