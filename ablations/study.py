"""What a study is: a program, methods, factors and seeds; and when a run counts as stable."""

from __future__ import annotations

import hashlib
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
from msign_lightning.ablations.reader import Node, Source, StudyError, near, read
from msign_lightning.recipes import recipe_file, recipe_names

MOST_STEPS = 10**9
SHORT_NAMES = {"period": "msign.period", "targets": "msign.targets", "rule": "msign.rule"}
"""Factors with a name of their own → the setting that they are; and "lr", which `Study.lr` names."""
RESERVED = {
    "seeds": ("seed", "seed_everything", "data.seed"),
    "steps": ("steps", "trainer.max_steps", "trainer.max_epochs"),
    "the arm": ("arm", "use_msign", "msign.stop", "trainer.callbacks"),
    "the study": ("folder", "trainer.logger", "trainer.default_root_dir", "trainer.enable_checkpointing"),
    "the storage": ("cell", "cell_spec", "parent", "error", "duplicate", "outcome"),
    "the outcome": ("key", "group", "stable", *Outcome._fields),
}
"""What sets them → settings that a study file can't set."""


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
    """An arm of a study's own: another arm with further settings."""

    base: str
    settings: Mapping[str, Value]


class _Named(NamedTuple):
    """A variant as it stands in a study file."""

    name: str
    settings: Mapping[str, Value]
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
        folder = self.name.isprintable() and "/" not in self.name and self.name.strip(". ") and len(self.name) <= 100
        self._must(bool(folder), f"the name of a study must be usable as that of a folder, got {self.name!r}")
        rule = f"steps must be between {WINDOW} and {MOST_STEPS:,}, got {self.steps:.6g}"
        self._must(WINDOW <= self.steps <= MOST_STEPS, rule, "steps")
        rule = f"must be the name of a recipe, a file, or package.module:name, got {self.program!r}"
        found = self.is_object or recipe_file(self.program).is_file()
        self._must(found, f"program {rule}{near(self.program, recipe_names())}", "program")
        self._check_arms()
        self._check_values("seeds", "seed", self.seeds, "seeds")
        for i, seed in enumerate(self.seeds):
            self._must(0 <= seed < 2**32, f"seeds must be between 0 and 2³² - 1, got {seed}", "seeds", i)
        self._check_settings(self.settings)
        self._check_factors()
        for name, value in self.stability._asdict().items():
            sound = value is None or 0 < value < math.inf or (value == 0 and name == "spikes_per_10k")
            self._must(sound, f"{name} must be positive and finite, got {value}", "stability", name)
        self._check_sampler()

    @property
    def is_object(self) -> bool:
        """Whether the program is something to import, not a file."""
        return re.fullmatch(r"(?!\d)\w+(\.(?!\d)\w+)*:(?!\d)\w+", self.program) is not None

    def error(self, message: str, *where: str | int) -> StudyError:
        """The error, with file and line in front if the study was read from a file."""
        return StudyError(message) if self.source is None else self.source.error(message, *where)

    def setting_of(self, factor: str) -> str:
        """The setting of the program that a factor is: "period" → "msign.period"."""
        return {**SHORT_NAMES, "lr": self.lr}.get(factor, factor).replace(".init_args.", ".")

    def arm(self, name: str) -> Arm:
        """The method of one of the study's arms."""
        base, own = self.variants.get(name, (name, {}))
        settings = {self.setting_of(factor): value for factor, value in own.items()}
        return ARMS[base]._replace(settings={**ARMS[base].settings, **settings})

    def settings_of(self, cell: Cell) -> dict[str, Value]:
        """The settings of a cell; those of the arm go before the study's, and its factors before both."""
        arm = self.arm(cell.arm)
        common = {self.setting_of(name): value for name, value in self.settings.items()}
        common = {setting: value for setting, value in common.items() if arm.concerned_by(setting)}
        factors = {self.setting_of(name): value for name, value in cell.factors}
        return {**common, **arm.settings, **factors}

    def stop(self, arm: str, period: Any, *where: str | int) -> int:
        """The last step at which an arm with MSign restores: within its share of the run, not in the last period.

        Raises:
            StudyError: It would never, or the period, which stands there in the study file, is none.
        """
        self._must(type(period) is int and period > 0, f"period must be a positive integer, got {period!r}", *where)
        until = self.arm(arm).until or 0.0
        last: int = min(int(until * self.steps), self.steps - period)
        if last < period:
            within = "" if until == 1 else f" and within {until:g} of the run"
            rule = f"steps must be enough for {arm} to restore once before the last period of {period} steps{within}"
            raise self.error(f"{rule}, got {self.steps}", *(where or ("steps",)))
        return last

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
        rates = self.factors.get("lr", ())
        cells = [group.cell(lr, seed) for seed in self.seeds for group in self.groups for lr in rates]  # type: ignore[arg-type]
        return {cell.key: cell for cell in cells}

    def holds(self, cell: Cell) -> bool:
        """Whether a cell belongs to the study."""
        return cell.key in self.cells if self.cells else cell.group in self.groups and cell.seed in self.seeds

    def fingerprint(self) -> dict[str, Any]:
        """The whole study in plain values for JSON, the program's file included."""
        file = None if self.is_object else read(recipe_file(self.program))
        if file is not None and not isinstance(file.value, dict):
            raise StudyError(f"{file.source.file}:1: a program's file must be a mapping, got {file.value!r}"[:500])
        names = [name for name in self.__dataclass_fields__ if name not in ("name", "source")]
        values = {name: plain(getattr(self, name)) for name in names}
        values["program"] = {"name": self.program, "file": file and file.value}
        if (config := recipe_file(str(self.settings.get("config", "")))).is_file():
            try:
                values["program"]["config"] = read(config).value
            except StudyError:  # a function's, in whatever language
                values["program"]["config"] = hashlib.sha256(config.read_bytes()).hexdigest()
        values["sampler"] = {"name": _name(self.sampler), **values["sampler"]}
        return values

    def _must(self, ok: bool, message: str, *where: str | int) -> None:
        if not ok:
            raise self.error(message, *where)

    def _check_arms(self) -> None:
        self._check_values("arms", "arm", self.arms, "arms")
        for i, name in enumerate(self.arms):
            known = name in ARMS or name in self.variants
            self._must(known, f"unknown arm {name!r}{near(name, ARMS)}", "arms", i)
        for name, (base, settings) in self.variants.items():
            where = ("arms", list(self.arms).index(name)) if name in self.arms else ("arms",)
            rule = f"the name of a variant must be printable and not empty, got {name!r}"
            self._must(name.isprintable() and bool(name.strip()), rule, *where)
            self._must(name not in ARMS, f"the name of a variant must not be that of an arm, got {name!r}", *where)
            self._must(base in ARMS, f"unknown arm {base!r}{near(base, ARMS)}", *where, "base")
            self._check_settings(settings, *where)
            if "period" in settings and ARMS[base].until is not None:
                self.stop(name, settings["period"], *where, "settings", "period")

    def _check_settings(self, settings: Mapping[str, Value], *where: str | int) -> None:
        for name in settings:
            self._check_name(name, *where, "settings", name)
            self._must(name != "lr", "lr must be a factor, not a setting", *where, "settings", name)

    def _check_factors(self) -> None:
        set_by_settings = {self.setting_of(name) for name in self.settings}
        for name, values in self.factors.items():
            self._check_name(name, "factors", name)
            self._check_values(name, "value", values, "factors", name)
            setting = self.setting_of(name)
            rule = f"{name} must be a factor or a setting, not both"
            self._must(setting not in set_by_settings, rule, "factors", name)
            concerned = any(self.arm(arm).concerned_by(setting) for arm in self.arms)
            self._must(concerned, f"the factor {name} concerns none of the arms {list(self.arms)}", "factors", name)
        for i, lr in enumerate(self.factors.get("lr", ())):
            sound = isinstance(lr, (int, float)) and lr is not True and 0 < lr < 1e300
            self._must(sound, f"lr must be positive and finite, got {lr!r}", "factors", "lr", i)
        given = self.settings if "period" in self.settings else {}
        for i, period in enumerate(self.factors.get("period", [given["period"]] if given else [])):
            for arm in self.arms:
                if self.arm(arm).until is not None and self.arm(arm).concerned_by("msign.period"):
                    self.stop(arm, period, "settings" if given else "factors", "period", i)

    def _check_sampler(self) -> None:
        sampler, name = self.sampler, _name(self.sampler)
        rule = f"prune must be false with {name}: it would bias comparisons, got true"
        self._must(not self.prune or isinstance(sampler, Tpe), rule, "prune")
        if isinstance(sampler, Grid):
            self._must("lr" in self.factors, "factors must hold lr for a grid", "factors")
            return
        rule = f"lr must not be a factor with {name}, which has low and high"
        self._must("lr" not in self.factors, rule, "factors", "lr")
        rule = f"low and high must be positive and finite, low below high, got {sampler.low} and {sampler.high}"
        self._must(0 < sampler.low < sampler.high < math.inf, rule, "sampler", "low")
        for name, least in {"runs": 1, "trials": 1, "seed": 0}.items():
            value = getattr(sampler, name, least)
            rule = f"{name} must be {f'at least {least}' if value < least else 'below 2³¹'}, got {value:.12g}"
            self._must(least <= value < 2**31, rule, "sampler", name)
        if isinstance(sampler, Bisect):
            rule = f"resolution must be positive and at most the decades from low to high, got {sampler.resolution}"
            sound = 0 < sampler.resolution <= math.log10(sampler.high / sampler.low)
            self._must(sound, rule, "sampler", "resolution")

    def _check_values(self, what: str, item: str, values: Sequence[Value], *where: str | int) -> None:
        self._must(len(values) > 0, f"{what} must hold at least one {item}, got []", *where)
        shown = [show(value) if isinstance(value, tuple) else value for value in values]
        for i, value in enumerate(shown):
            self._must(shown.index(value) == i, f"{what} must not hold {show(value)} twice", *where, i)

    def _check_name(self, name: str, *where: str | int) -> None:
        setting, short = self.setting_of(name), {"lr": self.lr, **SHORT_NAMES}
        for by, names in RESERVED.items():
            self._must(setting not in names, f"{name} must not be a factor or a setting: {by} sets it", *where)
        known = f"known: {', '.join(short)}, and settings of the program by their dotted names"
        rule = f"unknown factor {name!r}{near(name, short)}; {known}"
        self._must(name in short or "." in name or name == "config" or self.is_object, rule, *where)
        for own, long in short.items():
            self._must(setting != long or name == own, f"{name} must be written {own}", *where)


def _name(sampler: Sampler) -> str:
    """A sampler's name in study files."""
    return type(sampler).__name__.lower()


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints: ["steps: 300 → 500", "factors.lr: [0.003] → [0.003, 0.03]"]."""
    before, after = _flat(old), _flat(new)
    pairs = {name: (before.get(name, "nothing"), after.get(name, "nothing")) for name in {**before, **after}}
    return [f"{name}: {one} → {other}" for name, (one, other) in pairs.items() if one != other]


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
    shipped = {file.stem: file for file in (Path(__file__).parent / "studies").glob("*.yaml")}
    file = Path(path) if Path(path).is_file() else shipped.get(str(path))
    if file is None:
        known = f"{near(Path(path).stem, shipped)}; studies of this package: {', '.join(sorted(shipped))}"
        raise StudyError(f"no study file {str(path)!r}{known}")
    root = _in_small(read(file), smoke)
    variants: dict[str, Variant] = {}
    arms = root.value.get("arms")
    for i, arm in enumerate(arms if isinstance(arms, list) else ()):
        if isinstance(arm, dict):
            own = root.part("arms").part(i).read(_Named)
            arms[i], variants[own.name] = own.name, Variant(own.base, own.settings)
    name = f"{file.stem}_smoke" if smoke else file.stem
    study: Study = root.make(Study, name=name, variants=variants, source=root.source)
    return study


def _in_small(root: Node, smoke: bool) -> Node:
    """The study with its part `smoke` in place, as if it were written so, or left out."""
    value = {key: part.value for key, part in root.parts(dict, "a mapping").items() if key != "smoke"}
    if not smoke:
        return root._replace(value=value)
    if "smoke" not in root.value:
        raise root.source.error("smoke is missing")
    for key, node in root.part("smoke").parts(dict, "a mapping").items():
        whole, part = value.get(key), node.value
        value[key] = {**whole, **part} if isinstance(whole, dict) and isinstance(part, dict) else part
    lines = root.source.lines
    moved = {where[1:]: line for where, line in lines.items() if where[:1] == ("smoke",) and len(where) > 1}
    return Node(value, (), root.source._replace(lines={**lines, **moved}))
