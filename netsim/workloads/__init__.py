"""What peers are made to do in a run, and what is measured. One module per subject; each lists its classes in ``WORKLOADS``.

A workload `dht.records` is ``WORKLOADS["records"]`` of the module `netsim.workloads.dht`. The class has ``SETTINGS``, a frozen
dataclass whose fields are the keys of a scenario's ``[settings]``, and ``METRICS``: every name that it may count, put,
observe or sample, with what it means and its unit; a scenario's checks may bound these and no others.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, cast

if TYPE_CHECKING:
    from netsim.metrics import Metrics
    from netsim.world import World


class Workload(Protocol):
    """Drives one run."""

    SETTINGS: ClassVar[type[Any]]
    METRICS: ClassVar[Mapping[str, str]]

    def __init__(self, world: World, settings: Any, metrics: Metrics) -> None:
        """``settings`` is a ``SETTINGS``; hosts exist, none is started yet."""

    async def run(self) -> None:
        """From the first moment to the end of what is measured; cancelled when the scenario's duration is over."""


Told = TypeVar("Told")
"""The settings of a workload."""


class Scene(Generic[Told]):
    """What most workloads hold: the world, what they are told, and numbers that exist from the start."""

    COUNTED: ClassVar[tuple[str, ...]] = ()
    """Counts that are 0 where nothing happens."""

    def __init__(self, world: World, settings: Told, metrics: Metrics) -> None:
        self._world = world
        self._settings = settings
        self._metrics = metrics
        for name in self.COUNTED:
            metrics.count(name, 0)


class UnknownWorkload(LookupError):
    """There is no such workload."""


def workload_class(name: str) -> type[Workload]:
    """The class of ``module.name``. Raises UnknownWorkload."""
    subject, _, short = name.partition(".")
    subjects = tuple(sorted(found.name for found in pkgutil.iter_modules(__path__)))
    if subject not in subjects:
        raise UnknownWorkload(f"there is no module of workloads {subject!r}; there are {', '.join(subjects)}")
    found = cast(Mapping[str, type[Workload]], importlib.import_module(f"netsim.workloads.{subject}").WORKLOADS)
    if short not in found:
        raise UnknownWorkload(f"{subject!r} has no workload {short!r}; it has {', '.join(sorted(found))}")
    return found[short]
