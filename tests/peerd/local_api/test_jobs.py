"""Jobs over the real socket: the API, the light client and the commands, on a workshop without torch."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

import cli.jobs
import cli.train
from cli.job_lines import JobLines, duration, follow, outcome, progress_line
from peerd import exit_codes
from peerd.client import ApiError, Client
from peerd.client.errors import DaemonLost
from peerd.client.http import request
from peerd.client.jobs import cancel_job, create_job, get_job, list_jobs, multipart, resume_job, watch_job
from peerd.local_api.server import serving
from peerd.training import limits
from peerd.training.jobs import Jobs
from tests.peerd.scripted import ScriptedNode
from tests.peerd.training.workbench import LINES, Workbench

SETTINGS = {"name": "one", "length": 2, "epochs": 2, "batch": 4}


@contextlib.asynccontextmanager
async def answering(directory: Path, bench: Workbench) -> AsyncIterator[Client]:
    """The real API over jobs that run on ``bench``."""
    node = ScriptedNode()
    jobs = Jobs(directory / "jobs", bench, node.wall_clock)
    node.jobs = jobs  # type: ignore[attr-defined]
    socket = directory / "run" / "s"
    task = asyncio.create_task(jobs.run())
    try:
        async with asyncio.timeout(20), serving(node, socket):
            yield Client(socket)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def with_client(directory: Path, use: Callable[[Client], Any], bench: Workbench | None = None) -> Any:
    """What ``use`` returns: called in a thread of its own, as another process would ask."""

    async def run() -> Any:
        async with answering(directory, bench or Workbench()) as client:
            return await asyncio.to_thread(use, client)

    return asyncio.run(run())


def held() -> Workbench:
    """A job on it goes to its third step and no further."""
    return Workbench(lambda step: asyncio.Event().wait() if step == 2 else None)


def test_a_job_is_handed_in_watched_to_its_end_and_listed(tmp_path: Path) -> None:
    def use(client: Client) -> None:
        made = create_job(client, SETTINGS, LINES)
        assert (made["name"], made["progress"]["steps"], made["progress"]["examples"]) == ("one", 10, 20)
        seen = list(watch_job(client, "one"))
        steps = [job["progress"]["step"] for job in seen]
        assert steps == sorted(steps)
        assert seen[-1]["state"] == "done"
        assert seen[-1] == get_job(client, "one") == list_jobs(client)[0]

    with_client(tmp_path, use)


def test_a_watcher_that_leaves_leaves_the_job_running(tmp_path: Path) -> None:
    def use(client: Client) -> None:
        create_job(client, SETTINGS, LINES)
        watching = watch_job(client, "one")
        next(watching)
        watching.close()
        assert get_job(client, "one")["state"] in ("queued", "running")
        assert cancel_job(client, "one")["state"] == "cancelled"

    with_client(tmp_path, use, held())


def test_a_stopping_daemon_ends_the_watching_and_says_that_the_job_goes_on(tmp_path: Path) -> None:
    async def run() -> None:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def watch(client: Client) -> None:
            for job in watch_job(client, "one"):
                if job["progress"]["step"] == 2:
                    loop.call_soon_threadsafe(begun.set)

        async with answering(tmp_path, held()) as client:
            await asyncio.to_thread(create_job, client, SETTINGS, LINES)
            watching = asyncio.create_task(asyncio.to_thread(watch, client))
            await begun.wait()
        with pytest.raises(DaemonLost, match="goes on when it is started again"):
            await watching

    asyncio.run(run())


def posted(client: Client, body: bytes, content_type: str) -> tuple[int, dict[str, Any]]:
    with request(client.socket_path, "POST", "/api/v0/jobs", body, 10.0, content_type) as response:
        return response.status, json.loads(response.body())["error"]


FORM = "multipart/form-data; boundary=b"
BODIES: dict[str, tuple[bytes, str, int, str]] = {
    "JSON": (b"{}", "application/json", 400, "multipart/form-data"),
    "no boundary": (b"{}", "multipart/form-data", 400, "multipart"),
    "junk": (b"junk", FORM, 400, ""),
    "cut off": (b'--b\r\nContent-Disposition: form-data; name="settings"\r\n\r\n{', FORM, 400, ""),
    "a broken header of a part": (b"--b\r\nbroken header\r\n\r\n{}\r\n--b--\r\n", FORM, 400, "can't be read"),
    "headers without end": (b"--b\r\n" + b"A: b\r\n" * 10_000 + b"\r\n", FORM, 400, "can't be read"),
    "no dataset": (*multipart({"settings": b'{"name": "one"}'}), 400, "no part 'dataset'"),
    "no settings": (*multipart({"dataset": LINES}), 400, "no part 'settings'"),
    "a stray part": (*multipart({"settings": b"{}", "other": b"x"}), 400, "doesn't belong there"),
    "settings that are no JSON": (*multipart({"settings": b"{", "dataset": LINES}), 400, "not JSON"),
    "settings that are a list": (*multipart({"settings": b"[]", "dataset": LINES}), 400, "JSON object"),
    "an unknown setting": (*multipart({"settings": b'{"name": "a", "epoch": 1}', "dataset": LINES}), 400, "epochs"),
    "deep JSON": (*multipart({"settings": b"[" * 9000, "dataset": LINES}), 400, "not JSON"),
    "large settings": (*multipart({"settings": b" " * (limits.SETTINGS_BYTES_MAX + 1)}), 413, "over 64 KiB"),
    "a bad line": (*multipart({"settings": b'{"name": "a"}', "dataset": LINES + b"{\n"}), 400, "line 21 is not JSON"),
    "an empty dataset": (*multipart({"settings": b'{"name": "a"}', "dataset": b""}), 400, "is empty"),
}


def test_every_bad_upload_is_one_sentence_and_nothing_is_kept(tmp_path: Path) -> None:
    def use(client: Client) -> None:
        for what, (body, content_type, status, part) in BODIES.items():
            got, error = posted(client, body, content_type)
            assert got == status, f"{what}: {error}"
            assert part in error["message"], what
            assert error["message"][-1] in ".?", what
        assert list_jobs(client) == []

    with_client(tmp_path, use)


def test_an_over_large_dataset_is_refused_while_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DATASET_BYTES_MAX", 1 << 20)

    def use(client: Client) -> None:
        body, content_type = multipart({"settings": b'{"name": "a"}', "dataset": b"x" * (2 << 20)})
        status, error = posted(client, body, content_type)
        assert (status, error["code"]) == (413, "request-too-large")

    with_client(tmp_path, use)


def test_unknown_jobs_taken_names_and_wrong_states_have_codes_of_their_own(tmp_path: Path) -> None:
    def use(client: Client) -> None:
        create_job(client, SETTINGS, LINES)
        list(watch_job(client, "one"))
        for call, code in (
            (lambda: get_job(client, "none"), "unknown-job"),
            (lambda: list(watch_job(client, "a/../b")), "unknown-job"),
            (lambda: cancel_job(client, "one"), "job-state"),
            (lambda: resume_job(client, "one"), "job-state"),
            (lambda: create_job(client, SETTINGS, LINES), "job-exists"),  # its adapter is there
        ):
            with pytest.raises(ApiError) as caught:
                call()
            assert caught.value.code == code

    with_client(tmp_path, use)


def test_train_shows_progress_and_says_how_to_use_the_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(LINES + b"{}\n")

    def use(client: Client) -> tuple[int, int]:
        flags = ["--data", str(data), "--name", "one", "--length", "2", "--socket", client.socket_path]
        with pytest.raises(ApiError, match="line 21 has none of"):
            cli.train.run("peerctl train", flags)
        trained = cli.train.run("peerctl train", [*flags, "--skip-bad", "--epochs", "1"])
        return trained, cli.jobs.run("peerctl jobs", ["--socket", client.socket_path])

    assert with_client(tmp_path, use) == (exit_codes.OK, exit_codes.OK)
    shown = capsys.readouterr()
    assert "left out: 1 bad line" in shown.err
    assert "done" in shown.err
    assert "peerctl generate --adapter one" in shown.out
    assert "one                  done " in shown.out
    assert "eval loss 1.000 -> " in shown.out


def test_watch_and_cancel_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def use(client: Client) -> list[int]:
        create_job(client, SETTINGS, LINES)
        return [
            cli.jobs.run("peerctl jobs", [*words, "one", "--socket", client.socket_path])
            for words in (["cancel"], ["watch"], ["watch", "--json"])
        ]

    assert with_client(tmp_path, use, held()) == [exit_codes.OK, exit_codes.JOB_FAILED, exit_codes.JOB_FAILED]
    assert "The job one was cancelled." in capsys.readouterr().out


def test_a_file_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(cli.train.NoDataset, match="No such file"):
        cli.train.run("peerctl train", ["--data", str(tmp_path / "x"), "--name", "one"])


def job_at(step: int, state: str = "running", **progress: Any) -> dict[str, Any]:
    figures = {
        "step": step, "steps": 10, "loss": 1.5, "tokens_per_s": 812.4, "eta_s": 75.0, "skipped": 0, "server_losses": 0,
        "eval_before": 2.0, "eval_after": 0.5,
    }  # fmt: skip
    return {"name": "one", "state": state, "reason": "", "progress": figures | progress}


def test_the_line_has_what_a_person_looks_for() -> None:
    line = progress_line(job_at(5, skipped=2, server_losses=1), ("#", "."))
    assert line == (
        "############............  50 %  step 5/10  loss 1.500  812 tokens/s  1:15 left  2 steps skipped  1 lost call repeated"
    )
    assert duration(3725) == "1:02:05"


@pytest.mark.parametrize("columns", [30, 60, 79, 200])
def test_on_a_terminal_the_line_never_wraps(columns: int) -> None:
    busy = job_at(5, skipped=2, server_losses=1)
    waiting = job_at(5, "waiting") | {"reason": "Nobody serves\nblocks 3:7 " * 20}
    for job in (busy, waiting, job_at(10, "done")):
        line = progress_line(job, ("#", "."), columns)
        assert len(line) <= columns
        assert "\n" not in line
        assert line.startswith("##")
    assert "1:15 left" in progress_line(job_at(5), ("#", "."), 79)
    assert len(progress_line(job_at(5, tokens_per_s=12345.0), ("#", "."), 79)) == 79


def test_without_a_terminal_a_line_comes_at_each_change_of_state(capsys: pytest.CaptureFixture[str]) -> None:
    lines = JobLines()
    for step in range(5):
        lines.show(job_at(step))
    lines.show(job_at(5, "done"))
    assert [line.split("  ")[2] for line in capsys.readouterr().err.splitlines()] == ["step 0/10", "step 5/10"]


def test_ctrl_c_leaves_the_job_and_says_how_to_watch_or_cancel_it(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> Any:
        yield job_at(1)
        raise KeyboardInterrupt

    assert follow(interrupted(), "one") is None
    shown = capsys.readouterr().err
    assert "peerctl jobs watch one" in shown
    assert "peerctl jobs cancel one" in shown


def test_the_end_says_what_fell_or_why_it_failed() -> None:
    assert "2.000 before, 0.500 after" in outcome(job_at(10, "done"))
    failed = job_at(3, "failed") | {"reason": "The disk is full."}
    assert outcome(failed) == "The job one failed: The disk is full."
