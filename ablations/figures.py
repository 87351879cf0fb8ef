"""From the runs of a study to figures, each by a function of its own. Nothing here keeps a global state of matplotlib.

Arms of which a group, an arm with values of its factors, has several appear one by one. More groups than fit into one
panel go to several panels; the baseline is in each, in grey.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from msign_lightning.ablations.cell import Cell, Group, show
from msign_lightning.ablations.frontier import LEVEL, Boundary, Run, Survival
from msign_lightning.ablations.tables import bound, overheads, throughputs

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, for every eye
GREY = "#777777"
SMALL = 8  # points
LANE = 0.035  # height of one arm's lane for runs that diverged, as a share of the axes


def loss(runs: Sequence[Run], baseline: str) -> Figure:
    """Validation loss against learning rate: a line for the mean over seeds, a band from lowest to highest.

    Where not all seeds of a group were trained at the same learning rates, each seed has a thin line. Unstable runs are
    hollow. Runs that diverged, or ended above every initial loss, are crosses in a strip at the upper edge, and gaps in
    the line.
    """
    top = max(run.outcome.initial_loss for run in runs)
    losses = {r.cell: math.nan if (loss := r.outcome.val_loss) is None or loss > top else loss for r in runs}
    lost = {cell for cell, loss in losses.items() if math.isnan(loss)}

    def draw(ax: Axes, group: Group, color: str, place: int) -> None:
        members = [run for run in runs if run.cell.group == group]
        _loss_lines(ax, {run.cell: losses[run.cell] for run in members}, color)
        for cell, _, stable in members:
            if cell in lost:
                height = 1 - LANE * (place + 0.5)
                ax.plot(cell.lr, height, "x", color=color, markersize=5, transform=ax.get_xaxis_transform())
            else:
                face = color if stable else "white"
                ax.plot(cell.lr, losses[cell], "o", color=color, markerfacecolor=face, markersize=4)

    figure, axes = _panels(list(dict.fromkeys(run.cell.group for run in runs)), baseline, draw)
    strip = LANE * max(len(ax.get_legend_handles_labels()[1]) for ax in axes) if lost else 0
    for ax in axes:
        ax.set_xscale("log")
        _thin_ticks(ax)
        ax.set_xlabel("peak learning rate")
        ax.set_ylabel("validation loss (nats per token)")
        ax.fill_between([0, 1], [1 - strip] * 2, [1, 1], color="0.93", zorder=0, transform=ax.transAxes, linewidth=0)
    low, high = axes[0].get_ylim()
    known = len(lost) < len(runs)
    axes[0].set_yticks([tick for tick in axes[0].get_yticks() if low <= tick <= high and known])
    axes[0].set_ylim(low, low + (high - low) / (1 - strip))
    above = any(run.cell in lost and run.outcome.val_loss is not None for run in runs)
    markers = [
        ("o", True, "stable", any(run.stable for run in runs)),
        ("o", False, "unstable", any(not run.stable and run.cell not in lost for run in runs)),
        ("x", True, f"diverged or above {top:.2f}" if above else "diverged", bool(lost)),
    ]
    _explain(figure, [(marker, filled, text) for marker, filled, text, used in markers if used])
    return figure


def _loss_lines(ax: Axes, losses: Mapping[Cell, float], color: str) -> None:
    seeds = sorted({cell.seed for cell in losses})
    rates = sorted({cell.lr for cell in losses})
    loss_at = {(cell.lr, cell.seed): loss for cell, loss in losses.items()}
    if len(losses) == len(seeds) * len(rates):
        losses_RS = np.array([[loss_at[lr, seed] for seed in seeds] for lr in rates])
        ax.plot(rates, losses_RS.mean(1), color=color)
        ax.fill_between(rates, losses_RS.min(1), losses_RS.max(1), color=color, alpha=0.2, linewidth=0)
        return
    for seed in seeds:
        own = [lr for lr in rates if (lr, seed) in loss_at]
        ax.plot(own, [loss_at[lr, seed] for lr in own], color=color, linewidth=0.7)


def frontier(boundaries: Sequence[Boundary]) -> Figure:
    """LR_max of each group with its interval; arrows where an end is not known; a bar at the best learning rate."""
    figure = Figure(figsize=(7, 1.4 + 0.25 * len(boundaries)), layout="constrained")
    ax = figure.add_subplot()
    values = [v for b in boundaries for v in (b.lr_max, b.low, b.high, b.best_lr) if v is not None and 0 < v < math.inf]
    left, right = min(values) / 1.5, max(values) * 1.5
    for y, b in enumerate(boundaries):
        color = COLORS[0]
        ends = max(b.low, left), min(b.high, right)
        ax.plot(ends, (y, y), color=color, linewidth=1.5)
        for end, marker, known in ((left, "<", b.low > 0), (right, ">", b.high < math.inf)):
            ax.plot([end], [y], marker="" if known else marker, color=color, markersize=6, clip_on=False)
        known = b.status == "bracketed"
        ax.plot([b.lr_max], [y], "o", color=color, markerfacecolor=color if known else "white", markersize=6)
        if b.best_lr is not None:
            ax.plot([b.best_lr], [y], "|", color=GREY, markersize=9)
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
    handles = [("o", True, "LR_max"), ("o", False, "a bound only"), ("|", True, "lowest loss")]
    _explain(figure, handles, "† stable above unstable" if any(b.non_monotone for b in boundaries) else None)
    return figure


def _meaning(boundaries: Sequence[Boundary]) -> str:
    seeds = sorted({b.n_seeds for b in boundaries})
    if seeds == [1]:
        return "(one seed: from its highest stable to its lowest unstable run)"
    levels = sorted({f"{b.confidence:.3g}" for b in boundaries})
    return (
        f"(interval over {' or '.join(map(str, seeds))} seeds, which holds it with probability {' or '.join(levels)})"
    )


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


def survival(curves: Sequence[Survival], baseline: str) -> Figure:
    """Share of runs that have not collapsed, with a band for the interval, up to the end of the longest run."""

    def draw(ax: Axes, group: Group, color: str, place: int) -> None:
        curve = next(c for c in curves if c.group == group)
        width = 3.2 - 0.3 * place  # equal curves stay visible
        ax.step(curve.steps, curve.survival, where="post", color=color, linewidth=width)
        ax.fill_between(curve.steps, curve.low, curve.high, step="post", color=color, alpha=0.1, linewidth=0)

    figure, axes = _panels([curve.group for curve in curves], baseline, draw)
    for ax in axes:
        ax.set_ylim(-0.03, 1.05)
        ax.set_xlim(left=0)
        ax.set_xlabel("optimizer steps")
        ax.set_ylabel(f"share of runs not collapsed\n({LEVEL:.0%} interval)")
    return figure


def throughput(runs: Sequence[Run]) -> Figure | None:
    """Tokens per second against the period, with the fit T∞ / (1 + r/P); None without two periods of one arm.

    Every run to the end is a point; a dashed line is the mean of an arm without period.
    """
    fits = overheads(runs)
    if not fits:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.add_subplot()
    points = throughputs(runs)
    periods = [p for group in fits for p, _ in points[group]]
    span = np.geomspace(min(periods) / 1.3, max(periods) * 1.3, 100)
    for place, (group, fit) in enumerate(fits.items()):
        color = COLORS[place % len(COLORS)]
        ax.plot(*zip(*points[group], strict=True), "o", color=color, markersize=4, alpha=0.6)
        told = f"{group.label}: T∞ = {fit.limit:,.0f}, r = {fit.ratio:.2f}"
        ax.plot(span, [fit(period) for period in span], color=color, label=told)
    without = {group: fmean(t for _, t in places) for group, places in points.items() if group not in fits}
    for style, (group, mean) in zip(("--", ":", "-."), without.items(), strict=False):
        if all(period == math.inf for period, _ in points[group]):
            ax.axhline(mean, color=GREY, linestyle=style, label=f"{group.label}: {mean:,.0f}")
    ax.set_xscale("log")
    ax.set_xticks(sorted(set(periods)), [f"{period:g}" for period in sorted(set(periods))])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("period P (steps)")
    ax.set_ylabel("throughput T (tokens per second)")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside upper left", frameon=False, fontsize=SMALL, title="T(P) = T∞ / (1 + r/P)")
    return figure


Draw = Callable[[Axes, Group, str, int], None]


def _panels(groups: Sequence[Group], baseline: str, draw: Draw) -> tuple[Figure, list[Axes]]:
    """Panels with the baseline's groups in grey and up to six others each, drawn and with legends."""
    common = [group for group in groups if group.arm == baseline][: len(COLORS)]
    others = [group for group in groups if group not in common]
    count = max(1, -(-len(others) // len(COLORS)))
    members = [list(part) for part in np.array_split(np.arange(len(others)), count)]
    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(6.5 if columns == 1 else 10, 4.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    axes: list[Axes] = list(grid)
    for ax in axes[count:]:
        ax.remove()
    narrow = max(len(group.label) for group in groups) > 22
    for ax, part in zip(axes, members, strict=False):
        shades = [GREY] if len(common) == 1 else [str(0.3 + 0.5 * i / len(common)) for i in range(len(common))]
        drawn = [*zip(common, shades, strict=True), *zip((others[i] for i in part), COLORS, strict=False)]
        for place, (group, color) in enumerate(drawn):
            draw(ax, group, color, place)
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
