"""Views of a study: what stands in tables, sentences, page and event files; that figures are drawn of what there is."""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.get_experiment import Handler as ExperimentHandler
from tensorboard.plugins.hparams.list_session_groups import Handler as SessionsHandler
from torch.utils.tensorboard import SummaryWriter

from msign_lightning.ablations import views
from msign_lightning.ablations.cell import Cell, Outcome
from msign_lightning.ablations.figures import Drawing
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.results import Run, best, find, overheads
from msign_lightning.ablations.study import Bisect, Grid, Sampler, Study, Tpe, Variant
from msign_lightning.ablations.views import markdown, missing, report, tables

GRID = Grid()
STEPS = 300
FIGURES = {"loss", "frontier", "survival"}
RESULTS, BEST = "Results", "Each arm at its best learning rate"
BOUNDARIES = "Up to which learning rate training is stable"
COLLAPSES = "How many runs collapsed or diverged, and when"


def make_study(arms: Sequence[str] = ("adamw", "msign", "muon"), sampler: Sampler = GRID, **changes) -> Study:
    factors = {"lr": (0.01, 0.1)} if isinstance(sampler, Grid) else {}
    values = {"factors": factors, "seeds": (0, 1, 2), **changes}
    return Study("made <up> & small", "tiny/prose", STEPS, arms, sampler=sampler, **values)


def outcome(loss: float | None, *, collapsed_at: int | None = None, rate: float = 1000.0) -> Outcome:
    """What a run gave that ended at a loss; it diverged half-way if that is None."""
    end = STEPS if loss is not None else collapsed_at or STEPS // 2
    return Outcome(
        val_loss=loss,
        initial_loss=5.5,
        best_loss=2.0,
        final_loss=loss,
        diverged_at=None if loss is not None else end,
        collapsed_at=collapsed_at if loss is not None else end,
        spikes=0,
        max_grad_norm=1.0,
        stable_rank=None if loss is None else 4.0,
        steps=end,
        steps_per_second=rate,
        seconds=9.0,
        curve=((1, 5.5), (end, 2.0)),
    )


def train(study: Study, outcome_of: Callable[[Cell], Outcome]) -> list[Run]:
    """A run for every cell of a grid."""
    outcomes = [(cell, outcome_of(cell)) for cell in study.cells.values()]
    return [Run(cell, o, study.stability.is_stable(o)) for cell, o in outcomes]


def bisect(study: Study, boundary: Callable[[Cell], float]) -> list[Run]:
    """Runs of a bisection: each group and seed has learning rates of its own."""
    assert isinstance(study.sampler, Bisect)
    runs = []
    for group in study.groups:
        for seed in study.seeds:
            low, high = math.log10(study.sampler.low), math.log10(study.sampler.high)
            for _ in range(study.sampler.runs):
                cell = group.cell(10 ** ((low + high) / 2), seed)
                stable = cell.lr < boundary(cell)
                low, high = (math.log10(cell.lr), high) if stable else (low, math.log10(cell.lr))
                runs.append(Run(cell, outcome(2.0) if stable else outcome(3.5, collapsed_at=100), stable))
    return runs


LOSSES = {  # by arm and learning rate; seed n ends n/8 higher
    ("adamw", 0.01): 2.0,
    ("adamw", 0.1): 3.0,
    ("msign", 0.01): 2.125,
    ("msign", 0.1): 2.0625,
    ("muon", 0.01): 1.5,
    ("muon", 0.1): None,
}


def loss_of(cell: Cell) -> Outcome:
    """MSign rescues the high rate but is worse than AdamW at the low one; Muon is best and diverges at the high one."""
    loss = LOSSES[cell.arm, cell.lr]
    if cell.arm == "adamw" and cell.lr == 0.1:
        return outcome(3.0 + cell.seed / 8, collapsed_at=200)
    return outcome(None) if loss is None else outcome(loss + cell.seed / 8)


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study()


@pytest.fixture(scope="module")
def runs(study) -> list[Run]:
    return train(study, loss_of)


def draw(study: Study, runs: Sequence[Run]) -> list[Drawing]:
    return views.figures.draw(find(study, runs))


def told(study: Study, runs: Sequence[Run]) -> str:
    return "\n".join(views.sentences(find(study, runs)))


def read(study: Study, runs: Sequence[Run], title: str) -> dict[tuple[str, str], dict[str, str]]:
    """A table by way of its Markdown: its first two columns → column → text."""
    table = tables(find(study, runs))[title]
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown(table).splitlines()]
    names, rule, *rows = ([text.strip().replace(r"\|", "|") for text in line] for line in lines)
    assert set(rule) == {"---"}
    assert all(len(row) == len(names) for row in rows)
    return {(row[0], row[1]): dict(zip(names, row, strict=True)) for row in rows}


def test_results_table_has_losses_by_seed_paired_differences_and_verdicts(study, runs):
    rows = read(study, runs, RESULTS)
    assert len(rows) == 6
    losses = "validation loss by seed (0, 1, 2)"
    difference = "paired difference to adamw (95% interval)"
    assert rows["adamw", "0.1"][losses] == "3.000 / 3.125 / 3.250"
    assert rows["adamw", "0.1"]["stable"] == "0 of 3"
    assert rows["adamw", "0.1"][difference] == ""
    assert rows["msign", "0.1"][losses] == "2.062 / 2.188 / 2.312"
    assert rows["msign", "0.1"]["mean"] == "2.188"
    assert rows["msign", "0.1"][difference] == "-0.938"
    assert rows["msign", "0.1"]["verdict"] == "–", "the baseline is not stable there"
    assert rows["msign", "0.1"]["better than adamw"] == "3 of 3"
    assert rows["msign", "0.01"][difference] == "+0.125 (+0.125 … +0.125)"
    assert (rows["msign", "0.01"]["verdict"], rows["muon", "0.01"]["verdict"]) == ("higher", "lower")
    assert rows["msign", "0.01"]["better than adamw"] == "0 of 3"
    assert rows["muon", "0.1"][losses] == "diverged / diverged / diverged"
    assert {rows["muon", "0.1"][name] for name in ("mean", difference, "verdict", "stable rank at the end")} == {"–"}
    assert rows["muon", "0.1"]["better than adamw"] == "0 of 3"


def test_a_mean_is_not_given_where_a_seed_diverged(study):
    def one_diverges(cell):
        return outcome(None) if (cell.arm, cell.seed) == ("msign", 1) else outcome(2.0 + cell.lr)

    runs = train(study, one_diverges)
    found = find(study, runs)
    by_place = {(r.group.arm, r.lr): r for r in found.results.itertuples()}
    assert math.isnan(by_place["msign", 0.01].mean)
    assert math.isnan(by_place["msign", 0.01].stable_rank)
    assert by_place["adamw", 0.01].mean == pytest.approx(2.01)
    assert {group.arm for group in best(found.results)["group"]} == {"adamw", "muon"}
    row = read(study, runs, RESULTS)["msign", "0.01"]
    assert (row["paired difference to adamw (95% interval)"], row["verdict"], row["stable"]) == ("–", "–", "2 of 3")


def test_best_is_at_each_arms_own_learning_rate(study, runs):
    found = find(study, runs)
    assert [(b.group.arm, b.lr, b.mean) for b in best(found.results).itertuples()] == [
        ("muon", 0.01, 1.625),
        ("adamw", 0.01, 2.125),
        ("msign", 0.1, 2.1875),
    ]
    rows = read(study, runs, BEST)
    assert [arm for arm, _ in rows] == ["muon", "adamw", "msign"]
    difference = "difference to adamw by seed (95% interval)"
    assert rows["msign", "0.1"][difference] == "+0.062 / +0.062 / +0.062 (+0.062 … +0.062)"
    assert rows["muon", "0.01"][difference] == "-0.500 / -0.500 / -0.500 (-0.500 … -0.500)"
    assert rows["adamw", "0.01"][difference] == ""
    lost = [run._replace(stable=run.stable and run.cell.arm != "msign") for run in runs]
    assert read(study, lost, BEST)["msign", "0.1"][difference] == "+0.062 / +0.062 / +0.062"


def test_boundaries_are_told_with_their_verdicts(study, runs):
    rows = read(study, runs, BOUNDARIES)
    verdicts = {place: row["against adamw"] for place, row in rows.items()}
    assert verdicts == {("adamw", "0.0316"): "–", ("msign", "≥ 0.1"): "undecided", ("muon", "0.0316"): "undecided"}


def test_a_table_tells_when_runs_collapsed_at_each_learning_rate(study):
    collapses = {0: 120, 1: 200, 2: 160}

    def collapse(cell):
        is_dead = (cell.arm, cell.lr) == ("msign", 0.1) or (cell.arm, cell.seed) == ("muon", 1)
        return outcome(3.0 if is_dead else 2.0, collapsed_at=collapses[cell.seed] if is_dead else None)

    rows = read(study, train(study, collapse), COLLAPSES)
    assert len(rows) == 6
    told = {place: [row["collapsed"], row["median step"], row["first … last"]] for place, row in rows.items()}
    assert told["msign", "0.1"] == ["3 of 3", "160", "120 … 200"]
    assert told["muon", "0.01"] == ["1 of 3", "200", "200 … 200"]
    assert told["msign", "0.01"] == told["adamw", "0.1"] == ["0 of 3", "–", "–"]
    assert COLLAPSES not in tables(find(study, train(study, lambda cell: outcome(2.0))))


def test_survival_has_a_panel_for_each_learning_rate_at_which_runs_collapsed(study, runs):
    """AdamW and Muon die at the high rate, and nobody at the low one."""
    (figure,) = (drawing.figure for drawing in draw(study, runs) if drawing.name == "survival")
    assert [ax.get_title() for ax in figure.axes] == ["learning rate 0.1"]
    ends = [line.get_ydata()[-1] for line in figure.axes[0].get_lines()]
    assert ends == [0, 1, 0]


def test_groups_are_told_apart_in_figures():
    """By colour; where there are many, each in a panel of its own, beside the baseline's."""
    factors = {"lr": (0.01, 0.1), "period": (10, 50)}
    for arms, count in (
        (("adamw", "msign", "cap", "muon"), 1),
        (("adamw", "msign", "cap", "msign_mlp", "cap_muon"), 8),
    ):
        study = make_study(arms, factors=factors, seeds=(0, 1))
        runs = train(study, lambda cell: outcome(2.0 + cell.lr))
        (figure,) = (drawing.figure for drawing in draw(study, runs) if drawing.name == "loss")
        assert len(figure.axes) == count
        for ax in figure.axes:
            groups = [line for line in ax.get_lines() if line.get_linestyle() != "None"]
            assert len({line.get_color() for line in groups}) == len(groups) == (6 if count == 1 else 2)


def test_sentences_tell_counts_and_what_verdicts_are_worth(study, runs):
    text = told(study, runs)
    assert "Runs of 300 steps: 18, 12 of them stable, 3 unstable, 3 diverged. Seeds: 0, 1, 2." in text
    assert "If no arm differs from adamw, any of the 4 verdicts together" in text
    assert "with a probability of at most 5%" in text


def test_what_lacks_a_seed_is_not_ranked(study):
    runs = train(study, lambda cell: outcome(1.0 if cell.arm == "msign" else 2.0 + cell.seed))
    half = [run for run in runs if run.cell.arm != "msign" or run.cell.seed == 0]
    assert [arm for arm, _ in read(study, runs, BEST)] == ["msign", "adamw", "muon"]
    assert [arm for arm, _ in read(study, half, BEST)] == ["adamw", "muon"]
    assert "Not ranked, since a seed has no finite result: msign." in told(study, half)


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_fewer_than_three_seeds_give_no_verdict(seeds):
    study = make_study(seeds=seeds)
    runs = train(study, loss_of)
    found = find(study, runs)
    assert {*found.results["verdict"], *found.boundaries["verdict"]} == {None}
    assert "There are no verdicts: they need at least 3 seeds." in told(study, runs)
    row = read(study, runs, BOUNDARIES)["adamw", "0.0316"]
    assert row["probability that it holds LR_max"] == ("0.5" if len(seeds) == 2 else "one seed's bracket")


def test_a_bisection_compares_no_losses(tmp_path):
    """Its learning rates are where training is about to fail."""
    study = make_study(("adamw", "msign"), Bisect(1e-3, 1.0))
    runs = bisect(study, lambda c: (0.2 if c.arm == "msign" else 0.01) * (1 + c.seed / 5))
    found = find(study, runs)
    assert {*found.results["verdict"]} == {None}
    assert found.results["p"].isna().all()
    assert found.boundaries["verdict"].tolist() == [None, "higher"]
    assert found.boundaries["lr_sensitivity"].isna().all()
    report(study, runs, tmp_path)
    assert "Each arm at its best" not in (tmp_path / "report" / "report.md").read_text()


def test_baseline_with_factors_is_compared_factor_by_factor():
    study = make_study(("adamw", "msign"), factors={"lr": (0.01, 0.1), "data.batch_size": (4, 8)})
    runs = train(study, lambda c: outcome(2.0 + dict(c.factors)["data.batch_size"] / 32 - (c.arm == "msign") / 8))
    rows = read(study, runs, RESULTS)
    for size in (4, 8):
        row = rows[f"msign (data.batch_size={size})", "0.1"]
        assert row["mean"] == f"{2 + size / 32 - 1 / 8:.3f}"
        assert row["paired difference to adamw (95% interval)"] == "-0.125 (-0.125 … -0.125)"
        assert row["better than adamw"] == "3 of 3"
        assert read(study, runs, BOUNDARIES)[f"msign (data.batch_size={size})", "≥ 0.1"]["against adamw"] == "undecided"


@pytest.mark.parametrize("noise, is_told", [(1.0, True), (1.5, False)])
def test_throughput_gives_back_the_cost_of_an_application_unless_the_fit_is_bad(noise, is_told):
    study = make_study(("adamw", "msign"), factors={"lr": (0.01,), "period": (5, 20, 100)})

    def costs_four_steps(cell):
        period = dict(cell.factors).get("period", math.inf)
        assert isinstance(period, (int, float))
        return outcome(2.0, rate=250 / (1 + 4 / period) * (noise if cell.seed else 1 / noise))

    runs = train(study, costs_four_steps)
    found = overheads(find(study, runs).table)
    assert len(found) == is_told
    for group, fit in found.items():
        assert group.label == "msign"
        assert (fit.limit, fit.ratio) == (pytest.approx(250), pytest.approx(4))
    assert ("msign: one application takes as long as 4.00 steps" in told(study, runs)) == is_told


def records(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))


def test_csv_parses_back_to_every_digit(study, runs, tmp_path):
    files = {file.name: file for file in report(study, runs, tmp_path)}
    by_key = {row["key"]: row for row in records(files["runs.csv"])}
    assert len(by_key) == len(runs)
    for run in runs:
        row = by_key[run.cell.key]
        assert (row["arm"], float(row["lr"]), int(row["seed"])) == (run.cell.arm, run.cell.lr, run.cell.seed)
        assert row["val_loss"] == ("" if run.outcome.val_loss is None else repr(run.outcome.val_loss))
        assert row["diverged_at"] == ("" if run.outcome.diverged_at is None else str(run.outcome.diverged_at))
        assert row["stable"] == str(run.stable)
    found = find(study, runs)
    for row, result in zip(records(files["results.csv"]), found.results.to_dict("records"), strict=True):
        assert (row["arm"], float(row["lr"])) == (result["group"].arm, result["lr"])
        for name, value in result.items():
            if isinstance(value, float):
                assert row[name] == ("" if math.isnan(value) else repr(value))
        assert row["verdict"] == (result["verdict"] or "")
    for row, boundary in zip(records(files["frontier.csv"]), found.boundaries.itertuples(), strict=True):
        assert row["arm"] == boundary.group.arm
        assert (float(row["lr_max"]), float(row["high"])) == (boundary.lr_max, boundary.high)


class Page(HTMLParser):
    """The tags of a page with their attributes, its tables as text, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.rows[-1][-1] += data


def test_page_needs_nothing_else_and_escapes(tmp_path):
    arms = ("adamw", "<script>alert('x')</script>|")
    study = make_study(arms, variants={arms[1]: Variant("msign", {"period": 20})})
    runs = train(study, lambda cell: outcome(2.0 + cell.lr))[:-1]
    (page_file, *_) = report(study, runs, tmp_path)
    text = page_file.read_text()
    page = Page(text)
    assert not page.open
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
    assert not re.search(r"https?://", text)
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(draw(study, runs))
    assert all(source and source.startswith("data:image/svg+xml;base64,") for source in images)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    for table in tables(find(study, runs)).values():
        texts = table.to_numpy().tolist()
        assert texts == [row for row in page.rows if row in texts]
    settings = yaml.safe_load(html.unescape(re.search(r"<pre>(.*)</pre>", text, re.DOTALL).group(1)))
    assert settings == study.fingerprint()
    (absent,) = missing(find(study, runs))
    assert absent.endswith("lr=0.1 seed=2")
    assert f"<li>{html.escape(absent, quote=False).replace(chr(39), '&#39;')}</li>" in text
    for fact in ("Seeds: 0, 1, 2", "Runs of 300 steps: 11", "commit ", "torch 2", "optuna 5"):
        assert fact in text


def test_markdown_names_every_figure_that_is_there(study, runs, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "frontier_map.png").touch()  # of an earlier report
    (tmp_path / "report" / "thesis.tex").write_text("the user's")
    files = report(study, runs, tmp_path)
    assert set((tmp_path / "report").iterdir()) == {*files, tmp_path / "report" / "thesis.tex"}
    text = (tmp_path / "report" / "report.md").read_text()
    named = set(re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text))
    assert named == {file.name for file in files if file.suffix == ".png"} == {f"{name}.png" for name in FIGURES}
    assert all(file.stat().st_size > 5000 for file in files if file.suffix == ".png")
    for sentence in views.sentences(find(study, runs)):
        assert f"- {sentence}\n" in text


def names(study: Study, runs: Sequence[Run]) -> set[str]:
    return {drawing.name for drawing in draw(study, runs)}


def test_bisection_over_period_and_targets_has_a_map(tmp_path):
    factors = {"period": (10, 50), "targets": ("all_2d", ("*attn*", "*mlp*"))}
    study = make_study(("adamw", "msign"), Bisect(1e-3, 1.0), factors=factors, seeds=(0, 1, 2))
    runs = bisect(study, lambda c: 0.2 / (1 + c.seed) if c.arm == "msign" else 0.01)
    assert names(study, runs) == {"frontier", "frontier_map"}
    assert names(study, [r for r in runs if dict(r.cell.factors).get("period") != 50]) == {"frontier"}
    assert missing(find(study, [r for r in runs if r.cell.arm != "adamw"])) == ["adamw"]


def test_a_factor_may_be_called_as_a_column_is():
    study = replace(make_study(("adamw", "msign")), program="my:objective", factors={"lr": (0.01, 0.1), "low": (1, 2)})
    runs = train(study, lambda cell: outcome(2.0 if cell.lr < 0.1 else None))
    assert "frontier" in names(study, runs)


def test_a_mean_is_not_given_where_a_seed_is_missing(study, runs):
    some = find(study, [run for run in runs if run.cell.seed or run.cell.arm != "muon"]).results
    assert some["mean"].isna().tolist() == [group.arm == "muon" for group in some["group"]]


def test_search_has_no_frontier(tmp_path):
    study = make_study(("adamw", "msign"), Tpe(1e-3, 1.0))
    runs = [Run(g.cell(lr, 0), outcome(2.0 + lr), True) for g in study.groups for lr in (0.01, 0.02 + len(g.arm) / 99)]
    assert names(study, runs) == {"loss"}
    assert [row["arm"] for row in read(study, runs, "The lowest of 4 runs").values()] == ["adamw", "msign"] * 2
    assert {file.name for file in report(study, runs, tmp_path)} == {
        "report.html",
        "report.md",
        "runs.csv",
        "results.csv",
        "loss.png",
    }


@pytest.mark.parametrize(
    ("changes", "outcome_of", "expected"),
    [
        ({"seeds": (0,)}, loss_of, FIGURES),
        ({}, lambda cell: outcome(None), FIGURES),
        ({}, lambda cell: outcome(2.0), {"loss", "frontier"}),
        ({}, lambda cell: outcome(4e4, collapsed_at=50), FIGURES),
        ({"factors": {"lr": (0.01,)}}, lambda cell: outcome(2.0), set()),
        ({}, lambda cell: outcome(None if cell.lr < 0.1 else 2.0)._replace(ranks=((5, 2.0),)), {*FIGURES, "curves"}),
        (
            {"factors": {"lr": (0.01, 0.1), "data.batch_size": (1, 2, 4, 8)}},
            lambda cell: outcome(2.0),
            {"loss", "frontier"},
        ),
    ],
    ids=["one seed", "all diverged", "all stable", "all exploded", "one rate", "no curve at the lowest", "many groups"],
)
def test_edge_studies_are_reported(changes, outcome_of, expected, tmp_path):
    study = make_study(**changes)
    runs = train(study, outcome_of)
    files = report(study, runs, tmp_path)
    assert {file.stem for file in files if file.suffix == ".png"} == expected
    assert all(file.stat().st_size for file in files)
    assert len(records(tmp_path / "report" / "runs.csv")) == len(runs)


def test_failed_cells_leave_holes_not_errors(study, runs, tmp_path):
    """Without the baseline at all, and without one seed of another arm."""
    left = [run for run in runs if run.cell.arm != "adamw" and (run.cell.arm, run.cell.seed) != ("muon", 1)]
    report(study, left, tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Without a result, failed or not trained yet: adamw lr=0.01 seed=0, " in text
    assert "and 5 more." in text
    assert "paired difference to msign" in text
    assert "1.500 / – / 1.750" in text


def test_nothing_to_report_is_an_error(study, tmp_path):
    with pytest.raises(StudyError, match="runs must hold at least one finished run to report study made <up>"):
        report(study, [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written_to_is_an_error(study, runs, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match=r"folder must be one that can be written to, got '.*file/study'"):
        report(study, runs, tmp_path / "file" / "study")


class Board:
    """What TensorBoard's pages get of a folder."""

    def __init__(self, folder: Path) -> None:
        multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
        multiplexer.Reload()
        self.multiplexer = multiplexer
        self._provider = MultiplexerDataProvider(multiplexer, str(folder))
        self._context = Context(TBContext(data_provider=self._provider))

    def sessions(self, sort_by: str | None = None) -> dict[str, api_pb2.SessionGroup]:
        columns = [api_pb2.ColParams(hparam=sort_by, order=api_pb2.ORDER_ASC)] if sort_by else []
        columns += [api_pb2.ColParams(metric=info.name) for info in self.experiment().metric_infos]
        request = api_pb2.ListSessionGroupsRequest(
            start_index=0, slice_size=1000, allowed_statuses=[api_pb2.STATUS_SUCCESS], col_params=columns
        )
        handler = SessionsHandler(RequestContext(), self._context, "", request)
        return {group.name: group for group in handler.run().session_groups}

    def experiment(self) -> api_pb2.Experiment:
        return ExperimentHandler(RequestContext(), self._context, "", api_pb2.GetExperimentRequest()).run()


def values(group: api_pb2.SessionGroup) -> dict[str, float]:
    return {metric.name.tag: metric.value for metric in group.metric_values}


def test_every_cell_is_one_session_with_its_scalars(tmp_path):
    """A factor that concerns one arm only, and one of several types, don't hide a cell or split a column."""
    factors = {"lr": (0.01, 0.1), "period": (10, 50), "targets": ("all_2d", ("*attn*", "*mlp*"))}
    study = make_study(("adamw", "msign"), factors={**factors, "model.config.qk_norm": (True, False)}, seeds=(1,))
    runs = train(
        study, lambda c: outcome(None if c.arm == "adamw" and c.lr == 0.1 else 2.0 + c.lr + c.seed, rate=123.0)
    )
    for run in runs:
        with SummaryWriter(tmp_path / run.cell.folder) as writer:
            writer.add_scalar("loss/smoothed", 2.5, 100)
    for _ in range(2):  # a second report replaces the first
        report(study, runs, tmp_path)
    board = Board(tmp_path)
    assert set(board.multiplexer.Runs()) == {".", *(run.cell.folder for run in runs)}
    sessions = board.sessions()
    assert len(sessions) == len(runs)
    for run in runs:
        group = sessions[run.cell.folder]
        (session,) = group.sessions
        assert session.name == run.cell.folder
        assert session.end_time_secs - session.start_time_secs == pytest.approx(9.0)
        hparams = group.hparams
        assert (hparams["arm"].string_value, hparams["lr"].number_value) == (run.cell.arm, run.cell.lr)
        assert hparams["seed"].string_value == str(run.cell.seed)
        own = dict(run.cell.factors)
        assert hparams["model.config.qk_norm"].bool_value == own["model.config.qk_norm"]
        assert hparams["period"].string_value == str(own.get("period", "–"))
        targets = own.get("targets", "–")
        assert hparams["targets"].string_value == (targets if isinstance(targets, str) else "*attn*,*mlp*")
        expected = {"outcome/stable": float(run.stable), "outcome/steps_per_second": 123.0}
        if run.outcome.val_loss is not None:
            expected |= {"outcome/val_loss": run.outcome.val_loss, "outcome/stable_rank": 4.0}
        assert values(group) == pytest.approx(expected)
        (event,) = board.multiplexer.Tensors(run.cell.folder, "loss/smoothed")
        assert (event.step, list(event.tensor_proto.float_val)) == (100, [2.5])
        assert len(board.multiplexer.Tensors(run.cell.folder, "outcome/stable")) == 1
    assert len(board.sessions("period")) == len(runs)

    columns = {info.name: info for info in board.experiment().hparam_infos}
    assert list(columns["period"].domain_discrete) == ["10", "50", "–"]
    assert columns["lr"].type == api_pb2.DATA_TYPE_FLOAT64
    assert list(columns["lr"].domain_discrete) == [0.01, 0.1]


def test_many_learning_rates_are_an_interval_that_holds_them_all(tmp_path):
    study = make_study(("adamw", "msign"), Bisect(1e-3, 1.0, runs=8), seeds=(0, 1))
    runs = bisect(study, lambda c: (0.011 if c.arm == "msign" else 0.3) * (1 + c.seed))
    report(study, runs, tmp_path)
    board = Board(tmp_path)
    (lr,) = (info for info in board.experiment().hparam_infos if info.name == "lr")
    rates = [run.cell.lr for run in runs]
    assert (lr.domain_interval.min_value, lr.domain_interval.max_value) == (min(rates), max(rates))
    assert len(board.sessions()) == len(runs)


def test_figures_are_images_of_the_root(study, runs, tmp_path):
    for _ in range(2):
        report(study, runs, tmp_path)
    board = Board(tmp_path)
    tags = board.multiplexer.GetAccumulator(".").Tags()
    assert set(tags["tensors"]) >= {f"figures/{name}" for name in FIGURES}
    for name in FIGURES:
        (event,) = board.multiplexer.Tensors(".", f"figures/{name}")
        width, height, png = event.tensor_proto.string_val[:3]
        assert png.startswith(b"\x89PNG")
        assert (int(width), int(height)) == tuple(int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
