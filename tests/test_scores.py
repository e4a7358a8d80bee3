"""Importance scores, against what they are said to be: counted by hand, or measured on outputs."""

import pytest
import torch
from torch import nn

import mslib as ms

from .conftest import lively
from .cutting import Net, cbr, image

X = torch.zeros(1, 3, 16, 16)


def test_gammas_are_absolute_values_of_all_or_of_what_can_be_cut():
    model = lively(ms.resnet(8))
    with torch.no_grad():
        model.stage2[0].bn1.weight[3] = -0.7
    every = ms.gammas(model)  # without an example: every BatchNorm
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert [*every] == norms
    inner = ms.gammas(model, X)
    assert [*inner] == [f"stage{i}.0.bn1" for i in (1, 2, 3)]
    assert inner["stage2.0.bn1"][3] == pytest.approx(0.7)
    assert {*ms.gammas(model, X, residual=True)} == {*norms}
    for name, score in ms.gammas(model, X, residual=True).items():
        assert torch.equal(score, model.get_submodule(name).weight.detach().abs())
        assert torch.equal(score, every[name])


def test_filter_norms_are_the_mean_size_of_the_filter_before_the_batchnorm():
    model = lively(ms.resnet(8))
    scores = ms.filter_norms(model, X, residual=True)
    assert len(scores) == 7
    for name, score in scores.items():
        conv = model.get_submodule("conv" if name == "bn" else name.replace("bn", "conv"))
        assert torch.allclose(score, torch.stack([f.abs().mean() for f in conv.weight]))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_filter_norms_of_grouped_and_transposed_convolutions(groups, transposed):
    """The filter of a channel is what the channel changes by: its gradient tells which weights."""
    make = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = make(8, 12, 3, groups=groups)
    model = lively(nn.Sequential(*cbr(3, 8), conv, nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)))
    score = ms.filter_norms(model, X)["4"]
    for i in range(12):
        (used,) = torch.autograd.grad(conv(torch.ones(1, 8, 9, 9))[0, i].sum(), conv.weight)
        assert score[i].item() == pytest.approx(
            conv.weight[used != 0].abs().mean().item(), rel=1e-5
        )


def test_outgoing_norms_are_gamma_times_what_the_block_does_with_the_channel():
    model = lively(ms.resnet(8))
    scores = ms.outgoing_norms(model, X)
    for stage in ("stage1", "stage2", "stage3"):
        block = model.get_submodule(stage)[0]
        passed = block.bn2.weight.abs() / (block.bn2.running_var + 1e-5).sqrt()  # [out]
        sent = passed[:, None] * block.conv2.weight.abs().sum((2, 3))  # [out, in]
        wanted = block.bn1.weight.abs() * sent.mean(0)
        assert torch.allclose(scores[f"{stage}.0.bn1"], wanted, rtol=1e-4)


@pytest.mark.parametrize("reader", ["linear", "grouped", "transposed", "grouped transposed"])
def test_outgoing_norms_of_other_readers(reader):
    """The weights that read a channel, summed over the kernel and averaged over the outputs."""
    conv = {
        "linear": nn.Linear(8, 4),
        "grouped": nn.Conv2d(8, 4, 3, groups=2),
        "transposed": nn.ConvTranspose2d(8, 4, 3),
        "grouped transposed": nn.ConvTranspose2d(8, 4, 3, groups=2),
    }[reader]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if reader == "linear" else []
    model = lively(nn.Sequential(*cbr(3, 8), *pool, conv))
    score, gamma = ms.outgoing_norms(model, X)["1"], model[1].weight.abs()
    size = conv.weight.detach().abs()
    if "transposed" in reader:
        wanted = size.sum((1, 2, 3)) / 4
    elif reader == "grouped":  # [2 groups, 2 outputs, 4 inputs, …]
        wanted = size.reshape(2, 2, 4, -1).sum((1, 3)).flatten() / 4
    else:
        wanted = size.mean(0)
    if "grouped" in reader:  # the same places of both groups go together, and count together
        wanted = wanted + wanted.roll(4)
    assert torch.allclose(score, gamma * wanted, rtol=1e-5)


def test_outgoing_norms_add_up_over_all_readers():
    model = Net(
        lambda net, x: net.a(y := net.stem(x)) + net.b(y),
        stem=cbr(3, 8),
        a=nn.Conv2d(8, 4, 1),
        b=nn.Conv2d(8, 4, 1),
    )
    lively(model)
    wanted = (model.a.weight.abs() + model.b.weight.abs()).mean(0).flatten()
    score = ms.outgoing_norms(model, X)["stem.1"]
    assert torch.allclose(score, wanted * model.stem[1].weight.abs(), rtol=1e-5)


def test_scaled_weight_norms_are_what_a_weight_adds_in_evaluation():
    model = lively(ms.resnet(8))
    norms = ms.weight_norms(model, X, scaled=True)
    assert set(norms) == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    # inside the block, bn2(conv2(x)) is linear in each weight
    block, x = model.stage2[0], torch.randn(2, 32, 4, 4)
    with torch.no_grad():
        before = block.bn2(block.conv2(x))
        weight = block.conv2.weight[5, 7, 1, 1]
        weight.add_(weight.clone())  # twice itself: its part once more
        added = block.bn2(block.conv2(x)) - before
    part = norms["stage2.0.conv2"][5, 7, 1, 1] * x[:, 7].abs()
    assert torch.allclose(added[:, 5].abs(), part, atol=1e-5)
    assert added.abs().sum((0, 2, 3)).nonzero().flatten().tolist() == [5]


def test_scores_are_on_the_cpu_in_float32_without_gradients():
    model, x = lively(ms.resnet(8)).double(), image(1, 3, 16, 16)
    for function in (ms.gammas, ms.filter_norms, ms.outgoing_norms, ms.weight_norms):
        for score in function(model, x).values():
            assert score.dtype == torch.float32 and not score.requires_grad


class Own(nn.Module):
    """A convolution of one's own, transposed or not, in no class of PyTorch's."""

    def __init__(self, function, shape):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x):
        return self.function(x, self.weight)


KINDS = [
    (nn.functional.conv2d, (10, 8, 3, 3), nn.Conv2d(8, 10, 3, bias=False)),
    (nn.functional.conv_transpose2d, (8, 10, 3, 3), nn.ConvTranspose2d(8, 10, 3, bias=False)),
    (nn.functional.conv_transpose2d, (8, 8, 3, 3), nn.ConvTranspose2d(8, 8, 3, bias=False)),
]


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("function, shape, usual", KINDS)
def test_scores_do_not_ask_for_the_class_of_a_layer(function, shape, usual, bare):
    """bare: the weight is no module's `weight`, as where a forward uses it by a function."""
    n = usual.out_channels
    parts = dict(stem=cbr(3, 8), norm=nn.BatchNorm2d(n), out=nn.Conv2d(n, 2, 1))
    model = lively(
        Net(lambda net, x: net.out(net.norm(net.mid(net.stem(x))).relu()), mid=usual, **parts)
    )
    if bare:
        own = Net(
            lambda net, x: net.out(net.norm(function(net.stem(x), net.mid)).relu()),
            mid=nn.Parameter(usual.weight.detach().clone()),
            **parts,
        ).eval()
    else:
        layer = Own(function, shape)
        layer.weight.data.copy_(usual.weight)
        own = Net(model.run, mid=layer, **parts).eval()
    x = image(1, 3, 8, 8).float()
    assert torch.equal(own(x), model(x))
    for score in (ms.filter_norms, ms.fpgm_scores, ms.outgoing_norms, ms.lamp_scores):
        found, wanted = score(own, x), score(model, x)
        assert {*found} == {*wanted} == {"stem.1", "norm"}
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), score.__name__


def test_a_depthwise_layer_called_twice_is_scored_by_its_own_filters():
    model = Net(
        lambda net, x: net.out(net.norm(net.deep(net.a(x)) + net.deep(net.b(x)))),
        a=cbr(3, 8),
        b=cbr(3, 8),
        deep=nn.Conv2d(8, 8, 3, groups=8),
        norm=nn.BatchNorm2d(8),
        out=nn.Conv2d(8, 2, 1),
    )
    graph = ms.ChannelGraph(lively(model), X)
    wanted = model.deep.weight.detach().flatten(1)
    assert torch.equal(ms.pruning.scores.filters(graph, "deep"), wanted)


def test_scores_and_masks_do_not_depend_on_the_default_dtype():
    model = lively(ms.resnet(8))
    makers = ms.outgoing_norms, ms.lamp_scores, ms.masks_below, ms.masks_for_macs
    makers += (ms.masks_for_ratio, lambda *args: ms.ranked_scores(args[0], ms.gammas(*args), X))
    wanted = [maker(model, X) for maker in makers]
    torch.set_default_dtype(torch.float64)
    try:
        found = [maker(model, X) for maker in makers]
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, wanted):
        assert all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in b)
