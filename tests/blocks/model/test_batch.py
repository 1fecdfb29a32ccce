"""Whole padded batches through spans, against the whole local model and its own autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from blocks.model import batch
from blocks.model.architecture import find_blocks
from blocks.model.batch import Gradients, Sequences
from blocks.model.errors import UnsupportedModel
from blocks.model.exact import Reference
from blocks.model.source import ModelSource, resolve
from blocks.model.span import Span, load_span
from tests.models import make_tiny

BLOCKS, WIDTH, ROWS, TOKENS, LENGTH = 4, 32, 3, 12, 3
FAMILIES = ("llama", "gpt2", "gemma2", "bloom", "opt", "mixtral")
LEFT = ((0,) * 5 + (1,) * 7, (1,) * 12, (0,) * 2 + (1,) * 10)
RIGHT = tuple(row[::-1] for row in LEFT)
PADDED = {"left": LEFT, "right": RIGHT, "not": None}


@dataclass(frozen=True)
class Local:
    """A whole `transformers` model, cut open where its first block begins and its last one ends."""

    source: ModelSource
    model: nn.Module
    blocks: Sequence[nn.Module]

    def run(self, given: Sequences) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The output of the blocks for ``given``, and the leaves that it depends on."""
        hidden = given.hidden.clone().requires_grad_()
        prompts = None if given.prompts is None else given.prompts.clone().requires_grad_()
        seen: list[torch.Tensor] = []

        def enter(index: int, value: torch.Tensor) -> torch.Tensor:
            value = hidden if index == 0 else value
            if prompts is None:
                return value
            return torch.cat([value[:, :LENGTH] + prompts[index], value[:, LENGTH:]], dim=1)

        def before(index: int) -> object:
            def hook(_: nn.Module, arguments: tuple[object, ...], options: dict[str, object]) -> object:
                if arguments:
                    assert isinstance(arguments[0], torch.Tensor)
                    return (enter(index, arguments[0]), *arguments[1:]), options
                assert isinstance(options["hidden_states"], torch.Tensor)
                return arguments, options | {"hidden_states": enter(index, options["hidden_states"])}

            return hook

        handles = [
            block.register_forward_pre_hook(before(index), with_kwargs=True)  # type: ignore[arg-type]
            for index, block in enumerate(self.blocks)
        ]
        handles.append(
            self.blocks[-1].register_forward_hook(
                lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
            )
        )
        options = {} if given.mask is None else {"attention_mask": given.mask.long()}
        if given.positions is not None:
            options = {"attention_mask": torch.ones(ROWS, TOKENS).long()} | options
            options["position_ids"] = given.positions.long()
        try:
            self.model(input_ids=torch.ones(given.hidden.shape[:2]).long(), use_cache=False, **options)
        finally:
            for handle in handles:
                handle.remove()
        return seen[0], hidden, prompts


@pytest.fixture(scope="module", params=FAMILIES)
def local(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Local:
    source = resolve(str(make_tiny(request.param, tmp_path_factory.mktemp(request.param))))
    model = Reference.load(source).model
    return Local(source, model, list(find_blocks(model, BLOCKS).blocks))


@pytest.fixture(scope="module")
def span(local: Local) -> Span:
    return load_span(local.source, 0, BLOCKS, prepare_steps=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve(str(make_tiny("llama", tmp_path_factory.mktemp("plain"), hidden_size=64, intermediate_size=128)))


def made(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sequences(mask: Sequence[Sequence[int]] | None = None, *, prompts: bool = False, width: int = WIDTH) -> Sequences:
    return Sequences(
        made(ROWS, TOKENS, width),
        None if mask is None else torch.tensor(mask, dtype=torch.uint8),
        prompts=made(BLOCKS, LENGTH, width, seed=2) if prompts else None,
    )


def output_gradient(given: Sequences) -> torch.Tensor:
    """Of a loss that doesn't look at padding."""
    grad = made(*given.hidden.shape, seed=3)
    return grad if given.mask is None else grad * given.mask[..., None]


def error(ours: torch.Tensor | None, theirs: torch.Tensor) -> float:
    """The largest difference, in units of the largest value, which must not be zero."""
    assert ours is not None
    theirs = theirs.detach()
    largest = float(theirs.abs().max())
    assert largest > 0
    return float((ours - theirs).abs().max()) / largest


def same(ours: Gradients, theirs: Gradients) -> bool:
    assert ours.prompts is not None
    assert theirs.prompts is not None
    return torch.equal(ours.hidden, theirs.hidden) and torch.equal(ours.prompts, theirs.prompts)


@pytest.mark.parametrize("padded", PADDED)
def test_hidden_states_are_the_whole_models(local: Local, span: Span, padded: str) -> None:
    given = sequences(PADDED[padded])
    expected, _, _ = local.run(given)
    counts = torch.ones(ROWS, TOKENS).bool() if given.mask is None else given.mask.bool()
    assert error(batch.forward(span, given)[counts], expected[counts]) < 1e-5


@pytest.mark.parametrize("padded", PADDED)
def test_gradients_are_the_whole_models(local: Local, span: Span, padded: str) -> None:
    given = sequences(PADDED[padded], prompts=True)
    output, hidden, prompts = local.run(given)
    assert prompts is not None
    grad = output_gradient(given)
    of_hidden, of_prompts = torch.autograd.grad(output, (hidden, prompts), grad)
    ours = batch.backward(span, given, grad)
    assert error(ours.hidden, of_hidden) < 1e-5
    assert error(ours.prompts, of_prompts) < 1e-5


def test_positions_that_jump_are_positions_and_no_packed_sequences(local: Local, span: Span) -> None:
    positions = torch.tensor([[*range(6), *range(20, 26)]] * ROWS, dtype=torch.int32)
    given = Sequences(made(ROWS, TOKENS, WIDTH), positions=positions)
    expected, _, _ = local.run(given)
    assert error(batch.forward(span, given), expected) < 1e-5


def test_spans_in_a_chain_are_the_whole_span(local: Local, span: Span) -> None:
    given = sequences(LEFT, prompts=True)
    assert given.prompts is not None
    cuts = [span.section(0, 1), span.section(1, 3), load_span(local.source, 3, BLOCKS, prepare_steps=False)]
    hidden, tape = given.hidden, list[Sequences]()
    for part in cuts:
        tape.append(Sequences(hidden, given.mask, prompts=given.prompts[part.start : part.end]))
        hidden = batch.forward(part, tape[-1])
    assert torch.equal(hidden, batch.forward(span, given))
    grad, prompts = output_gradient(given), list[torch.Tensor]()
    whole = batch.backward(span, given, grad)
    for part, kept in zip(reversed(cuts), reversed(tape), strict=True):
        found = batch.backward(part, kept, grad)
        assert found.prompts is not None
        grad, prompts = found.hidden, [found.prompts, *prompts]
    assert same(Gradients(grad, torch.cat(prompts)), whole)


def test_how_many_graphs_are_kept_changes_no_bit(span: Span) -> None:
    given = sequences(RIGHT, prompts=True)
    grad = output_gradient(given)
    whole = batch.backward(span, given, grad)
    measured = span.graph_bytes[ROWS, TOKENS]
    assert measured > given.hidden.nbytes
    for blocks in (0, 1, 2, 3):
        assert same(batch.backward(span, given, grad, graph_bytes=blocks * measured), whole)


def test_gradients_of_prompts_are_summed_over_rows_in_order(source: ModelSource) -> None:
    span = load_span(source, 0, BLOCKS, dtype="bfloat16", prepare_steps=False)
    given = sequences(prompts=True, width=64)
    assert given.prompts is not None
    hidden, prompts, grad = given.hidden.bfloat16(), given.prompts.bfloat16(), output_gradient(given).bfloat16()
    together = batch.backward(span, Sequences(hidden, prompts=prompts), grad)
    single = [batch.backward(span, Sequences(hidden[i : i + 1], prompts=prompts), grad[i : i + 1]) for i in range(ROWS)]
    parts = [found.prompts for found in single if found.prompts is not None]
    assert together.prompts is not None
    assert together.prompts.dtype == torch.float32
    assert error(together.prompts, parts[0] + parts[1] + parts[2]) < 0.02


def test_bfloat16_is_a_local_bfloat16_models(source: ModelSource) -> None:
    span = load_span(source, 0, BLOCKS, dtype="bfloat16", prepare_steps=False)
    model = Reference.load(source, dtype="bfloat16").model
    given = sequences(LEFT, width=64)
    narrow = Sequences(given.hidden.bfloat16(), given.mask, prompts=made(BLOCKS, LENGTH, 64).bfloat16())
    output, hidden, _ = Local(source, model, list(find_blocks(model, BLOCKS).blocks)).run(narrow)
    grad = output_gradient(narrow).bfloat16()
    (of_hidden,) = torch.autograd.grad(output, hidden, grad)
    ours = batch.backward(span, narrow, grad).hidden
    assert ours.dtype == torch.bfloat16
    assert error(ours.float(), of_hidden.float()) < 0.01


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_quantised_blocks_have_the_gradients_of_a_quantised_model(source: ModelSource, quant: str) -> None:
    span = load_span(source, 0, BLOCKS, quant=quant, prepare_steps=False)
    model = Reference.load(source, quant=quant).model
    given = sequences(LEFT, prompts=True, width=64)
    output, hidden, prompts = Local(source, model, list(find_blocks(model, BLOCKS).blocks)).run(given)
    assert prompts is not None
    grad = output_gradient(given)
    of_hidden, of_prompts = torch.autograd.grad(output, (hidden, prompts), grad)
    ours = batch.backward(span, given, grad)
    assert error(ours.hidden, of_hidden) < 1e-5
    assert error(ours.prompts, of_prompts) < 1e-5


def test_a_span_remembers_nothing_of_a_batch(source: ModelSource) -> None:
    span = load_span(source, 0, BLOCKS, prepare_steps=False)
    left, right = sequences(LEFT, width=64), sequences(RIGHT, width=64)
    first = batch.forward(span, left)
    assert not torch.equal(batch.forward(span, right), first)
    assert torch.equal(batch.forward(span, left), first)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Sequences(made(2, 5, 32)), "not \\(rows, tokens, 64\\)"),
        (Sequences(made(2, 5, 64).half()), "float16"),
        (Sequences(made(2, 5, 64), torch.ones((2, 4), dtype=torch.uint8)), "mask"),
        (Sequences(made(2, 5, 64), positions=torch.zeros((1, 5), dtype=torch.int32)), "positions"),
        (Sequences(made(2, 5, 64), positions=torch.full((2, 5), 128, dtype=torch.int32)), "0 and 127"),
        (Sequences(made(2, 5, 64), positions=torch.full((2, 5), -1, dtype=torch.int32)), "0 and 127"),
        (Sequences(made(2, 5, 64), prompts=made(BLOCKS, 6, 64)), "prompts"),
        (Sequences(made(2, 5, 64), prompts=made(BLOCKS - 1, 2, 64)), "prompts"),
        (Sequences(made(1, 129, 64)), "more than the model's 128"),
    ],
)
def test_what_does_not_fit_is_refused(source: ModelSource, wrong: Sequences, said: str) -> None:
    span = load_span(source, 0, BLOCKS, prepare_steps=False)
    with pytest.raises(ValueError, match=said):
        batch.forward(span, wrong)
    with pytest.raises(ValueError, match=said):
        batch.backward(span, wrong, wrong.hidden)


def test_a_gradient_of_another_shape_is_refused(source: ModelSource) -> None:
    span = load_span(source, 0, BLOCKS, prepare_steps=False)
    with pytest.raises(ValueError, match="gradient"):
        batch.backward(span, sequences(width=64), made(ROWS, TOKENS - 1, 64))


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [4.0, 5.0, 6.0, 7.0],
    },
}
CONTEXTS = {"dynamic": 16, "longrope": 64}


@pytest.mark.parametrize("kind", ROPES)
def test_a_rotary_embedding_that_follows_the_longest_row_is_refused_past_its_original_length(
    kind: str, tmp_path: Path
) -> None:
    fields = {"rope_parameters": ROPES[kind], "max_position_embeddings": CONTEXTS[kind]}
    source = resolve(str(make_tiny("llama", tmp_path / kind, **fields)))
    span = load_span(source, 0, BLOCKS, prepare_steps=False)
    model = Reference.load(source).model
    local = Local(source, model, list(find_blocks(model, BLOCKS).blocks))
    given = sequences(LEFT, prompts=True)
    expected, hidden, _ = local.run(given)
    grad = output_gradient(given)
    (of_hidden,) = torch.autograd.grad(expected, hidden, grad)
    long = Sequences(made(ROWS, 17, WIDTH))
    far = Sequences(given.hidden, positions=torch.arange(5, 5 + TOKENS, dtype=torch.int32).expand(ROWS, -1))
    for wrong in (long, far):
        with pytest.raises(UnsupportedModel, match="past 16"):
            batch.forward(span, wrong)
        with pytest.raises(UnsupportedModel, match="past 16"):
            batch.backward(span, wrong, wrong.hidden)
    counts = torch.tensor(LEFT).bool()
    assert error(batch.forward(span, given)[counts], expected[counts]) < 1e-5  # nothing of the refused ones is left
    assert error(batch.backward(span, given, grad).hidden, of_hidden) < 1e-5
