"""Studies on a Ray cluster; Ray is installed where Composer is."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import ray

from msign_lightning.ablations.cluster import RayWorker, cores, gpus
from msign_lightning.ablations.launch import Crashed, Finished, Pool
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.runner import results, run
from msign_lightning.ablations.storage import StorageError
from msign_lightning.ablations.study import Study


@pytest.fixture
def study(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import os\ndef objective(settings, progress):\n    dict(settings)\n    progress(1, 5.0)\n"
        "    if settings['lr'] == 0.2 and not os.path.exists('once'):\n        open('once', 'w').close()\n"
        "        os._exit(1)\n    return settings['lr'] + settings['seed']\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *sys.path]))
    yield Study("s", "mine:objective", 20, ["adamw"], {"lr": [0.1, 0.2, 0.4]}, [0, 1])
    ray.shutdown()


def test_a_study_runs_on_a_cluster_and_survives_a_dead_actor(study, tmp_path):
    assert run(study, launcher="ray", workers=2, folder=tmp_path / "runs") == (6, [])
    assert (tmp_path / "once").exists()
    found = {(run.cell.lr, run.cell.seed): run.outcome.val_loss for run in results(study, folder=tmp_path / "runs")}
    assert found == {(lr, seed): lr + seed for lr in (0.1, 0.2, 0.4) for seed in (0, 1)}


def test_a_killed_parent_loses_and_doubles_nothing(study, tmp_path):
    code = Path("mine.py").read_text().replace("os._exit(1)", "pass")
    Path("mine.py").write_text("import time\n" + code.replace("    return", "    time.sleep(1)\n    return"))
    Path("s.yaml").write_text(
        "program: mine:objective\nsteps: 20\narms: [adamw]\nfactors: {lr: [0.1, 0.2, 0.4]}\nseeds: [0, 1]\n"
    )
    command = [sys.executable, "-m", "msign_lightning.ablations", "run", "s.yaml", "--launcher", "ray"]
    with subprocess.Popen([*command, "--workers", "1", "--folder", "runs"], start_new_session=True) as parent:
        while not (done := count_done(study)):
            assert parent.poll() is None
            time.sleep(0.1)
        os.killpg(parent.pid, signal.SIGKILL)
    assert done < 6
    assert run(study, launcher="ray", workers=2, folder=Path("runs")) == (6, [])
    losses = [(run.cell.lr, run.cell.seed, run.outcome.val_loss) for run in results(study, folder=Path("runs"))]
    assert sorted(losses) == [(lr, seed, lr + seed) for lr in (0.1, 0.2, 0.4) for seed in (0, 1)]


def count_done(study):
    with suppress(StorageError, StudyError):  # not begun yet
        return len(results(study, folder=Path("runs")))
    return 0


def test_there_are_no_more_workers_than_gpus(study, tmp_path):
    ray.init(num_cpus=3, num_gpus=1, log_to_driver=False)
    assert (gpus(), cores()) == (["GPU"], 3)
    assert run(study, launcher="ray", folder=tmp_path / "runs") == (6, [])
    with pytest.raises(ValueError, match="workers must be positive, got 0"):
        run(study, launcher="ray", workers=0, folder=tmp_path / "runs")


def test_an_actor_says_why_it_failed(study, tmp_path):
    code = Path("mine.py").read_text()
    Path("mine.py").write_text(code.replace("    return", "    if settings['lr'] == 0.4:\n        exit(3)\n    return"))
    with Pool(study, tmp_path, 1, launcher=RayWorker) as pool:
        messages = []
        for task in (None, study.groups[0].cell(0.4, 0), study.groups[0].cell(0.2, 0)):
            pool.start(0, task)
            while pool.busy:
                messages += [message for _, message in pool.wait(0.5)]
    assert messages[0] == Finished(None)
    left, died = (message for message in messages if isinstance(message, Crashed))
    assert "SystemExit: 3" in left.error
    assert "Ray actor" in died.error
