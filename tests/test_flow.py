import pytest
import torch
from torch import nn

import mslib as ms
from mslib.penalties.flow import FeatureFlow

from .conftest import lively, tiny_data


def by_hand(model, x, names):
    """Σ mean|x_{l+1} − x_l| and Σ mean|x_{l+1} − 2x_l + x_{l−1}| over each list of `names`."""
    kept = {}
    handles = [
        m.register_forward_hook(lambda m, i, o, n=n: kept.__setitem__(n, o))
        for n, m in model.named_modules()
    ]
    model(x)
    for h in handles:
        h.remove()
    length = curvature = 0
    for stage in names:
        f = [kept[n] for n in stage]
        for i in range(len(f) - 1):
            length = length + (f[i + 1] - f[i]).abs().sum() / f[i].numel()
        for i in range(1, len(f) - 1):
            # x_{l+1} − 2x_l + x_{l−1}, in the order that rounds alike: its sign is the gradient
            bend = (f[i + 1] - f[i]) - (f[i] - f[i - 1])
            curvature = curvature + bend.abs().sum() / f[i].numel()
    return length, curvature


NETWORKS = {
    "resnet": (lambda: ms.resnet(26, 3), [[f"stage{s}.{b}" for b in range(4)] for s in (1, 2, 3)]),
    "vgg": (
        lambda: ms.vgg(16, 3, width=0.125),
        # ReLUs of the five stages: convolution, BatchNorm, ReLU; pooling opens all but the first
        [
            [f"features.{i}" for i in stage]
            for stage in ((2, 5), (9, 12), (16, 19, 22), (26, 29, 32), (36, 39, 42))
        ],
    ),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_value_and_gradient_are_those_of_a_direct_computation(network):
    make, names = NETWORKS[network]
    model = lively(make()).train()
    x = torch.randn(4, 3, 16, 16)
    length, curvature = by_hand(model, x, names)
    expected = 0.3 * length + 0.7 * curvature
    gradients = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    flow = ms.FeatureFlow(model, length=0.3, curvature=0.7)
    with flow.attached():
        model(x)
        value = flow()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    again = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    for a, b in zip(gradients, again):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(a.abs().max()))


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def test_hooks_are_gone_after_training_and_after_an_interruption():
    model = ms.resnet(14, 3)
    penalty = ms.FeatureFlow(model, length=1e-2)
    ms.fit(model, tiny_data(), epochs=1, lr=0.01, batch_size=16, penalty=penalty)
    assert hooks(model) == 0 and penalty.features == []

    class Stop(ms.FeatureFlow):
        def __call__(self):
            assert hooks(model) == 6
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ms.fit(
            model, tiny_data(), epochs=1, lr=0.01, batch_size=16, penalty=Stop(model, length=1e-2)
        )
    assert hooks(model) == 0


def test_it_shortens_the_flow():
    torch.manual_seed(0)
    start, lengths = ms.resnet(14, 3).state_dict(), {}
    for k in (None, 3.0):
        model = ms.resnet(14, 3)
        model.load_state_dict(start)
        penalty = ms.FeatureFlow(model, length=k, curvature=k) if k else None
        ms.fit(model, tiny_data(), epochs=6, lr=0.1, batch_size=16, penalty=penalty)
        probe = FeatureFlow(model, length=1.0)
        with probe.attached(), torch.no_grad():
            model.train()(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
            lengths[k] = float(probe())
    assert lengths[3.0] < 0.5 * lengths[None]


def test_what_it_refuses():
    with pytest.raises(
        ValueError, match="length=0.0, curvature=0.0: neither below 0, and one of them above"
    ):
        ms.FeatureFlow(ms.resnet(8))
    with pytest.raises(ValueError, match="no layers to follow: stage7"):
        ms.FeatureFlow(ms.resnet(8), length=1, layers=["stage1", "stage7"])
    model = ms.resnet(8, 3)  # one block a stage: three shapes
    with pytest.raises(
        ValueError,
        match=r"no two consecutive .*stage1.0 \[16, 8, 8\], stage2.0 \[32, 4, 4\]",
    ):
        ms.fit(
            model,
            tiny_data(),
            epochs=1,
            lr=0.01,
            batch_size=16,
            penalty=ms.FeatureFlow(model, length=1),
        )
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="no features: run the model in training mode"):
        ms.FeatureFlow(ms.resnet(14), length=1)()
    with pytest.raises(ValueError, match="neither blocks nor ReLUs"):
        ms.FeatureFlow(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh()), length=1)


def test_penalties_add_up_and_resume(tmp_path, monkeypatch):
    """masked L1 + feature flow + growing L2: killed after an epoch, it ends as if it had not."""
    from mslib.training import runs

    def run(path):
        torch.manual_seed(0)
        model = ms.resnet(14, 3)
        masks = {"stage1.0.bn1": torch.arange(16) < 8}
        growing = ms.GrowingL2(
            model, tiny_data().example, reduction=0.5, every=2, pick_delta=1e-3, pick_ceiling=7e-3
        )
        penalty = (
            ms.MaskedL1(model, masks, 1e-2, proximal=True)
            + ms.FeatureFlow(model, length=1e-2, curvature=1e-2)
            + growing
        )
        assert repr(penalty).count(" + ") == 2
        history = ms.fit(
            model,
            tiny_data(),
            epochs=3,
            lr=0.02,
            batch_size=16,
            precision="fp32",
            penalty=penalty,
            run=path,
        )
        return model.state_dict(), history, growing

    weights, history, growing = run(tmp_path / "whole")
    save = runs.Run.save_checkpoint

    def stop(self, epoch, state):
        save(self, epoch, state)
        if epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    monkeypatch.setattr(runs.Run, "save_checkpoint", save)
    again, history_again, growing_again = run(tmp_path / "stopped")
    assert history.equals(history_again) and growing.history.equals(growing_again.history)
    assert all(torch.equal(weights[k], again[k]) for k in weights)
    assert (history.penalty > 0).all()


def test_the_value_of_a_sum_is_the_sum():
    model = lively(ms.resnet(14, 3)).train()
    x = torch.randn(2, 3, 8, 8)
    parts = (
        ms.GlobalL1(model, x, 0.1),
        ms.GlobalL1(model, x, 0.2),
        ms.FeatureFlow(model, curvature=0.5),
    )
    both = parts[0] + parts[1] + parts[2]
    with both.attached():
        model(x)
        total = both().item()
    with parts[2].attached():
        model(x)
        assert total == pytest.approx(sum(p().item() for p in parts), rel=1e-4)


def test_flows_are_the_features_of_evaluation_and_leave_the_network_as_it_was():
    model = lively(ms.resnet(20, 3)).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 16, 16)
    stretches = ms.flows(model, x)
    assert [len(s) for s in stretches] == [3, 3, 3] and model.training and not hooks(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        expected = model.stage1[0](torch.relu(model.bn(model.conv(x))))
    assert torch.equal(stretches[0][0], expected)
    with pytest.raises(RuntimeError):
        ms.flows(model, torch.randn(2, 5, 16, 16))
    assert not hooks(model)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_feature_is_what_its_layer_returned_whatever_becomes_of_it(inplace):
    parts = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace)]
    parts += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace)]
    model, x = lively(nn.Sequential(*parts)).train(), torch.randn(2, 3, 8, 8)
    flow = ms.FeatureFlow(model, 1.0, layers=["1", "4"])
    with flow.attached():
        model(x)
        value = flow()
    gradients = torch.autograd.grad(value, [*model.parameters()], allow_unused=True)
    wanted = (model[:5](x) - model[:2](x)).abs().mean()
    assert value.item() == pytest.approx(wanted.item())
    for a, b in zip(gradients, torch.autograd.grad(wanted, [*model.parameters()])):
        assert torch.allclose(a, b, atol=1e-6)


def test_flows_leave_frozen_batchnorms_frozen_and_images_as_they_were():
    model = lively(ms.resnet(14, 3)).train()
    model.bn.eval()
    model.register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
    x = torch.randn(2, 3, 8, 8)
    given = x.clone()
    ms.flows(model, x)
    assert model.training and model.stage1.training and not model.bn.training
    assert torch.equal(x, given)
