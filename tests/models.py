"""Small models of real classes, each with arguments of its forward, to recognise and to check the cuts of."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from msign_lightning import Target, select_targets

D, FF, HEADS, HEAD_DIM, VOCAB = 32, 48, 4, 8, 64
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": FF,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "max_position_embeddings": 16,
}
GQA = {**COMMON, "num_key_value_heads": 2}
MOE = {**GQA, "num_experts_per_tok": 2, "num_local_experts": 3}
GPT2 = {
    **{"vocab_size": VOCAB, "n_embd": D, "n_layer": 1, "n_head": HEADS, "n_positions": 16},
    **{"bos_token_id": 0, "eos_token_id": 0},
}
FALCON = {key: value for key, value in COMMON.items() if key not in ("intermediate_size", "max_position_embeddings")}
XLNET = {"vocab_size": VOCAB, "d_model": D, "n_layer": 1, "n_head": HEADS, "d_inner": FF}
VISION = {
    **{"hidden_size": D, "intermediate_size": FF, "num_hidden_layers": 1, "num_attention_heads": HEADS},
    **{"image_size": 16, "patch_size": 8},
}


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


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 8, 1, HEADS, D, FF, num_classes=5)


def x_transformer(**settings) -> nn.Module:
    from x_transformers import Encoder

    return Encoder(dim=D, depth=1, heads=HEADS, attn_dim_head=HEAD_DIM, **settings)


def diffusers_mlp(activation: str) -> nn.Module:
    from diffusers.models.attention import FeedForward

    return nn.Sequential(FeedForward(D, activation_fn=activation))


def timm_convit() -> nn.Module:
    from timm.models.convit import ConVit

    # One block of each kind: with positions of its own, and without.
    return ConVit(16, 4, num_classes=5, embed_dim=D, depth=2, num_heads=HEADS, local_up_to_layer=1)


def timm_parallel_block() -> nn.Module:
    from timm.models.vision_transformer import ParallelScalingBlock

    return nn.Sequential(ParallelScalingBlock(D, HEADS))


def timm_glu(**settings) -> nn.Module:
    from timm.layers import GluMlp

    return nn.Sequential(GluMlp(D, 2 * FF, **settings))


def prefixed(prefix: str, suffixes: list[str]) -> list[str]:
    return [prefix + suffix for suffix in suffixes]


IDS = torch.arange(10).reshape(2, 5)
HIDDEN = torch.linspace(-1, 1, 2 * 5 * D).sin().reshape(2, 5, D)
IMAGE = torch.linspace(-9, 9, 3 * 16 * 16).sin().reshape(1, 3, 16, 16)
MODELS = {
    # case: model, arguments, arguments by name
    "nanogpt": (lambda: NanoGPT(1), (IDS,), {}),
    "litgpt_gqa": (lambda: NanoGPT(1, groups=2), (IDS,), {}),
    "gpt2": (lambda: hf("GPT2LMHeadModel", **GPT2), (IDS,), {}),
    "gpt2_cross": (
        lambda: hf("GPT2LMHeadModel", **GPT2, add_cross_attention=True),
        (IDS,),
        {"encoder_hidden_states": HIDDEN},
    ),
    "bigcode_mqa": (lambda: hf("GPTBigCodeModel", **GPT2), (IDS,), {}),
    "bigcode_mha": (lambda: hf("GPTBigCodeModel", **GPT2, multi_query=False), (IDS,), {}),
    "codegen": (lambda: hf("CodeGenModel", **GPT2, rotary_dim=4), (IDS,), {}),
    "gpt_neox": (lambda: hf("GPTNeoXForCausalLM", **COMMON), (IDS,), {}),
    "bloom": (lambda: hf("BloomForCausalLM", vocab_size=VOCAB, hidden_size=D, n_layer=1, n_head=HEADS), (IDS,), {}),
    "mpt": (lambda: hf("MptForCausalLM", d_model=D, n_heads=HEADS, n_layers=1, vocab_size=VOCAB), (IDS,), {}),
    "persimmon": (lambda: hf("PersimmonModel", **COMMON), (IDS,), {}),
    "falcon_mqa": (lambda: hf("FalconModel", **FALCON), (IDS,), {}),
    "falcon_mha": (lambda: hf("FalconModel", **FALCON, multi_query=False), (IDS,), {}),
    "falcon_groups": (
        lambda: hf("FalconModel", **FALCON, new_decoder_architecture=True, num_kv_heads=2),
        (IDS,),
        {},
    ),
    "llama_gqa": (lambda: hf("LlamaForCausalLM", **GQA), (IDS,), {}),
    "phi3": (lambda: hf("Phi3ForCausalLM", **GQA), (IDS,), {}),
    "mixtral": (lambda: hf("MixtralForCausalLM", **MOE), (IDS,), {}),
    "qwen2_moe": (
        lambda: hf(
            "Qwen2MoeForCausalLM",
            **{**GQA, "num_experts": 3, "num_experts_per_tok": 2},
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
        ),
        (IDS,),
        {},
    ),
    "gpt_oss": (lambda: hf("GptOssModel", **MOE, head_dim=HEAD_DIM), (IDS,), {}),
    "llama4": (
        lambda: hf("Llama4TextModel", **{**MOE, "num_experts_per_tok": 1}, intermediate_size_mlp=FF, head_dim=HEAD_DIM),
        (IDS,),
        {},
    ),
    "jetmoe": (
        lambda: hf("JetMoeModel", **{**MOE, "num_key_value_heads": 2}, kv_channels=16),
        (IDS,),
        {},
    ),
    "deepseek_v3": (
        lambda: hf(
            "DeepseekV3Model",
            **{**COMMON, "num_key_value_heads": HEADS, "first_k_dense_replace": 0, "n_routed_experts": 2},
            **{"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "q_lora_rank": None, "kv_lora_rank": 12},
            **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "moe_intermediate_size": FF},
        ),
        (IDS,),
        {},
    ),
    "qwen3_5": (
        lambda: hf(
            "Qwen3_5TextModel",
            **{**GQA, "num_hidden_layers": 2, "head_dim": HEAD_DIM},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
            **{"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        ),
        (IDS,),
        {},
    ),
    "xlstm": (
        lambda: hf(
            "xLSTMModel",
            **{"vocab_size": VOCAB, "hidden_size": 2 * D, "num_hidden_layers": 1, "num_heads": HEADS, "chunk_size": 8},
            **{"qk_dim_factor": 1.0, "mode": "train", "chunkwise_kernel": "chunkwise--native_autograd"},
        ),
        (torch.arange(16)[None],),
        {},
    ),
    "bert_with_pooler_and_head": (lambda: hf("BertForSequenceClassification", **COMMON), (IDS,), {}),
    "bert_masked_lm": (lambda: hf("BertForMaskedLM", **COMMON), (IDS,), {}),
    "modernbert": (lambda: hf("ModernBertModel", **COMMON, cls_token_id=0, sep_token_id=0), (IDS,), {}),
    "deberta": (lambda: hf("DebertaModel", **COMMON, relative_attention=False), (IDS,), {}),
    "opt": (lambda: hf("OPTForCausalLM", **COMMON, word_embed_proj_dim=D, ffn_dim=FF), (IDS,), {}),
    "t5": (
        lambda: hf(
            "T5ForConditionalGeneration",
            **{"vocab_size": VOCAB, "d_model": D, "d_kv": HEAD_DIM, "d_ff": FF, "num_layers": 1, "num_heads": HEADS},
            feed_forward_proj="gated-gelu",
        ),
        (IDS,),
        {"decoder_input_ids": IDS},
    ),
    "siglip_without_pooling_head": (lambda: hf("SiglipVisionModel", **VISION), (IMAGE,), {}),
    "swinv2": (
        lambda: hf(
            "Swinv2Model",
            **{"image_size": 16, "patch_size": 4, "embed_dim": D, "depths": [1], "num_heads": [HEADS]},
            window_size=2,
        ),
        (IMAGE,),
        {},
    ),
    "torchvision_vit": (torchvision_vit, (IMAGE,), {}),
    "torch_transformer": (lambda: nn.Transformer(D, HEADS, 1, 1, FF, batch_first=True), (HIDDEN, HIDDEN[:, 1:]), {}),
    "torch_encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(D, HEADS, FF, batch_first=True), 1),
        (HIDDEN,),
        {},
    ),
    "x_transformers": (lambda: x_transformer(), (HIDDEN,), {}),
    "x_transformers_glu": (lambda: x_transformer(ff_glu=True, ff_swish=True, attn_kv_heads=2), (HIDDEN,), {}),
    "diffusers_geglu": (lambda: diffusers_mlp("geglu"), (HIDDEN,), {}),
    "diffusers_gelu": (lambda: diffusers_mlp("gelu"), (HIDDEN,), {}),
    "timm_convit": (timm_convit, (IMAGE,), {}),
    "timm_parallel_block": (timm_parallel_block, (HIDDEN,), {}),
    "timm_glu": (timm_glu, (HIDDEN,), {}),
    "timm_glu_gate_first": (lambda: timm_glu(gate_last=False), (HIDDEN,), {}),
}
"""Every class that the README names, and others that keep their matrices in ways of their own."""


def cases(*names: str) -> list:
    """Parameters of a test; what torchvision and the extra `models` bring is in the environment that has Composer."""
    elsewhere = ("torchvision", "x_transformers", "diffusers", "timm")
    return [pytest.param(n, marks=pytest.mark.composer if n.startswith(elsewhere) else ()) for n in names]
