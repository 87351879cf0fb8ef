"""CollapseDetector: which readings raise which alarms, when they clear, and exact resumption."""

import math

import pytest
import torch

from msign_lightning.collapse import Alarm, CollapseDetector


def healthy(steps: int, seed: int = 0, scatter: float = 0.02) -> list[float]:
    """A loss that falls from 4 to 2, with noise."""
    noise = scatter * torch.randn(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return [2 + 2 * math.exp(-step / 100) + noise[step].item() for step in range(steps)]


def feed(detector: CollapseDetector, losses: list[float], first: int = 1) -> list[Alarm]:
    return [alarm for step, loss in enumerate(losses, first) for alarm in detector.update(step, loss=loss)]


def test_a_healthy_run_raises_nothing():
    detector = CollapseDetector()
    assert feed(detector, healthy(3000)) == []
    good = {"stable_ranks": {"a": 3.0, "zero": 0.0}, "sign_diversity": {"a": 0.8, "masked": math.nan}}
    assert detector.update(3001, grad_norm=1e9, **good) == []
    assert detector.active == ()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm", "matrix"])
def test_what_is_not_finite_raises_at_once_and_only_once(name, value):
    detector = CollapseDetector()

    def update(step: int, x: float) -> list[Alarm]:
        return detector.update(step, **({"stable_ranks": {name: x}} if name == "matrix" else {name: x}))

    (alarm,) = update(1, value)
    assert alarm[:3] == ("non_finite", 1, name)
    assert update(2, value) == []
    assert detector.active == (("non_finite", name),)
    assert update(3, 5.0) == []
    assert detector.active == ()
    assert [a.step for a in update(4, value)] == [4]


def test_a_spike_is_measured_from_the_rolling_median():
    losses = healthy(600)
    median = sorted(losses[399:])[100]
    detector = CollapseDetector(spike=0.1)
    feed(detector, losses)
    (alarm,) = detector.update(601, loss=median + 0.1001)
    assert alarm[:3] == ("loss_spike", 601, "loss")
    assert (alarm.value, alarm.threshold) == pytest.approx((median + 0.1001, median + 0.1))
    detector = CollapseDetector(spike=0.1)
    feed(detector, losses)
    assert detector.update(601, loss=median + 0.0999) == []


def test_an_outlier_is_measured_in_standard_deviations_of_the_rolling_mean():
    losses = healthy(1500, scatter=0.2)
    window = torch.tensor(losses[500:], dtype=torch.double)
    threshold = (window.mean() + 7 * window.std(correction=0)).item()
    for loss, count in ((threshold - 1e-6, 0), (threshold + 1e-6, 1)):
        detector = CollapseDetector(spike=None, stall=None)
        assert feed(detector, losses) == []
        alarms = detector.update(1501, loss=loss)
        assert [a.kind for a in alarms] == ["loss_outlier"] * count
        assert all(a.threshold == pytest.approx(threshold) for a in alarms)


def test_a_plateau_above_the_best_loss_is_a_stall_once():
    detector = CollapseDetector()
    feed(detector, healthy(1000))
    alarms = feed(detector, [3.0] * 1000, first=1001)
    assert [a.kind for a in alarms] == ["loss_spike", "stall"]
    stall = alarms[-1]
    assert 1090 < stall.step < 1110
    assert stall.value - stall.threshold == pytest.approx(0.8, abs=0.03)
    assert detector.active == (("stall", "loss"),)
    feed(detector, [2.0] * 300, first=2001)
    assert detector.active == ()


def test_short_spikes_are_no_stall():
    losses = healthy(1000)
    losses[500:520] = [6.0] * 20
    assert {a.kind for a in feed(CollapseDetector(), losses)} == {"loss_spike", "loss_outlier"}


def test_a_loss_that_flutters_at_the_threshold_raises_one_alarm():
    detector = CollapseDetector(spike=0.1, z_score=None, stall=None)
    alarms = feed(detector, [2.0] * 200 + [2.11, 2.09] * 20 + [2.04] + [2.11])
    assert [(a.kind, a.step) for a in alarms] == [("loss_spike", 201), ("loss_spike", 242)]


@pytest.mark.parametrize(
    ("argument", "kind", "low", "between", "high", "threshold"),
    [
        ("stable_ranks", "stable_rank", 2.03, 2.2, 2.25, 2.04),
        ("sign_diversity", "sign_diversity", 0.09, 0.19, 0.21, 0.1),
    ],
)
def test_low_values_raise_per_matrix_with_hysteresis(argument, kind, low, between, high, threshold):
    detector = CollapseDetector(sign_diversity=0.1)
    steps = [(high, low), (low, low), (between, high), (low, low), (high, high), (low, low)]
    raised = [detector.update(i, **{argument: {"a": a, "b": b}}) for i, (a, b) in enumerate(steps)]
    expected = [["b"], ["a"], [], ["b"], [], ["a", "b"]]
    assert [[alarm.name for alarm in alarms] for alarms in raised] == expected
    assert raised[0] == [Alarm(kind, 0, "b", low, pytest.approx(threshold))]
    assert detector.update(9, **{argument: {}}) == []
    assert len(detector.active) == 2


@pytest.mark.parametrize(("argument", "low", "masked"), [("stable_ranks", 1.0, 0.0), ("sign_diversity", 0.0, math.nan)])
def test_matrices_raise_only_together_unless_their_share_says_otherwise(argument, low, masked):
    def names(*values: float, share: float = 0.5) -> list[str]:
        detector = CollapseDetector(sign_diversity=0.1, share=share)
        return [a.name for a in detector.update(1, **{argument: dict(zip("abcd", values, strict=True))})]

    assert names(low, 9.0, 9.0, low) == ["a", "d"]
    assert names(low, 9.0, 9.0, 9.0) == []
    assert names(low, 9.0, masked, masked) == ["a"]
    assert names(low, 9.0, 9.0, 9.0, share=0.25) == ["a"]
    assert names(low, low, low, 9.0, share=1.0) == []


def test_what_has_been_changed_is_cleared_and_raises_anew():
    detector = CollapseDetector(sign_diversity=0.1)
    bad = {"stable_ranks": {"a": 1.0, "b": 1.0}, "sign_diversity": {"a": 0.0}, "grad_norm": math.nan}
    assert len(detector.update(1, **bad)) == 4
    detector.clear({"a"})
    assert detector.active == (("non_finite", "grad_norm"), ("stable_rank", "b"))
    assert [a[:3] for a in detector.update(2, **bad)] == [("stable_rank", 2, "a"), ("sign_diversity", 2, "a")]
    detector.clear([])
    assert len(detector.active) == 4


def test_none_turns_an_alarm_off():
    detector = CollapseDetector(spike=None, z_score=None, stall=None, stable_rank=None, sign_diversity=None)
    assert feed(detector, [*healthy(500), *[9.0] * 500]) == []
    assert detector.update(1001, stable_ranks={"a": 1.0}, sign_diversity={"a": 0.0}) == []
    assert [a.kind for a in detector.update(1002, loss=math.nan)] == ["non_finite"]


def test_a_resumed_detector_equals_an_uninterrupted_one_wherever_it_is_split():
    losses = [*healthy(200), *[9.0] * 5, *[math.nan] * 3, *[3.5] * 130]
    generator = torch.Generator().manual_seed(0)
    ranks, diversities = (torch.rand(len(losses), generator=generator).tolist() for _ in range(2))

    def step(detector: CollapseDetector, i: int) -> list[Alarm]:
        return detector.update(
            i, loss=losses[i], grad_norm=1.0, stable_ranks={"w": 3 * ranks[i]}, sign_diversity={"w": diversities[i] / 2}
        )

    whole, states, expected = CollapseDetector(sign_diversity=0.1), [], []
    for i in range(len(losses)):
        states.append(whole.state_dict())
        expected.append(step(whole, i))
    assert {a.kind for alarms in expected for a in alarms} == {
        *("non_finite", "loss_spike", "loss_outlier", "stall", "stable_rank", "sign_diversity")
    }
    for split, state in enumerate(states):
        resumed = CollapseDetector(sign_diversity=0.1)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        tail = [step(resumed, i) for i in range(split, min(split + 25, len(losses)))]
        assert repr(tail) == repr(expected[split : split + 25])
    assert resumed.state_dict() == whole.state_dict()


def test_the_state_is_plain(tmp_path):
    detector = CollapseDetector()
    feed(detector, [*healthy(30), 9.0, math.nan])
    torch.save(detector.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == detector.state_dict()
    assert all(type(loss) is float for loss in detector.state_dict()["losses"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spike": 0}, "spike must be a positive number or None, got 0"),
        ({"z_score": -7.0}, "z_score must be a positive number or None, got -7.0"),
        ({"stall": math.nan}, "stall must be a positive number or None, got nan"),
        ({"stable_rank": "2"}, "stable_rank must be a positive number or None, got '2'"),
        ({"stable_rank": math.inf}, "stable_rank must be a positive number or None, got inf"),
        ({"spike": True}, "spike must be a positive number or None, got True"),
        ({"sign_diversity": 0.6}, "sign_diversity must be a positive number of at most 0.5 or None, got 0.6"),
        ({"share": 0}, "share must be above 0 and at most 1, got 0"),
        ({"share": True}, "share must be above 0 and at most 1, got True"),
    ],
)
def test_the_detector_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        CollapseDetector(**arguments)
