"""StabilityMonitor for Composer: a thin shell around the framework-free core, like the Lightning callback."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, ensure_tuple
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from msign_lightning import tensorboard
from msign_lightning.algorithms.msign.msign import innermost, tensorboard_writers
from msign_lightning.linalg import Rule
from msign_lightning.monitor import Monitor, OnAlarm, Quantity, Reading, check_monitor, grad_norm
from msign_lightning.restoration import was_skipped
from msign_lightning.targets import Cut

log = logging.getLogger(__name__)


class StabilityMonitor(Callback):
    """Sees a collapse coming: stable rank, Spectral Alignment, Jacobian alignment, loss and gradient norm.

    What is measured, and which alarms there are, is described at `msign_lightning.monitor.Monitor` and
    `msign_lightning.collapse.CollapseDetector`. Readings are logged at the number of optimizer steps: every ten steps
    mean loss and last gradient norm (before clipping) as `stability/...`, measurements as `stable_rank/...`,
    `sign_diversity/...` and `jacobian_.../...`. In TensorBoard, the page "Custom Scalars" shows them in order, with
    alarms and applications marked.

    With several optimizers the steps and gradients of the first count. Resuming from a checkpoint is exact.

    Example::

        trainer = Trainer(..., callbacks=[StabilityMonitor(on_alarm="restore")])

    Args:
        measure: "stable_rank", "spectral_alignment" or "jacobian_alignment" → cadence in optimizer steps; None for
            the first every 100 and the second every 200. A measurement of Jacobians costs some twenty training steps.
        on_alarm: "log"; "stop" the training; or "restore" the matrices concerned by MSign. Spikes and outliers of the
            loss are always only logged.
        targets: "attention", "mlp", "all_2d" (both), or globs over parameter names.
        exclude: Globs over parameter names to leave out.
        cuts: Globs over parameter names → `Cut`, for fused parameters whose layout cannot be known.
        blocks: Names or globs of the blocks for the Jacobians; None to find them.
        thresholds: Arguments of `CollapseDetector` that differ from its defaults; None turns an alarm off.
        cooldown: Optimizer steps for which a restored matrix is left alone.
        stop: Last step at which a matrix may be restored; None for no end.
        rule: How matrices are restored: "msign", or "cap", which only lifts the stable rank to that of a random matrix.
        per_matrix: Whether to log values per matrix and block besides summaries.

    Raises:
        ValueError: An argument is out of its range; or when fitting starts, nothing is selected.
        RuntimeError: When fitting starts under FSDP1, which keeps no matrix in one piece.
    """

    def __init__(
        self,
        measure: Mapping[Quantity, int] | None = None,
        on_alarm: OnAlarm = "log",
        *,
        targets: str | Sequence[str] = "all_2d",
        exclude: str | Sequence[str] = (),
        cuts: Mapping[str, Cut] | None = None,
        blocks: str | Sequence[str] | None = None,
        thresholds: Mapping[str, float | None] | None = None,
        cooldown: int = 100,
        stop: int | None = None,
        rule: Rule = "msign",
        per_matrix: bool = False,
    ) -> None:
        check_monitor(measure, on_alarm, thresholds, cooldown, stop, rule)
        self._settings: dict[str, Any] = {
            "measure": measure,
            "on_alarm": on_alarm,
            "targets": targets,
            "exclude": exclude,
            "cuts": cuts,
            "blocks": blocks,
            "thresholds": thresholds,
            "cooldown": cooldown,
            "stop": stop,
            "rule": rule,
            "per_matrix": per_matrix,
        }
        self._monitor: Monitor | None = None
        self._handles: list[RemovableHandle] = []
        self._state: dict[str, Any] | None = None
        self._completed = 0  # optimizer steps in the batch at hand
        self._grad_norm: Tensor | None = None
        self._siblings = [self]

    def __repr__(self) -> str:
        return f"StabilityMonitor({', '.join(f'{name}={value!r}' for name, value in self._settings.items())})"

    def init(self, state: State, logger: Logger) -> None:
        """Forgets an earlier trainer."""
        self._detach()
        self._state = None
        self._siblings = [callback for callback in state.callbacks if isinstance(callback, StabilityMonitor)]

    def fit_start(self, state: State, logger: Logger) -> None:
        """Selects what to measure."""
        if state.fsdp_config_version == 1:
            raise RuntimeError(
                "StabilityMonitor does not support FSDP1, which flattens the weights: set FSDP_VERSION=2"
            )
        self._detach()
        monitor = Monitor(state.model, **self._settings)
        if batches := int(state.timestamp.batch):  # at zero the run is new, or `fit(reset_time=True)` says so
            monitor.steps = batches
            if self._state is not None:
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
        norm = grad_norm(parameter for group in groups for parameter in group["params"])
        if norm is not None and state.scaler is not None and state.scaler.is_enabled():
            norm = norm / state.scaler.get_scale()
        self._grad_norm = norm

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
        if reading.calls_for_action and self._settings["on_alarm"] == "stop":
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

        Composer keeps one state for all callbacks of a class, so each saves those of all, by their settings.
        """
        return {repr(monitor): monitor._own_state() for monitor in self._siblings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved state, when fitting starts."""
        self._state = state.get(repr(self))
