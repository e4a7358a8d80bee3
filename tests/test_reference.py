"""The measured results that come with the course: complete, and what their own weights say."""

import json

import pytest
import torch

import mslib as ms
from mslib.course import REFERENCE

METRICS = sorted(REFERENCE.glob("*/*/metrics.json"))
WEIGHTS = {"baseline": "baseline", "pruned": "masked: after the cut, folded", "final": "masked: fine-tuned"}


def stages():
    return [pytest.param(m.parent.parent.name, m.parent.name, id=f"{m.parent.parent.name}/{m.parent.name}") for m in METRICS]


@pytest.mark.parametrize("name, lesson", stages())
def test_a_reference_says_how_it_was_measured(name, lesson):
    metrics = json.loads((REFERENCE / name / lesson / "metrics.json").read_text())
    assert {"torch", "python", "hardware", "threads", "date", "settings"} <= metrics.keys()
    assert lesson.startswith("00") or metrics["settings"]["seed"] >= 0 and metrics["settings"]["dataset"]
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
    found = [key for key in WEIGHTS if (stage / f"{key}.pt").exists() or (stage / key / "model.pt").exists()]
    if not found:
        pytest.skip("no weights in this stage")
    data = ms.load_data(request.getfixturevalue("cifar"))
    for key in found:
        model, row = stage.model(key), stage.rows.set_index("name").loc[WEIGHTS[key]]
        price = ms.cost(model, torch.zeros(1, 3, 32, 32))
        assert (price.macs, price.params) == (row.macs, row.params)
        assert ms.evaluate(model, data.test) == pytest.approx(row.top1, abs=0.05)
