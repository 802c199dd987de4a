"""Pictures on a small GPU's memory, ours and diffusers': `python -m benchmarks.memory`.

One large GPU stands for smaller ones: each measurement is a process of its own, whose GPU memory is
limited to the budget before the model is loaded for it. The picture must not change with the
budget. An emulated small card proves memory and overlap, not a small card's seconds. diffusers'
ways to offload follow in the same run, without a limit, to be held against ours at their peaks.

On a CPU nothing is limited, and there are no device peaks: each budget stands for the plan that the
12 B model would get, with a share of the model's own blocks. That rehearses the code, no more.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

import krea_local
from benchmarks import ceilings
from benchmarks.latency import GIB, device_name, parse_size, positive, reset_peak
from benchmarks.peers import OFFLOADING
from benchmarks.random_model import RANDOM, krea_of, random_models
from benchmarks.timing import (
    HALF,
    Calls,
    described,
    krea_draw,
    measure,
    peer_draw,
    prepare,
    reason_of,
)
from krea_local import loading, weights
from krea_local.api import choose_device, choose_dtype
from krea_local.engine import Engine
from krea_local.errors import KreaError
from krea_local.info import versions
from krea_local.pipeline import Krea
from krea_local.plan import FLUX1, Plan, choose
from krea_local.progress import Progress
from krea_local.schema import Acceleration
from krea_local.speed import LEVELS

BUDGETS = ("none", "24", "16", "12", "8", "4")
GB = 10**9
NOTES = {
    True: "a CPU: budgets are plans of the same arithmetic, nothing is limited, no device peaks",
    False: "an emulated small card proves memory and overlap, not a small card's seconds",
}


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        engine: "krea_local:LEVEL", or the name of one of `peers.OFFLOADING`.
        budget_gb: of GPU memory, in 10^9 bytes; None for no limit.
    """

    engine: str
    budget_gb: float | None
    model: str
    width: int
    height: int
    batch: int
    steps: int
    runs: int
    device: str
    dtype: str


Start = Callable[[Job, float], dict[str, Any]]
"""Does a job within so many seconds; its figures, or why there are none."""


def main(arguments: list[str] | None = None, *, start: Start | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="random-12b", help="random-12b, tiny, or a folder")
    parser.add_argument(
        "--budgets", nargs="*", type=budget, default=list(map(budget, BUDGETS)), metavar="GB"
    )
    levels = get_args(Acceleration)
    parser.add_argument("--levels", nargs="+", choices=levels, default=levels)
    names = [peer.engine for peer in OFFLOADING]
    parser.add_argument(
        "--peers", nargs="*", choices=names, default=names, help="(default: all; none: `--peers`)"
    )
    parser.add_argument("--image-size", default="1024x1024", help="WIDTHxHEIGHT or a preset")
    parser.add_argument("--batch", type=positive, default=1, help="images a call")
    parser.add_argument("--steps", type=positive, default=28)
    parser.add_argument("--runs", type=positive, default=3, help="measured calls, after two")
    parser.add_argument("--limit", type=float, default=900, help="seconds for each measurement")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, help="file of JSON lines, which must not exist")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.job:
        print(json.dumps(work(Job(**json.loads(options.job)))))
        return 0
    lines: list[dict[str, Any]] = []
    try:
        jobs = jobs_of(options)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.open("x").close()
        for job in jobs:
            figures = (start or in_a_process)(job, options.limit)
            lines.append(line_of(job, figures, lines))
            write(lines[-1], options.output)
    except (KreaError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    finally:
        if lines:
            print(table(lines))
    return int(any("failed" in line for line in lines if line["engine"].startswith("krea_local")))


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """All measurements, each level's without a limit before its others, which refer to it."""
    width, height = parse_size(options.image_size)
    budgets = sorted(set(options.budgets), key=lambda one: -one if one else float("-inf"))
    ours = [(f"krea_local:{level}", one) for level in options.levels for one in budgets]
    names = ("model", "batch", "steps", "runs", "device", "dtype")
    common = {name: getattr(options, name) for name in names}
    return [
        Job(engine, one, width=width, height=height, **common)
        for engine, one in [*ours, *((peer, None) for peer in options.peers)]
    ]


def in_a_process(job: Job, limit: float) -> dict[str, Any]:
    """`work` in a process of its own, so that it may die without harm."""
    command = [sys.executable, "-m", "benchmarks.memory", "--job", json.dumps(asdict(job))]
    return outcome(command, limit)


def outcome(command: list[str], limit: float) -> dict[str, Any]:
    """The last JSON object that a command prints, or how it ended without one."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {limit:g} s"}
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if printed:
        figures: dict[str, Any] = json.loads(printed[-1])
        return figures
    code = done.returncode
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    said = done.stderr.strip().splitlines()[-1:]
    return {"failed": ": ".join([f"the process ended, {ended}", *said])[:400]}


def work(job: Job) -> dict[str, Any]:
    """One job's figures, or why there are none."""
    try:
        device = choose_device(job.device)
        common = {
            "device": device_name(device),
            "dtype": str(choose_dtype(job.dtype, device)).removeprefix("torch."),
            "h2d_gb_per_second": ceilings.host_to_device_rate(device, scale=8),
        }
        return common | (ours if job.engine.startswith("krea_local:") else theirs)(job, device)
    except Exception as error:  # a finding, not the end
        return {"failed": reason_of(error)}


def ours(job: Job, device: torch.device) -> dict[str, Any]:
    """Our pipeline, loaded for the budget."""
    level: Any = job.engine.partition(":")[2]
    latents: list[str] = []

    def note(progress: Progress) -> None:
        if progress.latents is not None and progress.step == progress.num_steps and not latents:
            numbers = progress.latents.contiguous().view(torch.uint8).cpu().numpy()
            latents.append(hashlib.sha256(numbers.tobytes()).hexdigest())

    with HostPeak() as host:
        start = time.perf_counter()
        krea = _load(job, device, level, host)
        prepare(krea, level)
        load_seconds = time.perf_counter() - start
        loaded, plan = device_peaks(device), krea.plan
        calls = Calls(device, job.steps, job.runs)
        figures = measure(krea_draw(krea, level, note), calls, (job.width, job.height), job.batch)
    figures.pop("peak_gib")
    peaks = {name: max(loaded[name], peak) for name, peak in device_peaks(device).items()}
    skips = krea.engine.settings[level].skipping is not None
    return {
        "offload": krea.offload,
        **placed(krea, level),
        **figures,
        "load_seconds": load_seconds,
        "seconds_a_step": figures["stages"]["denoise"] / job.steps,
        "computed_steps": job.steps - sum(HALF.pattern(job.steps)) if skips else job.steps,
        **peaks,
        **host.figures(),
        "latents_sha256": latents[0],
        "replanned": krea.plan is not plan,  # memory ran out after all
        "notices": list(krea.engine.notices.get(level, ())),
        "settings": described(krea.engine.settings[level]),
        "lossless": all(step.lossless for step in LEVELS[level]),
    }


def _load(job: Job, device: torch.device, level: Acceleration, host: HostPeak) -> Krea:
    """Within the limit; random weights, which are made on the device, only settle within it."""
    is_random = job.model.partition(":")[0] == RANDOM
    settle(device)
    if not is_random:
        limit_memory(device, job.budget_gb)
    memory = memory_of(job, device)
    krea = krea_of(
        job.model, str(device), job.dtype, "none", job.batch, acceleration=level, memory=memory
    )
    if is_random:
        settle(device)
        limit_memory(device, job.budget_gb)
        host.peak = 0
    return krea


def memory_of(job: Job, device: torch.device) -> str | None:
    """What `load` is told: the budget; on a CPU, what the plan that stands for it takes there."""
    if device.type == "cuda":
        return "auto" if job.budget_gb is None else f"{int(job.budget_gb * GB)}B"
    if job.budget_gb is None:
        return None
    large = choose(FLUX1, int(job.budget_gb * GB))
    sizes = loading.sizes(weights.find(job.model), choose_dtype(job.dtype, device))
    resident = large.resident * len(sizes.blocks) // len(FLUX1.blocks)
    return f"{Plan(sizes, large.offload, resident).peak}B"


def limit_memory(device: torch.device, budget_gb: float | None) -> None:
    """Have torch's allocator hold no more than the budget; CUDA's own context is not in it."""
    if device.type == "cuda" and budget_gb is not None:
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(budget_gb * GB / total, 1.0), device)


def settle(device: torch.device) -> None:
    """Give back what was needed before, and begin to look for the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak(device)


def placed(krea: Krea, level: Acceleration) -> dict[str, Any]:
    """What stays on the device, and what crosses the bus at a step that is computed."""
    plan = krea.plan
    assert isinstance(krea.engine, Engine)
    if plan is None:
        return {"streamed_gb_a_step": 0.0}
    plan = plan.for_blocks(krea.engine.block_bytes(level) or plan.sizes.blocks)
    count = len(plan.sizes.blocks)
    return {
        "resident_blocks": plan.resident if plan.offload == "blocks" else count,
        "blocks": count,
        "streamed_gb_a_step": plan.streamed / GB,
        "plan_gib": plan.peak / GIB,  # at 1 megapixel
    }


def theirs(job: Job, device: torch.device) -> dict[str, Any]:
    """A way of diffusers, with weights in host memory as its users have them, not locked there."""
    peer = next(one for one in OFFLOADING if one.engine == job.engine)
    reason = peer.needs(device)
    if reason is not None:
        return {"failed": reason}
    dtype = choose_dtype(job.dtype, device)
    if job.model.partition(":")[0] == RANDOM:
        models = random_models(device, dtype, engine="diffusers", offload="model")
    else:
        loaded = krea_local.load(
            job.model, device="cpu", dtype=dtype, engine="diffusers", progress=False
        )
        models = loaded.models
    settle(device)
    calls = Calls(device, job.steps, job.runs)
    with HostPeak() as host, peer.build(models) as draw:
        figures = measure(peer_draw(draw), calls, (job.width, job.height), job.batch)
        peaks = device_peaks(device)
    figures.pop("peak_gib")
    return {
        "offload": job.engine.removeprefix("diffusers:"),
        **figures,
        **peaks,
        **host.figures(),
        "lossless": peer.lossless,
    }


def device_peaks(device: torch.device) -> dict[str, float]:
    """What torch's allocator gave out at most, and what it held for that; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
    }


class HostPeak:
    """Looks at the process's memory 20 times a second, inside the block.

    Attributes:
        peak: bytes of pages that are in memory and belong to no file; 0 where Linux does not tell.
        locked: bytes that were locked there at that moment, as far as the kernel counts them.
    """

    def __init__(self) -> None:
        self.peak = self.locked = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> HostPeak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def figures(self) -> dict[str, float]:
        """The same in GiB, for a line."""
        if not self.peak:
            return {}
        return {"host_gib": self.peak / GIB, "host_locked_gib": self.locked / GIB}

    def _watch(self) -> None:
        while True:
            found = _host_bytes()
            used = found.get("RssAnon", 0) + found.get("RssShmem", 0)
            if used > self.peak:
                self.peak = used
                self.locked = found.get("VmLck", 0) + found.get("VmPin", 0)
            if self._done.wait(0.05):
                return


def _host_bytes() -> dict[str, int]:
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    rows = (line.split() for line in text.splitlines() if line.endswith("kB"))
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows}


def line_of(job: Job, figures: dict[str, Any], earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the results, with what follows from those before."""
    line = {
        "kind": "memory",
        **asdict(job),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        **figures,
    }
    whole = next((one for one in earlier if is_whole(one) and one["engine"] == job.engine), None)
    if job.budget_gb is None or whole is None or "seconds" not in figures:
        return line
    line["same_latents"] = figures["latents_sha256"] == whole["latents_sha256"]
    line["times_unlimited"] = figures["seconds"] / whole["seconds"]
    rate = figures["h2d_gb_per_second"]
    if isinstance(rate, float):
        # A skipped step takes one block of many, which is left out.
        share = figures["computed_steps"] / job.steps
        copying = figures["streamed_gb_a_step"] * share / rate
        line["times_floor"] = figures["seconds_a_step"] / max(whole["seconds_a_step"], copying)
    return line


def is_whole(line: dict[str, Any]) -> bool:
    """Whether it is ours, measured without a limit."""
    is_ours = line["engine"].startswith("krea_local:")
    return is_ours and line["budget_gb"] is None and "seconds" in line


def write(line: dict[str, Any], output: Path | None) -> None:
    """Print one line, and store it at once."""
    print(json.dumps({key: line[key] for key in line if key != "versions"}), flush=True)
    if output:
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


COLUMNS: dict[str, tuple[str, str]] = {
    "budget_gb": ("GB", "g"),
    "offload": ("offload", ""),
    "resident_blocks": ("blocks", ""),
    "streamed_gb_a_step": ("GB/step", ".2f"),
    "seconds": ("s", ".2f"),
    "first_image_seconds": ("first", ".2f"),
    "seconds_a_step": ("s/step", ".3f"),
    "times_unlimited": ("x none", ".2f"),
    "times_floor": ("x floor", ".2f"),
    "peak_gib": ("GiB", ".2f"),
    "peak_reserved_gib": ("held", ".2f"),
    "host_gib": ("host", ".1f"),
    "same_latents": ("same", ""),
}


def table(lines: list[dict[str, Any]]) -> str:
    """The figures for people; then ours against diffusers' best way that takes as much or more."""
    rows = [["engine", *(title for title, _ in COLUMNS.values())]]
    for line in lines:
        row = [line["engine"], *(_cell(line.get(name), how) for name, (_, how) in COLUMNS.items())]
        rows.append([*row[:2], f"not measured: {line['failed']}"] if "failed" in line else row)
    text = "\n".join(_columns(rows))
    devices = {line["device"] for line in lines if "device" in line}
    if against := _against(lines):
        text += "\n\n" + "\n".join(_columns(against))
    return "\n".join([text, *(NOTES[device == "cpu"] for device in devices)])


def _against(lines: list[dict[str, Any]]) -> list[list[str]]:
    measured = [line for line in lines if "seconds" in line and "peak_gib" in line]
    peers = [line for line in measured if not line["engine"].startswith("krea_local:")]
    rows = [["ours", "GB", "GiB", "s", "diffusers' best in as much", "GiB", "s", "times"]]
    for line in measured:
        larger = [one for one in peers if one["peak_gib"] >= line["peak_gib"]]
        if line in peers or not larger:
            continue
        best = min(larger, key=lambda one: float(one["seconds"]))
        mine, other = (
            [_cell(one["peak_gib"], ".2f"), _cell(one["seconds"], ".2f")] for one in (line, best)
        )
        times = _cell(best["seconds"] / line["seconds"], ".2f")
        rows.append(
            [line["engine"], _cell(line["budget_gb"], "g"), *mine, best["engine"], *other, times]
        )
    return rows if len(rows) > 1 else []


def _cell(value: object, how: str) -> str:
    if value is None:
        return "-"
    return {True: "yes", False: "NO"}[value] if isinstance(value, bool) else format(value, how)


def _columns(rows: list[list[str]]) -> list[str]:
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in whole) for i in range(len(rows[0]))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def budget(text: str) -> float | None:
    """10^9 bytes of GPU memory; None for "none"."""
    if text == "none":
        return None
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
