"""What each process of several does and sends in one application of MSign.

`python -m benchmarks.sharing` wraps 24 matrices by DDP and by FSDP2 in 1, 2 and 4 gloo processes, applies MSign by
`Restoration`, and counts in each process the matrices decomposed, the FLOPs of products, the collectives and the bytes
that these deliver. CPU seconds are those of a process, so that more processes than cores don't distort them as they do
the wall's. The figures are those of the process that has most. It also plans large models for 64 and 512 ranks, without
any.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.application import MODELS, Shapes
from benchmarks.common import FOLDER, keep, table, the_device
from msign_lightning import Restoration
from msign_lightning.linalg import Method
from msign_lightning.recipes.provenance import provenance
from msign_lightning.sharding import Work, plan

METHODS: tuple[Method, Method] = ("svd", "polynomial")
WRAPPERS = ("DDP", "FSDP2")
LARGEST: Shapes = {(8192, 8192): 160, (1024, 8192): 160, (28672, 8192): 160, (8192, 28672): 80}


class Counter(TorchDispatchMode):
    """Decompositions, FLOPs of products, collectives, and the bytes that collectives deliver here."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = {"decomposed": 0, "flop": 0, "collectives": 0, "bytes": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again as what it does locally
        result = func(*args, **(kwargs or {}))
        namespace, name = func.namespace, func._opname
        if name == "_linalg_svd":
            self.counts["decomposed"] += math.prod(args[0].shape[:-2])
        elif name in ("mm", "bmm", "baddbmm"):
            self.counts["flop"] += 2 * result.numel() * args[-1].size(-2)
        elif namespace == "c10d" or (namespace == "_c10d_functional" and name != "wait_tensor"):
            # The first argument of c10d's own operators is what they write to.
            written = tree_leaves(args[0] if namespace == "c10d" else result)
            self.counts["collectives"] += 1
            self.counts["bytes"] += sum(x.nbytes for x in written if isinstance(x, Tensor))
        return result


def wrapped(wrapper: str, count: int, width: int) -> nn.Module:
    """The model, the same in all processes, as it would be trained."""
    torch.manual_seed(0)
    linears = [nn.Linear(width, width, bias=False) for _ in range(count)]
    model = nn.Sequential(OrderedDict(mlp=nn.Sequential(*linears)))
    if wrapper == "DDP":
        return DistributedDataParallel(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def work(rank: int, world: int, count: int, width: int, rounds: int, folder: str) -> None:
    """One process: writes its figures to a file of the folder."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=5))
    figures = []
    for wrapper in WRAPPERS:
        for method in METHODS:
            restoration = Restoration(wrapped(wrapper, count, width), method=method)
            with Counter() as counter:
                restoration.apply()
            timings = []
            for _ in range(rounds):
                dist.barrier()
                began = time.process_time(), time.perf_counter()
                restoration.apply()
                timings.append((time.process_time() - began[0], time.perf_counter() - began[1]))
            cpu, wall = (statistics.median(column) for column in zip(*timings, strict=True))
            case = {"wrapper": wrapper, "method": method, "processes": world}
            figures.append(case | counter.counts | {"cpu_seconds": cpu, "wall_seconds": wall})
    Path(folder, f"{rank}.json").write_text(json.dumps(figures))
    dist.barrier()
    os._exit(0)  # taking gloo's process group down may hang


def measure(world: int, count: int, width: int, rounds: int) -> list[dict[str, Any]]:
    """The figures of each case, each of the process that has most of it."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (world, count, width, rounds, folder), nprocs=world)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    return [{key: max(case[key] for case in cases) for key in cases[0]} for cases in zip(*ranks, strict=True)]


def planned(name: str, model: Shapes, experts: int, world: int) -> list[object]:
    """A row on the plan for a model under FSDP2 on so many ranks: how even it is, what it moves, how long it takes.

    Rows of a parameter are cut into `world` shards. Experts are stacks, cut along their first dimension, and stay where
    they are. Matrices are of fp32.
    """
    works, sizes = [], {}
    for (m, n), count in model.items():
        is_expert = experts > 1 and m != n
        for i in range(count):
            short, long = min(m, n), max(m, n)
            homes = [i % experts] if is_expert else ()
            works.append(Work(f"{m}x{n}.{i}", short**2 * (2 * long + short), homes))
            sizes[works[-1].name] = 0 if is_expert else 4 * m * n
    began = time.process_time()
    owners = plan(works, world)
    seconds = time.process_time() - began
    loads, owned = [0] * world, [0] * world
    for work in works:
        loads[owners[work.name]] += work.cost
        owned[owners[work.name]] += sizes[work.name]
    mean, busiest = sum(loads) / world, max(loads)
    # A rank sends its shards of what others own, and the others' shards of what it owns.
    sent = (1 - 1 / world) * (sum(sizes.values()) / world + max(owned))
    least = max(mean, *(work.cost for work in works))
    ratios = f"{busiest / mean:.2f}", f"{busiest / least:.2f}"
    return [name, world, len(works), *ratios, f"{sent / 1e6:.0f}", f"{1e3 * seconds:.0f}"]


def main(worlds: list[int], count: int, width: int, rounds: int, folder: Path) -> None:
    """Prints the table and keeps it, and its figures, with date, device and versions."""
    named = (("count", count), ("width", width), ("rounds", rounds), *(("processes", world) for world in worlds))
    for name, value in named:
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")
    cases = [case for world in worlds for case in measure(world, count, width, rounds)]
    cases.sort(key=lambda case: (WRAPPERS.index(case["wrapper"]), METHODS.index(case["method"]), case["processes"]))
    hardware = the_device()[2] if not torch.cuda.is_available() else "CPU beside " + the_device()[2]
    rows = [
        [
            case["wrapper"],
            case["method"],
            case["processes"],
            case["decomposed"],
            f"{case['flop'] / 1e9:.1f}",
            case["collectives"],
            f"{case['bytes'] / 1e6:.1f}",
            f"{case['cpu_seconds']:.2f}",
            f"{case['wall_seconds']:.2f}",
        ]
        for case in cases
    ]
    models = {**MODELS["full"], "70B": LARGEST}
    plans = [
        planned(name, model, 16 if "MoE" in name else 1, world) for name, model in models.items() for world in (64, 512)
    ]
    command = (
        f"`python -m benchmarks.sharing --processes {' '.join(map(str, worlds))} --count {count} --width {width} "
        f"--rounds {rounds}`"
    )
    source = f"{command}: {provenance()}."
    head = ("wrapper", "method", "processes", "decomposed", "GFLOP of products", "collectives", "MB", "CPU s", "wall s")
    report = "\n".join(
        [
            f"# What each process does of an application, on {hardware}",
            "",
            source,
            f"{count} matrices of {width} × {width}, gloo, one thread a process; of each figure the largest of all",
            "processes, of seconds the median over rounds first.",
            "",
            table(head, rows),
            "",
            "Plans for the attention and MLP matrices of the paper's models, and of one of 70 billion parameters with",
            "grouped queries, under FSDP2: the work of the busiest rank over the mean, and over the least that any",
            "plan can give it, which one matrix may be; and what a rank sends at most. Experts stay on the ranks that",
            "hold them, so more ranks than experts have nothing to do for these.",
            "",
            table(("model", "ranks", "matrices", "busiest / mean", "busiest / least", "MB sent", "ms to plan"), plans),
            "",
        ]
    )
    keep(report, folder, "sharing", hardware, {"source": source, "cases": cases})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", dest="worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--count", type=int, default=24, help="matrices")
    parser.add_argument("--width", type=int, default=512, help="their rows and columns")
    parser.add_argument("--rounds", type=int, default=2, help="timed applications")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the report goes")
    main(**vars(parser.parse_args()))
