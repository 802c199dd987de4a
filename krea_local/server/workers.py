"""A worker process as the server sees it: started, spoken to, killed when it does not obey.

Knows nothing of queues or databases, nor of what the jobs are that it passes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from krea_local.server.facts import WorkerFacts
from krea_local.server.settings import Settings

logger = logging.getLogger(__name__)

LONGEST_LINE = 64 * 2**20  # an answer with a preview has some 100 kB
STOP_SECONDS = 5.0
LAST_WORDS_SECONDS = 1.0
LAST_WORDS = 5  # lines of standard error that tell why a worker died

Message = dict[str, Any]


class WorkerDied(Exception):
    """The worker process is gone; says why, to whoever runs the server.

    Attributes:
        brief: the same to whoever sent the job, without what its last words tell of the machine.
    """

    def __init__(self, reason: str, brief: str = "the worker process ended") -> None:
        super().__init__(reason)
        self.brief = brief


class Worker:
    """One worker process at a time for one device, begun anew by `load`.

    Args:
        settings: the model, and how it is loaded.
        device: that it owns.
        files: the folder of the store's files.
    """

    def __init__(self, settings: Settings, device: str, files: Path) -> None:
        self.facts = WorkerFacts(device=device, state="stopped")
        self._device = device
        self._settings = settings
        self._files = files
        self._process: subprocess.Popen[bytes] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[Message] | None = None
        self._on_message: Callable[[Message], None] | None = None
        self._sending = threading.Lock()
        self._telling: set[asyncio.Task[None]] = set()
        self._last_words: deque[str] = deque(maxlen=LAST_WORDS)
        self._fatal = ""

    async def load(self) -> None:
        """Start a process and wait until its model is loaded.

        Raises:
            WorkerDied: it cannot be started, or the model not loaded.
        """
        self._set(state="loading", job=None)
        try:
            answer = await self._start()
        except (OSError, WorkerDied) as error:
            self._set(state="failed", reason=str(error))
            raise WorkerDied(str(error)) from error
        if answer["kind"] == "refused":
            await self._end()
            self._set(state="failed", reason=answer["reason"])
            raise WorkerDied(answer["reason"])
        self._set(state="idle", model=answer["label"], device=answer["device"], reason="")
        self._remember(answer)
        logger.info("%s has loaded %s", self.facts.device, self.facts.model)

    async def run(
        self, order: Mapping[str, object], on_message: Callable[[Message], None]
    ) -> Message:
        """Have it draw; its last word on that: "done", "failed" or "cancelled".

        Args:
            order: for the worker.
            on_message: called with each "progress" and "log".

        Raises:
            WorkerDied: before it answered.
        """
        self._set(state="busy", job=str(order["id"]))
        self._on_message = on_message
        try:
            answer = await self._ask({"kind": "run", **order})
        except WorkerDied as error:
            self._set(state="failed", reason=str(error), job=None)
            raise
        finally:
            self._on_message = None
        self._set(state="idle", job=None)
        return answer

    @property
    def listening(self) -> asyncio.Task[None]:
        """Done when the process is gone."""
        assert self._listening is not None
        return self._listening

    def check(self) -> None:
        """Raise `WorkerDied` if the process is gone."""
        if self.listening.done():
            self._set(state="failed", reason=str(self._death()))
            raise self._death()

    def cancel(self, id: str) -> None:
        """Have it stop that job within a step; does not wait for that."""
        self._tell("cancel", id)

    def show(self, id: str) -> None:
        """Have it send previews of that job from now on; does not wait for that."""
        self._tell("show", id)

    def _tell(self, kind: str, id: str) -> None:
        if self._process is not None:
            work = asyncio.to_thread(self._send, self._process, {"kind": kind, "id": id})
            telling = asyncio.create_task(work)
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        """End it, gently if it listens."""
        if self._process is not None and self._listening is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            await asyncio.wait((self._listening,), timeout=STOP_SECONDS)
        await self._end()
        self._set(state="stopped", job=None, memory_used=0)

    async def _start(self) -> Message:
        await self._end()
        ours, theirs = os.pipe()
        try:
            # Not asyncio's, whose watchers of children differ by version and loop.
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "krea_local.server.worker", str(theirs), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs,),
                start_new_session=True,
                bufsize=0,
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._set(pid=self._process.pid)
        self._fatal = ""
        self._last_words.clear()
        self._listening = asyncio.create_task(self._listen(self._process, ours))
        settings = self._settings
        return await self._ask(
            {
                "model": settings.model,
                "load": dict(settings.load),
                "device": self._device,
                "files": str(self._files),
            }
        )

    async def _ask(self, order: Mapping[str, object]) -> Message:
        if self._listening is None or self._listening.done():
            raise self._death()
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._answer = answer
        # In a thread, since a process that hangs would not read a long order.
        assert self._process is not None
        await asyncio.to_thread(self._send, self._process, order)
        return await answer

    def _send(self, process: subprocess.Popen[bytes], order: Mapping[str, object]) -> None:
        assert process.stdin is not None
        line = json.dumps(order, default=str).encode() + b"\n"  # paths among what `load` takes
        # That nobody reads it, `_listen` notices.
        with self._sending, contextlib.suppress(OSError, ValueError):
            while line:
                line = line[process.stdin.write(line) or 0 :]

    async def _listen(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        """Hear the process out, until it is gone."""
        assert process.stderr is not None
        answers, answers_end = await _reader(os.fdopen(descriptor, "rb", buffering=0))
        words, words_end = await _reader(process.stderr)
        hearing = asyncio.create_task(self._hear_words(words))
        try:
            while (line := await answers.readline()).endswith(b"\n"):
                self._hear(json.loads(line))
        finally:
            process.kill()  # it has closed its answers: it is of no more use
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            await asyncio.to_thread(process.wait)
            # A grandchild may still hold the pipe.
            await asyncio.wait((hearing,), timeout=LAST_WORDS_SECONDS)
            hearing.cancel()
            answers_end.close()
            words_end.close()
            if self._answer is not None and not self._answer.done():
                self._answer.set_exception(self._death())

    def _hear(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "memory":
            self._remember(message)
        elif kind == "fatal":
            self._fatal = message["reason"]
        elif kind in ("progress", "log"):
            if self._on_message is not None:
                self._on_message(message)
        elif self._answer is not None and not self._answer.done():
            self._answer.set_result(message)

    async def _hear_words(self, words: asyncio.StreamReader) -> None:
        """What it writes to standard error goes to our log."""
        while True:
            try:
                line = await words.readline()
            except ValueError:  # longer than the stream's limit; that much of it is skipped
                continue
            if not line:
                return
            text = "".join(
                one if one.isprintable() else f"\\x{ord(one):02x}"
                for one in line.decode(errors="replace").rstrip()
            )
            self._last_words.append(text)
            logger.info("%s: %s", self.facts.device, text)

    def _death(self) -> WorkerDied:
        """Why the process is gone."""
        if self._fatal:
            return WorkerDied(f"the GPU failed: {self._fatal}", "the GPU failed")
        code = None if self._process is None else self._process.poll()
        words = " / ".join(self._last_words)
        return WorkerDied(f"the worker process ended with code {code}{': ' * bool(words)}{words}")

    async def _end(self) -> None:
        """Have no process."""
        self.kill()
        if self._listening is not None:
            await asyncio.wait((self._listening,))
        self._process = self._listening = self._answer = None
        self._set(pid=None)

    def _remember(self, message: Message) -> None:
        self._set(memory_used=message["used"], memory_total=message["total"])

    def _set(self, **told: Any) -> None:
        self.facts = replace(self.facts, **told)


async def _reader(pipe: IO[bytes]) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    reader = asyncio.StreamReader(limit=LONGEST_LINE)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    return reader, transport
