"""What came of one run, as a value that passes between processes as JSON. Pure."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from netsim.metrics import Series


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of one check."""

    metric: str
    bound: str
    value: float | None
    holds: bool
    culprits: tuple[str, ...] = ()
    """Whom it was broken by: hosts, sessions, or what else the workload names."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run."""

    scenario: str
    file: str
    seed: int
    numbers: Mapping[str, float]
    checks: tuple[Checked, ...]
    failures: tuple[str, ...]
    stories: Mapping[str, tuple[str, ...]]
    """Of those concerned; that of nobody ("") is what happened last in the whole run."""
    trace_hash: str
    trace_lines: int
    events: int
    virtual_s: float
    real_s: float
    """Of one core."""
    peak_rss_mib: float
    series: Mapping[str, Series] = field(default_factory=dict, repr=False)
    observations: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)
    marks: tuple[tuple[float, str], ...] = field(default=(), repr=False)
    """When what befell hosts, for the plots."""
    wall_s: float = 0.0
    """By the clock on the wall, the start of the process included where the run knew it."""

    @property
    def passed(self) -> bool:
        return not self.failures and all(check.holds for check in self.checks)

    @property
    def replay(self) -> str:
        """The command that runs this again."""
        return f"python -m netsim run {shlex.quote(self.file)} --seed {self.seed}"

    def to_json(self) -> str:
        """One line, without series and observations."""
        told = {name.name: getattr(self, name.name) for name in dataclasses.fields(self) if name.repr}
        told["checks"] = [dataclasses.asdict(check) for check in self.checks]
        return json.dumps(told)

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        """What `to_json` said. Raises ValueError, TypeError, KeyError for anything else."""
        told: dict[str, Any] = json.loads(text)
        told["checks"] = tuple(Checked(**{**check, "culprits": tuple(check["culprits"])}) for check in told["checks"])
        told["failures"] = tuple(told["failures"])
        told["stories"] = {name: tuple(lines) for name, lines in told["stories"].items()}
        return cls(**told)

    @classmethod
    def of_dead_process(cls, scenario: str, file: str, seed: int, why: str) -> Outcome:
        """A run of which nothing is known but that its process failed."""
        return cls(scenario, file, seed, {}, (), (why,), {}, "", 0, 0, 0.0, 0.0, 0.0)
