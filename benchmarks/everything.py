"""All that is to be measured on a GPU, the most important first: `python -m benchmarks.everything`.

Each stage is a command of its own, so that one that fails or dies costs only itself. Within
`--minutes`, stages that no longer fit are left out, and one that takes too long is ended; with the
same folder again, those that are done are not repeated. FOLDER gets `results.jsonl`, the lines of
all stages with their names, and `log.txt`, what they printed.

`--rehearse` runs them on the tiny model and the CPU: that shows that they run, no more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

LONGEST, SHORTEST = 3, 60  # times the seconds that a stage should take, and seconds, until its end
RESULTS, LOG, CURRENT = "results.jsonl", "log.txt", "current.jsonl"
LARGE = "--model random-12b --runs 3"
TINY = "--model tiny --device cpu --runs 1 --steps 4"
PEERS = ("eager", "cudnn", "compile-regional+cudnn", "flux-fast-blocks", "cache-dit-half")
WHOLE = ("compile", "flux-fast")


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: as `--only` takes it.
        seconds: that it should take on an H200; guessed, until it is measured.
        command: after the interpreter.
        rehearsal: what stands for the command on a CPU.
        output: whether it takes `--output FILE`.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    rehearsal: tuple[str, ...]
    output: bool = True


def _stage(name: str, seconds: int, module: str, large: str, tiny: str, **more: bool) -> Stage:
    """`large` and `tiny`: options on the GPU and in the rehearsal."""
    start = ("-m", module)
    return Stage(name, seconds, (*start, *large.split()), (*start, *tiny.split()), **more)


def _compare(name: str, seconds: int, large: str, tiny: str) -> Stage:
    tiny = f"{TINY} --sizes 64x96 --main-size 64x96 --batches 1 {tiny}"
    return _stage(name, seconds, "benchmarks.compare", f"{LARGE} {large}", tiny)


def _packed(kind: str) -> Stage:
    packed = TINY.replace("tiny", "tiny:float8" if kind == "float8" else "tiny:Q8_0")
    large, tiny = f"--model random-12b:{kind} --runs 3", f"{packed} --image-size 64x96"
    return _stage(f"packed-{kind}", 40, "benchmarks.latency", large, tiny)


def _memory(name: str, seconds: int, large: str) -> Stage:
    tiny = f"{TINY} --image-size 64x96 --levels none --budgets none 8 --peers"
    return _stage(name, seconds, "benchmarks.memory", large, tiny)


def _peers(names: Sequence[str]) -> str:
    return "--parts peers --engines " + " ".join(f"diffusers:{name}" for name in names)


STAGES = (
    _stage(
        "tests",
        150,
        "pytest",
        "-q tests/test_gpu.py tests/test_kernels.py tests/test_attention.py",
        "-q tests/test_attention.py",
        output=False,
    ),
    _compare(
        "ours",
        70,
        "--parts ours exactness --sizes 512x512 1024x1024 --batches 1",
        "--parts ours exactness",
    ),
    _compare(
        "ceilings",
        60,
        "--parts ceilings --ceiling-seconds 1",
        "--parts ceilings --ceiling-seconds 0.01",
    ),
    _compare("peers", 240, _peers(PEERS), _peers(PEERS[:1])),
    _compare("waterfall", 60, "--parts waterfall", "--parts waterfall"),
    _memory("memory", 240, "--model random-12b --levels none --budgets none 24 16 12 8 4 --peers"),
    _stage(
        "kernels",
        60,
        "benchmarks.kernels",
        "",
        "--image-tokens 4 --text-tokens 2 --heads 2 --seconds 0",
        output=False,
    ),
    *map(_packed, ("float8", "Q8_0", "Q4_K")),
    _memory(
        "memory-float8",
        200,
        "--model random-12b:float8 --levels none regular --budgets none 12 8 --peers",
    ),
    _stage(
        "lora", 90, "benchmarks.lora", "--model random-12b", f"{TINY} --image-size 64x96 --ranks 4"
    ),
    _stage(
        "load",
        150,
        "benchmarks.load",
        "--random --full --runs 2",
        "--random --device cpu --runs 1 --readers ours",
    ),
    _memory("memory-peers", 600, "--model random-12b --levels none --budgets none"),
    _compare("whole-compiles", 900, _peers(WHOLE), _peers(PEERS[:1])),
    _compare("all-sizes", 1800, "--parts ours", "--parts ours"),
)


def main(arguments: list[str] | None = None, *, stages: Sequence[Stage] = STAGES) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.everything",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [stage.name for stage in stages]
    parser.add_argument("folder", type=Path, help="of the results; the same again goes on there")
    parser.add_argument("--minutes", type=float, default=600, help="for all of it (default: 600)")
    parser.add_argument("--only", nargs="+", choices=names, help=f"of: {', '.join(names)}")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with the tiny model")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    options.folder.mkdir(parents=True, exist_ok=True)
    done = _done(options.folder / RESULTS)
    codes = []
    for stage in stages:
        command = stage.rehearsal if options.rehearse else stage.command
        if stage.name not in (options.only or names):
            continue
        left = end - time.monotonic()
        if stage.name in done:
            print(f"{stage.name}: done before", flush=True)
        elif left < (0 if options.rehearse else stage.seconds):
            print(f"{stage.name}: left out, {left:.0f} s do not suffice", flush=True)
        else:
            print(f"{stage.name}: {' '.join(command)}", flush=True)
            # A stage that hangs takes only its own time.
            limit = min(left, max(LONGEST * stage.seconds, SHORTEST))
            code, seconds = _run(stage, command, options.folder, limit)
            ended = "ended, out of time" if code is None else f"exit status {code}"
            print(f"{stage.name}: {seconds:.0f} s, {ended}", flush=True)
            codes.append(code)
    print(f"results: {options.folder / RESULTS}, what was printed: {options.folder / LOG}")
    return int(any(code != 0 for code in codes))


def _done(results: Path) -> set[str]:
    """The stages that have ended well, by their last line."""
    if not results.exists():
        return set()
    lines = _lines(results)
    return {line["stage"] for line in lines if line.get("kind") == "stage" and line["code"] == 0}


def _lines(file: Path) -> list[dict[str, Any]]:
    """Those of a file whose last one may have been cut."""
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def _run(
    stage: Stage, command: Sequence[str], folder: Path, limit: float
) -> tuple[int | None, float]:
    """The exit status of a stage, None if it was ended, and its seconds."""
    current = folder / CURRENT
    _collect(current, "unfinished", folder)  # of a run that was killed
    output = ("--output", str(current)) if stage.output else ()
    start = time.monotonic()
    with (folder / LOG).open("ab") as log:
        log.write(f"\n== {stage.name}: {' '.join(command)}\n".encode())
        log.flush()
        code = _outcome([sys.executable, *command, *output], log, limit)
    seconds = time.monotonic() - start
    _collect(current, stage.name, folder)
    ended = {"kind": "stage", "code": code, "seconds": round(seconds, 1), "command": command}
    _write(folder / RESULTS, [{"stage": stage.name, **ended}])
    return code, seconds


def _outcome(command: list[str], log: IO[bytes], limit: float) -> int | None:
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:  # and whatever it started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _collect(current: Path, stage: str, folder: Path) -> None:
    """Move a stage's lines to those of all."""
    if current.exists():
        _write(folder / RESULTS, [{"stage": stage, **line} for line in _lines(current)])
        current.unlink()


def _write(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    with file.open("a+b") as stream:  # what is there may have been cut
        if stream.tell() and file.read_bytes()[-1:] != b"\n":
            stream.write(b"\n")
        stream.writelines(json.dumps(line).encode() + b"\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
