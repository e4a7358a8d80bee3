"""Benchmarks: what this library does against a named alternative, both in one run on one machine; read the ratios."""

import copy
import itertools
import logging
import time

import pandas as pd
import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, Dataset

from mslib.costs import cost, latency
from mslib.data.shapes import draw_shapes
from mslib.data.tensors import Data, Split, steps_per_epoch
from mslib.files import write_json
from mslib.networks import network, resnet
from mslib.pruning.channels import ChannelGraph
from mslib.pruning.masks import masks_for_macs
from mslib.pruning.surgery import prune
from mslib.training.device import pick_device, pick_precision
from mslib.training.loop import fit
from mslib.training.runs import environment

log = logging.getLogger("mslib")
HOW = {False: "as it is", True: "compiled"}


def bench(path, depth=56, images=1280, rounds=3, seconds=1.0, size=224, say=print):
    """Run all benchmarks, write them to `path` (JSON) and return them as a table: what, ours, theirs, unit, ratio, theirs_is.

    `depth`: of the CIFAR ResNet; `images`: how many each training loop sees in each of `rounds`; `seconds`: for each
    latency; `size`: of ResNet-50's images. A ratio above 1 says that ours is that many times better.
    """
    rows, compiled = [], (False, True) if _compiles() else (False,)
    on_a_gpu = captured(depth) if torch.cuda.is_available() else ()
    parts = (
        training(depth, images, rounds, compiled),
        on_a_gpu,
        speed_up(depth, rounds, seconds, size, compiled[-1]),
        surgery(rounds, size),
    )
    for row in itertools.chain(*parts):
        rows.append(row)
        say("{what}: {ours:.4g} {unit}; {theirs_is}: {theirs:.4g}; ratio {ratio:.2f}".format(**row))
    write_json(path, {"rows": rows} | environment())
    return pd.DataFrame(rows)


def _compiles():
    """Whether torch.compile works here: on a CPU it needs a C++ compiler."""
    try:
        torch.compile(nn.Linear(1, 1))(torch.ones(1, 1))
        return True
    except Exception as error:  # of many kinds
        log.warning(
            "torch.compile does not work here, its rows are left out: %s",
            str(error).strip().splitlines()[0],
        )
        return False


def _row(what, unit, ours, theirs, theirs_is, less_is_better=False):
    ratio = theirs / ours if less_is_better else ours / theirs
    return {
        "what": what,
        "unit": unit,
        "ours": ours,
        "theirs": theirs,
        "ratio": ratio,
        "theirs_is": theirs_is,
    }


# ---- training ------------------------------------------------------------------------------------------------------


class _Pictures(Dataset):
    """A split as the textbook has it: PIL images, torchvision's transforms, one image at a time."""

    def __init__(self, split):
        from torchvision import transforms

        self.split = split
        steps = (
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        )
        self.transform = transforms.Compose(
            [transforms.ToPILImage(), *steps, transforms.Normalize([0.47] * 3, [0.25] * 3)]
        )

    def __len__(self):
        return len(self.split)

    def __getitem__(self, i):
        return self.transform(self.split.images[i]), int(self.split.labels[i])


def _data(split):
    few = split.subset(range(10))  # `fit` also evaluates
    return Data("bench", split, few, few, tuple("0123456789"))


def textbook(model, data, batch_size=128, workers=2):
    """The loop that tutorials teach: DataLoader, PIL transforms, fp32, PyTorch's default layout; seconds of its second epoch."""
    device = pick_device()
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(
        _Pictures(data.train),
        batch_size,
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

    def __init__(self, steps):
        self.steps, self.device, self.times = steps, pick_device(), []

    def __call__(self):
        return torch.zeros((), device=self.device)

    def step(self, iteration):
        if iteration % self.steps == 0:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def second_epoch(model, data, capture=False):
    """Seconds of the second epoch of `fit`: what is prepared once, is by then."""
    clock = _Clock(steps_per_epoch(data.train, 128))
    fit(model, data, epochs=2, lr=0.01, penalty=clock, capture=capture)
    return time.perf_counter() - clock.times[1]


def training(depth, images, rounds, compiled):
    """Images a second of `fit`, as it is and compiled, against the textbook loop, in turns on the same drawn images; the best round of each."""
    data, seen = _data(Split(*draw_shapes(images, 32))), images // 128 * 128
    best, theirs = dict.fromkeys(compiled, 0.0), 0.0
    for _ in range(rounds):
        theirs = max(theirs, seen / textbook(resnet(depth), data))
        for capture in best:
            best[capture] = max(best[capture], seen / second_epoch(resnet(depth), data, capture))
    other = "textbook loop (DataLoader, PIL transforms, fp32, default layout)"
    for capture, ours in best.items():
        yield _row(
            f"training ResNet-{depth}, {HOW[capture]}, batch 128", "images/s", ours, theirs, other
        )


def captured(depth, images=50_000, capture=True):
    """Seconds of an epoch of `fit`, the network's pass captured and warm, against what moving its data alone would take.

    That bound: each convolution reads its input and writes its output; going back, it reads both again and writes one
    gradient; at the speed at which this device copies.
    """
    data = _data(
        Split(torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8), torch.arange(images) % 10)
    )
    model, moved, device = resnet(depth), [], pick_device()
    bf16 = pick_precision("auto", device, model, data.example) == "bf16"
    twin = copy.deepcopy(model)
    for m in twin.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(
                lambda _, x, out: moved.append(
                    (3 * x[0].numel() + 2 * out.numel()) * (2 if bf16 else 4)
                )
            )
    twin(data.example)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    copying = (
        Timer("block.clone()", globals={"block": block}).blocked_autorange(min_run_time=0.5).median
    )
    bound = images * sum(moved) / (2 * len(block) / copying)
    yield _row(
        f"one epoch of {images:,} images, ResNet-{depth}",
        "s",
        second_epoch(model, data, capture),
        bound,
        "the bound of memory bandwidth",
        True,
    )


# ---- inference -----------------------------------------------------------------------------------------------------


def _lively(model):
    """Random γ, so that a mask has something to choose from."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.1, 1)
    return model.eval().to(pick_device())


def speed_up(depth, rounds, seconds, size, compiled):
    """Measured speed-up of networks cut to half of their MACs beside what the MACs promise; in turns, the best of each."""
    small_cuts, wide_cuts = ((False, 1), (True, 1), (True, 8)), ((True, 16),)
    for name, model, side, cuts in (
        (f"ResNet-{depth}", resnet(depth), 32, small_cuts),
        ("ResNet-50", network("resnet50"), size, wide_cuts),
    ):
        model, image = _lively(model), torch.randn(1, 3, side, side, device=pick_device())
        for residual, round_to in cuts:
            small = prune(
                model, masks_for_macs(model, image, 0.5, residual, round_to=round_to), image
            )
            promise = cost(model, image).macs / cost(small, image).macs
            cut = f"{'inner and residual' if residual else 'inner'} channels{f' in multiples of {round_to}' if round_to > 1 else ''}"
            for batch in (1, 128):
                x, best = (
                    torch.randn(batch, *image.shape[1:], device=image.device),
                    [float("inf")] * 2,
                )
                for _ in range(rounds):
                    best = [
                        min(b, latency(net, x, seconds, compiled).median)
                        for b, net in zip(best, (model, small))
                    ]
                what = f"pruned {name} ({cut}), {HOW[compiled]}, batch {batch}"
                yield _row(
                    what, "times faster", best[0] / best[1], promise, "the ratio of the MACs"
                )


# ---- surgery -------------------------------------------------------------------------------------------------------


def surgery(rounds, size):
    """Seconds to prune torchvision's ResNet-50 by a mask, against torch-pruning removing the same channels."""
    try:
        import torch_pruning as tp
    except ImportError:
        log.warning("torch-pruning is not installed: the comparison with it is left out")
        return
    model, image = _lively(network("resnet50")), torch.randn(1, 3, size, size, device=pick_device())
    masks = masks_for_macs(model, image, 0.5)
    writer = ChannelGraph(model).conv_before
    best = {"ours": float("inf"), "theirs": float("inf")}
    for _ in range(rounds):
        began = time.perf_counter()
        ours = prune(model, masks)
        best["ours"] = min(best["ours"], time.perf_counter() - began)
        began = time.perf_counter()
        theirs = copy.deepcopy(model)
        modules, graph = (
            dict(theirs.named_modules()),
            tp.DependencyGraph().build_dependency(theirs, image),
        )
        for name, keep in masks.items():
            if not keep.all():
                gone = (~keep).nonzero().flatten().tolist()
                graph.get_pruning_group(
                    modules[writer[name]], tp.prune_conv_out_channels, gone
                ).prune()
        best["theirs"] = min(best["theirs"], time.perf_counter() - began)
    if cost(ours, image).macs != cost(theirs, image).macs:
        raise AssertionError("prune and torch-pruning left networks of different cost")
    yield _row(
        "pruning ResNet-50 by a mask",
        "s",
        best["ours"],
        best["theirs"],
        "torch-pruning, same channels",
        less_is_better=True,
    )
