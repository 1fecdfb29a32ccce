"""Bounds of frames and calls. Those of the wire format stand first."""

from __future__ import annotations

# --- docs/protocol.md, section 1 ---
VERSION = 1
PARTS_MAX = 16
HEADER_BYTES_MAX = 65536
SIGNATURE_BYTES = 64

# --- chosen ---
PART_BYTES_MAX = 64 << 20
MESSAGE_BYTES_MAX = 128 << 20
BODY_AT_ONCE_BYTES = 4 << 20
"""A raw part up to this size gets its buffer at once; a larger one's grows as its bytes come, so that a claim costs nothing."""
KIND_CHARS_MAX = 32
PART_NAME_CHARS_MAX = 64
DIMENSIONS_MAX = 8
HEADER_ITEMS_MAX = 16384
SEQUENCE_MAX = 2**63 - 1

CALL_TIMEOUT_S = 10.0
CALLS_PER_PEER_MAX = 64
NONCE_BYTES = 16
TEXT_CHARS_MAX = 512
