"""Files that are either whole or absent: written beside, then renamed. Reading one runs no code."""

import difflib
import errno
import hashlib
import io
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

ROOT = Path(__file__).resolve().parent.parent  # the course's folder: notebooks/, data/, runs/
LARGEST_JSON = 64 * 2**20  # bytes
ADVICE = {  # what to try where a file cannot be written
    errno.ENOSPC: "free some space on that disk, or choose another folder",
    errno.ENOTEMPTY: "it exists already: move it away, or choose another name",
    errno.EISDIR: "a folder has that name: choose another one",
}


def is_checkout() -> bool:
    """Whether ROOT is the course's folder; where only the package is installed, it is not."""
    return (ROOT / "pyproject.toml").is_file() and (ROOT / "notebooks").is_dir()


def data_folder() -> Path:
    """Where data sets and caches are kept: data/ of the course, or the user's folder for caches.

    The latter is $MSLIB_CACHE, if set, or "mslib" where the system keeps caches.
    """
    if is_checkout():
        return ROOT / "data"
    if os.environ.get("MSLIB_CACHE"):
        return Path(os.environ["MSLIB_CACHE"]).expanduser()
    if sys.platform == "win32":
        usual = Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        usual = Path.home() / "Library" / "Caches"
    else:
        usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return usual / "mslib"


def nearest(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown `name`: what was meant, or which are `known`."""
    near = difflib.get_close_matches(str(name), known, 1, 0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join([*known][:30])}{' …' if len(known) > 30 else ''}"


def reason(error: BaseException) -> str:
    """The first line of what `error` says, or its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path, for a file or folder, beside `path`.

    It is renamed onto `path` when the block ends well, and removed otherwise. Raises OSError that
    names `path` and says what to try when it cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(beside)  # what a killed process of the same number has left
        yield beside
        for each in (beside, *beside.rglob("*")):
            if each.is_file():
                _flush(each)
        os.replace(beside, path)
        with suppress(OSError):  # not every system can do it for a folder
            _flush(path.parent)
    except OSError as error:
        about = Path(os.fsdecode(error.filename or beside))
        if not {about, *about.parents} & {beside, path} and about not in path.parents:
            raise  # of another file, which the block reads
        advice = ADVICE.get(error.errno or 0, "choose a folder you may write to")
        told = OSError(f"cannot write {path} ({error.strerror or reason(error)}); {advice}")
        told.errno = error.errno
        raise told from error
    finally:
        _remove(beside)


def _remove(path: Path) -> None:
    """Remove a file or folder if that can be done: a failure must not hide another."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until the disk holds `path`: a rename must not come before what it gives a name to."""
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def regular(path: str | Path) -> Path:
    """`path`, if a file lies there; FileNotFoundError, or ValueError for a folder, if not."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is a folder, not a file")
    return path


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: str | Path, kind: type = dict) -> Any:
    """The value in a JSON file, of type `kind`. ValueError that names the file if it is another."""
    path = regular(path)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"larger than {LARGEST_JSON >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise ValueError(f"it holds a {type(value).__name__}, expected a {kind.__name__}")
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({reason(error)}). If it belongs to a run, give another folder, "
            "or remove this one as a whole: without one file, two runs would be mixed"
        ) from None


def write_tensors(path: str | Path, value: Any) -> None:
    """Write tensors, numbers and text, in lists and dicts, for `read_tensors`, as `packed` says."""
    content = packed(value, Path(path).name)
    with replacing(path) as beside:
        beside.write_bytes(content.getbuffer())


def packed(value: Any, name: str) -> io.BytesIO:
    """The bytes of a file for `read_tensors`. ValueError that names what it would not read."""
    content = io.BytesIO()  # torch.save itself would hide what a full disk says
    try:
        torch.save(value, content)
        _unpacked(content)
    except Exception:  # of many kinds
        inside = value.items() if isinstance(value, dict) else ()
        for key, each in enumerate(value) if isinstance(value, (list, tuple)) else inside:
            packed(each, f"{name}[{key!r:.99}]")
        kept = "a file keeps tensors and Python's own numbers and texts, such as float(…) gives"
        raise ValueError(f"{name} is a {type(value).__name__}, {value!r:.60}: {kept}") from None
    return content


def read_tensors(path: str | Path) -> Any:
    """What `write_tensors` wrote, on the CPU. ValueError if it is damaged or holds code."""
    path = regular(path)
    try:
        with open(path, "rb") as file:
            return _unpacked(file)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(
            f"{path} cannot be read: truncated, damaged or not a weights file ({reason(error)})"
        ) from None


def _unpacked(file: IO[bytes]) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(m.file_size for m in members) > file.seek(0, io.SEEK_END):
            raise ValueError("it unpacks to more than its size")
        if damaged := archive.testzip():  # torch.load looks at no checksum
            raise ValueError(f"{damaged} does not fit its checksum")
        for m in members:  # what torch would run allocates as much as the file asks for
            if m.filename.endswith("data.pkl") and b"bytearray" in archive.read(m):
                raise ValueError("it holds more than tensors")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of the names, types, shapes and bytes of `tensors`, and of what is trainable."""
    found = hashlib.sha256()
    for name, t in tensors:
        found.update(f"{name} {t.dtype} {list(t.shape)} {t.requires_grad}\n".encode())
        found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
