"""From parameters to whole, local matrices and back: the one place that knows how a parameter is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from msign_lightning.targets import Cut, Target

__all__ = [
    "CHUNK_ELEMENTS",
    "Batch",
    "Job",
    "Layout",
    "are_finite",
    "batches",
    "gather",
    "jobs_of",
    "layout_of",
    "open_parameter",
]

CHUNK_ELEMENTS = 8 * 2048**2
"""Most matrix elements in hand at once (or one matrix, if larger): eight 2048 × 2048 matrices fill a large GPU.

It bounds the temporaries: an application needs at most three times as many in fp32, 400 MB, beyond the model, and where
matrices come from other ranks, twice as many in the dtype that they are stored in.
"""


@dataclass(frozen=True)
class Layout:
    """How a parameter lies on the ranks: a grid of them, with a process group along each of its dimensions.

    Along one dimension of the grid each rank may hold a shard, as `torch.chunk` cuts; along the others, copies.

    Attributes:
        device: Where matrices are computed and exchanged: that of the parameter, or of its mesh if it is offloaded.
        groups: One process group per dimension; none where this rank has the parameter for itself.
        sizes: Number of ranks along each dimension.
        place: Where on the grid this rank is.
        sharded: The dimension of the grid that holds shards; None if the parameter is whole on every rank.
        dim: The dimension of the parameter that is cut into shards.
        is_gathered: Whether the parameter is cut in more than one way, so that it has to be gathered to be whole.
    """

    device: torch.device
    groups: tuple[ProcessGroup, ...] = ()
    sizes: tuple[int, ...] = ()
    place: tuple[int, ...] = ()
    sharded: int | None = None
    dim: int = 0
    is_gathered: bool = False

    @cached_property
    def key(self) -> tuple[str, ...]:
        """Names the grid; parameters on one grid are shared out together."""
        return tuple(group.group_name for group in self.groups)

    @property
    def world(self) -> int:
        """The number of ranks on the grid."""
        return math.prod(self.sizes)

    @property
    def rank(self) -> int:
        """This rank's number on the grid, where the last dimension runs fastest."""
        return sum(at * math.prod(self.sizes[i + 1 :]) for i, at in enumerate(self.place))

    def place_of(self, rank: int) -> tuple[int, ...]:
        """Where on the grid the rank of that number is."""
        return tuple(rank // math.prod(self.sizes[i + 1 :]) % size for i, size in enumerate(self.sizes))

    @property
    def shards(self) -> int:
        """Into how many shards the parameter is cut."""
        return 1 if self.sharded is None else self.sizes[self.sharded]

    @property
    def shard(self) -> int:
        """Which of them this rank holds."""
        return 0 if self.sharded is None else self.place[self.sharded]


def layout_of(parameter: Tensor, replicas: Sequence[ProcessGroup] = ()) -> Layout:
    """The layout of a parameter of which the ranks of each group in `replicas` are known to hold copies."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    device = local.device
    spread: list[tuple[ProcessGroup, Placement]] = [(group, Replicate()) for group in replicas]
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        if mesh.device_type != device.type:
            device = torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())
        spread += zip(map(mesh.get_group, range(mesh.ndim)), parameter.placements, strict=True)
    spread = [(group, placement) for group, placement in spread if group.size() > 1]
    cuts = [(i, placement) for i, (_, placement) in enumerate(spread) if not isinstance(placement, Replicate)]
    sharded, dim = None, 0
    if len(cuts) == 1 and type(cuts[0][1]) is Shard:
        sharded, dim = cuts[0][0], cuts[0][1].dim % parameter.ndim
    return Layout(
        device=device,
        groups=tuple(group for group, _ in spread),
        sizes=tuple(group.size() for group, _ in spread),
        place=tuple(group.rank() for group, _ in spread),
        sharded=sharded,
        dim=dim,
        is_gathered=bool(cuts) and sharded is None,
    )


def open_parameter(parameter: Tensor, layout: Layout) -> tuple[Tensor, Callable[[], None]]:
    """What this rank has of a parameter, whole if it has to be gathered, and how to put it back once it is changed."""
    held = parameter.detach()
    if not isinstance(held, DTensor):
        return held, lambda: None
    if not layout.is_gathered:
        return held.to_local(), lambda: None
    whole: Tensor = held.full_tensor()

    def put_back() -> None:
        held.copy_(distribute_tensor(whole, held.device_mesh, held.placements, src_data_rank=None))

    return whole, put_back


def fsdp1_units(model: nn.Module) -> dict[Tensor, FullyShardedDataParallel]:
    """The unit of FSDP1 that flattens each parameter, outer units first; those that none flattens are left out.

    Raises:
        ValueError: It shows flat parameters only, without `use_orig_params=True`.
    """
    if any(isinstance(parameter, FlatParameter) for parameter in model.parameters()):
        raise ValueError("use_orig_params of FSDP1 must be True, for else no parameter is a matrix, got False")
    units: dict[Tensor, FullyShardedDataParallel] = {}
    for unit in FullyShardedDataParallel.fsdp_modules(model):
        units |= {parameter: unit for parameter in unit.parameters() if parameter not in unit._ignored_params}
    return units


def fsdp1_groups(unit: FullyShardedDataParallel) -> tuple[ProcessGroup, ...]:
    """The groups of the ranks that all have the parameters of the unit while it is whole."""
    hybrid = unit.sharding_strategy in (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
    return (unit._inter_node_pg, unit.process_group) if hybrid else (unit.process_group,)  # type: ignore[return-value]


def fsdp1_cut(unit: FullyShardedDataParallel) -> tuple[ProcessGroup, torch.device] | None:
    """Over which ranks the unit's gradients are cut, and where these exchange them; None if they are not cut."""
    is_cut = unit.sharding_strategy != ShardingStrategy.NO_SHARD
    return (unit.process_group, unit.compute_device) if is_cut else None  # type: ignore[return-value]


def whole_unit(unit: nn.Module | None, writes: bool) -> AbstractContextManager[None]:
    """In it, the parameters of a unit of FSDP1 are whole, the same on all its ranks; a collective."""
    if unit is None:
        return nullcontext()
    summon = FullyShardedDataParallel.summon_full_params
    whole: AbstractContextManager[None] = summon(unit, recurse=False, writeback=writes)
    return whole


@contextmanager
def whole_shapes(model: nn.Module) -> Iterator[None]:
    """In it, parameters that FSDP1 flattens have their shapes, without values or memory; a collective."""
    shapes: dict[Tensor, torch.Size] = {}
    units = fsdp1_units(model)
    for unit in FullyShardedDataParallel.fsdp_modules(model):  # the outermost first, which makes the others its own
        with whole_unit(unit, writes=False):
            shapes |= {p: p.shape for p, own in units.items() if own is unit}
    held = {parameter: parameter.data for parameter in shapes}
    try:
        for parameter, shape in shapes.items():
            parameter.data = parameter.data.new_empty(1).expand(shape)
        yield
    finally:
        for parameter, data in held.items():
            parameter.data = data


@dataclass(frozen=True, eq=False)
class Job:
    """What is computed in one go: a parameter, or one expert of a stack, with those of its matrices that are wanted.

    Attributes:
        name: The parameter's, numbered in a stack.
        targets: The wanted matrices, which share the parameter.
        names: Names of these matrices.
        member: Which expert of the stack, counted over all leading dimensions.
        layout: How the parameter lies on the ranks.
    """

    name: str
    targets: tuple[Target, ...]
    names: tuple[str, ...]
    member: int
    layout: Layout

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the matrices."""
        return self.targets[0].parameter

    @property
    def cut(self) -> Cut:
        """How the parameter is cut into matrices."""
        return self.targets[0].cut

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the parameter, or of one expert of it."""
        m, n = self.targets[0].full_shape[-2:]
        return m, n

    @property
    def cost(self) -> int:
        """Multiplications of one polynomial step up to a factor: Σ s²(2l + s), s and l the short and long sides."""
        return sum(min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in (t.shape for t in self.targets))

    @cached_property
    def _index(self) -> tuple[int, ...]:
        leading = self.targets[0].full_shape[:-2]
        return tuple(self.member // math.prod(leading[i + 1 :]) % size for i, size in enumerate(leading))

    def _bounds(self, shard: int) -> tuple[int, int]:
        length = self.targets[0].full_shape[self.layout.dim]
        step = -(-length // self.layout.shards)
        return min(shard * step, length), min((shard + 1) * step, length)

    @cached_property
    def home(self) -> int | None:
        """The shard in which all of it lies; None if it is cut, or nothing is."""
        dim = self.layout.dim
        if self.layout.sharded is None or dim >= len(self._index):
            return None
        return next(s for s in range(self.layout.shards) if self._bounds(s)[0] <= self._index[dim] < self._bounds(s)[1])

    def extent(self, shard: int) -> tuple[int, int, int]:
        """Which part of it a shard holds: the axis along which it is cut, 0 or 1, the start and the length there."""
        if self.home is not None or self.layout.sharded is None:
            return 0, 0, self.shape[0] if shard == (self.home or 0) else 0
        start, stop = self._bounds(shard)
        return self.layout.dim - len(self._index), start, stop - start

    def shape_in(self, shard: int) -> tuple[int, int]:
        """Rows and columns of what a shard holds."""
        axis, _, length = self.extent(shard)
        return (length, self.shape[1]) if axis == 0 else (self.shape[0], length)

    def part(self, held: Tensor) -> Tensor:
        """What this rank has of it, a view (m', n') of what the rank has of the parameter."""
        index = list(self._index)
        if self.home is not None:
            if self.home != self.layout.shard:
                return held.new_empty(0, self.shape[1])
            index[self.layout.dim] -= self._bounds(self.home)[0]
        return held[tuple(index)]

    def write_(self, part: Tensor, new: Tensor, chosen: Sequence[bool]) -> None:
        """Writes those of its matrices that are chosen into what this rank has of it; the rest stays bit for bit."""
        if not (any(chosen) and part.numel()):
            return
        if all(chosen) and len(chosen) == len(self.cut.sizes or (0,)):
            part.copy_(new)
            return
        lines, mine = self.lines(part)
        lines.fill_(False)
        for target, is_chosen in zip(self.targets, chosen, strict=True):
            self.cut.pieces(lines)[target.index].fill_(is_chosen)
        part.copy_(torch.where(mine, new.to(part.device), part))

    def lines(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """One true value per row, or column, along which the matrices are cut; all, and a view of this rank's."""
        dim = self.cut.dim
        axis, start, length = self.extent(self.layout.shard)
        lines = torch.ones(self.shape[dim], dtype=torch.bool, device=part.device)
        mine = lines[start : start + length] if axis == dim else lines
        return lines.unsqueeze(1 - dim), mine.unsqueeze(1 - dim)


def are_finite(jobs: Sequence[Job], parts: Sequence[Tensor]) -> list[list[bool]]:
    """Whether what this rank has of each matrix of each job is finite."""
    full = [part for part in parts if part.numel()]
    norms = torch.stack([torch.linalg.vector_norm(part, math.inf) for part in full]) if full else torch.empty(0)
    known = iter(norms.isfinite().tolist())
    flags = []
    for job, part in zip(jobs, parts, strict=True):
        if not part.numel() or next(known):
            flags.append([True] * len(job.targets))
        else:
            lines, mine = job.lines(part)
            mine.copy_(part.isfinite().all(1 - job.cut.dim, keepdim=True))
            flags.append([not (~job.cut.pieces(lines)[target.index]).any() for target in job.targets])
    return flags


def jobs_of(
    targets: Iterable[Target], layout: Callable[[nn.Parameter], Layout], wanted: Collection[str] | None = None
) -> list[Job]:
    """The targets by parameter and expert; of matrices, those that are wanted."""
    together: dict[nn.Parameter, list[Target]] = {}
    for target in targets:
        together.setdefault(target.parameter, []).append(target)
    jobs = []
    for parameter, own in together.items():
        where, name = layout(parameter), own[0].parameter_name
        for member, names in enumerate(zip(*(target.matrix_names for target in own), strict=True)):
            kept = {n: t for n, t in zip(names, own, strict=True) if wanted is None or n in wanted}
            if kept:
                full_name = name if own[0].count == 1 else f"{name}.{member}"
                jobs.append(Job(full_name, tuple(kept.values()), tuple(kept), member, where))
    return jobs


class Batch:
    """B matrices of one shape and dtype, read and written as one tensor (B, m, n).

    Args:
        targets: The target that each is of.
        names: Name of each; a member of a stack of experts has its index at the end.
        wholes: The whole (m', n') that each is a piece of, which `write_` changes.
        device: Where to compute.
    """

    def __init__(
        self, targets: Sequence[Target], names: Sequence[str], wholes: Sequence[Tensor], device: torch.device
    ) -> None:
        self.targets, self.names, self.wholes, self.device = targets, names, wholes, device
        self.written: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the matrices are stored in."""
        return self.wholes[0].dtype

    def read(self) -> Tensor:
        """A copy of the matrices (B, m, n) in float32 or better."""
        matrices = torch.cat([t.matrix(whole) for t, whole in zip(self.targets, self.wholes, strict=True)])
        return matrices.to(self.device).to(torch.promote_types(matrices.dtype, torch.float32))

    def write_(self, matrices: Tensor, chosen: Tensor) -> Tensor:
        """Puts matrices back that have been read, in the dtype they are stored in.

        Args:
            matrices: The new ones, of shape (B, m, n).
            chosen: Which of them to write, of shape (B,); the others stay as they are, bit for bit.

        Returns:
            Which were written, of shape (B,): those chosen, but for any that overflow their dtype.
        """
        cast = matrices.to(self.dtype).to(self.wholes[0].device)
        written: Tensor = chosen & torch.linalg.vector_norm(cast, math.inf, dim=(1, 2)).isfinite().to(chosen.device)
        for target, whole, new, fits in zip(self.targets, self.wholes, cast, written.to(cast.device), strict=True):
            target.write_(whole, torch.where(fits, new, target.matrix(whole)))
        self.written = written
        return written


def batches(jobs: Sequence[Job], wholes: Sequence[Tensor]) -> Iterator[Batch]:
    """The matrices of the jobs, given the whole of each, those of one shape together."""
    alike: dict[tuple[int, int], list[tuple[Target, str, Tensor]]] = {}
    for job, whole in zip(jobs, wholes, strict=True):
        for target, name in zip(job.targets, job.names, strict=True):
            alike.setdefault(target.shape, []).append((target, name, whole))
    for pieces in alike.values():
        targets, names, own = zip(*pieces, strict=True)
        yield Batch(targets, names, own, jobs[0].layout.device)


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor: the same storage if it is not sharded, a gathered copy if it is."""
    whole = tensor.detach()
    return whole.full_tensor() if isinstance(whole, DTensor) else whole
