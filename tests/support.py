"""What tests of several rooms share: text, comparisons of weights, trainers and processes."""

from __future__ import annotations

import os
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from msign_lightning.recipes.data import RandomWindows, Windows

if TYPE_CHECKING:
    from composer import Trainer

TEXT = next(iter(pydoc_data.topics.topics.values())).encode("ascii", "replace")


def windows(batches: int, *, vocab_size: int = 96, sequence_length: int = 16) -> RandomWindows:
    """An epoch of batches of four windows of text, which a resumed run continues in its middle."""
    tokens = np.frombuffer(TEXT, dtype=np.uint8) % vocab_size
    return RandomWindows(Windows(tokens, sequence_length, vocab_size), batch_size=4, n_batches=batches)


def llama(dtype: torch.dtype = torch.float32, vocab_size: int = 96, positions: int = 32) -> LlamaForCausalLM:
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
    mp.spawn(_on_rank, (function, folder, arguments), nprocs=2)
    return [torch.load(folder / f"returned-{rank}.pt", weights_only=False) for rank in range(2)]


def _on_rank(rank: int, function: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # What Composer wants to know.
    os.environ |= {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "RANK": f"{rank}",
        "LOCAL_RANK": f"{rank}",
    }
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(function(rank, *arguments), folder / f"returned-{rank}.pt")
    dist.destroy_process_group()
