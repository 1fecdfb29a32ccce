"""Every cell of docs/training.md, section 3: what a copy of a call is answered, by what became of the first."""

from __future__ import annotations

from blocks.protocol import call_table
from blocks.protocol.call_errors import CallFault
from blocks.protocol.call_table import Answer, Begin, CallTable, Drop, Refuse
from overlay.rpc.types import Message, Part

PEER, OTHER = b"peer", b"other"
CALL, DIGEST = b"c" * 16, b"d" * 32
FAULT = CallFault("failed", "it broke")


def output(size: int = 4) -> Message:
    return Message("output", {}, (Part("hidden", "uint8", (size,), bytes(size)),))


def begun(table: CallTable, channel: object = "one", call: bytes = CALL, now: float = 0.0) -> int:
    (command,) = table.receive(PEER, call, DIGEST, channel, now)
    assert isinstance(command, Begin)
    return command.number


def answered(table: CallTable, now: float = 0.0) -> Message:
    message = output()
    assert table.answered(begun(table, now=now), message, now) == [Answer("one", message)]
    return message


def code_of(commands: list[call_table.CallCommand]) -> str:
    (command,) = commands
    assert isinstance(command, Refuse)
    return command.fault.code


# --- unknown ---


def test_a_first_copy_is_computed_and_answered() -> None:
    table = CallTable()
    message = answered(table)
    assert message.kind == "output"
    assert table.running_count == 0


def test_nobody_meets_another_peers_call() -> None:
    table = CallTable()
    number = begun(table)
    (command,) = table.receive(OTHER, CALL, b"x" * 32, "two", 0.0)
    assert isinstance(command, Begin)
    assert command.number != number


# --- running ---


def test_a_copy_of_a_running_call_is_attached_and_gets_the_one_answer() -> None:
    table = CallTable()
    number = begun(table)
    assert table.receive(PEER, CALL, DIGEST, "two", 1.0) == []
    message = output()
    assert table.answered(number, message, 2.0) == [Answer("one", message), Answer("two", message)]


def test_another_call_under_a_running_id_is_a_conflict_and_the_first_goes_on() -> None:
    table = CallTable()
    number = begun(table)
    assert code_of(table.receive(PEER, CALL, b"x" * 32, "two", 1.0)) == "conflict"
    message = output()
    assert table.answered(number, message, 2.0) == [Answer("one", message)]


def test_a_reset_detaches_and_the_last_one_cancels() -> None:
    table = CallTable()
    number = begun(table)
    table.receive(PEER, CALL, DIGEST, "two", 0.0)
    assert table.channel_lost("one") == []
    assert table.channel_lost("two") == [Drop(number)]
    assert table.answered(number, output(), 1.0) == []


def test_a_cancelled_calls_result_never_answers_a_new_call_of_the_same_id() -> None:
    table = CallTable()
    old = begun(table)
    table.channel_lost("one")
    new = begun(table, "two")
    assert table.answered(old, output(1), 1.0) == []
    message = output(2)
    assert table.answered(new, message, 1.0) == [Answer("two", message)]


def test_an_error_is_said_to_all_and_a_later_copy_is_a_first_one() -> None:
    table = CallTable()
    number = begun(table)
    table.receive(PEER, CALL, DIGEST, "two", 0.0)
    assert table.failed(number, FAULT) == [Refuse("one", FAULT), Refuse("two", FAULT)]
    begun(table, "three")


# --- answered, kept ---


def test_a_copy_of_an_answered_call_is_answered_again_without_computing() -> None:
    table = CallTable()
    message = answered(table)
    assert table.receive(PEER, CALL, DIGEST, "two", call_table.KEPT_S - 1) == [Answer("two", message)]


def test_another_call_under_an_answered_id_is_a_conflict() -> None:
    table = CallTable()
    answered(table)
    assert code_of(table.receive(PEER, CALL, b"x" * 32, "two", 1.0)) == "conflict"


def test_a_reset_after_the_answer_changes_nothing() -> None:
    table = CallTable()
    message = answered(table)
    assert table.channel_lost("one") == []
    assert table.receive(PEER, CALL, DIGEST, "two", 1.0) == [Answer("two", message)]


# --- answered, no longer kept ---


def test_an_answer_out_of_date_is_not_computed_again() -> None:
    table = CallTable()
    answered(table)
    assert code_of(table.receive(PEER, CALL, DIGEST, "two", call_table.KEPT_S)) == "call-expired"


def test_another_call_under_an_expired_id_is_a_conflict_while_the_digest_is_known() -> None:
    table = CallTable()
    answered(table)
    assert code_of(table.receive(PEER, CALL, b"x" * 32, "two", call_table.KEPT_S)) == "conflict"


def test_an_id_is_free_again_after_ten_minutes() -> None:
    table = CallTable()
    answered(table)
    table.receive(PEER, CALL, DIGEST, "two", call_table.KEPT_S)
    begun(table, "three", now=call_table.REMEMBERED_S)


# --- bounds ---


def test_answers_in_excess_go_oldest_first() -> None:
    table = CallTable()
    for index in range(call_table.KEPT_MAX + 1):
        call = index.to_bytes(16, "big")
        table.answered(begun(table, call=call), output(), 1.0)
    assert code_of(table.receive(PEER, (0).to_bytes(16, "big"), DIGEST, "two", 1.0)) == "call-expired"
    (command,) = table.receive(PEER, (1).to_bytes(16, "big"), DIGEST, "two", 1.0)
    assert isinstance(command, Answer)


def test_an_answer_over_the_limit_is_said_but_not_kept() -> None:
    table = CallTable()
    message = output(call_table.KEPT_BYTES_MAX + 1)
    assert table.answered(begun(table), message, 1.0) == [Answer("one", message)]
    assert code_of(table.receive(PEER, CALL, DIGEST, "two", 1.0)) == "call-expired"


def test_one_peer_cannot_make_the_server_forget_anothers_ids() -> None:
    table = CallTable()
    (command,) = table.receive(OTHER, CALL, DIGEST, "theirs", 0.0)
    assert isinstance(command, Begin)
    table.answered(command.number, output(call_table.KEPT_BYTES_MAX + 1), 0.0)
    big = output(call_table.KEPT_BYTES_MAX + 1)
    for index in range(call_table.REMEMBERED_PER_PEER_MAX + 8):
        table.answered(begun(table, call=index.to_bytes(16, "big")), big, 1.0)
    assert code_of(table.receive(OTHER, CALL, DIGEST, "again", 1.0)) == "call-expired"
    begun(table, "two", call=(0).to_bytes(16, "big"), now=1.0)
