"""Contacts and the routing table: `kademlia`'s buckets with exact neighbours, 256-bit ids, no clock and no network.

Admission is the caller's: only peers that were authenticated, serve the DHT and answered. Here are the limits on address groups
(an eclipse needs addresses, ids are free) and the question whom to ping when a bucket is full. Pure.
"""

from __future__ import annotations

import hashlib
import heapq
import ipaddress
from collections import Counter
from itertools import chain
from typing import cast

from kademlia.node import Node
from kademlia.routing import KBucket, RoutingTable

from overlay.dht import limits
from overlay.identity import PeerId
from overlay.multiaddr import Multiaddr

ID_BITS = 256


def node_id_of(peer: PeerId) -> bytes:
    """SHA-256 of the peer id: an id can't be chosen without its key."""
    return hashlib.sha256(peer.multihash).digest()


def address_group(address: Multiaddr | None) -> str:
    """/24 or /48 of an address; loopback and private ones are a group for each port, since they prove nothing."""
    host = "" if address is None else address.host or ""
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not parsed.is_global:
        return f"{host}/{address.port if address is not None else 0}"
    prefix = 24 if parsed.version == 4 else 48
    return str(ipaddress.ip_network((parsed, prefix), strict=False))


class Target(Node):  # type: ignore[misc]
    """A point of the key space that is looked for."""

    def __init__(self, identifier: bytes) -> None:
        super().__init__(identifier)


class Contact(Target):
    """A peer of the DHT."""

    def __init__(self, peer: PeerId, addresses: tuple[Multiaddr, ...]) -> None:
        super().__init__(node_id_of(peer))
        self.peer = peer
        self.addresses = addresses
        self.failures = 0

    @property
    def group(self) -> str:
        return address_group(self.addresses[0] if self.addresses else None)

    def same_home_as(self, node: Node) -> bool:
        return bool(self.id == node.id)


class Bucket(KBucket):  # type: ignore[misc]
    """A k-bucket without a clock."""

    def touch_last_updated(self) -> None:
        """Freshness is counted by who queries, with the clock that it was given."""

    def split(self) -> tuple[Bucket, Bucket]:
        low, high = self.range
        middle = (low + high) // 2
        one, two = Bucket(low, middle, self.ksize), Bucket(middle + 1, high, self.ksize)
        for node in chain(self.nodes.values(), self.replacement_nodes.values()):
            (one if node.long_id <= middle else two).add_node(node)
        return one, two


class Table(RoutingTable):  # type: ignore[misc]
    """See the module."""

    def __init__(self, own: Target, ksize: int = limits.KSIZE) -> None:
        super().__init__(None, ksize, own)

    def flush(self) -> None:
        self.buckets = [Bucket(0, 2**ID_BITS - 1, self.ksize)]

    def get_bucket_for(self, node: Node) -> int:
        return next(index for index, bucket in enumerate(self.buckets) if node.long_id <= bucket.range[1])

    def contacts(self) -> list[Contact]:
        """Everybody, bucket by bucket."""
        return [cast(Contact, node) for bucket in self.buckets for node in bucket.nodes.values()]

    def find(self, peer: PeerId) -> Contact | None:
        target = Target(node_id_of(peer))
        return cast("Contact | None", self.buckets[self.get_bucket_for(target)][target.id])

    def find_neighbors(self, node: Node, k: int | None = None, exclude: Node | None = None) -> list[Contact]:
        """The exact ``k`` closest contacts; serving a question touches nothing."""
        left_out = {node.id} | ({exclude.id} if exclude is not None else set())
        candidates = (contact for contact in self.contacts() if contact.id not in left_out)
        return heapq.nsmallest(k or self.ksize, candidates, key=node.distance_to)

    def offer(self, contact: Contact) -> Contact | None:
        """Admit a contact that just answered. Returns one to ping when its bucket is full: the least recently seen."""
        if contact.id == self.node.id:
            return None
        while True:
            bucket = self.buckets[self.get_bucket_for(contact)]
            known = cast("Contact | None", bucket[contact.id])
            if known is None and self._is_crowded(contact, bucket):
                return None
            if bucket.add_node(contact):
                return None
            if not bucket.has_in_range(self.node) or len(self.buckets) >= limits.BUCKETS_MAX:
                return cast(Contact, bucket.head())
            self.split_bucket(self.buckets.index(bucket))

    def _is_crowded(self, contact: Contact, bucket: Bucket) -> bool:
        everywhere = Counter(other.group for other in self.contacts())
        here = Counter(cast(Contact, other).group for other in bucket.nodes.values())
        group = contact.group
        return everywhere[group] >= limits.CONTACTS_PER_GROUP_TABLE or here[group] >= limits.CONTACTS_PER_GROUP_BUCKET

    def answered(self, contact: Contact) -> None:
        """It lives: to the tail of its bucket."""
        known = self.find(contact.peer)
        if known is not None:
            known.failures = 0
            self.buckets[self.get_bucket_for(known)].add_node(known)

    def failed(self, contact: Contact) -> None:
        """It did not answer: after `FAILURES_TO_FORGET` times in a row it goes."""
        known = self.find(contact.peer)
        if known is not None:
            known.failures += 1
            if known.failures >= limits.FAILURES_TO_FORGET:
                self.remove_contact(known)

    def stale_targets(self, queried: dict[int, float], now: float, every_s: float) -> list[int]:
        """Indices of buckets that nobody here has queried for ``every_s``."""
        return [index for index in range(len(self.buckets)) if now - queried.get(index, float("-inf")) >= every_s]
