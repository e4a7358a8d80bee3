"""The relatives of the penalties, each against a plain, slow re-implementation of its formula."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

import mslib as ms
from mslib.penalties.envelope import spread
from mslib.training.runs import Run

from .conftest import lively, tiny_data

EXAMPLE = torch.zeros(1, 3, 8, 8)
LAYERS = {f"stage{s}.0.bn1": f"stage{s}.0" for s in (1, 2, 3)}  # BatchNorm -> its block


def lively8(seed=0):
    torch.manual_seed(seed)
    return lively(ms.resnet(8, 3), seed).train()


def halves(model, reduction=0.5):
    return ms.masks_for_ratio(model, EXAMPLE, reduction, ms.filter_norms(model, EXAMPLE))


def make(kind, model, **how):
    """One of each kind, with settings for a run of a few dozen iterations."""
    given = {
        "soft": (ms.SoftFilter, {"reduction": 0.5, "every": 3}),
        "asymptotic": (
            ms.SoftFilter,
            {"reduction": {"stage1": 0.3, "": 0.8}, "every": 2} | {"over": 12},
        ),
        "incremental": (ms.Incremental, {"delta": 0.3, "ceiling": 3.0, "every": 2}),
        "shrinkage": (ms.SoftShrinkage, {"rate": 0.2, "every": 3}),
        "weights": (ms.SoftShrinkage, {"reduction": 0.9, "unstructured": True, "every": 2}),
        "trainability": (ms.Trainability, {"delta": 0.02, "every": 2, "gram": 50.0}),
        "dependency": (ms.DependencyL1, {"over": 30, "every": 3, "delta": 1e-3, "strength": 1e-3}),
        "envelope": (ms.GroupEnvelope, {"strength": 0.2}),
    }
    maker, settings = given[kind]
    settings = settings | how
    if maker is ms.Trainability:
        settings.setdefault("masks", halves(model))
    return maker(model, EXAMPLE, **settings)


KINDS = ["soft", "asymptotic", "incremental", "shrinkage", "weights", "trainability"]
KINDS += ["dependency", "envelope"]


# ---- the formulas ------------------------------------------------------------------------------


class Plain:
    """What a re-implementation does before, in and after a step; nothing of mslib."""

    def __init__(self, model):
        self.model = model
        self.blocks = {norm: model.get_submodule(block) for norm, block in LAYERS.items()}

    def before(self, i):
        pass

    def value(self):
        return 0.0

    def after(self, i, lr):
        pass


def lowest(numbers, count):
    """The places of the `count` lowest of a list."""
    return sorted(range(len(numbers)), key=lambda j: numbers[j])[:count]


def l1(weight):
    return [float(np.abs(f).sum()) for f in weight.detach().numpy()]


class PlainSoft(Plain):
    every, over = 3, None

    def share(self, norm, i):
        if self.over is None:
            return 0.5
        low, high = 1e-6, 100.0  # of k in a·e^(-kx) + b through (0, 0), (1/8, 3/4), (1, 1)
        for _ in range(100):
            k = (low + high) / 2
            low, high = (k, high) if (1 - np.exp(-k / 8)) / (1 - np.exp(-k)) < 0.75 else (low, k)
        whole = 0.3 if norm.startswith("stage1") else 0.8
        return whole * (1 - np.exp(-k * min(1, (i + 1) / self.over))) / (1 - np.exp(-k))

    def after(self, i, lr):
        if (i + 1) % self.every == 0:
            for norm, block in self.blocks.items():
                w = block.conv1.weight.data
                sizes = [math.sqrt(float((f.double() ** 2).sum())) for f in w]
                for j in lowest(sizes, math.ceil(self.share(norm, i) * len(w) - 1e-9)):
                    w[j] = 0


class PlainAsymptotic(PlainSoft):
    every, over = 2, 12


class PlainShrinkage(Plain):
    def after(self, i, lr):
        for norm, block in self.blocks.items():
            w = block.conv1.weight.data
            if i % 3 == 0:
                setattr(self, norm, lowest(l1(w), len(w) // 2))
            for j in getattr(self, norm):
                w[j] *= 0.8


class PlainWeights(Plain):
    """A tenth of each convolution stays."""

    def after(self, i, lr):
        for name, m in self.model.named_modules():
            if isinstance(m, nn.Conv2d):
                w = m.weight.data.numpy().reshape(-1)
                if i % 2 == 0:
                    least = np.argsort(np.abs(w), kind="stable")[: math.ceil(0.9 * w.size)]
                    setattr(self, name, least)
                w[getattr(self, name)] *= np.float32(0.95)


class PlainIncremental(Plain):
    A, u, ceiling = 0.3, 0.25, 3.0

    def __init__(self, model):
        super().__init__(model)
        sizes = {n: len(b.conv1.weight) for n, b in self.blocks.items()}
        self.reg = {n: [0.0] * size for n, size in sizes.items()}
        self.rank = {n: [0.0] * size for n, size in sizes.items()}
        self.gone, self.times = {n: [] for n in sizes}, 0

    def delta(self, r, n):
        a = math.log(2 / self.u) / n
        s = -math.log(self.u) / a
        if r < s:
            return self.A * math.exp(-a * r)
        return 2 * self.u * self.A - self.A * math.exp(-a * (2 * s - r))

    def before(self, i):
        if i % 2:
            return
        self.times += 1
        for norm, block in self.blocks.items():
            reg, gone, sizes = self.reg[norm], self.gone[norm], l1(block.conv1.weight)
            there = [j for j in range(len(sizes)) if j not in gone]
            for place, j in enumerate(sorted(there, key=sizes.__getitem__), len(gone)):
                mean = self.rank[norm]
                mean[j] = (mean[j] * (self.times - 1) + place) / self.times
            wanted = len(sizes) // 2 - len(gone)
            for r, j in enumerate(sorted(there, key=self.rank[norm].__getitem__)):
                reg[j] = max(0.0, reg[j] + self.delta(r, wanted)) if wanted else 0.0
                if reg[j] >= self.ceiling:
                    reg[j] = self.ceiling
                    gone.append(j)

    def value(self):
        total = 0.0
        for norm, block in self.blocks.items():
            for j, reg in enumerate(self.reg[norm]):
                total = total + reg * (block.conv1.weight[j] ** 2).sum() / 2
        return total

    def after(self, i, lr):
        for norm, block in self.blocks.items():
            block.conv1.weight.data[self.gone[norm]] = 0


class PlainTrainability(Plain):
    def __init__(self, model):
        super().__init__(model)
        self.drop = {n: lowest(l1(b.conv1.weight), len(b.conv1.weight) // 2)
                     for n, b in self.blocks.items()}  # fmt: skip
        self.factor = 0.0

    def before(self, i):
        self.factor = min(1.0, 0.02 * (i // 2))

    def value(self):
        total = 0.0
        for norm, block in self.blocks.items():
            w, drop = block.conv1.weight.flatten(1), self.drop[norm]
            for i in range(len(w)):
                for j in range(len(w)):
                    if i in drop or j in drop:
                        total = total + 50.0 * (w[i] * w[j]).sum() ** 2 / len(w) ** 2
            for i in drop:
                gamma, beta = block.bn1.weight[i], block.bn1.bias[i]
                total = total + ((w[i] ** 2).sum() + gamma**2 + beta**2) / 2
        return self.factor * total


class PlainDependency(Plain):
    strength, history = 1e-3, ()

    def scores(self):
        return {
            norm: torch.stack(
                [g.abs() * b.conv2.weight[:, j].abs().sum() for j, g in enumerate(b.bn1.weight)]
            )
            for norm, b in self.blocks.items()
        }

    def before(self, i):
        if i % 3:
            return
        scores = [s.tolist() for s in self.scores().values()]
        small = sum(x < 0.01 * max(s) for s in scores for x in s)
        now = small / sum(map(len, scores))
        if self.history:
            if now > 0.5:
                self.strength = max(0.0, self.strength - 1e-3)
            elif now - self.history[-1] < (0.5 - self.history[-1]) / max(1, (30 - i) // 3 + 1):
                self.strength += 1e-3
        self.history = [*self.history, now]

    def value(self):
        return self.strength * sum(s.sum() for s in self.scores().values())


class PlainEnvelope(Plain):
    def after(self, i, lr):
        for block in self.blocks.values():
            w = block.conv1.weight.data
            z = w.double().flatten(1).norm(dim=1).numpy()
            u = spread_by_halving(z, len(w) // 2, lr * 0.2)
            w *= torch.tensor(u / (lr * 0.2 + u)).float()[:, None, None, None]


def spread_by_halving(z, k, shrink):
    low, high = 0.0, 1e12
    for _ in range(300):
        eta = (low + high) / 2
        low, high = (eta, high) if np.clip(eta * z - shrink, 0, 1).sum() < k else (low, eta)
    return np.clip(eta * z - shrink, 0, 1)


PLAIN = dict(
    zip(
        KINDS,
        [
            PlainSoft,
            PlainAsymptotic,
            PlainIncremental,
            PlainShrinkage,
            PlainWeights,
            PlainTrainability,
            PlainDependency,
            PlainEnvelope,
        ],
        strict=True,
    )
)


def steps(model, iterations, before, value, after, lr=0.02):
    """A bare SGD on random images; the value and all gradients of the penalty in each step."""
    torch.manual_seed(1)
    optimizer, told = torch.optim.SGD(model.parameters(), lr=lr), []
    for i in range(iterations):
        before(i)
        optimizer.zero_grad()
        extra = value()
        if isinstance(extra, torch.Tensor) and extra.requires_grad:
            extra.backward()
        none = torch.zeros(())
        told.append([float(extra.detach()) if isinstance(extra, torch.Tensor) else extra])
        told[-1] += [float((none if p.grad is None else p.grad).norm()) for p in model.parameters()]
        images, labels = torch.randn(4, 3, 8, 8), torch.arange(4) % 3
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        after(i, 10 * lr)
    return torch.tensor(told)


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_is_that_of_the_formula(kind):
    model = lively8()
    twin = copy.deepcopy(model)
    penalty, plain = make(kind, model), PLAIN[kind](twin)
    many = 5 if kind == "trainability" else 14
    after = lambda i, lr: penalty.proximal_step(lr)  # noqa: E731
    found = steps(model, many, penalty.step, penalty, after)
    wanted = steps(twin, many, plain.before, plain.value, plain.after)
    if kind == "envelope":  # its value has a test of its own
        found[:, 0] = 0
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-5)
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), name
