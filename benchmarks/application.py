"""What one application of MSign costs, as ratios within one run.

`python -m benchmarks.application` prints two tables, for the CPU or, where there is one, for the GPU:

1. methods: batched methods of `restore` against the plain way, an SVD per matrix, on stacks of matrices;
2. models: one application to a whole model against one training step of it, in step-equivalents (the r of
   T(P) = T∞ / (1 + r/P), arXiv 2602.01734, App. A.4, where it is 3.9), and what that makes of throughput at P = 100.

All figures are medians over rounds in which the candidates take turns, so that a change of the machine's speed hits
them alike.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from msign_lightning import Restoration, restore
from msign_lightning.linalg import Method
from msign_lightning.recipes.module import LanguageModel
from msign_lightning.recipes.provenance import provenance
from msign_lightning.recipes.transformer import TransformerConfig

STACKS = {"NanoGPT-5M": (96, 48), "Sigma-40M": (112, 128), "single 512": (1, 512), "single 2048": (1, 2048)}


class Model(NamedTuple):
    """A configuration of arXiv 2602.01734, Table 4 (dense, MHA) and the tokens of one of its training steps."""

    config: TransformerConfig
    sequence_length: int
    tokens_per_step: int


def paper_model(
    layers: int, width: int, heads: int, mlp_width: int, modern: bool, vocab_size: int = 50304
) -> TransformerConfig:
    """NanoGPT-5M is the older design (LayerNorm, GELU, no positions); the others are of the Llama family."""
    return TransformerConfig(
        vocab_size=vocab_size,
        n_layers=layers,
        width=width,
        n_heads=heads,
        mlp_width=mlp_width,
        norm="rmsnorm" if modern else "layernorm",
        activation="swiglu" if modern else "gelu",
        positions="rope" if modern else "none",
        init_std=0.02,
        zero_query=False,
    )


MODELS = {
    "NanoGPT-5M": Model(paper_model(24, 48, 6, 192, modern=False), 256, 122_880),
    "Sigma-40M": Model(paper_model(28, 128, 4, 448, modern=True), 2048, 65_536),
    "LLaMA-1B": Model(paper_model(16, 2048, 16, 5440, modern=True), 2048, 65_536),
}


def plain_svd(stack: Tensor) -> None:
    """Eq. 14 matrix by matrix, as one would write it down."""
    for W in stack:
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        sign = U @ Vh
        W.norm() / sign.norm() * sign


def take_turns(
    candidates: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}


def collapsing(count: int, n: int) -> Tensor:
    """Gaussian n × n matrices with two spikes, of stable rank about 2: what a run about to collapse holds."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(count, n, 2, generator=generator))[0] for _ in range(2))
    spikes = torch.tensor([n**0.5, n**0.5 / 2])
    return torch.randn(count, n, n, generator=generator) / n**0.5 + u * spikes @ v.mT


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def compare_methods(device: torch.device, rounds: int) -> str:
    """Markdown table: each method's time as a share of an SVD per matrix."""
    methods: list[tuple[str, dict[str, str]]] = [
        ("svd (fp64)", {"method": "svd"}),
        ("polynomial", {"method": "polynomial"}),
    ]
    if device.type == "cuda":
        methods += [
            ("polynomial_tf32", {"method": "polynomial_tf32"}),
            ("polynomial_bf16", {"method": "polynomial_bf16"}),
        ]
    methods += [
        ("cap, exact", {"rule": "cap", "method": "svd"}),
        ("cap, low rank", {"rule": "cap", "method": "polynomial"}),
    ]
    names = [name for name, _ in methods]
    lines = [
        f"| matrices | fp32 SVD per matrix, ms | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for case, (count, n) in tqdm(STACKS.items(), desc="methods"):
        stack = collapsing(count, n).to(device)
        candidates: dict[str, Callable[[], object]] = {"plain": lambda stack=stack: plain_svd(stack)}
        for name, arguments in methods:
            candidates[name] = lambda stack=stack, arguments=arguments: restore(stack, **arguments)
        seconds = take_turns(candidates, device, rounds)
        ratios = " | ".join(f"{median_ratio(seconds[name], seconds['plain']):.2f}" for name in names)
        lines.append(f"| {case}: {count} × {n}² | {1e3 * statistics.median(seconds['plain']):.1f} | {ratios} |")
    return "\n".join(lines)


def compare_with_step(name: str, device: torch.device, method: Method, tokens: int, rounds: int) -> str:
    """One line of a Markdown table: one application to all 2-D weights in steps of `tokens` tokens."""
    model = MODELS[name]
    torch.manual_seed(0)
    with device:
        module = LanguageModel(model.config)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    restoration = Restoration(module, method=method)
    micro_batch = max(1, (8192 if device.type == "cuda" else 2048) // model.sequence_length)
    batch = torch.randint(model.config.vocab_size, (micro_batch, model.sequence_length + 1), device=device)
    micro_batches = max(1, tokens // (micro_batch * model.sequence_length))

    def step() -> None:
        for _ in range(micro_batches):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = module.loss(batch)
            (loss / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = take_turns({"step": step, "application": restoration.apply}, device, rounds)
    share = model.tokens_per_step / (micro_batches * batch[:, 1:].numel())
    r = median_ratio(seconds["application"], seconds["step"]) / share
    cell = f"| {name}, {sum(t.count for t in restoration.targets)} matrices | {method} "
    measured = f"| {micro_batches * batch[:, 1:].numel()} | {statistics.median(seconds['step']):.3f} "
    application = f"| {statistics.median(seconds['application']):.3f} | {r:.3f} | {r / 100:.4%} |"
    return cell + measured + application


def compare_models(device: torch.device, rounds: int) -> str:
    """Markdown table of step-equivalents; on a CPU without the model that does not fit it, on a share of a step."""
    names = list(MODELS) if device.type == "cuda" else ["NanoGPT-5M", "Sigma-40M"]
    methods: list[Method] = ["auto", "polynomial"] if device.type == "cpu" else ["auto", "polynomial_bf16"]
    lines = [
        "| model, all 2-D weights | method | tokens timed | step, s | application, s | r, steps | cost at P = 100 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in tqdm(names, desc="models"):
        tokens = MODELS[name].tokens_per_step if device.type == "cuda" else 2 * 2048
        lines += [compare_with_step(name, device, method, tokens, rounds) for method in methods]
    return "\n".join(lines)


def keep(report: str, folder: Path, name: str, hardware: str) -> None:
    """Prints a report and writes it to a file of the folder, named after the benchmark and the hardware."""
    print(f"\n{report}")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{hardware.lower().replace(' ', '-')}.md"
    file.write_text(report)
    print(f"Kept in {file}")


def main(rounds: int, threads: int, folder: Path) -> None:
    """Prints both tables and keeps them with date, device and versions."""
    for name, value in (("rounds", rounds), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    hardware = gpu or f"{platform.machine()} CPU"
    report = "\n".join(
        [
            f"# Cost of one application on {hardware}",
            "",
            f"`python -m benchmarks.application --rounds {rounds} --threads {threads}`: {provenance(gpu)}.",
            "Medians over rounds; the methods' columns are ratios to the plain way, an fp32 SVD per matrix.",
            "",
            compare_methods(device, rounds),
            "",
            "One application against one training step of the paper's tokens per batch (NanoGPT-5M 122,880, others",
            "65,536). Where fewer tokens were timed, the step is scaled up in proportion.",
            "",
            compare_models(device, rounds),
            "",
        ]
    )
    keep(report, folder, "application", hardware)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often the candidates take turns")
    parser.add_argument("--threads", type=int, default=1, help="threads that PyTorch may use on the CPU")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"), help="where the report goes")
    main(**vars(parser.parse_args()))
