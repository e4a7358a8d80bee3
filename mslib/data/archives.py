"""The files of a folder, zip or tar: their names first, and then those that are asked for."""

import gzip
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from .images import SUFFIXES, DataError, open_file

SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val"}
DEEPEST = 5  # folders within folders: a link to a folder above its own would have no end
HEADERS = 2**16  # bytes that a tar may hold about one file: its name, times and what else is known


@contextmanager
def opened(path: Path) -> Iterator[tuple[list[str], Callable[[str], IO[bytes]]]]:
    """The names of the files in `path`, in the order in which reading is fast, and what opens one.

    Raises DataError, also for what goes wrong while they are read.
    """
    try:
        if path.is_dir():
            yield list(_below(path)), lambda name: open_file(path / name)
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield [n for n in archive.NameToInfo if not n.endswith("/")], archive.open
        else:
            with _unpacked(path) as file:
                tar = _Tar(file)
                files = tarfile.open(fileobj=cast(IO[bytes], tar), mode="r:")
                members = dict(_members(files, tar, path))
                yield list(members), lambda name: cast(IO, files.extractfile(members[name]))
    except DataError:
        raise
    except Exception as error:  # zipfile and tarfile raise many kinds for a damaged archive
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path} cannot be read as a folder, .tar.gz or .zip of images: {reason}; pack it anew"
        ) from error


def parts_of(name: str) -> list[str]:
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]


def layout(path: Path, names: list[str]) -> tuple[list[str], dict[str, list[str]], str]:
    """Classes, the images of "train" and "test" among `names`, sorted, and what was passed over.

    An image is train/<class>/<image> or test/<class>/<image>, or val/<class>/<image> where test/ is
    missing, all in one folder. Raises DataError for images deeper than that, for two such sets, and
    for classes that are in one split only.
    """
    found: dict[str, list[str]] = {"train": [], "test": [], "val": []}
    tops, others = set(), []
    # ./a.png is a.png: unpacked, the last one of a name would be left
    for name in {tuple(parts_of(name)): name for name in names}.values():
        *above, split, _, _ = parts = ["", "", "", *parts_of(name)]
        hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
        if hidden or not name.lower().endswith(SUFFIXES):
            others.append(name)
        elif split in SPLITS:
            found[SPLITS[split]].append(name)
            tops.add("/".join(above[3:]) or ".")
        elif SPLITS.keys() & set(above):
            raise DataError(f"{path}: {name} lies too deep, not in train/<class>/ or test/<class>/")
        else:
            others.append(name)
    if len(tops) > 1:
        raise DataError(f"{path} holds several sets, in {sorted(tops)[:2]}; keep one of them")
    val = found.pop("val")
    if found["test"]:
        others += val
    else:
        found["test"] = val
    classes = {split: {parts_of(name)[-2] for name in some} for split, some in found.items()}
    for split, other in (("train", "test"), ("test", "train")):
        if not classes[split]:
            raise DataError(
                f"{path} holds no {split} images; expected files like {split}/<class>/0001.png"
            )
        if missing := sorted(classes[other] - classes[split]):
            raise DataError(
                f"{path}: class {missing[0]!r} is in {other}/ but has no image in {split}/"
            )
    if len(classes["train"]) < 2:
        raise DataError(f"{path} has one class, {min(classes['train'])!r}; it takes two or more")
    note = f"{path}: {len(others)} files passed over, such as {min(others)}" if others else ""
    return sorted(classes["train"]), {split: sorted(some) for split, some in found.items()}, note


def _below(folder: Path) -> Iterator[str]:
    """Names of the files below a folder; links are followed, hidden folders are not opened."""
    for top, folders, files in os.walk(folder, followlinks=True):
        above = Path(top).relative_to(folder)
        hidden = [name for name in folders if name.startswith(".")]
        yield from ((above / name).as_posix() for name in files + hidden)
        folders[:] = set(folders) - set(hidden) if len(above.parts) < DEEPEST else []


class _Tar:
    """An unpacked tar of whose headers `left` bytes may still be read: tarfile knows no bounds."""

    def __init__(self, file: IO[bytes]):
        self.file, self.left = file, float(HEADERS)
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.left:  # -1 is all there is
            raise ValueError(f"more than {HEADERS:,} bytes about one file")
        self.left -= size
        return self.file.read(size)


def _unpacked(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if packed else open(path, "rb")


def _members(
    archive: tarfile.TarFile, tar: _Tar, path: Path
) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Names and files, where their sizes and their number are in proportion to the packed size.

    Going on from one file to the next unpacks it.
    """
    packed = path.stat().st_size
    most, many = max(2**28, 100 * packed), 10_000 + packed // 64
    for count, member in enumerate(archive):
        if not 0 <= member.size <= most - member.offset_data:
            raise DataError(f"{path}: {member.name} has {member.size:,} bytes; remove it")
        if count > many:
            raise DataError(
                f"{path} holds over {many:,} files in {packed:,} bytes; pack images only"
            )
        if member.isfile() or member.issym() or member.islnk():  # links lead to other members only
            yield member.name, member
        tar.left = HEADERS
    tar.left = float("inf")  # what follows is the content of files, as much as is asked for
