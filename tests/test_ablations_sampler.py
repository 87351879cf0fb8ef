"""FrontierSampler: studies with a known boundary, through Optuna itself."""

import itertools
import math
import random
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from msign_lightning.ablations import FrontierSampler, frontier_of
from msign_lightning.ablations.sampler import Interval, Probe, bracket, next_probe
from tests.support import calls_of_functions

LOW, HIGH, RUNS = 1e-3, 1.0, 6
DECADES = Interval(LOW, HIGH, runs=RUNS)
SPACE = {"period": [10, 100], "seed": [0, 1, 2]}


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def search(stable, interval=DECADES, probes=()):
    """Probes a cell, one run at a time, until nothing is left."""
    probes = [*probes]
    while (value := next_probe(interval, probes)) is not None:
        probes.append(Probe(value, stable(value)))
    return probes


def log_bracket(probes):
    return bracket((math.log10(probe.value), probe.stable) for probe in probes)


def is_resolved(probes, interval=DECADES):
    low, high = bracket((interval.units(probe.value), probe.stable) for probe in probes)
    return high - low <= 1.0001 or low >= interval.units(interval.high) - 1e-6 or high <= 1e-6


@given(theta=st.floats(-3.3, 0.3), extra=st.lists(st.floats(-3.0, 0.0), max_size=2))
@example(theta=-0.05, extra=[])
@settings(deadline=None, derandomize=True)
def test_six_runs_find_what_a_grid_of_thirty_one_finds(theta, extra):
    def stable(value):
        return math.log10(value) < theta

    probes = search(stable)
    assert len(probes) <= RUNS
    assert is_resolved(probes)
    low, high = log_bracket(probes)
    assert low <= theta <= high

    grid = [10 ** (-3 + i / 10) for i in range(31)]
    grid_low, grid_high = log_bracket(Probe(value, stable(value)) for value in grid)
    assert max(low, grid_low) <= min(high, grid_high), "the brackets overlap"

    # Runs from elsewhere only help, as long as as many are left as without them.
    more = [Probe(10**x, stable(10**x)) for x in extra]
    assert is_resolved(search(stable, DECADES._replace(runs=RUNS + len(more)), more))


@given(theta=st.floats(-1.0, 5.0), runs=st.integers(3, 8), log=st.booleans())
@settings(deadline=None, derandomize=True)
def test_runs_suffice_for_an_interval_of_two_to_their_power_less_two_resolutions(theta, runs, log):
    interval = Interval(1.0, 1000.0, log=log, runs=runs)
    interval = interval._replace(resolution=(3 if log else 999) / (2**runs - 2))
    probes = search(lambda value: interval.units(value) < theta * 2**runs / 4, interval)
    assert len(probes) <= runs
    assert is_resolved(probes, interval)
    assert all(1 <= probe.value <= 1000 for probe in probes)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=12))
@settings(deadline=None, derandomize=True)
def test_bracket_is_the_hull_of_the_steps_that_contradict_the_fewest_runs(probes):
    def contradicted(step):
        return sum(stable != (value < step) for value, stable in probes)

    steps = [i - 0.5 for i in range(11)]
    fewest = min(map(contradicted, steps))
    best = [step for step in steps if contradicted(step) == fewest]
    low, high = bracket(probes)
    assert (max(low, -0.5), min(high, 9.5)) == (
        max([v for v, _ in probes if v < best[0]], default=-0.5),
        min([v for v, _ in probes if v > best[-1]], default=9.5),
    )


def test_what_is_stable_beyond_an_unstable_island_is_noticed():
    def stable(value):
        return not 0.02 < value < 0.05 and value < 0.7

    probes = search(stable)
    lowest_unstable = min(probe.value for probe in probes if not probe.stable)
    assert any(probe.stable and probe.value > lowest_unstable for probe in probes)


# Through Optuna


def frontier_sampler(space=SPACE, **settings):
    return FrontierSampler(space, **{"low": LOW, "high": HIGH, **settings})


THETA = {(period, seed): -1.7 + 0.5 * (period == 10) + 0.07 * seed for period in (10, 100) for seed in range(3)}


def excess(trial):
    """Suggests a cell and a learning rate, and says by how much that is above the boundary."""
    period = trial.suggest_categorical("period", [10, 100])
    seed = trial.suggest_int("seed", 0, 2)
    return math.log10(trial.suggest_float("lr", LOW, HIGH, log=True)) - THETA[period, seed]


def run(trial):
    trial.set_constraint("unstable", excess(trial))
    return 0.0


def probes_of(study, names=("period", "seed")):
    cells = {}
    for trial in study.get_trials(states=(TrialState.COMPLETE,)):
        probe = Probe(trial.params["lr"], all(value <= 0 for value in trial.constraints.values()))
        cells.setdefault(tuple(trial.params.get(name) for name in names), []).append(probe)
    return cells


def check(study):
    cells = probes_of(study)
    assert cells.keys() == THETA.keys()
    for key, probes in cells.items():
        assert len(probes) <= RUNS
        assert is_resolved(probes)
        low, high = log_bracket(probes)
        assert low <= THETA[key] <= high
    return cells


def test_a_study_resolves_all_cells_and_stops():
    study = optuna.create_study(sampler=frontier_sampler())
    study.optimize(run)
    cells = check(study)
    assert study.sampler.is_exhausted(study)
    order = [(trial.params["period"], trial.params["seed"]) for trial in study.trials]
    assert [key for key, _ in itertools.groupby(order)] == list(cells), "what has begun is finished first"


def test_it_goes_on_from_the_trials_alone(tmp_path):
    backend = JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
    optuna.create_study(study_name="s", storage=backend)
    for _ in range(100):
        again = JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
        study = optuna.load_study(study_name="s", storage=again, sampler=frontier_sampler())
        if study.sampler.is_exhausted(study):
            break
        killed = study.ask()
        killed.suggest_categorical("period", [10, 100])
        study.tell(killed.number, state=TrialState.FAIL)
        study.optimize(run, n_trials=1)
    check(study)


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_take_other_cells_and_keep_to_the_runs(workers):
    rng = random.Random(workers)
    study = optuna.create_study(sampler=frontier_sampler())
    running = {}
    while True:
        while len(running) < workers and not study.sampler.is_exhausted(study):
            trial = study.ask()
            value = excess(trial)
            cell = (trial.params["period"], trial.params["seed"])
            if len(study.trials) <= workers:
                assert cell not in [(t.params["period"], t.params["seed"]) for t, _ in running.values()]
            running[trial.number] = (trial, value)
        if not running:
            break
        trial, value = running.pop(rng.choice(list(running)))
        trial.set_constraint("unstable", value)
        study.tell(trial, 0.0)
    cells = probes_of(study)
    assert cells.keys() == THETA.keys()
    for key, probes in cells.items():
        low, high = log_bracket(probes)
        assert low <= THETA[key] <= high
        assert len(probes) <= RUNS
        assert high - low < 0.4, "at the end workers speculate, since there are more of them than cells"


def test_a_second_worker_on_a_single_cell_helps_whatever_the_first_finds():
    for first in (True, False):
        study = optuna.create_study(sampler=frontier_sampler({}))
        trials = [study.ask() for _ in range(2)]
        a, b = (trial.suggest_float("lr", LOW, HIGH, log=True) for trial in trials)
        assert a < b
        theta = -0.9 if first else -2.1
        for trial, lr in zip(trials, (a, b), strict=True):
            trial.set_constraint("unstable", math.log10(lr) - theta)
            study.tell(trial, lr)

        def objective(trial, theta=theta):
            lr = trial.suggest_float("lr", LOW, HIGH, log=True)
            trial.set_constraint("unstable", math.log10(lr) - theta)
            return lr

        study.optimize(objective)
        (probes,) = probes_of(study, ()).values()
        assert len(probes) <= RUNS
        assert is_resolved(probes)


def test_a_probe_beside_a_running_one_takes_another_place():
    finished, running = [Probe(0.01, True), Probe(0.5, False)], Probe(0.1, None)
    assert 0.01 < next_probe(DECADES, [*finished, running]) < 0.1
    assert next_probe(DECADES, [*finished, running] * 2) is None


def test_processes_share_a_study(tmp_path):
    storage = f"JournalStorage(JournalFileBackend({str(tmp_path / 'journal.log')!r}))"
    program = f"""
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from tests.test_ablations_sampler import frontier_sampler, run
optuna.create_study(study_name="s", storage={storage}, load_if_exists=True, sampler=frontier_sampler()).optimize(run)
"""
    root = Path(__file__).parent.parent
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=root) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    backend = JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
    cells = probes_of(optuna.load_study(study_name="s", storage=backend))
    assert cells.keys() == THETA.keys()
    for key, probes in cells.items():  # some may have been chosen by both at the same moment
        low, high = log_bracket(probes)
        assert low <= THETA[key] <= high
        assert high - low < 1


def test_a_failed_trial_is_asked_for_again_and_does_not_count():
    study = optuna.create_study(sampler=frontier_sampler())

    def objective(trial):
        distance = excess(trial)
        if trial.number % 3 == 0:
            raise RuntimeError
        trial.set_constraint("unstable", distance)
        return 0.0

    study.optimize(objective, catch=RuntimeError)
    check(study)
    trials = study.trials
    failed = [trial.number for trial in trials if trial.state == TrialState.FAIL]
    assert len(failed) > len(trials) / 4
    begun = [n for n in failed if n and trials[n - 1].params["seed"] == trials[n + 1].params["seed"]]
    assert begun
    for n in begun:
        assert trials[n].params == trials[n + 1].params


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_diverged_trial_may_return_nan(n_jobs):
    study = optuna.create_study(sampler=frontier_sampler())

    def objective(trial):
        return 0.0 if run(trial) == 0 and max(trial.constraints.values()) <= 0 else math.nan

    study.optimize(objective, n_jobs=n_jobs, n_trials=RUNS * len(THETA) + 1)
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE, TrialState.FAIL}
    assert study.sampler.is_exhausted(study)
    assert len(study.trials) <= RUNS * len(THETA)


def test_enqueued_trials_are_respected_and_count():
    study = optuna.create_study(sampler=frontier_sampler())
    study.enqueue_trial({"period": 100, "seed": 1, "lr": 0.017})
    study.enqueue_trial({"seed": 2})
    study.enqueue_trial({"seed": 2})
    study.optimize(run, n_trials=3)
    first, *others = (trial.params for trial in study.trials)
    assert first == {"period": 100, "seed": 1, "lr": 0.017}
    assert [params["seed"] for params in others] == [2, 2]
    assert len({params["period"] for params in others}) == 1, "the one that has begun is finished first"
    study.optimize(run)
    check(study)

    study.enqueue_trial({"period": 10, "seed": 0, "lr": 0.5})
    assert not study.sampler.is_exhausted(study)
    study.optimize(run)
    assert study.trials[-1].params == {"period": 10, "seed": 0, "lr": 0.5}


def test_enqueued_values_outside_of_the_search_space_are_respected_and_not_searched():
    study = optuna.create_study(sampler=frontier_sampler({"seed": [0, 1]}))

    def objective(trial):
        trial.suggest_int("seed", 0, 5)
        lr = trial.suggest_float("lr", LOW, HIGH, log=True)
        trial.set_constraint("unstable", lr - 0.2)
        return lr

    study.enqueue_trial({"seed": 3})
    study.enqueue_trial({"seed": 3, "lr": 0.1})
    study.optimize(objective)
    found = {f.params["seed"]: f for f in frontier_of(study)}
    assert (found[3].runs, found[3].low) == (2, 0.1)
    assert found.keys() == {0, 1, 3}
    assert all(found[seed].low <= 0.2 <= found[seed].high < found[seed].low * 10**0.1001 for seed in (0, 1))


def test_cells_that_a_trial_rules_out_are_given_up_at_once():
    def objective(trial):
        arm = trial.suggest_categorical("arm", ["adamw", "msign", "muon"])
        seed = trial.suggest_categorical("seed", [0, 1])
        keep = trial.suggest_float("keep", 0.1, 0.7, step=0.2)
        if arm == "muon" and seed == 1:
            raise optuna.TrialPruned
        lr = trial.suggest_float("lr", LOW, HIGH, log=True)
        trial.set_constraint("unstable", lr - 0.4 * keep)
        return lr

    space = {"seed": [0, 1], "keep": [0.1, 0.5], "arm": ["adamw", "msign", "muon"]}
    study = optuna.create_study(sampler=frontier_sampler(space))
    study.optimize(objective)
    cells = probes_of(study, ("arm", "seed", "keep"))
    ruled_out = {("muon", 1, 0.1), ("muon", 1, 0.5)}
    assert cells.keys() == {*itertools.product(["adamw", "msign", "muon"], [0, 1], [0.1, 0.5])} - ruled_out
    for (_, _, keep), probes in cells.items():
        assert len(probes) <= RUNS
        low, high = log_bracket(probes)
        assert low <= math.log10(0.4 * keep) <= high
        assert high - low < 0.1001
    pruned = [trial.params for trial in study.trials if trial.state == TrialState.PRUNED]
    assert pruned == [{"arm": "muon", "seed": 1, "keep": keep} for keep in (0.1, 0.5)]


@pytest.mark.parametrize("limit, end", [(100.0, HIGH), (1e-9, LOW)])
def test_stable_or_unstable_everywhere_is_known_from_the_end(limit, end):
    def objective(trial):
        seed = trial.suggest_int("seed", 0, 1)
        lr = trial.suggest_float("lr", LOW, HIGH, log=True)
        trial.set_constraint("unstable", lr - limit)
        return seed

    study = optuna.create_study(sampler=frontier_sampler({"seed": [0, 1]}))
    study.optimize(objective)
    for probes in probes_of(study, ("seed",)).values():
        assert any(probe.value == pytest.approx(end, rel=0.2) for probe in probes)
        assert len(probes) <= RUNS


def test_a_linear_scale_is_bisected_in_its_own_units():
    def objective(trial):
        x = trial.suggest_float("x", -2.0, 3.0)
        trial.set_constraint("unstable", x - 0.77)
        return x

    study = optuna.create_study(sampler=FrontierSampler({}, "x", low=-2.0, high=3.0, log=False, resolution=0.125))
    study.optimize(objective)
    low, high = bracket((trial.params["x"], trial.constraints["unstable"] <= 0) for trial in study.trials)
    assert low <= 0.77 <= high
    assert high - low <= 0.125
    assert len(study.trials) <= RUNS


def test_what_is_asked_for_when_nothing_is_left_is_pruned():
    study = optuna.create_study(sampler=frontier_sampler())
    study.optimize(run)
    known = len(study.trials)
    study.optimize(run, n_trials=3)
    assert [trial.state for trial in study.trials[known:]] == [TrialState.PRUNED], "and then the study stops"
    check(study)


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_a_study_of_which_every_trial_fails_ends(n_jobs):
    def objective(trial):
        excess(trial)
        raise RuntimeError

    study = optuna.create_study(sampler=frontier_sampler())
    study.optimize(objective, catch=(RuntimeError,), n_jobs=n_jobs)
    assert RUNS * len(THETA) <= len(study.trials) < RUNS * len(THETA) + n_jobs


@pytest.mark.parametrize("n_jobs", [2, 4])
def test_threads_keep_to_the_runs_and_end(n_jobs):
    study = optuna.create_study(sampler=frontier_sampler())
    study.optimize(run, n_jobs=n_jobs)
    assert all(found.runs <= RUNS and found.high / found.low < 2 for found in frontier_of(study))
    assert len(frontier_of(study)) == len(THETA)


@pytest.mark.filterwarnings("ignore:PartialFixedSampler is experimental")
def test_what_a_partial_fixed_sampler_fixes_is_not_searched_over():
    sampler = frontier_sampler()
    study = optuna.create_study(sampler=optuna.samplers.PartialFixedSampler({"seed": 1}, sampler))
    study.optimize(run)
    assert [found.params for found in frontier_of(study)] == [{"period": 10, "seed": 1}, {"period": 100, "seed": 1}]
    assert all(found.high / found.low < 10**0.1001 for found in frontier_of(study))
    study.sampler = sampler
    study.optimize(run)
    check(study)


def test_the_work_for_a_trial_hardly_grows_with_their_number():
    """Optuna copies its list of trials two or three times, and that is all."""

    def calls_per_trial(periods):
        def objective(trial):
            trial.suggest_int("period", 1, periods)
            return run_lr(trial)

        def run_lr(trial):
            trial.set_constraint("unstable", trial.suggest_float("lr", LOW, HIGH, log=True) - 0.02)
            return 0.0

        study = optuna.create_study(sampler=frontier_sampler({"period": range(1, periods + 1)}))
        calls = calls_of_functions(lambda: study.optimize(objective))
        return calls / len(study.trials), len(study.trials)

    (few, _), (many, trials) = calls_per_trial(10), calls_per_trial(250)
    assert many - few < 3 * trials / 2  # a trial saw half of them, on average


def test_what_a_study_of_any_sampler_has_found_can_be_read():
    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"lr": [0.01, 0.02, 0.04, 0.08], "seed": [0, 1]}))

    def objective(trial):
        seed, lr = trial.suggest_int("seed", 0, 1), trial.suggest_float("lr", LOW, HIGH)
        trial.set_constraint("unstable", 1.0 if (lr > 0.03) != (seed == 1 and lr > 0.05) else -1.0)
        return lr

    with pytest.raises(ValueError, match="study must hold finished trials with lr and a constraint, got none"):
        frontier_of(study)
    study.optimize(objective)
    found = {f.params["seed"]: f for f in frontier_of(study)}
    assert (found[0].low, found[0].high, found[0].monotone, found[0].runs) == (0.02, 0.04, True, 4)
    assert (found[1].low, found[1].high, found[1].monotone) == (0.02, math.inf, False)


def objective_with(suggest):
    def objective(trial):
        suggest(trial)
        trial.set_constraint("unstable", 1.0)
        return 0.0

    return objective


@pytest.mark.parametrize(
    "suggest, message",
    [
        (lambda t: t.suggest_int("lr", 1, 100), "lr must be suggested from FloatDistribution.*, got IntDistribution"),
        (lambda t: t.suggest_float("lr", LOW, HIGH), "lr must be suggested from .*log=True.*, got .*log=False"),
        (lambda t: t.suggest_float("beta", 0, 1), "search_space must hold all parameters but lr, got beta besides"),
    ],
)
def test_search_spaces_that_it_cannot_search(suggest, message):
    study = optuna.create_study(sampler=frontier_sampler())
    with pytest.raises(ValueError, match=message):
        study.optimize(objective_with(suggest))


def test_a_trial_that_does_not_say_whether_it_is_stable_is_an_error():
    study = optuna.create_study(sampler=frontier_sampler())
    with pytest.raises(ValueError, match="trials must say by set_constraint whether they are stable, got none in 0"):
        study.optimize(lambda trial: trial.suggest_float("lr", LOW, HIGH, log=True))
    assert not study.sampler.is_exhausted(study)
    with pytest.raises(ValueError, match="got none in 1"):
        study.optimize(lambda trial: trial.suggest_float("lr", LOW, HIGH, log=True))
    a, b = (trial.params["lr"] for trial in study.trials)
    assert a == b, "such a trial does not count"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"resolution": 0.0}, "resolution must be positive and at most the interval of lr, got 0.0"),
        ({"low": 0.1, "high": 0.12}, "resolution must be positive and at most the interval of lr, got 0.1"),
        ({"low": 2.0}, "low <= high"),
        ({"low": 0.0}, "low > 0"),
        ({"runs": 0}, "runs must be at least 1, got 0"),
        ({"space": {"seed": []}}, r"search_space must hold values of parameters besides lr, got seed: \[\]"),
        ({"space": {"lr": [0.1]}}, r"search_space must hold values of parameters besides lr, got lr: \[0.1\]"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        frontier_sampler(**settings)
