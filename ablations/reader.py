"""YAML into dataclasses, with errors that name file, line, rule and the value received.

Scalars are those of YAML 1.2: 3e-3 is a number, 010 is ten, and 1:30, yes and 2020-01-01 are text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from msign_lightning.ablations.methods import Value

Where = tuple[str | int, ...]
MOST = 10_000
"""Parts of a file, those behind aliases included."""
RULES: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    Value: "a string, a number, true or false, or a list of them",
}


class StudyError(ValueError):
    """A study that can't be run as it is written."""


class Source(NamedTuple):
    """Where something was read: a file, and the line of each part."""

    file: str
    lines: Mapping[Where, int]

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

    def read(self, kind: Any) -> Any:
        """The value as one of the types in `RULES`, a dict or tuple of them, or a class with annotated fields."""
        value = self.value
        if kind is Node:
            return self
        if get_origin(kind) is dict:
            self._check(dict, "a mapping")
            return {key: self.part(key).read(get_args(kind)[1]) for key in value}
        if get_origin(kind) is tuple:
            self._check(list, "a list")
            return tuple(self.part(i).read(get_args(kind)[0]) for i in range(len(value)))
        if kind == Value and isinstance(value, list):
            return tuple(self.part(i).read(Value) for i in range(len(value)))
        if kind not in RULES:
            return self._read_fields(kind)
        allowed: Any = {int: int, float: (int, float), str: str, bool: bool}.get(kind, (str, int, float))
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind in (int, float)) or value != value:
            raise self.error(RULES[kind])
        return value if kind is not float else float(value) if abs(value) < 1e300 else math.inf

    def _check(self, kind: type, rule: str) -> None:
        if not isinstance(self.value, kind):
            raise self.error(rule)

    def _read_fields(self, kind: Any) -> Any:
        """A NamedTuple, from a mapping of its fields: those without a default must be there."""
        required = [name for name in kind._fields if name not in kind._field_defaults]
        self._check(dict, "a mapping")
        for key in self.value:
            if key not in kind._fields:
                known = f"{near(key, kind._fields)}; known: {', '.join(kind._fields) or 'none'}"
                raise self.source.error(f"unknown key {key!r}{known}", *self.where, key)
        for key in required:
            if key not in self.value:
                raise self.source.error(f"{key} is missing", *self.where)
        hints = get_type_hints(kind)
        kinds = {name: get_args(hint)[0] if NoneType in get_args(hint) else hint for name, hint in hints.items()}
        return kind(**{name: self.part(name).read(kinds[name]) for name in self.value})


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
    ("null", r"~|null|Null|NULL|", "~nN\0"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value, 10))


def read(file: Path) -> Node:
    """The whole of a YAML file.

    Raises:
        StudyError: It can't be read, is no YAML, or a key is there twice.
    """
    lines: dict[Where, int] = {(): 1}
    source = Source(str(file), lines)
    try:
        loader = _Loader(file.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        return Node(None if root is None else _construct(loader, root, (), source, lines), (), source)
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{file}:1: a study must be a text file in UTF-8, got {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = 1 if mark is None else mark.line + 1
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise StudyError(f"{file}:{line}: {problem}") from error
    except RecursionError as error:
        raise StudyError(f"{file}:1: parts must not hold themselves or be nested a thousand deep") from error


def _construct(loader: _Loader, node: yaml.Node, where: Where, source: Source, lines: dict[Where, int]) -> Any:
    """The node's value; the lines of all parts of it go to `lines`."""
    if len(lines) > MOST:
        raise source.error(f"a study must have at most {MOST:,} parts, what aliases stand for included, got more")
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*where, i)] = item.start_mark.line + 1
        return [_construct(loader, item, (*where, i), source, lines) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        try:
            return loader.construct_object(node)
        except ValueError as error:  # a number of thousands of digits
            raise StudyError(f"{source.file}:{node.start_mark.line + 1}: {error}") from error
    values: dict[str, Any] = {}
    for key_node, item in node.value:
        key = str(key_node.value)
        first = lines.setdefault((*where, key), key_node.start_mark.line + 1)
        if key in values:
            message = f"{key} is there twice, first in line {first}"
            raise StudyError(f"{source.file}:{key_node.start_mark.line + 1}: {message}")
        values[key] = _construct(loader, item, (*where, key), source, lines)
    return values
