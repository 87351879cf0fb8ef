"""What the callbacks of all frameworks share: a life from the start of a fit to its end, and the state they save."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from msign_lightning import tensorboard
from msign_lightning.monitor import Monitor, Reading, grad_norm
from msign_lightning.restoration import Report, Restoration, was_skipped
from msign_lightning.settings import MonitorSettings, RestorationSettings

log = logging.getLogger(__name__)


class Sink(NamedTuple):
    """Where a trainer takes what a callback has to say.

    Attributes:
        log: Logs metrics at an optimizer step.
        writers: Gives the TensorBoard writers of this process.
        stop: Ends the training.
        is_first: Whether this is the process that writes messages.
    """

    log: Callable[[dict[str, float], int], object]
    writers: Callable[[], Sequence[Any]] = tuple
    stop: Callable[[], object] = bool
    is_first: bool = True


class RestorationShell(RestorationSettings):
    """Holds a `Restoration` while a model is fitted, and its count of steps for ever."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._restoration: Restoration | None = None
        self._steps: list[int] = []

    def _start(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        steps: Sequence[int],
        sink: Sink,
        process_group: ProcessGroup | None = None,
    ) -> str:
        """Hooks into the optimizers, counting on from `steps` if there are any; gives a line for a log.

        A process group says that its ranks hold copies of the model, where no wrapper does.
        """
        self._stop()
        restoration = Restoration(model, **self.arguments())
        if process_group is not None:
            restoration.share_over(process_group)

        def write(report: Report) -> None:
            sink.log(report.metrics(), report.step)
            for writer in sink.writers():
                tensorboard.add_mark(writer, tensorboard.APPLICATION, report.step)

        restoration.attach(*optimizers, on_report=write)
        if steps:
            restoration.load_state_dict({"steps": steps})
        self._restoration = restoration
        return restoration.describe()

    def _stop(self) -> None:
        """Lets go of optimizers and model; the count stays."""
        self._steps = self._count()
        if self._restoration is not None:
            self._restoration.detach()
            self._restoration = None

    def _count(self) -> list[int]:
        return list(self._steps) if self._restoration is None else self._restoration.steps


class MonitorShell(MonitorSettings):
    """Holds a `Monitor` while a model is fitted, and its state afterwards."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._monitor: Monitor | None = None
        self._sink: Sink | None = None
        self._handle: RemovableHandle | None = None
        self._state: dict[str, Any] | None = None
        self._completed = 0  # optimizer steps in the batch at hand
        self._grad_norm: Tensor | None = None

    def _start(self, model: nn.Module, optimizer: Optimizer, steps: int, sink: Sink) -> str:
        """Begins to measure a model that has made so many steps; gives a line for a log."""
        self._stop()
        monitor = Monitor(model, **self.arguments())
        monitor.steps = steps
        line = monitor.describe()
        if steps and self._state is None:
            line += "; the checkpoint holds no state of this monitor: its history starts anew"
        elif steps and self._state is not None:
            monitor.load_state_dict(self._state)

        def count(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._completed += not was_skipped(optimizer)

        self._handle = optimizer.register_step_post_hook(count)
        self._monitor, self._sink, self._completed, self._grad_norm = monitor, sink, 0, None
        for writer in sink.writers():
            tensorboard.add_layout(writer)
        return line

    def _begin_batch(self) -> None:
        """Measures the weights, if that is due, and prepares to measure the forward passes."""
        if self._monitor is not None:
            self._monitor.begin()

    def _take_gradients(self, optimizer: Optimizer, scale: Callable[[], float]) -> None:
        """Takes note of the norm of gradients that are still multiplied by a scale."""
        if self._monitor is not None and self._monitor.reads_next:
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            self._grad_norm = grad_norm(parameters, scale(), ranks=self._monitor.ranks)

    def _end_batch(self, loss: Tensor | float | None) -> None:
        """Takes note of the steps in the batch at hand: none if a gradient scaler has skipped it."""
        steps, norm = self._completed, self._grad_norm
        self._completed, self._grad_norm = 0, None
        for _ in range(steps if self._monitor is not None else 0):
            self._write(self._monitor.end(loss, norm))  # type: ignore[union-attr]

    def _finish(self) -> None:
        """Reads the last losses and lets go."""
        if self._monitor is not None:
            self._write(self._monitor.close())
        self._stop()

    def _write(self, reading: Reading | None) -> None:
        if reading is None or self._sink is None:
            return
        self._sink.log(reading.metrics, reading.step)
        for writer in self._sink.writers():
            tensorboard.add_reading(writer, reading)
        if self._sink.is_first and (text := reading.describe()):
            log.warning(text)
        if reading.calls_for_action and self.on_alarm == "stop":
            self._sink.stop()

    def _stop(self) -> None:
        """Lets go of optimizer, model and trainer; the state stays."""
        if self._handle is not None:
            self._handle.remove()
        if self._monitor is not None:
            self._monitor.disarm()  # first, for after an error of the device its state can't be read
            self._state = self._monitor.state_dict()
        self._monitor = self._sink = self._handle = None

    def _own_state(self) -> dict[str, Any] | None:
        return self._state if self._monitor is None else self._monitor.state_dict()
