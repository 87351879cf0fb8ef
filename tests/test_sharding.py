"""Owners compute: whatever way parameters lie on the ranks, the weights are those of one process, bit for bit."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_same, on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from msign_lightning import Cut, Restoration, matrices

CUTS = {
    "*qkv*": Cut(sizes=(24, 24, 24), names=("q", "k", "v")),
    "*gqa*": Cut(sizes=(16, 8, 8), names=("q", "k", "v")),
    "*columns*": Cut(sizes=(12, 12, 12), dim=1, names=("q", "k", "v")),
    "*interleaved*": Cut(sizes=(4, 4, 4), repeats=3, names=("q", "k", "v")),
    "*gate_up*": Cut(sizes=(9, 9), dim=1, names=("gate", "up")),
    "*": Cut(),
}
CUTS["*"] = CUTS.pop("*")


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


TARGETS = ["mlp.*", "narrow.*", "experts.*"]
SETTINGS: dict[str, Any] = {"targets": TARGETS, "cuts": {k: v for k, v in CUTS.items() if k != "*"}}


def whole(model: nn.Module) -> dict[str, Tensor]:
    found = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in found.items()}


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


def half_declared(ranks: int) -> nn.Module:
    """Copies that nobody declares are each rank's own; here they are the same all the same."""
    return nn.Module.train(Zoo())


CASES = {f.__name__: f for f in (ddp, fsdp2, offloaded, columns, rows, replicated, hsdp, tp, tp_fsdp2, half_declared)}
ONLY_FOUR = {"hsdp", "tp", "tp_fsdp2"}


def _all_cases(rank: int, ranks: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, make in CASES.items():
        if ranks == 2 and name in ONLY_FOUR:
            continue
        for chunk in (matrices.CHUNK_ELEMENTS, 2000):
            matrices.CHUNK_ELEMENTS, usual = chunk, matrices.CHUNK_ELEMENTS
            model = make(ranks)
            report = Restoration(model, **SETTINGS).apply()
            results[f"{name} {chunk}"] = whole(model), report.matrices
            matrices.CHUNK_ELEMENTS = usual
    return results


@pytest.mark.parametrize("ranks", [2, 4])
def test_weights_and_reports_are_those_of_one_process(ranks, tmp_path):
    alone = Zoo()
    expected = Restoration(alone, **SETTINGS).apply()
    results = on_ranks(ranks, _all_cases, tmp_path, ranks)
    for of_rank in results:
        for name, (weights, report) in of_rank.items():
            assert list(weights) == list(whole(alone)), name
            assert_same(weights, whole(alone))
            assert report == expected.matrices, name
