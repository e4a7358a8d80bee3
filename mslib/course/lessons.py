"""Running lessons: one notebook through papermill, with those that it needs."""

import logging
import os
import threading
import time
import warnings
from contextlib import contextmanager

from ..files import ROOT
from .stages import NEEDS, stage


def require(lesson, cfg, say=print):
    """The finished stage of `lesson`: loaded, or made now by running its notebook (and those it needs) headless."""
    found = stage(lesson, cfg)
    if not found.finished:
        run_lesson(lesson, cfg, say)
    return found


def run_lesson(lesson, cfg, say=print):
    """Execute the notebook of `lesson` for `cfg` through papermill; the executed copy lands in the stage's folder."""
    for needed in NEEDS[lesson]:
        require(needed, cfg, say)
    where = stage(lesson, cfg)
    _execute(
        lesson, where / f"{lesson}.ipynb", where, {"preset": cfg.preset, **cfg.overrides()}, say
    )


def store_lesson(lesson, cfg, say=print):
    """Execute `lesson` as it stands, with the preset `auto`, and keep the outputs in notebooks/."""
    import nbformat

    source = ROOT / "notebooks" / f"{lesson}.ipynb"
    _execute(lesson, source, stage(lesson, cfg), {}, say)
    notebook = nbformat.read(source, 4)
    for part in (notebook, *notebook.cells):
        for key in ("papermill", "execution"):
            part.metadata.pop(key, None)
    nbformat.write(notebook, source)


def _execute(lesson, target, where, parameters, say):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import papermill
    logging.getLogger("papermill").setLevel(logging.ERROR)
    source, part = ROOT / "notebooks" / f"{lesson}.ipynb", where / f".{lesson}.ipynb"
    try:
        where.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot make {where.path} ({error.strerror}); choose another folder with -p runs FOLDER"
        ) from error
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
    os.replace(part, target)


@contextmanager
def _following(path, title, say):
    """Show the lines that a notebook's trainings write to a log file while another process runs it."""
    seen, stop, began = (
        path.stat().st_size if path.exists() else 0,
        threading.Event(),
        time.monotonic(),
    )

    def follow():
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

    before = os.environ.get("MSLIB_LOG")
    os.environ["MSLIB_LOG"] = str(path)
    say(f"{title}: running")
    thread, how = threading.Thread(target=follow, daemon=True), "stopped"
    thread.start()
    try:
        yield
        how = "done"
    finally:
        stop.set()
        thread.join()
        os.environ.pop("MSLIB_LOG") if before is None else os.environ.update(MSLIB_LOG=before)
        say(f"{title}: {how} after {time.monotonic() - began:.0f} s")
