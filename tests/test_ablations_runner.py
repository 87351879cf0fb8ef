"""The runner of studies: real processes, which are killed, and cells by themselves."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from msign_lightning.ablations.launch import Crashed, Finished, Pool
from msign_lightning.ablations.ledger import exists
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.runner import cores, results, run, run_alone
from msign_lightning.ablations.storage import StorageError, opened, reading
from msign_lightning.ablations.study import Tpe, load
from tests.small_studies import SMALL, assert_each_cell_once, study, trials_of
from tests.support import PATIENCE, write_examples

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _quiet_optuna():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


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
