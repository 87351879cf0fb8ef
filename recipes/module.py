"""The LightningModule: next-token loss, groups of parameters with their own learning rates, and the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from msign_lightning.recipes.transformer import Transformer, TransformerConfig

ParameterGroups = list[dict[str, Any]]


class LanguageModel(pl.LightningModule):
    """A `Transformer` trained to predict the next token.

    Logs `loss/train` and `loss/val`, in nats per token. Gradient clipping is the trainer's `gradient_clip_val`.

    The learning rate of a group is the optimizer's times the group's factor times the schedule: `warmup_steps` of
    linear warm-up, then a linear decay to `final_lr` of the peak at the trainer's last step. With `matrix_lr=16` and
    `embedding_lr=4` it is the µP rule of the smaller configurations of MSign (arXiv 2602.01734, Table 4).

    Args:
        config: Shape and initialisation of the transformer.
        optimizer: Parameter groups → optimizer. Each group has a "name": "matrices" (the blocks' 2-D weights),
            "embeddings" (with the head) or "gains"; the gains' weight decay is zero.
        warmup_steps: Optimizer steps of linear warm-up.
        final_lr: Learning rate at the last step, as a share of the peak.
        matrix_lr: Factor on the learning rate of the blocks' matrices.
        embedding_lr: Factor on the learning rate of embedding and head.
        compile: Whether to compile the transformer, by `torch.compile`.

    Raises:
        ValueError: A value is out of its range; or when the optimizer is made, the trainer has no last step.
    """

    def __init__(
        self,
        config: TransformerConfig = TransformerConfig(),  # noqa: B008 (frozen)
        optimizer: Callable[[ParameterGroups], Optimizer] = lambda groups: AdamW(groups, lr=1e-2, weight_decay=0.1),
        *,
        warmup_steps: int = 50,
        final_lr: float = 0.1,
        matrix_lr: float = 1.0,
        embedding_lr: float = 1.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        if not 0 <= final_lr <= 1:
            raise ValueError(f"final_lr must be between 0 and 1, got {final_lr}")
        for name, value in (("matrix_lr", matrix_lr), ("embedding_lr", embedding_lr)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        self.transformer = Transformer(config)
        self.optimizer = optimizer
        self.compile_transformer = compile
        self.warmup_steps = warmup_steps
        self.final_lr = final_lr
        self.lr_factors = {"matrices": matrix_lr, "embeddings": embedding_lr, "gains": 1.0}

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of the next tokens."""
        logits_BTV: Tensor = self.transformer(tokens_BT)
        return logits_BTV

    def loss(self, batch_BL: Tensor) -> Tensor:
        """Mean cross-entropy, in nats per token, of a batch of windows (B, T + 1)."""
        logits_BTV = self(batch_BL[:, :-1])
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), batch_BL[:, 1:].flatten())

    def training_step(self, batch_BL: Tensor) -> Tensor:
        loss = self.loss(batch_BL)
        self.log("loss/train", loss)
        return loss + self.transformer.balance_loss()

    def configure_model(self) -> None:
        """Shards block by block under Lightning's `ModelParallelStrategy` (FSDP2), and compiles on request."""
        if self.device_mesh is not None and (size := self.device_mesh["tensor_parallel"].size()) > 1:
            raise ValueError(f"tensor_parallel_size must be 1, got {size}: use --trainer.strategy=fsdp2")
        if self.device_mesh is not None and not isinstance(self.transformer, FSDPModule):
            for part in (*self.transformer.blocks, self.transformer):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
        if self.compile_transformer:
            self.transformer.compile()  # type: ignore[no-untyped-call]

    def validation_step(self, batch_BL: Tensor) -> None:
        self.log("loss/val", self.loss(batch_BL), batch_size=len(batch_BL), prog_bar=True, sync_dist=True)

    def parameter_groups(self) -> ParameterGroups:
        """Parameters by kind, each once: the blocks' matrices, embeddings with the head, and gains."""
        named: dict[str, list[torch.nn.Parameter]] = {name: [] for name in self.lr_factors}
        for name, parameter in self.transformer.named_parameters():
            kind = "gains" if parameter.ndim < 2 else "matrices" if name.startswith("blocks.") else "embeddings"
            named[kind].append(parameter)
        groups: ParameterGroups = [{"name": name, "params": parameters} for name, parameters in named.items()]
        groups[-1]["weight_decay"] = 0.0
        return groups

    def lr_share(self, step: int, last_step: float) -> float:
        """Share of the peak learning rate at optimizer step `step`, counted from zero, of a run of `last_step`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1.0, last_step - self.warmup_steps)
        return 1 - (1 - self.final_lr) * min(1.0, done)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        last_step = self.trainer.estimated_stepping_batches
        if math.isinf(last_step):
            raise ValueError(f"the trainer's max_steps or max_epochs must be set, got {last_step} steps")
        optimizer = self.optimizer(self.parameter_groups())

        def share_of(group: dict[str, Any]) -> Callable[[int], float]:
            factor = self.lr_factors[group["name"]]
            return lambda step: factor * self.lr_share(step, last_step)

        scheduler = LambdaLR(optimizer, [share_of(group) for group in optimizer.param_groups])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
