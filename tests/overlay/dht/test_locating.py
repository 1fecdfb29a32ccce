"""The nodes nearest to a key on real hosts: who is asked when they are looked for again, and what others are told of them."""

from __future__ import annotations

import pytest
from kademlia.node import Node

from overlay.dht import limits
from overlay.dht.lookup import Found
from overlay.dht.neighbourhoods import Neighbourhoods
from overlay.dht.node import Dht
from overlay.dht.protocol import DhtProtocol
from overlay.dht.records import location_of
from overlay.dht.table import Contact, node_id_of
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


def test_who_found_a_neighbourhood_names_its_members_to_others_though_they_are_not_in_its_table() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        told, asker = nodes[1], nodes[2]
        found = [contact.id for contact in await told.nearest_to(PLACE, WANTED)]
        for contact in told._table.contacts():
            told._table.remove_contact(contact)
        heard = await asker._protocol.call_find_node(Contact(hosts[1].peer_id), PLACE)
        assert heard is not None
        assert [contact.id for contact in heard.contacts] == [
            one for one in found if one != node_id_of(hosts[2].peer_id)
        ]
        assert told.closest(Node(location_of(b"another key")), hosts[2].peer_id) == []  # type: ignore[no-untyped-call]

    run_nodes(7, scene)
