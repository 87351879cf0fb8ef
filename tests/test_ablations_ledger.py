"""Storages of studies, and the cells that parents share in them, without training."""

import re
import resource
import statistics
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from msign_lightning.ablations import ledger as ledger_module
from msign_lightning.ablations import storage as storage_module
from msign_lightning.ablations.cell import Outcome
from msign_lightning.ablations.ledger import Ledger, exists
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.runner import results, run
from msign_lightning.ablations.storage import JOURNAL, StorageError, opened, reading
from msign_lightning.ablations.study import Bisect, Tpe, Variant
from tests.small_studies import DIVERGED, SMALL, assert_each_cell_once, outcome, study, train_all, trials_of
from tests.support import PATIENCE, calls_of_functions

STUDIES = {
    "grid": study(seeds=[0, 1, 2]),
    "bisect": study(factors={"period": [5]}, sampler=Bisect(1e-3, 10, resolution=0.5, runs=4)),
    "tpe": study(factors={"period": [5]}, sampler=Tpe(1e-3, 10, trials=14)),
}


@pytest.fixture(autouse=True)
def _quiet_optuna():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@contextmanager
def file_size_limit(size):
    """Files can't grow beyond: the kernel writes what fits, then refuses, as it does when a disk is full."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


class TestStorage:
    def test_a_line_that_was_not_finished_is_cut_off(self, tmp_path):
        cells = study()
        with opened(None, tmp_path) as (backend, alone):
            ledger = Ledger(cells, backend, alone=alone)
            ledger.finish(ledger.claim(), outcome())
        journal, lock = tmp_path / JOURNAL, tmp_path / f"{JOURNAL}.lock"
        whole = journal.read_bytes()
        journal.write_bytes(whole + b'{"op_code":6,"worker_id":"')
        lock.symlink_to(journal)  # as Optuna's in a process that is killed while it writes
        with opened(None, tmp_path) as (backend, alone):
            assert journal.read_bytes() == whole
            assert not lock.is_symlink()
            train_all(Ledger(cells, backend, alone=alone))
        assert len(results(cells, storage=str(journal))) == len(cells.cells)

    def test_a_damaged_end_is_not_written_on(self, tmp_path):
        with opened(None, tmp_path) as (backend, alone):
            Ledger(study(), backend, alone=alone)
        journal = tmp_path / JOURNAL
        damaged = journal.read_bytes() + b'{"op_code":6,"worker_id":"\n'
        journal.write_bytes(damaged)
        with pytest.raises(StorageError, match="damaged at its end"), opened(None, tmp_path):
            pass
        assert journal.read_bytes() == damaged

    def test_a_full_disk_loses_nothing_that_was_finished(self, tmp_path):
        cells, finished = study(), []
        with (
            file_size_limit(11_000),
            pytest.raises(StorageError, match=rf"{JOURNAL} can't be used: .*File too large"),
            opened(None, tmp_path) as (backend, alone),
        ):
            train_all(Ledger(cells, backend, alone=alone), finished)
        assert not (tmp_path / JOURNAL).read_bytes().endswith(b"\n")
        assert 2 <= len(finished) < len(cells.cells)
        with opened(None, tmp_path) as (backend, alone):
            done = trials_of(cells, backend, TrialState.COMPLETE)
            assert [trial.user_attrs["cell"] for trial in done] == finished
            train_all(Ledger(cells, backend, alone=alone))
            assert_each_cell_once(cells, backend)

    @pytest.mark.parametrize("url", [None, "sqlite:///{}/cells.db"], ids=["journal", "sqlite"])
    def test_one_process_has_a_file(self, tmp_path, url):
        url = url and url.format(tmp_path)
        with opened(url, tmp_path) as (_, alone):
            assert alone
            with pytest.raises(StorageError, match="in use by another process"), opened(url, tmp_path):
                pass
        with opened(url, tmp_path):
            pass

    @pytest.mark.parametrize(
        "url, reason",
        [
            ("postgresql+psycopg://me:secret@127.0.0.1:1/x", r"//me:\*\*\*@127.0.0.1:1/x .*Connection refused"),
            ("mysql+mysqldb://me:secret@localhost/x", "No module named 'MySQLdb'"),
            ("nosuch://me:secret@localhost/x", "nosuch"),
            ("postgresql://me:secret@localhost:port/x", "must be the path of a journal or the URL of a database"),
            ("sqlite:////dev/null/cells.db", r"cells.db can't be used: .*/dev/null"),
            ("/dev/null/journal.log", r"journal.log can't be used: .*/dev/null"),
            ("{text}", "no journal of Optuna"),
            ("{folder}", "Is a directory"),
        ],
    )
    def test_what_can_not_be_used_is_refused(self, tmp_path, url, reason):
        text = tmp_path / "study.yaml"
        text.write_text("program: tiny/prose\nsteps: 20")
        with (
            pytest.raises(StorageError, match=reason) as error,
            opened(url.format(text=text, folder=tmp_path), tmp_path / "folder"),
        ):
            pass
        assert "secret" not in str(error.value)
        assert text.read_text().endswith("steps: 20")

    @pytest.mark.parametrize("text", ["[1]\n", "5\n", '{"op_code": 99, "worker_id": "a"}\n'])
    def test_reading_what_is_no_journal(self, tmp_path, text):
        (tmp_path / JOURNAL).write_text(text)
        with pytest.raises(StorageError, match="is no journal of Optuna, or is damaged"), reading(None, tmp_path):
            pass

    def test_a_folder_that_can_not_be_made(self):
        with pytest.raises(StorageError, match="folder /dev/null/tiny must be one that can be written to: Not a dir"):
            run(study(), folder=Path("/dev/null"))

    def test_a_study_that_has_not_been_started(self, tmp_path):
        with pytest.raises(StorageError, match="nothing has been run"):
            results(study(), folder=tmp_path)
        assert not (tmp_path / "tiny").exists()
        with opened(None, tmp_path) as (backend, alone):
            Ledger(study(), backend, alone=alone)
        with pytest.raises(StudyError, match="other has not been started here; studies in the storage: tiny"):
            results(study(name="other"), storage=str(tmp_path / JOURNAL))


class TestLedger:
    def test_a_study_that_changed_after_its_start_is_refused(self, tmp_path):
        changed = study(steps=40, seeds=[0, 1, 2])
        with opened(None, tmp_path) as (backend, alone):
            assert not exists(changed, backend)
            Ledger(study(), backend, alone=alone)
            assert exists(study(), backend)
            for refused in (lambda: exists(changed, backend), lambda: Ledger(changed, backend, alone=alone)):
                with pytest.raises(StudyError, match="for arms, factors and seeds: steps: 20 → 40; run what"):
                    refused()

    def test_what_a_trial_holds(self, tmp_path):
        cells = study(factors={"lr": [0.003, 0.03], "model.optimizer.betas": [(0.9, 0.95), (0.9, 0.999)]})
        with opened(None, tmp_path) as (backend, alone):
            ledger = Ledger(cells, backend, alone=alone)
            first, second = ledger.claim(), ledger.claim()
            assert [first.cell, second.cell] == list(cells.cells.values())[:2]
            assert not any(ledger.progress(first, step, 5.0 - step / 20) for step in (10, 20, 10))
            ledger.finish(first, outcome())
            ledger.finish(second, DIVERGED)
            stable, diverged = trials_of(cells, backend, TrialState.COMPLETE)
            assert optuna.load_study(study_name=cells.name, storage=backend).metric_names == ["loss/val"]
        assert stable.params == {"lr": 0.003, "seed": 0}
        assert (stable.user_attrs["arm"], stable.user_attrs["model.optimizer.betas"]) == ("adamw", "0.9,0.95")
        assert stable.intermediate_values == {10: 4.5, 20: 4.0}
        assert {name: stable.user_attrs[name] for name in Outcome._fields} == outcome().as_dict()
        assert (stable.value, stable.constraints) == (2.0, {"unstable": -1.0})
        assert (diverged.value, diverged.constraints) == (10.0, {"unstable": 1.0})
        runs = results(cells, storage=str(tmp_path / JOURNAL))
        assert [(run.cell, run.outcome, run.stable) for run in runs] == [
            (first.cell, outcome(), True),
            (second.cell, DIVERGED, False),
        ]

    def test_a_trial_of_its_own_that_it_does_not_know_of_is_not_waited_for(self, tmp_path):
        with opened(None, tmp_path) as (backend, _):
            ledger = Ledger(study(), backend, alone=False)
            known = ledger.claim().trial
            (made_twice,) = trials_of(study(), backend)
            backend.create_new_trial(known.study._study_id, made_twice)
            ledger.keep_up()
            assert [trial.state for trial in trials_of(study(), backend)] == [TrialState.RUNNING, TrialState.FAIL]

    def test_an_outcome_that_was_written_down_is_kept_if_its_parent_dies_before_the_trials_end(self, tmp_path):
        cells, trained = study(factors={}, sampler=Bisect(1e-3, 1, runs=1), seeds=[0]), []
        with opened(None, tmp_path) as (backend, alone):
            first = Ledger(cells, backend, alone=alone)
            claim = first.claim()
            for name, value in DIVERGED.as_dict().items():
                claim.trial.set_user_attr(name, value)
            claim.trial.set_constraint("unstable", 1.0)
        with opened(None, tmp_path) as (backend, alone):
            train_all(Ledger(cells, backend, alone=alone), trained)
            assert_each_cell_once(cells, backend)
        assert claim.cell.key not in trained
        assert next((run.cell, run.outcome) for run in results(cells, storage=str(tmp_path / JOURNAL))) == (
            claim.cell,
            DIVERGED,
        )

    def test_an_outcome_in_one_attribute_of_an_earlier_version_is_read(self, tmp_path):
        with opened(None, tmp_path) as (backend, alone):
            claim = Ledger(cells := study(), backend, alone=alone).claim()
            claim.trial.set_user_attr("outcome", outcome().as_dict())
            optuna.load_study(study_name=cells.name, storage=backend).tell(claim.trial, 2.0)
        assert [run.outcome for run in results(cells, storage=str(tmp_path / JOURNAL))] == [outcome()]

    def test_a_loss_that_was_never_finite_has_a_finite_value(self, tmp_path):
        with opened(None, tmp_path) as (backend, alone):
            ledger = Ledger(study(), backend, alone=alone)
            ledger.finish(ledger.claim(), DIVERGED._replace(initial_loss=float("inf")))
            (trial,) = trials_of(study(), backend, TrialState.COMPLETE)
        assert trial.value > 1e300

    def test_pruning(self, tmp_path):
        cells = study(factors={}, sampler=Tpe(1e-3, 1, trials=7), prune=True)
        with opened(None, tmp_path) as (backend, alone):
            ledger = Ledger(cells, backend, alone=alone)
            for loss in range(7):
                claim = ledger.claim()
                pruned = ledger.progress(claim, 10, float(loss))
                assert pruned == (loss > 4)  # worse than the median, after the pruner's five first trials
                ledger.finish(claim, None if pruned else outcome())
            assert ledger.claim() is None
            assert ledger.done == 7
            states = [trial.state for trial in trials_of(cells, backend)]
        assert states == [TrialState.COMPLETE] * 5 + [TrialState.PRUNED] * 2
        assert len(results(cells, storage=str(tmp_path / JOURNAL))) == 5

    @pytest.mark.parametrize("kind", STUDIES)
    def test_cells_that_are_given_up_or_left_behind_are_for_the_next_parent(self, tmp_path, kind):
        cells = STUDIES[kind]
        with opened(None, tmp_path) as (backend, alone):
            ledger = Ledger(cells, backend, alone=alone)
            given_up = ledger.claim()
            ledger.give_up(given_up, "Traceback")
            finished = []
            train_all(ledger, finished)
            assert finished
            assert given_up.cell.key not in finished
            assert ledger.failed == [given_up.cell.label]
            ledger.release()
        with opened(None, tmp_path) as (backend, alone):
            killed = Ledger(cells, backend, alone=alone)
            killed.keep_up()
            left = killed.claim()
            train_all(Ledger(cells, backend, alone=alone))
            done = trials_of(cells, backend, TrialState.COMPLETE)
            assert left.trial.number not in {trial.number for trial in done}
            assert_each_cell_once(cells, backend)

    def test_a_bisection_goes_on_beside_a_cell_that_is_given_up(self, tmp_path):
        cells, finished = study(arms=["adamw"], factors={}, sampler=STUDIES["bisect"].sampler, seeds=[0]), []
        with opened(None, tmp_path) as (backend, alone):
            ledger = Ledger(cells, backend, alone=alone)
            given_up = ledger.claim()
            ledger.give_up(given_up, "Traceback")
            train_all(ledger, finished)
        assert 1 <= len(finished) <= 3
        assert given_up.cell.key not in finished

    def test_the_runs_of_a_bisection_do_not_depend_on_how_many_are_trained_at_once(self, tmp_path):
        def trained(at_once):
            claims, keys = [], set()
            with opened(None, tmp_path / str(at_once)) as (backend, alone):
                ledger = Ledger(STUDIES["bisect"], backend, alone=alone)
                while True:
                    while len(claims) < at_once and (claim := ledger.claim()) is not None:
                        claims.append(claim)
                    if not claims:
                        return keys
                    claim = claims.pop(0)
                    ledger.finish(claim, outcome() if claim.cell.lr < 0.5 else DIVERGED)
                    keys.add(claim.cell.key)

        assert trained(1) == trained(3) == trained(9)

    @pytest.mark.parametrize("kind", STUDIES)
    def test_parents_share_a_database_without_doubles(self, tmp_path, database, kind):
        cells = STUDIES[kind]
        start = threading.Barrier(3, timeout=PATIENCE)
        finished = [[], [], []]

        def parent(mine):
            start.wait()  # all make the tables, the study and its cells at once
            with opened(database, tmp_path) as (backend, alone):
                assert not alone
                ledger = Ledger(cells, backend, alone=alone)
                first = ledger.claim()
                start.wait()  # each has one before the others take them all
                ledger.finish(first, outcome())
                mine.append(first.cell.key)
                train_all(ledger, mine)

        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(parent, mine) for mine in finished]:
                done.result()
        with reading(database, tmp_path) as backend:
            assert_each_cell_once(cells, backend)
            assert not trials_of(cells, backend, TrialState.RUNNING, TrialState.WAITING)
            done = [trial.user_attrs["cell"] for trial in trials_of(cells, backend, TrialState.COMPLETE)]
        assert Counter(done) == Counter(key for mine in finished for key in mine)

    def test_a_parent_that_was_held_up_itself_gives_others_time(self, tmp_path, monkeypatch):
        now = 0.0
        monkeypatch.setattr(ledger_module, "time", SimpleNamespace(monotonic=lambda: now))
        with opened(None, tmp_path) as (backend, _):
            other, ours = (Ledger(study(), backend, alone=False) for _ in range(2))
            other.claim()
            for ledger in (other, ours):
                ledger.keep_up()
            for now in (100.0, 115.0, 130.0, 145.0):  # noqa: B007 (the clock)
                ours.keep_up()
            assert not trials_of(study(), backend, TrialState.FAIL)
            now = 160.0
            ours.keep_up()
            assert len(trials_of(study(), backend, TrialState.FAIL)) == 1

    def test_only_dead_parents_lose_their_cells(self, tmp_path, database, monkeypatch):
        monkeypatch.setattr(ledger_module, "BEAT", 0.0)
        monkeypatch.setattr(ledger_module, "GRACE", 0.5)
        cells = study()
        with opened(database, tmp_path) as (ours, _), opened(database, tmp_path) as (theirs, _):
            living, dead, other = (Ledger(cells, backend, alone=False) for backend in (ours, ours, theirs))
            living.keep_up()
            dead.keep_up()
            kept, lost = living.claim(), dead.claim()
            while not trials_of(cells, ours, TrialState.FAIL):
                living.keep_up()
                other.keep_up()
            assert [trial.number for trial in trials_of(cells, ours, TrialState.FAIL)] == [lost.trial.number]
            living.finish(kept, outcome())
            assert dead.progress(lost, 10, 3.0)  # it was not dead but slow; what it has does not count any more
            dead.finish(lost, outcome(3.0))
            train_all(other)
            assert_each_cell_once(cells, ours)
        assert {run.outcome.val_loss for run in results(cells, storage=database)} == {2.0}


class TestGrowth:
    def test_arms_factors_rates_and_seeds_come_and_go_and_what_is_finished_is_kept(self, tmp_path):
        first = study()
        grown = study(
            arms=["zclip", "msign", "adamw", "wide"],
            factors={"period": [10, 5], "lr": [0.03, 0.003, 0.1]},
            seeds=[2, 1, 0],
            variants={"wide": Variant("msign", {"data.batch_size": 8})},
        )
        smaller = study(arms=["msign"], seeds=[1])
        trained = {}
        for name, cells in (("first", first), ("grown", grown), ("smaller", smaller)):
            trained[name] = []
            with opened(None, tmp_path) as (backend, alone):
                ledger = Ledger(cells, backend, alone=alone)
                train_all(ledger, trained[name])
                assert ledger.done == ledger.total == len(cells.cells)
            found = {run.cell.key for run in results(cells, storage=str(tmp_path / JOURNAL))}
            assert found == set(cells.cells)
        assert trained["first"] == list(first.cells)
        assert trained["grown"] == [key for key in grown.cells if key not in first.cells]
        assert set(first.cells) - set(grown.cells) == set()
        assert trained["smaller"] == []

    def test_a_bisection_takes_more_runs_seeds_and_arms(self, tmp_path):
        few = study(arms=["adamw"], factors={}, sampler=Bisect(1e-3, 10, resolution=0.2, runs=2), seeds=[0])
        more = study(
            arms=["msign", "adamw"], factors={}, sampler=Bisect(1e-3, 10, resolution=0.2, runs=5), seeds=[1, 0]
        )
        with opened(None, tmp_path) as (backend, alone):
            train_all(Ledger(few, backend, alone=alone))
            train_all(Ledger(more, backend, alone=alone))
            assert_each_cell_once(more, backend)
            assert set(results(few, storage=str(tmp_path / JOURNAL))) < set(
                results(more, storage=str(tmp_path / JOURNAL))
            )

    def test_a_trial_that_waits_for_other_tools_holds_nothing_up(self, tmp_path):
        with opened(None, tmp_path) as (backend, alone):
            ledger = Ledger(study(), backend, alone=alone)
            optuna.load_study(study_name="tiny", storage=backend).enqueue_trial({"lr": 0.5})
            train_all(ledger)
            assert_each_cell_once(study(), backend)
            train_all(Ledger(study(), backend, alone=alone))

    @pytest.mark.parametrize(
        "changed, message",
        [
            ({"settings": {**SMALL, "data.batch_size": 8}}, "settings.data.batch_size: nothing → 8"),
            ({"variants": {"mine": Variant("msign", {"period": 4})}}, "variants.mine.settings.period: 5 → 4"),
            (
                {"variants": {"mine": Variant("msign", {"period": 5, "model.config.width": 8})}},
                "variants.mine.settings.model.config.width: nothing → 8",
            ),
            ({"metric": "loss/test"}, 'metric: "loss/val" → "loss/test"'),
        ],
    )
    def test_what_cells_mean_must_not_change(self, tmp_path, changed, message):
        variants = {"mine": Variant("msign", {"period": 5})}
        with opened(None, tmp_path) as (backend, alone):
            Ledger(study(arms=["mine"], factors={"lr": [0.1]}, variants=variants), backend, alone=alone)
            other = study(**{"arms": ["mine"], "factors": {"lr": [0.1]}, "variants": variants, **changed})
            with pytest.raises(StudyError, match=re.escape(message)):
                Ledger(other, backend, alone=alone)

    def test_what_a_variant_means_is_kept_while_it_is_left_out(self, tmp_path):
        def having(**variants):
            return study(arms=["adamw", *variants], factors={"lr": [0.1]}, variants=variants)

        five, four = Variant("msign", {"period": 5}), Variant("msign", {"period": 4})
        with opened(None, tmp_path) as (backend, alone):
            for cells in (having(mine=five), having(), having(other=four), having(mine=five)):
                Ledger(cells, backend, alone=alone)
            with pytest.raises(StudyError, match=r"variants\.mine\.settings\.period: 5 → 4"):
                Ledger(having(mine=four), backend, alone=alone)

    def test_a_search_is_not_finished_while_another_parent_has_left_a_run(self, tmp_path):
        search = study(factors={}, arms=["adamw"], sampler=Tpe(1e-3, 10, trials=2))
        with opened(None, tmp_path) as (backend, _):
            one, other = (Ledger(search, backend, alone=False) for _ in range(2))
            one.finish(one.claim(), outcome())
            one.claim()
            assert other.claim() is None
            one.release()
            assert not other.is_finished()
            train_all(other)
            assert_each_cell_once(search, backend)


def test_a_server_that_stays_away(tmp_path, server, database, monkeypatch):
    monkeypatch.setattr(storage_module, "PATIENCE", 0.5)
    _, control = server

    def interrupt():
        raise KeyboardInterrupt

    def claim_without_it(check):
        with opened(database, tmp_path, check) as (backend, alone):
            ledger = Ledger(study(), backend, alone=alone)
            control("-m", "fast", "stop")
            try:
                ledger.claim()
            finally:
                control("start")

    with pytest.raises(StorageError, match=r"storage .* does not answer; what is finished is kept: run the command ag"):
        claim_without_it(lambda: None)
    with pytest.raises(KeyboardInterrupt):
        claim_without_it(interrupt)


def test_a_trial_whose_making_was_not_answered_is_not_waited_for(tmp_path, database, monkeypatch):
    lost = [OperationalError("COMMIT", None, ConnectionError(), connection_invalidated=True)]

    def make(self, *arguments):
        number = RDBStorage.create_new_trial(self, *arguments)
        if lost:
            raise StorageInternalError from lost.pop()
        return number

    monkeypatch.setattr(storage_module._Server, "create_new_trial", storage_module._patient(make))
    with opened(database, tmp_path) as (backend, alone):
        ledger = Ledger(cells := study(), backend, alone=alone)
        claim = ledger.claim()
        made = trials_of(cells, backend)
        assert [trial.state for trial in made] == [TrialState.RUNNING, TrialState.FAIL, TrialState.RUNNING]
        ledger.keep_up()
        assert [trial.number for trial in trials_of(cells, backend, TrialState.RUNNING)] == [claim.trial.number]
        ledger.finish(claim, outcome())
        train_all(ledger)
        assert_each_cell_once(cells, backend)


def test_the_work_for_a_cell_does_not_grow_with_their_number(tmp_path):
    """What the ledger does for a cell, in a journal: Optuna's list of trials is copied a few times, and that is all."""
    cells = study(factors={"lr": [0.001 * i for i in range(1, 76)]}, arms=["adamw"], seeds=list(range(8)))
    spent = []
    with opened(None, tmp_path) as (backend, alone):
        ledger = Ledger(cells, backend, alone=alone)

        def cell():
            ledger.finish(ledger.claim(), outcome())

        while ledger.done < ledger.total:
            spent.append(calls_of_functions(cell))
        assert ledger.claim() is None
    assert len(spent) == 600
    assert statistics.median(spent[-100:]) - statistics.median(spent[:100]) < 5 * 500
