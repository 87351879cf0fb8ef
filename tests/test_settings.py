"""Arguments: stated once, the same for all frameworks, with a signature of their own, help, and checks."""

import inspect
import pickle
import re

import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from msign_lightning import Cut, MSignCallback, Restoration, SpikeNoMoreCallback, StabilityMonitor, spike_no_more_
from msign_lightning.monitor import Monitor
from msign_lightning.settings import MonitorSettings, RestorationSettings
from msign_lightning.spike_no_more import SpikeNoMoreSettings
from msign_lightning.transformers import MSignTrainerCallback

CALLBACKS = {
    MSignCallback: RestorationSettings,
    MSignTrainerCallback: RestorationSettings,
    StabilityMonitor: MonitorSettings,
    SpikeNoMoreCallback: SpikeNoMoreSettings,
}
OF_A_MODEL = {Restoration: RestorationSettings, Monitor: MonitorSettings, spike_no_more_: SpikeNoMoreSettings}


def parameters(of) -> list[inspect.Parameter]:
    return list(inspect.signature(of).parameters.values())


@pytest.mark.parametrize("of", CALLBACKS, ids=lambda of: of.__name__)
def test_a_callback_has_the_signature_of_its_settings(of):
    assert parameters(of) == parameters(CALLBACKS[of])
    first, *_ = parameters(of)
    assert first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


@pytest.mark.parametrize("of", OF_A_MODEL, ids=lambda of: of.__name__)
def test_what_is_made_for_a_model_takes_the_arguments_after_it(of):
    model, *others = parameters(of)
    assert model.name == "model"
    assert others == parameters(OF_A_MODEL[of])
    with pytest.raises(TypeError, match="unexpected keyword argument 'perod'"):
        of(BoringModel(), perod=3)
    with pytest.raises(TypeError, match="missing a required argument: 'model'"):
        of()


def test_a_callback_shows_its_arguments_and_can_be_pickled():
    callback = MSignCallback(5, "mlp", cuts={"*.qkv.weight": Cut((8, 8, 8))})
    assert repr(callback) == (
        "MSignCallback(period=5, targets='mlp', rule='msign', method='auto', rtol=None, exclude=(), "
        "cuts={'*.qkv.weight': Cut(sizes=(8, 8, 8), dim=0, repeats=1, names=())}, start=0, stop=None)"
    )
    assert repr(pickle.loads(pickle.dumps(callback))) == repr(callback)
    assert callback != MSignCallback(5, "mlp")
    assert {callback: 1}[callback] == 1


class Cli(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_lightning_class_args(MSignCallback, "msign")
        parser.add_lightning_class_args(StabilityMonitor, "monitor")


@pytest.mark.parametrize(("prefix", "settings"), [("msign", RestorationSettings), ("monitor", MonitorSettings)])
def test_help_tells_every_argument(capsys, monkeypatch, prefix, settings):
    monkeypatch.setattr("sys.argv", ["train.py", "--help"])
    with pytest.raises(SystemExit):
        Cli(BoringModel, run=False)
    told = " ".join(capsys.readouterr().out.split())
    described = dict(re.findall(r"^        (\w+): (.*?)(?=\n        \w+: |\n\n)", settings.__doc__, re.M | re.S))
    assert list(described) == [parameter.name for parameter in parameters(settings)]
    for name, text in described.items():
        (start, *_) = " ".join(text.split()).split(";")
        assert re.search(rf"--{prefix}\.{name} .{{0,80}}?{re.escape(start[:40])}", told), name


def test_nested_yaml(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text("""
trainer:
  callbacks:
    - class_path: msign_lightning.MSignCallback
      init_args: {period: 3, targets: [a, b], cuts: {"x*": {sizes: [1, 2], names: [k, v]}}}
    - class_path: msign_lightning.StabilityMonitor
      init_args: {measure: {stable_rank: 7}, on_alarm: restore, thresholds: {stable_rank: 3.0, spike: null}}
""")
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(tmp_path / "run.yaml"), "--msign.rule=cap"])
    cli = Cli(BoringModel, run=False, seed_everything_default=0)
    msign, monitor = cli.trainer.callbacks[:2]
    assert (msign.period, msign.targets, msign.cuts) == (3, ["a", "b"], {"x*": Cut((1, 2), names=("k", "v"))})
    assert (monitor.measure, monitor.on_alarm) == ({"stable_rank": 7}, "restore")
    assert monitor.thresholds == {"stable_rank": 3.0, "spike": None}
    assert any(isinstance(callback, MSignCallback) and callback.rule == "cap" for callback in cli.trainer.callbacks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"period": 0}, "period must be a positive integer, got 0"),
        ({"period": True}, "period must be a positive integer, got True"),
        ({"start": -1}, "start must be an integer of at least 0, got -1"),
        ({"period": 10, "stop": 5}, "stop must be at least 10, the first multiple of period 10 from start 0 on, got 5"),
        ({"rule": "sign"}, r"rule must be one of \('msign', 'cap'\), got 'sign'"),
        ({"method": "qr"}, "method must be one of .*, got 'qr'"),
        ({"rtol": 1.0}, r"rtol must be in \[0, 1\), got 1.0"),
    ],
)
@pytest.mark.parametrize("of", [Restoration, MSignCallback, MSignTrainerCallback], ids=lambda of: of.__name__)
def test_mistakes_read_the_same_everywhere(of, arguments, message):
    with pytest.raises(ValueError, match=message):
        of(*([BoringModel()] if of is Restoration else []), **arguments)
