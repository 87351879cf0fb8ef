"""Studies on a Ray cluster; Ray is installed where Composer is."""

import sys

import pytest
import ray

from msign_lightning.ablations.cluster import RayWorker
from msign_lightning.ablations.launch import Crashed, Finished, Pool
from msign_lightning.ablations.runner import results, run
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


def test_an_actor_says_why_it_failed(study, tmp_path):
    with Pool(study, tmp_path, 1, launcher=RayWorker) as pool:
        messages = []
        for task in (None, study.groups[0].cell(0.2, 0)):
            pool.start(0, task)
            while pool.busy:
                messages += [message for _, message in pool.wait(0.5)]
    assert messages[0] == Finished(None)
    assert isinstance(messages[-1], Crashed)
    assert "Ray actor" in messages[-1].error
