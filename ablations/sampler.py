"""Up to which learning rate is training stable? Bisection, as a function and as an Optuna sampler.

For a setting of all other parameters, called a cell, the search looks for the place where runs turn from stable to
unstable, by plain bisection: 0.1 decades of three take five runs. Runs that are left look for stable islands. What to
run next follows from the runs alone, by `next_probe`.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Generic, NamedTuple, TypeVar

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

FINE = 1 + 1e-9  # width of a bracket that is resolved, in units of the resolution
CHOSEN = "frontier:chosen"  # system attribute of a trial, as "grid_id" is for Optuna's grids
K = TypeVar("K", bound=Hashable)


class Interval(NamedTuple):
    """Where, how finely and with how many runs a cell's boundary is looked for; `resolution` is in decades if `log`."""

    low: float
    high: float
    log: bool = True
    resolution: float = 0.1
    runs: int = 6

    def units(self, value: float) -> float:
        """How far a value is above `low`, in units of the resolution."""
        distance = math.log10(value / self.low) if self.log else value - self.low
        return distance / self.resolution

    def value(self, units: float) -> float:
        """The value that is so far above `low`."""
        distance = units * self.resolution
        value = self.low * 10**distance if self.log else self.low + distance
        return min(max(value, self.low), self.high)


class Probe(NamedTuple):
    """A run of a cell: the parameter's value, and whether the run was stable; None while it runs."""

    value: float
    stable: bool | None


def bracket(probes: Iterable[tuple[float, bool]]) -> tuple[float, float]:
    """Between which values runs turn from stable to unstable.

    Args:
        probes: Value, and whether its run was stable.

    Returns:
        The highest stable and the lowest unstable value. Where a stable run lies above an unstable one: the hull of all
        places for a single step from stable to unstable that contradict the fewest runs. Infinite where no run bounds.
    """
    excess: dict[float, int] = {}  # by which a step above this value contradicts more runs than one below it
    for value, stable in probes:
        excess[value] = excess.get(value, 0) + (-1 if stable else 1)
    values = sorted(excess)
    contradicted = list(itertools.accumulate((excess[value] for value in values), initial=0))
    fewest = min(contradicted)
    best = [i for i, count in enumerate(contradicted) if count == fewest]
    return [-math.inf, *values][best[0]], [*values, math.inf][best[-1]]


def next_probe(interval: Interval, probes: Collection[Probe]) -> float | None:
    """The value to run next in a cell, by bisection; None if nothing is left to find out.

    Both ends belong to what is tried: "stable everywhere" is known after a stable run at `high`. Once the bracket is as
    narrow as the resolution, runs that are left look for surprises away from the boundary, in the middle of a half of
    the interval or more in which nothing has been tried. That finds islands, not a ragged edge, which shows in the
    spread over seeds. A probe beside a running one takes the upper part of the bracket.

    If runs turn from stable to unstable once, and are proposed one at a time, `runs` suffice for the resolution up to
    an interval of 2^runs - 2 resolutions.
    """
    if len(probes) >= interval.runs:
        return None
    width = interval.units(interval.high)
    low, high = bracket((interval.units(value), stable) for value, stable in probes if stable is not None)
    low, high = max(low, -1.0), min(high, width + 1)  # one unit more at both ends, for boundaries beyond them
    tried = sorted([0, *(min(max(interval.units(value), 0), width) for value, _ in probes), width])
    gap, middle = _widest_gap([low, *(x for x in tried[1:-1] if low < x < high), high])
    if high - low <= FINE or low >= width or high <= 0 or gap <= FINE:
        gap, middle = _widest_gap(tried)
        if gap <= 0 or 2 * gap < width - 1e-9:
            return None
    return interval.value(middle)


def _widest_gap(points: Sequence[float]) -> tuple[float, float]:
    """Width and middle of the widest gap between neighbours, the upper one of two that are equal."""
    return max((round(b - a, 9), (a + b) / 2) for a, b in itertools.pairwise(points))


class Search(Generic[K]):
    """The probes of all cells, and what each needs next."""

    def __init__(self, interval: Interval) -> None:
        self._interval = interval
        self._probes: defaultdict[K, dict[int, Probe | None]] = defaultdict(dict)
        self._next: dict[K, float | None] = {}  # of the cells that have begun
        self._is_busy: dict[K, bool] = {}

    def put(self, cell: K, number: int, probe: Probe | None) -> None:
        """Takes in the trial of this number, whatever it was before; None if it has said nothing."""
        self._probes[cell][number] = probe
        probes = [probe for probe in list(self._probes[cell].values()) if probe is not None]  # threads may add some
        self._next[cell] = next_probe(self._interval, probes)
        self._is_busy[cell] = any(stable is None for _, stable in probes)

    def next(self, cell: K) -> float | None:
        """The value to run next in a cell."""
        return self._next[cell] if cell in self._next else next_probe(self._interval, [])

    def choose(self, cells: Iterable[K]) -> K | None:
        """The first cell that needs a run: rather one in which none runs, and rather one that has begun."""
        needy = [cell for cell in cells if cell not in self._next or self._next[cell] is not None]
        return min(needy, key=lambda cell: (self._is_busy.get(cell, False), cell not in self._next), default=None)


class Found(NamedTuple):
    """What a search found in one cell.

    Attributes:
        params: The cell: all other parameters.
        low: Highest value at which a run was stable; -inf if none was. See `bracket` where the runs are not monotone.
        high: Lowest value at which one was unstable; inf if none was.
        monotone: Whether no stable run is above an unstable one.
        runs: Number of runs.
    """

    params: Mapping[str, Any]
    low: float
    high: float
    monotone: bool
    runs: int


def frontier_of(study: Study, param: str = "lr") -> list[Found]:
    """Up to which value of a parameter the trials of an Optuna study are feasible, for each setting of the others.

    Args:
        study: Its trials have constraints; which sampler chose them does not matter.
        param: Name of the parameter.

    Raises:
        ValueError: No trial has the parameter and a constraint.
    """
    cells: defaultdict[tuple[tuple[str, Any], ...], list[tuple[float, bool]]] = defaultdict(list)
    for trial in study.get_trials(deepcopy=False):
        if param in trial.params and trial.constraints and trial.state.is_finished():
            others = tuple(sorted((name, value) for name, value in trial.params.items() if name != param))
            cells[others].append((trial.params[param], _is_feasible(trial)))
    if not cells:
        raise ValueError(f"study must hold finished trials with {param} and a constraint, got none")
    found = []
    for others, probes in cells.items():
        stable = max((value for value, stable in probes if stable), default=-math.inf)
        unstable = min((value for value, stable in probes if not stable), default=math.inf)
        found.append(Found(dict(others), *bracket(probes), stable < unstable, len(probes)))
    return found


def _is_feasible(trial: FrozenTrial) -> bool:
    return max(trial.constraints.values()) <= 0


class FrontierSampler(BaseSampler):
    """Finds up to which value of a float parameter trials are feasible, for every combination of other parameters.

    Each combination is a cell. Cells that have begun are finished first, each by one worker at a time while there are
    others, and `study.stop` is called after the last one. How a cell is searched: `next_probe`.

    A trial is feasible if all of its constraints are at most zero. Every trial must have one:

        def objective(trial):
            period = trial.suggest_categorical("period", [10, 100])
            lr = trial.suggest_float("lr", 1e-3, 1.0, log=True)
            loss, diverged = train(period, lr)
            trial.set_constraint("unstable", 1.0 if diverged else -1.0)
            return loss

        study = optuna.create_study(sampler=FrontierSampler({"period": [10, 100]}, "lr", low=1e-3, high=1.0))
        study.optimize(objective)
        frontier_of(study)

    The state is in the trials alone, so that a study can be resumed, and shared by threads and processes, which may now
    and then choose the same probe if they ask at the same moment. Failed trials count if they have said whether they
    are feasible, as one does that diverged and returns NaN, which Optuna takes for a failure; others are asked for
    again, up to `runs` times in a cell, which is then given up, as one is that is pruned before it suggests `param`.
    Running ones count: those of a dead process should be told to have failed. Enqueued values are respected and count,
    and so are values that a `PartialFixedSampler` fixes. A trial that is asked for when nothing is left is pruned.

    Args:
        search_space: The values of each other parameter that has several, as for Optuna's `GridSampler`.
        param: Name of the parameter, which trials must suggest as a float from `low` to `high` without a step.
        low: Its lowest value.
        high: Its highest value.
        log: Whether it is on a logarithmic scale.
        resolution: Width of a bracket that is fine enough, in decades or, on a linear scale, in the parameter's units.
        runs: No more runs than this in one cell.

    Raises:
        ValueError: A value is out of its range.
    """

    def __init__(
        self,
        search_space: Mapping[str, Sequence[Any]],
        param: str = "lr",
        *,
        low: float,
        high: float,
        log: bool = True,
        resolution: float = 0.1,
        runs: int = 6,
    ) -> None:
        for name, values in search_space.items():
            if not values or name == param:
                raise ValueError(f"search_space must hold values of parameters besides {param}, got {name}: {values}")
        if runs < 1:
            raise ValueError(f"runs must be at least 1, got {runs}")
        self._distribution = FloatDistribution(low, high, log=log)
        self._interval = Interval(low, high, log, resolution, runs)
        if not (resolution > 0 and self._interval.units(high) >= 1):
            raise ValueError(f"resolution must be positive and at most the interval of {param}, got {resolution}")
        self._space = {name: list(values) for name, values in search_space.items()}
        self._cells = list(itertools.product(*self._space.values()))
        self._param = param
        self._study: object = None  # what tells studies apart

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Empty: parameters are suggested one after the other."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Empty."""
        return {}

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Chooses the trial's values and writes them down, unless nothing is left."""
        self._update(study)
        fixed = _fixed(study, trial)
        if (cell := self._search.choose(self._cells_of(fixed))) is not None:
            values = {**dict(zip(self._space, cell, strict=True)), **fixed}
            value = self._search.next(tuple(values[name] for name in self._space))
            if value is not None:
                study._storage.set_trial_system_attr(trial._trial_id, CHOSEN, {self._param: value, **values})

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The value that was chosen before the trial.

        Raises:
            ValueError: The search space does not fit the objective.
            TrialPruned: Nothing is left to find out.
        """
        if param_name == self._param:
            if param_distribution != self._distribution:
                raise ValueError(f"{param_name} must be suggested from {self._distribution}, got {param_distribution}")
        elif param_name not in self._space:
            raise ValueError(f"search_space must hold all parameters but {self._param}, got {param_name} besides")
        if CHOSEN not in trial.system_attrs:
            raise optuna.TrialPruned("nothing is left to find out")
        return trial.system_attrs[CHOSEN][param_name]

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Stops the study if nothing is left.

        Raises:
            ValueError: The trial has no constraint.
        """
        self._update(study)
        if self._param in trial.params and not trial.constraints and state != TrialState.FAIL:
            rule = "trials must say by set_constraint whether they are stable"
            raise ValueError(f"{rule}, got none in {trial.number}")
        self._take(trial, state)
        if self._is_exhausted(study):
            with suppress(RuntimeError):  # ask and tell, which has no loop to stop
                study.stop()

    def is_exhausted(self, study: Study) -> bool:
        """Whether nothing is left to be asked for: all cells have what they need, and no trial waits in the queue.

        What still runs may change that: it may fail, or show that a cell is not monotone.
        """
        self._update(study)
        return self._is_exhausted(study)

    def _is_exhausted(self, study: Study) -> bool:
        nothing_left = self._search.choose(self._cells_of(_fixed(study))) is None
        return nothing_left and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    def _cells_of(self, fixed: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The cells that are not given up and agree with fixed values."""
        known = {name: value for name, value in fixed.items() if value in self._space.get(name, ())}
        cells = [cell for cell in self._cells if cell not in self._given_up]
        if not known:
            return cells
        return [cell for cell in cells if known.items() <= dict(zip(self._space, cell, strict=True)).items()]

    def _update(self, study: Study) -> None:
        """Takes in what is new since the last call."""
        trials = study.get_trials(deepcopy=False)
        which = (study.study_name, trials[0].datetime_start if trials else None)
        if which != self._study:
            self._search: Search[tuple[Any, ...]] = Search(self._interval)
            self._failures: defaultdict[tuple[Any, ...], set[int]] = defaultdict(set)
            self._given_up: set[tuple[Any, ...]] = set()
            self._settled = 0  # trials below this number have ended
            self._study = which
        for trial in trials[self._settled :]:
            if trial.state != TrialState.WAITING:
                self._take(trial, trial.state)
        settled = self._settled
        while settled < len(trials) and trials[settled].state.is_finished():
            settled += 1
        self._settled = settled  # at once: threads may be here together

    def _take(self, trial: FrozenTrial, state: TrialState) -> None:
        values = {**trial.system_attrs.get(CHOSEN, {}), **trial.params}
        if not values.keys() >= {self._param, *self._space}:
            return
        cell = tuple(values[name] for name in self._space)
        is_lost = state.is_finished() and not trial.constraints
        stable = _is_feasible(trial) if trial.constraints else None
        self._search.put(cell, trial.number, None if is_lost else Probe(values[self._param], stable))
        is_ruled_out = self._param not in trial.params
        if is_lost and not (is_ruled_out and state == TrialState.FAIL):
            self._failures[cell].add(trial.number)
            if is_ruled_out or len(self._failures[cell]) >= self._interval.runs:
                self._given_up.add(cell)


def _fixed(study: Study, trial: FrozenTrial | None = None) -> dict[str, Any]:
    """What a `PartialFixedSampler` fixes, and a trial's enqueued values."""
    enqueued = trial.system_attrs.get("fixed_params", {}) if trial else {}
    return {**getattr(study.sampler, "_fixed_params", {}), **enqueued}
