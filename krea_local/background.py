"""Work that nobody has to wait for to its end: slow servers, and calls that are cancelled."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
LOOK_SECONDS = 0.05


def wait_for(
    work: Callable[[], T], *, check: Callable[[], None], seconds: float | None = None
) -> T:
    """What `work` returns or raises, from a thread of its own that may be left behind.

    Args:
        work: what is to be done.
        check: called now and then; what it raises ends the waiting, not the work.
        seconds: that it may take.

    Raises:
        TimeoutError: it took longer.
    """
    answer: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((work(), None))
        except BaseException as error:  # the caller's, whatever it is
            answer.put((None, error))

    deadline = None if seconds is None else time.monotonic() + seconds
    threading.Thread(target=run, daemon=True).start()
    while True:
        check()
        try:
            result, error = answer.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"over {seconds:g} s") from None
            continue
        if error is not None:
            raise error
        return result  # type: ignore[return-value]
