import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import mslib as ms

CIFAR = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize(
    "depth, macs, params", [(56, 125_485_696, 853_018), (110, 252_887_680, 1_727_962)]
)
def test_cifar_resnets_cost_what_the_papers_say(depth, macs, params):
    price = ms.cost(ms.resnet(depth), CIFAR)
    assert (price.macs, price.params) == (macs, params)


def test_torchvision_resnet50():
    price = ms.cost(torchvision.models.resnet50(), torch.zeros(1, 3, 224, 224))
    assert (price.macs, price.params) == (4_089_184_256, 25_557_032)


def test_keeping_4_8_43_inner_channels_is_the_2_55x_setting_of_greg():
    model = ms.resnet(56)
    keep = {"stage1": 4, "stage2": 8, "stage3": 43}
    masks = {n: torch.arange(len(g)) < keep[n[:6]] for n, g in ms.gammas(model).items()}
    small = ms.prune(model, masks, CIFAR)
    assert ms.cost(model, CIFAR).macs / ms.cost(small, CIFAR).macs == pytest.approx(2.555, abs=5e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ms.resnet(20),
        torchvision.models.resnet18,
        torchvision.models.vgg11_bn,
        torchvision.models.mobilenet_v2,
    ],
)
def test_agrees_with_torch_flop_counter(make):
    model, image = make().eval(), torch.randn(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert ms.cost(model, image).macs * 2 == counter.get_total_flops()


def test_cost_is_for_one_image_and_leaves_the_model_alone():
    model = ms.resnet(8).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert ms.cost(model, torch.randn(7, 3, 32, 32)).macs == ms.cost(model, CIFAR).macs
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_latency_measures_something():
    measured = ms.latency(ms.resnet(8), torch.randn(2, 3, 8, 8), seconds=0.05)
    assert measured.median > 0 and measured.batch_size == 2 and str(measured)


@pytest.mark.parametrize("compiled", [False, True])
def test_latency_is_of_the_network_as_deployed(compiled, monkeypatch, caplog):
    """With BatchNorms folded into the convolutions before them, if it can be traced; the network itself keeps them."""
    seen, model = [], ms.resnet(8)
    original = torch.utils.benchmark.Timer.timeit
    monkeypatch.setattr(
        torch.utils.benchmark.Timer,
        "timeit",
        lambda self, n: (seen.append(self), original(self, n))[1],
    )
    ms.latency(model, x := torch.randn(2, 3, 8, 8), seconds=0.01, compiled=compiled)
    timed = seen[0]._globals["model"]
    assert isinstance(timed, torch._dynamo.eval_frame.OptimizedModule) == compiled
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in timed.modules())
    with torch.no_grad():
        assert torch.allclose(timed(x), model.eval()(x), atol=1e-5) and isinstance(
            model.bn, torch.nn.BatchNorm2d
        )

    class Branching(torch.nn.Conv2d):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    assert ms.latency(Branching(3, 3, 1), x, seconds=0.01, compiled=compiled).median > 0
    assert "Branching is timed with its BatchNorms" in caplog.text


def test_latency_says_when_nothing_can_be_compiled(monkeypatch):
    monkeypatch.setattr(
        torch,
        "compile",
        lambda *_, **__: lambda x: (_ for _ in ()).throw(OSError("no C++ compiler")),
    )
    with pytest.raises(
        RuntimeError,
        match="cannot compile ResNet here: no C.. compiler; install g.., or leave compiled=False",
    ):
        ms.latency(ms.resnet(8), torch.randn(2, 3, 8, 8), compiled=True)
