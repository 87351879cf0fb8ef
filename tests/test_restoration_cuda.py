"""Restoration on a GPU: the same as on the CPU, within memory, under a gradient scaler."""

import pytest
import torch
from torch import nn

from msign_lightning import Restoration, matrices

pytestmark = pytest.mark.gpu


def mlp(width: int, layers: int) -> nn.ModuleDict:
    """Matrices with one singular value of about five over a bulk up to about one."""
    torch.manual_seed(0)
    linears = [nn.Linear(width, width, bias=False) for _ in range(layers)]
    with torch.no_grad():
        for linear in linears:
            linear.weight.add_(5 / width)
    return nn.ModuleDict({"mlp": nn.Sequential(*linears)})


@pytest.mark.parametrize(("width", "tolerance"), [(64, 5e-3), (512, 1e-2)])
@pytest.mark.parametrize("rule", ["msign", "cap"])
def test_same_as_on_the_cpu(rule, width, tolerance):
    on_cpu, on_gpu = mlp(width, 3), mlp(width, 3).cuda()
    reports = [Restoration(model, rule=rule).apply() for model in (on_cpu, on_gpu)]
    assert [m.changed for m in reports[0].matrices] == [m.changed for m in reports[1].matrices]
    for expected, actual in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
        assert (actual.cpu() - expected).norm() <= tolerance * expected.norm()
        torch.testing.assert_close(actual.norm().cpu(), expected.norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", ["msign", "cap"])
def test_an_application_needs_at_most_three_chunks_of_memory(rule, monkeypatch):
    model = mlp(1024, 12).cuda()
    chunk_bytes = 4 * 1024 * 1024 * 4
    monkeypatch.setattr(matrices, "CHUNK_ELEMENTS", chunk_bytes // 4)
    restoration = Restoration(model, rule=rule, method="polynomial_tf32")
    restoration.apply()  # libraries' workspaces are allocated once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    restoration.apply()
    assert torch.cuda.max_memory_allocated() - before <= 3.1 * chunk_bytes


@pytest.mark.parametrize("fused", [False, True])
def test_step_skipped_by_the_gradient_scaler_does_not_count(fused):
    model = mlp(64, 2).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    restoration, reports = Restoration(model, period=2), []
    restoration.attach(optimizer, on_report=reports.append)
    for step in range(5):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = model["mlp"](torch.ones(4, 64, device="cuda")).square().mean()
        scaler.scale(loss * float("inf") if step in (1, 2) else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert restoration.steps == [3]
    assert [report.step for report in reports] == [2]
