"""From the tables of a study to figures, each by a function of its own; no global state of Matplotlib is kept.

Up to `MOST` groups are lines of one panel, each in a colour of its own; of more, each has a panel of its own.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from msign_lightning.ablations import results
from msign_lightning.ablations.cell import Group
from msign_lightning.ablations.results import Findings, Run, factors_of
from msign_lightning.ablations.study import Bisect, Grid, Study

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's, for every eye
DASHES = ("-", "--", ":", "-.")  # a round of the colours each
GREY = "#888888"
MOST = len(COLORS) + 1
SMALL = 8  # points

Style = dict[str, Any]
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
    return f"{sign}{boundary.lr_max:.{3 if sign == '' else 4}g}"


def draw(found: Findings) -> list[Drawing]:
    """The figures for which there are data. A bisection has none of the losses, whose learning rates it chose."""
    sampler, table = found.study.sampler, found.table
    has_rates = not isinstance(sampler, Bisect) and table["lr"].nunique() > 1
    drawings = [loss(table, found.baseline, found.study.metric)] if has_rates else []
    if len(found.boundaries):
        drawings += [frontier(table, found.boundaries), *frontier_map(found.boundaries)]
    fatal = table["lr"].isin(found.results["lr"][found.results["n_collapsed"] > 0])
    if isinstance(sampler, Grid) and fatal.any():
        drawings.append(survival(table[fatal], found.baseline))
    return drawings


def loss(table: pd.DataFrame, baseline: str, metric: str) -> Drawing:
    """Validation loss against learning rate."""
    lost = ~(table["val_loss"] <= table["initial_loss"].max())
    table = table.assign(loss=table["val_loss"].mask(lost))

    def draw_line(ax: Axes, rows: pd.DataFrame, style: Style, aside: float) -> None:
        color = style["color"]
        losses_RS = rows.pivot(index="lr", columns="seed", values="loss").reindex(columns=table["seed"].unique())
        lines = ax.plot(losses_RS.index, losses_RS.mean(axis=1, skipna=False), **style)
        for stable, face in ((True, color), (False, "white")):
            some = rows[rows["stable"] == stable]
            lines += ax.plot(some["lr"], some["loss"], "o", color=color, markerfacecolor=face, markersize=4)
        rates, above = rows["lr"][rows["loss"].isna()], ax.get_xaxis_transform()
        lines += ax.plot(rates, [1.04] * len(rates), "x", color=color, markersize=5, transform=above, clip_on=False)
        lines[-1].set_in_layout(False)
        for line in lines:
            line.set_transform(line.get_transform() + ScaledTranslation(aside / 24, 0, ax.figure.dpi_scale_trans))

    handles = [_marker("stable", "o", GREY), _marker("unstable", "o", GREY, "white")]
    if lost.any():
        handles.append(_marker("diverged, or above every initial loss", "x", GREY))
    groups = dict(list(table.groupby("group", sort=False)))
    panels: Panels = {"": {group.label: rows for group, rows in groups.items()}}
    if len(groups) > MOST:
        partner = results.partners(list(groups), baseline)
        pairs = {g: [partner[g], g] if g in partner else [g] for g in groups if g not in partner.values()}
        panels = {group.label: {g.label: groups[g] for g in pair} for group, pair in pairs.items()}
    figure, axes = _panels(panels, _grey(list(groups), baseline), draw_line, handles)
    _scale(axes[0], table["lr"])
    figure.supxlabel("peak learning rate", fontsize="medium")
    figure.supylabel(f"validation loss ({metric})", fontsize="medium")
    text = (
        f"{metric} against peak learning rate: points for seeds, set side by side, and lines for means over all seeds; "
        "a line has gaps where a run diverged or is missing."
    )
    return Drawing("loss", text, figure)


def frontier(table: pd.DataFrame, boundaries: pd.DataFrame) -> Drawing:
    """LR_max of each group with its interval, and every run."""
    figure = Figure(figsize=(7, 1.5 + 0.32 * len(boundaries)), layout="constrained")
    ax = figure.add_subplot()
    left, right = table["lr"].min() / 1.5, table["lr"].max() * 1.5
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
    names = [f"{b.group.label}{' †' * (b.n_non_monotone > 0)}   {bound(b)}" for b in boundaries.itertuples()]
    ax.set_yticks(range(len(boundaries)), names, fontsize=SMALL)
    ax.grid(axis="x", alpha=0.3)
    levels = " or ".join(f"{level:.3g}" for level in sorted(boundaries["confidence"].unique()) if level)
    held = f"interval that holds it with probability {levels}" if levels else "one seed's bracket"
    ax.set_xlabel(f"highest stable learning rate LR_max\n({held})")
    handles = [_marker("LR_max", "o", color), _marker("a bound only", "o", color, "white")]
    handles += [_marker("unstable run", "|", is_unstable), _marker("stable run", "|", is_stable)]
    _legend(figure, {}, handles)
    text = (
        "Up to which learning rate training is stable, with intervals; arrows where no run shows an end; † where a "
        "stable run is above an unstable one."
    )
    return Drawing("frontier", text, figure)


def frontier_map(boundaries: pd.DataFrame) -> list[Drawing]:
    """LR_max by period and targets, a panel for each arm with its other factors; nothing without two of each."""
    axis_names = ["period", "targets"]
    cells = boundaries.join(factors_of(boundaries["group"]).reindex(columns=axis_names)).dropna(subset=axis_names)
    others = [Group(g.arm, tuple(f for f in g.factors if f[0] not in axis_names)) for g in cells["group"]]
    panels = {group: part for group, part in cells.groupby(others) if (part[axis_names].nunique() > 1).all()}
    if not panels:
        return []
    norm = LogNorm(cells["lr_max"].min() / 1.01, cells["lr_max"].max() * 1.01)
    width, height = (cells[name].nunique() for name in axis_names)
    figure = Figure(figsize=(1.8 + 0.95 * width, (0.9 + 0.55 * height) * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ax, (group, part) in zip(axes, panels.items(), strict=True):
        rates = part.pivot(index="targets", columns="period", values="lr_max").reindex(part["targets"].unique())
        ax.imshow(rates, norm=norm, cmap="viridis", aspect="auto")
        for b in part.itertuples():
            x, y = rates.columns.get_loc(b.period), rates.index.get_loc(b.targets)
            color = "white" if norm(b.lr_max) < 0.5 else "black"
            text = bound(b) + " †" * (b.n_non_monotone > 0)
            ax.text(x, y, text, ha="center", va="center", color=color, fontsize=SMALL + 1)
        ax.set_xticks(range(len(rates.columns)), rates.columns)
        ax.set_yticks(range(len(rates.index)), rates.index)
        ax.set_title(f"LR_max of {group.label}", fontsize=SMALL + 2)
        ax.tick_params(length=0)
    axes[-1].set_xlabel("period P (steps)")
    text = "LR_max by period and targets; † where a stable run is above an unstable one."
    return [Drawing("frontier_map", text, figure)]


def survival(table: pd.DataFrame, baseline: str) -> Drawing:
    """Share of runs that have not collapsed, at each learning rate by itself, up to the end of the longest run."""
    curves = results.survival(table)
    groups = curves["group"].map(lambda group: group.label)
    rates = curves["lr"].map("learning rate {:.4g}".format)
    title, label = (rates, groups) if groups.nunique() <= MOST else (groups, rates)
    panels = {t: dict(list(part.groupby(label, sort=False))) for t, part in curves.groupby(title, sort=False)}
    has_bands = max(map(len, panels.values())) <= 3

    def draw_line(ax: Axes, curve: pd.DataFrame, style: Style, aside: float) -> None:
        (line,) = ax.step(curve["step"], curve["share"], where="post", linewidth=1.5, **style)
        line.set_transform(ax.transData + ScaledTranslation(0, -aside / 48, ax.figure.dpi_scale_trans))
        if has_bands:
            low, high, color = curve["low"], curve["high"], style["color"]
            ax.fill_between(curve["step"], low, high, step="post", color=color, alpha=0.1, linewidth=0)

    figure, axes = _panels(panels, _grey(table["group"].unique(), baseline), draw_line)
    axes[0].set_ylim(-0.06, 1.06)
    axes[0].set_xlim(0, curves["step"].max() * 1.02)
    figure.supxlabel("optimizer steps", fontsize="medium")
    figure.supylabel("share of runs not collapsed", fontsize="medium")
    text = (
        "Share of runs that have not collapsed, by Kaplan and Meier, at each learning rate at which one did; up to "
        f"three lines with {results.LEVEL:.0%} intervals. A run that had not collapsed at its end is censored there. "
        "Lines are set off a little, so that equal ones stay apart."
    )
    return Drawing("survival", text, figure)


def _grey(groups: Sequence[Group], baseline: str) -> list[str]:
    """Labels of the baseline's groups, where they need not be told from each other."""
    own = [group.label for group in groups if group.arm == baseline]
    return own if len(own) == 1 or len(groups) > MOST else []


def curves(study: Study, runs: Sequence[Run], baseline: str) -> list[Drawing]:
    """Loss and stable rank over the steps of a grid, a column for each learning rate, if one panel holds all groups."""
    ours = [group for group in study.groups if any(run.outcome.ranks and run.cell.group == group for run in runs)]
    rates = sorted({run.cell.lr for run in runs})
    if not isinstance(study.sampler, Grid) or not 0 < len(ours) <= MOST:
        return []
    styles = _styles([group.label for group in ours], _grey(ours, baseline))
    figure = Figure(figsize=(1 + 4.5 * len(rates), 7), layout="constrained")
    axes = figure.subplots(2, len(rates), sharex=True, sharey="row", squeeze=False)
    for (top, bottom), lr in zip(axes.T, rates, strict=True):
        for group in ours:
            style = styles[group.label]
            outcomes = [run.outcome for run in runs if run.cell.group == group and run.cell.lr == lr]
            for ax, lines in ((top, [o.curve for o in outcomes]), (bottom, [o.ranks for o in outcomes if o.ranks])):
                values_ST = pd.DataFrame([dict(line) for line in lines]).dropna(axis=1)  # at the steps that all have
                values_ST = values_ST.loc[:, values_ST.columns > study.steps / 10]
                if values_ST.size:
                    ax.plot(values_ST.columns, values_ST.mean(), label=group.label, **style)
                    low, high = values_ST.min(), values_ST.max()
                    ax.fill_between(values_ST.columns, low, high, color=style["color"], alpha=0.2, linewidth=0)
        top.set_title(f"peak learning rate {lr:g}", fontsize=SMALL + 2)
        bottom.set_xlabel("optimizer steps")
        bottom.set_yscale("log", base=2)
        bottom.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))  # two labels or more from 3 to 4 on
        bottom.yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("stable rank of attention matrices")
    _legend(figure, styles)
    caption = "Loss and stable rank over the steps, without the first tenth: mean, lowest and highest of the seeds."
    return [Drawing("curves", caption, figure)]


def _panels(
    panels: Panels,
    grey: Sequence[str],
    draw_line: Callable[[Axes, pd.DataFrame, Style, float], None],
    markers: Sequence[Line2D] = (),
) -> tuple[Figure, list[Axes]]:
    """Panels with the same axes, and a legend for markers and all lines but those that the title of a panel names.

    Lines are drawn by a function of axes, data, colour and dashes, and place among the lines of the panel.
    """
    labels = dict.fromkeys(label for lines in panels.values() for label in lines if label not in panels)
    styles = _styles(labels, grey)
    columns = min(len(panels), 2 if len(panels) <= 4 else 4)
    rows = math.ceil(len(panels) / columns)
    width, height = {1: (6.5, 4.2), 2: (4.6, 3.4)}.get(columns, (3.0, 2.4))
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for ax, (title, lines) in zip(axes, panels.items(), strict=False):
        for place, (label, data) in enumerate(lines.items()):
            style = styles.get(label, {"color": COLORS[0], "linestyle": "-"})
            draw_line(ax, data, style, place - (len(lines) - 1) / 2)
        ax.set_title(textwrap.fill(title, 34) or " ", fontsize=SMALL, pad=12)
        ax.grid(alpha=0.3)
        ax.tick_params(labelbottom=True, labelsize=SMALL)
    for ax in axes[len(panels) :]:
        ax.remove()
    _legend(figure, styles, markers)
    return figure, axes[: len(panels)]


def _styles(labels: Iterable[str], grey: Sequence[str]) -> dict[str, Style]:
    """Colour and dashes of each line: no two are the same but grey ones."""
    looks = itertools.cycle({"color": c, "linestyle": dashes} for dashes, c in itertools.product(DASHES, COLORS))
    return {label: {"color": GREY, "linestyle": "-"} if label in grey else next(looks) for label in labels}


def _marker(label: str, shape: str, color: str, face: str | None = None) -> Line2D:
    return Line2D([], [], linestyle="", marker=shape, color=color, markerfacecolor=face or color, label=label)


def _legend(figure: Figure, styles: Mapping[str, Style], markers: Sequence[Line2D] = ()) -> None:
    """A legend of as many columns, up to four, as the figure is wide enough for."""
    handles = [*(Line2D([], [], label=label, **style) for label, style in styles.items()), *markers]
    longest = max(len(str(handle.get_label())) for handle in handles)
    room = int(figure.get_figwidth() * 13) // (4 + longest)
    columns = min(max(room, 1), 4)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=SMALL)


def _scale(ax: Axes, rates: pd.Series) -> None:
    """A logarithmic axis of learning rates, with labels at each, or, of many, at 1, 3 and 10 of each decade."""
    ax.set_xscale("log")
    if rates.nunique() <= 6:
        ax.set_xticks(rates.unique())
        ax.minorticks_off()
    else:
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter("{x:.4g}")
