"""A workshop without torch and swarm: a trainer whose losses are a formula of the values, and knobs for all that can go wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blocks.demo import MODEL_DIRECTORY
from blocks.text import TextCodec
from overlay.errors import PeerdError
from overlay.rpc.types import Part
from peerd.adapters.adapter import ModelShape
from peerd.driving import DriverModel
from peerd.training.batches import Plan
from peerd.training.dataset import Dataset
from peerd.training.run import Progress, TrainedModel
from peerd.training.settings import JobSettings
from peerd.training.trainer import PREFIX, StepReport
from routing.types import ComputeClass

CODEC = TextCodec.from_directory(MODEL_DIRECTORY)
LINES = b"".join(json.dumps({"text": f"The fox saw {count} owls."}).encode() + b"\n" for count in range(20))


class Unserved(PeerdError):
    code = "blocks-unserved"
    retryable = True


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        self.seconds += 0.5
        return self.seconds

    def now_s(self) -> float:
        return 1_700_000_000.0


class Learner:
    """Plain descent on one vector; its state is the vector."""

    def __init__(self, values: bytes, steps_seen: int = 0) -> None:
        self.vector = np.frombuffer(values, np.float32).copy()
        self.steps_seen = steps_seen

    async def values(self) -> Mapping[str, Part]:
        return {PREFIX: Part(PREFIX, "float32", self.vector.shape, self.vector.tobytes())}

    async def step(self, gradients: Mapping[str, Part], rate: float) -> bool:
        self.steps_seen += 1
        gradient = np.frombuffer(gradients[PREFIX].data, np.float32)
        if not np.isfinite(gradient).all():
            return False
        self.vector -= np.float32(rate) * gradient
        return True

    async def seen(self) -> int:
        return self.steps_seen

    async def state(self) -> bytes:
        return self.steps_seen.to_bytes(4, "big") + self.vector.tobytes()


@dataclass
class Workbench:
    """`peerd.training.run.Workshop`. ``before_step`` is called with each step's number and may raise, wait or cancel."""

    before_step: Callable[[int], Any] = lambda step: None
    gradient: Callable[[int, np.ndarray[Any, Any]], np.ndarray[Any, Any]] = lambda step, vector: vector
    model_id: bytes = b"\x01" * 32
    dtype: str = "float32"
    clock: Clock = field(default_factory=Clock)
    adapters: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    steps: list[tuple[str, int]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    missing: PeerdError | None = None

    async def open_trained(self, name: str | None) -> TrainedModel:
        if self.missing is not None:
            raise self.missing
        driver = DriverModel("key", self.model_id, ComputeClass("none", self.dtype), 4, 64)
        shape = ModelShape(name or "demo", self.model_id.hex(), str(driver.compute_class), 3, 4, 4, 2, 64)
        return TrainedModel(shape, driver, CODEC)

    async def make_learner(self, settings: JobSettings, initial: Mapping[str, Part], state: bytes | None) -> Learner:
        if state is None:
            return Learner(bytes(initial[PREFIX].data))
        return Learner(state[4:], int.from_bytes(state[:4], "big"))

    def make_trainer(self, model: TrainedModel, settings: JobSettings, dataset: Dataset, plan: Plan) -> FormulaTrainer:
        return FormulaTrainer(self, settings.name, plan)

    def servers_lost(self) -> int:
        return 0

    def has_adapter(self, name: str) -> bool:
        return name in self.adapters

    async def keep_adapter(
        self, model: TrainedModel, settings: JobSettings, values: Mapping[str, Part], progress: Progress
    ) -> None:
        self.adapters[settings.name] = np.frombuffer(values[PREFIX].data, np.float32)


@dataclass
class FormulaTrainer:
    bench: Workbench
    name: str
    plan: Plan

    async def step(self, step: int, learner: Learner, rate: float, scale: float = 1.0) -> StepReport:
        waiting = self.bench.before_step(step)
        if waiting is not None:
            await waiting
        await asyncio.sleep(0)
        self.bench.steps.append((self.name, step))
        self.bench.scales.append(scale)
        vector = learner.vector.copy()
        # The examples of the step matter, so that a resumed run with another order is seen.
        scaled = self.bench.gradient(step, vector) * np.float32(1 + sum(self.plan.examples_of(step)) % 7)
        taken = await learner.step({PREFIX: Part(PREFIX, "float32", vector.shape, scaled.tobytes())}, rate)
        return StepReport(float(np.abs(vector).sum()), 10, taken)

    async def evaluate(self, learner: Learner | None) -> float | None:
        return 1.0 if learner is None else float(np.abs(learner.vector).sum())
