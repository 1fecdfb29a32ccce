"""How a decoder's own forward reaches blocks that are elsewhere: stand-ins in its list, and what one pass has to tell them.

The decoder prepares masks and position embeddings that nobody needs here: servers make their own from the padding mask and the position
ids, which a pass keeps. A run of blocks is one call; it is cut only where somebody looks at a hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blocks.model.architecture import Absent, Anatomy
from blocks.model.errors import UnsupportedModel
from peerd.client.torch.cache import RemoteCache
from peerd.client.torch.span import RemoteBlocks


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward of the decoder. ``blocks`` None: nothing is computed, hidden states only walk by."""

    blocks: RemoteBlocks | None
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    prompts: torch.Tensor | None = None
    cache: RemoteCache | None = None
    cuts: Sequence[int] = (0,)

    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What comes out of block ``index``, or goes into it where it is run together with those before."""
        if self.blocks is None or index not in self.cuts:
            return hidden
        if self.cache is not None:
            return self._step(self.cache, hidden)
        end = min((cut for cut in self.cuts if cut > index), default=len(self.blocks))
        prompts = None if self.prompts is None else self.prompts[index:end]
        return self.blocks[index:end](hidden, self.mask, self.positions, prompts)

    def _step(self, cache: RemoteCache, hidden: torch.Tensor) -> torch.Tensor:
        if len(self.cuts) > 1:
            raise ValueError("a session gives no hidden states between blocks: ask for them with use_cache=False")
        wants_gradient = hidden.requires_grad or (self.prompts is not None and self.prompts.requires_grad)
        if torch.is_grad_enabled() and wants_gradient:
            raise ValueError("a session has no gradients: leave the cache out, or run under torch.no_grad()")
        return cache.step(hidden, self.mask, self.positions, self.prompts)


_PASS: ContextVar[Pass | None] = ContextVar("pass", default=None)


@contextmanager
def passing(this: Pass) -> Iterator[None]:
    """What the stand-ins hear until the block ends, in this thread."""
    token = _PASS.set(this)
    try:
        yield
    finally:
        _PASS.reset(token)


class RemoteBlock(Absent):
    """Stands where a block was."""

    index: int
    returns_tuple = False
    watched_from = 0
    """How many hooks `transformers` itself has put here."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        this = _PASS.get()
        if this is None:
            raise RuntimeError("a remote block is run by its model, or as model.blocks[3:7](hidden)")
        output = this.run(self.index, arguments[0] if arguments else options["hidden_states"])
        return (output,) if self.returns_tuple else output

    def extra_repr(self) -> str:
        return "elsewhere"

    @property
    def is_watched(self) -> bool:
        """Whether somebody hooked this block, and so looks at what goes in or comes out."""
        return bool(self._forward_pre_hooks) or len(self._forward_hooks) > self.watched_from


def install(anatomy: Anatomy) -> None:
    """Put a stand-in in every block's place; each is an instance of the block's class, by which `transformers` finds blocks."""
    blocks = anatomy.blocks
    for index, block in enumerate(list(blocks)):
        stand_in = RemoteBlock(block)
        stand_in.index = index
        named = {"__module__": type(block).__module__}
        # Afterwards, so that the block's own class makes no weights.
        stand_in.__class__ = type(type(block).__name__, (RemoteBlock, type(block)), named)
        blocks[index] = stand_in


def stand_ins(anatomy: Anatomy) -> list[RemoteBlock]:
    """The stand-ins, in order."""
    return [block for block in anatomy.blocks if isinstance(block, RemoteBlock)]


def cuts_of(blocks: Sequence[RemoteBlock], *, everywhere: bool) -> tuple[int, ...]:
    """Where a pass has to be cut: before and after each block that somebody looks at."""
    if everywhere:
        return tuple(range(len(blocks)))
    watched = [block.index for block in blocks if block.is_watched]
    cuts = {0, *watched, *(index + 1 for index in watched if index + 1 < len(blocks))}
    return tuple(sorted(cuts))


def learn_result_kind(anatomy: Anatomy, width: int, input_width: int, dtype: torch.dtype) -> None:
    """Find out whether the decoder expects tensors or tuples of its blocks, and that it only hands hidden states on between them."""
    seen: list[torch.Tensor] = []
    blocks = stand_ins(anatomy)
    hooks = [block.register_forward_pre_hook(_noting(seen), with_kwargs=True) for block in blocks]
    noise = torch.randn((1, 2, input_width), generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        for returns_tuple in (False, True):
            seen.clear()
            for block in blocks:
                block.returns_tuple = returns_tuple
            with passing(Pass(None)), torch.no_grad():
                try:
                    anatomy.decoder(inputs_embeds=noise, use_cache=False)
                except (RuntimeError, IndexError, ValueError, TypeError, AttributeError):
                    continue
            unchanged = len(seen) == len(blocks) and all(torch.equal(seen[0], other) for other in seen)
            if unchanged and seen[0].shape == (1, 2, width):
                return
    finally:
        for hook in hooks:
            hook.remove()
    raise UnsupportedModel("The model's decoder doesn't run its blocks one after the other, so it can't be cut.")


def _noting(seen: list[torch.Tensor]) -> Any:
    def note(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.append(arguments[0] if arguments else options["hidden_states"])

    return note
