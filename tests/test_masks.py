import logging
import math

import pytest
import torch

import mslib as ms

from .conftest import lively
from .cutting import Net

X = torch.zeros(1, 3, 32, 32)


def test_masks_below_is_the_threshold_and_keeps_one_channel(caplog):
    model = lively(ms.resnet(8))
    gamma = model.stage1[0].bn1.weight
    with torch.no_grad():
        gamma.fill_(1e-4)
        gamma[5] = 2e-4
    with caplog.at_level(logging.WARNING, "mslib"):
        masks = ms.masks_below(model, X, 0.3)
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
    masks = ms.masks_below(model, X, 0.05, residual=True)
    shared = [n for n in masks if n == "bn" or n.startswith("stage1") and n.endswith("bn2")]
    assert len(shared) == 4
    for name in shared:
        assert (~masks[name]).nonzero().flatten().tolist() == [3]
    assert "bn" not in ms.masks_below(model, X, 0.05)


def test_a_padded_channel_needs_its_source_to_go():
    """Stage 2 copies channel 0 of stage 1 into its channel 8: it may go only with it.

    Channel 0 of stage 2 is padding.
    """
    model = lively(ms.resnet(8))
    keep = torch.ones(32, dtype=torch.bool)
    keep[[0, 8]] = False
    alone = {"stage2.0.bn2": keep}
    assert ms.prune(model, alone, X).stage2[0].bn2.num_features == 31
    first = torch.arange(16) != 0
    together = {**alone, "bn": first, "stage1.0.bn2": first}
    assert ms.prune(model, together, X).stage2[0].bn2.num_features == 30


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("reduction", [0.1, 0.5, 0.9])
def test_masks_for_macs_reaches_the_goal_and_no_more(reduction, residual):
    model = lively(ms.resnet(20))
    graph = ms.ChannelGraph(model, X)
    masks = ms.masks_for_macs(graph, None, reduction, residual)
    full, small = ms.cost(model, X).macs, ms.cost(ms.prune(graph, masks), X).macs
    assert reduction <= 1 - small / full < reduction + 0.01
    assert min(int(m.sum()) for m in masks.values()) >= 1
    if residual:
        return
    gamma = ms.gammas(graph)  # with the largest γ that went, the goal would be missed
    gone = {n: g.masked_fill(masks[n], -1) for n, g in gamma.items()}
    name = max((n for n in gone if masks[n].sum() > 1), key=lambda n: gone[n].max())
    one_more = masks | {name: masks[name].index_fill(0, gone[name].argmax(), True)}
    assert 1 - ms.cost(ms.prune(graph, one_more), X).macs / full < reduction
    # channels go in the order of |γ|
    dropped = torch.cat([g[~masks[n]] for n, g in gamma.items()])
    kept = torch.cat([g[masks[n]] for n, g in gamma.items() if masks[n].sum() > 1])
    assert dropped.max() <= kept.min()


@pytest.mark.parametrize("residual", [False, True])
def test_of_equal_gammas_only_as_many_go_as_must_and_layers_take_turns(residual, caplog):
    """As in a fresh network, where each γ is 1. A log line says that they choose nothing."""
    model = lively(ms.network("resnet18"))
    for name in ms.gammas(model):
        torch.nn.init.constant_(model.get_submodule(name).weight, 0.5)
    x = torch.zeros(1, 3, 64, 64)
    graph = ms.ChannelGraph(model, x)
    with caplog.at_level(logging.WARNING, "mslib"):
        masks = ms.masks_for_macs(graph, None, 0.5, residual)
    assert "every |γ| is 0.5, so they choose no channel before another" in caplog.text
    assert 0.5 <= 1 - ms.cost(ms.prune(graph, masks), x).macs / ms.cost(model, x).macs < 0.51
    shares = [float(keep.float().mean()) for keep in masks.values()]
    assert max(shares) - min(shares) < 0.02


def test_a_log_line_where_gammas_are_all_alike_and_only_there(caplog):
    model = ms.resnet(8)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(m.weight)
    graph = ms.ChannelGraph(model, X)
    with caplog.at_level(logging.WARNING, "mslib"):
        ms.masks_below(graph, threshold=0.3)
    assert "every |γ| is 1, so they choose no channel before another" in caplog.text
    caplog.clear()
    with torch.no_grad():
        model.stage1[0].bn1.weight[3] = 0.9
    with caplog.at_level(logging.WARNING, "mslib"):
        ms.masks_below(graph, threshold=0.3)
        ms.masks_for_macs(graph, reduction=0.3)
        ms.masks_for_macs(
            graph,
            reduction=0.3,
            scores={"stage1.0.bn1": torch.ones(16)}
            | {f"stage{i}.0.bn1": torch.ones(16 * 2 ** (i - 1)) for i in (2, 3)},
        )  # the user's own scores
    assert not caplog.text


def test_scores_of_unknown_layers_are_refused():
    message = "scores for 'stage1.0.bn9': the network has no such BatchNorm; did you mean 'stage1.0"
    with pytest.raises(ValueError, match=message):
        ms.masks_for_macs(ms.resnet(8), X, scores={"stage1.0.bn9": torch.ones(16)})


def test_of_an_emptied_layer_the_best_channel_stays():
    """One BatchNorm over two layers that would lose all channels of one of them."""
    net = Net(
        lambda net, x: net.out(net.bn(torch.cat([net.a(x), net.b(x)], 1)).relu()),
        a=torch.nn.Conv2d(3, 4, 1),
        b=torch.nn.Conv2d(3, 6, 1),
        bn=torch.nn.BatchNorm2d(10),
        out=torch.nn.Conv2d(10, 2, 1),
    )
    net = lively(net)
    with torch.no_grad():
        net.bn.weight.copy_(torch.tensor([0.03, 0.02, 0.05, 0.04, 0.9, 0.8, 0.7, 0.01, 0.5, 0.6]))
    masks = ms.masks_below(net, X, 0.1)
    assert masks["bn"].nonzero().flatten().tolist() == [2, 4, 5, 6, 8, 9]
    assert ms.prune(net, masks, X).a.out_channels == 1
    with pytest.raises(ValueError, match="the masks keep no channel of 'a'"):
        ms.prune(net, {"bn": torch.arange(10) > 3}, X)


@pytest.mark.parametrize("reduction", [0, 1, -0.5, 1.5])
def test_reduction_outside_0_1(reduction):
    with pytest.raises(ValueError, match=f"reduction {reduction}"):
        ms.masks_for_macs(ms.resnet(8), X, reduction)


def test_reduction_out_of_reach_says_the_most():
    model = ms.resnet(8)
    with pytest.raises(ValueError, match=r"out of reach.*(\d\d\.\d)%") as caught:
        ms.masks_for_macs(model, X, 0.99)
    most = float(caught.value.args[0].split("left in each layer ")[1].split("%")[0]) / 100
    one = {n: torch.arange(len(g)) < 1 for n, g in ms.gammas(model, X).items()}
    left = ms.cost(ms.prune(model, one, X), X).macs / ms.cost(model, X).macs
    assert most == pytest.approx(1 - left, abs=1e-3)
    assert "residual=True reaches further" in caught.value.args[0]


def test_threshold_must_be_positive():
    with pytest.raises(ValueError, match="threshold 0"):
        ms.masks_below(ms.resnet(8), X, 0)


@pytest.mark.parametrize("reduction", [0.1, 0.5, 0.9])
def test_one_ratio_is_the_share_of_each_layer(reduction):
    graph = ms.ChannelGraph(lively(ms.resnet(20)), X)
    scores = ms.gammas(graph)
    for name, keep in ms.masks_for_ratio(graph, None, reduction, scores).items():
        assert int((~keep).sum()) == math.ceil(reduction * len(keep))
        assert scores[name][keep].min() >= scores[name][~keep].max()
    with pytest.raises(ValueError, match="reduction 1.0"):
        ms.masks_for_ratio(graph, None, 1.0, scores)


def test_ratios_of_parts_and_of_single_weights():
    model = lively(ms.resnet(8))
    graph = ms.ChannelGraph(model, X)
    masks = ms.masks_for_ratio(graph, reduction={"stage1": 0.75, "stage3": 0.25, "stage3.0": 0.5})
    assert {name: int((~keep).sum()) for name, keep in masks.items()} == {
        "stage1.0.bn1": 12,
        "stage2.0.bn1": 0,
        "stage3.0.bn1": 32,  # the innermost module counts
    }
    with pytest.raises(ValueError, match="'stage4'"):
        ms.masks_for_ratio(graph, reduction={"stage4": 0.5})
    sizes = ms.weight_norms(model)
    single = ms.masks_for_ratio(model, reduction=0.6, scores=sizes)  # no example is needed
    assert single.keys() == sizes.keys()
    for name, keep in single.items():
        assert keep.shape == sizes[name].shape
        assert int((~keep).sum()) == math.ceil(0.6 * keep.numel())
        assert sizes[name][keep].min() >= sizes[name][~keep].max()


@pytest.mark.parametrize("residual", [False, True])
def test_no_layer_goes_below_the_floor(residual, caplog):
    model = lively(ms.resnet(14))
    with torch.no_grad():
        model.stage3[1].bn1.weight.mul_(0.01)  # a layer whose every channel would go
    graph = ms.ChannelGraph(model, X)
    for floor, least in ((0.0, 1), (0.1, 7), (0.25, 16)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="mslib"):
            masks = ms.masks_for_macs(graph, None, 0.4, residual, floor=floor)
        assert int(masks["stage3.1.bn1"].sum()) == least
        assert all(int(m.sum()) >= floor * len(m) for m in masks.values())
        best = model.stage3[1].bn1.weight.abs().topk(least).indices.sort().values
        assert torch.equal(masks["stage3.1.bn1"].nonzero().flatten(), best)
        assert ms.cost(ms.prune(graph, masks), X).macs <= 0.6 * ms.cost(model, X).macs
        assert (
            "one channel" if not floor else f"{floor:.1%} of the channels"
        ) + " kept in stage3.1.bn1" in caplog.text
        told = {record.levelno for record in caplog.records}  # who set a floor expects it
        assert told == {logging.INFO if floor else logging.WARNING}
    with pytest.raises(
        ValueError, match="out of reach: with 90.0% of the channels left in each layer"
    ):
        ms.masks_for_macs(graph, None, 0.4, residual, floor=0.9)
    with pytest.raises(ValueError, match="floor 1.5: expected a share from 0 to below 1"):
        ms.masks_for_macs(graph, None, 0.4, floor=1.5)


@pytest.mark.parametrize("residual", [False, True])
def test_layers_keep_multiples_of_round_to(residual):
    model = lively(ms.resnet(14))
    graph = ms.ChannelGraph(model, X)
    plain, whole = ms.masks_for_macs(graph, None, 0.4, residual), ms.cost(model, X).macs
    for to in (1, 4, 8):
        masks = ms.masks_for_macs(graph, None, 0.4, residual, round_to=to)
        assert {int(m.sum()) % to for m in masks.values()} == {0}
        small = ms.prune(graph, masks)
        assert {m.out_channels % to for m in small.modules() if isinstance(m, torch.nn.Conv2d)} == {
            0
        }
        assert 0.5 < ms.cost(small, X).macs / whole <= 0.6
        assert (to == 1) == all(torch.equal(masks[n], m) for n, m in plain.items())
    masks = ms.masks_for_macs(graph, None, 0.2, residual, round_to=24)
    assert {(len(m), int(m.sum())) for m in masks.values()} <= {
        (16, 16),
        (32, 24),
        (32, 32),
        (64, 24),
        (64, 48),
        (64, 64),
    }
    with pytest.raises(
        ValueError, match=r"one channel left in each layer and multiples of 48 \d+\.\d% of the MACs"
    ):
        ms.masks_for_macs(graph, None, 0.9, round_to=48)
    with pytest.raises(ValueError, match="round_to=0: "):
        ms.masks_for_macs(graph, None, 0.4, round_to=0)


@pytest.mark.parametrize("where", ["given scores", "gamma of the network", "places", "weights"])
def test_a_score_that_is_nan_chooses_nothing(where):
    """Sorted, a nan has a place like any number: the cut would be of no meaning, in silence."""
    model = lively(ms.resnet(8))
    scores = ms.gammas(model, X)
    if where == "weights":
        scores = ms.weight_norms(model)
    name = [*scores][1]
    scores[name].view(-1)[3] = math.nan
    with torch.no_grad():
        model.stage2[0].bn1.weight[3] = math.nan
    makers = {
        "given scores": [ms.masks_for_macs, ms.masks_for_ratio],
        "gamma of the network": [ms.masks_for_macs, ms.masks_for_ratio, ms.masks_below],
        "places": [lambda *_, scores: ms.ranked_scores(model, scores, X)],
        "weights": [lambda *_, scores: ms.masks_for_ratio(model, X, 0.5, scores)],
    }
    given = {} if where == "gamma of the network" else {"scores": scores}
    for make in makers[where]:
        with pytest.raises(ValueError, match=f"a score of {name!r} is nan: has the network"):
            make(model, X, 0.5, **given)


@pytest.mark.parametrize("value", [0, -8, 2.5])
def test_a_multiple_that_is_no_whole_number_is_named(value):
    with pytest.raises(ValueError, match=f"round_to={value}: each layer keeps a multiple"):
        ms.masks_for_macs(lively(ms.resnet(8)), X, 0.5, round_to=value)
