"""A request's life, from text to text: encode, decode over the swarm, give back pieces of text as they become certain.

Owns the check against the model's context, the detokenising of the answer, and the bridge from the driver's synchronous callbacks to
an async iterator. Must not know HTTP, nor how a session finds its servers. Closing a `Generation` cancels its session at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Protocol, Self

from blocks.sampling_params import SamplingParams
from blocks.text import TextCodec
from blocks.text_stream import TextStream
from overlay.errors import Blame, PeerdError
from overlay.multiaddr import encode_base58
from overlay.rpc.types import Part
from peerd.adapters.adapter import Adapter, ModelShape, SoftPrompt, soft_prompt
from peerd.adapters.errors import WrongAdapter
from peerd.decoding import DecodeListener, DecodeRequest
from routing.types import Route

DEFAULT_NEW_TOKENS_MAX = 1024
"""How long an answer may get when the request doesn't say; less where the context has less room."""
QUIET_S = 10.0
"""After this long without anything new, `Quiet` is given, so that whoever streams can show a sign of life."""


class PromptTooLong(PeerdError):
    """The prompt, or the prompt and the tokens asked for, don't fit into the model's context."""

    code = "prompt-too-long"
    exit_code = 60
    http_status = 400
    blame = Blame.USER


class InvalidPrompt(PeerdError):
    """A prompt that can't be given to the model."""

    code = "invalid-prompt"
    exit_code = 2
    http_status = 400
    blame = Blame.USER


class NoChatTemplate(PeerdError):
    """The model was not taught to chat."""

    code = "no-chat-template"
    exit_code = 2
    http_status = 400
    blame = Blame.USER


class Stopping(PeerdError):
    """The session was cancelled from this side: the daemon is on its way out."""

    code = "stopping"
    exit_code = 62
    http_status = 503
    retryable = True


class DecodeFailed(PeerdError):
    """The session ended without a reason that could be told."""

    code = "internal"


class ActiveDecode(Protocol):
    """What is needed of `peerd.decoding.Decode`."""

    @property
    def session(self) -> bytes: ...
    @property
    def route(self) -> Route | None: ...
    @property
    def replays(self) -> int: ...
    def tokens_per_s(self) -> float | None: ...
    def cancel(self) -> None: ...


class StartDecode(Protocol):
    """Begins a session for one model; everything else is told to the listener."""

    def __call__(self, request: DecodeRequest, listener: DecodeListener) -> ActiveDecode: ...


@dataclass(frozen=True, slots=True)
class TextModel:
    """A model that this node can drive: its text side, and the door to its sessions."""

    name: str
    codec: TextCodec
    context_tokens: int
    start: StartDecode
    shape: ModelShape | None = None
    """What adapters have to fit; None: this model takes none."""
    adapter_tokens: int = 0
    """Positions of the context that an adapter in front takes."""

    @property
    def room_tokens(self) -> int:
        """For prompt and answer together."""
        return self.context_tokens - self.adapter_tokens

    @property
    def context_words(self) -> str:
        """How large the context is, and what isn't the prompt's of it."""
        taken = f", {self.adapter_tokens} of them the adapter's" if self.adapter_tokens else ""
        return f"the context of {self.name} is {self.context_tokens}{taken}"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What is asked, checked as far as that goes without the model.

    Attributes:
        prompt: text, token ids, or a conversation (a sequence of messages).
        max_new_tokens: None: what fits, at most `DEFAULT_NEW_TOKENS_MAX`.
        wait_s: how long to wait, each time, for blocks that are loading or hops that are busy.
        adapter: name of the adapter to generate with.
    """

    prompt: str | tuple[int, ...] | Sequence[Mapping[str, Any]]
    params: SamplingParams
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    wait_s: float = 60.0
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """New text that is certain, and the tokens that came with it (either may be empty)."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing flows for now: ``planning``, ``waiting`` or ``replaying``, with a sentence where there is one."""

    reason: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Quiet:
    """Nothing happened for `QUIET_S`."""


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a generation that went well.

    Attributes:
        finish_reason: ``stop`` (end token or stop string) or ``length``.
        tokens_per_s: from the first token to the last; None when there were less than two.
        route: (peer id, span) of each hop of the last route, as text.
    """

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    route: tuple[tuple[str, str], ...]
    tokens_per_s: float | None
    replays: int


Event = Delta | Waiting | Quiet | Done


def encode_prompt(model: TextModel, request: GenerationRequest, now_s: float) -> tuple[int, ...]:
    """The ids of a request's prompt, checked against the vocabulary and the context. Slow for long texts: call it off the loop.

    Raises:
        InvalidPrompt, NoChatTemplate, PromptTooLong, or the template's own refusal.
    """
    prompt = request.prompt
    if isinstance(prompt, str):
        ids = tuple(model.codec.encode(prompt))
    elif all(isinstance(entry, int) for entry in prompt):
        ids = tuple(entry for entry in prompt if isinstance(entry, int))
        _check_ids(model, ids)
    else:
        if not model.codec.has_chat_template:
            raise NoChatTemplate(f"{model.name} has no chat template; send a plain prompt to /v1/completions.")
        messages = [entry for entry in prompt if isinstance(entry, Mapping)]
        ids = tuple(model.codec.encode_chat(messages, now=datetime.fromtimestamp(now_s, UTC)))
    if not ids:
        raise InvalidPrompt("The prompt is empty; write something for the model to go on from.")
    if len(ids) >= model.room_tokens:
        raise PromptTooLong(f"The prompt has {len(ids)} tokens, and {model.context_words}; shorten the prompt.")
    return ids


def _check_ids(model: TextModel, ids: tuple[int, ...]) -> None:
    size = model.codec.vocabulary_size
    wrong = next((token for token in ids if not 0 <= token < size), None)
    if wrong is not None:
        raise InvalidPrompt(f"The prompt has the token id {wrong}; those of {model.name} are 0 to {size - 1}.")


def room_for(model: TextModel, request: GenerationRequest, prompt_tokens: int) -> int:
    """How many new tokens the session may have. Raises PromptTooLong when the request wants more than fits."""
    room = model.room_tokens - prompt_tokens
    wanted = request.max_new_tokens
    if wanted is None:
        return min(room, DEFAULT_NEW_TOKENS_MAX)
    if wanted > room:
        raise PromptTooLong(
            f"The prompt has {prompt_tokens} tokens and max_tokens is {wanted}, but {model.context_words}; "
            f"shorten the prompt or ask for at most {room}."
        )
    return wanted


def with_adapter(model: TextModel, adapter: Adapter) -> tuple[TextModel, SoftPrompt]:
    """The model as it is with an adapter in front of its context. Raises WrongAdapter, BadAdapter."""
    if model.shape is None:
        raise WrongAdapter(f"{model.name} takes no adapters.")
    soft = soft_prompt(adapter, model.shape)
    return replace(model, adapter_tokens=soft.length), soft


class Generation:
    """One answer: ``async with Generation(...) as generation: async for event in generation``.

    The last event is `Done`. Leaving the block cancels the session if it still runs, before anything else happens on the loop.
    What waits here is bounded: at most ``max_new_tokens`` ids and one notice, however slowly the events are taken.

    Raises (while iterating):
        PeerdError: why the session failed, once all text before it has been given.
    """

    def __init__(
        self, model: TextModel, request: GenerationRequest, prompt: tuple[int, ...], soft: SoftPrompt | None = None
    ) -> None:
        self._model = model
        self._soft = soft
        self._request = request
        self._prompt = prompt
        self._text = TextStream(model.codec, request.stop)
        self._tokens: deque[int] = deque()
        self._notice: Waiting | None = None
        self._end: tuple[str, PeerdError | None] | None = None
        self._wake: asyncio.Future[bool] | None = None
        self._count = 0
        self._flushed = False
        self._over = False
        self._decode: ActiveDecode | None = None

    @property
    def session(self) -> bytes:
        """The id of the session, once entered."""
        return b"" if self._decode is None else self._decode.session

    async def __aenter__(self) -> Self:
        request, soft = self._request, self._soft
        decode_request = DecodeRequest(
            prompt=self._prompt,
            params=request.params,
            max_new_tokens=room_for(self._model, request, len(self._prompt)),
            stop_tokens=self._model.codec.end_token_ids,
            ignore_eos=request.ignore_eos,
            wait_s=request.wait_s,
            prefix=None if soft is None else soft.prefix,
            prompts=None if soft is None else soft.prompts,
        )
        self._decode = self._model.start(decode_request, self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over = True
        self.stop()

    def stop(self) -> None:
        """End it from this side: whoever iterates gets what there is, then `Stopping`."""
        if self._decode is not None and self._end is None:
            self._decode.cancel()

    # --- DecodeListener: called by the driver, synchronously ---

    def on_token(self, token: int, logits: Part | None) -> bool:
        """Only kept: text is worked out when it is taken, so that the next step doesn't wait for it."""
        del logits
        self._tokens.append(token)
        self._rouse()
        return True

    def on_waiting(self, reason: str, error: PeerdError | None) -> None:
        """The latest notice replaces one that nobody took."""
        self._notice = Waiting(reason, "" if error is None else str(error))
        self._rouse()

    def on_end(self, reason: str, error: PeerdError | None) -> None:
        self._end = (reason, error)
        self._rouse()

    # --- the iterator ---

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._over:
            raise StopAsyncIteration
        if not self._has_news() and not await self._news():
            return Quiet()
        if self._tokens:
            self._notice = None
            return self._take_tokens()
        if self._notice is not None:
            notice, self._notice = self._notice, None
            return notice
        return self._finish()

    def _has_news(self) -> bool:
        return bool(self._tokens) or self._notice is not None or self._end is not None or self._text.stopped

    async def _news(self) -> bool:
        """Waits for the next callback; False after `QUIET_S` without one."""
        loop = asyncio.get_running_loop()
        wake: asyncio.Future[bool] = loop.create_future()
        self._wake = wake
        timer = loop.call_later(QUIET_S, self._rouse, False)
        try:
            return await wake
        finally:
            timer.cancel()
            self._wake = None

    def _rouse(self, news: bool = True) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(news)

    def _take_tokens(self) -> Delta:
        """All that came since, as one piece; what a stop string cuts off is dropped, tokens and text."""
        text: list[str] = []
        ids: list[int] = []
        while self._tokens and not self._text.stopped:
            token = self._tokens.popleft()
            text.append(self._text.push(token).text)
            ids.append(token)
        self._count += len(ids)
        if self._text.stopped:
            self._tokens.clear()
            self.stop()
        return Delta("".join(text), tuple(ids))

    def _finish(self) -> Event:
        reason, error = self._end or ("cancelled", None)
        if not self._flushed:
            self._flushed = True
            rest = self._text.finish()
            if rest:
                return Delta(rest, ())
        self._over = True
        if self._text.stopped:
            return self._done("stop")
        if reason == "cancelled":
            raise error or Stopping("The daemon is stopping; ask another one, or again when it is back.")
        if reason == "error":
            raise error or DecodeFailed("The generation failed inside this daemon; see its log.")
        return self._done(reason)

    def _done(self, finish_reason: str) -> Done:
        decode = self._decode
        hops = () if decode is None or decode.route is None else decode.route.hops
        return Done(
            finish_reason,
            len(self._prompt),
            self._count,
            tuple((encode_base58(hop.peer), str(hop.span)) for hop in hops),
            None if decode is None else decode.tokens_per_s(),
            0 if decode is None else decode.replays,
        )
