"""What stands in one place and is written into README, the pages of the site, and the lessons.

The repository's address stands in pyproject.toml, measured results in data/reference. README and
the pages show them between markers, such as <!-- bench --> and <!-- /bench -->; what stands there
is made here.
"""

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from mslib.course.results import half_width, read_table, reference, scoreboard
from mslib.course.results import recovery as recovery_curves
from mslib.course.results import tradeoff as traded
from mslib.files import ROOT, read_json, replacing

REFERENCE = ROOT / "data" / "reference"
PLACES = r"(github\.com/|/github/|/v2/gh/)[\w.-]+/[\w.-]+?(?=(\.git)?[/\s\"')\]\\]|$)"
GITHUB = "https://github.com/"


def address() -> str:
    """The repository as "owner/name", from [project.urls] in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].removeprefix(GITHUB).rstrip("/")


@contextmanager
def _reading(what: object) -> Iterator[None]:
    """ValueError that names `what` is read here, if something is wrong with its content."""
    try:
        yield
    except OSError:  # which names the file
        raise
    except Exception as error:  # what lacks a name or a column raises of any kind
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{what}: {' '.join(told.split())}") from error


def _alike(table: pd.DataFrame, cells: list[str]) -> pd.DataFrame:
    """`table`, if every cell has the same seeds: means over others could not be compared."""
    seeds = table.groupby(cells).seed.agg(lambda of_cell: tuple(sorted(of_cell)))
    usual = seeds.mode()[0]
    for cell, found in seeds[seeds != usual].items():
        raise ValueError(
            f"{cell} has seeds {found}, others have {usual}; measure what is missing first"
        )
    return table


def _shared(table: pd.DataFrame, cells: list[str]) -> pd.DataFrame:
    """Of a table that grows: the cells of its first seed, of those seeds that all of them have."""
    first = table[table.seed == table.seed.min()]
    table = table.merge(first[cells].drop_duplicates())
    seeds = set.intersection(*(set(rows.seed) for _, rows in table.groupby(cells)))
    return table[table.seed.isin(seeds)]


# ---- the reference run ---------------------------------------------------------------------------


def _folder() -> str:
    """Where the reference run of the lessons lies, from ROOT."""
    return f"data/reference/{next(iter(reference().values())).path.parent.name}"


def figure() -> str:
    """The reference run in one picture."""
    return f"![What the cut costs, and what is left after fine-tuning]({_folder()}/result.png)\n"


def results() -> str:
    """The table of the reference run that the lessons show, and how it was made."""
    stages = list(reference().values())
    table = scoreboard(stages)
    # lessons up to 05 in full; of the later ones only what they end with
    early = [len(s.rows) for s in stages if s.lesson[:2] <= "05" and s.metrics["rows"]]
    ends = table.network.str.contains("fine-tuned") & ~table.network.str.startswith("VGG")
    table = table[(table.index < sum(early)) | ends]
    copies = [f"[{s.lesson[:2]}]({_folder()}/{s.lesson}/{s.lesson}.ipynb)" for s in stages]
    hidden = ("image_size", "train_size", "test_size")
    settings = [f"{k} {v}" for k, v in stages[-1].settings.items() if k not in hidden]
    m, minutes = stages[-1].metrics, sum(s.minutes for s in stages)
    made = f"{m['date']}, {m['hardware']}, {m['threads']} threads, torch {m['torch']}"
    return (
        f"{_markdown(table.columns, table.astype(str).to_numpy())}\n\n"
        f"Test top-1 of one run with {', '.join(settings)}; {made}; "
        f"{minutes:.0f} minutes of training in all. "
        f"The lessons as executed in this run: {' · '.join(copies)}.\n"
    )


def findings() -> str:
    """What the reference run says, in words: points of test top-1 between its networks."""
    table = scoreboard(reference().values()).set_index("network")
    top1 = table["top-1 %"]

    def lost(method: str) -> float:
        return top1[f"{method}: before the cut"] - top1[f"{method}: after the cut, folded"]

    def behind(control: str, *methods: str) -> str:
        gaps = sorted(top1[control] - top1[f"{method}: fine-tuned"] for method in methods)
        return f"{gaps[0]:.2f} to {gaps[-1]:.2f} points behind"

    dense, scratch = "dense, trained on as long", "scratch: same architecture"
    deep = _deep()
    seeds = f"mean of {len(deep)} seeds" if len(deep) > 1 else "one seed"
    shown = deep.mean().unstack("when")[["before", "folded", "few", "16"]].loc[[*DEEP]]
    heads = ["test top-1 in %", "before the cut", "at the cut"]
    heads += ["repaired with 1 % of the images", "repaired for 16 epochs"]
    rows = [[name, *map("{:.1f}".format, row)] for name, row in zip(shown.index, shown.to_numpy())]
    return (
        f"- **The cut** costs {lost('masked'):.2f} points of test top-1 after the masked penalty, "
        f"and {lost('global'):.0f} after the global one, whose strength λ was too low. With "
        f"better λ (ResNet-20, {len(_lead_of_masked('folded'))} seeds) masked is "
        f"{_with_interval(_lead_of_masked('folded'))} points ahead at the cut. It also takes more "
        "epochs; over a global one of as many: "
        f"{_with_interval(_lead_of_masked('folded', 'global-twice'))} (95 % intervals).\n"
        f"- **After fine-tuning** the two end {behind(dense, 'global', 'masked')} the dense "
        f"network, and {behind(scratch, 'global', 'masked')} the small network from "
        "scratch. About a point may be chance.\n"
        f"- **A deeper cut**, 80 % of the MACs of a ResNet-20 ({seeds}), separates the methods; a "
        "repair draws them together. *One-shot* is unprepared; *masked* and *greg-1* (a "
        "growing penalty) had 12 epochs before the cut:\n\n"
        f"{_markdown(heads, rows)}\n"
    )


DEEP = ("one-shot", "masked", "greg-1")  # the methods of README's table


def _deep() -> pd.DataFrame:
    """Test top-1 of the deeper cut: a row a seed that has all, columns method and when."""
    table = _deeper().query("not taught and method in @DEEP")
    few = (table.images == 0.01) & (table.station == "4")
    when = table.station.where(table.images == 1).mask(few, "few")
    wanted = table.assign(when=when)[when.isin(["before", "folded", "few", "16"])]
    return _whole_seeds(wanted, ["method", "when"])


def _whole_seeds(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Test top-1 of DEEP, a row a seed that has all `columns`. ValueError if there is none."""
    whole = table.pivot(index="seed", columns=columns, values="test").dropna()
    if whole.empty or {*DEEP} - {*whole.columns.unique("method")}:
        raise ValueError("a measurement is missing: no seed has all that the table shows")
    return whole


# ---- the comparison of methods -------------------------------------------------------------------


def _compared() -> pd.DataFrame:
    """The table of lesson 08's sweep, with `lost`: points lost at the cut, constants folded in."""
    columns = ("method", "reduction", "seed", "before", "folded", "top1")
    table = read_table(REFERENCE / "comparison-cifar10.csv", columns)
    return _alike(table, ["method", "reduction"]).assign(lost=table.before - table.folded)


def comparison() -> str:
    """The table of methods: means over seeds ± standard deviation, the best first."""
    table = _compared()
    cells = table.groupby(["method", "reduction"])[["lost", "top1"]].agg(["mean", "std"])
    order = table.groupby("method").top1.mean().sort_values(ascending=False).index
    reductions, heads, rows = sorted(table.reduction.unique()), ["method"], []
    for r in reductions:
        heads += [f"−{r:.0%}: lost at the cut", f"−{r:.0%}: top-1 % in the end"]
    for method in order:
        row = [method]
        for r in reductions:
            lost, top1 = cells.loc[(method, r), "lost"], cells.loc[(method, r), "top1"]
            row += ["" if method == "scratch" else f"{lost['mean']:.1f}"]
            row += [f"{top1['mean']:.2f} ± {top1['std']:.2f}"]
        rows.append(row)
    first, seeds = table.iloc[0], ", ".join(str(seed) for seed in sorted(table.seed.unique()))
    return (
        f"{_markdown(heads, rows)}\n\n"
        f"ResNet-{first.depth} on CIFAR-10 (JPEG copy), {first.epochs} epochs each, "
        f"means over seeds {seeds} ± their standard deviation; "
        f"{table.date.min()} to {table.date.max()}, {first.hardware}, torch {first.torch}; "
        "[the table](data/reference/comparison-cifar10.csv), "
        "[the sweep](data/reference/comparison-cifar10.yml).\n"
    )


def methods() -> str:
    """What the comparison says, in words: points of test top-1 from the control, and at the cut."""
    table, lines = _compared(), []
    for reduction, group in table.groupby("reduction"):
        ends = group.groupby("method").top1.mean()
        gaps = (ends.drop("scratch") - ends.scratch).sort_values()
        lines.append(
            f"- **With {100 * reduction:.0f} % of the MACs removed**, the best pruned networks "
            f"(*{gaps.index[-1]}*) end {_from(gaps.iloc[-1])} the control. "
            f"The last (*{gaps.index[0]}*) end {_from(gaps.iloc[0])} it."
        )
    half = table[table.reduction == 0.5].groupby("method").lost.mean().drop("scratch")
    aimed = half[["masked", "greg-1", "greg-2"]]
    others = half.drop(aimed.index)
    lines.append(
        "- **At the cut** of half of the MACs, the penalties aimed at what goes "
        f"(*masked*, *greg-1*, *greg-2*) lose {aimed.max():.1f} points at most. "
        f"The others lose {others.min():.0f} to {others.max():.0f}."
    )
    second = read_table(REFERENCE / "control-cifar10.csv", ("method", "seed", "top1"))
    uniform = table[(table.method == "uniform") & (table.reduction == 0.7)]
    _alike(pd.concat([second, uniform]), ["method"])
    control = second.top1
    gap = control.mean() - uniform.top1.mean()
    lines.append(
        "- **A second control**, trained from scratch with *uniform*'s widths at 70 % less, "
        f"ends at {control.mean():.2f} ± {control.std():.2f} %. "
        f"That is {_from(gap)} *uniform* itself "
        "([table](data/reference/control-cifar10.csv))."
    )
    return "\n".join(lines) + "\n"


STATIONS = {"before": "before the cut", "folded": "at the cut", "1": "1 epoch", "4": "4 epochs"}
STATIONS |= {"16": "16 epochs", "28": "28 epochs", "68": "68 epochs"}


def _curves() -> pd.DataFrame:
    """The recovery curves, of the same seeds everywhere."""
    return _shared(recovery_curves(), ["method", "reduction", "station"])


def recovery() -> str:
    """What a cut costs and how fast repair brings it back, a row a method and reduction."""
    every, deep = _curves(), recovery_curves()
    deep = _shared(deep[deep.method.isin(DEEP)], ["method", "reduction", "station"])
    tables = [every, deep] if deep.seed.nunique() > every.seed.nunique() else [every]
    return "\nThree of them, over more seeds:\n\n".join(
        _by_station("recovery-cifar10", table, "reduction", "MACs removed", "{:.0%}")
        for table in tables
    )


def _lead_of_masked(station: str, over: str = "global") -> pd.Series:
    """Points of test top-1 by which masked is ahead of `over`, by seed, each at its best push."""
    table, best = traded()
    there = table[(table.station == station) & (table.push == table.method.map(best))]
    tops = there.pivot(index="seed", columns="method", values="test")
    return (tops.masked - tops[over]).dropna()


def _with_interval(differences: pd.Series) -> str:
    return f"{differences.mean():.1f} ± {half_width(differences):.1f}"


def tradeoff() -> str:
    """What a stronger penalty costs before the cut, and saves at it, a row a strength."""
    table, best = traded()
    shared = _shared(table, ["method", "push", "station"])
    told = []
    for over in ("global", "global-twice"):
        for station in ("before", "folded"):
            lead = _lead_of_masked(station, over)
            points = ", ".join(f"{each:+.2f}" for each in lead)
            mean = f"mean {_with_interval(lead)}, 95 %"
            told.append(f"{over}, {STATIONS[station]}: {points} ({mean})")
    pushes = ", ".join(f"{method} {push:g}" for method, push in best.items())
    return (
        f"{_by_station('tradeoff-cifar10', shared, 'push', 'push of λ', '{:g}')}\n"
        "Points of test top-1 by which *masked* is ahead, seed by seed. Each method has the push "
        f"that is best at the cut on held-out images, over the seeds ({pushes}). Over "
        f"{'; over '.join(told)}.\n"
    )


def _by_station(name: str, table: pd.DataFrame, by: str, head: str, form: str) -> str:
    """Test top-1 at each station, means over the seeds; a row a method and value of `by`."""
    table = table[table.station.isin([*STATIONS])]
    there = [station for station in STATIONS if station in set(table.station)]
    rows = []
    for (method, value), curve in table.groupby(["method", by], sort=False):
        means = curve.groupby("station").test.mean().reindex(there)
        cells = ["" if pd.isna(top1) else f"{top1:.1f}" for top1 in means]
        rows.append([method, form.format(value), *cells])
    made = sorted({f"{row.hardware}, torch {row.torch}" for row in table.itertuples()})
    seeds = ", ".join(str(seed) for seed in sorted(table.seed.unique()))
    return (
        f"{_markdown(['method', head, *(STATIONS[name] for name in there)], rows)}\n\n"
        f"Test top-1 (%) of a ResNet-{table.depth.iloc[0]} on CIFAR-10 (JPEG copy), seed {seeds}; "
        f"up to {table.date.max()}; {'; '.join(made)}; "
        f"[the table](data/reference/{name}.csv), [the protocol](data/reference/{name}.yml).\n"
    )


def _deeper() -> pd.DataFrame:
    """The measurements of the cut of 80 %, also with few images and with a teacher."""
    columns = ("method", "station", "images", "taught", "reduction")
    table = read_table(REFERENCE / "recovery-cifar10.csv", columns, dtype={"station": str})
    return table[table.reduction == 0.8]


def few_images() -> str:
    """What repair brings back with few images, in as many steps as four epochs have."""
    table = _deeper().query("station == '4' and not taught and method in @DEEP")
    cells = _whole_seeds(table, ["method", "images"])
    means = cells.mean().unstack().loc[[*DEEP]].sort_index(axis=1)
    heads = ["method", *(f"{share:.0%} of the images" for share in means)]
    rows = [[method, *map("{:.1f}".format, row)] for method, row in zip(DEEP, means.values)]
    seeds = ", ".join(map(str, cells.index))
    return f"{_markdown(heads, rows)}\n\nTest top-1 (%), seed {seeds}; from the same table.\n"


def teacher() -> str:
    """What a teacher adds to a training after the cut, of the same seed, method and epochs."""
    table = _deeper().query("images == 1")
    key = ["station", "method", "seed"]
    pairs = table.pivot(index=key, columns="taught", values="test").dropna().reset_index()
    pairs = pairs.astype({"station": int}).sort_values("station", kind="stable")
    rows = [
        (method, str(epochs), f"{alone:.1f}", f"{taught:.1f}", f"{taught - alone:+.1f}")
        for epochs, method, _, alone, taught in pairs.itertuples(index=False)
    ]
    heads = ("method", "epochs after the cut", "alone", "with a teacher", "points gained")
    seeds = ", ".join(map(str, sorted(set(pairs.seed))))
    return f"{_markdown(heads, rows)}\n\nTest top-1 (%), seed {seeds}; from the same table.\n"


def _from(points: float) -> str:
    return f"{abs(points):.2f} points {'ahead of' if points > 0 else 'behind'}"


# ---- the lessons ---------------------------------------------------------------------------------

# lesson -> the question that it answers
QUESTIONS = {
    "00_start_here": "Why does one network die of a cut that another does not notice?",
    "01_baseline": "What are we starting from?",
    "02_global_sparsity": "Which channels could go, and so: which widths?",
    "03_masked_regularization": "How does a network get ready for its cut?",
    "04_pruning": "How are channels taken out?",
    "05_finetune": "What is left of the differences after the repair?",
    "06_growing_regularization": "Does a slow start spare the network?",
    "07_feature_flow": "Can the features say which layers matter?",
    "08_method_comparison": "How does one compare methods?",
    "09_your_own_network": "How do I do this with my network?",
    "10_the_family": "What else can a penalty do?",
    "11_your_own_penalty": "How do I write one of my own?",
    "12_which_method": "What should I use?",
}
LOGGED = re.compile(r"held-out top-1 [\d.]+ %, (\d+) s\b")  # the line that a training leaves
TITLE = re.compile(r'"# (\d\d) · (.+?)\\n')
MINUTES = re.compile(
    r"(\*\*Minutes on two CPU cores:\*\* )\d+( \(drawn shapes[^)]*\))( · \d+ \(CIFAR-10[^)]*\))?"
)


def minutes(notebook: str) -> int:
    """What the trainings took whose lines are stored in a lesson's text, whole minutes, up."""
    seconds = 0
    for cell in json.loads(notebook)["cells"]:
        lines = LOGGED.findall(json.dumps(cell.get("outputs", []), ensure_ascii=False))
        seconds += sum(map(int, lines))
    return max(1, math.ceil(seconds / 60))


def _on_cifar() -> dict[str, int]:
    """Number of a lesson -> minutes of training that the reference run took."""
    return {s.lesson[:2]: max(1, round(s.minutes)) for s in reference().values()}


def lessons() -> str:
    """The table of lessons, with what their trainings took."""
    rows, cifar = [], _on_cifar()
    for lesson, question in QUESTIONS.items():
        path = ROOT / "notebooks" / f"{lesson}.ipynb"
        with _reading(path):
            text = path.read_text(encoding="utf-8")
            if not (found := TITLE.search(text)):
                raise ValueError("no cell begins like '# 02 · Global sparsity'")
            here = minutes(text)
        number, name = found.groups()
        took = " · ".join(map(str, [here, *filter(None, [cifar.get(number)])]))
        rows.append((f"[{number} {name}](notebooks/{lesson}.ipynb)", question, took))
    heads = ("lesson", "question", "minutes on two CPU cores: shapes · CIFAR-10")
    return _markdown(heads, rows, numbers=False) + "\n"


def _timed(text: str) -> str:
    """A lesson whose head says what its stored trainings took."""
    number = TITLE.search(text)
    if not MINUTES.search(text) or not number:
        return text
    cifar = _on_cifar().get(number.group(1))
    more = f" · {cifar} (CIFAR-10, the stored run)" if cifar else ""
    return MINUTES.sub(lambda found: f"{found[1]}{minutes(text)}{found[2]}{more}", text)


# ---- networks and benchmarks ---------------------------------------------------------------------


def networks() -> str:
    """What can be cut in torchvision's networks, from data/reference/networks.csv."""
    heads = ("network", "groups that can be cut", "MACs left with half of them gone")
    table = read_table(REFERENCE / "networks.csv", dtype=str)
    rows = [
        (row.network, f"{row.free} of {row.groups}", row.left, row.whole)
        for row in table.itertuples()
    ]
    return _markdown((*heads, "what stays whole"), rows, numbers=False) + "\n"


def benchmarks() -> str:
    """What `make bench` measured, from data/reference/bench.json."""
    found = read_json(REFERENCE / "bench.json")
    rows = [
        (
            row["what"],
            f"{row['ours']:.3g} {row['unit']}",
            f"{row['theirs']:.3g}, {row['theirs_is']}",
            f"{row['ratio']:.2f}",
        )
        for row in found["rows"]
    ]
    made = f"`make bench` of mslib {found['mslib']}, {found['date']}"
    machine = f"{found['hardware']}, {found['threads']} threads, torch {found['torch']}"
    return (
        f"{_markdown(('measured', 'here', 'against', 'ratio'), rows)}\n\n"
        f"{made}, {machine}; [as JSON](data/reference/bench.json).\n"
    )


def _markdown(heads: Iterable[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """A table in Markdown: its first column to the left, the others to the right if `numbers`."""
    heads = list(heads)
    lines = (heads, ["---", *["---:" if numbers else "---"] * (len(heads) - 1)], *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- writing -------------------------------------------------------------------------------------

# section -> what makes it; each stands in one place, in README or on a page of the site
MADE: dict[str, Callable[[], str]] = {
    "lessons": lessons,
    "figure": figure,
    "findings": findings,
    "results": results,
    "comparison": comparison,
    "methods": methods,
    "recovery": recovery,
    "tradeoff": tradeoff,
    "few": few_images,
    "teacher": teacher,
    "networks": networks,
    "bench": benchmarks,
}
# section -> the file in data/reference that it shows, if it is not the reference run
FROM = {
    "lessons": "the reference run and notebooks/*.ipynb",
    "findings": "the reference run and recovery-cifar10.csv",
    "comparison": "comparison-cifar10.csv",
    "methods": "comparison-cifar10.csv and control-cifar10.csv",
    "recovery": "recovery-cifar10.csv",
    "few": "recovery-cifar10.csv",
    "networks": "networks.csv",
    "bench": "bench.json",
}
SECTION = re.compile(rf"(<!-- ({'|'.join(MADE)}) -->\n)(.*?)(<!-- /\2 -->)", re.S)


def pages() -> list[Path]:
    """README and the pages of the site."""
    return [ROOT / "README.md", *sorted((ROOT / "site").glob("*.md"))]


def stamped(text: str, up: str = "") -> str:
    """`text` of a page or a lesson, with the address and all sections as they should be.

    `up` leads from its folder to ROOT, such as "../".
    """

    def section(found: re.Match[str]) -> str:
        name = found.group(2)
        with _reading(f"section {name!r}, made from {FROM.get(name, 'the reference run')}"):
            made = MADE[name]().replace("](data/", f"]({up}data/")
            if nan := re.search(r".*\bnan\b.*", made):
                raise ValueError(f"a measurement is missing for {nan.group()[:120]!r}")
        return found.group(1) + made + found.group(4)

    text = re.sub(PLACES, lambda found: found.group(1) + address(), _timed(text))
    return SECTION.sub(section, text)


def stamp() -> list[Path]:
    """Bring README, pages and lessons up to date; returns the changed files, relative to ROOT."""
    changed = {}  # all are made before the first is written
    for path in (*pages(), *sorted((ROOT / "notebooks").glob("*.ipynb"))):
        with _reading(path):
            text = path.read_text(encoding="utf-8")
            new = stamped(text, "" if path.parent == ROOT else "../")
        if new != text:
            changed[path] = new
    for path, new in changed.items():
        with replacing(path) as beside:
            beside.write_text(new, encoding="utf-8")
    return [path.relative_to(ROOT) for path in changed]
