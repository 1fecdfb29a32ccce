"""`/peerd/model/1`: what a driver needs of a model, from whoever serves it: text files and the tensors outside the blocks.

Block weights never travel (issue of their source's). Everything fetched is verified against the manifest, which the model id covers,
so any server will do; what was fetched is kept on disk under the model's id.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blocks.model.errors import BadManifest
from blocks.model.identity import Manifest, TensorDigest, check_file, check_tensor
from blocks.model.safetensors_header import ITEM_BITS, read_header
from blocks.model.source import ModelSource
from overlay.errors import Blame, InvalidAddress, PeerdError, ProtocolViolation
from overlay.host import Host
from overlay.identity import PeerId
from overlay.multiaddr import Multiaddr
from overlay.rpc.types import Message, Part
from overlay.rpc.unary import call, serve_unary
from overlay.stream import Priority
from routing.types import ModelId

log = logging.getLogger(__name__)

MODEL_PROTOCOL = "/peerd/model/1"
CHUNK_BYTES = 4 << 20
TENSOR_BYTES_MAX = 8 << 30
TEXT_BYTES_MAX = 256 << 20
CALL_TIMEOUT_S = 30.0
READS_AT_ONCE = 8
"""Chunks read from disk at once, for all peers together: each is held in memory until it is sent."""

Servers = Sequence[tuple[bytes, tuple[str, ...]]]
"""(peer, addresses) of who may be asked, best first."""

Progress = Callable[[int, int], None]


class NobodyHasIt(PeerdError):
    """No server gave what the manifest promises."""

    code = "model-unavailable"
    exit_code = 55
    http_status = 503
    retryable = True
    blame = Blame.NETWORK


class ModelShelf:
    """What this node hands out: models whose files are here. Reads off the loop, so that serving goes on meanwhile."""

    def __init__(self, host: Host) -> None:
        self._sources: dict[ModelId, tuple[ModelSource, Manifest]] = {}
        self._places: dict[tuple[ModelId, str], _Place] = {}
        self._reads = asyncio.Semaphore(READS_AT_ONCE)
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
        entry = next((entry for entry in manifest.files if entry.name == name), None)
        if entry is None:
            raise ProtocolViolation("The manifest has no such file.")
        return await self._read(_Place(source.directory / name, 0, entry.size), offset)

    async def _answer_tensor(self, peer: PeerId, message: Message) -> Message:
        source, manifest, name, offset = self._find(message)
        if all(entry.name != name for entry in manifest.tensors):
            raise ProtocolViolation("The manifest has no such tensor outside the blocks.")
        place = self._places.get((manifest.model, name))
        if place is None:
            place = await asyncio.to_thread(_place_of, source, name)
            self._places[manifest.model, name] = place  # bounded by the manifests of this node's own models
        return await self._read(place, offset)

    async def _read(self, place: _Place, offset: int) -> Message:
        async with self._reads:
            piece = await asyncio.to_thread(place.read, offset)
        return Message("chunk", {"size": place.size}, (Part("data", "uint8", (len(piece),), piece),))


@dataclass(frozen=True, slots=True)
class _Place:
    """A run of bytes in a file."""

    path: Path
    start: int
    size: int

    def read(self, offset: int) -> bytes:
        count = min(CHUNK_BYTES, max(0, self.size - offset))
        try:
            with self.path.open("rb") as file:
                file.seek(self.start + offset)
                return file.read(count)
        except OSError as error:
            log.warning("%s can't be read for a peer: %s", self.path.name, error.strerror)
            raise NobodyHasIt("This server can't read that file any more.") from error


def _place_of(source: ModelSource, name: str) -> _Place:
    path = source.directory / source.tensors[name]
    entry = read_header(path)[name]
    return _Place(path, entry.start, entry.size_bytes)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One thing to fetch, and how it is known when it is there."""

    method: str
    name: str
    size: int
    sha256: bytes
    check: Callable[[bytes], None]


class ModelFetcher:
    """Fetches a model's outside from its servers, with a cache on disk."""

    def __init__(self, host: Host, cache_dir: Path) -> None:
        self._host = host
        self._cache_dir = cache_dir

    async def text_files(self, manifest: Manifest, servers: Servers) -> Mapping[str, bytes]:
        """Tokenizer and template files by name. Raises NobodyHasIt."""
        wanted = [
            _Wanted("file", entry.name, entry.size, entry.sha256, partial(check_file, entry))
            for entry in manifest.files
        ]
        return await self._fetch_all(manifest, wanted, TEXT_BYTES_MAX, servers, None)

    async def tensors(
        self, manifest: Manifest, servers: Servers, progress: Progress | None = None
    ) -> Mapping[str, bytes]:
        """Raw bytes of the tensors outside the blocks. Raises NobodyHasIt."""
        wanted = [
            _Wanted("tensor", entry.name, _size_of(entry), entry.sha256, partial(check_tensor, entry))
            for entry in manifest.tensors
        ]
        return await self._fetch_all(manifest, wanted, TENSOR_BYTES_MAX, servers, progress)

    async def _fetch_all(
        self, manifest: Manifest, wanted: Sequence[_Wanted], bytes_max: int, servers: Servers, progress: Progress | None
    ) -> Mapping[str, bytes]:
        total, done = sum(entry.size for entry in wanted), 0
        if total > bytes_max:
            raise NobodyHasIt(f"The files of {manifest.name} are larger than this node takes from others.")
        found: dict[str, bytes] = {}
        for entry in wanted:
            found[entry.name] = await self._fetch(manifest, entry, servers)
            done += entry.size
            if progress is not None:
                progress(done, total)
        return found

    async def _fetch(self, manifest: Manifest, wanted: _Wanted, servers: Servers) -> bytes:
        kept = self._cache_dir / manifest.model.hex() / f"{wanted.method}-{wanted.sha256.hex()}"
        cached = await asyncio.to_thread(_read_cached, kept, wanted.check)
        if cached is not None:
            return cached
        failure: PeerdError | None = None
        for peer_bytes, addresses in servers:
            peer = PeerId.from_bytes(peer_bytes)
            try:
                data = await self._download(peer, _dialable(addresses), manifest.model, wanted)
                await asyncio.to_thread(wanted.check, data)
            except PeerdError as error:
                log.info("%s of %s could not be had from %s: %s", wanted.name, manifest.name, peer.short, error)
                failure = error
                continue
            await asyncio.to_thread(_write_cached, kept, data)
            return data
        raise NobodyHasIt(
            f"No server of {manifest.name} gave {wanted.name} ({failure or 'there is none'}); try again when one is online."
        ) from failure

    async def _download(self, peer: PeerId, addresses: Sequence[Multiaddr], model: ModelId, wanted: _Wanted) -> bytes:
        size = wanted.size
        out = bytearray()
        while len(out) < size:
            header = {"model": bytes(model), "name": wanted.name, "offset": len(out)}
            answer = await call(
                self._host,
                peer,
                MODEL_PROTOCOL,
                Message(wanted.method, header),
                timeout_s=CALL_TIMEOUT_S,
                addresses=addresses,
                message_bytes_max=2 * CHUNK_BYTES,
                priority=Priority.BLOB,
            )
            if answer.header.get("size") != size or len(answer.parts) != 1:
                raise BadManifest("A server offers other files than its manifest says.")
            piece = answer.parts[0].data
            if not len(piece) or len(out) + len(piece) > size:
                raise BadManifest("A server offers other files than its manifest says.")
            out += piece
        return bytes(out)


def _size_of(entry: TensorDigest) -> int:
    return math.prod(entry.shape) * ITEM_BITS[entry.dtype] // 8


def _dialable(addresses: Sequence[str]) -> tuple[Multiaddr, ...]:
    """What can be read of the addresses in a record."""
    parsed = []
    for text in addresses:
        try:
            parsed.append(Multiaddr.parse(text))
        except InvalidAddress:
            continue
    return tuple(parsed)


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
