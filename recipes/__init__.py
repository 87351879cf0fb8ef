"""Models, data and settings that people train: from a laptop to the four configurations of MSign (arXiv 2602.01734)."""

from pathlib import Path

FOLDER = Path(__file__).parent


def recipe_file(name: str) -> Path:
    """The file of a recipe of this package, by its name; any other name is taken for a path."""
    shipped = FOLDER / f"{name}.yaml"
    return shipped if shipped.is_file() else Path(name)


def recipe_names() -> list[str]:
    """Names of all recipes of this package."""
    return sorted(str(file.relative_to(FOLDER).with_suffix("")) for file in FOLDER.rglob("*.yaml"))
