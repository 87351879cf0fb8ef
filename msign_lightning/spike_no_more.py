"""Spike No More (arXiv 2312.16903): small sub-layers and a large shortcut, so that gradients start and stay small.

Loss spikes come from sudden growth of the gradient norm. In a pre-norm transformer it is bounded by the product of the
sub-layers' Jacobian norms, and those by (σ for standard deviations, J^Z for the Jacobian of the heads)::

    MLP         1 + (σ₁σ₂ / σ_x')·(√d + √d_ffn)²
    attention   1 + (σ_O / σ_x)·2√d·‖J^Z‖₂

The bounds are near one if the weights are small (small sub-layers) and the residual stream x is not (large shortcut).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from msign_lightning.settings import Settings, with_settings
from msign_lightning.targets import Cut, Target, select_targets

__all__ = ["Shortcut", "SpikeNoMoreReport", "SpikeNoMoreSettings", "add_shortcut_", "spike_no_more_"]

Shortcut = Literal["scaled_embed", "embed_ln"]

# The attribute of the embedding that says what has been done to its model: "init", and the shortcut.
_MARK = "_spike_no_more"

_NOT_TOKENS = re.compile(r"wpe|pos|type|segment|relative")
# Names of the layers that write to the residual stream: W_O of an attention and W_2 of an MLP.
_OUTPUT = re.compile(
    r"(^|\.)(((o|out|c|down)_proj|proj(_out)?|w?o|w_o|out|out_lin|fc2|(linear|lin|w)_?2|dense_4h_to_h|(fc|attn|ff)_out)"
    r"(_weight)?|(?<!intermediate\.)dense)$"
)


class SpikeNoMoreReport(NamedTuple):
    """What was done to a model.

    `std` is that of the embedding and of the `matrices` drawn anew, by their names, but for those of them that write to
    the residual stream: `outputs`, of `output_std`. Both are empty if none were drawn. `shortcut` is that which the
    model has now.
    """

    embedding: str
    std: float
    output_std: float
    matrices: tuple[str, ...]
    outputs: tuple[str, ...]
    shortcut: Shortcut | None

    def describe(self) -> str:
        """One line for a log."""
        drawn = "weights left as they are"
        if self.matrices:
            drawn = f"{len(self.matrices)} matrices of std {self.std:.3g}"
            drawn += f", {len(self.outputs)} of them {self.output_std:.3g}"
        return f"Spike No More: {drawn}; shortcut {self.shortcut or 'none'} on {self.embedding}"


@dataclass(eq=False)
class SpikeNoMoreSettings(Settings):
    """How a new model is prepared.

    Args:
        shortcut: "scaled_embed" (× √d), "embed_ln" (LayerNorm), or None for a model whose embeddings are already large,
            such as Gemma.
        init: Whether to draw the weights anew; False for a model that holds trained weights.
        embedding: Name of the module that embeds the tokens, as in `named_modules()`; None to find it.
        targets: The matrices to draw: "all_2d" or globs over parameter names; see `select_targets`.
        outputs: Globs over parameter names, for those matrices that write to the residual stream; None to find them.
        n_layers: N; None for the number of attentions.

    Raises:
        ValueError: An argument is out of its range.
    """

    shortcut: Shortcut | None = "scaled_embed"
    _: KW_ONLY
    init: bool = True
    embedding: str | None = None
    targets: str | Sequence[str] = "all_2d"
    outputs: str | Sequence[str] | None = None
    n_layers: int | None = None

    def __post_init__(self) -> None:
        _check_shortcut(self.shortcut)
        if self.n_layers is not None and (not isinstance(self.n_layers, int) or self.n_layers < 1):
            raise ValueError(f"n_layers must be a positive integer, got {self.n_layers!r}")


@with_settings(SpikeNoMoreSettings)
def spike_no_more_(model: nn.Module, settings: SpikeNoMoreSettings) -> SpikeNoMoreReport:
    """Prepares a new model for stable pre-training (Spike No More, arXiv 2312.16903), in place.

    *Small sub-layers*: the token embedding (V, d) and the matrices of attention and MLP are drawn from N(0, 2/(5d)),
    those that write to the residual stream (W_O and the MLP's W_2) from N(0, 2/(5d) · 1/(2N)) for N layers. A tied head
    is the embedding; an untied one, position tables, biases and the gains of norms are left as they are. The draws come
    from PyTorch's global generator, which all ranks must share as when they build the model.

    *Large shortcut*: see `add_shortcut_`. Without it the paper's models spike all the same.

    Either is done at most once to a model: a second call finds it done, also on a copy of the model. To build the model
    of a checkpoint, call this before its weights are loaded. For a model that holds trained weights already pass
    `init=False`: they are left as they are, now and by later calls. One whose norms are visibly trained needs it.

    Args:
        model: The model, as a rule bare: before it is compiled, wrapped or sharded, and before its optimizer is made.
        settings: The arguments of `SpikeNoMoreSettings`, `shortcut` first.

    Returns:
        What was done.

    Raises:
        ValueError: An argument is out of its range, the weights are trained, or the embedding, the matrices or their
            outputs can't be identified. The model is unchanged then.
    """
    name, module = _find_embedding(model, settings.embedding)
    _check_free(module, settings.shortcut)
    width = _width(module)
    std = output_std = math.sqrt(2 / (5 * width))
    matrices: list[Target] = []
    writers: list[Target] = []
    if settings.init and "init" not in _done(module):
        _check_new(model)
        matrices = select_targets(model, settings.targets, cuts={"*": Cut()})  # all of a fused one is drawn alike
        writers = _find_outputs(matrices, settings.outputs)
        for target in writers:
            if width not in target.shape:
                raise ValueError(
                    f"the embedding must be as wide as the residual stream, got {name} of width {width} "
                    f"and {target.name} of shape {target.shape}"
                )
        layers = settings.n_layers or sum(target.group == "attention" for target in writers)
        if layers == 0:
            raise ValueError("n_layers must be given for a model of which no output is an attention's, got None")
        output_std = std / math.sqrt(2 * layers)
        for target in matrices:
            nn.init.normal_(target.parameter, std=output_std if target in writers else std)
        weight, padding = module.get_parameter("weight"), getattr(module, "padding_idx", None)
        nn.init.normal_(weight, std=std)
        if padding is not None:
            with torch.no_grad():
                weight[padding].zero_()
    _mark(module, "init")
    drawn, outputs = (tuple(target.name for target in chosen) for chosen in (matrices, writers))
    return SpikeNoMoreReport(
        name, std, output_std, drawn, outputs, add_shortcut_(model, settings.shortcut, embedding=name)
    )


def add_shortcut_(
    model: nn.Module, shortcut: Shortcut | None = "scaled_embed", *, embedding: str | None = None
) -> Shortcut | None:
    """Makes the embeddings that enter the residual stream large (arXiv 2312.16903), in place.

    "scaled_embed" multiplies them by √d: with weights of N(0, 2/(5d)) their standard deviation becomes √(2/5).
    "embed_ln" puts a new `LayerNorm` on them, whose parameters are called `<embedding>.norm.weight` and `.bias`.
    It is a forward hook on the token embedding, which leaves its weight, hence a tied head, the names in the state dict
    and a learned position that is added afterwards alone.

    The hook is no part of a state dict: whoever loads such weights into a new model must call this on it too.

    Args:
        model: The model.
        shortcut: "scaled_embed", "embed_ln" or None for no more than it has.
        embedding: Name of the module that embeds the tokens; None to find it.

    Returns:
        The shortcut that the model has now. Asked for the one that it has, it does nothing.

    Raises:
        ValueError: The model has the other shortcut, or its embedding can't be identified.
    """
    _check_shortcut(shortcut)
    _, module = _find_embedding(model, embedding)
    _check_free(module, shortcut)
    if shortcut is not None and shortcut not in _done(module):
        width = _width(module)
        if shortcut == "scaled_embed":
            module.register_forward_hook(partial(_scale, width=width))
        else:
            weight = module.get_parameter("weight")
            module.add_module("norm", nn.LayerNorm(width, device=weight.device, dtype=weight.dtype))
            module.register_forward_hook(_normalise)
        _mark(module, shortcut)
    return _shortcut_of(module)


def _check_shortcut(shortcut: str | None) -> None:
    if shortcut is not None and shortcut not in get_args(Shortcut):
        raise ValueError(f"shortcut must be one of {get_args(Shortcut)} or None, got {shortcut!r}")


# --- the shortcut ------------------------------------------------------------------------------------------------
# Functions of the module, so that a model with them can be pickled and copied. An embedding may also serve as the head
# (llm-foundry's `wte(x, unembed=True)`): an output that is not as wide as the embedding is none.


def _scale(embedding: nn.Module, args: Any, output: Tensor, *, width: int) -> Tensor:
    return output * math.sqrt(width) if output.shape[-1] == width else output


def _normalise(embedding: nn.Module, args: Any, output: Tensor) -> Tensor:
    norm = cast(nn.LayerNorm, embedding.norm)
    return cast(Tensor, norm(output)) if output.shape[-1:] == norm.normalized_shape else output


def _done(embedding: nn.Module) -> frozenset[str]:
    return getattr(embedding, _MARK, frozenset())


def _mark(embedding: nn.Module, what: str) -> None:
    setattr(embedding, _MARK, _done(embedding) | {what})


def _shortcut_of(embedding: nn.Module) -> Shortcut | None:
    return next((shortcut for shortcut in get_args(Shortcut) if shortcut in _done(embedding)), None)


def _check_free(embedding: nn.Module, shortcut: Shortcut | None) -> None:
    present = _shortcut_of(embedding)
    if shortcut is not None and present not in (None, shortcut):
        raise ValueError(f"shortcut must be {present!r}, which the model already has, or None, got {shortcut!r}")


def _check_new(model: nn.Module) -> None:
    """Refuses a model whose norms have gains that differ, as only training makes them."""
    for name, module in model.named_modules():
        gain = getattr(module, "weight", None) if "norm" in type(module).__name__.lower() else None
        if isinstance(gain, Tensor) and gain.ndim == 1 and not gain.is_meta and bool((gain != gain[0]).any()):
            raise ValueError(f"init must be False for a model that holds trained weights, as {name} does, got True")


# --- the embedding -----------------------------------------------------------------------------------------------


def _find_embedding(model: nn.Module, name: str | None) -> tuple[str, nn.Module]:
    """The module that embeds the tokens, and its name."""
    modules = dict(model.named_modules())
    embeddings = {name: module for name, module in modules.items() if isinstance(module, nn.Embedding)}
    if name is not None:
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(f"embedding must name a module with a 2-D weight, got {name!r}; {_list(embeddings)}")
        return name, modules[name]
    stated = {id(module) for module in _stated_embeddings(modules.values())}
    found = [name for name, module in embeddings.items() if id(module) in stated] or [
        name for name in embeddings if not _NOT_TOKENS.search(name.rpartition(".")[2].lower())
    ]
    if len(found) != 1:
        raise ValueError(
            f"the token embedding can't be identified, pass embedding=<name of its module>; {_list(embeddings)}"
        )
    return found[0], embeddings[found[0]]


def _stated_embeddings(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """What models of Hugging Face say themselves."""
    stated = []
    for module in modules:
        getter = getattr(module, "get_input_embeddings", None)
        with suppress(NotImplementedError):  # of the base class, where a model is not known to embed tokens
            stated += [getter()] if callable(getter) else []
    return stated


def _list(embeddings: dict[str, nn.Embedding]) -> str:
    return f"the model's embeddings are: {', '.join(embeddings) or 'none'}"


def _width(embedding: nn.Module) -> int:
    return embedding.get_parameter("weight").shape[1]


# --- the sub-layers ----------------------------------------------------------------------------------------------


def _find_outputs(matrices: Sequence[Target], outputs: str | Sequence[str] | None) -> list[Target]:
    """Those of the matrices that write to the residual stream."""
    if outputs is not None:
        globs = [outputs] if isinstance(outputs, str) else list(outputs)
        for glob in globs:
            if not any(fnmatchcase(target.name, glob) for target in matrices):
                example = matrices[0].name
                raise ValueError(f"outputs must match one of the matrices to draw, such as {example}, got {glob!r}")
        return [target for target in matrices if any(fnmatchcase(target.name, glob) for glob in globs)]
    found = [target for target in matrices if _OUTPUT.search(target.name.removesuffix(".weight"))]
    have = {_place(target) for target in found}
    for target in matrices:
        if _place(target) not in have:
            raise ValueError(
                f"the matrix that writes to the residual stream can't be identified beside {target.name}, pass "
                "outputs=<globs over parameter names> for all W_O and W_2"
            )
    return found


def _place(target: Target) -> tuple[str, str]:
    """The sub-layer of a matrix: its group, and the innermost numbered module that it is in."""
    numbered = re.match(r"(.*\.)?\d+\.", target.name)
    return target.group, numbered.group() if numbered else ""
