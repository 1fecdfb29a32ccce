"""The optimizer in a real device's thread, through what jobs are lent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from blocks.engine.thread import DeviceThread
from overlay.rpc.types import Part
from peerd.training.batches import initial_values
from peerd.training.errors import BadCheckpoint
from peerd.training.settings import JobSettings
from peerd.training.workshop import NodeWorkshop
from tests.peerd.training.workbench import Workbench

INITIAL = {"prefix": initial_values(1, 4, 8)}


def with_workshop(use: Callable[[NodeWorkshop], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        device = DeviceThread(1)
        device.start()
        bench: Any = Workbench()
        workshop = NodeWorkshop(
            bench.clock, device, bench, bench.open_trained, lambda: 0, bench.has_adapter, bench.keep_adapter
        )
        try:
            async with asyncio.timeout(60):
                return await use(workshop)
        finally:
            device.stop()

    return asyncio.run(run())


def gradient(value: float) -> dict[str, Part]:
    return {"prefix": Part("prefix", "float32", (4, 8), np.full((4, 8), value, np.float32).tobytes())}


def test_a_learner_from_a_checkpoint_goes_on_bit_for_bit() -> None:
    async def use(workshop: NodeWorkshop) -> None:
        settings = JobSettings("one", weight_decay=0.1)
        whole = await workshop.make_learner(settings, INITIAL, None)
        for value in (0.5, -0.25):
            assert await whole.step(gradient(value), 0.1)
        resumed = await workshop.make_learner(settings, INITIAL, await whole.state())
        for learner in (whole, resumed):
            assert await learner.step(gradient(0.125), 0.1)
        assert await whole.state() == await resumed.state()
        assert bytes((await whole.values())["prefix"].data) != bytes(INITIAL["prefix"].data)

    with_workshop(use)


def test_a_gradient_that_is_not_finite_is_not_taken() -> None:
    async def use(workshop: NodeWorkshop) -> None:
        learner = await workshop.make_learner(JobSettings("one"), INITIAL, None)
        assert not await learner.step(gradient(float("inf")), 0.1)
        assert bytes((await learner.values())["prefix"].data) == bytes(INITIAL["prefix"].data)

    with_workshop(use)


def test_a_checkpoint_of_other_bytes_is_refused_in_words() -> None:
    async def use(workshop: NodeWorkshop) -> None:
        with pytest.raises(BadCheckpoint, match="train again"):
            await workshop.make_learner(JobSettings("one"), INITIAL, b"no safetensors")

    with_workshop(use)
