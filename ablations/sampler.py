"""Up to which learning rate is training stable? Bisection, as a function and as an Optuna sampler.

For a setting of all other parameters, called a cell, the search looks for the place where runs turn from stable to
unstable: in at most six runs for 0.1 decades, where a grid over three decades needs 31. What to run next follows from
the runs alone, by `next_probe`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

FINE = 1 + 1e-9  # width of a bracket that is resolved, in units of the resolution


class Interval(NamedTuple):
    """Where, how finely and with how many runs a cell's boundary is looked for; `resolution` is in decades if `log`."""

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


class Urgency(IntEnum):
    """What a cell needs, the most urgent first."""

    BEGUN = 0  # a run
    NEW = 1  # its first run
    RUNNING = 2  # a run, but one is running
    SPECULATIVE = 3  # perhaps a run: the outcome of a running one may make it worthless
    DONE = 4


class Proposal(NamedTuple):
    """What to run next in a cell: the parameter's value, None if nothing is left to find out; and how urgently."""

    value: float | None
    urgency: Urgency


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


def next_probe(interval: Interval, probes: Sequence[Probe]) -> Proposal:
    """What to run next in a cell, by bisection.

    Both ends belong to what is tried: "stable everywhere" is known after a stable run at `high`. Once the bracket is as
    narrow as the resolution, runs that are left look for surprises away from the boundary, in the middle of a half of
    the interval or more in which nothing has been tried. That finds islands, not a ragged edge, which shows in the
    spread over seeds. A probe beside a running one takes the upper part of the bracket: it narrows the bracket
    further, or checks that nothing above it is stable.

    If runs turn from stable to unstable once, and are proposed one at a time, `runs` suffice for the resolution up to
    an interval of 2^runs - 2 resolutions.
    """
    width = interval.width
    left = interval.runs - len(probes)
    if left <= 0:
        return Proposal(None, Urgency.DONE)
    is_running = any(probe.stable is None for probe in probes)
    urgency = Urgency.RUNNING if is_running else Urgency.BEGUN if probes else Urgency.NEW
    low, high = bracket((interval.units(value), stable) for value, stable in probes if stable is not None)
    low, high = max(low, -1.0), min(high, width + 1)  # one unit more at both ends, for boundaries beyond them
    tried = sorted([0, *(min(max(interval.units(value), 0), width) for value, _ in probes), width])
    inside = [x for x in tried[1:-1] if low < x < high]
    gap, middle = _widest_gap([low, *inside, high])
    if high - low <= FINE or low >= width or high <= 0 or gap <= FINE:
        gap, middle = _widest_gap(tried)
        if gap <= 0 or 2 * gap < width - 1e-9:
            return Proposal(None, Urgency.DONE)
    elif inside:
        middle = min(max(middle, 0), width)
        gap, _ = _widest_gap(sorted([low, *inside, middle, high]))
        if gap > 2 ** (left - 1):
            urgency = Urgency.SPECULATIVE
    return Proposal(interval.value(middle), urgency)


def _widest_gap(points: Sequence[float]) -> tuple[float, float]:
    """Width and middle of the widest gap between neighbours, the upper one of two that are equal."""
    return max((round(b - a, 9), (a + b) / 2) for a, b in pairwise(points))


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
    cells: dict[tuple[tuple[str, Any], ...], list[tuple[float, bool]]] = {}
    for trial in study.get_trials(deepcopy=False):
        if param in trial.params and trial.constraints and trial.state.is_finished():
            others = tuple((name, value) for name, value in trial.params.items() if name != param)
            cells.setdefault(others, []).append((trial.params[param], max(trial.constraints.values()) <= 0))
    if not cells:
        raise ValueError(f"study must hold finished trials with {param} and a constraint, got none")
    found = []
    for others, probes in cells.items():
        stable = max((value for value, stable in probes if stable), default=-math.inf)
        unstable = min((value for value, stable in probes if not stable), default=math.inf)
        found.append(Found(dict(others), *bracket(probes), stable < unstable, len(probes)))
    return found


class _Node:
    """A parameter that trials suggest next after the same values; or at the end, a cell with its probes."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.distribution: BaseDistribution | None = None
        self.children: dict[float, _Node] = {}
        self.interval: Interval | None = None
        self.probes: dict[int, Probe] = {}  # by number of trial
        self.failures = 0
        self.is_ruled_out = False
        self._known: Proposal | None = None
        self._values: Sequence[float] = ()

    def take(self, name: str, distribution: BaseDistribution) -> Sequence[float]:
        """What is suggested here, unless that is known; its values in Optuna's internal form."""
        if self.name is None:
            self.name, self.distribution, self._values = name, distribution, _values(name, distribution)
        return self._values

    def values(self, fixed: Mapping[str, Any]) -> Sequence[float]:
        """The values that agree with fixed ones."""
        assert self.distribution is not None
        assert self.name is not None
        return [self.distribution.to_internal_repr(fixed[self.name])] if self.name in fixed else self._values

    def add(self, number: int, probe: Probe, interval: Interval) -> None:
        self.interval, self._known = interval, None
        self.probes[number] = probe

    def drop(self, number: int) -> None:
        self._known = None
        self.probes.pop(number, None)

    def proposal(self) -> Proposal:
        assert self.interval is not None
        if self.failures >= self.interval.runs:
            return Proposal(None, Urgency.DONE)
        if self._known is None:
            self._known = next_probe(self.interval, list(self.probes.values()))
        return self._known


class FrontierSampler(BaseSampler):
    """Finds up to which value of a float parameter trials are feasible, for every setting of all other parameters.

    Each setting is a cell. The bounds and the scale come from `suggest_float(param, low, high, log=...)`. The other
    parameters must have finitely many values, and must be suggested before; which ones there are may depend on others'
    values. The sampler chooses them so that cells that have begun are finished first, each by one worker at a time
    while there are others, and calls `study.stop` after the last one. How a cell is searched: `next_probe`.

    A trial is feasible if all of its constraints are at most zero. Every trial must have one:

        study = optuna.create_study(sampler=FrontierSampler("lr"))

        def objective(trial):
            period = trial.suggest_categorical("period", [10, 100])
            seed = trial.suggest_int("seed", 0, 2)
            lr = trial.suggest_float("lr", 1e-3, 1.0, log=True)
            loss, diverged = train(period, seed, lr)
            trial.set_constraint("unstable", 1.0 if diverged else -1.0)
            return loss

        study.optimize(objective)
        frontier_of(study)

    The state is in the trials alone, so that a study can be resumed, and shared by threads and processes, which may now
    and then choose the same probe if they ask at the same moment. Failed trials count if they have said whether they
    are feasible, as one does that diverged and returns NaN, which Optuna takes for a failure; others are asked for
    again, up to `runs` times in a cell, which is then given up. Running ones count: those of a dead process should be
    told to have failed. Enqueued values are respected and count, and so are values that a `PartialFixedSampler` fixes.
    A trial that is asked for when nothing is left is pruned.

    Args:
        param: Name of the parameter.
        resolution: Width of a bracket that is fine enough: in decades if the parameter is on a logarithmic scale, else
            in its own units.
        runs: No more runs than this in one cell.

    Raises:
        ValueError: A value is out of its range.
    """

    def __init__(self, param: str, resolution: float = 0.1, *, runs: int = 6) -> None:
        if not 0 < resolution < math.inf:
            raise ValueError(f"resolution must be positive and finite, got {resolution}")
        if runs < 1:
            raise ValueError(f"runs must be at least 1, got {runs}")
        self._param = param
        self._resolution = resolution
        self._runs = runs
        self._forget()

    def _forget(self, first: object = None) -> None:
        self._first = first  # which tells studies apart
        self._root = _Node()
        self._absorbed = 0  # trials below this number are in the tree for good
        self._ahead: set[int] = set()  # those that are finished
        self._asked: dict[int, set[str]] = {}  # by running trial: what was asked for here
        self._fixed: set[str] = set()  # what others choose

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
            TrialPruned: Nothing is left to find out.
        """
        running = self._absorb(study, besides=trial.number)
        self._asked.setdefault(trial.number, set()).add(param_name)
        node = self._follow(trial)
        if param_name == self._param:
            return self._next_value(node, param_distribution)
        if self._param in trial.params:
            raise ValueError(f"{self._param} must be suggested after all other parameters, got {param_name} after it")
        self._fixed.discard(param_name)
        fixed = trial.system_attrs.get("fixed_params", {})
        values = node.take(param_name, param_distribution)
        urgencies = [self._urgency(node.children.get(value), running, fixed) for value in values]
        return param_distribution.to_external_repr(values[urgencies.index(min(urgencies))])

    def _next_value(self, node: _Node, distribution: BaseDistribution) -> float:
        interval = self._interval(distribution)
        if interval.width < 1:
            raise ValueError(f"resolution must not exceed the interval of {self._param}, got {self._resolution}")
        node.interval = node.interval or interval
        value = node.proposal().value
        if value is None:
            raise optuna.TrialPruned("nothing is left to find out in this cell")
        return value

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Stops the study if nothing is left.

        Raises:
            ValueError: The trial has no constraint.
        """
        running = self._absorb(study, besides=trial.number)
        node = self._follow(trial)
        enqueued = trial.system_attrs.get("fixed_params", {})
        self._fixed |= trial.params.keys() - self._asked.pop(trial.number, trial.params.keys()) - set(enqueued)
        if self._param in trial.params:
            if trial.constraints:
                node.add(trial.number, self._probe(trial), self._interval(trial.distributions[self._param]))
            elif state == TrialState.FAIL:
                node.failures += 1
            else:
                rule = "trials must say by set_constraint whether they are stable"
                raise ValueError(f"{rule}, got none in {trial.number}")
        elif state != TrialState.FAIL:
            node.is_ruled_out = True
        if self._is_exhausted(study, running):
            with suppress(RuntimeError):  # ask and tell, which has no loop to stop
                study.stop()

    def is_exhausted(self, study: Study) -> bool:
        """Whether nothing is left to be asked for: all cells have what they need, and no trial waits in the queue.

        What still runs may change that: it may fail, or show that a cell is not monotone.
        """
        return self._is_exhausted(study, self._absorb(study))

    def _is_exhausted(self, study: Study, running: set[int]) -> bool:
        if self._urgency(self._root, running, {}) < Urgency.DONE:
            return False
        return not study.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    def _absorb(self, study: Study, besides: int = -1) -> set[int]:
        """Takes in what is new since the last call; returns the nodes, by id, under which a trial runs."""
        trials = study.get_trials(deepcopy=False)
        first = trials and (study.study_name, trials[0].datetime_start or trials[0].datetime_complete)
        if first != self._first:
            asked = self._asked
            self._forget(first)
            self._asked = asked
        running = set()
        for trial in trials[self._absorbed :]:
            if trial.number in self._ahead or trial.state == TrialState.WAITING or trial.number == besides:
                continue
            node = self._follow(trial)
            is_running = not trial.state.is_finished()
            if is_running:
                running.add(id(node))
            if self._param in trial.params and (is_running or trial.constraints):
                node.add(trial.number, self._probe(trial), self._interval(trial.distributions[self._param]))
            elif trial.state == TrialState.FAIL:
                node.drop(trial.number)
            elif not is_running and self._param not in trial.params:
                node.is_ruled_out = True
            if not is_running:
                self._ahead.add(trial.number)
        absorbed = self._absorbed
        while absorbed in self._ahead:
            absorbed += 1
        self._absorbed = absorbed  # at once: threads may be here together
        return running

    def _follow(self, trial: FrozenTrial) -> _Node:
        """The node that a trial has come to."""
        node = self._root
        for name, distribution in trial.distributions.items():
            if name == self._param:
                break
            node.take(name, distribution)
            node = node.children.setdefault(distribution.to_internal_repr(trial.params[name]), _Node())
        return node

    def _probe(self, trial: FrozenTrial) -> Probe:
        constraints = trial.constraints.values()
        return Probe(trial.params[self._param], max(constraints) <= 0 if constraints else None)

    def _interval(self, distribution: BaseDistribution) -> Interval:
        if not isinstance(distribution, FloatDistribution) or distribution.step is not None:
            raise ValueError(f"{self._param} must be suggested as a float without step, got {distribution}")
        return Interval(distribution.low, distribution.high, distribution.log, self._resolution, self._runs)

    def _urgency(self, node: _Node | None, running: set[int], fixed: Mapping[str, Any]) -> Urgency:
        """That of the most urgent cell under a node."""
        if node is None:
            return Urgency.NEW
        if node.name is not None:
            values = list(node.children) if node.name in self._fixed else node.values(fixed)
            return min(self._urgency(node.children.get(value), running, fixed) for value in values)
        if node.interval is not None:
            urgency = node.proposal().urgency
            return Urgency.RUNNING if id(node) in running and urgency < Urgency.RUNNING else urgency
        if id(node) in running:
            return Urgency.RUNNING
        return Urgency.DONE if node.is_ruled_out else Urgency.NEW


def _values(name: str, distribution: BaseDistribution) -> Sequence[float]:
    """All values of a parameter, in Optuna's internal form."""
    if isinstance(distribution, CategoricalDistribution):
        return range(len(distribution.choices))
    if isinstance(distribution, (IntDistribution, FloatDistribution)) and distribution.step is not None:
        low, high, step = (Decimal(str(x)) for x in (distribution.low, distribution.high, distribution.step))
        return [float(low + i * step) for i in range(int((high - low) / step) + 1)]
    raise ValueError(f"{name} must have finitely many values, got {distribution}")
