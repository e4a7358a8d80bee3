"""A network out the door: ONNX and torch.export."""

import logging

import pytest
import torch
from torch import nn

import mslib as ms
from mslib.exports import session

from .conftest import lively


@pytest.fixture(scope="module")
def pruned():
    model, x = lively(ms.network("resnet18", num_classes=7)), torch.randn(3, 3, 32, 32)
    return ms.prune(model, ms.masks_for_macs(model, x, 0.5), x, fold_bias=True).train(), x


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_exported_files_compute_the_same_for_any_batch_size(pruned, suffix, tmp_path):
    model, x = pruned
    path = tmp_path / f"small.{suffix}"
    levels = [logging.getLogger(n).level for n in ("torch.onnx", "onnxscript", "onnx_ir")]
    off = ms.export(nn.DataParallel(model), path, x)
    assert 0 <= off < 1e-4 and model.training
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert levels == [logging.getLogger(n).level for n in ("torch.onnx", "onnxscript", "onnx_ir")]
    model.eval().requires_grad_(False)
    for batch in (x[:1], torch.randn(5, 3, 32, 32)):
        if suffix == "onnx":
            out = torch.from_numpy(session(path).run(None, {"images": batch.numpy()})[0])
        else:
            out = torch.export.load(path).module()(batch)
        assert torch.allclose(out, model(batch), atol=1e-4 * float(model(batch).abs().max()))
    model.train()
    if suffix == "onnx":
        measured = ms.latency(path, x, seconds=0.05)
        assert measured.median > 0 and measured.batch_size == 3


class Heads(nn.Module):
    """Several inputs, and outputs in a dict of a tuple and a list."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3)
        self.wrong = 0.0

    def forward(self, image, depth):
        x, y = self.a(image), self.b(depth)
        if torch.compiler.is_compiling():  # the file computes another thing, in one output
            y = y + self.wrong
        return {"out": (x + y, x.mean((2, 3))), "more": [y]}


IMAGE, DEPTH = torch.randn(2, 3, 8, 8), torch.randn(2, 1, 8, 8)


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize("by_name", [False, True])
def test_every_output_of_several_inputs_is_compared(suffix, by_name, tmp_path):
    example = {"image": IMAGE, "depth": DEPTH} if by_name else (IMAGE, DEPTH)
    path, model = tmp_path / f"heads.{suffix}", Heads()
    assert ms.export(model, path, example) < 1e-4
    if suffix == "onnx":
        assert ms.latency(path, example, seconds=0.01).batch_size == 2
        with pytest.raises(ValueError, match="the file has the inputs"):
            ms.latency(path, IMAGE, seconds=0.01)
    path.unlink()
    model.wrong = 1.0
    with pytest.raises(ValueError, match="its outputs are off by .* not written"):
        ms.export(model, path, example)
    assert not list(tmp_path.iterdir())


class Any(nn.Conv2d):
    """As wrappers have it: the signature names no input."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_forward_of_any_arguments_is_exported(tmp_path):
    assert ms.export(Any(3, 4, 1), tmp_path / "any.pt2", IMAGE) < 1e-4
    other = torch.randn(5, 3, 8, 8)
    assert torch.export.load(tmp_path / "any.pt2").module()(other).shape == (5, 4, 8, 8)


class Also(nn.Conv2d):
    """Returns something of another kind beside its image."""

    beside: object = None

    def forward(self, x):
        return {"image": super().forward(x), "more": [self.beside]}


@pytest.mark.parametrize("beside", [3.5, 7, "map", True])
def test_onnx_holds_tensors_alone(beside, tmp_path):
    model = Also(3, 4, 1)
    model.beside = beside
    with pytest.raises(ValueError, match=f"Also cannot be .* it returns {beside!r}: leave it out"):
        ms.export(model, tmp_path / "also.onnx", IMAGE)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_named(tmp_path):
    class Sorted(nn.Conv2d):
        def forward(self, x):
            return torch.linalg.eigvals(super().forward(x)).real

    with pytest.raises(ValueError, match="Sorted cannot be exported to .onnx: .*aten.linalg_eig"):
        ms.export(Sorted(3, 3, 1), tmp_path / "sorted.onnx", IMAGE)
    assert not list(tmp_path.iterdir())


def test_exports_that_are_refused(pruned, tmp_path):
    model, x = pruned
    with pytest.raises(ValueError, match="small.pth: the ending decides on the format; expected"):
        ms.export(model, tmp_path / "small.pth", x)
    with pytest.raises(ValueError, match="above tolerance=-1; not written"):
        ms.export(model, tmp_path / "small.pt2", x, tolerance=-1)
    for wrong in (x.double(), x[:, :1], x.byte()):
        with pytest.raises(ValueError, match=r"ResNet \(float32\) does not run on the example"):
            ms.export(model, tmp_path / "small.pt2", wrong)

    class Branching(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="Branching cannot be exported to .pt2: "):
        ms.export(Branching(3, 3, 1), tmp_path / "small.pt2", x)
    assert not list(tmp_path.iterdir()) and model.training


class Nested(nn.Conv2d):
    """Takes its images in a dict."""

    def forward(self, inputs):
        return super().forward(inputs["image"])


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_images_inside_a_dict_may_be_of_any_number(suffix, tmp_path):
    model, path = Nested(3, 4, 1), tmp_path / f"nested.{suffix}"
    assert ms.export(model, path, ({"image": IMAGE},)) < 1e-4
    assert ms.cost(model, ({"image": IMAGE},)).macs == 8 * 8 * 3 * 4
    if suffix == "pt2":
        other = torch.randn(5, 3, 8, 8)
        assert torch.export.load(path).module()({"image": other}).shape == (5, 4, 8, 8)


class Counting(nn.Conv2d):
    """Does another thing for two images, as many as are exported and given."""

    def forward(self, x):
        return super().forward(x) if len(x) == 2 else 2 * super().forward(x)


class Fixed(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).view(2, 4, 64)


@pytest.mark.parametrize("kind", [Counting, Fixed])
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_file_for_one_batch_size_alone_is_refused(kind, suffix, tmp_path):
    with pytest.raises(ValueError, match=f"{kind.__name__} cannot be exported to .{suffix}"):
        ms.export(kind(3, 4, 1), tmp_path / f"fixed.{suffix}", IMAGE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_forward_that_works_in_place_is_exported_and_its_example_stays(suffix, tmp_path):
    class InPlace(nn.Conv2d):
        def forward(self, x):
            return super().forward(x.sub_(0.5).div_(0.25))

    x = IMAGE.clone()
    assert ms.export(InPlace(3, 4, 1), tmp_path / f"place.{suffix}", x) < 1e-4
    ms.latency(InPlace(3, 4, 1), x, seconds=0.01)
    assert torch.equal(x, IMAGE)
