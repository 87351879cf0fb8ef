"""StabilityMonitor for Composer: a thin shell around the framework-free core, like the Lightning callback."""

from __future__ import annotations

import logging
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import ensure_tuple

from msign_lightning.algorithms.msign.msign import innermost, no_effect_warning, sink
from msign_lightning.shells import MonitorShell

log = logging.getLogger(__name__)


class StabilityMonitor(MonitorShell, Callback):
    """Sees a collapse coming: stable rank, Spectral Alignment, Jacobian alignment, loss and gradient norm.

    See `msign_lightning.settings.MonitorSettings` for what is logged, and for the arguments. Warns with
    `NoEffectWarning` when fitting starts if the model has no matrix to look at, and does nothing then.

    Example::

        trainer = Trainer(..., callbacks=[StabilityMonitor(on_alarm="restore")])

    Raises:
        ValueError: An argument is out of its range; or when fitting starts, a glob matches nothing.
            Under FSDP1, `use_orig_params` must be True, as it is by default, and Jacobians can't be measured.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._siblings = [self]

    def init(self, state: State, logger: Logger) -> None:
        self._stop()  # and forget an earlier trainer
        self._state = None
        self._siblings = [callback for callback in state.callbacks if isinstance(callback, StabilityMonitor)]

    def fit_start(self, state: State, logger: Logger) -> None:
        steps = int(state.timestamp.batch)  # at zero the run is new, or `fit(reset_time=True)` says so
        optimizer = innermost(ensure_tuple(state.optimizers)[0])
        with no_effect_warning(self):
            log.info(self._start(state.model, optimizer, steps, sink(state, logger)))

    def batch_start(self, state: State, logger: Logger) -> None:
        self._begin_batch()

    def after_backward(self, state: State, logger: Logger) -> None:
        """Takes the norm of the gradients; that of the last microbatch stays, before any algorithm clips it."""
        scaler = state.scaler
        self._take_gradients(ensure_tuple(state.optimizers)[0], scaler.get_scale if scaler is not None else lambda: 1.0)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Takes note of the optimizer step, unless a gradient scaler has skipped it."""
        self._end_batch((state.total_loss_dict or {}).get("loss/train/total"))

    def fit_end(self, state: State, logger: Logger) -> None:
        self._finish()

    def close(self, state: State, logger: Logger) -> None:
        self._stop()  # after an exception too

    def state_dict(self) -> dict[str, Any]:
        """What exact resumption needs: steps counted, active alarms, recent losses, and two vectors per matrix.

        Composer keeps one state for all callbacks of a class, so each saves those of all, by their subject.
        """
        return {repr(monitor.subject): monitor._own_state() for monitor in self._siblings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved state, when fitting starts."""
        self._state = state.get(repr(self.subject))
