"""Estimators of the stability frontier, on synthetic runs whose boundary is known."""

import math
import random
from statistics import mean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msign_lightning.ablations.cell import Group, Outcome
from msign_lightning.ablations.frontier import (
    Boundary,
    Run,
    SeedBoundary,
    _t_quantile,
    fit_overhead,
    frontier,
    paired_differences,
    survival,
)
from msign_lightning.ablations.sampler import Interval, Probe, SearchedCell, next_probes

GROUP = Group("msign", (("period", 20),))
OUTCOME = Outcome(
    val_loss=2.0,
    initial_loss=5.0,
    best_loss=2.0,
    final_loss=2.0,
    diverged_at=None,
    collapsed_at=None,
    spikes=0,
    max_grad_norm=1.0,
    stable_rank=3.0,
    steps=300,
    tokens_per_second=1e4,
    seconds=9.0,
    curve=((300, 2.0),),
)
DIVERGED = OUTCOME._replace(val_loss=None, final_loss=None, diverged_at=100, collapsed_at=90)


def result(lr, stable=True, *, seed=0, group=GROUP, **outcome):
    base = OUTCOME if stable else DIVERGED
    return Run(group.cell(lr, seed), base._replace(**outcome), stable)


def on_grid(stable, seeds, points):
    rates = [10 ** (-3 + 3 * i / (points - 1)) for i in range(points)]
    return [result(lr, stable(math.log10(lr), seed), seed=seed) for seed in range(seeds) for lr in rates]


def by_bisection(stable, seeds):
    """Runs that `next_probes` asks for, and that no seed has more than six of."""
    cells = [SearchedCell({"seed": seed}, Interval(1e-3, 1.0)) for seed in range(seeds)]
    while any(proposals := next_probes(cells)):
        seed, lr = next((seed, proposal.value) for seed, proposal in enumerate(proposals) if proposal)
        probe = Probe(lr, stable(math.log10(lr), seed))
        cells[seed] = cells[seed]._replace(probes=(*cells[seed].probes, probe))
    assert all(len(cell.probes) <= 6 for cell in cells)
    return [result(p.value, p.stable, seed=seed) for seed, cell in enumerate(cells) for p in cell.probes]


@given(thetas=st.lists(st.floats(-2.9, -0.1), min_size=1, max_size=5))
@settings(deadline=None, derandomize=True)
def test_bisection_and_grid_find_the_median_of_the_seeds_boundaries(thetas):
    def stable(x, seed):
        return x < thetas[seed]

    middle = sorted(thetas)
    median = (middle[(len(thetas) - 1) // 2] + middle[len(thetas) // 2]) / 2
    runs = by_bisection(stable, len(thetas))
    assert len(runs) <= 6 * len(thetas)
    grid = on_grid(stable, len(thetas), 31)
    for (boundary,) in (frontier(runs), frontier(grid)):
        assert boundary.status == "bracketed"
        assert boundary.group == GROUP
        assert not boundary.non_monotone
        assert boundary.n_seeds == len(thetas)
        assert math.log10(boundary.lr_max) == pytest.approx(median, abs=0.051)
        assert boundary.low <= boundary.lr_max <= boundary.high
        assert math.log10(boundary.low) <= min(thetas) <= math.log10(boundary.low) + 0.101
        assert math.log10(boundary.high) - 0.101 <= max(thetas) <= math.log10(boundary.high)
        for seed in boundary.seeds:
            assert math.log10(seed.low) <= thetas[seed.seed] <= math.log10(seed.high)


@pytest.mark.parametrize("design", [by_bisection, lambda stable, seeds: on_grid(stable, seeds, 7)])
@pytest.mark.parametrize("between, within", [(0.2, 0.0), (0.0, 0.1), (0.2, 0.1)])
def test_intervals_hold_the_boundary_as_often_as_they_say(design, between, within):
    """Boundaries that differ between seeds, runs near them that are stable by chance alone, and both."""
    rng = random.Random(0)
    repetitions = 150
    for n in (2, 3, 5):
        hits = 0
        for _ in range(repetitions):
            lr_max = rng.uniform(-2.3, -0.7)
            thetas = [rng.gauss(lr_max, between) for _ in range(n)]

            def stable(x, seed, thetas=thetas):
                chance = rng.random()
                return x < thetas[seed] + (within * math.log(chance / (1 - chance)) if within else 0)

            (boundary,) = frontier(design(stable, n))
            assert boundary.confidence == 1 - 2 ** (1 - n)
            hits += boundary.low <= 10**lr_max <= boundary.high
        level = boundary.confidence
        assert hits / repetitions > level - 2 * math.sqrt(level * (1 - level) / repetitions)


def test_an_interval_of_many_seeds_leaves_out_the_extremes():
    thetas = [-1.495 + 0.02 * i for i in range(20)]
    (boundary,) = frontier(on_grid(lambda x, seed: x < thetas[seed], 20, 301))
    assert boundary.confidence == pytest.approx(0.9586, abs=1e-4)  # 1 - 2 P(Bin(20, ½) < 6)
    assert math.log10(boundary.low) == pytest.approx(thetas[5] - 0.005)
    assert math.log10(boundary.high) == pytest.approx(thetas[14] + 0.005)


def test_one_seed_says_nothing_about_others():
    (boundary,) = frontier([result(0.01), result(0.04, False)])
    assert boundary.confidence == 0
    assert (boundary.low, boundary.high, boundary.n_seeds, boundary.n_runs) == (0.01, 0.04, 1, 2)
    assert boundary.lr_max == pytest.approx(0.02)


def test_stable_or_unstable_everywhere_gives_a_one_sided_interval():
    def everywhere(stable):
        (boundary,) = frontier(by_bisection(lambda x, seed: stable, 3))
        return boundary

    high = everywhere(True)
    assert (high.status, high.lr_max, high.low, high.high) == ("all_stable", 1.0, 1.0, math.inf)
    low = everywhere(False)
    assert low.status == "all_unstable"
    assert (low.lr_max, low.low, low.high) == (pytest.approx(1e-3), 0.0, 1e-3)
    assert low.best_lr is None
    assert low.best_loss == 5.0


def test_the_median_seed_decides_whether_the_boundary_is_bracketed():
    def of(*seeds):
        runs = [result(lr, stable, seed=i) for i, outcomes in enumerate(seeds) for lr, stable in outcomes.items()]
        (boundary,) = frontier(runs)
        return boundary

    bracketed, stable = {0.01: True, 0.02: False}, {0.01: True, 0.02: True}
    unstable = {0.01: False, 0.02: False}
    most = of(bracketed, bracketed, stable)
    assert (most.status, most.low, most.high) == ("bracketed", 0.01, math.inf)
    assert most.lr_max == pytest.approx(math.sqrt(0.01 * 0.02))
    assert of(bracketed, stable, stable).status == "all_stable"
    assert of(bracketed, stable, stable).lr_max == pytest.approx(0.02)
    assert of(bracketed, unstable, unstable).status == "all_unstable"
    torn = of(stable, unstable)
    assert (torn.status, torn.low, torn.high) == ("bracketed", 0.0, math.inf)
    assert torn.lr_max == pytest.approx(math.sqrt(0.01 * 0.02))


def test_seeds_that_are_not_monotone_are_named_and_widen_the_interval():
    rates = [0.001, 0.003, 0.01, 0.03, 0.1]
    rows = {0: [1, 1, 1, 0, 0], 1: [1, 0, 1, 0, 0], 2: [1, 1, 0, 0, 1], 3: [0, 0, 0, 0, 1]}
    runs = [result(lr, bool(s), seed=seed) for seed, row in rows.items() for lr, s in zip(rates, row, strict=True)]
    (boundary,) = frontier(runs)
    assert boundary.non_monotone == (
        SeedBoundary(1, 0.001, 0.03, (0.003, 0.01)),  # one run is wrong, either at 0.003 or at 0.01
        SeedBoundary(2, 0.003, 0.01, (0.01, 0.1)),
        SeedBoundary(3, 0.0, 0.001, (0.001, 0.1)),
    )
    assert (boundary.low, boundary.high) == (0.0, 0.03)
    (torn,) = frontier([result(0.01, False), result(0.04)])
    assert torn.seeds == (SeedBoundary(0, 0.0, math.inf, (0.01, 0.04)),)
    assert torn.lr_max == pytest.approx(0.02)


def test_groups_are_kept_apart_and_in_order():
    other = Group("adamw")
    runs = [result(0.01, group=other), result(0.02), result(0.3, False, group=other), result(0.4, False)]
    assert [(b.group, b.low, b.high) for b in frontier(iter(runs))] == [(other, 0.01, 0.3), (GROUP, 0.02, 0.4)]
    assert [s.group for s in survival(iter(runs))] == [other, GROUP]
    assert frontier([]) == []


# Losses


def test_lr_sensitivity_of_a_grid_is_the_papers_mean():
    losses = [3.1, 2.4, 2.0, 2.2, 4.9, 7.0, None]
    rates = [3e-4 * 10 ** (i / 2) for i in range(7)]
    runs = [result(lr, val_loss=loss) for lr, loss in zip(rates, losses, strict=True)]
    runs += [r._replace(cell=GROUP.cell(r.cell.lr, 1), outcome=r.outcome._replace(val_loss=2.5)) for r in runs]
    (boundary,) = frontier(runs)
    expected = mean([3.1, 2.4, 2.0, 2.2, 4.9, 5.0, 5.0]) - 2.0
    assert boundary.lr_sensitivity == pytest.approx((expected + 0) / 2)
    assert boundary.best_loss == pytest.approx((2.0 + 2.5) / 2)
    assert boundary.best_lr == pytest.approx(3e-4)  # the lower of 3e-4 (all are equal) and 3e-3


def test_lr_sensitivity_does_not_depend_on_where_runs_are_dense():
    rates = [10 ** (-3 + i / 4) for i in range(13)]
    dense = [0.1 * 1.002**i for i in range(1, 20)]
    (even,) = frontier([result(lr, val_loss=2.0 if lr < 0.1 else 4.0) for lr in rates])
    (uneven,) = frontier([result(lr, val_loss=2.0 if lr < 0.1 else 4.0) for lr in [*rates, *dense]])
    assert even.lr_sensitivity == pytest.approx(2 * 5 / 13)
    assert uneven.lr_sensitivity == pytest.approx(even.lr_sensitivity, abs=0.03)


def test_lr_sensitivity_needs_two_learning_rates():
    (boundary,) = frontier([result(0.01), result(0.1, seed=1)])
    assert boundary.lr_sensitivity is None


def test_a_seed_that_always_diverged_has_no_lr_sensitivity():
    (boundary,) = frontier([result(lr, stable=False, val_loss=None) for lr in (0.01, 0.1)])
    assert boundary.lr_sensitivity is None
    assert boundary.best_lr is None


def test_survival_is_kaplan_meiers():
    """The worked example of textbooks: remission times, some of them censored (Freireich et al., 1963)."""
    collapsed = [6, 6, 6, 7, 10, 13, 16, 22, 23]
    censored = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    runs = [result(0.01, False, collapsed_at=step) for step in collapsed]
    runs += [result(0.01, steps=step) for step in censored]
    (curve,) = survival(runs)
    assert curve.steps == (0, 6, 7, 10, 13, 16, 22, 23, 300)
    published = (1, 0.857, 0.807, 0.753, 0.690, 0.627, 0.538, 0.448, 0.448)
    assert curve.survival == pytest.approx(published, abs=6e-4)
    assert (curve.low[1], curve.high[1]) == pytest.approx((0.620, 0.952), abs=6e-4)
    assert (curve.low[-1], curve.high[-1]) == pytest.approx((0.188, 0.680), abs=6e-4)
    assert (curve.n_runs, curve.n_collapsed) == (21, 9)


def test_a_run_that_diverged_has_collapsed_and_one_that_ended_early_is_censored():
    diverged = result(0.1, False, collapsed_at=None, diverged_at=120, steps=120)
    (curve,) = survival([diverged, result(0.1, seed=1, steps=50), result(0.1, seed=2)])
    assert curve.steps == (0, 120, 300)
    assert curve.survival == (1, 0.5, 0.5)
    (all_of_them,) = survival([diverged, diverged])
    assert (all_of_them.steps, all_of_them.survival) == ((0, 120), (1, 0))
    assert (all_of_them.low, all_of_them.high) == ((1, 0), (1, 1))
    (none,) = survival([result(0.1)])
    assert (none.steps, none.survival, none.low) == ((0, 300), (1, 1), (1, 1))


@pytest.mark.parametrize(
    "degrees, quantile",
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (30, 2.04227), (100, 1.98397)],
)
def test_quantiles_of_students_t(degrees, quantile):
    assert _t_quantile(0.975, degrees) == pytest.approx(quantile, rel=2e-6)


def test_paired_differences_and_their_interval():
    adamw, qk_norm = Group("adamw", (("model.qk_norm", False),)), Group("adamw", (("model.qk_norm", True),))
    msign = Group("msign", (("model.qk_norm", True), ("period", 20)))
    ours, theirs = [2.0, 2.1, 1.9, 2.05], [2.2, 2.15, 2.0, 2.0]
    runs = [result(0.1, group=msign, seed=i, val_loss=loss) for i, loss in enumerate(ours)]
    runs += [result(0.1, group=qk_norm, seed=i, val_loss=loss) for i, loss in enumerate(theirs)]
    runs += [result(0.1, group=adamw, seed=i, val_loss=0.0) for i in range(4)]
    runs += [result(0.1, group=qk_norm, seed=9), result(0.1, group=msign, seed=8), result(0.2, group=msign)]
    (difference,) = paired_differences(runs, "adamw")
    deltas = [a - b for a, b in zip(ours, theirs, strict=True)]
    half = 3.18245 * stdev(deltas) / 2
    assert (difference.group, difference.lr) == (msign, 0.1)
    assert difference.mean == pytest.approx(mean(deltas))
    assert (difference.low, difference.high) == pytest.approx((mean(deltas) - half, mean(deltas) + half), rel=1e-5)
    assert (difference.n_better, difference.n_worse, difference.n_finite, difference.n_unpaired) == (3, 1, 4, 1)


@given(st.lists(st.tuples(*[st.none() | st.sampled_from([1.0, 2.0, 3.0])] * 2), min_size=1, max_size=8))
@settings(deadline=None, derandomize=True)
def test_diverged_runs_are_counted_in_pairs(pairs):
    groups = (GROUP, Group("adamw"))
    runs = [
        result(0.1, seed=seed, group=group, val_loss=loss)
        for seed, losses in enumerate(pairs)
        for group, loss in zip(groups, losses, strict=True)
    ]
    (d,) = paired_differences(runs, "adamw")
    ours, theirs = ([math.inf if loss is None else loss for loss in losses] for losses in zip(*pairs, strict=True))
    both = list(zip(ours, theirs, strict=True))
    assert d.n_better == sum(a < b for a, b in both)
    assert d.n_worse == sum(a > b for a, b in both)
    assert d.n_both_diverged == pairs.count((None, None))
    assert d.n_better + d.n_worse + d.n_equal + d.n_both_diverged == len(pairs)
    assert d.n_finite + d.n_diverged + d.n_baseline_diverged + d.n_both_diverged == len(pairs)
    assert (d.mean is None) == (d.n_finite == 0)
    assert (d.low is None) == (d.high is None) == (d.n_finite < 2)


def test_an_unknown_baseline_is_an_error():
    with pytest.raises(ValueError, match=r"baseline must be an arm with runs, \['msign'\], got 'adam'"):
        paired_differences([result(0.1)], "adam")


# Throughput


@given(limit=st.floats(1, 1e6), ratio=st.floats(0, 1e3))
@settings(deadline=None, derandomize=True)
def test_overhead_is_recovered(limit, ratio):
    periods = [5, 20, 100, math.inf]
    fit = fit_overhead(periods, [limit / (1 + ratio / period) for period in periods])
    assert (fit.limit, fit.ratio) == pytest.approx((limit, ratio), rel=1e-6, abs=1e-9)
    assert fit(50) == pytest.approx(limit / (1 + ratio / 50))
    assert fit.error < 1e-9


def test_overhead_of_the_papers_table_3():
    fit = fit_overhead([10, 100, 1000, 10_000], [18_236, 24_559, 25_082, 25_270])
    assert fit.limit == pytest.approx(25_350, rel=0.005)
    assert fit.ratio == pytest.approx(3.9, abs=0.05)
    assert 0.001 < fit.error < 0.01


@pytest.mark.parametrize(
    "periods, throughput, message",
    [
        ([10, 10], [1.0, 2.0], r"periods must hold two or more, and one for each throughput, got \[10, 10\]"),
        ([10, 20], [1.0], "one for each throughput"),
        ([10, 20], [1.0, 0.0], "must be positive, got 0.0"),
        ([0, 20], [1.0, 2.0], "must be positive, got 0"),
    ],
)
def test_throughput_that_can_not_be_fitted(periods, throughput, message):
    with pytest.raises(ValueError, match=message):
        fit_overhead(periods, throughput)


def test_results_are_plain_values():
    (boundary,) = frontier(by_bisection(lambda x, seed: x < -1, 2))
    assert isinstance(boundary, Boundary)
    numbers = [value for value in boundary if isinstance(value, (int, float))]
    assert len(numbers) == 8
    assert {type(value) for value in numbers} == {int, float}
