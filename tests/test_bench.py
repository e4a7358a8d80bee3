"""The benchmark runs and writes its table; what it says of speed is for a quiet machine, not for a test."""

import json

from mslib.bench import bench, captured


def test_the_table(tmp_path):
    lines = []
    table = bench(tmp_path / "bench.json", depth=8, images=160, rounds=1, seconds=0.02, size=64, say=lines.append)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["rows"] == table.to_dict("records") and {"hardware", "threads", "torch", "date"} <= written.keys()
    assert len(table) == len(lines) == 8 and (table[["ours", "theirs", "ratio"]] > 0).all(axis=None)
    promise = table[table.what.str.startswith("speed-up")].theirs
    assert ((promise > 1.99) & (promise < 2.5)).all()  # half of the MACs gone
    pruning = table[table.what.str.startswith("pruning")].iloc[0]
    assert pruning.ratio == pruning.theirs / pruning.ours  # less is better


def test_an_epoch_takes_longer_than_moving_its_data():
    (row,) = captured(8, images=256, capture=False)  # what a GPU is measured by, here on the processor
    assert row["unit"] == "s" and 0 < row["theirs"] < row["ours"] and row["ratio"] == row["theirs"] / row["ours"]
