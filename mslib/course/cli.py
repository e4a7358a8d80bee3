"""The command line: python -m mslib run | sweep | bench | reference | store | stamp."""

import argparse
import ast
import sys
from pathlib import Path

from . import stages as course
from .settings import config


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m mslib", description="Run the course's lessons in batch."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run", help="execute the lessons in order through papermill; finished ones are reused"
    )
    run.add_argument(
        "--again",
        action="store_true",
        help="execute notebooks anew; finished trainings are still reused",
    )
    grid = commands.add_parser(
        "sweep", help="run one lesson for every combination of settings; a row each in a CSV"
    )
    grid.add_argument(
        "file",
        nargs="?",
        help="YAML: lesson, preset, and settings with a value or a list of values each",
    )
    grid.add_argument("--lesson", help="by number or name (default 05)")
    grid.add_argument(
        "-j", "--jobs", type=int, default=1, help="processes at a time on one machine (default 1)"
    )
    grid.add_argument(
        "--scheduler", metavar="ADDRESS", help="of a Dask scheduler whose workers see this folder"
    )
    grid.add_argument(
        "--csv", help="the table (default runs/<preset>/sweep-<lesson>.csv, or named like FILE)"
    )
    grid.add_argument(
        "-p",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a setting and its values",
    )
    table = commands.add_parser(
        "bench", help="training, pruning and pruned networks against named alternatives, as ratios"
    )
    table.add_argument(
        "--json",
        default=course.ROOT / "runs" / "bench.json",
        help="where the table goes (default runs/bench.json)",
    )
    keep = commands.add_parser(
        "reference", help="copy a finished run's results to data/reference/NAME"
    )
    keep.add_argument("name")
    store = commands.add_parser(
        "store", help="execute the stored lessons anew and keep their outputs in notebooks/"
    )
    commands.add_parser(
        "stamp",
        help="write the address of pyproject.toml and the measured results into README and lessons",
    )
    for command in (run, keep, store):
        command.add_argument(
            "--only", default="00-99", metavar="A-B", help="lessons by number, such as 01-03 or 04"
        )
    for command in (run, keep, grid):
        command.add_argument(
            "--preset",
            default=None if command is grid else "auto",
            help="quick, standard, full or auto (default)",
        )
    for command in (run, keep):
        command.add_argument(
            "-p",
            nargs=2,
            action="append",
            default=[],
            metavar=("NAME", "VALUE"),
            help="change a setting",
        )
    options = parser.parse_args(arguments)
    try:
        return {
            "run": _run,
            "sweep": _sweep,
            "bench": _bench,
            "reference": _reference,
            "store": _store,
            "stamp": _stamp,
        }[options.command](options) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _chosen(options):
    return config(options.preset, **{name: _value(text) for name, text in options.p}), _lessons(
        options
    )


def _lessons(options):
    first, _, last = options.only.partition("-")
    lessons = [name for name in course.NEEDS if first <= name[:2] <= (last or first)]
    if not lessons:
        raise ValueError(
            f"--only {options.only}: no such lesson; there are 00 to {list(course.NEEDS)[-1][:2]}"
        )
    return lessons


def _run(options):
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    cfg, lessons = _chosen(options)
    print(f"preset {cfg.preset}, dataset {cfg.dataset}", flush=True)
    for lesson in lessons:
        found = course.stage(lesson, cfg)
        if found.finished and (found / f"{lesson}.ipynb").exists() and not options.again:
            say(f"{lesson}: finished before, reused")
            continue
        try:
            course.run_lesson(lesson, cfg, say)
        except PapermillExecutionError as error:
            print(
                f"error in {lesson}, cell {error.exec_count}: {error.ename}: {error.evalue}",
                file=sys.stderr,
            )
            print(
                f"the notebook as far as it came: {found / f'.{lesson}.ipynb'}; run again to go on",
                file=sys.stderr,
            )
            return 1
        except DeadKernelError:
            print(
                f"error in {lesson}: its process was killed, perhaps for want of memory; run again to go on",
                file=sys.stderr,
            )
            return 1
        except KeyboardInterrupt:
            print("stopped; the same command goes on from the last finished epoch", file=sys.stderr)
            return 130
    stages = [s for s in (course.stage(name, cfg) for name in course.NEEDS) if s.finished]
    if any(s.metrics["rows"] for s in stages):
        print("\n" + course.scoreboard(stages).to_string(index=False, float_format="%.2f"))
    print("\nexecuted notebooks:")
    for lesson in lessons:
        print(f"  {course.stage(lesson, cfg) / f'{lesson}.ipynb'}")


def _sweep(options):
    import yaml

    from .sweeps import sweep

    settings = {}
    if options.file:
        try:
            settings = yaml.safe_load(Path(options.file).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(
                f"{options.file} is not valid YAML: {' '.join(str(error).split())}"
            ) from None
        if not isinstance(settings, dict):
            raise ValueError(
                f"{options.file}: expected lines such as 'seed: [0, 1, 2]', found {settings!r}"
            )
    lesson, preset = str(settings.pop("lesson", "05")), settings.pop("preset", "auto")
    lesson = (options.lesson or lesson).zfill(2)
    lesson = next((name for name in course.NEEDS if lesson in (name, name[:2])), lesson)
    preset = config(options.preset or preset).preset
    for name, *values in options.p:
        if not values:
            raise ValueError(
                f"-p {name}: expected one or more values after the name, for example -p seed 0 1 2"
            )
        settings[name] = [_value(v) for v in values] if len(values) > 1 else _value(*values)
    title = Path(options.file).stem if options.file else f"sweep-{lesson}"
    path = Path(
        options.csv
        or course.ROOT / config(preset, runs=settings.get("runs")).runs / preset / f"{title}.csv"
    )
    failed = sweep(lesson, preset, settings, path, options.jobs, options.scheduler)
    print(f"\n{path}")
    for point, why in failed.items():
        print(f"failed: {point}: {why}", file=sys.stderr)
    return 1 if failed else 0


def _bench(options):
    from tools.bench import bench

    bench(options.json, say=say)
    print(options.json)


def _reference(options):
    cfg, lessons = _chosen(options)
    course.keep_reference(options.name, cfg, lessons)


def _store(options):
    for lesson in _lessons(options):
        course.store_lesson(lesson, config("auto"), say)


def _stamp(options):
    from tools.stamp import stamp

    for path in stamp():
        print(f"stamped {path}")


def say(line):
    print(line, flush=True)


def _value(text):
    """A setting's value as written on the command line: a Python literal, else the text itself."""
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false", "none") else text)
    except (ValueError, SyntaxError):
        return text
