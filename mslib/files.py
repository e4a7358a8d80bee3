"""Files that are either whole or absent: written beside, then renamed; read without running pickled code."""

import difflib
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent  # the course's folder: notebooks/, data/, runs/


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


def nearest(name, known):
    """The end of an error message about an unknown `name`: the one of `known` that was meant, or what there is."""
    near = difflib.get_close_matches(str(name), known, 1, 0.5)
    return (
        f"; did you mean {near[0]!r}?"
        if near
        else f"; known: {', '.join([*known][:30])}{' …' if len(known) > 30 else ''}"
    )


def relative(path):
    """`path` as seen from the course's folder; as it is where there is no such way (another drive)."""
    try:
        return os.path.relpath(path, ROOT)
    except ValueError:
        return str(path)


@contextmanager
def replacing(path):
    """Give a temporary path, for a file or folder, beside `path`; rename it onto `path` when the block ends well, remove it otherwise."""
    path = Path(path)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise OSError(
            f"cannot write {path} ({error.strerror or error}); choose a folder you may write to"
        ) from error
    finally:
        shutil.rmtree(beside) if beside.is_dir() else beside.unlink(
            missing_ok=True
        ) if beside.parent.is_dir() else None


def write_json(path, value):
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); delete it to have it made again"
        ) from None


def write_tensors(path, value):
    with replacing(path) as beside:
        torch.save(value, beside)


def read_tensors(path):
    """What `write_tensors` wrote. ValueError that names the file when it is damaged or holds more than data."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).splitlines()[0][:120]
        raise ValueError(
            f"{path} cannot be read: truncated, damaged or not a weights file ({reason})"
        ) from None


def reason(error):
    """The first line of what an exception says, or its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
