"""Matrix sign, stable-rank restoration and singular triplets of batches of matrices.

Pure PyTorch: no model, framework or process group is known here. Every function takes matrices W of shape
``(..., m, n)`` in float16, bfloat16, float32 or float64, leaves them unchanged, and treats each on its own, so a zero,
rank-one or non-finite one never touches its neighbours. Computation is in float32 or better, without gradients and with
autocast off. A W that is no floating-point matrix or batch, or an option out of range, is a ValueError.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from msign_lightning.polar_express import minimax_schedule

__all__ = [
    "Method",
    "RestoreReport",
    "Rule",
    "check_options",
    "default_rtol",
    "gaussian_stable_rank",
    "msign",
    "restore",
    "restore_",
    "stable_rank",
    "top_singular_triplets",
]

Method = Literal["auto", "svd", "polynomial", "polynomial_tf32", "polynomial_bf16"]
Rule = Literal["msign", "cap"]

# Singular values below rtol * s_max are noise: of the float64 SVD for float64, of float32 arithmetic for float32
# weights, and for half precision of the storage itself (eps / 8 is what rounding every entry leaves in the spectrum).
_RTOL = {torch.float64: 1e-13, torch.float32: 5e-7, torch.float16: 2.0**-13, torch.bfloat16: 2.0**-10}


class _Arithmetic(NamedTuple):  # what the schedule of one polynomial method must allow for
    floor: float  # smallest lower end that the rounding of its products can resolve
    safety: float  # how far rounding may push a singular value above the designed interval
    polish: int  # steps beyond convergence in exact arithmetic, to contract accumulated rounding


_ARITHMETIC = {
    "polynomial": _Arithmetic(floor=1e-6, safety=1e-3, polish=0),
    "polynomial_tf32": _Arithmetic(floor=1e-6, safety=1e-2, polish=1),
    "polynomial_bf16": _Arithmetic(floor=1e-5, safety=1e-2, polish=1),
}
_TF32_MIN_SIDE = 256  # smaller products are bound by kernel launches, so full precision is free
_CAP_TRIPLETS, _CAP_ITERATIONS, _CAP_TOLERANCE = 16, 12, 1e-3
_FRESH_NOISE = 0.1
# PyTorch 2.9 and newer; whoever sets precisions by it makes the getter of the older one raise.
_NEW_PRECISION_API = hasattr(torch.backends.cuda.matmul, "fp32_precision")


class RestoreReport(NamedTuple):
    """What `restore_` did to each matrix of the batch; all tensors have the batch's shape and device.

    Attributes:
        finite: Whether every entry was finite. Where False the matrix was left as it was, bit for bit.
        changed: Whether the matrix was written: False if it was non-finite or zero, or "cap" had nothing to do.
        stable_rank_before: Stable rank found, 0 for a zero and NaN for a non-finite matrix. Exact for the method "svd";
            the polynomial methods estimate the largest singular value from below by power iteration, so they overstate
            it: hardly where a few values stand out, by up to 15 % where many are almost as large.
        stable_rank_after: Stable rank left behind, of the values before they are rounded to their storage dtype. The
            polynomial methods take the largest singular value of the sign for one, which it is to the precision of
            their products: 1e-6, 1e-3 in TF32, 1e-2 in bfloat16.
    """

    finite: Tensor
    changed: Tensor
    stable_rank_before: Tensor
    stable_rank_after: Tensor


@torch.no_grad()
def msign(W: Tensor, *, method: Method = "auto", rtol: float | None = None) -> Tensor:
    r"""Matrix sign :math:`U V^\top` of the reduced SVD :math:`W = U S V^\top` (arXiv 2602.01734, Def. 5.1).

    Zero singular values are dropped, so a rank-deficient matrix gives a partial isometry and a zero matrix gives zero.

    Args:
        W: Matrices of shape (..., m, n).
        method: "svd" is exact, in float64. The "polynomial" methods apply a minimax schedule of degree-5 polynomials
            (Polar Express, arXiv 2505.16932) in float32; "polynomial_tf32" lets CUDA multiply in TF32, and
            "polynomial_bf16" multiplies bfloat16 operands into float32 results (before PyTorch 2.8 through TF32, and
            no faster). With log-spaced singular values relative errors are a few 1e-3 at condition 1e6 for the first
            two, and a few 1e-2 at condition 1e4 for bfloat16; they grow where much of the spectrum is that small.
            "auto" is "svd" on the CPU and for float64, else "polynomial_tf32" from a short side of 256, else
            "polynomial".
        rtol: Singular values up to `rtol` times the largest count as zero: "svd" drops them, a polynomial, which brings
            it into [1e-6, 0.1] ([1e-5, 0.1] for bfloat16), lifts them partly. Defaults to `default_rtol` of W's dtype.

    Returns:
        The matrix sign, with W's shape, dtype and device. A matrix with a non-finite entry is returned as it was.
    """
    _check_matrices(W)
    check_options(method=method, rtol=rtol)
    method, rtol = _resolved(W, method, rtol)
    X = _flat_copy(W)
    finite, scale = _finite_and_scale(X)
    with _computing(X):
        if method == "svd":
            for i in finite.flatten().nonzero().flatten().tolist():
                U, S, Vh = _svd(X[i].double() / scale[i])
                X[i].copy_(U * (rtol * S[0] < S) @ Vh)
        else:
            torch.where(finite, X / scale, X, out=X)
            _polynomial_sign_(X, finite, method, rtol)
    return torch.where(finite.view(*W.shape[:-2], 1, 1), X.view(W.shape).to(W.dtype), W)


@torch.no_grad()
def restore(W: Tensor, *, rule: Rule = "msign", method: Method = "auto", rtol: float | None = None) -> Tensor:
    r"""Stable rank of W restored, Frobenius norm kept.

    The rule "msign" is :math:`\|W\|_F\, \mathrm{sign}(W) / \|\mathrm{sign}(W)\|_F` (arXiv 2602.01734, Eq. 14): all
    non-zero singular values become equal, so the stable rank becomes the rank.

    The rule "cap" is this project's own and gentler. With r* the stable rank of a random matrix
    (`gaussian_stable_rank`), a matrix below r* gets :math:`s_i \leftarrow \min(s_i, \tau)`, with :math:`\tau` such that
    its stable rank becomes r*, and then its old Frobenius norm; one at or above r* is left alone, bit for bit. Where
    the rank is at most r*, no such :math:`\tau` exists, and the limit, which is the "msign" result, is taken.

    Args:
        W: Matrices of shape (..., m, n).
        rule: "msign" or "cap".
        method: As for `msign`. With "cap" all polynomial methods are one: a low-rank update from the top 16 singular
            triplets, which agrees with "svd" to 1e-3 in relative Frobenius norm and in stable rank. Matrices for which
            that is not enough are handed to the SVD.
        rtol: As for `msign`.

    Returns:
        The restored matrices, with W's shape, dtype and device. Zero matrices stay zero; a matrix with a non-finite
        entry, or whose restoration would overflow W's dtype, is returned as it was.
    """
    _check_matrices(W)
    X = _flat_copy(W)
    report = restore_(X, rule=rule, method=method, rtol=default_rtol(W.dtype) if rtol is None else rtol)
    restored = X.to(W.dtype)
    written = report.changed & restored.isfinite().flatten(1).all(1)
    return torch.where(written.view(*W.shape[:-2], 1, 1), restored.view(W.shape), W)


@torch.no_grad()
def restore_(X: Tensor, *, rule: Rule = "msign", method: Method = "auto", rtol: float | None = None) -> RestoreReport:
    """In-place `restore` of a scratch copy, with a report, for callers that gather weights and bound memory themselves.

    Including X itself, about three times the bytes of X are in use at most ("polynomial_bf16": five); "svd" adds a few
    float64 copies of a single matrix. Polynomial methods with the rule "msign" never wait for the device.

    X must be contiguous, and float32 or float64. The other arguments are those of `restore`; where X stands for weights
    stored in less precision, pass `default_rtol` of that dtype.
    """
    _check_matrices(X)
    check_options(rule=rule, method=method, rtol=rtol)
    if X.dtype not in (torch.float32, torch.float64) or not X.is_contiguous():
        raise ValueError(f"X must be contiguous float32 or float64, got {X.dtype} with strides {X.stride()}")
    method, rtol = _resolved(X, method, rtol)
    flat = X.view(-1, *X.shape[-2:])
    with _computing(X):
        if method == "svd":
            report = _restore_by_svd_(flat, rule, rtol)
        elif rule == "msign":
            report = _restore_by_polynomial_(flat, method, rtol)
        else:
            report = _cap_by_triplets_(flat, rtol)
    return RestoreReport(*(field.view(X.shape[:-2]) for field in report))


def check_options(*, rule: Rule = "msign", method: Method = "auto", rtol: float | None = None) -> None:
    """Check the options of `restore` before there is a matrix."""
    if rule not in get_args(Rule):
        raise ValueError(f"rule must be one of {get_args(Rule)}, got {rule!r}")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    if rtol is not None and not (isinstance(rtol, (int, float)) and 0 <= rtol < 1):
        raise ValueError(f"rtol must be in [0, 1), got {rtol!r}")


def default_rtol(dtype: torch.dtype) -> float:
    """`rtol` for weights stored in `dtype`: 1e-13 in float64, 5e-7 in float32, 2^-13 in float16, 2^-10 in bfloat16."""
    if dtype not in _RTOL:
        raise ValueError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    return _RTOL[dtype]


@torch.no_grad()
def stable_rank(W: Tensor) -> Tensor:
    r"""Stable rank :math:`\|W\|_F^2 / \|W\|_2^2` (arXiv 2602.01734, Def. 3.1), by a float64 eigensolver.

    For monitoring large models, `top_singular_triplets` gives the spectral norm at a small fraction of the cost.

    Returns:
        One value between 1 and min(m, n) per matrix, of shape (...), in float32 (float64 for float64 input); 0 for a
        zero matrix, NaN for one with a non-finite entry.
    """
    _check_matrices(W)
    X = _flat_copy(W)
    finite, scale = _finite_and_scale(X)
    X64 = torch.where(finite, X.double() / scale, 0.0)
    with _computing(X):
        squares = torch.linalg.eigvalsh(X64.mT @ X64 if X.size(-2) > X.size(-1) else X64 @ X64.mT)
    ratio = _ratio(_frobenius(X64).square().flatten(), squares[:, -1])
    return torch.where(finite.flatten(), ratio, math.nan).to(X.dtype).view(W.shape[:-2])


def gaussian_stable_rank(m: int, n: int) -> float:
    r"""Asymptotic stable rank :math:`mn / (\sqrt m + \sqrt n)^2` of an m × n matrix of independent Gaussians."""
    if m < 1 or n < 1:
        raise ValueError(f"m and n must be positive, got {m} and {n}")
    return m * n / (math.sqrt(m) + math.sqrt(n)) ** 2


@torch.no_grad()
def top_singular_triplets(
    W: Tensor,
    k: int = 1,
    *,
    iterations: int = 8,
    V: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The k largest singular values with their vectors, by block power iteration and a final Rayleigh–Ritz step.

    Every returned triplet satisfies :math:`W v = s u` to rounding. Values are estimated from below; the error of
    :math:`s_i` shrinks as :math:`(s_{k+1} / s_i)^{4 \cdot \mathrm{iterations}}`, so it is smallest exactly when the
    stable rank is low. With k = 1 nothing waits for the device.

    Args:
        W: Matrices of shape (..., m, n).
        k: Number of triplets, at most min(m, n).
        iterations: Products with W and its transpose; 2 are enough when V comes from a slightly older W.
        V: Right singular vectors of shape (..., n, k) to start from, as returned by an earlier call. A tenth of noise
            is mixed in, so that they can't stay orthogonal to a direction that has grown since.
        generator: Source of the starting noise, on W's device. By default a new one with a fixed seed, which makes
            the call deterministic. All matrices of the batch get the same noise.

    Returns:
        U of shape (..., m, k), S of shape (..., k), descending, and V of shape (..., n, k), in float32 (float64 for
        float64 input). S is NaN for a matrix with a non-finite entry and 0 for a zero matrix; their vectors mean
        nothing, but are finite.
    """
    _check_matrices(W)
    if not 1 <= k <= min(W.shape[-2:]):
        raise ValueError(f"k must be between 1 and the short side of W, {min(W.shape[-2:])}, got {k}")
    if iterations < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}")
    if V is not None and V.shape != (*W.shape[:-2], W.size(-1), k):
        raise ValueError(f"V must have shape {(*W.shape[:-2], W.size(-1), k)}, got {tuple(V.shape)}")
    X = _flat_copy(W)
    finite, scale = _finite_and_scale(X)
    X.div_(scale).masked_fill_(~finite, 0.0)
    start = _noise(X, k, generator)
    if V is not None:
        start = V.reshape(start.shape).to(X.dtype).nan_to_num(0.0, 0.0, 0.0) + _FRESH_NOISE * start
    with _computing(X):
        U, S, V = _triplets(X, start, iterations)
    S = torch.where(finite, S.unsqueeze(-1) * scale, math.nan)
    U, S, V = (T.view(*W.shape[:-2], *T.shape[1:]) for T in (U, S.flatten(1), V))
    return U, S, V


def _check_matrices(W: Tensor) -> None:
    default_rtol(W.dtype)
    if W.ndim < 2 or 0 in W.shape[-2:]:
        raise ValueError(f"matrices must have shape (..., m, n) with m, n >= 1, got {tuple(W.shape)}")


def _resolved(W: Tensor, method: Method, rtol: float | None) -> tuple[Method, float]:
    """The choices that "auto" and None stand for."""
    if method == "auto":
        if W.device.type == "cpu" or W.dtype == torch.float64:
            method = "svd"
        else:
            method = "polynomial_tf32" if min(W.shape[-2:]) >= _TF32_MIN_SIDE else "polynomial"
    return method, default_rtol(W.dtype) if rtol is None else rtol


def _flat_copy(W: Tensor) -> Tensor:
    dtype = torch.promote_types(W.dtype, torch.float32)
    return W.to(dtype, copy=True, memory_format=torch.contiguous_format).view(-1, *W.shape[-2:])


@contextmanager
def _computing(X: Tensor, precision: Literal["highest", "high"] = "highest") -> Iterator[None]:
    """No autocast, and TF32 only with "high", whatever the caller has set."""
    names = ("cuda", "mkldnn") if _NEW_PRECISION_API else ()
    backends = [getattr(torch.backends, name).matmul for name in names]
    before = [backend.fp32_precision for backend in backends] or torch.get_float32_matmul_precision()
    try:
        if isinstance(before, str):
            torch.set_float32_matmul_precision(precision)
        for backend in backends:
            backend.fp32_precision = "tf32" if precision == "high" else "ieee"
        with torch.autocast(X.device.type, enabled=False):
            yield
    finally:
        if isinstance(before, str):
            torch.set_float32_matmul_precision(before)
        for backend, value in zip(backends, before, strict=False):
            backend.fp32_precision = value


def _finite_and_scale(X: Tensor) -> tuple[Tensor, Tensor]:
    """Which matrices are finite, and what to divide each by so that squares don't overflow; both of shape (b, 1, 1)."""
    largest = torch.linalg.vector_norm(X, math.inf, dim=(-2, -1), keepdim=True)
    finite = largest.isfinite()
    return finite, torch.where(finite & (largest > 0), largest, 1.0)


def _frobenius(X: Tensor) -> Tensor:
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)  # type: ignore[no-any-return]


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """A / b, with 0 / 0 = 0."""
    return a / torch.where(b == 0, 1.0, b)


def _svd(W: Tensor) -> Any:
    # The faster CUDA drivers lose small singular values.
    return torch.linalg.svd(W, full_matrices=False, driver="gesvd" if W.is_cuda else None)


def _cap_threshold(S: Tensor, rest: Tensor, limit: float) -> Tensor:
    """The τ for which capping at it gives the stable rank `limit`; at least s_1 where there is nothing to do.

    S (..., k) are the largest singular values, descending, and `rest` (..., 1) is the sum of the squares of all others.
    Capping the k largest values gives the stable rank k + (sum of the other squares) / τ², so that k asks for
    τ_k² = (sum of the other squares) / (limit - k). It falls with k as long as τ_k < s_{k+1} and rises afterwards: the
    right one is the smallest.
    """
    squares = torch.cat((S.square(), rest), -1)
    others = squares.flip(-1).cumsum(-1).flip(-1)[..., : math.ceil(limit)]
    room = limit - torch.arange(others.size(-1), device=S.device, dtype=S.dtype)
    tau: Tensor = (others / room).amin(-1, keepdim=True).sqrt()
    return tau


def _new_spectrum(S: Tensor, rule: Rule, rtol: float, limit: float) -> Tensor | None:
    """The singular values that take the place of S, up to a factor; None where the matrix is to be left alone."""
    if S[0] == 0:
        return None
    nonzero = rtol * S[0] < S
    if rule == "cap":
        tau = _cap_threshold(S, S.new_zeros(1), limit)
        if tau >= S[0]:
            return None
        if nonzero.sum() > limit:
            return S.clamp(max=tau)
    return nonzero.to(S.dtype)


def _restore_each_(X: Tensor, scale: Tensor, members: Tensor, rule: Rule, rtol: float, report: RestoreReport) -> None:
    """Restore these members by SVD, one by one to bound the float64 temporaries, and note it in the report."""
    for i in members.flatten().nonzero().flatten().tolist():
        U, S, Vh = _svd(X[i].double() / scale[i])
        T = _new_spectrum(S, rule, rtol, gaussian_stable_rank(*X.shape[1:]))
        if T is not None:
            X[i].copy_(((U * (T * (S.norm() / T.norm()))) @ Vh).mul_(scale[i]))
        report.changed[i] = T is not None
        for ranks, values in ((report.stable_rank_before, S), (report.stable_rank_after, S if T is None else T)):
            ranks[i] = _ratio(values.square().sum(), values[0].square())


def _restore_by_svd_(X: Tensor, rule: Rule, rtol: float) -> RestoreReport:
    finite, scale = _finite_and_scale(X)
    unknown = X.new_full((X.size(0),), math.nan)
    report = RestoreReport(finite.flatten(), torch.zeros_like(finite).flatten(), unknown, unknown.clone())
    _restore_each_(X, scale, finite, rule, rtol, report)
    return report


def _restore_by_polynomial_(X: Tensor, method: Method, rtol: float) -> RestoreReport:
    finite, scale = _finite_and_scale(X)
    torch.where(finite, X / scale, X, out=X)
    norm, largest = _frobenius(X), torch.empty_like(scale)
    _polynomial_sign_(X, finite, method, rtol, largest)
    sign_norm = _frobenius(X)
    torch.where(finite, X.mul(_ratio(norm, sign_norm)).mul_(scale), X, out=X)
    # All singular values of a matrix sign are one, but for the zeros, so that its squared norm is its stable rank.
    before, after = _ratio(norm, largest).square(), sign_norm.square()
    ranks = (torch.where(finite, rank, math.nan).flatten() for rank in (before, after))
    return RestoreReport(finite.flatten(), (finite & (norm > 0)).flatten(), *ranks)


def _polynomial_sign_(X: Tensor, finite: Tensor, method: Method, rtol: float, largest: Tensor | None = None) -> None:
    """Finite matrices of X, with entries of order one, replaced by their matrix sign.

    Each step is X ← aX + (bA + cA²)X with A = XXᵀ on the short side. Adding a to the diagonal of the bracket instead
    would save an addition and lose the small singular values. At most three buffers of X's size are alive, X included;
    writing every step back into X keeps the bits of non-finite matrices without a fourth.

    `largest`, of shape (b, 1, 1), takes up the largest singular values from before, estimated from below.
    """
    arithmetic = _ARITHMETIC[method]
    lower = min(max(rtol, arithmetic.floor), 0.1)
    schedule = minimax_schedule(lower, arithmetic.safety, arithmetic.polish)
    tall, bf16 = X.size(-2) > X.size(-1), method == "polynomial_bf16"
    with _computing(X, "highest" if method == "polynomial" else "high"):
        for step, (a, b, c) in enumerate(schedule):
            A = _product(X.mT, X, bf16) if tall else _product(X, X.mT, bf16)
            if step == 0 or bf16:
                B = _product(A, A, bf16)
                if step == 0:
                    bound = _frobenius(B).sqrt().sqrt()  # the 8-norm of the singular values, so hardly above s_1
                    bound = torch.where(bound > 0, bound, 1.0)
                    A.div_(bound.square())
                    B.div_(bound.square().square())
                    if largest is not None:
                        largest.copy_(_largest_singular_value(X, B))
                B.mul_(c).add_(A, alpha=b)
            else:
                B = torch.baddbmm(A, A, A, beta=b, alpha=c)
            del A
            Y = _product(X, B, bf16) if tall else _product(B, X, bf16)
            del B
            Y.add_(X, alpha=a)  # fused, it would lose accuracy on the CPU and win no kernel
            torch.where(finite, Y.div_(bound) if step == 0 else Y, X, out=X)
            del Y


def _largest_singular_value(X: Tensor, B: Tensor) -> Tensor:
    """Of shape (b, 1, 1), by sixteen power iterations with B, the square of XXᵀ (on the short side) at norm one."""
    u = _noise(B, 1)
    with _computing(X):
        for i in range(16):
            u = B @ u
            if i % 4 == 3:  # four products underflow for no size
                u.div_(_frobenius(u).clamp_(min=1e-30))
        return _frobenius((X if X.size(-2) > X.size(-1) else X.mT) @ u)


def _product(P: Tensor, Q: Tensor, bf16: bool) -> Any:
    if not bf16:
        return torch.bmm(P, Q)
    if P.is_cuda and "dtype" in torch.ops.aten.bmm.overloads():
        return torch.ops.aten.bmm.dtype(P.bfloat16(), Q.bfloat16(), torch.float32)
    # bfloat16 values are exact in TF32 and float32, so this is the same product.
    return torch.bmm(P.bfloat16().to(P.dtype), Q.bfloat16().to(Q.dtype))


def _cap_by_triplets_(X: Tensor, rtol: float) -> RestoreReport:
    """`restore_` with the rule "cap" by a low-rank update; matrices for which that isn't accurate enough by SVD."""
    finite, scale = _finite_and_scale(X)
    W = torch.where(finite, X / scale, 0.0)
    limit = gaussian_stable_rank(*X.shape[-2:])
    k = min(_CAP_TRIPLETS, *X.shape[-2:])
    U, S, V = _triplets(W, _noise(W, k), _CAP_ITERATIONS)
    norm = _frobenius(W)
    residual = torch.linalg.vector_norm(W.mT @ U - V * S.unsqueeze(-2), dim=-2)
    W.baddbmm_(U * S.unsqueeze(-2), V.mT, alpha=-1)
    # Measured, since a difference of squares would lose what a nearly low-rank matrix has besides.
    rest = _frobenius(W).square()[:, :, 0]
    tau = _cap_threshold(S, rest, limit)
    cut = S[:, :1] > tau  # never so where W was not finite, and is zero here
    # A wrong direction costs no more than its residual, and no more than what is cut from it.
    excess = (S - tau).clamp(min=0)
    error = torch.linalg.vector_norm(torch.minimum(residual, excess), dim=-1, keepdim=True)
    trusted = (S[:, -1:] <= tau) & (error <= _CAP_TOLERANCE * tau) & (rtol * S[:, :1] < S[:, -1:])

    capped = W.baddbmm_(U * S.minimum(tau).unsqueeze(-2), V.mT)
    new_norm = _frobenius(capped)
    before = _ratio(norm[:, 0], S[:, :1]).square()
    after = _ratio(new_norm[:, 0], S[:, :1].minimum(tau)).square()
    torch.where((cut & trusted).unsqueeze(-1), capped.mul_(_ratio(norm, new_norm)).mul_(scale), X, out=X)

    ranks = (torch.where(finite[:, 0], rank, math.nan).flatten() for rank in (before, after))
    report = RestoreReport(finite.flatten(), (cut & trusted).flatten(), *ranks)
    _restore_each_(X, scale, cut & ~trusted, "cap", rtol, report)
    return report


def _triplets(X: Tensor, V: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top singular triplets of finite X (b, m, n) from the start V (b, n, k)."""
    V = _orthonormal(V)
    for _ in range(iterations):
        V = _orthonormal(X.mT @ _orthonormal(X @ V))
    if V.size(-1) == 1:
        Y = X @ V
        S = _frobenius(Y)
        return _ratio(Y, S), S[:, :, 0], V
    Q, R = torch.linalg.qr(X @ V)
    P, S, Oh = torch.linalg.svd(R)
    return Q @ P, S, V @ Oh.mT


def _orthonormal(Y: Tensor) -> Tensor:
    return _ratio(Y, _frobenius(Y)) if Y.size(-1) == 1 else torch.linalg.qr(Y)[0]


def _noise(X: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
    """Columns of norm about one, the same for every matrix, so that results don't depend on the grouping."""
    generator = generator or torch.Generator(X.device).manual_seed(0)
    noise = torch.randn(X.size(-1), k, dtype=X.dtype, device=X.device, generator=generator)
    return (noise / math.sqrt(X.size(-1))).expand(X.size(0), -1, -1)
