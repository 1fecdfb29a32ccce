from __future__ import annotations

import json
from typing import Any

import pytest

from peerd.training.errors import BadSettings
from peerd.training.settings import JobSettings, parse_settings


def test_settings_survive_json() -> None:
    settings = JobSettings("one", model="demo", lr=0.25, max_length=64, skip_bad=True)
    assert parse_settings(json.loads(json.dumps(settings.document()))) == settings


WRONG: dict[str, list[Any]] = {
    "name": ["", "Big", "../up", ".hidden", "a" * 65, 3, None, "a.new"],
    "method": ["lora", 1, None],
    "length": [0, -1, 1.5, True, "8", 10**30],
    "lr": [0, -1, "x", True, float("nan"), float("inf"), 10**400],
    "eval_split": [-0.1, 1.0],
    "schedule": ["cosine"],
    "seed": [-1, 2**70],
    "skip_bad": [1, "yes"],
    "model": ["", 3],
    "batch": [0, 10**9],
    "max_length": [1],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_setting_that_cannot_be_meant_is_named_with_what_it_may_be(field: str, value: object) -> None:
    with pytest.raises(BadSettings) as caught:
        parse_settings({"name": "one", field: value})
    assert caught.value.param == field
    assert str(caught.value).endswith(".")


def test_an_unknown_setting_is_refused_with_a_suggestion() -> None:
    with pytest.raises(BadSettings, match="did you mean epochs"):
        parse_settings({"name": "one", "epoch": 3})


@pytest.mark.parametrize("document", [None, [], "name", {}])
def test_settings_without_a_name_are_refused(document: object) -> None:
    with pytest.raises(BadSettings):
        parse_settings(document)
