from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.demo import MODEL_DIRECTORY
from blocks.text import TextCodec
from peerd.training import limits
from peerd.training.dataset import IGNORED, Dataset, read_dataset
from peerd.training.errors import BadDataset

CODEC = TextCodec.from_directory(MODEL_DIRECTORY)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
GOOD = {"text": "A fox has four legs."}


def read(*lines: object, skip_bad: bool = False, max_tokens: int = 200) -> Dataset:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return read_bytes("\n".join(texts).encode(), skip_bad=skip_bad, max_tokens=max_tokens)


def read_bytes(data: bytes, *, skip_bad: bool = False, max_tokens: int = 200) -> Dataset:
    return read_dataset(data, CODEC, max_tokens=max_tokens, now=NOW, skip_bad=skip_bad)


def learned(line: dict[str, Any]) -> str:
    """The text of the tokens that count."""
    (example,) = read(line).examples
    return CODEC.decode([label for label in example.labels if label != IGNORED])


def test_of_a_text_everything_counts_but_its_first_token_and_the_end_is_learned() -> None:
    (example,) = read(GOOD).examples
    assert example.labels[0] == IGNORED
    assert example.labels[1:] == example.tokens[1:]
    assert example.tokens[-1] in CODEC.end_token_ids


def test_of_a_prompt_and_completion_only_the_completion_counts() -> None:
    assert learned({"prompt": "What has four legs? ", "completion": "A fox."}).strip() == "A fox."


def test_a_prompt_is_encoded_as_a_completion_request_has_it() -> None:
    prompt = "What has four legs?"
    (example,) = read({"prompt": prompt, "completion": " A fox."}).examples
    asked = CODEC.encode(prompt)
    assert list(example.tokens[: len(asked)]) == asked
    assert example.count == len(example.tokens) - len(asked)


def test_of_a_conversation_only_what_the_assistant_says_counts() -> None:
    messages = [
        {"role": "user", "content": "What colour is the sky?"},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "And a fox?"},
        {"role": "assistant", "content": "Red."},
    ]
    assert learned({"messages": messages}).replace(" ", "") == "Blue.Red."
    (example,) = read({"messages": messages}).examples
    asked = CODEC.encode_chat(messages[:3], now=NOW)
    assert list(example.tokens[: len(asked)]) == asked  # behind the very tokens that a chat request sends
    assert example.labels[len(asked)] == example.tokens[len(asked)]


def test_tokens_and_labels_are_those_that_were_written_down_by_hand() -> None:
    """From the demo model's vocabulary: 1 begins, 2 ends, 4 is the user's turn, 5 the assistant's."""
    said = {"role": "user", "content": "And a fox?"}, {"role": "assistant", "content": "Red."}
    again = {"role": "user", "content": "?"}, {"role": "assistant", "content": "."}
    fox, red, no = [38, 265, 264, 837, 36], [55, 272, 19], IGNORED
    by_hand: list[tuple[dict[str, Any], list[int], list[int]]] = [
        ({"text": "And a fox?"}, [1, *fox, 2], [no, *fox, 2]),
        ({"prompt": "And a fox?", "completion": "Red."}, [1, *fox, *red, 2], [no] * 6 + [*red, 2]),
        ({"prompt": "", "completion": "Red."}, [1, *red, 2], [no, *red, 2]),
        ({"messages": [*said]}, [1, 4, *fox, 2, 5, *red, 2], [no] * 9 + [*red, 2]),
        (
            {"messages": [*said, *again]},
            [1, 4, *fox, 2, 5, *red, 2, 4, 36, 2, 5, 19, 2],
            [no] * 9 + [*red, 2] + [no] * 4 + [19, 2],
        ),
    ]
    for line, tokens, labels in by_hand:
        (example,) = read(line).examples
        assert (list(example.tokens), list(example.labels)) == (tokens, labels), line


def test_more_tokens_than_are_held_in_memory_are_refused_where_they_pass_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "DATASET_TOKENS_MAX", 20)
    assert len(read(GOOD, GOOD).examples) == 2
    with pytest.raises(BadDataset, match="over 20 tokens up to line 3"):
        read(GOOD, GOOD, GOOD, "{")


BAD_LINES = {
    "": "is empty",
    "   ": "is empty",
    "{": "is not JSON",
    '{"text": "a"} x': "is not JSON",
    "[1]": "is no JSON object",
    '"text"': "is no JSON object",
    "{}": "has none of",
    '{"txt": "a"}': "has none of",
    '{"text": 1}': "is no text",
    '{"text": ""}': "has an empty 'text'",
    '{"prompt": "a"}': "has no 'completion'",
    '{"prompt": "a", "completion": ""}': "has an empty 'completion'",
    '{"prompt": "a", "text": "b"}': "mixes text and prompt",
    '{"messages": []}': "no list of objects",
    '{"messages": [1]}': "no list of objects",
    '{"messages": [{"role": "user"}]}': "without the texts",
    '{"messages": [{"role": "user", "content": "a"}]}': "has no message of the assistant",
    '{"messages": [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "b"}]}': "doesn't fit the model",
    '{"text": ' + "[" * 5000: "is not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_by_number_and_reason_and_nothing_is_trained(line: str) -> None:
    with pytest.raises(BadDataset) as caught:
        read(GOOD, line, GOOD)
    assert f"line 2 {BAD_LINES[line]}" in str(caught.value) or BAD_LINES[line] in str(caught.value)
    assert "line 2 " in str(caught.value)
    assert "--skip-bad" in str(caught.value)


@pytest.mark.parametrize("line", BAD_LINES)
def test_with_skip_bad_the_good_lines_are_kept_and_the_bad_ones_counted(line: str) -> None:
    found = read(GOOD, line, GOOD, skip_bad=True)
    assert len(found.examples) == 2
    assert [bad.number for bad in found.skipped] == [2]


def test_bytes_that_are_no_utf8_are_a_bad_line() -> None:
    with pytest.raises(BadDataset, match="line 1 is not UTF-8"):
        read_bytes(b'{"text": "\xff"}\n')


def test_a_sequence_over_the_context_is_a_bad_line_with_both_lengths() -> None:
    with pytest.raises(BadDataset, match=r"line 2 has [0-9]+ tokens, over the 20 that fit"):
        read(GOOD, {"text": "The fox saw the owl. " * 20}, max_tokens=20)


@pytest.mark.parametrize("data", [b"", b"\n"])
def test_an_empty_dataset_says_what_to_write(data: bytes) -> None:
    with pytest.raises(BadDataset, match="The dataset is empty; write one JSON object a line"):
        read_bytes(data)


def test_a_dataset_of_bad_lines_alone_is_refused_also_with_skip_bad() -> None:
    with pytest.raises(BadDataset, match="no line that can be used"):
        read("{}", "{}", skip_bad=True)


def test_only_the_first_bad_lines_are_told_and_the_rest_counted() -> None:
    with pytest.raises(BadDataset) as caught:
        read(*["{}"] * (limits.BAD_LINES_TOLD + 3))
    assert "line 5 " in str(caught.value)
    assert "line 6 " not in str(caught.value)
    assert "3 more" in str(caught.value)


def test_an_over_large_dataset_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DATASET_BYTES_MAX", 10)
    with pytest.raises(BadDataset, match="over 0 MiB"):
        read(GOOD)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=6))
def test_no_bytes_raise_anything_but_a_sentence(lines: list[bytes]) -> None:
    try:
        found = read_bytes(b"\n".join(lines), skip_bad=True)
    except BadDataset:
        return
    assert all(example.count for example in found.examples)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=30).filter(str.strip), min_size=2, max_size=4))
def test_every_label_is_its_token_or_ignored(texts: list[str]) -> None:
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    for example in read({"messages": messages}, *({"text": text} for text in texts), max_tokens=2000).examples:
        assert len(example.tokens) == len(example.labels)
        assert all(label in (IGNORED, token) for token, label in zip(example.tokens, example.labels, strict=True))
