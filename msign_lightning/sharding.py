"""Who computes which matrix, how it gets there and back, and what all ranks agree on.

Each matrix has one owner, which computes it for all. Ranks that hold copies get the same bits; ranks that hold shards
send them to the owner and get theirs back. In each round every owner has at most one chunk in hand::

    shards --collect--> owner --compute--> all learn what came of it --give back--> shards and copies
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from msign_lightning import matrices
from msign_lightning.matrices import (
    Batch,
    Job,
    Layout,
    are_finite,
    batches,
    fsdp1_cut,
    fsdp1_groups,
    fsdp1_units,
    jobs_of,
    layout_of,
    open_parameter,
    whole_unit,
)
from msign_lightning.targets import Target

__all__ = ["Ranks", "Work", "plan", "refuse_differences"]

Compute = Callable[[Batch], Tensor]
"""Reads a batch, may write it, and returns a row of figures per matrix, of shape (B, width)."""


class Work(NamedTuple):
    """What a plan has to know of a job: `homes` are the ranks that may do it, all if empty."""

    name: str
    cost: int
    homes: Sequence[int] = ()


def plan(works: Sequence[Work], world: int) -> dict[str, int]:
    """The rank that does each job: longest processing time first, to the rank with the least to do so far.

    Jobs that some ranks have at home are dealt out before, among these. Ties go by name and by rank, so that all ranks
    find the same plan.
    """
    loads, owners = [0] * world, {}
    for work in sorted(works, key=lambda work: (not work.homes, -work.cost, work.name)):
        owner = min(work.homes or range(world), key=loads.__getitem__)
        owners[work.name] = owner
        loads[owner] += work.cost
    return owners


class Ranks:
    """The processes that train one model, as far as they hold parts or copies of the same parameters.

    DTensors say so themselves. Plain parameters are copies only where `DistributedDataParallel` or FSDP1 say so, or the
    caller by `process_group`; else they are this rank's own, as in pipeline stages and local experts.

    Args:
        model: The model as it is trained, wrapped.
        process_group: Of ranks that all hold copies of the plain parameters that no wrapper accounts for.

    Raises:
        ValueError: FSDP1 wraps the model without `use_orig_params=True`.
    """

    def __init__(self, model: nn.Module | None = None, process_group: ProcessGroup | None = None) -> None:
        self.process_group = process_group
        self._replicas: dict[Tensor, tuple[ProcessGroup, ...]] = {}
        self._units = {} if model is None else fsdp1_units(model)
        for module in () if model is None else model.modules():
            if isinstance(module, DistributedDataParallel):
                ignored = getattr(module, "parameters_to_ignore", ())
                own = [p for name, p in module.module.named_parameters() if name not in ignored]
                self._replicas |= dict.fromkeys(own, (module.process_group,))
        self._replicas |= {parameter: fsdp1_groups(unit) for parameter, unit in self._units.items()}

    def layout(self, parameter: Tensor) -> Layout:
        """How a parameter lies on the ranks."""
        groups = self._replicas.get(parameter, ())
        if not groups and self.process_group is not None and not isinstance(parameter, DTensor):
            groups = (self.process_group,)
        return layout_of(parameter, groups)

    @property
    def has_flat(self) -> bool:
        """Whether FSDP1 holds any parameter."""
        return bool(self._units)

    def cut(self, parameter: Tensor) -> tuple[ProcessGroup, torch.device] | None:
        """Over which ranks FSDP1 cuts the gradient of a parameter, and where they exchange; None if it doesn't."""
        unit = self._units.get(parameter)
        return None if unit is None else fsdp1_cut(unit)

    def describe(self, targets: Sequence[Target]) -> str:
        """How the work is shared, for a log; "" if it isn't."""
        layouts = [self.layout(parameter) for parameter in {target.parameter: None for target in targets}]
        worlds = sorted({layout.world for layout in layouts if layout.groups})
        gathered = sum(layout.is_gathered for layout in layouts)
        return (f"shared out over {' and '.join(map(str, worlds))} ranks" if worlds else "") + (
            f", {gathered} parameters gathered whole first, since they are cut in two ways" if gathered else ""
        )

    def share(self, targets: Sequence[Target]) -> bool:
        """Whether no target is this rank's own, so that figures of all are the same on each rank."""
        return all(self.layout(target.parameter).groups for target in targets)

    @torch.no_grad()
    def each(
        self,
        targets: Sequence[Target],
        compute: Compute,
        *,
        width: Callable[[Target], int],
        names: Collection[str] | None = None,
        writes: bool = True,
        what: str = "",
    ) -> dict[str, Tensor | None]:
        """Lets the owner of each matrix compute it; a collective of all ranks that share any of them.

        Args:
            targets: The matrices.
            compute: What is done with a batch of them, in place.
            width: How many figures `compute` returns for a matrix of this target.
            names: Names of the matrices that are wanted; None for all.
            writes: Whether `compute` changes matrices.
            what: Tells what `compute` does, which must be the same on all ranks.

        Returns:
            The figures of each matrix, the same on every rank, those of one shape together; None for a matrix that is
            not finite on some rank, which no rank then changes.

        Raises:
            ValueError: The ranks want different things of different matrices, or hold them in different ways.
            RuntimeError: `compute` has failed on some rank, which each rank then raises. What that rank had in hand
                stays as it was.
        """
        found: dict[str, Tensor | None] = {}
        names = None if names is None else set(names)
        wanted = [t for t in targets if names is None or not names.isdisjoint(t.matrix_names)]
        by_unit: dict[nn.Module | None, list[Target]] = {unit: [] for unit in (None, *self._units.values())}
        for target in wanted:
            by_unit[self._units.get(target.parameter)].append(target)
        for layout in {where.key: where for where in map(self.layout, self._units) if where.key}.values():
            _check_agreement([what, *(f"{t.name} {t.shape}" for t in wanted if t.parameter in self._units)], layout)
        for unit, own in by_unit.items():
            if own:
                with whole_unit(unit, writes):
                    found |= _share_out(jobs_of(own, self.layout, names), compute, width, writes, what)
        alike: dict[object, list[str]] = {}
        for t in targets:
            alike.setdefault((t.shape, t.parameter.dtype, t.parameter.device), []).extend(t.matrix_names)
        return {name: found[name] for name in chain.from_iterable(alike.values()) if name in found}


def _share_out(
    jobs: Sequence[Job], compute: Compute, width: Callable[[Target], int], writes: bool, what: str
) -> dict[str, Tensor | None]:
    """The figures of all jobs, grid by grid and round by round."""
    found: dict[str, Tensor | None] = {}
    by_grid: dict[tuple[str, ...], list[Job]] = {}
    for job in sorted(jobs, key=lambda job: job.name):
        by_grid.setdefault(job.layout.key, []).append(job)
    for key, on_grid in by_grid.items():
        owners = _owners(on_grid)
        if key:
            _check_agreement([what, *map(_describe, on_grid), f"owners {owners}"], on_grid[0].layout)
        for own in _rounds(on_grid, owners):
            found |= _Exchange(own, owners, width, writes)(compute) if key else _alone(own, compute)
    return found


def _alone(jobs: Sequence[Job], compute: Compute) -> dict[str, Tensor | None]:
    """Of jobs that this rank has for itself."""
    found: dict[str, Tensor | None] = {}
    wholes = [job.part(open_parameter(job.parameter, job.layout)[0]) for job in jobs]
    for batch in batches(jobs, wholes):
        found |= zip(batch.names, compute(batch), strict=True)
    return found


class _Exchange:
    """One round: the jobs that all owners have in hand, of one layout and dtype."""

    def __init__(
        self, jobs: Sequence[Job], owners: Mapping[str, int], width: Callable[[Target], int], writes: bool
    ) -> None:
        self.jobs, self.writes = jobs, writes
        self.layout = layout = jobs[0].layout
        self.copies = [i for i in range(len(layout.sizes)) if i != layout.sharded]  # dimensions of the grid
        self.here = tuple(layout.place[i] for i in self.copies)
        # By the owner's place among the copies and among the shards.
        self.owned: dict[tuple[int, ...], list[list[Job]]] = {}
        for job in jobs:
            place = layout.place_of(owners[job.name])
            peers = self.owned.setdefault(tuple(place[i] for i in self.copies), [[] for _ in range(layout.shards)])
            peers[0 if layout.sharded is None else place[layout.sharded]].append(job)
        self.peers = self.owned.get(self.here, [[] for _ in range(layout.shards)])
        self.mine = self.peers[layout.shard]
        self.crosses = layout.sharded is not None and any(job.home is None for job in jobs)
        self.spans: dict[str, slice] = {}  # of each matrix in the table
        start = 0
        for job in jobs:
            for target, name in zip(job.targets, job.names, strict=True):
                self.spans[name] = slice(start, start := start + 2 + width(target))
        self.starts, self.size = [span.start for span in self.spans.values()], start + 1

    def __call__(self, compute: Compute) -> dict[str, Tensor | None]:
        opened = {p: open_parameter(p, self.layout) for p in dict.fromkeys(job.parameter for job in self.jobs)}
        parts = {job: job.part(opened[job.parameter][0]) for job in self.jobs}
        wholes = self.collect(parts)
        table, failure = self.compute(wholes, parts, compute)
        flags = table[self.starts].tolist(), table[[start + 1 for start in self.starts]].tolist()
        bad, written = (dict(zip(self.spans, column, strict=True)) for column in flags)
        table = table.to(torch.promote_types(self.jobs[0].parameter.dtype, torch.float32))
        found = {name: None if bad[name] else table[span][2:] for name, span in self.spans.items()}
        chosen = {job: [bool(written[name]) and not bad[name] for name in job.names] for job in self.jobs}
        if self.writes:
            self.give_back(parts, wholes, chosen)
            for _, put_back in opened.values():
                put_back()
        if table[-1].item():
            failures = "; ".join(filter(None, _gather_objects(failure, self.layout)))
            raise RuntimeError(f"not all matrices could be computed: {failures}")
        return found

    def collect(self, parts: Mapping[Job, Tensor]) -> dict[Job, Tensor]:
        """Sends parts to their owners; the wholes of this rank's own jobs, as copies."""
        layout = self.layout
        if not self.crosses:
            return {job: parts[job].to(layout.device, copy=True) for job in self.mine}
        sent = [[parts[job] for job in jobs] for jobs in self.peers]
        shapes = [[job.shape_in(shard) for job in self.mine] for shard in range(layout.shards)]
        received = zip(*self._all_to_all(sent, shapes), strict=True)
        return {job: torch.cat(own, dim=job.extent(0)[0]) for job, own in zip(self.mine, received, strict=True)}

    def compute(
        self, wholes: Mapping[Job, Tensor], parts: Mapping[Job, Tensor], compute: Compute
    ) -> tuple[Tensor, str]:
        """Computes this rank's own jobs; a table of all, the same on each rank, and what went wrong on this one.

        The table is flat: for each matrix the number of ranks on which it is not finite, whether it was changed, and
        its figures; at the end, the number of ranks that failed.
        """
        rows: dict[str, Tensor] = {}
        failure = ""
        try:
            for batch in batches(self.mine, [wholes[job] for job in self.mine]) if self.mine else ():
                figures = compute(batch).double()
                written = torch.zeros_like(figures[:, 0]) if batch.written is None else batch.written.double()
                rows |= zip(batch.names, torch.cat([written.unsqueeze(1), figures], dim=1), strict=True)
        except Exception as error:  # raised again by all ranks together
            failure = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        table = torch.zeros(self.size, dtype=torch.float64, device=self.layout.device)
        finite = chain(*are_finite(self.jobs, [parts[job] for job in self.jobs]))
        table[self.starts] = torch.tensor([not each for each in finite], dtype=table.dtype).to(table.device)
        for name, row in rows.items():
            table[self.spans[name]][1:] = row
        table[-1] = bool(failure)
        for group in self.layout.groups:
            dist.all_reduce(table, group=group)
        return table, failure

    def give_back(
        self, parts: Mapping[Job, Tensor], wholes: Mapping[Job, Tensor], chosen: Mapping[Job, Sequence[bool]]
    ) -> None:
        """Sends the new parts of the chosen matrices to the ranks that hold them, and writes them there."""
        layout = self.layout
        new = dict(wholes)
        if self.crosses:
            sent = [[wholes[job].narrow(*job.extent(shard)) for job in self.mine] for shard in range(layout.shards)]
            received = self._all_to_all(sent, [[parts[job].shape for job in jobs] for jobs in self.peers])
            new = dict(zip(chain(*self.peers), chain(*received), strict=True))
        for source, peers in sorted(self.owned.items()):  # where among the copies the new ones are
            jobs = [job for job in chain(*peers) if parts[job].numel()]
            if not jobs:
                continue
            sizes = [parts[job].numel() for job in jobs]
            if source == self.here:
                flat = torch.cat([new[job].reshape(-1) for job in jobs])
            else:
                flat = torch.empty(sum(sizes), dtype=parts[jobs[0]].dtype, device=layout.device)
            for n in reversed(range(len(source))):  # along one dimension of the grid after the other
                if self.here[:n] == source[:n]:
                    group = layout.groups[self.copies[n]]
                    dist.broadcast(flat.view(torch.uint8), dist.get_global_rank(group, source[n]), group=group)
            for job, value in zip(jobs, torch.split(flat, sizes), strict=True):
                job.write_(parts[job], value.view(parts[job].shape), chosen[job])

    def _all_to_all(
        self, sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[list[Tensor]]:
        """Tensors for each rank along the sharded dimension, for those from it, of these shapes, as one message."""
        layout, dtype = self.layout, self.jobs[0].parameter.dtype
        sizes = [[math.prod(shape) for shape in own] for own in shapes]
        flat = torch.cat([tensor.reshape(-1) for tensor in chain(*sent)] or [torch.empty(0, dtype=dtype)])
        result = torch.empty(sum(map(sum, sizes)), dtype=dtype, device=layout.device)
        dist.all_to_all_single(
            result.view(torch.uint8),  # bytes, since not every backend knows every dtype
            flat.to(layout.device).view(torch.uint8),
            [sum(own) * dtype.itemsize for own in sizes],
            [sum(tensor.numel() for tensor in own) * dtype.itemsize for own in sent],
            group=layout.groups[layout.sharded],  # type: ignore[index]
        )
        flats = iter(torch.split(result, list(chain(*sizes))))
        return [[next(flats).view(shape) for shape in own] for own in shapes]


def _owners(jobs: Sequence[Job]) -> dict[str, int]:
    """The plan for the jobs on one grid. Who has an expert's only shard, or a copy of it, owns it."""
    layout = jobs[0].layout
    homes: dict[tuple[int | None, int | None], list[int]] = {}
    for key in {(job.layout.sharded, job.home) for job in jobs if job.home is not None}:
        homes[key] = [rank for rank in range(layout.world) if layout.place_of(rank)[key[0] or 0] == key[1]]
    works = [Work(job.name, job.cost, homes.get((job.layout.sharded, job.home), ())) for job in jobs]
    return plan(works, layout.world)


def _rounds(jobs: Sequence[Job], owners: Mapping[str, int]) -> Iterator[list[Job]]:
    """The jobs in rounds of one layout and dtype, with at most one chunk per owner, or in all where all is gathered."""
    lanes: dict[object, list[Job]] = {}
    for job in jobs:
        where = job.layout
        lanes.setdefault((where.sharded, where.is_gathered, where.device, job.parameter.dtype), []).append(job)
    for lane in lanes.values():
        queues: dict[int, list[Job]] = {}
        for job in sorted(lane, key=lambda job: job.targets[0].shape):  # those of one shape make large batches
            queues.setdefault(owners[job.name], []).append(job)
        lines = [list(_chunks(queues[owner])) for owner in sorted(queues)]
        if lane[0].layout.is_gathered:
            turns = chain.from_iterable(zip_longest(*(queues[owner] for owner in sorted(queues))))
            lines = [list(_chunks([job for job in turns if job is not None]))]
        for chunks in zip_longest(*lines, fillvalue=()):
            yield list(chain.from_iterable(chunks))


def _chunks(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    chunk: list[Job] = []
    elements = 0
    for job in jobs:
        m, n = job.shape
        if chunk and elements + m * n > matrices.CHUNK_ELEMENTS:
            yield chunk
            chunk, elements = [], 0
        chunk.append(job)
        elements += m * n
    yield chunk


def _describe(job: Job) -> str:
    where = job.layout
    stored = f"{job.shape} {job.parameter.dtype} on ranks {where.sizes}"
    cut = "" if where.sharded is None else f", dimension {where.dim} cut along {where.sharded}"
    return f"{job.name} ({', '.join(job.names)}): {stored}{cut}{', gathered' if where.is_gathered else ''}"


def _check_agreement(lines: Sequence[str], layout: Layout) -> None:
    """Raises on all ranks of a grid if what they are about to do differs, as these lines tell it."""
    digest = int.from_bytes(hashlib.sha256("\n".join(lines).encode()).digest()[:7], "big")
    ends = torch.tensor([digest, -digest], device=layout.device)
    for group in layout.groups:
        dist.all_reduce(ends, dist.ReduceOp.MIN, group=group)
    lowest, highest = ends.tolist()
    if lowest == -highest:
        return
    refuse_differences(_gather_objects((dist.get_rank(), lines), layout))


def refuse_differences(everyone: Sequence[tuple[int, Sequence[str]]]) -> None:
    """Raises ValueError with the first line that differs between ranks, given the lines of each."""
    (first, own), *others = everyone
    for rank, theirs in others:
        for a, b in zip_longest(own, theirs, fillvalue="nothing more"):
            if a != b:
                got = f"{a} on rank {first} and {b} on rank {rank}"
                raise ValueError(f"all ranks must have the same matrices and settings, got {got}")


def _gather_objects(mine: Any, layout: Layout) -> list[Any]:
    """What each rank of the grid has."""
    gathered = [mine]
    for group in layout.groups:
        out: list[Any] = [None] * group.size()
        dist.all_gather_object(out, gathered, group=group)
        gathered = list(chain.from_iterable(out))
    return gathered
