"""One training run: which it is, what it gave, and when it counts as stable."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from msign_lightning.ablations.methods import Value

Factors = tuple[tuple[str, Value], ...]
WINDOW = 20
"""Training losses in a smoothed one."""
CURVE_POINTS = 50


def plain(value: Any) -> Any:
    """The value with dicts and lists for its mappings and sequences, for JSON; a named tuple is a mapping."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def show(value: Value) -> str:
    """The value, for people."""
    if isinstance(value, tuple):
        return ",".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Group:
    """The cells that differ in learning rate and seed alone.

    `arm` is the method, `factors` are name and value of the factors that concern it, but "lr", sorted by name.
    """

    arm: str
    factors: Factors = ()

    @property
    def label(self) -> str:
        """For people: "msign (period=20, targets=attention)"."""
        inner = ", ".join(f"{name}={show(value)}" for name, value in self.factors)
        return f"{self.arm} ({inner})" if inner else self.arm

    def __lt__(self, other: Group) -> bool:
        return self.label < other.label

    def cell(self, lr: float, seed: int) -> Cell:
        """The cell of the group at a peak learning rate, with a seed."""
        return Cell(self.arm, tuple(sorted((*self.factors, ("lr", float(lr))))), seed)


class Cell(NamedTuple):
    """One training run: method, factors that concern it, "lr" among them, and seed of initialisation and data."""

    arm: str
    factors: Factors
    seed: int

    @property
    def key(self) -> str:
        """Identity of the cell in a storage: 16 hexadecimal digits of the SHA-256 of its values."""
        text = json.dumps([self.arm, plain(self.factors), self.seed], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return float(dict(self.factors)["lr"])  # type: ignore[arg-type]

    @property
    def group(self) -> Group:
        """The cell without learning rate and seed."""
        return Group(self.arm, tuple(factor for factor in self.factors if factor[0] != "lr"))

    @property
    def label(self) -> str:
        """For people: "msign (period=20) lr=0.03 seed=1"."""
        return f"{self.group.label} lr={self.lr:.4g} seed={self.seed}"

    @property
    def folder(self) -> str:
        """Name for a folder, readable and unlike any other cell's: "msign_period=20_lr=0.03_seed=1_4d1f03"."""
        return re.sub(r"[^A-Za-z0-9.=+-]+", "_", self.label)[:200] + f"_{self.key[:6]}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"arm": self.arm, "factors": plain(dict(self.factors)), "seed": self.seed}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """The cell that gave `as_dict`."""
        factors = {name: _frozen(value) for name, value in values["factors"].items()}
        return cls(values["arm"], tuple(sorted(factors.items())), values["seed"])


class Criterion(NamedTuple):
    """When a run counts as stable: finite to its end, and all of what follows.

    Attributes:
        max_loss: Bound on the validation metric, fixed before the study is run; None for no bound.
        delta: The last smoothed training loss must not exceed min(initial loss, lowest smoothed loss + delta).
        spikes_per_10k: Bound on the spikes in 10,000 steps; None for no limit.
        spike: A training loss this far above the median of the last 201 is a spike.
    """

    max_loss: float | None = None
    delta: float = 0.5
    spikes_per_10k: float | None = None
    spike: float = 0.5

    def is_stable(self, outcome: Outcome) -> bool:
        """Whether a run was stable that gave this."""
        if outcome.diverged_at is not None or outcome.val_loss is None or outcome.final_loss is None:
            return False
        return (
            (self.max_loss is None or outcome.val_loss <= self.max_loss)
            and outcome.final_loss <= min(outcome.initial_loss, outcome.best_loss + self.delta)
            and (self.spikes_per_10k is None or 1e4 * outcome.spikes <= self.spikes_per_10k * outcome.steps)
        )


class Outcome(NamedTuple):
    """What a run gave. Divergence is an outcome. Losses are in nats per token, unless a program has other ones.

    Attributes:
        val_loss: The study's validation metric after the last step; None if the run diverged.
        initial_loss: The first training loss.
        best_loss: Lowest smoothed loss, a mean of the last twenty training losses.
        final_loss: Last smoothed loss; None if the run diverged.
        diverged_at: Step of the first loss that was not finite, or the last step if only the validation loss was not.
        collapsed_at: First step from which the smoothed loss stays above min(initial loss, best so far + `delta`) until
            the end, or `diverged_at` if it was below until then; None if it ends below: censored at `steps`.
        spikes: Number of times that the loss rose more than `spike` above the median of the last 201.
        max_grad_norm: Largest finite norm of all gradients before clipping; None if it is not known.
        stable_rank: Geometric mean over the attention matrices at the end; None if the run diverged or it is not known.
        steps: Optimizer steps done.
        steps_per_second: Of training, without start-up, validation and measurements.
        seconds: Of training, without validation and measurements.
        curve: Step and smoothed loss at about fifty steps.
        ranks: Step and stable rank at about fifty steps, as far as they are known.
    """

    val_loss: float | None
    initial_loss: float
    best_loss: float
    final_loss: float | None
    diverged_at: int | None
    collapsed_at: int | None
    spikes: int
    max_grad_norm: float | None
    stable_rank: float | None
    steps: int
    steps_per_second: float
    seconds: float
    curve: tuple[tuple[int, float], ...]
    ranks: tuple[tuple[int, float], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values: dict[str, Any] = plain(self)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """The outcome that gave `as_dict`, here or in an earlier version, among whatever else."""
        own: dict[str, Any] = {name: values[name] for name in cls._fields if name in values}
        own |= {name: tuple(map(tuple, own[name])) for name in ("curve", "ranks") if name in own}
        return cls(**own)


def smooth(losses: Sequence[float]) -> list[float]:
    """Mean of each loss and those of up to nineteen before it."""
    windows = (losses[max(0, end - WINDOW) : end] for end in range(1, len(losses) + 1))
    return [sum(window) / len(window) for window in windows]


def find_collapse(smoothed: Sequence[float], delta: float) -> int | None:
    """Index of the first smoothed loss of those, up to the end, that are above all bounds of `Outcome.collapsed_at`."""
    values = np.asarray(smoothed)
    limits = np.minimum(values[0], np.minimum.accumulate(values) + delta)
    last_sound = int(np.flatnonzero(values <= limits)[-1])  # the first always is
    return None if last_sound == len(values) - 1 else last_sound + 1
