"""Anybody's checkpoint: where its tensors lie in its files, what they are for, and a copy of it with some restored.

No code that a checkpoint names is ever run, and of its tensors only those that are asked for are read, one at a time.
"""

from __future__ import annotations

import importlib
import json
import math
import mmap
import os
import pickle
import re
import shutil
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from io import BytesIO
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor, nn
from tqdm import tqdm

from msign_lightning._version import __version__
from msign_lightning.linalg import Rule, check_options, top_singular_triplets
from msign_lightning.recognition import find_candidates
from msign_lightning.restoration import MatrixReport, Restorer
from msign_lightning.spectrum import COLD_ITERATIONS
from msign_lightning.targets import Cut, Group, Target, left_out, select_targets

__all__ = ["Checkpoint", "Measured", "Selection", "find_checkpoints", "measure", "read", "restore_copy", "select"]

_FLOATS = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
_SAFETENSORS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_STATES = ("current_model_state", "state_dict", "model_state_dict", "state.model", "model", "module")
"""Where a checkpoint keeps the weights of the model; the first, of Lightning, are those that are not averaged."""
_NOTE = "msign_restored"
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
        blocks, dtype = self.locate(), _FLOATS[self.dtype]
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
            block.map(_FLOATS[self.dtype], write=True).copy_(whole[block.place])


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
            names = dict.fromkeys(_json(index.read_bytes(), index).get("weight_map", {}).values())
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
        archive = _Archive(file, 0, size, checkpoint.allow)
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
        header = _json(opened.read(8 + length)[8:], file)
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end > size:
        raise ValueError(f"{file} must have at least {end} bytes, got {size}: it is truncated")
    for name, entry in header.items():
        shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
        dtype = _SAFETENSORS.get(entry["dtype"], entry["dtype"])
        if dtype in _FLOATS and last - first != math.prod(shape) * _FLOATS[dtype].itemsize:
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
                archive = _Archive(part, first, first + place["length"], checkpoint.allow)
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


def _find_state(content: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Where among what a pickle holds the weights of the model are, "" for the top, and what is there."""
    for path in (*_STATES, ""):
        state = _get(content, path) if path else content
        if isinstance(state, Mapping) and any(isinstance(value, _Tensor) for value in state.values()):
            return path, state
    return "", {}


def _take_state(content: Mapping[str, Any], checkpoint: Checkpoint, stored: Callable[[_Tensor], Stored]) -> None:
    _, state = _find_state(content)
    checkpoint.tensors |= {name: stored(value) for name, value in state.items() if isinstance(value, _Tensor)}
    checkpoint.unread += [name for name, value in state.items() if isinstance(value, Inert)]


def _find_step(checkpoint: Checkpoint) -> int | None:
    content = checkpoint.content
    if (trainer := checkpoint.path / "trainer_state.json").is_file():
        content = _json(trainer.read_bytes(), trainer)
    for value in (_get(content, path) for path in _STEPS):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    numbers = [match[1] or match[2] for match in _STEP_IN_NAME.finditer(checkpoint.path.name)]
    return int(numbers[-1]) if numbers else None


def _get(content: Any, path: str) -> Any:
    for part in path.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


def _json(text: bytes, file: Path) -> dict[str, Any]:
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


class _Archive:
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
        if tensor.dtype in _FLOATS:
            span = sum(step * (size - 1) for step, size in zip(tensor.stride, tensor.shape, strict=True))
            last = (tensor.offset + span + 1) * (itemsize := _FLOATS[tensor.dtype].itemsize)
            if min(tensor.offset, *tensor.stride, *tensor.shape) < 0 or (last > length and all(tensor.shape)):
                raise ValueError(f"a tensor of {self.file} must be within its storage, got {tensor}")
            begins += tensor.offset * itemsize
        block = Block(self.file, begins, tensor.shape, tensor.stride, (0,) * len(tensor.shape))
        return Stored(tensor.dtype, tensor.shape, partial(list, [block]))


# --- which of them are matrices ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """The matrices of a checkpoint, or of a model without one.

    Attributes:
        checkpoint: Where they are.
        model: The model without weights in which they were found.
        targets: What `select_targets` gave for it.
        stored: The tensor of each of their parameters, by its name.
        left_out: What of the blocks is not among them, in one line.
        how: By what they were recognised.
    """

    checkpoint: Checkpoint
    model: nn.Module
    targets: list[Target]
    stored: dict[str, Stored]
    left_out: str
    how: str

    @property
    def parameters(self) -> list[tuple[Stored, list[Target]]]:
        """The targets of each parameter."""
        groups = groupby(self.targets, lambda target: target.parameter_name)
        return [(self.stored[name], list(targets)) for name, targets in groups]


def select(
    path: str | Path,
    targets: str | Sequence[str] = "all_2d",
    *,
    exclude: str | Sequence[str] = (),
    cuts: Mapping[str, Cut] | None = None,
    model: str | None = None,
    allow: Sequence[str] = (),
) -> Selection:
    """Chooses the matrices of a checkpoint, as `select_targets` does those of a model.

    The model is built without weights: from `model`, else from the checkpoint's Hugging Face configuration. Without
    either, names and shapes must do, and what they leave open is an error that asks for a cut.

    Args:
        path: The file or folder.
        targets: "attention", "mlp", "all_2d" (both), or globs over parameter names.
        exclude: Globs over parameter names to leave out.
        cuts: Globs over parameter names → `Cut`, for parameters whose layout can't be known.
        model: "package.module:function" for a function that makes the model, or a Hugging Face config.json.
        allow: Python modules whose objects may occur in a pickle. None is made: they are passed over.

    Raises:
        ValueError: As `read` and `select_targets`; or the model has other parameters than the checkpoint.
    """
    checkpoint = read(path, allow=allow)
    skeleton, keys = _skeleton(checkpoint.tensors)
    named = {c.names[0]: checkpoint.tensors[keys[c.parameter]] for c in find_candidates(skeleton)}
    how, source, chosen = "names and shapes", model or checkpoint.config, []
    if source is not None:
        try:
            built = build(source)
            chosen = select_targets(built, targets, exclude=exclude, cuts=cuts)
            stored = _fit(chosen, named)
            return Selection(checkpoint, built, chosen, stored, _left(built, chosen, checkpoint), type(built).__name__)
        except _UnfitError as error:
            if model is not None:
                raise
            how += f", since the configuration beside them does not help: {error}"
    # Some classes store their experts under other names, but what has the same name and shape is the same.
    alike = [t for t in chosen if t.parameter_name in named and named[t.parameter_name].shape == t.parameter.shape]
    stated = [t.parameter_name for t in alike if any(fnmatchcase(t.parameter_name, glob) for glob in cuts or ())]
    cuts = {**{t.parameter_name: t.cut for t in alike if t.parameter_name not in stated}, **(cuts or {})}
    chosen = select_targets(skeleton, targets, exclude=exclude, cuts=cuts)
    for target in chosen:
        if not any(fnmatchcase(target.parameter_name, glob) for glob in cuts):
            _check_known(target, named, is_nanogpt="model_args" in checkpoint.content)
    stored = {target.parameter_name: named[target.parameter_name] for target in chosen}
    return Selection(checkpoint, skeleton, chosen, stored, _left(skeleton, chosen, checkpoint), how)


class _UnfitError(ValueError):
    """The model can't be built, or is not that of the checkpoint."""


def build(source: str | Path) -> nn.Module:
    """A model without weights, from "package.module:function" or a Hugging Face config.json (or its folder).

    Raises:
        ValueError: There is no such function or class.
    """
    path = Path(source)
    if path.exists():
        return _build_transformer(path if path.is_dir() else path.parent)
    module, _, name = str(source).partition(":")
    sys.path[:] = ["", *(entry for entry in sys.path if entry)]  # as for `python -m`
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model must be package.module:function or a config.json, got {source!r}: {error}") from error
    with torch.device("meta"):
        model = factory()
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must make a torch.nn.Module, got {type(model).__name__} of {source!r}")
    return model.to("meta")


def _build_transformer(folder: Path) -> nn.Module:
    try:
        transformers = importlib.import_module("transformers")
        (name,) = _json((folder / "config.json").read_bytes(), folder / "config.json")["architectures"]
        model_class = getattr(transformers, name)
        config = model_class.config_class.from_pretrained(folder)
        with torch.device("meta"):
            model: nn.Module = model_class(config)
        return model.to("meta")  # what a class makes of torch.FloatTensor, too
    except Exception as error:  # whatever a configuration makes a class of transformers raise
        raise _UnfitError(f"{folder / 'config.json'} must describe a class of transformers, got {error!r}") from error


def _fit(chosen: Sequence[Target], named: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of the parameters of a model, which the checkpoint may hold as a part, or of which it is one."""
    first = chosen[0].parameter_name
    parts = first.split(".")
    added = {name.removesuffix(first) for name in named if f".{name}".endswith(f".{first}")}
    dropped = {".".join(parts[:i]) + "." for i in range(1, len(parts)) if ".".join(parts[i:]) in named}
    names = {target.parameter_name: tuple(target.parameter.shape) for target in chosen}
    fits, missing = [], first
    for before, without in [*((prefix, "") for prefix in added), *(("", prefix) for prefix in dropped)]:
        found = {name: named.get(before + name.removeprefix(without)) for name in names}
        misfits = [n for n, s in found.items() if s is None or (s.dtype in _FLOATS and s.shape != names[n])]
        if misfits:
            missing = misfits[0]
        else:
            fits.append({name: stored for name, stored in found.items() if stored is not None})
    if len(fits) != 1:
        problem = f"{len(fits)} models like it" if fits else f"no {missing} of shape {names[missing]}"
        raise _UnfitError(f"the checkpoint must hold the parameters of the model once, got {problem}")
    return fits[0]


def _skeleton(tensors: Mapping[str, Stored]) -> tuple[nn.Module, dict[nn.Parameter, str]]:
    """Modules with the names and shapes of tensors, and the name of the tensor of each parameter."""
    root, keys = nn.Module(), {}
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""  # DistributedDataParallel's
    parents = {name: name.rsplit(".", 2)[0] for name in tensors}
    order = {parent: i for i, parent in enumerate(dict.fromkeys(parents.values()))}
    # Some tables are sorted by name, but a layer of an MLP is to come before one that takes in what it gives out.
    for name in sorted(tensors, key=lambda name: (order[parents[name]], *(-size for size in tensors[name].shape[:1]))):
        *path, leaf = name.removeprefix(prefix).split(".")
        module = root
        for i, part in enumerate(path):
            child = module._modules.get(part)
            if child is None:
                weight = tensors.get(f"{name.rpartition('.')[0]}.weight") if i == len(path) - 1 else None
                child = module._modules[part] = _layer(part, weight.shape if weight else ())
            module = child
        parameter = module._parameters[leaf] = nn.Parameter(torch.empty(tensors[name].shape, device="meta"))
        keys[parameter] = name
    return root, keys


class Conv1D(nn.Module):
    """Stands for that of Hugging Face, whose weight is (in, out)."""


def _layer(name: str, shape: Sequence[int]) -> nn.Module:
    """What a layer of this name, with a weight of this shape, seems to be."""
    if len(shape) != 2 or re.search(r"emb|pos|bias|table|norm|relative", name.lower()):
        return nn.Module()
    is_transposed = name == "c_attn" and shape[1] == 3 * shape[0]
    return Conv1D() if is_transposed else nn.Linear(1, 1, bias=False, device="meta")


def _check_known(target: Target, named: Mapping[str, Stored], *, is_nanogpt: bool) -> None:
    """Raises if names and shapes don't tell how a parameter is cut: there are classes that do it in another way."""
    path, _, layer = target.parameter_name.removesuffix(".weight").rpartition(".")
    labels, shape = target.cut.labels, tuple(target.parameter.shape)
    if target.group == "mlp":
        is_known = not target.cut.sizes or len(shape) == 2
    elif target.cut.sizes:
        is_known = layer == "in_proj_weight" or (layer == "c_attn" and (is_nanogpt or target.cut.dim == 1))
    else:  # some have the gate of the output among the queries
        outputs = [named.get(f"{path}.{name}.weight") for name in ("o_proj", "wo", "out_proj", "c_proj", "dense")]
        is_known = layer not in ("q_proj", "wq") or all(o is None or o.shape[-1] == shape[0] for o in outputs)
        labels = ("q", "gate")
    if not is_known:
        example = {target.parameter_name: {"sizes": [f"<{label}>" for label in labels], "names": list(labels)}}
        raise ValueError(
            f"{target.parameter_name} of shape {shape} looks like several matrices in one, and names and shapes alone "
            f"do not say how they lie: name the model (--model), or state it by cuts, as in {json.dumps(example)} "
            '("{}" if it is one matrix)'
        )


def _left(model: nn.Module, chosen: Sequence[Target], checkpoint: Checkpoint) -> str:
    unread = f"{len(checkpoint.unread)} no plain tensor ({', '.join(checkpoint.unread[:3])})"
    return ", ".join(part for part in (left_out(model, chosen), unread if checkpoint.unread else "") if part)


# --- what is done with them --------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """One matrix of a checkpoint; `note` says what is wrong with it, values that could not be had are NaN."""

    name: str
    group: Group
    shape: tuple[int, int]
    stable_rank: float
    spectral_norm: float
    frobenius_norm: float
    note: str


@torch.no_grad()
def measure(selection: Selection) -> Iterator[list[Measured]]:
    """Measures one parameter after the other, each matrix as `SpectrumMonitor` does the first time."""
    for stored, targets in selection.parameters:
        found = []
        for member in _members(targets, stored.read()) if stored.dtype in _FLOATS else ():
            W = member.matrix(member.parameter)  # in its own dtype, for a copy may be as large as all else together
            k, generator = min(2, *member.shape), torch.Generator().manual_seed(0)
            sigma = top_singular_triplets(W, k, iterations=COLD_ITERATIONS, generator=generator)[1][0, 0].item()
            norm = torch.linalg.vector_norm(W, dtype=torch.promote_types(W.dtype, torch.float32)).item()
            note = "not finite" if math.isnan(sigma) else "all zero" if sigma == 0 else ""
            rank = (norm / sigma) ** 2 if sigma else sigma
            found.append(Measured(member.name, member.group, member.shape, rank, sigma, norm, note))
        unknown = (math.nan,) * 3
        yield found or [
            Measured(name, t.group, t.shape, *unknown, stored.dtype) for t in targets for name in t.matrix_names
        ]


def restore_copy(source: str | Path, target: str | Path, rule: Rule = "msign", **options: Any) -> list[MatrixReport]:
    """Copies a checkpoint and restores matrices in the copy; all else stays as it is, bit for bit.

    The copy appears at once when it is complete. It says what was done: in msign.json within a folder or an archive,
    and under "msign_restored" in a pickle with more than weights and in the metadata of a .safetensors file.

    Args:
        source: The checkpoint.
        target: Where the copy goes; there must be nothing.
        rule: "msign" or "cap"; see `restore`.
        **options: As for `select`.

    Returns:
        What was done to each matrix.

    Raises:
        ValueError: As `read` and `select`; or `target` exists, or the copy would not be what a run goes on with.
    """
    source, target = Path(source), Path(target)
    if target.exists() or target.is_symlink():
        raise ValueError(f"the restored checkpoint must be a new file or folder, got {str(target)!r}, which exists")
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"the restored checkpoint must not be inside of {str(source)!r}, got {str(target)!r}")
    if source.is_dir() and (state := next(source.rglob("*_optim_states.pt"), None)):
        raise ValueError(f"the optimizer must not hold weights of its own, which it would put back, got {state}")
    check_options(rule=rule)
    if bad := [stored.dtype for stored in select(source, **options).stored.values() if stored.dtype not in _FLOATS]:
        raise ValueError(f"weights must be of {', '.join(_FLOATS)} to be restored, got {bad[0]}")
    copy = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if source.is_dir():
            shutil.copytree(source, copy, copy_function=shutil.copyfile)  # without the permissions of files
            copy.chmod(0o755)
        else:
            shutil.copyfile(source, copy)
        selection = select(copy, **options)
        reports: list[MatrixReport] = []
        for stored, members in tqdm(selection.parameters, desc="restored", unit="parameter", disable=None):
            whole = stored.read().contiguous()
            reports += Restorer(list(_members(members, whole)), rule=rule).apply().matrices
            stored.write_(whole)
        changed = {r.name: [r.stable_rank_before, r.stable_rank_after] for r in reports if r.changed}
        note = {"version": __version__, "source": source.name, "rule": rule, "stable_rank_before_and_after": changed}
        _add_note(copy, note, selection.checkpoint.allow)
        os.sync()
        copy.rename(target)
    finally:
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink(missing_ok=True)
    return reports


def _members(targets: Iterable[Target], whole: Tensor) -> Iterator[Target]:
    """Each matrix as a target of its own, in the memory of the whole parameter (..., m, n)."""
    stack = whole.flatten(0, -3) if whole.ndim > 2 else whole.unsqueeze(0)
    for target in targets:
        for name, matrix in zip(target.matrix_names, stack, strict=True):
            yield replace(target, name=name, parameter=nn.Parameter(matrix, requires_grad=False))


def _add_note(copy: Path, note: Mapping[str, Any], allow: Collection[str]) -> None:
    text = json.dumps(note, indent=2)
    if copy.is_dir():
        (copy / "msign.json").write_text(text)
        return
    with copy.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length.to_bytes(8, "little").startswith(b"PK"):
            _add_note_to_archive(copy, text, note, allow)
            return
        header = json.loads(opened.read(length))
        header["__metadata__"] = {**header.get("__metadata__", {}), _NOTE: text}
        new = json.dumps(header, separators=(",", ":")).encode()
        new += b" " * (-len(new) % 8)
        noted = copy.with_name(f"{copy.name}.noted")
        try:
            with noted.open("wb") as out:
                out.write(len(new).to_bytes(8, "little") + new)
                shutil.copyfileobj(opened, out, 1 << 24)
            noted.replace(copy)
        finally:
            noted.unlink(missing_ok=True)


def _add_note_to_archive(file: Path, text: str, note: Mapping[str, Any], allow: Collection[str]) -> None:
    """Adds msign.json and, to a mapping with more than weights, a key; and brings the checksums up to date."""
    made = _Archive(file, 0, file.stat().st_size, allow)
    with file.open("r+b") as opened:
        sums = {}
        for name, (begins, length) in made.records.items():
            sums[name] = 0
            opened.seek(begins)
            for start in range(0, length, 1 << 24):
                sums[name] = zlib.crc32(opened.read(min(1 << 24, length - start)), sums[name])
            if opened.read(4) == b"PK\x07\x08":
                opened.seek(opened.tell())
                opened.write(sums[name].to_bytes(4, "little"))
    records = {f"{made.root}msign.json": text.encode()}
    if _find_state(made.content)[0] and made.pickle.startswith(b"\x80\x02"):  # a mere state dict has no room
        # One more item for the mapping, which is all there is on the stack when a pickle stops.
        item = b"".join(pickle.dumps(value, 2)[2:-1] for value in (_NOTE, dict(note)))
        records[f"{made.root}data.pkl"] = made.pickle[:-1] + item + b"s."
    with ZipFile(file, "a") as archive:
        archive.filelist = [info for info in archive.filelist if info.filename not in records]
        archive.NameToInfo = {info.filename: info for info in archive.filelist}
        for info in archive.filelist:
            info.CRC = sums[info.filename]
        for name, content in records.items():
            archive.writestr(name, content)
