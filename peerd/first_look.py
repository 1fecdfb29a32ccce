"""What can be known to be wrong with the models to serve before anything is started: no network, no torch, no weights read.

Owns the check of ``--model`` and ``--serve-blocks`` against what lies on this disk. A hub id passes: `peerd.models` asks the hub later.
"""

from __future__ import annotations

from blocks.model.source import look_at
from overlay.errors import Blame, PeerdError
from peerd.config import Serving
from routing.types import Span


class BadSpan(PeerdError):
    """``--serve-blocks a:b`` names blocks that the model doesn't have."""

    code = "bad-span"
    exit_code = 2
    http_status = 400
    blame = Blame.USER


def check_models(serving: Serving) -> None:
    """Raises the PeerdError of the first model that can't be served as asked."""
    for spec in serving.models:
        blocks = look_at(spec)
        if blocks is not None and isinstance(serving.blocks, Span):
            require_span(spec, blocks, serving.blocks)


def require_span(name: str, blocks: int, span: Span) -> None:
    """Raises BadSpan where ``span`` isn't within a model of ``blocks`` blocks."""
    if span.end > blocks:
        raise BadSpan(f"{name} has blocks 0:{blocks}; {span} is no span of it.")
