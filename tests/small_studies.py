"""A small study, what its cells could give, and what a storage holds of it."""

import time
from collections import Counter

import optuna
from optuna.trial import TrialState

from msign_lightning.ablations.cell import Outcome
from msign_lightning.ablations.study import Bisect, Grid, Study, Tpe

SMALL = {
    "model.config.n_layers": 1,
    "model.config.width": 16,
    "model.config.n_heads": 2,
    "model.config.mlp_width": 32,
    "model.warmup_steps": 5,
    "trainer.limit_val_batches": 2,
}


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


def trials_of(study, backend, *states):
    return optuna.load_study(study_name=study.name, storage=backend).get_trials(states=states or None)
