"""YAML into dataclasses and named tuples, with errors that name file, line, rule and the value received.

Scalars are those of YAML 1.2: 3e-3 is a number, 010 is ten, and 1:30, yes and 2020-01-01 are text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from msign_lightning.ablations.methods import Value

Where = tuple[str | int, ...]
MOST = 10_000
"""Parts of a file, those behind aliases included."""
SCALARS: dict[object, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a string"),
    bool: ((bool,), "true or false"),
    Value: ((str, int, float, bool), "a string, a number, true or false, or a list of them"),
}
"""Type to read → what YAML may give for it, and the rule in words."""


class StudyError(ValueError):
    """A study that can't be run as it is written."""


class Source(NamedTuple):
    """Where something was read: a file, and the line of each part."""

    file: str
    lines: dict[Where, int]

    def error(self, message: str, *where: str | int) -> StudyError:
        """The error, with file and line in front: "quick.yaml:12: seeds must hold at least one seed, got []"."""
        line = next((self.lines[where[:n]] for n in range(len(where), -1, -1) if where[:n] in self.lines), 1)
        return StudyError(f"{self.file}:{line}: {message}")


class Node(NamedTuple):
    """A part of a file: its value, its place, and the file."""

    value: Any
    where: Where
    source: Source

    def error(self, rule: str) -> StudyError:
        """The error that this part does not follow a rule."""
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.where).lstrip(".")
        return self.source.error(f"{name or 'a study'} must be {rule}, got {self.value!r}"[:500], *self.where)

    def part(self, key: str | int) -> Node:
        """A part of a mapping or list."""
        return Node(self.value[key], (*self.where, key), self.source)

    def parts(self, kind: Any, rule: str) -> dict[Any, Node]:
        """All parts by key or index."""
        if not isinstance(self.value, kind):
            raise self.error(rule)
        return {key: self.part(key) for key in (self.value if kind is dict else range(len(self.value)))}

    def read(self, kind: Any) -> Any:
        """The value as one of `SCALARS`, a mapping or sequence, a class, or one of several classes by their names."""
        inner, origin = get_args(kind), get_origin(kind)
        if origin is Mapping:
            return {key: part.read(inner[1]) for key, part in self.parts(dict, "a mapping").items()}
        if origin is Sequence:
            return tuple(part.read(inner[0]) for part in self.parts(list, "a list").values())
        if kind == Value and isinstance(self.value, list):
            return self.read(Sequence[Value])
        if kind in SCALARS:
            types, rule = SCALARS[kind]
            if type(self.value) not in types or self.value != self.value:
                raise self.error(rule)
            return self.value if kind is not float else float(self.value) if abs(self.value) < 1e300 else math.inf
        if not inner:
            return self.make(kind)
        if NoneType in inner and self.value is None:
            return None
        return self.read(inner[0]) if NoneType in inner else self._one_of({c.__name__.lower(): c for c in inner})

    def make(self, cls: type, **given: Any) -> Any:
        """An object of a class, from a mapping of those arguments that are not given."""
        known = {name: p for name, p in signature(cls).parameters.items() if name not in given}
        parts, kinds = self.parts(dict, "a mapping"), get_type_hints(cls)
        for key in parts:
            if key not in known:
                rule = f"unknown key {key!r}{near(key, known)}; known: {', '.join(known) or 'none'}"
                raise self.source.error(rule, *self.where, key)
        for name, parameter in known.items():
            if parameter.default is parameter.empty and name not in parts:
                raise self.source.error(f"{name} is missing", *self.where)
        return cls(**given, **{name: part.read(kinds[name]) for name, part in parts.items()})

    def _one_of(self, classes: Mapping[str, type]) -> Any:
        """An object of the class with the "name" of the mapping, or with the name that is all of the value."""
        parts = self.value if isinstance(self.value, dict) else {"name": self.value}
        if parts.get("name") not in list(classes):
            named = self.part("name") if parts is self.value and "name" in parts else self
            raise named.error(f"one of {', '.join(classes)}")
        rest = {key: value for key, value in parts.items() if key != "name"}
        return self._replace(value=rest).make(classes[parts["name"]])


def near(name: str, known: Iterable[str]) -> str:
    """A question that names those that are near, for an error message."""
    names = get_close_matches(name, list(known))
    return f", did you mean {' or '.join(names)}?" if names else ""


class _Loader(yaml.SafeLoader):
    """Knows the scalars of YAML 1.2's core schema, but for octal and hexadecimal numbers."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (of this class, not of its base)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", "~nN"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), ["", *_first])
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value, 10))


def read(file: Path) -> Node:
    """The whole of a YAML file.

    Raises:
        StudyError: It can't be read, is no YAML, or a key is there twice.
    """
    source = Source(str(file), {(): 1})
    try:
        loader = _Loader(file.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        return Node(None if root is None else _construct(loader, root, (), source), (), source)
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{file}:1: a study must be a text file in UTF-8, got {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise StudyError(f"{file}:{1 if mark is None else mark.line + 1}: {problem}") from error
    except RecursionError as error:
        raise StudyError(f"{file}:1: parts must not hold themselves or be nested a thousand deep") from error


def _construct(loader: _Loader, node: yaml.Node, where: Where, source: Source) -> Any:
    """The node's value; the lines of all parts of it go to `source`."""
    lines = source.lines
    if len(lines) > MOST:
        raise source.error(f"a study must have at most {MOST:,} parts, what aliases stand for included, got more")
    lines.setdefault(where, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*where, i), source) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        try:
            return loader.construct_object(node)
        except (ValueError, KeyError, AttributeError) as error:  # a number of thousands of digits, or !!bool maybe
            kind = node.tag.rpartition(":")[2]
            raise source.error(f"a part must be one of the kind {kind}, got {node.value!r}"[:200], *where) from error
    values: dict[str, Any] = {}
    for key_node, item in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in values:
            raise StudyError(f"{source.file}:{line}: {key} is there twice, first in line {lines[(*where, key)]}")
        lines[(*where, key)] = line
        values[key] = _construct(loader, item, (*where, key), source)
    return values
