"""Models from their files onto the device: resolve, hash, read, install. The port to all of that, and how it is done with torch.

Owns the one thread in which slow work on models runs; torch is imported there, never on the loop's thread. Must not know what is served or
driven, nor who asks: that is `peerd.models`. The simulator hands over a loader without files and without torch.
"""

from __future__ import annotations

import asyncio
import json
import mmap
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil

from blocks.model.identity import Manifest, make_manifest
from blocks.model.safetensors_header import read_header
from blocks.model.source import ModelSource, resolve
from blocks.protocol.device import OwnDevice
from blocks.text import TextCodec
from peerd.client.tensor_body import Tensor
from routing.types import ComputeClass, Span

Result = TypeVar("Result")
Progress = Callable[[float], None]
"""Called with the share that is done, 0 to 1, possibly from another thread."""

CUDA_SIGNS = ("/dev/nvidiactl", "/dev/dxg")  # the second is WSL2's


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """What a driver has to know of embeddings and head that are loaded."""

    width: int
    max_positions: int


class ModelLoader(Protocol):
    """What a node's models are made with. Every coroutine raises PeerdError, and may be tried again."""

    @property
    def device_name(self) -> str:
        """``cpu``, ``cuda:0`` and so on."""

    def free_bytes(self) -> int:
        """Memory that this machine has left, for weights and KV."""

    async def check_device(self) -> None:
        """Make sure that the device is there."""

    async def find(self, spec: str) -> ModelSource:
        """What a ``--model`` names: ``demo``, a directory or a hub id."""

    async def make_manifest(
        self, source: ModelSource, span: Span, compute_class: ComputeClass, progress: Progress
    ) -> Manifest:
        """What drivers need to know; fetches the files that ``span`` and the manifest need, if they aren't here yet."""

    async def load_span(
        self, key: str, source: ModelSource, span: Span, compute_class: ComputeClass, progress: Progress
    ) -> int:
        """Install blocks on the device under ``key``; returns the longest context that they run."""

    async def load_head(self, key: str, source: ModelSource, compute_class: ComputeClass) -> HeadFacts:
        """Install embeddings and head on the device under ``key``."""

    async def load_fetched_head(
        self, key: str, manifest: Manifest, tensors: Mapping[str, bytes], compute_class: ComputeClass
    ) -> HeadFacts:
        """The same from tensors that came from peers."""

    async def read_codec(self, source: ModelSource) -> TextCodec:
        """The tokenizer and chat template."""

    async def outside_tensors(self, source: ModelSource) -> dict[str, Tensor]:
        """The tensors outside the blocks."""

    async def context_tokens(self, config: str) -> int:
        """The longest context that a canonical config allows; loads nothing."""

    def close(self) -> None:
        """What is under way isn't waited for."""


class TorchLoader:
    """`ModelLoader` over files, the hub and torch."""

    def __init__(self, wanted_device: str, device: OwnDevice, cache_dir: Path) -> None:
        self._wanted_device = wanted_device
        self._device = device
        self._cache_dir = cache_dir
        self._device_name = device_name(wanted_device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")

    @property
    def device_name(self) -> str:
        return self._device_name

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def free_bytes(self) -> int:
        return int(psutil.virtual_memory().available)

    async def _slowly(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    async def check_device(self) -> None:
        """Torch is asked whether it is there, unless it's the CPU. Raises DeviceMissing."""
        if self._device_name != "cpu":
            self._device_name = await self._slowly(_usable, self._wanted_device)

    async def find(self, spec: str) -> ModelSource:
        return await self._slowly(resolve, spec, self._cache_dir)

    async def make_manifest(
        self, source: ModelSource, span: Span, compute_class: ComputeClass, progress: Progress
    ) -> Manifest:
        def make() -> Manifest:
            from blocks.model.hub import fetch

            names = (*source.tensors_of_span(span.start, span.end), *source.tensors_outside_blocks())
            fetch(source, names, lambda done, total: progress(done / max(1, total)))
            return make_manifest(source, compute_class)

        return await self._slowly(make)

    async def load_span(
        self, key: str, source: ModelSource, span: Span, compute_class: ComputeClass, progress: Progress
    ) -> int:
        def load() -> tuple[Callable[[Any], None], int]:
            from blocks.model.span import load_span
            from blocks.model.split_test import require_exact

            require_exact(source, self._cache_dir)
            loaded = load_span(
                source,
                span.start,
                span.end,
                dtype=compute_class.dtype,
                quant=compute_class.quant,
                device=self._device_name,
                progress=lambda done, total: progress(done / max(1, total)),
            )
            loaded.prepare_steps()
            return (lambda runner: runner.install_span(key, loaded)), loaded.max_positions

        install, max_positions = await self._slowly(load)
        await self._device.call(install)
        return max_positions

    async def load_head(self, key: str, source: ModelSource, compute_class: ComputeClass) -> HeadFacts:
        def load(device: str) -> Any:
            from blocks.model.head import load_head
            from blocks.model.hub import fetch

            fetch(source, source.tensors_outside_blocks())
            return load_head(source, dtype=compute_class.dtype, device=device)

        return await self._install_head(key, load)

    async def load_fetched_head(
        self, key: str, manifest: Manifest, tensors: Mapping[str, bytes], compute_class: ComputeClass
    ) -> HeadFacts:
        def load(device: str) -> Any:
            from blocks.model.head import head_from_peer

            return head_from_peer(manifest, tensors, dtype=compute_class.dtype, device=device)

        return await self._install_head(key, load)

    async def _install_head(self, key: str, load: Callable[[str], Any]) -> HeadFacts:
        await self.check_device()
        head = await self._slowly(load, self._device_name)
        await self._device.call(lambda runner: runner.install_head(key, head))
        return HeadFacts(head.width, head.max_positions)

    async def read_codec(self, source: ModelSource) -> TextCodec:
        return await self._slowly(TextCodec.from_directory, source.directory)

    async def outside_tensors(self, source: ModelSource) -> dict[str, Tensor]:
        return await self._slowly(outside_tensors, source)

    async def context_tokens(self, config: str) -> int:
        def context() -> int:
            from blocks.model.span import max_positions

            return max_positions(json.loads(config))

        # Not the loader's thread, which may be at a load of minutes.
        return await asyncio.to_thread(context)


def outside_tensors(source: ModelSource) -> dict[str, Tensor]:
    """What lies outside the blocks, mapped from the model's files: read as it is sent."""
    from blocks.model.hub import fetch

    names = source.tensors_outside_blocks()
    fetch(source, names)
    found = {}
    for file in sorted({source.tensors[name] for name in names}):
        entries = read_header(source.directory / file)
        with (source.directory / file).open("rb") as opened:
            view = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        for name in names:
            if source.tensors[name] == file and name in entries:
                entry = entries[name]
                found[name] = Tensor(entry.dtype, entry.shape, view[entry.start : entry.end])
    return found


def device_name(wanted: str) -> str:
    """``auto`` is the first CUDA device where a driver seems to be, else the CPU; torch isn't asked yet, since it loads later."""
    if wanted != "auto":
        return wanted
    return "cuda:0" if any(Path(device).exists() for device in CUDA_SIGNS) else "cpu"


def _usable(wanted: str) -> str:
    from blocks.model.devices import usable_device

    return usable_device(wanted)
