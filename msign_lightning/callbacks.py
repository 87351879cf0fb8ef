"""Lightning callbacks: thin shells around the framework-free core."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from msign_lightning.shells import MonitorShell, RestorationShell, Sink
from msign_lightning.spike_no_more import SpikeNoMoreSettings, add_shortcut_, spike_no_more_

__all__ = ["MSignCallback", "SpikeNoMoreCallback", "StabilityMonitor", "gradient_scale"]


class MSignCallback(RestorationShell, Callback):
    """Restores the stable rank of weight matrices every `period` optimizer steps (MSign, arXiv 2602.01734).

    See `RestorationSettings` for what happens when, and for the arguments. Each application is written to all loggers
    of the trainer under `msign/...`, at the number of optimizer steps.

    Resuming from a checkpoint continues the count exactly. A checkpoint that was saved without this callback continues
    at the trainer's own count of optimizer steps.

    Example::

        trainer = Trainer(callbacks=[MSignCallback()])

    Raises:
        ValueError: An argument is out of its range; or when fitting starts, nothing is selected.
            Under FSDP1, `use_orig_params` must be True, as it is by default.
        RuntimeError: When fitting starts under DeepSpeed, which trains flat copies of the weights.
    """

    @property
    def state_key(self) -> str:
        """One key per settings, so that a checkpoint holds the counts of several callbacks.

        With other settings than those of a checkpoint, the count goes on from the trainer's.
        """
        return self._generate_state_key(**self.arguments())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Selects the targets and hooks into the optimizers, which exist by now."""
        _refuse_deepspeed(self, trainer)
        is_new = trainer.ckpt_path is None and trainer.global_step == 0
        steps = [] if is_new else self._count()
        rank_zero_info(self._start(_wrapped(trainer), trainer.optimizers, steps, _sink(trainer)))

    def on_fit_end(self, *args: Any, **kwargs: Any) -> None:
        """Lets go of the optimizers and of the model; the count stays, for another fit."""
        self._stop()

    on_exception = on_fit_end  # no other hook of the end is called

    def state_dict(self) -> dict[str, Any]:
        """The number of completed optimizer steps, per optimizer."""
        return {"steps": self._count()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the saved count, whether fitting has started (as in sharded strategies) or not."""
        self._steps = list(state_dict["steps"])
        if self._restoration is not None:
            self._restoration.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes over the trainer's count; `load_state_dict`, called next, knows the exact one if it was saved."""
        optimizers = max(1, len(checkpoint.get("optimizer_states", ())))
        self.load_state_dict({"steps": [checkpoint["global_step"] // optimizers] * optimizers})


class StabilityMonitor(MonitorShell, Callback):
    """Sees a collapse coming: stable rank, Spectral Alignment, Jacobian alignment, loss and gradient norm.

    See `MonitorSettings` for what is logged, and for the arguments. The loss is what `training_step` returns, as a
    tensor or under "loss"; without it there are no alarms of the loss.

    Matrices are restored at the end of the batch: a callback that averages weights must come after this one to see it.

    Example::

        trainer = Trainer(callbacks=[StabilityMonitor(on_alarm="restore")])

    Raises:
        ValueError: An argument is out of its range; or when training starts, nothing is selected.
            Under FSDP1, `use_orig_params` must be True, as it is by default, and Jacobians can't be measured.
        RuntimeError: When training starts under DeepSpeed, which trains flat copies of the weights.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._has_tried = False  # to step, in the batch at hand
        self._losses: list[Tensor] = []  # of the batches that make up a step

    @property
    def state_key(self) -> str:
        """One key per subject, so that a checkpoint holds the states of several monitors."""
        return self._generate_state_key(**self.subject)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Selects what to measure; by now the optimizers exist and a checkpoint has been loaded."""
        _refuse_deepspeed(self, trainer)
        self._has_tried, self._losses = False, []
        optimizers = trainer.optimizers
        steps = trainer.global_step // len(optimizers)
        rank_zero_info(self._start(_wrapped(trainer), optimizers[0], steps, _sink(trainer)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begin_batch()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Takes the norm of the gradients, which are not yet clipped."""
        if optimizer is trainer.optimizers[0]:
            self._has_tried = True
            self._take_gradients(optimizer, lambda: gradient_scale(trainer, optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes note of the optimizer step, if there was one in this batch."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            # Lightning has divided it by the number of batches in a step.
            parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append(loss.detach().mean() * parts)
        if not (self._has_tried or self._completed):
            return
        mean = sum(self._losses) / len(self._losses) if self._losses else None
        self._has_tried, self._losses = False, []
        self._end_batch(mean)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()  # no other hook of the end is called

    def state_dict(self) -> dict[str, Any]:
        """What exact resumption needs: steps counted, active alarms, recent losses, and two vectors per matrix."""
        return self._own_state() or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state, when training starts."""
        self._state = state_dict or None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forgets an earlier run; `load_state_dict`, called next, knows this one if its state was saved."""
        self._state = None


class SpikeNoMoreCallback(SpikeNoMoreSettings, Callback):
    """Prepares a new model for stable pre-training (Spike No More, arXiv 2312.16903).

    Weights are drawn from N(0, 2/(5d)), W_O and the MLP's W_2 divided by √(2N) for N layers, and the embedding's output
    is made large; see `spike_no_more_`.

    It happens in `setup`: before a checkpoint (`ckpt_path`) is loaded, whose weights hence stay, before the optimizers
    are made and before the model is sharded. The shortcut is no part of a checkpoint, so every trainer that loads or
    evaluates one needs this callback too. A model that holds trained weights when it is given to the trainer needs
    `init=False`. A resumed run draws from the generator as many numbers as a new one. A model that is built in
    `configure_model` does not exist in time: call `spike_no_more_` at the end of that hook.

    Example::

        trainer = Trainer(callbacks=[SpikeNoMoreCallback()])

    Raises:
        ValueError: An argument is out of its range; or in `setup`, the embedding, the matrices or their outputs can't
            be identified, or a callback that averages weights comes before this one.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Callback] = cast(Any, trainer).callbacks
        for callback in callbacks[: callbacks.index(self)]:
            if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
                # It has copied the model, and would average the copy's weights, without a shortcut.
                name = type(callback).__name__
                raise ValueError(f"SpikeNoMoreCallback must come before {name} in callbacks, got it after")
        if stage == "fit":
            rank_zero_info(spike_no_more_(pl_module, **self.arguments()).describe())
        else:
            # The weights in hand may be new or trained: a fit that follows may still draw them.
            add_shortcut_(pl_module, self.shortcut, embedding=self.embedding)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sees to it that weights which the trainer has loaded to evaluate them stay, if it fits them later."""
        if trainer.ckpt_path is not None:
            spike_no_more_(pl_module, self.shortcut, init=False, embedding=self.embedding)

    on_test_start = on_predict_start = on_validation_start


def gradient_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """What the gradients are still multiplied by in `on_before_optimizer_step`.

    Lightning has unscaled them by then, but for those of fused optimizers, which unscale by themselves, later.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    is_scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if scaler is not None and is_scaled else 1.0


def _wrapped(trainer: Trainer) -> nn.Module:
    """The module in the wrapper, of DDP for instance, that says how the processes share it."""
    return cast(nn.Module, trainer.strategy.model)


def _refuse_deepspeed(callback: Callback, trainer: Trainer) -> None:
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise RuntimeError(
            f"{type(callback).__name__} does not support {type(trainer.strategy).__name__}, which flattens the "
            "weights: use FSDP2, through ModelParallelStrategy"
        )


def _sink(trainer: Trainer) -> Sink:
    def write(metrics: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def writers() -> list[Any]:
        """Elsewhere than on the first process there are none."""
        loggers = trainer.loggers if trainer.is_global_zero else []
        return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]

    return Sink(write, writers, partial(setattr, trainer, "should_stop", True), trainer.is_global_zero)
