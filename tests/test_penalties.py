import pytest
import torch

import mslib as ms

from .conftest import lively, tiny_data


def test_global_l1_and_its_gradient():
    model = lively(ms.resnet(8))
    with torch.no_grad():
        model.stage1[0].bn1.weight[0] *= -1
    penalty = ms.GlobalL1(model, 0.1)
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
    every = sum(
        m.weight.abs().sum() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)
    )
    assert ms.GlobalL1(model, 1.0, residual=True)().item() == pytest.approx(every.item(), rel=1e-6)


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


@pytest.mark.parametrize("strength", [0, -1e-3])
def test_strength_must_be_positive(strength):
    with pytest.raises(ValueError, match=f"strength {strength}"):
        ms.GlobalL1(ms.resnet(8), strength)


@pytest.mark.parametrize("schedule", ["onecycle", "step", "constant"])
@pytest.mark.parametrize("proximal", [False, True])
def test_push_is_how_far_a_gamma_that_nobody_needs_moves(schedule, proximal):
    """A real run in which one channel is cut off from the output: only the penalty moves its γ, by the push."""
    model, data = ms.resnet(8, 3), tiny_data()
    with torch.no_grad():
        model.stage3[0].conv2.weight[:, 7] = 0
    gamma = model.stage3[0].bn1.weight
    masks = {"stage3.0.bn1": torch.arange(64) != 7}
    model.stage3[0].conv2.weight.register_hook(lambda g: g.index_fill(1, torch.tensor([7]), 0))
    settings = dict(
        epochs=20, lr=0.01, batch_size=8, schedule=schedule, weight_decay=0, precision="fp32"
    )
    ms.fit(model, data, **settings, penalty=ms.MaskedL1(model, masks, 0.03, proximal))
    # all but the first steps, in which the subgradient's momentum builds up
    assert 1 - gamma[7].item() == pytest.approx(
        ms.push(0.03, 0.01, 20 * 8, schedule), rel=1e-3 if proximal else 0.1
    )


def test_a_network_without_batchnorms_and_a_sum_with_a_function_are_refused():
    with pytest.raises(ValueError, match="AlexNet: no BatchNorm to penalize; ms.channel_groups"):
        ms.GlobalL1(ms.network("alexnet"), 1e-4)
    with pytest.raises(TypeError, match="is no ms.Penalty"):
        ms.GlobalL1(ms.resnet(8), 1e-4) + (lambda: 0)
