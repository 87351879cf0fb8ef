"""MSignCallback under real Lightning trainers."""

import csv
import logging
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from support import assert_same, llama, weights, windows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, DistributedSampler

from msign_lightning import MSignCallback, Restoration, restore, select_targets
from msign_lightning.recipes.data import RandomWindows

pytestmark = [
    # Lightning advises more workers and shorter logging intervals; neither makes sense for a dozen tiny batches.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class LanguageModule(pl.LightningModule):
    """A Llama of two layers that records nothing but its own steps."""

    def __init__(self, optimizer: str = "adamw", lr: float = 1e-2) -> None:
        super().__init__()
        self.model = llama()
        self.optimizer, self.lr = optimizer, lr
        self.infinite_batches: tuple[int, ...] = ()

    def loss(self, tokens_BT: Tensor) -> Tensor:
        return self.model(input_ids=tokens_BT, labels=tokens_BT).loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        return loss * float("inf") if batch_idx in self.infinite_batches else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1)
        return torch.optim.AdamW(self.parameters(), lr=self.lr, fused=self.optimizer == "fused")


class ManualModule(LanguageModule):
    """Manual optimization with one optimizer for attention and one for the rest, which steps twice as often."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        attention, rest = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss)
        rest.step()
        if batch_idx % 2:
            attention.step()
        attention.zero_grad()
        rest.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        attention = [p for name, p in self.named_parameters() if "self_attn" in name]
        rest = [p for name, p in self.named_parameters() if "self_attn" not in name]
        return [torch.optim.AdamW(attention, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3)]


class ValidatedModule(LanguageModule):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


def batches() -> RandomWindows:
    """An epoch of ten batches, which a resumed run continues in its middle."""
    return windows(10)


def make_trainer(tmp_path: Path, *callbacks: Callback, **arguments) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 10,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | arguments))


def fit(tmp_path: Path, callback: Callback | None = None, module: LanguageModule | None = None, **arguments):
    module = module or LanguageModule()
    trainer = make_trainer(tmp_path, *[callback] if callback else [], **arguments)
    trainer.fit(module, batches())
    return module


def read_metrics(logger: CSVLogger) -> list[dict[str, str]]:
    return list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))


class Spy(Callback):
    """Records after which optimizer steps the weights are orthogonal, i.e. were just restored."""

    def __init__(self, name: str = "model.model.layers.0.self_attn.q_proj.weight") -> None:
        self.name, self.restored = name, []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        singular_values = torch.linalg.svdvals(pl_module.get_parameter(self.name).detach().double())
        if singular_values.max() < 1.001 * singular_values.min():
            self.restored.append(trainer.global_step)


@pytest.mark.parametrize("rule", ["msign", "cap"])
def test_same_weights_as_plain_pytorch_and_as_a_naive_loop(tmp_path, rule):
    by_callback = fit(tmp_path, MSignCallback(period=4, rule=rule))

    attached = LanguageModule()
    optimizer = attached.configure_optimizers()
    Restoration(attached, period=4, rule=rule).attach(optimizer)
    naive = LanguageModule()
    naive_optimizer = naive.configure_optimizers()
    for module, opt in ((attached, optimizer), (naive, naive_optimizer)):
        for step, batch in enumerate(batches(), start=1):
            opt.zero_grad()
            module.loss(batch).backward()
            opt.step()
            if module is naive and step % 4 == 0:
                with torch.no_grad():
                    for name, p in module.named_parameters():
                        if "self_attn" in name or "mlp" in name:
                            p.copy_(restore(p, rule=rule))
    assert_same(weights(by_callback), weights(attached))
    assert_same(weights(by_callback), weights(naive))


def test_it_changes_the_run(tmp_path):
    with pytest.raises(AssertionError):
        assert_same(weights(fit(tmp_path, MSignCallback(period=4))), weights(fit(tmp_path)))


def test_gradient_accumulation_counts_optimizer_steps(tmp_path):
    spy = Spy()
    callback = MSignCallback(period=2)
    trainer = make_trainer(tmp_path, callback, spy, max_steps=-1, max_epochs=1, accumulate_grad_batches=3)
    trainer.fit(LanguageModule(lr=0.0), batches())  # 10 batches: windows of 3, 3, 3 and a short one
    assert trainer.global_step == 4
    assert callback.state_dict() == {"steps": [4]}
    assert 2 in spy.restored


@pytest.mark.parametrize("optimizer", ["adamw", "fused"])
def test_steps_skipped_by_the_gradient_scaler_do_not_count(tmp_path, optimizer):
    module = LanguageModule(optimizer)
    module.infinite_batches = (1, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    callback = MSignCallback(period=4, targets="attention")
    trainer = make_trainer(tmp_path, callback, max_steps=-1, max_epochs=1, plugins=[precision])
    trainer.fit(module, batches())
    assert trainer.global_step == 10
    assert callback.state_dict() == {"steps": [8]}
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_manual_optimization_with_several_optimizers(tmp_path, precision):
    callback = MSignCallback(period=5)
    attention, mlp = Spy(), Spy("model.model.layers.1.mlp.up_proj.weight")
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(
        tmp_path, callback, attention, mlp, max_steps=-1, max_epochs=1, logger=logger, precision=precision
    )
    trainer.fit(ManualModule(), batches())
    assert callback.state_dict() == {"steps": [5, 10]}
    rows = read_metrics(logger)
    assert sorted((int(row["step"]), float(row["msign/changed"])) for row in rows) == [(5, 6), (5, 8), (10, 6)]
    assert attention.restored == [15]  # Lightning's global_step adds up both optimizers
    assert mlp.restored == [7, 15]


def test_lbfgs_counts_once_per_step(tmp_path):
    callback, spy = MSignCallback(period=2), Spy()
    fit_trainer = make_trainer(tmp_path, callback, spy, max_steps=4)
    fit_trainer.fit(LanguageModule("lbfgs"), batches())
    assert callback.state_dict() == {"steps": [4]}
    assert spy.restored == [2, 4]


def test_compiled_module_does_not_recompile(tmp_path):
    module = LanguageModule()
    module.model.compile(backend="aot_eager")
    compiled_by_step: list[int] = []

    class CountGraphs(Callback):
        def on_train_batch_end(self, *_) -> None:
            compiled_by_step.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    spy = Spy()
    make_trainer(tmp_path, MSignCallback(period=4), CountGraphs(), spy).fit(module, batches())
    assert compiled_by_step[0] > 0
    assert compiled_by_step[-1] == compiled_by_step[2]
    assert spy.restored == [4, 8]


def test_names_of_a_compiled_module_are_stripped():
    module = LanguageModule()
    names = [t.name for t in select_targets(module)]
    module.model = torch.compile(module.model)
    assert [t.name for t in select_targets(module)] == names


@pytest.mark.parametrize("msign_first", [True, False])
def test_weight_averaging_sees_restored_weights_in_either_order(tmp_path, msign_first):
    callbacks = [MSignCallback(period=3), WeightAveraging(avg_fn=get_ema_avg_fn(0.5))]
    module = LanguageModule()
    make_trainer(tmp_path, *callbacks if msign_first else reversed(callbacks)).fit(module, batches())

    average = LanguageModule()
    raw = LanguageModule()
    optimizer = raw.configure_optimizers()
    Restoration(raw, period=3).attach(optimizer)
    for step, batch in enumerate(batches()):
        optimizer.zero_grad()
        raw.loss(batch).backward()
        optimizer.step()
        for mean, p in zip(average.parameters(), raw.parameters(), strict=True):
            mean.data.copy_(p if step == 0 else mean.lerp(p, 0.5))
    for name, p in module.named_parameters():
        torch.testing.assert_close(p, average.get_parameter(name), rtol=1e-5, atol=1e-6, msg=name)


class CrashAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            raise ConnectionError("the node went away")


@pytest.mark.parametrize("step", range(1, 10))
def test_crash_at_any_step_and_resume_is_bit_equal(tmp_path, step):
    uninterrupted = weights(fit(tmp_path, MSignCallback(period=4)))

    def checkpoint() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    crashing = make_trainer(tmp_path, MSignCallback(period=4), checkpoint(), CrashAt(step + 1))
    with pytest.raises(ConnectionError):
        crashing.fit(LanguageModule(), batches())
    resumed = LanguageModule()
    trainer = make_trainer(tmp_path, MSignCallback(period=4), checkpoint())
    trainer.fit(resumed, batches(), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert_same(weights(resumed), uninterrupted)


def test_rescue_of_a_checkpoint_without_msign_takes_over_the_count(tmp_path):
    make_trainer(tmp_path, max_steps=6).fit(module := LanguageModule(), batches())
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    callback, spy = MSignCallback(period=4), Spy()
    make_trainer(tmp_path, callback, spy).fit(LanguageModule(), batches(), ckpt_path=tmp_path / "last.ckpt")
    assert spy.restored == [8]
    assert callback.state_dict() == {"steps": [10]}


def test_fit_twice_goes_on_and_a_new_trainer_starts_anew(tmp_path):
    callback, spy = MSignCallback(period=4), Spy()
    module = LanguageModule()
    trainer = make_trainer(tmp_path, callback, spy, max_steps=-1, max_epochs=1, limit_train_batches=5)
    trainer.fit(module, batches())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, batches())
    assert spy.restored == [4, 8]
    assert callback.state_dict() == {"steps": [10]}
    make_trainer(tmp_path, callback, max_steps=3).fit(LanguageModule(), batches())
    assert callback.state_dict() == {"steps": [3]}


def test_two_callbacks_keep_their_counts_apart(tmp_path):
    attention, mlp = MSignCallback(2, "attention", stop=4), MSignCallback(3, "attention", start=5)
    checkpoint = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=5)
    make_trainer(tmp_path, attention, mlp, checkpoint, max_steps=5).fit(LanguageModule(), batches())
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert states[attention.state_key] == states[mlp.state_key] == {"steps": [5]}
    assert attention.state_key != mlp.state_key


def test_every_logger_gets_every_application(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, "tb"), CSVLogger(tmp_path, "csv")]
    fit(tmp_path, MSignCallback(period=3), logger=loggers)
    events = EventAccumulator(loggers[0].log_dir)
    events.Reload()
    assert [e.step for e in events.Scalars("msign/stable_rank_before/min")] == [3, 6, 9]
    assert all(e.value == 14 for e in events.Scalars("msign/changed"))
    rows = read_metrics(loggers[1])
    assert [int(row["step"]) for row in rows if row["msign/changed"]] == [3, 6, 9]


def test_one_line_at_the_start_says_what_will_happen(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fit(tmp_path, MSignCallback(period=7))
    lines = [record.message for record in caplog.records if "msign" in record.message]
    assert len(lines) == 1
    assert "14 matrices (8 attention, 6 mlp)" in lines[0]
    assert "every 7 optimizer steps" in lines[0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_handles_are_removed_after_an_exception(tmp_path, error):
    class Fail(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            self.hooks_before = len(trainer.optimizers[0]._optimizer_step_post_hooks)
            raise error

    fail = Fail()
    trainer = make_trainer(tmp_path, MSignCallback(), fail)
    with pytest.raises((error, SystemExit)):
        trainer.fit(LanguageModule(), batches())
    assert fail.hooks_before == 1
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_validation_and_fast_dev_run(tmp_path):
    module, callback = ValidatedModule(), MSignCallback(period=1)
    trainer = make_trainer(tmp_path, callback, fast_dev_run=2)
    trainer.fit(module, batches(), batches())
    assert callback.state_dict() == {"steps": [2]}
    before = weights(module)
    trainer.validate(module, batches(), verbose=False)
    assert_same(weights(module), before)


def test_nan_weights_do_not_stop_the_run(tmp_path):
    module = LanguageModule()
    torch.nn.init.constant_(module.model.model.embed_tokens.weight, float("nan"))
    trainer = make_trainer(tmp_path, MSignCallback(period=2), logger=CSVLogger(tmp_path), max_steps=4)
    trainer.fit(module, batches())
    rows = read_metrics(trainer.logger)
    assert [float(row["msign/skipped"]) for row in rows] == [14, 14]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"period": 0}, "period must be a positive integer, got 0"),
        ({"period": 2.5}, "period must be a positive integer, got 2.5"),
        ({"start": 10, "stop": 5}, "start must be at most stop, got start=10, stop=5"),
        ({"rule": "spectral"}, "rule must be .*got 'spectral'"),
        ({"method": "newton"}, "method must be .*got 'newton'"),
        ({"rtol": -1.0}, "rtol must .*got -1.0"),
    ],
)
def test_bad_values_are_refused_by_the_constructor(arguments, message):
    with pytest.raises(ValueError, match=message):
        MSignCallback(**arguments)


def test_empty_selection_is_refused_when_fitting_starts(tmp_path):
    with pytest.raises(ValueError, match=r"self_atn.*self_attn"):
        fit(tmp_path, MSignCallback(targets="*self_atn*"))


def test_a_strategy_that_flattens_the_weights_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.strategy.__class__ = type("OnCPU", (DeepSpeedStrategy,), {})  # its constructor wants a GPU
    with pytest.raises(RuntimeError, match="does not support OnCPU, which flattens the weights"):
        MSignCallback().on_fit_start(trainer, LanguageModule())


class SaveRank(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer, pl_module) -> None:
        torch.save(weights(pl_module), self.folder / f"{trainer.global_rank}.pt")


def test_ddp_ranks_stay_equal_and_match_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    windows = torch.stack([batches().batch(i)[0] for i in range(20)])
    callbacks = MSignCallback(period=2), SaveRank(tmp_path)
    trainer = make_trainer(tmp_path, *callbacks, strategy="ddp_spawn", devices=2, max_steps=5)
    trainer.fit(LanguageModule("sgd"), DataLoader(windows, batch_size=2))
    rank_0, rank_1 = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(rank_0, rank_1)

    # Lightning shuffles, with the trainer's seed, and rank r takes every other window: both ranks four in a row.
    shuffled = windows[list(DistributedSampler(windows, num_replicas=1, rank=0, seed=0))]
    module = LanguageModule("sgd")
    make_trainer(tmp_path, MSignCallback(period=2), max_steps=5).fit(module, DataLoader(shuffled, batch_size=4))
    for name, p in module.named_parameters():
        torch.testing.assert_close(rank_0[name], p.detach(), rtol=1e-4, atol=1e-5)


def test_importing_the_package_does_not_import_lightning():
    program = (
        "import sys, msign_lightning; "
        "assert not {'lightning', 'composer', 'optuna'} & set(sys.modules); "
        "from msign_lightning import MSignCallback; assert 'lightning' in sys.modules; print('ok')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert result.stdout.strip() == "ok", result.stderr
