"""A scenario: what a TOML file says about a run, as frozen dataclasses. Pure, but for `load_scenario`, which reads the file.

Owns what a file may say and what of it goes together. Every refusal is a ScenarioError that names the file and the key. What
workloads and peers want to be told is theirs: their settings stay tables here, and `netsim.runner` reads them by their classes.
"""

from __future__ import annotations

import runpy
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from netsim.nat import SITES
from netsim.tables import TableError, did_you_mean, read_table

HOSTS_AT_MOST = 20_000
REAL_NOISE_HOSTS_AT_MOST = 100
"""Up to so many hosts a file can't have but Noise; above, the default is the null channel."""
FaultKind = Literal[
    "kill", "power-off", "stop", "restart", "freeze", "thaw", "sleep", "wake", "partition", "reset", "degrade",
    "clock-step", "slow", "fill-disk", "fill-memory", "lie",
]  # fmt: skip


class ScenarioError(Exception):
    """A file that is no scenario; the sentence names the file and the key."""


def _need(holds: bool, key: str, sentence: str) -> None:
    if not holds:
        raise TableError(key, sentence)


def _need_range(values: tuple[float, float], key: str, least: float) -> None:
    _need(least <= values[0] <= values[1], key, f"has to rise, from {least:g} or more")


@dataclass(frozen=True, slots=True)
class HostGroup:
    """``[hosts.NAME]``: hosts named NAME-1 to NAME-count."""

    count: int
    kind: str
    start_s: tuple[float, float] = (0.0, 0.0)
    clock_skew_s: tuple[float, float] = (0.0, 0.0)
    nat: Mapping[str, float] = field(default_factory=dict)
    """Kinds of NAT and their shares; nobody is behind one where it is left out."""
    uplink_mbit: tuple[float, ...] = ()
    """Drawn from; where it is empty, the links'."""
    downlink_mbit: tuple[float, ...] = ()
    disk_flush_s: float = 0.0
    """Seconds in which a drive that lies about syncing loses what was saved, when the power goes."""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _need(self.count >= 1, "count", "has to be 1 or more")
        _need_range(self.start_s, "start_s", 0.0)
        _need(self.clock_skew_s[0] <= self.clock_skew_s[1], "clock_skew_s", "has to rise")
        for kind in self.nat:
            _need(kind in SITES, f"nat.{kind}", f"is no kind of NAT; {did_you_mean(kind, SITES)}")
        _need(all(share >= 0 for share in self.nat.values()), "nat", "has no negative shares")
        _need(not self.nat or abs(sum(self.nat.values()) - 1) < 1e-6, "nat", "has shares that sum to 1")
        for key in ("uplink_mbit", "downlink_mbit"):
            _need(all(rate > 0 for rate in getattr(self, key)), key, "has to be over 0")
        _need(self.disk_flush_s >= 0, "disk_flush_s", "has to be 0 or more")


@dataclass(frozen=True, slots=True)
class Links:
    """``[links]``: the paths between hosts, and their access lines."""

    rtt_ms: tuple[float, float] = (10.0, 10.0)
    """5th and 95th percentile of a lognormal distribution over pairs of hosts."""
    jitter_ms: float = 0.0
    loss: float = 0.0
    path_mbit: float | None = None
    uplink_mbit: tuple[float, ...] = ()
    """Drawn from for each host; unlimited where it is empty."""
    downlink_mbit: tuple[float, ...] = ()
    send_buffer_kib: int = 4 << 10
    """What may be in flight of each connection: the sender's bound, and the receiver's."""
    receive_window_kib: int = 6 << 10
    path_queue_kib: int = 256
    """Of a path with a rate of its own: what its router holds; more is dropped."""

    def __post_init__(self) -> None:
        _need_range(self.rtt_ms, "rtt_ms", 0.001)
        _need(self.jitter_ms >= 0, "jitter_ms", "has to be 0 or more")
        _need(0 <= self.loss < 0.5, "loss", "has to be a share under 0.5")
        _need(self.path_mbit is None or self.path_mbit > 0, "path_mbit", "has to be over 0")
        for key in ("send_buffer_kib", "receive_window_kib", "path_queue_kib"):
            _need(getattr(self, key) > 0, key, "has to be over 0")
        for key in ("uplink_mbit", "downlink_mbit"):
            _need(all(rate > 0 for rate in getattr(self, key)), key, "has to be over 0")


@dataclass(frozen=True, slots=True)
class Churn:
    """``[churn]``: hosts of some groups leave, each at a moment of its own, and come back."""

    groups: tuple[str, ...]
    leaves_per_hour: float
    """Of one host that is there; the times between are exponential."""
    clean: float = 0.0
    """Shares of how they leave: asked to stop; killed; without power; stopped by a signal; lid closed."""
    crash: float = 0.0
    vanish: float = 0.0
    freeze: float = 0.0
    sleep: float = 0.0
    back_after_s: tuple[float, float] = (30.0, 600.0)
    state_lost: float = 0.0
    """The share of those that come back with an empty disk (never of those that stood still)."""
    from_s: float = 0.0
    until_s: float | None = None

    def __post_init__(self) -> None:
        _need(bool(self.groups), "groups", "has to name a group")
        _need(self.leaves_per_hour > 0, "leaves_per_hour", "has to be over 0")
        shares = (self.clean, self.crash, self.vanish, self.freeze, self.sleep)
        _need(
            min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6,
            "clean",
            "with crash, vanish, freeze and sleep has to sum to 1",
        )
        _need_range(self.back_after_s, "back_after_s", 0.0)
        _need(0 <= self.state_lost <= 1, "state_lost", "has to be a share")
        _need(self.from_s >= 0, "from_s", "has to be 0 or more")
        _need(self.until_s is None or self.until_s > self.from_s, "until_s", "has to be after from_s")


_ONLY_FOR = {
    "others": ("partition", "reset", "degrade"),
    "one_way": ("partition", "degrade"),
    "seconds": ("clock-step",),
    "factor": ("slow", "degrade"),
    "loss": ("degrade",),
    "how": ("lie",),
}
_MOMENTARY = ("restart", "thaw", "wake", "reset", "clock-step")


@dataclass(frozen=True, slots=True)
class Fault:
    """``[[faults]]``: something that happens to chosen hosts at a moment, or every so often."""

    at_s: float
    kind: FaultKind
    hosts: str = ""
    """A group, of which ``share`` or ``count`` are drawn; all where neither is said."""
    share: float | None = None
    count: int | None = None
    names: tuple[str, ...] = ()
    """Hosts by name, in place of ``hosts``."""
    others: str = ""
    """Partition, reset, degrade: the group on the other side; everybody else where it is left out."""
    one_way: bool = False
    """Partition, degrade: only what the chosen hosts send."""
    for_s: float | None = None
    """After so long it is undone: started again, thawed, healed, and so on."""
    every_s: float | None = None
    until_s: float | None = None
    seconds: float | None = None
    """Clock steps."""
    factor: float | None = None
    """Slow devices; degraded paths: so many times the delay."""
    loss: float | None = None
    """Degraded paths."""
    how: str = ""
    """Lies."""
    keep_state: bool = True
    """Whether those that are started again find their disks as they were."""

    def __post_init__(self) -> None:
        _need(self.at_s >= 0, "at_s", "has to be 0 or more")
        _need(bool(self.hosts) != bool(self.names), "hosts", "or names has to be given, and not both")
        _need(self.share is None or self.count is None, "share", "can't be given together with count")
        _need(
            not self.names or (self.share is None and self.count is None), "names", "goes with neither share nor count"
        )
        _need(self.share is None or 0 < self.share <= 1, "share", "has to be over 0 and at most 1")
        _need(self.count is None or self.count > 0, "count", "has to be over 0")
        self._check_kind()
        _need(self.for_s is None or self.for_s > 0, "for_s", "has to be over 0")
        _need(self.every_s is None or self.every_s > 0, "every_s", "has to be over 0")
        _need((self.every_s is None) == (self.until_s is None), "every_s", "and until_s go together")

    def _check_kind(self) -> None:
        for key, kinds in _ONLY_FOR.items():
            sentence = f"belongs to {' and '.join(kinds)}, not to {self.kind}"
            _need(not getattr(self, key) or self.kind in kinds, key, sentence)
        _need(self.kind != "clock-step" or self.seconds is not None, "seconds", "is missing")
        _need(self.kind != "slow" or (self.factor or 0) > 0, "factor", "has to be over 0")
        _need(self.kind != "degrade" or bool(self.factor or self.loss), "factor", "or loss is missing")
        _need(self.factor is None or self.factor > 0, "factor", "has to be over 0")
        _need(self.loss is None or 0 <= self.loss < 1, "loss", "has to be a share")
        _need(self.kind != "lie" or bool(self.how), "how", "is missing")
        _need(self.for_s is None or self.kind not in _MOMENTARY, "for_s", f"has no meaning for {self.kind}")
        _need(
            self.keep_state or self.kind in ("kill", "power-off", "stop", "restart"), "keep_state", "goes with starts"
        )


@dataclass(frozen=True, slots=True)
class Bound:
    """``[checks]``: what a metric may be at the end."""

    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        _need(self.min is not None or self.max is not None, "", "a check needs min, max or both")

    def holds(self, value: float | None) -> bool:
        """Whether ``value`` is within; what was never measured isn't."""
        if value is None:
            return False
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    def __str__(self) -> str:
        if self.min is not None and self.min == self.max:
            return f"= {self.min:g}"
        parts = ([f">= {self.min:g}"] if self.min is not None else []) + (
            [f"<= {self.max:g}"] if self.max is not None else []
        )
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A whole file."""

    about: str
    duration_s: float
    workload: str
    hosts: Mapping[str, HostGroup]
    checks: Mapping[str, Bound]
    channel: Literal["", "null", "noise"] = ""
    """What secures connections; chosen by the number of hosts where it is left out. Of few hosts only a test asks for the null one."""
    real_s_max: float = 120.0
    """Of one core's time; over it is a failure."""
    rss_mib_max: float | None = None
    alone: bool = False
    """Whether no other run may share the machine with it: its real time is the point, and counts by the clock where that is more."""
    endless: bool = False
    """Whether the workload goes on until the duration is over; another's not returning by then is a failure."""
    expected_errors: tuple[str, ...] = ()
    """Parts of errors that are no failures here: of what peers log, and of what they end with."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    links: Links = field(default_factory=Links)
    churn: Churn | None = None
    faults: tuple[Fault, ...] = ()
    name: str = ""

    @property
    def host_count(self) -> int:
        return sum(group.count for group in self.hosts.values())

    @property
    def is_noise(self) -> bool:
        """Whether the real handshake runs."""
        return self.channel == "noise" or (not self.channel and self.host_count <= REAL_NOISE_HOSTS_AT_MOST)

    def __post_init__(self) -> None:
        _need(bool(self.about.strip()), "about", "has to say what this shows")
        _need(self.duration_s > 0, "duration_s", "has to be over 0")
        _need(self.real_s_max > 0, "real_s_max", "has to be over 0")
        _need(self.rss_mib_max is None or self.rss_mib_max > 0, "rss_mib_max", "has to be over 0")
        _need(all(self.expected_errors), "expected_errors", "can't be empty texts")
        _need(bool(self.hosts), "hosts", "has to have a group")
        _need(bool(self.checks), "checks", "has to bound something: a run that checks nothing shows nothing")
        _need(self.host_count <= HOSTS_AT_MOST, "hosts", f"has more than {HOSTS_AT_MOST} hosts")
        names = {f"{group}-{index}" for group, told in self.hosts.items() for index in range(1, told.count + 1)}
        for index, fault in enumerate(self.faults):
            for key in ("hosts", "others"):
                group = getattr(fault, key)
                _need(not group or group in self.hosts, f"faults[{index}].{key}", f"names no group: {group!r}")
            for name in fault.names:
                _need(name in names, f"faults[{index}].names", f"names no host: {name!r}")
            _need(fault.at_s <= self.duration_s, f"faults[{index}].at_s", "is after the end")
        for group in self.churn.groups if self.churn is not None else ():
            _need(group in self.hosts, "churn.groups", f"names no group: {group!r}")


def parse_scenario(text: str, file: str) -> Scenario:
    """The scenario that a file's text says. Raises ScenarioError."""
    try:
        table = tomllib.loads(text)
        if "name" in table:
            raise TableError("name", "is the file's own name, and not said in it")
        return _checked(read_table(Scenario, {**table, "name": Path(file).stem}))
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{file}: {error}") from error
    except TableError as error:
        raise ScenarioError(f"{file}: {error}") from error


def _checked(scenario: Scenario) -> Scenario:
    """What a file may not say, though a test that makes a scenario small in code may."""
    few = scenario.host_count <= REAL_NOISE_HOSTS_AT_MOST
    sentence = f"can't be null with {REAL_NOISE_HOSTS_AT_MOST} hosts or fewer: they do the real handshake"
    _need(scenario.channel != "null" or not few, "channel", sentence)
    return scenario


def load_scenario(path: Path) -> Scenario:
    """Read a file; of a Python file, which is run, it is what it calls ``SCENARIO``. Raises ScenarioError."""
    try:
        if path.suffix == ".py":
            told = runpy.run_path(str(path)).get("SCENARIO")
            if not isinstance(told, Scenario):
                raise ScenarioError(f"{path}: SCENARIO is no Scenario")
            return _checked(replace(told, name=path.stem))
        return parse_scenario(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, TableError) as error:
        raise ScenarioError(f"{path}: can't be read ({error})") from error
