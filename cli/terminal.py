"""What may be written to a terminal, and how: model text without control characters, colours only where they are wanted."""

from __future__ import annotations

import os
import sys
from typing import TextIO

GREEN, YELLOW, RED, DIM = "32", "33", "31", "2"

_DROPPED = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def shown(text: str) -> str:
    """Text without control characters: what a model writes must not move the cursor or rename the window."""
    return text.translate(_DROPPED)


def wants_colour(stream: TextIO) -> bool:
    """Whether to colour: a terminal, and nobody said NO_COLOR (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str, colour: str, wanted: bool) -> str:
    """The text in a colour, if wanted."""
    return f"\x1b[{colour}m{text}\x1b[0m" if wanted and text else text


def can_draw(stream: TextIO) -> bool:
    """Whether the stream takes block characters."""
    try:
        "█░".encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


class Notices:
    """Passing notices on standard error: one line that is overwritten on a terminal, else a line for each new sentence."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._last = ""

    def show(self, text: str) -> None:
        """Show a sentence, unless it's there already."""
        text = shown(text).replace("\n", " ")
        if not text or text == self._last:
            return
        self._last = text
        print(f"\r\x1b[K{text}" if self._live else text, end="" if self._live else "\n", file=self._stream, flush=True)

    def clear(self) -> None:
        """Make room for what comes next."""
        if self._live and self._last:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
        self._last = ""
