"""Files of anybody's checkpoint: where its tensors lie in them.

No code that a checkpoint names is ever run, and of its tensors only those that are asked for are read, one at a time.
"""

from __future__ import annotations

import json
import math
import mmap
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor

__all__ = ["FLOATS", "Archive", "Checkpoint", "Stored", "find_checkpoints", "find_state", "parsed", "read"]

FLOATS = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
_SAFETENSORS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_STATES = ("current_model_state", "state_dict", "model_state_dict", "state.model", "model", "module")
"""Where a checkpoint keeps the weights of the model; the first, of Lightning, are those that are not averaged."""
_STEPS = ("global_step", "state.timestamp.Timestamp.batch", "iter_num", "step", "iteration")
_STEP_IN_NAME = re.compile(r"(?:step|iter|ba|checkpoint)[-_=]?(\d+)|^(\d+)(?=\.|$)")


# --- where tensors lie -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A block of a tensor in a file: its first byte there, and its first index in the tensor."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    origin: tuple[int, ...]

    @property
    def place(self) -> tuple[slice, ...]:
        """Where it is in the tensor."""
        return tuple(slice(first, first + size) for first, size in zip(self.origin, self.shape, strict=True))

    def map(self, dtype: torch.dtype, *, write: bool = False) -> Tensor:
        """The block, in a window on the file; a change stays in memory unless `write`."""
        count = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        end = self.offset + count * dtype.itemsize
        if (size := self.file.stat().st_size) < end:
            raise ValueError(f"{self.file} must have at least {end} bytes, got {size}: it is truncated")
        first = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        access = mmap.ACCESS_WRITE if write else mmap.ACCESS_COPY
        with self.file.open("r+b" if write else "rb") as file:
            window = mmap.mmap(file.fileno(), end - first, access=access, offset=first)
        flat = torch.frombuffer(window, dtype=dtype, count=count, offset=self.offset - first)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: the name of its dtype, its shape, and how to find its blocks."""

    dtype: str
    shape: tuple[int, ...]
    locate: Callable[[], list[Block]]

    def read(self) -> Tensor:
        """A copy, which fills memory only as far as it is looked at if the tensor is in one block."""
        blocks, dtype = self.locate(), FLOATS[self.dtype]
        if sum(math.prod(block.shape) for block in blocks) != math.prod(self.shape):
            raise ValueError(f"blocks must make up a tensor of {self.shape}, got {[b.shape for b in blocks]}")
        if len(blocks) == 1:
            return blocks[0].map(dtype)
        whole = torch.empty(self.shape, dtype=dtype)
        for block in blocks:
            whole[block.place] = block.map(dtype)
        return whole

    def write_(self, whole: Tensor) -> None:
        for block in self.locate():
            block.map(FLOATS[self.dtype], write=True).copy_(whole[block.place])


@dataclass
class Checkpoint:
    """What is known of a checkpoint before its tensors are read.

    Attributes:
        path: The file or folder.
        allow: Python modules whose objects may occur in its pickles.
        step: The optimizer step, if it says so.
        tensors: Those of the model, by name.
        unread: Entries of the model that are no plain tensors, but quantised ones for instance.
        content: What else a pickle holds, as plain values and `Inert` things.
        config: File with the configuration of a Hugging Face model.
    """

    path: Path
    allow: Collection[str] = ()
    step: int | None = None
    tensors: dict[str, Stored] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    content: dict[str, Any] = field(default_factory=dict)
    config: Path | None = None


def find_checkpoints(paths: Iterable[str | Path]) -> list[Path]:
    """The checkpoints themselves and, of a folder of several, those in it, in the order of the numbers in the names."""
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"checkpoints must exist, got {str(path)!r}")
        inside = []
        if path.is_dir():
            # A link to a neighbour ("last.ckpt") would only repeat it.
            children = [p for p in path.iterdir() if p.resolve() == path.resolve() / p.name]
            files = (
                {p for p in children if p.suffix in _SUFFIXES and p.is_file()} if _weight_files(path) is None else ()
            )
            inside = [p for p in children if p in files or (p.is_dir() and _weight_files(p) is not None)]
            inside.sort(key=lambda p: [part.zfill(20) for part in re.split(r"(\d+)", p.name)])
        found += inside or [path]
    return found


def read(path: str | Path, *, allow: Collection[str] = ()) -> Checkpoint:
    """Finds out what is in a checkpoint.

    These are known: .safetensors, alone or several with an index; folders of Hugging Face models; files of `torch.save`
    (Lightning, Composer, nanoGPT, plain state dicts); folders of `torch.distributed.checkpoint`.

    Args:
        path: The file or folder.
        allow: Python modules whose objects may occur in a pickle. None is made: they are passed over.

    Raises:
        ValueError: It is none of these, damaged, or a pickle names what is not allowed.
    """
    path = Path(path)
    checkpoint = Checkpoint(path, allow)
    files = _weight_files(path) if path.is_dir() else [path]
    if files is None:
        raise ValueError(f"checkpoint must be a file or a folder with weights, got {str(path)!r}")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{path} must hold all its files, got no {file.name}")
        with _sound(file):
            _read_file(file, checkpoint)
    if not checkpoint.tensors:
        raise ValueError(f"{path} must hold the weights of a model, got {list(checkpoint.content) or 'no tensors'}")
    config = (path if path.is_dir() else path.parent) / "config.json"
    checkpoint.config = config if config.is_file() and (path.is_dir() or path.suffix == ".safetensors") else None
    checkpoint.step = _find_step(checkpoint)
    return checkpoint


@contextmanager
def _sound(file: Path) -> Iterator[None]:
    """Turns what damaged files make readers raise into an error that names the file."""
    try:
        yield
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError, struct.error) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} must be a sound checkpoint, got: {reason}") from error


def _weight_files(folder: Path) -> list[Path] | None:
    """The files of a folder that hold the weights of one model; None where it is no checkpoint."""
    if (folder / ".metadata").is_file():
        return [folder / ".metadata", *folder.glob("meta.pt")]  # the second is of Lightning
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (index := folder / f"{name}.index.json").is_file():
            names = dict.fromkeys(parsed(index.read_bytes(), index).get("weight_map", {}).values())
            if any(Path(name).name != name for name in names):
                raise ValueError(f"{index} must name files beside it, got {list(names)}")
            return [folder / name for name in names]
        if (folder / name).is_file():
            return [folder / name]
    others = list(folder.glob("*.safetensors"))
    return others if len(others) == 1 else None


def _read_file(file: Path, checkpoint: Checkpoint) -> None:
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(9)
    if file.name == ".metadata":
        _read_distributed(file, checkpoint)
    elif start.startswith(b"PK"):
        archive = Archive(file, 0, size, checkpoint.allow)
        checkpoint.content |= dict(archive.content)
        if file.name != "meta.pt":
            _take_state(archive.content, checkpoint, archive.stored)
    elif start[8:] == b"{":
        _read_safetensors(file, size, int.from_bytes(start[:8], "little"), checkpoint)
    else:
        what = "of torch.save before PyTorch 1.6" if start.startswith((b"\x80", b"\x8a")) else "of another kind"
        raise ValueError(f"{file} must be of safetensors or torch.save, got {size} bytes {what if size else ''}")


def _read_safetensors(file: Path, size: int, length: int, checkpoint: Checkpoint) -> None:
    if 8 + length > size:
        raise ValueError(f"{file} must have at least {8 + length} bytes, got {size}: it is truncated")
    with file.open("rb") as opened:
        header = parsed(opened.read(8 + length)[8:], file)
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end > size:
        raise ValueError(f"{file} must have at least {end} bytes, got {size}: it is truncated")
    for name, entry in header.items():
        shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
        dtype = _SAFETENSORS.get(entry["dtype"], entry["dtype"])
        if dtype in FLOATS and last - first != math.prod(shape) * FLOATS[dtype].itemsize:
            raise ValueError(f"{name} of {file} must have the bytes of {shape}, got {last - first}")
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        block = Block(file, 8 + length + first, shape, stride, (0,) * len(shape))
        checkpoint.tensors[name] = Stored(dtype, shape, partial(list, [block]))


def _read_distributed(file: Path, checkpoint: Checkpoint) -> None:
    """What `torch.distributed.checkpoint` wrote: every block of a tensor is a file of `torch.save` within a file."""
    metadata = _Unpickler(BytesIO(file.read_bytes()), checkpoint.allow).load().state
    entries = {name: entry.state for name, entry in metadata["state_dict_metadata"].items() if "chunks" in entry.state}
    places = {(i.state["fqn"], i.state.get("offset")): info.state for i, info in metadata["storage_data"].items()}

    def locate(name: str) -> list[Block]:
        blocks = []
        for origin in (chunk.state["offsets"] for chunk in entries[name]["chunks"]):
            place = places.get((name, origin), {})
            part, first = file.parent / place.get("relative_path", ""), place.get("offset", 0)
            if part.parent != file.parent or not part.is_file() or place.get("transform_descriptors"):
                raise ValueError(f"{file.parent} must hold all its files, uncompressed, got no {part.name} for {name}")
            with _sound(part):
                archive = Archive(part, first, first + place["length"], checkpoint.allow)
                blocks += [replace(block, origin=origin) for block in archive.stored(archive.content).locate()]
        return blocks

    content: dict[str, Any] = {}
    for name, entry in entries.items():
        *path, last = (metadata.get("planner_data") or {}).get(name, (name,))
        inner = content
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = _Tensor(entry["properties"].state[0], name, 0, entry["size"], ())
    _take_state(content, checkpoint, lambda tensor: Stored(tensor.dtype, tensor.shape, partial(locate, tensor.key)))


def find_state(content: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Where among what a pickle holds the weights of the model are, "" for the top, and what is there."""
    for path in (*_STATES, ""):
        state = _get(content, path) if path else content
        if isinstance(state, Mapping) and any(isinstance(value, _Tensor) for value in state.values()):
            return path, state
    return "", {}


def _take_state(content: Mapping[str, Any], checkpoint: Checkpoint, stored: Callable[[_Tensor], Stored]) -> None:
    _, state = find_state(content)
    checkpoint.tensors |= {name: stored(value) for name, value in state.items() if isinstance(value, _Tensor)}
    checkpoint.unread += [name for name, value in state.items() if isinstance(value, Inert)]


def _find_step(checkpoint: Checkpoint) -> int | None:
    content = checkpoint.content
    if (trainer := checkpoint.path / "trainer_state.json").is_file():
        content = parsed(trainer.read_bytes(), trainer)
    for value in (_get(content, path) for path in _STEPS):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    numbers = [match[1] or match[2] for match in _STEP_IN_NAME.finditer(checkpoint.path.name)]
    return int(numbers[-1]) if numbers else None


def _get(content: Any, path: str) -> Any:
    for part in path.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


def parsed(text: bytes, file: Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:  # that of a wrong encoding is one, too
        raise ValueError(f"{file} must hold sound JSON, got: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a mapping, got {type(values).__name__}")
    return values


# --- pickles, without their code ---------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    """A tensor in a pickle: a view of the storage `key`."""

    dtype: str
    key: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """What stands for an object of any class: it takes in whatever the pickle says, and does nothing."""

    state: Any = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return self

    def append(self, *args: Any) -> None:
        """Nothing, like all that follows."""

    extend = add = update = __setitem__ = append


def _rebuild(storage: _Tensor, offset: int, shape: Any, stride: Any, *rest: Any) -> _Tensor:
    dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], str) else storage.dtype  # `_rebuild_tensor_v3` says it
    return _Tensor(dtype, storage.key, offset, tuple(shape), tuple(stride))


_MADE: Mapping[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *args: {},
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild,
    "torch._utils._rebuild_parameter": lambda tensor, *rest: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *rest: tensor,
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, kind, args, state: rebuild(*args),
    **{f"torch.{name}": name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)},
}
"""What is made of a pickle, by functions of ours."""
_STORAGES = {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Char": "int8"}
_PASSED_OVER = re.compile(
    r"(accelerate|composer|lightning\w*|llmfoundry|numpy|omegaconf|pytorch_lightning|torch|torchmetrics|transformers"
    r"|_codecs|argparse|collections|copy_?reg|datetime|enum|functools|pathlib|typing)\..*"
    r"|builtins\.(bytearray|complex|frozenset|getattr|object|range|set|slice)"
)
"""What is passed over. All else is refused: it would not be run either, but tells what a checkpoint may be."""


class _Unpickler(pickle.Unpickler):
    """Makes plain values, descriptions of tensors, and `Inert` things."""

    def __init__(self, file: BytesIO, allow: Collection[str]) -> None:
        super().__init__(file, encoding="utf-8")
        self._allow = allow

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _MADE:
            return _MADE[full]
        if name.endswith("Storage") and module.split(".")[0] == "torch":
            word = name.removesuffix("Storage")
            return _STORAGES.get(word, word.lower())
        if not _PASSED_OVER.fullmatch(full) and module not in self._allow:
            raise pickle.UnpicklingError(
                f"a pickle that names {full}, which is refused since it may be hostile; nothing of it has been run. "
                f"Where it is known to be harmless: --allow {module}"
            )
        return Inert

    def persistent_load(self, pid: Any) -> _Tensor:
        _, dtype, key, _, count = pid
        return _Tensor(dtype, key, 0, (count,), (1,))


class Archive:
    """What `torch.save` wrote to a file, or to the part of it from `start` to `end`."""

    def __init__(self, file: Path, start: int, end: int, allow: Collection[str]) -> None:
        self.file = file
        first = start - start % mmap.ALLOCATIONGRANULARITY
        with file.open("rb") as opened:
            try:
                window = mmap.mmap(opened.fileno(), end - first, access=mmap.ACCESS_READ, offset=first)
                archive = ZipFile(window)  # type: ignore[call-overload]
            except (BadZipFile, ValueError) as error:
                raise ValueError(f"{file} must be a sound archive of torch.save, got: {error}") from error
        with window, archive:
            names = [name for name in archive.namelist() if re.fullmatch(r"[^/]*/data\.pkl", name)]
            if len(names) != 1 or any(info.compress_type != ZIP_STORED for info in archive.infolist()):
                raise ValueError(f"{file} must be what torch.save wrote, got an archive of {archive.namelist()[:3]}")
            self.root = names[0].removesuffix("data.pkl")
            self.records: dict[str, tuple[int, int]] = {}  # where each begins in the file, and its length
            for info in archive.infolist():
                lengths = window[
                    info.header_offset + 26 : info.header_offset + 30
                ]  # of its name, and of an extra field
                begins = first + info.header_offset + 30 + sum(struct.unpack("<HH", lengths))
                self.records[info.filename] = (begins, info.file_size)
            begins, length = self.records[names[0]]
            self.pickle = window[begins - first : begins - first + length]
        self.content: Any = _Unpickler(BytesIO(self.pickle), allow).load()

    def stored(self, tensor: _Tensor) -> Stored:
        begins, length = self.records[f"{self.root}data/{tensor.key}"]
        if tensor.dtype in FLOATS:
            span = sum(step * (size - 1) for step, size in zip(tensor.stride, tensor.shape, strict=True))
            last = (tensor.offset + span + 1) * (itemsize := FLOATS[tensor.dtype].itemsize)
            if min(tensor.offset, *tensor.stride, *tensor.shape) < 0 or (last > length and all(tensor.shape)):
                raise ValueError(f"a tensor of {self.file} must be within its storage, got {tensor}")
            begins += tensor.offset * itemsize
        block = Block(self.file, begins, tensor.shape, tensor.stride, (0,) * len(tensor.shape))
        return Stored(tensor.dtype, tensor.shape, partial(list, [block]))
