"""What tests of several rooms share: text, comparisons of weights, trainers and processes."""

from __future__ import annotations

import os
import pydoc_data.topics
import re
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from msign_lightning.recipes.data import RandomWindows, Windows

if TYPE_CHECKING:
    from composer import Trainer
    from transformers import LlamaForCausalLM

PATIENCE = 180.0
"""Seconds that other processes have for what takes a few on a quiet machine."""
TEXT = next(iter(pydoc_data.topics.topics.values())).encode("ascii", "replace")


def calls_of_functions(work: Callable[[], object]) -> int:
    """How many functions `work` calls in this thread, of Python and of C: a cost that no load changes."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def write_examples(folder: Path) -> None:
    """The files of the page on studies of one's own program."""
    page = (Path(__file__).parent.parent / "docs" / "programs.md").read_text()
    for name, content in re.findall(r"```(?:python|yaml)\n# (\S+\.(?:py|yaml))\n(.*?)```", page, re.DOTALL):
        (folder / name).write_text(content)


def windows(batches: int, *, vocab_size: int = 96, sequence_length: int = 16) -> RandomWindows:
    """An epoch of batches of four windows of text, which a resumed run continues in its middle."""
    tokens = np.frombuffer(TEXT, dtype=np.uint8) % vocab_size
    return RandomWindows(Windows(tokens, sequence_length, vocab_size), batch_size=4, n_batches=batches)


def llama(dtype: torch.dtype = torch.float32, vocab_size: int = 96, positions: int = 32) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM  # not at once, for processes that need none

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
    )
    return LlamaForCausalLM(config).to(dtype)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies, by the names they have in one process."""
    return {name.removeprefix("module."): p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def composer_trainer(model: nn.Module, **arguments: Any) -> Trainer:
    """A quiet one for ten batches on the CPU."""
    from composer import Trainer

    defaults = {"max_duration": "10ba", "device": "cpu", "progress_bar": False, "seed": 0}
    return Trainer(model=model, **(defaults | arguments))


def on_two_ranks(function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returns in each of two processes, which form a group over gloo."""
    return on_ranks(2, function, folder, *arguments)


def on_ranks(
    ranks: int, function: Callable[..., Any], folder: Path, *arguments: Any, seconds: float = 180, lost: int = 0
) -> list[Any]:
    """What `function(rank, *arguments)` returns in each of several processes, which form a group over gloo.

    None for a process that was killed. All are killed, and the test fails, after so many seconds.

    Args:
        ranks: The number of processes.
        function: What each does.
        folder: An empty one.
        *arguments: Passed on.
        seconds: How long they may take.
        lost: How many of them, the last ones, don't return: they are killed or stopped, and not waited for.
    """
    (folder / "store").unlink(missing_ok=True)  # of an earlier group, whose ranks would be called otherwise
    context = mp.get_context("spawn")
    processes = [context.Process(target=_on_rank, args=(r, ranks, function, folder, arguments)) for r in range(ranks)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes[: ranks - lost]:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert codes[: ranks - lost] == [0] * (ranks - lost), f"exit codes {codes}; None is for {seconds} s being up"
    files = [folder / f"returned-{rank}.pt" for rank in range(ranks)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _on_rank(rank: int, ranks: int, function: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # What Composer wants to know.
    os.environ |= {
        "WORLD_SIZE": f"{ranks}",
        "LOCAL_WORLD_SIZE": f"{ranks}",
        "NODE_RANK": "0",
        "RANK": f"{rank}",
        "LOCAL_RANK": f"{rank}",
    }
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timeout)
    torch.save(function(rank, *arguments), folder / f"returned-{rank}.pt")
    if "LEAVE" in os.environ:  # a group that has lost a peer can hang when it ends
        os._exit(0)
    dist.destroy_process_group()
