"""One run's arithmetic: steps and evaluations of a prompt through blocks that are elsewhere.

Owns the pipeline of micro-batches (embed, forward, loss, backward, gradient), several under way so that one's forward overlaps another's
backward. Embeddings, loss and optimizer are on this node's device; blocks are `Blocks`'. Knows nothing of files, jobs or HTTP. What it
computes depends on its arguments alone: micro-batches are cut by settings, gradients are summed in their order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from blocks.engine.errors import DeviceBusy
from blocks.protocol.device import (
    Batch,
    Device,
    EmbedBackwardJob,
    EmbedBatchJob,
    Job,
    JobResult,
    LossJob,
)
from overlay.rpc.types import Part
from peerd.driving import DriverModel
from peerd.in_order import in_order
from peerd.training import limits
from peerd.training.batches import MicroBatch, Plan, cut, pack
from peerd.training.dataset import Example
from peerd.training.gradients import mean, narrowed
from routing.types import Span

Result = TypeVar("Result")
PREFIX, PROMPTS = "prefix", "prompts"
"""The trained tensors: (length, d_embedding) in front of the tokens; (blocks, length, d_model) added before every block."""


class BlockGradients(Protocol):
    """`peerd.calls.caller.Gradients`."""

    @property
    def hidden(self) -> Part: ...
    @property
    def prompts(self) -> Part | None: ...


class Blocks(Protocol):
    """`peerd.calls.caller.BatchCaller`, as far as a run needs it."""

    async def forward(
        self, model: DriverModel, span: Span, batch: Batch, *, keep_tape: bool = False, wait_s: float = 60.0
    ) -> tuple[Part, Any]: ...
    async def backward(
        self, model: DriverModel, span: Span, tape: Any, grad: Part, *, wait_s: float = 60.0
    ) -> BlockGradients: ...


class Learner(Protocol):
    """The float32 masters and their optimizer."""

    async def values(self) -> Mapping[str, Part]: ...
    async def step(self, gradients: Mapping[str, Part], rate: float) -> bool:
        """Returns whether the step was taken; one with gradients that are not finite isn't."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What came of one step: ``loss`` is the mean over the tokens that count; ``taken`` is False where it was skipped."""

    loss: float
    tokens: int
    taken: bool


@dataclass(frozen=True, slots=True)
class _Learned:
    loss: float
    gradients: dict[str, Part]


class Trainer:
    """See the module. ``examples`` are all of the dataset; ``plan`` says which of them when."""

    def __init__(
        self,
        device: Device,
        blocks: Blocks,
        model: DriverModel,
        block_count: int,
        examples: Sequence[Example],
        plan: Plan,
        *,
        prefix_length: int,
        micro_batch_tokens: int,
        wait_s: float = limits.BLOCKS_WAIT_S,
    ) -> None:
        self._device = device
        self._blocks = blocks
        self._model = model
        self._span = Span(0, block_count)
        self._examples = examples
        self._plan = plan
        self._prefix_length = prefix_length
        self._micro_batch_tokens = micro_batch_tokens
        self._wait_s = wait_s

    async def step(self, step: int, learner: Learner, rate: float, scale: float = 1.0) -> StepReport:
        """One optimizer step. Repeatable after an error: nothing changes before all gradients are there.

        Backward begins with the gradient of ``scale`` x the *sum* of losses; scale and the batch's count divide once, in float32, where
        nothing underflows.

        Raises:
            PeerdError: as `Blocks.forward`; retryable when blocks are missing.
        """
        values = await learner.values()
        micros = self._micro_batches(self._plan.examples_of(step), self._prefix_length)
        count = sum(micro.count for micro in micros)
        learned = await in_order(
            [self._learning(micro, values, scale) for micro in micros], at_once=limits.MICRO_BATCHES_AHEAD
        )
        gradients = {
            name: mean(name, [each.gradients[name] for each in learned], scale * count) for name in sorted(values)
        }
        taken = await learner.step(gradients, rate)
        loss = sum(each.loss for each in learned) / count
        return StepReport(loss, sum(micro.real_tokens for micro in micros), taken)

    async def evaluate(self, learner: Learner | None) -> float | None:
        """The mean loss on the examples that are never trained on; without a learner, of the bare model. None where there are none."""
        if not self._plan.evaluation:
            return None
        values = {} if learner is None else await learner.values()
        micros = self._micro_batches(self._plan.evaluation, 0 if learner is None else self._prefix_length)
        losses = await in_order(
            [self._evaluating(micro, values) for micro in micros], at_once=limits.MICRO_BATCHES_AHEAD
        )
        return sum(losses) / sum(micro.count for micro in micros)

    def _micro_batches(self, indices: Sequence[int], prefix: int) -> list[MicroBatch]:
        examples = [self._examples[index] for index in indices]
        lengths = [len(example.tokens) for example in examples]
        # The prefix counts even where there is none, so that an evaluation is cut alike with and without it.
        cuts = cut(lengths, self._prefix_length, self._micro_batch_tokens)
        return [pack([examples[index] for index in each], prefix) for each in cuts]

    def _learning(
        self, micro: MicroBatch, values: Mapping[str, Part], scale: float
    ) -> Callable[[], Coroutine[Any, Any, _Learned]]:
        async def learn() -> _Learned:
            key, prefix = self._model.key, values[PREFIX]
            batch = await self._embedded(micro, values)
            output, tape = await self._blocks.forward(
                self._model, self._span, batch, keep_tape=True, wait_s=self._wait_s
            )
            lost = await self._run(LossJob(key, output, micro.labels, scale))
            found = await self._blocks.backward(
                self._model, self._span, tape, replace(_there(lost.hidden), name="grad"), wait_s=self._wait_s
            )
            embedded = await self._run(EmbedBackwardJob(key, micro.tokens, prefix, found.hidden))
            gradients = {PREFIX: _there(embedded.prompts)}
            if PROMPTS in values:
                gradients[PROMPTS] = _there(found.prompts)
            return _Learned(_there(lost.loss), gradients)

        return learn

    def _evaluating(self, micro: MicroBatch, values: Mapping[str, Part]) -> Callable[[], Coroutine[Any, Any, float]]:
        async def evaluate() -> float:
            batch = await self._embedded(micro, values)
            output, _ = await self._blocks.forward(self._model, self._span, batch, wait_s=self._wait_s)
            return _there((await self._run(LossJob(self._model.key, output, micro.labels))).loss)

        return evaluate

    async def _embedded(self, micro: MicroBatch, values: Mapping[str, Part]) -> Batch:
        prompts = values.get(PROMPTS)
        result = await self._run(EmbedBatchJob(self._model.key, micro.tokens, values.get(PREFIX)))
        dtype = self._model.compute_class.dtype
        return Batch(_there(result.hidden), micro.mask, prompts=None if prompts is None else narrowed(prompts, dtype))

    async def _run(self, job: Job) -> JobResult:
        """A job on this node's device; a full queue is waited for. Raises the job's error."""
        for _ in range(limits.BUSY_TRIES_MAX):
            done: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
            self._device.submit((job,), lambda result, done=done: None if done.done() else done.set_result(result))  # type: ignore[misc]
            result = await done
            if not isinstance(result.error, DeviceBusy):
                break
            await asyncio.sleep(limits.RETRY_S)
        if result.error is not None:
            raise result.error
        return result


def _there(value: Result | None) -> Result:
    """What a finished job promises."""
    assert value is not None, "the device left out what the job promises"
    return value
