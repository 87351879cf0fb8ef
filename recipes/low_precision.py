"""Attention in bfloat16 throughout, as flash attention computes it: in its biased and in its stable form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TIE = 1e-3  # scores so close to the largest of their row count as equal to it
SHIFT = 2.0


class BFloat16Attention(torch.autograd.Function):
    """Causal attention with scores, probabilities, output and δ = Σ dO ⊙ O in bfloat16 (arXiv 2510.04212).

    Where several scores of a row are the largest, their exp(S − max) are exactly one, and products with values that
    have one sign are rounded to one side. The output is biased then, δ with it, and the errors of the gradients, of low
    rank, add up over the steps: the paper's GPT-2 explodes after thousands of them. In the *stable* form such rows are
    shifted by twice their largest score if it is positive, and by zero if it is negative, so that no exponential is
    one. What is computed is the same but for rounding.

    Flash attention works tile by tile; here a row is one tile. It takes memory for all scores.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, stable: bool) -> Tensor:
        """For queries, keys and values of shape (..., T, H)."""
        dtype = v.dtype
        q, k, v = (x.bfloat16() for x in (q, k, v))
        S = _scores(q, k)
        shift = S.amax(-1, keepdim=True)
        if stable:
            is_tied = (shift - TIE <= S).sum(-1, keepdim=True) > 1
            shift = torch.where(is_tied, (SHIFT * shift).clamp(min=0), shift)
        P = (S - shift).exp()
        total = P.sum(-1, keepdim=True)
        output = (P @ v) / total
        ctx.save_for_backward(q, k, v, output, shift + total.log())
        ctx.dtype = dtype
        return output.to(dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dO: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, output, log_total = ctx.saved_tensors
        dO = dO.bfloat16()
        P = (_scores(q, k) - log_total).exp()
        delta = (dO * output).sum(-1, keepdim=True)
        dS = P * (dO @ v.mT - delta) / math.sqrt(q.size(-1))
        dq, dk, dv = dS @ k, dS.mT @ q, P.mT @ dO
        return dq.to(ctx.dtype), dk.to(ctx.dtype), dv.to(ctx.dtype), None


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Of shape (..., T, T), −∞ for what lies ahead."""
    ahead = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(ahead, -math.inf)
