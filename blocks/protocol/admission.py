"""The ports through which a hop asks its node: may this session come in, and how is the engine doing?

Implemented by the node (models, KV budget) and by the simulator. Values only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from blocks.protocol.device import LeaseKey
from overlay.errors import PeerdError
from routing.types import ModelId, Span


@dataclass(frozen=True, slots=True)
class Grant:
    """What a session gets: the device's name for the model, its credits, and the shape of its boundary.

    A boundary is (tokens, ``width``) of ``dtype``; ``window_bytes`` must hold one token's at least.
    """

    model_key: str
    windows: int
    window_bytes: int
    rollback_tokens: int
    width: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Wish:
    """What a session asks for. ``compute_class`` and ``adapter`` are a stranger's words: bounded text, no more."""

    model: ModelId
    compute_class: str
    adapter: str
    span: Span
    max_tokens: int


class Admission(Protocol):
    """Who gets KV memory on this node."""

    def admit(self, lease: LeaseKey, wish: Wish) -> Grant | PeerdError:
        """Reserve, or say why not: `SessionFault` with `busy` (and ``retry_after_s``), `not-served`, `wrong-class`."""

    def release(self, lease: LeaseKey) -> None:
        """Give back what `admit` reserved; called once for each grant."""


class Gauge(Protocol):
    """What heartbeats tell of the engine; every `Device` is one."""

    @property
    def step_count(self) -> int: ...

    @property
    def queue_depth(self) -> int: ...
