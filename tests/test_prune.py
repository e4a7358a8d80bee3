import sys

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import nn
from torch.nn import functional as F

import mslib as ms

from .conftest import lively


def random_masks(model, seed, residual, keep=0.6):
    """Random masks that agree within each group of shared channels."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        n: torch.rand(len(g), generator=generator) for n, g in ms.gammas(model, residual).items()
    }
    return ms.masks_for_macs(model, torch.zeros(1, 3, 32, 32), 1 - keep, residual, scores)


def difference(a, b, x):
    with torch.no_grad():
        return float((a.eval()(x) - b.eval()(x)).abs().max() / b(x).abs().max())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("depth, seed", [(8, 0), (20, 1), (20, 2), (56, 3), (110, 4)])
def test_pruned_equals_zero_masked(depth, seed, residual):
    model = lively(ms.resnet(depth), seed)
    masks = random_masks(model, seed, residual)
    x = torch.randn(2, 3, 32, 32)
    small = ms.prune(model, masks, x)
    assert ms.cost(small, x).macs < 0.7 * ms.cost(model, x).macs
    assert difference(small, ms.zero_masked(model, masks), x) < 1e-5


@pytest.mark.parametrize("depth", [20, 56])
def test_torch_pruning_makes_the_same_network(depth):
    """torchvision's networks: tests/test_networks.py."""
    model, x = lively(ms.resnet(depth)), torch.randn(1, 3, 32, 32)
    masks = random_masks(model, 5, False, keep=0.75)
    ours = ms.prune(model, masks)
    # torch-pruning cuts the network in which the same channels are silent, group by group, starting at each convolution
    theirs = ms.zero_masked(model, masks)
    graph = tp.DependencyGraph().build_dependency(theirs, example_inputs=x)
    modules, done = dict(theirs.named_modules()), set()
    for group in ms.channel_groups(model):
        norm = group.norms[0] if group.norms else None
        if norm in masks and norm not in done and not masks[norm].all():
            done.update(group.norms)
            gone = (~masks[norm]).nonzero().flatten().tolist()
            graph.get_pruning_group(
                modules[group.writers[0]], tp.prune_conv_out_channels, idxs=gone
            ).prune()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert ms.cost(ours, x).macs == ms.cost(theirs, x).macs
    assert difference(ours, theirs, x) < 1e-5


class Unpadded(nn.Module):
    """No padding, hence no border: folding must be exact. Flattened with its pixels into the classifier."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, bias=True), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5 * 16, 4)

    def forward(self, x):
        x = F.leaky_relu(self.bn1(self.conv1(x)), 0.3)
        x = F.silu(self.bn2(self.conv2(x)))
        x = F.max_pool2d(self.bn3(self.conv3(x)).relu(), 2)
        return self.fc(torch.flatten(x, 1))


def test_fold_bias_is_exact_without_a_border():
    model, x = lively(Unpadded()), torch.randn(3, 3, 12, 12)
    masks = {
        "bn1": torch.arange(8) % 3 > 0,
        "bn2": torch.arange(6) > 1,
        "bn3": torch.arange(5) != 2,
    }
    gamma_only = ms.zero_masked(model, masks, keep_bias=True)
    assert difference(ms.prune(model, masks, x, fold_bias=True), gamma_only, x) < 1e-5
    assert difference(ms.prune(model, masks, x), gamma_only, x) > 1e-2  # the shifts did matter


@pytest.mark.parametrize("conv, norm", [("a", "a"), ("a", "b"), ("b", "a")])
def test_fold_bias_is_exact_where_a_layer_is_called_twice(conv, norm):
    """The second calls are of convolution `conv` and BatchNorm `norm`: the first ones' own are "a"."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.bn1, self.bn2 = (
                nn.Conv2d(3, 6, 1),
                nn.BatchNorm2d(6),
                nn.BatchNorm2d(6),
            )
            self.conv = nn.ModuleDict({key: nn.Conv2d(6, 6, 1, bias=False) for key in {"a", conv}})
            self.norm = nn.ModuleDict({key: nn.BatchNorm2d(6) for key in {"a", norm}})
            self.last = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            x = self.bn1(self.first(x)).relu()
            x = self.bn2(self.norm["a"](self.conv["a"](x))).relu()
            return self.last(self.norm[norm](self.conv[conv](x)).relu())

    model, x = lively(Twice()), torch.randn(2, 3, 8, 8)
    keep = torch.arange(6) != 2
    masks = dict.fromkeys(
        [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)], keep
    )
    gamma_only = ms.zero_masked(model, masks, keep_bias=True)
    assert difference(ms.prune(model, masks, x, fold_bias=True), gamma_only, x) < 1e-5
    carried = difference(ms.prune(model, masks, x), gamma_only, x)
    assert (
        carried > 1e-3 if conv == "b" else carried == 0
    )  # one that reads two constants can carry neither


@pytest.mark.parametrize("residual", [False, True])
def test_fold_bias_is_exact_in_the_middle_of_a_large_image(residual):
    """Only the border differs: the features of the middle pixels of a constant-free path agree."""
    model, x = lively(ms.resnet(8)), torch.randn(1, 3, 64, 64)
    masks = random_masks(model, 1, residual)
    folded, gamma_only, plain = (
        ms.prune(model, masks, fold_bias=True),
        ms.zero_masked(model, masks, keep_bias=True),
        ms.prune(model, masks),
    )
    seen = {}
    for key, net in {"folded": folded, "full": gamma_only, "plain": plain}.items():
        net.eval().stage3.register_forward_hook(
            lambda m, i, out, key=key: seen.update({key: out.detach()})
        )
        net(x)
    kept = ~ms.ChannelGraph(model).dropped(masks)[ms.ChannelGraph(model).norms["stage3.0.bn2"]]
    middle = (slice(None), slice(None), slice(7, 9), slice(7, 9))
    full = seen["full"][:, kept][middle]
    assert float((seen["folded"][middle] - full).abs().max()) < 1e-4 * float(full.abs().max())
    assert float((seen["plain"][middle] - full).abs().max()) > 1e-2 * float(full.abs().max())


def test_a_cut_that_differs_on_the_example_is_refused(monkeypatch):
    model, x = lively(ms.resnet(8)), torch.randn(2, 3, 32, 32)
    monkeypatch.setattr(
        sys.modules["mslib.pruning.surgery"], "zero_masked", lambda model, masks: model
    )
    for fold in (False, True):
        with pytest.raises(ValueError, match="the pruned network differs from the masked one by"):
            ms.prune(model, {"stage1.0.bn1": torch.arange(16) < 4}, x, fold_bias=fold)
    with torch.no_grad():
        model.fc.bias += torch.inf
    with pytest.raises(ValueError, match="not finite, before any cut"):
        ms.prune(model, {"stage1.0.bn1": torch.arange(16) < 4}, x)


def test_original_is_untouched_and_small_trains():
    model = lively(ms.resnet(8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small = ms.prune(model, random_masks(model, 0, True), fold_bias=True)
    small.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_pruning_again_and_pruning_nothing():
    model, x = lively(ms.resnet(20)), torch.randn(2, 3, 32, 32)
    once = ms.prune(model, random_masks(model, 0, False, 0.8))
    masks = random_masks(once, 1, True, 0.8)
    assert difference(ms.prune(once, masks), ms.zero_masked(once, masks), x) < 1e-5
    assert difference(ms.prune(model, {}), model, x) == 0


@pytest.mark.parametrize(
    "masks, message",
    [
        ({"stage1.0.bn3": torch.ones(16, dtype=torch.bool)}, "stage1.0.bn1|stage1.0.bn2"),
        ({"stage1.0.bn1": torch.ones(15, dtype=torch.bool)}, r"shape \[15\]; the layer has 16"),
        ({"stage1.0.bn1": torch.ones(16)}, "torch.float32; expected a bool"),
        ({"stage1.0.bn1": [True] * 16}, "list; expected a bool"),
        ({"stage1.0.bn1": torch.zeros(16, dtype=torch.bool)}, "keeps no channel"),
    ],
)
def test_bad_masks_are_named(masks, message):
    model = ms.resnet(8)
    for function in (
        lambda: ms.prune(model, masks),
        lambda: ms.zero_masked(model, masks),
        lambda: ms.MaskedL1(model, masks, 1e-3),
    ):
        with pytest.raises(ValueError, match=message):
            function()


class Refused(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv, self.bn, self.last = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Conv2d(2 if how == "chunk" else 4, 2, 1),
        )
        self.outside = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.how == "cat":
            y = torch.cat([y, y], 2)  # below each other, not behind
        elif self.how == "chunk":
            y = y.chunk(2, 1)[0]
        elif self.how == "scale":
            y = y * self.outside
        elif self.how == "shift":
            y = y + 1
        elif self.how == "sigmoid":
            y = torch.sigmoid(y)
        elif self.how == "pad":
            y = F.pad(y, (0, 0, 0, 0, 1, 1))[:, 1:-1]
        elif self.how == "output":
            return y
        return self.last(y)


@pytest.mark.parametrize(
    "how, reason",
    [
        ("cat", "cat"),
        ("chunk", "chunk"),
        ("scale", "mul"),
        ("shift", "add"),
        ("sigmoid", "before any BatchNorm"),
        ("pad", "pad"),
        ("output", "output of the network"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(how, reason):
    model, masks = Refused(how), {"bn": torch.tensor([True, False, True, True])}
    assert reason in ms.channel_groups(model)[0].reason
    with pytest.raises(ValueError, match=reason):
        ms.prune(model, masks)
    assert ms.gammas(model) == {}
    with pytest.raises(ValueError, match="no prunable BatchNorm"):
        ms.masks_for_macs(model, torch.zeros(1, 3, 8, 8), 0.5)


@pytest.mark.parametrize("norm", [dict(affine=False), dict(track_running_stats=False)])
def test_norms_without_gammas_or_statistics_stay_whole(norm):
    class Network(nn.Sequential):
        def __init__(self):
            bare, full = nn.BatchNorm2d(8, **norm), nn.BatchNorm2d(8)
            super().__init__(
                nn.Conv2d(3, 8, 3), bare, nn.Conv2d(8, 8, 3), full, nn.ReLU(), nn.Conv2d(8, 2, 3)
            )

    model, x = Network().eval(), torch.randn(2, 3, 12, 12)
    nn.init.uniform_(model[3].weight, 0.1, 1)
    masks = ms.masks_for_ratio(model, 0.5, ms.gammas(model))
    assert list(masks) == ["3"] and "has no" in ms.channel_groups(model)[0].reason
    assert ms.prune(model, masks, x, fold_bias=True)[2].out_channels == 4
    ms.outgoing_norms(model), ms.weight_norms(model, scaled=True)


def test_a_flatten_that_leaves_the_channels_alone_is_not_cut_through():
    """nn.Flatten(2), then a linear layer: it reads the pixels of each channel, not channels."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        nn.Flatten(2),
        nn.Linear(16, 2),
    )
    model, x = lively(model), torch.randn(1, 3, 4, 4)
    assert [bool(g.reason) for g in ms.channel_groups(model)][:2] == [False, True]
    assert ms.prune(model, {"1": torch.arange(4) > 0}, x)(x).shape == (1, 4, 2)


def test_untraceable_network():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="Branching cannot be traced"):
        ms.channel_groups(Branching())


def test_a_conv_called_twice_shares_its_channels():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.first, self.bn0, self.last = (
                nn.Conv2d(3, 4, 1),
                nn.BatchNorm2d(4),
                nn.Conv2d(4, 2, 1),
            )

        def forward(self, x):
            x = self.bn0(self.first(x)).relu()
            return self.last(self.bn(self.conv(self.bn(self.conv(x)).relu())).relu())

    model, x = lively(Twice()), torch.randn(1, 3, 8, 8)
    keep = torch.tensor([True, True, False, True])
    masks = {"bn": keep, "bn0": keep}
    assert difference(ms.prune(model, masks, x), ms.zero_masked(model, masks), x) < 1e-5
    assert (
        difference(ms.prune(model, {"bn": keep}, x), model, x) == 0
    )  # bn0 keeps the channel, so nothing may go


def test_groups_print_as_a_table_and_know_their_macs():
    model = lively(torchvision.models.resnext50_32x4d(weights=None))
    x = torch.zeros(1, 3, 64, 64)
    groups = ms.channel_groups(model, x)
    inner = next(g for g in groups if g.writers == ("layer1.0.conv1",))
    assert (inner.size, inner.norms, inner.readers) == (128, ("layer1.0.bn1",), ("layer1.0.conv2",))
    assert inner.macs == 16**2 * 128 * (
        64 + 9 * 4
    )  # all of the layer that writes them, and of the grouped one that reads them
    table = groups.table()
    assert (
        len(table) == len(groups)
        and table.free.iloc[-1] == "it is an output of the network"
        and (table.free[:-1] == "yes").all()
    )
    text, page = repr(groups), groups._repr_html_()
    for word in (
        "scaled by",
        "layer4.2.bn2",
        "and 2 more",
        "it is an output of the network",
        f"{inner.macs / 1e6:.2f}",
    ):
        assert word in text and word in page, word
    assert "M MACs" not in str(ms.channel_groups(model))
