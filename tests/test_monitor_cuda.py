"""Monitor on a GPU: the readings of the CPU, and no waiting for the device between them."""

import copy

import pytest
import torch

from msign_lightning.monitor import Monitor, grad_norm
from msign_lightning.recipes.module import LanguageModel

pytestmark = pytest.mark.gpu

EVERY = {"stable_rank": 5, "spectral_alignment": 5, "jacobian_alignment": 10}


def train(module, monitor, steps):
    device = next(module.parameters()).device
    batch = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(0)).to(device)
    readings = []
    for _ in range(steps):
        monitor.begin()
        loss = module.loss(batch)
        loss.backward()
        norm = grad_norm(module.parameters())
        module.zero_grad()
        readings.append(monitor.end(loss.detach(), norm))
    return [reading for reading in readings if reading is not None]


def test_readings_are_those_of_the_cpu():
    torch.manual_seed(0)
    on_cpu = LanguageModel()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    expected = train(on_cpu, Monitor(on_cpu, EVERY), 10)
    got = train(on_gpu, Monitor(on_gpu, EVERY), 10)
    assert [reading.step for reading in got] == [reading.step for reading in expected] == [5, 10]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.metrics.keys() == theirs.metrics.keys()
        for name, value in theirs.metrics.items():
            if not name.startswith("sign_diversity"):  # v₁ of a matrix without a clear gap hangs on rounding
                assert ours.metrics[name] == pytest.approx(value, rel=0.05, abs=1e-3), name


@pytest.mark.parametrize("as_float", [False, True])
def test_a_step_that_is_not_read_does_not_wait_for_the_device(as_float):
    module = LanguageModel().cuda()
    monitor = Monitor(module, EVERY)
    loss = 3.0 if as_float else torch.tensor(3.0, device="cuda")
    train(module, monitor, 10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            monitor.begin()
            assert monitor.end(loss) is None
    finally:
        torch.cuda.set_sync_debug_mode("default")
