"""What a network costs: multiply-accumulates (MACs), parameters, and measured latency."""

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from .exports import session

log = logging.getLogger("mslib")


@dataclass(frozen=True)
class Cost:
    """`macs`: multiply-accumulates of convolutions and linear layers for one image. `params`: all parameters."""

    macs: int
    params: int
    layers: dict = field(repr=False, default_factory=dict)  # module name -> MACs

    def __str__(self):
        return f"{self.macs / 1e6:,.2f} M MACs, {self.params / 1e6:,.3f} M parameters"


@torch.no_grad()
def cost(model, example):
    """MACs for one image of `example` [N, C, H, W], and the number of parameters.

    Counted as the papers count "FLOPs": one multiplication and addition is one; biases, BatchNorm and activations
    are left out. The model runs once, without data, on PyTorch's meta device.
    """
    layers, clone = {}, copy.deepcopy(model).to("meta").eval()

    def count(m, _, out):
        layers[names[m]] = layers.get(names[m], 0) + out[0].numel() * m.weight[0].numel()

    names = {m: name for name, m in clone.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    for m in names:
        m.register_forward_hook(count)
    clone(example[:1].to("meta"))
    return Cost(sum(layers.values()), sum(p.numel() for p in model.parameters()), layers)


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass: median, and interquartile range."""

    median: float
    iqr: float
    batch_size: int
    threads: int

    def __str__(self):
        return f"{self.median:.2f} ms ± {self.iqr / 2:.2f} for {self.batch_size} image(s) on {self.threads} thread(s)"


@torch.no_grad()
def latency(model, example, seconds=1.0, compiled=False):
    """Time `model` on `example` [N, C, H, W] for about `seconds`, warm, in evaluation mode, channels last.

    As it is deployed: with BatchNorms folded into the convolutions before them; a network that torch.fx cannot trace is
    timed as it is, and a log line says so. `compiled`: by torch.compile, which also does additions and ReLUs in the
    convolutions before them, and lays the weights out for the processor; half a minute of preparation, and on a CPU it
    needs a C++ compiler. `model` may be the path of an .onnx file: that is timed in ONNX Runtime on the CPU.
    Compare two networks in one session only, and read the ratio: milliseconds are of this machine at this moment.
    Raises RuntimeError where torch.compile cannot do its work.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(
        logging.ERROR
    )  # it looks for a CUDA compiler, in vain
    from torch.utils.benchmark import Timer

    if isinstance(model, (str, Path)):
        file, x = session(model), example.cpu().numpy()
        run = lambda x: file.run(None, {"images": x})  # noqa: E731
    else:
        run = copy.deepcopy(model).eval()
        try:
            run = fuse(run)
        except Exception as error:
            log.warning(
                "%s is timed with its BatchNorms: %s",
                type(model).__name__,
                str(error).splitlines()[0],
            )
        run = run.to(memory_format=torch.channels_last)
        x = example.to(next(run.parameters()).device, memory_format=torch.channels_last)
        if compiled:
            torch.compiler.reset()  # after eight networks it would give up
            run = torch.compile(run, options={"freezing": True})
            try:
                run(x)
            except Exception as error:  # of many kinds, by what is missing
                why = str(error).strip().splitlines()[0]
                raise RuntimeError(
                    f"torch.compile cannot compile {type(model).__name__} here: {why}; install g++, or leave compiled=False"
                ) from error
    threads = torch.get_num_threads()
    timer = Timer("model(x)", globals={"model": run, "x": x}, num_threads=threads)
    timer.timeit(3)  # warm
    measured = timer.blocked_autorange(min_run_time=seconds)
    return Latency(1e3 * measured.median, 1e3 * measured.iqr, len(example), threads)
