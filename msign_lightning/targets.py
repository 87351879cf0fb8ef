"""From a model to the matrices that MSign restores (arXiv 2602.01734, Algorithm 1 and Sec. 5).

Models store several matrices in one parameter (fused QKV, fused gate and up, stacks of experts), and the sign of a
stacked matrix is not the stack of the signs. So a `Target` is a parameter together with a `Cut`. One that looks fused
in a way that is not known is an error that asks for a cut, never a guess.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from msign_lightning.recognition import Candidate, Cut, GroupName, find_candidates, find_cut, likely_pieces

__all__ = ["Cut", "EmptySelectionError", "GroupName", "Target", "format_targets", "left_out", "select_targets"]

PRESETS: Mapping[str, tuple[GroupName, ...]] = {
    "attention": ("attention",),
    "mlp": ("mlp",),
    "all_2d": ("attention", "mlp"),
}


class EmptySelectionError(ValueError):
    """No matrix of the model is chosen, although every glob matches something."""


@dataclass(frozen=True, eq=False)
class Target:
    """One matrix (or one stack of expert matrices) to restore: a piece of a parameter.

    Args:
        name: `parameter_name`, and `.<piece>` where the parameter is cut: "h.0.attn.c_attn.weight.q".
        parameter_name: The parameter's name without the prefixes of wrappers (DDP, `torch.compile`, checkpointing).
        parameter: The parameter itself. Where it is sharded its shape is the global one.
        cut: How the parameter is cut, the same for all its targets.
        index: Which piece of the cut this is.
        group: "attention", "mlp" or "other".

    Attributes:
        full_shape: Shape of the whole parameter, kept because FSDP1 shows it only while it is gathered.
    """

    name: str
    parameter_name: str
    parameter: nn.Parameter
    cut: Cut
    index: int
    group: GroupName
    full_shape: torch.Size = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "full_shape", self.parameter.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns (m, n) of the matrix."""
        return self.cut.shapes(self.full_shape)[self.index]

    @property
    def count(self) -> int:
        """How many matrices of this shape: 1, or the number of experts in a stack."""
        return math.prod(self.full_shape[:-2])

    @property
    def matrix_names(self) -> tuple[str, ...]:
        """One name per matrix: the target's, numbered in a stack of experts."""
        return (self.name,) if self.count == 1 else tuple(f"{self.name}.{i}" for i in range(self.count))

    @property
    def svd_flops(self) -> int:
        """FLOPs of one restoration by SVD as the paper counts them: 2mn·min(m, n) + 11·min(m, n)³ per matrix.

        Source: arXiv 2602.01734, Eq. 15. A polynomial method takes a few times as many, on much faster units.
        """
        m, n = self.shape
        k = min(m, n)
        return self.count * (2 * m * n * k + 11 * k**3)

    def matrix(self, full: Tensor) -> Tensor:
        """The piece of `full`, the whole parameter, a copy or one matrix of it, as (count, m, n); may share memory."""
        piece = self.cut.pieces(full)[self.index] if self.cut.sizes else full
        return piece.reshape(-1, *self.shape)

    def write_(self, full: Tensor, matrix: Tensor) -> None:
        """Writes a (count, m, n) matrix into the piece of `full` (a parameter needs `torch.no_grad()`)."""
        piece = self.cut.pieces(full)[self.index]
        piece.copy_(matrix.reshape(piece.shape))


def select_targets(
    model: nn.Module,
    targets: str | Sequence[str] = "all_2d",
    *,
    exclude: str | Sequence[str] = (),
    cuts: Mapping[str, Cut] | None = None,
) -> list[Target]:
    """Chooses the matrices of a model, in the order of its parameters.

    The presets are the arms of the paper (arXiv 2602.01734, Table 2): "attention", "mlp" and "all_2d", both of them.
    A preset takes every linear layer of an attention or an MLP, and never embeddings, heads, poolers, routers, norms,
    position tables, or the factors of low-rank adapters (LoRA). A glob can name those of them that have two dimensions.

    Globs (`fnmatch`, case sensitive) are matched against the names of `named_parameters()` without the prefixes of
    wrappers, and against those of pieces: "*.c_attn.weight" is Q, K and V, "*.c_attn.weight.v" is V alone.

    Never chosen: a parameter that is frozen, on meta (unless all are), parametrized, of fewer than two dimensions, of 3
    in an attention (XLNet's, a matrix per head), a convolution kernel, a tensor subclass other than DTensor (quantised
    weights), or not of dtype float64, float32, bfloat16 or float16. A tied parameter counts once; tied to an embedding,
    it is an embedding.

    Args:
        model: The model, bare or wrapped by DDP, Lightning Fabric, `torch.compile`, FSDP2 or activation checkpointing.
        targets: A preset, a glob, or several of them (their union).
        exclude: Globs of parameters or pieces to leave out.
        cuts: How to cut the parameters that a glob matches, in place of what would be found out: a `Cut`, or a mapping
            of its arguments. `Cut()` says that a parameter is a single matrix.

    Raises:
        EmptySelectionError: If nothing is chosen.
        ValueError: If a glob matches nothing; if two `cuts` match one parameter or a cut does not fit; or if a chosen
            parameter looks fused in a way that is not known.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    unwanted = [exclude] if isinstance(exclude, str) else list(exclude)
    stated = {glob: _as_cut(glob, cut) for glob, cut in dict(cuts or {}).items()}
    candidates = find_candidates(model)
    cut_of = {candidate: _find_cut(candidate, stated) for candidate in candidates if candidate.is_usable}
    parameters = {name: candidate for candidate in candidates for name in candidate.names}
    names = dict(parameters)
    for candidate, cut in cut_of.items():
        for label in cut.labels if cut else ():
            names |= dict.fromkeys(_piece_names(candidate, label), candidate)
    groups = {group for name in wanted for group in PRESETS.get(name, ())}
    globs = [name for name in wanted if name not in PRESETS]
    _check_globs("targets", globs, names)
    _check_globs("exclude", unwanted, names)
    _check_globs("cuts", stated, parameters)

    chosen = [
        target for candidate, cut in cut_of.items() for target in _select(candidate, cut, groups, globs, unwanted)
    ]
    if not chosen:
        raise EmptySelectionError(
            f"targets must choose at least one matrix, got targets={targets!r}, exclude={exclude!r}; "
            f"the model has {_summary(candidates) or 'no parameters'}"
        )
    return chosen


def format_targets(targets: Sequence[Target], *, period: int | None = None, model: nn.Module | None = None) -> str:
    """A table of the chosen matrices for a dry run: name, shape, cut, group and cost.

    Args:
        targets: What `select_targets` gave.
        period: Optimizer steps between two applications; adds the mean cost per step to the last lines.
        model: The model they came from; adds a line on what was left out, and why.
    """
    rows = [("matrix", "shape", "cut", "group", "SVD FLOPs")]
    groups = Counter[str]()
    for target in targets:
        shape = " x ".join(map(str, target.shape if target.count == 1 else (target.count, *target.shape)))
        rows.append((target.name, shape, _show_cut(target), target.group, f"{target.svd_flops:.2e}"))
        groups[target.group] += target.count
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    flops = sum(target.svd_flops for target in targets)
    lines.append(
        f"{groups.total()} matrices ({', '.join(f'{count} {group}' for group, count in groups.items())}) "
        f"in {len({target.parameter for target in targets})} parameters, {flops:.2e} SVD FLOPs per application"
        + (f", {flops / period:.2e} per step at period {period}" if period else "")
    )
    if model is not None:
        lines.append(f"left out: {_summary(_left(model, targets)) or 'no matrix'}")
    return "\n".join(lines)


def left_out(model: nn.Module, targets: Sequence[Target]) -> str:
    """What of a model the targets don't hold, in one line: counts by kind, with some names; "" if there is nothing.

    Embeddings, heads and vectors, which nobody expects, are not listed.
    """
    return _summary(c for c in _left(model, targets) if c.kind not in ("embedding", "head"))


# --- what is chosen ----------------------------------------------------------------------------------------------


def _select(
    candidate: Candidate, cut: Cut | None, groups: Set[str], globs: Sequence[str], unwanted: Sequence[str]
) -> list[Target]:
    """The pieces of one parameter that are in the groups or match a glob, and are not excluded."""
    if _matches(candidate.names, unwanted):
        return []
    if cut is None:
        if candidate.group in groups or _matches(candidate.names, globs):
            raise ValueError(_ask_for_cut(candidate))
        return []
    chosen = []
    for index, label in enumerate(cut.labels):
        names = _piece_names(candidate, label)
        group: GroupName = "mlp" if label == "mlp" else candidate.group  # fused with an attention
        is_wanted = group in groups or _matches((*candidate.names, *names), globs)
        if is_wanted and not _matches(names, unwanted):
            chosen.append(Target(names[0], candidate.names[0], candidate.parameter, cut, index, group))
    return chosen


def _find_cut(candidate: Candidate, stated: Mapping[str, Cut]) -> Cut | None:
    """The cut that is stated for a parameter, else the one found out; None where it looks fused in an unknown way."""
    globs = [glob for glob in stated if _matches(candidate.names, [glob])]
    if len(globs) > 1:
        raise ValueError(f"cuts must match a parameter at most once, got {globs} for {candidate.names[0]}")
    if not globs:
        return find_cut(candidate)
    try:
        stated[globs[0]].shapes(candidate.parameter.shape)
    except ValueError as error:
        raise ValueError(f"cut of {candidate.names[0]}: {error}") from None
    return stated[globs[0]]


def _piece_names(candidate: Candidate, label: str) -> tuple[str, ...]:
    return tuple(f"{name}.{label}" if label else name for name in candidate.names)


def _matches(names: Sequence[str], globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _as_cut(glob: str, cut: Cut | Mapping[str, Any]) -> Cut:
    """The cut itself, or the one that a mapping, as of a YAML file, describes."""
    if isinstance(cut, Cut):
        return cut
    try:
        return Cut(**cut)
    except TypeError as error:
        raise ValueError(f"cuts must map globs to a Cut or its arguments, got {cut!r} for {glob!r}") from error


def _ask_for_cut(candidate: Candidate) -> str:
    names = likely_pieces(candidate)
    example = f"Cut(sizes=({', '.join(f'<{name}>' for name in names)}), names={names})"
    return (
        f"{candidate.names[0]} of shape {tuple(candidate.parameter.shape)} looks like several matrices in one, laid "
        f"out in a way that is not known: state it by cuts={{{candidate.names[0]!r}: {example}}} (or a glob for all "
        "such layers, or Cut() if it is one matrix), or exclude it"
    )


def _check_globs(key: str, globs: Iterable[str], names: Mapping[str, Candidate]) -> None:
    """Raises if a glob matches nothing or, in `targets`, only what cannot be restored."""
    presets = list(PRESETS) if key == "targets" else []
    for glob in globs:
        found = {candidate: name for name, candidate in names.items() if fnmatchcase(name, glob)}
        if not found:
            rule = f"be one of {', '.join(presets)} or match a parameter" if presets else "match a parameter"
            paths = [name.split(".") for name in names]
            parts = [".".join(path[i:j]) for path in paths for i in range(len(path)) for j in (i + 1, len(path))]
            choices = list(dict.fromkeys((*presets, *names, *parts)))
            near = difflib.get_close_matches(glob.strip("*."), choices) or choices[:3]
            raise ValueError(f"{key} must {rule}, got {glob!r}; near names: {', '.join(near)}")
        if presets and not any(candidate.is_usable for candidate in found):
            reasons = ", ".join(f"{name} ({candidate.kind})" for candidate, name in list(found.items())[:3])
            raise ValueError(f"{key} must match a matrix that can be restored, got {glob!r}, which matches {reasons}")


def _left(model: nn.Module, targets: Sequence[Target]) -> list[Candidate]:
    """The parameters of two dimensions or more of which the targets hold nothing."""
    chosen = {target.parameter for target in targets}
    return [c for c in find_candidates(model) if c.parameter not in chosen and c.kind != "vector"]


def _summary(candidates: Iterable[Candidate]) -> str:
    """Counts by kind, with the names of some; a * is for the numbers of layers."""
    kinds: dict[str, list[str]] = {}
    for candidate in candidates:
        kinds.setdefault(candidate.kind, []).append(candidate.names[0])
    shown = {}
    for kind, names in kinds.items():
        short = names if len(names) < 3 else list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", n) for n in names))
        shown[kind] = ", ".join([*short[:3], *(["..."] if len(short) > 3 else [])])
    return ", ".join(f"{len(names)} {kind} ({shown[kind]})" for kind, names in kinds.items())


def _show_cut(target: Target) -> str:
    """Which part of the parameter a target is: "rows 1/3 x 8" is the first third of eight interleaved ones."""
    cut = target.cut
    part = f"{('rows', 'columns')[cut.dim]} {target.index + 1}/{len(cut.sizes)}" if cut.sizes else ""
    return f"{part} x {cut.repeats}" if cut.repeats > 1 else part
