"""From the tables of a study to figures, each by a function of its own; no global state of Matplotlib is kept.

Up to `MOST` groups are lines of one panel, each in a colour of its own; of more, each has a panel of its own.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from msign_lightning.ablations import results
from msign_lightning.ablations.cell import Group, show
from msign_lightning.ablations.study import Bisect, Grid, Study

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's, for every eye
DASHES = ("-", "--", ":", "-.")  # a round of the colours each
GREY = "#888888"
MOST = len(COLORS) + 1
SMALL = 8  # points
STRIP = 0.08  # share of the axes that is for runs that diverged

Panels = Mapping[str, Mapping[str, pd.DataFrame]]
"""Title → label of a line → its data."""


class Drawing(NamedTuple):
    """A figure with a name for its file and a caption."""

    name: str
    caption: str
    figure: Figure


def bound(boundary: Any) -> str:
    """LR_max of a row of `results.frontier` for people: "0.0123", or "≥ 0.1" where it is a bound only."""
    sign = {"bracketed": "", "all_stable": "≥ ", "all_unstable": "≤ "}[boundary.status]
    return f"{sign}{boundary.lr_max:.3g}"


def draw(study: Study, table: pd.DataFrame, boundaries: pd.DataFrame, baseline: str) -> list[Drawing]:
    """The figures for which there are data. A bisection has none of the losses, whose learning rates it chose."""
    drawings = []
    if not isinstance(study.sampler, Bisect):
        text = (
            f"{study.metric} against peak learning rate: points for seeds, set side by side, and lines for means over "
            "all seeds; a line has gaps where a run diverged."
        )
        drawings.append(Drawing("loss", text, loss(table, baseline, study.metric)))
    if len(boundaries):
        text = (
            "Up to which learning rate training is stable, with intervals; arrows where no run shows an end. Every run "
            "is a tick: below its line if it was stable, above if not."
        )
        drawings.append(Drawing("frontier", text, frontier(table, boundaries)))
        if (figure := frontier_map(boundaries)) is not None:
            text = "LR_max by period and targets; † where a stable run is above an unstable one."
            drawings.append(Drawing("frontier_map", text, figure))
    fatal = table["lr"].isin(table["lr"][table["collapsed_at"].notna()])
    if isinstance(study.sampler, Grid) and fatal.any():
        text = (
            "Share of runs that have not collapsed, by Kaplan and Meier, at each learning rate at which one did; up to "
            f"three lines with {results.LEVEL:.0%} intervals. A run that had not collapsed at its end is censored "
            "there. Lines are set off a little, so that equal ones stay apart."
        )
        drawings.append(Drawing("survival", text, survival(table[fatal], baseline)))
    return drawings


def loss(table: pd.DataFrame, baseline: str, metric: str = "loss/val") -> Figure:
    """Validation loss against learning rate: a line for the mean over seeds, a point for each.

    Unstable runs are hollow. Runs that diverged, or ended above every initial loss, are crosses in a strip at the upper
    edge, and gaps in the line.
    """
    top = table["initial_loss"].max()
    lost = ~(table["val_loss"] <= top)
    table = table.assign(loss=table["val_loss"].mask(lost))
    strip = STRIP if lost.any() else 0

    def draw_line(ax: Axes, rows: pd.DataFrame, style: dict[str, Any], aside: float) -> None:
        color = style["color"]
        losses_RS = rows.pivot(index="lr", columns="seed", values="loss").sort_index()
        lines = []
        if losses_RS.size == len(rows):
            lines += ax.plot(losses_RS.index, losses_RS.mean(axis=1, skipna=False), **style)
        for stable, face in ((True, color), (False, "white")):
            some = rows[rows["stable"] == stable]
            lines += ax.plot(some["lr"], some["loss"], "o", color=color, markerfacecolor=face, markersize=4)
        rates = rows["lr"][rows["loss"].isna()]
        edge = ax.get_xaxis_transform()
        lines += ax.plot(rates, [1 - strip / 2] * len(rates), "x", color=color, markersize=5, transform=edge)
        for line in lines:
            line.set_transform(line.get_transform() + ScaledTranslation(aside / 24, 0, ax.figure.dpi_scale_trans))

    above = (lost & table["val_loss"].notna()).any()
    markers = {
        "stable": ("o", GREY, table["stable"].any()),
        "unstable": ("o", "white", (~table["stable"] & ~lost).any()),
        f"diverged or above {top:.2f}" if above else "diverged": ("x", GREY, lost.any()),
    }
    handles = [_marker(text, shape, GREY, face) for text, (shape, face, is_used) in markers.items() if is_used]
    figure, axes = _panels(_by_group(table, baseline), _grey(table, baseline), draw_line, handles)
    for ax in axes:
        ax.fill_between([0, 1], 1 - strip, 1, color="0.93", zorder=0, transform=ax.transAxes, linewidth=0)
        _scale(ax, table["lr"])
    figure.supxlabel("peak learning rate", fontsize="medium")
    figure.supylabel(f"validation loss ({metric})", fontsize="medium")
    low, high = axes[0].get_ylim()
    axes[0].set_yticks([tick for tick in axes[0].get_yticks() if low <= tick <= high and not lost.all()])
    axes[0].set_ylim(low, low + (high - low) / (1 - strip))
    return figure


def frontier(table: pd.DataFrame, boundaries: pd.DataFrame) -> Figure:
    """LR_max of each group with its interval, arrows where an end is not known; and every run, stable or not."""
    figure = Figure(figsize=(7, 1.5 + 0.32 * len(boundaries)), layout="constrained")
    ax = figure.add_subplot()
    values = pd.concat([boundaries["lr_max"], boundaries["low"], boundaries["high"], table["lr"]])
    values = values[(values > 0) & (values < math.inf)]
    left, right = values.min() / 1.5, values.max() * 1.5
    color, is_unstable, is_stable = COLORS[:3]
    for y, b in enumerate(boundaries.itertuples()):
        rows = table[table["group"] == b.group]
        for stable, shift, shade in ((True, 0.25, is_stable), (False, -0.25, is_unstable)):
            rates = rows["lr"][rows["stable"] == stable]
            ax.plot(rates, [y + shift] * len(rates), "|", color=shade, markersize=5, markeredgewidth=1)
        ax.plot((max(b.low, left), min(b.high, right)), (y, y), color=color, linewidth=1.5)
        for end, marker, known in ((left, "<", b.low > 0), (right, ">", b.high < math.inf)):
            ax.plot([end], [y], marker="" if known else marker, color=color, markersize=6, clip_on=False)
        face = color if b.status == "bracketed" else "white"
        ax.plot([b.lr_max], [y], "o", color=color, markerfacecolor=face, markersize=6)
    _scale(ax, table["lr"])
    ax.set_xlim(left, right)
    ax.set_ylim(len(boundaries) - 0.5, -0.5)
    names = [b.group.label + " †" * (b.n_non_monotone > 0) for b in boundaries.itertuples()]
    ax.set_yticks(range(len(boundaries)), names, fontsize=SMALL)
    ax.grid(axis="x", alpha=0.3)
    levels = " or ".join(f"{level:.3g}" for level in sorted(boundaries["confidence"].unique()))
    ax.set_xlabel(f"highest stable learning rate LR_max\n(interval that holds it with probability {levels})")
    right_axis = ax.secondary_yaxis("right")
    right_axis.set_yticks(range(len(boundaries)), [bound(b) for b in boundaries.itertuples()], fontsize=SMALL)
    right_axis.tick_params(length=0, pad=8)
    handles = [_marker("LR_max", "o", color), _marker("a bound only", "o", color, "white")]
    handles += [_marker("unstable run", "|", is_unstable), _marker("stable run", "|", is_stable)]
    if (boundaries["n_non_monotone"] > 0).any():
        handles.append(_marker("stable above unstable", "$†$", "black"))
    _legend(figure, handles, len(handles))
    return figure


def frontier_map(boundaries: pd.DataFrame) -> Figure | None:
    """LR_max by period and targets, a panel for each arm with its other factors; None without two of each."""
    panels: dict[Group, dict[tuple[Any, Any], Any]] = {}
    for b in boundaries.itertuples():
        factors = dict(b.group.factors)
        if {"period", "targets"} <= factors.keys():
            place = factors.pop("period"), factors.pop("targets")
            panels.setdefault(Group(b.group.arm, tuple(factors.items())), {})[place] = b
    panels = {g: cells for g, cells in panels.items() if all(len(set(axis)) > 1 for axis in zip(*cells, strict=True))}
    if not panels:
        return None
    drawn = [b.lr_max for cells in panels.values() for b in cells.values()]
    norm = LogNorm(min(drawn) / 1.01, max(drawn) * 1.01)
    periods = sorted({period for cells in panels.values() for period, _ in cells})
    targets = list(dict.fromkeys(target for cells in panels.values() for _, target in cells))
    size = (1.8 + 0.95 * len(periods), (0.9 + 0.55 * len(targets)) * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ax, (group, cells) in zip(axes, panels.items(), strict=True):
        values = [[cells[p, t].lr_max if (p, t) in cells else math.nan for p in periods] for t in targets]
        ax.imshow(values, norm=norm, cmap="viridis", aspect="auto")
        for (period, target), cell in cells.items():
            color = "white" if norm(cell.lr_max) < 0.5 else "black"
            text = bound(cell) + " †" * (cell.n_non_monotone > 0)
            place = periods.index(period), targets.index(target)
            ax.text(*place, text, ha="center", va="center", color=color, fontsize=SMALL + 1)
        ax.set_xticks(range(len(periods)), map(show, periods))
        ax.set_yticks(range(len(targets)), map(show, targets))
        ax.set_title(f"LR_max of {group.label}", fontsize=SMALL + 2)
        ax.tick_params(length=0)
    axes[-1].set_xlabel("period P (steps)")
    return figure


def survival(table: pd.DataFrame, baseline: str) -> Figure:
    """Share of runs that have not collapsed, at each learning rate by itself, up to the end of the longest run."""
    curves = results.survival(table)
    groups = curves["group"].map(lambda group: group.label)
    rates = curves["lr"].map("learning rate {:.4g}".format)
    title, label = (rates, groups) if groups.nunique() <= MOST else (groups, rates)
    panels = {t: dict(list(part.groupby(label, sort=False))) for t, part in curves.groupby(title, sort=False)}
    has_bands = max(map(len, panels.values())) <= 3

    def draw_line(ax: Axes, curve: pd.DataFrame, style: dict[str, Any], aside: float) -> None:
        (line,) = ax.step(curve["step"], curve["share"], where="post", linewidth=1.5, **style)
        line.set_transform(ax.transData + ScaledTranslation(0, -aside / 48, ax.figure.dpi_scale_trans))
        if has_bands:
            low, high, color = curve["low"], curve["high"], style["color"]
            ax.fill_between(curve["step"], low, high, step="post", color=color, alpha=0.1, linewidth=0)

    figure, axes = _panels(panels, _grey(table, baseline), draw_line)
    axes[0].set_ylim(-0.06, 1.06)
    axes[0].set_xlim(0, curves["step"].max() * 1.02)
    figure.supxlabel("optimizer steps", fontsize="medium")
    figure.supylabel("share of runs not collapsed", fontsize="medium")
    return figure


def _by_group(table: pd.DataFrame, baseline: str) -> Panels:
    """One panel for all groups; or one for each, with that of the baseline which it is compared with."""
    lines = dict(list(table.groupby("group", sort=False)))
    if len(lines) <= MOST:
        return {"": {group.label: rows for group, rows in lines.items()}}
    partner = results.partners(list(lines), baseline)
    pairs = {g: [partner[g], g] if g in partner else [g] for g in lines if g not in partner.values()}
    return {group.label: {g.label: lines[g] for g in pair} for group, pair in pairs.items()}


def _grey(table: pd.DataFrame, baseline: str) -> list[str]:
    """Labels of the baseline's groups, where they need not be told from each other."""
    groups = table["group"].unique()
    own = [group.label for group in groups if group.arm == baseline]
    return own if len(own) == 1 or len(groups) > MOST else []


def _panels(
    panels: Panels,
    grey: Sequence[str],
    draw_line: Callable[[Axes, pd.DataFrame, dict[str, Any], float], None],
    markers: Sequence[Line2D] = (),
) -> tuple[Figure, list[Axes]]:
    """Panels with the same axes, and a legend for markers and all lines but those that the title of a panel names.

    Lines are drawn by a function of axes, data, colour and dashes, and place among the lines of the panel.
    """
    labels = dict.fromkeys(label for lines in panels.values() for label in lines if label not in panels)
    colored = [label for label in labels if label not in grey]
    styles: dict[str, dict[str, Any]] = {label: {"color": GREY, "linestyle": "-"} for label in grey}
    for i, label in enumerate(colored):
        dashes = DASHES[i // len(COLORS) % len(DASHES)]
        styles[label] = {"color": COLORS[i % len(COLORS)], "linestyle": dashes}
    columns = min(len(panels), 2 if len(panels) <= 4 else 4)
    rows = math.ceil(len(panels) / columns)
    width, height = {1: (6.5, 4.2), 2: (4.6, 3.4)}.get(columns, (3.0, 2.4))
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for ax, (title, lines) in zip(axes, panels.items(), strict=False):
        for place, (label, data) in enumerate(lines.items()):
            style = styles.get(label, {"color": COLORS[0], "linestyle": "-"})
            draw_line(ax, data, style, place - (len(lines) - 1) / 2)
        ax.set_title(textwrap.fill(title, 34), fontsize=SMALL)
        ax.grid(alpha=0.3)
        ax.tick_params(labelbottom=True, labelsize=SMALL)
    for ax in axes[len(panels) :]:
        ax.remove()
    handles = [Line2D([], [], **styles[label], label=textwrap.fill(label, 60)) for label in labels]
    room = int(width * columns * 13) // (4 + max(map(len, labels), default=0))
    _legend(figure, [*handles, *markers], min(max(room, 1), 4))
    return figure, axes[: len(panels)]


def _marker(label: str, shape: str, color: str, face: str | None = None) -> Line2D:
    return Line2D([], [], linestyle="", marker=shape, color=color, markerfacecolor=face or color, label=label)


def _legend(figure: Figure, handles: Sequence[Line2D], columns: int) -> None:
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=SMALL)


def _scale(ax: Axes, rates: pd.Series) -> None:
    """A logarithmic axis of learning rates, with labels at each, or, of many, at 1, 3 and 10 of each decade."""
    ax.set_xscale("log")
    few = sorted(rates.unique()) if rates.nunique() <= 6 else []
    if few:
        ax.set_xticks(few)
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter("{x:.4g}")
