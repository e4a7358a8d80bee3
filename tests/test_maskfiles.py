"""Masks in files: ours, those of others, and those that are refused."""

import io
import json
import math
import pickle
import zipfile

import pytest
import torch

import mslib as ms
from mslib.files import write_tensors

from .bounds import bounded
from .conftest import lively

X = torch.zeros(1, 3, 8, 8)
KEEP = {"stage1.0.bn1": torch.arange(16) % 3 > 0, "stage2.0.bn1": torch.arange(32) > 4}


@pytest.fixture(scope="module")
def graph():
    return ms.ChannelGraph(lively(ms.resnet(8)), X)


def test_masks_come_back_from_a_file(tmp_path):
    ms.save_masks(KEEP, tmp_path / "masks.pt")
    again = ms.load_masks(tmp_path / "masks.pt")
    assert KEEP.keys() == again.keys() and all(torch.equal(KEEP[n], again[n]) for n in KEEP)
    shared = {"a": torch.ones(1, dtype=torch.bool).expand(4)}
    ms.save_masks(shared, tmp_path / "masks.pt")
    assert ms.load_masks(tmp_path / "masks.pt")["a"].tolist() == [True] * 4


@pytest.mark.parametrize("masks", [None, [KEEP], {"bn": [True]}, {3: KEEP["stage1.0.bn1"]}])
def test_only_masks_are_saved(masks, tmp_path):
    with pytest.raises(ValueError, match="the masks"):
        ms.save_masks(masks, tmp_path / "masks.pt")
    assert not list(tmp_path.iterdir())


def test_masks_of_others(graph, tmp_path, caplog):
    """Keep or drop, by BatchNorm or convolution, bools, zeros and ones or indices: all one mask."""
    conv = {name.replace("bn", "conv"): m for name, m in KEEP.items()}
    floats = {f"module.{n}.weight": m.float()[None, :, None, None] for n, m in KEEP.items()}
    forms = {
        "bools.pt": (KEEP, "keep"),
        "drop.pt": ({n: ~m for n, m in conv.items()}, "drop"),
        "floats.pt": (floats, "keep"),
        "indices.pt": ({n: m.nonzero().flatten() for n, m in conv.items()}, "keep"),
        "lists.json": ({n: m.tolist() for n, m in conv.items()}, "keep"),
        "drop.json": ({n: (~m).nonzero().flatten().tolist() for n, m in KEEP.items()}, "drop"),
        "ones.json": ({n: m.int().tolist() for n, m in KEEP.items()}, "keep"),
    }
    for file, (content, means) in forms.items():
        if file.endswith("pt"):
            torch.save(content, tmp_path / file)
        else:
            (tmp_path / file).write_text(json.dumps(content))
        found = ms.load_masks(tmp_path / file, graph, means=means)
        assert found.keys() == KEEP.keys(), file
        assert all(torch.equal(found[n], KEEP[n]) for n in KEEP), file
    assert not caplog.text
    (tmp_path / "shared.json").write_text(json.dumps({"stage1.0.bn2": list(range(12))}))
    ms.load_masks(tmp_path / "shared.json", graph)
    assert "stage1.0.bn2: 4 of 4 dropped channels stay" in caplog.text


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (self.path.touch, ())


def bn1(value):
    return {"stage1.0.bn1": value}


WRONG = {  # content of a .json file, and what the message says
    "an unknown layer": ({"stage1.0.bn4": [0]}, "no BatchNorm of the network.*did you mean"),
    "too short": (bn1([True] * 15), "is for 15 channels; the layer has 16"),
    "too long": (bn1([True] * 17), "is for 17 channels; the layer has 16"),
    "an index too large": (bn1([3, 16]), "lists channel 16; the layer has 0 to 15"),
    "a negative index": (bn1([-1]), "lists channel -1"),
    "fractions": (bn1([0.3] * 16), "holds 0.3…; expected a bool"),
    "whole numbers as floats": (bn1([1.0, 2.0]), "holds 1…; expected a bool"),
    "nan": (bn1([math.nan] * 16), "holds nan"),
    "infinity": (bn1([math.inf]), "holds inf"),
    "text": (bn1("all"), "is 'all'; expected a bool"),
    "a number": (bn1(3), "is 3; expected a bool"),
    "one bool": (bn1(True), "is True; expected a bool"),
    "null": (bn1(None), "is None; expected a bool"),
    "a dict": (bn1({"0": True}), "expected a bool"),
    "texts": (bn1(["0", "1"]), "expected a bool"),
    "nulls": (bn1([None] * 16), "expected a bool"),
    "nested": (bn1([[True] * 16]), "expected a bool"),
    "ragged": (bn1([[True], [True, False]]), "expected a bool"),
    "bools and numbers": (bn1([True] * 15 + [1]), "mixes bools and numbers"),
    "beyond 64 bits": (bn1([10**30]), "expected a bool"),
    "none kept": (bn1([]), "keeps no channel"),
    "all dropped": (bn1([False] * 16), "keeps no channel"),
    "twice": ({"stage1.0.bn1": [0], "stage1.0.conv1": [1]}, "says another thing"),
    "an empty name": ({"": [0]}, "no BatchNorm"),
    "a name as a path": ({"../../etc": [0]}, "no BatchNorm"),
    "a long name": ({"x" * 10**6: [0]}, "no BatchNorm"),
    "a list": ([1, 2], "holds a list; expected a dict"),
    "a text": ("masks", "holds a str"),
    "only null": (None, "holds a NoneType"),
}


@pytest.mark.parametrize("name", WRONG)
def test_json_masks_that_do_not_fit(name, graph, tmp_path):
    content, message = WRONG[name]
    path = tmp_path / "masks.json"
    path.write_text(json.dumps(content))
    refused(path, graph, message)


def packed(name, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def saved(value, legacy=False):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


BYTES = {  # suffix, bytes
    "empty": (".pt", b""),
    "empty json": (".json", b""),
    "random": (".pt", torch.arange(4096).to(torch.uint8).numpy().tobytes()),
    "random json": (".json", bytes(range(256))),
    "half": (".pt", saved(KEEP)[:700]),
    "half json": (".json", b'{"stage1.0.bn1": [true, '),
    "deep json": (".json", b"[" * 10**6),
    "a long number": (".json", b'{"stage1.0.bn1": [' + b"9" * 10**5 + b"]}"),
    "code": (".pt", pickle.dumps(print)),
    "a module": (".pt", saved(torch.nn.Linear(2, 2))),
    "a list": (".pt", saved([KEEP])),
    "a tensor": (".pt", saved(torch.ones(16))),
    "numbers as names": (".pt", saved({1: torch.ones(16, dtype=torch.bool)})),
    "nothing": (".pt", saved(bn1(None))),
    "complex": (".pt", saved(bn1(torch.ones(16) * 1j))),
    "sparse": (".pt", saved(bn1(torch.ones(16).to_sparse()))),
    "claims a petabyte": (".pt", saved(bn1(torch.ones(1).expand(10**6, 10**9)))),
    "claims a petabyte of bools": (".pt", saved(bn1(torch.ones(1, dtype=bool).expand(10**15)))),
    "a bomb": (".pt", packed("archive/data.pkl", bytes(10**8))),
    "asks for memory": (".pt", saved(bn1(bytearray(100)))),
    "of a tensor subclass": (".pt", saved(bn1(torch.nn.Parameter(torch.full((16,), 0.5))))),
    "the old format": (".pt", saved(KEEP, legacy=True)),
    "a network": (".pt", saved(torch.nn.Linear(2, 2).state_dict())),
}


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("with_network", [False, True])
def test_damaged_and_hostile_masks(name, with_network, graph, tmp_path):
    suffix, content = BYTES[name]
    path = tmp_path / f"masks{suffix}"
    path.write_bytes(content)
    refused(path, graph if with_network else None, "masks")


def refused(path, graph, message):
    with bounded(), pytest.raises(ValueError, match=message) as caught:
        ms.load_masks(path, graph)
    assert path.name in str(caught.value) or "stage" in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_code_in_masks_is_not_run(graph, tmp_path):
    (tmp_path / "masks.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    refused(tmp_path / "masks.pt", graph, "cannot be read")
    torch.save(bn1(Bomb(tmp_path / "boom")), tmp_path / "masks.pt")
    refused(tmp_path / "masks.pt", graph, "cannot be read")
    assert not (tmp_path / "boom").exists()


def test_no_file_a_folder_and_other_means(graph, tmp_path):
    for name in ("masks.pt", "masks.json"):
        with pytest.raises(FileNotFoundError, match="masks"):
            ms.load_masks(tmp_path / name, graph)
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match="is a folder"):
            ms.load_masks(tmp_path / name, graph)
    with pytest.raises(ValueError, match="means='prune': what the masks list"):
        ms.load_masks(tmp_path / "masks.pt", graph, means="prune")


def test_what_may_be_a_mask_or_indices_is_refused(tmp_path):
    """[0, 1] for two channels: keep the second, or both?"""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU(), torch.nn.Conv2d(2, 3, 3)
    )
    graph = ms.ChannelGraph(model, X)
    write_tensors(tmp_path / "masks.pt", {"1": torch.tensor([0, 1])})
    with pytest.raises(ValueError, match="may be a mask or indices; write true and false"):
        ms.load_masks(tmp_path / "masks.pt", graph)
    for clear in ([0.0, 1.0], [False, True], [1]):
        write_tensors(tmp_path / "masks.pt", {"1": torch.tensor(clear)})
        assert ms.load_masks(tmp_path / "masks.pt", graph)["1"].tolist() == [False, True]
