"""What routing says when there is no route: nobody serves the blocks, or not yet."""

from __future__ import annotations

from overlay.errors import Blame, PeerdError
from routing.types import Span


class BlocksUnserved(PeerdError):
    """Nobody serves or loads these blocks: waiting won't help by itself."""

    code = "blocks-unserved"
    exit_code = 50
    http_status = 503
    retryable = False
    blame = Blame.NETWORK

    def __init__(self, model: str, spans: tuple[Span, ...]) -> None:
        listed = ", ".join(map(str, spans))
        super().__init__(
            f"Nobody serves blocks {listed} of {model}; start another server with `peerd start --model {model} --join ...`."
        )
        self.spans = spans


class BlocksPending(PeerdError):
    """Servers for these blocks are loading, busy or being avoided: waiting helps."""

    code = "blocks-pending"
    exit_code = 51
    http_status = 503
    retryable = True
    blame = Blame.NETWORK

    def __init__(self, model: str, spans: tuple[Span, ...]) -> None:
        listed = ", ".join(map(str, spans))
        super().__init__(f"The servers of blocks {listed} of {model} are loading or busy; try again in a moment.")
        self.spans = spans


class BadRecord(PeerdError):
    """A record that can't be read: its publisher's fault."""

    code = "bad-record"
    exit_code = 1
    http_status = 502
    blame = Blame.PEER
