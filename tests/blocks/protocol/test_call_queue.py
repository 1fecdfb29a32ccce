"""Turns at the device: peers alternate, a peer's calls go in order, and what was dropped is not computed."""

from __future__ import annotations

from blocks.protocol.call_queue import CallQueue, pieces_of


def drained(queue: CallQueue) -> list[tuple[int, int]]:
    taken = []
    while (piece := queue.take()) is not None:
        taken.append(piece)
    return taken


def test_peers_take_turns_however_much_one_has() -> None:
    queue = CallQueue()
    queue.add(b"a", 1, 3)
    queue.add(b"a", 2, 1)
    queue.add(b"b", 3, 2)
    assert drained(queue) == [(1, 0), (3, 0), (1, 1), (3, 1), (1, 2), (2, 0)]


def test_what_is_dropped_is_not_taken() -> None:
    queue = CallQueue()
    queue.add(b"a", 1, 3)
    queue.add(b"b", 2, 1)
    queue.take()
    queue.drop(1)
    assert drained(queue) == [(2, 0)]


def test_pieces_are_whole_rows_of_at_most_the_budget_and_at_least_one_row() -> None:
    assert pieces_of(5, 4, budget=8) == [(0, 2), (2, 4), (4, 5)]
    assert pieces_of(2, 100, budget=8) == [(0, 1), (1, 2)]
