"""StabilityMonitor for Composer: a thin shell around the framework-free core, like the Lightning callback."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from composer.algorithms.warnings import NoEffectWarning
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, ensure_tuple
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from msign_lightning import tensorboard
from msign_lightning.algorithms.msign.msign import innermost, refuse_flat_weights, tensorboard_writers
from msign_lightning.monitor import Monitor, Reading, grad_norm
from msign_lightning.restoration import was_skipped
from msign_lightning.settings import MonitorSettings
from msign_lightning.targets import EmptySelectionError

log = logging.getLogger(__name__)


class StabilityMonitor(MonitorSettings, Callback):
    """Sees a collapse coming: stable rank, Spectral Alignment, Jacobian alignment, loss and gradient norm.

    What is measured, and which alarms there are, is described at `msign_lightning.monitor.Monitor` and
    `msign_lightning.collapse.CollapseDetector`. Readings are logged at the number of optimizer steps: every ten steps
    mean loss and last gradient norm (before clipping) as `stability/...`, measurements as `stable_rank/...`,
    `sign_diversity/...` and `jacobian_.../...`. In TensorBoard, the page "Custom Scalars" shows them in order, with
    alarms and applications marked.

    With several optimizers the steps and gradients of the first count. Resuming from a checkpoint is exact; all
    arguments but `targets`, `exclude`, `blocks` and the quantities of `measure` may be changed before.

    Warns with `NoEffectWarning` when fitting starts if the model has no matrix to look at, and does nothing then.

    Example::

        trainer = Trainer(..., callbacks=[StabilityMonitor(on_alarm="restore")])

    The arguments are those of `msign_lightning.settings.MonitorSettings`.

    Raises:
        ValueError: An argument is out of its range; or when fitting starts, a glob matches nothing.
        RuntimeError: When fitting starts under FSDP1, which keeps no matrix in one piece.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._monitor: Monitor | None = None
        self._handles: list[RemovableHandle] = []
        self._state: dict[str, Any] | None = None
        self._completed = 0  # optimizer steps in the batch at hand
        self._grad_norm: Tensor | None = None
        self._siblings = [self]

    def init(self, state: State, logger: Logger) -> None:
        """Forgets an earlier trainer."""
        self._detach()
        self._state = None
        self._siblings = [callback for callback in state.callbacks if isinstance(callback, StabilityMonitor)]

    def fit_start(self, state: State, logger: Logger) -> None:
        """Selects what to measure."""
        refuse_flat_weights(self, state)
        self._detach()
        try:
            monitor = Monitor(state.model, **self.arguments())
        except EmptySelectionError as error:
            warnings.warn(NoEffectWarning(f"StabilityMonitor has no effect: {error}"), stacklevel=2)
            return
        if batches := int(state.timestamp.batch):  # at zero the run is new, or `fit(reset_time=True)` says so
            monitor.steps = batches
            if self._state is None:
                log.info("monitor: the checkpoint holds no state of this monitor, whose history starts anew")
            else:
                monitor.load_state_dict(self._state)

        def count(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._completed += not was_skipped(optimizer)

        optimizer = innermost(ensure_tuple(state.optimizers)[0])
        self._handles = [optimizer.register_step_post_hook(count)]
        self._monitor, self._completed, self._grad_norm = monitor, 0, None
        for writer in tensorboard_writers(logger):
            tensorboard.add_layout(writer)
        log.info(monitor.describe())

    def batch_start(self, state: State, logger: Logger) -> None:
        """Measures the weights, if that is due, and prepares to measure the forward passes."""
        if self._monitor is not None:
            self._monitor.begin()

    def after_backward(self, state: State, logger: Logger) -> None:
        """Takes the norm of the gradients; that of the last microbatch stays, before any algorithm clips it."""
        if self._monitor is None or not self._monitor.reads_next:
            return
        groups = ensure_tuple(state.optimizers)[0].param_groups
        scale = state.scaler.get_scale() if state.scaler is not None and state.scaler.is_enabled() else 1.0
        self._grad_norm = grad_norm((parameter for group in groups for parameter in group["params"]), scale)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Takes note of the optimizer step, unless a gradient scaler has skipped it."""
        steps, norm = self._completed, self._grad_norm
        self._completed, self._grad_norm = 0, None
        if self._monitor is None:
            return
        loss = (state.total_loss_dict or {}).get("loss/train/total")
        for _ in range(steps):
            self._write(state, logger, self._monitor.end(loss, norm))

    def fit_end(self, state: State, logger: Logger) -> None:
        """Reads the last losses and lets go of model and optimizer."""
        if self._monitor is not None:
            self._write(state, logger, self._monitor.close())
        self._detach()

    def close(self, state: State, logger: Logger) -> None:
        """Lets go likewise, after an exception too."""
        self._detach()

    def _write(self, state: State, logger: Logger, reading: Reading | None) -> None:
        if reading is None:
            return
        logger.log_metrics(reading.metrics, step=reading.step)
        for writer in tensorboard_writers(logger):
            tensorboard.add_reading(writer, reading)
        if dist.get_global_rank() == 0 and (text := reading.describe()):
            log.warning(text)
        if reading.calls_for_action and self.on_alarm == "stop":
            state.stop_training()  # type: ignore[no-untyped-call]

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._monitor is not None:
            self._monitor.disarm()  # first, for after an error of the device its state can't be read
            self._state = self._own_state()
            self._monitor = None

    def _own_state(self) -> dict[str, Any] | None:
        return self._state if self._monitor is None else self._monitor.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """What exact resumption needs: steps counted, active alarms, recent losses, and two vectors per matrix.

        Composer keeps one state for all callbacks of a class, so each saves those of all, by their subject.
        """
        return {repr(monitor.subject): monitor._own_state() for monitor in self._siblings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved state, when fitting starts."""
        self._state = state.get(repr(self.subject))
