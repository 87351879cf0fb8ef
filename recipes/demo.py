"""The demo: AdamW at a good and at a too high learning rate, with and without MSign, on real text.

`python -m msign_lightning.recipes.demo` trains the tiny recipe (recipes/tiny/prose.yaml) in thirty short runs, spread
over the processor's cores, and writes to runs/demo: TensorBoard logs, the figure demo.png, the table demo.md and
results.jsonl.
"""

from __future__ import annotations

from msign_lightning._extras import need

need("ablations", "matplotlib", "tqdm")

import json
import logging
import math
import multiprocessing
import os
import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import lightning.pytorch as pl
import matplotlib
import numpy as np
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import TensorBoardLogger
from torch.optim import AdamW
from tqdm import tqdm

from msign_lightning import MSignCallback
from msign_lightning.recipes.data import TextDataModule
from msign_lightning.recipes.module import LanguageModel
from msign_lightning.recipes.provenance import provenance
from msign_lightning.recipes.recorder import Recorder

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PERIOD = 20
ARMS: dict[str, dict[str, Any] | None] = {
    "AdamW": None,
    "MSign, attention": {"targets": "attention"},
    "MSign, all 2-D": {"targets": "all_2d"},
    "MSign, MLP only": {"targets": "mlp"},
    "cap, all 2-D": {"targets": "all_2d", "rule": "cap"},
}
GOOD_LR, HIGH_LR = 3e-3, 3e-2
BASELINE = next(iter(ARMS))


class Setting(NamedTuple):
    """What one run is: an arm's name, its peak learning rate, and the seed of initialisation and data."""

    arm: str
    lr: float
    seed: int


class Result(NamedTuple):
    """What a run gave.

    Losses are in nats per byte: `val_loss` after the last step, `losses` the training loss averaged over the `PERIOD`
    steps before each of `steps`. `stable_ranks` are geometric means over the attention matrices at those steps, which
    stand right before an application.
    """

    setting: Setting
    val_loss: float
    steps: list[int]
    losses: list[float]
    stable_ranks: list[float]


def train(setting: Setting, steps: int, folder: Path) -> Result:
    """Trains one run to its end under a Lightning trainer."""
    torch.manual_seed(setting.seed)
    module = LanguageModel(optimizer=partial(AdamW, lr=setting.lr, weight_decay=0.1, fused=True))
    recorder = Recorder(PERIOD)
    callbacks: list[pl.Callback] = [recorder]
    msign = ARMS[setting.arm]
    if msign is not None:
        # The loss is disturbed for some steps after an application: none falls on the last ones.
        callbacks.append(MSignCallback(period=PERIOD, stop=steps - PERIOD, **msign))
    logger = TensorBoardLogger(folder, f"{setting.arm} lr={setting.lr:g}", f"seed={setting.seed}")
    shutil.rmtree(logger.log_dir, ignore_errors=True)  # of an earlier demo: TensorBoard would draw both as one
    trainer = pl.Trainer(
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=logger,
        log_every_n_steps=PERIOD,
        accelerator="cpu",
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TextDataModule(seed=setting.seed)
    trainer.fit(module, data)
    trainer.limit_val_batches = 1.0
    (validation,) = trainer.validate(module, data, verbose=False)
    ranks = {step: rank for step, rank in recorder.stable_ranks.items() if (step + 1) % PERIOD == 0}
    losses = [mean(recorder.losses[max(0, step - PERIOD) : step]) for step in ranks]
    val_loss = math.nan if recorder.diverged_at is not None else validation["loss/val"]
    return Result(setting, val_loss, [*ranks], losses, [*ranks.values()])


def _start_worker() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def train_all(settings: Sequence[Setting], steps: int, workers: int, folder: Path) -> list[Result]:
    """Trains all runs in parallel processes; each result is on disk as soon as its run has ended.

    Raises:
        RuntimeError: A run failed; the others have been finished.
    """
    results: dict[Setting, Result] = {}
    errors: list[BaseException] = []
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, _start_worker) as pool,
        (folder / "results.jsonl").open("w") as file,
        tqdm(
            total=len(settings), unit="run", desc=f"{len(settings)} runs of {steps} steps, {workers} at a time"
        ) as progress,
    ):
        futures = [pool.submit(train, setting, steps, folder) for setting in settings]
        for future in as_completed(futures):
            if (error := future.exception()) is not None:
                errors.append(error)
                continue
            result = future.result()
            results[result.setting] = result
            print(json.dumps(result._asdict() | {"setting": result.setting._asdict()}), file=file, flush=True)
            progress.set_postfix_str(f"{result.setting.arm}, lr {result.setting.lr:g}: {result.val_loss:.3f}")
            progress.update()
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(settings)} runs failed, {file.name} has the others") from errors[0]
    return [results[setting] for setting in settings]


def of(results: Sequence[Result], arm: str, lr: float) -> list[Result]:
    """The results of one arm at one learning rate, by seed."""
    return sorted((r for r in results if r.setting.arm == arm and r.setting.lr == lr), key=lambda r: r.setting.seed)


def draw(results: Sequence[Result], file: Path) -> None:
    """Loss and stable rank over steps: a line per arm for the mean over seeds, a band from lowest to highest."""
    rates = sorted({r.setting.lr for r in results})
    figure, axes = plt.subplots(2, len(rates), figsize=(10, 7), sharex=True, sharey="row", squeeze=False)
    for (top, bottom), lr in zip(axes.T, rates, strict=True):
        for color, arm in enumerate(ARMS):
            arm_results = of(results, arm, lr)
            for ax, field in ((top, "losses"), (bottom, "stable_ranks")):
                values_ST = np.array([getattr(r, field) for r in arm_results])
                if field == "losses":  # a running mean over five points, for the eye
                    values_ST = np.array([np.convolve(v, np.ones(5) / 5, "valid") for v in values_ST])
                steps_T = arm_results[0].steps[-values_ST.shape[1] :]
                ax.plot(steps_T, values_ST.mean(0), label=arm, color=f"C{color}")
                ax.fill_between(steps_T, values_ST.min(0), values_ST.max(0), color=f"C{color}", alpha=0.2, linewidth=0)
        top.set_title(f"peak learning rate {lr:g}")
        bottom.set_xlabel("optimizer steps")
        bottom.set_yscale("log", base=2)
        bottom.yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("training loss (nats per byte)")
    axes[0, 0].set_ylim(top=min(3.2, max(max(r.losses) for r in results)))
    axes[1, 0].set_ylabel("stable rank of attention matrices")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def tabulate(results: Sequence[Result]) -> str:
    """Markdown table of the validation loss by seed, its mean, the paired difference to AdamW, and the stable rank."""
    lines = [
        "| learning rate | arm | validation loss by seed | mean | paired difference to AdamW (lowest … highest) "
        "| stable rank at the end |",
        "|---|---|---|---|---|---|",
    ]
    for lr in sorted({r.setting.lr for r in results}):
        for arm in ARMS:
            arm_results = of(results, arm, lr)
            losses = [r.val_loss for r in arm_results]
            differences = _differences(results, arm, lr)
            difference = (
                ""
                if arm == BASELINE
                else f"{mean(differences):+.3f} ({min(differences):+.3f} … {max(differences):+.3f})"
            )
            lines.append(
                f"| {lr:g} | {arm} | {' / '.join(f'{loss:.3f}' for loss in losses)} | {mean(losses):.3f} "
                f"| {difference} | {_final_rank(arm_results):.1f} |"
            )
    return "\n".join(lines)


def summarize(results: Sequence[Result]) -> str:
    """One paragraph that says what the runs show, whatever it is."""
    low, high = (mean(r.val_loss for r in of(results, BASELINE, lr)) for lr in (GOOD_LR, HIGH_LR))
    ranks = [_final_rank(of(results, BASELINE, lr)) for lr in (GOOD_LR, HIGH_LR)]
    seeds = len(of(results, BASELINE, GOOD_LR))
    sentences = [
        f"Over {seeds} seed{'s' * (seeds != 1)}, {BASELINE} ends at a validation loss of {low:.3f} nats per byte with "
        f"learning rate {GOOD_LR:g} and at {high:.3f} with {HIGH_LR:g}; its attention matrices end at a stable rank of "
        f"{ranks[0]:.1f} and {ranks[1]:.1f}."
    ]
    for lr in (GOOD_LR, HIGH_LR):
        verdicts = []
        for arm in list(ARMS)[1:]:
            differences = _differences(results, arm, lr)
            diverged = sum(not math.isfinite(r.val_loss) for r in of(results, arm, lr))
            if diverged or any(not math.isfinite(r.val_loss) for r in of(results, BASELINE, lr)):
                verdicts.append(f"{arm} not comparable (diverged on {diverged} of {seeds} seeds)")
                continue
            if max(differences) < 0:
                verdict = "better on every seed"
            elif min(differences) > 0:
                verdict = "worse on every seed"
            else:
                verdict = "not on one side of it on every seed"
            verdicts.append(f"{arm} by {mean(differences):+.3f} ({verdict})")
        sentences.append(f"At {lr:g} the arms differ from it thus: {'; '.join(verdicts)}.")
    return " ".join(sentences)


def _differences(results: Sequence[Result], arm: str, lr: float) -> list[float]:
    """Validation loss minus that of AdamW with the same seed, which sees the same data from the same start."""
    pairs = zip(of(results, arm, lr), of(results, BASELINE, lr), strict=True)
    return [ours.val_loss - theirs.val_loss for ours, theirs in pairs]


def _final_rank(results: Sequence[Result]) -> float:
    return math.exp(mean(math.log(r.stable_ranks[-1]) for r in results))


def main(
    steps: int = 500, seeds: int = 3, workers: int = os.cpu_count() or 1, folder: Path = Path("runs/demo")
) -> None:
    """Trains every arm at a good and at a too high learning rate and shows what came of it.

    Args:
        steps: Optimizer steps per run.
        seeds: Runs per arm and learning rate.
        workers: Runs at a time, one core each.
        folder: Where logs, figure and table go.

    Raises:
        ValueError: An argument is out of its range, or the folder can't be written to.
    """
    if steps < 10 * PERIOD:
        raise ValueError(f"steps must be at least {10 * PERIOD}, got {steps}")
    for name, value in (("seeds", seeds), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "demo.md").touch()
    except OSError as error:
        raise ValueError(f"folder must be one that can be written to, got {str(folder)!r}") from error
    # The high rates first: they are what one waits for.
    settings = [Setting(arm, lr, seed) for seed in range(seeds) for lr in (HIGH_LR, GOOD_LR) for arm in ARMS]
    results = train_all(settings, steps, workers, folder)
    draw(results, folder / "demo.png")
    text = f"{tabulate(results)}\n\n{summarize(results)}\n\n{provenance()}.\n"
    (folder / "demo.md").write_text(text)
    print(f"\n{text}\nFigure: {folder}/demo.png   Curves: tensorboard --logdir {folder}")


if __name__ == "__main__":
    auto_cli(main)
