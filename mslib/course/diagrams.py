"""The course's diagrams, drawn by code: what a lesson wants looked at rather than read.

Each is a card with a white ground and dark ink, legible on light and on dark pages.
"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

from .plots import COLORS, figure, style

Point = tuple[float, float]  # x, y, in inches

INK, QUIET = "#222222", "#777777"
FILLS = {  # of a box: the question that its lesson answers
    "which widths?": "#cfe3f5",
    "which weights?": "#d5ecd4",
    "how to cut\nwithout damage?": "#fbdcc0",
    "all three": "#e4e0f0",
    "": "#eeeeee",
}


def _card(title: str, width: float, height: float) -> Axes:
    """Empty axes under `title`, in inches from the lower left."""
    _, ax = figure(title, width, height)
    ax.set(xlim=(0, width), ylim=(0, height - 0.4), aspect="equal")
    ax.axis("off")
    return ax


def _box(ax: Axes, x: float, y: float, w: float, h: float, fill: Any, edge: str = INK) -> None:
    """A rounded box whose lower left corner is at (x, y)."""
    looks: Any = dict(boxstyle="round,pad=0,rounding_size=0.06", fc=fill, ec=edge, lw=1)
    ax.add_patch(FancyBboxPatch((x, y), w, h, **looks))


def _text(ax: Axes, x: float, y: float, text: str, size: float = 9, **looks: Any) -> None:
    """Centred text."""
    usual: dict[str, Any] = {"ha": "center", "va": "center", "color": INK, "fontsize": size}
    ax.text(x, y, text, **usual | looks)


def _arrow(ax: Axes, start: Point, end: Point, ink: Any = INK, **looks: Any) -> None:
    """An arrow from `start` to `end`."""
    usual: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 11, "lw": 1.2, "color": ink}
    ax.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **usual | looks))


@style()
def pipeline() -> None:
    """The map of the course: which lesson answers which question, and what it hands on."""
    ax = _card("Three questions lead through the course; a colour is a question", 10, 4)
    widths, weights, damage, every, none = FILLS
    line = [
        ("01", "Baseline", none, "trained\nnetwork"),
        ("02", "Global\nsparsity", widths, "mask:\nchannels\nto keep"),
        ("03", "Masked\nregularization", damage, "dropped\nchannels\nat zero"),
        ("04", "Pruning", damage, "small\nnetwork"),
        ("05", "Fine-tuning", weights, ""),
    ]
    more = [
        ("06", "Growing\nregularization", damage),
        ("07", "Feature\nflow", widths),
        ("08", "A fair\ncomparison", every),
        ("09", "Your own\nnetwork", every),
        ("10, 11", "The family,\nand your own", every),
        ("12", "Which\nmethod?", every),
    ]
    for i, (number, name, question, handed) in enumerate(line):
        x = 0.1 + 2.11 * i
        _lesson(ax, x, 2.0, number, name, question)
        if handed:
            _arrow(ax, (x + 1.34, 2.62), (x + 2.09, 2.62))
            _text(ax, x + 1.72, 3.0, handed, 7.5, color=QUIET)
    for i, (number, name, question) in enumerate(more):
        x = 0.1 + 1.688 * i
        _lesson(ax, x, 0.1, number, name, question)
        if i < 2:  # both start again from the trained network
            ax.plot([x + 0.66] * 2, [1.37, 1.66], color=QUIET, lw=1.2)
            _arrow(ax, (x + 0.66, 1.5), (x + 0.66, 1.36), QUIET)
        else:
            word = ("all ways compared", "the recipe", "their relatives", "the answer")[i - 2]
            _text(ax, x + 0.66, 1.5, word, 7.5, color=QUIET)
    ax.plot([0.76, 0.76, 2.448], [1.98, 1.66, 1.66], color=QUIET, lw=1.2)
    _text(ax, 2.05, 1.79, "two other ways, from the same trained network", 7.5, color=QUIET)


def _lesson(ax: Axes, x: float, y: float, number: str, name: str, question: str) -> None:
    """The box of one lesson: number and name, below them the question that it answers."""
    _box(ax, x, y, 1.32, 1.25, FILLS[question])
    _text(ax, x + 0.66, y + 1.08, number, 8, color=QUIET)
    _text(ax, x + 0.66, y + 0.75, name, 9.5, fontweight="bold")
    _text(ax, x + 0.66, y + 0.25, question or "the start", 8, style="italic")


@style()
def block() -> None:
    """A residual block: where one inner channel runs, and what is removed with it."""
    title = "One inner channel: a filter, a row of the BatchNorm, and an input of the next filters"
    ax, gone = _card(title, 10, 4), COLORS["dropped"]
    parts = [  # head, left side, width, what a channel has there, what of it is removed
        ("convolution 1", 1.0, 1.3, "filter {}", "one filter"),
        (
            "BatchNorm",
            3.1,
            1.5,
            "$\\gamma_{}\\,\\hat{{z}}_{} + \\beta_{}$",
            "one γ, β, mean, variance",
        ),
        ("convolution 2", 6.3, 1.3, "input {}", "one input of every filter"),
    ]
    for head, x, w, inside, removed in parts:
        _box(ax, x - 0.12, 0.5, w + 0.24, 2.28, "#f4f4f4", QUIET)
        _text(ax, x + w / 2, 2.95, head, 9.5, fontweight="bold")
        _text(ax, x + w / 2, 0.28, removed, 8.5, color=gone)
        for k in range(1, 6):
            ink, fill = (gone, "#f7d9c4") if k == 5 else (QUIET, "#dfe8f1")
            _box(ax, x, 2.68 - 0.43 * k + 0.03, w, 0.34, fill, ink)
            _text(ax, x + w / 2, 2.88 - 0.43 * k, inside.format(k, k, k), 8.5)
    _text(ax, 5.37, 2.95, "ReLU", 9.5, fontweight="bold")
    for k in range(1, 6):
        y, ink = 2.88 - 0.43 * k, gone if k == 5 else QUIET
        for start, end in ((2.3, 3.1), (4.6, 5.1), (5.62, 6.3)):
            _arrow(ax, (start, y), (end, y), ink, ls="--" if k == 5 else "-")
        ax.plot([5.12, 5.36, 5.6], [y - 0.1, y - 0.1, y + 0.12], color=ink, lw=1.6)
    _text(ax, 0.3, 1.6, "$x$", 12)
    _text(ax, 9.3, 1.6, "+", 15)
    _box(ax, 8.1, 1.33, 0.8, 0.54, "#f4f4f4", QUIET)
    _text(ax, 8.5, 1.6, "Batch-\nNorm", 8)
    for start, end in ((0.45, 0.88), (7.72, 8.1), (8.9, 9.18), (9.45, 9.95)):
        _arrow(ax, (start, 1.6), (end, 1.6))
    _text(ax, 9.72, 1.78, "ReLU", 8)
    ax.plot([0.3, 0.3, 9.3], [1.78, 3.3, 3.3], color=QUIET, lw=1.2)
    _arrow(ax, (9.3, 3.3), (9.3, 1.75), QUIET)
    _text(ax, 8.5, 0.62, "dashed, orange:\ngoes with the channel", 8, color=gone)
    words = "shortcut: the residual channels, shared by all blocks of one image size"
    _text(ax, 4.8, 3.45, words, 8.5, color=QUIET)


# ---- 04 · pruning ------------------------------------------------------------------------------

SHARED, INNER = COLORS["shared"], COLORS["inner"]  # channels of a stage, of one block
CONSTANT = COLORS["dropped"]


def _node(ax: Axes, x: float, y: float, text: str, fill: Any = "white", width: float = 1.6) -> None:
    """A layer: a box with its centre at (x, y)."""
    round_corners = "round,pad=0,rounding_size=0.15"
    looks: Any = dict(fc=fill, ec=INK, lw=1, zorder=4)
    ax.add_patch(FancyBboxPatch((x - width / 2, y - 0.5), width, 1.0, round_corners, **looks))
    _text(ax, x, y, text, 8.5, color=INK if fill == "white" else "white", zorder=5)


def _strands(ax: Axes, way: list[Point], ink: Any, dropped: int = -1) -> None:
    """Four channels side by side along a way of corners; the one numbered `dropped` dashed."""
    corners = np.array(way, dtype=float)  # [corners, 2]
    steps = np.diff(corners, axis=0)
    steps /= np.linalg.norm(steps, axis=1, keepdims=True)
    aside = np.stack([-steps[:, 1], steps[:, 0]], axis=1)  # the normal of each stretch
    # at a right angle the sum of both normals leads to the shifted corner
    turns = [aside[0], *(one + two for one, two in zip(aside, aside[1:])), aside[-1]]
    for strand in range(4):
        x, y = (corners + 0.19 * (1.5 - strand) * np.array(turns)).T
        dashed: Any = dict(ls=(0, (1.3, 1.3))) if strand == dropped else {}
        ax.plot(x, y, color=ink, lw=2, solid_capstyle="butt", zorder=2, **dashed)


@style()
def shared_channels() -> None:
    """A stage of two residual blocks: which channels the additions tie together, which are free."""
    title = "Additions tie the channels of a stage together; inner channels stand alone"
    ax = _card(title, 10.5, 3.4)
    ax.set(xlim=(0, 31.2), ylim=(0, 8.2))
    low, high = 2.0, 5.3  # the residual stream; the branches of the blocks
    where: Any = dict(ha="center", fontsize=9.5, weight="bold")
    _strands(ax, [(1, low), (27.2, low)], SHARED)
    _arrow(ax, (27.2, low), (28.2, low), SHARED, mutation_scale=22)
    _node(ax, 1.1, low, "conv")
    _node(ax, 3.4, low, "bn", SHARED)
    ax.text(
        29.8, low, "to the first\nlayer of the\nnext stage", **where | dict(fontsize=8, va="center")
    )
    for number, left in enumerate((5.2, 16.2)):
        conv1, bn1, conv2, bn2 = (left + step for step in (1.5, 4.0, 6.5, 8.2))
        plus = left + 9.7
        _strands(ax, [(left, low + 0.4), (left, high), (conv1, high)], SHARED)
        for shift in (-0.285, -0.095, 0.095, 0.285):  # each strand leaves its own line
            ax.plot([left - shift] * 2, [low + shift, low + 0.4], color=SHARED, lw=2)
            ax.plot(left - shift, low + shift, "o", ms=4, color=SHARED)
        _strands(ax, [(conv1, high), (conv2, high)], INNER, dropped=number + 1)
        _strands(ax, [(conv2, high), (plus, high), (plus, low)], SHARED)
        _node(ax, conv1, high, f"{number}.conv1")
        _node(ax, bn1, high, f"{number}.bn1", INNER)
        _node(ax, conv2, high, f"{number}.conv2", width=1.6)
        _node(ax, bn2, high, f"{number}.bn2", SHARED)
        ax.add_patch(Circle((plus, low), 0.55, fc="white", ec=INK, zorder=4))
        ax.text(plus, low, "+", ha="center", va="center", fontsize=14, color=INK, zorder=5)
        ax.text(bn1, high + 1.5, "inner channels", color=INNER, **where)
        ax.text(bn1, high + 0.8, "the dashed one may go alone", ha="center", fontsize=9, color=INK)
    words = "shared channels: they go from bn, 0.bn2 and 1.bn2, or from none"
    ax.text(13.5, 0.6, words, color=SHARED, **where)


def _map(ax: Axes, x: float, y: float, pattern: np.ndarray, edge: Any = INK) -> None:
    """One channel as a small picture with its centre at (x, y)."""
    left, right, low, high = extent = (x - 0.6, x + 0.6, y - 0.6, y + 0.6)
    ax.imshow(pattern, cmap="Greys", vmin=0, vmax=1.6, extent=extent, zorder=3)
    frame: Any = dict(color=edge, lw=1 if edge == INK else 2, zorder=4)
    ax.plot([left, right, right, left, left], [low, low, high, high, low], **frame)


@style()
def folding() -> None:
    """Where the constant goes that a dropped channel still sends into the next convolution."""
    ax = _card("Folding moves the constant of a dropped channel into the next BatchNorm", 9.5, 3.5)
    ax.set(xlim=(0, 21), ylim=(0, 7.6))
    pixels = np.arange(36).reshape(6, 6)
    patterns = [pixels * 3 % 7 / 6, pixels * 5 % 4 / 3]
    where: Any = dict(fontsize=9, color=INK, va="center")
    for left, heading in ((0.2, "before the cut"), (11.4, "cut and folded")):
        ax.text(left + 0.4, 7.1, heading, fontsize=10.5, weight="bold", color=INK)
        for y, pattern in zip((5.8, 4.2), patterns):
            _map(ax, left + 1, y, pattern)
            _arrow(ax, (left + 1.7, y), (left + 3.1, 4.2 + (y - 4.2) * 0.2))
        _node(ax, left + 3.9, 4.2, "conv2", width=1.5)
        _arrow(ax, (left + 4.7, 4.2), (left + 6.1, 4.2))
        ax.text(left + 7.6, 5.2, "bn2 subtracts its mean", **where | dict(ha="center"))
    for x, word in ((5.6, "z"), (16.8, "z − c")):
        ax.text(x, 4.55, word, **where | dict(ha="center"))
    _node(ax, 7.8, 4.2, "z − μ", width=2.9)
    _node(ax, 19.3, 4.2, "(z − c) − (μ − c)", CONSTANT, width=3.3)
    _map(ax, 1.2, 2.0, np.full((6, 6), 0.5), CONSTANT)
    _arrow(ax, (1.9, 2.0), (3.5, 3.65), CONSTANT, lw=2)
    ax.text(4.1, 2.9, "adds the constant\nc = Σ W · relu(β)", **where)
    ax.text(0.6, 0.8, "γ = 0: relu(β), the same for\nevery pixel and every image", **where)
    _map(ax, 12.4, 2.0, np.zeros((6, 6)), CONSTANT)
    for ends in ([1.4, 2.6], [2.6, 1.4]):
        ax.plot([11.8, 13.0], ends, color=CONSTANT, lw=2, zorder=5)
    _arrow(ax, (13.2, 2.0), (19.0, 3.65), CONSTANT, connectionstyle="arc3,rad=0.3", ls="--")
    ax.text(13.6, 0.8, "the channel is gone; its constant\nis taken off the mean instead", **where)


# ---- 06 · growing regularization -------------------------------------------------------------


@style()
def growing(pick: bool = False) -> None:
    """The factor of the growing penalty over a training: of GReg-1 beside a constant, or, with
    `pick`, of GReg-2."""
    rise = "The penalty factor of a dropped filter grows, then it is held"
    _, ax = figure("First all filters are penalized, then the smallest" if pick else rise, 8, 3.2)
    dropped, kept = COLORS["dropped"], COLORS["kept"]
    first, low = (0.2, 0.12) if pick else (0, 0)  # when the dropped are known; the factor there
    ax.plot([0, first], [0, low], color=INK, lw=2.5)
    ax.plot([first, 0.6, 1], [low, 1, 1], color=dropped, lw=2.5)
    ax.plot([first, first, 1], [low, 0, 0], color=kept, lw=2.5)
    phases = {"pick": 0.2, "grow": 0.4, "hold": 0.4} if pick else {"grow": 0.6, "hold": 0.4}
    _phases(ax, phases)
    words = [
        (0.42 if pick else 0.36, 0.5, "dropped filters", dropped),
        (0.63, 0.08, "kept filters: no penalty" + " any more" * pick, kept),
    ]
    if pick:
        words.append((0.02, 0.25, "all filters", INK))
    else:
        ax.plot([0, 0, 0.6], [0, 1, 1], color=QUIET, ls="--", lw=2)
        words.append((0.02, 1.08, "for comparison, constant: full strength at once", QUIET))
    for x, y, text, ink in words:
        _text(ax, x, y, text, 10, color=ink, ha="left")
    ax.set_ylabel("penalty factor r")


@style()
def common_penalty() -> None:
    """Two weights of one size under one penalty: what is left tells their curvature (GReg-2)."""
    title = "Under the same penalty, the weight with the flatter loss shrinks more"
    _, (left, right) = figure(title, 10, 3.0, columns=2)
    w, r = np.linspace(0, 2, 100), np.linspace(0, 3, 100)
    cases = [
        (2.0, "steep: h = 2", COLORS["kept"], (0.45, 0.45)),
        (0.3, "flat: h = 0.3", COLORS["dropped"], (0.02, 0.2)),
    ]
    for h, name, ink, spot in cases:
        left.plot(w, h * (w - 1) ** 2 / 2, color=ink, lw=2)
        right.plot(r, h / (h + r), color=ink, lw=2)
        _text(left, *spot, name, 10, color=ink, ha="left", fontweight="bold")
        _text(right, 3.05, h / (h + 3), name, 10, color=ink, ha="left", fontweight="bold")
    left.plot([1], [0], "o", color=INK)
    left.set(xlabel="weight w: loss ½ h (w − 1)²", ylabel="loss", xticks=[0, 1, 2], yticks=[0])
    right.set(xlabel="common penalty factor r: w = h / (h + r)", ylabel="what is left of w")
    right.set(xlim=(0, 4.1), ylim=(0, 1.05), xticks=[0, 1, 2, 3], yticks=[0, 1])


@style()
def feature_path() -> None:
    """Length and curvature of a path of features, and what the penalty on both leaves of it."""
    ax = _card("Feature flow asks for a short and straight path", 10, 2.9)
    bend, step = COLORS["dropped"], COLORS["kept"]
    crooked = [(0.8, 0.9), (1.9, 1.5), (3.2, 0.8), (5.2, 1.3)]
    straight = [(7.4, 1.0), (7.9, 1.12), (8.4, 1.22), (8.9, 1.36)]
    for points in (crooked, straight):
        for i, (x, y) in enumerate(points):
            ax.plot([x], [y], "s" if i == 0 else "o", color=INK, ms=6, zorder=3)
            _text(ax, x, y - 0.24, f"$x_{i}$", 10)
        for start, end in zip(points, points[1:]):
            _arrow(ax, start, end, step, lw=1.8)
    (x0, y0), (x1, y1), x2 = crooked[:3]
    onward = (2 * x1 - x0, 2 * y1 - y0)
    ax.plot([x1, onward[0]], [y1, onward[1]], ls=":", color=QUIET, lw=1.5)
    _arrow(ax, onward, x2, bend, lw=1.8)
    _text(ax, 2.2, 2.1, "the same step again", 9, color=QUIET, ha="right")
    _text(ax, 3.25, 1.75, "by how much the next step differs: curvature", 9, color=bend, ha="left")
    _text(ax, 1.25, 1.38, "steps: length", 9, color=step, ha="right")
    _text(ax, 3.0, 0.2, "each block moves the features by what it adds", 9)
    _text(ax, 8.15, 0.2, "with the penalty", 9)


@style()
def places() -> None:
    """An iteration of `fit`, with the three places where a penalty can act."""
    ax = _card("Three places in each iteration where a penalty can act", 10, 2.5)
    ours, plain = FILLS["how to cut\nwithout damage?"], FILLS[""]
    boxes = [
        ("step(i)", "strengths that\nchange with time", ours),
        ("cross-entropy", "of a batch", plain),
        ("+ penalty()", "what is added\nto the loss", ours),
        ("optimizer", "gradient, step", plain),
        ("proximal_step(lr)", "weights that are\nset or shrunk", ours),
    ]
    for i, (name, what, fill) in enumerate(boxes):
        x = 0.1 + 2.0 * i
        _box(ax, x, 0.7, 1.7, 1.1, fill)
        _text(ax, x + 0.85, 1.5, name, 9.5, fontweight="bold")
        _text(ax, x + 0.85, 1.05, what, 8.5)
        if i:
            _arrow(ax, (x - 0.29, 1.25), (x - 0.01, 1.25))
    ax.plot([8.95, 8.95, 0.95], [0.7, 0.35, 0.35], color=QUIET, lw=1.2)
    _arrow(ax, (0.95, 0.35), (0.95, 0.69), QUIET)
    _text(ax, 5.0, 0.17, "the next batch", 8.5, color=QUIET)


PHASES = {"pick": "#f7e6c4", "grow": "#ffffff", "hold": "#ececec"}  # ground behind a phase


def _phases(ax: Axes, shares: dict[str, float]) -> None:
    """Bands behind a curve over the training: name -> share of its time."""
    start = 0.0
    for name, share in shares.items():
        ax.axvspan(start, start + share, color=PHASES[name], zorder=0)
        _text(ax, start + share / 2, 1.24, name, 9.5, fontweight="bold")
        start += share
    ax.set(xlim=(0, 1), ylim=(-0.04, 1.36), xlabel="training", xticks=[], yticks=[0, 1])
    ax.set_yticklabels(["0", "ceiling"])
    ax.grid(False)
