"""What a driver computes: token ids to the first hidden state, and the last one to logits.

Owns embeddings (with whatever the family adds: positions, scales, norms), the final norm and the head. Like a span, it is the
model's own forward with its blocks taken out (`plan`), so that no family is named; the parts are traced where that is proven to give
the same bits. Loads from a model's files or from tensors that a peer sent and the manifest vouches for.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from blocks.model.architecture import Absent, Anatomy, build, parse_dtype, read_config
from blocks.model.errors import BadModel
from blocks.model.hub import fetch
from blocks.model.identity import Manifest
from blocks.model.kv_cache import SpanCache, layer_windows
from blocks.model.plan import Planner, Station, install_stations
from blocks.model.source import ModelSource, Progress
from blocks.model.span import max_positions
from blocks.model.step import Program, trace
from blocks.model.weights import open_tensors, tensors_from_bytes

_PROBE_IDS = (0, 1, 7, 3, 2)


class Head:
    """Embeddings, final norm and head of a model. Use from one thread."""

    def __init__(self, anatomy: Anatomy, dtype: str, device: str = "cpu") -> None:
        self.dtype = parse_dtype(dtype)
        self.device = torch.device(device)
        self._model = anatomy.model
        self._decoder = anatomy.decoder
        config = anatomy.model.config
        text = config.get_text_config(decoder=True)
        self.width: int = text.hidden_size
        self.vocabulary: int = text.vocab_size
        self.max_positions = max_positions(config.to_dict())
        self._windows = layer_windows(config)
        self.input_width = int(anatomy.model.get_input_embeddings().weight.shape[1])
        install_stations(anatomy)
        planner = Planner(anatomy, self.input_width, self.dtype, self.device)
        self._stations = planner.stations
        self._first: Station = planner.stations[0]
        self._last: Station = planner.stations[-1]
        self._embed: Callable[[torch.Tensor, int], torch.Tensor] = self._embed_slowly
        self._logits: Program | None = None
        with torch.inference_mode():
            self._learn_result_kind(planner.stations)

    def _learn_result_kind(self, stations: Sequence[Station]) -> None:
        """Whether the decoder expects tuples from its blocks: logits come out in the right shape only then."""
        for returns_tuple in (False, True):
            for station in stations:
                station.returns_tuple = returns_tuple
            try:
                embedded = self._embed_slowly(torch.tensor([[0, 1]], device=self.device), 0)
                logits = self._logits_slowly(embedded)
            except (RuntimeError, IndexError, ValueError, TypeError, AttributeError):
                continue
            if embedded.shape == (1, 2, self.width) and logits.shape[:2] == (1, 2) and logits.dim() == 3:
                return
        raise BadModel("The model's embeddings and head don't run without its blocks, so it can't be driven.")

    def prepare_steps(self) -> None:
        """Trace the single-token paths; embed and logits work without, slower."""
        with torch.inference_mode():
            self._embed = self._proven_embedding()
            self._logits = self._proven_logits()

    def embed(self, tokens: Sequence[int] | torch.Tensor, position: int) -> torch.Tensor:
        """Token ids at ``position`` on, to hidden (1, tokens, d_model).

        Raises:
            ValueError: an id outside the vocabulary.
        """
        listed = tokens.flatten().tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
        if not listed or min(listed) < 0 or max(listed) >= self.vocabulary:
            raise ValueError(f"token ids lie between 0 and {self.vocabulary - 1}, and there is at least one")
        ids = torch.tensor([listed], device=self.device)
        with torch.inference_mode():
            return self._embed(ids, position)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden (1, tokens, d_model) of the last block, to logits (tokens, vocabulary) in the head's own dtype."""
        with torch.inference_mode():
            if self._logits is not None and hidden.shape[1] == 1:
                return self._logits(hidden)[0]
            return self._logits_slowly(hidden)[0]

    def table_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (rows, tokens) to (rows, tokens, d_embedding): where prefixes live, before the family's scales and positions."""
        embedded: torch.Tensor = self._model.get_input_embeddings()(ids)
        return embedded

    def embed_rows(self, embedded: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
        """`table_rows`' rows behind ``prefix`` (rows, length, d_embedding) to hidden (rows, length + tokens, d_model), with gradients."""
        inputs = embedded if prefix is None else torch.cat([prefix, embedded], dim=1)
        self._decoder(inputs_embeds=inputs, use_cache=False)
        hidden = self._first.hidden
        self._forget()
        assert hidden is not None
        return hidden

    def logits_of_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden (rows, tokens, d_model) of the last block, to logits (rows, tokens, vocabulary), with gradients where they're on."""
        dummy = torch.zeros((*hidden.shape[:2], self.input_width), dtype=self.dtype, device=self.device)
        self._last.substitute = hidden
        try:
            logits: torch.Tensor = self._model(inputs_embeds=dummy, use_cache=False).logits
        finally:
            self._last.substitute = None
            self._forget()
        return logits

    def _forget(self) -> None:
        """Let go of what the stations saw: it may be a whole graph."""
        for station in self._stations:
            station.hidden = station.call = None

    def _cache(self, position: int) -> SpanCache:
        cache = SpanCache(self._windows, (), 0, self.dtype, self.device)
        cache.pretend(position)
        return cache

    def _embed_slowly(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        self._decoder(input_ids=ids, past_key_values=self._cache(position), use_cache=True)
        hidden = self._first.hidden
        assert hidden is not None
        return hidden

    def _logits_slowly(self, hidden: torch.Tensor) -> torch.Tensor:
        shape = (1, hidden.shape[1], self.input_width)
        dummy = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._last.substitute = hidden
        try:
            output = self._model(inputs_embeds=dummy, past_key_values=self._cache(0), use_cache=True)
        finally:
            self._last.substitute = None
        logits: torch.Tensor = output.logits
        return logits

    def _proven_embedding(self) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """The fastest way to embed that gives the same bits: the table alone, or a traced function of id and position."""
        table = self._model.get_input_embeddings()
        windows = [torch.tensor([list(_PROBE_IDS)], device=self.device), torch.tensor([[5]], device=self.device)]
        places = [place for place in (0, 1, 9, self.max_positions - len(_PROBE_IDS)) if place >= 0]
        expected = [(ids, place, self._embed_slowly(ids, place)) for ids in windows for place in places]
        if all(torch.equal(table(ids), hidden) for ids, _, hidden in expected):
            return lambda ids, _: table(ids)
        if "position_ids" not in inspect.signature(self._decoder.forward).parameters:
            return self._embed_slowly

        def positioned(ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            self._decoder(input_ids=ids, position_ids=places, past_key_values=self._cache(0), use_cache=True)
            hidden = self._first.hidden
            assert hidden is not None
            return hidden

        program = trace(positioned, [windows[1], torch.tensor([[1]], device=self.device)])
        if program is None:
            return self._embed_slowly
        singles = [(ids, place, hidden) for ids, place, hidden in expected if ids.shape[1] == 1]
        for ids, place, hidden in [*singles, *singles]:
            if not torch.equal(program(ids, torch.tensor([[place]], device=self.device)), hidden):
                return self._embed_slowly

        def embed(ids: torch.Tensor, position: int) -> torch.Tensor:
            if ids.shape[1] != 1:
                return self._embed_slowly(ids, position)
            return program(ids, torch.tensor([[position]], device=self.device))

        return embed

    def _proven_logits(self) -> Program | None:
        generator = torch.Generator().manual_seed(1)
        rows = [
            torch.randn((1, 1, self.width), generator=generator).to(dtype=self.dtype, device=self.device) * scale
            for scale in (1.0, 30.0, 0.1, 3.0)
        ]
        program = trace(self._logits_slowly, rows[:1])
        if program is None or any(not torch.equal(program(row), self._logits_slowly(row)) for row in [*rows, *rows]):
            return None
        return program


def load_head(
    source: ModelSource, *, dtype: str = "float32", device: str = "cpu", progress: Progress | None = None
) -> Head:
    """Load embeddings, norm and head from a model's files.

    Raises:
        BadModel, UnsupportedModel.
    """
    names = source.tensors_outside_blocks()
    fetch(source, names, progress)
    with open_tensors(source, names, progress) as tensors:
        return _head(source.config, tensors, dtype, device)


def head_from_peer(
    manifest: Manifest,
    received: Mapping[str, bytes | bytearray | memoryview],
    *,
    dtype: str = "float32",
    device: str = "cpu",
) -> Head:
    """Build the head from tensors (raw bytes by name) that a peer sent; each is verified against the manifest.

    Raises:
        BadManifest: a tensor isn't the manifest's.
        BadModel: one is missing.
    """
    missing = next((entry.name for entry in manifest.tensors if entry.name not in received), None)
    if missing is not None:
        raise BadModel(f"The tensor {missing} was not fetched: ask a server of the model for it.")
    return _head(json.loads(manifest.config), tensors_from_bytes(manifest.tensors, received), dtype, device)


def _head(fields: Mapping[str, Any], tensors: Mapping[str, Any], dtype: str, device: str) -> Head:
    def prepare(anatomy: Anatomy) -> None:
        blocks = anatomy.blocks
        for index, block in enumerate(list(blocks)):
            blocks[index] = Absent(block)

    anatomy = build(read_config(fields), tensors, parse_dtype(dtype), prepare, device)
    head = Head(anatomy, dtype, device)
    head.prepare_steps()
    return head
