"""Files: whole or absent, and checked before anything is built of them. Here: networks and JSON."""

import io
import json
import os
import pickle
import resource
import struct
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import mslib as ms
from mslib.files import (
    ROOT,
    read_json,
    read_tensors,
    reason,
    replacing,
    write_json,
    write_tensors,
)

from .bounds import bounded
from .conftest import lively

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# ---- networks come back ----


@pytest.mark.parametrize("name", ["resnet", "residual", "vgg", "folded", "double"])
def test_a_pruned_network_is_saved_with_its_widths(tmp_path, name, caplog):
    model = ms.vgg(11, 5, width=0.25) if name == "vgg" else ms.resnet(14, 5, width=0.5)
    model = lively(model)
    x = X
    if name == "double":
        model, x = model.double(), X.double()
    masks = ms.masks_for_macs(model, x, 0.6, residual=name == "residual")
    small = ms.prune(model, masks, x, fold_bias=name == "folded")
    ms.save(small, tmp_path / "small.pt")
    again = ms.load(tmp_path / "small.pt")
    assert again.training and torch.equal(again.eval()(x), small(x)) and not caplog.text
    assert again.recipe == model.recipe
    second = ms.prune(again, ms.masks_for_macs(again, x, 0.3), x)
    ms.save(second, tmp_path / "small.pt")
    assert torch.equal(ms.load(tmp_path / "small.pt").eval()(x), second(x))


def test_old_files_load():
    path = ROOT / "data/reference/resnet56-cifar10-standard"
    model = ms.load(path / "01_baseline/baseline/model.pt")
    assert ms.cost(model, torch.zeros(1, 3, 32, 32)).macs == 125_485_696
    small = ms.load(path / "05_finetune/final.pt")  # pruned
    state = read_tensors(path / "05_finetune/final.pt")["state"]
    assert all(torch.equal(v, state[k]) for k, v in small.state_dict().items())
    assert small.stage3[0].conv1.out_channels == len(state["stage3.0.conv1.weight"]) < 64


def test_loading_draws_no_random_numbers(tmp_path):
    ms.save(ms.resnet(8, width=0.25), tmp_path / "net.pt")
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    ms.load(tmp_path / "net.pt")
    assert torch.equal(torch.rand(1), wanted)


class Mixed(nn.Module):
    """Layers whose weights have their outputs on other axes, or more than one axis."""

    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(width, 2 * width, 3, padding=1, groups=width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.norm, self.slope = nn.LayerNorm([width, 32, 32]), nn.PReLU(width)
        self.bn = nn.BatchNorm2d(width, affine=False)

    def forward(self, x):
        x = self.depthwise(self.grouped(self.first(x)))
        return self.slope(self.bn(self.norm(self.up(x))))


def test_layers_of_every_kind_come_back(tmp_path, caplog):
    """The grouped convolution was cut to one channel a group, so it looks depthwise."""
    cut = Mixed(4).eval()
    ms.save(nn.DataParallel(cut), tmp_path / "mixed.pt")
    assert "does not build" in caplog.text and len(caplog.records) == 1
    with pytest.raises(ValueError, match=r"mslib does not build; ms.load\(path, model\)"):
        ms.load(tmp_path / "mixed.pt")
    again = ms.load(tmp_path / "mixed.pt", Mixed(8)).eval()
    assert torch.equal(again(X), cut(X))
    again.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)  # cut again, in another way
    ms.save(again, tmp_path / "mixed.pt")
    assert torch.equal(ms.load(tmp_path / "mixed.pt", Mixed(8)).eval()(X), again(X))
    with pytest.raises(ValueError, match="does not fit ResNet"):
        ms.load(tmp_path / "mixed.pt", ms.resnet(8))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    def make():
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))

    model = make()
    model[2].weight = model[0].weight
    model[1].weight.data = model[0].weight.data  # one memory, two parameters
    ms.save(model, tmp_path / "tied.pt")
    assert (tmp_path / "tied.pt").stat().st_size < 1.5 * 64 * 64 * 4
    again = ms.load(tmp_path / "tied.pt", make())
    assert again[0].weight is again[2].weight is again[1].weight
    views = make()
    views[1].weight.data = views[0].weight.data.T  # not contiguous, and other values
    ms.save(views, tmp_path / "tied.pt")
    again = ms.load(tmp_path / "tied.pt", make())
    assert torch.equal(again[1].weight, views[0].weight.T)


class Counted(nn.Conv2d):
    """Keeps more than parameters and buffers: an extra state, and a tensor of its own naming."""

    beside = None

    def get_extra_state(self):
        return torch.tensor([self.stride[0]])

    def set_extra_state(self, state):
        self.stride = (int(state), int(state))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.beside is not None:
            destination[prefix + "beside"] = self.beside


def test_an_extra_state_comes_back_and_what_nothing_takes_is_refused(tmp_path):
    ms.save(nn.Sequential(Counted(3, 4, 1, stride=5)), tmp_path / "net.pt")
    assert ms.load(tmp_path / "net.pt", nn.Sequential(Counted(3, 8, 1)))[0].stride == (5, 5)
    odd = nn.Sequential(Counted(3, 4, 1))
    odd[0].beside = torch.ones(2)
    ms.save(odd, tmp_path / "net.pt")
    with pytest.raises(
        ValueError, match="net.pt does not fit Sequential: Unexpected key.*0.beside"
    ):
        ms.load(tmp_path / "net.pt", odd)


def uneven():
    """Each tensor has the right name, kind and axes, but not the width of the others."""
    norm = nn.BatchNorm2d(4)
    norm.running_var = torch.ones(5)
    return norm


@pytest.mark.parametrize(
    "saved",
    [
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(2, 2)),  # another name
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(2, 2)),  # too few
        nn.Sequential(nn.Conv2d(3, 8, 1), uneven()),
        nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm2d(8)),  # an axis less, behind a bias
    ],
)
def test_a_network_is_left_as_it_was_by_what_does_not_fit_it(saved, tmp_path):
    mine = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    state, held = {k: v.clone() for k, v in mine.state_dict().items()}, [*mine.parameters()]
    ms.save(saved, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="does not fit Sequential"):
        ms.load(tmp_path / "net.pt", mine)
    assert all(a is b for a, b in zip(held, mine.parameters(), strict=True))
    assert mine[0].bias is None and mine[0].out_channels == 4
    assert all(torch.equal(v, state[k]) for k, v in mine.state_dict().items())
    with pytest.raises(ValueError, match="0.weight has no shape yet"):
        ms.load(tmp_path / "net.pt", nn.Sequential(nn.LazyConv2d(4, 1), nn.BatchNorm2d(4)))


def test_a_network_that_is_not_its_recipe_any_more_says_so(tmp_path, caplog):
    model = ms.resnet(8, width=0.25)
    model.fc = nn.Sequential(nn.Dropout(), model.fc)
    ms.save(model, tmp_path / "net.pt")
    assert "does not fit ResNet" in caplog.text
    with pytest.raises(ValueError, match="mslib does not build"):
        ms.load(tmp_path / "net.pt")
    model = ms.resnet(8, width=0.25)
    model.fc = nn.Linear(16, 3)  # other classes are a width
    ms.save(model, tmp_path / "net.pt")
    assert ms.load(tmp_path / "net.pt")(X).shape == (2, 3)


@pytest.mark.parametrize(
    "name, value",
    [
        ("complex", torch.ones(2) * 1j),
        ("sparse", torch.ones(2).to_sparse()),
        ("on meta", torch.ones(2, device="meta")),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(name, value, tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("odd", value)
    with pytest.raises(ValueError, match="Linear cannot be saved: odd is a torch"):
        ms.save(model, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="weight is without a shape"):
        ms.save(nn.LazyLinear(2), tmp_path / "net.pt")
    assert not list(tmp_path.iterdir())


# ---- damaged and hostile networks ----

GOOD = {"network": "resnet", "depth": 8, "num_classes": 3, "width": 0.25, "in_channels": 3}
STATE = ms.resnet(8, 3, 0.25).state_dict()


def new(recipe=GOOD, groups=None, tied=None, form="mslib 2", state=STATE, **metadata):
    """The bytes of a file as `save` writes it, but for what is given."""
    about = {"format": form, "recipe": recipe, "groups": groups or {}, "tied": tied or {}}
    text = {k: json.dumps(v) for k, v in about.items()} | metadata
    state = {k: v.clone() for k, v in state.items()}
    return safetensors.torch.save(state, {k: v for k, v in text.items() if v is not None})


def old(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def header(text):
    return struct.pack("<Q", len(text)) + text


def archive(names, size):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in names:
            packed.writestr(name, bytes(size))
    return file.getvalue()


def flipped(content, tensor):
    """`content` with one bit of `tensor`, which it holds, turned over."""
    place = content.index(tensor.numpy().tobytes()) + 3
    return content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


class Code:
    def __reduce__(self):
        return (os.system, ("touch boom",))


WHOLE, OLD = new(), old({"recipe": GOOD, "state": STATE})
HUGE = b'{"conv.weight": {"dtype": "F32", "shape": [%d, 3, 3, 3], "data_offsets": [0, %d]}}'
BYTES = {
    "empty": b"",
    "one byte": b"\0",
    "random": torch.arange(5000).to(torch.uint8).numpy().tobytes(),
    "text": b"a network\n" * 100,
    "half": WHOLE[: len(WHOLE) // 2],
    "a byte short": WHOLE[:-1],
    "a byte more": WHOLE + b"\0",
    "only its header": WHOLE[: 8 + struct.unpack("<Q", WHOLE[:8])[0]],
    "old, half": OLD[: len(OLD) // 2],
    "old, damaged": OLD[:300] + bytes(200) + OLD[500:],
    "old, a bit of a weight": flipped(OLD, STATE["fc.weight"]),
    "a zip of nothing": archive([], 0),
    "a zip of other things": archive(["a.txt"], 10),
    "a zip bomb": archive(["archive/data.pkl", "archive/version"], 10**8),
    "a header of a petabyte": struct.pack("<Q", 10**15) + b"{}",
    "a header of ones": b"\xff" * 100,
    "a header that is a list": header(b"[]"),
    "a header that is no JSON": header(b"{,}"),
    "deep JSON": header(b"[" * 100_000),
    "a tensor of a petabyte": header(HUGE % (10**15 // 108, 10**15)),
    "a size beyond 64 bits": header(HUGE % (10**30, 10**32)),
    "a tensor without bytes": header(HUGE % (10**6, 0)),
    "a negative size": header(HUGE % (-4, 16)) + bytes(16),
    "code": pickle.dumps(Code()),
    "old, code": old({"recipe": GOOD, "state": Code()}),
    "old, a whole network": old(nn.Linear(2, 2)),
    "old, an int": old(3),
    "old, a list": old([STATE]),
    "old, only a state": old(STATE),
    "old, a state that is a list": old({"recipe": GOOD, "state": list(STATE.values())}),
    "old, no tensors": old({"recipe": GOOD, "state": dict.fromkeys(STATE, 1)}),
    "old, numbers as names": old({"recipe": GOOD, "state": dict(enumerate(STATE.values()))}),
    "old, no recipe": old({"state": STATE}),
    "old, a petabyte": old(
        {"recipe": GOOD, "state": STATE | {"fc.bias": torch.ones(1).expand(10**14)}}
    ),
    "old, memory asked for": old({"recipe": GOOD, "state": STATE, "more": bytearray(9)}),
    "old, sparse": old({"recipe": GOOD, "state": STATE | {"fc.bias": torch.ones(3).to_sparse()}}),
    "a plain state_dict": safetensors.torch.save(STATE),
    "another format": new(form="mslib 3"),
    "a format that is a list": new(form=[2]),
    "no format": new(format=None),
    "tied is a list": new(tied=[1]),
    "a long format": new(form="x" * 10**6),
    "a long name": new(state=STATE | {"x" * 10**6: torch.ones(1)}),
    "a long network": new(recipe={"network": "x" * 10**6}),
    "a recipe that is no JSON": WHOLE.replace(b'{\\"network\\"', b'[\\"network\\"', 1),
}
RECIPES = {
    "none": None,
    "a list": [GOOD],
    "a text": "resnet",
    "nothing in it": {},
    "an unknown network": GOOD | {"network": "os.system"},
    "a network that is a list": GOOD | {"network": ["resnet"]},
    "a dunder": GOOD | {"network": "__import__"},
    "no depth": {"network": "resnet", "depth": None},
    "depth as text": GOOD | {"depth": "8"},
    "a fraction of a depth": GOOD | {"depth": 8.5},
    "another depth": GOOD | {"depth": 14},
    "a depth without a network": GOOD | {"depth": 9},
    "an absurd depth": GOOD | {"depth": 6 * 10**9 + 2},
    "the deepest": GOOD | {"depth": 1202},
    "a negative depth": GOOD | {"depth": -4},
    "depth true": GOOD | {"depth": True},
    "nan": GOOD | {"depth": float("nan")},
    "infinite": GOOD | {"width": float("inf")},
    "width nan": GOOD | {"width": float("nan")},
    "an absurd width": GOOD | {"width": 1e9},
    "width zero": GOOD | {"width": 0},
    "width as text": GOOD | {"width": "1"},
    "absurdly many classes": GOOD | {"num_classes": 10**12},
    "classes as a list": GOOD | {"num_classes": [3]},
    "no classes": GOOD | {"num_classes": 0},
    "more channels of images": GOOD | {"in_channels": 4},
    "absurdly many channels": GOOD | {"in_channels": 10**9},
    "an unknown argument": GOOD | {"weights": "DEFAULT"},
    "an argument that is no name": GOOD | {"": 3},
    "another kind": {"network": "vgg", "depth": 11, "num_classes": 3},
    "torchvision, no name": {"network": "torchvision", "num_classes": 3},
    "torchvision, unknown": {"network": "torchvision", "name": "resnet19", "num_classes": 3},
    "torchvision, a list": {"network": "torchvision", "name": ["resnet18"], "num_classes": 3},
    "torchvision, weights": {
        "network": "torchvision",
        "name": "resnet18",
        "num_classes": 3,
        "weights": "DEFAULT",
    },
    "torchvision, a backbone": {"network": "torchvision", "name": "fcn_resnet50", "num_classes": 3},
    "torchvision, detection": {
        "network": "torchvision",
        "name": "fasterrcnn_resnet50_fpn",
        "num_classes": 3,
    },
    "torchvision, very large": {"network": "torchvision", "name": "vit_h_14", "num_classes": 10**6},
}
BYTES |= {f"recipe: {name}": new(recipe=recipe) for name, recipe in RECIPES.items()}
BYTES |= {
    f"groups: {groups!r}": new(groups=groups)
    for groups in ({"conv": 0}, {"conv": 3}, {"conv": -1}, {"conv": True}, {"conv": "2"}, [1])
}
BYTES |= {
    f"tied: {tied!r}": new(tied=tied)
    for tied in ({"fc.bias": "bn.bias"}, {"x": "y"}, {"x": 3}, {"x": "fc.bias"}, {"x": ["fc.bias"]})
}
FOUR, WIDE = torch.ones(4), torch.ones(5, 4, 3, 3)
STATES = {
    "a name missing": {k: v for k, v in STATE.items() if k != "fc.bias"},
    "a name too many": STATE | {"fc.more": FOUR},
    "none": {},
    "one BatchNorm narrow": STATE | {"stage1.0.bn1.weight": torch.ones(3)},
    "one convolution wide": STATE | {"stage1.0.conv1.weight": WIDE},
    "one axis less": STATE | {"conv.weight": torch.ones(4, 27)},
    "an empty axis": STATE | {"conv.weight": torch.ones(4, 0, 3, 3)},
    "another kernel": STATE | {"conv.weight": torch.ones(4, 3, 5, 5)},
    "whole numbers": STATE | {"conv.weight": torch.ones(4, 3, 3, 3, dtype=torch.long)},
    "a shortcut to nowhere": STATE | {"stage2.0.shortcut.source": torch.full((8,), 10**12)},
    "a negative shortcut": STATE | {"stage2.0.shortcut.source": torch.full((8,), -(10**12))},
    "a shortcut of fractions": STATE | {"stage2.0.shortcut.source": torch.zeros(8)},
    "a narrow shortcut": STATE | {"stage2.0.shortcut.source": torch.zeros(7, dtype=torch.long)},
    "a wide last layer": STATE | {"fc.weight": torch.ones(3, 17)},
}
BYTES |= {f"state: {name}": new(state=state) for name, state in STATES.items()}


@pytest.mark.parametrize("name", BYTES)
def test_damaged_and_hostile_networks(name, tmp_path, monkeypatch):
    """A ValueError that names the file; nothing is run, downloaded, or larger than the file."""

    def refuse(*_, **__):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.pt"
    path.write_bytes(BYTES[name])
    with bounded(), pytest.raises(ValueError, match="net.pt") as caught:
        ms.load(path)
    assert os.listdir() == ["net.pt"] and len(str(caught.value)) < 1000


def test_no_file_and_a_folder(tmp_path):
    for read in (ms.load, read_tensors, read_json):
        with pytest.raises(FileNotFoundError, match="net.pt"):
            read(tmp_path / "net.pt")
        with pytest.raises(ValueError, match="is a folder"):
            read(tmp_path)


@pytest.mark.parametrize(
    "value, named",
    [
        (
            {"model": {"w": X}, "penalty": {"k": np.float64(1)}},
            r"\['penalty'\]\['k'\] is a float64",
        ),
        ([1, (2, lambda: 3)], r"\[1\]\[1\] is a function"),
        ({np.str_("a"): 1}, "is a dict"),
        (Code(), "is a Code"),
    ],
)
def test_what_could_not_be_read_is_not_written(value, named, tmp_path):
    with pytest.raises(ValueError, match=f"a.pt{named}|a.pt {named}"):
        write_tensors(tmp_path / "a.pt", value)
    assert not list(tmp_path.iterdir())


# ---- whole or absent ----


def test_json_of_another_shape_is_named(tmp_path):
    path = tmp_path / "settings.json"
    write_json(path, {"lr": 0.1, "näm": [1]})
    assert read_json(path) == {"lr": 0.1, "näm": [1]}
    for content in (b"", b"[1]", b"null", b'{"a": ', b"\xff\xfe", b"[" * 10**6, b"9" * 10**5):
        path.write_bytes(content)
        with bounded(), pytest.raises(ValueError, match="settings.json is damaged") as caught:
            read_json(path)
        assert "give another folder, or remove this one as a whole" in str(caught.value)
    path.write_text("[1]")
    assert read_json(path, list) == [1]
    with open(path, "wb") as file:
        file.truncate(2**31)  # a file of zeros that takes no place on the disk
    with bounded(), pytest.raises(ValueError, match="larger than 64 MiB"):
        read_json(path)


def test_every_error_has_a_reason():
    assert reason(ValueError("one\ntwo")) == "one"
    assert reason(AssertionError()) == "AssertionError" and reason(OSError("\n")) == "OSError"


WRITERS = {
    "json": lambda path: write_json(path, {"a": "x" * 10**6}),
    "tensors": lambda path: write_tensors(path, torch.zeros(10**6)),
    "network": lambda path: ms.save(ms.resnet(8), path),
    "masks": lambda path: ms.save_masks({"a": torch.ones(10**6, dtype=torch.bool)}, path),
    "pt2": lambda path: ms.export(ms.resnet(8), path.with_suffix(".pt2"), X),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(name, tmp_path):
    """Simulated by the largest size that a file may have, as the system itself then refuses."""
    path = tmp_path / ("net.pt2" if name == "pt2" else "net.pt")
    path.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"cannot write {path}.*; choose a folder"):
            WRITERS[name](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_errors_keep_their_number_and_say_what_to_try(tmp_path):
    import errno

    with pytest.raises(OSError, match="free some space") as caught, replacing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="cannot write .*/a .OSError."), replacing(tmp_path / "a"):
        raise OSError
    with pytest.raises(FileNotFoundError, match="other"), replacing(tmp_path / "a"):
        open(tmp_path / "other")  # what is read meanwhile is not what cannot be written
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*/file/a"), replacing(tmp_path / "file/a"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="a folder has that name"):
        write_json(tmp_path / "folder", 1)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder"}


def test_the_clean_up_does_not_hide_the_message(tmp_path, monkeypatch):
    """As on a disk that has become read-only: nothing can be removed either."""
    import shutil

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    monkeypatch.setattr(os, "unlink", read_only)
    monkeypatch.setattr(shutil.os, "rmdir", read_only)
    with pytest.raises(OSError, match="cannot write .*/a .Read-only file system.; choose a folder"):
        write_json(tmp_path / "a", 1)
    with pytest.raises(KeyError), replacing(tmp_path / "b") as beside:
        (beside / "inner").mkdir(parents=True)
        raise KeyError


def test_what_a_killed_process_of_the_same_number_left_is_not_taken_over(tmp_path):
    left = tmp_path / f".folder.{os.getpid()}.part"
    (left / "inner").mkdir(parents=True)
    (left / "old").write_text("old")
    with replacing(tmp_path / "folder") as beside:
        assert beside == left and not beside.exists()
        beside.mkdir()
        (beside / "new").write_text("new")
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "new"]


def test_content_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    seen = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (seen.append(os.fstat(f).st_ino), sync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("renamed"), rename(a, b)))
    with replacing(tmp_path / "folder") as beside:
        beside.mkdir()
        (beside / "a").write_text("a")
    inode = (tmp_path / "folder/a").stat().st_ino
    assert seen == [inode, "renamed", tmp_path.stat().st_ino]
    write_json(tmp_path / "b", 1)
    assert seen[3:] == [(tmp_path / "b").stat().st_ino, "renamed", tmp_path.stat().st_ino]
