"""The worker process alone: what it says, and when it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from krea_local.errors import GenerationFailed, OutOfMemory
from krea_local.server.worker import LOAD_FAILED, _is_fatal


class Process:
    """A worker process, spoken to as the server does."""

    def __init__(self, folder: Path, **settings: object) -> None:
        ours, theirs = os.pipe()
        command = [sys.executable, "-m", "krea_local.server.worker", str(theirs), str(os.getpid())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(theirs,), bufsize=0
        )
        os.close(theirs)
        self.answers: IO[bytes] = os.fdopen(ours, "rb")
        told = {"model": "tiny", "load": {}, "device": "cpu", "files": str(folder)}
        self.send(**{**told, **settings})

    def send(self, **order: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")

    def until(self, kind: str) -> dict[str, Any]:
        while True:
            answer: dict[str, Any] = json.loads(self.answers.readline())
            if answer["kind"] == kind:
                return answer

    def hang_up(self) -> int:
        """Its exit code once nobody gives it orders."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(timeout=60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.answers.close()
        for pipe in (self.process.stdin, self.process.stderr):
            assert pipe is not None
            pipe.close()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    one = Process(tmp_path_factory.mktemp("files"))
    yield one
    one.close()


def order(**told: object) -> dict[str, object]:
    arguments = {"prompt": "a", "num_inference_steps": 1, "seed": 1, **told}
    return {
        "kind": "run",
        "id": "one",
        "endpoint": "fal-ai/flux/krea",
        "arguments": arguments,
        "input": None,
        "files": ["0" * 32],
    }


def test_a_fault_of_a_job_is_told_and_the_next_job_runs(worker: Process) -> None:
    assert worker.until("ready")["label"] == "tiny"
    worker.send(**order(num_images=9))
    failed = worker.until("failed")
    assert failed["failure"]["status"] == 422
    assert "num_images" in failed["reason"]
    worker.send(**order(image_size={"width": 64, "height": 64}))
    (picture,) = worker.until("done")["outcome"]["pictures"]
    assert (picture["width"], picture["height"]) == (64, 64)


def test_it_ends_when_nobody_gives_orders_any_more(worker: Process) -> None:
    assert worker.hang_up() == 0


def test_a_model_that_cannot_be_loaded_is_told_with_its_reason(tmp_path: Path) -> None:
    worker = Process(tmp_path, model=str(tmp_path / "nowhere"))
    try:
        assert "nowhere" in worker.until("refused")["reason"]
        assert worker.process.wait(timeout=60) == LOAD_FAILED
    finally:
        worker.close()


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "fatal"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (caused(GenerationFailed("no picture"), RuntimeError("CUDA error: unknown")), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (caused(OutOfMemory("memory does not suffice"), RuntimeError("out of memory")), False),
        (GenerationFailed("the model produced NaN"), False),
        (ValueError("CUDA error: is what the prompt says"), False),
    ],
)
def test_after_a_fatal_cuda_error_a_worker_is_of_no_more_use(error: Exception, fatal: bool) -> None:
    assert _is_fatal(error) is fatal
