import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import mslib as ms
from mslib.data.shapes import CLASSES, draw_shapes
from mslib.data.tensors import augment, batches, draw


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


@pytest.mark.parametrize("val", [0, 1, -0.1, 2])
def test_val_out_of_range(val):
    with pytest.raises(ValueError, match=f"val={val}"):
        ms.load_data("shapes", val)


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


def empty(folder):
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()


def no_image(folder):
    (folder / "train" / "dog" / "notes.png").write_bytes(b"these are no pixels")


def cut_image(folder):
    path = folder / "test" / "dog" / "001.png"
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    "damage, message",
    [
        (empty, "no train images; expected files like train/<class>"),
        (lambda f: shutil.rmtree(f / "test"), "no test images"),
        (
            lambda f: shutil.rmtree(f / "test" / "dog"),
            "class 'dog' is in train/ but has no image in test/",
        ),
        (
            lambda f: shutil.rmtree(f / "train" / "dog"),
            "class 'dog' is in test/ but has no image in train/",
        ),
        (lambda f: [shutil.rmtree(f / s / "dog") for s in ("train", "test")], "one class, 'cat'"),
        (no_image, "train/dog/notes.png is not a readable image"),
        (cut_image, "test/dog/001.png is not a readable image"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_folders(folder, damage, message, packed):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        ms.load_data(pack(folder, "tar.gz") if packed else folder)


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_a_truncated_archive(folder, kind):
    path = pack(folder, kind)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(0.7 * len(whole))])
    with pytest.raises(ValueError, match=f"images.{kind} cannot be read"):
        ms.load_data(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        ms.load_data(path)


def test_an_archive_with_a_damaged_member(folder):
    path = folder.parent / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read|not a readable image"):
        ms.load_data(path)


def test_an_archive_with_a_password(folder):
    path = pack(folder, "zip")
    content = path.read_bytes()
    for sign, place in (
        (b"PK\x03\x04", 6),
        (b"PK\x01\x02", 8),
    ):  # the flag "encrypted" in both headers of each file
        content = b"".join(
            part if i == 0 else sign + part[: place - 4] + b"\1" + part[place - 3 :]
            for i, part in enumerate(content.split(sign))
        )
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match="images.zip cannot be read .* encrypted, password required"
    ):
        ms.load_data(path)


def test_missing_path_and_unknown_name():
    with pytest.raises(FileNotFoundError, match="'cifar11' is none of shapes, cifar10, cifar100"):
        ms.load_data("cifar11")


def test_cifar_through_torchvision(monkeypatch):
    from torchvision import datasets

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
    images = torch.arange(5 * 3 * 8 * 8).reshape(5, 3, 8, 8).remainder(251).to(torch.uint8)
    out = augment(images, draw(5, 8, torch.Generator().manual_seed(1)))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    for i in range(5):
        crops = [padded[i, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
        assert any(torch.equal(out[i], c) or torch.equal(out[i], c.flip(2)) for c in crops)
    assert not torch.equal(out, augment(images, draw(5, 8, torch.Generator().manual_seed(2))))


def test_batches():
    data = ms.load_data("shapes", image_size=8, sizes=(100, 30))
    train = list(batches(data.train, 16, torch.Generator().manual_seed(0)))
    assert [len(y) for _, y in train] == [16] * 5
    test = list(batches(data.test, 16))
    assert [len(y) for _, y in test] == [16, 14] and torch.equal(
        torch.cat([y for _, y in test]), data.test.labels
    )
    x = test[0][0]
    assert (
        x.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and abs(float(x.mean())) < 1.5
    )


def test_the_cifar_copy(cifar):
    data = ms.load_data(cifar)
    assert (len(data.train), len(data.val), len(data.test)) == (45_000, 5_000, 10_000)
    assert data.test.labels.bincount().tolist() == [1000] * 10 and data.classes[:2] == (
        "airplane",
        "automobile",
    )
    assert 100 < float(data.train.images[:5000].float().mean()) < 140
