"""The measured results that come with the course: complete, and what their own weights say."""

import json

import pandas as pd
import pytest
import torch
import yaml

import mslib as ms
from mslib.course.results import tables
from mslib.course.sweeps import grid

REFERENCE = tables() / "reference"

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


@pytest.mark.parametrize("name, lesson", stages())
def test_the_weights_reach_the_reported_top1_on_the_real_test_images(name, lesson, request):
    stage = ms.reference(name)[lesson]
    found = [
        key
        for key in WEIGHTS
        if (stage / f"{key}.pt").exists() or (stage / key / "model.pt").exists()
    ]
    if not found:
        pytest.skip("no weights in this stage")
    data = ms.load_data(request.getfixturevalue("cifar"))
    for key in found:
        model, row = stage.model(key), stage.rows.set_index("name").loc[WEIGHTS[key]]
        price = ms.cost(model, torch.zeros(1, 3, 32, 32))
        assert (price.macs, price.params) == (row.macs, row.params)
        assert ms.evaluate(model, data.test) == pytest.approx(row.top1, abs=0.05)


@pytest.mark.parametrize("path", sorted(REFERENCE.glob("*.yml")), ids=lambda p: p.stem)
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
