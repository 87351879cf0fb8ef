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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

from msign_lightning.ablations.cell import Cell, Outcome
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.storage import StorageError
from msign_lightning.ablations.study import Study

BEAT = 2.0  # seconds between two signs of life of a worker
SILENCE = 180.0  # seconds without one after which a worker counts as hung; a cold start of PyTorch may take one minute
_log = logging.getLogger(__name__)
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
    fatal: type[StorageError | StudyError] | None = None


Message = Progress | Finished | Crashed


class Worker:
    """One spawned process, with some variables of its environment set, such as CUDA_VISIBLE_DEVICES."""

    name: str  # for people
    handles: Sequence[Any]  # what becomes ready with a message, or when the worker dies
    silent = started = 0.0  # for how long, and since when it has its task

    def __init__(self, study: Study, folder: Path, environment: Mapping[str, str], legs: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=attend, args=(theirs, study, folder, environment, legs))
        # Ctrl-C reaches all processes of a terminal; the mask keeps it from the worker, which its parent stops.
        resource_tracker.ensure_running()  # would lift the mask if it were started by the first worker's start
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.name = f"worker process {self._process.pid}"
        self.handles = self._connection, self._process.sentinel  # whose children may keep the pipe open

    def send(self, message: Cell | bool | None) -> None:
        """A cell to train, None to check the recipe, or an answer to a report. A dead worker is noticed later."""
        with suppress(OSError):
            self._connection.send(message)

    def receive(self) -> Message | None:
        """The message that is ready, or that the worker died; None is a sign of life."""
        with suppress(EOFError, OSError):
            if self._connection.poll():
                message: Message | None = self._connection.recv()
                return message
        return Crashed(f"{self.name} {self._end()}")

    def _end(self) -> str:
        """How the worker ended."""
        self._process.join(5)  # it has closed its pipe, so it ends, or else is killed
        code = self._process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"

    def kill(self) -> None:
        """Ends the worker at once."""
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._process.close()


@dataclass
class Pool:
    """Workers of a study, started when they are needed, replaced when they fail.

    Attributes:
        folder: Where the cells' logs go.
        workers: How many cells may be trained at once.
        gpus: The GPUs of each worker, as in CUDA_VISIBLE_DEVICES; dealt out in turns.
        time_limit: Seconds that a cell may take; None for no limit.
        legs: As of `run_cell`.
        retries: How often a task is tried again that has crashed, unless that was fatal.
        launcher: `Worker`, or a class with its interface.
    """

    study: Study
    folder: Path
    workers: int
    gpus: Sequence[str] = ()
    time_limit: float | None = None
    legs: int = 1
    retries: int = 0
    launcher: type[Worker] = Worker

    def __post_init__(self) -> None:
        self._workers: dict[int, Worker] = {}  # by place
        self._tasks: dict[int, tuple[Cell | None, int]] = {}  # by place, and how often they have crashed

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers.values():
            worker.kill()

    @property
    def busy(self) -> int:
        """How many workers have something to do."""
        return len(self._tasks)

    @property
    def idle(self) -> list[int]:
        """Places where a cell may be started."""
        return [place for place in range(self.workers) if place not in self._tasks]

    def warm_up(self) -> None:
        """Starts all workers, so that they import what they need side by side."""
        for place in range(self.workers):
            self._worker(place)

    def start(self, place: int, task: Cell | None, crashes: int = 0) -> None:
        """Lets the worker at a place train a cell, or check the recipe."""
        worker = self._worker(place)
        worker.send(task)
        worker.silent, worker.started = 0.0, time.monotonic()
        self._tasks[place] = task, crashes

    def answer(self, place: int, prune: bool) -> None:
        """Answers a report of a study that prunes."""
        self._workers[place].send(prune)

    def wait(self, seconds: float) -> Iterator[tuple[int, Message]]:
        """What the busy workers say, after `seconds` at the latest."""
        workers = {place: self._workers[place] for place in self._tasks}
        began = time.monotonic()
        ready = connection.wait([handle for worker in workers.values() for handle in worker.handles], seconds)
        awake = min(time.monotonic() - began, 2 * seconds)  # if this process was stopped, so were the workers, perhaps
        for place, worker in workers.items():
            if any(handle in ready for handle in worker.handles):
                worker.silent = 0.0
                message = worker.receive()
            else:
                worker.silent += awake
                message = self._hung(worker)
            if isinstance(message, (Crashed, Finished)):
                task, crashes = self._tasks.pop(place)
            if isinstance(message, Crashed):
                self._workers.pop(place).kill()
                if message.fatal is None and crashes < self.retries:
                    name = task.label if task else "the start"
                    _log.warning("%s is tried again: %s", name, message.error.strip().splitlines()[-1])
                    self.start(place, task, crashes + 1)
                    continue
            if message is not None:
                yield place, message

    def _hung(self, worker: Worker) -> Crashed | None:
        if worker.silent > SILENCE:
            return Crashed(f"{worker.name} gave no sign of life for {SILENCE:g} s")
        if self.time_limit is not None and time.monotonic() - worker.started > self.time_limit:
            return Crashed(f"{worker.name} took longer than the time limit of {self.time_limit:g} s")
        return None

    def _worker(self, place: int) -> Worker:
        if place not in self._workers:
            own = {"CUDA_VISIBLE_DEVICES": self.gpus[place % len(self.gpus)]} if self.gpus else {}
            self._workers[place] = self.launcher(self.study, self.folder, own, self.legs)
        return self._workers[place]


def spread(
    ranks: int,
    study: Study,
    cell: Cell | None,
    folder: Path,
    legs: int = 1,
    progress: Callable[..., bool] | None = None,
) -> Outcome | None:
    """Trains a cell on several processes, which find themselves as those of torchrun do; None checks the program.

    Returns:
        The outcome of the first.

    Raises:
        StudyError: The study does not fit its program.
        StorageError: The disk is full.
        RuntimeError: One of them raised another exception or died. Then the others are killed.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # PyTorch is imported already

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where they meet: no port is free twice
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    group |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "cell"}
    workers: list[Worker] = []
    outcomes: dict[Worker, Outcome | None] = {}
    try:
        for rank in range(ranks):
            own = {name: str(value) for name, value in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()}
            workers.append(Worker(study, folder, own, legs))
            workers[-1].send(cell)
        while len(outcomes) < ranks:
            ready = connection.wait([handle for w in workers if w not in outcomes for handle in w.handles])
            for worker in workers:
                match worker.receive() if any(handle in ready for handle in worker.handles) else None:
                    case Progress(step, loss):
                        prune = progress is not None and progress(step, loss)
                        if study.prune:
                            worker.send(prune)
                    case Finished(outcome):
                        outcomes[worker] = outcome
                    case Crashed(error, fatal):
                        raise (fatal or RuntimeError)(error)
        return outcomes[workers[0]]
    finally:
        for worker in workers:
            worker.kill()


def attend(pipe: Any, study: Study, folder: Path, environment: Mapping[str, str], legs: int) -> None:
    """A worker: trains the cells that come by the pipe until one fails, and sends messages, None for a sign of life."""
    lock = threading.Lock()

    def send(message: Message | None) -> None:
        with lock:
            pipe.send(message)

    def beat() -> None:
        with suppress(OSError):
            while True:
                send(None)
                time.sleep(BEAT)
        os._exit(1)  # the parent is gone

    def progress(step: int, loss: float) -> bool:
        send(Progress(step, loss))
        return bool(study.prune and pipe.recv())

    threading.Thread(target=beat, daemon=True).start()
    try:
        os.environ["OMP_NUM_THREADS"] = "1"  # what a cell gives must not depend on how many are trained at once
        os.environ.update(environment)
        from msign_lightning.ablations.program import check, run_cell  # PyTorch reads the variables above

        while True:
            if (cell := pipe.recv()) is None:
                check(study)
            send(Finished(None if cell is None else run_cell(study, cell, folder, progress, legs)))
    except (Exception, SystemExit) as error:
        crashed = Crashed(traceback.format_exc())
        if (no_space := _find_no_space(error)) is not None:
            crashed = Crashed(f"folder {folder} can't be written to: {no_space}", StorageError)
        elif isinstance(error, (StudyError, StorageError)):
            crashed = Crashed(str(error), type(error))
        with suppress(OSError):
            send(crashed)


def _find_no_space(error: BaseException | None) -> OSError | None:
    """The full disk that an exception comes from, if one does; a logger may have caught it and stumbled later."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return error
        error = error.__cause__ or error.__context__
    return None
