"""What Composer's own suites ask of its algorithms and callbacks, asked of ours: one table drives them all.

After the example of `tests/algorithms` and `tests/callbacks` of MosaicML Composer 0.32 (Apache-2.0), without code of
theirs: train, fit again, resume, two processes, every event on a bare state, closing twice, with models of the same
kinds.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from composer import Trainer
from composer.algorithms.warnings import NoEffectWarning
from composer.core import Algorithm, Callback, Engine, Event, State
from composer.devices import DeviceCPU
from composer.loggers import InMemoryLogger, Logger
from composer.metrics import LanguageCrossEntropy
from composer.models import ComposerClassifier, ComposerModel, HuggingFaceModel
from composer.utils import dist, reproducibility
from support import assert_same, composer_trainer, on_two_ranks, weights, windows
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from msign_lightning import Cut, algorithms
from msign_lightning.algorithms import MSign, SpikeNoMore, StabilityMonitor, apply_msign, apply_spike_no_more
from msign_lightning.recipes.composer_train import ComposerLanguageModel
from msign_lightning.recipes.transformer import Transformer, TransformerConfig

pytestmark = [
    pytest.mark.composer,
    # Composer's own, where a run resumes from the checkpoint of an epoch's last batch: nothing is left to train.
    pytest.mark.filterwarnings("ignore:No batches were trained for global rank"),
    pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* was called before the ``update`` method"),
]

VOCAB = 96
STEPS = 10

# --- models and data ---------------------------------------------------------------------------------------------


def recipe() -> ComposerModel:
    config = TransformerConfig(vocab_size=VOCAB, n_layers=2, width=16, mlp_width=24, zero_query=False)
    return ComposerLanguageModel(Transformer(config))


def bert() -> ComposerModel:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=VOCAB, max_position_embeddings=16, **sizes))
    return HuggingFaceModel(model, metrics=[LanguageCrossEntropy()], use_logits=True)


def gpt2() -> ComposerModel:
    """Of width two: no matrix has more than two singular values."""
    sizes = {"n_positions": 16, "n_embd": 2, "n_head": 2, "n_layer": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **sizes))
    return HuggingFaceModel(model, metrics=[LanguageCrossEntropy()], use_logits=True, shift_labels=True)


class Mean(nn.Module):
    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.mean(dim=1)


def classifier() -> ComposerModel:
    layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=16, dropout=0.3, batch_first=True)
    encoder = nn.TransformerEncoder(layer, num_layers=2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
    layers = nn.Embedding(VOCAB, 16), encoder, Mean(), nn.Dropout(0.3), nn.Linear(16, 2)
    return ComposerClassifier(nn.Sequential(*layers), num_classes=2)


def image() -> ComposerModel:
    """Without a matrix to restore."""
    convolutions = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 4, 3, stride=2, padding=1)
    layers = *convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 16), nn.Linear(16, 2)
    return ComposerClassifier(nn.Sequential(*layers), num_classes=2)


def examples(model: Callable[[], ComposerModel]) -> list[Any]:
    """A data set for ten batches of four."""
    generator = torch.Generator().manual_seed(1)
    if model is image:
        return [(torch.randn(3, 16, 16, generator=generator), i % 2) for i in range(4 * STEPS)]
    loader = windows(STEPS)
    tokens = list(torch.cat([loader.batch(i) for i in range(STEPS)]))
    if model is recipe:
        return tokens
    if model is classifier:
        return [(window, i % 2) for i, window in enumerate(tokens)]
    return [{"input_ids": window[:16], "labels": window[:16]} for window in tokens]


# --- the table ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One of our classes with arguments; a period of ten applies it after the last step, as `apply` does by hand."""

    kind: Callable[..., Algorithm | Callback]
    kwargs: dict[str, Any]
    apply: Callable[[nn.Module, Sequence[Optimizer]], object] | None = None
    applied_first: bool = False
    metrics: dict[str, list[int]] = field(default_factory=dict)
    hyperparameters: tuple[str, ...] = ()

    def build(self, **kwargs: Any) -> Algorithm | Callback:
        return self.kind(**(self.kwargs | kwargs))


def _spike_no_more(shortcut: str) -> Setting:
    def apply(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        reproducibility.seed_all(0)
        apply_spike_no_more(model, shortcut, optimizers=optimizers)

    logged = ("spike_no_more/matrices",)
    return Setting(SpikeNoMore, {"shortcut": shortcut}, apply, applied_first=True, hyperparameters=logged)


def _msign(logged: list[int], **kwargs: Any) -> Setting:
    by_hand = {name: value for name, value in kwargs.items() if name not in ("period", "start")}
    return Setting(MSign, kwargs, lambda model, _: apply_msign(model, **by_hand), metrics={"msign/changed": logged})


SETTINGS = {
    "MSign": _msign([3, 7], period=4),
    "MSign, cap": _msign([4, 9], period=5, targets=["*.attention.*"], rule="cap"),
    "MSign, cut": _msign([2, 5, 8], period=3, targets="mlp", cuts={"*.up_proj.*": Cut((12, 12))}, rtol=1e-3),
    "MSign, at the end": _msign([9], period=10, exclude="*.blocks.0.*", method="svd"),
    "SpikeNoMore": _spike_no_more("scaled_embed"),
    "SpikeNoMore, norm": _spike_no_more("embed_ln"),
    "StabilityMonitor": Setting(
        StabilityMonitor, {"measure": {"stable_rank": 5}}, metrics={"stable_rank/min": [5, 10]}
    ),
    "StabilityMonitor, restoring": Setting(
        StabilityMonitor,
        {
            **{"measure": {"stable_rank": 2, "spectral_alignment": 4}, "on_alarm": "restore", "cooldown": 3},
            "thresholds": {"stable_rank": 9.0, "share": 0.01},
        },
        metrics={"msign/changed": [2, 6, 8, 10]},
    ),
}
FOR_ANY_MODEL = ("MSign", "SpikeNoMore", "StabilityMonitor, restoring")


class Case(NamedTuple):
    """A setting with the model that it is tried on."""

    setting: Setting
    model: Callable[[], ComposerModel]

    def trainer(self, thing: Algorithm | Callback | None, seed: int = 0, lr: float = 1e-2, **arguments: Any) -> Trainer:
        """One with this algorithm or callback, or without; the seed is that of the model's first weights."""
        torch.manual_seed(seed)
        model = self.model()
        # What resumes from a checkpoint begins with other weights and another learning rate.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2 if seed == 0 else 0.1)
        defaults = {
            "algorithms" if isinstance(thing, Algorithm) else "callbacks": thing,
            "train_dataloader": DataLoader(examples(self.model), batch_size=4),
            "optimizers": optimizer,
            "schedulers": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        }
        return composer_trainer(model, **(defaults | arguments))

    def expected(self) -> AbstractContextManager[object]:
        """Where fitting starts: a warning, if the model has nothing to restore or to measure."""
        if self.model is not image:
            return nullcontext()
        return pytest.warns(NoEffectWarning, match=rf"{self.setting.kind.__name__} has no effect.*at least one matrix")

    def fit(self, trainer: Trainer, **arguments: Any) -> dict[str, Tensor]:
        """The weights after training."""
        reproducibility.seed_all(0)  # where nothing is loaded
        with self.expected():
            trainer.fit(**arguments)
        return weights(trainer.state.model)

    def weights(self, **arguments: Any) -> dict[str, Tensor]:
        """Those of one uninterrupted run of ten steps."""
        trainer = self.trainer(self.setting.build(), **arguments)
        found = self.fit(trainer)
        trainer.close()
        return found


CASES = {f"{name}-recipe": Case(setting, recipe) for name, setting in SETTINGS.items()} | {
    f"{name}-{model.__name__}": Case(SETTINGS[name], model)
    for name in FOR_ANY_MODEL
    for model in (bert, gpt2, classifier, image)
    if (name, model) != ("SpikeNoMore", image)  # which has no embedding, an error
}
of_algorithms = pytest.mark.parametrize(
    "setting", [pytest.param(s, id=name) for name, s in SETTINGS.items() if s.apply is not None]
)


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch", [1, 2])
def test_it_trains_and_trains_again(case, microbatch):
    validation = DataLoader(examples(case.model)[:8], batch_size=4)
    arguments = {"eval_dataloader": validation, "device_train_microbatch_size": microbatch, "max_duration": "1ep"}
    trainer = case.trainer(case.setting.build(), **arguments)
    for epochs in (1, 2):
        trainer.state.max_duration = f"{epochs}ep"
        found = case.fit(trainer)
        assert trainer.state.timestamp.batch == epochs * STEPS
        assert all(p.isfinite().all() for p in found.values())
    trainer.close()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_two_fits_equal_one(setting):
    case = Case(setting, recipe)  # without dropout, whose numbers are others in a second fit
    trainer = case.trainer(case.setting.build(), max_duration="3ba")
    case.fit(trainer)
    assert_same(case.fit(trainer, duration="7ba"), case.weights())


def test_an_instance_starts_anew_with_another_trainer_and_with_time_reset(case):
    thing = case.setting.build()
    case.fit(case.trainer(thing, max_duration="3ba"))
    trainer = case.trainer(thing)
    assert_same(case.fit(trainer), case.weights())

    other = case.trainer(case.setting.build())
    case.fit(other)
    first, second = (case.fit(each, reset_time=True, duration="10ba") for each in (trainer, other))
    assert_same(first, second)


@of_algorithms
def test_it_changes_the_run(setting):
    case = Case(setting, recipe)
    changed, plain = case.weights(), case.fit(case.trainer(None))
    assert any(not torch.equal(changed[name], plain[name]) for name in plain)


@of_algorithms
def test_the_function_does_what_the_algorithm_does(setting):
    case = Case(setting, recipe)
    trainer = case.trainer(None)
    if setting.applied_first:
        setting.apply(trainer.state.model, trainer.state.optimizers)
    trainer.fit()
    if not setting.applied_first:
        setting.apply(trainer.state.model, trainer.state.optimizers)
    period = {} if setting.applied_first else {"period": STEPS}
    assert_same(weights(trainer.state.model), case.fit(case.trainer(setting.build(**period))))


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_it_logs(setting):
    logger = InMemoryLogger()
    Case(setting, recipe).weights(loggers=logger)
    for name, steps in setting.metrics.items():
        assert [int(timestamp.batch) for timestamp, _ in logger.data[name]] == steps
        assert all(value > 0 for _, value in logger.data[name])
    assert set(setting.hyperparameters) <= set(logger.hyperparameters)


# --- resumption --------------------------------------------------------------------------------------------------


def run_and_save(case: Case, folder: Path, interval: str, **arguments: Any) -> dict[str, Tensor]:
    """The weights after two epochs of three steps, which save themselves on every rank."""
    data = examples(case.model)
    sampler = dist.get_sampler(data) if dist.get_world_size() > 1 else None
    trainer = case.trainer(
        case.setting.build(),
        train_dataloader=DataLoader(data, batch_size=4, sampler=sampler),
        train_subset_num_batches=3,
        max_duration="2ep",
        save_folder=str(folder),
        save_filename="{batch}-{rank}.pt",
        save_interval=interval,
        **arguments,
    )
    found = case.fit(trainer)
    trainer.close()
    return found


def run_and_resume(case: Case, folder: Path, interval: str, batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of an uninterrupted run, and of one that goes on from its checkpoint with all else different."""
    whole = run_and_save(case, folder / "whole", interval)
    other = {"seed": 1, "load_path": str(folder / "whole" / f"{batch}-{{rank}}.pt")}
    return whole, run_and_save(case, folder / "resumed", interval, **other)


def saved(file: Path) -> dict[str, Any]:
    """All that a checkpoint holds of a run: generators, weights, optimizers, metrics, our states; but no clocks."""
    checkpoint = torch.load(file, weights_only=False)
    state = checkpoint["state"]
    del state["run_name"]
    del state["callbacks"]["CheckpointSaver"]["all_saved_checkpoints_to_timestamp"]
    for clock in ("total_wct", "iteration_wct", "epoch_wct", "batch_wct"):
        del state["timestamp"]["Timestamp"][clock]
    return checkpoint


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two checkpoints differ, to the last bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [each for key in a for each in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [each for i in range(len(a)) for each in differences(a[i], b[i], f"{path}/{i}")]
    if isinstance(a, (Tensor, np.ndarray)):
        same = type(a) is type(b) and np.array_equal(a, b)
    else:
        same = type(a) is type(b) and repr(a) == repr(b)
    return [] if same else [path]


def assert_resumed(folder: Path) -> None:
    """The last checkpoints are the same."""
    whole, resumed = (saved(folder / name / "6-0.pt") for name in ("whole", "resumed"))
    assert "model" in whole["state"]
    assert not differences(whole, resumed)


@pytest.mark.parametrize(("interval", "batch"), [("1ba", 1), ("1ba", 3), ("1ba", 4), ("1ep", 3)])
def test_resumed_run_is_bit_equal(case, tmp_path, interval, batch):
    whole, resumed = run_and_resume(case, tmp_path, interval, batch)
    assert_same(resumed, whole)
    assert_resumed(tmp_path)
    first, last = (saved(tmp_path / "whole" / f"{b}-0.pt")["state"]["model"] for b in (batch, 6))
    assert differences(first, last)


class Crash(Callback):
    """Raises in the middle of a step."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def after_backward(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == self.batch:
            raise ConnectionError("the node went away")


@pytest.mark.parametrize("batch", [5, 8])
def test_a_crashed_run_resumes_by_itself(case, tmp_path, batch):
    def trainer(*others: Callback, seed: int) -> Trainer:
        thing = case.setting.build()
        things = {"callbacks": [*others, *([thing] if isinstance(thing, Callback) else [])]}
        save = {"run_name": "run", "autoresume": True, "save_folder": str(tmp_path), "save_interval": "1ba"}
        return case.trainer(thing, seed, **(things | save))

    crashing = trainer(Crash(batch), seed=0)
    with pytest.raises(ConnectionError):
        case.fit(crashing)
    crashing.close()
    resumed = trainer(seed=1)
    assert resumed.state.timestamp.batch == batch
    assert_same(case.fit(resumed), case.weights())


def _resume(rank: int, folder: Path) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]] | str]:
    """The weights of every case, or what went wrong."""
    found = {}
    for name, case in CASES.items():
        try:
            found[name] = run_and_resume(case, folder / name, "1ba", 4)
        except BaseException as error:
            found[name] = repr(error)
    return found


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, on_two_ranks(_resume, folder, folder)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_and_resume_alike(on_ranks, name):
    folder, ranks = on_ranks
    mine, theirs = (rank[name] for rank in ranks)
    assert not isinstance(mine, str), mine
    whole, resumed = mine
    for others in (resumed, *theirs):
        assert_same(others, whole)
    assert_resumed(folder / name)


# --- events ------------------------------------------------------------------------------------------------------


class Bare:
    """A state, a logger and an engine without a trainer."""

    def __init__(self, case: Case, thing: Algorithm | Callback) -> None:
        torch.manual_seed(0)
        model = case.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        settings = {"precision": "fp32", "device_train_microbatch_size": 1, "max_duration": "10ep"}
        self.state = State(model, 0, "run", DeviceCPU(), optimizers=optimizer, **settings)
        self.state.schedulers = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        self.state.set_dataloader(DataLoader(examples(case.model)), "train")
        (self.state.algorithms if isinstance(thing, Algorithm) else self.state.callbacks).append(thing)
        self.engine = self.new_engine()

    def new_engine(self) -> Engine:
        return Engine(self.state, Logger(self.state))


def test_every_event_alone_and_in_order_on_a_bare_state(case):
    for event in Event:
        bare = Bare(case, case.setting.build())
        with case.expected() if event == Event.FIT_START else nullcontext():
            bare.engine.run_event(event)
        bare.engine.close()
    bare = Bare(case, case.setting.build())
    with case.expected():
        for event in Event:
            bare.engine.run_event(event)
    bare.engine.close()


def test_fitting_starts_and_ends_twice(case):
    bare = Bare(case, case.setting.build())
    bare.engine.run_event(Event.INIT)
    for _ in range(2):
        with case.expected():
            bare.engine.run_event(Event.FIT_START)
        bare.engine.run_event(Event.FIT_END)
    (optimizer,) = bare.state.optimizers
    assert not optimizer._optimizer_step_post_hooks
    bare.engine.close()


@pytest.mark.parametrize("event", [Event.INIT, Event.FIT_START, Event.BATCH_START])
def test_closing_twice_and_once_more_with_another_engine(case, event):
    bare = Bare(case, case.setting.build())
    with case.expected() if event != Event.INIT else nullcontext():
        for each in list(Event)[: list(Event).index(event) + 1]:
            bare.engine.run_event(each)
    for _ in range(2):
        bare.engine.close()
    again = bare.new_engine()
    for _ in range(2):
        again.close()
    assert not any(module._forward_pre_hooks for module in bare.state.model.modules())


# --- the form of the house ---------------------------------------------------------------------------------------


def test_repr_is_stable_and_complete(case):
    thing = case.setting.build()
    case.fit(case.trainer(thing, max_duration="3ba"))
    assert repr(thing) == repr(case.setting.build())
    assert all(f"{name}={value!r}" in repr(thing) for name, value in case.setting.kwargs.items())
    assert repr(eval(repr(thing), vars(algorithms) | {"Cut": Cut})) == repr(thing)
    if isinstance(thing, Algorithm):
        assert thing.state_dict()["repr"] == repr(thing)


def test_it_can_be_pickled_before_and_after_training(case):
    thing = pickle.loads(pickle.dumps(case.setting.build()))
    found = case.fit(case.trainer(thing))
    assert_same(found, case.weights())
    again = pickle.loads(pickle.dumps(thing))
    assert repr(again) == repr(thing)
    assert differences(again.state_dict(), thing.state_dict()) == []


@of_algorithms
def test_match_only_looks(setting):
    algorithm, trainer = setting.build(), Case(setting, recipe).trainer(None)
    before = dict(vars(algorithm))
    matched = [event for event in Event if algorithm.match(event, trainer.state)]
    assert Event.INIT in matched
    assert matched == [event for event in Event if algorithm.match(event, trainer.state)]
    assert vars(algorithm) == before
    assert not algorithm.find_unused_parameters
    assert not algorithm.backwards_create_graph
