"""What the tests of the stability monitors share: models, batches, hand-made collapses and exact references."""

from __future__ import annotations

import math

import pytest
import support
import torch
import torch.nn.functional as F
from support import assert_same as assert_same
from support import weights as weights
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from msign_lightning import select_targets, stable_rank
from msign_lightning.recipes.data import RandomWindows
from msign_lightning.recipes.transformer import Transformer, TransformerConfig

VOCAB = 64
UP = "blocks.0.mlp.up_proj.weight"
DOWN = "blocks.1.mlp.down_proj.weight"
ONE_MATRIX = {"share": 0.01, "sign_diversity": None}
"""Thresholds with which a single matrix raises its alarm."""


def recipe(n_layers: int = 2) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=VOCAB, n_layers=n_layers, width=16, mlp_width=24, zero_query=False)
    return with_gaps_(Transformer(config))


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, max_position_embeddings=16, **sizes)
    return with_gaps_(LlamaForCausalLM(config)).to(dtype)


def gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    """With fused Q, K and V."""
    torch.manual_seed(0)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return with_gaps_(
        GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **sizes, **dropouts))
    )


@torch.no_grad()
def with_gaps_(model: nn.Module) -> nn.Module:
    """Makes the top of every spectrum stand out, as training does."""
    for target in select_targets(model):
        U, S, Vh = torch.linalg.svd(target.matrix(target.parameter), full_matrices=False)
        S[:, 0] = 1.2 * S[:, 1]
        target.write_(target.parameter, U * S.unsqueeze(-2) @ Vh)
    return model


@torch.no_grad()
def collapse_(model: nn.Module, *names: str) -> None:
    """Leaves of all but the top singular value of these matrices a hundredth, so that their stable rank is almost 1."""
    for target in select_targets(model):
        if target.name in names:
            U, S, Vh = torch.linalg.svd(target.matrix(target.parameter), full_matrices=False)
            S[:, 1:] = S[:, :1] / 100
            target.write_(target.parameter, U * S.unsqueeze(-2) @ Vh)


def batch(seed: int, sequences: int = 4) -> Tensor:
    return torch.randint(VOCAB, (sequences, 12), generator=torch.Generator().manual_seed(seed))


def constant_batch(sequences: int = 4) -> Tensor:
    """One token everywhere: to a model without positions all hidden states are the same, so all tokens align."""
    return torch.full((sequences, 12), 7)


def loss_of(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the next tokens."""
    out = model(tokens_BT)
    logits_BTV = out if isinstance(out, Tensor) else out.logits
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten())


def stable_ranks(model: nn.Module) -> dict[str, float]:
    """By SVD."""
    targets = select_targets(model)
    return {t.name: stable_rank(t.matrix(t.parameter.detach())[0].double()).item() for t in targets}


def total_norm(model: nn.Module) -> float:
    """Of the gradients, in float64."""
    gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(gradients).norm().item()


def windows(batches: int) -> RandomWindows:
    return support.windows(batches, vocab_size=VOCAB, sequence_length=11)


def assert_ranks_agree(ranks: list[tuple[dict[str, Tensor], str, dict[int, dict[str, float]], list[float]]]) -> None:
    """Of two ranks, of which one has had a NaN for its loss at step 8: weights, state, readings, losses of each."""
    (a, state, rows, losses), (b, state_1, rows_1, losses_1) = ranks
    assert_same(a, b)
    assert state == state_1
    assert repr(rows) == repr(rows_1)
    assert losses != losses_1
    assert {step: row["msign/changed"] for step, row in rows.items() if "msign/changed" in row} == {4: 1, 8: 1}
    assert rows[2]["stability/loss"] == pytest.approx(sum(losses[:2] + losses_1[:2]) / 4, rel=1e-6)
    assert math.isnan(rows[8]["stability/loss"])
    # On every rank NaN was an alarm, which has cleared at the next step.
    assert [row["stability/alarms"] for step, row in rows.items() if step in (6, 8, 10)] == [1, 2, 0]
