"""Any network: torchvision's, timm's, and hundreds of random ones. Pruned equals masked, always.

`python -m tests.test_networks` prints the README's table of what works. MSLIB_RANDOM_NETWORKS: how
many random networks are tried, 40 unless it says otherwise. MSLIB_NETWORKS=all: all of the lists
below, not only those that stand for a kind.
"""

import os
import re

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import nn
from torch.nn import functional as F

import mslib as ms
from mslib.exports import feed, session
from mslib.networks import resize

from .conftest import lively
from .cutting import Net, difference, half, image, outputs, silenced, size

RANDOM = int(os.environ.get("MSLIB_RANDOM_NETWORKS", "40"))
ALL = os.environ.get("MSLIB_NETWORKS") == "all"

NAMES = (
    "resnet18",
    "resnet50",
    "wide_resnet50_2",
    "resnext50_32x4d",
    "vgg16_bn",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mnasnet1_0",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "alexnet",
    "convnext_tiny",
    "maxvit_t",
    "swin_t",
    "vit_b_16",
)
WHOLE = {
    "squeezenet1_1",
    "alexnet",
    "convnext_tiny",
    "swin_t",
    "vit_b_16",
}  # no BatchNorm: nothing to go by
NO_ADDITIONS = {  # nothing is shared between blocks
    "vgg16_bn",
    "densenet121",
    "googlenet",
    "inception_v3",
    "shufflenet_v2_x1_0",
}
SIDE = {"inception_v3": 96, "maxvit_t": 224, "vit_b_16": 224}


TIMM_WHOLE = {"convnext_atto", "nf_regnet_b0"}  # no BatchNorm: nothing to go by
TIMM = (
    "test_resnet",
    "test_efficientnet",
    "test_byobnet",
    "resnet10t",
    "resnet18d",
    "legacy_seresnet18",
    "skresnet18",
    "resnest14d",
    "resnext26ts",
    "seresnext26ts",
    "gcresnext26ts",
    "eca_resnext26ts",
    "mobilenetv1_100",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035",
    "efficientnet_lite0",
    "tinynet_e",
    "mnasnet_small",
    "fbnetc_100",
    "lcnet_035",
    "rexnet_100",
    "regnetx_002",
    "regnety_002",
    "dla46_c",
    "hrnet_w18_small",
    "cs3darknet_focus_s",
    "ese_vovnet19b_slim_dw",
    "selecsls42",
    "repvgg_a0",
    "repghostnet_050",
    "hardcorenas_a",
    "semnasnet_050",
    "resnetblur18",
    "dpn48b",
    "convnext_atto",
    "nf_regnet_b0",
)


TIMM_KINDS = {  # what the others consist of, too
    "test_resnet",
    "test_efficientnet",
    "resnet18d",
    "skresnet18",
    "resnest14d",
    "eca_resnext26ts",
    "mobilenetv3_small_050",
    "rexnet_100",
    "regnety_002",
    "hrnet_w18_small",
    "ese_vovnet19b_slim_dw",
    "repghostnet_050",
    "convnext_atto",
}
assert set(TIMM) > TIMM_KINDS


def network(name):
    """(network in float64 with random BatchNorms, image). VGG and AlexNet narrower."""
    kwargs = {
        "googlenet": {"init_weights": True, "aux_logits": False},
        "inception_v3": {"init_weights": False, "aux_logits": False},
    }.get(name, {})
    model = torchvision.models.get_model(name, weights=None, **kwargs)
    if name in ("vgg16_bn", "alexnet"):
        for i, layer in enumerate(model.classifier):
            if isinstance(layer, nn.Linear):
                model.classifier[i] = nn.Linear(
                    min(
                        layer.in_features,
                        25088 if name == "vgg16_bn" and i == 0 else 9216 if i == 1 else 64,
                    ),
                    64,
                )
    side = SIDE.get(name, 64)
    return lively(model).double(), image(1, 3, side, side)


def row(name):
    """The network's line in README's table.

    Groups of channels that can be cut, MACs left with half of them gone, and what stays whole.
    """
    model, x = network(name)
    graph = ms.ChannelGraph(model, x)
    groups = ms.channel_groups(graph)
    free = [g for g in groups if g.norms and not g.reason]
    masks = half(graph)
    whole = ms.cost(model, x).macs
    left = f"{100 * ms.cost(ms.prune(graph, masks), x).macs / whole:.0f} %" if masks else "all"
    why = dict.fromkeys(_why(g) for g in groups if g not in free)
    return f"| {name} | {len(free)} of {len(groups)} | {left} | {', '.join(why)} |"


def _why(group):
    """A few words for the reason why a group stays."""
    if "output of" in group.reason:
        return "the outputs"
    if entered := re.search(r"it enters '(\w+)'", group.reason):
        return f"what enters {entered[1]}"
    if "no BatchNorm" in group.reason or not group.norms:
        return "what no BatchNorm scales"
    return "what is behind"


def cut(model, x, free):
    """Cut half of all free channels and compare; returns (the graph, masks, the small network)."""
    graph = ms.ChannelGraph(model, x)
    masks = half(graph)
    assert (len(masks) == len(graph.norms)) if free == "all" else bool(masks) == free
    small = ms.prune(graph, masks)
    assert difference(small, silenced(model, masks), x) < 1e-9
    return graph, masks, small


LARGE = {"wide_resnet50_2", "vit_b_16", "maxvit_t"}  # in the table only
LIKE_OTHERS = {"efficientnet_v2_s", "regnet_x_400mf", "convnext_tiny", "inception_v3"}


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in LARGE | (set() if ALL else LIKE_OTHERS)]
)
def test_torchvision(name):
    model, x = network(name)
    graph, masks, small = cut(model, x, name not in WHOLE)
    if not masks:
        return
    whole = ms.cost(model, x)
    assert ms.cost(small, x).macs < 0.9 * whole.macs
    assert ms.cost(small, x).macs == ms.pruning.masks.remaining_macs(graph, masks, whole.layers)
    inner = half(graph, residual=False)  # without what blocks share
    assert {*inner} < {*masks} or name in NO_ADDITIONS
    assert difference(resize(model, small.state_dict()), small, x) == 0  # as `load` builds it


def test_a_small_maxvit():
    """Convolutions with BatchNorm and squeeze and excitation, between attention over windows."""
    model = torchvision.models.MaxVit(
        (56, 56),
        8,
        partition_size=7,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=4,
        stochastic_depth_prob=0.1,
        num_classes=5,
    )
    graph, masks, _ = cut(lively(model).double(), image(2, 3, 56, 56), True)
    assert len(masks) >= 4 and len(masks) < len(graph.norms)


@pytest.mark.parametrize("name", TIMM if ALL else sorted(TIMM_KINDS))
def test_timm(name):
    timm = pytest.importorskip("timm")
    model = lively(timm.create_model(name, pretrained=False, num_classes=10)).double()
    _, _, small = cut(model, image(2, 3, 64, 64), name not in TIMM_WHOLE)
    if name not in TIMM_WHOLE:
        assert size(small) < 0.9 * size(model)


def test_few_of_timm_stay_whole():
    assert len(TIMM) >= 30 and len(TIMM_WHOLE) <= 5


@pytest.mark.parametrize("name", ["resnet18", "densenet", "mobilenet_v2", "resnext50_32x4d"])
def test_torch_pruning_makes_the_same_network(name):
    if name == "densenet":
        small = torchvision.models.DenseNet(8, (3, 3), 16, num_classes=5)
        model, x = lively(small).double(), image(1, 3, 32, 32)
    else:
        model, x = network(name)
    graph = ms.ChannelGraph(model, x)
    masks = half(graph)
    ours, theirs = ms.prune(graph, masks), silenced(model, masks)
    drop, modules = graph.dropped(masks), dict(theirs.named_modules())
    dependencies = tp.DependencyGraph().build_dependency(theirs, example_inputs=x)
    for writer, ids in graph.outputs.items():
        layer, gone = modules[writer], drop[ids].nonzero().flatten().tolist()
        linear = isinstance(layer, nn.Linear)
        width = layer.out_features if linear else layer.out_channels
        if not gone or width != len(ids):  # nothing goes, or it went together with another's
            continue
        cut_off = tp.prune_linear_out_channels if linear else tp.prune_conv_out_channels
        if not linear and layer.groups == layer.out_channels > 1:
            cut_off = tp.prune_depthwise_conv_out_channels
        dependencies.get_pruning_group(layer, cut_off, idxs=gone).prune()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert ms.cost(ours, x).macs == ms.cost(theirs, x).macs
    assert difference(ours, theirs, x) < 1e-9


def test_resnet50_costs_what_its_kept_widths_say():
    """By masks in torchvision's names, at 224², counted by hand from the kept channels."""
    model, x = lively(torchvision.models.resnet50(weights=None)), torch.zeros(1, 3, 224, 224)
    graph = ms.ChannelGraph(model, image(1, 3, 32, 32).float())
    masks = half(graph)
    kept = {name: int(m.sum()) for name, m in masks.items()}
    total, inputs, side = 112**2 * 49 * 3 * kept["bn1"], kept["bn1"], 56
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for b in range(blocks):
            inner, outer, out = (kept[f"layer{stage}.{b}.bn{i}"] for i in (1, 2, 3))
            total += side**2 * inputs * inner  # 1×1, before the stride
            side //= 2 if b == 0 and stage > 1 else 1
            total += side**2 * (9 * inner * outer + outer * out + (inputs * out if b == 0 else 0))
            inputs = out
    total += inputs * 1000
    assert ms.cost(ms.prune(graph, masks), x).macs == total < 3.3e9


# ---- random networks ----


class Branches(nn.Module):
    """What `how` says of several branches over one input."""

    def __init__(self, how, *branches):
        super().__init__()
        self.how, self.branches = how, nn.ModuleList(branches)

    def forward(self, x):
        outs = [branch(x) for branch in self.branches]
        if self.how == "cat":
            return torch.cat(outs, 1)
        return outs[0] + outs[1] if self.how == "add" else outs[0] * outs[1]


def chunked(net, x):
    a, b = x.chunk(2, 1)
    return torch.cat([a, net.inner(b)], 1)


def split(net, x):
    a, b = torch.split(x, x.shape[1] // 2, 1)
    return torch.cat([net.inner(a) * b, a], 1)


def by_view(net, x):
    a, b = x.unflatten(1, (2, -1)).unbind(1)
    return torch.stack([net.inner(a), F.relu(b)], 2).flatten(1, 2)


def channels_last(net, x):
    return net.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def scaled(net, x):
    return x + net.gamma * net.block(x)


def spatial_gate(net, x):
    return x * torch.sigmoid(net.gate(x)).expand_as(x)


class Draw:
    """A small random network of layers that mslib follows; all of it follows from the seed."""

    def __init__(self, seed, kernels=(1, 3)):
        self.random, self.kernels = torch.Generator().manual_seed(seed), kernels
        torch.manual_seed(seed)
        layers, width = [*self.convolution(3, 8), nn.ReLU()], 8
        for _ in range(4):
            block, width = self.block(width)
            layers += block
        tail, width = self.tail(width)
        model = nn.Sequential(*layers, *tail, nn.Linear(width, 4))
        if self.one(0, 1):
            model = Net(lambda net, x: {"logits": net.body(x), "more": (1, None)}, body=model)
        self.model = lively(model, seed).double()

    def tail(self, width):
        """From a map to one row of numbers."""
        kind = self.one("pooled", "pixels", "text")
        if kind == "text":  # the pixels in a row, as time
            layers = [nn.Conv1d(width, 12, 1), nn.BatchNorm1d(12)]
            pool = [self.activation(), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
            return [nn.Flatten(2), *layers, *pool], 12
        pixels = 1 if kind == "pooled" else 2
        layers = [nn.AdaptiveAvgPool2d(pixels), nn.Flatten()]
        if self.one(0, 1):
            return [*layers, nn.Linear(width * pixels**2, 12), nn.BatchNorm1d(12), nn.ReLU()], 12
        return layers, width * pixels**2

    def one(self, *of):
        return of[int(torch.randint(len(of), (1,), generator=self.random))]

    def activation(self):
        return self.one(nn.ReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.Identity, nn.Tanh, nn.ELU)()

    def convolution(self, width, out, groups=1):
        k = self.one(*self.kernels)
        return [
            nn.Conv2d(width, out, k, padding=k // 2, groups=groups, bias=self.one(True, False)),
            nn.BatchNorm2d(out),
        ]

    def gate(self, width):
        return nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, 4, 1),
            nn.ReLU(),
            nn.Conv2d(4, width, 1),
            nn.Sigmoid(),
        )

    def block(self, width):
        return self.old_block(width) if self.one(0, 1) else self.new_block(width)

    def new_block(self, width):
        """What moves channels, or makes maps larger."""
        kind = self.one("up", "transposed", "shuffled", "chunk", "pixels", "last", "scale", "gate")
        act = self.activation
        if kind == "up":
            mode = self.one("nearest", "bilinear", "bicubic")
            up = nn.Upsample(scale_factor=2, mode=mode)
            return [*self.convolution(width, 6), act(), up, nn.MaxPool2d(2)], 6
        if kind == "transposed":
            groups = self.one(1, 2, 8)
            up = nn.ConvTranspose2d(8, 8, 2, 2, groups=groups, bias=self.one(True, False))
            return [*self.convolution(width, 8), nn.ReLU(), up, nn.BatchNorm2d(8), act()], 8
        if kind == "shuffled":
            grouped = self.convolution(12, 12, 2)
            return [*self.convolution(width, 12), act(), nn.ChannelShuffle(2), *grouped, act()], 12
        if kind == "chunk":
            parts = self.one(chunked, split, by_view)
            inner = nn.Sequential(*self.convolution(5, 5), act())
            return [*self.convolution(width, 10), act(), Net(parts, inner=inner)], 10
        if kind == "pixels":
            there, back = nn.PixelUnshuffle(2), nn.PixelShuffle(2)
            inner = [nn.Upsample(scale_factor=2), there, *self.convolution(16, 8), act(), back]
            return [*self.convolution(width, 4), act(), *inner, *self.convolution(2, 6), act()], 6
        if kind == "last":
            mix = Net(channels_last, mlp=nn.Linear(width, 9, bias=self.one(True, False)))
            return [mix, nn.BatchNorm2d(9), act()], 9
        if kind == "scale":
            block = nn.Sequential(*self.convolution(width, width), act())
            return [Net(scaled, block=block, gamma=nn.Parameter(torch.rand(width, 1, 1)))], width
        gate = nn.Conv2d(8, 1, 1)
        return [*self.convolution(width, 8), act(), Net(spatial_gate, gate=gate)], 8

    def old_block(self, width):
        kind = self.one(
            "plain",
            "depthwise",
            "grouped",
            "gated",
            "residual",
            "projection",
            "cat",
            "dense",
            "pool",
        )
        if kind == "plain":
            return [*self.convolution(width, 12), self.activation()], 12
        if kind == "depthwise":
            times = self.one(1, 2)
            inner = [
                *self.convolution(width, 8),
                nn.ReLU6(),
                *self.convolution(8, 8 * times, 8),
                self.activation(),
            ]
            return [*inner, *self.convolution(8 * times, width)], width
        if kind == "grouped":
            return [
                *self.convolution(width, 12),
                nn.ReLU(),
                *self.convolution(12, 8, self.one(2, 4)),
                self.activation(),
            ], 8
        if kind == "gated":
            return [
                *self.convolution(width, 8),
                self.activation(),
                Branches("mul", nn.Identity(), self.gate(8)),
                nn.Dropout2d(0.1),
            ], 8
        if kind == "residual":
            inner = nn.Sequential(
                *self.convolution(width, 8), self.activation(), *self.convolution(8, width)
            )
            return [Branches("add", inner, nn.Identity()), nn.ReLU()], width
        if kind == "projection":
            inner = nn.Sequential(
                *self.convolution(width, 8), nn.PReLU(8), *self.convolution(8, 10)
            )
            return [
                Branches("add", nn.Sequential(*self.convolution(width, 10)), inner),
                self.activation(),
            ], 10
        if kind == "cat":
            parts = (nn.Sequential(*self.convolution(width, n), self.activation()) for n in (5, 7))
            return [Branches("cat", *parts)], 12
        if kind == "dense":
            parts = (nn.Identity(), nn.Conv2d(width, 4, 3, padding=1), nn.Conv2d(width, 6, 1))
            return [Branches("cat", *parts), nn.BatchNorm2d(width + 10), nn.ReLU()], width + 10
        return [
            self.one(
                nn.MaxPool2d(2, ceil_mode=True),
                nn.AvgPool2d(2, ceil_mode=True),
                nn.AdaptiveMaxPool2d(4),
            )
        ], width


def drawn(seed, **options):
    model = Draw(seed, **options).model
    return model, image(2, 3, 8, 8, seed=seed)


def test_random_networks():
    """Pruned equals masked, every time, in either mode of operation; and cut once more."""
    smaller = 0
    for seed in range(RANDOM):
        model, x = drawn(seed)
        graph = ms.ChannelGraph(model, x)
        masks = half(graph, residual=seed % 4 != 1, seed=seed)
        small = ms.prune(graph, masks)
        assert difference(small, silenced(model, masks), x) < 1e-9, f"seed {seed}: {model}"
        smaller += size(small) < size(model)
        ms.prune(graph, masks, fold_bias=True)  # compared inside, without a border
        if seed % 5 == 0:  # once more
            again = ms.ChannelGraph(small, x)
            masks = half(again, seed=seed + 1)
            last = ms.prune(again, masks)
            assert difference(last, silenced(small, masks), x) < 1e-9, f"seed {seed}: {small}"
    assert smaller > 0.97 * RANDOM


@pytest.mark.parametrize("seed", range(0, RANDOM, 4))
def test_random_networks_in_files(seed, tmp_path):
    """Cut, saved, loaded, cut again, saved again, and of some exported: equal at each step."""
    model, x = drawn(seed)
    for step in range(2):
        graph = ms.ChannelGraph(model, x)
        masks = half(graph, seed=seed + step)
        small = ms.prune(graph, masks)
        ms.save(small, tmp_path / "small.pt")
        model = ms.load(tmp_path / "small.pt", drawn(seed)[0]).eval()
        assert difference(model, small, x) == 0
        assert difference(model, silenced(graph.model, masks), x) < 1e-9
        assert str(model) == str(small)  # the widths that layers tell
    if seed % 16 == 0:
        model = getattr(model, "body", model)  # ONNX knows no output that is a number or None
        exported_alike(model.float(), x.float(), tmp_path / "small.onnx")


def exported_alike(model, x, path):
    """ONNX Runtime computes the same, of these images and of another number of others."""
    assert ms.export(model, path, x) < 1e-4
    file = session(path)
    for batch in (x, image(3, *x.shape[1:], seed=1).float()):
        found = file.run(None, feed(file, (batch,), {}))
        for ours, theirs in zip(outputs(model, batch), found, strict=True):
            off = (ours - torch.from_numpy(theirs)).abs().max()
            assert off < 1e-4 * ours.abs().max()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_networks_in_files(name, tmp_path):
    model, x = lively(ms.network(name, 10)).double(), image(2, 3, 32, 32)
    for step in range(2):
        graph = ms.ChannelGraph(model, x)
        masks = half(graph, seed=step)
        small = ms.prune(graph, masks)
        ms.save(small, tmp_path / "small.pt")
        model = ms.load(tmp_path / "small.pt").eval()
        assert difference(model, small, x) == 0
        assert difference(model, silenced(graph.model, masks), x) < 1e-9


def test_folding_on_random_networks_without_a_border():
    """1×1 kernels have no border: the constants of the removed channels are carried on exactly."""
    mattered = tried = 0
    for seed in range(RANDOM):
        model, x = drawn(seed, kernels=(1,))
        if any(3 in m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)):
            continue
        tried += 1
        graph = ms.ChannelGraph(model, x)
        masks = half(graph, residual=seed % 2 == 1, seed=seed)
        wanted = ms.zero_masked(graph, masks, keep_bias=True)
        folded = ms.prune(graph, masks, fold_bias=True)
        # constants are float32
        assert difference(folded, wanted, x) < 1e-6, f"seed {seed}: {model}"
        mattered += difference(ms.prune(graph, masks), wanted, x) > 1e-3
    assert mattered > tried / 4


if __name__ == "__main__":
    print("| network | groups that can be cut | MACs left with half of them gone | what stays |")
    print("|---|---|---|---|")
    for name in NAMES:
        print(row(name))
