"""Runs a study: one parent, which owns the storage, and the workers that train its cells."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import yaml
from optuna.trial import TrialState
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from msign_lightning.ablations.cell import Cell, Outcome
from msign_lightning.ablations.frontier import Run
from msign_lightning.ablations.ledger import Claim, Ledger, exists, load
from msign_lightning.ablations.pool import Crashed, Finished, Pool, Report
from msign_lightning.ablations.storage import StorageError, opened, reading
from msign_lightning.ablations.study import Study, StudyError
from msign_lightning.recipes import recipe_file

FOLDER = Path("runs/ablations")
RETRIES = 2  # of a cell whose training raised an exception or whose worker died

_log = logging.getLogger(__name__)


class Summary(NamedTuple):
    """How a study stands.

    Attributes:
        done: Number of cells trained, by all parents, pruned and diverged ones included.
        failed: The cells that could not be trained.
    """

    done: int
    failed: list[str]


def run(study: Study, *, storage: str | None = None, workers: int | None = None, folder: Path = FOLDER) -> Summary:
    """Trains the cells of a study that are not done yet, until none is left.

    A cell whose worker raises an exception or dies is tried again by another, `RETRIES` times, then given up. After any
    interruption, of a worker, of this process or of the machine, `run` goes on where it stopped. Several parents on
    several machines may run one study in one database.

    Args:
        study: What to run.
        storage: URL of a database, or path of an Optuna journal file; None for a journal in the study's folder.
        workers: How many cells are trained at once, each on one thread and, unless the recipe trains on the CPU, one of
            the GPUs; None for as many as there are GPUs, or else cores.
        folder: Where the study's folder goes, with the journal and the cells' logs.

    Raises:
        ValueError: The number of workers is not positive.
        StudyError: The study was started with other content, or its recipe fails at start.
        StorageError: The storage or the folder can't be used, or no longer. What was finished is kept.
        KeyboardInterrupt: It was interrupted or terminated. What was finished is kept, what was not is trained again.
    """
    gpus = _gpus() if _may_use_gpu(study) else []
    workers = workers if workers is not None else len(gpus) or len(os.sched_getaffinity(0))
    if workers < 1:
        raise ValueError(f"workers must be a positive integer, got {workers}")
    place = folder / study.name
    _check_writable(place)
    with opened(storage, place) as (backend, alone), _Interrupt() as interrupt:
        exists(study, backend)
        ledger: Ledger | None = None
        try:
            with Pool(study, place, workers, gpus) as pool:
                _check_recipe(study, pool, interrupt)
                ledger = Ledger(study, backend, alone=alone)
                _train(ledger, pool, interrupt, study)
        except (KeyboardInterrupt, _OutOfSpaceError) as error:
            if ledger is not None:
                ledger.release()
            if isinstance(error, _OutOfSpaceError):
                raise StorageError(f"folder {place} can't be written to: {error}") from error
            raise
        ledger.release()
        return Summary(ledger.done, ledger.failed)


def results(study: Study, *, storage: str | None = None, folder: Path = FOLDER) -> list[Run]:
    """The cells of a study that have been trained to the end or diverged, each once, in the order of their start.

    Raises:
        StudyError: The study has not been started, or with other content.
        StorageError: The storage can't be reached.
    """
    with reading(storage, folder / study.name) as backend:
        trials = load(study, backend).get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    runs: dict[str, Run] = {}
    for trial in trials:
        if "outcome" in trial.user_attrs:
            outcome = Outcome.from_dict(trial.user_attrs["outcome"])
            cell = Cell.from_dict(trial.user_attrs["cell_spec"])
            runs.setdefault(cell.key, Run(cell, outcome, study.criterion.is_stable(outcome)))
    return list(runs.values())


class _OutOfSpaceError(Exception):
    """A worker can't write its logs."""


class _Interrupt:
    """Holds Ctrl-C and SIGTERM back until `check`, so that they don't fall into the midst of a write."""

    def __init__(self) -> None:
        self._noted = False
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was one."""
        if self._noted:
            raise KeyboardInterrupt


def _check_recipe(study: Study, pool: Pool, interrupt: _Interrupt) -> None:
    """Lets one worker build the recipe of every arm, while the others import what they need."""
    pool.start(0, None)
    pool.warm_up()
    while pool.busy:
        interrupt.check()
        for _, message in pool.wait(1.0):
            if isinstance(message, Crashed):
                raise StudyError(f"recipe {study.recipe} fails at start: {message.error}")


def _train(ledger: Ledger, pool: Pool, interrupt: _Interrupt, study: Study) -> None:
    claims: dict[int, Claim] = {}
    again: list[Claim] = []
    with (
        logging_redirect_tqdm(),
        tqdm(total=ledger.total, desc=study.name, unit="cell", disable=None, initial=ledger.done) as bar,
    ):
        while True:
            ledger.keep_up()
            for place in pool.idle:
                claim = again.pop() if again else ledger.claim()
                if claim is None:
                    break
                claims[place] = claim
                pool.start(place, claim.cell)
            if not pool.busy and ledger.is_finished():
                return
            bar.set_postfix(running=pool.busy, failed=len(ledger.failed))
            for place, message in pool.wait(1.0):
                claim = claims[place]
                match message:
                    case Report(step, loss):
                        prune = ledger.report(claim, step, loss)
                        if study.prune:
                            pool.answer(place, prune)
                    case Finished(outcome):
                        ledger.finish(claim, outcome)
                        bar.n = ledger.done
                        _log.info("%s: %s", claim.cell.label, _describe(outcome))
                    case Crashed(error, fatal):
                        if fatal:
                            raise _OutOfSpaceError(error)
                        claim.failures += 1
                        if claim.failures <= RETRIES:
                            again.append(claim)
                            _log.warning("%s is tried again: %s", claim.cell.label, error.strip().splitlines()[-1])
                        else:
                            ledger.give_up(claim, error)
                            _log.error("%s is given up: %s", claim.cell.label, error)
            interrupt.check()


def _describe(outcome: Outcome | None) -> str:
    if outcome is None:
        return "pruned"
    if outcome.val_loss is None:
        return f"diverged at step {outcome.diverged_at}"
    return f"validation loss {outcome.val_loss:.3f}, {outcome.seconds:.1f} s"


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageError(f"folder {folder} must be one that can be written to: {error.strerror}") from error


def _may_use_gpu(study: Study) -> bool:
    recipe = yaml.safe_load(recipe_file(study.recipe).read_text())
    usual = recipe.get("trainer", {}).get("accelerator")
    return bool(study.settings.get("trainer.accelerator", usual) != "cpu")


def _gpus() -> list[str]:
    """Names of the GPUs that CUDA may use, found without starting it in this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return [str(n) for n, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]
