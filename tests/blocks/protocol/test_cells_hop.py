"""Every cell of the table of docs/protocol.md, section 4.1: names are test_MESSAGE_COLUMN_what_happens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blocks.protocol import limits
from blocks.protocol.commands import CloseChannel, CloseNext, HopCommand, OpenNext, Submit
from blocks.protocol.device import ReleaseJob
from blocks.protocol.messages import (
    RESERVED_KINDS,
    Cancel,
    Close,
    Epoch,
    Gap,
    Heartbeat,
    Ready,
    Report,
    Reserved,
    Result,
    SessionError,
    Window,
)
from blocks.protocol.session_errors import SessionFault
from overlay.rpc.types import Part

from .scenes import (
    BOOT,
    DRIVER,
    FIRST,
    SESSION,
    STRANGER,
    THIRD,
    HopScene,
    edges,
    jobs,
    passed_on,
    prompts,
    said,
)

E1, E2, E0 = Epoch(1, 1), Epoch(1, 2), Epoch(1, 0)


def codes(commands: list[HopCommand], channel: object = "control") -> list[str]:
    return [m.code for m in said(commands, channel) if isinstance(m, SessionError | Report)]


def refused(scene: HopScene, code: str = "not-authorised") -> int:
    return dict(scene.hops.statistics().refused).get(code, 0)


# --- open ---


def test_open_authority_later_opens_are_the_first_drivers_alone() -> None:
    scene = HopScene().opened()
    commands = scene.say(scene.order(E2), STRANGER, "other")
    assert commands == [CloseChannel("other", "not-authorised")]
    assert scene.feed(scene.window()) != []  # the session of the first driver still computes


def test_open_first_copy_takes_the_route_dials_onwards_and_answers_ready() -> None:
    scene = HopScene()
    commands = scene.say(scene.order())
    assert [(e.peer, e.edge.hop_index, e.to_driver) for e in edges(commands)] == [(THIRD, 1, False)]
    assert said(commands) == [Ready(SESSION, E1, 1, BOOT, (), 0, 4, 4096, 64)]


def test_open_first_copy_at_the_last_hop_dials_the_driver() -> None:
    scene = HopScene(index=2)
    (edge,) = edges(scene.say(scene.order()))
    assert (edge.peer, edge.addresses, edge.to_driver) == (DRIVER, ("/ip4/127.0.0.1/tcp/9",), True)


def test_open_first_copy_with_deep_prompts_gives_them_to_windows_that_begin_below_their_length() -> None:
    scene = HopScene()
    scene.say(scene.order(prompts=prompts(3)))
    given = []
    for turn, (position, tokens) in enumerate([(0, 2), (2, 2), (4, 1)], 1):
        (job,) = jobs(scene.feed(scene.window(turn, position, tokens)))
        given.append(job.prompts)
        scene.finish(job)
    assert given == [prompts(3), prompts(3), None]


@pytest.mark.parametrize("wrong", [prompts(width=8), prompts(dtype="int32")])
def test_open_first_copy_with_prompts_that_are_no_boundary_leaves_nothing(wrong: Part) -> None:
    scene = HopScene()
    assert codes(scene.say(scene.order(prompts=wrong))) == ["bad-window"]
    assert (scene.door.held, scene.hops.session_count) == ([], 0)


def test_open_first_copy_beyond_a_driver_s_room_for_prompts_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PROMPTS_BYTES_PER_DRIVER_MAX", 2 * prompts().size_bytes - 1)
    scene = HopScene()
    scene.say(scene.order(prompts=prompts()))
    assert codes(scene.say(scene.order(prompts=prompts(), session=b"t" * 16), channel="other"), "other") == ["busy"]
    # In a new epoch of its own session they take the place of the former ones.
    assert codes(scene.say(scene.order(E2, prompts=prompts()), channel="second"), "second") == []
    assert not scene.hops.has_room_for_prompts(DRIVER, prompts().size_bytes)
    assert scene.hops.has_room_for_prompts(STRANGER, prompts().size_bytes)


def test_open_first_copy_is_turned_away_by_its_header_alone() -> None:
    scene = HopScene()
    header = scene.order().to_message(DRIVER, scene.peer)
    scene.hops.turn_away(header, DRIVER, "control")
    assert codes(scene.poll()) == ["busy"]
    scene.hops.turn_away(replace(header, kind="close"), DRIVER, "control")
    assert scene.poll() == [CloseChannel("control", "bad-message")]


def test_open_duplicate_with_the_same_prompts_is_ready_and_with_others_a_conflict() -> None:
    scene = HopScene()
    scene.say(scene.order(prompts=prompts(3)))
    (again,) = said(scene.say(scene.order(prompts=prompts(3)), channel="again"), "again")
    assert isinstance(again, Ready)
    for other in (prompts(3, fill=2), prompts(2), None):
        assert codes(scene.say(scene.order(prompts=other), channel="other"), "other") == ["conflict"]


def test_open_first_copy_of_a_newer_epoch_drops_kv_and_journal() -> None:
    scene = HopScene().opened()
    scene.compute(scene.window())
    commands = scene.say(scene.order(E2), channel="second")
    assert CloseNext(edges(scene.commands)[0].edge) in commands
    assert any(isinstance(c, Submit) and isinstance(c.job, ReleaseJob) for c in commands)
    (ready,) = said(commands, "second")
    assert isinstance(ready, Ready)
    assert ready.kv_have == ()
    assert scene.hops.statistics().journal_bytes == 0
    assert scene.door.held == scene.door.held[:1]


def test_open_first_copy_that_is_refused_leaves_nothing() -> None:
    scene = HopScene()
    scene.door.grant = SessionFault("busy", "no memory now", 2.5)
    (error,) = said(scene.say(scene.order()))
    assert isinstance(error, SessionError)
    assert (error.code, error.retryable, error.retry_after_s) == ("busy", True, 2.5)
    assert scene.hops.session_count == 0


def test_open_first_copy_forgets_work_of_the_former_epoch_that_ends_later() -> None:
    scene = HopScene().opened()
    (job,) = jobs(scene.feed(scene.window()))
    scene.say(scene.order(E2))
    assert passed_on(scene.finish(job)) == []


def test_open_duplicate_of_the_same_route_is_answered_with_the_true_kv_on_its_channel() -> None:
    scene = HopScene().opened()
    scene.compute(scene.window(tokens=3))
    scene.hops.channel_lost("control", scene.now)
    commands = scene.say(scene.order(), channel="again")
    (ready,) = said(commands, "again")
    assert isinstance(ready, Ready)
    assert ready.kv_have == ((0, 3),)
    assert len(commands) == 1


def test_open_duplicate_with_another_route_conflicts() -> None:
    scene = HopScene().opened()
    route = (*scene.route[:2], replace(scene.route[2], peer=STRANGER))
    assert codes(scene.say(scene.order(route=route), channel="again"), "again") == ["conflict"]
    assert scene.hops.session_count == 1


def test_open_late_of_a_lower_incarnation_is_fenced() -> None:
    scene = HopScene()
    scene.say(scene.order(Epoch(2, 1)))
    assert codes(scene.say(scene.order(Epoch(1, 9)))) == ["fenced"]


def test_open_late_of_a_lower_counter_is_stale() -> None:
    scene = HopScene().opened()
    assert codes(scene.say(scene.order(E0))) == ["stale-epoch"]
    assert scene.hops.session_count == 1


# --- window ---


def test_window_authority_is_the_predecessors_alone() -> None:
    scene = HopScene().opened()
    assert scene.say(scene.window(), STRANGER, "x") == [CloseChannel("x", "not-authorised")]
    assert scene.say(scene.window(), DRIVER, "y") == [CloseChannel("y", "not-authorised")]


def test_window_authority_of_a_forged_sender_is_refused() -> None:
    scene = HopScene().opened()
    scene.hops.receive(scene.window().to_message(FIRST, scene.peer), STRANGER, "x", scene.now)
    assert scene.poll() == [CloseChannel("x", "not-authorised")]


def test_window_first_copy_is_computed_journalled_and_passed_on() -> None:
    scene = HopScene().opened()
    (window,) = passed_on(scene.compute(scene.window(tokens=2), fill=9))
    assert isinstance(window, Window)
    assert (window.hop_index, window.turn, window.tokens) == (2, 1, 2)
    assert window.hidden is not None
    assert bytes(window.hidden.data) == bytes([9]) * 32
    assert window.input_digest is not None
    assert scene.hops.statistics().journal_bytes == 32


@pytest.mark.parametrize(("want", "keep", "rows"), [("none", 0, 0), ("last", 1, 1), ("all", -1, 4), ((1, 3), 3, 2)])
def test_window_first_copy_at_the_last_hop_answers_the_rows_wanted(want: object, keep: int, rows: int) -> None:
    scene = HopScene(index=2).opened()
    (job,) = jobs(scene.feed(scene.window(tokens=4, want=want)))
    assert job.keep == keep
    (result,) = passed_on(scene.finish(job))
    assert isinstance(result, Result)
    assert (0 if result.hidden is None else result.hidden.shape[0]) == rows


def test_window_first_copy_behind_the_end_truncates() -> None:
    scene = HopScene().opened()
    scene.compute(scene.window(1, 0, 4))
    (job,) = jobs(scene.feed(scene.window(2, 1, 1)))
    assert job.position == 1
    scene.finish(job)
    assert codes(scene.feed(scene.window(3, 3, 1))) == []
    assert isinstance(said(scene.poll() or scene.commands)[-1], Gap)


def test_window_first_copy_over_the_grant_ends_the_session() -> None:
    scene = HopScene().opened()
    for turn in range(1, 5):
        assert codes(scene.feed(scene.window(turn, turn - 1))) == []
    assert codes(scene.feed(scene.window(5, 4))) == ["overrun"]
    assert scene.hops.session_count == 0
    assert scene.door.held == []


@pytest.mark.parametrize(
    "change",
    [{"compute_class": "none/float16/sdpa/1"}, {"adapter": "other"}, {"branch": 1}, {"position": 60, "tokens": 9}],
)
def test_window_first_copy_that_does_not_fit_the_session_is_reported(change: dict[str, object]) -> None:
    scene = HopScene().opened()
    window = scene.window(**change)  # type: ignore[arg-type]
    commands = scene.feed(window)
    assert jobs(commands) == []
    (report,) = said(commands)
    assert isinstance(report, Report)
    assert report.edge == 0


def test_window_first_copy_that_does_not_fit_at_hop_0_is_the_drivers_error() -> None:
    scene = HopScene(index=0).opened()
    assert codes(scene.feed(scene.window(adapter="other"))) == ["conflict"]


def test_window_duplicate_is_answered_from_the_journal_without_computing() -> None:
    scene = HopScene().opened()
    first = passed_on(scene.compute(scene.window()))
    commands = scene.feed(scene.window())
    assert jobs(commands) == []
    assert passed_on(commands) == first


def test_window_duplicate_of_one_that_is_being_computed_waits_for_its_answer() -> None:
    scene = HopScene().opened()
    (job,) = jobs(scene.feed(scene.window()))
    assert scene.feed(scene.window()) == []
    assert len(passed_on(scene.finish(job))) == 1


def test_window_duplicate_with_another_digest_conflicts() -> None:
    scene = HopScene().opened()
    scene.compute(scene.window())
    commands = scene.feed(scene.window(fill=2))
    assert codes(commands) == ["conflict"]
    assert passed_on(commands) == []


def test_window_early_of_a_higher_epoch_is_held_for_its_open() -> None:
    scene = HopScene().opened()
    assert scene.feed(scene.window(epoch=E2)) == []
    assert len(jobs(scene.say(scene.order(E2)))) == 1


def test_window_early_without_a_session_is_held_for_its_open() -> None:
    scene = HopScene()
    assert scene.feed(scene.window()) == []
    assert len(jobs(scene.say(scene.order()))) == 1


def test_window_early_from_a_stranger_is_refused_when_its_open_comes() -> None:
    scene = HopScene()
    assert scene.say(scene.window(), STRANGER, "x") == []
    assert CloseChannel("x", "not-authorised") in scene.say(scene.order())


def test_window_early_that_waits_in_vain_is_answered_unknown_epoch_backwards() -> None:
    scene = HopScene()
    scene.feed(scene.window())
    assert codes(scene.wait(1.9), "data") == []
    assert codes(scene.wait(0.5), "data") == ["unknown-epoch"]


def test_window_early_beyond_the_bound_is_answered_at_once() -> None:
    scene = HopScene()
    for turn in range(1, limits.HELD_WINDOWS_PER_ORIGIN_MAX + 1):
        assert scene.feed(scene.window(turn)) == []
    assert codes(scene.feed(scene.window(99)), "data") == ["unknown-epoch"]


def test_window_early_in_position_is_a_gap_to_driver_and_predecessor_once() -> None:
    scene = HopScene().opened()
    scene.compute(scene.window(1, 0, 2))
    commands = scene.feed(scene.window(2, 5))
    gap = Gap(SESSION, E1, 1, 0, 2, 2)
    assert said(commands) == [gap]
    assert said(commands, "data") == [gap]
    assert scene.feed(scene.window(3, 6)) == []


def test_window_late_in_turn_or_epoch_is_dropped() -> None:
    scene = HopScene().opened()
    scene.compute(scene.window(5))
    assert scene.feed(scene.window(4)) == []
    assert scene.say(scene.window(6, epoch=E0), STRANGER, "old") == []
    assert refused(scene) == 0


def test_window_late_for_its_cancel_is_passed_on_empty() -> None:
    scene = HopScene().opened()
    scene.say(Cancel(SESSION, E1, 1, 3))
    commands = scene.feed(scene.window(3))
    assert jobs(commands) == []
    (window,) = passed_on(commands)
    assert isinstance(window, Window)
    assert window.cancelled


def test_window_late_under_a_tombstone_is_dropped() -> None:
    scene = HopScene().opened()
    scene.say(Close(SESSION, E1, 1))
    assert scene.feed(scene.window()) == []
    assert scene.hops.statistics().windows_early == 0


# --- cancel ---


def test_cancel_authority_is_the_drivers() -> None:
    scene = HopScene().opened()
    assert scene.say(Cancel(SESSION, E1, 1, 9), FIRST, "x") == [CloseChannel("x", "not-authorised")]


def test_cancel_first_copy_empties_what_waits_and_what_runs_in_order() -> None:
    scene = HopScene().opened()
    started = [job for turn in range(1, 5) for job in jobs(scene.feed(scene.window(turn, turn - 1)))]
    assert len(started) == limits.DEVICE_WINDOWS
    assert passed_on(scene.say(Cancel(SESSION, E1, 1, 4))) == []
    out = [window for job in started for window in passed_on(scene.finish(job))]
    assert [(w.turn, w.cancelled) for w in out if isinstance(w, Window)] == [(n, True) for n in range(1, 5)]
    assert len(jobs(scene.feed(scene.window(5, 2)))) == 1  # what ran is held, what waited is not
    assert isinstance(said(scene.feed(scene.window(6, 9)))[0], Gap)


def test_cancel_duplicate_and_lower_change_nothing() -> None:
    scene = HopScene().opened()
    scene.say(Cancel(SESSION, E1, 1, 4))
    assert scene.say(Cancel(SESSION, E1, 1, 4)) == []
    assert scene.say(Cancel(SESSION, E1, 1, 2)) == []
    assert jobs(scene.feed(scene.window(4))) == []
    assert len(jobs(scene.feed(scene.window(5)))) == 1


def test_cancel_early_is_ignored() -> None:
    scene = HopScene().opened()
    scene.say(Cancel(SESSION, E2, 1, 9))
    assert len(jobs(scene.feed(scene.window(1)))) == 1


def test_cancel_late_is_ignored() -> None:
    scene = HopScene().opened()
    scene.say(Cancel(SESSION, E0, 1, 9))
    assert len(jobs(scene.feed(scene.window(1)))) == 1


# --- heartbeat ---


def test_heartbeat_authority_is_the_drivers() -> None:
    scene = HopScene().opened()
    scene.say(Heartbeat(SESSION, E1, 1), STRANGER, "x")
    assert refused(scene) == 1


def test_heartbeat_first_copy_and_duplicate_renew_the_lease() -> None:
    scene = HopScene().opened()
    for _ in range(4):
        scene.wait(20)
        scene.say(Heartbeat(SESSION, E1, 1))
        scene.say(Heartbeat(SESSION, E1, 1))
    assert scene.hops.session_count == 1
    assert codes(scene.wait(31)) == ["lease-expired"]
    assert scene.hops.session_count == 0


def test_heartbeat_duplicate_is_harmless() -> None:
    scene = HopScene().opened()
    assert scene.say(Heartbeat(SESSION, E1, 1)) == scene.say(Heartbeat(SESSION, E1, 1)) == []


@pytest.mark.parametrize("epoch", [E0, E2])
def test_heartbeat_early_and_late_renew_nothing(epoch: Epoch) -> None:
    scene = HopScene().opened()
    scene.wait(20)
    scene.say(Heartbeat(SESSION, epoch, 1))
    scene.wait(11)
    assert scene.hops.session_count == 0


test_heartbeat_late_renews_nothing = test_heartbeat_early_and_late_renew_nothing


# --- close ---


def test_close_authority_is_the_drivers() -> None:
    scene = HopScene().opened()
    scene.say(Close(SESSION, E1, 1), FIRST, "x")
    assert scene.hops.session_count == 1


def test_close_first_copy_frees_everything() -> None:
    scene = HopScene().opened()
    scene.compute(scene.window())
    commands = scene.say(Close(SESSION, E1, 1))
    assert [type(c) for c in commands] == [CloseNext, Submit]
    assert scene.door.held == []
    assert scene.hops.session_count == 0


def test_close_duplicate_meets_a_tombstone_that_fades() -> None:
    scene = HopScene().opened()
    scene.say(Close(SESSION, E1, 1))
    assert scene.say(Close(SESSION, E1, 1)) == []
    assert codes(scene.say(scene.order(E1))) == ["stale-epoch"]
    scene.wait(limits.TOMBSTONE_S + 1)
    assert scene.hops.statistics().tombstones == 0
    assert scene.hops.next_timeout() is None


def test_close_early_closes_too_and_a_higher_open_comes_back() -> None:
    scene = HopScene().opened()
    scene.say(Close(SESSION, E2, 1))
    assert scene.hops.session_count == 0
    assert codes(scene.say(scene.order(E2))) == ["stale-epoch"]
    assert isinstance(said(scene.say(scene.order(Epoch(1, 3))))[0], Ready)


def test_close_late_is_ignored() -> None:
    scene = HopScene()
    scene.say(scene.order(E2))
    scene.say(Close(SESSION, E1, 1))
    assert scene.hops.session_count == 1


# --- gap (from the successor) ---


def computed(turns: int) -> HopScene:
    scene = HopScene().opened()
    for turn in range(1, turns + 1):
        scene.compute(scene.window(turn, turn - 1))
    return scene


def test_gap_authority_is_the_successors() -> None:
    scene = computed(2)
    assert scene.say(Gap(SESSION, E1, 2, 0, 2, 0), FIRST, "x") == [CloseChannel("x", "not-authorised")]


@pytest.mark.parametrize("copies", [1, 2])
def test_gap_first_copy_is_filled_from_the_journal(copies: int) -> None:
    scene = computed(3)
    for _ in range(copies):
        out = passed_on(scene.say(Gap(SESSION, E1, 2, 0, 3, 1), THIRD, "next"))
        assert [w.turn for w in out if isinstance(w, Window)] == [2, 3]


test_gap_duplicate_is_filled_again = test_gap_first_copy_is_filled_from_the_journal


def test_gap_first_copy_that_the_journal_cannot_fill_is_left_to_the_driver() -> None:
    scene = computed(6)
    assert scene.say(Gap(SESSION, E1, 2, 0, 6, 0), THIRD, "next") == []  # six entries, four credits


def test_gap_early_is_ignored() -> None:
    assert computed(2).say(Gap(SESSION, E2, 2, 0, 2, 0), THIRD, "next") == []


def test_gap_late_is_ignored() -> None:
    assert computed(2).say(Gap(SESSION, E0, 2, 0, 2, 0), THIRD, "next") == []


# --- error (from the successor) ---


def refusal(epoch: Epoch = E1) -> SessionError:
    return SessionError(SESSION, epoch, 2, "unknown-epoch", "no open came", True, None, 1)


def test_error_authority_is_the_successors() -> None:
    scene = HopScene().opened()
    assert scene.say(refusal(), STRANGER, "x") == [CloseChannel("x", "not-authorised")]


def test_error_first_copy_is_reported_to_the_driver() -> None:
    scene = HopScene().opened()
    assert said(scene.say(refusal(), THIRD, "next")) == [Report(SESSION, E1, 1, 2, "unknown-epoch", "no open came")]


def test_error_duplicate_is_reported_once() -> None:
    scene = HopScene().opened()
    scene.say(refusal(), THIRD, "next")
    assert scene.say(refusal(), THIRD, "next") == []


def test_error_early_is_ignored() -> None:
    assert HopScene().opened().say(refusal(E2), THIRD, "next") == []


def test_error_late_is_ignored() -> None:
    assert HopScene().opened().say(refusal(E0), THIRD, "next") == []


# --- reserved kinds ---


def test_reserved_authority_is_the_drivers() -> None:
    scene = HopScene().opened()
    assert scene.say(Reserved(SESSION, E1, 1, "replay"), STRANGER, "x") == [CloseChannel("x", "not-authorised")]


@pytest.mark.parametrize("kind", RESERVED_KINDS)
@pytest.mark.parametrize("epoch", [E0, E1, E2])
def test_reserved_first_copy_is_unsupported_and_the_session_goes_on(kind: str, epoch: Epoch) -> None:
    scene = HopScene().opened()
    for _ in range(2):
        assert codes(scene.say(Reserved(SESSION, epoch, 1, kind))) == ["unsupported"]
    assert len(jobs(scene.feed(scene.window()))) == 1


test_reserved_duplicate_is_unsupported = test_reserved_first_copy_is_unsupported_and_the_session_goes_on
test_reserved_early_is_unsupported = test_reserved_first_copy_is_unsupported_and_the_session_goes_on
test_reserved_late_is_unsupported = test_reserved_first_copy_is_unsupported_and_the_session_goes_on


def test_reserved_first_copy_without_a_session_is_unsupported() -> None:
    scene = HopScene()
    assert codes(scene.say(Reserved(SESSION, E1, 1, "fork"))) == ["unsupported"]


def test_an_open_for_another_peers_place_is_refused() -> None:
    scene = HopScene()
    assert codes(scene.say(scene.order(hop_index=0))) == ["bad-message"]
    assert OpenNext not in [type(c) for c in scene.commands]


def test_cancel_first_copy_leaves_a_gap_where_the_dropped_windows_were() -> None:
    scene = HopScene().opened()
    for turn in range(1, 5):
        scene.feed(scene.window(turn, turn - 1))
    scene.say(Cancel(SESSION, E1, 1, 4))
    assert isinstance(said(scene.feed(scene.window(5, 3)))[0], Gap)


def test_gap_first_copy_is_not_filled_with_what_was_rolled_back() -> None:
    scene = computed(3)
    scene.compute(scene.window(4, 1))
    out = passed_on(scene.say(Gap(SESSION, E1, 2, 0, 4, 1), THIRD, "next"))
    assert [w.turn for w in out if isinstance(w, Window)] == [4]
