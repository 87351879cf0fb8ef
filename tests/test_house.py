"""The house itself: which module may import which, and what a wheel carries."""

import ast
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("msign_lightning", "algorithms", "ablations", "recipes")

MAY_IMPORT = {
    "msign_lightning": set(),
    "algorithms": {"msign_lightning"},
    "recipes": {"msign_lightning", "algorithms"},
    "ablations": {"recipes", "msign_lightning"},
}
"""Which of our packages a package may import, besides itself."""

LAYERS = (
    ("polar_express",),
    ("linalg", "collapse"),
    ("targets",),
    ("matrices", "settings"),
    ("restoration", "spike_no_more", "spectrum", "jacobian"),
    ("alignment",),
    ("monitor",),
    ("tensorboard",),
    ("shells",),
    ("callbacks", "transformers"),
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
    ours = {name for name in names if name.split(".")[0] in PACKAGES}
    parts = [name.split(".") for name in ours]
    # The other packages are installed inside of the library.
    return {".".join(p[1:] if p[0] == "msign_lightning" and p[1] in PACKAGES else p) for p in parts}


@pytest.mark.parametrize("package", [p for p in PACKAGES if list((ROOT / p).rglob("*.py"))])
def test_packages_import_in_one_direction(package):
    allowed = MAY_IMPORT[package] | {package}
    for file in (ROOT / package).rglob("*.py"):
        imported = {name.split(".")[0] for name in our_imports(file)}
        assert imported <= allowed, f"{file.relative_to(ROOT)} imports {imported - allowed}"


def test_modules_of_the_library_import_only_downwards():
    layer_of = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    modules = {file.stem for file in (ROOT / "msign_lightning").glob("*.py")} - {"__init__", "_version"}
    assert modules == set(layer_of)
    for module, layer in layer_of.items():
        imported = {name.split(".")[1] for name in our_imports(ROOT / "msign_lightning" / f"{module}.py")}
        upwards = {name for name in imported if layer_of[name] >= layer}
        assert not upwards, f"{module} imports {upwards}"


def test_wheel_installs_into_an_empty_environment_and_carries_everything(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    carried = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(file.relative_to(ROOT) if package == "msign_lightning" else "msign_lightning" / file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.suffix in (".py", ".yaml")
    }
    assert expected | {"msign_lightning/py.typed"} <= carried
    assert not [name for name in carried if name.split("/")[0] != "msign_lightning" and ".dist-info/" not in name]

    environment = tmp_path / "env"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    # PyTorch and the other dependencies come from this environment; the editable install of it does not come along.
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(str(Path(torch.__file__).parent.parent))
    program = "import msign_lightning as m, msign_lightning.recipes.train; print(m.MSignCallback(period=7), m.__file__)"
    result = subprocess.run([python, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert str(site_packages) in result.stdout
