"""From the table of a study's runs to figures, each by a function of its own; no global state of Matplotlib is kept.

More groups than fit into one panel go to several panels; the baseline is in each, in grey, if it is one group.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from msign_lightning.ablations.cell import Group, show
from msign_lightning.ablations.results import LEVEL, Boundary, Run
from msign_lightning.ablations.results import survival as estimate_survival
from msign_lightning.ablations.study import Bisect, Grid, Study

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, for every eye
GREY = "#777777"
SMALL = 8  # points
LANE = 0.035  # height of one arm's lane for runs that diverged, as a share of the axes


class Drawing(NamedTuple):
    """A figure with a name for its file and a caption."""

    name: str
    caption: str
    figure: Figure


def bound(boundary: Boundary) -> str:
    """LR_max for people: "0.0123", or "≥ 0.1" where it is a bound only."""
    sign = {"bracketed": "", "all_stable": "≥ ", "all_unstable": "≤ "}[boundary.status]
    return f"{sign}{boundary.lr_max:.3g}"


def draw(study: Study, table: pd.DataFrame, boundaries: Sequence[Boundary], baseline: str) -> list[Drawing]:
    """The figures for which there are data. A bisection has none of the losses, whose learning rates it chose."""
    drawings = []
    if not isinstance(study.sampler, Bisect):
        text = (
            f"{study.metric} against peak learning rate: means over seeds, with bands from the lowest to the highest; "
            "where seeds have learning rates of their own, there are points only."
        )
        drawings.append(Drawing("loss", text, loss(table, baseline, study.metric)))
    if boundaries:
        text = (
            "Up to which learning rate training is stable, with intervals; arrows where no run shows an end. Every run "
            "is a tick: below its line if it was stable, above if not."
        )
        drawings.append(Drawing("frontier", text, frontier(table, boundaries)))
    if (figure := frontier_map(boundaries)) is not None:
        drawings.append(Drawing("frontier_map", "Highest stable learning rate by period and targets.", figure))
    places = {group: set(zip(rows["lr"], rows["seed"], strict=True)) for group, rows in table.groupby("group")}
    common = set.intersection(*places.values())
    comparable = table[[place in common for place in zip(table["lr"], table["seed"], strict=True)]]
    if not isinstance(study.sampler, Bisect) and comparable["collapsed_at"].notna().any():
        text = (
            f"Share of runs that have not collapsed, by Kaplan and Meier; {len(common)} runs in each group, with "
            "the same learning rates and seeds. A run that had not collapsed at its end is censored there."
        )
        drawings.append(Drawing("survival", text, survival(comparable, baseline)))
    return drawings


def loss(table: pd.DataFrame, baseline: str, metric: str = "loss/val") -> Figure:
    """Validation loss against learning rate: a line for the mean over seeds, a band from lowest to highest.

    Unstable runs are hollow. Runs that diverged, or ended above every initial loss, are crosses in a strip at the upper
    edge, and gaps in the line.
    """
    top = table["initial_loss"].max()
    shown = table.assign(loss=table["val_loss"].where(table["val_loss"] <= top))
    lost = shown["loss"].isna()

    def draw_group(ax: Axes, group: Group, color: str, place: int) -> None:
        rows = shown[shown["group"] == group]
        losses_RS = rows.pivot(index="lr", columns="seed", values="loss").sort_index()
        if losses_RS.size == len(rows):
            ax.plot(losses_RS.index, losses_RS.mean(axis=1, skipna=False), color=color)
            ends = losses_RS.min(axis=1, skipna=False), losses_RS.max(axis=1, skipna=False)
            ax.fill_between(losses_RS.index, *ends, color=color, alpha=0.2, linewidth=0)
        for stable, face in ((True, color), (False, "white")):
            some = rows[rows["stable"] == stable]
            ax.plot(some["lr"], some["loss"], "o", color=color, markerfacecolor=face, markersize=4)
        rates = rows["lr"][rows["loss"].isna()]
        heights = [1 - LANE * (place + 0.5)] * len(rates)
        ax.plot(rates, heights, "x", color=color, markersize=5, transform=ax.get_xaxis_transform())

    figure, axes = _panels(list(table["group"].unique()), baseline, draw_group)
    strip = LANE * max(len(ax.get_legend_handles_labels()[1]) for ax in axes) if lost.any() else 0
    for ax in axes:
        ax.set_xscale("log")
        _thin_ticks(ax)
        ax.set_xlabel("peak learning rate")
        ax.set_ylabel(f"validation loss ({metric})")
        ax.fill_between([0, 1], [1 - strip] * 2, [1, 1], color="0.93", zorder=0, transform=ax.transAxes, linewidth=0)
    low, high = axes[0].get_ylim()
    axes[0].set_yticks([tick for tick in axes[0].get_yticks() if low <= tick <= high and not lost.all()])
    axes[0].set_ylim(low, low + (high - low) / (1 - strip))
    above = (lost & table["val_loss"].notna()).any()
    markers = [
        ("o", True, "stable", table["stable"].any()),
        ("o", False, "unstable", (~table["stable"] & ~lost).any()),
        ("x", True, f"diverged or above {top:.2f}" if above else "diverged", lost.any()),
    ]
    _explain(figure, [(marker, filled, text) for marker, filled, text, used in markers if used])
    return figure


def frontier(table: pd.DataFrame, boundaries: Sequence[Boundary]) -> Figure:
    """LR_max of each group with its interval, arrows where an end is not known; and every run, stable or not."""
    figure = Figure(figsize=(7, 1.5 + 0.32 * len(boundaries)), layout="constrained")
    ax = figure.add_subplot()
    values = [v for b in boundaries for v in (b.lr_max, b.low, b.high) if 0 < v < math.inf]
    left, right = min(*values, table["lr"].min()) / 1.5, max(*values, table["lr"].max()) * 1.5
    color = COLORS[0]
    for y, b in enumerate(boundaries):
        rows = table[table["group"] == b.group]
        for stable, shift, shade in ((True, 0.25, COLORS[2]), (False, -0.25, COLORS[1])):
            rates = rows["lr"][rows["stable"] == stable]
            ax.plot(rates, [y + shift] * len(rates), "|", color=shade, markersize=5, markeredgewidth=1)
        ax.plot((max(b.low, left), min(b.high, right)), (y, y), color=color, linewidth=1.5)
        for end, marker, known in ((left, "<", b.low > 0), (right, ">", b.high < math.inf)):
            ax.plot([end], [y], marker="" if known else marker, color=color, markersize=6, clip_on=False)
        known = b.status == "bracketed"
        ax.plot([b.lr_max], [y], "o", color=color, markerfacecolor=color if known else "white", markersize=6)
    ax.set_xscale("log")
    _thin_ticks(ax)
    ax.set_xlim(left, right)
    ax.set_ylim(len(boundaries) - 0.5, -0.5)
    names = [f"{b.group.label} †" if b.non_monotone else b.group.label for b in boundaries]
    ax.set_yticks(range(len(boundaries)), names, fontsize=SMALL)
    ax.grid(axis="x", alpha=0.3)
    ax.set_xlabel("highest stable learning rate LR_max\n" + _meaning(boundaries))
    right_axis = ax.secondary_yaxis("right")
    right_axis.set_yticks(range(len(boundaries)), [bound(b) for b in boundaries], fontsize=SMALL)
    right_axis.tick_params(length=0, pad=8)
    handles = [("o", True, "LR_max"), ("o", False, "a bound only")]
    _explain(figure, handles, "† stable above unstable" if any(b.non_monotone for b in boundaries) else None)
    return figure


def _meaning(boundaries: Sequence[Boundary]) -> str:
    seeds = sorted({len(b.seeds) for b in boundaries})
    if seeds == [1]:
        return "(one seed: from its highest stable to its lowest unstable run)"
    levels = sorted({f"{b.confidence:.3g}" for b in boundaries})
    many = " or ".join(map(str, seeds))
    return f"(interval over {many} seeds, which holds it with probability {' or '.join(levels)})"


def frontier_map(boundaries: Sequence[Boundary]) -> Figure | None:
    """LR_max by period and targets, a panel for each arm with its other factors; None without two of each."""
    panels: dict[Group, dict[tuple[Any, Any], Boundary]] = {}
    for b in boundaries:
        factors = dict(b.group.factors)
        if {"period", "targets"} <= factors.keys():
            place = factors.pop("period"), factors.pop("targets")
            panels.setdefault(Group(b.group.arm, tuple(factors.items())), {})[place] = b
    panels = {g: cells for g, cells in panels.items() if all(len(set(axis)) > 1 for axis in zip(*cells, strict=True))}
    if not panels:
        return None
    drawn = [b for cells in panels.values() for b in cells.values()]
    norm = LogNorm(min(b.lr_max for b in drawn) / 1.01, max(b.lr_max for b in drawn) * 1.01)
    periods = sorted({period for cells in panels.values() for period, _ in cells})
    targets = list(dict.fromkeys(target for cells in panels.values() for _, target in cells))
    size = (1.8 + 0.95 * len(periods), (0.9 + 0.55 * len(targets)) * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ax, (group, cells) in zip(axes, panels.items(), strict=True):
        values = [[cells[p, t].lr_max if (p, t) in cells else math.nan for p in periods] for t in targets]
        ax.imshow(np.array(values), norm=norm, cmap="viridis", aspect="auto")
        for y, target in enumerate(targets):
            for x, period in enumerate(periods):
                cell = cells.get((period, target))
                dark = cell is not None and norm(cell.lr_max) < 0.5
                text = "no run" if cell is None else bound(cell) + " †" * bool(cell.non_monotone)
                ax.text(x, y, text, ha="center", va="center", color="white" if dark else "black", fontsize=SMALL + 1)
        ax.set_xticks(range(len(periods)), [show(p) for p in periods])
        ax.set_yticks(range(len(targets)), [show(t) for t in targets])
        ax.set_title(f"LR_max of {group.label}", fontsize=SMALL + 2)
        ax.tick_params(length=0)
    axes[-1].set_xlabel("period P (steps)")
    return figure


def survival(table: pd.DataFrame, baseline: str) -> Figure:
    """Share of runs that have not collapsed, with a band for the interval, up to the end of the longest run."""
    curves = estimate_survival(table)

    def draw_group(ax: Axes, group: Group, color: str, place: int) -> None:
        curve = curves[group]
        width = 3.2 - 0.3 * place  # equal curves stay visible
        ax.step(curve["step"], curve["share"], where="post", color=color, linewidth=width)
        ax.fill_between(curve["step"], curve["low"], curve["high"], step="post", color=color, alpha=0.1, linewidth=0)

    figure, axes = _panels(list(curves), baseline, draw_group)
    for ax in axes:
        ax.set_ylim(-0.03, 1.05)
        ax.set_xlim(left=0)
        ax.set_xlabel("optimizer steps")
        ax.set_ylabel(f"share of runs not collapsed\n({LEVEL:.0%} interval)")
    return figure


def curves(study: Study, runs: Sequence[Run], baseline: str) -> list[Drawing]:
    """Loss and stable rank over the steps of a grid, a column for each learning rate, if one panel holds all groups."""
    ours = [group for group in study.groups if any(run.outcome.ranks and run.cell.group == group for run in runs)]
    ours.sort(key=lambda group: group.arm != baseline)
    rates = sorted({run.cell.lr for run in runs})
    if not isinstance(study.sampler, Grid) or not 0 < len(ours) <= len(COLORS) + 1:
        return []
    figure = Figure(figsize=(1 + 4.5 * len(rates), 7), layout="constrained")
    axes = figure.subplots(2, len(rates), sharex=True, sharey="row", squeeze=False)
    for (top, bottom), lr in zip(axes.T, rates, strict=True):
        for group, color in zip(ours, (GREY, *COLORS), strict=False):
            outcomes = [run.outcome for run in runs if run.cell.group == group and run.cell.lr == lr]
            for ax, lines in ((top, [dict(o.curve) for o in outcomes]), (bottom, [dict(o.ranks) for o in outcomes])):
                common = sorted(set.intersection(*map(set, lines))) if lines else []
                if steps := [step for step in common if step > study.steps / 10]:
                    values_ST = np.array([[line[step] for step in steps] for line in lines])
                    ax.plot(steps, values_ST.mean(0), color=color, label=group.label)
                    ax.fill_between(steps, values_ST.min(0), values_ST.max(0), color=color, alpha=0.2, linewidth=0)
        top.set_title(f"peak learning rate {lr:g}", fontsize=SMALL + 2)
        bottom.set_xlabel("optimizer steps")
        bottom.set_yscale("log", base=2)
        bottom.yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("stable rank of attention matrices")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False, fontsize=SMALL)
    caption = "Loss and stable rank over the steps, without the first tenth: mean, lowest and highest of the seeds."
    return [Drawing("curves", caption, figure)]


def _panels(
    groups: Sequence[Group], baseline: str, draw_group: Callable[[Axes, Group, str, int], None]
) -> tuple[Figure, list[Axes]]:
    """Panels with the baseline in grey and up to six other groups each, drawn and with legends."""
    common = [group for group in groups if group.arm == baseline]
    common = common if len(common) == 1 else []
    others = [group for group in groups if group not in common]
    count = max(1, -(-len(others) // len(COLORS)))
    members = [list(part) for part in np.array_split(np.arange(len(others)), count)]
    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(6.5 if columns == 1 else 10, 4.4 * rows), layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for ax in axes[count:]:
        ax.remove()
    narrow = max(len(group.label) for group in groups) > 22
    for ax, part in zip(axes, members, strict=False):
        drawn = [*((group, GREY) for group in common), *zip((others[i] for i in part), COLORS, strict=False)]
        for place, (group, color) in enumerate(drawn):
            draw_group(ax, group, color, place)
            ax.plot([], [], color=color, label=textwrap.fill(group.label, 60))
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=SMALL, ncols=1 if narrow else 2)
        ax.grid(alpha=0.3)
        ax.tick_params(labelbottom=True, labelleft=True)
    return figure, axes[:count]


def _explain(figure: Figure, markers: Sequence[tuple[str, bool, str]], title: str | None = None) -> None:
    """A legend below the figure for markers: shape, whether filled, meaning."""
    handles = [
        Line2D([], [], linestyle="", marker=m, color=GREY, markerfacecolor=GREY if filled else "white", label=text)
        for m, filled, text in markers
    ]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, title=title)
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_fontsize(SMALL)


def _thin_ticks(ax: Axes) -> None:
    """Labels at 1, 3 and 10 of each decade."""
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
