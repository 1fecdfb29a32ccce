"""Sessions with soft and deep prompts through real nodes: the tokens of the whole local model with the same prompts, come what may."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from blocks.model.architecture import find_blocks
from blocks.protocol import limits
from blocks.sampling_params import SamplingParams
from overlay.rpc.types import Part
from peerd.decoding import Decode, DecodeRequest
from tests.models import make_tiny
from tests.ring import Listener, Plans, Ring, route, until

PROMPT = tuple(range(40, 47))
NEW, LENGTH, WIDTH, BLOCKS = 8, 6, 32, 4


def floats(*shape: int, seed: int) -> Part:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
    return Part("x", "float32", shape, values.tobytes())


PREFIX, PROMPTS = floats(LENGTH, WIDTH, seed=1), floats(BLOCKS, LENGTH, WIDTH, seed=2)
KINDS: dict[str, tuple[Part | None, Part | None]] = {
    "prompt": (PREFIX, None),
    "deep-prompt": (PREFIX, PROMPTS),
    "deep-prompt alone": (None, PROMPTS),
    "deep-prompt longer than the text": (None, floats(BLOCKS, len(PROMPT) + 3, WIDTH, seed=3)),
}


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


def tensor(part: Part) -> torch.Tensor:
    return torch.frombuffer(bytearray(part.data), dtype=torch.float32).view(part.shape)


def expected(directory: Path, kind: str) -> list[int]:
    """Greedy tokens of `transformers`, every time from the whole text, with the prefix as embeddings and hooks for deep prompts."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory).eval()
    prefix, prompts = KINDS[kind]
    if prompts is not None:
        for block, rows in zip(find_blocks(model, BLOCKS).blocks, tensor(prompts), strict=True):
            block.register_forward_pre_hook(_adding(rows), with_kwargs=True)
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(NEW):
            embedded = model.get_input_embeddings()(torch.tensor([ids]))
            if prefix is not None:
                embedded = torch.cat([tensor(prefix)[None], embedded], dim=1)
            ids.append(int(model(inputs_embeds=embedded, use_cache=False).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def _adding(rows: torch.Tensor) -> Callable[..., Any]:
    def hook(_: object, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        hidden = (arguments[0] if arguments else options["hidden_states"]).clone()
        count = min(len(rows), hidden.shape[1])
        hidden[:, :count] += rows[:count]
        return ((hidden, *arguments[1:]), options) if arguments else ((), options | {"hidden_states": hidden})

    return hook


class Scene:
    """Two servers, a replica of the second, and a driver that serves nothing."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring

    async def build(self) -> None:
        self.first = await self.ring.node(0, 2)
        self.second = await self.ring.node(2, 4)
        self.replica = await self.ring.node(2, 4)
        self.driver = await self.ring.node(drives=True)
        self.plans = Plans([route(self.first.hop(), node.hop()) for node in (self.second, self.replica)])
        self.pool = await self.ring.pool(self.driver, self.plans)

    async def run(self, kind: str, listener: Listener, **changes: Any) -> Decode:
        prefix, prompts = KINDS[kind]
        fields = {"params": SamplingParams(), "max_new_tokens": NEW, "wait_s": 10.0} | changes
        decode = self.pool.start(
            self.ring.model(), DecodeRequest(PROMPT, **fields, prefix=prefix, prompts=prompts), listener
        )
        await listener.ended()
        return decode


def play(directory: Path, scene: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), Ring(directory) as ring:
            stage = Scene(ring)
            await stage.build()
            await scene(stage)

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_whole_model_with_the_same_prompts(directory: Path, kind: str) -> None:
    async def scene(stage: Scene) -> None:
        listener = Listener()
        decode = await stage.run(kind, listener)
        assert (listener.tokens, listener.ends) == (expected(directory, kind), [("length", None)])
        assert decode.output == listener.tokens
        await until(lambda: all(node.hops.session_count == 0 for node in stage.ring.nodes))

    play(directory, scene)


@pytest.mark.parametrize("kind", ["prompt", "deep-prompt"])
def test_a_server_that_vanishes_at_any_token_changes_nothing(llama: Path, kind: str) -> None:
    tokens = expected(llama, kind)

    async def lost_at(token: int, stage: Scene) -> None:
        listener = Listener(lambda count: stage.second.vanish() if count == token else None)
        decode = await stage.run(kind, listener)
        assert (listener.tokens, decode.replays) == (tokens, 1)

    for token in range(1, NEW):
        play(llama, lambda stage, token=token: lost_at(token, stage))  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["deep-prompt", "deep-prompt alone"])
def test_every_family_s_tokens_survive_a_loss_with_deep_prompts(directory: Path, kind: str) -> None:
    async def scene(stage: Scene) -> None:
        listener = Listener(lambda count: stage.second.vanish() if count == 3 else None)
        decode = await stage.run(kind, listener)
        assert (listener.tokens, decode.replays) == (expected(directory, kind), 1)

    play(directory, scene)


def test_every_kind_gives_another_text(llama: Path) -> None:
    texts = {kind: tuple(expected(llama, kind)) for kind in KINDS}
    assert len(set(texts.values())) == len(texts)


def test_a_prefix_goes_in_windows_that_the_credits_allow(llama: Path) -> None:
    async def scene(stage: Scene) -> None:
        stage.second.door.window_bytes = 4 * WIDTH * 4  # four positions under way at once: less than the prefix
        stage.second.door.windows = 2
        listener = Listener()
        await stage.run("deep-prompt", listener)
        assert listener.tokens == expected(llama, "deep-prompt")

    play(llama, scene)


def test_sampled_text_is_the_same_after_a_loss_and_penalties_don_t_see_the_prefix(llama: Path) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=5, repetition_penalty=1.1, presence_penalty=0.5)

    async def scene(stage: Scene) -> None:
        whole, broken = Listener(), Listener(lambda count: stage.second.vanish() if count == 4 else None)
        await stage.run("deep-prompt", whole, params=params)
        decode = await stage.run("deep-prompt", broken, params=params)
        assert (broken.tokens, decode.replays) == (whole.tokens, 1)

    play(llama, scene)


def test_a_driver_that_is_its_own_hop_gives_it_its_own_rows(llama: Path) -> None:
    async def scene(stage: Scene) -> None:
        own = await stage.ring.node(0, 4, drives=True)
        pool = await stage.ring.pool(own, Plans([route(own.hop(0, 1), stage.first.hop(1, 2), own.hop(2, 4))]))
        listener = Listener()
        request = DecodeRequest(PROMPT, SamplingParams(), NEW, prefix=PREFIX, prompts=PROMPTS)
        pool.start(stage.ring.model(), request, listener)
        assert await listener.ended() == "length"
        assert listener.tokens == expected(llama, "deep-prompt")

    play(llama, scene)


def test_a_server_without_room_for_the_prompts_is_left_for_another_without_blame(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(stage: Scene) -> None:
        refused = []
        room_of_second = stage.second.hops.has_room_for_prompts

        def no_room(driver: bytes, size_bytes: int) -> bool:
            refused.append(size_bytes)
            return room_of_second(driver, limits.PROMPTS_BYTES_MAX + size_bytes)

        monkeypatch.setattr(stage.second.hops, "has_room_for_prompts", no_room)
        listener = Listener()
        decode = await stage.run("deep-prompt", listener)
        assert listener.tokens == expected(llama, "deep-prompt")
        assert refused == [2 * LENGTH * WIDTH * 4]  # by the header alone: the machine was never asked
        assert (decode.replays, stage.plans.blamed) == (1, [])

    play(llama, scene)
