"""Growing regularization against a plain, slow re-implementation that knows nothing of mslib."""

import inspect
import math

import pytest
import torch
from torch import nn

import mslib as ms

from .conftest import lively, tiny_data

EXAMPLE = torch.zeros(1, 3, 8, 8)

RATIOS = {"stage1": 0.75, "stage2": 0.75, "stage3": 0.32}


def convolutions(model):
    """The first convolution of each block, with the BatchNorm behind it and its stage's ratio."""
    return [
        (f"stage{s}.{b}.bn1", block.conv1, RATIOS[f"stage{s}"])
        for s in (1, 2, 3)
        for b, block in enumerate(getattr(model, f"stage{s}"))
    ]


def smallest(conv, ratio):
    """Indices of the filters with the smallest mean |W|, as the released code picks them."""
    sizes = [conv.weight[i].detach().abs().mean().item() for i in range(len(conv.weight))]
    return set(
        sorted(range(len(sizes)), key=sizes.__getitem__)[
            : min(math.ceil(ratio * len(sizes)), len(sizes) - 1)
        ]
    )


def train(model, penalty, iterations, each=lambda i: None, lr=0.05):
    """A bare SGD on random images; `each` is called between the penalty's step and the gradient."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for i in range(iterations):
        penalty.step(i)
        each(i)
        optimizer.zero_grad()
        (
            nn.functional.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4) % 3)
            + penalty()
        ).backward()
        optimizer.step()


def test_the_defaults_are_the_released_settings():
    default = {name: p.default for name, p in inspect.signature(ms.GrowingL2).parameters.items()}
    assert {
        "delta": 1e-4,
        "every": 10,
        "ceiling": 1,
        "enough": 1000,
        "pick_delta": 1e-5,
        "pick_ceiling": 1e-2,
    }.items() <= default.items()


def test_ratios_of_the_paper_keep_4_8_and_43_filters():
    model = ms.resnet(56)
    masks = ms.masks_for_ratio(model, EXAMPLE, RATIOS, ms.filter_norms(model, EXAMPLE))
    assert {(len(m), int(m.sum())) for m in masks.values()} == {(16, 4), (32, 8), (64, 43)}
    example = torch.zeros(1, 3, 32, 32)
    assert ms.cost(model, example).macs / ms.cost(
        ms.prune(model, masks, example), example
    ).macs == pytest.approx(2.555, abs=1e-3)
    for name, conv, ratio in convolutions(model):
        assert set((~masks[name]).nonzero().flatten().tolist()) == smallest(conv, ratio)


def test_greg1_grows_the_dropped_filters_alone_and_holds_at_the_ceiling():
    model = lively(ms.resnet(8, 3)).train()
    masks = ms.masks_for_ratio(model, EXAMPLE, RATIOS, ms.filter_norms(model, EXAMPLE))
    dropped = {name: smallest(conv, ratio) for name, conv, ratio in convolutions(model)}
    penalty = ms.GrowingL2(model, EXAMPLE, masks, delta=0.03, every=3, ceiling=0.1, enough=1e9)

    def check(i):
        # one δ more at each multiple of K, until r has passed the ceiling: 0.03 … 0.12, then held
        expected = 0.03 * min(i // 3 + 1, 4)
        value = 0.0
        for name, conv, _ in convolutions(model):
            for f in range(len(conv.weight)):
                r = expected if f in dropped[name] else 0.0
                assert float(penalty.factors[name][f]) == pytest.approx(r, abs=1e-6)
                value += r / 2 * float((conv.weight[f].detach().double() ** 2).sum())
        assert penalty().item() == pytest.approx(value, rel=1e-5)
        gradients = torch.autograd.grad(
            penalty(), [conv.weight for _, conv, _ in convolutions(model)]
        )
        for (name, conv, _), g in zip(convolutions(model), gradients):
            for f in range(len(conv.weight)):
                r = expected if f in dropped[name] else 0.0
                assert torch.allclose(g[f], r * conv.weight[f].detach(), atol=1e-7)

    train(model, penalty, 18, check)
    assert all(penalty.held.get(name) for name in masks)


def test_greg1_holds_a_layer_when_the_kept_are_large_enough():
    """The smoothed ratio is 0.9 of the one before and 0.1 of the new one; layers end one by one."""
    model = lively(ms.resnet(8, 3)).train()
    masks = ms.masks_for_ratio(model, EXAMPLE, RATIOS, ms.filter_norms(model, EXAMPLE))
    with torch.no_grad():
        model.stage2[0].conv1.weight[~masks["stage2.0.bn1"]] *= (
            0.4  # nearer to its end than the others
        )
    penalty = ms.GrowingL2(model, EXAMPLE, masks, delta=0.5, every=2, ceiling=1e9, enough=6.0)
    smooth, factor, ended = {}, dict.fromkeys(masks, 0.0), {}

    def check(i):
        if i % 2 == 0:
            for name, conv, _ in convolutions(model):
                if name in ended:
                    continue
                factor[name] += 0.5
                keep = masks[name]
                sizes = conv.weight.detach().abs().mean((1, 2, 3))
                ratio = float(sizes[keep].mean() / sizes[~keep].mean())
                smooth[name] = 0.9 * smooth.get(name, ratio) + 0.1 * ratio
                if smooth[name] >= 6.0:
                    ended[name] = i
        for name in masks:
            assert float(penalty.factors[name].max()) == pytest.approx(factor[name])

    train(model, penalty, 60, check)
    assert set(ended) == set(masks) and len(set(ended.values())) > 1, (
        "every layer ended, not all at once"
    )


def test_greg2_grows_all_picks_and_pushes():
    model = lively(ms.resnet(8, 3)).train()
    penalty = ms.GrowingL2(
        model,
        EXAMPLE,
        reduction=RATIOS,
        pick_delta=0.2,
        pick_ceiling=0.8,
        delta=0.5,
        every=2,
        ceiling=2.0,
        enough=1e9,
        kept=-1e-4,
    )
    at_start = {name: smallest(conv, ratio) for name, conv, ratio in convolutions(model)}
    picked = {}

    def check(i):
        updates = i // 2 + 1
        if updates < 4:  # 0.2, 0.4, 0.6 on all filters alike
            assert penalty.masks is None
            for factor in penalty.factors.values():
                assert torch.allclose(factor, torch.full_like(factor, 0.2 * updates))
            return
        if updates == 4 and i % 2 == 0:  # 0.8: picked by the magnitudes of this moment
            picked.update(
                {name: smallest(conv, ratio) for name, conv, ratio in convolutions(model)}
            )
        # pushed from where the common factor stood: 0.8, then δ more until above the ceiling
        pushed = 0.8 + 0.5 * min(updates - 4, 3)
        for name, _, _ in convolutions(model):
            for f, r in enumerate(penalty.factors[name].tolist()):
                assert r == pytest.approx(pushed if f in picked[name] else -1e-4, abs=1e-6)

    train(model, penalty, 20, check, lr=0.3)
    assert {n: set((~m).nonzero().flatten().tolist()) for n, m in penalty.masks.items()} == picked
    assert picked != at_start, (
        "in this run growing picks other filters than the L1 norm at the start"
    )


def test_one_shot_has_full_strength_from_the_first_iteration():
    model = lively(ms.resnet(8, 3))
    masks = ms.masks_for_ratio(model, EXAMPLE, RATIOS, ms.filter_norms(model, EXAMPLE))
    penalty = ms.GrowingL2(model, EXAMPLE, masks, start=0.5, ceiling=0.5)
    for i in (0, 10, 20):
        for name, keep in masks.items():
            assert torch.allclose(penalty.factors[name], torch.where(keep, 0.0, 0.5), atol=2e-4)
        penalty.step(i)


@pytest.mark.parametrize("kind", ["GReg-1", "GReg-2"])
def test_unstructured_weights_one_by_one(kind):
    model = lively(ms.resnet(8, 3)).train()
    masks = ms.masks_for_ratio(model, EXAMPLE, {"": 0.9, "conv": 0}, ms.weight_norms(model))
    assert (
        int((~masks["stage1.0.conv1"]).sum()) == math.ceil(0.9 * 16 * 16 * 9)
        and masks["conv"].all()
    )
    if kind == "GReg-1":
        penalty = ms.GrowingL2(model, EXAMPLE, masks, delta=0.1, every=1)
    else:
        penalty = ms.GrowingL2(
            model,
            EXAMPLE,
            reduction={"": 0.9, "conv": 0},
            unstructured=True,
            pick_delta=0.1,
            pick_ceiling=0.1,
            every=1,
        )
    penalty.step(0)
    w, drop = model.stage1[0].conv1.weight, ~masks["stage1.0.conv1"]
    (gradient,) = torch.autograd.grad(penalty(), w)
    assert torch.allclose(gradient, 0.1 * w * drop)
    assert torch.equal(~penalty.masks["stage1.0.conv1"], drop)
    before = w.detach().clone()
    hold = ms.HoldZero(model, penalty.masks)
    assert (w[drop] == 0).all() and torch.equal(w[~drop], before[~drop]) and float(hold()) == 0
    ms.fit(model, tiny_data(), epochs=2, lr=0.01, batch_size=16, penalty=hold)
    assert (w[drop] == 0).all() and not torch.equal(w[~drop], before[~drop])


def test_a_pace_that_fits_a_short_run():
    """GReg-1: at the ceiling after 60 % of the run. GReg-2: a free weight shrinks e^-exponent."""
    model, rates = lively(ms.resnet(8, 3)), ms.learning_rates(0.05, 2000)
    weight, penalty = (
        1.0,
        ms.GrowingL2(model, EXAMPLE, reduction={"": 0.5}, **ms.GrowingL2.pace(rates, 8.0, 5, 2.0)),
    )
    for i, rate in enumerate(rates.tolist()):
        penalty.step(i)
        if penalty.masks is not None:
            break
        weight *= math.exp(-rate / 0.1 * float(penalty.factors["stage1.0.bn1"][0]))
    assert penalty.masks and math.log(weight) == pytest.approx(
        -2, rel=0.05
    )  # it grows in steps of 5 iterations
    rates = rates[::10]
    masks = ms.masks_for_ratio(model, EXAMPLE, {"": 0.5}, ms.filter_norms(model, EXAMPLE))
    for way in (
        {"masks": masks} | ms.GrowingL2.pace(rates, 8.0, 5),
        {"reduction": {"": 0.5}} | ms.GrowingL2.pace(rates, 8.0, 5, 2.0),
    ):
        penalty = ms.GrowingL2(model, EXAMPLE, **way)
        for i in range(200):
            penalty.step(i)
        at = penalty.history.set_index("iteration").factor
        assert at[115] < at[125] == pytest.approx(8, rel=1e-4)
        assert at[195] == at[125]  # held where it arrived, not a step above
    with pytest.raises(ValueError, match="exponent=0: it must be above 0"):
        ms.GrowingL2.pace(rates, exponent=0)


def test_the_history_is_kept_with_a_finished_run(tmp_path):
    def run():
        torch.manual_seed(0)
        model = ms.resnet(8, 3)
        penalty = ms.GrowingL2(
            model, EXAMPLE, reduction=RATIOS, every=2, pick_delta=1e-3, pick_ceiling=4e-3
        )
        ms.fit(
            model,
            tiny_data(),
            epochs=2,
            lr=0.01,
            batch_size=8,
            penalty=penalty,
            run=tmp_path / "run",
        )
        return penalty

    first, again = run(), run()
    assert len(first.history) == 8 and first.history.equals(again.history)
    assert first.history.picked.tolist() == [False] * 4 + [True] * 4
    assert first.magnitudes().shape == (8, 16 + 32 + 64) and torch.equal(
        first.magnitudes(), again.magnitudes()
    )
    assert torch.equal(first.magnitudes(first.layers[1]), first.magnitudes()[:, 16:48])
    assert all(torch.equal(first.masks[n], again.masks[n]) for n in first.masks)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "give masks .* or reduction"),
        ({"reduction": 1.5}, "reduction 1.5"),
        ({"reduction": {"stage9": 0.5}}, "reduction for 'stage9': no such layer"),
        ({"reduction": 0.5, "delta": 0}, "delta=0: it must be above 0"),
        ({"reduction": 0.5, "every": -1}, "every=-1"),
        (
            {"reduction": 0.5, "pick_ceiling": 2.0},
            "pick_ceiling=2.0: it lies between 0 and ceiling=1.0",
        ),
        (
            {"masks": {"stage1.0.bn1": torch.arange(16) > 3}, "start": 2.0},
            "start=2.0: it lies between 0 and ceiling=1.0",
        ),
        (
            {"masks": {"stage1.0.bn9": torch.ones(16, dtype=torch.bool)}},
            "no such convolution, or BatchNorm right behind one",
        ),
        (
            {"masks": {"stage1.0.bn1": torch.ones(16, dtype=torch.bool)}},
            "the masks would drop nothing",
        ),
        (
            {"masks": {"stage1.0.conv1": torch.ones(2, 2, 3, 3, dtype=torch.bool)}},
            r"shape \[2, 2, 3, 3\]; the layer has \[16, 16, 3, 3\]",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ms.GrowingL2(ms.resnet(8), EXAMPLE, **settings)


class Concatenating(nn.Module):
    """Its last BatchNorm scales what two convolutions wrote side by side."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(torch.cat([x, self.conv2(x)], 1)))
        return self.fc(x.mean((2, 3)))


def test_greg2_leaves_alone_what_no_convolution_writes_by_itself():
    penalty = ms.GrowingL2(Concatenating(), EXAMPLE, reduction=0.5)
    assert penalty.layers == ["norm1"]
