"""Seconds, memory and cost of one call: `python -m benchmarks.latency --model tiny`.

`--model random-12b` makes FLUX.1 [dev]'s 12 B parameters at random on the GPU; a folder or hub id
measures real weights. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.random_model import krea_of
from krea_local.errors import InvalidRequest, KreaError
from krea_local.info import versions
from krea_local.loading import EngineName
from krea_local.schema import PRESETS, Acceleration

HOSTED_DOLLARS_PER_MEGAPIXEL = 0.025  # billed by rounding up to the nearest megapixel
GIB = 2**30


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default="tiny",
        help="tiny, mini, random-12b, random-12b:Q4_K, a folder, a hub id",
    )
    parser.add_argument("--image-size", default="1024x1024", help="WIDTHxHEIGHT or a preset")
    parser.add_argument("--steps", type=positive, default=28)
    parser.add_argument(
        "--batch", type=positive, default=1, help="images a call, denoised together"
    )
    parser.add_argument(
        "--runs", type=positive, default=5, help="measured calls, after the first image"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--offload", default="none")
    parser.add_argument("--acceleration", default="none", choices=get_args(Acceleration))
    parser.add_argument("--engine", default="native", choices=get_args(EngineName))
    parser.add_argument(
        "--gpu-price", type=float, default=3.0, help="dollars an hour, for the cost"
    )
    parser.add_argument("--output", type=Path, help="append the JSON line to this file too")
    options = parser.parse_args(arguments)
    try:
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.open("a").close()  # before all the work
        result = measure(options)
        print(table(result, options.gpu_price))
        line = json.dumps(result)
        print(line)
        if options.output:
            with options.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    except (KreaError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one configuration; seconds are medians over `runs` calls."""
    width, height = parse_size(options.image_size)
    start = time.perf_counter()
    krea = krea_of(
        options.model,
        options.device,
        options.dtype,
        options.offload,
        options.batch,
        engine=options.engine,
        acceleration=options.acceleration,
    )
    load_seconds = time.perf_counter() - start
    reset_peak(krea.device)
    calls = []
    for run in range(options.runs + 1):
        start = time.perf_counter()
        result = krea.txt2img(
            # A new prompt each time: the cache of prompts would hide the text encoders.
            f"a red fox in fresh snow, number {run}",
            image_size={"width": width, "height": height},
            num_inference_steps=options.steps,
            num_images=options.batch,
            seed=run,
        )
        calls.append((time.perf_counter() - start, dict(result.timings)))
    hot = calls[1:]
    return {
        "engine": (
            f"krea_local:{krea.acceleration}"
            if options.engine == "native"
            else "krea_local:diffusers-transformer"
        ),
        "model": krea.label,
        "device": device_name(krea.device),
        "dtype": str(krea.dtype).removeprefix("torch."),
        "offload": krea.offload,
        "width": result.images[0].width,  # as drawn, which rounding may have changed
        "height": result.images[0].height,
        "steps": options.steps,
        "batch": options.batch,
        "runs": len(hot),
        "seconds": statistics.median(seconds for seconds, _ in hot),
        "seconds_all": [seconds for seconds, _ in hot],
        "stages": {
            name: statistics.median(timings[name] for _, timings in hot) for name in hot[0][1]
        },
        "first_image_seconds": calls[0][0],
        "load_seconds": load_seconds,
        "peak_gib": peak_gib(krea.device),
        "versions": versions(),
    }


def table(result: dict[str, Any], dollars_an_hour: float) -> str:
    """The figures for people."""
    seconds, images = result["seconds"], result["batch"]
    megapixels = images * result["width"] * result["height"] / 1e6
    rows = [
        ("device", result["device"]),
        ("model", f"{result['model']}, {result['dtype']}, offload {result['offload']}"),
        ("call", f"{images} x {result['width']}x{result['height']}, {result['steps']} steps"),
        ("load", f"{result['load_seconds']:.2f} s"),
        ("first image", f"{result['first_image_seconds']:.3f} s"),
        *((name, f"{value:.3f} s") for name, value in result["stages"].items()),
        ("end to end", f"{seconds:.3f} s (median of {result['runs']})"),
        ("throughput", f"{60 * images / seconds:.1f} images a minute"),
        ("per megapixel", f"{seconds / megapixels:.3f} s"),
        ("peak memory", f"{result['peak_gib']:.2f} GiB"),
    ]
    if result["device"].startswith("NVIDIA"):  # a CPU's hours are not what a GPU's price buys
        cost = dollars_an_hour / 3600 * seconds / megapixels
        rows.append(
            (
                "cost",
                f"${cost:.5f} a megapixel at ${dollars_an_hour:g} an hour; the hosted API: "
                f"${HOSTED_DOLLARS_PER_MEGAPIXEL}",
            )
        )
    return "\n".join(f"{name:14} {value}" for name, value in rows)


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of a preset or of WIDTHxHEIGHT."""
    for preset, size in PRESETS.items():
        if text == preset:
            return size
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise InvalidRequest(f"--image-size {text}: should be WIDTHxHEIGHT or a preset")
    return int(width), int(height)


def positive(text: str) -> int:
    """A number of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "cpu"


def reset_peak(device: torch.device) -> None:
    """Begin to look for the peak of the device's memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Peak memory of the device; on the CPU, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


if __name__ == "__main__":
    sys.exit(main())
