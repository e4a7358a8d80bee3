"""The course's figures: one message each, said in its title.

The same method has the same colour everywhere. Every function draws in the course's style and
leaves the defaults of matplotlib as they are; `style` lends it to the lines of a lesson.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..data.tensors import Split
from ..networks import batch_norms
from ..pruning.groups import Group
from .stages import Results

Values = Mapping[str, Any]  # name of a curve or a panel -> its values

STYLE: Any = {
    **sns.axes_style("whitegrid"),
    **sns.plotting_context("notebook", font_scale=0.9),
    "font.family": "sans-serif",
    "axes.prop_cycle": plt.cycler(color=sns.color_palette("deep")),
    "patch.facecolor": "C0",
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.facecolor": "white",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
}

_palette = sns.color_palette("colorblind")
COLORS = {
    "baseline": "#555555",
    "dense": "#555555",
    "global": _palette[1],
    "masked": _palette[0],
    "network a": _palette[1],
    "network b": _palette[0],
    "from nothing": _palette[2],
    "proximal": _palette[4],
    "scratch": _palette[2],
    "published": "#111111",
    "kept": _palette[0],
    "dropped": _palette[3],
    "inner": _palette[0],  # channels of one block
    "shared": "#7b5ea7",  # channels that an addition ties together
    "one-shot": "#8b1a1a",
    "repair only": "#8b1a1a",  # lesson 05's one-shot
    "unprepared": "#8b1a1a",
    "constant": _palette[7],
    "greg-1": _palette[9],
    "greg-2": _palette[6],
    "random": _palette[7],
    "uniform": "#9a8700",  # the palette's yellow is too pale for a line
    "l1-norm": _palette[3],
    "flow's widths": _palette[3],
    "flow": _palette[4],
    "length + curvature": _palette[8],
    "length": _palette[2],
    "curvature": _palette[9],
    "trainability": "#1b7f5c",
    "asymptotic": "#c46a9e",
    "soft": "#a0522d",
    "incremental": "#5b6ee1",
    "shrinkage": "#d98200",
    "envelope": "#008b9e",
    "dependency": "#7a4fa3",
}


@contextmanager
def style() -> Iterator[None]:
    """The course's style for a block of lines: `with ms.plots.style(): …`."""
    with mpl.rc_context(STYLE):
        try:
            yield
        finally:
            interactive = mpl.is_interactive()
    mpl.interactive(
        interactive
    )  # a notebook's first figure turns it on: that must outlast the block


class Drawing(Figure):
    """A figure that is drawn in the course's style, whenever that is."""

    def draw(self, renderer: Any) -> None:
        with style():
            super().draw(renderer)

    def get_tightbbox(self, *args: Any, **kwargs: Any) -> Any:
        with style():
            return super().get_tightbbox(*args, **kwargs)


def _with_text(figure: Drawing) -> tuple[bytes, dict[str, str]]:
    """The picture as a notebook shows it, and the words for those who do not see it."""
    from IPython.core.pylabtools import print_figure

    return print_figure(figure), {"alt": figure.get_suptitle()}


def slider(
    draw: Callable[[Any], Any], values: Sequence[Any], label: str, start: Any = None
) -> None:
    """The figure that `draw(value)` makes, under a slider over `values` called `label`.

    Where nobody watches, the figure of `start` alone (default: in the middle): a slider is alive in
    a session of JupyterLab or the like, and in Colab, and not in a batch run.
    """
    start = values[len(values) // 2] if start is None else start
    # a server names the session in the kernels that it starts; papermill and nbval do not
    watched = "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules
    if not watched or "MSLIB_BATCH" in os.environ:
        draw(start)
        return
    from ipywidgets import SelectionSlider, interact

    options = [(value if isinstance(value, str) else f"{value:g}", value) for value in values]
    chosen = SelectionSlider(
        options=options, value=start, description=label, continuous_update=False
    )
    interact(draw, **{next(iter(inspect.signature(draw).parameters)): chosen})


def color(name: str) -> Any:
    """The colour of the method that `name` mentions; None, the next of the cycle, without one."""
    return next((c for key, c in COLORS.items() if key in name.lower()), None)


@style()
def figure(
    title: str,
    width: float = 8.0,
    height: float = 3.4,
    columns: int = 1,
    rows: int = 1,
    **kwargs: Any,
) -> tuple[Figure, Any]:
    """A figure of rows × columns axes and the message `title`; returns (figure, axes)."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        shell.display_formatter.formatters["image/png"].for_type(Drawing, _with_text)
    looks: dict[str, Any] = dict(layout="constrained", FigureClass=Drawing, **kwargs)
    fig, axes = plt.subplots(rows, columns, figsize=(width, height), **looks)
    fig.suptitle(title, fontsize=12, fontweight="bold")
    return fig, axes


@style()
def images(split: Split, classes: Sequence[str], title: str, each: int = 8) -> None:
    """`each` images of every class, a column a class."""
    rows = [split.images[split.labels == c] for c in range(min(10, len(classes)))]
    each, (h, w) = min(each, *map(len, rows)), split.images.shape[2:]
    rows = [found[:each] for found in rows]
    fig, axes = figure(title, 8, 0.62 * each + 0.7)
    grid = torch.stack(rows).permute(1, 3, 0, 4, 2).reshape(each * h, len(rows) * w, 3)
    axes.imshow(grid, interpolation="nearest")
    axes.set_xticks(np.arange(len(rows)) * w + w / 2 - 0.5, list(classes)[: len(rows)], rotation=30)
    axes.set_yticks([])
    axes.grid(False)


@style()
def curves(
    histories: Mapping[str, pd.DataFrame],
    title: str,
    columns: Sequence[str] = ("loss", "val_top1"),
) -> Axes:
    """Training histories of `fit` over epochs, by name; returns the last axes."""
    labels = {
        "loss": "training loss (cross-entropy)",
        "val_top1": "held-out top-1 (%)",
        "lr": "learning rate",
        "penalty": "penalty (added to the loss)",
        "gamma_below": "share of |γ| < 0.01",
        "gamma_median": "median |γ|",
    }
    _, axes = figure(title, columns=len(columns))
    for ax, column in zip(np.atleast_1d(axes), columns):
        for name, frame in histories.items():
            ax.plot(frame.epoch, frame[column], "o-", ms=3, color=color(name), label=name)
        ax.set(xlabel="epoch", ylabel=labels[column])
        ax.xaxis.get_major_locator().set_params(integer=True)
    if len(histories) > 1:
        ax.legend()
    return ax


def keep_flags(model: nn.Module, masks: Mapping[str, Tensor]) -> np.ndarray:
    """For every BatchNorm channel, in the network's order: 1 kept, 0 dropped, nan not in `masks`.

    Returns float [channels], as `Results.gammas` has them.
    """
    norms = batch_norms(model)
    return np.concatenate(
        [
            masks[n].float().numpy() if n in masks else np.full(m.num_features, np.nan)
            for n, m in norms
        ]
    )


@style()
def gamma_histograms(
    panels: Values,
    title: str,
    flags: np.ndarray | Mapping[str, np.ndarray],
    threshold: float | None = None,
    axes: Any = None,
    log: bool = False,
) -> None:
    """|γ| of the maskable channels, dropped on top of kept; the `threshold` in every panel.

    `panels`: name -> |γ|, float [channels]. `flags`: of `keep_flags`, one for all panels or one
    for each name. `log`: a logarithmic axis; what lies below 1e-4 stands in its first bar.
    """
    if axes is None:
        _, axes = figure(title, columns=len(panels), sharey=True)
    flags = flags if isinstance(flags, Mapping) else dict.fromkeys(panels, flags)
    values = {name: np.asarray(g, dtype=float) for name, g in panels.items()}
    top: float = max(np.nanmax(v[~np.isnan(flags[name])]) for name, v in values.items())
    bins = np.geomspace(1e-4, 1.1 * top, 26) if log else np.linspace(0, top, 50)
    kinds = {"kept": 1, "dropped": 0}
    shown = [kind for kind, flag in kinds.items() if any((f == flag).any() for f in flags.values())]
    for ax, (name, gamma) in zip(np.atleast_1d(axes), values.items()):
        ax.hist(
            [np.maximum(gamma[flags[name] == kinds[kind]], bins[0]) for kind in shown],
            bins=bins,
            stacked=True,
            color=[COLORS[kind if len(shown) > 1 else "baseline"] for kind in shown],
            label=shown,
        )
        ax.set(title=name, xlabel="|γ|", xscale="log" if log else "linear")
        if log:
            ax.set_xticks([bins[0] * 1.2, 1e-3, 1e-2, 1e-1, 1], ["0", ".001", ".01", ".1", "1"])
            ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        if threshold:
            ax.axvline(threshold, color="black", ls="--", lw=1, label=f"|γ| = {threshold:.2g}")
    np.atleast_1d(axes)[0].set_ylabel("channels")
    if len(shown) > 1:
        np.atleast_1d(axes)[0 if log else -1].legend(loc="upper left" if log else "upper right")


@style()
def gamma_paths(panels: Values, title: str, flags: np.ndarray) -> None:
    """Median and 5–95 % band of |γ| after each epoch, kept and dropped apart.

    `panels`: name -> snapshots, float [epochs + 1, channels]. `flags`: of `keep_flags`.
    """
    _, axes = figure(title, columns=len(panels), sharey=True)
    for ax, (name, snapshots) in zip(np.atleast_1d(axes), panels.items()):
        gamma = np.asarray(snapshots, dtype=float)
        for flag, label in ((1, "kept"), (0, "dropped")):
            low, middle, high = np.quantile(gamma[:, flags == flag], [0.05, 0.5, 0.95], axis=1)
            ax.plot(middle, "o-", ms=3, color=COLORS[label], label=f"{label}: median")
            band: Any = dict(color=COLORS[label], alpha=0.2, lw=0, label="90 % of the channels")
            ax.fill_between(range(len(middle)), low, high, **band)
        ax.set(title=name, xlabel="epochs with the penalty")
        ax.xaxis.get_major_locator().set_params(integer=True)
    np.atleast_1d(axes)[0].set_ylabel("|γ|")
    handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
    np.atleast_1d(axes)[0].figure.legend(
        handles, labels, loc="outside lower center", ncols=4, fontsize=9
    )


@style()
def prices(points: Mapping[str, tuple[float, float]], baseline: float, title: str) -> Axes:
    """What a method pays: top-1 before the cut (upward) and the points lost at it (to the right).

    `points`: name of a method, or of a λ of the global one -> top-1 before the cut and after it,
    percent. `baseline`: top-1, the goal's height. The axis of the lost points is linear up to 1
    and logarithmic beyond.
    """
    _, ax = figure(title, height=3.8)
    ax.axhline(baseline, color=COLORS["baseline"], ls="--", lw=1)
    ax.plot(0, baseline, "*", ms=17, mec=COLORS["baseline"], mfc="none", mew=1.5)
    where: Any = dict(textcoords="offset points", va="center", fontsize=9)
    ax.annotate("what we want", (0, baseline), xytext=(11, 9), **where)
    ax.annotate("baseline", (10, baseline), xytext=(0, 7), ha="center", **where)
    spots = [(np.log1p(max(b - a, 0)), b) for b, a in points.values()]
    close = (max(baseline, *(b for _, b in spots)) - min(b for _, b in spots)) / 8
    for name, (before, after) in points.items():
        lost, ink = max(before - after, 0), color(name) or COLORS["global"]
        ax.plot(lost, before, "o", ms=9, color=ink)
        below = [x for x, b in spots if 0 < before - b < close]
        up = before > baseline or any(abs(x - np.log1p(lost)) < 0.7 for x in below)
        right = lost > 30  # a label to the left of its dot stays inside the frame
        looks: Any = dict(color=ink, fontweight="bold", ha="right" if right else "left")
        place = (-9 if right else 9, 9 if up else -9)  # away from a dot just below
        ax.annotate(name, (lost, before), xytext=place, **where, **looks)
    ax.set_xscale("symlog", linthresh=1)
    ticks = (0, 1, 3, 10, 30, 100)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set(
        xlim=(-0.2, 120), xlabel="points lost from before the cut to folded (logarithmic from 1 on)"
    )
    ax.set_ylabel("held-out top-1 before the cut (%)")
    ax.margins(y=0.2)
    return ax


@style()
def kept_shares(panels: Values, title: str, floor: float = 0.0) -> None:
    """The share of its channels that each block keeps, a bar a block, and the mean of each stage.

    `panels`: name of a panel -> masks of a ResNet, by names such as stage1.0.bn1. `floor`: the
    least share, as a line.
    """
    _, axes = figure(title, 10, 3.4, columns=len(panels), sharey=True)
    for ax, (name, masks) in zip(np.atleast_1d(axes), panels.items()):
        shares = np.array([100 * float(keep.float().mean()) for keep in masks.values()])
        stages = np.array([norm.split(".")[0] for norm in masks])
        ax.bar(range(len(shares)), shares, color=color(name) or COLORS["kept"], alpha=0.75)
        starts = [int(np.argmax(stages == stage)) for stage in dict.fromkeys(stages)]
        for start, end in zip(starts, [*starts[1:], len(shares)]):
            mean = shares[start:end].mean()
            ax.plot([start - 0.4, end - 0.6], [mean, mean], color=COLORS["published"], lw=2)
            place: Any = dict(ha="center", va="bottom", fontsize=10, fontweight="bold")
            place["bbox"] = dict(fc="white", ec="none", pad=0.8, alpha=0.8)
            ax.text((start + end - 1) / 2, mean + 3, f"{mean:.0f} %", **place)
        if floor:
            ax.axhline(100 * floor, color="black", ls=":", lw=1)
        middles = np.add(starts, [*starts[1:], len(shares)]) / 2 - 0.5
        ax.set_xticks(middles, [stages[start].replace("stage", "stage ") for start in starts])
        ax.grid(visible=False, axis="x")
        ax.set(title=name, ylim=(0, 115), yticks=range(0, 101, 25))
    np.atleast_1d(axes)[0].set_ylabel("channels kept (%)")


@style()
def block_profiles(
    panels: Mapping[str, Values], blocks: Sequence[str], title: str, outside: str = ""
) -> list[Axes]:
    """Bars over the blocks, panels below one another on one axis; returns the axes.

    `panels`: label of the y axis -> name of a network -> its values, one a block, nan where there
    is none: there `outside` says why.
    """
    fig, whole = figure(title, 8, 1.2 + 2 * len(panels))
    whole.remove()
    axes = np.atleast_1d(fig.subplots(len(panels), 1, sharex=True))
    x = np.arange(len(blocks))
    for ax, (label, values) in zip(axes, panels.items()):
        wide = 0.8 / len(values)
        for i, (name, heights) in enumerate(values.items()):
            ax.bar(x + (i + 0.5) * wide - 0.4, heights, wide, color=color(name), label=name)
        for block in np.flatnonzero(np.isnan(np.asarray(heights, dtype=float))):
            ax.axvspan(block - 0.5, block + 0.5, color="#eeeeee", zorder=0)
            middle: Any = dict(rotation=90, ha="center", va="center", fontsize=8)
            ax.text(block, 0.5, outside, transform=ax.get_xaxis_transform(), **middle)
        ax.set_ylabel(label)
        ax.grid(visible=False, axis="x")
    axes[0].legend()
    axes[-1].set_xticks(x, blocks, rotation=90, fontsize=8)
    axes[-1].set(xlabel="stage.block, input to output", xlim=(-0.6, len(blocks) - 0.4))
    return [*axes]


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Where labels of these heights may stand: in the same order, at least `gap` from each other,
    and on average where they belong."""
    order, placed = np.argsort(heights), np.array(heights, dtype=float)
    for below, above in zip(order, order[1:]):
        placed[above] = max(placed[above], placed[below] + gap)
    return (placed - placed.mean() + np.mean(heights)).tolist()


@style()
def stations(
    paths: Values,
    names: Sequence[str],
    title: str,
    unit: str,
    ax: Axes | None = None,
    at: int = -1,
    limits: tuple[float, float] | None = None,
) -> Axes:
    """How values go from station to station, a line each, labelled with its value at one end.

    `paths`: name of a line -> its values at the stations called `names`; nan where there is none.
    In a figure of its own, or in `ax`. `at`: the end with the labels, 0 or -1. `limits`: of the
    vertical axis, or as the values ask.
    """
    if ax is None:
        _, ax = figure(title, height=3.8)
    last = len(names) - 1
    lines = {name: np.asarray(path, dtype=float) for name, path in paths.items()}
    ends = [(line[at], name) for name, line in lines.items()]
    span = float(np.nanmax([*lines.values()]) - np.nanmin([*lines.values()]))
    span = limits[1] - limits[0] if limits else span
    heights = apart([end for end, _ in ends], span / 14)
    for height, (end, name) in zip(heights, ends):
        ink = ax.plot(lines[name], "o-", color=color(name), ms=5)[0].get_color()
        place: Any = dict(color=ink, va="center", fontsize=9, fontweight="bold")
        place["bbox"] = dict(fc="white", ec="none", pad=0.5)  # over the grid
        place["ha"] = "left" if at else "right"
        ax.plot([last, last + 0.08] if at else [0, -0.08], [end, height], color=ink, lw=0.8)
        ax.text(last + 0.1 if at else -0.1, height, f"{name}  {end:.1f}", **place)
    ax.set_ylim(top=max(ax.get_ylim()[1], max(heights) + span / 12))
    ax.set_ylim(bottom=min(ax.get_ylim()[0], min(heights) - span / 12))
    ax.set_ylim(limits)
    ax.set_xticks(range(len(names)), list(names))
    wide = max(0.75, 0.05 * max(map(len, lines)) + 0.2)  # room for the longest label
    wide *= max(1, len(names) / 4)
    ax.set(ylabel=unit, xlim=(-0.15, last + wide) if at else (-0.9, last + 0.25))
    return ax


@style()
def kept_groups(groups: Sequence[Group], cuts: Values, title: str, floor: float = 0.0) -> None:
    """The share of its channels that each group keeps, a panel a cut; shared groups stand out.

    groups: of `ms.channel_groups`. cuts: name -> masks. `floor`: the least share, as a line.
    """
    held = set.union(*(set(masks) for masks in cuts.values()))
    found = [g for g in groups if held.intersection(g.norms)]
    first = [next(n for n in g.norms if n in held) for g in found]
    more = [f" + {len(g.norms) - 1} more" if len(g.norms) > 1 else "" for g in found]
    inks = [COLORS["shared" if len(g.norms) > 1 else "inner"] for g in found]
    columns = len(cuts)
    _, axes = figure(title, 9, 0.25 * len(found) + 1.4, columns=columns, sharey=True, sharex=True)
    for ax, (name, masks) in zip(np.atleast_1d(axes), cuts.items()):
        shares = [100 * float(masks[norm].float().mean()) for norm in first]
        ax.barh(range(len(found)), shares, color=inks)
        if floor:
            ax.axvline(100 * floor, color="black", ls=":", lw=1)
        ax.grid(visible=False, axis="y")
        ax.set(title=name, xlabel="channels kept (%)", xlim=(0, 100))
    left = np.atleast_1d(axes)[0]
    for kind, words in (("shared", "several layers"), ("inner", "one layer")):
        if COLORS[kind] in inks:
            spot: Any = dict(color="white", fontsize=8, va="center", fontweight="bold")
            left.text(100 * floor + 3, inks.index(COLORS[kind]), words, **spot)
    left.set_yticks(range(len(found)), [n + m for n, m in zip(first, more)], fontsize=9)
    for label, ink in zip(left.get_yticklabels(), inks):
        label.set_color(ink)
    left.invert_yaxis()


@style()
def lines(
    x: Any,
    ys: Values,
    title: str,
    xlabel: str,
    ylabel: str,
    xticks: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """Simple curves `ys` (name -> values), in their own figure or in `ax`; returns the axes."""
    if ax is None:
        _, ax = figure(title)
    for name, y in ys.items():
        ax.plot(x, y, "o-" if len(x) < 40 else "-", ms=3, label=name, color=color(name))
    if xticks is not None:
        ax.set_xticks(x, xticks, rotation=90, fontsize=7)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if len(ys) > 1:
        ax.legend()
    return ax


@style()
def result(stages: Mapping[str, Results], path: str | Path) -> None:
    """The course in one picture, written to `path`.

    Top-1 before the cut and after it, under both penalties; after fine-tuning, beside the dense
    network that was trained on and the small one trained from scratch.
    """
    sparse, masked, pruned, last = (stages[n] for n in stages if n[:2] in ("02", "03", "04", "05"))
    paths = {
        name: [found.top1(f"{name}: before the cut"), pruned.top1(f"{name}: after the cut, folded")]
        for name, found in {"global": sparse, "masked": masked}.items()
    }
    ends = {name: last.top1(f"{name}: fine-tuned") for name in paths}
    ends["scratch"] = last.top1("scratch: same architecture")
    ends["dense"] = last.top1("dense, trained on as long")
    lost = {name: before - after for name, (before, after) in paths.items()}
    title = f"The same cut costs the masked network {lost['masked']:.1f} points of top-1, "
    title += f"and the global one {lost['global']:.0f}"
    ratios = dict(width_ratios=[5, 4])
    fig, (cut, tuned) = figure(title, 10, 4, columns=2, gridspec_kw=ratios)
    names = ("before the cut", "after it")
    stations(paths, names, "", "test top-1 (%)", cut)
    cut.set(title="the cut", xlim=(-0.15, 1.6))
    for y, name in enumerate(sorted(ends, key=lambda name: ends[name])):
        tuned.plot(ends[name], y, "o", ms=9, color=color(name))
        tuned.annotate(f"{ends[name]:.1f}", (ends[name], y), (0, 9), textcoords="offset points")
    words = {"dense": "dense: uncut", "scratch": "scratch: same\nwidths, new weights"}
    order = [words.get(name, name) for name in sorted(ends, key=lambda name: ends[name])]
    tuned.set_yticks(range(len(ends)), order, fontsize=11)
    tuned.set(title="after fine-tuning (zoomed)", xlabel="test top-1 (%)", ylim=(-0.5, 3.7))
    tuned.margins(x=0.25)
    fig.savefig(path)
    plt.close(fig)


@style()
def filter_sizes(
    runs: Mapping[str, tuple[Sequence[int], Tensor]], flags: Tensor, step: int, title: str
) -> Axes:
    """Filters over trainings, each as a share of its first size; returns the right axes.

    Left: median and 5–95 % band of the dropped filters of each run, and the median of the kept.
    Right: every filter at `step`. `runs`: name -> steps, and the sizes at each,
    [steps, filters]. `flags`: True for kept, [filters].
    """
    ratios = dict(width_ratios=[3, 2])
    _, (left, right) = figure(title, 10, 3.8, columns=2, sharey=True, gridspec_kw=ratios)
    ends = {name: sizes / sizes[:1] for name, (_, sizes) in runs.items()}
    shares = {name: share.float().clamp(min=1e-6).numpy() for name, share in ends.items()}
    keep, columns = flags.cpu().numpy(), {}
    for name, (when, _) in runs.items():
        steps, gone, ink = np.asarray(when), shares[name][:, ~keep], color(name)
        low, middle, high = np.quantile(gone, [0.05, 0.5, 0.95], axis=1)
        left.plot(steps, middle, color=ink, lw=2, label=f"{name}: dropped filters")
        left.fill_between(steps, low, high, color=ink, alpha=0.2, lw=0)
        now = int(np.abs(steps - step).argmin())
        columns[f"{name}:\ndropped"] = gone[now], ink
    stayed = [*shares.values()][-1][:, keep]  # of the last run
    left.plot(steps, np.median(stayed, axis=1), color=COLORS["kept"], lw=2)
    columns["kept"] = stayed[now], COLORS["kept"]
    for x, (found, ink) in enumerate(columns.values()):
        aside = x + 0.35 * np.sin(np.arange(len(found)))  # so that dots do not hide each other
        right.plot(aside, found, ".", ms=5, color=ink, alpha=0.6)
    right.set_xticks(range(len(columns)), columns)
    right.grid(visible=False, axis="x")
    left.annotate(
        "kept filters",
        (steps[-1], 1),
        (0, 6),
        textcoords="offset points",
        ha="right",
        color=COLORS["kept"],
    )
    left.axvline(step, color="0.3", ls=":")
    left.legend(loc="upper right", bbox_to_anchor=(1, 0.82))
    left.set(yscale="log", ylim=(None, 3), xlabel="step (shaded: 90 % of the dropped filters)")
    left.set_ylabel("mean |W| of a filter, start = 1 (line: median)")
    right.set(xlabel="every filter, at the dotted line", title=f"at step {step}")
    return right


@style()
def published(ax: Axes, value: float, text: str) -> None:
    """Mark a published top-1 (percent) by a dotted line."""
    ax.axhline(value, color=COLORS["published"], ls=":")
    where: dict[str, Any] = dict(
        xycoords=("axes fraction", "data"),
        xytext=(3, -2),
        textcoords="offset points",
        va="top",
        fontsize=8,
    )
    ax.annotate(
        f"published: {text} {value:g}",
        (0, value),
        bbox=dict(fc="white", ec="none", pad=0.5),
        **where,
    )


@style()
def levers(
    panels: Mapping[str, tuple[Tensor, Tensor, Tensor]], title: str, columns: int = 5
) -> np.ndarray:
    """Every filter as a dot, a panel a penalty: its norm to the right, the γ behind it upward.

    panels: name -> norms and |γ|, both as multiples of what they were, float [filters], and
        whether a filter is kept, bool [filters]. What is below 1e-4 stands on the edge.
    Returns the axes, [rows, columns].
    """
    rows = -(-len(panels) // columns)
    alike = dict(sharex=True, sharey=True, squeeze=False)
    fig, axes = figure(title, 11, 0.9 + 2.1 * rows, columns, rows, **alike)
    for ax, (name, (norms, gammas, kept)) in zip(axes.flat, panels.items()):
        x, y = (np.maximum(values.cpu().numpy(), 1e-4) for values in (norms, gammas))
        for word, flag in (("kept", True), ("dropped", False)):  # what goes lies on top
            chosen = kept.cpu().numpy() == flag
            looks: Any = dict(s=22, alpha=0.5, lw=0, marker="o" if flag else "X", clip_on=False)
            ax.scatter(x[chosen], y[chosen], color=COLORS[word], zorder=3, **looks)
            if ax is axes[0, 0]:
                spot = (np.median(x[chosen]) / 2, np.median(y[chosen]))
                ax.text(*spot, word, color=COLORS[word], ha="right", va="bottom", weight="bold")
        ax.set_title(name)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    ticks, words = [1e-4, 1e-2, 1, 1e2], ["0", "0.01", "1", "100"]
    looks = dict(xscale="log", yscale="log", xlim=(7e-5, 1e3), ylim=(7e-5, 5))
    axes[0, 0].set(**looks, xticks=ticks, xticklabels=words)
    axes[0, 0].set_yticks(ticks[:3], words[:3])
    axes[0, 0].minorticks_off()
    fig.supxlabel("norm of the filter, as a multiple of what it was", fontsize=9)
    fig.supylabel("|γ|, as a multiple of what it was", fontsize=9)
    return axes
