import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torchvision import datasets, transforms

import mslib as ms
from mslib.data.archives import layout, opened
from mslib.data.shapes import CLASSES, draw_shapes
from mslib.data.sources import dataset_identity, find_dataset
from mslib.data.tensors import Split, augment, batches, draw
from mslib.files import ROOT, data_folder

from .conftest import EVERY, WHOLE_CIFAR


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """train/ and test/ with two classes; the cache goes to a temporary folder too."""
    monkeypatch.setattr("mslib.data.sources.data_folder", lambda: tmp_path / "course" / "data")
    images, _ = draw_shapes(40, 12, seed=3)
    for split, n in (("train", 10), ("test", 3)):
        for c, name in enumerate(("cat", "dog")):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(images[2 * i + c].permute(1, 2, 0).numpy()).save(
                    place / f"{i:03d}.png"
                )
    return tmp_path / "images"


def pack(folder, kind):
    path = folder.parent / f"images.{kind}"
    if kind == "zip":
        shutil.make_archive(str(folder.parent / "images"), "zip", folder)
    else:
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder, arcname="images")
    return path


def test_shapes_are_the_same_for_a_seed_and_balanced():
    images, labels = draw_shapes(200, 16, seed=4)
    assert images.shape == (200, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(images, draw_shapes(200, 16, seed=4)[0]) and not torch.equal(
        images, draw_shapes(200, 16, seed=5)[0]
    )
    assert labels.bincount().tolist() == [20] * len(CLASSES)


def test_split_is_fixed_and_disjoint():
    data = ms.load_data("shapes", image_size=16, sizes=(500, 100))
    assert (len(data.train), len(data.val), len(data.test)) == (450, 50, 100)
    rows = {bytes(x.numpy()) for x in data.train.images} & {
        bytes(x.numpy()) for x in data.val.images
    }
    assert not rows
    assert data.fingerprint == ms.load_data("shapes", image_size=16, sizes=(500, 100)).fingerprint
    assert (
        data.fingerprint != ms.load_data("shapes", 0.2, image_size=16, sizes=(500, 100)).fingerprint
    )


@pytest.mark.parametrize(
    "change",
    [
        *({"val": v} for v in (0, 1, -0.1, 2, "0.1", float("nan"), None)),
        *({"image_size": v} for v in (0, -8, 8.5, "8", 100_000, True)),
        *({"sizes": (n, 20)} for n in (0, 9, 20.5, "40", 10**9)),
        {"val": 0.99, "sizes": (20, 20)},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(change):
    (name, value), *_ = change.items()
    shown = value[0] if name == "sizes" else value
    with pytest.raises(ValueError, match=f"{name}={shown!r}"):
        ms.load_data("shapes", **change)


@pytest.mark.parametrize(
    "change",
    [{"size": 0}, {"size": 8.5}, {"batch_size": 0}, {"batch_size": "8"}, {"crop": 0}, {"crop": 8}]
    + [{"workers": -1}, {"val": 1}, {"val": 0.99}],
    ids=str,
)
def test_a_value_out_of_range_is_named_for_folders(folder, change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        ms.load_folder(folder, **change)


def test_what_is_held_out_leaves_every_class_something_to_train_on(folder):
    for file in sorted((folder / "train" / "dog").iterdir())[1:]:
        file.unlink()
    with pytest.raises(ValueError, match="val=0.9 of 11 training images leaves none of class"):
        ms.load_data(folder, val=0.9)
    with pytest.raises(ValueError, match="do not fit into memory; give a smaller image_size"):
        Image.new("RGB", (6000, 6000)).save(folder / "train" / "cat" / "000.png")
        for i in range(80):
            shutil.copy(
                folder / "train" / "cat" / "001.png", folder / "train" / "cat" / f"x{i}.png"
            )
        ms.load_data(folder)


def test_folder_tar_and_zip_hold_the_same(folder):
    sets = [ms.load_data(p) for p in (folder, pack(folder, "tar.gz"), pack(folder, "zip"))]
    assert len({d.fingerprint for d in sets}) == 1
    data = sets[0]
    assert (
        data.classes == ("cat", "dog")
        and data.input_shape == (3, 12, 12)
        and len(data.train) + len(data.val) == 20
    )
    cached = ms.load_data(folder.parent / "images.tar.gz")  # the second time from the cache
    assert cached.fingerprint == data.fingerprint and list(
        (folder.parent / "course" / "data" / "cache").iterdir()
    )


def test_val_folder_serves_as_test_and_hidden_files_are_passed_over(folder):
    (folder / "test").rename(folder / "val")
    (folder / "train" / "cat" / ".DS_Store").write_bytes(b"junk")
    (folder / "README.txt").write_text("about these images")
    assert len(ms.load_data(folder).test) == 6
    (folder / "test").mkdir()
    for name in ("cat", "dog"):  # where both are there, test/ is the test set
        (folder / "test" / name).mkdir()
        image = sorted((folder / "val" / name).iterdir())[0]
        image.rename(folder / "test" / name / image.name)
    assert len(ms.load_data(folder).test) == 2


def test_grey_palette_and_alpha_images_become_rgb(folder):
    grey = Image.fromarray(np.full((12, 12), 100, np.uint8))
    grey.save(folder / "train" / "cat" / "grey.png")
    grey.convert("LA").save(folder / "train" / "cat" / "grey_alpha.png")
    Image.new("RGBA", (12, 12), (200, 10, 10, 128)).save(folder / "train" / "dog" / "alpha.png")
    Image.new("P", (12, 12)).save(folder / "train" / "dog" / "palette.png")
    Image.new("RGB", (20, 16), (1, 2, 3)).save(folder / "train" / "dog" / "larger.jpg")
    data = ms.load_data(folder)
    assert data.input_shape == (3, 12, 12) and len(data.train) + len(data.val) == 25
    every = torch.cat([data.train.images, data.val.images])
    assert (every == 100).flatten(1).all(1).sum() == 2  # both grey ones
    assert ms.load_data(folder, image_size=8).input_shape == (3, 8, 8)


def remove(folder, *places):
    for place in places:
        shutil.rmtree(folder / place)


@pytest.mark.parametrize(
    "places, message",
    [
        (["train/cat", "train/dog"], "no train images; expected files like train/<class>"),
        (["test"], "no test images"),
        (["test/dog"], "class 'dog' is in train/ but has no image in test/"),
        (["train/dog"], "class 'dog' is in test/ but has no image in train/"),
        (["train/dog", "test/dog"], "one class, 'cat'"),
    ],
)
def test_bad_folders(folder, places, message):
    remove(folder, *places)
    for start in (ms.load_data, ms.load_folder):
        with pytest.raises(ValueError, match=message):
            start(folder)


def test_missing_path_and_unknown_name():
    with pytest.raises(FileNotFoundError, match="'cifar11' is none of shapes, cifar10, cifar100"):
        ms.load_data("cifar11")


def test_cifar_through_torchvision(monkeypatch):
    class Fake:
        classes = ["a", "b"]

        def __init__(self, root, train, download):
            n = 20 if train else 10
            self.data, self.targets = (
                np.arange(n * 32 * 32 * 3).reshape(n, 32, 32, 3).astype(np.uint8),
                [0, 1] * (n // 2),
            )

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    data = ms.load_data("cifar10")
    assert data.input_shape == (3, 32, 32) and len(data.test) == 10
    assert data.test.images[0, :, 0, 1].tolist() == [3, 4, 5]  # channels first
    assert ms.load_data("cifar10", image_size=16).train.images.shape == (18, 3, 16, 16)

    def offline(*args, **kwargs):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR10", offline)
    with pytest.raises(OSError, match="could not be downloaded.*dataset='shapes'"):
        ms.load_data("cifar10")


def test_augmented_images_are_crops_and_mirrors():
    images = torch.arange(64 * 3 * 16 * 8).reshape(64, 3, 16, 8).remainder(251).to(torch.uint8)
    draws = draw(64, 16, torch.Generator().manual_seed(1))
    assert draws.shape == (3, 64) and [set(row) for row in draws.tolist()] == [
        set(range(5)),
        set(range(5)),
        {0, 1},
    ]
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    for i, (top, left, mirror) in enumerate(draws.T.tolist()):
        crop = padded[i, :, top : top + 16, left : left + 8]
        assert (augment(images, draws)[i].numpy() == (crop[:, :, ::-1] if mirror else crop)).all()


def test_batches_are_shuffled_and_augmented_by_their_generator():
    """Computed once more, one image at a time."""
    data = ms.load_data("shapes", image_size=16, sizes=(100, 30))
    found = list(batches(data.train, 16, torch.Generator().manual_seed(3)))
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(len(data.train), generator=generator).tolist()
    assert len(found) == len(order) // 16 == 5 and order != sorted(order)
    for start, (x, y) in zip(range(0, 80, 16), found):
        top, left = torch.randint(5, (2, 16, 1), generator=generator).squeeze(2).tolist()
        mirror = (torch.rand(1, 16, generator=generator) < 0.5)[0].tolist()
        assert y.tolist() == data.train.labels[order[start : start + 16]].tolist()
        for k in range(16):
            image = np.pad(data.train.images[order[start + k]].numpy(), ((0, 0), (2, 2), (2, 2)))
            crop = image[:, top[k] : top[k] + 16, left[k] : left[k] + 16]
            crop = crop[:, :, ::-1] if mirror[k] else crop
            assert np.array_equal(x[k].numpy(), (crop.astype(np.float32) - 120) / 64)
    again = list(batches(data.train, 16, torch.Generator().manual_seed(4)))
    assert again[0][1].tolist() != found[0][1].tolist()
    shared = [
        list(batches(data.train, 16, torch.Generator().manual_seed(3), (i, 2))) for i in (0, 1)
    ]
    for (x, y), (x0, y0), (x1, y1) in zip(found, *shared):  # of two processes, every other image
        assert torch.equal(x[0::2], x0) and torch.equal(x[1::2], x1)
        assert torch.equal(y[0::2], y0) and torch.equal(y[1::2], y1)


def test_batches_in_order_without_a_generator():
    data = ms.load_data("shapes", image_size=8, sizes=(100, 30))
    test = list(batches(data.test, 16))
    assert [len(y) for _, y in test] == [16, 14]
    assert torch.equal(torch.cat([y for _, y in test]), data.test.labels)
    x = torch.cat([x for x, _ in test])
    assert torch.equal(x, (data.test.images.float() - 120) / 64) and abs(float(x.mean())) < 1.5
    assert test[0][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_only_bytes_are_normalized(kind):
    images = torch.zeros(2, 3, 4, 4, dtype=kind).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=f"the images are {kind}; expected uint8"):
        ms.normalize(images)
    assert not images.any()


@pytest.mark.parametrize("size", [0, -5, 2.5, float("nan")])
def test_there_are_no_steps_of_such_batches(size):
    with pytest.raises(ValueError, match=f"batch_size={size}: a batch holds at least one image"):
        ms.steps_per_epoch(split(), size)


# ---- what may stand in Data, and what tells it from others ----


def split(n=6):
    return Split(torch.arange(n * 48, dtype=torch.uint8).view(n, 3, 4, 4), torch.arange(n) % 2)


@pytest.mark.parametrize(
    "images, labels",
    [
        (torch.zeros(4, 3, 8, 8), torch.zeros(4).long()),
        (torch.zeros(4, 3, 8).byte(), torch.zeros(4).long()),
        (torch.zeros(4, 3, 8, 8).byte(), torch.zeros(4)),
        (torch.zeros(4, 3, 8, 8).byte(), torch.zeros(4).byte()),
        (torch.zeros(4, 3, 8, 8).byte(), torch.zeros(4, 1).long()),
        (torch.zeros(4, 3, 8, 8).byte(), torch.zeros(5).long()),
    ],
)
def test_a_split_of_other_types_or_shapes_is_refused(images, labels):
    with pytest.raises(
        ValueError, match=r"a Split takes images uint8 \[N, C, H, W\] and labels int64"
    ):
        ms.Split(images, labels)


def test_data_of_other_things_are_refused():
    good = split()
    with pytest.raises(ValueError, match="val of Data: expected a Split, or batches with a length"):
        ms.Data("x", good, iter([]), good, ("a", "b"))
    with pytest.raises(ValueError, match="test of Data: .* that are not empty"):
        ms.Data("x", good, good, good.subset(range(0)), ("a", "b"))
    with pytest.raises(ValueError, match="train of Data: labels 0 to 1, for 1 classes"):
        ms.Data("x", good, good, good, ("a",))


def floats(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 3, 4, 4, generator=generator), torch.arange(n) % 2)


def of_loaders(train, test=None):
    test = test or DataLoader(floats(), 2)
    return ms.Data("mine", train, test, test, ("a", "b"))


def test_data_of_the_users_loaders():
    data, state = of_loaders(DataLoader(floats(), 2, shuffle=True)), torch.get_rng_state()
    assert data.input_shape == (3, 4, 4) and torch.equal(data.example, floats().tensors[0][:1])
    assert (
        repr(data) == "Data(mine: 2 classes, 3×4×4, 3 train batches, 3 val batches, 3 test batches)"
    )
    assert torch.equal(torch.get_rng_state(), state)  # looking at data changes no later draw
    bytes_ = TensorDataset(torch.zeros(4, 3, 4, 4).byte(), torch.zeros(4).long())
    with pytest.raises(ValueError, match="batches of mine: expected float images"):
        _ = of_loaders(DataLoader(floats()), DataLoader(bytes_)).example


class Own(TensorDataset):
    """A data set of one's own, which can say what it is."""

    def identity(self):
        return ["own", *self.tensors]


def cifar10_of(images, transform):
    """torchvision's CIFAR10 without a download."""
    data = datasets.CIFAR10.__new__(datasets.CIFAR10)
    datasets.VisionDataset.__init__(data, "anywhere", transform=transform)
    data.data, data.targets, data.classes = images, [0, 1] * (len(images) // 2), ["a", "b"]
    return data


class Silent(Dataset):
    def __len__(self):
        return 4


def test_the_fingerprint_of_loaders_tells_what_decides_the_outcome():
    image, plain = floats(), transforms.ToTensor()
    turn = [transforms.Compose([transforms.RandomRotation(d), plain]) for d in (5, 10)]
    images = [np.full((4, 4, 4, 3), colour, np.uint8) for colour in (0, 1)]
    weights = [WeightedRandomSampler(w, 6) for w in ([1.0] * 6, [1.0] * 5 + [2.0])]
    different = [
        DataLoader(image, 2),
        DataLoader(image, 3),
        DataLoader(image, 2, shuffle=True),
        DataLoader(image, 2, drop_last=True),
        DataLoader(image, 2, num_workers=1),
        DataLoader(image, 2, sampler=weights[0]),
        DataLoader(image, 2, sampler=weights[1]),
        DataLoader(floats(seed=1), 2),
        DataLoader(floats(4), 2),
        DataLoader(Subset(image, [0, 1, 2]), 2),
        DataLoader(Subset(image, [0, 1, 3]), 2),
        DataLoader(ConcatDataset([image, image]), 2),
        DataLoader(Own(*image.tensors), 2),
        DataLoader(cifar10_of(images[0], plain), 2),
        DataLoader(cifar10_of(images[1], plain), 2),
        DataLoader(cifar10_of(images[0], turn[0]), 2),
        DataLoader(cifar10_of(images[0], turn[1]), 2),
        [(torch.zeros(2, 3, 4, 4), torch.zeros(2).long())],
        [(torch.ones(2, 3, 4, 4), torch.zeros(2).long())],
        split(),
    ]
    found = [of_loaders(loader).fingerprint for loader in different]
    assert None not in found and len(set(found)) == len(found)
    assert found[0] == of_loaders(DataLoader(floats(), 2)).fingerprint
    assert found[-1] == of_loaders(split()).fingerprint


def test_what_cannot_be_identified_has_no_fingerprint():
    image = floats()
    for loader in (
        DataLoader(Silent(), 2),
        DataLoader(image, 2, shuffle=True, generator=torch.Generator()),
        DataLoader(image, 2, collate_fn=lambda batch: batch),
        DataLoader(image, 2, num_workers=1, persistent_workers=True),
        DataLoader(cifar10_of(np.zeros((4, 4, 4, 3), np.uint8), transforms.Lambda(lambda x: x)), 2),
        DataLoader(cifar10_of(np.zeros((4, 4, 4, 3), np.uint8), Silent()), 2),
    ):
        assert of_loaders(loader).fingerprint is None


def test_the_fingerprint_of_tensors_tells_labels_order_and_classes():
    data = ms.Data("one", split(), split(), split(), ("a", "b"))
    other = Split(split().images, 1 - split().labels)
    turned = split().subset(torch.arange(6).flip(0))
    wide = Split(split().images.view(6, 3, 2, 8), split().labels)
    found = {
        ms.Data("x", *parts, classes).fingerprint
        for *parts, classes in (
            (split(), split(), split(), ("a", "c")),
            (other, split(), split(), ("a", "b")),
            (split(), other, split(), ("a", "b")),
            (split(), split(), other, ("a", "b")),
            (turned, split(), split(), ("a", "b")),
            (wide, split(), split(), ("a", "b")),
        )
    }
    assert len(found) == 6 and data.fingerprint not in found
    assert data.fingerprint == ms.Data("two", split(), split(), split(), ("a", "b")).fingerprint


def test_the_fingerprint_follows_a_change_in_place():
    data = ms.Data("one", split(), split(), split(), ("a", "b"))
    found = [data.fingerprint]
    for change in (data.train.images.zero_, data.train.labels.zero_, data.val.images.zero_):
        change()
        found.append(data.fingerprint)
    assert len({*found}) == 4 and found[-1] == data.fingerprint
    loaded = of_loaders([(image := torch.zeros(2, 3, 4, 4), torch.zeros(2).long())])
    before = loaded.fingerprint
    image += 1
    assert loaded.fingerprint != before


def test_the_fingerprint_of_a_folder_tells_files_and_settings(folder, tmp_path):
    def found(path=folder, **change):
        settings = dict(size=8, batch_size=4, workers=0) | change
        return ms.load_folder(path, **settings).fingerprint

    first = found()
    assert first == found() and first is not None
    changes = [{"size": 9}, {"batch_size": 2}, {"crop": 0.5}, {"val": 0.2}, {"workers": 1}]
    assert len({first, *(found(**change) for change in changes)}) == 6
    shutil.copytree(folder, tmp_path / "copy")
    assert found(tmp_path / "copy") == first
    change_a_pixel(folder / "train" / "dog" / "003.png")
    assert found() != first


def change_a_pixel(path):
    """Without a change of size (a format without compression) and time."""
    stat, image = path.stat(), Image.open(path).convert("RGB")
    image.putpixel((0, 0), (1, 2, 3))
    image.save(path, "BMP")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_two_data_sets_of_one_name_are_told_apart(folder, tmp_path):
    place = tmp_path / "elsewhere" / "images"
    shutil.copytree(folder, place)
    first = dataset_identity(str(folder))
    assert first == dataset_identity(folder) != dataset_identity(place)
    (folder / ".DS_Store").write_bytes(b"junk")
    assert dataset_identity(folder) == first != dataset_identity(folder, 8)
    image = folder / "train" / "dog" / "003.png"
    change_a_pixel(image)
    second, size = dataset_identity(folder), image.stat().st_size
    assert second != first
    for colour in "red", "blue":  # of the same size and time
        stat = image.stat()
        Image.new("RGB", (12, 12), colour).save(image, "BMP")
        os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert image.stat().st_size == size and dataset_identity(folder) != second
        second = dataset_identity(folder)
    archives = [pack(f, "tar.gz") for f in (folder, place)]
    assert len({dataset_identity(a) for a in archives}) == 2
    shutil.copy(archives[0], tmp_path / "moved.tar.gz")
    assert dataset_identity(tmp_path / "moved.tar.gz") == dataset_identity(archives[0])
    assert dataset_identity("cifar10") != dataset_identity("cifar100")


def test_a_name_that_means_two_places_is_refused(tmp_path, monkeypatch):
    for base in ("course", "here"):
        (tmp_path / base / "notebooks").mkdir(parents=True)
        (tmp_path / base / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("mslib.data.sources.ROOT", tmp_path / "course")
    monkeypatch.setattr("mslib.files.ROOT", tmp_path / "course")
    with pytest.raises(ValueError, match="'notebooks' may be .*here.*course.*give the full path"):
        find_dataset("notebooks")
    (tmp_path / "course" / "own").mkdir()
    assert find_dataset("own") == tmp_path / "course" / "own"
    monkeypatch.setattr("mslib.data.sources.ROOT", tmp_path)  # site-packages, say
    monkeypatch.setattr("mslib.files.ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="'course' is none of shapes"):
        find_dataset("course")


def test_where_data_are_kept(tmp_path, monkeypatch):
    assert data_folder() == ROOT / "data"
    monkeypatch.setattr("mslib.files.ROOT", tmp_path)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_folder() == tmp_path / "cache" / "mslib"
    monkeypatch.setenv("MSLIB_CACHE", str(tmp_path / "mine"))
    assert data_folder() == tmp_path / "mine"


def test_folders_are_scaled_as_tensors_are(folder):
    data = ms.load_folder(folder, 12, 8, workers=0)
    files = sorted((folder / "test").rglob("*.png"))
    whole = [Image.open(file).resize((14, 14), Image.Resampling.BILINEAR) for file in files]
    middle = np.stack([np.asarray(image)[1:13, 1:13] for image in whole])
    want = ms.normalize(torch.from_numpy(middle).permute(0, 3, 1, 2))
    assert torch.equal(torch.cat([x for x, _ in data.test]), want)


def test_the_cifar_copy(cifar, few_cifar, monkeypatch, tmp_path):
    """The names of all images, and the pixels of some; with MSLIB_WHOLE_CIFAR=1 of all."""
    with opened(cifar) as (names, _):
        classes, found, note = layout(cifar, names)
    assert (len(found["train"]), len(found["test"]), note) == (50_000, 10_000, "")
    assert classes[:2] == ["airplane", "automobile"]
    if not WHOLE_CIFAR:
        monkeypatch.setattr("mslib.data.sources.data_folder", lambda: tmp_path)
    data = ms.load_data(cifar if WHOLE_CIFAR else few_cifar)
    share = 1 if WHOLE_CIFAR else EVERY
    sizes = tuple(n // share for n in (45_000, 5_000, 10_000))
    assert (len(data.train), len(data.val), len(data.test)) == sizes
    assert data.test.labels.bincount().tolist() == [1000 // share] * 10
    assert data.classes == tuple(classes) and data.input_shape == (3, 32, 32)
    assert 100 < float(data.train.images[:5000].float().mean()) < 140


@pytest.mark.parametrize("where", ["in memory", "while it trains"])
def test_steps_per_epoch_are_those_that_fit_takes(folder, where):
    """A strength that is chosen by its push depends on this number."""
    if where == "in memory":
        data = ms.load_data(folder)
    else:
        data = ms.load_folder(folder, 12, batch_size=4, workers=0)

    class Counts(ms.Penalty):
        steps = 0

        def __call__(self):
            return torch.zeros(())

        def step(self, iteration):
            self.steps += 1

    counts = Counts()
    ms.fit(ms.resnet(8, 2), data, epochs=2, lr=0.01, batch_size=4, penalty=counts)
    assert counts.steps == 2 * ms.steps_per_epoch(data.train, 4) > 2
