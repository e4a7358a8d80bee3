"""The command line: python -m mslib run | sweep | bench | reference | store | stamp."""

import argparse
import ast
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..files import ROOT

# What needs pydantic, pandas or papermill is imported where it is used: --help answers at once.


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failed run, 2 for a wrong request."""
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args([_shielded(word) for word in words])
    commands = {
        "run": _run,
        "sweep": _sweep,
        "bench": _bench,
        "reference": _reference,
        "store": _store,
        "stamp": _stamp,
    }
    try:
        return commands[options.command](options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _shielded(word: str) -> str:
    """A negative number with a space before it: argparse would take -1e-3 for an option."""
    return f" {word}" if re.match(r"-(\.?\d|inf|nan)", word) else word


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mslib", description="Run the course's lessons in batch."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    run = add("run", "execute the lessons in order through papermill; finished ones are reused")
    again = "execute notebooks anew; finished trainings are still reused"
    run.add_argument("--again", action="store_true", help=again)
    grid = add("sweep", "run one lesson for every combination of settings; a row each in a CSV")
    keep = add("reference", "copy a finished run's results to data/reference/NAME")
    keep.add_argument("name")
    store = add("store", "execute the stored lessons anew and keep their outputs in notebooks/")
    bench = add("bench", "training, pruning and pruned networks against named alternatives")
    text = (
        "write the address of pyproject.toml and the measured results into README, pages, lessons"
    )
    add("stamp", text)

    table = str(ROOT / "runs" / "bench.json")
    bench.add_argument(
        "--json", default=table, help="where the table goes (default runs/bench.json)"
    )
    for command in (run, keep, store):
        text = "lessons by number, such as 3, 01-03 or 04"
        command.add_argument("--only", default="00-99", metavar="A-B", help=text)
    for command in (run, keep, grid):
        command.add_argument("--preset", help="quick, standard, full or auto (default)")
    pair: dict[str, Any] = dict(action="append", default=[], metavar=("NAME", "VALUE"))
    for command in (run, keep):
        command.add_argument("-p", nargs=2, help="change a setting", **pair)
    grid.add_argument("-p", nargs="+", help="a setting and its values", **pair)
    text = "YAML: lesson, preset, and settings with a value or a list of values each"
    grid.add_argument("file", nargs="?", help=text)
    grid.add_argument("--lesson", help="by number or name (default 05)")
    grid.add_argument("-j", "--jobs", type=int, default=1, help="processes at a time (default 1)")
    text = "of a Dask scheduler whose workers see this folder"
    grid.add_argument("--scheduler", metavar="ADDRESS", help=text)
    text = "the table (default runs/<preset>/sweep-<lesson>.csv, or named like FILE)"
    grid.add_argument("--csv", help=text)
    return parser


def _run(options: argparse.Namespace) -> int:
    from .lessons import run_lesson
    from .stages import needs_checkout, stage

    needs_checkout("run")
    cfg, lessons = _chosen(options)
    say(f"preset {cfg.preset}, dataset {cfg.dataset}")
    for lesson in lessons:
        if status := _executed(lesson, cfg, partial(run_lesson, again=options.again)):
            return status
    _print_scoreboard(cfg)
    print("\nexecuted notebooks:")
    for lesson in lessons:
        print(f"  {stage(lesson, cfg) / f'{lesson}.ipynb'}")
    return 0


def _executed(lesson: str, cfg: Any, execute: Callable[[str, Any, Any], None]) -> int:
    """Execute a lesson's notebook; the exit status, with the reason told where it is not 0."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    from .stages import stage

    try:
        execute(lesson, cfg, say)
    except PapermillExecutionError as error:
        part = stage(lesson, cfg) / f".{lesson}.ipynb"
        _complain(
            f"error in {lesson}, cell {error.exec_count}: {error.ename}: {error.evalue}",
            f"the notebook as far as it came: {part}; run again to go on",
        )
        return 1
    except DeadKernelError:
        why = "its process was killed, perhaps for want of memory; run again to go on"
        _complain(f"error in {lesson}: {why}")
        return 1
    except KeyboardInterrupt:
        _complain("stopped; the same command goes on from the last finished epoch")
        return 130
    return 0


def _print_scoreboard(cfg: Any) -> None:
    from .results import scoreboard
    from .stages import NEEDS, stage

    stages = []
    for lesson in NEEDS:
        try:
            found = stage(lesson, cfg)
            if found.finished and found.metrics["rows"]:
                stages.append(found)
        except ValueError as error:  # of another lesson, damaged: the table does without
            _complain(f"warning: {error}")
    if stages:
        print("\n" + scoreboard(stages).to_string(index=False, float_format="%.2f"))


def _sweep(options: argparse.Namespace) -> int:
    from .settings import config
    from .stages import NEEDS, home
    from .sweeps import sweep

    settings = _read_grid(options.file) if options.file else {}
    for name, values in read_pairs(options.p).items():
        settings[name] = values if len(values) > 1 else values[0]
    asked = str(options.lesson or settings.pop("lesson", "05")).zfill(2)
    settings.pop("lesson", None)
    lesson = next((name for name in NEEDS if asked in (name, name[:2])), asked)
    preset = config(options.preset or settings.pop("preset", "auto")).preset
    settings.pop("preset", None)
    title = Path(options.file).stem if options.file else f"sweep-{lesson}"
    runs = home() / config(preset, runs=settings.get("runs")).runs
    path = Path(options.csv or runs / preset / f"{title}.csv")
    if path.is_dir():
        raise ValueError(f"--csv {path} is a folder; give the name of a file, such as table.csv")
    failed = sweep(lesson, preset, settings, path, options.jobs, options.scheduler)
    print(f"\n{path}")
    _complain(*(f"failed: {point}: {why}" for point, why in failed.items()))
    return 1 if failed else 0


def _read_grid(file: str) -> dict[str, Any]:
    """The settings of a sweep's YAML file."""
    from .settings import read_yaml

    settings = read_yaml(file)
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        read = [_value(v) if isinstance(v, str) else v for v in values]  # 1e-3 is text in YAML
        settings[name] = read if isinstance(value, list) else read[0]
    return settings


def _bench(options: argparse.Namespace) -> int:
    _tool("bench")["bench"](options.json, say=say)
    print(options.json)
    return 0


def _stamp(options: argparse.Namespace) -> int:
    for path in _tool("stamp")["stamp"]():
        print(f"stamped {path}")
    return 0


def _tool(name: str) -> dict[str, Any]:
    """What tools/<name>.py of the checkout defines."""
    path = ROOT / "tools" / f"{name}.py"
    if not path.is_file():
        raise FileNotFoundError(
            f"{name} needs tools/{name}.py, which the installed package does not hold; "
            "run it in a checkout of https://github.com/mslib-course/mslib"
        )
    return runpy.run_path(str(path), run_name=f"tools.{name}")


def _reference(options: argparse.Namespace) -> int:
    from .results import keep_reference

    keep_reference(options.name, *_chosen(options))
    return 0


def _store(options: argparse.Namespace) -> int:
    from .lessons import store_lesson
    from .settings import config
    from .stages import needs_checkout

    needs_checkout("store")
    for lesson in _lessons(options.only):
        if status := _executed(lesson, config("auto"), store_lesson):
            return status
    return 0


def _chosen(options: argparse.Namespace) -> tuple[Any, list[str]]:
    """The configuration and the lessons that were asked for."""
    from .settings import config

    settings = {name: value for name, (value,) in read_pairs(options.p).items()}
    return config(options.preset or "auto", **settings), _lessons(options.only)


def _lessons(only: str) -> list[str]:
    """The lessons of --only: "3", "03" or "1-5"."""
    from .stages import NEEDS

    span = re.fullmatch(r"(\d{1,2})(?:-(\d{1,2}))?", only.strip())
    if not span:
        raise ValueError(f"--only {only}: expected lessons by number, such as 03 or 01-05")
    first, last = span[1].zfill(2), (span[2] or span[1]).zfill(2)
    lessons = [name for name in NEEDS if first <= name[:2] <= last]
    if not lessons:
        raise ValueError(f"--only {only}: no such lesson; there are 00 to {list(NEEDS)[-1][:2]}")
    return lessons


def say(line: str) -> None:
    print(line, flush=True)


def _complain(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def read_pairs(given: Iterable[Sequence[str]]) -> dict[str, list[Any]]:
    """The values of every -p NAME VALUE …; ValueError for a name without one, or given twice."""
    texts: dict[str, Sequence[str]] = {}
    for name, *values in given:
        if not values:
            raise ValueError(
                f"-p {name}: expected one or more values after the name, such as -p seed 0 1 2"
            )
        if name in texts:
            told = f"{' '.join(texts[name])} and {' '.join(values)}"
            raise ValueError(f"-p {name} is given twice, {told}; leave one out")
        texts[name] = values
    return {name: [_value(text) for text in values] for name, values in texts.items()}


def _value(text: str) -> Any:
    """A setting's value as written on the command line: a Python literal, else the text itself."""
    text = text.strip()
    if re.fullmatch(r"[+-]?(inf|nan|infinity)", text.lower()):
        return float(text)  # to be refused as the number that it is
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false", "none") else text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
