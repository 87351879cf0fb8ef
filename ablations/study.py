"""What a study is: a program, methods, factors and seeds; and when a run counts as stable."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from msign_lightning.ablations.cell import WINDOW, Cell, Criterion, Group, Outcome, plain, show
from msign_lightning.ablations.methods import ARMS, PLAIN, Arm, Value
from msign_lightning.ablations.reader import Node, Source, StudyError, Where, near, read
from msign_lightning.recipes import recipe_file, recipe_names

MOST_STEPS = 10**9
SHORT_NAMES = {"period": "msign.period", "targets": "msign.targets", "rule": "msign.rule"}
"""Factors with a name of their own → the setting that they are; and "lr", which `Study.lr` names."""
RESERVED = {
    **dict.fromkeys(("key", "group", "stable", "clipped_loss", *Outcome._fields), "the outcome"),
    "seed": "seeds",
    "seed_everything": "seeds",
    "data.seed": "seeds",
    "steps": "steps",
    "trainer.max_steps": "steps",
    "trainer.max_epochs": "steps",
    "arm": "the arm",
    "use_msign": "the arm",
    "msign.stop": "the arm",
    "trainer.callbacks": "the arm",
    "folder": "the study",
    "trainer.logger": "the study",
    "trainer.default_root_dir": "the study",
    "trainer.enable_checkpointing": "the study",
}
"""Settings that a study file can't set → what sets them."""


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
SAMPLERS: dict[str, type[Sampler]] = {kind.__name__.lower(): kind for kind in (Grid, Bisect, Tpe)}


class Variant(NamedTuple):
    """An arm of a study's own: another arm with further settings."""

    base: str
    settings: Mapping[str, Value]


class _File(NamedTuple):
    """What a study file holds."""

    program: str
    steps: int
    arms: Node
    factors: dict[str, tuple[Value, ...]]
    seeds: tuple[int, ...]
    settings: dict[str, Value] = {}  # noqa: RUF012 (never changed)
    stability: Criterion = Criterion()
    sampler: Node | None = None
    prune: bool = False
    metric: str = "loss/val"
    lr: str = "model.optimizer.lr"
    smoke: Node | None = None


class _Named(NamedTuple):
    """An arm of a study file's own."""

    name: str
    settings: dict[str, Value]
    base: str = PLAIN


@dataclass(frozen=True)
class Study:
    """What is to be run.

    Args:
        name: Its name in a storage.
        program: What a run is: the name of a recipe of this package; a configuration file of a `LightningCLI`; or
            "package.module:name" of a `LightningCLI` or of a function `objective(settings, progress)`.
        steps: Optimizer steps of each run.
        arms: Names of methods, of `ARMS` or `variants`.
        factors: Factor → its values. A factor is "lr", "period", "targets", "rule" or the dotted name of a setting of
            the program. Arms that it does not concern are run without it.
        seeds: Seeds of initialisation and data, the same for all arms.
        settings: Settings of all cells, by factor names.
        stability: When a run counts as stable.
        sampler: How cells are chosen.
        prune: Whether to stop runs that are worse than the median; only for `Tpe`, since it would bias comparisons.
        metric: Name of the validation loss among what the program's validation gives; lower is better.
        lr: Dotted name of the setting that is the peak learning rate.
        variants: Arms of the study's own.
        source: Where the study was read.

    Raises:
        StudyError: The study can't be run. What only the program knows is checked by `ablations.program.check`.
    """

    name: str
    program: str
    steps: int
    arms: Sequence[str]
    factors: Mapping[str, Sequence[Value]]
    seeds: Sequence[int]
    settings: Mapping[str, Value] = field(default_factory=dict)
    stability: Criterion = Criterion()  # noqa: RUF009 (immutable)
    sampler: Sampler = Grid()  # noqa: RUF009 (immutable)
    prune: bool = False
    metric: str = "loss/val"
    lr: str = "model.optimizer.lr"
    variants: Mapping[str, Variant] = field(default_factory=dict)
    source: Source | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.name.isprintable() or "/" in self.name or self.name.strip(". ") == "" or len(self.name) > 100:
            raise self.error(f"the name of a study must be usable as that of a folder, got {self.name!r}")
        if not WINDOW <= self.steps <= MOST_STEPS:
            raise self.error(f"steps must be between {WINDOW} and {MOST_STEPS:,}, got {self.steps:.6g}", "steps")
        if not self.is_object and not recipe_file(self.program).is_file():
            rule = "program must be the name of a recipe, a file, or package.module:name"
            raise self.error(f"{rule}, got {self.program!r}{near(self.program, recipe_names())}", "program")
        self._check_arms()
        self._check_unique("seeds", "seed", self.seeds, "seeds")
        for i, seed in enumerate(self.seeds):
            if not 0 <= seed < 2**32:
                raise self.error(f"seeds must be between 0 and 2³² - 1, got {seed}", "seeds", i)
        self._check_settings(self.settings)
        self._check_factors()
        self._check_periods()
        for name, value in self.stability._asdict().items():
            if value is not None and not (0 <= value < math.inf and (value > 0 or name == "spikes_per_10k")):
                raise self.error(f"{name} must be positive and finite, got {value}", "stability", name)
        self._check_sampler()

    @property
    def is_object(self) -> bool:
        """Whether the program is something to import, not a file."""
        return re.fullmatch(r"[A-Za-z_][\w.]*:\w+", self.program) is not None

    def error(self, message: str, *where: str | int) -> StudyError:
        """The error, with file and line in front if the study was read from a file."""
        return StudyError(message) if self.source is None else self.source.error(message, *where)

    def setting_of(self, factor: str) -> str:
        """The setting of the program that a factor is: "period" → "msign.period"."""
        return {**SHORT_NAMES, "lr": self.lr}.get(factor, factor).replace(".init_args.", ".")

    def arm(self, name: str) -> Arm:
        """The method of one of the study's arms."""
        if name not in self.variants:
            return ARMS[name]
        variant = self.variants[name]
        base = ARMS[variant.base]
        settings = {self.setting_of(factor): value for factor, value in variant.settings.items()}
        return base._replace(settings={**base.settings, **settings})

    def settings_of(self, cell: Cell) -> dict[str, Value]:
        """The settings of a cell; those of the arm go before the study's, and its factors before both."""
        common = {self.setting_of(name): value for name, value in self.settings.items()}
        factors = {self.setting_of(name): value for name, value in cell.factors}
        return {**common, **self.arm(cell.arm).settings, **factors}

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Every arm with every combination of the factors that concern it, but "lr"."""
        groups: list[Group] = []
        for arm in self.arms:
            concerned = self.arm(arm).concerned_by
            names = sorted(name for name in self.factors if name != "lr" and concerned(self.setting_of(name)))
            values = itertools.product(*(self.factors[name] for name in names))
            groups += [Group(arm, tuple(zip(names, combination, strict=True))) for combination in values]
        return tuple(groups)

    @cached_property
    def cells(self) -> Mapping[str, Cell]:
        """All cells of a grid by their keys, one seed after the other; of another sampler, which chooses them, none."""
        if not isinstance(self.sampler, Grid):
            return {}
        rates = [float(lr) for lr in self.factors["lr"]]  # type: ignore[arg-type]
        cells = [group.cell(lr, seed) for seed in self.seeds for group in self.groups for lr in rates]
        return {cell.key: cell for cell in cells}

    def holds(self, cell: Cell) -> bool:
        """Whether a cell belongs to the study."""
        return cell.key in self.cells if self.cells else cell.group in self.groups and cell.seed in self.seeds

    def fingerprint(self) -> dict[str, Any]:
        """The whole study in plain values for JSON, the program's file included."""
        return {
            "program": {"name": self.program, "file": None if self.is_object else self._program_file()},
            "steps": self.steps,
            "arms": plain(self.arms),
            "variants": {name: plain(variant._asdict()) for name, variant in self.variants.items()},
            "factors": plain(self.factors),
            "seeds": plain(self.seeds),
            "settings": plain(self.settings),
            "stability": self.stability._asdict(),
            "sampler": {"name": _name(self.sampler), **self.sampler._asdict()},
            "prune": self.prune,
            "metric": self.metric,
            "lr": self.lr,
        }

    def _program_file(self) -> Any:
        root = read(recipe_file(self.program))
        if not isinstance(root.value, dict):
            raise StudyError(f"{root.source.file}:1: a program's file must be a mapping, got {root.value!r}"[:500])
        return root.value

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
        set_by_settings = {self.setting_of(name) for name in self.settings}
        arms = [self.arm(arm) for arm in self.arms]
        for name, values in self.factors.items():
            self._check_name(name, "factors", name)
            self._check_unique(name, "value", values, "factors", name)
            setting = self.setting_of(name)
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
            if not least <= value < 2**31:
                rule = f"at least {least}" if value < least else "below 2³¹"
                raise self.error(f"{name} must be {rule}, got {value:.12g}", "sampler", name)
        if isinstance(sampler, Bisect) and not 0 < sampler.resolution <= math.log10(sampler.high / sampler.low):
            rule = "resolution must be positive and at most the decades from low to high"
            raise self.error(f"{rule}, got {sampler.resolution}", "sampler", "resolution")

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
        setting = self.setting_of(name)
        if setting in RESERVED:
            raise self.error(f"{name} must not be a factor or a setting: {RESERVED[setting]} sets it", *where)
        short = {"lr": self.lr, **SHORT_NAMES}
        if name not in short and "." not in name and name != "config" and not self.is_object:
            known = f"known: {', '.join(short)}, and settings of the program by their dotted names"
            raise self.error(f"unknown factor {name!r}{near(name, short)}; {known}", *where)
        for own, long in short.items():
            if setting == long and name != own:
                raise self.error(f"{name} must be written {own}", *where)


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


def load(path: str | Path, *, smoke: bool = False) -> Study:
    """Reads a study file, or by its name a study of this package, such as "quick".

    Args:
        path: The file, or the name.
        smoke: Whether to read the study as its part `smoke` changes it, to try it where it could not be run: what is
            there goes before what the study says. The name ends in "_smoke" then.

    Raises:
        StudyError: The study can't be read or run: with file, line, rule and the value received.
    """
    file = _find(Path(path))
    root = _in_small(read(file)) if smoke else read(file)
    parts: _File = root.read(_File)
    arms, variants = _arms(parts.arms)
    sampler = Grid() if parts.sampler is None else _sampler(parts.sampler)
    factors = {
        name: root.part("factors").part(name).read(tuple[float, ...]) if name == "lr" else values
        for name, values in parts.factors.items()
    }
    rest = {**parts._asdict(), "arms": arms, "factors": factors, "sampler": sampler}
    rest.pop("smoke")
    return Study(name=f"{file.stem}_smoke" if smoke else file.stem, variants=variants, source=root.source, **rest)


def _in_small(root: Node) -> Node:
    """The study with its part `smoke` in place, as if it were written so."""
    if not isinstance(root.value, dict) or "smoke" not in root.value:
        raise root.source.error("smoke is missing")
    value = dict(root.value)
    for key, part in root.part("smoke").read(dict[str, Node]).items():
        whole = value.get(key)
        value[key] = {**whole, **part.value} if isinstance(whole, dict) and isinstance(part.value, dict) else part.value
    value.pop("smoke")
    lines = root.source.lines
    moved = {where[1:]: line for where, line in lines.items() if where[:1] == ("smoke",) and len(where) > 1}
    return Node(value, (), root.source._replace(lines={**lines, **moved}))


def _arms(node: Node) -> tuple[tuple[str, ...], dict[str, Variant]]:
    names: list[str] = []
    variants: dict[str, Variant] = {}
    for entry in node.read(tuple[Node, ...]):
        if isinstance(entry.value, dict):
            named: _Named = entry.read(_Named)
            variants[named.name] = Variant(named.base, named.settings)
        names.append(entry.value["name"] if isinstance(entry.value, dict) else entry.read(str))
    return tuple(names), variants


def _sampler(node: Node) -> Sampler:
    parts = node.value if isinstance(node.value, dict) else {"name": node.value}
    named = node if parts is not node.value else node.part("name") if "name" in parts else node
    if parts.get("name") not in list(SAMPLERS):
        raise named.error(f"one of {', '.join(SAMPLERS)}")
    rest = {name: value for name, value in parts.items() if name != "name"}
    sampler: Sampler = node._replace(value=rest).read(SAMPLERS[parts["name"]])
    return sampler


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    shipped = {file.stem: file for file in (Path(__file__).parent / "studies").glob("*.yaml")}
    if str(path) in shipped:
        return shipped[str(path)]
    known = ", ".join(sorted(shipped))
    raise StudyError(f"no study file {str(path)!r}{near(path.stem, shipped)}; studies of this package: {known}")


def _name(sampler: Sampler) -> str:
    """A sampler's name in study files."""
    return type(sampler).__name__.lower()
