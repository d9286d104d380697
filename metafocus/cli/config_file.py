"""Configuration files: names and plain values, each of the type that its setting has.

A command line gives words, which a parser turns into numbers. A file gives numbers, truth values,
dates, lists: what does not fit its setting is refused here, in one line, before anything is made.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from metafocus.cli.parsing import unknown
from metafocus.errors import DataError
from metafocus.files import text_of

_SCALARS = (bool, int, float, str)


def read(path: Path, kinds: Iterable[type]) -> dict[str, Any]:
    """Read the settings of some dataclasses from a YAML or JSON file.

    Returns:
        Values by name. A string stays one, for the parser of the command line to read.

    Raises:
        DataError: if the file cannot be read, names a setting twice or one that is unknown, or
            gives a value of another type than the setting's.
    """
    values = _parsed(path)
    if not isinstance(values, dict):
        raise DataError(f"{path} must hold names and values, not {_named(values)}.")
    types_of = {
        f.name: hints[f.name]
        for kind in kinds
        for hints in [typing.get_type_hints(kind)]
        for f in dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]
        if f.init
    }
    odd = sorted(str(name) for name in values if name not in types_of)
    if odd:
        raise DataError(f"{path}: {unknown('setting', odd, types_of)} (see metafocus train --help)")
    return {name: _checked(path, name, value, types_of[name]) for name, value in values.items()}


def _parsed(path: Path) -> Any:
    text = text_of(path, str(path))
    try:
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_unique)
        return _yaml(text)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply.") from error
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise DataError(f"{path} is not {kind}: {' '.join(str(error).split())}") from error


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """No key twice, and no aliases: nine lines of them can stand for a billion values."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                raise DataError(f"*{event.anchor} is an alias: write the value out.")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            pairs = [(self.construct_object(key, deep=True), None) for key, _ in node.value]
            _unique([(key, None) for key, _ in pairs])
            return super().construct_mapping(node, deep=deep)

    try:
        # A SafeLoader: it makes plain values, and no objects.
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except (TypeError, AttributeError) as error:
        # Of PyYAML's own constructors, for keys that are lists and for malformed scalars.
        raise ValueError(str(error)) from error


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for name, value in pairs:
        if name in seen:
            raise DataError(f"{name!r:.80} appears twice: remove one.")
        seen[name] = value
    return seen


def _checked(path: Path, name: str, value: Any, hint: Any) -> Any:
    allowed, given = _members(hint), value
    if value is None:
        fits = type(None) in allowed
    elif type(value) is bool and bool not in allowed and str in allowed:
        # `resume_from_checkpoint: true` is a text on the command line.
        fits, value = True, str(value).lower()
    elif type(value) is int and int not in allowed:
        # 1 for 1.0, but not for True.
        fits, value = float in allowed and abs(value) < 2**53, float(min(max(value, -1e300), 1e300))
    elif type(value) is int:
        fits = abs(value) < 2**63
    elif type(value) is str:
        # Words for numbers and truth values: YAML reads 1e-5 as text. The parser looks at them.
        fits = bool(allowed & {*_SCALARS, enum.Enum})
    else:
        fits = type(value) in allowed
    if not fits:
        names = [_word(kind) for kind in (*_SCALARS, list, dict, type(None)) if kind in allowed]
        shown = f"{given!r:.40}" if type(given) in _SCALARS else _named(given)
        way = _WAYS.get(type(given), "") if str in allowed else ""
        raise DataError(f"{path}: {name} must be {' or '.join(names)}, got {shown}{way}.")
    return value


def _members(hint: Any) -> set[type]:
    """The plain types that a type hint allows."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(_members, typing.get_args(hint)))
    if origin is typing.Literal:
        return {type(word) for word in typing.get_args(hint)}
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {str, enum.Enum}
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return {dict}
    return {kind} if isinstance(kind, type) else {*_SCALARS, list, dict, type(None)}


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_MORE = {list: "a list", dict: "names and values", type(None): "null"}
_WAYS = {
    list: "; write one text, with a comma between two words",
    dict: "; write one text in JSON, such as '{\"name\": 1}'",
}


def _word(kind: type) -> str:
    return {**_WORDS, **_MORE}.get(kind, f"a {kind.__name__}")


def _named(value: Any) -> str:
    return _word(type(value))
