"""Where a node's time goes: exclusive seconds per layer of the token path, measured by wrapping the real functions.

For benchmarks only. A wrapped function stops the clock of whichever layer called it, so the sums never count a moment twice.
Each probe costs about half a microsecond, which is why latencies are taken in another run than the split.
"""

from __future__ import annotations

import asyncio.selector_events
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import blocks.protocol.hop
import overlay.rpc.channel
import overlay.rpc.frame
from blocks.engine.thread import DeviceThread
from blocks.protocol.device import Job, JobResult, SpanJob
from blocks.service import SpanService
from overlay.connection import Connection
from overlay.noise.transport import CipherState
from overlay.rpc.frame import FrameDecoder

SOCKET_TRANSPORT: object = vars(asyncio.selector_events)["_SelectorSocketTransport"]
LAYERS = ("codec", "signature", "noise", "mux", "session", "socket calls", "hand-over")
WRAPPED: tuple[tuple[object, str, str], ...] = (
    (overlay.rpc.channel, "encode_frame", "codec"),
    (overlay.rpc.channel, "encode_header", "codec"),
    (FrameDecoder, "feed", "codec"),
    (overlay.rpc.channel, "sign", "signature"),
    (overlay.rpc.channel, "is_authentic", "signature"),
    (CipherState, "open", "noise"),
    (CipherState, "open_into", "noise"),
    (CipherState, "seal_framed", "noise"),
    (CipherState, "seal_framed_each", "noise"),
    (Connection, "buffer_updated", "mux"),
    (Connection, "pump", "mux"),
    (SpanService, "data_received", "session"),
    (SpanService, "_job_done", "session"),
    (blocks.protocol.hop, "sha256", "signature"),
    (SOCKET_TRANSPORT, "write", "socket calls"),
    (SOCKET_TRANSPORT, "_read_ready__get_buffer", "socket calls"),
)


class TimedHash:
    """SHA-256 of a part as it comes: the signature's work, done inside the codec's loop."""

    def __init__(self, probes: Probes) -> None:
        self._hash = hashlib.sha256()
        self.update = probes.timed(self._hash.update, "signature")
        self.digest = probes.timed(self._hash.digest, "signature")


class Probes:
    """Install once per process, on the loop's thread; `take` gives the sums since the last call."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0
        self._windows = 0
        self._submitted: dict[int, tuple[float, float]] = {}

    def install(self) -> None:
        """Wrap every function of the table that this version has, and the device's two hand-overs."""
        for owner, name, layer in WRAPPED:
            original = getattr(owner, name, None)
            if original is not None:
                setattr(owner, name, self.timed(original, layer))
        vars(overlay.rpc.frame)["hashlib"] = SimpleNamespace(sha256=lambda: TimedHash(self))
        self._watch_device()

    def take(self) -> dict[str, float]:
        """Milliseconds of each layer per window."""
        count = max(1, self._windows)
        sums = {layer: 1000 * self._sums[layer] / count for layer in LAYERS}
        self._sums.clear()
        self._windows = 0
        return sums

    def timed(self, original: Callable[..., Any], layer: str) -> Callable[..., Any]:
        stack, sums, now = self._stack, self._sums, time.perf_counter

        def timed(*arguments: Any, **named: Any) -> Any:
            entered = now()
            if stack:
                sums[stack[-1]] += entered - self._since
            self._since = entered
            stack.append(layer)
            try:
                return original(*arguments, **named)
            finally:
                left = now()
                sums[stack.pop()] += left - self._since
                self._since = left

        return timed

    def _watch_device(self) -> None:
        """Hand-over: from `submit` to the callback, without the job itself and what the loop did meanwhile."""
        submit = DeviceThread.submit

        def watched(device: DeviceThread, jobs: tuple[Job, ...], done: Callable[[JobResult], None]) -> None:
            submitted, busy = time.perf_counter(), sum(self._sums.values())

            def arrived(result: JobResult) -> None:
                if isinstance(result.job, SpanJob):
                    waited = time.perf_counter() - submitted - result.seconds
                    meanwhile = sum(self._sums.values()) - busy
                    self._sums["hand-over"] += max(0.0, waited - meanwhile)
                    self._windows += 1
                done(result)

            submit(device, jobs, arrived)

        DeviceThread.submit = watched  # type: ignore[method-assign, assignment]
