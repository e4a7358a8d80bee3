"""Following channels: run a network without numbers, and watch every operation that PyTorch carries out.

The network runs once on the meta device, where tensors have shapes but no numbers. Each operation of PyTorch's core
(ATen) passes through `Tracer`, which labels the elements of every tensor with the ids of their channels:

- A convolution or a linear layer reads a row of ids and begins new ones.
- An operation that only moves elements (view, permute, split, cat …) is carried out on the labels.
- A pointwise operation (add, mul, relu …) joins the ids that meet in an element.
- Pooling and means over pixels pass ids on, as long as these do not differ from pixel to pixel.
- Whatever else a channel enters keeps it whole, and the reason names the operation.
"""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..networks import PaddedShortcut
from .labels import NO_CHANNEL, Notes, Value, Weight

aten = torch.ops.aten

# What PyTorch does not tell of its operations itself, by is_view or a tag.
MOVES = {aten._unsafe_view, aten.flip, aten.repeat, aten.roll}
SHUFFLES = {
    aten.pixel_shuffle,
    aten.pixel_unshuffle,
    aten.channel_shuffle,
    aten.native_channel_shuffle,
}
POINTWISE = {
    aten.hardswish,
    aten.hardswish_,
    aten.hardtanh,
    aten.hardtanh_,
    aten._prelu_kernel,
    aten._to_copy,
}
PRODUCTS = {aten.mul, aten.mul_}
MEANS = {aten.mean, aten.sum, aten.amax, aten.amin}
SOFTMAX = {aten._softmax, aten._log_softmax, aten._safe_softmax}
OVER_PIXELS = ("_pool", "upsample", "reflection_pad", "replication_pad")
LAYERS = {
    aten.convolution: "_convolution",
    aten.mm: "_linear",
    aten.addmm: "_linear",
    aten.native_batch_norm: "_batch_norm",
}


class Tracer(TorchDispatchMode):
    """Notes in `notes` what becomes of the channels while a network runs inside `with tracer:`.

    weights: id of a parameter or buffer of the running network -> its `Weight`; views of them are added on the way.
    """

    def __init__(self, notes: Notes, weights: dict[int, Weight], modules: dict):
        super().__init__()
        self.notes, self.weights, self.modules = notes, weights, modules
        self.values: dict[int, Value] = {}  # id of a tensor -> what is known of it
        self.alive: list = []  # tensors: while they are, no other gets their id
        self.sharing: dict[
            int, list[int]
        ] = {}  # a storage -> ids of the labelled tensors that lie in it
        self.touched: set[str] = set()  # names of the weights that were used

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = _run(func, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.alive.append((out, tensors))
        self.touched.update(self.weights[id(t)].name for t in tensors if id(t) in self.weights)
        known = [v for t in tensors if (v := self._read(t)) is not None]
        packet = func.overloadpacket
        if func._schema.is_mutable:
            self._written(func, args[0])
        if packet in LAYERS and getattr(self, LAYERS[packet])(args, out):
            return out
        if not known:
            self._move_weight(func, args, kwargs, out)
        elif not self._passes_on(func, packet, args, kwargs, out):
            for value in known:
                self.notes.keep(value.ids, f"it enters {_name(func)!r}, which mslib cannot cut")
        return out

    # ---- what is known of a tensor ----

    def _read(self, tensor: torch.Tensor) -> Value | None:
        """The value of a tensor that an operation reads. None where there is none, or none any more."""
        value = self.values.get(id(tensor))
        if value is None:
            return None
        if value.stale:
            self.notes.keep(value.ids, f"{value.stale!r} changed it in place through another view")
            del self.values[id(tensor)]
            return None
        if (
            sum(size > 1 for size in value.ids.shape) > 1
        ):  # what was joined since may have made it simpler
            readers, value = value.readers, value.compact(self.notes)
            self.values[id(tensor)], value.readers = value, readers
        value.readers += 1
        return value

    def _label(self, out: torch.Tensor, value: Value) -> None:
        self.values[id(out)] = value
        self.sharing.setdefault(out.untyped_storage()._cdata, []).append(id(out))

    def _label_row(self, out: torch.Tensor, row: Value, dim: int = 1) -> bool:
        self._label(out, row.along(dim, out.ndim))
        return True

    def _written(self, func, tensor: torch.Tensor) -> None:
        """`func` changed `tensor` in place: the other views of its storage are not what they were."""
        for other in self.sharing.get(tensor.untyped_storage()._cdata, ()):
            if other != id(tensor) and other in self.values:
                self.values[other].stale = _name(func)

    def _move_weight(self, func, args, kwargs, out) -> None:
        """A view of a weight, such as the transposed matrix of a linear layer, is still that weight."""
        weight = (
            self.weights.get(id(args[0])) if args and isinstance(args[0], torch.Tensor) else None
        )
        if weight is not None and func.is_view and isinstance(out, torch.Tensor):
            self.weights[id(out)] = weight.view(func(weight.data, *args[1:], **kwargs))

    # ---- layers ----

    def _convolution(self, args, out) -> bool:
        """args: x [N, in, …], weight, bias, stride, padding, dilation, transposed, output padding, groups."""
        x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
        own, value = self.weights.get(id(weight)), self.values.get(id(x))
        if own is None or own.moved:
            return False  # computed on the way, as by weight standardization
        row = value and value.row(1, x.shape)
        if value and not row:
            self.notes.keep(value.ids, f"{own.layer} reads its channels mixed with pixels")
        # in a cut network a grouped convolution may be left with one channel a group: it is no depthwise one for that
        if row and 1 < groups == x.shape[1] and own.layer not in self.notes.dense_before:
            return self._label_row(
                out, self._depthwise(own, bias, row, out.shape[1] // groups, transposed)
            )
        made = self._dense(own, bias, row, out.shape[1], groups, transposed)
        if groups > 1 and not row:
            self.notes.keep(
                made.ids, f"{own.layer} is grouped, and what it reads cannot be followed"
            )
        return self._label_row(out, made)

    def _linear(self, args, out) -> bool:
        """args: (bias,) x [M, in], weightᵀ [in, out]."""
        bias, x, weight = args if len(args) == 3 else (None, *args)
        own, value = self.weights.get(id(weight)), self.values.get(id(x))
        if own is None or not own.transposed:
            return False
        row = value and value.row(1, x.shape)
        if value and not row:
            self.notes.keep(value.ids, f"{own.layer} reads another axis than the channels")
        return self._label_row(out, self._dense(own, bias, row, out.shape[1], 1, False))

    def _dense(self, own: Weight, bias, row, width: int, groups: int, transposed: bool) -> Value:
        """A layer each of whose outputs sums over what it reads: begins `width` channels."""
        notes = self.notes
        ids = notes.begin(own.layer, width)
        notes.outputs[own.layer] = ids
        notes.join_parts(ids, width // groups)  # all groups lose the same places
        first = ids[: width // groups]
        # weight: [out, in / groups, …], or transposed [in, out / groups, …]
        notes.slice(own.name, 1 if transposed else 0, first if transposed else ids)
        self._slice(bias, ids)
        if row:
            read = row[0]
            notes.join_parts(read, len(read) // groups)
            notes.read(own.layer, row, constant=not transposed)
            notes.slice(
                own.name,
                0 if transposed else 1,
                read if transposed else read[: len(read) // groups],
            )
        return Value.unknown(ids, own.layer)

    def _depthwise(self, own: Weight, bias, row, times: int, transposed: bool) -> Value:
        """Each channel for itself, `times` outputs of each: they have the ids of what is read."""
        ids, dead, constant = (t.repeat_interleave(times) for t in row)
        self.notes.outputs[own.layer] = ids
        self.notes.depthwise[own.layer] = row[0]
        self.notes.slice(own.name, 0, row[0] if transposed else ids)
        self._slice(bias, ids)
        kernel = own.numbers().flatten(1).sum(1)
        constant = torch.full_like(constant, torch.nan) if transposed else constant * kernel
        if bias is not None:
            dead, constant = torch.zeros_like(dead), constant + self._numbers(bias)
        return Value(ids, dead, constant, own.layer)

    def _batch_norm(self, args, out) -> bool:
        """args: x [N, C, …], γ, β, mean, variance, training, …"""
        x, gamma, beta, mean, variance, training = args[:6]
        own = self.weights.get(id(mean if gamma is None else gamma))
        if own is None:
            return False
        value, notes, norm = self.values.get(id(x)), self.notes, own.layer
        row = value and value.row(1, x.shape)
        ids = row[0] if row else notes.begin(norm, x.shape[1])
        if not row:
            notes.keep(ids, f"what {norm} reads cannot be followed")
            notes.keep(value.ids if value else ids, f"{norm} reads its channels mixed with pixels")
        if gamma is None or beta is None or training:
            notes.keep(
                ids, f"{norm} has no γ (affine=False) or no statistics (track_running_stats=False)"
            )
        for weight in (gamma, beta, mean, variance):
            self._slice(weight, ids)
        if gamma is None:
            return self._label_row(out[0], Value.unknown(ids, norm))
        notes.scale(norm, ids)
        if value and value.maker:
            notes.before_norm.append((value, value.maker, norm))
        constant = self._numbers(beta) if beta is not None else torch.full(ids.shape, torch.nan)
        return self._label_row(out[0], Value(ids, ids != NO_CHANNEL, constant.double(), norm))

    def _slice(self, weight, ids: torch.Tensor) -> None:
        """Note that the only axis of a bias, a γ … holds the channels `ids`."""
        if weight is not None and id(weight) in self.weights:
            self.notes.slice(self.weights[id(weight)].name, 0, ids)

    def _numbers(self, operand):
        """float64 numbers of a tensor, nan where they are not known. What is no tensor stays as it is."""
        if not isinstance(operand, torch.Tensor):
            return operand
        weight = self.weights.get(id(operand))
        return torch.tensor(torch.nan, dtype=torch.float64) if weight is None else weight.numbers()

    # ---- operations between layers: True if they pass the channels on ----

    def _passes_on(self, func, packet, args, kwargs, out) -> bool:
        if packet in (aten.cat, aten.stack):
            return self._cat(packet, args, kwargs, out)
        if torch.Tag.pointwise in func.tags or packet in POINTWISE:
            return self._pointwise(func, packet, args, kwargs, out)
        value = self.values.get(id(args[0])) if isinstance(args[0], torch.Tensor) else None
        if value is None:
            return False
        if packet in SHUFFLES:
            return self._shuffle(packet, value, args, out)
        if func.is_view or packet in MOVES:
            return self._move(func, packet, value, args, kwargs, out)
        if packet is aten.constant_pad_nd:
            return self._pad(value, args, kwargs, out)
        if packet is aten.index_select:
            return self._shortcut(value, args, out)
        if packet in MEANS:
            return self._mean(packet, value, args, out)
        if packet in SOFTMAX and not value.varies(args[1] % out.ndim):
            self._label(out, Value.unknown(value.ids))
            return True
        if any(word in _name(func) for word in OVER_PIXELS):
            first = out[0] if isinstance(out, tuple) else out
            if any(value.varies(d) for d in range(2, first.ndim)):
                return False
            self._label(first, Value(value.ids, value.dead, value.constant))
            return True
        return False

    def _move(self, func, packet, value: Value, args, kwargs, out) -> bool:
        """Carry the operation out on the labels; join what can only go together afterwards."""
        shape, what = args[0].shape, _name(func)
        if any(value.varies(d) for d in range(len(shape))) and packet not in (
            aten.permute,
            aten.transpose,
        ):
            self.notes.rigid.append((value.ids, repr(what)))
        if packet in (aten.split, aten.split_with_sizes, aten.slice):
            place = 1 if packet is aten.slice else 2
            dim = kwargs.get("dim", args[place] if len(args) > place else 0) % len(shape)
            part = (out if isinstance(out, torch.Tensor) else out[0]).shape[dim]
            if value.varies(dim):
                if shape[dim] % part:
                    return False
                self.notes.join_parts(value.ids.movedim(dim, 0), part)
        if packet in (aten.select, aten.unbind) and value.varies(
            (args[1] if len(args) > 1 else 0) % len(shape)
        ):
            return False
        if packet in (aten.view, aten._unsafe_view):
            moved = value.map(lambda t: t.expand(shape).reshape(out.shape))
        else:
            moved = value.map(lambda t: func(t.expand(shape), *args[1:], **kwargs))
        for result, labels in zip(
            [out] if isinstance(out, torch.Tensor) else out, moved, strict=True
        ):
            labels = labels.compact(self.notes)
            self.notes.join_but_last(labels)
            self._label(result, labels.compact(self.notes))
        return True

    def _shuffle(self, packet, value: Value, args, out) -> bool:
        """Channel and pixel shuffles of a factor r, on a row of channels [C]."""
        axis = 1 if packet in (aten.channel_shuffle, aten.native_channel_shuffle) else out.ndim - 3
        row, r = value.row(axis, args[0].shape), args[1]
        if not row:
            return False
        if packet is aten.pixel_unshuffle:  # the pixels of a channel become r² channels
            made = [t.repeat_interleave(r * r) for t in row]
        elif (
            packet is aten.pixel_shuffle
        ):  # r² channels behind one another become the pixels of one
            places = row[0].reshape(-1, r * r)
            self.notes.join(places[:, :1], places)
            made = [t.reshape(-1, r * r)[:, 0] for t in row]
        else:
            self.notes.join_parts(row[0], len(row[0]) // r)
            made = [t.reshape(r, -1).T.flatten() for t in row]
        return self._label_row(out, Value(*made), axis)

    def _cat(self, packet, args, kwargs, out) -> bool:
        """Rows of ids behind one another; where ids differ along other axes, what meets there is joined."""
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.ndim
        tensors = [t for t in args[0] if t.ndim > 1 or t.numel()]  # cat passes over empty tensors
        parts = [self._value(t) for t in tensors]
        if packet is aten.stack:
            parts = [p.map(lambda t: t.unsqueeze(dim))[0] for p in parts]
        others = any(p.varies(d) for p in parts for d in range(out.ndim) if d != dim)
        for part in parts[1:] if others else ():
            self.notes.join(parts[0].ids, part.ids)
        shape, sizes = (
            list(out.shape),
            [1 if packet is aten.stack else t.shape[dim] for t in tensors],
        )
        rows = [
            p.map(lambda t, n=n: t.expand(*shape[:dim], n, *shape[dim + 1 :]))[0]
            for p, n in zip(parts, sizes, strict=True)
        ]
        labels = Value(
            torch.cat([p.ids for p in rows], dim),
            torch.cat([p.dead for p in rows], dim),
            torch.cat([p.constant for p in rows], dim),
        ).compact(self.notes)
        self.notes.join_but_last(labels)
        self._label(out, labels.compact(self.notes))
        return True

    def _value(self, tensor: torch.Tensor) -> Value:
        """What is known of a tensor. One without channels lies at places that never go."""
        known = self.values.get(id(tensor))
        return known or Value.unknown(torch.full((1,) * tensor.ndim, NO_CHANNEL))

    def _pointwise(self, func, packet, args, kwargs, out) -> bool:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        known = [self.values[id(t)].aligned(out.ndim) for t in tensors if id(t) in self.values]
        sizes = [_aligned(t.shape, out.ndim) for t in tensors if id(t) in self.values]
        if not known or not isinstance(out, torch.Tensor):
            return False
        ids, whole = known[0].ids, sizes[0]
        for value, size in zip(known[1:], sizes[1:], strict=True):
            ids, whole = (
                self._meet(ids, whole, value.ids, size),
                torch.broadcast_shapes(whole, size),
            )
        for t in tensors:
            if id(t) not in self.values and not self._meet_tensor(Value.unknown(ids), t, out):
                return False
        dead, constant = self._numbers_of(func, packet, args, kwargs, out.ndim)
        shape = torch.broadcast_shapes(ids.shape, dead.shape, constant.shape)
        made = Value(ids.expand(shape), dead.expand(shape), constant.expand(shape)).compact(
            self.notes
        )
        if len(known) > 1 and packet not in PRODUCTS:
            self.notes.add(ids, [self.values[id(t)].maker for t in tensors if id(t) in self.values])
        self._label(out, made)
        return True

    def _meet(self, a: torch.Tensor, a_size, b: torch.Tensor, b_size) -> torch.Tensor:
        """Join the ids of two operands, and return the joined ones. A channel that is spread over others stays."""
        for ids, size, other in ((a, a_size, b), (b, b_size, a)):
            if any(n == 1 < m for n, m in zip(size, other.shape, strict=True)):
                self.notes.keep(ids, "it is spread over several channels")
                return other
        self.notes.join(a, b)
        return a if a.numel() >= b.numel() else b

    def _meet_tensor(self, value: Value, tensor: torch.Tensor, out) -> bool:
        """A weight with a number for each channel is cut along with them; any other tensor must fit all numbers of channels."""
        size = _aligned(tensor.shape, out.ndim)
        axes = [d for d, n in enumerate(size) if n > 1 and value.varies(d)]
        if not axes:
            return True
        weight, row = self.weights.get(id(tensor)), value.row(axes[0], out.shape)
        if weight is None or weight.axis is None or not row:
            return False
        self.notes.slice(weight.name, weight.axis, row[0])
        return True

    def _numbers_of(
        self, func, packet, args, kwargs, ndim: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(dead, constant) behind a pointwise operation: the operation itself tells, for zeros and for constants."""
        constants, zeros, deads = [], [], []
        for a in args:
            value = self.values.get(id(a)) if isinstance(a, torch.Tensor) else None
            if value is not None:
                value = value.aligned(ndim)
                deads.append(value.dead)
                constants.append(value.constant.clone())
                zeros.append(torch.where(value.dead, 0.0, torch.nan).double())
            else:
                constants.append(self._numbers(a))
                zeros.append(
                    torch.full_like(constants[-1], torch.nan) if isinstance(a, torch.Tensor) else a
                )
        if packet is aten._to_copy:  # to another type or device
            return deads[0], constants[0]
        dead, constant = func(*zeros, **kwargs) == 0, func(*constants, **kwargs).double()
        if packet in PRODUCTS:  # zero times anything
            for d in deads:
                dead = dead | d
        return dead, constant

    def _pad(self, value: Value, args, kwargs, out) -> bool:
        """Zeros around the image change no channel. Zeros beside the channels belong to none."""
        pad, number = args[1], args[2] if len(args) > 2 else kwargs.get("value", 0)
        value = Value(value.ids, value.dead & (number == 0), value.constant)
        for i in range(len(pad) // 2):
            dim, before, after = out.ndim - 1 - i, pad[2 * i], pad[2 * i + 1]
            if before == after == 0 or not (value.varies(dim) or dim == 1):
                continue
            if min(before, after) < 0:
                return False
            parts = []
            for t, filler in (
                (value.ids, NO_CHANNEL),
                (value.dead, number == 0),
                (value.constant, number),
            ):
                shape = list(t.shape)
                shape[dim] = args[0].shape[dim]
                ends = [
                    t.new_full([*shape[:dim], n, *shape[dim + 1 :]], filler)
                    for n in (before, after)
                ]
                parts.append(torch.cat([ends[0], t.expand(shape), ends[1]], dim))
            value = Value(*parts)
        self._label(out, value)
        return True

    def _shortcut(self, value: Value, args, out) -> bool:
        """index_select by the source of an option-A shortcut: out[j] copies x[source[j]], and x[0] is zero."""
        x, weight = args[0], self.weights.get(id(args[2]))
        row = value.row(1, x.shape)
        if (
            weight is None
            or row is None
            or not isinstance(self.modules.get(weight.layer), PaddedShortcut)
        ):
            return False
        source, notes = weight.data.cpu(), self.notes
        ids, constant = notes.begin(weight.layer, len(source)), row[2][source]
        notes.shortcuts[weight.layer] = (row[0][1:], ids, source, constant)
        notes.reads.append((weight.layer, row[0][1:]))
        return self._label_row(out, Value(ids, row[1][source], constant, weight.layer))

    def _mean(self, packet, value: Value, args, out) -> bool:
        dims = args[1] if len(args) > 1 else None
        if not isinstance(dims, (list, tuple)) or not isinstance(out, torch.Tensor):
            return False
        ndim = args[0].ndim
        dims = [d % ndim for d in dims]
        if any(value.varies(d) for d in dims):
            return False
        if packet is aten.sum:
            value = Value(
                value.ids, value.dead, value.constant * math.prod(args[0].shape[d] for d in dims)
            )
        if out.ndim < ndim:
            left = [d for d in range(ndim) if d not in dims]
            value = value.map(lambda t: t.reshape([t.shape[d] for d in left]))[0]
        self._label(out, Value(value.ids, value.dead, value.constant))
        return True


def _run(func, args, kwargs):
    """What the operation returns. PyTorch derives a BatchNorm's shapes in Python, in milliseconds: here they are plain."""
    if func is aten.native_batch_norm.default and args[0].is_meta and not args[5]:
        return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)
    return func(*args, **kwargs)


def _name(func) -> str:
    """An operation's name for people: aten.native_layer_norm.default -> layer_norm."""
    return func.overloadpacket.__name__.strip("_").removeprefix("native_")


def _aligned(shape, ndim: int) -> tuple[int, ...]:
    return (1,) * (ndim - len(shape)) + tuple(shape)


def outputs_of(out, values: dict[int, Value]) -> list[Value]:
    """The values among all that a network returned: tensors in dicts, lists, tuples and dataclasses of them."""
    return [
        values[id(t)] for t in tree_leaves(out) if isinstance(t, torch.Tensor) and id(t) in values
    ]
