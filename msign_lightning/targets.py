"""From a model to the matrices that MSign restores (arXiv 2602.01734, Algorithm 1 and Sec. 5).

Models store several matrices in one parameter (fused QKV, fused gate and up, stacks of experts), so a `Target` is a
parameter together with a `Cut`: the sign of a stacked matrix is not the stack of the signs.

All is recognised from a model's structure, names and class names, without importing any model library. A parameter
that looks fused in a way that is not known is an error that asks for a cut, never a guess.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["Cut", "EmptySelectionError", "Target", "format_targets", "select_targets"]

Group = Literal["attention", "mlp", "other"]

PRESETS: Mapping[str, tuple[Group, ...]] = {
    "attention": ("attention",),
    "mlp": ("mlp",),
    "all_2d": ("attention", "mlp"),
}


class EmptySelectionError(ValueError):
    """No matrix of the model is chosen, although every glob matches something."""


@dataclass(frozen=True)
class Cut:
    """How one parameter of shape (..., m, n) is cut into matrices along its rows or its columns.

    Leading dimensions are a batch: a stack of experts (E, m, n) gives E matrices per piece. Examples:

    - `Cut()`: one matrix, the whole parameter.
    - `Cut((512, 128, 128), names=("q", "k", "v"))`: fused grouped-query attention, rows of Q, then K, then V.
    - `Cut((64, 64, 64), repeats=8)`: Q, K and V rows interleaved per head (GPT-NeoX, BLOOM).
    - `Cut((1, 1), dim=1, repeats=2880)`: gate and up columns interleaved one by one (GPT-OSS experts).

    Args:
        sizes: Length of each piece along `dim` within one repetition; empty for the whole.
        dim: 0 to cut rows (m), 1 to cut columns (n), leading batch dimensions not counted.
        repeats: How often the pattern of `sizes` repeats along `dim`; a piece joins its repetitions, in order.
        names: A name per piece; by default "0", "1", ...

    Raises:
        ValueError: If a value breaks these rules. That the cut covers a parameter is checked in `shapes`.
    """

    sizes: tuple[int, ...] = ()
    dim: int = 0
    repeats: int = 1
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # A YAML file gives lists; tuples keep the cut hashable.
        object.__setattr__(self, "sizes", tuple(self.sizes))
        object.__setattr__(self, "names", tuple(self.names))
        if any(not _is_positive_int(size) for size in self.sizes):
            raise ValueError(f"sizes must be positive integers, got {self.sizes}")
        if self.dim not in (0, 1):
            raise ValueError(f"dim must be 0 (rows) or 1 (columns), got {self.dim!r}")
        if not _is_positive_int(self.repeats):
            raise ValueError(f"repeats must be a positive integer, got {self.repeats!r}")
        if self.repeats > 1 and not self.sizes:
            raise ValueError(f"repeats must be 1 where sizes is empty, got {self.repeats}")
        if self.names and (len(self.names) != len(self.sizes) or len(set(self.names)) != len(self.names)):
            raise ValueError(f"names must hold one distinct name per size {self.sizes}, got {self.names}")

    @property
    def labels(self) -> tuple[str, ...]:
        """One name per piece; a single empty one for the whole."""
        return self.names or tuple(str(i) for i in range(len(self.sizes))) or ("",)

    def shapes(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """The (m, n) of each piece of a parameter of the given shape (..., m, n).

        Raises:
            ValueError: If the cut does not cover the dimension exactly.
        """
        m, n = shape[-2], shape[-1]
        length = (m, n)[self.dim]
        sizes = self.sizes or (length,)
        if sum(sizes) * self.repeats != length:
            raise ValueError(
                f"sum(sizes) * repeats must be the length {length} of dim {self.dim} of {tuple(shape)}, "
                f"got sizes={self.sizes}, repeats={self.repeats}"
            )
        return [(size * self.repeats, n) if self.dim == 0 else (m, size * self.repeats) for size in sizes]

    def pieces(self, tensor: Tensor) -> list[Tensor]:
        """The pieces of a tensor (..., m, n) as views.

        A view has one dimension more than the tensor: (..., repeats, size, n) for rows and (..., m, repeats, size) for
        columns; flattening that pair gives the matrix. Raises as `shapes`.
        """
        self.shapes(tensor.shape)
        axis = tensor.ndim - 2 + self.dim
        sizes = self.sizes or (tensor.shape[axis],)
        return list(torch.split(torch.unflatten(tensor, axis, (self.repeats, sum(sizes))), list(sizes), dim=axis + 1))


@dataclass(frozen=True, eq=False)
class Target:
    """One matrix (or one stack of expert matrices) to restore: a piece of a parameter.

    Args:
        name: `parameter_name`, and `.<piece>` where the parameter is cut: "h.0.attn.c_attn.weight.q".
        parameter_name: The parameter's name without the prefixes of wrappers (DDP, `torch.compile`, checkpointing).
        parameter: The parameter itself. Where it is sharded its shape is the global one.
        cut: How the parameter is cut; the targets of one parameter share it.
        index: Which piece of the cut this is.
        group: "attention", "mlp" or "other".
    """

    name: str
    parameter_name: str
    parameter: nn.Parameter
    cut: Cut
    index: int
    group: Group

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns (m, n) of the matrix."""
        return self.cut.shapes(self.parameter.shape)[self.index]

    @property
    def count(self) -> int:
        """How many matrices of this shape: 1, or the number of experts in a stack."""
        return math.prod(self.parameter.shape[:-2])

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
        """The piece of `full`, the whole parameter or a copy of it, as (count, m, n); it may share its memory."""
        piece = self.cut.pieces(full)[self.index] if self.cut.sizes else full
        return piece.reshape(self.count, *self.shape)

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

    Globs (`fnmatch`, case sensitive) are matched against the name of the parameter, as in `named_parameters()`
    without the prefixes of wrappers, and against the names of its pieces: "*.c_attn.weight" is Q, K and V,
    "*.c_attn.weight.v" is V alone.

    Never chosen: a parameter that is frozen, on the meta device, parametrized, of fewer than two dimensions, a
    convolution kernel, a tensor subclass other than DTensor (quantised weights), or not of dtype float64, float32,
    bfloat16 or float16. A tied parameter counts once; tied to an embedding, it is an embedding.

    Args:
        model: The model, bare or wrapped by DDP, `torch.compile`, FSDP2 or activation checkpointing.
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
    candidates = _find_candidates(model)
    cut_of = {candidate: _cut(candidate, stated) for candidate in candidates if candidate.is_usable}
    parameters = {name: candidate for candidate in candidates for name in candidate.names}
    names = dict(parameters)
    for candidate, cut in cut_of.items():
        for label in cut.labels if cut else ():
            names |= dict.fromkeys(_piece_names(candidate, label), candidate)
    by_name = [glob for glob in wanted if glob not in PRESETS]
    for key, globs, choices in (
        ("targets", by_name, names),
        ("exclude", unwanted, names),
        ("cuts", stated, parameters),
    ):
        for glob in globs:
            _check_glob(key, glob, choices)

    chosen = [target for candidate, cut in cut_of.items() for target in _select(candidate, cut, wanted, unwanted)]
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

    parameters = {id(target.parameter) for target in targets}
    flops = sum(target.svd_flops for target in targets)
    lines.append(
        f"{groups.total()} matrices ({', '.join(f'{count} {group}' for group, count in groups.items())}) "
        f"in {len(parameters)} parameters, {flops:.2e} SVD FLOPs per application"
        + (f", {flops / period:.2e} per step at period {period}" if period else "")
    )
    if model is not None:
        left = [c for c in _find_candidates(model) if c.kind != "vector" and id(c.parameter) not in parameters]
        lines.append(f"left out: {_summary(left) or 'no matrix'}")
    return "\n".join(lines)


# --- what there is -----------------------------------------------------------------------------------------------

# Names that a wrapper gives its child. A model may well use `module` too, so that one goes by the wrapper's class.
_WRAPPER_CHILDREN = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_MODULE_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Words that say that a layer is no transformer block's.
_OUTSIDE = {
    **dict.fromkeys(("embed", "embedder", "embedding", "embeddings", "wte", "wpe"), "embedding"),
    **dict.fromkeys(("head", "heads", "classifier"), "head"),
    **dict.fromkeys(("pool", "pooler", "pooling"), "pooler"),
    **dict.fromkeys(("lora", "adapter", "adapters"), "adapter"),
    **dict.fromkeys(("router", "routers"), "router"),
}
_ATTENTION_ENDINGS = ("attn", "attention", "attentions")
_ATTENTION_WORDS = {"att", "mha", "mhsa", "msa"}
_MLP_WORDS = {"mlp", "mlps", "ffn", "ffns", "ff", "ffwd", "feedforward", "relu", "moe", "expert", "experts"}
_MLP_ENDINGS = ("mlp", "ffn", "feedforward")
# Layers of an MLP that has no module of its own: they sit in the block, beside its attention.
_BLOCK_LINEAR = re.compile(r"(fc|linear|lin|w)_?[123]|(up|down|gate|gate_up)_proj|ff_(proj|out)")
# A bare parameter is a projection only if it is called one; tables and biases of two dimensions are not.
_BARE_PROJECTION = re.compile(r"(in|out|q|k|v|o|qkv|up|down|gate|gate_up)_proj(_weight)?|w_?(q|k|v|o|qkv|[123])|v1")


_Place = tuple[tuple[str, ...], str, tuple[nn.Module, ...]]


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A parameter of the model: its names (the first one leads), where it sits, and what it is taken for.

    `parts` is the cleaned path of the owner and `modules` the modules along it, the model first and the owner last.
    `kind` is its group, or says why no preset holds it; if not `is_usable`, why it can never be restored.
    """

    names: tuple[str, ...]
    parameter: nn.Parameter
    parts: tuple[str, ...]
    leaf: str
    modules: tuple[nn.Module, ...]
    is_usable: bool
    kind: str

    @property
    def group(self) -> Group:
        return "attention" if self.kind == "attention" else "mlp" if self.kind == "mlp" else "other"

    @property
    def role(self) -> str:
        """The name that says what the matrix is for: the layer's where it is a layer's weight, else its own."""
        return (self.parts[-1] if self.leaf == "weight" and self.parts else self.leaf).lower()

    @property
    def holder(self) -> nn.Module:
        """The module that uses the matrix: around the layer where it is a layer's weight, else the owner."""
        return self.modules[-2] if self.leaf == "weight" and len(self.modules) > 1 else self.modules[-1]

    @property
    def out_dim(self) -> int:
        """The dimension of the outputs: 0, and 1 where `Conv1D` of Hugging Face GPT-2 stores (in, out)."""
        return int(_is_a(self.modules[-1], "Conv1D"))


def _find_candidates(model: nn.Module) -> list[_Candidate]:
    """All parameters of the model in its order, each tied one once."""
    paths: dict[str, tuple[tuple[str, ...], tuple[nn.Module, ...]]] = {}
    places: dict[nn.Parameter, list[_Place]] = {}
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        parts, modules = paths[parent] if path else ((), ())
        if last in _WRAPPER_CHILDREN or (last == "module" and isinstance(modules[-1], _MODULE_WRAPPERS)):
            modules = modules[:-1]
        elif path:
            parts = (*parts, last)
        paths[path] = parts, (*modules, module)
        for leaf, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((parts, leaf, paths[path][1]))
    candidates = []
    for parameter, found in places.items():
        names = tuple(".".join((*parts, leaf)) for parts, leaf, _ in found)
        obstacle = _obstacle(parameter, found[0][2][-1])
        kinds = [obstacle or _kind(parameter, *place) for place in found]
        kind = "embedding" if "embedding" in kinds else kinds[0]
        candidates.append(_Candidate(names, parameter, *found[0], is_usable=not obstacle, kind=kind))
    return candidates


def _obstacle(parameter: nn.Parameter, owner: nn.Module) -> str:
    """Why the parameter can never be restored, or ""."""
    if type(parameter) is not nn.Parameter and not isinstance(parameter, DTensor):
        return type(parameter).__name__
    if parameter.ndim < 2:
        return "vector"
    if parameter.dtype not in _DTYPES:
        return str(parameter.dtype).removeprefix("torch.")
    if isinstance(owner, ParametrizationList):
        return "parametrized"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return "convolution"
    if parameter.is_meta:
        return "meta"
    return "" if parameter.requires_grad else "frozen"


def _kind(parameter: nn.Parameter, parts: tuple[str, ...], leaf: str, modules: tuple[nn.Module, ...]) -> str:
    """The group of the parameter, or what it is instead."""
    if isinstance(modules[-1], (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    groups = [_group(*around) for around in zip(parts, modules[:-1], modules[1:], strict=True)]
    depth = max((i for i, group in enumerate(groups) if group != "other"), default=-1)
    group = groups[depth] if depth >= 0 else "other"
    while depth > 0 and groups[depth - 1] == group:
        depth -= 1
    for i, part in enumerate((*parts, leaf)):
        for word in _words(part):
            # A head or an embedder makes its own MLP one, but not a whole encoder in it, nor the "heads" of attention.
            if word in _OUTSIDE and (_OUTSIDE[word] in ("adapter", "router") or depth < 0 or 0 <= depth - i <= 1):
                return _OUTSIDE[word]
    if group == "mlp" and any(map(_is_gate, parts, modules)):
        return "router"
    is_named = _BARE_PROJECTION.fullmatch(leaf.lower())
    if parameter.ndim == 2:
        return group if is_named or (leaf == "weight" and _is_linear(modules[-1])) else "other"
    is_stack = parameter.ndim == 3 and any(_is_experts(name) for name in (*parts, type(modules[-1]).__name__))
    return group if is_stack and (is_named or leaf == "weight") else "other"


def _group(name: str, parent: nn.Module, module: nn.Module) -> Group:
    """What a module of this name in its parent is: attention, an MLP or a layer of one, or neither."""
    if _is_attention(name, module):
        return "attention"
    if not _MLP_WORDS.isdisjoint(_words(name)) or type(module).__name__.lower().endswith(_MLP_ENDINGS):
        return "mlp"
    siblings = dict(parent.named_children())
    is_bert = name in ("intermediate", "output") and {"intermediate", "output"} <= siblings.keys()
    is_in_block = bool(_BLOCK_LINEAR.fullmatch(name.lower())) and any(_is_attention(*item) for item in siblings.items())
    return "mlp" if is_bert or is_in_block else "other"


def _is_attention(name: str, module: nn.Module) -> bool:
    says_so = any(word.endswith(_ATTENTION_ENDINGS) or word in _ATTENTION_WORDS for word in _words(name))
    return says_so or type(module).__name__.lower().endswith(_ATTENTION_ENDINGS)


def _is_experts(name: str) -> bool:
    return not {"moe", "expert", "experts"}.isdisjoint(_words(name))


def _is_gate(name: str, parent: nn.Module) -> bool:
    """Whether it is a gate that stands beside experts: a router, not the gate of a GLU."""
    return bool(re.fullmatch(r"gates?|\w+_gate", name)) and any(_is_experts(n) for n, _ in parent.named_children())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or "Linear" in type(module).__name__ or _is_a(module, "Conv1D")


def _words(name: str) -> list[str]:
    """The words of a snake_case or CamelCase name, in lower case."""
    joined = re.sub(r"(?i)multi_?head(ed)?_?", "", re.sub(r"(?i)feed_?forward", "feedforward", name))
    return re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", joined).lower())


# --- how it is cut -----------------------------------------------------------------------------------------------

_QKV = ("q", "k", "v")
# Attention modules that keep, for each group of heads that share a key and a value, query rows, key rows, value rows.
_GROUPED_QKV = ("GPTNeoX", "Bloom", "Falcon", "Persimmon", "GPTBigCode", "DisentangledSelf", "MiniMaxL", "InternLM2")
_FUSED_QKV = re.compile(r"qkv|query_key_value|c_attn|att_proj|w_?pack|^in_proj(_weight)?$")
_FUSED_KV = re.compile(r"(c_|to_|w_?)?kv(_proj|_lin|_linear)?")
# Megatron and its descendants give these names to more than one layout.
_AMBIGUOUS = re.compile(r"key_value|linear_qkv|qkvz|fused")
_ONE_ROLE = {"q", "k", "v", "o", "wq", "wk", "wv", "wo", "query", "key", "value", "out"}
_HEADS = ("num_heads", "n_heads", "num_attention_heads", "n_head", "nhead")
_KV_HEADS = (
    *("num_key_value_heads", "num_kv_heads", "kv_n_heads", "n_kv_heads", "n_kv_head", "kv_heads"),
    *("num_query_groups", "n_query_groups", "n_local_heads"),
)
_HEAD_DIM = ("head_dim", "head_size", "attention_head_size")


def _cut(candidate: _Candidate, stated: Mapping[str, Cut]) -> Cut | None:
    """The cut that is stated for a parameter, else the one found out; None where it looks fused in an unknown way."""
    globs = [glob for glob in stated if _matches(candidate.names, [glob])]
    if len(globs) > 1:
        raise ValueError(f"cuts must match a parameter at most once, got {globs} for {candidate.names[0]}")
    if globs:
        try:
            stated[globs[0]].shapes(candidate.parameter.shape)
        except ValueError as error:
            raise ValueError(f"cut of {candidate.names[0]}: {error}") from None
        return stated[globs[0]]
    if candidate.group == "mlp":
        return _mlp_cut(candidate)
    if candidate.group == "attention" or re.search(r"qkv|query_key_value|c_attn", candidate.role):
        return _attention_cut(candidate)
    return Cut()


def _attention_cut(candidate: _Candidate) -> Cut | None:
    """Q, K and V apart where one parameter holds several of them; None where that seems so and is not known."""
    role, holder, dim = candidate.role, candidate.holder, candidate.out_dim
    length, width = candidate.parameter.shape[dim - 2], candidate.parameter.shape[-1 - dim]
    heads, head_dim = _setting(holder, *_HEADS), _setting(holder, *_HEAD_DIM)
    is_grouped = _is_a(holder, *_GROUPED_QKV)

    def cut(names: Sequence[str], *sizes: int | None, repeats: int | None = 1) -> Cut | None:
        known = tuple(size for size in sizes if size)
        is_fitting = repeats and len(known) == len(sizes) and sum(known) * repeats == length
        return Cut(known, dim, repeats, tuple(names)) if repeats and is_fitting else None

    if role == "kv_a_proj_with_mqa":  # latent attention (arXiv 2405.04434); all heads share the rotary key
        return cut(("latent", "k_rope"), _setting(holder, "kv_lora_rank"), _setting(holder, "qk_rope_head_dim"))
    if role == "kv_b_proj":
        return cut("kv", _setting(holder, "qk_nope_head_dim"), _setting(holder, "v_head_dim"), repeats=heads)
    if role == "q_proj" and _is_a(holder, "Qwen3Next", "Qwen3_5"):  # with the gate of the head's output
        return cut(("q", "gate"), head_dim, head_dim, repeats=heads)
    if role == "in_proj_qkv":  # gated delta nets
        key_dim = _setting(holder, "key_dim")
        return cut("qkv", key_dim, key_dim, _setting(holder, "value_dim"))
    if role == "qkv_proj" and _is_a(holder, "CodeGen"):  # four shards of a TPU mesh
        return cut("qvk", *[length // 12] * 3, repeats=4)
    if _AMBIGUOUS.search(role) and not is_grouped:
        return None
    if _FUSED_KV.fullmatch(role) or (role == "c_attn" and hasattr(holder, "q_attn")):
        return None if is_grouped else cut("kv", width, width)
    if _FUSED_QKV.search(role):
        kv_heads = _setting(holder, *_KV_HEADS)
        if heads and (kv_heads or head_dim or is_grouped):
            kv_heads = kv_heads or heads
            head_dim = head_dim or length // (heads + 2 * kv_heads)
            groups = kv_heads if is_grouped else 1
            key = kv_heads * head_dim // groups
            return cut("qkv", heads * head_dim // groups, key, key, repeats=groups)
        return None if is_grouped else cut("qkv", width, width, width)
    return None if length == 3 * width and _ONE_ROLE.isdisjoint(_words(role)) else Cut()


def _mlp_cut(candidate: _Candidate) -> Cut | None:
    """Gate and up where the matrix gives out twice what the one beside it takes in; else one matrix."""
    shape, holder = candidate.parameter.shape, candidate.holder
    if candidate.leaf == "weight":
        near = [getattr(child, "weight", None) for child in holder.children()]
    else:
        near = list(holder.parameters(recurse=False))
    tensors = [tensor for tensor in near if isinstance(tensor, Tensor) and tensor is not candidate.parameter]
    siblings = [tensor.shape for tensor in tensors if tensor.ndim == len(shape)]
    if len(shape) == 2 and candidate.leaf != "weight" and any(map(_is_experts, candidate.parts)):
        experts = _setting(holder, "moe_num_experts", "num_experts")  # stacked along the rows (DBRX, MegaBlocks)
        return Cut((shape[0] // experts,) * experts) if experts and shape[0] % experts == 0 else None
    # Experts are stored (out, in) or (in, out), according to the model.
    for dim in (0, 1) if len(shape) > 2 else (candidate.out_dim,):
        length, width = shape[dim - 2], shape[-1 - dim]
        others = {(sibling[dim - 2], sibling[-1 - dim]) for sibling in siblings}
        if length % 2 == 0 and (width, length // 2) in others and length not in {taken_in for _, taken_in in others}:
            size = 1 if _is_a(holder, "GptOss") else length // 2
            return Cut((size, size), dim, length // (2 * size), ("gate", "up"))
    return None if re.search(r"gate_?up|up_?gate|fused", candidate.role) else Cut()


def _is_a(module: nn.Module, *prefixes: str) -> bool:
    """Whether its class, or one that it derives from (FSDP2 makes a derived one), has a name that begins so."""
    return any(cls.__name__.startswith(prefixes) for cls in type(module).__mro__)


def _setting(module: nn.Module, *names: str) -> int | None:
    """The first of these settings that the module, or else its `config`, has."""
    holders = (module, getattr(module, "config", None))
    values = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in values if _is_positive_int(value)), None)


def _is_positive_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


# --- what is chosen ----------------------------------------------------------------------------------------------


def _select(candidate: _Candidate, cut: Cut | None, wanted: Sequence[str], unwanted: Sequence[str]) -> list[Target]:
    """The pieces of one parameter that are wanted and not excluded."""
    groups = {group for name in wanted for group in PRESETS.get(name, ())}
    globs = [name for name in wanted if name not in PRESETS]
    is_wanted = candidate.group in groups or _matches(candidate.names, globs)
    if _matches(candidate.names, unwanted):
        return []
    if cut is None and is_wanted:
        raise ValueError(_ask_for_cut(candidate))
    pieces = [_piece_names(candidate, label) for label in (cut.labels if cut else ())]
    return [
        Target(names[0], candidate.names[0], candidate.parameter, cut, index, candidate.group)
        for index, names in enumerate(pieces)
        if cut and (is_wanted or _matches(names, globs)) and not _matches(names, unwanted)
    ]


def _piece_names(candidate: _Candidate, label: str) -> tuple[str, ...]:
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


def _ask_for_cut(candidate: _Candidate) -> str:
    names = ("gate", "up") if candidate.group == "mlp" else _QKV
    example = f"Cut(sizes=({', '.join(f'<{name}>' for name in names)}), names={names})"
    return (
        f"{candidate.names[0]} of shape {tuple(candidate.parameter.shape)} looks like several matrices in one, laid "
        f"out in a way that is not known: state it by cuts={{{candidate.names[0]!r}: {example}}} (or a glob for all "
        "such layers, or Cut() if it is one matrix), or exclude it"
    )


def _check_glob(key: str, glob: str, names: Mapping[str, _Candidate]) -> None:
    """Raises if a glob matches nothing or, in `targets`, only what cannot be restored."""
    found = {candidate: name for name, candidate in names.items() if fnmatchcase(name, glob)}
    presets = list(PRESETS) if key == "targets" else []
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


def _summary(candidates: Iterable[_Candidate]) -> str:
    """Counts by kind, with the names of some."""
    kinds: dict[str, list[str]] = {}
    for candidate in candidates:
        kinds.setdefault(candidate.kind, []).append(candidate.names[0])
    shown = {kind: ", ".join([*names[:2], *(["..."] if len(names) > 2 else [])]) for kind, names in kinds.items()}
    return ", ".join(f"{len(names)} {kind} ({shown[kind]})" for kind, names in kinds.items())


def _show_cut(target: Target) -> str:
    """Which part of the parameter a target is: "rows 1/3 x 8" is the first third of eight interleaved ones."""
    cut = target.cut
    part = f"{('rows', 'columns')[cut.dim]} {target.index + 1}/{len(cut.sizes)}" if cut.sizes else ""
    return f"{part} x {cut.repeats}" if cut.repeats > 1 else part
