"""Networks of any width: their layers resized, written to a file, and made again from it."""

import copy
import inspect
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .architectures import NETWORKS, PaddedShortcut, network, resnet, untrained, vgg  # noqa: F401
from .files import read_tensors, reason, regular, replacing

log = logging.getLogger("mslib")
FORMAT = "mslib 2"  # of the files of `save`; mslib 0.1 wrote torch's own format


def batch_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Name and module of every BatchNorm of `model` that has a γ, in the order of its modules."""
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm))
    return [(name, m) for name, m in found if m.affine]


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def as_inputs(example: Any) -> tuple[tuple, dict]:
    """(positional, keyword) inputs that an example means: a tensor, tuple, list or dict."""
    if isinstance(example, torch.Tensor):
        example = (example,)
    if (sizes := [len(t) for t in tensors_in(example) if t.ndim]) and not any(sizes):
        raise ValueError("the example holds no image: its first size is 0")
    if isinstance(example, (tuple, list)) and example:
        return tuple(example), {}
    if isinstance(example, dict) and example:
        return (), dict(example)
    raise ValueError(
        f"example is {type(example).__name__ if example is not None else None}; expected a float "
        "tensor [N, C, H, W], a tuple or list of several inputs, or a dict of inputs by name"
    )


def call(model: nn.Module, example: Any) -> Any:
    """What `model` returns for an example: a tensor, tuple, list or dict of inputs, moved to it.

    Its forward gets a copy: it may work in place.
    """
    device = next((p.device for p in model.parameters()), "cpu")
    args, kwargs = moved(as_inputs(example), device, copy=True)
    return model(*args, **kwargs)


def tensors_in(out: Any) -> list[torch.Tensor]:
    """All tensors that a network returned, in dicts, lists, tuples, dataclasses and objects."""
    found = []
    for leaf in tree_leaves(out):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            found += tensors_in(vars(leaf))
    return found


def copied(model: nn.Module, replaced: Mapping[int, torch.Tensor] | None = None) -> nn.Module:
    """A deep copy of `model`. `replaced`: id of a tensor -> what stands in its place.

    Tensors that forward computed and kept (`self.last = x`) are copied without their history.
    """
    memo: dict[int, Any] = dict(replaced or {})
    for m in model.modules():
        for value in vars(m).values():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo.setdefault(id(value), value.detach().clone())
            elif type(value) is OrderedDict and not value:  # of hooks: a dozen in every module
                memo.setdefault(id(value), OrderedDict())
    return copy.deepcopy(model, memo)


def map_images(change: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """`change` applied to the inputs that hold images: tensors with as many rows as the first.

    In lists and dicts, too; but a list of images, each [C, H, W], has no rows.
    """
    inputs = [v for v in (*args, *kwargs.values()) if torch.is_tensor(v) and v.ndim]
    inputs = inputs or [t for t in tensors_in((args, kwargs)) if t.ndim > 3]
    rows = len(inputs[0]) if inputs else -1
    images = lambda v: torch.is_tensor(v) and v.ndim and len(v) == rows  # noqa: E731
    return tree_map(lambda v: change(v) if images(v) else v, (args, kwargs))


def misfit(model: Any, example: Any, error: Exception) -> str:
    """Why `model` does not run on `example`: types and shapes of both."""
    given = ", ".join(f"{str(t.dtype)[6:]} {list(t.shape)}" for t in tensors_in(example)[:3])
    weights = {str(p.dtype)[6:] for p in getattr(model, "parameters", list)()}
    return (
        f"{type(model).__name__} ({', '.join(sorted(weights))}) does not run on the example "
        f"({given or 'no tensor'}): {reason(error)}. Give an input of the network's type and size; "
        "for a network that takes one list of images, a tuple with that list: ([image],)"
    )


def named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Name and tensor of every parameter and buffer, each once."""
    return [*model.named_parameters(), *model.named_buffers()]


def layer_of(weight: str) -> str:
    """The module whose `weight` a tensor is; else its own name, as a module may have several."""
    return weight.removesuffix(".weight")


def meta_copy(
    model: nn.Module, shapes: Mapping[str, Sequence[int]] | None = None, training: bool = False
) -> nn.Module:
    """A copy of `model` on PyTorch's meta device: shapes without data. No weight is copied.

    shapes: name of a parameter or buffer -> the shape it is to have instead of its own.
    """
    memo: dict[int, torch.Tensor] = {}
    for name, t in named_tensors(model):
        shape = t.shape if shapes is None else shapes.get(name, t.shape)
        empty = torch.empty(shape, dtype=t.dtype, device="meta")
        memo[id(t)] = nn.Parameter(empty, False) if isinstance(t, nn.Parameter) else empty
    return copied(model, memo).train(training)


class ShapesOnly(TorchDispatchMode):
    """Inside it a `meta_copy` runs. Its forward may make tensors without asking for a device.

    A BatchNorm's shapes are told at once: PyTorch derives them in Python, slower than all the rest.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    @staticmethod
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        tensors = tensors_among(args, kwargs)
        if any(t.is_meta for t in tensors) and not all(t.is_meta for t in tensors):
            args, kwargs = moved((args, kwargs), "meta")
        if func is torch.ops.aten.native_batch_norm.default and args[0].is_meta:
            x, some = args[0], args[0].new_empty(args[0].shape[1] if args[5] else 0)  # in training
            return x.new_empty_strided(x.shape, x.stride()), some, some
        return func(*args, **kwargs)


def tensors_among(args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors that an operation of PyTorch is given, some of them in lists."""
    found = []
    for a in (*args, *kwargs.values()):
        if isinstance(a, torch.Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)):
            found += [t for t in a if isinstance(t, torch.Tensor)]
    return found


def moved(inputs: Any, device: str | torch.device, copy: bool = False) -> Any:
    """The same inputs on `device`; on "meta" they have no numbers."""
    return tree_map(lambda x: x.to(device, copy=copy) if torch.is_tensor(x) else x, inputs)


def save(model: nn.Module, path: str | Path) -> None:
    """Write weights, widths and the recipe of `model` to `path`, in the format of safetensors.

    A pruned network is saved like any other. A log line says so when `load` cannot rebuild the
    network from the file alone. Raises ValueError that names a tensor which cannot be saved.
    """
    model = unwrap(model)
    first: dict[tuple, str] = {}  # memory -> the first name it has
    tied, stored = {}, {}
    check_savable(model)
    for name, value in model.state_dict().items():
        same = first.setdefault(_memory(value), name)
        if same != name:
            tied[name] = same
        else:
            stored[name] = value.detach().clone(memory_format=torch.contiguous_format).cpu()
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, _ConvNd)}
    groups = {name: m.groups for name, m in convolutions.items() if m.groups > 1}
    recipe, missing = getattr(model, "recipe", None), None
    try:
        _rebuild(recipe, stored | {k: stored[v] for k, v in tied.items()}, groups, path)
    except ValueError as error:
        recipe, missing = None, error
    about = {"format": FORMAT, "recipe": recipe, "groups": groups, "tied": tied}
    metadata = {key: json.dumps(value) for key, value in about.items()}
    with replacing(path) as beside:
        beside.write_bytes(safetensors.torch.save(stored, metadata))
    if missing:
        log.warning("saved, but only ms.load(path, model) can read it: %s", missing)


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The network that `save` wrote to `path`, with the widths it had, on the CPU.

    model: a fresh unpruned network to fill, for one that mslib does not build. It is returned.
    Raises FileNotFoundError, or ValueError for a damaged file or one of another network; `model`
    stays as it is then.
    """
    state, recipe, groups = _read(regular(path))
    if model is None:
        return _rebuild(recipe, state, groups, path)
    resize(unwrap(model), state, path, groups)
    return model


def check_savable(model: nn.Module) -> None:
    """ValueError that names a tensor of `model` which `save` cannot write."""
    for name, value in model.state_dict().items():
        if problem := unusual(value):
            raise ValueError(f"{type(model).__name__} cannot be saved: {name} is {problem}")


def unusual(value: Any) -> str:
    """What keeps `value` from being a plain tensor in a file; empty if nothing does."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}, not a tensor"
    if is_lazy(value):
        return "without a shape before the first forward pass; run the network once"
    if value.is_meta or value.is_complex() or value.is_quantized or value.layout != torch.strided:
        return (
            f"a {value.dtype} tensor on {value.device.type}, {value.layout}; expected real values"
        )
    return ""


def _memory(tensor: torch.Tensor) -> tuple:
    """Tells whether two tensors are one in memory (tied weights)."""
    place = tensor.data_ptr() or id(tensor)  # 0: without data
    return tensor.device, place, tensor.dtype, tensor.shape, tensor.stride()


def _read(path: Path) -> tuple[dict[str, torch.Tensor], Any, dict[str, int] | None]:
    """(tensors by name, recipe, groups of convolutions) of a file, checked but for the recipe."""
    with open(path, "rb") as file:
        old = file.read(2) == b"PK"  # mslib 0.1: {"recipe": …, "state": …}, without groups
    if old:
        about = read_tensors(path)
        state = about.get("state") if isinstance(about, dict) else None
        groups, tied = None, {}
    else:
        try:
            with safetensors.safe_open(path, "pt") as opened:
                about = opened.metadata() or {}
                state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            version = json.loads(about["format"])
            if version == FORMAT:
                about = {key: json.loads(about[key]) for key in ("recipe", "groups", "tied")}
        except Exception as error:  # safetensors raises kinds of its own
            raise ValueError(
                f"{path} cannot be read: truncated, damaged or not written by ms.save "
                f"({reason(error)}); for a plain state_dict use model.load_state_dict"
            ) from None
        if version != FORMAT:
            raise ValueError(
                f"{path} has format {version!r:.99}, and this mslib reads {FORMAT!r}; it may come "
                "from a newer version"
            )
        groups, tied = about["groups"], about["tied"]
    if not isinstance(state, dict) or not isinstance(tied, dict):
        raise ValueError(
            f"{path} was not written by ms.save; for a plain state_dict use model.load_state_dict"
        )
    for alias, name in tied.items():
        if alias in state or not isinstance(name, str) or name not in state:
            raise ValueError(f"{path} is damaged: {alias!r:.99} is said to be {name!r:.99}")
    state |= {alias: state[name] for alias, name in tied.items()}
    counts = groups.values() if isinstance(groups, dict) else [groups]
    if groups is not None and not all(type(count) is int and count > 0 for count in counts):
        raise ValueError(f"{path} is damaged: its groups are no whole numbers above 0")
    for name, value in state.items():
        problem = unusual(value)
        if not problem and value.nbytes > value.untyped_storage().nbytes():
            problem = f"larger than the file: {list(value.shape)}"
        if problem or not isinstance(name, str):
            raise ValueError(f"{path} is damaged: {name!r:.99} is {problem or 'no name'}")
    return state, about.get("recipe"), groups


class _Weightless(TorchFunctionMode):
    """Layers made meanwhile have weights with a shape, but without memory (meta)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty:
            options["device"] = "meta"
        elif func.__name__.endswith(("normal_", "uniform_")):
            return args[0] if args else options["tensor"]  # no first values
        return func(*args, **options)


def _rebuild(
    recipe: Any, state: Mapping[str, torch.Tensor], groups: dict[str, int] | None, origin: Any
) -> nn.Module:
    """The network of `recipe` with the widths and values of `state`.

    Nothing is made larger than `state`: the layers get their memory from it. The network runs
    once, without data, which shows whether its widths fit each other.
    """
    if recipe is None:
        raise ValueError(
            f"{origin} holds a network that mslib does not build; ms.load(path, model) fills one"
        )
    options = dict(recipe) if isinstance(recipe, dict) else {}
    kind = options.pop("network", None)
    if not isinstance(kind, str) or kind not in NETWORKS:
        raise ValueError(f"{origin}: unknown network {kind!r:.99}; known: {', '.join(NETWORKS)}")
    try:
        inspect.signature(NETWORKS[kind]).bind(**options)
        depth = options.get("depth")
        if isinstance(depth, int) and depth > len(state):  # before so many layers are made
            raise ValueError(f"depth={depth}, but there are {len(state)} tensors")
        with _Weightless(), torch.random.fork_rng(devices=[]):
            model = NETWORKS[kind](**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{origin}: its recipe cannot be followed: {reason(error)}") from None
    resize(model, state, origin, groups)
    shape = [1, options.get("in_channels", 3), 16, 16]
    if kind == "torchvision":
        shape = [1, 3] + [16] * (".video." in type(model).__module__) + [224, 224]
    try:
        with torch.no_grad():
            image = torch.zeros(shape, dtype=next(p.dtype for p in model.parameters()))
            if kind == "torchvision":
                with ShapesOnly():
                    meta_copy(model)(image.to("meta"))
            else:
                model.eval()(image)
    except Exception as error:  # of any kind, from inside the network
        raise ValueError(f"{origin}: its widths do not fit each other: {reason(error)}") from None
    return model.train()


@torch.no_grad()
def resize(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    origin: Any = "the state",
    groups: Mapping[str, int] | None = None,
) -> nn.Module:
    """Give every layer of `model` the widths and values of `state`, a state_dict. Returns `model`.

    groups: of the convolutions that have more than one, by name; None: depthwise ones stay
    depthwise, others keep theirs. Tensors that are one in `state` become one in `model`.
    Raises ValueError that names the layer, before anything is changed.
    """
    if lazy := [name for name, t in named_tensors(model) if is_lazy(t)]:
        raise ValueError(f"{origin} does not fit: {lazy[0]} has no shape yet; run the network once")
    _resize(meta_copy(model), state, origin, groups)
    _resize(model, state, origin, groups)
    return model


def _resize(model: nn.Module, state: Mapping, origin: Any, groups: Mapping | None) -> None:
    """Make room in each layer, and have PyTorch fill it, by hooks and extra states as well."""
    made: dict[tuple, torch.Tensor] = {}  # memory in `state` -> the tensor of `model` for it
    taken: set[int] = set()
    for name, m in model.named_modules():
        if isinstance(m, (_ConvNd, nn.Linear)) and m.bias is None and _join(name, "bias") in state:
            m.bias = nn.Parameter(torch.zeros(1, device=m.weight.device))  # that `prune` added
        tensors = [*m.named_parameters(recurse=False, remove_duplicate=False)]
        for key, old in tensors + [*m.named_buffers(recurse=False, remove_duplicate=False)]:
            new = state.get(_join(name, key))
            if new is None:
                continue  # a buffer that is not saved; or a name is missing, which is told below
            if not _alike(old, new):
                raise ValueError(
                    f"{origin} does not fit {type(model).__name__}: {_join(name, key)} is "
                    f"{list(new.shape)}, {new.dtype}; the network has {[*old.shape]}, {old.dtype}"
                )
            same = (*_memory(new), isinstance(old, nn.Parameter))
            if same not in made:
                made[same] = _room(old, new, taken=id(old) in taken)
                taken.add(id(made[same]))
            setattr(m, key, made[same])
        if isinstance(m, _ConvNd) and groups is not None:
            m.groups = groups.get(name, 1)
        elif isinstance(m, _ConvNd) and 1 < m.groups == m.in_channels and not m.transposed:
            m.groups = max(1, len(m.weight) // (m.out_channels // m.in_channels))
    given = OrderedDict(state)
    # the versions of its modules: without them, PyTorch takes the weights for those of old ones
    given._metadata = getattr(model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    try:
        nn.Module.load_state_dict(model, given)  # strictly, whatever the network's own would do
        sync_widths(model)
    except Exception as error:  # of many kinds, from hooks of the network's own
        why = " ".join(str(error).split()).removeprefix("Error(s) in loading state_dict for ")
        raise ValueError(f"{origin} does not fit {why:.300}") from None


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _alike(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether two tensors differ in nothing but widths and precision."""
    empty = 0 in new.shape and 0 not in old.shape
    kinds = old.is_floating_point() == new.is_floating_point()
    return old.ndim == new.ndim and kinds and not empty


def _room(old: torch.Tensor, new: torch.Tensor, taken: bool) -> torch.Tensor:
    """A tensor like `old` of the shape and precision of `new`; `old` itself if it can be."""
    if not (taken or old.is_meta) and (old.shape, old.dtype) == (new.shape, new.dtype):
        return old
    fresh = torch.empty_like(new, device=new.device if old.is_meta else old.device)
    return nn.Parameter(fresh, old.requires_grad) if isinstance(old, nn.Parameter) else fresh


def sync_widths(model: nn.Module) -> None:
    """Make in_channels, num_features … of all layers say what the shapes of their weights say.

    Groups stay. Raises ValueError that names a layer whose tensors do not fit each other.
    """
    for name, m in model.named_modules():
        weight = m._parameters.get("weight")
        weight = m._buffers.get("running_mean") if weight is None else weight
        if weight is None:  # reparametrized layers too: reading their weight may change it
            continue
        shape, fits = weight.shape, True
        width: tuple[int, ...] = tuple(shape[:1])
        if isinstance(m, _ConvNd):  # [out, in / groups, …]; transposed: [in, out / groups, …]
            first, second = shape[0], shape[1] * m.groups
            m.in_channels, m.out_channels = (first, second) if m.transposed else (second, first)
            width, fits = (m.out_channels,), (first % m.groups, *shape[2:]) == (0, *m.kernel_size)
        elif isinstance(m, nn.Linear):
            m.out_features, m.in_features = shape
        elif isinstance(m, _NormBase):
            m.num_features = shape[0]
        elif isinstance(m, nn.PReLU):
            m.num_parameters = shape[0]
        elif isinstance(m, nn.GroupNorm):
            m.num_channels, fits = shape[0], shape[0] % m.num_groups == 0
        elif isinstance(m, (nn.LayerNorm, nn.RMSNorm)):
            m.normalized_shape = width = tuple(shape)
        else:
            continue
        others = [getattr(m, key, None) for key in ("bias", "running_mean", "running_var")]
        if not fits or any(t is not None and tuple(t.shape) != width for t in others):
            raise ValueError(
                f"{type(model).__name__}: {name}, {m}, has a weight {list(shape)} "
                f"and {[list(t.shape) for t in others if t is not None]} beside it"
            )
