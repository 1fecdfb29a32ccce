"""One job from its dataset to its adapter: resume, evaluate, step, checkpoint, evaluate, keep.

Owns the order of these and what is told meanwhile. The arithmetic is `peerd.training.trainer`'s, files are `job_directory`'s and
`checkpoint`'s, models and adapters come through `Workshop`. Must not know of other jobs or of HTTP.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from overlay.errors import PeerdError
from overlay.ports import Clock
from overlay.rpc.types import Part
from peerd.adapters.adapter import ModelShape
from peerd.driving import DriverModel
from peerd.training import limits
from peerd.training.batches import Plan, initial_values, make_plan
from peerd.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from peerd.training.dataset import Codec, Dataset, read_dataset
from peerd.training.errors import BadCheckpoint, Diverged
from peerd.training.job_directory import JobDirectory, Record
from peerd.training.loss_scale import LossScale
from peerd.training.schedule import learning_rate
from peerd.training.settings import DEEP_PROMPT, JobSettings
from peerd.training.trainer import PREFIX, PROMPTS, Learner, StepReport, Trainer

log = logging.getLogger(__name__)
Result = TypeVar("Result")
SHOWN_CHARS = 24
"""Of a digest, or a compute class, in a sentence."""


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A model that a job can train for: what a driver knows of it, its tokenizer and its shape."""

    shape: ModelShape
    driver: DriverModel
    codec: Codec

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def model_id(self) -> str:
        return self.shape.model_id


class KeptLearner(Learner, Protocol):
    """A learner that goes into checkpoints."""

    async def seen(self) -> int:
        """Steps that it took or skipped."""

    async def state(self) -> bytes:
        """Masters and moments, exactly, as safetensors."""


class Workshop(Protocol):
    """What the node lends to a run."""

    @property
    def clock(self) -> Clock: ...
    async def open_trained(self, name: str | None) -> TrainedModel:
        """Raises PeerdError: a retryable one, or ``unknown-model``, while the model is not there yet."""

    async def make_learner(
        self, settings: JobSettings, initial: Mapping[str, Part], state: bytes | None
    ) -> KeptLearner:
        """From initial values, or from the state of a checkpoint."""

    def make_trainer(self, model: TrainedModel, settings: JobSettings, dataset: Dataset, plan: Plan) -> Trainer: ...
    def servers_lost(self) -> int:
        """How many calls of this node were lost with their server so far."""

    def has_adapter(self, name: str) -> bool: ...
    async def keep_adapter(
        self, model: TrainedModel, settings: JobSettings, values: Mapping[str, Part], progress: Progress
    ) -> None:
        """Make the adapter, in place of one that this very job made before."""


@dataclass(slots=True)
class Progress:
    """What people see of a run. ``loss`` is the last step's; ``skipped`` counts steps that were not finite.

    ``server_losses`` counts calls that were lost with their server, and repeated elsewhere.
    """

    step: int = 0
    steps: int = 0
    steps_per_epoch: int = 1
    loss: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    skipped: int = 0
    server_losses: int = 0
    examples: int = 0
    lines_skipped: int = 0
    eval_before: float | None = None
    eval_after: float | None = None

    def document(self) -> dict[str, Any]:
        """As JSON has it; what is not finite is null."""
        return {
            "step": self.step,
            "steps": self.steps,
            "epoch": min(self.step // self.steps_per_epoch, max(0, self.steps // self.steps_per_epoch - 1)),
            "loss": _finite(self.loss),
            "tokens_per_s": _rounded(self.tokens_per_s),
            "eta_s": _rounded(self.eta_s),
            "skipped": self.skipped,
            "server_losses": self.server_losses,
            "examples": self.examples,
            "lines_skipped": self.lines_skipped,
            "eval_before": _finite(self.eval_before),
            "eval_after": _finite(self.eval_after),
        }


class Told(Protocol):
    """Who hears of a run."""

    def changed(self) -> None:
        """The progress has new figures; the run computes."""

    def waits(self, reason: str) -> None:
        """Nothing moves until others come."""


def longest_example(model: TrainedModel, settings: JobSettings) -> int:
    """How many tokens an example may have: what the context leaves beside the prompt, or less if the settings say so."""
    room = model.driver.max_positions - settings.length
    return room if settings.max_length is None else min(room, settings.max_length)


def read_for(model: TrainedModel, settings: JobSettings, created_s: float, data: bytes) -> Dataset:
    """The dataset as this job sees it, always the same. Raises BadDataset."""
    return read_dataset(
        data,
        model.codec,
        max_tokens=longest_example(model, settings),
        now=datetime.fromtimestamp(created_s, UTC),
        skip_bad=settings.skip_bad,
    )


def initial_of(settings: JobSettings, model: TrainedModel) -> dict[str, Part]:
    """The values that training starts from: a small random prefix; nothing yet before the blocks."""
    values = {PREFIX: initial_values(settings.seed, settings.length, model.shape.embedding_width)}
    if settings.method == DEEP_PROMPT:
        shape = (model.shape.blocks, settings.length, model.driver.width)
        values[PROMPTS] = Part(PROMPTS, "float32", shape, bytes(4 * math.prod(shape)))
    return values


class Run:
    """See the module. `run` may be cancelled at any time: what a checkpoint holds is never lost, and `keep` adds what came after it."""

    def __init__(
        self, record: Record, directory: JobDirectory, workshop: Workshop, progress: Progress, told: Told
    ) -> None:
        self._record = record
        self._settings = record.settings
        self._directory = directory
        self._workshop = workshop
        self._progress = progress
        self._told = told
        self._times: deque[tuple[float, int]] = deque(maxlen=limits.SPEED_STEPS + 1)
        self._bad_in_a_row = 0
        self._scale = LossScale()
        self._learner: KeptLearner | None = None
        self._kept_step = 0
        """That of the last checkpoint."""
        self._lost_before = workshop.servers_lost()

    async def run(self) -> None:
        """To the end. Raises the PeerdError that ends the job otherwise."""
        settings, progress = self._settings, self._progress
        model = await self._patiently(
            functools.partial(self._workshop.open_trained, settings.model), ("unknown-model",)
        )
        data = await asyncio.to_thread(self._directory.dataset)
        self._check_same(model, data)
        dataset = await asyncio.to_thread(read_for, model, settings, self._record.created_s, data)
        plan = plan_of(settings, len(dataset.examples))
        progress.steps, progress.steps_per_epoch = plan.steps, plan.steps_per_epoch
        progress.examples, progress.lines_skipped = len(dataset.examples), dataset.skipped_count
        self._scale = LossScale.of(model.driver.compute_class.dtype)
        learner = await self._resumed(model)
        self._learner = learner
        trainer = self._workshop.make_trainer(model, settings, dataset, plan)
        if progress.eval_before is None:
            progress.eval_before = await self._patiently(functools.partial(trainer.evaluate, None))
            self._told.changed()
        await self._train(trainer, learner, plan)
        progress.eval_after = await self._patiently(functools.partial(trainer.evaluate, learner))
        await self._workshop.keep_adapter(model, settings, await learner.values(), progress)

    async def keep(self) -> None:
        """Write a checkpoint of the steps since the last one, for a process that stops; after `run` was cancelled. Raises PeerdError."""
        learner, step = self._learner, self._progress.step
        if learner is None or step == self._kept_step:
            return
        if await learner.seen() != step:  # cancelled in the moment of the step itself: that one runs again
            return
        await self._checkpoint(learner)
        log.info("job %s is kept as of step %d", self._settings.name, step)

    def _check_same(self, model: TrainedModel, data: bytes) -> None:
        """Another model, class or dataset trains another curve."""
        record = self._record
        now = (model.model_id, str(model.driver.compute_class), hashlib.sha256(data).hexdigest())
        for what, before, found in zip(
            ("model", "compute class", "dataset"),
            (record.model, record.compute_class, record.dataset_sha256),
            now,
            strict=True,
        ):
            if before != found:
                raise BadCheckpoint(
                    f"The {what} is not the one that this job began with ({found[:SHOWN_CHARS]}, not {before[:SHOWN_CHARS]}); train again."
                )

    async def _resumed(self, model: TrainedModel) -> KeptLearner:
        """The learner as of the last checkpoint, or a new one; the progress goes with it."""
        progress = self._progress
        checkpoint = await asyncio.to_thread(load_checkpoint, self._directory.path)
        initial = initial_of(self._settings, model)
        if checkpoint is None:
            progress.step, progress.skipped = 0, 0
            await asyncio.to_thread(self._directory.rewind_losses, 0)
            return await self._workshop.make_learner(self._settings, initial, None)
        self._restore(checkpoint)
        self._lost_before -= progress.server_losses
        progress.loss = await asyncio.to_thread(self._directory.rewind_losses, checkpoint.step)
        log.info("job %s goes on after step %d", self._settings.name, checkpoint.step)
        return await self._workshop.make_learner(self._settings, initial, checkpoint.tensors)

    def _restore(self, checkpoint: Checkpoint) -> None:
        progress, state = self._progress, checkpoint.state
        try:
            progress.skipped, progress.server_losses = int(state["skipped"]), int(state["server_losses"])
            progress.eval_before = state["eval_before"]
            self._scale = self._scale.restored(state["loss_scale"])
            same = state["generator"] == self._generator(checkpoint.step)
        except (KeyError, ValueError, TypeError) as error:
            raise BadCheckpoint(
                f"The checkpoint of {self._settings.name} can't be read (no {error} in it); train again."
            ) from error
        if not same:
            raise BadCheckpoint(f"The checkpoint of {self._settings.name} is of another seed; train again.")
        progress.step = self._kept_step = checkpoint.step

    def _generator(self, step: int) -> dict[str, int]:
        """All the state of a counter-based generator: where the order of the examples stands after ``step`` steps."""
        epoch, taken = divmod(step, self._progress.steps_per_epoch)
        return {"seed": self._settings.seed, "epoch": epoch, "steps_of_epoch": taken}

    async def _train(self, trainer: Trainer, learner: KeptLearner, plan: Plan) -> None:
        settings, progress = self._settings, self._progress
        self._times.append((self._workshop.clock.now(), 0))
        for step in range(progress.step, plan.steps):
            rate = learning_rate(
                step, steps=plan.steps, peak=settings.lr, warmup=settings.warmup, schedule=settings.schedule
            )
            report = await self._patiently(functools.partial(trainer.step, step, learner, rate, self._scale.value))
            self._scale = self._scale.after(report.taken)
            self._directory.log_loss(step, report.loss)
            self._stepped(step, report)
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == plan.steps:
                await self._checkpoint(learner)
            self._told.changed()

    def _stepped(self, step: int, report: StepReport) -> None:
        progress = self._progress
        progress.step, progress.loss = step + 1, report.loss
        self._times.append((self._workshop.clock.now(), report.tokens))
        took_s = self._times[-1][0] - self._times[0][0]
        if took_s > 0:
            progress.tokens_per_s = sum(tokens for _, tokens in list(self._times)[1:]) / took_s
            progress.eta_s = took_s / (len(self._times) - 1) * (progress.steps - progress.step)
        self._bad_in_a_row = 0 if report.taken else self._bad_in_a_row + 1
        progress.skipped += not report.taken
        if self._bad_in_a_row >= limits.FAILED_STEPS_MAX:
            raise Diverged(
                f"{self._bad_in_a_row} steps in a row gave values that are not finite; train with a lower --lr."
            )

    async def _checkpoint(self, learner: KeptLearner) -> None:
        progress = self._progress
        state = {
            "skipped": progress.skipped,
            "server_losses": progress.server_losses,
            "eval_before": progress.eval_before,
            "loss_scale": self._scale.document(),
            "generator": self._generator(progress.step),
        }
        checkpoint = Checkpoint(progress.step, await learner.state(), state)
        await asyncio.to_thread(_saved, self._directory, checkpoint)
        self._kept_step = checkpoint.step

    async def _patiently(self, work: Callable[[], Awaitable[Result]], also: tuple[str, ...] = ()) -> Result:
        """Try until it works: others' absence is waited for, however long; an error that waiting can't help ends the job."""
        waiting = False
        while True:
            try:
                result = await work()
            except PeerdError as error:
                if not error.retryable and error.code not in also:
                    raise
                if not waiting:
                    log.info("job %s waits: %s", self._settings.name, error)
                waiting = True
                self._told.waits(str(error))
                await asyncio.sleep(limits.RETRY_S)
                continue
            finally:
                self._progress.server_losses = self._workshop.servers_lost() - self._lost_before
            if waiting:
                self._times.clear()
                self._times.append((self._workshop.clock.now(), 0))
            return result


def plan_of(settings: JobSettings, examples: int) -> Plan:
    """The steps of a job. Settings and dataset decide them."""
    return make_plan(
        examples, batch=settings.batch, epochs=settings.epochs, seed=settings.seed, eval_split=settings.eval_split
    )


def _saved(directory: JobDirectory, checkpoint: Checkpoint) -> None:
    directory.sync_losses()
    save_checkpoint(directory.path, checkpoint)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
