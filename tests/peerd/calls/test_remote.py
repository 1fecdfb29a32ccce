"""What a driver hears of one call, and when it takes the server for lost; the wire itself is `test_caller`'s."""

from __future__ import annotations

import asyncio

from peerd.calls.remote import CALL_SILENCE_S, CALL_STALL_S, LOOK_S, UPLOAD_BYTES_PER_S, _Ears
from tests.peerd.calls.test_caller import REQUEST


def ended_after_s(bytes_a_look: int, *, begun: bool = True) -> tuple[float, str] | None:
    """When, and as what, a call ends whose answer comes at that pace and never comes to its end; None: not within two minutes."""

    async def main() -> tuple[float, str] | None:
        ears = _Ears(REQUEST, b"", 0.0)
        ears.heard, ears._begun = True, int(begun)
        now, total = 0.0, 0
        try:
            while now < 120.0:
                now += LOOK_S
                total += bytes_a_look
                ears.bytes_came(total, now)
                fault = ears.overdue(now, 0)
                if fault is not None:
                    return now, fault.code
            return None
        finally:
            ears.ignore()

    return asyncio.run(main())


def test_a_server_that_says_nothing_and_sends_nothing_is_lost_soon() -> None:
    assert ended_after_s(0) == (CALL_SILENCE_S + LOOK_S, "silent")


def test_an_answer_on_its_way_is_a_word_for_as_long_as_it_comes() -> None:
    assert ended_after_s(int(UPLOAD_BYTES_PER_S * LOOK_S)) is None


def test_an_answer_that_trickles_is_a_server_that_stands_still() -> None:
    found = ended_after_s(1)
    assert found is not None
    assert found[1] == "stalled"
    assert CALL_STALL_S < found[0] <= CALL_STALL_S + 2 * LOOK_S
