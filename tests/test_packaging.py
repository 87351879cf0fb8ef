"""What is installed: one import root, complete however it is built, beside anyone else's folders and packages."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import msign_lightning

ROOT = Path(__file__).parent.parent
FOLDERS = ("algorithms", "ablations", "recipes")
"""Installed inside of `msign_lightning`, where a checkout has links to them."""
SITE_PACKAGES = Path(torch.__file__).parent.parent


def run(*command: str | Path, cwd: Path, status: int = 0) -> str:
    """What a command prints, standard error included; its exit status must be as given."""
    of_these_tests = command[0] == sys.executable
    kept = {name: value for name, value in os.environ.items() if of_these_tests or not name.startswith("PYTHON")}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    result = subprocess.run(command, cwd=cwd, env=kept, text=True, check=False, **both)
    assert result.returncode == status, result.stdout
    return result.stdout


def export(folder: Path) -> Path:
    """A copy of what is built from, so that no build leaves anything in the checkout or finds what others left."""
    for name in ("msign_lightning", *FOLDERS):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(source: Path, folder: Path, *options: str) -> Path:
    """The wheel; without options by way of an sdist."""
    run(sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(export(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def editable(tmp_path_factory) -> Path:
    """The wheel that an editable installation of a copy of the checkout installs."""
    folder = tmp_path_factory.mktemp("editable")
    program = "import hatchling.build, sys; hatchling.build.build_editable(sys.argv[1])"
    run(sys.executable, "-c", program, folder, cwd=export(tmp_path_factory.mktemp("source")))
    (wheel,) = folder.glob("*.whl")
    return wheel


class Environment:
    """A virtual environment for wheels, on top of packages of the environment that the tests run in."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        (self.site_packages,) = folder.glob("lib/python*/site-packages")

    def pip(self, *arguments: str | Path) -> None:
        pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", self.python)
        run(*pip, *arguments, cwd=self.site_packages)

    def install(self, wheel: Path) -> None:
        self.pip("install", "--no-deps", "--no-index", wheel)

    def see_everything(self) -> None:
        """All packages, but no editable installation."""
        (self.site_packages / "zz.pth").write_text(str(SITE_PACKAGES))

    def see(self, requirement: str) -> None:
        """A distribution and what it needs in turn, as pip would install them."""
        done: set[tuple[str, str]] = set()
        todo = [Requirement(requirement)]
        while todo:
            wanted = todo.pop()
            (found, *_) = distributions(name=wanted.name, path=[str(self.site_packages), str(SITE_PACKAGES)])
            extras = {extra for extra in ("", *wanted.extras) if (found.name, extra) not in done}
            done |= {(found.name, extra) for extra in extras}
            for top in {Path(file).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
                if not (self.site_packages / top).exists():
                    (self.site_packages / top).symlink_to(SITE_PACKAGES / top)
            needed = [Requirement(text) for text in found.requires or ()]
            todo += [n for n in needed if any(n.marker is None or n.marker.evaluate({"extra": e}) for e in extras)]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed"))
    environment.install(wheel)
    environment.see_everything()
    return environment


@pytest.fixture(params=["wheel", "editable"])
def either(request, tmp_path_factory) -> Environment:
    """An environment with the wheel, or with an editable installation."""
    if request.param == "wheel":
        return request.getfixturevalue("installed")
    environment = Environment(tmp_path_factory.mktemp("development"))
    environment.install(request.getfixturevalue("editable"))
    environment.see_everything()
    return environment


# --- what a wheel holds -------------------------------------------------------------------------------------------


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_the_citation_names_the_version():
    assert f"\nversion: {msign_lightning.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_links_are_where_the_folders_are():
    for name in FOLDERS:
        assert (ROOT / "msign_lightning" / name).samefile(ROOT / name)


def test_a_wheel_made_from_the_sdist_carries_everything_under_one_name(wheel):
    expected = {
        str(Path("msign_lightning" if folder in FOLDERS else "") / file.relative_to(ROOT))
        for folder in ("msign_lightning", *FOLDERS)
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".yaml", ".json") or file.name == "py.typed"
    }
    carried = contents(wheel).keys()
    assert expected <= carried
    assert {name.split("/")[0] for name in carried if ".dist-info/" not in name} == {"msign_lightning"}


def test_a_checkout_without_links_gives_the_same_wheel(wheel, tmp_path):
    """Git on Windows writes text files in their place, unless it is told otherwise."""
    source = export(tmp_path)
    for name in FOLDERS:
        link = source / "msign_lightning" / name
        link.unlink()
        link.write_text(f"../{name}")
    (tmp_path / "wheel").mkdir()
    assert contents(build(source, tmp_path / "wheel", "--wheel")) == contents(wheel)


def test_what_an_older_build_left_does_not_come_along(wheel, tmp_path):
    source = export(tmp_path)
    for stale in ("build/lib/msign_lightning", "msign_lightning.egg-info", "dist", "msign_lightning/__pycache__"):
        (source / stale).mkdir(parents=True)
        (source / stale / "stale.py").write_text("")
    (tmp_path / "wheel").mkdir()
    assert contents(build(source, tmp_path / "wheel", "--wheel")) == contents(wheel)


# --- what pip installs with it ------------------------------------------------------------------------------------

TRAINS = """
import sys
import msign_lightning

assert not {"torch", "lightning"} & set(sys.modules)

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from msign_lightning import MSignCallback, StabilityMonitor

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))

    def training_step(self, batch):
        for layer in self.layers:
            batch = layer(batch)
        return batch.square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

trainer = Trainer(max_steps=4, accelerator="cpu", callbacks=[MSignCallback(2), StabilityMonitor({"stable_rank": 2})])
trainer.fit(Model(), torch.utils.data.DataLoader(torch.randn(8, 2, 8)))
assert trainer.global_step == 4
assert not {"tensorboard", "matplotlib", "optuna", "jsonargparse"} & set(sys.modules)
"""


def test_each_extra_brings_what_its_part_needs_and_a_missing_one_is_named(wheel, tmp_path):
    environment = Environment(tmp_path / "env")
    environment.install(wheel)

    def refused(module: str) -> str:
        """The extra that the last line of the error tells to install."""
        said = run(environment.python, "-m", f"msign_lightning.{module}", "--help", cwd=tmp_path, status=1)
        (extra,) = re.findall(r'pip install "msign-lightning\[(\w+)\]"$', said.splitlines()[-1])
        return extra

    def works(module: str) -> bool:
        return "usage" in run(environment.python, "-m", f"msign_lightning.{module}", "--help", cwd=tmp_path)

    environment.see("msign-lightning")
    run(environment.python, "-W", "ignore", "-c", TRAINS, cwd=tmp_path)
    assert refused("recipes.train") == "recipes"
    assert refused("recipes.composer_train") == "composer"
    assert refused("ablations") == "ablations"
    assert refused("algorithms.msign") == "composer"

    said = run(environment.python, "-m", "msign_lightning.cli", "inspect", "x", cwd=tmp_path, status=2)
    assert said == 'error: jsonargparse not installed: pip install "msign-lightning[checkpoints]"\n'

    environment.see("msign-lightning[checkpoints]")
    assert works("cli")

    environment.see("msign-lightning[recipes]")
    assert works("recipes.train")
    assert refused("ablations") == "ablations"

    environment.see("msign-lightning[ablations]")
    assert works("ablations")


# --- beside others ------------------------------------------------------------------------------------------------


def test_command_lines_answer_from_any_folder(either, hijacking):
    assert "{fit,validate,test,predict}" in run(
        either.python, "-m", "msign_lightning.recipes.train", "--help", cwd=hijacking
    )
    assert "{run,resume,report}" in run(either.python, "-m", "msign_lightning.ablations", "--help", cwd=hijacking)


@pytest.fixture
def hijacking(tmp_path) -> Path:
    """A working directory with folders of the user's own, named as ours."""
    for name in (*FOLDERS, "benchmarks", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the folder of the user')")
    return tmp_path


FOUNDRY = """
import catalogue

try:
    import algorithms
except ImportError as error:
    print(error)

def get(registry, name):
    return catalogue.create("llmfoundry", registry, entry_points=True).get(name)

print(get("algorithms", "msign")(period=7).__class__.__module__)
print(get("algorithms", "spike_no_more")().__class__.__module__)
print(get("callbacks", "stability_monitor")().__class__.__module__)
"""


@pytest.mark.composer
def test_llm_foundry_finds_ours_beside_folders_of_the_same_names(either, hijacking):
    """Its registries are those of `catalogue` over our entry points, and it runs where its YAML is."""
    found = run(either.python, "-W", "ignore", "-c", FOUNDRY, cwd=hijacking).splitlines()
    assert found == [
        "the folder of the user",
        "msign_lightning.algorithms.msign.msign",
        "msign_lightning.algorithms.spike_no_more.spike_no_more",
        "msign_lightning.algorithms.stability_monitor.stability_monitor",
    ]


@pytest.fixture(scope="module")
def torchtune(tmp_path_factory) -> Path:
    """A wheel that installs a package `recipes` which can't be imported, as torchtune's does."""
    file = tmp_path_factory.mktemp("torchtune") / "torchtune-0.6.1-py3-none-any.whl"
    texts = {
        "torchtune/__init__.py": "",
        "recipes/__init__.py": "raise ModuleNotFoundError('should not be imported')",
        "recipes/full_finetune.py": "",
        "torchtune-0.6.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: torchtune\nVersion: 0.6.1\n",
        "torchtune-0.6.1.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "torchtune-0.6.1.dist-info/RECORD"
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in texts.items():
            archive.writestr(name, text)
        archive.writestr(record, "".join(f"{name},,\n" for name in (*texts, record)))
    return file


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("ours", ["wheel", "editable"])
def test_torchtune_and_ours_leave_each_other_alone(request, torchtune, ours, order, tmp_path):
    environment = Environment(tmp_path / "env")
    for one in (request.getfixturevalue(ours), torchtune)[::order]:
        environment.install(one)
    theirs = {file: file.read_text() for file in (environment.site_packages / "recipes").glob("*.py")}
    assert len(theirs) == 2
    see_again = environment.site_packages / "zz.pth"
    environment.see_everything()
    program = "import torchtune, msign_lightning.recipes, msign_lightning.ablations; import recipes"
    said = run(environment.python, "-W", "ignore", "-c", program, cwd=tmp_path, status=1)
    assert said.endswith("ModuleNotFoundError: should not be imported\n")
    see_again.unlink()
    environment.pip("uninstall", "--yes", "msign-lightning")
    assert {file: file.read_text() for file in (environment.site_packages / "recipes").glob("*.py")} == theirs
    run(environment.python, "-c", "import torchtune", cwd=tmp_path)
    run(environment.python, "-c", "import msign_lightning", cwd=tmp_path, status=1)


# --- for type checkers --------------------------------------------------------------------------------------------

TYPED = """
from torch import nn

import msign_lightning
from msign_lightning import Restoration, select_targets
from msign_lightning.ablations import load
from msign_lightning.recipes.transformer import Transformer, TransformerConfig

reveal_type(msign_lightning.stable_rank)
reveal_type(Restoration(nn.Linear(4, 4)).apply())
reveal_type(select_targets(nn.Linear(4, 4)))
reveal_type(load("quick"))
reveal_type(Transformer(TransformerConfig(vocab_size=8)))
"""


def test_mypy_sees_the_types_of_every_part(installed, tmp_path):
    (tmp_path / "user.py").write_text(TYPED)
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", installed.python)
    said = run(*mypy, "user.py", cwd=tmp_path)
    revealed = re.findall(r'Revealed type is "(.*)"', said)
    assert [text.split(".", 1)[0] if "Tensor" in text else text for text in revealed][1:] == [
        "msign_lightning.restoration.Report",
        "list[msign_lightning.targets.Target]",
        "msign_lightning.ablations.study.Study",
        "msign_lightning.recipes.transformer.Transformer",
    ]
    assert revealed[0].endswith("-> torch._tensor.Tensor")
