"""What is known of tensors and of channels while a network is traced: `Value`, `Weight` and `Notes`."""

from dataclasses import dataclass, field

import torch

NO_CHANNEL = 0  # the id of all that never goes: elements of an image, or zeros that padding put beside the channels


@dataclass
class Value:
    """What is known of the elements of one tensor.

    `ids`, `dead` and `constant` have the tensor's number of axes; an axis along which nothing changes has the size 1.
    """

    ids: torch.Tensor  # int64: the channel
    dead: torch.Tensor  # bool: zero once γ and β of the channel's BatchNorms are zero
    constant: (
        torch.Tensor
    )  # float64: its value once γ alone is zero; nan if that depends on the image
    maker: str = ""  # the layer that made it, when nothing stands between
    readers: int = 0  # how many operations read it
    stale: str = ""  # the operation that changed it through another view

    @staticmethod
    def unknown(ids: torch.Tensor, maker: str = "") -> "Value":
        """Channels of which nothing is known but their ids."""
        nothing = torch.full(ids.shape, torch.nan, dtype=torch.float64)
        return Value(ids, torch.zeros(ids.shape, dtype=torch.bool), nothing, maker)

    def map(self, change) -> list["Value"]:
        """The values that `change` makes of the labels; one, or as many as it returns tensors."""
        made = [change(self.ids), change(self.dead), change(self.constant)]
        if isinstance(made[0], torch.Tensor):
            return [Value(*made)]
        return [Value(*parts) for parts in zip(*made, strict=True)]

    def varies(self, dim: int) -> bool:
        return self.ids.shape[dim] > 1

    def row(self, dim: int, shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """(ids, dead, constant), each [shape[dim]]; None if they differ along any other axis."""
        if any(self.varies(d) for d in range(self.ids.ndim) if d != dim):
            return None
        size = shape[dim]
        return (
            self.ids.flatten().expand(size),
            self.dead.flatten().expand(size),
            self.constant.flatten().expand(size),
        )

    def along(self, dim: int, ndim: int) -> "Value":
        """One row of channels [C], as the labels of a tensor of `ndim` axes: [1, …, C, …, 1]."""
        shape = [1] * ndim
        shape[dim] = -1
        return Value(
            self.ids.reshape(shape),
            self.dead.reshape(shape),
            self.constant.reshape(shape),
            self.maker,
        )

    def aligned(self, ndim: int) -> "Value":
        """With axes of size 1 in front, as broadcasting adds them."""
        shape = (1,) * (ndim - self.ids.ndim) + tuple(self.ids.shape)
        return Value(
            self.ids.reshape(shape),
            self.dead.reshape(shape),
            self.constant.reshape(shape),
            self.maker,
        )

    def compact(self, notes: "Notes") -> "Value":
        """The same with size 1 along each axis where the ids do not differ."""
        ids, dead, constant = self.ids, self.dead, self.constant
        for dim in range(ids.ndim):
            if ids.shape[dim] == 1:
                continue
            first = ids.narrow(dim, 0, 1)
            if ids.stride(dim) and not torch.equal(
                notes.roots(ids), notes.roots(first).expand(ids.shape)
            ):
                continue
            same = (constant == constant.narrow(dim, 0, 1)).all(dim, keepdim=True)
            ids, dead = first, dead.all(dim, keepdim=True)
            constant = torch.where(same, constant.narrow(dim, 0, 1), torch.nan)
        return Value(ids, dead, constant, self.maker)


@dataclass
class Weight:
    """A parameter or buffer of the network that is traced, or a view of one."""

    name: str  # such as "stage1.0.conv1.weight"
    data: torch.Tensor  # the numbers; on the meta device where they are not known
    axis: int | None  # the only axis of the parameter itself that is longer than one
    moved: bool = False  # whether this is a view
    transposed: bool = False  # whether this is the transposed matrix

    @property
    def layer(self) -> str:
        return self.name.rpartition(".")[0]

    def view(self, data: torch.Tensor) -> "Weight":
        """The weight that an operation made of this one, with its numbers."""
        turned = (
            data.ndim == 2
            and data.shape == self.data.shape[::-1]
            and data.stride() == self.data.stride()[::-1]
        )
        return Weight(self.name, data, self.axis, True, turned and not self.moved)

    def numbers(self) -> torch.Tensor:
        """float64, on the CPU; nan where they are not known."""
        if self.data.is_meta:
            return torch.full(self.data.shape, torch.nan, dtype=torch.float64)
        return self.data.detach().cpu().double()


def named_weight(name: str, data: torch.Tensor) -> Weight:
    long = [axis for axis, size in enumerate(data.shape) if size > 1]
    return Weight(name, data, long[0] if len(long) == 1 else None)


@dataclass
class Notes:
    """What a trace learns of channels: which are one, which must stay, and which axis of which weight holds them.

    Two tables have an entry a layer: `inputs`, the ids that it reads, and `outputs`, those that it writes.
    """

    parent: torch.Tensor = field(default_factory=lambda: torch.tensor([NO_CHANNEL]))
    made: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # module -> the ids that began there
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    norms: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # BatchNorm -> the ids that it scales
    constants: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # reader -> what each input holds with γ = 0
    slices: dict[tuple[str, int], torch.Tensor] = field(
        default_factory=dict
    )  # (weight, axis) -> ids along it
    dense_before: frozenset[str] = (
        frozenset()
    )  # in a cut network: the layers that mixed channels in the whole one
    depthwise: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # depthwise convolution -> ids, one a group
    shortcuts: dict[str, tuple] = field(
        default_factory=dict
    )  # option-A shortcut -> ids read, written, source, constants
    kept: list[tuple[torch.Tensor, str]] = field(default_factory=list)  # ids, and why they stay
    added: list[torch.Tensor] = field(default_factory=list)  # ids that take part in an addition
    beside: dict[str, str] = field(
        default_factory=dict
    )  # shortcut -> the BatchNorm whose output is added to it
    before_norm: list[tuple[Value, str, str]] = field(
        default_factory=list
    )  # (value, its maker, the BatchNorm)
    rigid: list[tuple[torch.Tensor, str]] = field(
        default_factory=list
    )  # ids whose number forward might count on
    reads: list[tuple[str, torch.Tensor]] = field(
        default_factory=list
    )  # (layer, ids), in the order of the calls

    def begin(self, name: str, size: int) -> torch.Tensor:
        """`size` new ids that begin at the module `name`; at its second call, those of the first."""
        if name not in self.made:
            start = len(self.parent)
            self.made[name] = torch.arange(start, start + size)
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
        a, b = torch.broadcast_tensors(a, b)
        while True:
            x, y = self.roots(a), self.roots(b)
            apart = x != y
            if not apart.any():
                return
            low, high = torch.minimum(x, y)[apart], torch.maximum(x, y)[apart]
            self.parent.scatter_reduce_(0, high, low, "amin")

    def keep(self, ids: torch.Tensor, reason: str) -> None:
        if ids.numel():
            self.kept.append((ids, reason))

    def read(self, layer: str, row: tuple, constant: bool) -> None:
        """`layer` reads a row (ids, dead, constants); `constant`: whether a constant would give it a constant output."""
        ids, dead, constants = row
        self.keep(ids[~dead], f"{layer} reads it before any BatchNorm has scaled it")
        self.reads.append((layer, ids))
        constants = constants if constant else torch.full_like(constants, torch.nan)
        if layer in self.inputs:
            self.join(self.inputs[layer], ids)
            constants = torch.where(constants == self.constants[layer], constants, torch.nan)
        self.inputs.setdefault(layer, ids)
        self.constants[layer] = constants

    def scale(self, norm: str, ids: torch.Tensor) -> None:
        """The BatchNorm `norm` scales the channels `ids`."""
        self.reads.append((norm, ids))
        if norm in self.norms:
            self.join(self.norms[norm], ids)
        self.norms.setdefault(norm, ids)

    def slice(self, weight: str, axis: int, ids: torch.Tensor) -> None:
        """Along `axis` of `weight` lie the channels `ids`."""
        have = self.slices.setdefault((weight, axis), ids)
        self.join(have, ids)

    def join_parts(self, ids: torch.Tensor, part: int) -> None:
        """The first axis of `ids` is taken apart into pieces of `part`: all pieces lose the same places."""
        pieces = ids.reshape(-1, part, *ids.shape[1:])
        if len(pieces) > 1:
            self.join(pieces[:1], pieces)

    def add(self, ids: torch.Tensor, makers: list[str]) -> None:
        """The channels `ids` take part in an addition of what the modules `makers` made."""
        self.added.append(ids.flatten())
        for shortcut in makers:
            norms = [m for m in makers if m in self.norms]
            if shortcut in self.shortcuts and norms:
                self.beside[shortcut] = norms[0]

    def join_but_last(self, value: Value) -> None:
        """Where ids differ along several axes, channels can go along the last of these only."""
        axes = [d for d in range(value.ids.ndim) if value.varies(d)]
        if len(axes) > 1:
            rows = value.ids.movedim(axes[-1], -1).reshape(-1, value.ids.shape[axes[-1]])
            self.join(rows[:1], rows)
