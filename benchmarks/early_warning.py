"""How early each signal warns of a collapse, and how often wrongly, with plain AdamW.

`python -m benchmarks.early_warning` trains the tiny recipe at a good, a marginal and a too high learning rate and on
two ramps of the learning rate, over several seeds, with `StabilityMonitor` measuring every 10 steps (Jacobians every
50), and prints two tables. With `--recipe tiny/norm_free` it trains the decoder that dies, measured every 50 steps: at
a rate that is good for as long as was tried, at two that kill, and at one of these with weight decay, which delays it.
A run counts as lost

- when the `CollapseDetector` says so: at a loss that is not finite, or at a "stall", the median of the last 201 losses
  more than 0.2 nats above its best;
- if it is as long as the good runs, also from the step at which that median is more than 0.2 nats above theirs, and
  stays there to the end;
- of tiny/norm_free only at a loss that is not finite: its death.

The first table takes the alarms of `CollapseDetector` at fixed thresholds. The second asks what a signal could do at
best: its threshold is the most extreme value in half of the good runs, and false alarms are counted on the other half.
Leads are in optimizer steps, as median (lowest … highest); a negative one came too late. They are left out for what
warned of more than half of the good runs. No lead on the tiny recipe is foresight of an event that comes by itself:
these runs are lost because of their learning rate, so that itself is among the signals, as what a good one must be
better than.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import matplotlib
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from tqdm import tqdm

from msign_lightning import StabilityMonitor
from msign_lightning.collapse import CollapseDetector
from msign_lightning.recipes.module import LanguageModel
from msign_lightning.recipes.provenance import provenance
from msign_lightning.recipes.recorder import Recorder
from msign_lightning.recipes.train import load_recipe

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SMOOTHING = 201


class Setting(NamedTuple):
    """A peak learning rate, reached after `warmup` of `steps` steps."""

    lr: float
    steps: int
    warmup: int
    weight_decay: float | None = None


class Family(NamedTuple):
    """Settings of a recipe: the first, which is good, and others that are to be kept; and those that are lost.

    Attributes:
        final_lr: Share of the peak learning rate at the end.
        lost_by: Nats by which a run stalls that counts as lost; None where only its death counts.
        every: Optimizer steps between two measurements; five times as many for Jacobians.
    """

    kept: dict[str, Setting]
    lost: dict[str, Setting]
    final_lr: float
    lost_by: float | None
    every: int

    @property
    def settings(self) -> dict[str, Setting]:
        return self.kept | self.lost

    @property
    def good(self) -> str:
        return next(iter(self.kept))


FAMILIES = {
    "tiny/prose": Family(
        {
            "good, 3e-3": Setting(3e-3, 1500, 50),
            "good, 6000 steps": Setting(3e-3, 6000, 50),
            "marginal, 1e-2": Setting(1e-2, 1500, 50),
        },
        {
            "too high, 3e-2": Setting(3e-2, 1500, 50),
            "ramp 0 → 0.3 in 1500": Setting(0.3, 1500, 1500),
            "ramp 0 → 0.3 in 6000": Setting(0.3, 6000, 6000),
        },
        final_lr=0.1,
        lost_by=0.2,
        every=10,
    ),
    "tiny/norm_free": Family(  # the rates of the matrices, 16 times the optimizer's
        {"good, 2e-3": Setting(2e-3 / 16, 4000, 200)},
        {
            "dies, 3e-3": Setting(3e-3 / 16, 10_000, 200),
            "dies, 5e-3": Setting(5e-3 / 16, 3000, 200),
            "dies, 5e-3 with weight decay": Setting(5e-3 / 16, 4000, 200, 0.1),
        },
        final_lr=1.0,
        lost_by=None,
        every=50,
    ),
}

OFF: dict[str, Any] = dict.fromkeys(("spike", "z_score", "stall", "stable_rank", "sign_diversity"))

Readings = dict[int, dict[str, float]]
"""Metrics by optimizer step."""


class Rows(DummyLogger):
    """Keeps in memory what is logged: step → metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Readings = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.setdefault(step or 0, {}).update(metrics)


class LargestLogit(pl.Callback):
    """Logs the largest absolute logit of each step that is a multiple of `every`."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def note(module: nn.Module, args: Any, logits: Tensor) -> None:
            if (step := trainer.global_step + 1) % self.every == 0 and module.training:
                trainer.loggers[0].log_metrics({"logit/max": logits.detach().abs().max().item()}, step)

        pl_module.get_submodule("transformer").register_forward_hook(note)


def train(recipe_name: str, every: int, setting: Setting, seed: int, folder: Path) -> None:
    """Trains one run and keeps its readings in a file; a run that has one is not made again."""
    file = file_of(setting, seed, folder)
    if file.exists():
        return
    measure: Any = {"stable_rank": every, "spectral_alignment": every, "jacobian_alignment": 5 * every}
    rows = Rows()
    recorder = Recorder(every)
    recipe = load_recipe(
        recipe_name,
        "--use_msign=false",
        f"--model.optimizer.lr={setting.lr}",
        f"--model.warmup_steps={setting.warmup}",
        f"--trainer.max_steps={setting.steps}",
        f"--seed_everything={seed}",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.logger=false",
        *([] if setting.weight_decay is None else [f"--model.optimizer.weight_decay={setting.weight_decay}"]),
        callbacks=[recorder, LargestLogit(every), StabilityMonitor(measure, thresholds=OFF, per_matrix=True)],
    )
    recipe.trainer.loggers = [rows]
    recipe.trainer.fit(recipe.model, recipe.datamodule)
    losses = recorder.losses + ([] if recorder.diverged_at is None else [math.nan])
    for step, loss in enumerate(losses, start=1):
        rows.rows.setdefault(step, {})["loss/train"] = loss
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(rows.rows))
    unfinished.rename(file)


def file_of(setting: Setting, seed: int, folder: Path) -> Path:
    """Where the readings of a run are kept."""
    decay = "" if setting.weight_decay is None else f" weight_decay={setting.weight_decay:g}"
    return folder / f"lr={setting.lr:g} warmup={setting.warmup} steps={setting.steps}{decay} seed={seed}.json"


def readings(family: Family, name: str, seed: int, folder: Path) -> Readings:
    """Readings of a run, by step, with the learning rate."""
    setting = family.settings[name]
    kept = json.loads(file_of(setting, seed, folder).read_text())
    rows = {int(step): row for step, row in kept.items() if step != "0"}
    schedule = LanguageModel(warmup_steps=setting.warmup, final_lr=family.final_lr)
    for step, row in rows.items():
        row["lr"] = setting.lr * schedule.lr_share(step - 1, setting.steps)
    return rows


def _start_worker() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("msign_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


# --- when a run is lost ------------------------------------------------------------------------------------------


def smoothed(rows: Readings) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Median of the last 201 losses at each step, NaN before there are as many."""
    losses = np.array([rows[step]["loss/train"] for step in sorted(rows) if "loss/train" in rows[step]])
    medians = np.median(np.lib.stride_tricks.sliding_window_view(losses, SMOOTHING), axis=1)
    return np.concatenate([np.full(SMOOTHING - 1, math.nan), medians])


def lost_at(rows: Readings, good: np.ndarray[Any, np.dtype[np.float64]], lost_by: float | None) -> int | None:
    """Step at which the run is lost; None if it is not."""
    steps = [step for step, _ in alarms(rows, CollapseDetector(**OFF | {"stall": lost_by}))][:1]
    if lost_by is not None and len(losses := smoothed(rows)) == len(good):
        caught_up = np.flatnonzero(losses <= good + lost_by)
        last = int(caught_up[-1]) if len(caught_up) else SMOOTHING - 2
        steps += [last + 2] if last + 1 < len(losses) else []  # index i holds step i + 1
    return min(steps, default=None)


def alarms(rows: Readings, detector: CollapseDetector) -> Iterable[tuple[int, str]]:
    """Step and kind of each alarm; several at a step count as one."""
    for step in sorted(rows):
        row = rows[step]
        ranks, diversity = (_per_matrix(row, quantity) for quantity in ("stable_rank", "sign_diversity"))
        raised = detector.update(
            step,
            loss=row.get("loss/train"),
            grad_norm=row.get("stability/grad_norm"),
            stable_ranks=ranks,
            sign_diversity=diversity,
        )
        yield from ((step, kind) for kind in dict.fromkeys(alarm.kind for alarm in raised))


def _per_matrix(row: Mapping[str, float], quantity: str) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith(f"{quantity}/") and name.endswith("weight")}


# --- signals -----------------------------------------------------------------------------------------------------

ALARMS: dict[str, CollapseDetector] = {
    "stable rank < 2, half of the matrices": CollapseDetector(**OFF | {"stable_rank": 2.0}),
    "stable rank < 2, any matrix": CollapseDetector(**OFF | {"stable_rank": 2.0, "share": 1e-9}),
    "sign diversity < 0.1, half of the matrices": CollapseDetector(**OFF | {"sign_diversity": 0.1}),
    "sign diversity < 0.1, any matrix": CollapseDetector(**OFF | {"sign_diversity": 0.1, "share": 1e-9}),
    "loss 0.1 above its median of 201": CollapseDetector(**OFF | {"spike": 0.1}),
    "loss 0.5 above its median of 201": CollapseDetector(**OFF | {"spike": 0.5}),
    "loss 7 σ above its mean of 1000": CollapseDetector(**OFF | {"z_score": 7.0}),
}


def _lowest(name: str) -> Callable[[Mapping[str, float]], float | None]:
    return lambda row: -row[name] if name in row else None


def _highest(name: str) -> Callable[[Mapping[str, float]], float | None]:
    return lambda row: row.get(name)


SIGNALS: dict[str, Callable[[Mapping[str, float]], float | None]] = {
    "for comparison: the learning rate (rises)": _highest("lr"),
    "stable rank, geometric mean (falls)": _lowest("stable_rank/geometric_mean"),
    "stable rank, lowest (falls)": _lowest("stable_rank/min"),
    "largest spectral norm (rises)": _highest("spectral_norm/max"),
    "sign diversity, mean (falls)": _lowest("sign_diversity/mean"),
    "Jacobian alignment, geometric mean (rises)": _highest("jacobian_alignment/geometric_mean"),
    "Jacobian alignment, lowest (rises)": _highest("jacobian_alignment/min"),
    "Jacobian norm of a block, geometric mean (rises)": _highest("jacobian_norm/geometric_mean"),
    "Jacobian norm of the whole stack (rises)": _highest("jacobian_total"),
    "bound of Theorem 4.2 (rises)": _highest("jacobian_bound"),
    "gradient norm before clipping (rises)": _highest("stability/grad_norm"),
    "largest logit (rises)": _highest("logit/max"),
}


class Verdict(NamedTuple):
    """First warning of a signal in one run, with the step at which the run was lost."""

    setting: str
    warned: int | None
    lost: int | None
    alarms: int  # in the whole run


def summarize(family: Family, verdicts: list[Verdict]) -> list[str]:
    """Cells of a table: how many of the lost runs were warned of in time, and the lead times per setting."""
    settings = family.settings
    leads = {name: [v.lost - v.warned for v in _lost(verdicts, name) if v.lost and v.warned] for name in settings}
    in_time = sum(lead > 0 for values in leads.values() for lead in values)
    cells = [f"{in_time} of {sum(len(_lost(verdicts, name)) for name in settings)}"]
    good = [v.warned is not None for v in verdicts if v.setting == family.good]
    tells_apart = sum(good) <= len(good) / 2
    for name in family.lost:
        values = leads[name] if tells_apart else []
        cells.append(f"{statistics.median(values):.0f} ({min(values)} … {max(values)})" if values else "–")
    return cells


def _lost(verdicts: list[Verdict], setting: str) -> list[Verdict]:
    return [v for v in verdicts if v.setting == setting and v.lost is not None]


def false_alarms(verdicts: list[Verdict], setting: str) -> str:
    """Runs of a setting that were not lost and yet warned of."""
    kept = [v for v in verdicts if v.setting == setting and v.lost is None]
    return f"{sum(v.warned is not None for v in kept)} of {len(kept)}" if kept else "–"


def tabulate(family: Family, runs: Mapping[tuple[str, int], Readings]) -> str:
    """Both tables and the runs that were lost, as Markdown."""
    first = family.good
    seeds = sorted({seed for name, seed in runs if name == first})
    lost = losses_of(family, runs)
    lines = ["| setting | runs | lost | lost at step (lowest … highest) |", "|---|---|---|---|"]
    for name in family.settings:
        steps = [lost[key] for key in runs if key[0] == name]
        known = sorted(step for step in steps if step is not None)
        where = f"{statistics.median(known):.0f} ({known[0]} … {known[-1]})" if known else "–"
        lines.append(f"| {name} | {len(steps)} | {len(known)} | {where} |")

    last = list(family.lost)[-1]
    head = [
        "warned in time",
        *(f"lead, {name}" for name in family.lost),
        *(f"false alarms, {name}" for name in family.kept),
    ]
    lines += [
        "",
        f"| alarm | {' | '.join(head)} | alarms in a run, {first} | alarms in a run, {last} |",
        "|---|" + "---|" * (len(head) + 2),
    ]
    for title, detector in ALARMS.items():
        fresh = detector.state_dict()
        verdicts = []
        for key, rows in runs.items():
            detector.load_state_dict(fresh)
            raised = [step for step, kind in alarms(rows, detector) if kind != "non_finite"]
            verdicts.append(Verdict(key[0], raised[0] if raised else None, lost[key], len(raised)))
        counts = [statistics.mean(v.alarms for v in verdicts if v.setting == name) for name in (first, last)]
        cells = [
            *summarize(family, verdicts),
            *(false_alarms(verdicts, name) for name in family.kept),
            *(f"{count:.1f}" for count in counts),
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")

    head[-len(family.kept)] += ", held out"
    settled = 2 * family.kept[first].warmup  # calibrated thresholds hold from this step on
    lines += ["", f"| signal, calibrated | threshold | {' | '.join(head)} |", "|---|---|" + "---|" * len(head)]
    calibration = seeds[: len(seeds) // 2]
    for title, signal in SIGNALS.items():
        series = {
            key: [
                (step, value) for step in sorted(rows) if step > settled and (value := signal(rows[step])) is not None
            ]
            for key, rows in runs.items()
        }
        threshold = max(value for seed in calibration for _, value in series[first, seed])
        verdicts = []
        for key, values in series.items():
            if key[0] == first and key[1] in calibration:
                continue
            raised = [step for step, value in values if not value <= threshold]
            verdicts.append(Verdict(key[0], raised[0] if raised else None, lost[key], len(raised)))
        cells = [*summarize(family, verdicts), *(false_alarms(verdicts, name) for name in family.kept)]
        lines.append(f"| {title} | {abs(threshold):.3g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def losses_of(family: Family, runs: Mapping[tuple[str, int], Readings]) -> dict[tuple[str, int], int | None]:
    """Step at which each run is lost; None for those that are not, among which are the good ones."""
    good = np.mean([smoothed(rows) for (name, _), rows in runs.items() if name == family.good], axis=0)
    return {k: None if k[0] == family.good else lost_at(rows, good, family.lost_by) for k, rows in runs.items()}


def draw(family: Family, runs: Mapping[tuple[str, int], Readings], file: Path) -> None:
    """What was measured over the steps: a column per setting, a line per seed."""
    panels = {
        "training loss": "stability/loss",
        "stable rank\n(geometric mean)": "stable_rank/geometric_mean",
        "sign diversity\n(mean)": "sign_diversity/mean",
        "Jacobian alignment\n(geometric mean)": "jacobian_alignment/geometric_mean",
        "Jacobian norm\n(whole stack)": "jacobian_total",
        "gradient norm\n(before clipping)": "stability/grad_norm",
        "largest logit": "logit/max",
    }
    settings = family.settings
    figure, axes = plt.subplots(len(panels), len(settings), figsize=(16, 14), sharex="col", sharey="row")
    lost_steps = losses_of(family, runs)
    for column, name in zip(axes.T, settings, strict=True):
        column[0].set_title(name, fontsize=10)
        column[-1].set_xlabel("optimizer steps")
        for (key, rows), ax_of in ((item, dict(zip(panels, column, strict=True))) for item in runs.items()):
            if key[0] != name:
                continue
            lost = lost_steps[key]
            for title, metric in panels.items():
                steps = [step for step in sorted(rows) if metric in rows[step]]
                ax_of[title].plot(steps, [rows[step][metric] for step in steps], color=f"C{key[1]}", lw=0.8)
                if lost is not None:
                    ax_of[title].axvline(lost, color=f"C{key[1]}", ls=":", lw=0.8)
    for ax, title in zip(axes[:, 0], panels, strict=True):
        ax.set_ylabel(title)
    axes[0, 0].set_ylim(1, 5)
    for row in (1, 3, 4, 5, 6):
        axes[row, 0].set_yscale("log")
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    plt.close(figure)


def main(recipe: str, seeds: int, workers: int, folder: Path, results: Path) -> None:
    """Trains what is missing in `folder` and writes tables and figure to `results`."""
    for name, value in (("seeds", seeds), ("workers", workers)):
        if value < 1 + (name == "seeds"):
            raise ValueError(f"{name} must be at least {1 + (name == 'seeds')}, got {value}")
    folder.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    family = FAMILIES[recipe]
    keys = [(name, seed) for name in family.settings for seed in range(seeds)]
    longest_first = sorted(keys, key=lambda key: -family.settings[key[0]].steps)
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) as pool:
        futures = [
            pool.submit(train, recipe, family.every, family.settings[n], seed, folder) for n, seed in longest_first
        ]
        for future in tqdm(futures, unit="run"):
            future.result()
    runs = {key: readings(family, *key, folder) for key in keys}
    report = "\n".join(
        [
            "# How early each signal warns, and how often wrongly",
            "",
            f"`python -m benchmarks.early_warning --recipe {recipe} --seeds {seeds}`: {provenance()}.",
            f"Recipe {recipe}, AdamW, seeds 0 to {seeds - 1}; lost, lead and false alarms as defined at the top of "
            "benchmarks/early_warning.py.",
            "",
            tabulate(family, runs),
            "",
        ]
    )
    print(f"\n{report}")
    name = "early-warning" if recipe == "tiny/prose" else f"early-warning-{recipe.rpartition('/')[2]}"
    (results / f"{name}.md").write_text(report)
    draw(family, runs, results / f"{name}.png")
    print(f"Kept in {results}/{name}.md and .png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=list(FAMILIES), default="tiny/prose")
    parser.add_argument("--seeds", type=int, default=6, help="runs per setting; half of them calibrate")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each")
    parser.add_argument("--folder", type=Path, default=Path("runs/early_warning"), help="where readings are kept")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="where the report goes")
    main(**vars(parser.parse_args()))
