"""Model ids and manifests: what they cover, and what of a peer's is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.model.errors import BadManifest, BadModel
from blocks.model.head import head_from_peer, load_head
from blocks.model.identity import Manifest, canonical_config, check_file, id_of, make_manifest, model_id, tensor_bytes
from blocks.model.source import ModelSource, resolve
from routing.types import ComputeClass
from tests.models import make_tiny

COMPUTE = ComputeClass("none", "float32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve(str(make_tiny("gpt2", tmp_path_factory.mktemp("gpt2"))))


@pytest.fixture(scope="module")
def manifest(source: ModelSource) -> Manifest:
    return make_manifest(source, COMPUTE)


def test_the_id_ignores_order_and_incidental_fields_only() -> None:
    weights = resolve("demo").weights
    first = model_id({"a": 1, "b": [2], "_name_or_path": "x"}, weights)
    assert first == model_id({"b": [2], "a": 1, "transformers_version": "5"}, weights)
    assert first != model_id({"a": 1, "b": [3]}, weights)
    assert first != model_id({"a": 1, "b": [2]}, [dataclasses.replace(weights[0], size=1)])
    assert canonical_config({"b": "é", "a": 1}) == '{"a":1,"b":"\\u00e9"}'


def test_equal_weights_in_another_directory_are_the_same_model(source: ModelSource, tmp_path: Path) -> None:
    assert id_of(resolve(str(make_tiny("gpt2", tmp_path)))) == id_of(source)
    assert id_of(resolve(str(make_tiny("gpt2", tmp_path, seed=1)))) != id_of(source)


def test_a_manifest_survives_the_wire(manifest: Manifest) -> None:
    wire = msgpack.packb(manifest.to_document())
    assert Manifest.from_document(msgpack.unpackb(wire)) == manifest


def test_a_driver_can_build_the_head_from_what_a_peer_sends(source: ModelSource, manifest: Manifest) -> None:
    received = {entry.name: tensor_bytes(source, entry.name) for entry in manifest.tensors}
    ours, theirs = head_from_peer(manifest, received), load_head(source)
    hidden = theirs.embed([1, 2, 3], 4)
    assert torch.equal(ours.embed([1, 2, 3], 4), hidden)
    assert torch.equal(ours.logits(hidden), theirs.logits(hidden))
    file = manifest.files[0]
    check_file(file, (source.directory / file.name).read_bytes())


def test_a_wrong_tensor_or_file_from_a_peer_is_refused(source: ModelSource, manifest: Manifest) -> None:
    received = {entry.name: tensor_bytes(source, entry.name) for entry in manifest.tensors}
    name = manifest.tensors[0].name
    changed = bytearray(received[name])
    changed[5] ^= 1
    with pytest.raises(BadManifest, match=name):
        head_from_peer(manifest, received | {name: bytes(changed)})
    with pytest.raises(BadModel, match="was not fetched"):
        head_from_peer(manifest, {})
    with pytest.raises(BadManifest, match="wrong"):
        check_file(manifest.files[0], b"other")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", b"short"),
        ("model", bytes(32)),
        ("name", "n" * 1000),
        ("kind", "magic"),
        ("config", "{}"),
        ("config", "{"),
        ("config", '{"b": 1, "a": 2}'),
        ("weights", [["../x.safetensors", 1, bytes(32)]]),
        ("weights", [["x.safetensors", -1, bytes(32)]]),
        ("weights", 5),
        ("compute", "float32"),
        ("files", [["../../.bashrc", 1, bytes(32)]]),
        ("files", [["run.sh", 1, bytes(32)]]),
        ("tensors", [["t", "PICKLE", [1], bytes(32)]]),
        ("tensors", [["t", "F32", [-1], bytes(32)]]),
        ("tensors", [["t", "F32", [1] * 9, bytes(32)]]),
        ("tensors", [["t", "F32"]]),
    ],
)
def test_a_manifest_with_a_bad_field_is_refused(manifest: Manifest, field: str, value: Any) -> None:
    with pytest.raises(BadManifest):
        Manifest.from_document(manifest.to_document() | {field: value})


def test_a_manifest_that_lacks_a_field_is_refused(manifest: Manifest) -> None:
    for field in manifest.to_document():
        if field != "revision":
            with pytest.raises(BadManifest):
                Manifest.from_document({name: item for name, item in manifest.to_document().items() if name != field})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_document_makes_the_reader_raise_anything_else(data: st.DataObject) -> None:
    document = make_manifest_of_demo() if data.draw(st.booleans()) else data.draw(VALUES)
    if isinstance(document, dict) and "model" in document:
        document = document | {data.draw(st.sampled_from(sorted(document))): data.draw(VALUES)}
    try:
        Manifest.from_document(document)
    except BadManifest:
        pass


_DEMO: list[dict[str, Any]] = []


def make_manifest_of_demo() -> dict[str, Any]:
    if not _DEMO:
        _DEMO.append(make_manifest(resolve("demo"), COMPUTE).to_document())
    return _DEMO[0]
