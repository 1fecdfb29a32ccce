"""One token through a span without Python between its operations: traced programs, used only where proven bit-identical.

A program is the span's blocks, called as the `Planner` saw the decoder call them for one token, traced once into TorchScript; what
depends on the position (rotary rows, masks) is its input. Rows come from tables planned many positions at a time where the
table's rows equal single plans bit for bit; otherwise each step is planned. Families whose blocks branch on data (experts) are
recognised by their operators' tags and never traced. A program that differs anywhere from the blocks themselves is not used.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from blocks.model.kv_cache import SpanCache
from blocks.model.limits import PLAN_TABLES, PLAN_TOKENS, PROOF_TOKENS
from blocks.model.plan import Call, Planner

_PROBE_STEPS = (0, 1, 5, 40)
_DATA_DEPENDENT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

Program = Callable[..., torch.Tensor]
Signature = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a tensor was in a call: an index into the program's position inputs."""

    index: int


def _flatten(value: Any, leaves: list[torch.Tensor], seen: dict[int, int]) -> Any:
    """Replace the tensors in a call's argument by slots, sharing those that are one object."""
    if isinstance(value, torch.Tensor):
        if id(value) not in seen:
            seen[id(value)] = len(leaves)
            leaves.append(value)
        return _Slot(seen[id(value)])
    if isinstance(value, tuple | list):
        return tuple(_flatten(item, leaves, seen) for item in value)
    if isinstance(value, dict):
        return tuple((name, _flatten(value[name], leaves, seen)) for name in sorted(value))
    return value


def _fill(value: Any, like: Any, leaves: Sequence[torch.Tensor]) -> Any:
    """`_flatten` undone, with the shapes of containers taken from ``like``."""
    if isinstance(value, _Slot):
        return leaves[value.index]
    if isinstance(like, dict):
        return {name: _fill(item, like[name], leaves) for name, item in value}
    if isinstance(like, tuple | list):
        return type(like)(_fill(item, old, leaves) for item, old in zip(value, like, strict=True))
    return value


def leaves_of(calls: Sequence[Call]) -> tuple[Signature, list[torch.Tensor]]:
    """The tensors in the calls, and everything else about them as one comparable value."""
    leaves: list[torch.Tensor] = []
    seen: dict[int, int] = {}
    form = tuple((_flatten(call.arguments, leaves, seen), _flatten(call.options, leaves, seen)) for call in calls)
    return (form, tuple((leaf.dtype, leaf.dim()) for leaf in leaves)), leaves


class _View(SpanCache):
    """A cache whose visible past is given: what a trace writes to and reads from."""

    def __init__(self, like: SpanCache, views: Sequence[torch.Tensor]) -> None:
        self.layers = like.layers
        self.place = like.place
        self.views = list(views)


def _body(blocks: Sequence[nn.Module], calls: Sequence[Call], like: SpanCache, *, one_of_each: bool = False) -> Program:
    """The span as a function of (hidden, position inputs..., cache views...); or only the first block of each kind."""
    (form, _), leaves = leaves_of(calls)
    chosen = list(zip(blocks, calls, form, strict=True))
    if one_of_each:
        kinds = {(_kind_of(block), repr(wanted)): (block, call, wanted) for block, call, wanted in reversed(chosen)}
        chosen = list(kinds.values())

    def run(hidden: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        cache = _View(like, inputs[len(leaves) :])
        for block, call, (arguments, options) in chosen:
            filled = Call(_fill(arguments, call.arguments, inputs), _fill(options, call.options, inputs))
            hidden = filled.run(block, hidden, cache)
        return hidden

    return run


def _branches_on_data(body: Program, arguments: Sequence[torch.Tensor]) -> bool:
    """Whether any operator's result depends on values in its shape, or is read by Python."""
    graph = make_fx(lambda *given: body(*given))(*arguments).graph  # noqa: PLW0108 - a bound method hides its arity
    graph.eliminate_dead_code()
    return any(
        isinstance(node.target, torch._ops.OpOverload)
        and any(tag in node.target.tags for tag in _DATA_DEPENDENT)
        and not _indexes_by_number(node)
        for node in graph.nodes
    )


def _indexes_by_number(node: torch.fx.Node) -> bool:
    """Whether a node is plain indexing: only indexing by a mask has a shape that depends on data."""
    if node.target is not torch.ops.aten.index.Tensor:
        return False
    notes = [item.meta.get("tensor_meta") for item in node.all_input_nodes[1:]]
    return bool(notes) and all(getattr(note, "dtype", None) == torch.int64 for note in notes)


def trace(body: Program, arguments: Sequence[torch.Tensor], sample: Program | None = None) -> Program | None:
    """A TorchScript program of ``body``, or None where that can't be the same function.

    Args:
        body: a function of tensors alone.
        arguments: an example of them.
        sample: a part of ``body``, of the same arguments, that has each kind of operator which ``body`` has.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if _branches_on_data(sample or body, arguments):
                return None
            traced: Program = torch.jit.trace(body, tuple(arguments), check_trace=False)  # type: ignore[no-untyped-call]
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
            return None
    return traced


def _kind_of(block: nn.Module) -> tuple[Any, ...]:
    """What blocks have in common that run the same operators: modules and switches, not weights."""
    return tuple(
        (type(module), tuple(item for item in vars(module).items() if isinstance(item[1], str | bool)))
        for module in block.modules()
    )


@dataclass(slots=True)
class _Regime:
    """Positions whose calls have one form: ``program`` for all of them, rows of tables where ``sliceable``."""

    program: Program | None
    signature: Signature
    leaves: list[torch.Tensor]  # of one position; those with no axis are the same at all positions
    axes: list[int] | None  # by leaf: the axis along which a table has positions, -1: constant; None: plan each step


class StepPrograms:
    """The traced programs of a span, one per regime of positions (inside and beyond sliding windows)."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        planner: Planner,
        span: tuple[int, int],
        windows: Sequence[int],
        fresh_cache: Callable[[int], SpanCache],
        *,
        tables: bool,
        limit: int,
    ) -> None:
        self._blocks = blocks
        self._planner = planner
        self._span = span
        self._fresh_cache = fresh_cache
        self._tables_allowed = tables
        self._limit = limit
        self._borders = sorted({window - 1 for window in windows if 1 < window <= limit})
        self._regimes: dict[int, _Regime] = {}
        self._tables: OrderedDict[tuple[int, int], list[torch.Tensor | None]] = OrderedDict()
        self._scratch = fresh_cache(1)

    def prepare(self) -> None:
        """Trace and prove the programs of every regime; takes a second or so."""
        for start in (0, *(border for border in self._borders if border < min(self._limit, PROOF_TOKENS))):
            self._regimes[self._regime_of(start)] = self._make(start)

    @property
    def is_traced(self) -> bool:
        """Whether any regime has a program."""
        return any(regime.program is not None for regime in self._regimes.values())

    def run(self, hidden: torch.Tensor, cache: SpanCache) -> torch.Tensor | None:
        """One token (1, 1, d_model) through the span, `SpanCache.begin` having been called; None where there's no program."""
        position = cache.length
        regime = self._regimes.get(self._regime_of(position))
        if regime is None or regime.program is None:
            return None
        leaves = self._leaves(regime, position)
        return None if leaves is None else regime.program(hidden, *leaves, *cache.views)

    def _regime_of(self, position: int) -> int:
        return sum(position >= border for border in self._borders) if self._borders else 0

    def _leaves(self, regime: _Regime, position: int) -> Sequence[torch.Tensor] | None:
        if regime.axes is None:
            signature, leaves = self._plan(position)
            return leaves if signature == regime.signature else None
        stretch, row = divmod(position, PLAN_TOKENS)
        key = (stretch, self._regime_of(position))
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = self._make_table(stretch, position)
            if len(self._tables) > PLAN_TABLES:
                self._tables.popitem(last=False)
        return [
            leaf if axis < 0 or rows is None else rows.narrow(axis, row, 1)
            for leaf, axis, rows in zip(regime.leaves, regime.axes, table, strict=True)
        ]

    def _plan(self, position: int, count: int = 1) -> tuple[Signature, list[torch.Tensor]]:
        return leaves_of(self._calls(position, count))

    def _calls(self, position: int, count: int) -> list[Call]:
        self._scratch.pretend(position)
        return self._planner.calls(count, self._scratch, *self._span)

    def _make_table(self, stretch: int, position: int) -> list[torch.Tensor | None]:
        """Rows for a stretch of positions, in the order of the leaves at ``position``."""
        return _aligned(self._calls(position, 1), self._calls(stretch * PLAN_TOKENS, PLAN_TOKENS))

    def _make(self, start: int) -> _Regime:
        last = min([border for border in self._borders if border > start] + [self._limit]) - 1
        near = sorted({min(start + step, last) for step in _PROBE_STEPS})
        probes = [*near, *(far for far in (last - 1, last) if far > near[-1])]
        calls = self._calls(start, 1)
        signature, leaves = leaves_of(calls)
        program = self._proven(calls, near, signature)
        axes = self._axes(probes, signature, leaves) if program is not None and self._tables_allowed else None
        self._tables.clear()
        return _Regime(program, signature, leaves, axes)

    def _proven(self, calls: Sequence[Call], probes: Sequence[int], signature: Signature) -> Program | None:
        """The program, if at every probe it gives the very bits that the blocks give, twice."""
        body = _body(self._blocks, calls, self._fresh_cache(1))
        sample = _body(self._blocks, calls, self._fresh_cache(1), one_of_each=True)
        program: Program | None = None
        for hidden, position in zip(self._noise(len(probes) * 2), [*probes, *probes], strict=True):
            found, leaves = self._plan(position)
            if found != signature:
                return None
            ours, theirs = self._filled_cache(position), self._filled_cache(position)
            if program is None and (program := trace(body, [hidden, *leaves, *ours.views], sample)) is None:
                return None
            expected = body(hidden, *leaves, *theirs.views)
            if not torch.equal(program(hidden, *leaves, *ours.views), expected):
                return None
            if not all(torch.equal(a, b) for a, b in zip(ours.views, theirs.views, strict=True)):
                return None
        return program

    def _axes(self, probes: Sequence[int], signature: Signature, leaves: list[torch.Tensor]) -> list[int] | None:
        """By leaf, the table axis that holds positions (-1: constant), or None if some leaf is neither, at some probe."""
        axes = [-1] * len(leaves)
        for position in probes:
            stretch, row = divmod(position, PLAN_TOKENS)
            found, now = leaves_of(self._calls(position, 1))
            table = self._make_table(stretch, position)
            if found != signature:
                return None
            for index, leaf in enumerate(now):
                axis = _row_axis(leaf, table[index], row)
                if axis is not None:
                    axes[index] = axis
                elif axes[index] >= 0 or not torch.equal(leaf, leaves[index]):
                    return None
        return axes

    def _filled_cache(self, position: int) -> SpanCache:
        """A cache with a random past of ``position`` tokens, the same every time."""
        cache = self._fresh_cache(position + 1)
        cache.begin(position + 1)
        generator = torch.Generator().manual_seed(position)
        for view in cache.views:
            view.copy_(torch.randn(view.shape, generator=generator))
        cache.pretend(position)
        cache.begin(1)
        return cache

    def _noise(self, count: int) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(count)
        for _ in range(count):
            yield self._planner.noise(generator, 1)


def _aligned(single: Sequence[Call], wide: Sequence[Call]) -> list[torch.Tensor | None]:
    """For each leaf of the single plan, the tensor at the same place of the wide plan (None where it has none)."""
    found: list[torch.Tensor | None] = []
    seen: dict[int, int] = {}

    def walk(value: Any, other: Any) -> None:
        if isinstance(value, torch.Tensor):
            if id(value) not in seen:
                seen[id(value)] = len(found)
                found.append(other if isinstance(other, torch.Tensor) else None)
        elif isinstance(value, tuple | list):
            same = isinstance(other, tuple | list) and len(other) == len(value)
            for index, item in enumerate(value):
                walk(item, other[index] if same else None)
        elif isinstance(value, dict):
            for name in sorted(value):
                walk(value[name], other.get(name) if isinstance(other, dict) else None)

    for call, other in zip(single, wide, strict=True):
        walk(call.arguments, other.arguments)
        walk(call.options, other.options)
    return found


def _row_axis(leaf: torch.Tensor, table: torch.Tensor | None, row: int) -> int | None:
    """The axis of ``table`` along which its ``row`` is ``leaf``, bit for bit."""
    if table is None or table.dim() != leaf.dim() or table.dtype != leaf.dtype:
        return None
    differing = [axis for axis in range(leaf.dim()) if leaf.shape[axis] != table.shape[axis]]
    if len(differing) != 1 or leaf.shape[differing[0]] != 1 or table.shape[differing[0]] != PLAN_TOKENS:
        return None
    axis = differing[0]
    return axis if torch.equal(table.narrow(axis, row, 1), leaf) else None
