"""What a training run under Lightning gave: its losses, gradient norms and stable ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from msign_lightning import Target, select_targets, stable_rank
from msign_lightning.callbacks import gradient_scale
from msign_lightning.matrices import gather
from msign_lightning.monitor import grad_norm
from msign_lightning.targets import EmptySelectionError

POINTS = 50
"""Stable ranks are measured about so often."""


class Recorder(pl.Callback):
    """Records the loss and the gradient norm of every optimizer step; logs about every `every` steps.

    Values are brought from the device together, one step before a multiple of `every` and at the last step, and the
    training is stopped there if a loss was not finite or `progress` says so. Of several ranks they are the means.
    At about fifty of these steps the geometric mean of the attention matrices' stable ranks is measured, if the
    model has any: hence before an application of MSign with most periods, not right after it.

    Args:
        every: Optimizer steps between two transfers.
        progress: Called there on rank 0 with the step and the mean loss of the last `every` steps; True stops the
            training, unless it was the last step.

    Attributes:
        losses: Of each step, up to the first that was not finite.
        diverged_at: Step of the first loss that was not finite.
        grad_norms: Of each step, before clipping.
        stable_ranks: Step → stable rank.
        stopped: Whether `progress` stopped the training.
        steps: Optimizer steps done.
        seconds: Of training, without start-up and measurements.
    """

    def __init__(self, every: int = 20, progress: Callable[[int, float], bool] | None = None) -> None:
        self.losses: list[float] = []
        self.diverged_at: int | None = None
        self.grad_norms: list[float] = []
        self.stable_ranks: dict[int, float] = {}
        self.stopped = False
        self.steps = 0
        self._every = every
        self._progress = progress
        self._targets: list[Target] = []
        self._loss: Tensor | float = 0.0
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._timed: list[tuple[int, float]] = []  # steps and seconds between two transfers
        self._start = 0.0

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self._timed)

    @property
    def steps_per_second(self) -> float:
        """Mean over the run, but for the steps up to the first transfer, which hold the start-up."""
        steps, seconds = zip(*(self._timed[1:] or self._timed), strict=True)
        return float(sum(steps) / sum(seconds))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        try:
            self._targets = select_targets(pl_module, "attention")
        except EmptySelectionError:
            self._targets = []
        self._start = perf_counter()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        norm = grad_norm(pl_module.parameters(), gradient_scale(trainer, optimizer))
        self._norms.append(torch.zeros(()) if norm is None else norm)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(outputs, Mapping) or "loss" not in outputs:
            raise ValueError(f"training_step must return a loss, or a dict with one, got {type(outputs).__name__}")
        self._loss = self._loss + outputs["loss"].detach()
        if trainer.global_step == self.steps:  # a micro-batch of gradient accumulation
            return
        self.steps = trainer.global_step
        self._losses.append(torch.as_tensor(self._loss))
        self._loss = 0.0
        if (self.steps + 1) % self._every == 0 or self.steps == trainer.max_steps:
            self._bring(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._losses:  # the data ended before the steps
            self._bring(trainer)

    def state_dict(self) -> dict[str, Any]:
        pending = {"loss": [float(v) for v in self._losses], "norm": [float(v) for v in self._norms]}
        names = ("losses", "grad_norms", "stable_ranks", "steps", "_timed")
        return {**{name: getattr(self, name) for name in names}, "pending": pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pending = state_dict["pending"]
        self._losses, self._norms = ([torch.tensor(v) for v in pending[name]] for name in ("loss", "norm"))
        vars(self).update({name: value for name, value in state_dict.items() if name != "pending"})

    def average(self, trainer: pl.Trainer) -> None:
        """Makes what is not brought yet means over the ranks, as a checkpoint needs it, which all ranks load."""
        if self._losses:
            device = self._losses[-1].device  # others may come from a checkpoint
            stacked = torch.stack([value.to(device) for value in (*self._losses, *self._norms)])
            means = trainer.strategy.reduce(stacked, reduce_op="mean")
            self._losses, self._norms = [*means[: len(self._losses)]], [*means[len(self._losses) :]]

    def _bring(self, trainer: pl.Trainer) -> None:
        self.average(trainer)
        values = torch.stack([*self._losses, *self._norms]).tolist()
        losses, norms = values[: len(self._losses)], values[len(self._losses) :]
        self._timed.append((len(losses), perf_counter() - self._start))
        self._losses, self._norms = [], []
        self.grad_norms += norms
        good = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
        self.losses += losses[:good]
        if good < len(losses):
            self.diverged_at = len(self.losses) + 1
            trainer.should_stop = True
        else:
            self._tell(trainer, max(norms, default=math.nan))
        self._start = perf_counter()

    def _tell(self, trainer: pl.Trainer, grad_norm: float) -> None:
        recent = self.losses[-self._every :]
        loss = sum(recent) / len(recent)
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        metrics = {"loss/smoothed": loss, "lr": float(rate), "grad_norm/max": grad_norm}
        at_some = max(1, trainer.max_steps // (POINTS * self._every))
        if self._targets and (len(self._timed) % at_some == 0 or self.steps == trainer.max_steps):
            ranks = torch.cat([stable_rank(target.matrix(gather(target.parameter))) for target in self._targets])
            metrics["stable_rank/attention"] = ranks.clamp(min=1).log().mean().exp().item()
            self.stable_ranks[self.steps] = metrics["stable_rank/attention"]
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self.steps)
        stop = self._progress is not None and trainer.is_global_zero and self._progress(self.steps, loss)
        if trainer.strategy.broadcast(stop) and self.steps < trainer.max_steps:
            self.stopped = trainer.should_stop = True
