"""What one application of MSign costs, and how exact it is, beside other ways to the same.

`python -m benchmarks.application` restores the attention and MLP matrices of the paper's four models (arXiv 2602.01734,
Table 4) by this library's methods, by an SVD of each matrix, and by two Newton–Schulz iterations matrix by matrix: 15
cubic steps with Chebyshev-type coefficients (arXiv 2506.10935) in fp32, and Muon's five quintic steps. A GPU gets the
shapes of the paper, a CPU the two smaller models whole and the two larger with an eighth of width and layers.

Times are medians over rounds in which the candidates take turns, and so are ratios; the peak that products are compared
with is measured in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import FOLDER, keep, median_ratio, table, take_turns, the_device
from msign_lightning import Restoration, msign
from msign_lightning.linalg import Method
from msign_lightning.recipes.provenance import provenance

Shapes = dict[tuple[int, int], int]
Sign = Callable[[Tensor], Tensor]

MUON = (3.4445, -4.7750, 2.0315)
EXACT, BASELINE = "svd (fp64)", "fp32 SVD per matrix"


def shapes(layers: int, width: int, mlp_width: int, *, experts: int = 1, gated: bool = True) -> Shapes:
    """How many matrices of which shape: W_Q, W_K, W_V and W_O of each layer, and its MLP or experts."""
    return {
        (width, width): 4 * layers,
        (mlp_width, width): layers * experts * (2 if gated else 1),
        (width, mlp_width): layers * experts,
    }


SMALLER = {"NanoGPT-5M": shapes(24, 48, 192, gated=False), "Sigma-40M": shapes(28, 128, 448)}
MODELS: dict[str, dict[str, Shapes]] = {
    "full": {
        **SMALLER,
        "LLaMA-1B": shapes(16, 2048, 5440),
        "LLaMA-MoE-3B": shapes(16, 2048, 1360, experts=16),
    },
    "small": {
        **SMALLER,
        "LLaMA-1B ÷ 8": shapes(2, 256, 680),
        "LLaMA-MoE-3B ÷ 8": shapes(2, 256, 170, experts=16),
    },
}


def collapsing(count: int, m: int, n: int, device: torch.device) -> Tensor:
    """Gaussian matrices with two spikes, of stable rank about 2: what a run about to collapse holds."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(count, side, 2, generator=generator))[0].to(device) for side in (m, n))
    torch.manual_seed(0)
    side = min(m, n) ** 0.5
    bulk = torch.randn(count, m, n, device=device) / max(m, n) ** 0.5
    return bulk.baddbmm_(u * torch.tensor([side, side / 2], device=device), v.mT)


def svd_sign(W: Tensor) -> Tensor:
    """By a singular value decomposition, as one would write it down."""
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    return U @ Vh


def cubic_schedule(lower: float, steps: int) -> list[tuple[float, float]]:
    """Cubics ax + bx³ that are each the closest to 1 on what the one before made of [lower, 1]."""
    upper, schedule = 1.0, []
    for _ in range(steps):
        q = (lower**2 + lower * upper + upper**2) / 3  # the maximum is at √q, and both ends have the same value
        least, most = lower * upper * (lower + upper), 2 * q**1.5
        scale = 2 / (least + most)
        schedule.append((3 * q * scale, -scale))
        lower, upper = least * scale, most * scale
    return schedule


def cubic_sign(W: Tensor) -> Tensor:
    """15 cubic Newton–Schulz steps from [1e-5, 1], which they bring to 1 within 1e-6."""
    X = W / W.norm()
    for a, b in cubic_schedule(1e-5, 15):
        A = X @ X.mT if X.size(0) <= X.size(1) else X.mT @ X
        X = a * X + b * (A @ X if X.size(0) <= X.size(1) else X @ A)
    return X


def quintic_sign(W: Tensor) -> Tensor:
    """Muon's five steps, in bfloat16 on a GPU as there; made for updates, not for weights."""
    X = W.bfloat16() if W.is_cuda else W
    X = X.mT if W.size(0) > W.size(1) else X
    X = X / X.norm()
    a, b, c = MUON
    for _ in range(5):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if W.size(0) > W.size(1) else X).to(W.dtype)


def restore_each(parameters: list[nn.Parameter], sign: Sign) -> None:
    """Eq. 14 matrix by matrix."""
    for W in parameters:
        S = sign(W)
        W.copy_(S * (W.norm() / S.norm()))


def worst(sign: Tensor) -> float:
    """Largest |s - 1| of singular values that should be one."""
    S = sign.double()
    squares = torch.linalg.eigvalsh(S @ S.mT if S.size(0) <= S.size(1) else S.mT @ S)
    return (squares.clamp(min=0).sqrt() - 1).abs().max().item()


def matmul_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of the best of a few large products."""
    count, n = (8, 2048) if device.type == "cuda" else (1, 1024)
    X = torch.randn(count, n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        seconds = take_turns({"product": lambda: torch.bmm(X, X)}, device, 10)["product"]
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * count * n**3 / min(seconds)


def peak_megabytes(run: Callable[[], object], device: torch.device) -> float:
    """Most memory that tensors take at a time, beyond what is there before; not what LAPACK takes by itself."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(itertools.accumulate((event["args"]["Bytes"] for event in events), initial=0)) / 1e6


@torch.no_grad()
def compare(name: str, model_shapes: Shapes, device: torch.device, rounds: int, peaks: dict[str, float]) -> Any:
    """One row of figures per method."""
    stacks = [collapsing(count, *shape, device) for shape, count in model_shapes.items()]
    samples = [stack[: 1 if min(stack.shape[1:]) >= 1024 else 4].clone() for stack in stacks]
    matrices = list(itertools.chain(*stacks))
    model = nn.ModuleDict({"mlp": nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in matrices))})
    for linear, W in zip(model["mlp"], matrices, strict=True):
        linear.weight = nn.Parameter(W.clone())
    parameters = list(model.parameters())

    signs: dict[str, Sign] = {EXACT: lambda W: msign(W, method="svd"), BASELINE: svd_sign}
    runs: dict[str, Callable[[], object]] = {}
    precisions = {}
    for title, sign in signs.items():  # timed on the samples, shape by shape
        for i, sample in enumerate(samples):
            runs[f"{title} {i}"] = lambda sample=sample, sign=sign: restore_each(list(sample.clone()), sign)
    methods = [method for method in get_args(Method) if method.startswith("polynomial")]
    for method in methods if device.type == "cuda" else methods[:1]:
        signs[method] = lambda W, method=method: msign(W, method=method)
        runs[method] = Restoration(model, method=method).apply
        precisions[method] = method.partition("_")[2] or "fp32"
    for title, sign in (("15 cubic steps per matrix", cubic_sign), ("Muon's 5 steps per matrix", quintic_sign)):
        signs[title] = sign
        runs[title] = lambda sign=sign: restore_each(parameters, sign)
        precisions[title] = "bf16" if sign is quintic_sign and device.type == "cuda" else "fp32"

    def reset() -> None:
        torch._foreach_copy_(parameters, matrices)

    seconds = take_turns(runs, device, rounds, before=reset)
    for title in (EXACT, BASELINE):
        parts = [
            [t * len(stack) / len(sample) for t in seconds[f"{title} {i}"]]
            for i, (stack, sample) in enumerate(zip(stacks, samples, strict=True))
        ]
        seconds[title] = [sum(part) for part in zip(*parts, strict=True)]

    rows: list[dict[str, Any]] = []
    for title, sign in signs.items():
        row = {
            "matrices": name,
            "method": title,
            "seconds": statistics.median(seconds[title]),
            "ratio_to_fp32_svd": median_ratio(seconds[title], seconds[BASELINE]),
            "worst": max(worst(sign(W)) for sample in samples for W in sample),
        }
        if title in precisions:
            reset()
            with FlopCounterMode(display=False) as counter:
                runs[title]()
            row["flop"] = counter.get_total_flops()
            row["share_of_peak"] = row["flop"] / row["seconds"] / peaks[precisions[title]]
            row["peak_megabytes"] = peak_megabytes(runs[title], device)
        rows.append(row)
    return rows


def shown(row: dict[str, Any]) -> list[str]:
    """A row of figures as a line of the table."""
    formats = {
        "matrices": "",
        "method": "",
        "seconds": ".3g",
        "ratio_to_fp32_svd": ".2f",
        "flop": ".2g",
        "share_of_peak": ".0%",
        "peak_megabytes": ".0f",
        "worst": ".0e",
    }
    return [format(row[key], form) if key in row else "" for key, form in formats.items()]


def main(rounds: int, threads: int, scale: str, models: list[str] | None, folder: Path) -> None:
    """Prints the table and keeps it, and its figures, with date, device and versions."""
    for name, value in (("rounds", rounds), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")
    device, gpu, hardware = the_device(threads)
    scale = ("full" if gpu else "small") if scale == "auto" else scale
    chosen = {name: MODELS[scale][name] for name in models or MODELS[scale]}
    peaks = {p: matmul_peak(device, p) for p in (("fp32", "tf32", "bf16") if gpu else ("fp32",))}
    rows = []
    for name, model_shapes in chosen.items():
        print(f"{name} …", flush=True)
        rows += compare(name, model_shapes, device, rounds, peaks)

    command = f"`python -m benchmarks.application --rounds {rounds} --threads {threads} --shapes {scale}`"
    source = f"{command}: {provenance(gpu)}."
    counts = (
        f"- {name}: {', '.join(f'{count} of {m} × {n}' for (m, n), count in model_shapes.items())}"
        for name, model_shapes in chosen.items()
    )
    head = ("matrices", "method", "s", "s / fp32 SVD", "FLOP", "of peak", "peak MB", r"worst \|s − 1\|")
    report = "\n".join(
        [
            f"# Cost of one application on {hardware}",
            "",
            source,
            f"Peak of products: {', '.join(f'{name} {peak / 1e9:.0f} GFLOP/s' for name, peak in peaks.items())}.",
            "",
            f"Matrices, shapes {scale!r}: Gaussian with two spikes.",
            "",
            *counts,
            "",
            "Decompositions are timed on four matrices of each shape (one from a short side of 1024 on) and counted",
            "for all. The last column is the worst of these matrices. Memory is what tensors take beyond the weights.",
            "",
            table(head, map(shown, rows)),
            "",
        ]
    )
    keep(report, folder, "application", hardware, {"source": source, "shapes": scale, "peaks": peaks, "rows": rows})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often the candidates take turns")
    parser.add_argument("--threads", type=int, default=1, help="threads that PyTorch may use on the CPU")
    parser.add_argument("--shapes", dest="scale", choices=("auto", *MODELS), default="auto", help="auto: by the device")
    parser.add_argument("--models", nargs="+", help="names of models of these shapes; all by default")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the report goes")
    main(**vars(parser.parse_args()))
