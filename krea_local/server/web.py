"""What every handler has at hand. Knows nothing of paths."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from krea_local.server.service import Service
from krea_local.server.settings import Settings


@dataclass
class Web:
    """What every handler needs.

    Attributes:
        settings: what the server was started with.
        service: the queue.
        stopping: set when the server is told to end.
        stopped: set when no job runs any more.
        background: what is done beside requests.
        failure: why the service did not start.
        address: of the server's root, for those who did not ask it: webhooks' receivers.
    """

    settings: Settings
    service: Service
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    background: set[asyncio.Task[object]] = field(default_factory=set)
    failure: Exception | None = None
    address: str = "http://localhost"

    def later(self, work: Coroutine[Any, Any, object]) -> None:
        """Have `work` done by a task of its own, which no request's end takes along."""
        task = asyncio.ensure_future(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)
