"""Command line of the recipes: `python -m msign_lightning.recipes.train fit --config tiny/prose --msign.period=20`."""

from __future__ import annotations

from msign_lightning._extras import need

need("recipes", "jsonargparse")

import os
from argparse import ArgumentError
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from msign_lightning import MSignCallback
from msign_lightning.recipes import recipe_file, recipe_names
from msign_lightning.recipes.data import TextDataModule
from msign_lightning.recipes.module import LanguageModel
from msign_lightning.recipes.transformer import Transformer, TransformerConfig
from msign_lightning.settings import RestorationSettings


class FSDP2Strategy(ModelParallelStrategy):
    """Shards over all processes, which by default would be tensor-parallel within a node, and each train by itself.

    `LanguageModel.configure_model` shards.
    """

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2Strategy, override=True)


class RecipeAction(ActionConfigFile):
    """What `--config` does: it takes the name of a recipe as well as a file or text in YAML."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        if not set(values) & set(":{}\n"):  # else the address of a file, or YAML itself
            file = recipe_file(values)
            if not file.exists():
                near = get_close_matches(values, recipe_names()) or recipe_names()
                raise ArgumentError(self, f"must be a recipe or a file, got {values!r}; near names: {', '.join(near)}")
            values = str(file)
        super().__call__(parser, cfg, values, option_string)  # type: ignore[no-untyped-call]


class RecipeCLI(LightningCLI):
    """`LightningCLI` for a `LanguageModel`, a `TextDataModule` and, unless `--use_msign=false`, an `MSignCallback`.

    `--config`, or `-c`, also takes the name of a recipe of this package, such as `tiny/prose`. `--seed_everything`
    seeds the weights and the training windows alike. Unless `--msign.stop` says otherwise, MSign is not applied in the
    last period before `--trainer.max_steps`, so that the final validation sees settled weights.
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

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={lightning.__version__}"])
        parser = LightningArgumentParser(**kwargs)
        text = "Name of a recipe of this package, such as tiny/prose, or path of a file in YAML."
        parser.add_argument("-c", "--config", action=RecipeAction, help=text)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Not the base class's, which warns where a program that has arguments of its own calls `load_recipe`.
        if isinstance(args, (dict, Namespace)):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        msign, max_steps = config["msign"], config["trainer"]["max_steps"]
        if msign["stop"] is None and max_steps > 0:
            first = RestorationSettings(msign["period"], start=msign["start"]).first
            msign["stop"] = max(first, max_steps - msign["period"])
        if self.subcommand in (None, "fit"):
            _check_memory(config)

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


def _check_memory(config: Namespace) -> None:
    """Raises before there is a model if its training can't fit into the memory of a device, or of all that share it.

    In fp32 a parameter takes 16 bytes with its gradient and AdamW's two moments; activations come on top.
    """
    trainer = config["trainer"]
    strategy = str(trainer["strategy"]).lower()
    if "deepspeed" in strategy:  # may keep its state elsewhere
        return
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**config["model"]["config"].as_dict()))
    count = sum(parameter.numel() for parameter in model.parameters())
    device, memory = _memory(trainer["accelerator"])
    if device == "GPU" and any(word in strategy for word in ("fsdp", "modelparallel")):
        memory *= _count_gpus(trainer["devices"]) * trainer["num_nodes"]
    if 16 * count > memory:
        raise ValueError(
            f"{count / 1e9:.2f}G parameters need {16 * count / 2**30:.0f} GiB with gradients and AdamW's state, got "
            f"{memory / 2**30:.0f} GiB of {device} memory: shard them with --trainer.strategy=fsdp2 on more GPUs"
        )


def _count_gpus(devices: Any) -> int:
    """Of each node, by what Lightning's trainer takes for `devices`: a number, "auto", "0,1" or a list."""
    if str(devices) in ("auto", "-1"):
        return torch.cuda.device_count()
    if isinstance(devices, str):
        devices = devices.strip(",").split(",") if "," in devices else int(devices)
    return devices if isinstance(devices, int) else len(devices)


def _memory(accelerator: Any) -> tuple[str, float]:
    """What the parameters must fit into, and how many bytes it has."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "GPU", torch.cuda.get_device_properties(0).total_memory
    known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
    return "CPU", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else float("inf")


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
