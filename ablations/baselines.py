"""Methods to compare with that no library has in a form that a study can use."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean, pvariance
from typing import Any

import lightning.pytorch as pl
import pytorch_optimizer
from torch.nn.utils import clip_grads_with_norm_

from msign_lightning.callbacks import gradient_scale
from msign_lightning.monitor import grad_norm


class ZClip(pl.Callback):
    r"""Clips the norm of all gradients where it is an outlier (ZClip, arXiv 2504.02507, reciprocal clipping).

    With the exponential means :math:`\mu` of the norms g and :math:`\sigma^2` of their squared deviations, a norm whose
    score :math:`z = (g - \mu) / \sigma` exceeds the threshold :math:`\hat z` becomes
    :math:`\mu + \sigma \hat z^2 / z`. Then both means take in the norm so clipped. They start as mean and variance of
    the first `warmup_steps` norms, which are left alone.

    It comes before the trainer's own `gradient_clip_val`. A norm that is not finite is left alone and not taken in.

    Args:
        z_threshold: Threshold of the score.
        decay: Decay of the means, α.
        warmup_steps: Number of norms to start from.
    """

    def __init__(self, z_threshold: float = 2.5, decay: float = 0.97, *, warmup_steps: int = 25) -> None:
        self.z_threshold = z_threshold
        self.decay = decay
        self.warmup_steps = warmup_steps
        self.mean = self.variance = 0.0
        self._first: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        norm = grad_norm(pl_module.parameters(), gradient_scale(trainer, optimizer))
        bound = None if norm is None else self.update(norm.item())
        if norm is not None and bound is not None:
            clip_grads_with_norm_(pl_module.parameters(), bound, norm)  # multiplies by their ratio, scaled or not

    def update(self, norm: float) -> float | None:
        """Takes in the norm of a step; returns what to clip it to, or None."""
        if not math.isfinite(norm):
            return None
        if len(self._first) < self.warmup_steps:
            self._first.append(norm)
            self.mean, self.variance = fmean(self._first), pvariance(self._first)
            return None
        bound = None
        deviation = math.sqrt(self.variance)
        if norm - self.mean > self.z_threshold * deviation:
            norm = bound = self.mean + self.z_threshold**2 * self.variance / (norm - self.mean)
        self.mean = self.decay * self.mean + (1 - self.decay) * norm
        self.variance = self.decay * self.variance + (1 - self.decay) * (norm - self.mean) ** 2
        return bound

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "variance": self.variance, "first": self._first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mean, self.variance, self._first = (state_dict[name] for name in ("mean", "variance", "first"))


class SkipNonFinite(pl.Callback):
    """Leaves the weights as they are in a step whose gradients are not all finite, as a gradient scaler does."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        norm = grad_norm(pl_module.parameters())
        if norm is not None and not norm.isfinite():
            optimizer.zero_grad()  # a parameter without a gradient is not updated


class Muon(pytorch_optimizer.Muon):
    """Muon for the parameter group "matrices", AdamW for the others, such as embeddings, head and gains.

    An update of Muon is multiplied by 0.2 √max(m, n), so that it is as large as one of AdamW, and one learning rate
    serves both (arXiv 2502.16982).

    Args:
        groups: Parameter groups with a "name".
        lr: Learning rate of both.
        weight_decay: Of both, but for groups that have their own.
        betas: AdamW's.
        momentum: Muon's.

    Raises:
        ValueError: A group has no name.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float = 1e-2,
        *,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
    ) -> None:
        groups = list(groups)
        if not all(isinstance(group, dict) and "name" in group for group in groups):
            raise ValueError("groups must have names, of which Muon trains those called matrices, got none")
        super().__init__(
            [{**group, "use_muon": group["name"] == "matrices"} for group in groups],
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            use_adjusted_lr=True,
            adamw_lr=lr,
            adamw_betas=betas,
            adamw_wd=weight_decay,
            adamw_eps=1e-8,
        )
