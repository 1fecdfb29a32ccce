"""The shelf of tapes: bounded in bytes, number and age, and no tape leaves it while somebody uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peerd.decoding import DriverModel
from peerd.local_api.tape_shelf import KeptTape, TapeShelf
from routing.types import ComputeClass, ModelId, Span

MODEL = DriverModel("key", ModelId(bytes(32)), ComputeClass("none", "float32"), 4, 16)


@dataclass
class SizedTape:
    size_bytes: int


def kept(size_bytes: int = 10) -> KeptTape:
    tape: Any = SizedTape(size_bytes)
    return KeptTape(MODEL, Span(0, 2), (1, 2, 4), tape)


def has(shelf: TapeShelf, name: str, now: float = 0.0) -> bool:
    """Whether a tape is there, without taking it away."""
    try:
        with shelf.borrow(name, now) as found:
            raise LookupError if found is None else KeyError
    except KeyError:
        return True
    except LookupError:
        return False


def test_a_backward_that_went_well_takes_its_tape_away() -> None:
    shelf = TapeShelf()
    tape = kept()
    assert shelf.put("a", tape, 0.0)
    with shelf.borrow("a", 1.0) as found:
        assert found is tape
    assert (len(shelf), shelf.size_bytes) == (0, 0)
    with shelf.borrow("a", 1.0) as found:
        assert found is None


def test_a_backward_that_failed_leaves_its_tape() -> None:
    shelf = TapeShelf()
    shelf.put("a", kept(), 0.0)
    assert has(shelf, "a")
    assert has(shelf, "a")
    assert shelf.size_bytes == 10


def test_the_longest_unused_go_first() -> None:
    shelf = TapeShelf(bytes_max=30)
    for name in ("a", "b", "c"):
        shelf.put(name, kept(), 0.0)
    assert has(shelf, "a")  # and so was used
    shelf.put("d", kept(15), 1.0)
    assert [has(shelf, name) for name in ("a", "b", "c", "d")] == [True, False, False, True]
    assert shelf.size_bytes == 25


def test_the_number_of_tapes_is_bounded() -> None:
    shelf = TapeShelf(count_max=2)
    for name in ("a", "b", "c"):
        shelf.put(name, kept(), 0.0)
    assert len(shelf) == 2
    assert not has(shelf, "a")


def test_what_is_larger_than_the_shelf_is_not_kept() -> None:
    shelf = TapeShelf(bytes_max=30)
    shelf.put("a", kept(), 0.0)
    assert not shelf.put("b", kept(31), 0.0)
    assert not has(shelf, "b")


def test_a_tape_in_use_is_not_put_out() -> None:
    shelf = TapeShelf(bytes_max=20, life_s=5.0)
    shelf.put("a", kept(15), 0.0)
    with shelf.borrow("a", 1.0) as found:
        assert found is not None
        assert not shelf.put("b", kept(15), 2.0)
        shelf.expire(100.0)
        assert len(shelf) == 1
    assert shelf.put("b", kept(15), 3.0)


def test_tapes_expire_and_use_renews_them() -> None:
    shelf = TapeShelf(life_s=10.0)
    shelf.put("a", kept(), 0.0)
    shelf.put("b", kept(), 1.0)
    assert shelf.next_timeout() == 10.0
    assert has(shelf, "a", 5.0)
    assert shelf.next_timeout() == 11.0
    shelf.expire(11.0)
    assert [has(shelf, name, 11.0) for name in ("a", "b")] == [True, False]
    assert shelf.next_timeout() == 21.0
