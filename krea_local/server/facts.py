"""What the service tells the web side, beside jobs: events, workers, and why it takes no job.

Knows nothing of how any of it comes about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from krea_local.server.jobs import Job, Log

Cancelling = Literal["requested", "already", "missing"]


class QueueFull(Exception):
    """As many jobs wait as may; try again after `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full: try again in {retry_after} s")
        self.retry_after = retry_after


class Unavailable(Exception):
    """The server takes no jobs now: it is stopping, or its disk is full."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a job.

    Attributes:
        kind: "state", "progress" or "log".
        job: as it is now.
        fraction: share of the work done, 0 … 1.
        step: of "progress".
        num_steps: likewise.
        preview: JPEG bytes of the picture as it is so far, now and then; else None.
        log: of "log".
    """

    kind: Literal["state", "progress", "log"]
    job: Job
    fraction: float = 0.0
    step: int = 0
    num_steps: int = 0
    preview: bytes | None = None
    log: Log | None = None


@dataclass(frozen=True)
class WorkerFacts:
    """One worker process.

    Attributes:
        device: "cuda:0".
        state: "loading", "idle", "busy", "failed" or "stopped".
        model: its label once it is loaded, else "".
        memory_used: bytes of GPU memory, 0 on the CPU.
        memory_total: likewise.
        reason: why it is failed; kept while it is loaded again, until that went well.
        job: the id of the job it works at, or None.
        pid: of its process, or None.
    """

    device: str
    state: Literal["loading", "idle", "busy", "failed", "stopped"]
    model: str = ""
    memory_used: int = 0
    memory_total: int = 0
    reason: str = ""
    job: str | None = None
    pid: int | None = None
