"""Bounds of the overlay's shells that we chose; those that a specification fixes stand beside their cores."""

from __future__ import annotations

RECEIVE_RING_BYTES = 256 << 10
"""One receive buffer per event loop, shared by all sockets: it is consumed before `buffer_updated` returns."""
WRITE_HIGH_WATER_BYTES = 64 << 10
WRITE_LOW_WATER_BYTES = 16 << 10
"""What waits in a transport can't be overtaken; while the kernel has `NOTSENT_LOWAT_BYTES` of its own, more buys no speed."""
CHUNK_BYTES_MAX = 64 << 10
CHUNK_BYTES_MIN = 4 << 10
CHUNK_BYTES_PACED = 8 << 10
"""Beside urgent messages, on an uplink that wasn't measured yet."""
CHUNK_SECONDS = 0.005
"""A frame is at most this long on the measured uplink, so that priorities act."""
UPLINK_HALF_LIFE_S = 3.0
"""Of what the uplink was measured at, while the socket takes less: it is the reader that has no time, more often than the path."""
NEAR_RTT_S = 0.001
"""Nearer peers share a machine or a wire: what waits between them waits for processors, and says nothing of the uplink."""
NOTSENT_LOWAT_BYTES = 128 << 10
URGENT_BYTES_MAX = 64 << 10
"""A stream for decoding on which more waits than this carries a prompt, which may wait for others' tokens."""
URGENT_LIFE_S = 5.0
"""So long after the last urgent bytes of this host, its bulk leaves room on the uplink for more of them."""

STREAM_SEND_QUEUE_BYTES = 256 << 20
"""What `write_nowait` may queue on a stream: senders are bounded by their own credits well below it."""
STREAM_WRITE_HIGH_WATER_BYTES = 1 << 20
"""`write` waits while more than this is queued on its stream."""
STREAM_RECEIVE_PIECE_BYTES = 1 << 10
"""Received pieces below this are joined to the next: a credit spent byte by byte must not cost an object a byte."""
EXTRA_WINDOW_BYTES = 1 << 20
"""Granted at once on decode and bulk streams, whose messages outgrow the initial window."""

UPGRADE_TIMEOUT_S = 10.0
NEGOTIATE_TIMEOUT_S = 10.0
DIAL_TIMEOUT_S = 6.0
DIAL_STAGGER_S = 0.25
CLOSE_TIMEOUT_S = 1.0
DUPLICATE_DRAIN_S = 2.0
"""A duplicate connection lives at least so long, since its peer may be opening a stream on it, and then until its streams end."""
DUPLICATES_PER_PEER = 4
CONNECTION_IDLE_S = 35.0
"""A connection without streams that nobody keeps is left after so long: a DHT has thousands of contacts, and needs few at a time."""
CONNECTIONS_EASY = 40
"""While there are more, the longest idle are left at once: lookups side by side dial fifty peers in a second, and those nearest to a
busy key are asked by many at once."""
CLOSING_LATELY_S = 1.0
"""Of those that were left and still close, the average over about so long counts."""
CONNECTIONS_IDLE_MAX = 64
"""What that keeps a host under that isn't using more at once, counting those that it has left and that still close."""
UNUSED_IDLE_S = 1.0
"""A connection that was just dialled is about to be used: until its first stream it counts as idle only after so long."""
LEAVE_S = 2.0
"""A connection that one side has left takes streams that were under way for so long, and ends when they have."""
RTT_LIFE_S = 900.0
"""So long the round trip of a connection that ended is still told."""
STREAM_LINGER_S = 30.0
"""A stream that this side has closed is reset when the peer has not ended it within this time."""
HANDSHAKES_MAX = 64
HANDSHAKES_PER_ADDRESS_S = 5.0
HANDSHAKES_BURST = 20
HANDSHAKE_ADDRESSES_REMEMBERED = 4096
CONNECTIONS_MAX = 512
STREAMS_UNNEGOTIATED_MAX = 256
INBOUND_STREAMS_PER_PEER_DEFAULT = 64

PING_IDLE_S = 15.0
SILENT_DEAD_S = 30.0
"""With a ping outstanding and no byte for so long, a connection is dead."""
DIAL_BACKOFF_MIN_S = 1.0
DIAL_BACKOFF_MAX_S = 300.0

PEERS_REMEMBERED = 4096
ADDRESSES_PER_PEER = 16
ADDRESS_LIFE_S = 3600.0
IDENTIFY_BYTES_MAX = 8 << 10
IDENTIFY_MESSAGES_MAX = 10
IDENTIFY_TIMEOUT_S = 10.0
IDENTIFY_FRESH_S = 600.0
"""A peer that said who it is within this time isn't asked again."""
IDENTIFY_RETRY_S = 30.0
"""Nor one that was asked within this time, whatever came of it."""
PROTOCOLS_PER_PEER = 128
