import logging
import math

import pytest
import torch

import mslib as ms

from .conftest import lively

X = torch.zeros(1, 3, 32, 32)


def test_masks_below_is_the_threshold_and_keeps_one_channel(caplog):
    model = lively(ms.resnet(8))
    gamma = model.stage1[0].bn1.weight
    with torch.no_grad():
        gamma.fill_(1e-4)
        gamma[5] = 2e-4
    with caplog.at_level(logging.WARNING, "mslib"):
        masks = ms.masks_below(model, 0.3)
    assert masks["stage1.0.bn1"].nonzero().flatten().tolist() == [5]
    assert "stage1.0.bn1" in caplog.text
    other = model.stage2[0].bn1.weight.abs() >= 0.3
    assert torch.equal(masks["stage2.0.bn1"], other) and not other.all()


def test_residual_channels_go_only_if_all_their_norms_drop_them():
    model = lively(ms.resnet(20))
    with torch.no_grad():
        for name, m in model.named_modules():
            if name == "bn" or name.startswith("stage1") and name.endswith("bn2"):
                m.weight[[3, 4]] = 0.001
        model.stage1[1].bn2.weight[4] = 0.9  # one block still needs channel 4
    masks = ms.masks_below(model, 0.05, residual=True)
    shared = [n for n in masks if n == "bn" or n.startswith("stage1") and n.endswith("bn2")]
    assert len(shared) == 4
    for name in shared:
        assert (~masks[name]).nonzero().flatten().tolist() == [3]
    assert "bn" not in ms.masks_below(model, 0.05)


def test_a_padded_channel_needs_its_source_to_go():
    """Stage 2 copies channel 0 of stage 1 into its channel 8: it may go only with it. Channel 0 of stage 2 is padding."""
    model = lively(ms.resnet(8))
    keep = torch.ones(32, dtype=torch.bool)
    keep[[0, 8]] = False
    alone = {"stage2.0.bn2": keep}
    assert ms.prune(model, alone).stage2[0].bn2.num_features == 31
    first = torch.arange(16) != 0
    together = {**alone, "bn": first, "stage1.0.bn2": first}
    assert ms.prune(model, together).stage2[0].bn2.num_features == 30


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("reduction", [0.1, 0.5, 0.9])
def test_masks_for_macs_reaches_the_goal_and_no_more(reduction, residual):
    model = lively(ms.resnet(20))
    masks = ms.masks_for_macs(model, X, reduction, residual)
    full, small = ms.cost(model, X).macs, ms.cost(ms.prune(model, masks), X).macs
    assert reduction <= 1 - small / full < reduction + 0.01
    if not residual:  # with the largest γ that went, the goal would be missed
        gone = {n: g.masked_fill(masks[n], -1) for n, g in ms.gammas(model).items()}
        name = max((n for n in gone if masks[n].sum() > 1), key=lambda n: gone[n].max())
        one_more = masks | {name: masks[name].index_fill(0, gone[name].argmax(), True)}
        assert 1 - ms.cost(ms.prune(model, one_more), X).macs / full < reduction
    assert min(int(m.sum()) for m in masks.values()) >= 1
    if not residual:  # channels go in the order of |γ|
        gamma = ms.gammas(model)
        dropped = torch.cat([g[~masks[n]] for n, g in gamma.items()])
        kept = torch.cat([g[masks[n]] for n, g in gamma.items() if masks[n].sum() > 1])
        assert dropped.max() <= kept.min()


@pytest.mark.parametrize("residual", [False, True])
def test_of_equal_gammas_only_as_many_go_as_must_and_layers_take_turns(residual):
    """As in a fresh network, where each γ is 1."""
    model = lively(ms.network("resnet18"))
    for gamma in ms.gammas(model, True):
        torch.nn.init.ones_(model.get_submodule(gamma).weight)
    x = torch.zeros(1, 3, 64, 64)
    masks = ms.masks_for_macs(model, x, 0.5, residual)
    assert 0.5 <= 1 - ms.cost(ms.prune(model, masks), x).macs / ms.cost(model, x).macs < 0.51
    shares = [float(keep.float().mean()) for keep in masks.values()]
    assert max(shares) - min(shares) < 0.02


def test_scores_of_unknown_layers_are_refused():
    with pytest.raises(
        ValueError,
        match="scores for 'stage1.0.bn9': the network has no such BatchNorm; did you mean 'stage1.0.bn",
    ):
        ms.masks_for_macs(ms.resnet(8), X, scores={"stage1.0.bn9": torch.ones(16)})


@pytest.mark.parametrize("reduction", [0, 1, -0.5, 1.5])
def test_reduction_outside_0_1(reduction):
    with pytest.raises(ValueError, match=f"reduction {reduction}"):
        ms.masks_for_macs(ms.resnet(8), X, reduction)


def test_reduction_out_of_reach_says_the_most():
    model = ms.resnet(8)
    with pytest.raises(ValueError, match=r"out of reach.*(\d\d\.\d)%") as caught:
        ms.masks_for_macs(model, X, 0.99)
    most = float(caught.value.args[0].split("left in each layer ")[1].split("%")[0]) / 100
    one = {n: torch.arange(len(g)) < 1 for n, g in ms.gammas(model).items()}
    assert most == pytest.approx(
        1 - ms.cost(ms.prune(model, one), X).macs / ms.cost(model, X).macs, abs=1e-3
    )


def test_threshold_must_be_positive():
    with pytest.raises(ValueError, match="threshold 0"):
        ms.masks_below(ms.resnet(8), 0)


def test_filter_norms_are_the_mean_size_of_the_filter_before_the_batchnorm():
    model = lively(ms.resnet(8))
    for name, score in ms.filter_norms(model, residual=True).items():
        conv = model.get_submodule("conv" if name == "bn" else name.replace("bn", "conv"))
        assert torch.allclose(score, torch.stack([f.abs().mean() for f in conv.weight]))


def test_outgoing_norms_are_gamma_times_what_the_block_does_with_the_channel():
    model = lively(ms.resnet(8))
    for stage in ("stage1", "stage2", "stage3"):
        block = model.get_submodule(stage)[0]
        score = ms.outgoing_norms(model)[f"{stage}.0.bn1"]
        for i in range(len(score)):
            sent = 0.0
            for o, norm in enumerate(block.bn2.weight):
                sent += (
                    norm.abs()
                    / (block.bn2.running_var[o] + 1e-5).sqrt()
                    * block.conv2.weight[o, i].abs().sum()
                ).item()
            assert score[i].item() == pytest.approx(
                sent / len(block.bn2.weight) * block.bn1.weight[i].abs().item(), rel=1e-4
            )


def test_scaled_weight_norms_are_what_a_weight_adds_in_evaluation():
    model = lively(ms.resnet(8))
    norms = ms.weight_norms(model, scaled=True)
    assert set(norms) == {n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    block, x = (
        model.stage2[0],
        torch.randn(2, 32, 4, 4),
    )  # inside the block, bn2(conv2(x)) is linear in each weight
    with torch.no_grad():
        before = block.bn2(block.conv2(x))
        block.conv2.weight[5, 7, 1, 1] += block.conv2.weight[
            5, 7, 1, 1
        ].clone()  # twice itself: its part once more
        added = block.bn2(block.conv2(x)) - before
    assert torch.allclose(
        added[:, 5].abs(), norms["stage2.0.conv2"][5, 7, 1, 1] * x[:, 7].abs(), atol=1e-5
    )
    assert added.abs().sum((0, 2, 3)).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("reduction", [0.1, 0.5, 0.9])
def test_one_ratio_is_the_share_of_each_layer(reduction):
    model = lively(ms.resnet(20))
    scores = ms.gammas(model)
    for name, keep in ms.masks_for_ratio(model, reduction, scores).items():
        assert int((~keep).sum()) == math.ceil(reduction * len(keep))
        assert scores[name][keep].min() >= scores[name][~keep].max()
    with pytest.raises(ValueError, match="reduction 1.0"):
        ms.masks_for_ratio(model, 1.0, scores)


@pytest.mark.parametrize("residual", [False, True])
def test_no_layer_goes_below_the_floor(residual, caplog):
    model = lively(ms.resnet(20))
    with torch.no_grad():
        model.stage3[2].bn1.weight.mul_(0.01)  # a layer whose every channel would go
    for floor, least in ((0.0, 1), (0.1, 7), (0.25, 16)):
        with caplog.at_level(logging.WARNING, logger="mslib"):
            masks = ms.masks_for_macs(model, X, 0.4, residual, floor=floor)
        assert int(masks["stage3.2.bn1"].sum()) == least
        assert all(int(m.sum()) >= floor * len(m) for m in masks.values())
        best = model.stage3[2].bn1.weight.abs().topk(least).indices.sort().values
        assert torch.equal(masks["stage3.2.bn1"].nonzero().flatten(), best)
        assert ms.cost(ms.prune(model, masks), X).macs <= 0.6 * ms.cost(model, X).macs
        assert (
            "one channel" if not floor else f"{floor:.1%} of the channels"
        ) + " kept in stage3.2.bn1" in caplog.text
    with pytest.raises(
        ValueError, match="out of reach: with 90.0% of the channels left in each layer"
    ):
        ms.masks_for_macs(model, X, 0.4, residual, floor=0.9)
    with pytest.raises(ValueError, match="floor 1.5: the share"):
        ms.masks_for_macs(model, X, 0.4, floor=1.5)


@pytest.mark.parametrize("residual", [False, True])
def test_layers_keep_multiples_of_round_to(residual):
    model = lively(ms.resnet(20))
    plain, whole = ms.masks_for_macs(model, X, 0.4, residual), ms.cost(model, X).macs
    for to in (1, 4, 8):
        masks = ms.masks_for_macs(model, X, 0.4, residual, round_to=to)
        assert {int(m.sum()) % to for m in masks.values()} == {0}
        small = ms.prune(model, masks, X)
        assert {m.out_channels % to for m in small.modules() if isinstance(m, torch.nn.Conv2d)} == {
            0
        }
        assert 0.55 < ms.cost(small, X).macs / whole <= 0.6
        assert (to == 1) == all(torch.equal(masks[n], m) for n, m in plain.items())
    masks = ms.masks_for_macs(model, X, 0.2, residual, round_to=24)
    assert {(len(m), int(m.sum())) for m in masks.values()} <= {
        (16, 16),
        (32, 24),
        (32, 32),
        (64, 24),
        (64, 48),
        (64, 64),
    }
    with pytest.raises(
        ValueError, match="with one channel left in each layer and multiples of 48 8.0% of the MACs"
    ):
        ms.masks_for_macs(model, X, 0.9, round_to=48)
    with pytest.raises(ValueError, match="round_to=0: the number of channels"):
        ms.masks_for_macs(model, X, 0.4, round_to=0)
