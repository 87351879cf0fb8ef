"""From the runs of a study to tables, for people and as CSV.

Losses are validation losses in nats per token. A mean or difference stands for all seeds or is not given: it is never
that of the runs which happened not to diverge.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from msign_lightning.ablations.cell import Group, show
from msign_lightning.ablations.frontier import (
    LEVEL,
    Boundary,
    Overhead,
    PairedDifference,
    Run,
    fit_overhead,
    paired_differences,
)
from msign_lightning.ablations.study import Bisect, Grid, Sampler, Study, Tpe

MISSING = "–"


class Table(NamedTuple):
    """A table for people: title, names of columns, and the text of each cell."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown, without its title."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        escaped = ([text.replace("|", r"\|") for text in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


class Result(NamedTuple):
    """What the runs of a group at one learning rate gave.

    Attributes:
        group: The cells.
        lr: Their learning rate.
        runs: Seed → its run.
        mean: Mean validation loss; None if a run diverged.
        stable_rank: Geometric mean of the attention matrices' stable ranks at the end; None if a run diverged.
        tokens_per_second: Mean throughput of training.
        difference: To the baseline; None for the baseline and where it has no run.
    """

    group: Group
    lr: float
    runs: Mapping[int, Run]
    mean: float | None
    stable_rank: float | None
    tokens_per_second: float
    difference: PairedDifference | None


def results(runs: Sequence[Run], baseline: str) -> list[Result]:
    """One result for each group and learning rate, in the order of their first run.

    Raises:
        ValueError: No run is of the baseline.
    """
    differences = {(d.group, d.lr): d for d in paired_differences(runs, baseline)}
    by_place: dict[tuple[Group, float], dict[int, Run]] = {}
    for run in runs:
        by_place.setdefault((run.cell.group, run.cell.lr), {})[run.cell.seed] = run
    out = []
    for place, members in by_place.items():
        outcomes = [run.outcome for run in members.values()]
        losses = [outcome.val_loss for outcome in outcomes]
        ranks = [outcome.stable_rank for outcome in outcomes]
        out.append(
            Result(
                *place,
                runs=members,
                mean=_mean(losses),
                stable_rank=None if (mean := _mean([r and math.log(r) for r in ranks])) is None else math.exp(mean),
                tokens_per_second=fmean(outcome.tokens_per_second for outcome in outcomes),
                difference=differences.get(place),
            )
        )
    return out


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


class Best(NamedTuple):
    """The lowest validation loss of a group.

    Attributes:
        group: The cells.
        lr: The learning rate with the lowest mean over all of the group's seeds; None if each seed has its own.
        losses: Seed → loss.
    """

    group: Group
    lr: float | None
    losses: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return fmean(self.losses.values())


def best(found: Sequence[Result], sampler: Sampler) -> list[Best]:
    """The lowest loss of each group, lowest first.

    With a grid, a group has one learning rate for all seeds, else each seed its own. Groups without a finite loss for
    each of the study's seeds are left out: means over different seeds can't be compared. With a search, which gives
    each group other seeds, they are left out if a seed of their own has none.

    Args:
        found: Of all groups.
        sampler: The study's.
    """
    every = {seed for result in found for seed in result.runs}
    by_group: dict[Group, list[Result]] = {}
    for result in found:
        by_group.setdefault(result.group, []).append(result)
    out = []
    for group, members in by_group.items():
        own = {seed for result in members for seed in result.runs}
        seeds = sorted(own if isinstance(sampler, Tpe) else every)
        finite = [
            (r.lr, {s: v for s, run in r.runs.items() if (v := run.outcome.val_loss) is not None}) for r in members
        ]
        candidates = [Best(group, lr, losses) for lr, losses in finite if losses.keys() == set(seeds)]
        if not isinstance(sampler, Grid) and {seed for _, losses in finite for seed in losses} == set(seeds):
            lowest = {seed: min(losses[seed] for _, losses in finite if seed in losses) for seed in seeds}
            candidates = [Best(group, None, lowest)]
        if candidates:
            out.append(min(candidates, key=lambda b: b.mean))
    return sorted(out, key=lambda b: b.mean)


def results_table(found: Sequence[Result], baseline: str) -> Table:
    """A row for each group and learning rate."""
    seeds = sorted({seed for result in found for seed in result.runs})
    columns = (
        "arm",
        "learning rate",
        f"validation loss by seed ({', '.join(map(str, seeds))}); in parentheses: not stable",
        "mean",
        f"paired difference to {baseline} ({LEVEL:.0%} interval)",
        f"better than {baseline}",
        "stable",
        "stable rank at the end",
        "tokens/s",
    )
    rows = []
    for result in found:
        rows.append(
            (
                result.group.label,
                f"{result.lr:.4g}",
                " / ".join(_of_seed(result.runs.get(seed)) for seed in seeds),
                show_loss(result.mean),
                *_difference(result.difference, is_baseline=result.group.arm == baseline),
                f"{sum(run.stable for run in result.runs.values())} of {len(result.runs)}",
                _number(result.stable_rank, ".1f"),
                f"{result.tokens_per_second:,.0f}",
            )
        )
    return Table("Results", columns, tuple(rows))


def _of_seed(run: Run | None) -> str:
    if run is None:
        return MISSING
    if run.outcome.val_loss is None:
        return "diverged"
    return show_loss(run.outcome.val_loss) if run.stable else f"({show_loss(run.outcome.val_loss)})"


def show_loss(value: float | None, sign: str = "") -> str:
    """A loss or difference for people; of an exploded one only its magnitude is of interest."""
    if value is None:
        return MISSING
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign}.3g}"


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _difference(difference: PairedDifference | None, *, is_baseline: bool) -> tuple[str, str]:
    if difference is None:
        text = "" if is_baseline else MISSING
        return text, text
    better = f"{difference.n_better} of {pairs(difference)}"
    if difference.mean is None:
        return MISSING, better
    complete = difference.n_finite == pairs(difference)
    return interval(difference) + ("" if complete else f", of {difference.n_finite}"), better


def pairs(difference: PairedDifference) -> int:
    """Number of pairs in a difference, diverged runs included."""
    return difference.n_better + difference.n_worse + difference.n_equal + difference.n_both_diverged


def interval(difference: PairedDifference) -> str:
    """A difference with its interval: "-0.373 (-0.470 … -0.276)"."""
    mean, low, high = (show_loss(value, "+") for value in (difference.mean, difference.low, difference.high))
    return mean if difference.low is None else f"{mean} ({low} … {high})"


def bound(boundary: Boundary) -> str:
    """LR_max for people: "0.0123", or "≥ 0.1" where it is a bound only."""
    sign = {"bracketed": "", "all_stable": "≥ ", "all_unstable": "≤ "}[boundary.status]
    return f"{sign}{boundary.lr_max:.3g}"


def frontier_table(boundaries: Sequence[Boundary]) -> Table:
    """A row for each group."""
    columns = (
        "arm",
        "LR_max",
        "interval",
        "probability that it holds LR_max",
        "seeds",
        "runs",
        "lowest loss",
        "at learning rate",
        "LR sensitivity",
        "not monotone",
    )
    rows = []
    for boundary in boundaries:
        ends = (f"{end:.3g}" if 0 < end < math.inf else "?" for end in (boundary.low, boundary.high))
        rows.append(
            (
                boundary.group.label,
                bound(boundary),
                " … ".join(ends),
                "one seed's bracket" if boundary.n_seeds == 1 else f"{boundary.confidence:.3g}",
                str(boundary.n_seeds),
                str(boundary.n_runs),
                show_loss(None if boundary.best_lr is None else boundary.best_loss),
                _number(boundary.best_lr, ".3g"),
                _number(boundary.lr_sensitivity, ".3f"),
                f"{len(boundary.non_monotone)} of {boundary.n_seeds} seeds" if boundary.non_monotone else "",
            )
        )
    return Table("Up to which learning rate training is stable", columns, tuple(rows))


def best_table(ranking: Sequence[Best], baseline: str) -> Table:
    """A row for each group at its own best learning rate, lowest loss first."""
    columns = ("arm", "learning rate", "mean validation loss", f"difference to {baseline} by seed")
    reference = next((b for b in ranking if b.group.arm == baseline), None)
    rows = []
    for b in ranking:
        gaps = [b.losses[s] - reference.losses[s] for s in b.losses if s in reference.losses] if reference else []
        told = "" if b is reference else " / ".join(show_loss(gap, "+") for gap in gaps) or MISSING
        rows.append((b.group.label, "each seed's own" if b.lr is None else f"{b.lr:.4g}", show_loss(b.mean), told))
    return Table("Each arm at its best learning rate", columns, tuple(rows))


def arms_table(study: Study) -> Table:
    """What each arm of the study is."""
    rows = []
    for name in study.arms:
        variant = study.variants.get(name)
        extra = (
            "" if variant is None else f" With {', '.join(f'{k} = {show(v)}' for k, v in variant.settings.items())}."
        )
        rows.append((name, study.arm(name).description + extra))
    return Table("Arms", ("arm", "what it is"), tuple(rows))


def _csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV, with all digits; a value that a record has not is empty."""
    columns = dict.fromkeys(name for record in records for name in record)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def _factors(factors: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {name: show(value) if isinstance(value, tuple) else value for name, value in factors}


def runs_csv(runs: Sequence[Run]) -> str:
    """Every run: its cell and outcome, without the curve."""
    records = []
    for run in runs:
        outcome = {name: value for name, value in run.outcome._asdict().items() if name != "curve"}
        cell = {"key": run.cell.key, "arm": run.cell.arm, **_factors(run.cell.factors), "seed": run.cell.seed}
        records.append({**cell, "stable": run.stable, **outcome})
    return _csv(records)


def results_csv(found: Sequence[Result]) -> str:
    """`results`, with the losses of seed n in val_loss_n: empty where there is no run, "diverged" where it did."""
    records = []
    seeds = sorted({seed for result in found for seed in result.runs})
    for result in found:
        losses: dict[str, float | str | None] = dict.fromkeys(f"val_loss_{seed}" for seed in seeds)
        for seed, run in result.runs.items():
            losses[f"val_loss_{seed}"] = "diverged" if run.outcome.val_loss is None else run.outcome.val_loss
        difference = {} if result.difference is None else result.difference._asdict()
        records.append(
            {
                "arm": result.group.arm,
                **_factors(result.group.factors),
                "lr": result.lr,
                **losses,
                "mean": result.mean,
                "n_runs": len(result.runs),
                "n_stable": sum(run.stable for run in result.runs.values()),
                "stable_rank": result.stable_rank,
                "tokens_per_second": result.tokens_per_second,
                **{f"difference_{name}": value for name, value in difference.items() if name not in ("group", "lr")},
            }
        )
    return _csv(records)


def frontier_csv(boundaries: Sequence[Boundary]) -> str:
    """`frontier`, without the seeds' own boundaries."""
    records = []
    for boundary in boundaries:
        values = {name: value for name, value in boundary._asdict().items() if name not in ("group", "seeds")}
        counts = {"n_seeds": boundary.n_seeds, "n_non_monotone": len(boundary.non_monotone)}
        records.append({"arm": boundary.group.arm, **_factors(boundary.group.factors), **values, **counts})
    return _csv(records)


def missing(study: Study, runs: Sequence[Run]) -> list[str]:
    """What failed or is not trained yet: cells of a grid, groups of a bisection; of a search nothing is known."""
    match study.sampler:
        case Grid():
            done = {run.cell for run in runs}
            return [cell.label for cell in study.cells() if cell not in done]
        case Bisect():
            tried = {run.cell.group for run in runs}
            return [group.label for group in study.groups() if group not in tried]
        case Tpe():
            return []


def overheads(runs: Sequence[Run]) -> dict[Group, Overhead]:
    """T∞ / (1 + r/P) for each arm, with its other factors, that ran to the end with at least two periods."""
    fits = {}
    for group, points in throughputs(runs).items():
        periods, tokens = zip(*points, strict=True)
        if len(set(periods)) > 1:
            fits[group] = fit_overhead(periods, tokens)
    return fits


def throughputs(runs: Sequence[Run]) -> dict[Group, list[tuple[float, float]]]:
    """Period (infinite without one) and tokens per second of the runs to the end, for each group but for its period."""
    points: dict[Group, list[tuple[float, float]]] = {}
    for run in runs:
        factors = dict(run.cell.group.factors)
        period = factors.pop("period", math.inf)
        assert isinstance(period, (int, float))
        if run.outcome.diverged_at is None:
            group = Group(run.cell.arm, tuple(factors.items()))
            points.setdefault(group, []).append((period, run.outcome.tokens_per_second))
    return points
