"""A model's manifest as a DHT value: msgpack, compressed, since a model of many shards would outgrow a record. Pure.

Owns the format and its bounds; what a manifest must hold is `blocks.model.identity`'s. A name that could move a cursor is refused:
people read it.
"""

from __future__ import annotations

import msgpack
import zstandard

from blocks.model.errors import BadManifest
from blocks.model.identity import Manifest
from overlay.dht.limits import VALUE_BYTES_MAX
from overlay.errors import Blame, PeerdError

MANIFEST_BYTES_MAX = 256 << 10
"""Decompressed."""
LEVEL = 10


class ManifestTooLarge(PeerdError):
    """A model with so many files that its manifest fits into no record."""

    code = "unsupported-model"
    exit_code = 42
    http_status = 422
    blame = Blame.USER


def encode_manifest(manifest: Manifest) -> bytes:
    """Raises ManifestTooLarge."""
    packed: bytes = msgpack.packb(manifest.to_document())
    value = zstandard.ZstdCompressor(level=LEVEL).compress(packed)
    if len(packed) > MANIFEST_BYTES_MAX or len(value) > VALUE_BYTES_MAX:
        raise ManifestTooLarge(
            f"{manifest.name} has too many files to be announced ({len(manifest.weights)}); save it in fewer, larger shards."
        )
    return value


def decode_manifest(value: bytes) -> Manifest:
    """Raises BadManifest, whatever came."""
    try:
        # The bound holds whatever size the frame claims: a frame without one is refused by `decompress`'s own rule.
        if not 0 < zstandard.frame_content_size(value) <= MANIFEST_BYTES_MAX:
            raise BadManifest("A peer's model manifest is too large.")
        packed = zstandard.ZstdDecompressor().decompress(value, max_output_size=MANIFEST_BYTES_MAX)
        document = msgpack.unpackb(packed, max_ext_len=0)
    except (zstandard.ZstdError, ValueError, RecursionError, msgpack.UnpackException) as error:
        raise BadManifest("A peer's model manifest is malformed: ask another server of the model.") from error
    manifest = Manifest.from_document(document)
    if not manifest.name or not manifest.name.isprintable() or not (manifest.revision or "-").isprintable():
        raise BadManifest("A peer's model manifest has a name that can't be printed.")
    return manifest
