"""Strict reading of single header fields: the right type, within bounds, or `BadMessage` naming the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from blocks.protocol.session_errors import BadMessage

Header = Mapping[str, Any]


def read_integer(header: Header, name: str, low: int, high: int) -> int:
    value = header.get(name)
    if type(value) is not int or not low <= value <= high:  # bool is an int, and is refused
        raise BadMessage(f"{name} is an integer from {low} to {high}")
    return value


def read_bytes(header: Header, name: str, length: int) -> bytes:
    value = header.get(name)
    if type(value) is not bytes or len(value) != length:
        raise BadMessage(f"{name} is {length} bytes")
    return value


def read_text(header: Header, name: str, longest: int) -> str:
    value = header.get(name)
    if type(value) is not str or len(value) > longest:
        raise BadMessage(f"{name} is a text of at most {longest} characters")
    return value


def read_list(header: Header, name: str, longest: int) -> list[Any]:
    value = header.get(name)
    if type(value) is not list or len(value) > longest:
        raise BadMessage(f"{name} is a list of at most {longest}")
    return value


def read_number(header: Header, name: str, low: float, high: float) -> float:
    value = header.get(name)
    if type(value) not in (int, float):
        raise BadMessage(f"{name} is a number")
    if not low <= value <= high or not math.isfinite(value):  # type: ignore[operator, arg-type]
        raise BadMessage(f"{name} is from {low} to {high}")
    return float(value)  # type: ignore[arg-type]


def read_optional_number(header: Header, name: str, low: float, high: float) -> float | None:
    return None if header.get(name) is None else read_number(header, name, low, high)
