"""Workers on a Ray cluster, with the interface of `ablations.launch.Worker`; needs the extra `ray`."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray  # type: ignore[import-not-found, unused-ignore]

from msign_lightning.ablations.cell import Cell
from msign_lightning.ablations.launch import Worker, attend
from msign_lightning.ablations.study import Study


class _Attendant:
    """The worker's process; its thread takes the tasks that are put and makes the messages that are got."""

    def __init__(self, study: Study, folder: Path, legs: int) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        threading.Thread(target=attend, args=(theirs, study, folder, {}, legs), daemon=True).start()

    def put(self, task: Cell | bool | None) -> None:
        self._connection.send(task)

    def get(self) -> Any:
        return self._connection.recv()


class RayWorker(Worker):
    """One Ray actor on one core, with as many GPUs as a worker here would have; all nodes share the folder of logs."""

    def __init__(self, study: Study, folder: Path, environment: Mapping[str, str], legs: int = 1) -> None:
        _connect()
        remote: Any = ray.remote(_Attendant)
        gpus = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        resources = {"num_cpus": 1, "num_gpus": len(gpus), "max_concurrency": 2}
        self._actor = remote.options(**resources).remote(study, folder.absolute(), legs)
        self.name = f"Ray actor {self._actor._actor_id.hex()}"
        self._connection, theirs = multiprocessing.Pipe()
        self.handles = (self._connection,)
        threading.Thread(target=self._forward, args=(theirs,), daemon=True).start()

    def _forward(self, pipe: Any) -> None:
        with suppress(OSError, ray.exceptions.RayError), pipe:
            while True:
                pipe.send(ray.get(self._actor.get.remote()))

    def _end(self) -> str:
        return "died"

    def send(self, message: Cell | bool | None) -> None:
        self._actor.put.remote(message)

    def kill(self) -> None:
        ray.kill(self._actor)
        self._connection.close()


def cores() -> int:
    """How many cores the cluster has."""
    return _count("CPU")


def gpus() -> list[str]:
    """A name for each GPU of the cluster, which Ray deals out."""
    return ["GPU"] * _count("GPU")


def _count(resource: str) -> int:
    _connect()
    resources: Any = ray.cluster_resources
    return int(resources().get(resource, 0))


def _connect() -> None:
    if not ray.is_initialized():
        ray.init(log_to_driver=False, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
