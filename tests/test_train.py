import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

import mslib as ms
from mslib.data.tensors import batches, normalize
from mslib.files import read_tensors
from mslib.training.loop import pick_layout, pick_precision

from .conftest import tiny_data

FAST = dict(epochs=2, lr=0.05, batch_size=16, precision="fp32", device="cpu")

SCRIPT = """
import sys, torch, mslib as ms
torch.set_num_threads(1)
torch.manual_seed(0)
model, data = ms.resnet(8), ms.load_data("shapes", image_size=16, sizes=(1000, 50))
masks = {"stage3.0.bn1": torch.arange(64) < 32}
ms.fit(model, data, epochs=5, lr=0.05, batch_size=8, precision="fp32", device="cpu",
       penalty=ms.MaskedL1(model, masks, 1e-3), run=sys.argv[1])
print(ms.evaluate(model, data.test))
"""


def train(folder):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True
    )


def kill_in_the_middle_of_epoch(n, folder):
    """Start the training, and kill -9 it a moment after checkpoint n - 1 is written."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (folder / f"epoch-{n - 1:04d}.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.15)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (folder / "history.json").exists()


def same_run(a, b):
    first, second = (read_tensors(f / "model.pt")["state"] for f in (a, b))
    assert all(torch.equal(first[k], second[k]) for k in first) and first.keys() == second.keys()
    assert torch.equal(read_tensors(a / "gammas.pt"), read_tensors(b / "gammas.pt"))
    histories = [json.loads((f / "history.json").read_text())["epochs"] for f in (a, b)]
    assert histories[0] == histories[1] and len(histories[0]) == 5


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(folder).returncode == 0
    return folder


def test_killed_twice_and_resumed_is_the_same_bit_for_bit(undisturbed, tmp_path):
    folder = tmp_path / "run"
    kill_in_the_middle_of_epoch(2, folder)
    kill_in_the_middle_of_epoch(4, folder)
    assert train(folder).returncode == 0
    same_run(undisturbed, folder)
    assert not list(folder.glob("epoch-*.pt")) and not list(folder.glob(".*"))


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_used(undisturbed, tmp_path):
    folder = tmp_path / "run"
    kill_in_the_middle_of_epoch(4, folder)
    newest = sorted(folder.glob("epoch-*.pt"))[-1]
    os.truncate(newest, newest.stat().st_size // 2)
    done = train(folder)
    assert (
        done.returncode == 0
        and f"{newest.name} cannot be read" in done.stderr
        and "checkpoint before it" in done.stderr
    )
    same_run(undisturbed, folder)


def test_a_finished_run_is_loaded_not_repeated(data, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = ms.resnet(8)
    history = ms.fit(model, data, **FAST, run=tmp_path / "run")
    torch.manual_seed(0)
    again = ms.resnet(8)
    monkeypatch.setattr("mslib.training.loop.batches", None)  # any step would fail
    pd.testing.assert_frame_equal(ms.fit(again, data, **FAST, run=tmp_path / "run"), history)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )


def test_a_run_stopped_after_its_last_checkpoint_ends(data, tmp_path, monkeypatch):
    def network():
        torch.manual_seed(0)
        return ms.resnet(8)

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr("mslib.training.loop.save", full)
        ms.fit(network(), data, **FAST, run=tmp_path / "run")
    assert ms.fit(network(), data, **FAST, run=tmp_path / "run").epoch.tolist() == [1, 2]
    assert (tmp_path / "run" / "history.json").exists()


def test_the_seed_decides_on_dropout_too(data):
    def train(drawn):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(192, 20),
            torch.nn.Dropout(),
            torch.nn.Linear(20, 10),
        )
        torch.rand(drawn)
        return ms.fit(model, data, **FAST).loss.tolist()

    assert train(0) == train(5)


def test_a_penalty_is_known_by_its_masks_and_a_function_by_its_name(data, tmp_path):
    def fit(penalty, name):
        torch.manual_seed(0)
        model = ms.resnet(8)
        return ms.fit(model, data, **FAST, penalty=penalty(model), run=tmp_path / name)

    def of(start):
        return lambda model: ms.MaskedL1(
            model, {"stage3.0.bn1": (torch.arange(64) - start) % 64 < 32}, 1e-3
        )

    fit(of(0), "masked")
    with pytest.raises(ValueError, match="other settings: penalty="):
        fit(of(8), "masked")  # as many channels, but others
    for _ in range(2):
        fit(lambda model: lambda: model.fc.weight.norm(), "function")


@pytest.mark.parametrize(
    "change",
    [
        dict(lr=0.1),
        dict(epochs=3),
        dict(seed=1),
        dict(penalty=True),
        dict(data=True),
        dict(model=True),
    ],
)
def test_a_folder_of_other_settings_is_refused_and_kept(data, tmp_path, change):
    def model(seed=0):
        torch.manual_seed(seed)
        return ms.resnet(8)

    ms.fit(model(), data, **FAST, run=tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    net = model(1 if "model" in change else 0)
    other = {k: v for k, v in change.items() if v is not True}
    if "penalty" in change:
        other["penalty"] = ms.GlobalL1(net, 1e-3)
    images = ms.load_data("shapes", image_size=8, sizes=(190, 50)) if "data" in change else data
    name = {"model": "weights_l1"}.get(next(iter(change)), next(iter(change)))
    with pytest.raises(ValueError, match=f"other settings: .*{name}=.*now"):
        ms.fit(net, images, **(FAST | other), run=tmp_path / "run")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_history_says_what_happened(data, tmp_path):
    model = ms.resnet(8)
    penalty = ms.GlobalL1(model, 1e-3)
    start = penalty().item()
    history = ms.fit(model, data, **FAST, penalty=penalty, run=tmp_path / "run")
    assert history.epoch.tolist() == [1, 2] and history.loss.iloc[1] < history.loss.iloc[0]
    assert history.val_top1.iloc[-1] == ms.evaluate(model, data.val)
    assert 0 < history.penalty.iloc[-1] < start
    gammas = read_tensors(tmp_path / "run" / "gammas.pt")
    assert gammas.shape == (3, 16 * 3 + 32 * 2 + 64 * 2)
    assert history.gamma_median.iloc[-1] == gammas[-1].float().median().item()


def test_the_same_seed_gives_the_same_network_and_another_seed_another(data):
    def weights(seed):
        torch.manual_seed(0)
        model = ms.resnet(8)
        ms.fit(model, data, **FAST, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_it_learns(precision):
    data = ms.load_data("shapes", image_size=16, sizes=(2000, 500))
    torch.manual_seed(0)
    model = ms.resnet(8)
    ms.fit(model, data, epochs=5, lr=0.2, batch_size=16, precision=precision)
    assert ms.evaluate(model, data.test) > 50  # chance is 10


def test_schedules():
    rates = ms.learning_rates(0.4, 100)
    assert (
        rates.argmax() == 20
        and rates.max() == pytest.approx(0.4)
        and rates[0] == pytest.approx(0.02)
        and rates[-1] < 1e-3
    )
    assert rates[:20].diff().min() > 0 and rates[21:].diff().max() < 0
    assert ms.learning_rates(1.0, 8, "step").tolist() == pytest.approx(
        [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert ms.learning_rates(0.5, 3, "constant").tolist() == [0.5] * 3
    with pytest.raises(ValueError, match="'cosin'.*onecycle"):
        ms.learning_rates(1.0, 8, "cosin")


def test_evaluate_is_top1_in_percent_and_keeps_the_mode(data):
    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.arange(10.0))

        def forward(self, x):
            assert not self.training
            return self.bias.expand(len(x), 10)

    model = Constant().train()
    assert (
        ms.evaluate(model, data.test, batch_size=7) == 100 * int((data.test.labels == 9).sum()) / 50
    )
    assert model.training


def test_a_training_set_smaller_than_a_batch():
    data = tiny_data(10)
    assert len(list(batches(data.train, 64, torch.Generator()))) == 1
    ms.fit(ms.resnet(8, 3), data, epochs=1, lr=0.01, batch_size=64)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(epochs=0), "epochs=0"),
        (dict(lr=-1.0), "lr=-1.0"),
        (dict(precision="fp8"), "'fp8'"),
        (dict(schedule="x"), "'x'"),
    ],
)
def test_settings_out_of_range(data, wrong, message):
    with pytest.raises(ValueError, match=message):
        ms.fit(ms.resnet(8), data, **(FAST | wrong))


def test_divergence_is_an_error_with_advice(data):
    with pytest.raises(FloatingPointError, match="diverged in epoch .*try a smaller lr"):
        ms.fit(ms.resnet(8), data, **(FAST | dict(lr=1e12, schedule="constant")))


def test_an_unwritable_folder(data, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="cannot write .*choose a folder"):
        ms.fit(ms.resnet(8), data, **FAST, run=tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_penalty_may_have_a_step(data):
    seen = []

    class Counting:
        def __call__(self):
            return torch.zeros(())

        def step(self, iteration):
            seen.append(iteration)

    ms.fit(ms.resnet(8), data, **FAST, penalty=Counting())
    assert seen == list(range(2 * (180 // 16)))


COMPILER = (shutil.which("g++") or shutil.which("clang++")) and Path(
    sysconfig.get_path("include"), "Python.h"
).exists()


@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler and Python's headers")
def test_a_captured_step_learns_the_same(data, monkeypatch):
    histories, captured, compiling = [], [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **how: captured.append(model) or compiling(model, **how)
    )
    ms.fit(
        plain := ms.resnet(14), data, **FAST | {"epochs": 1}, capture=True
    )  # without hooks: its graph is not to be reused
    for capture in ("0", "1"):
        assert captured == [plain]
        monkeypatch.setenv("MSLIB_CAPTURE", capture)
        torch.manual_seed(0)
        model = ms.resnet(14)
        histories.append(
            ms.fit(model, data, **FAST, penalty=ms.FeatureFlow(model, 1.0))
        )  # whose hooks see the network's inside
    assert captured == [plain, model] and histories[1].penalty.min() > 0.1
    pd.testing.assert_frame_equal(
        histories[0].drop(columns="val_top1"), histories[1].drop(columns="val_top1"), rtol=1e-2
    )


def test_layout_goes_by_widths_precision_and_device():
    odd = ms.prune(ms.resnet(8), {"stage1.0.bn1": torch.arange(16) < 13})
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pick_layout(odd, cpu, "bf16") is torch.contiguous_format
    for model, device, precision in (
        (odd, cpu, "fp32"),
        (odd, gpu, "bf16"),
        (ms.resnet(8), cpu, "bf16"),
    ):
        assert pick_layout(model, device, precision) is torch.channels_last


def test_no_bf16_where_a_strided_convolution_reads_one_pixel(data, monkeypatch):
    """There the gradient of the weights that only see padding is whatever lay in memory; it should be zero."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 8),
        torch.nn.Conv2d(64, 64, 3, 2, 1),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 10),
    )
    before = model[1].weight.detach().clone()
    ms.fit(model, data, epochs=1, lr=0.01, batch_size=16, weight_decay=0, device="cpu")
    moved = (model[1].weight - before).abs().amax((0, 1))
    assert moved[1, 1] > 0 and moved[0].max() == 0
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert [
        pick_precision("auto", torch.device("cpu"), net, data) for net in (model, ms.resnet(8))
    ] == ["fp32", "bf16"]


def test_recalibrate_estimates_the_statistics_of_the_network_as_it_is(data):
    """Means and variances off by far: estimated anew they are those of the images, whatever they were before."""
    model = ms.resnet(8, len(data.classes))
    spoiled, weights = copy.deepcopy(model), [p.detach().clone() for p in model.parameters()]
    for m in spoiled.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean += 3
            m.running_var *= 9
    for net in (model, spoiled):
        assert (
            ms.recalibrate(net.eval(), data.train, images=150, batch_size=50) is net
            and not net.training
        )
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), spoiled.state_dict().values())
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights))
    assert float(model.bn.running_var.min()) > 0 and int(model.bn.num_batches_tracked) == 3
    means = torch.stack(
        [model.conv(x).detach().mean((0, 2, 3)) for x, _ in batches(data.train, 180)]
    ).mean(0)  # of the images as they are
    assert (
        float((model.bn.running_mean - means).abs().max())
        < 0.3
        < float((model.bn.running_mean + 3 - means).abs().max())
    )


def test_recalibrate_draws_the_same_from_a_loader_each_time(data):
    images = torch.utils.data.TensorDataset(normalize(data.train.images), data.train.labels)
    loader, first = (
        torch.utils.data.DataLoader(images, 32, shuffle=True),
        ms.resnet(8, len(data.classes)),
    )
    again = copy.deepcopy(first)
    ms.recalibrate(first, loader, images=64, batch_size=32)
    before = torch.get_rng_state()
    ms.recalibrate(again, loader, images=64, batch_size=32)
    assert (
        torch.equal(first.bn.running_mean, again.bn.running_mean)
        and int(first.bn.num_batches_tracked) == 2
    )
    assert torch.equal(torch.get_rng_state(), before)
