"""How many more cells of a study two workers train than one, in the same time on two cores.

`python -m benchmarks.workers` runs the same small grid with one worker and with two, in turns, and prints the
throughput of each round and their ratio. Throughput is counted from the start of the first cell to the end of the last,
as Optuna's storage has them: the seconds that workers take to start are in a column of their own.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import optuna
from optuna.trial import TrialState

from benchmarks.common import keep
from msign_lightning.ablations.ledger import find
from msign_lightning.ablations.runner import cores, run
from msign_lightning.ablations.storage import reading
from msign_lightning.ablations.study import Study
from msign_lightning.recipes.provenance import provenance


class Timing(NamedTuple):
    """Of one run of the study."""

    cells_per_minute: float
    start_up: float


def grid(cells: int, steps: int) -> Study:
    """A study of so many equal cells."""
    return Study(
        name="workers",
        program="tiny/prose",
        steps=steps,
        arms=["msign"],
        factors={"lr": [0.01]},
        seeds=list(range(cells)),
    )


def measure(study: Study, workers: int) -> Timing:
    """Runs the study in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        summary = run(study, workers=workers, folder=Path(folder))
        if summary.failed:
            raise RuntimeError(f"cells of the benchmark failed: {summary.failed}")
        with reading(None, Path(folder) / study.name) as backend:
            trials = find(study, backend).get_trials(states=(TrialState.COMPLETE,))
    starts = [trial.datetime_start.timestamp() for trial in trials if trial.datetime_start is not None]
    ends = [trial.datetime_complete.timestamp() for trial in trials if trial.datetime_complete is not None]
    return Timing(60 * len(trials) / (max(ends) - min(starts)), min(starts) - began)


def main(cells: int, steps: int, rounds: int, folder: Path) -> None:
    """Prints the table and keeps it with date, device and versions."""
    for name, value in (("cells", cells), ("steps", steps), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = grid(cells, steps)
    lines, ratios = [], []
    for i in range(1, rounds + 1):
        one, two = measure(study, 1), measure(study, 2)
        ratios.append(two.cells_per_minute / one.cells_per_minute)
        measured = f"| {one.cells_per_minute:.2f} | {two.cells_per_minute:.2f} | {ratios[-1]:.2f} "
        lines.append(f"| {i} {measured}| {one.start_up:.1f} | {two.start_up:.1f} |")
        print(lines[-1], flush=True)
        hardware = f"{platform.machine()} CPU"
    report = "\n".join(
        [
            f"# Throughput of two workers against one on {cores()} cores, {hardware}",
            "",
            f"`python -m benchmarks.workers --cells {cells} --steps {steps} --rounds {rounds}`: {provenance()}.",
            f"{cells} cells of {steps} steps of tiny/prose with MSign; one and two workers take turns.",
            "",
            "| round | one worker, cells/min | two workers, cells/min | ratio | start-up of one, s | of two, s |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
            f"Median ratio: {statistics.median(ratios):.2f}",
            "",
        ]
    )
    keep(report, folder, "workers", hardware)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=8, help="cells of the study; an even number fills two workers")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each cell")
    parser.add_argument("--rounds", type=int, default=3, help="how often one and two workers take turns")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"), help="where the report goes")
    main(**vars(parser.parse_args()))
