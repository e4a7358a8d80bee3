"""Int8 files of a small trained network: what they compute, how large they are, what is refused."""

import logging

import onnx
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import mslib as ms
from mslib.data.tensors import Split
from mslib.exports import session

from .conftest import lively


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network that was trained, cut and fine-tuned on drawn images, and its float file."""
    whole = ms.load_data("shapes", image_size=16, sizes=(1200, 600))
    parts = [getattr(whole, name) for name in ("train", "val", "test")]
    parts = [part.subset((part.labels < 3).nonzero().flatten()) for part in parts]
    data, path = ms.Data("three shapes", *parts, whole.classes[:3]), tmp_path_factory.mktemp("q")
    torch.manual_seed(0)
    model = ms.resnet(8, 3)
    how = dict(batch_size=20, precision="fp32", device="cpu")
    ms.fit(model, data, epochs=6, lr=0.1, **how)
    masks = ms.masks_for_macs(model, data.example, 0.4)
    small = ms.prune(model, masks, data.example, fold_bias=True)
    ms.fit(small, data, epochs=3, lr=0.05, **how)
    ms.export(small, path / "small.onnx", data.example)
    return small, data, path / "small.onnx"


def test_int8_costs_little_top1_and_a_third_of_the_file(trained, tmp_path, capfd):
    small, data, source = trained
    path, handlers = tmp_path / "small.int8.onnx", [*logging.getLogger().handlers]
    before = source.read_bytes()
    off = ms.quantize(source, path, data.train)
    told = capfd.readouterr()
    assert not told.out and not told.err and handlers == logging.getLogger().handlers
    assert [*tmp_path.iterdir()] == [path] and source.read_bytes() == before
    assert path.stat().st_size < 0.5 * source.stat().st_size
    whole = ms.evaluate(small, data.test)
    assert whole > 50  # it has learnt something that could be lost
    assert abs(ms.evaluate(ms.OnnxNetwork(source), data.test) - whole) <= 0.5
    assert abs(ms.evaluate(ms.OnnxNetwork(path), data.test) - whole) <= 4
    assert ms.latency(path, data.example, seconds=0.02).median > 0
    # it computes in integers: every convolution reads weights of one byte
    graph = onnx.load(path).graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    made = {out: node for node in graph.node for out in node.output}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 8
    for node in layers:
        weight = made[node.input[1]]
        assert (
            weight.op_type == "DequantizeLinear" and made[node.input[0]].op_type == weight.op_type
        )
        assert kinds[weight.input[0]] == onnx.TensorProto.INT8
    # what is returned, on the images that were drawn first
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:100]
    images = {"images": ms.normalize(data.train.images[order]).numpy()}
    wanted, found = (session(file).run(None, images)[0] for file in (source, path))
    assert off == pytest.approx(abs(found - wanted).max() / abs(wanted).max(), rel=1e-3)
    assert 0 < off < 0.5


def test_a_loader_calibrates_and_the_range_is_that_of_its_images(trained, tmp_path):
    """Images of small values make small ranges: larger ones are clipped then."""
    _, data, source = trained
    pairs = list(zip(ms.normalize(data.train.images), data.train.labels))
    paths = [tmp_path / f"{name}.onnx" for name in "abc"]
    ms.quantize(source, paths[0], DataLoader(pairs, 50), images=100)
    ms.quantize(source, paths[1], [(x, y) for x, y in DataLoader(pairs, 50)][:2])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    ms.quantize(source, paths[2], [(0.01 * x, y) for x, y in DataLoader(pairs, 50)][:2])
    images, tops = {"images": ms.normalize(data.test.images).numpy()}, []
    for file in (source, paths[0], paths[2]):
        tops.append(session(file).run(None, images)[0])
    assert abs(tops[2] - tops[0]).mean() > 3 * abs(tops[1] - tops[0]).mean()


def test_what_quantize_refuses_leaves_nothing_behind(trained, tmp_path):
    _, data, source = trained
    out, bad = tmp_path / "out", tmp_path / "in" / "bad.onnx"
    bad.parent.mkdir()
    out.mkdir()
    path, train = out / "small.onnx", data.train
    with pytest.raises(FileNotFoundError, match="no file"):
        ms.quantize(tmp_path / "none.onnx", path, train)
    with pytest.raises(ValueError, match="small.int8: expected a name that ends in .onnx"):
        ms.quantize(source, out / "small.int8", train)
    bad.write_bytes(source.read_bytes()[:2000])
    with pytest.raises(ValueError, match="bad.onnx cannot be read as ONNX"):
        ms.quantize(bad, path, train)
    with pytest.raises(ValueError, match="bad.onnx cannot be run by ONNX Runtime"):
        ms.OnnxNetwork(bad)
    ms.quantize(source, bad, train, images=20)
    with pytest.raises(ValueError, match="bad.onnx is quantized already"):
        ms.quantize(bad, path, train)
    with pytest.raises(ValueError, match="its outputs are off by .* tolerance=-1; not written"):
        ms.quantize(source, path, train, tolerance=-1)
    small = Split(train.images[:, :1], train.labels)
    with pytest.raises(
        ValueError, match=r"does not run on images torch.float32 \[100, 1, 16, 16\]"
    ):
        ms.quantize(source, path, small)
    with pytest.raises(ValueError, match="images=0: at least one"):
        ms.quantize(source, path, train, images=0)
    with pytest.raises(ValueError, match="no image to look at"):
        ms.quantize(source, path, [])

    class Two(nn.Module):
        def forward(self, a, b):
            return a + b

    x = torch.randn(2, 3, 4, 4)
    ms.export(Two(), bad, (x, x))
    with pytest.raises(ValueError, match="bad.onnx has the inputs a, b; expected one, of images"):
        ms.quantize(bad, path, train)
    path.write_bytes(b"an older file")
    nan = [(torch.full((4, 3, 16, 16), float("nan")), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(ValueError):
        ms.quantize(source, path, nan)
    assert path.read_bytes() == b"an older file" and [*out.iterdir()] == [path]


def test_a_file_is_called_like_the_network(tmp_path):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, image, depth):
            return self.conv(image), depth.mean((2, 3))

    model, x, d = lively(Heads()), torch.randn(2, 3, 4, 4), torch.randn(2, 1, 4, 4)
    ms.export(model, tmp_path / "heads.onnx", (x, d))
    net = ms.OnnxNetwork(tmp_path / "heads.onnx")
    for found in (net(x, d), net(depth=d, image=x)):
        for a, b in zip(found, model(x, d), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    with pytest.raises(FileNotFoundError):
        ms.OnnxNetwork(tmp_path / "none.onnx")
