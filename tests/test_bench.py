"""The benchmark runs and writes its table. What it says of speed is for a quiet machine."""

import json

import pytest
import torch

import mslib as ms
from tools import bench as benches
from tools.bench import _compiles, bench, captured, matmul_rate, numbers_moved, surgery


class Second:
    """A timer for which everything takes a second."""

    median = 1.0

    def __init__(self, *_, **__):
        pass

    def blocked_autorange(self, **_):
        return self


def test_the_table(tmp_path, monkeypatch):
    lines, compiled = [], []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    monkeypatch.setattr(benches, "matmul_rate", {"fp32": 4e12}.get)
    monkeypatch.setattr(benches, "this_precision", lambda: "fp32")
    monkeypatch.setattr(benches, "BATCH", 16)
    path, tiny = tmp_path / "bench.json", {"depth": 8, "images": 40, "seconds": 0.01, "size": 32}
    table = bench(path, rounds=1, say=lines.append, **tiny)
    written = json.loads(path.read_text())
    assert written["rows"] == table.to_dict("records")
    assert {"hardware", "threads", "torch", "date"} <= written.keys()
    assert len(table) == len(lines) == 1 + 2 + 3 + 8 + 1
    assert (table[["ours", "theirs", "ratio"]] > 0).all(axis=None)
    promise = table[table.what.str.startswith("pruned")].theirs
    assert ((promise > 1.99) & (promise < 2.5)).all()  # half of the MACs gone
    # whether it works, one training, and both networks of each row of speed-ups
    assert len(compiled) == 1 + 1 + 2 * 8
    less_is_better = table[table.unit == "s"]
    assert len(less_is_better) == 2
    assert (less_is_better.ratio == less_is_better.theirs / less_is_better.ours).all()

    shares = table[table.what.str.startswith("share")].set_index("what")
    macs = ms.cost(ms.resnet(8), torch.zeros(1, 3, 32, 32)).macs
    plain = "training ResNet-8, as it is, batch 16"
    speed = table.set_index("what").ours[plain]  # images a second
    as_it_is = shares.loc[f"share of the machine: {plain}"]
    assert as_it_is.ours == pytest.approx(6 * macs * speed / 1e9)
    assert (as_it_is.theirs, as_it_is.theirs_is) == (4000, "torch.mm, fp32")
    assert as_it_is.ratio == as_it_is.ours / as_it_is.theirs


def test_without_a_compiler_the_rows_that_need_it_are_left_out(monkeypatch, caplog):
    def broken(*_, **__):
        raise OSError  # without a text, as some have none

    monkeypatch.setattr(torch, "compile", broken)
    assert not _compiles()
    assert "torch.compile does not work here, its rows are left out: OSError" in caplog.text


def test_without_torch_pruning_its_row_is_left_out(monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    assert list(surgery(1, 32)) == []
    assert "torch-pruning is not installed" in caplog.text


def test_a_multiplication_of_matrices_takes_two_operations_a_product(monkeypatch):
    assert matmul_rate("fp32", side=32, seconds=0.001) > 0
    assert matmul_rate("bf16", side=32, seconds=0.001) > 0
    monkeypatch.setattr(benches, "Timer", Second)
    assert matmul_rate("fp32", side=32) == 2 * 32**3


def test_the_bound_is_the_time_to_move_what_the_convolutions_read_and_write(monkeypatch):
    """What a GPU is measured by, here on the CPU, as if it copied 2²⁸ bytes in a second."""
    # numbers in a feature map of each stage
    one, two, three = 16 * 32 * 32, 32 * 16 * 16, 64 * 8 * 8
    read = 3 * 32 * 32 + 2 * one + (one + two) + (two + three)
    written = 3 * one + 2 * two + 2 * three
    assert numbers_moved(ms.resnet(8), torch.zeros(2, 3, 32, 32)) == 3 * read + 2 * written
    monkeypatch.setattr(benches, "Timer", Second)
    monkeypatch.setattr(benches, "this_precision", lambda: "fp32")
    (row,) = captured(8, images=256, capture=False)
    assert row["unit"] == "s" and row["ours"] > 0
    assert row["ratio"] == row["theirs"] / row["ours"]
    assert row["theirs"] == 256 * 4 * (3 * read + 2 * written) / 2**29
