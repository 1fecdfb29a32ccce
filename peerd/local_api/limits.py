"""Every bound of the local API, by name."""

from __future__ import annotations

BODY_BYTES_MAX = 4 << 20
HEADER_LINE_BYTES_MAX = 8190
GENERATIONS_MAX = 256
MESSAGES_MAX = 4096
PROMPT_TOKENS_MAX = 1 << 20
NEW_TOKENS_MAX = 1 << 24
WAIT_S_MAX = 3600.0
DEFAULT_WAIT_S = 60.0
MODEL_NAME_CHARS_MAX = 512
NAME_CHARS_MAX = 80
"""Of a field's name or value, when an error quotes it."""
OPEN_RETRY_S = 0.25
"""Between two tries to open a model that isn't known yet."""
STOP_GRACE_S = 5.0
"""How long answers under way may take to hear that the daemon stops."""
TENSOR_BODY_BYTES_MAX = 256 << 20
TENSOR_BODIES_BYTES_MAX = 512 << 20
"""Of all tensor requests under way together."""
TENSOR_REQUESTS_MAX = 64
BUSY_RETRY_S = 1
CHECK_INLINE_BYTES = 1 << 20
"""Smaller bodies are checked on the loop: that is quicker than a thread."""
TAPES_BYTES_MAX = 1 << 30
TAPES_MAX = 4096
TAPE_LIFE_S = 600.0
TAPE_ID_BYTES = 16
