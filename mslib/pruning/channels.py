"""The channel graph: which layers share a channel, found by watching the network run, not by layer names.

Every channel that a layer makes gets an id. `Tracer` follows the ids through the network and joins those that can only
go together; here the result is checked and asked. Channels that ended up with one root go together or stay together.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from ..files import nearest, reason
from ..networks import call, sync_widths, unwrap
from .labels import NO_CHANNEL, Notes, Weight, named_weight
from .trace import Tracer, outputs_of


class ChannelGraph:
    """The channels of `model` and the layers that share them; traced once, it may stand for model and example anywhere.

    model: any network with BatchNorms; wrappers (DataParallel, torch.compile) are taken off. It is not changed: a copy
    without numbers runs, in evaluation mode. example: what its forward takes, such as float [N, C, H, W]; a tuple or a
    dict of tensors for several inputs.

    `outputs`, `norms`, `inputs`: module name -> ids of the channels that it writes, scales, reads (int64).
    `root[id]`: the id that stands for all that go with it. `reasons`: root -> why it must stay.
    `norm_after`: layer -> the BatchNorm that alone reads it; `conv_before`: the other way round.

    Raises ValueError for a network that cannot be traced, has layers that the example does not reach, or computes its
    weights on the way (weight_norm …), with the remedy.
    """

    def __init__(self, model: nn.Module, example):
        self.model, self.example = unwrap(model), example
        self.modules = dict(self.model.named_modules())
        _refuse_reparametrized(self.modules)
        _refuse_example(self.model, example)
        self.notes = self._trace(Notes(), self._weights())
        self._settle()
        self._probe_all()

    @property
    def conv_before(self) -> dict[str, str]:
        """BatchNorm -> the layer right before it."""
        return {norm: conv for conv, norm in self.norm_after.items()}

    # ---- tracing ----

    def _weights(self) -> dict[str, Weight]:
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: named_weight(name, data.detach()) for name, data in named}

    def _trace(self, notes: Notes, weights: dict[str, Weight]) -> Notes:
        """Run a copy without numbers, with weights of the shapes in `weights`, and fill `notes`."""
        bare, known, names = (
            {},
            {},
            {},
        )  # by the id of a tensor here: its copy; of the copy: its weight; here: its name
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            empty = torch.empty(weights[name].data.shape, dtype=tensor.dtype, device="meta")
            bare[id(tensor)] = (
                nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
            )
            known[id(bare[id(tensor)])], names[id(tensor)] = weights[name], name
        for m in self.modules.values():  # tensors that are neither parameters nor buffers
            for value in vars(m).values():
                if isinstance(value, torch.Tensor):
                    bare.setdefault(id(value), value.to("meta"))
        model = copy.deepcopy(self.model, bare).eval()
        for name, ids in notes.depthwise.items():
            model.get_submodule(name).groups = len(ids)
        tracer = Tracer(notes, known, self.modules)
        try:
            with torch.no_grad(), tracer:
                out = call(sync_widths(model), _without_numbers(self.example))
        except Exception as error:
            raise ValueError(
                f"{type(self.model).__name__} cannot be traced on this example: {reason(error)}. Its forward must run on "
                "an example of the right size and type, and must not branch on the values of tensors"
            ) from error
        for value in outputs_of(out, tracer.values):
            notes.keep(value.ids, "it is an output of the network")
        self._refuse_unreached(tracer.touched, names)
        return notes

    def _refuse_unreached(self, touched: set[str], names: dict[int, str]) -> None:
        """Layers that the run did not use might use channels that are cut, where it takes another way."""
        for layer, m in self.modules.items():
            own = [names[id(p)] for p in m.parameters(recurse=False)]
            if own and not touched.intersection(own):
                raise ValueError(
                    f"{type(self.model).__name__}: the example does not reach the layer {layer!r} in evaluation mode, so "
                    "what it reads cannot be followed. Remove it (an auxiliary head, for instance), or call it in forward"
                )

    def _settle(self) -> None:
        """Take from the notes what is asked for later."""
        notes = self.notes
        self.outputs, self.norms, self.inputs = notes.outputs, notes.norms, notes.inputs
        self.calls = Counter(name for name, _ in notes.reads)
        self.root = notes.roots(torch.arange(len(notes.parent)))
        self.reasons: dict[int, str] = {}
        for ids, why in [
            *notes.kept,
            (torch.tensor([NO_CHANNEL]), "it meets padding, or a tensor that has no channels"),
        ]:
            for root in self.root[ids].unique().tolist():
                self.reasons.setdefault(root, why)
        seen = [
            (value, conv, norm) for value, conv, norm in notes.before_norm if value.readers == 1
        ]
        self.norm_after = {conv: norm for _, conv, norm in seen if conv in self.outputs}
        self.gated = torch.zeros(
            len(self.root), dtype=torch.bool
        )  # [ids]: some reader sees more of it than a constant
        for name, constants in notes.constants.items():
            ids = self.inputs[name]
            self.gated[self.root[ids[constants.isnan()]]] = True
        self.gated = self.gated[self.root]

    # ---- probing: a cut network must do with what is left what this one did ----

    def _probe_all(self) -> None:
        """Cut about half of everything, on a copy without numbers, and trace it: nothing new may turn up.

        Where a forward counts on a number of channels (`x.view(-1, 512)`, `x[:, :64]`), something does.
        """
        parts = [*self.notes.rigid, *((ids, "the forward") for ids in self.norms.values())]
        stiff = self._rigid(parts)
        for ids, what in stiff:
            self.notes.keep(ids, f"{what} counts on its number of channels")
            self._settle()
        if stiff and not self._probe(self._sample(self._free())):
            for ids in self.norms.values():
                self.notes.keep(ids, "the forward counts on its number of channels")
            self._settle()

    def _rigid(self, parts: list[tuple[torch.Tensor, str]]) -> list[tuple[torch.Tensor, str]]:
        """Those of `parts` (ids, what they passed) of which nothing can be cut, found by halving."""
        ids = torch.cat([ids.flatten() for ids, _ in parts] or [torch.zeros(0, dtype=torch.long)])
        some = self._free() & torch.isin(self.root, self.root[ids])
        if self._probe(self._sample(some)):
            return []
        if len(parts) == 1:
            return parts
        middle = len(parts) // 2
        return self._rigid(parts[:middle]) + self._rigid(parts[middle:])

    def _free(self) -> torch.Tensor:
        """Bool [ids]: some BatchNorm scales it, and nothing keeps it."""
        free = torch.zeros(len(self.root), dtype=torch.bool)
        for ids in self.norms.values():
            free[self.root[ids]] = True
        free[list(self.reasons)] = False
        return free[self.root]

    def _sample(self, free: torch.Tensor) -> torch.Tensor:
        """About half of the `free` ids, bool [ids]; every layer keeps a channel."""
        generator = torch.Generator().manual_seed(0)
        drop = (torch.rand(len(free), generator=generator) < 0.5)[self.root] & free
        while emptied := self.emptied(drop):
            drop[self.root == self.root[self.outputs[emptied[0]][0]]] = False
        return self._with_copies(drop)

    def _probe(self, drop: torch.Tensor) -> bool:
        """Whether the network without the ids in `drop` (bool [ids]) reads just what is left of them."""
        if not drop.any():
            return True
        have = self.notes
        left = Notes(
            have.parent.clone(), {name: ids[~drop[ids]] for name, ids in have.made.items()}
        )
        left.depthwise = {name: ids[~drop[ids]] for name, ids in have.depthwise.items()}
        left.dense_before = frozenset(have.outputs.keys() - have.depthwise.keys())
        try:
            self._trace(left, self._weights_left(drop))
        except ValueError:
            return False
        joined = not torch.equal(left.roots(torch.arange(len(left.parent))), self.root)
        kept = {root for ids, _ in left.kept for root in self.root[ids].flatten().tolist()}
        wanted = [(name, self.root[ids[~drop[ids]]]) for name, ids in have.reads]
        if joined or not kept <= self.reasons.keys() or len(left.reads) != len(wanted):
            return False
        pairs = zip(left.reads, wanted, strict=True)
        return all(a == b and torch.equal(self.root[row], rest) for (a, row), (b, rest) in pairs)

    def _weights_left(self, drop: torch.Tensor) -> dict[str, Weight]:
        """The weights of the network without the ids in `drop`: their shapes only."""
        shapes = {name: list(weight.data.shape) for name, weight in self._weights().items()}
        for (name, axis), ids in self.notes.slices.items():
            shapes[name][axis] = int((~drop[ids]).sum())
        left = {}
        for name, weight in self._weights().items():
            left[name] = Weight(
                name, torch.empty(shapes[name], dtype=weight.data.dtype, device="meta"), weight.axis
            )
        for name in self.notes.shortcuts:
            left[f"{name}.source"] = Weight(f"{name}.source", self.source_left(name, drop), 0)
        return left

    def source_left(self, name: str, drop: torch.Tensor) -> torch.Tensor:
        """What is left of the `source` of a PaddedShortcut, renumbered (int64 [channels written])."""
        read, written, source, _ = self.notes.shortcuts[name]
        kept = ~drop[read]
        place = torch.cat([torch.zeros(1, dtype=torch.long), torch.where(kept, kept.cumsum(0), 0)])
        return place[source[~drop[written]]]

    # ---- answers ----

    def prunable_norms(self, residual: bool = False, keep: Iterable[str] = ()) -> list[str]:
        """Names of the BatchNorms whose channels can be removed, in the order of the network.

        residual: also those whose channels take part in an addition, not only a block's inner ones. keep: names of
        modules that are to stay as they are, with all that they write, scale and read. ValueError for an unknown name.
        """
        stay = set(self.reasons) | self._kept_by(keep)
        if self.notes.added and not residual:
            stay.update(self.root[torch.cat(self.notes.added)].tolist())
        return [
            name for name, ids in self.norms.items() if stay.isdisjoint(self.root[ids].tolist())
        ]

    def _kept_by(self, keep: Iterable[str]) -> set[int]:
        stay: set[int] = set()
        for prefix in [keep] if isinstance(keep, str) else keep:
            if prefix not in self.modules:
                raise ValueError(
                    f"keep={prefix!r}: the network has no such module{nearest(prefix, self.modules)}"
                )
            for table in (self.outputs, self.norms, self.inputs):
                for name, ids in table.items():
                    if name == prefix or name.startswith(f"{prefix}."):
                        stay.update(self.root[ids].tolist())
        return stay

    def reason(self, norm: str) -> str:
        """Why BatchNorm `norm` cannot be pruned; empty if it can."""
        return next(
            (self.reasons[r] for r in self.root[self.norms[norm]].tolist() if r in self.reasons), ""
        )

    def dropped(self, masks: dict[str, torch.Tensor]) -> torch.Tensor:
        """Bool [ids]: the channels that go. One goes only if every BatchNorm on it drops it."""
        every = [
            masks[n].cpu() if n in masks else torch.ones(len(ids), dtype=torch.bool)
            for n, ids in self.norms.items()
        ]
        scaled = self.root[torch.cat([*self.norms.values(), torch.tensor([NO_CHANNEL])])]
        keep = torch.ones(len(self.root), dtype=torch.bool)
        keep[scaled] = False
        keep[scaled[torch.cat([*every, torch.tensor([True])])]] = True
        keep[list(self.reasons)] = True
        return self._with_copies(~keep[self.root])

    def _with_copies(self, drop: torch.Tensor) -> torch.Tensor:
        """A channel that copies one of the stage before is empty only if that one goes too."""
        while True:
            before = drop.clone()
            for read, written, source, _ in self.notes.shortcuts.values():
                copies = source > 0
                alone = drop[written[copies]] & ~drop[read[source[copies] - 1]]
                drop[torch.isin(self.root, self.root[written[copies][alone]])] = False
            if torch.equal(before, drop):
                return drop

    def shares_left(self, drop: torch.Tensor) -> dict[str, float]:
        """Layer -> the share of its MACs that is left without the ids in `drop` (see `dropped`)."""
        shares = dict.fromkeys([*self.inputs, *self.outputs], 1.0)
        for table in (self.inputs, self.outputs):
            for name, ids, left in zip(table, table.values(), _left(table, drop), strict=True):
                shares[name] *= left / len(ids)
        return shares

    def emptied(self, drop: torch.Tensor) -> list[str]:
        """Names of the layers of which `drop` (see `dropped`) leaves nothing."""
        return [
            name
            for name, left in zip(self.outputs, _left(self.outputs, drop), strict=True)
            if not left
        ]


def _left(table: dict[str, torch.Tensor], drop: torch.Tensor) -> list[int]:
    """How many ids of each row of `table` are left without those in `drop`, all rows at once."""
    if not table:
        return []
    kept = torch.cat(
        [torch.zeros(1, dtype=torch.long), (~drop[torch.cat([*table.values()])]).cumsum(0)]
    )
    ends = torch.tensor([len(ids) for ids in table.values()]).cumsum(0)
    return kept[ends].diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()


def as_graph(model: "nn.Module | ChannelGraph", example=None) -> ChannelGraph:
    """The graph of a model and an example; one that was made before is handed through.

    Raises ValueError if the example is missing.
    """
    if isinstance(model, ChannelGraph):
        return model
    if example is None:
        raise ValueError(
            f"an example input is needed to follow the channels of {type(model).__name__}: give one batch of images, "
            "such as data.example or torch.zeros(1, 3, 32, 32)"
        )
    return ChannelGraph(model, example)


def _without_numbers(example):
    return torch.utils._pytree.tree_map(
        lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, example
    )


def _refuse_example(model: nn.Module, example) -> None:
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if kind is None:
        raise ValueError(
            f"{type(model).__name__} has no floating-point parameters: quantized networks cannot be pruned"
        )
    for x in torch.utils._pytree.tree_leaves(example):
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != kind:
            raise ValueError(
                f"the example is {x.dtype}, the network {kind}; give the example as example.to({kind})"
            )


def _refuse_reparametrized(modules: dict[str, nn.Module]) -> None:
    """Layers whose weight is computed from others before every forward cannot be cut: say how to undo that."""
    for name, m in modules.items():
        keys = m._parameters.keys()
        remedy = ""
        if hasattr(m, "parametrizations"):
            kind = next(iter(m.parametrizations))
            remedy = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {kind!r})"
        elif "weight_g" in keys:
            remedy = "torch.nn.utils.remove_weight_norm(layer)"
        elif "weight_orig" in keys and "weight_u" in m._buffers:
            remedy = "torch.nn.utils.remove_spectral_norm(layer)"
        elif any(key.endswith("_orig") for key in keys):
            remedy = "torch.nn.utils.prune.remove(layer, 'weight')"
        if remedy:
            raise ValueError(
                f"the weight of {name!r} is computed from other tensors; make it an ordinary one first: "
                f"layer = model.get_submodule({name!r}); {remedy}"
            )
