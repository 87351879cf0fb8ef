"""The minimax schedule: the published one, and what makes it the best."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msign_lightning import polar_express
from msign_lightning.polar_express import minimax_schedule

PUBLISHED_SCHEDULE = (  # arXiv 2505.16932, for singular values from 1e-3
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)


def composed(schedule, x):
    for a, b, c in schedule:
        x = a * x + b * x**3 + c * x**5
    return x


def test_solver_reproduces_the_published_schedule():
    schedule = polar_express._steps(1e-3)
    assert len(schedule) == len(PUBLISHED_SCHEDULE)
    for step, published in zip(schedule, PUBLISHED_SCHEDULE, strict=True):
        assert step == pytest.approx(published, rel=1e-9)


@given(log_lower=st.floats(-7, -0.001), safety=st.sampled_from([0.0, 1e-3, 1e-2]), polish=st.integers(0, 1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_schedule_maps_its_interval_to_one(log_lower, safety, polish):
    schedule = minimax_schedule(10**log_lower, safety, polish)
    x = torch.logspace(log_lower, 0, 5001, dtype=torch.float64)
    y = composed(schedule, x)
    assert y.min() > 1 - 1e-2 * safety - 2e-6
    assert y.max() < 1 + 2e-6


@given(log_ratio=st.floats(-6, -1e-6), upper=st.floats(0.5, 2))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_quintic_equioscillates_and_so_is_the_best(log_ratio, upper):
    lower = upper * max(10**log_ratio, polar_express._CUSHION)
    x = torch.linspace(lower, upper, 20001, dtype=torch.float64)
    deviation = composed([polar_express._minimax_quintic(lower, upper)], x) - 1
    largest = deviation.abs().max().item()
    signs = [s for s in torch.where(deviation.abs() > 0.999 * largest, deviation.sign(), 0.0).tolist() if s]
    alternations = 1 + sum(a != b for a, b in pairwise(signs))
    assert largest < 1e-9 or alternations == 4
