"""What the site shows besides the pages of this folder: committed results where they are, and the API.

MkDocs calls the functions `on_…`. The API is read from the sources, which are not imported: a page for each package,
first its public names, then every module with what it documents. Nothing has to be listed by hand.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "msign_lightning": "What happens to weights, and what is measured. Framework-free but for the callbacks.",
    "msign_lightning.algorithms": "The same for Composer. Extra `composer`.",
    "msign_lightning.recipes": "Models, data and settings that people train. Extra `recipes`.",
    "msign_lightning.ablations": "Ablation studies. Extra `ablations`.",
}
"""What is installed, by dotted name."""
RESULTS = (
    "benchmarks/results/**/*.md",
    "benchmarks/results/**/*.png",
    "benchmarks/results/**/*.csv",
    "recipes/**/*.png",
)
"""Committed results, which pages name by their path from here, as on any other view of the repository."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the results and the pages of the API."""
    for pattern in RESULTS:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for package, purpose in PACKAGES.items():
        files.append(File.generated(config, f"api/{package}.md", content=api_page(package, purpose)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links out of this folder lead to what has been added from there."""
    return markdown if "/" in page.file.src_uri else re.sub(r"\]\(\.\./", "](", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """What docstrings write for Sphinx, as plain text."""
    return html.replace(":math:<code>", "<code>").replace("::</p>", ":</p>")


def api_page(package: str, purpose: str) -> str:
    """Markdown that mkdocstrings fills in."""
    folder = ROOT / package.replace(".", "/")
    public = exports(folder / "__init__.py")
    lines = [f"# {package}", purpose]
    if public:
        lines += ["| public name | |", "|---|---|"]
        lines += [row(package, name, module) for name, module in public.items()]
    lines = ["\n\n".join(lines[:2]), "\n".join(lines[2:])]
    for module in modules(package):
        lines += [f"## {module}", f"::: {module}"]
    return "\n\n".join(lines) + "\n"


def row(package: str, name: str, module: str) -> str:
    """A line of the table of public names; what has no docstring has no place to lead to."""
    text = summary(module, name)
    link = f"[`{package}.{name}`][{module}.{name}]" if text else f"`{package}.{name}`, in `{module}`"
    return f"| {link} | {text} |"


def exports(file: Path) -> dict[str, str]:
    """Name → module, of what a package offers under its own name; in the order of its imports."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if node.module and node.module.startswith("msign_lightning.")]
    return {
        alias.name: definition(node.module, alias.name)
        for node in ours
        for alias in node.names
        if node.module and not node.module.rpartition(".")[2].startswith("_")
    }


def definition(module: str, name: str) -> str:
    """The module in which a name is defined that a package has imported."""
    folder = ROOT / module.replace(".", "/")
    return exports(folder / "__init__.py")[name] if folder.is_dir() else module


def summary(module: str, name: str) -> str:
    """First line of a docstring; nothing for a constant."""
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").replace("|", r"\|")
    return ""


def modules(package: str) -> list[str]:
    """Dotted names of the modules of a package and of the folders in it, but of the other packages'."""
    folder = ROOT / package.replace(".", "/")
    files = [*folder.glob("*.py"), *(() if package == "msign_lightning" else folder.glob("*/*.py"))]
    names = [file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for file in sorted(files)]
    return [name for name in names if not name.rpartition(".")[2].startswith("_")]
