"""A span on whole sequences, padded or not: forward, and backward that computes forward again. No KV, nothing is kept between calls.

Owns the order in which blocks are run and recomputed. Masks, positions and rotary rows come from the decoder's own forward (`plan`).
What comes out depends on the batch and the span's blocks alone: how many blocks' graphs are kept at once (`BATCH_GRAPH_BYTES`)
changes no bit, nor does what the device does between two blocks (``between``). Rows are independent up to the last bits: matrix
products of another number of rows may be summed in another order, and experts are given the rows that chose them; so callers cut
batches by settings, never by load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from blocks.model.errors import UnsupportedModel
from blocks.model.limits import BATCH_GRAPH_BYTES, BATCH_SHAPES
from blocks.model.plan import Call
from blocks.model.span import Span


@dataclass(frozen=True, slots=True)
class Sequences:
    """What a span is given.

    Attributes:
        hidden: (rows, tokens, d_model) in the span's dtype, on its device.
        mask: (rows, tokens) uint8 on the CPU, 1 where there is a token; None: everywhere.
        positions: (rows, tokens) int32 on the CPU; None: as the model numbers them itself.
        prompts: (blocks, length, d_model), added to ``hidden[:, :length]`` before each block; None: nothing is.
    """

    hidden: torch.Tensor
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    prompts: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Gradients:
    """``hidden``: of the input, in the span's dtype. ``prompts``: summed over rows in order, float32."""

    hidden: torch.Tensor
    prompts: torch.Tensor | None = None


def straight_on() -> None:
    """Nothing is done between two blocks."""


def forward(span: Span, given: Sequences, between: Callable[[], None] = straight_on) -> torch.Tensor:
    """Run whole sequences: (rows, tokens, d_model) in, the same out.

    Args:
        between: called before each block; what is more urgent is done there.

    Raises:
        ValueError: shapes that don't fit each other or the span.
        UnsupportedModel: a row outgrows the length that its rotary embedding was made for.
    """
    with torch.no_grad():
        return _Walk(span, given, between).run(given.hidden, 0, len(span.modules))


def backward(
    span: Span,
    given: Sequences,
    grad: torch.Tensor,
    between: Callable[[], None] = straight_on,
    *,
    graph_bytes: int = BATCH_GRAPH_BYTES,
) -> Gradients:
    """Take ``grad``, the gradient of `forward`'s output, back to its input and its prompts.

    Blocks' graphs are kept for as many of the last blocks as fit in ``graph_bytes`` (at least one); what lies before is run without a
    graph first, and again with one when its turn comes.

    Raises:
        ValueError: as `forward`.
        UnsupportedModel: as `forward`, and where the span's quantisation has no gradients on this device.
    """
    if grad.shape != given.hidden.shape:
        raise ValueError(f"the gradient is {tuple(grad.shape)}, the output {tuple(given.hidden.shape)}")
    walk = _Walk(span, given, between)
    runs = _runs(len(span.modules), max(1, graph_bytes // walk.graph_bytes()))
    inputs = [given.hidden]
    with torch.no_grad():
        for start, end in runs[:-1]:
            inputs.append(walk.run(inputs[-1], start, end))
    prompts: list[torch.Tensor] = []
    for start, end in reversed(runs):
        grads = walk.take_back(inputs.pop(), grad, start, end)
        grad = grads[0]
        prompts[:0] = [walk.prompt_gradient(each) for each in grads] if given.prompts is not None else []
    return Gradients(grad, torch.stack(prompts) if given.prompts is not None else None)


def rows_in_order(grad: torch.Tensor) -> torch.Tensor:
    """(rows, ...) to the float32 sum over rows, first to last: `sum` would choose an order of its own."""
    total = grad[0].to(torch.float32, copy=True)
    for row in grad[1:]:
        total += row
    return total


def _runs(blocks: int, length: int) -> list[tuple[int, int]]:
    """Runs of at most ``length`` blocks; the first is the short one, since all but the last are run twice."""
    ends = [*range(blocks, 0, -length)][::-1]
    return [(max(0, end - length), end) for end in ends]


class _Walk:
    """One batch on its way through a span's blocks."""

    def __init__(self, span: Span, given: Sequences, between: Callable[[], None]) -> None:
        rows, tokens = _checked(span, given)
        self._between = between
        self._span = span
        self._shape = (rows, tokens)
        self._hidden = given.hidden
        self._calls: Sequence[Call] = span.batch_calls(rows, tokens, given.mask, given.positions)
        self._length = 0 if given.prompts is None else given.prompts.shape[1]
        self._added = None if given.prompts is None else self._padded(given.prompts)

    def _padded(self, prompts: torch.Tensor) -> torch.Tensor:
        """Zeros behind the prompts: what is added has the tokens' length, and its gradient is the hidden state's own."""
        added = torch.zeros(
            (len(prompts), 1, *self._hidden.shape[1:]), dtype=self._span.dtype, device=self._span.device
        )
        added[:, 0, : self._length] = prompts
        return added

    def _enter(self, hidden: torch.Tensor, index: int) -> torch.Tensor:
        return hidden if self._added is None else hidden + self._added[index]

    def run(self, hidden: torch.Tensor, start: int, end: int) -> torch.Tensor:
        for index in range(start, end):
            self._between()
            hidden = self._calls[index].run(self._span.modules[index], self._enter(hidden, index))
        return hidden

    def take_back(self, hidden: torch.Tensor, grad: torch.Tensor, start: int, end: int) -> list[torch.Tensor]:
        """The gradients of what blocks [start, end) were given, prompts added; the first is also that of ``hidden``.

        A graph for each block, cut where it begins: so that there is a way out between any two.
        """
        graphs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index in range(start, end):
            self._between()
            with torch.enable_grad():
                entering = self._enter(hidden.detach(), index).requires_grad_()
                hidden = self._calls[index].run(self._span.modules[index], entering)
            if hidden.grad_fn is None:
                raise UnsupportedModel("These blocks' quantisation has no gradients here: ask servers of plain blocks.")
            graphs.append((entering, hidden))
        found: list[torch.Tensor] = []
        while graphs:
            self._between()
            entering, hidden = graphs.pop()
            (grad,) = torch.autograd.grad(hidden, entering, grad)
            found.insert(0, grad)
        return found

    def prompt_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        return rows_in_order(grad[:, : self._length])

    def graph_bytes(self) -> int:
        """What one block's graph keeps for a batch of this shape: measured once, at the span's first block."""
        known = self._span.graph_bytes
        if self._shape not in known:
            if len(known) >= BATCH_SHAPES:
                del known[next(iter(known))]
            known[self._shape] = self._measured()
        return known[self._shape]

    def _measured(self) -> int:
        block = self._span.modules[0]
        weights = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), *block.buffers())}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = self._calls[0].run(block, self._hidden.detach().requires_grad_())
        del output  # until here, so that no storage's address was given to another
        return max(1, sum(kept.values()))


def _checked(span: Span, given: Sequences) -> tuple[int, int]:
    """The batch's rows and tokens, when everything fits."""
    shape = tuple(given.hidden.shape)
    if len(shape) != 3 or min(shape) < 1 or shape[2] != span.width or given.hidden.dtype != span.dtype:
        raise ValueError(
            f"hidden states of {shape}, {given.hidden.dtype}: not (rows, tokens, {span.width}), {span.dtype}"
        )
    rows, tokens = shape[:2]
    for name, tensor in (("mask", given.mask), ("positions", given.positions)):
        if tensor is not None and tuple(tensor.shape) != (rows, tokens):
            raise ValueError(f"the {name} is {tuple(tensor.shape)} for {rows} rows of {tokens} tokens")
    _check_rope(span, tokens, given.positions)
    if tokens > span.max_positions:
        raise ValueError(f"{tokens} tokens are more than the model's {span.max_positions}")
    if (
        given.positions is not None
        and not 0 <= int(given.positions.min()) <= int(given.positions.max()) < span.max_positions
    ):
        raise ValueError(f"positions lie between 0 and {span.max_positions - 1}")
    if given.prompts is not None:
        length = given.prompts.shape[1] if given.prompts.dim() == 3 else 0
        if tuple(given.prompts.shape) != (len(span.modules), length, span.width) or not 0 < length <= tokens:
            raise ValueError(
                f"prompts of {tuple(given.prompts.shape)} for {len(span.modules)} blocks and {tokens} tokens"
            )
    return rows, tokens


def _check_rope(span: Span, tokens: int, positions: torch.Tensor | None) -> None:
    """Past its original length such an embedding follows the longest row of a batch, and one kind keeps that for the next batch."""
    reach = tokens if positions is None else max(tokens, int(positions.max()) + 1)
    if span.has_stateful_rope and reach > span.max_positions:
        raise UnsupportedModel(
            f"A row reaches position {reach}; past {span.max_positions}, this model's rotary embedding makes rows depend on each other."
        )
