"""Work that nobody has to wait for to its end: slow servers, and calls that are cancelled.

Knows nothing of what the work is.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
LOOK_SECONDS = 0.05  # between looks whether to wait on: nobody notices so little


class TooSlow(Exception):
    """The work took longer than it may."""


def wait_for(
    work: Callable[[threading.Event], T],
    *,
    check: Callable[[], None],
    seconds: float | None = None,
) -> T:
    """What `work` returns or raises, from a thread of its own that may be left behind.

    Args:
        work: what is to be done; given an event that is set once nobody waits any more.
        check: called now and then; what it raises ends the waiting.
        seconds: that it may take.

    Raises:
        TooSlow: it took longer.
    """
    answer: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    left = threading.Event()

    def run() -> None:
        try:
            answer.put((work(left), None))
        except BaseException as error:  # the caller's, whatever it is
            answer.put((None, error))

    deadline = None if seconds is None else time.monotonic() + seconds
    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            check()
            try:
                result, error = answer.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                if deadline is not None and time.monotonic() > deadline:
                    raise TooSlow(f"over {seconds:g} s") from None
                continue
            if error is not None:
                raise error
            return result  # type: ignore[return-value]
    finally:
        left.set()
