"""One decoder that covers the configurations of MSign (arXiv 2602.01734, Table 4) by its `TransformerConfig`.

Names of tensors end in their dimensions: B batch, T time, S = BT tokens, D model width, N query heads, K key and value
heads, H width of a head, R = H / 2 rotated pairs of a head, C width of the latent, F MLP width, E experts, A experts
that a token goes to, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msign_lightning.recipes.low_precision import BFloat16Attention

Norm = Literal["layernorm", "rmsnorm", "none"]
Activation = Literal["gelu", "gelu_tanh", "swiglu"]
Positions = Literal["none", "rope"]
AttentionForm = Literal["exact", "bf16_biased", "bf16_stable"]

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
        norm: Layer norm or RMS norm, with a gain and no bias; "none" leaves only a layer norm before the head.
        activation: GELU, exact or by tanh, or SwiGLU (a SiLU gate; arXiv 2002.05202, Eq. 6).
        positions: None, or rotary embeddings (arXiv 2104.09864).
        rope_base: Base of the rotary wavelengths.
        attention: How scores become outputs: "exact" by PyTorch's kernels, or in bfloat16 throughout, in the biased or
            in the stable form of arXiv 2510.04212 (`BFloat16Attention`).
        qk_norm: RMS norm of each query and key head (arXiv 2302.05442).
        latent_width: Width C of the latent from which every second block makes its keys and values (`LatentAttention`);
            None for none.
        n_experts: Number of experts E of each MLP (`MoE`); None for one MLP.
        experts_per_token: Number of experts A that each token goes to.
        balance_weight: Factor on the balancing loss of the experts.
        tied_head: Whether the head shares the embedding's weight.
        init_std: Standard deviation of the blocks' matrices at the start.
        embedding_std: Standard deviation of embedding and head at the start.
        zero_query: Whether W_Q starts at zero.
        scaled_residual: Whether the matrices that write to the residual stream start smaller, by 1/√(2L).
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
    attention: AttentionForm = "exact"
    qk_norm: bool = False
    latent_width: int | None = None
    n_experts: int | None = None
    experts_per_token: int = 4
    balance_weight: float = 0.01
    tied_head: bool = True
    init_std: float = 0.08
    embedding_std: float = 0.02
    zero_query: bool = True
    scaled_residual: bool = True
    embedding_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_layers", "width", "n_heads", "mlp_width", "latent_width", "n_experts"):
            value = getattr(self, name)
            may_be_none = name in ("latent_width", "n_experts")
            if not (value is None and may_be_none) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value}")
        for name, allowed in (
            ("norm", Norm),
            ("activation", Activation),
            ("positions", Positions),
            ("attention", AttentionForm),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {getattr(self, name)!r}")
        for name in ("init_std", "embedding_std", "embedding_scale", "rope_base"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.width % self.n_heads:
            raise ValueError(f"n_heads must divide width {self.width}, got {self.n_heads}")
        if self.n_kv_heads is not None and (self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads):
            raise ValueError(f"n_kv_heads must be positive and divide n_heads {self.n_heads}, got {self.n_kv_heads}")
        if self.n_experts is not None and not 1 <= self.experts_per_token <= self.n_experts:
            raise ValueError(
                f"experts_per_token must be from 1 to n_experts {self.n_experts}, got {self.experts_per_token}"
            )
        if self.balance_weight < 0:
            raise ValueError(f"balance_weight must not be negative, got {self.balance_weight}")
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
        """Standard deviation of the matrices that write to the residual stream: init_std, or that over √(2L)."""
        return self.init_std / math.sqrt(2 * self.n_layers) if self.scaled_residual else self.init_std


def _linear(d_in: int, d_out: int, std: float) -> nn.Linear:
    linear = nn.Linear(d_in, d_out, bias=False)
    nn.init.normal_(linear.weight, std=std)
    return linear


def _norm(config: TransformerConfig, *, is_last: bool = False) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.width, eps=NORM_EPS)
    if config.norm == "none" and not is_last:
        return nn.Identity()
    return nn.LayerNorm(config.width, eps=NORM_EPS, bias=False)


def _activate(config: TransformerConfig, up: Tensor, gate: Tensor | None) -> Tensor:
    """gelu(up), or silu(gate) ⊙ up."""
    if gate is not None:
        return F.silu(gate) * up
    return F.gelu(up, approximate="tanh" if config.activation == "gelu_tanh" else "none")


def rotary_angles(length: int, config: TransformerConfig, device: torch.device) -> Tensor:
    """Angles t · base^(−2i/H) of the rotary embeddings (arXiv 2104.09864, Eq. 15), of shape (T, H/2), in fp32."""
    exponents = torch.arange(0, config.head_width, 2, device=device, dtype=torch.float32) / config.head_width
    return torch.outer(torch.arange(length, device=device, dtype=torch.float32), config.rope_base**-exponents)


def rotate(x_BNTH: Tensor, angles_TR: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i+H/2}) of each head by the angle of their position, computing in fp32."""
    cos, sin = angles_TR.cos(), angles_TR.sin()
    a_BNTR, b_BNTR = x_BNTH.float().chunk(2, dim=-1)
    return torch.cat((a_BNTR * cos - b_BNTR * sin, b_BNTR * cos + a_BNTR * sin), dim=-1).type_as(x_BNTH)


def _attend(config: TransformerConfig, q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> Tensor:
    """Causal attention of N query heads to K key and value heads, of shape (B, N, T, H)."""
    group = q_BNTH.shape[1] // k_BKTH.shape[1]
    if config.attention == "exact":
        return F.scaled_dot_product_attention(q_BNTH, k_BKTH, v_BKTH, is_causal=True, enable_gqa=group > 1)
    k_BNTH, v_BNTH = (x.repeat_interleave(group, dim=1) for x in (k_BKTH, v_BKTH))
    is_stable = config.attention == "bf16_stable"
    return BFloat16Attention.apply(q_BNTH, k_BNTH, v_BNTH, is_stable)  # type: ignore[no-any-return, no-untyped-call]


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
        y_BNTH = _attend(self.config, q_BNTH, k_BKTH, v_BKTH)
        y_BTD: Tensor = self.o_proj(y_BNTH.transpose(1, 2).flatten(2))
        return y_BTD


class LatentAttention(nn.Module):
    """Causal attention whose keys and values are made from one narrow latent c = norm(W_A x), W_A of shape (C, D).

    Multi-head latent attention (arXiv 2405.04434, Eq. 9–11) without its rotary part, as Sigma-40M has rotary embeddings
    in its other blocks only (arXiv 2602.01734, Table 4). Keys are W_K c and values W_V c, of N heads each.
    """

    def __init__(self, config: TransformerConfig, latent_width: int) -> None:
        super().__init__()
        self.config = config
        self.q_proj = _linear(config.width, config.width, 0.0 if config.zero_query else config.init_std)
        self.kv_a_proj = _linear(config.width, latent_width, config.init_std)
        self.kv_norm = nn.RMSNorm(latent_width, eps=NORM_EPS)
        self.k_proj = _linear(latent_width, config.width, config.init_std)
        self.v_proj = _linear(latent_width, config.width, config.init_std)
        self.o_proj = _linear(config.width, config.width, config.residual_init_std)
        self.q_norm = nn.RMSNorm(config.head_width, eps=NORM_EPS) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_width, eps=NORM_EPS) if config.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, angles_TR: Tensor | None) -> Tensor:
        shape = (*x_BTD.shape[:2], -1, self.config.head_width)
        c_BTC = self.kv_norm(self.kv_a_proj(x_BTD).to(self.kv_norm.weight.dtype))  # which autocast has rounded
        q_BNTH = self.q_norm(self.q_proj(x_BTD).view(shape)).transpose(1, 2)
        k_BNTH = self.k_norm(self.k_proj(c_BTC).view(shape)).transpose(1, 2)
        v_BNTH = self.v_proj(c_BTC).view(shape).transpose(1, 2)
        y_BNTH = _attend(self.config, q_BNTH, k_BNTH, v_BNTH)
        y_BTD: Tensor = self.o_proj(y_BNTH.transpose(1, 2).flatten(2))
        return y_BTD


class MLP(nn.Module):
    """W_down gelu(W_up x), or with SwiGLU W_down (silu(W_gate x) ⊙ W_up x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        gated = config.activation == "swiglu"
        self.gate_proj = _linear(config.width, config.mlp_width, config.init_std) if gated else None
        self.up_proj = _linear(config.width, config.mlp_width, config.init_std)
        self.down_proj = _linear(config.mlp_width, config.width, config.residual_init_std)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF = None if self.gate_proj is None else self.gate_proj(x_BTD)
        y_BTD: Tensor = self.down_proj(_activate(self.config, self.up_proj(x_BTD), gate_BTF))
        return y_BTD


class Experts(nn.Module):
    """E `MLP`s, their matrices stacked: (E, F, D), and (E, D, F) down."""

    def __init__(self, config: TransformerConfig, n_experts: int) -> None:
        super().__init__()
        self.config = config
        up, down = (n_experts, config.mlp_width, config.width), (n_experts, config.width, config.mlp_width)
        gated = config.activation == "swiglu"
        self.gate_proj = nn.Parameter(torch.randn(up) * config.init_std) if gated else None
        self.up_proj = nn.Parameter(torch.randn(up) * config.init_std)
        self.down_proj = nn.Parameter(torch.randn(down) * config.residual_init_std)

    def forward(self, x_SD: Tensor, counts: list[int]) -> Tensor:
        """The first `counts[0]` tokens through expert 0, the next `counts[1]` through expert 1, and so on."""
        outputs = []
        for e, x_ZD in enumerate(torch.split(x_SD, counts)):
            gate_ZF = None if self.gate_proj is None else F.linear(x_ZD, self.gate_proj[e])
            h_ZF = _activate(self.config, F.linear(x_ZD, self.up_proj[e]), gate_ZF)
            outputs.append(F.linear(h_ZF, self.down_proj[e]))
        return torch.cat(outputs)


class MoE(nn.Module):
    """A mixture of experts: each token goes to the A experts of highest probability, whose outputs are weighted by it.

    Probabilities are softmax(W_R x) in fp32; those of the A chosen are divided by their sum. `balance` is the balancing
    loss of the last forward, E Σ_e f_e p_e (arXiv 2101.03961, Eq. 4), with f_e the share of the choices that fell on
    expert e and p_e its mean probability: 1 if they are even, up to E / A if all tokens go to the same.
    """

    balance: Tensor

    def __init__(self, config: TransformerConfig, n_experts: int) -> None:
        super().__init__()
        self.n_experts, self.n_chosen = n_experts, config.experts_per_token
        self.router = _linear(config.width, n_experts, config.init_std)
        self.experts = Experts(config, n_experts)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_SD = x_BTD.flatten(0, 1)
        p_SE = F.softmax(self.router(x_SD).float(), dim=-1)
        p_SA, e_SA = p_SE.topk(self.n_chosen, dim=-1)
        p_SA = p_SA / p_SA.sum(dim=-1, keepdim=True)
        counts_E = e_SA.flatten().bincount(minlength=self.n_experts)
        self.balance = self.n_experts * (counts_E / e_SA.numel() * p_SE.mean(dim=0)).sum()

        order = e_SA.flatten().argsort(stable=True)
        tokens = order // self.n_chosen
        out_ZD = self.experts(x_SD[tokens], counts_E.tolist())
        out_ZD = out_ZD * p_SA.flatten()[order, None].to(out_ZD.dtype)
        y_SD = torch.zeros_like(x_SD, dtype=out_ZD.dtype).index_add(0, tokens, out_ZD)
        return y_SD.view(x_BTD.shape)


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

    The blocks' matrices start as N(0, init_std²), W_O and W_down as N(0, residual_init_std²), W_Q at zero if
    `zero_query`, embedding and head as N(0, embedding_std²), gains at one. The µP initialisation of arXiv 2602.01734 is
    an `init_std` of four times the value in Table 4; its learning rates are set in `recipes.module.LanguageModel`.

    Args:
        config: Shape and initialisation.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, *_sublayers(config, i)) for i in range(config.n_layers))
        self.norm = _norm(config, is_last=True)
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

    def balance_loss(self) -> Tensor | float:
        """`balance_weight` times the mean balancing loss of the experts in the last forward; 0 without experts."""
        losses = [block.mlp.balance for block in self.blocks if isinstance(block.mlp, MoE)]
        return self.config.balance_weight * torch.stack(losses).mean() if losses else 0.0


def _sublayers(config: TransformerConfig, index: int) -> tuple[nn.Module, nn.Module]:
    """Attention and MLP of a block; in a stack with latent attention every second block has it."""
    latent_width = config.latent_width if index % 2 else None
    attention = Attention(config) if latent_width is None else LatentAttention(config, latent_width)
    return attention, MLP(config) if config.n_experts is None else MoE(config, config.n_experts)
