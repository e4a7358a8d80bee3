"""A small network for each thing that networks do with channels: cut exactly, whole, or refused."""

import random
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import mslib as ms

from .conftest import lively
from .cutting import Net, cbr, cut_exactly, difference, half, image, outputs, silenced, size

X = image()


def head(width, out=3):
    return nn.Conv2d(width, out, 1)


def stem_and(forward, **parts):
    """Convolution, BatchNorm and ReLU with 8 channels; then `forward(net, x)` goes on."""
    return Net(lambda net, x: forward(net, net.stem(x)), stem=cbr(3, 8), **parts)


def stem_then(*layers):
    return nn.Sequential(cbr(3, 8), *layers)


def to_last(x):
    return x.permute(0, 2, 3, 1)


def to_first(x):
    return x.permute(0, 3, 1, 2)


# ---- what is cut ----


class Swish(nn.BatchNorm2d):
    """BatchNorm and activation in one module."""

    def forward(self, x):
        return F.silu(super().forward(x))


def c2f(net, x):
    parts = list(x.chunk(2, 1))
    parts.append(net.inner(parts[-1]))
    return net.out(torch.cat(parts, 1))


def chunk_of_a_chunk(net, x):
    a, b = x.chunk(2, 1)
    c, d = b.chunk(2, 1)
    return net.out(torch.cat([a, c * d], 1))


def shuffle_by_view(net, x):  # as ShuffleNet has it
    n, c, h, w = x.shape
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
    return net.out(net.grouped(x))


def u_net(net, x):
    a = net.down1(x)
    b = net.down2(F.max_pool2d(a, 2))
    c = net.down3(F.max_pool2d(b, 2))
    b = net.up2(torch.cat([b, F.interpolate(c, scale_factor=2, mode="bilinear")], 1))
    a = net.up1(torch.cat([a, net.transposed(b)], 1))
    return net.out(torch.cat([a, x], 1))  # the image itself, too


def squeeze_and_excite(net, x, gate):
    scale = x.mean((2, 3), keepdim=True)
    return x * torch.sigmoid(net.expand(F.relu(net.reduce(scale))))


def shared_gate(net, x):
    for conv in net.blocks:
        x = x + squeeze_and_excite(net, conv(x), None)
    return net.out(x)


def spatial_gate(net, x):
    return net.out(x * torch.sigmoid(net.gate(x)))


def selective_kernels(net, x):  # Li et al. 2019
    stack = torch.stack([net.a(x), net.b(x)], 1)
    z = net.squeeze(stack.sum(1).mean((2, 3), keepdim=True))
    weights = net.select(z).view(len(x), 2, -1, 1, 1).softmax(1)
    return net.out((stack * weights).sum(1))


def split_attention(net, x):  # Zhang et al. 2020
    x = net.radix(x)
    n, c, h, w = x.shape
    splits = x.view(n, 2, c // 2, h, w)
    gap = splits.sum(1).mean((2, 3), keepdim=True)
    attention = net.fc2(net.fc1(gap)).view(n, 2, c // 2, 1, 1).softmax(1)
    return net.out((splits * attention).sum(1))


def pyramid_pooling(net, x):
    grids = [F.adaptive_avg_pool2d(x, k).flatten(1) for k in (1, 2, 4)]
    return net.fc(torch.cat(grids, 1))


def pool_pyramid(net, x):  # SPPF
    a = F.max_pool2d(x, 5, 1, 2)
    return net.out(torch.cat([x, a, F.max_pool2d(a, 5, 1, 2)], 1))


def layers_last(net, x):
    y = net.mlp(to_last(x))
    return net.out(to_first(y))


def non_local(net, x):
    q, k, v = (conv(x).flatten(2) for conv in net.qkv)
    y = torch.softmax(q.transpose(1, 2) @ k, -1) @ v.transpose(1, 2)
    y = y.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])
    return net.out(x + net.norm(net.back(y)))


def addition_in_place(net, x):
    y = net.side(x)
    y.add_(x)
    y.relu_()
    return net.out(y)


def ghost(net, x):
    y = net.primary(x)
    return net.out(torch.cat([y, net.cheap(y)], 1))


def inception(net, x):
    return net.out(
        torch.cat([net.a(x), net.b(x), F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)], 1)
    )


def leaky(net, x):
    y = net.norm(net.conv(x))
    return net.out(torch.where(y > 0, y, 0.1 * y))


def powers(net, x):
    y = net.norm(net.conv(x))
    return net.out(y**2 + torch.maximum(y, 0.5 * y) * y.abs().sqrt())


def two_heads(net, x):
    return net.out(x.flatten(2).mean(2)) + net.other(x.amax((2, 3)))


CUT = {  # name -> (network, BatchNorms whose channels are free)
    "upsample": (
        lambda: stem_then(
            nn.Upsample(scale_factor=2),
            cbr(8, 6),
            nn.Upsample(size=(20, 12), mode="bilinear"),
            nn.UpsamplingNearest2d(scale_factor=2),
            head(6),
        ),
        2,
    ),
    "interpolate": (
        lambda: stem_and(
            lambda net, x: net.out(
                F.interpolate(x, scale_factor=2)
                + F.interpolate(x, (32, 32), mode="bilinear", align_corners=True)
                + F.interpolate(x, (32, 32), mode="bicubic")
                + F.interpolate(F.interpolate(x, (5, 7), mode="area"), (32, 32))
            ),
            out=head(8),
        ),
        1,
    ),
    "transposed": (
        lambda: stem_then(nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), nn.ReLU(), head(6)),
        2,
    ),
    "transposed without bias": (
        lambda: stem_then(
            nn.ConvTranspose2d(8, 6, 3, 2, 1, 1, bias=False), nn.BatchNorm2d(6), head(6)
        ),
        2,
    ),
    "transposed grouped": (
        lambda: stem_then(
            nn.ConvTranspose2d(8, 12, 3, 2, groups=2), nn.BatchNorm2d(12), nn.ReLU(), head(12)
        ),
        2,
    ),
    "transposed depthwise": (
        lambda: stem_then(nn.ConvTranspose2d(8, 8, 2, 2, groups=8), nn.BatchNorm2d(8), head(8)),
        2,
    ),
    "transposed depthwise, times two": (
        lambda: stem_then(
            nn.ConvTranspose2d(8, 16, 2, 2, groups=8), nn.BatchNorm2d(16), nn.ReLU(), head(16)
        ),
        2,
    ),
    "transposed as the head": (lambda: stem_then(nn.ConvTranspose2d(8, 3, 4, 2, 1)), 1),
    "grouped": (
        lambda: stem_then(cbr(8, 12, groups=2), cbr(12, 12, 1, groups=3), head(12)),
        3,
    ),
    "depthwise": (lambda: stem_then(cbr(8, 8, groups=8), cbr(8, 16, groups=8), head(16)), 3),
    "chunk": (
        lambda: stem_and(
            lambda net, x: net.out(torch.mul(*x.chunk(2, 1))),
            out=head(4),
        ),
        1,
    ),
    "C2f": (lambda: stem_and(c2f, inner=cbr(4, 4), out=head(12)), 2),
    "chunk of a chunk": (lambda: stem_and(chunk_of_a_chunk, out=head(6)), 1),
    "equal split": (
        lambda: stem_and(
            lambda net, x: net.out(sum(x.split(x.shape[1] // 4, 1))),
            out=head(2),
        ),
        1,
    ),
    "tensor_split": (
        lambda: stem_and(lambda net, x: net.out(sum(x.tensor_split(2, 1))), out=head(4)),
        1,
    ),
    "unflatten and unbind": (
        lambda: stem_and(
            lambda net, x: net.out(sum(x.unflatten(1, (2, -1)).unbind(1))), out=head(4)
        ),
        1,
    ),
    "pixel shuffle": (lambda: stem_then(cbr(8, 16), nn.PixelShuffle(2), head(4)), 2),
    "pixel shuffle, functional": (
        lambda: stem_and(lambda net, x: net.out(F.pixel_shuffle(x, 2)), out=head(2)),
        1,
    ),
    "pixel unshuffle": (lambda: stem_then(nn.PixelUnshuffle(2), cbr(32, 6), head(6)), 2),
    "there and back": (lambda: stem_then(nn.PixelUnshuffle(4), nn.PixelShuffle(2), head(32)), 1),
    "channel shuffle": (
        lambda: stem_then(nn.ChannelShuffle(2), cbr(8, 8, groups=2), head(8)),
        2,
    ),
    "channel shuffle, functional": (
        lambda: stem_and(
            lambda net, x: net.out(net.more(torch.channel_shuffle(x, 4))),
            more=cbr(8, 8),
            out=head(8),
        ),
        2,
    ),
    "channel shuffle, by view": (
        lambda: stem_and(shuffle_by_view, grouped=cbr(8, 8, groups=2), out=head(8)),
        2,
    ),
    "linear, channels last": (
        lambda: stem_and(
            layers_last, mlp=nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)), out=head(8)
        ),
        1,
    ),
    "linear, channels last and back to a BatchNorm": (
        lambda: stem_and(
            layers_last,
            mlp=nn.Linear(8, 6),
            out=nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), cbr(6, 5), head(5)),
        ),
        3,
    ),
    "linear over flattened maps": (
        lambda: stem_then(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8 * 16, 3)),
        1,
    ),
    "linear with BatchNorm1d": (
        lambda: stem_then(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 6, bias=False),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.Linear(6, 3),
        ),
        2,
    ),
    "activation in the BatchNorm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Swish(8), nn.Conv2d(8, 6, 1), Swish(6), head(6)),
        2,
    ),
    "U-Net": (
        lambda: Net(
            u_net,
            down1=cbr(3, 4),
            down2=cbr(4, 6),
            down3=cbr(6, 8),
            up2=cbr(14, 6),
            transposed=nn.Sequential(nn.ConvTranspose2d(6, 4, 2, 2), nn.BatchNorm2d(4), nn.ReLU()),
            up1=cbr(8, 4),
            out=head(7),
        ),
        6,
    ),
    "squeeze and excitation": (
        lambda: stem_and(
            lambda net, x: net.out(squeeze_and_excite(net, x, None)),
            reduce=nn.Conv2d(8, 2, 1),
            expand=nn.Conv2d(2, 8, 1),
            out=head(8),
        ),
        1,
    ),
    "squeeze and excitation of torchvision": (
        lambda: stem_then(torchvision.ops.SqueezeExcitation(8, 2), head(8)),
        1,
    ),
    "shared gate": (
        lambda: stem_and(
            shared_gate,
            blocks=nn.ModuleList([cbr(8, 8), cbr(8, 8)]),
            reduce=nn.Conv2d(8, 2, 1),
            expand=nn.Conv2d(2, 8, 1),
            out=head(8),
        ),
        3,
    ),
    "spatial gate": (lambda: stem_and(spatial_gate, gate=head(8, 1), out=head(8)), 1),
    "spatial gate, expanded": (
        lambda: stem_and(
            lambda net, x: net.out(x * torch.sigmoid(net.gate(x)).expand_as(x)),
            gate=head(8, 1),
            out=head(8),
        ),
        1,
    ),
    "layer scale": (
        lambda: stem_and(
            lambda net, x: net.out(x + net.gamma * net.block(x)),
            gamma=nn.Parameter(torch.rand(8, 1, 1)),
            block=cbr(8, 8),
            out=head(8),
        ),
        2,
    ),
    "PReLU": (lambda: stem_then(nn.PReLU(8), cbr(8, 8), nn.PReLU(8), head(8)), 2),
    "selective kernels": (
        lambda: stem_and(
            selective_kernels,
            a=cbr(8, 6),
            b=cbr(8, 6, 5),
            squeeze=cbr(6, 4, 1),
            select=nn.Conv2d(4, 12, 1),
            out=head(6),
        ),
        4,
    ),
    "split attention": (
        lambda: stem_and(
            split_attention,
            radix=cbr(8, 12, groups=2),
            fc1=cbr(6, 4, 1),
            fc2=nn.Conv2d(4, 12, 1),
            out=head(6),
        ),
        3,
    ),
    "spatial pyramid": (lambda: stem_and(pyramid_pooling, fc=nn.Linear(8 * 21, 4)), 1),
    "pyramid of poolings": (lambda: stem_and(pool_pyramid, out=head(24)), 1),
    "attention over pixels": (
        lambda: stem_and(
            non_local,
            qkv=nn.ModuleList([nn.Conv2d(8, 4, 1) for _ in "qkv"]),
            back=nn.Conv2d(4, 8, 1),
            norm=nn.BatchNorm2d(8),
            out=head(8),
        ),
        2,
    ),
    "additions in place": (lambda: stem_and(addition_in_place, side=cbr(8, 8), out=head(8)), 2),
    "ghost module": (
        lambda: stem_and(ghost, primary=cbr(8, 4, 1), cheap=cbr(4, 4, groups=4), out=head(8)),
        3,
    ),
    "inception": (lambda: stem_and(inception, a=cbr(8, 4, 1), b=cbr(8, 5), out=head(17)), 3),
    "leaky by where": (
        lambda: Net(leaky, conv=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8), out=head(8)),
        1,
    ),
    "powers": (
        lambda: Net(powers, conv=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8), out=head(8)),
        1,
    ),
    "two heads": (
        lambda: stem_and(two_heads, out=nn.Linear(8, 3), other=nn.Linear(8, 3, bias=False)),
        1,
    ),
    "repeated channels": (
        lambda: stem_and(lambda net, x: net.out(x.repeat(1, 2, 1, 1)), out=head(16)),
        1,
    ),
    "channels backwards": (lambda: stem_and(lambda net, x: net.out(x.flip(1)), out=head(8)), 1),
    "tensors made in forward": (
        lambda: stem_and(
            lambda net, x: net.out(x + torch.zeros(1, 1, 16, 16) + torch.arange(16.0).view(16, 1)),
            out=head(8),
        ),
        0,
    ),
    "a mask made in forward": (
        lambda: stem_and(lambda net, x: net.out(x * torch.ones(16, 16).tril()), out=head(8)),
        1,
    ),
}


@pytest.mark.parametrize("name", CUT)
def test_cut_exactly(name):
    make, free = CUT[name]
    model = lively(make()).double()
    graph, masks, small = cut_exactly(model, X)
    assert len(masks) == free
    assert not free or size(small) < size(model)


ACTIVATIONS = [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.Mish]
ACTIVATIONS += [nn.Hardtanh, nn.Hardswish, nn.Threshold, nn.Dropout]
ONLY_NEW = [nn.GELU, nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.PReLU]
NOT_ZERO = [nn.Sigmoid, nn.Softplus]  # of zero: no γ and β can silence a channel behind them


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {"inplace": place}) for kind in ACTIVATIONS for place in (False, True)]
    + [(kind, {}) for kind in ONLY_NEW + NOT_ZERO]
    + [(nn.Hardsigmoid, {"inplace": place}) for place in (False, True)],
)
def test_channels_pass_every_activation(kind, options):
    more = (-0.5, 0.3) if kind is nn.Threshold else ()
    model = lively(nn.Sequential(*cbr(3, 8)[:2], kind(*more, **options), head(8))).double()
    graph = ms.ChannelGraph(model, image())
    if kind in (*NOT_ZERO, nn.Hardsigmoid):
        assert graph.reason("1") == "3 reads it where no BatchNorm can silence it"
    else:
        assert not graph.reason("1")
        cut_exactly(model, image(), graph=graph)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_new_layout_of_the_same_numbers_is_followed(mixed):
    def run(net, x):  # as PyTorch does behind an average over the pixels
        y = net.norm(net.conv(x)).mean((2, 3), keepdim=True)
        n, c = y.shape[:2]
        return net.out(y.as_strided_(y.shape, (1, n, 1, 1) if mixed else (c, 1, c, c)).flatten(1))

    parts = {"conv": nn.Conv2d(3, 9, 3), "norm": nn.BatchNorm2d(9), "out": nn.Linear(9, 3)}
    model = lively(Net(run, **parts)).double()
    graph = ms.ChannelGraph(model, image())
    if mixed:  # numbers of one image become those of the other
        assert "as_strided" in graph.reason("norm")
    else:
        assert not graph.reason("norm")
        cut_exactly(model, image(), graph=graph)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_numbers_of_dimensions(dims):
    conv = (None, nn.Conv1d, None, nn.Conv3d)[dims]
    norm = (None, nn.BatchNorm1d, None, nn.BatchNorm3d)[dims]
    up = (None, nn.ConvTranspose1d, None, nn.ConvTranspose3d)[dims]
    model = nn.Sequential(
        *(conv(3, 8, 3), norm(8), nn.ReLU(), conv(8, 8, 3, padding=1, groups=8), norm(8)),
        *(up(8, 6, 2, 2), norm(6), nn.GELU(), nn.Upsample(scale_factor=2), conv(6, 5, 1), norm(5)),
        *(nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(5, 2)),
    )
    _, masks, _ = cut_exactly(lively(model).double(), image(2, 3, *[9] * dims))
    assert len(masks) == 4


# ---- what stays whole ----


def view_of_a_view(net, x):
    top = x[:, :, 1:]
    top.relu_()
    return net.out(x)


def written_through(net, x):
    flat = x.flatten(2)
    x.mul_(2)
    return net.out(flat.unflatten(2, (16, 16)))


def set_pixels(net, x):
    x[:, :, 0] = 1
    return net.out(x)


def attention_over_channels(net, x):
    x = x.flatten(2)
    return net.out(torch.softmax(x @ x.transpose(1, 2), -1) @ x)


WHOLE = {  # name -> (network, what the reason says)
    "unequal split": (
        lambda: stem_and(lambda net, x: net.out(x.split([5, 3], 1)[0]), out=head(5)),
        "'split_with_sizes'",
    ),
    "split of a fixed size": (
        lambda: stem_and(lambda net, x: net.out(sum(x.split(4, 1))), out=head(4)),
        "'split'",
    ),
    "view of a fixed size": (
        lambda: stem_and(
            lambda net, x: net.fc(F.adaptive_avg_pool2d(x, 8).view(-1, 512)), fc=nn.Linear(512, 3)
        ),
        "'view'",
    ),
    "slice of a fixed size": (
        lambda: stem_and(lambda net, x: net.out(x[:, :4] * x[:, 4:]), out=head(4)),
        "'slice'",
    ),
    "every second channel": (
        lambda: stem_and(lambda net, x: net.out(x[:, ::2]), out=head(4)),
        "'slice'",
    ),
    "one channel by its number": (
        lambda: stem_and(lambda net, x: net.out(x * x[:, :1]), out=head(8)),
        "it is spread over several channels",
    ),
    "one channel, selected": (
        lambda: stem_and(lambda net, x: net.out(x * x[:, 2:3]), out=head(8)),
        "it is spread over several channels",
    ),
    "expanded to a fixed size": (
        lambda: stem_and(
            lambda net, x: net.out(x * net.gate(x).expand(-1, 8, -1, -1)),
            gate=head(8, 1),
            out=head(8),
        ),
        "counts on its number of channels",
    ),
    "an assertion of the width": (
        lambda: stem_and(
            lambda net, x: net.out(x) if x.shape[1] == 8 else x[:, :9] / 0, out=head(8)
        ),
        "counts on its number of channels",
    ),
    "rolled channels": (
        lambda: stem_and(lambda net, x: net.out(x.roll(1, 1)), out=head(8)),
        "'roll'",
    ),
    "LayerNorm over channels": (
        lambda: stem_and(
            lambda net, x: net.out(to_first(net.norm(to_last(x)))),
            norm=nn.LayerNorm(8),
            out=head(8),
        ),
        "'layer_norm'",
    ),
    "LayerNorm over everything": (
        lambda: stem_then(nn.LayerNorm([8, 16, 16]), head(8)),
        "layer_norm",
    ),
    "LayerNorm over pixels": (lambda: stem_then(nn.LayerNorm([16, 16]), head(8)), "layer_norm"),
    "GroupNorm": (lambda: stem_then(nn.GroupNorm(2, 8), head(8)), "'group_norm'"),
    "InstanceNorm": (lambda: stem_then(nn.InstanceNorm2d(8, affine=True), head(8)), "norm"),
    "local response": (lambda: stem_then(nn.LocalResponseNorm(3), head(8)), "enters"),
    "softmax over channels": (lambda: stem_then(nn.Softmax(1), head(8)), "'softmax'"),
    "mean over channels": (
        lambda: stem_and(lambda net, x: net.out(x * x.mean(1, keepdim=True)), out=head(8)),
        "'mean'",
    ),
    "maximum over channels": (
        lambda: stem_and(
            lambda net, x: net.out(x * torch.sigmoid(x.amax(1, keepdim=True))), out=head(8)
        ),
        "'amax'",
    ),
    "unit length": (
        lambda: stem_and(lambda net, x: net.out(F.normalize(x, dim=1)), out=head(8)),
        "'linalg_vector_norm'",
    ),
    "gated linear unit": (lambda: stem_then(nn.GLU(1), head(4)), "'glu'"),
    "unfold": (
        lambda: stem_and(lambda net, x: net.out(F.unfold(x, 3)[..., None]), out=head(72)),
        "'im2col'",
    ),
    "attention over channels": (
        lambda: stem_and(attention_over_channels, out=nn.Conv1d(8, 3, 1)),
        "'bmm'",
    ),
    "a view written to": (
        lambda: stem_and(view_of_a_view, out=head(8)),
        "'relu' changed it in place through another view",
    ),
    "written to before a view is read": (
        lambda: stem_and(written_through, out=head(8)),
        "'mul' changed it in place through another view",
    ),
    "pixels set": (lambda: stem_and(set_pixels, out=head(8)), "'copy'"),
    "added parameter": (
        lambda: stem_and(
            lambda net, x: net.out(x + net.position),
            position=nn.Parameter(torch.rand(1, 8, 16, 16)),
            out=head(8),
        ),
        "'add'",
    ),
    "shifted": (
        lambda: stem_and(lambda net, x: net.out(x + 1), out=head(8)),
        "no BatchNorm can silence it",
    ),
    "sigmoid": (lambda: stem_then(nn.Sigmoid(), head(8)), "no BatchNorm can silence it"),
    "clamped above zero": (
        lambda: stem_and(lambda net, x: net.out(x.clamp(min=0.1)), out=head(8)),
        "no BatchNorm can silence it",
    ),
    "added without BatchNorm": (
        lambda: stem_and(lambda net, x: net.out(x + net.side(x)), side=head(8, 8), out=head(8)),
        "no BatchNorm can silence it",
    ),
    "the sign of others": (
        lambda: stem_and(
            lambda net, x: net.out(x + torch.sign(net.side(x))), side=head(8, 8), out=head(8)
        ),
        "no BatchNorm can silence it",
    ),
    "where others are above zero": (
        lambda: stem_and(
            lambda net, x: net.out(x + (net.side(x) > 0)), side=head(8, 8), out=head(8)
        ),
        "no BatchNorm can silence it",
    ),
    "linear over the width": (
        lambda: stem_then(nn.Linear(16, 16)),
        "along other axes than the channels",
    ),
    "channels as images": (
        lambda: stem_and(
            lambda net, x: net.fc(x.view(x.size(0) * x.size(1), -1)), fc=nn.Linear(256, 1)
        ),
        "along other axes than the channels",
    ),
    "an output": (lambda: stem_then(nn.ReLU()), "output of the network"),
    "convolution with computed weights": (
        lambda: stem_and(
            lambda net, x: F.conv2d(x, net.out.weight - net.out.weight.mean()), out=head(8)
        ),
        "'convolution'",
    ),
    "put below each other": (
        lambda: stem_then(nn.Flatten(2), nn.Linear(256, 3)),
        "along other axes than the channels",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_stays_whole_and_says_why(name):
    make, reason = WHOLE[name]
    model = lively(make()).double()
    graph = ms.ChannelGraph(model, X)
    assert graph.prunable_norms(True) == [], "it can be cut"
    assert reason in graph.reason("stem.1" if hasattr(model, "stem") else "0.1")
    name = "stem.1" if hasattr(model, "stem") else "0.1"
    with pytest.raises(ValueError, match="drops channels that cannot be cut"):
        ms.prune(graph, {name: torch.arange(8) > 0})
    with pytest.raises(ValueError, match="no prunable BatchNorm"):
        ms.masks_for_macs(graph, reduction=0.5)


def test_only_what_must_stay_stays():
    """Of three stages, the middle one counts on its width."""
    model = Net(
        lambda net, x: net.out(net.c(net.b(net.a(x)).view(-1, 6, 16, 16))),
        a=cbr(3, 8),
        b=cbr(8, 6),
        c=cbr(6, 5),
        out=head(5),
    )
    graph, masks, _ = cut_exactly(lively(model).double(), X)
    assert [*masks] == ["a.1", "c.1"]
    assert graph.reason("b.1") == "'view' counts on its number of channels"


def residual(net, x):
    return net.out(F.relu(net.deep(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))))


def test_partly_kept_channels_are_told():
    """Where a BatchNorm scales channels of which some must stay, what is called free can be cut."""
    option_a = stem_and(  # by F.pad, as many have it: the ends of the deeper stage meet zeros
        residual, deep=nn.Sequential(cbr(8, 6, stride=2), cbr(6, 12)), out=head(12)
    )
    beside_image = stem_and(
        lambda net, x: net.out(net.norm(torch.cat([x, net.stem[0](net.image)], 1)).relu()),
        norm=nn.BatchNorm2d(16),
        image=nn.Parameter(torch.rand(2, 3, 16, 16)),
        out=head(16),
    )
    for model, at_least in ((option_a, {"deep.0.1"}), (beside_image, set())):
        graph = ms.ChannelGraph(lively(model).double(), X)
        free = graph.prunable_norms(True)
        assert at_least <= {*free}
        for name in free:
            ids = graph.norms[name]
            keep = torch.isin(graph.root[ids], graph.root[ids[:1]], invert=True)
            masks = {name: keep} | {
                n: ~torch.isin(graph.root[i], graph.root[ids[:1]])
                for n, i in graph.norms.items()
                if n in free
            }
            small = ms.prune(graph, masks)
            assert small.get_submodule(name).num_features < len(ids), name
            assert difference(small, silenced(model, masks), X) < 1e-9


def test_groups_without_a_choice_are_no_free_ones():
    """Where all channels of a layer hang together, none can go: it is not listed among what can."""
    model = stem_and(lambda net, x: net.out(x * x[:, 2:3].expand_as(x)), out=head(8))
    graph = ms.ChannelGraph(lively(model).double(), X)
    assert graph.prunable_norms(True) == [] and graph.reason("stem.1")


# ---- weights that are no layer's own ----


class Functional(nn.Module):
    """Two convolutions and two BatchNorms by functions, with all weights in one module."""

    def __init__(self):
        super().__init__()
        self.stem, self.out = cbr(3, 8), head(5)
        self.w1, self.w2 = (nn.Parameter(torch.randn(n, m, 3, 3)) for n, m in ((6, 8), (5, 6)))
        for i, n in ((1, 6), (2, 5)):
            setattr(self, f"gamma{i}", nn.Parameter(torch.rand(n) + 0.1))
            setattr(self, f"beta{i}", nn.Parameter(torch.randn(n)))
            self.register_buffer(f"mean{i}", torch.randn(n))
            self.register_buffer(f"var{i}", torch.rand(n) + 0.5)

    def norm(self, x, i):
        part = [getattr(self, f"{key}{i}") for key in ("mean", "var", "gamma", "beta")]
        return F.relu(F.batch_norm(x, *part, training=self.training))

    def forward(self, x):
        x = self.norm(F.conv2d(self.stem(x), self.w1, padding=1), 1)
        return self.out(self.norm(F.conv2d(x, self.w2, padding=1), 2))


def answers(graph):
    """Everything that one can ask of a graph runs."""
    scores = [f(graph, residual=True) for f in (ms.gammas, ms.filter_norms, ms.outgoing_norms)]
    repr(ms.channel_groups(graph))
    ms.weight_norms(graph, scaled=True)
    masks = ms.masks_for_ratio(graph, reduction=0.3, scores=scores[0])
    return ms.prune(graph, masks, fold_bias=True), ms.zero_masked(graph, masks, keep_bias=True)


def test_layers_by_functions():
    model = lively(Functional()).double()
    graph, masks, _ = cut_exactly(model, X)
    assert "stem.1" in masks
    answers(graph)


class Blur(nn.Module):
    """A fixed filter for each channel, by function: how many groups there are is a plain number."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.register_buffer("kernel", torch.full((channels, 1, 3, 3), 1 / 9))

    def forward(self, x):
        return F.conv2d(x, self.kernel, padding=1, groups=self.channels)


def test_depthwise_by_function():
    model = stem_then(cbr(8, 6), Blur(6), cbr(6, 5), head(5))
    graph, masks, _ = cut_exactly(lively(model).double(), X)
    assert "0.1" in masks and "3.1" in masks
    answers(graph)


RECURRENT = {
    "LSTM": lambda: nn.LSTM(8, 5, 2, batch_first=True),
    "GRU": lambda: nn.GRU(8, 5, bidirectional=True, batch_first=True),
    "RNN": lambda: nn.RNN(8, 5, batch_first=True),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_behind_convolutions(kind):  # as for reading text
    layer = RECURRENT[kind]()
    width = 10 if layer.bidirectional else 5
    model = stem_and(
        lambda net, x: net.fc(net.rnn(net.more(x).mean(2).transpose(1, 2))[0]),
        more=cbr(8, 8),
        rnn=layer,
        fc=nn.Linear(width, 3),
    )
    graph, masks, _ = cut_exactly(lively(model).double(), X)
    assert "stem.1" in masks
    answers(graph)


def test_attention_layers_behind_convolutions():
    model = stem_and(
        lambda net, x: net.fc(net.attend(*[net.more(x).flatten(2).transpose(1, 2)] * 3)[0].mean(1)),
        more=cbr(8, 8),
        attend=nn.MultiheadAttention(8, 2, batch_first=True),
        fc=nn.Linear(8, 3),
    )
    graph, masks, _ = cut_exactly(lively(model).double(), X)
    assert "stem.1" in masks
    answers(graph)


@pytest.mark.parametrize("name", [n for n in CUT if CUT[n][1] > 0])
def test_everything_can_be_asked(name):
    """Scores, groups and folding of each kind of network."""
    graph = ms.ChannelGraph(lively(CUT[name][0]()).double(), X)
    folded, kept = answers(graph)
    assert all(t.isfinite().all() for t in outputs(folded, X))
    assert all(
        a.shape == b.shape for a, b in zip(outputs(folded, X), outputs(kept, X), strict=True)
    )


# ---- inputs and outputs ----


def test_several_inputs():
    model = Net(
        lambda net, a, b=None, scale=1.0: net.out(net.left(a) + net.right(b) * scale),
        left=cbr(3, 8),
        right=cbr(1, 8),
        out=head(8),
    )
    model, a, b = lively(model).double(), image(), image(2, 1, 16, 16)
    for example in ((a, b), [a, b], {"a": a, "b": b}, {"b": b, "a": a, "scale": 0.5}, (a, b, 2)):
        graph, masks, small = cut_exactly(model, example)
        assert len(masks) == 2
        found = ms.masks_for_macs(model, example, 0.3, residual=True)
        assert difference(ms.prune(model, found, example), silenced(model, found), example) < 1e-9
        assert len(ms.channel_groups(model, example)) > 0


def test_a_list_as_the_only_input():
    model = Net(lambda net, xs: net.out(sum(net.stem(x) for x in xs)), stem=cbr(3, 8), out=head(8))
    _, masks, _ = cut_exactly(lively(model).double(), ([image(), image(seed=1)],))
    assert len(masks) == 1


Pair = namedtuple("Pair", "logits features")


@dataclass
class Result:
    logits: torch.Tensor
    features: torch.Tensor | None = None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y, x: {"logits": y, "features": x, "n": 3, "none": None},
        lambda y, x: OrderedDict(a=[y, {"b": (x,)}]),
        lambda y, x: [y, x],
        lambda y, x: (y, (x, "text")),
        Pair,
        Result,
    ],
    ids=["dict", "nested", "list", "tuple", "namedtuple", "dataclass"],
)
def test_outputs_of_any_form_are_kept_and_compared(wrap, monkeypatch):
    model = stem_and(lambda net, x: wrap(net.out(net.inner(x)), x), inner=cbr(8, 6), out=head(6))
    model = lively(model).double()
    graph = ms.ChannelGraph(model, X)
    assert graph.prunable_norms(True) == ["inner.1"]
    assert graph.reason("stem.1") == "it is an output of the network"
    masks = {"inner.1": torch.arange(6) > 1}
    small = ms.prune(graph, masks)
    x, same = model.stem(X), lambda a, b: float((a - b).abs().max()) < 1e-9
    masked = silenced(model, masks)
    assert same(small.out(small.inner(x)), masked.out(masked.inner(x)))
    # the comparison of the cut sees what is inside
    monkeypatch.setattr("mslib.pruning.surgery.sync_widths", _spoil)
    swapped = stem_and(lambda net, x: wrap(x, net.out(net.inner(x))), inner=cbr(8, 6), out=head(6))
    for each in (graph, ms.ChannelGraph(lively(swapped).double(), X)):  # whatever comes first
        assert each.reason("stem.1") == "it is an output of the network"
        with pytest.raises(ValueError, match="differs from the masked one"):
            ms.prune(each, masks)


def _spoil(model):
    with torch.no_grad():
        model.out.bias += 1
    return model


# ---- modules ----


def test_one_module_under_two_names():
    layers = nn.ModuleList([nn.Conv2d(3, 8, 3), head(8)])
    model = Net(
        lambda net, x: net.layers[1](F.relu(net.bn(net.first(x)))),
        layers=layers,
        bn=nn.BatchNorm2d(8),
        first=layers[0],
    )
    _, masks, small = cut_exactly(lively(model).double(), X)
    assert len(masks) == 1 and small.first is small.layers[0]


def test_tied_weights_stay_tied():
    model = stem_and(
        lambda net, x: net.out(net.bn2(net.b(net.bn1(net.a(x)).relu())).relu()),
        a=nn.Conv2d(8, 8, 3, padding=1),
        bn1=nn.BatchNorm2d(8),
        b=nn.Conv2d(8, 8, 3, padding=1),
        bn2=nn.BatchNorm2d(8),
        out=head(8),
    )
    model.b.weight = model.a.weight
    model = lively(model).double()
    graph, masks, small = cut_exactly(model, X)
    assert len(masks) == 3 and small.a.weight is small.b.weight
    assert small.a.bias is not small.b.bias
    masked = ms.zero_masked(graph, masks)
    assert masked.a.weight is masked.b.weight
    again = cut_exactly(small, X)[2]
    assert again.a.weight is again.b.weight and again.a.weight.shape[0] < small.a.weight.shape[0]


def test_a_shared_backbone_for_two_images():
    model = Net(
        lambda net, a, b: net.out(torch.cat([net.stem(a), net.stem(b)], 1)),
        stem=nn.Sequential(cbr(3, 8), cbr(8, 6)),
        out=head(12),
    )
    _, masks, _ = cut_exactly(lively(model).double(), (image(), image(seed=1)))
    assert len(masks) == 2


def test_a_hook_on_a_layer_is_seen():
    free = stem_then(cbr(8, 6), head(6))
    free[0][1].register_forward_hook(lambda module, inputs, out: out.flip(1) * 2)
    _, masks, small = cut_exactly(lively(free).double(), X)
    assert len(masks) == 2 and small[0][1]._forward_hooks
    whole = stem_then(cbr(8, 6), head(6))
    whole[0][0].register_forward_pre_hook(lambda module, inputs: None)
    whole[0][1].register_forward_hook(lambda module, inputs, out: out + 1)
    graph = ms.ChannelGraph(lively(whole).double(), X)
    assert graph.prunable_norms(True) == ["1.1"]
    assert "no BatchNorm can silence it" in graph.reason("0.1")


def test_a_replaced_forward_of_a_layer_is_seen():
    def shifted(conv, x):
        return nn.Conv2d.forward(conv, x).flip(1)

    model = stem_then(cbr(8, 6), head(6))
    model[1][0].forward = shifted.__get__(model[1][0])
    _, masks, _ = cut_exactly(lively(model).double(), X)
    assert len(masks) == 2
    old = model[2].forward
    model[2].forward = lambda x: old(x) * 2  # bound to this layer: no copy can have it
    with pytest.raises(ValueError, match="cannot be traced|differs from|does not reach '2'"):
        cut_exactly(model, X)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "zeros"])
def test_padding_of_all_kinds_and_folding(mode):
    """A constant map stays constant at the border, unless it is padded with zeros."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(8), nn.SiLU()),
        *(nn.Conv2d(8, 6, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(6), nn.SiLU()),
        nn.Conv2d(6, 3, 3, padding=1, padding_mode=mode),
    )
    model = lively(model).double()
    graph, masks, _ = cut_exactly(model, X)
    assert len(masks) == 2
    folded = ms.prune(graph, masks, fold_bias=True)
    kept = ms.zero_masked(graph, masks, keep_bias=True)
    (found,), (wanted,) = outputs(folded, X), outputs(kept, X)
    inside = (found - wanted)[:, :, 2:-2, 2:-2].abs().max()
    assert inside < 1e-9 * wanted.abs().max()
    assert (difference(folded, kept, X) < 1e-9) == (mode != "zeros")
    assert difference(ms.prune(graph, masks), kept, X) > 1e-3


@pytest.mark.parametrize("name", [n for n in CUT if CUT[n][1] > 0])
def test_folding_is_exact_wherever_there_is_no_border(name):
    model = lively(CUT[name][0]()).double()
    for m in model.modules():  # 3×3 kernels with a border become 1×1 ones
        if isinstance(m, nn.Conv2d) and m.padding != (0, 0):
            m.weight = nn.Parameter(m.weight.sum((2, 3), keepdim=True))
            m.kernel_size, m.padding = (1, 1), (0, 0)
    graph = ms.ChannelGraph(model, X)
    for seed in range(3):
        masks = half(graph, seed=seed)
        folded = ms.prune(graph, masks, fold_bias=True)
        kept = ms.zero_masked(graph, masks, keep_bias=True)
        assert difference(folded, kept, X) < 1e-9


@pytest.mark.parametrize("pad", [nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ZeroPad2d])
def test_padding_layers(pad):
    model = stem_then(pad(2), nn.Conv2d(8, 6, 5), nn.BatchNorm2d(6), pad(1), nn.Conv2d(6, 3, 3))
    assert len(cut_exactly(lively(model).double(), X)[1]) == 2


# ---- networks of torchvision ----


def test_feature_pyramid():
    model = Net(
        lambda net, x: net.fpn(OrderedDict(a=(a := net.a(x)), b=(b := net.b(a)), c=net.c(b))),
        a=cbr(3, 8),
        b=cbr(8, 12, stride=2),
        c=cbr(12, 16, stride=2),
        fpn=torchvision.ops.FeaturePyramidNetwork([8, 12, 16], 6, norm_layer=nn.BatchNorm2d),
    )
    _, masks, _ = cut_exactly(lively(model).double(), X)
    assert {*masks} == {"a.1", "b.1", "c.1", *(f"fpn.inner_blocks.{i}.1" for i in range(3))}


def test_segmentation_heads():
    from torchvision.models.segmentation import deeplabv3, fcn

    def network(head):
        return Net(
            lambda net, x: {
                "out": F.interpolate(net.head(net.body(x)), size=x.shape[-2:], mode="bilinear")
            },
            body=nn.Sequential(cbr(3, 8, stride=2), cbr(8, 16)),
            head=head,
        )

    for make, free in (
        (lambda: deeplabv3.DeepLabHead(16, 3, (1, 2)), 8),
        (lambda: fcn.FCNHead(16, 3), 3),
    ):
        model = lively(network(make())).double()
        _, masks, _ = cut_exactly(model, X)
        assert len(masks) == free


def test_lraspp():
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    x = image(1, 3, 64, 64)
    _, masks, small = cut_exactly(lively(model).double(), x)
    assert len(masks) > 40 and size(small) < 0.7 * size(model)


# ---- the user's network is left alone ----


class Remembering(nn.Module):
    """Makes a buffer at its first forward, counts its calls, keeps what it computed."""

    def __init__(self):
        super().__init__()
        self.stem, self.out, self.calls = cbr(3, 8), head(8), 0

    def forward(self, x):
        self.calls += 1
        if not hasattr(self, "ramp"):
            self.register_buffer("ramp", torch.linspace(0, 1, x.shape[-1], device=x.device))
        self.last = self.stem(x) * self.ramp.to(x)
        return self.out(self.last)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("called", [False, True])
def test_the_network_is_left_alone(training, called):
    model = lively(Remembering()).double().train(training)
    if called:
        model(X)  # keeps a tensor with a gradient
    state = {key: value.clone() for key, value in model.state_dict().items()}
    inside, calls = {name: [*vars(m)] for name, m in model.named_modules()}, model.calls
    buffers = [name for name, _ in model.named_buffers()]
    graph = ms.ChannelGraph(model, X)
    masks = {"stem.1": torch.arange(8) % 3 > 0}
    ms.masks_for_macs(model, X, 0.3), ms.channel_groups(model, X), ms.outgoing_norms(model, X)
    small, masked = ms.prune(graph, masks), ms.zero_masked(model, masks, X)
    assert {name: [*vars(m)] for name, m in model.named_modules()} == inside
    assert model.calls == calls and [name for name, _ in model.named_buffers()] == buffers
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(m.training == training for m in model.modules())
    for made in (small, masked):
        assert all(t.device.type == "cpu" for t in made.state_dict().values())
        assert made.state_dict().keys() == state.keys() and made.training == training
    model.eval()
    assert difference(small.eval(), masked.eval(), X) < 1e-9  # both still run
    assert model(X).isfinite().all()


class Dropping(nn.Module):
    """Stochastic depth by random.random()."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        if self.training and random.random() < 0.5:
            return x
        return x + self.block(x)


def test_stochastic_depth_in_training_mode():
    blocks = [Dropping(nn.Sequential(cbr(8, 6), cbr(6, 8))) for _ in range(6)]
    model = lively(stem_then(*blocks, head(8))).double()
    wanted = ms.channel_groups(model, X)
    random.seed(0)
    model.train()
    drawn = random.getstate()
    assert repr(ms.channel_groups(model, X)) == repr(wanted)
    assert random.getstate() == drawn
    graph = ms.ChannelGraph(model, X)
    masks = {name: torch.arange(len(graph.norms[name])) != 1 for name in graph.prunable_norms(True)}
    small = ms.prune(graph, masks)
    assert len(masks) == 13 and small.training
    assert difference(small.eval(), silenced(model, masks).eval(), X) < 1e-9


def test_a_buffer_that_forward_writes_stays_as_it_is():
    model = stem_and(lambda net, x: (net.seen.add_(1), net.out(x))[1], out=head(8))
    model.register_buffer("seen", torch.zeros(1))
    model = lively(model).double()
    small = ms.prune(model, {"stem.1": torch.arange(8) > 2}, X, fold_bias=True)
    assert small.seen == model.seen == 0


def counting(net, x):
    """Counts channels of one branch where the other has been read last."""
    a, b = net.a(x), net.b(x)
    if a.shape[1] != 8:
        raise RuntimeError("8 channels, please")
    return net.out(torch.cat([a, b], 1))


def test_only_the_culprit_stays_whole():
    net = Net(counting, a=cbr(3, 8), b=cbr(3, 8), out=head(16))
    graph = ms.ChannelGraph(lively(net).double(), X)
    assert graph.prunable_norms() == ["b.1"]
    assert graph.reason("a.1") == "the forward around a.1 counts on its number of channels"


def test_inside_inference_mode():
    """PyTorch hands out other operations there: linear and conv2d as they are."""
    model = lively(ms.resnet(8))
    with torch.inference_mode():
        x = torch.randn(2, 3, 32, 32)
        masks = ms.masks_for_macs(model, x, 0.3)
        small = ms.prune(model, masks, x)
        assert ms.cost(model, x) == ms.cost(model, x.clone())
        assert ms.cost(small, x).macs <= 0.7 * ms.cost(model, x).macs
    assert set(masks) == {f"stage{i}.0.bn1" for i in (1, 2, 3)}


def test_random_numbers_are_not_used_up():
    model = lively(stem_then(nn.Dropout(0.5), head(8))).double()
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    ms.prune(model, {"0.1": torch.arange(8) > 0}, X)
    assert torch.equal(torch.rand(4), wanted)


# ---- what is refused, and how ----


def test_wrappers_are_taken_off():
    plain = lively(stem_then(cbr(8, 6), head(6))).double()
    masks = {"0.1": torch.arange(8) % 2 > 0}
    wanted = ms.prune(plain, masks, X)
    for model in (
        nn.DataParallel(plain),
        torch.compile(plain),
        nn.DataParallel(torch.compile(plain)),
    ):
        small = ms.prune(model, masks, X)
        assert type(small) is nn.Sequential and difference(small, wanted, X) == 0
        assert ms.gammas(model, X).keys() == ms.gammas(model).keys() == {"0.1", "1.1"}
        assert ms.weight_norms(model).keys() == {"0.0", "1.0", "2"}
        assert ms.masks_for_macs(model, X, 0.5).keys() == {"0.1", "1.1"}
        assert type(ms.zero_masked(model, masks, X)) is nn.Sequential


@pytest.mark.parametrize(
    "change, remedy",
    [
        (weight_norm, "remove_weight_norm"),
        (spectral_norm, "remove_spectral_norm"),
        (parametrizations.weight_norm, "remove_parametrizations"),
        (parametrizations.spectral_norm, "remove_parametrizations"),
        (lambda conv: prune.l1_unstructured(conv, "weight", 0.5), "prune.remove"),
        (lambda conv: prune.ln_structured(conv, "weight", 0.5, 1, 0), "prune.remove"),
        (lambda conv: prune.random_unstructured(conv, "bias", 0.5), "prune.remove"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_computed_weights_are_refused_with_a_remedy_that_works(change, remedy):
    model = lively(stem_then(cbr(8, 6), head(6))).double()
    change(model[1][0])
    with pytest.raises(ValueError, match=remedy) as caught:
        ms.prune(model, {"0.1": torch.arange(8) > 0}, X)
    assert "'1.0'" in str(caught.value)
    exec(str(caught.value).split("first: ")[1], {"model": model, "torch": torch})
    assert len(cut_exactly(model.eval(), X)[1]) == 2


def quantized():
    from torch.ao.nn.quantized.dynamic import Linear

    return nn.Sequential(nn.Flatten(), Linear(768, 4))


def branching(net, x):
    return net.out(x) if x.mean() > 0 else net.out(-x)


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head, self.aux = cbr(3, 8), head(8), head(8)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x) + self.aux(x) if self.training else self.head(x)


REFUSED = {
    "quantized": (quantized, X, "quantized"),
    "without parameters": (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), X, "no .*parameters"),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.LazyConv2d(2, 1)),
        torch.zeros(1, 3, 16, 16),
        "run it once|call it once|uninitialized",
    ),
    "data-dependent": (
        lambda: stem_and(branching, out=head(8)).double(),
        X,
        "must not branch on the values",
    ),
    "auxiliary head": (lambda: Auxiliary().double(), X, "does not reach 'aux'"),
    "half": (lambda: stem_then(head(8)).half(), torch.zeros(1, 3, 16, 16), "float32.*float16"),
    "double": (lambda: stem_then(head(8)).double(), torch.zeros(1, 3, 16, 16), "float32.*float64"),
    "bfloat16": (lambda: stem_then(head(8)).bfloat16(), X, "float64.*bfloat16"),
    "too few channels": (lambda: stem_then(head(8)).double(), image(1, 1, 16, 16), "right size"),
    "too small": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), head(8)).double(),
        image(1, 3, 4, 4),
        "right size",
    ),
    "no batch": (lambda: stem_then(head(8)).double(), image(3, 16, 16), "right size"),
    "too large": (
        lambda: stem_then(nn.Flatten(), nn.Linear(2048, 2)).double(),
        image(1, 3, 32, 32),
        "right size",
    ),
    "uint8": (
        lambda: stem_then(head(8)),
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        "(uint8|unsigned char).*right size and type",
    ),
    "uint8, without bias": (
        lambda: nn.Sequential(cbr(3, 8, bias=False), head(8)),
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        "(uint8|unsigned char|Byte).*right size and type",
    ),
    "no tensor": (lambda: stem_then(head(8)), "image.png", "image.png|str|tensor"),
    "none": (lambda: stem_then(head(8)), None, "an example input is needed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_message(name):
    make, example, message = REFUSED[name]
    model = make().eval()
    for function in (
        lambda: ms.prune(model, {"0.1": torch.arange(8) > 0}, example),
        lambda: ms.channel_groups(model, example),
        lambda: ms.masks_for_macs(model, example, 0.5),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            function()


def test_uint8_images_for_a_network_that_takes_them():
    model = Net(lambda net, x: net.out(net.stem(x.double() / 255)), stem=cbr(3, 8), out=head(8))
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert len(cut_exactly(lively(model).double(), x)[1]) == 1


@pytest.mark.parametrize(
    "dtype, limit", [(torch.float32, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)]
)
def test_other_precisions(dtype, limit):
    model = lively(stem_then(cbr(8, 6), head(6))).to(dtype)
    x, masks = image().to(dtype), {"0.1": torch.arange(8) % 2 > 0}
    small = ms.prune(model, masks, x)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert difference(small, silenced(model, masks), x) < limit


@pytest.mark.parametrize(
    "masks, message",
    [
        (None, "masks are a NoneType; expected a dict"),
        ([torch.ones(8, dtype=torch.bool)], "masks are a list; expected a dict"),
        ({"0.9": torch.ones(8, dtype=torch.bool)}, "no such BatchNorm; did you mean '0.1'"),
        ({"0.0": torch.ones(8, dtype=torch.bool)}, "no such BatchNorm; did you mean '0.1'"),
        ({1: torch.ones(8, dtype=torch.bool)}, "mask for 1"),
        ({"0.1": None}, "NoneType; expected a bool tensor"),
        ({"0.1": torch.ones(8)}, "torch.float32; expected a bool tensor"),
        ({"0.1": torch.ones(7, dtype=torch.bool)}, r"shape \[7\]; the layer has .?8"),
        ({"0.1": torch.ones(8, 1, dtype=torch.bool)}, r"shape \[8, 1\]; the layer has .?8"),
        ({"0.1": torch.zeros(8, dtype=torch.bool)}, "keeps no channel"),
    ],
)
def test_masks_that_do_not_fit(masks, message):
    graph = ms.ChannelGraph(stem_then(head(8)).double(), X)
    for function in (ms.prune, ms.zero_masked):
        with pytest.raises(ValueError, match=message):
            function(graph, masks)


# ---- leaving layers alone ----


def test_keep_leaves_layers_alone():
    model = nn.Sequential(
        OrderedDict(
            stem=cbr(3, 8), body=nn.Sequential(cbr(8, 6), cbr(6, 5)), top=cbr(5, 4), out=head(4)
        )
    )
    graph = ms.ChannelGraph(lively(model).double(), X)
    everything = ["stem.1", "body.0.1", "body.1.1", "top.1"]
    for keep, left in (
        ((), everything),
        (("top",), ["stem.1", "body.0.1"]),  # what it reads stays, too
        ("out", everything[:3]),
        (("out", "stem.0"), everything[1:3]),
        (("body.0",), ["body.1.1", "top.1"]),
        (("body",), ["top.1"]),
        (("body.1.1",), ["stem.1", "body.0.1", "top.1"]),
        ((n for n in ["stem.1", "top.1"]), everything[1:3]),
    ):
        keep = keep if isinstance(keep, str) else tuple(keep)
        assert graph.prunable_norms(True, keep) == left, keep
        for function in (ms.gammas, ms.filter_norms, ms.outgoing_norms):
            assert [*function(graph, residual=True, keep=keep)] == left
        assert [*ms.masks_below(graph, threshold=0.5, keep=keep)] == left
        assert [*ms.masks_for_macs(graph, reduction=0.05, keep=keep)] == left
        scores = ms.filter_norms(graph)
        assert [*ms.masks_for_macs(graph, reduction=0.05, scores=scores, keep=keep)] == left
    for function in (
        ms.gammas,
        ms.filter_norms,
        ms.outgoing_norms,
        ms.masks_below,
        ms.masks_for_macs,
    ):
        with pytest.raises(ValueError, match="keep='bdy': .*did you mean 'body'"):
            function(graph, keep=["top", "bdy"])


def test_keep_reaches_all_that_share_the_channels():
    model = stem_and(
        lambda net, x: net.out(x + net.side(net.inner(x))),
        inner=cbr(8, 6),
        side=cbr(6, 8),
        out=head(8),
    )
    graph = ms.ChannelGraph(lively(model).double(), X)
    assert graph.prunable_norms(True) == ["stem.1", "inner.1", "side.1"]
    assert graph.prunable_norms(True, ["side.1"]) == ["inner.1"]
    assert graph.prunable_norms(True, ["side"]) == []


# ---- one trace for everything ----


def test_one_trace_serves_a_chain(monkeypatch):
    model = lively(stem_then(cbr(8, 6), head(6))).double()
    graph = ms.ChannelGraph(model, X)
    monkeypatch.setattr(ms.ChannelGraph, "__init__", None)  # from here on nothing can be traced
    scores = ms.outgoing_norms(graph)
    masks = ms.masks_for_macs(graph, reduction=0.5, scores=scores)
    assert masks.keys() == ms.gammas(graph).keys() == ms.filter_norms(graph).keys()
    assert ms.masks_below(graph, threshold=0.3).keys() == masks.keys()
    assert ms.masks_for_ratio(graph, reduction=0.5).keys() == masks.keys()
    assert {n for g in ms.channel_groups(graph) for n in g.norms} == masks.keys()
    assert ms.MaskedL1(model, masks, 1e-3)().item() > 0
    small, masked = ms.prune(graph, masks), ms.zero_masked(graph, masks)
    assert difference(small, masked, X) < 1e-9
    assert difference(ms.prune(graph, masks, fold_bias=True), masked, X) > 1e-3


# ---- cutting again ----


def test_a_grouped_convolution_cut_to_one_channel_a_group_and_again():
    model = lively(stem_then(cbr(8, 12, groups=4), cbr(12, 6, 1), head(6))).double()
    masks = {"0.1": torch.arange(8) % 2 > 0, "1.1": torch.arange(12) % 3 == 0}
    small = cut_exactly(model, X, masks)[2]
    grouped = small[1][0]
    assert (grouped.in_channels, grouped.out_channels, grouped.groups) == (4, 4, 4)
    # it is depthwise now: whole groups can go
    keep = torch.arange(4) > 0
    again = cut_exactly(small, X, {"0.1": keep, "1.1": keep})[2]
    assert again[1][0].groups == 3
    last = cut_exactly(again, X, {"0.1": torch.arange(3) == 1, "1.1": torch.arange(3) == 1})[2]
    assert last[1][0].groups == 1
    cut_exactly(last, X, {"2.1": torch.arange(6) > 2})


@pytest.mark.parametrize("transposed", [False, True])
def test_cut_three_times(transposed):
    conv = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = nn.Sequential(
        *(cbr(3, 24), conv(24, 32, 3, groups=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(conv(32, 32, 3, groups=32), nn.BatchNorm2d(32), nn.SiLU(), conv(32, 24, 1)),
        *(nn.BatchNorm2d(24), head(24)),
    )
    model = lively(model).double()
    sizes = [size(model)]
    for _ in range(3):
        model = cut_exactly(model, X)[2]
        sizes.append(size(model))
    assert sizes == sorted(set(sizes), reverse=True)


def test_pooling_over_channels_is_not_over_pixels():
    """To a pooling in three dimensions [N, C, H, W] is one image [C, D, H, W]."""
    over = stem_and(lambda net, x: net.out(F.max_pool3d(x, (3, 1, 1), 1, (1, 0, 0))), out=head(8))
    graph = ms.ChannelGraph(lively(over).double(), X)
    assert not graph.prunable_norms() and "max_pool3d" in graph.reason("stem.1")
    alone = stem_and(lambda net, x: net.out(F.avg_pool2d(x[0], 3)[None]), out=head(8))
    assert len(cut_exactly(lively(alone).double(), X[:1])[1]) == 1


def test_outputs_of_bools_are_compared(monkeypatch):
    model = lively(stem_and(lambda net, x: (y := net.out(x), y > 0), out=head(8))).double()
    masks = {"stem.1": torch.arange(8) > 2}
    assert [t.dtype for t in ms.prune(model, masks, X)(X)] == [torch.float64, torch.bool]
    only = stem_and(lambda net, x: net.out(x) > 0, out=head(8))
    assert ms.prune(lively(only).double(), masks, X)(X).dtype == torch.bool
    monkeypatch.setattr("mslib.pruning.surgery.sync_widths", _spoil)
    with pytest.raises(ValueError, match="differs from the masked one"):
        ms.prune(only, masks, X)


@pytest.mark.parametrize("through", ["the parameter", "its data"])
def test_a_graph_that_is_older_than_a_training_has_the_numbers_of_today(through, monkeypatch):
    """β is what a channel without γ sends on."""
    model = lively(stem_then(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), head(6))).double()
    graph = ms.ChannelGraph(model, X)
    masks = {"0.1": torch.arange(8) > 2}
    traces, trace = [], ms.ChannelGraph._trace
    monkeypatch.setattr(
        ms.ChannelGraph, "_trace", lambda *args: traces.append(args) or trace(*args)
    )
    ms.prune(graph, ms.masks_for_macs(graph, reduction=0.2), fold_bias=True)
    with torch.no_grad():
        model[1].weight.add_(0.1)  # no number that a constant depends on
        model[0][1].weight.add_(0.1)
    ms.prune(graph, masks, fold_bias=True)
    assert not traces
    bias = model[0][1].bias
    with torch.no_grad():
        (bias if through == "the parameter" else bias.data).add_(0.5)
    small = ms.prune(graph, masks, fold_bias=True)
    assert traces
    wanted = ms.zero_masked(ms.ChannelGraph(model, X), masks, keep_bias=True)
    assert difference(small, wanted, X) < 1e-9
