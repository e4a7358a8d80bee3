import copy
import logging

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import mslib as ms

from .conftest import lively

CIFAR = torch.zeros(1, 3, 32, 32)
IMAGE = torch.zeros(2, 3, 224, 224, device="meta")


def counted(model, *args, **kwargs):
    """MACs by torch's own counter, on the meta device: fused attention is not counted on a CPU."""
    model = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*(a.to("meta") for a in args), **{k: v.to("meta") for k, v in kwargs.items()})
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    "depth, macs, params", [(56, 125_485_696, 853_018), (110, 252_887_680, 1_727_962)]
)
def test_cifar_resnets_cost_what_the_papers_say(depth, macs, params):
    price = ms.cost(ms.resnet(depth), CIFAR)
    assert (price.macs, price.params) == (macs, params)


@pytest.mark.parametrize(
    "name, macs",
    [
        ("resnet50", 4_089_184_256),
        ("vit_b_16", 17_563_000_000),
        ("mobilenet_v2", None),
        ("swin_t", None),
        ("convnext_tiny", None),
        ("fcn_resnet50", None),
        ("deeplabv3_mobilenet_v3_large", None),
    ],
)
def test_torchvision_networks_cost_what_torch_counts(name, macs):
    with torch.device("meta"):
        model = ms.network(name)
    price = ms.cost(model, IMAGE)
    assert price.macs == counted(model, IMAGE[:1]) == sum(price.layers.values())
    assert macs is None or price.macs == pytest.approx(macs, rel=1e-3)
    named = {*dict(model.named_modules()), *dict(model.named_parameters())}
    assert set(price.layers) <= named


@pytest.mark.parametrize("name", ["mobilevit_xxs", "levit_128s", "unet"])
def test_networks_of_timm(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = UNet() if name == "unet" else timm.create_model(name)
    assert ms.cost(model, IMAGE).macs == counted(model, IMAGE[:1])


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.low = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        return self.out(torch.cat([x, self.up(self.low(self.low(self.down(x))))], 1))


class Attention(nn.Module):
    """Products of matrices in modules and in functions, of sequences x [N, 4, T]."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv1d(4, 8, 3, padding=1, groups=2), nn.Linear(8, 8)
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x, y=None):
        x = self.linear(self.conv(x).transpose(1, 2))  # [N, T, 8]
        x = self.layer(self.heads(x, x, x, need_weights=False)[0])
        x = F.scaled_dot_product_attention(x, x, x)
        return {"all": [self.linear(x), torch.bmm(x, x.transpose(1, 2)) @ x]}


X = torch.randn(3, 4, 10)


def test_attention_counts_wherever_it_is_computed():
    model = Attention()
    price = ms.cost(model, X)
    assert price.macs == counted(model, X[:1])
    product = 10 * 10 * 8
    assert price.layers["conv"] == 10 * 8 * 2 * 3
    assert price.layers["linear"] == 2 * 10 * 8 * 8  # called twice
    for heads in ("heads", "layer.self_attn"):
        assert price.layers[heads] == 2 * product
        assert price.layers[f"{heads}.in_proj_weight"] == 3 * price.layers[f"{heads}.out_proj"]
        assert price.layers[f"{heads}.out_proj"] == 640  # used by a function, without its module
    assert price.layers[""] == 4 * product
    assert torch.backends.mha.get_fastpath_enabled()


class ByFunction(nn.Module):
    """Weights that no module of their own computes with: as the channel graph names them."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.out, self.tied = nn.Linear(8, 4), nn.Linear(8, 4, bias=False)
        self.tied.weight = self.out.weight
        self.own = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x):
        x = self.norm(F.conv2d(x, self.conv.weight)).relu()
        x = F.conv2d(x, self.own).relu().mean((2, 3))
        return self.out(x) + self.tied(x)


def test_counts_go_by_the_weight_as_the_channel_graph_names_it():
    model, x = lively(ByFunction()), torch.randn(2, 3, 12, 12)
    price, graph = ms.cost(model, x), ms.ChannelGraph(model, x)
    wanted = {"conv": 100 * 27 * 8, "own": 64 * 72 * 8, "out": 2 * 32}
    assert price.layers == wanted and {*graph.outputs} == {*wanted}
    masks = {"norm": torch.arange(8) < 4}
    small = ms.cost(ms.prune(graph, masks), x)
    assert ms.pruning.masks.remaining_macs(graph, masks, price.layers) == small.macs
    cut = ms.prune(graph, ms.masks_for_macs(graph, reduction=0.2))
    assert 0.2 <= 1 - ms.cost(cut, x).macs / price.macs < 0.3  # it was 0.6 once


class Branching(Attention):
    """Cannot run without data."""

    def forward(self, x, y=None):
        return super().forward(x) if x.sum() < 1e9 else x


@pytest.mark.parametrize("example", [X, (X,), [X, X], {"x": X}, {"x": X, "y": X}])
def test_examples_of_every_form(example):
    model = Attention()
    macs = counted(model, X[:1])
    assert ms.cost(model, example).macs == macs
    assert ms.cost(Branching(), example).macs == macs  # on the CPU, with fused attention


def test_wrapped_networks_cost_what_they_hold():
    model = ms.resnet(8)
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        assert ms.cost(wrapped, CIFAR) == ms.cost(model, CIFAR)


@pytest.mark.parametrize(
    "example, message",
    [
        (None, "example is None; expected a float tensor"),
        ("image", "example is str"),
        ([], "example is list"),
        (CIFAR.double(), r"ResNet \(float32\) does not run on .*float64 \[1, 3, 32, 32\]"),
        (CIFAR.half(), r"\(float32\) does not run on .*float16"),
        (CIFAR.byte(), r"\(float32\) does not run on .*uint8"),
        (CIFAR[:, :1], r"does not run on the example \(float32 \[1, 1, 32, 32\]\)"),
        (CIFAR[0], r"does not run on the example \(float32 \[3, 32, 32\]\)"),
        ([CIFAR, CIFAR], "does not run on the example.*takes"),
        ({"image": CIFAR}, "does not run on the example.*unexpected keyword"),
    ],
)
def test_a_wrong_example_is_named(example, message):
    with pytest.raises(ValueError, match=message):
        ms.cost(ms.resnet(8), example)


def test_a_half_network_with_a_float_example_is_named():
    with pytest.raises(ValueError, match=r"ResNet \(float16\) does not run on .*\(float32"):
        ms.cost(ms.resnet(8).half(), CIFAR)
    assert ms.cost(ms.resnet(8).half(), CIFAR.half()).macs == ms.cost(ms.resnet(8), CIFAR).macs


def test_detection_takes_a_list_of_images():
    make = torchvision.models.detection.ssdlite320_mobilenet_v3_large
    model = make(weights=None, weights_backbone=None)
    assert ms.cost(model, ([torch.rand(3, 64, 64)],)).macs > 5e8
    with pytest.raises(ValueError, match=r"a tuple with that list: \(\[image\],\)"):
        ms.cost(model, [torch.rand(3, 64, 64)])


def test_cost_is_for_one_image_and_leaves_the_model_alone():
    model = ms.resnet(8).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert ms.cost(model, torch.randn(7, 3, 32, 32)) == ms.cost(model, CIFAR)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_keeping_4_8_43_inner_channels_is_the_2_55x_setting_of_greg():
    model = ms.resnet(56)
    keep = {"stage1": 4, "stage2": 8, "stage3": 43}
    masks = {n: torch.arange(len(g)) < keep[n[:6]] for n, g in ms.gammas(model, CIFAR).items()}
    small = ms.prune(model, masks, CIFAR)
    assert ms.cost(model, CIFAR).macs / ms.cost(small, CIFAR).macs == pytest.approx(2.555, abs=5e-4)


def test_latency_measures_something():
    measured = ms.latency(ms.resnet(8), torch.randn(2, 3, 8, 8), seconds=0.05)
    assert measured.median > 0 and measured.batch_size == 2 and str(measured)
    for model in (nn.Conv3d(3, 4, 3), nn.Identity()):
        assert ms.latency(model, torch.randn(2, 3, 8, 8, 8), seconds=0.01).median > 0
    assert ms.latency(Attention(), {"x": X, "y": X}, seconds=0.01).batch_size == 3
    with pytest.raises(ValueError, match=r"Conv2d \(float32\) does not run on the example"):
        ms.latency(nn.Conv2d(3, 4, 3), CIFAR[:, :1], seconds=0.01)


@pytest.mark.parametrize("compiled", [False, True])
def test_latency_is_of_the_network_as_deployed(compiled, monkeypatch, caplog):
    """With BatchNorms folded into the convolutions before them, if it can be traced."""
    seen, model, x = [], ms.resnet(8), torch.randn(2, 3, 8, 8)
    level = logging.getLogger("torch.utils.cpp_extension").level
    original = torch.utils.benchmark.Timer.timeit

    def timeit(self, n):
        seen.append(self)
        return original(self, n)

    monkeypatch.setattr(torch.utils.benchmark.Timer, "timeit", timeit)
    ms.latency(model, x, seconds=0.01, compiled=compiled)
    timed = seen[0]._globals["model"]
    assert isinstance(timed, torch._dynamo.eval_frame.OptimizedModule) == compiled
    assert not any(isinstance(m, nn.BatchNorm2d) for m in timed.modules())
    assert isinstance(model.bn, nn.BatchNorm2d)
    assert logging.getLogger("torch.utils.cpp_extension").level == level
    with torch.no_grad():
        assert torch.allclose(timed(x), model.eval()(x), atol=1e-5)
    if not compiled:
        assert ms.latency(Branching(), X, seconds=0.01).median > 0
        assert "Branching is timed with its BatchNorms" in caplog.text


def test_latency_says_when_nothing_can_be_compiled(monkeypatch):
    def failing(*_, **__):
        def run(x):
            raise OSError("no C++ compiler")

        return run

    monkeypatch.setattr(torch, "compile", failing)
    message = "cannot compile ResNet here: no C.. compiler; install g.., or leave compiled=False"
    with pytest.raises(RuntimeError, match=message):
        ms.latency(ms.resnet(8), torch.randn(2, 3, 8, 8), compiled=True)


@pytest.mark.parametrize("look", [ms.cost, ms.channel_groups, ms.latency, ms.flows])
def test_an_example_without_an_image_is_refused(look):
    """Its MACs would be 0."""
    with pytest.raises(ValueError, match="holds no image: its first size is 0"):
        look(ms.resnet(8), CIFAR[:0])


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_time_to_measure_that_never_ends_is_refused(seconds):
    with pytest.raises(ValueError, match=f"seconds={seconds}: expected a number above 0"):
        ms.latency(ms.resnet(8), CIFAR, seconds)
