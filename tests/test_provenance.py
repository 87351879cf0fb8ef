"""Every figure says where it comes from."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from msign_lightning import __version__
from msign_lightning.recipes import provenance

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REPORTS = [file for file in sorted(RESULTS.rglob("*.md")) if file.name != "README.md"]


def test_a_line_names_everything_that_a_figure_may_depend_on():
    line = provenance.provenance("NVIDIA H100")
    version = re.escape(f"msign-lightning {__version__}")
    date, python = r"\d{4}-\d\d-\d\d", re.escape("Python " + sys.version.split()[0])
    rest = rf"torch {re.escape(torch.__version__)}, NVIDIA H100, {re.escape(provenance.processor())} \(\d+ cores?\)"
    assert re.fullmatch(rf"{version}, commit [^,]+, {date}, {python}, {rest}", line)
    assert "NVIDIA" not in provenance.provenance()


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_that_of_the_checkout_and_of_no_other(tmp_path, monkeypatch):
    file = tmp_path / "recipes" / "provenance.py"
    file.parent.mkdir()
    shutil.copy(provenance.__file__, file)
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert provenance.commit() == "none"  # no repository

    git(tmp_path, "init", "--quiet")
    (tmp_path / "other.txt").write_text("")
    git(tmp_path, "add", "other.txt")
    git(tmp_path, "commit", "--quiet", "--message", "somebody else's")
    assert provenance.commit() == "none"  # an environment in somebody's repository

    git(tmp_path, "add", "recipes")
    git(tmp_path, "commit", "--quiet", "--message", "ours")
    assert provenance.commit() == git(tmp_path, "rev-parse", "--short=10", "HEAD")
    (tmp_path / "other.txt").write_text("changed")
    assert provenance.commit() == git(tmp_path, "rev-parse", "--short=10", "HEAD") + " with changes"

    monkeypatch.setenv("PATH", "")
    assert provenance.commit() == "none"  # no Git


def test_there_are_results():
    assert len(REPORTS) >= 9


@pytest.mark.parametrize("report", REPORTS, ids=lambda file: str(file.relative_to(RESULTS)))
def test_a_committed_report_says_where_it_comes_from(report):
    first = " ".join(report.read_text().splitlines()[:6])
    for fact in (r"msign-lightning \d+\.\d+", r"[Cc]ommit ", r"\d{4}-\d\d-\d\d", "Python", "torch", "processor|cores?"):
        assert re.search(fact, first), fact


def test_a_committed_figure_is_beside_its_report_or_in_the_list():
    listed = (RESULTS / "README.md").read_text()
    for figure in [*RESULTS.rglob("*.png"), *(ROOT / "recipes").rglob("*.png")]:
        reports = figure.with_suffix(".md"), figure.parent / "report.md"
        assert any(report.is_file() for report in reports) or f"/{figure.name}" in listed, figure
