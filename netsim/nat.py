"""NAT boxes and firewalls: which endpoint the world sees of a connection, and what comes in. Pure.

Owns the mappings and filters of a box (RFC 4787's words for what it does, RFC 5382's times for TCP) and the way of a segment through
the boxes between two hosts. Must not know hosts' sockets, time or chance: ``now`` comes in, ports are handed out in a fixed order.

A kind is a pair of behaviours:

    kind                mapping (which public port)         filter (who may come in by a mapped port)
    open                none                                everybody
    full-cone           one per inside endpoint             everybody
    address-restricted  one per inside endpoint             addresses that it sent to
    port-restricted     one per inside endpoint             endpoints that it sent to
    symmetric           one per inside endpoint and target  the target
    firewall            none                                endpoints that it sent to

What is not let in is dropped without a word, as home routers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

Endpoint = tuple[str, int]
"""An address and a port."""

# --- fixed by RFC 5382, section 5 ---
ESTABLISHED_S = 7440.0
TRANSITORY_S = 240.0

# --- chosen ---
FIRST_PORT = 1024
PORTS = 65536 - FIRST_PORT
MAPPINGS_MAX = 16384
"""Of one box; the one that was used longest ago makes room."""
SESSIONS_MAX = 4096
"""Of one mapping."""


class NatKind(Enum):
    """See the module."""

    OPEN = "open"
    FULL_CONE = "full-cone"
    ADDRESS_RESTRICTED = "address-restricted"
    PORT_RESTRICTED = "port-restricted"
    SYMMETRIC = "symmetric"
    FIREWALL = "firewall"

    @property
    def translates(self) -> bool:
        """Whether hosts behind it have addresses of their own."""
        return self not in (NatKind.OPEN, NatKind.FIREWALL)


class Passage(Enum):
    """What a segment says about its connection."""

    OPENING = auto()
    ESTABLISHED = auto()
    ENDED = auto()


_LIFE_S = {Passage.OPENING: TRANSITORY_S, Passage.ESTABLISHED: ESTABLISHED_S, Passage.ENDED: TRANSITORY_S}


@dataclass(slots=True, eq=False)
class _Mapping:
    """An inside endpoint's public port, with the time until which each remote endpoint is remembered."""

    inside: Endpoint
    public: Endpoint
    is_forward: bool = False
    sessions: dict[Endpoint, float] = field(default_factory=dict)

    def is_live(self, now: float) -> bool:
        return self.is_forward or any(until > now for until in self.sessions.values())

    def use(self, remote: Endpoint, until: float) -> None:
        self.sessions.pop(remote, None)
        if len(self.sessions) >= SESSIONS_MAX:
            del self.sessions[next(iter(self.sessions))]
        self.sessions[remote] = until


class NatBox:
    """One box. ``address`` is its outer one; a box that doesn't translate needs none.

    ``forwards`` are pairs of an outer port and the inside endpoint that somebody forwarded it to. A box that doesn't preserve ports
    hands out its own even where the inside one is free; a symmetric one never preserves. ``life_factor`` shortens RFC 5382's times,
    which many home routers don't keep.
    """

    def __init__(
        self,
        kind: NatKind,
        address: str = "",
        forwards: Sequence[tuple[int, Endpoint]] = (),
        *,
        preserves_ports: bool = True,
        life_factor: float = 1.0,
    ) -> None:
        self.kind = kind
        self.address = address
        self._preserves = preserves_ports and kind is not NatKind.SYMMETRIC
        self._life_factor = life_factor
        self._next_port = 0
        self._by_inside: dict[tuple[Endpoint, Endpoint | None], _Mapping] = {}
        self._by_public: dict[Endpoint, _Mapping] = {}
        self._forwards = {inside: _Mapping(inside, (address, port), is_forward=True) for port, inside in forwards}
        for mapping in self._forwards.values():
            self._by_public[mapping.public] = mapping

    @property
    def mapping_count(self) -> int:
        """Mappings held, live or not yet forgotten."""
        return len(self._by_inside)

    def outbound(
        self, source: Endpoint, target: Endpoint, now: float, passage: Passage = Passage.OPENING
    ) -> Endpoint | None:
        """The endpoint by which ``target`` sees ``source``; made, or refreshed. None: forgotten, and only a SYN makes a new one."""
        if self.kind is NatKind.OPEN:
            return source
        key = (source, target if self.kind is NatKind.SYMMETRIC else None)
        mapping = self._forwards.get(source) or self._by_inside.get(key)
        if mapping is not None and not mapping.is_live(now):
            self._forget(key, mapping)
            mapping = None
        if passage is not Passage.OPENING and (mapping is None or mapping.sessions.get(target, now) <= now):
            return None
        if mapping is None:
            mapping = self._map(key, source, now)
        elif not mapping.is_forward:
            self._by_inside[key] = self._by_inside.pop(key)  # used last
        self._use(mapping, target, now, passage)
        return mapping.public

    def inbound(
        self, endpoint: Endpoint, source: Endpoint, now: float, passage: Passage = Passage.OPENING
    ) -> Endpoint | None:
        """Where inside a segment from ``source`` goes that came for ``endpoint``, or None: dropped."""
        if self.kind is NatKind.OPEN:
            return endpoint
        mapping = self._by_public.get(endpoint)
        if mapping is None or not mapping.is_live(now):
            return None
        if passage is Passage.OPENING:
            if not self._lets_in(mapping, source, now):
                return None
        elif mapping.sessions.get(source, now) <= now:
            return None
        if mapping.is_forward or self.kind is NatKind.FULL_CONE or source in mapping.sessions:
            self._use(mapping, source, now, passage)
        else:
            self._use(mapping, source, now, Passage.OPENING)
        return mapping.inside

    def reset(self) -> None:
        """It was switched off and on: nothing is remembered but what was configured."""
        for mapping in self._by_inside.values():
            del self._by_public[mapping.public]
        self._by_inside.clear()
        for mapping in self._forwards.values():
            mapping.sessions.clear()

    def _lets_in(self, mapping: _Mapping, source: Endpoint, now: float) -> bool:
        if mapping.is_forward or self.kind is NatKind.FULL_CONE:
            return True
        if self.kind is NatKind.ADDRESS_RESTRICTED:
            return any(remote[0] == source[0] and until > now for remote, until in mapping.sessions.items())
        return mapping.sessions.get(source, now) > now

    def _use(self, mapping: _Mapping, remote: Endpoint, now: float, passage: Passage) -> None:
        until = now + self._life_factor * _LIFE_S[passage]
        if passage is Passage.OPENING:  # a SYN (or one sent again) never shortens what is established
            until = max(until, mapping.sessions.get(remote, 0.0))
        mapping.use(remote, until)

    def _map(self, key: tuple[Endpoint, Endpoint | None], source: Endpoint, now: float) -> _Mapping:
        if len(self._by_inside) >= MAPPINGS_MAX:
            oldest = next(iter(self._by_inside))
            self._forget(oldest, self._by_inside[oldest])
        public = self._free_endpoint(source, now) if self.kind.translates else source
        mapping = self._by_inside[key] = self._by_public[public] = _Mapping(source, public)
        return mapping

    def _free_endpoint(self, source: Endpoint, now: float) -> Endpoint:
        if self._preserves and self._is_free((self.address, source[1]), now):
            return self.address, source[1]
        for _ in range(PORTS):  # MAPPINGS_MAX is smaller: one is free
            self._next_port = (self._next_port + 1) % PORTS
            if self._is_free((self.address, FIRST_PORT + self._next_port), now):
                break
        return self.address, FIRST_PORT + self._next_port

    def _is_free(self, endpoint: Endpoint, now: float) -> bool:
        mapping = self._by_public.get(endpoint)
        if mapping is None:
            return True
        if mapping.is_live(now):
            return False
        for key in ((mapping.inside, None), *((mapping.inside, remote) for remote in mapping.sessions)):
            if self._by_inside.get(key) is mapping:
                self._forget(key, mapping)
        return True

    def _forget(self, key: tuple[Endpoint, Endpoint | None], mapping: _Mapping) -> None:
        self._by_inside.pop(key, None)
        if self._by_public.get(mapping.public) is mapping:
            del self._by_public[mapping.public]


def outbound(
    boxes: Sequence[NatBox], source: Endpoint, target: Endpoint, now: float, passage: Passage = Passage.OPENING
) -> Endpoint | None:
    """`NatBox.outbound` through a chain, innermost first: the endpoint that the internet sees."""
    seen: Endpoint | None = source
    for box in boxes:
        seen = None if seen is None else box.outbound(seen, target, now, passage)
    return seen


def inbound(
    boxes: Sequence[NatBox], endpoint: Endpoint, source: Endpoint, now: float, passage: Passage = Passage.OPENING
) -> Endpoint | None:
    """`NatBox.inbound` through a chain, outermost last in ``boxes``: the host's own endpoint, or None."""
    found: Endpoint | None = endpoint
    for box in reversed(boxes):
        found = None if found is None else box.inbound(found, source, now, passage)
    return found


def public_address(address: str, boxes: Sequence[NatBox]) -> str:
    """By which address the internet knows a host of ``address`` behind ``boxes``."""
    return next((box.address for box in reversed(boxes) if box.kind.translates), address)


SITES = (*(kind.value for kind in NatKind), "double", "forwarded")
"""What a host can sit behind: one box of a kind; a home router behind a provider's that shares addresses; a router whose owner
forwarded the listening port."""


def site(kind: str, public: str, private: str, port: int) -> tuple[str, tuple[NatBox, ...]]:
    """A host's own address and the boxes in front of it, innermost first. ``port`` is where it listens. Raises ValueError."""
    if kind == "double":
        shared = NatBox(NatKind.PORT_RESTRICTED, public, preserves_ports=False)
        return private, (NatBox(NatKind.PORT_RESTRICTED, _between(private)), shared)
    if kind == "forwarded":
        return private, (NatBox(NatKind.PORT_RESTRICTED, public, ((port, (private, port)),)),)
    found = NatKind(kind)
    if found is NatKind.OPEN:
        return public, ()
    return (private, (NatBox(found, public),)) if found.translates else (public, (NatBox(found),))


def _between(private: str) -> str:
    """The address between two boxes (RFC 6598's shared space), one for each private address 10.x.y.z."""
    _, high, middle, low = (int(part) for part in private.split("."))
    return f"100.{64 + high % 64}.{middle}.{low}"
