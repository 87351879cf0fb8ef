"""The command `msign`, from checkpoints on a disk to what it prints and writes."""

import csv
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from support import llama

from msign_lightning import restore, select_targets
from msign_lightning.cli import falls_from, main


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder of checkpoints in which ranks fall from step 300 on, and are too low at step 400."""
    folder = tmp_path / "a run"
    folder.mkdir()
    for step, share in [(100, 0.0), (200, 0.0), (300, 0.2), (400, 5.0), (1000, 10.0)]:
        model = llama()
        for target in select_targets(model):
            with torch.no_grad():
                W = target.parameter
                u, v = torch.ones(W.shape[0], 1), torch.ones(1, W.shape[1])
                W.add_(u @ v, alpha=share * W.norm().item() / (u @ v).norm().item())
        torch.save({"model": model.state_dict(), "iter_num": step}, folder / f"{step}.pt")
    return folder


def test_inspect_says_whether_ranks_fell_when_and_where(run, capsys):
    assert main(["inspect", str(run), "--top", "3"]) == 0
    said = capsys.readouterr().out
    assert "step 1000\n" in said
    assert "... and 11 more" in said
    assert "stable ranks fall from step 300 on" in said
    assert "verdict: stable_rank alarm at step 400: 14 of 14 matrices" in said
    assert f"last checkpoint before it: {run / '300.pt'}" in said
    lines = said.split("means over")[1].splitlines()[2:7]
    assert [line.split()[0] for line in lines] == ["100", "200", "300", "400", "1000"]

    assert main(["inspect", str(run / "100.pt"), str(run / "200.pt")]) == 0
    assert "verdict: no alarm" in capsys.readouterr().out
    assert main(["inspect", str(run / "400.pt"), "--thresholds", '{"stable_rank": null}']) == 0
    assert "verdict: no alarm" in capsys.readouterr().out


def test_inspect_writes_tables_figure_and_report(run, tmp_path, capsys):
    files = [tmp_path / f"the report.{kind}" for kind in ("csv", "json", "png", "html")]
    assert main(["inspect", str(run), *(f"--{file.suffix[1:]}={file}" for file in files)]) == 0
    rows = list(csv.DictReader(files[0].read_text().splitlines()))
    assert len(rows) == 5 * 14
    report = json.loads(files[1].read_text())
    assert [c["step"] for c in report["checkpoints"]] == [100, 200, 300, 400, 1000]
    assert report["checkpoints"][0]["matrices"][0]["stable_rank"] == float(rows[0]["stable_rank"])
    assert len(report["checkpoints"][3]["alarms"]) == 14
    assert files[2].read_bytes().startswith(b"\x89PNG")

    page = files[3].read_text()
    assert not re.search(r"https?:|src=|<script", page)
    (svg,) = re.findall(r"<svg.*</svg>", page, re.DOTALL)
    drawn = ElementTree.fromstring(svg)
    assert len(drawn.findall("rect")) == 5 * 14
    places = {(rect.get("x"), rect.get("y")) for rect in drawn.findall("rect")}
    assert len(places) == 5 * 14
    assert "verdict: stable_rank alarm at step 400" in page


def test_a_report_of_a_hundred_layers_fits(tmp_path):
    from msign_lightning.checkpoints import Measured
    from msign_lightning.cli import Look, _write_html

    kinds = [f"self_attn.{k}_proj.weight" for k in "qkvo"] + [f"mlp.experts.{i}.up_proj.weight" for i in range(3)]
    names = [f"model.layers.{layer}.{kind}" for layer in range(100) for kind in kinds]
    looks = [
        Look(
            Path("a"),
            step,
            [Measured(n, "attention", (64, 64), 1.0 + i % 20, 1.0, 1.0, "") for i, n in enumerate(names)],
        )
        for step in range(12)
    ]
    _write_html(looks, ["verdict: <none>"], tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.count("<rect") == 100 * 5 * 12  # experts are one kind
    height = int(re.search(r'<svg width="\d+" height="(\d+)"', page)[1])
    assert 700 < height < 1200
    assert "&lt;none&gt;" in page


def test_what_can_not_be_read_is_said_and_the_rest_measured(run, capsys):
    (run / "500.pt").write_bytes(b"PK and no more")
    (run / "notes.txt").write_text("")
    assert main(["inspect", str(run)]) == 1
    said = capsys.readouterr()
    assert "alarm at step 400" in said.out
    assert re.fullmatch(r"not read: .*500\.pt: .*sound archive.*\n", said.err)


def test_checkpoints_that_do_not_say_their_step_are_numbered(run, capsys):
    files = [run / name for name in ("a.pt", "b.pt")]
    for file in files:
        torch.save(llama().state_dict(), file)
    assert main(["inspect", str(run / "300.pt"), *map(str, files)]) == 0
    said = capsys.readouterr().out
    assert "numbered in the order given" in said
    assert [line.split()[0] for line in said.split("means over")[1].splitlines()[2:5]] == ["0", "1", "2"]


def test_weights_that_are_not_finite_are_an_alarm_of_their_own(run, capsys):
    state = torch.load(run / "200.pt", weights_only=True)
    state["model"]["model.layers.0.mlp.up_proj.weight"][3, 4] = math.inf
    torch.save(state | {"iter_num": 250}, run / "250.pt")
    assert main(["inspect", str(run / "250.pt"), str(run / "200.pt")]) == 0
    said = capsys.readouterr().out
    assert "verdict: non_finite alarm at step 250: 1 of 14 matrices, model.layers.0.mlp.up_proj.weight" in said
    assert re.search(r"up_proj\.weight +mlp +48 x 32 +not finite", said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nothing"], "checkpoints must exist, got 'nothing'"),
        (["inspect", "bad.pt"], "bad.pt must be of safetensors or torch.save"),
        (["inspect", "good.pt", "--targets", "*.nothing"], "targets must be one of .* got '\\*.nothing'"),
        (["inspect", "good.pt", "--csv", "no/where.csv"], "a folder that can be written to, got 'no/where.csv'"),
        (["inspect", "good.pt", "--thresholds", '{"nothing": 1}'], "thresholds must hold only"),
        (["restore", "good.pt", "good.pt"], "must be a new file or folder, got 'good.pt', which exists"),
        (["restore", "nothing", "out"], "nothing must hold all its files"),
        (["restore", "good.pt", "no/where.pt"], "No such file or directory"),
        (["plan", "nowhere:model"], "model must be package.module:function"),
        (["plan", "good.pt", "--period", "0"], "period must be a positive integer, got 0"),
    ],
)
def test_errors_are_one_line_and_no_traceback(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    torch.save(llama().state_dict(), "good.pt")
    Path("bad.pt").write_text("not a checkpoint")
    before = sorted(tmp_path.iterdir())
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert re.fullmatch(f"error: .*{message}.*\n", said.err)
    assert sorted(tmp_path.iterdir()) == before


def test_options_may_stand_in_yaml(tmp_path, capsys):
    state = {f"h.{i}.attn.qkv.weight": torch.randn(96, 32) for i in range(3)}
    torch.save(state, tmp_path / "a.pt")
    text = 'targets: attention\nexclude: "h.0.*"\ncuts:\n  "*.qkv.weight": {sizes: [32, 32, 32], names: [q, k, v]}\n'
    (tmp_path / "options.yaml").write_text(text)
    assert main(["inspect", "--config", str(tmp_path / "options.yaml"), str(tmp_path / "a.pt")]) == 0
    said = capsys.readouterr().out
    assert "h.1.attn.qkv.weight.q" in said
    assert "h.0.attn" not in said.split("left out")[0]


def test_restore_says_what_it_did(run, capsys):
    assert main(["restore", str(run / "400.pt"), str(run / "good.pt"), "--rule", "cap", "--targets", "attention"]) == 0
    assert "8 of 8 matrices restored" in capsys.readouterr().out
    new = torch.load(run / "good.pt", weights_only=True)
    old = torch.load(run / "400.pt", weights_only=True)
    for name, tensor in old["model"].items():
        assert torch.equal(new["model"][name], restore(tensor, rule="cap") if "self_attn" in name else tensor)


def test_plan_of_a_checkpoint_a_configuration_and_a_function(run, tmp_path, capsys):
    llama().save_pretrained(tmp_path / "model")
    for source in (run / "100.pt", tmp_path / "model", tmp_path / "model" / "config.json", "support:llama"):
        assert main(["plan", str(source), "--period", "50"]) == 0
        said = capsys.readouterr().out
        assert "14 matrices (8 attention, 6 mlp)" in said
        assert "per step at period 50" in said
        assert "left out: " in said
        assert math.isfinite(float(re.search(r"about (\S+) s per application", said)[1]))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import")  # where another test has imported it
@pytest.mark.parametrize(("command", "usage"), [("ablate", "run,resume,report"), ("demo", "--workers")])
def test_other_commands_are_handed_on(command, usage, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["msign"])
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert usage in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "restore", "plan"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert f"\n    msign {command} " in said
    assert "--cuts" in said


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], None), ([5.0], None), ([5, 4, 5, 3], None), ([9, 10, 9.5, 6, 4], 2), ([math.nan, 8, 3], 1), ([0, 0], None)],
)
def test_falls_from_the_last_high_value(values, expected):
    assert falls_from(values) == expected
