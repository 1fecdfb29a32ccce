"""Blocks that are elsewhere as a function with gradients: ``model.blocks[3:7](hidden)``.

Owns the autograd of a span: forward leaves a tape with the daemon, backward goes through it. docs/training.md, section 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from peerd.client.torch.calls import ServedModel, SpanCall

CALL_BYTES_MAX = 64 << 20
"""Of hidden states in one request: with its gradient beside it, a batch still fits the daemon's bodies."""


class RemoteBlocks:
    """Blocks [start, end) of a model; sliced like a list, called like a module."""

    def __init__(self, model: ServedModel, start: int, end: int) -> None:
        self.model = model
        self.start = start
        self.end = end

    def __len__(self) -> int:
        return self.end - self.start

    def __repr__(self) -> str:
        return f"RemoteBlocks({self.start}:{self.end} of {self.model.name})"

    def __getitem__(self, index: int | slice) -> RemoteBlocks:
        try:
            chosen = range(self.start, self.end)[index]
        except IndexError:
            raise IndexError(f"there is no block {index} in {self!r}") from None
        if isinstance(chosen, int):
            return RemoteBlocks(self.model, chosen, chosen + 1)
        if chosen.step != 1 or not len(chosen):
            raise IndexError(f"blocks are taken from left to right and at least one: {index} is no span of {self!r}")
        return RemoteBlocks(self.model, chosen.start, chosen.stop)

    def __call__(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        prompts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the blocks; gradients flow to ``hidden`` and ``prompts``.

        Args:
            hidden: (rows, tokens, d_model).
            attention_mask: (rows, tokens), 1 where there is a token; None: everywhere.
            position_ids: (rows or 1, tokens); None: as the model numbers them itself.
            prompts: (blocks, length, d_model), added to ``hidden[:, :length]`` before each block.

        Raises:
            ValueError: hidden states, mask or positions that can't be. ApiError: the daemon refused or failed the call, in its words.
        """
        rows, tokens = _checked(hidden, attention_mask, position_ids)
        if position_ids is not None:
            position_ids = position_ids.expand(rows, tokens)
        row_bytes = max(1, hidden[:1].numel() * self.model.dtype.itemsize)
        count = max(1, CALL_BYTES_MAX // row_bytes)
        outputs = []
        for first in range(0, rows, count):
            part = slice(first, first + count)
            call = SpanCall(self.model, self.start, self.end, _rows(attention_mask, part), _rows(position_ids, part))
            outputs.append(_run(call, hidden[part] if rows > count else hidden, prompts))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _checked(hidden: Any, mask: Any, positions: Any) -> tuple[int, int]:
    """Rows and tokens; refuses what would be sent as something else than was meant. The rest is the daemon's to refuse."""
    if (
        not isinstance(hidden, torch.Tensor)
        or hidden.dim() != 3
        or not hidden.is_floating_point()
        or not hidden.numel()
    ):
        raise ValueError("hidden has to be floating-point (rows, tokens, d_model), none of them 0")
    rows, tokens = hidden.shape[:2]
    if mask is not None and (mask.shape != (rows, tokens) or not bool(((mask == 0) | (mask == 1)).all())):
        raise ValueError(
            f"attention_mask has to be ({rows}, {tokens}) as hidden is, 1 where there is a token and 0 where there is none"
        )
    if positions is not None and (
        positions.is_floating_point() or positions.shape not in ((rows, tokens), (1, tokens), (tokens,))
    ):
        raise ValueError(f"position_ids have to be whole numbers, ({rows}, {tokens}) as hidden is, or (1, {tokens})")
    return rows, tokens


def _rows(tensor: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[part]


def _run(call: SpanCall, hidden: torch.Tensor, prompts: torch.Tensor | None) -> torch.Tensor:
    wants_gradient = hidden.requires_grad or (prompts is not None and prompts.requires_grad)
    if torch.is_grad_enabled() and wants_gradient:
        output: torch.Tensor = _SpanFunction.apply(hidden, prompts, call)  # type: ignore[no-untyped-call]
        return output
    return call.forward(hidden, prompts, keep_tape=False)[0]


class _SpanFunction(torch.autograd.Function):
    """The span's place in the graph. What forward got is kept here too, since tapes may be dropped."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, prompts: torch.Tensor | None, call: SpanCall) -> torch.Tensor:
        output, ctx.tape = call.forward(hidden, prompts, keep_tape=True)
        ctx.call = call
        ctx.save_for_backward(hidden, prompts)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        hidden, prompts = ctx.saved_tensors
        of_hidden, of_prompts = ctx.call.backward(ctx.tape, hidden, prompts, grad)
        return of_hidden, of_prompts, None
