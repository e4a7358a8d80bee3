"""A grid of settings: every point one lesson through papermill, by Dask, a row each in a CSV."""

import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import replacing
from ..training.progress import Progress
from .lessons import run_lesson
from .results import read_table
from .settings import SETTINGS, Config, config
from .stages import NEEDS, Stage, data_of, needs_checkout, place, stage

ALONE = threading.Lock()  # environment and working folder belong to a process, not to a thread
ELSEWHERE = "give another file by --csv, or move this one away"
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

    Rows of other points, of an earlier sweep with these settings, stay in the CSV.

    Each stage that a point needs runs once, however many points share it; finished ones, also of an
    earlier sweep that was killed, are reused. A point that fails leaves the others alone.
    `jobs`: processes on this machine, which share its cores. `scheduler`: the address of a Dask
    scheduler to use instead; its workers see this folder, and `jobs` of them share a machine.

    Returns dict[point -> what went wrong]. Raises ValueError, before anything runs, for a setting
    that is unknown, out of range, or of no matter to the lesson, and for a file at `path` that is
    no table of these settings.
    """
    points = _points(lesson, preset, settings, jobs)
    write_table(lesson, points, settings, path)  # what cannot be written: before the first run
    progress, failed = Progress("sweep"), {}
    for name, cfg in list(points.items()):
        try:
            unfinished = not [stage(needed, cfg) for needed in _with_needs(lesson)][0].finished
            if unfinished:
                data_of(cfg)  # downloaded and unpacked once, not by two processes at a time
        # a damaged metrics.json, or one of other settings; images that cannot be read now
        except (ValueError, OSError) as error:
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
    """Write the CSV: the rows that it has of other points, and one a finished point.

    Columns: its settings; its folder, which tells points apart; its last network; every fraction
    and text of its metrics.json. A point whose results cannot be read is left out.
    """
    matter = {name for cfg in points.values() for name in cfg.up_to(int(lesson[:2]))}
    asked = [name for name in SETTINGS if name in settings and name in matter]
    columns, rows = _others(Path(path), asked + ["images"] * ("dataset" in asked))
    for cfg in points.values():
        with suppress(ValueError, OSError):
            folder = f"{cfg.preset}/{place(lesson, cfg).path.name}"
            rows = [row for row in rows if row["folder"] != folder]
            found = stage(lesson, cfg)
            if found.finished:
                rows.append(_row(found, columns, folder))
    names = dict.fromkeys([*columns, "folder", *(name for row in rows for name in row)])
    with replacing(path) as beside:
        pd.DataFrame(rows, columns=[*names]).to_csv(beside, index=False)


def _others(path: Path, columns: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """The table at `path`: its columns of settings, or `columns` if there is none; and its rows.

    ValueError for a file that is no such table or lacks some of the `columns`.
    """
    if not path.exists() or not path.stat().st_size:
        return columns, []
    try:
        table = read_table(path, dtype=str, keep_default_na=False)  # to be written as it was read
    except ValueError as error:
        raise ValueError(f"{error}; {ELSEWHERE}") from None
    have = [*itertools.takewhile(lambda name: name != "folder", table)]  # behind: what came out
    if lacking := {*columns, "folder"} - {*have, *(["folder"] if "folder" in table else [])}:
        raise ValueError(
            f"{path} is no table of this sweep: it lacks {', '.join(sorted(lacking))}; {ELSEWHERE}"
        )
    return have, table.to_dict("records")


def _row(found: Stage, columns: list[str], folder: str) -> dict[str, Any]:
    """A row of the table: a finished stage."""
    metrics = found.metrics
    row = {name: found.settings.get(name) for name in columns}
    row |= {"folder": folder, "minutes": round(found.minutes, 2)}
    if metrics["rows"]:
        last = metrics["rows"][-1]
        row |= {"network": last["name"], **{k: v for k, v in last.items() if k != "name"}}
    told = {k: v for k, v in metrics.items() if isinstance(v, float | str) and k != "python"}
    return row | {k: v for k, v in told.items() if k not in row}


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
