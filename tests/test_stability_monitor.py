"""StabilityMonitor under real Lightning trainers."""

import copy
import logging
import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from stability import (
    ONE_MATRIX,
    UP,
    assert_ranks_agree,
    assert_same,
    collapse_,
    gpt2,
    llama,
    loss_of,
    recipe,
    stable_ranks,
    total_norm,
    weights,
    windows,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.utils.tensorboard import SummaryWriter

from msign_lightning import MSignCallback, StabilityMonitor
from msign_lightning.alignment import Alignment
from msign_lightning.collapse import Alarm, CollapseDetector
from msign_lightning.jacobian import BlockJacobians
from msign_lightning.monitor import Reading
from msign_lightning.tensorboard import add_reading

pytestmark = [
    # Lightning advises more workers and shorter logging intervals; neither makes sense for a dozen tiny batches.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

ALL = {"stable_rank": 2, "spectral_alignment": 2, "jacobian_alignment": 2}
COLLAPSING = f"model.{UP}"


class Module(pl.LightningModule):
    """Any model, which notes its losses, the norms of its gradients and (by batch index) makes losses infinite."""

    def __init__(
        self, model: nn.Module | None = None, optimizer: str = "adamw", infinite: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.model = recipe() if model is None else model
        self.optimizer, self.infinite = optimizer, infinite
        self.losses: list[float] = []
        self.norms: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = loss_of(self.model, batch)
        self.losses.append(loss.item())
        return loss * math.inf if batch_idx in self.infinite else loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss_of(self.model, batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.norms.append(total_norm(self.model))

    def configure_optimizers(self) -> Any:
        if self.optimizer == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=self.optimizer == "fused")


class Memory(Logger):
    """Keeps what is logged, on every rank."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        kept = {name: value for name, value in metrics.items() if name != "msign/seconds"}
        self.rows.setdefault(step, {}).update(kept)

    def log_hyperparams(self, *_) -> None: ...

    def of(self, metric: str) -> dict[int, float]:
        """Its values by step."""
        return {step: row[metric] for step, row in self.rows.items() if metric in row}


class Edit(Callback):
    """Collapses a matrix right before some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, *_) -> None:
        if trainer.global_step + 1 in self.steps:
            collapse_(pl_module, COLLAPSING)


def make_trainer(tmp_path: Path, *callbacks: Callback, **arguments) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 10,
        "logger": Memory(),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | arguments))


def fit(tmp_path: Path, *callbacks: Callback, module: Module | None = None, batches: int = 10, **arguments) -> Module:
    """Trained; its trainer is `module.trainer`."""
    module = Module() if module is None else module
    trainer = make_trainer(tmp_path, *callbacks, **arguments)
    trainer.fit(module, windows(batches), windows(2))
    return module


def warned(caplog) -> list[str]:
    return [r.message for r in caplog.records if (r.name, r.levelname) == ("msign_lightning.shells", "WARNING")]


# --- readings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "monitor_first"), [(llama, True), (recipe, False)], ids=["llama", "recipe"])
def test_readings_are_those_before_the_step_and_before_an_application_in_it(tmp_path, make, monitor_first):
    class Before(Callback):
        models: dict[int, nn.Module] = {}  # noqa: RUF012
        batches: dict[int, Tensor] = {}  # noqa: RUF012

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            self.models[batch_idx + 1] = copy.deepcopy(pl_module.model)
            self.batches[batch_idx + 1] = batch

    both = [StabilityMonitor(ALL | {"jacobian_alignment": 8}, per_matrix=True), MSignCallback(period=8)]
    module = fit(tmp_path, Before(), *both[:: 1 if monitor_first else -1], module=Module(make()))
    rows, before = module.trainer.logger.rows, Before.models
    assert list(rows) == [2, 4, 6, 8, 10]
    for step in (2, 4, 6, 8):
        expected = stable_ranks(before[step])
        assert {n: rows[step][f"stable_rank/model.{n}"] for n in expected} == pytest.approx(expected, rel=0.03)
        assert rows[step]["stable_rank/min"] == pytest.approx(min(expected.values()), rel=0.02)
        assert 0 <= rows[step]["sign_diversity/min"] <= rows[step]["sign_diversity/mean"] <= 1
    assert min(stable_ranks(before[9]).values()) > 2 * rows[8]["stable_rank/min"]  # an application there was
    by_hand = BlockJacobians(before[8], iterations=8).measure(Before.batches[8][:2]).metrics()
    assert by_hand == pytest.approx({name: rows[8][name] for name in by_hand}, rel=1e-5)


def test_loss_is_the_mean_over_accumulated_batches_and_the_norm_is_not_clipped(tmp_path):
    monitor = StabilityMonitor({"stable_rank": 2})
    clipped = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.01, "max_steps": -1, "max_epochs": 1}
    module = fit(tmp_path, monitor, **clipped)  # 10 batches: windows of 3, 3, 3 and a short one
    rows, losses, norms = module.trainer.logger.rows, module.losses, module.norms
    assert list(rows) == [2, 4]
    assert len(norms) == 4
    assert min(norms) > 0.1
    assert rows[2]["stability/loss"] == pytest.approx(sum(losses[:6]) / 6, rel=1e-6)
    assert rows[4]["stability/loss"] == pytest.approx((sum(losses[6:9]) / 3 + losses[9]) / 2, rel=1e-6)
    assert [rows[step]["stability/grad_norm"] for step in (2, 4)] == pytest.approx(norms[1::2], rel=1e-5)


def compiled() -> nn.Module:
    torch._dynamo.reset()
    model = recipe()
    model.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: gpt2(dropout=0.2), {}),
        (recipe, {"accumulate_grad_batches": 2, "val_check_interval": 1, "max_steps": 5}),
        (compiled, {}),
        (llama, {"precision": "bf16-true"}),
        (llama, {"precision": "bf16-mixed"}),
    ],
    ids=["fused and dropout", "accumulation and validation", "compiled", "bf16", "autocast"],
)
def test_training_is_the_same_to_the_last_bit(tmp_path, make, arguments):
    monitored, plain = (Module(make()) for _ in range(2))
    for module, callbacks in ((monitored, [StabilityMonitor(ALL)]), (plain, [])):
        torch.manual_seed(1)
        fit(tmp_path, *callbacks, module=module, **arguments)
    assert_same(weights(monitored), weights(plain))
    measured = {"stable_rank/min", "sign_diversity/min", "jacobian_total"}
    assert all(measured < row.keys() for step, row in monitored.trainer.logger.rows.items() if step % 2 == 0)
    assert not any(module._forward_pre_hooks for module in monitored.modules())
    assert eval_frame._stance.stance == "default"


# --- alarms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_alarm", "last_step"), [("log", 10), ("stop", 6), ("restore", 10)])
def test_what_a_collapse_does(tmp_path, caplog, on_alarm, last_step):
    monitor = StabilityMonitor({"stable_rank": 2}, on_alarm, thresholds=ONE_MATRIX, cooldown=4)
    with caplog.at_level(logging.WARNING):
        module = fit(tmp_path, Edit(5, 7), monitor)
    logger = module.trainer.logger
    assert module.trainer.global_step == last_step
    messages = [re.sub(r"\(1\.0\d,", "(1,", message) for message in warned(caplog)]
    alarm = f"step 6: stable_rank of {COLLAPSING} (1, threshold 2.04)"
    if on_alarm == "restore":
        again = alarm.replace("step 6", "step 8")
        assert messages == [f"{alarm}; step 6: 1 matrices restored", again, "step 10: 1 matrices restored"]
        assert logger.of("msign/changed") == {6: 1, 10: 1}
        assert stable_ranks(module)[COLLAPSING] > 15
    else:
        assert messages == [alarm]
        assert not logger.of("msign/changed")
    assert logger.of("stability/alarms")[6] == 1


# --- resume ------------------------------------------------------------------------------------------------------


class CrashAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            raise ConnectionError("the node went away")


class Spiky(Module):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + float(batch_idx == 21)


def test_crash_and_resume_is_bit_equal(tmp_path, caplog):
    def run(*more: Callback, **arguments) -> tuple[Module, pl.Trainer]:
        restoring = StabilityMonitor({"stable_rank": 3}, "restore", thresholds=ONE_MATRIX, cooldown=6)
        logging_only = StabilityMonitor({"spectral_alignment": 4}, thresholds={"spike": 0.5})
        checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module = Spiky()
        trainer = make_trainer(tmp_path, Edit(4, 8), restoring, logging_only, checkpoint, *more, max_steps=23)
        caplog.clear()
        try:
            trainer.fit(module, windows(30), windows(2), **arguments)
        except ConnectionError:
            return run(ckpt_path=tmp_path / f"step={more[0].step - 1}.ckpt")
        return module, trainer

    expected, trainer = run()
    logger, messages = trainer.logger, warned(caplog)
    assert logger.of("msign/changed") == {6: 1, 12: 1}
    assert [message[:20] for message in messages[-2:]] == ["step 22: loss_spike "] * 2
    for step in (5, 7, 13):  # before an alarm is seen, while it cools down, between two readings of the loss
        found, trainer = run(CrashAt(step + 1))
        assert_same(weights(found), weights(expected))
        assert repr(trainer.logger.rows) == repr({s: row for s, row in logger.rows.items() if s > step})
        late = [m for m in messages if int(re.findall(r"step (\d+)", m)[-1]) > step]
        assert warned(caplog) == late
        states = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["callbacks"]
        assert sum("StabilityMonitor" in key for key in states) == 2


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("saved_with", [None, {"stable_rank": 3}], ids=["no monitor", "another monitor"])
def test_a_checkpoint_without_its_state_goes_on_at_the_trainers_count(tmp_path, saved_with):
    callbacks = [] if saved_with is None else [StabilityMonitor(saved_with)]
    fit(tmp_path, *callbacks, max_steps=6).trainer.save_checkpoint(tmp_path / "last.ckpt")
    monitor = StabilityMonitor({"stable_rank": 4})
    fit(tmp_path, monitor, max_steps=3)  # another run, of which nothing is to be taken along
    trainer = make_trainer(tmp_path, monitor)
    trainer.fit(Module(), windows(10), windows(2), ckpt_path=tmp_path / "last.ckpt")
    assert list(trainer.logger.rows) == [8, 10]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_what_is_logged_and_done_may_change_before_a_resume_and_the_history_stays(tmp_path, caplog):
    fit(tmp_path, StabilityMonitor({"stable_rank": 2}), max_steps=6).trainer.save_checkpoint(tmp_path / "last.ckpt")
    for measure, kept in (({"stable_rank": 3}, True), ({"spectral_alignment": 3}, False)):
        monitor = StabilityMonitor(measure, "stop", per_matrix=True, stop=50, cooldown=9, thresholds={"spike": None})
        caplog.clear()
        with caplog.at_level(logging.INFO):
            make_trainer(tmp_path, monitor, max_steps=9).fit(
                Module(), windows(10), windows(2), ckpt_path=tmp_path / "last.ckpt"
            )
        assert monitor.state_dict()["spectra"]["measurements"] == (4 if kept else 1)
        assert len(monitor.state_dict()["detector"]["losses"]) == (9 if kept else 3)
        assert ("holds no state of this monitor: its history starts anew" in caplog.text) != kept


def test_an_alarm_that_was_turned_off_before_a_resume_is_no_longer_on():
    detector = CollapseDetector(stable_rank=2.0)
    assert len(detector.update(1, loss=math.nan, stable_ranks={"w": 1.0})) == 2
    resumed = CollapseDetector(stable_rank=None)
    resumed.load_state_dict(detector.state_dict())
    assert resumed.active == (("non_finite", "loss"),)


def test_fit_twice_goes_on_and_a_new_trainer_starts_anew(tmp_path):
    monitor, module = StabilityMonitor({"stable_rank": 4}), Module()
    trainer = make_trainer(tmp_path, monitor, max_steps=-1, max_epochs=1, limit_train_batches=5)
    trainer.fit(module, windows(10), windows(2))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, windows(10), windows(2))
    assert list(trainer.logger.of("stable_rank/min")) == [4, 8]
    assert list(trainer.logger.rows) == [4, 5, 8, 10]
    assert list(fit(tmp_path, monitor, max_steps=5).trainer.logger.rows) == [4, 5]


def test_after_an_exception_nothing_is_left_behind_and_fitting_goes_on(tmp_path):
    class Fails(Module):
        failed = False

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 3 and not self.failed:
                self.failed = True
                raise ConnectionError
            return super().training_step(batch, batch_idx)

    module, monitor = Fails(), StabilityMonitor(dict.fromkeys(ALL, 4))
    trainer = make_trainer(tmp_path, monitor)
    with pytest.raises(ConnectionError):
        trainer.fit(module, windows(10), windows(2))
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert not any(m._forward_pre_hooks for m in module.modules())
    assert eval_frame._stance.stance == "default"
    trainer.fit(module, windows(10), windows(2))
    assert list(trainer.logger.of("jacobian_total")) == [4, 8]
    assert list(trainer.logger.of("sign_diversity/min")) == [4, 8]


# --- optimizers --------------------------------------------------------------------------------------------------


class Manual(Module):
    """Two optimizers, of which the first steps twice a batch."""

    def __init__(self, raw: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.raw = False, raw

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        first, second = self.optimizers(use_pl_optimizer=not self.raw)
        for _ in range(2):
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            first.step()
        second.step()
        first.zero_grad()
        second.zero_grad()
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.norms.append(total_norm(self.model.blocks[0]))

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(block.parameters(), lr=1e-3) for block in self.model.blocks]


@pytest.mark.parametrize("raw", [False, True])  # optimizers whose steps Lightning doesn't see
def test_of_several_optimizers_the_steps_of_the_first_count(tmp_path, raw):
    monitor = StabilityMonitor({"stable_rank": 3})
    module = fit(tmp_path, monitor, module=Manual(raw), max_steps=-1, max_epochs=1, batches=5)
    logger = module.trainer.logger
    assert module.trainer.global_step == (0 if raw else 15)
    assert list(logger.of("stable_rank/min")) == [3, 7, 9]  # those of a batch are seen at its end
    assert list(logger.rows) == [3, 7, 9, 10]
    of_second = module.losses[1::2]  # of each batch, what `training_step` returned
    assert logger.rows[3]["stability/loss"] == pytest.approx((2 * of_second[0] + of_second[1]) / 3)
    assert logger.rows[10]["stability/loss"] == pytest.approx(of_second[4])
    assert logger.rows[10].get("stability/grad_norm") == (None if raw else pytest.approx(module.norms[-2], rel=1e-5))


def test_lbfgs_counts_once_per_step(tmp_path):
    module = fit(tmp_path, StabilityMonitor(ALL), module=Module(optimizer="lbfgs"), max_steps=5)
    assert list(module.trainer.logger.rows) == [2, 4, 5]


@pytest.mark.parametrize("optimizer", ["adamw", "fused"])
def test_steps_skipped_by_the_gradient_scaler_do_not_count(tmp_path, optimizer):
    module = Module(optimizer=optimizer, infinite=(1, 4))
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    monitor = StabilityMonitor({"stable_rank": 4})
    fit(tmp_path, monitor, module=module, max_steps=-1, max_epochs=1, plugins=[precision])
    logger = module.trainer.logger
    assert list(logger.rows) == [4, 8]
    assert logger.of("stability/alarms") == {4: 0, 8: 0}
    losses = [loss for i, loss in enumerate(module.losses) if i not in module.infinite]
    assert logger.of("stability/loss") == pytest.approx({4: sum(losses[:4]) / 4, 8: sum(losses[4:]) / 4}, rel=1e-6)
    scales = [8, 0, 4, 4, 0, 2, 2, 2, 2, 2] if optimizer == "fused" else [1, 0] + [1, 1, 0] + [1] * 5
    norms = [norm / scale for norm, scale in zip(module.norms, scales, strict=True) if scale]
    assert logger.of("stability/grad_norm") == pytest.approx({4: norms[3], 8: norms[7]}, rel=1e-4)


# --- several processes -------------------------------------------------------------------------------------------


class OfRank(Module):
    """Each rank takes half of a batch; the loss of the last rank is NaN at step 8, its gradients are not."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        rank = self.trainer.global_rank
        loss = super().training_step(batch[2 * rank : 2 * rank + 2], batch_idx)
        return loss + math.nan if rank and batch_idx == 7 else loss


class SaveRank(Callback):
    def __init__(self, folder: Path, monitor: StabilityMonitor) -> None:
        self.folder, self.monitor = folder, monitor

    def on_train_end(self, trainer, pl_module) -> None:
        found = weights(pl_module), repr(self.monitor.state_dict()), trainer.logger.rows, pl_module.losses
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def test_ddp_ranks_raise_the_same_alarms_and_restore_the_same(tmp_path):
    settings = {"thresholds": ONE_MATRIX, "cooldown": 4}
    monitor = StabilityMonitor({"stable_rank": 2, "spectral_alignment": 4}, "restore", **settings)
    callbacks = Edit(3, 5), monitor, SaveRank(tmp_path, monitor)
    trainer = make_trainer(tmp_path, *callbacks, strategy="ddp_spawn", devices=2, use_distributed_sampler=False)
    trainer.fit(OfRank(), windows(10), windows(2))
    assert_ranks_agree([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)])


# --- loggers -----------------------------------------------------------------------------------------------------


def test_tensorboard_shows_everything_on_one_page(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, "tb"), CSVLogger(tmp_path, "csv")]
    monitor = StabilityMonitor(dict.fromkeys(ALL, 1), thresholds=ONE_MATRIX)
    fit(tmp_path, Edit(7), MSignCallback(period=5), monitor, batches=12, max_steps=12, logger=loggers)
    assert len(list(Path(loggers[0].log_dir).glob("events*"))) == 1
    events = EventAccumulator(loggers[0].log_dir, {"tensors": 0, "scalars": 0, "histograms": 0}).Reload()
    scalars = events.Tags()["scalars"]

    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title[:1] for category in layout.category] == ["1", "2", "3", "4"]
    for tag in (tag for c in layout.category for chart in c.chart for tag in chart.multiline.tag):
        assert any(re.match(tag, scalar) for scalar in scalars), f"{tag} shows nothing"

    def marks(tag: str) -> list[tuple[int, float]]:
        return [(e.step, e.value) for e in events.Scalars(tag)]

    assert marks("marks/applications") == [(4, 0), (5, 1), (6, 0), (9, 0), (10, 1), (11, 0)]
    assert marks("marks/alarms") == [(6, 0), (7, 1), (8, 0)]
    (text,) = events.Tensors("alarms/text_summary")
    assert text.step == 7
    assert text.tensor_proto.string_val[0].startswith(f"step 7: stable_rank of {COLLAPSING}".encode())
    histograms = {tag: [e.step for e in events.Histograms(tag)] for tag in events.Tags()["histograms"]}
    assert histograms.keys() == {"stable_rank", "spectral_alignment/attention", "spectral_alignment/mlp"}
    assert histograms["stable_rank"] == [1, 11]
    of_matrices = events.Histograms("stable_rank")[0].histogram_value
    assert of_matrices.num == 12
    of_tokens = events.Histograms("spectral_alignment/mlp")[0].histogram_value
    assert sum(of_tokens.bucket) == of_tokens.num
    assert of_tokens.num % (4 * 12) == 0

    lines = (Path(loggers[1].log_dir) / "metrics.csv").read_text().splitlines()
    assert {int(line.split(",")[lines[0].split(",").index("step")]) for line in lines[1:]} == set(range(1, 13))


def test_tokens_on_the_far_side_of_the_singular_vector_are_in_the_histogram(tmp_path):
    cumulative = torch.full((1, 129), 7)  # all seven at -1
    alignment = Alignment(("w",), ("mlp",), cumulative, torch.tensor([-7.0]), torch.tensor([True]))
    with SummaryWriter(tmp_path) as writer:
        add_reading(writer, Reading(1, alignment=alignment, with_histograms=True))
    (histogram,) = EventAccumulator(str(tmp_path)).Reload().Histograms("spectral_alignment/mlp")
    value = histogram.histogram_value
    assert (value.num, value.sum, value.sum_squares, sum(value.bucket)) == (7, -7, 7, 7)


def test_alarms_of_steps_in_a_row_all_stay_marked(tmp_path):
    raised = tuple(Alarm("loss_spike", step, "loss", 5.0, 3.0) for step in (4, 5, 7))
    with SummaryWriter(tmp_path) as writer:
        add_reading(writer, Reading(10, alarms=raised))
    marks = EventAccumulator(str(tmp_path)).Reload().Scalars("marks/alarms")
    assert [(e.step, e.value) for e in marks] == [(3, 0), (4, 1), (5, 1), (6, 0), (7, 1), (8, 0)]


def test_applications_of_every_step_all_stay_marked(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, MSignCallback(period=1, start=3, stop=5), logger=logger)
    seen = EventAccumulator(logger.log_dir).Reload().Scalars("marks/applications")
    shown = {event.step: event.value for event in seen}  # the last value of a step is what TensorBoard shows
    assert shown == {2: 0, 3: 1, 4: 1, 5: 1, 6: 0}


def test_defaults_are_quiet(tmp_path):
    monitor = StabilityMonitor({"stable_rank": 5, "spectral_alignment": 5})
    logger = fit(tmp_path, monitor, logger=TensorBoardLogger(tmp_path)).trainer.logger
    events = EventAccumulator(logger.log_dir).Reload()
    summaries = {f"stable_rank/{g}{how}" for g in ("", "attention/", "mlp/") for how in ("min", "geometric_mean")}
    summaries |= {f"sign_diversity/{g}{how}" for g in ("", "attention/", "mlp/") for how in ("min", "mean")}
    summaries |= {"spectral_norm/max", "spectral_alignment/masked"}
    summaries |= {f"stability/{what}" for what in ("loss", "grad_norm", "alarms")}
    assert set(events.Tags()["scalars"]) == summaries
    assert all(len(events.Scalars(tag)) == 2 for tag in summaries)


def test_no_logger_and_nothing_but_nan_are_no_trouble(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        module = fit(tmp_path, StabilityMonitor(dict.fromkeys(ALL, 1)), fast_dev_run=2)
    assert fit(tmp_path, StabilityMonitor(ALL), max_steps=3, logger=False).trainer.loggers == []
    assert len([r for r in caplog.records if r.message.startswith("monitor: stable_rank every 1 steps")]) == 1
    module = Module()
    nn.init.constant_(module.model.embedding.weight, math.nan)
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, StabilityMonitor(dict.fromkeys(ALL, 3), "restore"), module=module, logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    assert not events.Tags()["histograms"]
    assert [e.step for e in events.Scalars("marks/alarms") if e.value] == [1, 3]


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measure": {"stable_rank": 0}}, "the cadence of stable_rank in measure must be a positive integer .* got 0"),
        ({"measure": {"entropy": 5}}, "measure must hold only stable_rank, .*, got 'entropy'"),
        ({"on_alarm": "panic"}, "on_alarm must be one of log, stop, restore, got 'panic'"),
        ({"thresholds": {"spikes": 1.0}}, "thresholds must hold only spike, .*, got 'spikes'"),
        ({"cooldown": 0}, "cooldown must be a positive integer .*got 0"),
    ],
)
def test_bad_values_are_refused_by_the_constructor(arguments, message):
    with pytest.raises(ValueError, match=message):
        StabilityMonitor(**arguments)


def test_layers_and_blocks_that_are_not_there_are_refused_when_training_starts(tmp_path):
    with pytest.raises(ValueError, match=r"targets must .*got '\*up_porj\*'; near names: .*up_proj"):
        fit(tmp_path, StabilityMonitor(targets="*up_porj*"))
    with pytest.raises(ValueError, match=r"blocks must be names or globs of modules, such as .*without a list of them"):
        fit(tmp_path, StabilityMonitor({"jacobian_alignment": 5}), module=Module(recipe(n_layers=1)))


def test_deepspeed_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.strategy.__class__ = type("OnCPU", (DeepSpeedStrategy,), {})  # its constructor wants a GPU
    with pytest.raises(RuntimeError, match="StabilityMonitor does not support OnCPU, which flattens the weights"):
        StabilityMonitor().on_train_start(trainer, Module())
