"""Training-stability methods for MosaicML Composer: `from algorithms import MSign, SpikeNoMore, StabilityMonitor`."""

from msign_lightning._extras import need

need("composer", "composer")

from msign_lightning.algorithms.msign import MSign, apply_msign
from msign_lightning.algorithms.spike_no_more import SpikeNoMore, apply_spike_no_more
from msign_lightning.algorithms.stability_monitor import StabilityMonitor

__all__ = ["MSign", "SpikeNoMore", "StabilityMonitor", "apply_msign", "apply_spike_no_more"]
