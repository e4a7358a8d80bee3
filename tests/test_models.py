"""The networks that mslib builds, and the layers of any network resized to a state."""

import pytest
import torch
import torchvision
from torch import nn

import mslib as ms
from mslib.networks import as_inputs, batch_norms, resize, sync_widths, untrained, unwrap

from .conftest import lively

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_depth_counts_the_layers_with_weights(depth):
    model = ms.resnet(depth, 7)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == depth
    assert model(X[:, :, :8, :8]).shape == (2, 7)


@pytest.mark.parametrize(
    "wrong",
    [
        {"depth": 0},
        {"depth": 7},
        {"depth": 57},
        {"depth": 1208},
        {"depth": "20"},
        {"depth": True},
        {"num_classes": 0},
        {"num_classes": 10**7},
        {"num_classes": 2.0},
        {"width": 0},
        {"width": -1.0},
        {"width": float("nan")},
        {"width": float("inf")},
        {"width": 65},
        {"width": "1"},
        {"in_channels": 0},
    ],
)
def test_a_wrong_argument_is_named(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}: "):
        ms.resnet(**{"depth": 20} | wrong)
    if name != "depth":
        with pytest.raises(ValueError, match=f"{name}={value!r}: "):
            ms.vgg(11, **wrong)


def test_width_scales_all_stages():
    """The seed decides the weights, and width=1.0 draws those that there were without a width."""
    torch.manual_seed(0)
    model = ms.resnet(8, width=0.25, in_channels=1)
    assert [len(m.weight) for _, m in batch_norms(model)] == [4, 4, 4, 8, 8, 16, 16]
    assert model(X[:, :1]).shape == (2, 10) and model.recipe["width"] == 0.25
    assert [len(m.weight) for _, m in batch_norms(ms.resnet(8, width=0.01))] == [1] * 7
    torch.manual_seed(0)
    plain = ms.resnet(20)
    torch.manual_seed(0)
    assert torch.equal(ms.resnet(20, width=1).fc.weight, plain.fc.weight)
    # measured before widths were introduced
    assert float(plain.conv.weight.detach().double().sum()) == pytest.approx(SUMS[0], abs=1e-4)
    assert float(plain.fc.weight.detach().double().sum()) == pytest.approx(SUMS[1], abs=1e-4)


SUMS = (-0.040753445093287155, -0.7584935426712036)


def test_vgg_of_the_papers():
    """What Growing Regularization reports for VGG-19: 20.08 M parameters, 8.84 times fewer MACs."""
    model, image = ms.vgg(19, 100), X[:1]
    assert ms.cost(model, image).macs == 398_182_400
    assert round(ms.cost(model, image).params / 1e6, 2) == 20.08
    assert ms.cost(ms.vgg(16), image).macs == 313_201_664
    scores = ms.filter_norms(model, image)
    masks = ms.masks_for_ratio(model, image, {"": 0.7, "features.1": 0}, scores)
    assert [int(m.sum()) for m in masks.values()][:4] == [64, 19, 38, 38] and len(masks) == 16
    small = ms.prune(lively(model), masks, image)
    assert ms.cost(small, image).macs == 44_784_324  # 8.89 times fewer
    with pytest.raises(ValueError, match="depth=12: a CIFAR VGG has a depth of 11, 13, 16 or 19"):
        ms.vgg(12)


def test_option_a_shortcut():
    out = ms.PaddedShortcut(4, 8, 2)(X[:, :1].repeat(1, 4, 1, 1))
    assert out.shape == (2, 8, 16, 16)
    assert torch.equal(out[:, 2:6], X[:, :1, ::2, ::2].repeat(1, 4, 1, 1))
    assert not out[:, [0, 1, 6, 7]].any()


def test_untrained_has_the_widths_and_none_of_the_weights():
    model = lively(ms.resnet(8))
    small = ms.prune(model, ms.masks_for_macs(model, X, 0.5), X)
    fresh = untrained(small)
    for (name, a), b in zip(small.named_parameters(), fresh.parameters()):
        assert a.shape == b.shape and not torch.equal(a, b), name
    assert not any(m.running_mean.any() for _, m in batch_norms(fresh))
    with pytest.raises(ValueError, match="Sequential: only ms.resnet and ms.vgg"):
        untrained(nn.Sequential())


def test_every_channel_learns_from_the_first_step():
    """Option A pads with zeros: blocks that start as their shortcut would leave channels dead."""
    model = ms.resnet(56).train()
    torch.nn.functional.cross_entropy(model(X), torch.tensor([0, 1])).backward()
    for name, m in batch_norms(model):
        assert (m.weight.grad != 0).float().mean() > 0.9, name


def test_networks_without_weights_download_nothing(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    model = ms.network("fcn_resnet50", 5)
    assert model.aux_classifier is None
    assert model.eval()(X)["out"].shape == (2, 5, 32, 32)
    for name in ("fasterrcnn_resnet50_fpn", "raft_small"):
        with pytest.raises(ValueError, match=rf"{name} is no classifier .* ms.load\(path, model\)"):
            ms.network(name)


def test_network_is_torchvisions_with_other_outputs():
    model = ms.network("mobilenet_v2", num_classes=3)
    assert isinstance(model, torchvision.models.MobileNetV2)
    assert model.classifier[1].out_features == 3
    with pytest.raises(ValueError, match="unknown network 'resnet19'; did you mean 'resnet"):
        ms.network("resnet19")
    with pytest.raises(ValueError, match="resnet18 has no weights 'IMAGENET'"):
        ms.network("resnet18", weights="IMAGENET")
    with pytest.raises(ValueError, match="num_classes='3'"):
        ms.network("resnet18", "3")
    for name in ("squeezenet1_1", "googlenet"):  # without a linear layer; with auxiliary ones
        assert ms.network(name, 3)(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_weights_are_poured_in_and_the_classifier_replaced(tmp_path, monkeypatch):
    """With stored weights, here some in their place, as no test downloads any."""
    from torchvision.models._api import WeightsEnum

    names = ("resnet18", "squeezenet1_1", "googlenet")
    options = {"googlenet": {"init_weights": True}}
    stored = {n: torchvision.models.get_model(n, **options.get(n, {})).state_dict() for n in names}

    def state(self, *_, **__):
        return stored[type(self).__name__.split("_W")[0].lower()]

    monkeypatch.setattr(WeightsEnum, "get_state_dict", state)
    model = ms.network("resnet18", 7, "DEFAULT")
    assert torch.equal(model.conv1.weight, stored["resnet18"]["conv1.weight"])
    ms.save(model, tmp_path / "seven.pt")
    assert torch.equal(ms.load(tmp_path / "seven.pt").fc.weight, model.fc.weight)
    assert model.fc.out_features == 7
    plain = ms.network("resnet18", weights="ResNet18_Weights.IMAGENET1K_V1")
    assert torch.equal(plain.fc.weight, stored["resnet18"]["fc.weight"])
    assert ms.network("squeezenet1_1", weights="DEFAULT").num_classes == 1000
    with pytest.raises(
        ValueError, match="squeezenet1_1 has no linear layer .* 1000 outputs, not 7"
    ):
        ms.network("squeezenet1_1", 7, "DEFAULT")
    model = ms.network("googlenet", 7, "DEFAULT").eval()  # its weights expect other images
    ms.save(model, tmp_path / "google.pt")
    assert torch.equal(ms.load(tmp_path / "google.pt").eval()(X), model(X))


def test_wrappers_are_taken_off():
    model = ms.resnet(8)
    assert unwrap(model) is model
    assert unwrap(nn.DataParallel(torch.compile(model))) is model


def test_examples_of_several_inputs():
    assert as_inputs(X) == ((X,), {}) and as_inputs([X, 2]) == ((X, 2), {})
    assert as_inputs({"x": X}) == ((), {"x": X})
    for wrong in (None, [], {}, "x", 3):
        with pytest.raises(ValueError, match="example is "):
            as_inputs(wrong)


LAYERS = {  # name: (as made, as cut, attributes of the cut one)
    "grouped": (
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Conv2d(4, 4, 3, groups=4),
        {"in_channels": 4, "out_channels": 4, "groups": 4},
    ),
    "depthwise": (
        nn.Conv2d(8, 16, 3, groups=8),
        nn.Conv2d(3, 6, 3, groups=3),
        {"in_channels": 3, "out_channels": 6, "groups": 3},
    ),
    "conv1d": (nn.Conv1d(4, 6, 3), nn.Conv1d(3, 5, 3), {"in_channels": 3, "out_channels": 5}),
    "transposed": (
        nn.ConvTranspose2d(4, 6, 2),
        nn.ConvTranspose2d(3, 5, 2),
        {"in_channels": 3, "out_channels": 5},
    ),
    "transposed, grouped": (
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.ConvTranspose2d(2, 4, 2, groups=2),
        {"in_channels": 2, "out_channels": 4, "groups": 2},
    ),
    "batch norm": (nn.BatchNorm1d(4), nn.BatchNorm1d(3), {"num_features": 3}),
    "no affine": (
        nn.BatchNorm3d(4, affine=False),
        nn.BatchNorm3d(3, affine=False),
        {"num_features": 3},
    ),
    "prelu": (nn.PReLU(4), nn.PReLU(3), {"num_parameters": 3}),
    "linear": (nn.Linear(4, 6), nn.Linear(3, 5), {"in_features": 3, "out_features": 5}),
    "layer norm": (
        nn.LayerNorm([4, 8, 8]),
        nn.LayerNorm([3, 8, 8]),
        {"normalized_shape": (3, 8, 8)},
    ),
    "group norm": (nn.GroupNorm(2, 8), nn.GroupNorm(2, 6), {"num_channels": 6}),
    "bias added": (nn.Conv2d(4, 6, 3, bias=False), nn.Conv2d(4, 6, 3), {"in_channels": 4}),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("root", [False, True])
def test_layers_of_every_kind_are_resized(name, root):
    import copy

    made, cut, attributes = copy.deepcopy(LAYERS[name])
    if not root:
        made, cut = nn.Sequential(made), nn.Sequential(cut)
    groups = {"" if root else "0": attributes.get("groups", 1)}
    state = cut.state_dict()
    assert resize(made, state, groups=groups) is made
    layer = made if root else made[0]
    assert {key: getattr(layer, key) for key in attributes} == attributes
    assert all(torch.equal(v, state[k]) for k, v in made.state_dict().items())
    for value in attributes:
        setattr(layer, value, None if value != "groups" else attributes["groups"])
    sync_widths(made)
    assert {key: getattr(layer, key) for key in attributes} == attributes


def test_missing_names_are_an_error_and_not_skipped():
    """weight_norm: its convolution has no `weight`, and only the BatchNorm would be cut."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, bias=False)))
    state = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)).state_dict()
    with pytest.raises(
        ValueError, match="the state does not fit Sequential: Missing key.*parametriz"
    ):
        resize(model, state)
    resize(model, {k: v[:4] if v.ndim else v for k, v in model.state_dict().items()})
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 6, 6)


class Lenient(nn.Sequential):
    def load_state_dict(self, state):
        return super().load_state_dict(state, strict=False)


def test_missing_names_are_an_error_in_a_network_that_would_skip_them():
    model = Lenient(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='does not fit Lenient: Missing key.*"0.bias"'):
        resize(model, {"0.weight": torch.zeros(1, 2)})
    assert model[0].weight.shape == (2, 2) and model[0].weight.all()


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("0.weight", torch.zeros(8, 3, 5, 5), "0, Conv2d"),
        ("0.weight", torch.zeros(8, 3), r"0.weight is \[8, 3\]"),
        ("0.weight", torch.zeros(0, 3, 3, 3), r"0.weight is \[0, 3, 3, 3\]"),
        ("0.weight", torch.zeros(8, 3, 3, 3).long(), "torch.int64; the network has"),
        ("0.bias", torch.zeros(7), "0, Conv2d"),
        ("1.running_var", torch.zeros(7), "1, BatchNorm2d"),
        ("2.weight", torch.zeros(9, 2, 1, 1), "2, Conv2d"),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_named(key, value, message):
    def make():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, groups=4))

    with pytest.raises(ValueError, match=f"the state does not fit Sequential.*{message}"):
        resize(make(), make().state_dict() | {key: value})


def test_tied_weights_stay_tied_and_others_apart():
    def make(tied):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        if tied:
            model[1].weight = model[0].weight
        return model

    for given, fresh in ((True, False), (False, True), (True, True)):
        source = make(given)
        model = resize(make(fresh), source.state_dict())
        assert (model[0].weight is model[1].weight) == given
        assert torch.equal(model[1].weight, source[1].weight)


def test_untrained_weights_do_not_depend_on_the_layout():
    """A network that was just trained lies in memory in another order than one that was loaded."""
    drawn = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = ms.resnet(8).to(memory_format=layout)
        torch.manual_seed(0)
        drawn.append(ms.untrained(model).conv.weight)
    assert torch.equal(*drawn)
