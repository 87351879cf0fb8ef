"""How a run looks in TensorBoard: one layout that is read from top to bottom, marks, and histograms."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from msign_lightning.monitor import Reading

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["APPLICATION", "add_layout", "add_mark", "add_reading"]

APPLICATION = "marks/applications"
ALARM = "marks/alarms"

_MARKS = [APPLICATION, ALARM]
_last_marks: WeakKeyDictionary[SummaryWriter, dict[str, int]] = WeakKeyDictionary()


def _low_and_mean(quantity: str, mean: str) -> dict[str, list[object]]:
    """A chart for all matrices and one for each kind, with the lowest value and the mean."""
    kinds = {"all matrices": quantity, "attention": f"{quantity}/attention", "mlp": f"{quantity}/mlp"}
    return {title: ["Multiline", [f"{prefix}/min$", f"{prefix}/{mean}$"]] for title, prefix in kinds.items()}


_LAYOUT = {
    "1 loss and gradient norm": {
        "loss, with applications and alarms": ["Multiline", ["stability/loss", *_MARKS]],
        "gradient norm, with applications and alarms": ["Multiline", ["stability/grad_norm", *_MARKS]],
    },
    "2 stable rank": _low_and_mean("stable_rank", "geometric_mean"),
    "3 sign diversity": _low_and_mean("sign_diversity", "mean"),
    "4 Jacobians": {
        "alignment of adjacent blocks": ["Multiline", ["jacobian_alignment/min$", "jacobian_alignment/geometric_mean"]],
        "norms of the blocks": ["Multiline", ["jacobian_norm/min$", "jacobian_norm/geometric_mean"]],
        "bound, total and gradient norm": ["Multiline", ["jacobian_bound", "jacobian_total", "stability/grad_norm"]],
    },
}


def add_layout(writer: SummaryWriter) -> None:
    """Writes the layout of the "Custom Scalars" page; once a run is enough."""
    writer.add_custom_scalars(_LAYOUT)  # type: ignore[no-untyped-call]


def add_mark(writer: SummaryWriter, tag: str, *steps: int) -> None:
    """Marks steps by ticks from 0 to 1. TensorBoard shows one value a step, so feet take the steps beside.

    Steps of later calls come later; where the one before is marked too, it keeps its mark.
    """
    last = _last_marks.setdefault(writer, {})
    feet = {at: 0.0 for step in steps for at in (step - 1, step + 1) if at != last.get(tag)}
    heights = feet | dict.fromkeys(steps, 1.0)
    for at in sorted(heights):
        writer.add_scalar(tag, heights[at], at)  # type: ignore[no-untyped-call]
    last.update({tag: max(steps)} if steps else {})


def add_reading(writer: SummaryWriter, reading: Reading) -> None:
    """Writes what a reading holds besides its scalars: marks, the alarms as text, and now and then histograms."""
    if text := reading.describe():
        writer.add_text("alarms", text, reading.step)  # type: ignore[no-untyped-call]
    add_mark(writer, ALARM, *(alarm.step for alarm in reading.alarms))
    if reading.restored is not None:
        add_mark(writer, APPLICATION, reading.step)
    if not reading.with_histograms:
        return
    if reading.spectrum is not None:
        ranks = torch.tensor([m.stable_rank for m in reading.spectrum.matrices])
        if len(ranks := ranks[ranks.isfinite()]):
            writer.add_histogram("stable_rank", ranks, reading.step)  # type: ignore[no-untyped-call]
    if (alignment := reading.alignment) is not None:
        edges = torch.tensor(alignment.edges)
        for group in sorted(set(alignment.groups)):
            rows = [g == group for g in alignment.groups]
            cumulative = alignment.cumulative[rows][alignment.defined[rows]].sum(0).cpu()
            if tokens := int(cumulative[-1]):
                counts = cumulative.diff(prepend=torch.zeros(1, dtype=torch.long))  # the first holds those at -1
                middles = torch.cat([edges[:1], (edges[1:] + edges[:-1]) / 2])
                writer.add_histogram_raw(  # type: ignore[no-untyped-call]
                    f"spectral_alignment/{group}",
                    min=-1.0,
                    max=1.0,
                    num=tokens,
                    sum=float((middles * counts).sum()),
                    sum_squares=float((middles.square() * counts).sum()),
                    bucket_limits=edges.tolist(),
                    bucket_counts=counts.tolist(),
                    global_step=reading.step,
                )
