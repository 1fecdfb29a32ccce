"""The optimizer in a real device's thread, through what jobs are lent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blocks.engine.thread import DeviceThread
from overlay.rpc.types import Part
from peerd.adapters.store import AdapterStore
from peerd.training.batches import initial_values
from peerd.training.errors import BadCheckpoint
from peerd.training.run import Progress, initial_of
from peerd.training.settings import JobSettings
from peerd.training.workshop import NodeWorkshop
from tests.peerd.training.workbench import Workbench

INITIAL = {"prefix": initial_values(1, 4, 8)}


def with_workshop(directory: Path, use: Callable[[NodeWorkshop], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        device = DeviceThread(1)
        device.start()
        bench: Any = Workbench()
        workshop = NodeWorkshop(bench.clock, device, bench, bench.open_trained, AdapterStore(directory))
        try:
            async with asyncio.timeout(60):
                return await use(workshop)
        finally:
            device.stop()

    return asyncio.run(run())


def gradient(value: float) -> dict[str, Part]:
    return {"prefix": Part("prefix", "float32", (4, 8), np.full((4, 8), value, np.float32).tobytes())}


def test_a_learner_from_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
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

    with_workshop(tmp_path, use)


def test_a_gradient_that_is_not_finite_is_not_taken(tmp_path: Path) -> None:
    async def use(workshop: NodeWorkshop) -> None:
        learner = await workshop.make_learner(JobSettings("one"), INITIAL, None)
        assert not await learner.step(gradient(float("inf")), 0.1)
        assert bytes((await learner.values())["prefix"].data) == bytes(INITIAL["prefix"].data)

    with_workshop(tmp_path, use)


def test_a_checkpoint_of_other_bytes_is_refused_in_words(tmp_path: Path) -> None:
    async def use(workshop: NodeWorkshop) -> None:
        with pytest.raises(BadCheckpoint, match="train again"):
            await workshop.make_learner(JobSettings("one"), INITIAL, b"no safetensors")

    with_workshop(tmp_path, use)


@pytest.mark.parametrize("method", ["prompt", "deep-prompt"])
def test_what_was_learned_becomes_an_adapter_also_a_second_time(tmp_path: Path, method: str) -> None:
    async def use(workshop: NodeWorkshop) -> None:
        model = await workshop.open_trained(None)
        settings = JobSettings("one", method=method, length=4)
        values = initial_of(settings, model)
        for _ in range(2):
            await workshop.keep_adapter(model, settings, values, Progress(step=3, eval_after=0.5))
        kept = workshop.adapters.load("one")
        assert (kept.kind, kept.model_id) == (method, model.model_id)
        assert kept.prefix is not None
        assert bytes(kept.prefix.data) == bytes(values["prefix"].data)
        assert (kept.prompts is not None) == (method == "deep-prompt")
        assert workshop.has_adapter("one")

    with_workshop(tmp_path, use)
