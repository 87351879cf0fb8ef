"""Signs of a collapse, from what is measured while a model trains: loss, gradient norm, stable rank, sign diversity."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Alarm", "AlarmKind", "CollapseDetector"]

AlarmKind = Literal["non_finite", "loss_spike", "loss_outlier", "stall", "stable_rank", "sign_diversity"]

_MEDIAN_WINDOW = 201
_MEAN_WINDOW = 1000
_STABLE_RANK_MARGIN = 1.02  # power iteration overstates the stable rank by up to 2 %


class Alarm(NamedTuple):
    """One sign of a collapse, on "loss", "grad_norm" or a matrix; see `CollapseDetector`.

    `threshold` is what the value crossed; infinity where it was not finite.
    """

    kind: AlarmKind
    step: int
    name: str
    value: float
    threshold: float


class CollapseDetector:
    """Turns what is measured into alarms, each raised once and again only after it has cleared.

    - "non_finite": a loss, gradient norm or stable rank is NaN or infinite.
    - "loss_spike": the loss is more than `spike` nats above the median of the last 201. For batches of millions of
      tokens, which scatter little, 0.1 is usual.
    - "loss_outlier": the loss is more than `z_score` standard deviations above the mean of the last 1000 (OLMo 2, arXiv
      2501.00656).
    - "stall": the median of the last 201 losses is more than `stall` nats above its own lowest value so far.
    - "stable_rank": that of a matrix is below 1.02 `stable_rank`, since estimates are up to 2 % high.
    - "sign_diversity": that of a matrix is below `sign_diversity`, at most ½. It is off by default, for in the runs of
      benchmarks/early_warning.py it warned of healthy training, too.

    The last two are raised, for each such matrix, only when at least `share`, above 0 and at most 1, of the matrices of
    the update are low: in healthy runs some always are. Zero matrices and masked (NaN) sign diversities don't count.

    An alarm clears when the value is finite again; when at most half of the loss's excess is left; when the stable rank
    is above 1.1 times its threshold; when the sign diversity is above twice its own. A threshold of None turns it off.

    A loss is compared with the finite ones before it, once a tenth of the window is filled, for "stall" all of it.

    Raises:
        ValueError: A threshold is out of its range.
    """

    def __init__(
        self,
        *,
        spike: float | None = 0.5,
        z_score: float | None = 7.0,
        stall: float | None = 0.2,
        stable_rank: float | None = 2.0,
        sign_diversity: float | None = None,
        share: float = 0.5,
    ) -> None:
        for name, value in (("spike", spike), ("z_score", z_score), ("stall", stall), ("stable_rank", stable_rank)):
            _check_threshold(name, value)
        _check_threshold("sign_diversity", sign_diversity, at_most=0.5)
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share!r}")
        self.share = share
        self.spike, self.z_score, self.stall = spike, z_score, stall
        self.stable_rank, self.sign_diversity = stable_rank, sign_diversity
        self._losses = _plain([])
        self._best = math.inf
        self._active: dict[tuple[AlarmKind, str], None] = {}  # an ordered set

    @property
    def active(self) -> tuple[tuple[AlarmKind, str], ...]:
        """Kind and name of the alarms that have been raised and have not cleared, the oldest first."""
        return tuple(self._active)

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        grad_norm: float | None = None,
        stable_ranks: Mapping[str, float] | None = None,
        sign_diversity: Mapping[str, float] | None = None,
    ) -> list[Alarm]:
        """Takes in what was measured at a step; what was not measured changes nothing.

        `grad_norm` is that of all gradients, before clipping; the last two are by the name of the matrix.

        Returns:
            The new alarms.
        """
        ranks = stable_ranks or {}
        alarms: list[Alarm] = []
        for name, value in chain({"loss": loss, "grad_norm": grad_norm}.items(), ranks.items()):
            if value is not None:
                is_finite = math.isfinite(value)
                alarms += self._raise(Alarm("non_finite", step, name, value, math.inf), not is_finite, is_finite)
        if loss is not None and math.isfinite(loss):
            alarms += self._check_loss(step, float(loss))
        if self.stable_rank is not None:
            limit = _STABLE_RANK_MARGIN * self.stable_rank
            alarms += self._check_matrices("stable_rank", step, ranks, limit, 1.1 * limit)
        if self.sign_diversity is not None:
            limit = self.sign_diversity
            alarms += self._check_matrices("sign_diversity", step, sign_diversity or {}, limit, 2 * limit)
        return alarms

    def _check_matrices(
        self, kind: AlarmKind, step: int, values: Mapping[str, float], low: float, clear: float
    ) -> list[Alarm]:
        # A stable rank of zero is a zero matrix; a sign diversity of zero is the lowest there is.
        sound = {name: v for name, v in values.items() if v > 0 or (v == 0 and kind == "sign_diversity")}
        are_many = sum(value < low for value in sound.values()) >= self.share * len(sound)
        alarms: list[Alarm] = []
        for name, value in sound.items():
            alarms += self._raise(Alarm(kind, step, name, value, low), are_many and value < low, value > clear)
        return alarms

    def clear(self, names: Collection[str]) -> None:
        """Forgets the alarms of these matrices, for they have been changed: the next bad value raises anew."""
        self._active = {key: None for key in self._active if key[1] not in names}

    def _check_loss(self, step: int, loss: float) -> list[Alarm]:
        alarms: list[Alarm] = []

        def check(kind: AlarmKind, value: float, base: float, excess: float) -> None:
            alarm = Alarm(kind, step, "loss", value, base + excess)
            alarms.extend(self._raise(alarm, value > base + excess, value <= base + excess / 2))

        if len(self._losses) >= _MEDIAN_WINDOW // 10:
            median = self._losses[-_MEDIAN_WINDOW:].median().item()
            if self.spike is not None:
                check("loss_spike", loss, median, self.spike)
            if self.stall is not None and len(self._losses) >= _MEDIAN_WINDOW:
                self._best = min(self._best, median)
                check("stall", median, self._best, self.stall)
        if self.z_score is not None and len(self._losses) >= _MEAN_WINDOW // 10:
            deviation, mean = torch.stack(torch.std_mean(self._losses, correction=0)).tolist()
            check("loss_outlier", loss, mean, self.z_score * deviation)
        self._losses = torch.cat([self._losses[1 - _MEAN_WINDOW :], _plain([loss])])
        return alarms

    def _raise(self, alarm: Alarm, raised: bool, cleared: bool) -> list[Alarm]:
        """The alarm, if it is raised and was not active. Between raised and cleared nothing changes."""
        key = (alarm.kind, alarm.name)
        if cleared:
            self._active.pop(key, None)
        if not raised or key in self._active:
            return []
        self._active[key] = None
        return [alarm]

    def state_dict(self) -> dict[str, Any]:
        """What exact resumption needs, in lists, floats and strings."""
        return {"losses": self._losses.tolist(), "best": self._best, "active": [list(key) for key in self._active]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from a saved state. An alarm that is turned off now is not active any more."""
        self._losses = _plain(state_dict["losses"])
        self._best = state_dict["best"]
        thresholds = {"loss_spike": self.spike, "loss_outlier": self.z_score, "stall": self.stall}
        thresholds |= {"stable_rank": self.stable_rank, "sign_diversity": self.sign_diversity}
        off = {kind for kind, threshold in thresholds.items() if threshold is None}
        self._active = {(kind, name): None for kind, name in state_dict["active"] if kind not in off}


def _plain(values: Sequence[float]) -> Tensor:
    """In float64, so that going to a list and back changes nothing."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _check_threshold(name: str, value: float | None, at_most: float = math.inf) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= at_most or value == math.inf:
        rule = "a positive number" if at_most == math.inf else f"a positive number of at most {at_most:g}"
        raise ValueError(f"{name} must be {rule} or None, got {value!r}")
