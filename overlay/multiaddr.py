"""Multiaddrs: ip4, ip6, dns*, tcp, p2p, p2p-circuit, as text and bytes (libp2p addressing, multiaddr protocols.csv).

Pure. Decoding is strict and bounded; an unknown protocol makes one address undecodable, never a message.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from overlay.errors import InvalidAddress, ProtocolViolation
from overlay.varint import decode_varint, encode_varint

MULTIADDR_BYTES_MAX = 1024
HOST_NAME_CHARS_MAX = 253
PARTS_MAX = 16
ADDRESSES_CACHED = 16384
"""Read and written forms that are kept: the same few thousand addresses of a network pass by all day."""

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE58_INDEX = {character: index for index, character in enumerate(_BASE58)}


def encode_base58(data: bytes) -> str:
    """Base58btc."""
    number = int.from_bytes(data, "big")
    out = ""
    while number:
        number, digit = divmod(number, 58)
        out = _BASE58[digit] + out
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + out


def decode_base58(text: str) -> bytes:
    """Base58btc; raises ValueError."""
    if len(text) > 128:
        raise ValueError("too long")
    number = 0
    for character in text:
        if character not in _BASE58_INDEX:
            raise ValueError(f"{character!r} is not base58")
        number = number * 58 + _BASE58_INDEX[character]
    body = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return b"\0" * (len(text) - len(text.lstrip("1"))) + body


def _port_bytes(text: str) -> bytes:
    if not text.isdecimal() or len(text) > 5 or int(text) > 65535:
        raise ValueError(f"{text!r} is no port")
    return int(text).to_bytes(2, "big")


def _name_bytes(text: str) -> bytes:
    if not text or len(text) > HOST_NAME_CHARS_MAX or "/" in text:
        raise ValueError(f"{text!r} is no host name")
    return text.encode("idna" if not text.isascii() else "ascii")


def _peer_bytes(text: str) -> bytes:
    from overlay.identity import PeerId

    return PeerId.from_text(text).multihash


@dataclass(frozen=True, slots=True)
class _Kind:
    name: str
    code: int
    size: int
    """Bytes of the value; -1 length-prefixed, 0 none."""
    to_bytes: Callable[[str], bytes]
    to_text: Callable[[bytes], str]


_KINDS = (
    _Kind("ip4", 4, 4, lambda t: ipaddress.IPv4Address(t).packed, lambda b: str(ipaddress.IPv4Address(b))),
    _Kind("ip6", 41, 16, lambda t: ipaddress.IPv6Address(t).packed, lambda b: str(ipaddress.IPv6Address(b))),
    _Kind("tcp", 6, 2, _port_bytes, lambda b: str(int.from_bytes(b, "big"))),
    _Kind("udp", 273, 2, _port_bytes, lambda b: str(int.from_bytes(b, "big"))),
    _Kind("dns", 53, -1, _name_bytes, lambda b: b.decode("ascii")),
    _Kind("dns4", 54, -1, _name_bytes, lambda b: b.decode("ascii")),
    _Kind("dns6", 55, -1, _name_bytes, lambda b: b.decode("ascii")),
    _Kind("dnsaddr", 56, -1, _name_bytes, lambda b: b.decode("ascii")),
    _Kind("p2p", 421, -1, _peer_bytes, encode_base58),
    _Kind("p2p-circuit", 290, 0, lambda t: b"", lambda b: ""),
    _Kind("quic-v1", 461, 0, lambda t: b"", lambda b: ""),
    _Kind("ws", 477, 0, lambda t: b"", lambda b: ""),
    _Kind("wss", 478, 0, lambda t: b"", lambda b: ""),
)
_BY_NAME = {kind.name: kind for kind in _KINDS} | {"ipfs": next(k for k in _KINDS if k.name == "p2p")}
_BY_CODE = {kind.code: kind for kind in _KINDS}


@dataclass(frozen=True, slots=True, order=True)
class Multiaddr:
    """An ordered run of (protocol, value text) pairs."""

    parts: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str) -> Multiaddr:
        """Read ``/ip4/127.0.0.1/tcp/4001/p2p/12D3...``. Raises InvalidAddress with a sentence."""
        words = text.split("/")
        if len(text) > MULTIADDR_BYTES_MAX or len(words) < 2 or words[0] != "":
            raise InvalidAddress(
                f"{text[:80]!r} is no multiaddr; write it like /ip4/203.0.113.7/tcp/4001/p2p/12D3KooW..."
            )
        parts: list[tuple[str, str]] = []
        rest = words[1:]
        while rest:
            name = rest.pop(0)
            kind = _BY_NAME.get(name)
            if kind is None:
                raise InvalidAddress(
                    f"{text[:80]!r} names the unknown protocol {name[:20]!r}; use ip4, ip6, dns, tcp and p2p."
                )
            value = ""
            if kind.size != 0:
                if not rest:
                    raise InvalidAddress(f"{text[:80]!r} ends after {name!r}; a value is missing.")
                value = rest.pop(0)
            try:
                parts.append((kind.name, kind.to_text(kind.to_bytes(value))))
            except (ValueError, UnicodeError, InvalidAddress) as error:
                raise InvalidAddress(f"{text[:80]!r} has a bad {name}: {error}.") from error
        if not parts or len(parts) > PARTS_MAX:
            raise InvalidAddress(f"{text[:80]!r} has no parts, or too many.")
        return cls(tuple(parts))

    @classmethod
    def decode(cls, data: bytes) -> Multiaddr:
        """Read the binary form. Raises ProtocolViolation."""
        return _decoded(bytes(data))

    @classmethod
    def _decode(cls, data: bytes) -> Multiaddr:
        if len(data) > MULTIADDR_BYTES_MAX:
            raise ProtocolViolation("A peer sent a multiaddr over 1 KiB.")
        parts: list[tuple[str, str]] = []
        offset = 0
        while offset < len(data):
            code, offset = _need(decode_varint(data, offset))
            kind = _BY_CODE.get(code)
            if kind is None or len(parts) >= PARTS_MAX:
                raise ProtocolViolation("A peer sent a multiaddr of a protocol that is not known here.")
            size = kind.size
            if size < 0:
                size, offset = _need(decode_varint(data, offset))
            value = bytes(data[offset : offset + size])
            if len(value) != size:
                raise ProtocolViolation("A peer sent a multiaddr that ends too early.")
            offset += size
            try:
                text = kind.to_text(value)
                kind.to_bytes(text)
            except (ValueError, UnicodeError, InvalidAddress) as error:
                raise ProtocolViolation(f"A peer sent a multiaddr with a bad {kind.name}.") from error
            parts.append((kind.name, text))
        if not parts:
            raise ProtocolViolation("A peer sent an empty multiaddr.")
        return cls(tuple(parts))

    def encode(self) -> bytes:
        """The binary form."""
        return _encoded(self.parts)

    def __hash__(self) -> int:
        return hash(self.parts)

    def get(self, name: str) -> str | None:
        """The value of the last part of that name."""
        return next((value for part, value in reversed(self.parts) if part == name), None)

    @property
    def host(self) -> str | None:
        """The address or name that is dialled."""
        return next((value for name, value in self.parts if name in ("ip4", "ip6", "dns", "dns4", "dns6")), None)

    @property
    def port(self) -> int | None:
        port = next((value for name, value in self.parts if name == "tcp"), None)
        return None if port is None else int(port)

    @property
    def is_tcp(self) -> bool:
        """Whether it is exactly host/tcp, with or without /p2p."""
        names = [name for name, _ in self.parts if name != "p2p"]
        return len(names) == 2 and names[0] in ("ip4", "ip6", "dns", "dns4", "dns6") and names[1] == "tcp"

    @property
    def is_loopback(self) -> bool:
        """Whether it is this very machine."""
        host = self.host
        return host is not None and _is_loopback(host)

    @property
    def is_loopback_or_private(self) -> bool:
        """Whether the address can't be a stranger's on the internet."""
        host = self.host
        return host is not None and _is_private(host)

    def with_peer(self, peer: str) -> Multiaddr:
        """The same address ending in ``/p2p/ID``."""
        return Multiaddr((*self.without_peer().parts, ("p2p", peer)))

    def without_peer(self) -> Multiaddr:
        """The same without a trailing ``/p2p/ID``."""
        return Multiaddr(self.parts[:-1]) if self.parts and self.parts[-1][0] == "p2p" else self

    def __str__(self) -> str:
        return "".join(f"/{name}" if _BY_NAME[name].size == 0 else f"/{name}/{value}" for name, value in self.parts)


def _need(decoded: tuple[int, int] | None) -> tuple[int, int]:
    if decoded is None:
        raise ProtocolViolation("A peer sent a multiaddr that ends too early.")
    return decoded


@lru_cache(maxsize=ADDRESSES_CACHED)
def _decoded(data: bytes) -> Multiaddr:
    return Multiaddr._decode(data)


@lru_cache(maxsize=ADDRESSES_CACHED)
def _encoded(parts: tuple[tuple[str, str], ...]) -> bytes:
    out = bytearray()
    for name, text in parts:
        kind = _BY_NAME[name]
        value = kind.to_bytes(text)
        out += encode_varint(kind.code)
        if kind.size < 0:
            out += encode_varint(len(value))
        out += value
    return bytes(out)


@lru_cache(maxsize=ADDRESSES_CACHED)
@lru_cache(maxsize=ADDRESSES_CACHED)
def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@lru_cache(maxsize=ADDRESSES_CACHED)
def _is_private(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return False


@lru_cache(maxsize=ADDRESSES_CACHED)
def _host_part(host: str) -> tuple[str, str]:
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return f"ip{address.version}", str(address)


def tcp_address(host: str, port: int) -> Multiaddr:
    """``/ip4/HOST/tcp/PORT`` or ip6, of a socket's name."""
    return Multiaddr((_host_part(host), ("tcp", str(port))))
