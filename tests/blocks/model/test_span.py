"""Spans against the whole model, family by family: every cut, ragged windows, single steps, rollbacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from blocks.model.architecture import find_blocks
from blocks.model.errors import CacheFull, UnsupportedModel
from blocks.model.head import Head, load_head
from blocks.model.limits import SECTION_STEPS, SECTIONS_KEPT
from blocks.model.source import ModelSource, resolve
from blocks.model.span import Span, load_span
from tests.models import FAMILIES, make_tiny

WINDOWS = (7, 1, 1, 5, 1, 3, *[1] * 14)  # crosses the sliding window of 8 in single steps
TOKENS = sum(WINDOWS)
# Each takes another way through planning and tracing; tracing costs a second a family, and proves itself at every load.
TRACED = {"llama", "gemma2", "gemma3_text", "gpt2", "bloom", "falcon", "mixtral"}


def ids_of(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 259, (count,), generator=generator).tolist()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve(str(make_tiny(request.param, tmp_path_factory.mktemp(request.param))))


@pytest.fixture(scope="module")
def whole(source: ModelSource) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def head(source: ModelSource) -> Head:
    return load_head(source)


@pytest.fixture(scope="module")
def expected(whole: PreTrainedModel) -> list[torch.Tensor]:
    """Logits of the whole model for `WINDOWS`, its own cache beside."""
    ids, position, rows = ids_of(TOKENS), 0, []
    with torch.inference_mode():
        cache = DynamicCache(config=whole.config)
        for count in WINDOWS:
            window = torch.tensor([ids[position : position + count]])
            rows.append(whole(input_ids=window, past_key_values=cache, use_cache=True).logits[0])
            position += count
    return rows


def run(head: Head, spans: list[Span], take_back: bool = False) -> list[torch.Tensor]:
    """Logits for `WINDOWS` through spans; with ``take_back`` each window is first spoilt and then truncated away."""
    ids, position, rows = ids_of(TOKENS), 0, []
    caches = [span.new_cache(TOKENS + 3) for span in spans]
    for count in WINDOWS:
        if take_back:
            hidden = head.embed([9, 8, 7], position)
            for span, cache in zip(spans, caches, strict=True):
                hidden = span.forward(hidden, position, cache)
        hidden = head.embed(ids[position : position + count], position)
        for span, cache in zip(spans, caches, strict=True):
            hidden = span.forward(hidden, position, cache)
        rows.append(head.logits(hidden))
        position += count
    return rows


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_model_cut_anywhere_gives_the_very_bits_of_the_whole_one(
    source: ModelSource, head: Head, expected: list[torch.Tensor], cut: int
) -> None:
    spans = [load_span(source, 0, cut, prepare_steps=False), load_span(source, cut, 4, prepare_steps=False)]
    assert same(run(head, spans), expected)


def test_traced_steps_and_truncation_change_no_bit(
    source: ModelSource, head: Head, expected: list[torch.Tensor]
) -> None:
    traced = source.config["model_type"] in TRACED
    spans = [load_span(source, 0, 3, prepare_steps=traced), load_span(source, 3, 4, prepare_steps=traced)]
    if traced:
        assert same(run(head, spans), expected)
    assert same(run(head, spans, take_back=True), expected)


def test_a_span_reads_only_its_own_tensors(source: ModelSource) -> None:
    read: list[tuple[int, int]] = []
    span = load_span(source, 1, 2, progress=lambda done, total: read.append((done, total)), prepare_steps=False)
    one_of_four = sum((source.directory / file.name).stat().st_size for file in source.weights) / 4
    assert read[-1][0] == read[-1][1] <= one_of_four
    assert span.cache_bytes_per_token() > 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve(str(make_tiny("llama", tmp_path_factory.mktemp("one"))))


def test_steps_of_a_llama_really_are_traced_with_tables(llama: ModelSource) -> None:
    steps = load_span(llama, 0, 4)._steps
    assert steps is not None
    regime = steps._regimes[0]
    assert regime.program is not None
    assert regime.axes is not None


def test_a_program_that_differs_in_one_bit_is_not_used(llama: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    from blocks.model import step

    honest = step.trace

    def off_by_a_bit(*arguments: object, **options: object) -> object:
        program = honest(*arguments, **options)  # type: ignore[arg-type]
        return lambda *inputs: program(*inputs) * (1 + 2**-22)  # type: ignore[misc]

    monkeypatch.setattr(step, "trace", off_by_a_bit)
    steps = load_span(llama, 0, 4)._steps
    assert steps is not None
    assert steps._regimes[0].program is None


def test_a_block_that_branches_on_data_is_not_traced() -> None:
    from blocks.model.step import trace

    def chosen(values: torch.Tensor) -> torch.Tensor:
        return values[values > 0].sum() + values

    assert trace(chosen, [torch.randn(3)]) is None


def test_tables_hold_over_many_stretches_of_positions(llama: ModelSource, tmp_path: Path) -> None:
    source = resolve(str(make_tiny("llama", tmp_path, max_position_embeddings=600)))
    fast, slow = load_span(source, 0, 4), load_span(source, 0, 4, prepare_steps=False)
    ours, theirs = fast.new_cache(600), slow.new_cache(600)
    generator = torch.Generator().manual_seed(2)
    for position in range(300):
        hidden = torch.randn((1, 1, 32), generator=generator)
        assert torch.equal(fast.forward(hidden, position, ours), slow.forward(hidden, position, theirs)), position


def test_a_section_is_traced_once_it_is_used_and_changes_no_bit(llama: ModelSource) -> None:
    whole, plain = load_span(llama, 0, 4), load_span(llama, 0, 4, prepare_steps=False)
    fast, slow = whole.section(1, 3), plain.section(1, 3)
    ours, theirs = fast.new_cache(80), slow.new_cache(80)
    generator = torch.Generator().manual_seed(4)
    for position in range(80):
        hidden = torch.randn((1, 1, 32), generator=generator)
        assert (fast._steps is not None) == (position >= SECTION_STEPS)
        assert torch.equal(fast.forward(hidden, position, ours), slow.forward(hidden, position, theirs)), position
    assert fast._steps is not None
    assert fast._steps.is_traced
    assert slow._steps is None  # nor is a section where the span isn't
    assert whole.section(1, 3) is fast


def test_only_so_many_sections_are_kept_and_the_least_used_goes(llama: ModelSource) -> None:
    span = load_span(llama, 0, 4, prepare_steps=False)
    cuts = [(start, end) for start in range(4) for end in range(start + 1, 5)][: SECTIONS_KEPT + 1]
    assert len(cuts) == SECTIONS_KEPT + 1
    first = span.section(*cuts[0])
    for cut in cuts[1:-1]:
        span.section(*cut)
    assert span.section(*cuts[0]) is first
    span.section(*cuts[-1])
    assert list(span._sections) == [*cuts[2:-1], cuts[0], cuts[-1]]


def test_a_session_that_outgrows_its_agreement_is_told_so_and_keeps_its_past(llama: ModelSource) -> None:
    span = load_span(llama, 0, 2, prepare_steps=False)
    cache = span.new_cache(4)
    span.forward(torch.randn(1, 3, 32), 0, cache)
    with pytest.raises(CacheFull, match="opened for 4 tokens"):
        span.forward(torch.randn(1, 2, 32), 3, cache)
    assert cache.length == 3
    with pytest.raises(ValueError, match="truncate"):
        span.forward(torch.randn(1, 1, 32), 5, cache)


def test_caches_grow_without_losing_the_past(llama: ModelSource) -> None:
    span = load_span(llama, 0, 2, prepare_steps=False)
    cache = span.new_cache(128)
    hidden = torch.randn((1, 100, 32), generator=torch.Generator().manual_seed(3))
    parts = [span.forward(hidden[:, :60], 0, cache)]
    before = cache.capacity_tokens
    parts.append(span.forward(hidden[:, 60:], 60, cache))
    assert before < cache.capacity_tokens <= 128
    assert cache.size_bytes == cache.capacity_tokens * span.cache_bytes_per_token()
    other = span.new_cache(128)
    other.begin(100)  # all room at once: nothing is ever moved
    again = [span.forward(hidden[:, :60], 0, other), span.forward(hidden[:, 60:], 60, other)]
    assert same(parts, again)


@pytest.mark.parametrize(("start", "end"), [(0, 5), (2, 2), (3, 1), (-1, 2)])
def test_a_span_outside_the_model_is_refused(llama: ModelSource, start: int, end: int) -> None:
    with pytest.raises(UnsupportedModel, match="has blocks 0:4"):
        load_span(llama, start, end)


def test_a_dtype_that_nobody_knows_is_refused(llama: ModelSource) -> None:
    with pytest.raises(UnsupportedModel, match="float8"):
        load_span(llama, 0, 1, dtype="float8")


def test_embedding_refuses_ids_outside_the_vocabulary(llama: ModelSource) -> None:
    with pytest.raises(ValueError, match="between 0 and 258"):
        load_head(llama).embed([5, 259], 0)


def test_deep_prompts_are_those_of_hooks_in_the_whole_model_in_windows_across_their_end(
    source: ModelSource, whole: PreTrainedModel, head: Head
) -> None:
    length, ids = 10, ids_of(TOKENS)  # ends inside the window 9:14
    prompts = torch.randn((4, length, head.width), generator=torch.Generator().manual_seed(2))
    traced = source.config["model_type"] == "llama"
    spans = [load_span(source, 0, 3, prepare_steps=traced), load_span(source, 3, 4, prepare_steps=False)]
    caches = [span.new_cache(TOKENS) for span in spans]
    position = 0

    def add(rows: torch.Tensor) -> Callable[..., Any]:
        def hook(_: object, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            hidden = (arguments[0] if arguments else options["hidden_states"]).clone()
            rest = rows[position : position + hidden.shape[1]]
            hidden[:, : len(rest)] += rest
            return ((hidden, *arguments[1:]), options) if arguments else ((), options | {"hidden_states": hidden})

        return hook

    blocks = find_blocks(whole, 4).blocks
    hooks = [
        block.register_forward_pre_hook(add(rows), with_kwargs=True)
        for block, rows in zip(blocks, prompts, strict=True)
    ]
    cache = DynamicCache(config=whole.config)
    try:
        for count in WINDOWS:
            window = ids[position : position + count]
            hidden = head.embed(window, position)
            for span, kv, rows in zip(spans, caches, (prompts[:3], prompts[3:]), strict=True):
                hidden = span.forward(hidden, position, kv, rows)
            with torch.inference_mode():
                expected = whole(input_ids=torch.tensor([window]), past_key_values=cache, use_cache=True).logits[0]
            assert torch.equal(head.logits(hidden), expected)
            position += count
    finally:
        for hook in hooks:
            hook.remove()
