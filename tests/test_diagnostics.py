"""Diagnostics against SVD and hand-made collapses: spectra and spectral alignment."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import support
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from msign_lightning import Cut, Restoration, select_targets, stable_rank
from msign_lightning.diagnostics import SpectralAlignment, Spectrum, SpectrumMonitor


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=24, n_layer=2, n_head=2, **no_dropout)
    return with_gaps_(GPT2LMHeadModel(config))


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    return with_gaps_(support.llama(vocab_size=64, positions=16)).to(dtype)


@torch.no_grad()
def with_gaps_(model: nn.Module) -> nn.Module:
    """Makes the top of every spectrum stand out, as training does."""
    for target in select_targets(model):
        W = target.matrix(target.parameter)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        S[:, 0] *= 2
        target.write_(target.parameter, U * S.unsqueeze(-2) @ Vh)
    return model


def tokens(seed: int = 1, batch: int = 4) -> Tensor:
    return torch.randint(64, (batch, 16), generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, input_ids: Tensor) -> Tensor:
    return model(input_ids=input_ids, labels=input_ids, use_cache=False).loss


def matrices_of(model: nn.Module) -> dict[str, Tensor]:
    return {t.name: t.matrix(t.parameter.detach())[0].double() for t in select_targets(model)}


# --- spectra -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("model", [gpt2(), llama(), llama(torch.bfloat16)], ids=["gpt2", "llama", "bf16"])
def test_spectrum_equals_svd(model, exact):
    monitor = SpectrumMonitor(model, exact=exact)
    spectrum = monitor.measure()
    tolerance = 1e-5 if exact else 0.02
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
    monitor = SpectrumMonitor(model, "attention")
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
    for exact in (False, True):
        monitor = SpectrumMonitor(model, "*", exact=exact)
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
    spectrum = SpectrumMonitor(model, exact=True).measure()
    assert spectrum.names == tuple(f"experts.up_proj.{i}" for i in range(3))
    torch.testing.assert_close(spectrum.stable_ranks, stable_rank(model.experts.up_proj))


def test_measuring_leaves_weights_and_the_global_generator_alone():
    model = llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    SpectrumMonitor(model).measure()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_spectrum_metrics_summarize_all_and_each_group():
    model = gpt2()
    spectrum = SpectrumMonitor(model, exact=True).measure()
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
    assert SpectrumMonitor(model).measure().metrics() == {}


def test_a_resumed_spectrum_monitor_continues_exactly(tmp_path):
    model = llama()
    monitor = SpectrumMonitor(model)
    for _ in range(3):
        monitor.measure()
    torch.save(monitor.state_dict(), tmp_path / "state.pt")
    resumed = SpectrumMonitor(model)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        model.lm_head.weight.normal_()
        for target in monitor.targets:
            target.parameter.mul_(torch.linspace(0.5, 1.5, target.parameter.shape[1]))
    for _ in range(2):
        a, b = monitor.measure(), resumed.measure()
        assert a.matrices == b.matrices
    assert SpectrumMonitor(model).measure().matrices != b.matrices


def test_a_state_of_another_model_starts_cold():
    monitor = SpectrumMonitor(llama(), "*q_proj*")
    other = SpectrumMonitor(gpt2())
    other.measure()
    monitor.load_state_dict(other.state_dict() | {"measurements": 0})
    assert monitor.measure().matrices == SpectrumMonitor(llama(), "*q_proj*").measure().matrices


@pytest.mark.parametrize("monitor", [SpectrumMonitor, SpectralAlignment])
def test_layers_that_do_not_exist_are_refused_with_near_names(monitor):
    with pytest.raises(ValueError, match=r"targets must .*got '\*q_porj\*'; near names: .*q_proj"):
        monitor(llama(), "*q_porj*")


# --- spectral alignment ------------------------------------------------------------------------------------------


def linear(width: int = 16, out: int = 12) -> nn.ModuleDict:
    torch.manual_seed(0)
    return with_gaps_(nn.ModuleDict({"mlp": nn.Linear(width, out)}))


def measured(layer: nn.ModuleDict, x: Tensor):
    alignment = SpectralAlignment(layer)
    with alignment.armed(SpectrumMonitor(layer, exact=True).measure()):
        layer.mlp(x)
    (matrix,) = alignment.result().matrices
    return matrix


def top_right(W: Tensor) -> Tensor:
    return torch.linalg.svd(W.detach().double()).Vh[0]


def test_random_tokens_lie_on_both_sides():
    layer = linear()
    x = torch.randn(8, 500, 16, generator=torch.Generator().manual_seed(3))
    found = measured(layer, x)
    cosines = (x.double() @ top_right(layer.mlp.weight)) / x.double().norm(dim=-1)
    assert found.tokens == 4000
    assert found.majority_fraction == pytest.approx(0.5, abs=0.03)
    p = (cosines > 0).double().mean().item()
    assert found.majority_fraction == pytest.approx(max(p, 1 - p), abs=1e-3)
    assert found.sign_diversity == pytest.approx(2 * min(p, 1 - p), abs=2e-3)
    assert abs(found.mean) == pytest.approx(abs(cosines.mean().item()), abs=1e-5)
    expected = torch.quantile(cosines.flatten(), torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double())
    if found.mean * cosines.mean() < 0:
        expected = -expected.flip(0)
    assert found.quantiles == pytest.approx(expected.tolist(), abs=0.01)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_aligned_tokens_are_all_on_one_side(scale):
    layer = linear()
    noise = torch.randn(4, 50, 16, generator=torch.Generator().manual_seed(3))
    found = measured(layer, scale * (20 * top_right(layer.mlp.weight).float() + noise))
    assert found.majority_fraction == 1
    assert found.sign_diversity == 0
    assert abs(found.mean) > 0.9


def test_collapse_shows_whatever_the_sign_and_shows_in_part():
    layer = linear()
    v = top_right(layer.mlp.weight).float()
    for signs, majority in ((-torch.ones(10), 1.0), (torch.tensor([1.0] * 3 + [-1.0] * 7), 0.7)):
        found = measured(layer, torch.outer(signs, v))
        assert found.majority_fraction == pytest.approx(majority)
        assert found.sign_diversity == pytest.approx(2 - 2 * majority)
        assert abs(found.mean) == pytest.approx(2 * majority - 1, abs=1e-5)


def test_zero_and_non_finite_tokens_do_not_count():
    layer = linear()
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
    expected = measured(layer, x)
    bad = torch.zeros(3, 16)
    bad[1], bad[2, 0] = math.nan, math.inf
    assert measured(layer, torch.cat([bad, x])) == expected
    nothing = measured(layer, bad)
    assert nothing.tokens == 0
    assert math.isnan(nothing.majority_fraction)


def model_alignments(model: nn.Module, forward, spectrum: Spectrum | None = None, **options):
    alignment = SpectralAlignment(model, **options)
    with alignment.armed(spectrum or SpectrumMonitor(model, exact=True).measure()):
        forward()
    return {m.name: m for m in alignment.result().matrices}


def reference_alignments(model: nn.Module, input_ids: Tensor) -> dict[str, float]:
    """Absolute mean cosine of each matrix, from recorded inputs and explicit SVDs in the (out, in) convention."""
    inputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, args, name=name: inputs.update({name: args[0].detach()})
        )
        for name in {target.parameter_name for target in select_targets(model)}
    ]
    run(model, input_ids)
    for handle in handles:
        handle.remove()
    means = {}
    for target in select_targets(model):
        W = target.matrix(target.parameter.detach())[0].double()
        v = top_right(W.mT if "h." in target.name else W)  # the weight of Conv1D is (in, out)
        x = inputs[target.parameter_name].double().flatten(0, -2)
        means[target.name] = abs((x @ v / x.norm(dim=-1)).mean().item())
    return means


@pytest.mark.parametrize("make", [gpt2, llama])
def test_every_matrix_of_a_model_sees_its_own_inputs(make):
    model = make()
    found = model_alignments(model, lambda: run(model, tokens()))
    expected = reference_alignments(model.eval(), tokens())
    assert {name: abs(m.mean) for name, m in found.items()} == pytest.approx(
        expected, abs=1e-4 if make is llama else 0.2
    )
    assert all(m.tokens == 64 for m in found.values())


def test_bf16_models_are_measured_in_fp32():
    full, half = llama(), llama(torch.bfloat16)
    a = model_alignments(full, lambda: run(full, tokens()))
    b = model_alignments(half, lambda: run(half, tokens()))
    for name, m in a.items():
        assert abs(b[name].mean) == pytest.approx(abs(m.mean), abs=0.02)
        assert b[name].majority_fraction == pytest.approx(m.majority_fraction, abs=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        c = model_alignments(full, lambda: run(full, tokens()))
    assert c["model.layers.0.self_attn.q_proj.weight"] == a["model.layers.0.self_attn.q_proj.weight"]


def losses_and_gradients(model: nn.Module, parameters: list[Tensor]) -> list[Tensor]:
    for p in parameters:
        p.grad = None
    loss = run(model, tokens())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in parameters if p.grad is not None)]


def test_outputs_and_gradients_are_the_same_to_the_last_bit_and_hooks_are_gone_after():
    model = gpt2()
    parameters = list(model.parameters())
    before = losses_and_gradients(model, parameters)
    alignment = SpectralAlignment(model)
    with alignment.armed(SpectrumMonitor(model).measure()):
        during = losses_and_gradients(model, parameters)
    assert all(map(torch.equal, before, during))
    counted = alignment.result().matrices
    run(model, tokens(2))
    assert alignment.result().matrices == counted
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_are_gone_after_an_error():
    model = gpt2()
    alignment = SpectralAlignment(model)
    with pytest.raises(IndexError), alignment.armed(SpectrumMonitor(model).measure()):
        run(model, torch.full((1, 4), 64))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_micro_batches_add_up_and_arming_starts_anew():
    model = llama()
    spectrum = SpectrumMonitor(model, exact=True).measure()
    alignment = SpectralAlignment(model)
    with alignment.armed(spectrum):
        run(model, tokens(5)).backward()
        run(model, tokens(6)).backward()
    parts = alignment.result().matrices
    with alignment.armed(spectrum):
        run(model, torch.cat([tokens(5), tokens(6)]))
    for a, b in zip(parts, alignment.result().matrices, strict=True):
        assert a.tokens == b.tokens == 128
        assert a.majority_fraction == b.majority_fraction
        assert a.mean == pytest.approx(b.mean, abs=1e-6)
    with alignment.armed(spectrum):
        pass
    assert all(m.tokens == 0 for m in alignment.result().matrices)


def test_validation_does_not_count():
    model = llama().eval()
    found = model_alignments(model, lambda: run(model, tokens()))
    assert all(m.tokens == 0 for m in found.values())


def checkpointed_forward(forward, use_reentrant: bool, x: Tensor, **kwargs):
    return checkpoint(partial(forward, **kwargs), x, use_reentrant=use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_counts_each_token_once(use_reentrant):
    model, checkpointed = llama(), llama()
    for layer in checkpointed.model.layers:
        layer.forward = partial(checkpointed_forward, layer.forward, use_reentrant)
    expected = model_alignments(model, lambda: run(model, tokens()).backward())
    found = model_alignments(checkpointed, lambda: run(checkpointed, tokens()).backward())
    assert found == expected


def test_a_compiled_model_is_measured_without_being_compiled_anew():
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp["down"](self.mlp["up"](x).relu())

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = with_gaps_(nn.Sequential(Block(), Block()))
    x = torch.randn(4, 5, 8)
    expected = model_alignments(model, lambda: model(x).sum().backward())
    compiled = torch.compile(model, backend=backend)
    compiled(x).sum().backward()
    before = len(graphs)
    assert before > 0
    for made_before_compiling in (model, compiled):
        found = model_alignments(made_before_compiling, lambda: compiled(x).sum().backward())
        assert found == expected
        compiled(x).sum().backward()
    assert len(graphs) == before


def test_matrices_without_a_gap_are_masked_until_it_has_reopened():
    model = llama()
    monitor, alignment = SpectrumMonitor(model), SpectralAlignment(model)
    layer = "model.layers.0.mlp.up_proj.weight"

    def defined() -> set[str]:
        with alignment.armed(monitor.measure()):
            run(model, tokens())
        return {m.name for m in alignment.result().matrices if not math.isnan(m.sign_diversity)}

    assert len(defined()) == 14
    Restoration(model, targets="attention").apply()
    assert defined() == {t.name for t in alignment.targets if t.group == "mlp"}
    Restoration(model).apply()
    assert defined() == set()
    metrics = alignment.result().metrics(per_matrix=True)
    assert metrics == {"spectral_alignment/masked": 14.0}
    with torch.no_grad():
        W = model.get_parameter(layer)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        W.add_(torch.outer(U[:, 0], Vh[0]), alpha=0.5 * S[0].item())
    for _ in range(3):
        monitor.measure()
    assert defined() == {layer}


def test_alignment_metrics_summarize_all_and_each_group():
    model = gpt2()
    alignment = SpectralAlignment(model)
    with alignment.armed(SpectrumMonitor(model).measure()):
        run(model, tokens())
    result = alignment.result()
    of = {group: [m.sign_diversity for m in result.matrices if m.group == group] for group in ("attention", "mlp")}
    metrics = result.metrics(per_matrix=True)
    assert metrics["sign_diversity/min"] == min(of["attention"] + of["mlp"])
    assert metrics["sign_diversity/mean"] == pytest.approx(sum(of["attention"] + of["mlp"]) / 12)
    assert metrics["sign_diversity/mlp/min"] == min(of["mlp"])
    assert metrics["sign_diversity/attention/mean"] == pytest.approx(sum(of["attention"]) / 8)
    assert metrics["spectral_alignment/masked"] == 0
    name = "transformer.h.1.attn.c_attn.weight.k"
    (m,) = [m for m in result.matrices if m.name == name]
    assert (metrics[f"sign_diversity/{name}"], metrics[f"spectral_alignment/{name}"]) == (m.sign_diversity, m.mean)


def test_alignment_takes_linear_layers_only_and_says_so():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    names = [t.name for t in SpectralAlignment(layer).targets]
    assert names == ["linear1.weight", "linear2.weight"]
    with pytest.raises(ValueError, match=r"at least one weight of a linear layer .*, got self_attn\.in_proj_weight\.q"):
        SpectralAlignment(layer, "attention")
    split_by_inputs = {"linear1.weight": Cut((4, 4), dim=1)}
    assert [t.name for t in SpectralAlignment(layer, "mlp", cuts=split_by_inputs).targets] == ["linear2.weight"]


@pytest.mark.parametrize("gap", [0, 1, -0.1, math.nan])
def test_gap_must_lie_between_0_and_1(gap):
    with pytest.raises(ValueError, match=f"gap must be between 0 and 1, got {gap}"):
        SpectralAlignment(llama(), gap=gap)


def test_alignment_needs_a_spectrum_of_its_targets():
    model = llama()
    alignment = SpectralAlignment(model)
    with pytest.raises(RuntimeError, match="arm before"):
        alignment.result()
    with pytest.raises(ValueError, match=r"hold every target of the alignment, got none of .*mlp\.gate_proj\.weight"):
        alignment.arm(SpectrumMonitor(model, "attention").measure())


def _align_on_a_rank(rank: int) -> tuple:
    from torch.distributed.fsdp import fully_shard

    model = llama()
    parallel = nn.parallel.DistributedDataParallel(model)
    alignment, monitor = SpectralAlignment(parallel), SpectrumMonitor(parallel)
    with alignment.armed(monitor.measure()):
        run(parallel, tokens(rank)).backward()
    result = alignment.result()

    sharded = llama()
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    sharded_alignment, sharded_monitor = SpectralAlignment(sharded), SpectrumMonitor(sharded)
    with sharded_alignment.armed(sharded_monitor.measure()):
        run(sharded, tokens(rank)).backward()
    found = (result.matrices, result.all_reduce().matrices, sharded_alignment.result().matrices)

    spectrum = monitor.measure()
    rounded = replace(spectrum, stable_ranks=spectrum.stable_ranks + rank, second_norms=spectrum.second_norms * rank)
    agreed = rounded.all_reduce()
    assert all(a is b for a, b in zip(agreed.vectors, spectrum.vectors, strict=True))
    return (*found, rounded.matrices, agreed.matrices)


def test_ranks_count_their_own_tokens_and_join_them_on_request(tmp_path: Path):
    found = support.on_two_ranks(_align_on_a_rank, tmp_path)
    model = llama()
    alignment, spectrum = SpectralAlignment(model), SpectrumMonitor(model).measure()
    with alignment.armed(spectrum):
        for rank in range(2):
            with alignment.armed(spectrum):
                run(model, tokens(rank))
            assert found[rank][0] == alignment.result().matrices
            assert found[rank][2] == alignment.result().matrices
    with alignment.armed(spectrum):
        run(model, tokens(0))
        run(model, tokens(1))
    assert found[0][1] == found[1][1] == alignment.result().matrices

    assert found[0][4] == found[1][4]
    for a, b, mean in zip(found[0][3], found[1][3], found[0][4], strict=True):
        assert mean[:2] == a[:2] == b[:2]
        assert mean[2:] == pytest.approx([(x + y) / 2 for x, y in zip(a[2:], b[2:], strict=True)])
        assert mean.stable_rank == pytest.approx(a.stable_rank + 0.5)
