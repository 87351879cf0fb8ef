"""One cell → one run of the study's program → one outcome, whatever the program is.

A program is a recipe of this package, a configuration file or class of a `LightningCLI` (see `ablations.training`), or
a function `objective(settings, progress)` that trains one run in whatever way and returns its validation loss:

    def objective(settings, progress):
        model, optimizer = build(settings["seed"], settings["lr"])
        for step in range(1, settings["steps"] + 1):
            loss = train_step(model, optimizer)
            progress(step, loss)
        return {"loss/val": validate(model)}

`settings` holds arm, seed, steps, folder (for logs), lr, and all factors and settings of the study and its arm by their
names; an arm with MSign has a period, and stop, the last step at which to restore. What a function does not read can't
change anything, so that is an error. `progress` ends the run where it is lost or pruned, by an exception that is to be
let through.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

from msign_lightning.ablations.cell import CURVE_POINTS, WINDOW, Cell, Criterion, Outcome, find_collapse, smooth
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.study import SHORT_NAMES, Grid, Study, last_application
from msign_lightning.collapse import CollapseDetector

Progress = Callable[[int, float], bool]
"""Step, smoothed training loss → whether to stop."""
Objective = Callable[[Mapping[str, Any], Callable[[int, float], None]], float | Mapping[str, float]]


def run_cell(study: Study, cell: Cell, folder: Path, progress: Progress | None = None, legs: int = 1) -> Outcome | None:
    """Trains one run to its end, in this process.

    Runs of the same seed start at the same weights and see the same data, whatever the arm. A divergence ends the run,
    as a result.

    Args:
        study: The cell's study.
        cell: What to run.
        folder: Where the study's logs go; those of the run go to folder / cell.folder.
        progress: Called with step and smoothed training loss now and then; True stops the run, unless it was the last
            step.
        legs: A run under Lightning keeps a checkpoint at the end of each of so many parts, and goes on there when it is
            tried again: bit for bit on a CPU if the program's data resume exactly, as those of recipes do.

    Returns:
        The outcome; None if `progress` stopped the run.

    Raises:
        StudyError: The study does not fit its program.
        ValueError: The program refuses a setting, or the folder can't be written to.
        ImportError: The arm needs a package that is not installed.
    """
    study.arm(cell.arm).check_package()
    program = find(study)
    if program is None or isinstance(program, type):
        from msign_lightning.ablations.training import train

        return train(study, cell, folder, progress, legs)
    return _call(program, study, cell, folder, progress)


def check(study: Study) -> None:
    """Builds the program of each arm and each factor's value, so that a wrong setting fails at the start.

    Raises:
        StudyError: The program can't be built, its data can't be read, or a package is missing.
    """
    for i, name in enumerate(study.arms):
        try:
            study.arm(name).check_package()
        except ImportError as error:
            raise study.error(f"{name}: {error}", "arms", i) from error
    program = find(study)
    if program is None or isinstance(program, type):
        from msign_lightning.ablations.training import check

        check(study)


def find(study: Study) -> Any:
    """The class or function that is the program; None where it is a file.

    Raises:
        StudyError: It can't be imported, or can't be called.
    """
    if not study.is_object:
        return None
    module, _, name = study.program.partition(":")
    try:
        program = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise study.error(f"program must be package.module:name, got {study.program!r}: {error}", "program") from error
    if not callable(program):
        raise study.error(f"program must be a class or function, got {program!r}", "program")
    return program


def any_cell(study: Study, group: Any) -> Cell:
    """A cell of a group, with the first learning rate and seed."""
    lr = study.factors["lr"][0] if isinstance(study.sampler, Grid) else study.sampler.low
    cell: Cell = group.cell(lr, study.seeds[0])
    return cell


def stop_of(study: Study, arm: str, period: int) -> int:
    """The last step at which an arm restores.

    Raises:
        ValueError: It would never.
    """
    stop = last_application(study.steps, period, study.arm(arm).until or 0.0)
    if stop < period:
        raise ValueError(f"steps must be enough to restore once before the last period of {period}, got {study.steps}")
    return stop


def count_spikes(losses: Sequence[float], spike: float) -> int:
    """Number of "loss_spike" alarms of a `CollapseDetector` with this threshold."""
    detector = CollapseDetector(spike=spike, z_score=None, stall=None)
    return sum(len(detector.update(step, loss=loss)) for step, loss in enumerate(losses, start=1))


def outcome_of(
    points: Sequence[tuple[int, float]], val_loss: float | None, criterion: Criterion, **known: Any
) -> Outcome:
    """The outcome of a run: from step and training loss up to a divergence, the validation loss, and what is `known`.

    Raises:
        ValueError: There are no points.
    """
    if not points:
        raise ValueError("the loss of the first step must be finite, whatever the learning rate: got none")
    steps, losses = zip(*points, strict=True)
    diverged_at = known.pop("diverged_at", None)
    if val_loss is None or not math.isfinite(val_loss):
        diverged_at, val_loss = diverged_at or known["steps"], None
    smoothed = smooth(losses)
    collapse = find_collapse(smoothed, criterion.delta)
    stride = -(-len(smoothed) // CURVE_POINTS)
    shown = [*range(0, len(smoothed) - 1, stride), len(smoothed) - 1]
    return Outcome(
        val_loss=val_loss,
        initial_loss=losses[0],
        best_loss=min(smoothed),
        final_loss=None if diverged_at is not None else smoothed[-1],
        diverged_at=diverged_at,
        collapsed_at=diverged_at if collapse is None else steps[collapse],
        spikes=count_spikes(losses, criterion.spike),
        max_grad_norm=known.pop("max_grad_norm", None),
        stable_rank=known.pop("stable_rank", None) if diverged_at is None else None,
        curve=tuple((steps[i], smoothed[i]) for i in shown),
        **{name: value for name, value in known.items() if name != "stable_rank"},
    )


class CellSettings(Mapping[str, Any]):
    """The settings of a cell for a function; knows which have not been read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self.unread = set(values)

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        self.unread.discard(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class _EndedError(BaseException):
    """Ends a function's run; no `except Exception` of its own holds it up."""


def cell_settings(study: Study, cell: Cell, folder: Path) -> CellSettings:
    """What a function gets."""
    own = {long: short for short, long in {**SHORT_NAMES, "lr": study.lr}.items()}
    values = {own.get(name, name): value for name, value in study.settings_of(cell).items()}
    settings: dict[str, Any] = {
        "arm": cell.arm,
        "seed": cell.seed,
        "steps": study.steps,
        "folder": folder / cell.folder,
        **values,
    }
    if study.arm(cell.arm).until is not None:
        settings.setdefault("period", 100)
        settings["stop"] = stop_of(study, cell.arm, settings["period"])
    return CellSettings(settings)


def _call(objective: Objective, study: Study, cell: Cell, folder: Path, progress: Progress | None) -> Outcome | None:
    settings = cell_settings(study, cell, folder)
    points: list[tuple[int, float]] = []
    ended: dict[str, int] = {}
    every = max(1, study.steps // CURVE_POINTS)
    told = 0

    def tell(step: int, loss: float) -> None:
        nonlocal told
        step, loss = int(step), float(loss)
        if points and step <= points[-1][0]:
            raise ValueError(f"progress must be told of rising steps, got {step} after {points[-1][0]}")
        if not math.isfinite(loss):
            ended["diverged_at"] = step
            raise _EndedError
        points.append((step, loss))
        if progress is not None and (step >= told + every or step >= study.steps):
            told = step
            recent = [value for _, value in points[-WINDOW:]]
            if progress(step, sum(recent) / len(recent)) and step < study.steps:
                ended["pruned_at"] = step
                raise _EndedError

    start = perf_counter()
    metrics: float | Mapping[str, float] = math.nan
    with suppress(_EndedError):
        metrics = objective(settings, tell)
    seconds = perf_counter() - start
    if "pruned_at" in ended:
        return None
    if "diverged_at" not in ended:
        _check_read(study, cell, settings.unread)
    if isinstance(metrics, Mapping):
        if study.metric not in metrics:
            rule = f"metric must be one of what {study.program} returns, {sorted(metrics)}"
            raise study.error(f"{rule}, got {study.metric!r}", "metric")
        metrics = metrics[study.metric]
    val_loss = None if "diverged_at" in ended else float(metrics)
    steps = ended.get("diverged_at", study.steps)
    if not points and val_loss is not None and math.isfinite(val_loss):
        points.append((steps, val_loss))
    speed = {"steps": steps, "seconds": seconds, "steps_per_second": steps / max(seconds, 1e-9)}
    return outcome_of(points, val_loss, study.stability, **speed, diverged_at=ended.get("diverged_at"))


def _check_read(study: Study, cell: Cell, unread: set[str]) -> None:
    arm = study.arm(cell.arm)
    only_by_name = arm.callbacks is not None and arm.until is None
    if ignored := sorted(unread - {"folder"} - (set() if only_by_name else {"arm"})):
        rule = f"{study.program} must read all settings of arm {cell.arm}, or they would change nothing"
        raise StudyError(f"{rule}; it has not read {', '.join(ignored)}")
