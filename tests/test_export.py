"""A network out the door: ONNX, torch.export, and a file that another process loads without the code that made it."""

import subprocess
import sys

import pytest
import torch
import torchvision

import mslib as ms
from mslib.exports import session
from mslib.files import ROOT

from .conftest import lively


@pytest.fixture(scope="module")
def pruned():
    model, x = lively(ms.network("resnet18", num_classes=7)), torch.randn(3, 3, 64, 64)
    return ms.prune(model, ms.masks_for_macs(model, x, 0.5), fold_bias=True).train(), x


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_exported_files_compute_the_same_for_any_batch_size(pruned, suffix, tmp_path):
    model, x = pruned
    path = tmp_path / f"small.{suffix}"
    off = ms.export(model, path, x)
    assert (
        0 <= off < 1e-4 and model.training and [p.name for p in tmp_path.iterdir()] == [path.name]
    )
    model.eval()
    for batch in (x[:1], torch.randn(5, 3, 64, 64)):
        if suffix == "onnx":
            out = torch.from_numpy(session(path).run(None, {"images": batch.numpy()})[0])
        else:
            out = torch.export.load(path).module()(batch)
        assert torch.allclose(out, model(batch), atol=1e-4 * float(model(batch).abs().max()))
    model.train()
    if suffix == "onnx":
        measured = ms.latency(path, x, seconds=0.05)
        assert measured.median > 0 and measured.batch_size == 3


def test_exports_that_are_refused(pruned, tmp_path, monkeypatch):
    model, x = pruned
    with pytest.raises(
        ValueError, match="small.pth: the ending decides on the format; expected .onnx or .pt2"
    ):
        ms.export(model, tmp_path / "small.pth", x)
    with pytest.raises(ValueError, match="above tolerance=-1; not written"):
        ms.export(model, tmp_path / "small.onnx", x, tolerance=-1)
    assert not list(tmp_path.iterdir()) and model.training


def test_another_process_loads_a_pruned_torchvision_network(pruned, tmp_path):
    model, x = pruned
    ms.save(model, tmp_path / "small.pt")
    torch.save(x, tmp_path / "x.pt")
    code = f"""
import torch, mslib as ms
torch.set_num_threads(1)
net = ms.load({str(tmp_path / "small.pt")!r}).eval()
torch.save(net(torch.load({str(tmp_path / "x.pt")!r}, weights_only=True)).detach(), {str(tmp_path / "y.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    wanted = model.eval()(x)
    assert torch.allclose(
        torch.load(tmp_path / "y.pt", weights_only=True),
        wanted,
        atol=1e-5 * float(wanted.abs().max()),
    )
    model.train()


def test_network_is_torchvisions_with_other_outputs():
    model = ms.network("mobilenet_v2", num_classes=3)
    assert (
        isinstance(model, torchvision.models.MobileNetV2) and model.classifier[1].out_features == 3
    )
    with pytest.raises(
        ValueError, match="unknown network 'resnet19'; torchvision.models.list_models"
    ):
        ms.network("resnet19")
    with pytest.raises(ValueError, match="resnet18 has no weights 'IMAGENET'"):
        ms.network("resnet18", weights="IMAGENET")
    for name in (
        "squeezenet1_1",
        "googlenet",
    ):  # one without a linear layer, one with auxiliary classifiers
        assert ms.network(name, 3)(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_weights_are_poured_in_and_the_classifier_replaced(tmp_path, monkeypatch):
    """With stored weights, here some in their place, as no test downloads any."""
    from torchvision.models._api import WeightsEnum

    stored = {
        name: torchvision.models.get_model(name).state_dict()
        for name in ("resnet18", "squeezenet1_1")
    }
    monkeypatch.setattr(
        WeightsEnum,
        "get_state_dict",
        lambda self, *_, **__: stored[type(self).__name__.split("_W")[0].lower()],
    )
    model = ms.network("resnet18", 7, "DEFAULT")
    assert (
        torch.equal(model.conv1.weight, stored["resnet18"]["conv1.weight"])
        and model.fc.out_features == 7
    )
    ms.save(model, tmp_path / "seven.pt")
    assert torch.equal(ms.load(tmp_path / "seven.pt").fc.weight, model.fc.weight)
    assert torch.equal(
        ms.network("resnet18", weights="DEFAULT").fc.weight, stored["resnet18"]["fc.weight"]
    )
    assert ms.network("squeezenet1_1", weights="DEFAULT").num_classes == 1000
    with pytest.raises(
        ValueError,
        match="squeezenet1_1 has no linear layer to replace: with weights it has 1000 outputs, not 7",
    ):
        ms.network("squeezenet1_1", 7, "DEFAULT")


def test_a_tampered_file_is_refused(pruned, tmp_path):
    model, _ = pruned
    ms.save(model, tmp_path / "small.pt")
    content = torch.load(tmp_path / "small.pt", weights_only=True)
    narrow = dict(content["state"]) | {"layer1.0.bn1.weight": torch.ones(3)}
    for changed, message in (
        ({"recipe": content["recipe"], "state": narrow}, "does not fit ResNet"),
        (
            {"recipe": {"network": "os.system"}, "state": content["state"]},
            "unknown network 'os.system'",
        ),
        (
            {
                "recipe": content["recipe"],
                "state": {k: v for k, v in content["state"].items() if k != "fc.bias"},
            },
            "does not fit ResNet",
        ),
        (list(content["state"].values()), "was not written by ms.save"),
    ):
        torch.save(changed, tmp_path / "tampered.pt")
        with pytest.raises(ValueError, match=message):
            ms.load(tmp_path / "tampered.pt")
    torch.save(model, tmp_path / "pickled.pt")  # code, not data
    with pytest.raises(
        ValueError, match="cannot be read: truncated, damaged or not a weights file"
    ):
        ms.load(tmp_path / "pickled.pt")
