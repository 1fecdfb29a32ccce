"""`peerctl generate`: a prompt to a stream of text on standard output, what happens meanwhile on standard error."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from cli.connection import add_connection_flags, client_for
from cli.terminal import Notices, shown
from peerd import exit_codes
from peerd.client import ApiError, Client, ClientError

PROMPT_BYTES_MAX = 2 << 20
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


class NoPrompt(ClientError):
    """There is nothing to send."""

    exit_code = exit_codes.USAGE


def run(prog: str, arguments: Sequence[str]) -> int:
    """Stream the answer; returns 0 when it is complete."""
    flags = _parser(prog).parse_args(arguments)
    client, prompt, settings = client_for(flags), _prompt(flags.prompt), _settings(flags)
    if flags.json:
        print(json.dumps(_whole(client, prompt, settings, flags.raw), indent=2, ensure_ascii=False))
        return exit_codes.OK
    return _stream(client, prompt, settings, flags.raw)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Send a prompt to the daemon and stream the answer. A model with a chat template gets the prompt as a "
        "user's message; --raw, or a model without one, gets it as plain text to go on from.",
        epilog="With the default temperature 0 the same prompt always gives the same text.",
        allow_abbrev=False,
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt; - or none: read from standard input")
    parser.add_argument("--model", metavar="NAME", help="which model (default: the only one there is)")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="how long the answer may get (default: what fits, at most 1024)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest token each time"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample only from the likeliest tokens with this much probability"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample only from the K likeliest tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text (repeatable)")
    parser.add_argument("--adapter", metavar="NAME", help="an adapter to generate with; `peerctl adapters` lists them")
    parser.add_argument("--raw", action="store_true", help="no chat template: go on from the prompt as it is")
    parser.add_argument("--json", action="store_true", help="print the whole answer as one JSON object at its end")
    add_connection_flags(parser)
    return parser


def _prompt(given: str | None) -> str:
    if given is not None and given != "-":
        prompt = given
    else:
        if given is None and sys.stdin.isatty():
            raise NoPrompt("There is no prompt; give it as an argument, or pipe it in.")
        data = sys.stdin.buffer.read(PROMPT_BYTES_MAX + 1)
        if len(data) > PROMPT_BYTES_MAX:
            raise NoPrompt(f"The prompt is over {PROMPT_BYTES_MAX >> 20} MiB; shorten it.")
        prompt = data.decode("utf-8", "replace")
    if not prompt.strip():
        raise NoPrompt("The prompt is empty; write something for the model to go on from.")
    # Arguments that are no UTF-8 arrive as lone surrogates, which JSON can't carry on.
    return prompt.encode("utf-8", "replace").decode()


def _settings(flags: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "adapter")
    return {name: value for name in names if (value := getattr(flags, name)) is not None}


def _forms(prompt: str, settings: dict[str, Any], raw: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The requests to try: as a conversation, then, for a model that doesn't chat, as plain text."""
    if not raw:
        yield CHAT, {**settings, "messages": [{"role": "user", "content": prompt}]}
    yield PLAIN, {**settings, "prompt": prompt}


def _whole(client: Client, prompt: str, settings: dict[str, Any], raw: bool) -> dict[str, Any]:
    *chat, plain = _forms(prompt, settings, raw)
    for path, body in chat:
        try:
            return client.complete(path, body)
        except ApiError as error:
            if error.code != "no-chat-template":
                raise
    return client.complete(*plain)


def _stream(client: Client, prompt: str, settings: dict[str, Any], raw: bool) -> int:
    notices = Notices()
    *chat, plain = _forms(prompt, settings, raw)
    try:
        for path, body in chat:
            try:
                return _print_stream(client, path, body, notices)
            except ApiError as error:
                if error.code != "no-chat-template":
                    raise
        return _print_stream(client, *plain, notices)
    finally:
        notices.clear()


def _print_stream(client: Client, path: str, body: dict[str, Any], notices: Notices) -> int:
    # To a file or a pipe the text goes as it is; a terminal must not obey it.
    keep = shown if sys.stdout.isatty() else str
    last = ""
    facts: dict[str, Any] = {}
    try:
        for event in client.stream(path, body, lambda comment: notices.show(_sentence(comment))):
            facts = event.get("peerd") or facts
            for choice in event.get("choices") or ():
                text = keep(str((choice.get("delta") or {}).get("content") or choice.get("text") or ""))
                if text:
                    notices.clear()
                    sys.stdout.write(text)
                    sys.stdout.flush()
                    last = text
    finally:
        # Also when it breaks off: what follows, an error or the shell's prompt, begins on a line of its own.
        if last and not last.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
    if sys.stderr.isatty():
        print(_summary(facts), file=sys.stderr)
    return exit_codes.OK


def _sentence(comment: str) -> str:
    """A notice in words: the daemon sends ``REASON SENTENCE``."""
    reason, _, sentence = comment.partition(" ")
    opening = {
        "planning": "looking for a route",
        "waiting": "waiting",
        "replaying": "a server was lost, going on with another",
    }
    if reason not in opening:
        return ""
    return f"{opening[reason]}: {sentence}" if sentence else f"{opening[reason]} ..."


def _summary(facts: dict[str, Any]) -> str:
    rate = facts.get("tokens_per_s")
    hops = [f"{hop['peer'][-6:]} {hop['span']}" for hop in facts.get("route") or ()]
    parts = [f"{rate:.1f} tokens/s"] if isinstance(rate, int | float) else []
    parts += [" -> ".join(hops)] if hops else []
    parts += [f"{facts['replays']} replays"] if facts.get("replays") else []
    return f"[{', '.join(parts)}]"
