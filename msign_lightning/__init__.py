"""MSign (arXiv 2602.01734): periodic stable-rank restoration against LLM training collapse.

The callbacks need Lightning and are loaded on first use; everything else needs only PyTorch.
"""

from typing import TYPE_CHECKING, Any

from msign_lightning._version import __version__
from msign_lightning.linalg import msign, restore, stable_rank
from msign_lightning.restoration import Report, Restoration
from msign_lightning.schedule import Schedule
from msign_lightning.spike_no_more import spike_no_more_
from msign_lightning.targets import Cut, Target, format_targets, select_targets

if TYPE_CHECKING:
    from msign_lightning.callbacks import MSignCallback, SpikeNoMoreCallback, StabilityMonitor

__all__ = [
    "Cut",
    "MSignCallback",
    "Report",
    "Restoration",
    "Schedule",
    "SpikeNoMoreCallback",
    "StabilityMonitor",
    "Target",
    "__version__",
    "format_targets",
    "msign",
    "restore",
    "select_targets",
    "spike_no_more_",
    "stable_rank",
]


def __getattr__(name: str) -> Any:
    if name in ("MSignCallback", "SpikeNoMoreCallback", "StabilityMonitor"):
        from msign_lightning import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
