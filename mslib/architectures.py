"""The networks that mslib builds: CIFAR ResNets (He et al. 2016, section 4.2), VGGs and others."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .files import nearest

STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
BOUNDS: dict[str, tuple[float, float]] = {
    "depth": (8, 1202),
    "num_classes": (1, 10**6),
    "width": (1e-3, 64.0),
    "in_channels": (1, 4096),
}


class PaddedShortcut(nn.Module):
    """Option-A shortcut: subsample by `stride`, then pad the new channels with zeros.

    Output channel `j` copies input channel `source[j] - 1`; `source[j] = 0` makes it zero.
    A buffer, so that a pruned shortcut is saved and loaded like any weight.
    """

    source: torch.Tensor

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        before = (out_channels - in_channels) // 2
        source = torch.zeros(out_channels, dtype=torch.long)
        source[before : before + in_channels] = torch.arange(1, in_channels + 1)
        self.stride = stride
        self.register_buffer("source", source)

    # [N, in, H, W] -> [N, out, H / stride, W / stride]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, 1, 0)).index_select(1, self.source)

    def extra_repr(self) -> str:
        return f"{int((self.source > 0).sum())} -> {len(self.source)}, stride={self.stride}"


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else PaddedShortcut(in_channels, out_channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))  # inner channels: nobody else reads them
        out = self.bn2(self.conv2(out))  # residual channels: every block of the stage adds to them
        return self.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A stem and three stages of `blocks` basic blocks: 6·blocks + 2 layers.

    widths: the channels of the three stages, such as (16, 32, 64).
    """

    recipe: dict[str, Any]

    def __init__(self, blocks: int, widths: tuple[int, ...], num_classes: int, in_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.stage1 = self._stage(widths[0], widths[0], blocks, stride=1)
        self.stage2 = self._stage(widths[0], widths[1], blocks, stride=2)
        self.stage3 = self._stage(widths[1], widths[2], blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], num_classes)
        initialize(self)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        others = (BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
        return nn.Sequential(first, *others)

    # x: [N, in_channels, H, W], H and W divisible by 4
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(self.pool(x).flatten(1))  # [N, num_classes]


class VGG(nn.Module):
    """VGG as the pruning papers use it on CIFAR: five stages with BatchNorm, one linear layer."""

    recipe: dict[str, Any]

    def __init__(self, stages: tuple[int, ...], width: float, num_classes: int, in_channels: int):
        super().__init__()
        layers: list[nn.Module] = []
        for stage, convolutions in enumerate(stages):
            layers += [nn.MaxPool2d(2)] if stage else []
            out_channels = scaled(min(64 * 2**stage, 512), width)
            for _ in range(convolutions):
                layers.append(nn.Conv2d(in_channels, out_channels, 3, 1, 1, bias=False))
                layers += [nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
                in_channels = out_channels
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, num_classes)
        initialize(self)

    # x: [N, in_channels, H, W], H and W at least 16
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.features(x)).flatten(1))  # [N, num_classes]


def scaled(channels: int, width: float) -> int:
    """`width` times as many channels, at least one."""
    return max(1, round(width * channels))


def initialize(model: nn.Module) -> None:
    """Draw the convolutions anew as He does, with γ = 1 / √blocks in the last BatchNorm of a block.

    A block then starts near its shortcut, and 56 layers train from the first step. γ = 0, as in
    networks with projection shortcuts (Goyal et al. 2017), is no choice here: where option A pads
    with zeros, the sum would be exactly 0 and ReLU would pass no gradient. Half of the channels of
    stage 2 and three quarters of stage 3 would stay dead for ever.
    """
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.BatchNorm2d):
            m.reset_parameters()
    blocks = [m for m in model.modules() if isinstance(m, BasicBlock)]
    for block in blocks:
        nn.init.constant_(block.bn2.weight, len(blocks) ** -0.5)


def untrained(model: nn.Module) -> nn.Module:
    """A network on the CPU of the same widths as `model`, but with fresh random weights.

    `model`: a `resnet` or `vgg`, pruned or not. Raises ValueError for any other.
    """
    if not isinstance(model, (ResNet, VGG)):
        raise ValueError(f"{type(model).__name__}: only ms.resnet and ms.vgg can be drawn anew")
    # the same weights whatever device drew them, and in whatever layout they lay there
    fresh = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    fresh.fc.reset_parameters()
    initialize(fresh)
    return fresh


def _bounded(**recipe: Any) -> dict[str, Any]:
    for name, value in recipe.items():
        least, most = BOUNDS[name]
        kind = (int, type(most))  # whole numbers pass for the width too
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
            what = "number" if isinstance(most, float) else "whole number"
            raise ValueError(f"{name}={value!r:.99}: expected a {what} from {least} to {most}")
    return recipe


def resnet(
    depth: int = 56, num_classes: int = 10, width: float = 1.0, in_channels: int = 3
) -> ResNet:
    """CIFAR ResNet of `depth` layers (20, 32, 44, 56, 110 …: 6n + 2) with option-A shortcuts.

    width: scales the 16, 32 and 64 channels of its stages. The sides of its images are divisible
    by 4. Raises ValueError that names an argument out of its range.
    """
    recipe = _bounded(depth=depth, num_classes=num_classes, width=width, in_channels=in_channels)
    if (depth - 2) % 6:
        raise ValueError(f"depth={depth}: a CIFAR ResNet has 6n + 2 layers; try 20, 32, 56 or 110")
    widths = (scaled(16, width), scaled(32, width), scaled(64, width))
    model = ResNet((depth - 2) // 6, widths, num_classes, in_channels)
    model.recipe = {"network": "resnet", **recipe}
    return model


def vgg(depth: int = 16, num_classes: int = 10, width: float = 1.0, in_channels: int = 3) -> VGG:
    """CIFAR VGG of `depth` 11, 13, 16 or 19 with BatchNorm; `width` scales all channels.

    Images of 16 pixels a side or more. Raises ValueError that names an argument out of its range.
    """
    recipe = _bounded(depth=depth, num_classes=num_classes, width=width, in_channels=in_channels)
    if depth not in STAGES:
        raise ValueError(f"depth={depth}: a CIFAR VGG has a depth of 11, 13, 16 or 19")
    model = VGG(STAGES[depth], width, num_classes, in_channels)
    model.recipe = {"network": "vgg", **recipe}
    return model


def network(name: str, num_classes: int = 1000, weights: Any = None) -> nn.Module:
    """torchvision's network `name`, such as "resnet50", with `num_classes` outputs.

    weights: as torchvision names them, such as "DEFAULT"; without them nothing is downloaded.
    `save` knows what it is, so that `load` needs nothing but the file. Auxiliary classifiers are
    left out. Raises ValueError for an unknown name or weights, and for detection and optical flow.
    """
    from torchvision.models import get_model_weights

    options = _bounded(num_classes=num_classes)
    builder = _builder(name)
    if weights is not None:
        try:
            weights, options = get_model_weights(name).verify(weights), {}
        except (KeyError, TypeError):
            raise ValueError(
                f"{name} has no weights {weights!r}; "
                f"torchvision.models.get_model_weights({name!r}) lists all"
            ) from None
    elif name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # those of its default are downloaded
    model = builder(weights=weights, **options)
    for auxiliary in ("aux_logits", "aux1", "aux2", "AuxLogits", "aux_classifier"):
        if hasattr(model, auxiliary):
            setattr(model, auxiliary, False if auxiliary == "aux_logits" else None)
    if weights is not None:
        _replace_classifier(model, name, num_classes, len(weights.meta["categories"]))
    recipe = {"network": "torchvision", "name": name, "num_classes": num_classes}
    if getattr(model, "transform_input", False):  # its weights expect another normalization
        recipe["transform_input"] = True
    model.recipe = recipe  # type: ignore[assignment]
    return model


def _builder(name: str) -> Callable[..., nn.Module]:
    from torchvision.models import get_model_builder, list_models

    known = list_models()
    if name not in known:
        hint = nearest(str(name)[:100], known)
        raise ValueError(
            f"unknown network {name!r:.99}{hint}; see torchvision.models.list_models()"
        )
    builder = get_model_builder(name)
    if {"detection", "optical_flow"} & {*builder.__module__.split(".")}:
        raise ValueError(
            f"{name} is no classifier or segmenter, so mslib does not build it; make it by "
            f"torchvision.models.get_model({name!r}), and read its files by ms.load(path, model)"
        )
    return builder


def _replace_classifier(model: nn.Module, name: str, num_classes: int, trained: int) -> None:
    """Give a network with weights for `trained` classes a last layer for `num_classes`."""
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear and num_classes != trained:
        raise ValueError(
            f"{name} has no linear layer to replace: with weights it has {trained} outputs, "
            f"not {num_classes}"
        )
    last = model.get_submodule(linear[-1]) if linear else None
    if isinstance(last, nn.Linear) and last.out_features != num_classes:
        parent, _, child = linear[-1].rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Linear(last.in_features, num_classes))


def _torchvision(name: str, num_classes: int, transform_input: bool = False) -> nn.Module:
    """`network` as a file may ask for it: without weights, so that nothing is downloaded."""
    model = network(name, num_classes)
    if transform_input is True and name in ("googlenet", "inception_v3"):
        model.transform_input = True  # type: ignore[assignment]
        model.recipe |= {"transform_input": True}  # type: ignore[operator, assignment]
    return model


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet": resnet,
    "vgg": vgg,
    "torchvision": _torchvision,
}
