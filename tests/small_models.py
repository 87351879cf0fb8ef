"""Small real models whose spectra have a gap at the top, and batches for them."""

import support
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from msign_lightning import select_targets


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=24, n_layer=2, n_head=2, **no_dropout)
    return with_gaps_(GPT2LMHeadModel(config))


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    return with_gaps_(support.llama(vocab_size=64, positions=16)).to(dtype)


@torch.no_grad()
def with_gaps_(model: nn.Module) -> nn.Module:
    """Makes the top of every spectrum stand out, as training does."""
    for target in select_targets(model):
        W = target.matrix(target.parameter)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        S[:, 0] *= 2
        target.write_(target.parameter, U * S.unsqueeze(-2) @ Vh)
    return model


def tokens(seed: int = 1, batch: int = 4) -> Tensor:
    return torch.randint(64, (batch, 16), generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, input_ids: Tensor) -> Tensor:
    return model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
