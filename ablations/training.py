"""Cells of a program under Lightning: a recipe of this package, or anybody's `LightningCLI` by class or by file."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch.distributed import is_torchelastic_launched

from msign_lightning import Restoration
from msign_lightning.ablations import program as programs
from msign_lightning.ablations.cell import Cell, Outcome, plain
from msign_lightning.ablations.launch import spread
from msign_lightning.ablations.methods import Value
from msign_lightning.ablations.program import Progress, metric_of, outcome_of
from msign_lightning.ablations.reader import StudyError, Where, near
from msign_lightning.ablations.study import Study
from msign_lightning.recipes import recipe_file
from msign_lightning.recipes.recorder import Recorder
from msign_lightning.recipes.train import RecipeCLI
from msign_lightning.settings import RestorationSettings

FRILLS = (Checkpoint, ProgressBar, ModelSummary)
"""Callbacks that a cell does without."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning says what it finds on the machine whenever a trainer is made."""
    with ExitStack() as stack:
        for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.WARNING)
        yield


@_quiet()
def train(study: Study, cell: Cell, folder: Path, progress: Progress | None = None, legs: int = 1) -> Outcome | None:
    """Trains one run on one thread: see `ablations.program.run_cell`.

    Nothing is restored in the last period before the validation. Scalars for TensorBoard go to folder / cell.folder, in
    place of those of an earlier try, unless that has finished a leg.
    """
    torch.set_num_threads(1)
    recorder = Recorder(progress=progress)
    cli = _build(study, cell, folder)
    if (devices := cli.trainer.num_devices) != _ranks():
        vars(cli).clear()  # its parser outlives it, and would hold the model
        return spread(devices, study, cell, folder, legs, progress)
    trainer, data = cli.trainer, cli.datamodule
    trainer.logger = _Scalars(folder, cell.folder, version="")
    log_dir = Path(trainer.logger.log_dir)
    saver = _Leg(study, cell, log_dir, legs, recorder)
    trainer.callbacks[:] = [recorder, *trainer.callbacks, *([saver] if legs > 1 else [])]  # type: ignore[attr-defined]
    begun = legs > 1 and saver.file.exists()
    for file in [] if begun or not trainer.is_global_zero else log_dir.glob("events.out.tfevents.*"):
        file.unlink()
    limit, trainer.limit_val_batches = trainer.limit_val_batches, 0
    trainer.fit(cli.model, datamodule=data, ckpt_path=saver.file if begun else None)
    outcome = None
    if not recorder.stopped:
        trainer.limit_val_batches = limit
        outcome = outcome_of(
            [*enumerate(recorder.losses, start=1)],
            _validate(study, cli) if recorder.diverged_at is None else None,
            study.stability,
            diverged_at=recorder.diverged_at,
            max_grad_norm=max(filter(math.isfinite, recorder.grad_norms), default=None),
            ranks=[*recorder.stable_ranks.items()],
            steps=recorder.steps,
            steps_per_second=recorder.steps_per_second,
            seconds=recorder.seconds,
        )
    if trainer.is_global_zero and saver.file.exists():
        shutil.rmtree(saver.file) if saver.file.is_dir() else saver.file.unlink()
    return outcome


class _Scalars(TensorBoardLogger):
    """Leaves out the epoch, which Lightning adds to all that is logged."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


class _Leg(pl.Callback):
    """Saves a checkpoint at the end of each leg of a run but the last; each in place of the one before."""

    def __init__(self, study: Study, cell: Cell, folder: Path, legs: int, recorder: Recorder) -> None:
        meaning = {**study.fingerprint(), "settings": plain(study.settings_of(cell))}
        own = [meaning[name] for name in ("program", "steps", "settings", "lr")]  # whatever else the study holds
        self.file = folder / f"leg-{hashlib.sha256(json.dumps(own).encode()).hexdigest()[:8]}.ckpt"
        self._every = -(-study.steps // legs)
        self._saved = 0
        self._recorder = recorder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:  # a folder that was left unfinished could not be written to
            shutil.rmtree(self.file.with_suffix(".part"), ignore_errors=True)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step % self._every == 0 and self._saved < step < trainer.max_steps and not trainer.should_stop:
            self._recorder.average(trainer)
            unfinished = self.file.with_suffix(".part")
            trainer.save_checkpoint(unfinished)
            if trainer.is_global_zero:
                if self.file.is_dir():  # which can't be replaced
                    shutil.rmtree(self.file)
                unfinished.replace(self.file)
            self._saved = step


def _ranks() -> int:
    """How many processes train together with this one."""
    return int(os.environ["WORLD_SIZE"]) if is_torchelastic_launched() else 1


def _validate(study: Study, cli: LightningCLI) -> float:
    """The metric, a mean over the ranks."""
    found = cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    own = metric_of(study, {k: v for metrics in found for k, v in metrics.items()}, "validation_step logs")
    strategy = cli.trainer.strategy
    return own if _ranks() == 1 else float(strategy.reduce(torch.tensor(own, device=strategy.root_device)))


@_quiet()
def check(study: Study) -> None:
    """Builds the program of each arm and each factor's value, and trains and validates one batch of the first.

    Raises:
        StudyError: The program can't be built, its data can't be read, or an arm does not fit its model.
    """
    checked: set[object] = set()
    numbers = set()
    for group in study.groups:
        parts = {group.arm, *group.factors}
        if parts <= checked:
            continue
        lr = study.factors["lr"][0] if "lr" in study.factors else study.sampler.low  # type: ignore[union-attr]
        cell = group.cell(lr, study.seeds[0])  # type: ignore[arg-type]
        try:
            cli = _build(study, cell)
            numbers.add(number := cli.trainer.num_devices)
            if number != _ranks():
                continue
            if not cli.trainer.limit_val_batches:
                raise ValueError("trainer.limit_val_batches must let a batch be validated, got 0")
            for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
                callback.setup(cli.trainer, cli.model, "fit")
            if study.arm(group.arm).until is not None:
                Restoration(cli.model, **_msign_arguments(study, cell, cli))
            if cli.datamodule is not None and (data := str(cli.config.get("data"))) not in checked:
                cli.datamodule.setup("fit")
                checked.add(data)
            if not checked & set(study.arms):
                cli = _build(study, cell, steps=1)
                cli.trainer.limit_val_batches = 1
                cli.trainer.fit(cli.model, datamodule=cli.datamodule)
                _validate(study, cli)
        except StudyError:  # which says where
            raise
        except (ValueError, TypeError, ImportError, OSError, MisconfigurationException) as error:
            raise study.error(f"{group.label}: {error}", *_place(study, group.arm, str(error))) from error
        checked |= parts
    for number in numbers - {_ranks()} if _ranks() == 1 else ():
        spread(number, study, None, Path())


def _build(study: Study, cell: Cell, folder: Path = Path(), *, steps: int | None = None) -> LightningCLI:
    """The model, data and trainer of a cell, with its arm's callbacks.

    Raises:
        ValueError: The program does not take a setting.
    """
    cls, files = _find(study, study.settings_of(cell).get("config"))
    is_recipe = issubclass(cls, RecipeCLI)
    settings: dict[str, Any] = {
        "seed_everything": cell.seed,
        "trainer.max_steps": steps or study.steps,
        "trainer.max_epochs": -1,
        "trainer.default_root_dir": str(folder),
        "trainer.logger": False,
        **({"use_msign": False} if is_recipe else {}),
        **study.settings_of(cell),
    }
    given = [name for name in settings if name != "config" and (is_recipe or not name.startswith("msign."))]
    given.sort(key=lambda name: name.count("."))  # a class must come before its own arguments
    texts = {name: value if isinstance(value, str) else json.dumps(plain(value)) for name, value in settings.items()}
    arguments = [*(f"--config={file}" for file in files), *(f"--{name}={texts[name]}" for name in given)]

    class Program(cls):  # type: ignore[valid-type, misc]
        def init_parser(self, **kwargs: Any) -> Any:
            return super().init_parser(**{**kwargs, "exit_on_error": False})

        def add_core_arguments_to_parser(self, parser: Any) -> None:
            # Else all that the machine has.
            self.trainer_defaults: dict[str, Any] = {"devices": 1, **self.trainer_defaults}
            super().add_core_arguments_to_parser(parser)

        def parse_arguments(self, parser: Any, args: Any) -> None:
            try:
                self.config = parser.parse_args(args)
            except (ArgumentError, TypeError, KeyError) as error:
                known: list[str] = []
                with suppress(ArgumentError, TypeError, KeyError):  # of the file, which may be what is wrong
                    base = parser.parse_path(str(files[0])) if files else parser.get_defaults()
                    known = [name.replace(".init_args.", ".") for name in base.keys()]  # noqa: SIM118 (leaves)
                hints = [near(name, known) for name in sorted(given) if name not in known]
                told = " ".join(str(error).split()) + next(filter(None, hints), "")
                raise ValueError(f"{study.program} can't be built: {told}") from error

    cli = Program(args=arguments, run=False, save_config_callback=None)
    if cli.trainer.num_nodes > 1:
        raise ValueError(f"trainer.num_nodes must be 1, since a cell is trained on one, got {cli.trainer.num_nodes}")
    strategy = cli.trainer.strategy
    is_known = isinstance(strategy, (DDPStrategy, ModelParallelStrategy))
    if cli.trainer.num_devices > 1 and (not is_known or isinstance(strategy.launcher, _MultiProcessingLauncher)):
        rule = "trainer.strategy must be ddp or a ModelParallelStrategy such as fsdp2 for several devices"
        raise ValueError(f"{rule}, got {type(strategy).__name__}")
    kept = [callback for callback in cli.trainer.callbacks if not isinstance(callback, FRILLS)]
    arm = study.arm(cell.arm)
    msign = {} if arm.until is None else _msign_arguments(study, cell, cli)
    cli.trainer.callbacks = [*kept, *arm.callbacks(**msign)]
    if not is_recipe:  # whose data have a generator of their own
        pl.seed_everything(cell.seed, verbose=False)
    return cli


def _find(study: Study, config: Value | None) -> tuple[type[LightningCLI], list[Path]]:
    """The class of the command line, and the files with its configuration, of which a later one goes before."""
    cls = programs.find(study)
    files = [] if config is None else [recipe_file(str(config))]
    if cls is None:
        model = study.fingerprint()["program"]["file"].get("model")
        cls = LightningCLI if isinstance(model, dict) and "class_path" in model else RecipeCLI
        files.insert(0, recipe_file(study.program))
    if not issubclass(cls, LightningCLI):
        raise study.error(f"program must be a LightningCLI or a function, got the class {cls.__name__}", "program")
    return cls, files


def _msign_arguments(study: Study, cell: Cell, cli: LightningCLI) -> dict[str, Any]:
    """The arguments of an `MSignCallback`, with the last step at which it restores."""
    if isinstance(cli, RecipeCLI):
        arguments: dict[str, Any] = cli.config.msign.as_dict()
    else:
        settings = study.settings_of(cell)
        arguments = {name[6:]: value for name, value in settings.items() if name.startswith("msign.")}
    period = arguments.setdefault("period", RestorationSettings().period)
    return {**arguments, "stop": study.stop(cell.arm, period)}


def _place(study: Study, arm: str, message: str) -> Where:
    """Where in the study file an error of the program most likely comes from."""
    for part, names in (("factors", study.factors), ("settings", study.settings)):
        for name in names:
            if study.setting_of(name) in message:
                return part, name
    return "arms", list(study.arms).index(arm)
