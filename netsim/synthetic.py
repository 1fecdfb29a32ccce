"""A model without files: its source, and the loader that puts it onto a simulated device in the time that its weights would take.

Owns what `peerd.loading.ModelLoader` needs where nothing is on disk. The model has a config like any other's, so that sizing, ids,
manifests and placement are the daemon's own; what it computes is the device's runner's.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

from blocks.model.errors import ModelNotFound
from blocks.model.identity import Manifest, canonical_config, id_of
from blocks.model.source import DEMO, ModelSource, WeightFile, local_directory
from blocks.text import TextCodec
from netsim import compute
from netsim.arithmetic import PRIME
from netsim.devices import SimDevice
from peerd.client.tensor_body import Tensor
from peerd.loading import HeadFacts, Progress
from routing.types import ComputeClass, Span

CONTEXT_TOKENS = 4096
LOAD_STEPS = 4
NOWHERE = Path("nowhere")


def synthetic_source(name: str, blocks: int, width: int, block_bytes: int) -> ModelSource:
    """A model of ``blocks`` blocks whose weights take ``block_bytes`` each; a name with a slash is a hub's."""
    config = {
        "model_type": "llama",
        "num_hidden_layers": blocks,
        "hidden_size": width,
        "num_attention_heads": 1,
        "vocab_size": PRIME,
        "max_position_embeddings": CONTEXT_TOKENS,
        "torch_dtype": "float32",
    }
    size = blocks * block_bytes + 4 * PRIME * width
    weights = (WeightFile("model.safetensors", size, hashlib.sha256(name.encode()).hexdigest()),)
    names = [f"model.layers.{block}.weight" for block in range(blocks)] + ["model.embed_tokens.weight"]
    kind, revision = (DEMO, None) if name == DEMO else ("hub", "0" * 40)
    return ModelSource(kind, name, NOWHERE, config, weights, dict.fromkeys(names, "model.safetensors"), revision)


@functools.cache
def demo_codec() -> TextCodec:
    """The demo model's tokenizer: ids are what the simulator compares, and text has to come from somewhere."""
    directory = local_directory(DEMO)
    assert directory is not None
    return TextCodec.from_directory(directory)


class SyntheticLoader:
    """`peerd.loading.ModelLoader`; see the module."""

    def __init__(self, sources: Mapping[str, ModelSource], device: SimDevice, memory_bytes: int) -> None:
        self._sources = sources
        self._device = device
        self._memory_bytes = memory_bytes

    @property
    def device_name(self) -> str:
        return "cpu"

    def free_bytes(self) -> int:
        return self._memory_bytes

    async def check_device(self) -> None:
        """It is there."""

    async def find(self, spec: str) -> ModelSource:
        found = self._sources.get(spec.partition("@")[0])
        if found is None:
            raise ModelNotFound(f"No model is called {spec!r} in this simulation.")
        return found

    async def make_manifest(
        self, source: ModelSource, span: Span, compute_class: ComputeClass, progress: Progress
    ) -> Manifest:
        config = canonical_config(source.config)
        identity = (id_of(source), source.name, source.kind, source.revision, config, source.weights)
        return Manifest(*identity, compute_class, (), ())

    async def load_span(
        self, key: str, source: ModelSource, span: Span, compute_class: ComputeClass, progress: Progress
    ) -> int:
        weight_bytes = source.weights[0].size * len(span) // source.blocks
        took_s = compute.load_s(self._device.cost, weight_bytes) * self._device.condition.slow_factor
        for step in range(LOAD_STEPS):
            await asyncio.sleep(took_s / LOAD_STEPS)
            progress((step + 1) / LOAD_STEPS)
        await self._device.call(lambda runner: runner.install_span(key, span))
        return CONTEXT_TOKENS

    async def load_head(self, key: str, source: ModelSource, compute_class: ComputeClass) -> HeadFacts:
        await self._device.call(lambda runner: runner.install_head(key))
        return HeadFacts(int(source.config["hidden_size"]), CONTEXT_TOKENS)

    async def load_fetched_head(
        self, key: str, manifest: Manifest, tensors: Mapping[str, bytes], compute_class: ComputeClass
    ) -> HeadFacts:
        raise ModelNotFound("A simulated model has no tensors to fetch.")

    async def read_codec(self, source: ModelSource) -> TextCodec:
        return demo_codec()

    async def outside_tensors(self, source: ModelSource) -> dict[str, Tensor]:
        return {}

    async def context_tokens(self, config: str) -> int:
        return CONTEXT_TOKENS

    def close(self) -> None:
        """Nothing runs."""
