"""A grid of settings: every point one lesson through papermill, by Dask, a row each in a CSV."""

import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import replacing
from ..training.progress import Progress
from .lessons import run_lesson
from .settings import SETTINGS, Config, config
from .stages import NEEDS, data_of, needs_checkout, stage

ALONE = threading.Lock()  # environment and working folder belong to a process, not to a thread
Points = dict[str, Config]  # the name of a point -> its configuration


def grid(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination of `settings` (name -> value or list of values), the last name fastest."""
    values = [v if isinstance(v, list) else [v] for v in settings.values()]
    return [dict(zip(settings, point)) for point in itertools.product(*values)]


def sweep(
    lesson: str,
    preset: str,
    settings: dict[str, Any],
    path: str | Path,
    jobs: int = 1,
    scheduler: str | None = None,
) -> dict[str, str]:
    """Run `lesson` for every point of `grid(settings)` and keep the CSV at `path` up to date.

    Each stage that a point needs runs once, however many points share it; finished ones, also of an
    earlier sweep that was killed, are reused. A point that fails leaves the others alone.
    `jobs`: processes on this machine, which share its cores. `scheduler`: the address of a Dask
    scheduler to use instead; its workers see this folder, and `jobs` of them share a machine.

    Returns dict[point -> what went wrong]. Raises ValueError, before anything runs, for a setting
    that is unknown, out of range, or of no matter to the lesson.
    """
    points = _points(lesson, preset, settings, jobs)
    write_table(
        lesson, points, settings, path
    )  # a path that cannot be written: before the first run
    progress, failed = Progress("sweep"), {}
    for name, cfg in list(points.items()):
        try:
            unfinished = not [stage(needed, cfg) for needed in _with_needs(lesson)][0].finished
            if unfinished:
                data_of(cfg)  # downloaded and unpacked once, not by two processes at a time
        except ValueError as error:  # a damaged metrics.json, or one of other settings
            failed[name] = str(error)
            progress.update(f"{name}: failed: {error}", keep=True)
            del points[name]
    idle = all(stage(lesson, cfg).finished for cfg in points.values())
    with nullcontext() if idle else _client(jobs, scheduler) as client:
        futures: dict[str, Any] = {}
        wanted = {n: _submit(client, futures, lesson, cfg, jobs) for n, cfg in points.items()}
        done = sum(future is None for future in wanted.values())
        line = f"{len(points)} points, {done} finished before; {len(futures)} runs to do"
        progress.update(line, keep=True)
        failed |= _gather(lesson, points, settings, path, futures, wanted, progress)
    progress.close()
    return failed


def _points(lesson: str, preset: str, settings: dict[str, Any], jobs: int) -> Points:
    """The checked configurations of a sweep, by the name of their point."""
    needs_checkout("a sweep")
    if lesson not in NEEDS:
        raise ValueError(f"unknown lesson {lesson!r}; known: {', '.join(NEEDS)}")
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"-j {jobs}: expected a whole number of processes, for example -j 2")
    for name, values in settings.items():
        if isinstance(values, list) and not values:
            raise ValueError(f"{name}: no value; expected one or more, for example {name}: [1, 2]")
    points = {_name(point, settings): config(preset, **point) for point in grid(settings)}
    for name, values in settings.items():
        several = name in SETTINGS and isinstance(values, list) and len(values) > 1
        if several and not any(cfg.matters(name, int(lesson[:2])) for cfg in points.values()):
            raise ValueError(
                f"{name}: lesson {lesson} does not depend on it with these settings, so its rows "
                "would be identical; leave it out, or take --lesson of another"
            )
    return points


@contextmanager
def _client(jobs: int, scheduler: str | None) -> Iterator[Any]:
    """A client of the Dask scheduler, or of `jobs` processes of this machine."""
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise OSError(f"{error}; sweeps run on Dask: pip install 'mslib[sweep]'") from None
    if scheduler:
        with Client(scheduler) as client:
            yield client
        return
    # its looking at itself every few milliseconds takes a fifth of a core from two trainings
    quiet = {"distributed.worker.profile.enabled": False, "distributed.admin.tick.interval": "1s"}
    with (
        dask.config.set(quiet),
        LocalCluster(n_workers=jobs, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


def _gather(
    lesson: str,
    points: Points,
    settings: dict[str, Any],
    path: str | Path,
    futures: dict[str, Any],
    wanted: dict[str, Any],
    progress: Progress,
) -> dict[str, str]:
    """Wait for all runs, tell of each and write its row; returns what went wrong, by point."""
    from distributed import as_completed

    began, total, failed = time.monotonic(), len(futures), {}
    for done, future in enumerate(as_completed(futures.values()) if futures else (), 1):
        for name in (n for n, f in wanted.items() if f is not None and f.key == future.key):
            if future.status == "error":
                failed[name] = str(future.exception())
                progress.update(f"{name}: failed: {failed[name]}", keep=True)
            else:
                rows = stage(lesson, points[name]).metrics["rows"]
                last = f": {rows[-1]['name']} {rows[-1]['top1']:.2f} %" if rows else ""
                progress.update(f"{name}: done{last}", keep=True)
        write_table(lesson, points, settings, path)
        left = (time.monotonic() - began) / done * (total - done) / 60
        progress.update(f"{done} of {total} runs, about {left:.0f} minutes left", keep=True)
    return failed


def write_table(lesson: str, points: Points, settings: dict[str, Any], path: str | Path) -> None:
    """Write the CSV, a row a finished point; one whose results cannot be read is left out.

    Columns: its settings, its last network, every fraction and text of its metrics.json.
    """
    rows = []
    for cfg in points.values():
        try:
            found = stage(lesson, cfg)
            metrics = found.metrics if found.finished else None
        except ValueError:
            continue
        if metrics is None:
            continue
        asked = {*settings, "images"} if "dataset" in settings else {*settings}
        row = {k: v for k, v in found.settings.items() if k in asked}
        row["minutes"] = round(found.minutes, 2)
        if metrics["rows"]:
            last = metrics["rows"][-1]
            row |= {"network": last["name"], **{k: v for k, v in last.items() if k != "name"}}
        told = {k: v for k, v in metrics.items() if isinstance(v, float | str) and k != "python"}
        rows.append(row | {k: v for k, v in told.items() if k not in row})
    with replacing(path) as beside:
        pd.DataFrame(rows).to_csv(beside, index=False)


def _with_needs(lesson: str) -> list[str]:
    """The lesson and all that it needs."""
    found = [lesson]
    for name in found:  # which grows
        found += [needed for needed in NEEDS[name] if needed not in found]
    return found


def _submit(client: Any, futures: dict[str, Any], lesson: str, cfg: Config, jobs: int) -> Any:
    """The future of the stage, one a folder, made with those it needs; None if it is finished."""
    found = stage(lesson, cfg)
    key = str(found.path)
    if found.finished:
        return None
    if key not in futures:
        needed = [_submit(client, futures, name, cfg, jobs) for name in NEEDS[lesson]]
        futures[key] = client.submit(_work, lesson, cfg, jobs, *needed, key=key, pure=False)
    return futures[key]


def _work(lesson: str, cfg: Config, jobs: int, *_: Any) -> None:
    """Run one stage in a worker; the stages it needs are finished. Threads of one take turns."""
    with ALONE:
        _work_alone(lesson, cfg, jobs)


def _work_alone(lesson: str, cfg: Config, jobs: int) -> None:
    from papermill.exceptions import PapermillExecutionError

    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    try:
        run_lesson(lesson, cfg, say=lambda line: None)
    except PapermillExecutionError as error:
        copy = stage(lesson, cfg) / f".{lesson}.ipynb"
        raise RuntimeError(f"{error.ename}: {error.evalue} (see {copy})") from None
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS")
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _name(point: dict[str, Any], settings: dict[str, Any]) -> str:
    swept = {k: v for k, v in point.items() if isinstance(settings[k], list)} or point
    return ", ".join(f"{k}={v}" for k, v in swept.items())
