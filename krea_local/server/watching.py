"""Who watches which job: bounded queues of events, and those who wait for an end.

A slow reader misses progress, never a change of state, a line of the log or the end. Belongs to one
asyncio loop. Knows nothing of how events come about.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from krea_local.server.facts import Event
from krea_local.server.jobs import FINISHED

MOST_PROGRESS = 16
"""Reports of progress that wait for one reader; older ones are dropped."""


class Watching:
    """The readers of every job's events."""

    def __init__(self) -> None:
        self._readers: dict[str, set[_Reader]] = {}

    def publish(self, event: Event) -> None:
        """Tell everybody who watches this job."""
        for reader in self._readers.get(event.job.id, ()):
            reader.put(event)

    async def events(self, first: Event) -> AsyncIterator[Event]:
        """`first`, then what happens to its job from the call's first await on, to the end."""
        job = first.job.id
        reader = _Reader()
        reader.put(first)
        self._readers.setdefault(job, set()).add(reader)
        try:
            ended = False
            while not ended:
                event = await reader.get()
                ended = event.kind == "state" and event.job.state in FINISHED
                yield event
        finally:
            self._readers[job].discard(reader)
            if not self._readers[job]:
                del self._readers[job]


class _Reader:
    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._progress = 0
        self._some = asyncio.Event()

    def put(self, event: Event) -> None:
        if event.kind == "progress":
            if self._progress == MOST_PROGRESS:
                oldest = next(one for one in self._events if one.kind == "progress")
                self._events.remove(oldest)
            else:
                self._progress += 1
        self._events.append(event)
        self._some.set()

    async def get(self) -> Event:
        while not self._events:
            self._some.clear()
            await self._some.wait()
        event = self._events.popleft()
        self._progress -= event.kind == "progress"
        return event
