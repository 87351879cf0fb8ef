"""Muon for the parameter groups of recipes; needs the package pytorch-optimizer."""

from __future__ import annotations

import pytorch_optimizer

from msign_lightning.recipes.module import ParameterGroups


class Muon(pytorch_optimizer.Muon):
    """Muon for the group "matrices" of a `LanguageModel`, AdamW for its embeddings, head and gains.

    An update of Muon is multiplied by 0.2 √max(m, n), so that it is as large as one of AdamW, and one learning rate
    serves both (arXiv 2502.16982).

    Args:
        groups: Parameter groups with a "name".
        lr: Learning rate of both.
        weight_decay: Of both, but for groups that have their own.
        betas: AdamW's.
        momentum: Muon's.
    """

    def __init__(
        self,
        groups: ParameterGroups,
        lr: float = 1e-2,
        *,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
    ) -> None:
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
