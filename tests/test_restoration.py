"""Restoration in plain PyTorch: schedule, equality with a naive loop, several optimizers, bad weights, sharding."""

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from support import assert_same, llama, on_two_ranks, weights
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from msign_lightning import Restoration, matrices, restore, select_targets, stable_rank
from msign_lightning.settings import RestorationSettings

LLAMA_ATTENTION = [f"model.layers.{i}.self_attn.{m}_proj.weight" for i in range(2) for m in "qkvo"]
LLAMA_MLP = [f"model.layers.{i}.mlp.{m}_proj.weight" for i in range(2) for m in ("gate", "up", "down")]


def train(model: nn.Module, steps: int, optimizer: torch.optim.Optimizer, after_step=lambda step: None) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        tokens_BT = torch.randint(96, (4, 16), generator=generator)
        optimizer.zero_grad()
        model(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
        optimizer.step()
        after_step(step)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (RestorationSettings(3), [3, 6, 9, 12]),
        (RestorationSettings(1, start=2, stop=4), [2, 3, 4]),
        (RestorationSettings(3, start=4), [6, 9, 12]),
        (RestorationSettings(3, stop=9), [3, 6, 9]),
        (RestorationSettings(100), []),
    ],
)
def test_schedule_is_due_at_multiples_of_the_period(schedule, expected):
    assert [step for step in range(13) if schedule.due(step)] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"period": 0}, "period must be a positive integer, got 0"),
        ({"period": 2.5}, "period must be a positive integer, got 2.5"),
        ({"period": True}, "period must be a positive integer, got True"),
        ({"period": "10"}, "period must be a positive integer, got '10'"),
        ({"start": -1}, "start must be an integer of at least 0, got -1"),
        ({"stop": 1.0}, "stop must be an integer of at least 0, got 1.0"),
        ({"start": 5, "stop": 4}, "start must be at most stop, got start=5, stop=4"),
        ({"stop": 99}, "stop must be at least 100, the first multiple of period 100 from start 0 on, got 99"),
        ({"period": 4, "start": 5, "stop": 7}, "stop must be at least 8, .* got 7"),
    ],
)
def test_schedule_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        RestorationSettings(**arguments)


@pytest.mark.parametrize("targets", ["attention", "mlp", "all_2d"])
@pytest.mark.parametrize("rule", ["msign", "cap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attached_equals_a_naive_loop_to_the_last_bit(targets, rule, dtype):
    names = {"attention": LLAMA_ATTENTION, "mlp": LLAMA_MLP, "all_2d": LLAMA_ATTENTION + LLAMA_MLP}[targets]
    model, reference = llama(dtype), llama(dtype)

    restoration = Restoration(model, period=4, targets=targets, rule=rule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    reports = []
    restoration.attach(optimizer, on_report=reports.append)
    train(model, 9, optimizer)

    @torch.no_grad()
    def naive(step: int) -> None:
        if step % 4 == 0:
            for name, p in reference.named_parameters():
                if name in names:
                    p.copy_(restore(p, rule=rule))

    train(reference, 9, torch.optim.AdamW(reference.parameters(), lr=1e-2), naive)
    assert_same(weights(model), weights(reference))
    assert [r.step for r in reports] == [4, 8]
    assert {m.name for m in reports[0].matrices} == set(names)


def test_calling_step_equals_attaching():
    attached, called = llama(), llama()
    optimizer = torch.optim.AdamW(attached.parameters(), lr=1e-2)
    Restoration(attached, period=3).attach(optimizer)
    train(attached, 7, optimizer)
    restoration = Restoration(called, period=3)
    returned = []
    train(called, 7, torch.optim.AdamW(called.parameters(), lr=1e-2), lambda _: returned.append(restoration.step()))
    assert_same(weights(attached), weights(called))
    assert [report is not None for report in returned] == [False, False, True, False, False, True, False]


def test_fused_qkv_is_restored_block_by_block():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=24, n_layer=1, n_head=2))
    before = weights(model)
    Restoration(model, targets="attention").apply()
    fused = "transformer.h.0.attn.c_attn.weight"
    blocks = zip(model.get_parameter(fused).split(24, dim=1), before[fused].split(24, dim=1), strict=True)
    for block, old in blocks:
        torch.testing.assert_close(block, restore(old.contiguous()), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stable_rank(block), torch.tensor(24.0), rtol=1e-4, atol=0)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {fused, "transformer.h.0.attn.c_proj.weight"}


def test_report_tells_stable_ranks_and_names():
    model = llama()
    expected = stable_rank(model.get_parameter(LLAMA_ATTENTION[0]))
    report = Restoration(model, targets="all_2d").apply()
    first = next(m for m in report.matrices if m.name == LLAMA_ATTENTION[0])
    assert first.finite
    assert first.changed
    assert first.stable_rank_before == pytest.approx(expected.item(), rel=1e-5)
    assert first.stable_rank_after == pytest.approx(32, rel=1e-4)
    metrics = report.metrics()
    assert metrics["msign/changed"] == 14
    assert metrics["msign/skipped"] == 0
    assert metrics["msign/seconds"] > 0
    assert metrics["msign/stable_rank_before/min"] == min(m.stable_rank_before for m in report.matrices)
    assert metrics["msign/stable_rank_after/geometric_mean"] > metrics["msign/stable_rank_before/geometric_mean"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["svd", "polynomial"])
def test_matrices_that_are_not_finite_are_left_alone_and_reported_once(bad, method, caplog):
    model, clean = llama(), llama()
    name = LLAMA_ATTENTION[2]
    with torch.no_grad():
        model.get_parameter(name)[3, 5] = bad
    before = weights(model)
    restoration = Restoration(model, period=1, method=method)
    with caplog.at_level(logging.WARNING, logger="msign_lightning"):
        first, second = restoration.step(), restoration.step()
    assert first.skipped == second.skipped == (name,)
    assert first.metrics()["msign/skipped"] == 1
    assert [record.message.count(name) for record in caplog.records] == [1]
    after = weights(model)
    torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True)
    Restoration(clean, method=method).apply()
    del after[name]
    for other, value in after.items():
        torch.testing.assert_close(value, clean.get_parameter(other).detach(), rtol=1e-3, atol=1e-4)


def test_named_matrices_alone_are_restored_also_of_fused_and_stacked_ones():
    torch.manual_seed(0)
    model = nn.ModuleDict({"gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=24, n_layer=1))})
    model.experts = nn.Module()
    model.experts.up_proj = nn.Parameter(torch.randn(3, 8, 6))
    before = weights(model)
    restoration = Restoration(model, method="svd")
    fused, stack = "gpt2.transformer.h.0.attn.c_attn.weight", "experts.up_proj"
    report = restoration.apply(names=[f"{fused}.k", f"{stack}.2", "of another model"])
    assert [m.name for m in report.matrices] == [f"{fused}.k", f"{stack}.2"]
    assert all(m.changed for m in report.matrices)
    expected = before | {fused: before[fused].clone(), stack: before[stack].clone()}
    expected[fused][:, 24:48] = restore(before[fused][:, 24:48], method="svd")
    expected[stack][2] = restore(before[stack][2], method="svd")
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-6, atol=1e-7)
        if name not in (fused, stack):
            assert torch.equal(p, before[name])
    assert torch.equal(model.experts.up_proj[:2], before[stack][:2])
    assert restoration.apply(names=[]).matrices == ()
    assert restoration.steps == [0]


def test_every_weight_bad_is_a_report_and_no_exception():
    model = llama()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    report = Restoration(model).apply()
    assert len(report.skipped) == len(report.matrices) == 14
    assert set(report.metrics()) == {"msign/changed", "msign/skipped", "msign/seconds"}


def test_half_precision_that_would_overflow_is_left_alone():
    model = llama(torch.float16)
    weight = model.get_parameter(LLAMA_ATTENTION[0])
    with torch.no_grad():
        weight.copy_(torch.eye(32) * 60_000)
        weight[0, :30] = 60_000  # restored, the other rows would have to grow
    before = weight.detach().clone()
    report = Restoration(model, targets=LLAMA_ATTENTION[0]).apply()
    assert report.matrices[0].finite
    assert not report.matrices[0].changed
    assert torch.equal(weight, before)


def test_zero_matrix_stays_zero():
    model = llama()
    with torch.no_grad():
        model.get_parameter(LLAMA_ATTENTION[0]).zero_()
    Restoration(model).apply()
    assert not model.get_parameter(LLAMA_ATTENTION[0]).any()


def test_small_chunks_give_the_same_weights(monkeypatch):
    whole, chunked = llama(), llama()
    Restoration(whole, method="svd").apply()
    monkeypatch.setattr(matrices, "CHUNK_ELEMENTS", 1)
    report = Restoration(chunked, method="svd").apply()
    assert len(report.matrices) == 14
    assert_same(weights(whole), weights(chunked))


@pytest.mark.parametrize("method", ["svd", "polynomial"])
@pytest.mark.parametrize("rule", ["msign", "cap"])
def test_an_application_needs_at_most_three_chunks_of_memory(rule, method, monkeypatch, tmp_path):
    model = nn.ModuleDict({"mlp": nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(24)))})
    chunk_bytes = 8 * 256 * 256 * 4
    monkeypatch.setattr(matrices, "CHUNK_ELEMENTS", chunk_bytes // 4)
    restoration = Restoration(model, rule=rule, method=method)
    restoration.apply()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        restoration.apply()
    trace = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = list(itertools.accumulate(e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])))
    assert chunk_bytes <= max(held) <= 3.01 * chunk_bytes


def test_several_optimizers_count_apart_and_restore_what_they_train():
    model = llama()
    attention = [model.get_parameter(name) for name in LLAMA_ATTENTION]
    mlp = [model.get_parameter(name) for name in LLAMA_MLP]
    slow, fast = torch.optim.SGD(attention, lr=0.0), torch.optim.SGD(mlp, lr=0.0)
    idle = torch.optim.SGD([model.get_input_embeddings().weight], lr=0.0)
    restoration, reports = Restoration(model, period=2), []
    handles = restoration.attach(slow, fast, idle, on_report=reports.append)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in (fast, idle, fast, idle, slow, fast, fast, slow):
        optimizer.step()
    assert [(r.step, {m.name for m in r.matrices}) for r in reports] == [
        (2, set(LLAMA_MLP)),
        (4, set(LLAMA_MLP)),
        (2, set(LLAMA_ATTENTION)),
    ]
    assert restoration.state_dict() == {"steps": [2, 4, 2]}
    for handle in handles:
        handle.remove()
    fast.step()
    assert restoration.steps == [2, 4, 2]


def test_applying_by_hand_restores_what_all_optimizers_train():
    model, expected = llama(), llama()
    attention = [model.get_parameter(name) for name in LLAMA_ATTENTION]
    restoration = Restoration(model, exclude=LLAMA_MLP[1:])
    restoration.attach(torch.optim.SGD(attention), torch.optim.SGD([model.get_parameter(LLAMA_MLP[0])]))
    assert {m.name for m in restoration.apply().matrices} == {*LLAMA_ATTENTION, LLAMA_MLP[0]}
    Restoration(expected, exclude=LLAMA_MLP[1:]).apply()
    assert_same(weights(model), weights(expected))


def test_attaching_twice_or_stepping_by_hand_besides_is_an_error():
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    restoration = Restoration(model, period=2)
    restoration.step()
    (handle,) = restoration.attach(optimizer)
    with pytest.raises(RuntimeError, match="attached already: detach it first"):
        restoration.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"steps by itself: don't call step\(\)"):
        restoration.step()
    optimizer.step()
    assert restoration.steps == [2]
    handle.remove()
    restoration.step()
    restoration.attach(optimizer)
    restoration.detach()
    optimizer.step()
    assert restoration.steps == [3]


@pytest.mark.parametrize("wrong", [llama(), None, "adamw"], ids=["model", "none", "name"])
def test_only_optimizers_can_be_attached(wrong):
    with pytest.raises(ValueError, match=f"must be optimizers of PyTorch or wrap one, got {type(wrong).__name__}"):
        Restoration(llama()).attach(wrong)


def test_a_count_of_other_optimizers_is_refused():
    model = llama()
    restoration = Restoration(model)
    restoration.load_state_dict({"steps": [3]})
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"as many as have been counted \(1\), got 2"):
        restoration.attach(optimizer, optimizer)


@pytest.mark.parametrize("first", ["attach", "setup"])
def test_fabric(first, tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1)
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reports = []
    if first == "attach":
        Restoration(model, 2, "model.layers.0.*").attach(optimizer, on_report=reports.append)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    if first == "setup":
        Restoration(wrapped, 2, "model.layers.0.*").attach(wrapped_optimizer, on_report=reports.append)
    for _ in range(3):
        loss = wrapped(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss
        fabric.backward(loss)
        wrapped_optimizer.step()
    (report,) = reports
    assert {m.name for m in report.matrices} == {n for n in LLAMA_ATTENTION + LLAMA_MLP if ".0." in n}


def test_a_report_takes_one_transfer_from_the_device(monkeypatch):
    model = llama()
    calls = []

    def count(name: str) -> None:
        original = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda tensor: calls.append(name) or original(tensor))

    for name in ("tolist", "item", "cpu"):
        count(name)
    report = Restoration(model, method="polynomial").apply()
    assert len(report.matrices) == 14
    assert calls == ["tolist"]


def test_several_optimizers_must_train_every_target():
    model = llama()
    optimizers = [torch.optim.SGD([model.get_parameter(name)], lr=0.1) for name in LLAMA_ATTENTION]
    with pytest.raises(ValueError, match=r"every target must be trained .* got 'model\.layers\.0\.mlp\.gate_proj"):
        Restoration(model).attach(*optimizers)
    with pytest.raises(ValueError, match="at least one optimizer, got none"):
        Restoration(model).attach()


def test_one_optimizer_must_train_every_target():
    model = llama()
    with pytest.raises(ValueError, match=r"must be trained by one of .* got 'model\.layers\.0\.self_attn\.q_proj"):
        Restoration(model).attach(torch.optim.SGD([model.get_input_embeddings().weight], lr=0.1))


def test_state_loaded_before_attaching_is_kept():
    model = llama()
    restoration = Restoration(model, period=4)
    restoration.load_state_dict({"steps": [3]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reports = []
    restoration.attach(optimizer, on_report=reports.append)
    optimizer.step()
    assert [report.step for report in reports] == [4]


def test_cut_may_be_stated_as_a_mapping():
    names = [t.name for t in select_targets(llama(), "*q_proj*", cuts={"*q_proj*": {"sizes": [8, 24]}})]
    assert names[:2] == ["model.layers.0.self_attn.q_proj.weight.0", "model.layers.0.self_attn.q_proj.weight.1"]
    for wrong in ({"size": [8]}, [8, 24], 3):
        with pytest.raises(ValueError, match=r"cuts must map globs to a Cut or its arguments, got .* for '\*q_proj\*'"):
            select_targets(llama(), cuts={"*q_proj*": wrong})


def test_state_of_another_number_of_optimizers_is_refused():
    with pytest.raises(ValueError, match=r"one count per optimizer \(1\), got \[3, 4\]"):
        Restoration(llama()).load_state_dict({"steps": [3, 4]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "sign"}, "rule must be .*got 'sign'"),
        ({"method": "qr"}, "method must be .*got 'qr'"),
        ({"rtol": 1.0}, "rtol must .*got 1.0"),
        ({"rtol": "x"}, "rtol must .*got 'x'"),
        ({"targets": "atention"}, "attention"),
        ({"targets": []}, "targets"),
        ({"period": 0}, "period must be a positive integer, got 0"),
    ],
)
def test_constructor_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        Restoration(llama(), **arguments)


@pytest.mark.parametrize("fused", [False, True])
def test_step_skipped_by_a_gradient_scaler_does_not_count(fused):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    restoration, reports = Restoration(model, period=2), []
    restoration.attach(optimizer, on_report=reports.append)
    tokens_BT = torch.randint(96, (2, 8))
    for step in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=tokens_BT, labels=tokens_BT).loss
        scaler.scale(loss * float("inf") if step in (1, 2) else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert restoration.steps == [3]
    assert [r.step for r in reports] == [2]


def test_autocast_around_the_step_changes_nothing():
    plain, cast = llama(), llama()
    Restoration(plain).apply()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Restoration(cast).apply()
    assert_same(weights(plain), weights(cast))


def _shard_and_restore(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    from torch.distributed.fsdp import fully_shard

    model = llama()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    restoration = Restoration(model, period=2)
    train(model, 1, optimizer, lambda _: restoration.step())
    before = {name: p.full_tensor() for name, p in model.named_parameters()}
    report = restoration.step()
    after = {name: p.full_tensor() for name, p in model.named_parameters()}
    train(model, 1, optimizer)  # still trains
    return before, after, [m.name for m in report.matrices]


def test_sharded_parameters_get_what_whole_ones_would(tmp_path: Path):
    (before, after, names), (_, after_1, names_1) = on_two_ranks(_shard_and_restore, tmp_path)
    assert names == names_1
    assert set(names) == set(LLAMA_ATTENTION + LLAMA_MLP)
    assert_same(after, after_1)
    assert_same(after, {name: restore(p) if name in names else p for name, p in before.items()})


def test_a_model_without_weights_is_selected_from_but_not_restored():
    with torch.device("meta"):
        planned = llama()
    assert [t.name for t in select_targets(planned)] == [t.name for t in select_targets(llama())]
    with pytest.raises(ValueError, match=r"targets must hold weights, got model\.layers\.0.* on the meta device"):
        Restoration(planned)
