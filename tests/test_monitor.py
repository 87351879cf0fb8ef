"""Monitor in plain PyTorch: readings against exact references, alarms, restoration with its cool-down, exact resume."""

import copy
import itertools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from stability import (
    DOWN,
    ONE_MATRIX,
    UP,
    assert_same,
    batch,
    collapse_,
    constant_batch,
    gpt2,
    llama,
    loss_of,
    recipe,
    stable_ranks,
    total_norm,
    weights,
)
from support import on_two_ranks
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msign_lightning import Restoration, restore, select_targets
from msign_lightning.alignment import SpectralAlignment
from msign_lightning.collapse import Alarm
from msign_lightning.jacobian import BlockJacobians
from msign_lightning.monitor import Monitor, Reading, grad_norm
from msign_lightning.spectrum import SpectrumMonitor

ALL = {"stable_rank": 3, "spectral_alignment": 4, "jacobian_alignment": 12}

Edits = Mapping[int, Callable[[nn.Module], object]]


def train(
    model: nn.Module,
    monitor: Monitor,
    steps: range,
    *,
    edits: Edits | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    data: Callable[[int], Tensor] = batch,
) -> list[Reading]:
    """The loop of the docstring. Edits happen before their step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3) if optimizer is None else optimizer
    readings = []
    for step in steps:
        (edits or {}).get(step, lambda model: None)(model)
        monitor.begin()
        optimizer.zero_grad()
        loss = loss_of(model, data(step))
        loss.backward()
        norm = grad_norm(model.parameters(), ranks=monitor.ranks) if monitor.reads_next else None
        optimizer.step()
        readings.append(monitor.end(loss.detach(), norm))
    return [reading for reading in readings if reading is not None]


def alarms(readings: list[Reading]) -> list[tuple[int, str, str]]:
    return [(alarm.step, alarm.kind, alarm.name) for reading in readings for alarm in reading.alarms]


def restored(readings: list[Reading]) -> dict[int, list[str]]:
    """The names of the matrices by step."""
    return {r.step: [m.name for m in r.restored.matrices] for r in readings if r.restored is not None}


def collapse(*names: str) -> Callable[[nn.Module], object]:
    return lambda model: collapse_(model, *names)


# --- readings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [recipe, llama, gpt2, lambda: llama(torch.bfloat16)], ids=["recipe", "llama", "gpt2", "bf16"]
)
def test_readings_are_those_of_the_weights_before_the_step(make):
    model = make()
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    Restoration(model, period=12).attach(optimizer)  # within a step at which everything is measured
    monitor = Monitor(model, ALL, per_matrix=True)
    before: dict[int, nn.Module] = {}
    losses: dict[int, float] = {}
    norms: dict[int, float] = {}

    class Eavesdrop(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__(model.parameters(), {})

        def step(self) -> None:
            norms[len(before)] = total_norm(model)
            optimizer.step()

    def keep(model: nn.Module) -> None:
        before[len(before) + 1] = copy.deepcopy(model)
        losses[len(before)] = loss_of(before[len(before)], batch(len(before))).item()

    readings = train(model, monitor, range(1, 14), edits={i: keep for i in range(1, 14)}, optimizer=Eavesdrop())
    assert [r.step for r in readings] == [3, 4, 6, 8, 9, 10, 12]
    last = monitor.close()
    assert (last.step, list(last.metrics)) == (13, ["stability/loss"])
    assert monitor.close() is None

    rough = dtype == torch.bfloat16
    for previous, reading in itertools.pairwise([Reading(0), *readings, last]):
        span = range(previous.step + 1, reading.step + 1)
        loss = sum(losses[step] for step in span) / len(span)
        assert reading.metrics["stability/loss"] == pytest.approx(loss, rel=1e-5)
        if reading is not last:
            norm = reading.metrics["stability/grad_norm"]
            assert norm == pytest.approx(norms[reading.step], rel=1e-2 if rough else 1e-5)
        assert (reading.spectrum is not None) == (reading.step in (3, 4, 6, 8, 9, 12))
        assert (reading.alignment is not None) == (reading.step in (4, 8, 12))
        assert ("jacobian_total" in reading.metrics) == (reading.step == 12)

    for reading in readings:
        model, step = before[reading.step], reading.step
        if reading.spectrum is not None:
            expected = stable_ranks(model)
            assert reading.metrics["stable_rank/min"] == pytest.approx(min(expected.values()), rel=0.02)
            mean = math.prod(expected.values()) ** (1 / len(expected))
            assert reading.metrics["stable_rank/geometric_mean"] == pytest.approx(mean, rel=0.02)
            found = {name: reading.metrics[f"stable_rank/{name}"] for name in expected}
            assert found == pytest.approx(expected, rel=0.03)
        if reading.alignment is not None:
            exact = SpectralAlignment(model, select_targets(model))
            with exact.armed(SpectrumMonitor(select_targets(model)).measure()):
                loss_of(model, batch(step))
            for mine, its in zip(reading.alignment.matrices, exact.result().matrices, strict=True):
                assert mine.tokens == 48
                if not (math.isnan(mine.mean) or math.isnan(its.mean)):
                    assert mine.sign_diversity == pytest.approx(its.sign_diversity, abs=0.15)
                    assert reading.metrics[f"sign_diversity/{mine.name}"] == mine.sign_diversity
        if reading.step == 12:
            by_hand = BlockJacobians(model, iterations=8).measure(batch(step)[:2]).metrics(per_block=True)
            assert by_hand == pytest.approx({name: reading.metrics[name] for name in by_hand}, rel=1e-5)


def test_a_multiple_of_the_cadence_that_is_jumped_over_is_measured_next():
    model = recipe()
    monitor = Monitor(model, {"stable_rank": 3})
    steps = []
    for _ in range(6):
        monitor.begin()
        loss_of(model, batch(0))
        readings = monitor.end(1.0), monitor.end(1.0)
        steps += [r.step for r in readings if r is not None and r.spectrum is not None]
    assert steps == [3, 7, 9]  # begun before steps 1, 3, 5, ..., so 6 and 12 are jumped over
    monitor = Monitor(model, {"stable_rank": 4})
    monitor.steps = 6
    assert [r.step for r in train(model, monitor, range(7, 10))] == [8]


def test_a_step_that_is_broken_off_is_measured_when_it_is_made_again():
    model = recipe()
    monitor = Monitor(model, {"stable_rank": 4, "spectral_alignment": 4, "jacobian_alignment": 4})
    train(model, monitor, range(1, 4))
    monitor.begin()
    resumed = Monitor(model, monitor.measure)
    resumed.load_state_dict(monitor.state_dict())
    (reading,) = train(model, resumed, range(4, 5))
    assert {"stable_rank/min", "sign_diversity/min", "jacobian_total"} < reading.metrics.keys()
    monitor.close()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert eval_frame._stance.stance == "default"


def test_compiled_models_run_compiled_again_after_measurements_that_overlap():
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        run = aot_eager(graph, inputs)
        return lambda *arguments: calls.append(1) or run(*arguments)

    torch._dynamo.reset()
    model = recipe()
    plain = copy.deepcopy(model)
    expected = train(plain, Monitor(plain, ALL), range(1, 14))
    compiled = torch.compile(model, backend=backend)
    first, second = Monitor(compiled, ALL), Monitor(model, ALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found, ran_compiled = [], []
    for step in range(1, 14):
        first.begin()
        second.begin()
        calls.clear()
        (reading,) = train(compiled, first, range(step, step + 1), optimizer=optimizer) or [None]
        found.append(reading)
        ran_compiled.append(len(calls))
        other = second.end()
        assert (other and other.spectrum and other.spectrum.matrices) == (
            reading and reading.spectrum and reading.spectrum.matrices
        )
    assert [step for step, n in enumerate(ran_compiled, 1) if not n] == [4, 8, 12]
    assert ran_compiled[-1] == ran_compiled[0]  # nothing has been compiled anew into more graphs
    assert [r.metrics for r in found if r is not None] == [r.metrics for r in expected]


def test_values_that_are_missing_or_not_finite():
    monitor = Monitor(recipe(), {})
    for _ in range(9):
        assert monitor.end() is None
    reading = monitor.end()
    assert reading == Reading(10)
    for step in range(10):
        reading = monitor.end(math.inf if step == 3 else 1.0, math.nan if step == 5 else 2.0)
    assert [(a.kind, a.step, a.name) for a in reading.alarms] == [
        ("non_finite", 14, "loss"),
        ("non_finite", 16, "grad_norm"),
    ]
    assert reading.metrics["stability/loss"] == math.inf
    assert math.isnan(reading.metrics["stability/grad_norm"])
    assert reading.metrics["stability/alarms"] == 0  # both have cleared


def test_floats_are_kept_where_the_model_is():
    """Composer gives losses as floats, and NCCL averages nothing that lies on the CPU."""
    monitor = Monitor(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")]), {})
    for _ in range(9):
        assert monitor.end(1.0) is None
    with pytest.raises(RuntimeError, match="meta"):
        monitor.end(1.0)


class RefuseFloat64(TorchDispatchMode):
    """As devices do that have none, such as Apple's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in tree_leaves(result)):
            raise TypeError(f"{func} makes float64")
        return result


def test_measuring_needs_no_float64():
    model = recipe()
    spectra, alignment = SpectrumMonitor(select_targets(model)), SpectralAlignment(model, select_targets(model))
    with RefuseFloat64():
        with alignment.armed(spectra.measure()):
            loss_of(model, batch(0)).backward()
        assert {m.tokens for m in alignment.result().matrices} == {48}
        assert spectra.measure().metrics()["stable_rank/min"] > 1
        assert grad_norm(model.parameters()).item() > 0


def test_grad_norm_is_that_of_clipping():
    model = llama()
    assert grad_norm(model.parameters()) is None
    loss_of(model, batch(0)).backward()
    norm = grad_norm(model.parameters())
    assert norm == nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert norm.item() > 0.01


# --- alarms ------------------------------------------------------------------------------------------------------


def test_a_collapsed_matrix_raises_its_alarm_once_and_again_after_it_has_recovered():
    model = recipe()
    monitor = Monitor(model, {"stable_rank": 2}, thresholds=ONE_MATRIX)
    healthy = model.get_parameter(UP).detach().clone()

    def heal(model: nn.Module) -> None:
        model.get_parameter(UP).data.copy_(healthy)

    readings = train(model, monitor, range(1, 14), edits={5: collapse(UP), 9: heal, 12: collapse(UP, DOWN)})
    assert alarms(readings) == [(6, "stable_rank", UP), (12, "stable_rank", UP), (12, "stable_rank", DOWN)]
    first = next(r.alarms[0] for r in readings if r.alarms)
    assert first.value == pytest.approx(1.0, abs=0.05)
    assert first.threshold == pytest.approx(2.04)
    assert [r.metrics["stability/alarms"] for r in readings if r.spectrum is not None] == [0, 0, 1, 1, 0, 2]
    assert restored(readings) == {}
    text = readings[-1].describe()
    assert text.startswith("step 12: stable_rank of blocks.")
    assert " and 1 more (1, threshold 2.04)" in text


def test_tokens_that_align_raise_the_alarm_of_every_matrix_that_sees_them():
    model = recipe()
    monitor = Monitor(model, {"spectral_alignment": 2}, thresholds={"sign_diversity": 0.1, "stable_rank": None})
    readings = train(model, monitor, range(1, 9), data=lambda step: constant_batch() if step >= 6 else batch(step))
    assert {(step, kind) for step, kind, _ in alarms(readings)} == {(6, "sign_diversity")}
    sound = {m.name for r in readings if r.step == 6 for m in r.alignment.matrices if not math.isnan(m.mean)}
    assert {name for *_, name in alarms(readings)} == sound
    assert len(sound) > 6
    assert all(a.value == 0 and a.threshold == 0.1 for r in readings for a in r.alarms)


def test_alarms_of_the_loss_have_their_own_step_not_that_of_the_reading():
    monitor = Monitor(recipe(), {}, thresholds={"spike": 0.1})
    readings = [monitor.end(5.0 if step == 47 else 3.0 + step % 2 / 100, 1.0) for step in range(1, 51)]
    (alarm,) = [a for r in readings if r is not None for a in r.alarms]
    assert alarm == Alarm("loss_spike", 47, "loss", 5.0, pytest.approx(3.105, abs=0.006))


# --- restoration -------------------------------------------------------------------------------------------------


def test_only_what_has_collapsed_is_restored_and_then_left_alone_for_the_cooldown():
    model = recipe()
    kwargs = {"thresholds": ONE_MATRIX, "cooldown": 6}
    monitor = Monitor(model, {"stable_rank": 2}, "restore", **kwargs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    edits = {5: collapse(UP), 7: collapse(UP), 9: collapse(DOWN), 13: collapse(DOWN)}
    readings = train(model, monitor, range(1, 17), edits=edits, optimizer=optimizer)
    assert alarms(readings) == [
        (6, "stable_rank", UP),
        (8, "stable_rank", UP),
        (10, "stable_rank", DOWN),
        (14, "stable_rank", DOWN),
    ]
    assert restored(readings) == {6: [UP], 10: [DOWN], 12: [UP], 16: [DOWN]}
    by_step = {r.step: r for r in readings}
    assert by_step[12].describe() == "step 12: 1 matrices restored"
    assert by_step[12].metrics["msign/changed"] == 1
    assert by_step[12].restored.step == 12


@pytest.mark.parametrize("rule", ["msign", "cap"])
@pytest.mark.parametrize(
    ("make", "name"),
    [(recipe, UP), (gpt2, "transformer.h.1.attn.c_attn.weight.k")],
    ids=["whole", "fused"],
)
def test_what_is_restored_is_restored_exactly(make, name, rule):
    model, healthy = make(), make()
    monitor = Monitor(model, {"stable_rank": 3}, "restore", thresholds=ONE_MATRIX, rule=rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    readings = train(model, monitor, range(1, 5), edits={2: collapse(name)}, optimizer=optimizer)
    assert restored(readings) == {3: [name]}
    collapse_(healthy, name)
    Restoration(healthy, targets="all_2d", rule=rule).apply(names=[name])
    assert_same(weights(model), weights(healthy))


def test_a_healthy_run_is_not_touched():
    model, plain = recipe(), recipe()
    monitor, only_logs = Monitor(model, {"stable_rank": 2}, "restore"), Monitor(plain, {})
    readings = train(model, monitor, range(1, 41))
    train(plain, only_logs, range(1, 41))
    assert alarms(readings) == []
    assert restored(readings) == {}
    assert_same(weights(model), weights(plain))


class Experts(nn.Module):
    """A stack of three experts, and a head to train it by."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.experts = nn.Module()
        self.experts.up_proj = nn.Parameter(torch.randn(3, 16, 16, generator=generator) / 4)
        self.embedding = nn.Embedding(64, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        return (hidden @ self.experts.up_proj.sum(0)) @ self.embedding.weight.T


def test_of_a_stack_of_experts_only_the_collapsed_one_is_restored():
    model = Experts()
    before = model.experts.up_proj.detach().clone()

    def flatten(model: nn.Module) -> None:
        with torch.no_grad():
            U, S, Vh = torch.linalg.svd(model.experts.up_proj[1])
            S[1:] = S[0] / 100
            model.experts.up_proj[1] = before[1] = (U * S) @ Vh

    monitor = Monitor(model, {"stable_rank": 2}, "restore", thresholds=ONE_MATRIX)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    readings = train(model, monitor, range(1, 5), edits={3: flatten}, optimizer=optimizer)
    assert restored(readings) == {4: ["experts.up_proj.1"]}
    before[1] = restore(before[1])
    torch.testing.assert_close(model.experts.up_proj.detach(), before)


def test_a_spike_is_only_logged():
    model = recipe()
    before = weights(model)
    monitor = Monitor(model, {}, "restore", cooldown=20)
    readings = [monitor.end(9.0 if step == 43 else 3.0, 1.0) for step in range(1, 76)]
    readings = [r for r in readings if r is not None]
    assert [a[:2] for a in alarms(readings)] == [(43, "loss_spike")]
    assert not any(r.calls_for_action for r in readings)
    assert restored(readings) == {}
    assert_same(weights(model), before)


def test_while_the_loss_stalls_everything_is_restored_once_per_cooldown_and_never_when_closing():
    def stalled(steps: int) -> tuple[nn.Module, Monitor, list[Reading]]:
        """The median of 201 losses is that of the plateau from the 102nd loss after step 300 on."""
        model = recipe()
        monitor = Monitor(model, {}, "restore", thresholds={"spike": None, "z_score": None}, cooldown=20)
        readings = [monitor.end(3.0 if step <= 300 else 4.0, 1.0) for step in range(1, steps + 1)]
        return model, monitor, [r for r in readings if r is not None]

    model, _, readings = stalled(435)
    ((step, kind, _),) = alarms(readings)
    assert kind == "stall"
    assert 400 < step < 410
    assert [r.step for r in readings if r.calls_for_action] == [410]
    everything = sorted(stable_ranks(model))
    assert {step: sorted(names) for step, names in restored(readings).items()} == {410: everything, 430: everything}

    model, monitor, _ = stalled(409)
    before = weights(model)
    last = monitor.close()
    assert [alarm.kind for alarm in last.alarms] == ["stall"]
    assert last.restored is None
    assert_same(weights(model), before)


def test_matrices_that_are_not_finite_are_an_alarm_and_no_exception(caplog):
    model = recipe()
    nn.init.constant_(model.embedding.weight, math.nan)
    monitor = Monitor(model, {"stable_rank": 2, "spectral_alignment": 2, "jacobian_alignment": 2}, "restore")
    with caplog.at_level(logging.WARNING):
        readings = train(model, monitor, range(1, 5))
    assert {(step, kind) for step, kind, _ in alarms(readings)} == {(1, "non_finite"), (2, "non_finite")}
    assert len(alarms(readings)) == 2 + 12  # loss and gradient norm, then all matrices
    assert restored(readings) == {}
    assert math.isnan(readings[-1].metrics["jacobian_total"])


# --- resume ------------------------------------------------------------------------------------------------------


def test_a_run_resumed_at_any_step_is_bit_equal(tmp_path):
    edits = {4: collapse(UP), 9: collapse(UP, DOWN)}
    settings = {"measure": {"stable_rank": 3, "spectral_alignment": 4}, "on_alarm": "restore", "cooldown": 8}
    settings |= {"thresholds": {"share": 0.01, "spike": 0.001, "sign_diversity": 0.1}}

    def parts() -> tuple[nn.Module, torch.optim.Optimizer, Monitor]:
        model = recipe()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2), Monitor(model, **settings)

    def run(model, optimizer, monitor, steps: range, save: bool = False) -> list[Reading]:
        readings = []
        for step in steps:
            readings += train(model, monitor, range(step, step + 1), edits=edits, optimizer=optimizer)
            if save:
                states = [part.state_dict() for part in (model, optimizer, monitor)]
                torch.save(states, tmp_path / f"{step}.pt")
        return readings

    uninterrupted = parts()
    expected = run(*uninterrupted, range(1, 25), save=True)
    assert len(restored(expected)) >= 3
    assert {kind for _, kind, _ in alarms(expected)} >= {"stable_rank", "loss_spike"}
    for crash in range(1, 24):
        resumed = parts()
        with torch.no_grad():
            for p in resumed[0].parameters():
                p.zero_()
        for part, state in zip(resumed, torch.load(tmp_path / f"{crash}.pt", weights_only=True), strict=True):
            part.load_state_dict(state)
        found = run(*resumed, range(crash + 1, 25))
        assert_same(weights(resumed[0]), weights(uninterrupted[0]))
        assert [comparable(r) for r in found] == [comparable(r) for r in expected if r.step > crash]
        assert resumed[2].detector.state_dict() == uninterrupted[2].detector.state_dict()


def comparable(reading: Reading) -> tuple:
    metrics = {name: value for name, value in reading.metrics.items() if name != "msign/seconds"}
    done = None if reading.restored is None else (reading.restored.step, reading.restored.matrices)
    measured = [
        [tuple(map(repr, m)) for m in part.matrices]
        for part in (reading.spectrum, reading.alignment)
        if part is not None
    ]
    return metrics, done, measured, replace(reading, metrics={}, restored=None, spectrum=None, alignment=None)


# --- several processes -------------------------------------------------------------------------------------------


def _fsdp2() -> nn.Module:
    model = recipe()
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def _fsdp1() -> nn.Module:
    model = recipe()
    wrap = partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
    for i, block in enumerate(model.blocks):
        model.blocks[i] = wrap(block)
    return wrap(model)


def _wholes(model: nn.Module, gradients: bool = False) -> dict[str, Tensor]:
    """Copies of all parameters, or of their gradients."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False, with_grads=gradients):
        values = {clean(name): p.grad if gradients else p.detach() for name, p in model.named_parameters()}
        return {n: (v.full_tensor() if isinstance(v, dist.tensor.DTensor) else v).clone() for n, v in values.items()}


def clean(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def _train_on_rank(rank: int, make: Callable[[], nn.Module]) -> tuple:
    model = make()
    if make is _fsdp1:
        with pytest.raises(ValueError, match="measure must not hold jacobian_alignment under FSDP1"):
            Monitor(model, {"jacobian_alignment": 2})
    kwargs = {"thresholds": ONE_MATRIX, "cooldown": 4}
    monitor = Monitor(model, {"stable_rank": 2, "spectral_alignment": 2}, "restore", **kwargs)

    def collapse_sharded(model: nn.Module) -> None:
        U, S, Vh = torch.linalg.svd(_wholes(model)[UP], full_matrices=False)
        S[1:] = S[0] / 100
        new = (U * S) @ Vh
        with torch.no_grad(), FullyShardedDataParallel.summon_full_params(model):
            parameter = next(p for name, p in model.named_parameters() if clean(name) == UP)
            if isinstance(parameter, dist.tensor.DTensor):
                new = dist.tensor.distribute_tensor(new, parameter.device_mesh, parameter.placements)
            parameter.copy_(new)

    rank_data = {"data": lambda step: batch(2 * step + rank)}
    readings = train(model, monitor, range(1, 8), edits={3: collapse_sharded}, **rank_data)
    loss = torch.tensor(math.nan if rank else 2.0)
    monitor.begin()
    loss_of(model, batch(rank))
    readings.append(monitor.end(loss, 1.0))
    replicated = dist.tensor.DTensor.from_local(torch.tensor(2.5), init_device_mesh("cpu", (2,)))
    readings += [reading for _ in range(2) if (reading := monitor.end(replicated)) is not None]
    norms = []
    whole_parameter = nn.Parameter(torch.ones(3))  # beside the sharded ones
    whole_parameter.grad = torch.ones(3)
    for step in (1, 2):
        model.zero_grad()
        loss_of(model, batch(rank + step)).backward()
        norm = grad_norm([whole_parameter, *model.parameters()], ranks=monitor.ranks)
        norms.append((norm, [torch.ones(3), *_wholes(model, gradients=True).values()]))
    whole = _wholes(model)
    found = alarms(readings), restored(readings), [repr(r.metrics) for r in readings if not r.restored]
    tokens = {m.tokens for r in readings if r.alignment is not None for m in r.alignment.matrices}
    return whole, found, tokens, norms


@pytest.mark.parametrize("make", [_fsdp2, _fsdp1])
def test_ranks_of_a_sharded_model_see_the_same_and_restore_the_same(make, tmp_path: Path):
    (a, seen, tokens, norms), (b, seen_1, *_) = on_two_ranks(_train_on_rank, tmp_path, make)
    assert_same(a, b)
    assert seen == seen_1
    assert seen[0] == [(4, "stable_rank", UP), (8, "non_finite", "loss")]
    assert seen[1] == {4: [UP]}
    assert "'stability/loss': 2.5" in seen[2][-1]
    assert tokens == {2 * 48}
    for norm, gradients in norms:
        expected = torch.cat([g.flatten() for g in gradients]).norm()
        torch.testing.assert_close(norm, expected)


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measure": {"stable_rank": 0}}, "the cadence of stable_rank in measure must be a positive integer .* got 0"),
        ({"measure": {"spectral_alignment": -5}}, "of spectral_alignment in measure must be a positive .* got -5"),
        ({"measure": {"stable_rank": True}}, "must be a positive integer \\(optimizer steps\\), got True"),
        ({"measure": {"stable_rank": 2.0}}, "must be a positive integer \\(optimizer steps\\), got 2.0"),
        ({"measure": {"rank": 5}}, "measure must hold only stable_rank, .*jacobian_alignment, got 'rank'"),
        ({"measure": ["stable_rank"]}, "measure must map quantities to cadences .* got \\['stable_rank'\\]"),
        ({"on_alarm": "crash"}, "on_alarm must be one of log, stop, restore, got 'crash'"),
        ({"thresholds": {"stable_ranks": 2}}, "thresholds must hold only .*stable_rank, .* got 'stable_ranks'"),
        ({"thresholds": {"stable_rank": -1}}, "stable_rank must be a positive number or None, got -1"),
        ({"cooldown": 0}, "cooldown must be a positive integer \\(optimizer steps\\), got 0"),
        ({"rule": "sign"}, "rule must be .*got 'sign'"),
        ({"targets": "*up_porj*"}, "targets must .*got '\\*up_porj\\*'; near names: .*up_proj"),
        ({"measure": {"jacobian_alignment": 5}, "blocks": "layers.*"}, "blocks must match modules .* got 'layers"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Monitor(recipe(), **arguments)


def test_a_model_without_blocks_is_refused_where_jacobians_are_wanted():
    model = nn.ModuleDict({"mlp": nn.Linear(4, 4)})
    assert "1 matrices" in Monitor(model).describe()
    with pytest.raises(ValueError, match=r"blocks must be names or globs .* got None and a model without a list"):
        Monitor(model, {"jacobian_alignment": 10})


def test_one_line_says_what_is_measured():
    monitor = Monitor(recipe(), {"stable_rank": 5, "spectral_alignment": 7}, "restore", cooldown=30)
    line = "monitor: stable_rank every 5 steps, spectral_alignment every 7 steps; 12 matrices; on alarm: restore"
    assert monitor.describe() == f"{line} (cool-down 30 steps)"
    assert Monitor(recipe(), {}).describe() == "monitor: loss and gradient norm; 0 matrices; on alarm: log"
