"""MSign for the `Trainer` of Hugging Face: a thin shell around the framework-free core, like `MSignCallback`."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import Any, cast

import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.training_args import ParallelMode

from msign_lightning.shells import RestorationShell, Sink

log = logging.getLogger(__name__)


class MSignTrainerCallback(RestorationShell, TrainerCallback, ExportableState):
    """Restores the stable rank of weight matrices every `period` optimizer steps (MSign, arXiv 2602.01734).

    See `msign_lightning.settings.RestorationSettings` for what happens when, and for the arguments. Each application is
    noted in `trainer.state.log_history` under `msign/...`.

    Resuming from a checkpoint continues the count exactly. A checkpoint that was saved without this callback, or with
    other arguments, continues at the trainer's own count of optimizer steps.

    Example::

        trainer = Trainer(model, args, callbacks=[MSignTrainerCallback()])

    Raises:
        ValueError: An argument is out of its range; or when training starts, nothing is selected.
            Under FSDP1, `use_orig_params` must be True, as it is by default.
        RuntimeError: When training starts under DeepSpeed, which trains flat copies of the weights.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Selects the targets and hooks into the optimizer, which exists by now."""
        model: nn.Module = kwargs["model"]
        if args.deepspeed:
            raise RuntimeError("MSignTrainerCallback does not support DeepSpeed, which flattens the weights: use FSDP2")
        self._steps = []
        # The model is not wrapped here, but it is trained by DDP on all processes.
        is_copied = args.parallel_mode is ParallelMode.DISTRIBUTED and not args.fsdp and dist.is_initialized()

        def write(metrics: dict[str, float], step: int) -> None:
            state.log_history.append({**metrics, "step": step})

        steps, group = self._saved_steps(state), dist.group.WORLD if is_copied else None
        log.info(self._start(model, [kwargs["optimizer"]], steps, Sink(write), group))

    def _saved_steps(self, state: TrainerState) -> list[int]:
        saved: Any = (cast(Any, state.stateful_callbacks) or {}).get(type(self).__name__, [])
        states = saved if isinstance(saved, list) else [saved]
        mine = [each for each in states if each["args"] == self.state()["args"]]
        exact = mine[0]["attributes"]["_steps"] if mine else []
        return (exact or [state.global_step]) if state.global_step else []

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Lets go of optimizer and model."""
        self._stop()

    def state(self) -> dict[str, Any]:
        """The arguments and the number of completed optimizer steps, for a checkpoint."""
        return {"args": json.loads(json.dumps(asdict(self))), "attributes": {"_steps": self._count()}}
