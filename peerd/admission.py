"""Which sessions this node takes: what is served, in which class, and whether its KV memory has room.

Implements `blocks.protocol.admission.Admission` over `blocks.engine.kv_budget`. Decides nothing about routes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blocks.engine.kv_budget import KvBudget
from blocks.protocol.admission import Grant, Wish
from blocks.protocol.call_errors import CallFault
from blocks.protocol.calls import Offer
from blocks.protocol.device import Device, JobResult, LeaseKey, ReleaseJob
from blocks.protocol.session_errors import SessionFault
from overlay.errors import PeerdError
from overlay.ports import Clock
from overlay.rpc.types import DTYPE_BYTES
from routing.types import ComputeClass, ModelId, Span

if TYPE_CHECKING:
    from blocks.protocol.hops import Hops

WINDOWS = 8
WINDOW_TOKENS = 2048
WINDOW_BYTES_MIN = 1 << 20
WINDOW_BYTES_MAX = 64 << 20
ROLLBACK_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True)
class _Offer:
    key: str
    span: Span
    width: int
    token_bytes: int
    max_positions: int


class KvAdmission:
    """See the module."""

    def __init__(self, device: Device, clock: Clock) -> None:
        self._device = device
        self._clock = clock
        self._offers: dict[tuple[ModelId, str], _Offer] = {}
        self.budget = KvBudget(0)
        self.hops: Hops | None = None

    def serve(
        self,
        model: ModelId,
        compute_class: ComputeClass,
        key: str,
        span: Span,
        width: int,
        token_bytes: int,
        max_positions: int,
    ) -> None:
        """Take sessions and calls for ``span`` of a model from now on; ``token_bytes`` of KV for each of a session's tokens."""
        self._offers[model, str(compute_class)] = _Offer(key, span, width, token_bytes, max_positions)

    def offer(self, model: ModelId, compute_class: str) -> Offer:
        """What tensor calls may ask for. Raises CallFault."""
        found = self._offers.get((model, compute_class))
        if found is None:
            if any(known == model for known, _ in self._offers):
                raise CallFault("wrong-class", "This server runs the model in another compute class.")
            raise CallFault("not-served", "This server does not serve that model.")
        dtype = ComputeClass.parse(compute_class).dtype
        return Offer(found.key, found.span, found.width, dtype, found.max_positions)

    def admit(self, lease: LeaseKey, wish: Wish) -> Grant | PeerdError:
        """See `Admission.admit`."""
        if wish.adapter:
            return SessionFault("not-served", "This server has no adapters.")
        offer = self._offers.get((wish.model, wish.compute_class))
        if offer is None:
            if any(model == wish.model for model, _ in self._offers):
                return SessionFault("wrong-class", "This server runs the model in another compute class.")
            return SessionFault("not-served", "This server does not serve that model.")
        if not offer.span.covers(wish.span):
            return SessionFault("not-served", f"This server has blocks {offer.span}, not {wish.span}.")
        size = wish.max_tokens * offer.token_bytes * len(wish.span) // len(offer.span)
        verdict = self.budget.reserve(lease, size, self._clock.now())
        if not verdict.admitted:
            return SessionFault("busy", "This server's memory for sessions is full.", verdict.retry_after_s)
        for dropped in verdict.dropped:
            self._device.submit((ReleaseJob(dropped),), _ignore)
            if self.hops is not None:
                self.hops.lease_dropped(dropped)
        dtype = ComputeClass.parse(wish.compute_class).dtype
        window_bytes = min(WINDOW_BYTES_MAX, max(WINDOW_BYTES_MIN, WINDOW_TOKENS * offer.width * DTYPE_BYTES[dtype]))
        return Grant(offer.key, WINDOWS, window_bytes, ROLLBACK_TOKENS, offer.width, dtype)

    def free_tokens(self, model: ModelId, compute_class: ComputeClass) -> int | None:
        """Session tokens that there is room for; None for a model that isn't served yet."""
        offer = self._offers.get((model, str(compute_class)))
        return None if offer is None else self.budget.free_bytes // max(1, offer.token_bytes)

    def touch(self, lease: LeaseKey) -> None:
        """A lease works: it isn't idle, so it isn't dropped for another's sake."""
        self.budget.touch(lease, self._clock.now())

    def release(self, lease: LeaseKey) -> None:
        """See `Admission.release`."""
        self.budget.release(lease)


def _ignore(result: JobResult) -> None:
    """Nobody waits for a release."""
