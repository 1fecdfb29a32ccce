from __future__ import annotations

import errno
from pathlib import Path

import pytest

from peerd.training import checkpoint as module
from peerd.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from peerd.training.errors import BadCheckpoint, CheckpointFailed


def save(directory: Path, step: int) -> Checkpoint:
    made = Checkpoint(step, b"tensors of %d" % step, {"skipped": step})
    save_checkpoint(directory, made)
    return made


def test_the_last_checkpoint_is_found_and_older_ones_are_gone(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    save(tmp_path, 20)
    last = save(tmp_path, 40)
    assert load_checkpoint(tmp_path) == last
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-40"]


@pytest.mark.parametrize("written", [0, 1])
def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    before = save(tmp_path, 20)
    calls = iter([None] * written)
    real = module.write_synced

    def full(path: Path, data: bytes) -> None:
        if next(calls, path) is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(module, "write_synced", full)
    with pytest.raises(CheckpointFailed, match=r"No space left on device.*kept.*peerctl jobs resume"):
        save(tmp_path, 40)
    assert load_checkpoint(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-20"]


def test_one_that_was_cut_off_before_its_rename_is_not_seen(tmp_path: Path) -> None:
    before = save(tmp_path, 20)
    (tmp_path / module.ASIDE).mkdir()
    (tmp_path / module.ASIDE / module.STATE).write_bytes(b"{")
    assert load_checkpoint(tmp_path) == before


def test_a_damaged_one_is_passed_over_for_an_older_one_and_refused_alone(tmp_path: Path) -> None:
    before = save(tmp_path, 20)
    kept = (tmp_path / "checkpoint-20").rename(tmp_path / "kept")
    save(tmp_path, 40)
    (tmp_path / "checkpoint-40" / module.TENSORS).write_bytes(b"other bytes")
    with pytest.raises(BadCheckpoint, match="damaged"):
        load_checkpoint(tmp_path)
    kept.rename(tmp_path / "checkpoint-20")
    assert load_checkpoint(tmp_path) == before
