"""Where images come from: the embedded `shapes` set, CIFAR, folders and archives."""

import hashlib
import io
import tarfile
import zipfile
import zlib
from pathlib import Path

import torch

from ..files import ROOT, read_tensors, replacing, write_tensors
from ..processes import rank, world
from .shapes import CLASSES, draw_shapes
from .tensors import Data, Split, normalize

KNOWN = ("shapes", "cifar10", "cifar100")


def load_data(dataset="shapes", val=0.1, image_size=None, sizes=(4000, 1000)):
    """The images of `dataset`, with the share `val` of the training images (the same ones every time) held out.

    `dataset`: "shapes" (drawn, no download), "cifar10", "cifar100" (torchvision, downloaded to data/ once), or the
    path of a folder, .tar.gz or .zip with train/<class>/* and test/<class>/* (or val/<class>/* as the test set).
    `image_size`: side in pixels to resize to; default the size of the first image (32 for shapes).
    `sizes`: how many training and test images to draw, for shapes only.

    Raises FileNotFoundError or ValueError, naming the path or the file at fault.
    """
    _check_share(val)
    if dataset == "shapes":
        names, (train, test) = (
            CLASSES,
            (Split(*draw_shapes(n, image_size or 32, seed)) for seed, n in enumerate(sizes, 1)),
        )
    elif dataset in ("cifar10", "cifar100"):
        names, train, test = _cifar(dataset, image_size)
    else:
        names, train, test = _read_folder(find_dataset(dataset), image_size)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held = max(1, round(val * len(train)))
    name = dataset if dataset in KNOWN else Path(dataset).name
    return Data(name, train.subset(order[held:]), train.subset(order[:held]), test, tuple(names))


def load_folder(path, size=224, batch_size=128, val=0.1, crop=0.08, workers=2):
    """The images of a folder read while training, for sets that do not fit into memory: a `Data` of DataLoaders.

    `path`: holds train/<class>/* and test/<class>/* (or val/<class>/* as the test set), images of any size. Training
    images are cropped at random to `size` pixels, keeping `crop` to 1 of the area (0.08 is usual for ImageNet; more for
    small images and short runs), and mirrored; the others are resized and cropped in the middle. The share `val` of the
    training images is held out.
    Under torchrun each process reads its own share of every batch of `batch_size`.

    Raises FileNotFoundError for a missing folder, ValueError for classes that differ between train and test, a crop out of
    range, or a batch that the processes cannot share evenly.
    """
    from torch.utils.data import DataLoader, DistributedSampler, Subset
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    _check_share(val)
    path = Path(path).expanduser()
    test = next((path / name for name in ("test", "val", "valid") if (path / name).is_dir()), None)
    if test is None or not (path / "train").is_dir():
        raise FileNotFoundError(
            f"{path} does not hold train/<class>/* and test/<class>/* (or val/<class>/*)"
        )
    if not 0 < crop <= 1:
        raise ValueError(
            f"crop={crop}: the smallest share of the area that a random crop keeps, above 0 and up to 1"
        )
    if batch_size % world():
        raise ValueError(
            f"batch_size={batch_size} cannot be shared by {world()} processes; take a multiple of {world()}"
        )
    tensor = (v2.PILToTensor(), _normalized)
    drawn = v2.Compose([v2.RandomResizedCrop(size, (crop, 1)), v2.RandomHorizontalFlip(), *tensor])
    plain = v2.Compose([v2.Resize(round(size / 0.875)), v2.CenterCrop(size), *tensor])
    train, held, tests = (
        ImageFolder(path / "train", drawn),
        ImageFolder(path / "train", plain),
        ImageFolder(test, plain),
    )
    if train.classes != tests.classes:
        apart = sorted(set(train.classes) ^ set(tests.classes))
        raise ValueError(
            f"{path}: train/ and {test.name}/ must hold the same classes; {apart[0]!r} is in one of them only"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    middle = max(1, round(val * len(train)))
    train, held = Subset(train, order[middle:]), Subset(held, order[:middle])
    each, common = (
        batch_size // world(),
        {"num_workers": workers, "pin_memory": torch.cuda.is_available()},
    )  # new workers an epoch: what they draw follows from its seed
    sampler = DistributedSampler(train, world(), rank(), drop_last=True) if world() > 1 else None
    loaders = DataLoader(
        train,
        each,
        shuffle=sampler is None,
        sampler=sampler,
        drop_last=len(train) >= batch_size,
        **common,
    )
    return Data(
        path.name,
        loaders,
        DataLoader(held, each, **common),
        DataLoader(tests, each, **common),
        tuple(tests.classes),
    )


def image_folder(dataset, path, size=32, sizes=(1000, 400)):
    """`dataset` (as in `load_data`) as a folder train/<class>/*, test/<class>/* for `load_folder`; returns its path.

    A folder stays where it is; anything else is written to `path` as PNG files, once. `size`, `sizes`: for shapes.
    """
    from PIL import Image

    if dataset not in KNOWN and find_dataset(dataset).is_dir():
        return find_dataset(dataset)
    path = Path(path)
    if not path.exists():
        data = load_data(dataset, image_size=size if dataset == "shapes" else None, sizes=sizes)
        with replacing(path) as beside:
            for split, parts in {"train": (data.train, data.val), "test": (data.test,)}.items():
                for name in data.classes:
                    (beside / split / name).mkdir(parents=True)
                pairs = (
                    (image, label)
                    for part in parts
                    for image, label in zip(part.images, part.labels)
                )
                for i, (image, label) in enumerate(pairs):
                    Image.fromarray(image.permute(1, 2, 0).numpy()).save(
                        beside / split / data.classes[label] / f"{i:05}.png"
                    )
    return path


def _check_share(val):
    if not 0 < val < 1:
        raise ValueError(
            f"val={val}: the share of training images held out lies between 0 and 1, for example 0.1"
        )


def _normalized(image):
    return normalize(image[None])[0]


def find_dataset(dataset):
    """The path of a folder or archive, looked for from the working folder, then from the course's folder."""
    for base in (Path.cwd(), ROOT):
        if (base / Path(dataset).expanduser()).exists():
            return base / Path(dataset).expanduser()
    raise FileNotFoundError(
        f"dataset {str(dataset)!r} is none of {', '.join(KNOWN)} and there is no such folder or archive; "
        "expected train/<class>/* and test/<class>/* in a folder, .tar.gz or .zip"
    )


def _cifar(name, side):
    from torchvision import datasets
    from torchvision.transforms.v2.functional import resize

    try:
        sets = [
            getattr(datasets, name.upper())(ROOT / "data", train=train, download=True)
            for train in (True, False)
        ]
    except Exception as error:
        raise OSError(
            f"{name} could not be downloaded to {ROOT / 'data'} ({error}); connect once, "
            "give the path of a folder or archive of the images, or use dataset='shapes'"
        ) from error
    images = [torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous() for s in sets]
    if side not in (None, 32):
        images = [resize(x, [side, side]) for x in images]
    return sets[0].classes, *(Split(x, torch.tensor(s.targets)) for x, s in zip(images, sets))


def _entries(path):
    """(name inside, bytes) of every file below a folder or in an archive."""
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            yield file.relative_to(path).as_posix(), file.read_bytes()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    yield info.filename, archive.read(info)
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, archive.extractfile(member).read()


def _read_folder(path, image_size):
    """Classes, training and test split of a folder or archive; kept as tensors in data/cache for the next time."""
    stat = path.stat()
    key = hashlib.sha256(
        f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {image_size}".encode()
    ).hexdigest()[:16]
    cache = ROOT / "data" / "cache" / f"{key}.pt"
    if (
        path.is_file() and cache.exists()
    ):  # a folder may change inside without a trace: read it anew
        kept = read_tensors(cache)
        return kept["classes"], Split(*kept["train"]), Split(*kept["test"])
    found = {"train": {}, "test": {}, "val": {}}  # split -> {name inside: (class, pixels)}
    side = image_size
    try:
        for name, content in _entries(path):
            parts = name.strip("./").split("/")
            if len(parts) < 3 or any(p.startswith((".", "__MACOSX")) for p in parts):
                continue
            split = {"train": "train", "test": "test", "val": "val", "valid": "val"}.get(parts[-3])
            if split:
                pixels = _decode(content, f"{path}: {name}", side)
                side = side or pixels.shape[-1]
                found[split][name] = (parts[-2], pixels)
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        EOFError,
        zlib.error,
        OSError,
        RuntimeError,
    ) as error:
        raise ValueError(
            f"{path} cannot be read as a folder, .tar.gz or .zip of images: {error}"
        ) from error
    val = found.pop("val")
    found["test"] = found["test"] or val
    for split, images in found.items():
        if not images:
            raise ValueError(
                f"{path} holds no {split} images; expected files like {split}/<class>/0001.png"
            )
    labels = {split: {label for label, _ in images.values()} for split, images in found.items()}
    classes = sorted(labels["train"])
    for split, other in (("test", "train"), ("train", "test")):
        if missing := sorted(labels[other] - labels[split]):
            raise ValueError(
                f"{path}: class {missing[0]!r} is in {other}/ but has no image in {split}/; add some"
            )
    if len(classes) < 2:
        raise ValueError(f"{path} has one class, {classes[0]!r}; a classifier needs at least two")
    splits = {}
    for split, images in found.items():
        rows = [images[name] for name in sorted(images)]
        splits[split] = Split(
            torch.stack([pixels for _, pixels in rows]),
            torch.tensor([classes.index(label) for label, _ in rows]),
        )
    if path.is_file():
        try:
            write_tensors(
                cache, {"classes": classes} | {k: (s.images, s.labels) for k, s in splits.items()}
            )
        except OSError:
            pass  # only a cache: without it the next start reads the archive again
    return classes, splits["train"], splits["test"]


def _decode(content, name, side):
    """Bytes of an image file to uint8 [3, side, side]; grey, palette and alpha images become RGB."""
    import numpy as np
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(content))
        image = (
            image.convert("RGBA").convert("RGB")
            if image.mode in ("P", "LA", "PA")
            else image.convert("RGB")
        )
        side = side or min(image.size)
        return torch.from_numpy(np.array(image.resize((side, side)))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{name} is not a readable image ({error}); remove it or replace it"
        ) from error
