"""The tables of docs/protocol.md and the tests that answer them can't drift apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocks.protocol.cells import DRIVER_CELLS, HOP_CELLS

from . import test_cells_driver, test_cells_hop

ROOT = Path(__file__).parents[3]
COLUMNS = ("authority", "first", "duplicate", "early", "late")


def table(heading: str) -> dict[str, list[str]]:
    """The rows of the table under ``heading``, by the first word of their first cell."""
    text = (ROOT / "docs/protocol.md").read_text(encoding="utf-8").split(heading)[1]
    rows = {}
    for line in text.splitlines()[1:]:
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith(("###", "**")):
            break
        if line.startswith("| ") and not line.startswith("| message"):
            rows[cells[0].strip("|` ").split()[0]] = cells[1:]
    return rows


def untested(heading: str, module: object, shared: tuple[str, ...]) -> list[str]:
    names = dir(module)
    missing = []
    for message, cells in table(heading).items():
        assert len(cells) == len(COLUMNS), message
        for column, cell in zip(COLUMNS, cells, strict=True):
            if cell.rstrip(" |").startswith("-") or column in shared:
                continue
            if not any(name.startswith(f"test_{message}_{column}") for name in names):
                missing.append(f"test_{message}_{column}_...")
    return missing


def test_every_cell_of_a_hop_has_its_test() -> None:
    assert len(table("### 4.1")) == 8
    assert untested("### 4.1", test_cells_hop, ()) == []


def test_every_cell_of_a_driver_has_its_test() -> None:
    # Authority, early and late copies have one parametrised test each, over KINDS.
    rows = table("### 4.2")
    assert [row for row in rows if row != "stream"] == test_cells_driver.KINDS
    assert untested("### 4.2", test_cells_driver, ("authority", "early", "late")) == []


@pytest.mark.parametrize(("heading", "cells"), [("### 4.1", HOP_CELLS), ("### 4.2", DRIVER_CELLS)])
def test_the_code_has_the_rows_of_the_document(heading: str, cells: dict[str, object]) -> None:
    assert sorted(row for row in table(heading) if row != "stream") == sorted(cells)
