"""`peerctl status`: the daemon about itself."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from cli.connection import add_connection_flags, client_for
from cli.terminal import GREEN, RED, YELLOW, coloured, shown, wants_colour
from peerd import exit_codes
from peerd.client import BadAnswer

COLOURS = {"online": GREEN, "joining": YELLOW, "draining": RED}


def run(prog: str, arguments: Sequence[str]) -> int:
    """Print it for people, or as JSON."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Show the daemon: its peer id, addresses, models and sessions.", allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    add_connection_flags(parser)
    flags = parser.parse_args(arguments)
    status = client_for(flags).status()
    if flags.json:
        print(json.dumps(status, indent=2, ensure_ascii=False))
    else:
        print(drawn(lines(status, wants_colour(sys.stdout))))
    return exit_codes.OK


def drawn(drawing: Iterator[str]) -> str:
    """The lines as one text. Raises BadAnswer when the daemon's answer lacks what they show."""
    try:
        return "\n".join(drawing)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadAnswer("The daemon's answer is not as expected; is it of another version? --json shows it.") from error


def lines(status: dict[str, Any], colour: bool) -> Iterator[str]:
    """The status as lines of text."""
    yield f"peer id    {shown(status['peer_id'])}"
    yield f"version    {shown(status['version'])} (pid {status.get('pid', '?')})"
    yield f"state      {coloured(status['state'], COLOURS.get(status['state'], ''), colour)}"
    for index, address in enumerate(status["addresses"]):
        yield f"{'addresses' if index == 0 else '':<10} {shown(address)}"
    if not status["models"]:
        yield "models     none served here"
    for index, model in enumerate(status["models"]):
        state = coloured(model["state"], COLOURS.get(model["state"], ""), colour)
        progress = f", {100 * model.get('progress', 0):.0f} % loaded" if model["state"] == "joining" else ""
        yield f"{'models' if index == 0 else '':<10} {shown(model['name'])} blocks {model['span']}, {state}{progress}"
    for index, session in enumerate(status.get("sessions") or ()):
        hops = " -> ".join(f"{hop['peer'][-6:]} {hop['span']}" for hop in session["route"])
        yield f"{'sessions' if index == 0 else '':<10} {shown(session['model'])}, {session['tokens']} tokens, {hops}"
