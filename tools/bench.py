"""Benchmarks: this library against a named alternative, both in one run on one machine.

Milliseconds are of this machine at this moment. Read the ratios.
"""

import copy
import itertools
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, Dataset

import mslib
from mslib.costs import cost, latency
from mslib.data.shapes import draw_shapes
from mslib.data.tensors import Data, Split, steps_per_epoch
from mslib.files import ROOT, write_json
from mslib.networks import network, resnet
from mslib.pruning.graph import ChannelGraph
from mslib.pruning.masks import masks_for_macs
from mslib.pruning.surgery import prune
from mslib.training.device import pick_device, pick_precision
from mslib.training.loop import fit
from mslib.training.runs import environment

log = logging.getLogger("mslib")

HOW = {False: "as it is", True: "compiled"}
BATCH = 128
TEXTBOOK = "textbook loop (DataLoader, PIL transforms, fp32, default layout)"

Row = dict[str, Any]


def bench(
    path: str | Path,
    depth: int = 56,
    images: int = 1280,
    rounds: int = 3,
    seconds: float = 1.0,
    size: int = 224,
    say: Callable[[str], object] = print,
) -> pd.DataFrame:
    """Run all benchmarks, write them to `path` (JSON) and return them as a table.

    `depth`: of the CIFAR ResNet. `images`: how many each training loop sees in each of `rounds`.
    `seconds`: for each latency. `size`: of ResNet-50's images, in pixels.
    Returns a row a measurement: what, unit, ours, theirs, ratio, theirs_is. A ratio above 1 says
    that ours is that many times better; of "share" rows it is the share.
    """
    compiled = _compiles()
    parts = [
        imports(rounds),
        training(depth, images, rounds, (False, True) if compiled else (False,)),
        captured(depth) if torch.cuda.is_available() else (),
        speed_ups(depth, rounds, seconds, size, compiled),
        surgery(rounds, size),
    ]
    rows = []
    for row in itertools.chain.from_iterable(parts):
        rows.append(row)
        say("{what}: {ours:.4g} {unit}; {theirs_is}: {theirs:.4g}; ratio {ratio:.2f}".format(**row))
    write_json(path, {"rows": rows, "mslib": mslib.__version__} | environment())
    return pd.DataFrame(rows)


def _row(
    what: str,
    unit: str,
    ours: float,
    theirs: float,
    theirs_is: str,
    less_is_better: bool = False,
) -> Row:
    ratio = theirs / ours if less_is_better else ours / theirs
    row = {"what": what, "unit": unit, "ours": ours, "theirs": theirs}
    return row | {"ratio": ratio, "theirs_is": theirs_is}


def _compiles() -> bool:
    """Whether torch.compile works here: on a CPU it needs a C++ compiler."""
    try:
        torch.compile(nn.Linear(1, 1))(torch.ones(1, 1))
        return True
    except Exception as error:  # of many kinds
        why = f"{type(error).__name__}: {error}"[:200]
        log.warning("torch.compile does not work here, its rows are left out: %s", why)
        return False


# ---- the machine ---------------------------------------------------------------------------------


def this_precision() -> str:
    """The precision that `fit` takes by itself for a CIFAR ResNet on this device."""
    return pick_precision("auto", pick_device(), resnet(8), torch.zeros(1, 3, 32, 32))


def matmul_rate(precision: str, side: int | None = None, seconds: float = 0.5) -> float:
    """Floating-point operations a second of `torch.mm` on two square matrices: the machine's own.

    `side`: rows of the matrices; large enough for the device to be busy. An addition and a
    multiplication are two operations here, as processors are rated.
    """
    device = pick_device()
    side = side or (8192 if device.type == "cuda" else 2048)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    threads = torch.get_num_threads()
    timer = Timer("torch.mm(a, b)", globals={"torch": torch, "a": a, "b": b}, num_threads=threads)
    return 2 * side**3 / timer.blocked_autorange(min_run_time=seconds).median


def imports(rounds: int) -> Iterator[Row]:
    """Seconds that `import mslib` takes in a process that has imported torch and torchvision."""
    clock = "from time import perf_counter as now; a = now(); import torch, torchvision; b = now()"
    program = f"{clock}; import mslib; print(b - a, now() - b)"
    seconds = []
    for _ in range(rounds):
        command = [sys.executable, "-c", program]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append([float(number) for number in run.stdout.split()])
    theirs, ours = (min(column) for column in zip(*seconds))
    what = "import mslib, on top of torch and torchvision"
    yield _row(what, "s", ours, theirs, "importing these two", less_is_better=True)


# ---- training ------------------------------------------------------------------------------------


class _Pictures(Dataset):
    """A split as the textbook has it: PIL images, torchvision's transforms, an image at a time."""

    def __init__(self, split: Split) -> None:
        from torchvision import transforms

        self.split = split
        steps = (
            transforms.ToPILImage(),
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.47] * 3, [0.25] * 3),
        )
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.split.images[i]), int(self.split.labels[i])


def textbook(model: nn.Module, data: Data, workers: int = 2) -> float:
    """The loop that tutorials teach; seconds of its second epoch.

    DataLoader, PIL transforms, fp32, PyTorch's default layout.
    """
    device = pick_device()
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(
        _Pictures(data.train),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
    )
    for _ in range(2):
        began = time.perf_counter()
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()  # waits for the device
    return time.perf_counter() - began


class _Clock:
    """A penalty of nothing that notes when each epoch begins."""

    def __init__(self, steps: int) -> None:
        self.steps, self.device = steps, pick_device()
        self.times: list[float] = []

    def __call__(self) -> Tensor:
        return torch.zeros((), device=self.device)

    def step(self, iteration: int) -> None:
        if iteration % self.steps == 0:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def second_epoch(model: nn.Module, data: Data, capture: bool = False) -> float:
    """Seconds of the second epoch of `fit`: what is prepared once, is by then."""
    clock = _Clock(steps_per_epoch(data.train, BATCH))
    settings: Row = {"epochs": 2, "lr": 0.01, "batch_size": BATCH, "precision": this_precision()}
    fit(model, data, penalty=clock, capture=capture, **settings)
    return time.perf_counter() - clock.times[1]


def _data(split: Split) -> Data:
    few = split.subset(range(10))  # `fit` also evaluates
    return Data("bench", split, few, few, tuple("0123456789"))


def training(depth: int, images: int, rounds: int, captures: tuple[bool, ...]) -> Iterator[Row]:
    """Images a second of `fit`, as it is and compiled, against the textbook loop.

    They train in turns on the same drawn images, and the best round of each counts. Each is also
    reported as a share of the machine's matrix-multiplication rate, measured between them: these
    shares can be compared between machines.
    """
    data, seen = _data(Split(*draw_shapes(images, 32))), images // BATCH * BATCH
    precision = this_precision()
    best = {"textbook": 0.0} | {HOW[capture]: 0.0 for capture in captures}
    rates = {"fp32": 0.0, precision: 0.0}
    for _ in range(rounds):
        for kind in rates:
            rates[kind] = max(rates[kind], matmul_rate(kind))
        best["textbook"] = max(best["textbook"], seen / textbook(resnet(depth), data))
        for capture in captures:
            speed = seen / second_epoch(resnet(depth), data, capture)
            best[HOW[capture]] = max(best[HOW[capture]], speed)
    for how, speed in best.items():
        if how != "textbook":
            what = f"training ResNet-{depth}, {how}, batch {BATCH}"
            yield _row(what, "images/s", speed, best["textbook"], TEXTBOOK)
    macs = cost(resnet(depth), data.example).macs
    for how, speed in best.items():
        kind = "fp32" if how == "textbook" else precision
        # forward, and backward to the inputs and to the weights: three times two operations a MAC
        operations = 3 * 2 * macs * speed
        what = f"share of the machine: training ResNet-{depth}, {how}, batch {BATCH}"
        theirs_is = f"torch.mm, {kind}"
        yield _row(what, "GFLOP/s", operations / 1e9, rates[kind] / 1e9, theirs_is)


def captured(depth: int, images: int = 50_000, capture: bool = True) -> Iterator[Row]:
    """Seconds of an epoch of `fit` against what moving its data alone would take.

    The network's pass is captured and warm. The bound: each convolution reads its input and writes
    its output; going back, it reads both again and writes one gradient; at the speed at which this
    device copies.
    """
    pixels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8)
    data, model = _data(Split(pixels, torch.arange(images) % 10)), resnet(depth)
    width = 2 if this_precision() == "bf16" else 4  # bytes a number
    block = torch.empty(2**28, dtype=torch.uint8, device=pick_device())
    timer = Timer("block.clone()", globals={"block": block})
    copying = timer.blocked_autorange(min_run_time=0.5).median
    bandwidth = 2 * len(block) / copying  # it is read and written
    bound = images * width * numbers_moved(model, data.example) / bandwidth
    what, theirs_is = f"one epoch of {images:,} images, ResNet-{depth}", "the memory's bound"
    ours = second_epoch(model, data, capture)
    yield _row(what, "s", ours, bound, theirs_is, less_is_better=True)


def numbers_moved(model: nn.Module, example: Tensor) -> int:
    """Numbers that the convolutions of `model` read and write, forward and back, for an image."""
    twin, moved = copy.deepcopy(model), []

    def note(_: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        moved.append(3 * inputs[0].numel() + 2 * out.numel())

    for module in twin.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    twin(example[:1])
    return sum(moved)


# ---- inference -----------------------------------------------------------------------------------


def _lively(model: nn.Module) -> nn.Module:
    """Random γ, so that a mask has something to choose from."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.1, 1)
    return model.eval().to(pick_device())


def speed_ups(depth: int, rounds: int, seconds: float, size: int, compiled: bool) -> Iterator[Row]:
    """Measured speed-up of networks cut to half of their MACs, beside what the MACs promise."""
    small, large = _lively(resnet(depth)), _lively(network("resnet50"))
    cuts = (  # network, its name, side of its images, residual channels too, multiples of
        (small, f"ResNet-{depth}", 32, False, 1),
        (small, f"ResNet-{depth}", 32, True, 1),
        (small, f"ResNet-{depth}", 32, True, 8),
        (large, "ResNet-50", size, True, 16),
    )
    for model, name, side, residual, multiple in cuts:
        image = torch.randn(1, 3, side, side, device=pick_device())
        masks = masks_for_macs(model, image, 0.5, residual, round_to=multiple)
        cut = prune(model, masks, image)
        promise = cost(model, image).macs / cost(cut, image).macs
        channels = "inner and residual channels" if residual else "inner channels"
        if multiple > 1:
            channels += f" in multiples of {multiple}"
        for batch in (1, BATCH):
            x = image.expand(batch, *image.shape[1:]).contiguous()
            faster = times_faster(cut, model, x, rounds, seconds, compiled)
            what = f"pruned {name} ({channels}), {HOW[compiled]}, batch {batch}"
            yield _row(what, "times faster", faster, promise, "the ratio of the MACs")


def times_faster(
    cut: nn.Module, model: nn.Module, x: Tensor, rounds: int, seconds: float, compiled: bool
) -> float:
    """How many times faster `cut` is than `model` on `x`: in turns, the best round of each."""
    ours, theirs = float("inf"), float("inf")
    for _ in range(rounds):
        theirs = min(theirs, latency(model, x, seconds, compiled).median)
        ours = min(ours, latency(cut, x, seconds, compiled).median)
    return theirs / ours


# ---- surgery -------------------------------------------------------------------------------------


def surgery(rounds: int, size: int) -> Iterator[Row]:
    """Seconds to choose and remove half of ResNet-50's MACs, against torch-pruning.

    Ours: `masks_for_macs` and `prune`, with the cut verified. Theirs: the dependency graph and the
    removal of the same channels, without a copy of the network and without a check.
    """
    try:
        import torch_pruning  # noqa: F401
    except ImportError:
        log.warning("torch-pruning is not installed: the comparison with it is left out")
        return
    model, image = _lively(network("resnet50")), torch.randn(1, 3, size, size, device=pick_device())
    convolutions = ChannelGraph(model, image).conv_before
    ours, theirs = float("inf"), float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        masks = masks_for_macs(model, image, 0.5)
        small = prune(model, masks, image)
        ours = min(ours, time.perf_counter() - began)
        gone = {
            convolutions[norm]: (~keep).nonzero().flatten().tolist()
            for norm, keep in masks.items()
            if not keep.all()
        }
        other = copy.deepcopy(model)
        began = time.perf_counter()
        _remove(other, image, gone)
        theirs = min(theirs, time.perf_counter() - began)
    if cost(small, image).macs != cost(other, image).macs:
        raise AssertionError("prune and torch-pruning left networks of different cost")
    what, theirs_is = "choosing and pruning half of ResNet-50", "torch-pruning, same channels"
    yield _row(what, "s", ours, theirs, theirs_is, less_is_better=True)


def _remove(model: nn.Module, image: Tensor, gone: dict[str, list[int]]) -> None:
    """torch-pruning's way: `gone` names the channels to remove from each convolution's output."""
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(model, image)
    for name, channels in gone.items():
        module = model.get_submodule(name)
        graph.get_pruning_group(module, tp.prune_conv_out_channels, channels).prune()
