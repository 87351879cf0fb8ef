"""Singular values of weight matrices while a model trains: stable rank, the top two values and their vectors.

Before a collapse the stable rank of weights falls (arXiv 2602.01734).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import geometric_mean
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msign_lightning.linalg import top_singular_triplets
from msign_lightning.matrices import Batch
from msign_lightning.sharding import Ranks
from msign_lightning.targets import GroupName, Target

__all__ = ["MatrixSpectrum", "Spectrum", "SpectrumMonitor"]

COLD_ITERATIONS = 16  # twice what σ₁ needs, for the sake of σ₂
_WARM_ITERATIONS = 2


class MatrixSpectrum(NamedTuple):
    """The top of one matrix's spectrum: all zero for a zero matrix, NaN for one that is not finite."""

    name: str
    group: GroupName
    stable_rank: float
    spectral_norm: float
    second_norm: float


@dataclass(frozen=True, eq=False)
class Spectrum:
    """One measurement of N matrices, on their device until `matrices` or `metrics` is asked for.

    Attributes:
        names: Names of the matrices; a member of a stack of experts has its index at the end.
        groups: "attention", "mlp" or "other" for each.
        stable_ranks: ‖W‖_F² / σ₁² (arXiv 2602.01734, Def. 3.1), of shape (N,).
        spectral_norms: σ₁, of shape (N,).
        second_norms: σ₂, of shape (N,), 0 for a matrix with a single row or column.
        vectors: u₁ (m,) and v₁ (n,) of each matrix, with W v₁ = σ₁ u₁.
    """

    names: tuple[str, ...]
    groups: tuple[GroupName, ...]
    stable_ranks: Tensor
    spectral_norms: Tensor
    second_norms: Tensor
    vectors: tuple[tuple[Tensor, Tensor], ...]

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Spectrum:
        """The values averaged over all ranks, each of which must call this: no decision hangs on a rank's rounding."""
        values = torch.stack([self.stable_ranks, self.spectral_norms, self.second_norms])
        dist.all_reduce(values, group=group)
        ranks, firsts, seconds = values / dist.get_world_size(group)
        return replace(self, stable_ranks=ranks, spectral_norms=firsts, second_norms=seconds)

    def has_gap(self, gap: float) -> Tensor:
        """Whether σ₂ < (1 − gap) σ₁, so that the top singular vectors are defined; of shape (N,)."""
        return (self.spectral_norms > 0) & (self.second_norms < (1 - gap) * self.spectral_norms)

    @cached_property
    def matrices(self) -> tuple[MatrixSpectrum, ...]:
        """The same in floats: one transfer from the device, the first time."""
        values = torch.stack([self.stable_ranks, self.spectral_norms, self.second_norms]).tolist()
        return tuple(map(MatrixSpectrum, self.names, self.groups, *values))

    def metrics(self, *, per_matrix: bool = False) -> dict[str, float]:
        """Summaries over the finite, non-zero matrices, for any logger, and on request a value per matrix.

        They are `stable_rank/min` and `/geometric_mean`, over all and per group (`stable_rank/<group>/min`), and
        `spectral_norm/max`.
        """
        sound = [m for m in self.matrices if m.stable_rank > 0]
        metrics = summarised(sound, "stable_rank", min=min, geometric_mean=geometric_mean)
        if sound:
            metrics["spectral_norm/max"] = max(m.spectral_norm for m in sound)
        if per_matrix:
            metrics |= {f"stable_rank/{m.name}": m.stable_rank for m in self.matrices}
            metrics |= {f"spectral_norm/{m.name}": m.spectral_norm for m in self.matrices}
        return metrics


def summarised(matrices: Sequence[Any], quantity: str, **statistics: Callable[..., float]) -> dict[str, float]:
    """Statistics of a quantity over all matrices and per group: `<quantity>/min`, `<quantity>/<group>/min`, ..."""
    members = {quantity: matrices}
    for group in sorted({m.group for m in matrices}):
        members[f"{quantity}/{group}"] = [m for m in matrices if m.group == group]
    return {
        f"{prefix}/{name}": statistic([getattr(m, quantity) for m in some])
        for prefix, some in members.items()
        if some
        for name, statistic in statistics.items()
    }


class SpectrumMonitor:
    """Stable rank, top two singular values and top singular vectors of weight matrices, by warm power iteration.

    The first measurement takes 16 iterations, each later one 2, from the vectors of the one before with a tenth of
    fresh noise. Stable ranks are estimated from above: within 2 % while weights drift slowly, and best where they are
    low; after an application of MSign, which leaves the largest singular values close together, within a fifth for some
    measurements. Each matrix is measured on one of the ranks that share it, all of which must call `measure` at the
    same steps and get the same.

    Args:
        targets: The matrices, as `select_targets` chooses them from the model as it is trained: cast, wrapped, sharded.
        ranks: The processes that share the work; None where only DTensors are shared.
    """

    def __init__(self, targets: Sequence[Target], *, ranks: Ranks | None = None) -> None:
        self.targets = list(targets)
        self.ranks = ranks or Ranks()
        self._measurements = 0
        self._right: dict[str, Tensor] = {}  # of each matrix, (n, 2)

    @torch.no_grad()
    def measure(self) -> Spectrum:
        """Measures the weights as they are now."""
        groups = {name: target.group for target in self.targets for name in target.matrix_names}
        shapes = self._shapes()
        found = self.ranks.each(self.targets, self._measure, width=_width, writes=False)
        self._measurements += 1
        values, vectors = [], []
        for name, row in found.items():
            m, n, k = shapes[name]
            if row is None:  # not finite on some rank
                row = torch.tensor([math.nan] * 3 + [0.0] * (m + n * k))
            head, u, V = torch.split(row, [3, m, n * k])
            values.append(head)
            self._right[name] = V.view(n, k)
            vectors.append((u, self._right[name][:, 0]))
        ranks, firsts, seconds = torch.stack([head.to(values[0].device) for head in values], dim=1)
        return Spectrum(tuple(found), tuple(groups[name] for name in found), ranks, firsts, seconds, tuple(vectors))

    def _measure(self, batch: Batch) -> Tensor:
        """A row (stable rank, σ₁, σ₂, u₁, right singular vectors) for each matrix of a batch."""
        X = batch.read()
        U, S, V = self._triplets(batch, X)
        first, second = nn.functional.pad(S, (0, 1))[:, :2].unbind(1)  # a single row or column has no second
        values = torch.stack([_stable_ranks(X, first), first, second], dim=1)
        return torch.cat([values, U[..., 0], V[..., : min(2, *X.shape[-2:])].flatten(1)], dim=1)

    def _triplets(self, batch: Batch, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Top two (or the only) singular triplets of the matrices X (B, m, n) of a batch."""
        shape = batch.targets[0].shape
        alike = (name for target in self.targets if target.shape == shape for name in target.matrix_names)
        warm = all(name in self._right for name in alike)  # whatever is in the batch, which depends on the ranks
        return top_singular_triplets(
            X,
            min(2, *shape),
            iterations=_WARM_ITERATIONS if warm else COLD_ITERATIONS,
            V=torch.stack([self._right[name].to(X.device) for name in batch.names]) if warm else None,
            generator=torch.Generator(X.device).manual_seed(self._measurements),
        )

    def _shapes(self) -> dict[str, tuple[int, int, int]]:
        """Rows, columns and number of vectors of each matrix."""
        return {name: (*t.shape, min(2, *t.shape)) for t in self.targets for name in t.matrix_names}

    def state_dict(self) -> dict[str, Any]:
        """What later measurements start from: their count, and two vectors per matrix on the CPU."""
        vectors = {name: right.cpu() for name, right in self._right.items()}
        return {"measurements": self._measurements, "vectors": vectors}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from a saved state. Matrices that it lacks, or has in another shape, start cold."""
        shapes = self._shapes()
        self._measurements = state_dict["measurements"]
        self._right = {name: V for name, V in state_dict["vectors"].items() if V.shape == shapes.get(name, ())[1:]}


def _width(target: Target) -> int:
    (m, n), k = target.shape, min(2, *target.shape)
    return 3 + m + n * k


def _stable_ranks(X: Tensor, norms: Tensor) -> Tensor:
    """Of X (b, m, n) with the spectral norms (b,). Dividing first keeps squares from overflowing."""
    scale = torch.where(norms == 0, 1.0, norms).view(-1, 1, 1)
    ranks: Tensor = torch.linalg.vector_norm(X / scale, dim=(-2, -1)).square()
    return ranks
