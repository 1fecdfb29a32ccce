"""The node's figures for Prometheus: one registry per node, so that several in one process don't mix.

Owns names and labels. Shells call it; pure machines expose statistics that a shell turns into numbers here.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_FIRST_TOKEN_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counters and gauges; `render` gives the text that a scrape reads."""

    def __init__(self, version: str, peer_id: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        info = Gauge(
            "peerd_info", "Always 1; the labels say who this is.", ["version", "peer_id"], registry=self.registry
        )
        info.labels(version, peer_id).set(1)
        self.requests = Counter(
            "peerd_requests",
            "Requests on the local API, by path and status.",
            ["path", "status"],
            registry=self.registry,
        )
        self.generations = Gauge("peerd_generations", "Generations under way.", registry=self.registry)
        self.prompt_tokens = Counter("peerd_prompt_tokens", "Prompt tokens taken.", ["model"], registry=self.registry)
        self.generated_tokens = Counter(
            "peerd_generated_tokens", "Tokens generated for local requests.", ["model"], registry=self.registry
        )
        self.replays = Counter(
            "peerd_replays", "Times that a generation moved to another route.", ["model"], registry=self.registry
        )
        self.first_token_s = Histogram(
            "peerd_first_token_seconds",
            "From a request to its first token.",
            registry=self.registry,
            buckets=_FIRST_TOKEN_BUCKETS_S,
        )

    def watch(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Add a gauge whose value is read at each scrape; ``name`` goes without the ``peerd_``."""
        Gauge(f"peerd_{name}", description, registry=self.registry).set_function(read)

    def render(self) -> bytes:
        """The exposition text, in the format of `CONTENT_TYPE`."""
        return generate_latest(self.registry)
