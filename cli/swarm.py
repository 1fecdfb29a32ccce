"""`peerctl swarm`: which blocks of which model are covered by whom, as a drawing."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cli.connection import add_connection_flags, client_for
from cli.status import COLOURS, drawn
from cli.terminal import DIM, RED, can_draw, coloured, shown, wants_colour
from peerd import exit_codes

PEER_CHARS = 8
LABEL_CHARS = 28
BAR_CHARS_MIN = 12


class Style(NamedTuple):
    """How to draw: colours or not, and the characters for online, not yet online and empty."""

    colour: bool
    online: str
    pending: str
    empty: str
    width: int


def run(prog: str, arguments: Sequence[str]) -> int:
    """Print it for people, or as JSON."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Show the models of the network, and which blocks are served by whom.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    add_connection_flags(parser)
    flags = parser.parse_args(arguments)
    swarm = client_for(flags).swarm()
    if flags.json:
        print(json.dumps(swarm, indent=2, ensure_ascii=False))
        return exit_codes.OK
    width = max(BAR_CHARS_MIN, shutil.get_terminal_size().columns - LABEL_CHARS)
    cells = ("█", "▒", "·") if can_draw(sys.stdout) else ("#", "+", ".")
    print(drawn(lines(swarm, Style(wants_colour(sys.stdout), *cells, width))))
    return exit_codes.OK


def lines(swarm: dict[str, Any], style: Style) -> Iterator[str]:
    """The drawing as lines of text."""
    if not swarm["models"]:
        yield "No model is served in this network yet; serve one with `peerd start --model demo`."
    for index, model in enumerate(swarm["models"]):
        if index:
            yield ""
        yield f"{shown(model['name'])}   {model['blocks']} blocks   {shown(model.get('compute_class', ''))}   id {model['id'][:12]}"
        for server in sorted(model["servers"], key=lambda server: (_edges(server["span"]), server["peer"])):
            yield _server_line(server, model["blocks"], style)
        yield _coverage_line(model, style)
        if model.get("unserved"):
            yield coloured(f"  nobody serves blocks {', '.join(model['unserved'])}", RED, style.colour)


def _edges(span: str) -> tuple[int, int]:
    start, _, end = span.partition(":")
    return int(start), int(end)


def _server_line(server: dict[str, Any], blocks: int, style: Style) -> str:
    start, end = _edges(server["span"])
    full = style.online if server["state"] == "online" else style.pending
    bar = "".join(full if start < right and left < end else style.empty for left, right in _cells(blocks, style.width))
    colour = COLOURS.get(server["state"], "")
    here = " (this daemon)" if server.get("self") else ""
    state = coloured(server["state"], colour, style.colour)
    return f"  {server['peer'][-PEER_CHARS:]} {server['span']:>9} {coloured(bar, colour, style.colour)} {state}{here}"


def _coverage_line(model: dict[str, Any], style: Style) -> str:
    """How many have each block online; of blocks that share a cell, the fewest."""
    counts = [0] * model["blocks"]
    for server in model["servers"]:
        if server["state"] == "online":
            start, end = _edges(server["span"])
            for block in range(max(0, start), min(end, model["blocks"])):
                counts[block] += 1
    digits = []
    for left, right in _cells(model["blocks"], style.width):
        fewest = min(counts[left:right])
        digits.append("-" if fewest == 0 else str(fewest) if fewest < 10 else "+")
    return "  " + coloured(f"{'servers online':<{PEER_CHARS + 10}} {''.join(digits)}", DIM, style.colour)


def _cells(blocks: int, width: int) -> list[tuple[int, int]]:
    """Half-open block ranges, one for each character: one block each, or several where they don't fit."""
    count = min(blocks, width)
    return [(blocks * index // count, blocks * (index + 1) // count) for index in range(count)]
