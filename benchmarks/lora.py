"""What LoRAs cost: seconds a call and to change them. `python -m benchmarks.lora --model tiny`.

`--model random-12b` makes FLUX.1 [dev]'s parameters at random on the GPU. A LoRA of every layer of
the blocks is written for each rank, and taken from the disk's cache. Calls without and with it take
turns, level by level; seconds are medians. Each line of JSON is one rank at one level.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file

from benchmarks.latency import device_name, parse_size, peak_gib, positive, reset_peak
from benchmarks.random_model import krea_of
from krea_local.engine import Engine
from krea_local.errors import KreaError
from krea_local.info import versions
from krea_local.pipeline import Krea
from krea_local.schema import Acceleration


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lora",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="tiny", help="tiny, random-12b, a folder or a hub id")
    parser.add_argument("--image-size", default="1024x1024", help="WIDTHxHEIGHT or a preset")
    parser.add_argument("--steps", type=positive, default=28)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[16, 64])
    parser.add_argument(
        "--levels", nargs="+", default=["none", "regular"], choices=get_args(Acceleration)
    )
    parser.add_argument("--runs", type=positive, default=3, help="calls, after the first of a kind")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--offload", default="none")
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file too")
    options = parser.parse_args(arguments)
    try:
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.open("a").close()  # before all the work
        krea = krea_of(options.model, options.device, options.dtype, options.offload, 1)
        with tempfile.TemporaryDirectory(prefix="krea_local-") as folder:
            for rank in options.ranks:
                file = write_lora(krea, rank, Path(folder) / f"{rank}.safetensors")
                for level in options.levels:
                    result = measure(krea, level, rank, file, options)
                    print(describe(result))
                    line = json.dumps(result)
                    print(line, flush=True)
                    if options.output:
                        with options.output.open("a", encoding="utf-8") as stream:
                            stream.write(line + "\n")
    except (KreaError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    return 0


def write_lora(krea: Krea, rank: int, file: Path) -> Path:
    """A LoRA of all linear layers in the blocks, modulation apart, in bfloat16."""
    assert isinstance(krea.engine, Engine)
    transformer = krea.engine.transformer
    random = torch.Generator().manual_seed(rank)
    names = {id(module): name for name, module in transformer.named_modules()}
    tensors = {}
    for owner, attribute in transformer.large_layers():
        linear = owner.get_submodule(attribute)
        assert isinstance(linear, torch.nn.Linear)
        outputs, inputs = linear.weight.shape
        layer = f"diffusion_model.{names[id(owner)]}.{attribute}"
        for half, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            tensor = 0.02 * torch.randn(shape, generator=random)
            tensors[f"{layer}.lora_{half}.weight"] = tensor.bfloat16()
    save_file(tensors, file)
    return file


def measure(
    krea: Krea, level: Acceleration, rank: int, file: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """The figures of one rank at one level."""
    width, height = parse_size(options.image_size)

    def seconds(*loras: Path) -> float:
        start = time.perf_counter()
        krea.txt2img(
            "a red fox in fresh snow",
            image_size={"width": width, "height": height},
            num_inference_steps=options.steps,
            seed=1,
            acceleration=level,
            loras=loras,
        )
        return time.perf_counter() - start

    reset_peak(krea.device)
    seconds()  # the level's kernels, and its weights in 8-bit floats
    plain = [seconds() for _ in range(options.runs)]
    first = seconds(file)
    adapted = [seconds(file) for _ in range(options.runs)]
    back = seconds()
    plain += [seconds() for _ in range(options.runs)]
    without, with_lora = statistics.median(plain), statistics.median(adapted)
    return {
        "engine": f"krea_local:{level}",
        "model": krea.label,
        "device": device_name(krea.device),
        "dtype": str(krea.dtype).removeprefix("torch."),
        "offload": krea.offload,
        "width": width,
        "height": height,
        "steps": options.steps,
        "runs": options.runs,
        "rank": rank,
        "file_bytes": file.stat().st_size,
        "seconds_without": without,
        "seconds": with_lora,
        "ratio": with_lora / without,
        "add_seconds": first - with_lora,
        "take_away_seconds": back - without,
        "peak_gib": peak_gib(krea.device),
        "versions": versions(),
    }


def describe(result: dict[str, Any]) -> str:
    """The figures for people."""
    return (
        f"{result['engine']}, rank {result['rank']} ({result['file_bytes'] / 1e6:.0f} MB): "
        f"{result['seconds']:.3f} s a call, {result['ratio']:.3f} x without; "
        f"to add {result['add_seconds']:.2f} s, to take away {result['take_away_seconds']:.2f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
