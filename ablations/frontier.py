"""From the runs of a study to where training is stable, in plain NamedTuples; nothing is drawn here.

Losses are in nats per token. Every interval names the level it has, or has `LEVEL`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise
from statistics import NormalDist, fmean, median, median_low, stdev
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from msign_lightning.ablations.cell import Cell, Group, Outcome
from msign_lightning.ablations.sampler import bracket

LEVEL = 0.95

Status = Literal["bracketed", "all_stable", "all_unstable"]
_Key = TypeVar("_Key", bound=Hashable)


class Run(NamedTuple):
    """A finished training run: which cell, what it gave, and whether it counts as stable."""

    cell: Cell
    outcome: Outcome
    stable: bool


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
        best_loss: Mean over seeds of the lowest validation loss, at most the initial loss.
        best_lr: Median over seeds of the learning rate that gave it, the lower of two; None if all runs diverged.
        lr_sensitivity: Mean over seeds of E min(ℓ(η), ℓ₀) - ℓ*, with ℓ the validation loss, ℓ₀ the initial one and ℓ*
            the best (arXiv 2309.14322). A grid's learning rates η weigh the same; others by the part of the logarithmic
            scale that is nearest to them. Compare it only where the same learning rates were tried. None if each seed
            was tried at one alone, or a seed diverged at all.
    """

    group: Group
    lr_max: float
    low: float
    high: float
    confidence: float
    status: Status
    seeds: tuple[SeedBoundary, ...]
    n_runs: int
    best_loss: float
    best_lr: float | None
    lr_sensitivity: float | None

    @property
    def n_seeds(self) -> int:
        """Number of seeds."""
        return len(self.seeds)

    @property
    def non_monotone(self) -> tuple[SeedBoundary, ...]:
        """The seeds with a stable run above an unstable one."""
        return tuple(seed for seed in self.seeds if seed.reversal is not None)


def frontier(runs: Iterable[Run]) -> list[Boundary]:
    """Where training is stable in each group, from a bisection or a grid; groups in the order of their first run."""
    return [_boundary(group, members) for group, members in _by((run.cell.group, run) for run in runs).items()]


def _by(pairs: Iterable[tuple[_Key, Run]]) -> dict[_Key, list[Run]]:
    groups: dict[_Key, list[Run]] = {}
    for key, run in pairs:
        groups.setdefault(key, []).append(run)
    return groups


def _boundary(group: Group, runs: Sequence[Run]) -> Boundary:
    by_seed = dict(sorted(_by((run.cell.seed, run) for run in runs).items()))
    seeds = tuple(_seed_boundary(seed, members) for seed, members in by_seed.items())
    is_unbounded_below = median(_log(seed.low) for seed in seeds) == -math.inf
    is_unbounded_above = median(seed.high for seed in seeds) == math.inf
    status: Status = "bracketed"
    if is_unbounded_below != is_unbounded_above:
        status = "all_stable" if is_unbounded_above else "all_unstable"
    k, confidence = _order_statistic(len(seeds))
    best = [min((_clipped_loss(run.outcome), run.cell.lr, run) for run in members)[2] for members in by_seed.values()]
    best_lrs = [run.cell.lr for run in best if run.outcome.val_loss is not None]
    sensitivities = [s for members in by_seed.values() if (s := _lr_sensitivity(members)) is not None]
    return Boundary(
        group=group,
        lr_max=10 ** median(_middle(seed) for seed in seeds),
        low=sorted(seed.low for seed in seeds)[k - 1],
        high=sorted(seed.high for seed in seeds)[-k],
        confidence=confidence,
        status=status,
        seeds=seeds,
        n_runs=len(runs),
        best_loss=fmean(_clipped_loss(run.outcome) for run in best),
        best_lr=median_low(best_lrs) if best_lrs else None,
        lr_sensitivity=fmean(sensitivities) if sensitivities and len(best_lrs) == len(seeds) else None,
    )


def _seed_boundary(seed: int, runs: Sequence[Run]) -> SeedBoundary:
    low, high = bracket((run.cell.lr, run.stable) for run in runs)
    stable = max((run.cell.lr for run in runs if run.stable), default=0.0)
    unstable = min((run.cell.lr for run in runs if not run.stable), default=math.inf)
    return SeedBoundary(seed, max(low, 0.0), high, (unstable, stable) if unstable < stable else None)


def _middle(seed: SeedBoundary) -> float:
    """Logarithm of the middle of the bracket, or of the end that it has."""
    ends = [end for end in (seed.low, seed.high) if 0 < end < math.inf] or seed.reversal or ()
    return fmean(map(math.log10, ends))


def _log(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf


def _order_statistic(n: int) -> tuple[int, float]:
    """Largest k, at least 1, for which k-th lowest and highest of n enclose the median at `LEVEL`; their level."""
    levels = []
    for k in range(1, n // 2 + 2):
        levels.append(1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n)
    k = max((k for k, level in enumerate(levels, start=1) if level >= LEVEL), default=1)
    return k, levels[k - 1]


def _clipped_loss(outcome: Outcome) -> float:
    """min(ℓ, ℓ₀)."""
    return outcome.initial_loss if outcome.val_loss is None else min(outcome.val_loss, outcome.initial_loss)


def _lr_sensitivity(runs: Sequence[Run]) -> float | None:
    """That of one seed."""
    by_lr = sorted(_by((run.cell.lr, run) for run in runs).items())
    if len(by_lr) < 2:
        return None
    losses = [fmean(_clipped_loss(run.outcome) for run in members) for _, members in by_lr]
    gaps = [math.log(b / a) for (a, _), (b, _) in pairwise(by_lr)]
    weights = [a + b for a, b in pairwise([gaps[0], *gaps, gaps[-1]])]
    return float(np.average(losses, weights=weights)) - min(losses)


class Survival(NamedTuple):
    """Which share of a group's runs has not collapsed by a step: the Kaplan-Meier estimate.

    A run that did not collapse is censored at its last step: stable so far, not proven stable.

    Attributes:
        group: The cells; over all of their learning rates, so compare groups that have the same.
        steps: 0, the steps at which runs collapsed, and the last step of the longest run.
        survival: Share from each of these steps on.
        low: Lower end of its interval at `LEVEL`, by Greenwood's formula for log(-log S).
        high: Upper end.
        n_runs: Number of runs.
        n_collapsed: Number of them that collapsed.
    """

    group: Group
    steps: tuple[int, ...]
    survival: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    n_runs: int
    n_collapsed: int


def survival(runs: Iterable[Run]) -> list[Survival]:
    """The share of runs that has not collapsed, over steps; for each group, in the order of their first run."""
    return [_survival(group, members) for group, members in _by((run.cell.group, run) for run in runs).items()]


def _survival(group: Group, runs: Sequence[Run]) -> Survival:
    collapsed = [step for run in runs if (step := _collapse(run.outcome)) is not None]
    ends = [run.outcome.steps if (step := _collapse(run.outcome)) is None else step for run in runs]
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    points = [(0, 1.0, 1.0, 1.0)]
    share, variance = 1.0, 0.0
    for step in sorted(set(collapsed)):
        at_risk = sum(end >= step for end in ends)
        events = collapsed.count(step)
        share *= 1 - events / at_risk
        if events == at_risk:
            points.append((step, 0.0, 0.0, points[-1][3]))
            break
        variance += events / (at_risk * (at_risk - events))
        spread = math.exp(z * math.sqrt(variance) / -math.log(share))
        points.append((step, share, share**spread, share ** (1 / spread)))
    last = max(run.outcome.steps for run in runs)
    if last > points[-1][0]:
        points.append((last, *points[-1][1:]))
    steps, shares, low, high = zip(*points, strict=True)
    return Survival(group, steps, shares, low, high, len(runs), len(collapsed))


def _collapse(outcome: Outcome) -> int | None:
    return outcome.diverged_at if outcome.collapsed_at is None else outcome.collapsed_at


class PairedDifference(NamedTuple):
    """Validation loss of a group minus that of the baseline with the same learning rate and seed.

    Every run that has a partner is in exactly one of `n_better`, `n_worse`, `n_equal` and `n_both_diverged`: where one
    of the two diverged, it is the worse. `mean` knows only the pairs without divergence.

    Attributes:
        group: The cells.
        lr: Their learning rate.
        mean: Mean difference over the seeds for which neither diverged, negative where the group is better; None if
            there is none.
        low: Lower end of Student's t interval at `LEVEL`; None for fewer than two such seeds.
        high: Upper end.
        n_finite: Number of seeds for which neither diverged.
        n_better: Number of seeds for which the group is better.
        n_worse: Number of seeds for which the baseline is better.
        n_equal: Number of seeds for which both are the same to the last bit.
        n_diverged: Number of seeds for which the group alone diverged; they are in `n_worse`.
        n_baseline_diverged: Number of seeds for which the baseline alone diverged; they are in `n_better`.
        n_both_diverged: Number of seeds for which both did.
        n_unpaired: Number of the group's runs for which the baseline has none.
    """

    group: Group
    lr: float
    mean: float | None
    low: float | None
    high: float | None
    n_finite: int
    n_better: int
    n_worse: int
    n_equal: int
    n_diverged: int
    n_baseline_diverged: int
    n_both_diverged: int
    n_unpaired: int


def paired_differences(runs: Sequence[Run], baseline: str) -> list[PairedDifference]:
    """Differences from an arm at each learning rate, for each group of another arm that shares runs with it.

    Args:
        runs: Those of all arms.
        baseline: Name of the arm. Where it has several groups, each run's partner has the same values of the factors
            that concern the baseline.

    Raises:
        ValueError: No run is of the baseline.
    """
    partners = {(run.cell.factors, run.cell.seed): run.outcome for run in runs if run.cell.arm == baseline}
    if not partners:
        raise ValueError(f"baseline must be an arm with runs, {sorted({r.cell.arm for r in runs})}, got {baseline!r}")
    names = {name for factors, _ in partners for name, _ in factors}

    def partner(cell: Cell) -> Outcome | None:
        return partners.get((tuple(factor for factor in cell.factors if factor[0] in names), cell.seed))

    others = [run for run in runs if run.cell.arm != baseline]
    differences = []
    for (group, lr), members in _by(((run.cell.group, run.cell.lr), run) for run in others).items():
        pairs = [(run.outcome, other) for run in members if (other := partner(run.cell)) is not None]
        if pairs:
            differences.append(_difference(group, lr, pairs, len(members) - len(pairs)))
    return differences


def _difference(group: Group, lr: float, pairs: Sequence[tuple[Outcome, Outcome]], unpaired: int) -> PairedDifference:
    losses = [(ours.val_loss, theirs.val_loss) for ours, theirs in pairs]
    finite = [ours - theirs for ours, theirs in losses if ours is not None and theirs is not None]
    diverged = sum(ours is None and theirs is not None for ours, theirs in losses)
    baseline_diverged = sum(ours is not None and theirs is None for ours, theirs in losses)
    mean = fmean(finite) if finite else None
    low = high = None
    if mean is not None and len(finite) > 1:
        half = _t_quantile((1 + LEVEL) / 2, len(finite) - 1) * stdev(finite) / math.sqrt(len(finite))
        low, high = mean - half, mean + half
    return PairedDifference(
        group,
        lr,
        mean,
        low,
        high,
        n_finite=len(finite),
        n_better=baseline_diverged + sum(d < 0 for d in finite),
        n_worse=diverged + sum(d > 0 for d in finite),
        n_equal=sum(d == 0 for d in finite),
        n_diverged=diverged,
        n_baseline_diverged=baseline_diverged,
        n_both_diverged=len(losses) - len(finite) - diverged - baseline_diverged,
        n_unpaired=unpaired,
    )


def _t_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's t distribution above the median, from its finite series (Abramowitz and Stegun 26.7)."""

    def within(angle: float) -> float:
        """P(|t| < √degrees · tan angle)."""
        cos, sin = math.cos(angle), math.sin(angle)
        odd = degrees % 2
        term = cos if odd else 1.0
        total = 0.0
        for i in range(2 + odd, degrees + 1, 2):
            total += term
            term *= cos * cos * (i - 1) / i
        return 2 / math.pi * (angle + sin * total) if odd else sin * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 2 * p - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


class Overhead(NamedTuple):
    """Throughput T(P) = T∞ / (1 + r/P) against the period P (arXiv 2602.01734, App. A.4).

    Attributes:
        limit: T∞, tokens per second without applications.
        ratio: r, the time of one application in steps.
        error: Root mean square of the relative deviations from the fit.
    """

    limit: float
    ratio: float
    error: float

    def __call__(self, period: float) -> float:
        """Tokens per second at a period."""
        return self.limit / (1 + self.ratio / period)


def fit_overhead(periods: Sequence[float], tokens_per_second: Sequence[float]) -> Overhead:
    """Fits T(P) = T∞ / (1 + r/P) by least squares on relative deviations of 1/T, which is linear in 1/P.

    Args:
        periods: Periods P; infinite for runs without applications.
        tokens_per_second: Throughput T of each.

    Raises:
        ValueError: There are fewer than two periods, or a value is not positive.
    """
    if len(set(periods)) < 2 or len(periods) != len(tokens_per_second):
        raise ValueError(f"periods must hold two or more, and one for each throughput, got {list(periods)}")
    for value in (*periods, *tokens_per_second):
        if not value > 0:
            raise ValueError(f"periods and tokens_per_second must be positive, got {value}")
    t = np.asarray(tokens_per_second, dtype=float)
    design = np.stack([t, t / np.asarray(periods, dtype=float)], axis=1)
    (step, application), *_ = np.linalg.lstsq(design, np.ones_like(t))
    deviations = design @ [step, application] - 1
    return Overhead(float(1 / step), float(application / step), float(np.sqrt(np.mean(deviations**2))))
