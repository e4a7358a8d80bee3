"""Training from a folder through DataLoaders, and in two real processes, one of them killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import mslib as ms
from mslib.data.shapes import CLASSES
from mslib.files import ROOT

from . import trainings
from .conftest import lively, tiny_data

SCRIPT = """
import os, sys
print("process", os.getpid(), "is", os.environ["RANK"], flush=True)
from tests.trainings import share
share(sys.argv[1])
"""


def weights(folder):
    return ms.load(folder / "model.pt").state_dict()


def same(a, b, tolerance):
    return all(torch.allclose(a[k].double(), b[k].double(), rtol=0, atol=tolerance) for k in a)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel") / "alone"
    threads = torch.get_num_threads()
    trainings.share(folder)
    torch.set_num_threads(threads)
    return folder


def test_two_processes_end_with_the_weights_of_one(alone, tmp_path):
    trainings.together(tmp_path / "two")
    assert same(weights(alone), weights(tmp_path / "two"), 1e-5)
    one, two = (
        json.loads((f / "history.json").read_text())["epochs"] for f in (alone, tmp_path / "two")
    )
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=1e-4)
    torch.manual_seed(0)
    before = lively(ms.resnet(8, 3)).state_dict()
    moved = weights(alone)
    assert not same(moved, before, 1e-2)
    assert all(torch.equal(moved[k], before[k]) for k in before if "running" in k)


def test_without_frozen_statistics_the_processes_agree_in_the_end(tmp_path):
    for _ in range(2):  # trained, then loaded
        trainings.together(tmp_path, False)
        again = weights(tmp_path)
        for rank in range(2):
            own = torch.load(tmp_path / f"own-{rank}.pt", weights_only=True)
            assert all(torch.equal(again[k], own[k]) for k in again), rank
    assert not torch.equal(again["bn.running_mean"], lively(ms.resnet(8, 3)).bn.running_mean)


def test_one_killed_ends_the_other_and_the_run_goes_on(alone, tmp_path):
    folder, run = tmp_path / "killed", [sys.executable, "-m", "torch.distributed.run"]
    words = (
        "--standalone",
        "--nproc_per_node=2",
        "--no-python",
        sys.executable,
        "-c",
        SCRIPT,
        folder,
    )
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(
            [*run, *map(str, words)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 200
        while not (folder / "epoch-0001.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        said = (tmp_path / "log").read_text().split()
        second = said[said.index("1") - 2]  # process … is 1
        os.kill(int(second), signal.SIGKILL)
        assert process.wait(timeout=200) != 0
    said = (tmp_path / "log").read_text()
    assert "SIGKILL" in said and said.count("epoch 1/3") == 1  # the first process speaks
    assert not (folder / "history.json").exists()
    trainings.together(folder)
    assert same(weights(alone), weights(folder), 1e-5)


def test_a_batch_is_shared_evenly(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        ValueError, match="batch_size=16 cannot be shared by 3 processes; take a multiple"
    ):
        ms.fit(ms.resnet(8, 3), tiny_data(), epochs=1, lr=0.1, batch_size=16)


# ---- folders -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ms.image_folder("shapes", tmp_path_factory.mktemp("images") / "shapes", 24, (200, 40))


def test_image_folder_writes_the_images_once_and_leaves_a_folder_alone(
    folder, tmp_path, monkeypatch
):
    drawn, read = ms.load_data("shapes", image_size=24, sizes=(200, 40)), ms.load_data(str(folder))
    assert (
        set(drawn.classes) == set(read.classes)
        and len(read.train) + len(read.val) == 200
        and len(read.test) == 40
    )
    found = {
        (read.classes[label], image.numpy().tobytes())
        for image, label in zip(read.test.images, read.test.labels)
    }
    assert found == {
        (drawn.classes[label], image.numpy().tobytes())
        for image, label in zip(drawn.test.images, drawn.test.labels)
    }
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert (
        ms.image_folder("shapes", folder, 24, (200, 40)) == folder
        and ms.image_folder(str(folder), tmp_path / "copy") == folder
    )
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before and not (
        tmp_path / "copy"
    ).exists()
    monkeypatch.setattr("PIL.Image.Image.save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ms.image_folder("shapes", tmp_path / "stopped", 24, (200, 40))
    assert not list(tmp_path.iterdir())  # nothing half done is left behind


def test_image_folder_refuses_a_folder_of_other_images(folder, tmp_path, caplog):
    told = r"shapes holds .*'size': '24', 'sizes': '200, 40'.*asked for are .*'size': '24', "
    with pytest.raises(ValueError, match=told + "'sizes': '300, 40'"):
        ms.image_folder("shapes", folder, 24, (300, 40))
    with pytest.raises(ValueError, match="'size': '16'"):
        ms.image_folder("shapes", folder, 16, (200, 40))
    archive = shutil.make_archive(str(tmp_path / "set"), "zip", folder)
    copy = ms.image_folder(archive, tmp_path / "copy")
    assert ms.image_folder(archive, copy) == copy
    ms.load_folder(copy, size=16)
    assert not caplog.records  # no file is passed over
    with pytest.raises(ValueError, match="copy holds .*'dataset': 'set.zip'.*'dataset': 'shapes'"):
        ms.image_folder("shapes", copy, 24, (200, 40))
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine holds images of which nothing is known"):
        ms.image_folder("shapes", tmp_path / "mine")


@pytest.mark.parametrize("workers", [0, 2])
def test_fit_from_a_folder(folder, workers, tmp_path):
    """Batches of the asked size; it learns, evaluates and goes on as from tensors; then loads."""
    data = ms.load_folder(folder, size=16, batch_size=30, workers=workers)
    assert (
        data.example.shape,
        data.input_shape,
        len(data.train),
        len(data.val),
        len(data.test),
    ) == ((1, 3, 16, 16), (3, 16, 16), 6, 1, 2)
    x, y = next(iter(data.train))
    assert (
        x.shape == (30, 3, 16, 16)
        and abs(float(x.mean())) < 1.5
        and set(y.tolist()) <= set(range(10))
    )
    assert data.classes == tuple(sorted(CLASSES)) and "6 train batches" in repr(data)
    settings = dict(epochs=3, lr=0.05, precision="fp32", device="cpu", run=tmp_path / "run")
    torch.manual_seed(0)
    history = ms.fit(model := ms.resnet(8), data, **settings)
    assert history.loss.iloc[-1] < history.loss.iloc[0]
    torch.manual_seed(0)
    again = ms.fit(
        ms.resnet(8), data, **settings | {"run": tmp_path / "again"}
    )  # what a DataLoader draws follows from the seed
    assert again.loss.tolist() == history.loss.tolist()
    assert ms.evaluate(model, data.test) == pytest.approx(
        100 * sum(int((model.eval()(x).argmax(1) == y).sum()) for x, y in data.test) / 40
    )
    mean = model.bn.running_mean.clone()
    assert not torch.equal(
        ms.recalibrate(model, data.train, images=60, batch_size=30).bn.running_mean, mean
    )


def test_batches_of_a_folder_are_shared_as_they_were_made(folder, monkeypatch):
    """`fit` has no say in the size of others' batches: its default, 128, is no multiple of 3."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    data = ms.load_folder(folder, size=16, batch_size=96)
    with pytest.raises(ValueError, match="unknown schedule"):  # the next thing that it checks
        ms.fit(ms.resnet(8, 3), data, epochs=1, lr=0.1, schedule="none")


def test_bad_folders_and_crops_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="crop=8: expected a share"):
        ms.load_folder(folder, crop=8)
    shutil.copytree(folder, tmp_path / "apart")
    (tmp_path / "apart" / "test" / CLASSES[0]).rename(tmp_path / "apart" / "test" / "thing")
    with pytest.raises(ValueError, match="class 'thing' is in test/ but has no image in train/"):
        ms.load_folder(tmp_path / "apart")
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere; expected train/<class>"):
        ms.load_folder(tmp_path / "nowhere")


def test_the_imagenet_script_prunes_a_folder_in_two_processes(tmp_path):
    folder = ms.image_folder("shapes", tmp_path / "images", 32, (200, 40))
    small = [
        "--network",
        "resnet18",
        "--weights=",
        "--size",
        "32",
        "--batch_size",
        "20",
        "--epochs",
        "1",
        "--finetune_epochs",
        "1",
        "--workers",
        "0",
    ]
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [
        str(ROOT / "notebooks" / "imagenet.py"),
        str(folder),
        "--runs",
        str(tmp_path / "runs"),
        *small,
    ]
    done = subprocess.run(runner + words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    example = torch.zeros(1, 3, 32, 32)
    pruned, whole = (
        ms.cost(ms.load(tmp_path / "runs" / name / "model.pt"), example)
        for name in ("finetune", "masked")
    )
    assert pruned.macs <= (1 - 0.5107) * whole.macs
    assert done.stdout.count(str(pruned)) == 1  # the first process speaks
