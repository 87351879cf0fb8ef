"""What the pages, the README and those of the algorithms show: code that imports, and runs where it can."""

import ast
import importlib
import re
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from msign_lightning import Restoration
from msign_lightning.ablations import load

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "algorithms").glob("*/README.md"))]
OPTIONAL = ("composer", "transformers")
"""What a page may import that is not installed everywhere."""


def blocks(page: Path, language: str) -> list[str]:
    """The code of a page, without what encloses it."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_all_that_a_page_imports_is_there(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if not isinstance(node, ast.ImportFrom):
                continue
            needs_composer = node.module.startswith("msign_lightning.algorithms")
            if find_spec(node.module.split(".")[0]) is None or (needs_composer and find_spec("composer") is None):
                assert needs_composer or node.module.split(".")[0] in OPTIONAL
                continue
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.fixture
def program(tmp_path, monkeypatch) -> dict[str, object]:
    """What the code of a page finds: a model, its optimizer, and batches."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, dropout=0) for _ in range(2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return {"model": model, "optimizer": optimizer, "batches": [torch.randn(2, 4, 8) for _ in range(5)]}


@pytest.mark.parametrize("name", ["pytorch", "fabric", "monitor"])
def test_a_page_runs_from_top_to_bottom(name, program, capsys):
    for code in blocks(ROOT / "docs" / f"{name}.md", "python"):
        exec(compile(code, name, "exec"), program)
    restoration = program.get("restoration")
    if isinstance(restoration, Restoration):
        assert restoration.steps == [5]
    else:
        assert name == "monitor"
        assert program["monitor"].steps == 5


def test_the_page_on_targets_proves_the_cuts_of_its_model(program):
    program["input_ids"] = program["batches"][0]
    for code in blocks(ROOT / "docs" / "targets.md", "python"):
        exec(compile(code, "targets", "exec"), program)
    assert program["proved"]
    assert all(program["proved"].values())


def test_the_names_for_llm_foundry_are_registered():
    (code,) = blocks(ROOT / "docs" / "llm_foundry.md", "yaml")
    for group, names in yaml.safe_load(code).items():
        registered = {point.name for point in entry_points(group=f"llmfoundry_{group}")}
        assert names.keys() == registered


def test_the_study_on_the_page_is_the_one_that_comes_along(tmp_path):
    (code,) = blocks(ROOT / "docs" / "ablations.md", "yaml")
    (tmp_path / "quick.yaml").write_text(code)
    assert load(str(tmp_path / "quick.yaml")).fingerprint() == load("quick").fingerprint()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_in_the_repository(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_readme_is_short_and_begins_with_a_picture_and_two_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert text.index("![") < text.index("make demo") < text.index("make test") < text.index("\n## ")
