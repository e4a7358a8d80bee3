"""Running lessons: one notebook through papermill, with those that it needs."""

import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import ROOT, reason, replacing
from ..training.progress import Progress
from .settings import Config
from .stages import NEEDS, Results, Stage, needs_checkout, stage

Say = Callable[[str], None]
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
# glibc keeps what a training step freed for the next; else it hands large buffers back and gets
# them anew, cleared page by page. Read when a process starts; where there is no glibc, by nobody
KEEP_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647"


def require(lesson: str, cfg: Config, say: Say | None = None) -> Results:
    """The finished stage of `lesson`: loaded, or made now by running its notebook, headless.

    `say`: is told each line of progress; by default they are shown, in a notebook in one line.
    """
    found = stage(lesson, cfg)
    if not found.finished:
        run_lesson(lesson, cfg, say or _shown(lesson))
    return Results(lesson, found.path, found.settings)


def run_lesson(lesson: str, cfg: Config, say: Say = print, again: bool = False) -> None:
    """Execute the notebook of `lesson` for `cfg`; the executed copy lands in the stage's folder.

    What it needs is run first. One process at a time runs a stage: a second waits, and then finds
    it finished. `again`: execute it although it is finished; its trainings are still reused.
    """
    needs_checkout(f"lesson {lesson}")
    where = stage(lesson, cfg)
    copy = where / f"{lesson}.ipynb"

    def done() -> bool:
        return where.finished and copy.exists() and not again

    if not done():
        for needed in NEEDS[lesson]:
            require(needed, cfg, say)
        with _alone(where, say):
            if not done():  # else another process was running it
                _execute(lesson, copy, where, _parameters(lesson, cfg), say)
                return
    say(f"{lesson}: finished before, reused")


def store_lesson(lesson: str, cfg: Config, say: Say = print) -> None:
    """Execute `lesson` as it stands, with the preset `auto`, and keep the outputs in notebooks/."""
    import nbformat

    needs_checkout("store")
    source, where = notebook_of(lesson), stage(lesson, cfg)
    with _alone(where, say):
        _execute(lesson, source, where, {}, say)
    notebook = nbformat.read(source, 4)
    for part in (notebook, *notebook.cells):
        for key in ("papermill", "execution"):
            part.metadata.pop(key, None)
    notebook.metadata.kernelspec = KERNEL  # as JupyterLab would write it on opening
    with replacing(source) as beside:
        nbformat.write(notebook, beside)


def notebook_of(lesson: str) -> Path:
    """The notebook of `lesson`. ValueError that names it if it is damaged."""
    import nbformat

    path = ROOT / "notebooks" / f"{lesson}.ipynb"
    try:
        nbformat.validate(nbformat.read(path, 4))
    except OSError:
        raise
    except Exception as error:  # nbformat raises of any kind for what is no notebook
        raise ValueError(
            f"{path} is damaged ({reason(error)}); get it again, such as by git checkout"
        ) from None
    return path


def _shown(title: str) -> Say:
    progress = Progress(title)
    return lambda line: progress.update(line.strip(), keep=True)


def _parameters(lesson: str, cfg: Config) -> dict[str, Any]:
    """What papermill puts into the notebook: by name what its cell lists, else in `overrides`."""
    papermill = _papermill()
    listed = papermill.inspect_notebook(str(notebook_of(lesson)))
    given = cfg.overrides()
    own = {name: given.pop(name) for name in list(given) if name in listed}
    return {"preset": cfg.preset, **own, **({"overrides": given} if given else {})}


@contextmanager
def _alone(where: Stage, say: Say) -> Iterator[None]:
    """Hold the lock of a stage, in a file beside its folder."""
    from filelock import FileLock, Timeout

    try:
        where.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(where.path.with_name(f".{where.path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"{where.lesson}: another process is running it; waiting for its results")
            lock.acquire()
    except OSError as error:
        raise OSError(
            f"cannot make {where.path} ({error.strerror}); "
            "choose another folder with -p runs FOLDER"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _papermill() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import papermill
    except ImportError as error:
        raise OSError(
            f"{error}; lessons run through papermill: pip install 'mslib[course]'"
        ) from None
    logging.getLogger("papermill").setLevel(logging.ERROR)
    return papermill


def _execute(lesson: str, target: Path, where: Stage, parameters: dict[str, Any], say: Say) -> None:
    papermill = _papermill()
    source, part = notebook_of(lesson), where / f".{lesson}.ipynb"
    with _following(where / "log.txt", lesson, say):
        papermill.execute_notebook(
            os.path.relpath(source),
            os.path.relpath(part),
            parameters,
            cwd=str(source.parent),
            kernel_name="python3",
            progress_bar=False,
            extra_arguments=["--IPKernelApp.log_level=50"],  # the kernel talks to this machine only
        )
    with replacing(target) as beside:  # which may lie on another file system than the runs
        shutil.copyfile(part, beside)
    part.unlink()


@contextmanager
def _following(path: Path, title: str, say: Say) -> Iterator[None]:
    """Show the lines that a notebook's trainings write to a log file in another process."""
    seen = path.stat().st_size if path.exists() else 0
    stop, began = threading.Event(), time.monotonic()

    def follow() -> None:
        nonlocal seen
        last = False
        while not last:
            last = stop.wait(0.5)
            if path.exists():
                with open(path, encoding="utf-8") as log:
                    log.seek(seen)
                    for line in log.read().splitlines():
                        say(f"  {line}")
                    seen = log.tell()

    # kernels inherit these: the log of their trainings, that nobody watches, memory kept
    here = {"MSLIB_LOG": str(path), "MSLIB_BATCH": "1", "GLIBC_TUNABLES": KEEP_MEMORY}
    before = {name: os.environ.get(name) for name in here}
    os.environ.update(here)
    say(f"{title}: running")
    thread, how = threading.Thread(target=follow, daemon=True), "stopped"
    thread.start()
    try:
        yield
        how = "done"
    finally:
        stop.set()
        thread.join()
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})
        say(f"{title}: {how} after {time.monotonic() - began:.0f} s")
