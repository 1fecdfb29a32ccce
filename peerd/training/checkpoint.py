"""A job's checkpoints on disk: each whole or not there at all.

Owns their form: a directory ``checkpoint-STEP`` with ``tensors.safetensors`` (float32 masters, the optimizer's moments) and ``state.json``
(data position, counts, losses of the evaluation, SHA-256 of the tensors), written aside, synced and renamed; then older ones go. Must
not know what the values mean.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerd.durable import sync_directory, write_synced
from peerd.training.errors import BadCheckpoint, CheckpointFailed

_NAME = re.compile(r"checkpoint-([0-9]{1,9})")
TENSORS, STATE = "tensors.safetensors", "state.json"
ASIDE = "checkpoint.new"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that a run needs to go on after ``step`` steps."""

    step: int
    tensors: bytes
    state: dict[str, Any]


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """Write it; after return it survives a power cut, and older ones are gone.

    Raises:
        CheckpointFailed: one sentence; the checkpoint before is whole.
    """
    aside = directory / ASIDE
    final = directory / f"checkpoint-{checkpoint.step}"
    document = {
        "step": checkpoint.step,
        "sha256": hashlib.sha256(checkpoint.tensors).hexdigest(),
        "state": checkpoint.state,
    }
    try:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        aside.mkdir(mode=0o700)
        write_synced(aside / TENSORS, checkpoint.tensors)
        write_synced(aside / STATE, json.dumps(document).encode())
        sync_directory(aside)
        aside.rename(final)
        sync_directory(directory)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointFailed(
            f"Can't write a checkpoint to {directory} ({error.strerror}); the one before it is kept. Free some disk space, then "
            f"`peerctl jobs resume {directory.name}`."
        ) from error
    for step, path in _found(directory):
        if step != checkpoint.step:
            shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest whole one, or None where there is none yet.

    Raises:
        BadCheckpoint: there are checkpoints, and none of them is whole.
    """
    damage = None
    for _, path in sorted(_found(directory), reverse=True):
        try:
            return _read(path)
        except BadCheckpoint as error:
            damage = error
    if damage is not None:
        raise damage
    return None


def _found(directory: Path) -> list[tuple[int, Path]]:
    matches = [(_NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    return [(int(match.group(1)), path) for match, path in matches if match is not None]


def _read(path: Path) -> Checkpoint:
    try:
        document = json.loads((path / STATE).read_bytes())
        tensors = (path / TENSORS).read_bytes()
        step, digest, state = int(document["step"]), document["sha256"], dict(document["state"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{path} can't be read as a checkpoint; remove the job and train again.") from error
    if hashlib.sha256(tensors).hexdigest() != digest:
        raise BadCheckpoint(f"{path} is damaged (its tensors are not those that were written); train again.")
    return Checkpoint(step, tensors, state)
