"""How answers look: OpenAI's objects for completions, our own for status and swarm. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from overlay.errors import PeerdError
from peerd.generation import Delta, Done, Waiting
from peerd.local_api.errors import error_document
from peerd.local_api.node_view import Status, SwarmModel
from peerd.local_api.parameters import CompletionRequest

KEEP_ALIVE = b": \n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
STREAM_END = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class CompletionWriter:
    """Writes one completion, whole or as events.

    Attributes:
        identity: hex digits that tell this completion from others.
        created: Unix seconds.
        model: the name that the model answers to.
    """

    request: CompletionRequest
    identity: str
    created: int
    model: str

    def whole(self, text: str, token_ids: list[int], done: Done) -> dict[str, Any]:
        """The answer to a request without ``stream``."""
        choice: dict[str, Any] = {"index": 0}
        if self.request.is_chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": done.finish_reason}
        if self.request.return_token_ids:
            choice["token_ids"] = token_ids
        kind = "chat.completion" if self.request.is_chat else "text_completion"
        return {**self._head(kind), "choices": [choice], "usage": usage(done), "peerd": facts(done)}

    def first(self) -> bytes:
        """What a stream begins with: a chat says who speaks."""
        if not self.request.is_chat:
            return b""
        return event(self._chunk({"delta": {"role": "assistant", "content": ""}}, None))

    def delta(self, delta: Delta) -> bytes:
        """New text."""
        choice: dict[str, Any] = {"delta": {"content": delta.text}} if self.request.is_chat else {"text": delta.text}
        if self.request.return_token_ids:
            choice["token_ids"] = delta.token_ids
        elif not delta.text:
            return b""  # half a character, or what may become a stop string: nothing to say yet
        return event(self._chunk(choice, None))

    def done(self, done: Done) -> bytes:
        """The end of a stream; its last event carries ``peerd``."""
        choice: dict[str, Any] = {"delta": {}} if self.request.is_chat else {"text": ""}
        if self.request.return_token_ids:
            choice["token_ids"] = []
        last = self._chunk(choice, done.finish_reason)
        if not self.request.include_usage:
            return event({**last, "peerd": facts(done)}) + STREAM_END
        kind = "chat.completion.chunk" if self.request.is_chat else "text_completion"
        counted = {**self._head(kind), "choices": [], "usage": usage(done), "peerd": facts(done)}
        return event(last) + event(counted) + STREAM_END

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.request.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.identity}", "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choice: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.request.is_chat else "text_completion"
        filled = {"index": 0, **choice, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head(kind), "choices": [filled]}


def event(document: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(document).encode() + b"\n\n"


def comment(waiting: Waiting) -> bytes:
    """A notice as a comment, which OpenAI's clients skip: ``: REASON SENTENCE``."""
    line = f"{waiting.reason} {waiting.sentence}".replace("\n", " ").replace("\r", " ").rstrip()
    return b": " + line.encode() + b"\n\n"


def failure(error: PeerdError) -> bytes:
    """An error after the stream has begun: its last event."""
    return event(error_document(error)) + STREAM_END


def usage(done: Done) -> dict[str, int]:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }


def facts(done: Done) -> dict[str, Any]:
    """What only a swarm has to tell."""
    return {
        "route": [{"peer": peer, "span": span} for peer, span in done.route],
        "tokens_per_s": None if done.tokens_per_s is None else round(done.tokens_per_s, 3),
        "replays": done.replays,
    }


def status_document(status: Status, pid: int) -> dict[str, Any]:
    """``/api/v0/status``."""
    return {
        "peer_id": status.peer_id,
        "version": status.version,
        "pid": pid,
        "state": status.state,
        "addresses": list(status.addresses),
        "models": [
            {
                "id": model.model_id,
                "name": model.name,
                "span": str(model.span),
                "state": model.state,
                "progress": round(model.progress, 4),
            }
            for model in status.models
        ],
        "sessions": [
            {
                "id": session.session,
                "model": session.model,
                "route": [{"peer": hop.peer, "span": str(hop.span)} for hop in session.route],
                "tokens": session.tokens,
                "replays": session.replays,
            }
            for session in status.sessions
        ],
    }


def swarm_document(models: tuple[SwarmModel, ...]) -> dict[str, Any]:
    """``/api/v0/swarm``."""
    return {
        "models": [
            {
                "id": model.model_id,
                "name": model.name,
                "blocks": model.blocks,
                "compute_class": model.compute_class,
                "servers": [
                    {"peer": server.peer, "span": str(server.span), "state": server.state, "self": server.is_self}
                    for server in model.servers
                ],
                "unserved": unserved(model),
            }
            for model in models
        ]
    }


def unserved(model: SwarmModel) -> list[str]:
    """The spans of blocks that nobody has online."""
    online = [server.span for server in model.servers if server.state == "online"]
    gaps: list[list[int]] = []
    for block in range(model.blocks):
        if any(block in span for span in online):
            continue
        if gaps and gaps[-1][1] == block:
            gaps[-1][1] = block + 1
        else:
            gaps.append([block, block + 1])
    return [f"{start}:{end}" for start, end in gaps]


def models_document(models: tuple[SwarmModel, ...], created: int) -> dict[str, Any]:
    """``/v1/models``."""
    return {
        "object": "list",
        "data": [
            {
                "id": model.name,
                "object": "model",
                "created": created,
                "owned_by": "peerd",
                "peerd": {"model_id": model.model_id, "blocks": model.blocks, "unserved": unserved(model)},
            }
            for model in models
        ],
    }
