"""Routes: the cheapest of all, against brute force; and what is said when there is none."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.catalog import ModelView
from routing.costs import AVOIDED_PENALTY_S, Costs, least_link_s, link_table
from routing.errors import BlocksPending, BlocksUnserved
from routing.health import Fault, Health
from routing.planner import Question, plan_route
from routing.records import SpanRecord, State
from routing.types import ComputeClass, Route, Span
from tests.routing.servers import FLOAT32, MODEL, server

DRIVER = b"driver"


def plan(servers: list[SpanRecord], *, blocks: int = 8, avoid: tuple[bytes, ...] = (), health: Health | None = None,
         costs: Costs | None = None, salt: bytes = b"", compute_class: ComputeClass = FLOAT32) -> Route:  # fmt: skip
    seen = ModelView(MODEL, blocks, tuple(servers))
    question = Question(DRIVER, compute_class, avoid, salt=salt)
    return plan_route(seen, "demo", question, costs or Costs(lambda a, b: 0.01), health or Health(), 0.0)


def test_a_part_of_the_blocks_needs_only_its_own_servers() -> None:
    servers = [server("a", "0:4"), server("b", "4:6")]
    question = Question(DRIVER, FLOAT32, span=Span(3, 6))
    found = plan_route(ModelView(MODEL, 8, tuple(servers)), "demo", question, Costs(lambda a, b: 0.01), Health(), 0.0)
    assert (names(found), found.blocks) == (["a 3:4", "b 4:6"], 3)
    with pytest.raises(BlocksUnserved) as caught:
        plan(servers)
    assert caught.value.spans == (Span(6, 8),)


def names(route: Route) -> list[str]:
    return [f"{hop.peer.decode()} {hop.span}" for hop in route.hops]


def test_one_server_of_everything_beats_two_of_halves() -> None:
    assert names(plan([server("a", "0:4"), server("b", "4:8"), server("c", "0:8")])) == ["c 0:8"]


def test_a_span_is_entered_and_left_midway() -> None:
    slow_middle = [server("a", "0:5", step_s=0.001), server("b", "3:8", step_s=0.001)]
    route = plan(slow_middle)
    assert [hop.peer for hop in route.hops] == [b"a", b"b"]
    assert route.hops[0].span.end == route.hops[1].span.start in (3, 4, 5)


def test_the_faster_server_is_used_for_what_both_have() -> None:
    route = plan([server("slow", "0:8", step_s=0.5), server("fast", "2:8", step_s=0.001)])
    assert names(route) == ["slow 0:2", "fast 2:8"]


def test_a_far_server_loses_to_a_near_one() -> None:
    costs = Costs(lambda sender, receiver: 0.2 if b"far" in (sender, receiver) else 0.001)
    assert names(plan([server("far", "0:8"), server("near", "0:8", step_s=0.002)], costs=costs)) == ["near 0:8"]


def test_a_crowded_or_queued_server_loses_to_a_free_one() -> None:
    assert names(plan([server("crowded", "0:8", free_tokens=10), server("free", "0:8", step_s=0.01)])) == ["free 0:8"]
    assert names(plan([server("queued", "0:8", queue_s=1.0), server("free", "0:8", step_s=0.01)])) == ["free 0:8"]


def test_a_server_without_any_room_loses_and_one_that_does_not_say_does_not() -> None:
    assert names(plan([server("full", "0:8", free_tokens=0), server("free", "0:8", step_s=0.01)])) == ["free 0:8"]
    assert names(plan([server("silent", "0:8"), server("free", "0:8", step_s=0.01)])) == ["silent 0:8"]


def test_who_is_to_be_avoided_is_and_who_failed_lately_is_used_last() -> None:
    both = [server("a", "0:8"), server("b", "0:8")]
    assert names(plan(both, avoid=(b"a",))) == ["b 0:8"]
    health = Health()
    health.blame(b"b", Fault.UNREACHABLE, 0.0)
    assert names(plan(both, health=health)) == ["a 0:8"]
    assert names(plan(both[1:], health=health)) == ["b 0:8"], "better one that failed than none"


def test_an_edge_that_failed_is_gone_round() -> None:
    servers = [server("a", "0:4"), server("b", "4:8"), server("c", "4:8", step_s=0.002)]
    health = Health()
    health.blame(b"a", Fault.EDGE, 0.0, b"b")
    assert names(plan(servers, health=health)) == ["a 0:4", "c 4:8"]


def test_many_clients_spread_over_equal_servers() -> None:
    servers = [server(name, "0:8") for name in "abcd"]
    chosen = {plan(servers, salt=bytes([number])).hops[0].peer for number in range(60)}
    assert len(chosen) == 4


def test_blocks_that_nobody_serves_are_named_and_not_waited_for() -> None:
    with pytest.raises(BlocksUnserved, match="4:6"):
        plan([server("a", "0:4"), server("b", "6:8")])


@pytest.mark.parametrize("missing", [
    server("b", "4:8", state=State.JOINING), server("b", "4:8", state=State.DRAINING),
])  # fmt: skip
def test_blocks_that_are_being_loaded_are_worth_waiting_for(missing: SpanRecord) -> None:
    with pytest.raises(BlocksPending, match="4:8"):
        plan([server("a", "0:4"), missing])


def test_another_compute_class_is_no_part_of_the_route() -> None:
    with pytest.raises(BlocksUnserved):
        plan([server("a", "0:8")], compute_class=ComputeClass("nf4", "bfloat16"))


def brute_force(servers: list[SpanRecord], blocks: int, costs: Costs) -> float:
    """The cheapest of all assignments of blocks to servers."""
    best = float("inf")
    for assignment in product(range(len(servers)), repeat=blocks):
        if any(block not in servers[index].span for block, index in enumerate(assignment)):
            continue
        total, at, start = 0.0, DRIVER, 0
        while start < blocks:
            end = start
            while end < blocks and assignment[end] == assignment[start]:
                end += 1
            chosen = servers[assignment[start]]
            total += costs.hop_s(at, chosen.peer) + costs.span_s(chosen, Span(start, end))
            at, start = chosen.peer, end
        best = min(best, total + costs.hop_s(at, DRIVER))
    return best


@st.composite
def swarms(draw: st.DrawFn) -> tuple[list[SpanRecord], dict[tuple[bytes, bytes], float]]:
    servers = []
    for index in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, 3))
        end = draw(st.integers(start + 1, 4))
        step_s = draw(st.integers(1, 20)) / 1000
        servers.append(server(f"s{index}", f"{start}:{end}", step_s=step_s))
    peers = [DRIVER, *(found.peer for found in servers)]
    links = {(a, b): draw(st.integers(1, 30)) / 1000 for a in peers for b in peers}
    return servers, links


@given(swarms())
@settings(max_examples=150)
def test_no_route_is_much_cheaper_than_the_planned_one(
    swarm: tuple[list[SpanRecord], dict[tuple[bytes, bytes], float]],
) -> None:
    servers, links = swarm
    costs = Costs(lambda sender, receiver: links[sender, receiver], least_link_s=min(links.values()))
    cheapest = brute_force(servers, 4, costs)
    try:
        route = plan(servers, blocks=4, costs=costs)
    except BlocksUnserved:
        assert cheapest == float("inf")
        return
    by_peer = {found.peer: found for found in servers}
    at, total = DRIVER, 0.0
    for hop in route.hops:
        total += costs.hop_s(at, hop.peer) + costs.span_s(by_peer[hop.peer], hop.span)
        at = hop.peer
    total += costs.hop_s(at, DRIVER)
    assert total <= cheapest * 1.05 + 1e-9, "near ties are spread by at most 5 %"


def test_hundreds_of_servers_cost_as_many_prices_as_could_matter() -> None:
    servers = [server(f"s{index:03}", f"{index % 10 * 8}:{index % 10 * 8 + 8}") for index in range(400)]
    asked = 0

    def link(sender: bytes, receiver: bytes) -> float:
        nonlocal asked
        asked += 1
        return 0.01

    route = plan(servers, blocks=80, costs=Costs(link, least_link_s=0.01))
    assert len(route) == 10
    assert asked < 400 * 4, "not each server from each other at each block"


def test_links_come_from_our_own_measurements_and_the_servers_records() -> None:
    table = link_table(
        (server("a", "0:4", neighbour_rtts=((b"b", 0.4),)),), DRIVER, lambda peer: 0.1 if peer == b"a" else None
    )
    assert table(DRIVER, b"a") == 0.05
    assert table(b"b", b"a") == 0.2
    assert table(DRIVER, b"b") is None
    servers = (server("a", "0:4", neighbour_rtts=((b"b", 0.08),)), server("b", "4:8"))
    assert least_link_s(servers, DRIVER, lambda peer: 0.002) == 0.04, "the driver is no server here"
    assert least_link_s(servers, b"b", lambda peer: 0.002) == 0.001
    assert AVOIDED_PENALTY_S > 1
