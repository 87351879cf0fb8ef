"""MSign (arXiv 2602.01734): periodic restoration of the stable rank of weight matrices."""

from msign_lightning.algorithms.msign.msign import MSign, apply_msign

__all__ = ["MSign", "apply_msign"]
