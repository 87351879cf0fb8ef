"""How a small change of the hidden states grows from block to block: norms and alignment of the blocks' Jacobians.

MSign (arXiv 2602.01734, Sec. 4.1) explains a collapse by them: where blocks of large norms are aligned, the norms
multiply along the depth. No Jacobian is ever formed: after one forward of the model each block gives its products J·v
and Jᵀ·u, and a few of them give the top singular triplet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from msign_lightning.recognition import named_places

__all__ = ["BlockJacobians", "JacobianReport", "uncompiled"]

# Share of fresh noise in a warm start, which therefore can't stay orthogonal to a direction that has grown since.
_FRESH_NOISE = 0.1

_Map = Callable[[Tensor], Tensor]


class JacobianReport(NamedTuple):
    """What `BlockJacobians` measured, for B sequences and L blocks. Quantities that are not finite are NaN.

    Attributes:
        blocks: Names of the blocks, in the order of the forward.
        norms: ‖J⁽ˡ⁾‖₂, of shape (B, L).
        alignments: Align(J⁽ˡ⁺¹⁾, J⁽ˡ⁾) = |v₁⁽ˡ⁺¹⁾ · u₁⁽ˡ⁾|, from 0 to 1, of shape (B, L − 1). It means little where the
            two largest singular values of either block are almost equal.
        total: ‖J⁽ᴸ⁾ ⋯ J⁽¹⁾‖₂, of shape (B,).
    """

    blocks: tuple[str, ...]
    norms: Tensor
    alignments: Tensor
    total: Tensor

    @property
    def bound(self) -> Tensor:
        """(aM)ᴸ / a with M the least norm and a the least alignment of a sequence, of shape (B,).

        Source: arXiv 2602.01734, Theorem 4.2, as a lower bound of `total`. It is one for two blocks, or if those in
        between have rank one; else it is an indicator, for the proof's Eq. 24 takes the alignment with a block for that
        with the product of all below, whose minor directions can cancel the top one.
        """
        M, a, depth = self.norms.amin(-1), self.alignments.amin(-1), self.norms.size(-1)
        return M**depth * a ** (depth - 1)

    def metrics(self, *, per_block: bool = False) -> dict[str, float]:
        """The values for a logger, each a geometric mean over the sequences; they reach the host in one copy.

        Summaries come first: `jacobian_norm/min` is M and `jacobian_alignment/min` is a of Theorem 4.2. `per_block`
        adds `jacobian_norm/<block>`, and `jacobian_alignment/<block>` of a block with the one before.
        """
        columns: dict[str, Tensor] = {}
        for name, values in (("norm", self.norms), ("alignment", self.alignments)):
            columns[f"jacobian_{name}/min"] = values.amin(-1)
            columns[f"jacobian_{name}/geometric_mean"] = values.log().mean(-1).exp()
        columns |= {"jacobian_bound": self.bound, "jacobian_total": self.total}
        if per_block:
            columns |= {f"jacobian_norm/{block}": self.norms[:, i] for i, block in enumerate(self.blocks)}
            columns |= {f"jacobian_alignment/{block}": self.alignments[:, i] for i, block in enumerate(self.blocks[1:])}
        means = torch.stack(tuple(columns.values())).log().mean(-1).exp()
        return dict(zip(columns, means.tolist(), strict=True))


class BlockJacobians:
    """Measures norms and alignment of the Jacobians of a model's blocks (arXiv 2602.01734, Def. 3.2 and Theorem 4.2).

    The Jacobian of a block, attention and MLP with their residuals and norms, is J⁽ˡ⁾ = ∂vec H⁽ˡ⁾ / ∂vec H⁽ˡ⁻¹⁾ at the
    hidden states (B, T, D) of a forward of the model, its other inputs held fixed. Each sequence has its own, of
    T·D × T·D. The model computes as in evaluation: without dropout, without autocast, not compiled. Its parameters,
    their gradients, its mode and the random state stay as they were.

    A norm is estimated from below, by Golub–Kahan–Lanczos iteration: power iteration that keeps its directions, so that
    singular values close together, as blocks have them, cost few products. k `iterations` take 2k passes through the
    blocks and 2k for the total, each of up to the cost of a training step on the measured sequences, and meanwhile the
    memory of the graphs of the blocks and of their backward, and of 2k vectors of the size of the hidden states.

    A measurement starts at the directions of the one before if the hidden states have the same shape. So measure the
    same sequences each time, and half the default iterations do. A resumed run starts cold.

    The model may be bare, compiled or wrapped by DDP. Its weights must be whole, and its blocks twice differentiable,
    which PyTorch's own attention is and fused attention kernels are not.

    Args:
        model: The model that holds the blocks.
        blocks: Names or globs of the blocks as in `named_modules()`, or of their `ModuleList`; of modules inside
            each other the outermost counts. None to find them: the one list of modules with two matrices or more each.
        iterations: Products with each Jacobian and with its transpose.

    Raises:
        ValueError: A glob matches nothing, there are less than two blocks, the blocks can't be found or their weights
            are sharded, or `iterations` is not a positive integer.
    """

    def __init__(self, model: nn.Module, blocks: str | Sequence[str] | None = None, *, iterations: int = 16) -> None:
        if not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"iterations must be a positive integer, got {iterations!r}")
        # DDP would synchronise buffers in a forward that other ranks need not make.
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._blocks = _find_blocks(self._model, [blocks] if isinstance(blocks, str) else blocks)
        self.blocks = tuple(self._blocks)
        self._iterations = iterations
        self._generator = torch.Generator().manual_seed(0)
        self._directions: list[Tensor] = []
        self._armed = ExitStack()
        self._result: JacobianReport | None = None

    def measure(self, *args: Any, **kwargs: Any) -> JacobianReport:
        """Measures the Jacobians at one batch, by a forward `model(*args, **kwargs)`; a few sequences are enough.

        Raises:
            ValueError: A block isn't called exactly once, or doesn't map hidden states to ones of the same shape.
        """
        return self._measure(self._model, args, kwargs)

    def arm(self, sequences: int = 2) -> None:
        """Measures at the next forward pass in training mode, right before the module around the blocks runs.

        So a training loop measures its own batches, whatever they look like. Compiled code runs uncompiled meanwhile.

        Args:
            sequences: Of a batch, that is of every tensor with its leading dimension, so many are measured.
        """
        self.disarm()
        self._result = None

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training and self._result is None:
                tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim)
                batch = next((tensor.size(0) for tensor in tensors), None)
                self._result = self._measure(module, *tree_map(partial(_first, batch, sequences), (args, kwargs)))

        with ExitStack() as stack:
            around = _innermost_around(self._model, self._blocks.values())
            stack.callback(around.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.enter_context(uncompiled())
            self._armed = stack.pop_all()

    def disarm(self) -> None:
        """Lets the next forward pass alone. What was measured stays."""
        self._armed.close()

    def result(self) -> JacobianReport | None:
        """What has been measured since it was armed last; None if there was no forward pass in training mode."""
        return self._result

    def _measure(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> JacobianReport:
        with _undisturbed(self._model):
            x, jacobians = _run(model, self._blocks, args, kwargs)
            maps = list(jacobians.values())
            maps.append((partial(_chain, [a for a, _ in maps]), partial(_chain, [t for _, t in maps[::-1]])))
            starts = self._starts(x, len(maps))
            triplets = [_top_triplet(*m, start, self._iterations) for m, start in zip(maps, starts, strict=True)]
        self._directions = [v for _, _, v in triplets]
        *singular, total = (s for _, s, _ in triplets)
        norms = torch.stack(singular, -1)
        # The last triplet is the total's. Vectors mean nothing where the norm is NaN.
        cosines = [(v * u).sum(-1).abs() for (u, _, _), (_, _, v) in pairwise(triplets[:-1])]
        alignments = torch.stack(cosines, -1) + 0 * (norms[:, 1:] + norms[:, :-1])
        return JacobianReport(tuple(jacobians), norms, alignments, total)

    def _starts(self, x: Tensor, count: int) -> list[Tensor]:
        """A start (B, n) for each map; noise is the same for all sequences, so that they don't depend on the batch."""
        x = _flat(x)
        noise = torch.randn(count, x.size(1), generator=self._generator, dtype=torch.float64)
        starts = [(row / math.sqrt(x.size(1))).to(x).expand_as(x) for row in noise]
        if [v.shape for v in self._directions] != [x.shape] * count:
            return starts
        warm = [v.to(x).nan_to_num(0.0, 0.0, 0.0) for v in self._directions]
        return [v + _FRESH_NOISE * start for v, start in zip(warm, starts, strict=True)]


# --- linear algebra ----------------------------------------------------------------------------------------------


def _top_triplet(apply: _Map, apply_transposed: _Map, start: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top singular triplets u (B, n), s (B,) and v (B, n) of B maps at once, from the start (B, n).

    V is an orthonormal basis of the Krylov space of JᵀJ, Y = JV, and the triplet that of Y. Where a map is not finite,
    so is its s.
    """
    V = start.new_zeros(*start.shape, iterations)
    Y = torch.zeros_like(V)
    for i in range(iterations):
        V[..., i] = _orthonormal_to(V, apply_transposed(Y[..., i - 1]) if i else start)
        Y[..., i] = apply(V[..., i])
    Q, R = torch.linalg.qr(Y)
    finite = R.isfinite().all(-1).all(-1)
    P, S, Oh = torch.linalg.svd(torch.where(finite[:, None, None], R, 0.0))
    return (Q @ P[..., :1]).squeeze(-1), torch.where(finite, S[:, 0], math.nan), (V @ Oh[:, :1].mT).squeeze(-1)


def _orthonormal_to(V: Tensor, w: Tensor) -> Tensor:
    """What w (B, n) has besides the columns of V (B, n, k), at norm one; zero where that is nothing but rounding."""
    rounding = torch.finfo(w.dtype).eps * torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    rest = w.unsqueeze(-1)
    for _ in range(2):  # once leaves the rounding of a w that lies almost in the span of V
        rest = rest - V @ (V.mT @ rest)
    rest = rest.squeeze(-1)
    norm = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
    return torch.where(norm <= rounding, 0.0, rest / norm)


def _chain(maps: Sequence[_Map], v: Tensor) -> Tensor:
    for apply in maps:
        v = apply(v)
    return v


def _flat(x: Tensor) -> Tensor:
    """Hidden states (B, T, D) as vectors (B, T·D), in float32 or better."""
    return x.detach().flatten(1).to(torch.promote_types(x.dtype, torch.float32))


# --- the blocks' Jacobians ---------------------------------------------------------------------------------------


def _jacobian(x: Tensor, y: Tensor) -> tuple[_Map, _Map]:
    """The products of ∂y/∂x and of its transpose with vectors (B, n), of the graph that leads from x to y.

    Backward is linear in what it starts from, so the gradient of Jᵀu with respect to u is J (the "double backward
    trick"). Forward mode would need rules that many layers lack.
    """
    u = torch.zeros_like(y, requires_grad=True)
    with torch.set_grad_enabled(True):
        (transposed,) = torch.autograd.grad(y, x, u, create_graph=True)
    return partial(_product, transposed, u), partial(_product, y, x)


def _product(of: Tensor, by: Tensor, v: Tensor) -> Tensor:
    (product,) = torch.autograd.grad(of, by, v.view_as(of).to(of), retain_graph=True)
    return _flat(product)


def _run(
    model: nn.Module, blocks: dict[str, nn.Module], args: Any, kwargs: Any
) -> tuple[Tensor, dict[str, tuple[_Map, _Map]]]:
    """The hidden states and each block's Jacobian, of one forward in which only blocks have a graph, from their own."""
    inputs: dict[str, Tensor] = {}
    jacobians: dict[str, tuple[_Map, _Map]] = {}

    def enter(name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        key = next((k for k, v in given.items() if isinstance(v, Tensor) and v.is_floating_point()), None)
        if key is None:
            raise ValueError(f"blocks must take hidden states, got {name} called without a floating-point tensor")
        if name in inputs:
            raise ValueError(f"blocks must be called once in a forward, got {name} called again")
        inputs[name] = given[key].detach().requires_grad_()
        torch.set_grad_enabled(True)
        given[key] = inputs[name].clone()  # so that the block may add to it in place
        return tuple(given[i] for i in range(len(args))), {k: given[k] for k in kwargs}

    def leave(name: str, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        torch.set_grad_enabled(False)
        y = output[0] if isinstance(output, (tuple, list)) else output
        shapes = {x.shape for x in inputs.values()}
        if not isinstance(y, Tensor) or {y.shape} != shapes:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            change = f"{name} from {tuple(inputs[name].shape)} to {got}"
            raise ValueError(f"blocks must map hidden states to ones of the same shape, got {change}")
        jacobians[name] = _jacobian(inputs[name], y)

    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.callback(block.register_forward_pre_hook(partial(enter, name), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(partial(leave, name)).remove)
        model(*args, **kwargs)
    if missing := blocks.keys() - jacobians.keys():
        raise ValueError(f"blocks must be called once in a forward, got {sorted(missing)} not called")
    return next(iter(inputs.values())), jacobians


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, plain eager arithmetic without gradients, and all put back afterwards."""
    cuda = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=cuda), uncompiled(), ExitStack() as stack:
        for kind in {p.device.type for p in model.parameters()}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the only one that is twice differentiable
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            module.training = False  # train() may do more, such as merge the weights of an adapter
        yield


_stance = ExitStack()
_inside = 0


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled code runs uncompiled within, so that forward hooks are called; no graph is compiled anew.

    Unlike those of `torch.compiler.set_stance`, two that overlap may end in any order.
    """
    global _inside
    if not _inside:
        _stance.enter_context(torch.compiler.set_stance("force_eager"))
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1
        if not _inside:
            _stance.close()


# --- which modules are blocks ------------------------------------------------------------------------------------


def _find_blocks(model: nn.Module, globs: Sequence[str] | None) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for parts, (*_, module) in named_places(model):
        modules.setdefault(".".join(parts), module)  # a wrapper comes before what it wraps
    stacks = _outermost([name for name, module in modules.items() if _is_stack(module)])
    if globs is None:
        if len(stacks) != 1:
            found = f"several lists of them, {stacks}" if stacks else "a model without a list of them"
            rule = "blocks must be names or globs of modules, such as 'model.layers.*'"
            raise ValueError(f"{rule}, got None and {found}")
        globs = stacks
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in modules):
            children = [name for name, _ in model.named_children()]
            near = f"lists of blocks are {stacks or 'none'}, its children {children}"
            raise ValueError(f"blocks must match modules of the model, got {glob!r}; {near}")
    chosen: dict[str, nn.Module] = {}
    for name in _outermost([name for name in modules if any(fnmatchcase(name, glob) for glob in globs)]):
        module = modules[name]
        members = module.named_children() if isinstance(module, (nn.ModuleList, nn.Sequential)) else ()
        chosen |= {f"{name}.{child}": member for child, member in members} or {name: module}
    if len(chosen) < 2:
        raise ValueError(f"blocks must be two modules or more, got {list(chosen)}")
    if any(isinstance(parameter, DTensor) for block in chosen.values() for parameter in block.parameters()):
        raise ValueError("model must hold whole weights, got sharded ones (DTensor)")
    return chosen


def _innermost_around(model: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
    """The innermost module that holds all the blocks and can be called."""
    wanted = set(blocks)
    around = [module for module in model.modules() if not isinstance(module, (nn.ModuleList, nn.ModuleDict))]
    return [module for module in around if wanted < set(module.modules())][-1]


def _first(batch: int | None, count: int, value: Any) -> Any:
    """The first `count` sequences of a tensor with the batch in front; in float32 again what autocast has rounded."""
    if not isinstance(value, Tensor):
        return value
    value, kind = value.detach(), value.device.type
    if torch.is_autocast_enabled(kind) and value.dtype == torch.get_autocast_dtype(kind):
        value = value.float()
    return value[:count] if value.ndim and value.size(0) == batch else value


def _is_stack(module: nn.Module) -> bool:
    """Whether it is a list of blocks: two members or more, with two matrices or more each."""
    members = list(module) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
    return len(members) >= 2 and all(sum(p.ndim >= 2 for p in member.parameters()) >= 2 for member in members)


def _outermost(names: Sequence[str]) -> list[str]:
    """Those of the names that lie in no other of them."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
