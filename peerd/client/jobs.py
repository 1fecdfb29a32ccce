"""Training jobs as calls: upload a dataset, list, watch, cancel, resume.

Knows the paths and the form of the upload; the transport is `peerd.client.client`'s. Standard library only.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from peerd.client.client import Client, Json
from peerd.client.errors import DaemonLost

CHECK_TIMEOUT_S = 600.0
"""A dataset is read and tokenized before it is accepted."""
PATH = "/api/v0/jobs"


def create_job(client: Client, settings: Mapping[str, Any], dataset: bytes) -> Json:
    """Hand in a job; returns it once it is checked and kept. Raises ApiError with the sentence of what is wrong."""
    body, content_type = multipart({"settings": json.dumps(settings).encode(), "dataset": dataset})
    return client.send("POST", PATH, body, content_type, CHECK_TIMEOUT_S)


def list_jobs(client: Client) -> list[Json]:
    """Every job, the oldest first."""
    jobs: list[Json] = client.call("GET", PATH)["jobs"]
    return jobs


def get_job(client: Client, name: str) -> Json:
    """One job."""
    return client.call("GET", f"{PATH}/{quote(name, safe='')}")


def cancel_job(client: Client, name: str) -> Json:
    """End a job and free all it holds."""
    return client.call("POST", f"{PATH}/{quote(name, safe='')}/cancel", {})


def resume_job(client: Client, name: str) -> Json:
    """Let a failed job go on from its last checkpoint."""
    return client.call("POST", f"{PATH}/{quote(name, safe='')}/resume", {})


def watch_job(client: Client, name: str) -> Iterator[Json]:
    """The job now and at every change, the last time at its end. Closing the iterator leaves the job running.

    Raises:
        DaemonLost: the daemon went; the job goes on when it is started again.
    """
    for event in client.events(f"{PATH}/{quote(name, safe='')}/events"):
        yield event["job"]
        if event["event"] == "end":
            return
    raise DaemonLost(f"The daemon stopped; the job {name} goes on when it is started again.")


def multipart(parts: Mapping[str, bytes]) -> tuple[bytes, str]:
    """A ``multipart/form-data`` body (RFC 7578) and its content type."""
    boundary = uuid.uuid4().hex  # 122 random bits: not in the data
    pieces = []
    for name, data in parts.items():
        pieces.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode())
        pieces += [data, b"\r\n"]
    pieces.append(f"--{boundary}--\r\n".encode())
    return b"".join(pieces), f"multipart/form-data; boundary={boundary}"
