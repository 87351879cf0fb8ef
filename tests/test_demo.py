"""The demo: one real run, and what is made of results, whatever they are."""

import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msign_lightning.recipes import demo
from msign_lightning.recipes.demo import ARMS, GOOD_LR, HIGH_LR, PERIOD, Result, Setting

STEPS = 10 * PERIOD


@pytest.fixture
def results() -> list[Result]:
    """Two seeds: MSign on all matrices helps at the high rate, on the MLP it harms, and the rest ties."""
    effect = {"MSign, all 2-D": -0.25, "MSign, MLP only": 0.125}
    out = []
    for seed in range(2):
        for lr in (HIGH_LR, GOOD_LR):
            for arm in ARMS:
                tie = 0.0 if arm == demo.BASELINE else 0.0625 * (-1) ** seed
                loss = 2.0 + seed + (effect.get(arm, tie) if lr == HIGH_LR else tie)
                steps = [19, 39, 59, 79, 99, 119]
                ranks = [float(2**seed * (i + 1)) for i in range(6)]
                out.append(Result(Setting(arm, lr, seed), loss, steps, [loss + 1 - i / 6 for i in range(6)], ranks))
    return out


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_a_run_trains_and_records(tmp_path):
    result = demo.train(Setting("MSign, attention", HIGH_LR, 0), STEPS, tmp_path)
    assert result.steps == list(range(PERIOD - 1, STEPS, PERIOD))
    assert len(result.losses) == len(result.stable_ranks) == len(result.steps)
    assert result.losses[-1] < result.losses[0] - 1
    assert 2 < result.val_loss < math.log(256)
    assert all(1 <= rank <= 32 for rank in result.stable_ranks)

    (log_dir,) = {path.parent for path in tmp_path.rglob("events.*")}
    events = EventAccumulator(str(log_dir))
    events.Reload()
    recorded = events.Scalars("stable_rank/attention")
    assert [e.step for e in recorded] == [*result.steps, STEPS]
    assert [e.value for e in recorded][:-1] == pytest.approx(result.stable_ranks)
    # None on the last step, which is evaluated.
    assert [e.step for e in events.Scalars("msign/changed")] == list(range(PERIOD, STEPS, PERIOD))


def test_table_pairs_the_seeds(results):
    rows = {tuple(row.split(" | ")[:2]): row.split(" | ")[2:] for row in demo.tabulate(results).splitlines()[2:]}
    assert len(rows) == 2 * len(ARMS)
    losses, mean, difference, rank = rows[f"| {HIGH_LR:g}", "MSign, all 2-D"]
    assert (losses, mean) == ("1.750 / 2.750", "2.250")
    assert difference == "-0.250 (-0.250 … -0.250)"
    assert float(rank.rstrip(" |")) == pytest.approx(math.sqrt(6 * 12), abs=0.05)
    assert rows[f"| {GOOD_LR:g}", "MSign, all 2-D"][2] == "+0.000 (-0.062 … +0.062)"


def test_summary_says_what_is_true(results):
    text = demo.summarize(results)
    at_high = text[text.index(f"At {HIGH_LR:g} ") :]
    assert "MSign, all 2-D by -0.250 (better on every seed)" in at_high
    assert "MSign, MLP only by +0.125 (worse on every seed)" in at_high
    assert "MSign, attention by +0.000 (not on one side of it on every seed)" in at_high


def test_summary_tells_a_diverged_arm(results):
    bad = [
        r._replace(val_loss=math.nan) if r.setting == Setting("MSign, attention", HIGH_LR, 1) else r for r in results
    ]
    at_high = demo.summarize(bad).split(f"At {HIGH_LR:g} ")[1]
    assert "MSign, attention not comparable (diverged on 1 of 2 seeds)" in at_high
    assert "MSign, all 2-D by -0.250 (better on every seed)" in at_high


@pytest.mark.parametrize("seeds", [1, 2])
def test_figure_is_drawn(results, tmp_path, seeds):
    demo.draw([r for r in results if r.setting.seed < seeds], tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 50}, "steps must be at least 200, got 50"),
        ({"seeds": 0}, "seeds must be a positive integer, got 0"),
        ({"workers": -1}, "workers must be a positive integer, got -1"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        demo.main(**arguments, folder=tmp_path)


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"folder must be one that can be written to, got '.*file/demo'"):
        demo.main(folder=tmp_path / "file" / "demo")
