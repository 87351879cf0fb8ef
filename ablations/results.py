"""From the runs of a study to one table of them, and what follows from it; nothing is drawn or told here.

Every interval names the level it has, or has `LEVEL`. `judge` is the one rule by which arms are told apart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median, median_high, median_low, stdev
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from scipy import stats  # type: ignore[import-untyped]

from msign_lightning.ablations.cell import Cell, Factors, Group, Outcome, show
from msign_lightning.ablations.sampler import bracket

LEVEL = 0.95
FEWEST = 3
"""Seeds that a verdict needs."""

Status = Literal["bracketed", "all_stable", "all_unstable"]
Verdict = Literal["lower", "higher", "undecided"]


class Run(NamedTuple):
    """A finished training run: which cell, what it gave, and whether it counts as stable."""

    cell: Cell
    outcome: Outcome
    stable: bool


def tabulate(runs: Iterable[Run]) -> pd.DataFrame:
    """A row for each run: its cell, by the columns key, group, arm, lr, other factors and seed; stable; its outcome.

    A factor that does not concern an arm, and what a run has not, are None or NaN. A group is a `Group`.
    """
    rows: list[dict[str, Any]] = []
    for cell, outcome, stable in runs:
        factors = {name: show(value) if isinstance(value, tuple) else value for name, value in cell.factors}
        own = {"key": cell.key, "group": cell.group, "arm": cell.arm, "lr": cell.lr, **factors, "seed": cell.seed}
        rows.append({**own, "stable": stable, **outcome._asdict()})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(
        key=lambda name: ["key", "group", "arm", "lr"].index(name) if name in ("key", "group", "arm", "lr") else 4
    )
    frame = pd.DataFrame(rows, columns=columns)
    for name in ("val_loss", "final_loss", "max_grad_norm", "stable_rank", "diverged_at", "collapsed_at"):
        frame[name] = frame[name].astype(float)
    frame["clipped_loss"] = frame[["val_loss", "initial_loss"]].min(axis=1)
    return frame.drop(columns=["curve", "ranks"])


# --- verdicts ----------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Two arms over seeds.

    Attributes:
        differences: Of each seed.
        noise: Variance of a difference that comes from how coarsely it was measured.
    """

    differences: Sequence[float]
    noise: float = 0.0

    @property
    def p(self) -> float:
        """Probability of a mean as far from zero, or farther, between equal arms: Student's paired t-test."""
        n = len(self.differences)
        error = math.sqrt((stdev(self.differences) ** 2 + self.noise) / n)
        mean = fmean(self.differences)
        return float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)

    def interval(self) -> tuple[float, float]:
        """That of the mean at `LEVEL`."""
        n = len(self.differences)
        half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * math.sqrt((stdev(self.differences) ** 2 + self.noise) / n)
        return fmean(self.differences) - float(half), fmean(self.differences) + float(half)


def judge(comparisons: Sequence[Comparison]) -> list[Verdict | None]:
    """Which comparisons show a difference: if no arm differs, there is a wrong verdict in at most 5 % of all studies.

    Paired t-tests, corrected by Holm's method for the number of comparisons; no verdict for fewer than `FEWEST` seeds.
    The rate is for differences that are normal or have heavier tails: not for runs of which some collapse and others do
    not, which are not to be compared so.
    """
    verdicts: list[Verdict | None] = [None] * len(comparisons)
    tested = sorted((c.p, i) for i, c in enumerate(comparisons) if len(c.differences) >= FEWEST)
    still = True
    for rank, (p, i) in enumerate(tested):
        still = still and p * (len(tested) - rank) <= 1 - LEVEL
        verdicts[i] = "undecided" if not still else "lower" if fmean(comparisons[i].differences) < 0 else "higher"
    return verdicts


# --- losses ------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What the runs of a group at one learning rate gave, against those of the baseline with the same seeds.

    Attributes:
        losses: Seed → validation loss; None if the run diverged.
        stable: Number of stable runs.
        mean: Mean validation loss; None if a run diverged.
        stable_rank: Geometric mean over runs; None if one is not known.
        baseline: Seed → validation loss of the baseline, for seeds that both have; empty for the baseline itself.
        comparison: Of the losses, if all runs of both are stable and both have the same seeds; else None.
    """

    group: Group
    lr: float
    losses: Mapping[int, float | None]
    stable: int
    mean: float | None
    stable_rank: float | None
    steps_per_second: float
    baseline: Mapping[int, float | None]
    comparison: Comparison | None

    @property
    def better(self) -> int:
        """Number of seeds for which the group is better than the baseline: where one diverged, it is the worse."""
        lost = math.inf
        pairs = [(self.losses[seed], theirs) for seed, theirs in self.baseline.items()]
        return sum((lost if ours is None else ours) < (lost if theirs is None else theirs) for ours, theirs in pairs)


def summarize(table: pd.DataFrame, baseline: str) -> list[Result]:
    """A result for each group and learning rate, in the order of their first run.

    Args:
        table: That of `tabulate`.
        baseline: Name of an arm. Where it has several groups, each run's partner has the same values of the factors
            that concern the baseline.

    Raises:
        ValueError: No run is of the baseline.
    """
    arms = sorted(set(table["arm"]))
    if baseline not in arms:
        raise ValueError(f"baseline must be an arm with runs, {arms}, got {baseline!r}")
    places = dict(list(table.groupby(["group", "lr"], sort=False)))
    references = {(group.factors, lr): rows for (group, lr), rows in places.items() if group.arm == baseline}
    names = {name for factors, _ in references for name, _ in factors}
    results = []
    for (group, lr), rows in places.items():
        same: Factors = tuple(factor for factor in group.factors if factor[0] in names)
        reference = None if group.arm == baseline else references.get((same, lr))
        losses = _by_seed(rows)
        theirs = {} if reference is None else {s: v for s, v in _by_seed(reference).items() if s in losses}
        comparison = None
        same_seeds = reference is not None and len(theirs) == len(losses) == len(reference) > 1
        if same_seeds and rows["stable"].all() and reference["stable"].all():  # type: ignore[index]
            comparison = Comparison([losses[seed] - theirs[seed] for seed in losses])  # type: ignore[operator]
        ranks = rows["stable_rank"]
        results.append(
            Result(
                group,
                lr,
                losses,
                stable=int(rows["stable"].sum()),
                mean=_mean(rows["val_loss"]),
                stable_rank=None if (mean := _mean(np.log(ranks))) is None else math.exp(mean),
                steps_per_second=float(rows["steps_per_second"].mean()),
                baseline=theirs,
                comparison=comparison,
            )
        )
    return results


def _by_seed(rows: pd.DataFrame) -> dict[int, float | None]:
    return {int(s): None if math.isnan(v) else float(v) for s, v in zip(rows["seed"], rows["val_loss"], strict=True)}


def _mean(values: pd.Series) -> float | None:
    mean = values.mean(skipna=False)
    return None if math.isnan(mean) else float(mean)


def best(results: Sequence[Result]) -> list[Result]:
    """Each group at the learning rate with the lowest mean over all seeds of the study, lowest first.

    Groups without a finite loss for each seed at any rate are left out: means over other seeds can't be compared.
    """
    seeds = {seed for result in results for seed in result.losses}
    lowest: dict[Group, Result] = {}
    for result in results:
        if result.mean is not None and set(result.losses) == seeds:
            known = lowest.get(result.group)
            if known is None or known.mean is None or result.mean < known.mean:
                lowest[result.group] = result
    return sorted(lowest.values(), key=lambda result: result.mean or 0.0)


# --- the stability frontier --------------------------------------------------------------------------------------


class SeedBoundary(NamedTuple):
    """Between which learning rates the runs of one seed turn from stable to unstable.

    Attributes:
        seed: The seed.
        low: Highest stable learning rate; 0 if none was.
        high: Lowest unstable one; infinite if none was.
        reversal: Lowest unstable and highest stable learning rate, if that is higher: the seed is not monotone
            (arXiv 2402.06184). `low` and `high` then hold all places for a single step that contradict the fewest runs.
    """

    seed: int
    low: float
    high: float
    reversal: tuple[float, float] | None

    @property
    def middle(self) -> float:
        """Logarithm of the middle of the bracket, or of the end that it has."""
        return fmean(map(math.log10, self._ends))

    @property
    def width(self) -> float:
        """Of the bracket, in decades; 0 where an end is missing."""
        return abs(math.log10(self._ends[-1] / self._ends[0]))

    @property
    def _ends(self) -> Sequence[float]:
        return [end for end in (self.low, self.high) if 0 < end < math.inf] or self.reversal or ()


class Boundary(NamedTuple):
    """Up to which learning rate training is stable in a group of cells.

    Attributes:
        group: The cells.
        lr_max: Learning rate at which a run is stable with probability ½ over seeds: the median of the seeds'
            boundaries, taken in the middle of their brackets on a logarithmic scale.
        low: Lower end of its interval; 0 if there is none.
        high: Upper end; infinite if there is none.
        confidence: Probability that such an interval holds LR_max. It is between the k-th lowest and the k-th highest
            seed with probability 1 - 2 P(Bin(n, ½) < k) for every distribution of boundaries: 0 for one seed, whose
            bracket says nothing about others, then 0.5, 0.75, 0.875, 0.9375 for five. More seeds take the largest k for
            `LEVEL`.
        status: Whether LR_max is "bracketed". At "all_stable" the median seed was stable wherever it was tried, and
            `lr_max` is a lower bound; at "all_unstable" an upper one.
        seeds: The boundary of each seed.
        n_runs: Number of runs.
        lr_sensitivity: Mean over seeds of E min(ℓ(η), ℓ₀) - ℓ*, with ℓ the validation loss, ℓ₀ the initial one and ℓ*
            the best (arXiv 2309.14322), over the learning rates of a common grid, weighed by the part of the
            logarithmic scale that is nearest to them. None without such a grid, or if a run of it is missing, or a seed
            diverged everywhere.
    """

    group: Group
    lr_max: float
    low: float
    high: float
    confidence: float
    status: Status
    seeds: tuple[SeedBoundary, ...]
    n_runs: int
    lr_sensitivity: float | None

    @property
    def non_monotone(self) -> tuple[SeedBoundary, ...]:
        """The seeds with a stable run above an unstable one."""
        return tuple(seed for seed in self.seeds if seed.reversal is not None)

    def against(self, other: Boundary) -> Comparison | None:
        """The logarithms of the seeds' boundaries minus those of another group; None unless both have the same seeds.

        A boundary that was not reached counts as the end of what was tried: that makes a difference smaller.
        """
        theirs = {seed.seed: seed for seed in other.seeds}
        if theirs.keys() != {seed.seed for seed in self.seeds} or len(theirs) < 2:
            return None
        noise = fmean(seed.width**2 + theirs[seed.seed].width ** 2 for seed in self.seeds) / 12
        return Comparison([seed.middle - theirs[seed.seed].middle for seed in self.seeds], noise)


def frontier(table: pd.DataFrame, rates: Sequence[float] = ()) -> list[Boundary]:
    """Where training is stable in each group, from a bisection or a grid; groups in the order of their first run.

    Args:
        table: That of `tabulate`.
        rates: The learning rates of the grid that all groups have; none for a bisection.
    """
    return [_boundary(group, rows, rates) for group, rows in table.groupby("group", sort=False)]


def _boundary(group: Group, rows: pd.DataFrame, rates: Sequence[float]) -> Boundary:
    by_seed = list(rows.groupby("seed"))
    seeds = tuple(_seed_boundary(int(seed), members) for seed, members in by_seed)
    is_unbounded_below = median_low(seed.low for seed in seeds) == 0
    is_unbounded_above = median_high(seed.high for seed in seeds) == math.inf
    status: Status = "bracketed"
    if is_unbounded_below != is_unbounded_above:
        status = "all_stable" if is_unbounded_above else "all_unstable"
    n = len(seeds)
    levels = [1 - 2 * float(stats.binom.cdf(k - 1, n, 0.5)) for k in range(1, n // 2 + 2)]
    k = max((k for k, level in enumerate(levels, start=1) if level >= LEVEL), default=1)
    sensitivities = [_lr_sensitivity(members, rates) for _, members in by_seed]
    known = [value for value in sensitivities if value is not None]
    return Boundary(
        group,
        lr_max=10 ** median(seed.middle for seed in seeds),
        low=sorted(seed.low for seed in seeds)[k - 1],
        high=sorted(seed.high for seed in seeds)[-k],
        confidence=max(levels[k - 1], 0.0),
        status=status,
        seeds=seeds,
        n_runs=len(rows),
        lr_sensitivity=fmean(known) if len(known) == n else None,
    )


def _seed_boundary(seed: int, rows: pd.DataFrame) -> SeedBoundary:
    probes = [(float(lr), bool(stable)) for lr, stable in zip(rows["lr"], rows["stable"], strict=True)]
    low, high = bracket(probes)
    stable = max((lr for lr, is_stable in probes if is_stable), default=0.0)
    unstable = min((lr for lr, is_stable in probes if not is_stable), default=math.inf)
    return SeedBoundary(seed, max(low, 0.0), high, (unstable, stable) if unstable < stable else None)


def _lr_sensitivity(rows: pd.DataFrame, rates: Sequence[float]) -> float | None:
    """That of one seed."""
    losses = rows.set_index("lr")["clipped_loss"]
    if len(rates) < 2 or not set(rates) <= set(losses.index) or rows["val_loss"].isna().all():
        return None
    ordered = sorted(rates)
    gaps = [math.log(b / a) for a, b in pairwise(ordered)]
    weights = [a + b for a, b in pairwise([gaps[0], *gaps, gaps[-1]])]
    values = [float(losses[lr]) for lr in ordered]
    return float(np.average(values, weights=weights)) - min(values)


# --- survival and throughput -------------------------------------------------------------------------------------


def survival(table: pd.DataFrame) -> dict[Group, pd.DataFrame]:
    """Which share of each group's runs has not collapsed by a step: the Kaplan-Meier estimate.

    A run that did not collapse is censored at its last step: stable so far, not proven stable.

    Returns:
        Group → columns step, share, low and high, with an interval at `LEVEL` by Greenwood's formula for log(-log S).
    """
    curves = {}
    for group, rows in table.groupby("group", sort=False):
        lost = rows["collapsed_at"].fillna(rows["diverged_at"])
        sample = stats.CensoredData(uncensored=lost.dropna(), right=rows["steps"][lost.isna()])
        estimate = stats.ecdf(sample).sf
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # there is none at the ends
            interval = estimate.confidence_interval(LEVEL, method="log-log")
        curve = pd.DataFrame({"step": estimate.quantiles, "share": estimate.probabilities})
        curve["low"], curve["high"] = interval.low.probabilities, interval.high.probabilities
        curve = pd.concat([pd.DataFrame([dict.fromkeys(curve, 1.0) | {"step": 0}]), curve], ignore_index=True)
        curve.loc[curve["share"] == 1, ["low", "high"]] = 1.0
        curve.loc[curve["share"] == 0, "low"] = 0.0
        curves[group] = curve.ffill()
    return curves


class Overhead(NamedTuple):
    """Throughput T(P) = `limit` / (1 + `ratio`/P) against the period P (arXiv 2602.01734, App. A.4).

    `limit` is in steps per second, `ratio` the time of one application in steps, `error` the root mean square of the
    relative deviations from the fit.
    """

    limit: float
    ratio: float
    error: float

    def __call__(self, period: float) -> float:
        """Steps per second at a period."""
        return self.limit / (1 + self.ratio / period)


def fit_overhead(periods: Sequence[float], steps_per_second: Sequence[float]) -> Overhead:
    """Fits it by least squares on relative deviations of 1/T, which is linear in 1/P.

    Raises:
        ValueError: There are fewer than two periods, or a value is not positive.
    """
    if len(set(periods)) < 2 or len(periods) != len(steps_per_second):
        raise ValueError(f"periods must hold two or more, and one for each throughput, got {list(periods)}")
    for value in (*periods, *steps_per_second):
        if not value > 0:
            raise ValueError(f"periods and steps_per_second must be positive, got {value}")
    t = np.asarray(steps_per_second, dtype=float)
    design = np.stack([t, t / np.asarray(periods, dtype=float)], axis=1)
    (step, application), *_ = np.linalg.lstsq(design, np.ones_like(t))
    deviations = design @ [step, application] - 1
    return Overhead(float(1 / step), float(application / step), float(np.sqrt(np.mean(deviations**2))))


def overheads(table: pd.DataFrame, worst: float = 0.05) -> dict[Group, tuple[Overhead, pd.DataFrame]]:
    """The fit and its runs for each arm, with its other factors, that ran to the end with at least two periods.

    A fit that is worse than `worst`, or sees no cost, says nothing and is left out.
    """
    fits = {}
    if "period" in table:
        rows = table[table["diverged_at"].isna() & table["period"].notna()]
        others = [Group(g.arm, tuple(f for f in g.factors if f[0] != "period")) for g in rows["group"]]
        for group, members in rows.groupby(pd.Series(others, index=rows.index), sort=False):
            if members["period"].nunique() > 1:
                fit = fit_overhead(list(members["period"]), list(members["steps_per_second"]))
                if fit.error <= worst and fit.ratio > 0.01:
                    fits[group] = (fit, members)
    return fits
