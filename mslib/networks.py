"""The CIFAR ResNets (He et al. 2016, section 4.2) and VGGs, and how to save a network of any width."""

import copy

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .files import read_tensors, write_tensors


class PaddedShortcut(nn.Module):
    """Option-A shortcut: subsample by `stride`, then pad the new channels with zeros (no parameters).

    Output channel `j` copies input channel `source[j] - 1`; `source[j] = 0` makes it zero.
    A buffer, so that a pruned shortcut is saved and loaded like any weight.
    """

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        before = (out_channels - in_channels) // 2
        source = torch.zeros(out_channels, dtype=torch.long)
        source[before : before + in_channels] = torch.arange(1, in_channels + 1)
        self.stride = stride
        self.register_buffer("source", source)

    def forward(self, x):  # [N, in_channels, H, W] -> [N, out_channels, H / stride, W / stride]
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, 1, 0)).index_select(1, self.source)

    def extra_repr(self):
        return f"{int((self.source > 0).sum())} -> {len(self.source)}, stride={self.stride}"


class BasicBlock(nn.Module):
    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else PaddedShortcut(in_channels, out_channels, stride)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))  # the inner channels: nobody else reads them
        out = self.bn2(
            self.conv2(out)
        )  # the residual channels: every block of the stage adds to them
        return self.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A stem and three stages of `blocks` basic blocks with 16, 32 and 64 channels: depth 6·blocks + 2."""

    def __init__(self, blocks, num_classes=10, in_channels=3):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.stage1 = self._stage(16, 16, blocks, stride=1)
        self.stage2 = self._stage(16, 32, blocks, stride=2)
        self.stage3 = self._stage(32, 64, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        initialize(self)

    @staticmethod
    def _stage(in_channels, out_channels, blocks, stride):
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(
            first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
        )

    def forward(self, x):  # [N, 3, H, W], H and W divisible by 4
        x = self.relu(self.bn(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(self.pool(x).flatten(1))  # [N, num_classes]


class VGG(nn.Module):
    """VGG with BatchNorm as the pruning papers use it on CIFAR: 3×3 convolutions in five stages, one linear layer."""

    def __init__(self, convolutions, width=1.0, num_classes=10, in_channels=3):
        super().__init__()
        layers = []
        for stage, n in enumerate(convolutions):
            layers += [nn.MaxPool2d(2)] if stage else []
            for _ in range(n):
                out_channels = max(1, round(width * min(64 * 2**stage, 512)))
                layers += [
                    nn.Conv2d(in_channels, out_channels, 3, 1, 1, bias=False),
                    nn.BatchNorm2d(out_channels),
                    nn.ReLU(inplace=True),
                ]
                in_channels = out_channels
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, num_classes)
        initialize(self)

    def forward(self, x):  # [N, 3, H, W], H and W divisible by 16
        return self.fc(self.pool(self.features(x)).flatten(1))  # [N, num_classes]


def initialize(model):
    """Draw the convolutions anew as He does, with γ = 1 / √blocks in the last BatchNorm of each block.

    A block then starts near its shortcut, and 56 layers train from the first step. Not γ = 0 as in networks with
    projection shortcuts (Goyal et al. 2017): where option A pads with zeros, the sum would be exactly 0, ReLU would pass
    no gradient, and half of the channels of stage 2 and three quarters of stage 3 would stay dead for ever.
    """
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.BatchNorm2d):
            m.reset_parameters()
    blocks = [m for m in model.modules() if isinstance(m, BasicBlock)]
    for block in blocks:
        nn.init.constant_(block.bn2.weight, len(blocks) ** -0.5)


def batch_norms(model):
    """Name and module of every BatchNorm2d of `model` that has a γ, in the order of its modules."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.affine]


def untrained(model):
    """A network of the same widths as `model`, a ResNet or VGG pruned or not, with fresh random weights, on the CPU."""
    fresh = copy.deepcopy(model).cpu()  # the same weights whatever device drew them
    fresh.fc.reset_parameters()
    initialize(fresh)
    return fresh


def resnet(depth=56, num_classes=10, in_channels=3):
    """CIFAR ResNet of `depth` layers (20, 32, 44, 56, 110 …: 6n + 2), option-A shortcuts, for 32×32 images.

    Raises ValueError for a depth that is not 6n + 2.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(
            f"depth {depth}: a CIFAR ResNet has 6n + 2 layers; try 20, 32, 44, 56 or 110"
        )
    model = ResNet((depth - 2) // 6, num_classes, in_channels)
    model.recipe = {
        "network": "resnet",
        "depth": depth,
        "num_classes": num_classes,
        "in_channels": in_channels,
    }
    return model


def vgg(depth=16, num_classes=10, width=1.0, in_channels=3):
    """CIFAR VGG of `depth` 11, 13, 16 or 19 with BatchNorm; `width` scales all channels. Images of 16 pixels a side or more.

    Raises ValueError for another depth or a width that is not above 0.
    """
    convolutions = {
        11: (1, 1, 2, 2, 2),
        13: (2, 2, 2, 2, 2),
        16: (2, 2, 3, 3, 3),
        19: (2, 2, 4, 4, 4),
    }
    if depth not in convolutions or not width > 0:
        raise ValueError(
            f"vgg({depth}, width={width}): depth is 11, 13, 16 or 19, and width above 0"
        )
    model = VGG(convolutions[depth], width, num_classes, in_channels)
    model.recipe = {
        "network": "vgg",
        "depth": depth,
        "num_classes": num_classes,
        "width": width,
        "in_channels": in_channels,
    }
    return model


def network(name, num_classes=1000, weights=None):
    """torchvision's network `name`, such as "resnet50", with `num_classes` outputs; `weights` as torchvision names them.

    Like torchvision.models.get_model, but `save` knows what it is, so that `load` needs nothing but the file, and
    without the auxiliary classifiers of GoogLeNet and Inception. Raises ValueError for an unknown name or weights.
    """
    from torchvision.models import get_model

    options = (
        {"init_weights": True} if name in ("googlenet", "inception_v3") and weights is None else {}
    )
    try:
        model = get_model(
            name, weights=weights, **({} if weights else {"num_classes": num_classes}), **options
        )
    except ValueError as error:
        raise ValueError(
            f"unknown network {name!r}; torchvision.models.list_models() lists all ({error})"
        ) from None
    except KeyError:
        raise ValueError(
            f"{name} has no weights {weights!r}; torchvision.models.get_model_weights({name!r}) lists all"
        ) from None
    if hasattr(model, "aux_logits"):
        model.aux_logits = False
        model.aux1 = model.aux2 = model.AuxLogits = None
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)] if weights else []
    if weights and not linear and num_classes != 1000:
        raise ValueError(
            f"{name} has no linear layer to replace: with weights it has 1000 outputs, not {num_classes}"
        )
    if linear and model.get_submodule(linear[-1]).out_features != num_classes:
        parent, _, child = linear[-1].rpartition(".")
        setattr(
            model.get_submodule(parent),
            child,
            nn.Linear(model.get_submodule(linear[-1]).in_features, num_classes),
        )
    model.recipe = {"network": "torchvision", "name": name, "num_classes": num_classes}
    return model


# ---- networks in files ---------------------------------------------------------------------------------------------


def save(model, path):
    """Write weights, widths and the recipe of `model` to `path`; a pruned network is saved like any other."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_tensors(path, {"recipe": getattr(model, "recipe", None), "state": state})


def load(path, model=None):
    """The network that `save` wrote to `path`, with the widths it had, on the CPU.

    `model`: for a network that is not mslib's own, a fresh unpruned instance to pour the weights into.
    Raises FileNotFoundError, or ValueError for a damaged file or one of another network.
    """
    content = read_tensors(path)
    if not isinstance(content, dict) or "state" not in content:
        raise ValueError(
            f"{path} was not written by ms.save; for a plain state_dict use model.load_state_dict"
        )
    if model is None:
        if not content["recipe"]:
            raise ValueError(
                f"{path} holds a network that mslib does not build; pass an unpruned one: load(path, model)"
            )
        recipe = dict(
            content["recipe"]
        )  # such as {"network": "resnet", "depth": 56, "num_classes": 10, "in_channels": 3}
        kind = recipe.pop("network")
        if kind not in NETWORKS:
            raise ValueError(f"{path}: unknown network {kind!r}; known: {', '.join(NETWORKS)}")
        model = NETWORKS[kind](**recipe)
    return resize(model, content["state"], path)


def resize(model, state, origin="the state"):
    """Give every layer of `model` the widths of `state` (a state_dict), then load it. Returns `model`."""
    for name, m in model.named_modules():
        own = f"{name}.source" if isinstance(m, PaddedShortcut) else f"{name}.weight"
        if own not in state:
            continue
        shape = state[own].shape
        for key in ("bias", "running_mean", "running_var"):
            other = state.get(f"{name}.{key}")
            if other is not None and other.shape != shape[:1]:
                raise ValueError(
                    f"{origin} does not fit {type(model).__name__}: {name} has {shape[0]} channels, its {key} {len(other)}"
                )
        if isinstance(m, nn.Conv2d):
            if 1 < m.groups == m.in_channels:  # depthwise: as many groups as channels
                m.groups = shape[0] // (m.out_channels // m.in_channels)
            m.out_channels, m.in_channels = shape[0], shape[1] * m.groups
        elif isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d)):
            m.num_features = shape[0]
        elif isinstance(m, nn.PReLU):
            m.num_parameters = shape[0]
        elif isinstance(m, nn.Linear):
            m.out_features, m.in_features = shape
        if (
            f"{name}.bias" in state and getattr(m, "bias", 0) is None
        ):  # `prune` folded a constant into it
            m.bias = nn.Parameter(torch.zeros_like(state[f"{name}.bias"], device=m.weight.device))
        for kind in (m._parameters, m._buffers):
            for key, old in kind.items():
                new = state.get(f"{name}.{key}")
                if old is not None and new is not None and old.shape != new.shape:
                    fresh = torch.empty(new.shape, dtype=old.dtype, device=old.device)
                    kind[key] = (
                        nn.Parameter(fresh, old.requires_grad) if kind is m._parameters else fresh
                    )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{origin} does not fit {type(model).__name__}: {str(error).splitlines()[1].strip()}"
        ) from None
    return model


NETWORKS = {"resnet": resnet, "vgg": vgg, "torchvision": network}


def unwrap(model):
    """The network inside of DataParallel, DistributedDataParallel or torch.compile wrappers."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(
        model, "_orig_mod"
    ):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def call(model, example):
    """The outputs of `model` for `example`: a tensor, a tuple or list of inputs, or a dict of named ones."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def sync_widths(model):
    """Set the attributes of layers that tell their widths from the shapes of their weights."""
    for m in model.modules():
        if isinstance(m, nn.modules.conv._ConvTransposeNd):
            m.in_channels, m.out_channels = m.weight.shape[0], m.weight.shape[1] * m.groups
        elif isinstance(m, nn.modules.conv._ConvNd):
            m.out_channels, m.in_channels = m.weight.shape[0], m.weight.shape[1] * m.groups
        elif isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight is not None:
            m.num_features = len(m.weight)
        elif isinstance(m, nn.Linear):
            m.out_features, m.in_features = m.weight.shape
        elif isinstance(m, nn.PReLU):
            m.num_parameters = len(m.weight)
    return model


def copied(model, replaced=None):
    """A deep copy of `model`. `replaced`: id of a tensor -> what stands in its place.

    Tensors that forward computed and kept (`self.last = x`) are copied without their history.
    """
    memo = dict(replaced or {})
    for m in model.modules():
        for value in vars(m).values():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(model, memo)


def tensors_in(out):
    """All tensors that a network returned, in dicts, lists, tuples, dataclasses and objects."""
    found = []
    for leaf in tree_leaves(out):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            found += tensors_in(vars(leaf))
    return found
