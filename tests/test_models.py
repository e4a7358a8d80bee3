import pickle

import pytest
import torch
import torchvision

import mslib as ms
from mslib.networks import untrained

from .conftest import lively

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_depth_counts_the_layers_with_weights(depth):
    layers = [
        m
        for m in ms.resnet(depth, 7).modules()
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    assert len(layers) == depth
    assert ms.resnet(depth, 7)(X[:, :, :16, :16]).shape == (2, 7)


@pytest.mark.parametrize("depth", [0, 7, 57])
def test_a_wrong_depth_is_named(depth):
    with pytest.raises(ValueError, match=f"depth {depth}"):
        ms.resnet(depth)


def test_vgg_of_the_papers():
    """The figures that Growing Regularization reports for VGG-19: 20.08 M parameters, 8.84 times fewer MACs at 0.7 a layer."""
    model, image = ms.vgg(19, 100), X[:1]
    assert (
        ms.cost(model, image).macs == 398_182_400
        and round(ms.cost(model, image).params / 1e6, 2) == 20.08
    )
    assert ms.cost(ms.vgg(16), image).macs == 313_201_664
    masks = ms.masks_for_ratio(model, {"": 0.7, "features.1": 0}, ms.filter_norms(model))
    assert [int(m.sum()) for m in masks.values()][:4] == [64, 19, 38, 38] and len(masks) == 16
    small = ms.prune(lively(model), masks, image)
    assert ms.cost(small, image).macs == 44_784_324  # 8.89 times fewer
    with pytest.raises(ValueError, match="depth is 11, 13, 16 or 19"):
        ms.vgg(12)


def test_a_pruned_vgg_is_saved_and_trained_anew(tmp_path):
    model = lively(ms.vgg(11, 5, width=0.25))
    small = ms.prune(model, ms.masks_for_macs(model, X, 0.6), X)
    ms.save(small, tmp_path / "small.pt")
    again = ms.load(tmp_path / "small.pt")
    assert torch.equal(again.eval()(X), small(X))
    assert not torch.equal(untrained(again).features[0].weight, again.features[0].weight)


def test_option_a_shortcut():
    out = ms.PaddedShortcut(4, 8, 2)(X[:, :1].repeat(1, 4, 1, 1))
    assert out.shape == (2, 8, 16, 16)
    assert (
        torch.equal(out[:, 2:6], X[:, :1, ::2, ::2].repeat(1, 4, 1, 1))
        and not out[:, [0, 1, 6, 7]].any()
    )


@pytest.mark.parametrize("residual", [False, True])
def test_a_pruned_network_is_saved_with_its_widths(tmp_path, residual):
    model = lively(ms.resnet(20, 5))
    small = ms.prune(model, ms.masks_for_macs(model, X, 0.6, residual))
    ms.save(small, tmp_path / "small.pt")
    assert torch.equal(ms.load(tmp_path / "small.pt").eval()(X), small(X))
    assert (tmp_path / "small.pt").stat().st_size < 0.9 * sum(
        p.numel() * 4 for p in model.parameters()
    )


def test_a_network_of_the_reader(tmp_path):
    model = lively(torchvision.models.resnet18(num_classes=3))
    small = ms.prune(model, ms.masks_for_macs(model, X, 0.4, True))
    ms.save(small, tmp_path / "small.pt")
    with pytest.raises(ValueError, match=r"load\(path, model\)"):
        ms.load(tmp_path / "small.pt")
    assert torch.equal(
        ms.load(tmp_path / "small.pt", torchvision.models.resnet18(num_classes=3)).eval()(X),
        small(X),
    )
    with pytest.raises(ValueError, match="does not fit ResNet"):
        ms.load(tmp_path / "small.pt", ms.resnet(8))


def test_files_that_are_no_networks(tmp_path):
    path = tmp_path / "net.pt"
    with pytest.raises(FileNotFoundError, match="net.pt"):
        ms.load(path)
    ms.save(ms.resnet(8), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="net.pt cannot be read: truncated"):
        ms.load(path)
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not written by ms.save"):
        ms.load(path)

    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("boom").touch, ())

    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="cannot be read"):
        ms.load(path)
    assert not (tmp_path / "boom").exists()


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.pt"
    ms.save(ms.resnet(8), path)
    before = path.read_bytes()

    def full(value, file):
        open(file, "wb").write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        ms.save(ms.resnet(14), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_untrained_has_the_widths_and_none_of_the_weights():
    model = lively(ms.resnet(8))
    small = ms.prune(model, ms.masks_for_macs(model, X, 0.5))
    fresh = untrained(small)
    for (name, a), b in zip(small.named_parameters(), fresh.parameters()):
        assert a.shape == b.shape and not torch.equal(a, b), name
    assert not any(
        b.running_mean.any() for b in fresh.modules() if isinstance(b, torch.nn.BatchNorm2d)
    )


def test_every_channel_learns_from_the_first_step():
    """Option A pads with zeros: a block that started as exactly its shortcut would leave the padded channels dead."""
    model = ms.resnet(56).train()
    torch.nn.functional.cross_entropy(model(X), torch.tensor([0, 1])).backward()
    for name, m in model.named_modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            assert (m.weight.grad != 0).float().mean() > 0.9, name
