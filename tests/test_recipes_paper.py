"""The paper's four configurations: their sizes, and that each trains, cut down, wherever it is meant to."""

import json
import math
import os
import re
import shlex
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import datasets
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from jsonargparse import Namespace
from support import assert_same, on_ranks, on_two_ranks, weights
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from msign_lightning import stable_rank
from msign_lightning.recipes import module, recipe_file, train
from msign_lightning.recipes.data import TextDataModule, TokenStream
from msign_lightning.recipes.low_precision import BFloat16Attention
from msign_lightning.recipes.module import LanguageModel
from msign_lightning.recipes.train import load_recipe
from msign_lightning.recipes.transformer import Transformer, TransformerConfig

LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "positions": "rope"}
PAPER = {
    # recipe: parameters, how far ours are from them, matrices of the blocks, tokens per optimizer step, rate, init
    "nanogpt_5m": (5e6, 0.1, 24 * (4 * 48**2 + 2 * 48 * 192), 123e3, 6e-4, 4 * 0.02, {"norm": "layernorm"}),
    "sigma_40m": (
        40e6,
        0.03,
        28 * 3 * 128 * 448 + 14 * 4 * 128**2 + 14 * (2 * 128**2 + 3 * 64 * 128),
        66e3,
        3.5e-4,
        4 * 0.006,
        LLAMA,
    ),
    "llama_1b": (1e9, 0.03, 16 * (4 * 2048**2 + 3 * 2048 * 5440), 66e3, 1e-3, 0.02, LLAMA),
    "llama_moe_3b": (
        3e9,
        0.03,
        16 * (4 * 2048**2 + 16 * 2048 + 16 * 3 * 2048 * 1360),
        66e3,
        1e-3,
        0.02,
        LLAMA,
    ),
}
CUT = [
    *("--config", "paper/smoke", "--trainer.precision=bf16-mixed", "--trainer.max_steps=4", "--trainer.logger=false"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.callbacks=null"),
    *("--trainer.enable_checkpointing=false", "--trainer.val_check_interval=8", "--trainer.accumulate_grad_batches=2"),
    *("--model.warmup_steps=2", "--msign.period=2"),
]


def settings(name):
    return yaml.safe_load(recipe_file(f"paper/{name}").read_text())


class Losses(pl.Callback):
    """Keeps the training losses, and saves a checkpoint after two of four steps if it is told where."""

    def __init__(self, checkpoint=None):
        self.losses = []
        self.checkpoint = checkpoint

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["loss/train"].item())
        if self.checkpoint and len(self.losses) == 4:
            trainer.save_checkpoint(self.checkpoint)


def arguments(name, *more):
    return [f"paper/{name}", *CUT, *more]


def fit(name, *more, checkpoint=None, resume=None):
    recipe = load_recipe(*arguments(name, *more), callbacks=[losses := Losses(checkpoint)])
    recipe.trainer.fit(recipe.model, recipe.datamodule, ckpt_path=resume)
    return recipe.model, losses


def assert_restored(model):
    """That all singular values of each matrix are alike, as they are after an application of MSign."""
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    matrices = [p for name, p in whole.items() if ".blocks." in name and p.ndim >= 2 and "router" not in name]
    assert matrices
    for matrix in matrices:
        torch.testing.assert_close(
            stable_rank(matrix.detach()),
            torch.tensor(float(min(matrix.shape[-2:]))).expand(matrix.shape[:-2]),
            rtol=1e-3,
            atol=0,
        )


@pytest.mark.parametrize("name", PAPER)
def test_sizes_are_those_of_the_paper(name):
    parameters, tolerance, blocks, tokens, rate, init, kinds = PAPER[name]
    recipe = settings(name)
    config = TransformerConfig(**recipe["model"]["config"])
    with torch.device("meta"):
        model = Transformer(config)
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim >= 2]
    assert sum(p.numel() for p in matrices) == blocks
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=tolerance)
    assert kinds.items() <= vars(config).items()
    data, trainer = recipe["data"], recipe["trainer"]
    assert data["batch_size"] * data["sequence_length"] * trainer["accumulate_grad_batches"] == pytest.approx(
        tokens, rel=0.01
    )
    assert config.init_std == init
    optimizer = recipe["model"]["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["betas"], optimizer["weight_decay"]) == (rate, [0.9, 0.95], 0.1)
    mup = name in ("nanogpt_5m", "sigma_40m")
    assert (recipe["model"].get("matrix_lr"), recipe["model"].get("embedding_lr")) == ((16, 4) if mup else (None, None))
    assert config.zero_query == config.scaled_residual == mup


@pytest.mark.parametrize("name", PAPER)
def test_each_trains_and_resumes_bit_equal(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, record = fit(name, "--msign.stop=4", checkpoint="middle.ckpt")
    assert len(record.losses) == 4 * 2
    assert np.isfinite(record.losses).all()
    assert_restored(model)
    resumed, rest = fit(name, "--msign.stop=4", resume="middle.ckpt")
    assert rest.losses == record.losses[4:]
    assert_same(weights(model), weights(resumed))


@pytest.mark.composer
@pytest.mark.parametrize("name", PAPER)
def test_each_trains_alike_under_composer(name, tmp_path, monkeypatch):
    from msign_lightning.recipes.composer_train import build_trainer

    monkeypatch.chdir(tmp_path)
    path, *more = arguments(name, "--trainer.precision=32-true")
    model, _ = fit(name, "--trainer.precision=32-true")
    trainer = build_trainer(["--config", path, *more], progress_bar=False)
    trainer.fit()
    for key, parameter in model.transformer.named_parameters():
        torch.testing.assert_close(trainer.state.model.transformer.get_parameter(key), parameter, rtol=1e-4, atol=1e-6)


def documented():
    """The commands of the page on recipes, with the checkpoint that one mentions."""
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    commands = re.findall(r"python -m msign_lightning\.recipes\.train (.+?)(?:#.*)?$", text, re.MULTILINE)
    (resume,) = re.findall(r"--ckpt_path=\S+(?=`)", text)
    (form,) = re.findall(r"--model\.config\.attention=\S+(?=`)", text)
    offline = " ".join(re.search(r"`(--data\.source=prose) (--data\.tokenizer=null)`", text).groups())
    more = [(f"fit -c paper/nanogpt_5m {resume}", resume), (f"fit -c paper/gpt2_bf16 {form}", "")]
    more.append((f"fit -c paper/sigma_40m {offline}", ""))
    return [*((command.strip(), "") for command in commands), *more]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("command", "checkpoint"), documented())
def test_the_documented_commands_start(command, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    Path("my.txt").write_text("some text of mine " * 200)
    name = re.search(r"-(?:c|-config) (\S+)", command).group(1)
    small = "--trainer.max_steps=20 --trainer.accelerator=cpu --trainer.enable_progress_bar=false"
    if name.startswith("paper/"):
        command = command.replace(name, f"{name} -c paper/smoke")
    if checkpoint:
        train.RecipeCLI(
            args=[*shlex.split(f"fit -c {name} -c paper/smoke {small}"), "--trainer.callbacks.every_n_train_steps=10"]
        )
        (saved,) = Path().rglob("*step=10.ckpt")
        command = command.replace(checkpoint, f"--ckpt_path={saved}")
        assert Path(checkpoint).parent.name == saved.parent.name
        assert Path(checkpoint).name == saved.name.replace("=10.", "=1000.")
    try:
        trainer = train.RecipeCLI(args=shlex.split(f"{command} {small}")).trainer
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert trainer.global_step == 20
    assert math.isfinite(trainer.callback_metrics["loss/train"])


@pytest.mark.composer
@pytest.mark.parametrize("name", PAPER)
def test_each_resumes_under_composer(name, tmp_path, monkeypatch):
    from msign_lightning.recipes.composer_train import build_trainer

    monkeypatch.chdir(tmp_path)
    path, *more = arguments(name, "--trainer.precision=32-true", "--msign.stop=4")

    def fitted(**settings):
        trainer = build_trainer(["--config", path, *more], progress_bar=False, **settings)
        trainer.fit()
        trainer.close()
        return weights(trainer.state.model)

    whole = fitted(save_folder="saved", save_interval="2ba", save_filename="{batch}.pt")
    assert_same(whole, fitted(load_path="saved/2.pt"))


def test_a_compiled_recipe_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain, _ = fit("nanogpt_5m", "--trainer.precision=32-true")
    compiled, _ = fit("nanogpt_5m", "--trainer.precision=32-true", "--model.compile=true")
    assert compiled.transformer._compiled_call_impl is not None
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name), parameter, rtol=1e-3, atol=1e-5)


def whole(model):
    """Its weights, gathered from all processes."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    assert all(isinstance(p, DTensor) and p.device_mesh.size() == 2 for p in model.parameters())
    return {name: p.detach().full_tensor() for name, p in model.named_parameters()}


def as_documented(name):
    """The larger two are those to be sharded: in bfloat16."""
    return "--msign.stop=4", f"--trainer.precision={'bf16-mixed' if name.startswith('llama') else '32-true'}"


def _fit_on_rank(rank):
    losses = {}
    for name in PAPER:
        sharded = (name, "--trainer.devices=2", "--trainer.strategy=fsdp2", *as_documented(name))
        model, record = fit(*sharded, checkpoint=f"{name}.ckpt")
        assert_restored(model)
        resumed, rest = fit(*sharded, resume=f"{name}.ckpt")
        assert rest.losses == record.losses[4:]
        assert_same(whole(model), whole(resumed))
        losses[name] = record.losses
    return losses


def test_each_trains_and_resumes_under_fsdp2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    ranks = on_ranks(2, _fit_on_rank, tmp_path, seconds=400)
    assert ranks[0].keys() == ranks[1].keys() == PAPER.keys()
    for name in PAPER:
        _, alone = fit(name, "--trainer.accumulate_grad_batches=4", *as_documented(name))  # sees the same batches
        together = np.stack([rank[name] for rank in ranks], axis=1).flatten()
        np.testing.assert_allclose(together, alone.losses, rtol=1e-3 if name.startswith("llama") else 1e-5)


def test_replicas_that_would_each_train_by_themselves_are_refused():
    model = LanguageModel(TransformerConfig(n_layers=1))
    model._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with pytest.raises(ValueError, match="tensor_parallel_size must be 1, got 2"):
        model.configure_model()


def _fit_with_composer_on_rank(rank):
    from msign_lightning.recipes.composer_train import build_trainer

    os.environ["FSDP_VERSION"] = "2"
    warnings.filterwarnings("ignore", "FSDP2 Config/APIs are experimental")
    for name in PAPER:
        path, *more = arguments(name, "--trainer.precision=32-true", "--msign.stop=4")
        trainer = build_trainer(["--config", path, *more], progress_bar=False, parallelism_config={"fsdp": {}})
        assert all(isinstance(parameter, DTensor) for parameter in trainer.state.model.parameters())
        trainer.fit()
        assert_restored(trainer.state.model)
    return True


@pytest.mark.composer
def test_each_trains_under_composers_fsdp2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert on_two_ranks(_fit_with_composer_on_rank, tmp_path) == [True, True]


def test_too_little_memory_is_said_before_there_is_a_model(monkeypatch):
    monkeypatch.setattr(train, "_memory", lambda accelerator: ("GPU", 24 * 2**30))
    monkeypatch.setattr(module, "Transformer", None)
    with pytest.raises(ValueError, match=r"2\.94G parameters need 44 GiB .*, got 24 GiB of GPU memory: shard them"):
        load_recipe("paper/llama_moe_3b")


@pytest.mark.parametrize(("gpus", "fits"), [("2", True), (1, False), ([0, 1], True), ("0,1", True), ("auto", False)])
def test_shards_are_counted(monkeypatch, gpus, fits):
    monkeypatch.setattr(train, "_memory", lambda accelerator: ("GPU", 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = {"trainer": {"strategy": "fsdp2", "accelerator": "gpu", "devices": gpus, "num_nodes": 1}}
    config["model"] = {"config": Namespace(**settings("llama_moe_3b")["model"]["config"])}
    with nullcontext() if fits else pytest.raises(ValueError, match="got 24 GiB of GPU memory"):
        train._check_memory(config)


# --- streamed data ------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    """Ten documents in two files, as a dataset of a hub is kept."""
    for part in range(2):
        lines = [json.dumps({"text": f"document {part} {i} " + "word " * i}) for i in range(5)]
        (tmp_path / f"part{part}.jsonl").write_text("\n".join(lines))
    return f"hf://{tmp_path}", "".join(
        f"document {part} {i} " + "word " * i + "\n\n" for part in range(2) for i in range(5)
    )


def loader(source, n_batches, rank=0, world_size=1):
    data = TextDataModule(source, 7, 2, val_windows=3)
    data.setup("fit")
    return data, data.train_batches(n_batches, rank, world_size)


def test_a_stream_is_read_in_order_and_again_from_its_start(dataset):
    source, text = dataset
    data, batches = loader(source, 60)
    held_out = torch.cat(list(data.val_dataloader()))
    assert bytes(held_out[:, :-1].flatten().tolist()) == text[:21].encode()
    # The document that validation windows end in is left out.
    rest = text[text.index("document 0 2") :].encode()
    seen = b"".join(bytes(row.tolist()) for batch in batches for row in batch)
    assert len(seen) == 60 * 2 * 8 > 2 * len(text)
    assert (rest + 3 * text.encode()).startswith(seen)


def test_processes_share_a_stream(dataset):
    _, alone = loader(dataset[0], 6)
    ranks = [list(loader(dataset[0], 3, rank, 2)[1]) for rank in range(2)]
    alone = list(alone)
    assert all(map(torch.equal, alone[0::2], ranks[0]))
    assert all(map(torch.equal, alone[1::2], ranks[1]))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stream_is_resumed_where_it_was_left_by_any_number_of_processes(dataset, world_size):
    whole = list(loader(dataset[0], 8)[1])
    _, first = loader(dataset[0], 2, 0, 2)  # the first of two processes, whose state is what a checkpoint holds
    assert len(list(first)) == 2
    state = json.loads(json.dumps(first.state_dict()))
    for rank in range(world_size):
        _, rest = loader(dataset[0], 4 // world_size, rank, world_size)
        rest.load_state_dict(state)
        assert all(map(torch.equal, rest, whole[4 + rank :: world_size]))


def test_a_run_on_a_stream_resumes_bit_equal(dataset, tmp_path):
    def run(max_steps, **settings):
        torch.manual_seed(0)
        trainer = pl.Trainer(
            max_steps=max_steps,
            accelerator="cpu",
            logger=False,
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
        )
        model = LanguageModel(TransformerConfig(n_layers=1))
        model.lr_share = lambda step, last_step: 1.0
        trainer.fit(model, TextDataModule(dataset[0], 7, 2, val_windows=2), **settings)
        return trainer, model

    trainer, _ = run(3)
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    _, resumed = run(6, ckpt_path=tmp_path / "middle.ckpt")
    _, whole = run(6)
    assert_same(weights(whole), weights(resumed))


def test_a_stream_needs_an_end_to_the_run(dataset, tmp_path):
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"max_steps must be set for the stream 'hf://"):
        trainer.fit(LanguageModel(TransformerConfig(n_layers=1)), TextDataModule(dataset[0], 7, 2))


def test_tokens_of_another_vocabulary_in_a_stream(dataset):
    data = TextDataModule(dataset[0], 7, 2, vocab_size=50, val_windows=2)
    data.setup("fit")
    with pytest.raises(ValueError, match="tokens must be below vocab_size 50, got 1"):
        next(iter(data.train_batches(1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "hf:///no/such/folder"}, "source must be something that can be read, got 'hf:///no/such/folder'"),
        ({"tokenizer": "/no/such"}, "tokenizer must be something that can be read, got '/no/such'"),
    ],
)
def test_what_can_not_be_reached_is_said_before_training(settings, message):
    with pytest.raises(ValueError, match=f"{message} .*'prose' with no tokenizer"):
        TextDataModule(**settings).setup("fit")


def test_documents_without_text(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"content": "words", "id": 3}\n')
    with pytest.raises(ValueError, match="documents must have a column 'text', got content, id"):
        TextDataModule(f"hf://{tmp_path}", 7, 2).setup("fit")


def test_a_source_that_is_missing_is_said_before_its_tokenizer():
    with pytest.raises(ValueError, match=r"source must be .* got 'nowhere.txt'"):
        TextDataModule("nowhere.txt", tokenizer="/no/such").setup("fit")


@pytest.mark.parametrize("vocab_size", [50304, 129280])
def test_token_files_of_another_vocabulary_are_said_before_training(tmp_path, vocab_size):
    """Those of a vocabulary above 65,536 are uint32: files of uint16 hold two tokens in each."""
    for split in ("train", "val"):
        np.full(200, 60000, "<u2").tofile(tmp_path / f"{split}.bin")
    kind = "uint16" if vocab_size < 2**16 else "uint32"
    with pytest.raises(ValueError, match=f"must hold {kind} tokens below {vocab_size}, got"):
        TextDataModule(str(tmp_path), 7, 2, vocab_size=vocab_size).setup("fit")


def test_an_empty_stream(tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    stream = TokenStream(
        datasets.load_dataset(str(tmp_path), split="train", streaming=True), lambda text: np.zeros(0, int)
    )
    with pytest.raises(ValueError, match="the stream must hold tokens, got none"):
        stream.take(1)


# --- attention in bfloat16 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stable", [False, True])
def test_attention_in_bfloat16_is_attention(stable):
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3)]
    rounded = [x.detach().requires_grad_() for x in exact]
    outputs = F.scaled_dot_product_attention(*exact, is_causal=True), BFloat16Attention.apply(*rounded, stable)
    torch.testing.assert_close(*outputs, rtol=0, atol=0.03)
    for output in outputs:
        output.square().sum().backward()
    for a, b in zip(exact, rounded, strict=True):
        assert (a.grad - b.grad).norm() < 0.02 * a.grad.norm()


def test_the_stable_form_differs_only_where_the_largest_score_of_a_row_is_tied():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 64, 8).bfloat16()
    k[:, 40] = k[:, 39] = 4 * q[:, 50]  # two keys that query 50 and some others like most
    scores = (q @ k.mT).masked_fill(torch.ones(64, 64, dtype=torch.bool).triu(1), -torch.inf)
    top = scores.topk(2).values[0]
    tied = (top[:, 0] == top[:, 1]) & (top[:, 1] > -torch.inf)
    assert 0 < tied.sum() < 64
    biased, stable = (BFloat16Attention.apply(q, k, v, form)[0] for form in (False, True))
    differs = (biased != stable).any(-1)
    assert differs[tied].any()
    assert not differs[~tied].any()
    torch.testing.assert_close(biased, stable, rtol=0, atol=0.03)


@pytest.mark.parametrize("form", ["bf16_biased", "bf16_stable"])
def test_gpt2_in_bfloat16_trains(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, record = fit("gpt2_bf16", f"--model.config.attention={form}", "--msign.stop=4")
    assert np.isfinite(record.losses).all()
    assert_restored(model)
