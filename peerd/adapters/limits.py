"""Every bound of adapters, by name; all ours to choose."""

from __future__ import annotations

NAME_CHARS_MAX = 64
LENGTH_MAX = 4096
"""Rows of a prompt."""
CONFIG_BYTES_MAX = 1 << 20
TENSORS_BYTES_MAX = 256 << 20
QUOTED_CHARS = 80
"""Of a value that a sentence quotes."""
ADAPTERS_LISTED_MAX = 4096
