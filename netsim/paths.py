"""The path between two hosts, as a function of the seed and the pair: no table of all pairs is ever made. Pure.

Round-trip times are lognormal between a 5th and a 95th percentile, the same both ways; half of one is the delay of a direction.
"""

from __future__ import annotations

import math
from hashlib import blake2b
from statistics import NormalDist

from netsim.scenario import Links

P95_SIGMAS = NormalDist().inv_cdf(0.95)
RTT_SPREAD_MAX = 3.0
"""No path is further from the middle than so many standard deviations."""


def one_way_delay_s(links: Links, seed: int, one: str, other: str) -> float:
    """Seconds from ``one`` to ``other``, and back."""
    low, high = math.log(links.rtt_ms[0]), math.log(links.rtt_ms[1])
    first, second = sorted((one, other))
    digest = blake2b(f"{seed} {first} {second}".encode(), digest_size=8).digest()
    share = (int.from_bytes(digest, "big") + 0.5) / 2**64
    sigmas = max(-RTT_SPREAD_MAX, min(RTT_SPREAD_MAX, NormalDist().inv_cdf(share)))
    middle, sigma = (low + high) / 2, (high - low) / 2 / P95_SIGMAS
    return math.exp(middle + sigma * sigmas) / 2000
