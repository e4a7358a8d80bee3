"""The lessons as a pipeline, through real papermill, on a network so small that it takes seconds."""

import json
import re
import subprocess
import sys
import time

import nbformat
import papermill
import pytest

import mslib as ms
from mslib.course import stages as course
from mslib.course.cli import main
from mslib.course.stages import NEEDS
from mslib.files import ROOT, write_json

from .conftest import kill_with_its_children

TINY = dict(
    depth=14,
    train_size=400,
    test_size=100,
    epochs=2,
    sparse_epochs=1,
    finetune_epochs=1,
    global_strength=0.02,
    masked_strength=0.05,
    own_epochs=1,
    own_sparse_epochs=1,
    own_finetune_epochs=1,
)


def flags(settings):
    return [word for name, value in settings.items() for word in ("-p", name, str(value))]


def mslib(*words, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "mslib", *words], capture_output=True, text=True, cwd=ROOT, **kwargs
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All lessons, run once by the command line with changed parameters."""
    runs = tmp_path_factory.mktemp("runs")
    done = mslib("run", "--preset", "quick", *flags({**TINY, "runs": runs}))
    assert done.returncode == 0, done.stderr
    return runs, done


def test_run_executes_all_lessons_and_ends_with_the_scoreboard(finished):
    runs, done = finished
    cfg = ms.config("quick", runs=str(runs), **TINY)
    for lesson in NEEDS:
        copy = ms.stage(lesson, cfg) / f"{lesson}.ipynb"
        assert str(copy) in done.stdout
        cells = nbformat.read(copy, 4).cells
        assert all(c.execution_count for c in cells if c.cell_type == "code")
    assert "epoch 2/2" in done.stdout  # progress of the trainings inside the notebooks
    board = ms.scoreboard([ms.stage(lesson, cfg) for lesson in NEEDS])
    for name in (
        "baseline",
        "masked: after the cut",
        "masked: fine-tuned",
        "global: fine-tuned",
        "scratch: same architecture",
        "dense, trained on as long",
    ):
        row = board.set_index("network").loc[name]
        assert f"{row['top-1 %']:.2f}" in done.stdout and name in done.stdout
        assert row["MACs left %"] <= (
            100 if name in ("baseline", "dense, trained on as long") else 50
        )
    assert {
        "GReg-2: fine-tuned",
        "feature flow, by stage: fine-tuned",
        "resnet18: pruned, fine-tuned",
    } <= set(board.network)
    assert board.set_index("network")["MACs left %"]["resnet18: baseline"] == 100  # of its own
    assert ms.stage("05_finetune", cfg).rows.epochs.unique().tolist() == [4]


def test_run_again_reuses_everything(finished):
    runs, _ = finished
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()}
    done = mslib("run", "--preset", "quick", *flags({**TINY, "runs": runs}))
    assert (
        done.returncode == 0
        and done.stdout.count("finished before, reused") == len(NEEDS)
        and "masked: fine-tuned" in done.stdout
    )
    assert before == {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()}


def test_finished_lessons_become_a_reference(finished, tmp_path, monkeypatch):
    runs, _ = finished
    cfg = ms.config("quick", runs=str(runs), **TINY)
    monkeypatch.setattr(course, "REFERENCE", tmp_path)
    course.keep_reference("tiny-quick", cfg, NEEDS)
    kept = ms.reference("tiny")
    assert list(kept) == list(NEEDS) and (tmp_path / "tiny-quick" / "result.png").exists()
    assert [p.parent.name for p in tmp_path.rglob("model.pt")] == [
        "baseline"
    ]  # of the weights no others
    assert kept["05_finetune"].rows.equals(ms.stage("05_finetune", cfg).rows)
    with pytest.raises(FileNotFoundError, match="no lesson of this run is finished, 01_baseline"):
        course.keep_reference("other", ms.config("quick", runs=str(tmp_path)), ["01_baseline"])


def test_finished_stages_can_be_carried_to_another_place(finished, tmp_path):
    """A copy of the folders of lessons 01 and 02 elsewhere: lesson 03 takes them up and trains nothing again."""
    runs, _ = finished
    cfg = ms.config("quick", runs=str(tmp_path), **TINY)
    here = ms.config("quick", runs=str(runs), **TINY)
    for lesson in ("01_baseline", "02_global_sparsity"):
        subprocess.run(["cp", "-r", ms.stage(lesson, here).path, tmp_path / "carried"], check=True)
        ms.stage(lesson, cfg).path.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "carried").rename(ms.stage(lesson, cfg).path)
    said = []
    from mslib.course.stages import run_lesson

    run_lesson("03_masked_regularization", cfg, said.append)
    assert not any("baseline" in line or "global" in line for line in said) and any(
        "masked" in line for line in said
    )
    first, again = (
        ms.stage("03_masked_regularization", c).top1("masked: before the cut") for c in (here, cfg)
    )
    assert first == again


def test_require_runs_missing_lessons(tmp_path):
    cfg = ms.config("quick", runs=str(tmp_path), **TINY | dict(epochs=1, train_size=300))
    found = ms.require("02_global_sparsity", cfg)
    assert found.finished and ms.stage("01_baseline", cfg).finished and found.masks()
    assert (
        found.model("global").recipe["depth"] == TINY["depth"] and len(found.history("global")) == 1
    )


def test_papermill_by_hand(tmp_path):
    """As in the README: a lesson with parameters of its own."""
    out = tmp_path / "out.ipynb"
    papermill.execute_notebook(
        str(ROOT / "notebooks" / "01_baseline.ipynb"),
        str(out),
        {"preset": "quick", "runs": str(tmp_path / "runs"), **TINY, "epochs": 1},
        kernel_name="python3",
        progress_bar=False,
        cwd=str(tmp_path),
    )
    assert "epochs           1 " in json.dumps(nbformat.read(out, 4))
    (stage,) = (tmp_path / "runs" / "quick").iterdir()
    assert json.loads((stage / "metrics.json").read_text())["settings"]["epochs"] == 1


def test_papermill_refuses_a_mistyped_parameter(tmp_path):
    with pytest.raises(
        papermill.PapermillExecutionError, match="unknown setting 'epoch'; did you mean 'epochs'"
    ):
        papermill.execute_notebook(
            str(ROOT / "notebooks" / "01_baseline.ipynb"),
            str(tmp_path / "out.ipynb"),
            {"preset": "quick", "epoch": 1},
            kernel_name="python3",
            progress_bar=False,
            cwd=str(tmp_path),
        )


@pytest.mark.parametrize(
    "words, message",
    [
        (["--preset", "quik"], "did you mean 'quick'"),
        (["-p", "epoch", "3"], "did you mean 'epochs'"),
        (["-p", "dataset", "nowhere.zip"], "'nowhere.zip' is none of"),
        (["--only", "77"], "no such lesson"),
        (
            ["--preset", "quick", "--only", "00", "-p", "runs", "/proc/runs"],
            "choose a folder|choose another folder",
        ),
    ],
)
def test_command_line_errors_are_one_line(words, message, capsys):
    assert main(["run", *words]) != 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.search(message, line), line


def test_a_run_killed_with_its_kernel_goes_on(tmp_path):
    settings = {**TINY, "epochs": 6, "train_size": 2000, "runs": tmp_path}
    command = [
        sys.executable,
        "-m",
        "mslib",
        "run",
        "--preset",
        "quick",
        "--only",
        "01",
        *flags(settings),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("epoch-0002.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    kill_with_its_children(process)
    kept = list(tmp_path.rglob("epoch-*.pt"))
    assert kept and not list(tmp_path.rglob("metrics.json"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "epoch 6/6" in done.stdout and "epoch 1/6" not in done.stdout
    cfg = ms.config("quick", **{**TINY, "epochs": 6, "train_size": 2000, "runs": str(tmp_path)})
    assert ms.stage("01_baseline", cfg).history("baseline").epoch.tolist() == [1, 2, 3, 4, 5, 6]


def test_what_is_left_is_counted_from_the_own_baseline(tmp_path):
    rows = [
        ("baseline", 100),
        ("masked", 50),
        ("VGG: baseline", 40),
        ("VGG, cut", 10),
        ("flow", 30),
    ]
    entries = [
        {"name": n, "top1": 90.0, "macs": m * 10**6, "params": 2 * m, "epochs": 1} for n, m in rows
    ]
    stages = [course.Stage("x", tmp_path / str(i), {}) for i in range(2)]
    for found, part in zip(stages, (entries[:1], entries[1:])):
        write_json(found / "metrics.json", {"rows": part})
    assert ms.scoreboard(stages)["MACs left %"].tolist() == [100, 50, 100, 25, 30]
    assert ms.scoreboard(stages)["params left %"].tolist() == [100, 50, 100, 25, 30]
    assert ms.scoreboard(stages[1:])["MACs left %"].tolist() == [100, 100, 25, 60]
