"""Adapters as values, and whether one fits a model. Pure.

A ``prompt`` is rows in front of the tokens, where the embedding table's rows live; a ``deep-prompt`` adds rows before every block at the
first positions, with or without rows in front. docs/training.md, section 5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blocks.protocol.limits import OPEN_PROMPTS_BYTES_MAX
from overlay.rpc.types import Part
from peerd.adapters.errors import BadAdapter, WrongAdapter
from peerd.driving import DriverModel
from peerd.training.gradients import narrowed
from routing.types import ComputeClass

PROMPT, DEEP_PROMPT = "prompt", "deep-prompt"
_ID_DIGITS = 12


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What an adapter's fit depends on. ``heads`` is None where the config doesn't say."""

    name: str
    model_id: str  # hex
    compute_class: str
    blocks: int
    width: int
    embedding_width: int
    heads: int | None
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter, read and checked by itself.

    Attributes:
        length: positions that it takes at the front of the text: of the prefix, or 0 without one.
        prefix: (length, d_embedding), or None.
        prompts: (blocks, rows, d_model), added before each block at the first positions, or None.
        model_id: hex, of the model that it was made for; "" where nobody said.
        layers, heads, token_dim: as its config has them; None: not said.
    """

    name: str
    kind: str
    prefix: Part | None
    prompts: Part | None
    model_id: str = ""
    model_name: str = ""
    layers: int | None = None
    heads: int | None = None
    token_dim: int | None = None

    @property
    def length(self) -> int:
        return 0 if self.prefix is None else self.prefix.shape[0]


def shape_of(name: str, blocks: int, config: str, driver: DriverModel) -> ModelShape:
    """From a model's config (JSON) and what its driver knows."""
    fields = json.loads(config)
    fields = fields.get("text_config") or fields
    return ModelShape(
        name,
        driver.model.hex(),
        str(driver.compute_class),
        blocks,
        driver.width,
        _first(fields, ("word_embed_proj_dim", "embedding_size")) or driver.width,
        _first(fields, ("num_attention_heads", "n_head", "n_heads")),
        driver.max_positions,
    )


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((fields[name] for name in names if type(fields.get(name)) is int), None)


def require_fit(adapter: Adapter, model: ModelShape) -> None:
    """Raises WrongAdapter for one that was made for another model."""
    if adapter.model_id and adapter.model_id != model.model_id:
        raise WrongAdapter(
            f"The adapter {adapter.name} was made for {adapter.model_name or 'another model'} ({adapter.model_id[:_ID_DIGITS]}), not for "
            f"{model.name} ({model.model_id[:_ID_DIGITS]})."
        )
    prefix, prompts = adapter.prefix, adapter.prompts
    differing = [
        f"{what} {found}, not {expected}"
        for what, found, expected in (
            ("blocks are", adapter.layers, model.blocks),
            ("attention heads are", adapter.heads, model.heads),
            ("rows are of", adapter.token_dim, model.embedding_width),
            ("prompt's rows are of", None if prefix is None else prefix.shape[1], model.embedding_width),
            ("deep prompts are for blocks", None if prompts is None else prompts.shape[0], model.blocks),
            ("deep prompts are of", None if prompts is None else prompts.shape[2], model.width),
        )
        if found is not None and expected is not None and found != expected
    ]
    if differing:
        raise WrongAdapter(f"The adapter {adapter.name} doesn't fit {model.name}: its {differing[0]}.")
    rows = max(adapter.length, 0 if prompts is None else prompts.shape[1])
    if rows >= model.context_tokens:
        raise WrongAdapter(
            f"The adapter {adapter.name} takes {rows} positions, and the context of {model.name} is {model.context_tokens}."
        )


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """An adapter as a session takes it: ``length`` positions of ``prefix``, and ``prompts`` in the compute dtype."""

    length: int
    prefix: Part | None
    prompts: Part | None


def soft_prompt(adapter: Adapter, model: ModelShape) -> SoftPrompt:
    """What a session of ``model`` gets of an adapter. Raises WrongAdapter, BadAdapter."""
    require_fit(adapter, model)
    dtype = ComputeClass.parse(model.compute_class).dtype
    prompts = None if adapter.prompts is None else narrowed(adapter.prompts, dtype)
    if prompts is not None and prompts.size_bytes > OPEN_PROMPTS_BYTES_MAX:
        raise BadAdapter(
            f"The deep prompts of {adapter.name} take {prompts.size_bytes >> 20} MiB, and servers take {OPEN_PROMPTS_BYTES_MAX >> 20}; "
            "train shorter ones."
        )
    return SoftPrompt(adapter.length, adapter.prefix, prompts)
