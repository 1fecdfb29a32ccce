"""The fabric's contract over `netsim.link`, until `netsim.fabric` is there: delays, kills and partitions only."""

from __future__ import annotations

import random  # noqa: TID251 - a seeded generator, never the global one
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from netsim.link import LinkOptions, LinkTransport, Network
from netsim.trace import Trace


@dataclass(frozen=True, slots=True)
class Path:
    delay_s: float = 0.005
    jitter_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float | None = None
    is_black_hole: bool = False


@dataclass(frozen=True, slots=True)
class Card:
    uplink_bytes_per_s: float | None = None
    downlink_bytes_per_s: float | None = None
    send_buffer_bytes: int = 256 << 10
    initial_window_segments: int = 10


class _LinkTrace:
    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def add(self, now: float, text: str) -> None:
        self._trace.add("link", "", text)


class Fabric:
    def __init__(self, trace: Trace, generator: random.Random, default: Path | None = None) -> None:
        told: Any = _LinkTrace(trace)
        self._network = _PathedNetwork(told)
        if default is not None:
            self.set_default(lambda source, target: default)

    def add_host(self, name: str, address: str, card: Card, nat: Sequence[Any] = ()) -> None:
        self._network.names[address] = name
        self._network.addresses[name] = address

    def transport(self, name: str) -> LinkTransport:
        address = self._network.addresses[name]
        if address in self._network._dead:
            self._network._dead.remove(address)
        return self._network.transport(address)

    def set_default(self, choose: Callable[[str, str], Path]) -> None:
        self._network.choose = choose

    def partition(self, sources: Collection[str], targets: Collection[str], *, both_ways: bool = True) -> int:
        self._network.cuts.append((frozenset(sources), frozenset(targets)))
        if both_ways:
            self._network.cuts.append((frozenset(targets), frozenset(sources)))
        return len(self._network.cuts)

    def heal(self, partition: int) -> None:
        self._network.cuts[:] = []

    def set_path(self, source: str, target: str, path: Path) -> None:
        self._network.paths[source, target] = path

    def reset(self, one: str, other: str) -> None:
        self._network.cut(self._network.addresses[one], self._network.addresses[other])

    def process_died(self, name: str) -> None:
        self._network.kill(self._network.addresses[name])

    def power_off(self, name: str) -> None:
        self._network.kill(self._network.addresses[name])

    def power_on(self, name: str) -> None:
        """Nothing to do."""


class _PathedNetwork(Network):
    def __init__(self, trace: Any) -> None:
        super().__init__(trace)
        self.names: dict[str, str] = {}
        self.addresses: dict[str, str] = {}
        self.paths: dict[tuple[str, str], Path] = {}
        self.cuts: list[tuple[frozenset[str], frozenset[str]]] = []
        self.choose: Callable[[str, str], Path] = lambda source, target: Path()

    def options(self, source: str, target: str) -> LinkOptions:
        one, other = self.names.get(source, source), self.names.get(target, target)
        path = self.paths.get((one, other)) or self.choose(one, other)
        cut = any(one in sources and other in targets for sources, targets in self.cuts)
        return LinkOptions(path.delay_s, path.bytes_per_s, None, path.is_black_hole or cut)
