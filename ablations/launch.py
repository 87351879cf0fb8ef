"""Where cells are trained: worker processes, and what they say.

A launcher is a class with the interface of `Worker`: processes of this machine, or of a Ray cluster.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection, resource_tracker
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from msign_lightning.ablations.cell import Cell, Outcome
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.study import Study

BEAT = 2.0  # seconds between two signs of life of a worker
SILENCE = 180.0  # seconds without one after which a worker counts as hung; a cold start of PyTorch may take one minute
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


class Progress(NamedTuple):
    """The smoothed training loss of a running cell at a step; in a study that prunes, the worker waits for `answer`."""

    step: int
    loss: float


class Finished(NamedTuple):
    """A cell has been trained; no outcome: it was pruned."""

    outcome: Outcome | None


class Crashed(NamedTuple):
    """A cell's training raised an exception, or its worker died or hung.

    It is `fatal` where no other cell would fare better: the disk is full, or the study does not fit its program.
    """

    error: str
    fatal: Literal["disk", "study"] | None = None


class Alive(NamedTuple):
    """A worker's sign of life."""


Message = Progress | Finished | Crashed


class Worker:
    """One spawned process, with one GPU where there are any."""

    def __init__(self, study: Study, folder: Path, gpu: str | None, legs: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, study, folder, gpu, legs))
        # Ctrl-C reaches all processes of a terminal; the mask keeps it from the worker, which its parent stops.
        resource_tracker.ensure_running()  # would lift the mask if it were started by the first worker's start
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()
        self.silent = 0.0
        self.started = time.monotonic()

    @property
    def handles(self) -> tuple[Any, ...]:
        """What `multiprocessing.connection.wait` may wait for: a message, or the death of the process."""
        return self._connection, self._process.sentinel

    @property
    def name(self) -> str:
        """For people."""
        return f"worker process {self._process.pid}"

    def send(self, message: Cell | bool | None) -> None:
        """A cell to train, None to check the recipe, or an answer to a report. A dead worker is noticed later."""
        with suppress(OSError):
            self._connection.send(message)

    def receive(self) -> Message | Alive:
        """The message that is ready, or that the worker died."""
        try:
            if self._connection.poll():
                message: Message | Alive = self._connection.recv()
                return message
        except (EOFError, OSError):
            pass
        self._process.join(5)
        self._process.kill()  # it has closed its pipe, so it ends; should it hang, not for long
        self._process.join()
        code = self._process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return Crashed(f"{self.name} {how}")

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._process.close()


class Pool:
    """Workers, started when they are needed, replaced when they fail.

    Args:
        study: The study whose cells are to be trained.
        folder: Where the cells' logs go.
        workers: How many cells may be trained at once.
        gpus: Names of the GPUs, as in CUDA_VISIBLE_DEVICES; dealt out in turns.
        time_limit: Seconds that a cell may take; None for no limit.
        legs: As of `run_cell`.
        launcher: `Worker`, or a class with its interface.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        workers: int,
        gpus: Sequence[str] = (),
        time_limit: float | None = None,
        legs: int = 1,
        launcher: type[Worker] = Worker,
    ) -> None:
        self._places: list[Worker | None] = [None] * workers
        self._start: Callable[[int], Worker] = lambda place: launcher(
            study, folder, gpus[place % len(gpus)] if gpus else None, legs
        )
        self._busy: set[int] = set()
        self._time_limit = time_limit

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for place in range(len(self._places)):
            self._end(place)

    @property
    def busy(self) -> int:
        """How many workers have something to do."""
        return len(self._busy)

    @property
    def idle(self) -> list[int]:
        """Places where a cell may be started, those whose worker is there first."""
        places = [place for place in range(len(self._places)) if place not in self._busy]
        return sorted(places, key=lambda place: self._places[place] is None)

    def warm_up(self) -> None:
        """Starts all workers, so that they import what they need side by side."""
        for place in self.idle:
            self._worker(place)

    def start(self, place: int, task: Cell | None) -> None:
        """Lets the worker at a place train a cell, or check the recipe."""
        worker = self._worker(place)
        worker.send(task)
        worker.silent, worker.started = 0.0, time.monotonic()
        self._busy.add(place)

    def answer(self, place: int, prune: bool) -> None:
        """Answers a report of a study that prunes."""
        self._worker(place).send(prune)

    def wait(self, seconds: float) -> Iterator[tuple[int, Message]]:
        """What the busy workers say, after `seconds` at the latest."""
        workers = {place: self._worker(place) for place in self._busy}
        began = time.monotonic()
        ready = connection.wait([handle for worker in workers.values() for handle in worker.handles], seconds)
        awake = min(time.monotonic() - began, 2 * seconds)  # if this process was stopped, so were the workers, perhaps
        for place, worker in workers.items():
            message: Message | Alive
            if any(handle in ready for handle in worker.handles):
                worker.silent = 0.0
                message = worker.receive()
            elif (hung := self._hung(worker, awake)) is not None:
                message = hung
            else:
                continue
            if isinstance(message, Alive):
                continue
            if isinstance(message, Crashed):
                self._end(place)
            elif isinstance(message, Finished):
                self._busy.discard(place)
            yield place, message

    def _hung(self, worker: Worker, awake: float) -> Crashed | None:
        worker.silent += awake
        if worker.silent > SILENCE:
            return Crashed(f"{worker.name} gave no sign of life for {SILENCE:g} s")
        if self._time_limit is not None and time.monotonic() - worker.started > self._time_limit:
            return Crashed(f"{worker.name} took longer than the time limit of {self._time_limit:g} s")
        return None

    def _worker(self, place: int) -> Worker:
        worker = self._places[place]
        if worker is None:
            worker = self._places[place] = self._start(place)
        return worker

    def _end(self, place: int) -> None:
        self._busy.discard(place)
        worker, self._places[place] = self._places[place], None
        if worker is not None:
            worker.kill()


class _Pipe:
    """A worker's end of the pipe, for its two threads."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self.recv = pipe.recv

    def send(self, message: Message | Alive) -> None:
        with self._lock:
            self._pipe.send(message)


def _beat(pipe: Any) -> None:
    """Shows until the end that the process is alive."""
    with suppress(OSError):
        while True:
            pipe.send(Alive())
            time.sleep(BEAT)


def _work(pipe: Any, study: Study, folder: Path, gpu: str | None, legs: int) -> None:
    """The worker process: trains what it is told to until it fails, or its parent ends it or dies."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    attend(_Pipe(pipe), study, folder, gpu, legs)


def attend(pipe: Any, study: Study, folder: Path, gpu: str | None, legs: int) -> None:
    """Trains the cells that come by `pipe.recv` and sends messages, until one fails."""
    threading.Thread(target=_beat, args=(pipe,), daemon=True).start()
    try:
        _serve(pipe, study, folder, gpu, legs)
    except Exception as error:
        no_space = _find_no_space(error)
        if no_space is not None:
            message = Crashed(str(no_space), "disk")
        else:
            is_study = isinstance(error, StudyError)
            message = Crashed(str(error), "study") if is_study else Crashed(traceback.format_exc())
        with suppress(OSError):
            pipe.send(message)


def _serve(pipe: Any, study: Study, folder: Path, gpu: str | None, legs: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # so that what a cell gives does not depend on how many are trained at once
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    from msign_lightning.ablations.program import check, run_cell  # PyTorch reads the variables above

    for chatty in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(chatty).setLevel(logging.WARNING)

    def progress(step: int, loss: float) -> bool:
        pipe.send(Progress(step, loss))
        return bool(study.prune and pipe.recv())

    while True:
        cell = pipe.recv()
        if cell is None:
            check(study)
        pipe.send(Finished(None if cell is None else run_cell(study, cell, folder, progress, legs)))


def _find_no_space(error: BaseException | None) -> OSError | None:
    """The full disk that an exception comes from, if one does; a logger may have caught it and stumbled later."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return error
        error = error.__cause__ or error.__context__
    return None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
