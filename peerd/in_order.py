"""Works that run beside each other, with their results in the order of the works."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from overlay.errors import PeerdError

Result = TypeVar("Result")


async def in_order(
    works: Sequence[Callable[[], Coroutine[Any, Any, Result]]], *, at_once: int | None = None
) -> list[Result]:
    """Run all, ``at_once`` of them at a time (None: however many there are). Cancel-safe.

    Raises:
        PeerdError: the first work's that failed, as it is; the others are cancelled first.
    """
    turns = asyncio.Semaphore(at_once or max(1, len(works)))

    async def in_turn(work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        async with turns:
            return await work()

    failure: BaseException | None = None
    tasks: list[asyncio.Task[Result]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(in_turn(work), name="micro-batch") for work in works]
    except* PeerdError as failed:
        failure = failed.exceptions[0]
    if failure is not None:
        raise failure
    return [task.result() for task in tasks]
