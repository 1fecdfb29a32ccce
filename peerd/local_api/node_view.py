"""What the local API needs of the node: a protocol and the values that it gives. Types only.

The API never reaches behind this, so it can be tested against any node, and the node knows nothing of HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from overlay.ports import Randomness, WallClock
from peerd.adapters.store import AdapterStore
from peerd.calls.caller import BatchCaller
from peerd.client.tensor_body import Tensor
from peerd.decoding import DriverModel
from peerd.driving import RouteWish
from peerd.generation import TextModel
from peerd.hidden_sessions import HiddenSession, HiddenSessions
from peerd.metrics import Metrics
from peerd.training.jobs import Jobs
from routing.types import Span


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A span that this node serves, or is about to."""

    model_id: str  # hex
    name: str
    span: Span
    state: str  # joining, online or draining
    progress: float  # of loading, 0 to 1


@dataclass(frozen=True, slots=True)
class HopView:
    """One hop of a session's route."""

    peer: str
    span: Span


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session that this node drives."""

    session: str  # hex
    model: str
    route: tuple[HopView, ...]
    tokens: int
    replays: int


@dataclass(frozen=True, slots=True)
class Status:
    """The node itself. ``state`` is joining until it found the network it was told to join, then online, at the end draining."""

    peer_id: str
    version: str
    state: str
    addresses: tuple[str, ...]  # full multiaddrs ending in /p2p/ID
    models: tuple[ServedModel, ...] = ()
    sessions: tuple[SessionView, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerView:
    """One peer's span of a model."""

    peer: str
    span: Span
    state: str
    is_self: bool = False


@dataclass(frozen=True, slots=True)
class SwarmModel:
    """A model that can be asked for by ``name``, and who serves it."""

    model_id: str  # hex
    name: str
    blocks: int
    compute_class: str
    servers: tuple[ServerView, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockModel:
    """A model whose blocks can be asked for."""

    name: str
    blocks: int
    config: str  # JSON, as the model id covers it
    driver: DriverModel


class NodeView(Protocol):
    """A running node."""

    @property
    def metrics(self) -> Metrics: ...
    @property
    def wall_clock(self) -> WallClock: ...
    @property
    def randomness(self) -> Randomness: ...
    @property
    def calls(self) -> BatchCaller:
        """Batches through spans of a model."""

    @property
    def jobs(self) -> Jobs: ...
    @property
    def adapters(self) -> AdapterStore: ...
    @property
    def hidden_sessions(self) -> HiddenSessions:
        """Sessions that are fed hidden states."""

    def open_session(self, wish: RouteWish) -> HiddenSession:
        """Begin a session of hidden states. Raises SessionsFull."""

    def status(self) -> Status: ...

    def swarm(self) -> tuple[SwarmModel, ...]:
        """Every model known, in the order of their names."""

    async def open_model(self, name: str | None) -> TextModel:
        """Find a model by name (None: the only one there is) and make it ready to be driven; may fetch its small parts.

        Raises:
            PeerdError: ``unknown-model`` (404), ``model-required`` (400, lists the names), or why it can't be driven. A retryable
                one (the node still joins, or loads its own models) is tried again for as long as the request may wait.
        """

    async def block_model(self, name: str | None) -> BlockModel:
        """Find a model as `open_model` does, but load nothing: for somebody who brings hidden states. Raises PeerdError."""

    async def outside_tensors(self, name: str | None) -> dict[str, Tensor]:
        """What of a model lies outside its blocks, from its files or from a server. Raises PeerdError."""

    def request_stop(self) -> None:
        """Begin a graceful stop; returns at once."""
