"""JSONL to examples: token ids, and which of them are to be learned.

Pure: bytes in, examples out, or one sentence with line numbers. A line is ``{"text"}``, ``{"prompt", "completion"}`` or
``{"messages"}``; the loss is on the whole text, the completion, or what the assistant says. What a model reads at generation is what
it was trained behind: a prompt is encoded as ``/v1/completions`` does, a conversation as ``/v1/chat/completions`` does. Must not know
what is done with examples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from overlay.errors import PeerdError
from peerd.training import limits
from peerd.training.errors import BadDataset

IGNORED = -100
"""The label of a position that doesn't count."""
_FORMS = '{"text"}, {"prompt", "completion"} or {"messages"}'


class Codec(Protocol):
    """What is needed of `blocks.text.TextCodec`."""

    @property
    def end_token_ids(self) -> tuple[int, ...]: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, now: datetime, add_generation_prompt: bool = True
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence; ``labels`` are the tokens themselves where they count, else `IGNORED`. The first token never counts."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many positions count."""
        return sum(label >= 0 for label in self.labels)


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that can't be trained on, by its number from 1."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a file holds; ``skipped`` has the first `SKIPPED_REMEMBERED` bad lines of ``skipped_count``."""

    examples: tuple[Example, ...]
    skipped: tuple[BadLine, ...] = ()
    skipped_count: int = 0


class _Unusable(Exception):
    """Why one line can't be used; never leaves this module."""


def read_dataset(data: bytes, codec: Codec, *, max_tokens: int, now: datetime, skip_bad: bool) -> Dataset:
    """Every line as an example.

    Args:
        max_tokens: the longest example that is taken.
        now: what a chat template may print.
        skip_bad: go on without bad lines, rather than refuse the whole file.

    Raises:
        BadDataset: it names the first bad lines, or there is nothing to train on.
    """
    if len(data) > limits.DATASET_BYTES_MAX:
        raise BadDataset(f"The dataset is over {limits.DATASET_BYTES_MAX >> 20} MiB; train on a part of it.")
    lines = data.split(b"\n") if data.strip() else []
    if lines and not lines[-1].strip():
        lines.pop()  # the end of the last line, not a line
    if len(lines) > limits.EXAMPLES_MAX:
        raise BadDataset(f"The dataset has {len(lines)} lines, over {limits.EXAMPLES_MAX}; train on a part of it.")
    examples: list[Example] = []
    bad: list[BadLine] = []
    tokens = 0
    for number, line in enumerate(lines, 1):
        try:
            examples.append(_example(line, codec, max_tokens, now))
            tokens += len(examples[-1].tokens)
        except _Unusable as reason:
            bad.append(BadLine(number, str(reason)))
        if tokens > limits.DATASET_TOKENS_MAX:
            raise BadDataset(
                f"The dataset has over {limits.DATASET_TOKENS_MAX} tokens up to line {number}; train on a part of it."
            )
    if bad and not skip_bad:
        raise BadDataset(told(bad))
    if not examples:
        what = "no line that can be used" if lines else "empty"
        raise BadDataset(f"The dataset {'has' if lines else 'is'} {what}; write one JSON object a line: {_FORMS}.")
    return Dataset(tuple(examples), tuple(bad[: limits.SKIPPED_REMEMBERED]), len(bad))


def told(bad: Sequence[BadLine]) -> str:
    """The sentence for bad lines."""
    first = "; ".join(f"line {line.number} {line.reason}" for line in bad[: limits.BAD_LINES_TOLD])
    more = f"; {len(bad) - limits.BAD_LINES_TOLD} more" if len(bad) > limits.BAD_LINES_TOLD else ""
    return f"The dataset has bad lines: {first}{more}. Nothing was trained; correct them, or leave them out with --skip-bad."


def _example(line: bytes, codec: Codec, max_tokens: int, now: datetime) -> Example:
    fields = _fields(line)
    try:
        if "messages" in fields:
            tokens, counted = _conversation(fields["messages"], codec, now)
        elif "prompt" in fields:
            tokens, counted = _completion(_text(fields, "prompt"), _text(fields, "completion"), codec)
        else:
            tokens, counted = _plain(_text(fields, "text"), codec)
    except PeerdError as error:  # the chat template's own refusal
        raise _Unusable(f"doesn't fit the model: {error}") from error
    if len(tokens) > max_tokens:
        raise _Unusable(f"has {len(tokens)} tokens, over the {max_tokens} that fit")
    labels = tuple(
        token if counts and place else IGNORED
        for place, (token, counts) in enumerate(zip(tokens, counted, strict=True))
    )
    example = Example(tuple(tokens), labels)
    if not example.count:
        raise _Unusable("has nothing to learn")
    return example


def _fields(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise _Unusable("is empty")
    if len(line) > limits.LINE_BYTES_MAX:
        raise _Unusable(f"is over {limits.LINE_BYTES_MAX >> 20} MiB")
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _Unusable(f"is not UTF-8 (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise _Unusable(f"is not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise _Unusable("is not JSON that can be read") from error
    if not isinstance(fields, dict):
        raise _Unusable(f"is no JSON object; write {_FORMS}")
    forms = [form for form in ("text", "prompt", "messages") if form in fields]
    if len(forms) != 1:
        which = f"mixes {' and '.join(forms)}" if forms else f"has none of {_FORMS}"
        raise _Unusable(which)
    return fields


def _text(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        raise _Unusable(f"has no {name!r}")
    value = fields[name]
    if not isinstance(value, str):
        raise _Unusable(f"has a {name!r} that is no text")
    if not value and name != "prompt":
        raise _Unusable(f"has an empty {name!r}")
    return value


def _ended(tokens: list[int], codec: Codec) -> list[int]:
    """With the token that ends an answer, so that stopping is learned too."""
    ends = codec.end_token_ids
    return tokens if not ends or (tokens and tokens[-1] in ends) else [*tokens, ends[0]]


def _plain(text: str, codec: Codec) -> tuple[list[int], list[bool]]:
    tokens = _ended(codec.encode(text), codec)
    return tokens, [True] * len(tokens)


def _completion(prompt: str, completion: str, codec: Codec) -> tuple[list[int], list[bool]]:
    tokens = codec.encode(prompt + completion)
    prefix = _shared(codec.encode(prompt), tokens)
    tokens = _ended(tokens, codec)
    return tokens, [False] * prefix + [True] * (len(tokens) - prefix)


def _conversation(messages: object, codec: Codec, now: datetime) -> tuple[list[int], list[bool]]:
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise _Unusable("has 'messages' that are no list of objects")
    if len(messages) > limits.MESSAGES_MAX:
        raise _Unusable(f"has over {limits.MESSAGES_MAX} messages")
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise _Unusable("has a message without the texts 'role' and 'content'")
    tokens = codec.encode(codec.render_chat(messages, now=now, add_generation_prompt=False), add_special_tokens=False)
    counted = [False] * len(tokens)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = codec.encode(codec.render_chat(messages[:index], now=now), add_special_tokens=False) if index else []
        said = codec.render_chat(messages[: index + 1], now=now, add_generation_prompt=False)
        start = _shared(asked, tokens)
        end = _shared(codec.encode(said, add_special_tokens=False), tokens)
        counted[start:end] = [True] * (end - start)
    if not any(counted):
        raise _Unusable("has no message of the assistant")
    return tokens, counted


def _shared(prefix: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens at the start are the same: a tokenizer may join the last of a prompt with what follows."""
    for place, (one, other) in enumerate(zip(prefix, tokens, strict=False)):
        if one != other:
            return place
    return min(len(prefix), len(tokens))
