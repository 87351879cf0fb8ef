"""Worker processes that train cells, and what they report."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import connection, resource_tracker
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from msign_lightning.ablations.cell import Cell, Outcome
from msign_lightning.ablations.study import Study, StudyError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


class Report(NamedTuple):
    """The smoothed training loss of a running cell at a step; in a study that prunes, the worker waits for `answer`."""

    step: int
    loss: float


class Finished(NamedTuple):
    """A cell has been trained; no outcome: it was pruned."""

    outcome: Outcome | None


class Crashed(NamedTuple):
    """A cell's training raised an exception, or its worker died; `fatal` where no other cell would fare better."""

    error: str
    fatal: bool = False


Message = Report | Finished | Crashed


class Worker:
    """One spawned process, with one GPU where there are any."""

    def __init__(self, study: Study, folder: Path, gpu: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, study, folder, gpu))
        # Ctrl-C reaches all processes of a terminal; the mask keeps it from the worker, which its parent stops.
        resource_tracker.ensure_running()  # would lift the mask if it were started by the first worker's start
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()

    @property
    def handles(self) -> tuple[Any, int]:
        """What `multiprocessing.connection.wait` may wait for: a message, or the death of the process."""
        return self._connection, self._process.sentinel

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid  # type: ignore[return-value]

    def send(self, message: Cell | bool | None) -> None:
        """A cell to train, None to check the recipe, or an answer to a report. A dead worker is noticed later."""
        with suppress(OSError):
            self._connection.send(message)

    def receive(self) -> Message:
        """The message that is ready, or that the worker died."""
        try:
            if self._connection.poll():
                message: Message = self._connection.recv()
                return message
        except (EOFError, OSError):
            pass
        self._process.join(5)
        self._process.kill()  # it has closed its pipe, so it ends; should it hang, not for long
        self._process.join()
        code = self._process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return Crashed(f"worker process {self.pid} {how}")

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
    """

    def __init__(self, study: Study, folder: Path, workers: int, gpus: list[str]) -> None:
        self._places: list[Worker | None] = [None] * workers
        self._start: Callable[[int], Worker] = lambda place: Worker(
            study, folder, gpus[place % len(gpus)] if gpus else None
        )
        self._busy: set[int] = set()

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
        self._worker(place).send(task)
        self._busy.add(place)

    def answer(self, place: int, prune: bool) -> None:
        """Answers a report of a study that prunes."""
        self._worker(place).send(prune)

    def wait(self, seconds: float) -> Iterator[tuple[int, Message]]:
        """What the busy workers say, after `seconds` at the latest."""
        workers = {place: self._worker(place) for place in self._busy}
        ready = connection.wait([handle for worker in workers.values() for handle in worker.handles], seconds)
        for place, worker in workers.items():
            if any(handle in ready for handle in worker.handles):
                message = worker.receive()
                if isinstance(message, Crashed):
                    self._end(place)
                elif isinstance(message, Finished):
                    self._busy.discard(place)
                yield place, message

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


def _work(pipe: Any, study: Study, folder: Path, gpu: str | None) -> None:
    """The worker process: trains what it is told to until it fails, or its parent ends it or dies."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _serve(pipe, study, folder, gpu)
    except Exception as error:
        no_space = _find_no_space(error)
        text = str(no_space or error) if no_space or isinstance(error, StudyError) else traceback.format_exc()
        with suppress(OSError):
            pipe.send(Crashed(text, fatal=no_space is not None))


def _serve(pipe: Any, study: Study, folder: Path, gpu: str | None) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # so that what a cell gives does not depend on how many are trained at once
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    from msign_lightning.ablations.trial import check, run_cell  # PyTorch reads the variables above

    for chatty in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(chatty).setLevel(logging.WARNING)

    def report(step: int, loss: float) -> bool:
        pipe.send(Report(step, loss))
        return bool(study.prune and pipe.recv())

    while True:
        cell = pipe.recv()
        if cell is None:
            check(study)
        pipe.send(Finished(None if cell is None else run_cell(study, cell, folder, report)))


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
