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

import math
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from time import perf_counter
from typing import Any

from msign_lightning.ablations.cell import CURVE_POINTS, WINDOW, Cell, Criterion, Outcome, find_collapse, smooth
from msign_lightning.ablations.methods import MSIGN
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.study import SHORT_NAMES, Study
from msign_lightning.collapse import CollapseDetector

Progress = Callable[[int, float], bool]
"""Step, smoothed training loss → whether to stop."""


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
    """
    program = find(study)
    if program is None or isinstance(program, type):
        from msign_lightning.ablations.training import train

        return train(study, cell, folder, progress, legs)
    return _call(program, study, cell, folder, progress)


def check(study: Study) -> None:
    """Builds the program of each arm and each factor's value, so that a wrong setting fails at the start.

    Raises:
        StudyError: The program can't be built, or its data can't be read.
    """
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
    try:
        program = resolve_name(study.program)
    except (ImportError, AttributeError) as error:
        raise study.error(f"program must be package.module:name, got {study.program!r}: {error}", "program") from error
    if not callable(program):
        raise study.error(f"program must be a class or function, got {program!r}", "program")
    return program


def metric_of(study: Study, metrics: Mapping[str, Any], giver: str) -> float:
    """The study's metric among what the program gave.

    Raises:
        StudyError: It is not there.
    """
    if study.metric not in metrics:
        rule = f"metric must be one of what {giver}, {sorted(metrics)}, got {study.metric!r}"
        raise study.error(rule, "metric")
    return float(metrics[study.metric])


def outcome_of(
    points: Sequence[tuple[int, float]],
    val_loss: float | None,
    criterion: Criterion,
    *,
    diverged_at: int | None = None,
    ranks: Sequence[tuple[int, float]] = (),
    steps: int,
    **known: Any,
) -> Outcome:
    """The outcome of a run: from step and training loss up to a divergence, the validation loss, and what is `known`.

    Raises:
        ValueError: There are no points.
    """
    if not points:
        raise ValueError("the loss of the first step must be finite, whatever the learning rate: got none")
    if val_loss is None or not math.isfinite(val_loss):
        diverged_at, val_loss = diverged_at or steps, None
    numbers, losses = zip(*points, strict=True)
    smoothed = smooth(losses)
    collapse = find_collapse(smoothed, criterion.delta)
    last = len(smoothed) - 1
    return Outcome(
        val_loss=val_loss,
        initial_loss=losses[0],
        best_loss=min(smoothed),
        final_loss=None if diverged_at is not None else smoothed[-1],
        diverged_at=diverged_at,
        collapsed_at=diverged_at if collapse is None else numbers[collapse],
        spikes=count_spikes(losses, criterion.spike),
        max_grad_norm=known.pop("max_grad_norm", None),
        stable_rank=ranks[-1][1] if ranks and diverged_at is None else None,
        steps=steps,
        curve=tuple((numbers[i], smoothed[i]) for i in (*range(0, last, last // CURVE_POINTS + 1), last)),
        ranks=tuple(ranks),
        **known,
    )


def count_spikes(losses: Sequence[float], spike: float) -> int:
    """Number of "loss_spike" alarms of a `CollapseDetector` with this threshold."""
    detector = CollapseDetector(spike=spike, z_score=None, stall=None)
    return sum(len(detector.update(step, loss=loss)) for step, loss in enumerate(losses, start=1))


# --- functions ---------------------------------------------------------------------------------------------------


class CellSettings(UserDict[str, Any]):
    """The settings of a cell for a function; knows which have not been read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.unread = set(values)

    def __getitem__(self, name: str) -> Any:
        self.unread.discard(name)
        return super().__getitem__(name)


def cell_settings(study: Study, cell: Cell, folder: Path) -> CellSettings:
    """What a function gets."""
    own = {long: short for short, long in {**SHORT_NAMES, "lr": study.lr}.items()}
    settings: dict[str, Any] = dict(arm=cell.arm, seed=cell.seed, steps=study.steps, folder=folder / cell.folder)
    settings |= {own.get(name, name): value for name, value in study.settings_of(cell).items()}
    if study.arm(cell.arm).until is not None:
        settings.setdefault("period", 100)
        settings["stop"] = study.stop(cell.arm, settings["period"])
    return CellSettings(settings)


class _EndedError(BaseException):
    """Ends the training of a function; no `except Exception` of its own holds it up."""


def _call(objective: Any, study: Study, cell: Cell, folder: Path, progress: Progress | None) -> Outcome | None:
    settings = cell_settings(study, cell, folder)
    points: list[tuple[int, float]] = []
    every = max(1, study.steps // CURVE_POINTS)
    told, pruned = 0, False
    diverged_at: int | None = None

    def tell(step: int, loss: float) -> None:
        nonlocal told, diverged_at, pruned
        step, loss = int(step), float(loss)
        if points and step <= points[-1][0]:
            raise ValueError(f"progress must be told of rising steps, got {step} after {points[-1][0]}")
        if not math.isfinite(loss):
            diverged_at = step
            raise _EndedError
        points.append((step, loss))
        if progress is not None and (step >= told + every or step >= study.steps):
            told = step
            recent = [value for _, value in points[-WINDOW:]]
            pruned = progress(step, sum(recent) / len(recent)) and step < study.steps
            if pruned:
                raise _EndedError

    start = perf_counter()
    metrics: Any = None
    with suppress(_EndedError):
        metrics = objective(settings, tell)
    seconds = perf_counter() - start
    if pruned:
        return None
    val_loss = None
    if diverged_at is None:
        _check_read(study, cell, settings.unread)
        is_mapping = isinstance(metrics, Mapping)
        val_loss = metric_of(study, metrics, f"{study.program} returns") if is_mapping else float(metrics)
    steps = diverged_at or study.steps
    if not points and val_loss is not None and math.isfinite(val_loss):
        points.append((steps, val_loss))
    speed: dict[str, Any] = {"seconds": seconds, "steps_per_second": steps / max(seconds, 1e-9)}
    return outcome_of(points, val_loss, study.stability, steps=steps, diverged_at=diverged_at, **speed)


def _check_read(study: Study, cell: Cell, unread: set[str]) -> None:
    arm = study.arm(cell.arm)
    is_known_by_name = arm.callback not in (None, MSIGN)
    if ignored := sorted(unread - {"folder"} - (set() if is_known_by_name else {"arm"})):
        rule = f"{study.program} must read all settings of arm {cell.arm}, or they would change nothing"
        raise StudyError(f"{rule}; it has not read {', '.join(ignored)}")
