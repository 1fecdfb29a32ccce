"""Tables of a TOML file into frozen dataclasses, strictly, by the annotations of their fields. Pure.

Owns the words of the refusals, each of which names the key: an unknown one (with the nearest that there is), a missing one, one
of the wrong type. What values mean, and which of them go together, is for the dataclass's own ``__post_init__``, whose ValueError
becomes a refusal too. Whole numbers are taken where floats are wanted; nothing else is converted.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar, cast

Table = TypeVar("Table")

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class TableError(ValueError):
    """A table that isn't what it has to be; ``key`` is the dotted place in the file."""

    def __init__(self, key: str, sentence: str) -> None:
        super().__init__(f"{key}: {sentence}" if key else sentence)
        self.key = key
        self.sentence = sentence


def did_you_mean(word: str, known: Collection[str]) -> str:
    """What to say after an unknown word: the nearest of those known, or all of them."""
    near = difflib.get_close_matches(word, sorted(known), n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"there is {', '.join(sorted(known))}" if known else "there is none"


def read_table(kind: type[Table], table: object, key: str = "") -> Table:
    """An instance of the dataclass ``kind``. Raises TableError."""
    if not isinstance(table, Mapping):
        raise TableError(key, f"has to be a table, not {_said(table)}")
    fields = {field.name: field for field in dataclasses.fields(cast(Any, kind)) if field.init}
    for name in table:
        if name not in fields:
            raise TableError(_join(key, str(name)), f"is no key of this table; {did_you_mean(str(name), fields)}")
    hints = typing.get_type_hints(kind)
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = read_value(hints[name], table[name], _join(key, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise TableError(_join(key, name), "is missing")
    try:
        return kind(**values)
    except TableError as error:
        raise TableError(_join(key, error.key), error.sentence) from error
    except ValueError as error:
        raise TableError(key, str(error)) from error


def read_value(hint: Any, value: object, key: str) -> Any:
    """``value`` as the annotation ``hint`` wants it. Raises TableError."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return read_table(cast(type[Any], hint), value, key)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return read_value(next(choice for choice in arguments if choice is not types.NoneType), value, key)
    if origin is tuple:
        return _read_tuple(arguments, value, key)
    if origin is typing.Literal:
        if value not in arguments:
            raise TableError(
                key, f"can't be {_said(value)}; {did_you_mean(str(value), [str(one) for one in arguments])}"
            )
        return value
    if origin in (dict, Mapping) or origin is types.MappingProxyType:
        if not isinstance(value, Mapping):
            raise TableError(key, f"has to be a table, not {_said(value)}")
        return {name: read_value(arguments[1], item, _join(key, name)) for name, item in value.items()}
    return _read_plain(hint, value, key)


def _read_tuple(arguments: Sequence[Any], value: object, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise TableError(key, f"has to be a list, not {_said(value)}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(read_value(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value))
    if len(value) != len(arguments):
        raise TableError(key, f"has to be a list of {len(arguments)}, not of {len(value)}")
    return tuple(
        read_value(hint, item, f"{key}[{index}]")
        for index, (hint, item) in enumerate(zip(arguments, value, strict=True))
    )


def _read_plain(hint: Any, value: object, key: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number and math.isfinite(cast(float, value)):
        return float(cast(float, value))
    if hint is int and is_number and isinstance(value, int):
        return value
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise TableError(key, f"has to be {_NAMES.get(hint, str(hint))}, not {_said(value)}")


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return "a table"
    return "a list" if isinstance(value, list) else repr(value)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key and name else key or name
