"""Every bound of the session protocol, by name.

Those that `docs/protocol.md` fixes for the wire stand first; the rest are ours to choose.
"""

from __future__ import annotations

# --- fixed by the wire format (docs/protocol.md, section 3) ---
SESSION_ID_BYTES = 16
BOOT_ID_BYTES = 16
DIGEST_BYTES = 32
COUNTER_MAX = 2**63 - 1
"""Turns, epochs' halves and step counters are non-negative 64-bit signed integers."""

# --- what one message may say ---
ROUTE_HOPS_MAX = 64
PEER_ID_BYTES_MAX = 64
HOP_ADDRESSES_MAX = 16
ADDRESS_CHARS_MAX = 256
NAME_CHARS_MAX = 128
"""Compute classes, adapters and error codes."""
TEXT_CHARS_MAX = 512
"""The sentence of an error or a report; longer ones are cut by the sender and refused by the receiver."""
BLOCKS_MAX = 4096
CONTEXT_TOKENS_MAX = 2**24
WINDOW_TOKENS_MAX = 65536
HEARTBEAT_S_MIN, HEARTBEAT_S_MAX = 0.05, 60.0
LEASE_S_MAX = 30.0
"""How long a hop keeps the KV of a session whose driver it no longer hears."""
DURATION_S_MAX = 86400.0
BRANCHES_MAX = 64
OPEN_PROMPTS_BYTES_MAX = 64 << 20
"""Deep prompts of one `open`: as much as a part of a frame may have."""

# --- what a hop keeps ---
SESSIONS_MAX = 4096
SESSIONS_PER_DRIVER_MAX = 256
PROMPTS_BYTES_MAX = 512 << 20
"""Deep prompts of all sessions together, and of those that are on their way here."""
PROMPTS_BYTES_PER_DRIVER_MAX = 128 << 20
TOMBSTONES_MAX = 8192
TOMBSTONE_S = 60.0
HELD_WINDOWS_MAX = 64
HELD_WINDOWS_PER_ORIGIN_MAX = 8
HELD_BYTES_MAX = 32 << 20
HELD_S = 2.0
JOURNAL_BYTES_MAX = 32 << 20
"""Outputs kept per session and hop; the newest is kept whenever it fits."""
JOURNAL_ENTRIES_MAX = 4096
JOURNALS_BYTES_MAX = 512 << 20
"""Outputs kept over all sessions of a node; beyond it the largest journal loses its oldest."""
DEVICE_WINDOWS = 2
"""Windows of one session at the device at once: the next is ready when one ends, and a cancel can drop the rest."""
TICK_S = 0.25

# --- what a driver keeps and expects ---
QUEUED_WINDOWS_MAX = 4096
READY_DEADLINE_S = 10.0
"""From `open` to `ready`, dialling included."""
OPEN_BYTES_PER_S_MIN = 256 << 10
"""Deep prompts of an `open` stretch that deadline by this."""
SILENT_HEARTBEATS = 3
PROGRESS_FLOOR_S = 5.0
PROGRESS_PER_TOKEN_S = 0.1
"""What one token of a prefill window adds to the progress deadline: a slow CPU is not a dead one."""
PROGRESS_FACTOR = 20.0
STALL_MAX_S = 120.0
"""A turn that takes longer than this is lost even if the hops' engines say that they move."""
LINK_BYTES_PER_S_MIN = 32 << 10
"""What the slowest link worth having carries: bytes under way stretch the deadline of a turn by it."""
WINDOW_LOST_S = 15.0
"""A turn under way for longer, while no hop owns to a window, fell between them (bytes under way come on top)."""
GAP_REPAIR_S = 1.0
"""How long a predecessor may take to fill a gap from its journal before the driver replays."""
