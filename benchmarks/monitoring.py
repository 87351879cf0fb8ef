"""What monitoring costs, as ratios within one run.

`python -m benchmarks.monitoring` trains two models in a plain loop with the framework-free `Monitor` that the callbacks
wrap. It prints for each what every step pays (the loss at each, the gradient norm at each tenth), what a measurement of
each quantity adds, in training steps, and what that makes at the default cadence. All figures are medians over rounds
in which the candidates take turns.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.common import keep, median_ratio, take_turns
from msign_lightning.monitor import READ_INTERVAL, Monitor, grad_norm
from msign_lightning.recipes.module import LanguageModel
from msign_lightning.recipes.provenance import provenance
from msign_lightning.recipes.transformer import TransformerConfig
from msign_lightning.settings import DEFAULT_MEASURE, Quantity

MODELS = {
    "tiny (4 layers, d = 32), 256 tokens": (TransformerConfig(), 4, 64, 20),
    "12 layers, d = 512, 1024 tokens": (
        TransformerConfig(n_layers=12, width=512, n_heads=8, mlp_width=2048, vocab_size=8192),
        4,
        256,
        1,
    ),
}
"""Configuration, sequences of a batch, tokens of a sequence, and how many rounds are made of one."""
MEASURES: dict[str, dict[Quantity, int]] = {
    "stable rank": {"stable_rank": 1},
    "stable rank and spectral alignment": {"stable_rank": 1, "spectral_alignment": 1},
    "Jacobian alignment": {"jacobian_alignment": 1},
}


def compare(name: str, device: torch.device, rounds: int) -> str:
    """One line of a Markdown table."""
    config, batch_size, length, more = MODELS[name]
    torch.manual_seed(0)
    with device:
        module = LanguageModel(config)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    batch = torch.randint(config.vocab_size, (batch_size, length + 1), device=device)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = module.loss(batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def monitored(measure: dict[Quantity, int], done: int = 0) -> Callable[[], None]:
        monitor = Monitor(module, measure)

        def run() -> None:
            if not measure:
                monitor.steps = done
            monitor.begin()
            loss = step()
            monitor.end(loss, grad_norm(module.parameters()) if monitor.reads_next else None)
            optimizer.zero_grad()

        return run

    def plain() -> None:
        step()
        optimizer.zero_grad()

    candidates: dict[str, Callable[[], object]] = {
        "after the heaviest": plain,  # whose trace in the caches no other has to bear
        "step": plain,
        "unread": monitored({}),
        "read": monitored({}, READ_INTERVAL - 1),
    }
    candidates |= {title: monitored(measure) for title, measure in MEASURES.items()}
    for run in candidates.values():  # the first measurement is a cold one
        run()
    seconds = take_turns(candidates, device, rounds * more)
    over = {title: median_ratio(seconds[title], seconds["step"]) - 1 for title in candidates}
    every = over["unread"] + (over["read"] - over["unread"]) / READ_INTERVAL
    costs = [over[title] for title in MEASURES]
    both = DEFAULT_MEASURE["spectral_alignment"]
    measuring = costs[0] * (1 / DEFAULT_MEASURE["stable_rank"] - 1 / both) + costs[1] / both
    per_measurement = " | ".join(f"{cost:.2f}" for cost in costs)
    return (
        f"| {name} | {1e3 * statistics.median(seconds['step']):.1f} | {every:.2%} | {per_measurement} "
        f"| {measuring:.2%} | {every + measuring:.2%} |"
    )


def main(rounds: int, threads: int, folder: Path) -> None:
    """Prints the table and keeps it with date, device and versions."""
    for name, value in (("rounds", rounds), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    hardware = gpu or f"{platform.machine()} CPU"
    report = "\n".join(
        [
            f"# Cost of monitoring on {hardware}",
            "",
            f"`python -m benchmarks.monitoring --rounds {rounds} --threads {threads}`: {provenance(gpu)}.",
            "",
            f"| model | step, ms | every step | {', steps | '.join(MEASURES)}, steps "
            "| measurements at the default cadence | all at the default cadence |",
            "|---|---|---|" + "---|" * (len(MEASURES) + 2),
            *(compare(name, device, rounds) for name in tqdm(MODELS)),
            "",
        ]
    )
    keep(report, folder, "monitoring", hardware)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds",
        type=int,
        default=9,
        help="how often the candidates take turns; twenty times as often for the tiny model",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads that PyTorch may use on the CPU")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"), help="where the report goes")
    main(**vars(parser.parse_args()))
