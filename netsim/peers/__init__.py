"""What can run on a simulated machine. One module per kind; each names its class ``PEER``.

A kind `dht` is the module `netsim.peers.dht` with ``PEER = DhtPeer``. The class has ``SETTINGS``, a frozen dataclass whose
fields are the keys of a scenario's ``[hosts.GROUP.settings]``, and is made anew for every incarnation.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

if TYPE_CHECKING:
    from netsim.world import SimHost


class Peer(Protocol):
    """One incarnation of the software on a machine."""

    SETTINGS: ClassVar[type[Any]]

    def __init__(self, host: SimHost, settings: Any) -> None:
        """Runs in the host's context. ``settings`` is a ``SETTINGS``; no work is done yet."""

    async def run(self) -> None:
        """Its life, until cancelled (that is: killed) or asked to stop. An exception out of it fails the run."""

    def request_stop(self) -> None:
        """Stop in good order; `run` returns when that's done."""


class UnknownKind(LookupError):
    """There is no such kind of peer."""


def kinds() -> tuple[str, ...]:
    """Every kind there is."""
    return tuple(sorted(found.name for found in pkgutil.iter_modules(__path__)))


def peer_class(kind: str) -> type[Peer]:
    """The class of a kind. Raises UnknownKind."""
    if kind not in kinds():
        raise UnknownKind(f"there is no kind of peer {kind!r}; there are {', '.join(kinds())}")
    return cast(type[Peer], importlib.import_module(f"netsim.peers.{kind}").PEER)
