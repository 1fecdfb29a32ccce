"""The daemon's API as calls: JSON in and out, streams as iterators, errors typed.

Knows the shapes of answers and errors, not the transport (`peerd.client.http`) and no environment: the path of the socket is given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peerd.client.errors import ApiError, BadAnswer, DaemonLost
from peerd.client.http import Response, request
from peerd.client.sse import COMMENT, EventParser
from peerd.client.tensor_body import BadTensorBody, Tensor, decode, encode

NO_CONTENT = 204
CALL_TIMEOUT_S = 30.0
SILENCE_TIMEOUT_S = 60.0
"""The daemon sends at least a comment every ten seconds of a stream."""
ANSWER_TIMEOUT_S = 3600.0
"""A completion that isn't streamed says nothing until it is complete."""
TENSORS_TYPE = "application/octet-stream"
TENSORS_BYTES_MAX = 512 << 20

Json = dict[str, Any]


class Client:
    """Talks to the daemon at one socket; each call is a connection of its own, so threads may share a client."""

    def __init__(self, socket_path: str | os.PathLike[str], timeout_s: float = CALL_TIMEOUT_S) -> None:
        self.socket_path = os.fspath(socket_path)
        self._timeout_s = timeout_s

    def status(self) -> Json:
        """The daemon itself: peer id, addresses, version, models, sessions."""
        return self.call("GET", "/api/v0/status")

    def swarm(self) -> Json:
        """Who serves which blocks of which model."""
        return self.call("GET", "/api/v0/swarm")

    def models(self) -> Json:
        """The models that can be asked for, as OpenAI lists them."""
        return self.call("GET", "/v1/models")

    def stop(self) -> Json:
        """Ask the daemon to stop; it ends a little later."""
        return self.call("POST", "/api/v0/stop", {})

    def metrics(self) -> str:
        """Prometheus text."""
        with self._checked("GET", "/api/v0/metrics", None, self._timeout_s) as response:
            return response.body().decode("utf-8", "replace")

    def complete(self, path: str, body: Mapping[str, Any]) -> Json:
        """A whole completion from ``/v1/completions`` or ``/v1/chat/completions``."""
        return self.call("POST", path, {**body, "stream": False}, ANSWER_TIMEOUT_S)

    def call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = None
    ) -> Json:
        """One request with a JSON object as its answer; an answer without content is an empty one.

        Raises:
            ApiError: the daemon refused it. Other ClientErrors: it could not be reached or understood.
        """
        with self._checked(method, path, body, timeout_s or self._timeout_s) as response:
            return {} if response.status == NO_CONTENT else _json_object(response.body())

    def tensors(
        self, path: str, tensors: Mapping[str, Tensor], settings: Mapping[str, str], bytes_max: int = TENSORS_BYTES_MAX
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and settings to the daemon, and its own back (docs/training.md, section 5).

        Raises:
            ApiError: the daemon refused it. Other ClientErrors: it could not be reached or understood.
        """
        pieces = encode(tensors, settings)
        response = request(self.socket_path, "POST", path, pieces, ANSWER_TIMEOUT_S, TENSORS_TYPE)
        with _success(response):
            try:
                return decode(response.body(bytes_max))
            except BadTensorBody as error:
                raise BadAnswer(f"The daemon's tensors can't be read: {error}.") from error

    def send(self, method: str, path: str, body: bytes, content_type: str, timeout_s: float | None = None) -> Json:
        """One request with a body of any type and a JSON object as its answer. Raises as `call`."""
        response = request(self.socket_path, method, path, body, timeout_s or self._timeout_s, content_type)
        with _success(response):
            return _json_object(response.body())

    def events(self, path: str) -> Iterator[Json]:
        """The data of server-sent events, as JSON objects, to the end of the answer."""
        parser = EventParser()
        with self._checked("GET", path, None, SILENCE_TIMEOUT_S) as response:
            for piece in response.pieces():
                yield from (_json_object(text) for kind, text in parser.feed(piece) if kind != COMMENT)

    def stream(
        self, path: str, body: Mapping[str, Any], on_comment: Callable[[str], None] | None = None
    ) -> Iterator[Json]:
        """The events of a streamed completion, without the closing ``[DONE]``.

        Closing the iterator closes the connection, which cancels the generation. ``on_comment`` hears what the daemon says while
        nothing flows (`waiting for blocks ...`); a keep-alive is an empty one.

        Raises:
            ApiError: the daemon refused the request, or failed in the middle of the stream.
        """
        parser = EventParser()
        with self._checked("POST", path, {**body, "stream": True}, SILENCE_TIMEOUT_S) as response:
            for piece in response.pieces():
                for kind, text in parser.feed(piece):
                    if kind == COMMENT:
                        if on_comment is not None:
                            on_comment(text)
                    elif text == "[DONE]":
                        return
                    else:
                        event = _json_object(text)
                        if "error" in event:
                            raise _api_error(event, response.status)
                        yield event
        raise DaemonLost("The daemon ended the stream before the answer was complete; see its log.")

    def _checked(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Response:
        """An answer whose status is a success; of another one the error is read and raised."""
        data = None if body is None else json.dumps(body).encode()
        return _success(request(self.socket_path, method, path, data, timeout_s))


def _success(response: Response) -> Response:
    if 200 <= response.status < 300:
        return response
    with response:
        raise _api_error(_json_object(response.body()), response.status)


def _json_object(text: str | bytes | bytearray) -> Json:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise BadAnswer("The daemon's answer is not JSON as expected; is the daemon of another version?")
    return value


def _api_error(document: Json, status: int) -> ApiError:
    error = document.get("error")
    if not isinstance(error, dict):
        return ApiError("internal", f"The daemon answered with HTTP status {status} and no reason.", status)
    param = error.get("param")
    return ApiError(str(error.get("code")), str(error.get("message")), status, None if param is None else str(param))
