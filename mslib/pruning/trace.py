"""Following channels: run a network without numbers, and watch every operation PyTorch carries out.

The network runs on the meta device, where tensors have shapes but no numbers. Each operation of
PyTorch's core (ATen) passes through `Tracer`, which labels the elements of every tensor with the
ids of their channels:

- A convolution or a linear layer reads a row of ids and begins new ones.
- An operation that only moves elements (view, permute, split, cat …) is carried out on the labels.
- A pointwise operation (add, mul, relu …) joins the ids that meet in an element.
- Pooling and means over pixels pass ids on, if these do not differ from pixel to pixel.
- Whatever else a channel enters keeps it whole, and the reason names the operation.
"""

import functools
import math
import re

import torch
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..networks import PaddedShortcut, ShapesOnly, tensors_among
from .labels import NO_CHANNEL, Notes, Row, Value, Weight

aten = torch.ops.aten

# What PyTorch itself does not tell of its operations, by `is_view` or a tag.
MOVES = {aten._unsafe_view, aten.flip, aten.repeat, aten.roll}
POINTWISE = {aten.hardswish, aten.hardtanh, aten._prelu_kernel, aten.threshold, aten.leaky_relu}
PRODUCTS = {aten.mul, aten.mul_}
CHANNEL_SHUFFLES = {aten.channel_shuffle, aten.native_channel_shuffle}
SHUFFLES = {aten.pixel_shuffle, aten.pixel_unshuffle, *CHANNEL_SHUFFLES}
MEANS = {aten.mean, aten.sum, aten.amax, aten.amin}
SOFTMAX = {aten._softmax, aten._log_softmax, aten._safe_softmax}
OVER_PIXELS = ("_pool", "upsample", "reflection_pad", "replication_pad")


class Tracer(ShapesOnly):
    """Notes in `notes` what becomes of the channels while a network runs inside `with tracer:`.

    weights: id of a parameter or buffer of that network -> its `Weight`; views of them are added.
    """

    def __init__(self, notes: Notes, weights: dict[int, Weight], modules: dict):
        super().__init__()
        self.notes, self.weights, self.modules = notes, weights, modules
        self.values: dict[int, Value] = {}  # id of a tensor -> what is known of it
        self.alive: list = []  # all tensors: while they are, no other gets the id of one
        self.sharing: dict[int, list[int]] = {}  # storage -> ids of labelled tensors that lie in it
        self.touched: set[str] = set()  # names of the weights that were used

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        stays = _stays(func, args)  # asked before: it may happen in place
        out = self.run(func, args, kwargs)
        tensors = tensors_among(args, kwargs)
        self.alive.append((out, tensors))
        self.touched.update(self.weights[id(t)].name for t in tensors if id(t) in self.weights)
        known = [v for t in tensors if (v := self._read(t)) is not None]
        elsewhere = False  # whether a copy on another device was written instead
        if func._schema.is_mutable:
            elsewhere = out is not args[0]
            self._written(func, args[0])
        if self._layer(func.overloadpacket, args, out):
            return out
        if not known:
            self._move_weight(func, args, kwargs, out)
        elif stays:
            self._label(out, Value.of(known[0]))
        elif elsewhere or not self._passes_on(func, func.overloadpacket, args, kwargs, out):
            self._lose(func, known)
        return out

    def _lose(self, func, values: list[Value]) -> None:
        for value in values:
            self.notes.keep(value.ids, f"it enters {_name(func)!r}, which mslib cannot cut")

    # ---- what is known of a tensor ----

    def _read(self, tensor: torch.Tensor) -> Value | None:
        """The value of a tensor that an operation reads; None where there is none (any more)."""
        value = self.values.get(id(tensor))
        if value is None:
            return None
        if value.stale:
            self.notes.keep(value.ids, f"{value.stale!r} changed it in place through another view")
            del self.values[id(tensor)]
            return None
        if sum(size > 1 for size in value.ids.shape) > 1:  # joins since may have made it simpler
            readers, value = value.readers, value.compact(self.notes)
            self.values[id(tensor)], value.readers = value, readers
        value.readers += 1
        return value

    def _label(self, out: torch.Tensor, value: Value) -> bool:
        self.values[id(out)] = value
        self.sharing.setdefault(out.untyped_storage()._cdata, []).append(id(out))
        return True

    def _written(self, func, tensor: torch.Tensor) -> None:
        """`func` changed `tensor` in place: other views of its storage are not what they were."""
        for other in self.sharing.get(tensor.untyped_storage()._cdata, ()):
            if other != id(tensor) and other in self.values:
                self.values[other].stale = _name(func)

    def _move_weight(self, func, args, kwargs, out) -> None:
        """A view of a weight, such as a linear layer's transposed matrix, is still that weight."""
        if not args or id(args[0]) not in self.weights or not isinstance(out, torch.Tensor):
            return
        if func.is_view or func.overloadpacket is aten._unsafe_view:
            weight = self.weights[id(args[0])]
            self.weights[id(out)] = weight.view(func(weight.data, *args[1:], **kwargs))

    def _row(self, x: torch.Tensor, layer: str, dim: int = 1) -> Row | None:
        """The row of channels in axis `dim` that a layer reads; what is mixed up stays whole."""
        value = self.values.get(id(x))
        row = value.row(dim, x.shape) if value else None
        if value and not row:
            self.notes.keep(value.ids, f"{layer} reads it along other axes than the channels")
        return row

    # ---- layers: True if `packet` is one whose weight can be cut ----

    def _layer(self, packet, args, out) -> bool:
        if packet is aten.convolution:
            return self._convolution(args, out)
        if packet in (aten.mm, aten.bmm):
            return self._linear(None, args[0], args[1], out)
        if packet is aten.addmm:
            return self._linear(args[0], args[1], args[2], out)
        return packet is aten.native_batch_norm and self._batch_norm(args, out[0])

    def _convolution(self, args, out) -> bool:
        """args: x [N, in, …], weight, bias, stride, padding, dilation, transposed, …, groups."""
        x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
        own = self.weights.get(id(weight))
        if own is None or own.moved:
            return False  # computed on the way, as by weight standardization
        row = self._row(x, own.layer)
        if groups > 1 and not isinstance(self.modules.get(own.layer), _ConvNd):
            if row:  # its number of groups stands in forward, out of reach
                self.notes.keep(row.ids, f"{own.layer} is used by a function, in groups")
            nothing = torch.full((out.shape[1],), NO_CHANNEL)
            return self._label(out, Value.unknown(nothing).along(1, out.ndim))
        # A cut grouped convolution may be left with one channel a group, a depthwise one with one.
        depthwise = 1 < groups == x.shape[1] and own.layer not in self.notes.dense_before
        if row and (depthwise or own.layer in self.notes.depthwise):
            made = self._depthwise(weight, bias, row, out.shape[1] // groups, transposed)
        else:
            made = self._dense(own, bias, row, out.shape[1], groups, transposed)
        return self._label(out, made.along(1, out.ndim))

    def _linear(self, bias, x, weight, out) -> bool:
        """x [(N,) M, in] times a transposed weight [(N,) in, out]."""
        own, last = self.weights.get(id(weight)), out.ndim - 1
        if own is None or not own.transposed:
            return False
        made = self._dense(own, bias, self._row(x, own.layer, last), out.shape[last], 1, False)
        return self._label(out, made.along(last, out.ndim))

    def _dense(
        self, own: Weight, bias, row: Row | None, width: int, groups: int, transposed: bool
    ) -> Value:
        """A layer each of whose outputs sums over what it reads; it begins `width` channels.

        Its weight is [out, in / groups, …], or [in, out / groups, …] if it is transposed.
        """
        notes, ids = self.notes, self.notes.begin(own.layer, width)
        notes.outputs[own.layer] = ids
        notes.join_parts(ids, width // groups)  # all groups lose the same places
        notes.slice(own.name, int(transposed), ids[: width // groups] if transposed else ids)
        self._slice(bias, ids)
        if row:
            part = len(row.ids) // groups
            notes.join_parts(row.ids, part)
            notes.slice(own.name, 1 - transposed, row.ids if transposed else row.ids[:part])
            notes.read(own.layer, row, constant=not transposed and own.layer in self.modules)
        elif groups > 1:
            notes.keep(ids, f"{own.layer} is grouped, and what it reads cannot be followed")
        return Value.unknown(ids, own.layer)

    def _depthwise(self, weight, bias, row: Row, times: int, transposed: bool) -> Value:
        """Each channel for itself, `times` outputs of each: they have the ids of what is read."""
        own = self.weights[id(weight)]
        ids, dead, constant = (t.repeat_interleave(times) for t in row)
        self.notes.outputs.setdefault(own.layer, ids)
        self.notes.depthwise[own.layer] = row.ids
        self.notes.slice(own.name, 0, row.ids if transposed else ids)
        self._slice(bias, ids)
        # A constant stays one but for the border; a transposed convolution makes a pattern of it.
        kernel = torch.tensor(torch.nan) if transposed else self._numbers(weight).flatten(1).sum(1)
        constant = constant * kernel
        if bias is not None:
            dead, constant = torch.zeros_like(dead), constant + self._numbers(bias)
        return Value(ids, dead, constant, own.layer)

    def _batch_norm(self, args, out) -> bool:
        """args: x [N, C, …], γ, β, mean, variance, training, …"""
        x, gamma, beta, mean, variance, training = args[:6]
        own = self.weights.get(id(mean if gamma is None else gamma))
        if own is None:
            return False
        notes, norm, row = self.notes, own.module, self._row(x, own.module)
        ids = row.ids if row else notes.begin(norm, x.shape[1])
        if not row:
            notes.keep(ids, f"what {norm} reads cannot be followed")
        by_function = not isinstance(self.modules.get(norm), _BatchNorm)
        if gamma is None or beta is None or training or by_function:
            notes.keep(ids, f"{norm} is no BatchNorm with γ, β and running statistics")
        for weight in (gamma, beta, mean, variance):
            self._slice(weight, ids)
        if gamma is None or beta is None or by_function:
            return self._label(out, Value.unknown(ids, norm).along(1, out.ndim))
        value = self.values.get(id(x))
        notes.scale(norm, ids, None if training or mean is None else value)
        made = Value(ids, ids != NO_CHANNEL, self._numbers(beta).expand(ids.shape), norm)
        return self._label(out, made.along(1, out.ndim))

    def _slice(self, weight, ids: torch.Tensor) -> None:
        """Note that the only axis of a bias, a γ … holds the channels `ids`."""
        if weight is not None and id(weight) in self.weights:
            self.notes.slice(self.weights[id(weight)].name, 0, ids)

    # ---- operations between layers: True if they pass the channels on ----

    def _passes_on(self, func, packet, args, kwargs, out) -> bool:
        if packet in (aten.cat, aten.stack):
            return self._cat(packet, args, kwargs, out)
        if _is_pointwise(func) or packet is aten._to_copy:
            return self._pointwise(func, packet, args, kwargs, out)
        value = self.values.get(id(args[0]))
        if value is None:
            return False
        if packet in SHUFFLES:
            return self._shuffle(packet, value, args, out)
        if (func.is_view and packet is not aten.as_strided) or packet in MOVES:
            return self._move(func, packet, value, args, kwargs, out)
        if packet is aten.constant_pad_nd:
            return self._pad(value, args, kwargs, out)
        if packet is aten.index_select:
            return self._shortcut(value, args, out)
        if packet in MEANS:
            return self._mean(packet, value, args, out)
        if packet in SOFTMAX:
            same = not value.varies(args[1] % out.ndim)
            return same and self._label(out, Value.unknown(value.ids))
        if any(word in _name(func) for word in OVER_PIXELS):
            out = out[0] if isinstance(out, tuple) else out
            axes = re.search(r"[123](?=d)", _name(func))  # the last 1, 2 or 3 are pooled over
            same = axes is not None and not any(value.varies(-1 - d) for d in range(int(axes[0])))
            return same and self._label(out, Value.of(value))
        return False

    def _move(self, func, packet, value: Value, args, kwargs, out) -> bool:
        """Carry the operation out on the labels; join what can only go together afterwards."""
        shape, what = args[0].shape, _name(func)
        if value.ids.numel() > 1 and packet not in (aten.permute, aten.transpose):
            self.notes.suspect(value.ids, repr(what))
        outs = [out] if isinstance(out, torch.Tensor) else out
        if packet in (aten.split, aten.split_with_sizes, aten.slice):
            place = 1 if packet is aten.slice else 2
            dim = kwargs.get("dim", args[place] if len(args) > place else 0) % len(shape)
            if value.varies(dim) and shape[dim] % outs[0].shape[dim]:
                return False  # parts of unequal size
            if value.varies(dim):
                self.notes.join_parts(value.ids.movedim(dim, 0), outs[0].shape[dim])
        axis = (args[1] if len(args) > 1 else 0) if packet in (aten.select, aten.unbind) else None
        if axis is not None and value.varies(axis % len(shape)):
            return False  # one channel by its number
        if packet in (aten.view, aten._unsafe_view):
            moved = value.map(lambda t: t.expand(shape).reshape(out.shape))
        else:
            moved = value.map(lambda t: func(t.expand(shape), *args[1:], **kwargs))
        for result, labels in zip(outs, moved, strict=True):
            self._label(result, self.notes.settle(labels))
        return True

    def _shuffle(self, packet, value: Value, args, out) -> bool:
        """Channel and pixel shuffles of a factor r, on a row of channels [C]."""
        axis = 1 if packet in CHANNEL_SHUFFLES else out.ndim - 3
        row, r = value.row(axis, args[0].shape), args[1]
        if not row:
            return False
        if packet is aten.pixel_unshuffle:  # the pixels of a channel become r² channels
            made = [t.repeat_interleave(r * r) for t in row]
        elif packet is aten.pixel_shuffle:  # r² channels in a row become the pixels of one
            ids, dead, constant = (t.reshape(-1, r * r) for t in row)
            self.notes.join(ids[:, :1], ids)
            same = (constant == constant[:, :1]).all(1)
            made = [ids[:, 0], dead.all(1), torch.where(same, constant[:, 0], torch.nan)]
        else:
            self.notes.join_parts(row.ids, len(row.ids) // r)
            made = [t.reshape(r, -1).T.flatten() for t in row]
        return self._label(out, Value.of(made).along(axis, out.ndim))

    def _cat(self, packet, args, kwargs, out) -> bool:
        """Rows of ids behind one another; what meets along the other axes is joined."""
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.ndim
        tensors = [t for t in args[0] if t.ndim > 1 or t.numel()]  # cat passes over empty ones
        parts = [self._value(t) for t in tensors]
        sizes = [1 if packet is aten.stack else t.shape[dim] for t in tensors]
        if packet is aten.stack:
            parts = [p.map(lambda t: t.unsqueeze(dim))[0] for p in parts]
        if any(p.varies(d) for p in parts for d in range(out.ndim) if d != dim):
            for part in parts[1:]:
                self.notes.join(parts[0].ids, part.ids)
        rows = []
        for part, size in zip(parts, sizes, strict=True):
            shape = (*out.shape[:dim], size, *out.shape[dim + 1 :])
            rows.append(part.map(lambda t, shape=shape: t.expand(shape))[0])
        labels = (torch.cat(columns, dim) for columns in zip(*map(tuple, rows), strict=True))
        return self._label(out, self.notes.settle(Value.of(labels)))

    def _value(self, tensor: torch.Tensor) -> Value:
        """What is known of a tensor. One without channels lies at places that never go."""
        nothing = Value.unknown(torch.full((1,) * tensor.ndim, NO_CHANNEL))
        return self.values.get(id(tensor), nothing)

    def _pointwise(self, func, packet, args, kwargs, out) -> bool:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        labelled = [t for t in tensors if id(t) in self.values]
        alone = not any(isinstance(v, torch.Tensor) for v in kwargs.values())
        if not (labelled and alone and isinstance(out, torch.Tensor)):
            return False
        known = [self.values[id(t)].aligned(out.ndim) for t in labelled]
        ids = known[0].ids
        for value in known[1:]:
            ids = self._meet(ids, value.ids)
        for t in tensors:
            if id(t) not in self.values and not self._meet_tensor(Value.unknown(ids), t, out):
                return False
        if len(known) > 1 and packet not in PRODUCTS:
            self.notes.add(ids, [self.values[id(t)].maker for t in labelled])
        try:
            dead, constant = self._numbers_of(func, args, kwargs, out.ndim)
        except (RuntimeError, NotImplementedError):  # PyTorch has no such kernel for float64
            return False
        made = Value.of(torch.broadcast_tensors(ids, dead, constant))
        return self._label(out, made.compact(self.notes))

    def _meet(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Join the ids of two operands and return them; one that is spread over others stays."""
        for ids, other in ((a, b), (b, a)):
            if any(n == 1 < m for n, m in zip(ids.shape, other.shape, strict=True)):
                self.notes.keep(ids, "it is spread over several channels")
                return other
        self.notes.join(a, b)
        return a if a.numel() >= b.numel() else b

    def _meet_tensor(self, value: Value, tensor: torch.Tensor, out) -> bool:
        """A weight with a number for each channel is cut along; another tensor must not care."""
        last = range(-tensor.ndim, 0)
        axes = [out.ndim + d for d in last if tensor.shape[d] > 1 and value.varies(d)]
        if not axes:
            return True
        weight, row = self.weights.get(id(tensor)), value.row(axes[0], out.shape)
        if weight is None or weight.axis is None or not row:
            return False
        self.notes.slice(weight.name, weight.axis, row.ids)
        return True

    def _numbers(self, tensor: torch.Tensor) -> torch.Tensor:
        """float64 numbers of a tensor, nan where they are not known."""
        weight = self.weights.get(id(tensor))
        if weight is None:
            return torch.tensor(torch.nan, dtype=torch.float64)
        self.notes.asked.add(weight.name)
        return weight.numbers()

    def _numbers_of(self, func, args, kwargs, ndim: int):
        """(dead, constant) behind a pointwise operation.

        It is carried out with the numbers that are known, and eight others for each that is not:
        what comes out the same each time does not depend on them.
        """
        operands = list(args)
        for i, a in enumerate(args):
            if id(a) in self.values:
                value = self.values[id(a)].aligned(ndim)
                zeros = torch.where(value.dead, 0.0, torch.nan)
                operands[i] = _guessed(torch.stack([zeros, value.constant]), i)
            elif isinstance(a, torch.Tensor):
                numbers = self._numbers(a)
                numbers = numbers[(None,) * (ndim - numbers.ndim)]
                nothing = torch.full_like(numbers, torch.nan)
                operands[i] = _guessed(torch.stack([nothing, numbers]), i)
        found = _apply(func, operands, kwargs).double()  # [8, 2, …]
        silent, constant = torch.where((found == found[0]).all(0), found[0], torch.nan)
        return silent == 0, constant

    def _pad(self, value: Value, args, kwargs, out) -> bool:
        """Zeros around the image change no channel. Zeros beside the channels belong to none."""
        pad, number = args[1], args[2] if len(args) > 2 else kwargs.get("value", 0)
        beside, shape = [0] * len(pad), list(value.ids.shape)
        for i in range(len(pad) // 2):
            dim, both = out.ndim - 1 - i, pad[2 * i : 2 * i + 2]
            if any(both) and (value.varies(dim) or dim == 1):
                if min(both) < 0:
                    return False
                beside[2 * i : 2 * i + 2], shape[dim] = both, args[0].shape[dim]
        ids, dead, constant = (t.expand(shape) for t in value)
        dead = dead & (number == 0)
        ids, constant = F.pad(ids, beside, value=NO_CHANNEL), F.pad(constant, beside, value=number)
        return self._label(out, Value(ids, F.pad(dead, beside, value=number == 0), constant))

    def _shortcut(self, value: Value, args, out) -> bool:
        """An option-A shortcut: out[j] copies x[source[j]], and x[0] is zero."""
        weight, row = self.weights.get(id(args[2])), value.row(1, args[0].shape)
        module = self.modules.get(weight.module) if weight else None
        if weight is None or not row or not isinstance(module, PaddedShortcut):
            return False
        source, shortcut = weight.data.cpu(), weight.module
        ids = self.notes.begin(shortcut, len(source))
        made = Value(ids, row.dead[source], row.constant[source], shortcut)
        self.notes.copy(shortcut, row.ids[1:], made, source)
        return self._label(out, made.along(1, out.ndim))

    def _mean(self, packet, value: Value, args, out) -> bool:
        """The mean, sum or extreme over axes along which the ids do not differ."""
        ndim, dims = args[0].ndim, args[1] if len(args) > 1 else None
        if not isinstance(dims, list | tuple) or any(value.varies(d % ndim) for d in dims):
            return False
        gone = {d % ndim for d in dims}
        if packet is aten.sum:
            times = math.prod(args[0].shape[d] for d in gone)
            value = Value(value.ids, value.dead, value.constant * times)
        if out.ndim < ndim:
            left = [d for d in range(ndim) if d not in gone]
            value = value.map(lambda t: t.reshape([t.shape[d] for d in left]))[0]
        return self._label(out, Value.of(value))


def _guessed(numbers: torch.Tensor, place: int) -> torch.Tensor:
    """float64 [8, …]: the numbers, and for each nan eight of both signs, others at each place."""
    return torch.where(numbers.isnan(), _guesses(numbers.shape, place), numbers.double())


@functools.lru_cache(100)
def _guesses(shape: torch.Size, place: int) -> torch.Tensor:
    draws = torch.rand(8, *shape, generator=torch.Generator().manual_seed(place)).double()
    sign = 1 - 2 * (torch.arange(8) >> place % 3 & 1).reshape(8, *(1,) * len(shape))
    return sign * (0.5 + 3 * draws)


def _is_pointwise(func) -> bool:
    """An in-place operation, such as mish_, is what the one without the underscore is."""
    name = func.overloadpacket.__name__
    same = getattr(aten, name.rstrip("_"), None) if name.endswith("_") else None
    plain = getattr(same, func._overloadname, func)
    tagged = torch.Tag.pointwise in (*func.tags, *plain.tags)
    return tagged or plain.overloadpacket in POINTWISE


def _stays(func, args) -> bool:
    """Whether as_strided, as behind an average in PyTorch 2.8, leaves every number where it was."""
    if func.overloadpacket not in (aten.as_strided, aten.as_strided_) or len(args) > 3:
        return False
    tensor, shape, stride = args
    axes = zip(shape, tensor.stride(), stride)
    return [*tensor.shape] == [*shape] and all(a == b for size, a, b in axes if size > 1)


def _apply(func, operands, kwargs):
    """A pointwise operation on operands [8, …], as large as its result: it may work in place."""
    whole = iter(torch.broadcast_tensors(*[a for a in operands if isinstance(a, torch.Tensor)]))
    operands = [next(whole).clone() if isinstance(a, torch.Tensor) else a for a in operands]
    if func.overloadpacket is aten.where:
        operands[0] = operands[0] > 0
    if func.overloadpacket is aten._to_copy:  # to another type or device
        return operands[0]
    return func(*operands, **kwargs)


def _name(func) -> str:
    """An operation's name for people: aten.native_layer_norm.default -> layer_norm."""
    return func.overloadpacket.__name__.strip("_").removeprefix("native_")
