"""What is recognised in real models: which matrices presets take, and which parameters are known to hold several."""

import re
from types import SimpleNamespace

import pytest
import torch
from models import (
    COMMON,
    FF,
    GQA,
    HEADS,
    MODELS,
    NANO_ATTENTION,
    NANO_MLP,
    XLNET,
    D,
    NanoAttention,
    NanoBlock,
    NanoGPT,
    by_name,
    cases,
    hf,
    names,
    prefixed,
)
from torch import nn

from msign_lightning import Cut, left_out, select_targets
from msign_lightning.targets import EmptySelectionError

# --- what is chosen -----------------------------------------------------------------------------------------------

LLAMA_ATTENTION = [f"self_attn.{role}_proj.weight" for role in "qkvo"]
LLAMA_MLP = [f"mlp.{role}_proj.weight" for role in ("gate", "up", "down")]
STACKS = ["experts.gate_up_proj.gate", "experts.gate_up_proj.up", "experts.down_proj"]
BERT_ATTENTION = [f"attention.self.{role}.weight" for role in ("query", "key", "value")]
MHA = [f"in_proj_weight.{role}" for role in "qkv"] + ["out_proj.weight"]
T5_ATTENTION = [f"{role}.weight" for role in "qkvo"]
H_TO_4H = ["mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"]
NEOX_ATTENTION = [f"query_key_value.weight.{role}" for role in "qkv"] + ["dense.weight"]

CHOSEN = {
    # case: matrices of attentions, of MLPs
    "nanogpt": (
        prefixed("h.0.", NANO_ATTENTION),
        prefixed("h.0.", NANO_MLP),
    ),
    "gpt2_cross": (
        prefixed("transformer.h.0.", NANO_ATTENTION)
        + prefixed(
            "transformer.h.0.crossattention.", ["c_attn.weight.k", "c_attn.weight.v", "q_attn.weight", "c_proj.weight"]
        ),
        prefixed("transformer.h.0.", NANO_MLP),
    ),
    "llama_gqa": (
        prefixed("model.layers.0.", LLAMA_ATTENTION),
        prefixed("model.layers.0.", LLAMA_MLP),
    ),
    "mixtral": (
        prefixed("model.layers.0.", LLAMA_ATTENTION),
        prefixed("model.layers.0.mlp.", STACKS),
    ),
    "qwen2_moe": (
        prefixed("model.layers.0.", LLAMA_ATTENTION),
        prefixed("model.layers.0.mlp.", STACKS)
        + [f"model.layers.0.mlp.shared_expert.{role}_proj.weight" for role in ("gate", "up", "down")],
    ),
    "gpt_neox": (
        prefixed("gpt_neox.layers.0.attention.", NEOX_ATTENTION),
        prefixed("gpt_neox.layers.0.", H_TO_4H),
    ),
    "bloom": (
        prefixed("transformer.h.0.self_attention.", NEOX_ATTENTION),
        prefixed("transformer.h.0.", H_TO_4H),
    ),
    "mpt": (
        [f"transformer.blocks.0.attn.Wqkv.weight.{role}" for role in "qkv"]
        + ["transformer.blocks.0.attn.out_proj.weight"],
        prefixed("transformer.blocks.0.ffn.", ["up_proj.weight", "down_proj.weight"]),
    ),
    "bert_with_pooler_and_head": (
        prefixed("bert.encoder.layer.0.", [*BERT_ATTENTION, "attention.output.dense.weight"]),
        prefixed("bert.encoder.layer.0.", ["intermediate.dense.weight", "output.dense.weight"]),
    ),
    "bert_masked_lm": (
        prefixed("bert.encoder.layer.0.", [*BERT_ATTENTION, "attention.output.dense.weight"]),
        prefixed("bert.encoder.layer.0.", ["intermediate.dense.weight", "output.dense.weight"]),
    ),
    "opt": (
        prefixed("model.decoder.layers.0.self_attn.", [f"{role}_proj.weight" for role in ("k", "v", "q", "out")]),
        prefixed("model.decoder.layers.0.", ["fc1.weight", "fc2.weight"]),
    ),
    "phi3": (
        prefixed("model.layers.0.self_attn.", ["o_proj.weight", *[f"qkv_proj.weight.{role}" for role in "qkv"]]),
        prefixed("model.layers.0.mlp.", ["gate_up_proj.weight.gate", "gate_up_proj.weight.up", "down_proj.weight"]),
    ),
    "t5": (
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
        prefixed("encoder.layers.encoder_layer_0.self_attention.", MHA),
        prefixed("encoder.layers.encoder_layer_0.mlp.", ["0.weight", "3.weight"]),
    ),
    "torch_transformer": (
        prefixed("encoder.layers.0.self_attn.", MHA)
        + prefixed("decoder.layers.0.self_attn.", MHA)
        + prefixed("decoder.layers.0.multihead_attn.", MHA),
        [f"{stack}.layers.0.linear{i}.weight" for stack in ("encoder", "decoder") for i in (1, 2)],
    ),
    "siglip_without_pooling_head": (
        [f"encoder.layers.0.self_attn.{role}_proj.weight" for role in ("k", "v", "q", "out")],
        prefixed("encoder.layers.0.mlp.", ["fc1.weight", "fc2.weight"]),
    ),
    "jetmoe": (
        prefixed("layers.0.self_attention.", [f"experts.{way}put_linear.weight" for way in ("in", "out")])
        + prefixed("layers.0.self_attention.kv_proj.weight.", ["k", "v"]),
        prefixed("layers.0.mlp.", ["input_linear.weight.gate", "input_linear.weight.up", "output_linear.weight"]),
    ),
    "xlstm": ([], prefixed("blocks.0.ffn.", [f"proj_{role}.weight" for role in ("up_gate", "up", "down")])),
    "swinv2": (
        prefixed("encoder.layers.0.blocks.0.", [*BERT_ATTENTION, "attention.output.dense.weight"]),
        prefixed("encoder.layers.0.blocks.0.attention.self.continuous_position_bias_mlp.", ["0.weight", "2.weight"])
        + prefixed("encoder.layers.0.blocks.0.", ["intermediate.dense.weight", "output.dense.weight"]),
    ),
    "x_transformers_glu": (
        [f"layers.0.1.to_{role}.weight" for role in ("q", "k", "v", "out")],
        prefixed("layers.1.1.ff.", ["0.proj.weight.up", "0.proj.weight.gate", "2.weight"]),
    ),
    "diffusers_geglu": ([], prefixed("0.net.", ["0.proj.weight.up", "0.proj.weight.gate", "2.weight"])),
    "diffusers_gelu": ([], prefixed("0.net.", ["0.proj.weight", "2.weight"])),
    "timm_convit": (
        [f"blocks.0.attn.{name}.weight" for name in ("v", "proj", "pos_proj")]
        + prefixed("blocks.0.attn.qk.weight.", ["q", "k"])
        + [f"blocks.1.attn.qkv.weight.{role}" for role in "qkv"]
        + ["blocks.1.attn.proj.weight"],
        [f"blocks.{i}.mlp.fc{j}.weight" for i in (0, 1) for j in (1, 2)],
    ),
    "timm_parallel_block": (
        [*prefixed("0.in_proj.weight.", ["q", "k", "v"]), "0.attn_out_proj.weight"],
        ["0.in_proj.weight.mlp", "0.mlp_out_proj.weight"],
    ),
    "timm_glu": ([], ["0.fc1.weight.up", "0.fc1.weight.gate", "0.fc2.weight"]),
    "timm_glu_gate_first": ([], ["0.fc1.weight.gate", "0.fc1.weight.up", "0.fc2.weight"]),
}


@pytest.mark.parametrize("case", cases(*CHOSEN))
def test_presets_choose_the_matrices_of_the_blocks(case):
    attention, mlp = CHOSEN[case]
    model = MODELS[case][0]()
    for preset, chosen in (("attention", attention), ("mlp", mlp), ("all_2d", attention + mlp)):
        if chosen:
            assert sorted(names(model, preset)) == sorted(chosen)
        else:
            with pytest.raises(EmptySelectionError):
                select_targets(model, preset)
    assert names(model, ["mlp", "attention"]) == names(model, "all_2d")


def test_a_stack_of_experts_is_a_batch():
    targets = by_name(hf("MixtralForCausalLM", **GQA, num_local_experts=3), "mlp")
    down = targets["model.layers.0.mlp.experts.down_proj"]
    assert (down.count, down.shape, down.group) == (3, (D, FF), "mlp")
    assert torch.equal(down.matrix(down.parameter.detach())[2], down.parameter[2])
    gate = targets["model.layers.0.mlp.experts.gate_up_proj.gate"]
    assert (gate.count, gate.shape, gate.parameter_name) == (3, (FF, D), "model.layers.0.mlp.experts.gate_up_proj")
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


def test_a_narrow_layer_after_a_wide_one_is_no_fused_gate():
    mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32))
    assert names(nn.ModuleDict({"mlp": mlp})) == ["mlp.0.weight", "mlp.2.weight"]


def test_a_matrix_kept_in_a_layer_of_its_own_has_the_role_of_the_layer():
    """As `q_proj.linear` of some models, and what PEFT puts around a layer."""
    layers = {"qkv": nn.Linear(D, 3 * D), "proj": nn.Linear(D, D)}
    for inner in ("linear", "base_layer"):
        wrapped = nn.ModuleDict({role: nn.ModuleDict({inner: layer}) for role, layer in layers.items()})
        assert names(nn.ModuleDict({"attn": wrapped})) == [
            *[f"attn.qkv.{inner}.weight.{role}" for role in "qkv"],
            f"attn.proj.{inner}.weight",
        ]


def test_the_gate_of_a_glu_is_no_router():
    model = nn.ModuleDict({"mlp": nn.ModuleDict({n: nn.Linear(D, D) for n in ("gate", "up", "down")})})
    assert names(model) == ["mlp.gate.weight", "mlp.up.weight", "mlp.down.weight"]


def test_a_model_inside_a_module_called_embedder_or_head_is_still_chosen():
    model = nn.ModuleDict({"embedder": NanoGPT(1)})
    assert names(model) == prefixed("embedder.h.0.", NANO_ATTENTION + NANO_MLP)


# --- fused in ways that are not known


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


@pytest.mark.parametrize(
    ("role", "rows", "others", "pieces"),
    [
        ("query_key_value", 3 * D, (), "qkv"),
        ("qkvz_proj", 3 * D, (), "qkvz"),
        ("fused_attn_in", 3 * D, (), "qkv"),
        ("in_layer", 3 * D, (), "qkv"),
        ("attn", 2 * D, (), "qkv"),  # with grouped queries (LitGPT once)
        ("attn", D + 16, (), "qkv"),
        ("in_layer", 2 * D, ("v",), "qkv"),
        ("to_qk", 48, ("to_v",), "qk"),
        ("Wqk", D, ("Wv",), "qk"),  # two halves, or one matrix for both
        ("to_kv", 48, ("to_q",), "kv"),
    ],
)
def test_a_matrix_that_seems_to_hold_several_is_never_taken_for_one(role, rows, others, pieces):
    layers = {role: nn.Linear(D, rows), **{other: nn.Linear(D, D) for other in others}, "out_proj": nn.Linear(D, D)}
    example = f"Cut(sizes=({', '.join(f'<{piece}>' for piece in pieces)}), names={tuple(pieces)})"
    with pytest.raises(ValueError, match=re.escape(f"cuts={{'attn.{role}.weight': {example}}}")):
        select_targets(nn.ModuleDict({"attn": nn.ModuleDict(layers)}))


@pytest.mark.parametrize(
    ("role", "settings", "sizes"),
    [
        ("qk", {}, (D, D)),
        ("to_qk", {"num_heads": 2, "head_dim": D}, (2 * D, 2 * D)),
        ("Wqk", {"num_heads": HEADS, "head_dim": 8}, ()),  # one matrix for queries and keys (Reformer)
    ],
)
def test_queries_and_keys_in_one_are_cut_where_their_sizes_are_known(role, settings, sizes):
    attention = nn.ModuleDict({role: nn.Linear(D, sum(sizes) or D), "v": nn.Linear(D, D)})
    attention.config = SimpleNamespace(**settings)
    target = select_targets(nn.ModuleDict({"attn": attention}))[0]
    assert (target.cut.sizes, target.cut.names) == (sizes, ("q", "k") if sizes else ())


def test_a_wide_layer_beside_keys_and_values_is_one_matrix():
    layers = {"k": nn.Linear(D, D), "v": nn.Linear(D, D), "positions": nn.Linear(3, 9)}
    assert len(select_targets(nn.ModuleDict({"attn": nn.ModuleDict(layers)}))) == 3


def test_levit_keeps_parts_of_unequal_size_per_head():
    model = hf("LevitModel", hidden_sizes=[D, D, D], num_attention_heads=[2, 2, 2], depths=[1, 1, 1])
    with pytest.raises(ValueError, match=r"queries_keys_values.linear.weight of shape .* several matrices in one"):
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


def test_a_glu_whose_other_layer_is_missing_is_an_error():
    class GLU(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(D, 2 * FF)

    with pytest.raises(ValueError, match="several matrices in one"):
        select_targets(nn.ModuleDict({"ff": nn.ModuleList([GLU()])}))


def test_attention_of_three_dimensions_is_left_out_and_a_glob_says_why():
    model = hf("XLNetModel", **XLNET)
    assert names(model) == ["layer.0.ff.layer_1.weight", "layer.0.ff.layer_2.weight"]
    assert "6 attention of three dimensions (layer.*.rel_attn.q, layer.*.rel_attn.k" in left_out(
        model, select_targets(model)
    )
    with pytest.raises(ValueError, match=r"which matches layer.0.rel_attn.q \(attention of three dimensions\)"):
        select_targets(model, "*.rel_attn.q")


SSM = {"mamba_d_state": 4, "use_mamba_kernels": False}
MIXERS = {
    "JambaForCausalLM": {
        **{**GQA, **SSM, "num_hidden_layers": 2, "num_experts": 2, "num_experts_per_tok": 1, "mamba_dt_rank": 4},
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    },
    "BambaForCausalLM": {
        **{**GQA, "num_hidden_layers": 2, "attn_layer_indices": [1]},
        **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4},
    },
    "Zamba2ForCausalLM": {
        **{**COMMON, **SSM, "num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
        **{"n_mamba_heads": 2, "mamba_headdim": 32, "adapter_rank": 4},
    },
}


@pytest.mark.parametrize("name", MIXERS)
def test_what_is_left_out_of_hybrid_models_is_said(name):
    model = hf(name, **MIXERS[name])
    targets = select_targets(model)
    assert {target.group for target in targets} == {"attention", "mlp"}
    said = left_out(model, targets)
    assert "mamba.in_proj.weight" in said
    assert "convolution (model.layers.0.mamba.conv1d.weight" in said
    assert "embed" not in said
    assert "lm_head" not in said
    with pytest.raises(ValueError, match=r"mamba.in_proj.weight .* several matrices in one"):
        select_targets(model, "*.mamba.in_proj.weight")
