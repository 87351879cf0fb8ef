"""Command line of the ablation studies: `python -m msign_lightning.ablations run quick`."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import optuna

from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.runner import FOLDER, describe, plan, results, run, run_alone
from msign_lightning.ablations.storage import StorageError
from msign_lightning.ablations.study import Study, load


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 if cells failed, 2 for errors, 130 for an interruption."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = load(options.study, smoke=options.smoke)
        if options.command == "report":
            print(*_report(study, options), sep="\n")
            return 0
        if options.dry_run:
            print(plan(study, storage=options.storage, folder=options.folder))
            return 0
        if options.cell is not None:
            print(describe(run_alone(study, options.cell, folder=options.folder, legs=options.legs)))
            return 0
        if options.command == "resume":
            results(study, storage=options.storage, folder=options.folder)  # raises if it has not been started
        where = {"storage": options.storage, "folder": options.folder}
        how = {name: getattr(options, name) for name in ("workers", "time_limit", "legs", "launcher")}
        summary = run(study, **how, **where)
        print(f"{summary.done} cells done, {len(summary.failed)} failed; logs in {options.folder / study.name}")
        for label in summary.failed:
            print(f"failed: {label}", file=sys.stderr)
        if results(study, **where):
            print(f"report: {_report(study, options)[0]}")
    except (StudyError, StorageError, ModuleNotFoundError) as error:  # of the extra ray
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = f"python -m msign_lightning.ablations {options.command} {shlex.quote(options.study)}"
        print(f"interrupted; what is finished is kept; go on with: {again}, and the same options", file=sys.stderr)
        return 130
    return 1 if summary.failed else 0


def _report(study: Study, options: argparse.Namespace) -> list[Path]:
    from msign_lightning.ablations.views import report  # which imports Matplotlib

    return report(study, results(study, storage=options.storage, folder=options.folder), options.folder / study.name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m msign_lightning.ablations", description="Ablation studies: from file to frontier."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {
        "run": "train the cells that are not done yet, then report",
        "resume": "the same, for a study that has been started",
        "report": "figures, tables and a web page of what is done",
    }.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("study", help="file of a study, or name of one of this package's, such as quick")
        command.add_argument("--storage", help="URL of a database, or path of an Optuna journal; else in the folder")
        command.add_argument("--folder", type=Path, default=FOLDER, help="where the study's folder is (%(default)s)")
        command.add_argument("--smoke", action="store_true", help="its part smoke instead, under the name STUDY_smoke")
        if name != "report":
            command.add_argument("--workers", type=_count, help="cells trained at once; else one per GPU or core")
            command.add_argument("--time-limit", type=_count, metavar="SECONDS", help="that a cell may take")
            command.add_argument(
                "--legs", type=_count, default=1, help="checkpoints of a cell, less one, to go on from"
            )
            command.add_argument("--launcher", choices=("local", "ray"), default="local", help="where (%(default)s)")
            command.add_argument("--dry-run", action="store_true", help="only show the cells, and how long they take")
            text = "train only this one, in this process, and write outcome.json to its folder: a key or a number"
            command.add_argument("--cell", help=text)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
