"""Which matrices of real models are chosen, and that every cut is the one that the model's own forward uses."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from msign_lightning import Cut, Target, format_targets, select_targets

D, FF, HEADS, HEAD_DIM, VOCAB = 32, 48, 4, 8, 64
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": FF,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "max_position_embeddings": 16,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": D,
    "n_layer": 2,
    "n_head": HEADS,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GQA = {**COMMON, "num_key_value_heads": 2}


def hf(name: str, **config) -> nn.Module:
    """A model of the Hugging Face class `name`, small, in eval mode, with weights large enough to tell apart."""
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2, generator=generator)
    return model


def names(model: nn.Module, *args, **kwargs) -> list[str]:
    return [target.name for target in select_targets(model, *args, **kwargs)]


def by_name(model: nn.Module, *args, **kwargs) -> dict[str, Target]:
    return {target.name: target for target in select_targets(model, *args, **kwargs)}


class NanoAttention(nn.Module):
    """Attention as nanoGPT lays it out, with grouped queries where `groups` is given (litgpt)."""

    def __init__(self, groups: int | None = None):
        super().__init__()
        self.n_head = HEADS
        self.groups = groups or HEADS
        if groups:
            self.config = SimpleNamespace(n_head=HEADS, n_query_groups=groups, head_size=HEAD_DIM)
        self.c_attn = nn.Linear(D, (HEADS + 2 * self.groups) * HEAD_DIM, bias=False)
        self.c_proj = nn.Linear(D, D, bias=False)

    def forward(self, x):
        q, k, v = self.c_attn(x).split([D, self.groups * HEAD_DIM, self.groups * HEAD_DIM], dim=-1)
        q, k, v = (t.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class NanoBlock(nn.Module):
    def __init__(self, groups: int | None = None):
        super().__init__()
        self.ln_1 = nn.LayerNorm(D)
        self.attn = NanoAttention(groups)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "c_proj": nn.Linear(4 * D, D)})

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](x)))


class NanoGPT(nn.Module):
    """nanoGPT's names, with the head tied to the embedding and named before it."""

    def __init__(self, layers: int = 2, groups: int | None = None):
        super().__init__()
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.wte = nn.Embedding(VOCAB, D)
        self.wpe = nn.Embedding(16, D)
        self.h = nn.ModuleList(NanoBlock(groups) for _ in range(layers))
        self.wte.weight = self.lm_head.weight

    def forward(self, ids):
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.h:
            x = block(x)
        return self.lm_head(x)


NANO_ATTENTION = ["attn.c_attn.weight.q", "attn.c_attn.weight.k", "attn.c_attn.weight.v", "attn.c_proj.weight"]
NANO_MLP = ["mlp.c_fc.weight", "mlp.c_proj.weight"]


# --- Cut: a partition into views ----------------------------------------------------------------------------------


@st.composite
def cuts_and_shapes(draw):
    sizes = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
    repeats = draw(st.integers(1, 3)) if sizes else 1
    dim = draw(st.integers(0, 1))
    length = sum(sizes) * repeats if sizes else draw(st.integers(1, 6))
    matrix = [draw(st.integers(1, 4)), draw(st.integers(1, 4))]
    matrix[dim] = length
    return Cut(sizes, dim, repeats), (*draw(st.lists(st.integers(1, 3), max_size=2)), *matrix)


def naive_pieces(cut: Cut, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The matrices by explicit indices, repetition by repetition."""
    sizes = cut.sizes or (tensor.shape[cut.dim - 2],)
    matrices = []
    for piece, size in enumerate(sizes):
        start = sum(sizes[:piece])
        index = [r * sum(sizes) + start + i for r in range(cut.repeats) for i in range(size)]
        matrices.append(tensor[..., index, :] if cut.dim == 0 else tensor[..., index])
    return matrices


def targets_of(cut: Cut, shape: tuple[int, ...]) -> list[Target]:
    parameter = nn.Parameter(torch.zeros(shape))
    return [Target(f"w.{label}", "w", parameter, cut, i, "other") for i, label in enumerate(cut.labels)]


@settings(deadline=None)
@given(cuts_and_shapes())
def test_pieces_are_views_that_hold_every_entry_once(case):
    cut, shape = case
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    pieces = cut.pieces(tensor)
    assert len(pieces) == len(cut.labels) == len(cut.shapes(shape))
    assert torch.equal(torch.cat([piece.flatten() for piece in pieces]).sort().values, tensor.flatten())
    assert all(piece.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for piece in pieces)


@settings(deadline=None)
@given(cuts_and_shapes())
def test_matrices_are_the_naive_ones_of_any_strides(case):
    cut, shape = case
    full = torch.randn(*shape[:-2], shape[-1], shape[-2]).mT
    for target, expected, mn in zip(targets_of(cut, shape), naive_pieces(cut, full), cut.shapes(shape), strict=True):
        assert target.shape == mn == tuple(expected.shape[-2:])
        assert target.count == expected[..., 0, 0].numel()
        assert torch.equal(target.matrix(full), expected.reshape(-1, *mn))


@settings(deadline=None)
@given(cuts_and_shapes(), st.data())
def test_writing_changes_one_piece_and_nothing_else(case, data):
    cut, shape = case
    full = torch.randn(shape, dtype=torch.float64)
    targets = targets_of(cut, shape)
    chosen = data.draw(st.sampled_from(targets))
    before = [target.matrix(full).clone() for target in targets]
    new = torch.randn(chosen.count, *chosen.shape)
    chosen.write_(full, new)
    for target, old in zip(targets, before, strict=True):
        assert torch.equal(target.matrix(full), new.double() if target is chosen else old)


def test_writing_rounds_to_the_dtype_of_the_parameter():
    target = targets_of(Cut((1, 1)), (2, 3))[1]
    full = torch.zeros(2, 3, dtype=torch.bfloat16)
    new = torch.rand(1, 1, 3, dtype=torch.float64)
    target.write_(full, new)
    assert torch.equal(full[1:], new[0].bfloat16())
    assert not full[0].any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sizes": (4, 0)}, "sizes must be positive integers, got (4, 0)"),
        ({"sizes": (4.0, 4)}, "sizes must be positive integers, got (4.0, 4)"),
        ({"dim": 2}, "dim must be 0 (rows) or 1 (columns), got 2"),
        ({"sizes": (1,), "repeats": 0}, "repeats must be a positive integer, got 0"),
        ({"repeats": 2}, "repeats must be 1 where sizes is empty, got 2"),
        ({"sizes": (1, 2), "names": ("q",)}, "names must hold one distinct name per size (1, 2), got ('q',)"),
        ({"sizes": (1, 2), "names": ("q", "q")}, "names must hold one distinct name per size (1, 2), got ('q', 'q')"),
    ],
)
def test_impossible_cuts_are_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Cut(**values)


def test_a_cut_that_does_not_cover_the_parameter_is_refused():
    message = "sum(sizes) * repeats must be the length 6 of dim 1 of (4, 6), got sizes=(2, 2), repeats=2"
    with pytest.raises(ValueError, match=re.escape(message)):
        Cut((2, 2), dim=1, repeats=2).pieces(torch.zeros(4, 6))


def test_a_cut_of_lists_is_the_cut_of_tuples():
    assert Cut([1, 2], names=["a", "b"]) == Cut((1, 2), names=("a", "b"))  # what a YAML file gives


# --- what is chosen -----------------------------------------------------------------------------------------------

LLAMA_ATTENTION = [f"self_attn.{role}_proj.weight" for role in "qkvo"]
LLAMA_MLP = [f"mlp.{role}_proj.weight" for role in ("gate", "up", "down")]
STACKS = ["experts.gate_up_proj.gate", "experts.gate_up_proj.up", "experts.down_proj"]
BERT_ATTENTION = [f"attention.self.{role}.weight" for role in ("query", "key", "value")]
MHA = [f"in_proj_weight.{role}" for role in "qkv"] + ["out_proj.weight"]
T5_ATTENTION = [f"{role}.weight" for role in "qkvo"]
H_TO_4H = ["mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"]
NEOX_ATTENTION = [f"query_key_value.weight.{role}" for role in "qkv"] + ["dense.weight"]


def prefixed(prefix: str, suffixes: list[str]) -> list[str]:
    return [prefix + suffix for suffix in suffixes]


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 8, 1, HEADS, D, FF, num_classes=5)


CHOSEN = {
    "nanogpt": (lambda: NanoGPT(1), prefixed("h.0.", NANO_ATTENTION), prefixed("h.0.", NANO_MLP)),
    "gpt2_cross": (
        lambda: hf("GPT2LMHeadModel", **{**GPT2, "n_layer": 1, "add_cross_attention": True}),
        prefixed("transformer.h.0.", NANO_ATTENTION)
        + prefixed(
            "transformer.h.0.crossattention.", ["c_attn.weight.k", "c_attn.weight.v", "q_attn.weight", "c_proj.weight"]
        ),
        prefixed("transformer.h.0.", NANO_MLP),
    ),
    "llama_gqa": (
        lambda: hf("LlamaForCausalLM", **{**GQA, "num_hidden_layers": 1}),
        prefixed("model.layers.0.", LLAMA_ATTENTION),
        prefixed("model.layers.0.", LLAMA_MLP),
    ),
    "mixtral": (
        lambda: hf("MixtralForCausalLM", **{**GQA, "num_hidden_layers": 1, "num_local_experts": 3}),
        prefixed("model.layers.0.", LLAMA_ATTENTION),
        prefixed("model.layers.0.mlp.", STACKS),
    ),
    "qwen2_moe": (
        lambda: hf(
            "Qwen2MoeForCausalLM",
            **{**GQA, "num_hidden_layers": 1, "num_experts": 3},
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
        ),
        prefixed("model.layers.0.", LLAMA_ATTENTION),
        prefixed("model.layers.0.mlp.", STACKS)
        + [f"model.layers.0.mlp.shared_expert.{role}_proj.weight" for role in ("gate", "up", "down")],
    ),
    "gpt_neox": (
        lambda: hf("GPTNeoXForCausalLM", **{**COMMON, "num_hidden_layers": 1}),
        prefixed("gpt_neox.layers.0.attention.", NEOX_ATTENTION),
        prefixed("gpt_neox.layers.0.", H_TO_4H),
    ),
    "bloom": (
        lambda: hf("BloomForCausalLM", vocab_size=VOCAB, hidden_size=D, n_layer=1, n_head=HEADS),
        prefixed("transformer.h.0.self_attention.", NEOX_ATTENTION),
        prefixed("transformer.h.0.", H_TO_4H),
    ),
    "mpt": (
        lambda: hf("MptForCausalLM", d_model=D, n_heads=HEADS, n_layers=1, vocab_size=VOCAB),
        [f"transformer.blocks.0.attn.Wqkv.weight.{role}" for role in "qkv"]
        + ["transformer.blocks.0.attn.out_proj.weight"],
        prefixed("transformer.blocks.0.ffn.", ["up_proj.weight", "down_proj.weight"]),
    ),
    "bert_with_pooler_and_head": (
        lambda: hf("BertForSequenceClassification", **{**COMMON, "num_hidden_layers": 1}),
        prefixed("bert.encoder.layer.0.", [*BERT_ATTENTION, "attention.output.dense.weight"]),
        prefixed("bert.encoder.layer.0.", ["intermediate.dense.weight", "output.dense.weight"]),
    ),
    "bert_masked_lm": (
        lambda: hf("BertForMaskedLM", **{**COMMON, "num_hidden_layers": 1}),
        prefixed("bert.encoder.layer.0.", [*BERT_ATTENTION, "attention.output.dense.weight"]),
        prefixed("bert.encoder.layer.0.", ["intermediate.dense.weight", "output.dense.weight"]),
    ),
    "opt": (
        lambda: hf("OPTForCausalLM", **{**COMMON, "num_hidden_layers": 1, "word_embed_proj_dim": D, "ffn_dim": FF}),
        prefixed("model.decoder.layers.0.self_attn.", [f"{role}_proj.weight" for role in ("k", "v", "q", "out")]),
        prefixed("model.decoder.layers.0.", ["fc1.weight", "fc2.weight"]),
    ),
    "phi3": (
        lambda: hf("Phi3ForCausalLM", **{**GQA, "num_hidden_layers": 1}),
        prefixed("model.layers.0.self_attn.", ["o_proj.weight", *[f"qkv_proj.weight.{role}" for role in "qkv"]]),
        prefixed("model.layers.0.mlp.", ["gate_up_proj.weight.gate", "gate_up_proj.weight.up", "down_proj.weight"]),
    ),
    "t5": (
        lambda: hf(
            "T5ForConditionalGeneration",
            **{"vocab_size": VOCAB, "d_model": D, "d_kv": HEAD_DIM, "d_ff": FF, "num_layers": 1, "num_heads": HEADS},
            feed_forward_proj="gated-gelu",
        ),
        prefixed("encoder.block.0.layer.0.SelfAttention.", T5_ATTENTION)
        + prefixed("decoder.block.0.layer.0.SelfAttention.", T5_ATTENTION)
        + prefixed("decoder.block.0.layer.1.EncDecAttention.", T5_ATTENTION),
        [
            f"{stack}.DenseReluDense.{role}.weight"
            for stack in ("encoder.block.0.layer.1", "decoder.block.0.layer.2")
            for role in ("wi_0", "wi_1", "wo")
        ],
    ),
    "torchvision_vit": (
        torchvision_vit,
        prefixed("encoder.layers.encoder_layer_0.self_attention.", MHA),
        prefixed("encoder.layers.encoder_layer_0.mlp.", ["0.weight", "3.weight"]),
    ),
    "torch_transformer": (
        lambda: nn.Transformer(D, HEADS, 1, 1, FF, batch_first=True),
        prefixed("encoder.layers.0.self_attn.", MHA)
        + prefixed("decoder.layers.0.self_attn.", MHA)
        + prefixed("decoder.layers.0.multihead_attn.", MHA),
        [f"{stack}.layers.0.linear{i}.weight" for stack in ("encoder", "decoder") for i in (1, 2)],
    ),
    "siglip_without_pooling_head": (
        lambda: hf(
            "SiglipVisionModel",
            **{"hidden_size": D, "intermediate_size": FF, "num_hidden_layers": 1, "num_attention_heads": HEADS},
            image_size=16,
            patch_size=8,
        ),
        [f"encoder.layers.0.self_attn.{role}_proj.weight" for role in ("k", "v", "q", "out")],
        prefixed("encoder.layers.0.mlp.", ["fc1.weight", "fc2.weight"]),
    ),
}


# Composer brings torchvision.
CHOSEN_CASES = [pytest.param(c, marks=pytest.mark.composer if "torchvision" in c else ()) for c in CHOSEN]


@pytest.mark.parametrize("case", CHOSEN_CASES)
def test_presets_choose_the_matrices_of_the_blocks(case):
    build, attention, mlp = CHOSEN[case]
    model = build()
    assert set(names(model, "attention")) == set(attention)
    assert set(names(model, "mlp")) == set(mlp)
    assert set(names(model)) == {*attention, *mlp}
    assert names(model, ["mlp", "attention"]) == names(model, "all_2d")


@pytest.mark.parametrize("case", CHOSEN_CASES)
def test_targets_of_a_model_round_trip(case):
    """Every chosen matrix is written back alone; together the pieces of a parameter are all of it."""
    targets = select_targets(CHOSEN[case][0]())
    for parameter in {id(target.parameter): target.parameter for target in targets}.values():
        full = torch.randn(parameter.shape)
        expected = full.clone()
        own = [target for target in targets if target.parameter is parameter]
        assert len(own) == len(own[0].cut.labels)
        assert sum(target.matrix(full).numel() for target in own) == parameter.numel()
        for target in own:
            target.write_(full, 2 * target.matrix(full))
        assert torch.equal(full, 2 * expected)


def test_a_stack_of_experts_is_a_batch():
    targets = by_name(hf("MixtralForCausalLM", **GQA, num_local_experts=3), "mlp")
    down = targets["model.layers.1.mlp.experts.down_proj"]
    assert (down.count, down.shape, down.group) == (3, (D, FF), "mlp")
    assert torch.equal(down.matrix(down.parameter.detach())[2], down.parameter[2])
    gate = targets["model.layers.1.mlp.experts.gate_up_proj.gate"]
    assert (gate.count, gate.shape, gate.parameter_name) == (3, (FF, D), "model.layers.1.mlp.experts.gate_up_proj")
    assert torch.equal(gate.matrix(gate.parameter.detach())[1], gate.parameter[1, :FF])


def test_experts_stacked_along_the_rows_are_cut_apart():
    class ExpertGLU(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe_num_experts = 3
            self.w1 = nn.Parameter(torch.randn(3 * FF, D))

    model = nn.ModuleDict({"ffn": nn.ModuleDict({"router": nn.Linear(D, 3), "experts": ExpertGLU()})})
    targets = select_targets(model)
    assert [target.name for target in targets] == [f"ffn.experts.w1.{i}" for i in range(3)]
    assert [target.shape for target in targets] == [(FF, D)] * 3


def test_multi_head_attention_with_other_key_sizes_has_its_own_matrices():
    model = nn.ModuleDict({"self_attn": nn.MultiheadAttention(D, HEADS, kdim=16, vdim=24)})
    expected = {"q_proj_weight": (D, D), "k_proj_weight": (D, 16), "v_proj_weight": (D, 24), "out_proj.weight": (D, D)}
    assert {name: target.shape for name, target in by_name(model).items()} == {
        f"self_attn.{name}": shape for name, shape in expected.items()
    }


def test_modules_are_recognised_by_their_class_too():
    class CausalSelfAttention(nn.Linear):
        pass

    class FeedForward(nn.Sequential):
        pass

    model = nn.ModuleDict({"sa": CausalSelfAttention(D, D), "ff_net": FeedForward(nn.Linear(D, FF))})
    assert names(model, "attention") == ["sa.weight"]
    assert names(model, "mlp") == ["ff_net.0.weight"]


def test_what_is_no_matrix_of_a_block_is_left_to_globs():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(D, D)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(9, HEADS))
            self.depthwise = nn.Conv1d(D, D, 3, groups=D)
            self.lora_A = nn.Linear(D, 2, bias=False)
            self.bias_table = nn.Embedding(9, HEADS)

    class Moe(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(D, 3)
            self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    model = nn.ModuleDict(
        {"attn": Attention(), "moe": Moe(), "mlp_head": nn.Linear(D, 5), "t_embedder": NanoBlock().mlp}
    )
    assert names(model) == ["attn.q_proj.weight", *(f"moe.experts.{i}.weight" for i in range(3))]
    assert names(model, ["*table", "*lora_A*", "moe.gate.weight", "mlp_head.weight"]) == [
        "attn.relative_position_bias_table",
        "attn.lora_A.weight",
        "moe.gate.weight",
        "mlp_head.weight",
    ]


def test_what_pools_or_classifies_is_no_block():
    head = nn.ModuleDict({"attn": NanoAttention(), "mlp": nn.ModuleDict({"mlp_fc": nn.Linear(D, FF)})})
    assert names(nn.ModuleDict({"block": NanoBlock(), "head": head})) == prefixed("block.", NANO_ATTENTION + NANO_MLP)


def test_a_wide_layer_that_the_next_one_takes_in_whole_is_no_fused_gate():
    mlp = nn.Sequential(nn.Linear(D, 2 * FF), nn.Linear(2 * FF, FF), nn.Linear(FF, D))
    assert names(nn.ModuleDict({"mlp": mlp})) == ["mlp.0.weight", "mlp.1.weight", "mlp.2.weight"]


def test_the_gate_of_a_glu_is_no_router():
    model = nn.ModuleDict({"mlp": nn.ModuleDict({n: nn.Linear(D, D) for n in ("gate", "up", "down")})})
    assert names(model) == ["mlp.gate.weight", "mlp.up.weight", "mlp.down.weight"]


def test_a_model_inside_a_module_called_embedder_or_head_is_still_chosen():
    model = nn.ModuleDict({"embedder": NanoGPT(1)})
    assert names(model) == prefixed("embedder.h.0.", NANO_ATTENTION + NANO_MLP)


# --- globs, exclusions, parameters that are never chosen ----------------------------------------------------------


def test_globs_name_parameters_or_pieces():
    model = NanoGPT()
    assert names(model, "*.c_attn.weight") == [f"h.{i}.attn.c_attn.weight.{role}" for i in (0, 1) for role in "qkv"]
    assert names(model, "*.c_attn.weight.v") == ["h.0.attn.c_attn.weight.v", "h.1.attn.c_attn.weight.v"]
    assert names(model, ["mlp", "h.0.attn.c_proj.*"]) == prefixed("h.0.", NANO_ATTENTION[3:] + NANO_MLP) + prefixed(
        "h.1.", NANO_MLP
    )


def test_exclusions_take_parameters_or_pieces_away():
    model = NanoGPT(1)
    assert names(model, exclude="*.c_proj.*") == prefixed("h.0.", [*NANO_ATTENTION[:3], NANO_MLP[0]])
    assert names(model, "attention", exclude=["*.k", "*.c_proj.*"]) == prefixed("h.0.attn.c_attn.weight.", ["q", "v"])


def test_pieces_keep_their_place_when_others_are_excluded():
    model = NanoGPT(1)
    weight = model.h[0].attn.c_attn.weight.detach()
    (value,) = select_targets(model, "*.c_attn.weight.v")
    assert torch.equal(value.matrix(weight)[0], weight[2 * D :])


def test_a_matrix_tied_to_an_embedding_is_one_embedding():
    model = NanoGPT(1)
    assert not any("lm_head" in name or "wte" in name for name in names(model))
    table = format_targets(select_targets(model), model=model)
    assert table.endswith("left out: 2 embedding (lm_head.weight, wpe.weight)")
    for glob in ("lm_head.weight", "wte.weight"):
        (target,) = select_targets(model, glob)
        assert target.parameter is model.wte.weight
        assert (target.name, target.group) == ("lm_head.weight", "other")


def test_a_shared_layer_is_chosen_once():
    model = NanoGPT(2)
    model.h[1].mlp["c_fc"].weight = model.h[0].mlp["c_fc"].weight
    assert names(model, "*.c_fc.weight") == ["h.0.mlp.c_fc.weight"]
    assert names(model, "h.1.mlp.c_fc.weight") == ["h.0.mlp.c_fc.weight"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda layer: layer.weight.requires_grad_(False), "frozen"),
        (lambda layer: layer.to("meta"), "meta"),
        (lambda layer: layer.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda layer: layer.register_parameter("weight", nn.Parameter(layer.weight.cfloat())), "complex64"),
        (lambda layer: nn.utils.parametrizations.weight_norm(layer), "parametrized"),
        (lambda layer: nn.utils.parametrizations.spectral_norm(layer), "parametrized"),
    ],
)
def test_parameters_that_can_not_be_restored_are_left_out_and_named(spoil, reason):
    model = NanoGPT(1)
    spoil(model.h[0].mlp["c_fc"])
    expected = prefixed("h.0.", [*NANO_ATTENTION, NANO_MLP[1]])
    assert names(model) == names(model, "h.*") == expected
    assert f" {reason} (h.0.mlp.c_fc." in format_targets(select_targets(model), model=model)
    with pytest.raises(ValueError, match=rf"must match a matrix that can be restored, got 'h.0.mlp.c_fc.\*'.*{reason}"):
        select_targets(model, "h.0.mlp.c_fc.*")


def test_foreign_parameters_are_left_out():
    class Quantised(nn.Parameter):
        pass

    model = NanoGPT(1)
    model.h[0].mlp["c_fc"].weight = Quantised(torch.zeros(4 * D, D))
    model.h[0].mlp["c_proj"] = nn.LazyLinear(D)
    assert names(model) == prefixed("h.0.", NANO_ATTENTION)
    assert "1 Quantised (h.0.mlp.c_fc.weight)" in format_targets(select_targets(model), model=model)


@pytest.mark.filterwarnings("ignore:.*quantize_dynamic:DeprecationWarning", "ignore:.*torch.ao.quantization.*")
def test_dynamically_quantised_layers_have_nothing_to_restore():
    model = torch.ao.quantization.quantize_dynamic(NanoGPT(1), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="at least one matrix"):
        select_targets(model)


# --- names under wrappers -----------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_names_do_not_change_under_compilation_and_checkpointing():
    model, plain = NanoGPT(), names(NanoGPT())
    model.h[0].mlp["c_fc"] = checkpoint_wrapper(model.h[0].mlp["c_fc"])
    model.h[1] = torch.compile(checkpoint_wrapper(model.h[1]))
    assert names(torch.compile(model)) == plain


def test_names_do_not_change_under_ddp(process_group):
    model = nn.parallel.DistributedDataParallel(NanoGPT())
    assert names(model) == names(torch.compile(model)) == names(NanoGPT())


def test_sharded_parameters_are_cut_by_their_global_shape(process_group):
    model, plain = NanoGPT(), select_targets(NanoGPT())
    for block in model.h:
        fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
    targets = select_targets(model)
    assert all(isinstance(target.parameter, DTensor) for target in targets)
    described = [[(t.name, t.shape, t.count, t.group, t.cut) for t in chosen] for chosen in (targets, plain)]
    assert described[0] == described[1]


def test_a_module_called_module_keeps_its_name():
    model = nn.ModuleDict({"module": NanoBlock(), "other": nn.Linear(2, 2)})
    assert names(model) == prefixed("module.", NANO_ATTENTION + NANO_MLP)
    assert names(nn.DataParallel(model)) == names(model)


# --- cuts are those of the model's own forward --------------------------------------------------------------------


def record(module: nn.Module, into: dict[str, torch.Tensor], key: str) -> None:
    module.register_forward_pre_hook(lambda _, args: into.update({key: args[0].detach()}))


def attend(x, context, q, k, v, head_dim, causal):
    """Plain attention without positions from the chosen matrices, before the output projection."""
    q, k, v = x @ q, context @ k, context @ v
    q, k, v = (t.unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


def input_major(target: Target) -> torch.Tensor:
    """The matrix as (in, out): a layer that is cut along its columns is stored so."""
    (matrix,) = target.matrix(target.parameter.detach())
    return matrix if target.cut.dim == 1 else matrix.T


IDS = torch.arange(10).reshape(2, 5)
SAME_PLACE = {"position_ids": torch.zeros(2, 5, dtype=torch.long)}  # makes rotary embeddings the identity
FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FUSED = {
    # case: model, attention module, fused layer, output layer, causal, arguments
    "nanogpt": (lambda: NanoGPT(), "h.1.attn", "c_attn", "c_proj", True, {}),
    "litgpt_gqa": (lambda: NanoGPT(groups=2), "h.1.attn", "c_attn", "c_proj", True, {}),
    "gpt2": (lambda: hf("GPT2LMHeadModel", **GPT2), "transformer.h.1.attn", "c_attn", "c_proj", True, {}),
    "bigcode_mqa": (lambda: hf("GPTBigCodeModel", **GPT2), "h.1.attn", "c_attn", "c_proj", True, {}),
    "bigcode_mha": (lambda: hf("GPTBigCodeModel", **GPT2, multi_query=False), "h.1.attn", "c_attn", "c_proj", True, {}),
    "codegen": (lambda: hf("CodeGenModel", **GPT2, rotary_dim=4), "h.1.attn", "qkv_proj", "out_proj", True, SAME_PLACE),
    "gpt_neox": (
        lambda: hf("GPTNeoXModel", **COMMON),
        "layers.1.attention",
        "query_key_value",
        "dense",
        True,
        SAME_PLACE,
    ),
    "phi3_gqa": (lambda: hf("Phi3Model", **GQA), "layers.1.self_attn", "qkv_proj", "o_proj", True, SAME_PLACE),
    "persimmon": (
        lambda: hf("PersimmonModel", **COMMON, qk_layernorm=False),
        "layers.1.self_attn",
        "query_key_value",
        "dense",
        True,
        SAME_PLACE,
    ),
    "falcon_mqa": (
        lambda: hf("FalconModel", **FALCON),
        "h.0.self_attention",
        "query_key_value",
        "dense",
        True,
        SAME_PLACE,
    ),
    "falcon_mha": (
        lambda: hf("FalconModel", **FALCON, multi_query=False),
        "h.0.self_attention",
        "query_key_value",
        "dense",
        True,
        SAME_PLACE,
    ),
    "falcon_groups": (
        lambda: hf("FalconModel", **FALCON, new_decoder_architecture=True, num_kv_heads=2),
        "h.0.self_attention",
        "query_key_value",
        "dense",
        True,
        SAME_PLACE,
    ),
    "modernbert": (
        lambda: hf("ModernBertModel", **COMMON, cls_token_id=0, sep_token_id=0),
        "layers.1.attn",
        "Wqkv",
        "Wo",
        False,
        SAME_PLACE,
    ),
}


@pytest.mark.parametrize("case", FUSED)
def test_fused_attention_is_cut_as_the_model_cuts_it(case):
    build, path, fused, out, causal, arguments = FUSED[case]
    torch.manual_seed(0)
    model = build().eval()
    attention, seen = model.get_submodule(path), {}
    record(attention.get_submodule(fused), seen, "x")
    record(attention.get_submodule(out), seen, "y")
    model(IDS, **arguments)
    targets = by_name(model, f"{path}.{fused}.weight")
    q, k, v = (input_major(targets[f"{path}.{fused}.weight.{role}"]) for role in "qkv")
    expected = attend(seen["x"], seen["x"], q, k, v, HEAD_DIM, causal)
    torch.testing.assert_close(seen["y"].reshape(expected.shape), expected, atol=1e-5, rtol=1e-4)


def test_cross_attention_of_gpt2_is_cut_as_the_model_cuts_it():
    model = hf("GPT2Model", **GPT2, add_cross_attention=True)
    attention, seen = model.h[1].crossattention, {}
    for layer, key in (("q_attn", "x"), ("c_attn", "context"), ("c_proj", "y")):
        record(attention.get_submodule(layer), seen, key)
    model(IDS, encoder_hidden_states=torch.randn(2, 3, D))
    targets = by_name(model, "h.1.crossattention.*")
    q, k, v = (
        targets[f"h.1.crossattention.{name}"].matrix(targets[f"h.1.crossattention.{name}"].parameter.detach())[0]
        for name in ("q_attn.weight", "c_attn.weight.k", "c_attn.weight.v")
    )
    torch.testing.assert_close(seen["y"], attend(seen["x"], seen["context"], q, k, v, HEAD_DIM, causal=False))


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_fused_attention_with_alibi_is_cut_as_the_model_cuts_it(name):
    """Called by itself, with no bias for the distance."""
    x, seen = torch.randn(2, 5, D), {}
    if name == "bloom":
        model = hf("BloomModel", vocab_size=VOCAB, hidden_size=D, n_layer=1, n_head=HEADS)
        path, fused, attention = "h.0.self_attention", "query_key_value", model.h[0].self_attention
        record(attention.dense, seen, "y")
        attention(x, torch.zeros_like(x), torch.zeros(2 * HEADS, 1, 5), attention_mask=torch.zeros(2, 1, 5, 5))
    else:
        model = hf("MptModel", d_model=D, n_heads=HEADS, n_layers=1, vocab_size=VOCAB)
        path, fused, attention = "blocks.0.attn", "Wqkv", model.blocks[0].attn
        record(attention.out_proj, seen, "y")
        attention(x, torch.zeros(HEADS, 1, 5))
    targets = by_name(model, f"{path}.{fused}.weight")
    q, k, v = (input_major(targets[f"{path}.{fused}.weight.{role}"]) for role in "qkv")
    torch.testing.assert_close(seen["y"], attend(x, x, q, k, v, HEAD_DIM, causal=False))


def test_multi_head_attention_is_cut_as_torch_cuts_it():
    attention = nn.MultiheadAttention(D, HEADS, batch_first=True)
    nn.init.eye_(attention.out_proj.weight)
    targets = by_name(nn.ModuleDict({"attn": attention}), "attn.in_proj_weight")
    q, k, v = (input_major(targets[f"attn.in_proj_weight.{role}"]) for role in "qkv")
    x, context = torch.randn(2, 5, D), torch.randn(2, 3, D)
    y, _ = attention(x, context, context, need_weights=False)
    torch.testing.assert_close(y, attend(x, context, q, k, v, HEAD_DIM, causal=False))


def test_deberta_is_cut_as_the_model_cuts_it():
    model = hf("DebertaModel", **COMMON, relative_attention=False)
    attention, seen = model.encoder.layer[1].attention, {}
    record(attention.self.in_proj, seen, "x")
    record(attention.output.dense, seen, "y")
    model(IDS)
    targets = by_name(model, "encoder.layer.1.attention.self.in_proj.weight")
    q, k, v = (input_major(targets[f"encoder.layer.1.attention.self.in_proj.weight.{role}"]) for role in "qkv")
    torch.testing.assert_close(seen["y"], attend(seen["x"], seen["x"], q, k, v, HEAD_DIM, causal=False))


def test_latent_attention_is_cut_as_the_model_cuts_it():
    """Keys are a part per head from the latent, and one rotary part that all heads share."""
    nope, rope, value, rank = 8, 4, 6, 12
    model = hf(
        "DeepseekV3Model",
        **{**COMMON, "num_key_value_heads": HEADS, "first_k_dense_replace": 2, "n_routed_experts": 2, "n_group": 1},
        **{"topk_group": 1, "num_experts_per_tok": 1, "q_lora_rank": None, "kv_lora_rank": rank},
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=value,
    )
    attention, seen = model.layers[1].self_attn, {}
    for layer, key in (("q_proj", "x"), ("kv_b_proj", "latent"), ("o_proj", "y")):
        record(attention.get_submodule(layer), seen, key)
    model(IDS, **SAME_PLACE)
    targets = by_name(model, "layers.1.self_attn.kv*")
    matrix = {name.rpartition(".")[2]: input_major(target) for name, target in targets.items()}
    assert {name: tuple(m.shape) for name, m in matrix.items()} == {
        "latent": (D, rank),
        "k_rope": (D, rope),
        "k": (rank, HEADS * nope),
        "v": (rank, HEADS * value),
    }
    latent = attention.kv_a_layernorm(seen["x"] @ matrix["latent"])
    torch.testing.assert_close(latent, seen["latent"].reshape(latent.shape))

    q = attention.q_proj(seen["x"]).unflatten(-1, (HEADS, nope + rope))
    k = (latent @ matrix["k"]).unflatten(-1, (HEADS, nope))
    shared = (seen["x"] @ matrix["k_rope"])[:, :, None].expand(-1, -1, HEADS, -1)
    v = (latent @ matrix["v"]).unflatten(-1, (HEADS, value))
    q, k, v = (t.transpose(1, 2) for t in (q, torch.cat([k, shared], dim=-1), v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["y"], y, atol=1e-5, rtol=1e-4)


def test_gated_attention_keeps_its_gate_apart_from_the_query():
    """With its gate piece at zero every head comes out halved; only that piece holds the gate."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    model = hf(
        "Qwen3_5TextModel",
        **GQA,
        **linear,
        linear_value_head_dim=8,
        head_dim=HEAD_DIM,
        layer_types=["linear_attention", "full_attention"],
    )
    targets = by_name(model, ["layers.1.self_attn.q_proj.weight", "layers.0.linear_attn.in_proj_qkv.weight"])
    shapes = {name: target.shape for name, target in targets.items()}
    assert [shapes[f"layers.0.linear_attn.in_proj_qkv.weight.{r}"] for r in "qkv"] == [(16, D), (16, D), (32, D)]
    attention, seen = model.layers[1].self_attn, {}
    record(attention.o_proj, seen, "y")
    gate = targets["layers.1.self_attn.q_proj.weight.gate"]
    with torch.no_grad():
        gate.write_(gate.parameter, torch.zeros(1, *gate.shape))
        attention.q_norm.weight.fill_(-1)  # its scale is 1 + weight: at zero, no query tells two keys apart
        model(IDS)
        half = seen["y"]
        query = targets["layers.1.self_attn.q_proj.weight.q"]
        query.write_(query.parameter, torch.randn(1, *query.shape))
        model(IDS)
    torch.testing.assert_close(seen["y"], half)
    assert half.abs().max() > 1e-3


MOE = {**GQA, "num_experts_per_tok": 2}
GATED = {
    # case: model, the module that holds gate and up, the parameter
    "phi3": (lambda: hf("Phi3Model", **GQA), "layers.1.mlp", "gate_up_proj.weight"),
    "modernbert": (
        lambda: hf("ModernBertModel", **COMMON, cls_token_id=0, sep_token_id=0),
        "layers.1.mlp",
        "Wi.weight",
    ),
    "mixtral": (lambda: hf("MixtralModel", **MOE, num_local_experts=3), "layers.1.mlp.experts", "gate_up_proj"),
    "gpt_oss_interleaved": (
        lambda: hf("GptOssModel", **MOE, num_local_experts=3, head_dim=HEAD_DIM),
        "layers.1.mlp.experts",
        "gate_up_proj",
    ),
    "llama4_transposed": (
        lambda: hf(
            "Llama4TextModel",
            **{**GQA, "num_experts_per_tok": 1},
            num_local_experts=3,
            intermediate_size_mlp=FF,
            head_dim=HEAD_DIM,
        ),
        "layers.1.feed_forward.experts",
        "gate_up_proj",
    ),
}


@pytest.mark.parametrize("case", GATED)
def test_fused_gates_are_cut_as_the_model_cuts_them(case):
    """A gate piece at zero shuts every unit; half of the units and half of the gates would not."""
    build, path, name = GATED[case]
    model, seen = build(), {}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "bias" in key:
                parameter.zero_()
    model.get_submodule(path).register_forward_hook(lambda _, args, output: seen.update(y=output))
    targets = by_name(model, f"{path}.{name}")
    gate, up = targets[f"{path}.{name}.gate"], targets[f"{path}.{name}.up"]
    assert sorted(gate.shape) == sorted(up.shape) == [D, FF]
    model(IDS)
    assert seen["y"].abs().max() > 1e-3
    with torch.no_grad():
        gate.write_(gate.parameter, torch.zeros(gate.count, *gate.shape))
    model(IDS)
    assert not seen["y"].any()
    assert up.matrix(up.parameter.detach()).abs().min() > 0


# --- cuts that are stated, and errors -----------------------------------------------------------------------------


class MegatronAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear_qkv = nn.Linear(D, 2 * D, bias=False)
        self.linear_proj = nn.Linear(D, D, bias=False)


def megatron() -> nn.Module:
    return nn.ModuleDict({"attn": MegatronAttention(), "mlp": nn.ModuleDict({"up": nn.Linear(D, FF)})})


def test_a_fused_parameter_of_unknown_layout_is_an_error_that_says_what_to_do():
    message = (
        "attn.linear_qkv.weight of shape (64, 32) looks like several matrices in one, laid out in a way that is not "
        "known: state it by cuts={'attn.linear_qkv.weight': Cut(sizes=(<q>, <k>, <v>), names=('q', 'k', 'v'))}"
    )
    for targets in ("all_2d", "attention", "*.linear_qkv.weight"):
        with pytest.raises(ValueError, match=re.escape(message)):
            select_targets(megatron(), targets)


def test_an_unknown_layout_does_not_matter_where_it_is_not_chosen():
    assert names(megatron(), "mlp") == ["mlp.up.weight"]
    assert names(megatron(), exclude="*.linear_qkv.*") == ["attn.linear_proj.weight", "mlp.up.weight"]
    assert names(megatron(), "attn.linear_proj.weight") == ["attn.linear_proj.weight"]


def test_a_stated_cut_is_used():
    cut = Cut((16, 8, 8), repeats=2, names=("q", "k", "v"))
    targets = select_targets(megatron(), "attention", cuts={"*.linear_qkv.weight": cut})
    assert [target.shape for target in targets] == [(32, D), (16, D), (16, D), (D, D)]
    assert targets[0].cut == cut
    assert names(megatron(), "*.weight.k", cuts={"*.linear_qkv.weight": cut}) == ["attn.linear_qkv.weight.k"]
    assert "attn.linear_qkv.weight" in names(megatron(), cuts={"*.linear_qkv.weight": Cut()})


@pytest.mark.parametrize("role", ["query_key_value", "qkvz_proj", "fused_attn_in", "in_layer"])
def test_a_matrix_that_seems_to_hold_three_is_never_taken_for_one(role):
    model = nn.ModuleDict({"attn": nn.ModuleDict({role: nn.Linear(D, 3 * D), "out_proj": nn.Linear(D, D)})})
    with pytest.raises(ValueError, match="several matrices in one"):
        select_targets(model)


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (64, {"num_heads": 5}),
        (64, {"num_heads": 4, "head_dim": 7}),
        (64, {"num_heads": 4, "num_key_value_heads": 3}),
        (3 * 40, {"num_heads": 4}),  # three equal parts, or grouped queries with wider heads
        (64, {}),
    ],
)
def test_head_counts_that_do_not_fit_are_not_guessed_around(rows, settings):
    attention = nn.ModuleDict({"qkv": nn.Linear(D, rows), "proj": nn.Linear(D, D)})
    attention.config = SimpleNamespace(**settings)
    with pytest.raises(ValueError, match="several matrices in one"):
        select_targets(nn.ModuleDict({"attn": attention}))


def test_a_fused_gate_whose_partner_is_missing_is_an_error():
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"gate_up_proj": nn.Linear(D, 2 * FF)})})
    with pytest.raises(ValueError, match=re.escape("cuts={'mlp.gate_up_proj.weight': Cut(sizes=(<gate>, <up>)")):
        select_targets(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"targets": "atention"},
            "targets must be one of attention, mlp, all_2d or match a parameter, got 'atention'; near names: attention",
        ),
        (
            {"targets": ["mlp", "h.0.attn.c_atn.weight"]},
            "got 'h.0.attn.c_atn.weight'; near names: h.0.attn.c_attn.weight",
        ),
        ({"targets": "*.q_proj.*"}, "got '*.q_proj.*'; near names: c_proj"),
        ({"targets": "*.atn.c_atn.*"}, "got '*.atn.c_atn.*'; near names: c_attn"),
        (
            {"exclude": "h.0.mlp.c_fc.wieght"},
            "exclude must match a parameter, got 'h.0.mlp.c_fc.wieght'; near names: h.0",
        ),
        ({"cuts": {"*.qkv.*": Cut()}}, "cuts must match a parameter, got '*.qkv.*'"),
        ({"cuts": {"*.weight.q": Cut()}}, "cuts must match a parameter, got '*.weight.q'"),
        (
            {"cuts": {"*.c_attn.weight": Cut((D, D))}},
            "cut of h.0.attn.c_attn.weight: sum(sizes) * repeats must be the length 96 of dim 0 of (96, 32), "
            "got sizes=(32, 32), repeats=1",
        ),
        (
            {"cuts": {"*.c_attn.weight": Cut(), "h.0.attn.*": Cut()}},
            "cuts must match a parameter at most once, got ['*.c_attn.weight', 'h.0.attn.*'] for h.0.attn.c_attn",
        ),
        ({"targets": "*.ln_1.weight"}, "got '*.ln_1.weight', which matches h.0.ln_1.weight (vector)"),
        ({"targets": []}, "targets must choose at least one matrix, got targets=[]"),
        ({"exclude": "*"}, "targets must choose at least one matrix, got targets='all_2d', exclude='*'"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        select_targets(NanoGPT(1), **arguments)


def test_an_empty_choice_says_what_there_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2), nn.Embedding(3, 2))
    expected = "the model has 1 convolution (0.weight), 2 vector (0.bias, 2.bias), 1 other (2.weight), 1 embedding"
    with pytest.raises(ValueError, match=re.escape(expected)):
        select_targets(model)


# --- the dry-run table --------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_paper():
    targets = by_name(hf("MixtralForCausalLM", **GQA, num_local_experts=3))
    assert targets["model.layers.0.self_attn.q_proj.weight"].svd_flops == 13 * D**3
    assert targets["model.layers.0.mlp.experts.down_proj"].svd_flops == 3 * (2 * D * FF * D + 11 * D**3)


def test_the_table_lists_every_matrix_its_cost_and_what_was_left_out():
    model = hf("GPTNeoXForCausalLM", **{**COMMON, "num_hidden_layers": 1})
    targets = select_targets(model)
    header, *rows, total, left = format_targets(targets, period=50, model=model).splitlines()
    assert header.split() == ["matrix", "shape", "cut", "group", "SVD", "FLOPs"]
    assert [row.split()[0] for row in rows] == [target.name for target in targets]
    assert [row[header.index("group") :].split()[0] for row in rows] == [target.group for target in targets]
    assert "32 x 32  rows 2/3 x 4  attention  4.26e+05" in rows[1]
    flops = sum(target.svd_flops for target in targets)
    assert total == (
        f"6 matrices (4 attention, 2 mlp) in 4 parameters, {flops:.2e} SVD FLOPs per application, "
        f"{flops / 50:.2e} per step at period 50"
    )
    assert left == "left out: 1 embedding (gpt_neox.embed_in.weight), 1 head (lm_head.weight)"


def test_the_table_counts_experts():
    targets = select_targets(hf("MixtralForCausalLM", **{**GQA, "num_hidden_layers": 1}, num_local_experts=3))
    table = format_targets(targets)
    assert "3 x 32 x 48" in table
    assert "13 matrices (4 attention, 9 mlp) in 6 parameters" in table
