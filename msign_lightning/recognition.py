"""What a model's structure says: its matrices, what each is for, and how one parameter is cut into several.

All is recognised from names and class names, without importing any model library. What looks fused in a way that is
not known has no cut: never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["Candidate", "Cut", "GroupName", "find_candidates", "find_cut", "likely_pieces", "named_places"]

GroupName = Literal["attention", "mlp", "other"]


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
        m, n = shape[-2:]
        length = (m, n)[self.dim]
        lengths = [size * self.repeats for size in self.sizes or (length,)]
        if sum(lengths) != length:
            raise ValueError(
                f"sum(sizes) * repeats must be the length {length} of dim {self.dim} of {tuple(shape)}, "
                f"got sizes={self.sizes}, repeats={self.repeats}"
            )
        return [(m, part) if self.dim else (part, n) for part in lengths]

    def pieces(self, tensor: Tensor) -> list[Tensor]:
        """The pieces of a tensor (..., m, n) as views; raises as `shapes`.

        The view of rows is (..., repeats, size, n), of columns (..., m, repeats, size): flatten that pair.
        """
        self.shapes(tensor.shape)
        axis = tensor.ndim - 2 + self.dim
        sizes = self.sizes or (tensor.shape[axis],)
        return list(torch.split(torch.unflatten(tensor, axis, (self.repeats, sum(sizes))), list(sizes), dim=axis + 1))


# --- what there is -----------------------------------------------------------------------------------------------

# Names that a wrapper gives its child. A model may well use `module` too, so that one goes by the wrapper's class.
_WRAPPER_CHILDREN = {
    *("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    *("_forward_module", "_original_module"),  # Lightning Fabric
}
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
# (width, heads, head size) or (heads, width, head size): what of it is a matrix can't be told.
_PER_HEAD = "attention of three dimensions"
_ATTENTION_ENDINGS = ("attn", "attention", "attentions")
_ATTENTION_WORDS = {"att", "mha", "mhsa", "msa"}
_MLP_WORDS = {"mlp", "mlps", "ffn", "ffns", "ff", "ffwd", "feedforward", "relu", "moe", "expert", "experts"}
_MLP_ENDINGS = ("mlp", "ffn", "feedforward")
# Layers of an MLP that has no module of its own: they sit in the block, beside its attention.
_BLOCK_LINEAR = re.compile(r"(fc|linear|lin|w)_?[123]|(up|down|gate|gate_up)_proj|ff_(proj|out)")
# A bare parameter is a projection only if it is called one; tables and biases of two dimensions are not.
_BARE_PROJECTION = re.compile(r"(in|out|q|k|v|o|qkv|up|down|gate|gate_up)_proj(_weight)?|w_?(q|k|v|o|qkv|[123])|v1")
# Children that a layer of its own keeps its matrix in: "q_proj.linear" is a q_proj.
_INNER = {"linear", "base_layer"}


@dataclass(frozen=True, eq=False)
class Candidate:
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
    def group(self) -> GroupName:
        return "attention" if self.kind == "attention" else "mlp" if self.kind == "mlp" else "other"

    @property
    def depth(self) -> int:
        """How many of `parts` lead to the layer that the matrix belongs to; 0 where it is a parameter of the model."""
        return max((i for i, part in enumerate(self.parts, 1) if part not in _INNER), default=0)

    @property
    def role(self) -> str:
        """The name that says what the matrix is for: the layer's where it is a layer's weight, else its own."""
        return (self.parts[self.depth - 1] if self.leaf == "weight" and self.depth else self.leaf).lower()

    @property
    def around(self) -> tuple[nn.Module, ...]:
        """The modules around the matrix: those around the layer where it is a layer's weight, else all."""
        return self.modules[: self.depth] if self.leaf == "weight" and self.depth else self.modules

    @property
    def holder(self) -> nn.Module:
        """The module that uses the matrix, the innermost around it."""
        return self.around[-1]

    @property
    def out_dim(self) -> int:
        """The dimension of the outputs: 0, and 1 where `Conv1D` of Hugging Face GPT-2 stores (in, out)."""
        return int(_is_a(self.modules[-1], "Conv1D"))


def named_places(model: nn.Module) -> Iterator[tuple[tuple[str, ...], tuple[nn.Module, ...]]]:
    """The modules as in `named_modules()`: the parts of each one's name, and the modules that lead to it, it the last.

    What a wrapper (DDP, Fabric, `torch.compile`, FSDP, checkpointing) adds to a name is left out. The wrapper comes
    before what it wraps.
    """
    paths: dict[str, tuple[tuple[str, ...], tuple[nn.Module, ...]]] = {}
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        parts, modules = paths[parent] if path else ((), ())
        if last in _WRAPPER_CHILDREN or (last == "module" and isinstance(modules[-1], _MODULE_WRAPPERS)):
            modules = modules[:-1]
        elif path:
            parts = (*parts, last)
        paths[path] = parts, (*modules, module)
        yield paths[path]


def find_candidates(model: nn.Module) -> list[Candidate]:
    """All parameters of the model in its order, each tied one once.

    A model without weights, all on the meta device, is taken as it will be.
    """
    is_planned = all(parameter.is_meta for parameter in model.parameters())
    places: dict[nn.Parameter, list[tuple[tuple[str, ...], str, tuple[nn.Module, ...]]]] = {}
    for parts, modules in named_places(model):
        for leaf, parameter in modules[-1].named_parameters(recurse=False):
            places.setdefault(parameter, []).append((parts, leaf, modules))
    candidates = []
    for parameter, found in places.items():
        names = tuple(".".join((*parts, leaf)) for parts, leaf, _ in found)
        obstacle = _obstacle(parameter, found[0][2][-1]) or ("meta" if parameter.is_meta and not is_planned else "")
        kinds = [obstacle or _kind(parameter, *place) for place in found]
        kind = "embedding" if "embedding" in kinds else kinds[0]
        is_usable = not obstacle and kind != _PER_HEAD
        candidates.append(Candidate(names, parameter, *found[0], is_usable=is_usable, kind=kind))
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
    return "" if parameter.requires_grad else "frozen"


def _kind(parameter: nn.Parameter, parts: tuple[str, ...], leaf: str, modules: tuple[nn.Module, ...]) -> str:
    """The group of the parameter, or what it is instead."""
    if isinstance(modules[-1], (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    groups = [_group(*around) for around in zip(parts, modules[:-1], modules[1:], strict=True)]
    for i in range(1, len(parts)):
        if groups[i - 1] == "attention" and _is_experts(parts[i]):  # experts of the attention
            groups[i] = "attention"
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
    owner, is_named = modules[-1], _BARE_PROJECTION.fullmatch(leaf.lower())
    if parameter.ndim == 2:
        is_linear = isinstance(owner, nn.Linear) or "Linear" in type(owner).__name__ or _is_a(owner, "Conv1D")
        return group if is_named or (leaf == "weight" and is_linear) else "other"
    is_stack = parameter.ndim == 3 and any(_is_experts(name) for name in (*parts, type(owner).__name__))
    if group == "attention" and not is_stack and parameter.ndim == 3 and min(parameter.shape) > 1:
        return _PER_HEAD
    return group if is_stack and (is_named or leaf == "weight") else "other"


def _group(name: str, parent: nn.Module, module: nn.Module) -> GroupName:
    """What a module of this name in its parent is: attention, an MLP or a layer of one, or neither."""
    if _is_attention(name, module):
        return "attention"
    if not _MLP_WORDS.isdisjoint(_words(name)) or type(module).__name__.lower().endswith(_MLP_ENDINGS):
        return "mlp"
    if name == "in_proj" and hasattr(parent, "in_split"):  # with that of the MLP (timm)
        return "attention"
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


def _words(name: str) -> list[str]:
    """The words of a snake_case or CamelCase name, in lower case."""
    joined = re.sub(r"(?i)multi_?head(ed)?_?", "", re.sub(r"(?i)feed_?forward", "feedforward", name))
    return re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", joined).lower())


# --- how it is cut -----------------------------------------------------------------------------------------------

_QKV = ("q", "k", "v")
# Attention modules that keep, for each group of heads that share a key and a value, query rows, key rows, value rows.
_GROUPED_QKV = ("GPTNeoX", "Bloom", "Falcon", "Persimmon", "GPTBigCode", "DisentangledSelf", "MiniMaxL", "InternLM2")
_FUSED_QKV = re.compile(r"qkv|query_key_value|c_attn|att_proj|w_?pack|^in_proj(_weight)?$")
_FUSED_QK = re.compile(r"(to_|w_?)?qk(_proj|_lin|_linear)?")
_FUSED_KV = re.compile(r"(c_|to_|w_?)?kv(_proj|_lin|_linear)?")
# Megatron and its descendants give these names to more than one layout.
_AMBIGUOUS = re.compile(r"keys?_values?|linear_qkv|qkvz|fused")
_ONE_ROLE = {"q", "k", "v", "o", "wq", "wk", "wv", "wo", "query", "key", "value", "out"}
_KEYS, _VALUES = "w?q?kv?|keys?", "w?q?k?v|values?"
_HEADS = ("num_heads", "n_heads", "num_attention_heads", "n_head", "nhead")
_KV_HEADS = (
    *("num_key_value_heads", "num_kv_heads", "kv_n_heads", "n_kv_heads", "n_kv_head", "kv_heads"),
    *("num_query_groups", "n_query_groups", "n_local_heads"),
)
_HEAD_DIM = ("head_dim", "head_size", "attention_head_size")


def find_cut(candidate: Candidate) -> Cut | None:
    """How the parameter is cut; None where it looks fused in an unknown way."""
    if candidate.group == "mlp":
        return _mlp_cut(candidate)
    if candidate.group == "attention" or re.search(r"qkv|query_key_value|c_attn", candidate.role):
        return _attention_cut(candidate)
    is_input = candidate.role == "in_proj" and candidate.parameter.shape[-2] > candidate.parameter.shape[-1]
    return None if is_input else Cut()  # a mixer's states, gates and steps


def likely_pieces(candidate: Candidate) -> tuple[str, ...]:
    """What a parameter that looks fused may hold, for an example of its cut."""
    if candidate.group != "attention":
        return ("gate", "up") if candidate.group == "mlp" else ("first", "second")
    letters = re.search(r"qkvz?|qk|kv", candidate.role)
    return tuple(letters[0]) if letters else _QKV


def _attention_cut(candidate: Candidate) -> Cut | None:
    """Q, K and V apart where one parameter holds several of them; None where that seems so and is not known."""
    role, holder, dim = candidate.role, candidate.holder, candidate.out_dim
    length, width = candidate.parameter.shape[dim - 2], candidate.parameter.shape[-1 - dim]
    heads, head_dim = _setting(holder, *_HEADS), _setting(holder, *_HEAD_DIM)
    is_grouped = _is_a(holder, *_GROUPED_QKV)

    def cut(names: Sequence[str], *sizes: int | None, repeats: int | None = 1) -> Cut | None:
        known = tuple(size for size in sizes if size)
        is_fitting = repeats and len(known) == len(sizes) and sum(known) * repeats == length
        return Cut(known, dim, repeats, tuple(names)) if repeats and is_fitting else None

    if role == "in_proj" and (split := getattr(holder, "in_split", None)):
        return cut(("mlp", *_QKV), *split)
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
    if _FUSED_QK.fullmatch(role):
        size = heads * head_dim if heads and head_dim else None
        return Cut() if size == length else cut("qk", *[size or width] * 2)  # one for both (Reformer), or one each
    if length <= width or not _ONE_ROLE.isdisjoint(_words(role)):
        return Cut()
    # What gives out more than it takes in may well be Q, K and V, or Q and K, unless layers are called as those are.
    names = zip(candidate.parts, candidate.around[1:], strict=False)
    attention = [module for name, module in names if _is_attention(name, module)] or [holder]
    words = {word for name, _ in attention[-1].named_parameters() for part in name.split(".") for word in _words(part)}
    has_keys, has_values = (any(re.fullmatch(rule, word) for word in words) for rule in (_KEYS, _VALUES))
    return Cut() if has_values and (has_keys or length != 2 * width) else None


def _mlp_cut(candidate: Candidate) -> Cut | None:
    """Gate and up where the matrix gives out twice what one after it takes in; else one matrix."""
    shape, holder = candidate.parameter.shape, candidate.holder
    if len(shape) == 2 and candidate.leaf != "weight" and any(map(_is_experts, candidate.parts)):
        experts = _setting(holder, "moe_num_experts", "num_experts")  # stacked along the rows (DBRX, MegaBlocks)
        return Cut((shape[0] // experts,) * experts) if experts and shape[0] % experts == 0 else None
    # The innermost module with other matrices: a GLU may keep its first layer in a module of its own.
    scopes = ([p for p in module.parameters() if p.ndim == len(shape)] for module in reversed(candidate.around))
    matrices = next((scope for scope in scopes if len(scope) > 1), [candidate.parameter])
    place = next(i for i, parameter in enumerate(matrices) if parameter is candidate.parameter)
    is_glu = type(holder).__name__.lower().endswith(("glu", "gatedlinearunit"))
    looks_fused = is_glu or bool(re.search(r"gate_?up|up_?gate|fused", candidate.role))
    # Experts are stored (out, in) or (in, out), according to the model.
    for dim in (0, 1) if len(shape) > 2 else (candidate.out_dim,):
        length, width = shape[dim - 2], shape[-1 - dim]
        others = [(p.shape[dim - 2], p.shape[-1 - dim]) for p in matrices]
        if any(taken_in == length for _, taken_in in others[:place] + others[place + 1 :]):
            looks_fused &= len(shape) > 2
        elif length % 2 == 0 and (width, length // 2) in others[place + 1 :]:
            size = 1 if _is_a(holder, "GptOss") else length // 2
            names = ("up", "gate") if getattr(holder, "gate_last", is_glu) else ("gate", "up")
            return Cut((size, size), dim, length // (2 * size), names)
    return None if looks_fused else Cut()


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
