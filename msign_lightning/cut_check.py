"""Checks how fused parameters are cut, by what a model's forward does with them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from msign_lightning.jacobian import uncompiled
from msign_lightning.targets import Target

__all__ = ["check_cuts"]

_aten = torch.ops.aten
_MATMULS = (_aten.mm.default, _aten.bmm.default, _aten.baddbmm.default)
_PRODUCTS = (*_MATMULS, _aten.mul.Tensor, _aten.mul_.Tensor)
_ROLES = {"q": "queries", "k": "keys", "g": "the gate", "u": "up"}
_SOFTMAXES = (_aten._softmax.default, _aten._safe_softmax.default)


def check_cuts(targets: Sequence[Target], model: nn.Module, /, *args: Any, **kwargs: Any) -> dict[str, bool]:
    """Checks how parameters are cut by a forward `model(*args, **kwargs)`, and says which cuts it proves.

    Rows of one matrix are used alike. So if some rows of a parameter reach only one operand of a product (queries times
    keys, weights times values, gate times up) and some only the other, they belong to two matrices. A row reaches what
    has a derivative with respect to it that isn't zero, as far as the next layer with a matrix. Products within a fused
    kernel other than PyTorch's attention can't be seen.

    A few tokens are enough, but two at least. The model, best in evaluation mode, stays as it was, with its gradients.
    Its weights must be whole, and better not zero, for what a zero shuts off isn't seen.

    Args:
        targets: What `select_targets` gave.
        model: The model they came from.
        *args: What the model takes.
        **kwargs: What the model takes by name.

    Returns:
        Whether the cut of each parameter is proved: the rows of a piece are all used alike, and unlike those of others.
        It isn't if, for instance, the forward doesn't use the parameter.

    Raises:
        ValueError: A piece, or a parameter that isn't cut, mixes rows of several matrices; or pieces called by q, k, v,
            gate and up are not what they are called.
    """
    chosen = {target.parameter: target for target in targets}
    uses = _run(model, args, kwargs)
    if not uses:
        return {target.parameter_name: False for target in chosen.values()}
    reached: dict[Tensor, tuple[list[Tensor], list[Tensor]]] = {parameter: ([], []) for parameter in chosen}
    for operand in (operand for use in uses for operand in use.operands):
        gradients = operand.gradients(list(chosen)) if operand else [None] * len(chosen)
        for (parameter, dims), gradient in zip(reached.items(), gradients, strict=True):
            nonzero = torch.zeros_like(parameter, dtype=torch.bool) if gradient is None else gradient != 0
            for dim, rows in enumerate(dims):
                rows.append(nonzero.movedim(dim - 2, -1).flatten(0, -2).any(0).cpu())
    return {
        target.parameter_name: _check(target, uses, [torch.stack(rows).view(len(uses), 2, -1) for rows in dims])
        for target, dims in zip(chosen.values(), reached.values(), strict=True)
    }


class _Operand(NamedTuple):
    """A tensor of the forward, or its place in the graph, where derivatives start, and their direction there."""

    start: Tensor | GradientEdge
    direction: Tensor

    @classmethod
    def of(cls, tensor: Tensor, part: Tensor | int = 1) -> _Operand:
        """All of a tensor, or the part of it where a mask is one."""
        # The place stays if the tensor is changed later. PyTorch 2.7 crashes at that of a custom function.
        start = tensor if isinstance(tensor.grad_fn, BackwardCFunction) else get_gradient_edge(tensor)
        direction = torch.arange(1, tensor.numel() + 1, device=tensor.device).cos()  # nothing special
        return cls(start, direction.view(tensor.shape).to(tensor.dtype) * part)

    def gradients(self, inputs: Sequence[Any], *, create_graph: bool = False) -> Sequence[Tensor | None]:
        starts: Any = [self.start]
        return torch.autograd.grad(
            starts, inputs, [self.direction], retain_graph=True, create_graph=create_graph, allow_unused=True
        )


@dataclass
class _Use:
    """A product of two tensors, or (with None for the second) what a layer with a matrix takes in.

    Where the product of two matrices goes into a softmax, `slot` is the first that the softmax sums over.
    """

    operands: tuple[_Operand, _Operand | None]
    slot: _Operand | None = None

    def roles(self, parameter: Tensor) -> str:
        """First letters of what the two operands are, queries and keys or gate and up; "" where it can't be told."""
        left, right = self.operands
        assert right is not None
        if self.slot:  # it is made of one key and of all queries
            of_left, of_right = self.slot.gradients([left.start, right.start])
            if of_left is None or of_right is None:
                return ""
            shares = [of_left.ne(0).any(-1).float().mean().item(), of_right.ne(0).any(-2).float().mean().item()]
            names = "qk"
        else:  # the gate isn't linear in its weights
            gradients = [operand.gradients([parameter], create_graph=True)[0] for operand in (left, right)]
            shares = [float(gradient is not None and gradient.requires_grad) for gradient in gradients]
            names = "gu"
        return "" if shares[0] == shares[1] else names if shares[0] > shares[1] else names[::-1]


class _Recorder(TorchDispatchMode):
    """Notes the products of a forward, and keeps derivatives within the layers that have a matrix."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses: list[_Use] = []
        self._entered: set[GradientEdge] = set()
        self._scores: list[_Use] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and all(isinstance(x, Tensor) and x.requires_grad and not x.is_leaf for x in args[-2:]):
            self.uses.append(_Use((_Operand.of(args[-2]), _Operand.of(args[-1]))))
            if func in _MATMULS:
                self._scores.append(self.uses[-1])
        elif func is _aten.glu.default and args[0].requires_grad:
            first = torch.ones_like(args[0])
            first.chunk(2, *args[1:])[1].zero_()
            self.uses.append(_Use((_Operand.of(args[0], first), _Operand.of(args[0], 1 - first))))
        elif func in _SOFTMAXES and args[0].requires_grad:
            slot = torch.zeros_like(args[0])
            slot.select(args[1], 0).fill_(1)
            for use in self._scores:
                use.slot = _Operand.of(args[0], slot)
            self._scores = []
        return func(*args, **(kwargs or {}))

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A hook before the forward of a layer."""
        return tree_map(self.take, (args, kwargs))

    def take(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        if (place := get_gradient_edge(value)) not in self._entered:
            self._entered.add(place)
            self.uses.append(_Use((_Operand.of(value), None)))
        return value.detach()


def _run(model: nn.Module, args: Any, kwargs: Any) -> list[_Use]:
    recorder = _Recorder()
    math = sdpa_kernel(SDPBackend.MATH)  # made of products
    with torch.set_grad_enabled(True), uncompiled(), math, recorder, ExitStack() as stack:
        for module in model.modules():
            if any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(recorder.enter, with_kwargs=True).remove)
        tree_map(recorder.take, model(*args, **kwargs))
    return recorder.uses


def _check(target: Target, uses: list[_Use], reached: list[Tensor]) -> bool:
    """Whether the cut is proved, by the rows and the columns of the parameter that reach what: (uses, 2, length)."""
    cut = target.cut
    pieces = torch.zeros(target.parameter.shape[-2:], dtype=torch.long)
    for i, piece in enumerate(cut.pieces(pieces)):
        piece.fill_(i)
    is_proved = True
    for dim, rows in enumerate(reached):
        holds = torch.stack([(pieces == i).any(1 - dim) for i in range(len(cut.labels))])
        patterns, pattern = torch.unique(rows.flatten(0, 1).T, dim=0, return_inverse=True)
        used = {i for i, values in enumerate(patterns) if values.any()}
        kinds = [used & set(pattern[held].tolist()) for held in holds]
        if dim == cut.dim or not cut.sizes:
            is_proved &= all(len(kind) == 1 for kind in kinds) and len(set.union(*kinds)) == len(kinds)

        only = rows & ~rows.flip(1)
        sides = (only.unsqueeze(2) & holds).any(-1)
        mixed = sides.all(1).any(0)
        if mixed.any():
            label = cut.labels[int(mixed.nonzero()[0])]
            seen = [_ranges((pattern == i).nonzero().flatten().tolist()) for i in sorted(used)]
            raise ValueError(
                f"cut of {target.parameter_name}: {f'piece {label!r}' if label else 'it is cut in one, which'} mixes "
                f"{('rows', 'columns')[dim]} of several matrices; the forward tells apart {' | '.join(seen)}"
            )
        for use, side in zip(uses, sides, strict=True):
            if not side.any(1).all():
                continue
            for role, held in zip(use.roles(target.parameter), side.tolist(), strict=False):
                family = "qkv" if role in "qk" else "gu"
                for label in (label for label, is_held in zip(cut.labels, held, strict=True) if is_held):
                    if label[0] in family and label[0] != role:
                        name = f"cut of {target.parameter_name}"
                        raise ValueError(f"{name}: piece {label!r} is what the forward uses as {_ROLES[role]}")
    return is_proved


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in a few words: "0-7, 16-23, ..."."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join([*(f"{run[0]}-{run[-1]}" for run in runs[:3]), *(["..."] if len(runs) > 3 else [])])
