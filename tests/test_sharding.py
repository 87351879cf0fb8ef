"""Owners compute: whatever way parameters lie on the ranks, the weights are those of one process, bit for bit."""

import itertools
import math
import os
import re
import signal
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import assert_same, llama, on_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from msign_lightning import Cut, Restoration, matrices, restoration, restore, select_targets, sharding
from msign_lightning.monitor import Monitor
from msign_lightning.sharding import Ranks, Work, plan
from msign_lightning.spectrum import SpectrumMonitor

TARGETS = ["mlp.*", "narrow.*", "experts.*"]
CUTS = {
    "*qkv*": Cut(sizes=(24, 24, 24), names=("q", "k", "v")),
    "*gqa*": Cut(sizes=(16, 8, 8), names=("q", "k", "v")),
    "*columns*": Cut(sizes=(12, 12, 12), dim=1, names=("q", "k", "v")),
    "*interleaved*": Cut(sizes=(4, 4, 4), repeats=3, names=("q", "k", "v")),
    "*gate_up*": Cut(sizes=(9, 9), dim=1, names=("gate", "up")),
}
SETTINGS: dict[str, Any] = {"targets": TARGETS, "cuts": CUTS}


class Zoo(nn.Module):
    """A parameter of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {
            "uneven": (30, 50),
            "tiny": (3, 5),
            "qkv": (24, 72),
            "gqa": (16, 32),
            "columns": (36, 12),
            "interleaved": (20, 36),
            "plain": (64, 48),
            "frozen": (10, 10),
        }
        self.mlp = nn.Module()
        for name, size in sizes.items():
            self.mlp.add_module(name, nn.Linear(*size, bias=False))
        self.mlp.frozen.requires_grad_(False)
        self.mlp.tied = nn.Linear(64, 48, bias=False)
        self.mlp.tied.weight = self.mlp.plain.weight
        self.narrow = nn.Linear(24, 16, bias=False, dtype=torch.bfloat16)
        self.experts = nn.Module()
        self.experts.down = nn.Parameter(torch.randn(6, 20, 12))
        self.experts.gate_up = nn.Parameter(torch.randn(4, 12, 18))


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, by the names they have in one process."""
    wholes = {}
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for name, p in model.named_parameters():
            own_name = name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
            wholes[own_name] = (p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()).clone()
    return wholes


def distribute(model: nn.Module, mesh: Any, placements: Callable[[str, Tensor], list[Any]]) -> nn.Module:
    """As tensor parallelism does it."""
    for path, module in model.named_modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if not (wanted := placements(f"{path}.{name}", p)):
                continue
            new = distribute_tensor(p.detach(), mesh, wanted)
            module.register_parameter(name, nn.Parameter(new, requires_grad=p.requires_grad))
    model.mlp.tied.weight = model.mlp.plain.weight
    return model


def shard(model: nn.Module, **arguments: Any) -> nn.Module:
    for part in (model.narrow, model.experts, model.mlp):
        fully_shard(part, **arguments)
    return fully_shard(model, **arguments)


def ddp(ranks: int) -> nn.Module:
    return DistributedDataParallel(Zoo())


def fsdp2(ranks: int) -> nn.Module:
    return shard(Zoo())


def offloaded(ranks: int) -> nn.Module:
    return shard(Zoo(), offload_policy=CPUOffloadPolicy(pin_memory=False))


def columns(ranks: int) -> nn.Module:
    """Shards of the last dimension, which FSDP2 can't make where they are uneven."""
    return distribute(Zoo(), init_device_mesh("cpu", (ranks,)), lambda name, p: [Shard(p.ndim - 1)])


def rows(ranks: int) -> nn.Module:
    """The members of a stack are cut, not dealt out."""
    return distribute(Zoo(), init_device_mesh("cpu", (ranks,)), lambda name, p: [Shard(p.ndim - 2)])


def replicated(ranks: int) -> nn.Module:
    return distribute(Zoo(), init_device_mesh("cpu", (ranks,)), lambda name, p: [Replicate()])


def hsdp(ranks: int) -> nn.Module:
    return shard(Zoo(), mesh=init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard")))


def tp(ranks: int) -> nn.Module:
    """Two dimensions of the mesh, one of which holds shards, the first or the last."""
    mesh = init_device_mesh("cpu", (2, ranks // 2))
    choices = itertools.cycle([[Shard(0), Replicate()], [Replicate(), Shard(1)]])
    return distribute(Zoo(), mesh, lambda name, p: next(choices))


def tp_fsdp2(ranks: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))

    def placements(name: str, p: Tensor) -> list[Any]:
        """FSDP2 takes even shards only, of what is sharded already; else it is left to FSDP2 alone."""
        return [] if p.size(0) % 4 and p.ndim == 2 else [Shard(0 if "qkv" in name else 1)]

    return shard(distribute(Zoo(), mesh["tp"], placements), mesh=mesh["dp"])


def undeclared(ranks: int) -> nn.Module:
    """Each rank's own; here they are the same all the same."""
    return Zoo()


def fsdp1(ranks: int, **arguments: Any) -> nn.Module:
    model = Zoo()
    arguments |= {"use_orig_params": True, "device_id": torch.device("cpu")}
    for name in ("narrow", "experts", "mlp"):
        setattr(model, name, FullyShardedDataParallel(getattr(model, name), **arguments))
    return FullyShardedDataParallel(model, **arguments)


def fsdp1_hybrid(ranks: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    return fsdp1(ranks, device_mesh=mesh, sharding_strategy=ShardingStrategy.HYBRID_SHARD)


CASES = (ddp, fsdp2, offloaded, columns, rows, replicated, fsdp1, undeclared)
CASES_OF_FOUR = (ddp, fsdp2, rows, fsdp1, hsdp, tp, tp_fsdp2, fsdp1_hybrid)


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    usual = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, usual)


def restored(make: Callable[[int], nn.Module], ranks: int, chunk: int = matrices.CHUNK_ELEMENTS) -> Any:
    model = make(ranks)
    with patched(matrices, "CHUNK_ELEMENTS", chunk):
        report = Restoration(model, **SETTINGS).apply()
    return whole(model), report.matrices


def spectra(make: Callable[[int], nn.Module], ranks: int) -> Any:
    """Of two measurements, the second of which starts from vectors of the first."""
    model = make(ranks)
    with matrices.whole_shapes(model):
        targets = select_targets(model, **SETTINGS)
    monitor = SpectrumMonitor(targets, ranks=Ranks(model))
    return [(m.matrices, m.vectors) for m in (monitor.measure(), monitor.measure())], monitor.state_dict()


def gqa(ranks: int) -> nn.Module:
    """Parameters of 24 x 24, a fused one whose pieces have two shapes, and experts, on all ranks alike."""
    torch.manual_seed(0)
    model = nn.Module()
    model.mlp = nn.Module()
    for i in range(7):
        model.mlp.add_module(f"l{i}", nn.Linear(24, 24, bias=False))
    model.mlp.gqa = nn.Linear(16, 32, bias=False)
    model.mlp.experts = nn.Module()
    model.mlp.experts.down = nn.Parameter(torch.randn(8, 24, 24))
    return model


def traffic(make: Callable[[nn.Module], nn.Module], ranks: int, chunk: int = 10000) -> dict[str, Any]:
    """Calls and bytes that this rank sends to others, and the multiplications that it does."""
    model = make(gqa(ranks))
    counts: Counter[str] = Counter()

    def all_to_all(output: Tensor, sent: Tensor, output_splits: list[int], splits: list[int], group: Any) -> None:
        counts["all_to_all"] += 1
        counts["bytes"] += sum(splits) - splits[group.rank()]
        counts["buffer"] = max(counts["buffer"], output.numel(), sent.numel())
        usual[0](output, sent, output_splits, splits, group=group)

    def broadcast(tensor: Tensor, src: int, group: Any) -> None:
        counts["broadcast"] += 1
        counts["bytes"] += tensor.numel() * (src == dist.get_rank())
        usual[1](tensor, src, group=group)

    def restore(X: Tensor, **arguments: Any) -> Any:
        counts["matrices"] += len(X)
        short, long = sorted(X.shape[1:])
        counts["cost"] += len(X) * short**2 * (2 * long + short)
        return usual[2](X, **arguments)

    usual = dist.all_to_all_single, dist.broadcast, restoration.restore_
    with (
        patched(dist, "all_to_all_single", all_to_all),
        patched(dist, "broadcast", broadcast),
        patched(restoration, "restore_", restore),
        patched(DTensor, "full_tensor", None),  # nothing is gathered
        patched(matrices, "CHUNK_ELEMENTS", chunk),
    ):
        Restoration(model, targets=["mlp.*"], cuts={"*gqa*": CUTS["*gqa*"]}).apply()
    return dict(counts)


def rows_of_experts(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = distribute_tensor(model.mlp.experts.down.detach(), mesh, [Shard(1)])
    model.mlp.experts.down = nn.Parameter(p)
    return model


def spoiled(ranks: int, make: Callable[[int], nn.Module]) -> Any:
    """The last rank has a NaN in its copy of one of three fused matrices, or of a shard of it."""
    model = make(ranks)
    (p,) = (p for name, p in model.named_parameters() if "qkv" in name)
    local = (p.to_local() if isinstance(p, DTensor) else p).detach()
    if dist.get_rank() == ranks - 1:
        local[-1, 3] = math.nan
    before = local.clone()
    report = Restoration(model, **SETTINGS).apply()
    stayed = local.view(torch.int32) == before.view(torch.int32)
    return stayed.all(1).tolist(), report.skipped


def spoiled_shard(ranks: int) -> Any:
    """The last rank of FSDP1 has a NaN in its shard of an expert or of another matrix."""
    model = fsdp1(ranks)
    if dist.get_rank() == ranks - 1:
        next(p for p in model.experts.parameters() if p.numel()).detach()[-1] = math.nan
    before = whole(model)
    report = Restoration(model, **SETTINGS).apply()
    after = whole(model)
    changed = {name for name in after if not torch.equal(after[name].nan_to_num(7.0), before[name].nan_to_num(7.0))}
    return report.skipped, sum(int(p.isnan().sum()) for p in after.values()), changed


def raising(ranks: int) -> Any:
    """Rank 1 fails in the second round."""
    model, calls = ddp(ranks), []

    def restore(X: Tensor, **arguments: Any) -> Any:
        calls.append(1)
        if dist.get_rank() == 1 and len(calls) == 2:
            raise MemoryError("no memory for this")
        return usual(X, **arguments)

    usual = restoration.restore_
    with patched(restoration, "restore_", restore), patched(matrices, "CHUNK_ELEMENTS", 2000):
        try:
            Restoration(model, **SETTINGS).apply()
        except RuntimeError as error:
            return str(error), whole(model)


def disagreeing(ranks: int, make: Callable[[int], nn.Module]) -> str:
    """The last rank leaves one matrix out."""
    settings = SETTINGS | ({"exclude": "*plain*"} if dist.get_rank() == ranks - 1 else {})
    try:
        Restoration(make(ranks), **settings).apply()
    except ValueError as error:
        return str(error)
    return ""


def another_rule(ranks: int) -> str:
    """The last rank has another rule than the others."""
    try:
        Restoration(ddp(ranks), rule="cap" if dist.get_rank() == ranks - 1 else "msign").apply()
    except ValueError as error:
        return str(error)
    return ""


def threads(ranks: int) -> Any:
    """Products of another number of threads have other bits, so this rank alone would get others."""
    torch.manual_seed(0)
    model = nn.Module()
    model.mlp = nn.Module()
    for i in range(3):
        model.mlp.add_module(f"l{i}", nn.Linear(384, 256, bias=False))
    torch.set_num_threads(1 + dist.get_rank())
    Restoration(DistributedDataParallel(model), targets="mlp").apply()
    torch.set_num_threads(1)
    return whole(model)


def declared(ranks: int) -> Any:
    """Copies in no wrapper, as with the Trainer of Hugging Face, of which all but the first rank's are spoiled."""
    model = Zoo()
    share = Restoration(model, **SETTINGS)
    share.share_over(dist.group.WORLD)
    if dist.get_rank():
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p))
    with patched(sharding, "plan", lambda works, world: {work.name: 0 for work in works}):
        share.apply()
    return whole(model), share.describe()


def own_modules(ranks: int) -> Any:
    """As in a pipeline: each rank has another model, and nobody waits for anybody."""
    torch.manual_seed(rank := dist.get_rank())
    model = nn.ModuleDict({"mlp": nn.Sequential(*(nn.Linear(8, 8 + 4 * rank) for _ in range(1 + rank)))})
    expected = [restore(layer.weight) for layer in model.mlp]
    Restoration(model).apply()
    return [torch.equal(layer.weight, W) for layer, W in zip(model.mlp, expected, strict=True)]


def _on_rank(rank: int, ranks: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for make in CASES if ranks == 2 else CASES_OF_FOUR:
        results[f"restored {make.__name__}"] = restored(make, ranks)
        results[f"restored in small chunks {make.__name__}"] = restored(make, ranks, 2000)
        if make in (ddp, fsdp1, hsdp) or (make is fsdp2 and ranks == 2):
            results[f"spectra {make.__name__}"] = spectra(make, ranks)
    results["traffic ddp"] = traffic(DistributedDataParallel, ranks)
    results["traffic fsdp2"] = traffic(fully_shard, ranks)
    results["traffic rows of experts"] = traffic(rows_of_experts, ranks, chunk=24 * 24)
    for make in (ddp,) if ranks == 2 else (ddp, hsdp):
        results[f"spoiled {make.__name__}"] = spoiled(ranks, make)
    for make in (ddp, fsdp2, fsdp1) if ranks == 2 else (hsdp, tp_fsdp2):
        results[f"disagreeing {make.__name__}"] = disagreeing(ranks, make)
    results |= {
        f.__name__: f(ranks) for f in (spoiled_shard, raising, another_rule, threads, declared, own_modules, stages)
    }
    return results


@pytest.fixture(scope="module", params=[2, 4])
def run(request, tmp_path_factory) -> tuple[int, list[dict[str, Any]]]:
    return request.param, on_ranks(request.param, _on_rank, tmp_path_factory.mktemp("ranks"), request.param)


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, Tensor], Any]:
    return restored(undeclared, 1)


def test_weights_and_reports_are_those_of_one_process(run, alone):
    checked = 0
    for name, (weights, report) in ((n, r) for of_rank in run[1] for n, r in of_rank.items() if "restored" in n):
        assert weights.keys() == alone[0].keys(), name
        assert [key for key in weights if not torch.equal(weights[key], alone[0][key])] == [], name
        assert report == alone[1], name
        checked += 1
    assert checked >= 2 * 8 * run[0]


def test_spectra_are_those_of_one_process_on_every_rank(run):
    expected, state = spectra(undeclared, 1)
    for name, (found, own_state) in ((n, r) for of_rank in run[1] for n, r in of_rank.items() if "spectra" in n):
        for (values, vectors), (expected_values, expected_vectors) in zip(found, expected, strict=True):
            assert values == expected_values, name
            assert all(map(torch.equal, itertools.chain(*vectors), itertools.chain(*expected_vectors))), name
        assert_same(own_state["vectors"], state["vectors"])


def test_work_is_shared_and_moves_once(run):
    ranks, results = run
    numbers = 7 * 24 * 24 + 16 * 32
    costs = 15 * 3 * 24**3 + 3 * 16**3 + 2 * 8**2 * 40
    for of_rank in results:
        ddp, fsdp2 = of_rank["traffic ddp"], of_rank["traffic fsdp2"]
        assert ddp["broadcast"] == ranks
        assert fsdp2["all_to_all"] == 2  # there and back, all parameters together
        for counts in (ddp, fsdp2):
            assert counts["cost"] <= 1.1 * costs / ranks + 3 * 24**3
    for kind, sent in (
        ("ddp", 4 * (numbers + 8 * 24 * 24)),
        ("fsdp2", 4 * 2 * numbers * (ranks - 1) / ranks),  # experts stay where they are
    ):
        of_ranks = [of_rank[f"traffic {kind}"] for of_rank in results]
        assert sum(counts["matrices"] for counts in of_ranks) == 7 + 3 + 8
        assert sum(counts["cost"] for counts in of_ranks) == costs
        assert sum(counts["bytes"] for counts in of_ranks) == sent
    for of_rank in results:  # one expert of each owner at a time, never the whole stack
        counts = of_rank["traffic rows of experts"]
        assert counts["all_to_all"] == 2 * 8 / ranks
        assert counts["buffer"] == 4 * 24 * 24


def test_what_is_not_finite_on_one_rank_is_left_alone_on_all(run):
    """The rows 48 to 71 of 72 are the matrix v."""
    ranks, results = run
    for rank, of_rank in enumerate(results):
        stayed, skipped = of_rank["spoiled ddp"]
        assert skipped == ("mlp.qkv.weight.v",)
        assert stayed == [False] * 48 + [True] * 24
        if ranks == 4:
            stayed, skipped = of_rank["spoiled hsdp"]
            assert skipped == ("mlp.qkv.weight.v",)
            assert stayed == ([False] * 12 + [True] * 24 if rank % 2 else [False] * 36)


def test_what_is_not_finite_in_a_shard_of_fsdp1_is_left_alone_on_all(run):
    for of_rank in run[1]:
        skipped, n_nan, changed = of_rank["spoiled_shard"]
        assert len(skipped) == n_nan == 1
        assert skipped[0].startswith("experts.")
        assert "mlp.qkv.weight" in changed
        assert of_rank["spoiled_shard"] == run[1][0]["spoiled_shard"]


def test_a_failing_owner_fails_all_ranks_with_its_name_and_leaves_its_matrices(run, alone):
    before = whole(Zoo())
    for of_rank in run[1]:
        message, weights = of_rank["raising"]
        assert message == "not all matrices could be computed: rank 1: MemoryError: no memory for this"
        assert_same(weights, run[1][0]["raising"][1])
        kinds = {key: (torch.equal(w, before[key]), torch.equal(w, alone[0][key])) for key, w in weights.items()}
        assert not all(is_new for _, is_new in kinds.values())


def test_ranks_that_want_different_matrices_are_told_so(run):
    for of_rank in run[1]:
        for name, message in of_rank.items():
            if name.startswith("disagreeing"):
                assert "all ranks must have the same matrices and settings, got mlp.plain" in message, name
                assert f"on rank {run[0] - 1}" in message


def test_ranks_with_different_rules_are_told_so(run):
    for of_rank in run[1]:
        assert re.search(r"got rule msign, .* on rank 0 and rule cap, .* on rank \d", of_rank["another_rule"])


def test_ranks_of_different_thread_counts_end_equal(run):
    for of_rank in run[1]:
        assert_same(of_rank["threads"], run[1][0]["threads"])


def test_copies_can_be_declared_and_get_the_owners_bits(run, alone):
    for of_rank in run[1]:
        weights, line = of_rank["declared"]
        assert f"; shared out over {run[0]} ranks" in line
        for name in weights:
            assert "frozen" in name or torch.equal(weights[name], alone[0][name]), name


def test_modules_that_nobody_declares_copies_are_each_ranks_own(run):
    assert all(all(of_rank["own_modules"]) for of_rank in run[1])


def stages(ranks: int) -> str:
    """What a monitor says of ranks that hold the stages of a pipeline."""
    model = nn.ModuleDict({f"mlp{dist.get_rank()}": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match="all ranks must have the same matrices") as caught:
        Monitor(model)
    return str(caught.value)


def test_a_monitor_of_pipeline_stages_is_an_error_on_every_rank(run):
    message = "got mlp0.weight of shape (8, 8) on rank 0 and mlp1.weight of shape (8, 8) on rank 1"
    assert all(message in of_rank["stages"] for of_rank in run[1])


# --- another number of ranks after a checkpoint --------------------------------------------------------------------


def _train_on_rank(rank: int, ranks: int, saved: dict[str, Any] | None) -> dict[str, Any]:
    """Four steps, or from a checkpoint four of rate zero, in which only restoration changes weights; a checkpoint."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(mlp=nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8))))
    if saved is not None:
        model.load_state_dict(saved["model"])
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 if saved is None else 0.0)
    restoration, monitor = Restoration(model, period=3), Monitor(model, {"stable_rank": 2})
    if saved is not None:
        restoration.load_state_dict(saved["restoration"])
        monitor.load_state_dict(saved["monitor"])
    readings = []
    for step in range(monitor.steps, monitor.steps + 4):
        monitor.begin()
        batch = torch.randn(6, 24, generator=torch.Generator().manual_seed(step))
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report = restoration.step()
        assert (report is not None) == ((step + 1) % 3 == 0)
        if reading := monitor.end(loss.detach()):
            readings.append((reading.step, reading.metrics["stable_rank/min"]))
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False))
    state = {"restoration": restoration.state_dict(), "monitor": monitor.state_dict()}
    return {"model": whole, "readings": readings, **state}


def test_a_run_saved_at_four_ranks_goes_on_at_two(tmp_path):
    folders = [tmp_path / name for name in ("four", "two", "one")]
    for folder in folders:
        folder.mkdir()
    first = on_ranks(4, _train_on_rank, folders[0], 4, None)[0]
    assert first["restoration"] == {"steps": [4]}
    assert [step for step, _ in first["readings"]] == [2, 4]
    resumed = {n: on_ranks(n, _train_on_rank, folder, n, first)[0] for n, folder in ((2, folders[1]), (1, folders[2]))}
    for state in resumed.values():
        assert state["restoration"] == {"steps": [8]}
        assert state["monitor"]["steps"] == 8
        assert [step for step, _ in state["readings"]] == [6, 8]
    assert resumed[2]["readings"] == resumed[1]["readings"]
    assert_same(resumed[2]["model"], resumed[1]["model"])
    assert not torch.equal(first["model"]["mlp.0.weight"], resumed[1]["model"]["mlp.0.weight"])


# --- peers that are killed or stopped ------------------------------------------------------------------------------


def _lose_a_peer(rank: int, signal_number: int) -> Any:
    """The last rank goes in the middle of the second round."""
    group = dist.new_group(timeout=timedelta(seconds=5))
    model, calls = DistributedDataParallel(Zoo(), process_group=group), []

    def restore(X: Tensor, **arguments: Any) -> Any:
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal_number)
        return usual(X, **arguments)

    usual = restoration.restore_
    with patched(restoration, "restore_", restore), patched(matrices, "CHUNK_ELEMENTS", 2000):
        try:
            Restoration(model, **SETTINGS).apply()
        except RuntimeError as error:
            os.environ["LEAVE"] = "at once"  # the group can't be left in order
            return str(error), whole(model)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_peer_is_an_error_within_the_timeout(signal_number, tmp_path, alone):
    (found, _) = on_ranks(2, _lose_a_peer, tmp_path, signal_number, seconds=90, lost=1)
    error, weights = found
    assert error
    before = whole(Zoo())
    for name, w in weights.items():  # whole matrices are old or new
        for piece, old, new in zip(*(tensor.split(24) for tensor in (w, before[name], alone[0][name])), strict=True):
            assert torch.equal(piece, old) or torch.equal(piece, new), name


# --- through Lightning; Composer has its own in test_algorithms.py ----------------------------------------------------


def _fit_on_rank(rank: int) -> dict[str, Any]:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

    from msign_lightning import MSignCallback, StabilityMonitor

    class Language(pl.LightningModule):
        """It wraps itself for FSDP1, since Lightning's own way needs a GPU."""

        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def configure_model(self) -> None:
            strategy = self.trainer.strategy
            wrap = None
            if isinstance(strategy, FSDPStrategy):
                wrap = partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
            elif isinstance(strategy, ModelParallelStrategy):
                wrap = partial(fully_shard, mesh=self.device_mesh["data_parallel"])
            if wrap is not None:
                layers = self.model.model.layers
                for i, layer in enumerate(layers):
                    layers[i] = wrap(layer)
                self.model = wrap(self.model)

        def training_step(self, batch: Tensor) -> Tensor:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class OnCPU(FSDPStrategy):
        """Lightning refuses FSDP1 by its class where there is no GPU."""

    class Rows(DummyLogger):
        """Keeps what is logged: (name, step) → value."""

        def __init__(self) -> None:
            super().__init__()
            self.values: dict[tuple[str, int], float] = {}

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.values |= {(name, step): value for name, value in metrics.items()}

    class KeepWeights(pl.Callback):
        """After the second step."""

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 2:
                self.weights = whole(pl_module)

    os.environ |= {"TORCHELASTIC_RUN_ID": "0", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    strategies: dict[str, Callable[[], Any]] = {
        "ddp": lambda: DDPStrategy(cluster_environment=TorchElasticEnvironment()),
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        "fsdp1": lambda: OnCPU(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo"),
    }
    tokens = torch.randint(96, (12, 16), generator=torch.Generator().manual_seed(rank))
    found = {}
    for name, strategy in strategies.items():
        for kind, callbacks in (
            ("with", [MSignCallback(period=2), StabilityMonitor({"stable_rank": 1, "spectral_alignment": 1})]),
            ("without", []),
        ):
            module = Language()
            quiet = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=2,
                strategy=strategy(),
                max_steps=2 if kind == "without" else 3,
                callbacks=[*callbacks, keep := KeepWeights()],
                logger=(rows := Rows()),
                use_distributed_sampler=False,
                **quiet,
            )
            trainer.fit(module, DataLoader(tokens, batch_size=4))
            seen = {k: v for k, v in rows.values.items() if k[0].startswith(("stab", "sign_diversity", "spectral"))}
            found[f"{name} {kind}"] = keep.weights, seen
    return found


@pytest.mark.filterwarnings("ignore")
def test_lightning_restores_what_one_process_would(tmp_path):
    results = on_ranks(2, _fit_on_rank, tmp_path)
    for strategy in ("ddp", "fsdp2", "fsdp1"):
        model = nn.Module()
        model.model = llama()
        model.load_state_dict(results[0][f"{strategy} without"][0], strict=False)
        Restoration(model).apply()
        for of_rank in results:
            assert_same(of_rank[f"{strategy} with"][0], whole(model))
    flat, copied = (results[0][f"{strategy} with"][1] for strategy in ("fsdp1", "ddp"))
    assert len(flat) > 20
    assert flat == pytest.approx(copied, rel=1e-4)  # FSDP2 adds up gradients on CPUs


# --- plans of large models -----------------------------------------------------------------------------------------


def llama_works(layers: int, d: int, kv: int, ff: int, experts: int = 1) -> list[Work]:
    """Of a model of these sizes, whose experts lie on 64 ranks."""
    works = []
    for layer in range(layers):
        shapes = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d)}
        shapes |= {f"{name}.{e}": (d, ff) for name in ("gate", "up", "down") for e in range(experts)}
        for name, (m, n) in shapes.items():
            short, long = sorted((m, n))
            homes = range(int(name.split(".")[1]) % 64, 64, 64) if experts > 1 and "." in name else ()
            works.append(Work(f"{layer}.{name}", short**2 * (2 * long + short), homes))
    return works


MODELS = {
    "dense, 1B": llama_works(24, 2048, 2048, 5461),
    "64 experts": llama_works(24, 1024, 1024, 2816, experts=64),
    "dense, 70B": llama_works(80, 8192, 1024, 28672),
}


@pytest.mark.parametrize("world", [64, 512])
@pytest.mark.parametrize("name", MODELS)
def test_plans_of_large_models_are_even(name, world):
    works = MODELS[name]
    owners = plan(works, world)
    loads = [0] * world
    for work in works:
        loads[owners[work.name]] += work.cost
        assert not work.homes or owners[work.name] in work.homes
    least = max(sum(loads) / world, max(work.cost for work in works))  # no plan does better
    if name == "64 experts" and world == 512:  # its experts stay on the 64 ranks that have them
        least = max(least, sum(work.cost for work in works if work.homes) / 64)
    assert max(loads) <= 1.1 * least
    assert plan(works[::-1], world) == owners
