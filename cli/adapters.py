"""`peerctl adapters`: list the adapters of this machine, remove one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from cli.connection import add_connection_flags, client_for
from cli.terminal import RED, coloured, shown, wants_colour
from peerd import exit_codes
from peerd.client import BadAnswer, Client

PATH = "/api/v0/adapters"


def run(prog: str, arguments: Sequence[str]) -> int:
    """Do what the words say; without any, list."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Show the adapters that `peerctl generate --adapter NAME` can use, or remove one. `peerctl train` makes them; a "
        "directory in PEFT's prompt-tuning format can be copied into `adapters` in the daemon's state directory.",
        allow_abbrev=False,
    )
    parser.add_argument("action", nargs="?", choices=("list", "remove"), default="list")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the adapter that is meant")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    add_connection_flags(parser)
    flags = parser.parse_args(arguments)
    if (flags.action == "list") != (flags.name is None):
        parser.error("remove needs the NAME of an adapter, and list none.")
    client = client_for(flags)
    if flags.action == "list":
        return _list(client, flags.json)
    answer = client.call("DELETE", f"{PATH}/{quote(flags.name, safe='')}")
    print(json.dumps(answer) if flags.json else f"The adapter {flags.name} is removed.")
    return exit_codes.OK


def _list(client: Client, as_json: bool) -> int:
    answer = client.call("GET", PATH)
    if as_json:
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return exit_codes.OK
    try:
        lines = [line(adapter, wants_colour(sys.stdout)) for adapter in answer["adapters"]]
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswer("The daemon's answer is not as expected; is it of another version?") from error
    print("\n".join(lines) or "There are no adapters; `peerctl train --data FILE --name NAME` makes one.")
    return exit_codes.OK


def line(adapter: dict[str, Any], colour: bool) -> str:
    """One adapter in a line."""
    name, size = f"{shown(adapter['name']):<20}", _size(adapter["size_bytes"])
    if adapter["problem"]:
        return f"{name} {coloured('unusable', RED, colour)}  {shown(adapter['problem'])}"
    model = shown(adapter["model"] or "any model that it fits")
    return f"{name} {adapter['kind']:<12} for {model}, {adapter['length']} positions, {size}"


def _size(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB" if count >= 1 << 20 else f"{max(1, count >> 10)} KiB"
