"""What stands in one place and is written into README and lessons: the repository's address, the measured results."""

import re
import tomllib

import pandas as pd

from mslib.course import stages as course
from mslib.files import ROOT, read_json, replacing

PLACES = r"(github\.com/|/github/|/v2/gh/)[\w.-]+/[\w.-]+?(?=(\.git)?[/\s\"')\]\\]|$)"
SECTION = re.compile(r"(<!-- (results|comparison|bench) -->\n)(.*?)(<!-- /\2 -->)", re.S)


def address():
    """ "owner/name" of the repository, from [project.urls] in pyproject.toml."""
    url = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"][
        "Repository"
    ]
    return url.removeprefix("https://github.com/").rstrip("/")


def results():
    """The README's section of results, in Markdown, from the reference run that the lessons show."""
    stages = list(course.reference().values())
    table = course.scoreboard(stages)
    line = sum(
        len(s.rows) for s in stages if s.lesson[:2] <= "05" and s.metrics["rows"]
    )  # of later lessons only the ends
    ends = table.network.str.contains("fine-tuned") & ~table.network.str.startswith("VGG")
    table = table[(table.index < line) | ends]
    folder = stages[0].path.parent.relative_to(course.ROOT).as_posix()
    copies = " · ".join(f"[{s.lesson[:2]}]({folder}/{s.lesson}/{s.lesson}.ipynb)" for s in stages)
    settings = ", ".join(
        f"{k} {v}"
        for k, v in stages[-1].settings.items()
        if k not in ("image_size", "train_size", "test_size")
    )
    m, minutes = stages[-1].metrics, sum(s.minutes for s in stages)
    return (
        f"![What the cut costs, and what is left after fine-tuning]({folder}/result.png)\n\n"
        + _markdown(table.columns, table.astype(str).to_numpy())
        + "\n\n"
        f"Test top-1 of one run with {settings}; {m['date']}, {m['hardware']}, {m['threads']} threads, torch {m['torch']}; "
        f"{minutes:.0f} minutes of training in all. The lessons as executed in this run: {copies}.\n"
    )


def comparison():
    """The README's table of methods, in Markdown, from data/reference/comparison-cifar10.csv: means over seeds ± sd."""
    table = pd.read_csv(course.REFERENCE / "comparison-cifar10.csv")
    cells = (
        table.assign(lost=table.before - table.folded)
        .groupby(["method", "reduction"])[["lost", "top1"]]
        .agg(["mean", "std"])
    )
    order, reductions = (
        table.groupby("method").top1.mean().sort_values(ascending=False).index,
        sorted(table.reduction.unique()),
    )
    heads = [
        "method",
        *(
            f"−{r:.0%}: {what}"
            for r in reductions
            for what in ("lost at the cut", "top-1 % in the end")
        ),
    ]
    rows = []
    for method in order:
        rows.append([method])
        for r in reductions:
            (lost, _), (top1, spread) = (
                cells.loc[(method, r), "lost"],
                cells.loc[(method, r), "top1"],
            )
            rows[-1] += ["" if method == "scratch" else f"{lost:.1f}", f"{top1:.2f} ± {spread:.2f}"]
    first = table.iloc[0]
    return _markdown(heads, rows) + (
        f"\n\nResNet-{first.depth} on CIFAR-10 (JPEG copy), {first.epochs} epochs each, means over seeds {', '.join(map(str, sorted(table.seed.unique())))} "
        f"± their standard deviation; {table.date.min()} to {table.date.max()}, {first.hardware}, torch {first.torch}; "
        "[the table](data/reference/comparison-cifar10.csv), [the sweep](data/reference/comparison-cifar10.yml).\n"
    )


def benchmarks():
    """The README's table of `make bench`, in Markdown, from data/reference/bench.json."""
    found = read_json(course.REFERENCE / "bench.json")
    rows = [
        (
            row["what"],
            f"{row['ours']:.3g} {row['unit']}",
            f"{row['theirs']:.3g}, {row['theirs_is']}",
            f"{row['ratio']:.2f}",
        )
        for row in found["rows"]
    ]
    where = (
        f"{found['date']}, {found['hardware']}, {found['threads']} threads, torch {found['torch']}"
    )
    return (
        _markdown(("measured", "here", "against", "ratio"), rows)
        + f"\n\n`make bench`, {where}; [as JSON](data/reference/bench.json).\n"
    )


def _markdown(heads, rows):
    """A table in Markdown: its first column to the left, the others to the right."""
    return "\n".join(
        f"| {' | '.join(row)} |" for row in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows)
    )


MADE = {"results": results, "comparison": comparison, "bench": benchmarks}


def stamp():
    """Write the address of pyproject.toml everywhere and the results into README; returns the files that changed."""
    changed = []
    for path in (ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))):
        text = path.read_text(encoding="utf-8")
        new = re.sub(PLACES, lambda m: m.group(1) + address(), text)
        new = SECTION.sub(lambda m: m.group(1) + MADE[m.group(2)]() + m.group(4), new)
        if new != text:
            with replacing(path) as beside:
                beside.write_text(new, encoding="utf-8")
            changed.append(path.relative_to(ROOT))
    return changed
