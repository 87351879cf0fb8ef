"""An Optuna sampler that bisects one parameter: up to which learning rate is training stable?

For a setting of all other parameters, called a cell, the sampler looks for the place where runs turn from stable to
unstable: in at most six runs for 0.1 decades, where a grid over three decades needs 31. What to run next follows from
the trials alone, by `next_probes`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from enum import IntEnum
from itertools import accumulate, pairwise
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

_log = optuna.logging.get_logger(__name__)

FINE = 1 + 1e-9  # width of a bracket that is resolved, in units of the resolution


class Interval(NamedTuple):
    """Where, how finely and with how many runs a cell's boundary is looked for.

    Attributes:
        low: Lowest value to try.
        high: Highest value to try.
        log: Whether its logarithm is bisected.
        resolution: Width of a bracket that is fine enough: in decades if `log`, else in units of the value.
        runs: No more runs than this in one cell.
    """

    low: float
    high: float
    log: bool = True
    resolution: float = 0.1
    runs: int = 6

    @property
    def width(self) -> float:
        """From `low` to `high`, in units of the resolution."""
        return self.units(self.high)

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


class SearchedCell(NamedTuple):
    """One setting of all other parameters: those, where to look, and the runs so far, running ones included."""

    params: Mapping[str, Hashable]
    interval: Interval
    probes: Sequence[Probe] = ()


class Proposal(NamedTuple):
    """What to run next in a cell.

    Attributes:
        value: The parameter's value.
        speculative: Whether the outcome of a running probe can make this one worthless, so that it is better to run
            another cell, or to wait.
    """

    value: float
    speculative: bool


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
    contradicted = list(accumulate((excess[value] for value in values), initial=0))
    fewest = min(contradicted)
    best = [i for i, count in enumerate(contradicted) if count == fewest]
    return [-math.inf, *values][best[0]], [*values, math.inf][best[-1]]


def next_probes(cells: Sequence[SearchedCell], replicate: str = "seed") -> list[Proposal | None]:
    """What to run next in each cell; None where nothing is left to find out.

    A cell's first probe lies at the boundary of the neighbouring cells that are resolved: of those that differ only in
    `replicate`, else of those that differ in one more parameter; their median, if they are several. From there it
    gallops away in doubling steps, always within what lets a bisection reach the resolution with the runs that are
    left. Without neighbours it bisects. Both ends belong to what is tried: "stable everywhere" is known after a stable
    run at `high`. Once the bracket is as narrow as the resolution, runs that are left look for surprises away from the
    boundary, in the middle of a half of the interval or more in which nothing has been tried. That finds islands, not
    a ragged edge, which shows in the spread over `replicate`.

    A probe beside a running one takes the upper part of the bracket: it narrows the bracket further, or checks that
    nothing above it is stable.

    Args:
        cells: All cells, finished ones included.
        replicate: The parameter whose values are repetitions of one setting.

    Returns:
        A proposal or None for each cell, in their order. If a cell is only proposed one probe at a time, and runs turn
        from stable to unstable once, `runs` suffice for the resolution up to an interval of 2^runs - 2 resolutions.
    """
    boundaries = [_boundary(cell) for cell in cells]
    proposals = []
    for cell in cells:
        near: dict[int, list[float]] = {}
        for other, boundary in zip(cells, boundaries, strict=True):
            if boundary is not None and other is not cell and other.interval.log == cell.interval.log:
                near.setdefault(_distance(cell.params, other.params, replicate), []).append(boundary)
        found = near.get(0) or near.get(1)
        guess = median(map(cell.interval.units, found)) if found else None
        proposals.append(_next_probe(cell, guess))
    return proposals


def _distance(a: Mapping[str, Hashable], b: Mapping[str, Hashable], replicate: str) -> int:
    """In how many of the parameters that both have, but `replicate`, two cells differ."""
    return sum(a[name] != b[name] for name in a.keys() & b.keys() if name != replicate)


def _bounds(cell: SearchedCell) -> tuple[float, float]:
    """The bracket in units of the resolution. One unit is added at both ends, for boundaries beyond them."""
    units = cell.interval.units
    low, high = bracket((units(value), stable) for value, stable in cell.probes if stable is not None)
    return max(low, -1.0), min(high, cell.interval.width + 1)


def _is_resolved(low: float, high: float, width: float) -> bool:
    return high - low <= FINE or low >= width or high <= 0


def _boundary(cell: SearchedCell) -> float | None:
    """The value in the middle of the bracket, if that is resolved."""
    low, high = _bounds(cell)
    return cell.interval.value((low + high) / 2) if _is_resolved(low, high, cell.interval.width) else None


def _next_probe(cell: SearchedCell, guess: float | None) -> Proposal | None:
    """What to run next in a cell whose boundary may be at `guess`, in its units of the resolution."""
    interval = cell.interval
    width = interval.width
    left = interval.runs - len(cell.probes)
    if left <= 0:
        return None
    low, high = _bounds(cell)
    tried = _tried(cell)
    inside = [x for x in tried[1:-1] if low < x < high]
    gap, middle = _widest_gap([low, *inside, high])
    if _is_resolved(low, high, width) or gap <= FINE:
        gap, middle = _widest_gap(tried)
        return Proposal(interval.value(middle), False) if gap > 0 and 2 * gap >= width - 1e-9 else None
    if not inside:
        return Proposal(interval.value(_bisect(low, high, left, guess)), False)
    middle = min(max(middle, 0), width)
    gap, _ = _widest_gap(sorted([low, *inside, middle, high]))
    is_running = any(low < interval.units(value) < high for value, stable in cell.probes if stable is None)
    return Proposal(interval.value(middle), is_running and gap > 2 ** (left - 1))


def _tried(cell: SearchedCell) -> list[float]:
    """The ends of the interval and all probes between, in units of the resolution."""
    width = cell.interval.width
    return sorted([0, *(min(max(cell.interval.units(value), 0), width) for value, _ in cell.probes), width])


def _widest_gap(points: Sequence[float]) -> tuple[float, float]:
    """Width and middle of the widest gap between neighbours, the upper one of two that are equal."""
    return max((round(b - a, 9), (a + b) / 2) for a, b in pairwise(points))


def _bisect(low: float, high: float, left: int, guess: float | None) -> float:
    """Where to probe an empty bracket with `left` runs, near `guess` if that doesn't cost the resolution."""
    middle = (low + high) / 2
    if guess is None or high - low <= 2:
        return middle
    if low + 1 <= guess <= high - 1:
        wish = guess
    elif guess < low + 1:
        wish = min(low + 2 * max(1, low - guess), middle)
    else:
        wish = max(high - 2 * max(1, guess - high), middle)
    reach = 2.0 ** (left - 1)  # what the runs after this one can bisect
    return middle if high - low > 2 * reach else min(max(wish, high - reach), low + reach)


class _Urgency(IntEnum):
    """What a cell needs, the most urgent first."""

    BEGUN = 0  # a run
    NEW = 1  # its first run
    RUNNING = 2  # a run, but one is running
    SPECULATIVE = 3  # perhaps a run, depending on one that is running
    DONE = 4


_Key = tuple[tuple[str, float], ...]


class _Step(NamedTuple):
    name: str
    distribution: BaseDistribution
    value: float  # in Optuna's internal form


class _Path(NamedTuple):
    """What a trial has suggested: its cell in the order of suggestion, then, unless that isn't known yet, its probe."""

    number: int
    steps: tuple[_Step, ...]
    interval: Interval | None
    probe: Probe | None
    is_running: bool

    @property
    def key(self) -> _Key:
        return tuple((step.name, step.value) for step in self.steps)


class FrontierSampler(BaseSampler):
    """Finds up to which value of a float parameter trials are feasible, for every setting of all other parameters.

    Each setting is a cell. The bounds and the scale come from `suggest_float(param, low, high, log=...)`. The other
    parameters must have finitely many values, and must be suggested before; which ones there are may depend on others'
    values. The sampler chooses them so that cells that have begun are finished first, each by one worker at a time
    while there are others, and calls `study.stop` after the last one. How a cell is searched: `next_probes`.

    A trial is feasible if all of its constraints are at most zero. Every trial must have one:

        sampler = FrontierSampler("lr", seed=0)
        study = optuna.create_study(sampler=sampler)

        def objective(trial):
            period = trial.suggest_categorical("period", [10, 100])
            seed = trial.suggest_int("seed", 0, 2)
            lr = trial.suggest_float("lr", 1e-3, 1.0, log=True)
            loss, diverged = train(period, seed, lr)
            trial.set_constraint("unstable", 1.0 if diverged else -1.0)
            return loss

        study.optimize(objective)

    The state is in the trials alone, so that a study can be resumed, and shared by processes, which may now and then
    choose the same probe if they ask at the same moment. Workers beyond the number of unfinished cells speculate, which
    can cost their last cells some resolution. Failed trials count if they have said whether they are feasible, as one
    does that diverged and returns NaN, which Optuna takes for a failure; others are asked for again. Running ones
    count: those of a dead process should be told to have failed. Enqueued values are respected and count as probes.

    With `study.ask`, check `is_exhausted` and `must_wait` before. Asked nevertheless, the sampler adds probes where it
    knows least.

    Args:
        param: Name of the parameter.
        resolution: Width of a bracket that is fine enough: in decades if the parameter is on a logarithmic scale, else
            in its own units.
        runs: No more runs than this in one cell.
        replicate: The parameter whose values are repetitions of one setting, so that its cells are the nearest.
        seed: Seed of the choice between cells that are equally urgent.

    Raises:
        ValueError: A value is out of its range.
    """

    def __init__(
        self,
        param: str,
        resolution: float = 0.1,
        *,
        runs: int = 6,
        replicate: str = "seed",
        seed: int | None = None,
    ) -> None:
        if not 0 < resolution < math.inf:
            raise ValueError(f"resolution must be positive and finite, got {resolution}")
        if runs < 1:
            raise ValueError(f"runs must be at least 1, got {runs}")
        if replicate == param:
            raise ValueError(f"replicate must be another parameter than param, got {replicate!r} for both")
        self._param = param
        self._resolution = resolution
        self._runs = runs
        self._replicate = replicate
        self._rng = np.random.default_rng(seed)

    def reseed_rng(self) -> None:
        """Reseeds the choice between cells that are equally urgent."""
        self._rng = np.random.default_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Empty: parameters are suggested one after the other."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Empty."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The next probe if this is the sampler's parameter, else a value that leads to the most urgent cell.

        Raises:
            ValueError: The sampler's parameter is no float or was suggested before this one, or this one's values
                can't be counted.
        """
        key = self._path(trial).key
        paths = [path for path in self._paths(study) if path.number != trial.number]
        if param_name == self._param:
            return self._next_value(key, paths, param_distribution)
        if self._param in trial.params:
            raise ValueError(f"{self._param} must be suggested after all other parameters, got {param_name} after it")
        fixed = trial.system_attrs.get("fixed_params", {})
        values = _values(param_name, param_distribution)
        urgencies = [_urgency(paths, (*key, (param_name, value)), fixed) for value in values]
        most = [value for value, urgency in zip(values, urgencies, strict=True) if urgency == min(urgencies)]
        return param_distribution.to_external_repr(self._rng.choice(most).item())

    def _next_value(self, key: _Key, paths: Sequence[_Path], distribution: BaseDistribution) -> float:
        if not isinstance(distribution, FloatDistribution) or distribution.step is not None:
            raise ValueError(f"{self._param} must be suggested as a float without step, got {distribution}")
        interval = self._interval(distribution)
        if interval.width < 1:
            raise ValueError(f"resolution must not exceed the interval of {self._param}, got {self._resolution}")
        probed: dict[_Key, list[_Path]] = {}
        for path in paths:
            if path.probe is not None:
                probed.setdefault(path.key, []).append(path)
        own = SearchedCell(dict(key), interval, _probes(probed.pop(key, [])))
        others = [SearchedCell(dict(k), p[-1].interval, _probes(p)) for k, p in probed.items() if p[-1].interval]
        proposal = next_probes([own, *others], self._replicate)[0]
        if proposal is not None:
            return proposal.value
        _log.warning("FrontierSampler has found out all about this cell, and adds a run where the cell has none.")
        return interval.value(_widest_gap(_tried(own))[1])

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Stops the study if nothing is left.

        Raises:
            ValueError: The trial has no constraint.
        """
        if state != TrialState.FAIL and self._param in trial.params and not trial.constraints:
            raise ValueError(f"trials must say by set_constraint whether they are stable, got none in {trial.number}")
        paths = [path for path in self._paths(study) if path.number != trial.number]
        if state != TrialState.FAIL or trial.constraints:
            paths.append(self._path(trial)._replace(is_running=False))
        if self._is_exhausted(study, paths):
            with suppress(RuntimeError):  # ask and tell, which has no loop to stop
                study.stop()

    def is_exhausted(self, study: Study) -> bool:
        """Whether nothing is left to be asked for: all cells have what they need, and no trial waits in the queue.

        What still runs may change that: it may fail, or show that a cell is not monotone.
        """
        return self._is_exhausted(study, self._paths(study))

    def must_wait(self, study: Study) -> bool:
        """Whether all that could be asked for now might turn out worthless, depending on what runs: better wait."""
        return _urgency(self._paths(study), (), {}) == _Urgency.SPECULATIVE

    def _is_exhausted(self, study: Study, paths: Sequence[_Path]) -> bool:
        if _urgency(paths, (), {}) != _Urgency.DONE:
            return False
        return not study.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    def _paths(self, study: Study) -> list[_Path]:
        """Of all trials but waiting ones, and finished ones that don't say whether they are stable."""
        trials = study.get_trials(deepcopy=False)
        counted = [t for t in trials if t.state != TrialState.WAITING and (t.state != TrialState.FAIL or t.constraints)]
        paths = [self._path(trial) for trial in counted]
        return [p for p in paths if p.is_running or p.probe is None or p.probe.stable is not None]

    def _path(self, trial: FrozenTrial) -> _Path:
        steps = []
        interval = probe = None
        for name, distribution in trial.distributions.items():
            if name == self._param:
                assert isinstance(distribution, FloatDistribution)
                interval = self._interval(distribution)
                constraints = trial.constraints.values()
                probe = Probe(trial.params[name], max(constraints) <= 0 if constraints else None)
                break
            steps.append(_Step(name, distribution, distribution.to_internal_repr(trial.params[name])))
        return _Path(trial.number, tuple(steps), interval, probe, not trial.state.is_finished())

    def _interval(self, distribution: FloatDistribution) -> Interval:
        return Interval(distribution.low, distribution.high, distribution.log, self._resolution, self._runs)


def _urgency(paths: Sequence[_Path], key: _Key, fixed: Mapping[str, Any]) -> _Urgency:
    """That of the most urgent cell that begins with a key and agrees with the fixed parameters."""
    paths = [path for path in paths if path.key[: len(key)] == key]
    longer = [path for path in paths if len(path.steps) > len(key)]
    if longer:
        name, distribution, _ = longer[-1].steps[len(key)]
        values = [distribution.to_internal_repr(fixed[name])] if name in fixed else _values(name, distribution)
        return min(_urgency(longer, (*key, (name, value)), fixed) for value in values)
    if not paths:
        return _Urgency.NEW
    is_running = any(path.is_running for path in paths)
    intervals = [path.interval for path in paths if path.interval is not None]
    if not intervals:
        return _Urgency.RUNNING if is_running else _Urgency.DONE
    proposal = _next_probe(SearchedCell({}, intervals[-1], _probes(paths)), None)
    if proposal is None:
        return _Urgency.DONE
    if proposal.speculative:
        return _Urgency.SPECULATIVE
    return _Urgency.RUNNING if is_running else _Urgency.BEGUN


def _probes(paths: Iterable[_Path]) -> list[Probe]:
    return [path.probe for path in paths if path.probe is not None]


def _values(name: str, distribution: BaseDistribution) -> Sequence[float]:
    """All values of a parameter, in Optuna's internal form."""
    if isinstance(distribution, CategoricalDistribution):
        return range(len(distribution.choices))
    if isinstance(distribution, (IntDistribution, FloatDistribution)) and distribution.step is not None:
        low, high, step = (Decimal(str(x)) for x in (distribution.low, distribution.high, distribution.step))
        return [float(low + i * step) for i in range(int((high - low) / step) + 1)]
    raise ValueError(f"{name} must have finitely many values, got {distribution}")
