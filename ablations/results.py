"""From the runs of a study to tables in pandas: one of the runs, and what follows from it. Nothing is told here.

A mean or difference stands for all seeds or is not given: it is never that of the runs which happened not to diverge.
Every interval names the level it has, or has `LEVEL`. `judge` is the one rule by which arms are told apart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from statistics import fmean, median, median_high, median_low, stdev
from typing import NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from scipy import stats  # type: ignore[import-untyped]

from msign_lightning.ablations.cell import Cell, Group, Outcome, show
from msign_lightning.ablations.methods import PLAIN
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.sampler import bracket
from msign_lightning.ablations.study import Grid, Study, Tpe

LEVEL = 0.95
FEWEST = 3  # seeds that a verdict needs
WORST_FIT = 0.05  # relative error above which a fit of the throughput says nothing


class Run(NamedTuple):
    """A finished training run: which cell, what it gave, and whether it counts as stable."""

    cell: Cell
    outcome: Outcome
    stable: bool


class Findings(NamedTuple):
    """What the runs of a study show.

    Attributes:
        study: The study.
        baseline: The arm with which others are compared.
        table: A row for each run, as of `tabulate`.
        results: A row for each group and learning rate, as of `summarize`, and the verdict on its losses.
        boundaries: A row for each group of a grid over learning rates or of a bisection, as of `frontier`, and the
            verdict on its boundary; none for other studies.
    """

    study: Study
    baseline: str
    table: pd.DataFrame
    results: pd.DataFrame
    boundaries: pd.DataFrame


def find(study: Study, runs: Sequence[Run]) -> Findings:
    """What the runs show: AdamW, or else the study's first arm that has runs, is the baseline.

    Raises:
        StudyError: There are no runs.
    """
    if not runs:
        raise StudyError(f"runs must hold at least one finished run to report study {study.name}, got none")
    table = tabulate(sorted(runs, key=lambda r: (study.groups.index(r.cell.group), r.cell.lr, r.cell.seed)))
    arms = {group.arm for group in table["group"]}
    baseline = next(arm for arm in (PLAIN, *study.arms) if arm in arms)
    results, boundaries = summarize(table, baseline), pd.DataFrame()
    if not isinstance(study.sampler, Grid):  # whose learning rates were chosen by the losses
        results[["difference_low", "difference_high", "p"]] = math.nan
    if not isinstance(study.sampler, Tpe) and table.groupby(["group", "seed"])["lr"].nunique().max() > 1:
        boundaries = frontier(table, baseline, study.factors.get("lr", ()))  # type: ignore[arg-type]
    verdicts = judge(pd.concat([results, boundaries], ignore_index=True))
    results["verdict"] = verdicts[: len(results)]
    boundaries["verdict"] = verdicts[len(results) :].reset_index(drop=True)
    return Findings(study, baseline, table, results, boundaries)


def tabulate(runs: Iterable[Run]) -> pd.DataFrame:
    """A row for each run: key, group, lr, seed, stable, and the outcome but for its curves; NaN or NA where it has not.

    A group is a `Group`; `factors_of` spreads it out.
    """
    rows = [
        {"key": cell.key, "group": cell.group, "lr": cell.lr, "seed": cell.seed, "stable": stable, **outcome._asdict()}
        for cell, outcome, stable in runs
    ]
    kinds = dict.fromkeys(("val_loss", "final_loss", "max_grad_norm", "stable_rank"), "float64")
    kinds |= dict.fromkeys(("diverged_at", "collapsed_at"), "Int64")
    return pd.DataFrame(rows).drop(columns=["curve", "ranks"]).astype(kinds)


def factors_of(groups: Iterable[Group]) -> pd.DataFrame:
    """A row for each group: its arm and its factors, tuples as text; NaN where a factor does not concern the arm."""
    frame = pd.DataFrame([{"arm": group.arm, **dict(group.factors)} for group in groups], dtype=object)
    return frame.map(lambda value: show(value) if isinstance(value, tuple) else value)


def partners(groups: Sequence[Group], baseline: str) -> dict[Group, Group]:
    """Groups of other arms → that of the baseline with the same values of the factors that concern it, if it is there.

    Args:
        groups: Those that have runs.
        baseline: Name of an arm.
    """
    references = {group.factors: group for group in groups if group.arm == baseline}
    names = {name for factors in references for name, _ in factors}
    same = {g: tuple(factor for factor in g.factors if factor[0] in names) for g in groups if g.arm != baseline}
    return {group: references[factors] for group, factors in same.items() if factors in references}


# --- verdicts ----------------------------------------------------------------------------------------------------


def paired(differences: Sequence[float], noise: float = 0.0) -> dict[str, float]:
    """Student's paired t-test over seeds; NaN for fewer than `FEWEST`.

    Args:
        differences: Of each seed.
        noise: Variance of a difference that comes from how coarsely it was measured.

    Returns:
        difference_low and difference_high: interval of the mean at `LEVEL`. p: probability of a mean as far from zero,
        or farther, between equal arms.
    """
    n = len(differences)
    if n < FEWEST:
        return dict.fromkeys(("difference_low", "difference_high", "p"), math.nan)
    mean, error = fmean(differences), math.sqrt((stdev(differences) ** 2 + noise) / n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return {"difference_low": mean - half, "difference_high": mean + half, "p": p}


def judge(tests: pd.DataFrame) -> pd.Series:
    """Which comparisons show a difference: if no arm differs, there is a wrong verdict in at most 5 % of all studies.

    Paired t-tests, corrected by Holm's method for the number of comparisons. The rate is for differences that are
    normal or have heavier tails: not for runs of which some collapse and others do not.

    Args:
        tests: Columns difference, the mean, and p; NaN where nothing is compared.

    Returns:
        "lower", "higher", "undecided", or None where nothing is compared.
    """
    tested = tests.dropna(subset="p").sort_values("p")
    corrected = (tested["p"] * np.arange(len(tested), 0, -1)).cummax()
    verdicts = pd.Series([None] * len(tests), index=tests.index, dtype=object)
    verdicts[tested.index] = np.where(tested["difference"] < 0, "lower", "higher")
    verdicts[corrected.index[corrected > 1 - LEVEL]] = "undecided"
    return verdicts


# --- losses ------------------------------------------------------------------------------------------------------


def summarize(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """A row for each group and learning rate, in the order of their first run.

    Args:
        table: That of `tabulate`.
        baseline: Name of the arm that the others are compared with, as in `partners`.

    Returns:
        group, lr. val_loss_0 and so on: validation loss by seed; infinite where it diverged, NaN where there is no run.
        n_runs, n_stable, n_collapsed: numbers of runs. collapse_median, collapse_first, collapse_last: steps at which
        runs collapsed or diverged, of those that did. mean: of the validation loss over all seeds; NaN if a run
        diverged or is missing. stable_rank: geometric mean; NaN if one is not known. steps_per_second: mean. n_pairs:
        seeds that the baseline has, too. n_better: those with a lower loss, where one that diverged is the worse.
        difference: mean over pairs of the loss minus the baseline's; NaN if a run diverged. Its interval and p as of
        `paired`, if all runs of both are stable and both have the same seeds.
    """
    places = {place: rows.set_index("seed") for place, rows in table.groupby(["group", "lr"], sort=False)}
    partner = partners(list(table["group"].unique()), baseline)
    seeds = sorted(table["seed"].unique())
    found = []
    for (group, lr), rows in places.items():
        reference = places.get((partner.get(group), lr), rows[:0])
        ours, theirs = rows["val_loss"].align(reference["val_loss"], join="inner")
        is_comparable = len(rows) == len(reference) == len(ours) and rows["stable"].all() and reference["stable"].all()
        losses, ends = rows["val_loss"].fillna(math.inf), rows["collapsed_at"].astype(float)
        found.append(
            {
                "group": group,
                "lr": lr,
                **{f"val_loss_{seed}": losses.get(seed, math.nan) for seed in seeds},
                "n_runs": len(rows),
                "n_stable": int(rows["stable"].sum()),
                "n_collapsed": int(ends.count()),
                **{"collapse_median": ends.median(), "collapse_first": ends.min(), "collapse_last": ends.max()},
                "mean": rows["val_loss"].reindex(seeds).mean(skipna=False),
                "stable_rank": math.exp(np.log(rows["stable_rank"]).mean(skipna=False)),
                "steps_per_second": rows["steps_per_second"].mean(),
                "n_pairs": len(ours),
                "n_better": int((ours.fillna(math.inf) < theirs.fillna(math.inf)).sum()),
                "difference": (ours - theirs).mean(skipna=False),
                **paired(list(ours - theirs) if is_comparable else []),
            }
        )
    return pd.DataFrame(found)


def by_seed(results: pd.DataFrame) -> pd.DataFrame:
    """The validation losses of `summarize` alone, by seed."""
    losses = results.filter(regex=r"^val_loss_\d+$")
    return losses.rename(columns=lambda name: int(name.removeprefix("val_loss_")))


def best(results: pd.DataFrame) -> pd.DataFrame:
    """Of `summarize`: each group at the learning rate with the lowest mean over all seeds of the study, lowest first.

    Groups without a finite loss for each seed at any rate are left out: means over other seeds can't be compared.
    """
    known = results.dropna(subset="mean")
    return known.loc[known.groupby("group", sort=False)["mean"].idxmin()].sort_values("mean", kind="stable")


# --- the stability frontier --------------------------------------------------------------------------------------


def seed_boundaries(table: pd.DataFrame) -> pd.DataFrame:
    """Between which learning rates the runs of each group and seed turn from stable to unstable.

    Returns:
        group, seed. low: highest stable learning rate; 0 if none was. high: lowest unstable one; infinite if none was.
        monotone: whether no stable run is above an unstable one (arXiv 2402.06184). Else low and high hold all places
        for a single step that contradict the fewest runs. middle: logarithm of the middle of the bracket, or of the end
        that it has. width: of the bracket, in decades; 0 where an end is missing.
    """
    found = []
    for (group, seed), rows in table.groupby(["group", "seed"], sort=False):
        low, high = bracket(zip(rows["lr"], rows["stable"], strict=True))
        unstable, stable = rows["lr"][~rows["stable"]].min(), rows["lr"][rows["stable"]].max()
        ends = [end for end in (low, high) if 0 < end < math.inf] or [unstable, stable]
        found.append(
            {
                "group": group,
                "seed": seed,
                "low": max(low, 0.0),
                "high": high,
                "monotone": not unstable < stable,
                "middle": fmean(map(math.log10, ends)),
                "width": abs(math.log10(ends[-1] / ends[0])),
            }
        )
    return pd.DataFrame(found)


def frontier(table: pd.DataFrame, baseline: str, rates: Sequence[float] = ()) -> pd.DataFrame:
    """Up to which learning rate each group trains stably, from a bisection or a grid; in the order of their first run.

    Args:
        table: That of `tabulate`.
        baseline: As of `summarize`.
        rates: The learning rates of the grid that all groups have; none for a bisection.

    Returns:
        group, n_seeds, n_runs, n_non_monotone (seeds), and lr_sensitivity as of `lr_sensitivity`.
        lr_max: learning rate at which a run is stable with probability ½ over seeds: the median of the seeds'
        boundaries, each the middle of its bracket on a logarithmic scale. status: "bracketed"; at "all_stable" the
        median seed was stable wherever it was tried, and lr_max is a lower bound; at "all_unstable" an upper one.
        low, high: interval; 0 and infinite where an end is missing. confidence: probability that it holds LR_max, which
        is between the k-th lowest and the k-th highest seed with probability 1 - 2 P(Bin(n, ½) < k) for every
        distribution of boundaries: 0 for one seed, whose bracket says nothing about others, then 0.5, 0.75, 0.875,
        0.9375 for five. More seeds take the largest k for `LEVEL`.
        difference: mean over seeds of log₁₀ boundary minus the baseline's; its interval and p as of `paired`; NaN
        unless both have the same seeds. A boundary that was not reached counts as the end of what was tried, which
        makes a difference smaller, or NaN where it could turn it round. The widths of the brackets count as noise.
    """
    runs = dict(list(table.groupby("group", sort=False)))
    seeds = {group: rows.set_index("seed") for group, rows in seed_boundaries(table).groupby("group", sort=False)}
    partner = partners(list(seeds), baseline)
    found = []
    for group, own in seeds.items():
        n = len(own)
        k = max(int(stats.binom.ppf((1 - LEVEL) / 2, n, 0.5)), 1)
        ends_below, ends_above = median_low(own["low"]) > 0, median_high(own["high"]) < math.inf
        reference = seeds.get(partner.get(group), own[:0])
        differences = own["middle"] - reference["middle"]
        other_way = (own["high"] / reference["low"]).where(differences < 0, reference["high"] / own["low"])
        differences = differences.mask((other_way == math.inf) & (differences != 0))
        noise = (own["width"] ** 2 + reference["width"] ** 2).mean() / 12
        found.append(
            {
                "group": group,
                "lr_max": 10 ** median(own["middle"]),
                "low": sorted(own["low"])[k - 1],
                "high": sorted(own["high"])[-k],
                "confidence": 1 - 2 * float(stats.binom.cdf(k - 1, n, 0.5)),
                "status": "bracketed" if ends_below == ends_above else "all_stable" if ends_below else "all_unstable",
                "n_seeds": n,
                "n_runs": len(runs[group]),
                "n_non_monotone": int((~own["monotone"]).sum()),
                "lr_sensitivity": lr_sensitivity(runs[group], rates),
                "difference": differences.mean(skipna=False),
                **paired(list(differences) if differences.notna().all() else [], noise),
            }
        )
    return pd.DataFrame(found)


def lr_sensitivity(rows: pd.DataFrame, rates: Sequence[float]) -> float:
    """Mean over a group's seeds of E min(ℓ(η), ℓ₀) - ℓ* (arXiv 2309.14322).

    ℓ is the validation loss, ℓ₀ the initial one and ℓ* the best, over the learning rates of a common grid, each weighed
    by the part of the logarithmic scale that is nearest to it. NaN without such a grid, if a run of it is missing, or
    if a seed diverged everywhere.
    """
    rows = rows.assign(clipped=rows[["val_loss", "initial_loss"]].min(axis=1))
    losses = rows.pivot(index="lr", columns="seed", values="clipped").reindex(sorted(rates))
    if len(rates) < 2 or losses.isna().any(axis=None) or not rows.groupby("seed")["val_loss"].count().all():
        return math.nan
    weights = np.gradient(np.log(losses.index))
    return float((np.average(losses, axis=0, weights=weights) - losses.min()).mean())


# --- survival and throughput -------------------------------------------------------------------------------------


def survival(table: pd.DataFrame) -> pd.DataFrame:
    """Which share of the runs of a group at a learning rate has not collapsed by a step: the Kaplan-Meier estimate.

    A run that did not collapse is censored at its last step: stable so far, not proven stable.

    Returns:
        group, lr, step, share, low and high, with an interval at `LEVEL` by Greenwood's formula for log(-log S).
    """
    curves = []
    for (group, lr), rows in table.groupby(["group", "lr"], sort=False):
        ends = rows["collapsed_at"].astype(float)
        sample = stats.CensoredData(uncensored=ends.dropna(), right=rows["steps"][ends.isna()])
        estimate = stats.ecdf(sample).sf
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # there is none at the ends
            interval = estimate.confidence_interval(LEVEL, method="log-log")
        curve = pd.DataFrame({"step": estimate.quantiles, "share": estimate.probabilities})
        curve["low"], curve["high"] = interval.low.probabilities, interval.high.probabilities
        curve = pd.concat([pd.DataFrame([dict.fromkeys(curve, 1.0) | {"step": 0}]), curve], ignore_index=True)
        curve.loc[curve["share"] == 1, ["low", "high"]] = 1.0
        curve.loc[curve["share"] == 0, "low"] = 0.0
        curves.append(curve.ffill().assign(group=group, lr=lr))
    return pd.concat(curves, ignore_index=True)


class Overhead(NamedTuple):
    """Throughput T(P) = `limit` / (1 + `ratio`/P) against the period P (arXiv 2602.01734, App. A.4).

    `limit` is in steps per second, `ratio` the time of one application in steps, `error` the root mean square of the
    relative deviations from the fit.
    """

    limit: float
    ratio: float
    error: float


def fit_overhead(periods: Sequence[float], steps_per_second: Sequence[float]) -> Overhead:
    """Fits it by least squares on relative deviations of 1/T, which is linear in 1/P, at two periods or more."""
    t, x = np.asarray(steps_per_second, dtype=float), 1 / np.asarray(periods, dtype=float)
    application, step = np.polyfit(x, 1 / t, 1, w=t)
    deviations = t * (step + application * x) - 1
    return Overhead(float(1 / step), float(application / step), float(np.sqrt(np.mean(deviations**2))))


def overheads(table: pd.DataFrame) -> dict[Group, Overhead]:
    """The fit for each arm, with its other factors, that ran to the end with at least two periods.

    A fit that is worse than `WORST_FIT`, or sees no cost, says nothing and is left out.
    """
    periods = factors_of(table["group"]).reindex(columns=["period"])
    rows = table[table["diverged_at"].isna()].join(periods).dropna(subset="period")
    others = [Group(g.arm, tuple(f for f in g.factors if f[0] != "period")) for g in rows["group"]]
    parts = [(g, part) for g, part in rows.groupby(others, sort=False) if part["period"].nunique() > 1]
    fits = {g: fit_overhead(part["period"], part["steps_per_second"]) for g, part in parts}
    return {group: fit for group, fit in fits.items() if fit.error <= WORST_FIT and fit.ratio > 0.01}
