"""StabilityMonitor: stable rank, Spectral Alignment (arXiv 2510.04202) and Jacobian alignment during training."""

from msign_lightning.algorithms.stability_monitor.stability_monitor import StabilityMonitor

__all__ = ["StabilityMonitor"]
