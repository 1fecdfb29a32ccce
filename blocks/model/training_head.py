"""What a trainer computes at both ends of a model: tokens behind a prefix to hidden states, and hidden states to the loss; and back.

Owns the gradients of embeddings and head; both are the model's own forward with its blocks taken out (`head`), so scales, positions,
norms and caps are the family's. Nothing here is trained but the prefix. What is computed at once is bounded by the vocabulary alone,
so results depend on the arguments only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from blocks.model.batch import rows_in_order
from blocks.model.head import Head
from blocks.model.limits import LOSS_LOGITS_BYTES

_COPIES = 4
"""Of a float32 row of logits, while its loss is taken back: the head's own, the widened one, its logarithms, their gradient."""


@dataclass(frozen=True, slots=True)
class Loss:
    """``total``: the sum over the ``count`` positions with a label. ``grad``: (rows, tokens, d_model) in the head's dtype, if wanted."""

    total: float
    count: int
    grad: torch.Tensor | None = None


def embed_batch(head: Head, tokens: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
    """Hidden states (rows, length + tokens, d_model) of ``prefix`` (length, d_embedding) and then ``tokens`` (rows, tokens) int32.

    Raises:
        ValueError: ids outside the vocabulary; more positions than the model has; a prefix of another width.
    """
    with torch.no_grad():
        ids = _checked(head, tokens, prefix)
        return head.embed_rows(head.table_rows(ids), None if prefix is None else _repeated(head, prefix, len(ids)))


def embed_backward(head: Head, tokens: torch.Tensor, prefix: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of `embed_batch`'s output back to ``prefix``: summed over rows in order, (length, d_embedding) float32.

    Raises:
        ValueError: as `embed_batch`, or a gradient of another shape than the output's.
    """
    with torch.no_grad():
        ids = _checked(head, tokens, prefix)
        rows = head.table_rows(ids)
        repeated = _repeated(head, prefix, len(ids))
    with torch.enable_grad():
        output = head.embed_rows(rows, repeated.requires_grad_())
    if output.shape != grad.shape:
        raise ValueError(f"the gradient is {tuple(grad.shape)}, the embeddings {tuple(output.shape)}")
    (found,) = torch.autograd.grad(output, repeated, grad)
    return rows_in_order(found)


def loss(head: Head, hidden: torch.Tensor, labels: torch.Tensor, scale: float | None = None) -> Loss:
    """Cross-entropy in float32 of what follows each position, summed over positions whose next label isn't negative.

    Only those positions are taken through norm and head, as many at a time as `LOSS_LOGITS_BYTES` allows.

    Args:
        hidden: (rows, tokens, d_model) of the last block.
        labels: (rows, tokens) int32; row i's label at j + 1 belongs to its hidden state at j, as in `transformers`.
        scale: with it, the gradient of ``scale`` x the sum is returned too.

    Raises:
        ValueError: shapes that don't fit, or labels outside the vocabulary.
    """
    rows, places, targets = _targets(head, hidden, labels)
    wanted = hidden[rows, places]
    grad = None if scale is None else torch.zeros_like(hidden)
    total = 0.0
    chunk = max(1, LOSS_LOGITS_BYTES // (_COPIES * torch.float32.itemsize * head.vocabulary))
    for start in range(0, len(targets), chunk):
        span = slice(start, start + chunk)
        part, found = _chunk_loss(head, wanted[span], targets[span], scale)
        total += part
        if grad is not None and found is not None:
            grad[rows[span], places[span]] = found
    return Loss(total, len(targets), grad)


def _chunk_loss(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor, scale: float | None
) -> tuple[float, torch.Tensor | None]:
    leaf = hidden.unsqueeze(1)
    with torch.set_grad_enabled(scale is not None):
        leaf = leaf.detach().requires_grad_(scale is not None)
        logits = head.logits_of_rows(leaf)[:, 0].float()
        entropy = functional.cross_entropy(logits, targets, reduction="sum")
    if scale is None:
        return float(entropy), None
    (found,) = torch.autograd.grad(entropy, leaf, torch.full_like(entropy, scale))
    return float(entropy.detach()), found[:, 0]


def _targets(head: Head, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and places of the hidden states that count, and the token that follows each."""
    if hidden.dim() != 3 or hidden.shape[2] != head.width or hidden.dtype != head.dtype:
        raise ValueError(
            f"hidden states of {tuple(hidden.shape)}, {hidden.dtype}, for a head of {head.width}, {head.dtype}"
        )
    if labels.shape != hidden.shape[:2]:
        raise ValueError(f"labels of {tuple(labels.shape)} for hidden states of {tuple(hidden.shape)}")
    following = labels[:, 1:].to(head.device, torch.int64)
    rows, places = torch.nonzero(following >= 0, as_tuple=True)
    targets = following[rows, places]
    if len(targets) and int(targets.max()) >= head.vocabulary:
        raise ValueError(f"labels lie below the vocabulary's {head.vocabulary}")
    return rows, places, targets


def _checked(head: Head, tokens: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
    if tokens.dim() != 2 or not tokens.shape[0] or not tokens.shape[1]:
        raise ValueError(f"tokens of {tuple(tokens.shape)}: not (rows, tokens)")
    if prefix is not None and (prefix.dim() != 2 or not len(prefix) or prefix.shape[1] != head.input_width):
        raise ValueError(f"a prefix of {tuple(prefix.shape)}: not (length, {head.input_width})")
    length = tokens.shape[1] + (0 if prefix is None else len(prefix))
    if length > head.max_positions:
        raise ValueError(f"{length} positions are more than the model's {head.max_positions}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= head.vocabulary:
        raise ValueError(f"token ids lie between 0 and {head.vocabulary - 1}")
    return tokens.to(head.device, torch.int64)


def _repeated(head: Head, prefix: torch.Tensor, rows: int) -> torch.Tensor:
    """A copy of the prefix for every row: so each has a gradient of its own, and their order of summing is ours."""
    return prefix.to(head.device, head.dtype).unsqueeze(0).repeat(rows, 1, 1)
