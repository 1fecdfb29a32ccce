"""How many blocks fit on this machine, from numbers that are handed in. Pure and torch-free.

Owns the arithmetic of DESIGN 7 ("how many from *free* memory, KV reserve and measured per-block cost") and the reading of
sizes as people write them. Measuring memory is the shell's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from overlay.errors import Blame, PeerdError

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
         "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
         "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANT_BYTES = {"int8": 1.05, "nf4": 0.56}
"""Bytes per weight with scales, measured on bitsandbytes' layouts."""
FREE_SHARE = 0.7
"""Of the free memory: the rest is left to the system, buffers and whatever else the machine is for."""
KV_SHARE = 0.25
"""Of what a daemon may use, kept for sessions."""
FIELD_MAX = 1 << 24
RUNTIME_BYTES = 400 << 20
"""torch, transformers and the daemon itself."""


class InvalidSize(PeerdError):
    """A size that can't be read, or is too small to be of use."""

    code = "invalid-size"
    exit_code = 2
    http_status = 400
    blame = Blame.USER


class TooLittleMemory(PeerdError):
    """Not even one block fits."""

    code = "too-little-memory"
    exit_code = 14
    http_status = 507
    blame = Blame.US


def parse_size(text: str) -> int:
    """Bytes of ``6GB``, ``512MiB``, ``1.5g`` or a plain number. Raises InvalidSize."""
    matched = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]{0,3})\s*", text)
    unit = UNITS.get(matched.group(2).lower()) if matched else None
    if matched is None or unit is None:
        raise InvalidSize(f"{text!r} is no size; write it like 6GB or 512MiB.")
    return int(float(matched.group(1)) * unit)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one model costs on this machine, in bytes."""

    block_bytes: int
    outside_bytes: int
    kv_bytes_per_token_block: int


def footprint(
    weights: int, block_parameters: int, outside_parameters: int, dtype: str, quant: str, kv_values: int
) -> Footprint:
    """From parameter counts: ``weights`` blocks hold ``block_parameters`` together; ``kv_values`` per token and block."""
    per_weight = QUANT_BYTES.get(quant, float(DTYPE_BYTES[dtype]))
    return Footprint(
        int(block_parameters / max(1, weights) * per_weight),
        int(outside_parameters * DTYPE_BYTES[dtype]),
        kv_values * DTYPE_BYTES[dtype],
    )


def _decoder_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config


def _positive(fields: Mapping[str, Any], *names: str) -> int | None:
    """The first of the customary names that has a sensible number."""
    for name in names:
        value = fields.get(name)
        if type(value) is int and 0 < value <= FIELD_MAX:
            return value
    return None


def stored_parameters(config: Mapping[str, Any], weight_bytes: int) -> int:
    """How many parameters files of ``weight_bytes`` hold; where a config doesn't say how they are stored, 16 bits each,
    which never takes a model for smaller than it is."""
    fields = _decoder_fields(config)
    stored = str(fields.get("dtype") or fields.get("torch_dtype") or "")
    return weight_bytes // (4 if stored.endswith("32") else 1 if "float8" in stored else 2)


def outside_parameters(config: Mapping[str, Any], parameters: int) -> int:
    """Of ``parameters`` those in embeddings and head."""
    fields = _decoder_fields(config)
    width = _positive(fields, "hidden_size", "n_embd", "d_model") or 0
    tables = 1 if fields.get("tie_word_embeddings", True) is True else 2
    return min(parameters, tables * (_positive(fields, "vocab_size") or 0) * width)


def kv_values_of(config: Mapping[str, Any]) -> int:
    """Keys and values of one token in one block, from a config; a generous guess where it is unusual."""
    fields = _decoder_fields(config)
    width = _positive(fields, "hidden_size", "n_embd", "d_model") or 4096
    heads = _positive(fields, "num_attention_heads", "n_head") or 1
    kv_heads = _positive(fields, "num_key_value_heads") or heads  # falcon's num_kv_heads are cached per head
    latent = (
        _positive(fields, "qk_nope_head_dim"),
        _positive(fields, "qk_rope_head_dim"),
        _positive(fields, "v_head_dim"),
    )
    if all(latent):  # compressed attention: the cache holds what the compressed form expands to
        return heads * sum(part or 0 for part in latent)
    return 2 * kv_heads * (_positive(fields, "head_dim") or max(1, width // heads))


@dataclass(frozen=True, slots=True)
class Sizing:
    """The answer: blocks to serve, and bytes for their sessions' KV."""

    blocks: int
    kv_bytes: int


def size_up(
    cost: Footprint, total_blocks: int, free_bytes: int, max_memory: int | None, max_blocks: int | None
) -> Sizing:
    """As many blocks as fit beside the head, the runtime and the KV reserve. Raises TooLittleMemory."""
    allowed = max_memory if max_memory is not None else int(free_bytes * FREE_SHARE)
    usable = allowed - RUNTIME_BYTES - cost.outside_bytes
    kv_bytes = int(usable * KV_SHARE)
    fitting = (usable - kv_bytes) // max(1, cost.block_bytes)
    blocks = min(fitting, total_blocks, max_blocks if max_blocks is not None else total_blocks)
    if blocks < 1:
        raise TooLittleMemory(
            f"Not even one block fits into {allowed / 1e9:.1f} GB beside the program itself; raise --max-memory, or "
            f"serve nothing with --serve-blocks none."
        )
    return Sizing(int(blocks), max(kv_bytes, usable - int(blocks) * cost.block_bytes))
