"""How a training job looks on a terminal: one live line while it runs, a line now and then where nobody looks, and its end in words."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from cli.terminal import can_draw, shown
from peerd import exit_codes

BAR_CHARS, BAR_CHARS_MIN = 24, 4
COLUMNS = 80
"""Of a terminal that doesn't say."""
PLAIN_EVERY_S = 5.0
"""Between two lines where the stream is no terminal."""
EXIT_BY_STATE = {"done": exit_codes.OK, "failed": exit_codes.JOB_FAILED, "cancelled": exit_codes.JOB_FAILED}


class JobLines:
    """Shows a job's documents as they come."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._cells = ("█", "░") if can_draw(self._stream) else ("#", ".")
        self._told_at = float("-inf")
        self._state = ""

    def show(self, job: dict[str, Any]) -> None:
        """One document: drawn over the last on a terminal; else a line at every change of state, and every few seconds."""
        if self._live:
            # One column stays free: a full line would wrap, and what wrapped can't be drawn over.
            line = progress_line(job, self._cells, _columns(self._stream) - 1)
            print(f"\r\x1b[K{line}", end="", file=self._stream, flush=True)
            return
        now = time.monotonic()
        if job["state"] != self._state or now - self._told_at >= PLAIN_EVERY_S:
            self._state, self._told_at = job["state"], now
            print(progress_line(job, self._cells), file=self._stream, flush=True)

    def clear(self) -> None:
        """End the live line, so that what follows has its own."""
        if self._live:
            print(file=self._stream, flush=True)


def follow(jobs: Iterable[dict[str, Any]], name: str, *, quiet: bool = False) -> dict[str, Any] | None:
    """Show a job up to its end, whose document is returned; None when Ctrl-C ended the looking, which leaves the job running."""
    lines = JobLines()
    last: dict[str, Any] | None = None
    try:
        for job in jobs:
            last = job
            if not quiet:
                lines.show(job)
    except KeyboardInterrupt:
        if not quiet:
            lines.clear()
        print(
            f"The job goes on without this window: `peerctl jobs watch {name}` shows it, `peerctl jobs cancel {name}` ends it.",
            file=sys.stderr,
        )
        return None
    if not quiet:
        lines.clear()
    return last


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or COLUMNS
    except (OSError, ValueError):
        return COLUMNS


def progress_line(job: dict[str, Any], cells: tuple[str, str], columns: int | None = None) -> str:
    """A job in one line; in at most ``columns`` characters, if given: the bar gives way first, then the end."""
    progress = job["progress"]
    step, steps = progress["step"], progress["steps"]
    figures = "  ".join([f"{100 * step // steps if steps else 0:3d} %", *_figures(job)])
    most = BAR_CHARS if columns is None else min(BAR_CHARS, max(BAR_CHARS_MIN, columns - len(figures) - 1))
    done = most * step // steps if steps else 0
    return f"{cells[0] * done}{cells[1] * (most - done)} {figures}"[:columns]


def _figures(job: dict[str, Any]) -> list[str]:
    progress = job["progress"]
    parts = [f"step {progress['step']}/{progress['steps']}"]
    if progress["loss"] is not None:
        parts.append(f"loss {progress['loss']:.3f}")
    if job["state"] == "running" and progress["tokens_per_s"] is not None:
        parts.append(f"{progress['tokens_per_s']:.0f} tokens/s")
        parts.append(f"{duration(progress['eta_s'])} left")
    parts += [counted(progress["skipped"], "step") + " skipped"] if progress["skipped"] else []
    parts += [counted(progress["server_losses"], "lost call") + " repeated"] if progress["server_losses"] else []
    if job["state"] != "running":
        reason = " ".join(shown(job["reason"]).split())
        parts.append(job["state"] + (f": {reason}" if reason else ""))
    return parts


def counted(count: int, what: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def duration(seconds: float | None) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = round(seconds or 0)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def outcome(job: dict[str, Any]) -> str:
    """What came of a job that ended, and what to do next."""
    name, progress = job["name"], job["progress"]
    if job["state"] == "done":
        before, after = progress["eval_before"], progress["eval_after"]
        figures = (
            f" Loss on held-out examples: {before:.3f} before, {after:.3f} after."
            if before is not None and after is not None
            else ""
        )
        return f'The adapter {name} is made.{figures} Use it: peerctl generate --adapter {name} "..."'
    if job["state"] == "failed":
        return f"The job {name} failed: {shown(job['reason'])}"
    return f"The job {name} was cancelled."
