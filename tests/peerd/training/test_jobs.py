from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerd.durable import write_synced
from peerd.training import checkpoint, job_directory, limits
from peerd.training.errors import BadDataset, JobEnded, JobExists, TooManyJobs, UnknownJob
from peerd.training.job_directory import DATASET, JOB, LOSSES, JobState
from peerd.training.jobs import Job, Jobs
from peerd.training.settings import JobSettings
from tests.peerd.training.workbench import LINES, Clock, Unserved, Workbench


def settings(name: str = "one", **more: Any) -> JobSettings:
    return JobSettings(name, **{"length": 2, "epochs": 2, "batch": 4, "checkpoint_every": 3, **more})


@contextlib.asynccontextmanager
async def running(directory: Path, bench: Workbench) -> AsyncIterator[Jobs]:
    """Jobs of one process; leaving cancels them where they are, as a process that ends would."""
    jobs = Jobs(directory, bench, Clock())
    jobs.load()
    task = asyncio.create_task(jobs.run())
    try:
        async with asyncio.timeout(5):
            yield jobs
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def held_at(step: int | None, directory: Path, **more: Any) -> AsyncIterator[Jobs]:
    """Jobs of a process whose job came to this step (None: to its first) and never goes on."""
    reached = asyncio.Event()

    def hold(at: int) -> Any:
        if step is None or at == step:
            reached.set()
            return asyncio.Event().wait()
        return None

    async with running(directory, Workbench(hold, **more)) as jobs:
        await jobs.submit(settings(), LINES)
        await reached.wait()
        yield jobs


async def ended(job: Job) -> dict[str, Any]:
    return [document async for document in job.events()][-1]


def whole_run(directory: Path, bench: Workbench, **more: Any) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        async with running(directory, bench) as jobs:
            return await ended(await jobs.submit(settings(**more), LINES))

    return asyncio.run(run())


def losses(directory: Path, name: str = "one") -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / name / LOSSES).read_bytes().splitlines()]


def test_a_job_runs_to_its_adapter_and_frees_what_it_needs_no_more(tmp_path: Path) -> None:
    bench = Workbench()
    job = whole_run(tmp_path, bench)
    assert (job["state"], job["progress"]["step"], job["progress"]["steps"]) == ("done", 10, 10)
    assert job["progress"]["eval_before"] == 1.0
    assert job["progress"]["eval_after"] == pytest.approx(float(np.abs(bench.adapters["one"]).sum()))
    assert job["progress"]["tokens_per_s"] > 0
    assert len(losses(tmp_path)) == 10
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["job.json", LOSSES]


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.parametrize("lost_at", range(10))
def test_a_job_that_lost_its_process_at_any_step_ends_as_if_it_had_not(
    tmp_path: Path, lost_at: int, killed: bool
) -> None:
    undisturbed = Workbench()
    whole_run(tmp_path / "undisturbed", undisturbed)

    async def run() -> None:
        async with held_at(lost_at, tmp_path / "lost"):
            shutil.copytree(tmp_path / "lost", tmp_path / "killed")  # what there is on disk in this moment
        left = tmp_path / ("killed" if killed else "lost")
        resumed = Workbench()
        async with running(left, resumed) as jobs:
            assert (await ended(jobs.get("one")))["state"] == "done"
        # From the last checkpoint, not from the start; one that was stopped in good order made one.
        assert resumed.steps[0] == ("one", lost_at // 3 * 3 if killed else lost_at)
        assert np.array_equal(resumed.adapters["one"], undisturbed.adapters["one"])

    asyncio.run(run())
    assert losses(tmp_path / ("killed" if killed else "lost")) == losses(tmp_path / "undisturbed")


def test_a_job_that_is_stopped_in_the_moment_of_a_step_runs_that_step_again(tmp_path: Path) -> None:
    async def run() -> None:
        stepped = asyncio.Event()

        class Interrupted(Workbench):
            def make_trainer(self, *given: Any) -> Any:
                made = super().make_trainer(*given)
                step = made.step

                async def step_and_stay(number: int, *more: Any) -> Any:
                    report = await step(number, *more)
                    if number == 4:  # the values are new, and nobody knows yet
                        stepped.set()
                        await asyncio.Event().wait()
                    return report

                made.step = step_and_stay
                return made

        async with running(tmp_path / "one", Interrupted()) as jobs:
            await jobs.submit(settings(), LINES)
            await stepped.wait()
        resumed = Workbench()
        async with running(tmp_path / "one", resumed) as jobs:
            await ended(jobs.get("one"))
        assert resumed.steps[0] == ("one", 3)

    asyncio.run(run())
    whole_run(tmp_path / "undisturbed", Workbench())
    assert losses(tmp_path / "one") == losses(tmp_path / "undisturbed")


def test_a_daemon_that_stops_on_a_full_disk_goes_on_from_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with held_at(5, tmp_path):
            monkeypatch.setattr(checkpoint, "write_synced", full)
        monkeypatch.undo()
        resumed = Workbench()
        async with running(tmp_path, resumed) as jobs:
            assert (await ended(jobs.get("one")))["state"] == "done"
        assert resumed.steps[0] == ("one", 3)

    asyncio.run(run())
    assert "goes on from its last checkpoint" in caplog.text


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_job_can_be_cancelled_on_a_full_disk_which_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    async def run() -> None:
        gone = asyncio.Event()

        def hold(step: int) -> Any:
            gone.set()
            return asyncio.Event().wait()

        async with running(tmp_path, Workbench(hold)) as jobs:
            await jobs.submit(settings("running"), LINES)
            await jobs.submit(settings("queued"), LINES)
            await gone.wait()

            def full_while_it_is_there(path: Path, data: bytes) -> None:
                if (tmp_path / state / DATASET).exists():
                    full(path, data)
                write_synced(path, data)

            monkeypatch.setattr(job_directory, "write_synced", full_while_it_is_there)
            assert (await jobs.cancel(state)).record.state is JobState.CANCELLED

    asyncio.run(run())
    assert json.loads((tmp_path / state / JOB).read_bytes())["state"] == "cancelled"


def full(path: Path, data: bytes) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_float16_scales_the_loss_and_a_resumed_job_goes_on_with_its_scale(tmp_path: Path) -> None:
    def overflow(step: int, vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return vector * np.float32(np.inf if step == 1 else 1)

    bench = Workbench(gradient=overflow, dtype="float16")
    job = whole_run(tmp_path / "whole", bench)
    assert bench.scales == [1024.0] * 2 + [512.0] * 8
    assert job["progress"]["skipped"] == 1

    async def run() -> None:
        async with held_at(7, tmp_path / "lost", gradient=overflow, dtype="float16"):
            pass
        resumed = Workbench(gradient=overflow, dtype="float16")
        async with running(tmp_path / "lost", resumed) as jobs:
            await ended(jobs.get("one"))
        assert resumed.scales == [512.0] * 3

    asyncio.run(run())
    plain = Workbench()
    whole_run(tmp_path / "float32", plain)
    assert set(plain.scales) == {1.0}


def test_a_job_on_float16_warns_that_gradients_may_vanish(tmp_path: Path) -> None:
    assert "float16" in whole_run(tmp_path / "half", Workbench(dtype="float16"))["warning"]
    assert whole_run(tmp_path / "whole", Workbench())["warning"] == ""


def test_another_seed_trains_another_curve(tmp_path: Path) -> None:
    for seed in (1, 2):
        whole_run(tmp_path / str(seed), Workbench(), seed=seed)
    assert losses(tmp_path / "1") != losses(tmp_path / "2")


def test_jobs_run_one_after_the_other_in_the_order_they_came(tmp_path: Path) -> None:
    bench = Workbench()

    async def run() -> None:
        async with running(tmp_path, bench) as jobs:
            made = [await jobs.submit(settings(name, epochs=1), LINES) for name in ("b", "a")]
            for job in made:
                await ended(job)

    asyncio.run(run())
    assert [name for name, _ in bench.steps] == ["b"] * 5 + ["a"] * 5


def test_a_job_without_servers_waits_and_says_for_what_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RETRY_S", 0.0)
    tries: list[int] = []

    def unserved(step: int) -> None:
        tries.append(step)
        if tries.count(2) < 3 and step == 2:
            raise Unserved("Nobody serves blocks 4:8 of demo.")

    async def run() -> None:
        async with running(tmp_path, Workbench(unserved)) as jobs:
            job = await jobs.submit(settings(), LINES)
            seen = [(each["state"], each["reason"]) async for each in job.events()]
        assert ("waiting", "Nobody serves blocks 4:8 of demo.") in seen
        assert seen[-1] == ("done", "")

    asyncio.run(run())
    assert len(losses(tmp_path)) == 10


def test_cancelling_a_running_job_frees_everything_and_its_name(tmp_path: Path) -> None:
    async def run() -> None:
        reached = asyncio.Event()

        def hold(step: int) -> Any:
            if step != 4:
                return None
            reached.set()
            return asyncio.Event().wait()

        bench = Workbench(hold)
        async with running(tmp_path, bench) as jobs:
            job = await jobs.submit(settings(), LINES)
            await reached.wait()
            assert (await jobs.cancel("one")).document()["state"] == "cancelled"
            assert (await ended(job))["state"] == "cancelled"
            assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["job.json", LOSSES]
            with pytest.raises(JobEnded, match="cancelled already"):
                await jobs.cancel("one")
            bench.before_step = lambda step: None
            assert (await ended(await jobs.submit(settings(), LINES)))["state"] == "done"

    asyncio.run(run())


def test_cancelling_a_queued_job_lets_the_running_one_be(tmp_path: Path) -> None:
    async def run() -> None:
        go_on = asyncio.Event()
        async with running(tmp_path, Workbench(lambda step: go_on.wait())) as jobs:
            first = await jobs.submit(settings("first"), LINES)
            await jobs.submit(settings("second"), LINES)
            assert (await jobs.cancel("second")).record.state is JobState.CANCELLED
            go_on.set()
            assert (await ended(first))["state"] == "done"

    asyncio.run(run())


def test_a_full_disk_fails_the_job_in_words_and_resume_goes_on_from_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = Workbench()
    whole_run(tmp_path / "undisturbed", undisturbed)
    real = checkpoint.write_synced
    full = [False]

    def write(path: Path, data: bytes) -> None:
        if full[0] and path.name == checkpoint.TENSORS:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_synced", write)

    def fill(step: int) -> None:
        full[0] = step >= 4

    async def run() -> None:
        bench = Workbench(fill)
        async with running(tmp_path / "full", bench) as jobs:
            job = await jobs.submit(settings(), LINES)
            failed = await ended(job)
            assert failed["state"] == "failed"
            assert "No space left on device" in failed["reason"]
            assert "peerctl jobs resume one" in failed["reason"]
            with pytest.raises(JobExists, match="resume one"):
                await jobs.submit(settings(), LINES)
            bench.before_step = lambda step: None
            full[0] = False
            assert (await ended(jobs.resume("one")))["state"] == "done"
        assert bench.steps.count(("one", 2)) == 1  # before the checkpoint at 3: not run again
        assert bench.steps.count(("one", 3)) == 2
        assert np.array_equal(bench.adapters["one"], undisturbed.adapters["one"])

    asyncio.run(run())
    assert losses(tmp_path / "full") == losses(tmp_path / "undisturbed")


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    def sometimes(step: int, vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return vector * np.float32(np.nan if step in (3, 5) else 1.0)

    job = whole_run(tmp_path, bench := Workbench(gradient=sometimes))
    assert (job["state"], job["progress"]["skipped"]) == ("done", 2)
    assert np.isfinite(bench.adapters["one"]).all()


def test_a_job_that_only_skips_ends_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FAILED_STEPS_MAX", 4)
    job = whole_run(tmp_path, Workbench(gradient=lambda step, vector: vector * np.float32(np.nan)))
    assert job["state"] == "failed"
    assert "lower --lr" in job["reason"]


def test_a_bug_ends_one_job_and_the_next_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(step: int) -> None:
        if not bench.steps:
            bench.steps.append(("bug", 0))
            raise ZeroDivisionError

    bench = Workbench(broken)

    async def run() -> None:
        async with running(tmp_path, bench) as jobs:
            first, second = [await jobs.submit(settings(name), LINES) for name in ("first", "second")]
            assert "its log says why" in (await ended(first))["reason"]
            assert (await ended(second))["state"] == "done"

    asyncio.run(run())
    assert "ZeroDivisionError" in caplog.text


def refused(tmp_path: Path, bench: Workbench, dataset: bytes = LINES, **more: Any) -> Exception:
    async def run() -> Exception:
        async with running(tmp_path, bench) as jobs:
            with pytest.raises(Exception) as caught:
                await jobs.submit(settings(**more), dataset)
            assert jobs.list() == ()
            return caught.value

    error = asyncio.run(run())
    assert not (tmp_path / "one").exists()
    return error


def test_a_bad_dataset_is_refused_when_it_is_handed_in_and_nothing_is_kept(tmp_path: Path) -> None:
    assert isinstance(refused(tmp_path, Workbench(), LINES + b"{\n"), BadDataset)


def test_a_prompt_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    assert "leaves no room" in str(refused(tmp_path, Workbench(), length=63))


def test_the_name_of_an_adapter_is_taken(tmp_path: Path) -> None:
    error = refused(tmp_path, Workbench(adapters={"one": np.zeros(1)}))
    assert isinstance(error, JobExists)
    assert "peerctl adapters remove one" in str(error)


def test_a_model_that_does_not_come_is_refused_with_its_own_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "OPEN_WAIT_S", 2.0)
    monkeypatch.setattr(limits, "OPEN_RETRY_S", 0.0)
    assert str(refused(tmp_path, Workbench(missing=Unserved("No model is called x.")))) == "No model is called x."


def test_a_disk_that_is_full_at_the_upload_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("peerd.training.job_directory.write_synced", full)
    assert "No space left on device" in str(refused(tmp_path, Workbench()))


def held(tmp_path: Path, check: Callable[[Jobs], Any]) -> None:
    """Run ``check`` while a job named one runs and goes no further."""

    async def run() -> None:
        async with running(tmp_path, Workbench(lambda step: asyncio.Event().wait())) as jobs:
            await jobs.submit(settings(), LINES)
            await check(jobs)

    asyncio.run(run())


def test_the_name_of_a_live_job_is_taken(tmp_path: Path) -> None:
    async def check(jobs: Jobs) -> None:
        with pytest.raises(JobExists, match="choose another name"):
            await jobs.submit(settings(), LINES)

    held(tmp_path, check)


def test_the_queue_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "QUEUED_MAX", 2)

    async def check(jobs: Jobs) -> None:
        await jobs.submit(settings("two"), LINES)
        with pytest.raises(TooManyJobs):
            await jobs.submit(settings("three"), LINES)

    held(tmp_path, check)


def test_a_job_that_is_not_there_is_said_to_be_unknown(tmp_path: Path) -> None:
    async def check(jobs: Jobs) -> None:
        for ask in (jobs.get, jobs.resume):
            with pytest.raises(UnknownJob, match="peerctl jobs"):
                ask("other")
        with pytest.raises(UnknownJob):
            await jobs.cancel("other")
        with pytest.raises(JobEnded, match="only a failed one"):
            jobs.resume("one")

    held(tmp_path, check)


@pytest.mark.parametrize("what", ["model", "dataset"])
def test_a_job_does_not_go_on_with_another_model_or_dataset(tmp_path: Path, what: str) -> None:
    async def run() -> None:
        async with held_at(None, tmp_path):
            pass
        if what == "dataset":
            (tmp_path / "one" / "dataset.jsonl").write_bytes(LINES * 2)
        async with running(tmp_path, Workbench(model_id=b"\x02" * 32 if what == "model" else b"\x01" * 32)) as jobs:
            job = await ended(jobs.get("one"))
        assert job["state"] == "failed"
        assert job["reason"].startswith(f"The {what} is not the one that this job began with")

    asyncio.run(run())


def test_done_jobs_are_remembered_by_the_next_process(tmp_path: Path) -> None:
    before = whole_run(tmp_path, Workbench())

    async def run() -> None:
        async with running(tmp_path, Workbench()) as jobs:
            assert jobs.get("one").document() == before

    asyncio.run(run())


def test_damaged_and_half_made_jobs_are_passed_over(tmp_path: Path) -> None:
    whole_run(tmp_path, Workbench())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "job.json").write_bytes(b'{"settings": []}')
    (tmp_path / "half.new").mkdir()

    async def run() -> None:
        async with running(tmp_path, Workbench()) as jobs:
            assert [job.name for job in jobs.list()] == ["one"]

    asyncio.run(run())
    assert not (tmp_path / "half.new").exists()


@pytest.mark.parametrize("what", ["loss_scale", "generator", "seed"])
def test_a_checkpoint_of_another_seed_or_form_is_refused_in_words(tmp_path: Path, what: str) -> None:
    async def run() -> str:
        async with held_at(4, tmp_path):
            pass
        path = tmp_path / "one" / "checkpoint-4" / checkpoint.STATE
        document = json.loads(path.read_bytes())
        assert document["state"]["generator"] == {"seed": 0, "epoch": 0, "steps_of_epoch": 4}
        if what == "seed":
            document["state"]["generator"]["seed"] = 1
        else:
            del document["state"][what]
        path.write_text(json.dumps(document))
        async with running(tmp_path, Workbench()) as jobs:
            job = await ended(jobs.get("one"))
        assert job["state"] == "failed"
        return str(job["reason"])

    assert ("another seed" if what == "seed" else "can't be read") in asyncio.run(run())
