"""Text → batches of token windows: random or streamed ones to train on, fixed ones to validate on."""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Tokens = npt.NDArray[np.integer[Any]]
Split = Literal["train", "val"]

HUB_PREFIX = "hf://"
SPLITS: tuple[Split, Split] = ("train", "val")
CHECKED_TOKENS = 2**24
"""So many tokens of a text are compared with the vocabulary before training, the others when they are read."""


class TrainingBatches(Protocol):
    """Batches (B, T + 1) for a trainer, which can be continued."""

    position: int

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


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


class TokenStream:
    """The tokens of a stream of documents, one after another and again from the start when they end.

    Args:
        documents: A streamed Hugging Face dataset with a column "text".
        encode: Text of a document → its tokens, the separator included.
    """

    def __init__(self, documents: Any, encode: Callable[[str], Tokens]) -> None:
        self.documents = documents
        self.encode = encode
        self._rest: Tokens = np.zeros(0, dtype=np.int64)
        self._iterator: Iterator[Any] | None = None

    def take(self, n: int) -> Tokens:
        """The next n tokens.

        Raises:
            ValueError: The documents hold no token, or no text.
        """
        parts, size, ends = [self._rest], len(self._rest), 0
        while size < n:
            self._iterator = iter(self.documents) if self._iterator is None else self._iterator
            document = next(self._iterator, None)
            if document is None:
                self._iterator = None
                ends += 1
                if ends == 2 and size == len(self._rest):
                    raise ValueError("the stream must hold tokens, got none")
                continue
            if "text" not in document:
                raise ValueError(f"documents must have a column 'text', got {', '.join(document)}")
            parts.append(self.encode(document["text"]))
            size += len(parts[-1])
        tokens = np.concatenate(parts)
        self._rest = tokens[n:]
        return tokens[:n]

    def end_document(self) -> None:
        """Leaves out what is left of the document at hand."""
        self._rest = self._rest[:0]

    def state_dict(self) -> dict[str, Any]:
        return {"documents": self.documents.state_dict(), "rest": self._rest.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.documents.load_state_dict(state_dict["documents"])
        self._rest = np.asarray(state_dict["rest"], dtype=np.int64)
        self._iterator = None


class StreamedWindows:
    """Batches of the windows of a stream, in its order; a plain iterable that a trainer takes as a data loader.

    Batch i of a run is the i-th of the stream, whatever the number of processes: of W processes each reads the whole
    stream, and process r gives out batches r, r + W, r + 2W, … So the state of one process stands for all, and a
    checkpoint can be resumed by another number of them. One process of tokenizing feeds tens of thousands of tokens a
    second to each; where that is too slow, write `train.bin` and `val.bin` once.

    Args:
        stream: The tokens.
        sequence_length: Tokens predicted per window, T.
        vocab_size: A token at or above it is an error.
        batch_size: Windows per batch, B.
        n_batches: Batches for this process.
        rank: This process, r.
        world_size: Number of processes, W.
    """

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        vocab_size: int,
        batch_size: int,
        n_batches: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stream = stream
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.batch_size = batch_size
        self.n_batches = n_batches
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        self._drawn = 0  # batches taken from the stream

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.n_batches):
            index = self.position * self.world_size + self.rank
            length = self.sequence_length + 1
            while self._drawn <= index:
                tokens = self.stream.take(self.batch_size * length)
                self._drawn += 1
            self.position += 1
            yield Windows(tokens, self.sequence_length, self.vocab_size).at(np.arange(self.batch_size) * length)

    def state_dict(self) -> dict[str, Any]:
        state = {"position": self.position, "drawn": self._drawn, "world_size": self.world_size}
        return {**state, "stream": self.stream.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = state_dict["position"] * state_dict["world_size"] // self.world_size
        self._drawn = state_dict["drawn"]
        self.stream.load_state_dict(state_dict["stream"])


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
        a folder holding `train.bin` and `val.bin`: uint16 tokens as nanoGPT writes them (uint32 for a vocabulary above
            65,536), read as memory maps.
        "hf://name" or "hf://name:configuration": column "text" of split "train" of a Hugging Face dataset, streamed in
            its order, see `StreamedWindows`. Its first documents are those to validate on.

    Args:
        source: Where the text comes from.
        sequence_length: Tokens predicted per window, T.
        batch_size: Windows per batch and process, B.
        vocab_size: The model's; a token at or above it is an error.
        tokenizer: Name of a Hugging Face tokenizer; None for one token per byte.
        val_fraction: Share of the text, at its end, to validate on.
        val_windows: Validate on no more windows than this.
        seed: Seed of the training windows; a streamed source has no use for it.

    Raises:
        ValueError: An argument is out of its range; or in `setup`, the source is missing, can't be reached, is too
            short for one window in each split, or is seen to have tokens of another vocabulary.
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
        self._stream: TokenStream | None = None
        self._state: dict[str, Any] = {}
        self._train: TrainingBatches | None = None

    def setup(self, stage: str) -> None:
        self._state = {}
        if self.source.startswith(HUB_PREFIX):
            self._open_stream()
            return
        if self.windows:
            return
        for split, tokens in zip(SPLITS, self._tokens(), strict=True):
            if len(tokens) <= self.sequence_length:
                raise ValueError(
                    f"source {self.source!r} must hold more than sequence_length {self.sequence_length} tokens "
                    f"to {split} on, got {len(tokens)}"
                )
            self.windows[split] = Windows(tokens, self.sequence_length, self.vocab_size)
            if (largest := int(tokens[:CHECKED_TOKENS].max())) >= self.vocab_size:
                kind = f"{tokens.dtype.name} tokens"
                raise ValueError(f"source {self.source!r} must hold {kind} below {self.vocab_size}, got {largest}")

    def _open_stream(self) -> None:
        name, _, configuration = self.source.removeprefix(HUB_PREFIX).partition(":")
        package = _import("datasets", f"source {self.source!r}")
        try:
            documents = package.load_dataset(name, configuration or None, split="train", streaming=True)
        except (OSError, ValueError) as error:
            raise _unreachable("source", self.source, error) from error
        self._stream = TokenStream(documents, _encoder(self.tokenizer))
        held_out = self._stream.take(self.val_windows * self.sequence_length + 1)
        self._stream.end_document()
        self.windows["val"] = Windows(held_out, self.sequence_length, self.vocab_size)

    def train_batches(self, n_batches: int, rank: int = 0, world_size: int = 1) -> TrainingBatches:
        """So many batches for one of several processes, random or, of a stream, the next ones."""
        if self._stream is None:
            windows = self.windows["train"]
            return RandomWindows(windows, self.batch_size, n_batches, seed=self.seed, rank=rank, world_size=world_size)
        shape = self.sequence_length, self.vocab_size, self.batch_size
        return StreamedWindows(self._stream, *shape, n_batches, rank=rank, world_size=world_size)

    def train_dataloader(self) -> TrainingBatches:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.trainer and self.trainer.max_steps > 0:
            n_batches = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        elif self._stream is not None:
            raise ValueError(f"the trainer's max_steps must be set for the stream {self.source!r}")
        else:
            n_tokens = len(self.windows["train"].tokens)
            n_batches = max(1, n_tokens // (self.sequence_length * self.batch_size * world_size))
        self._train = self.train_batches(n_batches, rank, world_size)
        if self._state:
            self._train.load_state_dict(self._state)
        return self._train

    def val_dataloader(self) -> FixedWindows:
        return FixedWindows(self.windows["val"], self.batch_size, self.val_windows)

    # Lightning restores a loader's own state only if nothing asked for the loader before, as the learning rate schedule
    # of a run that counts epochs must; hence the state is the data module's as well.
    def state_dict(self) -> dict[str, Any]:
        return {} if self._train is None else self._train.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict

    def _tokens(self) -> tuple[Tokens, Tokens]:
        """Tokens to train and to validate on."""
        folder = Path(self.source)
        files = [folder / f"{split}.bin" for split in SPLITS]
        present = [file for file in files if file.is_file()]
        if not present:
            text = _read(self.source)
            tokens = _encoder(self.tokenizer, separate=False)(text)
            cut = len(tokens) - round(len(tokens) * self.val_fraction)
            return tokens[:cut], tokens[cut:]
        if present != files:
            raise ValueError(f"source {self.source!r} must hold train.bin and val.bin, got only {present[0].name}")
        if self.tokenizer is not None:
            raise ValueError(f"tokenizer must be None for files of tokens, got {self.tokenizer!r}")
        return _memory_map(files[0], self.vocab_size), _memory_map(files[1], self.vocab_size)


def _memory_map(file: Path, vocab_size: int) -> Tokens:
    dtype, size = np.dtype("<u2" if vocab_size <= 2**16 else "<u4"), file.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise ValueError(f"{file} must hold {dtype.name} tokens, got {size} bytes")
    return np.memmap(file, dtype=dtype, mode="r")


def _read(source: str) -> bytes:
    if source == "prose":
        from pydoc_data.topics import topics  # half a megabyte of strings

        return "\n\n".join(topics.values()).encode()
    if source == "source":
        return _read_files(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
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


def _encoder(tokenizer: str | None, *, separate: bool = True) -> Callable[[str | bytes], Tokens]:
    """Text → tokens: bytes, or those of a Hugging Face tokenizer; on request with a separator after each text."""
    if tokenizer is None:
        end = b"\n\n" if separate else b""
        return lambda text: np.frombuffer((text.encode() if isinstance(text, str) else text) + end, dtype=np.uint8)
    package = _import("transformers", f"tokenizer {tokenizer!r}")
    try:
        encoder = package.AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise _unreachable("tokenizer", tokenizer, error) from error
    ends = [encoder.eos_token_id] if separate and encoder.eos_token_id is not None else []

    def encode(text: str | bytes) -> Tokens:
        text = text if isinstance(text, str) else text.decode(errors="replace")
        return np.asarray(encoder(text, add_special_tokens=False, verbose=False)["input_ids"] + ends, dtype=np.int32)

    return encode


def _unreachable(argument: str, value: str, error: Exception) -> ValueError:
    reason = str(error).split("\n")[0]
    return ValueError(
        f"{argument} must be something that can be read, got {value!r} ({reason}); source 'prose' with no tokenizer is "
        "text that comes with Python"
    )


def _import(package: str, what: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{what} needs the package {package}: pip install 'msign-lightning[datasets]'") from error
