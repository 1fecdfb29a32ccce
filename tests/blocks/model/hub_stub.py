"""A hub on loopback: the model-info API, HEAD and GET of files as `huggingface_hub` really calls them, and faults on order."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubStub:
    """Serves one directory as ``owner/model``; ``faults`` maps "info" or a file to statuses, given one after the other."""

    directory: Path
    endpoint: str = ""
    faults: dict[str, list[int]] = field(default_factory=dict)
    token: str | None = None  # wanted of everybody where set
    gated: bool = False
    corrupt: set[str] = field(default_factory=set)
    fetched: list[str] = field(default_factory=list)  # bodies of whole files, in order
    requests: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())

    def info(self) -> dict[str, Any]:
        siblings = []
        for name in self.names():
            data = (self.directory / name).read_bytes()
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if name.endswith((".safetensors", ".bin")):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": "owner/model", "modelId": "owner/model", "sha": COMMIT, "private": False, "siblings": siblings}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: HubStub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": "refused"} if code else {}
        self.answer(status, json.dumps({"error": "refused"}).encode(), headers | {"Retry-After": "7"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        stub = self.stub
        path = self.path.partition("?")[0]
        stub.requests.append(f"{self.command} {path}")
        what = "info" if path.startswith("/api/models/") else path.rpartition("/")[2]
        faults = stub.faults.get(what)
        if faults:
            self.refuse(faults.pop(0))
        elif stub.token and self.headers.get("Authorization") != f"Bearer {stub.token}":
            self.refuse(401, "" if path.startswith("/api/") else "RepoNotFound")
        elif "owner/model" not in path:
            self.refuse(404, "RepoNotFound")
        elif what == "info":
            if "/revision/" in path and path.rpartition("/")[2] not in ("main", COMMIT, "v1"):
                self.refuse(404, "RevisionNotFound")
            else:
                self.answer(200, json.dumps(stub.info()).encode(), {"Content-Type": "application/json"})
        elif stub.gated:
            self.refuse(403, "GatedRepo")
        else:
            self.file(what)

    def file(self, name: str) -> None:
        path = self.stub.directory / name
        if not path.is_file():
            self.refuse(404, "EntryNotFound")
            return
        data = path.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"',
                   "X-Linked-Size": str(len(data)), "Accept-Ranges": "bytes"}  # fmt: skip
        if name in self.stub.corrupt:
            data = data[:-4] + b"evil"
        wanted = self.headers.get("Range")
        if self.command == "HEAD":
            self.answer(200, b"", headers | {"Content-Length": str(len(data))})
        elif wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1 if last else None]
            span = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            self.answer(206, part, headers | {"Content-Range": span})
        else:
            self.stub.fetched.append(name)
            self.answer(200, data, headers)


@contextmanager
def hub_stub(directory: Path) -> Iterator[HubStub]:
    """A running stub; its thread and socket are gone afterwards."""
    stub = HubStub(directory)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"stub": stub}))
    server.daemon_threads = True
    stub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, name="hub-stub")
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
