"""MSign (arXiv 2602.01734) for Composer: a thin shell around the framework-free core, like `MSignCallback`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from composer.algorithms.sam import SAMOptimizer
from composer.algorithms.warnings import NoEffectWarning
from composer.core import Algorithm, Event, State
from composer.loggers import Logger, TensorboardLogger
from composer.utils import dist, ensure_tuple
from torch import nn
from torch.optim import Optimizer

from msign_lightning.linalg import Method, Rule
from msign_lightning.restoration import Report, Restoration
from msign_lightning.shells import RestorationShell, Sink
from msign_lightning.targets import Cut, EmptySelectionError

log = logging.getLogger(__name__)


def apply_msign(
    model: nn.Module,
    targets: str | Sequence[str] = "all_2d",
    *,
    rule: Rule = "msign",
    method: Method = "auto",
    rtol: float | None = None,
    exclude: str | Sequence[str] = (),
    cuts: Mapping[str, Cut] | None = None,
) -> Report:
    """Restores the weight matrices of a model once, now and in place.

    Each target W becomes ‖W‖_F · UVᵀ / ‖UVᵀ‖_F (arXiv 2602.01734, Eq. 14), where W = USVᵀ is its reduced SVD.

    Warns with `NoEffectWarning` if the model has no such matrix. The arguments are those of `RestorationSettings`. If
    the model is sharded, every rank must call this.

    Example::

        report = apply_msign(model, "attention")

    Returns:
        What was done to which matrix; its `step` is 0, for no optimizer step was counted.

    Raises:
        ValueError: An argument is out of its range, or a glob matches nothing.
    """
    try:
        restoration = Restoration(
            model, targets=targets, rule=rule, method=method, rtol=rtol, exclude=exclude, cuts=cuts
        )
    except EmptySelectionError as error:
        warnings.warn(NoEffectWarning(f"apply_msign had no effect: {error}"), stacklevel=2)
        return Report(step=0, matrices=(), seconds=0.0)
    return restoration.apply()


class MSign(RestorationShell, Algorithm):
    """Restores the stable rank of weight matrices every `period` optimizer steps (MSign, arXiv 2602.01734).

    See `msign_lightning.settings.RestorationSettings` for what happens when, and for the arguments. It hooks into the
    optimizers, also into the one that `SAM` wraps. Each application is logged under `msign/...`, at the same step as
    the loss of its batch. Warns with `NoEffectWarning` when fitting starts if the model has no such matrix.

    Resuming from a checkpoint continues the count exactly. A checkpoint that was saved without MSign continues at the
    trainer's own count of batches.

    Example::

        trainer = Trainer(..., algorithms=[MSign(period=100)])

    Raises:
        ValueError: An argument is out of its range; or when fitting starts, a glob matches nothing.
            Under FSDP1, `use_orig_params` must be True, as it is by default.
    """

    def match(self, event: Event, state: State) -> bool:
        """Where a trainer begins, and where fitting begins and ends; in between, the optimizers call."""
        return event in (Event.INIT, Event.FIT_START, Event.FIT_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Selects the targets and hooks into the optimizers when fitting starts; otherwise lets go of them."""
        self._stop()
        if event == Event.INIT:
            self._steps = []
        elif event == Event.FIT_START:
            optimizers = [innermost(optimizer) for optimizer in ensure_tuple(state.optimizers)]
            batches = int(state.timestamp.batch)  # at zero the run is new, or `fit(reset_time=True)` says so
            steps = self._steps or [batches] * len(optimizers) if batches else []
            own_step = sink(state, logger)._replace(log=lambda metrics, step: logger.log_metrics(metrics))
            with no_effect_warning(self):
                log.info(self._start(state.model, optimizers, steps, own_step))

    def state_dict(self) -> dict[str, Any]:
        """The representation, as of every algorithm, and the completed optimizer steps, per optimizer.

        Composer restores algorithms by class, so several instances get the state of the last of them. They count the
        same steps, so any of their states serves.
        """
        return {**super().state_dict(), "steps": self._count()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the saved count."""
        self._steps = list(state["steps"])


@contextmanager
def no_effect_warning(method: object) -> Iterator[None]:
    """Warns where a model has no matrix of the kind that is looked for."""
    try:
        yield
    except EmptySelectionError as error:
        warnings.warn(NoEffectWarning(f"{type(method).__name__} has no effect: {error}"), stacklevel=3)


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that `SAM` wraps, which steps once per completed step and not at all where the scaler skips one."""
    return optimizer.base_optimizer if isinstance(optimizer, SAMOptimizer) else optimizer


def sink(state: State, logger: Logger) -> Sink:
    """Where a callback's words go; TensorBoard's writers are on the processes that have one."""
    loggers = [d for d in logger.destinations if isinstance(d, TensorboardLogger)]
    is_first = dist.get_global_rank() == 0

    def writers() -> list[Any]:
        return [d.writer for d in loggers if d.writer is not None and (is_first or not d.rank_zero_only)]

    return Sink(logger.log_metrics, writers, state.stop_training, is_first)
