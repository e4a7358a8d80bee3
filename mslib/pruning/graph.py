"""The channel graph: which layers share a channel, found by watching the network run.

Every channel that a layer makes gets an id. `Tracer` follows the ids through the network and joins
those that can only go together. Here the result is checked, and asked. Channels whose ids have one
root go together or stay together.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..files import nearest, reason
from ..networks import call, meta_copy, named_tensors, sync_widths, tensors_in, unwrap
from .labels import NO_CHANNEL, Notes, Weight
from .trace import Tracer


class ChannelGraph:
    """The channels of `model` and the layers that share them.

    It is traced once, and may stand for the model and the example wherever these are asked for.
    Made before a training, it is traced again where the constants of channels are asked for.

    model: any network with BatchNorms; wrappers (DataParallel, torch.compile) are taken off. It is
    not changed: a copy without numbers runs, in evaluation mode. example: what its forward takes,
    such as float [N, C, H, W]; a tuple or a dict of several inputs.

    `outputs`, `norms`, `inputs`: module name -> ids of the channels it writes, scales, reads.
    `root[id]`: the id that stands for all that go with it. `reasons`: root -> why it must stay.
    `norm_after`: layer -> the BatchNorm that alone reads it; `conv_before`: the other way round.

    Raises ValueError for a network that cannot be traced, has layers that the example does not
    reach, or computes its weights on the way (weight_norm …), with the remedy.
    """

    def __init__(self, model: nn.Module, example: Any):
        self.model, self.example = unwrap(model), example
        self.modules: dict[str, Any] = dict(self.model.named_modules())
        _refuse_reparametrized(self.modules)
        _refuse_example(self.model, example)
        self._follow()

    # ---- tracing ----

    def _follow(self) -> None:
        self.weights = self._weights_now()
        self.notes = Notes()
        self._refuse_unreached(self._trace(self.notes, self.weights))
        self._settle()
        self._probe_all()
        self.known = {name: self.weights[name].numbers().clone() for name in self.notes.asked}

    def _weights_now(self) -> dict[str, Weight]:
        return {n: Weight.named(n, t.detach()) for n, t in named_tensors(self.model)}

    def renewed(self) -> "ChannelGraph":
        """This graph, traced again if numbers behind its constants, such as β, have changed."""
        now = self._weights_now()
        if not all(n in now and torch.equal(now[n].numbers(), t) for n, t in self.known.items()):
            self._follow()
        return self

    def _trace(self, notes: Notes, weights: dict[str, Weight]) -> set[str]:
        """Run a copy with the shapes of `weights`, and fill `notes`; the names of those it used."""
        model = meta_copy(self.model, {name: w.data.shape for name, w in weights.items()})
        known = {id(t): weights[name] for name, t in named_tensors(model)}
        for name, ids in notes.depthwise.items():  # of a network that is cut
            layer: Any = model.get_submodule(name)
            layer.groups = len(ids)
        sync_widths(model)
        tracer = Tracer(notes, known, self.modules)
        try:
            with torch.no_grad(), torch.inference_mode(False), tracer:
                out = call(model, self.example)
        except Exception as error:
            raise ValueError(
                f"{type(self.model).__name__} cannot be traced on this example: {reason(error)}. "
                "Its forward must run on an example of the right size and type, and must not "
                "branch on the values of tensors"
            ) from error
        for tensor in tensors_in(out):
            if id(tensor) in tracer.values:
                notes.keep(tracer.values[id(tensor)].ids, "it is an output of the network")
        return tracer.touched

    def _refuse_unreached(self, touched: set[str]) -> None:
        """A layer that the run did not use may be called in training: what it reads is unknown."""
        reached = {id(tensor) for name, tensor in named_tensors(self.model) if name in touched}
        for layer, m in self.modules.items():
            own = {id(p) for p in m.parameters(recurse=False)}
            if own and not own & reached:
                raise ValueError(
                    f"{type(self.model).__name__}: the example does not reach {layer!r} in "
                    "evaluation mode, so what it reads cannot be followed. Remove it (an "
                    "auxiliary head, for instance), or let forward call it"
                )

    def _settle(self) -> None:
        """Take from the notes what is asked for later."""
        notes = self.notes
        self.outputs, self.norms, self.inputs = notes.outputs, notes.norms, notes.inputs
        self.calls = Counter(name for name, _ in notes.reads)
        self.root = notes.roots(torch.arange(len(notes.parent)))
        self.rows = {name: _Rows(getattr(notes, name)) for name in ("outputs", "norms", "inputs")}
        self.reasons: dict[int, str] = {}
        never = (torch.tensor([NO_CHANNEL]), "it meets padding, or a tensor without channels")
        for ids, why in [*notes.kept, never]:
            for root in set(self.root[ids].flatten().tolist()):
                self.reasons.setdefault(root, why)
        for name, ids in [*self.outputs.items(), *self.norms.items()]:
            if len(roots := set(self.root[ids].tolist())) == 1:
                why = f"all channels of {name} go together, and one must stay"
                self.reasons.setdefault(roots.pop(), why)
        while stuck := [norm for norm in self.norms if self._partly(norm)]:
            for norm in stuck:
                why = f"{norm} scales it together with others that stay"
                self.reasons |= dict.fromkeys(self.root[self.norms[norm]].tolist(), why)
        alone = [(value.maker, norm) for value, norm in notes.scaled if value.readers == 1]
        self.norm_after = {maker: norm for maker, norm in alone if maker in self.outputs}
        self.conv_before = {norm: layer for layer, norm in self.norm_after.items()}
        self.free = torch.zeros(len(self.root), dtype=torch.bool)
        self.free[self.root[self.rows["norms"].ids]] = True
        self.free[list(self.reasons)] = False
        self.free = self.free[self.root]  # bool [ids]: a BatchNorm scales it, and nothing keeps it
        gated = torch.zeros(len(self.root), dtype=torch.bool)
        for name, constants in notes.constants.items():
            behind = self.norm_after.get(name)
            takes = "bias" in getattr(self.modules.get(name), "_parameters", ())
            takes |= behind is not None and self.calls[name] == self.calls[behind] == 1
            gated[self.root[self.inputs[name][constants.isnan() | (not takes)]]] = True
        self.gated = gated[self.root]  # bool [ids]: some reader sees more of it than a constant

    def _partly(self, norm: str) -> bool:
        """Whether some channels of a BatchNorm stay, and others might go."""
        stay = [root in self.reasons for root in self.root[self.norms[norm]].tolist()]
        return 0 < sum(stay) < len(stay)

    # ---- probing: a cut network must do with what is left what this one did ----

    def _probe_all(self) -> None:
        """Cut about half of everything, and trace that: nothing new may turn up.

        Where a forward counts on a number of channels (`x.view(-1, 512)`, `x[:, :64]`), something
        does. The culprit is the last suspect before that place with which whole the trace gets
        further.
        """
        if self._probe(self.free) is None:
            return
        self._trace_again()
        passed = self._probe(self.free)
        while passed is not None:
            rigid = self.notes.rigid
            suspects = [s for s in rigid[: passed[1]] if self.free[s[0]].any()] or rigid
            for culprit in reversed(suspects):
                rest = self.free & ~torch.isin(self.root, self.root[culprit[0]])
                further = self._probe(rest)
                if further is None or further > passed:
                    suspects = [culprit]
                    break
            for ids, what, _ in suspects:  # all, where no single one is to blame
                self.notes.keep(ids, f"{what} counts on its number of channels")
            self._settle()
            passed = further if torch.equal(rest, self.free) else self._probe(self.free)

    def _trace_again(self) -> None:
        """Trace with all joins known from the start: what was joined late may change the way."""
        while True:
            notes = Notes(self.notes.parent.clone(), dict(self.notes.made))
            self._trace(notes, self.weights)
            before, self.notes = self.root, notes
            self._settle()
            if torch.equal(before, self.root):
                return

    def _probe(self, free: torch.Tensor) -> tuple[int, int] | None:
        """Trace the network without about half of the ids in `free` (bool [ids]).

        None if it reads just what is left of them; else how far it came: how many reads were right,
        and how many of the `rigid` places it had passed, with the one where it stopped.
        """
        have, drop = self.notes, self._sample(free)
        if not drop.any():
            return None
        left = Notes(have.parent.clone(), {n: ids[~drop[ids]] for n, ids in have.made.items()})
        left.depthwise = {n: ids[~drop[ids]] for n, ids in have.depthwise.items()}
        left.dense_before = frozenset(have.outputs.keys() - have.depthwise.keys())
        failed = False
        try:
            self._trace(left, self._weights_left(drop))
        except ValueError:
            failed = True
        for place, ((name, ids), (other, whole)) in enumerate(zip(left.reads, have.reads)):
            if name != other or not torch.equal(self.root[ids], self.root[whole[~drop[whole]]]):
                return place, sum(reads <= place for *_, reads in have.rigid)
        if failed or len(left.reads) < len(have.reads):
            return len(left.reads), len(left.rigid) + 1
        joined = not torch.equal(left.roots(torch.arange(len(left.parent))), self.root)
        kept = {root for ids, _ in left.kept for root in self.root[ids].flatten().tolist()}
        fine = not joined and kept <= self.reasons.keys() and len(left.reads) == len(have.reads)
        return None if fine else (len(left.reads), len(left.rigid))

    def _sample(self, free: torch.Tensor) -> torch.Tensor:
        """About half of the `free` ids, bool [ids]; every layer keeps a channel."""
        coin = torch.rand(len(free), generator=torch.Generator().manual_seed(0)) < 0.5
        drop = coin[self.root] & free
        while emptied := self.emptied(drop):
            drop[self.root == self.root[self.outputs[emptied[0]][0]]] = False
        return self._with_copies(drop)

    def _weights_left(self, drop: torch.Tensor) -> dict[str, Weight]:
        """The weights of the network without the ids in `drop`: their shapes only."""
        shapes = {name: list(weight.data.shape) for name, weight in self.weights.items()}
        for (name, axis), ids in self.notes.slices.items():
            shapes[name][axis] = int((~drop[ids]).sum())
        left = {}
        for name, weight in self.weights.items():
            empty = torch.empty(shapes[name], dtype=weight.data.dtype, device="meta")
            left[name] = Weight(name, empty, weight.axis)
        for name in self.notes.copies:
            left[f"{name}.source"] = Weight(f"{name}.source", self.source_left(name, drop), 0)
        return left

    # ---- answers ----

    def weight(self, layer: str) -> tuple[str, Any]:
        """Name of the weight of a layer, as `outputs` and `inputs` name it, and what it is now."""
        name = layer if layer in self.weights else f"{layer}.weight"
        module, _, key = name.rpartition(".")
        return name, getattr(self.modules[module], key)

    def prunable_norms(self, residual: bool = False, keep: Iterable[str] = ()) -> list[str]:
        """Names of the BatchNorms whose channels can be removed, in the order of the network.

        residual: also those whose channels take part in an addition, not only a block's inner ones.
        keep: names of modules that are to stay as they are, with all they write, scale and read.
        Raises ValueError for an unknown name in `keep`.
        """
        stay = set(self.reasons) | self._kept_by([keep] if isinstance(keep, str) else keep)
        if self.notes.added and not residual:
            stay.update(self.root[torch.cat(self.notes.added)].tolist())
        return [n for n, ids in self.norms.items() if stay.isdisjoint(self.root[ids].tolist())]

    def _kept_by(self, keep: Iterable[str]) -> set[int]:
        stay: set[int] = set()
        for prefix in keep:
            if prefix not in self.modules:
                hint = nearest(prefix, self.modules)
                raise ValueError(f"keep={prefix!r}: the network has no such module{hint}")
            for table in (self.outputs, self.norms, self.inputs):
                for name, ids in table.items():
                    if name == prefix or name.startswith(f"{prefix}."):
                        stay.update(self.root[ids].tolist())
        return stay

    def reason(self, norm: str) -> str:
        """Why BatchNorm `norm` cannot be pruned; empty if it can."""
        roots = self.root[self.norms[norm]].tolist()
        return next((self.reasons[r] for r in roots if r in self.reasons), "")

    def dropped(self, masks: dict[str, torch.Tensor]) -> torch.Tensor:
        """Bool [ids]: the channels that go. One goes only if every BatchNorm on it drops it."""
        stay = [torch.tensor([True])]
        for name, ids in self.norms.items():
            stay.append(masks[name].cpu() if name in masks else torch.ones_like(ids).bool())
        keep = ~self.free
        keep[self.root[self.rows["norms"].ids[torch.cat(stay)]]] = True
        return self._with_copies(~keep[self.root])

    def _with_copies(self, drop: torch.Tensor) -> torch.Tensor:
        """A channel that copies one of the stage before is empty only if that one goes too."""
        while True:
            before = drop.clone()
            for read, written, source, _ in self.notes.copies.values():
                copies = source > 0
                alone = drop[written[copies]] & ~drop[read[source[copies] - 1]]
                drop[torch.isin(self.root, self.root[written[copies][alone]])] = False
            if torch.equal(before, drop):
                return drop

    def source_left(self, shortcut: str, drop: torch.Tensor) -> torch.Tensor:
        """What is left of the `source` of a PaddedShortcut, renumbered: int64 [written]."""
        read, written, source, _ = self.notes.copies[shortcut]
        kept = ~drop[read]
        place = torch.cat([torch.zeros(1, dtype=torch.long), torch.where(kept, kept.cumsum(0), 0)])
        return place[source[~drop[written]]]

    def shares_left(self, drop: torch.Tensor) -> dict[str, float]:
        """Layer -> the share of its MACs that is left without the ids in `drop`."""
        shares = dict.fromkeys([*self.inputs, *self.outputs], 1.0)
        for rows in (self.rows["inputs"], self.rows["outputs"]):
            for name, size, left in zip(rows.names, rows.sizes, rows.left(drop), strict=True):
                shares[name] *= left / size
        return shares

    def emptied(self, drop: torch.Tensor) -> list[str]:
        """Names of the layers of which nothing is left without the ids in `drop`."""
        lefts = zip(self.outputs, self.rows["outputs"].left(drop), strict=True)
        return [name for name, left in lefts if not left]


Network: TypeAlias = nn.Module | ChannelGraph  # a model, to be given with an example, or its graph


def as_graph(model: Network, example: Any = None, constants: bool = False) -> ChannelGraph:
    """The graph of a model and an example; one that was made before is handed through.

    constants: of today, if the graph is older. Raises ValueError if the example is missing.
    """
    if isinstance(model, ChannelGraph):
        return model.renewed() if constants else model
    if example is None:
        raise ValueError(
            f"an example input is needed to follow the channels of {type(model).__name__}: give "
            "one batch of images, such as data.example or torch.zeros(1, 3, 32, 32)"
        )
    return ChannelGraph(model, example)


class _Rows:
    """The rows of a table (module -> ids) behind one another; `NO_CHANNEL` stands in front."""

    def __init__(self, table: dict[str, torch.Tensor]):
        self.names, self.sizes = [*table], [len(ids) for ids in table.values()]
        self.ids = torch.cat([torch.tensor([NO_CHANNEL]), *table.values()])
        self.ends = torch.tensor([0, *self.sizes]).cumsum(0)

    def left(self, drop: torch.Tensor) -> list[int]:
        """How many ids of each row are left without those in `drop`."""
        return (~drop[self.ids]).cumsum(0)[self.ends].diff().tolist()


def _refuse_example(model: nn.Module, example: Any) -> None:
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if kind is None:
        raise ValueError(
            f"{type(model).__name__} has no floating-point parameters: there is nothing to prune, "
            "or it is quantized; prune it before quantizing"
        )
    for x in tree_leaves(example):
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != kind:
            given = f"the example is {x.dtype}, the network {kind}"
            raise ValueError(f"{given}: give example.to({kind})")


def _refuse_reparametrized(modules: dict[str, Any]) -> None:
    """A weight that is computed from others before every forward cannot be cut: say what helps."""
    for name, m in modules.items():
        remedy = ""
        if hasattr(m, "parametrizations"):
            key = next(iter(m.parametrizations))
            remedy = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {key!r})"
        elif "weight_g" in m._parameters:
            remedy = "torch.nn.utils.remove_weight_norm(layer)"
        elif "weight_orig" in m._parameters and "weight_u" in m._buffers:
            remedy = "torch.nn.utils.remove_spectral_norm(layer)"
        elif masked := [key for key in m._parameters if key.endswith("_orig")]:
            remedy = f"torch.nn.utils.prune.remove(layer, {masked[0].removesuffix('_orig')!r})"
        if remedy:
            raise ValueError(
                f"a weight of {name!r} is computed from other tensors; make it an ordinary one "
                f"first: layer = model.get_submodule({name!r}); {remedy}"
            )
