"""/ipfs/ping/1.0.0: 32 random bytes, echoed (libp2p specs: ping/ping)."""

from __future__ import annotations

from overlay.stream import Stream

PING = "/ipfs/ping/1.0.0"
PING_BYTES = 32
PINGS_PER_STREAM_MAX = 100_000


async def answer_pings(stream: Stream) -> None:
    """Echo until FIN; a stream that ends in mid-ping is the peer's business."""
    for _ in range(PINGS_PER_STREAM_MAX):
        head = await stream.read(PING_BYTES)
        if not head:
            break
        rest = await stream.read_exactly(PING_BYTES - len(head)) if len(head) < PING_BYTES else b""
        await stream.write(head + rest)
    await stream.close_write()
