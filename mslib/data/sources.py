"""Where images come from: the drawn `shapes`, CIFAR, folders and archives."""

import logging
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from ..files import ROOT, data_folder, is_checkout, read_tensors, write_tensors
from ..processes import rank, world
from .archives import layout, opened, parts_of
from .identity import digest, file_digest, files_state
from .images import SUFFIXES, DataError, decode
from .shapes import CLASSES, draw_shapes
from .tensors import Data, Split

KNOWN = ("shapes", "cifar10", "cifar100")
RULES = 2  # of reading images: count up where a file would give other pixels than before
MOST = 2**33  # bytes of pixels in memory
log = logging.getLogger("mslib")


def load_data(
    dataset: str | Path = "shapes",
    val: float = 0.1,
    image_size: int | None = None,
    sizes: tuple[int, int] = (4000, 1000),
) -> Data:
    """The images of `dataset` in memory; the share `val` of the training images is held out.

    `dataset`: "shapes" (drawn), "cifar10", "cifar100" (downloaded once, by torchvision), or the
    path of a folder, .tar.gz or .zip with train/<class>/* and test/<class>/* (or val/<class>/* as
    the test set). What is no such image is passed over, and a line of the log says so.
    `image_size`: side in pixels that images are squeezed to; None: the shorter side of the first
    training image (32 for shapes). `sizes`: training and test images to draw, for shapes only.

    Raises FileNotFoundError or ValueError that names the value, the path or the file at fault.
    """
    _check_share("val", val)
    if image_size is not None:
        _check_whole("image_size", image_size, 1, 128 if dataset == "shapes" else 1024)
    if dataset == "shapes":
        for n in sizes:
            _check_whole("sizes", n, len(CLASSES), 1_000_000)
        splits = [Split(*draw_shapes(n, image_size or 32, seed)) for seed, n in enumerate(sizes, 1)]
        classes, train, test = list(CLASSES), *splits
    elif dataset in KNOWN:
        classes, train, test = _cifar(str(dataset), image_size)
    else:
        classes, train, test = _images(find_dataset(dataset), image_size)
    used, held = _hold_out(val, train.labels, classes)
    name = str(dataset) if dataset in KNOWN else Path(dataset).name
    return Data(name, train.subset(used), train.subset(held), test, tuple(classes))


def load_folder(
    path: str | Path,
    size: int = 224,
    batch_size: int = 128,
    val: float = 0.1,
    crop: float = 0.08,
    workers: int = 2,
) -> Data:
    """The images of a folder read while training, for sets that do not fit into memory.

    `path`: a folder as in `load_data`. Training images are cropped at random to `size` pixels,
    keeping `crop` to 1 of the area (0.08 is usual for ImageNet, more for small images and short
    runs), and mirrored; the others are resized and cropped in the middle. The share `val` of the
    training images is held out. `workers`: processes that read for each DataLoader.
    Under torchrun each process reads its own share of every batch of `batch_size`.

    Returns a `Data` of DataLoaders. Raises FileNotFoundError or ValueError as `load_data` does,
    also for a batch that the processes cannot share evenly.
    """
    from torch.utils.data import DataLoader, DistributedSampler, Subset
    from torchvision.transforms import v2

    from .folders import ClassFolder

    _check_share("val", val)
    _check_share("crop", crop, whole=True)
    _check_whole("size", size, 1, 10_000)
    _check_whole("batch_size", batch_size, 1, 1_000_000)
    _check_whole("workers", workers, 0, 1000)
    if batch_size % (n := world()):
        raise ValueError(
            f"batch_size={batch_size} cannot be shared by {n} processes; take a multiple of {n}"
        )
    path = Path(path).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}; expected train/<class>/* and test/<class>/*")
    with opened(path) as (names, _):
        classes, found, note = layout(path, names)
    _say(note)
    scaled = (v2.PILToTensor(), v2.ToDtype(torch.float32), v2.Normalize([120.0], [64.0]))
    drawn = v2.Compose([v2.RandomResizedCrop(size, (crop, 1)), v2.RandomHorizontalFlip(), *scaled])
    plain = v2.Compose([v2.Resize(round(size / 0.875)), v2.CenterCrop(size), *scaled])
    train, unchanged = (ClassFolder(path, classes, found["train"], t) for t in (drawn, plain))
    test = ClassFolder(path, classes, found["test"], plain)
    used, held = (part.tolist() for part in _hold_out(val, torch.tensor(train.targets), classes))
    # new workers every epoch: what they draw follows from its seed
    common: dict[str, Any] = {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
    order: dict[str, Any] = {"shuffle": True, "drop_last": len(used) >= batch_size}
    if n > 1:
        each: Any = DistributedSampler(Subset(train, used), n, rank(), drop_last=True)
        order |= {"shuffle": False, "sampler": each}
    return Data(
        path.name,
        DataLoader(Subset(train, used), batch_size // n, **order, **common),
        DataLoader(Subset(unchanged, held), batch_size // n, **common),
        DataLoader(test, batch_size // n, **common),
        tuple(classes),
    )


def find_dataset(dataset: str | Path) -> Path:
    """The path of a folder or archive, seen from the working folder or from the course's folder.

    Raises FileNotFoundError where there is none, ValueError where these are two different ones.
    """
    bases = [Path.cwd(), ROOT] if is_checkout() else [Path.cwd()]
    found = [p for base in bases if (p := base / Path(dataset).expanduser()).exists()]
    if not found:
        raise FileNotFoundError(
            f"dataset {str(dataset)!r} is none of {', '.join(KNOWN)} and there is no such folder "
            "or archive; expected train/<class>/* and test/<class>/* in a folder, .tar.gz or .zip"
        )
    if not found[0].samefile(found[-1]):
        raise ValueError(f"dataset {dataset!r} may be {found[0]} or {found[1]}; give the full path")
    return found[0]


def dataset_identity(dataset: str | Path, image_size: int | None = None) -> str:
    """What tells a data set from others of its name, without decoding it.

    An archive is told by its bytes, a folder by its place and the `files_state` of its images.
    """
    if dataset in KNOWN:
        return f"{dataset} {image_size}"
    path = find_dataset(dataset)
    if path.is_file():
        return str(digest(file_digest(path), image_size))
    with opened(path) as (names, _):
        files = [path / name for name in sorted(names) if name.lower().endswith(SUFFIXES)]
    return str(digest(str(path.resolve()), files_state(path, files), image_size))


def _check_share(name: str, value: float, whole: bool = False) -> None:
    if not isinstance(value, Real) or not (0 < value < 1 or whole and value == 1):
        raise ValueError(f"{name}={value!r}: expected a share between 0 and 1, for example 0.1")


def _check_whole(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: expected a whole number from {low} to {high:,}")


def _hold_out(
    val: float, labels: torch.Tensor, classes: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the images to train on, and of the share `val`, always the same, held out."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, used = order.tensor_split([max(1, round(val * len(labels)))])
    counts = labels[used].bincount(minlength=len(classes)).tolist()
    if 0 in counts:
        raise ValueError(
            f"val={val} of {len(labels)} training images leaves none of class "
            f"{classes[counts.index(0)]!r} to train on; hold out less or add images"
        )
    return used, held


def _say(note: str) -> None:
    if note:
        log.warning(note)


def _cifar(name: str, side: int | None) -> tuple[list[str], Split, Split]:
    from torchvision import datasets
    from torchvision.transforms.v2.functional import resize

    make = getattr(datasets, name.upper())
    try:
        sets = [make(data_folder(), train=train, download=True) for train in (True, False)]
    except Exception as error:
        raise OSError(
            f"{name} could not be downloaded to {data_folder()} ({error}); connect once, "
            "give the path of a folder or archive of the images, or use dataset='shapes'"
        ) from error
    images = [torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous() for s in sets]
    if side not in (None, 32):
        images = [resize(x, [side, side]) for x in images]
    train, test = (Split(x, torch.tensor(s.targets)) for x, s in zip(images, sets))
    return sets[0].classes, train, test


def _images(path: Path, side: int | None) -> tuple[list[str], Split, Split]:
    """Classes, training and test split of a folder or archive; an archive's are kept in a cache."""
    if path.is_file():
        cache = data_folder() / "cache" / f"{digest(file_digest(path), side, RULES)}.pt"
        kept = _cached(cache) or _read(path, side)
        if not cache.exists():
            with suppress(OSError, RuntimeError, ValueError):  # else it is read again next time
                write_tensors(cache, kept)
    else:  # a folder may change inside without a trace
        kept = _read(path, side)
    _say(kept["note"])
    return kept["classes"], Split(*kept["train"]), Split(*kept["test"])


def _cached(cache: Path) -> dict | None:
    if not cache.exists():
        return None
    try:
        kept = read_tensors(cache)
        train, test = Split(*kept["train"]), Split(*kept["test"])
        Data(kept["note"], train, test, test, kept["classes"])  # checks them
        return kept
    except Exception as error:  # whatever it is, the archive is still there
        log.warning("%s is damaged and made anew (%s)", cache, error)
        with suppress(OSError):
            cache.unlink()
        return None


def _read(path: Path, side: int | None) -> dict:
    """{"classes", "train": (uint8 [N, 3, side, side], int64 [N]), "test", "note"}."""
    with opened(path) as (names, open_file):
        classes, found, note = layout(path, names)

        def read(name: str) -> Image:
            with open_file(name) as file:
                return decode(file, f"{path}: {name}")

        side = side or min(read(found["train"][0]).size)
        if 3 * side**2 * sum(map(len, found.values())) > MOST:
            raise DataError(
                f"{path}: the images, {side}×{side} pixels each, do not fit into memory; "
                "give a smaller image_size, or read them while training with load_folder"
            )
        kept: dict[str, Any] = {"classes": classes, "note": note}
        place: dict[str, torch.Tensor] = {}  # name -> where its pixels go
        for split, some in found.items():
            images = torch.empty(len(some), 3, side, side, dtype=torch.uint8)
            labels = [classes.index(parts_of(name)[-2]) for name in some]
            kept[split] = (images, torch.tensor(labels))
            place |= dict(zip(some, images))
        for name in names:
            if name in place:
                pixels = np.array(read(name).resize((side, side)))  # [side, side, 3]
                place[name].copy_(torch.from_numpy(pixels).permute(2, 0, 1))
    return kept
