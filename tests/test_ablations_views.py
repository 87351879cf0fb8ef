"""Views of a study: what stands in tables, sentences, page and event files; that figures are drawn of what there is."""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Callable, Sequence
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

from msign_lightning.ablations.frontier import Run, frontier, paired_differences
from msign_lightning.ablations.sentences import summarize
from msign_lightning.ablations.study import Bisect, Cell, Grid, Outcome, Sampler, Study, StudyError, Tpe, Variant
from msign_lightning.ablations.tables import (
    Table,
    best,
    best_table,
    frontier_table,
    missing,
    overheads,
    results,
    results_table,
)
from msign_lightning.ablations.views import draw, report

GRID = Grid()
STEPS = 300
FIGURES = {"loss", "frontier", "survival"}


def make_study(arms: Sequence[str] = ("adamw", "msign", "muon"), sampler: Sampler = GRID, **changes) -> Study:
    factors = {"lr": (0.01, 0.1)} if isinstance(sampler, Grid) else {}
    values = {"factors": factors, "seeds": (0, 1), **changes}
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
        tokens_per_second=rate,
        seconds=9.0,
        curve=((1, 5.5), (end, 2.0)),
    )


def train(study: Study, outcome_of: Callable[[Cell], Outcome]) -> list[Run]:
    """A run for every cell of a grid."""
    outcomes = [(cell, outcome_of(cell)) for cell in study.cells()]
    return [Run(cell, o, study.criterion.is_stable(o)) for cell, o in outcomes]


def bisect(study: Study, boundary: Callable[[Cell], float]) -> list[Run]:
    """Runs of a bisection: each group and seed has learning rates of its own."""
    assert isinstance(study.sampler, Bisect)
    runs = []
    for group in study.groups():
        for seed in study.seeds:
            low, high = math.log10(study.sampler.low), math.log10(study.sampler.high)
            for _ in range(study.sampler.runs):
                cell = group.cell(10 ** ((low + high) / 2), seed)
                stable = cell.lr < boundary(cell)
                low, high = (math.log10(cell.lr), high) if stable else (low, math.log10(cell.lr))
                runs.append(Run(cell, outcome(2.0) if stable else outcome(3.5, collapsed_at=100), stable))
    return runs


LOSSES = {  # by arm and learning rate; seed 1 ends 0.25 higher
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
        return outcome(3.0 + cell.seed / 4, collapsed_at=200)
    return outcome(None) if loss is None else outcome(loss + cell.seed / 4)


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study()


@pytest.fixture(scope="module")
def runs(study) -> list[Run]:
    return train(study, loss_of)


def read(table: Table) -> dict[tuple[str, str], dict[str, str]]:
    """A table by way of its Markdown: its first two columns → column → text."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.markdown().splitlines()]
    names, rule, *rows = ([text.strip().replace(r"\|", "|") for text in line] for line in lines)
    assert set(rule) == {"---"}
    assert all(len(row) == len(names) for row in rows)
    return {(row[0], row[1]): dict(zip(names, row, strict=True)) for row in rows}


def test_results_table_has_losses_by_seed_and_paired_differences(runs):
    rows = read(results_table(results(runs, "adamw"), "adamw"))
    assert len(rows) == 6
    (losses,) = (name for name in rows["adamw", "0.1"] if name.startswith("validation loss by seed (0, 1)"))
    difference = "paired difference to adamw (95% interval)"
    assert rows["adamw", "0.1"][losses] == "(3.000) / (3.250)"  # unstable
    assert rows["adamw", "0.1"]["stable"] == "0 of 2"
    assert rows["adamw", "0.1"][difference] == ""
    assert rows["msign", "0.1"][losses] == "2.062 / 2.312"
    assert rows["msign", "0.1"]["mean"] == "2.188"
    assert rows["msign", "0.1"][difference] == "-0.938 (-0.938 … -0.938)"
    assert rows["msign", "0.1"]["better than adamw"] == "2 of 2"
    assert rows["msign", "0.01"][difference] == "+0.125 (+0.125 … +0.125)"
    assert rows["msign", "0.01"]["better than adamw"] == "0 of 2"
    assert rows["muon", "0.1"][losses] == "diverged / diverged"
    assert {rows["muon", "0.1"][name] for name in ("mean", difference, "stable rank at the end")} == {"–"}
    assert rows["muon", "0.1"]["better than adamw"] == "0 of 2"


def test_a_mean_is_not_given_where_a_seed_diverged(study):
    def one_diverges(cell):
        return outcome(None) if (cell.arm, cell.seed) == ("msign", 1) else outcome(2.0 + cell.lr)

    runs = train(study, one_diverges)
    found = {(r.group.arm, r.lr): r for r in results(runs, "adamw")}
    assert found["msign", 0.01].mean is found["msign", 0.01].stable_rank is None
    assert found["adamw", 0.01].mean == pytest.approx(2.01)
    assert {b.group.arm for b in best(list(found.values()), Grid())} == {"adamw", "muon"}
    row = read(results_table(list(found.values()), "adamw"))["msign", "0.01"]
    assert row["paired difference to adamw (95% interval)"] == "+0.000, of 1"
    assert "undecided: msign +0.000 [diverged where the baseline did not on 1 seed]" in " ".join(
        summarize(study, runs, "adamw")
    )


def test_best_is_at_each_arms_own_learning_rate(runs):
    ranking = best(results(runs, "adamw"), Grid())
    assert [(b.group.arm, b.lr, b.mean) for b in ranking] == [
        ("muon", 0.01, 1.625),
        ("adamw", 0.01, 2.125),
        ("msign", 0.1, 2.1875),
    ]
    rows = read(best_table(ranking, "adamw"))
    assert rows["msign", "0.1"]["difference to adamw by seed"] == "+0.062 / +0.062"
    assert rows["muon", "0.01"]["difference to adamw by seed"] == "-0.500 / -0.500"


def test_sentences_say_where_msign_loses(study, runs):
    text = "\n".join(summarize(study, runs, "adamw", frontier(runs)))
    assert "12 runs of 300 steps over 2 seeds: 8 stable, 2 unstable, 2 diverged." in text
    assert "muon ends lowest, with 1.625 at 0.01; adamw is number 2, with 2.125 at 0.01." in text
    assert (
        "Without MSign, these have a lower mean than its best, msign: muon -0.562 (by seed -0.562 … -0.562), "
        "adamw -0.062 (by seed -0.062 … -0.062)." in text
    )
    assert (
        "at a learning rate of 0.01, better on every seed: muon -0.500 (-0.500 … -0.500); "
        "worse on every seed: msign +0.125 (+0.125 … +0.125)." in text
    )
    assert (
        "at a learning rate of 0.1, better on every seed: msign -0.938 (-0.938 … -0.938); unstable as adamw: muon."
        in text
    )
    assert "one of two equal arms is better on every one of 2 seeds with probability 0.5." in text
    assert "adamw is stable up to a learning rate of 0.0316; higher, with intervals apart: msign ≥ 0.1" in text
    assert "undecided: muon 0.0316" in text
    assert "with a probability of 0.5 or more" in text


def test_sentences_say_so_where_nothing_beats_msign(study):
    better = {"adamw": 2.25, "msign": 2.0, "muon": 2.5}
    text = "\n".join(summarize(study, train(study, lambda cell: outcome(better[cell.arm])), "adamw"))
    assert "Nothing without MSign has a lower mean than msign; next is adamw +0.250" in text


@pytest.mark.parametrize("sampler", [Grid(), Bisect(0.01, 0.1)])
def test_what_lacks_a_seed_is_not_ranked(study, sampler):
    runs = train(study, lambda cell: outcome(1.0 if cell.arm == "msign" else 2.0 + cell.seed))
    half = [run for run in runs if run.cell.arm != "msign" or run.cell.seed == 0]
    assert next(b.group.arm for b in best(results(runs, "adamw"), sampler)) == "msign"
    assert [b.group.arm for b in best(results(half, "adamw"), sampler)] == ["adamw", "muon"]
    assert next(b.group.arm for b in best(results(half, "adamw"), Tpe(0.01, 0.1))) == "msign"
    text = "\n".join(summarize(study, half, "adamw"))
    assert "Not compared, since a seed has no finite result: msign." in text


def test_the_best_of_several_with_msign_is_called_so():
    study = make_study(("adamw", "msign"), factors={"lr": (0.01,), "period": (5, 20)})
    text = "\n".join(summarize(study, train(study, lambda cell: outcome(2.0 + (cell.arm == "adamw"))), "adamw"))
    assert "Nothing without MSign has a lower mean than msign (period=5) (the best of 2 with it); next is adamw" in text


def test_sentences_of_one_seed_claim_no_interval():
    study = make_study(seeds=(0,))
    runs = train(study, loss_of)
    text = "\n".join(summarize(study, runs, "adamw", frontier(runs)))
    assert "One seed says nothing about others: differences have no intervals." in text
    assert "better on the only seed: muon -0.500;" in text
    assert "An interval of LR_max over one seed lies between two runs" in text
    assert read(frontier_table(frontier(runs)))["adamw", "0.0316"]["probability that it holds LR_max"] == (
        "one seed's bracket"
    )


def test_baseline_with_factors_is_compared_factor_by_factor():
    study = make_study(("adamw", "msign"), factors={"lr": (0.01, 0.1), "data.batch_size": (4, 8)})
    runs = train(study, lambda c: outcome(2.0 + dict(c.factors)["data.batch_size"] / 8 - (c.arm == "msign") / 8))
    rows = read(results_table(results(runs, "adamw"), "adamw"))
    for size in (4, 8):
        assert rows[f"msign (data.batch_size={size})", "0.1"]["mean"] == f"{2 + size / 8 - 1 / 8:.3f}"
        assert rows[f"msign (data.batch_size={size})", "0.1"]["better than adamw"] == "2 of 2"
    text = "\n".join(summarize(study, runs, "adamw", frontier(runs)))
    assert (
        "adamw (data.batch_size=4) is stable up to a learning rate of ≥ 0.1; undecided: msign (data.batch_size=4)"
        in text
    )


def test_throughput_gives_back_the_cost_of_an_application():
    study = make_study(("adamw", "msign"), factors={"lr": (0.01,), "period": (5, 20, 100)})

    def costs_four_steps(cell):
        period = dict(cell.factors).get("period", math.inf)
        assert isinstance(period, (int, float))
        return outcome(2.0, rate=25_000 / (1 + 4 / period))

    runs = train(study, costs_four_steps)
    ((group, fit),) = overheads(runs).items()
    assert group.label == "msign"
    assert (fit.limit, fit.ratio) == (pytest.approx(25_000), pytest.approx(4))
    assert "msign: one application takes as long as 4.00 steps" in "\n".join(summarize(study, runs, "adamw"))
    assert {drawing.name for drawing in draw(study, runs)} == {"loss", "throughput"}


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
        assert row["stable"] == str(run.stable)
    differences = {(d.group.arm, d.lr): d for d in paired_differences(runs, "adamw")}
    for row in records(files["results.csv"]):
        place = row["arm"], float(row["lr"])
        seeds = [run.outcome.val_loss for run in runs if (run.cell.arm, run.cell.lr) == place]
        assert [row["val_loss_0"], row["val_loss_1"]] == ["diverged" if v is None else repr(v) for v in seeds]
        difference = differences.get(place)
        if difference is not None and difference.mean is not None:
            assert float(row["difference_low"]) == difference.low
    for row, boundary in zip(records(files["frontier.csv"]), frontier(runs), strict=True):
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
    for table in (results_table(results(runs, "adamw"), "adamw"), frontier_table(frontier(runs))):
        assert [list(row) for row in table.rows] == [row for row in page.rows if row in [list(r) for r in table.rows]]
    settings = yaml.safe_load(html.unescape(re.search(r"<pre>(.*)</pre>", text, re.DOTALL).group(1)))
    assert settings == study.fingerprint()
    (absent,) = missing(study, runs)
    assert absent.endswith("lr=0.1 seed=1")
    assert f"<li>{html.escape(absent, quote=False).replace(chr(39), '&#39;')}</li>" in text
    for fact in ("2 seeds: 0, 1", "7 runs of 300 steps", "commit ", "torch 2", "optuna 5"):
        assert fact in text


def test_markdown_names_every_figure_that_is_there(study, runs, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "throughput.png").touch()  # of an earlier report
    files = report(study, runs, tmp_path)
    assert set((tmp_path / "report").iterdir()) == set(files)
    text = (tmp_path / "report" / "report.md").read_text()
    named = set(re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text))
    assert named == {file.name for file in files if file.suffix == ".png"} == {f"{name}.png" for name in FIGURES}
    assert all(file.stat().st_size > 5000 for file in files if file.suffix == ".png")
    for sentence in summarize(study, runs, "adamw", frontier(runs)):
        assert f"- {sentence}\n" in text


def names(study: Study, runs: Sequence[Run]) -> set[str]:
    return {drawing.name for drawing in draw(study, runs)}


def test_bisection_over_period_and_targets_has_a_map(tmp_path):
    factors = {"period": (10, 50), "targets": ("all_2d", ("*attn*", "*mlp*"))}
    study = make_study(("adamw", "msign"), Bisect(1e-3, 1.0), factors=factors, seeds=(0, 1, 2))
    runs = bisect(study, lambda c: 0.2 / (1 + c.seed) if c.arm == "msign" else 0.01)
    assert names(study, runs) == {"loss", "frontier", "frontier_map", "survival", "throughput"}
    text = (report(study, runs, tmp_path)[1]).read_text()
    assert "each seed's own" in text
    assert names(study, [r for r in runs if dict(r.cell.factors).get("period") != 50]) == FIGURES
    assert missing(study, [r for r in runs if r.cell.arm != "adamw"]) == ["adamw"]


def test_search_has_no_frontier(tmp_path):
    study = make_study(("adamw", "msign"), Tpe(1e-3, 1.0))
    runs = [
        Run(g.cell(lr, 0), outcome(2.0 + lr), True) for g in study.groups() for lr in (0.01, 0.02 + len(g.arm) / 99)
    ]
    assert names(study, runs) == {"loss"}
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
        ({"factors": {"lr": (0.01,)}}, lambda cell: outcome(2.0), {"loss"}),
        (
            {"factors": {"lr": (0.01, 0.1), "data.batch_size": (1, 2, 4, 8)}},
            lambda cell: outcome(2.0),
            {"loss", "frontier"},
        ),
    ],
    ids=["one seed", "all diverged", "all stable", "all exploded", "one rate", "many groups"],
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
    assert "and 3 more." in text
    assert "paired difference to msign" in text
    assert "1.500 / –" in text


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
        expected = {"outcome/stable": float(run.stable), "outcome/tokens_per_second": 123.0}
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
