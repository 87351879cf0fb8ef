"""The runner of studies: storages, cells shared by parents, and real processes that are killed."""

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import optuna
import psycopg
import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from msign_lightning.ablations import ledger as ledger_module
from msign_lightning.ablations import storage as storage_module
from msign_lightning.ablations.cell import Outcome
from msign_lightning.ablations.launch import Crashed, Finished, Pool
from msign_lightning.ablations.ledger import Ledger, exists
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.runner import cores, results, run, run_alone
from msign_lightning.ablations.storage import JOURNAL, StorageError, opened, reading
from msign_lightning.ablations.study import Bisect, Grid, Study, Tpe, Variant, load
from tests.support import calls_of_functions, write_examples

ROOT = Path(__file__).parent.parent
SMALL = {
    "model.config.n_layers": 1,
    "model.config.width": 16,
    "model.config.n_heads": 2,
    "model.config.mlp_width": 32,
    "model.warmup_steps": 5,
    "trainer.limit_val_batches": 2,
}
PATIENCE = 180.0
"""Seconds that other processes have for what takes a few on a quiet machine."""


def study(**changes):
    values = {
        "name": "tiny",
        "program": "tiny/prose",
        "steps": 20,
        "arms": ["adamw", "msign"],
        "factors": {"lr": [0.003, 0.03], "period": [5]},
        "seeds": [0, 1],
        "settings": SMALL,
    }
    return Study(**{**values, **changes})


STUDIES = {
    "grid": study(seeds=[0, 1, 2]),
    "bisect": study(factors={"period": [5]}, sampler=Bisect(1e-3, 10, resolution=0.5, runs=4)),
    "tpe": study(factors={"period": [5]}, sampler=Tpe(1e-3, 10, trials=14)),
}


def outcome(val_loss=2.0, **changes):
    values = {
        "initial_loss": 5.0,
        "best_loss": 2.0,
        "final_loss": 2.0,
        "diverged_at": None,
        "collapsed_at": None,
        "spikes": 0,
        "max_grad_norm": 1.0,
        "stable_rank": 4.0,
        "steps": 20,
        "steps_per_second": 1e4,
        "seconds": 1.0,
        "curve": ((1, 5.0), (20, 2.0)),
    }
    return Outcome(**{"val_loss": val_loss, **values, **changes})


DIVERGED = outcome(None, final_loss=None, diverged_at=7, collapsed_at=7, stable_rank=None, steps=7)


def train_all(ledger, finished=None):
    """Takes cells until there is none left; "trains" them to an outcome that their learning rate decides."""
    while True:
        ledger.keep_up()
        claim = ledger.claim()
        if claim is not None:
            time.sleep(0.002)
            ledger.finish(claim, outcome() if claim.cell.lr < 0.5 else DIVERGED)
            if finished is not None:
                finished.append(claim.cell.key)
        elif ledger.is_finished():
            return
        else:
            time.sleep(0.01)


def assert_each_cell_once(study, backend):
    """That the study is done and no cell was trained to its end twice."""
    cells = [trial.user_attrs["cell"] for trial in trials_of(study, backend, TrialState.COMPLETE)]
    assert len(set(cells)) == len(cells)
    match study.sampler:
        case Grid():
            assert set(cells) == set(study.cells)
        case Tpe(trials=trials):
            assert len(cells) == trials
        case Bisect(runs=runs):
            specs = [t.user_attrs["cell_spec"] for t in trials_of(study, backend, TrialState.COMPLETE)]
            per_group = Counter((spec["arm"], spec["seed"]) for spec in specs)
            assert set(per_group) == {(arm, seed) for arm in study.arms for seed in study.seeds}
            assert max(per_group.values()) <= runs


@contextmanager
def file_size_limit(size):
    """Files can't grow beyond: the kernel writes what fits, then refuses, as it does when a disk is full."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def trials_of(study, backend, *states):
    return optuna.load_study(study_name=study.name, storage=backend).get_trials(states=states or None)


@pytest.fixture(autouse=True)
def _quiet_optuna():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="module")
def server():
    """A PostgreSQL server, Debian's package, on a folder of its own, as which root can't run it: address, control."""
    found = shutil.which("initdb") or next(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed: no initdb")
    binaries = Path(found).parent
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    as_postgres = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
        as_postgres = ["runuser", "-u", "postgres", "--"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(program, *arguments):
        # Into a file: the server keeps what it inherits open.
        with (folder.parent / f"{folder.name}.log").open("ab") as log:
            command = [*as_postgres, str(binaries / program), "-D", str(folder / "data"), *arguments]
            subprocess.run(command, cwd="/", check=True, stdout=log, stderr=log, timeout=PATIENCE)

    call("initdb", "--username=optuna", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
    start = ("-o", f"-F -p {port} -k {folder} -c listen_addresses=127.0.0.1", "start")

    def control(*arguments):
        call("pg_ctl", "-w", *(start if arguments == ("start",) else arguments))

    control("start")
    yield f"127.0.0.1:{port}", control
    control("-m", "immediate", "stop")
    shutil.rmtree(folder)
    (folder.parent / f"{folder.name}.log").unlink()


@pytest.fixture
def database(server, request):
    """URL of an empty database."""
    name = re.sub(r"\W", "_", request.node.name).lower()
    address, _ = server
    with psycopg.connect(f"postgresql://optuna@{address}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return f"postgresql+psycopg://optuna@{address}/{name}"


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


def test_a_full_disk_under_the_logs_stops_a_worker_for_good(tmp_path):
    def ask(task):
        pool.start(0, task)
        messages = []
        while pool.busy:
            messages += [message for _, message in pool.wait(1.0)]
        return messages[-1]

    with Pool(study(), tmp_path, 1, []) as pool:
        assert ask(None) == Finished(None)
        (worker,) = multiprocessing.active_children()
        resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        message = ask(next(iter(study().cells.values())))
    assert message == Crashed(f"folder {tmp_path} can't be written to: [Errno 27] File too large", StorageError)


def test_a_recipe_that_fails_at_start_leaves_nothing_behind(tmp_path):
    broken = study(settings={**SMALL, "model.config.n_heads": 3})
    with pytest.raises(StudyError, match=r"program tiny/prose fails at start: .*n_heads"):
        run(broken, folder=tmp_path, workers=1)
    with opened(None, tmp_path / "tiny") as (backend, _):
        assert not exists(study(), backend)


STUDY_FILE = """
steps: 60
arms: [adamw, msign]
factors: {lr: [3e-3, 1e-2, 3e-2], period: [5]}
seeds: [0, 1]
"""
PROGRAMS = {
    "recipe": f"program: tiny/prose\nsettings: {json.dumps(SMALL)}",
    "lightning": "program: {folder}/causal_lm_program.yaml\nmetric: val_loss\nlr: model.lr",
    "function": "program: slow:objective",
}
SLOW = """import time

import plain


def objective(settings, progress):
    return plain.objective(settings, lambda step, loss: (progress(step, loss), time.sleep(0.02)))
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory, request):
    """A study of twelve cells, each of about a second: of a recipe, unless a test asks for another kind of program."""
    folder = tmp_path_factory.mktemp("studies")
    write_examples(folder)
    (folder / "slow.py").write_text(SLOW)
    program = PROGRAMS[getattr(request, "param", "recipe")]
    (folder / "kill.yaml").write_text(STUDY_FILE + program.replace("{folder}", str(folder)))
    return folder / "kill.yaml"


STARTED = []


def start(*arguments):
    """A parent process, as at a terminal of its own, whose beats and patience with others are short."""
    script = (
        "import sys; from msign_lightning.ablations import ledger; ledger.BEAT, ledger.GRACE = 0.5, 15.0;"
        "from msign_lightning.ablations.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    path = os.pathsep.join([str(Path(arguments[1]).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JSONARGPARSE_DEPRECATION_WARNINGS": "off", "PYTHONPATH": path}
    pipe = subprocess.PIPE
    parent = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=pipe, stderr=pipe, start_new_session=True
    )
    STARTED.append(parent)
    return parent


@pytest.fixture(autouse=True)
def _no_process_stays():
    yield
    while STARTED:
        with STARTED.pop() as parent:
            parent.kill()


def finish(parent, status=0):
    """What a parent has written, once it has ended with this exit status."""
    out, errors = parent.communicate(timeout=PATIENCE)
    assert parent.returncode == status, errors
    return out, errors


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers_of(parent):
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def is_alive(pid):
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except FileNotFoundError:
        return False


def count_done(file, **where):
    try:
        return len(results(load(file), **where))
    except (StorageError, StudyError):  # not begun yet
        return 0


def measured(runs):
    """What runs gave, but for their speed."""
    return {run.cell.key: run.outcome._replace(seconds=0.0, steps_per_second=0.0) for run in runs}


@pytest.fixture(scope="module")
def undisturbed(file, tmp_path_factory):
    """What the cells of the study give."""
    folder = tmp_path_factory.mktemp("undisturbed")
    out, errors = finish(start("run", file, "--folder", folder, "--workers", 2))
    page = folder / "kill" / "report" / "report.html"
    assert out == f"12 cells done, 0 failed; logs in {folder / 'kill'}\nreport: {page}\n"
    assert "Runs of 60 steps: 12" in page.read_text(encoding="utf-8")
    assert errors.count("validation loss") == 12
    runs = results(load(file), folder=folder)
    assert {run.cell for run in runs} == set(load(file).cells.values())
    return measured(runs)


@pytest.mark.parametrize("file", PROGRAMS, indirect=True, scope="module")
def test_killed_workers_and_parents_lose_and_double_nothing(file, tmp_path, undisturbed):
    moment = random.Random(0)
    where = ("--folder", tmp_path, "--workers", 2)

    parent = start("run", file, *where)
    wait_until(lambda: workers_of(parent))
    time.sleep(moment.uniform(0, 2))
    os.killpg(parent.pid, signal.SIGINT)  # as Ctrl-C does, while the workers start
    out, errors = finish(parent, 130)
    assert out == ""
    assert "Traceback" not in errors
    assert errors.endswith(
        "interrupted; what is finished is kept; go on with: python -m msign_lightning.ablations "
        f"run {file}, and the same options\n"
    )

    parent = start("run", file, *where)
    wait_until(lambda: count_done(file, folder=tmp_path) >= 1)
    time.sleep(moment.uniform(0, 0.5))
    os.kill(moment.choice(workers_of(parent)), signal.SIGKILL)
    wait_until(lambda: count_done(file, folder=tmp_path) >= 3)
    os.killpg(parent.pid, signal.SIGINT)
    _, errors = finish(parent, 130)
    assert "was killed by SIGKILL" in errors
    assert "Traceback" not in errors
    with reading(None, tmp_path / "kill") as backend:
        assert not trials_of(load(file), backend, TrialState.RUNNING)

    parent = start("resume", file, *where)
    before = count_done(file, folder=tmp_path)
    wait_until(lambda: count_done(file, folder=tmp_path) > before)
    time.sleep(moment.uniform(0, 0.5))
    workers = workers_of(parent)
    parent.kill()
    finish(parent, -signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, workers)))
    assert len(workers) == 2
    assert count_done(file, folder=tmp_path) < 12

    finish(start("resume", file, *where))
    assert measured(results(load(file), folder=tmp_path)) == undisturbed
    with reading(None, tmp_path / "kill") as backend:
        assert_each_cell_once(load(file), backend)


def test_the_other_parent_takes_over_from_a_killed_one(file, tmp_path, database, undisturbed):
    where = ("--folder", tmp_path, "--storage", database, "--workers", 1)
    killed, other = start("run", file, *where), start("run", file, *where)

    def have_both_begun():
        with reading(database, tmp_path) as backend:
            return len({trial.user_attrs["parent"] for trial in trials_of(load(file), backend)}) == 2

    wait_until(lambda: count_done(file, storage=database) >= 1 and have_both_begun())
    killed.kill()
    finish(killed, -signal.SIGKILL)
    assert count_done(file, storage=database) < 12
    out, _ = finish(other)
    assert out.startswith("12 cells done, 0 failed")
    assert measured(results(load(file), storage=database)) == undisturbed
    with reading(database, tmp_path) as backend:
        assert_each_cell_once(load(file), backend)


@pytest.mark.parametrize("file", ["function"], indirect=True, scope="module")
def test_a_restart_of_the_server_ends_nothing(file, tmp_path, server, database, undisturbed):
    where = ("--folder", tmp_path, "--storage", database, "--workers", 1)
    parents = [start("run", file, *where), start("run", file, *where)]
    wait_until(lambda: count_done(file, storage=database) >= 1)
    _, control = server
    control("-m", "immediate", "stop")
    time.sleep(2)  # cells end meanwhile
    control("start")
    errors = "".join(finish(parent)[1] for parent in parents)
    assert "does not answer and is asked again" in errors
    assert "is tried again" not in errors
    assert measured(results(load(file), storage=database)) == undisturbed
    with reading(database, tmp_path) as backend:
        assert_each_cell_once(load(file), backend)


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


def test_workers_stop_what_is_pruned(tmp_path):
    search = study(steps=60, factors={"period": [5]}, sampler=Tpe(1e-3, 10, trials=9), prune=True)
    assert run(search, folder=tmp_path, workers=1) == (9, [])
    with reading(None, tmp_path / "tiny") as backend:
        states = {trial.state: trial for trial in trials_of(search, backend)}
    assert set(states) == {TrialState.COMPLETE, TrialState.PRUNED}
    assert max(states[TrialState.COMPLETE].intermediate_values) == 60
    assert max(states[TrialState.PRUNED].intermediate_values) < 60


def test_a_cell_that_can_not_be_trained_is_tried_thrice_and_the_others_go_on(file, tmp_path):
    cells = study(arms=["adamw"], factors={"lr": [0.003]}, seeds=[0, 1, 2])
    bad = next(iter(cells.cells.values()))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / bad.folder).touch()  # in the way of its logs
    summary = run(cells, folder=tmp_path, workers=2)
    assert summary == (2, [bad.label])
    assert {run.cell for run in results(cells, folder=tmp_path)} == set(list(cells.cells.values())[1:])


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


def test_cells_by_themselves_make_a_study(file, tmp_path, undisturbed):
    """Each in a process of its own, as job arrays do; then a parent trains the rest."""
    study = load(file)
    keys = list(study.cells)
    where = ("--folder", tmp_path)
    out, _ = finish(start("run", file, *where, "--dry-run"))
    assert [line.split()[:2] for line in out.splitlines()[:-1]] == [[str(i), key] for i, key in enumerate(keys)]
    assert out.splitlines()[-1] == "study kill: 0 runs of 60 steps done, 12 to do"
    assert not (tmp_path / "kill").exists()

    jobs = [start("run", file, *where, "--cell", cell) for cell in ("0", keys[3])]
    for job in jobs:
        assert finish(job)[0].startswith("validation loss ")
    done = {keys[0], keys[3]}
    assert measured(results(study, folder=tmp_path)) == {key: undisturbed[key] for key in done}
    out, _ = finish(start("report", file, *where))
    assert "Runs of 60 steps: 2" in Path(out.splitlines()[0]).read_text()
    out, _ = finish(start("run", file, *where, "--dry-run"))
    assert out.count("done") == 3
    assert "10 to do\nabout " in out

    _, errors = finish(start("run", file, *where, "--workers", 2))
    assert errors.count("validation loss") == 10
    assert measured(results(study, folder=tmp_path)) == undisturbed
    _, errors = finish(start("run", file, *where, "--cell", "12"), 2)
    assert errors.endswith("error: cell must be the key of a cell of grid kill, or a number below 12, got '12'\n")


def test_outcomes_of_another_study_are_left_out(tmp_path, caplog):
    cells = study(arms=["adamw"], factors={"lr": [0.01]}, seeds=[0])
    run_alone(cells, "0", folder=tmp_path)
    assert len(results(cells, folder=tmp_path)) == 1
    with pytest.raises(StorageError, match="nothing has been run"):
        results(study(arms=["adamw"], factors={"lr": [0.01]}, seeds=[0], steps=40), folder=tmp_path)
    assert "is left out, since the study was another: steps: 20 → 40" in caplog.text


def test_files_that_are_no_outcomes_are_left_out(tmp_path, caplog):
    cells = study(arms=["adamw"], factors={"lr": [0.01]}, seeds=[0, 1])
    run_alone(cells, "0", folder=tmp_path)
    for name, content in (("mine", "{}"), ("other", "my outcome")):
        (tmp_path / "tiny" / name).mkdir()
        (tmp_path / "tiny" / name / "outcome.json").write_text(content)
    assert [run.cell.seed for run in results(cells, folder=tmp_path)] == [0]
    assert caplog.text.count("is left out, since it holds no outcome") == 2


def test_a_cell_by_itself_says_what_its_program_refuses(tmp_path):
    cells = study(settings={**SMALL, "model.config.n_heads": 3})
    with pytest.raises(StudyError, match=r"adamw lr=0.003 seed=0: .*n_heads must divide"):
        run_alone(cells, "0", folder=tmp_path)


def test_machines_that_do_not_say_which_cores_a_process_may_use(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == os.cpu_count()


def test_bad_numbers_are_refused(tmp_path):
    for arguments, message in (
        ({"workers": 0}, "workers must be positive, got 0"),
        ({"time_limit": 0.0}, "time_limit must be positive, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(study(), folder=tmp_path, **arguments)


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
