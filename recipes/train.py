"""Command line of the recipes: `python -m msign_lightning.recipes.train fit --config tiny/prose --msign.period=20`."""

from __future__ import annotations

from msign_lightning._extras import need

need("recipes", "jsonargparse")

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from msign_lightning import MSignCallback
from msign_lightning.recipes.data import TextDataModule
from msign_lightning.recipes.module import LanguageModel


class RecipeCLI(LightningCLI):
    """`LightningCLI` for a `LanguageModel`, a `TextDataModule` and, unless `--use_msign=false`, an `MSignCallback`.

    `--config` also takes the name of a recipe of this package, such as `tiny/prose`. `--seed_everything` seeds the
    weights and the training windows alike.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            LanguageModel,
            TextDataModule,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--use_msign", type=bool, default=True, help="False trains without MSign, as a baseline.")
        parser.add_lightning_class_args(MSignCallback, "msign")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("model.config.vocab_size", "data.vocab_size")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        arguments: list[str] = sys.argv[1:] if args is None else list(args)
        follows_config = [False, *(argument == "--config" for argument in arguments)]
        self.config = parser.parse_args(
            [
                _with_recipe_path(argument) if named or argument.startswith("--config=") else argument
                for argument, named in zip(arguments, follows_config, strict=False)
            ]
        )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        _check_writable(trainer.default_root_dir)
        if not self._get(self.config, "use_msign"):
            callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
            callbacks[:] = [callback for callback in callbacks if not isinstance(callback, MSignCallback)]
        return trainer


def _check_writable(folder: str) -> None:
    """Raises before anything is trained if a local folder for logs and checkpoints could not be made or written to."""
    path = Path(folder).absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    if "://" not in folder and not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"trainer.default_root_dir must be a folder that can be written to, got {folder!r}")


def _with_recipe_path(argument: str) -> str:
    """The argument itself, or the file of the recipe that it, or the part after "=", names."""
    option, equals, value = argument.rpartition("=")
    recipe = Path(__file__).parent / f"{value}.yaml"
    return f"{option}{equals}{recipe}" if recipe.is_file() else argument


def load_recipe(name: str, *arguments: str, callbacks: Sequence[pl.Callback] = ()) -> RecipeCLI:
    """Builds the model, data and trainer of a recipe, from Python; nothing is written to disk before the trainer fits.

    Example::

        recipe = load_recipe("tiny/prose", "--use_msign=false", "--model.optimizer.lr=0.03", "--seed_everything=1")
        recipe.trainer.fit(recipe.model, recipe.datamodule)

    Args:
        name: Name of a recipe of this package, such as "tiny/prose", or the path of its YAML file.
        arguments: Arguments as on the command line, without `fit`.
        callbacks: Callbacks for the trainer besides the recipe's.

    Returns:
        An object with `model`, `datamodule`, `trainer` and the parsed `config`.
    """
    return RecipeCLI(
        args=["--config", name, *arguments],
        run=False,
        save_config_callback=None,
        trainer_defaults={"callbacks": list(callbacks)},
    )


if __name__ == "__main__":
    RecipeCLI()
