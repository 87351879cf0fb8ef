"""Ablation studies with Optuna: from a study file to a map of where training is stable.

`python -m ablations run quick` runs a study of this package; `ARMS` are the methods that a study can compare.
"""

from ablations.cell import Cell, Criterion, Group, Outcome
from ablations.methods import ARMS
from ablations.study import Bisect, Grid, Study, StudyError, Tpe, Variant, load

__all__ = [
    "ARMS",
    "Bisect",
    "Cell",
    "Criterion",
    "Grid",
    "Group",
    "Outcome",
    "Study",
    "StudyError",
    "Tpe",
    "Variant",
    "load",
]
