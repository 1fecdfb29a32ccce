"""`/peerd/model/1`: what a driver needs of a model, from whoever serves it: text files and the tensors outside the blocks.

Block weights never travel (issue of their source's). Everything fetched is verified against the manifest, which the model id covers,
so any server will do; what was fetched is kept on disk under the model's id.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from blocks.model.errors import BadManifest
from blocks.model.identity import Manifest, TensorDigest, check_file, check_tensor, tensor_bytes
from blocks.model.source import ModelSource
from overlay.errors import Blame, PeerdError, ProtocolViolation
from overlay.host import Host
from overlay.identity import PeerId
from overlay.rpc.types import Message, Part
from overlay.rpc.unary import call, serve_unary
from overlay.stream import Priority
from routing.types import ModelId

log = logging.getLogger(__name__)

MODEL_PROTOCOL = "/peerd/model/1"
CHUNK_BYTES = 4 << 20
FETCH_BYTES_MAX = 8 << 30
CALL_TIMEOUT_S = 30.0
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}

Progress = Callable[[int, int], None]


class NobodyHasIt(PeerdError):
    """No server gave what the manifest promises."""

    code = "model-unavailable"
    exit_code = 55
    http_status = 503
    retryable = True
    blame = Blame.NETWORK


class ModelShelf:
    """What this node hands out: models whose files are here."""

    def __init__(self, host: Host) -> None:
        self._sources: dict[ModelId, tuple[ModelSource, Manifest]] = {}
        self._cached: tuple[ModelId, str, bytes] | None = None
        methods = {"file": self._answer_file, "tensor": self._answer_tensor}
        serve_unary(host, MODEL_PROTOCOL, methods, priority=Priority.BLOB)

    def add(self, source: ModelSource, manifest: Manifest) -> None:
        """Hand out this model's files from now on."""
        self._sources[manifest.model] = (source, manifest)

    def _find(self, message: Message) -> tuple[ModelSource, Manifest, str, int]:
        model, name, offset = (message.header.get(field) for field in ("model", "name", "offset"))
        if not isinstance(model, bytes) or not isinstance(name, str) or type(offset) is not int or offset < 0:
            raise ProtocolViolation("A model request names a model, a name and an offset.")
        found = self._sources.get(ModelId(model))
        if found is None:
            raise NobodyHasIt("This server doesn't have that model.")
        return *found, name, offset

    async def _answer_file(self, peer: PeerId, message: Message) -> Message:
        source, manifest, name, offset = self._find(message)
        if all(entry.name != name for entry in manifest.files):
            raise ProtocolViolation("The manifest has no such file.")
        return _chunk((source.directory / name).read_bytes(), offset)

    async def _answer_tensor(self, peer: PeerId, message: Message) -> Message:
        source, manifest, name, offset = self._find(message)
        if all(entry.name != name for entry in manifest.tensors):
            raise ProtocolViolation("The manifest has no such tensor outside the blocks.")
        if self._cached is None or self._cached[:2] != (manifest.model, name):
            self._cached = (manifest.model, name, tensor_bytes(source, name))
        return _chunk(self._cached[2], offset)


def _chunk(data: bytes, offset: int) -> Message:
    piece = memoryview(data)[offset : offset + CHUNK_BYTES]
    return Message("chunk", {"size": len(data)}, (Part("data", "uint8", (len(piece),), piece),))


class ModelFetcher:
    """Fetches a model's outside from its servers, with a cache on disk."""

    def __init__(self, host: Host, cache_dir: Path) -> None:
        self._host = host
        self._cache_dir = cache_dir

    async def text_files(
        self, manifest: Manifest, servers: Sequence[tuple[bytes, tuple[str, ...]]]
    ) -> Mapping[str, bytes]:
        """Tokenizer and template files by name. Raises NobodyHasIt."""
        files: dict[str, bytes] = {}
        for entry in manifest.files:
            files[entry.name] = await self._fetch(
                manifest, "file", entry.name, entry.size, servers, partial(check_file, entry)
            )
        return files

    async def tensors(
        self, manifest: Manifest, servers: Sequence[tuple[bytes, tuple[str, ...]]], progress: Progress | None = None
    ) -> Mapping[str, bytes]:
        """Raw bytes of the tensors outside the blocks. Raises NobodyHasIt."""
        total = sum(_size_of(entry) for entry in manifest.tensors)
        if total > FETCH_BYTES_MAX:
            raise NobodyHasIt(f"The embeddings of {manifest.name} are larger than this node takes from others.")
        tensors: dict[str, bytes] = {}
        done = 0
        for entry in manifest.tensors:
            size = _size_of(entry)
            tensors[entry.name] = await self._fetch(
                manifest, "tensor", entry.name, size, servers, partial(check_tensor, entry)
            )
            done += size
            if progress is not None:
                progress(done, total)
        return tensors

    async def _fetch(
        self,
        manifest: Manifest,
        method: str,
        name: str,
        size: int,
        servers: Sequence[tuple[bytes, tuple[str, ...]]],
        check: Callable[[bytes], None],
    ) -> bytes:
        kept = self._cache_dir / manifest.model.hex() / f"{method}-{name.replace('/', '_')}"
        cached = _read_cached(kept, check)
        if cached is not None:
            return cached
        failure: PeerdError | None = None
        for peer_bytes, _ in servers:
            peer = PeerId.from_bytes(peer_bytes)
            try:
                data = await self._download(peer, manifest.model, method, name, size)
                check(data)
            except PeerdError as error:
                log.info("%s of %s could not be had from %s: %s", name, manifest.name, peer.short, error)
                failure = error
                continue
            _write_cached(kept, data)
            return data
        raise NobodyHasIt(
            f"No server of {manifest.name} gave {name} ({failure or 'there is none'}); try again when one is online."
        ) from failure

    async def _download(self, peer: PeerId, model: ModelId, method: str, name: str, size: int) -> bytes:
        out = bytearray()
        while len(out) < size or not out:
            header = {"model": bytes(model), "name": name, "offset": len(out)}
            answer = await call(
                self._host,
                peer,
                MODEL_PROTOCOL,
                Message(method, header),
                timeout_s=CALL_TIMEOUT_S,
                priority=Priority.BLOB,
            )
            if answer.header.get("size") != size or len(answer.parts) != 1:
                raise BadManifest("A server offers other files than its manifest says.")
            piece = answer.parts[0].data
            if not len(piece) or len(out) + len(piece) > size:
                if not size:
                    break
                raise BadManifest("A server offers other files than its manifest says.")
            out += piece
        return bytes(out)


def _size_of(entry: TensorDigest) -> int:
    size = DTYPE_BYTES.get(entry.dtype, 1)
    for length in entry.shape:
        size *= length
    return size


def _read_cached(path: Path, check: Callable[[bytes], None]) -> bytes | None:
    try:
        data = path.read_bytes()
        check(data)
    except (OSError, BadManifest):
        return None
    return data


def _write_cached(path: Path, data: bytes) -> None:
    """The cache is a convenience: a full disk costs a download next time."""
    temporary = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        log.warning("can't keep %s: %s", path.name, error.strerror)
