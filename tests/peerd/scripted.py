"""A node whose models say what a script says: real tokenizer, real API, real sockets; only the swarm is a script.

Steps of a script are played one a turn of the loop, so streams interleave as they do with real sessions.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from blocks.demo import MODEL_DIRECTORY
from blocks.text import TextCodec
from overlay.errors import Blame, PeerdError
from peerd.adapters.adapter import ModelShape
from peerd.adapters.store import AdapterStore
from peerd.decoding import DecodeListener, DecodeRequest
from peerd.generation import TextModel
from peerd.hidden_sessions import HiddenSessions
from peerd.local_api.node_view import HopView, ServedModel, ServerView, SessionView, Status, SwarmModel
from peerd.local_api.server import serving
from peerd.metrics import Metrics
from peerd.system_ports import SystemRandomness, SystemWallClock
from routing.types import Hop, Route, Span

PEER_A, PEER_B = b"\x00\x24" + b"a" * 36, b"\x00\x24" + b"b" * 36
ROUTE = Route((Hop(PEER_A, (), Span(0, 6)), Hop(PEER_B, (), Span(6, 12))))
MODEL_ID = "ab" * 32


class UnknownModel(PeerdError):
    code = "unknown-model"
    http_status = 404
    blame = Blame.USER


class ModelRequired(PeerdError):
    code = "model-required"
    http_status = 400
    blame = Blame.USER


class Unserved(PeerdError):
    code = "blocks-unserved"
    http_status = 503


class Pending(PeerdError):
    code = "blocks-pending"
    http_status = 503
    retryable = True


@dataclass(frozen=True)
class Token:
    token: int


@dataclass(frozen=True)
class Wait:
    reason: str
    error: PeerdError | None = None


@dataclass(frozen=True)
class Fail:
    error: PeerdError | None


@dataclass(frozen=True)
class Hang:
    """Say nothing more until cancelled."""


Step = Token | Wait | Fail | Hang


@cache
def demo_codec() -> TextCodec:
    return TextCodec.from_directory(MODEL_DIRECTORY)


def says(text: str, *, end: bool = True) -> list[Step]:
    """A script that says ``text`` and ends it."""
    codec = demo_codec()
    ids = codec.encode(text, add_special_tokens=False)
    return [Token(token) for token in (*ids, *(codec.end_token_ids[:1] if end else ()))]


class ScriptedDecode:
    """Plays steps to its listener, as `peerd.decoding.Decode` would."""

    def __init__(self, node: ScriptedNode, request: DecodeRequest, listener: DecodeListener) -> None:
        self.session = len(node.decodes).to_bytes(16, "big")
        self.route: Route | None = ROUTE
        self.replays = 0
        self.request = request
        self.cancelled = False
        self.over = False
        self._node = node
        self._listener = listener
        self._steps = iter(tuple(node.script))
        self._told = 0
        asyncio.get_running_loop().call_soon(self._play)

    def tokens_per_s(self) -> float | None:
        return 42.0 if self._told > 1 else None

    def cancel(self) -> None:
        if not self.over:
            self.cancelled = True
            self._end("cancelled", None)

    def _end(self, reason: str, error: PeerdError | None) -> None:
        self.over = True
        self._node.changed()
        self._listener.on_end(reason, error)

    def _play(self) -> None:
        if self.over:
            return
        step = next(self._steps, None)
        if isinstance(step, Hang):
            return
        if isinstance(step, Token):
            self._play_token(step.token)
        elif isinstance(step, Wait):
            self.replays += step.reason == "replaying"
            self._listener.on_waiting(step.reason, step.error)
        elif isinstance(step, Fail):
            self._end("error", step.error)
        else:
            self._end("stop", None)
        if not self.over:
            asyncio.get_running_loop().call_soon(self._play)

    def _play_token(self, token: int) -> None:
        self._told += 1
        goes_on = self._listener.on_token(token, None)
        if self.over:
            return
        if not goes_on or (token in self.request.stop_tokens and not self.request.ignore_eos):
            self._end("stop", None)
        elif self._told >= self.request.max_new_tokens:
            self._end("length", None)


@dataclass
class ScriptedNode:
    """`NodeView` over a script. ``on_stop`` and ``names`` are the knobs; ``decodes`` is what was asked."""

    script: list[Step] = field(default_factory=lambda: says("One day a fox went out."))
    names: tuple[str, ...] = ("demo",)
    context_tokens: int = 1024
    codec: TextCodec = field(default_factory=demo_codec)
    on_stop: Callable[[], None] = lambda: None
    broken: bool = False
    pending_opens: int = 0
    adapters_directory: Path = Path("/nonexistent")

    def __post_init__(self) -> None:
        self.hidden_sessions = HiddenSessions()
        self.adapters = AdapterStore(self.adapters_directory)
        self.metrics = Metrics("0.0-test", "12D3KooWtest")
        self.wall_clock = SystemWallClock()
        self.randomness = SystemRandomness()
        self.decodes: list[ScriptedDecode] = []
        self.stop_requests = 0
        self._condition = threading.Condition()

    def changed(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def wait_until(self, holds: Callable[[], bool], timeout_s: float = 5.0) -> bool:
        """From the test's thread: until something that decodes do has happened."""
        with self._condition:
            return self._condition.wait_for(holds, timeout_s)

    def start(self, request: DecodeRequest, listener: DecodeListener) -> ScriptedDecode:
        decode = ScriptedDecode(self, request, listener)
        self.decodes.append(decode)
        self.changed()
        return decode

    def model(self, name: str = "demo") -> TextModel:
        shape = ModelShape(name, MODEL_ID, "none/float32/sdpa/1", 12, 4, 4, 2, self.context_tokens)
        return TextModel(name, self.codec, self.context_tokens, self.start, shape)

    def status(self) -> Status:
        if self.broken:
            raise RuntimeError("a bug with a secret in it")
        route = tuple(HopView("12D3KooWa", hop.span) for hop in ROUTE.hops)
        return Status(
            "12D3KooWtest",
            "0.0-test",
            "online",
            ("/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWtest",),
            (ServedModel(MODEL_ID, "demo", Span(0, 6), "online", 1.0),),
            (SessionView("00" * 16, "demo", route, 7, 0),),
        )

    def swarm(self) -> tuple[SwarmModel, ...]:
        servers = (
            ServerView("12D3KooWtest", Span(0, 6), "online", is_self=True),
            ServerView("12D3KooWother", Span(6, 8), "joining"),
        )
        return tuple(SwarmModel(MODEL_ID, name, 12, "none/float32/sdpa/1", servers) for name in self.names)

    async def open_model(self, name: str | None) -> TextModel:
        if self.pending_opens:
            self.pending_opens -= 1
            raise Pending("No model is known yet.")
        if name is None and len(self.names) != 1:
            raise ModelRequired(f"Say which model; there are {', '.join(self.names)}.")
        if name is not None and name not in self.names:
            raise UnknownModel(f"No model is called {name!r}; there are {', '.join(self.names)}.")
        return self.model(name or self.names[0])

    def request_stop(self) -> None:
        self.stop_requests += 1
        self.changed()
        self.on_stop()


@contextlib.contextmanager
def answering(node: ScriptedNode, socket: Path, owner_uid: int | None = None) -> Iterator[Path]:
    """The real API of ``node`` at ``socket``, on a loop in a thread of its own."""
    ready = threading.Event()
    failures: list[BaseException] = []
    loop_and_stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        stop = asyncio.Event()
        loop_and_stop.append((asyncio.get_running_loop(), stop))
        async with serving(node, socket, owner_uid):
            ready.set()
            await stop.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread
            failures.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="api")
    thread.start()
    try:
        assert ready.wait(10)
        if failures:
            raise failures[0]
        yield socket
    finally:
        if not failures:
            loop, stop = loop_and_stop[0]
            loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive()
