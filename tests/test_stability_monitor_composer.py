"""StabilityMonitor under real Composer trainers."""

import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from composer import Trainer
from composer.algorithms import SAM, GradientClipping
from composer.core import Algorithm, Callback, Precision
from composer.loggers import LoggerDestination, TensorboardLogger
from composer.trainer._scaler import ClosureGradScaler
from lightning.pytorch.loggers import CSVLogger
from stability import (
    ONE_MATRIX,
    UP,
    assert_ranks_agree,
    assert_same,
    collapse_,
    recipe,
    stable_ranks,
    total_norm,
    weights,
    windows,
)
from support import composer_trainer, on_two_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.utils.data import DataLoader

import msign_lightning
from msign_lightning import Cut, algorithms
from msign_lightning.algorithms import MSign, StabilityMonitor
from msign_lightning.recipes.composer_train import ComposerLanguageModel

pytestmark = [
    pytest.mark.composer,
    # Composer's own, about itself.
    pytest.mark.filterwarnings("ignore:SAM has known issues of weight mismatch when loading"),
    pytest.mark.filterwarnings("ignore:.* is not in the state_dict. Its state will not be restored"),
    # Lightning's, about what makes no sense for a dozen tiny batches.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

ALL = {"stable_rank": 2, "spectral_alignment": 2, "jacobian_alignment": 2}
COLLAPSING = f"transformer.{UP}"


class Model(ComposerLanguageModel):
    """It notes its losses and makes those of some batches infinite."""

    def __init__(self, infinite: tuple[int, ...] = ()) -> None:
        super().__init__(recipe())
        self.infinite = infinite
        self.losses: list[float] = []

    def loss(self, outputs: Tensor, batch: Tensor, *args, **kwargs) -> Tensor:
        loss = super().loss(outputs, batch)
        self.losses.append(loss.item())
        return loss * math.inf if len(self.losses) - 1 in self.infinite else loss


class Memory(LoggerDestination):
    """Keeps what the monitors log."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        kept = {k: v for k, v in metrics.items() if not k.startswith(("time/", "trainer/", "loss/", "msign/seconds"))}
        if kept:
            self.rows.setdefault(step, {}).update(kept)

    def of(self, metric: str) -> dict[int, float]:
        """Its values by step."""
        return {step: row[metric] for step, row in self.rows.items() if metric in row}


class Norms(Callback):
    """The norms of all gradients, before anything clips them, but without the factor of a gradient scaler."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def after_backward(self, state, logger) -> None:
        self.values.append(total_norm(state.model) / state.scaler.get_scale())


class Edit(Callback):
    """Collapses a matrix right before some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def batch_start(self, state, logger) -> None:
        if int(state.timestamp.batch) + 1 in self.steps:
            collapse_(state.model, COLLAPSING)


def batches(count: int = 10) -> DataLoader:
    loader = windows(count)
    return DataLoader(torch.cat([loader.batch(i) for i in range(count)]), batch_size=4)


def make_trainer(*callbacks: Callback, model: nn.Module | None = None, steps: int = 10, **arguments) -> Trainer:
    model = Model() if model is None else model
    defaults = {
        "train_dataloader": batches(),
        "max_duration": f"{steps}ba",
        "optimizers": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "loggers": [Memory()],
        "callbacks": list(callbacks),
    }
    return composer_trainer(model, **(defaults | arguments))


def fit(*callbacks: Callback, **arguments) -> tuple[nn.Module, Memory]:
    trainer = make_trainer(*callbacks, **arguments)
    trainer.fit()
    trainer.close()
    return trainer.state.model, trainer.logger.destinations[0]


# --- readings ----------------------------------------------------------------------------------------------------


class Twin(pl.LightningModule):
    """The same model, loss and optimizer for Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = recipe()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return ComposerLanguageModel.loss(self, self.transformer(batch[:, :-1]), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_same_readings_as_in_lightning(tmp_path):
    arguments = {"measure": ALL | {"spectral_alignment": 3}, "thresholds": ONE_MATRIX, "per_matrix": True}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}

    class EditTwin(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 6:
                collapse_(pl_module, COLLAPSING)

    logger = CSVLogger(tmp_path)
    written: dict[int, dict[str, float]] = {}
    logger.log_metrics = lambda metrics, step: written.setdefault(step, {}).update(metrics)
    callbacks = [EditTwin(), msign_lightning.StabilityMonitor(on_alarm="restore", **arguments)]
    twin = Twin()
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=9, logger=logger, callbacks=callbacks, **quiet)
    trainer.fit(twin, windows(10))

    model, found = fit(Edit(7), StabilityMonitor(on_alarm="restore", **arguments), steps=9)
    assert list(found.rows) == [2, 3, 4, 6, 8, 9]
    for row in written.values():
        row.pop("msign/seconds", None)
    assert repr(found.rows) == repr(written)
    assert found.of("msign/changed") == {8: 1}
    assert_same(weights(model), weights(twin))


def test_a_measurement_never_sees_an_application_of_its_step():
    class Before(Callback):
        ranks: dict[int, dict[str, float]] = {}  # noqa: RUF012

        def batch_start(self, state, logger) -> None:
            self.ranks[int(state.timestamp.batch) + 1] = stable_ranks(state.model)

    monitor = StabilityMonitor({"stable_rank": 4}, per_matrix=True)
    _, logger = fit(Before(), monitor, algorithms=[MSign(period=8)])
    for step in (4, 8):
        found = {name: logger.of(f"stable_rank/{name}")[step] for name in Before.ranks[step]}
        assert found == pytest.approx(Before.ranks[step], rel=0.03)
    assert min(Before.ranks[9].values()) > 2 * min(Before.ranks[8].values())


def test_loss_and_norm_are_those_of_all_microbatches_and_not_clipped():
    norms, model = Norms(), Model()
    clipping = [GradientClipping("norm", 0.01)]
    _, logger = fit(
        norms, StabilityMonitor({"stable_rank": 4}), model=model, algorithms=clipping, device_train_microbatch_size=2
    )
    assert list(logger.rows) == [4, 8, 10]
    assert logger.of("stability/loss") == pytest.approx(
        {4: sum(model.losses[:8]) / 8, 8: sum(model.losses[8:16]) / 8, 10: sum(model.losses[16:]) / 4}, rel=1e-5
    )
    expected = {step: norms.values[2 * step - 1] for step in (4, 8, 10)}
    assert logger.of("stability/grad_norm") == pytest.approx(expected, rel=1e-5)
    assert min(expected.values()) > 0.1


def test_training_is_the_same_to_the_last_bit():
    microbatches = {"device_train_microbatch_size": 2}
    model, logger = fit(StabilityMonitor(ALL), **microbatches)
    assert_same(weights(model), weights(fit(**microbatches)[0]))
    assert list(logger.of("jacobian_total")) == [2, 4, 6, 8, 10]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert eval_frame._stance.stance == "default"


# --- alarms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_alarm", "last_step"), [("log", 10), ("stop", 6), ("restore", 10)])
def test_what_a_collapse_does(caplog, on_alarm, last_step):
    monitor = StabilityMonitor({"stable_rank": 2}, on_alarm, thresholds=ONE_MATRIX, cooldown=4)
    with caplog.at_level(logging.WARNING):
        model, logger = fit(Edit(5, 7), monitor)
    messages = [re.sub(r"\(1\.0\d,", "(1,", r.message) for r in caplog.records if r.name == "msign_lightning.shells"]
    alarm = f"step 6: stable_rank of {COLLAPSING} (1, threshold 2.04)"
    assert max(logger.rows) == last_step
    if on_alarm == "restore":
        again = alarm.replace("step 6", "step 8")
        assert messages == [f"{alarm}; step 6: 1 matrices restored", again, "step 10: 1 matrices restored"]
        assert logger.of("msign/changed") == {6: 1, 10: 1}
        assert stable_ranks(model)[COLLAPSING] > 15
    else:
        assert messages == [alarm]


# --- resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["load_path", "autoresume"])
def test_resumed_at_any_step_is_bit_equal(tmp_path, how):
    def run(folder: str, steps: int = 10, **arguments) -> tuple[dict[str, Tensor], dict[int, dict[str, float]]]:
        restoring = StabilityMonitor({"stable_rank": 3}, "restore", thresholds=ONE_MATRIX, cooldown=6)
        logging_only = StabilityMonitor({"spectral_alignment": 4, "stable_rank": 7}, targets="*up_proj*")
        save = {"run_name": "run", "save_folder": str(tmp_path / folder), "save_interval": "1ba"}
        save["save_filename"] = "ba{batch}.pt"
        model, logger = fit(Edit(2, 5), restoring, logging_only, steps=steps, **save, **arguments)
        return weights(model), logger.rows

    expected, rows = run("whole")
    assert {step for step, row in rows.items() if "msign/changed" in row} == {3, 9}
    for step in (4, 7):  # a cool-down, and losses that have not been read
        if how == "load_path":
            found, late = run(f"resumed {step}", load_path=str(tmp_path / "whole" / f"ba{step}.pt"))
        else:
            run(f"to {step}", step, autoresume=True)
            found, late = run(f"to {step}", autoresume=True)
        assert_same(found, expected)
        assert repr(late) == repr({s: row for s, row in rows.items() if s > step})


@pytest.mark.parametrize("saved_with", [None, {"stable_rank": 3}], ids=["no monitor", "another monitor"])
def test_a_checkpoint_without_its_state_goes_on_at_the_trainers_count(tmp_path, saved_with):
    callbacks = [] if saved_with is None else [StabilityMonitor(saved_with)]
    fit(*callbacks, steps=6, save_folder=str(tmp_path), save_filename="last.pt")
    monitor = StabilityMonitor({"stable_rank": 4})
    fit(monitor, steps=3)  # another run, of which nothing is to be taken along
    _, logger = fit(monitor, load_path=str(tmp_path / "last.pt"))
    assert list(logger.rows) == [8, 10]


def test_fit_twice_goes_on_and_reset_time_and_a_new_trainer_start_anew():
    monitor = StabilityMonitor({"stable_rank": 4})
    trainer = make_trainer(monitor, steps=5)
    logger = trainer.logger.destinations[0]
    trainer.fit()
    trainer.fit(duration="5ba")
    assert list(logger.of("stable_rank/min")) == [4, 8]
    assert list(logger.rows) == [4, 5, 8, 10]
    logger.rows.clear()
    trainer.fit(reset_time=True, duration="5ba")
    trainer.close()
    assert list(logger.rows) == [4, 5]
    assert list(fit(monitor, steps=5)[1].rows) == [4, 5]


def test_after_an_exception_nothing_is_left_behind_once_the_trainer_closes():
    class Fail(Callback):
        def after_forward(self, state, logger) -> None:
            if int(state.timestamp.batch) == 3:
                raise ConnectionError("the node went away")

    trainer = make_trainer(StabilityMonitor(dict.fromkeys(ALL, 4)), Fail())
    with pytest.raises(ConnectionError):
        trainer.fit()
    trainer.close()
    assert not trainer.state.optimizers[0]._optimizer_step_post_hooks
    assert not any(module._forward_pre_hooks for module in trainer.state.model.modules())
    assert eval_frame._stance.stance == "default"


# --- optimizers --------------------------------------------------------------------------------------------------


def test_sam_counts_once_per_batch():
    _, logger = fit(StabilityMonitor({"stable_rank": 4}), algorithms=[SAM()])
    assert list(logger.rows) == [4, 8, 10]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("others", [[], [SAM]], ids=["alone", "SAM"])
def test_steps_skipped_by_the_gradient_scaler_do_not_count(others, fused):
    model = Model(infinite=(1, 4) if not others else (2, 7))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    algorithms: list[Algorithm] = [other() for other in others]
    norms, monitor = Norms(), StabilityMonitor({"stable_rank": 4})
    trainer = make_trainer(norms, monitor, model=model, optimizers=optimizer, algorithms=algorithms)
    # Composer asks for a GPU to train in fp16, but scales gradients wherever it is told to.
    trainer.state.precision = Precision.AMP_FP16
    trainer.state.scaler = (ClosureGradScaler if others else torch.amp.GradScaler)("cpu", init_scale=8.0)
    trainer.fit()
    trainer.close()
    logger = trainer.logger.destinations[0]
    assert list(logger.rows) == [4, 8]
    assert logger.of("stability/alarms") == {4: 0, 8: 0}
    if not others:
        losses = [loss for i, loss in enumerate(model.losses) if i not in model.infinite]
        assert logger.of("stability/loss") == pytest.approx({4: sum(losses[:4]) / 4, 8: sum(losses[4:]) / 4}, rel=1e-5)
        expected = [norm for norm in norms.values if math.isfinite(norm)]
        assert logger.of("stability/grad_norm") == pytest.approx({4: expected[3], 8: expected[7]}, rel=1e-4)


# --- several processes -------------------------------------------------------------------------------------------


class OfRank(Model):
    """Half of a batch is a rank's; the loss of the last rank is NaN at step 8, its gradients are not."""

    def forward(self, batch: Tensor) -> Tensor:
        return super().forward(self.half(batch))

    def loss(self, outputs: Tensor, batch: Tensor, *args, **kwargs) -> Tensor:
        loss = super().loss(outputs, self.half(batch))
        return loss + math.nan if int(os.environ["RANK"]) and len(self.losses) == 8 else loss

    @staticmethod
    def half(batch: Tensor) -> Tensor:
        rank = int(os.environ["RANK"])
        return batch[2 * rank : 2 * rank + 2]


def _train_on_rank(rank: int) -> tuple[dict[str, Tensor], str, dict[int, dict[str, float]], list[float]]:
    settings = {"thresholds": ONE_MATRIX, "cooldown": 4}
    monitor = StabilityMonitor({"stable_rank": 2, "spectral_alignment": 4}, "restore", **settings)
    model, loader = OfRank(), windows(10)
    data = [loader.batch(i) for i in range(10)]
    trainer = make_trainer(
        EditParallel(3, 5), monitor, model=model, train_dataloader=data, device_train_microbatch_size=4
    )
    trainer.fit()
    return weights(trainer.state.model), repr(monitor.state_dict()), trainer.logger.destinations[0].rows, model.losses


class EditParallel(Edit):
    def batch_start(self, state, logger) -> None:
        if int(state.timestamp.batch) + 1 in self.steps:
            collapse_(state.model.module, COLLAPSING)


def test_ranks_raise_the_same_alarms_and_restore_the_same(tmp_path):
    assert_ranks_agree(on_two_ranks(_train_on_rank, tmp_path))


# --- loggers -----------------------------------------------------------------------------------------------------


def test_tensorboard_shows_everything_on_one_page(tmp_path):
    monitor = StabilityMonitor(ALL, thresholds=ONE_MATRIX)
    trainer = make_trainer(Edit(6), monitor, loggers=[TensorboardLogger(str(tmp_path))], run_name="run")
    trainer.fit()
    trainer.close()
    events = EventAccumulator(str(tmp_path / "run"), {"tensors": 0, "scalars": 0}).Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    tags = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    missing = {tag for tag in tags if not any(re.match(tag, scalar) for scalar in events.Tags()["scalars"])}
    assert missing == {"marks/applications"}
    assert [(e.step, e.value) for e in events.Scalars("marks/alarms")] == [(5, 0), (6, 1), (7, 0)]
    assert [e.step for e in events.Scalars("jacobian_total")] == [2, 4, 6, 8, 10]
    (text,) = events.Tensors("alarms/text_summary")
    assert text.tensor_proto.string_val[0].startswith(f"step 6: stable_rank of {COLLAPSING}".encode())
    assert [e.step for e in events.Histograms("stable_rank")] == [2]


# --- the form of the house ---------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("method", [StabilityMonitor, msign_lightning.StabilityMonitor])
def test_bad_arguments_give_the_same_error_as_in_lightning(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method(**arguments)


def test_what_is_not_there_is_refused_when_fitting_starts():
    with pytest.raises(ValueError, match=r"targets must .*got '\*up_porj\*'; near names: .*up_proj"):
        fit(StabilityMonitor(targets="*up_porj*"))
    model = Model()
    model.transformer = recipe(n_layers=1)
    with pytest.raises(ValueError, match=r"blocks must be names or globs of modules, such as .*without a list of them"):
        fit(StabilityMonitor({"jacobian_alignment": 5}), model=model)


def test_repr_is_stable_and_complete():
    arguments = {"measure": {"stable_rank": 7}, "on_alarm": "stop", "cuts": {"*up_proj*": Cut((12, 12))}, "cooldown": 3}
    monitor = StabilityMonitor(**arguments)
    assert repr(monitor) == repr(StabilityMonitor(**arguments))
    assert all(f"{name}={value!r}" in repr(monitor) for name, value in arguments.items())
    assert repr(eval(repr(monitor), {"StabilityMonitor": StabilityMonitor, "Cut": Cut})) == repr(monitor)


def test_metadata_names_what_there_is():
    folder = Path(algorithms.__file__).parent / "stability_monitor"
    metadata = json.loads((folder / "metadata.json").read_text())["stability_monitor"]
    others = json.loads((folder.parent / "msign" / "metadata.json").read_text())["msign"]
    assert metadata.keys() == others.keys() - {"functional"}  # a callback is no function
    assert metadata["class_name"] in algorithms.__all__
    assert metadata["class_name"] in (folder / "README.md").read_text()
