"""What NAT boxes let through: mappings, filters, times, chains, and who can meet whom."""

from __future__ import annotations

import pytest

from netsim import nat
from netsim.nat import ESTABLISHED_S, MAPPINGS_MAX, TRANSITORY_S, Endpoint, NatBox, NatKind, Passage

PORT = 4001
INSIDE = ("10.0.0.2", PORT)
PUBLIC = "20.0.1.1"
FRIEND = ("30.0.1.1", PORT)
FRIENDS_OTHER_PORT = ("30.0.1.1", 5555)
STRANGER = ("40.0.1.1", PORT)
CONES = (NatKind.FULL_CONE, NatKind.ADDRESS_RESTRICTED, NatKind.PORT_RESTRICTED)


@pytest.mark.parametrize("kind", CONES)
def test_a_cone_shows_one_endpoint_to_all_targets(kind: NatKind) -> None:
    box = NatBox(kind, PUBLIC)
    assert box.outbound(INSIDE, FRIEND, 0.0) == box.outbound(INSIDE, STRANGER, 0.0) == (PUBLIC, PORT)


def test_a_symmetric_box_shows_each_target_another_port() -> None:
    box = NatBox(NatKind.SYMMETRIC, PUBLIC)
    seen = [box.outbound(INSIDE, target, 0.0) for target in (FRIEND, FRIENDS_OTHER_PORT, STRANGER)]
    assert len(set(seen)) == 3
    assert (PUBLIC, PORT) not in seen
    assert box.outbound(INSIDE, FRIEND, 1.0) == seen[0]


def test_two_inside_hosts_with_the_same_port_get_two_public_ones() -> None:
    box = NatBox(NatKind.PORT_RESTRICTED, PUBLIC)
    first = box.outbound(INSIDE, FRIEND, 0.0)
    second = box.outbound(("10.0.0.3", PORT), FRIEND, 0.0)
    assert first == (PUBLIC, PORT)
    assert second is not None
    assert second != first
    assert box.inbound(second, FRIEND, 0.0) == ("10.0.0.3", PORT)


def test_a_box_that_does_not_preserve_ports_hands_out_its_own() -> None:
    box = NatBox(NatKind.FULL_CONE, PUBLIC, preserves_ports=False)
    seen = box.outbound(INSIDE, FRIEND, 0.0)
    assert seen is not None
    assert seen != (PUBLIC, PORT)
    assert box.inbound(seen, STRANGER, 0.0) == INSIDE


@pytest.mark.parametrize(
    ("kind", "from_friend", "from_friends_other_port", "from_stranger"),
    [
        (NatKind.FULL_CONE, True, True, True),
        (NatKind.ADDRESS_RESTRICTED, True, True, False),
        (NatKind.PORT_RESTRICTED, True, False, False),
        (NatKind.SYMMETRIC, True, False, False),
        (NatKind.FIREWALL, True, False, False),
    ],
)
def test_who_may_come_in_after_one_segment_went_out(
    kind: NatKind, from_friend: bool, from_friends_other_port: bool, from_stranger: bool
) -> None:
    for source, expected in (
        (FRIEND, from_friend),
        (FRIENDS_OTHER_PORT, from_friends_other_port),
        (STRANGER, from_stranger),
    ):
        box = NatBox(kind, PUBLIC)
        inside = INSIDE if kind.translates else (PUBLIC, PORT)
        seen = box.outbound(inside, FRIEND, 0.0)
        assert seen is not None
        assert (box.inbound(seen, source, 0.1) == inside) is expected


@pytest.mark.parametrize("kind", [kind for kind in NatKind if kind is not NatKind.OPEN])
def test_nothing_comes_in_before_anything_went_out(kind: NatKind) -> None:
    assert NatBox(kind, PUBLIC).inbound((PUBLIC, PORT), FRIEND, 0.0) is None


def test_a_forwarded_port_lets_everybody_in_and_answers_leave_by_it() -> None:
    box = NatBox(NatKind.SYMMETRIC, PUBLIC, ((PORT, INSIDE),))
    assert box.inbound((PUBLIC, PORT), STRANGER, 0.0) == INSIDE
    assert box.outbound(INSIDE, STRANGER, 0.0, Passage.ESTABLISHED) == (PUBLIC, PORT)
    assert box.inbound((PUBLIC, PORT + 1), STRANGER, 0.0) is None


def test_a_session_that_only_began_is_forgotten_after_four_minutes() -> None:
    box = NatBox(NatKind.PORT_RESTRICTED, PUBLIC)
    seen = box.outbound(INSIDE, FRIEND, 0.0)
    assert seen is not None
    assert box.inbound(seen, FRIEND, TRANSITORY_S - 0.1) == INSIDE
    box = NatBox(NatKind.PORT_RESTRICTED, PUBLIC)
    box.outbound(INSIDE, FRIEND, 0.0)
    assert box.inbound(seen, FRIEND, TRANSITORY_S) is None


def test_an_established_session_lives_two_hours_after_its_last_segment_and_then_drops_both_ways() -> None:
    box = NatBox(NatKind.PORT_RESTRICTED, PUBLIC)
    seen = box.outbound(INSIDE, FRIEND, 0.0)
    assert seen is not None
    box.inbound(seen, FRIEND, 0.1, Passage.ESTABLISHED)
    assert box.outbound(INSIDE, FRIEND, ESTABLISHED_S, Passage.ESTABLISHED) == seen
    later = 2 * ESTABLISHED_S + 1
    assert box.inbound(seen, FRIEND, later, Passage.ESTABLISHED) is None
    assert box.outbound(INSIDE, FRIEND, later, Passage.ESTABLISHED) is None
    assert box.outbound(INSIDE, FRIEND, later) == seen


def test_a_router_may_keep_sessions_for_a_shorter_time() -> None:
    box = NatBox(NatKind.PORT_RESTRICTED, PUBLIC, life_factor=0.01)
    box.outbound(INSIDE, FRIEND, 0.0)
    assert box.outbound(INSIDE, FRIEND, 70.0, Passage.ESTABLISHED) is None


def test_a_connection_that_ended_makes_its_session_short_lived() -> None:
    box = NatBox(NatKind.PORT_RESTRICTED, PUBLIC)
    seen = box.outbound(INSIDE, FRIEND, 0.0)
    assert seen is not None
    box.outbound(INSIDE, FRIEND, 1.0, Passage.ESTABLISHED)
    box.outbound(INSIDE, FRIEND, 2.0, Passage.ENDED)
    assert box.inbound(seen, FRIEND, 2.0 + TRANSITORY_S) is None


def test_a_box_that_was_switched_off_and_on_drops_what_was_established() -> None:
    box = NatBox(NatKind.FULL_CONE, PUBLIC)
    seen = box.outbound(INSIDE, FRIEND, 0.0)
    assert seen is not None
    box.reset()
    assert box.inbound(seen, FRIEND, 1.0) is None
    assert box.outbound(INSIDE, FRIEND, 1.0, Passage.ESTABLISHED) is None


def test_the_table_of_a_box_is_bounded_and_the_oldest_mapping_makes_room() -> None:
    box = NatBox(NatKind.SYMMETRIC, PUBLIC)
    first = box.outbound(INSIDE, ("30.0.0.1", 1), 0.0)
    assert first is not None
    for number in range(MAPPINGS_MAX):
        box.outbound(INSIDE, (f"30.{number >> 8}.{number & 255}.2", 1), 0.0)
    assert box.mapping_count == MAPPINGS_MAX
    assert box.inbound(first, ("30.0.0.1", 1), 0.0) is None


def test_a_dead_mapping_gives_its_port_to_another_host() -> None:
    for kind in CONES:
        box = NatBox(kind, PUBLIC)
        box.outbound(INSIDE, FRIEND, 0.0)
        assert box.outbound(("10.0.0.3", PORT), FRIEND, TRANSITORY_S + 1) == (PUBLIC, PORT)
        assert box.mapping_count == 1


def test_two_boxes_in_a_row_translate_twice_and_filter_twice() -> None:
    address, boxes = nat.site("double", PUBLIC, "10.0.0.2", PORT)
    seen = nat.outbound(boxes, (address, PORT), FRIEND, 0.0)
    assert seen is not None
    assert seen[0] == PUBLIC
    assert boxes[0].address.startswith("100.64.")
    assert nat.inbound(boxes, seen, FRIEND, 0.1) == (address, PORT)
    assert nat.inbound(boxes, seen, STRANGER, 0.1) is None
    boxes[0].reset()
    assert nat.inbound(boxes, seen, FRIEND, 0.2) is None


@pytest.mark.parametrize("kind", nat.SITES)
def test_every_site_has_one_public_address(kind: str) -> None:
    address, boxes = nat.site(kind, PUBLIC, "10.0.0.2", PORT)
    assert nat.public_address(address, boxes) == PUBLIC


class _Site:
    """A host that listens on PORT, and the smallest TCP that can meet another: SYNs that arrive or don't."""

    def __init__(self, kind: str, number: int) -> None:
        self.address, self.boxes = nat.site(kind, f"20.{number}.1.1", f"10.0.{number}.2", PORT)
        self.public = nat.public_address(self.address, self.boxes)

    def seen_by(self, target: Endpoint, port: int) -> Endpoint:
        seen = nat.outbound(self.boxes, (self.address, port), target, 0.0)
        assert seen is not None
        return seen

    def syn(self, target: Endpoint, other: _Site, port: int) -> bool:
        """Whether a SYN from ``port`` for ``target`` reaches the other's listener, and its answer comes back."""
        source = self.seen_by(target, port)
        reached = nat.inbound(other.boxes, target, source, 0.0)
        if reached != (other.address, PORT):
            return False
        answered = nat.outbound(other.boxes, reached, source, 0.0, Passage.ESTABLISHED)
        return answered == target and nat.inbound(self.boxes, source, target, 0.0, Passage.ESTABLISHED) is not None


RENDEZVOUS = ("50.0.1.1", PORT)
EPHEMERAL = 50000


@pytest.mark.parametrize("source", nat.SITES)
@pytest.mark.parametrize("target", nat.SITES)
def test_a_plain_dial_reaches_only_open_hosts_and_forwarded_ports(source: str, target: str) -> None:
    one, other = _Site(source, 1), _Site(target, 2)
    assert one.syn((other.public, PORT), other, EPHEMERAL) is (target in ("open", "forwarded"))


@pytest.mark.parametrize("source", nat.SITES)
@pytest.mark.parametrize("target", nat.SITES)
def test_a_host_that_dialled_anybody_from_its_listening_port_is_reached_behind_a_full_cone_too(
    source: str, target: str
) -> None:
    one, other = _Site(source, 1), _Site(target, 2)
    observed = other.seen_by(RENDEZVOUS, PORT)
    assert one.syn(observed, other, EPHEMERAL) is (target in ("open", "forwarded", "full-cone"))


BY_PORT = ("port-restricted", "firewall", "double")
"""These let in exact endpoints only, so they never meet one whose port can't be known."""


@pytest.mark.parametrize("one_kind", nat.SITES)
@pytest.mark.parametrize("other_kind", nat.SITES)
def test_dialling_each_other_at_once_from_listening_ports_fails_only_where_a_port_cannot_be_known(
    one_kind: str, other_kind: str
) -> None:
    """The known matrix: symmetric meets neither itself nor what filters by port; all else meets."""
    one, other = _Site(one_kind, 1), _Site(other_kind, 2)
    one_observed, other_observed = one.seen_by(RENDEZVOUS, PORT), other.seen_by(RENDEZVOUS, PORT)
    attempts = [
        attempt
        for _ in range(2)  # a SYN that came too early is sent again
        for attempt in (one.syn(other_observed, other, PORT), other.syn(one_observed, one, PORT))
    ]
    pair = {one_kind, other_kind}
    impossible = pair == {"symmetric"} or ("symmetric" in pair and bool(pair & set(BY_PORT)))
    assert any(attempts) is not impossible
