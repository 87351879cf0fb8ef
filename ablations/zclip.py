"""ZClip (arXiv 2504.02507) as a Lightning callback."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from msign_lightning.callbacks import gradient_scale


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
        parameters = [p for p in pl_module.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        scale = gradient_scale(trainer, optimizer)
        bound = self.update(norm.item() / scale)
        if bound is not None:
            clip_grads_with_norm_(parameters, bound * scale, norm)

    def update(self, norm: float) -> float | None:
        """Takes in the norm of a step; returns what to clip it to, or None."""
        if not math.isfinite(norm):
            return None
        if len(self._first) < self.warmup_steps:
            self._first.append(norm)
            variance, mean = torch.var_mean(torch.tensor(self._first, dtype=torch.float64), correction=0)
            self.mean, self.variance = mean.item(), variance.item()
            return None
        bound = None
        deviation = math.sqrt(self.variance)
        if norm - self.mean > self.z_threshold * deviation:
            norm = bound = self.mean + self.z_threshold**2 * self.variance / (norm - self.mean)
        self.mean = self.decay * self.mean + (1 - self.decay) * norm
        self.variance = self.decay * self.variance + (1 - self.decay) * (norm - self.mean) ** 2
        return bound
