"""Every bound of training jobs, by name; all ours to choose."""

from __future__ import annotations

DATASET_BYTES_MAX = 64 << 20
LINE_BYTES_MAX = 1 << 20
EXAMPLES_MAX = 500_000
DATASET_TOKENS_MAX = 8 << 20
"""Of all examples together, which are held in memory while a job runs: about 50 bytes each."""
MESSAGES_MAX = 256
"""Of one conversation."""
BAD_LINES_TOLD = 5
SKIPPED_REMEMBERED = 100
QUOTED_CHARS = 60
"""Of a value that a sentence quotes."""

NAME_CHARS_MAX = 64
PROMPT_LENGTH_MAX = 1024
BATCH_MAX = 1024
EPOCHS_MAX = 10_000
STEPS_MAX = 1_000_000
MICRO_BATCH_TOKENS_MAX = 16_384
"""As much as one tensor call takes."""
CHECKPOINT_EVERY_MAX = 10_000

JOBS_MAX = 256
"""Jobs of any state that are remembered."""
QUEUED_MAX = 16
WATCHERS_MAX = 64
SETTINGS_BYTES_MAX = 64 << 10

MICRO_BATCHES_AHEAD = 4
"""Of one step, under way at once: the forward of one overlaps the backward of another."""
BLOCKS_WAIT_S = 5.0
"""How long one step waits for its blocks before the job says that it waits."""
OPEN_WAIT_S = 60.0
"""How long a job that is handed in waits for a model that the daemon is about to know."""
OPEN_RETRY_S = 0.25
KEEP_S = 5.0
"""How long a daemon that stops takes to keep the steps since the last checkpoint."""
RETRY_S = 1.0
BUSY_TRIES_MAX = 120
SPEED_STEPS = 10
"""Steps over which tokens/s and what is left are averaged."""
FAILED_STEPS_MAX = 50
"""Steps in a row whose gradients were not finite before the job ends with a sentence."""
