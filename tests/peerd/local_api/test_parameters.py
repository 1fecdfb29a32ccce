"""Whatever JSON comes, it is understood or refused in words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlay.errors import PeerdError
from peerd.local_api.errors import InvalidRequest, UnsupportedParameter
from peerd.local_api.parameters import _IGNORED, _NEUTRAL, _OURS, CompletionRequest, parse_completion

NAMES = st.sampled_from([*_OURS, *_IGNORED, *_NEUTRAL, "prompt", "messages"]) | st.text(max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "include_usage"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def parsed(body: dict[str, Any], *, is_chat: bool = False) -> CompletionRequest:
    return parse_completion(body, is_chat=is_chat, drawn_seed=7)


@settings(deadline=None, derandomize=True)
@given(st.dictionaries(NAMES, VALUES, max_size=6), st.booleans())
def test_any_object_is_a_request_or_a_refusal(body: dict[str, Any], is_chat: bool) -> None:
    body.setdefault("messages" if is_chat else "prompt", [{"role": "user", "content": "x"}] if is_chat else "x")
    refusal: PeerdError | None = None
    try:
        parsed(body, is_chat=is_chat)
    except PeerdError as error:
        refusal = error
    if refusal is not None:
        assert refusal.http_status == 400
        assert str(refusal).endswith((".", "?"))


def test_nulls_and_neutral_values_ask_for_nothing() -> None:
    body: dict[str, Any] = {"prompt": "x", "user": "me"} | dict.fromkeys(_NEUTRAL) | {"stop": None, "seed": None}
    assert parsed(body).generation == parsed({"prompt": "x"}).generation
    assert parsed({"prompt": "x", "n": 1, "logprobs": False, "tools": [], "echo": False}).generation.stop == ()


def test_defaults_are_those_of_openai() -> None:
    params = parsed({"prompt": "x"}).generation.params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (1.0, 1.0, 0, 7)


def test_both_names_of_the_longest_answer_are_known() -> None:
    assert parsed({"prompt": "x", "max_tokens": 5}).generation.max_new_tokens == 5
    assert parsed({"prompt": "x", "max_completion_tokens": 6}).generation.max_new_tokens == 6
    assert parsed({"prompt": "x"}).generation.max_new_tokens is None


def test_one_prompt_in_a_list_is_a_prompt() -> None:
    assert parsed({"prompt": ["x"]}).generation.prompt == "x"
    assert parsed({"prompt": [[1, 2]]}).generation.prompt == (1, 2)


def test_the_field_that_is_meant_is_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parsed({"prompt": "x", "stream": 1})
    assert caught.value.param == "stream"
    with pytest.raises(UnsupportedParameter) as refused:
        parsed({"prompt": "x", "n": 3})
    assert refused.value.param == "n"
