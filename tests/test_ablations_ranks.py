"""Cells that take several processes: DDP and FSDP2 on two, over gloo."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from msign_lightning.ablations import StudyError
from msign_lightning.ablations.baselines import ZClip
from msign_lightning.ablations.cell import Group
from msign_lightning.ablations.launch import Pool
from msign_lightning.ablations.program import check, run_cell
from msign_lightning.ablations.runner import _deal, _devices, _gpus
from msign_lightning.ablations.study import Tpe, Variant
from msign_lightning.matrices import gather
from tests.small_studies import SMALL, study
from tests.support import PATIENCE, on_two_ranks

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
TOGETHER = {**SMALL, "trainer.devices": 2, "trainer.strategy": "ddp"}


def on_two(strategy="ddp", **changes):
    """A study whose cells take two processes."""
    settings = {**TOGETHER, "trainer.strategy": strategy}
    values = {"arms": ["msign"], "factors": {"lr": [0.01], "period": [10]}, "seeds": [0], "steps": 40, **changes}
    return study(settings=settings, **values)


def cell_of(study):
    return next(iter(study.cells.values()))


def untimed(outcome):
    return outcome._replace(seconds=0, steps_per_second=0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process gives that sees the same windows, in two micro-batches a step."""
    one = replace(on_two(), settings={**SMALL, "trainer.accumulate_grad_batches": 2})
    return run_cell(one, cell_of(one), tmp_path_factory.mktemp("alone"))


def die_at_39(step, loss):
    if step == 39:
        raise ZeroDivisionError
    return False


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_give_what_one_does_whole_and_in_legs(strategy, alone, tmp_path):
    cells = on_two(strategy)
    check(cells)
    cell = cell_of(cells)
    whole = run_cell(cells, cell, tmp_path / "whole")
    # Over gloo PyTorch 2.7 sums gradients under FSDP2: where they are not clipped, the steps differ a little.
    assert len(whole.curve) == 40
    assert dict(whole.curve) == pytest.approx(dict(alone.curve), rel=1e-5 if strategy == "ddp" else 5e-3)
    assert dict(whole.ranks) == pytest.approx(dict(alone.ranks), rel=1e-3 if strategy == "ddp" else 5e-2)
    assert whole.val_loss == pytest.approx(alone.val_loss, rel=1e-4 if strategy == "ddp" else 1e-2)
    if strategy == "ddp":
        assert whole.max_grad_norm == pytest.approx(alone.max_grad_norm, rel=1e-3)

    with pytest.raises(ZeroDivisionError):
        run_cell(cells, cell, tmp_path / "legs", die_at_39, legs=3)
    (saved,) = (tmp_path / "legs" / cell.folder).glob("leg-*")
    assert saved.is_dir() == (strategy == "fsdp2")
    saved.with_suffix(".part").mkdir()  # as of a process that was killed
    (saved.with_suffix(".part") / "half").touch()
    seen = []
    again = run_cell(cells, cell, tmp_path / "legs", lambda step, loss: seen.append(step), legs=3)
    assert seen == [39, 40]
    assert untimed(again) == untimed(whole)
    assert not list((tmp_path / "legs" / cell.folder).glob("leg-*"))


def _clip(rank):
    """A gradient of norm 10 or, where ranks are two, its shards, after 25 norms of 1: what ZClip leaves of it."""
    model = nn.Linear(8, 4, bias=False)
    if rank is not None:
        fully_shard(model)
    gradient = torch.arange(32.0).reshape(4, 8)
    gradient *= 10 / gradient.norm()
    if rank is None:
        model.weight.grad = gradient
    else:
        model.weight.grad = distribute_tensor(gradient, model.weight.device_mesh, model.weight.placements)
    zclip = ZClip()
    for step in range(25):
        zclip.update(1 + step % 2 / 10)
    zclip.on_before_optimizer_step(SimpleNamespace(precision_plugin=None), model, None)
    return gather(model.weight.grad)


def test_gradients_are_clipped_by_the_norm_of_all_shards(tmp_path):
    alone = _clip(None)
    assert alone.norm() < 2
    for sharded in on_two_ranks(_clip, tmp_path):
        torch.testing.assert_close(sharded, alone)


def test_one_that_dies_ends_the_others(tmp_path):
    def kill_one(step, loss):
        os.kill(multiprocessing.active_children()[-1].pid, signal.SIGKILL)
        return False

    cells = on_two(steps=100_000)
    with pytest.raises(RuntimeError, match=r"worker process \d+ was killed by SIGKILL"):
        run_cell(cells, cell_of(cells), tmp_path, kill_one)
    assert not multiprocessing.active_children()


def test_they_end_with_their_worker(tmp_path):
    def ranks():
        listed = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
        return [pid for pid in listed if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    cells = on_two(steps=100_000)
    with Pool(cells, tmp_path, 1) as pool:
        pool.start(0, cell_of(cells))
        (worker,) = multiprocessing.active_children()
        end = time.monotonic() + PATIENCE
        while not [*pool.wait(1.0)]:  # its first progress
            assert time.monotonic() < end
        both = ranks()
        assert len(both) == 2
    while any(Path(f"/proc/{pid}").exists() for pid in both):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_all_stop_where_one_diverges_or_the_run_is_pruned(tmp_path):
    cells = on_two(arms=["adamw"], factors={"lr": [1e30]})
    assert run_cell(cells, cell_of(cells), tmp_path).diverged_at == 2
    search = on_two(factors={}, arms=["adamw"], sampler=Tpe(1e-3, 10, trials=2), prune=True)
    assert run_cell(search, Group("adamw").cell(0.01, 0), tmp_path, lambda step, loss: True) is None


def test_what_does_not_fit_is_said_with_its_place(tmp_path):
    cells = on_two(arms=["msign", "qk_norm"], factors={"lr": [0.01]})
    broken = replace(cells, settings={**cells.settings, "targets": "nowhere.*"})
    with pytest.raises(StudyError, match=r"msign: targets .*nowhere"):
        check(broken)
    many = replace(cells, settings={**cells.settings, "trainer.num_nodes": 2})
    with pytest.raises(StudyError, match=r"trainer\.num_nodes must be 1, since a cell is trained on one, got 2"):
        check(many)
    with pytest.raises(StudyError, match=r"trainer\.strategy must be ddp or a ModelParallelStrategy .* got DDP"):
        check(replace(cells, settings={**cells.settings, "trainer.strategy": "ddp_spawn"}))
    with pytest.raises(StudyError, match="devices"):
        check(replace(cells, settings={**cells.settings, "trainer.devices": 0}))


def test_gpus_are_dealt_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,GPU-8")
    one = study(program="paper/nanogpt_5m", steps=1000, settings={}, factors={"lr": [0.01]})
    two = replace(one, settings={"trainer.devices": 2})
    some = replace(one, arms=["adamw", "wide"], variants={"wide": Variant("adamw", {"trainer.devices": [0, 1, 2]})})
    assert [_devices(cells) for cells in (one, two, some)] == [1, 2, 3]
    odd = {"2": 2, "0,1": 2, "auto": 1, -1: 1, 0: 1, (): 1}
    assert [_devices(replace(one, settings={"trainer.devices": value})) for value in odd] == list(odd.values())
    assert _devices(replace(one, factors={"lr": [0.01], "trainer.devices": [1, 6]})) == 6
    assert _deal(one, _gpus) == ["4", "5", "6", "7", "GPU-8"]
    assert _deal(two, _gpus) == ["4,5", "6,7"]
    assert _deal(some, _gpus) == ["4,5,6"]
    assert _deal(two, lambda: []) == []
    assert _deal(replace(two, settings={**two.settings, "trainer.accelerator": "cpu"}), _gpus) == []
    with pytest.raises(StudyError, match=r"trainer\.devices must be at most the number of GPUs, 5, got 6"):
        _deal(replace(one, settings={"trainer.devices": 6}), _gpus)
