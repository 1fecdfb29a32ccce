"""What a decoder says to its blocks: the arguments (masks, rotary rows, ...) of every block's call, for any window.

The decoder's own forward runs with its blocks replaced by `Station`s that note how they are called; so masks, position embeddings
and layer kinds come from `transformers` itself, for every family, and no family is named here. The calls depend on the window's
position and length alone, never on hidden states; a family of which that isn't true fails its self-test.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blocks.model.architecture import Absent, Anatomy
from blocks.model.errors import UnsupportedModel
from blocks.model.kv_cache import SpanCache
from blocks.model.limits import BATCH_PLANS

HIDDEN = object()
CACHE = object()


@dataclass(frozen=True, slots=True)
class Call:
    """How one block is called; `HIDDEN` and `CACHE` stand where the hidden state and the cache go."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self, block: nn.Module, hidden: torch.Tensor, cache: SpanCache | None = None) -> torch.Tensor:
        """Call ``block`` this way; without ``cache`` only where the call has none in it."""
        arguments = [hidden if value is HIDDEN else cache if value is CACHE else value for value in self.arguments]
        options = {
            name: hidden if value is HIDDEN else cache if value is CACHE else value
            for name, value in self.options.items()
        }
        result = block(*arguments, **options)
        output = result[0] if isinstance(result, tuple) else result
        assert isinstance(output, torch.Tensor)
        return output


class Station(Absent):
    """Stands where a block was: notes its call; may hand on another hidden state than it was given."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.hidden: torch.Tensor | None = None
        self.call: Call | None = None
        self.substitute: torch.Tensor | None = None
        self.returns_tuple = False

    def forward(self, *arguments: Any, **options: Any) -> Any:
        if arguments:
            self.hidden = arguments[0]
            noted = (HIDDEN, *(CACHE if isinstance(value, SpanCache) else value for value in arguments[1:]))
        else:
            self.hidden = options["hidden_states"]
            noted = ()
        named = {name: CACHE if isinstance(value, SpanCache) else value for name, value in options.items()}
        if not arguments:
            named["hidden_states"] = HIDDEN
        self.call = Call(noted, named)
        output = self.hidden if self.substitute is None else self.substitute
        return (output,) if self.returns_tuple else output


class Silent(nn.Module):
    """Stands where an embedding, norm or head was whose result isn't wanted."""

    def forward(self, *arguments: Any, **_: Any) -> torch.Tensor:
        first = arguments[0] if arguments else None
        if isinstance(first, torch.Tensor) and first.is_floating_point() and first.dim() == 3:
            return first
        return torch.zeros(())


def install_stations(anatomy: Anatomy) -> list[nn.Module]:
    """Put a `Station` in every block's place; returns the blocks."""
    blocks = anatomy.blocks
    real = list(blocks)
    for index, block in enumerate(real):
        blocks[index] = Station(block)
    return real


def silence_surroundings(anatomy: Anatomy) -> None:
    """Replace every module with weights outside the blocks by a `Silent` one."""
    inside = {id(module) for module in anatomy.blocks.modules()}
    for parent in _path_to(anatomy.model, anatomy.decoder):
        for name, child in list(parent.named_children()):
            on_path = any(module is anatomy.decoder for module in child.modules())
            if not on_path and id(child) not in inside and any(True for _ in child.parameters()):
                setattr(parent, name, Silent())
    anatomy.model.all_tied_weights_keys = {}


def _path_to(root: nn.Module, target: nn.Module) -> list[nn.Module]:
    path = [root]
    while path[-1] is not target:
        path.append(next(child for child in path[-1].children() if any(m is target for m in child.modules())))
    return path


class Planner:
    """Runs a decoder with stations for blocks.

    Args:
        anatomy: a model whose blocks `install_stations` has replaced.
        width: of the embeddings that the decoder is given in place of real ones.
    """

    def __init__(self, anatomy: Anatomy, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._decoder = anatomy.decoder
        self.stations = [station for station in anatomy.blocks if isinstance(station, Station)]
        self._width = width
        self._dtype = dtype
        self._device = device
        self._takes_positions = "position_ids" in inspect.signature(anatomy.decoder.forward).parameters
        self._batches: OrderedDict[tuple[int, int, bytes | None, bytes | None], list[Call]] = OrderedDict()

    def learn_result_kind(self, fresh_cache: Callable[[], SpanCache]) -> None:
        """Find out whether the decoder expects its blocks to return a tensor or a tuple."""
        for returns_tuple in (False, True):
            for station in self.stations:
                station.returns_tuple = returns_tuple
                station.hidden = None
            try:
                output = self.run(2, fresh_cache())
                seen = [tuple(tensor.shape) for tensor in (self.stations[-1].hidden, output) if tensor is not None]
            except (RuntimeError, IndexError, ValueError, TypeError, AttributeError):
                continue
            if seen == [(1, 2, self._width)] * 2:
                return
        raise UnsupportedModel("The model's decoder doesn't run its blocks one after the other, so it can't be cut.")

    def run(self, count: int, cache: SpanCache) -> torch.Tensor | None:
        """Walk a window of ``count`` tokens after ``cache``'s past; the stations then hold the calls."""
        dummy = torch.zeros((1, count, self._width), dtype=self._dtype, device=self._device)
        output = self._decoder(inputs_embeds=dummy, past_key_values=cache, use_cache=True)
        hidden = getattr(output, "last_hidden_state", None)
        return hidden if isinstance(hidden, torch.Tensor) else None

    def calls(self, count: int, cache: SpanCache, start: int, end: int) -> list[Call]:
        """How blocks [start, end) are called for such a window."""
        self.run(count, cache)
        calls = [station.call for station in self.stations[start:end]]
        return [call for call in calls if call is not None]

    def batch_calls(
        self, rows: int, tokens: int, mask: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> list[Call]:
        """How all blocks are called for whole sequences without a cache; the last few plans are kept. Not for inference mode.

        Args:
            mask: (rows, tokens) uint8 on the CPU, 1 where there is a token.
            positions: (rows, tokens) int32 on the CPU; families that number their tokens themselves don't look at them.
        """
        if positions is not None and mask is None:
            mask = torch.ones((rows, tokens), dtype=torch.uint8)  # or transformers takes jumps for packed sequences
        key = (rows, tokens, _bytes_of(mask), _bytes_of(positions))
        calls = self._batches.get(key)
        if calls is None:
            calls = self._batches[key] = self._plan_batch(rows, tokens, mask, positions)
            if len(self._batches) > BATCH_PLANS:
                self._batches.popitem(last=False)
        self._batches.move_to_end(key)
        return calls

    def _plan_batch(
        self, rows: int, tokens: int, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> list[Call]:
        options: dict[str, Any] = {} if mask is None else {"attention_mask": mask.to(self._device, torch.int64)}
        if positions is not None and self._takes_positions:
            options["position_ids"] = positions.to(self._device, torch.int64)
        dummy = torch.zeros((rows, tokens, self._width), dtype=self._dtype, device=self._device)
        # Not under inference_mode: its tensors can't be saved for a backward pass.
        with torch.no_grad():
            self._decoder(inputs_embeds=dummy, use_cache=False, **options)
        calls = [station.call for station in self.stations]
        return [call for call in calls if call is not None]

    def noise(self, generator: torch.Generator, count: int) -> torch.Tensor:
        """A random hidden state (1, count, width), for probing."""
        values = torch.randn((1, count, self._width), generator=generator)
        return values.to(dtype=self._dtype, device=self._device)


def _bytes_of(tensor: torch.Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.contiguous().numpy().tobytes()
