"""Spike No More (arXiv 2312.16903): small sub-layers and a large shortcut."""

from msign_lightning.algorithms.spike_no_more.spike_no_more import SpikeNoMore, apply_spike_no_more

__all__ = ["SpikeNoMore", "apply_spike_no_more"]
