"""The measured results that come with the course: complete, and what their own weights say.

`python -m tests.test_reference` writes what the stored networks say of every 25th test image of
CIFAR-10 (JPEG copy), after it has seen that they reach the reported top-1 on all of them.
"""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

import mslib as ms
from mslib.course.results import tables
from mslib.course.sweeps import grid
from mslib.data.tensors import Split, batches
from tools import evidence, tradeoff

from .conftest import EVERY, SHARED, WHOLE_CIFAR

REFERENCE = tables() / "reference"
PREDICTED = Path(__file__).parent / "predictions.json"

METRICS = sorted(REFERENCE.glob("*/*/metrics.json"))
WEIGHTS = {
    "baseline": "baseline",
    "pruned": "masked: after the cut, folded",
    "final": "masked: fine-tuned",
}


def stages():
    return [
        pytest.param(
            m.parent.parent.name, m.parent.name, id=f"{m.parent.parent.name}/{m.parent.name}"
        )
        for m in METRICS
    ]


@pytest.mark.parametrize("name, lesson", stages())
def test_a_reference_says_how_it_was_measured(name, lesson):
    metrics = json.loads((REFERENCE / name / lesson / "metrics.json").read_text())
    assert {"torch", "python", "hardware", "threads", "date", "settings"} <= metrics.keys()
    assert (
        lesson.startswith("00")
        or metrics["settings"]["seed"] >= 0
        and metrics["settings"]["dataset"]
    )
    stage = ms.reference(name)[lesson]
    assert (stage / f"{lesson}.ipynb").exists()
    for history in stage.path.glob("*/history.json"):
        settings = json.loads((history.parent / "settings.json").read_text())
        assert len(stage.history(history.parent.name)) == settings["epochs"]
        if (history.parent / "gammas.pt").exists():
            assert len(stage.gammas(history.parent.name)) == settings["epochs"] + 1


def with_weights():
    """(network as in PREDICTED, stage, key of its weights) of every network that is stored."""
    for metrics in METRICS:
        name, lesson = metrics.parent.parent.name, metrics.parent.name
        stage = ms.reference(name)[lesson]
        for key in WEIGHTS:
            if (stage / f"{key}.pt").exists() or (stage / key / "model.pt").exists():
                yield f"{name}/{lesson}/{key}", stage, key


def reported(stage, key):
    return stage.rows.set_index("name").loc[WEIGHTS[key]]


@torch.no_grad()
def predictions(model, split):
    """A digit for each image: the class that the network says."""
    model.eval()
    said = [model(x).argmax(1) for x, _ in batches(split, 200)]
    return "".join(map(str, torch.cat(said).tolist()))


STORED = [pytest.param(stage, key, path, id=path) for path, stage, key in with_weights()]


@pytest.mark.parametrize("stage, key, path", STORED)
def test_stored_weights_cost_what_is_reported(stage, key, path):
    row, price = reported(stage, key), ms.cost(stage.model(key), torch.zeros(1, 3, 32, 32))
    assert (price.macs, price.params) == (row.macs, row.params)


@pytest.mark.parametrize("stage, key, path", STORED)
def test_stored_weights_say_what_they_said_of_real_test_images(
    stage, key, path, few_cifar, monkeypatch, tmp_path
):
    """Of every 25th: those answers are kept, beside the top-1 on all that they were part of."""
    monkeypatch.setattr("mslib.data.sources.data_folder", lambda: tmp_path)
    test, kept = ms.load_data(few_cifar).test, json.loads(PREDICTED.read_text())[path]
    found, labels = predictions(stage.model(key), test), test.labels.tolist()
    same = sum(a == b for a, b in zip(found, kept, strict=True))
    assert same >= 0.99 * len(kept)  # a rounding may turn over what was on the edge
    share = reported(stage, key).top1 / 100
    right = sum(int(a) == label for a, label in zip(kept, labels)) / len(kept)
    assert abs(right - share) < 4 * (share * (1 - share) / len(kept)) ** 0.5


@pytest.mark.parametrize("stage, key, path", STORED)
def test_stored_weights_reach_the_reported_top1_on_all_real_test_images(stage, key, path, cifar):
    if not WHOLE_CIFAR:
        pytest.skip("10,000 images: with MSLIB_WHOLE_CIFAR=1")
    found = ms.evaluate(stage.model(key), ms.load_data(cifar).test)
    assert found == pytest.approx(reported(stage, key).top1, abs=0.05)


METHODS = [  # sweeps of lesson 08; that of lesson 10 is tested with it
    path
    for path in sorted(REFERENCE.glob("*.yml"))
    if yaml.safe_load(path.read_text()).get("lesson") == "08"
]


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_a_comparison_is_whole_fair_and_made_as_its_file_says(path):
    wanted, table = yaml.safe_load(path.read_text()), pd.read_csv(path.with_suffix(".csv"))
    swept = [key for key, value in wanted.items() if isinstance(value, list)]
    points = sorted(tuple(point.values()) for point in grid({key: wanted[key] for key in swept}))
    assert sorted(table[swept].itertuples(index=False, name=None)) == points
    for key in (wanted.keys() & set(table)) - {*swept, "epochs"}:
        assert (table[key] == wanted[key]).all(), key
    cfg = ms.config(
        wanted["preset"],
        **{k: v for k, v in wanted.items() if k not in (*swept, "lesson", "preset")},
    )
    assert (table.epochs == cfg.epochs + cfg.sparse_epochs + cfg.finetune_epochs).all()
    side = cfg.image_size or 32
    left = table.macs / ms.cost(ms.resnet(cfg.depth), torch.zeros(1, 3, side, side)).macs
    assert left.between(0.98 - table.reduction, 1 - table.reduction).all()
    tested = cfg.test_size if cfg.dataset == "shapes" else 10_000
    for column, images in {
        "top1": tested,
        "final": (cfg.train_size if cfg.dataset == "shapes" else 50_000) * cfg.val,
    }.items():
        right = table[column] * images / 100
        assert (right - right.round()).abs().max() < 1e-6, "a share of whole images"
    assert table.hardware.nunique() == table.torch.nunique() == 1


@pytest.mark.parametrize("protocol", [evidence, tradeoff], ids=["recovery", "tradeoff"])
def test_each_table_of_evidence_is_of_one_protocol(protocol):
    name = {evidence: "recovery-cifar10", tradeoff: "tradeoff-cifar10"}[protocol]
    table = pd.read_csv(REFERENCE / f"{name}.csv", dtype={"station": str})
    s = yaml.safe_load((REFERENCE / f"{name}.yml").read_text())
    assert not table.duplicated(protocol.KEY).any()
    methods = evidence.EVERY if protocol is evidence else tradeoff.METHODS
    assert set(table.method) <= set(methods) and set(table.depth) == {s["depth"]}
    assert set(table.seed) <= {*s["seed"]} and set(table.reduction) <= {*s["reduction"]}
    dense = ms.cost(ms.resnet(s["depth"]), torch.zeros(1, 3, 32, 32)).macs
    whole = table.station.isin(["before", "0"]) | (table.method == "dense")
    assert (table.macs[whole] == dense).all()
    left = (table.macs / dense)[~whole]
    assert left.between(0.97 - table.reduction[~whole], 1 - table.reduction[~whole]).all()
    for column, images in {"test": 10_000, "held_out": 5_000}.items():
        for name in (column, f"{column}_recalibrated"):
            right = table[name] * images / 100
            assert (right - right.round()).abs().max() < 1e-6, "a share of whole images"


def write_predictions():
    test = ms.load_data(SHARED.resolve() / "data" / "cifar10-jpeg.tar.gz").test
    few, said = Split(test.images[::EVERY], test.labels[::EVERY]), {}
    for path, stage, key in with_weights():
        model = stage.model(key)
        top1 = ms.evaluate(model, test)
        assert abs(top1 - reported(stage, key).top1) < 0.05, f"{path}: {top1}"
        said[path] = predictions(model, few)
    PREDICTED.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    write_predictions()
