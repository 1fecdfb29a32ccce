"""How many blocks fit, and sizes as people write them."""

from __future__ import annotations

import pytest

from blocks.sizing import Footprint, InvalidSize, TooLittleMemory, footprint, kv_values_of, parse_size, size_up

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
