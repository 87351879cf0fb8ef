"""Spectra against SVD."""

import math

import pytest
import torch
from small_models import gpt2, llama
from torch import Tensor, nn

from msign_lightning import select_targets, stable_rank
from msign_lightning.spectrum import SpectrumMonitor


def matrices_of(model: nn.Module) -> dict[str, Tensor]:
    return {t.name: t.matrix(t.parameter.detach())[0].double() for t in select_targets(model)}


@pytest.mark.parametrize("model", [gpt2(), llama(), llama(torch.bfloat16)], ids=["gpt2", "llama", "bf16"])
def test_spectrum_equals_svd(model):
    monitor = SpectrumMonitor(select_targets(model))
    spectrum = monitor.measure()
    tolerance = 0.02
    reference = matrices_of(model)
    assert {m.name for m in spectrum.matrices} == set(reference)
    for m, (u, v) in zip(spectrum.matrices, spectrum.vectors, strict=True):
        W = reference[m.name]
        U, S, Vh = torch.linalg.svd(W)
        assert m.stable_rank == pytest.approx(stable_rank(W).item(), rel=tolerance)
        assert m.spectral_norm == pytest.approx(S[0].item(), rel=tolerance)
        assert m.second_norm == pytest.approx(S[1].item(), rel=5 * tolerance)
        assert abs(u.double() @ U[:, 0]) > 1 - tolerance
        assert abs(v.double() @ Vh[0]) > 1 - tolerance
    assert spectrum.has_gap(0.05).all()


def test_warm_measurements_follow_drifting_weights_and_a_direction_that_grows():
    model = llama()
    monitor = SpectrumMonitor(select_targets(model, "attention"))
    monitor.measure()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(20):
            for target in monitor.targets:
                W = target.parameter
                noise = torch.randn(W.shape, generator=generator)
                W.add_(noise, alpha=0.02 * (W.norm() / noise.norm()).item())
            for m in monitor.measure().matrices:
                assert m.stable_rank == pytest.approx(stable_rank(model.get_parameter(m.name)).item(), rel=0.02)
        name = monitor.targets[0].name
        W = model.get_parameter(name)
        Vh = torch.linalg.svd(W).Vh
        W.add_(torch.outer(Vh[-1], Vh[-1]), alpha=3 * torch.linalg.matrix_norm(W, 2).item())
        for _ in range(2):
            found = {m.name: m.stable_rank for m in monitor.measure().matrices}
    assert found[name] == pytest.approx(stable_rank(W).item(), rel=0.02)


def test_zero_non_finite_huge_and_thin_matrices_do_not_disturb_their_neighbours():
    model = nn.ModuleDict({"mlp": nn.ModuleList(nn.Linear(12, 8, bias=False) for _ in range(5))})
    model.mlp.append(nn.Linear(6, 1, bias=False))
    with torch.no_grad():
        model.mlp[0].weight.zero_()
        model.mlp[1].weight[0, 0] = math.nan
        model.mlp[2].weight.mul_(1e30)
        model.mlp[3].weight[2, 3] = math.inf
    monitor = SpectrumMonitor(select_targets(model, "*"))
    for _ in range(2):
        spectrum = monitor.measure()
    zero, nan, huge, inf, plain, thin = spectrum.matrices
    assert zero[2:] == (0, 0, 0)
    assert all(map(math.isnan, (*nan[2:], *inf[2:])))
    for m, layer in ((huge, 2), (plain, 4)):
        W = model.mlp[layer].weight.detach().double()
        assert m.stable_rank == pytest.approx(stable_rank(W).item(), rel=0.02)
        assert m.spectral_norm == pytest.approx(torch.linalg.matrix_norm(W, 2).item(), rel=0.02)
    assert thin.stable_rank == pytest.approx(1)
    assert thin.second_norm == 0
    assert spectrum.has_gap(1e-3)[[0, 1, 3, 5]].tolist() == [False, False, False, True]
    metrics = spectrum.metrics()
    assert metrics["stable_rank/min"] == pytest.approx(1)
    assert all(map(math.isfinite, metrics.values()))


def test_experts_of_a_stack_are_measured_one_by_one():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up_proj = nn.Parameter(torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0)))
    spectrum = SpectrumMonitor(select_targets(model)).measure()
    assert spectrum.names == tuple(f"experts.up_proj.{i}" for i in range(3))
    torch.testing.assert_close(spectrum.stable_ranks, stable_rank(model.experts.up_proj))


def test_measuring_leaves_weights_and_the_global_generator_alone():
    model = llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    SpectrumMonitor(select_targets(model)).measure()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_spectrum_metrics_summarize_all_and_each_group():
    model = gpt2()
    spectrum = SpectrumMonitor(select_targets(model)).measure()
    metrics = spectrum.metrics()
    of = {group: [m.stable_rank for m in spectrum.matrices if m.group == group] for group in ("attention", "mlp")}
    everything = of["attention"] + of["mlp"]
    assert metrics == pytest.approx(
        {
            "stable_rank/min": min(everything),
            "stable_rank/geometric_mean": math.prod(everything) ** (1 / 12),
            "stable_rank/attention/min": min(of["attention"]),
            "stable_rank/attention/geometric_mean": math.prod(of["attention"]) ** (1 / 8),
            "stable_rank/mlp/min": min(of["mlp"]),
            "stable_rank/mlp/geometric_mean": math.prod(of["mlp"]) ** (1 / 4),
            "spectral_norm/max": max(m.spectral_norm for m in spectrum.matrices),
        }
    )
    detailed = spectrum.metrics(per_matrix=True)
    assert set(detailed) - set(metrics) == {
        f"{kind}/{m.name}" for kind in ("stable_rank", "spectral_norm") for m in spectrum.matrices
    }
    assert detailed["stable_rank/transformer.h.0.attn.c_attn.weight.q"] == spectrum.matrices[0].stable_rank


def test_no_metrics_but_also_no_error_where_no_matrix_is_finite():
    model = nn.ModuleDict({"mlp": nn.Linear(4, 4)})
    nn.init.constant_(model.mlp.weight, math.nan)
    assert SpectrumMonitor(select_targets(model)).measure().metrics() == {}


def test_a_resumed_spectrum_monitor_continues_exactly(tmp_path):
    model = llama()
    monitor = SpectrumMonitor(select_targets(model))
    for _ in range(3):
        monitor.measure()
    torch.save(monitor.state_dict(), tmp_path / "state.pt")
    resumed = SpectrumMonitor(select_targets(model))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        model.lm_head.weight.normal_()
        for target in monitor.targets:
            target.parameter.mul_(torch.linspace(0.5, 1.5, target.parameter.shape[1]))
    for _ in range(2):
        a, b = monitor.measure(), resumed.measure()
        assert a.matrices == b.matrices
    assert SpectrumMonitor(select_targets(model)).measure().matrices != b.matrices


def test_a_state_of_another_model_starts_cold():
    monitor = SpectrumMonitor(select_targets(llama(), "*q_proj*"))
    other = SpectrumMonitor(select_targets(gpt2()))
    other.measure()
    monitor.load_state_dict(other.state_dict() | {"measurements": 0})
    assert monitor.measure().matrices == SpectrumMonitor(select_targets(llama(), "*q_proj*")).measure().matrices
