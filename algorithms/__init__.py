"""Training-stability methods as MosaicML Composer algorithms: `from algorithms import MSign, SpikeNoMore`."""

from algorithms.msign import MSign, apply_msign
from algorithms.spike_no_more import SpikeNoMore, apply_spike_no_more

__all__ = ["MSign", "SpikeNoMore", "apply_msign", "apply_spike_no_more"]
