"""Restoration: which matrices × when × how, framework-free. `Restorer` applies, `Restoration` counts and attaches."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from msign_lightning.linalg import Method, Rule, default_rtol, restore_
from msign_lightning.matrices import Batch, whole_shapes
from msign_lightning.settings import RestorationSettings, with_settings
from msign_lightning.sharding import Ranks
from msign_lightning.targets import Target, left_out, select_targets

__all__ = ["MatrixReport", "Report", "Restoration", "Restorer", "was_skipped"]

logger = logging.getLogger(__name__)


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


class Restorer:
    """Applies a rule to matrices whenever it is told to.

    Args:
        targets: What `select_targets` gave.
        rule: "msign" (arXiv 2602.01734, Eq. 14) or "cap"; see `restore`.
        method: How the matrix sign is computed: "auto", or one of the methods of `msign`.
        rtol: Singular values below rtol · σ₁ count as zero; None for the default of the weights' dtype.
        ranks: The processes that share the work; None where only DTensors are shared.

    Raises:
        ValueError: A target is on the meta device.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        rule: Rule = "msign",
        method: Method = "auto",
        rtol: float | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.targets = list(targets)
        if planned := [target.name for target in self.targets if target.parameter.is_meta]:
            raise ValueError(f"targets must hold weights, got {planned[0]} on the meta device")
        self.ranks = ranks or Ranks()
        self.rule, self.method, self.rtol = rule, method, rtol
        self._known_bad: set[str] = set()

    @torch.no_grad()
    def apply(self, names: Collection[str] | None = None, *, step: int = 0) -> Report:
        """Applies the rule now, in place.

        Args:
            names: Names of the matrices to restore, as in `Target.matrix_names`; None for all.
            step: The optimizer step, for the report.
        """
        began = time.perf_counter()
        what = f"rule {self.rule}, method {self.method}, rtol {self.rtol}"
        found = self.ranks.each(self.targets, self._restore, width=lambda target: 4, names=names, what=what)
        known = {name: row for name, row in found.items() if row is not None}
        device = next((row.device for row in known.values()), None)
        # One transfer from the device for all of them.
        rows = torch.stack([row.to(device) for row in known.values()]).tolist() if known else []
        reports = {
            name: MatrixReport(name, bool(finite), bool(changed), before, after)
            for name, (finite, changed, before, after) in zip(known, rows, strict=True)
        }
        matrices = tuple(reports.get(name, MatrixReport(name, False, False, math.nan, math.nan)) for name in found)
        report = Report(step, matrices, time.perf_counter() - began)
        if news := sorted(set(report.skipped) - self._known_bad):
            self._known_bad.update(news)
            logger.warning(
                "step %d: %d matrices hold NaN or infinity and were left as they are: %s",
                report.step,
                len(news),
                ", ".join(news[:5]) + (", …" if len(news) > 5 else ""),
            )
        return report

    def _restore(self, batch: Batch) -> Tensor:
        """Restores a batch in place; a row (finite, changed, stable rank before, after) for each matrix."""
        X = batch.read()
        rtol = default_rtol(batch.dtype) if self.rtol is None else self.rtol
        result = restore_(X, rule=self.rule, method=self.method, rtol=rtol)
        result = result._replace(changed=batch.write_(X, result.changed))
        return torch.stack([field.to(X.dtype) for field in result], dim=1)


class Restoration:
    """Every `period` optimizer steps, replaces weight matrices by their restored form. Framework-free.

    The default is MSign (arXiv 2602.01734, Algorithm 1 and Eq. 14): W ← ‖W‖_F · UVᵀ / ‖UVᵀ‖_F, where W = USVᵀ is the
    reduced SVD, after optimizer steps P, 2P, 3P, … The optimizer's state is left alone.

    Attach the optimizer once, or else call `step()` after each of its steps::

        restoration = Restoration(model, period=100)
        restoration.attach(optimizer)

    A checkpoint needs `state_dict()`: without it a resumed run restores at other steps.

    Args:
        model: The model that holds the matrices. It must be final: cast, wrapped and sharded as it is trained. Where it
            is wrapped by DDP or FSDP, the ranks share the work, so all must make it and apply at the same steps.
        settings: The arguments of `RestorationSettings`, `period` and `targets` first.

    Raises:
        ValueError: An argument is out of its range, nothing is selected, it is on the meta device, or FSDP1 is without
            `use_orig_params=True`.
    """

    @with_settings(RestorationSettings)
    def __init__(self, model: nn.Module, settings: RestorationSettings) -> None:
        self.settings = settings
        with whole_shapes(model):
            self.targets = select_targets(model, settings.targets, exclude=settings.exclude, cuts=settings.cuts)
            self._left_out = left_out(model, self.targets)
        self._restorer = Restorer(
            self.targets, rule=settings.rule, method=settings.method, rtol=settings.rtol, ranks=Ranks(model)
        )
        self._shares: list[Collection[str] | None] = [None]
        self._steps = [0]
        self._handles: list[RemovableHandle] = []

    def attach(
        self, *optimizers: Optimizer, on_report: Callable[[Report], None] | None = None
    ) -> list[RemovableHandle]:
        """Steps by itself after each step of the optimizer, through its post-step hook.

        Counting goes on from a state loaded before. A step that a gradient scaler skips is not counted. With several
        optimizers each counts its own steps, and an application after a step of one restores only the matrices which
        that one trains.

        Args:
            *optimizers: One optimizer, or all of those that train the targets; bare or wrapped by Fabric or accelerate.
            on_report: Called with the report of each application.

        Returns:
            One handle per optimizer; `handle.remove()` detaches.

        Raises:
            ValueError: No optimizer is given, something else is, another number of them than was counted before, or one
                of the targets is trained by none of them.
            RuntimeError: It is attached already.
        """
        if self._is_attached:
            raise RuntimeError("Restoration is attached already: detach it first")
        optimizers = tuple(map(_hookable, optimizers))
        self._shares = _share_out(self.targets, optimizers)
        if len(self._steps) != len(optimizers):
            if any(self._steps):
                raise ValueError(
                    f"optimizers must be as many as have been counted ({len(self._steps)}), got {len(optimizers)}"
                )
            self._steps = [0] * len(optimizers)

        def hook_for(index: int) -> Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]:
            def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                report = None if was_skipped(optimizer) else self._step(index)
                if report is not None and on_report is not None:
                    on_report(report)

            return hook

        self._handles = [optimizer.register_step_post_hook(hook_for(i)) for i, optimizer in enumerate(optimizers)]
        return list(self._handles)

    def detach(self) -> None:
        """Lets go of the optimizers; the count stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def _is_attached(self) -> bool:
        return any(handle.id in (handle.hooks_dict_ref() or ()) for handle in self._handles)

    def step(self) -> Report | None:
        """Counts one optimizer step and applies the rule if it is due.

        Returns:
            What was done, or None if no application was due.

        Raises:
            RuntimeError: It is attached, and counts by itself.
        """
        if self._is_attached:
            raise RuntimeError("Restoration is attached to the optimizer and steps by itself: don't call step()")
        return self._step(0)

    def _step(self, optimizer: int) -> Report | None:
        self._steps[optimizer] += 1
        step, names = self._steps[optimizer], self._shares[optimizer]
        is_due = self.settings.due(step) and (names is None or len(names))
        return self._restorer.apply(names, step=step) if is_due else None

    def apply(self, names: Collection[str] | None = None) -> Report:
        """Applies the rule now, whatever the schedule says; see `Restorer.apply`."""
        return self._restorer.apply(names, step=max(self._steps))

    def describe(self) -> str:
        """One line for a log: which matrices, how often, at what cost, and what of the blocks is left out."""
        groups = {
            group: sum(t.count for t in self.targets if t.group == group) for group in ("attention", "mlp", "other")
        }
        counts = ", ".join(f"{count} {group}" for group, count in groups.items() if count)
        parameters = len({target.parameter_name for target in self.targets})
        flops = sum(target.svd_flops for target in self.targets)
        return (
            f"{self._restorer.rule}: {sum(groups.values())} matrices ({counts}) of {parameters} parameters "
            f"every {self.settings.period} optimizer steps from {self.settings.first} on"
            f"{'' if self.settings.stop is None else f' up to {self.settings.stop}'}, {flops:.1e} SVD FLOPs each time"
            + (f"; {shared}" if (shared := self._restorer.ranks.describe(self.targets)) else "")
            + (f"; left out: {self._left_out}" if self._left_out else "")
        )

    def share_over(self, process_group: ProcessGroup) -> None:
        """Says that the ranks of a group all hold copies of the plain parameters, where no wrapper of the model does.

        Then each rank computes its share of the matrices and gets the others; all must apply at the same steps.
        """
        self._restorer.ranks.process_group = process_group

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


def _hookable(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, or the one that a wrapper without hooks of its own (accelerate's) holds."""
    inner: Any = optimizer
    while not isinstance(inner, nn.Module) and not hasattr(inner, "_optimizer_step_post_hooks"):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            break
    if not isinstance(inner, Optimizer):
        raise ValueError(f"optimizers must be optimizers of PyTorch or wrap one, got {type(optimizer).__name__}")
    return inner


def _share_out(targets: Sequence[Target], optimizers: Sequence[Optimizer]) -> list[Collection[str] | None]:
    """The names of the matrices that each optimizer trains."""
    if not optimizers:
        raise ValueError("optimizers must hold at least one optimizer, got none")
    trained = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    shares: list[set[str]] = [set() for _ in optimizers]
    for target in targets:
        owners = [i for i, parameters in enumerate(trained) if id(target.parameter) in parameters]
        if not owners:
            raise ValueError(
                f"every target must be trained by one of the optimizers, got {target.parameter_name!r}, which is not: "
                "exclude it or freeze it"
            )
        shares[owners[0]].update(target.matrix_names)
    return list(shares)
