"""From parameters to whole matrices and back: the one place that knows how a parameter is stored.

Everything else works on whole, local tensors. Every rank gathers, computes and writes the same, so all ranks must
come here for the same parameters in the same order (gathering a DTensor is a collective).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local_device(parameter: Tensor) -> torch.device:
    """The device on which `gather` returns the whole tensor."""
    return parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device


def gather(parameter: Tensor) -> Tensor:
    """Returns the whole tensor of a parameter: the same storage if it is not sharded, a gathered copy if it is."""
    whole = parameter.detach()
    return whole.full_tensor() if isinstance(whole, DTensor) else whole


def scatter_(parameter: Tensor, whole: Tensor) -> None:
    """Writes `whole`, as `gather` returned it and edited in place since, back into a parameter.

    Each rank keeps its own shard of its own `whole`; nothing is sent. For a parameter that is not sharded `whole` is
    the parameter's own storage, so there is nothing left to do.
    """
    if isinstance(parameter, DTensor):
        sharded = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(sharded)
