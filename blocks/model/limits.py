"""The bounds of everything read from model files, manifests and the hub. All of them are ours; no spec fixes them."""

from __future__ import annotations

MAX_CONFIG_BYTES = 4 << 20
MAX_CONFIG_DEPTH = 32
MAX_INDEX_BYTES = 64 << 20
MAX_HEADER_BYTES = 64 << 20  # of one safetensors file; the format's own bound is 100 MB
MAX_SHARDS = 2048
MAX_TENSORS = 1 << 20
MAX_TENSOR_RANK = 8
MAX_BLOCKS = 4096
MAX_NAME_CHARS = 512
MAX_MANIFEST_TENSORS = 4096
MAX_MANIFEST_FILES = 32
HASH_CHUNK_BYTES = 4 << 20

HUB_ATTEMPTS = 4
HUB_RETRY_AFTER_S = 60.0  # the longest wait that a hub's retry-after is granted
HUB_TIMEOUT_S = 30.0
FREE_DISK_MARGIN_BYTES = 256 << 20

CACHE_FIRST_TOKENS = 64  # what a new KV cache reserves before it doubles
PLAN_TOKENS = 128  # positions whose rotary rows are worked out in one go
PLAN_TABLES = 8  # such stretches kept per span
SECTIONS_KEPT = 8  # parts of a span, with their programs, for routes that enter or leave it midway
SECTION_STEPS = 16  # single tokens that a section runs before its programs are traced
PROOF_TOKENS = 1024  # windows beyond this are served without traced programs: the proof's memory grows with them

BATCH_PLANS = 4  # masks and rotary rows of batches, kept between a batch's forward and its backward
BATCH_GRAPH_BYTES = 768 << 20  # what a backward pass may keep of the blocks between at once; never fewer than one block
BATCH_SHAPES = 64  # shapes of batches whose blocks' graphs have been measured
LOSS_LOGITS_BYTES = 256 << 20  # logits and what is made of them, at once
