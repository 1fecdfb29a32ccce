"""Noise transport messages: u16 length, ChaCha20-Poly1305, one counter per direction. Pure.

Decryption failure ends the connection: there is no alert. An empty plaintext is legal and skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from overlay.errors import ProtocolViolation

MESSAGE_BYTES_MAX = 65535
TAG_BYTES = 16
PLAINTEXT_BYTES_MAX = MESSAGE_BYTES_MAX - TAG_BYTES
NONCE_PREFIX = b"\0\0\0\0"


class CipherState:
    """One direction's key and counter."""

    __slots__ = ("_aead", "_count")

    def __init__(self, key: bytes) -> None:
        self._aead = ChaCha20Poly1305(key)
        self._count = 0

    def seal(self, plaintext: bytes | bytearray | memoryview) -> bytes:
        """One message without its length. Nonce order is wire order: send what this returns at once, in order."""
        count = self._count
        self._count = count + 1
        return self._aead.encrypt(NONCE_PREFIX + count.to_bytes(8, "little"), plaintext, None)

    def seal_framed(self, plaintext: bytes | bytearray | memoryview) -> bytearray:
        """One message behind its u16 length, sealed in place: no copy but the encryption itself."""
        count = self._count
        self._count = count + 1
        size = len(plaintext) + TAG_BYTES
        out = bytearray(2 + size)
        out[0], out[1] = size >> 8, size & 0xFF
        self._aead.encrypt_into(NONCE_PREFIX + count.to_bytes(8, "little"), plaintext, None, memoryview(out)[2:])
        return out

    def seal_framed_each(self, plaintexts: Sequence[bytes | bytearray | memoryview]) -> bytearray:
        """Several messages in order, each as by `seal_framed`, in one buffer for one write."""
        out = bytearray(sum(map(len, plaintexts)) + len(plaintexts) * (2 + TAG_BYTES))
        view, start = memoryview(out), 0
        for plaintext in plaintexts:
            count = self._count
            self._count = count + 1
            size = len(plaintext) + TAG_BYTES
            out[start], out[start + 1] = size >> 8, size & 0xFF
            end = start + 2 + size
            self._aead.encrypt_into(NONCE_PREFIX + count.to_bytes(8, "little"), plaintext, None, view[start + 2 : end])
            start = end
        return out

    def open_into(self, sealed: bytes | bytearray | memoryview, buffer: memoryview) -> memoryview:
        """The plaintext as a view of the front of ``buffer`` (of `PLAINTEXT_BYTES_MAX`); raises ProtocolViolation."""
        count = self._count
        self._count = count + 1
        size = len(sealed) - TAG_BYTES
        if size < 0:
            raise ProtocolViolation("A message from a peer is too short to be sealed; the connection is closed.")
        plain = buffer[:size]
        try:
            self._aead.decrypt_into(NONCE_PREFIX + count.to_bytes(8, "little"), sealed, None, plain)
        except InvalidTag as error:
            raise ProtocolViolation(
                "A message from a peer was altered on the way; the connection is closed."
            ) from error
        return plain

    def open(self, sealed: bytes | bytearray | memoryview) -> bytes:
        """The plaintext; raises ProtocolViolation."""
        count = self._count
        self._count = count + 1
        try:
            return self._aead.decrypt(NONCE_PREFIX + count.to_bytes(8, "little"), sealed, None)
        except InvalidTag as error:
            raise ProtocolViolation(
                "A message from a peer was altered on the way; the connection is closed."
            ) from error


class FrameSplitter:
    """Cuts received bytes into length-prefixed messages, keeping only an incomplete rest.

    Whole messages are yielded as views into what was fed, without a copy; a view is valid until the next feed.
    """

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: memoryview) -> Iterator[memoryview]:
        rest = self._rest
        offset = 0
        if rest:
            if len(rest) < 2:
                take = min(2 - len(rest), len(data))
                rest += data[:take]
                offset = take
                if len(rest) < 2:
                    return
            need = 2 + (rest[0] << 8 | rest[1]) - len(rest)
            rest += data[offset : offset + need]
            if len(data) - offset < need:
                return
            offset += need
            whole, self._rest = rest, bytearray()
            yield memoryview(whole)[2:]
        end = len(data)
        while end - offset >= 2:
            length = data[offset] << 8 | data[offset + 1]
            if end - offset - 2 < length:
                break
            yield data[offset + 2 : offset + 2 + length]
            offset += 2 + length
        if offset < end:
            self._rest += data[offset:]
