"""Sweeps through real papermill and real Dask processes, on a network that takes seconds."""

import io
import os
import random
import subprocess
import sys
import time
from contextlib import redirect_stderr

import pandas as pd
import pytest
import torch
import yaml
from distributed import LocalCluster

import mslib as ms
from mslib.course import sweeps
from mslib.course.cli import main
from mslib.course.sweeps import grid
from mslib.files import ROOT

from .conftest import kill_with_its_children

SMALL = dict(depth=8, train_size=200, test_size=100, epochs=2, sparse_epochs=2, seed=0)
STRENGTHS = {"global_strength": [0.01, 0.02]}
KILLS = min(20, int(os.environ.get("MSLIB_TRIALS", 1)))


def command(runs, *words, **settings):
    given = {**SMALL, **STRENGTHS, **settings, "runs": runs}
    lists = {name: v if isinstance(v, list) else [v] for name, v in given.items()}
    flags = [str(word) for name, values in lists.items() for word in ("-p", name, *values)]
    lesson = () if "--lesson" in words else ("--lesson", "02")
    start = [sys.executable, "-m", "mslib", "sweep"]
    return [*start, *words, "--preset", "quick", *lesson, *flags]


def finished(runs):
    return {path: path.stat().st_mtime_ns for path in runs.rglob("metrics.json")}


def checkpoints(runs):
    return {path.parent: path.name for path in sorted(runs.rglob("epoch-*.pt"))}


def table(runs, name="sweep-02_global_sparsity"):
    return pd.read_csv(runs / "quick" / f"{name}.csv")


def found(runs, lesson, strength):
    return ms.stage(lesson, ms.config("quick", **SMALL, global_strength=strength, runs=str(runs)))


def test_grid_is_every_combination_in_order():
    assert grid({"seed": [0, 1], "depth": 8, "lr": [0.1, 0.2]}) == [
        {"seed": 0, "depth": 8, "lr": 0.1},
        {"seed": 0, "depth": 8, "lr": 0.2},
        {"seed": 1, "depth": 8, "lr": 0.1},
        {"seed": 1, "depth": 8, "lr": 0.2},
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a sweep from a file, by workers of a scheduler, one point of which must fail.

    And what the command returned and said.
    """
    runs, said = tmp_path_factory.mktemp("undisturbed"), io.StringIO()
    file = runs / "mine.yml"
    swept = {"global_strength": "2e-2", "reduction": [0.5, 0.99]}  # 2e-2 is a text in YAML
    settings = {"lesson": 2, "preset": "quick", **SMALL, **swept, "runs": str(runs)}
    file.write_text(yaml.safe_dump(settings))
    where = dict(processes=False, protocol="tcp://", host="127.0.0.1", dashboard_address=None)
    with LocalCluster(n_workers=2, threads_per_worker=1, **where) as cluster, redirect_stderr(said):
        status = main(["sweep", str(file), "--scheduler", cluster.scheduler_address, "-j", "2"])
    return runs, status, said.getvalue()


def test_a_failed_point_is_reported_and_the_others_end(undisturbed):
    runs, status, said = undisturbed
    assert status == 1
    assert "failed: reduction=0.99: ValueError: reduction 0.99 is out of reach" in said
    assert table(runs, "mine").reduction.tolist() == [0.5]


def kill_a_sweep(runs, wait):
    """Start it with two workers, and kill it by -9 once `wait()` is over; how many it had then."""
    with open(runs / "log", "w") as out:
        words = command(runs, "-j", "2")
        sweep = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    wait(sweep)
    assert sweep.poll() is None, (runs / "log").read_text()
    return kill_with_its_children(sweep)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a sweep that was killed when one of its three stages was finished, and more
    often at random moments with MSLIB_TRIALS; then it was started again."""
    runs, lot = tmp_path_factory.mktemp("killed"), random.Random()

    def until_one_is_finished(sweep):
        deadline = time.monotonic() + 600
        while not finished(runs) and time.monotonic() < deadline and sweep.poll() is None:
            time.sleep(0.05)

    def at_random(sweep):  # perhaps before it has a worker
        time.sleep(lot.uniform(0.5, 15))

    for trial in range(KILLS):
        before, trained = finished(runs), checkpoints(runs)
        workers = kill_a_sweep(runs, at_random if trial else until_one_is_finished)
        assert trial or workers
        assert before.items() <= finished(runs).items()  # nothing lost, nothing repeated
        for folder, newest in checkpoints(runs).items():
            assert newest >= trained.get(folder, ""), folder
        if len(finished(runs)) == 3:
            break
    before = finished(runs)
    assert main(command(runs, "-j", "2")[3:]) == 0
    return runs, before


def test_a_sweep_killed_in_the_middle_goes_on_where_it_was(killed):
    runs, before = killed
    after = finished(runs)
    assert 1 <= len(before) <= len(after) == 3  # the baseline, which both points need, and they
    assert before.items() <= after.items()
    rows = table(runs)
    assert rows.global_strength.tolist() == STRENGTHS["global_strength"]
    for row in rows.itertuples():
        point = found(runs, "02_global_sparsity", row.global_strength)
        assert point.rows.top1.iloc[-1] == pytest.approx(row.top1)
        assert point.metrics["share_kept"] == pytest.approx(row.share_kept)


def test_killed_or_not_by_whatever_workers_the_results_are_the_same(killed, undisturbed):
    for lesson in ("01_baseline", "02_global_sparsity"):
        ours, theirs = (found(runs, lesson, 0.02).path for runs in (killed[0], undisturbed[0]))
        weights = sorted(path.relative_to(ours) for path in ours.rglob("model.pt"))
        assert weights
        for path in weights:
            assert same_weights(ours / path, theirs / path)
    ours = table(killed[0]).query("global_strength == 0.02").reset_index(drop=True)
    theirs = table(undisturbed[0], "mine")
    # "reduction" is what was asked for where a sweep varies it, else what was reached
    shared = [name for name in ours if name not in ("minutes", "date", "reduction")]
    pd.testing.assert_frame_equal(theirs[shared], ours[shared])


def same_weights(one, other):
    a, b = (ms.load(path).state_dict() for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_damaged_result_leaves_the_other_points_alone(killed, capsys):
    """And a sweep that is finished runs nothing again."""
    runs, _ = killed
    path = found(runs, "02_global_sparsity", 0.01) / "metrics.json"
    whole, before = path.read_text(), finished(runs)
    path.write_text(whole[:100])
    try:
        assert main(command(runs)[3:]) == 1
        err = capsys.readouterr().err
        assert "1 points, 1 finished before; 0 runs to do" in err
        assert f"failed: global_strength=0.01: {path} cannot be read" in err
        assert len(table(runs)) == 1
    finally:
        path.write_text(whole)
    assert main(command(runs)[3:]) == 0 and len(table(runs)) == 2
    assert finished(runs).keys() == before.keys()


@pytest.mark.parametrize(
    "words, message",
    [
        (("-p", "sed", "1"), "unknown setting 'sed'; did you mean 'seed'"),
        (("-p", "seed", "-p", "lr", "0.1"), "-p seed: expected one or more values"),
        (("-p", "lr", "0.1", "-1e-3"), "lr=-0.001: must be above 0"),
        (("-p", "finetune_lr", "0.1", "0.2"), "finetune_lr: lesson 02_global_sparsity does not"),
        (
            ("--lesson", "09", "-p", "width", "0.5", "1.0"),
            "lesson 09_your_own_network does not depend on it",
        ),
        (("--lesson", "77"), "unknown lesson '77'"),
        (("-j", "0"), "-j 0: expected a whole number of processes"),
        (("-p", "seed", "1"), "-p seed is given twice, 1 and 0"),
        (("--csv", "."), "--csv . is a folder"),
        (("none.yml",), "none.yml"),
    ],
)
def test_bad_sweeps_are_refused_before_anything_runs(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(command(tmp_path, *words)[3:]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: [0, 1", "is not valid YAML: "),
        ("- 1", "expected lines such as 'seed: [0, 1, 2]', found [1]"),
        ("1: 2", "1 is no name of a setting"),
        ("null: 2", "None is no name of a setting"),
        ("seed: []", "seed: no value; expected one or more"),
        ("seed: [0, 1]\nseed: 2", "mine.yml is not valid YAML: 'seed' is given twice"),
        ("seed: 010", "seed='010': expected a whole number"),
        ("seed: .nan", "seed=nan: expected a whole number"),
        ("lr: 1e999", "lr=inf: expected a finite number"),
        ("seed: {a: 1}", "seed={'a': 1}: expected a whole number"),
        ("train_size: [10, 20]\ndataset: cifar10", "train_size: lesson 05_finetune does not"),
    ],
)
def test_bad_files_of_sweeps_are_refused(tmp_path, capsys, text, message):
    file = tmp_path / "mine.yml"
    file.write_text(text)
    words = ["sweep", str(file), "--preset", "quick", "--csv", str(tmp_path / "table.csv")]
    assert main(words) == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture
def points(tmp_path):
    """Sweeps lesson 01 over settings whose points are finished without training."""

    def swept(finish=True, **settings):
        path = tmp_path / "table.csv"
        settings["runs"] = str(tmp_path / "runs")
        for point in grid(settings) if finish else []:
            ms.stage("01_baseline", ms.config("quick", **point)).finish()
        failed = sweeps.sweep("01_baseline", "quick", settings, path)
        return failed, pd.read_csv(path, dtype=str)

    return swept


def test_rows_of_other_points_stay_in_the_table(points):
    _, first = points(seed=[0, 1], epochs=8)
    _, second = points(seed=[1, 2], epochs=9)
    assert second[:2].equals(first)
    assert second.seed.tolist() == ["0", "1", "1", "2"]
    assert second.epochs.tolist() == ["8", "8", "9", "9"]
    _, third = points(seed=[2, 1])  # the preset's 8 epochs, which the table tells apart
    assert ("".join(third.seed), "".join(third.epochs)) == ("01221", "89988")
    assert third.folder.is_unique


@pytest.mark.parametrize(
    "content, message",
    [
        ("mine\n", "table.csv is no table of this sweep: it lacks folder, seed; give another file"),
        ("seed,top1\n0,5\n", "it lacks folder; "),
        ("epochs,folder,seed\n", "it lacks seed; "),  # behind the folder stands what came out
        ('"mine', "table.csv cannot be read as a table .*; give another file by --csv"),
    ],
)
def test_a_file_that_is_no_table_of_the_sweep_is_left_alone(points, tmp_path, content, message):
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        points(seed=[0, 1])
    assert path.read_text() == content


def test_images_that_cannot_be_read_fail_their_point_alone(points, monkeypatch):
    def offline(cfg):
        raise OSError(f"{cfg.dataset} could not be downloaded")

    points(seed=0, dataset="shapes")
    monkeypatch.setattr(sweeps, "data_of", offline)
    failed, table = points(False, seed=0, dataset=["cifar10", "shapes"])
    assert failed == {"dataset=cifar10": "cifar10 could not be downloaded"}
    assert table.dataset.tolist() == ["shapes"]


@pytest.mark.parametrize("before", ["7", None])
def test_a_worker_keeps_its_threads_to_itself(monkeypatch, before):
    """It may live on, as a worker of the user's own cluster."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if before:
        monkeypatch.setenv("OMP_NUM_THREADS", before)
    seen = []
    monkeypatch.setattr(
        sweeps, "run_lesson", lambda *_, **__: seen.append(os.environ["OMP_NUM_THREADS"])
    )
    sweeps._work("01_baseline", ms.config("quick"), 10**6)
    assert seen == ["1"] and os.environ.get("OMP_NUM_THREADS") == before
