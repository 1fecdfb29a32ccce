"""Bounds of the engine, all ours to choose."""

from __future__ import annotations

DEVICE_QUEUE_JOBS = 4096
MODELS_MAX = 64
LEASES_MAX = 8192
BUSY_RETRY_S = 1.0
IDLE_LEASE_S = 5.0
"""A lease that has done nothing for so long may be dropped for a session that needs its memory."""
STOP_JOIN_S = 1.0
"""How long a stop waits for the job that runs."""
