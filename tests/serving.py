"""`krea-local serve` on the tiny model, in a process of its own, for tests that speak real HTTP."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SECONDS = float(os.environ.get("SECONDS", 300.0))  # a busy machine takes long to import torch
SMALL = {"image_size": {"width": 128, "height": 128}, "num_inference_steps": 2}
LONG = {"image_size": {"width": 512, "height": 512}, "num_inference_steps": 50, "num_images": 4}


@dataclass
class Server:
    """A running server.

    Attributes:
        url: of its root, without a closing slash.
        lines: what it printed.
    """

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    url: str = ""

    def wait_for(self, text: str) -> str:
        """The first line with that text, once it is there."""
        with self._news:
            there = self._news.wait_for(lambda: self._find(text) or self._ended, SECONDS)
        found = self._find(text)
        assert there, f"{text!r} was not printed in {SECONDS:g} s"
        assert found, self.lines
        return found

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(SECONDS)

    def close(self) -> None:
        """Kill it, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def __post_init__(self) -> None:
        self._news = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _find(self, text: str) -> str | None:
        return next((line for line in self.lines if text in line), None)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


def start(*flags: str, folder: Path, **environment: str) -> Server:
    """Start a server on any free port; does not wait."""
    command = [sys.executable, "-m", "krea_local", "serve", "--model", "tiny", "--port", "0"]
    command += ["--device", "cpu", "--dtype", "float32", "--folder", str(folder), *flags]
    inherited = {name: value for name, value in os.environ.items() if "KREA_LOCAL" not in name}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )
    return Server(process)


@contextlib.contextmanager
def serving(*flags: str, folder: Path, ready: bool = True, **environment: str) -> Iterator[Server]:
    """A server that listens, and by default has its model loaded."""
    server = start(*flags, folder=folder, **environment)
    try:
        server.url = server.wait_for("listening on").rsplit(" ", 1)[1]
        if ready:
            server.wait_for("ready: ")
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it as it was."""
    with serving("--log", folder=tmp_path_factory.mktemp("served")) as running:
        yield running
        assert not [line for line in running.lines if "Traceback" in line], running.lines[-60:]
        assert running.end() == 0, running.lines[-20:]
