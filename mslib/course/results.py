"""Measured and published results that come with the course, and tables of them."""

import math
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import ROOT, is_checkout, nearest, reason
from .settings import Config
from .stages import NEEDS, UNFIT, Results, needs_checkout, stage


def tables() -> Path:
    """Where the tables of the course lie: data/ of a checkout, or a folder inside the package."""
    return ROOT / "data" if is_checkout() else Path(__file__).with_name("tables")


def reference(name: str = "resnet56-cifar10") -> dict[str, Results]:
    """Measured results of a real run that come with the course: dict[lesson -> Results], in order.

    `name`: network and images; of the presets in which they were run, the largest is taken. Or a
    folder of data/reference, such as resnet56-cifar10-standard. FileNotFoundError if there is none.
    """
    kept = tables() / "reference"
    for end in ("", "-full", "-standard", "-quick"):
        if found := sorted((kept / f"{name}{end}").glob("*/metrics.json")):
            stages = [Results(path.parent.name, path.parent, {}) for path in found]
            return {s.lesson: Results(s.lesson, s.path, s.metrics["settings"]) for s in stages}
    known = sorted(p.name for p in kept.glob("*") if p.is_dir())
    raise FileNotFoundError(f"no reference {name!r}; there are: {', '.join(known) or 'none'}")


def read_table(path: Path, columns: Collection[str] = (), **how: Any) -> pd.DataFrame:
    """A CSV file that has the `columns`, `how` as of pandas. ValueError that names it if not."""
    try:
        table = pd.read_csv(path, **how)
    except ValueError as error:  # pandas' own kinds are of this one
        raise ValueError(f"{path} cannot be read as a table ({reason(error)})") from None
    if lacking := [name for name in columns if name not in table]:
        raise ValueError(f"{path} lacks the columns {', '.join(lacking)}; it has {[*table]}")
    return table


def recovery() -> pd.DataFrame:
    """The recovery curves on CIFAR-10, of all training images and no teacher, a row a measurement.

    What a cut costs and what repairs it: `station` says when `test` and `held_out` were measured,
    "before" the cut, "cut", "folded", or the epochs of training, as text.
    """
    path = tables() / "reference" / "recovery-cifar10.csv"
    table = read_table(path, ("images", "taught", "station"), dtype={"station": str})
    return table[(table.images == 1) & ~table.taught].reset_index(drop=True)


def tradeoff() -> tuple[pd.DataFrame, dict[str, float]]:
    """What a stronger penalty costs before the cut on CIFAR-10, and saves at it.

    Returns the table, `station` as in `recovery`, and the best push of each method: of those that
    most seeds have, the one of highest mean top-1 at the cut (folded), on held-out images.
    """
    path = tables() / "reference" / "tradeoff-cifar10.csv"
    columns = ("seed", "method", "push", "station", "held_out")
    table = read_table(path, columns, dtype={"station": str})
    best = {}
    for method, runs in table[table.station == "folded"].groupby("method"):
        tops = runs.groupby("push").held_out.agg(["count", "mean"])
        best[str(method)] = tops[tops["count"] == tops["count"].max()]["mean"].idxmax()
    return table, best


def published(network: str, dataset: str = "CIFAR-10") -> pd.DataFrame:
    """Published results of `network`, a row a method, in percent.

    Columns: base and pruned top-1, delta, reduction (of the MACs), source. ValueError where none
    are known, with the nearest name.
    """
    path = tables() / "published.csv"
    table = read_table(path, ("method", "network", "dataset")).set_index("method")
    for column, name in {"network": network, "dataset": dataset}.items():
        known = sorted({*table[column].dropna()})
        if name not in known:
            about = "" if column == "network" else f" of {network}"
            raise ValueError(
                f"no published results{about} for {column} {name!r}" + nearest(name, known)
            )
        table = table[table[column] == name]
    return table


def scoreboard(stages: Iterable[Results]) -> pd.DataFrame:
    """One table of every network in `stages`: top-1, and what is left of MACs and parameters.

    In percent of the row "baseline" (or the first), and for names that begin with VGG-16 of
    "VGG-16: baseline", and so on.
    """
    table = pd.concat([s.rows for s in stages if s.metrics["rows"]], ignore_index=True)
    bases = {"": 0}  # the beginning of names -> the row that they are compared with
    for row, name in enumerate(table.name):
        if name.endswith("baseline"):
            bases[name.removesuffix("baseline").rstrip(": ")] = row
    own = [bases[max((b for b in bases if n.startswith(b)), key=len)] for n in table.name]
    whole = table.iloc[own].reset_index(drop=True)
    columns = {
        "network": table.name,
        "top-1 %": table.top1.round(2),
        "MACs M": (table.macs / 1e6).round(2),
        "MACs left %": (100 * table.macs / whole.macs).round(1),
        "params left %": (100 * table.params / whole.params).round(1),
        "epochs": table.epochs,
    }
    return pd.DataFrame(columns)


def decisions(table: pd.DataFrame, afterwards: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    """What to use, by reduction and by what one can afford after the cut.

    table: a row a run, with the columns reduction, seed, method, and those named in `afterwards`.
    afterwards: what is afforded -> the column of top-1 (percent) that chooses, on held-out images,
        and the column that is reported, on test images.
    Methods are compared over the seeds that all of them have; the intervals hold 95 %. With one
    seed there are none.

    Returns the columns MACs removed, afterwards, use (of the highest chosen mean), top-1 %
    (reported), next best, ahead by (in points, reported, with its interval), not separated (methods
    whose interval against the first holds zero, and by how many points they are behind), seeds.
    """
    rows = []
    for reduction, runs in table.groupby("reduction"):
        for words, (choosing, reported) in afterwards.items():
            chosen, told = (
                runs.pivot_table(column, "seed", "method").dropna(axis=1, how="all").dropna()
                for column in (choosing, reported)
            )
            if chosen.empty:
                continue
            best, *others = order = chosen.mean().sort_values(ascending=False).index
            behind = told[order].rsub(told[best], axis=0)  # of each method, seed by seed
            points, reach = behind.mean(), behind.apply(half_width)
            close = [f"{m} ({points[m]:.1f})" for m in others if abs(points[m]) <= reach[m]]
            several = len(told) > 1
            lead = [f"{points[m]:.2f}" + f" ± {reach[m]:.2f}" * several for m in others[:1]]
            rows.append(
                {
                    "MACs removed": f"{reduction:.0%}",
                    "afterwards": words,
                    "use": best,
                    "top-1 %": round(told[best].mean(), 1),
                    "next best": ", ".join(others[:1]),
                    "ahead by": ", ".join(lead),
                    "not separated": ", ".join(close) if several else "not known: one seed",
                    "seeds": len(told),
                }
            )
    return pd.DataFrame(rows)


def half_width(differences: Sequence[float] | pd.Series) -> float:
    """Half the 95 % interval of a mean of n paired differences: t · s / √n, with Student's t and
    the standard deviation s over n - 1; infinite for one difference alone."""
    from scipy import stats

    n = len(differences)
    if n < 2:
        return math.inf
    return float(stats.t.ppf(0.975, n - 1) * pd.Series(differences).std() / math.sqrt(n))


def chance(top1: float, images: int) -> float:
    """By how many points two networks of about `top1` percent may differ by chance alone on so many
    `images`: twice the standard error of the difference, 2 · √(2 p (1 - p) / n)."""
    p = top1 / 100
    return 100 * 2 * math.sqrt(2 * p * (1 - p) / images)


def keep_reference(name: str, cfg: Config, lessons: list[str]) -> None:
    """Copy the finished stages of `cfg` to data/reference/<name>; of the weights only the ends.

    ValueError for a `name` that is no folder's, or whose folder holds a run with other settings.
    """
    needs_checkout("reference")
    if not name or UNFIT.search(name):
        raise ValueError(f"NAME {name!r}: expected the name of a folder, such as resnet56-mine")
    done = [found for lesson in lessons if (found := stage(lesson, cfg)).finished]
    if not done:
        raise FileNotFoundError(
            f"no lesson of this run is finished, {', '.join(lessons)}; "
            "run it first: python -m mslib run"
        )
    heavy = ["images", "imagenet", "*.onnx", "before.pt", "pruned*.pt", "penalty.pt", "model.pt"]
    target = tables() / "reference" / name
    _refuse_another_run(target, done)
    for found in done:
        lesson = found.lesson
        undrawn = ["gammas.pt"] if lesson > "05" else []  # no figure of these lessons shows them
        left_out = shutil.ignore_patterns(".*", "log.txt", "epoch-*.pt", *heavy, *undrawn)
        shutil.copytree(found.path, target / lesson, dirs_exist_ok=True, ignore=left_out)
        if lesson == "01_baseline":
            shutil.copy(found / "baseline" / "model.pt", target / lesson / "baseline")
    kept = reference(name)
    if {lesson for lesson in NEEDS if "01" <= lesson < "06"} <= kept.keys():
        from . import plots

        plots.result(kept, target / "result.png")


def _refuse_another_run(target: Path, stages: Iterable[Results]) -> None:
    """ValueError if a lesson in the folder `target` was run with other settings than `stages`."""
    now = {name: value for found in stages for name, value in found.settings.items()}
    for path in sorted(target.glob("*/metrics.json")):
        have = Results(path.parent.name, path.parent, {}).metrics["settings"]
        differ = [k for k in sorted(have.keys() & now.keys()) if have[k] != now[k]]
        if differ:
            told = ", ".join(f"{k}={have[k]!r} (now {now[k]!r})" for k in differ)
            raise ValueError(
                f"{path.parent} is of a run with other settings: {told}; "
                "choose another NAME, or remove that folder's"
            )
