"""A job on disk: ``job.json``, ``dataset.jsonl``, ``losses.jsonl`` and checkpoints, in a directory of its name.

Owns the forms of the files and that each is replaced whole. A job that is there was accepted: its directory is made aside and renamed.
Must not know what runs.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from peerd.durable import sync_directory, write_synced
from peerd.training.checkpoint import ASIDE
from peerd.training.errors import BadCheckpoint, BadSettings, CheckpointFailed
from peerd.training.settings import JobSettings, parse_settings

log = logging.getLogger(__name__)
JOB, DATASET, LOSSES = "job.json", "dataset.jsonl", "losses.jsonl"
NEW_SUFFIX = ".new"


class JobState(Enum):
    """Where a job is in its life."""

    QUEUED = "queued"
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing happens any more unless somebody asks."""
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


@dataclass(slots=True)
class Record:
    """What is known of a job between runs of the daemon.

    Attributes:
        model, compute_class, dataset_sha256: what the job began with: it never goes on with anything else.
        number: jobs run in this order.
        created_s: Unix seconds; also the time that chat templates print.
        reason: the sentence of what it waits for, or why it failed.
        result: what came of it: steps, losses before and after.
    """

    settings: JobSettings
    model: str
    compute_class: str
    dataset_sha256: str
    number: int
    created_s: float
    state: JobState = JobState.QUEUED
    reason: str = ""
    result: dict[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The bytes of ``job.json``."""
        document = {
            "settings": self.settings.document(),
            "model": self.model,
            "compute_class": self.compute_class,
            "dataset_sha256": self.dataset_sha256,
            "number": self.number,
            "created_s": self.created_s,
            "state": self.state.value,
            "reason": self.reason,
            "result": self.result,
        }
        return json.dumps(document, indent=1).encode()


def decode_record(data: bytes) -> Record | None:
    """The record of ``job.json``, or None where it is damaged."""
    try:
        document = json.loads(data)
        return Record(
            parse_settings(document["settings"]),
            str(document["model"]),
            str(document["compute_class"]),
            str(document["dataset_sha256"]),
            int(document["number"]),
            float(document["created_s"]),
            JobState(document["state"]),
            str(document["reason"]),
            dict(document["result"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError, BadSettings):
        return None


class JobDirectory:
    """One job's files below the jobs directory."""

    def __init__(self, jobs: Path, name: str) -> None:
        self.path = jobs / name

    def write_aside(self, record: Record, dataset: bytes) -> None:
        """Write all of it where no job is looked for. Raises CheckpointFailed when the disk doesn't take it."""
        aside = self._aside
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(mode=0o700, parents=True)
            write_synced(aside / DATASET, dataset)
            write_synced(aside / JOB, record.encode())
            sync_directory(aside)
        except OSError as error:
            raise self._not_kept(error) from error

    def enter(self) -> None:
        """Make what was written aside the job, in place of one that was there: a moment's work. Raises CheckpointFailed."""
        try:
            shutil.rmtree(self.path, ignore_errors=True)
            self._aside.rename(self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            raise self._not_kept(error) from error

    @property
    def _aside(self) -> Path:
        return self.path.with_name(self.path.name + NEW_SUFFIX)

    def _not_kept(self, error: OSError) -> CheckpointFailed:
        shutil.rmtree(self._aside, ignore_errors=True)
        return CheckpointFailed(
            f"Can't keep the job in {self.path} ({error.strerror}); free some disk space and try again."
        )

    def save(self, record: Record) -> None:
        """Replace ``job.json``. Raises CheckpointFailed when the disk doesn't take it; the old one is kept."""
        new = self.path / (JOB + NEW_SUFFIX)
        try:
            write_synced(new, record.encode())
            new.replace(self.path / JOB)
            sync_directory(self.path)
        except OSError as error:
            raise CheckpointFailed(
                f"Can't write {self.path / JOB} ({error.strerror}); free some disk space."
            ) from error

    def dataset(self) -> bytes:
        """The uploaded file. Raises BadCheckpoint."""
        try:
            return (self.path / DATASET).read_bytes()
        except OSError as error:
            raise BadCheckpoint(
                f"Can't read {self.path / DATASET} ({error.strerror}); give the job up by `peerctl jobs cancel {self.path.name}`."
            ) from error

    def rewind_losses(self, step: int) -> float | None:
        """Cut the log off behind a checkpoint, since later steps run again; returns the last loss that is left. Raises CheckpointFailed.

        A log, not a state: from a damaged line on it is cut off too, and the run doesn't depend on it.
        """
        last, length = None, 0
        try:
            with (self.path / LOSSES).open("r+b") as file:
                for line in itertools.islice(file, step):
                    try:
                        last = float(json.loads(line)["loss"])
                    except (ValueError, KeyError, TypeError):
                        break
                    length += len(line)
                file.truncate(length)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._no_log(error) from error
        return last

    def log_loss(self, step: int, loss: float) -> None:
        """Add a step's loss to the log. Raises CheckpointFailed."""
        try:
            with (self.path / LOSSES).open("ab") as file:
                file.write(_loss_line(step, loss))
        except OSError as error:
            raise self._no_log(error) from error

    def sync_losses(self) -> None:
        """Bring the log of losses to disk, before the checkpoint that follows it. Raises CheckpointFailed."""
        try:
            with (self.path / LOSSES).open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise self._no_log(error) from error

    def _no_log(self, error: OSError) -> CheckpointFailed:
        return CheckpointFailed(
            f"Can't write to {self.path} ({error.strerror}); the last checkpoint is kept. Free some disk space, then "
            f"`peerctl jobs resume {self.path.name}`."
        )

    def free(self) -> None:
        """Remove all that an ended job doesn't need: dataset and checkpoints."""
        for path in self.path.iterdir():
            if path.name.startswith("checkpoint-") or path.name == ASIDE:
                shutil.rmtree(path, ignore_errors=True)
        (self.path / DATASET).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove it all."""
        shutil.rmtree(self.path, ignore_errors=True)


def _loss_line(step: int, loss: float) -> bytes:
    return json.dumps({"step": step, "loss": loss}).encode() + b"\n"


def load_jobs(jobs: Path) -> list[Record]:
    """Every whole job there, in the order of their numbers; half-made directories are removed."""
    if not jobs.is_dir():
        return []
    records = []
    for path in sorted(jobs.iterdir()):
        if path.name.endswith(NEW_SUFFIX):
            shutil.rmtree(path, ignore_errors=True)
            continue
        try:
            record = decode_record((path / JOB).read_bytes())
        except OSError:
            record = None
        if record is None or record.settings.name != path.name:
            log.warning("%s holds no job that can be read; it is left as it is", path)
            continue
        records.append(record)
    return sorted(records, key=lambda record: record.number)
