"""What MSign costs a real Lightning run: tokens per second with and without it.

`python -m benchmarks.overhead` trains a plain transformer on random tokens, in bf16-mixed, without a callback and with
`MSignCallback` at each period, in turns, until the minutes are spent. A GPU trains 124M parameters (GPT-2's shape), a
CPU a small model, where only seconds count that the process computes: others may run beside it. The cost of an
application is the difference of the times over the number of applications. The model T(P) = T∞ (1 + c / P) of
arXiv 2602.01734, App. A.4, where c is 3.9 steps, is fitted to the medians of all periods; it is reported only if it is
nowhere more than 5 % off.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from benchmarks.common import FOLDER, keep, synchronize, table, the_device
from msign_lightning import MSignCallback
from msign_lightning.recipes.module import LanguageModel
from msign_lightning.recipes.provenance import provenance
from msign_lightning.recipes.transformer import TransformerConfig

WARM_UP = 10  # steps before the clock starts
SMALL = (TransformerConfig(n_layers=2, width=64, n_heads=2, mlp_width=256), 4, 32)
LARGE = (TransformerConfig(n_layers=12, width=768, n_heads=12, mlp_width=3072, vocab_size=50304), 4, 1024)
"""Configuration, sequences of a batch, tokens of a sequence."""


class Clock(Callback):
    """Seconds from the end of the warm-up to the end of training; on a CPU those that the process computes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.now = time.perf_counter if torch.cuda.is_available() else time.process_time

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == WARM_UP:
            synchronize(pl_module.device)
            self.seconds = -self.now()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronize(pl_module.device)
        self.seconds += self.now()


def train(period: int | None, steps: int, model: tuple[TransformerConfig, int, int]) -> float:
    """Seconds of so many steps after the warm-up."""
    config, batch_size, length = model
    torch.manual_seed(0)
    module = LanguageModel(config)
    windows = torch.randint(config.vocab_size, ((steps + WARM_UP) * batch_size, length + 1))
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=steps + WARM_UP,
        callbacks=[clock] if period is None else [clock, MSignCallback(period)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(windows, batch_size))  # type: ignore[arg-type]
    return clock.seconds


def applications(period: int, steps: int) -> int:
    """How many of them the clock sees."""
    return (steps + WARM_UP) // period - WARM_UP // period


def fit(ratios: dict[int, float]) -> tuple[float, float]:
    """The c of r(P) = 1 + c / P by least squares, and how far it is off at worst, as a share of r."""
    c = sum((r - 1) / period for period, r in ratios.items()) / sum(period**-2 for period in ratios)
    return c, max(abs(r / (1 + c / period) - 1) for period, r in ratios.items())


def main(periods: list[int], steps: int, minutes: float, threads: int, folder: Path) -> None:
    """Prints the table and keeps it, and its figures, with date, device and versions."""
    for name, value in (("steps", steps), ("threads", threads), *(("periods", period) for period in periods)):
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")
    if steps < max(periods):
        raise ValueError(f"steps must be at least the longest period {max(periods)}, got {steps}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    _, gpu, hardware = the_device(threads)
    config, batch_size, length = model = LARGE if gpu else SMALL
    began = time.perf_counter()
    train(min(periods), max(periods), model)  # loads what is loaded once
    seconds: dict[int | None, list[float]] = {period: [] for period in (None, *periods)}
    # No round starts that would end after the minutes are spent.
    while (done := len(seconds[None])) < 2 or (time.perf_counter() - began) * (done + 2) / (done + 1) < 60 * minutes:
        for period in seconds:
            seconds[period].append(train(period, steps, model))
        print(f"round {done + 1}", flush=True)

    tokens = steps * batch_size * length
    rounds, step = len(seconds[None]), statistics.median(seconds[None]) / steps
    rows: list[list[object]] = [["none", f"{tokens / statistics.median(seconds[None]):.0f}", "1.000", "", "", ""]]
    ratios = {}
    for period in periods:
        pairs = list(zip(seconds[period], seconds[None], strict=True))
        ratios[period] = statistics.median(a / b for a, b in pairs)
        each = [1e3 * (a - b) / applications(period, steps) for a, b in pairs]
        throughput = f"{tokens / statistics.median(seconds[period]):.0f}"
        cost = f"{statistics.median(each):.2f}", f"{min(each):.2f} … {max(each):.2f}"
        in_steps = f"{statistics.median(each) / 1e3 / step:.2f}"
        rows.append([period, throughput, f"{ratios[period]:.3f}", *cost, in_steps])
    c, off = fit(ratios)
    formula = "r(P) = 1 + c / P"
    verdict = (
        f"{formula} fits with c = {c:.2f} steps; at worst it is {off:.1%} off."
        if off <= 0.05
        else f"{formula} does not fit: at best it is {off:.0%} off."
    )
    command = (
        f"`python -m benchmarks.overhead --periods {' '.join(map(str, periods))} --steps {steps} --threads {threads}`"
    )
    source = f"{command}: {provenance(gpu)}."
    parameters = sum(p.numel() for p in LanguageModel(config).parameters())
    head = ("P", "tokens/s", "time / time without", "ms per application", "lowest … highest", "in steps")
    report = "\n".join(
        [
            f"# Tokens per second with and without MSign on {hardware}",
            "",
            source,
            f"{config.n_layers} layers, d = {config.width}, {parameters / 1e6:.1f}M parameters, bf16-mixed; "
            f"{rounds} rounds of {steps} steps of {batch_size} × {length} tokens,",
            f"{1e3 * step:.1f} ms each{'' if gpu else ' of CPU time'}. Figures are medians over rounds. "
            f"Without MSign the slowest round took {max(seconds[None]) / min(seconds[None]):.2f} times the fastest.",
            "",
            table(head, rows),
            "",
            verdict,
            "",
        ]
    )
    figures = {"source": source, "steps": steps, "tokens": tokens, "c": c, "off": off}
    keep(report, folder, "overhead", hardware, figures | {"seconds": {str(p): s for p, s in seconds.items()}})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--periods", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--steps", type=int, default=1000, help="of each run, after the warm-up")
    parser.add_argument("--minutes", type=float, default=8, help="there are at least two rounds")
    parser.add_argument("--threads", type=int, default=1, help="threads that PyTorch may use on the CPU")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the report goes")
    main(**vars(parser.parse_args()))
