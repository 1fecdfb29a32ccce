"""Both ends of a model in training, against the whole local model and its own autograd."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

from blocks.model import batch, training_head
from blocks.model.exact import Reference
from blocks.model.head import Head, load_head
from blocks.model.source import ModelSource, resolve
from blocks.model.span import Span, load_span
from tests.models import VOCABULARY, make_tiny

BLOCKS, WIDTH, ROWS, TOKENS, LENGTH = 4, 32, 3, 9, 4
FAMILIES = ("llama", "gpt2", "gemma2", "gemma3_text", "bloom", "opt", "mixtral")


@dataclass(frozen=True)
class Ends:
    source: ModelSource
    model: PreTrainedModel
    head: Head
    span: Span


@pytest.fixture(scope="module", params=FAMILIES)
def ends(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ends:
    return opened(resolve(str(make_tiny(request.param, tmp_path_factory.mktemp(request.param)))))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    return opened(resolve(str(make_tiny("llama", tmp_path_factory.mktemp("plain")))))


def opened(source: ModelSource, dtype: str = "float32") -> Ends:
    model = Reference.load(source, dtype=dtype).model
    return Ends(
        source, model, load_head(source, dtype=dtype), load_span(source, 0, BLOCKS, dtype=dtype, prepare_steps=False)
    )


def made(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=generator, dtype=torch.int32)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, in units of the largest value, which must not be zero."""
    largest = float(theirs.abs().max())
    assert largest > 0
    return float((ours - theirs).abs().max()) / largest


def local_loss(
    ends: Ends, prefix: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """What prompt tuning computes locally: `transformers`' own loss, a mean, times what it is the mean of."""
    embedded = ends.model.get_input_embeddings()(ids.long())
    inputs = torch.cat([prefix.unsqueeze(0).expand(ROWS, -1, -1), embedded], dim=1)
    output = ends.model(inputs_embeds=inputs, attention_mask=mask.long(), labels=labels.long(), use_cache=False)
    loss: torch.Tensor = output.loss * (labels[:, 1:] >= 0).sum()
    return loss


def test_a_prefix_learns_what_it_would_learn_in_the_whole_model(ends: Ends) -> None:
    prefix, ids = made(LENGTH, WIDTH), tokens()
    mask = torch.ones((ROWS, LENGTH + TOKENS), dtype=torch.uint8)
    mask[0, -3:] = mask[2, -1:] = 0
    labels = torch.cat([torch.full((ROWS, LENGTH + 2), -100, dtype=torch.int32), ids[:, 2:]], dim=1)
    labels[mask == 0] = -100

    leaf = prefix.clone().requires_grad_()
    expected = local_loss(ends, leaf, ids, mask, labels)
    (gradient,) = torch.autograd.grad(expected, leaf)

    hidden = training_head.embed_batch(ends.head, ids, prefix)
    given = batch.Sequences(hidden, mask)
    lost = training_head.loss(ends.head, batch.forward(ends.span, given), labels, scale=1.0)
    assert lost.grad is not None
    found = training_head.embed_backward(ends.head, ids, prefix, batch.backward(ends.span, given, lost.grad).hidden)
    assert lost.count == int((labels[:, 1:] >= 0).sum())
    assert lost.total == pytest.approx(float(expected.detach()), rel=1e-5)
    assert found.dtype == torch.float32
    assert error(found, gradient) < 1e-5


def test_without_a_prefix_tokens_are_embedded_as_the_model_does(ends: Ends) -> None:
    ids = tokens()
    expected = ends.model(input_ids=ids.long(), output_hidden_states=True, use_cache=False).hidden_states[0]
    assert error(training_head.embed_batch(ends.head, ids), expected) < 1e-6


def test_how_many_logits_are_made_at_once_changes_the_loss_by_rounding_only(
    llama: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, labels = made(ROWS, TOKENS, WIDTH), tokens()
    whole = training_head.loss(llama.head, hidden, labels, scale=0.5)
    for rows in (1, 5):
        monkeypatch.setattr(training_head, "LOSS_LOGITS_BYTES", rows * 16 * VOCABULARY)
        chunked = training_head.loss(llama.head, hidden, labels, scale=0.5)
        assert chunked.total == pytest.approx(whole.total, rel=1e-6)
        assert chunked.grad is not None
        assert whole.grad is not None
        assert error(chunked.grad, whole.grad) < 1e-5


def test_the_gradient_is_of_the_scaled_sum_and_zero_where_no_label_follows(llama: Ends) -> None:
    hidden, labels = made(ROWS, TOKENS, WIDTH), tokens()
    labels[1] = -100
    once, twice = (training_head.loss(llama.head, hidden, labels, scale=scale) for scale in (1.0, 2.0))
    assert once.grad is not None
    assert twice.grad is not None
    assert error(twice.grad, 2 * once.grad) < 1e-6
    assert not once.grad[1].any()
    assert not once.grad[:, -1].any()
    assert once.grad[0, :-1].any(dim=-1).all()


def test_no_labels_are_no_loss(llama: Ends) -> None:
    labels = torch.full((ROWS, TOKENS), -100, dtype=torch.int32)
    lost = training_head.loss(llama.head, made(ROWS, TOKENS, WIDTH), labels, scale=1.0)
    assert (lost.total, lost.count) == (0.0, 0)
    assert lost.grad is not None
    assert not lost.grad.any()


def test_an_evaluation_takes_nothing_back(llama: Ends) -> None:
    lost = training_head.loss(llama.head, made(ROWS, TOKENS, WIDTH), tokens())
    assert lost.grad is None
    assert lost.total > 0


def test_bfloat16_gives_float32_losses_and_prefix_gradients_in_float32(llama: Ends) -> None:
    ends = opened(llama.source, "bfloat16")
    prefix, ids = made(LENGTH, WIDTH), tokens()
    hidden = training_head.embed_batch(ends.head, ids, prefix)
    assert hidden.dtype == torch.bfloat16
    padded = torch.cat([torch.full((ROWS, LENGTH), -100, dtype=torch.int32), ids], dim=1)
    lost = training_head.loss(ends.head, hidden, padded, scale=1.0)
    wide = training_head.loss(llama.head, hidden.float(), padded, scale=1.0)
    assert lost.total == pytest.approx(wide.total, rel=0.02)
    assert lost.grad is not None
    assert lost.grad.dtype == torch.bfloat16
    assert training_head.embed_backward(ends.head, ids, prefix, lost.grad).dtype == torch.float32


def test_what_does_not_fit_is_refused(llama: Ends) -> None:
    head, hidden = llama.head, made(ROWS, TOKENS, WIDTH)
    with pytest.raises(ValueError, match="token ids"):
        training_head.embed_batch(head, tokens() + VOCABULARY)
    with pytest.raises(ValueError, match="prefix"):
        training_head.embed_batch(head, tokens(), made(LENGTH, WIDTH + 1))
    with pytest.raises(ValueError, match="more than the model's 128"):
        training_head.embed_batch(head, tokens(), made(120, WIDTH))
    with pytest.raises(ValueError, match="gradient"):
        training_head.embed_backward(head, tokens(), made(LENGTH, WIDTH), hidden)
    with pytest.raises(ValueError, match="labels"):
        training_head.loss(head, hidden, tokens()[:, 1:])
    with pytest.raises(ValueError, match="vocabulary"):
        training_head.loss(head, hidden, tokens() + VOCABULARY)
    with pytest.raises(ValueError, match="bfloat16"):
        training_head.loss(head, hidden.bfloat16(), tokens())
