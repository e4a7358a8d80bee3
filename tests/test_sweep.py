"""Sweeps through real papermill and real Dask processes, on a network that takes seconds."""

import os
import subprocess
import sys
import time

import pandas as pd
import pytest
import yaml
from distributed import LocalCluster

import mslib as ms
from mslib.course import sweeps
from mslib.course.cli import main
from mslib.course.sweeps import grid
from mslib.files import ROOT, read_json

from .conftest import kill_with_its_children

SMALL = dict(
    depth=8,
    train_size=200,
    test_size=100,
    epochs=1,
    sparse_epochs=1,
    global_strength=[0.01, 0.02],
    seed=[0, 1],
)


def command(runs, *words, **settings):
    given = {**SMALL, **settings, "runs": runs}
    lists = {name: v if isinstance(v, list) else [v] for name, v in given.items()}
    flags = [str(word) for name, values in lists.items() for word in ("-p", name, *values)]
    lesson = () if "--lesson" in words else ("--lesson", "02")
    start = [sys.executable, "-m", "mslib", "sweep"]
    return [*start, *words, "--preset", "quick", *lesson, *flags]


def run(*args, **settings):
    return subprocess.run(command(*args, **settings), capture_output=True, text=True, cwd=ROOT)


def finished(runs):
    return {path: path.stat().st_mtime_ns for path in runs.rglob("metrics.json")}


def table(runs, name="sweep-02_global_sparsity"):
    return pd.read_csv(runs / "quick" / f"{name}.csv")


def test_grid_is_every_combination_in_order():
    assert grid({"seed": [0, 1], "depth": 8, "lr": [0.1, 0.2]}) == [
        {"seed": 0, "depth": 8, "lr": 0.1},
        {"seed": 0, "depth": 8, "lr": 0.2},
        {"seed": 1, "depth": 8, "lr": 0.1},
        {"seed": 1, "depth": 8, "lr": 0.2},
    ]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a sweep that was killed in the middle, and started again."""
    runs = tmp_path_factory.mktemp("sweep")
    with open(runs / "log", "w") as out:
        words = command(runs, "-j", "2")
        sweep = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 600
    while len(finished(runs)) < 3 and time.monotonic() < deadline and sweep.poll() is None:
        time.sleep(0.05)
    kill_with_its_children(sweep)
    before = finished(runs)
    assert 3 <= len(before) < 6, (runs / "log").read_text()  # of two baselines and four points
    again = run(runs, "-j", "2")
    assert again.returncode == 0, again.stderr
    return runs, before


def test_a_sweep_killed_in_the_middle_goes_on_where_it_was(killed):
    runs, before = killed
    after = finished(runs)
    assert len(after) == 6 and before.items() <= after.items()  # nothing lost, nothing repeated
    rows = table(runs)
    points = list(zip(rows.global_strength, rows.seed))
    assert points == [(0.01, 0), (0.01, 1), (0.02, 0), (0.02, 1)]
    for row in rows.itertuples():
        point = {"global_strength": row.global_strength, "seed": int(row.seed)}
        cfg = ms.config("quick", **SMALL | point | {"runs": str(runs)})
        found = ms.stage("02_global_sparsity", cfg)
        assert found.rows.top1.iloc[-1] == pytest.approx(row.top1)
        assert found.metrics["share_kept"] == pytest.approx(row.share_kept)


def test_a_damaged_result_leaves_the_other_points_alone(killed, capsys):
    """And a sweep that is finished runs nothing again."""
    runs, _ = killed
    cfg = ms.config("quick", **SMALL | {"global_strength": 0.01, "seed": 0, "runs": str(runs)})
    path = ms.stage("02_global_sparsity", cfg) / "metrics.json"
    whole, before = path.read_text(), finished(runs)
    path.write_text(whole[:100])
    assert main(command(runs)[3:]) == 1
    err = capsys.readouterr().err
    assert "3 points, 3 finished before; 0 runs to do" in err
    assert f"failed: global_strength=0.01, seed=0: {path} cannot be read" in err
    assert len(table(runs)) == 3
    path.write_text(whole)
    assert main(command(runs)[3:]) == 0 and len(table(runs)) == 4
    assert finished(runs).keys() == before.keys()


def test_a_file_and_workers_of_a_dask_scheduler_make_the_same_table(killed, tmp_path):
    only = {"global_strength": "2e-2", "seed": 0, "runs": str(tmp_path)}  # 2e-2: text in YAML
    file = tmp_path / "mine.yml"
    file.write_text(yaml.safe_dump({"lesson": 2, "preset": "quick", **SMALL, **only}))
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        words = [str(file), "--scheduler", cluster.scheduler_address, "-j", "2"]
        start = [sys.executable, "-m", "mslib", "sweep"]
        done = subprocess.run([*start, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    here = table(killed[0]).query("seed == 0 and global_strength == 0.02").reset_index(drop=True)
    columns = [name for name in here if name not in ("minutes", "date")]
    pd.testing.assert_frame_equal(table(tmp_path, "mine")[columns], here[columns])


def test_a_failed_point_is_reported_and_the_others_end(tmp_path):
    done = run(tmp_path, reduction=[0.5, 0.99], global_strength=0.01, seed=0)
    assert done.returncode == 1
    assert "failed: reduction=0.99: ValueError: reduction 0.99 is out of reach" in done.stderr
    assert table(tmp_path).reduction.tolist() == [0.5]


@pytest.mark.parametrize(
    "words, message",
    [
        (("-p", "sed", "1"), "unknown setting 'sed'; did you mean 'seed'"),
        (("-p", "seed", "-p", "lr", "0.1"), "-p seed: expected one or more values"),
        (("-p", "lr", "0.1", "-1e-3"), "lr=-0.001: must be above 0"),
        (("-p", "finetune_lr", "0.1", "0.2"), "finetune_lr: lesson 02_global_sparsity does not"),
        (
            ("--lesson", "09", "-p", "depth", "8", "14"),
            "lesson 09_your_own_network does not depend on it",
        ),
        (("--lesson", "77"), "unknown lesson '77'"),
        (("-j", "0"), "-j 0: expected a whole number of processes"),
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


def test_readmes_sweep_at_full_ends_at_the_macs_asked_for(tmp_path):
    """The command behind the paper's headline, with what a processor can do; and once more."""
    images = ms.image_folder("shapes", tmp_path / "images", sizes=(120, 60))
    short = dict(epochs=2, sparse_epochs=1, finetune_epochs=1, batch_size=32)
    small = dict(dataset=str(images), image_size=16, depth=14, reduction=0.6303, **short)
    given = {**small, "runs": tmp_path / "runs"}
    flags = [str(word) for pair in given.items() for word in ("-p", *pair)]
    words = ["sweep", "--lesson", "05", "--preset", "full", *flags]
    start = [sys.executable, "-m", "mslib"]
    done = subprocess.run([*start, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "runs" / "full" / "sweep-05_finetune.csv"
    (row,) = pd.read_csv(path).itertuples()
    cfg = ms.config("full", **small, runs=str(tmp_path / "runs"))
    assert row.macs <= (1 - 0.6303) * ms.stage("01_baseline", cfg).rows.macs[0]
    assert row.epochs == 4
    made = [read_json(p) for p in (tmp_path / "runs").rglob("settings.json")]
    assert {m["schedule"] for m in made} == {"step"}
    assert sorted(m["epochs"] for m in made) == [1] * 7 + [2, 4]
    before = finished(tmp_path)
    assert main(words) == 0 and finished(tmp_path) == before
