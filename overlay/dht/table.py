"""The routing table: kademlia's buckets and table over 256-bit ids, with an exact neighbour search. Pure.

Whoever adds a contact has had an authenticated answer or question from it. A full bucket names the contact to ask whether it is still
there; this file owns no network. At most a few contacts of one address group enter a bucket and the table.
"""

from __future__ import annotations

import hashlib
import ipaddress
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import cast

from kademlia.node import Node, NodeHeap
from kademlia.routing import KBucket, RoutingTable

from overlay.dht import limits
from overlay.identity import PeerId
from overlay.multiaddr import Multiaddr

PLACES_CACHED = 16384


def node_id_of(peer: PeerId) -> bytes:
    """An id is bound to its key: nobody chooses it freely."""
    return _place_of(peer.multihash)[0]


@lru_cache(maxsize=PLACES_CACHED)
def _place_of(multihash: bytes) -> tuple[bytes, int]:
    node_id = hashlib.sha256(multihash).digest()
    return node_id, int.from_bytes(node_id, "big")


def group_of(address: Multiaddr | None, *, exempt_private: bool) -> str:
    """/24 or /48 of an address; empty for names, and for private ones where those are exempt."""
    if address is None or (exempt_private and address.is_loopback_or_private):
        return ""
    return _network_of(address.host or "")


@lru_cache(maxsize=PLACES_CACHED)
def _network_of(host: str) -> str:
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        return ""
    return str(ipaddress.ip_network((parsed, 24 if parsed.version == 4 else 48), strict=False))


class Contact(Node):
    """A peer in the id space."""

    def __init__(self, peer: PeerId, addresses: Sequence[Multiaddr] = (), group: str = "", seen: float = 0.0) -> None:
        self.id, self.long_id = _place_of(peer.multihash)
        self.ip = self.port = None  # of the base, which compares and prints them
        self.peer = peer
        self.addresses = tuple(addresses)[: limits.ADDRESSES_PER_CONTACT]
        self.group = group
        self.seen = seen
        """When it last answered, or asked."""
        self.written: tuple[tuple[Multiaddr, ...], tuple[bytes, ...]] | None = None
        """The addresses and how they travel, kept since a contact is named to many; the protocol's."""

    def same_home_as(self, node: Node) -> bool:
        """The base compares addresses, which are absent here and so would all be equal."""
        return bool(self.id == node.id)

    def __repr__(self) -> str:
        return f"Contact({self.peer})"


class CandidateHeap(NodeHeap):
    """The base's heap as a sorted list without searches through it, bounded: the nearest `CANDIDATES_MAX` are kept."""

    def __init__(self, node: Node, maxsize: int) -> None:
        super().__init__(node, maxsize)
        self._ids: dict[bytes, None] = {}

    def push(self, nodes: Node | Sequence[Node]) -> None:
        for node in [nodes] if isinstance(nodes, Node) else nodes:
            if node.id not in self._ids:
                self._ids[node.id] = None
                insort(self.heap, (self.node.distance_to(node), node), key=itemgetter(0))
        for _, node in self.heap[limits.CANDIDATES_MAX :]:
            del self._ids[node.id]
        del self.heap[limits.CANDIDATES_MAX :]

    def remove(self, peers: list[bytes]) -> None:
        for peer in peers:
            if self._ids.pop(peer, self) is None:
                self.heap = [entry for entry in self.heap if entry[1].id != peer]

    def __contains__(self, node: Node) -> bool:
        return node.id in self._ids

    def __iter__(self) -> Iterator[Contact]:
        return iter([node for _, node in self.heap[: self.maxsize]])

    def by_distance(self) -> Iterator[Contact]:
        """All of them, the nearest first."""
        return iter([node for _, node in self.heap])


class Bucket(KBucket):
    """A bucket that reads no clock; when its part of the id space was looked into is the node's business."""

    def __init__(self, low: int, high: int, ksize: int, groups: Counter[str]) -> None:
        """``groups``: how many of each address group are in the whole table; kept true here."""
        super().__init__(low, high, ksize)
        self._groups = groups

    def touch_last_updated(self) -> None:
        """The base's clock."""

    def add_node(self, node: Contact) -> bool:
        """Add or renew it; False where the bucket is full, and it waits."""
        before: Contact | None = self.nodes.get(node.id)
        is_in = bool(super().add_node(node))
        if is_in and (before is None or before.group != node.group):
            self._came(node)
            if before is not None:
                self._left(before)
        return is_in

    def remove_node(self, node: Contact) -> None:
        """Remove it; of those that wait, the last that came and whose group has room takes its place."""
        self.replacement_nodes.pop(node.id, None)
        before: Contact | None = self.nodes.pop(node.id, None)
        if before is None:
            return
        self._left(before)
        for waiting in reversed(self.replacement_nodes.values()):
            if self.has_room_for(waiting.group):
                del self.replacement_nodes[waiting.id]
                self.add_node(waiting)
                return

    def has_room_for(self, group: str) -> bool:
        """Whether one more of an address group may come into this bucket and the table, if there is a place."""
        in_table = self._groups[group] if group else 0
        if in_table < limits.CONTACTS_PER_GROUP_AND_BUCKET:
            return True
        in_bucket = [held.group for held in self.nodes.values()].count(group)
        return in_table < limits.CONTACTS_PER_GROUP and in_bucket < limits.CONTACTS_PER_GROUP_AND_BUCKET

    def split(self) -> tuple[Bucket, Bucket]:
        """Two halves; those that wait go on waiting for their half where their group has no room."""
        low, high = self.range
        middle = (low + high) // 2
        halves = (
            Bucket(low, middle, self.ksize, self._groups),
            Bucket(middle + 1, high, self.ksize, self._groups),
        )
        for node in self.nodes.values():
            self._left(node)
        for node in self.nodes.values():
            halves[0 if node.long_id <= middle else 1].add_node(node)
        for node in self.replacement_nodes.values():
            half = halves[0 if node.long_id <= middle else 1]
            if half.has_room_for(node.group):
                half.add_node(node)
            else:
                half.replacement_nodes[node.id] = node
        return halves

    def _came(self, node: Contact) -> None:
        if node.group:
            self._groups[node.group] += 1

    def _left(self, node: Contact) -> None:
        if node.group:
            self._groups[node.group] -= 1
            if not self._groups[node.group]:
                del self._groups[node.group]

    @property
    def prefix_bits(self) -> int:
        """How many leading bits the bucket's range fixes."""
        return int(limits.ID_BITS - (self.range[1] - self.range[0]).bit_length())


class Table(RoutingTable):
    """Contacts by distance from us."""

    def __init__(self, node: Contact, ksize: int = limits.KSIZE) -> None:
        self._groups: Counter[str] = Counter()
        super().__init__(None, ksize, node)

    def flush(self) -> None:
        """Start empty. The range is inclusive at both ends."""
        self._groups.clear()
        self.buckets = [Bucket(0, 2**limits.ID_BITS - 1, self.ksize, self._groups)]

    def get_bucket_for(self, node: Node) -> int:
        """The bucket whose inclusive range holds the id (the base errs at a range's upper end)."""
        return self._index_of(node.long_id)

    def _index_of(self, long_id: int) -> int:
        low, high = 0, len(self.buckets) - 1
        while low < high:
            middle = (low + high) // 2
            if long_id > self.buckets[middle].range[1]:
                low = middle + 1
            else:
                high = middle
        return low

    def add_contact(self, node: Contact) -> Contact | None:
        """Add or renew a contact; where its bucket is full, the contact to ask whether it still answers."""
        if node.id == self.node.id or (node.group and not self._is_diverse(node)):
            return None
        while True:
            index = self.get_bucket_for(node)
            bucket = self.buckets[index]
            if bucket.add_node(node):
                return None
            if len(self.buckets) >= limits.BUCKETS_MAX or not self._may_split(cast("Bucket", bucket)):
                head: Contact = bucket.head()
                return head
            self.split_bucket(index)

    def _may_split(self, bucket: Bucket) -> bool:
        if bucket.prefix_bits >= limits.ID_BITS - 1:
            return False
        return bool(bucket.has_in_range(self.node)) or bucket.prefix_bits % limits.SPLIT_EVERY != 0

    def _is_diverse(self, node: Contact) -> bool:
        """Whether it is there already, or there is room for one more of its group."""
        bucket = cast("Bucket", self.buckets[self._index_of(node.long_id)])
        return node.id in bucket.nodes or bucket.has_room_for(node.group)

    def contacts(self) -> list[Contact]:
        """All of them, bucket by bucket."""
        return [node for bucket in self.buckets for node in bucket.nodes.values()]

    def get(self, node_id: bytes) -> Contact | None:
        """The contact of that id."""
        found: Contact | None = self.buckets[self._index_of(int.from_bytes(node_id, "big"))].nodes.get(node_id)
        return found

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self.buckets)

    def renew(self, node: Contact) -> bool:
        """Put a contact that is in the table at the young end of its bucket; False when it isn't there."""
        bucket = self.buckets[self.get_bucket_for(node)]
        return node.id in bucket.nodes and bool(bucket.add_node(node))

    def find_neighbors(self, node: Node, k: int | None = None, exclude: Node | None = None) -> list[Contact]:
        """The exact ``k`` nearest (the base's walk finds half of them).

        Buckets are subtrees, so all of one are nearer than all of the next: as many are looked into as it takes.
        """
        target = node.long_id
        wanted = k or self.ksize
        unwanted = (0,) if exclude is None else (0, exclude.long_id ^ target)
        found: list[tuple[int, Contact]] = []
        for _, bucket in sorted([(bucket.range[0] ^ target, bucket) for bucket in self.buckets], key=itemgetter(0)):
            found += [(contact.long_id ^ target, contact) for contact in bucket.nodes.values()]
            if len(found) >= wanted + len(unwanted):
                break
        found.sort(key=itemgetter(0))
        return [contact for distance, contact in found if distance not in unwanted][:wanted]

    def count_at(self, depth: int) -> int:
        """How many contacts share ``depth`` leading bits with our own id, and no more."""
        low_bits = limits.ID_BITS - depth - 1
        low = (self.node.long_id >> low_bits ^ 1) << low_bits
        high = low + (1 << low_bits) - 1
        buckets = self.buckets[self._index_of(low) : self._index_of(high) + 1]
        return sum(low <= contact.long_id <= high for bucket in buckets for contact in bucket.nodes.values())

    def depth_of(self, node_id: bytes) -> int:
        """How many leading bits an id shares with our own."""
        own: int = self.node.long_id
        return limits.ID_BITS - (own ^ int.from_bytes(node_id, "big")).bit_length()

    @property
    def own_depth(self) -> int:
        """How many leading bits the bucket around our own id fixes."""
        return cast("Bucket", self.buckets[self.get_bucket_for(self.node)]).prefix_bits
