"""YAML whose errors name file, line, rule and the value received."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from msign_lightning.ablations.methods import Value

Where = tuple[str | int, ...]


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
    """A part of a file: its value, its place, and the file. Each method raises a StudyError for another type."""

    value: Any
    where: Where
    source: Source

    def error(self, rule: str) -> StudyError:
        """The error that this part does not follow a rule."""
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.where).lstrip(".")
        return self.source.error(f"{name or 'a study'} {rule}, got {self.value!r}", *self.where)

    def mapping(self, required: Sequence[str] = (), optional: Iterable[str] | None = None) -> dict[str, Node]:
        """Parts by key; with `optional`, other keys are errors."""
        if not isinstance(self.value, dict):
            raise self.error("must be a mapping")
        for key in self.value:
            known = [*required, *(optional or ())]
            if optional is not None and key not in known:
                message = f"unknown key {key!r}{near(key, known)}; known: {', '.join(known)}"
                raise self.source.error(message, *self.where, key)
        for key in required:
            if key not in self.value:
                raise self.source.error(f"{key} is missing", *self.where)
        return {key: self._replace(value=value, where=(*self.where, key)) for key, value in self.value.items()}

    def sequence(self) -> list[Node]:
        """Parts in their order."""
        if not isinstance(self.value, list):
            raise self.error("must be a list")
        return [self._replace(value=value, where=(*self.where, i)) for i, value in enumerate(self.value)]

    def text(self) -> str:
        """A string."""
        if not isinstance(self.value, str):
            raise self.error("must be a string")
        return self.value

    def integer(self) -> int:
        """A whole number; true and false are none."""
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            raise self.error("must be a whole number")
        return self.value

    def number(self) -> float:
        """A number; true and false are none."""
        if not isinstance(self.value, (int, float)) or isinstance(self.value, bool):
            raise self.error("must be a number")
        try:
            return float(self.value)
        except OverflowError:
            return math.inf  # which no rule of a study lets pass

    def boolean(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            raise self.error("must be true or false")
        return self.value

    def setting(self) -> Value:
        """A string, number, true or false, or a list of them."""
        if isinstance(self.value, list):
            return tuple(cast(Any, node.setting()) for node in self.sequence())
        if not isinstance(self.value, (str, int, float)) or self.value != self.value:
            raise self.error("must be a string, a number, true or false, or a list of them")
        return self.value


def near(name: str, known: Iterable[str]) -> str:
    """A question that names those that are near, for an error message."""
    names = get_close_matches(name, list(known))
    return f", did you mean {' or '.join(names)}?" if names else ""


class _Loader(yaml.SafeLoader):
    """Takes numbers such as 3e-3 for numbers, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


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
        raise StudyError(f"{file} can't be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = 1 if mark is None else mark.line + 1
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise StudyError(f"{file}:{line}: {problem}") from error
    except RecursionError as error:
        raise StudyError(f"{file}: parts must not hold themselves or be nested a thousand deep") from error


def _construct(loader: _Loader, node: yaml.Node, where: Where, source: Source, lines: dict[Where, int]) -> Any:
    """The node's value; the lines of all parts of it go to `lines`."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*where, i)] = item.start_mark.line + 1
        return [_construct(loader, item, (*where, i), source, lines) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        try:
            return loader.construct_object(node)
        except ValueError as error:  # a date in the thirteenth month, or a number of thousands of digits
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
