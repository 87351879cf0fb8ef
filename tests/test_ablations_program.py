"""Studies of other programs: the examples of the documentation, run from there, and what does not fit."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from msign_lightning.ablations import StudyError, load
from msign_lightning.ablations.cell import Group
from msign_lightning.ablations.launch import Crashed, Finished, Pool
from msign_lightning.ablations.program import cell_settings, check, run_cell
from msign_lightning.ablations.results import find
from msign_lightning.ablations.runner import results, run
from msign_lightning.ablations.study import Study, Tpe
from msign_lightning.ablations.views import report
from tests.support import write_examples

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """A folder with the files of the page, as somebody's working directory."""
    write_examples(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("plain", "causal_lm", "with_composer", "by_command", "mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def objective_study(folder, code, **changed):
    """A study of a function `objective`."""
    (folder / "mine.py").write_text(code)
    values = {"steps": 40, "arms": ["adamw"], "factors": {"lr": [0.01]}, "seeds": [0], **changed}
    return Study(name="mine", program="mine:objective", **values)


def first_cell(study):
    return next(iter(study.cells.values()))


@pytest.mark.parametrize("name", ["causal_lm", "plain"])
def test_the_examples_run_as_studies(examples, name):
    study = load(f"{name}_study.yaml")
    assert run(study, workers=1, folder=examples / "runs") == (len(study.cells), [])
    runs = results(study, folder=examples / "runs")
    losses = {run.cell: run.outcome for run in runs}
    assert set(losses) == set(study.cells.values())
    for outcome in losses.values():
        assert outcome.steps == 40
        assert outcome.val_loss < outcome.initial_loss
        assert outcome.curve[-1][0] == 40
    others = [outcome.val_loss for cell, outcome in losses.items() if cell.arm != "zclip"]  # which may see no outlier
    assert len(set(others)) == len(others), "every arm, rate and seed has its own"
    (page, *_) = report(study, runs, examples / "runs" / study.name)
    assert study.program in page.read_text()
    if name == "causal_lm":
        by_arm = {cell.arm: outcome for cell, outcome in losses.items() if cell.lr == 0.01}
        start = {by_arm[arm].initial_loss for arm in ("adamw", "zclip", "msign_attention")}
        assert len(start) == 1, "the same weights and the same data"
        assert all(1 <= outcome.stable_rank <= 32 for outcome in by_arm.values())
        again = run_cell(study, first_cell(study), examples / "again")
        assert again.curve == losses[first_cell(study)].curve


def test_the_example_of_a_frontier_runs(examples):
    study = replace(load("causal_lm_frontier.yaml"), seeds=[0])
    assert run(study, workers=1, folder=examples / "runs") == (12, [])
    boundaries = find(study, results(study, folder=examples / "runs")).boundaries
    assert [group.arm for group in boundaries["group"]] == ["adamw", "msign"]
    assert (boundaries["status"] == "bracketed").all()


@pytest.mark.composer
@pytest.mark.filterwarnings("ignore")
def test_the_composer_example_runs(examples):
    study = load("with_composer_study.yaml")
    outcomes = {cell.arm: run_cell(study, cell, examples / "runs") for cell in study.cells.values()}
    adamw, msign = outcomes["adamw"], outcomes["msign"]
    assert adamw.steps == msign.steps == 30
    assert adamw.curve[:10] == msign.curve[:10]
    assert adamw.curve[10:] != msign.curve[10:], "restored after step 10"
    assert adamw.val_loss != msign.val_loss


def test_a_command_is_a_program(examples):
    (examples / "train.py").write_text(
        "import json, sys\nsettings = json.loads(sys.argv[1])\nif settings['lr'] == 3: sys.exit(4)\n"
        "for step in range(10, settings['steps'] + 1, 10):\n"
        "    loss = float('nan') if settings['lr'] == 2 and step > 10 else 5.0 - settings['lr'] * step / 40\n"
        "    print(json.dumps({'step': step, 'loss': loss}), flush=True)\n"
        "print(json.dumps({'loss/val': loss, 'arm': settings['arm'], 'seed': settings['seed']}))\n"
    )
    study = Study("s", "by_command:objective", 40, ["adamw"], {"lr": [1.0, 2.0, 3.0]}, [0])
    sound, lost, failing = study.cells.values()
    outcome = run_cell(study, sound, examples)
    assert outcome.val_loss == 4.0
    assert [step for step, _ in outcome.curve] == [10, 20, 30, 40]
    assert run_cell(study, lost, examples).diverged_at == 20
    with pytest.raises(RuntimeError, match=r"train.py.* ended with exit status 4"):
        run_cell(study, failing, examples)


def test_a_subclass_of_lightning_cli_is_a_program(examples):
    (examples / "mine.py").write_text(
        "from lightning.pytorch.cli import LightningCLI\nfrom causal_lm import CausalLM, Texts\n"
        "class CLI(LightningCLI):\n    def __init__(self, **rest):\n        super().__init__(CausalLM, Texts, **rest)\n"
    )
    (examples / "mine.yaml").write_text("trainer: {accelerator: cpu, gradient_clip_val: 1.0, log_every_n_steps: 10}")
    values = load("causal_lm_study.yaml").__dict__ | {"settings": {"config": "mine.yaml"}, "program": "mine:CLI"}
    study = Study(**{name: values[name] for name in Study.__dataclass_fields__})
    check(study)
    ours, theirs = (run_cell(s, Group("adamw").cell(0.01, 0), examples) for s in (study, load("causal_lm_study.yaml")))
    assert ours.curve == theirs.curve


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("metric: val_loss", "metric: loss", r"metric must be one of what validation_step logs, \['val_loss'\], got"),
        ("zclip", "qk_norm", "qk_norm: .*unrecognized arguments: --config.qk_norm"),
        ("zclip", "muon", "muon: .*optimizer"),
        ("lr: model.lr", "lr: model.rate", "did you mean model.lr"),
        ("model.width", "model.widht", "did you mean model.width"),
        (
            "causal_lm_program.yaml",
            "causal_lm:Texts",
            "program must be a LightningCLI or a function, got the class Texts",
        ),
        ("causal_lm_program.yaml", "causal_lm:Tests", "program must be package.module:name, got 'causal_lm:Tests'"),
    ],
)
def test_what_does_not_fit_a_lightning_program(examples, old, new, message):
    study = Path("causal_lm_study.yaml")
    study.write_text(study.read_text().replace(old, new))
    with pytest.raises(StudyError, match=message) as error:
        check(load(study))
    assert re.match(r"causal_lm_study.yaml:\d+: ", str(error.value))
    assert str(error.value).count("causal_lm_study.yaml") == 1


def test_the_configuration_of_a_cell_may_be_a_factor(examples):
    for bound in ("0.1", "0.01"):
        (examples / f"{bound}.yaml").write_text(f"trainer: {{gradient_clip_val: {bound}}}")
    factors = {"lr": [0.01], "config": ["0.1.yaml", "0.01.yaml"]}
    study = replace(load("causal_lm_study.yaml"), arms=["adamw"], factors=factors)
    one, two = (run_cell(study, cell, examples) for cell in study.cells.values())
    assert one.curve != two.curve


def test_a_typo_in_the_file_of_a_program_is_named(examples):
    program = examples / "causal_lm_program.yaml"
    program.write_text(program.read_text().replace("accelerator", "acelerator"))
    with pytest.raises(StudyError, match=r"causal_lm_study\.yaml:\d+: adamw: .*acelerator"):
        check(load("causal_lm_study.yaml"))


def test_scaled_embedding_needs_an_embedding(examples):
    (examples / "mine.py").write_text(
        "import lightning.pytorch as pl, torch\nfrom causal_lm import Texts\n"
        "class Model(pl.LightningModule):\n"
        "    def __init__(self, lr: float = 0.1):\n        super().__init__()\n        self.w = torch.nn.Linear(4, 4)\n"
        "    def training_step(self, batch, i):\n        return self.w(torch.ones(4)).sum()\n"
        "    def validation_step(self, batch, i):\n        self.log('val_loss', 1.0)\n"
        "    def configure_optimizers(self):\n        return torch.optim.SGD(self.parameters(), 0.1)\n"
    )
    program = examples / "causal_lm_program.yaml"
    program.write_text(program.read_text().replace("causal_lm.CausalLM", "mine.Model"))
    study = Study(
        "s", str(program), 40, ["adamw", "scaled_embed"], {"lr": [0.1]}, [0], metric="val_loss", lr="model.lr"
    )
    with pytest.raises(StudyError, match=r"scaled_embed: .*embedding"):
        check(study)
    assert run_cell(study, first_cell(study), examples).stable_rank is None, "there is no attention"


def test_a_function_gets_what_the_study_says(examples):
    factors = {"lr": [0.01], "period": [10], "targets": ["mlp"], "depth": [2]}
    arms = ["adamw", "cap_first_half", "zclip"]
    study = objective_study(examples, "", arms=arms, factors=factors, settings={"data.size": 3})
    adamw, cap, _ = (dict(cell_settings(study, cell, Path("runs"))) for cell in study.cells.values())
    common = {"seed": 0, "steps": 40, "lr": 0.01, "depth": 2, "data.size": 3}
    assert adamw == {**common, "arm": "adamw", "folder": Path("runs") / first_cell(study).folder}
    folder = cap.pop("folder")
    assert cap == {**common, "arm": "cap_first_half", "period": 10, "targets": "mlp", "rule": "cap", "stop": 20}
    assert folder.name.startswith("cap_first_half")


@pytest.mark.parametrize(
    ("name", "by"),
    [("seconds", "the outcome"), ("steps", "steps"), ("folder", "the study"), ("error", "the storage")],
)
def test_names_that_have_a_meaning_already(examples, name, by):
    with pytest.raises(StudyError, match=f"{name} must not be a factor or a setting: {by} sets it"):
        objective_study(examples, "", factors={"lr": [0.01], name: [1]})


READS = "def objective(settings, progress):\n    dict(settings)\n"


@pytest.mark.parametrize(
    ("code", "changed", "message"),
    [
        ("def objective(s, p):\n    return s['lr'] + s['steps']", {}, "must read all settings of arm adamw.*read seed"),
        (
            "def objective(s, p):\n    return s['lr'] + s['steps'] + s['seed']",
            {"arms": ["zclip"]},
            "all settings of arm zclip, .* not read arm",
        ),
        (
            "def objective(s, p):\n    return float(len([s[name] for name in s if name != 'arm']))",
            {"arms": ["msign_triggered"], "factors": {"lr": [0.01], "period": [10]}},
            "all settings of arm msign_triggered, .* not read arm",
        ),
        (
            READS + "    return {'accuracy': 1.0}",
            {},
            r"metric must be one of what .* returns, \['accuracy'\], got 'loss",
        ),
        ("objective = 3", {}, "program must be a class or function, got 3"),
    ],
)
def test_what_does_not_fit_a_function(examples, code, changed, message):
    study = objective_study(examples, code, **changed)
    with pytest.raises(StudyError, match=message):
        run_cell(study, first_cell(study), examples)


def test_a_period_for_all_concerns_arms_with_msign_alone(examples):
    study = replace(load("plain_study.yaml"), settings={"period": 10}, factors={"lr": [0.1]})
    adamw, msign = (run_cell(study, Group(arm).cell(0.1, 0), examples) for arm in ("adamw", "msign"))
    assert adamw.val_loss != msign.val_loss


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("    return 2.0", (2.0, None, 40)),
        ("    progress(1, 5.0)\n    progress(2, float('nan'))\n    return 1 / 0", (None, 2, 2)),
        ("    progress(1, 5.0)\n    return float('inf')", (None, 40, 40)),
        (
            "    progress(1, 5.0)\n    try:\n        progress(7, float('inf'))\n    except Exception:\n        pass",
            (None, 7, 7),
        ),
    ],
)
def test_divergence_of_a_function_is_an_outcome(examples, body, expected):
    study = objective_study(examples, READS + body)
    outcome = run_cell(study, first_cell(study), examples)
    assert (outcome.val_loss, outcome.diverged_at, outcome.steps) == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    progress(2, 5.0)\n    progress(2, 4.0)", "progress must be told of rising steps, got 2 after 2"),
        ("    return float('nan')", "the loss of the first step must be finite"),
    ],
)
def test_what_a_function_must_not_do(examples, body, message):
    study = objective_study(examples, READS + body)
    with pytest.raises(ValueError, match=message):
        run_cell(study, first_cell(study), examples)


def test_a_function_is_pruned_by_its_progress(examples):
    body = "    for step in range(1, 41):\n        progress(step, 5 - step / 10)\n    return 1.0"
    study = objective_study(examples, READS + body, factors={}, sampler=Tpe(0.1, 1.0))
    told = []
    cell = Group("adamw").cell(0.1, 0)
    assert run_cell(study, cell, examples, lambda step, loss: told.append((step, loss)) or step >= 10) is None
    assert [step for step, _ in told] == list(range(1, 11))
    assert told[-1][1] == pytest.approx(math.fsum(5 - step / 10 for step in range(1, 11)) / 10)
    assert run_cell(study, cell, examples, lambda step, loss: step == 40) is not None, "nothing is left to stop"


def test_a_study_that_does_not_fit_its_function_ends_at_once(examples):
    study = objective_study(examples, "def objective(s, p):\n    return s['lr']", factors={"lr": [0.01, 0.02]})
    with pytest.raises(StudyError, match="it has not read seed, steps"):
        run(study, workers=1, folder=examples / "runs")


def test_a_function_needs_neither_torch_nor_lightning(examples):
    objective_study(examples, READS + "    return settings['lr']")
    code = (
        "import sys; from pathlib import Path; from msign_lightning.ablations.study import Study;"
        "from msign_lightning.ablations.program import check, run_cell;"
        "s = Study('mine', 'mine:objective', 20, ['adamw'], {'lr': [0.5]}, [0]);"
        "check(s); print(run_cell(s, next(iter(s.cells.values())), Path()).val_loss, {'lightning'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=examples)
    assert done.stdout.strip() == "0.5 set()"


# --- faults ------------------------------------------------------------------------------------------------------


def ask(pool, task):
    pool.start(0, task)
    messages = []
    while pool.busy:
        messages += [message for _, message in pool.wait(0.2)]
    return messages[-1]


def test_a_worker_that_takes_too_long_or_is_stopped_is_replaced(examples, monkeypatch):
    body = (
        "    import os, signal, time\n    if settings['lr'] == 1.0:\n        time.sleep(600)\n"
        "    if settings['lr'] == 2.0:\n        os.kill(os.getpid(), signal.SIGSTOP)\n    return settings['lr']"
    )
    study = objective_study(examples, READS + body, factors={"lr": [1.0, 2.0, 3.0]})
    slow, stopped, sound = study.cells.values()
    with Pool(study, examples, 1, [], time_limit=20.0) as pool:
        assert ask(pool, None) == Finished(None)
        assert ask(pool, sound).outcome.val_loss == 3.0
        monkeypatch.setattr(pool, "time_limit", 1.0)
        message = ask(pool, slow)
        assert isinstance(message, Crashed)
        assert "took longer than the time limit of 1 s" in message.error
        monkeypatch.setattr(pool, "time_limit", None)
        monkeypatch.setattr("msign_lightning.ablations.launch.SILENCE", 10.0)
        message = ask(pool, stopped)
        assert isinstance(message, Crashed)
        assert "gave no sign of life for 10 s" in message.error
        assert ask(pool, sound).outcome.val_loss == 3.0


def test_a_worker_that_is_killed_in_the_start_check_is_replaced(examples):
    """The first import kills it, the second does not."""
    code = (
        "import os, signal\nfrom pathlib import Path\nif not Path('once').exists():\n    Path('once').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    study = objective_study(examples, code + READS + "    return 1.0")
    assert run(study, workers=1, folder=examples / "runs") == (1, [])
    assert (examples / "once").exists()


def test_the_user_s_own_files_stay(examples):
    """Beside a study's folder, in its report and among a cell's logs."""
    study = load("causal_lm_study.yaml")
    cell = first_cell(study)
    kept = [
        examples / "report" / "thesis.tex",
        examples / cell.folder / "notes.txt",
        examples / cell.folder / "a" / "b",
    ]
    for file in kept:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("the user's")
    logs = []
    for _ in range(2):
        run_cell(study, cell, examples)
        logs.append(len([*(examples / cell.folder).glob("events.out.tfevents.*")]))
    assert logs[0] == logs[1] > 0, "those of the first try are gone"
    assert all(file.read_text() == "the user's" for file in kept)
