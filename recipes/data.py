"""Text → batches of token windows: random ones to train on, fixed ones to validate on."""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Tokens = npt.NDArray[np.integer[Any]]
Split = Literal["train", "val"]

HUB_PREFIX = "hf://"
SPLITS: tuple[Split, Split] = ("train", "val")


@dataclass(frozen=True)
class Windows:
    """The windows of T + 1 tokens in a text: T inputs and, shifted by one, T targets.

    Args:
        tokens: Tokens of shape (n,), n > T; an array or a memory map.
        sequence_length: Tokens predicted per window, T.
        vocab_size: A token at or above it is an error.
    """

    tokens: Tokens
    sequence_length: int
    vocab_size: int

    def at(self, offsets_B: npt.NDArray[np.integer[Any]]) -> Tensor:
        """Windows that start at the given offsets, of shape (B, T + 1), int64.

        Raises:
            ValueError: A token is outside the vocabulary.
        """
        windows_BL = self.tokens[offsets_B[:, None] + np.arange(self.sequence_length + 1)]
        # Looked at here because a whole memory map may be far larger than what a run ever reads.
        if windows_BL.max() >= self.vocab_size:
            raise ValueError(f"tokens must be below vocab_size {self.vocab_size}, got {windows_BL.max()}")
        return torch.from_numpy(windows_BL.astype(np.int64))


class RandomWindows:
    """An epoch of batches of windows at random offsets; a plain iterable that a trainer takes as a data loader.

    Batch i of a run is a function of (seed, i) alone. Of W processes, process r gets batches r, r + W, r + 2W, …: no
    two see the same one. The state is the number of batches given out, so that a checkpoint in the middle of an epoch
    continues with the next batch; the next epoch continues the count and sees new windows.

    One gather from an array or memory map costs less than passing it between processes: there are no workers.

    Args:
        windows: The text's windows.
        batch_size: Windows per batch, B.
        n_batches: Batches per epoch for this process.
        seed: Non-negative seed of the offsets.
        rank: This process, r.
        world_size: Number of processes, W.
    """

    def __init__(
        self, windows: Windows, batch_size: int, n_batches: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.windows = windows
        self.batch_size = batch_size
        self.n_batches = n_batches
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = 0

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.n_batches):
            index = self.position * self.world_size + self.rank
            self.position += 1
            yield self.batch(index)

    def batch(self, index: int) -> Tensor:
        """Batch `index` of the run, of shape (B, T + 1)."""
        random = np.random.default_rng((self.seed, index))
        n_offsets = len(self.windows.tokens) - self.windows.sequence_length
        return self.windows.at(random.integers(n_offsets, size=self.batch_size))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.position = state_dict["position"]


class FixedWindows:
    """Batches of the first non-overlapping windows of a text, in order; every process sees them all.

    Args:
        windows: The text's windows.
        batch_size: Windows per batch, B; the last batch may be smaller.
        max_windows: No more windows than this.
    """

    def __init__(self, windows: Windows, batch_size: int, max_windows: int) -> None:
        self.windows = windows
        self.batch_size = batch_size
        self.n_windows = min(max_windows, (len(windows.tokens) - 1) // windows.sequence_length)

    def __len__(self) -> int:
        return -(-self.n_windows // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, self.n_windows, self.batch_size):
            numbers_B = np.arange(first, min(first + self.batch_size, self.n_windows))
            yield self.windows.at(numbers_B * self.windows.sequence_length)


class TextDataModule(pl.LightningDataModule):
    """Batches of token windows (B, T + 1) from a text.

    An epoch is the whole run where the trainer has `max_steps`, else one text's worth of windows. Training windows are
    random, see `RandomWindows`; validation windows are fixed, see `FixedWindows`.

    Sources:
        "prose": English, the language's reference as Python installs it for `help` (`pydoc_data.topics`).
        "source": the top-level modules of Python's standard library.
        a file, or a folder of files: their bytes, in the order of their paths; hidden files are left out.
        a folder holding `train.bin` and `val.bin`: uint16 tokens as nanoGPT writes them, read as memory maps.
        "hf://name" or "hf://name:configuration": column "text" of split "train" of a Hugging Face dataset.

    Args:
        source: Where the text comes from.
        sequence_length: Tokens predicted per window, T.
        batch_size: Windows per batch and process, B.
        vocab_size: The model's; a token at or above it is an error.
        tokenizer: Name of a Hugging Face tokenizer; None for one token per byte.
        val_fraction: Share of the text, at its end, to validate on.
        val_windows: Validate on no more windows than this.
        seed: Seed of the training windows.

    Raises:
        ValueError: An argument is out of its range; or in `setup`, the source is missing or too short for one window
            in each split.
        ImportError: In `setup`, the source or tokenizer needs the extra `datasets`.
    """

    def __init__(
        self,
        source: str = "prose",
        sequence_length: int = 64,
        batch_size: int = 4,
        *,
        vocab_size: int = 256,
        tokenizer: str | None = None,
        val_fraction: float = 0.1,
        val_windows: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        positive = {
            "sequence_length": sequence_length,
            "batch_size": batch_size,
            "vocab_size": vocab_size,
            "val_windows": val_windows,
        }
        for name, value in positive.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.source = source
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.val_fraction = val_fraction
        self.val_windows = val_windows
        self.seed = seed
        self.windows: dict[Split, Windows] = {}
        self._position = 0
        self._train: RandomWindows | None = None

    def setup(self, stage: str) -> None:
        self._position = 0
        if self.windows:
            return
        for split, tokens in zip(SPLITS, self._tokens(), strict=True):
            if len(tokens) <= self.sequence_length:
                raise ValueError(
                    f"source {self.source!r} must hold more than sequence_length {self.sequence_length} tokens "
                    f"to {split} on, got {len(tokens)}"
                )
            self.windows[split] = Windows(tokens, self.sequence_length, self.vocab_size)

    def train_dataloader(self) -> RandomWindows:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.trainer and self.trainer.max_steps > 0:
            n_batches = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        else:
            n_tokens = len(self.windows["train"].tokens)
            n_batches = max(1, n_tokens // (self.sequence_length * self.batch_size * world_size))
        self._train = RandomWindows(
            self.windows["train"], self.batch_size, n_batches, seed=self.seed, rank=rank, world_size=world_size
        )
        self._train.position = self._position
        return self._train

    def val_dataloader(self) -> FixedWindows:
        return FixedWindows(self.windows["val"], self.batch_size, self.val_windows)

    # Lightning restores a loader's own state only if nothing asked for the loader before, as the learning rate schedule
    # of a run that counts epochs must; hence the state is the data module's as well.
    def state_dict(self) -> dict[str, int]:
        return {} if self._train is None else self._train.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._position = state_dict["position"]

    def _tokens(self) -> tuple[Tokens, Tokens]:
        """Tokens to train and to validate on."""
        folder = Path(self.source)
        files = [folder / f"{split}.bin" for split in SPLITS]
        present = [file for file in files if file.is_file()]
        if not present:
            tokens = _encode(_read(self.source), self.tokenizer)
            cut = len(tokens) - round(len(tokens) * self.val_fraction)
            return tokens[:cut], tokens[cut:]
        if present != files:
            raise ValueError(f"source {self.source!r} must hold train.bin and val.bin, got only {present[0].name}")
        if self.tokenizer is not None:
            raise ValueError(f"tokenizer must be None for files of tokens, got {self.tokenizer!r}")
        return _memory_map(files[0]), _memory_map(files[1])


def _memory_map(file: Path) -> Tokens:
    size = file.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{file} must hold uint16 tokens, got {size} bytes")
    return np.memmap(file, dtype="<u2", mode="r")


def _read(source: str) -> bytes:
    if source == "prose":
        from pydoc_data.topics import topics  # half a megabyte of strings

        return "\n\n".join(topics.values()).encode()
    if source == "source":
        return _read_files(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    if source.startswith(HUB_PREFIX):
        name, _, configuration = source.removeprefix(HUB_PREFIX).partition(":")
        dataset = _import("datasets", f"source {source!r}").load_dataset(name, configuration or None, split="train")
        return "\n\n".join(dataset["text"]).encode()
    path = Path(source)
    if path.is_file():
        return path.read_bytes()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return _read_files([file for file in files if not _is_hidden(file.relative_to(path))])
    raise ValueError(f"source must be 'prose', 'source', an existing file or folder, or hf://name, got {source!r}")


def _read_files(files: list[Path]) -> bytes:
    return b"\n\n".join(file.read_bytes() for file in files)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _encode(text: bytes, tokenizer: str | None) -> Tokens:
    if tokenizer is None:
        return np.frombuffer(text, dtype=np.uint8)
    encoder = _import("transformers", f"tokenizer {tokenizer!r}").AutoTokenizer.from_pretrained(tokenizer)
    ids = encoder(text.decode(errors="replace"), add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int32)


def _import(package: str, what: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{what} needs the package {package}: pip install 'msign-lightning[datasets]'") from error
