"""Tensors from disk, only those that are asked for: lazily, counted, and never by pickle.

Owns the reading of safetensors data (mapped by the `safetensors` library, after `safetensors_header` found the file sound) and of
tensors that came from a peer as bytes. A tensor is read when the loader slices it, so that a model never lies in memory twice.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from blocks.model.errors import BadModel
from blocks.model.identity import TensorDigest, check_tensor
from blocks.model.safetensors_header import read_header
from blocks.model.source import ModelSource, Progress

_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class LazyTensor:
    """Stands for a tensor of a file until it is sliced; counts its bytes when that happens."""

    def __init__(self, view: Any, size_bytes: int, counter: _Counter, where: str) -> None:
        self._view = view
        self._size_bytes = size_bytes
        self._counter = counter
        self._where = where

    def __getitem__(self, index: Any) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._view[index]
        except SafetensorError as error:
            raise BadModel(f"{self._where} is damaged: fetch it again.") from error
        self._counter.add(self._size_bytes)
        return tensor

    def get_shape(self) -> list[int]:
        return list(self._view.get_shape())

    def get_dtype(self) -> str:
        return str(self._view.get_dtype())


class _Counter:
    """Bytes read so far, reported in order; loaders slice from several threads."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress:
                self._progress(self._done, self._total)


@contextmanager
def open_tensors(
    source: ModelSource, names: Sequence[str], progress: Progress | None = None
) -> Iterator[dict[str, LazyTensor]]:
    """Lazily readable tensors ``names`` of a model whose shards are on disk.

    Raises:
        BadModel: a file is missing, truncated or damaged; the sentence names it.
    """
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(source.tensors[name], []).append(name)
    headers = {file: read_header(source.directory / file) for file in sorted(by_file)}
    for file, wanted in by_file.items():
        missing = next((name for name in wanted if name not in headers[file]), None)
        if missing is not None:
            raise BadModel(f"{source.directory / file} lacks the tensor {missing}: fetch it again.")
    counter = _Counter(sum(headers[source.tensors[name]][name].size_bytes for name in names), progress)
    with ExitStack() as stack:
        lazy: dict[str, LazyTensor] = {}
        for file in sorted(by_file):
            path = source.directory / file
            try:
                opened = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise BadModel(f"{path} is damaged or can't be read: fetch it again.") from error
            for name in by_file[file]:
                lazy[name] = LazyTensor(opened.get_slice(name), headers[file][name].size_bytes, counter, str(path))
        yield lazy


def tensors_from_bytes(
    entries: Sequence[TensorDigest], received: Mapping[str, bytes | bytearray | memoryview]
) -> dict[str, torch.Tensor]:
    """Tensors that a peer sent, each verified against its manifest entry before it is believed.

    Raises:
        BadManifest: bytes differ from what the manifest promised.
    """
    tensors = {}
    for entry in entries:
        data = received[entry.name]
        check_tensor(entry, memoryview(data))
        dtype = _TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            raise BadModel(f"The tensor {entry.name} has the type {entry.dtype}, which can't be computed with.")
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)
        tensors[entry.name] = flat.reshape(entry.shape)
    return tensors
