"""Manifests as DHT values: small enough for many shards, and refused in any other form."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import msgpack
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from blocks.model.errors import BadManifest
from blocks.model.identity import FileDigest, Manifest, TensorDigest, canonical_config, model_id
from blocks.model.source import WeightFile
from overlay.dht.limits import VALUE_BYTES_MAX
from peerd.manifest_record import MANIFEST_BYTES_MAX, ManifestTooLarge, decode_manifest, encode_manifest
from routing.types import ComputeClass

CONFIG = {"model_type": "llama", "num_hidden_layers": 61, "hidden_size": 64}


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def manifest(shards: int, name: str = "big") -> Manifest:
    names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(shards)]
    weights = tuple(WeightFile(name, 5 << 30, digest(name).hex()) for name in names)
    return Manifest(
        model_id(CONFIG, weights), name, "directory", None, canonical_config(CONFIG), weights,
        ComputeClass("none", "float32"), (FileDigest("tokenizer.json", 9, digest("t")),),
        (TensorDigest("model.norm.weight", "BF16", (64,), digest("n")),),
    )  # fmt: skip


SMALL = encode_manifest(manifest(2))


def test_a_manifest_survives_the_wire_even_with_hundreds_of_shards() -> None:
    for shards in (1, 163, 300):
        value = encode_manifest(manifest(shards))
        assert len(value) <= VALUE_BYTES_MAX
        assert decode_manifest(value) == manifest(shards)


def test_one_that_fits_into_no_record_says_what_to_do() -> None:
    with pytest.raises(ManifestTooLarge, match="fewer, larger shards"):
        encode_manifest(manifest(2000))


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_never_does_more_than_refuse(position: int, flip: int) -> None:
    value = bytearray(SMALL)
    value[position % len(value)] ^= flip
    try:
        decode_manifest(bytes(value))
    except BadManifest:
        pass


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_one_way(value: bytes) -> None:
    for packed in (value, zstandard.compress(value)):
        with pytest.raises(BadManifest):
            decode_manifest(packed)


def test_a_bomb_is_not_unpacked() -> None:
    with pytest.raises(BadManifest, match="too large"):
        decode_manifest(zstandard.compress(bytes(MANIFEST_BYTES_MAX + 1)))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(msgpack.packb(manifest(1).to_document()))
    with pytest.raises(BadManifest):
        decode_manifest(unsized)


@pytest.mark.parametrize("name", ["", "a\x1b[2Jb", "two\nlines"])
def test_a_name_that_would_move_a_cursor_is_refused(name: str) -> None:
    with pytest.raises(BadManifest, match="printed"):
        decode_manifest(encode_manifest(replace(manifest(1), name=name)))
