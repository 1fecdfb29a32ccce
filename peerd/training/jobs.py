"""The jobs of this node: one runs, others queue, all survive the process.

Owns names, states and their changes, the queue, and who watches. What a job does is `peerd.training.run`'s. A job that was running when the
process ended, however it ended, is queued again at the next start and goes on from its checkpoint. Must not know of HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from overlay.errors import PeerdError
from overlay.ports import WallClock
from peerd.training import limits
from peerd.training.errors import BadDataset, JobEnded, JobExists, TooManyJobs, UnknownJob
from peerd.training.job_directory import JobDirectory, JobState, Record, load_jobs
from peerd.training.run import Progress, Run, TrainedModel, Workshop, plan_of, read_for
from peerd.training.settings import JobSettings

log = logging.getLogger(__name__)

HALF = (
    "The model is served in float16, whose range is small: the loss is scaled for that, and steps that overflow are skipped; servers "
    "with --dtype bfloat16 or float32 need neither."
)


class Job:
    """One job as this process knows it. `document` is what people see."""

    def __init__(self, record: Record, directory: JobDirectory) -> None:
        self.record = record
        self.directory = directory
        self.progress = Progress()
        self.task: asyncio.Task[None] | None = None
        self.cancelling = False
        self.news = asyncio.Event()
        """Set at the next change; there is a new one after that."""

    @property
    def name(self) -> str:
        return self.record.settings.name

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        record = self.record
        # After a restart the progress is empty until the job's turn comes: then what was last known is shown.
        known = record.result and (record.state.is_final or not self.progress.steps)
        return {
            "name": self.name,
            "state": record.state.value,
            "reason": record.reason,
            "model_id": record.model,
            "created": int(record.created_s),
            "settings": record.settings.document(),
            "progress": record.result if known else self.progress.document(),
            "warning": HALF if "/float16/" in record.compute_class else "",
        }

    def entered(self, state: JobState, reason: str = "") -> Record:
        """The record in another state, on disk where that outlives the process; nobody hears of it before `become`."""
        result = self.progress.document() if state.is_final else self.record.result
        changed = replace(self.record, state=state, reason=reason, result=result)
        if state.is_final or self.record.state.is_final:
            self.directory.save(changed)
        return changed

    def become(self, record: Record) -> None:
        """Take the record that `entered` gave, and tell."""
        self.record = record
        self.tell()

    # --- peerd.training.run.Told ---

    def changed(self) -> None:
        """New figures: so it runs."""
        if self.record.state is not JobState.RUNNING:
            self.record.state, self.record.reason = JobState.RUNNING, ""
        self.tell()

    def waits(self, reason: str) -> None:
        """Nothing moves; ``reason`` says for what."""
        if (self.record.state, self.record.reason) != (JobState.WAITING, reason):
            self.record.state, self.record.reason = JobState.WAITING, reason
            self.tell()

    def tell(self) -> None:
        """Wake whoever watches."""
        self.news.set()
        self.news = asyncio.Event()

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The document now and at every change, up to the one with a final state. A slow reader misses some in between."""
        while True:
            news = self.news
            document = self.document()
            yield document
            if self.record.state.is_final:
                return
            await news.wait()


class Jobs:
    """See the module. `run` is the background task; the rest is for the local API."""

    def __init__(self, directory: Path, workshop: Workshop, wall_clock: WallClock) -> None:
        self._directory = directory
        self._workshop = workshop
        self._wall_clock = wall_clock
        self._jobs: dict[str, Job] = {}
        self._wake = asyncio.Event()
        self._submitting = asyncio.Lock()
        """One at a time, so that a name that was free stays so until it is taken."""

    def load(self) -> None:
        """Find the jobs of earlier processes; those that had not ended are queued."""
        for record in load_jobs(self._directory):
            job = Job(record, JobDirectory(self._directory, record.settings.name))
            if not record.state.is_final:
                record.state = JobState.QUEUED
            self._jobs[job.name] = job

    async def run(self) -> None:
        """Run what is queued, one after the other, without end; cancelling it leaves the running job to the next process."""
        while True:
            job = self._next()
            if job is None:
                await self._wake.wait()
                self._wake.clear()
                continue
            job.task = asyncio.get_running_loop().create_task(self._live(job), name=f"job {job.name}")
            try:
                await asyncio.wait({job.task})
            finally:
                job.task.cancel()
                await asyncio.gather(job.task, return_exceptions=True)
                job.task = None

    def _next(self) -> Job | None:
        queued = [job for job in self._jobs.values() if job.record.state is JobState.QUEUED]
        return min(queued, key=lambda job: job.record.number, default=None)

    async def _live(self, job: Job) -> None:
        """A job's life; its errors are its own."""
        try:
            await self._to_the_end(job)
        except PeerdError as error:
            log.warning("job %s failed: %s", job.name, error)
            self._fail(job, str(error))
        except Exception:  # the supervision point of jobs: a bug in one ends that one
            log.exception("job %s failed", job.name)
            self._fail(job, "The daemon failed to run this job; its log says why.")

    async def _to_the_end(self, job: Job) -> None:
        run = Run(job.record, job.directory, self._workshop, job.progress, job)
        job.changed()
        try:
            await run.run()
            await self._end(job, JobState.DONE)
            log.info("job %s is done", job.name)
        except asyncio.CancelledError:
            if not job.cancelling:
                await self._keep(run, job.name)
                raise
            await self._end(job, JobState.CANCELLED)

    async def _keep(self, run: Run, name: str) -> None:
        """The daemon stops: what was trained since the last checkpoint shall not be trained again."""
        try:
            async with asyncio.timeout(limits.KEEP_S):
                await run.keep()
        except (PeerdError, TimeoutError) as error:
            log.warning("job %s goes on from its last checkpoint at the next start: %s", name, error)

    async def _end(self, job: Job, state: JobState) -> None:
        """The end of a job that keeps nothing; it is on disk before anything is freed, and all is freed before anybody hears."""
        try:
            ended = job.entered(state)
        except PeerdError:  # a full disk: what the job held makes room
            await asyncio.to_thread(job.directory.free)
            ended = job.entered(state)
        await asyncio.to_thread(job.directory.free)
        job.become(ended)

    def _fail(self, job: Job, reason: str) -> None:
        try:
            job.become(job.entered(JobState.FAILED, reason))
        except PeerdError as error:  # a full disk takes no note of it either; what is there is a job to resume
            log.warning("job %s: %s", job.name, error)
            job.become(replace(job.record, state=JobState.FAILED, reason=reason, result=job.progress.document()))

    # --- what people ask for ---

    def list(self) -> tuple[Job, ...]:
        """Every job, the oldest first."""
        return tuple(sorted(self._jobs.values(), key=lambda job: job.record.number))

    def get(self, name: str) -> Job:
        """Raises UnknownJob."""
        job = self._jobs.get(name)
        if job is None:
            raise UnknownJob(f"There is no job {name[: limits.QUOTED_CHARS]!r}; `peerctl jobs` lists those there are.")
        return job

    async def submit(self, settings: JobSettings, dataset: bytes) -> Job:
        """Check everything, keep the job on disk, and queue it.

        Raises:
            PeerdError: what is wrong with the settings, the dataset or the model; then nothing is kept.
        """
        self._check_free(settings.name)
        model = await self._opened(settings.model)
        async with self._submitting:
            return await self._take_in(model, settings, dataset)

    async def _take_in(self, model: TrainedModel, settings: JobSettings, dataset: bytes) -> Job:
        self._check_free(settings.name)  # again: another request may have come in meanwhile
        settings = replace(settings, model=model.name)
        created_s = self._wall_clock.now_s()
        if settings.length >= model.driver.max_positions - 1:
            raise BadDataset(
                f"A prompt of {settings.length} rows leaves no room in the context of {model.driver.max_positions}; choose a shorter one."
            )
        read = await asyncio.to_thread(read_for, model, settings, created_s, dataset)
        steps = plan_of(settings, len(read.examples)).steps
        if steps > limits.STEPS_MAX:
            raise BadDataset(
                f"This job has {steps} steps, over {limits.STEPS_MAX}; choose fewer epochs or larger batches."
            )
        number = 1 + max((job.record.number for job in self._jobs.values()), default=0)
        digest = hashlib.sha256(dataset).hexdigest()
        record = Record(settings, model.model_id, str(model.driver.compute_class), digest, number, created_s)
        job = Job(record, JobDirectory(self._directory, settings.name))
        job.progress.steps, job.progress.examples = steps, len(read.examples)
        job.progress.lines_skipped = read.skipped_count
        record.result = job.progress.document()
        await asyncio.to_thread(job.directory.write_aside, record, dataset)
        job.directory.enter()
        self._jobs[job.name] = job
        self._wake.set()
        return job

    async def _opened(self, name: str | None) -> TrainedModel:
        """The model, also if this daemon is only about to know it. Raises PeerdError."""
        clock = self._workshop.clock
        deadline = clock.now() + limits.OPEN_WAIT_S
        while True:
            try:
                return await self._workshop.open_trained(name)
            except PeerdError as error:
                if not error.retryable or clock.now() >= deadline:
                    raise
            await asyncio.sleep(limits.OPEN_RETRY_S)

    def _check_free(self, name: str) -> None:
        old = self._jobs.get(name)
        if old is not None and not old.record.state.is_final:
            raise JobExists(f"There is a job {name!r} already ({old.record.state.value}); choose another name.")
        if old is not None and old.record.state is JobState.FAILED:
            raise JobExists(
                f"There is a failed job {name!r}; go on with it by `peerctl jobs resume {name}`, or give it up by "
                f"`peerctl jobs cancel {name}`."
            )
        if self._workshop.has_adapter(name):
            raise JobExists(
                f"There is an adapter {name!r} already; choose another name, or `peerctl adapters remove {name}`."
            )
        waiting = sum(not job.record.state.is_final for job in self._jobs.values())
        if waiting >= limits.QUEUED_MAX:
            raise TooManyJobs(f"There are {waiting} jobs that haven't ended; wait for one, or cancel one.")
        if old is None and len(self._jobs) >= limits.JOBS_MAX:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        for job in self.list():
            if job.record.state in (JobState.DONE, JobState.CANCELLED):
                job.directory.remove()
                del self._jobs[job.name]
                return
        raise TooManyJobs(f"There are {len(self._jobs)} failed jobs; cancel some.")

    async def cancel(self, name: str) -> Job:
        """End a job and free all it holds; a failed one is given up. Raises UnknownJob, JobEnded."""
        job = self.get(name)
        if job.record.state in (JobState.DONE, JobState.CANCELLED):
            raise JobEnded(f"The job {name!r} is {job.record.state.value} already.")
        if job.task is not None:
            job.cancelling = True
            job.task.cancel()
            await asyncio.wait({job.task})
        else:
            await self._end(job, JobState.CANCELLED)
        return job

    def resume(self, name: str) -> Job:
        """Queue a failed job again; it goes on from its last checkpoint. Raises UnknownJob, JobEnded."""
        job = self.get(name)
        if job.record.state is not JobState.FAILED:
            raise JobEnded(f"The job {name!r} is {job.record.state.value}; only a failed one can be resumed.")
        job.become(job.entered(JobState.QUEUED))
        self._wake.set()
        return job
