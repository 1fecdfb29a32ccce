"""What a serving node does by itself: beats, leases, draining, faults of its device and of its links."""

from __future__ import annotations

from dataclasses import replace

from blocks.protocol import limits
from blocks.protocol.commands import CloseChannel, CloseNext, HopCommand, SendNext, Submit
from blocks.protocol.device import JobResult, LeaseKey, ReleaseJob
from blocks.protocol.hops import Hops, HopSettings
from blocks.protocol.messages import (
    Cancel,
    Close,
    Epoch,
    Gap,
    Heartbeat,
    Leaving,
    Report,
    SessionError,
    SessionMessage,
    Window,
)
from blocks.protocol.session_errors import SessionFault
from overlay.errors import ConnectionLost, ProtocolViolation

from .scenes import BOOT, DRIVER, FIRST, SESSION, HopScene, edges, jobs, passed_on, said

E1 = Epoch(1, 1)


def errors(commands: list[HopCommand]) -> list[str]:
    return [message.code for message in said(commands) if isinstance(message, SessionError)]


def beats(commands: list[HopCommand]) -> list[SessionMessage]:
    return [message for message in said(commands) if isinstance(message, Heartbeat)]


def test_a_hop_beats_every_second_with_its_engines_steps_and_its_oldest_window() -> None:
    scene = HopScene().opened()
    scene.gauge.step_count, scene.gauge.queue_depth = 7, 3
    (beat,) = beats(scene.wait(1.1))
    assert beat == Heartbeat(SESSION, E1, 1, BOOT, 7, 3, None)
    scene.feed(scene.window())
    (beat,) = beats(scene.wait(1))
    assert isinstance(beat, Heartbeat)
    assert beat.oldest_s is not None
    assert 0.7 < beat.oldest_s < 1.1


def test_a_session_whose_channel_is_lost_lingers_for_its_lease_then_is_freed() -> None:
    scene = HopScene().opened()
    scene.compute(scene.window())
    scene.hops.channel_lost("control", scene.now)
    assert beats(scene.wait(29)) == []
    assert scene.hops.statistics().lingering == 1
    commands = scene.wait(2)
    assert any(isinstance(c, Submit) and isinstance(c.job, ReleaseJob) for c in commands)
    assert scene.door.held == []


def test_the_end_of_a_former_epochs_channel_is_not_the_end_of_the_session() -> None:
    scene = HopScene().opened()
    scene.say(scene.order(Epoch(1, 2)), channel="new")
    scene.hops.channel_lost("control", scene.now)
    assert scene.hops.statistics().lingering == 0


def test_a_loop_that_stood_still_ends_no_lease() -> None:
    scene = HopScene().opened()
    scene.now += 300
    scene.hops.on_timeout(scene.now)
    assert scene.hops.session_count == 1


def test_all_journals_together_keep_to_one_bound_and_what_is_gone_is_left_to_the_driver() -> None:
    scene = HopScene()
    scene.hops = Hops(HopSettings(scene.peer, BOOT, journals_bytes_max=3 * 16), scene.door, scene.gauge)
    other = b"t" * 16
    scene.say(scene.order())
    scene.say(scene.order(session=other), channel="other")
    for turn in (1, 2, 3):
        scene.compute(scene.window(turn, turn - 1))
    scene.compute(scene.window(session=other))
    assert scene.hops.statistics().journal_bytes == 3 * 16
    lost, kept = Gap(SESSION, E1, 2, 0, 3, 0), Gap(SESSION, E1, 2, 0, 3, 1)
    assert passed_on(scene.say(lost, scene.successor, "data")) == []  # the driver, which was told, too, replans
    assert [again.turn for again in passed_on(scene.say(kept, scene.successor, "data"))] == [2, 3]  # type: ignore[union-attr]
    scene.say(Close(SESSION, E1, 1))
    assert scene.hops.statistics().journal_bytes == 16


def test_draining_tells_drivers_refuses_opens_and_ends_what_is_left() -> None:
    scene = HopScene().opened()
    scene.hops.drain(5.0, scene.now)
    assert said(scene.poll()) == [Leaving(SESSION, E1, 1, 5.0)]
    assert errors(scene.say(scene.order(session=b"t" * 16), channel="control")) == ["draining"]
    assert len(passed_on(scene.compute(scene.window()))) == 1  # it serves until then
    assert not scene.hops.is_drained
    assert errors(scene.wait(5.5)) == ["draining"]
    assert scene.hops.is_drained


def test_a_failed_computation_is_the_drivers_to_know_and_nothing_stands_on_it() -> None:
    scene = HopScene().opened()
    first, second = [job for turn in (1, 2) for job in jobs(scene.feed(scene.window(turn, turn - 1)))]
    scene.hops.job_done(JobResult(first, error=SessionFault("busy", "no memory", 1.0)), scene.now)
    assert errors(scene.poll()) == ["busy"]
    assert passed_on(scene.finish(second)) == []
    assert jobs(scene.feed(scene.window(1))) == []  # no turn is accepted twice
    assert isinstance(said(scene.feed(scene.window(3, 2)))[0], Gap)


def test_a_result_without_the_rows_asked_for_is_a_failed_computation() -> None:
    scene = HopScene().opened()
    (job,) = jobs(scene.feed(scene.window()))
    scene.hops.job_done(JobResult(job), scene.now)
    assert errors(scene.poll()) == ["compute-failed"]


def test_a_window_whose_signature_is_found_false_never_leaves() -> None:
    scene = HopScene().opened()
    window = scene.window()
    (job,) = jobs(scene.feed(window))
    message = window.to_message(FIRST, scene.peer)
    scene.hops.refuse(message, "data", ProtocolViolation("a wrong signature"), scene.now)
    commands = scene.poll()
    assert CloseChannel("data", "protocol-violation") in commands
    (report,) = said(commands)
    assert isinstance(report, Report)
    assert (report.edge, report.code) == (0, "bad-signature")
    assert passed_on(scene.finish(job)) == []


def test_a_dead_edge_onwards_is_reported_once() -> None:
    scene = HopScene().opened()
    edge = edges(scene.commands)[0].edge
    scene.hops.next_lost(edge, ConnectionLost("gone"), scene.now)
    assert said(scene.poll()) == [Report(SESSION, E1, 1, 2, "connection-lost", "gone")]
    scene.hops.next_lost(edge, ConnectionLost("gone"), scene.now)
    scene.hops.next_lost(edge._replace(epoch=Epoch(1, 0)), ConnectionLost("old"), scene.now)
    assert scene.poll() == []


def test_memory_that_the_node_takes_back_is_a_gap_from_0() -> None:
    scene = HopScene().opened()
    scene.compute(scene.window())
    scene.hops.lease_dropped(LeaseKey(SESSION, 1))
    assert said(scene.feed(scene.window(2, 1))) == [Gap(SESSION, E1, 1, 0, 2, 0)]


def test_a_hand_over_in_process_is_not_digested_but_what_leaves_is() -> None:
    local = HopScene(index=0, route=tuple(replace(hop, peer=DRIVER) for hop in HopScene().route)).opened()
    window = local.window()
    local.hops.receive(window.to_message(DRIVER, DRIVER), DRIVER, "data", local.now)
    (job,) = jobs(local.poll())
    (onwards,) = passed_on(local.finish(job))
    assert isinstance(onwards, Window)
    assert onwards.input_digest is None
    leaving = HopScene(index=1).opened()
    leaving.hops.receive(leaving.window().to_message(FIRST, leaving.peer), FIRST, "data", leaving.now)
    (job,) = jobs(leaving.poll())
    (onwards,) = passed_on(leaving.finish(job))
    assert isinstance(onwards, Window)
    assert onwards.input_digest is not None


def test_one_driver_can_not_take_every_place() -> None:
    scene = HopScene()
    for number in range(limits.SESSIONS_PER_DRIVER_MAX):
        scene.say(scene.order(session=number.to_bytes(16, "big")), channel=number)
    assert errors(scene.say(scene.order(), channel="control")) == ["busy"]
    assert scene.hops.session_count == limits.SESSIONS_PER_DRIVER_MAX


def test_two_places_of_one_session_on_one_peer_are_two_states() -> None:
    route = HopScene().route
    scene = HopScene(index=0, route=(route[0], replace(route[1], peer=FIRST), route[2]))
    scene.say(scene.order())
    scene.say(scene.order(hop_index=1), channel="second")
    assert scene.hops.session_count == 2
    (send,) = [c for c in scene.compute(scene.window()) if isinstance(c, SendNext)]
    scene.hops.receive(send.message, FIRST, "own", scene.now)
    assert jobs(scene.poll())[0].lease == LeaseKey(SESSION, 1)
    assert scene.door.held == [LeaseKey(SESSION, 0), LeaseKey(SESSION, 1)]


def test_another_models_window_is_refused() -> None:
    scene = HopScene().opened()
    assert jobs(scene.feed(scene.window(model=b"n" * 32))) == []


def test_closing_leaves_no_job_behind_that_counts() -> None:
    scene = HopScene().opened()
    (job,) = jobs(scene.feed(scene.window()))
    scene.say(Cancel(SESSION, E1, 1, 1))
    assert CloseNext(edges(scene.commands)[0].edge) in scene.say(
        scene.order(Epoch(1, 2), route=scene.route), channel="new"
    )
    assert scene.finish(job) == []
