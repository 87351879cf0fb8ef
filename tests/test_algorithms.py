"""The algorithms under real Composer trainers, each alone; what all owe is in test_composer_suite.py."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import catalogue
import pytest
import torch
from composer import Trainer
from composer.algorithms import EMA, SAM, GradientClipping
from composer.algorithms.warnings import NoEffectWarning
from composer.core import Algorithm, Callback, Precision
from composer.loggers import InMemoryLogger, TensorboardLogger
from composer.trainer._scaler import ClosureGradScaler
from support import assert_same, composer_trainer, on_two_ranks, weights, windows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from msign_lightning import MSignCallback, algorithms, restore
from msign_lightning.algorithms import MSign, SpikeNoMore, StabilityMonitor, apply_msign
from msign_lightning.recipes.composer_train import ComposerLanguageModel, build_trainer, main
from msign_lightning.recipes.train import load_recipe
from msign_lightning.recipes.transformer import Transformer, TransformerConfig

pytestmark = [
    pytest.mark.composer,
    # Composer's own, about itself.
    pytest.mark.filterwarnings("ignore:SAM has known issues of weight mismatch when loading"),
    pytest.mark.filterwarnings("ignore:.* is not in the state_dict. Its state will not be restored"),
]

CONFIG = TransformerConfig(vocab_size=96, n_layers=2, width=16, mlp_width=24, zero_query=False)
STEPS = 10


def batches() -> list[Tensor]:
    loader = windows(STEPS)
    return [loader.batch(i) for i in range(STEPS)]


def epoch_of(batches: list[Tensor]) -> DataLoader:
    return DataLoader(torch.cat(batches), batch_size=len(batches[0]))


def make_model() -> ComposerLanguageModel:
    torch.manual_seed(0)
    return ComposerLanguageModel(Transformer(CONFIG))


def make_trainer(*algorithms: Algorithm, model: nn.Module | None = None, steps: int = STEPS, **arguments) -> Trainer:
    model = make_model() if model is None else model
    defaults = {
        "train_dataloader": epoch_of(batches()),
        "max_duration": f"{steps}ba",
        "optimizers": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "algorithms": list(algorithms),
    }
    return composer_trainer(model, **(defaults | arguments))


def fit(*algorithms: Algorithm, **arguments) -> dict[str, Tensor]:
    """The weights after training."""
    trainer = make_trainer(*algorithms, **arguments)
    trainer.fit()
    trainer.close()
    return weights(trainer.state.model)


class Spy(Callback):
    """Records after how many batches a weight is orthogonal, i.e. was just restored."""

    def __init__(self, name: str = "attention.k_proj") -> None:
        self.name, self.restored = f"transformer.blocks.0.{name}.weight", []

    def batch_end(self, state, logger) -> None:
        singular_values = torch.linalg.svdvals(weights(state.model)[self.name].double())
        if singular_values.max() < 1.001 * singular_values.min():
            self.restored.append(int(state.timestamp.batch))


# --- several at once -----------------------------------------------------------------------------------------------


def test_all_algorithms_in_one_list(tmp_path):
    def run(folder: str, **arguments) -> tuple[dict[str, Tensor], list[int], list[int]]:
        attention, mlp = Spy(), Spy("mlp.up_proj")
        one_list = [MSign(2, "attention"), EMA("2ba"), SpikeNoMore(), MSign(3, "mlp"), GradientClipping("norm", 1.0)]
        save = {"save_folder": str(tmp_path / folder), "save_filename": "ba{batch}.pt", "save_interval": "5ba"}
        return fit(*one_list, callbacks=[attention, mlp], **save, **arguments), attention.restored, mlp.restored

    uninterrupted, *restored = run("uninterrupted")
    assert restored == [[2, 4, 6, 8, 10], [3, 6, 9]]
    resumed, *restored = run("resumed", load_path=str(tmp_path / "uninterrupted" / "ba5.pt"))
    assert restored == [[6, 8, 10], [6, 9]]
    assert_same(resumed, uninterrupted)


# --- MSign: when and what ----------------------------------------------------------------------------------------


def by_hand(period: int, algorithm_after: Callable[[nn.Module], object] = lambda _: None) -> dict[str, Tensor]:
    """The weights after training in plain PyTorch, restored one by one."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, batch in enumerate(batches(), start=1):
        optimizer.zero_grad()
        model.loss(model(batch), batch).backward()
        optimizer.step()
        if step % period == 0:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "_proj" in name:
                        p.copy_(restore(p))
        algorithm_after(model)
    return weights(model)


def test_same_weights_as_a_naive_loop():
    assert_same(fit(MSign(period=4)), by_hand(4))


def test_micro_batches_count_once():
    spy = Spy()
    in_parts = fit(MSign(period=4), callbacks=[spy], device_train_microbatch_size=1)
    assert spy.restored == [4, 8]
    for name, p in fit(MSign(period=4)).items():
        torch.testing.assert_close(in_parts[name], p, rtol=1e-3, atol=1e-4)


def test_ema_sees_restored_weights_in_either_order():
    average = {name: p.clone() for name, p in weights(make_model()).items()}
    seen: list[dict[str, Tensor]] = []
    by_hand(3, lambda model: seen.append(weights(model)))
    for step, now in enumerate(seen):
        average = {name: p if step == 0 else average[name] * 0.5 + p * 0.5 for name, p in now.items()}

    for order in (1, -1):
        both = [MSign(period=3), EMA("1ba")][::order]
        trainer = make_trainer(*both)
        trainer.fit()
        assert_same(weights(trainer.state.model), by_hand(3))
        (ema,) = (algorithm for algorithm in both if isinstance(algorithm, EMA))
        for name, p in ema.ema_model.named_parameters():
            torch.testing.assert_close(p, average[name], rtol=1e-5, atol=1e-6)
        if order == 1:
            first = dict(ema.ema_model.named_parameters())
        else:
            assert_same(first, dict(ema.ema_model.named_parameters()))


@pytest.mark.parametrize("interval", [1, 3])
def test_sam_counts_once_per_batch_in_either_order(interval):
    spy, algorithm = Spy(), MSign(period=4)
    first = fit(algorithm, SAM(interval=interval), callbacks=[spy])
    assert spy.restored == [4, 8]
    assert algorithm.state_dict()["steps"] == [10]
    assert_same(first, fit(SAM(interval=interval), MSign(period=4)))


OVERFLOW = 95


class Overflowing(ComposerLanguageModel):
    """Its loss is infinite on a batch that holds nothing but one token."""

    def loss(self, outputs: Tensor, batch: Tensor, *args, **kwargs) -> Tensor:
        return super().loss(outputs, batch) * (float("inf") if (batch == OVERFLOW).all() else 1)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("others", [(), (SAM,)])
def test_steps_skipped_by_the_gradient_scaler_do_not_count(others, fused):
    some = [batch if i not in (1, 4) else torch.full_like(batch, OVERFLOW) for i, batch in enumerate(batches())]
    torch.manual_seed(0)
    model = Overflowing(Transformer(CONFIG))
    algorithm, spy = MSign(period=4), Spy()
    trainer = make_trainer(
        algorithm,
        *(other() for other in others),
        model=model,
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused),
        train_dataloader=epoch_of(some),
        callbacks=[spy],
    )
    # Composer asks for a GPU to train in fp16, but scales gradients wherever it is told to.
    trainer.state.precision = Precision.AMP_FP16
    scaler = ClosureGradScaler if others else torch.amp.GradScaler
    trainer.state.scaler = scaler("cpu", init_scale=8.0)
    trainer.fit()
    assert trainer.state.timestamp.batch == 10
    assert algorithm.state_dict()["steps"] == [8]
    assert spy.restored == [6, 10]


def test_rescue_of_a_checkpoint_without_msign_takes_over_the_count(tmp_path):
    fit(steps=6, save_folder=str(tmp_path), save_filename="last.pt")
    spy, algorithm = Spy(), MSign(period=4)
    fit(algorithm, callbacks=[spy], load_path=str(tmp_path / "last.pt"))
    assert spy.restored == [8]
    assert algorithm.state_dict()["steps"] == [10]


def test_an_instance_of_another_run_takes_nothing_along(tmp_path):
    fit(steps=6, save_folder=str(tmp_path), save_filename="last.pt")
    spy, algorithm = Spy(), MSign(period=4)
    fit(algorithm, steps=3)
    fit(algorithm, callbacks=[spy], load_path=str(tmp_path / "last.pt"))
    assert spy.restored == [8]


class Fail(Callback):
    def batch_end(self, state, logger) -> None:
        raise ConnectionError("the node went away")


def test_hooks_go_when_fitting_ends_and_when_another_trainer_begins():
    algorithm = MSign(period=4)
    trainer = make_trainer(algorithm)
    trainer.fit()
    (optimizer,) = trainer.state.optimizers
    assert not optimizer._optimizer_step_post_hooks

    failing = make_trainer(algorithm, callbacks=[Fail()])
    with pytest.raises(ConnectionError):
        failing.fit()
    (optimizer,) = failing.state.optimizers
    assert len(optimizer._optimizer_step_post_hooks) == 1
    make_trainer(algorithm)
    assert not optimizer._optimizer_step_post_hooks


def test_metrics_stand_at_the_loss_of_their_batch(tmp_path):
    trainer = make_trainer(MSign(period=4), loggers=[TensorboardLogger(str(tmp_path))], run_name="run")
    trainer.fit()
    trainer.close()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    losses = [event.step for event in events.Scalars("loss/train/total")]
    restored = [event.step for event in events.Scalars("msign/stable_rank_after/min")]
    assert restored == [losses[step - 1] for step in (4, 8)]
    assert all(event.value == 12 for event in events.Scalars("msign/changed"))


# --- MSign: what it refuses ---------------------------------------------------------------------------------------


class NoMatrix(nn.Sequential):
    """An embedding and a head: nothing for a preset to choose."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(96, 8), nn.Linear(8, 96))

    def balance_loss(self) -> float:
        return 0.0


def test_no_effect_is_a_warning():
    with pytest.warns(NoEffectWarning, match="MSign has no effect.*at least one matrix"):
        changed = fit(MSign(period=1), model=ComposerLanguageModel(_seeded(NoMatrix)))
    assert_same(changed, fit(model=ComposerLanguageModel(_seeded(NoMatrix))))
    with pytest.warns(NoEffectWarning, match="apply_msign had no effect"):
        assert apply_msign(NoMatrix()).matrices == ()


def _seeded(factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return factory()


def test_a_typo_is_an_error():
    with pytest.raises(ValueError, match=r"targets must .*atention.*attention"):
        fit(MSign(targets="*.atention.*"))
    with pytest.raises(ValueError, match=r"exclude must .*atention.*attention"):
        apply_msign(make_model(), exclude="*.atention.*")


@pytest.mark.parametrize("method", [MSign, MSignCallback])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"period": 0}, "period must be a positive integer, got 0"),
        ({"period": 2.5}, "period must be a positive integer, got 2.5"),
        ({"start": -1}, "start must be an integer of at least 0, got -1"),
        ({"start": 10, "stop": 5}, "start must be at most stop, got start=10, stop=5"),
        ({"rule": "spectral"}, "rule must be .*got 'spectral'"),
        ({"method": "newton"}, "method must be .*got 'newton'"),
        ({"rtol": -1.0}, "rtol must .*got -1.0"),
    ],
)
def test_bad_arguments_give_the_same_error_as_in_lightning(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method(**arguments)


def test_the_function_reports_and_checks():
    model = make_model()
    report = apply_msign(model, "attention", exclude="*.blocks.1.*")
    assert [matrix.name.split(".")[-2] for matrix in report.matrices] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert all(matrix.changed for matrix in report.matrices)
    before = make_model().get_parameter(report.matrices[0].name)
    torch.testing.assert_close(model.get_parameter(report.matrices[0].name), restore(before))
    with pytest.raises(ValueError, match=r"rtol must .*got -1\.0"):
        apply_msign(model, rtol=-1.0)


# --- MSign: several processes -------------------------------------------------------------------------------------


def _train_on_rank(rank: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, list]]:
    torch.cuda.current_device = lambda: torch.device("cpu")  # where Composer puts what FSDP1 shards
    warnings.filterwarnings("ignore", "FSDP2 Config/APIs are experimental")
    sharded = {"parallelism_config": {"fsdp": {}}}
    whole, seen = {}, {}
    for name, used, settings in (
        ("ddp", [MSign(period=4)], {}),
        ("fsdp1", [MSign(period=STEPS)], sharded),
        ("fsdp1 without", [], sharded),
        ("fsdp2", [MSign(period=STEPS)], sharded),
        ("fsdp2 without", [], sharded),
    ):
        os.environ["FSDP_VERSION"] = "1" if "1" in name else "2"
        model = make_model()
        for block in model.transformer.blocks:
            block._fsdp_wrap = True
        trainer = make_trainer(
            *used,
            model=model,
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
            train_dataloader=[batch[2 * rank : 2 * rank + 2] for batch in batches()],
            device_train_microbatch_size=2,
            callbacks=[StabilityMonitor({"stable_rank": 4})],
            loggers=[memory := InMemoryLogger()],
            **settings,
        )
        trainer.fit()
        measured = ("stable_rank/min", "stable_rank/geometric_mean", "stability/loss", "stability/grad_norm")
        seen[name] = [[value for _, value in memory.data[quantity]] for quantity in measured]
        with FullyShardedDataParallel.summon_full_params(trainer.state.model, writeback=False):
            found = weights(trainer.state.model)
        assert all(isinstance(p, DTensor) == ("fsdp2" in name) for p in found.values())
        whole[name] = {
            key.replace("_fsdp_wrapped_module.", ""): p.full_tensor() if isinstance(p, DTensor) else p
            for key, p in found.items()
        }
    model = make_model()
    flat = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"use_orig_params of FSDP1 must be True.*got False"):
        apply_msign(flat)
    return whole, seen


def test_ranks_stay_equal_and_match_one_process(tmp_path):
    ranks, seen = zip(*on_two_ranks(_train_on_rank, tmp_path), strict=True)
    for name in ("ddp", "fsdp1", "fsdp2"):
        assert_same(ranks[0][name], ranks[1][name])
    assert seen[0] == seen[1]
    assert [len(values) for values in seen[0]["fsdp1"]] == [2, 2, 3, 3]
    for flat, copied in zip(seen[0]["fsdp1"], seen[0]["ddp"], strict=True):  # which is restored after the first
        assert flat[0] == pytest.approx(copied[0], rel=1e-4)

    model = make_model()
    alone = fit(MSign(period=4), model=model, optimizers=torch.optim.SGD(model.parameters(), lr=0.1))
    for name, p in alone.items():
        torch.testing.assert_close(ranks[0]["ddp"][name], p, rtol=1e-4, atol=1e-5)

    # What is sharded is compared with itself: on CPUs this PyTorch adds up the gradients of the ranks under FSDP2.
    for name in ("fsdp1", "fsdp2"):
        model.load_state_dict(ranks[0][f"{name} without"], strict=False)
        apply_msign(model)
        assert_same(ranks[0][name], weights(model))


class TestRecipe:
    """`recipes.composer_train` against `recipes.train`."""

    ARGUMENTS = (
        *("--trainer.max_steps=50", "--msign.period=10", "--msign.stop=50", "--trainer.logger=false"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        *("--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false"),
    )

    @pytest.mark.filterwarnings("ignore:The number of training batches")
    @pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
    @pytest.mark.parametrize("clip", [0.0, 1.0])
    def test_same_run_as_in_lightning(self, clip):
        arguments = [*self.ARGUMENTS, f"--trainer.gradient_clip_val={clip}"]
        lightning = load_recipe("tiny/prose", *arguments)
        if clip:  # the norm is a sum, which Lightning takes in the order of the optimizer's groups

            def clip_in_order_of_the_model(*_, **__) -> None:
                nn.utils.clip_grad_norm_(lightning.model.parameters(), clip)

            lightning.model.configure_gradient_clipping = clip_in_order_of_the_model
        lightning.trainer.fit(lightning.model, lightning.datamodule)
        logger = InMemoryLogger()
        composer = build_trainer(["--config", "tiny/prose", *arguments], loggers=[logger], progress_bar=False)
        composer.fit()
        composer.close()
        assert len(logger.data["msign/changed"]) == 5
        assert_same(weights(composer.state.model), weights(lightning.model))

    def test_command_line(self, monkeypatch, tmp_path, capfd):
        monkeypatch.chdir(tmp_path)
        command = "composer_train --config tiny/prose --trainer.max_steps=6 --msign.period=2 --data.val_windows=8"
        monkeypatch.setattr("sys.argv", command.split())
        main()
        printed = float(capfd.readouterr().out.splitlines()[-1].removeprefix("loss/val "))
        (log,) = (tmp_path / "runs" / "composer").iterdir()
        events = EventAccumulator(str(log)).Reload()
        assert events.Scalars("metrics/val/loss")[-1].value == pytest.approx(printed, abs=1e-4)
        assert len(events.Scalars("msign/changed")) == 2  # after steps 2 and 4, but not right before validation

    def test_baseline_and_what_is_refused(self):
        arguments = ["--config", "tiny/prose", "--trainer.max_steps=1", "--trainer.gradient_clip_val=null"]
        assert [type(a) for a in build_trainer(arguments).state.algorithms] == [MSign]
        assert not build_trainer([*arguments, "--use_msign=false"]).state.algorithms
        with pytest.raises(ValueError, match=r"trainer.max_steps must .*got -1"):
            build_trainer([*arguments, "--trainer.max_steps=-1", "--trainer.max_epochs=1"])
        with pytest.raises(ValueError, match=r"trainer.precision must .*got '64-true'"):
            build_trainer([*arguments, "--trainer.precision=64-true"])


# --- how others find the algorithms -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected"), [("msign", MSign), ("spike_no_more", SpikeNoMore)])
def test_llm_foundry_finds_it(name, expected):
    """Its registry is one of `catalogue` over these entry points; what it finds is called with the YAML's arguments."""
    registry = catalogue.create("llmfoundry", "algorithms", entry_points=True)
    assert registry.get(name) is expected
    arguments = {"msign": {"period": 50, "cuts": {"*q_proj*": {"sizes": [8, 8]}}}, "spike_no_more": {}}[name]
    assert isinstance(registry.get(name)(**arguments), Algorithm)


@pytest.mark.parametrize("name", ["msign", "spike_no_more"])
def test_metadata_names_what_there_is(name):
    folder = Path(algorithms.__file__).parent / name
    (metadata,) = (json.loads((folder / "metadata.json").read_text())[name],)
    for key in ("class_name", "functional"):
        assert metadata[key] in algorithms.__all__
    keys = {"name", "class_name", "functional", "tldr", "attribution", "link", "domains", "summary", "use"}
    assert metadata.keys() == keys
    assert metadata["class_name"] in (folder / "README.md").read_text()
