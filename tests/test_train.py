import copy
import json
import math
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

import mslib as ms
from mslib.data.tensors import Data, batches, normalize
from mslib.files import ROOT, read_tensors
from mslib.training.device import pick_layout, pick_precision
from mslib.training.runs import Run, locked, network_digest, read_history

from . import trainings
from .conftest import lively, tiny_data
from .test_files import flipped

FAST = dict(epochs=2, lr=0.05, batch_size=16, precision="fp32", device="cpu")
TRIALS = int(os.environ.get("MSLIB_TRIALS", 2))


def small(seed=0, classes=3):
    torch.manual_seed(seed)
    return ms.resnet(8, classes)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


# ---- against a loop that knows nothing of mslib ------------------------------------------------


def shifted(image, top, left, mirror):
    """A crop of `image` [3, 8, 8], padded by one black pixel on each side; mirrored or not."""
    padded = torch.zeros(3, 10, 10)
    padded[:, 1:9, 1:9] = image
    crop = padded[:, top : top + 8, left : left + 8]
    return crop.flip(2) if mirror else crop


def rate(schedule, t, lr):
    """The learning rate after the share `t` of the run."""
    if schedule == "step":
        return lr if t < 0.5 else lr / 10 if t < 0.75 else lr / 100
    return lr if schedule == "constant" else lr * (1 + math.cos(math.pi * (t - 0.2) / 0.8)) / 2


def textbook(net, split, seen, more, *, epochs, lr, batch_size, schedule, weight_decay, seed):
    """Cross-entropy and SGD with Nesterov momentum in plain PyTorch; notes the weights."""
    velocity, steps, t = [0.0 for _ in net.parameters()], len(split) // batch_size, 0
    net.train()
    for epoch in range(epochs):
        lot = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order, moves = torch.randperm(len(split), generator=lot), []
        for _ in range(steps):
            corner = torch.randint(3, (2, batch_size, 1), generator=lot).tolist()
            mirror = (torch.rand(1, batch_size, generator=lot) < 0.5)[0].tolist()
            moves += [(a[0], b[0], m) for a, b, m in zip(*corner, mirror)]
        for i in range(steps):
            chosen = order[i * batch_size : (i + 1) * batch_size]
            images = [shifted(split.images[j], *moves.pop(0)) for j in chosen]
            x = ((torch.stack(images) - 120) / 64).contiguous(memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(net(x), split.labels[chosen])
            gradients = torch.autograd.grad(loss + more(net), list(net.parameters()))
            rise = (t + 1) / (0.2 * epochs * steps)
            warm = schedule == "onecycle" and rise < 1
            eta = lr * rise if warm else rate(schedule, t / (epochs * steps), lr)
            with torch.no_grad():
                for k, (p, g) in enumerate(zip(net.parameters(), gradients)):
                    g = g + weight_decay * p
                    velocity[k] = 0.9 * velocity[k] + g
                    p -= eta * (g + 0.9 * velocity[k])
            t += 1
            seen.append(torch.cat([p.detach().flatten() for p in net.parameters()]))


class Watch(ms.Penalty):
    """Nothing is penalized: it looks at the weights before each step."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __call__(self):
        return torch.zeros(())

    def step(self, iteration):
        self.seen.append(torch.cat([p.detach().flatten() for p in self.model.parameters()]))


def smooth():
    """A small network without ReLUs: no difference of rounding can switch one over."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU()
    second = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU()
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("schedule", ["onecycle", "step", "constant"])
def test_fit_is_a_textbook_training_step_by_step(schedule):
    ours, data = smooth().to(memory_format=torch.channels_last), tiny_data(50)
    theirs, seen, masks = copy.deepcopy(ours), [], {"1": torch.arange(8) % 3 > 0}
    how = dict(epochs=3, lr=0.1, batch_size=16, schedule=schedule, weight_decay=0.01, seed=7)
    watch = Watch(ours)
    penalty = ms.MaskedL1(ours, masks, 0.1) + watch
    history = ms.fit(ours, data, **how, penalty=penalty, precision="fp32", device="cpu")

    def masked(model):
        return 0.1 * (model[1].weight.abs() * ~masks["1"]).sum()

    textbook(theirs, data.train, seen, masked, **how)
    assert len(seen) == 9 and len(watch.seen) == 9
    watch.step(9)
    for a, b in zip(watch.seen[1:], seen):
        assert float((a - b).abs().max()) < 1e-6
    moved = float((seen[-1] - watch.seen[0]).abs().max())
    assert moved > 1e-2 and history.lr.iloc[-1] == pytest.approx(
        ms.learning_rates(0.1, 9, schedule)[-1]
    )
    for a, b in zip(ours.buffers(), theirs.buffers()):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_teacher_takes_half_of_the_loss_and_stays_as_it_is():
    """One step, against the formula of Hinton et al. 2015 written out."""
    ours, teacher, data = smooth(), lively(smooth()), tiny_data(16)
    teacher[-1].weight.data *= 30  # it is sure of what it says
    theirs, before = copy.deepcopy(ours), copy.deepcopy(teacher)
    how = dict(epochs=1, lr=0.1, batch_size=16, schedule="constant", weight_decay=0.0)
    history = ms.fit(ours, data, **how, teacher=teacher, precision="fp32", device="cpu")
    lot = torch.Generator().manual_seed(0)
    x, y = next(iter(batches(data.train, 16, lot)))
    z = theirs.train()(x)
    with torch.no_grad():
        wanted = (teacher.eval()(x) / 4).softmax(1)
    divergence = (wanted * (wanted.log() - (z / 4).log_softmax(1))).sum(1).mean()
    entropy = nn.functional.cross_entropy(z, y)
    goal = entropy / 2 + 16 * divergence / 2
    assert history.loss[0] == pytest.approx(float(entropy), rel=1e-5)
    assert float(divergence) > 1e-2  # they differ enough to tell
    for p, q, g in zip(
        ours.parameters(), theirs.parameters(), torch.autograd.grad(goal, theirs.parameters())
    ):
        assert torch.allclose(p, q - 0.1 * 1.9 * g, atol=1e-6)  # Nesterov's first step
    assert same(before, teacher)


def test_a_run_with_a_teacher_is_another_run(tmp_path):
    for teacher in (None, small(1)):
        ms.fit(small(), tiny_data(), **FAST, teacher=teacher, run=tmp_path / str(teacher is None))
    frozen = small(1).requires_grad_(False)  # may teach all the same, and is another network
    for teacher in (small(1), small(2), frozen):
        with pytest.raises(ValueError, match="made with other settings: teacher"):
            ms.fit(small(), tiny_data(), **FAST, teacher=teacher, run=tmp_path / "True")
    with pytest.raises(ValueError, match="the teacher has 5 outputs and the network 3"):
        ms.fit(small(), tiny_data(), **FAST, teacher=small(classes=5))
    with pytest.raises(TypeError, match="expected a trained network"):
        ms.fit(small(), tiny_data(), **FAST, teacher="resnet")


# ---- killed, damaged, met by another -----------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing happened to, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    trainings.start(target=os.getpid).join()  # all is imported once
    began, process = time.monotonic(), trainings.start(folder)
    process.join()
    assert process.exitcode == 0
    return folder, time.monotonic() - began


def same_run(a, b):
    first, second = ms.load(a / "model.pt"), ms.load(b / "model.pt")
    assert same(first, second)
    assert torch.equal(read_tensors(a / "gammas.pt"), read_tensors(b / "gammas.pt"))
    histories = [json.loads((f / "history.json").read_text())["epochs"] for f in (a, b)]
    assert histories[0] == histories[1] and len(histories[0]) == trainings.EPOCHS
    growing = [read_tensors(f / "penalty.pt")["1"] for f in (a, b)]
    assert growing[0]["rows"] == growing[1]["rows"] and growing[0]["masks"]
    assert all(torch.equal(m, growing[1]["masks"][n]) for n, m in growing[0]["masks"].items())
    assert not list(b.glob("epoch-*.pt")) and not list(b.glob(".*.part*"))


def trained_with_kills(folder, seconds, most):
    """Start a training until it has ended, and kill it at `most` random moments; how many it was.

    It may end before: a moment can lie behind its end.
    """
    kills, newest, lot = 0, "", random.Random()
    while not (folder / "history.json").exists():
        process = trainings.start(folder)
        process.join(lot.uniform(0.1, 0.9) * seconds if kills < most else 60)
        process.kill()  # SIGKILL
        process.join()
        kills += process.exitcode != 0
        found = max((p.name for p in folder.glob("epoch-*.pt")), default=newest)
        assert found >= newest  # no epoch is trained twice once it has been written
        newest = found
    trainings.start(folder).join()  # the last may have been killed while it tidied up
    return kills


def test_killed_at_random_moments_it_is_the_same_bit_for_bit(undisturbed, tmp_path):
    whole, seconds = undisturbed
    kills = run = 0
    while kills < TRIALS:
        run += 1
        folder = tmp_path / str(run)
        kills += trained_with_kills(folder, seconds, TRIALS - kills)
        same_run(whole, folder)


def test_two_processes_in_one_folder_lose_nothing(undisturbed, tmp_path):
    for trial in range(TRIALS):
        folder, barrier = tmp_path / str(trial), trainings.processes.Barrier(2)
        both = [trainings.start(folder, barrier) for _ in range(2)]
        for process in both:
            process.join()
        codes = [p.exitcode for p in both]
        assert 0 in codes
        if codes != [0, 0]:  # on a busy machine one may have waited too long, and was refused
            again = trainings.start(folder)
            again.join()
            assert again.exitcode == 0
        same_run(undisturbed[0], folder)


def test_a_folder_in_use_is_refused_and_a_killed_holder_blocks_nobody(tmp_path):
    held = trainings.processes.Event()
    holder = trainings.start(tmp_path / "run", held, target=trainings.hold)
    assert held.wait(60)
    said = f"run is in use by process {holder.pid} on .*another"
    with pytest.raises(RuntimeError, match=said), locked(tmp_path / "run", patience=0.1):
        pass
    holder.kill()
    holder.join()
    ms.fit(small(), tiny_data(), **FAST, run=tmp_path / "run")
    assert (tmp_path / "run" / "history.json").exists()


class Stop(Exception):
    pass


def stopped(folder, after, monkeypatch, **how):
    """Train until checkpoint `after` is written."""
    save = Run.save_checkpoint

    def stop(self, epoch, state):
        save(self, epoch, state)
        if epoch == after:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Run, "save_checkpoint", stop)
        data = how.pop("data", tiny_data())
        ms.fit(small(), data, **FAST | {"epochs": 3} | how, run=folder)


@pytest.mark.parametrize("damage", ["emptied", "cut", "a bit", "of another form", "all of them"])
def test_a_damaged_checkpoint_is_passed_over(damage, tmp_path, monkeypatch, caplog):
    ms.fit(whole := small(), tiny_data(), **FAST | {"epochs": 3})
    stopped(tmp_path, 2, monkeypatch)
    before, newest = sorted(tmp_path.glob("epoch-*.pt"))
    if damage == "of another form":
        torch.save({"epoch": 2}, newest)
    elif damage == "a bit":  # of a weight: nothing but the checksum tells
        newest.write_bytes(flipped(newest.read_bytes(), read_tensors(newest)["model"]["fc.weight"]))
    else:
        os.truncate(newest, newest.stat().st_size // 2 if damage == "cut" else 0)
    if damage == "all of them":
        os.truncate(before, 0)
    history = ms.fit(again := small(), tiny_data(), **FAST | {"epochs": 3}, run=tmp_path)
    assert same(whole, again) and history.epoch.tolist() == [1, 2, 3]
    told = [r.message for r in caplog.records]
    assert len(told) == (2 if damage == "all of them" else 1)
    assert newest.name in told[0] and "passed over" in told[0]


def test_a_checkpoint_of_another_run_is_never_continued(tmp_path, monkeypatch):
    """As when settings.json was deleted or exchanged by hand."""
    stopped(tmp_path / "a", 1, monkeypatch)
    stopped(tmp_path / "b", 1, monkeypatch, lr=0.1)
    shutil.copy(tmp_path / "b" / "settings.json", tmp_path / "a")
    with pytest.raises(ValueError, match="epoch-0001.pt is a checkpoint of another run; .*another"):
        ms.fit(small(), tiny_data(), **FAST | {"epochs": 3, "lr": 0.1}, run=tmp_path / "a")
    (tmp_path / "a" / "settings.json").unlink()
    with pytest.raises(ValueError, match="is of a run without its settings.json; .*another folder"):
        ms.fit(small(), tiny_data(), **FAST | {"epochs": 3}, run=tmp_path / "a")


@pytest.mark.parametrize("name", ["model.pt", "gammas.pt", "penalty.pt", "history.json"])
def test_a_folder_with_a_file_of_a_runs_name_is_not_taken(name, tmp_path):
    for file in (name, ".movie.mp4.part", f".{name.replace('.', '.7.part.')}"):
        (tmp_path / file).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} is of a run without its settings.json"):
        ms.fit(small(), tiny_data(), **FAST, run=tmp_path)
    assert {p.read_text() for p in tmp_path.glob("*") if p.name != ".lock"} == {"mine"}


def test_only_what_a_run_was_writing_is_tidied_up(tmp_path, monkeypatch):
    stopped(tmp_path, 1, monkeypatch)
    left = [".model.7.part.pt", ".settings.7.part.json", ".epoch-0002.7.part.pt"]
    for name in (*left, ".movie.mp4.part", ".notes.part.txt"):
        (tmp_path / name).touch()
    ms.fit(small(), tiny_data(), **FAST | {"epochs": 3}, run=tmp_path)
    assert {p.name for p in tmp_path.glob(".*.part*")} == {".movie.mp4.part", ".notes.part.txt"}


def test_checkpoints_are_in_the_order_of_their_epochs(tmp_path):
    run = Run(tmp_path, {})
    for epoch in (9998, 9999, 10000, 10001):
        run.save_checkpoint(epoch, {})
    assert [path.name for path in run.checkpoints()] == ["epoch-10001.pt", "epoch-10000.pt"]


@pytest.mark.parametrize("name", ["settings.json", "history.json"])
@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"epochs": [3]}', "[" * 100_000])
def test_damaged_settings_and_histories_are_refused(name, text, tmp_path, finished):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / name).write_text(text)
    before, model = contents(folder), small()
    with pytest.raises(ValueError, match=f"{name} is|another version") as told:
        ms.fit(model, tiny_data(), **FAST, run=folder)
    assert "give another folder" in str(told.value) and "delete" not in str(told.value)
    assert contents(folder) == before and same(model, small())


def test_a_run_stopped_after_its_last_checkpoint_ends(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr("mslib.training.runs.save", full)
        ms.fit(small(), tiny_data(), **FAST, run=tmp_path)
    assert ms.fit(small(), tiny_data(), **FAST, run=tmp_path).epoch.tolist() == [1, 2]
    assert (tmp_path / "history.json").exists()


def test_an_unwritable_folder_and_an_unwritable_log(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="cannot write .*choose a folder"):
        ms.fit(small(), tiny_data(), **FAST, run=tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "not a folder"
    monkeypatch.setenv("MSLIB_LOG", str(tmp_path / "file" / "log"))
    assert len(ms.fit(small(), tiny_data(), **FAST)) == 2
    monkeypatch.setenv("MSLIB_LOG", str(tmp_path / "log"))
    ms.fit(small(), tiny_data(), **FAST)
    assert (tmp_path / "log").read_text().count("held-out top-1") == 2


# ---- whose run it is ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of `small()` on `tiny_data()`."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    ms.fit(small(), tiny_data(), **FAST, run=folder)
    return folder


def test_a_finished_run_is_loaded_not_repeated(tmp_path, finished, monkeypatch):
    folder, model = shutil.copytree(finished, tmp_path / "run"), small()
    history = ms.fit(model, tiny_data(), **FAST)
    before = contents(folder)
    monkeypatch.setattr("mslib.training.loop.batches", None)  # any step would fail
    monkeypatch.setattr("mslib.training.runs.locked", None)  # and any lock
    for precision in ("fp32", "auto"):
        again = small()
        loaded = ms.fit(again, tiny_data(), **FAST | {"precision": precision}, run=folder)
        pd.testing.assert_frame_equal(loaded, history)
        assert same(model, again)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["model.pt", "gammas.pt"])
def test_a_finished_run_knows_its_files_again(name, tmp_path, finished):
    folder, model = shutil.copytree(finished, tmp_path / "run"), small()
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=f"{name} is damaged, or not of this run; .*another folder"
    ):
        ms.fit(model, tiny_data(), **FAST, run=folder)
    assert same(model, small())
    told = json.loads((folder / "history.json").read_text())
    del told["files"]  # as earlier versions wrote it
    (folder / "history.json").write_text(json.dumps(told))
    assert len(ms.fit(model, tiny_data(), **FAST, run=folder)) == 2


@pytest.mark.parametrize("run", ["baseline", "global"])
def test_networks_of_stored_runs_are_still_the_same_layers(run):
    folder = ROOT / "data" / "recovery-runs" / "resnet20-seed0" / run
    stored = json.loads((folder / "settings.json").read_text())["layers"]
    assert network_digest(ms.load(folder / "model.pt"))["layers"] == stored


def test_a_bias_tells_networks_apart_by_its_tensor_alone():
    with_bias, without = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    assert network_digest(with_bias)["layers"] == network_digest(without)["layers"]  # as any reprs
    assert network_digest(with_bias)["weights"] != network_digest(without)["weights"]

    class Shifted(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self._bias = bias

        def extra_repr(self):
            return f"scale=1, bias={self._bias}"

    assert network_digest(Shifted(3))["layers"] != network_digest(Shifted(4))["layers"]


class Attentive(nn.Module):
    """Of what decides its outputs, `repr` tells the shapes of weights only."""

    def __init__(self, heads=1, dropout=0.0, scale=2, sizes=(1, 2)):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, heads, dropout)
        self.scale, self.sizes, self.fc = scale, sizes, nn.Linear(8, 3)


@pytest.mark.parametrize(
    "change", [dict(heads=2), dict(dropout=0.5), dict(scale=3), dict(sizes=(1, None))], ids=str
)
def test_plain_attributes_tell_layers_from_others(change):
    def layers(**how):
        return network_digest(Attentive(**how).eval())["layers"]

    assert layers() == layers() != layers(**change)
    moved = Attentive().train()
    moved.last, moved._seen = torch.ones(1), 1  # what forward may have kept
    assert network_digest(moved)["layers"] == layers()


def nudged(model):
    """One weight changed in its last bit."""
    with torch.no_grad():
        first = model.conv.weight.view(-1)
        first[0] = torch.nextafter(first[0], torch.tensor(9.0))
    return model


def buffered(model):
    model.bn.running_mean[3] = 1e-7
    return model


def frozen(model):
    model.fc.bias.requires_grad_(False)
    return model


def pooled(model):
    """Another layer, the same weights."""
    model.pool = nn.AdaptiveMaxPool2d(1)
    return model


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(lr=0.05001), r"lr=0.05 \(now 0.05001\)"),
        (dict(epochs=3), r"epochs=2 \(now 3\)"),
        (dict(batch_size=8), "batch_size=16"),
        (dict(seed=1), "seed=0"),
        (dict(schedule="step"), "schedule='onecycle'"),
        (dict(weight_decay=5.001e-4), r"weight_decay=0.0005 \(now 0.0005001\)"),
        (dict(precision="bf16"), "precision='fp32'"),
        (dict(frozen_statistics=True), "frozen_statistics=False"),
        (dict(model=lambda: small(1)), "began with other weights.*manual_seed"),
        (dict(model=lambda: nudged(small())), "began with other weights"),
        (dict(model=lambda: buffered(small())), "began with other weights"),
        (dict(model=lambda: frozen(small())), "began with other weights"),
        (dict(model=lambda: pooled(small())), "other settings: layers="),
        (dict(data=tiny_data(65)), "other settings: data="),
        (dict(penalty=lambda m: ms.FeatureFlow(m, 1.0)), "penalty=None"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_kept(finished, change, named):
    before, change = contents(finished), dict(change)
    model = change.pop("model", small)()
    data = change.pop("data", tiny_data())
    if "penalty" in change:
        change["penalty"] = change["penalty"](model)
    with pytest.raises(ValueError, match=f"{named}.*give another folder"):
        ms.fit(model, data, **(FAST | change), run=finished)
    assert contents(finished) == before


def test_penalties_are_told_apart_and_what_cannot_be_is_refused(tmp_path):
    def fit(make):
        model = small()
        ms.fit(model, tiny_data(), **FAST, penalty=make(model), run=tmp_path)

    def masked(start=0, strength=1e-3):
        keep = (torch.arange(64) - start) % 64 < 32
        return lambda m: (
            ms.MaskedL1(m, {"stage3.0.bn1": keep}, strength)
            + ms.FeatureFlow(m, 1.0, layers=["stage1", "stage1.0"])
        )

    fit(masked())
    fit(masked())
    with pytest.raises(
        ValueError, match=r"settings: penalty.sum.0.channels='\w{8}…' \(now '\w{8}…'\)"
    ):
        fit(masked(8))  # as many channels, but others
    with pytest.raises(ValueError, match=r"penalty.sum.0.strength=0.001 \(now 0.0010001\)"):
        fit(masked(strength=1.0001e-3))
    before = contents(tmp_path)
    for make in (lambda m: lambda: m.fc.weight.norm(), lambda m: Watch(m)):
        with pytest.raises(ValueError, match="cannot be told from others: derive .* ms.Penalty"):
            fit(make)
    assert contents(tmp_path) == before


def test_a_run_of_another_version_is_refused_but_its_history_is_read(finished, tmp_path):
    old = ROOT / "data" / "reference" / "resnet56-cifar10-standard" / "01_baseline" / "baseline"
    with pytest.raises(
        ValueError, match="another version .*'weights_l1'.* are unknown here, .*'weights'"
    ):
        ms.fit(small(), tiny_data(), **FAST, run=old)
    assert len(read_history(old)) == 30
    folder = shutil.copytree(finished, tmp_path / "run")
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(settings | {"label_smoothing": 0.1}))
    with pytest.raises(
        ValueError, match=r"\['label_smoothing'\] are unknown here, and none are missing"
    ):
        ms.fit(small(), tiny_data(), **FAST, run=folder)


def test_data_that_cannot_be_told_from_others_need_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Data, "fingerprint", None)
    assert len(ms.fit(small(), tiny_data(), **FAST)) == 2
    with pytest.raises(ValueError, match="these data have no identity: .*without a run folder"):
        ms.fit(small(), tiny_data(), **FAST, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_run_could_not_keep_is_found_before_the_first_epoch(tmp_path):
    model = small()
    penalty, odd = Watch(model), small()
    penalty.state_dict, penalty.identity = lambda: {"k": [np.float64(0)]}, lambda: "watch"
    odd.register_buffer("odd", torch.ones(2) * 1j)
    for words, named in (
        ((model, penalty), r"the state of .*\['k'\]\[0\] is a float64"),
        ((odd, None), "ResNet cannot be saved: odd is a torch.complex64"),
    ):
        with pytest.raises(ValueError, match=named):
            ms.fit(words[0], tiny_data(), **FAST, penalty=words[1], run=tmp_path / "run")
        assert len(ms.fit(words[0], tiny_data(), **FAST, penalty=words[1])) == 2
    assert len(penalty.seen) == 8 and not (tmp_path / "run").exists()


# ---- what is trained on, and what is refused ---------------------------------------------------


def loader(split, size=16, **how):
    return DataLoader(TensorDataset(normalize(split.images), split.labels), size, **how)


def test_a_dataloader_will_do(tmp_path):
    data, histories = tiny_data(), []
    for _ in range(2):
        torch.rand(3)  # what a DataLoader draws follows from the seed
        histories.append(ms.fit(model := small(), loader(data.train, shuffle=True), **FAST))
    assert histories[0].loss.tolist() == histories[1].loss.tolist()
    assert histories[0].val_top1.isna().all()
    assert ms.evaluate(model, loader(data.test)) == ms.evaluate(model, data.test)
    both = Data("both", loader(data.train), loader(data.val), loader(data.test), data.classes)
    history = ms.fit(model := small(), both, **FAST)
    assert history.val_top1.iloc[-1] == ms.evaluate(model, data.val)
    run = [ms.fit(small(), loader(data.train), **FAST, run=tmp_path) for _ in range(2)]
    pd.testing.assert_frame_equal(*run)  # nan is kept with a run
    with pytest.raises(ValueError, match="no image to evaluate on"):
        ms.evaluate(model, [])


def random_state():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


class Noisy(TensorDataset):
    """Images that the random numbers of Python and numpy change, as transforms do."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x * random.random() + float(np.random.rand()), y

    def identity(self):
        return ["noisy", *self.tensors]


def noisy(**how):
    split = tiny_data().train
    return DataLoader(Noisy(normalize(split.images), split.labels), 16, **how)


def test_the_callers_random_state_and_precision_stay(tmp_path):
    torch.manual_seed(5)
    model, before = ms.resnet(8, 3), random_state()
    for data in (tiny_data(), loader(tiny_data().train, shuffle=True), noisy()):
        ms.fit(model, data, **FAST)
        ms.recalibrate(model, data if isinstance(data, DataLoader) else data.train, 32, 16)
        assert random_state() == before


def test_what_transforms_draw_follows_from_the_seed(tmp_path, monkeypatch):
    ms.fit(whole := small(), noisy(), **FAST | {"epochs": 3})
    random.seed(1)
    np.random.seed(1)
    stopped(tmp_path, 1, monkeypatch, data=noisy())
    ms.fit(again := small(), noisy(), **FAST | {"epochs": 3}, run=tmp_path)
    assert same(whole, again)
    first, second = small(), small()
    for net in (first, second):
        ms.recalibrate(net, noisy(), 32, 16)
    assert same(first, second)


def test_workers_that_go_on_drawing_have_no_run_folder(tmp_path):
    lasting = noisy(num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="no identity: .* persistent_workers=False; without a run"):
        ms.fit(small(), lasting, **FAST, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Ordered(DistributedSampler):
    def set_epoch(self, epoch):
        self.told.append(epoch)


@pytest.mark.parametrize("inside", [False, True])
def test_a_sampler_is_told_the_epoch_wherever_it_lies(inside):
    split = tiny_data().train
    data = TensorDataset(normalize(split.images), split.labels)
    sampler = Ordered(data, 1, 0)
    sampler.told = []
    how = dict(batch_sampler=BatchSampler(sampler, 16, False))
    ms.fit(small(), DataLoader(data, **how if inside else dict(sampler=sampler)), **FAST, seed=1)
    assert list(dict.fromkeys(sampler.told)) == [100_003, 100_004]


class Guessed(list):
    """Batches whose number is said wrongly, as that of an IterableDataset may be."""

    def __len__(self):
        return self.said


@pytest.mark.parametrize(
    "said, told", [(8, "4 batches, its length is 8"), (3, "4 .*or more, .* 3")]
)
def test_a_loader_of_another_length_is_refused_in_the_first_epoch(said, told):
    batches = Guessed(loader(tiny_data().train))
    batches.said = said
    with pytest.raises(ValueError, match=f"the DataLoader made {told}: correct that"):
        ms.fit(small(), batches, **FAST)
    batches.said = 4
    assert len(ms.fit(small(), batches, **FAST)) == 2


def labelled(change):
    """Batches of the images of `DATA`, with other labels."""
    split = DATA.train
    return DataLoader(TensorDataset(normalize(split.images), change(split.labels)), 16)


DATA = tiny_data()
WRONG = {
    "epochs=0: expected a whole number": dict(epochs=0),
    "epochs=1.5": dict(epochs=1.5),
    "batch_size=0": dict(batch_size=0),
    "lr=-1.0: expected a finite number": dict(lr=-1.0),
    "lr=nan": dict(lr=math.nan),
    "lr=0: it must be above 0": dict(lr=0),
    "weight_decay=inf": dict(weight_decay=math.inf),
    "seed=-1": dict(seed=-1),
    "frozen_statistics='no': expected a bool": dict(frozen_statistics="no"),
    "run='': expected a folder": dict(run=""),
    "unknown precision 'fp8'": dict(precision="fp8"),
    "unknown schedule 'cosin'.*onecycle": dict(schedule="cosin"),
    "penalty=0.001: expected such as ms.GlobalL1": dict(penalty=1e-3),
    "made for another network": dict(
        penalty=ms.MaskedL1(small(1), {"bn": torch.arange(16) > 3}, 1)
    ),
    "label 2: the network has 2 outputs.*num_classes": dict(model=small(classes=2)),
    "does not run on images .3, 8, 8.*1 channels": dict(model=ms.resnet(8, 3, in_channels=1)),
    "gives .1, 64, 2, 2. of 1 images; expected one .N, classes.": dict(
        model=nn.Sequential(*[*small().children()][:6])
    ),
    "weights of torch.float64; fit trains float32": dict(model=small().double()),
    "no parameter to train": dict(model=small().requires_grad_(False)),
    "images are torch.uint8; expected float32: ms.normalize": dict(
        data=DataLoader(TensorDataset(DATA.train.images, DATA.train.labels), 16)
    ),
    "label 3: the network has 3": dict(data=labelled(lambda labels: labels + 1)),
    "label -1: the network has 3": dict(data=labelled(lambda labels: labels - 1)),
    "labels are torch.float32 .16.; expected int64": dict(data=labelled(torch.Tensor.float)),
    "such as a DataLoader, that are not empty": dict(data=loader(DATA.train, 65, drop_last=True)),
    "a batch is a Tensor; expected a pair": dict(data=DataLoader(normalize(DATA.train.images), 16)),
    "data is a Tensor; expected": dict(data=DATA.train.images),
    "data is a generator; expected": dict(data=(batch for batch in ())),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named_before_training(message, tmp_path):
    words = dict(WRONG[message])
    model, data = words.pop("model", small()), words.pop("data", DATA)
    before = copy.deepcopy(model)
    with pytest.raises((ValueError, TypeError), match=message):
        ms.fit(model, data, **(FAST | {"run": tmp_path / "run"} | words))
    assert same(model, before) and model.training and not (tmp_path / "run").exists()


def test_numbers_of_numpy_are_numbers(tmp_path, finished):
    how = dict(epochs=np.int64(2), lr=np.float64(0.05), batch_size=np.int32(16), seed=np.int64(0))
    ms.fit(small(), tiny_data(), **FAST | how, frozen_statistics=np.False_, run=tmp_path)
    wanted = (finished / "settings.json").read_text()
    assert (tmp_path / "settings.json").read_text() == wanted


@pytest.mark.parametrize("value", [0.0, None, torch.zeros(2)], ids=str)
def test_a_penalty_without_a_scalar_tensor_is_named(value):
    class Odd:
        def __call__(self):
            return value

        def __repr__(self):
            return "Odd(3)"

    with pytest.raises(ValueError, match=r"Odd\(3\) gave .*; expected a scalar tensor"):
        ms.fit(model := small(), tiny_data(), **FAST, penalty=Odd())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), small().parameters()))


def test_divergence_is_an_error_with_advice():
    with pytest.raises(FloatingPointError, match="diverged in epoch .*try a smaller lr"):
        ms.fit(small(), tiny_data(), **(FAST | dict(lr=1e12, schedule="constant")))


# ---- what comes out ----------------------------------------------------------------------------


def test_history_says_what_happened(tmp_path):
    model, data = small(), tiny_data()
    penalty = ms.GlobalL1(model, data.example, 1e-3)
    start = penalty().item()
    history = ms.fit(model, data, **FAST, penalty=penalty, run=tmp_path / "run")
    assert history.epoch.tolist() == [1, 2] and history.loss.iloc[1] < history.loss.iloc[0]
    assert history.val_top1.iloc[-1] == ms.evaluate(model, data.val)
    assert 0 < history.penalty.iloc[-1] < start
    gammas = read_tensors(tmp_path / "run" / "gammas.pt")
    assert gammas.shape == (3, 16 * 3 + 32 * 2 + 64 * 2)
    assert history.gamma_median.iloc[-1] == gammas[-1].float().median().item()


def test_the_seed_decides_on_all_that_is_drawn():
    def weights(seed, drawn=0):
        torch.manual_seed(0)
        layers = nn.Flatten(), nn.Linear(192, 20), nn.Dropout(), nn.Linear(20, 3)
        model = nn.Sequential(*layers)
        torch.rand(drawn)
        ms.fit(model, tiny_data(), **FAST, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(0), weights(0, drawn=5)) and not torch.equal(weights(0), weights(1))


def test_what_follows_a_loaded_run_is_what_follows_its_training(tmp_path):
    """Cut and folded, then repaired in a folder: its identity is in the last bits of the cut."""
    data, masks = tiny_data(), {"stage1.0.bn1": torch.arange(16) > 5}
    for _ in range(2):
        model = small()
        ms.fit(model, data, **FAST, run=tmp_path / "whole")
        cut = ms.prune(model, masks, data.example, fold_bias=True)
        ms.fit(cut, data, **FAST, run=tmp_path / "cut")  # refused if a bit of it is another


def test_frozen_statistics_stay_and_weights_move():
    model, before = small(), small()
    ms.fit(model, tiny_data(), **FAST, frozen_statistics=True)
    assert torch.equal(model.bn.running_mean, before.bn.running_mean)
    assert not torch.equal(model.bn.weight, before.bn.weight)


def test_frozen_statistics_of_a_shared_batchnorm_stay():
    norm, maps = nn.BatchNorm2d(8), [nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8)]
    blocks = [nn.Sequential(conv, norm) for conv in maps]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    ms.fit(model, tiny_data(), **FAST, frozen_statistics=True)
    assert not norm.running_mean.any() and norm.num_batches_tracked == 0


def test_a_teacher_stays_in_the_modes_that_its_layers_are_in():
    teacher = small(1).train()
    teacher.bn.eval()
    modes = [m.training for m in teacher.modules()]
    ms.fit(small(), tiny_data(), **FAST, teacher=teacher)
    assert [m.training for m in teacher.modules()] == modes


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_it_learns(precision):
    data = ms.load_data("shapes", image_size=8, sizes=(1000, 300))
    model = small(classes=10)
    ms.fit(model, data, epochs=8, lr=0.2, batch_size=20, precision=precision)
    assert ms.evaluate(model, data.test) > 25  # chance is 10


def test_schedules():
    rates = ms.learning_rates(0.4, 100)
    assert rates.argmax() == 20 and rates.max() == pytest.approx(0.4)
    assert rates[0] == pytest.approx(0.02) and rates[-1] < 1e-3
    assert rates[:20].diff().min() > 0 and rates[21:].diff().max() < 0
    with pytest.raises(ValueError, match="'cosin'.*onecycle"):
        ms.learning_rates(1.0, 8, "cosin")
    for lr, steps in ((-1.0, 8), (float("nan"), 8), (float("inf"), 8), (1.0, 0), (1.0, 2.5)):
        with pytest.raises(ValueError, match=f"lr={lr}, steps={steps}: expected a number from 0"):
            ms.learning_rates(lr, steps)


def test_evaluate_refuses_a_network_that_has_diverged():
    """The largest of its outputs would be the first nan: one class for every image."""
    model = small()
    with torch.no_grad():
        model.fc.bias[1] = float("nan")
    with pytest.raises(ValueError, match="outputs are nan: the network has diverged"):
        ms.evaluate(model, tiny_data().test)


@pytest.mark.parametrize(
    "labels, named",
    [
        (lambda y: y[:, None], r"labels are torch.int64 \[64, 1\]; expected int64 \[64\]"),
        (lambda y: y[:1], r"labels are torch.int64 \[1\]; expected int64 \[64\]"),
        (lambda y: nn.functional.one_hot(y), r"labels are torch.int64 \[64, 3\]"),
        (lambda y: y.float(), r"labels are torch.float32 \[64\]"),
        (lambda y: y - 1, "label -1: the network has 3 outputs"),
        (lambda y: y + 1, "label 3: the network has 3 outputs"),
    ],
)
def test_evaluate_counts_labels_of_classes_only(labels, named):
    split, model = tiny_data().test, small()
    batch = normalize(split.images), labels(split.labels)
    with pytest.raises(ValueError, match=named):
        ms.evaluate(model, [batch])
    with pytest.raises(ValueError, match=named):  # nor is it a val_top1
        ms.fit(model, Data("x", split, [batch], split, tuple("abc")), **FAST)


@pytest.mark.parametrize("shape", [(64, 3, 8, 8), (64,), (1, 3)])
def test_evaluate_refuses_what_is_no_classifier(shape):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.zeros(shape)

    with pytest.raises(ValueError, match=r"Odd gives .* of 64 images; expected one \[N, classes\]"):
        ms.evaluate(Odd(), tiny_data().test)


def test_a_network_without_parameters_is_evaluated():
    class Bright(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    assert 0 < ms.evaluate(Bright(), tiny_data().test) < 100
    norm = nn.Sequential(nn.BatchNorm2d(3, affine=False))
    assert ms.recalibrate(norm, tiny_data().train)[0].running_mean.any()
    assert 0 < ms.evaluate(nn.Sequential(norm, Bright()), tiny_data().test) < 100


@pytest.mark.parametrize("size", [0, -3])
def test_a_batch_without_an_image_is_refused(size):
    data, model = tiny_data(), small()
    for look in (ms.evaluate, lambda *a: ms.taylor_scores(*a[:2], data.example, batch_size=a[2])):
        with pytest.raises(ValueError, match=f"batch_size={size}: a batch holds at least one"):
            look(model, data.test, size)


def test_evaluate_is_top1_in_percent_and_keeps_the_mode():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.arange(3.0))

        def forward(self, x):
            assert not self.training
            return self.bias.expand(len(x), 3)

    model = Constant().train()
    assert ms.evaluate(model, tiny_data(50).test, batch_size=7) == 100 * 16 / 50
    assert model.training
    with pytest.raises(AttributeError):
        ms.evaluate(model, [(None, None)])
    assert model.training


def test_a_training_set_smaller_than_a_batch():
    data = tiny_data(10)
    assert len(list(batches(data.train, 64, torch.Generator()))) == 1
    ms.fit(small(), data, epochs=1, lr=0.01, batch_size=64)


def test_a_plain_penalty_may_have_a_step():
    seen = []

    class Counting:
        def __call__(self):
            return torch.zeros(())

        def step(self, iteration):
            seen.append(iteration)

    ms.fit(small(), tiny_data(), **FAST, penalty=Counting())
    assert seen == list(range(2 * 4))


# ---- how it is computed ------------------------------------------------------------------------

COMPILER = (shutil.which("g++") or shutil.which("clang++")) and Path(
    sysconfig.get_path("include"), "Python.h"
).exists()
# under ATEN_CPU_CAPABILITY=default the C++ that torch.compile writes does not compile (torch 2.14)
COMPILER = COMPILER and torch.backends.cpu.get_cpu_capability() != "DEFAULT"


@pytest.mark.skipif(not COMPILER, reason="torch.compile does not work here")
def test_a_captured_step_learns_the_same(monkeypatch):
    def network():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 3))

    histories, captured, compiling = [], [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **how: captured.append(model) or compiling(model, **how)
    )
    plain = network()  # without hooks: its graph is not to be reused
    ms.fit(plain, tiny_data(), **FAST | {"epochs": 1}, capture=True)
    for capture in ("0", "1"):
        assert captured == [plain]
        monkeypatch.setenv("MSLIB_CAPTURE", capture)
        model = network()
        flow = ms.FeatureFlow(model, 1.0)  # whose hooks see the network's inside
        histories.append(ms.fit(model, tiny_data(), **FAST, penalty=flow))
    assert captured == [plain, model] and histories[1].penalty.min() > 0.1
    histories = [h.drop(columns="val_top1") for h in histories]
    pd.testing.assert_frame_equal(*histories, rtol=1e-2)


def test_layout_goes_by_widths_precision_and_device():
    odd, even = nn.Sequential(nn.Conv2d(3, 13, 3)), nn.Sequential(nn.Conv2d(3, 16, 3))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pick_layout(odd, cpu, "bf16") is torch.contiguous_format
    for model, device, precision in ((odd, cpu, "fp32"), (odd, gpu, "bf16"), (even, cpu, "bf16")):
        assert pick_layout(model, device, precision) is torch.channels_last


def test_no_bf16_where_a_strided_convolution_reads_one_pixel(monkeypatch):
    """There the gradient of the weights that only see padding is whatever lay in memory: not 0."""
    data, convs = tiny_data(), (nn.Conv2d(3, 64, 8), nn.Conv2d(64, 64, 3, 2, 1))
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(64, 10))
    before = model[1].weight.detach().clone()
    ms.fit(model, data, epochs=1, lr=0.01, batch_size=16, weight_decay=0, device="cpu")
    moved = (model[1].weight - before).abs().amax((0, 1))
    assert moved[1, 1] > 0 and moved[0].max() == 0
    monkeypatch.setattr("mslib.training.device._cpu_computes_in_bf16", lambda: True)
    cpu, nets = torch.device("cpu"), (model.train(), small())
    picked = [pick_precision("auto", cpu, net, data.example) for net in nets]
    assert picked == ["fp32", "bf16"] and model.training
    assert not model[1]._forward_pre_hooks


def test_bf16_on_a_cpu_needs_its_convolutions_in_bf16_too(monkeypatch):
    """Where oneDNN is held to AVX2, a processor with AVX-512 BF16 convolves bf16 in a slow loop."""
    said = "import torch; from mslib.training.device import pick_precision as p; "
    said += "net = torch.nn.Conv2d(3, 8, 3); "
    said += "print(p('auto', torch.device('cpu'), net, torch.zeros(1, 3, 8, 8)))"
    told = subprocess.run(
        [sys.executable, "-c", said],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["fp32"]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    cpu, net, example = torch.device("cpu"), small(), tiny_data().example
    assert pick_precision("auto", cpu, net, example) == "bf16"
    with torch.backends.mkldnn.flags(enabled=False):
        assert pick_precision("auto", cpu, net, example) == "fp32"


def test_a_network_that_branches_on_what_it_sees_is_trained(monkeypatch):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, x):
            return self.net(x if float(x.mean()) > -9 else -x)

    monkeypatch.setattr("mslib.training.device._cpu_computes_in_bf16", lambda: True)
    assert len(ms.fit(Branching(), tiny_data(), epochs=1, lr=0.01, batch_size=32)) == 1


# ---- BatchNorm statistics anew -----------------------------------------------------------------


def test_recalibrate_estimates_the_statistics_of_the_network_as_it_is():
    """Means and variances off by far: anew they are those of the images, whatever they were."""
    data, model = ms.load_data("shapes", image_size=8, sizes=(200, 50)), small(classes=10)
    spoiled, weights = copy.deepcopy(model), [p.detach().clone() for p in model.parameters()]
    for m in spoiled.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean += 3
            m.running_var *= 9
    for net in (model, spoiled):
        assert ms.recalibrate(net.eval(), data.train, images=150, batch_size=50) is net
        assert not net.training
    assert same(model, spoiled)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights))
    assert float(model.bn.running_var.min()) > 0 and int(model.bn.num_batches_tracked) == 3
    (x, _), *_ = batches(data.train, 180)  # the images as they are
    means = model.conv(x).detach().mean((0, 2, 3))
    assert float((model.bn.running_mean - means).abs().max()) < 0.3
    assert float((model.bn.running_mean + 3 - means).abs().max()) > 0.3


@pytest.mark.parametrize(
    "split, images, message",
    [
        ([], 2000, "no image for new statistics"),
        (None, 0, "images=0, batch_size=128: both are at least 1"),
        ([torch.full((4, 3, 8, 8), math.nan)], 4, "bn: new statistics are not finite"),
        ([torch.rand(4, 3, 8, 8), torch.rand(4, 5, 8, 8)], 256, "to have 3 channels, but got 5"),
    ],
)
def test_recalibrate_leaves_the_network_alone_where_it_cannot_be_done(split, images, message):
    data, model = ms.load_data("shapes", image_size=8, sizes=(200, 50)), small(classes=10)
    ms.recalibrate(model, data.train)
    before, moment = copy.deepcopy(model.state_dict()), model.bn.momentum
    with pytest.raises((ValueError, RuntimeError), match=message):
        ms.recalibrate(model, data.train if split is None else split, images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.bn.momentum == moment is not None and model.training


def test_recalibrate_changes_the_statistics_of_batchnorms_alone():
    torch.manual_seed(0)
    first = nn.utils.spectral_norm(nn.Conv2d(3, 8, 3))  # its vectors move in training mode
    middle = nn.InstanceNorm2d(8, track_running_stats=True)
    net = nn.Sequential(first, middle, nn.BatchNorm2d(8)).eval()
    before = copy.deepcopy(net.state_dict())
    ms.recalibrate(net, [(torch.randn(4, 3, 8, 8) + 3, torch.zeros(4).long())])
    changed = [n for n, t in net.state_dict().items() if not torch.equal(t, before[n])]
    assert changed == ["2.running_mean", "2.running_var", "2.num_batches_tracked"]


def test_recalibrate_draws_the_same_from_a_loader_each_time():
    few, first = loader(tiny_data().train, 32, shuffle=True), small()
    again = copy.deepcopy(first)
    ms.recalibrate(first, few, images=64, batch_size=32)
    torch.rand(1)
    ms.recalibrate(again, few, images=64, batch_size=32)
    assert torch.equal(first.bn.running_mean, again.bn.running_mean)
    assert int(first.bn.num_batches_tracked) == 2
