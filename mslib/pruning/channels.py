"""The channel graph: which layers share a channel, found by tracing the network, not by layer names.

Every tensor of the network is described by the ids of its channels, one integer a channel. A convolution makes new
ids; BatchNorm, ReLU, pooling and a depthwise convolution pass them on; concatenation puts rows of ids in a row; an
addition or a product makes two rows of ids the same, a grouped convolution the channels at one place of its groups; a
layer that reads a tensor is remembered with the ids that it reads. Channels that ended up with one id can only be
removed together.
"""

import math
import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..networks import PaddedShortcut

ELEMENTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Tanh,
    nn.ELU,
    nn.PReLU,
    nn.Hardtanh,
    nn.Softplus,
    nn.Mish,
    F.relu,
    F.relu_,
    torch.relu,
    torch.relu_,
    F.relu6,
    F.leaky_relu,
    F.silu,
    F.gelu,
    F.hardswish,
    F.hardsigmoid,
    F.mish,
    F.elu,
    F.sigmoid,
    torch.sigmoid,
    torch.tanh,
    "relu",
    "relu_",
    "sigmoid",
    "tanh",
)
IDENTITY = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    F.dropout,
    F.dropout2d,
    "stochastic_depth",
    "contiguous",
    "clone",
)
POOLING = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d,
    nn.Flatten,
    torch.flatten,
    "flatten",
    "mean",
    torch.mean,
)
ADDITION = (operator.add, operator.iadd, torch.add, "add", "add_")
PRODUCT = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
SHAPES = ("size", getattr, operator.getitem, "dim")  # applied to a shape they touch no channel


@dataclass
class Value:
    """What is known of a tensor's channels. All fields but `maker` have one entry a channel."""

    ids: torch.Tensor  # int64
    dead: torch.Tensor  # bool: zero everywhere once γ and β of the channel's BatchNorms are zero
    constant: torch.Tensor  # what it holds once γ alone is zero; nan if that depends on the image
    maker: str = ""  # the module that made it, when nothing stands between


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, PaddedShortcut) or super().is_leaf_module(module, name)


class ChannelGraph:
    """The channels of `model` and the layers that share them.

    `outputs`, `norms`, `inputs`: module name -> ids of the channels it writes, scales, reads.
    `slopes`: the same of PReLUs. `constants`: reader -> what each channel it reads would hold with γ = 0. `pads`: option-A shortcuts.
    `norm_after`: convolution -> the BatchNorm that alone reads it. `norm_beside`: shortcut -> the BatchNorm it is added to.
    `calls`: module name -> how often it is called.
    `root[id]`: the id that stands for all ids joined with it. `reasons`: root -> why it must stay.

    Raises ValueError when the network cannot be traced.
    """

    def __init__(self, model, example=None):
        self.model, self.example = model, example
        self.modules = dict(model.named_modules())
        self.parent, self.kept, self.needs, self.added = [], {}, [], []
        self.outputs, self.norms, self.inputs, self.slopes, self.constants, self.pads = (
            {},
            {},
            {},
            {},
            {},
            {},
        )
        self.norm_after, self.norm_beside = {}, {}
        try:
            nodes = list(_Tracer().trace(model).nodes)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be traced by torch.fx ({str(error).splitlines()[0]}); "
                "its forward must not branch on tensor values"
            ) from error
        self.calls = Counter(node.target for node in nodes if node.op == "call_module")
        values = {}
        for node in nodes:
            values[node] = self._visit(node, values)
        self.root = torch.tensor([self._find(i) for i in range(len(self.parent))])
        self.gated = torch.zeros(
            len(self.root), dtype=torch.bool
        )  # [ids]: some reader sees more of it than a constant
        for name, constant in self.constants.items():
            self.gated[self.root[self.inputs[name][constant.isnan()]]] = True
        self.gated = self.gated[self.root]
        self.reasons = {self._find(i): reason for i, reason in self.kept.items()}

    # -- joining channels --

    def _fresh(self, n):
        start = len(self.parent)
        self.parent.extend(range(start, start + n))
        return torch.arange(start, start + n)

    def _find(self, i):
        while self.parent[i] != i:
            self.parent[i] = i = self.parent[self.parent[i]]
        return i

    def _join(self, a, b):
        for i, j in zip(a.tolist(), b.tolist()):
            self.parent[self._find(i)] = self._find(j)

    def _keep(self, ids, reason):
        for i in ids.tolist():
            self.kept.setdefault(i, reason)

    def _note(self, table, name, ids):
        """Remember that module `name` touches `ids`; a module called twice touches the same channels twice."""
        if name in table:
            self._join(table[name], ids)
        table.setdefault(name, ids)

    # -- one node of the traced network --

    def _visit(self, node, values):
        inputs = [values[n] for n in node.all_input_nodes]
        known = [v for v in inputs if isinstance(v, Value)]
        if node.op == "output":
            for v in known:
                self._keep(v.ids, "it is an output of the network")
        if node.op in ("placeholder", "get_attr", "output"):
            return None
        target = self.modules[node.target] if node.op == "call_module" else node.target
        kind = type(target) if node.op == "call_module" else target
        if node.op == "call_module" and (
            layer := self._layer(node.target, target, known[0] if known else None, node)
        ):
            return layer
        if not known:
            return None  # the network's input, or a shape
        value = known[0]
        if (
            getattr(kind, "__name__", "") == "stochastic_depth"
        ):  # by name: importing torchvision takes a second
            kind = "stochastic_depth"
        if kind in IDENTITY and len(known) == 1:
            return Value(value.ids, value.dead, value.constant)
        if kind in ELEMENTWISE and len(known) == 1:
            return self._elementwise(value, target, node)
        if kind in POOLING and len(known) == 1 and _pools(node, kind, target):
            return Value(value.ids, value.dead, value.constant)
        if kind is F.pad and len(node.args) == 2 and len(node.args[1]) <= 4 and not node.kwargs:
            return Value(value.ids, value.dead, value.constant)  # zeros around the image
        if (
            kind in (*ADDITION, *PRODUCT)
            and len(known) == len(node.args) == 2
            and not node.kwargs
            and len(known[0].ids) == len(known[1].ids)
        ):
            return self._join_values(*known, product=kind in PRODUCT)
        if (
            kind is torch.cat
            and (node.args[1:] or tuple(node.kwargs.values())) in ((1,), (-3,))
            and len(known) == len(inputs)
        ):
            parts = [values[n] for n in node.args[0]]
            return Value(
                *(
                    torch.cat([getattr(part, key) for part in parts])
                    for key in ("ids", "dead", "constant")
                )
            )
        if kind in SHAPES and (
            kind == "size" or kind == "dim" or node.args[1] in ("shape", "ndim")
        ):
            return None
        if (
            kind in ("view", "reshape", torch.reshape)
            and node.args[-1] == -1
            and len(node.args) == 3
        ):
            return Value(value.ids, value.dead, value.constant)  # view(n, -1): flatten
        if (
            kind is operator.getitem
            and isinstance(node.args[1], tuple)
            and node.args[1][:2] == (slice(None),) * 2
        ):
            return Value(value.ids, value.dead, value.constant)  # x[:, :, ::2, ::2]
        what = (
            type(target).__name__
            if node.op == "call_module"
            else getattr(target, "__name__", str(target))
        )
        for v in known:
            self._keep(v.ids, f"it enters {what!r} ({node.name}), which mslib cannot cut")
        return None

    def _layer(self, name, m, value, node):
        """What a layer with weights makes; None for any other."""
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            width, groups = (
                (m.out_channels, m.groups) if isinstance(m, nn.Conv2d) else (m.out_features, 1)
            )
            if value is not None and groups > 1 and groups == m.in_channels:
                return self._depthwise(name, m, value)
            out = self._fresh(width)
            if value is not None:
                self._read(name, m, value, groups)
            elif groups > 1:
                self._keep(out, f"{name} is a grouped convolution whose input cannot be followed")
            for other in out.reshape(groups, -1)[1:]:
                self._join(out[: len(other)], other)
            self._note(self.outputs, name, out)
            return Value(
                out, torch.zeros(width, dtype=torch.bool), torch.full((width,), torch.nan), name
            )
        if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d)) and value is not None:
            ids, dead, constant = self._spread(name, value, m.num_features)
            self._note(self.norms, name, ids)
            if m.weight is None or m.running_mean is None:
                self._keep(
                    ids,
                    f"{name} has no γ (affine=False) or no statistics (track_running_stats=False)",
                )
                return Value(
                    ids, torch.zeros_like(dead), torch.full_like(constant, torch.nan), name
                )
            if (
                isinstance(self.modules.get(value.maker), nn.Conv2d)
                and len(node.all_input_nodes[0].users) == 1
            ):
                self.norm_after[value.maker] = name
            return Value(ids, torch.ones_like(dead), m.bias.detach().cpu().float(), name)
        if isinstance(m, PaddedShortcut) and value is not None:
            source = m.source.cpu()
            out = self._fresh(len(source))
            self.needs += [(int(j), int(value.ids[s - 1])) for j, s in zip(out, source) if s > 0]
            dead = torch.cat([torch.ones(1, dtype=torch.bool), value.dead])[source]
            constant = torch.cat([torch.zeros(1), value.constant])[source]
            self.pads[name] = (value.ids, out, constant)
            return Value(out, dead, constant, name)
        return None

    def _depthwise(self, name, m, value):
        """Each channel for itself: what it writes has the ids of what it reads."""
        times = m.out_channels // m.in_channels
        ids, dead, constant = (
            t.repeat_interleave(times) for t in (value.ids, value.dead, value.constant)
        )
        self._note(self.outputs, name, ids)
        constant = constant * m.weight.detach().cpu().float().flatten(1).sum(1)
        if m.bias is not None:
            constant = constant + m.bias.detach().cpu().float()
            dead = torch.zeros_like(dead)
        return Value(ids, dead, constant, name)

    def _read(self, name, m, value, groups=1):
        ids, dead, constant = self._spread(
            name, value, m.in_channels if isinstance(m, nn.Conv2d) else m.in_features
        )
        for other in ids.reshape(groups, -1)[1:]:
            self._join(ids[: len(other)], other)
        self._keep(ids[~dead], f"{name} reads it before any BatchNorm has scaled it")
        self._note(self.inputs, name, ids)
        same = constant == self.constants.get(
            name, constant
        )  # a layer called twice may read two constants
        self.constants[name] = torch.where(same, constant, torch.nan)

    def _spread(self, name, value, features):
        """(ids, dead, constant) of a tensor, one a feature where it was flattened with its pixels."""
        if features % len(value.ids):
            raise ValueError(
                f"{name} reads {features} features from {len(value.ids)} channels: not a whole number each"
            )
        return (
            t.repeat_interleave(features // len(t)) for t in (value.ids, value.dead, value.constant)
        )

    def _elementwise(self, value, target, node):
        if isinstance(target, nn.PReLU) and target.num_parameters > 1:
            self._note(self.slopes, node.target, value.ids)

        options = {
            k: v for k, v in node.kwargs.items() if not isinstance(v, fx.Node)
        }  # such as a slope

        def f(x):
            if node.op == "call_method":
                return getattr(x.clone(), target)()
            if isinstance(target, nn.PReLU):  # a slope for each channel
                return F.prelu(x[None], target.weight.detach().cpu().float())[0]
            return (
                type(target).forward(target, x.clone())
                if isinstance(target, nn.Module)
                else target(x.clone(), *node.args[1:], **options)
            )

        with torch.no_grad():
            zero_stays = f(torch.zeros_like(value.constant)) == 0
            return Value(value.ids, value.dead & zero_stays, f(value.constant))

    def _join_values(self, a, b, product):
        """A sum is silent where both are; a product (squeeze-and-excitation) where one is."""
        self._join(a.ids, b.ids)
        if product:
            return Value(a.ids, a.dead | b.dead, a.constant * b.constant)
        self.added.append(a.ids)
        for pad, norm in ((a, b), (b, a)):
            if pad.maker in self.pads and norm.maker in self.norms:
                self.norm_beside[pad.maker] = norm.maker
        return Value(a.ids, a.dead & b.dead, a.constant + b.constant)

    # -- answers --

    def prunable_norms(self, residual=False):
        """Names of the BatchNorms whose channels can be removed, in order.

        Without `residual`, only those whose channels take part in no addition (a block's inner channels).
        """
        stay = set(self.reasons)
        if self.added and not residual:
            stay.update(self.root[torch.cat(self.added)].tolist())
        return [
            name for name, ids in self.norms.items() if stay.isdisjoint(self.root[ids].tolist())
        ]

    @property
    def conv_before(self):
        """BatchNorm -> the convolution right before it."""
        return {norm: conv for conv, norm in self.norm_after.items()}

    def reason(self, norm):
        """Why BatchNorm `norm` cannot be pruned; empty if it can."""
        return next(
            (self.reasons[r] for r in self.root[self.norms[norm]].tolist() if r in self.reasons), ""
        )

    def dropped(self, masks):
        """Bool [number of ids]: the channels that go. One goes only if every BatchNorm on it drops it."""
        drop = torch.zeros(len(self.root), dtype=torch.bool)
        keep = torch.zeros(len(self.root), dtype=torch.bool)
        for name, ids in self.norms.items():
            mask = masks.get(name)
            drop[self.root[ids]] = True
            keep[self.root[ids] if mask is None else self.root[ids][mask.cpu()]] = True
        keep[list(self.reasons)] = True
        drop &= ~keep
        while wrong := [
            int(self.root[j])
            for j, i in self.needs
            if drop[self.root[j]] and not drop[self.root[i]]
        ]:
            drop[wrong] = (
                False  # a padded channel is empty only if the channel that it copies goes too
            )
        return drop[self.root]

    def share_left(self, layer, drop):
        """The share of the MACs of `layer` that is left without the ids in `drop` (see `dropped`)."""
        kept = [
            float((~drop[table[layer]]).float().mean())
            for table in (self.inputs, self.outputs)
            if layer in table
        ]
        return math.prod(kept)

    def emptied(self, drop):
        """Names of the layers of which `drop` (see `dropped`) leaves nothing."""
        return [name for name, ids in self.outputs.items() if drop[ids].all()]


def _pools(node, kind, target):
    """Whether flatten takes the channels and all behind, and mean the pixels: both leave channels apart."""
    rest = [*node.args[1:], *node.kwargs.values()]
    if kind is nn.Flatten:
        return (target.start_dim, target.end_dim) == (1, -1)
    if kind in ("flatten", torch.flatten):
        return rest in ([1], [1, -1])
    if kind in ("mean", torch.mean):
        return (
            bool(rest) and not isinstance(rest[0], int) and sorted(d % 4 for d in rest[0]) == [2, 3]
        )
    return True


def as_graph(model, example=None):
    """The `ChannelGraph` of a model and an example; one that was made before is handed through."""
    return model if isinstance(model, ChannelGraph) else ChannelGraph(model, example)
