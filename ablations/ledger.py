"""The cells of a study in an Optuna storage: what runs, what is done.

Each training run of a cell is a trial. Its user attributes hold the cell's key ("cell") and content ("cell_spec"), who
trains it ("parent") and what it gave (the fields of its `Outcome`), or "error" if it can't be trained: such a trial
keeps running until its parent ends, so that nobody asks for the cell again before. Failed trials don't count. They have
an "error", or "duplicate" because another trial has their cell, or neither: their parent was stopped. The next one
trains them again.

Several parents may share one database. Of trials that they add at the same moment for the same place (a cell of a grid,
a group and seed of a bisection) the one with the lowest number is trained. A parent counts as dead once its sign of
life, a counter in the study's user attributes, has not changed for `GRACE` seconds of the observer's own clock, so that
the machines' clocks need not agree.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.pruners import MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from msign_lightning.ablations.cell import Cell, Group, Outcome, show
from msign_lightning.ablations.methods import Value
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.sampler import Interval, Probe, Search
from msign_lightning.ablations.study import Bisect, Study, Tpe, changes

BEAT = 10.0  # seconds between two signs of life
GRACE = 60.0  # seconds without one after which a parent counts as dead

_DONE = (TrialState.COMPLETE, TrialState.PRUNED)
_MAY_CHANGE = ("arms", "factors.", "seeds", "sampler.runs", "sampler.trials")
"""Parts of a study that grow and shrink after its start, variants as wholes; a search's trials must stay comparable."""
_log = logging.getLogger(__name__)
Place = tuple[Group, int]


@dataclass
class Claim:
    """A cell that this parent trains, with its trial and the last step reported."""

    trial: Trial
    cell: Cell
    last_step: int = -1


def find(study: Study, backend: BaseStorage) -> optuna.Study:
    """The study in a storage.

    Raises:
        StudyError: It is not there, or what its cells mean has changed since its start.
    """
    try:
        found = optuna.load_study(study_name=study.name, storage=backend)
    except KeyError as error:
        names = ", ".join(sorted(optuna.get_all_study_names(backend))) or "none"
        raise StudyError(f"study {study.name} has not been started here; studies in the storage: {names}") from error
    if changed := changes_of(study, found.user_attrs.get("fingerprint")):
        raise StudyError(
            f"study {study.name} must not change after its start, but for arms, factors and seeds: "
            f"{'; '.join(changed)}; run what is new under another name"
        )
    return found


def changes_of(study: Study, started: Mapping[str, Any] | None) -> list[str]:
    """How a study differs from what it was when cells were trained, as far as that makes them others."""
    if started is None:
        return []
    may_change = ("sampler.trials",) if isinstance(study.sampler, Tpe) else _MAY_CHANGE
    now, old = study.fingerprint(), started.get("variants", {})
    new = {name: variant for name, variant in now["variants"].items() if name in old}
    kept = {name: variant for name, variant in old.items() if name in new}
    changed = changes({**started, "variants": kept}, {**now, "variants": new})
    return [change for change in changed if not change.startswith(may_change)]


def exists(study: Study, backend: BaseStorage) -> bool:
    """Whether the study has been started; raises as `find` does if with other content."""
    if study.name not in optuna.get_all_study_names(backend):
        return False
    find(study, backend)
    return True


class Ledger:
    """What one parent reads from and writes to the storage of a study.

    Args:
        study: The study; begun in the storage if it is not there yet.
        backend: The storage.
        alone: Whether no other parent can be alive.

    Raises:
        StudyError: The study was started with other content.
    """

    def __init__(self, study: Study, backend: BaseStorage, *, alone: bool) -> None:
        self._study = study
        self._backend = backend
        self._alone = alone
        self._storage = optuna.create_study(study_name=study.name, storage=backend, load_if_exists=True)
        find(study, backend)
        if self._storage.metric_names is None:  # what Optuna's dashboard calls the value
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                self._storage.set_metric_names([study.metric])
        started = self._storage.user_attrs.get("fingerprint", {})
        fingerprint = study.fingerprint()
        fingerprint["variants"] = {**started.get("variants", {}), **fingerprint["variants"]}  # also those left out
        if started != fingerprint:
            self._storage.set_user_attr("fingerprint", fingerprint)
        self._parent = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._beats = 0
        self._last_beat = -math.inf
        self._seen: dict[str, tuple[int | None, float]] = {}  # by parent: its counter, and since when
        self.failed: list[str] = []  # labels of the cells that this parent gave up
        self._ours: set[int] = set()  # trials that this parent must end, those of cells given up included
        self._done: set[str] = set()  # keys of cells
        self._settled = 0  # trials below this number are finished
        sampler, interval = study.sampler, Interval(1, 10, runs=1)  # one run per cell, whatever its learning rate
        if isinstance(sampler, Bisect):
            interval = Interval(sampler.low, sampler.high, True, sampler.resolution, sampler.runs)
        self._search: Search[Cell | Place] = Search(interval)
        self._storage.pruner = MedianPruner(n_warmup_steps=study.steps // 5) if study.prune else NopPruner()

    @property
    def total(self) -> int | None:
        """How many cells there will be; None where a bisection decides."""
        sampler = self._study.sampler
        return sampler.trials if isinstance(sampler, Tpe) else len(self._study.cells) or None

    @property
    def done(self) -> int:
        """How many cells have been trained, by any parent."""
        self._absorb()
        return len(self._done)

    def keep_up(self) -> None:
        """Every `BEAT` seconds: shows that this parent lives, and fails the running trials of dead ones."""
        now = time.monotonic()
        if now - self._last_beat < BEAT:
            return
        if now - self._last_beat > GRACE / 2:  # this parent was held up, and so were others, perhaps
            self._seen.clear()
        self._last_beat = now
        self._beats += 1
        self._storage.set_user_attr(f"parent:{self._parent}", self._beats)
        beats = self._storage.user_attrs
        for trial in self._trials(TrialState.RUNNING):
            if trial.number in self._ours:
                continue
            parent = f"parent:{trial.user_attrs.get('parent', trial.number)}"  # one that has not said yet who it is
            beat = beats.get(parent)
            last, since = self._seen.get(parent, (None, now))
            self._seen[parent] = (beat, since if beat == last else now)
            is_mine = parent == f"parent:{self._parent}"  # and unknown: its making was not answered
            if self._alone or is_mine or now - self._seen[parent][1] >= GRACE:
                self._fail(trial.number)
                _log.warning("trial %d, which no living parent trains, is trained again", trial.number)

    def claim(self) -> Claim | None:
        """A cell to train; None if there is none now."""
        claim = self._draw() if isinstance(self._study.sampler, Tpe) else self._begin()
        if claim is not None:
            self._ours.add(claim.trial.number)
        return claim

    def adopt(self, cell: Cell, outcome: Outcome) -> None:
        """Writes down what a cell gave that was trained by itself, unless it is known."""
        self._absorb()
        if cell.key not in self._done:
            attributes = {"parent": "by itself", **outcome.as_dict()}
            rest = {"value": _value(outcome), "constraints": {"unstable": self._excess(outcome)}}
            self._storage.add_trial(_trial(cell, TrialState.COMPLETE, attributes, **rest))

    def is_finished(self) -> bool:
        """Whether, when there is nothing to claim, nobody trains a cell that might have to be trained again."""
        under_way, sampler = self._absorb(), self._study.sampler
        if not all("error" in trial.user_attrs for trial in under_way):
            return False
        return self._count() >= sampler.trials if isinstance(sampler, Tpe) else self._choose(under_way) is None

    def progress(self, claim: Claim, step: int, loss: float) -> bool:
        """Writes down the loss of a running cell; returns whether to prune it."""
        if step <= claim.last_step or not math.isfinite(loss):
            return False
        claim.last_step = step
        with _while_ours(claim):
            claim.trial.report(loss, step)
            return claim.trial.should_prune()
        return True

    def finish(self, claim: Claim, outcome: Outcome | None) -> None:
        """Writes down what a cell gave; None: it was pruned."""
        with _while_ours(claim):
            if outcome is None:
                self._storage.tell(claim.trial, state=TrialState.PRUNED, skip_if_finished=True)
            else:
                for name, value in outcome.as_dict().items():
                    claim.trial.set_user_attr(name, value)
                claim.trial.set_constraint("unstable", self._excess(outcome))
                self._storage.tell(claim.trial, _value(outcome), skip_if_finished=True)
        self._ours.remove(claim.trial.number)

    def give_up(self, claim: Claim, error: str) -> None:
        """Writes down that a cell can't be trained, and why."""
        with _while_ours(claim):
            claim.trial.set_user_attr("error", error)
        self.failed.append(claim.cell.label)

    def release(self) -> None:
        """Leaves the cells that are not finished to the next parent; this one must not go on."""
        for number in self._ours:
            self._fail(number)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._storage.get_trials(deepcopy=False, states=states or None)

    def _absorb(self) -> list[FrozenTrial]:
        """Takes in what is new since the last call; returns what is under way."""
        trials = self._trials()
        under_way = []
        for trial in trials[self._settled :]:
            if trial.state == TrialState.RUNNING:
                under_way.append(trial)
            is_new = trial.state in _DONE and trial.user_attrs["cell"] not in self._done
            if (is_new or "error" in trial.user_attrs) and self._study.holds(cell := cell_of(trial)):
                if is_new:
                    self._done.add(cell.key)
                # One that is given up runs as long as its parent.
                stable = None if trial.state == TrialState.RUNNING else max(trial.constraints.values(), default=0) <= 0
                probe = None if trial.state == TrialState.FAIL else Probe(cell.lr, stable)
                self._search.put(self._place(cell), trial.number, probe)
        while self._settled < len(trials) and trials[self._settled].state.is_finished():
            self._settled += 1
        return under_way

    def _fail(self, number: int) -> None:
        """Ends a trial that is not finished, or, if its outcome is known and its end alone was missed, finishes it."""
        trial = self._trials()[number]
        value, state = None, TrialState.FAIL
        if trial.constraints:  # written down last
            value, state = _value(outcome_of(trial)), TrialState.COMPLETE
        with suppress(UpdateFinishedTrialError):  # by another parent, at the same moment
            self._storage.tell(number, value, state=state, skip_if_finished=True)

    def _excess(self, outcome: Outcome) -> float:
        """The constraint: at most zero for a stable run."""
        return -1.0 if self._study.stability.is_stable(outcome) else 1.0

    def _place(self, cell: Cell) -> Cell | Place:
        """What one trial has at a time: a cell or, in a bisection, a group and seed."""
        return (cell.group, cell.seed) if isinstance(self._study.sampler, Bisect) else cell

    def _choose(self, under_way: Sequence[FrozenTrial]) -> Cell | None:
        """The next cell of a grid or bisection."""
        study = self._study
        taken = {self._place(cell_of(trial)) for trial in under_way if "error" not in trial.user_attrs}
        places: Iterable[Cell | Place] = study.cells.values()
        if isinstance(study.sampler, Bisect):
            places = itertools.product(study.groups, study.seeds)
        place = self._search.choose(place for place in places if place not in taken)
        if place is None or isinstance(place, Cell):
            return place
        lr = self._search.next(place)
        assert lr is not None  # or it would not have been chosen
        return place[0].cell(lr, place[1])

    def _begin(self) -> Claim | None:
        """The next cell of a grid or bisection, with a trial that is whole from the start."""
        known = len(self._trials())
        cell = self._choose(self._absorb())
        if cell is None:
            return None
        template = _trial(cell, TrialState.RUNNING, {"parent": self._parent})
        study_id = self._backend.get_study_id_from_name(self._study.name)
        trial = Trial(self._storage, self._backend.create_new_trial(study_id, template))
        for other in self._trials()[known : trial.number]:  # of other parents, at the same moment
            if other.state in (TrialState.RUNNING, *_DONE) and self._place(cell_of(other)) == self._place(cell):
                trial.set_user_attr("duplicate", other.number)
                self._fail(trial.number)
                return self._begin()
        return Claim(trial, cell)

    def _draw(self) -> Claim | None:
        """What a search asks for, with its trial."""
        study, sampler = self._study, self._study.sampler
        assert isinstance(sampler, Tpe)
        if self._count() >= sampler.trials:
            return None
        trial = self._storage.ask()
        if self._count(trial.number) >= sampler.trials:  # another parent has asked, too
            self._fail(trial.number)
            return None
        trial.set_user_attr("parent", self._parent)
        self._storage.sampler = TPESampler(seed=sampler.seed + trial.number)  # nobody draws what another has drawn
        arm = trial.suggest_categorical("arm", study.arms)
        factors = {}
        for name, values in study.factors.items():
            if study.arm(arm).concerned_by(study.setting_of(name)):
                shown: dict[Any, Value] = {show(v) if isinstance(v, tuple) else v: v for v in values}
                factors[name] = shown[trial.suggest_categorical(name, list(shown))]
        seed = study.seeds[trial.number % len(study.seeds)]  # in turns: the best seed is not worth a search
        lr = trial.suggest_float("lr", sampler.low, sampler.high, log=True)
        cell = Group(arm, tuple(sorted(factors.items()))).cell(lr, seed)
        for name, value in _attributes(cell).items():
            trial.set_user_attr(name, value)
        return Claim(trial, cell)

    def _count(self, before: int | None = None) -> int:
        """How many trials have not failed, of those before a number."""
        return sum(trial.state != TrialState.FAIL for trial in self._trials()[:before])


def cell_of(trial: FrozenTrial) -> Cell:
    """What a trial trains."""
    return Cell.from_dict(trial.user_attrs["cell_spec"])


def outcome_of(trial: FrozenTrial) -> Outcome:
    """What a finished trial gave; an earlier version wrote it as one attribute."""
    return Outcome.from_dict(trial.user_attrs.get("outcome", trial.user_attrs))


def _trial(cell: Cell, state: TrialState, attributes: Mapping[str, Any], **rest: Any) -> FrozenTrial:
    """The trial of a cell: its learning rate and seed, in ranges that may grow, and in attributes all of it."""
    distributions: dict[str, BaseDistribution] = {
        "lr": FloatDistribution(min(1e-12, cell.lr), max(1e6, cell.lr), log=True),
        "seed": IntDistribution(0, 2**32 - 1),
    }
    params = {"lr": cell.lr, "seed": cell.seed}
    attributes = {**_attributes(cell), **attributes}
    return create_trial(state=state, params=params, distributions=distributions, user_attrs=attributes, **rest)


def _attributes(cell: Cell) -> dict[str, Any]:
    """A cell in a trial's user attributes, in a form that people read there, and whole."""
    shown = {name: show(value) for name, value in cell.group.factors}
    return {"arm": cell.arm, **shown, "cell_spec": cell.as_dict(), "cell": cell.key}


@contextmanager
def _while_ours(claim: Claim) -> Iterator[None]:
    """Passes over writes to a trial that another parent, which took this one for dead, has failed."""
    try:
        yield
    except UpdateFinishedTrialError:
        _log.warning("%s is finished already, or others took this parent for dead", claim.cell.label)


def _value(outcome: Outcome) -> float:
    """Validation loss; for a run that diverged, the worst there is: twice the loss at its start, or a huge number."""
    if outcome.val_loss is not None and math.isfinite(outcome.val_loss):
        return outcome.val_loss
    return 2 * outcome.initial_loss if math.isfinite(outcome.initial_loss) else sys.float_info.max
