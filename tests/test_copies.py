"""How often a tensor is copied on its way through a hop, counted in bytes that were given a new place.

A copy needs somewhere to go: every line that runs while windows go round is asked how much memory it took (`tracemalloc`, line by
line), and decryption, which reuses its buffer, is counted by what came in. Both nodes run here, in one thread but for the device.
"""

from __future__ import annotations

import asyncio
import sys
import tracemalloc
from collections import Counter
from types import FrameType
from typing import Any, Self

import pytest

import overlay.rpc.channel
from benchmarks.ring_hops import KEY, Plan, Stopwatch, node
from blocks.sampling_params import SamplingParams
from overlay.rpc.codec import Codec
from overlay.rpc.types import Part
from peerd.decoding import DecodeRequest, DecoderPool, DriverModel
from peerd.system_ports import LoopClock, SystemRandomness
from routing.types import ComputeClass, Hop, ModelId, Route, Span

WIDTH = 262144
TENSOR_BYTES = WIDTH * 4
WARM_UP_TOKENS = 6
TOKENS = 10
COPIES_MAX = 4
COMPRESSED_PLACES_MAX = 5.1
"""A compressor is given room for a tensor that doesn't shrink, which is no copy, and a little for its frame."""
NOTED_BYTES = 4096
"""What a line takes below this is no tensor."""


class Allocations:
    """Bytes taken by each line of this thread while it is entered."""

    def __init__(self) -> None:
        self.by_line: Counter[str] = Counter()
        self._held = 0
        self._line = ""

    def __enter__(self) -> Self:
        tracemalloc.start()
        self._held = tracemalloc.get_traced_memory()[0]
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            frame.f_trace = self._trace
            frame = frame.f_back
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        tracemalloc.stop()

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        held, peak = tracemalloc.get_traced_memory()
        if peak - self._held >= NOTED_BYTES:
            self.by_line[self._line] += peak - self._held
        tracemalloc.reset_peak()
        self._held = held
        self._line = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        return self._trace


class Counting(Stopwatch):
    """Counts from one token to another."""

    def __init__(self, allocations: Allocations) -> None:
        super().__init__()
        self._allocations = allocations

    def on_token(self, token: int, logits: Part | None) -> bool:
        super().on_token(token, logits)
        if len(self.times) == WARM_UP_TOKENS:
            self._allocations.__enter__()
        elif len(self.times) == WARM_UP_TOKENS + TOKENS:
            self._allocations.__exit__()
        return True


async def count_copies(allocations: Allocations) -> float:
    """Copies of a 1 MiB boundary for each pass through a node, in and out."""
    async with asyncio.timeout(60), node(WIDTH) as hop, node(WIDTH) as driver:
        addresses = tuple(str(address.without_peer()) for address in hop.host.addresses)
        plan = Plan(Route((Hop(hop.host.peer_id.multihash, addresses, Span(0, 1)),)))
        pool = DecoderPool(
            driver.host, driver.service, driver.directory, driver.device, plan, LoopClock(), SystemRandomness(), 1
        )
        model = DriverModel(KEY, ModelId(bytes(32)), ComputeClass("none", "float32"), WIDTH, 1 << 20)
        counting = Counting(allocations)
        async with pool:
            request = DecodeRequest((1,), SamplingParams(), WARM_UP_TOKENS + TOKENS + 1, ignore_eos=True)
            pool.start(model, request, counting)
            await counting.over.wait()
        assert counting.error is None
    decrypted = 1.0
    return decrypted + sum(allocations.by_line.values()) / (2 * TOKENS * TENSOR_BYTES)


@pytest.mark.parametrize(("codec", "most"), [(Codec.RAW, COPIES_MAX), (Codec.PLANES_ZSTD, COMPRESSED_PLACES_MAX)])
def test_a_tensor_is_copied_at_most_so_often_on_its_way_through_a_node(
    codec: Codec, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Chosen here: the sender would go by the link that it measured, and a busy machine measures a slow one.
    monkeypatch.setattr(
        overlay.rpc.channel,
        "choose_codec",
        lambda part, _: codec if part.size_bytes >= TENSOR_BYTES else Codec.RAW,
    )
    allocations = Allocations()
    copies = asyncio.run(count_copies(allocations))
    share = 2 * TOKENS * TENSOR_BYTES
    where = ", ".join(f"{line} {taken / share:.2f}" for line, taken in allocations.by_line.most_common(8))
    print(f"{copies:.2f}: 1.00 decrypted, {where}")
    assert 2.5 < copies <= most, f"{copies:.2f} copies: 1.00 decrypted, {where}"


def test_one_copy_more_is_seen() -> None:
    allocations = Allocations()
    kept = []

    def copy_it(tensor: bytes) -> None:
        kept.append(bytearray(tensor))
        kept.clear()

    tensor = bytes(TENSOR_BYTES)
    with allocations:
        copy_it(tensor)
    assert 0.9 < sum(allocations.by_line.values()) / TENSOR_BYTES < 1.1
