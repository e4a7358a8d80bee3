"""Settings: presets, what is refused and how, and what a stage's folder depends on."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import mslib as ms
from mslib.course import results
from mslib.course.cli import _value
from mslib.course.settings import SETTINGS, _assigned, read_yaml
from mslib.course.stages import NEEDS, Stage
from mslib.files import write_json


def test_presets_and_overrides():
    quick, standard = ms.config("quick"), ms.config("standard", seed=3, epochs=None)
    assert quick.dataset == "shapes" and standard.dataset == "cifar10" and standard.seed == 3
    assert standard.epochs == ms.config("standard").epochs
    assert standard.overrides() == {"seed": 3}
    assert ms.config(standard.preset, **standard.overrides()) == standard
    with pytest.raises(ValueError, match="frozen"):
        quick.seed = 1


def test_what_stored_lessons_check_is_checked_for_their_run_only(tmp_path):
    assert ms.config("quick").stored and ms.config("quick", runs=str(tmp_path)).stored
    assert not ms.config("quick", seed=1).stored and not ms.config("standard").stored


def test_phase_is_what_fit_needs():
    cfg = ms.config("quick", lr=0.3, sparse_lr=0.2, finetune_epochs=9, batch_size=7)
    shared = {"batch_size": 7, "schedule": cfg.schedule, "weight_decay": cfg.weight_decay}
    common = shared | {"seed": cfg.seed}
    assert cfg.phase("baseline") == {"epochs": cfg.epochs, "lr": 0.3, **common}
    assert cfg.phase("sparse") == {"epochs": cfg.sparse_epochs, "lr": 0.2, **common}
    assert cfg.phase("finetune") == {"epochs": 9, "lr": cfg.finetune_lr, **common}
    growing = ms.config("quick", growing_lr=1e-3, growing_schedule="constant").phase("growing")
    assert growing["epochs"] == cfg.sparse_epochs and growing["lr"] == 1e-3
    assert growing["schedule"] == "constant" and cfg.phase("growing") == cfg.phase("sparse")


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
        (["quick"], {}, "unknown preset"),
        ("quick", {"epoch": 3}, "unknown setting 'epoch'; did you mean 'epochs'"),
        ("quick", {"zzz": 3}, "unknown setting 'zzz'; known: dataset"),
        ("quick", {"epochs": "three"}, "epochs='three': expected a whole number, for example 30"),
        ("quick", {"epochs": 2.5}, "epochs=2.5: expected a whole number"),
        ("quick", {"epochs": 0}, "epochs=0: must be above 0, for example 30"),
        ("quick", {"epochs": True}, "epochs=True"),
        ("quick", {"epochs": 10**9}, "epochs=1000000000: must be above 0 and at most 10000"),
        ("quick", {"lr": True}, "lr=True: expected a finite number"),
        ("quick", {"lr": float("nan")}, "lr=nan: expected a finite number, for example 0.1"),
        ("quick", {"lr": float("inf")}, "lr=inf: expected a finite number"),
        ("quick", {"lr": "0.1"}, "lr='0.1': expected a finite number"),
        ("quick", {"val": 0.99}, "val=0.99: must be above 0 and at most 0.5"),
        ("quick", {"reduction": 1.2}, "reduction=1.2: must be above 0 and below 1"),
        ("quick", {"seed": -1}, "seed=-1: must be 0 or more, for example 0"),
        ("quick", {"floor": -0.1}, "floor=-0.1: must be 0 or more and below 1"),
        ("quick", {"schedule": "onecycl"}, "did you mean 'onecycle'"),
        ("quick", {"method": "best"}, "method='best'; known: random"),
        ("quick", {"image_size": 8.5}, "image_size=8.5: expected a whole number, for example 32"),
        ("quick", {"image_size": "8"}, "image_size='8': expected a whole number"),
        ("quick", {"image_size": 0}, "image_size=0: must be 8 or more"),
        ("quick", {"depth": 57}, "depth=57: expected layers of a CIFAR ResNet: 6n"),
        ("quick", {"residual": 1}, "residual=1: expected True or False"),
        ("quick", {"dataset": 5}, "dataset=5: expected a text"),
        ("quick", {"runs": 3}, "runs=3: expected a text, for example"),
        ("quick", {"layer_reduction": {"stage1": 1.5}}, "layer_reduction: 'stage1': 1.5; expected"),
        ("quick", {"layer_reduction": {"stage1": float("nan")}}, "layer_reduction: 'stage1': nan"),
        ("quick", {"layer_reduction": 0.5}, "layer_reduction=0.5: expected a dict"),
    ],
)
def test_bad_settings(preset, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        ms.config(preset, **overrides)
    assert "\n" not in str(error.value)


def test_values_of_the_command_line():
    assert _value("3") == 3 and _value(" -1e-3") == -1e-3 and _value("0.5") == 0.5
    assert _value("true") is True and _value("none") is None and _value("a/b.zip") == "a/b.zip"
    assert _value("1e999") == _value("inf") == float("inf") and _value("nan") != _value("nan")
    assert _value("{'stage1': 0.5}") == {"stage1": 0.5}


def test_the_names_that_a_cell_assigns():
    """What papermill's cell gives, and what the cell before it lists."""
    assert _assigned("# Parameters\nepoch = 1\nruns = '/a'\n") == {"epoch", "runs"}
    assert _assigned('preset = "auto"  # …\noverrides = {}\nx.y = 3') == {"preset", "overrides"}
    assert _assigned("!ls") == set()


def test_missing_dataset():
    with pytest.raises(FileNotFoundError, match="'nowhere/images.tar.gz'"):
        ms.config("quick", dataset="nowhere/images.tar.gz")


def folder(lesson, runs, **overrides):
    return ms.stage(lesson, ms.config("quick", runs=str(runs), **overrides)).path


def test_a_stage_depends_on_its_own_and_earlier_settings(tmp_path):
    base = folder("01_baseline", tmp_path)
    assert base == tmp_path / "quick" / "01_baseline"
    assert folder("01_baseline", tmp_path, masked_strength=0.5) == base
    third = folder("03_masked_regularization", tmp_path, masked_strength=0.5)
    assert third.name == "03_masked_regularization,masked_strength=0.5"
    assert folder("03_masked_regularization", tmp_path, seed=1).name.endswith(",seed=1")
    assert folder("01_baseline", tmp_path, seed=1) != base


def test_lessons_06_to_12_depend_on_what_they_read():
    cfg = ms.config("quick")
    phases = {"epochs", "sparse_epochs", "sparse_lr", "finetune_epochs", "finetune_lr"}
    six = {"growing_exponent", "layer_reduction", "masked_strength"}
    assert phases | six <= cfg.up_to(6).keys()
    assert phases | {"flow_length", "floor"} <= cfg.up_to(7).keys()
    assert not six & cfg.up_to(7).keys()
    for lesson in (6, 7):
        assert not {"global_strength", "method"} & cfg.up_to(lesson).keys()
    assert "growing_ceiling" not in cfg.up_to(7)
    assert {"method", "masked_strength", "finetune_lr", "flow_length"} <= cfg.up_to(8).keys()
    assert not {"flow_curvature", "layer_reduction"} & cfg.up_to(8).keys()
    assert {"own_lr", "reduction", "batch_size"} <= cfg.up_to(9).keys()
    assert not {"depth", "epochs", "global_strength", "method"} & cfg.up_to(9).keys()
    ten = {"epochs", "lr", "masked_strength", "growing_ceiling", "flow_length", "finetune_lr"}
    assert ten | {"family_depth", "reduction", "image_size", "width"} <= cfg.up_to(10).keys()
    assert not {"depth", "sparse_epochs", "own_epochs", "method"} & cfg.up_to(10).keys()
    assert not any("family" in name for name in cfg.up_to(9))
    assert cfg.up_to(11) == cfg.up_to(10)
    twelve = {"deep_reduction", "floor", "sparse_epochs", "masked_strength", "finetune_lr"}
    assert twelve | {"depth", "epochs"} <= cfg.up_to(12).keys()
    assert not {"reduction", "finetune_epochs", "family_depth", "method"} & cfg.up_to(12).keys()
    assert "train_size" in cfg.up_to(1) and "train_size" not in ms.config("standard").up_to(1)


@pytest.mark.parametrize("name", ["x/../../../../escaped/y", "a\\b", "a:b", "a\n", "what?", "x."])
def test_no_setting_leads_out_of_the_folder_of_runs(tmp_path, name):
    path = folder("09_your_own_network", tmp_path, own_network=name)
    assert re.fullmatch(r"09_your_own_network,[0-9a-f]{12}", path.name)
    assert path.parent == tmp_path / "quick"
    plain = folder("09_your_own_network", tmp_path, own_network="my net")
    assert plain.name == "09_your_own_network,own_network=my net"


def images(folder, shade):
    """Six images a split in two classes, all of one grey."""
    for split in ("train", "test"):
        for i in range(6):
            path = folder / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), shade).save(path)
    return str(folder)


def test_two_data_sets_of_one_name_share_no_stage(tmp_path):
    one, two = images(tmp_path / "a" / "set", 10), images(tmp_path / "b" / "set", 200)
    here = {d: ms.stage("01_baseline", ms.config("quick", dataset=d)) for d in (one, two)}
    assert here[one].path != here[two].path and "dataset=set" in here[one].path.name
    assert here[one].settings["images"] != here[two].settings["images"]


def test_a_data_set_is_the_same_from_every_folder(tmp_path, monkeypatch):
    whole = images(tmp_path / "set", 10)
    monkeypatch.chdir(tmp_path)
    cfg = ms.config("quick", dataset="set")
    monkeypatch.chdir("/")
    assert cfg.dataset == whole and cfg == ms.config("quick", dataset=whole)
    assert ms.config(cfg.preset, **cfg.overrides()) == cfg
    assert ms.data_of(cfg).classes == ("a", "b")


def test_a_carried_folder_of_other_settings_is_refused(tmp_path):
    stage = ms.stage("01_baseline", ms.config("quick", runs=str(tmp_path)))
    stage.finish()
    stage.path.rename(tmp_path / "quick" / "01_baseline,seed=1")
    with pytest.raises(
        ValueError,
        match=r"01_baseline,seed=1 holds a run made with other settings: seed=0 \(now 1\)",
    ):
        folder("01_baseline", tmp_path, seed=1)


@pytest.mark.parametrize(
    "content, wrong",
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "it holds a list"),
        ("{}", "'rows' is 'None'"),
        ('{"rows": [], "settings": 3}', "'settings' is '3'"),
        ('{"rows": [1], "settings": {}}', "a row is '1'"),
        ('{"rows": [{"name": "x", "top1": "high"}], "settings": {}}', "a row is "),
    ],
)
def test_a_damaged_metrics_json_is_named(tmp_path, content, wrong):
    path = folder("01_baseline", tmp_path) / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match="metrics.json") as error:
        folder("01_baseline", tmp_path)
    assert wrong in str(error.value) and f"delete the whole folder {path.parent}" in str(
        error.value
    )


def test_recording_twice_is_recording_once(tmp_path, data):
    stage = Stage("01_baseline", tmp_path, {"seed": 0})
    with pytest.raises(FileNotFoundError, match="01_baseline is not finished"):
        stage.rows  # noqa: B018
    nets = [ms.resnet(8), ms.resnet(14)]
    for name, net in (("first", nets[0]), ("second", nets[0]), ("first", nets[1])):
        stage.report(name, net, data, epochs=1)
        stage.finish(extra=name)
    assert stage.rows.name.tolist() == ["first", "second"]
    assert stage.rows.macs[0] == ms.cost(nets[1], data.example).macs > stage.rows.macs[1]
    assert stage.metrics["extra"] == "first" and stage.metrics["settings"] == {"seed": 0}


def test_a_row_that_is_not_there_is_named(tmp_path):
    stage = Stage("05_finetune", tmp_path, {})
    row = {"name": "masked: fine-tuned", "top1": 90.0, "macs": 2, "params": 2, "epochs": 1}
    write_json(tmp_path / "metrics.json", {"rows": [row], "settings": {}})
    assert stage.top1("masked: fine-tuned") == 90
    with pytest.raises(ValueError, match="has no row 'masked: tuned'; did you mean 'masked: fine"):
        stage.top1("masked: tuned")
    write_json(tmp_path / "baseline" / "history.json", {})
    with pytest.raises(ValueError, match="history.json is damaged: its seconds are 'None'"):
        stage.minutes  # noqa: B018


def test_unknown_lesson_and_reference():
    with pytest.raises(ValueError, match="'06'; known: 00_start_here"):
        ms.stage("06", ms.config("quick"))
    with pytest.raises(FileNotFoundError, match="no reference 'nothing'; there are: "):
        ms.reference("nothing")


def test_the_largest_run_is_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "tables", lambda: tmp_path)
    for preset in ("quick", "standard"):
        path = tmp_path / "reference" / f"net-{preset}" / "01_baseline" / "metrics.json"
        write_json(path, {"settings": {"preset": preset}, "rows": []})
    assert ms.reference("net")["01_baseline"].settings == {"preset": "standard"}
    assert ms.reference("net-quick")["01_baseline"].settings == {"preset": "quick"}


def test_published_results_are_complete_and_agree_with_themselves():
    table = ms.published("ResNet-56")
    assert table.base["He et al."] == 93.03 and table.delta["GReg-1"] == -0.18
    both = table.dropna(subset="pruned")
    assert len(both) == 10 and ((both.pruned - both.base - both.delta).abs() < 0.005).all()
    times = pd.to_numeric(table.source.str.extract(r"([0-9.]+)x$")[0])  # the speed-up it tells
    assert ((100 * (1 - 1 / times) - table.reduction).abs().dropna() < 0.06).all()
    assert times.notna().sum() == 10 and not table.index.has_duplicates
    both = {"GReg-1": 67.55, "GReg-2": 67.75}
    assert ms.published("VGG-19", "CIFAR-100").pruned.to_dict() == both
    assert ms.published("ResNet-110").reduction["MaskSparsity"] == 63.03
    assert ms.published("ResNet-50", "ILSVRC-2012").delta["MaskSparsity"] == -0.76


def test_what_was_not_published_is_refused_with_the_nearest_name(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="network 'resnet56'; did you mean 'ResNet-56'"):
        ms.published("resnet56")
    with pytest.raises(ValueError, match="of ResNet-56 for dataset 'cifar10'; known: CIFAR-10"):
        ms.published("ResNet-56", "cifar10")
    monkeypatch.setattr(results, "tables", lambda: tmp_path)
    for content, message in {
        "": "published.csv cannot be read as a table",
        "a,b\n": "published.csv lacks the columns method, network, dataset",
    }.items():
        (tmp_path / "published.csv").write_text(content)
        with pytest.raises(ValueError, match=message):
            ms.published("ResNet-56")


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: [0, 1]\nlr: 1\nseed: 2", "'seed' is given twice; leave one out .* line 3"),
        ("a: {b: 1, b: 2}", "'b' is given twice"),
        ("date: 2026-13-01", "mine.yml is not valid YAML: month must be"),
    ],
)
def test_yaml_of_two_meanings_is_refused(tmp_path, text, message):
    (tmp_path / "mine.yml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(tmp_path / "mine.yml")


def test_a_zero_in_front_makes_no_octal_number(tmp_path):
    (tmp_path / "mine.yml").write_text("a: 010\nb: [0, -1, 0x10, 10]\nc: 0.5")
    assert read_yaml(tmp_path / "mine.yml") == {"a": "010", "b": [0, -1, 16, 10], "c": 0.5}


def test_every_setting_has_a_lesson_and_says_what_it_is():
    cfg = ms.config("quick")
    told = [line for n in range(1, len(NEEDS)) for line in cfg.describe(n).splitlines()]
    assert sorted(line.split()[0] for line in told) == sorted(SETTINGS)
    assert {*SETTINGS} == {name for n in range(len(NEEDS)) for name in cfg.up_to(n)}
    json.dumps([cfg.up_to(int(lesson[:2])) for lesson in NEEDS])


@pytest.mark.parametrize(
    "preset, images", [("quick", 3600), ("standard", 45_000), ("full", 45_000)]
)
def test_the_masked_penalty_of_each_preset_reaches_zero(preset, images):
    """Its push is above 1, where a γ of a trained network begins (methods: choose by the push)."""
    cfg = ms.config(preset)
    steps = cfg.sparse_epochs * (images // cfg.batch_size)
    assert ms.push(cfg.masked_strength, cfg.sparse_lr, steps, cfg.schedule) > 1


def test_shares_of_layers_are_a_setting():
    cfg = ms.config("quick", layer_reduction={"stage1": 0.5})
    assert ms.config("quick", **cfg.overrides()) == cfg
    assert ms.config("quick").layer_reduction == {"stage1": 0.75, "stage2": 0.75, "stage3": 0.32}


def test_two_equal_networks_are_further_apart_than_chance_says_once_in_twenty_times():
    draws = np.random.default_rng(0).binomial(2000, 0.9, size=(2, 20_000)) / 20.0  # in percent
    outside = np.abs(draws[0] - draws[1]) > ms.chance(90.0, 2000)
    assert 0.03 < outside.mean() < 0.06  # two standard errors: 0.0455
    assert ms.chance(90.0, 8000) == pytest.approx(ms.chance(90.0, 2000) / 2)


def test_decisions_choose_on_held_out_images_and_report_test_images():
    tops = {"a": (90.0, 91.0, 92.0), "b": (88.0, 89.1, 89.9), "c": (89.9, 91.2, 91.6), "d": (50.0,)}
    rows = [(0.5, seed, m, t) for m, found in tops.items() for seed, t in enumerate(found)]
    table = pd.DataFrame(rows, columns=["reduction", "seed", "method", "end"])
    table["test"] = table.end - 1 + 3 * (table.method == "b")  # best, if one chose on test images
    choice = {"a few epochs": ("end", "test")}
    row = ms.decisions(table[table.method != "d"], choice).iloc[0]
    assert (row["use"], row["next best"], row["top-1 %"]) == ("a", "c", 90)
    # the differences are 0.1, -0.2 and 0.4: mean 0.1, sd 0.3, t of two degrees of freedom 4.303
    assert row["ahead by"] == "0.10 ± 0.75" and row["seeds"] == 3
    # b: -1, -1.1 and -0.9, ± 0.25: as far apart on the other side
    assert row["not separated"] == "c (0.1)"
    alone = ms.decisions(table, choice).iloc[0]  # d has the first seed only
    assert alone["ahead by"] == "0.10" and alone["not separated"] == "not known: one seed"
    single = ms.decisions(table[table.method == "a"], choice).iloc[0]
    assert single["use"] == "a" and not single["next best"] and not single["ahead by"]
