"""Every argument of MSign and of the monitor: its default, its documentation and its check, once.

The callbacks of all frameworks inherit from these classes. What is made for a model takes their arguments after it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import wraps
from inspect import signature
from types import NoneType
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, get_args, overload

from torch import nn

from msign_lightning.collapse import CollapseDetector
from msign_lightning.linalg import Method, Rule, check_options
from msign_lightning.targets import Cut

__all__ = ["MonitorSettings", "OnAlarm", "Quantity", "RestorationSettings", "Settings", "with_settings"]

Quantity = Literal["stable_rank", "spectral_alignment", "jacobian_alignment"]
OnAlarm = Literal["log", "stop", "restore"]

DEFAULT_MEASURE: dict[Quantity, int] = {"stable_rank": 100, "spectral_alignment": 200}


def check_integer(name: str, value: object, minimum: int, unit: str = "") -> None:
    """Raises ValueError unless the value is an integer, and no bool, of at least 0 or 1."""
    try:
        valid = not isinstance(value, bool) and operator.index(value) >= minimum  # type: ignore[arg-type]
    except TypeError:
        valid = False
    if not valid:
        rule = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
        raise ValueError(f"{name} must be {rule}{unit and f' ({unit})'}, got {value!r}")


class Settings:
    """What the dataclasses of arguments share."""

    def arguments(self) -> dict[str, Any]:
        """The arguments by name, as they were given."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


@dataclass(eq=False)
class RestorationSettings(Settings):
    """Which matrices are restored, when and how.

    After optimizer steps P, 2P, 3P, … each target W becomes ‖W‖_F · UVᵀ / ‖UVᵀ‖_F (arXiv 2602.01734, Eq. 14), where
    W = USVᵀ is its reduced SVD. It happens inside `optimizer.step()`, hence before learning rate schedulers, weight
    averaging, checkpoints and validation, whatever the order of the callbacks. Only completed optimizer steps count:
    not the micro-batches of gradient accumulation, nor steps that a gradient scaler skips. With several optimizers each
    counts its own steps and restores the matrices that it trains.

    An application disturbs the loss for some steps: let none fall on the last steps before the final evaluation, e.g.
    with `stop=max_steps - period`.

    Args:
        period: P, the number of optimizer steps between two applications.
        targets: "attention", "mlp", "all_2d" (both), or globs over parameter names.
        rule: "msign" (arXiv 2602.01734, Eq. 14), or "cap", which only lifts the stable rank to that of a random matrix.
        method: How the matrix sign is computed: "auto" picks by device and size, "svd" is exact in fp64.
        rtol: Singular values below rtol · σ₁ count as zero; None for the default of the weights' dtype.
        exclude: Globs over parameter names to leave out.
        cuts: Globs over parameter names → `Cut`, for fused parameters whose layout cannot be known.
        start: First step at which an application may happen.
        stop: Last step at which an application may happen; None for no end.

    Raises:
        ValueError: An argument is out of its range.
    """

    period: int = 100
    targets: str | Sequence[str] = "all_2d"
    _: KW_ONLY
    rule: Rule = "msign"
    method: Method = "auto"
    rtol: float | None = None
    exclude: str | Sequence[str] = ()
    cuts: Mapping[str, Cut] | None = None
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
        check_options(rule=self.rule, method=self.method, rtol=self.rtol)

    @property
    def first(self) -> int:
        """The first step that an application follows."""
        return self.period * max(1, -(-self.start // self.period))

    def due(self, step: int) -> bool:
        """Whether an application follows optimizer step number `step`, counted from 1."""
        return step % self.period == 0 and step >= self.first and (self.stop is None or step <= self.stop)


@dataclass(eq=False)
class MonitorSettings(Settings):
    """What is measured, how often, and what an alarm does; see `msign_lightning.monitor.Monitor`.

    Readings are logged at the number of optimizer steps: every ten steps mean loss and last gradient norm (before
    clipping) as `stability/...`, measurements as `stable_rank/...`, `sign_diversity/...` and `jacobian_.../...`. In
    TensorBoard, the page "Custom Scalars" shows them in order, with alarms and applications marked. With several
    optimizers the steps and gradients of the first count.

    Resuming from a checkpoint is exact. All arguments but `targets`, `exclude`, `blocks` and the quantities of
    `measure` may be changed before.

    Args:
        measure: "stable_rank", "spectral_alignment" or "jacobian_alignment" → cadence in optimizer steps; None for
            the first every 100 and the second every 200. A measurement of Jacobians costs some twenty training steps.
        on_alarm: "log"; "stop" the training; or "restore" the matrices concerned by MSign. Spikes and outliers of the
            loss are always only logged.
        targets: "attention", "mlp", "all_2d" (both), or globs over parameter names.
        exclude: Globs over parameter names to leave out.
        cuts: Globs over parameter names → `Cut`, for fused parameters whose layout cannot be known.
        blocks: Names or globs of the blocks for the Jacobians; None to find them.
        thresholds: Arguments of `CollapseDetector` that differ from its defaults; None turns an alarm off.
        cooldown: Optimizer steps for which a restored matrix is left alone.
        stop: Last step at which a matrix may be restored; None for no end.
        rule: How matrices are restored: "msign", or "cap", which only lifts the stable rank to that of a random matrix.
        per_matrix: Whether to log values per matrix and block besides summaries.

    Raises:
        ValueError: An argument is out of its range.
    """

    measure: Mapping[Quantity, int] | None = None
    on_alarm: OnAlarm = "log"
    _: KW_ONLY
    targets: str | Sequence[str] = "all_2d"
    exclude: str | Sequence[str] = ()
    cuts: Mapping[str, Cut] | None = None
    blocks: str | Sequence[str] | None = None
    thresholds: Mapping[str, float | None] | None = None
    cooldown: int = 100
    stop: int | None = None
    rule: Rule = "msign"
    per_matrix: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.measure, (Mapping, NoneType)):
            raise ValueError(f"measure must map quantities to cadences in optimizer steps, got {self.measure!r}")
        for quantity, every in self.cadences.items():
            if quantity not in get_args(Quantity):
                raise ValueError(f"measure must hold only {', '.join(get_args(Quantity))}, got {quantity!r}")
            check_integer(f"the cadence of {quantity} in measure", every, 1, "optimizer steps")
        if self.on_alarm not in get_args(OnAlarm):
            raise ValueError(f"on_alarm must be one of {', '.join(get_args(OnAlarm))}, got {self.on_alarm!r}")
        self.detector()
        check_integer("cooldown", self.cooldown, 1, "optimizer steps")
        if self.stop is not None:
            check_integer("stop", self.stop, 1, "optimizer steps")
        check_options(rule=self.rule)

    @property
    def cadences(self) -> dict[Quantity, int]:
        """What is measured, and every how many optimizer steps."""
        return dict(DEFAULT_MEASURE if self.measure is None else self.measure)

    @property
    def subject(self) -> dict[str, Any]:
        """What tells two monitors of one run apart: what they look at, not how often, nor what they do about it."""
        looks_at = {name: getattr(self, name) for name in ("targets", "exclude", "blocks")}
        return {"measure": sorted(self.cadences), **looks_at}

    def detector(self) -> CollapseDetector:
        """A new detector with these thresholds."""
        arguments: dict[str, Any] = dict(self.thresholds or {})
        known = signature(CollapseDetector).parameters
        if unknown := [name for name in arguments if name not in known]:
            raise ValueError(f"thresholds must hold only {', '.join(known)}, got {unknown[0]!r}")
        return CollapseDetector(**arguments)


P = ParamSpec("P")
S_co = TypeVar("S_co", covariant=True)
T = TypeVar("T")
R = TypeVar("R")


class _Spelled(Protocol[S_co, P]):
    @overload
    def __call__(self, function: Callable[[nn.Module, S_co], R], /) -> Callable[Concatenate[nn.Module, P], R]: ...

    @overload
    def __call__(self, function: Callable[[T, nn.Module, S_co], R], /) -> Callable[Concatenate[T, nn.Module, P], R]: ...


def with_settings(settings: Callable[P, S_co]) -> _Spelled[S_co, P]:
    """Lets a function of a model, or a method, take the arguments of its last parameter in that one's place.

    `def __init__(self, model, settings)` becomes `__init__(self, model, period=100, targets="all_2d", *, ...)`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        declared = signature(function)
        *leading, _ = declared.parameters.values()
        spelled = declared.replace(parameters=[*leading, *signature(settings).parameters.values()])

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = spelled.bind(*args, **kwargs).arguments
            first = [given.pop(parameter.name) for parameter in leading]
            return function(*first, settings(**given))  # type: ignore[call-arg]

        call.__signature__ = spelled  # type: ignore[attr-defined]
        return call

    return decorate
