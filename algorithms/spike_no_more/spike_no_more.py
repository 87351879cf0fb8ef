"""Spike No More (arXiv 2312.16903) for Composer: a thin shell around the framework-free core."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import ensure_tuple, reproducibility
from torch import nn
from torch.optim import Optimizer

from msign_lightning.spike_no_more import Shortcut, SpikeNoMoreReport, SpikeNoMoreSettings, spike_no_more_

log = logging.getLogger(__name__)


def apply_spike_no_more(
    model: nn.Module,
    shortcut: Shortcut | None = "scaled_embed",
    *,
    optimizers: Optimizer | Sequence[Optimizer] | None = None,
    **settings: Any,
) -> SpikeNoMoreReport:
    """Prepares a new model for stable pre-training, in place (arXiv 2312.16903).

    As `msign_lightning.spike_no_more.spike_no_more_`, whose arguments it takes, but `optimizers` made before this call
    train the new LayerNorm of "embed_ln" too: in the group of the model's other vectors (gains, biases), else in that
    of the embedding.

    Example::

        apply_spike_no_more(model, "embed_ln", optimizers=optimizer)

    Raises:
        ValueError: An argument is out of its range, or the embedding, the matrices or their outputs can't be
            identified.
    """
    report = spike_no_more_(model, shortcut, **settings)
    if report.shortcut == "embed_ln":
        for optimizer in ensure_tuple(optimizers):
            _train_norm(optimizer, model, model.get_submodule(report.embedding))
    return report


class SpikeNoMore(SpikeNoMoreSettings, Algorithm):
    """Prepares a new model for stable pre-training at `Event.INIT` (Spike No More, arXiv 2312.16903).

    See `msign_lightning.spike_no_more.SpikeNoMoreSettings` for the arguments. It comes before the trainer loads a
    checkpoint (`load_path`, `autoresume`), whose weights hence stay; every trainer that loads or evaluates such a
    checkpoint needs this algorithm too. A model that holds trained weights when it is given to the trainer needs
    `init=False`. The weights are drawn with the trainer's seed, the same on every rank.

    Example::

        trainer = Trainer(..., algorithms=[SpikeNoMore()])

    Raises:
        ValueError: An argument is out of its range; or when the trainer begins, the embedding, the matrices or their
            outputs can't be identified.
    """

    def match(self, event: Event, state: State) -> bool:
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        with reproducibility.seed_context(state.rank_zero_seed):
            report = apply_spike_no_more(state.model, optimizers=state.optimizers, **self.arguments())
        logger.log_hyperparameters({"spike_no_more/matrices": len(report.matrices)})
        log.info(report.describe())


def _train_norm(optimizer: Optimizer, model: nn.Module, embedding: nn.Module) -> None:
    """Adds the embedding's norm to an optimizer that does not train it yet."""
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    new = [parameter for parameter in embedding.get_submodule("norm").parameters() if parameter not in groups]
    vectors = (parameter for parameter in model.parameters() if parameter.ndim == 1)
    alike = (groups[p] for p in (*vectors, embedding.get_parameter("weight")) if p in groups)
    next(alike, optimizer.param_groups[0])["params"].extend(new)
