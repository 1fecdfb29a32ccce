"""Blocks [start, end) of any decoder-only model, exact: hidden states in, hidden states out, KV beside.

Owns the loading and running of a span; DESIGN 6. The blocks are `transformers`' own modules under their own indices, called exactly
as the model's own forward would call them (`plan`), with single tokens through traced programs where those are proven the same
(`step`). Knows nothing of sessions, routes or sampling.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blocks.model.architecture import Absent, Anatomy, build, parse_dtype, read_config
from blocks.model.errors import UnsupportedModel
from blocks.model.hub import fetch
from blocks.model.kv_cache import LayerShape, ShapeProbe, SpanCache, layer_windows
from blocks.model.limits import SECTION_STEPS, SECTIONS_KEPT
from blocks.model.plan import Call, Planner, install_stations, silence_surroundings
from blocks.model.quantise import quantise
from blocks.model.source import ModelSource, Progress, text_config
from blocks.model.step import StepPrograms
from blocks.model.weights import open_tensors

STATEFUL_ROPES = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class BoundaryTensor:
    """A tensor that passes between spans: its name, values per token, and dtype."""

    name: str
    width: int
    dtype: str


class Span:
    """A loaded span. Use from one thread.

    Args:
        anatomy: a model whose blocks outside the span are `Absent` and whose surroundings are silenced.
    """

    def __init__(self, anatomy: Anatomy, start: int, end: int, dtype: str, device: str = "cpu") -> None:
        self.start = start
        self.end = end
        self.dtype = parse_dtype(dtype)
        self.device = torch.device(device)
        config = anatomy.model.config
        self.attention: str = config._attn_implementation
        self.max_positions = max_positions(config.to_dict())
        width = config.get_text_config(decoder=True).hidden_size
        self.boundary = (BoundaryTensor("hidden", width, dtype),)
        self.rollback_tokens: int | None = None  # everything: caches keep the past of sliding windows too
        self.has_stateful_rope = rope_kind(config.to_dict()) in STATEFUL_ROPES
        self._windows = layer_windows(config)
        self._blocks = install_stations(anatomy)[start:end]
        self._planner = Planner(anatomy, width, self.dtype, self.device)
        self._shapes: tuple[LayerShape, ...] = ()
        self._steps: StepPrograms | None = None
        self._steps_limit: int | None = None
        self._steps_owed: int | None = None  # of a section: untraced steps still to run before tracing pays
        self._sections: OrderedDict[tuple[int, int], Span] = OrderedDict()
        self.graph_bytes: dict[tuple[int, int], int] = {}
        """By rows and tokens: what a block's graph keeps for backward, as measured (`blocks.model.batch`)."""
        with torch.inference_mode():
            self._planner.learn_result_kind(lambda: ShapeProbe(self._windows))
            self._shapes = self._probe_shapes()

    def _probe_shapes(self) -> tuple[LayerShape, ...]:
        probe = ShapeProbe(self._windows)
        hidden = self._planner.noise(torch.Generator().manual_seed(0), 1)
        for block, call in zip(self._blocks, self._planner.calls(1, probe, self.start, self.end), strict=True):
            hidden = call.run(block, hidden, probe)
        return tuple(probe.shapes[index] for index in sorted(probe.shapes))

    def prepare_steps(self, limit: int | None = None) -> None:
        """Trace single-token programs for positions below ``limit``, once; `forward` works without, slower."""
        if self._steps is not None:
            return
        with torch.inference_mode():
            steps = StepPrograms(
                self._blocks,
                self._planner,
                (self.start, self.end),
                self._windows,
                self.new_cache,
                tables=not self.has_stateful_rope,
                limit=min(limit or self.max_positions, self.max_positions),
            )
            steps.prepare()
        self._steps, self._steps_limit = steps, limit

    def section(self, start: int, end: int) -> Span:
        """Blocks [start, end) of this span over the same weights, for routes that enter or leave it midway.

        The last `SECTIONS_KEPT` are kept. Where the span's own steps are traced, a section's are, too, once it has run
        `SECTION_STEPS` single tokens: so a short visit doesn't cost everybody the time that the proof takes.

        Raises:
            ValueError: for blocks that aren't in this span.
        """
        if not self.start <= start < end <= self.end:
            raise ValueError(f"{start}:{end} is no part of {self.start}:{self.end}")
        part = self._sections.pop((start, end), None) or self._cut(start, end)
        self._sections[start, end] = part
        if len(self._sections) > SECTIONS_KEPT:
            self._sections.popitem(last=False)
        return part

    def _cut(self, start: int, end: int) -> Span:
        part = copy(self)
        part.start, part.end = start, end
        part._blocks = self._blocks[start - self.start : end - self.start]
        part._shapes = tuple(shape for shape in self._shapes if start <= shape.block < end)
        part._steps = None
        part._steps_owed = SECTION_STEPS if self._steps is not None and self._steps.is_traced else None
        part._sections = OrderedDict()
        return part

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The blocks themselves, for batches (`blocks.model.batch`)."""
        return self._blocks

    def batch_calls(
        self, rows: int, tokens: int, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> list[Call]:
        """How each of this span's blocks is called for whole sequences; see `Planner.batch_calls`."""
        return self._planner.batch_calls(rows, tokens, mask, positions)[self.start : self.end]

    def _count_step(self) -> None:
        """One more single token without a program; the last one owed has the programs made."""
        if self._steps_owed is None:
            return
        self._steps_owed -= 1
        if self._steps_owed <= 0:
            self._steps_owed = None
            self.prepare_steps(self._steps_limit)

    @property
    def width(self) -> int:
        """d_model."""
        return self.boundary[0].width

    def new_cache(self, max_tokens: int) -> SpanCache:
        """Empty KV for a session of at most ``max_tokens``; memory is reserved as it fills."""
        return SpanCache(self._windows, self._shapes, max_tokens, self.dtype, self.device)

    def truncate(self, cache: SpanCache, length: int) -> None:
        """Forget positions from ``length`` on."""
        cache.truncate(length)

    def cache_bytes_per_token(self) -> int:
        """KV bytes that each token of a session holds."""
        values = sum(heads * width for shape in self._shapes for heads, width in (shape.key, shape.value))
        return values * self.dtype.itemsize

    def forward(
        self, hidden: torch.Tensor, position: int, cache: SpanCache, prompts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run a window.

        Args:
            hidden: (1, tokens, d_model) in the span's dtype, on its device.
            position: of the first token; below the cache's length truncates it first, above is an error.
            cache: the session's.
            prompts: (blocks, length, d_model), added before each block at positions below length.

        Returns:
            (1, tokens, d_model).

        Raises:
            CacheFull: the window outgrows the session.
            ValueError: the caller skipped positions.
        """
        with torch.inference_mode():
            if position != cache.length:
                cache.truncate(position)
            count = hidden.shape[1]
            cache.begin(count)
            added = None if prompts is None or position >= prompts.shape[1] else prompts[:, position : position + count]
            can_step = count == 1 and self._steps is not None and added is None
            output = self._steps.run(hidden, cache) if can_step and self._steps is not None else None
            if output is None:
                output = hidden
                calls = self._planner.calls(count, cache, self.start, self.end)
                for index, (block, call) in enumerate(zip(self._blocks, calls, strict=True)):
                    entering = output if added is None else _with_prompt(output, added[index])
                    output = call.run(block, entering, cache)
            cache.commit(count)
            if count == 1 and self._steps is None:
                self._count_step()
            return output


def _with_prompt(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``rows`` (length, d_model) added to the first ones of ``hidden``, which others may still read."""
    entering = hidden.clone()
    entering[:, : len(rows)] += rows
    return entering


def max_positions(config: Mapping[str, Any]) -> int:
    """The longest context that a model of this config can be run exactly with."""
    fields = text_config(config)
    names = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")
    found = next((fields[name] for name in names if type(fields.get(name)) is int and fields[name] > 0), 2048)
    if rope_kind(config) in STATEFUL_ROPES:
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        original = rope.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings")
        return min(found, original) if type(original) is int else int(found)
    return int(found)


def rope_kind(config: Mapping[str, Any]) -> str:
    """How a config scales its rotary embeddings; those of `STATEFUL_ROPES` depend on how long the text is by now."""
    fields = text_config(config)
    rope = fields.get("rope_parameters") or fields.get("rope_scaling")
    return str(rope.get("rope_type", rope.get("type", "default"))) if isinstance(rope, Mapping) else "default"


def load_span(
    source: ModelSource,
    start: int,
    end: int,
    *,
    dtype: str = "float32",
    quant: str = "none",
    device: str = "cpu",
    progress: Progress | None = None,
    prepare_steps: bool = True,
) -> Span:
    """Load blocks [start, end): only their tensors are read, from shards that are fetched first where the model is the hub's.

    Raises:
        BadModel, UnsupportedModel: as the sentence says.
    """
    if not 0 <= start < end <= source.blocks:
        raise UnsupportedModel(f"{source.name} has blocks 0:{source.blocks}; {start}:{end} is no span of it.")
    config = read_config(source.config)

    def prepare(anatomy: Anatomy) -> None:
        blocks = anatomy.blocks
        for index in range(len(blocks)):
            if not start <= index < end:
                blocks[index] = Absent(blocks[index])
        silence_surroundings(anatomy)

    names = source.tensors_of_span(start, end)
    fetch(source, names, progress)
    with open_tensors(source, names, progress) as tensors:
        anatomy = build(config, tensors, parse_dtype(dtype), prepare, device)
    quantise(anatomy.blocks, quant, parse_dtype(dtype), device)
    span = Span(anatomy, start, end, dtype, device)
    if prepare_steps:
        span.prepare_steps()
    return span
