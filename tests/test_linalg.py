"""Matrix sign, restoration and singular triplets, against the float64 SVD and against what the mathematics demands."""

import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from msign_lightning import Restoration, linalg
from msign_lightning.linalg import (
    check_options,
    default_rtol,
    gaussian_stable_rank,
    msign,
    restore,
    restore_,
    stable_rank,
    top_singular_triplets,
)

METHODS = ("svd", "polynomial", "polynomial_tf32", "polynomial_bf16")
RULES = ("msign", "cap")
SHAPES = ((16, 16), (64, 64), (128, 24), (33, 96))

seeds = st.integers(0, 2**31)
few = settings(max_examples=15, deadline=None, derandomize=True)


def random_orthonormal(m, n, generator):
    return torch.linalg.qr(torch.randn(m, n, dtype=torch.float64, generator=generator)).Q


def with_spectrum(S, m, n, seed=0):
    """A float64 matrix with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    k = len(S)
    return (random_orthonormal(m, k, generator) * S.double()) @ random_orthonormal(n, k, generator).T


def with_condition(condition, m, n, seed=0):
    return with_spectrum(torch.logspace(0, -math.log10(condition), min(m, n)), m, n, seed).float()


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_sign(W):
    U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U @ Vh


def error(actual, expected):
    """Relative Frobenius error."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# msign


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e6])
@pytest.mark.parametrize(
    "method, tolerance", [("svd", 1e-5), ("auto", 1e-5), ("polynomial", 5e-3), ("polynomial_tf32", 5e-3)]
)
def test_msign_is_the_polar_factor(method, tolerance, condition, shape):
    W = with_condition(condition, *shape)
    assert error(msign(W, method=method), exact_sign(W)) <= tolerance


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_products_are_accurate_enough_up_to_condition_1e4(shape):
    W = with_condition(1e4, *shape)
    sign = msign(W, method="polynomial_bf16")
    assert error(sign, exact_sign(W)) <= 5e-2
    assert error(sign, msign(W, method="polynomial")) > 1e-3  # it did round


@pytest.mark.parametrize(
    "method, tolerance", [("svd", 1e-5), ("polynomial", 5e-3), ("polynomial_tf32", 5e-3), ("polynomial_bf16", 5e-2)]
)
def test_msign_of_a_larger_matrix(method, tolerance):
    W = with_condition(1e4, 288, 256)
    assert error(msign(W, method=method), exact_sign(W)) <= tolerance


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)],
)
def test_results_have_the_dtype_and_the_accuracy_of_the_input(dtype, tolerance):
    W = with_condition(10, 24, 40).to(dtype)
    for result in (msign(W), restore(W) / W.double().norm() * 24**0.5):
        assert error(result, exact_sign(W)) <= tolerance
    assert msign(W).dtype == restore(W).dtype == dtype


def test_float64_input_is_computed_in_float64_by_polynomials_too():
    W = with_condition(1e4, 20, 20).double()
    assert error(msign(W, method="polynomial"), exact_sign(W)) < 1e-9


@pytest.mark.parametrize("method", METHODS[:2])
@given(
    seed=seeds, m=st.integers(1, 24), n=st.integers(1, 24), log_condition=st.floats(0, 3), log_scale=st.floats(-30, 30)
)
@few
def test_msign_has_the_symmetries_of_the_polar_factor(method, seed, m, n, log_condition, log_scale):
    W = with_condition(10**log_condition, m, n, seed)
    sign = msign(W, method=method)
    tolerance = 1e-4 * math.sqrt(min(m, n))

    generator = torch.Generator().manual_seed(seed + 1)
    Q, R = random_orthonormal(m, m, generator), random_orthonormal(n, n, generator)
    rotated = msign((Q @ W.double() @ R).float(), method=method)
    torch.testing.assert_close(rotated.double(), Q @ sign.double() @ R, atol=tolerance, rtol=0)

    torch.testing.assert_close(msign(W * 10**log_scale, method=method), sign, atol=tolerance, rtol=0)
    torch.testing.assert_close(msign(W.mT, method=method), sign.mT, atol=tolerance, rtol=0)
    torch.testing.assert_close(msign(sign, method=method), sign, atol=tolerance, rtol=0)


def test_singular_values_below_rtol_are_dropped():
    W = with_spectrum(torch.tensor([1.0, 0.5, 1e-3, 1e-9]), 12, 8).float()
    for rtol, rank in ((None, 3), (1e-2, 2), (0.6, 1), (0.0, 8)):
        sign = msign(W, method="svd", rtol=rtol)
        singular_values = torch.linalg.svdvals(sign.double())
        expected = torch.tensor([1.0] * rank + [0.0] * (8 - rank), dtype=torch.float64)
        torch.testing.assert_close(singular_values, expected, atol=1e-5, rtol=0)


def test_polynomials_lift_singular_values_below_rtol_only_partly():
    W = with_spectrum(torch.tensor([1.0] * 4 + [1e-5] * 4), 8, 8).float()
    small = torch.linalg.svdvals(msign(W, method="polynomial", rtol=1e-2))[4:]
    assert (small < 0.1).all()
    assert (torch.linalg.svdvals(msign(W, method="polynomial"))[4:] > 0.99).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_noise_of_half_precision_storage_is_not_lifted(dtype):
    W = with_spectrum(torch.linspace(1, 0.5, 16), 256, 256).to(dtype)
    kept = torch.linalg.svdvals(msign(W, method="svd").double())
    assert (kept > 0.5).sum() == 16
    assert (torch.linalg.svdvals(msign(W, method="svd", rtol=1e-6).double()) > 0.5).sum() > 240


# restore


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
@given(
    seed=seeds, m=st.integers(1, 24), n=st.integers(1, 24), log_condition=st.floats(0, 5), log_scale=st.floats(-30, 30)
)
@few
def test_restore_keeps_the_frobenius_norm(method, rule, seed, m, n, log_condition, log_scale):
    W = with_condition(10**log_condition, m, n, seed) * 10**log_scale
    restored = restore(W, rule=rule, method=method)
    assert restored.double().norm().item() == pytest.approx(W.double().norm().item(), rel=1e-5)


@pytest.mark.parametrize("method", METHODS[:3])
@pytest.mark.parametrize("shape", SHAPES)
def test_restore_lifts_the_stable_rank_to_the_rank(shape, method):
    W = with_condition(1e3, *shape)
    assert stable_rank(W) < 6
    assert stable_rank(restore(W, method=method)).item() == pytest.approx(min(shape), rel=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_restore_lifts_a_deficient_matrix_to_its_own_rank(rank):
    W = with_spectrum(torch.linspace(3, 1, rank), 20, 10).float()
    restored = restore(W, method="svd")
    assert stable_rank(restored).item() == pytest.approx(rank, rel=1e-5)
    torch.testing.assert_close(restored, W.norm() * msign(W, method="svd") / math.sqrt(rank), atol=1e-6, rtol=0)


def test_restoration_that_would_overflow_the_dtype_leaves_the_matrix_alone():
    W = torch.stack((torch.full((32, 32), 6e4) + 30 * gaussian(32, 32), gaussian(32, 32))).half()
    restored = restore(W)
    assert same_bits(restored[0], W[0])
    assert stable_rank(restored[1]).item() == pytest.approx(32, rel=1e-3)


# every member on its own


def difficult_batch():
    """Matrices 24 × 32 that break careless code, each beside the others."""
    ordinary = with_condition(100, 24, 32)
    matrices = {"ordinary": ordinary, "zero": torch.zeros(24, 32)}
    for name, value in (("nan", math.nan), ("inf", math.inf), ("negative_inf", -math.inf)):
        matrices[name] = ordinary.clone()
        matrices[name][3, 5] = value
    matrices["all_nan"] = torch.full((24, 32), math.nan)
    matrices["rank_one"] = gaussian(24, 1) @ gaussian(1, 32, seed=1)
    matrices["huge"] = ordinary * 1e30
    matrices["tiny"] = ordinary * 1e-30
    matrices["subnormal"] = ordinary * 1e-39
    matrices["one_entry"] = torch.zeros(24, 32)
    matrices["one_entry"][2, 7] = -3.0
    matrices["zero_row_and_column"] = ordinary.clone()
    matrices["zero_row_and_column"][4] = 0
    matrices["zero_row_and_column"][:, 9] = 0
    matrices["gaussian"] = gaussian(24, 32, seed=2)
    return matrices


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("function", ["sign", *RULES])
def test_no_member_of_a_batch_touches_another(function, method, transposed):
    matrices = {k: W.mT.contiguous() if transposed else W for k, W in difficult_batch().items()}

    def apply(W):
        return msign(W, method=method) if function == "sign" else restore(W, rule=function, method=method)

    batch = torch.stack(list(matrices.values()))
    original = batch.clone()
    tolerance = 5e-2 if method == "polynomial_bf16" else 2e-3
    result = dict(zip(matrices, apply(batch), strict=True))
    assert same_bits(batch, original)
    for name, W in matrices.items():
        if W.isfinite().all():
            assert result[name].isfinite().all(), name
            scale = W.abs().max().double() if function != "sign" else 1.0
            scale = scale if scale > 0 else 1.0
            torch.testing.assert_close(result[name] / scale, apply(W) / scale, atol=tolerance, rtol=0, msg=name)
        else:
            assert same_bits(result[name], W), name
    assert not result["zero"].any()
    reference = torch.linalg.svdvals(result["ordinary"].double())
    for name, scale in (("huge", 1e30), ("tiny", 1e-30)):
        scale = 1 if function == "sign" else scale
        torch.testing.assert_close(
            torch.linalg.svdvals(result[name].double() / scale), reference, atol=0, rtol=tolerance, msg=name
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", RULES)
def test_report_tells_what_was_done(rule, method):
    matrices = difficult_batch()
    X = torch.stack(list(matrices.values()))
    report = restore_(X, rule=rule, method=method)
    changed = dict(zip(matrices, report.changed.tolist(), strict=True))
    limit = gaussian_stable_rank(24, 32)
    for i, (name, W) in enumerate(matrices.items()):
        finite = bool(W.isfinite().all())
        assert report.finite[i] == finite, name
        assert same_bits(X[i], W) == (not changed[name] or name == "one_entry"), name  # which is restored already
        assert changed[name] == (finite and bool(W.any()) and (rule == "msign" or stable_rank(W).item() < limit)), name
        for rank, matrix in ((report.stable_rank_before[i], W), (report.stable_rank_after[i], X[i])):
            if name == "subnormal":
                continue  # where rounding to storage changes the spectrum
            assert rank.isnan() != finite, name
            if finite:
                accuracy = 1e-5 if method == "svd" else 0.02
                assert rank.item() == pytest.approx(stable_rank(matrix).item(), rel=accuracy), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4), (2, 3, 4, 6), (1, 9), (9, 1), (1, 1), (0, 4, 5), (2, 0, 4, 5)])
def test_any_number_of_batch_dimensions(shape, rule, method):
    W = gaussian(*shape)
    assert msign(W, method=method).shape == shape
    assert restore(W, rule=rule, method=method).shape == shape
    assert stable_rank(W).shape == shape[:-2]
    X = W.clone()
    report = restore_(X, rule=rule, method=method)
    torch.testing.assert_close(X, restore(W, rule=rule, method=method), atol=1e-6, rtol=0)
    assert all(field.shape == shape[:-2] for field in report)
    U, S, V = top_singular_triplets(W)
    assert (U.shape, S.shape, V.shape) == ((*shape[:-1], 1), (*shape[:-2], 1), (*shape[:-2], shape[-1], 1))


@pytest.mark.parametrize("method", METHODS)
def test_neither_layout_nor_gradients_matter(method):
    W = gaussian(3, 8, 12)
    expected = restore(W, method=method)
    views = (W.mT.contiguous().mT, W[:, None].expand(-1, 2, -1, -1)[:, 1], W.clone().requires_grad_())
    for view in views:
        restored = restore(view, method=method)
        assert not restored.requires_grad
        assert restored.is_contiguous() or not view.is_contiguous()
        torch.testing.assert_close(restored, expected, atol=1e-6, rtol=0)


# the state of the process around


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", RULES)
def test_autocast_changes_nothing(rule, method):
    W = gaussian(2, 24, 24) ** 5
    expected = msign(W, method=method), restore(W, rule=rule, method=method), *top_singular_triplets(W, 2)
    with torch.autocast("cpu", torch.bfloat16):
        actual = msign(W, method=method), restore(W, rule=rule, method=method), *top_singular_triplets(W, 2)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


class OutOfMemory(TorchDispatchMode):
    """Fails at the n-th matrix product, and records with which precision each was to be done."""

    def __init__(self, fail_at):
        super().__init__()
        self.fail_at, self.precisions = fail_at, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
            self.precisions.append(
                {"ieee": "highest", "tf32": "high"}[newer] if newer else torch.get_float32_matmul_precision()
            )
            if len(self.precisions) == self.fail_at:
                raise torch.OutOfMemoryError
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize(
    "method, inside", [("polynomial", "highest"), ("polynomial_tf32", "high"), ("polynomial_bf16", "high")]
)
def test_matmul_precision_is_local_even_when_something_fails(method, inside, before):
    torch.set_float32_matmul_precision(before)
    try:
        with OutOfMemory(fail_at=10) as products, pytest.raises(torch.OutOfMemoryError):
            msign(gaussian(16, 16), method=method)
        assert torch.get_float32_matmul_precision() == before
        restore(gaussian(16, 16), method=method)
        top_singular_triplets(gaussian(16, 16))
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(products.precisions) == {inside}


if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # PyTorch 2.9 and newer

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("setting", ["cuda", "mkldnn"])
    def test_newer_precision_settings_are_kept_and_do_no_harm(setting, method):
        backend = getattr(torch.backends, setting).matmul
        before, backend.fp32_precision = backend.fp32_precision, "tf32"
        try:
            msign(gaussian(16, 16), method=method)
            assert backend.fp32_precision == "tf32"
        finally:
            backend.fp32_precision = before


@pytest.mark.parametrize("shape", [(3, 256, 256), (6, 256, 128), (6, 128, 256)])
def test_polynomial_needs_three_times_the_memory_of_its_input(shape, tmp_path):
    X = gaussian(*shape)
    restore_(X.clone(), method="polynomial")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        restore_(X, method="polynomial")
    trace = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = peak = X.nbytes
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    assert 2 * X.nbytes < peak < 3.01 * X.nbytes


class OnDevice(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU, which a CPU can't show, and counts what would be kernels."""

    READING = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_linalg_svd")

    def __init__(self):
        super().__init__()
        self.kernels = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._opname, kwargs or {}
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name.startswith("index") else []
        if name in self.READING or masks or (name == "_to_copy" and kwargs.get("device") is not None):
            raise AssertionError(f"{name} waits for the device")
        if not (func.is_view or name in ("empty", "empty_like", "new_empty", "scalar_tensor", "_unsafe_view")):
            self.kernels[name] += 1
        return func(*args, **kwargs)


class HostReads(TorchFunctionMode):
    """Counts the methods that bring values to the host; on a CPU these read memory below the dispatcher."""

    NAMES = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", None) in self.NAMES:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("read", [torch.Tensor.item, bool, torch.nonzero, lambda x: x[x > 0], torch.linalg.svd])
def test_reading_on_the_host_is_refused(read):
    with OnDevice(), pytest.raises(AssertionError, match="waits for the device"):
        read(torch.ones(1, 1))


@pytest.mark.parametrize("shape", [(3, 40, 24), (3, 24, 40), (1, 300, 300)])
@pytest.mark.parametrize("method", METHODS[1:])
def test_polynomials_never_wait_for_the_device(method, shape):
    X = gaussian(*shape)
    X[0, 0, 0] = math.nan
    restore_(X.clone(), method=method)  # makes the schedule, on the host
    with OnDevice(), HostReads() as reads:
        restore_(X, method=method)
        msign(X, method=method)
        top_singular_triplets(X)
    assert reads.names == []


@pytest.mark.parametrize("method", METHODS[1:3])
def test_a_step_of_a_polynomial_is_three_products_and_two_other_operators(method):
    X = gaussian(3, 24, 40)
    arithmetic = linalg._ARITHMETIC[method]
    steps = len(linalg.minimax_schedule(arithmetic.floor, arithmetic.safety, arithmetic.polish))
    restore_(X.clone(), method=method)
    with OnDevice() as device:
        restore_(X, method=method)
    assert device.kernels["baddbmm"] == steps - 1
    assert device.kernels["where"] + device.kernels["add_"] <= 2 * steps + 12
    assert sum(device.kernels.values()) <= 5 * steps + 76


def test_an_application_is_one_transfer_to_the_host():
    model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 24).bfloat16())})
    restoration = Restoration(model, targets=["mlp.*"], method="polynomial")
    restoration.apply()
    with OnDevice(), HostReads() as reads:
        restoration.apply()
    assert reads.names == ["tolist"]


@pytest.mark.parametrize("method, accuracy", [("polynomial", 1e-5), ("polynomial_bf16", 2e-2)])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_stable_rank_after_is_that_of_the_result(rank, method, accuracy):
    X = with_spectrum(torch.linspace(1, 0.01, rank), 24, 40).float()
    report = restore_(X, method=method)
    assert report.stable_rank_after.item() == pytest.approx(stable_rank(X).item(), rel=accuracy)


# schedule


def test_rounding_never_blows_singular_values_up_which_it_would_without_safety(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    n, uniform = 48, torch.rand(16, 48, generator=generator)
    spread = 10 ** (-5 * uniform[:, :1] * uniform)
    cliff = torch.where(torch.arange(n) < torch.randint(1, n, (16, 1), generator=generator), 1.0, 1e-6)
    W = torch.stack([with_spectrum(s, n, n, seed) for seed, s in enumerate(torch.cat((spread, cliff)))]).float()
    for method in METHODS[1:]:
        assert torch.linalg.matrix_norm(msign(W, method=method), 2).max() < 1.05
    unsafe = linalg._ARITHMETIC["polynomial_bf16"]._replace(safety=0.0)
    monkeypatch.setitem(linalg._ARITHMETIC, "polynomial_bf16", unsafe)
    assert not torch.linalg.matrix_norm(msign(W, method="polynomial_bf16").nan_to_num(9, 9, 9), 2).max() < 1.05


# rule "cap"


def capped_by_bisection(S, limit):
    """The definition, naively: the threshold that gives the stable rank wanted."""
    low, high = 0.0, S.max().item()
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if S.clamp(max=tau).square().sum() / tau**2 > limit else (low, tau)
    return S.clamp(max=tau)


def collapsed_spectra():
    """Spectra of 64 × 96 matrices below the stable rank of a random one, by what their restoration needs."""
    bulk = torch.linalg.svdvals(gaussian(64, 96).double())
    return {
        "one_spike": torch.cat((5 * bulk[:1], bulk[1:])),
        "few_spikes": torch.cat((torch.linspace(4, 1.5, 6) * bulk[0], bulk[6:])),
        "barely_collapsed": torch.cat((1.05 * bulk[:1], bulk[1:])),
        "severely_collapsed": torch.cat((300 * bulk[:1], bulk[1:])),
        "power_law": 1.0 / torch.arange(1, 65) ** 0.5,
        "many_spikes": torch.cat((torch.full((17,), 10.0), torch.linspace(1, 0.1, 47))),
        "deep_decay": torch.logspace(0, -4, 64),
    }


@pytest.mark.parametrize("method", ["svd", "polynomial"])
@pytest.mark.parametrize("name", collapsed_spectra())
def test_cap_agrees_with_bisection_and_reaches_the_stable_rank_of_a_random_matrix(name, method):
    S = collapsed_spectra()[name].double()
    W = with_spectrum(S, 64, 96).float()
    limit = gaussian_stable_rank(64, 96)
    assert stable_rank(W) < limit
    restored = restore(W, rule="cap", method=method)
    tolerance = 1e-5 if method == "svd" else 1e-3
    assert stable_rank(restored).item() == pytest.approx(limit, rel=tolerance)
    capped = capped_by_bisection(S, limit)
    expected = with_spectrum(capped * S.norm() / capped.norm(), 64, 96)
    assert error(restored, expected) < tolerance


def test_cap_by_triplets_hands_over_to_the_svd_what_it_cannot_do():
    spectra = collapsed_spectra()
    W = torch.stack([with_spectrum(S, 64, 96) for S in spectra.values()]).float()
    exact, fast = (restore(W, rule="cap", method=method) for method in ("svd", "polynomial"))
    handed_over = {name for name, a, b in zip(spectra, exact, fast, strict=True) if torch.equal(a, b)}
    assert handed_over == {"many_spikes", "deep_decay"}


def test_cap_by_triplets_hands_over_what_has_not_converged():
    # The four values to be cut stand out too little from those which are not.
    S = torch.tensor([1.1] * 4 + [0.99] * 43 + [0.2] * 17)
    W = with_spectrum(S, 64, 2048).float()
    exact, fast = (restore(W, rule="cap", method=method) for method in ("svd", "polynomial"))
    assert torch.equal(exact, fast)
    assert not torch.equal(exact, W)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cap_leaves_healthy_matrices_alone_bit_for_bit(dtype, method):
    W = torch.stack((msign(gaussian(32, 32)), with_spectrum(torch.linspace(1, 0.5, 32), 32, 32).float())).to(dtype)
    assert (stable_rank(W) > gaussian_stable_rank(32, 32)).all()
    assert same_bits(restore(W, rule="cap", method=method), W)


@pytest.mark.parametrize("method", ["svd", "polynomial"])
@pytest.mark.parametrize("rank", [1, 2, 8])
def test_cap_of_a_rank_below_its_aim_is_msign(rank, method):
    W = with_spectrum(torch.linspace(3, 1, rank) ** 2, 40, 40).float()
    restored = restore(W, rule="cap", method=method)
    torch.testing.assert_close(restored, restore(W, method="svd"), atol=1e-6, rtol=0)


def test_cap_cuts_the_top_and_scales_the_rest():
    S = torch.cat((torch.tensor([9.0, 7.0]), torch.linspace(2, 1, 30)))
    new = torch.linalg.svdvals(restore(with_spectrum(S, 32, 32).float(), rule="cap").double())
    torch.testing.assert_close(new[1], new[0], atol=0, rtol=1e-5)
    torch.testing.assert_close(new[2:] / S[2:], (new[2] / S[2]).expand(30), atol=0, rtol=1e-5)
    assert new[2] > S[2]


# stable rank, singular triplets


@pytest.mark.parametrize("shape", SHAPES)
def test_stable_rank_is_its_definition(shape):
    W = with_condition(50, *shape)
    S = torch.linalg.svdvals(W.double())
    assert stable_rank(W).item() == pytest.approx((S.square().sum() / S[0] ** 2).item(), rel=1e-6)
    assert stable_rank(W).dtype == torch.float32
    assert stable_rank(W.double()).dtype == torch.float64


@pytest.mark.parametrize("shape", [(300, 300), (400, 100), (50, 600)])
def test_gaussian_stable_rank_is_that_of_a_random_matrix(shape):
    assert stable_rank(gaussian(*shape)).item() == pytest.approx(gaussian_stable_rank(*shape), rel=0.06)
    assert gaussian_stable_rank(32, 32) == pytest.approx(8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_top_triplets_are_those_of_the_svd(shape, k, dtype):
    S = torch.cat((torch.tensor([8.0, 5.0, 3.0]), torch.linspace(1, 0.1, min(shape) - 3)))
    W = (with_spectrum(S, *shape) * 1e-25).to(dtype)
    U, singular_values, V = top_singular_triplets(W, k, iterations=12)
    accuracy = 1e-5 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(singular_values * 1e25, S[:k].to(dtype), atol=0, rtol=accuracy)
    exact_U, _, exact_Vh = torch.linalg.svd(W.double(), full_matrices=False)
    for vectors, exact in ((U, exact_U), (V, exact_Vh.mT)):
        aligned = (vectors.double() * exact[:, :k]).sum(0).abs()
        torch.testing.assert_close(aligned, torch.ones(k, dtype=torch.float64), atol=1e-5, rtol=0)
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(k, dtype=dtype), atol=1e-5, rtol=0)
    torch.testing.assert_close(W @ V * 1e25, U * singular_values * 1e25, atol=1e-4, rtol=0)


@pytest.mark.parametrize("k", [1, 4])
def test_triplets_come_in_order_and_from_below(k):
    W = gaussian(5, 60, 40)
    S = top_singular_triplets(W, k)[1]
    exact = torch.linalg.svdvals(W.double())[:, :k]
    assert (S.diff(dim=-1) <= 0).all()
    assert (S / exact <= 1 + 1e-5).all()
    assert (S / exact >= 0.8).all()


@pytest.mark.parametrize("k", [1, 3])
def test_warm_start_is_better(k):
    W = with_spectrum(torch.linspace(2, 1, 24), 24, 24).float()
    V = top_singular_triplets(W, 24)[2][:, :k]
    drifted = W + 0.01 * gaussian(24, 24)
    exact = torch.linalg.svdvals(drifted)[0]
    warm = top_singular_triplets(drifted, k, iterations=2, V=V)[1][0]
    cold = top_singular_triplets(drifted, k, iterations=2)[1][0]
    assert 2 * (exact - warm) < exact - cold
    assert warm / exact > 0.99


@pytest.mark.parametrize("k", [1, 3])
def test_warm_start_finds_a_direction_orthogonal_to_it(k):
    diagonal = torch.linspace(2, 1, 24)
    V = torch.eye(24)[:, :k]  # exactly the singular vectors, until another value rises
    diagonal[-1] = 20.0
    assert top_singular_triplets(diagonal.diag(), k, V=V)[1][0].item() == pytest.approx(20)


@pytest.mark.parametrize("k", [1, 4])
def test_triplets_of_difficult_batches(k):
    matrices = difficult_batch()
    U, S, V = top_singular_triplets(torch.stack(list(matrices.values())), k)
    assert U.isfinite().all()
    assert V.isfinite().all()
    for i, (name, W) in enumerate(matrices.items()):
        if W.isfinite().all():
            alone = top_singular_triplets(W, k)[1]
            torch.testing.assert_close(S[i], alone, atol=1e-5 * alone.max().item(), rtol=0, msg=name)
        else:
            assert S[i].isnan().all(), name
    warm = top_singular_triplets(gaussian(len(matrices), 24, 32), k, V=torch.full_like(V, math.nan))
    assert all(part.isfinite().all() for part in warm)


def test_triplets_are_deterministic_unless_given_a_generator():
    W = gaussian(3, 20, 30)
    state = torch.get_rng_state()
    first, second = top_singular_triplets(W, 2, iterations=1), top_singular_triplets(W, 2, iterations=1)
    assert all(map(torch.equal, first, second))
    assert torch.equal(torch.get_rng_state(), state)
    seven, again, eight = (
        top_singular_triplets(W, 2, iterations=1, generator=torch.Generator().manual_seed(seed))[1]
        for seed in (7, 7, 8)
    )
    assert torch.equal(seven, again)
    assert not torch.equal(seven, eight)


# errors


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: msign(torch.ones(3)), r"shape \(\.\.\., m, n\).*got \(3,\)"),
        (lambda: restore(torch.ones(2, 0)), r"m, n >= 1, got \(2, 0\)"),
        (lambda: stable_rank(torch.ones(2, 2, dtype=torch.int64)), "float64, got torch.int64"),
        (lambda: msign(torch.ones(2, 2, dtype=torch.complex64)), "got torch.complex64"),
        (lambda: default_rtol(torch.bool), "got torch.bool"),
        (lambda: msign(torch.eye(2), method="newton"), "method must be one of .*'svd'.*, got 'newton'"),
        (lambda: restore(torch.eye(2), rule="clip"), r"rule must be one of \('msign', 'cap'\), got 'clip'"),
        (lambda: restore(torch.eye(2), rtol=1.0), r"rtol must be in \[0, 1\), got 1.0"),
        (lambda: msign(torch.eye(2), rtol=-1e-9), "got -1e-09"),
        (lambda: check_options(rtol=math.nan), "got nan"),
        (lambda: restore_(torch.eye(4).half()), "X must be contiguous float32 or float64, got torch.float16"),
        (lambda: restore_(torch.ones(4, 6).mT), r"X must be contiguous.*strides \(1, 6\)"),
        (lambda: gaussian_stable_rank(0, 3), "m and n must be positive, got 0 and 3"),
        (lambda: top_singular_triplets(torch.ones(3, 4), 4), "k must be between 1 and .* 3, got 4"),
        (lambda: top_singular_triplets(torch.eye(3), iterations=-1), "iterations must not be negative, got -1"),
        (lambda: top_singular_triplets(torch.eye(3), V=torch.ones(3)), r"V must have shape \(3, 1\), got \(3,\)"),
    ],
)
def test_errors_name_the_rule_and_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_options_in_range_pass():
    check_options()
    check_options(rule="cap", method="polynomial", rtol=0.0)
