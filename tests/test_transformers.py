"""MSign under the Trainer of Hugging Face, with accelerate: when it acts, what is resumed, and how errors read."""

import json
import logging
import os
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from small_models import llama
from support import assert_same, on_two_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from msign_lightning import Cut, Restoration, restore, select_targets
from msign_lightning.transformers import MSignTrainerCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")


class Text(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = torch.randint(64, (16,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **others):
        control.should_training_stop = state.global_step == self.step


def train(folder, *callbacks, model=None, resume=None, **arguments):
    arguments = {"max_steps": 12, "save_strategy": "no", **arguments}
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **arguments,
    )
    trainer = Trainer(model or llama(), args, train_dataset=Text(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def applied(trainer):
    return [row["step"] for row in trainer.state.log_history if "msign/changed" in row]


def weights(trainer):
    return [p.detach() for p in trainer.model.parameters()]


class ByHand(TrainerCallback):
    """Restores after the fourth step and every later fourth, from outside."""

    def on_step_end(self, args, state, control, model=None, **others):
        if state.global_step % 4 == 0:
            with torch.no_grad():
                for target in select_targets(model):
                    whole = target.matrix(target.parameter)
                    target.write_(target.parameter, restore(whole))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_acts_after_every_period_of_optimizer_steps(tmp_path, accumulation):
    found = train(tmp_path, MSignTrainerCallback(4), gradient_accumulation_steps=accumulation)
    expected = train(tmp_path, ByHand(), gradient_accumulation_steps=accumulation)
    assert applied(found) == [4, 8, 12]
    assert all(map(torch.equal, weights(found), weights(expected)))
    assert not all(map(torch.equal, weights(found), weights(train(tmp_path))))
    (row, *_) = [row for row in found.state.log_history if "msign/changed" in row]
    assert row["msign/changed"] == 14
    assert row["msign/stable_rank_after/min"] > row["msign/stable_rank_before/min"]


@pytest.mark.parametrize("restores_callbacks", [False, True])
def test_a_resumed_run_is_bit_equal(tmp_path, restores_callbacks):
    settings = {"period": 4, "cuts": {"*.up_proj.weight": Cut((24, 24))}}
    whole = train(tmp_path / "whole", MSignTrainerCallback(**settings))
    train(tmp_path, MSignTrainerCallback(**settings), StopAt(6), save_strategy="steps", save_steps=6)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["MSignTrainerCallback"]["attributes"] == {"_steps": [6]}
    resumed = train(
        tmp_path,
        MSignTrainerCallback(**settings),
        resume=str(tmp_path / "checkpoint-6"),
        restore_callback_states_from_checkpoint=restores_callbacks,
    )
    assert applied(resumed) == [4, 8, 12]
    assert all(map(torch.equal, weights(resumed), weights(whole)))


@pytest.mark.parametrize(("period", "steps"), [(4, [8]), (3, [9, 12])], ids=["same", "other"])
def test_the_saved_count_goes_on_or_that_of_the_trainer_with_other_arguments(tmp_path, period, steps):
    train(tmp_path, MSignTrainerCallback(4), StopAt(6), save_strategy="steps", save_steps=6)
    file = tmp_path / "checkpoint-6" / "trainer_state.json"
    state = json.loads(file.read_text()) | {"log_history": []}
    # As if a gradient scaler had skipped a step, which the trainer counts all the same.
    state["stateful_callbacks"]["MSignTrainerCallback"]["attributes"]["_steps"] = [5]
    file.write_text(json.dumps(state))
    assert applied(train(tmp_path, MSignTrainerCallback(period), resume=str(file.parent))) == steps


def test_training_again_counts_from_the_start(tmp_path):
    callback = MSignTrainerCallback(4)
    train(tmp_path, callback, max_steps=6)
    assert applied(train(tmp_path, callback, max_steps=6)) == [4]
    optimizer_hooks = train(tmp_path, callback, max_steps=2).optimizer.optimizer._optimizer_step_post_hooks
    assert len(optimizer_hooks) == 0


def test_the_start_says_what_is_chosen(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "msign_lightning"):
        train(tmp_path, MSignTrainerCallback(4, "attention"), max_steps=1)
    assert "msign: 8 matrices (8 attention) of 8 parameters every 4 optimizer steps" in caplog.text


def test_mistakes_read_as_everywhere(tmp_path):
    with pytest.raises(ValueError, match=r"period must be a positive integer, got 0"):
        MSignTrainerCallback(0)
    with pytest.raises(ValueError, match=r"rule must be one of \('msign', 'cap'\), got 'sign'"):
        MSignTrainerCallback(rule="sign")
    with pytest.raises(ValueError, match=r"targets must .*got '\*q_porj\*'; near names: .*q_proj"):
        train(tmp_path, MSignTrainerCallback(targets="*q_porj*"))


def test_an_optimizer_of_accelerate_can_be_attached():
    model = llama()
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    reports = []
    Restoration(model, 2).attach(optimizer, on_report=reports.append)
    for _ in range(5):
        optimizer.step()
    assert [report.step for report in reports] == [2, 4]


# --- several processes -------------------------------------------------------------------------------------------


def _train_on_rank(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    usual = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **others):
        """Shards are for accelerators only."""
        usual(self, *args, fsdp_plugin=fsdp_plugin, **others)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init
    torch.cuda.current_device = lambda: torch.device("cpu")
    wrap = partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
    found = {}
    for name in ("ddp", "fsdp1", "fsdp2"):
        for callbacks in ([MSignTrainerCallback(period=2)], []):
            AcceleratorState._reset_state()
            arguments = {}
            if name != "ddp":
                layer = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "sync_module_states": False}
                arguments = {"fsdp": True, "fsdp_config": {"version": int(name[-1]), **layer}}
            torch.manual_seed(0)
            model = llama()
            if name == "fsdp1":  # accelerate takes wrapped models as they are
                model.model.layers = nn.ModuleList(map(wrap, model.model.layers))
                model = wrap(model)
            trainer = train(folder, *callbacks, model=model, max_steps=2, remove_unused_columns=False, **arguments)
            with FullyShardedDataParallel.summon_full_params(trainer.model, writeback=False):
                found[f"{name} {'with' if callbacks else 'without'}"] = dict(map(own, trainer.model.named_parameters()))
            assert all(isinstance(p, DTensor) == (name == "fsdp2") for p in trainer.model.parameters())
            assert applied(trainer) == ([2] if callbacks else [])
    return found


def own(item):
    """A parameter's name in one process, and a copy of its values."""
    name, p = item
    return name.replace("_fsdp_wrapped_module.", ""), (
        p.full_tensor() if isinstance(p, DTensor) else p
    ).detach().clone()


@pytest.mark.filterwarnings("ignore")
def test_shards_are_restored_as_one_process_would(tmp_path):
    results = on_two_ranks(_train_on_rank, tmp_path, tmp_path)
    for name in ("ddp", "fsdp1", "fsdp2"):
        model = llama()
        model.load_state_dict(results[0][f"{name} without"], strict=False)
        Restoration(model).apply()
        for of_rank in results:
            assert_same(of_rank[f"{name} with"], dict(model.named_parameters()))
