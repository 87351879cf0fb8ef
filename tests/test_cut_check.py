"""Cuts against what the forward of real classes does, and wrong cuts that it finds out."""

import pytest
import torch
from models import COMMON, FF, GPT2, GQA, HEAD_DIM, HEADS, HIDDEN, IDS, MODELS, D, NanoGPT, cases, hf
from torch import nn

from msign_lightning import Cut, check_cuts, select_targets


@pytest.mark.parametrize("case", cases(*MODELS))
def test_every_cut_of_every_class_is_what_its_forward_does(case):
    build, args, kwargs = MODELS[case]
    torch.manual_seed(0)
    model = build().eval()
    targets = select_targets(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    proved = check_cuts(targets, model, *args, **kwargs)
    assert set(proved) == {target.parameter_name for target in targets}
    assert [target.parameter_name for target in targets if target.cut.sizes and not proved[target.parameter_name]] == []
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


QKV = (D, D, D)
WRONG = {
    "whole QKV": (
        lambda: hf("GPT2LMHeadModel", **GPT2),
        "*c_attn.weight",
        Cut(),
        "it is cut in one, which mixes columns",
    ),
    "per head": (
        lambda: hf("GPT2LMHeadModel", **GPT2),
        "*c_attn.weight",
        Cut((HEAD_DIM,) * 3, dim=1, repeats=HEADS, names=("q", "k", "v")),
        "piece 'q' mixes columns",
    ),
    "not per head": (
        lambda: hf("GPTNeoXForCausalLM", **COMMON),
        "*query_key_value.weight",
        Cut(QKV, names=("q", "k", "v")),
        "piece 'q' mixes rows",
    ),
    "grouped queries as if not": (
        lambda: NanoGPT(1, groups=2),
        "*c_attn.weight",
        Cut((22, 21, 21), names=("q", "k", "v")),
        "piece 'k' mixes rows",
    ),
    "names changed": (
        lambda: NanoGPT(1),
        "*c_attn.weight",
        Cut(QKV, names=("k", "q", "v")),
        "piece 'k' is what the forward uses as queries",
    ),
    "whole gate and up": (
        lambda: hf("Phi3ForCausalLM", **GQA),
        "*gate_up_proj.weight",
        Cut(),
        "it is cut in one, which mixes rows",
    ),
    "gate and up row by row": (
        lambda: hf("Phi3ForCausalLM", **GQA),
        "*gate_up_proj.weight",
        Cut((1, 1), repeats=FF, names=("gate", "up")),
        "piece 'gate' mixes rows",
    ),
    "up and gate": (
        lambda: hf("Phi3ForCausalLM", **GQA),
        "*gate_up_proj.weight",
        Cut((FF, FF), names=("up", "gate")),
        "piece 'gate' is what the forward uses as up",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_cuts_are_found_out(case):
    build, glob, cut, message = WRONG[case]
    torch.manual_seed(0)
    model = build().eval()
    targets = select_targets(model, cuts={glob: cut})
    with pytest.raises(ValueError, match=f"cut of .*: {message}"):
        check_cuts(targets, model, IDS)


def test_what_the_forward_does_not_use_is_not_proved():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(D, HEADS, batch_first=True), "mlp": nn.Linear(D, D)})
    targets = select_targets(model)
    proved = check_cuts(targets, model["attn"], HIDDEN, HIDDEN, HIDDEN)
    assert proved == {"attn.in_proj_weight": True, "attn.out_proj.weight": True, "mlp.weight": False}
