"""Tables of a file against dataclasses: what is taken, and the sentence for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from netsim.tables import TableError, did_you_mean, read_table


@dataclass(frozen=True, slots=True)
class Point:
    x: float
    y: float = 0.0

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError("x has to be 0 or more")
        if self.y < 0:
            raise TableError("y", "has to be 0 or more")


@dataclass(frozen=True, slots=True)
class Drawing:
    name: str
    count: int = 1
    is_round: bool = False
    colour: Literal["red", "green"] = "red"
    limit: float | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    tags: tuple[str, ...] = ()
    middle: Point = field(default_factory=lambda: Point(0.0))
    points: Mapping[str, Point] = field(default_factory=dict)
    rest: Mapping[str, Any] = field(default_factory=dict)
    made: int = field(default=3, init=False)


def test_every_type_is_read_as_its_annotation_wants_it() -> None:
    table = {
        "name": "n", "count": 2, "is_round": True, "colour": "green", "limit": 3, "pair": [1, 2.5], "tags": ["a", "b"],
        "middle": {"x": 1}, "points": {"one": {"x": 1.0, "y": 2.0}}, "rest": {"of": ["anything", 1]},
    }  # fmt: skip
    drawing = read_table(Drawing, table)
    points, rest = {"one": Point(1.0, 2.0)}, {"of": ["anything", 1]}
    assert drawing == Drawing("n", 2, True, "green", 3.0, (1.0, 2.5), ("a", "b"), Point(1.0), points, rest)
    assert type(drawing.limit) is float, "whole numbers are taken where floats are wanted, as floats"
    assert read_table(Drawing, {"name": "n"}) == Drawing("n")


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"nmae": "n"}, "nmae: is no key of this table; did you mean 'name'?"),
        ({"name": "n", "made": 1}, "made: is no key of this table; did you mean 'middle'?"),
        ({}, "name: is missing"),
        ({"name": 3}, "name: has to be a text, not 3"),
        ({"name": "n", "count": 2.0}, "count: has to be a whole number, not 2.0"),
        ({"name": "n", "count": True}, "count: has to be a whole number, not True"),
        ({"name": "n", "is_round": 1}, "is_round: has to be true or false, not 1"),
        ({"name": "n", "limit": "3"}, "limit: has to be a number, not '3'"),
        ({"name": "n", "limit": float("nan")}, "limit: has to be a number, not nan"),
        ({"name": "n", "limit": float("inf")}, "limit: has to be a number, not inf"),
        ({"name": "n", "colour": "grene"}, "colour: can't be 'grene'; did you mean 'green'?"),
        ({"name": "n", "pair": [1.0]}, "pair: has to be a list of 2, not of 1"),
        ({"name": "n", "pair": [1.0, "b"]}, "pair[1]: has to be a number, not 'b'"),
        ({"name": "n", "tags": "a"}, "tags: has to be a list, not 'a'"),
        ({"name": "n", "tags": ["a", {}]}, "tags[1]: has to be a text, not a table"),
        ({"name": "n", "middle": []}, "middle: has to be a table, not a list"),
        ({"name": "n", "middle": {"x": -1}}, "middle: x has to be 0 or more"),
        ({"name": "n", "points": {"one": {"x": 1, "y": -1}}}, "points.one.y: has to be 0 or more"),
        ({"name": "n", "points": {"one": {}}}, "points.one.x: is missing"),
        ({"name": "n", "points": 3}, "points: has to be a table, not 3"),
    ],
)
def test_anything_else_is_refused_with_its_key(told: dict[str, Any], said: str) -> None:
    with pytest.raises(TableError) as refused:
        read_table(Drawing, told)
    assert str(refused.value) == said
    with pytest.raises(TableError) as within:
        read_table(Drawing, told, "settings")
    assert str(within.value) == f"settings.{said}"


def test_an_unknown_word_is_told_the_nearest_or_all_there_are() -> None:
    assert did_you_mean("partitoin", ["heal", "partition"]) == "did you mean 'partition'?"
    assert did_you_mean("xyz", ["heal", "freeze"]) == "there is freeze, heal"
    assert did_you_mean("xyz", []) == "there is none"
