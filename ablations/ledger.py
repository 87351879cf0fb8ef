"""The cells of a study in an Optuna storage: what is to be trained, what runs, what is done.

Each training run of a cell is a trial. Its user attributes hold the cell's key ("cell") and content ("cell_spec"), who
trains it ("parent") and what it gave ("outcome"), or "error" if it can't be trained: such a trial keeps running until
its parent ends, so that no sampler asks for the cell again before. Failed trials don't count. They have an "error", or
"duplicate" because another trial has their cell, or neither: their parent was stopped. The next one trains them again.

Several parents may share one database. Optuna hands a waiting trial to one of them alone; of two trials of one cell,
which two parents have enqueued at the same moment, the one with the lower number is trained. To sample, a parent takes
the next number, knowing all trials before it, or fails the trial and tries again. A parent counts as dead once its sign
of life, a counter in the study's user attributes, has not changed for `GRACE` seconds of the observer's own clock, so
that the machines' clocks need not agree.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from msign_lightning.ablations.cell import Cell, Group, Outcome, show
from msign_lightning.ablations.methods import Value
from msign_lightning.ablations.sampler import FrontierSampler
from msign_lightning.ablations.study import Bisect, Grid, Study, StudyError, Tpe, changes, setting_of

BEAT = 10.0  # seconds between two signs of life
GRACE = 60.0  # seconds without one after which a parent counts as dead

_DONE = (TrialState.COMPLETE, TrialState.PRUNED)
_UNDER_WAY = (TrialState.RUNNING, TrialState.WAITING)
_log = logging.getLogger(__name__)


@dataclass
class Claim:
    """A cell that this parent trains, with its trial, how often that failed, and the last step reported."""

    trial: Trial
    cell: Cell
    failures: int = 0
    last_step: int = -1


def load(study: Study, backend: BaseStorage) -> optuna.Study:
    """The study in a storage.

    Raises:
        StudyError: It is not there, or was started with other content.
    """
    try:
        found = optuna.load_study(study_name=study.name, storage=backend)
    except KeyError as error:
        names = ", ".join(sorted(optuna.get_all_study_names(backend))) or "none"
        raise StudyError(f"study {study.name} has not been started here; studies in the storage: {names}") from error
    started = found.user_attrs.get("fingerprint")
    changed = changes(started, _plain(study.fingerprint())) if started is not None else []
    if changed:
        raise StudyError(
            f"study {study.name} must not change after its start: {'; '.join(changed)}; "
            "run what is new under another name"
        )
    return found


def exists(study: Study, backend: BaseStorage) -> bool:
    """Whether the study has been started; raises as `load` does if with other content."""
    if study.name not in optuna.get_all_study_names(backend):
        return False
    load(study, backend)
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
        self._storage = optuna.create_study(study_name=study.name, storage=backend, load_if_exists=True)
        if "fingerprint" not in self._storage.user_attrs:
            self._storage.set_user_attr("fingerprint", _plain(study.fingerprint()))
        load(study, backend)
        self._alone = alone
        self._parent = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._beats = 0
        self._last_beat = -math.inf
        self._seen: dict[str, tuple[int | None, float]] = {}
        self._claims: dict[int, Claim] = {}
        self._given_up: dict[int, Claim] = {}
        self._storage.sampler = self._make_sampler()
        self._storage.pruner = MedianPruner(n_warmup_steps=study.steps // 5) if study.prune else NopPruner()

    @property
    def total(self) -> int | None:
        """How many cells there will be; None where the sampler decides."""
        match self._study.sampler:
            case Grid():
                return len(self._study.cells())
            case Tpe(trials=trials):
                return trials
        return None

    @property
    def done(self) -> int:
        """How many cells have been trained, by any parent."""
        return len({trial.user_attrs["cell"] for trial in self._trials(*_DONE)})

    @property
    def failed(self) -> list[str]:
        """The cells that this parent gave up."""
        return [claim.cell.label for claim in self._given_up.values()]

    def keep_up(self) -> None:
        """Every `BEAT` seconds: shows that this parent lives, and fails the running trials of dead ones."""
        now = time.monotonic()
        if now - self._last_beat < BEAT:
            return
        self._last_beat = now
        self._beats += 1
        self._storage.set_user_attr(f"parent:{self._parent}", self._beats)
        beats = self._storage.user_attrs
        for trial in self._trials(TrialState.RUNNING):
            ours = trial.number in self._claims or trial.number in self._given_up
            if not ours and not self._may_live(trial, beats):
                self._fail(trial.number)
                _log.warning("trial %d was left behind by a parent that is gone; it is trained again", trial.number)

    def claim(self) -> Claim | None:
        """A cell to train; None if there is none now."""
        sampler = self._study.sampler
        while (claim := self._pop() if isinstance(sampler, Grid) else self._sample(sampler)) is not None:
            claim.trial.set_user_attr("parent", self._parent)
            number = claim.trial.number
            twin = next((t.number for t in self._trials() if _goes_first(t, number, claim.cell)), None)
            if twin is None:
                self._claims[number] = claim
                return claim
            claim.trial.set_user_attr("duplicate", twin)
            self._fail(number)
        return None

    def is_finished(self) -> bool:
        """Whether, when there is nothing to claim, nobody trains a cell that might have to be trained again."""
        trials = self._trials()
        if any(trial.state in _UNDER_WAY and "error" not in trial.user_attrs for trial in trials):
            return False
        return not isinstance(self._study.sampler, Grid) or not self._missing(trials)

    def report(self, claim: Claim, step: int, loss: float) -> bool:
        """Writes down the loss of a running cell, in nats per token; returns whether to prune it."""
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
                stable = self._study.criterion.is_stable(outcome)
                claim.trial.set_user_attr("outcome", outcome.as_dict())
                claim.trial.set_constraint("unstable", -1.0 if stable else 1.0)
                self._storage.tell(claim.trial, _value(outcome), skip_if_finished=True)
        del self._claims[claim.trial.number]

    def give_up(self, claim: Claim, error: str) -> None:
        """Writes down that a cell can't be trained, and why."""
        with _while_ours(claim):
            claim.trial.set_user_attr("error", error)
        self._given_up[claim.trial.number] = self._claims.pop(claim.trial.number)

    def release(self) -> None:
        """Leaves the cells that are not finished to the next parent; this one must not go on."""
        for number in [*self._claims, *self._given_up]:
            self._fail(number)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._storage.get_trials(deepcopy=False, states=states or None)

    def _fail(self, number: int) -> None:
        """Ends a trial that is not finished, or, if its outcome is known and its end alone was missed, finishes it."""
        trial = self._trials()[number]
        value, state = None, TrialState.FAIL
        if trial.constraints:  # written down last
            value, state = _value(Outcome.from_dict(trial.user_attrs["outcome"])), TrialState.COMPLETE
        with suppress(UpdateFinishedTrialError):  # by another parent, at the same moment
            self._storage.tell(number, value, state=state, skip_if_finished=True)

    def _may_live(self, trial: FrozenTrial, beats: Mapping[str, Any]) -> bool:
        """Whether the parent of a running trial may be alive. One that has not said yet who it is has one beat."""
        if self._alone:
            return False
        parent = f"parent:{trial.user_attrs.get('parent', trial.number)}"
        beat, now = beats.get(parent), time.monotonic()
        last, since = self._seen.get(parent, (None, now))
        self._seen[parent] = (beat, since if beat == last else now)
        return beat != last or now - since < GRACE

    def _make_sampler(self) -> BaseSampler:
        match self._study.sampler:
            case Bisect() as bisect:
                return FrontierSampler("lr", bisect.resolution, runs=bisect.runs, seed=0)
            case Tpe(seed=seed):
                # A parent that resumes or joins must not draw again what was drawn before.
                return TPESampler(seed=seed + len(self._trials()), constant_liar=True)
            case Grid():
                return RandomSampler(seed=0)

    def _pop(self) -> Claim | None:
        """A cell of a grid."""
        if not self._trials(TrialState.WAITING):
            self._enqueue()
        if not self._trials(TrialState.WAITING):
            return None
        trial = self._storage.ask()
        if "cell" not in trial.user_attrs:  # another parent has popped the last one
            self._fail(trial.number)
            return None
        return Claim(trial, Cell.from_dict(trial.user_attrs["cell_spec"]))

    def _sample(self, sampler: Bisect | Tpe) -> Claim | None:
        """A cell that the sampler chooses, knowing all that other parents have chosen before."""
        while True:
            self._await_others()
            known = len(self._trials())
            if not self._is_anything_to_ask(sampler):
                return None
            trial = self._storage.ask()
            if trial.number <= known:  # below: somebody had enqueued it
                cell = self._suggest(trial, sampler)
                if isinstance(sampler, Tpe) or self._runs_before(trial) < sampler.runs:
                    trial.set_user_attr("cell_spec", cell.as_dict())
                    trial.set_user_attr("cell", cell.key)
                    return Claim(trial, cell)
            self._fail(trial.number)  # in the meantime another parent has asked, or told what made this one needless

    def _await_others(self) -> None:
        """Waits for parents that are between asking and writing down what they got, unless they have died there."""
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and any(
            "cell" not in trial.user_attrs for trial in self._trials(TrialState.RUNNING)
        ):
            time.sleep(0.02)

    def _is_anything_to_ask(self, sampler: Bisect | Tpe) -> bool:
        if isinstance(sampler, Tpe):
            return sum(trial.state != TrialState.FAIL for trial in self._trials()) < sampler.trials
        frontier = self._storage.sampler
        assert isinstance(frontier, FrontierSampler)
        return not (frontier.is_exhausted(self._storage) or frontier.must_wait(self._storage))

    def _runs_before(self, trial: Trial) -> int:
        """How many runs of its group and seed a bisection had before a trial."""
        same = {**trial.params, "lr": None}
        earlier = [t for t in self._trials() if t.number < trial.number and t.state != TrialState.FAIL]
        return sum({**t.params, "lr": None} == same for t in earlier)

    def _suggest(self, trial: Trial, sampler: Bisect | Tpe) -> Cell:
        study = self._study
        arm = trial.suggest_categorical("arm", study.arms)
        factors = {}
        for name, values in study.factors.items():
            if study.arm(arm).concerned_by(setting_of(name)):
                choice = trial.suggest_categorical(name, [_parameter(value) for value in values])
                factors[name] = next(value for value in values if _parameter(value) == choice)
        if isinstance(sampler, Bisect):
            seed = trial.suggest_categorical("seed", study.seeds)
        else:  # in turns: the best seed is not worth a search
            seed = study.seeds[trial.number % len(study.seeds)]
        lr = trial.suggest_float("lr", sampler.low, sampler.high, log=True)
        return Group(arm, tuple(sorted(factors.items()))).cell(lr, seed)

    def _enqueue(self) -> None:
        """Adds a waiting trial for each cell of a grid that no trial stands for."""
        study = self._study
        missing = self._missing(self._trials())
        if not missing:
            return
        rates = [cell.lr for cell in study.cells()]
        choices: dict[str, Sequence[Value]] = {"arm": study.arms, "seed": study.seeds, **study.factors}
        distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution([_parameter(value) for value in values]) for name, values in choices.items()
        }
        distributions["lr"] = FloatDistribution(min(rates), max(rates), log=True)
        for cell in missing:
            params = {"arm": cell.arm, "seed": cell.seed, **{name: _parameter(value) for name, value in cell.factors}}
            trial = create_trial(
                state=TrialState.WAITING,
                params=params,
                distributions={name: distributions[name] for name in params},
                user_attrs={"cell": cell.key, "cell_spec": cell.as_dict()},
            )
            self._storage.add_trial(trial)

    def _missing(self, trials: Sequence[FrozenTrial]) -> list[Cell]:
        """The cells of a grid that are neither done nor under way."""
        found = {trial.user_attrs.get("cell") for trial in trials if trial.state != TrialState.FAIL}
        return [cell for cell in self._study.cells() if cell.key not in found]


@contextmanager
def _while_ours(claim: Claim) -> Iterator[None]:
    """Passes over writes to a trial that another parent, which took this one for dead, has failed."""
    try:
        yield
    except UpdateFinishedTrialError:
        _log.warning("%s is no longer this parent's: others took it for dead", claim.cell.label)


def _goes_first(trial: FrozenTrial, number: int, cell: Cell) -> bool:
    """Whether a trial has the cell that trial `number` has too, and the better right to it."""
    if trial.number == number or trial.user_attrs.get("cell") != cell.key:
        return False
    return trial.state in _DONE or (trial.state in _UNDER_WAY and trial.number < number)


def _value(outcome: Outcome) -> float:
    """Validation loss; for a run that diverged, the worst there is: twice the loss at its start, or a huge number."""
    if outcome.val_loss is not None and math.isfinite(outcome.val_loss):
        return outcome.val_loss
    return 2 * outcome.initial_loss if math.isfinite(outcome.initial_loss) else sys.float_info.max


def _parameter(value: Value) -> str | int | float | bool:
    """A factor's value in a form that Optuna's distributions take."""
    return show(value) if isinstance(value, tuple) else value


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a storage."""
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain
