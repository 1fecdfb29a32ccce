"""`peerctl train`: a JSONL file to an adapter, trained by the daemon through the swarm; the window may close meanwhile."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.connection import add_connection_flags, client_for
from cli.job_lines import EXIT_BY_STATE, counted, follow, outcome
from cli.terminal import shown
from peerd import exit_codes
from peerd.client import ClientError
from peerd.client.jobs import create_job, watch_job

DATASET_BYTES_MAX = 64 << 20
SETTINGS = (
    "name", "model", "method", "length", "lr", "epochs", "batch", "micro_batch", "max_length", "eval_split", "seed", "warmup",
    "schedule", "clip", "weight_decay", "checkpoint_every",
)  # fmt: skip


class NoDataset(ClientError):
    """The file can't be read."""

    exit_code = exit_codes.USAGE


def run(prog: str, arguments: Sequence[str]) -> int:
    """Hand the job in and show it to its end, unless told not to wait."""
    flags = _parser(prog).parse_args(arguments)
    client = client_for(flags)
    settings: dict[str, Any] = {name: value for name in SETTINGS if (value := getattr(flags, name)) is not None}
    settings["skip_bad"] = flags.skip_bad
    job = create_job(client, settings, _dataset(flags.data))
    _tell(job)
    if not flags.detach:
        ended = follow(watch_job(client, job["name"]), job["name"], quiet=flags.json)
        if ended is None:
            return exit_codes.INTERRUPTED
        job = ended
    if flags.json:
        print(json.dumps(job, indent=2, ensure_ascii=False))
    elif flags.detach:
        print(f"The job {job['name']} is queued; `peerctl jobs watch {job['name']}` shows it.")
    else:
        print(outcome(job))
    return EXIT_BY_STATE.get(job["state"], exit_codes.OK)


def _tell(job: dict[str, Any]) -> None:
    """What a person should know before the first step."""
    if job.get("warning"):
        print(shown(job["warning"]), file=sys.stderr)
    if job["progress"]["lines_skipped"]:
        print(f"left out: {counted(job['progress']['lines_skipped'], 'bad line')}", file=sys.stderr)


def _dataset(path: str) -> bytes:
    try:
        data = sys.stdin.buffer.read(DATASET_BYTES_MAX + 1) if path == "-" else _read(Path(path))
    except OSError as error:
        raise NoDataset(f"Can't read {path} ({error.strerror}); check --data.") from error
    if len(data) > DATASET_BYTES_MAX:
        raise NoDataset(f"{path} is over {DATASET_BYTES_MAX >> 20} MiB; train on a part of it.")
    return data


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(DATASET_BYTES_MAX + 1)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train a small adapter through the swarm: a prompt in front of the tokens, or deep prompts before every block. The "
        "servers' weights stay as they are; what is trained stays here.",
        epilog='DATA has a JSON object a line: {"text"}, {"prompt", "completion"} or {"messages"}. Only completions, and what the '
        "assistant says, are learned. The same seed gives the same adapter.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", required=True, metavar="DATA", help="a JSONL file; - reads standard input")
    parser.add_argument("--name", required=True, metavar="NAME", help="of the job and of the adapter")
    parser.add_argument("--method", choices=("prompt", "deep-prompt"), help="what is trained (default: prompt)")
    parser.add_argument("--model", metavar="NAME", help="for which model (default: the only one there is)")
    parser.add_argument("--length", type=int, metavar="N", help="rows of the prompt (default: 16)")
    parser.add_argument("--lr", type=float, metavar="R", help="the highest learning rate (default: 0.1)")
    parser.add_argument("--epochs", type=int, metavar="N", help="how often each example is seen (default: 3)")
    parser.add_argument("--batch", type=int, metavar="N", help="examples in a step (default: 8)")
    parser.add_argument("--max-length", type=int, metavar="N", help="longest example in tokens (default: what fits)")
    parser.add_argument(
        "--eval-split", type=float, metavar="SHARE", help="examples kept for the loss before and after (default: 0.1)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of order and first values (default: 0)")
    parser.add_argument("--warmup", type=int, metavar="STEPS", help="until the rate is reached (default: 10)")
    parser.add_argument("--schedule", choices=("linear", "constant"), help="what follows (default: linear, to nothing)")
    parser.add_argument("--clip", type=float, metavar="NORM", help="longest gradient (default: 1)")
    parser.add_argument("--weight-decay", type=float, metavar="D", help="of AdamW (default: 0)")
    parser.add_argument("--micro-batch", type=int, metavar="TOKENS", help="that travel together (default: 1024)")
    parser.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="(default: 20)")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad lines out, rather than refuse the file")
    parser.add_argument("--detach", action="store_true", help="don't wait: the daemon trains by itself")
    parser.add_argument("--json", action="store_true", help="print the job as JSON at its end, and no progress")
    add_connection_flags(parser)
    return parser
