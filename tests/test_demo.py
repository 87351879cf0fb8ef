"""The demo: a study that comes along, with its own command, figure and table."""

from dataclasses import replace

import pytest

from msign_lightning.ablations import Study, load
from msign_lightning.ablations.figures import curves
from msign_lightning.ablations.program import run_cell
from msign_lightning.ablations.results import Run
from msign_lightning.ablations.views import report
from msign_lightning.cli import main


def test_the_command_runs_the_study_in_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert len(load("demo").cells) == 5 * 2 * 3
    assert all(key in said for key in load("demo").cells)

    (tmp_path / "runs").write_text("")
    assert main(["demo"]) == 2
    assert "folder runs/demo must be one that can be written to" in capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Run]:
    """Those of two arms of a shorter demo, at both rates, with one seed."""
    study = small()
    folder = tmp_path_factory.mktemp("runs")
    outcomes = {cell: run_cell(study, cell, folder) for cell in study.cells.values()}
    return [Run(cell, outcome, study.stability.is_stable(outcome)) for cell, outcome in outcomes.items()]


def small(**changed) -> Study:
    return replace(load("demo"), **{"steps": 100, "arms": ["adamw", "msign"], "seeds": [0], **changed})


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_the_figure_shows_loss_and_stable_rank_of_each_arm_over_the_steps(runs):
    (drawing,) = curves(small(), runs, "adamw")
    axes = drawing.figure.axes
    assert [ax.get_title() for ax in axes] == ["peak learning rate 0.003", "peak learning rate 0.03", "", ""]
    for ax, field in zip(axes, ("curve", "curve", "ranks", "ranks"), strict=True):
        lr = 0.003 if ax in (axes[0], axes[2]) else 0.03
        assert [line.get_label() for line in ax.lines] == ["adamw", "msign"]
        for line in ax.lines:
            (outcome,) = (r.outcome for r in runs if (r.cell.arm, r.cell.lr) == (line.get_label(), lr))
            assert [*zip(*line.get_data(), strict=True)] == [p for p in getattr(outcome, field) if p[0] > 10]
    assert [step for step, _ in runs[0].outcome.ranks] == [19, 39, 59, 79, 99, 100], "before an application, and last"


def test_the_band_is_over_seeds_and_a_run_that_diverged_ends_it(runs):
    study = small(arms=["adamw"], seeds=[0, 1])
    good = next(r for r in runs if r.cell.arm == "adamw" and r.cell.lr == 0.003)
    short = good.outcome._replace(curve=good.outcome.curve[:20], ranks=good.outcome.ranks[:3])
    other = good._replace(cell=good.cell._replace(seed=1), outcome=short)
    (drawing,) = curves(study, [good, other], "adamw")
    losses, ranks = drawing.figure.axes
    assert losses.lines[0].get_xdata()[-1] == short.curve[-1][0]
    assert [*ranks.lines[0].get_xdata()] == [19, 39, 59]


def test_the_report_has_figure_and_table(runs, tmp_path):
    files = report(small(), runs, tmp_path)
    assert (tmp_path / "report" / "curves.png") in files
    text = (tmp_path / "report" / "report.md").read_text()
    assert "(curves.png)" in text
    for run in runs:
        assert f"| {run.cell.arm} | {run.cell.lr:.4g} | {run.outcome.val_loss:.3f} |" in text


def test_there_is_no_figure_without_stable_ranks_or_with_too_many_groups(runs):
    without = [r._replace(outcome=r.outcome._replace(ranks=())) for r in runs]
    assert curves(small(), without, "adamw") == []
    many = small(arms=["msign"], factors={"lr": [0.003], "period": [*range(1, 10)]})
    given = [Run(cell, runs[0].outcome, True) for cell in many.cells.values()]
    assert len(given) == 9
    assert curves(many, given, "msign") == []


def test_outcomes_of_earlier_versions_have_no_ranks(runs):
    stored = runs[0].outcome.as_dict()
    del stored["ranks"]
    assert type(runs[0].outcome).from_dict(stored) == runs[0].outcome._replace(ranks=())
