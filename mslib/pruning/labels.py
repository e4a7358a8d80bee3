"""What is known of tensors and channels while a network is traced: `Value`, `Weight`, `Notes`."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..networks import layer_of

# The id of all that never goes: elements of an image, or zeros that padding put beside channels.
NO_CHANNEL = 0


class Row(NamedTuple):
    """What is known of the channels along one axis, [C] each (see `Value`)."""

    ids: torch.Tensor
    dead: torch.Tensor
    constant: torch.Tensor


@dataclass
class Value:
    """What is known of the elements of one tensor.

    The labels have the tensor's number of axes; along one where the ids do not differ, size 1.
    """

    ids: torch.Tensor  # int64: the channel
    dead: torch.Tensor  # bool: zero once γ and β of the channel's BatchNorms are zero
    constant: torch.Tensor  # float64: its value once γ alone is zero; nan if images decide on it
    maker: str = ""  # the layer that made it, when nothing stands between
    readers: int = 0  # how many operations read it
    stale: str = ""  # the operation that changed it through another view

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter((self.ids, self.dead, self.constant))

    @staticmethod
    def of(labels: Iterable[torch.Tensor], maker: str = "") -> "Value":
        """From ids, dead and constant."""
        ids, dead, constant = labels
        return Value(ids, dead, constant, maker)

    @staticmethod
    def unknown(ids: torch.Tensor, maker: str = "") -> "Value":
        """Channels of which nothing is known but their ids."""
        nothing = torch.full(ids.shape, torch.nan, dtype=torch.float64)
        return Value(ids, torch.zeros(ids.shape, dtype=torch.bool), nothing, maker)

    def map(self, change: Callable) -> list["Value"]:
        """The values that `change` makes of the labels; as many as it returns tensors."""
        made = [change(t) for t in self]
        if isinstance(made[0], torch.Tensor):
            return [Value.of(made)]
        return [Value.of(parts) for parts in zip(*made, strict=True)]

    def varies(self, dim: int) -> bool:
        return self.ids.shape[dim] > 1

    def row(self, dim: int, shape: torch.Size) -> Row | None:
        """The labels along `dim` of a tensor of this shape; None if other axes matter, too."""
        if any(self.varies(d) for d in range(self.ids.ndim) if d != dim):
            return None
        return Row(*(t.flatten().expand(shape[dim]) for t in self))

    def along(self, dim: int, ndim: int) -> "Value":
        """A row of channels [C], as the labels of a tensor of `ndim` axes: [1, …, C, …, 1]."""
        shape = [1] * ndim
        shape[dim] = -1
        return Value.of((t.reshape(shape) for t in self), self.maker)

    def aligned(self, ndim: int) -> "Value":
        """With axes of size 1 in front, as broadcasting adds them."""
        return self.map(lambda t: t[(None,) * (ndim - t.ndim)])[0]

    def compact(self, notes: "Notes") -> "Value":
        """The same with size 1 along each axis where the ids do not differ."""
        ids, dead, constant = self
        for dim in range(ids.ndim):
            if ids.shape[dim] == 1:
                continue
            first = ids.narrow(dim, 0, 1)
            same = notes.roots(first).expand(ids.shape)
            if ids.stride(dim) and not torch.equal(notes.roots(ids), same):
                continue
            one = constant.narrow(dim, 0, 1)
            ids, dead = first, dead.all(dim, keepdim=True)
            constant = torch.where((constant == one).all(dim, keepdim=True), one, torch.nan)
        return Value(ids, dead, constant, self.maker)


@dataclass
class Weight:
    """A parameter or buffer of the network that is traced, or a view of one."""

    name: str  # such as "stage1.0.conv1.weight"
    data: torch.Tensor  # the numbers; on the meta device where they are not known
    axis: int | None  # the only axis of the parameter itself that is longer than one
    moved: bool = False  # whether this is a view
    transposed: bool = False  # whether this is the transposed matrix

    @staticmethod
    def named(name: str, data: torch.Tensor) -> "Weight":
        long = [axis for axis, size in enumerate(data.shape) if size > 1]
        return Weight(name, data, long[0] if len(long) == 1 else None)

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def layer(self) -> str:
        return layer_of(self.name)

    def view(self, data: torch.Tensor) -> "Weight":
        """The weight that an operation made of this one, with its numbers."""
        # Transposed is also a batch of the transposed matrix, expanded without being copied.
        matrix = self.data if self.transposed else self.data.T if self.data.ndim == 2 else None
        turned = False
        if matrix is not None and data.ndim > 1 and not any(data.stride()[:-2]):
            last = (data.shape[-2:], data.stride()[-2:])
            turned = last == (matrix.shape[-2:], matrix.stride()[-2:])
        return Weight(self.name, data, self.axis, True, turned)

    def numbers(self) -> torch.Tensor:
        """float64, on the CPU; nan where they are not known."""
        if self.data.is_meta:
            return torch.full(self.data.shape, torch.nan, dtype=torch.float64)
        return self.data.detach().cpu().double()


class Copy(NamedTuple):
    """An option-A shortcut: what it writes copies read[source - 1], or is zero where source = 0."""

    read: torch.Tensor  # ids
    written: torch.Tensor  # ids
    source: torch.Tensor
    constant: torch.Tensor  # of what it writes


def _table() -> Any:
    return field(default_factory=dict)


@dataclass
class Notes:
    """What a trace learns of channels: which are one, which must stay, which weights hold them."""

    parent: torch.Tensor = field(default_factory=lambda: torch.tensor([NO_CHANNEL]))
    made: dict[str, torch.Tensor] = _table()  # module -> the ids that began there
    outputs: dict[str, torch.Tensor] = _table()  # layer -> the ids that it writes
    inputs: dict[str, torch.Tensor] = _table()  # layer -> the ids that it reads
    norms: dict[str, torch.Tensor] = _table()  # BatchNorm -> the ids that it scales
    constants: dict[str, torch.Tensor] = _table()  # layer -> what each input holds with γ = 0
    slices: dict[tuple[str, int], torch.Tensor] = _table()  # (weight, axis) -> the ids along it
    depthwise: dict[str, torch.Tensor] = _table()  # depthwise convolution -> ids, one a group
    copies: dict[str, Copy] = _table()  # by the name of the shortcut
    asked: set[str] = field(default_factory=set)  # the weights behind the constants
    beside: dict[str, str] = _table()  # shortcut -> the BatchNorm whose output is added to it
    dense_before: frozenset[str] = frozenset()  # in a cut network: layers that mixed channels
    kept: list[tuple[torch.Tensor, str]] = field(default_factory=list)  # ids, and why they stay
    added: list[torch.Tensor] = field(default_factory=list)  # ids that take part in an addition
    reads: list[tuple[str, torch.Tensor]] = field(default_factory=list)  # in order of the calls
    # ids, what may count them, how many reads were before it
    rigid: list[tuple[torch.Tensor, str, int]] = field(default_factory=list)
    scaled: list[tuple[Value, str]] = field(
        default_factory=list
    )  # what a BatchNorm reads, its name

    def begin(self, name: str, size: int) -> torch.Tensor:
        """`size` new ids that begin at module `name`; at its second call, those of the first."""
        if name not in self.made:
            self.made[name] = torch.arange(len(self.parent), len(self.parent) + size)
            self.parent = torch.cat([self.parent, self.made[name]])
        return self.made[name]

    def roots(self, ids: torch.Tensor) -> torch.Tensor:
        """The id that stands for all that were joined with each of `ids`."""
        found = self.parent[ids]
        while not torch.equal(found, up := self.parent[found]):
            found = up
        return found

    def join(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """From now on the channels at the same place of `a` and `b` are one."""
        if a is b:
            return
        a, b = torch.broadcast_tensors(a, b)
        while True:
            x, y = self.roots(a), self.roots(b)
            apart = x != y
            if not apart.any():
                return
            low, high = torch.minimum(x, y)[apart], torch.maximum(x, y)[apart]
            self.parent.scatter_reduce_(0, high, low, "amin")

    def join_parts(self, ids: torch.Tensor, part: int) -> None:
        """The first axis is taken apart into pieces of `part`: all lose the same places."""
        pieces = ids.reshape(-1, part, *ids.shape[1:])
        if len(pieces) > 1:
            self.join(pieces[:1], pieces)

    def settle(self, value: Value) -> Value:
        """A value just moved: where ids differ along several axes, only the last can go."""
        value = value.compact(self)
        axes = [d for d in range(value.ids.ndim) if value.varies(d)]
        if len(axes) < 2:
            return value
        rows = value.ids.movedim(axes[-1], -1).reshape(-1, value.ids.shape[axes[-1]])
        self.join(rows[:1], rows)
        return value.compact(self)

    def keep(self, ids: torch.Tensor, reason: str) -> None:
        if ids.numel():
            self.kept.append((ids, reason))

    def read(self, layer: str, row: Row, constant: bool) -> None:
        """`layer` reads a row; `constant`: whether it makes a constant of a constant."""
        self.keep(row.ids[~row.dead], f"{layer} reads it where no BatchNorm can silence it")
        self.reads.append((layer, row.ids))
        known = row.constant if constant else torch.full_like(row.constant, torch.nan)
        if layer in self.inputs:
            self.join(self.inputs[layer], row.ids)
            known = torch.where(known == self.constants[layer], known, torch.nan)
        self.inputs.setdefault(layer, row.ids)
        self.constants[layer] = known

    def scale(self, norm: str, ids: torch.Tensor, value: Value | None) -> None:
        """The BatchNorm `norm` scales the channels `ids`, those of `value`."""
        self.reads.append((norm, ids))
        self.join(self.norms.setdefault(norm, ids), ids)
        self.suspect(ids, f"the forward around {norm}")
        if value is not None:
            self.scaled.append((value, norm))

    def suspect(self, ids: torch.Tensor, what: str) -> None:
        """`what` may count on the number of the channels `ids`."""
        self.rigid.append((ids, what, len(self.reads)))

    def slice(self, weight: str, axis: int, ids: torch.Tensor) -> None:
        """Along `axis` of `weight` lie the channels `ids`."""
        self.join(self.slices.setdefault((weight, axis), ids), ids)

    def copy(self, shortcut: str, read: torch.Tensor, made: Value, source: torch.Tensor) -> None:
        self.reads.append((shortcut, read))
        self.copies[shortcut] = Copy(read, made.ids, source, made.constant)

    def add(self, ids: torch.Tensor, makers: list[str]) -> None:
        """The channels `ids` take part in an addition of what the modules `makers` made."""
        self.added.append(ids.flatten())
        norms = [m for m in makers if m in self.norms]
        for shortcut in makers:
            if shortcut in self.copies and norms:
                self.beside[shortcut] = norms[0]
