"""Values of our own that are not finite, through real servers: the step is skipped, and no server is blamed for what it was sent."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from blocks.engine.inline import InlineDevice
from blocks.engine.runner import Runner
from blocks.engine.trainable import AdamW, Trainable
from blocks.model.head import load_head
from blocks.model.source import resolve
from overlay.rpc.types import Part
from peerd.training.batches import initial_values, make_plan
from peerd.training.dataset import Example
from peerd.training.trainer import PREFIX, StepReport, Trainer
from tests.models import make_tiny
from tests.peerd.calls.field import Field
from tests.ring import KEY

BLOCKS, LENGTH = 4, 3
EXAMPLES = [Example(tuple(range(5, 9 + count)), (-100, *range(6, 9 + count))) for count in range(4)]


class Masters:
    """A learner on this thread."""

    def __init__(self, values: Part) -> None:
        self.trainable = Trainable({PREFIX: values}, AdamW())

    async def values(self) -> dict[str, Part]:
        return self.trainable.parts()

    async def step(self, gradients: dict[str, Part], rate: float) -> bool:
        return not self.trainable.step(gradients, rate).skipped


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_skip_the_step_and_blame_no_server(tmp_path: Path, value: float) -> None:
    async def step(first: float) -> tuple[StepReport, Masters, Field]:
        directory = make_tiny("llama", tmp_path / "model")
        head = load_head(resolve(str(directory), directory / "cache"), dtype="float32")
        runner = Runner()
        runner.install_head(KEY, head)
        async with asyncio.timeout(60), Field(directory, BLOCKS) as field:
            await field.server(0, 2)
            await field.server(2, 4)
            values = np.frombuffer(initial_values(0, LENGTH, field.width).data, np.float32).copy()
            values[0] = first
            masters = Masters(Part(PREFIX, "float32", (LENGTH, field.width), values.tobytes()))
            plan = make_plan(len(EXAMPLES), batch=4, epochs=1, seed=0, eval_split=0)
            trainer = Trainer(
                InlineDevice(runner), field.caller, field.model, BLOCKS, EXAMPLES, plan,
                prefix_length=LENGTH, micro_batch_tokens=20,
            )  # fmt: skip
            return await trainer.step(0, masters, 0.1), masters, field

    report, masters, field = asyncio.run(step(value))
    assert (report.taken, masters.trainable.skipped, masters.trainable.taken) == (False, 1, 0)
    assert field.swarm.blamed == []
    assert field.caller.servers_lost == 0
    assert all(server.device.jobs for server in field.servers)
    assert np.isfinite(np.frombuffer(masters.trainable.parts()[PREFIX].data, np.float32)[1:]).all()
    finite, _, _ = asyncio.run(step(0.01))
    assert finite.taken
