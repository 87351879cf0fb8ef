"""Anybody's checkpoint: what its tensors are for, what they measure, and a copy of it with some of them restored."""

from __future__ import annotations

import importlib
import json
import math
import os
import pickle
import re
import shutil
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import torch
from torch import Tensor, nn
from tqdm import tqdm

from msign_lightning._version import __version__
from msign_lightning.checkpoint_files import FLOATS, Archive, Checkpoint, Stored, find_state, parsed, read
from msign_lightning.linalg import Rule, check_options, top_singular_triplets
from msign_lightning.recognition import find_candidates
from msign_lightning.restoration import MatrixReport, Restorer
from msign_lightning.spectrum import COLD_ITERATIONS
from msign_lightning.targets import Cut, GroupName, Target, left_out, select_targets

__all__ = ["Measured", "Selection", "build", "measure", "restore_copy", "select"]

_NOTE = "msign_restored"


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
        (name,) = parsed((folder / "config.json").read_bytes(), folder / "config.json")["architectures"]
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
        misfits = [n for n, s in found.items() if s is None or (s.dtype in FLOATS and s.shape != names[n])]
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
    group: GroupName
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
        for member in _members(targets, stored.read()) if stored.dtype in FLOATS else ():
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
    if bad := [stored.dtype for stored in select(source, **options).stored.values() if stored.dtype not in FLOATS]:
        raise ValueError(f"weights must be of {', '.join(FLOATS)} to be restored, got {bad[0]}")
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
    made = Archive(file, 0, file.stat().st_size, allow)
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
    if find_state(made.content)[0] and made.pickle.startswith(b"\x80\x02"):  # a mere state dict has no room
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
