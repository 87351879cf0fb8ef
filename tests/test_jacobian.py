"""The Jacobians of blocks against explicit ones, of models as people run them, and what the paper's bound is worth."""

import copy
import gc
import math

import pytest
import torch
import torch.distributed as dist
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from msign_lightning.jacobian import BlockJacobians, JacobianReport
from msign_lightning.recipes.transformer import Transformer, TransformerConfig

D, L, T, VOCAB = 8, 3, 3, 16
N = T * D
GPT2 = {"vocab_size": VOCAB, "n_embd": D, "n_layer": L, "n_head": 2, "n_positions": 8, "bos_token_id": 0}
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": 12,
    "num_hidden_layers": L,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
}


def randomize_(model: nn.Module, std: float = 0.4) -> nn.Module:
    """Weights that make the blocks far from the identity, so that a part of a block left out would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=std, generator=generator)
    return model


def recipe(**config) -> nn.Module:
    config = {"vocab_size": VOCAB, "n_layers": L, "width": D, "mlp_width": 12} | config
    return randomize_(Transformer(TransformerConfig(**config))).double()


def hf(name: str, **config) -> nn.Module:
    model_class = getattr(transformers, name)
    return randomize_(model_class(model_class.config_class(**config, eos_token_id=0, pad_token_id=0))).double()


def nano_gpt() -> nn.Module:
    """Blocks in a `ModuleDict`, which call their attention with a mask of their own and return a tuple."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(D, 2, batch_first=True)
            self.mlp = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 12), nn.GELU(), nn.Linear(12, D))

        def forward(self, mask, *, hidden):
            hidden += self.attn(hidden, hidden, hidden, attn_mask=mask, need_weights=False)[0]  # in place
            return hidden + self.mlp(hidden), None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = nn.ModuleDict(
                {"wte": nn.Embedding(VOCAB, D), "h": nn.ModuleList(Block() for _ in range(L)), "ln_f": nn.LayerNorm(D)}
            )

        def forward(self, tokens):
            mask = torch.ones(tokens.size(1), tokens.size(1), dtype=torch.bool).triu(1)
            hidden = self.transformer["wte"](tokens)
            for block in self.transformer["h"]:
                hidden, _ = block(mask, hidden=hidden)
            return self.transformer["ln_f"](hidden)

    return randomize_(Model()).double()


MODELS = {
    "recipe": recipe,
    "recipe with everything": lambda: recipe(
        norm="rmsnorm", activation="swiglu", positions="rope", qk_norm=True, n_kv_heads=1
    ),
    "GPT-2": lambda: hf("GPT2LMHeadModel", **GPT2),
    "Llama": lambda: hf("LlamaForCausalLM", **COMMON, num_key_value_heads=1),
    "GPT-NeoX": lambda: hf("GPTNeoXForCausalLM", **COMMON),
    "nanoGPT": nano_gpt,
}
LISTS = {
    "recipe": "blocks",
    "recipe with everything": "blocks",
    "GPT-2": "transformer.h",
    "Llama": "model.layers",
    "GPT-NeoX": "gpt_neox.layers",
    "nanoGPT": "transformer.h",
}


def tokens(batch: int = 2, length: int = T) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def explicit(model: nn.Module, path: str, batch: torch.Tensor) -> list[torch.Tensor]:
    """The Jacobian of every block, of shape (B, N, N), by one backward per output."""
    calls = []

    def remember(block, args, kwargs):
        key = next(k for k, v in [*enumerate(args), *kwargs.items()] if torch.is_floating_point(v))
        calls.append((block, list(args), kwargs, key, (kwargs if isinstance(key, str) else args)[key].clone()))

    blocks = list(model.get_submodule(path))
    handles = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        model.eval()(batch, **({"use_cache": False} if hasattr(model, "config") and path != "blocks" else {}))
    for handle in handles:
        handle.remove()

    def jacobian(block, args, kwargs, key, hidden):
        def function(hidden):
            hidden = hidden.clone()
            new = {key: hidden}
            output = block(
                *[new.get(i, a) for i, a in enumerate(args)], **{k: new.get(k, a) for k, a in kwargs.items()}
            )
            return output if isinstance(output, torch.Tensor) else output[0]

        J = torch.autograd.functional.jacobian(function, hidden)
        return torch.stack([J[b, :, :, b].reshape(N, N) for b in range(len(batch))])

    assert [call[0] for call in calls] == blocks
    return [jacobian(*call) for call in calls]


def assert_same(report: JacobianReport, expected: JacobianReport, **close) -> None:
    assert report.blocks == expected.blocks
    assert_close(report[1:], expected[1:], **close)


class Linear(nn.Module):
    """Blocks h ↦ Jh on hidden states (B, 1, n), which are the input itself."""

    def __init__(self, *jacobians: torch.Tensor):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(J.size(1), J.size(0), bias=False) for J in jacobians)
        with torch.no_grad():
            for layer, J in zip(self.layers, jacobians, strict=True):
                layer.weight = nn.Parameter(J.clone())

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def measured(self, **kwargs):
        x = torch.zeros(1, 1, self.layers[0].in_features, dtype=self.layers[0].weight.dtype)
        return BlockJacobians(self, "layers", **kwargs).measure(x)


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_explicit_jacobians(name):
    model, batch = MODELS[name](), tokens()
    jacobians = explicit(copy.deepcopy(model), LISTS[name], batch)
    U, S, Vh = zip(*map(torch.linalg.svd, jacobians), strict=True)
    total = jacobians[0]
    for J in jacobians[1:]:
        total = J @ total

    report = BlockJacobians(model, iterations=N).measure(batch)

    assert report.blocks == tuple(f"{LISTS[name]}.{i}" for i in range(L))
    # The rotary embeddings compute in float32.
    close = {"rtol": 1e-5, "atol": 1e-5} if name in ("recipe with everything", "Llama") else {}
    assert_close(report.norms, torch.stack([s[:, 0] for s in S], 1), **close)
    cosines = [(Vh[i + 1][:, 0] * U[i][:, :, 0]).sum(-1).abs() for i in range(L - 1)]
    assert_close(report.alignments, torch.stack(cosines, 1), **close)
    assert_close(report.total, torch.linalg.matrix_norm(total, 2), **close)
    M, a = report.norms.amin(1), report.alignments.amin(1)
    assert_close(report.bound, (a * M) ** L / a)
    assert (report.bound <= report.total).all()


def test_default_iterations_converge_where_there_are_many_directions():
    model, batch = recipe(width=16), tokens(1, length=4)
    report = BlockJacobians(model).measure(batch)
    exact = BlockJacobians(model, iterations=4 * 16).measure(batch)
    assert_close(report.norms, exact.norms, rtol=1e-5, atol=0)
    assert_close(report.total, exact.total, rtol=1e-5, atol=0)
    assert_close(report.alignments, exact.alignments, rtol=0, atol=1e-3)


def test_every_sequence_is_measured_on_its_own():
    model, batch = recipe(), tokens(3)
    together = BlockJacobians(model).measure(batch)
    for i in range(3):
        alone = BlockJacobians(model).measure(batch[i : i + 1])
        for mine, theirs in zip(together[1:], alone[1:], strict=True):
            assert_close(mine[i : i + 1], theirs)


# --- the bound of Theorem 4.2 ------------------------------------------------------------------------------------


def test_bound_holds_while_a_model_trains():
    model, batch = recipe(vocab_size=VOCAB, width=16, n_layers=4, zero_query=False).float(), tokens(8, 9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    jacobians = BlockJacobians(model)
    for _ in range(3):
        report = jacobians.measure(batch[:2, :-1])
        assert (report.bound <= report.total).all()
        for _ in range(10):
            loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loss < math.log(VOCAB)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(2, 6))
def test_bound_holds_for_two_blocks(seed, n):
    generator = torch.Generator().manual_seed(seed)
    report = Linear(*torch.randn(2, n, n, generator=generator, dtype=torch.float64)).measured(iterations=n)
    assert report.bound <= report.total * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(2, 6))
def test_bound_holds_if_the_inner_blocks_have_rank_one(seed, n):
    first, last, *vectors = torch.randn(6, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inner = [v[0].outer(v[1]) for v in vectors]
    report = Linear(first, *inner, last).measured(iterations=n)
    assert report.bound <= report.total * (1 + 1e-9)


def test_collapsed_blocks_are_aligned_and_reach_the_bound():
    direction = torch.ones(4, dtype=torch.float64) / 2
    report = Linear(*[3 * direction.outer(direction)] * 5).measured()
    assert_close(report.alignments, torch.ones(1, 4, dtype=torch.float64))
    assert_close(report.norms, torch.full((1, 5), 3.0, dtype=torch.float64))
    assert_close(report.total, torch.tensor([3.0**5], dtype=torch.float64))
    assert_close(report.bound, report.total)


def test_bound_fails_where_a_minor_direction_cancels_the_top_one():
    """So the statement of Theorem 4.2 for three blocks or more is wrong; the docstring says so."""
    first = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64) / math.sqrt(2)
    middle = torch.diag(torch.tensor([1.0, 0.9], dtype=torch.float64))
    last = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64) / math.sqrt(2)
    report = Linear(first, middle, last).measured()
    assert_close(report.alignments, torch.full((1, 2), math.sqrt(0.5), dtype=torch.float64))
    assert_close(report.bound, torch.tensor([0.5], dtype=torch.float64))
    assert_close(report.total, torch.tensor([0.05], dtype=torch.float64))


# --- a measurement leaves no trace -------------------------------------------------------------------------------


def trained_gpt2() -> nn.Module:
    """In training mode, with dropout, a frozen module in evaluation mode and gradients."""
    model = hf("GPT2LMHeadModel", **GPT2, resid_pdrop=0.5, attn_pdrop=0.5).train()
    model.transformer.h[1].eval()
    model(tokens(), labels=tokens()).loss.backward()
    return model


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def graphs() -> int:
    gc.collect()
    return sum(type(o) is torch.Tensor and o.grad_fn is not None for o in gc.get_objects())


def test_leaves_the_model_alone():
    model = trained_gpt2()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    reached = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(reached.append)
    random, kept, existing = torch.get_rng_state(), graphs(), hooks(model)

    report = BlockJacobians(model).measure(tokens())

    assert not any(values.requires_grad for values in report[1:])
    assert graphs() == kept
    assert hooks(model) == existing
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert not reached
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert torch.equal(parameter.grad, gradients[name])


def test_leaves_the_model_alone_if_its_forward_fails():
    model = trained_gpt2()
    modes, existing = [module.training for module in model.modules()], hooks(model)
    jacobians = BlockJacobians(model)
    with pytest.raises(IndexError, match="index out of range"):
        jacobians.measure(torch.full((1, T), VOCAB))
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert hooks(model) == existing


def test_measures_without_dropout():
    model = trained_gpt2()
    dropping = BlockJacobians(model).measure(tokens())
    assert_same(dropping, BlockJacobians(model.eval()).measure(tokens()))


def test_random_draws_of_a_forward_are_taken_back():
    class Noisy(Linear):
        def forward(self, hidden):
            return super().forward(hidden + torch.rand_like(hidden))

    model, random = Noisy(*torch.eye(2).expand(2, 2, 2)), torch.get_rng_state()
    model.measured()
    assert torch.equal(torch.get_rng_state(), random)


# --- the batches of a training loop ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_next_training_batch_is_measured_and_not_disturbed(name):
    model, batch = MODELS[name]().train(), tokens(3)
    bare, expected = copy.deepcopy(model), BlockJacobians(copy.deepcopy(model)).measure(batch[:2])
    jacobians = BlockJacobians(model)
    existing = hooks(model)
    jacobians.arm(2)
    assert jacobians.result() is None
    with torch.no_grad():
        model.eval()(tokens(1))
    assert jacobians.result() is None  # which was validation
    call = {"input_ids": batch, "labels": batch} if isinstance(model, transformers.PreTrainedModel) else None
    for each in (model, bare):
        each.train()
        torch.manual_seed(0)  # for dropout
        out = each(**call).loss if call else each(batch).sum()
        out.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model(tokens(3))  # a second micro-batch
    jacobians.disarm()
    assert_same(jacobians.result(), expected)
    assert hooks(model) == existing
    for mine, theirs in zip(model.parameters(), bare.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    jacobians.arm()
    assert jacobians.result() is None
    jacobians.disarm()


def test_what_autocast_has_rounded_is_measured_without_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift = nn.Linear(D, D)
            self.encoder = Linear(*torch.randn(2, D, D))

        def forward(self, hidden):
            return self.encoder(self.lift(hidden))

    model = Model()
    jacobians = BlockJacobians(model, "encoder.layers")
    jacobians.arm(1)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, T, D))
    jacobians.disarm()
    norms = [torch.linalg.matrix_norm(layer.weight.detach(), 2) for layer in model.encoder.layers]
    assert_close(jacobians.result().norms, torch.stack(norms)[None])


# --- models as people run them -----------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled_blocks(model: nn.Module) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="aot_eager")
    return model


def checkpointed_blocks(model: nn.Module) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="aot_eager"),
    "compiled blocks": compiled_blocks,
    "checkpointed blocks": checkpointed_blocks,
    "DDP": DistributedDataParallel,
}


# PyTorch 2.13 itself looks at them where it compiles a block whose input has a gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_models_measure_as_bare_ones_and_train_on(name, process_group):
    model, batch = recipe(n_layers=2), tokens()
    expected = BlockJacobians(model).measure(batch)
    bare = copy.deepcopy(model)
    wrapped = WRAPPERS[name](model)
    wrapped(batch).sum().backward()
    report = BlockJacobians(wrapped).measure(batch)
    assert_same(report, expected)

    for _ in range(2):
        bare(batch).sum().backward()
    wrapped(batch).sum().backward()
    for mine, theirs in zip(model.parameters(), bare.parameters(), strict=True):
        assert_close(mine.grad, theirs.grad)


def test_context_of_the_caller_makes_no_difference():
    model, batch = recipe().float(), tokens()
    expected = BlockJacobians(model).measure(batch)
    for context in (torch.autocast("cpu", torch.bfloat16), torch.no_grad(), torch.inference_mode()):
        with context:
            assert_same(BlockJacobians(model).measure(batch), expected)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert_same(BlockJacobians(model).measure(batch), expected)


def test_half_precision_is_measured_in_float32():
    model, batch = recipe().float(), tokens()
    expected = BlockJacobians(model).measure(batch)
    report = BlockJacobians(model.bfloat16()).measure(batch)
    assert report.norms.dtype == report.alignments.dtype == torch.float32
    assert_close(report.norms, expected.norms, rtol=0.05, atol=0)
    assert_close(report.total, expected.total, rtol=0.1, atol=0)


@pytest.mark.gpu
def test_agrees_on_cuda():
    for name, make in MODELS.items():
        if name != "nanoGPT":  # which makes its mask on the CPU
            model, batch = make().float(), tokens()
            expected = BlockJacobians(model, iterations=N).measure(batch)
            random = torch.cuda.get_rng_state()
            report = BlockJacobians(model.cuda(), iterations=N).measure(batch.cuda())
            assert report.norms.is_cuda
            assert torch.equal(torch.cuda.get_rng_state(), random)
            assert_close([t.cpu() for t in report[1:]], list(expected[1:]), rtol=1e-3, atol=1e-3)


# --- over time ---------------------------------------------------------------------------------------------------


def test_repeated_measurements_get_closer():
    model, batch = recipe(width=16), tokens(1, length=6)
    exact = BlockJacobians(model, iterations=6 * 16).measure(batch)
    jacobians = BlockJacobians(model, iterations=2)
    errors = [(jacobians.measure(batch).norms / exact.norms - 1).abs().max() for _ in range(8)]
    assert errors[0] > 0.05
    assert errors[-1] < 0.02


def test_another_shape_starts_anew():
    model = recipe()
    jacobians = BlockJacobians(model, iterations=N)
    for batch in (tokens(), tokens(1, 2), tokens(3)):
        assert_same(jacobians.measure(batch), BlockJacobians(model, iterations=N).measure(batch))


def test_divergence_is_a_result_and_passes():
    model, batch = recipe(), tokens()
    expected = BlockJacobians(model, iterations=N).measure(batch)
    jacobians = BlockJacobians(model, iterations=N)
    weight = model.blocks[1].mlp.up_proj.weight
    value = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = math.nan
    report = jacobians.measure(batch)
    assert_close(report.norms[:, 0], expected.norms[:, 0])
    assert report.norms[:, 1:].isnan().all()
    assert report.alignments.isnan().all()
    assert report.total.isnan().all()
    assert math.isnan(report.metrics()["jacobian_total"])
    with torch.no_grad():
        weight[0, 0] = value
    assert_same(jacobians.measure(batch), expected)


def test_a_sequence_that_overflows_is_alone_in_it():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Identity() for _ in range(2))

        def forward(self, hidden):
            for layer in self.layers:
                hidden = layer(hidden.square())
            return hidden

    model = Square()
    for layer in model.layers:
        layer.forward = torch.exp
    report = BlockJacobians(model, "layers").measure(torch.tensor([[[0.5, 1.0]], [[0.5, 1e20]]]))
    assert report.norms[0].isfinite().all()
    assert report.norms[1].isnan().all()
    assert report.bound.isnan().tolist() == report.total.isnan().tolist() == [False, True]


@pytest.mark.parametrize("iterations", [2, 40])
def test_zero_and_low_rank_blocks_are_no_trouble(iterations):
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 6, generator=generator)
    report = Linear(u.outer(v), torch.zeros(6, 6), torch.eye(6)).measured(iterations=iterations)
    assert_close(report.norms, torch.stack([u.norm() * v.norm(), torch.tensor(0.0), torch.tensor(1.0)])[None])
    assert report.total == report.bound == 0
    assert report.alignments.isfinite().all()


def test_metrics_are_geometric_means_with_summaries_first():
    report = BlockJacobians(recipe(), iterations=N).measure(tokens())
    metrics = report.metrics(per_block=True)
    assert list(metrics) == [
        *(f"jacobian_{what}/{how}" for what in ("norm", "alignment") for how in ("min", "geometric_mean")),
        "jacobian_bound",
        "jacobian_total",
        *(f"jacobian_norm/blocks.{i}" for i in range(L)),
        *(f"jacobian_alignment/blocks.{i}" for i in range(1, L)),
    ]
    assert report.metrics() == dict(list(metrics.items())[:6])

    def mean(values):
        return pytest.approx(math.exp(values.log().mean().item()))

    assert metrics["jacobian_norm/geometric_mean"] == mean(report.norms)
    assert metrics["jacobian_norm/blocks.1"] == mean(report.norms[:, 1])
    assert metrics["jacobian_alignment/blocks.1"] == mean(report.alignments[:, 0])
    assert metrics["jacobian_alignment/min"] == mean(report.alignments.amin(1))
    M, a = metrics["jacobian_norm/min"], metrics["jacobian_alignment/min"]
    assert metrics["jacobian_bound"] == pytest.approx((a * M) ** L / a)
    assert metrics["jacobian_total"] == mean(report.total)


# --- which blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", ["transformer.h", "transformer.h.*", ["*.h.0", "*.h.1", "*.h.2"], "*.h*"])
def test_blocks_can_be_named(blocks):
    model = MODELS["GPT-2"]()
    assert BlockJacobians(model, blocks).blocks == BlockJacobians(model).blocks


def test_some_of_the_blocks_can_be_named():
    model, batch = recipe(), tokens()
    some = BlockJacobians(model, ["blocks.1", "blocks.2"], iterations=N).measure(batch)
    every = BlockJacobians(model, iterations=N).measure(batch)
    assert some.blocks == ("blocks.1", "blocks.2")
    assert_close(some.norms, every.norms[:, 1:])
    assert_close(some.alignments, every.alignments[:, 1:])


def test_a_sequential_of_blocks_is_a_list_of_them():
    class Residual(nn.Sequential):
        def forward(self, hidden):
            return hidden + super().forward(hidden)

    class Model(nn.Sequential):
        pass

    stack = nn.Sequential(*(Residual(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D)) for _ in range(L)))
    model = Model(nn.Linear(D, D), stack)
    assert BlockJacobians(model).blocks == ("1.0", "1.1", "1.2")
    assert BlockJacobians(model).measure(torch.randn(2, T, D)).norms.shape == (2, L)


T5 = {"vocab_size": VOCAB, "d_model": D, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, r"blocks must be names or globs .* got None and a model without a list of them"),
        (
            lambda: hf("T5ForConditionalGeneration", **T5),
            {},
            r"got None and several .*'encoder.block', 'decoder.block'",
        ),
        (recipe, {"blocks": "layers.*"}, r"blocks must match modules of the model, got 'layers.\*'.*\['blocks'\]"),
        (recipe, {"blocks": ["blocks", "nope"]}, "got 'nope'"),
        (recipe, {"blocks": "blocks.1"}, r"blocks must be two modules or more, got \['blocks.1'\]"),
        (recipe, {"blocks": []}, r"blocks must be two modules or more, got \[\]"),
        (recipe, {"iterations": 0}, "iterations must be a positive integer, got 0"),
        (recipe, {"iterations": 2.5}, "iterations must be a positive integer, got 2.5"),
    ],
)
def test_what_cannot_be_measured_is_refused(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        BlockJacobians(make(), **kwargs)


def test_sharded_weights_are_refused(process_group):
    model = recipe()
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.fsdp.fully_shard(model.blocks[0], mesh=mesh)
    with pytest.raises(ValueError, match="model must hold whole weights, got sharded ones"):
        BlockJacobians(model)


class Forward(Linear):
    """Linear blocks that are run by any function of the list of layers and the hidden states."""

    def __init__(self, function):
        super().__init__(*torch.eye(2).expand(2, 2, 2))
        self.function = function

    def forward(self, hidden):
        return self.function(self.layers, hidden)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda layers, h: layers[0](layers[1](layers[0](h))), "called once in a forward, got layers.0 called again"),
        (lambda layers, h: layers[1](h), r"called once in a forward, got \['layers.0'\] not called"),
        (lambda layers, h: layers[1](layers[0](h)[:, :0]), r"the same shape, got layers.1 from \(1, 0, 2\)"),
        (lambda layers, h: layers[0](input=[h]), "blocks must take hidden states, got layers.0 called without"),
    ],
)
def test_forwards_that_are_no_chain_of_blocks_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        Forward(function).measured()
    assert torch.is_grad_enabled()
