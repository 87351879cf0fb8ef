"""Spike No More: initial weights, shortcut, what models it recognises, the paper's bounds, and Lightning."""

import copy
import math
import pickle
import re

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import transformers
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from support import assert_same, weights, windows
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_avg_fn

from msign_lightning import MSignCallback, SpikeNoMoreCallback, spike_no_more_
from msign_lightning.recipes.data import RandomWindows
from msign_lightning.recipes.module import LanguageModel
from msign_lightning.recipes.transformer import Transformer, TransformerConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
]

D, FF, VOCAB, LAYERS = 64, 160, 96, 2
STD = math.sqrt(2 / (5 * D))
OUTPUT_STD = STD / math.sqrt(2 * LAYERS)

GPT2 = {"vocab_size": VOCAB, "n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": 32, "n_inner": FF}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "max_position_embeddings": 32,
}
LLAMA = {**COMMON, "num_key_value_heads": 2}
MIXTRAL = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
OPT = {**COMMON, "ffn_dim": FF, "word_embed_proj_dim": D, "dropout": 0.0}
OURS = TransformerConfig(vocab_size=VOCAB, n_layers=LAYERS, width=D, n_heads=4, mlp_width=FF)
UNTIED = TransformerConfig(
    vocab_size=VOCAB,
    n_layers=LAYERS,
    width=D,
    n_heads=4,
    n_kv_heads=2,
    mlp_width=FF,
    activation="swiglu",
    tied_head=False,
)


def hf(name: str, config: dict) -> nn.Module:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**config)).eval()


def ours(config: TransformerConfig) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config).eval()


class NanoGPT(nn.Module):
    """nanoGPT's names, without a method that says which embedding is that of the tokens."""

    def __init__(self, embeddings: tuple[str, ...] = ("wte", "wpe"), up: str = "c_fc", down: str = "c_proj"):
        super().__init__()
        for name in embeddings:
            self.add_module(name, nn.Embedding(VOCAB, D))
        self.h = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attn": nn.ModuleDict({"c_attn": nn.Linear(D, 3 * D), "c_proj": nn.Linear(D, D)}),
                    "mlp": nn.ModuleDict({up: nn.Linear(D, FF), down: nn.Linear(FF, D)}),
                }
            )
            for _ in range(LAYERS)
        )


# model, name of its token embedding, the last names of the layers that write to the residual stream, how many matrices
MODELS = {
    "ours": (lambda: ours(OURS), "embedding", ("o_proj", "down_proj"), 12),
    "ours, untied": (lambda: ours(UNTIED), "embedding", ("o_proj", "down_proj"), 14),
    "nanoGPT": (NanoGPT, "wte", ("c_proj",), 8),
    "GPT-2": (lambda: hf("GPT2LMHeadModel", GPT2), "transformer.wte", ("c_proj",), 8),
    "GPT-2, bare": (lambda: hf("GPT2Model", GPT2), "wte", ("c_proj",), 8),
    "Llama": (lambda: hf("LlamaForCausalLM", LLAMA), "model.embed_tokens", ("o_proj", "down_proj"), 14),
    "Llama, bare": (lambda: hf("LlamaModel", LLAMA), "embed_tokens", ("o_proj", "down_proj"), 14),
    "Mixtral": (lambda: hf("MixtralForCausalLM", MIXTRAL), "model.embed_tokens", ("o_proj", "down_proj", "w2"), None),
    "OPT": (lambda: hf("OPTForCausalLM", OPT), "model.decoder.embed_tokens", ("out_proj", "fc2"), 12),
    "GPT-NeoX": (
        lambda: hf("GPTNeoXForCausalLM", COMMON),
        "gpt_neox.embed_in",
        ("dense", "dense_4h_to_h"),
        8,
    ),
}
HUGGING_FACE = ["GPT-2", "GPT-2, bare", "Llama", "Llama, bare", "GPT-NeoX"]


def build(name: str) -> nn.Module:
    return MODELS[name][0]()


def tokens(length: int = 12) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, ids: Tensor, **inputs) -> Tensor:
    output = model(ids, **inputs) if ids is not None else model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("name", MODELS)
def test_standard_deviations(name):
    model = build(name)
    _, embedding, output_layers, count = MODELS[name]
    before = weights(model)
    report = spike_no_more_(model)
    after = weights(model)

    assert report.embedding == embedding
    assert count in (None, len(report.matrices))
    assert {n.removesuffix(".weight").rpartition(".")[2] for n in report.outputs} <= set(output_layers)
    drawn = {*report.matrices, f"{embedding}.weight"}
    for n, weight in after.items():
        if n not in drawn:
            assert torch.equal(weight, before[n]), n
            continue
        is_output = n.removesuffix(".weight").endswith(tuple(f".{layer}" for layer in output_layers))
        weight = weight[1:] if n.startswith(embedding) else weight  # the first row may be padding
        expected = OUTPUT_STD if is_output else STD
        # The standard error of a standard deviation of n values is 1/√(2n) of it.
        assert weight.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * weight.numel())), n
        assert abs(weight.mean().item()) < 5 * expected / math.sqrt(weight.numel()), n
        assert (n in report.outputs) == is_output
    assert all(re.search("head|wpe|pos|embed_out|gate", n) for n in set(after) - drawn if after[n].ndim > 1)
    assert f"{len(report.matrices)} matrices" in report.describe()


def test_fused_matrices_and_experts_are_drawn_whole():
    model = hf("MixtralForCausalLM", MIXTRAL)
    report = spike_no_more_(model)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    elements = sum(math.prod(shapes[n]) for n in report.matrices)
    attention = 2 * D * D + 2 * D * (D // 2)
    assert elements == LAYERS * (attention + 4 * 3 * D * FF)


def test_padding_row_stays_zero():
    model = hf("LlamaForCausalLM", LLAMA)
    spike_no_more_(model)
    assert model.model.embed_tokens.weight[0].eq(0).all()
    assert model.model.embed_tokens.weight[1:].ne(0).all()


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_become_large(name):
    scaled, normed, plain = build(name), build(name), build(name)
    embedding = MODELS[name][1]
    ids = torch.arange(1, VOCAB)
    for model, shortcut in ((scaled, "scaled_embed"), (normed, "embed_ln"), (plain, None)):
        torch.manual_seed(0)
        assert spike_no_more_(model, shortcut).shortcut == shortcut
    x = scaled.get_submodule(embedding)(ids)
    assert x.std().item() == pytest.approx(math.sqrt(2 / 5), rel=0.05)
    torch.testing.assert_close(x, math.sqrt(D) * plain.get_submodule(embedding)(ids))
    x = normed.get_submodule(embedding)(ids)
    torch.testing.assert_close(x.mean(-1), torch.zeros(len(ids)), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(-1, correction=0), torch.ones(len(ids)), atol=1e-2, rtol=0)


@pytest.mark.parametrize("shortcut", ["scaled_embed", "embed_ln"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_only_what_enters_the_residual_stream_is_changed(name, shortcut):
    """With the head and the position table: the same function as the model without hook on embeddings made large."""
    model, plain = build(name), build(name)
    names = dict(plain.state_dict())
    for m, s in ((model, shortcut), (plain, None)):
        torch.manual_seed(0)
        spike_no_more_(m, s)
    embeds = plain.get_input_embeddings()(tokens())
    embeds = math.sqrt(D) * embeds if shortcut == "scaled_embed" else F.layer_norm(embeds, (D,))
    torch.testing.assert_close(run(model, tokens()), run(plain, None, inputs_embeds=embeds))

    new = {f"{MODELS[name][1]}.norm.{leaf}" for leaf in ("weight", "bias")} if shortcut == "embed_ln" else set()
    assert set(model.state_dict()) == set(names) | new


def test_tied_head_stays_tied():
    model = ours(OURS)
    hidden = []
    model.head.register_forward_hook(lambda module, args, output: hidden.append((args[0], output)))
    spike_no_more_(model)
    assert model.head.weight is model.embedding.weight
    model(tokens())
    x, logits = hidden[0]
    torch.testing.assert_close(logits, x @ model.embedding.weight.T)


def test_an_embedding_that_is_also_called_as_the_head():
    class SharedEmbedding(nn.Embedding):
        def forward(self, x: Tensor, unembed: bool = False) -> Tensor:
            return F.linear(x, self.weight) if unembed else super().forward(x)

    for shortcut in ("scaled_embed", "embed_ln"):
        model = NanoGPT()
        model.wte = SharedEmbedding(VOCAB, D)
        spike_no_more_(model, shortcut)
        x = torch.randn(2, 3, D)
        torch.testing.assert_close(model.wte(x, unembed=True), x @ model.wte.weight.T)


@pytest.mark.parametrize("shortcut", ["scaled_embed", "embed_ln", None])
def test_applied_once(shortcut):
    model = hf("GPT2LMHeadModel", GPT2)
    spike_no_more_(model, shortcut)
    before, logits = weights(model), run(model, tokens())
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        report = spike_no_more_(again, shortcut)
        assert report.matrices == report.outputs == ()
        assert report.shortcut == shortcut
        assert_same(weights(again), before)
        torch.testing.assert_close(run(again, tokens()), logits, rtol=0, atol=0)


def test_trained_weights_are_left_alone_for_good():
    model = hf("LlamaForCausalLM", LLAMA)
    before = weights(model)
    plain = run(model, tokens())
    for init in (False, True):
        report = spike_no_more_(model, init=init)
        assert report.matrices == ()
        assert "left as they are" in report.describe()
        assert_same(weights(model), before)
    assert not torch.allclose(run(model, tokens()), plain)


def test_the_seed_governs():
    drawn = []
    for seed in (0, 0, 1):
        model = ours(OURS)
        torch.manual_seed(seed)
        spike_no_more_(model)
        drawn.append(weights(model))
    assert_same(drawn[0], drawn[1])
    assert not any(torch.equal(drawn[0][n], drawn[2][n]) for n in drawn[0] if "proj" in n)


@pytest.mark.parametrize("shortcut", ["scaled_embed", "embed_ln"])
def test_checkpoint_loads_into_a_model_built_alike(shortcut):
    trained, loaded = hf("GPT2LMHeadModel", GPT2), hf("GPT2LMHeadModel", GPT2)
    for model in (trained, loaded):
        spike_no_more_(model, shortcut)
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    loaded.load_state_dict(trained.state_dict())
    torch.testing.assert_close(run(loaded, tokens()), run(trained, tokens()), rtol=0, atol=0)


@pytest.mark.parametrize("shortcut", ["scaled_embed", "embed_ln"])
def test_survives_compilation(shortcut):
    model = ours(OURS)
    spike_no_more_(model, shortcut)
    expected = model(tokens())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()), expected)


@pytest.mark.parametrize("shortcut", ["scaled_embed", "embed_ln"])
def test_survives_activation_checkpointing_and_sharding(shortcut, tmp_path):
    def gradients(model: nn.Module) -> list[Tensor]:
        model(tokens()).square().mean().backward()
        return [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()]

    plain, wrapped, sharded = (ours(UNTIED) for _ in range(3))
    for model in (plain, wrapped, sharded):
        torch.manual_seed(0)
        spike_no_more_(model, shortcut)
    wrapped.embedding = checkpoint_wrapper(wrapped.embedding)
    wrapped.blocks[0] = checkpoint_wrapper(wrapped.blocks[0])
    expected = gradients(plain)
    torch.testing.assert_close(gradients(wrapped), expected)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in (sharded.embedding, *sharded.blocks, sharded):
            fully_shard(module, mesh=mesh)
        torch.testing.assert_close(gradients(sharded), expected)
        assert spike_no_more_(sharded, shortcut).matrices == ()
    finally:
        dist.destroy_process_group()


# --- models that can't be identified -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            NanoGPT,
            {"shortcut": "detach"},
            r"shortcut must be one of \('scaled_embed', 'embed_ln'\) or None, got 'detach'",
        ),
        (NanoGPT, {"n_layers": 0}, "n_layers must be a positive integer, got 0"),
        (lambda: NanoGPT(()), {}, "pass embedding=<name of its module>; the model's embeddings are: none"),
        (lambda: NanoGPT(("text", "image")), {}, "the model's embeddings are: text, image"),
        (NanoGPT, {"embedding": "wtf"}, "embedding must name a module with a 2-D weight, got 'wtf'; .*: wte, wpe"),
        (NanoGPT, {"embedding": "h.0"}, "embedding must name a module with a 2-D weight, got 'h.0'"),
        (lambda: NanoGPT(up="a", down="b"), {}, r"beside h\.0\.mlp\.a\.weight, pass outputs="),
        (
            NanoGPT,
            {"outputs": "*.b.weight"},
            r"outputs must match one of the matrices .* h\.0\.attn\.c_attn.*'\*\.b\.weight'",
        ),
        (NanoGPT, {"targets": "mlp"}, "n_layers must be given for a model of which no output is an attention's"),
        (NanoGPT, {"targets": "*.fc1.weight"}, r"targets must .* got '\*\.fc1\.weight'"),
        (lambda: nn.ModuleDict({"wte": nn.Embedding(VOCAB, D)}), {}, "targets must choose at least one matrix"),
        (
            lambda: hf("OPTForCausalLM", {**OPT, "word_embed_proj_dim": 32}),
            {},
            "the embedding must be as wide as the residual stream, got .* of width 32",
        ),
    ],
)
def test_errors_say_what_to_pass_and_change_nothing(model, arguments, message):
    model = model()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        spike_no_more_(model, **arguments)
    assert_same(weights(model), before)


def test_a_second_shortcut_is_refused():
    model = NanoGPT()
    spike_no_more_(model, "embed_ln")
    with pytest.raises(ValueError, match="shortcut must be 'embed_ln', which the model already has"):
        spike_no_more_(model, "scaled_embed")


def test_what_can_t_be_found_can_be_said():
    model = NanoGPT(("text", "image"), up="a", down="b")
    report = spike_no_more_(model, embedding="text", outputs=["*.attn.c_proj.*", "*.b.weight"], n_layers=8)
    assert report.outputs == tuple(f"h.{i}.{name}.weight" for i in range(LAYERS) for name in ("attn.c_proj", "mlp.b"))
    assert model.h[0]["mlp"]["b"].weight.std().item() == pytest.approx(STD / 4, rel=0.05)
    assert model.text(torch.arange(VOCAB)).std().item() == pytest.approx(math.sqrt(2 / 5), rel=0.05)
    assert model.image(torch.arange(VOCAB)).std().item() == pytest.approx(1.0, rel=0.05)


# --- the paper's claim -------------------------------------------------------------------------------------------


def norm_of_jacobian(function, x: Tensor) -> float:
    """Spectral norm of ∂ vec f(x) / ∂ vec x."""
    return torch.linalg.matrix_norm(jacobian(function, x).reshape(x.numel(), x.numel()), ord=2).item()


@torch.no_grad()
def jacobian_norms(model: Transformer) -> tuple[list[float], list[float]]:
    """Spectral norms of the sub-layers' Jacobians, in order, and the upper bounds of arXiv 2312.16903."""
    measured, bounds = [], []
    x = model.embedding(tokens(4)[:1]).double()
    model = copy.deepcopy(model).double()
    for block in model.blocks:
        heads = copy.deepcopy(block.attention)
        heads.o_proj = nn.Identity()
        j_z = norm_of_jacobian(lambda n, heads=heads: heads(n, None), block.attention_norm(x))
        d = x.shape[-1]
        sigma_o = block.attention.o_proj.weight.std().item()
        bounds.append(1 + sigma_o / x.std().item() * 2 * math.sqrt(d) * j_z)
        attend = lambda x, block=block: x + block.attention(block.attention_norm(x), None)  # noqa: E731
        measured.append(norm_of_jacobian(attend, x))
        x = attend(x)

        sigmas = block.mlp.up_proj.weight.std().item() * block.mlp.down_proj.weight.std().item()
        c_ffn = (math.sqrt(d) + math.sqrt(block.mlp.up_proj.out_features)) ** 2
        bounds.append(1 + sigmas / x.std().item() * c_ffn)
        think = lambda x, block=block: x + block.mlp(block.mlp_norm(x))  # noqa: E731
        measured.append(norm_of_jacobian(think, x))
        x = think(x)
    return measured, bounds


@pytest.mark.parametrize("shortcut", ["scaled_embed", "embed_ln"])
def test_bound_on_the_gradient_norm_goes_down(shortcut):
    """Against the recipes' own initialisation, and against the paper's baseline: its weights without a shortcut."""
    config = TransformerConfig(vocab_size=VOCAB, n_layers=4, width=32, n_heads=2, mlp_width=128, zero_query=False)
    default, vanilla, prepared = ours(config), ours(config), ours(config)
    for model, s in ((vanilla, None), (prepared, shortcut)):
        torch.manual_seed(0)
        spike_no_more_(model, s)
    (small, small_bounds), *others = (jacobian_norms(model) for model in (prepared, vanilla, default))
    for large, large_bounds in others:
        assert all(a < b for a, b in zip(small_bounds, large_bounds, strict=True))
        # The gradient that reaches the embedding is at most the product of the sub-layers' norms.
        assert math.prod(small) < math.prod(large) / 2
        assert math.prod(small_bounds) < math.prod(large_bounds) / 2
    # The paper takes the activation for linear and the norm for a division by σ_x, so its bound is approximate.
    assert all(s < 1.1 * bound for s, bound in zip(small, small_bounds, strict=True))


# --- under Lightning ---------------------------------------------------------------------------------------------


def make_module() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(OURS, warmup_steps=2)


def batches() -> RandomWindows:
    return windows(8, vocab_size=VOCAB)


def make_trainer(tmp_path, *callbacks: Callback, max_steps: int = 8, max_epochs: int = -1) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        default_root_dir=tmp_path,
    )


class FirstWeights(Callback):
    """Keeps the weights with which training starts."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = weights(pl_module)


@pytest.mark.parametrize("shortcut", ["scaled_embed", "embed_ln", None])
def test_callback_prepares_as_the_function_does(tmp_path, shortcut):
    module, first = make_module(), FirstWeights()
    trainer = make_trainer(tmp_path, SpikeNoMoreCallback(shortcut), first, max_steps=1)
    trainer.fit(module, batches())
    by_hand = make_module()
    spike_no_more_(by_hand, shortcut)
    assert_same(first.weights, weights(by_hand))
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in module.parameters()} == trained
    assert not any(torch.equal(p, first.weights[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("shortcut", ["scaled_embed", "embed_ln"])
def test_resumed_run_ends_bit_equal_and_is_evaluated_alike(tmp_path, shortcut):
    def fit(module: LanguageModel, ckpt_path=None) -> pl.Trainer:
        checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        callbacks = (SpikeNoMoreCallback(shortcut), MSignCallback(period=4), checkpoint)
        trainer = make_trainer(tmp_path, *callbacks)
        trainer.fit(module, batches(), ckpt_path=ckpt_path)
        return trainer

    whole, resumed = make_module(), make_module()
    fit(whole)
    fit(resumed, tmp_path / "step=3.ckpt")
    assert_same(weights(whole), weights(resumed))

    trainer = make_trainer(tmp_path, SpikeNoMoreCallback(shortcut))
    expected = trainer.validate(whole, batches(), verbose=False)
    by_path = make_module()
    assert trainer.validate(by_path, batches(), ckpt_path=tmp_path / "step=6.ckpt", verbose=False) != expected
    by_hand = make_module()
    if shortcut == "embed_ln":
        spike_no_more_(by_hand, shortcut)
    by_hand.load_state_dict(whole.state_dict())
    assert make_trainer(tmp_path, SpikeNoMoreCallback(shortcut)).validate(by_hand, batches(), verbose=False) == expected


def test_trained_weights_are_never_drawn_anew(tmp_path):
    module = make_module()
    checkpoint = ModelCheckpoint(tmp_path, filename="last", save_top_k=1)
    make_trainer(tmp_path, SpikeNoMoreCallback(), checkpoint).fit(module, batches())
    trained = weights(module)

    first = FirstWeights()
    make_trainer(tmp_path, SpikeNoMoreCallback(), first, max_steps=1).fit(module, batches())
    assert_same(first.weights, trained)  # fitted twice

    validated = make_module()
    trainer = make_trainer(tmp_path, SpikeNoMoreCallback(), first, max_steps=1)
    trainer.validate(validated, batches(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    trainer.fit(validated, batches())
    assert_same(first.weights, trained)  # loaded by the trainer

    by_hand = make_module()
    by_hand.load_state_dict(trained, strict=False)
    make_trainer(tmp_path, SpikeNoMoreCallback(init=False), first, max_steps=1).fit(by_hand, batches())
    assert_same(first.weights, trained)  # loaded by hand


def test_a_look_at_the_new_model_does_not_keep_it_from_being_prepared(tmp_path):
    module, first = make_module(), FirstWeights()
    trainer = make_trainer(tmp_path, SpikeNoMoreCallback(), first, max_steps=1)
    trainer.validate(module, batches(), verbose=False)
    trainer.fit(module, batches())
    assert first.weights["transformer.embedding.weight"].std().item() == pytest.approx(STD, rel=0.05)


@pytest.mark.filterwarnings("ignore:.*overrides the configure_model callback")  # it shards nothing here
@pytest.mark.parametrize(
    "make_averaging",
    [lambda: WeightAveraging(avg_fn=get_ema_avg_fn(0.5)), lambda: StochasticWeightAveraging(swa_lrs=1e-3)],
)
def test_averaged_copies_have_the_shortcut_too(tmp_path, make_averaging):
    averaging = make_averaging()
    name = type(averaging).__name__
    with pytest.raises(ValueError, match=f"must come before {name} in callbacks"):
        make_trainer(tmp_path, averaging, SpikeNoMoreCallback("embed_ln")).fit(make_module(), batches())
    module = make_module()
    trainer = make_trainer(tmp_path, SpikeNoMoreCallback("embed_ln"), make_averaging(), max_steps=-1, max_epochs=2)
    trainer.fit(module, batches())
    assert module.transformer.embedding.norm.weight.ne(1).all()


def test_model_built_too_late_is_an_error(tmp_path):
    class Late(LanguageModel):
        def __init__(self) -> None:
            super().__init__(OURS)
            del self.transformer

        def configure_model(self) -> None:
            self.transformer = Transformer(OURS)

    with pytest.raises(ValueError, match="the token embedding can't be identified"):
        make_trainer(tmp_path, SpikeNoMoreCallback()).fit(Late(), batches())


def test_callback_checks_its_arguments_at_once():
    with pytest.raises(ValueError, match="shortcut must be one of"):
        SpikeNoMoreCallback("embed_detach")
    with pytest.raises(ValueError, match=r"n_layers must be a positive integer, got 1\.5"):
        SpikeNoMoreCallback(n_layers=1.5)


def test_a_model_that_was_trained_is_refused_without_init_false():
    model = Transformer(TransformerConfig())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.arange(8).view(1, 8)).square().mean().backward()
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"init must be False for a model that holds trained weights, as blocks\.0"):
        spike_no_more_(model)
    spike_no_more_(model, init=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
