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
from .cutting import Net, cbr

EXAMPLE = torch.zeros(1, 3, 8, 8)
LAYERS = {f"stage{s}.0.bn1": f"stage{s}.0" for s in (1, 2, 3)}  # BatchNorm -> its block


def lively8(seed=0):
    torch.manual_seed(seed)
    return lively(ms.resnet(8, 3), seed).train()


def halves(model, reduction=0.5):
    graph = ms.ChannelGraph(model, EXAMPLE.to(model.fc.weight))
    return ms.masks_for_ratio(graph, None, reduction, ms.filter_norms(graph))


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
    return maker(model, EXAMPLE.to(model.fc.weight), **settings)


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
                w[getattr(self, name)] *= 0.95


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
        self.blocks = {"stage1.0.bn1": model.stage1[0]}
        self.drop = {"stage1.0.bn1": lowest(l1(model.stage1[0].conv1.weight), 8)}
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
            w *= torch.tensor(u / (lr * 0.2 + u))[:, None, None, None]


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
        images, labels = torch.randn(4, 3, 8, 8).double(), torch.arange(4) % 3
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        after(i, 10 * lr)
    return torch.tensor(told, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_is_that_of_the_formula(kind):
    model = lively8().double()  # rounding is no matter: a filter of zeros has a steep BatchNorm
    twin = copy.deepcopy(model)
    masks = {"masks": {n: m for n, m in halves(model).items() if n.startswith("stage1")}}
    penalty = make(kind, model, **masks if kind == "trainability" else {})
    plain, many = PLAIN[kind](twin), 6 if kind == "trainability" else 12
    after = lambda i, lr: penalty.proximal_step(lr)  # noqa: E731
    found = steps(model, many, penalty.step, penalty, after)
    wanted = steps(twin, many, plain.before, plain.value, plain.after)
    if kind == "envelope":  # its value has a test of its own
        found[:, 0] = 0
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-7)
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-7), name


class Branched(nn.Module):
    """Its channels are read by a convolution in groups, and by a transposed one."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.grouped, self.norm2 = nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)
        self.up, self.norm3 = nn.ConvTranspose2d(6, 5, 1), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5 * 16, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()  # [N, 4, 6, 6]
        x = self.norm2(self.grouped(x)).relu()  # [N, 6, 4, 4]
        return self.fc(self.norm3(self.up(x)).relu().flatten(1))


def test_importance_counts_all_that_reads_a_channel():
    model = lively(Branched())
    penalty = ms.DependencyL1(model, EXAMPLE, over=10)
    # groups are cut alike: what goes together, a channel of each group, counts as one
    read, up = model.grouped.weight.abs().sum((0, 2, 3)), model.up.weight.abs().sum((1, 2, 3))
    sums = {"norm": (read[:2]).repeat(2), "norm2": (up[:3] + up[3:]).repeat(2)}
    assert sums.keys() == penalty.weights.keys()
    for name, s in penalty.importance().items():
        assert torch.allclose(s, model.get_submodule(name).weight.abs() * sums[name])
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    flat = lively(nn.Sequential(*layers))  # 36 pixels of each channel are read
    pixels = ms.DependencyL1(flat, EXAMPLE, over=10)
    each = flat[4].weight.abs().reshape(3, 4, 36).sum((0, 2))
    assert torch.allclose(pixels.importance()["1"], flat[1].weight.abs() * each)


def test_lambda_goes_up_below_the_share_and_down_above():
    model = lively8()
    penalty = ms.DependencyL1(model, EXAMPLE, 0.5, over=40, every=10, delta=1e-3, strength=1.5e-3)
    gammas = [model.get_submodule(norm).weight.data for norm in LAYERS]
    for i in range(5):
        penalty.step(i)
    assert penalty.history == [[0, 0.0, 1.5e-3]]  # the first look has nothing to compare with
    penalty.step(10)
    for gamma in gammas:
        gamma[: len(gamma) // 4] = 1e-9  # a quarter at once, and half of the way in all: enough
    penalty.step(20)
    penalty.step(30)  # no more since: too little
    for gamma in gammas:
        gamma[: 3 * len(gamma) // 4] = 1e-9
    for i in range(40, 80, 10):
        penalty.step(i)
    shares, strengths = zip(*[row[1:] for row in penalty.history])
    assert shares == (0, 0, 0.25, 0.25, 0.75, 0.75, 0.75, 0.75)
    assert strengths == pytest.approx([x * 1e-3 for x in (1.5, 2.5, 2.5, 3.5, 2.5, 1.5, 0.5, 0)])
    assert [int((~keep).sum()) for keep in penalty.masks.values()] == [12, 24, 48]


def envelope_value(z, k):
    """½ of the squared k-support norm, by its closed form (Argyriou et al. 2012)."""
    z = sorted(z, reverse=True)
    for r in range(k):
        rest = sum(z[k - r - 1 :]) / (r + 1)
        if (math.inf if r == k - 1 else z[k - r - 2]) > rest >= z[k - r - 1]:
            return (sum(x * x for x in z[: k - r - 1]) + rest * rest * (r + 1)) / 2
    raise AssertionError


@pytest.mark.parametrize("k, n", [(1, 4), (3, 8), (7, 8), (5, 40)])
def test_the_envelope_and_its_proximal_operator(k, n):
    rng = np.random.default_rng(n)
    v, shrink = np.abs(rng.normal(size=n)) + 0.05, 0.3
    u = spread(torch.tensor(v), k, 0.0).numpy()
    assert (v**2 / u.clip(1e-30)).sum() / 2 == pytest.approx(envelope_value(v, k), rel=1e-9)
    u = spread(torch.tensor(v), k, shrink).numpy()
    x = u / (shrink + u) * v
    assert u.sum() == pytest.approx(k) and np.allclose(u, spread_by_halving(v, k, shrink))

    def goal(x):
        return ((x - v) ** 2).sum() / 2 + shrink * envelope_value(np.abs(x), k)

    least = goal(x)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(50):
            assert goal(x + size * rng.normal(size=n)) > least
    few = torch.tensor([3.0, 2.0, 0.0, 0.0, 0.0])  # no more than k are left: they stay
    assert spread(few, 2, shrink)[:2].tolist() == pytest.approx([1, 1])
    assert spread(few, 3, shrink)[:2].tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("shrink", [0.0, 1e-4, 4e-4, 5e-4, 1e-3, 0.3])
@pytest.mark.parametrize("n", [1, 8, 64])
def test_the_envelope_keeps_all_that_are_alike_where_none_is_to_go(n, shrink):
    """Rounding may leave the last Σ u a little below k: there is no gap to look for η in."""
    assert torch.allclose(spread(torch.ones(n), n, shrink), torch.ones(n))


def test_the_value_of_the_envelope_penalty():
    model = lively8()
    wanted = 0.0
    for block in LAYERS.values():
        w = model.get_submodule(block).conv1.weight.detach().double().flatten(1)
        wanted += 0.2 * envelope_value(w.norm(dim=1).tolist(), len(w) // 2)
    value = make("envelope", model)()
    assert value.item() == pytest.approx(wanted, rel=1e-5) and not value.requires_grad


# ---- what every penalty has to do --------------------------------------------------------------


class Stop(Exception):
    pass


def trained(kind, folder=None):
    torch.manual_seed(0)
    model = lively8()
    penalty = make(kind, model)
    how = dict(epochs=3, lr=0.05, batch_size=8, precision="fp32", device="cpu")
    ms.fit(model, tiny_data(), **how, penalty=penalty, run=folder)
    return model, penalty


def assert_same(a, b):
    for (model, penalty), (other, its) in [(a, b)]:
        for x, y in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(x, y)
        assert penalty.identity() == its.identity()
        assert penalty.state_dict().keys() == its.state_dict().keys()
        for key, value in penalty.state_dict().items():
            if isinstance(value, dict):
                assert all(torch.equal(t, its.state_dict()[key][n]) for n, t in value.items())
            else:
                assert value == its.state_dict()[key]


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_it_is_the_run_that_was_never_stopped(kind, tmp_path, monkeypatch):
    whole, save = trained(kind), Run.save_checkpoint

    def stop(self, epoch, state):
        save(self, epoch, state)
        if epoch == 2:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Run, "save_checkpoint", stop)
        trained(kind, tmp_path)
    assert_same(trained(kind, tmp_path), whole)
    assert_same(trained(kind, tmp_path), whole)  # now it is loaded, finished


LONGER = {
    "asymptotic": {"over": 40},
    "trainability": {"delta": 0.05},
    "dependency": {"over": 50, "delta": 2e-3, "every": 2, "threshold": 0.05},
    "envelope": {"strength": 3.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_to_a_network_what_it_promises(kind, data):
    torch.manual_seed(0)
    model = ms.resnet(8, len(data.classes))
    epoch = math.ceil(len(data.train.labels) / 20)
    often = {"every": epoch} if kind in ("soft", "asymptotic") else {}
    penalty = make(kind, model, **LONGER.get(kind, {}) | often)
    history = ms.fit(model, data, epochs=6, lr=0.05, batch_size=20, penalty=penalty)
    sizes = penalty.sizes()
    kept = torch.cat([sizes[n][keep] for n, keep in penalty.masks.items()])
    dropped = torch.cat([sizes[n][~keep] for n, keep in penalty.masks.items()])
    assert kept.mean() > 5 * dropped.mean()
    assert history.loss.iloc[-1] < history.loss[0] - 0.1  # it learns all the while
    if kind in ("soft", "asymptotic"):
        assert (dropped == 0).all() and (kept > 0).all()
    if kind == "envelope":
        assert (dropped == 0).float().mean() > 0.5 and (kept > 0).all()
    if kind == "dependency":
        assert 0.3 < len(dropped) / (len(kept) + len(dropped)) < 0.7
    if kind != "weights":
        left = ms.prune(model, penalty.masks, data.example).stage1[0].conv1
        assert left.out_channels == int(penalty.masks["stage1.0.bn1"].sum()) < 16


def test_a_filter_that_was_zero_comes_back():
    model = lively8()
    penalty = ms.SoftFilter(model, EXAMPLE, 0.5, every=1)
    penalty.proximal_step(0.1)
    first = ~penalty.masks["stage1.0.bn1"]
    with torch.no_grad():
        model.stage1[0].conv1.weight[first] = 10.0
    penalty.proximal_step(0.1)
    assert torch.equal(first, penalty.masks["stage1.0.bn1"])


@torch.no_grad()
def test_the_choice_is_renewed_at_its_time_alone():
    model = lively8()
    penalty, w = ms.SoftShrinkage(model, EXAMPLE, 0.5, every=3), model.stage1[0].conv1.weight
    chosen = []
    for i in range(4):
        penalty.step(i)
        penalty.proximal_step(0.1)
        chosen.append(~penalty.masks["stage1.0.bn1"])
        w[chosen[0]] = 10.0
    assert torch.equal(chosen[1], chosen[0]) and torch.equal(chosen[2], chosen[0])
    assert torch.equal(chosen[3], ~chosen[0])


@torch.no_grad()
def test_ranks_are_averaged_over_time():
    model = lively8()
    penalty, w = ms.Incremental(model, EXAMPLE, 0.5, delta=1e-3), model.stage1[0].conv1.weight
    order = torch.arange(16.0)
    for i, size in enumerate((1 + order, 1 + order, 17 - order)):
        w[:] = size[:, None, None, None]
        penalty.step(i)
    assert torch.allclose(penalty.ranks["stage1.0.bn1"], (2 * order + (15 - order)) / 3)
    assert torch.equal(penalty.masks["stage1.0.bn1"], order >= 8)


def test_torch_pruning_chooses_the_same_channels():
    """SFP by L2, the others by L1 norm, of the layer that writes the channels."""
    model = lively8()
    ours = {kind: make(kind, model) for kind in ("soft", "shrinkage", "incremental")}
    ours["incremental"].step(0)
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=EXAMPLE)
    chosen = []
    for norm, block in LAYERS.items():
        conv = model.get_submodule(block).conv1
        group = graph.get_pruning_group(
            conv, tp.prune_conv_out_channels, [*range(len(conv.weight))]
        )
        for kind, penalty in ours.items():
            p = 2 if kind == "soft" else 1
            how = tp.importance.MagnitudeImportance(p, group_reduction="first", normalizer=None)
            theirs = how(group).argsort()[: len(conv.weight) // 2]
            gone = (~penalty.masks[norm]).nonzero().flatten()
            assert sorted(theirs.tolist()) == gone.tolist(), (kind, norm)
            chosen.append((norm, p, tuple(gone.tolist())))
    assert len(set(chosen)) > len(LAYERS), "the two norms choose alike: this proves too little"


OTHER = {
    "soft": {"every": 4},
    "asymptotic": {"over": 13},
    "incremental": {"u": 0.3},
    "shrinkage": {"rate": 0.21},
    "weights": {"reduction": 0.8},
    "trainability": {"gram": 51.0},
    "dependency": {"threshold": 0.02},
    "envelope": {"strength": 0.21},
}


@pytest.mark.parametrize("kind", KINDS)
def test_identity_sum_and_owner(kind):
    model = lively8()
    penalty, other = make(kind, model), make(kind, model, **OTHER[kind])
    assert penalty.identity() == make(kind, model).identity() != other.identity()
    assert json.loads(json.dumps(penalty.identity())) == penalty.identity()
    assert type(penalty).__name__ in repr(penalty)
    own = {id(p) for p in model.parameters()}
    assert own.issuperset(map(id, penalty.parameters())) and [*penalty.parameters()]
    with pytest.raises(ValueError, match="was made for another network"):
        ms.fit(lively8(1), tiny_data(), epochs=1, lr=0.1, penalty=penalty)
    total = penalty + ms.GlobalL1(model, EXAMPLE, 1e-3)
    alone = copy.deepcopy(model)
    single = make(kind, alone)
    for i in range(4):
        total.step(i), single.step(i)
        more = ms.GlobalL1(model, EXAMPLE, 1e-3)()
        assert torch.allclose(total() - more, single(), atol=1e-4)
        total.proximal_step(0.1), single.proximal_step(0.1)
    assert torch.equal(model.stage1[0].conv1.weight, alone.stage1[0].conv1.weight)


BAD = [
    ("soft", {"every": 0}, "every=0: it must be a number above 0"),
    ("soft", {"every": 2.5}, "every=2.5: expected whole iterations"),
    ("soft", {"reduction": 1.5}, "reduction 1.5: the share to remove lies between 0 and 1"),
    ("soft", {"reduction": 0.0}, "reduction=0.0 would drop nothing; .* give 0.5"),
    ("soft", {"reduction": {"stage9": 0.5}}, "reduction for 'stage9': no such layer"),
    ("asymptotic", {"over": -1}, "over=-1: it must be a number above 0"),
    ("incremental", {"u": 1.0}, "u=1.0: .*below 1"),
    ("incremental", {"ceiling": math.inf}, "ceiling=inf: it must be a number above 0"),
    ("shrinkage", {"rate": 1.5}, "rate=1.5: .*at most 1, such as 0.05"),
    ("shrinkage", {"rate": None}, "rate=None: it must be a number above 0"),
    ("trainability", {"masks": None}, "masks=None: .*masks_for_ratio"),
    ("trainability", {"masks": {"bn": torch.arange(16) > 3}}, "'bn': no such prunable BatchNorm"),
    ("trainability", {"masks": {"stage1.0.bn1": torch.ones(16) > 0}}, "masks would drop nothing"),
    ("trainability", {"masks": {"stage1.0.bn1": torch.ones(9) > 0}}, r"shape \[9\].*has \[16\]"),
    ("trainability", {"gram": 0}, "gram=0: it must be a number above 0"),
    ("dependency", {"strength": -1.0}, "strength=-1.0: .*0 or above"),
    ("dependency", {"share": 1.0}, "reduction 1.0: the share to remove"),
    ("envelope", {"strength": 0}, "strength=0: it must be a number above 0"),
]


@pytest.mark.parametrize("kind, settings, message", BAD)
def test_bad_settings_are_named(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        make(kind, lively8(), **settings)


def test_a_network_without_filters_to_cut_is_refused():
    with pytest.raises(ValueError, match="no prunable BatchNorm"):
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        ms.SoftFilter(plain, EXAMPLE, every=1)


class Unread(nn.Module):
    """The only BatchNorm that could be cut leads nowhere."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        self.norm(self.conv(x))
        return self.out(x)


def test_a_dependency_that_nothing_reads_is_refused_by_name():
    with pytest.raises(ValueError, match="no layer reads the channels of norm"):
        ms.DependencyL1(Unread(), EXAMPLE, over=3)


def test_a_dependency_counts_weights_that_a_forward_uses_itself():
    own = nn.Parameter(torch.randn(2, 4, 1, 1))
    model = Net(lambda net, x: nn.functional.conv2d(net.stem(x), net.own), stem=cbr(3, 4), own=own)
    penalty = ms.DependencyL1(lively(model), EXAMPLE, over=3)
    wanted = model.stem[1].weight.abs() * own.abs().sum((0, 2, 3))
    assert torch.allclose(penalty.importance()["stem.1"], wanted)
    assert any(p is own for p in penalty.parameters())


@pytest.mark.parametrize("kind", ["incremental", "GReg"])
def test_a_state_is_a_copy_both_ways(kind):
    """Else a checkpoint kept in memory would go on with the training."""
    model = lively8()
    growing = dict(reduction=0.5, every=1, pick_delta=0.1, pick_ceiling=1.0)
    its = ms.GrowingL2(model, EXAMPLE, **growing) if kind == "GReg" else make(kind, model)
    its.step(0)
    state = its.state_dict()
    its.load_state_dict(state)
    before = copy.deepcopy(state)
    for i in (2, 4):
        its.step(i)
    assert all(torch.equal(t, state["factors"][n]) for n, t in before["factors"].items())
    assert any(not torch.equal(t, its.factors[n]) for n, t in state["factors"].items())
    assert kind != "GReg" or len(state["rows"]) == len(state["seen"]) == 1


# ---- wide while it is repaired -----------------------------------------------------------------


def odd_network():
    """Each way in which a convolution can move, with a bias and without; one in groups."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 5, 3, padding=2, dilation=2, padding_mode="reflect", bias=False),
        nn.ReLU(),
        nn.Conv2d(5, 10, 3, padding=1, groups=5),
        nn.Conv2d(10, 4, (1, 3), padding="same"),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
    )


@pytest.mark.parametrize("factor", [1, 1.3, 4])
@pytest.mark.parametrize("make_network", [odd_network, lively8])
def test_widened_and_merged_it_computes_the_same(make_network, factor):
    model, x = lively(make_network()), torch.randn(4, 3, 8, 8)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    wide = ms.widen(model, factor)
    merged = ms.merge(wide)
    assert torch.allclose(wide(x), model(x), atol=1e-5)
    assert torch.allclose(merged(x), model(x), atol=1e-5) and not merged.training
    assert repr(merged) == repr(model) and merged.state_dict().keys() == before.keys()
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    assert sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in model.parameters())


def test_a_cut_network_is_repaired_wide_and_merged(tmp_path):
    torch.manual_seed(0)
    model, data = lively8(), tiny_data()
    small = ms.prune(model, halves(model), data.example)
    runs = []
    for folder in (None, tmp_path, tmp_path):  # trained, trained into a folder, loaded
        wide = ms.widen(small, 2)
        start = ms.merge(wide).state_dict()
        ms.fit(wide, data, epochs=2, lr=0.02, batch_size=16, run=folder, precision="fp32")
        runs.append(wide.eval())
    x = torch.randn(8, 3, 8, 8)
    merged = ms.merge(wide)
    assert torch.allclose(merged(x), wide(x), atol=1e-5)
    assert all(torch.equal(runs[0](x), other(x)) for other in runs[1:])
    assert not torch.allclose(
        start["stage1.0.conv1.weight"], merged.stage1[0].conv1.weight, atol=1e-3
    )
    wide.train(), merged.train()
    assert torch.allclose(merged(x), wide(x), atol=1e-5)
    assert ms.cost(merged, data.example).macs == ms.cost(small, data.example).macs
    ms.save(merged, tmp_path / "merged.pt")
    again = ms.load(tmp_path / "merged.pt")
    assert torch.allclose(again.eval()(x), merged.eval()(x), atol=1e-6)  # in another layout


def test_only_the_layers_that_are_named_become_wide():
    model = lively8()
    wide = ms.widen(model, layers=["stage1.0.conv1"])
    changed = {
        n
        for n, m in wide.named_modules()
        if type(m) is not type(dict(model.named_modules()).get(n))
    }
    assert {n for n in changed if n.count(".") == 2} == {"stage1.0.conv1"}
    assert wide.stage1[0].conv1[0].out_channels == 4 * 16
    twice = ms.widen(wide)  # what is wide stays as it is
    assert type(twice.stage1[0].conv1[0]) is nn.Conv2d
    assert repr(ms.merge(twice)) == repr(model)
    for seed, same in ((0, True), (1, False)):
        first = ms.widen(model, layers="conv", seed=seed).conv[0].weight
        assert torch.equal(ms.widen(model, layers="conv").conv[0].weight, first) is same


@pytest.mark.parametrize(
    "how, message",
    [
        ({"factor": 0.5}, "factor=0.5: how many times as wide, 1 or above"),
        ({"layers": ["stage1.0.conv9"]}, "'stage1.0.conv9' is no Conv2d .*did you mean"),
        ({"layers": ["fc"]}, "'fc' is no Conv2d"),
    ],
)
def test_what_cannot_be_widened_is_named(how, message):
    with pytest.raises(ValueError, match=message):
        ms.widen(lively8(), **how)
    with pytest.raises(ValueError, match="Linear has no Conv2d"):
        ms.widen(nn.Linear(3, 3))


def shared_and_tied():
    """One convolution under two names, and two that hold one weight."""
    torch.manual_seed(0)
    model = nn.ModuleDict({n: nn.Conv2d(4, 4, 3, padding=1) for n in ("a", "tied", "other")})
    model["b"], model["other"].weight = model["a"], model["tied"].weight
    return Net(
        lambda net, x: net.m["other"](net.m["tied"](net.m["b"](net.m["a"](x).relu()))), m=model
    )


def test_widening_unties_nothing_and_draws_nothing():
    model, x, state = shared_and_tied(), torch.randn(2, 4, 8, 8), torch.get_rng_state()
    wide = ms.widen(model)
    merged = ms.merge(wide)
    assert torch.equal(state, torch.get_rng_state())
    assert type(wide.m["a"]).__name__ == "Widened" and wide.m["a"] is wide.m["b"]
    assert type(wide.m["tied"]) is nn.Conv2d and merged.m["a"] is merged.m["b"]
    assert wide.m["tied"].weight is wide.m["other"].weight
    assert torch.allclose(wide(x), model(x), atol=1e-5)
    assert torch.allclose(merged(x), model(x), atol=1e-5)
    assert ms.widen(model, layers=["m.a", "m.b"]).m["a"][0].weight.shape == (16, 4, 1, 1)
    with pytest.raises(ValueError, match="'m.other' shares its weight with another module"):
        ms.widen(model, layers="m.other")
