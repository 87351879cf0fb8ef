"""Ablation studies with Optuna: from a study file to a map of where training is stable.

`python -m msign_lightning.ablations run quick` runs a study of this package; `ARMS` are the methods that a study can
compare. `FrontierSampler` and `frontier_of` search and read a stability frontier in an Optuna study of your own.
"""

from msign_lightning._extras import need

need(
    "ablations", "jinja2", "matplotlib", "optuna", "pandas", "pytorch_optimizer", "scipy", "sqlalchemy", "tqdm", "yaml"
)

from msign_lightning.ablations.cell import Cell, Criterion, Group, Outcome
from msign_lightning.ablations.methods import ARMS
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.sampler import FrontierSampler, frontier_of
from msign_lightning.ablations.study import Bisect, Grid, Study, Tpe, Variant, load

__all__ = [
    "ARMS",
    "Bisect",
    "Cell",
    "Criterion",
    "FrontierSampler",
    "Grid",
    "Group",
    "Outcome",
    "Study",
    "StudyError",
    "Tpe",
    "Variant",
    "frontier_of",
    "load",
]
