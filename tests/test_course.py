"""The lessons as a pipeline, through real papermill, on a network that takes seconds."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest

import mslib as ms
from mslib.course import lessons, results, stages
from mslib.course.cli import _lessons, main
from mslib.course.lessons import _alone, _parameters, store_lesson
from mslib.course.stages import NEEDS
from mslib.files import ROOT, write_json

from .conftest import kill_with_its_children

TINY = dict(
    depth=14,
    train_size=300,
    test_size=100,
    epochs=2,
    sparse_epochs=1,
    finetune_epochs=1,
    global_strength=0.02,
    masked_strength=0.05,
)


def flags(settings):
    return [word for name, value in settings.items() for word in ("-p", name, str(value))]


def command(settings, *words):
    start = [sys.executable, "-m", "mslib", "run", "--preset", "quick"]
    return [*start, *words, *flags(settings)]


def run(settings, *words):
    return subprocess.run(command(settings, *words), capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Lessons 00 to 08, run once by the command line with changed parameters."""
    runs = tmp_path_factory.mktemp("runs")
    done = run({**TINY, "runs": runs}, "--only", "0-8")
    assert done.returncode == 0, done.stderr
    return runs, done


def test_run_executes_all_lessons_and_ends_with_the_scoreboard(finished):
    runs, done = finished
    cfg = ms.config("quick", runs=str(runs), **TINY)
    for lesson in list(NEEDS)[:9]:
        copy = ms.stage(lesson, cfg) / f"{lesson}.ipynb"
        assert str(copy) in done.stdout
        cells = nbformat.read(copy, 4).cells
        assert all(c.execution_count for c in cells if c.cell_type == "code")
    assert "epoch 2/2" in done.stdout  # progress of the trainings inside the notebooks
    board = ms.scoreboard(ms.require(lesson, cfg) for lesson in list(NEEDS)[:8])
    board = board.set_index("network")
    whole = {"baseline", "dense, trained on as long"}
    for name in whole | {
        "masked: after the cut",
        "masked: fine-tuned",
        "global: fine-tuned",
        "scratch: same architecture",
    }:
        assert f"{board['top-1 %'][name]:.2f}" in done.stdout and name in done.stdout
        assert board["MACs left %"][name] <= (100 if name in whole else 50)
    assert {"GReg-2: fine-tuned", "feature flow, by stage: fine-tuned"} <= set(board.index)
    assert ms.stage("05_finetune", cfg).rows.epochs.unique().tolist() == [4]


def test_run_again_reuses_everything(finished, capsys):
    runs, _ = finished
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()}
    assert main(command({**TINY, "runs": runs}, "--only", "00-08")[3:]) == 0
    out = capsys.readouterr().out
    assert out.count("finished before, reused") == 9 and "masked: fine-tuned" in out
    assert before == {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()}


def test_finished_lessons_become_a_reference(finished, tmp_path, monkeypatch):
    runs, _ = finished
    cfg = ms.config("quick", runs=str(runs), **TINY)
    monkeypatch.setattr(results, "tables", lambda: tmp_path)
    results.keep_reference("tiny-quick", cfg, list(NEEDS)[:8])
    kept, folder = ms.reference("tiny"), tmp_path / "reference" / "tiny-quick"
    assert list(kept) == list(NEEDS)[:8] and (folder / "result.png").exists()
    weights = [p.parent.name for p in tmp_path.rglob("model.pt")]
    assert weights == ["baseline"]  # no others
    assert kept["05_finetune"].rows.equals(ms.stage("05_finetune", cfg).rows)
    with pytest.raises(FileNotFoundError, match="no lesson of this run is finished, 01_baseline"):
        results.keep_reference("other", ms.config("quick", runs=str(tmp_path)), ["01_baseline"])


def test_finished_stages_can_be_carried_to_another_place(finished, tmp_path):
    """Copies of lessons 01 and 02 elsewhere: lesson 03 takes them up, trains nothing again."""
    runs, _ = finished
    cfg = ms.config("quick", runs=str(tmp_path), **TINY)
    here = ms.config("quick", runs=str(runs), **TINY)
    for lesson in ("01_baseline", "02_global_sparsity"):
        target = ms.stage(lesson, cfg).path
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", ms.stage(lesson, here).path, target], check=True)
    said = []
    found = ms.require("03_masked_regularization", cfg, said.append)
    assert not any("baseline" in line or "global" in line for line in said)
    assert any("masked" in line for line in said)
    first = ms.stage("03_masked_regularization", here)
    name = "masked: before the cut"
    assert found.top1(name) == first.top1(name)


def test_two_processes_that_want_one_stage_run_it_once(tmp_path):
    settings = {**TINY, "runs": tmp_path}
    words = command(settings, "--only", "1")
    both = [
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    text = "".join(out for out, _ in outs)
    assert text.count("epoch 1/2") == 1 and text.count("finished before, reused") == 1


def test_a_stage_is_held_by_one_and_the_other_is_told(tmp_path):
    stage, said = ms.stage("01_baseline", ms.config("quick", runs=str(tmp_path))), []
    with _alone(stage, said.append):
        assert said == [] and not (stage / "metrics.json").exists()
        script = (
            "import mslib as ms, sys; from mslib.course.lessons import _alone\n"
            f"stage = ms.stage('01_baseline', ms.config('quick', runs={str(tmp_path)!r}))\n"
            "with _alone(stage, lambda line: print(line, flush=True)): print('mine')"
        )
        other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert "another process is running it; waiting" in other.stdout.readline()
    assert other.communicate(timeout=60)[0] == "mine\n"


def test_papermill_by_hand(tmp_path):
    """A lesson with parameters of its own, and others by `overrides`."""
    source, out = ROOT / "notebooks" / "01_baseline.ipynb", tmp_path / "out.ipynb"
    others = {k: v for k, v in TINY.items() if k != "epochs"} | {"runs": str(tmp_path / "runs")}
    given = {"preset": "quick", "epochs": 1, "overrides": others}
    how = dict(kernel_name="python3", progress_bar=False, cwd=str(tmp_path))
    papermill.execute_notebook(str(source), str(out), given, **how)
    assert "epochs           1 " in json.dumps(nbformat.read(out, 4))
    (metrics,) = (tmp_path / "runs").rglob("metrics.json")
    settings = json.loads(metrics.read_text())["settings"]
    assert settings["epochs"] == 1 and settings["train_size"] == TINY["train_size"]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"epoch": 1}, "unknown setting 'epoch'; did you mean 'epochs'"),
        ({"batch_size": 8}, "'batch_size' is no parameter of this lesson by itself; give it in"),
    ],
)
def test_papermill_refuses_what_the_lesson_would_not_read(tmp_path, given, message):
    source = str(ROOT / "notebooks" / "00_start_here.ipynb")
    how = dict(kernel_name="python3", progress_bar=False, cwd=str(tmp_path))
    with pytest.raises(papermill.PapermillExecutionError, match=re.escape(message)):
        papermill.execute_notebook(source, str(tmp_path / "out.ipynb"), given, **how)


@pytest.mark.parametrize("lesson", NEEDS)
def test_every_setting_reaches_every_lesson(lesson, tmp_path):
    """By name where the parameter cell lists it, else in `overrides`."""
    cfg = ms.config("quick", seed=3, batch_size=8, runs=str(tmp_path))
    given = _parameters(lesson, cfg)
    others = given["overrides"]
    assert others["batch_size"] == 8 and others["runs"] == str(tmp_path)
    assert ("seed" in given) != ("seed" in others)
    assert {k: v for k, v in given.items() if k != "overrides"} | others == {
        "preset": "quick",
        **cfg.overrides(),
    }


def test_lessons_by_number():
    assert _lessons("3") == _lessons("03") == ["03_masked_regularization"]
    assert _lessons("1-5") == _lessons("01-5") == _lessons("01-05") == list(NEEDS)[1:6]
    assert _lessons("00-99") == list(NEEDS)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--preset", "quik"], "did you mean 'quick'"),
        (["-p", "epoch", "3"], "did you mean 'epochs'"),
        (["-p", "lr", "-1e-3"], "lr=-0.001: must be above 0"),
        (["-p", "lr", "-inf"], "lr=-inf: expected a finite number"),
        (["-p", "lr", "1e999"], "lr=inf: expected a finite number"),
        (["-p", "lr", "nan"], "lr=nan: expected a finite number"),
        (["-p", "lr", "1", "-p", "lr", "2"], "-p lr is given twice, 1 and 2"),
        (["-p", "dataset", "nowhere.zip"], "'nowhere.zip' is none of"),
        (["--only", "77"], "no such lesson"),
        (["--only", "5-1"], "no such lesson"),
        (["--only", "first"], "--only first: expected lessons by number, such as 03 or 01-05"),
        (["--preset", "quick", "--only", "0", "-p", "runs", "/proc/runs"], "choose another folder"),
    ],
)
def test_command_line_errors_are_one_line(words, message, capsys):
    assert main(["run", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_run_killed_with_its_kernel_goes_on(tmp_path):
    settings = {**TINY, "epochs": 4, "train_size": 1200, "runs": tmp_path}
    process = subprocess.Popen(
        command(settings, "--only", "01"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.rglob("epoch-0002.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    kill_with_its_children(process)
    assert list(tmp_path.rglob("epoch-*.pt")) and not list(tmp_path.rglob("metrics.json"))
    done = run(settings, "--only", "01")
    assert done.returncode == 0 and "epoch 4/4" in done.stdout and "epoch 1/4" not in done.stdout
    cfg = ms.config("quick", **settings | {"runs": str(tmp_path)})
    assert ms.stage("01_baseline", cfg).history("baseline").epoch.tolist() == [1, 2, 3, 4]


def test_storing_a_lesson_from_runs_on_another_file_system(tmp_path, monkeypatch):
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system only")
    cells = [nbformat.v4.new_code_cell("print(1 + 1)"), nbformat.v4.new_markdown_cell("two")]
    path = tmp_path / "notebooks" / "00_start_here.ipynb"
    path.parent.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    monkeypatch.setattr(lessons, "ROOT", tmp_path)
    runs = memory / f"mslib-{os.getpid()}"
    try:
        store_lesson("00_start_here", ms.config("quick", runs=str(runs)), lambda line: None)
    finally:
        subprocess.run(["rm", "-rf", runs], check=True)
    stored = nbformat.read(path, 4)
    assert stored.cells[0].outputs[0].text == "2\n" and "papermill" not in stored.metadata
    assert stored.metadata.kernelspec.display_name == "Python 3 (ipykernel)"


@pytest.mark.parametrize("words", [["run"], ["sweep"], ["store"], ["bench"], ["stamp"]])
def test_without_a_checkout_commands_say_what_they_need(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "is_checkout", lambda: False)
    monkeypatch.setattr("mslib.course.cli.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2 and not list(tmp_path.iterdir())
    assert "which the installed package does not hold" in capsys.readouterr().err
    cfg = ms.config("quick", runs="mine")
    with pytest.raises(FileNotFoundError, match="lesson 01_baseline needs the course's notebooks"):
        ms.require("01_baseline", cfg)
    assert ms.stage("01_baseline", cfg).path.is_relative_to(tmp_path)


def test_help_and_figures_change_nothing():
    """--help loads no library of figures; figures leave the defaults of matplotlib alone."""
    script = (
        "import sys, mslib as ms\n"
        "from mslib.course.cli import _parser\n"
        "_parser().format_help()\n"
        "assert not {'matplotlib', 'seaborn', 'papermill', 'pydantic'} & sys.modules.keys()\n"
        "import matplotlib; matplotlib.use('agg'); before = dict(matplotlib.rcParams)\n"
        "figure, axes = ms.plots.figure('title')\n"
        "figure.canvas.draw()\n"
        "assert dict(matplotlib.rcParams) == before and figure.dpi == 150\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_what_is_left_is_counted_from_the_own_baseline(tmp_path):
    names = {"baseline": 100, "masked": 50, "VGG: baseline": 40, "VGG, cut": 10, "flow": 30}
    entries = [
        {"name": n, "top1": 90.0, "macs": m * 10**6, "params": 2 * m, "epochs": 1}
        for n, m in names.items()
    ]
    found = [stages.Results("x", tmp_path / str(i), {}) for i in range(2)]
    for part, rows in zip(found, (entries[:1], entries[1:])):
        write_json(part / "metrics.json", {"rows": rows, "settings": {}})
    assert ms.scoreboard(found)["MACs left %"].tolist() == [100, 50, 100, 25, 30]
    assert ms.scoreboard(found)["params left %"].tolist() == [100, 50, 100, 25, 30]
    assert ms.scoreboard(found[1:])["MACs left %"].tolist() == [100, 100, 25, 60]
