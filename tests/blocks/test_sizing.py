"""How many blocks fit, and sizes as people write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from blocks.model.source import resolve
from blocks.sizing import (
    Footprint,
    InvalidSize,
    TooLittleMemory,
    footprint,
    kv_values_of,
    outside_parameters,
    parse_size,
    size_up,
    stored_parameters,
)
from tests.models import FAMILIES, make_tiny

COST = Footprint(block_bytes=100 << 20, outside_bytes=50 << 20, kv_bytes_per_token_block=4096)


@pytest.mark.parametrize(("text", "size"), [
    ("6GB", 6 * 10**9), ("512MiB", 512 << 20), ("1.5g", 1_500_000_000), ("4096", 4096), (" 2 TB ", 2 * 10**12),
])  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "six GB", "-1GB", "1e9", "1GiBB", "9" * 40])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidSize):
        parse_size(text)


def test_memory_limits_blocks_and_the_rest_is_for_sessions() -> None:
    found = size_up(COST, 80, free_bytes=64 << 30, max_memory=4 << 30, max_blocks=None)
    assert 1 <= found.blocks < 80
    assert found.blocks * COST.block_bytes + found.kv_bytes + COST.outside_bytes <= 4 << 30
    assert found.kv_bytes > (4 << 30) // 8


def test_a_small_model_fits_whole_and_a_cap_is_kept() -> None:
    assert size_up(COST, 12, 64 << 30, None, None).blocks == 12
    assert size_up(COST, 12, 64 << 30, None, 5).blocks == 5


def test_more_free_memory_never_means_fewer_blocks() -> None:
    counts = [size_up(COST, 80, free << 30, None, None).blocks for free in range(2, 40)]
    assert counts == sorted(counts)


def test_nothing_fits_is_said_in_words() -> None:
    with pytest.raises(TooLittleMemory, match="--max-memory"):
        size_up(COST, 12, 64 << 30, 200 << 20, None)


def test_quantised_blocks_are_smaller() -> None:
    sizes = [footprint(12, 12_000_000, 10, "bfloat16", quant, 64).block_bytes for quant in ("none", "int8", "nf4")]
    assert sizes == sorted(sizes, reverse=True)
    assert kv_values_of({"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}) == 2 * 2 * 16


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_embeddings_and_blocks_are_told_apart_in_every_family(family: str, tmp_path: Path) -> None:
    source = resolve(str(make_tiny(family, tmp_path / family)))
    parameters = stored_parameters(source.config, sum(file.size for file in source.weights))
    outside = 0
    for file in source.weights:
        with safe_open(source.directory / file.name, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name in source.tensors_outside_blocks()]  # noqa: SIM118
            outside += sum(tensors.get_tensor(name).numel() for name in names)
    known = outside_parameters(source.config, parameters)
    assert 0.4 * outside <= known <= 1.5 * outside
    assert kv_values_of(source.config) >= 2 * 2 * 8


@pytest.mark.parametrize(("config", "parameters"), [
    ({"dtype": "bfloat16"}, 500), ({"torch_dtype": "float16"}, 500), ({"dtype": "float32"}, 250), ({}, 500),
    ({"text_config": {"dtype": "float32"}}, 250), ({"dtype": "float32", "text_config": {}}, 250), ({"dtype": 7}, 500),
])  # fmt: skip
def test_how_weights_are_stored_is_read_under_all_its_names(config: dict[str, Any], parameters: int) -> None:
    assert stored_parameters(config, 1000) == parameters


@pytest.mark.parametrize("config", [
    {}, {"hidden_size": "wide"}, {"hidden_size": -4, "num_attention_heads": 0}, {"vocab_size": 10**30, "hidden_size": True},
    {"num_attention_heads": 10**6, "hidden_size": 8},
])  # fmt: skip
def test_an_odd_config_gives_a_guess_and_no_error(config: dict[str, Any]) -> None:
    assert kv_values_of(config) >= 2
    assert 0 <= outside_parameters(config, 1000) <= 1000


def test_groups_that_are_spread_before_they_are_cached_count_as_all_heads() -> None:
    assert kv_values_of({"hidden_size": 32, "num_attention_heads": 4, "num_kv_heads": 2}) == 2 * 4 * 8


def test_compressed_attention_counts_what_its_cache_expands_to() -> None:
    config = {
        "num_attention_heads": 128,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "head_dim": 64,
    }
    assert kv_values_of(config) == 128 * (128 + 64 + 128)
