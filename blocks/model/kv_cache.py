"""The KV of one session on one span: preallocated, appended in place, truncated by moving a number.

Answers `transformers`' questions about lengths exactly as its `DynamicCache` does, layer kind by layer kind, but keeps the past of
sliding layers too, so that every position can be rolled back to. Blocks outside the span have a length and no storage. Owns no
policy: who may keep how much is the engine's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from blocks.model.errors import CacheFull, UnsupportedModel
from blocks.model.limits import CACHE_FIRST_TOKENS


class _Length:
    """What a layer knows of the past: how long it is. Shared by all layers of a cache."""

    __slots__ = ("tokens",)

    def __init__(self) -> None:
        self.tokens = 0


class _FullLayer(DynamicLayer):  # type: ignore[misc]
    """A layer that attends to all of the past."""

    def __init__(self, length: _Length) -> None:
        super().__init__()
        self._length = length
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self._length.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length.tokens + query_length, 0


class _SlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer that attends to the last ``sliding_window`` tokens."""

    def __init__(self, length: _Length, window: int) -> None:
        super().__init__(sliding_window=window)
        self._length = length
        self.is_initialized = True

    @property
    def cumulative_length(self) -> int:
        return self._length.tokens

    @cumulative_length.setter
    def cumulative_length(self, value: int) -> None:
        pass


def layer_windows(config: PretrainedConfig) -> tuple[int, ...]:
    """The attention window of each block, 0 for all of the past.

    Raises:
        UnsupportedModel: some block keeps a state that is no KV of full or sliding attention.
    """
    windows = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(int(layer.sliding_window))
        elif type(layer) is DynamicLayer:
            windows.append(0)
        else:
            raise UnsupportedModel(
                f"{config.model_type} keeps states other than plain KV ({type(layer).__name__}): "
                "recurrent and compressed caches can't be rolled back or replayed exactly yet."
            )
    return tuple(windows)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The KV of one block and token: (heads, width) of keys and of values, and the block's window."""

    block: int
    key: tuple[int, int]
    value: tuple[int, int]
    window: int


class _Group:
    """Layers of one shape, stacked so that one slice shows the past of all of them."""

    __slots__ = ("keys", "shape", "size", "values")

    def __init__(self, shape: LayerShape, size: int) -> None:
        self.shape = shape
        self.size = size
        self.keys = torch.empty(0)
        self.values = torch.empty(0)

    def grow(self, length: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        """Reserve ``capacity`` tokens and keep the first ``length``."""
        for name, (heads, width) in (("keys", self.shape.key), ("values", self.shape.value)):
            old = getattr(self, name)
            new = torch.zeros((self.size, 1, heads, capacity, width), dtype=dtype, device=device)
            if length:
                new[:, :, :, :length] = old[:, :, :, :length]
            setattr(self, name, new)


class SpanCache(Cache):  # type: ignore[misc]
    """A session's KV. Use `begin`, run the blocks, then `commit`; `truncate` takes tokens back.

    Args:
        windows: the window of every block of the model, as `layer_windows` gives them.
        shapes: what the span's own blocks store.
    """

    def __init__(
        self,
        windows: Sequence[int],
        shapes: Sequence[LayerShape],
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shared = _Length()
        layers = [_SlidingLayer(self._shared, window) if window else _FullLayer(self._shared) for window in windows]
        super().__init__(layers=layers)
        self.max_tokens = max_tokens
        self.views: list[torch.Tensor] = []  # of each group: visible keys, visible values
        self._dtype = dtype
        self._device = device
        self._capacity = 0
        self._groups: list[_Group] = []
        self.place: dict[int, tuple[int, int]] = {}  # block -> (group, index in it)
        for shape in shapes:
            self._place(shape)

    def _place(self, shape: LayerShape) -> None:
        alike = (shape.key, shape.value, shape.window)
        for index, group in enumerate(self._groups):
            if (group.shape.key, group.shape.value, group.shape.window) == alike:
                self.place[shape.block] = (index, group.size)
                group.size += 1
                return
        self.place[shape.block] = (len(self._groups), 0)
        self._groups.append(_Group(shape, 1))

    @property
    def length(self) -> int:
        """How many tokens are in it."""
        return self._shared.tokens

    @property
    def capacity_tokens(self) -> int:
        """How many tokens memory is reserved for."""
        return self._capacity

    @property
    def size_bytes(self) -> int:
        """Memory held."""
        return sum(group.keys.nbytes + group.values.nbytes for group in self._groups)

    def begin(self, count: int) -> None:
        """Make room for ``count`` tokens and show the blocks the past and that room.

        Raises:
            CacheFull: the session was opened for fewer tokens.
        """
        length = self._shared.tokens
        end = length + count
        if end > self._capacity:
            self._reserve(end)
        views = self.views
        views.clear()
        for group in self._groups:
            window = group.shape.window
            first = max(0, length - window + 1) if window else 0
            views.append(group.keys[:, :, :, first:end])
            views.append(group.values[:, :, :, first:end])

    def _reserve(self, end: int) -> None:
        if end > self.max_tokens:
            raise CacheFull(
                f"The session was opened for {self.max_tokens} tokens and would grow to {end}: ask for fewer tokens."
            )
        capacity = min(self.max_tokens, max(end, 2 * self._capacity, CACHE_FIRST_TOKENS))
        for group in self._groups:
            group.grow(self._shared.tokens, capacity, self._dtype, self._device)
        self._capacity = capacity

    def commit(self, count: int) -> None:
        """Count the window that `begin` made room for as part of the past."""
        self._shared.tokens += count

    def truncate(self, length: int) -> None:
        """Forget everything from position ``length`` on; costs nothing."""
        if not 0 <= length <= self._shared.tokens:
            raise ValueError(f"can't truncate {self._shared.tokens} tokens to {length}")
        self._shared.tokens = length

    def pretend(self, length: int) -> None:
        """Claim a past of ``length`` tokens, for planning and probing; never on a session's cache."""
        self._shared.tokens = length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by a block: store the window's keys and values (1, heads, tokens, width), return all that is visible."""
        group, index = self.place[layer_idx]
        keys, values = self.views[2 * group][index], self.views[2 * group + 1][index]
        count = key_states.shape[2]
        keys[:, :, -count:].copy_(key_states)
        values[:, :, -count:].copy_(value_states)
        return keys, values


class ShapeProbe(SpanCache):
    """Stands in for a cache to learn what each block stores: keeps nothing, remembers shapes."""

    def __init__(self, windows: Sequence[int]) -> None:
        super().__init__(windows, (), 0, torch.float32, torch.device("cpu"))
        self._windows = windows
        self.shapes: dict[int, LayerShape] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = key_states.shape, value_states.shape
        self.shapes[layer_idx] = LayerShape(layer_idx, (key[1], key[3]), (value[1], value[3]), self._windows[layer_idx])
        return key_states, value_states
