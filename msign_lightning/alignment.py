"""How the inputs of linear layers lie to the top singular vectors of their weights (arXiv 2510.04202).

Before a collapse they gather on one side. A measurement needs a `Spectrum` of the same weights::

    targets = select_targets(model)
    spectra, alignment = SpectrumMonitor(targets), SpectralAlignment(model, targets)
    with alignment.armed(spectra.measure()):
        loss = model(batch).loss
    metrics = alignment.result().metrics()
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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

from msign_lightning.jacobian import uncompiled
from msign_lightning.matrices import gather
from msign_lightning.spectrum import Spectrum, summarised
from msign_lightning.targets import GroupName, Target

__all__ = ["Alignment", "MatrixAlignment", "SpectralAlignment"]

# Cosines are counted between these edges, finest around zero, where those of healthy layers lie (std 1/√n).
_BINS = 128
_EDGES = tuple((2 * i / _BINS - 1) ** 3 for i in range(_BINS + 1))
_GAP = 0.05  # v₁ counts as undefined unless σ₂ < (1 − gap) σ₁
_MAX_COSINES = 2**24  # 64 MB in fp32: so many are kept before they are counted


class MatrixAlignment(NamedTuple):
    """How the inputs of one matrix lie to its top right singular vector v₁, whose own sign is arbitrary.

    `sign_diversity` is 2 min(p, 1 − p), where p is the share of tokens x that have v₁ᵀx > 0: 1 in health, 0 when
    collapsed. `mean` is that of the cosines v₁ᵀx / ‖x‖. Both are NaN if v₁ was undefined or no token was seen.
    """

    name: str
    group: GroupName
    tokens: int
    sign_diversity: float
    mean: float


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
    groups: tuple[GroupName, ...]
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

        They are `sign_diversity/min` and `/mean`, over all and per group (`sign_diversity/<group>/min`), and
        `spectral_alignment/masked`, the number of matrices left out.
        """
        sound = [m for m in self.matrices if not math.isnan(m.mean)]
        metrics = summarised(sound, "sign_diversity", min=min, mean=fmean)
        metrics["spectral_alignment/masked"] = float(len(self.matrices) - len(sound))
        if per_matrix:
            metrics |= {f"sign_diversity/{m.name}": m.sign_diversity for m in sound}
            metrics |= {f"spectral_alignment/{m.name}": m.mean for m in sound}
        return metrics


def _describe(name: str, group: GroupName, counts: Sequence[int], total: float, defined: bool) -> MatrixAlignment:
    tokens = counts[-1]
    if not (defined and tokens):
        return MatrixAlignment(name, group, tokens, math.nan, math.nan)
    negative = counts[_BINS // 2] / tokens
    return MatrixAlignment(name, group, tokens, 2 * min(negative, 1 - negative), total / tokens)


class SpectralAlignment:
    r"""Cosines between the inputs of linear layers and the top right singular vectors of their weights.

    For y = W x with W = U S V^T of shape (out, in), each token x gives :math:`v_1^\top x / \|x\|` (arXiv 2510.04202).
    In a healthy layer both signs occur; nearly all tokens on one side warn of a collapse. Q, K and V of a fused layer
    have a v₁ each. Where σ₂ is above 0.95 σ₁, as after an application of MSign, v₁ is arbitrary and the matrix is
    masked.

    Hooks exist only while armed, count only in training mode, leave inputs and outputs alone, and ignore what
    activation checkpointing runs again in the backward pass, so arming may last as long as the step. A compiled model
    runs uncompiled while it is armed, in the time and memory that this takes; no graph is compiled anew.

    Every rank counts its own tokens; see `Alignment.all_reduce`. Padding counts; tokens that are zero or not finite
    don't.

    Args:
        model: The model, as it is trained.
        targets: What `select_targets` gave. Only weights of linear layers (`nn.Linear`, and `Conv1D` of Hugging Face)
            that are whole or cut by outputs are taken.

    Raises:
        ValueError: No target is a weight of a linear layer.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target]) -> None:
        owners = _linear_owners(model)
        self.targets = [t for t in targets if t.parameter in owners and _sees_whole_inputs(t, owners[t.parameter][0])]
        if not self.targets:
            raise ValueError(
                "targets must choose at least one weight of a linear layer (nn.Linear or Conv1D), "
                f"got {', '.join(t.name for t in targets[:3])}"
            )
        # Layers with the rows of the result that their targets have, several where one is fused, and which of (u, v)
        # takes the inputs: the weight of `Conv1D` is (in, out).
        self._layers = [
            (module, [i for i, t in enumerate(self.targets) if t.parameter is parameter], 1 - _is_conv1d(module))
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
        if missing := [target.name for target in self.targets if target.name not in index_of]:
            raise ValueError(f"spectrum must hold every target of the alignment, got none of {missing[0]}")
        self.disarm()
        order = [index_of[target.name] for target in self.targets]
        self._defined = spectrum.has_gap(_GAP)[order]
        self._cosines, self._uncounted, self._counts = [], 0, {}
        with ExitStack() as stack:
            for layer, rows, side in self._layers:
                vectors = torch.stack([spectrum.vectors[order[row]][side] for row in rows])
                hook = partial(self._hook, rows, vectors)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
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
            all_rows = [row for rows, _ in group for row in rows]
            counted = _cosine_counts(torch.cat([cosines for _, cosines in group]))
            for row, counts, total in zip(all_rows, *counted, strict=True):
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
        counted = zip(*(self._counts.get(row, none) for row in range(len(self.targets))), strict=True)
        cumulative, sums = (torch.stack([value.to(device) for value in values]) for values in counted)
        names, groups = zip(*((t.name, t.group) for t in self.targets), strict=True)
        return Alignment(names, groups, cumulative, sums, self._defined)


def _linear_owners(model: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    """The linear layers that use each parameter as their weight."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        # nn.MultiheadAttention reads the weight of its output layer, and never calls the layer.
        is_called = not isinstance(module, NonDynamicallyQuantizableLinear)
        is_linear = is_called and (isinstance(module, nn.Linear) or _is_conv1d(module))
        if is_linear and isinstance(weight := getattr(module, "weight", None), nn.Parameter):
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
    kind = x_TD.device.type
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
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
