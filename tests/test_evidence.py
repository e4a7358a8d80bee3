"""The protocol of the recovery curves, on drawn images and a small network."""

import pandas as pd
import pytest
import yaml

import mslib as ms
from mslib.files import ROOT
from tools import evidence

PROTOCOL = ROOT / "data" / "reference" / "recovery-cifar10.yml"


def test_every_point_is_measured_once_and_a_second_start_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "METHODS", ("one-shot", "masked-global", "global"))
    monkeypatch.setattr(evidence, "RELATIVES", ())
    monkeypatch.setattr(evidence, "DEEPER", ("one-shot",))
    data = ms.load_data("shapes", image_size=8, sizes=(120, 60))
    monkeypatch.setattr(ms, "load_data", lambda name: data)
    file = tmp_path / "recovery.yml"
    small = dict(depth=14, seed=[0], reduction=[0.8], epochs=1, prepare=1, repairs=[1, 2])
    file.write_text(yaml.safe_dump(yaml.safe_load(PROTOCOL.read_text()) | small))
    words = [str(file), "--runs", str(tmp_path / "runs")]
    evidence.main([*words, "--methods", "global"])
    assert set(pd.read_csv(tmp_path / "recovery.csv").method) == {"global"}
    evidence.main(words)
    table = pd.read_csv(tmp_path / "recovery.csv", dtype={"station": str})
    whole = table[(table.images == 1) & ~table.taught].groupby("method").station.agg(list)
    curve = ["before", "cut", "folded", "1", "2"]
    assert whole["global"] == whole["masked-global"] == curve
    assert whole["one-shot"] == [*curve, "3"]  # the epochs that others prepare in, too
    assert whole["dense"] == ["0", "3"] and whole["scratch"] == ["4"]
    assert len(table[table.images < 1]) == 2 and len(table[table.taught]) == 2
    assert not table.duplicated(evidence.KEY).any()
    before = table[table.station == "before"].set_index("method")
    assert before.dropped_open["one-shot"] == before.dropped["one-shot"] > 0  # no γ was penalized
    assert (before.dropped_open <= before.dropped).all() and table.dropped.count() == len(before)
    after = table[~table.station.isin(["before", "0"]) & (table.method != "dense")]
    dense = table[table.method == "dense"].macs.iloc[0]
    assert (after.macs <= 0.2 * dense).all() and (after.macs > 0.1 * dense).all()

    def fails(*args, **kwargs):
        raise AssertionError("a training that is not needed")

    monkeypatch.setattr(ms, "fit", fails)
    evidence.main(words)  # all rows are there
    assert len(pd.read_csv(tmp_path / "recovery.csv")) == len(table)
    one = (table.station == "1") & (table.method == "one-shot")
    rows = table[~one]
    rows.to_csv(tmp_path / "recovery.csv", index=False)
    monkeypatch.undo()
    monkeypatch.setattr(evidence, "METHODS", ("one-shot",))
    monkeypatch.setattr(evidence, "RELATIVES", ())
    monkeypatch.setattr(evidence, "DEEPER", ())
    monkeypatch.setattr(ms, "load_data", lambda name: data)
    evidence.main(words)  # finished trainings are loaded, the row is measured anew
    again = pd.read_csv(tmp_path / "recovery.csv", dtype={"station": str})
    keys = [*evidence.KEY, "held_out", "test"]
    found, wanted = (rows[keys].sort_values(keys, ignore_index=True) for rows in (again, table))
    pd.testing.assert_frame_equal(found, wanted)


def test_relatives_are_measured_with_the_others(tmp_path, monkeypatch):
    data = ms.load_data("shapes", image_size=8, sizes=(120, 60))
    monkeypatch.setattr(ms, "load_data", lambda name: data)
    file = tmp_path / "recovery.yml"
    small = dict(depth=14, seed=[0], reduction=[0.8], epochs=1, prepare=2, repairs=[1])
    file.write_text(yaml.safe_dump(yaml.safe_load(PROTOCOL.read_text()) | small))
    words = [str(file), "--runs", str(tmp_path / "runs")]
    evidence.main([*words, "--methods", *evidence.RELATIVES])
    table = pd.read_csv(tmp_path / "recovery.csv", dtype={"station": str})
    curves = table.groupby("method").station.agg(list)
    assert curves.to_dict() == dict.fromkeys(evidence.RELATIVES, ["before", "cut", "folded", "1"])
    assert table[table.station == "folded"].macs.nunique() == 1  # the same share of every layer
    for method in evidence.RELATIVES:
        penalty = next((tmp_path / "runs").glob(f"*/0.8/{method}/penalty.pt"))
        assert penalty.is_file()


@pytest.fixture
def measured(tmp_path):
    """A protocol whose table has a row."""
    file = tmp_path / "recovery.yml"
    file.write_text(PROTOCOL.read_text())
    pd.read_csv(PROTOCOL.with_suffix(".csv"))[:1].to_csv(file.with_suffix(".csv"), index=False)
    return file


def read(file, *words):
    return evidence.read_protocol([str(file), *words], "about", evidence.EVERY)[1]


@pytest.mark.parametrize(
    "words, message",
    [
        (["-p", "lr", "5"], "-p lr 5: {csv} was measured with 0.1; copy the YAML file under"),
        (["-p", "masked_push", "6"], "-p masked_push 6: {csv} was measured with 24.0"),
        (["-p", "seed", "0", "7"], "-p seed 7: {csv} was measured with [0, 1, 2]"),
        (["-p", "seed", "010"], "-p seed 010: {csv} was measured with [0, 1, 2]"),
        (["-p", "lr", "0.1", "0.2"], "-p lr: expected one value"),
        (["-p", "seed", "0", "-p", "seed", "1"], "-p seed is given twice, 0 and 1"),
        (["-p", "seed"], "-p seed: expected one or more values"),
        (["-p", "sed", "1"], "-p sed: {yml} has no such setting"),
    ],
)
def test_a_table_is_of_one_protocol(measured, capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        read(measured, *words)
    said = message.format(csv=measured.with_suffix(".csv"), yml=measured)
    assert said in capsys.readouterr().err


def test_what_is_listed_can_be_chosen_and_without_rows_all_can_be_changed(measured):
    s = read(measured, "-p", "seed", "2", "0", "-p", "reduction", ".8", "-p", "masked_push", "24")
    assert (s["seed"], s["reduction"], s["masked_push"]) == ([0, 2], [0.8], 24)
    pd.read_csv(measured.with_suffix(".csv"))[:0].to_csv(measured.with_suffix(".csv"), index=False)
    s = read(measured, "-p", "lr", "5", "-p", "seed", "7", "0")
    assert (s["lr"], s["seed"]) == (5, [7, 0])


def test_a_table_is_of_one_data_set(measured, monkeypatch):
    data = ms.load_data("shapes", image_size=8, sizes=(120, 60))
    monkeypatch.setattr(ms, "load_data", lambda name: data)
    before = measured.with_suffix(".csv").read_text()
    message = "recovery.csv holds measurements on cifar10-jpeg.tar.gz, and this dataset is shapes"
    with pytest.raises(ValueError, match=message):
        evidence.main([str(measured), "--runs", str(measured.parent / "runs")])
    assert measured.with_suffix(".csv").read_text() == before


@pytest.mark.parametrize(
    "yml, csv, message",
    [
        ("seed: [0]\nseed: [1]", None, "'seed' is given twice"),
        ("- 1", None, "expected lines such as"),
        ("seed: [0]", "", "recovery.csv cannot be read as a table"),
    ],
)
def test_a_damaged_protocol_or_table_is_named(tmp_path, capsys, yml, csv, message):
    file = tmp_path / "recovery.yml"
    file.write_text(yml)
    if csv is not None:
        file.with_suffix(".csv").write_text(csv)
    with pytest.raises(SystemExit, match="2"):
        read(file)
    assert message in capsys.readouterr().err
    file.with_suffix(".csv").write_text("seed,test\n0,1\n")
    with pytest.raises(ValueError, match="recovery.csv lacks the columns depth, reduction"):
        evidence.Table(file.with_suffix(".csv"), evidence.KEY)
