"""MSign (arXiv 2602.01734): periodic stable-rank restoration against LLM training collapse.

Every name is loaded on first use, so that a command line answers at once. Only the callbacks need Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from msign_lightning._version import __version__ as __version__

if TYPE_CHECKING:
    from msign_lightning.callbacks import MSignCallback as MSignCallback
    from msign_lightning.callbacks import SpikeNoMoreCallback as SpikeNoMoreCallback
    from msign_lightning.callbacks import StabilityMonitor as StabilityMonitor
    from msign_lightning.cut_check import check_cuts as check_cuts
    from msign_lightning.linalg import msign as msign
    from msign_lightning.linalg import restore as restore
    from msign_lightning.linalg import stable_rank as stable_rank
    from msign_lightning.restoration import Report as Report
    from msign_lightning.restoration import Restoration as Restoration
    from msign_lightning.spike_no_more import spike_no_more_ as spike_no_more_
    from msign_lightning.targets import Cut as Cut
    from msign_lightning.targets import Target as Target
    from msign_lightning.targets import format_targets as format_targets
    from msign_lightning.targets import left_out as left_out
    from msign_lightning.targets import select_targets as select_targets

_MODULES = {
    "callbacks": ("MSignCallback", "SpikeNoMoreCallback", "StabilityMonitor"),
    "cut_check": ("check_cuts",),
    "linalg": ("msign", "restore", "stable_rank"),
    "restoration": ("Report", "Restoration"),
    "spike_no_more": ("spike_no_more_",),
    "targets": ("Cut", "Target", "format_targets", "left_out", "select_targets"),
}
__all__ = ["__version__", *(name for names in _MODULES.values() for name in names)]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"msign_lightning.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
