"""The studies that need a GPU: in its small form each runs to its end on a CPU, and at full size it is the paper's."""

import math
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import msign_lightning.ablations
from msign_lightning.ablations.__main__ import _parser, main
from msign_lightning.ablations.program import check, run_cell
from msign_lightning.ablations.runner import results
from msign_lightning.ablations.study import Grid, load
from msign_lightning.recipes import recipe_file

STUDIES = sorted(
    file.stem
    for file in (Path(msign_lightning.ablations.__file__).parent / "studies").glob("*.yaml")
    if "smoke" in yaml.safe_load(file.read_text())
)
CURVES = [
    *("loss/smoothed", "stability/grad_norm", "stable_rank/geometric_mean"),
    *("jacobian_alignment/min", "jacobian_bound", "jacobian_total"),
]
"""Those of the paper's figures."""


def curves(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def settings(study):
    return yaml.safe_load(recipe_file(study.program).read_text())


def test_all_tables_and_figures_are_there():
    four, two = ("llama_1b", "llama_moe_3b", "nanogpt_5m", "sigma_40m"), ("nanogpt_5m", "sigma_40m")
    tables = [f"paper_table1_{name}" for name in four] + [f"paper_table{n}_{name}" for n in (2, 3) for name in two]
    assert sorted(STUDIES) == sorted(["gpt2_bf16", "paper_figures_llama_1b", "paper_figures_llama_moe_3b", *tables])


def test_each_has_its_documented_command():
    text = (Path(__file__).parent.parent / "docs" / "ablations.md").read_text()
    commands = re.findall(r"^python -m msign_lightning\.ablations (run (?:paper|gpt2).*)$", text, re.MULTILINE)
    options = [_parser().parse_args(shlex.split(command)) for command in commands]
    assert sorted(option.study for option in options) == STUDIES
    assert all(load(option.study).steps % (100 * option.legs) == 0 for option in options if option.legs > 1)


@pytest.mark.parametrize("name", STUDIES)
def test_the_small_form_runs_to_its_end(name, tmp_path, capsys):
    study = load(name, smoke=True)
    check(study)
    for number in range(len(study.cells)):
        assert main(["run", name, "--smoke", "--cell", f"{number}", "--folder", str(tmp_path)]) == 0
    assert main(["report", name, "--smoke", "--folder", str(tmp_path)]) == 0
    place = tmp_path / f"{name}_smoke"
    assert [*tmp_path.iterdir()] == [place], "the whole study has nothing of it"
    assert {"report.html", "report.md", "runs.csv", "results.csv"} <= {
        file.name for file in (place / "report").iterdir()
    }
    runs = {run.cell: run.outcome for run in results(study, folder=tmp_path)}
    assert runs.keys() == set(study.cells.values())
    assert {cell.arm for cell in runs} == set(load(name).arms)
    for cell, outcome in runs.items():
        assert outcome.steps == study.steps
        assert 2 < outcome.val_loss < 1.1 * math.log(256)
        assert math.isfinite(outcome.final_loss + outcome.max_grad_norm + outcome.stable_rank)
        found = curves(place / cell.folder)
        assert len(found.get("msign/changed", [])) == (0 if cell.arm == "adamw" else study.steps // period(cell) - 1)
        if "trainer.callbacks+" in study.settings:
            assert all(found[tag] and all(map(math.isfinite, found[tag])) for tag in CURVES)
            assert 0 < found["jacobian_alignment/min"][-1] <= 1
    losses = [outcome.val_loss for outcome in runs.values()]
    assert len(set(losses)) == len(losses), "each cell is a run of its own"


def period(cell):
    return dict(cell.factors).get("period", 5)


@pytest.mark.parametrize("name", STUDIES)
def test_at_full_size_it_is_the_recipe(name):
    study = load(name)
    recipe = settings(study)
    assert study.sampler == Grid()
    assert study.factors["lr"] == (recipe["model"]["optimizer"]["init_args"]["lr"],)
    assert not {setting.split(".")[0] for setting in study.settings} & {"config", "period"}
    assert recipe["msign"]["period"] == 100
    if "table1" in name:
        assert study.arms == ("adamw", "msign")
    elif name != "gpt2_bf16":
        assert study.steps == recipe["trainer"]["max_steps"]
    if "table2" in name:
        assert set(study.arms) == {"adamw", "msign", "msign_attention", "msign_mlp"}
    if "table3" in name:
        assert study.factors["period"] == (10, 100, 1000, 10000)


@pytest.mark.parametrize("name", ["paper_table2_sigma_40m", "paper_figures_llama_moe_3b"])
def test_legs_of_a_monitored_run_give_the_same(name, tmp_path):
    study = load(name, smoke=True)
    cell = next(cell for cell in study.cells.values() if cell.arm == "msign")
    whole = run_cell(study, cell, tmp_path / "whole")

    def die(step, loss):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run_cell(study, cell, tmp_path, die, legs=4)
    (saved,) = (tmp_path / cell.folder).glob("*.ckpt")
    assert torch.load(saved, weights_only=False)["global_step"] == 15
    again = run_cell(study, cell, tmp_path, legs=4)
    timing = {"seconds": 0, "steps_per_second": 0}
    assert again._replace(**timing) == whole._replace(**timing)
    resumed, expected = (curves(folder / cell.folder) for folder in (tmp_path, tmp_path / "whole"))
    assert resumed["stable_rank/geometric_mean"] == expected["stable_rank/geometric_mean"]
    assert len(resumed["jacobian_bound"]) == 2, "estimates that begin anew after an interruption"
