"""The benchmarks run, need nothing but PyTorch and Lightning, and count right; what they time is never asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import application, overhead, sharing

ROOT = Path(__file__).parent.parent
EXTRAS = ("composer", "datasets", "optuna", "sqlalchemy")


def run(folder, name, *arguments):
    """The report and the figures of a benchmark in processes that have only PyTorch and Lightning."""
    (folder / "sitecustomize.py").write_text(f"import sys\nfor name in {EXTRAS}:\n    sys.modules[name] = None\n")
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--folder", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (report,) = folder.glob(f"{name}-*.md")
    assert report.read_text() in done.stdout
    return report.read_text(), json.loads(report.with_suffix(".json").read_text())


def test_application(tmp_path):
    report, figures = run(tmp_path, "application", "--rounds", "1", "--models", "NanoGPT-5M", "--shapes", "full")
    assert "msign-lightning" in figures["source"]
    rows = {row["method"]: row for row in figures["rows"]}
    assert all(f"| {name} |" in report for name in rows)
    steps = 12 * (96 * 6 * 48**3 + 48 * (4 * 48**2 * 192 + 2 * 48**3))
    assert rows["polynomial"]["flop"] == pytest.approx(steps, rel=0.05)
    assert max(rows[name]["worst"] for name in ("svd (fp64)", "polynomial")) < 1e-3
    assert rows["Muon's 5 steps per matrix"]["worst"] > 0.1


def test_cubic_steps_reach_one_from_where_they_say():
    x = torch.logspace(-5, 0, 1001, dtype=torch.float64)
    for a, b in application.cubic_schedule(1e-5, 15):
        x = a * x + b * x**3
    assert (x - 1).abs().max() < 1e-6


def test_overhead(tmp_path):
    report, figures = run(tmp_path, "overhead", "--periods", "2", "4", "--steps", "4", "--minutes", "0")
    assert {period: len(seconds) for period, seconds in figures["seconds"].items()} == {"None": 2, "2": 2, "4": 2}
    assert ("fits with" in report) == (figures["off"] <= 0.05)


def test_a_fit_finds_the_cost_of_an_application_and_says_how_far_it_is_off():
    c, off = overhead.fit({period: 1 + 3.9 / period for period in (10, 100, 1000)})
    assert c == pytest.approx(3.9)
    assert off < 1e-9
    assert overhead.fit({10: 1.39, 100: 1.3})[1] > 0.05
    assert [overhead.applications(period, 1000) for period in (10, 100, 1000)] == [100, 10, 1]


def test_sharing(tmp_path):
    _, figures = run(tmp_path, "sharing", "--processes", "1", "2", "--count", "4", "--width", "32", "--rounds", "1")
    cases = {(case["wrapper"], case["method"], case["processes"]): case for case in figures["cases"]}
    assert len(cases) == 8
    assert cases["DDP", "svd", 1]["decomposed"] == 4
    assert cases["DDP", "svd", 1]["bytes"] == 0
    for method in sharing.METHODS:
        assert cases["FSDP2", method, 2]["collectives"] > 0
        assert cases["FSDP2", method, 2]["bytes"] >= 4 * 32 * 32 * 4 // 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: application.main(0, 1, "small", None, Path()), "rounds must be a positive integer, got 0"),
        (lambda: overhead.main([10], 5, 1.0, 1, Path()), "steps must be at least the longest period 10, got 5"),
        (lambda: sharing.main([0], 1, 1, 1, Path()), "processes must be a positive integer, got 0"),
    ],
)
def test_errors_name_the_rule_and_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
