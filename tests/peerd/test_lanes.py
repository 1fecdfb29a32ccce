"""A driver's lanes: how long one may take to open."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import cast

import pytest

from blocks.protocol.commands import CloseHops, OpenHop
from blocks.protocol.messages import Epoch
from blocks.service import SpanService
from netsim.fabric import Path
from netsim.loop import run
from overlay.errors import PeerdError, TimedOut
from overlay.host import Host
from overlay.multiaddr import tcp_address
from overlay.rpc.types import Message
from peerd.lanes import LANE_OPEN_TIMEOUT_MAX_S, LANE_OPEN_TIMEOUT_S, Lanes
from routing.types import Hop, Span
from tests.netsim.small_network import Lines, SmallNetwork
from tests.overlay.network import identity

DRIVER, SERVER = "10.0.0.1", "10.0.0.2"


class Ears:
    """What is lost, and when."""

    def __init__(self) -> None:
        self.lost: list[tuple[float, PeerdError]] = []
        self.changed = asyncio.Event()

    def lane_message(self, message: Message, origin: bytes) -> None:
        raise AssertionError("nobody speaks here")

    def lane_lost(self, epoch: Epoch, hop_index: int, error: PeerdError) -> None:
        self.lost.append((asyncio.get_running_loop().time(), error))
        self.changed.set()


def test_a_server_without_power_holds_a_session_up_for_seconds_and_each_further_try_twice_as_long() -> None:
    """Others serve the same blocks; only where none does may it be a slow one, which is then given the time."""

    async def main() -> None:
        network, ears = SmallNetwork(Lines(), Path(delay_s=0.05)), Ears()
        async with asyncio.timeout(3600), AsyncExitStack() as stack:
            host = await stack.enter_async_context(Host(identity(1), network.ports(DRIVER)))
            network.ports(SERVER)
            network._fabric.power_off(SERVER)
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            lanes = Lanes(host, cast(SpanService, None), tasks, ears)
            address = str(tcp_address(SERVER, 4001))
            took_s = []
            for counter in range(4):
                epoch = Epoch(1, counter)
                hop = Hop(identity(2).peer_id.multihash, (address,), Span(0, 6))
                ears.changed.clear()
                began = asyncio.get_running_loop().time()
                lanes.open(OpenHop(epoch, 1, hop))
                await ears.changed.wait()
                took_s.append(ears.lost[-1][0] - began)
                lanes.close(CloseHops(epoch))
                await asyncio.sleep(400)  # until the address may be dialled again
            assert took_s == pytest.approx([LANE_OPEN_TIMEOUT_S, 6.0, 6.0, 6.0])
            assert [type(error) for _, error in ears.lost] == [TimedOut] * 4
            assert lanes.open_timeout_s(identity(2).peer_id.multihash) == LANE_OPEN_TIMEOUT_MAX_S
            assert lanes.open_timeout_s(identity(3).peer_id.multihash) == LANE_OPEN_TIMEOUT_S

    run(main())
