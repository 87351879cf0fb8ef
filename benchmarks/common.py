"""What the benchmarks share: the device, taking turns, and a report that is printed and kept with its figures."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

FOLDER = Path("benchmarks/results")


def the_device(threads: int | None = None) -> tuple[torch.device, str | None, str]:
    """The GPU if there is one, else the CPU; its name, None for a CPU; and what to call the hardware in a report."""
    if threads is not None:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return torch.device("cuda"), name, name
    return torch.device("cpu"), None, f"{platform.machine()} CPU"


def synchronize(device: torch.device) -> None:
    """Waits for the device; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    candidates: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after one round to warm up; `before` each, untimed, comes `before`."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, run in candidates.items():
            before()
            synchronize(device)
            began = time.perf_counter()
            run()
            synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def keep(report: str, folder: Path, name: str, hardware: str, figures: dict[str, Any] | None = None) -> None:
    """Prints a report and writes it to a file of the folder, named after the benchmark and the hardware.

    Its figures go into a JSON file beside it.
    """
    print(f"\n{report}")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{hardware.lower().replace(' ', '-')}.md"
    file.write_text(report)
    if figures is not None:
        file.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"Kept in {file}")
