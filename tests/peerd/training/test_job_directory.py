from __future__ import annotations

import json
from pathlib import Path

import pytest

from overlay.errors import PeerdError
from peerd.training.job_directory import LOSSES, JobDirectory


def logged(directory: JobDirectory) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory.path / LOSSES).read_bytes().splitlines()]


def test_the_log_is_cut_behind_the_checkpoint_and_at_a_damaged_line(tmp_path: Path) -> None:
    directory = JobDirectory(tmp_path, "one")
    directory.path.mkdir()
    assert directory.rewind_losses(3) is None
    for step in range(5):
        directory.log_loss(step, float(step))
    assert directory.rewind_losses(3) == 2.0
    assert logged(directory) == [0.0, 1.0, 2.0]
    (directory.path / LOSSES).write_bytes(b'{"step": 0, "loss": 7.5}\n{"step": 1, "lo')
    assert directory.rewind_losses(3) == 7.5
    assert logged(directory) == [7.5]
    (directory.path / LOSSES).unlink()
    (directory.path / LOSSES).mkdir()
    with pytest.raises(PeerdError, match="Can't write to"):
        directory.rewind_losses(3)
    with pytest.raises(PeerdError, match=r"Can't read .*jobs cancel one"):
        directory.dataset()
