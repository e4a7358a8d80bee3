"""Sweeps through real papermill and real Dask processes, on a network so small that a run takes seconds."""

import subprocess
import sys
import time

import pandas as pd
import pytest
import yaml
from distributed import LocalCluster

import mslib as ms
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
    lists = {
        k: v if isinstance(v, list) else [v] for k, v in {**SMALL, **settings, "runs": runs}.items()
    }
    flags = [str(word) for name, values in lists.items() for word in ("-p", name, *values)]
    return [
        sys.executable,
        "-m",
        "mslib",
        "sweep",
        *words,
        "--preset",
        "quick",
        *(() if "--lesson" in words else ("--lesson", "02")),
        *flags,
    ]


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
    """The folder of a sweep that was killed in the middle, started again, and started a third time."""
    runs = tmp_path_factory.mktemp("sweep")
    with open(runs / "log", "w") as out:
        sweep = subprocess.Popen(
            command(runs, "-j", "2"), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + 300
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
    assert (
        len(after) == 6 and before.items() <= after.items()
    )  # nothing lost, nothing repeated, each baseline once
    rows = table(runs)
    assert list(zip(rows.global_strength, rows.seed)) == [
        (0.01, 0),
        (0.01, 1),
        (0.02, 0),
        (0.02, 1),
    ]
    for _, row in rows.iterrows():
        cfg = ms.config(
            "quick",
            **(
                SMALL
                | {"global_strength": row.global_strength, "seed": int(row.seed), "runs": str(runs)}
            ),
        )
        found = ms.stage("02_global_sparsity", cfg)
        assert found.rows.top1.iloc[-1] == pytest.approx(row.top1) and found.metrics[
            "share_kept"
        ] == pytest.approx(row.share_kept)
    third = run(runs, "-j", "2")
    assert (
        third.returncode == 0
        and "4 finished before; 0 runs to do" in third.stderr
        and finished(runs) == after
    )


def test_a_file_and_two_workers_of_a_dask_scheduler_make_the_same_table(killed, tmp_path):
    settings = {"lesson": 2, "preset": "quick", **SMALL, "seed": 0, "runs": str(tmp_path)}
    (tmp_path / "mine.yml").write_text(yaml.safe_dump(settings, sort_keys=False))
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        words = [
            "sweep",
            str(tmp_path / "mine.yml"),
            "--scheduler",
            cluster.scheduler_address,
            "-j",
            "2",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "mslib", *words], capture_output=True, text=True, cwd=ROOT
        )
    assert done.returncode == 0, done.stderr
    columns = [
        "global_strength",
        "seed",
        "network",
        "top1",
        "macs",
        "params",
        "epochs",
        "share_kept",
        "shrink_on_kept",
    ]
    here = table(killed[0])
    pd.testing.assert_frame_equal(
        table(tmp_path, "mine")[columns], here[here.seed == 0].reset_index(drop=True)[columns]
    )


def test_a_failed_point_is_reported_and_the_others_end(tmp_path):
    done = run(tmp_path, reduction=[0.5, 0.99], global_strength=0.01, seed=0)
    assert done.returncode == 1
    assert "failed: reduction=0.99: ValueError: reduction 0.99 is out of reach" in done.stderr
    assert table(tmp_path).reduction.tolist() == [0.5]


def test_bad_sweeps_are_refused_before_anything_runs(tmp_path, capsys):
    broken = tmp_path / "broken.yml"
    broken.write_text("seed: [0, 1")
    for words, message in (
        (("-p", "sed", "1"), "unknown setting 'sed'; did you mean 'seed'"),
        (("-p", "seed", "-p", "lr", "0.1"), "-p seed: expected one or more values"),
        (("--lesson", "77"), "unknown lesson '77'"),
        ((str(tmp_path / "none.yml"),), "none.yml"),
        ((str(broken),), "broken.yml is not valid YAML: "),
    ):
        assert main(command(tmp_path, *words)[3:]) == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [broken]


def test_readmes_sweep_at_full_ends_at_the_macs_asked_for(tmp_path):
    """The command behind the paper's headline, with a network, images and epochs that a processor can do."""
    images = ms.image_folder("shapes", tmp_path / "images", sizes=(200, 100))
    small = dict(
        dataset=str(images),
        depth=14,
        epochs=2,
        sparse_epochs=1,
        finetune_epochs=1,
        batch_size=32,
        reduction=0.6303,
    )
    flags = [
        str(word) for pair in {**small, "runs": tmp_path / "runs"}.items() for word in ("-p", *pair)
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mslib", "sweep", "--lesson", "05", "--preset", "full", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    (row,) = pd.read_csv(tmp_path / "runs" / "full" / "sweep-05_finetune.csv").itertuples()
    cfg = ms.config("full", **small, runs=str(tmp_path / "runs"))
    assert row.macs <= (1 - 0.6303) * ms.stage("01_baseline", cfg).rows.macs[0] and row.epochs == 4
    made = [read_json(path) for path in (tmp_path / "runs").rglob("settings.json")]
    assert {m["schedule"] for m in made} == {"step"} and sorted(m["epochs"] for m in made) == [
        1
    ] * 7 + [2, 4]
