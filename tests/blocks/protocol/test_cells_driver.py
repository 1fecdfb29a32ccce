"""Every cell of the table of docs/protocol.md, section 4.2: names are test_MESSAGE_COLUMN_what_happens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blocks.protocol import limits
from blocks.protocol.commands import (
    CloseHops,
    DriverEvent,
    Ended,
    Moving,
    OpenHop,
    Output,
    RouteLost,
    RouteReady,
    SendControl,
    SendData,
)
from blocks.protocol.messages import (
    Close,
    Envelope,
    Epoch,
    Gap,
    Heartbeat,
    Leaving,
    Open,
    Report,
    Result,
    SessionError,
    Window,
)
from overlay.errors import Blame, ConnectionLost
from overlay.rpc.types import Part

from .scenes import BOOT, CLASS, FIRST, MODEL, ROUTE, SESSION, STRANGER, WIDTH, DriverScene, hidden, wire

LATER = Epoch(1, 9)
EARLIER = Epoch(1, 0)


def lost(events: list[DriverEvent]) -> RouteLost:
    (event,) = events
    assert isinstance(event, RouteLost)
    return event


def violated(scene: DriverScene) -> bool:
    event = lost(scene.driver.poll_events())
    return event.error.code == "protocol-violation" and event.error.blame is Blame.PEER


def result(scene: DriverScene, turn: int, position: int = 0, tokens: int = 1) -> Result:
    return Result(
        SESSION, scene.epoch, 2, 0, turn, position, tokens, "last", MODEL, str(CLASS), "", b"d" * 32, hidden(1)
    )  # fmt: skip


def beat(scene: DriverScene, index: int = 0, steps: int = 1, oldest_s: float | None = None) -> Heartbeat:
    return Heartbeat(SESSION, scene.epoch, index, BOOT, steps, 0, oldest_s)


def windows(scene: DriverScene) -> list[Window]:
    sent = [wire(c.message) for c in scene.driver.poll_commands() if isinstance(c, SendData)]
    return [message for message in sent if isinstance(message, Window)]


def samples(scene: DriverScene) -> list[Envelope]:
    """One message of each kind that a driver takes."""
    return [
        scene.ready(1),
        result(scene, 1),
        Gap(SESSION, scene.epoch, 1, 0, 1, 0),
        beat(scene),
        Report(SESSION, scene.epoch, 1, 2, "unreachable", "no way"),
        Leaving(SESSION, scene.epoch, 1, 30.0),
        SessionError(SESSION, scene.epoch, 1, "busy", "full", True, 1.0),
    ]


KINDS = ["ready", "result", "gap", "heartbeat", "report", "leaving", "error"]


@pytest.mark.parametrize("kind", KINDS)
def test_authority_is_the_peer_at_that_place_of_the_route(kind: str) -> None:
    scene = DriverScene().flowing()
    scene.submit()
    message = samples(scene)[KINDS.index(kind)]
    scene.say(message, STRANGER)
    scene.driver.receive(message.to_message(ROUTE.hops[message.hop_index].peer, b""), STRANGER, scene.now)
    assert scene.driver.poll_events() == []
    assert dict(scene.driver.statistics().refused) == {"not-authorised": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_early_messages_of_an_epoch_that_was_never_opened_violate_the_protocol(kind: str) -> None:
    scene = DriverScene().flowing()
    scene.submit()
    scene.say(replace(samples(scene)[KINDS.index(kind)], epoch=LATER))
    assert violated(scene)


@pytest.mark.parametrize("kind", KINDS)
def test_late_messages_of_an_epoch_that_was_left_are_ignored(kind: str) -> None:
    scene = DriverScene().flowing()
    scene.submit()
    scene.say(replace(samples(scene)[KINDS.index(kind)], epoch=EARLIER))
    assert scene.driver.poll_events() == []


# --- ready ---


def test_every_hop_gets_the_deep_prompts_of_its_own_blocks_in_every_epoch() -> None:
    rows = b"".join(bytes([block]) * (3 * WIDTH * 4) for block in range(6))
    scene = DriverScene(prompts=Part("prompts", "float32", (6, 3, WIDTH), rows))

    def opened() -> list[Part | None]:
        commands = scene.driver.poll_commands()
        orders = [wire(command.message) for command in commands if isinstance(command, SendControl)]
        return [order.prompts for order in orders if isinstance(order, Open)]

    expected = [
        Part("prompts", "float32", (2, 3, WIDTH), rows[part * len(rows) // 3 : (part + 1) * len(rows) // 3])
        for part in range(3)
    ]
    assert opened() == expected
    scene.driver.open(ROUTE, scene.now)
    assert opened() == expected


def test_ready_may_take_as_long_as_deep_prompts_take_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OPEN_BYTES_PER_S_MIN", 96)  # 1 s for 2 blocks of 3 rows
    scene = DriverScene(prompts=Part("prompts", "float32", (6, 3, WIDTH), bytes(6 * 3 * WIDTH * 4)))
    scene.wait(limits.READY_DEADLINE_S + 0.7)
    assert scene.driver.poll_events() == []
    scene.wait(0.7)
    assert [type(event) for event in scene.driver.poll_events()] == [RouteLost]


def test_ready_first_copies_of_all_hops_let_windows_flow() -> None:
    scene = DriverScene(windows=3, window_bytes=100)
    scene.submit()
    scene.say(scene.ready(0))
    scene.say(scene.ready(2))
    assert windows(scene) == []
    scene.say(scene.ready(1))
    assert scene.driver.poll_events() == [RouteReady(scene.epoch, 3, 6, 64)]
    assert len(windows(scene)) == 1


def test_ready_duplicate_is_ignored() -> None:
    scene = DriverScene().flowing()
    scene.say(scene.ready(1))
    assert scene.driver.poll_events() == []


def test_ready_duplicate_of_another_boot_is_a_loss() -> None:
    scene = DriverScene().flowing()
    scene.say(scene.ready(1, boot=b"B" * 16))
    event = lost(scene.driver.poll_events())
    assert (event.hop_index, event.error.code) == (1, "rebooted")


def test_ready_that_never_comes_is_a_loss() -> None:
    scene = DriverScene()
    scene.say(scene.ready(0))
    scene.say(scene.ready(1))
    for _ in range(int(limits.READY_DEADLINE_S) + 1):
        scene.say(beat(scene, 0))
        scene.say(beat(scene, 1))
        scene.wait(1)
    event = lost(scene.driver.poll_events())
    assert (event.hop_index, event.error.code) == (2, "not-ready")


# --- result ---


def test_result_first_copy_returns_the_credit_and_hands_the_rows_on() -> None:
    scene = DriverScene(windows=1).flowing()
    first = scene.submit(0)
    second = scene.submit(1)
    assert [w.turn for w in windows(scene)] == [first]
    scene.say(result(scene, first))
    assert scene.driver.poll_events() == [Output(first, 0, 1, hidden(1))]
    assert [w.turn for w in windows(scene)] == [second]


def test_result_authority_is_the_last_hops() -> None:
    scene = DriverScene().flowing()
    scene.submit()
    scene.say(replace(result(scene, 1), hop_index=1))
    assert violated(scene)


def test_result_first_copy_that_answers_something_else_violates_the_protocol() -> None:
    for change in (
        {"position": 3}, {"want": "none", "hidden": None}, {"compute_class": "none/float16/sdpa/1"},
        {"cancelled": True, "hidden": None},
    ):  # fmt: skip
        scene = DriverScene().flowing()
        scene.submit()
        scene.say(replace(result(scene, 1), **change))
        assert violated(scene)


def test_result_first_copy_of_a_cancelled_turn_is_dropped_and_its_credit_returns() -> None:
    scene = DriverScene(windows=1).flowing()
    scene.submit()
    scene.driver.cancel(scene.now)
    scene.say(replace(result(scene, 1), hidden=None, cancelled=True))
    assert scene.driver.poll_events() == []
    assert scene.driver.room == 1
    assert scene.driver.position == 0


def test_result_duplicate_is_ignored() -> None:
    scene = DriverScene().flowing()
    scene.submit()
    scene.say(result(scene, 1))
    scene.driver.poll_events()
    scene.say(result(scene, 1))
    assert scene.driver.poll_events() == []
    assert scene.driver.room == 2


def test_result_early_for_a_turn_that_was_never_sent_violates_the_protocol() -> None:
    scene = DriverScene(windows=1).flowing()
    scene.submit(0)
    scene.submit(1)
    scene.say(result(scene, 2, 1))  # queued, not sent
    assert violated(scene)


# --- gap ---


def test_gap_first_copy_at_hop_0_replans_and_blames_nobody() -> None:
    scene = DriverScene().flowing()
    scene.submit()
    scene.say(Gap(SESSION, scene.epoch, 0, 0, 1, 0))
    event = lost(scene.driver.poll_events())
    assert (event.hop_index, event.edge, event.error.code) == (None, None, "gap")
    assert event.error.blame is Blame.NETWORK


def test_gap_first_copy_further_on_waits_for_the_predecessor_then_replans() -> None:
    scene = DriverScene().flowing()
    scene.submit()
    scene.say(Gap(SESSION, scene.epoch, 2, 0, 1, 0))
    scene.wait(0.5)
    assert scene.driver.poll_events() == []
    scene.wait(1.0)
    assert lost(scene.driver.poll_events()).error.code == "gap"


def test_gap_first_copy_that_its_predecessor_fills_is_forgotten() -> None:
    scene = DriverScene().flowing()
    scene.submit()
    scene.say(Gap(SESSION, scene.epoch, 2, 0, 1, 0))
    scene.say(result(scene, 1))
    scene.wait(1.5)
    assert [type(event) for event in scene.driver.poll_events()] == [Output]


def test_gap_duplicate_does_not_extend_the_wait() -> None:
    scene = DriverScene().flowing()
    scene.submit()
    for _ in range(3):
        scene.say(Gap(SESSION, scene.epoch, 2, 0, 1, 0))
        scene.wait(0.45)
    assert lost(scene.driver.poll_events()).error.code == "gap"


def test_gap_duplicate_for_an_answered_turn_is_ignored() -> None:
    scene = DriverScene().flowing()
    scene.submit()
    scene.say(result(scene, 1))
    scene.driver.poll_events()
    scene.say(Gap(SESSION, scene.epoch, 0, 0, 1, 0))
    assert scene.driver.poll_events() == []


def test_gap_early_for_a_turn_that_was_never_sent_violates_the_protocol() -> None:
    scene = DriverScene().flowing()
    scene.say(Gap(SESSION, scene.epoch, 1, 0, 5, 0))
    assert violated(scene)


# --- heartbeat ---


def test_heartbeat_first_copy_is_life_and_silence_is_loss() -> None:
    scene = DriverScene().flowing()
    for _ in range(10):
        scene.wait(1)
        for index in range(3):
            scene.say(beat(scene, index))
    assert scene.driver.poll_events() == []
    for _ in range(4):
        scene.wait(1)
        scene.say(beat(scene, 0))
        scene.say(beat(scene, 2))
    event = lost(scene.driver.poll_events())
    assert (event.hop_index, event.error.code) == (1, "silent")


def standing_still(scene: DriverScene, seconds: int, steps_move: bool) -> list[DriverEvent]:
    for second in range(seconds):
        scene.wait(1)
        for index in range(3):
            moving = second if steps_move or index != 1 else 5
            scene.say(beat(scene, index, moving, second + 1.0 if index == 1 else None))
    return scene.driver.poll_events()


def test_heartbeat_first_copy_without_progress_past_the_deadline_is_loss() -> None:
    scene = DriverScene().flowing()
    scene.submit()
    event = lost(standing_still(scene, 9, steps_move=False))
    assert (event.hop_index, event.error.code) == (1, "stalled")


def test_heartbeat_first_copy_with_progress_extends_the_deadline_but_not_for_ever() -> None:
    scene = DriverScene().flowing()
    scene.submit()
    assert standing_still(scene, 60, steps_move=True) == []
    event = lost(standing_still(scene, 70, steps_move=True))
    assert (event.hop_index, event.error.code) == (1, "stalled")


def test_heartbeat_first_copy_that_owns_to_nothing_while_a_turn_is_under_way_means_it_fell_between() -> None:
    scene = DriverScene().flowing()
    scene.submit()
    for _ in range(17):
        scene.wait(1)
        for index in range(3):
            scene.say(beat(scene, index))
    event = lost(scene.driver.poll_events())
    assert (event.hop_index, event.error.code) == (None, "window-lost")


def test_heartbeat_first_copy_of_another_boot_is_a_loss() -> None:
    scene = DriverScene().flowing()
    scene.say(replace(beat(scene, 2), boot_id=b"B" * 16))
    assert lost(scene.driver.poll_events()).error.code == "rebooted"


def test_heartbeat_duplicate_is_harmless() -> None:
    scene = DriverScene().flowing()
    scene.say(beat(scene))
    scene.say(beat(scene))
    assert scene.driver.poll_events() == []


def test_our_own_loop_standing_still_blames_nobody() -> None:
    scene = DriverScene().flowing()
    scene.submit()
    scene.now += 50
    scene.driver.on_timeout(scene.now)
    assert scene.driver.poll_events() == []


# --- report ---


def test_report_first_copy_blames_the_edge() -> None:
    scene = DriverScene().flowing()
    scene.say(Report(SESSION, scene.epoch, 1, 2, "connection-lost", "gone"))
    event = lost(scene.driver.poll_events())
    assert (event.hop_index, event.edge, event.error.blame) == (1, 2, Blame.EDGE)


def test_report_first_copy_of_an_edge_that_is_none_violates_the_protocol() -> None:
    for index, edge in ((1, 1), (0, 2), (2, 4)):
        scene = DriverScene().flowing()
        scene.say(Report(SESSION, scene.epoch, index, edge, "connection-lost", "gone"))
        assert violated(scene)


def test_report_duplicate_is_ignored() -> None:
    scene = DriverScene().flowing()
    for _ in range(2):
        scene.say(Report(SESSION, scene.epoch, 2, 3, "connection-lost", "gone"))
    assert len(scene.driver.poll_events()) == 1


# --- leaving ---


def test_leaving_first_copy_asks_to_move_while_windows_flow() -> None:
    scene = DriverScene().flowing()
    scene.say(Leaving(SESSION, scene.epoch, 1, 30.0))
    assert scene.driver.poll_events() == [Moving(scene.epoch, 1, 30.0)]
    scene.submit()
    assert len(windows(scene)) == 1


def test_leaving_duplicate_is_ignored() -> None:
    scene = DriverScene().flowing()
    for _ in range(2):
        scene.say(Leaving(SESSION, scene.epoch, 1, 30.0))
    assert len(scene.driver.poll_events()) == 1


# --- error ---


@pytest.mark.parametrize(
    ("code", "blame"),
    [
        ("busy", Blame.NETWORK),
        ("draining", Blame.NETWORK),
        ("overrun", Blame.US),
        ("conflict", Blame.US),
        ("compute-failed", Blame.PEER),
        ("not-served", Blame.PEER),
        ("from-the-future", Blame.NETWORK),
    ],
)
def test_error_first_copy_replans_and_blames_as_the_code_says(code: str, blame: Blame) -> None:
    scene = DriverScene()
    scene.say(SessionError(SESSION, scene.epoch, 1, code, "why", True, 1.5))
    event = lost(scene.driver.poll_events())
    assert (event.hop_index, event.error.code, event.error.blame) == (1, code, blame)


def test_error_first_copy_unsupported_is_ignored() -> None:
    scene = DriverScene().flowing()
    scene.say(SessionError(SESSION, scene.epoch, 1, "unsupported", "no"))
    assert scene.driver.poll_events() == []


def test_error_first_copy_fenced_ends_the_session_at_every_hop() -> None:
    scene = DriverScene().flowing()
    scene.say(SessionError(SESSION, scene.epoch, 1, "fenced", "a newer start"))
    (event,) = scene.driver.poll_events()
    assert isinstance(event, Ended)
    closed = [wire(c.message) for c in scene.driver.poll_commands() if isinstance(c, SendControl)]
    assert [type(message) for message in closed] == [Close] * 3
    assert scene.driver.next_timeout() is None


def test_error_duplicate_is_ignored_once_the_route_is_lost() -> None:
    scene = DriverScene().flowing()
    for _ in range(2):
        scene.say(SessionError(SESSION, scene.epoch, 1, "busy", "full", True))
    assert len(scene.driver.poll_events()) == 1


# --- streams ---


def test_stream_first_loss_is_a_hop_lost() -> None:
    scene = DriverScene().flowing()
    scene.driver.hop_lost(scene.epoch, 1, ConnectionLost("gone"), scene.now)
    assert lost(scene.driver.poll_events()).hop_index == 1
    assert scene.driver.next_timeout() is None


def test_stream_duplicate_loss_is_ignored() -> None:
    scene = DriverScene().flowing()
    for index in (1, 2):
        scene.driver.hop_lost(scene.epoch, index, ConnectionLost("gone"), scene.now)
    assert len(scene.driver.poll_events()) == 1


def test_stream_late_loss_of_a_left_epoch_is_ignored() -> None:
    scene = DriverScene().flowing()
    scene.driver.open(ROUTE, scene.now)
    scene.driver.hop_lost(scene.epoch, 1, ConnectionLost("gone"), scene.now)
    assert scene.driver.poll_events() == []


# --- routes ---


def test_the_next_route_closes_the_hops_left_behind_and_opens_all_of_its_own() -> None:
    scene = DriverScene().flowing()
    scene.submit()
    scene.driver.poll_commands()
    new = replace(ROUTE, hops=(*ROUTE.hops[:1], replace(ROUTE.hops[1], peer=STRANGER), *ROUTE.hops[2:]))
    epoch = scene.driver.open(new, scene.now)
    assert epoch == Epoch(1, 2)
    commands = scene.driver.poll_commands()
    old = [c for c in commands if isinstance(c, SendControl) and c.epoch == scene.epoch]
    assert [(c.hop_index, wire(c.message)) for c in old] == [(1, Close(SESSION, epoch, 1))]
    assert CloseHops(scene.epoch) in commands
    assert [c.hop.peer for c in commands if isinstance(c, OpenHop)] == [hop.peer for hop in new.hops]
    assert scene.driver.position == 0


def test_turns_go_on_over_epochs() -> None:
    scene = DriverScene().flowing()
    assert scene.submit() == 1
    scene.driver.hop_lost(scene.epoch, 0, ConnectionLost("gone"), scene.now)
    assert scene.submit(0) == 2  # goes nowhere: all is to be sent again
    scene.epoch = scene.driver.open(ROUTE, scene.now)
    scene.flowing()
    assert scene.submit() == 3
    assert [w.turn for w in windows(scene)] == [3]


def test_a_window_that_no_route_could_carry_is_its_owners_mistake() -> None:
    scene = DriverScene(window_bytes=64).flowing()
    for position, tokens in ((0, 5), (1, 1), (-1, 1), (63, 2)):
        with pytest.raises(ValueError):
            scene.submit(position, tokens)
    with pytest.raises(ValueError):
        scene.submit(0, 2, (0, 3))


def test_garbage_from_a_hop_loses_the_route_and_blames_that_peer() -> None:
    scene = DriverScene().flowing()
    message = replace(scene.ready(0).to_message(FIRST, b""), header={"s": 3})
    scene.driver.receive(message, FIRST, scene.now)
    event = lost(scene.driver.poll_events())
    assert (event.hop_index, event.error.code, event.error.blame) == (0, "bad-message", Blame.PEER)


def test_a_window_made_before_the_grant_was_known_and_too_large_for_it_loses_the_route_not_the_session() -> None:
    scene = DriverScene(window_bytes=32)
    scene.submit(0, 1)
    scene.submit(1, 3)
    for index in range(3):
        scene.say(scene.ready(index))
    events = scene.driver.poll_events()
    assert isinstance(events[-1], RouteLost)
    assert (events[-1].error.code, events[-1].error.blame) == ("window-too-large", Blame.US)
