"""Monitor: what is measured × how often × what an alarm does, in one framework-free object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from msign_lightning.alignment import Alignment, SpectralAlignment
from msign_lightning.collapse import Alarm
from msign_lightning.jacobian import BlockJacobians
from msign_lightning.matrices import gather, whole_shapes
from msign_lightning.restoration import Report, Restorer
from msign_lightning.settings import MonitorSettings, Quantity, with_settings
from msign_lightning.sharding import Ranks, refuse_differences
from msign_lightning.spectrum import Spectrum, SpectrumMonitor
from msign_lightning.targets import Target, select_targets

__all__ = ["Monitor", "Reading", "grad_norm"]

JACOBIAN_SEQUENCES = 2
JACOBIAN_ITERATIONS = 8
READ_INTERVAL = 10
"""Optimizer steps whose losses are brought from the device at once, with the gradient norm of the last of them."""
HISTOGRAM_INTERVAL = 10
"""Measurements of which one is written as a histogram."""


@dataclass(frozen=True)
class Reading:
    """What has been seen up to an optimizer step.

    Attributes:
        metrics: Scalars for any logger, summaries first.
        alarms: New alarms, each with its own step, which may be up to nine steps earlier.
        restored: What was restored upon them, if anything.
        spectrum: The measurement of singular values, if one was due; `alignment` that of Spectral Alignment.
        with_histograms: Whether their distributions are to be logged this time.
    """

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    alarms: tuple[Alarm, ...] = ()
    restored: Report | None = None
    spectrum: Spectrum | None = None
    alignment: Alignment | None = None
    with_histograms: bool = False

    @property
    def calls_for_action(self) -> bool:
        """Whether there is an alarm besides spikes and outliers of the loss, which pass by themselves."""
        return any(alarm.kind not in ("loss_spike", "loss_outlier") for alarm in self.alarms)

    def describe(self) -> str:
        """One line for a log: the alarms by kind, with the worst of each, and what was restored."""
        parts = []
        for (kind, step), alarms in groupby(self.alarms, lambda alarm: (alarm.kind, alarm.step)):
            first, *others = sorted(alarms, key=lambda alarm: alarm.value)
            more = f" and {len(others)} more" if others else ""
            numbers = f"({first.value:.3g}, threshold {first.threshold:.3g})"
            parts.append(f"step {step}: {kind} of {first.name}{more} {numbers}")
        if self.restored is not None:
            parts.append(f"step {self.step}: {sum(m.changed for m in self.restored.matrices)} matrices restored")
        return "; ".join(parts)


class Monitor:
    """Measures a model while it trains, raises alarms, and on request restores the matrices that raised them.

    Framework-free. Around each optimizer step::

        monitor = Monitor(model)
        monitor.begin()
        loss = model(batch).loss
        loss.backward()
        norm = grad_norm(model.parameters())
        optimizer.step()
        reading = monitor.end(loss.detach(), norm)

    *Measured* are, at the steps that are multiples of their cadence and on the weights before the step, "stable_rank"
    (arXiv 2602.01734, Def. 3.1) with σ₁, "spectral_alignment" (arXiv 2510.04202) and "jacobian_alignment" (arXiv
    2602.01734, Def. 3.2; on two sequences). The loss is taken at every step and brought from the device ten steps at a
    time, with the gradient norm of the last. A measuring step has one transfer for each quantity.

    *Alarms* are those of a `CollapseDetector`. With on_alarm="restore" the matrices whose alarm is on are restored (the
    adaptive schedule which arXiv 2602.01734 leaves to future work): those of "stable_rank" and "sign_diversity" after a
    measurement; all targets while the loss stalls; none again within `cooldown` steps. Spikes and outliers of the loss,
    which pass by themselves, are only logged, whatever `on_alarm` is.

    Several processes see the mean of what each measures, so that all raise the same alarms; all must call `begin` and
    `end` at the same steps. Only Jacobians are each process's own, and they raise no alarms. Where `torch.distributed`
    is initialised its whole group must train one model in this way.

    Args:
        model: The model. It must be final: cast, wrapped and sharded as it is trained.
        settings: The arguments of `MonitorSettings`, `measure` and `on_alarm` first. "stop" is left to the caller.

    Raises:
        ValueError: An argument is out of its range, nothing is selected, there are no blocks for the Jacobians, or the
            processes hold different matrices, as the stages of a pipeline do.
    """

    @with_settings(MonitorSettings)
    def __init__(self, model: nn.Module, settings: MonitorSettings) -> None:
        self.settings = settings
        self.measure = settings.cadences
        self.detector = settings.detector()
        self._spectra = self._alignment = self._jacobians = self._restorer = None
        self.ranks = Ranks(model)
        weights = self.measure.keys() & {"stable_rank", "spectral_alignment"}
        targets: list[Target] = []
        if weights or settings.on_alarm == "restore":
            with whole_shapes(model):
                targets = select_targets(model, settings.targets, exclude=settings.exclude, cuts=settings.cuts)
            if weights:
                self._spectra = SpectrumMonitor(targets, ranks=self.ranks)
            if "spectral_alignment" in weights:
                self._alignment = SpectralAlignment(model, targets)
            if settings.on_alarm == "restore":
                self._restorer = Restorer(targets, rule=settings.rule, ranks=self.ranks)
        if dist.is_initialized():
            mine = dist.get_rank(), [f"{t.name} of shape {t.shape}" for t in targets]
            everyone: list[Any] = [mine] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
            refuse_differences(everyone)
        if "jacobian_alignment" in self.measure:
            if self.ranks.has_flat:
                raise ValueError(
                    "measure must not hold jacobian_alignment under FSDP1, which has no whole blocks: use FSDP2"
                )
            self._jacobians = BlockJacobians(model, settings.blocks, iterations=JACOBIAN_ITERATIONS)
        self.steps = 0
        self._due: frozenset[Quantity] | None = None  # what is measured in the step that has begun
        self._stride = 1  # steps since the last `begin`, several where an optimizer steps several times a batch
        self._measurements = 0
        self._spectrum: Spectrum | None = None
        self._pending: list[Tensor] = []  # loss and gradient norm of the last steps, (2,) each
        self._restored_at: dict[str, int] = {}
        # Where the processes communicate, even about floats: NCCL knows no tensors on the CPU.
        devices = (parameter.device for parameter in model.parameters())
        self._device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))

    def begin(self) -> None:
        """To be called before the forward passes of a step; again before `end` it does nothing."""
        if self._due is not None:
            return
        # A multiple of the cadence has been reached since the last `begin`, or jumped over.
        self._due = frozenset(q for q, every in self.measure.items() if (self.steps + 1) % every < self._stride)
        if self._spectra is not None and self._due & {"stable_rank", "spectral_alignment"}:
            self._spectrum = self._spectra.measure()
            if dist.is_initialized() and not self._spectra.ranks.share(self._spectra.targets):
                self._spectrum = self._spectrum.all_reduce()
            if self._alignment is not None and "spectral_alignment" in self._due:
                self._alignment.arm(self._spectrum)
        if self._jacobians is not None and "jacobian_alignment" in self._due:
            self._jacobians.arm(JACOBIAN_SEQUENCES)

    @property
    def reads_next(self) -> bool:
        """Whether the next `end` brings values from the device, and so takes note of a gradient norm."""
        return bool(self._due) or -(self.steps + 1) % READ_INTERVAL < self._stride

    def end(self, loss: Tensor | float | None = None, grad_norm: Tensor | float | None = None) -> Reading | None:
        """To be called after each optimizer step; a step that a gradient scaler skips does not count.

        Args:
            loss: The training loss of the step, on any device; None if there is none.
            grad_norm: Norm of all gradients before they were clipped, likewise; worth computing where `reads_next`.

        Returns:
            What was seen, or None if nothing is brought from the device at this step.
        """
        self.steps += 1
        self._stride = 1 if self._due is not None else self._stride + 1
        due, self._due = self._due or frozenset(), None
        self._pending.append(_agreed(loss, grad_norm, self._device))
        if not due and self.steps % READ_INTERVAL:
            return None
        return self._read(due)

    def close(self) -> Reading | None:
        """Reads the last losses, None if there are none. It restores nothing: weights may have been saved by now."""
        self.disarm()
        self._due, self._spectrum = None, None
        return self._read(frozenset(), restore=False) if self._pending else None

    def disarm(self) -> None:
        """Lets go of the model until `begin` is called next."""
        for armed in (self._alignment, self._jacobians):
            if armed is not None:
                armed.disarm()

    def _read(self, due: frozenset[Quantity], restore: bool = True) -> Reading:
        self.disarm()
        pairs = torch.stack([pair.to(self._device) for pair in self._pending])  # those of a checkpoint are on the CPU
        history = [[None if value == -torch.inf else value for value in pair] for pair in pairs.tolist()]
        self._pending = []
        metrics: dict[str, float] = {}
        if known := [loss for loss, _ in history if loss is not None]:
            metrics["stability/loss"] = sum(known) / len(known)
        if known := [norm for _, norm in history if norm is not None]:
            metrics["stability/grad_norm"] = torch.tensor(known).max().item()  # NaN if one is

        spectrum, alignment = self._spectrum, None
        self._spectrum = None
        if spectrum is not None:
            metrics |= spectrum.metrics(per_matrix=self.settings.per_matrix)
        if self._alignment is not None and "spectral_alignment" in due:
            alignment = self._alignment.result()
            if dist.is_initialized():
                alignment = alignment.all_reduce()
            metrics |= alignment.metrics(per_matrix=self.settings.per_matrix)
        if self._jacobians is not None and "jacobian_alignment" in due and (jacobian := self._jacobians.result()):
            metrics |= jacobian.metrics(per_block=self.settings.per_matrix)

        alarms: list[Alarm] = []
        for step, (loss, norm) in enumerate(history, self.steps - len(history) + 1):
            alarms += self.detector.update(step, loss=loss, grad_norm=norm)
        alarms += self.detector.update(
            self.steps,
            stable_ranks=None if spectrum is None else {m.name: m.stable_rank for m in spectrum.matrices},
            sign_diversity=None if alignment is None else {m.name: m.sign_diversity for m in alignment.matrices},
        )
        if due or alarms:
            metrics["stability/alarms"] = float(len(self.detector.active))
        restored = self._restore(due) if restore else None
        if restored is not None:
            metrics |= restored.metrics()
        self._measurements += bool(due)
        with_histograms = bool(due) and self._measurements % HISTOGRAM_INTERVAL == 1
        return Reading(self.steps, metrics, tuple(alarms), restored, spectrum, alignment, with_histograms)

    def _restore(self, due: frozenset[Quantity]) -> Report | None:
        """Restores the matrices whose alarm is on and that were seen just now, but for those that cool down."""
        restorer, stop, cooldown = self._restorer, self.settings.stop, self.settings.cooldown
        if restorer is None or (stop is not None and self.steps > stop):
            return None
        kinds = {"stall"}
        kinds |= {"stable_rank"} if due & {"stable_rank", "spectral_alignment"} else set()
        kinds |= {"sign_diversity"} if "spectral_alignment" in due else set()
        names = {name for kind, name in self.detector.active if kind in kinds}
        if "loss" in names:
            names = {matrix for target in restorer.targets for matrix in target.matrix_names}
        ready = {m for m in names if self.steps >= self._restored_at.get(m, -cooldown) + cooldown}
        if not ready:
            return None
        self._restored_at |= dict.fromkeys(sorted(ready), self.steps)
        self.detector.clear(ready)
        return restorer.apply(ready, step=self.steps)

    def describe(self) -> str:
        """One line for a log: what is measured, how often, and what an alarm does."""
        count = 0 if self._spectra is None else sum(target.count for target in self._spectra.targets)
        quantities = ", ".join(f"{quantity} every {every} steps" for quantity, every in self.measure.items())
        action: str = self.settings.on_alarm
        action += f" (cool-down {self.settings.cooldown} steps)" if action == "restore" else ""
        return f"monitor: {quantities or 'loss and gradient norm'}; {count} matrices; on alarm: {action}"

    def state_dict(self) -> dict[str, Any]:
        """What exact resumption needs after an `end`, in tensors on the CPU and plain values."""
        return {
            "steps": self.steps,
            "stride": self._stride,
            "measurements": self._measurements,
            "pending": [pair.tolist() for pair in self._pending],
            "restored_at": dict(self._restored_at),
            "detector": self.detector.state_dict(),
            "spectra": None if self._spectra is None else self._spectra.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from a saved state; what is measured anew starts anew."""
        self.steps = state_dict["steps"]
        self._stride = state_dict["stride"]
        self._measurements = state_dict["measurements"]
        self._pending = [torch.tensor(pair, dtype=torch.float32) for pair in state_dict["pending"]]
        self._restored_at = dict(state_dict["restored_at"])
        self.detector.load_state_dict(state_dict["detector"])
        if self._spectra is not None and state_dict["spectra"] is not None:
            self._spectra.load_state_dict(state_dict["spectra"])


@torch.no_grad()
def grad_norm(parameters: Iterable[nn.Parameter], scale: float = 1.0, *, ranks: Ranks | None = None) -> Tensor | None:
    """√Σ‖g‖² over the gradients g of the parameters, on their device; None if there are none.

    For sharded gradients it is a collective.

    Args:
        parameters: Those whose gradients to take.
        scale: What the gradients are still multiplied by, by a gradient scaler.
        ranks: Under FSDP1, those of the model: `Monitor.ranks`.
    """
    alike: dict[Any, list[Tensor]] = {}  # only tensors of one mesh, or cut over the same ranks, can be taken together
    for parameter in parameters:
        gradient, cut = parameter.grad, None if ranks is None else ranks.cut(parameter)
        if gradient is not None:
            mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
            alike.setdefault(cut or mesh, []).append(gradient)
        elif cut is not None:  # others may have a part of it
            alike.setdefault(cut, [])
    norms = []
    for key, gradients in alike.items():
        norm = gather(torch.nn.utils.get_total_norm(gradients))
        if isinstance(key, tuple):
            group, device = key
            norm = norm.to(device).square()
            dist.all_reduce(norm, group=group)
            norm = norm.sqrt()
        norms.append(norm)
    return torch.nn.utils.get_total_norm(norms) / scale if norms else None


def _agreed(loss: Tensor | float | None, norm: Tensor | float | None, device: torch.device) -> Tensor:
    """Both in one tensor (2,), averaged over the processes: −∞ for what there is not, which no norm or loss is."""
    pair = torch.full((2,), -torch.inf, dtype=torch.float32, device=device)
    for i, value in enumerate((loss, norm)):
        if value is not None:  # a float fills its place without waiting for the device, as a copy would
            pair[i] = gather(value).reshape(()) if isinstance(value, Tensor) else value
    if dist.is_initialized():
        dist.all_reduce(pair)
        pair /= dist.get_world_size()
    return pair
