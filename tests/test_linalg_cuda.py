"""What only a CUDA device can show: TF32 and bfloat16 products, the choice of "auto", memory, and no waiting."""

import math

import pytest
import torch

from msign_lightning.linalg import gaussian_stable_rank, msign, restore, restore_, stable_rank, top_singular_triplets

pytestmark = pytest.mark.gpu

POLYNOMIALS = ("polynomial", "polynomial_tf32", "polynomial_bf16")
SHAPES = ((256, 256), (512, 320), (256, 640), (96, 64))


def with_spectrum(S, m, n, seed=0):
    """A matrix on the device with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(k, len(S), dtype=torch.float64, generator=generator)).Q for k in (m, n))
    return ((U * S.double()) @ V.T).float().cuda()


def batch_with_condition(condition, m, n, size=3):
    S = torch.logspace(0, -math.log10(condition), min(m, n))
    return torch.stack([with_spectrum(S, m, n, seed) for seed in range(size)])


def worst_error(actual, expected):
    """Largest relative Frobenius error of the batch."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return ((actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()


def exact_sign(W):
    U, _, Vh = torch.linalg.svd(W.double().cpu(), full_matrices=False)
    return U @ Vh


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "method, condition, tolerance",
    [
        ("svd", 1e6, 1e-5),
        ("polynomial", 1e6, 1e-2),
        ("polynomial_tf32", 1, 1e-2),
        ("polynomial_tf32", 1e4, 1e-2),
        ("polynomial_tf32", 1e6, 1e-2),
        ("polynomial_bf16", 1, 8e-2),
        ("polynomial_bf16", 1e4, 5e-2),
    ],
)
def test_msign_of_a_batch_is_the_polar_factor(method, condition, tolerance, shape):
    W = batch_with_condition(condition, *shape)
    sign = msign(W, method=method)
    assert sign.device == W.device
    assert worst_error(sign, exact_sign(W)) <= tolerance


def test_methods_multiply_as_they_say():
    W = batch_with_condition(1e3, 512, 512)
    errors = [worst_error(msign(W, method=method), exact_sign(W)) for method in POLYNOMIALS]
    assert errors == sorted(errors)
    assert errors[1] > 2 * errors[0]
    assert errors[2] > 2 * errors[1]


@pytest.mark.parametrize("side, chosen", [(255, "polynomial"), (256, "polynomial_tf32")])
def test_auto_chooses_by_the_short_side(side, chosen):
    W = batch_with_condition(100, side, 512)
    assert torch.equal(msign(W), msign(W, method=chosen))
    assert torch.equal(restore(W), restore(W, method=chosen))


def test_auto_is_exact_for_float64():
    W = batch_with_condition(1e4, 256, 256, size=1).double()
    assert worst_error(msign(W), exact_sign(W)) < 1e-10


@pytest.mark.parametrize("rule", ["msign", "cap"])
@pytest.mark.parametrize("method", ["svd", *POLYNOMIALS])
def test_no_member_of_a_batch_touches_another(method, rule):
    ordinary = batch_with_condition(100, 256, 256, size=1)[0]
    poisoned = ordinary.clone()
    poisoned.view(torch.int32)[3, 5] = 0x7FC01234  # a NaN that arithmetic would not reproduce
    infinite = ordinary.clone()
    infinite[0, 0] = math.inf
    W = torch.stack((poisoned, ordinary, torch.zeros_like(ordinary), ordinary * 1e30, infinite, ordinary * 1e-30))
    X = W.clone()
    report = restore_(X, rule=rule, method=method)
    assert report.changed.tolist() == [False, True, False, True, False, True]
    assert torch.equal(X[~report.changed].view(torch.int32), W[~report.changed].view(torch.int32))
    alone = restore(ordinary[None], rule=rule, method=method)
    for i, scale in ((1, 1.0), (3, 1e30), (5, 1e-30)):
        assert (X[i].double().norm() / W[i].double().norm()).item() == pytest.approx(1, rel=1e-5)
        assert worst_error(X[i : i + 1].double() / scale, alone) < (5e-2 if method == "polynomial_bf16" else 1e-3)


@pytest.mark.parametrize("method", ["svd", "polynomial"])
def test_cap_reaches_the_stable_rank_of_a_random_matrix(method):
    few = torch.cat((torch.linspace(8, 3, 5), torch.linspace(1, 0.1, 251)))
    many = torch.logspace(0, -4, 256)
    W = torch.stack([with_spectrum(S, 256, 384) for S in (few, many)])
    restored = restore(W, rule="cap", method=method)
    limit = torch.full((2,), gaussian_stable_rank(256, 384), device="cuda")
    torch.testing.assert_close(stable_rank(restored), limit, atol=0, rtol=1e-3)
    assert worst_error(restored, restore(W.cpu(), rule="cap", method="svd")) < 1e-3


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("method", POLYNOMIALS)
def test_tf32_is_local(method, before):
    W = batch_with_condition(100, 256, 256, size=1)
    expected = msign(W, method=method)
    torch.set_float32_matmul_precision(before)
    try:
        assert torch.equal(msign(W, method=method), expected)
        assert torch.get_float32_matmul_precision() == before
        assert torch.backends.cuda.matmul.allow_tf32 == (before != "highest")
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("shape", [(8, 1024, 1024), (8, 1024, 512), (8, 512, 1024)])
@pytest.mark.parametrize("method, times", [("polynomial", 3), ("polynomial_tf32", 3), ("polynomial_bf16", 5)])
def test_restoration_needs_a_few_times_the_memory_of_its_input(method, times, shape):
    X = torch.randn(shape, device="cuda")
    restore_(X.clone(), method=method)  # the libraries' workspaces are allocated once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - X.nbytes
    restore_(X, method=method)
    assert torch.cuda.max_memory_allocated() - others < (times + 0.05) * X.nbytes


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("method", POLYNOMIALS)
def test_polynomials_and_single_triplets_never_wait_for_the_device(method):
    W = torch.randn(2, 256, 320, device="cuda")
    V = top_singular_triplets(W)[2]
    msign(W, method=method)
    torch.cuda.set_sync_debug_mode("error")
    try:
        msign(W, method=method)
        report = restore_(W.clone(), method=method)
        top_singular_triplets(W, iterations=2, V=V)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert report.changed.all()


@pytest.mark.parametrize("method", POLYNOMIALS)
def test_autocast_changes_nothing(method):
    W = batch_with_condition(100, 256, 256, size=1)
    expected = msign(W, method=method)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(msign(W, method=method), expected)
