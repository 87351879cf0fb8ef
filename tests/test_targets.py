"""A cut is a partition into matrices; presets, globs and exclusions choose among them; mistakes are named."""

import re

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric import Fabric
from models import (
    COMMON,
    FF,
    GQA,
    MODELS,
    NANO_ATTENTION,
    NANO_MLP,
    D,
    NanoBlock,
    NanoGPT,
    by_name,
    cases,
    hf,
    names,
    prefixed,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from msign_lightning import Cut, Target, format_targets, select_targets

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


@pytest.mark.parametrize("case", cases(*MODELS))
def test_targets_of_a_model_round_trip(case):
    """Every chosen matrix is written back alone; together the pieces of a parameter are all of it."""
    targets = select_targets(MODELS[case][0]())
    for parameter in {id(target.parameter): target.parameter for target in targets}.values():
        full = torch.randn(parameter.shape)
        expected = full.clone()
        own = [target for target in targets if target.parameter is parameter]
        assert len(own) == len(own[0].cut.labels)
        assert sum(target.matrix(full).numel() for target in own) == parameter.numel()
        for target in own:
            target.write_(full, 2 * target.matrix(full))
        assert torch.equal(full, 2 * expected)


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


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile])
def test_names_do_not_change_under_fabric(wrap):
    model = Fabric(accelerator="cpu", devices=1).setup(wrap(NanoGPT()))
    assert names(model) == names(NanoGPT())
    assert names(model, "h.0.*", exclude="h.0.mlp.*") == prefixed("h.0.", NANO_ATTENTION)
    with pytest.raises(ValueError, match=re.escape("got 'h.0.attn.c_atn.weight'; near names: h.0.attn.c_attn.weight")):
        select_targets(model, "h.0.attn.c_atn.weight")


def test_names_do_not_change_under_ddp(process_group):
    model = nn.parallel.DistributedDataParallel(NanoGPT())
    fabric = Fabric(accelerator="cpu", devices=1).setup(model)
    assert names(model) == names(torch.compile(model)) == names(fabric) == names(NanoGPT())


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


# --- mistakes


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
