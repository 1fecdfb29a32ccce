"""From the JSON of a completion request to values: every field checked, every refusal a sentence that names the field.

Pure. A field that this daemon doesn't know is refused with a suggestion, since a misspelt ``temprature`` that is silently ignored
gives wrong answers; fields of the OpenAI API that change nothing here are let through.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blocks.sampling_params import SamplingParams
from blocks.text_stream import check_stop
from peerd.generation import GenerationRequest
from peerd.local_api.errors import InvalidRequest, UnsupportedParameter
from peerd.local_api.limits import (
    DEFAULT_WAIT_S,
    MESSAGES_MAX,
    MODEL_NAME_CHARS_MAX,
    NAME_CHARS_MAX,
    NEW_TOKENS_MAX,
    PROMPT_TOKENS_MAX,
    WAIT_S_MAX,
)

DEFAULT_TEMPERATURE = 1.0  # as in the OpenAI API
SEED_BITS = 53
"""Of a seed that we draw: a JSON number that every language reads exactly."""

_OURS = (
    "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "stop", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "adapter", "ignore_eos", "return_token_ids", "stream", "stream_options", "timeout",
)  # fmt: skip
_IGNORED = ("user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier", "parallel_tool_calls")

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (),
    "logit_bias": ({},),
    "min_p": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
}
"""What this daemon doesn't do, and the values (besides null) that ask for nothing."""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A completion request, understood."""

    model: str | None
    generation: GenerationRequest
    is_chat: bool
    stream: bool
    include_usage: bool
    return_token_ids: bool


def parse_completion(body: Mapping[str, Any], *, is_chat: bool, drawn_seed: int) -> CompletionRequest:
    """Read the body of ``/v1/chat/completions`` or ``/v1/completions``.

    Args:
        body: the JSON object.
        is_chat: which of the two.
        drawn_seed: taken when the request has none.

    Raises:
        InvalidRequest, InvalidSampling, InvalidStop.
    """
    prompt_field = "messages" if is_chat else "prompt"
    _check_names(body, prompt_field)
    options = _field(body, "stream_options", dict, {})
    generation = GenerationRequest(
        prompt=_messages(body.get("messages")) if is_chat else _prompt(body.get("prompt")),
        params=_sampling(body, drawn_seed),
        max_new_tokens=_max_tokens(body),
        stop=_stop(body.get("stop")),
        ignore_eos=_field(body, "ignore_eos", bool, False),
        wait_s=_number(body, "timeout", DEFAULT_WAIT_S, 0.0, WAIT_S_MAX),
        adapter=_field(body, "adapter", str, "") or None,
    )
    model = _field(body, "model", str, "")
    if len(model) > MODEL_NAME_CHARS_MAX:
        raise InvalidRequest(f"model may have at most {MODEL_NAME_CHARS_MAX} characters.", "model")
    return CompletionRequest(
        model=model or None,
        generation=generation,
        is_chat=is_chat,
        stream=_field(body, "stream", bool, False),
        include_usage=_field(options, "include_usage", bool, False),
        return_token_ids=_field(body, "return_token_ids", bool, False),
    )


def _check_names(body: Mapping[str, Any], prompt_field: str) -> None:
    known = (*_OURS, prompt_field)
    for name, value in body.items():
        if name in known or name in _IGNORED:
            continue
        if name in _NEUTRAL:
            if value is not None and not any(type(value) is type(fine) and value == fine for fine in _NEUTRAL[name]):
                raise UnsupportedParameter(f"{name} is not supported by this daemon; leave it out.", name)
            continue
        close = difflib.get_close_matches(name[:NAME_CHARS_MAX], known, 1)
        advice = f"did you mean {close[0]}?" if close else "leave it out."
        raise InvalidRequest(f"There is no parameter {name[:NAME_CHARS_MAX]!r}; {advice}", name[:NAME_CHARS_MAX])


def _field(body: Mapping[str, Any], name: str, kind: type[Any], default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        words = {bool: "true or false", str: "a string", dict: "an object"}[kind]
        raise InvalidRequest(f"{name} must be {words}.", name)
    return value


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be a number from {low:g} to {high:g}.", name)
    return float(value)


def _sampling(body: Mapping[str, Any], drawn_seed: int) -> SamplingParams:
    given = {
        name: body[name]
        for name in ("top_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty")
        if body.get(name) is not None
    }
    temperature = body.get("temperature")
    seed = body.get("seed")
    # vLLM's -1 means all tokens, which is 0 here.
    if given.get("top_k") == -1:
        given["top_k"] = 0
    return SamplingParams(
        temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
        seed=drawn_seed if seed is None else seed,
        **given,
    )


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    given = [name for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    for name in given:
        value = body[name]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= NEW_TOKENS_MAX:
            raise InvalidRequest(f"{name} must be a whole number from 1 to {NEW_TOKENS_MAX}.", name)
    return body[given[-1]] if given else None


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return check_stop((value,))
    if not isinstance(value, list):
        raise InvalidRequest("stop must be a string or a list of strings.", "stop")
    return check_stop(value)


def _prompt(value: object) -> str | tuple[int, ...]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequest("prompt must be a string or a list of token ids.", "prompt")
    if any(isinstance(entry, str | list) for entry in value):
        raise UnsupportedParameter("Only one prompt can be sent at a time; send a request for each.", "prompt")
    if len(value) > PROMPT_TOKENS_MAX:
        raise InvalidRequest(f"prompt may have at most {PROMPT_TOKENS_MAX} token ids.", "prompt")
    if any(type(entry) is not int for entry in value):
        raise InvalidRequest("prompt must be a string or a list of token ids, which are whole numbers.", "prompt")
    return tuple(value)


def _messages(value: object) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, list) or not value:
        raise InvalidRequest('messages must be a list like [{"role": "user", "content": "Hello"}].', "messages")
    if len(value) > MESSAGES_MAX:
        raise InvalidRequest(f"messages may have at most {MESSAGES_MAX} entries.", "messages")
    return tuple(_message(entry, index) for index, entry in enumerate(value))


def _message(entry: object, index: int) -> Mapping[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(entry, dict) or not isinstance(entry.get("role"), str):
        raise InvalidRequest(f"{where} must be an object with a role and a content.", where)
    content = entry.get("content")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        if len(texts) != len(content):
            raise UnsupportedParameter(f"{where}.content may only have parts of type text.", where)
        content = "".join(texts)
    if not isinstance(content, str):
        raise InvalidRequest(f"{where}.content must be a string.", where)
    return {**entry, "content": content}
