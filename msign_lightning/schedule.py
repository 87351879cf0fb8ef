"""When a restoration happens, counted in optimizer steps."""

from __future__ import annotations

import operator
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """After which optimizer steps the weights are restored: P, 2P, 3P, … between `start` and `stop`.

    Steps count from 1: step t is the t-th *completed* optimizer step, so nothing ever happens "at step 0", before
    training. MSign (arXiv 2602.01734, Algorithm 1) is `Schedule(period=100)`.

    Args:
        period: P, the number of optimizer steps between two applications.
        start: First step at which an application may happen.
        stop: Last step at which an application may happen; None for no end. An application disturbs the loss for
            some steps, so a run of T steps that is evaluated at its end is best given `stop=T - period`.

    Raises:
        ValueError: `period` is not a positive integer, `start` or `stop` is not an integer ≥ 0, start > stop, or
            no multiple of `period` lies between them.
    """

    period: int = 100
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        check_integer("period", self.period, minimum=1)
        check_integer("start", self.start, minimum=0)
        if self.stop is not None:
            check_integer("stop", self.stop, minimum=0)
            if self.start > self.stop:
                raise ValueError(f"start must be at most stop, got start={self.start}, stop={self.stop}")
            if self.first > self.stop:
                raise ValueError(
                    f"stop must be at least {self.first}, the first multiple of period {self.period} "
                    f"from start {self.start} on, got {self.stop}"
                )

    @property
    def first(self) -> int:
        """The first step that an application follows."""
        return self.period * max(1, -(-self.start // self.period))

    def due(self, step: int) -> bool:
        """Whether an application follows optimizer step number `step`."""
        return step > 0 and step % self.period == 0 and self.start <= step and (self.stop is None or step <= self.stop)


def check_integer(name: str, value: object, minimum: int, unit: str = "") -> None:
    """Raises ValueError unless the value is an integer, and no bool, of at least 0 or 1."""
    try:
        valid = not isinstance(value, bool) and operator.index(value) >= minimum  # type: ignore[arg-type]
    except TypeError:
        valid = False
    if not valid:
        rule = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
        raise ValueError(f"{name} must be {rule}{unit and f' ({unit})'}, got {value!r}")
