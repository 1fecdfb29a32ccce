"""What the node lends to training jobs: its models, its device, its calls to others' blocks, its adapters.

Owns the hand-over to the device's thread, where the optimizer lives. Decides nothing. Imports torch only in that thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from blocks.protocol.device import OwnDevice
from overlay.ports import Clock
from overlay.rpc.types import Part
from peerd.adapters.store import AdapterStore
from peerd.training.batches import Plan
from peerd.training.dataset import Dataset
from peerd.training.errors import BadCheckpoint
from peerd.training.run import Progress, TrainedModel
from peerd.training.settings import JobSettings
from peerd.training.trainer import PREFIX, PROMPTS, Blocks, Trainer

if TYPE_CHECKING:
    from blocks.engine.trainable import Trainable

OpenTrained = Callable[[str | None], Awaitable[TrainedModel]]


class CountedBlocks(Blocks, Protocol):
    """`peerd.calls.caller.BatchCaller`."""

    @property
    def servers_lost(self) -> int: ...


class DeviceLearner:
    """Masters and optimizer in the device's thread, reached by messages: the loop never touches a tensor."""

    def __init__(self, device: OwnDevice, trainable: Trainable) -> None:
        self._device = device
        self._trainable = trainable

    async def values(self) -> Mapping[str, Part]:
        found: list[Mapping[str, Part]] = []
        await self._device.call(lambda runner: found.append(self._trainable.parts()))
        return found[0]

    async def step(self, gradients: Mapping[str, Part], rate: float) -> bool:
        taken: list[bool] = []
        await self._device.call(lambda runner: taken.append(not self._trainable.step(gradients, rate).skipped))
        return taken[0]

    async def seen(self) -> int:
        found: list[int] = []
        await self._device.call(lambda runner: found.append(self._trainable.taken + self._trainable.skipped))
        return found[0]

    async def state(self) -> bytes:
        found: list[bytes] = []
        await self._device.call(lambda runner: found.append(self._trainable.state()))
        return found[0]


@dataclass(frozen=True, slots=True)
class NodeWorkshop:
    """`peerd.training.run.Workshop` of a node, from its parts."""

    clock: Clock
    device: OwnDevice
    blocks: CountedBlocks
    opening: OpenTrained
    adapters: AdapterStore

    async def open_trained(self, name: str | None) -> TrainedModel:
        """Raises PeerdError: a retryable one, or ``unknown-model``, while the model is not there yet."""
        return await self.opening(name)

    def servers_lost(self) -> int:
        """How many calls were lost with their server so far."""
        return self.blocks.servers_lost

    def has_adapter(self, name: str) -> bool:
        """Whether the name is taken."""
        return self.adapters.has(name)

    async def keep_adapter(
        self, model: TrainedModel, settings: JobSettings, values: Mapping[str, Part], progress: Progress
    ) -> None:
        """In place of one of its name: a job that ended but could not note it makes it again. Raises AdapterNotSaved."""
        name, shape, prefix = settings.name, model.shape, values[PREFIX]
        trained = {"settings": settings.document(), "progress": progress.document()}
        if PROMPTS in values:
            await asyncio.to_thread(
                self.adapters.save_deep_prompt, name, shape, prefix, values[PROMPTS], trained, replace=True
            )
        else:
            await asyncio.to_thread(self.adapters.save_prompt, name, shape, prefix, trained, replace=True)

    async def make_learner(
        self, settings: JobSettings, initial: Mapping[str, Part], state: bytes | None
    ) -> DeviceLearner:
        """From the initial values, or from what a checkpoint holds. Raises BadCheckpoint."""
        made: list[Trainable] = []

        def make() -> None:
            from blocks.engine.trainable import AdamW, Trainable

            how = AdamW(weight_decay=settings.weight_decay, clip=settings.clip)
            made.append(Trainable(initial, how) if state is None else Trainable.from_state(state, how))

        try:
            await self.device.call(lambda runner: make())
        except ValueError as error:
            raise BadCheckpoint(f"The checkpoint of {settings.name} can't be read ({error}); train again.") from error
        return DeviceLearner(self.device, made[0])

    def make_trainer(self, model: TrainedModel, settings: JobSettings, dataset: Dataset, plan: Plan) -> Trainer:
        """The arithmetic of one run."""
        return Trainer(
            self.device,
            self.blocks,
            model.driver,
            model.shape.blocks,
            dataset.examples,
            plan,
            prefix_length=settings.length,
            micro_batch_tokens=settings.micro_batch,
        )
