"""The benchmark runs and writes its table; what it says of speed is for a quiet machine, not for a test."""

import json

import torch

from tools.bench import _compiles, bench, captured


def test_the_table(tmp_path, monkeypatch):
    lines, compiled = [], []
    monkeypatch.setattr(
        torch, "compile", lambda model, **_: compiled.append(model) or model
    )  # test_cost and test_train compile
    table = bench(
        tmp_path / "bench.json",
        depth=8,
        images=160,
        rounds=1,
        seconds=0.02,
        size=32,
        say=lines.append,
    )
    written = json.loads((tmp_path / "bench.json").read_text())
    assert (
        written["rows"] == table.to_dict("records")
        and {"hardware", "threads", "torch", "date"} <= written.keys()
    )
    assert len(table) == len(lines) == 11 and (table[["ours", "theirs", "ratio"]] > 0).all(
        axis=None
    )
    promise = table[table.what.str.contains("channels")].theirs
    assert ((promise > 1.99) & (promise < 2.5)).all()  # half of the MACs gone
    assert (
        len(compiled) == 1 + 1 + 2 * 8
    )  # whether it works, one training, and both networks of each row of speed-ups
    pruning = table[table.what.str.startswith("pruning")].iloc[0]
    assert pruning.ratio == pruning.theirs / pruning.ours  # less is better


def test_without_a_compiler_the_rows_that_need_it_are_left_out(monkeypatch, caplog):
    monkeypatch.setattr(
        torch,
        "compile",
        lambda *_, **__: lambda x: (_ for _ in ()).throw(OSError("no C++ compiler")),
    )
    assert (
        not _compiles()
        and "torch.compile does not work here, its rows are left out: no C++ compiler"
        in caplog.text
    )


def test_the_bound_is_the_time_to_move_what_the_convolutions_read_and_write(monkeypatch):
    """What a GPU is measured by, here on the processor; as if it copied 2²⁸ bytes in a second, reading and writing them."""

    class Second:
        def __init__(self, *_, **__):
            pass

        def blocked_autorange(self, **_):
            return self

        median = 1.0

    monkeypatch.setattr("tools.bench.Timer", Second)
    monkeypatch.setattr("tools.bench.pick_precision", lambda *_: "fp32")
    (row,) = captured(8, images=256, capture=False)
    assert row["unit"] == "s" and row["ours"] > 0 and row["ratio"] == row["theirs"] / row["ours"]
    one, two, three = (
        16 * 32 * 32,
        32 * 16 * 16,
        64 * 8 * 8,
    )  # numbers in a feature map of each stage
    read, written = (
        3 * 32 * 32 + 2 * one + (one + two) + (two + three),
        3 * one + 2 * two + 2 * three,
    )
    assert row["theirs"] == 256 * 4 * (3 * read + 2 * written) / 2**29
