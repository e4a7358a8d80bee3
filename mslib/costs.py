"""What a network costs: multiply-accumulates (MACs), parameters, and measured latency."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from .exports import feed, quiet, session
from .files import reason
from .networks import (
    ShapesOnly,
    as_inputs,
    call,
    layer_of,
    map_images,
    meta_copy,
    misfit,
    named_tensors,
    tensors_among,
    tensors_in,
    unwrap,
)

log = logging.getLogger("mslib")


@dataclass(frozen=True)
class Cost:
    """`macs`: multiply-accumulates for one image. `params`: all parameters.

    `layers`: MACs by the name of the module whose weight they need; of another tensor of the
    network, by its own name; of products without one, by the innermost module that runs.
    """

    macs: int
    params: int
    layers: dict[str, int] = field(repr=False, default_factory=dict)

    def __str__(self) -> str:
        return f"{self.macs / 1e6:,.2f} M MACs, {self.params / 1e6:,.3f} M parameters"


@torch.no_grad()
def cost(model: nn.Module, example: Any) -> Cost:
    """MACs for one image of `example`, and the number of parameters.

    example: float [N, C, H, W], a tuple or list of several inputs, or a dict of inputs by name.

    Counted by torch.utils.flop_counter, two FLOPs a MAC: convolutions, linear layers, matrix
    products and attention. Biases, BatchNorm and
    activations are left out, as in the papers' "FLOPs". The model runs once, without data, on
    PyTorch's meta device; one that cannot is run on the CPU. Raises ValueError that names the
    example's and the network's types if it does not run on the example.
    """
    model = unwrap(model)
    args, kwargs = map_images(lambda t: t[:1], *as_inputs(example))
    kinds = {t.dtype for t in tensors_in((args, kwargs))}
    same = kinds <= {p.dtype for p in model.parameters()}  # meta does not tell types apart
    try:
        layers = _count(meta_copy(model), kwargs or args) if same else None
    except Exception:  # an operation without shapes of its own, or a wrong example: the CPU tells
        layers = None
    if layers is None:
        try:
            with torch.random.fork_rng(devices=[]):
                layers = _count(copy.deepcopy(model).cpu().eval(), kwargs or args)
        except Exception as error:  # of any kind, from inside the network
            raise ValueError(misfit(model, example, error)) from error
    return Cost(sum(layers.values()), sum(p.numel() for p in model.parameters()), layers)


class _Counter(ShapesOnly):
    """Adds up in `layers` the MACs of what runs inside it, as `Cost` names them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.layers: dict[str, int] = {}
        self.inside: list[str] = []  # names of the modules that run
        tensors = ((name, t) for name, t in named_tensors(model) if not is_lazy(t))
        self.weights = {t.untyped_storage()._cdata: layer_of(name) for name, t in tensors}
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(self._leave)

    def _enter(self, name: str, *_: Any) -> None:
        self.inside.append(name)

    def _leave(self, *_: Any) -> None:
        self.inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self.run(func, args, kwargs)
        if flops := flop_registry.get(func.overloadpacket):
            macs = flops(*args, **kwargs, out_val=out) // 2
            matrices = [t for t in tensors_among(args, kwargs) if t.ndim > 1]  # no biases
            places = [t.untyped_storage()._cdata for t in matrices]  # a view's is the weight's
            # a weight stands behind what it reads
            name = [self.inside[-1], *(self.weights[p] for p in places if p in self.weights)][-1]
            self.layers[name] = self.layers.get(name, 0) + macs
        return out


def _count(model: nn.Module, example: Any) -> dict[str, int]:
    """MACs by module name of one forward pass of `model`, a throw-away copy."""
    with counted_attention(), torch.inference_mode(False), _Counter(model) as counter:
        call(model, example)
    return counter.layers


@contextmanager
def counted_attention() -> Iterator[None]:
    """Run attention as matrix products, which are counted, not as one operation, which is not."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass: median, and interquartile range."""

    median: float
    iqr: float
    batch_size: int
    threads: int

    def __str__(self) -> str:
        images = f"{self.batch_size} image(s) on {self.threads} thread(s)"
        return f"{self.median:.2f} ms ± {self.iqr / 2:.2f} for {images}"


@torch.no_grad()
def latency(
    model: nn.Module | str | Path, example: Any, seconds: float = 1.0, compiled: bool = False
) -> Latency:
    """Time `model` on `example` for about `seconds`, warm, in evaluation mode, channels last.

    example: float [N, C, H, W], a tuple or list of several inputs, or a dict of inputs by name.
    The network is timed as it is deployed: with BatchNorms folded into the convolutions before
    them. One that torch.fx cannot trace is timed as it is, and a log line says so.
    compiled: by torch.compile, which takes half a minute and, on a CPU, needs a C++ compiler.
    `model` may be the path of an .onnx file: that is timed in ONNX Runtime on the CPU.
    Milliseconds are of this machine at this moment: compare two networks in one session.
    Raises RuntimeError where torch.compile cannot do its work, ValueError for a wrong example.
    """
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds={seconds}: expected a number above 0, such as 1.0")
    args, kwargs = as_inputs(example)
    run: Any
    if isinstance(model, (str, Path)):
        run, args, kwargs = _runtime(model, args, kwargs)
    else:
        run, args, kwargs = _deployed(unwrap(model), args, kwargs)
    with quiet("torch.utils.cpp_extension"):  # it looks for a CUDA compiler, in vain
        from torch.utils.benchmark import Timer

        if compiled:
            torch.compiler.reset()  # after eight networks it would give up
            run = torch.compile(run, options={"freezing": True})
        try:
            run(*args, **kwargs)
        except Exception as error:  # of many kinds, by what is missing
            if not compiled:
                raise ValueError(misfit(model, example, error)) from error
            raise RuntimeError(
                f"torch.compile cannot compile {type(model).__name__} here: {reason(error)}; "
                "install g++, or leave compiled=False"
            ) from error
        threads = torch.get_num_threads()
        scope = {"model": run, "args": args, "kwargs": kwargs}
        timer = Timer("model(*args, **kwargs)", globals=scope, num_threads=threads)
        timer.timeit(3)  # warm
        measured = timer.blocked_autorange(min_run_time=seconds)
    images = next((len(t) for t in tensors_in(example) if t.ndim), 1)
    return Latency(1e3 * measured.median, 1e3 * measured.iqr, images, threads)


def _deployed(model: nn.Module, args: tuple, kwargs: dict) -> tuple[Any, tuple, dict]:
    """A copy of `model` with BatchNorms folded into convolutions, and its inputs, channels last."""
    from torch.fx.experimental.optimization import fuse

    run = copy.deepcopy(model).eval()
    try:
        run = fuse(run)
    except Exception as error:
        log.warning("%s is timed with its BatchNorms: %s", type(model).__name__, reason(error))
    weights = [*run.parameters()]
    device = weights[0].device if weights else torch.device("cpu")
    if all(w.ndim < 5 for w in weights):
        run = run.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        last = torch.channels_last if value.ndim == 4 else torch.preserve_format
        return value.to(device, memory_format=last, copy=True)  # forward may work in place

    return run, *tree_map(place, (args, kwargs))


def _runtime(path: str | Path, args: tuple, kwargs: dict) -> tuple[Any, tuple, dict]:
    """What runs an .onnx file on the inputs, which it already holds."""
    file = session(path)
    return partial(file.run, None, feed(file, args, kwargs)), (), {}
