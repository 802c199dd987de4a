"""The order in which jobs wait. Knows nothing of what they are, or of databases and workers."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from krea_local.server.changes import Waiting

_Key = tuple[bool, int]


class Queue:
    """Jobs in the order in which they start: as submitted, those of low priority after others."""

    def __init__(self) -> None:
        self._keys: list[_Key] = []
        self._ids: dict[_Key, str] = {}
        self._jobs: dict[str, Waiting] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, id: str) -> bool:
        return id in self._jobs

    def __iter__(self) -> Iterator[str]:
        return iter([self._ids[key] for key in self._keys])

    def put(self, id: str, waiting: Waiting) -> None:
        """A job waits from now on, or has its input image now."""
        key = _key(waiting)
        if id not in self._jobs:
            bisect.insort(self._keys, key)
        self._ids[key] = id
        self._jobs[id] = waiting

    def get(self, id: str) -> Waiting | None:
        """What is known of a job that waits."""
        return self._jobs.get(id)

    def remove(self, id: str) -> Waiting | None:
        """A job waits no more; None if it did not."""
        waiting = self._jobs.pop(id, None)
        if waiting is not None:
            key = _key(waiting)
            del self._keys[bisect.bisect_left(self._keys, key)]
            del self._ids[key]
        return waiting

    def take(self) -> tuple[str, Waiting] | None:
        """Remove and return the first job that has its input image, if it needs one."""
        for key in self._keys:
            first = self._ids[key]
            waiting = self._jobs[first]
            if not waiting.lacks_input:
                self.remove(first)
                return first, waiting
        return None

    def position(self, id: str) -> int:
        """How many jobs are before this one; 0 for one that does not wait."""
        waiting = self._jobs.get(id)
        return 0 if waiting is None else bisect.bisect_left(self._keys, _key(waiting))


def _key(waiting: Waiting) -> _Key:
    return waiting.low_priority, waiting.seq
