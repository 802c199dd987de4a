"""Seconds from a checkpoint's files to the device: `python -m benchmarks.load FOLDER`.

Each reader runs in a process of its own, in turns with the others, once it has read the tiny
checkpoint: imports and the start of CUDA are done before the clock starts. `--random` writes
a checkpoint with random weights, small unless `--full`, to FOLDER if nothing is there, or else to
a temporary folder. `ours`, `from_pretrained` and `device_map` make models that are ready to run;
the others only bring the tensors, and `files` reads the bytes and drops them: what the disk or the
page cache can give.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.latency import GIB, positive
from benchmarks.random_model import build, filled
from krea_local import loading, reading, weights
from krea_local.api import choose_device, choose_dtype
from krea_local.errors import InvalidRequest, KreaError
from krea_local.info import versions
from krea_local.tiny import save_model, write_checkpoint, write_settings
from krea_local.weights import COMPONENTS

POLL_SECONDS = 0.005  # between two looks at a reader's memory
READY = "ready"
SMALL: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 2,
        "num_single_layers": 4,
        "num_attention_heads": 4,
        "joint_attention_dim": 512,
    },
    "vae": {"block_out_channels": (32, 64, 64, 64)},
    "text_encoder": {"num_hidden_layers": 2},
    "text_encoder_2": {"num_layers": 2, "d_model": 512, "d_ff": 1024, "num_heads": 8},
}
"""What `--random` has smaller than FLUX.1: 0.2 GB."""
SHARDS = {"transformer": "10GB", "text_encoder_2": "5GB"}  # as in the published checkpoint


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="?", help="in the diffusers layout")
    parser.add_argument("--random", action="store_true", help="write random weights")
    parser.add_argument("--full", action="store_true", help="at FLUX.1's true shapes: 33.7 GB")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument(
        "--caches",
        nargs="+",
        choices=("warm", "cold"),
        default=("warm", "cold"),
        help="with the files in the page cache, or dropped from it",
    )
    parser.add_argument("--runs", type=positive, default=3, help="of each reader")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, help="file of JSON lines, which must not exist")
    # Of a reader's own process: its name, and a checkpoint to begin with.
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only:
        return measure(options)
    lines: list[dict[str, Any]] = []
    try:
        if options.folder is None and not options.random:
            raise InvalidRequest("name a checkpoint's folder, or --random")
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.open("x").close()
        with checkpoint_folder(options) as folder:
            for line in compare(options, folder):
                lines.append(line)
                print(json.dumps({key: line[key] for key in line if key != "versions"}), flush=True)
                if options.output:
                    with options.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
    except (KreaError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    finally:
        if lines:
            print(table(lines))
    return 0


@contextlib.contextmanager
def checkpoint_folder(options: argparse.Namespace) -> Iterator[Path]:
    """The folder to read, written if it is to be."""
    with contextlib.ExitStack() as stack:
        folder = options.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "random"
        if options.random and not (folder / "model_index.json").exists():
            write_random(folder, choose_device(options.device), full=options.full)
        yield folder


def write_random(folder: Path, device: torch.device, *, full: bool) -> None:
    """Write a checkpoint of weights N(0, 0.02), which are made on `device`, in bfloat16."""
    from accelerate import init_empty_weights

    def write(folder: Path) -> None:
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(weights.find("tiny").folder / name, folder / name)
        for name in COMPONENTS:
            with init_empty_weights():  # which, unlike the meta device, makes buffers
                model = build(name, None if full else SMALL[name])
            model = filled(model, device, torch.bfloat16)
            if name in SHARDS:
                model.save_pretrained(folder / name, max_shard_size=SHARDS[name])
            else:
                save_model(model, folder / name)
            del model
        write_settings(folder)

    write_checkpoint(folder, write)
    os.sync()  # only what is on the disk can be dropped from the page cache


def compare(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The figures of each run, and of each reader: medians of runs in turns."""
    checkpoint = weights.find(folder)
    loading.check_layout(checkpoint)
    files = files_of(folder)
    nbytes = sum(file.stat().st_size for file in files)
    device = choose_device(options.device)
    common = {
        "kind": "load",
        "model": checkpoint.label,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(choose_dtype(options.dtype, device)).removeprefix("torch."),
        "nbytes": nbytes,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    for cache in options.caches:
        calls: dict[str, list[dict[str, float]]] = {name: [] for name in options.readers}
        failed = {
            name: f"the package {package} is not installed"
            for name, package in PACKAGES.items()
            if importlib.util.find_spec(package) is None
        }
        for _ in range(options.runs):
            for name in options.readers:
                if name in failed:
                    continue
                if cache == "warm":
                    only_files(folder)
                else:
                    drop_from_cache(files)
                try:
                    figures = run(name, options, folder)
                except RuntimeError as error:
                    failed[name] = str(error)
                    continue
                calls[name].append(figures)
                yield common | {"kind": "load_run", "engine": name, "cache": cache, **figures}
        for name, done in calls.items():
            line = common | {"engine": name, "cache": cache}
            if name in failed:
                yield line | {"failed": failed[name]}
                continue
            seconds = [one["seconds"] for one in done]
            median = statistics.median(seconds)
            yield line | {
                "runs": len(seconds),
                "seconds": median,
                "seconds_all": seconds,
                "gb_per_second": nbytes / median / 1e9,
                "peak_host_gib": statistics.median(one["peak_host_gib"] for one in done),
                "start_seconds": statistics.median(one["start_seconds"] for one in done),
            }


def run(name: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One reader in its own process: seconds, and the most memory of its own that it took."""
    tiny = weights.find("tiny").folder
    command = [sys.executable, "-m", "benchmarks.load", str(folder), "--only", name, str(tiny)]
    command += ["--device", options.device, "--dtype", options.dtype]
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == READY:
                break
        start_seconds = time.perf_counter() - start
        before = peak = anonymous_bytes(process.pid)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("\n")
            process.stdin.flush()
        while not select.select([process.stdout], [], [], POLL_SECONDS)[0]:
            peak = max(peak, anonymous_bytes(process.pid))
        answer = process.stdout.read()
        if process.wait() or not answer:
            errors.seek(0)
            lines = errors.read().strip().splitlines() or [f"exit code {process.returncode}"]
            raise RuntimeError(lines[-1][:300])
    return {
        "seconds": float(answer.splitlines()[-1]),
        "start_seconds": start_seconds,
        "peak_host_gib": (peak - before) / GIB,
    }


def anonymous_bytes(pid: int) -> int:
    """A process's memory without the pages of files that it has mapped; 0 once it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def measure(options: argparse.Namespace) -> int:
    """Have one reader read, in a process of its own that `run` watches."""
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    name, tiny = options.only
    read = READERS[name]
    read(Path(tiny), device, dtype)
    print(READY, flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    kept = read(options.folder, device, dtype)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(time.perf_counter() - start, flush=True)
    del kept
    return 0


def files_of(folder: Path) -> list[Path]:
    """All weights of a checkpoint."""
    checkpoint = weights.find(folder)
    return [file for name in COMPONENTS for file in loading.component_files(checkpoint, name)]


def drop_from_cache(files: Sequence[Path]) -> None:
    """Have none of the files in the page cache."""
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# What each reader does: (folder, device, dtype) -> what is to be kept until the clock stops.
Reader = Callable[[Path, torch.device, torch.dtype], object]


def ours(folder: Path, device: torch.device, dtype: torch.dtype) -> object:
    """Every model of `krea_local.load`."""
    return loading.load_models(weights.find(folder), dtype=dtype, device=device)


def only_files(folder: Path, *_: object) -> object:
    """Bytes, by as many threads as ours, to nowhere."""

    def fill(piece: tuple[Path, int]) -> None:
        file, start = piece
        memory = memories.pop()
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            stream.readinto(memory)
        memories.append(memory)

    memories = [bytearray(reading.PIECE) for _ in range(reading.READERS)]
    pieces = [
        (file, start)
        for file in files_of(folder)
        for start in range(0, file.stat().st_size, reading.PIECE)
    ]
    with ThreadPoolExecutor(reading.READERS) as pool:
        return list(pool.map(fill, pieces))


def with_safetensors(folder: Path, device: torch.device, dtype: torch.dtype) -> object:
    """safetensors' own `load_file`, file by file."""
    from safetensors.torch import load_file

    return [load_file(file, device=str(device)) for file in files_of(folder)]


def from_pretrained(folder: Path, device: torch.device, dtype: torch.dtype) -> object:
    """What most people write: diffusers onto the CPU, then to the device."""
    return pipeline(folder, dtype).to(device)


def device_map(folder: Path, device: torch.device, dtype: torch.dtype) -> object:
    """diffusers right onto the device."""
    return pipeline(folder, dtype, device_map=device.type)


def pipeline(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(str(folder), dtype=dtype, local_files_only=True, **options)


def with_fastsafetensors(folder: Path, device: torch.device, dtype: torch.dtype) -> object:
    """IBM's fastsafetensors, without GPUDirect Storage, which needs a driver of its own."""
    from fastsafetensors import fastsafe_open

    checkpoint = weights.find(folder)
    found = []
    for name in COMPONENTS:
        files = [str(file) for file in loading.component_files(checkpoint, name)]
        with fastsafe_open(files, device=str(device), nogds=True) as opened:
            found += [opened.get_tensor(key) for key in opened.keys()]  # noqa: SIM118
    return found


def with_runai(folder: Path, device: torch.device, dtype: torch.dtype) -> object:
    """Run:ai's model streamer."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in files_of(folder)], device=str(device))
        return [tensor.to(device) for _, tensor in streamer.get_tensors()]


READERS: dict[str, Reader] = {
    "ours": ours,
    "files": only_files,
    "safetensors": with_safetensors,
    "from_pretrained": from_pretrained,
    "device_map": device_map,
    "fastsafetensors": with_fastsafetensors,
    "runai": with_runai,
}
PACKAGES = {"fastsafetensors": "fastsafetensors", "runai": "runai_model_streamer"}


def table(lines: list[dict[str, Any]]) -> str:
    """The figures for people, with ratios to from_pretrained of the same run."""
    rows = [
        f"{'reader':16} {'cache':5} {'s':>8} {'GB/s':>7} {'host GiB':>9} {'x from_pretrained':>18}"
    ]
    base = {
        line["cache"]: line["seconds"]
        for line in lines
        if line["kind"] == "load" and line["engine"] == "from_pretrained" and "seconds" in line
    }
    for line in lines:
        if line["kind"] == "load_run":
            continue
        start = f"{line['engine']:16} {line['cache']:5}"
        if "failed" in line:
            rows.append(f"{start} not measured: {line['failed']}")
            continue
        slowest = base.get(line["cache"])
        ratio = f"{slowest / line['seconds']:18.2f}" if slowest else ""
        rows.append(
            f"{start} {line['seconds']:8.3f} {line['gb_per_second']:7.2f} "
            f"{line['peak_host_gib']:9.2f} {ratio}"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
