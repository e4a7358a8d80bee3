import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import nn
from torch.nn import functional as F

import mslib as ms
from mslib.pruning import surgery

from .conftest import lively
from .cutting import difference


def random_masks(graph, seed, residual, keep=0.6):
    """Random masks that agree within each group of shared channels."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        n: torch.rand(len(g), generator=generator)
        for n, g in ms.gammas(graph, residual=residual).items()
    }
    return ms.masks_for_macs(graph, None, 1 - keep, residual, scores)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("depth, seed", [(8, 0), (20, 1), (32, 2)])
def test_pruned_equals_zero_masked(depth, seed, residual):
    model = lively(ms.resnet(depth), seed)
    x = torch.randn(2, 3, 32, 32)
    graph = ms.ChannelGraph(model, x)
    masks = random_masks(graph, seed, residual)
    small = ms.prune(graph, masks)
    assert ms.cost(small, x).macs < 0.7 * ms.cost(model, x).macs
    assert difference(small, ms.zero_masked(model, masks, x), x) < 1e-5


def test_torch_pruning_makes_the_same_network():
    """torchvision's networks: tests/test_networks.py."""
    model, x = lively(ms.resnet(20)), torch.randn(1, 3, 32, 32)
    channels = ms.ChannelGraph(model, x)
    masks = random_masks(channels, 5, False, keep=0.75)
    ours = ms.prune(channels, masks)
    # torch-pruning cuts the network in which the same channels are silent, group by group
    theirs = ms.zero_masked(channels, masks)
    graph = tp.DependencyGraph().build_dependency(theirs, example_inputs=x)
    modules, done = dict(theirs.named_modules()), set()
    for group in ms.channel_groups(channels):
        norm = group.norms[0] if group.norms else None
        if norm in masks and norm not in done and not masks[norm].all():
            done.update(group.norms)
            gone = (~masks[norm]).nonzero().flatten().tolist()
            writer, cut = modules[group.writers[0]], tp.prune_conv_out_channels
            graph.get_pruning_group(writer, cut, idxs=gone).prune()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert ms.cost(ours, x).macs == ms.cost(theirs, x).macs
    assert difference(ours, theirs, x) < 1e-5


class Unpadded(nn.Module):
    """No padding, hence no border: folding must be exact. The pixels enter the classifier."""

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
    gamma_only = ms.zero_masked(model, masks, x, keep_bias=True)
    assert difference(ms.prune(model, masks, x, fold_bias=True), gamma_only, x) < 1e-5
    assert difference(ms.prune(model, masks, x), gamma_only, x) > 1e-2  # the shifts did matter


@pytest.mark.parametrize("conv, norm", [("a", "a"), ("a", "b"), ("b", "a")])
def test_fold_bias_is_exact_where_a_layer_is_called_twice(conv, norm):
    """The second calls are of convolution `conv` and BatchNorm `norm`; the first, of "a"."""

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
    gamma_only = ms.zero_masked(model, masks, x, keep_bias=True)
    assert difference(ms.prune(model, masks, x, fold_bias=True), gamma_only, x) < 1e-5
    carried = difference(ms.prune(model, masks, x), gamma_only, x)
    assert (
        carried > 1e-3 if conv == "b" else carried == 0
    )  # one that reads two constants can carry neither


@pytest.mark.parametrize("residual", [False, True])
def test_fold_bias_is_exact_in_the_middle_of_a_large_image(residual):
    """Only the border differs: the features of the middle pixels agree."""
    model, x = lively(ms.resnet(8)), torch.randn(1, 3, 64, 64)
    graph = ms.ChannelGraph(model, x)
    masks = random_masks(graph, 1, residual)
    folded, gamma_only, plain = (
        ms.prune(graph, masks, fold_bias=True),
        ms.zero_masked(graph, masks, keep_bias=True),
        ms.prune(graph, masks),
    )
    seen = {}
    for key, net in {"folded": folded, "full": gamma_only, "plain": plain}.items():
        net.eval().stage3.register_forward_hook(
            lambda m, i, out, key=key: seen.update({key: out.detach()})
        )
        net(x)
    kept = ~graph.dropped(masks)[graph.norms["stage3.0.bn2"]]
    middle = (slice(None), slice(None), slice(7, 9), slice(7, 9))
    full = seen["full"][:, kept][middle]
    assert float((seen["folded"][middle] - full).abs().max()) < 1e-4 * float(full.abs().max())
    assert float((seen["plain"][middle] - full).abs().max()) > 1e-2 * float(full.abs().max())


@pytest.mark.parametrize("fold", [False, True])
def test_a_cut_that_differs_on_the_example_is_refused(fold, monkeypatch):
    """Whatever goes wrong while cutting: here, the last bias."""
    model, x = lively(ms.resnet(8)), torch.randn(2, 3, 32, 32)
    masks = {"stage1.0.bn1": torch.arange(16) < 4}

    def spoiled(small):
        with torch.no_grad():
            small.fc.bias[3] += 0.1
        return small

    monkeypatch.setattr(surgery, "sync_widths", spoiled)
    with pytest.raises(ValueError, match="the pruned network differs from the masked one by 0.1"):
        ms.prune(model, masks, x, fold_bias=fold)


def test_a_folding_that_differs_is_refused(monkeypatch):
    """Also of a network that pads: it is compared where there is no border."""
    model, x = lively(ms.resnet(8)), torch.randn(2, 3, 32, 32)
    masks = {"stage1.0.bn1": torch.arange(16) < 4}
    ms.prune(model, masks, x, fold_bias=True)
    monkeypatch.setattr(surgery, "_fold", lambda *_: None)
    with pytest.raises(ValueError, match="the pruned network differs from the masked one by"):
        ms.prune(model, masks, x, fold_bias=True)


class Padding(nn.Module):
    """All ways in which zeros come around an image."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8)
        self.around, self.pool = nn.ZeroPad2d((1, 0, 2, 1)), nn.AvgPool2d(3, 2, 1)
        self.conv = nn.Conv2d(8, 6, (3, 1), padding=(2, 0), stride=2)
        self.out = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        return self.out(self.conv(self.pool(F.pad(self.around(x), (2, 1)))))


def test_folding_is_compared_whatever_pads_with_zeros():
    model, x = lively(Padding()).double(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    masks = {"bn": torch.arange(8) % 3 > 0}
    folded = ms.prune(model, masks, x, fold_bias=True)  # refused if any of them made a border
    constant = ms.zero_masked(model, masks, x, keep_bias=True)
    assert difference(ms.prune(model, masks, x), constant, x) > 1e-3  # the constants do matter
    with surgery._Borderless():
        assert difference(folded, constant, x) < 1e-9


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_network_that_has_diverged_is_refused(value):
    model, x = lively(ms.resnet(8)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model.fc.bias += value
    with pytest.raises(ValueError, match="not finite, before any cut"):
        ms.prune(model, {"stage1.0.bn1": torch.arange(16) < 4}, x)


def test_a_cut_that_does_not_run_in_training_mode_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.out = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.bn(self.conv(x)).relu()
            return self.out(x + torch.zeros(1, 8, 1, 1) if self.training else x)

    model, x = lively(Odd()), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="does not run in training mode: The size of tensor a"):
        ms.prune(model, {"bn": torch.arange(8) > 2}, x)


def test_original_is_untouched_and_small_trains():
    model, x = lively(ms.resnet(8)), torch.zeros(2, 3, 16, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = ms.ChannelGraph(model, x)
    small = ms.prune(graph, random_masks(graph, 0, True), fold_bias=True)
    small.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_pruning_again_and_pruning_nothing():
    model, x = lively(ms.resnet(20)), torch.randn(2, 3, 32, 32)
    graph = ms.ChannelGraph(model, x)
    once = ms.prune(graph, random_masks(graph, 0, False, 0.8))
    again = ms.ChannelGraph(once, x)
    masks = random_masks(again, 1, True, 0.8)
    assert difference(ms.prune(again, masks), ms.zero_masked(again, masks), x) < 1e-5
    assert difference(ms.prune(model, {}, x), model, x) == 0


@pytest.mark.parametrize(
    "masks, message",
    [
        ({"stage1.0.bn3": torch.ones(16, dtype=torch.bool)}, "stage1.0.bn1|stage1.0.bn2"),
        ({"stage1.0.bn1": torch.ones(15, dtype=torch.bool)}, r"shape \[15\]; the layer has \[16\]"),
        ({"stage1.0.bn1": torch.ones(16)}, "torch.float32; expected a bool"),
        ({"stage1.0.bn1": [True] * 16}, "list; expected a bool"),
        ({"stage1.0.bn1": torch.zeros(16, dtype=torch.bool)}, "keeps no channel"),
    ],
)
def test_bad_masks_are_named(masks, message):
    model, x = ms.resnet(8), torch.zeros(2, 3, 16, 16)
    for function in (
        lambda: ms.prune(model, masks, x),
        lambda: ms.zero_masked(model, masks, x),
    ):
        with pytest.raises(ValueError, match=message):
            function()


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
    graph = ms.ChannelGraph(model, x)
    masks = ms.masks_for_ratio(graph, reduction=0.5)
    assert list(masks) == ["3"] and "is no BatchNorm with γ" in ms.channel_groups(graph)[0].reason
    assert ms.prune(graph, masks, fold_bias=True)[2].out_channels == 4
    assert ms.outgoing_norms(graph).keys() == ms.filter_norms(graph).keys() == {"3"}
    assert "2" in ms.weight_norms(graph, scaled=True)


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
    assert difference(ms.prune(model, masks, x), ms.zero_masked(model, masks, x), x) < 1e-5
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


def test_an_example_of_zeros_is_compared_on_noise_too(monkeypatch):
    model, x = lively(ms.resnet(8)), torch.zeros(2, 3, 32, 32)
    masks, state = {"stage1.0.bn1": torch.arange(16) < 4}, torch.get_rng_state()
    ms.prune(model, masks, x)
    assert torch.equal(state, torch.get_rng_state())
    model.register_forward_pre_hook(_refuse_all_but_zeros)  # which is no fault of the cut
    ms.prune(model, masks, x)
    model._forward_pre_hooks.clear()

    def spoiled(small):  # of zeros it makes zeros, as before
        with torch.no_grad():
            small.conv.weight *= 2
        return small

    monkeypatch.setattr(surgery, "sync_widths", spoiled)
    with pytest.raises(ValueError, match="the pruned network differs from the masked one"):
        ms.prune(model, masks, x)


def _refuse_all_but_zeros(module, inputs):
    if not inputs[0].is_meta and inputs[0].any():
        raise RuntimeError("zeros only")


class InPlace(nn.Sequential):
    """Normalizes the images that it is given where they lie."""

    def forward(self, x):
        return super().forward(x.sub_(0.5).div_(0.25))


def test_a_forward_may_work_in_place_on_its_input():
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model, x = lively(InPlace(*layers, nn.Linear(8, 3))), torch.rand(4, 3, 8, 8)
    given, masks = x.clone(), {"1": torch.arange(8) < 4}
    small = ms.prune(model, masks, given)
    assert difference(small, ms.zero_masked(model, masks, given), given) < 1e-5
    loader = [(given, torch.arange(4) % 3)]
    ms.taylor_scores(model, loader, given), ms.hrank_scores(model, loader, given)
    assert torch.equal(given, x)


class Bare(nn.Module):
    """A convolution that knows of no bias."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.weight)


@pytest.mark.parametrize("behind", [[], [nn.BatchNorm2d(8)]])
def test_fold_bias_into_a_layer_that_has_no_bias(behind):
    """Into the BatchNorm behind it; without one the constant is dropped, as behind a gate."""
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Bare(), *behind))
    masks, x = {"1": torch.arange(8) < 4}, torch.randn(2, 3, 8, 8)
    small = ms.prune(model, masks, x, fold_bias=True)
    assert difference(small, ms.zero_masked(model, masks, x, keep_bias=True), x) < 1e-5
    carried = difference(small, ms.zero_masked(model, masks, x), x)
    assert (carried > 1e-2) == bool(behind)
