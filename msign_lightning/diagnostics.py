"""What is measured while a model trains, framework-free: singular values and spectral alignment.

Two things come before a collapse: the stable rank of weights falls (arXiv 2602.01734), and the inputs of a layer gather
on one side of the top singular vector of its weight (arXiv 2510.04202). `SpectrumMonitor` measures the first,
`SpectralAlignment` the second, and a `CollapseDetector` turns them, the loss and the gradient norm into alarms::

    spectra = SpectrumMonitor(model)
    alignment = SpectralAlignment(model)
    detector = CollapseDetector()

    spectrum = spectra.measure()
    with alignment.armed(spectrum):
        loss = model(batch).loss
    alarms = detector.update(
        step,
        loss=loss.item(),
        stable_ranks={m.name: m.stable_rank for m in spectrum.matrices},
        sign_diversity={m.name: m.sign_diversity for m in alignment.result().matrices},
    )
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from msign_lightning.eager import uncompiled
from msign_lightning.linalg import top_singular_triplets
from msign_lightning.restoration import chunks, matrix_names, to_compute_dtype
from msign_lightning.sharding import gather
from msign_lightning.targets import Cut, Group, Target, select_targets

__all__ = [
    "Alignment",
    "MatrixAlignment",
    "MatrixSpectrum",
    "SpectralAlignment",
    "Spectrum",
    "SpectrumMonitor",
]

# --- singular values ---------------------------------------------------------------------------------------------

_COLD_ITERATIONS = 16  # twice what σ₁ needs, for the sake of σ₂
_WARM_ITERATIONS = 2


class MatrixSpectrum(NamedTuple):
    """The top of one matrix's spectrum: all zero for a zero matrix, NaN for one that is not finite."""

    name: str
    group: Group
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
    groups: tuple[Group, ...]
    stable_ranks: Tensor
    spectral_norms: Tensor
    second_norms: Tensor
    vectors: tuple[tuple[Tensor, Tensor], ...]

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Spectrum:
        """The values averaged over all ranks, each of which must call this: the same floats on every rank.

        Ranks measure the same weights, but may differ in rounding, and a decision must not hang on that.
        """
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

        They are `stable_rank/min` and `stable_rank/geometric_mean`, over all and per group
        (`stable_rank/<group>/min`), and `spectral_norm/max`.
        """
        sound = [m for m in self.matrices if m.stable_rank > 0]
        metrics = {}
        for group in ("", *sorted({m.group for m in sound})) if sound else ():
            ranks = [m.stable_rank for m in sound if group in ("", m.group)]
            prefix = f"stable_rank/{group}/" if group else "stable_rank/"
            metrics[f"{prefix}min"] = min(ranks)
            metrics[f"{prefix}geometric_mean"] = math.exp(fmean(map(math.log, ranks)))
        if sound:
            metrics["spectral_norm/max"] = max(m.spectral_norm for m in sound)
        if per_matrix:
            metrics |= {f"stable_rank/{m.name}": m.stable_rank for m in self.matrices}
            metrics |= {f"spectral_norm/{m.name}": m.spectral_norm for m in self.matrices}
        return metrics


class SpectrumMonitor:
    """Stable rank, top two singular values and top singular vectors of weight matrices, by warm power iteration.

    The first measurement takes 16 iterations, each later one 2, from the vectors of the one before with a tenth of
    fresh noise. Singular values are estimated from below, so stable ranks from above: within 2 % while weights drift
    slowly, and least where the stable rank is low; after an application of MSign, which leaves the largest values close
    together, by up to a fifth for some measurements. Matrices of one shape are measured in one batch. Sharded weights
    are gathered, so every rank must call `measure` at the same steps.

    Args:
        model: The model that holds the matrices. It must be final: cast, wrapped and sharded as it is trained.
        targets: "attention", "mlp", "all_2d" (both), or globs over parameter names; see `select_targets`.
        exclude: Globs over parameter names to leave out.
        cuts: Globs over parameter names → `Cut`, for fused parameters whose layout cannot be known.
        exact: Whether to take a float64 SVD instead, for small models and for reference.

    Raises:
        ValueError: An argument is out of its range, or nothing is selected.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: str | Sequence[str] = "all_2d",
        *,
        exclude: str | Sequence[str] = (),
        cuts: Mapping[str, Cut] | None = None,
        exact: bool = False,
    ) -> None:
        self.targets = select_targets(model, targets, exclude=exclude, cuts=cuts)
        self.exact = exact
        self._chunks = list(chunks(self.targets))
        self._measurements = 0
        self._right: dict[str, Tensor] = {}  # of each target, (count, n, 2)

    @torch.no_grad()
    def measure(self) -> Spectrum:
        """Measures the weights as they are now."""
        names: list[str] = []
        groups: list[Group] = []
        values: list[Tensor] = []
        vectors: list[tuple[Tensor, Tensor]] = []
        for chunk in self._chunks:
            wholes = {parameter: gather(parameter) for parameter in dict.fromkeys(t.parameter for t in chunk)}
            matrices = torch.cat([to_compute_dtype(t.matrix(wholes[t.parameter])) for t in chunk])
            del wholes
            U, S, V = _triplets_by_svd(matrices) if self.exact else self._top_by_power(chunk, matrices)
            first, second = nn.functional.pad(S, (0, 1))[:, :2].unbind(1)  # a single row or column has no second
            names += [name for target in chunk for name in matrix_names(target)]
            groups += [target.group for target in chunk for _ in range(target.count)]
            values.append(torch.stack([_stable_ranks(matrices, first), first, second]))
            vectors += zip(U[..., 0], V[..., 0], strict=True)
        self._measurements += 1
        ranks, firsts, seconds = torch.cat([part.to(values[0].device) for part in values], dim=1)
        return Spectrum(tuple(names), tuple(groups), ranks, firsts, seconds, tuple(vectors))

    def _top_by_power(self, chunk: Sequence[Target], X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Top two (or the only) singular triplets of the matrices X (b, m, n) of a chunk."""
        warm = all(target.name in self._right for target in chunk)
        U, S, V = top_singular_triplets(
            X,
            min(2, *chunk[0].shape),
            iterations=_WARM_ITERATIONS if warm else _COLD_ITERATIONS,
            V=torch.cat([self._right[target.name] for target in chunk]).to(X.device) if warm else None,
            generator=torch.Generator(X.device).manual_seed(self._measurements),
        )
        right = torch.split(V, [target.count for target in chunk])
        self._right |= {target.name: vectors for target, vectors in zip(chunk, right, strict=True)}
        return U, S, V

    def state_dict(self) -> dict[str, Any]:
        """What later measurements start from: their count, and two vectors per matrix on the CPU."""
        vectors = {name: right.cpu() for name, right in self._right.items()}
        return {"measurements": self._measurements, "vectors": vectors}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from a saved state. Matrices that it lacks, or has in another shape, start cold."""
        shapes = {t.name: (t.count, t.shape[1], min(2, *t.shape)) for t in self.targets}
        self._measurements = state_dict["measurements"]
        self._right = {name: V for name, V in state_dict["vectors"].items() if V.shape == shapes.get(name)}


def _triplets_by_svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triplets of X (b, m, n), the values NaN where it is not finite."""
    finite = X.isfinite().flatten(1).all(1)
    U, S, Vh = torch.linalg.svd(torch.where(finite.view(-1, 1, 1), X.double(), 0.0), full_matrices=False)
    S = torch.where(finite.unsqueeze(-1), S, math.nan)
    return U.to(X.dtype), S.to(X.dtype), Vh.mT.to(X.dtype)


def _stable_ranks(X: Tensor, norms: Tensor) -> Tensor:
    """Of X (b, m, n) with the spectral norms (b,). Dividing first keeps squares from overflowing."""
    scale = torch.where(norms == 0, 1.0, norms).view(-1, 1, 1)
    ranks: Tensor = torch.linalg.vector_norm(X / scale, dim=(-2, -1)).square()
    return ranks


# --- spectral alignment ------------------------------------------------------------------------------------------

# Cosines are counted between these edges, finest around zero, where those of healthy layers lie (std 1/√n).
_BINS = 128
_EDGES = tuple((2 * i / _BINS - 1) ** 3 for i in range(_BINS + 1))
_MAX_COSINES = 2**24  # 64 MB in fp32: so many are kept before they are counted
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class MatrixAlignment(NamedTuple):
    """How the inputs of one matrix lie to its top right singular vector v₁, whose own sign is arbitrary.

    With p the share of tokens x that have v₁ᵀx > 0, all NaN if v₁ was undefined or no token was seen:

    Attributes:
        name: Name of the matrix.
        group: Its group.
        tokens: How many tokens were seen.
        majority_fraction: max(p, 1 − p): 0.5 in health, 1 when collapsed.
        sign_diversity: 2 min(p, 1 − p): 1 in health, 0 when collapsed.
        mean: Mean of the cosines v₁ᵀx / ‖x‖.
        quantiles: Their 5, 25, 50, 75 and 95 % quantiles, interpolated between the edges of bins.
    """

    name: str
    group: Group
    tokens: int
    majority_fraction: float
    sign_diversity: float
    mean: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Alignment:
    """The distribution of cosines between tokens and v₁ for N matrices, on the device until floats are asked for.

    Attributes:
        names: Names of the matrices.
        groups: "attention", "mlp" or "other" for each.
        cumulative: How many tokens have a cosine of at most each of `edges`, of shape (N, len(edges)).
        sums: Sum of the cosines, of shape (N,).
        defined: Whether v₁ was defined, of shape (N,).
        edges: The edges of the bins, from −1 to 1.
    """

    names: tuple[str, ...]
    groups: tuple[Group, ...]
    cumulative: Tensor
    sums: Tensor
    defined: Tensor
    edges: tuple[float, ...] = _EDGES

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Alignment:
        """The distribution over the tokens of all ranks, each of which must call this. Nothing else communicates."""
        cumulative, sums = self.cumulative.clone(), self.sums.clone()
        for tensor in (cumulative, sums):
            dist.all_reduce(tensor, group=group)
        return replace(self, cumulative=cumulative, sums=sums)

    @cached_property
    def matrices(self) -> tuple[MatrixAlignment, ...]:
        """The same in floats: one transfer from the device, the first time."""
        # Floats travel by their bits, for not every device has float64.
        parts = (self.cumulative, self.sums.view(torch.int32).unsqueeze(1), self.defined.unsqueeze(1))
        rows = torch.cat([part.long() for part in parts], dim=1).cpu()
        sums = rows[:, -2].int().view(torch.float32)
        columns = (rows[:, :-2].tolist(), sums.tolist(), rows[:, -1].bool().tolist())
        return tuple(_describe(*row) for row in zip(self.names, self.groups, *columns, strict=True))

    def metrics(self, *, per_matrix: bool = False) -> dict[str, float]:
        """Summaries over the matrices whose v₁ was defined, for any logger, and on request values per matrix.

        They are `sign_diversity/min` and `sign_diversity/mean`, over all and per group (`sign_diversity/<group>/min`),
        and `spectral_alignment/masked`, the number of matrices left out.
        """
        sound = [m for m in self.matrices if not math.isnan(m.mean)]
        metrics = {}
        for group in ("", *sorted({m.group for m in sound})) if sound else ():
            diversities = [m.sign_diversity for m in sound if group in ("", m.group)]
            prefix = f"sign_diversity/{group}/" if group else "sign_diversity/"
            metrics[f"{prefix}min"] = min(diversities)
            metrics[f"{prefix}mean"] = fmean(diversities)
        metrics["spectral_alignment/masked"] = float(len(self.matrices) - len(sound))
        if per_matrix:
            metrics |= {f"sign_diversity/{m.name}": m.sign_diversity for m in sound}
            metrics |= {f"spectral_alignment/{m.name}": m.mean for m in sound}
        return metrics


def _describe(name: str, group: Group, counts: Sequence[float], total: float, defined: bool) -> MatrixAlignment:
    tokens = counts[-1]
    if not (defined and tokens):
        return MatrixAlignment(name, group, int(tokens), math.nan, math.nan, math.nan, (math.nan,) * len(_QUANTILES))
    negative = counts[_BINS // 2] / tokens
    minority = min(negative, 1 - negative)
    quantiles = tuple(_quantile(counts, q * tokens) for q in _QUANTILES)
    return MatrixAlignment(name, group, int(tokens), 1 - minority, 2 * minority, total / tokens, quantiles)


def _quantile(counts: Sequence[float], rank: float) -> float:
    """The cosine that `rank` tokens do not exceed, from their cumulative counts."""
    i = max(bisect_left(counts, rank), 1)
    below, above = counts[i - 1], counts[i]
    part = min(max((rank - below) / (above - below), 0.0), 1.0) if above > below else 0.0
    return _EDGES[i - 1] + part * (_EDGES[i] - _EDGES[i - 1])


class _Layer(NamedTuple):
    """A linear layer with the rows of the result that its targets have, several where it is fused."""

    module: nn.Module
    rows: list[int]
    side: int  # which of (u, v) takes the inputs: the weight of `Conv1D` is (in, out)


class SpectralAlignment:
    r"""Cosines between the inputs of linear layers and the top right singular vectors of their weights.

    For y = W x with W = U S V^T of shape (out, in), each token x gives :math:`v_1^\top x / \|x\|` (arXiv 2510.04202).
    In a healthy layer both signs occur; nearly all tokens on one side warn of a collapse. A fused layer is taken apart:
    Q, K and V have a v₁ each. Where an application of MSign, or anything else, has left no gap at the top of the
    spectrum, v₁ is arbitrary and the matrix is masked.

    Hooks exist only while armed, count only in training mode, leave inputs and outputs alone, and ignore what
    activation checkpointing runs again in the backward pass, so arming may last as long as the step. A compiled model
    runs uncompiled while it is armed (`torch.compiler.set_stance`), which no later step notices: no graph is compiled
    anew. Such a step takes the time and the memory of an uncompiled one.

    Every rank counts its own tokens; see `Alignment.all_reduce`. Padding counts as any token; tokens that are zero or
    not finite don't count.

    Args:
        model: The model; as for `SpectrumMonitor`.
        targets: "attention", "mlp", "all_2d" (both), or globs over parameter names. Only weights of linear layers
            (`nn.Linear`, and `Conv1D` of Hugging Face) that are whole or cut by outputs are taken.
        exclude: Globs over parameter names to leave out.
        cuts: Globs over parameter names → `Cut`, for fused parameters whose layout cannot be known.
        gap: v₁ counts as undefined unless σ₂ < (1 − gap) σ₁.

    Raises:
        ValueError: An argument is out of its range, or no weight of a linear layer is selected.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: str | Sequence[str] = "all_2d",
        *,
        exclude: str | Sequence[str] = (),
        cuts: Mapping[str, Cut] | None = None,
        gap: float = 0.05,
    ) -> None:
        if not 0 < gap < 1:
            raise ValueError(f"gap must be between 0 and 1, got {gap!r}")
        self.gap = gap
        selected = select_targets(model, targets, exclude=exclude, cuts=cuts)
        owners = _linear_owners(model)
        self.targets = [t for t in selected if t.parameter in owners and _sees_whole_inputs(t, owners[t.parameter][0])]
        if not self.targets:
            raise ValueError(
                "targets must choose at least one weight of a linear layer (nn.Linear or Conv1D), "
                f"got {', '.join(t.name for t in selected[:3])}"
            )
        self._layers = [
            _Layer(module, [i for i, t in enumerate(self.targets) if t.parameter is parameter], 1 - _is_conv1d(module))
            for parameter in dict.fromkeys(t.parameter for t in self.targets)
            for module in owners[parameter]
        ]
        self._armed = ExitStack()
        self._cosines: list[tuple[Sequence[int], Tensor]] = []  # rows of the result and (rows, tokens), not yet counted
        self._uncounted = 0
        self._counts: dict[int, tuple[Tensor, Tensor]] = {}
        self._defined: Tensor | None = None

    @contextmanager
    def armed(self, spectrum: Spectrum) -> Iterator[None]:
        """Counts the tokens of all forward passes within; see `arm`."""
        self.arm(spectrum)
        try:
            yield
        finally:
            self.disarm()

    def arm(self, spectrum: Spectrum) -> None:
        """Starts to count, from nothing.

        Args:
            spectrum: A measurement of the weights as they are in the forward passes that follow.

        Raises:
            ValueError: The measurement lacks one of `targets`.
        """
        index_of = {name: i for i, name in enumerate(spectrum.names)}
        for target in self.targets:
            if target.name not in index_of:
                raise ValueError(f"spectrum must hold every target of the alignment, got none of {target.name}")
        self.disarm()
        order = [index_of[target.name] for target in self.targets]
        self._defined = spectrum.has_gap(self.gap)[order]
        self._cosines, self._uncounted, self._counts = [], 0, {}
        with ExitStack() as stack:
            for layer in self._layers:
                vectors = torch.stack([spectrum.vectors[order[row]][layer.side] for row in layer.rows])
                hook = partial(self._hook, layer.rows, vectors)
                stack.callback(layer.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.enter_context(uncompiled())
            self._armed = stack.pop_all()

    def disarm(self) -> None:
        """Stops counting. What was counted stays."""
        self._armed.close()

    def _hook(
        self, rows: Sequence[int], vectors: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        is_recomputed = torch._C._current_graph_task_id() != -1  # inside a backward pass
        if not module.training or is_recomputed:
            return
        cosines = _cosines(next(chain(args, kwargs.values())), vectors)
        self._cosines.append((rows, cosines))
        self._uncounted += cosines.numel()
        if self._uncounted > _MAX_COSINES:
            self._count()

    def _count(self) -> None:
        """Counts the cosines that the hooks have left, at once for all matrices with as many tokens."""
        alike: dict[object, list[tuple[Sequence[int], Tensor]]] = {}
        for rows, cosines in self._cosines:
            alike.setdefault((cosines.size(1), cosines.dtype, cosines.device), []).append((rows, cosines))
        self._cosines, self._uncounted = [], 0
        for group in alike.values():
            cumulative, sums = _cosine_counts(torch.cat([cosines for _, cosines in group]))
            for row, counts, total in zip(
                chain.from_iterable(rows for rows, _ in group), cumulative, sums, strict=True
            ):
                old = self._counts.get(row)
                self._counts[row] = (counts, total) if old is None else (old[0] + counts, old[1] + total)

    def result(self) -> Alignment:
        """What has been counted since it was armed last.

        Raises:
            RuntimeError: It has never been armed.
        """
        if self._defined is None:
            raise RuntimeError("nothing has been counted: arm before the forward pass")
        self._count()
        device = self._defined.device
        none = (torch.zeros(_BINS + 1, dtype=torch.long, device=device), torch.zeros((), device=device))
        counted = [self._counts.get(row, none) for row in range(len(self.targets))]
        cumulative = torch.stack([counts.to(device) for counts, _ in counted])
        sums = torch.stack([total.to(device) for _, total in counted])
        names, groups = (tuple(t.name for t in self.targets), tuple(t.group for t in self.targets))
        return Alignment(names, groups, cumulative, sums, self._defined)


def _linear_owners(model: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    """The linear layers that use each parameter as their weight."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        # nn.MultiheadAttention reads the weight of its output layer, and never calls the layer.
        is_called = not isinstance(module, NonDynamicallyQuantizableLinear)
        if (isinstance(module, nn.Linear) or _is_conv1d(module)) and is_called:
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter):
                owners.setdefault(weight, []).append(module)
    return owners


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of Hugging Face GPT-2, also where FSDP2 has made a derived class of it."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def _sees_whole_inputs(target: Target, layer: nn.Module) -> bool:
    return len(target.cut.sizes) < 2 or target.cut.dim == int(_is_conv1d(layer))


@torch.no_grad()
def _cosines(x: Tensor, vectors_PD: Tensor) -> Tensor:
    """Cosines (P, T) of the T tokens of x (..., D) with P unit vectors; NaN for a token that is zero or not finite."""
    x_TD = gather(x).reshape(-1, x.size(-1))
    x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    norms_T = torch.linalg.vector_norm(x_TD, dim=-1).nan_to_num_(math.nan, math.nan)  # infinity becomes NaN
    with (
        torch.autocast(x_TD.device.type, enabled=False)
        if torch.is_autocast_enabled(x_TD.device.type)
        else nullcontext()
    ):
        cosines_PT: Tensor = vectors_PD.to(x_TD) @ x_TD.mT / norms_T
    return cosines_PT


@torch.no_grad()
def _cosine_counts(cosines_PT: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative counts (P, edges) and sums (P,) of cosines, NaN left out."""
    counts = cosines_PT.isfinite()
    cosines_PT = cosines_PT.clamp(-1, 1)
    sums = torch.where(counts, cosines_PT, 0.0).sum(-1, dtype=torch.float32)
    # Sorting, unlike a histogram on CUDA, is deterministic and never waits for the device.
    ordered_PT = torch.where(counts, cosines_PT, math.inf).sort(dim=-1).values
    edges = torch.linspace(-1, 1, _BINS + 1, dtype=cosines_PT.dtype, device=cosines_PT.device) ** 3
    return torch.searchsorted(ordered_PT, edges.expand(len(cosines_PT), -1).contiguous(), right=True), sums
