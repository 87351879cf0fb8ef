"""From parameters to batches of matrices and back: the one place that knows how a parameter is stored.

Everything else works on whole, local matrices. Every rank reads, computes and writes the same, so all ranks must come
here for the same matrices in the same order (gathering a DTensor is a collective).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from msign_lightning.targets import Group, Target

__all__ = ["CHUNK_ELEMENTS", "Batch", "batches", "gather"]

CHUNK_ELEMENTS = 8 * 2048**2
"""Most matrix elements in one batch (or one target, if larger): eight 2048 × 2048 matrices fill a large GPU.

It bounds the temporaries: an application needs at most three times one batch in fp32, 400 MB, beyond the model and,
where that is sharded, the gathered parameters.
"""


class Batch:
    """B matrices of one shape, dtype and device, read and written as one tensor (B, m, n).

    Attributes:
        targets: The targets that hold them.
        names: Name of each matrix; a member of a stack of experts has its index at the end.
        groups: "attention", "mlp" or "other" for each.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = tuple(targets)
        self.names = [name for target in targets for name in target.matrix_names]
        self.groups: list[Group] = [target.group for target in targets for _ in range(target.count)]
        self._wholes: dict[nn.Parameter, Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        """What the matrices are stored in."""
        return self.targets[0].parameter.dtype

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """What belongs to each target, of a tensor (B, ...)."""
        return torch.split(values, [target.count for target in self.targets])

    def read(self) -> Tensor:
        """A copy of the matrices (B, m, n) in float32 or better."""
        self._wholes = {p: gather(p) for p in dict.fromkeys(target.parameter for target in self.targets)}
        matrices = torch.cat([target.matrix(self._wholes[target.parameter]) for target in self.targets])
        return matrices.to(torch.promote_types(matrices.dtype, torch.float32))

    def write_(self, matrices: Tensor, chosen: Tensor) -> Tensor:
        """Puts matrices back that have been read, in the dtype they are stored in.

        Args:
            matrices: The new ones, of shape (B, m, n).
            chosen: Which of them to write, of shape (B,); the others stay as they are, bit for bit.

        Returns:
            Which were written, of shape (B,): those chosen, but for any that overflow their dtype.
        """
        written = []
        for target, new, wanted in zip(self.targets, self.split(matrices), self.split(chosen), strict=True):
            whole = self._wholes[target.parameter]
            old = target.matrix(whole)
            cast = new.to(old.dtype)
            fits = wanted & cast.isfinite().flatten(1).all(1)  # fp16 may overflow
            target.write_(whole, torch.where(fits.view(-1, 1, 1), cast, old))
            written.append(fits)
        for parameter, whole in self._wholes.items():
            # An unsharded parameter is its own whole, written by now. Of a sharded one each rank keeps its own shard.
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                parameter.copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None))
        self._wholes = {}
        return torch.cat(written)


def batches(targets: Iterable[Target]) -> Iterator[Batch]:
    """The targets in batches of up to `CHUNK_ELEMENTS`."""
    alike: dict[object, list[Target]] = {}
    for target in targets:
        parameter = target.parameter
        device = parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device
        alike.setdefault((target.shape, parameter.dtype, device), []).append(target)
    for group in alike.values():
        chunk: list[Target] = []
        for target in group:
            if chunk and (sum(t.count for t in chunk) + target.count) * math.prod(target.shape) > CHUNK_ELEMENTS:
                yield Batch(chunk)
                chunk = []
            chunk.append(target)
        yield Batch(chunk)


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor: the same storage if it is not sharded, a gathered copy if it is."""
    whole = tensor.detach()
    return whole.full_tensor() if isinstance(whole, DTensor) else whole
