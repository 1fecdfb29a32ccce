"""Exit codes mean one thing each, and the documentation says which."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import blocks.model.errors
import overlay.errors
import overlay.transport.tcp
import peerd.adapters.errors
import peerd.generation
import peerd.hidden_sessions
import peerd.local_api.errors
import peerd.store
import peerd.training.errors
import routing.errors
from overlay.errors import PeerdError
from peerd import exit_codes
from peerd.exit_codes import BY_ERROR_CODE, exit_code_of

DOCUMENT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
MODULES = (
    blocks.model.errors, overlay.errors, overlay.transport.tcp, peerd.generation, peerd.local_api.errors, peerd.store,
    routing.errors, peerd.training.errors, peerd.adapters.errors, peerd.hidden_sessions,
)  # fmt: skip


def documented() -> dict[int, str | None]:
    rows = re.findall(r"^\| (\d+) \| (?:`([a-z-]+)`)? ?\|", DOCUMENT, re.MULTILINE)
    return {int(number): name or None for number, name in rows}


def test_every_error_code_has_a_number_of_its_own() -> None:
    assert len(set(BY_ERROR_CODE.values())) == len(BY_ERROR_CODE)


def test_the_documentation_has_the_same_table() -> None:
    table = documented()
    assert {number: name for number, name in table.items() if name and number not in (1, 7)} == {
        number: code for code, number in BY_ERROR_CODE.items()
    }
    own = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    assert own <= set(table)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_errors_and_the_table_agree(module: object) -> None:
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, PeerdError)]
    wrong = {
        kind.__name__: (kind.exit_code, BY_ERROR_CODE[kind.code])
        for kind in kinds
        if kind.code in BY_ERROR_CODE and kind.exit_code != BY_ERROR_CODE[kind.code]
    }
    assert kinds
    assert wrong == {}


def test_unknown_codes_go_by_whose_fault_they_are() -> None:
    assert exit_code_of("something-new", 400) == exit_codes.USAGE
    assert exit_code_of("something-new", 503) == exit_codes.INTERNAL
