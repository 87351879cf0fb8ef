"""One cell → one training run → one outcome."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn.utils import get_total_norm

from msign_lightning import Restoration, Target, select_targets, stable_rank
from msign_lightning.ablations.cell import Cell, Criterion, Outcome, plain
from msign_lightning.ablations.methods import MSignSettings
from msign_lightning.ablations.reader import Where, near
from msign_lightning.ablations.study import MIN_STEPS, Bisect, Study, Tpe, last_application, setting_of
from msign_lightning.callbacks import gradient_scale
from msign_lightning.collapse import CollapseDetector
from msign_lightning.recipes.train import RecipeCLI, load_recipe

WINDOW = MIN_STEPS
"""Training losses in a smoothed one, and optimizer steps between two reports."""
CURVE_POINTS = 50

Report = Callable[[int, float], bool]


def smooth(losses: Sequence[float]) -> list[float]:
    """Mean of each loss and those of up to nineteen steps before it."""
    sums = np.cumsum([0.0, *losses])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - WINDOW, 0)
    smoothed: list[float] = ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
    return smoothed


def find_collapse(smoothed: Sequence[float], delta: float, diverged_at: int | None = None) -> int | None:
    """Step from which a run is lost: see `Outcome.collapsed_at`.

    Args:
        smoothed: Smoothed losses from step 1 on, those before divergence.
        delta: Nats above the best smoothed loss so far.
        diverged_at: Step of the first loss that was not finite.
    """
    values = np.asarray(smoothed)
    limits = np.minimum(values[0], np.minimum.accumulate(values) + delta)
    (sound,) = np.nonzero(values <= limits)
    last_sound = int(sound[-1]) + 1  # the first step always is
    return diverged_at if last_sound == len(values) else last_sound + 1


def count_spikes(losses: Sequence[float], spike: float) -> int:
    """Number of "loss_spike" alarms of a `CollapseDetector` with this threshold."""
    detector = CollapseDetector(spike=spike, z_score=None, stall=None)
    return sum(len(detector.update(step, loss=loss)) for step, loss in enumerate(losses, start=1))


class Recorder(pl.Callback):
    """Records the loss and the gradient norm of every optimizer step; logs and reports about every twenty.

    Values are brought from the device together, one step before a multiple of twenty and at the last step, and the
    training is stopped there if a loss was not finite or `report` says so. Stable ranks are measured at about fifty of
    these steps: hence before an application of MSign with most periods, not right after it.
    """

    def __init__(self, report: Report | None = None) -> None:
        self.losses: list[float] = []
        self.diverged_at: int | None = None
        self.max_grad_norm: float | None = None
        self.stable_rank = math.nan
        self.pruned = False
        self.steps = 0
        self.seconds = 0.0
        self._report = report
        self._targets: list[Target] = []
        self._loss: Tensor | float = 0.0
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._tokens = 0
        self._timed: list[tuple[int, float]] = []  # tokens and seconds between two reports
        self._start = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Mean over the run, but for the steps up to the first report, which hold the start-up."""
        tokens, seconds = zip(*(self._timed[1:] or self._timed), strict=True)
        return float(sum(tokens) / sum(seconds))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._targets = select_targets(pl_module, "attention")
        self._start = perf_counter()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        norm = get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        self._norms.append(norm / gradient_scale(trainer, optimizer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        self._tokens += batch.numel() - len(batch)
        self._loss = self._loss + outputs["loss"].detach()
        if trainer.global_step == self.steps:  # a micro-batch of gradient accumulation
            return
        self.steps = trainer.global_step
        self._losses.append(torch.as_tensor(self._loss))
        self._loss = 0.0
        if (self.steps + 1) % WINDOW == 0 or self.steps == trainer.max_steps:
            self._bring(trainer)

    def _bring(self, trainer: pl.Trainer) -> None:
        values = torch.stack([*self._losses, *self._norms]).tolist()
        losses, norms = values[: len(self._losses)], values[len(self._losses) :]
        self._timed.append((self._tokens, perf_counter() - self._start))
        self.seconds += self._timed[-1][1]
        self._losses, self._norms, self._tokens = [], [], 0
        finite = [norm for norm in norms if math.isfinite(norm)]
        self.max_grad_norm = max([*finite, self.max_grad_norm or 0.0]) if finite else self.max_grad_norm
        good = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
        self.losses += losses[:good]
        if good < len(losses):
            self.diverged_at = len(self.losses) + 1
            trainer.should_stop = True
        else:
            self._tell(trainer, max(norms))
        self._start = perf_counter()

    def _tell(self, trainer: pl.Trainer, grad_norm: float) -> None:
        recent = self.losses[-WINDOW:]
        loss = sum(recent) / len(recent)
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        metrics = {"loss/smoothed": loss, "lr": rate, "grad_norm/max": grad_norm}
        every = max(1, trainer.max_steps // (CURVE_POINTS * WINDOW))
        if len(self._timed) % every == 0 or self.steps == trainer.max_steps:
            ranks = torch.cat([stable_rank(target.matrix(target.parameter)) for target in self._targets])
            self.stable_rank = ranks.clamp(min=1).log().mean().exp().item()
            metrics["stable_rank/attention"] = self.stable_rank
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self.steps)
        if self._report is not None and self._report(self.steps, loss) and self.steps < trainer.max_steps:
            self.pruned = trainer.should_stop = True

    def outcome(self, val_loss: float | None, criterion: Criterion) -> Outcome:
        """What the run gave, with its validation loss."""
        if not self.losses:
            raise ValueError("the loss of the first step must be finite, whatever the learning rate: got none")
        diverged_at = self.diverged_at
        if val_loss is None or not math.isfinite(val_loss):
            diverged_at, val_loss = diverged_at or self.steps, None
        diverged = diverged_at is not None
        smoothed = smooth(self.losses)
        stride = -(-len(smoothed) // CURVE_POINTS)
        shown = [*range(0, len(smoothed) - 1, stride), len(smoothed) - 1]
        return Outcome(
            val_loss=val_loss,
            initial_loss=self.losses[0],
            best_loss=min(smoothed),
            final_loss=None if diverged else smoothed[-1],
            diverged_at=diverged_at,
            collapsed_at=find_collapse(smoothed, criterion.delta, diverged_at),
            spikes=count_spikes(self.losses, criterion.spike),
            max_grad_norm=self.max_grad_norm,
            stable_rank=self.stable_rank if math.isfinite(self.stable_rank) and not diverged else None,
            steps=self.steps,
            tokens_per_second=self.tokens_per_second,
            seconds=self.seconds,
            curve=tuple((i + 1, smoothed[i]) for i in shown),
        )


def run_cell(study: Study, cell: Cell, folder: Path, report: Report | None = None) -> Outcome | None:
    """Trains one run to its end, in this process and on one thread.

    Runs of the same seed start at the same weights and see the same data, whatever the arm. Nothing is restored in the
    last period before the validation. A divergence ends the run, as a result. Scalars for TensorBoard go to
    folder / cell.folder, in place of those of an earlier try.

    Args:
        study: The cell's study.
        cell: What to run.
        folder: Where the study's logs go.
        report: Called with step and smoothed training loss about every twenty steps; True stops the run,
            unless it was the last step.

    Returns:
        The outcome; None if `report` stopped the run.

    Raises:
        ValueError: The recipe refuses a setting, or the folder can't be written to.
        ImportError: The arm needs a package that is not installed.
    """
    torch.set_num_threads(1)
    arm = study.arm(cell.arm)
    arm.check_package()
    recorder = Recorder(report)
    recipe = _build(study, cell, folder, [recorder])
    trainer = recipe.trainer
    trainer.callbacks += arm.callbacks(_msign_settings(study, cell.arm, recipe))  # type: ignore[attr-defined]
    logger = TensorBoardLogger(folder, cell.folder, version="")
    shutil.rmtree(logger.log_dir, ignore_errors=True)
    trainer.logger = logger
    limit, trainer.limit_val_batches = trainer.limit_val_batches, 0
    trainer.fit(recipe.model, recipe.datamodule)
    if recorder.pruned:
        return None
    val_loss = None
    if recorder.diverged_at is None:
        trainer.limit_val_batches = limit
        (validation,) = trainer.validate(recipe.model, recipe.datamodule, verbose=False)
        val_loss = validation["loss/val"]
    return recorder.outcome(val_loss, study.criterion)


def check(study: Study) -> None:
    """Builds recipes without training them, so that a wrong setting fails at the start: each arm, each factor's value.

    Raises:
        StudyError: A recipe can't be built, its data can't be read, or a package is missing.
    """
    for i, name in enumerate(study.arms):
        try:
            study.arm(name).check_package()
        except ImportError as error:
            raise study.error(f"{name}: {error}", "arms", i) from error
    sampler = study.sampler
    lr = sampler.low if isinstance(sampler, (Bisect, Tpe)) else float(study.factors["lr"][0])  # type: ignore[arg-type]
    checked: set[object] = set()
    for group in study.groups():
        parts = {group.arm, *group.factors}
        if parts <= checked:
            continue
        checked |= parts
        try:
            with _quiet():
                recipe = _build(study, group.cell(lr, study.seeds[0]))
            recipe.model.optimizer(recipe.model.parameter_groups())
            if not recipe.trainer.limit_val_batches:
                raise ValueError("trainer.limit_val_batches must let a batch be validated, got 0")
            if study.arm(group.arm).until is not None:
                Restoration(recipe.model, **_msign_settings(study, group.arm, recipe))
            if (data := str(recipe.config.data)) not in checked:
                recipe.datamodule.setup("fit")
            checked.add(data)
        except (ValueError, TypeError, ImportError, OSError, MisconfigurationException) as error:
            raise study.error(f"{group.label}: {error}", *_place(study, group.arm, str(error))) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning says what it finds on the machine whenever a trainer is made."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _settings(study: Study, cell: Cell) -> dict[str, Any]:
    """The recipe settings of a cell; those of the arm go before the study's, and its factors before both."""
    common = {setting_of(name): value for name, value in study.settings.items()}
    factors = {setting_of(name): value for name, value in cell.factors}
    settings = {**common, **study.arm(cell.arm).settings, **factors}
    # Another optimizer takes over the arguments that it shares with the last one: it must come before its own.
    return dict(sorted(settings.items(), key=lambda item: item[0] != "model.optimizer"))


def _build(study: Study, cell: Cell, folder: Path = Path(), callbacks: Sequence[pl.Callback] = ()) -> RecipeCLI:
    """The recipe of a cell, without MSign."""
    settings: dict[str, Any] = {
        "seed_everything": cell.seed,
        "use_msign": False,
        "trainer.max_steps": study.steps,
        "trainer.default_root_dir": str(folder),
        "trainer.logger": False,
        "trainer.enable_checkpointing": False,
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
        **_settings(study, cell),
    }
    arguments = [f"--{n}={v if isinstance(v, str) else json.dumps(plain(v))}" for n, v in settings.items()]
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            recipe = load_recipe(study.recipe, *arguments, callbacks=callbacks)
    except SystemExit as error:
        # The parser has written its usage, with all that it knows, and then what is wrong.
        usage, _, message = messages.getvalue().rpartition("error: ")
        unknown = re.findall(r"unrecognized arguments: --([\w.]+)", message)
        hint = near(unknown[0], re.findall(r"\[--([\w.]+)", usage)) if unknown else ""
        told = " ".join(message.split())
        raise ValueError(f"the recipe {study.recipe} can't be built: {told}{hint}") from error
    sys.stderr.write(messages.getvalue())
    return recipe


def _msign_settings(study: Study, arm: str, recipe: RecipeCLI) -> MSignSettings:
    """The arguments of an `MSignCallback` by the recipe's parser, but for the last step at which it restores."""
    until = study.arm(arm).until
    if until is None:
        return {}
    settings: dict[str, Any] = recipe.config.msign.as_dict()
    stop = last_application(study.steps, settings["period"], until)
    if stop < settings["period"]:
        period = settings["period"]
        raise ValueError(f"steps must be enough to restore once before the last period of {period}, got {study.steps}")
    return settings | {"stop": stop}


def _place(study: Study, arm: str, message: str) -> Where:
    """Where in the study file an error of the recipe most likely comes from."""
    for part, names in (("factors", study.factors), ("settings", study.settings)):
        for name in names:
            if setting_of(name) in message:
                return part, name
    return "arms", list(study.arms).index(arm)
