"""Checkpoints of real writers: read, measured and restored without their code, and read again by their own readers."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from models import COMMON, XLNET, NanoGPT, hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import assert_same, llama, on_ranks, on_two_ranks, weights, windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from msign_lightning import Cut, restore, select_targets
from msign_lightning.checkpoint_files import find_checkpoints, read
from msign_lightning.checkpoints import measure, restore_copy, select
from msign_lightning.spectrum import SpectrumMonitor

ROOT = Path(__file__).parent.parent


def measured(path: Path, **options) -> dict[str, tuple[float, float]]:
    found = [m for rows in measure(select(path, **options)) for m in rows]
    assert all(m.frobenius_norm == pytest.approx(math.sqrt(m.stable_rank) * m.spectral_norm) for m in found)
    return {m.name: (m.stable_rank, m.spectral_norm) for m in found}


def of_monitor(model: nn.Module, prefix: str = "") -> dict[str, tuple[float, float]]:
    spectrum = SpectrumMonitor(select_targets(model)).measure()
    return {prefix + m.name: (m.stable_rank, m.spectral_norm) for m in spectrum.matrices}


def assert_measured_as_by_the_monitor(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


def restored(model: nn.Module, rule: str = "msign") -> nn.Module:
    with torch.no_grad():
        for target in select_targets(model):
            target.write_(target.parameter, restore(target.matrix(target.parameter), rule=rule))
    return model


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16))


class Program(pl.LightningModule):
    """A Lightning program around a model of Hugging Face."""

    def __init__(self, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.model = llama()

    def training_step(self, batch):
        return self.model(input_ids=batch[:, :-1], labels=batch[:, :-1]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def trainer(folder: Path, steps: int) -> pl.Trainer:
    return pl.Trainer(
        **{"max_steps": steps, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        **{"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder},
    )


# --- formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, small_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("with_config", [True, False])
def test_a_folder_of_hugging_face(tmp_path, make, shard, with_config):
    model = make()
    folder = tmp_path / "a model"
    model.save_pretrained(folder, max_shard_size=shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "20KB")
    if not with_config:
        (folder / "config.json").rename(tmp_path / "config.json")
    selection = select(folder)
    assert selection.how == (type(model).__name__ if with_config else "names and shapes")
    assert_measured_as_by_the_monitor(measured(folder), of_monitor(model))

    out = tmp_path / "a restored one"
    restore_copy(folder, out)
    if not with_config:
        (tmp_path / "config.json").rename(out / "config.json")
    assert_same(weights(AutoModelForCausalLM.from_pretrained(out)), weights(restored(model)))
    note = json.loads((out / "msign.json").read_text())
    assert note["rule"] == "msign"
    assert note["stable_rank_before_and_after"].keys() == of_monitor(model).keys()


def test_a_file_of_safetensors_keeps_all_else_and_says_what_was_done(tmp_path):
    model = llama(torch.bfloat16)
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()} | {"counter": torch.arange(3)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    restore_copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "cap", targets="attention")
    new = load_file(tmp_path / "b.safetensors")
    with torch.no_grad():
        for target in select_targets(model, "attention"):
            target.parameter.copy_(restore(target.parameter.detach(), rule="cap"))
    assert_same(new, tensors)
    with safe_open(tmp_path / "b.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["msign_restored"])["rule"] == "cap"


def test_a_run_of_lightning_goes_on_from_a_restored_checkpoint(tmp_path):
    run = trainer(tmp_path, 3)
    run.fit(Program(), windows(8))
    run.save_checkpoint(tmp_path / "step=3.ckpt")
    model = run.lightning_module
    assert read(tmp_path / "step=3.ckpt").step == 3
    assert_measured_as_by_the_monitor(measured(tmp_path / "step=3.ckpt"), of_monitor(model))

    reports = restore_copy(tmp_path / "step=3.ckpt", tmp_path / "good.ckpt")
    assert {r.name for r in reports} == of_monitor(model).keys()
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("step=3.ckpt", "good.ckpt"))
    assert after.pop("msign_restored")["source"] == "step=3.ckpt"
    assert_same(after.pop("state_dict"), restored(model).state_dict())
    del before["state_dict"]
    assert pickle.dumps(before.pop("loops")) == pickle.dumps(after.pop("loops"))
    first, second = (c["optimizer_states"][0]["state"] for c in (before, after))
    for i, state in first.items():
        assert_same(state, second[i])

    again = trainer(tmp_path, 5)
    again.fit(Program(), windows(8), ckpt_path=tmp_path / "good.ckpt")
    assert again.global_step == 5


class Text(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = torch.randint(96, (16,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
def test_a_run_of_the_trainer_of_hugging_face_goes_on_from_a_restored_checkpoint(tmp_path):
    def train(steps: int, source: Path | None = None) -> Trainer:
        arguments = TrainingArguments(
            **{"output_dir": tmp_path / "runs", "max_steps": steps, "save_steps": 3, "learning_rate": 1e-2},
            **{"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"},
        )
        trainer = Trainer(llama(), arguments, train_dataset=Text())
        trainer.train(resume_from_checkpoint=source)
        return trainer

    model = train(3).model
    (source,) = find_checkpoints([tmp_path / "runs"])
    assert read(source).step == 3
    assert_measured_as_by_the_monitor(measured(source), of_monitor(model))
    restore_copy(source, tmp_path / "good")
    assert (tmp_path / "good" / "optimizer.pt").read_bytes() == (source / "optimizer.pt").read_bytes()
    start = train(3, tmp_path / "good")  # which has nothing to do any more
    assert_same(weights(start.model), weights(restored(model)))
    assert train(5, tmp_path / "good").state.global_step == 5


@pytest.mark.composer
def test_a_run_of_composer_goes_on_from_a_restored_checkpoint(tmp_path):
    from support import composer_trainer

    from msign_lightning.algorithms import MSign

    def run(**options):
        from composer.models import HuggingFaceModel
        from transformers import PreTrainedTokenizerFast  # noqa: F401

        model = HuggingFaceModel(llama(), use_logits=True)
        loader = torch.utils.data.DataLoader(
            [{"input_ids": row[:-1], "labels": row[:-1]} for batch in windows(8) for row in batch], batch_size=4
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return composer_trainer(
            model, train_dataloader=loader, optimizers=optimizer, algorithms=[MSign(period=4)], **options
        )

    first = run(max_duration="3ba", save_folder=str(tmp_path / "saved"), save_interval="3ba")
    first.fit()
    (source,) = find_checkpoints([tmp_path / "saved"])
    assert read(source).step == 3
    model = first.state.model
    assert_measured_as_by_the_monitor(measured(source), of_monitor(model))
    restore_copy(source, tmp_path / "good.pt")
    second = run(max_duration="3ba", load_path=str(tmp_path / "good.pt"))
    assert_same(weights(second.state.model), weights(restored(model)))
    assert second.state.timestamp.batch == 3
    second.fit(duration="2ba")
    assert second.state.timestamp.batch == 5


def test_nanogpts_layout_and_plain_state_dicts(tmp_path):
    torch.manual_seed(0)
    model = NanoGPT()
    optimizer = torch.optim.AdamW(model.parameters())
    content = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "bias": True, "vocab_size": 64},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"learning_rate": 6e-4},
    }
    torch.save(content, tmp_path / "ckpt.pt")
    assert read(tmp_path / "ckpt.pt").step == 2000
    assert_measured_as_by_the_monitor(measured(tmp_path / "ckpt.pt"), of_monitor(model))
    restore_copy(tmp_path / "ckpt.pt", tmp_path / "good.pt")
    saved = torch.load(tmp_path / "good.pt", map_location="cpu", weights_only=True)
    assert saved["msign_restored"]["rule"] == "msign"
    other = NanoGPT()
    other.load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()})
    assert_same(weights(other), weights(restored(model)))

    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn\.weight .* name the model"):
        select(tmp_path / "weights.pt")
    cut = {"*.c_attn.weight": Cut((32, 32, 32), names=("q", "k", "v"))}
    restore_copy(tmp_path / "weights.pt", tmp_path / "again.pt", model="models:NanoGPT")
    restore_copy(tmp_path / "weights.pt", tmp_path / "cut.pt", cuts=cut)
    again, by_cut = (torch.load(tmp_path / name, mmap=True, weights_only=True) for name in ("again.pt", "cut.pt"))
    assert_same(again, by_cut)
    other.load_state_dict(again)  # strictly: there is no other key


def save_distributed(rank: int, folder: str, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = llama()
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.AdamW(model.parameters())
    from torch.distributed.checkpoint.state_dict import get_state_dict

    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state, "step": 7}, checkpoint_id=folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_several_ranks_wrote(ranks, tmp_path):
    on_ranks(ranks, save_distributed, tmp_path, str(tmp_path / "step-7"), ranks)
    assert len(list((tmp_path / "step-7").glob("*.distcp"))) == ranks
    model, other = llama(), llama()
    assert read(tmp_path / "step-7").step == 7
    assert_measured_as_by_the_monitor(measured(tmp_path / "step-7"), of_monitor(model))
    restore_copy(tmp_path / "step-7", tmp_path / "good")
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:3000]), Path.unlink):
        shutil.copytree(tmp_path / "step-7", tmp_path / "bad", dirs_exist_ok=True)
        damage(tmp_path / "bad" / "__1_0.distcp")
        with pytest.raises(ValueError, match="__1_0"):
            measured(tmp_path / "bad")
        with pytest.raises(ValueError, match="__1_0"):
            restore_copy(tmp_path / "bad", tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    dcp.load({"model": other.state_dict()}, checkpoint_id=tmp_path / "good", no_dist=True)
    assert_same(weights(other), weights(restored(model)))


def fit_sharded(rank: int, folder: Path, source: Path | None, steps: int) -> dict[str, Tensor]:
    """What a Lightning program over two ranks starts from; it trains and saves a checkpoint."""
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    class Sharded(Program):
        def configure_model(self):
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

        def on_train_start(self):
            self.start = {name: p.detach().full_tensor().clone() for name, p in self.named_parameters()}

    run = pl.Trainer(
        **{"max_steps": steps, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "devices": 2},
        **{"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder},
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        use_distributed_sampler=False,
    )
    run.fit(program := Sharded(), windows(8), ckpt_path=source)
    run.save_checkpoint(folder / f"step={steps}.ckpt")
    assert run.global_step == steps
    return program.start


def test_a_sharded_run_of_lightning_goes_on_from_a_restored_checkpoint(tmp_path):
    on_two_ranks(fit_sharded, tmp_path, tmp_path, None, 3)
    source, good = tmp_path / "step=3.ckpt", tmp_path / "good.ckpt"
    assert read(source).step == 3
    found = measured(source)
    restore_copy(source, good)
    ranks = on_two_ranks(fit_sharded, tmp_path, tmp_path, good, 5)
    program = Program()
    program.load_state_dict(ranks[0])
    assert_measured_as_by_the_monitor(measured(good), of_monitor(program))
    assert found.keys() == of_monitor(program).keys()
    assert_same(*ranks)


# --- bad input ----------------------------------------------------------------------------------------------------


class Hostile:
    def __reduce__(self):
        import os

        return os.system, ("touch hacked",)


@dataclass
class Settings:
    """Of a program's own, as many put them in their checkpoints."""

    width: int = 3


def refused(path: Path, match: str, **options) -> None:
    with pytest.raises(ValueError, match=match):
        select(path, **options)
    with pytest.raises(ValueError, match=match):
        restore_copy(path, path.with_name("out"), **options)
    assert not list(path.parent.glob("*out*"))


def saved(content: object, file: Path) -> Path:
    torch.save(content, file)
    return file


def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = llama().state_dict()
    refused(saved({"state_dict": state, "x": Hostile()}, tmp_path / "a.ckpt"), r"posix\.system, which is refused")
    dcp_folder = tmp_path / "d"
    dcp_folder.mkdir()
    (dcp_folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
    refused(dcp_folder, r"posix\.system, which is refused")
    assert not (tmp_path / "hacked").exists()

    own = saved({"state_dict": state, "x": Settings()}, tmp_path / "own.ckpt")
    refused(own, r"test_checkpoints\.Settings, which is refused .*--allow test_checkpoints")
    assert select(own, allow=["test_checkpoints"]).targets
    # Allowed are names that are then passed over, so that nothing is run even so.
    assert select(tmp_path / "a.ckpt", allow=["posix"]).targets
    assert not (tmp_path / "hacked").exists()


def test_damaged_and_foreign_files_are_refused(tmp_path):
    good = saved({"state_dict": llama().state_dict()}, tmp_path / "good.ckpt").read_bytes()
    save_file({n: p.detach() for n, p in llama().named_parameters()}, tmp_path / "good.safetensors")
    tensors = (tmp_path / "good.safetensors").read_bytes()
    for name, content, match in [
        ("empty.ckpt", b"", "0 bytes"),
        ("short.ckpt", good[: len(good) // 2], "sound archive"),
        ("text.ckpt", b"not a checkpoint", "of another kind"),
        ("short.safetensors", tensors[: len(tensors) // 2], "truncated"),
        ("shorter.safetensors", tensors[:100], "truncated"),
        ("header.safetensors", tensors[:8] + b"{" * 20000, "sound JSON"),
    ]:
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, match)
    torch.save(llama().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt", "before PyTorch 1.6")
    refused(saved([1, 2], tmp_path / "list.pt"), "sound checkpoint")
    refused(saved({"lr": 1.0}, tmp_path / "none.pt"), "weights of a model")
    refused(tmp_path / "lost.pt", "must hold all its files")
    (tmp_path / "model").mkdir()
    index = {"weight_map": {"a": "../good.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path / "model", "files beside it")


def test_a_missing_shard_and_quantised_weights(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shard.rename(tmp_path / "kept")
    refused(tmp_path / "model", f"no {shard.name}")

    state = model.state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    for dtype in (torch.int8, torch.float8_e4m3fn):
        save_file({**state, name: state[name].to(dtype)}, tmp_path / "q.safetensors")
        saved({**state, name: state[name].to(dtype)}, tmp_path / "q.pt")
        for file in ("q.pt", "q.safetensors"):
            rows = [m for found in measure(select(tmp_path / file)) for m in found]
            (marked,) = [m for m in rows if m.note]
            assert marked.name == name
            assert math.isnan(marked.stable_rank)
            with pytest.raises(ValueError, match="to be restored, got"):
                restore_copy(tmp_path / file, tmp_path / "out")


def test_non_finite_weights_are_marked_and_left_as_they_are(tmp_path):
    model = llama()
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = math.nan
    torch.save(model.state_dict(), tmp_path / "a.pt")
    notes = {m.name: m.note for found in measure(select(tmp_path / "a.pt")) for m in found}
    assert {n for n, note in notes.items() if note == "not finite"} == {name}
    reports = restore_copy(tmp_path / "a.pt", tmp_path / "b.pt")
    assert [r.name for r in reports if not r.changed] == [name]
    new = torch.load(tmp_path / "b.pt", weights_only=True)[name]
    assert new.isnan().sum() == 1


def test_a_full_disk_and_an_existing_file_lose_nothing(tmp_path, monkeypatch):
    source = saved(llama().state_dict(), tmp_path / "a.pt")
    before = source.read_bytes()
    (tmp_path / "b.pt").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        restore_copy(source, tmp_path / "b.pt")
    assert (tmp_path / "b.pt").read_text() == "mine"

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    for module, name in ((shutil, "copyfile"), (zipfile.ZipFile, "writestr"), (os, "sync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="No space"):
                restore_copy(source, tmp_path / "c.pt")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt"]
    assert source.read_bytes() == before


def test_a_killed_restoration_leaves_no_half_file(tmp_path, monkeypatch):
    source = saved(llama().state_dict(), tmp_path / "a.pt")
    before = source.read_bytes()
    program = (
        "import os, signal; from msign_lightning import checkpoints as c; "
        "os.sync = lambda: os.kill(os.getpid(), signal.SIGKILL); "
        "c.restore_copy('a.pt', 'b.pt')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=False).returncode == -9
    assert source.read_bytes() == before
    assert not (tmp_path / "b.pt").exists()


def test_the_archive_stays_sound_and_keeps_all_it_held(tmp_path):
    counts = {"steps": [3]}  # of our own `Restoration`, as the README tells to keep them
    saved({"model": llama().state_dict(), "step": 3, "msign": counts}, tmp_path / "a.pt")
    restore_copy(tmp_path / "a.pt", tmp_path / "b.pt", "cap", targets="mlp")
    restore_copy(tmp_path / "b.pt", tmp_path / "c.pt")
    with zipfile.ZipFile(tmp_path / "c.pt") as archive:
        assert archive.testzip() is None
        assert len(set(archive.namelist())) == len(archive.namelist())
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    assert content["msign"] == counts
    assert content["msign_restored"]["rule"] == "msign"


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("layers.0.self_attention.query_key_value.weight", (96, 32), "several matrices in one"),
        ("layers.0.attn.qkv_proj.weight", (96, 32), "names and shapes alone"),
        ("layers.0.self_attn.q_proj.weight", (64, 32), r'"<q>", "<gate>"'),
        ("layers.0.self_attn.kv_b_proj.weight", (64, 16), "not known"),
        ("layers.0.mlp.experts.gate_up_proj", (4, 32, 64), "names and shapes alone"),
    ],
)
def test_names_that_do_not_say_how_a_parameter_is_cut_are_refused(tmp_path, name, shape, match):
    state = {name: torch.randn(shape), "layers.0.self_attn.o_proj.weight": torch.randn(32, 32)}
    state |= {"layers.0.mlp.experts.down_proj": torch.randn(4, 32, 32)} if "experts" in name else {}
    file = saved(state, tmp_path / "a.pt")
    refused(file, match)
    assert select(file, cuts={name: Cut()}).targets
    assert select(file, exclude=name).targets


def test_names_tell_what_no_preset_takes(tmp_path):
    state = {
        "model.embed_tokens.weight": torch.randn(64, 32),
        "encoder.block.0.SelfAttention.relative_attention_bias.weight": torch.randn(32, 4),
        "layers.0.attn.in_proj_weight": torch.randn(96, 32),
        "layers.0.attn.out_proj.weight": torch.randn(32, 32),
        "layers.0.mlp.gate_up_proj.weight": torch.randn(96, 32),
        "layers.0.mlp.down_proj.weight": torch.randn(32, 48),
        "lm_head.weight": torch.randn(64, 32),
    }
    save_file(state, tmp_path / "a.safetensors")
    names = [target.name for target in select(tmp_path / "a.safetensors").targets]
    path = "layers.0."
    attention = [f"{path}attn.in_proj_weight.{label}" for label in "qkv"] + [f"{path}attn.out_proj.weight"]
    assert set(names) == {
        *attention,
        f"{path}mlp.gate_up_proj.weight.gate",
        f"{path}mlp.gate_up_proj.weight.up",
        f"{path}mlp.down_proj.weight",
    }


def test_a_class_that_stores_its_experts_otherwise_still_tells_the_cuts_of_the_rest(tmp_path):
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    model = hf("DeepseekV3ForCausalLM", **COMMON, **latent, **experts, num_experts_per_tok=2, moe_intermediate_size=16)
    model.save_pretrained(tmp_path / "model")
    selection = select(tmp_path / "model")
    attention = [t.name for t in select_targets(model) if t.group == "attention"]
    assert sorted(t.name for t in selection.targets if t.group == "attention") == sorted(attention)
    assert sum("experts" in t.name for t in selection.targets) == 4 * 3 + 3  # and the one that all share
    assert all(not math.isnan(rank) for rank, _ in measured(tmp_path / "model").values())


def test_a_class_that_ignores_the_device_is_built_without_weights_all_the_same(tmp_path):
    model = hf("XLNetLMHeadModel", **XLNET)
    model.save_pretrained(tmp_path / "model")
    assert_measured_as_by_the_monitor(measured(tmp_path / "model"), of_monitor(model))


def test_a_model_must_be_that_of_the_checkpoint(tmp_path):
    file = saved({"state_dict": {f"net.{n}": t for n, t in llama().state_dict().items()}}, tmp_path / "a.ckpt")
    assert len(select(file, model="support:llama").targets) == 14
    refused(file, "once, got no h.0.attn.c_attn.weight", model="models:NanoGPT")
    refused(file, "package.module:function", model="nowhere")
    refused(file, "can't be|No module", model="nowhere:model")


def test_memory_stays_small_for_a_large_sharded_checkpoint(tmp_path):
    """Two gigabytes that take no room on the disk, for they are zero."""
    index: dict[str, str] = {}
    for shard in range(4):
        name, header, end = f"model-{shard}.safetensors", {}, 0
        for layer in range(4 * shard, 4 * shard + 4):
            for matrix in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
                key, size = f"model.layers.{layer}.{matrix}.weight", 2 * 2048 * 2048 * 4
                header[key] = {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [end, end + size]}
                index[key], end = name, end + size
        text = json.dumps(header).encode()
        with (tmp_path / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    program = (
        "import re, sys, lightning.pytorch, transformers; from msign_lightning.cli import main; "
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]); before = peak(); "
        "assert main(['inspect', sys.argv[1], '--targets', '*.q_proj.weight']) == 1; print(peak() - before)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path], env=environment, text=True, stdout=subprocess.PIPE, check=True
    )
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) > 2e9
    assert int(result.stdout.split()[-1]) < 0.45e6  # kilobytes; half a gigabyte has been measured
