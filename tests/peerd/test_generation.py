"""A request's life, with a scripted session under it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from blocks.sampling_params import SamplingParams
from overlay.errors import PeerdError
from peerd import generation
from peerd.generation import (
    Delta,
    Done,
    Event,
    Generation,
    GenerationRequest,
    InvalidPrompt,
    NoChatTemplate,
    PromptTooLong,
    Quiet,
    Stopping,
    Waiting,
    encode_prompt,
    room_for,
)
from tests.peerd.scripted import Fail, Hang, Pending, ScriptedNode, Token, Unserved, Wait, demo_codec, says

TEXT = "One day a fox went out. The fox was happy."


def asked(prompt: Any = "Hello", **settings: Any) -> GenerationRequest:
    return GenerationRequest(prompt, SamplingParams(), **settings)


async def collect(node: ScriptedNode, request: GenerationRequest) -> list[Event]:
    model = node.model()
    async with Generation(model, request, encode_prompt(model, request, 0.0)) as running:
        return [event async for event in running]


def run(node: ScriptedNode, request: GenerationRequest) -> list[Event]:
    async def guarded() -> list[Event]:
        async with asyncio.timeout(10):
            return await collect(node, request)

    return asyncio.run(guarded())


def texts(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def ids(events: list[Event]) -> list[int]:
    return [token for event in events if isinstance(event, Delta) for token in event.token_ids]


def test_tokens_become_text_and_an_end() -> None:
    node = ScriptedNode(says(TEXT))
    events = run(node, asked())
    assert texts(events) == TEXT
    assert ids(events) == [step.token for step in says(TEXT) if isinstance(step, Token)]
    done = events[-1]
    assert isinstance(done, Done)
    assert done.finish_reason == "stop"
    assert done.completion_tokens == len(says(TEXT))
    assert [span for _, span in done.route] == ["0:6", "6:12"]
    assert not node.decodes[0].cancelled


def test_the_longest_answer_ends_with_length() -> None:
    events = run(ScriptedNode(says(TEXT)), asked(max_new_tokens=3))
    assert isinstance(events[-1], Done)
    assert events[-1].finish_reason == "length"
    assert len(ids(events)) == 3


def test_characters_are_never_given_in_halves() -> None:
    text = "a 🦊 b é c"
    events = run(ScriptedNode(says(text)), asked())
    assert texts(events) == text
    assert all("�" not in event.text for event in events if isinstance(event, Delta))


def test_a_stop_string_across_tokens_ends_text_tokens_and_session() -> None:
    node = ScriptedNode([*says(TEXT, end=False), Hang()])
    events = run(node, asked(stop=("went out",)))
    assert texts(events) == "One day a fox "
    assert isinstance(events[-1], Done)
    assert events[-1].finish_reason == "stop"
    assert events[-1].completion_tokens == len(ids(events)) < len(says(TEXT))
    assert "went out" in demo_codec().decode(ids(events))
    assert node.decodes[0].cancelled


def test_text_that_was_held_back_for_a_stop_string_comes_at_the_end() -> None:
    events = run(ScriptedNode(says(TEXT)), asked(stop=(".never",)))
    assert texts(events) == TEXT


def test_leaving_cancels_the_session_at_once() -> None:
    async def leave() -> None:
        node = ScriptedNode([*says("One day", end=False), Hang()])
        model = node.model()
        async with asyncio.timeout(10), Generation(model, asked(), (5,)) as running:
            await anext(running)
        assert node.decodes[0].cancelled

    asyncio.run(leave())


def test_cancelling_the_task_cancels_the_session() -> None:
    async def cancel() -> None:
        node = ScriptedNode([Hang()])
        model = node.model()

        async def consume() -> None:
            async with Generation(model, asked(), (5,)) as running:
                await anext(running)

        async with asyncio.TaskGroup() as group:
            task = group.create_task(consume())
            while not node.decodes:
                await asyncio.sleep(0)
            task.cancel()
        assert node.decodes[0].cancelled

    asyncio.run(cancel())


def test_notices_are_given_and_text_goes_before_a_stale_one() -> None:
    node = ScriptedNode([Wait("waiting", Pending("blocks 4:8 are loading")), *says("One day")])

    async def slow() -> list[Event]:
        async with asyncio.timeout(10), Generation(node.model(), asked(), (5,)) as running:
            first = await anext(running)
            while not node.decodes[0].over:
                await asyncio.sleep(0)
            return [first] + [event async for event in running]

    events = asyncio.run(slow())
    assert events[0] == Waiting("waiting", "blocks 4:8 are loading")
    assert texts(events) == "One day"
    assert len(events) == 3  # notice, all the text in one piece, the end


def test_a_failure_comes_after_the_text_before_it() -> None:
    node = ScriptedNode([*says("One day", end=False), Fail(Unserved("nobody serves blocks 4:8"))])
    got: list[Event] = []

    async def consume() -> None:
        async with asyncio.timeout(10), Generation(node.model(), asked(), (5,)) as running:
            async for event in running:
                got.append(event)

    with pytest.raises(Unserved):
        asyncio.run(consume())
    assert texts(got) == "One day"


def test_a_session_cancelled_under_it_says_that_the_daemon_stops() -> None:
    async def consume() -> None:
        node = ScriptedNode([Hang()])
        async with asyncio.timeout(10), Generation(node.model(), asked(), (5,)) as running:
            asyncio.get_running_loop().call_soon(node.decodes[0].cancel)
            await anext(running)

    with pytest.raises(Stopping):
        asyncio.run(consume())


def test_silence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "QUIET_S", 0.0)

    async def consume() -> Event:
        node = ScriptedNode([Hang()])
        async with asyncio.timeout(10), Generation(node.model(), asked(), (5,)) as running:
            return await anext(running)

    assert asyncio.run(consume()) == Quiet()


def test_prompts_of_every_form_are_encoded() -> None:
    model = ScriptedNode().model()
    assert encode_prompt(model, asked("Hello"), 0.0) == tuple(demo_codec().encode("Hello"))
    assert encode_prompt(model, asked((3, 4)), 0.0) == (3, 4)
    chat = encode_prompt(model, asked(({"role": "user", "content": "Hello"},)), 0.0)
    assert "Hello" in demo_codec().decode(chat)


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (asked(()), InvalidPrompt),
        (asked((10**9,)), InvalidPrompt),
        (asked((5,) * 64), PromptTooLong),
        (asked("fox " * 64), PromptTooLong),
        (asked((5,) * 60, max_new_tokens=5), PromptTooLong),
    ],
)
def test_prompts_that_can_t_be_driven_are_refused(request_: GenerationRequest, kind: type[PeerdError]) -> None:
    with pytest.raises(kind) as caught:
        run(ScriptedNode(context_tokens=64), request_)
    assert caught.value.http_status == 400


def test_an_answer_takes_what_fits_when_nothing_is_said() -> None:
    assert room_for(ScriptedNode(context_tokens=64).model(), asked(), 60) == 4
    assert room_for(ScriptedNode(context_tokens=9999).model(), asked(), 60) == generation.DEFAULT_NEW_TOKENS_MAX
    assert room_for(ScriptedNode(context_tokens=64).model(), asked(max_new_tokens=4), 60) == 4


def test_a_model_without_a_template_can_t_chat() -> None:
    from blocks.demo import MODEL_DIRECTORY
    from blocks.text import TextCodec

    plain = TextCodec({"tokenizer.json": (MODEL_DIRECTORY / "tokenizer.json").read_bytes()})
    with pytest.raises(NoChatTemplate, match="/v1/completions"):
        encode_prompt(ScriptedNode(codec=plain).model(), asked(({"role": "user", "content": "x"},)), 0.0)
