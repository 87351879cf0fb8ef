"""Restoration: which matrices × when × how, in one framework-free object with one `step()`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from msign_lightning.linalg import Method, RestoreReport, Rule, check_options, default_rtol, restore_
from msign_lightning.schedule import Schedule
from msign_lightning.sharding import gather, local_device, scatter_
from msign_lightning.targets import Cut, Target, select_targets

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = 8 * 2048**2
"""Most matrix elements in one batched call (or one target, if larger): eight 2048 × 2048 matrices fill a large GPU.

It bounds the temporaries: an application needs at most three times one chunk in fp32, 400 MB, beyond the model and,
where that is sharded, the gathered parameters.
"""


class MatrixReport(NamedTuple):
    """What one application did to one matrix.

    `changed` is False if the matrix was left as it was: not finite, zero, or (rule "cap") in no need. Stable ranks are
    NaN for a matrix that is not finite.
    """

    name: str
    finite: bool
    changed: bool
    stable_rank_before: float
    stable_rank_after: float


@dataclass(frozen=True)
class Report:
    """What one application did: after which optimizer step, to which matrices, in how many seconds."""

    step: int
    matrices: tuple[MatrixReport, ...]
    seconds: float

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the matrices that were left alone because they hold NaN or infinity."""
        return tuple(m.name for m in self.matrices if not m.finite)

    def metrics(self) -> dict[str, float]:
        """Summary under the names `msign/...`, for any logger.

        Stable ranks are given as minimum and geometric mean over the finite, non-zero matrices.
        """
        metrics = {
            "msign/changed": float(sum(m.changed for m in self.matrices)),
            "msign/skipped": float(len(self.skipped)),
            "msign/seconds": self.seconds,
        }
        for moment in ("before", "after"):
            ranks = [getattr(m, f"stable_rank_{moment}") for m in self.matrices if m.finite]
            if ranks := [rank for rank in ranks if rank > 0]:
                metrics[f"msign/stable_rank_{moment}/min"] = min(ranks)
                metrics[f"msign/stable_rank_{moment}/geometric_mean"] = math.exp(sum(map(math.log, ranks)) / len(ranks))
        return metrics


class Restoration:
    """Every `period` optimizer steps, replaces weight matrices by their restored form. Framework-free.

    The default is MSign (arXiv 2602.01734, Algorithm 1 and Eq. 14): W ← ‖W‖_F · UVᵀ / ‖UVᵀ‖_F, where W = USVᵀ is the
    reduced SVD, after optimizer steps P, 2P, 3P, … The optimizer's state is left alone.

    Either call `step()` after each optimizer step, or `attach` the optimizer once::

        restoration = Restoration(model, period=100)
        restoration.attach(optimizer)

    Args:
        model: The model that holds the matrices. It must be final: cast, wrapped and sharded as it is trained.
        period: P, the number of optimizer steps between two applications.
        targets: "attention", "mlp", "all_2d" (both), or globs over parameter names; see `select_targets`.
        rule: "msign" (Eq. 14) or "cap", which only lifts the stable rank to that of a random matrix; see `restore`.
        method: How the matrix sign is computed: "auto", or one of the methods of `msign`.
        rtol: Singular values below rtol · σ₁ count as zero; None for the default of the weights' dtype.
        exclude: Globs over parameter names to leave out.
        cuts: Globs over parameter names → `Cut`, for fused parameters whose layout cannot be known.
        start: First step at which an application may happen.
        stop: Last step at which an application may happen; None for no end.

    Raises:
        ValueError: An argument is out of its range, or nothing is selected.
    """

    def __init__(
        self,
        model: nn.Module,
        period: int = 100,
        targets: str | Sequence[str] = "all_2d",
        *,
        rule: Rule = "msign",
        method: Method = "auto",
        rtol: float | None = None,
        exclude: str | Sequence[str] = (),
        cuts: Mapping[str, Cut] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        check_options(rule=rule, method=method, rtol=rtol)
        self.schedule = Schedule(period, start, stop)
        self.rule, self.method, self.rtol = rule, method, rtol
        self.targets = select_targets(model, targets, exclude=exclude, cuts=cuts)
        self._shares = [self.targets]
        self._steps = [0]
        self._known_bad: set[str] = set()

    def attach(
        self, *optimizers: Optimizer, on_report: Callable[[Report], None] | None = None
    ) -> list[torch.utils.hooks.RemovableHandle]:
        """Steps by itself after each step of the optimizer, through its post-step hook.

        Counting goes on from a state loaded before, if that had as many optimizers. A step that a gradient scaler
        skips is not counted. With several optimizers each counts its own steps, and an
        application after a step of one restores only the matrices which that one trains.

        Args:
            *optimizers: One optimizer, or all of those that train the targets.
            on_report: Called with the report of each application.

        Returns:
            One handle per optimizer; `handle.remove()` detaches.

        Raises:
            ValueError: No optimizer is given, or one of the targets is trained by none of them.
        """
        self._shares = _share_out(self.targets, optimizers)
        if len(self._steps) != len(optimizers):
            self._steps = [0] * len(optimizers)

        def hook_for(index: int) -> Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]:
            def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                report = None if was_skipped(optimizer) else self.step(index)
                if report is not None and on_report is not None:
                    on_report(report)

            return hook

        return [optimizer.register_step_post_hook(hook_for(i)) for i, optimizer in enumerate(optimizers)]

    def step(self, optimizer: int = 0) -> Report | None:
        """Counts one optimizer step and applies the rule if it is due.

        Args:
            optimizer: Which of the attached optimizers has stepped, in the order of `attach`.

        Returns:
            What was done, or None if no application was due or this optimizer trains none of the targets.
        """
        self._steps[optimizer] += 1
        due = self.schedule.due(self._steps[optimizer]) and self._shares[optimizer]
        return self.apply(optimizer) if due else None

    @torch.no_grad()
    def apply(self, optimizer: int = 0, *, names: Collection[str] | None = None) -> Report:
        """Applies the rule now, whatever the schedule says, to the matrices that `optimizer` trains.

        Args:
            optimizer: Which of the attached optimizers, in the order of `attach`.
            names: Names of the matrices to restore; None for all.
        """
        began = time.perf_counter()
        members: list[str] = []
        results: list[Tensor] = []
        share = self._shares[optimizer]
        chosen = {name for t in share for name in matrix_names(t) if names is None or name in names}
        for chunk in chunks(t for t in share if not chosen.isdisjoint(matrix_names(t))):
            in_chunk = [name for target in chunk for name in matrix_names(target)]
            wanted = torch.tensor([name in chosen for name in in_chunk])
            result = self._apply_to_chunk(chunk, wanted)
            members += [name for name in in_chunk if name in chosen]
            results.append(torch.stack([field.cpu().double() for field in result])[:, wanted])
        finite, changed, before, after = torch.cat(results, dim=1).tolist() if results else ((), (), (), ())
        matrices = tuple(
            MatrixReport(name, bool(f), bool(c), b, a)
            for name, f, c, b, a in zip(members, finite, changed, before, after, strict=True)
        )
        report = Report(self._steps[optimizer], matrices, time.perf_counter() - began)
        if news := sorted(set(report.skipped) - self._known_bad):
            self._known_bad.update(news)
            logger.warning(
                "step %d: %d matrices hold NaN or infinity and were left as they are: %s",
                report.step,
                len(news),
                ", ".join(news[:5]) + (", …" if len(news) > 5 else ""),
            )
        return report

    def _apply_to_chunk(self, chunk: Sequence[Target], wanted: Tensor) -> RestoreReport:
        """Restores those of the chunk's matrices that are wanted, a bool for each."""
        wholes = {parameter: gather(parameter) for parameter in dict.fromkeys(t.parameter for t in chunk)}
        matrices = torch.cat([to_compute_dtype(t.matrix(wholes[t.parameter])) for t in chunk])
        rtol = default_rtol(chunk[0].parameter.dtype) if self.rtol is None else self.rtol
        result = restore_(matrices, rule=self.rule, method=self.method, rtol=rtol)
        counts = [target.count for target in chunk]
        written = []
        changes = torch.split(result.changed & wanted.to(result.changed.device), counts)
        for target, new, changed in zip(chunk, torch.split(matrices, counts), changes, strict=True):
            old = target.matrix(wholes[target.parameter])
            cast = new.to(old.dtype)
            fits = changed & cast.isfinite().flatten(1).all(1)  # fp16 may overflow
            target.write_(wholes[target.parameter], torch.where(fits.view(-1, 1, 1), cast, old))
            written.append(fits)
        for parameter, whole in wholes.items():
            scatter_(parameter, whole)
        return result._replace(changed=torch.cat(written))

    def describe(self) -> str:
        """One line for a log: which matrices, how often, at what cost."""
        groups = {
            group: sum(t.count for t in self.targets if t.group == group) for group in ("attention", "mlp", "other")
        }
        counts = ", ".join(f"{count} {group}" for group, count in groups.items() if count)
        parameters = len({target.parameter_name for target in self.targets})
        flops = sum(target.svd_flops for target in self.targets)
        return (
            f"{self.rule}: {sum(groups.values())} matrices ({counts}) of {parameters} parameters "
            f"every {self.schedule.period} optimizer steps from {self.schedule.first} on"
            f"{'' if self.schedule.stop is None else f' up to {self.schedule.stop}'}, {flops:.1e} SVD FLOPs each time"
        )

    @property
    def steps(self) -> list[int]:
        """Optimizer steps counted so far, per attached optimizer."""
        return list(self._steps)

    def state_dict(self) -> dict[str, list[int]]:
        """The counted steps: all that exact resumption needs."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Sequence[int]]) -> None:
        """Continues the count of a saved state.

        Raises:
            ValueError: The state was saved with another number of optimizers.
        """
        steps = list(state_dict["steps"])
        if len(steps) != len(self._steps):
            raise ValueError(f"the steps of MSign must hold one count per optimizer ({len(self._steps)}), got {steps}")
        self._steps = steps


def was_skipped(optimizer: Optimizer) -> bool:
    """Whether a step that has just ended did nothing, for a gradient scaler saw infinity in a fused optimizer's step.

    For other optimizers a scaler doesn't call `step` at all.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and found_inf.item() > 0


def chunks(targets: Iterable[Target]) -> Iterator[list[Target]]:
    """Targets whose matrices can be stacked (same shape, dtype and device), up to `CHUNK_ELEMENTS` at a time."""
    alike: dict[object, list[Target]] = {}
    for target in targets:
        key = (target.shape, target.parameter.dtype, local_device(target.parameter))
        alike.setdefault(key, []).append(target)
    for group in alike.values():
        chunk: list[Target] = []
        for target in group:
            if chunk and (sum(t.count for t in chunk) + target.count) * math.prod(target.shape) > CHUNK_ELEMENTS:
                yield chunk
                chunk = []
            chunk.append(target)
        yield chunk


def matrix_names(target: Target) -> list[str]:
    """One name per matrix: the target's, numbered in a stack of experts."""
    return [target.name] if target.count == 1 else [f"{target.name}.{i}" for i in range(target.count)]


def to_compute_dtype(matrix: Tensor) -> Tensor:
    """In float32 or better."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _share_out(targets: list[Target], optimizers: Sequence[Optimizer]) -> list[list[Target]]:
    """The targets that each optimizer trains."""
    if not optimizers:
        raise ValueError("optimizers must hold at least one optimizer, got none")
    trained = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    shares: list[list[Target]] = [[] for _ in optimizers]
    for target in targets:
        owners = [i for i, parameters in enumerate(trained) if id(target.parameter) in parameters]
        if not owners:
            raise ValueError(
                f"every target must be trained by one of the optimizers, got {target.parameter_name!r}, which is not: "
                "exclude it or freeze it"
            )
        shares[owners[0]].append(target)
    return shares
