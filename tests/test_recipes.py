"""Recipes: the transformer, its data, its training, and every recipe through the real command line."""

import math
import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
import yaml
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.optim import SGD, AdamW

from msign_lightning import MSignCallback, check_cuts, recipes, select_targets
from msign_lightning.recipes.data import FixedWindows, RandomWindows, TextDataModule, Windows
from msign_lightning.recipes.module import LanguageModel
from msign_lightning.recipes.train import RecipeCLI, load_recipe
from msign_lightning.recipes.transformer import (
    Attention,
    LatentAttention,
    Transformer,
    TransformerConfig,
    rotary_angles,
    rotate,
)

RECIPES = sorted(Path(recipes.__file__).parent.rglob("*.yaml"))
SMALL = TransformerConfig(n_layers=2, width=16, n_heads=4, mlp_width=32)
LLAMA_LIKE = {"norm": "rmsnorm", "activation": "swiglu", "positions": "rope"}
VARIANTS = {
    "tiny": SMALL,
    "llama": TransformerConfig(n_layers=2, width=16, n_heads=4, mlp_width=24, tied_head=False, **LLAMA_LIKE),
    "grouped, qk norm": TransformerConfig(n_layers=2, width=16, n_heads=4, n_kv_heads=2, mlp_width=32, qk_norm=True),
    "latent": TransformerConfig(n_layers=2, width=16, n_heads=4, mlp_width=24, latent_width=4, **LLAMA_LIKE),
    "experts": TransformerConfig(n_layers=2, width=16, n_heads=4, mlp_width=8, n_experts=4, experts_per_token=2),
    "norm-free": TransformerConfig(n_layers=2, width=16, n_heads=4, mlp_width=32, norm="none", activation="gelu_tanh"),
}


def trainer(tmp_path, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"logger": False, "accelerator": "cpu", "limit_val_batches": 0, **quiet, **settings}
    return pl.Trainer(default_root_dir=tmp_path, **settings)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """More threads only slow such small models down, a lot so where other processes want the cores as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path):
    """A text of 5000 bytes that is quickly learnt."""
    file = tmp_path / "text.txt"
    file.write_bytes((b"the quick brown fox jumps over the lazy dog; " * 112)[:5000])
    return file


class TestTransformer:
    @pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
    def test_logits_depend_on_the_past_alone(self, config):
        torch.manual_seed(0)
        # Queries are drawn as well: at zero, attention weighs the past equally and tells positions little apart.
        model = Transformer(TransformerConfig(**{**vars(config), "zero_query": False}))
        tokens = torch.randint(256, (3, 10))
        changed = tokens.clone()
        changed[:, 6] = (tokens[:, 6] + 1) % 256
        logits, other = model(tokens), model(changed)
        assert logits.shape == (3, 10, 256)
        torch.testing.assert_close(logits[:, :6], other[:, :6])
        for position in range(6, 10):
            assert not torch.allclose(logits[:, position], other[:, position])

    def test_initialisation(self):
        torch.manual_seed(0)
        model = Transformer(TransformerConfig(n_layers=2, width=256, n_heads=4, mlp_width=512, vocab_size=512))
        residual = 0.08 / math.sqrt(2 * 2)
        expected = {"k_proj": 0.08, "v_proj": 0.08, "up_proj": 0.08, "o_proj": residual, "down_proj": residual}
        for block in model.blocks:
            for name, std in expected.items():
                weight = getattr(block.attention, name, None) or getattr(block.mlp, name)
                assert weight.weight.std().item() == pytest.approx(std, rel=0.02)
            assert not block.attention.q_proj.weight.any()
            assert (block.attention_norm.weight == 1).all()
        assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert model.head.weight is model.embedding.weight
        assert not [name for name, _ in model.named_parameters() if "bias" in name]

    def test_query_is_drawn_unless_zero(self):
        assert Attention(TransformerConfig(zero_query=False)).q_proj.weight.any()

    def test_rotation_keeps_norms_and_makes_products_depend_on_the_distance(self):
        config = TransformerConfig(width=32, n_heads=2, positions="rope")
        torch.manual_seed(0)
        q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 8, 16)
        angles = rotary_angles(8, config, torch.device("cpu"))
        rotated_q, rotated_k = rotate(q, angles)[0, 0], rotate(k, angles)[0, 0]
        torch.testing.assert_close(rotated_q.norm(dim=-1), q[0, 0].norm(dim=-1))
        products = rotated_q @ rotated_k.T
        for distance in range(-7, 8):
            diagonal = products.diagonal(distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
        assert products[0].std() > 0.1

    def test_grouped_heads_equal_full_heads_with_repeated_weights(self):
        torch.manual_seed(0)
        shape = {"width": 16, "n_heads": 4, "zero_query": False, "init_std": 0.5}
        grouped, full = Attention(TransformerConfig(n_kv_heads=2, **shape)), Attention(TransformerConfig(**shape))
        state = grouped.state_dict()
        for name in ("k_proj.weight", "v_proj.weight"):
            state[name] = state[name].view(2, 4, 16).repeat_interleave(2, dim=0).view(16, 16)
        full.load_state_dict(state)
        x = torch.randn(2, 5, 16)
        torch.testing.assert_close(grouped(x, None), full(x, None))

    def test_swiglu(self):
        mlp = Transformer(VARIANTS["llama"]).blocks[0].mlp
        x = torch.randn(3, 16)
        gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        torch.testing.assert_close(mlp(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)

    def test_embedding_scale(self):
        torch.manual_seed(0)
        plain = Transformer(TransformerConfig(tied_head=False, zero_query=False))
        scaled = Transformer(TransformerConfig(tied_head=False, zero_query=False, embedding_scale=3.0))
        scaled.load_state_dict(plain.state_dict())
        plain.embedding.weight.data *= 3
        tokens = torch.randint(256, (2, 5))
        torch.testing.assert_close(scaled(tokens), plain(tokens))

    def test_latent_attention_is_attention_with_the_products_of_its_matrices(self):
        torch.manual_seed(0)
        config = TransformerConfig(width=16, n_heads=4, zero_query=False, init_std=0.5)
        latent, full = LatentAttention(config, 4), Attention(config)
        x = torch.randn(2, 5, 16)
        c = latent.kv_norm(latent.kv_a_proj(x))
        torch.testing.assert_close(c, F.rms_norm(x @ latent.kv_a_proj.weight.T, (4,), eps=1e-5))
        # Keys and values of a full attention that sees the latent, in the first four of its inputs.
        seen = F.pad(c, (0, 12))
        for name in ("k_proj", "v_proj"):
            getattr(full, name).weight.data = F.pad(getattr(latent, name).weight.data, (0, 12))
        full.o_proj.weight.data = latent.o_proj.weight.data
        q, k, v = (
            t.unflatten(-1, (4, 4)).transpose(1, 2) for t in (latent.q_proj(x), full.k_proj(seen), full.v_proj(seen))
        )
        scores = (q @ k.mT / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf).softmax(-1)
        torch.testing.assert_close(latent(x, None), full.o_proj((scores @ v).transpose(1, 2).flatten(2)))

    def test_each_token_goes_to_its_experts_by_their_probability(self):
        torch.manual_seed(0)
        mlp = Transformer(TransformerConfig(**{**vars(VARIANTS["experts"]), "init_std": 0.5})).blocks[0].mlp
        experts = mlp.experts
        x = torch.randn(2, 7, 16)
        p = (x @ mlp.router.weight.T).softmax(-1)
        top, chosen = p.topk(2)
        every = [F.gelu(x @ experts.up_proj[e].T) @ experts.down_proj[e].T for e in range(4)]
        mask = torch.zeros_like(p).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
        torch.testing.assert_close(mlp(x), sum(mask[..., e, None] * every[e] for e in range(4)))
        shares = mask.ne(0).flatten(0, 1).float().mean(0) / 2
        torch.testing.assert_close(mlp.balance, 4 * (shares * p.flatten(0, 1).mean(0)).sum())
        assert mlp.balance > 1

    def test_the_balancing_loss_is_trained_on_and_not_reported(self, text, tmp_path):
        model = LanguageModel(VARIANTS["experts"], partial(SGD, lr=0.0))
        record = Record()
        run = trainer(tmp_path, max_steps=1, callbacks=[record])
        run.fit(model, TextDataModule(str(text)))
        balance = 0.01 * torch.stack([block.mlp.balance for block in model.transformer.blocks]).mean()
        assert record.losses[0] == pytest.approx((run.callback_metrics["loss/train"] + balance).item())
        assert balance > 0.009
        assert LanguageModel(SMALL).transformer.balance_loss() == 0

    def test_a_norm_free_model_has_one_norm(self):
        model = Transformer(VARIANTS["norm-free"])
        assert [name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)] == ["norm"]
        x = torch.randn(3, 16)
        mlp = model.blocks[0].mlp
        expected = F.gelu(x @ mlp.up_proj.weight.T, approximate="tanh") @ mlp.down_proj.weight.T
        torch.testing.assert_close(mlp(x), expected)

    @pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
    def test_all_matrices_of_the_blocks_are_found_and_cut_as_the_forward_uses_them(self, config):
        torch.manual_seed(0)
        model = Transformer(TransformerConfig(**{**vars(config), "zero_query": False, "init_std": 0.5}))
        targets = select_targets(model)
        matrices = {name for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim >= 2}
        assert {target.parameter_name for target in targets} == {n for n in matrices if "router" not in n}
        assert all(check_cuts(targets, model, torch.randint(256, (2, 8))).values())

    @pytest.mark.parametrize(("variant", "mlp_matrices"), [("tiny", 2), ("llama", 3)])
    def test_matrices_are_found_as_attention_and_mlp(self, variant, mlp_matrices):
        model = LanguageModel(VARIANTS[variant])
        attention = {f"transformer.blocks.{i}.attention.{m}_proj.weight" for i in range(2) for m in "qkvo"}
        assert {target.parameter_name for target in select_targets(model, "attention")} == attention
        mlp = {target.parameter_name for target in select_targets(model, "mlp")}
        assert len(mlp) == 2 * mlp_matrices
        assert {target.parameter_name for target in select_targets(model)} == attention | mlp

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"n_layers": 0}, "n_layers must be a positive integer, got 0"),
            ({"width": 2.5}, "width must be a positive integer, got 2.5"),
            ({"n_heads": 5}, "n_heads must divide width 32, got 5"),
            ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads must be positive and divide n_heads 4, got 3"),
            ({"n_kv_heads": 0}, "n_kv_heads must be positive and divide n_heads 2, got 0"),
            ({"norm": "batchnorm"}, "norm must be one of .*, got 'batchnorm'"),
            ({"activation": "relu"}, "activation must be one of .*, got 'relu'"),
            ({"positions": "alibi"}, "positions must be one of .*, got 'alibi'"),
            ({"latent_width": 0}, "latent_width must be a positive integer, got 0"),
            ({"n_experts": 3}, "experts_per_token must be from 1 to n_experts 3, got 4"),
            ({"balance_weight": -1}, "balance_weight must not be negative, got -1"),
            ({"init_std": 0.0}, "init_std must be positive and finite, got 0.0"),
            ({"embedding_scale": math.nan}, "embedding_scale must be positive and finite, got nan"),
            ({"n_heads": 32, "positions": "rope"}, "must be even with positions 'rope', got 1"),
        ],
    )
    def test_values_out_of_range(self, settings, message):
        with pytest.raises(ValueError, match=message):
            TransformerConfig(**settings)


class TestWindows:
    @pytest.fixture
    def windows(self):
        return Windows(np.arange(200, dtype=np.uint8), 8, 256)

    def test_batches_are_windows_of_the_text(self, windows):
        batches = torch.cat(list(RandomWindows(windows, 16, 40)))
        assert batches.shape == (640, 9)
        assert (batches.diff(dim=1) == 1).all()
        # Both ends of the text are within reach.
        assert batches.min() == 0
        assert batches.max() == 199

    def test_a_batch_is_a_function_of_seed_and_index(self, windows):
        first, again = RandomWindows(windows, 4, 5, seed=1), RandomWindows(windows, 4, 5, seed=1)
        assert all(map(torch.equal, first, again))
        assert not torch.equal(first.batch(0), first.batch(1))
        assert not torch.equal(first.batch(0), RandomWindows(windows, 4, 5, seed=2).batch(0))

    def test_epochs_differ(self, windows):
        loader = RandomWindows(windows, 4, 5)
        first, second = list(loader), list(loader)
        assert len(first) == len(second) == len(loader) == 5
        assert not any(map(torch.equal, first, second))

    def test_processes_share_the_batches_of_one(self, windows):
        alone = list(RandomWindows(windows, 4, 6))
        ranks = [list(RandomWindows(windows, 4, 3, rank=rank, world_size=2)) for rank in range(2)]
        assert all(map(torch.equal, alone[0::2], ranks[0]))
        assert all(map(torch.equal, alone[1::2], ranks[1]))

    def test_fixed_windows_cover_the_text_once(self, windows):
        loader = FixedWindows(windows, 10, 1000)
        batches = list(loader)
        assert len(batches) == len(loader) == 3
        inputs = torch.cat(batches)[:, :-1].flatten()
        assert torch.equal(inputs, torch.arange(192))

    def test_fixed_windows_are_bounded(self, windows):
        loader = FixedWindows(windows, 10, 13)
        assert [len(batch) for batch in loader] == [10, 3]
        assert len(loader) == 2

    def test_token_outside_the_vocabulary(self, windows):
        loader = FixedWindows(Windows(windows.tokens, 8, 192), 30, 1000)
        with pytest.raises(ValueError, match="tokens must be below vocab_size 192, got 192"):
            list(loader)


class TestTextDataModule:
    def read(self, source, **settings):
        """Bytes that are trained and validated on."""
        data = TextDataModule(str(source), **settings)
        data.setup("fit")
        return tuple(data.windows[split].tokens.tobytes() for split in ("train", "val"))

    def test_prose_is_english(self):
        train, val = self.read("prose")
        assert len(train) == pytest.approx(9 * len(val), rel=0.01)
        assert train.count(b" the ") > 1000

    def test_source_is_python(self):
        train, _ = self.read("source")
        assert train.count(b"\n    def ") > 1000

    def test_file(self, text):
        train, val = self.read(text, val_fraction=0.2)
        assert train + val == text.read_bytes()
        assert len(val) == 1000

    def test_folder_in_order_without_hidden_files(self, tmp_path):
        for name in ("b.txt", "a/z.md", ".git/config", ".hidden"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(name.encode() * 100)
        train, val = self.read(tmp_path, sequence_length=8)
        assert train + val == b"a/z.md" * 100 + b"\n\n" + b"b.txt" * 100

    def test_any_bytes_will_do(self, tmp_path):
        (tmp_path / "binary").write_bytes(bytes(range(256)) * 10)
        assert b"".join(self.read(tmp_path / "binary")) == bytes(range(256)) * 10

    def test_token_files(self, tmp_path):
        tokens = {"train": np.arange(1000, 1300), "val": np.arange(2000, 2100)}
        for split, values in tokens.items():
            values.astype("<u2").tofile(tmp_path / f"{split}.bin")
        data = TextDataModule(str(tmp_path), 10, 3, vocab_size=2100)
        data.setup("fit")
        (first, *_) = data.train_dataloader()
        assert first.dtype == torch.int64
        assert first.min() >= 1000
        assert first.max() < 1300
        assert torch.equal(torch.cat(list(data.val_dataloader()))[:, 0], torch.arange(2000, 2090, 10))
        with pytest.raises(ValueError, match="must hold uint16 tokens below 256, got 1299"):
            TextDataModule(str(tmp_path), 10, 3).setup("fit")

    @pytest.mark.parametrize("files", [{"train.bin": 64}, {"val.bin": 64}])
    def test_token_file_missing(self, tmp_path, files):
        for name, size in files.items():
            (tmp_path / name).write_bytes(bytes(size))
        with pytest.raises(ValueError, match=rf"must hold train.bin and val.bin, got only {next(iter(files))}"):
            self.read(tmp_path)

    @pytest.mark.parametrize("size", [0, 101])
    def test_token_file_of_wrong_size(self, tmp_path, size):
        (tmp_path / "train.bin").write_bytes(bytes(1000))
        (tmp_path / "val.bin").write_bytes(bytes(size))
        with pytest.raises(ValueError, match=rf"val.bin must hold uint16 tokens, got {size} bytes"):
            self.read(tmp_path)

    def test_token_files_of_a_large_vocabulary(self, tmp_path):
        for split in ("train", "val"):
            np.arange(90_000, 90_300).astype("<u4").tofile(tmp_path / f"{split}.bin")
        data = TextDataModule(str(tmp_path), 10, 3, vocab_size=100_000)
        data.setup("fit")
        assert next(iter(data.train_dataloader())).min() >= 90_000
        (tmp_path / "val.bin").write_bytes(bytes(6))
        with pytest.raises(ValueError, match="must hold uint32 tokens"):
            TextDataModule(str(tmp_path), 10, 3, vocab_size=100_000).setup("fit")

    def test_token_files_take_no_tokenizer(self, tmp_path):
        for name in ("train.bin", "val.bin"):
            (tmp_path / name).write_bytes(bytes(1000))
        with pytest.raises(ValueError, match="tokenizer must be None for files of tokens, got 'gpt2'"):
            self.read(tmp_path, tokenizer="gpt2")

    def test_missing_source(self, tmp_path):
        with pytest.raises(ValueError, match=r"source must be .*, got '.*nowhere'"):
            self.read(tmp_path / "nowhere")

    @pytest.mark.parametrize(("size", "split", "got"), [(0, "train", 0), (71, "train", 64), (300, "val", 30)])
    def test_source_too_short(self, tmp_path, size, split, got):
        (tmp_path / "short").write_bytes(bytes(size))
        with pytest.raises(ValueError, match=rf"more than sequence_length 64 tokens to {split} on, got {got}"):
            self.read(tmp_path / "short")

    def test_one_window_is_enough(self, tmp_path):
        (tmp_path / "short").write_bytes(bytes(18))
        data = TextDataModule(str(tmp_path / "short"), 8, val_fraction=0.5)
        data.setup("fit")
        assert next(iter(data.train_dataloader())).shape == (4, 9)
        assert [batch.shape for batch in data.val_dataloader()] == [(1, 9)]

    def test_tokenizer(self, text, tmp_path):
        words = {"[UNK]": 0, "fox": 1, "dog": 2}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tokenizer")
        text.write_text("the fox and the dog " * 100)
        data = TextDataModule(str(text), 16, tokenizer=str(tmp_path / "tokenizer"), vocab_size=3)
        data.setup("fit")
        assert data.windows["train"].tokens.tolist() == [0, 1, 0, 0, 2] * 90

    @pytest.mark.parametrize(
        ("package", "settings", "what"),
        [
            ("datasets", {"source": "hf://name"}, "source 'hf://name'"),
            ("transformers", {"tokenizer": "n"}, "tokenizer 'n'"),
        ],
    )
    def test_missing_extra(self, package, settings, what, monkeypatch):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"{what} needs the package {package}: pip install .*\[datasets\]"):
            TextDataModule(**settings).setup("fit")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"sequence_length": 0}, "sequence_length must be a positive integer, got 0"),
            ({"batch_size": 2.5}, "batch_size must be a positive integer, got 2.5"),
            ({"val_windows": -1}, "val_windows must be a positive integer, got -1"),
            ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1, got 1.0"),
            ({"seed": -1}, "seed must not be negative, got -1"),
        ],
    )
    def test_values_out_of_range(self, settings, message):
        with pytest.raises(ValueError, match=message):
            TextDataModule(**settings)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_each_process_of_a_trainer_gets_its_own_batches(self, rank, text, tmp_path, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setattr(rank_zero_only, "rank", 0)
        data = TextDataModule(str(text))
        data.trainer = trainer(tmp_path, devices=2, strategy="ddp", max_steps=5, accumulate_grad_batches=2)
        data.setup("fit")
        batches = list(data.train_dataloader())
        assert len(batches) == 10
        alone = TextDataModule(str(text))
        alone.setup("fit")
        alone = alone.train_dataloader()
        assert all(torch.equal(batch, alone.batch(2 * i + rank)) for i, batch in enumerate(batches))


class Record(pl.Callback):
    """Keeps what was trained on and logged; saves a checkpoint after some step."""

    def __init__(self, save_at=None, path=None):
        self.batches, self.losses, self.save_at, self.path = [], [], save_at, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch)
        self.losses.append(outputs["loss"].item())
        if trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.path)


class TestLanguageModel:
    # With one text's worth of windows per epoch, step 13 is in the middle of the second epoch.
    @pytest.mark.parametrize(("settings", "save_at"), [({"max_steps": 12}, 7), ({"max_epochs": 2}, 13)])
    def test_resume_equals_uninterrupted(self, settings, save_at, text, tmp_path):
        def fit(record, ckpt_path=None):
            torch.manual_seed(0)
            model = LanguageModel(SMALL)
            data = TextDataModule(str(text), sequence_length=32, batch_size=16)
            trainer(tmp_path, callbacks=[record], **settings).fit(model, data, ckpt_path=ckpt_path)
            return model

        checkpoint = tmp_path / "middle.ckpt"
        whole, rest = Record(save_at, checkpoint), Record()
        uninterrupted, resumed = fit(whole), fit(rest, checkpoint)
        assert 0 < len(rest.batches) == len(whole.batches) - save_at
        assert all(map(torch.equal, rest.batches, whole.batches[save_at:]))
        for left, right in zip(uninterrupted.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(left, right)

    def test_groups_hold_each_parameter_once(self):
        model = LanguageModel(VARIANTS["grouped, qk norm"])
        groups = {group["name"]: group["params"] for group in model.parameter_groups()}
        assert {name: len(params) for name, params in groups.items()} == {"matrices": 12, "embeddings": 1, "gains": 9}
        assert all(p.ndim == 2 for name in ("matrices", "embeddings") for p in groups[name])
        grouped = [id(parameter) for parameters in groups.values() for parameter in parameters]
        assert sorted(grouped) == sorted(map(id, model.parameters()))

    def test_learning_rates_and_weight_decay(self, text, tmp_path):
        model = LanguageModel(SMALL, partial(AdamW, lr=1e-3), warmup_steps=4, matrix_lr=16, embedding_lr=4)
        rates = []

        class Rates(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                rates.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})

        run = trainer(tmp_path, max_steps=24, callbacks=[Rates()])
        run.fit(model, TextDataModule(str(text)))
        share = [rate["gains"] / 1e-3 for rate in rates]
        assert share[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
        assert share[4:] == pytest.approx([1 - 0.9 * step / 20 for step in range(20)])
        for rate in rates:
            assert rate["matrices"] == pytest.approx(16 * rate["gains"])
            assert rate["embeddings"] == pytest.approx(4 * rate["gains"])
        decay = {group["name"]: group["weight_decay"] for group in run.optimizers[0].param_groups}
        assert decay == {"matrices": 0.01, "embeddings": 0.01, "gains": 0.0}

    def test_any_optimizer(self, text, tmp_path):
        run = trainer(tmp_path, max_steps=1)
        run.fit(LanguageModel(SMALL, partial(SGD, lr=0.1)), TextDataModule(str(text)))
        assert isinstance(run.optimizers[0], SGD)

    def test_loss_starts_at_that_of_a_uniform_guess(self):
        torch.manual_seed(0)
        assert LanguageModel(SMALL).loss(torch.randint(256, (8, 33))).item() == pytest.approx(math.log(256), rel=0.01)

    def test_validation_loss_is_the_mean_over_all_windows(self, text, tmp_path):
        model, data = LanguageModel(SMALL), TextDataModule(str(text), val_windows=6)
        (metrics,) = trainer(tmp_path, limit_val_batches=1.0).validate(model, data, verbose=False)
        batches = list(data.val_dataloader())
        assert [len(batch) for batch in batches] == [4, 2]
        assert metrics["loss/val"] == pytest.approx(model.loss(torch.cat(batches)).item())

    def test_run_without_an_end(self, text, tmp_path):
        with pytest.raises(ValueError, match="max_steps or max_epochs must be set, got inf"):
            trainer(tmp_path, max_epochs=-1).fit(LanguageModel(SMALL), TextDataModule(str(text)))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
            ({"final_lr": 2.0}, "final_lr must be between 0 and 1, got 2.0"),
            ({"matrix_lr": 0.0}, "matrix_lr must be positive and finite, got 0.0"),
            ({"embedding_lr": math.inf}, "embedding_lr must be positive and finite, got inf"),
        ],
    )
    def test_values_out_of_range(self, settings, message):
        with pytest.raises(ValueError, match=message):
            LanguageModel(SMALL, **settings)


def msign_callbacks(cli):
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, MSignCallback)]


def command_line(arguments):
    return RecipeCLI(args=arguments, run=False, save_config_callback=None)


def composer_command_line(arguments):
    from msign_lightning.recipes.composer_train import ComposerRecipeCLI

    return ComposerRecipeCLI(args=arguments, run=False, save_config_callback=None)


COMMAND_LINES = [command_line, pytest.param(composer_command_line, marks=pytest.mark.composer)]


class TestCommandLine:
    @pytest.mark.parametrize("file", RECIPES, ids=lambda file: f"{file.parent.name}/{file.stem}")
    def test_every_recipe_builds(self, file):
        recipe = load_recipe(str(file), "--model.config.n_layers=1", "--model.config.width=96")
        assert recipe.trainer.max_steps > 0
        assert recipe.datamodule.vocab_size == recipe.model.transformer.config.vocab_size
        assert len(msign_callbacks(recipe)) == 1

    @pytest.mark.parametrize(
        "option", [("-c", "{}"), ("-c{}",), ("--config", "{}"), ("--config={}",), ("--conf", "{}"), ("--conf={}",)]
    )
    @pytest.mark.parametrize("build", COMMAND_LINES)
    def test_a_recipe_is_named_in_every_form_of_the_option(self, build, option, tmp_path):
        def n_layers(config):
            return build([part.format(config) for part in option]).model.transformer.config.n_layers

        assert n_layers("tiny/source") == 12
        file = tmp_path / "one.yaml"
        file.write_text("model: {config: {n_layers: 1}}")
        assert n_layers(file) == 1
        assert n_layers("{model: {config: {n_layers: 3}}}") == 3

    def test_a_recipe_is_named_after_the_subcommand(self, monkeypatch, capsys):
        monkeypatch.setattr("sys.argv", ["train", "fit", "-c", "tiny/source", "--print_config"])
        with pytest.raises(SystemExit) as stop:
            RecipeCLI()
        assert stop.value.code == 0
        assert yaml.safe_load(capsys.readouterr().out)["model"]["config"]["n_layers"] == 12

    @pytest.mark.parametrize("build", COMMAND_LINES)
    @pytest.mark.parametrize(
        ("name", "near"), [("tiny/pros", "tiny/prose"), ("no/such.yaml", ", ".join(recipes.recipe_names()))]
    )
    def test_an_unknown_recipe_is_an_error_that_lists_near_names(self, build, name, near, capsys):
        with pytest.raises(SystemExit) as stop:
            build(["-c", name])
        assert stop.value.code == 2
        message = f"argument -c/--config: must be a recipe or a file, got {name!r}; near names: {near}"
        assert message in capsys.readouterr().err

    def test_a_recipe_from_a_mapping(self):
        config = {"trainer": {"max_steps": 30, "accelerator": "cpu"}, "msign": {"period": 4}}
        cli = RecipeCLI(args=config, run=False, save_config_callback=None)
        assert (cli.trainer.max_steps, cli.config.msign.stop) == (30, 26)

    @pytest.mark.parametrize(
        ("arguments", "stop"),
        [
            ((), 980),
            (("--trainer.max_steps=50", "--msign.period=10"), 40),
            (("--trainer.max_steps=50", "--msign.period=10", "--msign.stop=50"), 50),
            (("--trainer.max_steps=25",), 20),
            (("--trainer.max_steps=5",), 20),
            (("--trainer.max_steps=100", "--msign.start=90"), 100),
            (("--trainer.max_steps=-1", "--trainer.max_epochs=1"), None),
        ],
    )
    @pytest.mark.parametrize("build", COMMAND_LINES)
    def test_the_last_application_leaves_a_period_to_settle(self, build, arguments, stop):
        assert build(["-c", "tiny/prose", *arguments]).config.msign.stop == stop

    def test_defaults_are_the_tiny_recipe(self):
        recipe = load_recipe("tiny/prose")
        assert recipe.model.transformer.config == TransformerConfig()
        assert recipe.datamodule.source == TextDataModule().source

    def test_arguments_override_the_recipe(self):
        arguments = ("--msign.period=7", "--model.optimizer.lr=0.5", "--seed_everything=3", "--model.config.n_layers=1")
        recipe = load_recipe("tiny/prose", *arguments)
        assert recipe.config.msign.period == 7
        assert recipe.datamodule.seed == 3
        assert recipe.model.transformer.config.n_layers == 1
        optimizer = recipe.model.optimizer(recipe.model.parameter_groups())
        assert isinstance(optimizer, AdamW)
        assert {group["lr"] for group in optimizer.param_groups} == {0.5}

    def test_seed_sets_the_weights(self):
        models = [load_recipe("tiny/prose", f"--seed_everything={seed}").model for seed in (0, 0, 1)]
        same, again, other = (model.transformer.embedding.weight for model in models)
        assert torch.equal(same, again)
        assert not torch.equal(same, other)

    def test_callbacks_and_baseline(self):
        record = Record()
        recipe = load_recipe("tiny/prose", "--use_msign=false", callbacks=[record])
        assert msign_callbacks(recipe) == []
        assert record in recipe.trainer.callbacks

    def test_a_folder_that_cannot_be_written_to_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(
            ValueError, match=r"default_root_dir must be a folder that can be written to, got '.*file/x'"
        ):
            load_recipe("tiny/prose", f"--trainer.default_root_dir={tmp_path}/file/x")

    def test_fit_lowers_the_loss(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        quiet = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
        small = ("--trainer.max_steps=60", "--msign.stop=40", "--data.val_windows=8")
        cli = RecipeCLI(args=["fit", "--config=tiny/prose", *quiet, *small])
        assert cli.trainer.global_step == 60
        assert cli.trainer.callback_metrics["loss/val"] < 0.75 * math.log(256)
        (log_dir,) = (tmp_path / "lightning_logs").iterdir()
        assert {"config.yaml", "checkpoints"} <= {path.name for path in log_dir.iterdir()}
        assert list(log_dir.glob("events.out.tfevents.*"))
