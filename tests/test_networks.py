"""Any network: torchvision's, and hundreds of random ones. Pruned equals masked, or stays whole and says why.

`python -m tests.test_networks` prints the README's table of what works.
"""

import re

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import nn

import mslib as ms
from mslib.files import ROOT
from mslib.networks import resize

from .conftest import lively

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
SIDE = {"inception_v3": 96, "maxvit_t": 224, "vit_b_16": 224}


def network(name):
    """(network in float64 with random BatchNorms, image). VGG and AlexNet with narrow linear layers, to save memory."""
    kwargs = {
        "googlenet": {"init_weights": True, "aux_logits": False},
        "inception_v3": {"init_weights": False},
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
    return lively(model).double(), torch.randn(1, 3, side, side, dtype=torch.float64)


def half(model, residual, seed=0):
    """Masks that drop each free channel, with those that go with it, by the toss of a coin."""
    graph = ms.ChannelGraph(model)
    coin = torch.rand(len(graph.root), generator=torch.Generator().manual_seed(seed))
    scores = {name: coin[graph.root[graph.norms[name]]] for name in graph.prunable_norms(residual)}
    return ms.masks._with_floor(
        graph, {name: s > 0.5 for name, s in scores.items()}, scores, tell=False
    )


def difference(a, b, x):
    with torch.no_grad():
        return float((a(x) - b(x)).abs().max() / b(x).abs().max())


def row(name):
    """The network's line in the README: groups of channels that can be cut, MACs left with half of them gone, what stays."""
    model, x = network(name)
    groups = ms.channel_groups(model)
    free = [g for g in groups if g.norms and not g.reason]
    masks = half(model, True)
    left = (
        f"{100 * ms.cost(ms.prune(model, masks), x).macs / ms.cost(model, x).macs:.0f} %"
        if masks
        else "all"
    )
    why = {}
    for g in groups:
        if g not in free:
            entered = re.search(r"it enters '(\w+)'", g.reason)
            why[
                "the outputs"
                if "output of" in g.reason
                else f"what enters {entered[1]}"
                if entered
                else "what no BatchNorm scales"
                if "before any" in g.reason or not g.norms
                else "what is behind"
            ] = None
    return f"| {name} | {len(free)} of {len(groups)} | {left} | {', '.join(why)} |"


@pytest.mark.parametrize("name", NAMES)
def test_readme_says_what_works(name):
    line = row(name)
    assert (name in WHOLE) == ("| all |" in line)
    assert line in (ROOT / "README.md").read_text().splitlines(), (
        f"`python -m tests.test_networks` prints: {line}"
    )


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in WHOLE])
def test_pruned_equals_masked(name, residual):
    model, x = network(name)
    masks = half(model, residual)
    small = ms.prune(model, masks)
    assert ms.cost(small, x).macs < 0.9 * ms.cost(model, x).macs
    assert difference(small, ms.zero_masked(model, masks), x) < 1e-9
    assert difference(resize(model, small.state_dict()), small, x) == 0  # as `load` builds it again


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in WHOLE | {"shufflenet_v2_x1_0"}]
)  # whose graph it cannot build
def test_torch_pruning_makes_the_same_network(name):
    model, x = network(name)
    masks = half(model, True)
    ours, theirs, graph = (
        ms.prune(model, masks),
        ms.zero_masked(model, masks),
        ms.ChannelGraph(model),
    )
    drop, modules = graph.dropped(masks), dict(theirs.named_modules())
    dependencies = tp.DependencyGraph().build_dependency(theirs, example_inputs=x)
    for writer, ids in graph.outputs.items():
        layer, gone = modules[writer], drop[ids].nonzero().flatten().tolist()
        width = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        if gone and width == len(ids):  # not yet cut together with another
            prune = (
                tp.prune_linear_out_channels
                if isinstance(layer, nn.Linear)
                else tp.prune_conv_out_channels
            )
            if isinstance(layer, nn.Conv2d) and layer.groups == layer.out_channels > 1:
                prune = tp.prune_depthwise_conv_out_channels
            dependencies.get_pruning_group(layer, prune, idxs=gone).prune()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert ms.cost(ours, x).macs == ms.cost(theirs, x).macs
    assert difference(ours, theirs, x) < 1e-9


def test_resnet50_costs_what_its_kept_widths_say():
    """By masks in torchvision's names, residual spaces included, at 224²: counted by hand from the kept channels."""
    model = lively(torchvision.models.resnet50(weights=None))
    masks = half(model, True)
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
    assert ms.cost(ms.prune(model, masks), torch.zeros(1, 3, 224, 224)).macs == total < 3.3e9


# ---- random networks -----------------------------------------------------------------------------------------------


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


class Draw:
    """A small random network from the layers that mslib follows; everything follows from the seed."""

    def __init__(self, seed, kernels=(1, 3)):
        self.random, self.kernels = torch.Generator().manual_seed(seed), kernels
        torch.manual_seed(seed)
        layers, width = [*self.convolution(3, 8), nn.ReLU()], 8
        for _ in range(4):
            block, width = self.block(width)
            layers += block
        pixels = self.one(1, 4)
        layers += [nn.AdaptiveAvgPool2d(pixels), nn.Flatten()]
        width *= pixels**2
        if self.one(0, 1):
            layers += [nn.Linear(width, 12), nn.BatchNorm1d(12), nn.ReLU()]
            width = 12
        self.model = lively(nn.Sequential(*layers, nn.Linear(width, 4)), seed).double()
        for m in self.model.modules():
            if isinstance(m, nn.BatchNorm1d):
                nn.init.normal_(m.bias)
                nn.init.uniform_(m.running_var, 0.5, 1.5)

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


def test_random_networks():
    """Pruned equals masked, every time; so do the shapes that `resize` gives a fresh network."""
    cut = 0
    for seed in range(300):
        model, x = (
            Draw(seed).model,
            torch.randn(
                2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
            ),
        )
        masks = half(model, residual=seed % 2 == 1, seed=seed)
        small = ms.prune(model, masks)
        cut += sum(p.numel() for p in small.parameters()) < sum(
            p.numel() for p in model.parameters()
        )
        assert difference(small, ms.zero_masked(model, masks), x) < 1e-9, f"seed {seed}: {model}"
        assert difference(resize(model, small.state_dict()), small, x) == 0, f"seed {seed}"
    assert cut > 280


def test_folding_on_random_networks_without_a_border():
    """1×1 kernels have no border: the constants of the removed channels are carried on exactly."""
    mattered = 0
    for seed in range(200):
        model, x = Draw(seed, kernels=(1,)).model, torch.randn(2, 3, 8, 8, dtype=torch.float64)
        if any(m.kernel_size == (3, 3) for m in model.modules() if isinstance(m, nn.Conv2d)):
            continue
        masks = half(model, residual=seed % 2 == 1, seed=seed)
        gamma_only = ms.zero_masked(model, masks, keep_bias=True)
        assert difference(ms.prune(model, masks, fold_bias=True), gamma_only, x) < 1e-6, (
            f"seed {seed}: {model}"
        )  # constants are float32
        mattered += difference(ms.prune(model, masks), gamma_only, x) > 1e-3
    assert mattered > 50


if __name__ == "__main__":
    print(
        "\n".join(
            [
                "| network | groups that can be cut | MACs left with half of them gone | what stays whole |",
                "|---|---|---|---|",
                *map(row, NAMES),
            ]
        )
    )
