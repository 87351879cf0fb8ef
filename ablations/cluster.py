"""Workers on a Ray cluster, with the interface of `ablations.launch.Worker`; needs the extra `ray`."""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray  # type: ignore[import-not-found, unused-ignore]

from msign_lightning.ablations.cell import Cell
from msign_lightning.ablations.launch import Alive, Crashed, Message, Worker, attend
from msign_lightning.ablations.study import Study


class _Attendant:
    """The worker's process: one thread attends to tasks, others bring tasks and take messages."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Cell | bool | None] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[Message | Alive] = queue.SimpleQueue()
        self.recv, self.send = self._tasks.get, self._messages.put

    def attend(self, study: Study, folder: Path, legs: int) -> None:
        attend(self, study, folder, None, legs)

    def bring(self, task: Cell | bool | None) -> None:
        self._tasks.put(task)

    def take(self) -> Message | Alive:
        return self._messages.get()


class RayWorker(Worker):
    """One Ray actor on one core, and one GPU where the study may use any; logs go to a folder that all nodes share."""

    def __init__(self, study: Study, folder: Path, gpu: str | None, legs: int = 1) -> None:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
        gpus = int(gpu is not None)
        remote: Any = ray.remote
        self._actor: Any = remote(_Attendant).options(num_cpus=1, num_gpus=gpus, max_concurrency=4).remote()
        self._actor.attend.remote(study, folder.absolute(), legs)
        self._connection, theirs = multiprocessing.Pipe()
        threading.Thread(target=self._forward, args=(theirs,), daemon=True).start()
        self.silent, self.started = 0.0, time.monotonic()

    def _forward(self, pipe: Any) -> None:
        with suppress(OSError), pipe:
            try:
                while True:
                    pipe.send(ray.get(self._actor.take.remote()))
            except ray.exceptions.RayError as error:
                pipe.send(Crashed(f"{self.name} died: {type(error).__name__}"))

    @property
    def handles(self) -> tuple[Any, ...]:
        return (self._connection,)

    @property
    def name(self) -> str:
        return f"Ray actor {self._actor._actor_id.hex()}"

    def send(self, message: Cell | bool | None) -> None:
        self._actor.bring.remote(message)

    def receive(self) -> Message | Alive:
        try:
            message: Message | Alive = self._connection.recv()
        except (EOFError, OSError):
            return Crashed(f"{self.name} died")
        return message

    def kill(self) -> None:
        ray.kill(self._actor)
        self._connection.close()


def cores() -> int:
    """How many cores the cluster has."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
    resources: Any = ray.cluster_resources
    return int(resources().get("CPU", 1))
