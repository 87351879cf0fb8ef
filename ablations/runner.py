"""Runs a study: one parent, which owns the storage, and the workers that train its cells."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

from optuna.trial import TrialState
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from msign_lightning._extras import need
from msign_lightning.ablations.cell import Cell, Outcome
from msign_lightning.ablations.launch import Crashed, Finished, Pool, Progress, Worker
from msign_lightning.ablations.ledger import Claim, Ledger, cell_of, changes_of, exists, find, outcome_of
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.results import Run
from msign_lightning.ablations.storage import JOURNAL, StorageError, opened, reading
from msign_lightning.ablations.study import Bisect, Study, Tpe

FOLDER = Path("runs/ablations")
OUTCOME = "outcome.json"
RETRIES = 2  # of a cell whose training raised an exception or whose worker died

_log = logging.getLogger(__name__)


class Summary(NamedTuple):
    """How many cells have been trained by all parents, pruned and diverged ones included; and which could not be."""

    done: int
    failed: list[str]


def run(
    study: Study,
    *,
    storage: str | None = None,
    workers: int | None = None,
    folder: Path = FOLDER,
    time_limit: float | None = None,
    legs: int = 1,
    launcher: Literal["local", "ray"] = "local",
) -> Summary:
    """Trains the cells of a study that are not done yet, until none is left.

    A cell whose worker raises an exception, dies or hangs is tried again by another, `RETRIES` times, then given up.
    After any interruption, of a worker, of this process or of the machine, `run` goes on where it stopped. Several
    parents on several machines may run one study in one database.

    Args:
        study: What to run.
        storage: URL of a database, or path of an Optuna journal file; None for a journal in the study's folder.
        workers: How many cells are trained at once, each on one thread and, unless the program trains on the CPU, one
            of the GPUs, or on as many as the setting `trainer.devices` says; None for as many as there are GPUs, or
            else cores, on this machine or in the cluster.
        folder: Where the study's folder goes, with the journal and the cells' logs.
        time_limit: Seconds that a cell may take; None for no limit.
        legs: As of `program.run_cell`: a cell that is tried again goes on where its last leg ended.
        launcher: Where cells are trained: "local", or "ray" for a Ray cluster, all of whose nodes share the folder.

    Raises:
        ValueError: The number of workers or legs, or the time limit is not positive.
        StudyError: The study was started with other content, or does not fit its program.
        StorageError: The storage or the folder can't be used, or no longer. What was finished is kept.
        KeyboardInterrupt: It was interrupted or terminated. What was finished is kept, what was not is trained again.
    """
    worker, find_gpus, count_cores = Worker, _gpus, cores
    if launcher == "ray":
        need("ray", "ray")
        from msign_lightning.ablations import cluster

        worker, find_gpus, count_cores = cluster.RayWorker, cluster.gpus, cluster.cores
    gpus = _deal(study, find_gpus)
    workers = workers if workers is not None else len(gpus) or max(1, count_cores() // _devices(study))
    for name, value in {"workers": workers, "legs": legs, "time_limit": time_limit}.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    place = folder / study.name
    _check_writable(place)
    ledger: Ledger | None = None
    with _interrupts_held() as check_interrupt, opened(storage, place, check_interrupt) as (backend, alone):
        exists(study, backend)
        try:
            with Pool(study, place, workers, gpus, time_limit, legs, RETRIES, worker) as pool:
                _log.info("study %s: %d workers start, which takes some seconds", study.name, workers)
                _check_program(study, pool, check_interrupt)
                ledger = Ledger(study, backend, alone=alone)
                for cell, outcome in _by_themselves(study, place).items():
                    ledger.adopt(cell, outcome)
                _train(ledger, pool, check_interrupt, study)
        except (KeyboardInterrupt, StudyError, StorageError):
            if ledger is not None:
                ledger.release()
            raise
        ledger.release()
        return Summary(ledger.done, ledger.failed)


def run_alone(study: Study, key: str, *, folder: Path = FOLDER, legs: int = 1) -> Outcome:
    """Trains one cell of a grid in this process and writes its outcome to its folder, for `run` and `results` to find.

    Its key may be its number among the study's cells instead, counted from 0, as job arrays do.

    Raises:
        StudyError: The study has no such cell, or does not fit its program.
        StorageError: The folder can't be written to.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported, as for a worker
    from msign_lightning.ablations.program import run_cell

    cells = list(study.cells.values())
    if key not in study.cells and not (key.isdecimal() and int(key) < len(cells)):
        rule = f"cell must be the key of a cell of grid {study.name}, or a number below {len(cells)}"
        raise StudyError(f"{rule}, got {key!r}")
    cell = study.cells[key] if key in study.cells else cells[int(key)]
    if gpus := _deal(study, _gpus):
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0]  # no more than a worker has
    place = folder / study.name
    _check_writable(place / cell.folder)
    try:
        outcome = run_cell(study, cell, place, legs=legs)
    except (ValueError, ImportError) as error:
        raise StudyError(f"{cell.label}: {error}") from error
    assert outcome is not None  # nothing prunes it
    found = {"cell": cell.as_dict(), "outcome": outcome.as_dict(), "fingerprint": study.fingerprint()}
    unfinished = place / cell.folder / f"{OUTCOME}.part"
    unfinished.write_text(json.dumps(found), encoding="utf-8")
    unfinished.rename(place / cell.folder / OUTCOME)
    return outcome


def _by_themselves(study: Study, place: Path) -> dict[Cell, Outcome]:
    """What cells gave that were trained by themselves."""
    found = {}
    for file in sorted(place.glob(f"*/{OUTCOME}")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            cell, outcome = Cell.from_dict(content["cell"]), Outcome.from_dict(content["outcome"])
            started = content["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            _log.warning("%s is left out, since it holds no outcome: %r", file, error)
            continue
        if changed := changes_of(study, started):
            _log.warning("%s is left out, since the study was another: %s", file, "; ".join(changed))
        elif study.holds(cell):
            found[cell] = outcome
    return found


def results(study: Study, *, storage: str | None = None, folder: Path = FOLDER) -> list[Run]:
    """The cells of a study that have been trained to the end or diverged, each once, in the order of their start.

    Raises:
        StudyError: The study has not been started, or with other content.
        StorageError: The storage can't be reached.
    """
    by_themselves = _by_themselves(study, folder / study.name)
    outcomes: dict[Cell, Outcome] = {}
    if not by_themselves or storage is not None or (folder / study.name / JOURNAL).exists():
        with reading(storage, folder / study.name) as backend:
            trials = find(study, backend).get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        for trial in trials:
            if {"val_loss", "outcome"} & trial.user_attrs.keys() and study.holds(cell := cell_of(trial)):
                outcomes.setdefault(cell, outcome_of(trial))
    for cell, outcome in by_themselves.items():
        outcomes.setdefault(cell, outcome)
    return [Run(cell, outcome, study.stability.is_stable(outcome)) for cell, outcome in outcomes.items()]


@contextmanager
def _interrupts_held() -> Iterator[Callable[[], None]]:
    """Holds Ctrl-C and SIGTERM back until they are checked for, so that they don't fall into the midst of a write."""
    noted: list[int] = []

    def check() -> None:
        if noted:
            raise KeyboardInterrupt

    def note(number: int, frame: FrameType | None) -> None:
        check()
        noted.append(number)

    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM) if is_main}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_program(study: Study, pool: Pool, check_interrupt: Callable[[], None]) -> None:
    """Lets one worker build the program of every arm, while the others import what they need."""
    pool.start(0, None)
    pool.warm_up()
    while pool.busy:
        check_interrupt()
        for _, message in pool.wait(1.0):
            if isinstance(message, Crashed):
                raise StudyError(f"program {study.program} fails at start: {message.error}")


def _train(ledger: Ledger, pool: Pool, check_interrupt: Callable[[], None], study: Study) -> None:
    claims: dict[int, Claim] = {}
    with (
        logging_redirect_tqdm(),
        tqdm(total=ledger.total, desc=study.name, unit="cell", disable=None, initial=ledger.done) as bar,
    ):
        while True:
            ledger.keep_up()
            for place in pool.idle:
                if (claim := ledger.claim()) is None:
                    break
                claims[place] = claim
                pool.start(place, claim.cell)
            if not pool.busy and ledger.is_finished():
                return
            bar.set_postfix(running=pool.busy, failed=len(ledger.failed))
            for place, message in pool.wait(1.0):
                claim = claims[place]
                match message:
                    case Progress(step, loss):
                        prune = ledger.progress(claim, step, loss)
                        if study.prune:
                            pool.answer(place, prune)
                    case Finished(outcome):
                        ledger.finish(claim, outcome)
                        bar.n = ledger.done
                        _log.info("%s: %s", claim.cell.label, describe(outcome))
                    case Crashed(error, fatal):
                        if fatal is not None:
                            raise fatal(error)
                        ledger.give_up(claim, error)
                        _log.error("%s is given up: %s", claim.cell.label, error)
            check_interrupt()


def describe(outcome: Outcome | None) -> str:
    """What a run gave, in a line for people."""
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


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _usual(study: Study, name: str) -> Any:
    """A setting of the trainer, for arms and cells that have no other."""
    program, given = study.fingerprint()["program"], study.settings.get(f"trainer.{name}")
    for part in (program["file"], program.get("config")):  # which goes before
        trainer = part.get("trainer") if isinstance(part, dict) else None
        if isinstance(trainer, dict) and f"trainer.{name}" not in study.settings:
            given = trainer.get(name, given)
    return given


def _devices(study: Study) -> int:
    """How many processes, and GPUs where there are any, a cell has at most."""
    arms = [study.arm(arm).settings.get("trainer.devices", _usual(study, "devices")) for arm in study.arms]
    return max(1, *map(_number, (*arms, *study.factors.get("trainer.devices", ()))))


def _number(devices: Any) -> int:
    """How many devices Lightning takes it for; of "auto" and -1, which are all that a worker sees, one."""
    if isinstance(devices, str):
        devices = devices.strip(",").split(",") if "," in devices else int(devices) if devices.isdecimal() else 1
    return len(devices) if isinstance(devices, (list, tuple)) else devices if isinstance(devices, int) else 1


def _gpus() -> list[str]:
    """Names of this machine's GPUs, found without starting CUDA in this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return [str(n) for n, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def _deal(study: Study, find_gpus: Callable[[], Sequence[str]]) -> list[str]:
    """The GPUs of each worker, as in CUDA_VISIBLE_DEVICES; none where the program trains on the CPU."""
    gpus, size = find_gpus() if _usual(study, "accelerator") != "cpu" else [], _devices(study)
    if gpus and size > len(gpus):
        raise StudyError(f"trainer.devices must be at most the number of GPUs, {len(gpus)}, got {size}")
    return [",".join(gpus[i : i + size]) for i in range(0, len(gpus) - size + 1, size)]


def plan(study: Study, *, storage: str | None = None, folder: Path = FOLDER) -> str:
    """What `run` would do, in lines for people: each cell of a grid with its number and key, or how many runs at most.

    The estimate of time is that of one worker, from the runs that are done; without any there is none.

    Raises:
        StudyError: The study was started with other content.
    """
    runs: list[Run] = []
    with suppress(StorageError), reading(storage, folder / study.name) as backend:
        exists(study, backend)  # or it has been started with other content
    with suppress(StorageError, StudyError):
        runs = results(study, storage=storage, folder=folder)
    done = {run.cell.key for run in runs}
    lines = [
        f"{number:4d}  {key}  {cell.label}{'  done' if key in done else ''}"
        for number, (key, cell) in enumerate(study.cells.items())
    ]
    total, most = len(study.cells), ""
    if isinstance(study.sampler, Tpe):
        total = study.sampler.trials
    elif isinstance(study.sampler, Bisect):
        lines += [f"      {group.label}, seed {seed}" for seed in study.seeds for group in study.groups]
        total, most = len(lines) * study.sampler.runs, "at most "
    left = total - len(runs)
    lines.append(f"study {study.name}: {len(runs)} runs of {study.steps} steps done, {most}{left} to do")
    if runs:
        seconds = left * sum(run.outcome.seconds for run in runs) / len(runs)
        lines.append(f"about {seconds / 60:.1f} minutes of training with one worker")
    return "\n".join(lines)
