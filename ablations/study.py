"""What a study is: methods, factors and seeds; when a run counts as stable; and what a run gave."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from msign_lightning.ablations.cell import Cell, Criterion, Group, Outcome, plain, show
from msign_lightning.ablations.methods import ARMS, Arm, Value
from msign_lightning.ablations.reader import Node, Source, StudyError, Where, near, read
from msign_lightning.recipes import recipe_file, recipe_names

__all__ = [
    "Bisect",
    "Cell",
    "Criterion",
    "Grid",
    "Group",
    "Outcome",
    "Sampler",
    "Study",
    "StudyError",
    "Tpe",
    "Value",
    "Variant",
    "changes",
    "load",
]

MIN_STEPS = 20
SHORT_NAMES = {
    "lr": "model.optimizer.lr",
    "period": "msign.period",
    "targets": "msign.targets",
    "rule": "msign.rule",
}
"""Factors with a name of their own → the recipe setting that they are."""
RESERVED = {
    "seed_everything": "seeds",
    "data.seed": "seeds",
    "trainer.max_steps": "steps",
    "trainer.max_epochs": "steps",
    "use_msign": "the arm",
    "msign.stop": "the arm",
    "trainer.logger": "the study",
    "trainer.callbacks": "the arm",
    "trainer.default_root_dir": "the study",
    "trainer.enable_checkpointing": "the study",
}
"""Recipe settings that a study file can't set → what sets them."""


class Grid(NamedTuple):
    """Every arm with every combination of the factors that concern it, "lr" among them, and of seeds."""


class Bisect(NamedTuple):
    """Bisection of the logarithm of the learning rate, for the highest stable one of each group.

    Attributes:
        low: Lowest learning rate.
        high: Highest learning rate.
        resolution: Width at which an interval is fine enough, in decades.
        runs: No more runs than this for a group and seed.
    """

    low: float
    high: float
    resolution: float = 0.1
    runs: int = 6


class Tpe(NamedTuple):
    """A search for the lowest validation loss over arms, their factors, and learning rates from `low` to `high`.

    Attributes:
        low: Lowest learning rate.
        high: Highest learning rate.
        trials: Number of runs.
        seed: Seed of the search.
    """

    low: float
    high: float
    trials: int = 30
    seed: int = 0


Sampler = Grid | Bisect | Tpe


class Variant(NamedTuple):
    """An arm of a study's own: another arm with further recipe settings."""

    base: str
    settings: Mapping[str, Value]


@dataclass(frozen=True)
class Study:
    """What is to be run.

    Args:
        name: Its name in a storage.
        recipe: Name or file of the recipe, as for `recipes.train.load_recipe`.
        steps: Optimizer steps of each run.
        arms: Names of methods, of `ARMS` or `variants`.
        factors: Factor → its values. A factor is "lr", "period", "targets", "rule" or the dotted name of a recipe
            setting. Arms that it does not concern are run without it.
        seeds: Seeds of initialisation and data, the same for all arms.
        settings: Recipe settings of all cells, by factor names.
        criterion: When a run counts as stable.
        sampler: How cells are chosen.
        prune: Whether to stop runs that are worse than the median; only for `Tpe`, since it would bias comparisons.
        variants: Arms of the study's own.
        source: Where the study was read.

    Raises:
        StudyError: The study can't be run. What only the recipe knows is checked by `ablations.trial.check`.
    """

    name: str
    recipe: str
    steps: int
    arms: Sequence[str]
    factors: Mapping[str, Sequence[Value]]
    seeds: Sequence[int]
    settings: Mapping[str, Value] = field(default_factory=dict)
    criterion: Criterion = Criterion()  # noqa: RUF009 (immutable)
    sampler: Sampler = Grid()  # noqa: RUF009 (immutable)
    prune: bool = False
    variants: Mapping[str, Variant] = field(default_factory=dict)
    source: Source | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.steps < MIN_STEPS:
            raise self.error(f"steps must be at least {MIN_STEPS}, got {self.steps}", "steps")
        if not recipe_file(self.recipe).is_file():
            hint = near(self.recipe, recipe_names())
            raise self.error(f"recipe must be the name of a recipe or a file, got {self.recipe!r}{hint}", "recipe")
        self._check_arms()
        self._check_unique("seeds", "seed", self.seeds, "seeds")
        for i, seed in enumerate(self.seeds):
            if not 0 <= seed < 2**32:
                raise self.error(f"seeds must be between 0 and 2³² - 1, got {seed}", "seeds", i)
        self._check_settings(self.settings)
        self._check_factors()
        self._check_periods()
        self._check_criterion()
        self._check_sampler()

    def error(self, message: str, *where: str | int) -> StudyError:
        """The error, with file and line in front if the study was read from a file."""
        return StudyError(message) if self.source is None else self.source.error(message, *where)

    def arm(self, name: str) -> Arm:
        """The method of one of the study's arms."""
        if name not in self.variants:
            return ARMS[name]
        variant = self.variants[name]
        base = ARMS[variant.base]
        settings = {setting_of(factor): value for factor, value in variant.settings.items()}
        return base._replace(settings={**base.settings, **settings})

    def groups(self) -> list[Group]:
        """Every arm with every combination of the factors that concern it, but "lr"."""
        groups = []
        for arm in self.arms:
            concerned = self.arm(arm).concerned_by
            names = sorted(name for name in self.factors if name != "lr" and concerned(setting_of(name)))
            values = itertools.product(*(self.factors[name] for name in names))
            groups += [Group(arm, tuple(zip(names, combination, strict=True))) for combination in values]
        return groups

    def cells(self) -> list[Cell]:
        """All cells of a grid, one seed after the other.

        Raises:
            ValueError: The sampler is another, which chooses cells as it goes.
        """
        if not isinstance(self.sampler, Grid):
            raise ValueError(f"sampler must be grid for a study to have all its cells, got {_name(self.sampler)}")
        rates = [float(lr) for lr in self.factors["lr"]]  # type: ignore[arg-type]
        return [group.cell(lr, seed) for seed in self.seeds for group in self.groups() for lr in rates]

    def fingerprint(self) -> dict[str, Any]:
        """What must not change once the study has started, in plain values for JSON, the recipe's file included."""
        return {
            "recipe": {"name": self.recipe, "settings": read(recipe_file(self.recipe)).value},
            "steps": self.steps,
            "arms": plain(self.arms),
            "variants": {name: plain(variant._asdict()) for name, variant in self.variants.items()},
            "factors": plain(self.factors),
            "seeds": plain(self.seeds),
            "settings": plain(self.settings),
            "stability": self.criterion._asdict(),
            "sampler": {"name": _name(self.sampler), **self.sampler._asdict()},
            "prune": self.prune,
        }

    def _check_arms(self) -> None:
        self._check_unique("arms", "arm", self.arms, "arms")
        for i, name in enumerate(self.arms):
            if name not in ARMS and name not in self.variants:
                raise self.error(f"unknown arm {name!r}{near(name, ARMS)}", "arms", i)
        for name, variant in self.variants.items():
            where = ("arms", list(self.arms).index(name)) if name in self.arms else ("arms",)
            if not name.isprintable() or not name.strip():
                raise self.error(f"the name of a variant must be printable and not empty, got {name!r}", *where)
            if name in ARMS:
                raise self.error(f"the name of a variant must not be that of an arm, got {name!r}", *where)
            if variant.base not in ARMS:
                raise self.error(f"unknown arm {variant.base!r}{near(variant.base, ARMS)}", *where, "base")
            self._check_settings(variant.settings, *where)

    def _check_settings(self, settings: Mapping[str, Value], *where: str | int) -> None:
        for name in settings:
            self._check_name(name, *where, "settings", name)
            if name == "lr":
                raise self.error("lr must be a factor, not a setting", *where, "settings", name)

    def _check_factors(self) -> None:
        set_by_settings = {setting_of(name) for name in self.settings}
        arms = [self.arm(arm) for arm in self.arms]
        for name, values in self.factors.items():
            self._check_name(name, "factors", name)
            self._check_unique(name, "value", values, "factors", name)
            setting = setting_of(name)
            if setting in set_by_settings:
                raise self.error(f"{name} must be a factor or a setting, not both", "factors", name)
            if not any(arm.concerned_by(setting) for arm in arms):
                raise self.error(f"the factor {name} concerns none of the arms {list(self.arms)}", "factors", name)
        for i, lr in enumerate(self.factors.get("lr", ())):
            if not isinstance(lr, (int, float)) or isinstance(lr, bool) or not 0 < lr < math.inf:
                raise self.error(f"lr must be positive and finite, got {lr!r}", "factors", "lr", i)

    def _check_periods(self) -> None:
        """That each arm which restores does so at least once, and not in the last P steps."""
        where: Where = ("factors", "period") if "period" in self.factors else ("settings", "period")
        periods = self.factors.get("period", [self.settings["period"]] if "period" in self.settings else [])
        for i, period in enumerate(periods):
            if not isinstance(period, int) or isinstance(period, bool) or period < 1:
                raise self.error(f"period must be a positive integer, got {period!r}", *where, i)
            for arm in self.arms:
                until = self.arm(arm).until if self.arm(arm).concerned_by("msign.period") else None
                if until is not None and last_application(self.steps, period, until) < period:
                    raise self.error(
                        f"steps must be enough for {arm} to restore once before the last period of {period} steps"
                        f"{'' if until == 1 else f' and within {until:g} of the run'}, got {self.steps}",
                        *where,
                        i,
                    )

    def _check_criterion(self) -> None:
        for name, value in self.criterion._asdict().items():
            if value is not None and not (0 <= value < math.inf and (value > 0 or name == "spikes_per_10k")):
                raise self.error(f"{name} must be positive and finite, got {value}", "stability", name)

    def _check_sampler(self) -> None:
        sampler = self.sampler
        if self.prune and not isinstance(sampler, Tpe):
            raise self.error(f"prune must be false with {_name(sampler)}: it would bias comparisons, got true", "prune")
        if isinstance(sampler, Grid):
            if "lr" not in self.factors:
                raise self.error("factors must hold lr for a grid", "factors")
            return
        if "lr" in self.factors:
            rule = f"lr must not be a factor with {_name(sampler)}, which has low and high"
            raise self.error(rule, "factors", "lr")
        if not 0 < sampler.low < sampler.high < math.inf:
            got = f"{sampler.low} and {sampler.high}"
            raise self.error(f"low and high must be positive and finite, low below high, got {got}", "sampler", "low")
        for name, least in {"runs": 1, "trials": 1, "seed": 0}.items():
            value = getattr(sampler, name, least)
            if value < least:
                raise self.error(f"{name} must be at least {least}, got {value}", "sampler", name)
        if isinstance(sampler, Bisect) and not 0 < sampler.resolution <= math.log10(sampler.high / sampler.low):
            rule = "resolution must be positive and at most the decades from low to high"
            raise self.error(f"{rule}, got {sampler.resolution}", "sampler", "resolution")
        if isinstance(sampler, Tpe) and sampler.seed >= 2**31:
            raise self.error(f"seed must be below 2³¹, got {sampler.seed}", "sampler", "seed")

    def _check_unique(self, what: str, item: str, values: Sequence[Value], *where: str | int) -> None:
        if not values:
            raise self.error(f"{what} must hold at least one {item}, got []", *where)
        seen: set[Value] = set()
        for i, value in enumerate(values):
            same = show(value) if isinstance(value, tuple) else value
            if same in seen:
                raise self.error(f"{what} must not hold {show(value)} twice", *where, i)
            seen.add(same)

    def _check_name(self, name: str, *where: str | int) -> None:
        setting = setting_of(name)
        if setting in RESERVED:
            raise self.error(f"{name} must not be a factor or a setting: {RESERVED[setting]} sets it", *where)
        if name not in SHORT_NAMES and "." not in name:
            known = f"known: {', '.join(SHORT_NAMES)}, and recipe settings by their dotted names"
            raise self.error(f"unknown factor {name!r}{near(name, SHORT_NAMES)}; {known}", *where)
        for short, long in SHORT_NAMES.items():
            if setting == long and name != short:
                raise self.error(f"{name} must be written {short}", *where)


def setting_of(factor: str) -> str:
    """The recipe setting that a factor is: "lr" → "model.optimizer.lr"."""
    return SHORT_NAMES.get(factor, factor).replace(".init_args.", ".")


def last_application(steps: int, period: int, until: float) -> int:
    """Last step of a run at which a method restores: within its share `until`, and not in the last period."""
    return min(int(until * steps), steps - period)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints: ["steps: 300 → 500", "factors.lr: [0.003] → [0.003, 0.03]"]."""
    before, after = _flat(old), _flat(new)
    names = dict.fromkeys([*before, *after])
    missing = "nothing"
    return [
        f"{name}: {before.get(name, missing)} → {after.get(name, missing)}"
        for name in names
        if before.get(name, missing) != after.get(name, missing)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: json.dumps(value)}
    return flat


def load(path: str | Path) -> Study:
    """Reads a study file, or by its name a study of this package, such as "quick".

    Raises:
        StudyError: The study can't be read or run: with file, line, rule and the value received.
    """
    file = _find(Path(path))
    root = read(file)
    required = ("recipe", "steps", "arms", "factors", "seeds")
    study = root.mapping(required, ("settings", "stability", "sampler", "prune"))
    arms, variants = _arms(study["arms"])
    criterion = study["stability"].mapping((), Criterion._fields) if "stability" in study else {}
    return Study(
        name=file.stem,
        recipe=study["recipe"].text(),
        steps=study["steps"].integer(),
        arms=tuple(arms),
        factors={
            name: tuple(n.number() if name == "lr" else n.setting() for n in values.sequence())
            for name, values in study["factors"].mapping().items()
        },
        seeds=tuple(seed.integer() for seed in study["seeds"].sequence()),
        settings=_settings(study.get("settings")),
        criterion=Criterion(**{name: node.number() for name, node in criterion.items()}),
        sampler=_sampler(study["sampler"]) if "sampler" in study else Grid(),
        prune="prune" in study and study["prune"].boolean(),
        variants=variants,
        source=root.source,
    )


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    shipped = {file.stem: file for file in (Path(__file__).parent / "studies").glob("*.yaml")}
    if str(path) in shipped:
        return shipped[str(path)]
    known = ", ".join(sorted(shipped))
    raise StudyError(f"no study file {str(path)!r}{near(path.stem, shipped)}; studies of this package: {known}")


def _settings(node: Node | None) -> dict[str, Value]:
    return {} if node is None else {name: value.setting() for name, value in node.mapping().items()}


def _arms(node: Node) -> tuple[list[str], dict[str, Variant]]:
    names: list[str] = []
    variants: dict[str, Variant] = {}
    for entry in node.sequence():
        if isinstance(entry.value, dict):
            parts = entry.mapping(("name", "base", "settings"), ())
            names.append(parts["name"].text())
            variants[names[-1]] = Variant(parts["base"].text(), _settings(parts["settings"]))
        else:
            names.append(entry.text())
    return names, variants


def _sampler(node: Node) -> Sampler:
    kinds: dict[str, type[Sampler]] = {_name(kind): kind for kind in (Grid, Bisect, Tpe)}
    named = node if isinstance(node.value, str) else node.mapping(["name"])["name"]
    name = named.text()
    if name not in kinds:
        raise named.error(f"must be one of {', '.join(kinds)}")
    kind = kinds[name]
    if isinstance(node.value, str):
        node = node._replace(value={"name": name})
    required = [part for part in kind._fields if part not in kind._field_defaults]
    parts = node.mapping(["name", *required], kind._field_defaults)
    types = get_type_hints(kind)
    values: dict[str, Any] = {
        part: node.integer() if types[part] is int else node.number() for part, node in parts.items() if part != "name"
    }
    return kind(**values)


def _name(sampler: Sampler | type[Sampler]) -> str:
    """A sampler's name in study files."""
    kind = sampler if isinstance(sampler, type) else type(sampler)
    return kind.__name__.lower()
