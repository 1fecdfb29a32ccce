"""Who a model is: its id, and the manifest that lets a driver fetch its small parts from any server and verify them.

Torch-free. Owns the canonical form of a config and the strict reading of manifests, which come from peers. DESIGN 7, "Model id"
and "Manifests".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocks.model.errors import BadManifest
from blocks.model.limits import (
    HASH_CHUNK_BYTES,
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_FILES,
    MAX_MANIFEST_TENSORS,
    MAX_NAME_CHARS,
    MAX_SHARDS,
)
from blocks.model.safetensors_header import ITEM_BITS, read_header
from blocks.model.source import ModelSource, WeightFile
from blocks.text import TEXT_FILES
from routing.types import MODEL_ID_BYTES, ComputeClass, ModelId

_INCIDENTAL = ("_name_or_path", "transformers_version")
_KINDS = ("demo", "directory", "hub")


def canonical_config(config: Mapping[str, Any]) -> str:
    """A config as JSON that is the same for the same model: keys sorted, no spaces, incidental fields left out."""
    kept = {key: value for key, value in config.items() if key not in _INCIDENTAL}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def model_id(config: Mapping[str, Any], weights: Iterable[WeightFile]) -> ModelId:
    """SHA-256 over the canonical config and the sorted (file, size, SHA-256) of the weights."""
    digest = hashlib.sha256(b"peerd-model-1\n")
    digest.update(canonical_config(config).encode() + b"\n")
    for file in sorted(weights, key=lambda file: file.name):
        digest.update(f"{json.dumps(file.name)} {file.size} {file.sha256}\n".encode())
    return ModelId(digest.digest())


def id_of(source: ModelSource) -> ModelId:
    """The model id of a source."""
    return model_id(source.config, source.weights)


@dataclass(frozen=True, slots=True)
class TensorDigest:
    """A tensor outside the blocks: enough to rebuild it from bytes that a peer sent, and to refuse wrong ones."""

    name: str
    dtype: str  # as safetensors names it: F32, BF16, ...
    shape: tuple[int, ...]
    sha256: bytes


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A tokenizer or template file."""

    name: str
    size: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a server says about the model that it serves; `from_document` is the only way in for a peer's."""

    model: ModelId
    name: str
    kind: str
    revision: str | None
    config: str  # canonical JSON
    weights: tuple[WeightFile, ...]
    compute: ComputeClass
    files: tuple[FileDigest, ...]
    tensors: tuple[TensorDigest, ...]

    def to_document(self) -> dict[str, Any]:
        """Plain values that msgpack carries."""
        return {
            "model": bytes(self.model),
            "name": self.name,
            "kind": self.kind,
            "revision": self.revision,
            "config": self.config,
            "weights": [[file.name, file.size, bytes.fromhex(file.sha256)] for file in self.weights],
            "compute": str(self.compute),
            "files": [[file.name, file.size, file.sha256] for file in self.files],
            "tensors": [[entry.name, entry.dtype, list(entry.shape), entry.sha256] for entry in self.tensors],
        }

    @classmethod
    def from_document(cls, document: object) -> Manifest:
        """Read a manifest strictly.

        Raises:
            BadManifest: a field is missing, of the wrong type or out of bounds, or the id doesn't cover the rest.
        """
        try:
            manifest = cls._read(document)
            config = json.loads(manifest.config)
            sound = isinstance(config, dict) and canonical_config(config) == manifest.config
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise BadManifest("A peer's model manifest is malformed: ask another server of the model.") from error
        if not sound or model_id(config, manifest.weights) != manifest.model:
            raise BadManifest("A peer's model manifest doesn't match its model id: ask another server of the model.")
        return manifest

    @classmethod
    def _read(cls, document: object) -> Manifest:
        if not isinstance(document, Mapping):
            raise TypeError("no mapping")
        kind = _text(document["kind"])
        if kind not in _KINDS:
            raise ValueError(kind)
        revision = document.get("revision")
        files = tuple(
            FileDigest(_file_name(name), _count(size), _digest(sha256))
            for name, size, sha256 in _rows(document["files"], MAX_MANIFEST_FILES)
        )
        if any(file.name not in TEXT_FILES for file in files):
            raise ValueError("a file that is no text file")
        return cls(
            model=ModelId(_digest(document["model"])),
            name=_text(document["name"]),
            kind=kind,
            revision=None if revision is None else _text(revision),
            config=_text(document["config"], MAX_CONFIG_BYTES),
            weights=tuple(
                WeightFile(_file_name(name), _count(size), _digest(sha256).hex())
                for name, size, sha256 in _rows(document["weights"], MAX_SHARDS)
            ),
            compute=ComputeClass.parse(_text(document["compute"])),
            files=files,
            tensors=tuple(_tensor(*row) for row in _rows(document["tensors"], MAX_MANIFEST_TENSORS)),
        )


def make_manifest(source: ModelSource, compute: ComputeClass) -> Manifest:
    """The manifest of a model whose files are here; hashes the text files and the tensors outside the blocks.

    The shards that hold those tensors must be on disk (`blocks.model.hub.fetch`).
    """
    names = source.tensors_outside_blocks()
    return Manifest(
        model=id_of(source),
        name=source.name,
        kind=source.kind,
        revision=source.revision,
        config=canonical_config(source.config),
        weights=source.weights,
        compute=compute,
        files=tuple(_file_digest(source.directory, name) for name in source.text_files),
        tensors=tuple(_tensor_digests(source, names)),
    )


def tensor_bytes(source: ModelSource, name: str) -> bytes:
    """The raw little-endian bytes of one tensor on disk, as a peer may ask for them."""
    path = source.directory / source.tensors[name]
    entry = read_header(path)[name]
    with path.open("rb") as file:
        file.seek(entry.start)
        return file.read(entry.size_bytes)


def check_tensor(expected: TensorDigest, data: bytes | memoryview) -> None:
    """Refuse bytes that are not the tensor of the manifest."""
    if hashlib.sha256(data).digest() != expected.sha256:
        raise BadManifest(f"A peer sent a wrong {expected.name}: ask another server of the model.")


def check_file(expected: FileDigest, data: bytes) -> None:
    """Refuse bytes that are not the file of the manifest."""
    if len(data) != expected.size or hashlib.sha256(data).digest() != expected.sha256:
        raise BadManifest(f"A peer sent a wrong {expected.name}: ask another server of the model.")


def _file_digest(directory: Path, name: str) -> FileDigest:
    data = (directory / name).read_bytes()
    return FileDigest(name, len(data), hashlib.sha256(data).digest())


def _tensor_digests(source: ModelSource, names: tuple[str, ...]) -> Iterable[TensorDigest]:
    headers = {file.name: read_header(source.directory / file.name) for file in source.files_of(names)}
    for name in names:
        entry = headers[source.tensors[name]][name]
        digest = hashlib.sha256()
        with (source.directory / source.tensors[name]).open("rb") as file:
            file.seek(entry.start)
            left = entry.size_bytes
            while left and (chunk := file.read(min(left, HASH_CHUNK_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
        yield TensorDigest(name, entry.dtype, entry.shape, digest.digest())


def _rows(value: object, limit: int) -> list[Any]:
    if not isinstance(value, list | tuple) or len(value) > limit:
        raise ValueError("no list, or too long")
    return list(value)


def _text(value: object, limit: int = MAX_NAME_CHARS) -> str:
    if not isinstance(value, str) or len(value) > limit:
        raise ValueError("no text, or too long")
    return value


def _file_name(value: object) -> str:
    name = _text(value)
    if not name or "/" in name or "\\" in name or name.startswith("."):
        raise ValueError("no plain file name")
    return name


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("no count")
    return value


def _digest(value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) != MODEL_ID_BYTES:
        raise ValueError("no SHA-256")
    return value


def _tensor(name: object, dtype: object, shape: object, sha256: object) -> TensorDigest:
    sizes = tuple(_count(size) for size in _rows(shape, 8))
    if dtype not in ITEM_BITS:
        raise ValueError("no tensor dtype")
    return TensorDigest(_text(name), str(dtype), sizes, _digest(sha256))
