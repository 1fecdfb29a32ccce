"""The nodes nearest to a key on real hosts: who is asked when they are looked for again, and what others are told of them."""

from __future__ import annotations

import pytest
from kademlia.node import Node

from overlay.dht import limits
from overlay.dht.lookup import Found
from overlay.dht.neighbourhoods import Neighbourhoods
from overlay.dht.node import UNVERIFIED, Dht
from overlay.dht.protocol import DhtProtocol
from overlay.dht.records import location_of
from overlay.dht.table import Contact, node_id_of
from overlay.errors import DialError
from overlay.host import Host
from tests.overlay.dht.test_node import KEY, run_nodes

PLACE = Node(location_of(KEY))  # type: ignore[no-untyped-call]
WANTED = 5


class Asked:
    """Whom nodes asked for the nearest, since the last time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ids: list[bytes] = []
        call_find_node = DhtProtocol.call_find_node

        async def noted(
            protocol: DhtProtocol, contact: Contact, target: Node, timeout_s: float | None = None
        ) -> Found | None:
            self._ids.append(contact.id)
            return await call_find_node(protocol, contact, target, timeout_s)

        monkeypatch.setattr(DhtProtocol, "call_find_node", noted)

    def ids(self) -> list[bytes]:
        ids, self._ids = self._ids, []
        return ids


def nearest(hosts: list[Host], *without: Host) -> list[bytes]:
    ids = [node_id_of(host.peer_id) for host in hosts if host not in without]
    return sorted(ids, key=lambda found: int.from_bytes(found, "big") ^ PLACE.long_id)


def test_who_answered_lately_is_not_asked_again_but_the_nearest_few_and_who_is_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Asked(monkeypatch)

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        order = nearest(hosts, hosts[-1])
        members = await nodes[-1].nearest_to(PLACE, WANTED + 1)
        assert [found.id for found in members][:WANTED] == order[:WANTED]
        asked.ids()
        newcomer = next(found for found in members if found.id == order[1])
        around = nodes[-1]._neighbourhoods = Neighbourhoods()
        others = [found for found in members if found is not newcomer][:WANTED]
        around.located(PLACE.id, others, WANTED, [], [], nodes[-1]._now())
        around.named(PLACE.id, members[0], [newcomer], nodes[-1]._now())
        around.changed(PLACE.id)
        monkeypatch.setattr(limits, "RELOCATE_S", 0.0)
        around._known[PLACE.id].patience_s = 0.0
        assert [found.id for found in await nodes[-1].nearest_to(PLACE, WANTED)][:WANTED] == order[:WANTED]
        again = [order[0], *order[2 : limits.ASKED_AGAIN + 1]]
        assert sorted(asked.ids()) == sorted([*again, order[1]])

    run_nodes(9, scene, clients=1)


def test_a_look_for_more_asks_the_nearest_few_and_those_who_were_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        order = nearest(hosts, hosts[-1])
        first = [found.id for found in await nodes[-1].nearest_to(PLACE, 4)]
        asked.ids()
        assert [found.id for found in await nodes[-1].nearest_to(PLACE, 8)] == order
        expected = [*order[: limits.ASKED_AGAIN], *(found for found in order if found not in first)]
        assert sorted(asked.ids()) == sorted(expected)

    run_nodes(9, scene, clients=1)


def test_who_publishes_under_a_key_names_the_members_that_it_found_there_though_they_are_not_in_its_table() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        told, asker = nodes[1], nodes[2]
        await told.publish_and_wait(KEY, b"a", b"value", 60.0)
        found = [contact.id for contact in await told.nearest_to(PLACE, WANTED)]
        for contact in told._table.contacts():
            told._table.remove_contact(contact)
        heard = await asker._protocol.call_find_node(Contact(hosts[1].peer_id), PLACE)
        assert heard is not None
        others = [one for one in found if one != node_id_of(hosts[2].peer_id)]
        assert [contact.id for contact in heard.contacts] == others[: limits.LOCATED_HOLDERS]

    run_nodes(7, scene)


def test_who_only_reads_a_key_does_not_show_it_by_what_it_names() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        reader = nodes[1]
        await reader.nearest_to(PLACE, WANTED)
        for contact in reader._table.contacts():
            reader._table.remove_contact(contact)
        assert reader.closest(PLACE, hosts[2].peer_id) == []

    run_nodes(7, scene)


def test_one_that_left_is_named_to_nobody_once_it_did_not_answer() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        told, asker = nodes[1], hosts[2].peer_id
        await told.publish_and_wait(KEY, b"a", b"value", 60.0)
        gone = next(found for found in await told.nearest_to(PLACE, WANTED) if found.peer == hosts[3].peer_id)
        assert gone in told.closest(PLACE, asker)
        told._protocol._peer.call_ended(gone, DialError("It is not there."))
        assert gone not in told.closest(PLACE, asker)

    run_nodes(7, scene)


@pytest.mark.parametrize("is_connected", [True, False])
def test_the_address_group_of_a_member_is_where_it_was_met_and_not_what_others_wrote(is_connected: bool) -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        node, peer = nodes[1], hosts[3].peer_id
        for contact in node._table.contacts():
            node._table.remove_contact(contact)
        made_up = Contact(peer, (), "203.0.113.0/24")
        connection = hosts[1].connection(peer)
        assert connection is not None
        if not is_connected:
            hosts[1]._connections.pop(peer)
        assert node._as_connected(made_up).group == ("" if is_connected else UNVERIFIED)
        if not is_connected:
            hosts[1]._connections[peer] = connection

    run_nodes(5, scene)
