"""Shared set-up.

GPU tests are deselected where there is no GPU, so that a green run never hides a skipped one; what imports
Composer is not collected where that is not installed. Tests compute with one thread: tiny matrices gain nothing from
more, and several processes would fight for the cores.
"""

import importlib.util
import os

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # of what Lightning calls of it
torch.set_num_threads(1)

OF_COMPOSER = ("algorithms", "composer_suite", "spike_no_more_composer", "stability_monitor_composer")
collect_ignore = [] if importlib.util.find_spec("composer") else [f"test_{name}.py" for name in OF_COMPOSER]
collect_ignore += [] if importlib.util.find_spec("ray") else ["test_ablations_cluster.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]
