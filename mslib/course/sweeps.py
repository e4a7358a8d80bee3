"""A grid of settings: every point one lesson through papermill, scheduled by Dask here or on a cluster, a row each in a CSV."""

import itertools
import os
import time
from contextlib import ExitStack

import pandas as pd

from ..files import replacing
from ..training.progress import Progress
from . import stages as course
from .settings import config


def grid(settings):
    """Every combination of `settings` (dict[name -> value, or a list of values]): list of dicts, the last name fastest."""
    values = [v if isinstance(v, list) else [v] for v in settings.values()]
    return [dict(zip(settings, point)) for point in itertools.product(*values)]


def sweep(lesson, preset, settings, path, jobs=1, scheduler=None):
    """Run `lesson` for every point of `grid(settings)` and keep the CSV at `path` up to date.

    Each stage that a point needs runs once, however many points share it; finished ones, also of an earlier sweep that
    was killed, are reused. A point that fails is reported and leaves the others alone.
    `jobs`: processes on this machine, which share its cores. `scheduler`: the address of a Dask scheduler to use instead;
    its workers see this folder, and `jobs` of them share a machine. Returns dict[point -> what went wrong].
    """
    import dask
    from distributed import Client, LocalCluster, as_completed

    if jobs < 1:
        raise ValueError(f"-j {jobs}: at least one process at a time, for example -j 2")
    points = {
        _name(point, settings): config(preset, **point) for point in grid(settings)
    }  # a bad setting: before the first run
    for cfg in {
        cfg.dataset: cfg for cfg in points.values() if not course.stage(lesson, cfg).finished
    }.values():
        course.data_of(cfg)  # downloaded and unpacked once, not by two processes at a time
    with ExitStack() as stack:
        if scheduler:
            client = stack.enter_context(Client(scheduler))
        else:
            # its looking at itself every few milliseconds takes a fifth of a core from two trainings
            stack.enter_context(
                dask.config.set(
                    {
                        "distributed.worker.profile.enabled": False,
                        "distributed.admin.tick.interval": "1s",
                    }
                )
            )
            local = LocalCluster(n_workers=jobs, threads_per_worker=1, dashboard_address=None)
            client = stack.enter_context(Client(stack.enter_context(local)))
        futures = {}
        wanted = {name: _submit(client, futures, lesson, cfg, jobs) for name, cfg in points.items()}
        progress, began, total = Progress("sweep"), time.monotonic(), len(futures)
        write_table(lesson, points, settings, path)
        progress.update(
            f"{len(points)} points, {sum(f is None for f in wanted.values())} finished before; {total} runs to do",
            True,
        )
        failed = {}
        for done, future in enumerate(as_completed(futures.values()), 1):
            for name in (n for n, f in wanted.items() if f is not None and f.key == future.key):
                if future.status == "error":
                    failed[name] = str(future.exception())
                    progress.update(f"{name}: failed: {failed[name]}", keep=True)
                else:
                    found = course.stage(lesson, points[name])
                    measured = "".join(
                        f": {row['name']} {row['top1']:.2f} %" for row in found.metrics["rows"][-1:]
                    )
                    progress.update(f"{name}: done{measured}", keep=True)
            write_table(lesson, points, settings, path)
            left = (time.monotonic() - began) / done * (total - done) / 60
            progress.update(f"{done} of {total} runs, about {left:.0f} minutes left", keep=True)
        progress.close()
    return failed


def write_table(lesson, points, settings, path):
    """Write the CSV: a row a finished point: its settings, its last network, every fraction and text of its metrics.json."""
    rows = []
    for name, cfg in points.items():
        found = course.stage(lesson, cfg)
        if found.finished:
            metrics = found.metrics
            row = {k: v for k, v in cfg.up_to(int(lesson[:2])).items() if k in settings} | {
                "minutes": round(found.minutes, 2)
            }
            if metrics["rows"]:
                row |= {"network": metrics["rows"][-1].pop("name"), **metrics["rows"][-1]}
            rows.append(
                row
                | {
                    k: v
                    for k, v in metrics.items()
                    if isinstance(v, (float, str)) and k not in row | {"python": ""}
                }
            )
    with replacing(path) as beside:
        pd.DataFrame(rows).to_csv(beside, index=False)


def _submit(client, futures, lesson, cfg, jobs):
    """The future of the stage, made with those it needs; None if it is finished. One future a folder."""
    found = course.stage(lesson, cfg)
    key = str(found.path)
    if found.finished:
        return None
    if key not in futures:
        needed = [_submit(client, futures, name, cfg, jobs) for name in course.NEEDS[lesson]]
        futures[key] = client.submit(_work, lesson, cfg, jobs, *needed, key=key, pure=False)
    return futures[key]


def _work(lesson, cfg, jobs, *_):
    """Run one stage in a worker process; the stages it needs are finished."""
    from papermill.exceptions import PapermillExecutionError

    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // jobs))
    try:
        course.run_lesson(lesson, cfg, say=lambda line: None)
    except PapermillExecutionError as error:
        raise RuntimeError(
            f"{error.ename}: {error.evalue} (see {course.stage(lesson, cfg) / f'.{lesson}.ipynb'})"
        ) from None


def _name(point, settings):
    swept = {k: v for k, v in point.items() if isinstance(settings[k], list)} or point
    return ", ".join(f"{k}={v}" for k, v in swept.items())
