"""`peerctl jobs`: list training jobs, watch one, cancel one, let a failed one go on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from cli.connection import add_connection_flags, client_for
from cli.job_lines import EXIT_BY_STATE, follow, outcome
from cli.terminal import GREEN, RED, YELLOW, coloured, shown, wants_colour
from peerd import exit_codes
from peerd.client import BadAnswer, Client
from peerd.client.jobs import cancel_job, list_jobs, resume_job, watch_job

COLOURS = {"done": GREEN, "running": GREEN, "waiting": YELLOW, "queued": YELLOW, "failed": RED}
REASON_CHARS = 120


def run(prog: str, arguments: Sequence[str]) -> int:
    """Do what the words say; without any, list."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Show the training jobs of the daemon, or watch, cancel or resume one.",
        allow_abbrev=False,
    )
    parser.add_argument("action", nargs="?", choices=("list", "watch", "cancel", "resume"), default="list")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the job that is meant")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    add_connection_flags(parser)
    flags = parser.parse_intermixed_args(arguments)
    if (flags.action == "list") != (flags.name is None):
        parser.error("watch, cancel and resume need the NAME of a job, and list none.")
    client = client_for(flags)
    if flags.action == "list":
        return _list(client, flags.json)
    if flags.action == "watch":
        return _watch(client, flags.name, flags.json)
    job = cancel_job(client, flags.name) if flags.action == "cancel" else resume_job(client, flags.name)
    if flags.json:
        _print(job)
    elif flags.action == "cancel":
        print(outcome(job))
    else:
        print(f"The job {flags.name} goes on; `peerctl jobs watch {flags.name}` shows it.")
    return exit_codes.OK


def _print(document: object) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _list(client: Client, as_json: bool) -> int:
    jobs = list_jobs(client)
    if as_json:
        _print({"jobs": jobs})
    elif not jobs:
        print("There are no jobs; `peerctl train --data FILE --name NAME` begins one.")
    else:
        try:
            print("\n".join(line(job, wants_colour(sys.stdout)) for job in jobs))
        except (KeyError, TypeError, ValueError) as error:
            raise BadAnswer("The daemon's answer is not as expected; is it of another version?") from error
    return exit_codes.OK


def line(job: dict[str, Any], colour: bool) -> str:
    """One job in a line."""
    progress, settings = job["progress"], job["settings"]
    state = coloured(f"{job['state']:<9}", COLOURS.get(job["state"], ""), colour)
    loss = "" if progress["loss"] is None else f"  loss {progress['loss']:.3f}"
    if progress["eval_before"] is not None and progress["eval_after"] is not None:
        loss = f"  eval loss {progress['eval_before']:.3f} -> {progress['eval_after']:.3f}"
    reason = f"  {shown(job['reason'])[:REASON_CHARS]}" if job["reason"] else ""
    what = f"{settings['method']} for {shown(str(settings['model']))}"
    return f"{job['name']:<20} {state} {progress['step']}/{progress['steps']} steps  {what}{loss}{reason}"


def _watch(client: Client, name: str, as_json: bool) -> int:
    if as_json:
        for job in watch_job(client, name):
            print(json.dumps(job, ensure_ascii=False), flush=True)
        return EXIT_BY_STATE.get(job["state"], exit_codes.OK)
    ended = follow(watch_job(client, name), name)
    if ended is None:
        return exit_codes.INTERRUPTED
    print(outcome(ended))
    return EXIT_BY_STATE.get(ended["state"], exit_codes.OK)
