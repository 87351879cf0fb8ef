"""The house itself: which module may import which."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "msign_lightning": set(),
    "algorithms": {"msign_lightning"},
    "recipes": {"msign_lightning", "algorithms"},
    "ablations": {"recipes", "msign_lightning"},
    "benchmarks": {"ablations", "recipes", "msign_lightning"},
}
"""Which of our packages a package may import, besides itself."""

LAYERS = (
    ("_extras", "_version", "checkpoint_files", "polar_express"),
    ("linalg", "collapse", "recognition"),
    ("targets",),
    ("matrices", "settings"),
    ("sharding",),
    ("restoration", "spike_no_more", "spectrum", "jacobian"),
    ("alignment", "cut_check", "checkpoints"),
    ("monitor",),
    ("tensorboard",),
    ("shells",),
    ("callbacks", "transformers", "cli"),
)
"""Modules of `msign_lightning`, lowest first: each may import only what stands below it."""


def our_imports(file: Path) -> set[str]:
    """Dotted names of what a file imports from our packages, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name for name in names if name.split(".")[0] in MAY_IMPORT}
    parts = [name.split(".") for name in ours]
    # The other packages are installed inside of the library.
    return {".".join(p[1:] if p[0] == "msign_lightning" and p[1] in MAY_IMPORT else p) for p in parts}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_in_one_direction(package):
    allowed = MAY_IMPORT[package] | {package}
    files = list((ROOT / package).rglob("*.py"))
    assert files, f"{package} has vanished"
    for file in files:
        imported = {name.split(".")[0] for name in our_imports(file)}
        assert imported <= allowed, f"{file.relative_to(ROOT)} imports {imported - allowed}"


def test_modules_of_the_library_import_only_downwards():
    layer_of = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    modules = {file.stem for file in (ROOT / "msign_lightning").glob("*.py")} - {"__init__"}
    assert modules == set(layer_of)
    for module, layer in layer_of.items():
        imported = {name.split(".")[1] for name in our_imports(ROOT / "msign_lightning" / f"{module}.py")}
        upwards = {name for name in imported if layer_of[name] >= layer}
        assert not upwards, f"{module} imports {upwards}"
