"""Which cells of a protocol's table came up as copies in a run, and which never did."""

from __future__ import annotations

from collections.abc import Iterable

from netsim.metrics import Metrics


class CellCount:
    """Counts `copies`, `copies.CELL` and, of different ones, `cells`; those that never came are named where a check wants more."""

    def __init__(self, metrics: Metrics, cells: Iterable[str]) -> None:
        self._metrics = metrics
        self._came: dict[str, None] = {}
        metrics.owed_by("cells", (f"copies.{cell}" for cell in cells))

    def copied(self, cell: str) -> None:
        """One copy was sent."""
        name = f"copies.{cell}"
        if name not in self._came:
            self._came[name] = None
            self._metrics.put("cells", len(self._came))
            self._metrics.gave("cells", name)
        self._metrics.count("copies")
        self._metrics.count(name)
