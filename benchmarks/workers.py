"""How many more cells of a study two workers train than one, and what the harness itself takes for a cell.

`python -m benchmarks.workers` runs the same small grid with one worker and with two, in turns, and prints the
throughput of each round and their ratio. Throughput is counted from the start of the first cell to the end of the last,
as Optuna's storage has them: the seconds that workers take to start are in a column of their own.

Then it runs a grid of cells that train nothing, whose time is all the harness's.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.trial import TrialState

from benchmarks.common import keep, table
from msign_lightning.ablations.ledger import find
from msign_lightning.ablations.runner import cores, run
from msign_lightning.ablations.storage import reading
from msign_lightning.ablations.study import Study
from msign_lightning.recipes.provenance import provenance


class Timing(NamedTuple):
    """Of one run of the study."""

    cells_per_minute: float
    start_up: float


def nothing(settings: Mapping[str, Any], progress: Callable[[int, float], None]) -> float:
    """A program that trains nothing."""
    progress(settings["steps"], 1.0 + settings["lr"] + settings["seed"])
    return 1.0


def grid(program: str, arm: str, cells: int, steps: int) -> Study:
    """A study of so many equal cells."""
    factors = {"lr": [0.01]}
    return Study(name="workers", program=program, steps=steps, arms=[arm], factors=factors, seeds=range(cells))


def trained(study: Study, workers: int) -> list[tuple[float, float]]:
    """Runs the study in a new folder; when each cell began and ended, in order."""
    with tempfile.TemporaryDirectory() as folder:
        summary = run(study, workers=workers, folder=Path(folder))
        if summary.failed:
            raise RuntimeError(f"cells of the benchmark failed: {summary.failed}")
        with reading(None, Path(folder) / study.name) as backend:
            trials = find(study, backend).get_trials(states=(TrialState.COMPLETE,))
    times = [(trial.datetime_start, trial.datetime_complete) for trial in trials]
    return [(began.timestamp(), ended.timestamp()) for began, ended in times if began and ended]


def measure(study: Study, workers: int) -> Timing:
    """How fast a study goes."""
    began = time.time()
    starts, ends = zip(*trained(study, workers), strict=True)
    return Timing(60 * len(starts) / (max(ends) - min(starts)), min(starts) - began)


def overheads(cells: int) -> list[tuple[str, str]]:
    """Milliseconds for each cell that trains nothing, with one worker, in ranges of cells."""
    ends = [ended for _, ended in trained(grid("benchmarks.workers:nothing", "adamw", cells, 20), 1)]
    edges = [n for n in (0, 100, 1000, 2000, 3000) if n < cells] + [cells]
    return [
        (f"{a + 1:,} to {b:,}", f"{1000 * statistics.median(later - end for end, later in pairwise(ends[a:b])):.1f}")
        for a, b in pairwise(edges)
        if b - a > 1
    ]


def main(cells: int, steps: int, rounds: int, empty: int, folder: Path) -> None:
    """Prints the tables and keeps them with date, device and versions."""
    for name, value in (("cells", cells), ("steps", steps), ("rounds", rounds), ("empty", empty)):
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = grid("tiny/prose", "msign", cells, steps)
    hardware = f"{platform.machine()} CPU"
    rows, ratios = [], []
    for i in range(1, rounds + 1):
        one, two = measure(study, 1), measure(study, 2)
        ratios.append(two.cells_per_minute / one.cells_per_minute)
        rows.append([i, *(f"{x:.2f}" for x in (one.cells_per_minute, two.cells_per_minute, ratios[-1]))])
        rows[-1] += [f"{one.start_up:.1f}", f"{two.start_up:.1f}"]
        print(rows[-1], flush=True)
    head = ["round", "one worker, cells/min", "two workers, cells/min", "ratio", "start-up of one, s", "of two, s"]
    report = "\n".join(
        [
            f"# Throughput of two workers against one on {cores()} cores, {hardware}",
            "",
            f"`python -m benchmarks.workers --cells {cells} --steps {steps} --rounds {rounds} --empty {empty}`: "
            f"{provenance()}.",
            f"{cells} cells of {steps} steps of tiny/prose with MSign; one and two workers take turns.",
            "",
            table(head, rows),
            "",
            f"Median ratio: {statistics.median(ratios):.2f}",
            "",
            f"What the harness takes for a cell: {empty:,} cells that train nothing, one worker, a journal.",
            "",
            table(["cells", "median ms a cell"], overheads(empty)),
            "",
        ]
    )
    keep(report, folder, "workers", hardware)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=8, help="cells of the study; an even number fills two workers")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each cell")
    parser.add_argument("--rounds", type=int, default=3, help="how often one and two workers take turns")
    parser.add_argument("--empty", type=int, default=3000, help="cells that train nothing")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"), help="where the report goes")
    main(**vars(parser.parse_args()))
