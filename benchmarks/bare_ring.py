"""The floor of a hop: bare asyncio processes that pass bytes round a ring, each decrypting, checking, signing and encrypting them.

No streams, sessions or device thread: one length-prefixed ChaCha20-Poly1305 message per token, with a small msgpack header and an
Ed25519 signature over the SHA-256 of the rest. Nothing of peerd but its test of speed.
"""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import time

import msgpack
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from nacl.bindings import crypto_sign, crypto_sign_open, crypto_sign_seed_keypair

AEAD = ChaCha20Poly1305(bytes(32))
PUBLIC_KEY, SECRET_KEY = crypto_sign_seed_keypair(bytes(32))
NONCE = bytes(12)
RING_BYTES = 1 << 18
LENGTH_BYTES = 4
SIGNATURE_BYTES = 64
HEADER = {"k": "window", "f": bytes(38), "t": bytes(38), "s": bytes(16), "n": 1, "o": 1, "m": bytes(32), "w": "last"}


def pack(body: bytes) -> bytes:
    """Header, signature, body; sealed behind a length."""
    header: bytes = msgpack.packb(HEADER)
    signature = crypto_sign(hashlib.sha256(header).digest() + hashlib.sha256(body).digest(), SECRET_KEY)[
        :SIGNATURE_BYTES
    ]
    sealed = AEAD.encrypt(NONCE, len(header).to_bytes(LENGTH_BYTES, "big") + header + signature + body, None)
    return len(sealed).to_bytes(LENGTH_BYTES, "big") + sealed


def unpack(sealed: bytes | memoryview) -> bytes:
    """The body, its signature checked."""
    plain = AEAD.decrypt(NONCE, sealed, None)
    start = LENGTH_BYTES + int.from_bytes(plain[:LENGTH_BYTES], "big")
    header = plain[LENGTH_BYTES:start]
    msgpack.unpackb(header)
    body = plain[start + SIGNATURE_BYTES :]
    signed = hashlib.sha256(header).digest() + hashlib.sha256(body).digest()
    crypto_sign_open(plain[start : start + SIGNATURE_BYTES] + signed, PUBLIC_KEY)
    return body


class Link(asyncio.BufferedProtocol):
    """One connection; whole messages go to ``received``."""

    def __init__(self) -> None:
        self._ring = memoryview(bytearray(RING_BYTES))
        self._gathered = bytearray()
        self.transport: asyncio.Transport | None = None
        self.next: Link | None = None
        self.arrived: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._ring

    def buffer_updated(self, nbytes: int) -> None:
        self._gathered += self._ring[:nbytes]
        gathered = self._gathered
        if len(gathered) < LENGTH_BYTES:
            return
        end = LENGTH_BYTES + int.from_bytes(gathered[:LENGTH_BYTES], "big")
        if len(gathered) < end:
            return
        self._gathered = bytearray()
        body = unpack(memoryview(gathered)[LENGTH_BYTES:end])
        if self.arrived is not None:
            self.arrived.set_result(None)
        elif self.next is not None and self.next.transport is not None:
            self.next.transport.write(pack(body))


async def serve(onwards: int) -> None:
    """Listen on a port that is printed; pass everything on to ``onwards``."""
    loop = asyncio.get_running_loop()
    _, outbound = await loop.create_connection(Link, "127.0.0.1", onwards)

    def accepted() -> Link:
        link = Link()
        link.next = outbound
        return link

    server = await loop.create_server(accepted, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    over = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), over.set)
    await over.wait()
    loop.remove_reader(sys.stdin.fileno())


async def _rounds(size: int, tokens: int, hops_max: int, rounds: int) -> list[list[float]]:
    loop = asyncio.get_running_loop()
    inbound: list[Link] = []

    def accepted() -> Link:
        inbound.append(Link())
        return inbound[-1]

    server = await loop.create_server(accepted, "127.0.0.1", 0)
    processes: list[subprocess.Popen[str]] = []
    rings: list[tuple[Link, Link]] = []
    steps: list[list[float]] = []
    for count in range(1, hops_max + 1):
        onwards = server.sockets[0].getsockname()[1]
        for _ in range(count):
            command = [sys.executable, "-m", "benchmarks.bare_ring", str(onwards)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes.append(process)
            assert process.stdout is not None
            onwards = int(await asyncio.to_thread(process.stdout.readline))
        _, first = await loop.create_connection(Link, "127.0.0.1", onwards)
        while len(inbound) < count:
            await asyncio.sleep(0.001)
        rings.append((first, inbound[-1]))
        steps.append([])
    body = bytes(size)
    for _ in range(rounds):
        for index, (first, last) in enumerate(rings):
            for _ in range(tokens):
                last.arrived = loop.create_future()
                started = time.perf_counter()
                assert first.transport is not None
                first.transport.write(pack(body))
                await last.arrived
                steps[index].append(1000 * (time.perf_counter() - started))
    server.close()
    for process in processes:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        process.wait(10)
        process.stdout.close()
    return steps


def measure(size: int, tokens: int, hops_max: int, rounds: int) -> list[list[float]]:
    """Milliseconds of each trip round rings of 1 to ``hops_max`` processes."""
    return asyncio.run(_rounds(size, tokens, hops_max, rounds))


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
