"""Every error class of the project: one exit code for one kind of trouble, and the one that the documented table gives."""

from __future__ import annotations

import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Iterator

import blocks
import overlay
import peerd
import routing
from overlay.errors import PeerdError
from peerd import exit_codes
from peerd.exit_codes import BY_ERROR_CODE

NOT_IMPORTED = ("__main__", "demo_training")
SHARED = {exit_codes.INTERNAL, exit_codes.USAGE, BY_ERROR_CODE["connection-lost"]}
"""What docs/cli.md describes as kinds: a bug or a fault between peers, what can't be meant, and the ends of streams."""


def error_classes() -> list[type[PeerdError]]:
    for package in (overlay, routing, blocks, peerd):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not any(part in module.name for part in NOT_IMPORTED):
                importlib.import_module(module.name)

    def below(kind: type[PeerdError]) -> Iterator[type[PeerdError]]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    ours = (overlay.__name__, routing.__name__, blocks.__name__, peerd.__name__)
    return [kind for kind in below(PeerdError) if kind.__module__.partition(".")[0] in ours]


def test_no_exit_code_stands_for_two_kinds_of_trouble() -> None:
    codes: dict[int, set[str]] = defaultdict(set)
    for kind in error_classes():
        codes[kind.exit_code].add(kind.code)
    assert {number: found for number, found in codes.items() if len(found) > 1 and number not in SHARED} == {}


def test_every_class_has_the_exit_code_that_the_table_gives_its_code() -> None:
    found = {kind.__name__: (kind.exit_code, BY_ERROR_CODE.get(kind.code)) for kind in error_classes()}
    assert found
    assert {name: pair for name, pair in found.items() if pair[1] not in (None, pair[0])} == {}
