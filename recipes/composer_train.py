"""Command line of the recipes under Composer: `python -m msign_lightning.recipes.composer_train --config tiny/prose`.

Recipes and arguments are those of `python -m msign_lightning.recipes.train fit`, with the same model, data and
optimizer. Of the trainer's settings `accelerator`, `precision`, `max_steps`, `accumulate_grad_batches` and
`gradient_clip_val` apply here. Several processes:
`composer -n 2 -m msign_lightning.recipes.composer_train --config tiny/prose`.
"""

from __future__ import annotations

from msign_lightning._extras import need

need("composer", "composer")

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from composer import Trainer
from composer.algorithms import GradientClipping
from composer.core import Algorithm, Evaluator
from composer.loggers import TensorboardLogger
from composer.metrics import LanguageCrossEntropy
from composer.models import ComposerModel
from composer.utils import dist
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn
from torchmetrics import Metric

from msign_lightning.algorithms import MSign
from msign_lightning.recipes.data import TrainingBatches
from msign_lightning.recipes.train import RecipeCLI
from msign_lightning.recipes.transformer import Block, Transformer

PRECISIONS = {"32-true": "fp32", "bf16-mixed": "amp_bf16", "16-mixed": "amp_fp16"}
"""Composer's names of Lightning's precisions."""


class ComposerLanguageModel(ComposerModel):
    """A transformer of tokens (B, T) → logits (B, T, V), trained to predict the next token of windows (B, T + 1)."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, batch: Tensor) -> Tensor:
        """Logits (B, T, V) of the next tokens."""
        logits_BTV: Tensor = self.transformer(batch[:, :-1])
        return logits_BTV

    def loss(self, outputs: Tensor, batch: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Mean cross-entropy, in nats per token, and the balancing loss of experts."""
        loss = F.cross_entropy(outputs.flatten(0, 1).float(), batch[:, 1:].flatten())
        return loss + self.transformer.balance_loss()

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Whether FSDP shards a module by itself."""
        return isinstance(module, Block)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        return {} if is_train else {"loss": LanguageCrossEntropy()}

    def update_metric(self, batch: Tensor, outputs: Tensor, metric: Metric) -> None:
        metric.update(outputs.float(), batch[:, 1:].contiguous())


class Joined:
    """Batches of a loader, n joined to one each time: what Composer cuts into micro-batches."""

    def __init__(self, batches: TrainingBatches, n: int) -> None:
        self.batches = batches
        self.n = n

    def __len__(self) -> int:
        return len(self.batches) // self.n

    def __iter__(self) -> Iterator[Tensor]:
        batches = iter(self.batches)
        for _ in range(len(self)):
            yield torch.cat([next(batches) for _ in range(self.n)])


class ComposerRecipeCLI(RecipeCLI):
    """The command line of the recipes with `algorithms.MSign` in place of the callback."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--use_msign", type=bool, default=True, help="False trains without MSign, as a baseline.")
        parser.add_class_arguments(MSign, "msign")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("model.config.vocab_size", "data.vocab_size")


def build_trainer(arguments: list[str] | None = None, **settings: Any) -> Trainer:
    """A Composer trainer, ready to fit, for the recipe that the arguments name.

    Args:
        arguments: As on the command line; None for those of this process.
        **settings: Further ones for the trainer, such as `loggers`.

    Raises:
        ValueError: The recipe has no `max_steps`, a precision that Composer does not know, or another setting that
            would change the training and is not supported here.
    """
    recipe = ComposerRecipeCLI(args=arguments, run=False, save_config_callback=None)
    plan: pl.Trainer = recipe.trainer
    if plan.max_steps < 1:
        raise ValueError(f"trainer.max_steps must be a positive integer, got {plan.max_steps}")
    if plan.gradient_clip_algorithm == "value":
        raise ValueError("trainer.gradient_clip_algorithm must be 'norm' here, got 'value'")
    if plan.precision not in PRECISIONS:
        raise ValueError(f"trainer.precision must be one of {', '.join(PRECISIONS)}, got {plan.precision!r}")

    recipe.model.trainer = plan  # whose last step is that of the learning rate schedule
    optimization = recipe.model.configure_optimizers()
    algorithms: list[Algorithm] = []
    if plan.gradient_clip_val:
        algorithms.append(GradientClipping("norm", plan.gradient_clip_val))
    if recipe.config["use_msign"]:
        algorithms.append(recipe.config_init["msign"])

    data = recipe.datamodule
    data.setup("fit")
    n_micro = plan.accumulate_grad_batches
    batches = data.train_batches(plan.max_steps * n_micro, dist.get_global_rank(), dist.get_world_size())
    if recipe.model.compile_transformer:
        recipe.model.transformer.compile()
    return Trainer(
        model=ComposerLanguageModel(recipe.model.transformer),
        train_dataloader=Joined(batches, n_micro),
        device_train_microbatch_size=data.batch_size,
        eval_dataloader=Evaluator(label="val", dataloader=data.val_dataloader(), eval_interval="1dur"),
        max_duration=f"{plan.max_steps}ba",
        optimizers=optimization["optimizer"],
        schedulers=optimization["lr_scheduler"]["scheduler"],
        step_schedulers_every_batch=True,
        algorithms=algorithms,
        device="cpu" if isinstance(plan.accelerator, CPUAccelerator) else "gpu",
        precision=PRECISIONS[plan.precision],
        seed=recipe.config["seed_everything"],
        **settings,
    )


def main() -> None:
    trainer = build_trainer(loggers=[TensorboardLogger("runs/composer")])
    trainer.fit()
    trainer.close()  # type: ignore[no-untyped-call]
    if dist.get_global_rank() == 0:
        print(f"loss/val {float(trainer.state.eval_metric_values['loss']):.4f}")


if __name__ == "__main__":
    main()
