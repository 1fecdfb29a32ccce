"""When what happens to whom: a seed, starts, churn and faults into one list of moments. Pure.

Owns the draws of who and when; each purpose has a generator of its own, so that a fault more moves no start. What an action
does is `netsim.world`'s, and whether it still applies when its moment comes (a host may be dead by then) too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from netsim.scenario import Churn, Fault, Scenario

MOMENTS_AT_MOST = 1_000_000
SECONDS_PER_HOUR = 3600.0
UNDONE_BY = {
    "kill": "start",
    "power-off": "start",
    "stop": "start",
    "freeze": "thaw",
    "sleep": "wake",
    "degrade": "restore",
    "slow": "slow",
    "fill-disk": "free-disk",
    "fill-memory": "free-memory",
    "lie": "honest",
    "partition": "heal",
}
"""What ends each fault that can last."""
BETWEEN_HOSTS = ("partition", "reset", "degrade")
"""Faults of the paths between the chosen hosts and others."""


class Draws(Protocol):
    """A seeded generator (`random.Random` is one)."""

    def random(self) -> float: ...
    def uniform(self, a: float, b: float) -> float: ...
    def expovariate(self, lambd: float) -> float: ...
    def choices(self, population: Sequence[str], weights: Sequence[float]) -> list[str]: ...
    def sample(self, population: Sequence[Any], k: int) -> list[Any]: ...


Generator = Callable[[str], Draws]


@dataclass(frozen=True, slots=True)
class Moment:
    """``action`` befalls ``hosts`` at ``at_s`` after the start of the run."""

    at_s: float
    action: str
    hosts: tuple[str, ...]
    others: tuple[str, ...] = ()
    """The other side of a partition, a reset, a degraded path."""
    one_way: bool = False
    amount: float = 0.0
    """Seconds of a clock step, factor of a slow device or of a delay (0: as it is), number of a partition among the run's."""
    loss: float = 0.0
    how: str = ""
    keep_state: bool = True


@dataclass(slots=True)
class _Plan:
    moments: list[Moment] = field(default_factory=list)
    partitions: int = 0

    def add(self, moment: Moment) -> None:
        if len(self.moments) >= MOMENTS_AT_MOST:
            raise ValueError(f"more than {MOMENTS_AT_MOST} things are to happen in this run")
        self.moments.append(moment)


def names_of(scenario: Scenario, group: str) -> tuple[str, ...]:
    """The hosts of a group."""
    return tuple(f"{group}-{index}" for index in range(1, scenario.hosts[group].count + 1))


def plan(scenario: Scenario, generator: Generator) -> tuple[Moment, ...]:
    """Every moment of a run in order. ``generator`` gives each purpose its own seeded one. Raises ValueError: too many."""
    planned = _Plan()
    for group, told in scenario.hosts.items():
        draws = generator(f"start {group}")
        for name in names_of(scenario, group):
            planned.add(Moment(draws.uniform(*told.start_s), "start", (name,)))
    if scenario.churn is not None:
        for group in scenario.churn.groups:
            for name in names_of(scenario, group):
                first_s = max(scenario.churn.from_s, scenario.hosts[group].start_s[1])
                _plan_churn(planned, scenario.churn, name, first_s, scenario.duration_s, generator(f"churn {name}"))
    for index, fault in enumerate(scenario.faults):
        _plan_fault(planned, scenario, fault, generator(f"fault {index}"))
    planned.moments.sort(key=lambda moment: moment.at_s)  # stable: what was planned first happens first
    return tuple(moment for moment in planned.moments if moment.at_s <= scenario.duration_s)


def _plan_churn(planned: _Plan, churn: Churn, name: str, at_s: float, end_s: float, draws: Draws) -> None:
    ways = ("stop", "kill", "power-off", "freeze", "sleep")
    shares = (churn.clean, churn.crash, churn.vanish, churn.freeze, churn.sleep)
    until_s = end_s if churn.until_s is None else min(end_s, churn.until_s)
    while True:
        at_s += draws.expovariate(churn.leaves_per_hour / SECONDS_PER_HOUR)
        if at_s > until_s:
            return
        way = draws.choices(ways, shares)[0]
        planned.add(Moment(at_s, way, (name,)))
        at_s += draws.uniform(*churn.back_after_s)
        keeps = draws.random() >= churn.state_lost
        planned.add(Moment(at_s, UNDONE_BY[way], (name,), keep_state=keeps or way in ("freeze", "sleep")))


def _plan_fault(planned: _Plan, scenario: Scenario, fault: Fault, draws: Draws) -> None:
    at_s = fault.at_s
    until_s = at_s if fault.until_s is None else fault.until_s
    while at_s <= until_s:
        hosts = _chosen(scenario, fault, draws)
        amount = fault.seconds or fault.factor or 0.0
        others: tuple[str, ...] = ()
        if fault.kind in BETWEEN_HOSTS:
            chosen = set(hosts)
            groups = (fault.others,) if fault.others else tuple(scenario.hosts)
            others = tuple(name for group in groups for name in names_of(scenario, group) if name not in chosen)
        if fault.kind == "partition":
            planned.partitions += 1
            amount = float(planned.partitions)
        planned.add(
            Moment(
                at_s, fault.kind, hosts, others, fault.one_way, amount, fault.loss or 0.0, fault.how, fault.keep_state
            )
        )
        if fault.for_s is not None:
            undone = amount if fault.kind == "partition" else 1.0
            planned.add(
                Moment(
                    at_s + fault.for_s,
                    UNDONE_BY[fault.kind],
                    hosts,
                    others,
                    fault.one_way,
                    undone,
                    keep_state=fault.keep_state,
                )
            )
        if fault.every_s is None:
            return
        at_s += fault.every_s


def _chosen(scenario: Scenario, fault: Fault, draws: Draws) -> tuple[str, ...]:
    """Those that are named, or drawn from the group, in the group's order."""
    if fault.names:
        return fault.names
    names: Sequence[str] = names_of(scenario, fault.hosts)
    count = len(names)
    if fault.share is not None:
        count = max(1, round(fault.share * len(names)))
    elif fault.count is not None:
        count = min(fault.count, len(names))
    picked = sorted(draws.sample(range(len(names)), count))
    return tuple(names[index] for index in picked)
