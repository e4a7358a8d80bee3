"""The lessons as a pipeline, through real papermill, on a network that takes seconds."""

import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import torch
import yaml

import mslib as ms
from mslib.course import lessons, results, stages
from mslib.course.cli import _lessons, main
from mslib.course.lessons import _alone, _parameters, store_lesson
from mslib.course.stages import NEEDS
from mslib.files import ROOT, read_json, write_json

from . import trainings
from .conftest import kill_with_its_children

TINY = dict(
    image_size=16,
    depth=14,
    batch_size=32,
    epochs=4,
    sparse_epochs=1,
    finetune_epochs=1,
    reduction=0.6303,
    growing_epochs=1,
    global_strength=0.02,
    masked_strength=0.05,
)
KILLS = min(20, int(os.environ.get("MSLIB_TRIALS", 1)))


def flags(settings):
    return [word for name, value in settings.items() for word in ("-p", name, str(value))]


def command(settings, *words):
    start = [sys.executable, "-m", "mslib", "run", "--preset", "full"]
    return [*start, *words, *flags(settings)]


def run(settings, *words):
    return subprocess.run(command(settings, *words), capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The settings of short lessons at the preset full, on a folder of drawn images."""
    images = tmp_path_factory.mktemp("images") / "shapes"
    return TINY | {"dataset": str(ms.image_folder("shapes", images, 16, (160, 60)))}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """Lessons 01 to 08, run once by the command line with changed parameters."""
    runs = tmp_path_factory.mktemp("runs")
    done = run({**tiny, "runs": runs}, "--only", "1-8")
    assert done.returncode == 0, done.stderr
    return runs, done


def test_run_executes_all_lessons_and_ends_with_the_scoreboard(finished, tiny):
    runs, done = finished
    cfg = ms.config("full", runs=str(runs), **tiny)
    for lesson in list(NEEDS)[1:9]:
        copy = ms.stage(lesson, cfg) / f"{lesson}.ipynb"
        assert str(copy) in done.stdout
        cells = nbformat.read(copy, 4).cells
        assert all(c.execution_count for c in cells if c.cell_type == "code")
    assert "epoch 4/4" in done.stdout  # progress of the trainings inside the notebooks
    board = ms.scoreboard(ms.require(lesson, cfg) for lesson in list(NEEDS)[1:8])
    board = board.set_index("network")
    whole = {"baseline", "dense, trained on as long"}
    for name in whole | {
        "masked: after the cut",
        "masked: fine-tuned",
        "global: fine-tuned",
        "scratch: same architecture",
    }:
        assert f"{board['top-1 %'][name]:.2f}" in done.stdout and name in done.stdout
        assert board["MACs left %"][name] <= (100 if name in whole else 36.97)
    assert {"GReg-2: fine-tuned", "feature flow: fine-tuned"} <= set(board.index)
    assert ms.stage("05_finetune", cfg).rows.epochs.unique().tolist() == [6]


def test_lesson_10_repairs_each_relative_where_it_is_asked_to(tiny, tmp_path):
    """As the sweep behind its table does, at settings that are not those of the stored lesson."""
    more = dict(family_depth=14, family_epochs=1, family_repair=1, runs=tmp_path, width=0.5)
    done = run(tiny | more, "--only", "10")
    assert done.returncode == 0, done.stderr
    (metrics,) = (read_json(path) for path in tmp_path.rglob("metrics.json"))
    rows = {row["name"]: row for row in metrics["rows"]}
    tried = {name.removesuffix(": final") for name in rows if name.endswith(": final")}
    assert len(tried) == 12  # ten relatives and two controls, all of them cut as far
    for name in tried:
        assert rows[f"{name}: final"]["macs"] <= (1 - 0.6303) * rows["baseline"]["macs"]
        assert rows[f"{name}: final"]["epochs"] == 4 + 1 + 1
        assert metrics[f"{name}: final, test"] == rows[f"{name}: final"]["top1"]


def test_the_table_of_lesson_10_has_every_relative_with_three_seeds():
    table = pd.read_csv(ROOT / "data" / "reference" / "family-shapes.csv")
    swept = yaml.safe_load((ROOT / "data" / "reference" / "family-shapes.yml").read_text())
    assert table.seed.tolist() == swept.pop("seed") and len(table) == 3
    for name in swept.keys() - {"lesson", "preset"}:
        assert (table[name] == swept[name]).all()  # what it says is how it was measured
    usual = ms.config("quick", **{k: v for k, v in swept.items() if k not in ("lesson", "preset")})
    longer = {"family_epochs", "family_repair", "runs"}
    assert usual.overrides().keys() <= longer  # its strengths are those of the lesson
    tests = table[[column for column in table if column.endswith(": final, test")]]
    assert tests.shape[1] == 12 and tests.notna().all(axis=None)
    assert table.filter(like=": folded").notna().all(axis=None)


def test_run_again_reuses_everything(finished, tiny, capsys):
    runs, _ = finished
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()}
    assert main(command({**tiny, "runs": runs}, "--only", "01-08")[3:]) == 0
    out = capsys.readouterr().out
    assert out.count("finished before, reused") == 8 and "masked: fine-tuned" in out
    assert before == {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()}


def test_readmes_sweep_at_full_ends_at_the_macs_asked_for(finished, tiny):
    """The command behind the paper's headline, over a point that `run` has finished."""
    runs, _ = finished
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("metrics.json")}
    words = flags({**tiny, "runs": runs})
    assert main(["sweep", "--lesson", "05", "--preset", "full", *words]) == 0
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("metrics.json")} == before
    (row,) = pd.read_csv(runs / "full" / "sweep-05_finetune.csv").itertuples()
    cfg = ms.config("full", runs=str(runs), **tiny)
    assert row.macs <= (1 - 0.6303) * ms.stage("01_baseline", cfg).rows.macs[0]
    assert row.epochs == 4 + 1 + 1
    made = []
    for lesson in list(NEEDS)[1:6]:
        made += [read_json(p) for p in ms.stage(lesson, cfg).path.rglob("settings.json")]
    assert {m["schedule"] for m in made} == {"step"}
    # repair only and brief have the epochs of preparing and repairing together; scratch all
    assert sorted(m["epochs"] for m in made) == [1] * 9 + [2, 2, 4, 6]


def test_finished_lessons_become_a_reference(finished, tiny, tmp_path, monkeypatch):
    runs, _ = finished
    cfg = ms.config("full", runs=str(runs), **tiny)
    monkeypatch.setattr(results, "tables", lambda: tmp_path)
    results.keep_reference("tiny-full", cfg, list(NEEDS)[1:8])
    kept, folder = ms.reference("tiny"), tmp_path / "reference" / "tiny-full"
    assert list(kept) == list(NEEDS)[1:8] and (folder / "result.png").exists()
    weights = [p.parent.name for p in tmp_path.rglob("model.pt")]
    assert weights == ["baseline"]  # no others
    assert kept["05_finetune"].rows.equals(ms.stage("05_finetune", cfg).rows)
    nowhere = ms.config("quick", runs=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no lesson of this run is finished, 01_baseline"):
        results.keep_reference("other", nowhere, ["01_baseline"])


def recorded(runs, *lessons, **settings):
    """The configuration of lessons that are finished without anything having been trained."""
    cfg = ms.config("quick", runs=str(runs), **settings)
    for lesson in lessons:
        ms.stage(lesson, cfg).finish()
        (ms.stage(lesson, cfg) / "baseline").mkdir()
        (ms.stage(lesson, cfg) / "baseline" / "model.pt").touch()
    return cfg


def test_a_reference_is_of_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "tables", lambda: tmp_path)
    two = ["01_baseline", "02_global_sparsity"]
    results.keep_reference("mine", recorded(tmp_path / "a", *two), two)
    other = recorded(tmp_path / "b", *two, seed=1, sparse_epochs=7)
    message = r"mine.01_baseline is of a run with other settings: seed=0 \(now 1\); choose another"
    with pytest.raises(ValueError, match=message):
        results.keep_reference("mine", other, two)
    third = recorded(tmp_path / "c", "03_masked_regularization", sparse_epochs=7)
    with pytest.raises(ValueError, match=r"mine.02_global.*sparse_epochs=3 \(now 7\)"):
        results.keep_reference("mine", third, ["03_masked_regularization"])
    same = recorded(tmp_path / "d", "03_masked_regularization", "01_baseline")
    results.keep_reference("mine", same, ["03_masked_regularization", "01_baseline"])
    assert list(ms.reference("mine")) == [*two, "03_masked_regularization"]


@pytest.mark.parametrize("name", ["../../out", "a/b", "a\\b", ".a", "..", ""])
def test_a_reference_lies_in_its_folder(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(results, "tables", lambda: tmp_path / "data" / "inner")
    recorded(tmp_path / "runs", "01_baseline")
    before = sorted(tmp_path.rglob("*"))
    words = ["--preset", "quick", "--only", "1", "-p", "runs", str(tmp_path / "runs")]
    assert main(["reference", name, *words]) == 2
    assert f"NAME {name!r}: expected the name of a folder" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_reference_without_settings_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "tables", lambda: tmp_path)
    write_json(tmp_path / "reference" / "mine" / "01_baseline" / "metrics.json", {"rows": []})
    with pytest.raises(ValueError, match="01_baseline.metrics.json does not hold the results"):
        ms.reference("mine")


def test_papermill_by_hand_takes_up_a_stage_that_was_carried_to_another_place(
    finished, tiny, tmp_path
):
    """A lesson with parameters of its own, and others by `overrides`; what it needs is copied."""
    given = tiny | {"runs": str(tmp_path / "runs")}
    here, there = (
        ms.config("full", **tiny | {"runs": str(r)}) for r in (finished[0], given["runs"])
    )
    carried = ms.stage("01_baseline", there).path
    shutil.copytree(ms.stage("01_baseline", here).path, carried)
    before = {p: p.stat().st_mtime_ns for p in carried.rglob("*")}
    source, out = ROOT / "notebooks" / "02_global_sparsity.ipynb", tmp_path / "out.ipynb"
    listed = papermill.inspect_notebook(str(source)).keys() & given.keys()
    own = {"preset": "full"} | {name: given.pop(name) for name in listed} | {"overrides": given}
    assert "reduction" in own and "runs" in given
    how = dict(kernel_name="python3", progress_bar=False, cwd=str(tmp_path))
    papermill.execute_notebook(str(source), str(out), own, **how)
    assert "reduction        0.6303 " in json.dumps(nbformat.read(out, 4))
    assert {p: p.stat().st_mtime_ns for p in carried.rglob("*")} == before  # not trained again
    first, again = (ms.stage("02_global_sparsity", cfg) for cfg in (here, there))
    assert again.rows.equals(first.rows)
    assert again.metrics["settings"] == first.metrics["settings"]


def test_papermill_refuses_what_the_lesson_would_not_read(tmp_path, monkeypatch):
    given, message = {"epoch": 1}, "unknown setting 'epoch'; did you mean 'epochs'"
    source = str(ROOT / "notebooks" / "00_start_here.ipynb")
    how = dict(kernel_name="python3", progress_bar=False, cwd=str(tmp_path))
    with pytest.raises(papermill.PapermillExecutionError, match=re.escape(message)):
        papermill.execute_notebook(source, str(tmp_path / "out.ipynb"), given, **how)
    # the same of another parameter, in a shell as a kernel has it
    cells = ["", 'preset = "auto"\noverrides = {}', "# Parameters\nbatch_size = 8"]
    shell = types.SimpleNamespace(user_ns={"In": cells})
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    with pytest.raises(ValueError, match="'batch_size' is no parameter of this lesson by itself"):
        ms.config("quick")
    cells[1] += "\nbatch_size = None"
    assert ms.config("quick").preset == "quick"


def test_a_stage_is_held_by_one_and_the_other_is_told(tmp_path):
    cfg, said = ms.config("quick", runs=str(tmp_path)), []
    stage, heard = ms.stage("01_baseline", cfg), trainings.processes.Queue()
    with _alone(stage, said.append):
        assert said == [] and not (stage / "metrics.json").exists()
        other = trainings.start(cfg, heard, target=trainings.take_the_stage)
        assert "another process is running it; waiting" in heard.get(timeout=60)
        assert heard.empty()
    assert heard.get(timeout=60) == "mine"
    other.join()


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


def kill_a_run(settings, runs, wait):
    """Start lesson 01, and kill it by -9 once `wait()` is over; how many processes it had then."""
    process = subprocess.Popen(
        command(settings, "--only", "01"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait(process)
    return kill_with_its_children(process) if process.poll() is None else 0


def test_killed_with_its_kernel_it_goes_on_in_one_of_two_processes(finished, tiny, tmp_path):
    """And ends as it would have without: bit for bit, with no epoch trained twice."""
    settings, lot = {**tiny, "runs": tmp_path}, random.Random()

    def newest():
        return max((p.name for p in tmp_path.rglob("epoch-*.pt")), default="")

    def until_an_epoch_is_done(process):
        deadline = time.monotonic() + 300
        while not newest():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)

    assert kill_a_run(settings, tmp_path, until_an_epoch_is_done)  # its kernel
    for _ in range(KILLS - 1):
        before = newest()
        if list(tmp_path.rglob("history.json")):
            break
        kill_a_run(settings, tmp_path, lambda _: time.sleep(lot.uniform(0.5, 15)))
        assert newest() >= before or list(tmp_path.rglob("history.json"))
    words = command(settings, "--only", "1")
    both = [
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    text = "".join(out for out, _ in outs)
    assert text.count("finished before, reused") == 1  # two that want one stage run it once
    assert "epoch 1/4" not in text
    here, there = (ms.config("full", **tiny | {"runs": str(r)}) for r in (finished[0], tmp_path))
    whole, again = (ms.stage("01_baseline", cfg) for cfg in (here, there))
    assert again.history("baseline").epoch.tolist() == [1, 2, 3, 4]
    pd.testing.assert_frame_equal(again.history("baseline"), whole.history("baseline"))
    one, other = (s.model("baseline").state_dict() for s in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


ALLOCATE = """
import resource
for _ in range(30):
    bytes(1) * (48 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the variable is glibc's")
def test_kernels_and_make_keep_freed_memory(tmp_path, monkeypatch):
    """Page faults of a process that takes and frees 48 MB time and again: 12,288 in each turn."""

    def faults():
        command = [sys.executable, "-c", ALLOCATE]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    alone = faults()
    with lessons._following(tmp_path / "log.txt", "a lesson", print):
        kept = faults()
    assert "GLIBC_TUNABLES" not in os.environ and 10 * kept < alone
    assert (ROOT / "Makefile").read_text().count(f"GLIBC_TUNABLES={lessons.KEEP_MEMORY}\n") == 1


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


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"cells": [', "error: {path} is damaged (Notebook does not appear to be JSON"),
        ("{}", "error: {path} is damaged ("),
        ("[]", "error: {path} is damaged ("),
        ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": 3}', "{path} is damaged ("),
        ("1 / 0", "error in 00_start_here, cell 1: ZeroDivisionError: division by zero"),
        ("import os; os._exit(3)", "error in 00_start_here: its process was killed"),
    ],
)
def test_a_damaged_or_failing_lesson_is_not_stored(tmp_path, monkeypatch, capsys, text, message):
    path = tmp_path / "notebooks" / "00_start_here.ipynb"
    path.parent.mkdir()
    if text[0] in "{[":
        path.write_text(text)
    else:
        cells = [nbformat.v4.new_code_cell(text)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_text()
    monkeypatch.setattr(lessons, "ROOT", tmp_path)
    monkeypatch.setenv("MSLIB_RUNS", str(tmp_path / "runs"))
    assert main(["store", "--only", "00"]) == (1 if text[0] not in "{[" else 2)
    assert message.format(path=path) in capsys.readouterr().err and path.read_text() == before


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
