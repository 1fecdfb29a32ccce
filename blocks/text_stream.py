"""Text as it grows: token ids in, whole characters out, ending at stop strings.

Pure. What comes out is a function of the ids alone, however they arrive: the pieces put together are the decoded text up to
the stop string that is complete first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from overlay.errors import Blame, PeerdError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 512
# A character is at most four bytes, thus four byte tokens; a run of tokens that never becomes one is let go after this many.
MAX_UNFINISHED_TOKENS = 16

_REPLACEMENT = "\ufffd"


class InvalidStop(PeerdError):
    """The stop strings of a request are too many, too long or empty."""

    code = "invalid-stop"
    exit_code = 2
    http_status = 400
    retryable = False
    blame = Blame.USER


class Decoder(Protocol):
    """What the stream needs of a tokenizer (`blocks.text.TextCodec` has it)."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def is_special(self, token_id: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class TextPiece:
    """What one token added: text that is final, and whether a stop string ended the whole."""

    text: str
    stopped: bool = False


def check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    """Returns the stop strings of a request.

    Raises:
        InvalidStop: if there are too many, or one is empty or too long.
    """
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidStop(f"At most {MAX_STOP_STRINGS} stop strings are possible, not {len(stop)}.")
    for text in stop:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
            raise InvalidStop(f"A stop string must have 1 to {MAX_STOP_CHARS} characters.")
    return tuple(stop)


class TextStream:
    """Decodes one answer as its tokens come.

    Args:
        decoder: the tokenizer.
        stop: strings of which the first to be complete ends the text, itself left out.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stop = check_stop(stop)
        # Decoders look at neighbours (a leading space is dropped at the start only), so the last finished run is decoded again
        # in front of the unfinished one.
        self._finished_ids: list[int] = []
        self._unfinished_ids: list[int] = []
        self._finished_text = ""
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; nothing comes out after it."""
        return self._stopped

    def push(self, token_id: int) -> TextPiece:
        """Takes the next token and returns the text that is certain now."""
        if self._stopped:
            return TextPiece("", stopped=True)
        if self._decoder.is_special(token_id):
            return TextPiece("")
        self._unfinished_ids.append(token_id)
        text = self._decoder.decode(self._finished_ids + self._unfinished_ids)
        if text.endswith(_REPLACEMENT) and len(self._unfinished_ids) < MAX_UNFINISHED_TOKENS:
            return TextPiece("")
        new = text[len(self._finished_text) :]
        if not new and len(self._unfinished_ids) < MAX_UNFINISHED_TOKENS:
            return TextPiece("")
        self._finished_ids, self._unfinished_ids = self._unfinished_ids, []
        self._finished_text = self._decoder.decode(self._finished_ids)
        return self._release(new)

    def finish(self) -> str:
        """Ends the answer and returns what was held back; a character that never became whole shows as U+FFFD."""
        if self._stopped:
            return ""
        text = self._decoder.decode(self._finished_ids + self._unfinished_ids)
        piece = self._release(text[len(self._finished_text) :])
        rest, self._held, self._unfinished_ids = self._held, "", []
        self._finished_text = text
        return piece.text if piece.stopped else piece.text + rest

    def _release(self, new: str) -> TextPiece:
        """Adds text to what is held, and gives out all that can't be the beginning of a stop string."""
        self._held += new
        match = self._first_stop()
        if match is not None:
            text, self._held, self._stopped = self._held[:match], "", True
            return TextPiece(text, stopped=True)
        keep = self._possible_stop_length()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return TextPiece(text)

    def _first_stop(self) -> int | None:
        """Returns where the stop string begins that is complete first (of several, the longest): not what begins first.

        So the result is the same whether the text came by character or all at once.
        """
        best: tuple[int, int] | None = None
        for stop in self._stop:
            start = self._held.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return None if best is None else best[1]

    def _possible_stop_length(self) -> int:
        """Returns the length of the longest end of the held text that begins some stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
