import dataclasses

import pytest

import mslib as ms
from mslib.course import stages as course
from mslib.files import write_json


def test_presets_and_overrides():
    quick, standard = ms.config("quick"), ms.config("standard", seed=3, epochs=None)
    assert quick.dataset == "shapes" and standard.dataset == "cifar10" and standard.seed == 3
    assert standard.epochs == ms.config("standard").epochs
    assert standard.overrides() == {"seed": 3}
    assert ms.config(standard.preset, **standard.overrides()) == standard
    with pytest.raises(AttributeError):
        quick.seed = 1


def test_phase_is_what_fit_needs():
    cfg = ms.config("quick", lr=0.3, sparse_lr=0.2, finetune_epochs=9, batch_size=7)
    common = {
        "batch_size": 7,
        "schedule": cfg.schedule,
        "weight_decay": cfg.weight_decay,
        "seed": cfg.seed,
    }
    assert cfg.phase("baseline") == {"epochs": cfg.epochs, "lr": 0.3, **common}
    assert cfg.phase("sparse") == {"epochs": cfg.sparse_epochs, "lr": 0.2, **common}
    assert cfg.phase("finetune") == {"epochs": 9, "lr": cfg.finetune_lr, **common}


def test_auto_is_quick_without_a_gpu(monkeypatch):
    monkeypatch.delenv("MSLIB_PRESET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert ms.config().preset == "quick"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert ms.config().preset == "standard"


@pytest.mark.parametrize(
    "preset, overrides, message",
    [
        ("quik", {}, "unknown preset 'quik'; did you mean 'quick'"),
        ("huge", {}, "known: auto, quick, standard, full"),
        ("quick", {"epoch": 3}, "unknown setting 'epoch'; did you mean 'epochs'"),
        ("quick", {"zzz": 3}, "unknown setting 'zzz'; known: dataset"),
        ("quick", {"epochs": "three"}, "epochs='three': expected a int"),
        ("quick", {"epochs": 2.5}, "epochs=2.5"),
        ("quick", {"epochs": 0}, "epochs=0: must be above 0"),
        ("quick", {"lr": True}, "lr=True"),
        ("quick", {"reduction": 1.2}, "reduction=1.2: must be above 0 and below 1"),
        ("quick", {"seed": -1}, "seed=-1: must be 0 or more, for example 0"),
        ("quick", {"floor": -0.1}, "floor=-0.1: must be 0 or more and below 1"),
        ("quick", {"schedule": "onecycl"}, "did you mean 'onecycle'"),
    ],
)
def test_bad_settings(preset, overrides, message):
    with pytest.raises(ValueError, match=message):
        ms.config(preset, **overrides)


def test_a_layer_may_go_down_to_one_channel():
    assert ms.config("quick", floor=0.0).floor == 0


def test_missing_dataset():
    with pytest.raises(FileNotFoundError, match="'nowhere/images.tar.gz'"):
        ms.config("quick", dataset="nowhere/images.tar.gz")


def test_notebook_config_takes_parameters_and_refuses_a_mistyped_one():
    scope = {
        "preset": "quick",
        "epochs": 3,
        "seed": None,
        "top1": 93.0,
        "In": ["", "# Parameters\nepochs = 3\n"],
    }
    assert ms.notebook_config(scope) == ms.config("quick", epochs=3)
    with pytest.raises(ValueError, match="'epoch'; did you mean 'epochs'"):
        ms.notebook_config({"preset": "quick", "epoch": 3, "In": ["# Parameters\nepoch = 3\n"]})


def test_a_stage_depends_on_its_own_and_earlier_settings(tmp_path):
    def folder(lesson, **overrides):
        return ms.stage(lesson, ms.config("quick", runs=str(tmp_path), **overrides)).path

    base = folder("01_baseline")
    assert base == tmp_path / "quick" / "01_baseline"
    assert folder("01_baseline", masked_strength=0.5) == base
    assert (
        folder("03_masked_regularization", masked_strength=0.5).name
        == "03_masked_regularization,masked_strength=0.5"
    )
    assert folder("03_masked_regularization", seed=1).name == "03_masked_regularization,seed=1"
    assert folder("01_baseline", seed=1) != base


def test_a_carried_folder_of_other_settings_is_refused(tmp_path):
    cfg = ms.config("quick", runs=str(tmp_path))
    stage = ms.stage("01_baseline", cfg)
    stage.finish()
    ms.stage("01_baseline", ms.config("quick", runs=str(tmp_path), seed=1)).path.parent.mkdir(
        exist_ok=True
    )
    stage.path.rename(tmp_path / "quick" / "01_baseline,seed=1")
    with pytest.raises(
        ValueError,
        match=r"01_baseline,seed=1 holds a run made with other settings: seed=0 \(now 1\)",
    ):
        ms.stage("01_baseline", ms.config("quick", runs=str(tmp_path), seed=1))


def test_unknown_lesson_and_reference():
    with pytest.raises(ValueError, match="'06'; known: 00_start_here"):
        ms.stage("06", ms.config("quick"))
    with pytest.raises(FileNotFoundError, match="no reference 'nothing'; there are: "):
        ms.reference("nothing")


def test_the_largest_run_is_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(course, "REFERENCE", tmp_path)
    for preset in ("quick", "standard"):
        write_json(
            tmp_path / f"net-{preset}" / "01_baseline" / "metrics.json",
            {"settings": {"preset": preset}, "rows": []},
        )
    assert ms.reference("net")["01_baseline"].settings == {"preset": "standard"}
    assert ms.reference("net-quick")["01_baseline"].settings == {"preset": "quick"}


def test_published_results_are_complete_and_agree_with_themselves():
    table = ms.published("ResNet-56")
    assert table.base["He et al."] == 93.03 and table.delta["GReg-1"] == -0.18
    both = table.dropna(subset="pruned")
    assert len(both) == 10 and ((both.pruned - both.base - both.delta).abs() < 0.005).all()
    times = table.source.str.extract(r"([0-9.]+)x$")[0].astype(
        float
    )  # the speed-up that a source tells
    assert (
        (100 * (1 - 1 / times) - table.reduction).abs().dropna() < 0.06
    ).all() and times.notna().sum() == 10
    assert not table.index.has_duplicates
    assert ms.published("VGG-19", "CIFAR-100").pruned.to_dict() == {
        "GReg-1": 67.55,
        "GReg-2": 67.75,
    }
    assert ms.published("ResNet-110").reduction["MaskSparsity"] == 63.03
    assert ms.published("ResNet-50", "ILSVRC-2012").delta["MaskSparsity"] == -0.76


def test_every_setting_has_a_lesson_and_says_what_it_is():
    cfg = ms.config("quick")
    told = "\n".join(cfg.describe(n) for n in range(1, 10))
    for name in {f.name for f in dataclasses.fields(cfg)} - {"preset", "runs"}:
        assert f"\n{name} " in "\n" + told
    assert set(course.NEEDS) >= {"01_baseline", "05_finetune"}


@pytest.mark.parametrize(
    "preset, images", [("quick", 3600), ("standard", 45_000), ("full", 45_000)]
)
def test_the_masked_penalty_of_each_preset_reaches_zero(preset, images):
    """Its push is above 1, where a γ of a trained network begins (methods: choose presets by the push)."""
    cfg = ms.config(preset)
    assert (
        ms.push(
            cfg.masked_strength,
            cfg.sparse_lr,
            cfg.sparse_epochs * (images // cfg.batch_size),
            cfg.schedule,
        )
        > 1
    )


def test_shares_of_layers_are_a_setting(tmp_path):
    cfg = ms.config("quick", layer_reduction={"stage1": 0.5}, runs=str(tmp_path))
    assert ms.config("quick", **cfg.overrides()) == cfg
    assert ms.config("quick").layer_reduction == {"stage1": 0.75, "stage2": 0.75, "stage3": 0.32}
    with pytest.raises(
        ValueError, match="layer_reduction: 'stage1': 1.5; a share from 0 to below 1"
    ):
        ms.config("quick", layer_reduction={"stage1": 1.5})
    with pytest.raises(ValueError, match="layer_reduction=0.5: expected a dict"):
        ms.config("quick", layer_reduction=0.5)
