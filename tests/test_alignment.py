"""Spectral alignment against SVD and hand-made collapses."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import support
import torch
from small_models import gpt2, llama, run, tokens, with_gaps_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from msign_lightning import Cut, Restoration, select_targets
from msign_lightning.alignment import SpectralAlignment
from msign_lightning.spectrum import SpectrumMonitor


def linear(width: int = 16, out: int = 12) -> nn.ModuleDict:
    torch.manual_seed(0)
    return with_gaps_(nn.ModuleDict({"mlp": nn.Linear(width, out)}))


def measured(layer: nn.ModuleDict, x: Tensor):
    alignment = SpectralAlignment(layer, select_targets(layer))
    with alignment.armed(SpectrumMonitor(select_targets(layer)).measure()):
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
    p = (cosines > 0).double().mean().item()
    assert found.sign_diversity == pytest.approx(1, abs=0.06)
    assert found.sign_diversity == pytest.approx(2 * min(p, 1 - p), abs=2e-3)
    assert abs(found.mean) == pytest.approx(abs(cosines.mean().item()), abs=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_aligned_tokens_are_all_on_one_side(scale):
    layer = linear()
    noise = torch.randn(4, 50, 16, generator=torch.Generator().manual_seed(3))
    found = measured(layer, scale * (20 * top_right(layer.mlp.weight).float() + noise))
    assert found.sign_diversity == 0
    assert abs(found.mean) > 0.9


def test_collapse_shows_whatever_the_sign_and_shows_in_part():
    layer = linear()
    v = top_right(layer.mlp.weight).float()
    for signs, majority in ((-torch.ones(10), 1.0), (torch.tensor([1.0] * 3 + [-1.0] * 7), 0.7)):
        found = measured(layer, torch.outer(signs, v))
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
    assert math.isnan(nothing.sign_diversity)


def model_alignments(model: nn.Module, forward):
    alignment = SpectralAlignment(model, select_targets(model))
    with alignment.armed(SpectrumMonitor(select_targets(model)).measure()):
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
        assert b[name].sign_diversity == pytest.approx(m.sign_diversity, abs=0.2)
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
    alignment = SpectralAlignment(model, select_targets(model))
    with alignment.armed(SpectrumMonitor(select_targets(model)).measure()):
        during = losses_and_gradients(model, parameters)
    assert all(map(torch.equal, before, during))
    counted = alignment.result().matrices
    run(model, tokens(2))
    assert alignment.result().matrices == counted
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_are_gone_after_an_error():
    model = gpt2()
    alignment = SpectralAlignment(model, select_targets(model))
    with pytest.raises(IndexError), alignment.armed(SpectrumMonitor(select_targets(model)).measure()):
        run(model, torch.full((1, 4), 64))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_micro_batches_add_up_and_arming_starts_anew():
    model = llama()
    spectrum = SpectrumMonitor(select_targets(model)).measure()
    alignment = SpectralAlignment(model, select_targets(model))
    with alignment.armed(spectrum):
        run(model, tokens(5)).backward()
        run(model, tokens(6)).backward()
    parts = alignment.result().matrices
    with alignment.armed(spectrum):
        run(model, torch.cat([tokens(5), tokens(6)]))
    for a, b in zip(parts, alignment.result().matrices, strict=True):
        assert a.tokens == b.tokens == 128
        assert a.sign_diversity == b.sign_diversity
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
    monitor, alignment = SpectrumMonitor(select_targets(model)), SpectralAlignment(model, select_targets(model))
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
    alignment = SpectralAlignment(model, select_targets(model))
    with alignment.armed(SpectrumMonitor(select_targets(model)).measure()):
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
    names = [t.name for t in SpectralAlignment(layer, select_targets(layer)).targets]
    assert names == ["linear1.weight", "linear2.weight"]
    with pytest.raises(ValueError, match=r"at least one weight of a linear layer .*, got self_attn\.in_proj_weight\.q"):
        SpectralAlignment(layer, select_targets(layer, "attention"))
    split_by_inputs = {"linear1.weight": Cut((4, 4), dim=1)}
    assert [t.name for t in SpectralAlignment(layer, select_targets(layer, "mlp", cuts=split_by_inputs)).targets] == [
        "linear2.weight"
    ]


def test_alignment_needs_a_spectrum_of_its_targets():
    model = llama()
    alignment = SpectralAlignment(model, select_targets(model))
    with pytest.raises(RuntimeError, match="arm before"):
        alignment.result()
    with pytest.raises(ValueError, match=r"hold every target of the alignment, got none of .*mlp\.gate_proj\.weight"):
        alignment.arm(SpectrumMonitor(select_targets(model, "attention")).measure())


def _align_on_a_rank(rank: int) -> tuple:
    from torch.distributed.fsdp import fully_shard

    model = llama()
    parallel = nn.parallel.DistributedDataParallel(model)
    targets = select_targets(parallel)
    alignment, monitor = SpectralAlignment(parallel, targets), SpectrumMonitor(targets)
    with alignment.armed(monitor.measure()):
        run(parallel, tokens(rank)).backward()
    result = alignment.result()

    sharded = llama()
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    sharded_alignment, sharded_monitor = (
        SpectralAlignment(sharded, select_targets(sharded)),
        SpectrumMonitor(select_targets(sharded)),
    )
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
    targets = select_targets(model)
    alignment, spectrum = SpectralAlignment(model, targets), SpectrumMonitor(targets).measure()
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
