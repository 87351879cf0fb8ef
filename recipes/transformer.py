"""One decoder that covers the dense configurations of MSign (arXiv 2602.01734, Table 4) by its `TransformerConfig`.

Names of tensors end in their dimensions: B batch, T time, D model width, N query heads, K key and value heads, H width
of a head, R = H / 2 rotated pairs of a head, F MLP width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu", "swiglu"]
Positions = Literal["none", "rope"]

NORM_EPS = 1e-5


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and initialisation of a `Transformer`; the defaults are those of the tiny recipes.

    Args:
        vocab_size: Number of tokens V.
        n_layers: Number of blocks L.
        width: Width of the residual stream D.
        n_heads: Number of query heads N; each is width / n_heads wide.
        n_kv_heads: Number of key and value heads K; None for as many as query heads.
        mlp_width: Width of the MLP's hidden layer F.
        norm: Layer norm or RMS norm, with a gain and no bias.
        activation: Exact GELU, or SwiGLU (a SiLU gate; arXiv 2002.05202, Eq. 6).
        positions: None, or rotary embeddings (arXiv 2104.09864).
        rope_base: Base of the rotary wavelengths.
        qk_norm: RMS norm of each query and key head (arXiv 2302.05442).
        tied_head: Whether the head shares the embedding's weight.
        init_std: Standard deviation of the blocks' matrices at the start.
        embedding_std: Standard deviation of embedding and head at the start.
        zero_query: Whether W_Q starts at zero.
        embedding_scale: Factor on the embedding's output; √width is the Scaled Embed of arXiv 2312.16903.

    Raises:
        ValueError: A value is out of its range.
    """

    vocab_size: int = 256
    n_layers: int = 4
    width: int = 32
    n_heads: int = 2
    n_kv_heads: int | None = None
    mlp_width: int = 128
    norm: Norm = "layernorm"
    activation: Activation = "gelu"
    positions: Positions = "none"
    rope_base: float = 10_000.0
    qk_norm: bool = False
    tied_head: bool = True
    init_std: float = 0.08
    embedding_std: float = 0.02
    zero_query: bool = True
    embedding_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_layers", "width", "n_heads", "mlp_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value}")
        for name, allowed in (("norm", Norm), ("activation", Activation), ("positions", Positions)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {getattr(self, name)!r}")
        for name in ("init_std", "embedding_std", "embedding_scale", "rope_base"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.width % self.n_heads:
            raise ValueError(f"n_heads must divide width {self.width}, got {self.n_heads}")
        if self.n_kv_heads is not None and (self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads):
            raise ValueError(f"n_kv_heads must be positive and divide n_heads {self.n_heads}, got {self.n_kv_heads}")
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"width / n_heads must be even with positions 'rope', got {self.head_width}")

    @property
    def head_width(self) -> int:
        """Width of a head H = D / N."""
        return self.width // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads K."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def residual_init_std(self) -> float:
        """Standard deviation of the matrices that write to the residual stream: init_std / √(2L)."""
        return self.init_std / math.sqrt(2 * self.n_layers)


def _linear(d_in: int, d_out: int, std: float) -> nn.Linear:
    linear = nn.Linear(d_in, d_out, bias=False)
    nn.init.normal_(linear.weight, std=std)
    return linear


def _norm(config: TransformerConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.width, eps=NORM_EPS)
    return nn.LayerNorm(config.width, eps=NORM_EPS, bias=False)


def rotary_angles(length: int, config: TransformerConfig, device: torch.device) -> Tensor:
    """Angles t · base^(−2i/H) of the rotary embeddings (arXiv 2104.09864, Eq. 15), of shape (T, H/2), in fp32."""
    exponents = torch.arange(0, config.head_width, 2, device=device, dtype=torch.float32) / config.head_width
    return torch.outer(torch.arange(length, device=device, dtype=torch.float32), config.rope_base**-exponents)


def rotate(x_BNTH: Tensor, angles_TR: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i+H/2}) of each head by the angle of their position, computing in fp32."""
    cos, sin = angles_TR.cos(), angles_TR.sin()
    a_BNTR, b_BNTR = x_BNTH.float().chunk(2, dim=-1)
    return torch.cat((a_BNTR * cos - b_BNTR * sin, b_BNTR * cos + a_BNTR * sin), dim=-1).type_as(x_BNTH)


class Attention(nn.Module):
    """Causal multi-head attention with grouped key and value heads; W_Q, W_K, W_V and W_O are matrices of their own."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        kv_width = config.kv_heads * config.head_width
        self.q_proj = _linear(config.width, config.width, 0.0 if config.zero_query else config.init_std)
        self.k_proj = _linear(config.width, kv_width, config.init_std)
        self.v_proj = _linear(config.width, kv_width, config.init_std)
        self.o_proj = _linear(config.width, config.width, config.residual_init_std)
        self.q_norm = nn.RMSNorm(config.head_width, eps=NORM_EPS) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_width, eps=NORM_EPS) if config.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, angles_TR: Tensor | None) -> Tensor:
        shape = (*x_BTD.shape[:2], -1, self.config.head_width)
        q_BNTH = self.q_norm(self.q_proj(x_BTD).view(shape)).transpose(1, 2)
        k_BKTH = self.k_norm(self.k_proj(x_BTD).view(shape)).transpose(1, 2)
        v_BKTH = self.v_proj(x_BTD).view(shape).transpose(1, 2)
        if angles_TR is not None:
            q_BNTH, k_BKTH = rotate(q_BNTH, angles_TR), rotate(k_BKTH, angles_TR)
        grouped = self.config.kv_heads != self.config.n_heads
        y_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BKTH, v_BKTH, is_causal=True, enable_gqa=grouped)
        y_BTD: Tensor = self.o_proj(y_BNTH.transpose(1, 2).flatten(2))
        return y_BTD


class MLP(nn.Module):
    """W_down gelu(W_up x), or with SwiGLU W_down (silu(W_gate x) ⊙ W_up x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        gated = config.activation == "swiglu"
        self.gate_proj = _linear(config.width, config.mlp_width, config.init_std) if gated else None
        self.up_proj = _linear(config.width, config.mlp_width, config.init_std)
        self.down_proj = _linear(config.mlp_width, config.width, config.residual_init_std)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTF = self.up_proj(x_BTD)
        h_BTF = F.gelu(h_BTF) if self.gate_proj is None else F.silu(self.gate_proj(x_BTD)) * h_BTF
        y_BTD: Tensor = self.down_proj(h_BTF)
        return y_BTD


class Block(nn.Module):
    """A pre-norm block of any attention and any MLP: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = attention
        self.mlp_norm = _norm(config)
        self.mlp = mlp

    def forward(self, x_BTD: Tensor, angles_TR: Tensor | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), angles_TR)
        y_BTD: Tensor = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return y_BTD


class Transformer(nn.Module):
    """A pre-norm decoder without biases: tokens (B, T) → logits (B, T, V).

    The blocks' matrices start as N(0, init_std²), W_O and W_down as N(0, init_std² / 2L), W_Q at zero if `zero_query`,
    embedding and head as N(0, embedding_std²), gains at one. The µP initialisation of arXiv 2602.01734 is an
    `init_std` of four times the value in Table 4; its learning rates are set in `recipes.module.LanguageModel`.

    Args:
        config: Shape and initialisation.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, Attention(config), MLP(config)) for _ in range(config.n_layers))
        self.norm = _norm(config)
        self.head = _linear(config.width, config.vocab_size, config.embedding_std)
        if config.tied_head:
            self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT) * self.config.embedding_scale
        rope = self.config.positions == "rope"
        angles_TR = rotary_angles(tokens_BT.shape[1], self.config, x_BTD.device) if rope else None
        for block in self.blocks:
            x_BTD = block(x_BTD, angles_TR)
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        return logits_BTV
